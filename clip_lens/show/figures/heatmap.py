"""Pictures of results: Effects -> plotly Figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

from clip_lens.core.effects import SHOWN, Effects, one_side, pivot
from clip_lens.show.figures.style import LARGE, LIGHT, scale, template

SLOT_NAMES = {
    "sot": "start of text",
    "be": "is / are",
    "subject_rest": "subject, rest",
    "stop": "full stop",
    "eot": "end of text",
}
SIDE_NAMES = {
    "caption": "negation in the caption",
    "foil": "negation in the foil",
    "none": "no negation side",
    "pooled": "both sides pooled",
}
VALUE_NAMES = {
    "fraction": "recovered fraction",
    "lower": "recovered fraction, lower bound",
    "upper": "recovered fraction, upper bound",
    "effect": "mean signed effect (metric units)",
    "effect_lower": "mean signed effect, lower bound",
    "effect_upper": "mean signed effect, upper bound",
    "n": "pairs",
    "dropped": "pairs dropped",
}
SCALE = scale(LIGHT.diverging)
GREY = LIGHT.gap
CELLS = {"xgap": 1, "ygap": 1, "hoverongaps": False}
HOVER = (  # customdata holds SHOWN
    "<br>recovered fraction <b>%{customdata[0]:.3f}</b> [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"
    "<br>mean signed effect <b>%{customdata[3]:.3f}</b> [%{customdata[4]:.3f}, %{customdata[5]:.3f}]"
    "<br>%{customdata[6]:d} pairs, %{customdata[7]:d} dropped"
)
BESIDE = 10  # columns
BELOW = 128  # pixels for the x axis' labels and title and for the colour bar


class Panel(NamedTuple):
    """A grid, mostly of one side, and, cell by cell, what hovering tells of it."""

    name: str
    grid: DataFrame
    details: dict[str, DataFrame]


def heatmap(
    effects: Effects | DataFrame,
    rows: str = "slot",
    columns: str = "layer",
    value: str = "fraction",
    side: str | None = None,
    title: str | None = None,
    *,
    limit: float | None = None,
    **how: Any,
) -> go.Figure:
    """A plotly figure of one value of the table, laid out by two columns of the index; a panel for each side.

    Colours run from -limit to limit, white at 0; without `limit` it is the largest absolute value of all panels. Cells
    are printed when they are few; hovering tells value, interval, mean signed effect and pairs. Grey cells have
    no counterpart. Edges are laid out by "sender" and "receiver", in the order of the tower; there grey is no path. For
    `resid`, layer 0 is the embedding and layer l the stream after l blocks. `effects` may be a grid, as `Effects.grid`
    gives it; `how` goes to `Effects.table`. `title=""` leaves the heading out.

    Raises:
        ValueError: as `Effects.grid`.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> figure = heatmap(toy_effects(), side="foil")
        >>> figure.data[0].z.round(3).tolist(), figure.data[0].name
        ([[1.0, 0.3], [0.0, 0.7]], 'negation in the foil')
    """
    return assemble(_panels(effects, rows, columns, value, side, how), value, effects, title=title, limit=limit)


def assemble(
    panels: Sequence[Panel],
    value: str,
    effects: Effects | DataFrame,
    *,
    title: str | None = None,
    limit: float | None = None,
) -> go.Figure:
    """One figure of panels that share their axes' meaning and their colours.

    Example:
        >>> grid = DataFrame([[1.0, -2.0]])
        >>> assemble([Panel("one", grid, {}), Panel("two", grid, {})], "effect", grid).layout.coloraxis.cmin
        -2.0
    """
    limit = limit or max((largest(panel.grid) for panel in panels), default=0.0) or 1.0
    figure, heading = _canvas(panels, title)
    for number, panel in enumerate(panels, start=1):
        _draw(figure, panel, value, {"row": number, "col": 1} if _stacked(panels) else {"row": 1, "col": number})
    _axes(figure, panels, effects)
    figure.add_annotation(
        text=value_name(value, effects), font={"size": 12}, showarrow=False, xref="paper", x=0.5, yref="paper", y=0,
        yshift=-BELOW + 4, yanchor="bottom",
    )  # fmt: skip
    figure.update_layout(
        coloraxis={"colorscale": SCALE, "cmin": -limit, "cmax": limit, "colorbar": _colour_bar(figure.layout.height)},
        title={"text": heading, "font": {"size": LARGE}} if heading else None,
        template=template(),
    )
    return figure


def value_name(value: str, effects: Effects | DataFrame | None = None) -> str:
    """A column of the table as an axis names it, with the unit of a result's metric where that is known.

    Example:
        >>> from dataclasses import replace
        >>> from clip_lens.core.effects import toy_effects
        >>> value_name("effect"), value_name("effect", replace(toy_effects(), meta={"metric": "logit"}))
        ('mean signed effect (metric units)', 'mean signed effect (logits)')
    """
    metric = effects.meta.get("metric", "") if isinstance(effects, Effects) else ""
    if metric == "attention weight" and value in ("fraction", "effect"):
        selective = "selectivity" in effects.meta.get("method", "")  # type: ignore[union-attr]
        return "mean extra attention weight" if selective else "mean attention weight"
    method = effects.meta.get("method", "") if isinstance(effects, Effects) else ""
    if value == "fraction" and method in ("direct logit attribution", "logit lens"):
        return "share of the total"
    name = VALUE_NAMES.get(value, escape(value))
    return name.replace("metric units", "logits") if metric == "logit" else name


def slot_name(slot: str | int | None) -> str:
    """A token slot as an axis or a sentence names it.

    Example:
        >>> slot_name("eot"), slot_name(3), slot_name(None)
        ('end of text', 'position 3', 'all tokens')
    """
    if slot is None or slot is pd.NA:
        return "all tokens"
    return SLOT_NAMES.get(slot, slot) if isinstance(slot, str) else f"position {slot}"


def largest(grid: DataFrame) -> float:
    """The largest absolute value of a grid: the limit of its colours; 0 where there is none.

    Example:
        >>> largest(DataFrame([[-2.0, 1.0, float("nan")]]))
        2.0
    """
    numbers = np.abs(grid.to_numpy(dtype=float))
    return float(numbers[~np.isnan(numbers)].max(initial=0.0))


def _panels(
    effects: Effects | DataFrame, rows: str, columns: str, value: str, side: str | None, how: dict[str, Any]
) -> list[Panel]:
    if isinstance(effects, DataFrame):
        return [Panel("", effects, {})]
    table, ends = effects.table(**how), effects.ends()
    panels = []
    for name in dict.fromkeys(table["side"]) if side is None else [side]:
        chosen = one_side(table, name)
        details = {found: pivot(chosen, rows, columns, found, ends) for found in SHOWN}
        panels.append(Panel(name, pivot(chosen, rows, columns, value, ends), details))
    return panels


def _stacked(panels: Sequence[Panel]) -> bool:
    """Panels stand side by side only where numbers in their cells stay readable on a narrow screen."""
    return sum(panel.grid.shape[1] for panel in panels) > BESIDE


def _canvas(panels: Sequence[Panel], title: str | None) -> tuple[go.Figure, str]:
    """An empty figure whose height follows from the rows, and its heading."""
    n_rows = max(len(panel.grid) for panel in panels)
    several, stacked = len(panels) > 1, _stacked(panels)
    heading = title if title is not None else ("" if several else _describe(panels[0], ", "))
    cell = 30 if n_rows <= 12 else max(15, 24 - n_rows // 8)
    inner, gap = min(max(n_rows, 2) * cell, 1100), 118  # labels turned upright, a title and a note fit into the gap
    top = (44 if heading else 12) + (34 if several else 0)
    down = len(panels) if stacked else 1
    height = top + inner * down + gap * (down - 1) + BELOW
    figure = make_subplots(
        rows=down,
        cols=1 if stacked else len(panels),
        subplot_titles=[_describe(panel, "<br>") for panel in panels] if several else None,
        horizontal_spacing=0.05,
        vertical_spacing=gap / (height - top - BELOW) if down > 1 else None,
        shared_yaxes=not stacked,
    )
    figure.update_annotations(font_size=13)
    figure.update_layout(height=height, margin={"t": top, "b": BELOW, "l": 10, "r": 14})
    return figure, heading


def _describe(panel: Panel, between: str) -> str:
    """What a panel shows and on how many pairs."""
    if not panel.details:
        return escape(panel.name)
    counts = panel.details["n"].to_numpy()
    counts = counts[counts > 0]
    low, high = (int(counts.min()), int(counts.max())) if counts.size else (0, 0)
    pairs = f"n = {high} pairs" if low == high else f"n = {low} to {high} pairs"
    return f"{SIDE_NAMES.get(panel.name, panel.name)}{between}{pairs}"


def _draw(figure: go.Figure, panel: Panel, value: str, where: dict[str, int]) -> None:
    """A panel's cells, and over the gaps a second, grey trace: a place without a counterpart is not a 0."""
    grid = panel.grid.to_numpy(dtype=float)
    gaps = np.isnan(grid)
    printed = grid.shape[0] <= 24 and grid.shape[1] <= 14
    spot, details = _spot(panel.grid, printed), None
    if panel.details:
        details = np.stack([panel.details[name].to_numpy(dtype=float) for name in SHOWN], -1).astype(np.float32)
    figure.add_heatmap(
        z=grid,
        text=[[_number(cell, value) for cell in line] for line in grid] if printed else _spots(panel.grid),
        texttemplate="%{text}" if printed else None,
        coloraxis="coloraxis",
        name=SIDE_NAMES.get(panel.name, panel.name),
        customdata=details,
        hovertemplate=spot + (HOVER if panel.details else "<br>%{z:.3f}") + "<extra></extra>",
        **CELLS,
        **where,
    )
    if gaps.any():
        figure.add_heatmap(
            z=np.where(gaps, 0.0, np.nan),
            text=None if printed else _spots(panel.grid),
            colorscale=[[0, GREY], [1, GREY]],
            showscale=False,
            name=_gap(panel.grid),
            hovertemplate=f"{spot}<br>{_gap(panel.grid)}<extra></extra>",
            **CELLS,
            **where,
        )


def _gap(grid: DataFrame) -> str:
    """What a grey cell is: among senders and receivers mostly two that no edge joins."""
    return "no path" if {grid.index.name, grid.columns.name} & {"sender", "receiver"} else "no counterpart"


def _spot(grid: DataFrame, printed: bool) -> str:
    """The hover's first line: the ticks' labels, or the cell's own text where there are too many ticks to show."""
    return f"{escape(str(grid.index.name))} %{{y}}, {escape(str(grid.columns.name))} %{{x}}" if printed else "%{text}"


def _spots(grid: DataFrame) -> list[list[str]]:
    row, column = escape(str(grid.index.name)), escape(str(grid.columns.name))
    across = [f"{column} {_label(column, entry)}" for entry in grid.columns]
    return [[f"{row} {_label(row, entry)}, {name}" for name in across] for entry in grid.index]


def _number(cell: float, value: str) -> str:
    if np.isnan(cell):
        return ""
    return f"{cell:.0f}" if value in ("n", "dropped") else f"{cell:.2f}".replace("-0.00", "0.00")


def _axes(figure: go.Figure, panels: Sequence[Panel], effects: Effects | DataFrame) -> None:
    """Rows from top to bottom, labels of at least 11 pixels that don't overlap, the axes' meaning in words."""
    grid = panels[0].grid
    across, down = str(grid.columns.name), str(grid.index.name)
    kinds = set() if isinstance(effects, DataFrame) else set(effects.index["kind"])
    room = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    gap = any(panel.grid.isna().any(axis=None) for panel in panels)
    note = f"<br><span style='font-size:11px'>grey: {_gap(grid)}</span>" if gap else ""
    figure.update_xaxes(
        **_ticks(across, list(grid.columns), 26),
        title={"text": _axis_name(across, kinds, len(panels) > 1) + note, "font": {"size": 12}, "standoff": 6},
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        **_ticks(down, list(grid.index), max(1, int(room // 14))),
        range=[len(grid) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    title = {"text": _axis_name(down, kinds, False), "font": {"size": 12}, "standoff": 6}
    figure.update_yaxes(title=title, col=1)


def _ticks(name: str, labels: list[Any], most: int) -> dict[str, Any]:
    shown = range(0, len(labels), max(1, ceil(len(labels) / most)))
    texts = [_label(name, labels[number]) for number in shown]
    return {"tickvals": list(shown), "ticktext": texts, "tickfont": {"size": 12}, "ticklabelstandoff": 3}


def _label(name: str, entry: Any) -> str:
    if name == "slot":
        return escape(slot_name(entry), quote=False)
    return "all" if entry is None else escape(str(entry), quote=False)


def _axis_name(name: str, kinds: set[Any], short: bool) -> str:
    if name == "layer" and kinds:
        if kinds != {"resid"}:
            return "block, counted from 0"
        return "layer (0: embedding)" if short else "layer (0: embedding, l: after l blocks)"
    if name == "unit":
        return "neuron" if kinds == {"neuron"} else "head"
    return "" if name in ("slot", "place") else escape(name)


def _colour_bar(height: int) -> dict[str, Any]:
    """A flat bar at the figure's foot: beside the cells it would take a fifth of a narrow screen.

    Its title is an annotation, since plotly puts a flat bar's own title over the bar or below the figure's edge.
    """
    return {
        "orientation": "h",
        "thickness": 10,
        "ypad": 0,
        "len": 0.7,
        "x": 0.5,
        "yref": "container",
        "y": 54 / height,
        "yanchor": "top",
        "tickfont": {"size": 11},
        "outlinewidth": 0,
    }
