"""`Circuit`: which edges of a tower are kept. A value: compared, drawn, written and read, never run by itself.

Edges are a matrix of truth values, receivers by senders, both in the order in which the tower computes them. A circuit
says by which record it was found and by which rule its edges were selected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from html import escape
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.identity import identity_of
from clip_lens.core.record import Record, as_json, of_json
from clip_lens.files import written_whole
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Site, precedes, readers, writers

if TYPE_CHECKING:
    from networkx import DiGraph

FORMAT = "clip_lens circuit 2"
OLD = "clip_lens circuit 1"

Rule = Literal[
    "", "all", "top", "greedy", "both ends", "nodes", "above", "certain", "removal", "learned", "drawn", "joined"
]
Ranking = Literal["", "signed", "absolute"]


Slots: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Graph:
    """The senders and receivers of a tower of some depth and number of heads, and which pairs of them are edges.

    With `slots` every receiver but `out` stands there once for each of them, at its tokens: an edge has a weight of its
    own at each slot (method, section 10; Haklay et al. 2025). `node_of[receiver]` is the number of the sender that a
    receiver belongs to (a head's q, k and v to the head), that of `out` is the number of senders. `slot_of[receiver]`
    is the number of its slot, 0 without.

    Example:
        >>> graph = Graph.of(6, 4)
        >>> len(graph.senders), len(graph.receivers), int(graph.edges.sum())
        (31, 79, 1108)
        >>> int(Graph.of(6, 4, ("negator", "eot")).edges.sum()) == 2 * (1108 - 31) + 31
        True
    """

    senders: tuple[Site, ...]
    receivers: tuple[Site, ...]
    edges: Bool[Tensor, "receiver sender"]
    node_of: Int[Tensor, "receiver"]
    slot_of: Int[Tensor, "receiver"]
    slots: Slots
    sender_at: Mapping[Site, int]
    receiver_at: Mapping[Site, int]

    @staticmethod
    def of(n_layers: int, n_heads: int, slots: Slots = ()) -> Graph:
        """The graph of a tower of this shape, by slot where some are given.

        Raises:
            ValueError: a slot comes twice, or names and positions are mixed, which may overlap.
        """
        if len(set(slots)) < len(slots) or len({isinstance(slot, str) for slot in slots}) > 1:
            raise ValueError(f"the slots of a graph are all names or all positions, each once. Got {slots}")
        known = _graph(n_layers, n_heads, slots)
        copies = {name: getattr(known, name).clone() for name in ("edges", "node_of", "slot_of")}
        return replace(known, **copies)

    def reached(self, keep: Bool[Tensor, "receiver sender"]) -> Bool[Tensor, "receiver sender"]:
        """Whether something of the embedding reaches each sender along kept edges, at the slot of each receiver.

        What a head reads as key or value at one slot may reach any other; a query or an MLP's input stays at its own.
        The output may be pooled at any slot.
        """
        sends = torch.zeros(max(1, len(self.slots)), len(self.senders), dtype=torch.bool)
        sends[:, 0] = True
        spreads = self._spreads
        for node, rows in self._rows[:-1]:
            reads = (keep[rows] & sends[self.slot_of[rows]]).any(1)
            sends[self.slot_of[rows[reads]], node] = True
            sends[:, node] |= (reads & spreads[rows]).any()
        return torch.where(self._is_out[:, None], sends.any(0), sends[self.slot_of])

    def read(self, keep: Bool[Tensor, "receiver sender"]) -> Bool[Tensor, "receiver"]:
        """Whether what each receiver reads can reach the output along kept edges."""
        read, spreads = self._is_out.clone(), self._spreads
        for node, rows in reversed(self._rows[:-1]):
            by = keep[:, node] & read
            wanted = torch.zeros(max(1, len(self.slots)), dtype=torch.bool)
            wanted[self.slot_of[by]] = True
            wanted |= (by & self._is_out).any()
            read[rows] = torch.where(spreads[rows], wanted.any(), wanted[self.slot_of[rows]])
        return read

    @property
    def _is_out(self) -> Bool[Tensor, "receiver"]:
        return self.node_of == len(self.senders)

    @property
    def _spreads(self) -> Bool[Tensor, "receiver"]:
        return torch.tensor([site.kind in ("k", "v", "out") for site in self.receivers])

    @cached_property
    def _rows(self) -> list[tuple[int, Int[Tensor, "own"]]]:
        """Every node but the embedding, with the receivers that belong to it, in the order of the tower."""
        nodes = range(1, len(self.senders) + 1)
        return [(node, (self.node_of == node).nonzero().flatten()) for node in nodes]


@lru_cache(maxsize=16)
def _graph(n_layers: int, n_heads: int, slots: Slots) -> Graph:
    """The one graph of a shape, never handed out: whoever edits a tensor of theirs edits nobody else's."""
    senders, bare = writers(n_layers, n_heads), readers(n_layers, n_heads)
    sender_at = {site: number for number, site in enumerate(senders)}
    owner = [Site("head", site.layer, site.unit) if site.kind in "qkv" else site for site in bare]
    node_of = [sender_at.get(site, len(senders)) for site in owner]
    edges = torch.tensor([[precedes(sender, receiver) for sender in senders] for receiver in bare])
    at = [
        (number, slot)
        for number, site in enumerate(bare)
        for slot in (range(len(slots)) if slots and site.kind != "out" else (None,))
    ]
    rows = [number for number, _ in at]
    receivers = tuple(bare[number] if slot is None else replace(bare[number], slot=slots[slot]) for number, slot in at)
    return Graph(
        tuple(senders),
        receivers,
        edges[rows],
        torch.tensor(node_of)[rows],
        torch.tensor([slot or 0 for _, slot in at]),
        slots,
        MappingProxyType(sender_at),
        MappingProxyType({site: number for number, site in enumerate(receivers)}),
    )


@dataclass(frozen=True)
class Selection:
    """By which rule a circuit's edges were chosen.

    `rule`: "top" and "greedy" take the `asked` strongest edges, "above" those with a score above `threshold`, "removal"
    leaves what changes the metric by at least `threshold`, "drawn" takes `asked` edges at random, "joined" comes of two
    circuits, "all" is every edge, "" a list that somebody wrote. `ranking` says by which score, "signed" or "absolute"
    (by size). `asked` counts edges before pruning, `of` those there were to choose from; `share` is what was asked
    for, where a circuit was selected by its share of them. `entered` are the fewest and the most pairs that the score
    of an edge is the mean over.

    Example:
        >>> print(Selection("top", "signed", asked=200, of=1108, pruned=True))
        the top 200 of 1108 edges by signed score, pruned
    """

    rule: Rule = ""
    ranking: Ranking = ""
    share: float | None = None
    asked: int | None = None
    pruned: bool = False
    of: int | None = None
    threshold: float | None = None
    entered: tuple[int, int] | None = None

    def __str__(self) -> str:
        by = f" by {self.ranking} score" if self.ranking else ""
        number = f"{self.asked} of {self.of} edges" if self.of is not None else f"{self.asked} edges"
        bound = "" if self.threshold is None else f"{self.threshold:g}"
        said = {
            "": "",
            "all": "every edge",
            "top": f"the top {number}{by}",
            "greedy": f"{number} grown from the output{by}",
            "both ends": f"{number} grown from both ends{by}",
            "nodes": f"every edge among the strongest nodes, at most {number},{by}",
            "certain": f"the top {number} with a sign that is certain in {bound} of the resamples{by}",
            "above": f"{number} above {bound}{by}",
            "learned": f"{number} learned as gates",
            "removal": f"{number} left by a search with the threshold {bound}",
            "drawn": f"{number} drawn at random",
            "joined": "joined of two circuits",
        }[self.rule]
        return ", ".join(filter(None, [said, "pruned" if self.pruned else ""]))


LISTED = Selection()
"""The selection of edges that somebody listed."""


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """The edges of a tower that a method kept, `keep[receiver, sender]`, with a score for each where there is one.

    A circuit's run reads, along every edge outside it, the source's value (method, section 8; `faithfulness`). `scores`
    are in units of the metric, positive = the edge supports the model's own d, NaN where there is none. `name` is what
    tables and pictures call it, by default the title of its record's method; `record` says what was run on what to find
    it, None where nothing was; `selection` by which rule its edges were chosen. Both tensors are copies of those given.

    With `slots` it is a circuit by position (method, section 10): an edge is kept at some of them, a line of `keep` is
    a receiver at a slot, and what is counted as edges everywhere are these weights. `training` is the course of a
    circuit that was learned.

    Raises:
        ValueError: matrices of another shape than this depth and number of heads have, or a kept pair of a receiver
            and a sender between which no edge runs.

    Example:
        >>> from clip_lens import Edge, Site
        >>> head = Site("head", 0, 1)
        >>> edges = [Edge(Site("embed"), Site("v", 0, 1)), Edge(head, Site("out")), Edge(head, Site("mlp", 0))]
        >>> circuit = Circuit.of(edges, n_layers=2, n_heads=2)
        >>> circuit
        Circuit(3 of 46 edges, 4 of 8 nodes)
        >>> [str(edge) for edge in circuit.pruned().edges()]
        ['embed -> v 0.1', 'head 0.1 -> out']
    """

    keep: Bool[Tensor, "receiver sender"]
    n_layers: int
    n_heads: int
    scores: Float[Tensor, "receiver sender"] | None = None
    name: str = ""
    record: Record | None = None
    selection: Selection = LISTED
    slots: Slots = ()
    training: DataFrame | None = None

    def __post_init__(self) -> None:
        keep, graph = torch.as_tensor(self.keep).detach().cpu().clone(), self.graph
        if keep.dtype != torch.bool or keep.shape != graph.edges.shape:
            raise ValueError(
                f"keep must be truth values [receiver, sender] = {list(graph.edges.shape)} for {self.n_layers} "
                f"layers x {self.n_heads} heads{_at_slots(self.slots)}. Got {keep.dtype} of shape {list(keep.shape)}"
            )
        if bool((keep & ~graph.edges).any()):
            receiver, sender = (keep & ~graph.edges).nonzero()[0].tolist()
            raise ValueError(
                f"no edge runs from {graph.senders[sender]} to {graph.receivers[receiver]}, yet it is kept"
            )
        object.__setattr__(self, "keep", keep)
        found_by = "" if self.record is None else self.record.method.title
        object.__setattr__(self, "name", self.name or found_by or "circuit")
        if self.scores is not None:
            object.__setattr__(self, "scores", _scores(self.scores, keep))

    @classmethod
    def of(
        cls,
        edges: Iterable[Edge] | Mapping[Edge, float],
        *,
        n_layers: int,
        n_heads: int,
        name: str = "",
        slots: Iterable[str | int] = (),
    ) -> Circuit:
        """The circuit of some edges; a mapping gives their scores. An end without unit is all heads of its layer.

        With `slots`, or where an edge has a slot, the circuit is by slot: over these and those of the edges. There an
        edge without slot is kept at each.

        Raises:
            ValueError: an edge that a tower of this depth and number of heads does not have.

        Example:
            >>> from clip_lens import Edge, Site
            >>> len(Circuit.of([Edge(Site("embed"), Site("v", 0))], n_layers=2, n_heads=2).edges())
            2
        """
        edges = edges if isinstance(edges, Mapping) else list(edges)
        named = [edge.receiver.slot for edge in edges]
        slots = tuple(dict.fromkeys([*slots, *(slot for slot in named if slot is not None)]))
        graph = Graph.of(n_layers, n_heads, slots)
        keep, scores = torch.zeros_like(graph.edges), torch.full(graph.edges.shape, torch.nan, dtype=torch.float64)
        for edge in edges:
            for at in _cells(edge, graph, n_heads):
                keep[at] = True
                scores[at] = edges[edge] if isinstance(edges, Mapping) else torch.nan
        return cls(keep, n_layers, n_heads, scores if isinstance(edges, Mapping) else None, name, slots=slots)

    @classmethod
    def full(cls, encoder: HookedTextEncoder, slots: Iterable[str | int] = ()) -> Circuit:
        """The circuit of every edge that an encoder has, at every one of some slots.

        Example:
            >>> Circuit.full(clip_lens.load())
            Circuit(1108 of 1108 edges, 32 of 32 nodes; every edge; tiny)
        """
        slots = tuple(slots)
        keep = Graph.of(encoder.n_layers, encoder.n_heads, slots).edges
        record = Record(model=encoder.full_name, weights=encoder.digest)
        return cls(keep, encoder.n_layers, encoder.n_heads, None, "every edge", record, Selection("all"), slots)

    @property
    def graph(self) -> Graph:
        """The senders and receivers that `keep` refers to."""
        return Graph.of(self.n_layers, self.n_heads, self.slots)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that say which edges these are, of a tower of which shape.

        Example:
            >>> full = Circuit.full(clip_lens.load())
            >>> full.digest == full.named("all").digest != (full - full).digest
            True
        """
        slots = tuple(sorted(self.slots, key=str))
        by_slot = (slots,) if slots else ()
        return cast(str, identity_of(self.n_layers, self.n_heads, self.at_slots(slots).keep, *by_slot))

    def named(self, name: str) -> Circuit:
        """The same circuit under another name.

        Example:
            >>> Circuit.full(clip_lens.load()).named("all").name
            'all'
        """
        return replace(self, name=name)

    def at_slots(self, slots: Iterable[str | int]) -> Circuit:
        """The same circuit as one by slot: every edge at each of some slots, with its score.

        Raises:
            ValueError: it is by slot already, and these are others.

        Example:
            >>> from clip_lens import Edge, Site
            >>> edges = [Edge(Site("embed"), Site("v", 0, 0)), Edge(Site("head", 0, 0), Site("out"))]
            >>> [str(edge) for edge in Circuit.of(edges, n_layers=1, n_heads=1).at_slots(["negator", "eot"]).edges()]
            ['embed -> v 0.0 @negator', 'embed -> v 0.0 @eot', 'head 0.0 -> out']
        """
        if (slots := tuple(slots)) == self.slots:
            return self
        if self.slots and set(self.slots) != set(slots):
            raise ValueError(f"{self.name} is by the slots {self.slots}, and can't be told at others, {slots}")
        own, receivers = self.graph.receiver_at, Graph.of(self.n_layers, self.n_heads, slots).receivers
        rows = [own[site if self.slots else replace(site, slot=None)] for site in receivers]
        scores = None if self.scores is None else self.scores[rows]
        return replace(self, keep=self.keep[rows], scores=scores, slots=slots)

    def as_text(self) -> dict[str, str]:
        """How it came about, as lines for files and pages: a heading and a text each.

        Example:
            >>> Circuit.full(clip_lens.load()).as_text()["selection"]
            'every edge'
        """
        entered = self.selection.entered
        said = {
            "name": self.name,
            "selection": str(self.selection),
            "slots": ", ".join(map(str, self.slots)),
            "pairs per edge": "" if entered is None else " to ".join(map(str, dict.fromkeys(entered))),
            **({} if self.record is None else self.record.as_text()),
        }
        return {heading: text for heading, text in said.items() if text}

    def __len__(self) -> int:
        return int(self.keep.sum())

    def __contains__(self, edge: object) -> bool:
        if not isinstance(edge, Edge):
            return False
        cells = _cells(edge, self.graph, self.n_heads)
        return all(bool(self.keep[cell]) for cell in cells)

    def edges(self) -> list[Edge]:
        """The edges kept, receivers in the order of the tower and within one the senders.

        Example:
            >>> len(Circuit.full(clip_lens.load()).edges())
            1108
        """
        return self._listed(self.keep)

    def removed(self) -> list[Edge]:
        """The edges outside: those that carry the source's value in a circuit's run.

        Example:
            >>> Circuit.full(clip_lens.load()).removed()
            []
        """
        return self._listed(self.graph.edges & ~self.keep)

    def _listed(self, mask: Bool[Tensor, "receiver sender"]) -> list[Edge]:
        graph = self.graph
        return [Edge(graph.senders[s], graph.receivers[r]) for r, s in mask.nonzero().tolist()]

    def pruned(self) -> Circuit:
        """The edges on a path from the embedding to the output; `selection.pruned` says so.

        It is another circuit, and may do something else. What reaches no output is not read, and cutting it changes
        nothing. But a component to which no kept edge leads from the embedding computes on what the source sends along
        its cut edges, and what it gives then is what the source has there only where the source is a run on texts of
        equal length. Then both forms do the same. From zeros or means, or where a text has positions without
        counterpart, they are two circuits, and `faithfulness` says a number for each.

        Example:
            >>> full = Circuit.full(clip_lens.load())
            >>> len(full.pruned()) == len(full)
            True
        """
        graph = self.graph
        on_a_path = graph.reached(self.keep) & graph.read(self.keep)[:, None]
        asked = len(self) if self.selection.asked is None else self.selection.asked
        selection = replace(self.selection, asked=asked, pruned=True)
        return replace(self, keep=self.keep & on_a_path, selection=selection)

    def nodes(self) -> DataFrame:
        """The senders, and the output, that have an edge: node, kind, layer, unit, incoming, outgoing (edges kept),
        strongest (the largest of the scores of its edges by size, NaN without scores).

        Example:
            >>> Circuit.full(clip_lens.load()).nodes()[["node", "incoming", "outgoing"]].head(2)
                   node  incoming  outgoing
            0     embed         0        79
            1  head 0.0         3        67
        """
        graph = self.graph
        incoming = torch.zeros(len(graph.senders) + 1, dtype=torch.long).index_add(0, graph.node_of, self.keep.sum(1))
        outgoing = torch.cat([self.keep.sum(0), torch.zeros(1, dtype=torch.long)])
        sites = [*graph.senders, Site("out")]
        lines = [
            {
                "node": str(sites[node]),
                "kind": sites[node].kind,
                "layer": None if sites[node].kind in ("embed", "out") else sites[node].layer,
                "unit": sites[node].unit,
                "incoming": int(incoming[node]),
                "outgoing": int(outgoing[node]),
                "strongest": self._strongest(node),
            }
            for node in (incoming + outgoing).nonzero().flatten().tolist()
        ]
        columns = ["node", "kind", "layer", "unit", "incoming", "outgoing", "strongest"]
        return DataFrame(lines, columns=columns).astype({"layer": "Int64", "unit": "Int64", "strongest": "float64"})

    def _strongest(self, node: int) -> float:
        if self.scores is None:
            return float("nan")
        into = self.scores[self.graph.node_of == node].flatten()
        out_of = self.scores[:, node] if node < len(self.graph.senders) else into[:0]
        found = torch.cat([into, out_of])
        found = found[~found.isnan()]
        return float(found[found.abs().argmax()]) if len(found) else float("nan")

    def to_networkx(self) -> DiGraph:
        """A `networkx.DiGraph` of the nodes: embed, heads, MLPs, out. Nodes have kind, layer, unit; an arc has
        `through`, the inputs that it enters (of q, k, v, mlp, out; by slot "v @eot"), `scores` by input, and the
        largest, `score`.

        Example:
            >>> graph = Circuit.full(clip_lens.load()).to_networkx()
            >>> graph.edges["embed", "head 0.0"]["through"]
            ('q', 'k', 'v')
        """
        import networkx

        graph = networkx.DiGraph(**self.as_text())
        sites, receivers, node_of = (
            [*self.graph.senders, Site("out")],
            self.graph.receivers,
            self.graph.node_of.tolist(),
        )
        for row in self.nodes().itertuples():
            site = next(site for site in sites if str(site) == row.node)
            graph.add_node(row.node, kind=site.kind, layer=site.layer, unit=site.unit)
        for r, s in self.keep.nonzero().tolist():
            ends = str(sites[s]), str(sites[node_of[r]])
            score = float("nan") if self.scores is None else float(self.scores[r, s])
            known = graph.edges[ends]["scores"] if graph.has_edge(*ends) else {}
            scores = {**known, _input(receivers[r]): score}
            strongest = max(scores.values(), key=lambda number: -1.0 if number != number else abs(number))
            graph.add_edge(*ends, through=tuple(scores), scores=scores, score=strongest)
        return graph

    def __and__(self, other: Circuit) -> Circuit:
        return self._joined(other, self.keep & self._same(other).keep, "&")

    def __or__(self, other: Circuit) -> Circuit:
        return self._joined(other, self.keep | self._same(other).keep, "|")

    def __sub__(self, other: Circuit) -> Circuit:
        return self._joined(other, self.keep & ~self._same(other).keep, "-")

    def _joined(self, other: Circuit, keep: Bool[Tensor, "receiver sender"], sign: str) -> Circuit:
        """Scores are the left circuit's, since those of two methods or models have no common scale."""
        name = f"({self.name}) {sign} ({other.name})"
        record, selection = _shared(self.record, other.record), Selection("joined")
        return replace(self, keep=keep, name=name, record=record, selection=selection, training=None)

    def _same(self, other: Circuit) -> Circuit:
        if (self.n_layers, self.n_heads) != (other.n_layers, other.n_heads):
            raise ValueError(
                f"circuits of towers of one shape can be compared, not {self.n_layers} layers x {self.n_heads} heads "
                f"and {other.n_layers} x {other.n_heads}"
            )
        if set(self.slots) != set(other.slots):
            raise ValueError(
                f"circuits by the same slots can be compared, not by {self.slots or 'none'} and "
                f"{other.slots or 'none'}; Circuit.at_slots says a circuit of edges by slot"
            )
        return other.at_slots(self.slots)

    def jaccard(self, other: Circuit) -> float:
        """Edges in both / edges in either: 1 = the same edges, 0 = none in common; two empty circuits are the same.

        Raises:
            ValueError: the other circuit's tower has another depth or number of heads.

        Example:
            >>> full = Circuit.full(clip_lens.load())
            >>> full.jaccard(full - full), full.jaccard(full)
            (0.0, 1.0)
        """
        either = len(self | other)
        return len(self & other) / either if either else 1.0

    def diff(self, other: Circuit) -> DataFrame:
        """Where two circuits part: a row per edge of either, those of both last.

        Columns: edge, sender, receiver, kept_by ("first", "second" or "both"), score (the first's), other_score.

        Raises:
            ValueError: what `jaccard` refuses.

        Example:
            >>> full = Circuit.full(clip_lens.load())
            >>> full.diff(full - full)["kept_by"].value_counts().to_dict()
            {'first': 1108}
        """
        other = self._same(other)
        parts = {"first": self - other, "second": other - self, "both": self & other}
        scores = [circuit.scored() for circuit in (self, other)]
        lines = [
            (str(edge), str(edge.sender), str(edge.receiver), kept_by, *(own.get(edge, float("nan")) for own in scores))
            for kept_by, circuit in parts.items()
            for edge in circuit.edges()
        ]
        return DataFrame(lines, columns=["edge", "sender", "receiver", "kept_by", "score", "other_score"])

    @staticmethod
    def overlaps(circuits: Mapping[str, Circuit]) -> DataFrame:
        """How much each two circuits share, across methods, seeds or models of one shape: a row per two of them.

        Columns: first, second, edges_first, edges_second, shared, only_first, only_second, jaccard, by_chance, the
        number that two circuits of these sizes drawn at random share on average (`edges_first * edges_second / all
        edges`), and p, the probability that they share as many or more (hypergeometric).

        Raises:
            ValueError: the circuits are of towers of different shapes.

        Example:
            >>> full = Circuit.full(clip_lens.load())
            >>> Circuit.overlaps({"all": full, "none": full - full})[["first", "second", "shared", "jaccard"]]
              first second  shared  jaccard
            0   all   none       0      0.0
        """
        return DataFrame(
            [(a, b, *one._overlap(two)) for (a, one), (b, two) in combinations(circuits.items(), 2)],
            columns=["first", "second", "edges_first", "edges_second", "shared", "only_first", "only_second", "jaccard",
                     "by_chance", "p"],
        )  # fmt: skip

    def _overlap(self, other: Circuit) -> tuple[float, ...]:
        """What `overlaps` says of two circuits."""
        from scipy.stats import hypergeom

        jaccard, shared, every = self.jaccard(other), len(self & other), int(self.graph.edges.sum())
        one, two = len(self), len(other)
        p = float(hypergeom.sf(shared - 1, every, one, two))
        return one, two, shared, one - shared, two - shared, jaccard, one * two / every, p

    def scored(self) -> dict[Edge, float]:
        """The score of each edge kept, NaN where there is none.

        Example:
            >>> from clip_lens import Edge, Site
            >>> edge = Edge(Site("embed"), Site("out"))
            >>> Circuit.of({edge: 1.5}, n_layers=1, n_heads=1).scored()[edge]
            1.5
        """
        scores = [float("nan")] * len(self) if self.scores is None else self.scores[self.keep].tolist()
        return dict(zip(self.edges(), scores, strict=True))

    def table(self) -> DataFrame:
        """The edges kept, strongest first: edge, sender, receiver, score (NaN without scores).

        Example:
            >>> Circuit.full(clip_lens.load()).table().iloc[0, :3].tolist()
            ['embed -> q 0.0', 'embed', 'q 0.0']
        """
        lines = [(str(e), str(e.sender), str(e.receiver), score) for e, score in self.scored().items()]
        frame = DataFrame(lines, columns=["edge", "sender", "receiver", "score"])
        order = frame["score"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
        return frame.loc[order].reset_index(drop=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file that a person can read: the tower's shape, the name, what it was found by and selected by,
        and a line per edge with its score.

        An interrupted call leaves an existing file as it was.

        Example:
            >>> from clip_lens import Edge, Site
            >>> path = getfixture("tmp_path") / "circuit.json"
            >>> scores = {Edge(Site("embed"), Site("out")): 1.5}
            >>> Circuit.of(scores, n_layers=1, n_heads=1, name="mine").save(path)
            >>> print(path.read_text())
            {
              "format": "clip_lens circuit 2",
              "layers": 1,
              "heads": 1,
              "name": "mine",
              "record": null,
              "selection": {},
              "scored": true,
              "edges": {
                "embed -> out": 1.5
              }
            }
        """
        content = {
            "format": FORMAT,
            "layers": self.n_layers,
            "heads": self.n_heads,
            "name": self.name,
            "record": None if self.record is None else as_json(self.record),
            "selection": _given(self.selection),
            **({"slots": list(self.slots)} if self.slots else {}),
            **({} if self.training is None else {"training": _lines(self.training)}),
            "scored": self.scores is not None,
            "edges": {str(edge): None if n != n else n for edge, n in self.scored().items()},
        }
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """The circuit that `save` wrote.

        Raises:
            ValueError: the file is damaged, not one that `save` wrote, one that clip_lens 0.1 wrote, or names an edge
                that its tower does not have.

        Example:
            >>> path = getfixture("tmp_path") / "circuit.json"
            >>> full = Circuit.full(clip_lens.load())
            >>> full.save(path)
            >>> Circuit.load(path).jaccard(full)
            1.0
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no whole JSON file, it may be damaged: {error}") from error
        return cls(**_fields(content, str(path)))

    def __repr__(self) -> str:
        parts = [
            f"{len(self)} of {int(self.graph.edges.sum())} edges, "
            f"{len(self.nodes())} of {len(self.graph.senders) + 1} nodes",
            self.name if self.name != "circuit" else "",
            "" if self.record is None else self.record.model,
        ]
        return f"Circuit({'; '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        said = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.as_text().items())
        table = self.table().head(10)[["edge", "score"]]
        shown = table.to_html(index=False, float_format="{:.3f}".format, na_rep="", border=0)
        more = f"<p>... and {len(self) - len(table)} more edges</p>" if len(self) > len(table) else ""
        return f"<p>{escape(repr(self))}</p><dl>{said}</dl>{shown}{more}"


def random_circuit(like: Circuit, seed: int = 0) -> Circuit:
    """A circuit drawn at random from all edges of the tower in the way `like` was selected: the baseline for it.

    It has as many edges, or where `like` was pruned as many as that had before, and is then pruned as well. Those of
    one seed are nested: a larger one has all edges of a smaller one.

    Example:
        >>> full = Circuit.full(clip_lens.load())
        >>> len(random_circuit(full & full, seed=1)), len(random_circuit(full - full))
        (1108, 0)
    """
    asked = like.selection.asked if like.selection.pruned and like.selection.asked is not None else len(like)
    cells = like.graph.edges.nonzero()
    drawn = cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:asked]]
    keep = torch.zeros_like(like.keep)
    keep[drawn[:, 0], drawn[:, 1]] = True
    name, selection = f"random({seed})", replace(like.selection, rule="drawn", asked=asked, of=len(cells), pruned=False)
    selection = replace(selection, threshold=None, entered=None)
    record = _of_tower(like.record)
    made = replace(like, keep=keep, scores=None, name=name, record=record, selection=selection, training=None)
    return made.pruned() if like.selection.pruned else made


def _of_tower(record: Record | None) -> Record | None:
    """What a record says of the tower alone: nothing was run to draw edges."""
    return None if record is None else Record(model=record.model, weights=record.weights)


def _shared(one: Record | None, two: Record | None) -> Record | None:
    """What two records have in common, but the method."""
    if one is None or two is None:
        return None
    same = {each.name: getattr(one, each.name) for each in fields(Record) if each.name != "method"}
    return Record(**{name: value for name, value in same.items() if getattr(two, name) == value})


def _scores(
    scores: Float[Tensor, "receiver sender"], keep: Bool[Tensor, "receiver sender"]
) -> Float[Tensor, "receiver sender"]:
    """Scores on the CPU, NaN outside of the circuit."""
    scores = scores.detach().cpu().double()
    if scores.shape != keep.shape:
        raise ValueError(f"scores must be [receiver, sender] = {list(keep.shape)}. Got {list(scores.shape)}")
    return scores.masked_fill(~keep, torch.nan)


def _given(selection: Selection) -> dict[str, Any]:
    """What a selection says, as JSON has it."""
    named = {each.name: getattr(selection, each.name) for each in fields(selection)}
    return {name: value for name, value in named.items() if value != getattr(LISTED, name)}


def _lines(table: DataFrame) -> list[dict[str, Any]]:
    """A table's lines as JSON has them, None where there is no number."""
    return [{name: None if n != n else n for name, n in line.items()} for line in table.to_dict("records")]


def _selection(plain: Mapping[str, Any]) -> Selection:
    entered = plain.get("entered")
    return Selection(**{**plain, "entered": None if entered is None else tuple(entered)})


def _at_slots(slots: Slots) -> str:
    return f" at {len(slots)} slots" if slots else ""


def _input(receiver: Site) -> str:
    """What an edge enters, within a node."""
    return receiver.kind if receiver.slot is None else f"{receiver.kind} @{receiver.slot}"


def _cells(edge: Edge, graph: Graph, n_heads: int) -> list[tuple[int, int]]:
    """The rows and columns of an edge in the matrix, one per head where an end has no unit, and per slot where the
    receiver has none."""
    receivers, senders = (
        [replace(site, unit=unit) for unit in range(n_heads)]
        if site.unit is None and site.kind in ("head", "q", "k", "v")
        else [site]
        for site in (edge.receiver, edge.sender)
    )
    if graph.slots and edge.receiver.slot is None and edge.receiver.kind != "out":
        receivers = [replace(site, slot=slot) for site in receivers for slot in graph.slots]
    if any(r not in graph.receiver_at for r in receivers) or any(s not in graph.sender_at for s in senders):
        depth = sum(site.kind == "mlp" for site in graph.senders)
        raise ValueError(
            f"{edge}: a tower of {depth} layers x {n_heads} heads{_at_slots(graph.slots)} has no such edge"
        )
    return [(graph.receiver_at[r], graph.sender_at[s]) for r in receivers for s in senders]


def _unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in entries]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"{twice[0]!r} stands twice in a circuit's file; keep one of them")
    return dict(entries)


def _fields(content: Any, path: str) -> dict[str, Any]:
    """The fields of a circuit from what its file says."""
    if isinstance(content, dict) and content.get("format") == OLD:
        raise ValueError(
            f"{path} was written by clip_lens 0.1, which did not record by what its metric and source are known; find "
            "the circuit again (its edges and scores can be read from the file as JSON)"
        )
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is JSON, but not a circuit that this version's Circuit.save wrote")
    try:
        n_layers, n_heads, name = content["layers"], content["heads"], str(content["name"])
        record = None if content["record"] is None else of_json(content["record"])
        selection = _selection(content["selection"])
        lines, scored = dict(content["edges"]), bool(content["scored"])
        slots = tuple(content.get("slots", ()))
        graph = Graph.of(int(n_layers), int(n_heads), slots)
        training = DataFrame(content["training"]) if "training" in content else None
        numbers = torch.tensor([float("nan") if n is None else float(n) for n in lines.values()], dtype=torch.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a circuit's file, but damaged: {type(error).__name__} {error}") from error
    cells = graph.edges.nonzero()
    at = {f"{graph.senders[s]} -> {graph.receivers[r]}": (r, s) for r, s in cells.tolist()}
    if unknown := [line for line in lines if line not in at]:
        raise ValueError(
            f"{path} names {unknown[0]!r}, which a tower of {n_layers} layers x {n_heads} heads does not have"
        )
    keep, scores = torch.zeros_like(graph.edges), torch.full(graph.edges.shape, torch.nan, dtype=torch.float64)
    if lines:
        rows, columns = zip(*(at[line] for line in lines), strict=True)
        keep[list(rows), list(columns)] = True
        scores[list(rows), list(columns)] = numbers
    return {
        "keep": keep, "n_layers": n_layers, "n_heads": n_heads, "scores": scores if scored else None, "name": name,
        "record": record, "selection": selection, "slots": slots, "training": training,
    }  # fmt: skip
