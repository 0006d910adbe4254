"""Edges as a layered diagram: a circuit, or the strongest edges of a result, from the embedding to the output."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from html import escape
from math import isnan
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
DASHES = {"q": "2px,4px", "k": "9px,5px", "v": "solid", "mlp": "14px,4px,2px,4px", "out": "24px,5px"}
"""In pixels: plotly's own dashes grow with the line's width, so that no two would look alike."""
THIN, WIDE = 1.0, 9.0  # pixels
MANY = 100  # edges of a result, unless more are asked for
FEW = 40  # edges that are seen at first; more come with the slider
STEPS = (10, 20, FEW, 80, 160)  # of the slider, before all
DEEP = 8  # blocks; of more a narrow screen has room for a head's number only, the axis tells its block
ALONG = np.linspace(0, 1, 25)  # the points of a drawn edge, each of which can be hovered
FINELY = np.linspace(0, 1, 80)  # those at which it must keep clear of nodes
BENT_AT = np.array([0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.98])  # shares of the way to the right, where it may bend most
BENDS = np.round(np.arange(-3.0, 3.01, 0.15), 2)  # lines of nodes that it may be bent by
ACROSS, CLEAR = 760, 3.0  # pixels: a diagram's width, a node's edge to an edge that passes by
ALL_HEADS = -1  # the line of a place without unit
TOP, BELOW, GAP, SLIDER = 56, 80, 100, 76  # pixels: heading, axis with legend, between two diagrams, the slider


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
    limit: float | None = None,
) -> Figure:
    """A plotly figure of a circuit's edges in the layers of the tower, as wide as their effects are large.

    Blocks run from left to right, between the embedding and the output, heads one below the other with the block's MLP,
    a square, as the last line. An edge's width is its absolute effect, blue where it is positive and supports d, red
    where it is negative and opposes it; its dashes tell what it goes into: a head's queries, keys or values, an MLP,
    the output. The 40 strongest are seen at first, a slider shows fewer or all. A click in the legend hides the edges
    of that kind; hovering tells the numbers.

    `circuit` is a `Circuit`, edges, or a result whose places are edges, of which `n`, by default 100, are drawn: those
    of the largest absolute effects. `scores` has the effects of a circuit's edges, by default its own: a result (its
    mean signed effects, a diagram for each side) or a number for each edge. Without them edges are alike, in grey.
    `limit` is the effect of the widest line, by default the largest that is drawn.

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
        return _drawn(_of_effects(circuit, MANY if n is None else n, side), layout, limit)
    edges = circuit.edges() if isinstance(circuit, Circuit) else list(circuit)
    if not edges:
        raise ValueError("no edges to draw; the circuit is empty")
    layout = _Layout.of_circuit(circuit) if isinstance(circuit, Circuit) else _Layout.of(edges)
    if isinstance(scores, Effects):
        return _drawn(_of_effects(_only(scores, edges), n, side), layout, limit)
    if side is not None:
        raise ValueError(f"side={side!r} chooses among the sides of a result; give one as scores=")
    name = circuit.name if isinstance(circuit, Circuit) else ""
    if scores is None and isinstance(circuit, Circuit) and circuit.scores is not None:
        scores = circuit.scored()
    return _drawn([_of_scores(edges, scores, n, name)], layout, limit)


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


def _drawn(parts: Sequence[Part], layout: _Layout, limit: float | None) -> Figure:
    effects = np.concatenate([part.table["effect"].to_numpy(dtype=float) for part in parts])
    largest = limit or float(np.nanmax(np.abs(effects), initial=0.0)) or 1.0
    steps = _steps(max(len(part.table) for part in parts))
    figure = _canvas(layout, [part.heading for part in parts], len(steps) > 1)
    figure.add_traces(_legend(parts))
    seen: list[Container[int]] = [set(steps)] * len(figure.data)
    for number, part in enumerate(parts, start=1):
        drawn = [*_lines(part, layout, largest, steps), *((_nodes(part.table[:n], layout), {n}) for n in steps)]
        seen += [at for _, at in drawn]
        figure.add_traces([trace for trace, _ in drawn], rows=[number] * len(drawn), cols=[1] * len(drawn))
    if len(steps) > 1:
        _sliding(figure, steps, seen)
    return carrying(figure, pd.concat([part.frame for part in parts]))


def _steps(n_edges: int) -> list[int]:
    """How many edges the slider can show; one number where they are few."""
    return [n_edges] if n_edges <= FEW else [*(step for step in STEPS if step < n_edges), n_edges]


def _sliding(figure: Figure, steps: Sequence[int], seen: Sequence[Container[int]]) -> None:
    """A slider above the diagrams: each of its steps shows the traces that are seen there."""
    visible = {step: [step in at for at in seen] for step in steps}
    for trace, at in zip(figure.data, visible[FEW], strict=True):
        trace.visible = at
    inner = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    told = {step: f"all {step}" if step == steps[-1] else str(step) for step in steps}
    figure.update_layout(
        sliders=[
            {
                "active": steps.index(FEW), "x": 0, "len": 1, "y": 1 + (TOP - 8) / inner, "yanchor": "bottom",
                "pad": {"t": 0, "b": 0, "l": 8, "r": 8}, "ticklen": 4, "minorticklen": 0, "font": {"size": SMALL},
                "bgcolor": LIGHT.gap, "activebgcolor": LIGHT.soft, "bordercolor": LIGHT.gap, "tickcolor": LIGHT.soft,
                "currentvalue": {"prefix": "strongest edges shown: ", "font": {"size": SMALL + 1}, "offset": 6},
                "steps": [
                    {"method": "restyle", "label": told[step], "args": [{"visible": visible[step]}]} for step in steps
                ],
            }
        ]
    )  # fmt: skip


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


def _canvas(layout: _Layout, headings: Sequence[str], sliding: bool) -> Figure:
    top = TOP + (SLIDER if sliding else 0)
    each = max(260, _room(layout) * (layout.bottom + 1))
    inner = each * len(headings) + GAP * (len(headings) - 1)
    figure = subplots(
        rows=len(headings), cols=1, subplot_titles=headings,
        vertical_spacing=GAP / inner if len(headings) > 1 else None,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    figure.update_xaxes(
        tickvals=[layout.ends[0], *range(layout.n_layers), layout.ends[1]],
        ticktext=["embed", *map(str, range(layout.n_layers)), "out"],
        tickfont_size=SMALL, tickangle=0, title={"standoff": 4},
        range=[layout.ends[0] - 0.6, layout.ends[1] + 0.6], showgrid=False, fixedrange=True,
        title_text="block, counted from 0",
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(layout.bottom + 1)), ticktext=layout.lines, tickfont_size=SMALL,
        range=[layout.bottom + 0.75, -0.75], fixedrange=True,
    )  # fmt: skip
    figure.update_layout(
        template=template(), height=top + inner + BELOW, margin={"t": top, "b": BELOW, "l": 10, "r": 14},
        hovermode="closest", legend=under(44, inner),
    )  # fmt: skip
    return figure


def _room(layout: _Layout) -> int:
    """Pixels between two lines of nodes."""
    return 60 if layout.bottom <= DEEP else 44


def _legend(parts: Sequence[Part]) -> list[go.Scatter]:
    """An entry for each sign and each kind of receiver that is drawn; a kind's edges go and come with a click."""
    effects = pd.concat([part.table["effect"] for part in parts])
    signs = [("supports (+)", LIGHT.positive, effects >= 0), ("opposes (-)", LIGHT.negative, effects < 0)]
    drawn = {edge.receiver.kind for part in parts for edge in part.table["edge"]}
    entries: list[tuple[str, str, str]] = [(name, colour, "solid") for name, colour, there in signs if there.any()]
    entries += [(KINDS[kind], LIGHT.soft, DASHES[kind]) for kind in KINDS if kind in drawn]
    return [
        go.Scatter(
            x=[None], y=[None], mode="lines", name=name, legendgroup=name, hoverinfo="skip",
            line={"color": colour, "width": 2, "dash": dash},
        )
        for name, colour, dash in entries
    ]  # fmt: skip


def _lines(
    part: Part, layout: _Layout, largest: float, steps: Sequence[int]
) -> list[tuple[go.Scatter, Container[int]]]:
    """The edges with the steps that show them, the weakest first, so that the strongest lie on top."""
    curves = _Curves(layout, _spots(part.table, layout))
    lines: list[tuple[go.Scatter, Container[int]]] = []
    for rank, (row, told) in enumerate(zip(part.table.itertuples(), part.told, strict=True)):
        x, y = curves.between(layout.at(row.edge.sender), layout.at(row.edge.receiver))
        line = go.Scatter(
            x=x, y=y, mode="lines", name=str(row.edge), **_look(row.effect, row.edge, largest),
            legendgroup=KINDS[row.edge.receiver.kind], showlegend=False,
            hovertemplate=f"{_name(row.edge)}{told}<extra></extra>",
        )  # fmt: skip
        lines.append((line, {step for step in steps if rank < step}))
    return lines[::-1]


def _look(effect: float, edge: Edge, largest: float) -> dict[str, Any]:
    """As wide as the effect is large, blue where it supports, red where it opposes; grey where there is none."""
    size = 0.2 if isnan(effect) else min(1.0, abs(effect) / largest)
    colour = LIGHT.soft if isnan(effect) else LIGHT.positive if effect >= 0 else LIGHT.negative
    line = {"width": THIN + (WIDE - THIN) * size, "color": colour, "dash": DASHES[edge.receiver.kind]}
    return {"opacity": 0.3 + 0.6 * size, "line": line}


class _Curves:
    """Quadratic Bezier curves between nodes, each bent so that it runs behind no other node and on no other curve.

    Edges of one line rise above it, and hang below the last line, the MLPs'; the further they run the more. The
    pixels of a page of common width stand for those of every page.
    """

    def __init__(self, layout: _Layout, nodes: Sequence[tuple[float, float]]) -> None:
        span = layout.ends[1] - layout.ends[0] + 1.2
        self.scale = np.array([ACROSS / span, _room(layout)])
        self.bottom, self.nodes = layout.bottom, np.array(nodes, dtype=float).reshape(-1, 2)
        self.radius = np.where(np.isin(self.nodes[:, 0], layout.ends), 20.0, 12.0)
        self.bent: dict[tuple[Any, Any], list[tuple[float, float]]] = {}

    def between(self, start: tuple[float, float], end: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        used = self.bent.setdefault((start, end), [])
        along, bend = self._best(start, end, used)
        used.append((along, bend))
        x, y = self._points(start, end, np.array([along]), np.array([bend]), ALONG)[0].T
        return x.astype(np.float32), y.astype(np.float32)

    def _best(self, start: Any, end: Any, used: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """How far along, and how far off the straight way, a curve bends that passes by all other nodes."""
        along, bends = (each.ravel() for each in np.meshgrid(BENT_AT, BENDS))
        free = np.array([all(abs(bend - other) > 0.2 for _, other in used) for bend in bends])
        along, bends = along[free], bends[free]
        points = self._points(start, end, along, bends, FINELY) * self.scale
        others = ~np.array([tuple(node) in (start, end) for node in self.nodes], dtype=bool)
        away = np.linalg.norm(points[:, :, None] - self.nodes[others] * self.scale, axis=-1) - self.radius[others]
        clear = away.min((1, 2), initial=np.inf)
        cost = np.abs(bends - self._wish(start, end)) + np.abs(along - 0.5) + 100.0 * np.clip(CLEAR - clear, 0, None)
        best = int(cost.argmin())
        return float(along[best]), float(bends[best])

    def _wish(self, start: Any, end: Any) -> float:
        level, far = start[1] == end[1], abs(end[0] - start[0])
        bend = min(1.4, 0.3 + 0.12 * (far if level else far > 1.5))
        return bend if level and start[1] == self.bottom else -bend

    @staticmethod
    def _points(start: Any, end: Any, along: np.ndarray, bends: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The points of curves [curve, point, axis]."""
        first, last = np.array(start), np.array(end)
        middle = first + np.stack([along, np.full(len(along), 0.5)], axis=1) * (last - first)
        middle[:, 1] += bends
        ends = np.stack([np.broadcast_to(first, middle.shape), middle, np.broadcast_to(last, middle.shape)], axis=1)
        weights = np.stack([(1 - at) ** 2, 2 * at * (1 - at), at**2], axis=1)
        return weights @ ends


def _ends(part: DataFrame) -> tuple[dict[Site, list[Any]], dict[Site, list[Any]]]:
    """The rows of the edges that each node sends, and that it receives."""
    sends, receives = ({}, {})  # type: tuple[dict[Site, list[Any]], dict[Site, list[Any]]]
    for row in part.itertuples():
        sends.setdefault(row.edge.sender, []).append(row)
        receives.setdefault(_receiving(row.edge.receiver), []).append(row)
    return sends, receives


def _spots(part: DataFrame, layout: _Layout) -> list[tuple[float, float]]:
    """Where the nodes stand that have an edge."""
    return list(dict.fromkeys(layout.at(node) for ends in _ends(part) for node in ends))


def _nodes(part: DataFrame, layout: _Layout) -> go.Scatter:
    """The nodes that have an edge, labelled, with what they send and receive in what is drawn."""
    sends, receives = _ends(part)
    nodes = list(dict.fromkeys([*sends, *receives]))
    spots = [layout.at(node) for node in nodes]
    return go.Scatter(
        x=[x for x, _ in spots], y=[y for _, y in spots], mode="markers+text", name="nodes",
        text=[_short(node, layout.deep) for node in nodes], textposition="middle center",
        textfont={"size": SMALL, "color": LIGHT.ink}, cliponaxis=False, showlegend=False,
        marker={
            "size": [40 if node.kind in ("embed", "out") else 20 if layout.deep else 24 for node in nodes],
            "symbol": ["square" if node.kind == "mlp" else "circle" for node in nodes],
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
