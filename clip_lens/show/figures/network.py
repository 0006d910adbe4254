"""Edges as a layered diagram: a circuit, or the strongest edges of a result, from the embedding to the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from html import escape
from math import isnan, sqrt
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.grid import one_side
from clip_lens.core.table import SIDES
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.model.site import Edge, Site, label
from clip_lens.show.figures.figure import Figure, carrying, subplots
from clip_lens.show.figures.style import LIGHT, SMALL, template, under
from clip_lens.show.figures.words import bold, hovers, shown, side_name, slot_name
from clip_lens.words import counted

READS = {"q": "queries", "k": "keys", "v": "values"}
KINDS = {**READS, "mlp": "into MLPs", "out": "into the output"}
DASHES = {"q": "dot", "k": "dash", "mlp": "solid", "out": "solid"}  # the rest is solid
THIN, WIDE = 1.0, 9.0  # pixels
MANY = 100  # edges of a result, unless more are asked for
FEW = 40  # edges; of more the widest is thinner, so that they don't cover each other
DEEP = 8  # blocks; of more a narrow screen has room for a head's number only, the axis tells its block
ALONG = np.linspace(0, 1, 25)  # the points of a drawn edge, each of which can be hovered
ALL_HEADS = -1  # the line of a place without unit
TOP, BELOW, GAP = 56, 80, 100  # pixels: the heading, the axis with the legend, between two diagrams


class Part(NamedTuple):
    """One diagram: its edges, a row each with `edge` and `effect`, what hovering tells of each, and the table that it
    shows."""

    heading: str
    table: DataFrame
    told: list[str]
    frame: DataFrame


def network(
    circuit: Effects | Circuit | Sequence[Edge],
    scores: Effects | Mapping[Edge, float] | None = None,
    *,
    n: int | None = None,
    side: str | None = None,
) -> Figure:
    """A plotly figure of a circuit's edges in the layers of the tower, as wide as their effects are large.

    Blocks run from left to right, between the embedding and the output, heads one below the other with the block's MLP
    as the last line. An edge's width is its absolute effect, blue where it is positive and supports d, red where it is
    negative and opposes it; into a head, queries are dotted, keys dashed, values solid. A click in the legend hides the
    edges of that kind; hovering tells the numbers.

    `circuit` is a `Circuit`, edges, or a result whose places are edges, of which `n`, by default 100, are drawn: those
    of the largest absolute effects. `scores` has the effects of a circuit's edges, by default its own: a result (its
    mean signed effects, a diagram for each side) or a number for each edge. Without them edges are alike, in grey.

    Raises:
        ValueError: no edges, a place is not a single edge, edges that have no score, n is not positive, n without
            scores, or no such side.

    Example:
        >>> edges = [Edge(Site("embed"), Site("v", 0, 1)), Edge(Site("head", 0, 1), Site("out"))]
        >>> figure = network(edges, {edges[0]: 0.5, edges[1]: -1.0})
        >>> [(trace.name, trace.line.width) for trace in figure.data if trace.name in set(figure.frame["edge"])]
        [('embed -> v 0.1', 5.0), ('head 0.1 -> out', 9.0)]
    """
    if n is not None and n < 1:
        raise ValueError(f"n is the number of edges to draw, at least 1. Got {n}")
    if isinstance(circuit, Effects):
        layout = _Layout.of(single_edges(circuit))
        return _drawn(_of_effects(circuit, MANY if n is None else n, side), layout)
    edges = circuit.edges() if isinstance(circuit, Circuit) else list(circuit)
    if not edges:
        raise ValueError("no edges to draw; the circuit is empty")
    layout = _Layout.of_circuit(circuit) if isinstance(circuit, Circuit) else _Layout.of(edges)
    if isinstance(scores, Effects):
        return _drawn(_of_effects(_only(scores, edges), n, side), layout)
    if side is not None:
        raise ValueError(f"side={side!r} chooses among the sides of a result; give one as scores=")
    name = circuit.name if isinstance(circuit, Circuit) else ""
    if scores is None and isinstance(circuit, Circuit) and circuit.scores is not None:
        scores = circuit.scored()
    return _drawn([_of_scores(edges, scores, n, name)], layout)


def _of_effects(effects: Effects, n: int | None, side: str | None) -> list[Part]:
    fractions = effects.fraction()
    one_side(fractions, side) if side is not None else None
    sides = [name for name in SIDES if name in set(fractions["side"])] if side is None else [side]
    parts = []
    for name in sides:
        table = strongest(effects, len(effects.places) if n is None else n, name)
        count = _count(len(table), len(effects.places), "effects")
        frame = table[["place", "side", *shown(effects)]]
        label = side_name(name, sides)
        parts.append(Part(f"{label}<br>{count}" if label else count, table, hovers(table, effects), frame))
    return parts


def _count(drawn: int, there: int, what: str) -> str:
    return counted(there, "edge") if drawn == there else f"the {drawn} largest of {there} {what}"


def _only(effects: Effects, edges: Sequence[Edge]) -> Effects:
    """The part of a result that has a circuit's edges."""
    _scored(edges, set(single_edges(effects)))
    return effects.where(place=[str(edge) for edge in edges])


def _of_scores(edges: Sequence[Edge], scores: Mapping[Edge, float] | None, n: int | None, name: str) -> Part:
    if scores is None and n is not None:
        raise ValueError(f"n={n} takes the edges of the largest effects; give scores= to choose by")
    _scored(edges, edges if scores is None else scores)
    effects = [float("nan") if scores is None else float(scores[edge]) for edge in edges]
    table = DataFrame({"edge": pd.Series(list(edges), dtype=object), "effect": effects})
    order = table["effect"].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:n]
    count = _count(len(order), len(edges), "edges")
    table = table.loc[order].reset_index(drop=True)
    frame = DataFrame({"edge": table["edge"].map(str), **({} if scores is None else {"score": table["effect"]})})
    told = ["" if scores is None else f"<br>score <b>{score:.4f}</b>" for score in table["effect"]]
    return Part(f"{escape(name)}<br>{count}" if name else count, table, told, frame)


def _scored(edges: Sequence[Edge], scores: Container[Edge]) -> None:
    missing = [edge for edge in edges if edge not in scores]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(edges)} edges have no score, such as {missing[0]}; give one for every edge drawn"
        )


def _drawn(parts: Sequence[Part], layout: _Layout) -> Figure:
    effects = np.concatenate([part.table["effect"].to_numpy(dtype=float) for part in parts])
    largest = float(np.nanmax(np.abs(effects), initial=0.0)) or 1.0
    figure = _canvas(layout, [part.heading for part in parts], max(len(part.table) for part in parts))
    figure.add_traces(_legend(parts))
    for number, part in enumerate(parts, start=1):
        for trace in [*_lines(part, layout, largest), _nodes(part.table, layout)]:
            figure.add_trace(trace, row=number, col=1)
    return carrying(figure, pd.concat([part.frame for part in parts]))


def single_edges(effects: Effects) -> list[Edge]:
    """The places of a result, all of which are single edges.

    Raises:
        ValueError: some are not; the message names one.
    """
    others = [place for place in effects.places if not isinstance(place, Edge)]
    if others:
        raise ValueError(
            f"{len(others)} of {len(effects.places)} places are no single edges, such as {label(others[0])}; "
            "path_effects and encoder.edges() give edges, heatmap draws sites"
        )
    return list(effects.places)  # type: ignore[arg-type]


def strongest(effects: Effects, n: int, side: str) -> DataFrame:
    """The rows of `Effects.table` of the n largest absolute mean signed effects of a side, with their `edge`."""
    table = effects.where(side=side).top(n).dropna(subset="effect")
    edges = dict(zip(effects.index["place"], effects.places, strict=True))
    return table.assign(edge=table["place"].map(edges))


class _Layout(NamedTuple):
    """Where nodes are: blocks across, heads down, then the MLPs' line; embedding and output at half height."""

    n_layers: int
    units: tuple[int, ...]

    @classmethod
    def of(cls, edges: Sequence[Edge]) -> _Layout:
        ends = [site for edge in edges for site in (edge.sender, edge.receiver)]
        units = {
            ALL_HEADS if site.unit is None else site.unit for site in ends if site.kind not in ("embed", "mlp", "out")
        }
        layers = [site.layer for site in ends if site.kind not in ("embed", "out")]
        heads = range(max(units) + 1) if units and max(units) >= 0 else ()
        return cls(1 + max(layers, default=0), tuple(sorted({*heads, *units})))

    @classmethod
    def of_circuit(cls, circuit: Circuit) -> _Layout:
        """All heads of the tower, so that its circuits are laid out alike."""
        return cls(circuit.n_layers, tuple(range(circuit.n_heads)))

    @property
    def deep(self) -> bool:
        return self.n_layers > DEEP

    @property
    def ends(self) -> tuple[float, float]:
        """Where embedding and output stand: further off where blocks are close to each other."""
        return (-1.6, self.n_layers + 0.6) if self.deep else (-1.2, self.n_layers + 0.2)

    @property
    def bottom(self) -> int:
        """The MLPs' line."""
        return len(self.units)

    def at(self, site: Site) -> tuple[float, float]:
        if site.kind in ("embed", "out"):
            return self.ends[site.kind == "out"], self.bottom / 2
        if site.kind == "mlp":
            return site.layer + 0.45, float(self.bottom)
        return float(site.layer), float(self.units.index(ALL_HEADS if site.unit is None else site.unit))

    @property
    def lines(self) -> list[str]:
        return [*("all heads" if unit == ALL_HEADS else f"head {unit}" for unit in self.units), "MLP"]


def _canvas(layout: _Layout, headings: Sequence[str], n_edges: int) -> Figure:
    room = 30 if n_edges <= FEW else 45 if n_edges <= 3 * FEW else 90 if layout.bottom <= DEEP else 60
    each = max(260, room * (layout.bottom + 1))  # more edges need more room between the heads
    inner = each * len(headings) + GAP * (len(headings) - 1)
    figure = subplots(
        rows=len(headings), cols=1, subplot_titles=headings,
        vertical_spacing=GAP / inner if len(headings) > 1 else None,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    figure.update_xaxes(
        tickvals=list(range(layout.n_layers)), tickfont_size=SMALL, tickangle=0, title={"standoff": 4},
        range=[layout.ends[0] - 0.6, layout.ends[1] + 0.6], showgrid=False, fixedrange=True,
        title_text="block, counted from 0",
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(layout.bottom + 1)), ticktext=layout.lines, tickfont_size=SMALL,
        range=[layout.bottom + 0.75, -0.75], fixedrange=True,
    )  # fmt: skip
    figure.update_layout(
        template=template(), height=TOP + inner + BELOW, margin={"t": TOP, "b": BELOW, "l": 10, "r": 14},
        hovermode="closest", legend=under(44, inner),
    )  # fmt: skip
    return figure


def _legend(parts: Sequence[Part]) -> list[go.Scatter]:
    """An entry for each sign and each kind of receiver that is drawn; a kind's edges go and come with a click."""
    effects = pd.concat([part.table["effect"] for part in parts])
    signs = [("supports (+)", LIGHT.positive, effects >= 0), ("opposes (-)", LIGHT.negative, effects < 0)]
    drawn = {edge.receiver.kind for part in parts for edge in part.table["edge"]}
    entries: list[tuple[str, str, str]] = [(name, colour, "solid") for name, colour, there in signs if there.any()]
    entries += [(KINDS[kind], LIGHT.soft, DASHES.get(kind, "solid")) for kind in KINDS if kind in drawn]
    return [
        go.Scatter(
            x=[None], y=[None], mode="lines", name=name, legendgroup=name, hoverinfo="skip",
            line={"color": colour, "width": 2, "dash": dash},
        )
        for name, colour, dash in entries
    ]  # fmt: skip


def _lines(part: Part, layout: _Layout, largest: float) -> list[go.Scatter]:
    """The edges, the weakest first, so that the strongest lie on top; edges between the same two nodes fan out."""
    widest = max(THIN, WIDE * min(1.0, sqrt(FEW / max(1, len(part.table)))))
    between: Counter[tuple[Any, Any]] = Counter()
    lines = []
    for row, told in zip(part.table.itertuples(), part.told, strict=True):
        ends = layout.at(row.edge.sender), layout.at(row.edge.receiver)
        x, y = _curve(*ends, between[ends], layout.bottom)
        between[ends] += 1
        lines.append(
            go.Scatter(
                x=x, y=y, mode="lines", name=str(row.edge), **_look(row.effect, row.edge, largest, widest),
                legendgroup=KINDS[row.edge.receiver.kind], showlegend=False,
                hovertemplate=f"{_name(row.edge)}{told}<extra></extra>",
            )
        )  # fmt: skip
    return lines[::-1]


def _look(effect: float, edge: Edge, largest: float, widest: float) -> dict[str, Any]:
    """As wide as the effect is large, blue where it supports, red where it opposes; grey where there is none."""
    size = 0.2 if isnan(effect) else abs(effect) / largest
    colour = LIGHT.soft if isnan(effect) else LIGHT.positive if effect >= 0 else LIGHT.negative
    dash = DASHES.get(edge.receiver.kind, "solid")
    return {
        "opacity": 0.3 + 0.6 * size, "line": {"width": THIN + (widest - THIN) * size, "color": colour, "dash": dash}
    }  # fmt: skip


def _curve(
    start: tuple[float, float], end: tuple[float, float], number: int, bottom: int
) -> tuple[np.ndarray, np.ndarray]:
    """A quadratic Bezier curve, bent out of the line of nodes that it would run through; further ones bend more.

    Among MLPs, the last line, edges hang below it, elsewhere they rise; the further they run the more, so that those
    of one line lie in each other.
    """
    level, far = start[1] == end[1], abs(end[0] - start[0]) > 1.5
    bend = 0.3 + (0.12 * abs(end[0] - start[0]) if level else 0.12 * far)
    bend = min(1.4, bend) + 0.35 * ((number + 1) // 2)
    down = level and start[1] == bottom
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + bend * (1 if down == (number % 2 == 0) else -1)
    weights = (1 - ALONG) ** 2, 2 * ALONG * (1 - ALONG), ALONG**2
    x, y = np.array([start, middle, end]).T @ np.stack(weights)
    return x.astype(np.float32), y.astype(np.float32)


def _nodes(part: DataFrame, layout: _Layout) -> go.Scatter:
    """The nodes that have an edge, labelled, with what they send and receive in what is drawn."""
    sends, receives = ({}, {})  # type: tuple[dict[Site, list[Any]], dict[Site, list[Any]]]
    for row in part.itertuples():
        sends.setdefault(row.edge.sender, []).append(row)
        receives.setdefault(_receiving(row.edge.receiver), []).append(row)
    nodes = list(dict.fromkeys([*sends, *receives]))
    spots = [layout.at(node) for node in nodes]
    return go.Scatter(
        x=[x for x, _ in spots], y=[y for _, y in spots], mode="markers+text", name="nodes",
        text=[_short(node, layout.deep) for node in nodes], textposition="middle center",
        textfont={"size": SMALL, "color": LIGHT.ink}, cliponaxis=False, showlegend=False,
        marker={
            "size": [40 if node.kind in ("embed", "out") else 20 if layout.deep else 24 for node in nodes],
            "color": LIGHT.fill, "line": {"width": 1, "color": LIGHT.soft}, "opacity": 1,
        },
        customdata=[[_told("sends", sends.get(node)), _told("receives", receives.get(node))] for node in nodes],
        hovertext=[str(node) for node in nodes],
        hovertemplate="<b>%{hovertext}</b>%{customdata[0]}%{customdata[1]}<extra></extra>",
    )  # fmt: skip


def _receiving(receiver: Site) -> Site:
    """The node that receives an edge: a head for its q, k and v."""
    return replace(receiver, kind="head" if receiver.kind in READS else receiver.kind, slot=None)


def _told(verb: str, rows: list[Any] | None) -> str:
    if not rows:
        return ""
    edges, effect = counted(len(rows), "drawn edge"), sum(row.effect for row in rows)
    return f"<br>{verb} in {edges}" if isnan(effect) else f"<br>{verb} {bold(effect)} in {edges}"


def _short(node: Site, deep: bool) -> str:
    """A node's label inside of its circle."""
    if node.kind in ("embed", "out"):
        return node.kind
    if node.kind == "mlp":
        return "m" if deep else f"m{node.layer}"
    unit = "all" if node.unit is None else str(node.unit)
    return unit if deep else f"{node.layer}.{unit}"


def _name(edge: Edge) -> str:
    """An edge for hovering; a slot comes from data and may hold markup."""
    slot = edge.receiver.slot
    plain = Edge(edge.sender, replace(edge.receiver, slot=None))
    return escape(f"{plain}" + ("" if slot is None else f" at {slot_name(slot)}"))
