"""Circuits from scores of edges: the strongest, those above a threshold, those that hang together; and how stable that
choice is over pairs."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.record import Record
from clip_lens.core.table import Draws, units_of
from clip_lens.methods.circuits.circuit import Circuit, Graph, Ranking, Rule, Selection, Slots, random_circuit
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Site, at_slot

Select = Literal["top", "greedy", "both ends", "nodes"]
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which MIB (2504.13151) judges circuits."""
RESAMPLES = 200
"""Of the pairs, by which a sign is certain."""


@dataclass(frozen=True)
class EdgeScores:
    """Effects over edges, as a matrix edge x pair; of an oriented metric positive = the edge supports the model's d.

    An edge at a slot that a pair's text has not moves nothing there: 0, so that slots sum to the edge.
    """

    graph: Graph
    n_layers: int
    n_heads: int
    slots: Slots
    cells: tuple[list[int], list[int]]
    values: Float[Tensor, "edge pair"]

    @classmethod
    def of(cls, effects: Effects) -> EdgeScores:
        n_layers, n_heads = _shape(effects)
        edges = [_single(place) for place in effects.places]
        slots = _slots(edges)
        graph = Graph.of(n_layers, n_heads, slots)
        cells = [graph.receiver_at[edge.receiver] for edge in edges], [graph.sender_at[edge.sender] for edge in edges]
        if len(set(edges)) < len(edges):
            raise ValueError("an edge stands in the result more than once; keep one line for each")
        values = effects.signed().double()
        if slots:  # a pair without the slot has nothing that moves there
            values = torch.where(values.isnan() & ~effects.total.isnan(), 0.0, values)
        return cls(graph, n_layers, n_heads, slots, cells, values)

    def means(self, weight: Float[Tensor, "pair draw"] | None = None) -> Float[Tensor, "edge draw"]:
        """The mean over the pairs that have a value, pairs counted `weight` times; NaN where there is none."""
        weight = torch.ones(self.values.shape[1], 1, dtype=torch.float64) if weight is None else weight
        known = ~self.values.isnan()
        return (self.values.nan_to_num(0.0) @ weight) / (known.double() @ weight)

    def matrix(self, column: Float[Tensor, "edge"]) -> Float[Tensor, "receiver sender"]:
        matrix = torch.full(self.graph.edges.shape, torch.nan, dtype=torch.float64)
        matrix[self.cells] = column
        return matrix


def top_edges(
    effects: Effects,
    n: int | None = None,
    *,
    threshold: float | None = None,
    signed: bool = False,
    select: Select = "top",
    certain: float | None = None,
    seed: int = 0,
) -> Circuit:
    """The circuit of the n edges with the largest scores, by size, or (`signed`) of the n that support d the most; or
    with `threshold` in place of n of those whose score is larger than that, in units of the metric.

    An edge's score is the mean over pairs of `sigma * effect`, over those that have one: positive = the edge supports
    the model's own d (method, section 8); of a metric that is not oriented, the mean effect. Edges at slots, as
    `encoder.edges(slots=...)` lists them, give a circuit by slot (method, section 10). `select="greedy"` grows
    the circuit of n edges from the output backwards instead: of all edges into what it has so far it takes the
    strongest (Hanna et al. 2024), so that every edge leads to the output; "both ends" grows it from the embedding
    forwards as well. "nodes" takes heads and MLPs, those first whose edges sum to most, and keeps every edge among
    them, the embedding and the output, as long as these are at most n. `certain=.95` takes edges only whose mean has
    the same sign in 95 % of the resamples of the pairs, drawn by `seed`. Ties go to the edge that comes first in the
    tower. Nothing is pruned: `Circuit.pruned`.

    Raises:
        ValueError: places that are not single edges, all by slot or none, n and a threshold or neither, n that is
            negative or more than there are edges, a threshold that is not a number or for a circuit that is grown, or
            `certain` outside of (0, 1] or with edges that are not taken by themselves.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> effects = clip_lens.patch_effects(encoder, batch, encoder.edges(receivers=[clip_lens.Site("out")]))
        >>> len(top_edges(effects, 5)), len(top_edges(effects, 5, signed=True) & top_edges(effects, 5))
        (5, 5)
        >>> len(top_edges(effects, threshold=1e9))
        0
    """
    scores, ranking = EdgeScores.of(effects), _ranking(signed)
    if (n is None) == (threshold is None):
        raise ValueError(f"give either a number of edges or a threshold. Got n={n} and threshold={threshold}")
    if certain is not None:
        scores = _only_certain(effects, scores, certain, select, seed)
    if threshold is None:
        rule: Rule = select if certain is None else "certain"
        selection, most = Selection(rule, ranking, threshold=certain), len(scores.values) if certain else n
        return _circuit(effects, scores, scores.means()[:, 0], min(n or 0, most or 0), selection, signed, select)
    if select != "top" or threshold != threshold:
        raise ValueError(f"edges above {threshold} by {select!r}: a threshold is a number, and for select='top' alone")
    means = scores.means()[:, 0]
    selection, n = (
        Selection("above", ranking, threshold=float(threshold)),
        int((_ranked(means, signed) > threshold).sum()),
    )
    return _circuit(effects, scores, means, n, selection, signed, select)


def _above(means: Float[Tensor, "edge"], signed: bool, threshold: float) -> int:
    return int((_ranked(means, signed) > threshold).sum())


def _only_certain(effects: Effects, scores: EdgeScores, certain: float, select: Select, seed: int) -> EdgeScores:
    """The scores of those edges alone whose sign is certain over resamples of the pairs; the others have none."""
    if not 0 < certain <= 1 or select != "top":
        raise ValueError(f"certain={certain} with select={select!r}: a share of resamples up to 1, for select='top'")
    means = scores.means(_resamples(effects, RESAMPLES, seed)).sign()
    agree = (means == scores.means().sign()).double().mean(1)
    some = (agree >= certain).nonzero().flatten()
    receivers, senders = ([column[number] for number in some.tolist()] for column in scores.cells)
    return replace(scores, cells=(receivers, senders), values=scores.values[some])


def _resamples(effects: Effects, resamples: int, seed: int) -> Float[Tensor, "pair draw"]:
    """How often each pair is in each resample."""
    return Draws(0.95, resamples, seed).counts("pooled", *units_of(effects.pairs))


def _ranking(signed: bool) -> Ranking:
    return "signed" if signed else "absolute"


def sized_circuits(
    effects: Effects,
    shares: Sequence[float] = SHARES,
    *,
    signed: bool = False,
    select: Select = "top",
    certain: float | None = None,
    seed: int = 0,
) -> list[Circuit]:
    """One circuit per share of the N edges, of `int(share * N)` edges and pruned after that, for a curve over size.

    MIB's CPR takes them by signed score, CMD by size (method, section 8): `signed=True`, `signed=False`. They are
    pruned since MIB's are; what the selected edges themselves do may differ (`Circuit.pruned`). `select` and `certain`
    are those of `top_edges`.

    Raises:
        ValueError: a share outside of 0..1, or what `top_edges` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> effects = clip_lens.patch_effects(encoder, batch, encoder.edges(receivers=[clip_lens.Site("out")]))
        >>> [circuit.selection.share for circuit in sized_circuits(effects, (.1, .5))]
        [0.1, 0.5]
    """
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share of edges lies between 0 and 1. Got {wrong[0]}")
    scores, found = EdgeScores.of(effects), []
    if certain is not None:
        scores = _only_certain(effects, scores, certain, select, seed)
    for share in shares:
        n = number_of(share, len(effects.places))
        rule: Rule = select if certain is None else "certain"
        selection = Selection(rule, _ranking(signed), float(share), threshold=certain)
        n = n if certain is None else min(n, len(scores.values))
        found.append(_circuit(effects, scores, scores.means()[:, 0], n, selection, signed, select).pruned())
    return found


def cancellation(effects: Effects) -> DataFrame:
    """How much the sum over slots hides of what an edge does at each: a row per edge, those that hide most first.

    Of edges at slots, `encoder.edges(slots=...)`: sum (of the slots' scores, metric units), absolute (the sum of their
    sizes), cancellation = `1 - |sum| / absolute` (0 = all of one sign, 1 = nothing is left), slots (that have a score).
    A score is the mean over pairs of the signed effect; gradients' scores add up over slots, those of patches need not
    (method, section 10). Edges into the output, which is read at one position, are left out.

    Raises:
        ValueError: places that are not single edges at slots.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder, run="caption")
        >>> edges = encoder.edges(receivers=[clip_lens.Site("v", 2)], slots=batch.occurring)
        >>> table = cancellation(clip_lens.gradient_effects(encoder, batch, edges))
        >>> len(table), bool(table["cancellation"].between(0, 1).all())
        (44, True)
    """
    scores = EdgeScores.of(effects)
    if not scores.slots:
        raise ValueError("these are edges at every position; score encoder.edges(slots=...) to see what each slot adds")
    edges = [_single(place) for place in effects.places]
    frame = DataFrame({"edge": [str(at_slot(edge, None)) for edge in edges], "score": scores.means()[:, 0].numpy()})
    frame = frame[[edge.receiver.kind != "out" for edge in edges]].dropna()
    grouped = frame.assign(absolute=frame["score"].abs()).groupby("edge", sort=False)
    table = grouped.agg(sum=("score", "sum"), absolute=("absolute", "sum"), slots=("score", "size")).reset_index()
    left = (table["sum"].abs() / table["absolute"]).where(table["absolute"] > 0, 1.0)
    table.insert(3, "cancellation", (1 - left).clip(lower=0.0))
    hidden = (table["absolute"] - table["sum"].abs()).sort_values(ascending=False, kind="stable")
    return table.loc[hidden.index].reset_index(drop=True)


def number_of(share: float, edges: int) -> int:
    """How many edges a share of them is: `int(share * edges)`, without rounding errors.

    Example:
        >>> number_of(0.29, 100)
        29
    """
    return int(share * edges + 1e-9)


def random_sizes(encoder: HookedTextEncoder, seed: int, shares: Sequence[float] = SHARES) -> list[Circuit]:
    """A random circuit per share of the edges, each part of the next one, pruned: the baseline of `sized_circuits`.

    Example:
        >>> [circuit.selection.share for circuit in random_sizes(clip_lens.load(), 0, (0.1, 0.5))]
        [0.1, 0.5]
    """
    full = Circuit.full(encoder)
    sizes = [Selection("all", "absolute", share, number_of(share, len(full)), pruned=True) for share in shares]
    return [random_circuit(replace(full, selection=size), seed) for size in sizes]


def stability(
    effects: Effects,
    n: int | Sequence[int],
    *,
    signed: bool = False,
    select: Select = "top",
    interval: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> DataFrame:
    """How much of a circuit of n edges stays when the pairs are drawn anew: a row per n.

    Whole pairs are drawn with replacement, edges ranked again by the mean of their effects per pair; nothing is run.
    Columns: edges, jaccard (mean over resamples of the overlap with the circuit of all pairs), lower, upper (its
    percentile interval), pairwise (mean overlap of two resamples), certain (edges that are in every resample),
    resamples, pairs.

    Raises:
        ValueError: what `top_edges` refuses, fewer than one resample, an interval outside of (0, 1).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> effects = clip_lens.patch_effects(encoder, batch, encoder.edges(receivers=[clip_lens.Site("out")]))
        >>> stability(effects, [31], resamples=10)[["edges", "jaccard", "certain"]]
           edges  jaccard  certain
        0     31      1.0       31
    """
    if not 0 < interval < 1:
        raise ValueError(f"interval must lie between 0 and 1, as .95 does. Got {interval}")
    lines = []
    for size in [n] if isinstance(n, int) else n:
        full, drawn = _resampled(effects, size, signed, select, resamples, seed)
        overlap = _overlap(drawn, full[None])[:, 0]
        tail = (1 - interval) / 2
        pairwise = [float(_overlap(drawn[a][None], drawn[b][None])) for a, b in _some_pairs(len(drawn), seed)]
        lines.append(
            {
                "edges": size,
                "jaccard": float(overlap.mean()),
                "lower": float(overlap.quantile(tail)),
                "upper": float(overlap.quantile(1 - tail)),
                "pairwise": float(np.mean(pairwise)) if pairwise else float("nan"),
                "certain": int(drawn.all(0).sum()),
                "resamples": resamples,
                "pairs": effects.pairs["key"].nunique(),
            }
        )
    return DataFrame(lines)


def selection_frequency(
    effects: Effects, n: int, *, signed: bool = False, select: Select = "top", resamples: int = 200, seed: int = 0
) -> DataFrame:
    """How often each edge is among the n of a resample of the pairs (see `stability`): a row per edge.

    Columns: edge, sender, receiver, score (over all pairs), selected (whether it is in the circuit of all pairs),
    frequency (share of the resamples that select it).

    Raises:
        ValueError: what `stability` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> effects = clip_lens.patch_effects(encoder, batch, encoder.edges(receivers=[clip_lens.Site("out")]))
        >>> selection_frequency(effects, 31, resamples=10)["frequency"].to_list() == [1.0] * 31
        True
    """
    full, drawn = _resampled(effects, n, signed, select, resamples, seed)
    scores = EdgeScores.of(effects)
    frame = DataFrame(
        {
            "edge": [str(place) for place in effects.places],
            "sender": effects.index["sender"],
            "receiver": effects.index["receiver"],
            "score": scores.means()[:, 0].numpy(),
            "selected": full[scores.cells].numpy(),
            "frequency": drawn[:, scores.cells[0], scores.cells[1]].double().mean(0).numpy(),
        }
    )
    order = frame.assign(size=frame["score"].abs()).sort_values(["frequency", "size"], ascending=False, kind="stable")
    return frame.loc[order.index].reset_index(drop=True)


PAIRWISE = 1000
"""Two resamples are compared at most so many times."""


def _some_pairs(n: int, seed: int) -> list[tuple[int, int]]:
    every = list(combinations(range(n), 2))
    if len(every) <= PAIRWISE:
        return every
    chosen = np.random.default_rng([seed, len(every)]).choice(len(every), PAIRWISE, replace=False)
    return [every[number] for number in sorted(chosen)]


def _overlap(
    drawn: Bool[Tensor, "some receiver sender"], other: Bool[Tensor, "one receiver sender"]
) -> Float[Tensor, "some 1"]:
    both, either = (drawn & other).flatten(1).sum(1), (drawn | other).flatten(1).sum(1)
    return torch.where(either > 0, both.double() / either.clamp(min=1), 1.0)[:, None]


def _resampled(
    effects: Effects, n: int, signed: bool, select: Select, resamples: int, seed: int
) -> tuple[Bool[Tensor, "receiver sender"], Bool[Tensor, "resample receiver sender"]]:
    """The n edges of all pairs, and those of each resample."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1. Got {resamples}")
    scores = EdgeScores.of(effects)
    _check_n(scores, n, select)
    means = [scores.means(), *scores.means(_resamples(effects, resamples, seed)).split(1, 1)]
    kept = [_keep(scores, column[:, 0], n, signed, select) for column in means]
    return kept[0], torch.stack(kept[1:])


def _ranked(score: Float[Tensor, "edge"], signed: bool) -> Float[Tensor, "edge"]:
    """What edges are sorted by; an edge that has no value in any pair comes last."""
    key = score if signed else score.abs()
    return key.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _check_n(scores: EdgeScores, n: int, select: Select) -> None:
    if select not in get_args(Select):
        raise ValueError(f"select={select!r}; give one of {', '.join(get_args(Select))}")
    if not 0 <= n <= len(scores.values):
        raise ValueError(f"n={n}: the result has {len(scores.values)} edges to select from")


def _keep(
    scores: EdgeScores, means: Float[Tensor, "edge"], n: int, signed: bool, select: Select
) -> Bool[Tensor, "receiver sender"]:
    keys = _ranked(means, signed)
    if select in ("greedy", "both ends"):
        return _greedy(scores, keys, n, both=select == "both ends")
    if select == "nodes":
        return _of_nodes(scores, means, n, signed)
    keep = torch.zeros_like(scores.graph.edges)
    rank = scores.matrix(keys).nan_to_num(nan=-torch.inf)  # in the tower's order, which decides between equals
    known = torch.zeros_like(keep)
    known[scores.cells] = True
    at = known.nonzero()
    best = rank[known].sort(descending=True, stable=True).indices[:n]
    keep[at[best, 0], at[best, 1]] = True
    return keep


def _greedy(scores: EdgeScores, keys: Float[Tensor, "edge"], n: int, *, both: bool) -> Bool[Tensor, "receiver sender"]:
    """From the output backwards, or from both ends: of all edges at the nodes reached so far always the strongest."""
    graph, keep = scores.graph, torch.zeros_like(scores.graph.edges)
    node_of, out = graph.node_of.tolist(), len(graph.senders)
    into: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
    out_of: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
    for key, r, s in zip(keys.tolist(), *scores.cells, strict=True):
        into[node_of[r]].append((-key, r, s))
        out_of[s].append((-key, r, s))
    behind, ahead = {out}, {0}  # what leads to the output, and what the embedding leads to
    heap = [*into[out], *(out_of[0] if both else ())]
    heapq.heapify(heap)
    while heap and n > 0:
        _, r, s = heapq.heappop(heap)
        if keep[r, s]:
            continue
        keep[r, s] = True
        n -= 1
        new = []
        if node_of[r] in behind and s not in behind:
            behind.add(s)
            new += into[s]
        if both and s in ahead and node_of[r] not in ahead:
            ahead.add(node_of[r])
            new += out_of[node_of[r]]
        for entry in new:
            heapq.heappush(heap, entry)
    return keep


def _of_nodes(
    scores: EdgeScores, means: Float[Tensor, "edge"], n: int, signed: bool
) -> Bool[Tensor, "receiver sender"]:
    """Every edge among the strongest nodes, of which there are as many as n edges are enough for."""
    graph, known = scores.graph, torch.zeros_like(scores.graph.edges)
    known[scores.cells] = True
    sums = scores.matrix(means).nansum(0)[1:]
    nodes = torch.zeros(len(graph.senders) + 1, dtype=torch.bool)
    nodes[0] = nodes[-1] = True
    keep = torch.zeros_like(known)
    for node in [None, *((sums if signed else sums.abs()).sort(descending=True, stable=True).indices + 1).tolist()]:
        if node is not None:
            nodes[node] = True
        among = known & nodes[:-1] & nodes[graph.node_of][:, None]
        if int(among.sum()) > n:
            break
        keep = among
    return keep


def _circuit(
    effects: Effects,
    scores: EdgeScores,
    means: Float[Tensor, "edge"],
    n: int,
    selection: Selection,
    signed: bool,
    select: Select,
) -> Circuit:
    _check_n(scores, n, select)
    entered = (~scores.values.isnan()).sum(1)
    span = (int(entered.min()), int(entered.max())) if len(entered) else None
    selection = replace(selection, asked=n, of=len(effects.places), entered=span)
    keep = _keep(scores, means, n, signed, select)
    matrix = scores.matrix(scores.means()[:, 0])
    return Circuit(keep, scores.n_layers, scores.n_heads, matrix, "", effects.record, selection, scores.slots)


def _single(place: object) -> Edge:
    ends = (place.sender, place.receiver) if isinstance(place, Edge) else ()
    if not isinstance(place, Edge) or any(_whole_layer(site) for site in ends):
        raise ValueError(f"a circuit is made of single edges as encoder.edges() lists them. Got {place}")
    return place


def _slots(edges: Sequence[Edge]) -> Slots:
    """The slots of edges that are all at one, but those into the output; none where they are at every position."""
    named = [edge.receiver.slot for edge in edges if edge.receiver.kind != "out"]
    slots = tuple(dict.fromkeys(slot for slot in named if slot is not None))
    if slots and None in named:
        raise ValueError(
            "edges at slots and edges at every position stand in one result, which count the same tokens twice; score "
            "either, as encoder.edges() or encoder.edges(slots=...) lists them"
        )
    return slots


def _whole_layer(site: Site) -> bool:
    return site.unit is None and site.kind in ("head", "q", "k", "v")


def _shape(effects: Effects) -> tuple[int, int]:
    """Layers and heads of the tower: as the result says, else as deep and wide as its edges reach."""
    record: Record = effects.record
    if record.layers is not None and record.heads is not None:
        return record.layers, record.heads
    sites = [site for place in effects.places for site in (_single(place).sender, _single(place).receiver)]
    return 1 + max((site.layer for site in sites), default=0), 1 + max((site.unit or 0 for site in sites), default=0)
