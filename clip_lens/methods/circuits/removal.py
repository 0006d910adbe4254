"""Runs in which many edges at once carry the source's value: what circuits, their search and their tests need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.address import address_edges
from clip_lens.core.metric import Readout
from clip_lens.core.rows import Chunk, chunk_effects
from clip_lens.core.setting import Setting
from clip_lens.methods.circuits.circuit import Graph, Slots

ENTRIES = 2**22
"""Edges in all sets that are addressed at once, 100 MB of indices."""


@dataclass(frozen=True)
class Part:
    """Some pairs of a batch with their run and their source, ready for any number of sets of edges."""

    setting: Setting
    index: Int[Tensor, "pair"]
    chunk: Chunk
    readout: Readout
    graph: Graph

    def values(self, removed: Bool[Tensor, "set receiver sender"]) -> Float[Tensor, "set pair"]:
        """`metric(patched) - metric(run)`, every edge of a set patched together; 0 where a set is empty, NaN where the
        source has nothing for a pair."""
        found = torch.cat([self._values(sets) for sets in removed.split(at_once(self.graph))])
        found = torch.where(removed.flatten(1).any(1)[:, None], found, 0.0)
        return found.masked_fill(self.total.isnan(), torch.nan)

    def _values(self, removed: Bool[Tensor, "set receiver sender"]) -> Float[Tensor, "set pair"]:
        chunk, graph = self.chunk, self.graph
        sets = removed.to(chunk.positions.device)
        addresses = address_edges(sets, graph.senders, graph.receivers, chunk.encoder.n_layers)
        part = replace(chunk, addresses=addresses)
        return chunk_effects(part, self.setting.metric, self.readout, self.setting.rows, lambda _: None).cpu()

    @cached_property
    def total(self) -> Float[Tensor, "pair"]:
        """`metric(every edge patched) - metric(run)`: with what every sender sends to the output patched, nothing else
        reaches it. What reaches an activation is patched edge by edge."""
        removed = torch.zeros_like(self.graph.edges)
        removed[-1] = True
        removed = removed if self.setting.metric.target is None else self.graph.edges
        return self._values(removed[None])[0]

    @property
    def orientation(self) -> Float[Tensor, "pair"]:
        """The sign with which each pair counts: positive = what is moved supports d, or as it is."""
        sigma = self.chunk.batch.sigma.cpu()
        return sigma if self.setting.metric.oriented else torch.ones_like(sigma)

    def summed(self, values: Float[Tensor, "set pair"]) -> Float[Tensor, "set"]:
        """The sum over the pairs that have a value, each with its sign."""
        return (values.double() * self.orientation).nansum(1)

    @property
    def complete(self) -> bool:
        """Whether the source has something at every position of every pair: then nothing passes a removed edge."""
        inside = self.chunk.batch.inside[:, : self.chunk.sends.shape[-1]]
        return bool((self.chunk.sends | ~inside).all())


def at_once(graph: Graph) -> int:
    """How many sets of a graph's edges are held at once."""
    return max(1, ENTRIES // int(graph.edges.sum()))


def parts(setting: Setting, slots: Slots = ()) -> Iterator[Part]:
    """The batch some pairs at a time, prepared so that any set of the encoder's edges can be patched, at any of some
    slots.

    Raises:
        ValueError: hooks of the user's on the tower, a metric that gives something else than one number per row or that
            reads a residual stream within the tower, which no edge runs to, a slot that the batch has not, or a source
            that differs from the run at a position that is in no slot.
    """
    setting.without_hooks("edges are sums that a hook would change")
    target = setting.metric.target
    if target is not None and not target.behind_edges(setting.encoder.n_layers):
        raise ValueError(
            f"{target}: no edge runs to a residual stream within the tower, so that no circuit computes it; read what "
            "a head or an MLP makes of it"
        )
    encoder = setting.encoder
    graph = Graph.of(encoder.n_layers, encoder.n_heads, slots)
    for slot in slots:
        setting.batch.where(slot)
    each = torch.zeros(len(graph.receivers), *graph.edges.shape, dtype=torch.bool, device=encoder.device)
    each[torch.arange(len(each)), torch.arange(len(each)), 0] = True  # a place per receiver: every layer is started at
    addresses = address_edges(each, graph.senders, graph.receivers, encoder.n_layers)
    for index, chunk, readout in setting.chunks(addresses):
        if slots:
            _check_covered(setting, chunk, index, slots)
        yield Part(setting, index.cpu(), chunk, readout, graph)


def _check_covered(setting: Setting, chunk: Chunk, index: Int[Tensor, "pair"], slots: Slots) -> None:
    """Refuses slots beside which the source sends something too: a circuit by slot is of all that can be sent."""
    named = torch.stack([setting.batch[index].where(slot) for slot in slots])[..., : chunk.tokens.shape[1]].any(0)
    sent = (chunk.change != 0).any(-1).any(0) & ~named
    if sent.any():
        pair = int(sent.any(1).nonzero()[0])
        caption = setting.batch.pairs.caption[int(index[pair])]
        raise ValueError(
            f"the source differs from the run at tokens that are in none of the slots {', '.join(map(str, slots))}, in "
            f"{int(sent.any(1).sum())} pairs such as {caption!r}: name their slots too, leave out pairs that no "
            "template of slots fits, or give positions, slots=range(n)"
        )


@dataclass(frozen=True)
class Removal:
    """A whole batch, ready: means over its pairs for any sets of edges. Holds what `parts` prepares of every pair,
    about 8 MB for a pair of 14 tokens at the size of ViT-B/32."""

    prepared: tuple[Part, ...]

    @classmethod
    def of(cls, setting: Setting, slots: Slots = ()) -> Removal:
        """The batch of a setting, for edges at these slots.

        Raises:
            ValueError: what `parts` refuses, or a source that has nothing for any pair.
        """
        with torch.no_grad():
            removal = cls(tuple(parts(setting, slots)))
        if removal.n == 0:
            raise ValueError(f"{setting.source} has nothing for any of the {len(setting.batch)} pairs")
        return removal

    @cached_property
    def n(self) -> int:
        """How many pairs have a source."""
        return sum(int((~part.total.isnan()).sum()) for part in self.prepared)

    @property
    def complete(self) -> bool:
        return all(part.complete for part in self.prepared)

    @cached_property
    def total(self) -> float:
        """The mean of the oriented total."""
        return float(sum(part.summed(part.total[None]) for part in self.prepared)) / self.n

    def means(self, removed: Bool[Tensor, "set receiver sender"]) -> Float[Tensor, "set"]:
        """What the removal of each set moves on average, the mean of `metric(patched) - metric(run)` over the pairs
        that have a source, each with its orientation: of the logit, the part of d that is lost with these edges."""
        sums = [part.summed(part.values(removed)) for part in self.prepared]
        return torch.stack(sums).sum(0) / self.n
