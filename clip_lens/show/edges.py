"""Pictures of edges: what heads read through q, k and v, and the strongest paths through the tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

from clip_lens.core.effects import SHOWN, SIDES, Effects, one_side, pivot
from clip_lens.model.site import Edge, Site, label
from clip_lens.show.plots import GREY, HOVER, INK, SIDE_NAMES, Panel, assemble, slot_name

READS = {"q": "queries", "k": "keys", "v": "values"}
DASHES = {"q": "dot", "k": "dash"}  # values, MLPs and the output are solid
POSITIVE, NEGATIVE = "#2166ac", "#b2182b"  # the ends of plots.SCALE
THIN, WIDE = 1.0, 9.0  # pixels
FEW = 40  # edges; of more the widest is thinner, so that they don't cover each other
DEEP = 8  # blocks; of more a narrow screen has room for a head's number only, the axis tells its block
ALONG = np.linspace(0, 1, 25)  # the points of a drawn edge, each of which can be hovered
ALL_HEADS = -1  # the line of a place without unit


def qkv(effects: Effects, value: str = "effect", side: str | None = None, **how: Any) -> go.Figure:
    """A plotly figure of edges into heads: senders by receiving heads, a panel each for q, k and v, on one scale.

    Both axes run in the order of the tower; grey cells are no path. Edges into MLPs and the output are left out. `how`
    goes to `Effects.table`.

    Raises:
        ValueError: a place is not a single edge, no edge ends in a head, several edges (at several slots) fall in one
            cell, or as `Effects.grid`.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> edges = tuple(Edge(Site("embed"), Site(kind, 0, head)) for kind in "qk" for head in (0, 1))
        >>> figure = qkv(replace(toy_effects(), places=edges), side="foil")
        >>> [(panel.name, panel.z.tolist()) for panel in figure.data if panel.name != "no path"]
        [('queries; negation in the foil', [[2.5, 0.0]]), ('keys; negation in the foil', [[0.75, 1.75]])]
    """
    edges = single_edges(effects)
    heads = {
        edge: f"{edge.receiver.layer}.{'all' if edge.receiver.unit is None else edge.receiver.unit}" for edge in edges
    }
    read = [edge for edge in edges if edge.receiver.kind in READS]
    if not read:
        raise ValueError(f"no edge ends in the q, k or v of a head, only in {_some(e.receiver.kind for e in edges)}")
    table = effects.table(**how)
    rows = pd.Series([heads[edge] for edge in edges])
    kinds = pd.Series([edge.receiver.kind for edge in edges])
    order = {**effects.ends(), "receiving head": _in_order(heads[edge] for edge in sorted(read, key=_receiver))}
    panels = []
    for name in dict.fromkeys(table["side"]) if side is None else [side]:
        part = one_side(table, name).assign(**{"receiving head": rows.to_numpy()})
        panels += _readers(part, kinds.to_numpy(), value, name, order)
    return assemble(panels, value, effects, title="")


def _readers(part: DataFrame, kinds: Any, value: str, side: str, order: dict[str, list[str]]) -> list[Panel]:
    """A side's panels; those that lack a sender or a head have a grey line there, so that all are laid out alike."""
    panels = []
    everything = part[pd.Series(kinds).isin(list(READS)).to_numpy()]
    senders = [name for name in order["sender"] if name in set(everything["sender"])]
    for kind in (kind for kind in READS if kind in kinds):
        lines = part[kinds == kind]

        def grid(found: str, lines: DataFrame = lines) -> DataFrame:
            cells = pivot(lines, "sender", "receiving head", found, order)
            return cells.reindex(
                index=pd.Index(senders, name="sender"), columns=pd.Index(order["receiving head"], name="receiving head")
            )

        name = f"{READS[kind]}; {SIDE_NAMES.get(side, side)}"
        panels.append(Panel(name, grid(value), {found: grid(found) for found in SHOWN}))
    return panels


def path_diagram(effects: Effects, n: int = 30, side: str | None = None) -> go.Figure:
    """A plotly figure of the n edges of the largest absolute mean signed effect; a diagram for each side.

    Blocks run from left to right, between the embedding and the output, heads one below the other with the block's MLP
    as the last line. An edge's width is its absolute mean signed effect, blue where that is positive, red where it is
    negative; into a head, queries are dotted, keys dashed, values solid. Hovering tells effect, share and pairs.

    Raises:
        ValueError: a place is not a single edge, n is not positive, or no such side.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> edges = tuple(Edge(Site("embed"), Site("v", 0, head)) for head in range(4))
        >>> figure = path_diagram(replace(toy_effects(), places=edges), n=2, side="foil")
        >>> [trace.name for trace in figure.data if trace.mode == "lines"]
        ['embed -> v 0.3', 'embed -> v 0.0']
    """
    if n < 1:
        raise ValueError(f"n is the number of edges to draw, at least 1. Got {n}")
    single_edges(effects)
    one_side(effects.fraction(), side) if side is not None else None
    sides = [name for name in SIDES if name in set(effects.pairs["side"])] if side is None else [side]
    drawn = [strongest(effects, n, name) for name in sides]
    layout = _Layout.of(effects.places)  # type: ignore[arg-type]
    largest = max((abs(row.effect) for part in drawn for row in part.itertuples()), default=0.0) or 1.0
    headings = [
        f"{SIDE_NAMES[name]}<br>the {len(part)} largest of {len(effects.places)} effects"
        for name, part in zip(sides, drawn, strict=True)
    ]
    figure = _canvas(layout, headings)
    for number, part in enumerate(drawn, start=1):
        for trace in [*_lines(part, layout, largest), _nodes(part, layout)]:
            figure.add_trace(trace, row=number, col=1)
    return figure


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
    chosen = effects.where(side=side)
    sizes = chosen.fraction()["effect"].abs().dropna().sort_values(ascending=False, kind="stable")
    rows = sizes.index[:n].tolist()
    places = tuple(effects.places[row] for row in rows)
    table = replace(chosen, values=chosen.values[rows], places=places).table()
    return table.assign(edge=pd.Series(places, dtype=object))


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

    @property
    def bottom(self) -> int:
        """The MLPs' line."""
        return len(self.units)

    def at(self, site: Site) -> tuple[float, float]:
        if site.kind in ("embed", "out"):
            return -1.0 if site.kind == "embed" else float(self.n_layers), self.bottom / 2
        if site.kind == "mlp":
            return site.layer + 0.45, float(self.bottom)
        return float(site.layer), float(self.units.index(ALL_HEADS if site.unit is None else site.unit))

    @property
    def lines(self) -> list[str]:
        return [*("all heads" if unit == ALL_HEADS else f"head {unit}" for unit in self.units), "MLP"]


def _canvas(layout: _Layout, headings: Sequence[str]) -> go.Figure:
    each, gap, top, below = max(260, 30 * (layout.bottom + 1)), 100, 56, 92
    height = top + below + each * len(headings) + gap * (len(headings) - 1)
    figure = make_subplots(
        rows=len(headings), cols=1, subplot_titles=headings,
        vertical_spacing=gap / (height - top - below) if len(headings) > 1 else None,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    figure.update_xaxes(
        tickvals=list(range(layout.n_layers)), tickfont_size=11, tickangle=0,
        range=[-1.5, layout.n_layers + 0.5], showgrid=False, zeroline=False, fixedrange=True,
        title={"text": "block, counted from 0", "font": {"size": 12}, "standoff": 4},
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(layout.bottom + 1)), ticktext=layout.lines, tickfont_size=11,
        range=[layout.bottom + 0.6, -0.6], gridcolor="#f0f0f0", zeroline=False, automargin=True, fixedrange=True,
    )  # fmt: skip
    figure.add_annotation(
        text="blue: positive effect, red: negative<br>into heads: queries dotted, keys dashed, values solid",
        font={"size": 11}, showarrow=False, xref="paper", x=0.5, yref="paper", y=0, yshift=-below + 4, yanchor="bottom",
    )  # fmt: skip
    figure.update_layout(
        height=height, margin={"t": top, "b": below, "l": 10, "r": 14}, showlegend=False, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", autosize=True,
        font={"size": 12, "color": INK, "family": "system-ui, sans-serif"},
        hoverlabel={"font": {"size": 13}, "align": "left"},
    )  # fmt: skip
    return figure


def _lines(part: DataFrame, layout: _Layout, largest: float) -> list[go.Scatter]:
    """The edges, the weakest first, so that the strongest lie on top; edges between the same two nodes fan out."""
    widest = WIDE * min(1.0, sqrt(FEW / max(1, len(part))))
    between: Counter[tuple[Any, Any]] = Counter()
    lines = []
    for row in part.itertuples():
        ends = layout.at(row.edge.sender), layout.at(row.edge.receiver)
        x, y = _curve(*ends, between[ends])
        between[ends] += 1
        numbers, size = [getattr(row, name) for name in SHOWN], abs(row.effect) / largest
        lines.append(
            go.Scatter(
                x=x, y=y, mode="lines", name=str(row.edge), opacity=0.4 + 0.45 * size,
                line={
                    "width": THIN + (widest - THIN) * size,
                    "color": POSITIVE if row.effect >= 0 else NEGATIVE,
                    "dash": DASHES.get(row.edge.receiver.kind, "solid"),
                },
                customdata=np.tile(np.array(numbers, dtype=np.float32), (len(x), 1)),
                hovertemplate=f"{_name(row.edge)}{HOVER}<extra></extra>",
            )
        )  # fmt: skip
    return lines[::-1]


def _curve(start: tuple[float, float], end: tuple[float, float], number: int) -> tuple[np.ndarray, np.ndarray]:
    """A quadratic Bezier curve, bent out of the line of nodes that it would run through; further ones bend more."""
    bend = 0.35 + 0.12 * (abs(end[0] - start[0]) > 1.5)
    bend = (bend + 0.35 * ((number + 1) // 2)) * (-1 if number % 2 == 0 else 1)
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + bend
    weights = (1 - ALONG) ** 2, 2 * ALONG * (1 - ALONG), ALONG**2
    x, y = np.array([start, middle, end]).T @ np.stack(weights)
    return x, y


def _nodes(part: DataFrame, layout: _Layout) -> go.Scatter:
    """The nodes that have an edge, labelled, with what they send and receive in what is drawn."""
    sends, receives = ({}, {})  # type: tuple[dict[Site, list[Any]], dict[Site, list[Any]]]
    for row in part.itertuples():
        sends.setdefault(row.edge.sender, []).append(row)
        receives.setdefault(_reader(row.edge.receiver), []).append(row)
    nodes = list(dict.fromkeys([*sends, *receives]))
    spots = [layout.at(node) for node in nodes]
    return go.Scatter(
        x=[x for x, _ in spots], y=[y for _, y in spots], mode="markers+text", name="nodes",
        text=[_short(node, layout.n_layers > DEEP) for node in nodes],
        textposition=["top center" if node.kind in ("embed", "out") else "middle center" for node in nodes],
        textfont={"size": 11, "color": INK}, cliponaxis=False,
        marker={"size": 20 if layout.n_layers > DEEP else 24, "color": "white", "line": {"width": 1, "color": GREY}},
        customdata=[[_told("sends", sends.get(node)), _told("receives", receives.get(node))] for node in nodes],
        hovertext=[str(node) for node in nodes],
        hovertemplate="<b>%{hovertext}</b>%{customdata[0]}%{customdata[1]}<extra></extra>",
    )  # fmt: skip


def _reader(receiver: Site) -> Site:
    """The node that an edge ends in: a head for its q, k and v."""
    return replace(receiver, kind="head" if receiver.kind in READS else receiver.kind, slot=None)


def _told(verb: str, rows: list[Any] | None) -> str:
    if not rows:
        return ""
    effect, share = (sum(getattr(row, name) for row in rows) for name in ("effect", "fraction"))
    n, edges = max(row.n for row in rows), "1 drawn edge" if len(rows) == 1 else f"{len(rows)} drawn edges"
    return f"<br>{verb} {effect:.3f} in {edges}, recovered fraction {share:.3f}, {n} pairs"


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


def _receiver(edge: Edge) -> tuple[int, int]:
    return edge.receiver.layer, -1 if edge.receiver.unit is None else edge.receiver.unit


def _in_order(entries: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(entries))


def _some(entries: Iterable[str]) -> str:
    return ", ".join(sorted(set(entries)))
