"""Edges + a source -> hooks. What a receiver reads is shifted by what its senders would send instead:

    shift[row, pos, receiver] = sum over the row's edges s -> receiver of (source[s] - what s gives in this row)

before the receiver's LayerNorm (method, section 8; Goldowsky-Dill et al. 2023). Senders below a row's first block are
as in the unpatched run, so that their differences are computed once; those above are live: a head, MLP or embedding
that the row patches as a site sends what it was patched to. A patched resid, mid or attn is no sender; shifts are added
to it.

A source of another tower writes by that tower's weights: a head there sends `z W_O + b_O / H` of its own, so that all
heads of a layer send what its attention writes. Within one tower the bias cancels, however it is shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.address import Addresses
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder
from clip_lens.model.site import Site, hook_name
from clip_lens.model.tower import Block

TILE = 2**25
"""Numbers held at once while many senders are summed, 128 MB in float32."""


def sender_hook(sender: Site) -> str:
    """Where a sender's output is read: the embedding, a head's z, an MLP's output."""
    return hook_name(sender, 0) if sender.kind != "head" else f"blocks.{sender.layer}.attn.hook_z"


def written(
    encoder: HookedTextEncoder, sender: Site, value: Float[Tensor, "pair pos ..."]
) -> Float[Tensor, "pair pos d_model"]:
    """What a sender writes into the residual stream, from the activation at its hook; a head without bias."""
    if sender.kind != "head":
        return value
    block = cast(Block, encoder.tower.blocks[sender.layer])
    return value[:, :, sender.unit] @ block.attn.W_O[sender.unit].to(value)


def sent(
    encoder: HookedTextEncoder,
    by: HookedTextEncoder,
    sender: Site,
    source: Float[Tensor, "pair pos ..."],
    live: Float[Tensor, "pair pos ..."],
) -> Float[Tensor, "pair pos d_model"]:
    """What a sender would send, written by the weights of `by`, minus what it gives; 0 where the source has nothing."""
    if by is encoder:
        return written(encoder, sender, (source - live).nan_to_num(0.0))
    return (_with_bias(by, sender, source) - _with_bias(encoder, sender, live)).nan_to_num(0.0)


def _with_bias(
    encoder: HookedTextEncoder, sender: Site, value: Float[Tensor, "pair pos ..."]
) -> Float[Tensor, "pair pos d_model"]:
    """What a sender writes, a head with its equal share of the attention's output bias."""
    given = written(encoder, sender, value)
    if sender.kind != "head":
        return given
    return given + cast(Block, encoder.tower.blocks[sender.layer]).attn.b_O.to(given) / encoder.n_heads


def differences(
    encoder: HookedTextEncoder,
    by: HookedTextEncoder,
    senders: Sequence[Site],
    source: Cache,
    run: Cache,
    differs: Bool[Tensor, "pair pos"],
) -> tuple[Float[Tensor, "sender pair pos d_model"], Bool[Tensor, "sender pair pos"]]:
    """What each sender would send, source (whose senders write by the weights of `by`) minus unpatched run, and where
    the source has something; 0 elsewhere and where it is known not to differ from the run."""
    if not senders:
        nothing = differs.new_zeros(0, *differs.shape, encoder.tower.cfg.d_model)
        return nothing.to(encoder.dtype), nothing.any(-1)
    values, present = [], []
    for sender in senders:
        name = sender_hook(sender)
        present.append(~(source[name] - run[name]).flatten(2).isnan().all(-1))
        values.append(sent(encoder, by, sender, source[name], run[name]))
    return torch.stack(values) * differs.unsqueeze(-1), torch.stack(present)


@dataclass(repr=False, eq=False)
class EdgePatch:
    """The edges of some rows, as hooks for one forward pass; `live` and `sent` (by sender and number of positions) are
    filled as the pass goes on.

    `at(hook name)` says which of the text's positions the activation at that hook holds, for each row.
    """

    encoder: HookedTextEncoder
    by: HookedTextEncoder
    addresses: Addresses
    source: Cache
    change: Float[Tensor, "sender pair pos d_model"]
    positions: Bool[Tensor, "slot pair pos"]
    place: Int[Tensor, "row"]
    pair: Int[Tensor, "row"]
    layer: int
    at: Callable[[str], Int[Tensor, "row at"]]
    live: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.pair.device
        self.row, columns = self.addresses.edges.rows(self.place)
        self.sender, self.receiver, self.slot = columns.unbind(1)
        patched = "blocks.0.hook_resid_pre" in self.addresses.hooks and self.layer == 0
        live = [patched if site.kind == "embed" else site.layer >= self.layer for site in self.addresses.senders]
        self.is_live, self.n_live = torch.tensor(live, device=device), sum(live)

    def receiving(self) -> list[Hook]:
        """The hooks at receivers that stand before those of sites: a patched q is not shifted."""
        hooks: list[Hook] = []
        for kind, layer in sorted({(site.kind, site.layer) for site in self._receivers()}):
            if kind == "out":
                continue
            block = f"blocks.{layer}"
            if kind == "mlp":
                hooks.append((f"{block}.hook_mlp_in", partial(self._shift_all, kind="mlp", layer=layer)))
                continue
            hooks.append((f"{block}.attn.hook_{kind}", partial(self._project, kind=kind, layer=layer)))
        return hooks

    def capturing(self) -> list[Hook]:
        """The hooks behind those of sites: what receivers will need, and the shift of the output."""
        kinds = {(site.kind, site.layer) for site in self._receivers()}
        names = {f"blocks.{layer}.hook_resid_pre" for kind, layer in kinds if kind in ("q", "k", "v")}
        used = self.sender.unique().tolist()
        names |= {sender_hook(self.addresses.senders[number]) for number in used if self.is_live[number]}
        hooks: list[Hook] = [(name, partial(self._keep, name=name)) for name in sorted(names)]
        if ("out", 0) in kinds:
            last = f"blocks.{self.encoder.n_layers - 1}.hook_resid_post"
            hooks.append((last, partial(self._shift_all, kind="out", layer=0)))
        return hooks

    def _receivers(self) -> list[Site]:
        return [self.addresses.receivers[number] for number in self.receiver.unique().tolist()]

    def _keep(self, value: Tensor, hook: object, *, name: str) -> None:
        self.live[name] = value

    def _chosen(self, kind: str, layer: int) -> Bool[Tensor, "entry"]:
        wanted = [site.kind == kind and site.layer == layer for site in self.addresses.receivers]
        return torch.tensor(wanted, device=self.receiver.device)[self.receiver]

    def _shift_all(self, value: Float[Tensor, "row at d_model"], hook: object, *, kind: str, layer: int) -> Tensor:
        """A receiver without heads: its rows' input plus their shift."""
        n_layers = self.encoder.n_layers
        name = f"blocks.{layer}.hook_mlp_in" if kind == "mlp" else hook_name(Site("resid", n_layers), n_layers)
        rows, _, shift = self._shifts(self._chosen(kind, layer), self.at(name))
        return value.index_add(0, rows, shift)

    def _project(self, value: Float[Tensor, "row at head d_head"], hook: object, *, kind: str, layer: int) -> Tensor:
        """q, k or v of the heads whose input is shifted, computed from that input."""
        block = cast(Block, self.encoder.tower.blocks[layer])
        weight, bias = getattr(block.attn, f"W_{kind.upper()}"), getattr(block.attn, f"b_{kind.upper()}")
        name = f"blocks.{layer}.attn.hook_{kind}"
        at = self.at(name)
        rows, receivers, shift = self._shifts(self._chosen(kind, layer), at)
        heads = torch.tensor([site.unit or 0 for site in self.addresses.receivers], device=rows.device)[receivers]
        x = self._held(f"blocks.{layer}.hook_resid_pre", at)
        normalized = block.ln1(x[rows] + shift)
        result = value.clone()
        for head in heads.unique().tolist():
            mine = heads == head
            projected = normalized[mine] @ weight[head] + bias[head]
            result[rows[mine], :, head] = projected
        return result

    def _held(self, name: str, at: Int[Tensor, "row at"]) -> Float[Tensor, "row at ..."]:
        """A kept activation at the positions `at`: all that it holds, or the pooled one of them."""
        value = self.live[name]
        if value.shape[1] == at.shape[1]:
            return value
        column = (self.at(name) == at).int().argmax(1)
        return value[torch.arange(len(value), device=value.device), column].unsqueeze(1)

    def _shifts(
        self, chosen: Bool[Tensor, "entry"], at: Int[Tensor, "row at"]
    ) -> tuple[Int[Tensor, "shift"], Int[Tensor, "shift"], Float[Tensor, "shift at d_model"]]:
        """The shifts of some entries' receivers: row, receiver, value; one per row and receiver."""
        row, sender, receiver, slot = (column[chosen] for column in (self.row, self.sender, self.receiver, self.slot))
        key = row * len(self.addresses.receivers) + receiver
        if len(key.unique()) == len(key) and not self.is_live[sender].any():
            here = at[row]
            mask = self.positions[slot, self.pair[row]].gather(1, here)
            return row, receiver, self.change[sender[:, None], self.pair[row][:, None], here] * mask.unsqueeze(-1)
        return self._summed(row, sender, receiver, slot, at)

    def _summed(
        self, row: Tensor, sender: Tensor, receiver: Tensor, slot: Tensor, at: Int[Tensor, "row at"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over senders as one matrix product per row and position, some rows at a time. An edge at several slots
        is shifted once where they overlap."""
        rows, r = row.unique(return_inverse=True)
        senders, s = sender.unique(return_inverse=True)
        receivers, c = receiver.unique(return_inverse=True)
        size = at.shape[1] * (len(senders) + len(receivers)) * self.change.shape[-1]
        step = max(1, TILE // size)
        parts, touched = [], []
        for start in range(0, len(rows), step):
            tile = rows[start : start + step]
            mine = (r >= start) & (r < start + step)
            where = self.positions[slot[mine], self.pair[row[mine]]].gather(1, at[row[mine]])
            weight = self.change.new_zeros(len(tile), len(receivers), len(senders), at.shape[1])
            index = (r[mine] - start, c[mine], s[mine])
            weight.index_put_(index, where.to(weight.dtype), accumulate=True)
            shift = weight.clamp_(max=1.0).permute(0, 3, 1, 2) @ self._sent(senders.tolist(), tile, at)
            key = (index[0] * len(receivers) + index[1]).unique()
            line, number = key // len(receivers), key % len(receivers)
            parts.append(shift.movedim(1, 2)[line, number])
            touched.append(torch.stack([tile[line], receivers[number]]))
        line, number = torch.cat(touched, 1)
        return line, number, torch.cat(parts)

    def _sent(
        self, senders: Iterable[int], rows: Int[Tensor, "tile"], at: Int[Tensor, "row at"]
    ) -> Float[Tensor, "tile at sender d_model"]:
        """What senders would send instead of what they give in these rows."""
        pair, here = self.pair[rows][:, None], at[rows]
        sent = []
        for number in senders:
            if not self.is_live[number]:
                sent.append(self.change[number][pair, here])
                continue
            if self._fits(at):
                if (number, at.shape[1]) not in self.sent:
                    self.sent[number, at.shape[1]] = self._live_change(number, slice(None), at)
                sent.append(self.sent[number, at.shape[1]][rows])
            else:
                sent.append(self._live_change(number, rows, at))
        return torch.stack(sent, 2)

    def _fits(self, at: Int[Tensor, "row at"]) -> bool:
        """Whether what all live senders would send can be held: then it is computed once, not for each receiver."""
        return at.numel() * self.change.shape[-1] * self.n_live <= TILE

    def _live_change(
        self, number: int, rows: Int[Tensor, "tile"] | slice, at: Int[Tensor, "row at"]
    ) -> Float[Tensor, "tile at d_model"]:
        """What a live sender would send, minus what it gives in these rows."""
        site = self.addresses.senders[number]
        name = sender_hook(site)
        source = self.source[name][self.pair[rows][:, None], at[rows]]
        return sent(self.encoder, self.by, site, source, self._held(name, at)[rows])
