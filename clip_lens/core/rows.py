"""Running rows: which of them must run at all, in what order, and from which layer and position on.

What makes it fast, and exact: a row starts at the layer that it touches first, from the unpatched run's residual
stream; in a causal tower it holds only the positions from its first change to the pooled one, the others' keys and
values are the unpatched run's; the last block is computed at the pooled position alone; and a row whose patch is known
to change nothing (the two texts agree up to there, or nothing reads it any more) does not run: its effect is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.metric import Metric, Readout
from clip_lens.core.patch import Addresses, patch_hooks, present, slot_positions
from clip_lens.core.source import Fetch
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, HookedTextEncoder
from clip_lens.model.site import Kind

READ_ONLY_AT_POOL: tuple[Kind, ...] = ("mid", "attn", "mlp", "head", "q", "pattern", "neuron")
"""Kinds that in the last block matter at the pooled position only: nothing else reads them."""

WORTH_A_FORWARD = 64
"""As many positions as fill a forward pass well, so that its fixed cost doesn't count."""


@dataclass(frozen=True)
class Chunk:
    """Some pairs of a batch, ready to be patched: the unpatched run, the source, and where each slot may be patched."""

    encoder: HookedTextEncoder
    addresses: Addresses
    batch: Batch
    run: Cache
    embedding: Float[Tensor, "pair d_embed"]
    source: Cache
    positions: Bool[Tensor, "slot pair pos"]
    first: Int[Tensor, "pair"]

    @property
    def pooled(self) -> Int[Tensor, "pair"]:
        return self.encoder.pool(self.batch.tokens)

    def resid(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        return self.run[_resid_name(layer, self.encoder.n_layers)]


def _resid_name(layer: int, n_layers: int) -> str:
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"


def prepare(
    encoder: HookedTextEncoder, batch: Batch, addresses: Addresses, fetch: Fetch, index: Int[Tensor, "pair"]
) -> Chunk:
    """The pairs `index` of a batch, run once unpatched and once as the source; cached is what the places name."""
    part = batch[index]
    tokens = encoder.cut(part.tokens)
    width = tokens.shape[1]
    starts = addresses.start.unique().tolist()
    names = {_resid_name(layer, encoder.n_layers) for layer in starts}
    if encoder.causal:
        layers = range(min(starts), encoder.n_layers)
        names |= {f"blocks.{layer}.attn.hook_{part}" for layer in layers for part in "kv"}
    y, run = encoder.tower.run_with_cache(tokens, names_filter=names, return_cache_object=False)
    source = {name: _cut(name, value, width) for name, value in fetch(index, addresses.hooks).items()}
    first = getattr(fetch, "first", None)
    return Chunk(
        encoder,
        addresses,
        part,
        cast(Cache, run),
        encoder.read(y, encoder.pool(tokens)),
        source,
        slot_positions(addresses.slots, part)[..., :width],
        torch.zeros_like(part.length) if first is None else first[index],
    )


def _cut(name: str, value: Tensor, width: int) -> Tensor:
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        return value[:, :, :width, :width]
    return value[:, :width]


def needed(chunk: Chunk) -> tuple[Bool[Tensor, "place pair"], Int[Tensor, "place pair"]]:
    """Whether each place has anything to patch in each pair, and the first position at which that changes something
    (the text's width where it changes nothing)."""
    addresses, width = chunk.addresses, chunk.positions.shape[-1]
    position = torch.arange(width, device=chunk.positions.device)
    here = {
        name: present(kind, chunk.source[name]) for name, kind in zip(addresses.hooks, addresses.kinds, strict=True)
    }
    changing = (position >= chunk.first[:, None]) & ((position <= chunk.pooled[:, None]) | (not chunk.encoder.causal))
    exists = torch.zeros(len(addresses.start), len(chunk.batch), dtype=torch.bool, device=position.device)
    first = torch.full(exists.shape, width, device=position.device)
    memo: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for place, (hooks, slots) in enumerate(zip(addresses.hook.tolist(), addresses.slot.tolist(), strict=True)):
        for hook, slot in zip(hooks, slots, strict=True):
            if hook < 0:
                continue
            if (hook, slot) not in memo:
                can = chunk.positions[slot] & here[addresses.hooks[hook]]
                does = can & changing & _is_read(chunk, hook)
                memo[hook, slot] = can.any(1), torch.where(does, position, width).amin(1)
            exists[place] |= memo[hook, slot][0]
            first[place] = torch.minimum(first[place], memo[hook, slot][1])
    return exists, first


def _is_read(chunk: Chunk, hook: int) -> Bool[Tensor, "pair pos"]:
    """At which positions anything still reads a hook."""
    name, kind, n_layers = chunk.addresses.hooks[hook], chunk.addresses.kinds[hook], chunk.encoder.n_layers
    position = torch.arange(chunk.positions.shape[-1], device=chunk.positions.device)
    in_last = name.startswith(f"blocks.{n_layers - 1}.") and kind in READ_ONLY_AT_POOL
    if in_last or name == _resid_name(n_layers, n_layers):
        return position == chunk.pooled[:, None]
    return torch.ones_like(chunk.positions[0])


def run_rows(
    chunk: Chunk, place: Int[Tensor, "row"], pair: Int[Tensor, "row"], first: Int[Tensor, "row"]
) -> Float[Tensor, "row d_embed"]:
    """The unit embeddings of rows that start at one layer, each patched at its place from position `first` on."""
    encoder, n_layers = chunk.encoder, chunk.encoder.n_layers
    layer = int(chunk.addresses.start[place[0]])
    pooled = chunk.pooled[pair]
    at = _window(first, pooled, chunk.positions.shape[-1], encoder.causal)
    x = chunk.resid(layer)[pair[:, None], at]

    def where(name: str) -> Int[Tensor, "row at"]:
        last = f"blocks.{n_layers - 1}."
        queries = name.startswith(last) and not name.endswith(("hook_resid_pre", "hook_k", "hook_v"))
        return pooled[:, None] if queries and layer < n_layers else at

    hooks = patch_hooks(chunk.addresses, chunk.source, chunk.positions, place, pair, where)
    if layer == n_layers:
        for _, patch in hooks:
            x = patch(x, hook=None)
        hooks = []
    rest = (lambda name: chunk.run[name][pair]) if encoder.causal else None
    y = encoder.tower.run_with_hooks(
        x, fwd_hooks=list(hooks), start_at_layer=layer, at=at if encoder.causal else None, rest=rest, read=pooled
    )
    return encoder.read(y, 0)


def _window(first: Int[Tensor, "row"], pooled: Int[Tensor, "row"], width: int, causal: bool) -> Int[Tensor, "row at"]:
    """The positions that rows hold: equally many each, up to the pooled one, from the first change or earlier on."""
    if not causal:
        return torch.arange(width, device=first.device).expand(len(first), -1)
    size = int((pooled - first).max()) + 1
    start = (pooled - size + 1).clamp(min=0)
    return start[:, None] + torch.arange(size, device=first.device)


def schedule(
    chunk: Chunk, first: Int[Tensor, "place pair"], runs: Bool[Tensor, "place pair"], rows: int
) -> Iterator[tuple[Int[Tensor, "row"], Int[Tensor, "row"]]]:
    """The rows that must run, up to `rows` at a time, those of one starting layer and of like length together."""
    place, pair = runs.nonzero(as_tuple=True)
    start = chunk.addresses.start.to(place.device)[place]
    causal, width = chunk.encoder.causal, chunk.positions.shape[-1]
    length = chunk.pooled[pair] - first[place, pair] + 1 if causal else torch.full_like(pair, width)
    order = (start * (width + 1) + length).argsort(stable=True)
    place, pair, start, length = place[order], pair[order], start[order], length[order]
    for layer in start.unique().tolist():
        mine = (start == layer).nonzero().flatten()
        for group in _groups(length[mine].tolist(), rows):
            yield place[mine[group]], pair[mine[group]]


def _groups(lengths: list[int], rows: int) -> Iterator[slice]:
    """Ascending lengths in groups of up to `rows`, which end where the next row is longer, unless they are tiny.

    All rows of a group are computed at the length of its longest: mixing lengths costs more than one more forward.
    """
    begin = 0
    for end, length in enumerate(lengths, start=1):
        last = end == len(lengths)
        longer = not last and lengths[end] > length and (end - begin) * length >= WORTH_A_FORWARD
        if last or longer or end - begin == rows:
            yield slice(begin, end)
            begin = end


def chunk_effects(
    chunk: Chunk, metric: Metric, readout: Readout, rows: int, advance: Callable[[int], object]
) -> Float[Tensor, "place pair"]:
    """`metric(patched) - metric(run)` of every place and pair of a chunk, NaN where the source has nothing."""
    exists, first = needed(chunk)
    runs = exists & (first < chunk.positions.shape[-1])
    baseline = metric(chunk.embedding, readout)
    values = torch.where(exists, 0.0, float("nan")).to(baseline.dtype)
    advance(values.numel() - int(runs.sum()))
    for place, pair in schedule(chunk, first, runs, rows):
        patched = run_rows(chunk, place, pair, first[place, pair])
        values[place, pair] = metric(patched, readout.rows(pair)) - baseline[pair]
        advance(len(place))
    return values
