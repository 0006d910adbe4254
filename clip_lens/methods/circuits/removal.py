"""Runs in which many edges at once carry the source's value: what circuits, their search and their tests need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.address import address_edges
from clip_lens.core.metric import Metric, Readout, logit, unsigned
from clip_lens.core.rows import Chunk, chunk_effects, pairs_at_once, prepare
from clip_lens.core.source import Source
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.circuit import Graph
from clip_lens.methods.patching import check_metric, checked
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site

ENTRIES = 2**22
"""Edges in all sets that are addressed at once, 100 MB of indices."""


@dataclass(frozen=True)
class Part:
    """Some pairs of a batch with their run and their source, ready for any number of sets of edges."""

    index: Int[Tensor, "pair"]
    chunk: Chunk
    readout: Readout
    metric: Metric
    rows: int

    @property
    def graph(self) -> Graph:
        return Graph.of(self.chunk.encoder.n_layers, self.chunk.encoder.n_heads)

    def values(self, removed: Bool[Tensor, "set receiver sender"]) -> Float[Tensor, "set pair"]:
        """`metric(patched) - metric(run)`, every edge of a set patched together; 0 where a set is empty, NaN where the
        source has nothing for a pair."""
        size = max(1, ENTRIES // int(self.graph.edges.sum()))
        found = torch.cat([self._values(sets) for sets in removed.split(size)])
        found = torch.where(removed.flatten(1).any(1)[:, None], found, 0.0)
        return found.masked_fill(self.total.isnan(), torch.nan)

    def _values(self, removed: Bool[Tensor, "set receiver sender"]) -> Float[Tensor, "set pair"]:
        chunk, graph = self.chunk, self.graph
        sets = removed.to(chunk.positions.device)
        addresses = address_edges(sets, graph.senders, graph.receivers, chunk.encoder.n_layers)
        part = replace(chunk, addresses=addresses)
        return chunk_effects(part, self.metric, self.readout, self.rows, lambda _: None).cpu()

    @cached_property
    def total(self) -> Float[Tensor, "pair"]:
        """`metric(every edge patched) - metric(run)`: with what every sender sends to the output patched, nothing else
        reaches it."""
        removed = torch.zeros_like(self.graph.edges)
        removed[-1] = True
        return self._values(removed[None])[0]

    @property
    def baseline(self) -> Float[Tensor, "pair"]:
        """metric(run)"""
        return self.metric(self.chunk.embedding, self.readout).cpu()

    @property
    def d(self) -> Float[Tensor, "pair"]:
        """S(caption) - S(foil), in logits."""
        change = logit(self.readout.other, self.readout) - logit(self.readout.run, self.readout)
        return (self.chunk.batch.sigma * change).cpu()

    @property
    def complete(self) -> bool:
        """Whether the source has something at every position of every pair: then nothing passes a removed edge."""
        inside = self.chunk.batch.inside[:, : self.chunk.sends.shape[-1]]
        return bool((self.chunk.sends | ~inside).all())


def parts(encoder: HookedTextEncoder, batch: Batch, source: Source, metric: Metric, rows: int) -> Iterator[Part]:
    """The batch some pairs at a time, prepared so that any set of the encoder's edges can be patched.

    Raises:
        ValueError: a batch of another width than the encoder's embedding, `rows` below 1, a metric that gives something
            else than one number per row.
    """
    checked((Site("out"),), encoder, batch, rows)
    graph, fetch = Graph.of(encoder.n_layers, encoder.n_heads), source(encoder, batch)
    each = torch.zeros(len(graph.receivers), *graph.edges.shape, dtype=torch.bool, device=encoder.device)
    each[torch.arange(len(each)), torch.arange(len(each)), 0] = True  # a place per receiver: every layer is started at
    addresses = address_edges(each, graph.senders, graph.receivers, encoder.n_layers)
    for index in batch.length.argsort(stable=True).split(pairs_at_once(addresses, encoder, batch, rows)):
        with torch.no_grad():
            chunk = prepare(encoder, batch, addresses, fetch, index)
            readout = Readout(chunk.batch.direction, chunk.embedding, encoder(chunk.batch.other))
        check_metric(metric(chunk.embedding, readout), index)
        yield Part(index.cpu(), chunk, readout, metric, rows)


@dataclass(frozen=True)
class Removal:
    """A whole batch, ready: means over its pairs for any sets of edges. Holds what `parts` prepares of every pair,
    about 8 MB for a pair of 14 tokens at the size of ViT-B/32."""

    prepared: tuple[Part, ...]

    @classmethod
    def of(cls, encoder: HookedTextEncoder, batch: Batch, source: Source, metric: Metric, rows: int) -> Removal:
        removal = cls(tuple(parts(encoder, batch, source, metric, rows)))
        if removal.n == 0:
            raise ValueError(f"{getattr(source, '__name__', source)} has nothing for any of the {len(batch)} pairs")
        return removal

    @property
    def n(self) -> int:
        """How many pairs have a source."""
        return sum(int((~part.total.isnan()).sum()) for part in self.prepared)

    @property
    def complete(self) -> bool:
        return all(part.complete for part in self.prepared)

    @property
    def total(self) -> float:
        """The mean of the oriented total."""
        return float(sum(_oriented(part, part.total[None]) for part in self.prepared)) / self.n

    def means(self, removed: Bool[Tensor, "set receiver sender"]) -> Float[Tensor, "set"]:
        """What the removal of each set moves on average, `mean of sigma * (metric(patched) - metric(run))` over the
        pairs that have a source: the part of d that is lost with these edges. Metrics without sides are taken as they
        are."""
        return sum((_oriented(part, part.values(removed)) for part in self.prepared), torch.zeros(())) / self.n


def _oriented(part: Part, values: Float[Tensor, "set pair"]) -> Float[Tensor, "set"]:
    """The sum over pairs, signed so that positive = what was moved supported the run's side."""
    if not unsigned(getattr(part.metric, "__name__", "")):
        values = values * part.chunk.batch.sigma.cpu()
    return values.double().nansum(1)
