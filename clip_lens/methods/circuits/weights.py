"""Runs in which every edge has a weight: how much of what it carries is the source's, from 0 (the run) to 1.

    input of a receiver += sum over its edges s -> receiver of weight * (what s sends in the source - what it gives)

with live senders: at weights of 0 and 1 that is patching (method, sections 8 and 10). The embedding that comes out has
a gradient with respect to the weights. Blocks run one after the other; where what they hold is much, a backward pass
computes each again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clip_lens.core.edges import sender_hook, written
from clip_lens.core.metric import Metric, Readout
from clip_lens.core.rows import Chunk, window
from clip_lens.core.setting import Setting
from clip_lens.methods.circuits.circuit import Graph, Slots
from clip_lens.methods.circuits.removal import Part, parts
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder
from clip_lens.model.site import Kind, Site

KEPT = 2**27
"""Numbers that the inputs of all receivers may hold, before a backward pass computes blocks again instead."""

QKV: tuple[Kind, ...] = ("q", "k", "v")
Changed: TypeAlias = Float[Tensor, "pair sender at d_model"]
"""What some senders that follow each other would send instead of what they give."""


@dataclass(frozen=True)
class Weighted:
    """Some pairs, ready to run with any weights. Of size it holds what every sender gives in the source, and in a
    causal tower the keys and values of the run.

    A causal tower runs from the first change of each text on: `at` are the positions that are held, the pooled one is
    the last of them. `at_slot` says which of them a graph's slots have, None for a graph without. `total` is what it
    moves that every edge carries the source's value, NaN where the source has nothing for a pair.
    """

    encoder: HookedTextEncoder
    graph: Graph
    metric: Metric
    index: Int[Tensor, "pair"]
    embedded: Float[Tensor, "pair at d_model"]
    at: Int[Tensor, "pair at"]
    pooled: Int[Tensor, "pair"]
    run: Cache
    source: Cache
    differs: Bool[Tensor, "pair at"]
    at_slot: Float[Tensor, "pair at slot"] | None
    readout: Readout
    sides: tuple[str, ...]
    baseline: Float[Tensor, "pair"]
    total: Float[Tensor, "pair"]
    rows: Mapping[tuple[Kind, int], Int[Tensor, "unit slot"]]

    @classmethod
    def of(cls, part: Part) -> Weighted:
        chunk, readout, metric = part.chunk, part.readout, part.setting.metric
        pooled, width = chunk.pooled, chunk.tokens.shape[1]
        at = window(chunk.first.minimum(pooled), pooled, width, chunk.encoder.causal)
        held = lambda value: value[torch.arange(len(at), device=at.device)[:, None], at]
        return cls(
            encoder=chunk.encoder,
            graph=part.graph,
            metric=metric,
            index=part.index,
            embedded=held(chunk.resid(0)),
            at=at,
            pooled=pooled,
            run={name: value for name, value in chunk.run.items() if name.endswith(("hook_k", "hook_v"))},
            source={name: held(chunk.source[name]) for name in dict.fromkeys(map(sender_hook, part.graph.senders))},
            differs=at >= chunk.first[:, None],
            at_slot=_at_slot(chunk, part.graph.slots, held),
            readout=readout,
            sides=chunk.batch.pairs.side,
            baseline=metric(chunk.embedding, readout),
            total=part.total.to(chunk.embedding),
            rows=lines_of(part.graph, chunk.encoder),
        )

    def __len__(self) -> int:
        return len(self.at)

    def moved(self, weights: Float[Tensor, "#pair receiver sender"]) -> Float[Tensor, "pair"]:
        """`metric(with these weights) - metric(run)` of every pair."""
        return self.metric(self.embedding(weights), self.readout) - self.baseline

    def embedding(self, weights: Float[Tensor, "#pair receiver sender"]) -> Float[Tensor, "pair d_embed"]:
        """The pairs' unit embeddings with these weights, one set for all pairs or one for each."""
        weights = weights.to(self.encoder.dtype)
        x = self.embedded
        changes = [self._change([Site("embed")], x)]
        for layer in range(self.encoder.n_layers):
            run = partial(self._block, layer, weights)
            x, *sent = checkpoint(run, x, *changes, use_reentrant=False) if self._again else run(x, *changes)
            changes += sent
        x = x + self._shift(weights, [("out", 0)], self._at_pool(changes))[:, 0]
        return self.encoder.read(self.encoder.tower.unembed(self.encoder.tower.ln_final(x)), 0)

    def _block(
        self, layer: int, weights: Tensor, x: Float[Tensor, "pair pos d_model"], *changes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream behind a block, and what its heads and its MLP would send instead; of the last block at
        the pooled position alone, which is all that is read."""
        last, name = layer == self.encoder.n_layers - 1, f"blocks.{layer}"
        here = self._at_pool(changes) if last else list(changes)
        together = QKV[1:] if last else QKV
        shifts = self._shift(weights, [(kind, layer) for kind in together], changes).movedim(1, 2)
        into = dict(zip(together, shifts.chunk(len(together), 2), strict=True))
        if last:
            into["q"] = self._shift(weights, [("q", layer)], here).movedim(1, 2)

        def split(value: Tensor, hook: object, *, kind: Kind) -> Tensor:
            return value + into[kind]

        def into_mlp(value: Tensor, hook: object) -> Tensor:
            return value + self._shift(weights, [("mlp", layer)], here)[:, 0]

        def keep(value: Tensor, hook: object, *, senders: list[Site]) -> None:
            here.append(self._change(senders, value))

        heads = [Site("head", layer, unit) for unit in range(self.encoder.n_heads)]
        inputs: list[Hook] = [(f"{name}.hook_{kind}_input", partial(split, kind=kind)) for kind in QKV]
        hooks: list[Hook] = [
            *inputs,
            (f"{name}.attn.hook_z", partial(keep, senders=heads)),
            (f"{name}.hook_mlp_in", into_mlp),
            (f"{name}.hook_mlp_out", partial(keep, senders=[Site("mlp", layer)])),
        ]
        causal = self.encoder.causal
        x = self.encoder.tower.run_with_hooks(
            x, fwd_hooks=list(hooks), start_at_layer=layer, stop_at_layer=layer + 1, read=self.pooled if last else None,
            at=self.at if causal else None, rest=self.run.__getitem__ if causal else None,
        )  # fmt: skip
        return x, here[-2], here[-1]

    def _change(self, senders: Sequence[Site], value: Float[Tensor, "pair at ..."]) -> Changed:
        """What some senders with one hook would send instead of what they give, at the positions at which it is
        given."""
        source, differs = self.source[sender_hook(senders[0])], self.differs
        if value.shape[1] < source.shape[1]:
            source, differs = (one[self._every, self._pooled].unsqueeze(1) for one in (source, differs))
        differs = differs.view(*differs.shape, *(1 for _ in value.shape[2:]))
        change = (source - value).nan_to_num(0.0) * differs
        sent = [written(self.encoder, sender, change) for sender in senders]
        return torch.stack(sent, 1)

    def _shift(
        self,
        weights: Float[Tensor, "#pair receiver sender"],
        receivers: Sequence[tuple[Kind, int]],
        changes: Sequence[Changed],
    ) -> Float[Tensor, "pair unit at d_model"]:
        """What the inputs of some receivers are moved by: of all units of a kind in a block, one kind after the
        other."""
        rows = torch.cat([self.rows[one] for one in receivers])
        chosen = weights.index_select(1, rows.flatten()).unflatten(1, rows.shape)
        at_slot = None if ("out", 0) in receivers else self._at_slot_of(changes[0])
        first, shift = 0, torch.zeros((), dtype=weights.dtype, device=weights.device)
        for change in changes:
            some = chosen[..., first : first + change.shape[1]]
            first += change.shape[1]
            if at_slot is None:
                some = some[:, :, 0].expand(len(change), -1, -1)
                shift = shift + (some @ change.flatten(2)).unflatten(2, change.shape[2:])
            else:
                by_position = torch.einsum("nuts,npt->npus", some.expand(len(change), -1, -1, -1), at_slot)
                shift = shift + (by_position @ change.transpose(1, 2)).transpose(1, 2)
        return shift

    def _at_slot_of(self, change: Changed) -> Float[Tensor, "pair at slot"] | None:
        """Which positions of a change each slot has, None of a graph without slots."""
        if self.at_slot is None or change.shape[2] == self.at_slot.shape[1]:
            return self.at_slot
        return self.at_slot[self._every, self._pooled].unsqueeze(1)

    def _at_pool(self, changes: Sequence[Changed]) -> list[Changed]:
        """Changes at the pooled position alone."""
        return [
            change if change.shape[2] == 1 else change[self._every, :, self._pooled].unsqueeze(2) for change in changes
        ]

    @cached_property
    def _every(self) -> Int[Tensor, "pair"]:
        return torch.arange(len(self), device=self.at.device)

    @cached_property
    def _pooled(self) -> Int[Tensor, "pair"]:
        """Where among the positions held the pooled one stands."""
        return (self.at == self.pooled[:, None]).int().argmax(1)

    @property
    def _again(self) -> bool:
        """Whether a backward pass computes blocks again."""
        inputs = self.encoder.n_layers * (3 * self.encoder.n_heads + 1)
        return self.embedded.numel() * inputs > KEPT


def _at_slot(chunk: Chunk, slots: Slots, held: Callable[[Tensor], Tensor]) -> Float[Tensor, "pair at slot"] | None:
    if not slots:
        return None
    return held(torch.stack([chunk.batch.where(slot) for slot in slots], -1)).to(chunk.encoder.dtype)


def lines_of(graph: Graph, encoder: HookedTextEncoder) -> dict[tuple[Kind, int], Int[Tensor, "unit slot"]]:
    """The lines of a graph by the kind of receiver and the block: its units by its slots."""
    found: dict[tuple[Kind, int], dict[int | None, list[int]]] = {}
    for number, site in enumerate(graph.receivers):
        found.setdefault((site.kind, site.layer), {}).setdefault(site.unit, []).append(number)
    return {where: torch.tensor(list(units.values()), device=encoder.device) for where, units in found.items()}


def weighted(setting: Setting, slots: Slots = ()) -> list[Weighted]:
    """A batch some pairs at a time, ready to run with weights on its edges, or by slot.

    Raises:
        ValueError: what `parts` refuses.
    """
    with torch.no_grad():
        return [Weighted.of(part) for part in parts(setting, slots)]
