"""Running rows: which of them must run at all, in what order, and from which layer and position on.

What makes it fast, and exact: a row starts at the layer that it touches first, from the unpatched run's residual
stream; in a causal tower it holds only the positions from its first change to the pooled one, the others' keys and
values are the unpatched run's; the last block is computed at the pooled position alone; and a row whose patch is known
to change nothing (the two texts agree up to there, or nothing reads it any more) does not run: its effect is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.address import Addresses
from clip_lens.core.edges import EdgePatch, differences, sender_hook
from clip_lens.core.metric import Metric, Readout
from clip_lens.core.sites import patch_hooks, present
from clip_lens.core.source import Fetch
from clip_lens.core.target import Read, Target
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder
from clip_lens.model.site import BEHIND, Kind, Site, hook_name, layout_at

READ_ONLY_AT_POOL: tuple[Kind, ...] = ("mid", "attn", "mlp", "head", "q", "pattern", "neuron", "result")
"""Kinds that in the last block matter at one position only, the pooled one or a target's: nothing else reads them."""

NOWHERE, AT_ONE, ANYWHERE = range(3)
"""At which of its positions an activation is read by what leads to the metric."""

SENT_AT_ONCE = 2**26
"""Numbers that the senders of a chunk of pairs may write: 256 MB in float32."""

PAIRS = 64
"""Pairs that are prepared together, at most: as many as fill a forward pass, and the work can still be shared out."""

WORTH_A_FORWARD = 64
"""As many positions as fill a forward pass well, so that its fixed cost doesn't count."""


@dataclass(frozen=True)
class Chunk:
    """Some pairs of a batch, ready to be patched: the unpatched run, the source, and where each slot may be patched."""

    encoder: HookedTextEncoder
    by: HookedTextEncoder
    """By whose weights the source's senders write: the encoder itself, or the one whose activations it gives."""
    addresses: Addresses
    batch: Batch
    tokens: Int[Tensor, "pair pos"]
    run: Cache
    embedding: Float[Tensor, "pair d_embed"]
    source: Cache
    change: Float[Tensor, "sender pair pos d_model"]
    sends: Bool[Tensor, "sender pair pos"]
    positions: Bool[Tensor, "slot pair pos"]
    first: Int[Tensor, "pair"]
    read: Read
    whole: bool = False
    """Whether rows run whole, from the tokens on: hooks of the user's may address any position and layer."""

    @property
    def pooled(self) -> Int[Tensor, "pair"]:
        return self.encoder.pool(self.tokens)

    @property
    def seen(self) -> Float[Tensor, "pair n"]:
        """What the metric reads of the unpatched run."""
        return self.embedding if self.read.target is None else self.target_in(self.run)

    def target_in(self, cache: Cache) -> Float[Tensor, "pair n"]:
        """What the metric's target has in a run of whole texts."""
        everywhere = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        return self.read.value(cache[self.read.hook], everywhere).to(self.encoder.precision)

    def rows(self, pair: Int[Tensor, "row"]) -> Chunk:
        """The chunk with a line per row, each of one of its pairs, which may have many; `batch` stays the pairs'."""
        return replace(
            self,
            tokens=self.tokens[pair],
            run={name: value[pair] for name, value in self.run.items()},
            embedding=self.embedding[pair],
            source={name: value[pair] for name, value in self.source.items()},
            change=self.change[:, pair],
            sends=self.sends[:, pair],
            positions=self.positions[:, pair],
            first=self.first[pair],
            read=self.read.rows(pair),
        )

    def resid(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        return self.run[hook_name(Site("resid", layer), self.encoder.n_layers)]


def pairs_at_once(addresses: Addresses, encoder: HookedTextEncoder, batch: Batch, rows: int) -> int:
    """How many pairs are prepared together: `rows` and `PAIRS` at most, or fewer where all that senders write would be
    too much to hold."""
    written = len(addresses.senders) * batch.tokens.shape[1] * encoder.tower.cfg.d_model
    return max(1, min(rows, PAIRS, SENT_AT_ONCE // max(1, written)))


def prepare(
    encoder: HookedTextEncoder,
    batch: Batch,
    addresses: Addresses,
    fetch: Fetch,
    index: Int[Tensor, "pair"],
    also: Iterable[str] = (),
    own: Iterable[str] = (),
    target: Target | None = None,
) -> Chunk:
    """The pairs `index` of a batch, run once unpatched and once as the source; cached is what the places name, of the
    source the hooks in `also` too, of the unpatched run those in `own`; `target` is the metric's."""
    part = batch[index]
    tokens = encoder.cut(part.tokens)
    width = tokens.shape[1]
    read = Read.of(target, encoder, part, tokens)
    starts = addresses.start.unique().tolist()
    sent = {sender_hook(sender) for sender in addresses.senders}
    names = sent.union(own, read.hooks) | {hook_name(Site("resid", layer), encoder.n_layers) for layer in starts}
    if encoder.causal:
        layers = range(min(starts), encoder.n_layers)
        names |= {f"blocks.{layer}.attn.hook_{part}" for layer in layers for part in "kv"}
    if getattr(fetch, "is_other", False):
        also = (*also, hook_name(Site("resid", encoder.n_layers), encoder.n_layers))
    y, cached = encoder.tower.run_with_cache(tokens, names_filter=names, return_cache_object=False)
    run = cast(Cache, cached)
    wanted = sent.union(addresses.hooks, also)
    source = {name: _cut(name, value, width) for name, value in fetch(index, wanted).items()}
    first = getattr(fetch, "first", None)
    first = torch.zeros_like(part.length) if first is None else first[index]
    differs = torch.arange(width, device=first.device) >= first[:, None]
    by = getattr(fetch, "tower", encoder)
    change, sends = differences(encoder, by, addresses.senders, source, run, differs)
    positions = torch.stack([part.where(slot) for slot in addresses.slots])[..., :width]
    embedding = encoder.read(y, encoder.pool(tokens))
    whole = bool(encoder.hooked)
    return Chunk(
        encoder, by, addresses, part, tokens, run, embedding, source, change, sends, positions, first, read, whole
    )


def read_other(chunk: Chunk, fetch: Fetch) -> Float[Tensor, "pair d_embed"]:
    """The other texts' unit embeddings: read from the source where that is their run, so that it runs once."""
    encoder = chunk.encoder
    if chunk.whole or not getattr(fetch, "is_other", False):
        return encoder(chunk.batch.other)
    stream = chunk.source[hook_name(Site("resid", encoder.n_layers), encoder.n_layers)]
    pooled = stream[torch.arange(len(stream), device=stream.device), chunk.pooled]
    return encoder.read(encoder.tower.unembed(encoder.tower.ln_final(pooled)).unsqueeze(1), 0)


def _cut(name: str, value: Tensor, width: int) -> Tensor:
    if layout_at(name).query_by_key:
        return value[:, :, :width, :width]
    return value[:, :width]


def needed(chunk: Chunk) -> tuple[Bool[Tensor, "place pair"], Int[Tensor, "place pair"]]:
    """Whether each place has anything to patch in each pair, and the first position at which that changes something
    (the text's width where it changes nothing)."""
    addresses, width = chunk.addresses, chunk.positions.shape[-1]
    shape, device = (len(addresses), len(chunk.tokens)), chunk.positions.device
    exists, first = torch.zeros(shape, dtype=torch.uint8, device=device), torch.full(shape, width, device=device)
    every = torch.arange(len(addresses), device=device)
    for entries, has, reader in ((addresses.sites, *_site_readers(chunk)), (addresses.edges, *_edge_readers(chunk))):
        place, columns = entries.rows(every)
        if len(place):
            can, starts, line = _first_change(chunk, has, columns[:, 0], reader(columns), columns[:, 2])
            key = (place * len(starts) + line).unique()  # many edges of one place say the same
            place, line = (key // len(starts))[:, None].expand(-1, shape[1]), key % len(starts)
            exists = exists.scatter_reduce(0, place, can[line].to(torch.uint8), "amax")
            first = first.scatter_reduce(0, place, starts[line], "amin")
    return exists.bool(), first


Reader = Callable[[Int[Tensor, "entry 3"]], Int[Tensor, "entry"]]


def _site_readers(chunk: Chunk) -> tuple[Bool[Tensor, "hook pair pos"], Reader]:
    """Where the source has something at each hook, and at which positions each site is read."""
    addresses, n_layers = chunk.addresses, chunk.encoder.n_layers
    named = list(zip(addresses.hooks, addresses.kinds, strict=True))
    has = [present(kind, chunk.source[name]) for name, kind in named]
    end = hook_name(Site("resid", n_layers), n_layers)
    last = [kind in BEHIND or name == end for name, kind in named]
    layers = [n_layers if behind else int(name.split(".")[1]) for (name, _), behind in zip(named, last, strict=True)]
    found = [_read_at(chunk.read, kind, layer, n_layers) for (_, kind), layer in zip(named, layers, strict=True)]
    flags = torch.tensor(found, device=chunk.positions.device)
    return torch.stack(has) if has else chunk.sends, lambda columns: flags[columns[:, 0]]


def _edge_readers(chunk: Chunk) -> tuple[Bool[Tensor, "sender pair pos"], Reader]:
    """The same for senders and the receivers of their edges."""
    n_layers = chunk.encoder.n_layers
    # What an MLP reads stands before its neurons; as a site it is what it gives.
    ends = [("neuron" if site.kind == "mlp" else site.kind, site.layer) for site in chunk.addresses.receivers]
    found = [_read_at(chunk.read, cast(Kind, kind), layer, n_layers) for kind, layer in ends]
    flags = torch.tensor(found, dtype=torch.long, device=chunk.positions.device)
    return chunk.sends, lambda columns: flags[columns[:, 1]]


def _read_at(read: Read, kind: Kind, layer: int, n_layers: int) -> int:
    """At which of its positions what a kind has in a layer is read on the way to the metric."""
    if read.target is not None and not read.target.reads(kind, layer, n_layers):
        return NOWHERE
    at_the_end = kind in BEHIND or (kind == "resid" and layer == n_layers)
    return AT_ONE if at_the_end or (layer == read.last and kind in READ_ONLY_AT_POOL) else ANYWHERE


def _first_change(
    chunk: Chunk,
    has: Bool[Tensor, "has pair pos"],
    number: Int[Tensor, "entry"],
    read: Int[Tensor, "entry"],
    slot: Int[Tensor, "entry"],
) -> tuple[Bool[Tensor, "line pair"], Int[Tensor, "line pair"], Int[Tensor, "entry"]]:
    """For each distinct line of entries whether there is something to patch and the first position at which that
    changes something; and each entry's line."""
    width = chunk.positions.shape[-1]
    position = torch.arange(width, device=chunk.positions.device)
    at_one = position == chunk.read.at[:, None]
    changing = (position >= chunk.first[:, None]) & ((position <= chunk.read.at[:, None]) | (not chunk.encoder.causal))
    counts = torch.stack([torch.zeros_like(at_one), at_one, torch.ones_like(at_one)]) & changing
    has, same = has.unique(dim=0, return_inverse=True)
    n_slots = len(chunk.positions)
    key, line = ((same[number] * len(counts) + read) * n_slots + slot).unique(return_inverse=True)
    can = chunk.positions[key % n_slots] & has[key // n_slots // len(counts)]
    does = can & counts[key // n_slots % len(counts)]
    return can.any(-1), torch.where(does, position, width).amin(-1), line


def run_rows(
    chunk: Chunk, place: Int[Tensor, "row"], pair: Int[Tensor, "row"], first: Int[Tensor, "row"]
) -> Float[Tensor, "row n"]:
    """What the metric reads of rows that start at one layer, each patched at its place from position `first` on."""
    encoder, n_layers = chunk.encoder, chunk.encoder.n_layers
    if chunk.whole:
        return _run_whole(chunk, place, pair)
    layer, read = int(chunk.addresses.start[place[0]]), chunk.read.rows(pair)
    at = window(first, read.at, chunk.positions.shape[-1], encoder.causal)
    x = chunk.resid(layer)[pair[:, None], at]

    def where(name: str) -> Int[Tensor, "row at"]:
        return read.at[:, None] if _at_one(name, layer, read.last, n_layers) else at

    hooks = place_hooks(chunk, place, pair, layer, where)
    if layer == n_layers:  # no block runs, whose hook would patch the stream
        end = hook_name(Site("resid", n_layers), n_layers)
        for patch in (patch for name, patch in hooks if name == end):
            x = cast(Tensor, patch(x, hook=None))
        hooks = [hook for hook in hooks if hook[0] != end]
        if read.target is not None:
            return read.value(x, at).to(encoder.precision)
    rest = (lambda name: chunk.run[name][pair]) if encoder.causal else None
    how = {"start_at_layer": layer, "at": at if encoder.causal else None, "rest": rest, "read": read.at}
    return _read(encoder, x, hooks, read, where, 0, **how)


def _at_one(name: str, layer: int, last: int, n_layers: int) -> bool:
    """Whether a hook holds one position, in rows that start at block `layer`; `last` is the last to run."""
    if not name.startswith("blocks."):
        return True
    queries = name.startswith(f"blocks.{last}.")
    return queries and layer < n_layers and not name.endswith(("hook_resid_pre", "hook_k", "hook_v"))


def _run_whole(chunk: Chunk, place: Int[Tensor, "row"], pair: Int[Tensor, "row"]) -> Float[Tensor, "row n"]:
    """What the metric reads of rows that run from their tokens on, at every position."""
    tokens = chunk.tokens[pair]
    everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hooks = whole_hooks(chunk, place, pair)
    return _read(chunk.encoder, tokens, hooks, chunk.read.rows(pair), lambda name: everywhere, chunk.pooled[pair])


def _read(
    encoder: HookedTextEncoder,
    x: Tensor,
    hooks: Sequence[Hook],
    wanted: Read,
    where: Callable[[str], Int[Tensor, "row held"]],
    pooled: Int[Tensor, "row"] | int,
    **how: Any,
) -> Float[Tensor, "row n"]:
    """What the metric reads of a run under hooks: the unit embedding, or its target, behind which nothing runs."""
    if wanted.target is None:
        return encoder.read(encoder.tower.run_with_hooks(x, fwd_hooks=list(hooks), **how), pooled)
    seen: list[Tensor] = []
    keep: Hook = (wanted.hook, lambda activation, hook: seen.append(wanted.value(activation, where(wanted.hook))))
    encoder.tower.run_with_hooks(x, fwd_hooks=[*hooks, keep], stop_at_layer=wanted.last + 1, **how)
    return seen[0].to(encoder.precision)


def whole_hooks(chunk: Chunk, place: Int[Tensor, "row"], pair: Int[Tensor, "row"]) -> list[Hook]:
    """The hooks that patch each row at its place, in a run of whole texts from their tokens on."""
    everywhere = torch.arange(chunk.positions.shape[-1], device=pair.device).expand(len(pair), -1)
    return place_hooks(chunk, place, pair, 0, lambda name: everywhere)


def place_hooks(
    chunk: Chunk,
    place: Int[Tensor, "row"],
    pair: Int[Tensor, "row"],
    layer: int,
    at: Callable[[str], Int[Tensor, "row at"]],
) -> list[Hook]:
    """The hooks that patch each row at its place, sites and edges, in a run that starts at block `layer`."""
    hooks = patch_hooks(chunk.addresses, chunk.source, chunk.positions, place, pair, at)
    if not chunk.addresses.senders:
        return hooks
    edges = EdgePatch(
        chunk.encoder, chunk.by, chunk.addresses, chunk.source, chunk.change, chunk.positions, place, pair, layer, at
    )
    return [*edges.receiving(), *hooks, *edges.capturing()]


def window(first: Int[Tensor, "row"], pooled: Int[Tensor, "row"], width: int, causal: bool) -> Int[Tensor, "row at"]:
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
    start = torch.zeros_like(place) if chunk.whole else chunk.addresses.start.to(place.device)[place]
    causal, width = chunk.encoder.causal, chunk.positions.shape[-1]
    length = chunk.read.at[pair] - first[place, pair] + 1 if causal else torch.full_like(pair, width)
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
    chunk: Chunk,
    metric: Metric,
    readout: Readout,
    rows: int,
    advance: Callable[[int], object],
    places: slice | Bool[Tensor, "place pair"] = slice(None),
) -> Float[Tensor, "place pair"]:
    """`metric(patched) - metric(run)` of every place and pair of a chunk, NaN where the source has nothing. Only
    `places` run: of the others it says no more than where the source has something, which is 0."""
    exists, first = needed(chunk)
    runs = torch.zeros_like(exists)
    runs[places] = (exists & (chunk.whole | (first < chunk.positions.shape[-1])))[places]
    baseline = metric(chunk.seen, readout)
    values = torch.where(exists, 0.0, float("nan")).to(baseline.dtype)
    advance(values.numel() - int(runs.sum()))
    with torch.inference_mode():
        for place, pair in schedule(chunk, first, runs, rows):
            patched = run_rows(chunk, place, pair, first[place, pair])
            values[place, pair] = metric(patched, readout.rows(pair)) - baseline[pair]
            advance(len(place))
    return values
