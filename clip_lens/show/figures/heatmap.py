"""Heat maps: one value of a result, laid out by two columns of its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.grid import axes_of, one_side, pivot
from clip_lens.show.figures.figure import Figure, carrying, subplots
from clip_lens.show.figures.style import LARGE, LIGHT, scale, template
from clip_lens.show.figures.words import hovers, record_of, shown, side_name, slot_name, value_name
from clip_lens.words import decimals

SCALE = scale(LIGHT.diverging)
GREY = LIGHT.gap
CELLS = {"xgap": 1, "ygap": 1, "hoverongaps": False}
BESIDE = 10  # columns
BELOW = 128  # pixels for the x axis' labels and title and for the colour bar


class Panel(NamedTuple):
    """A grid, mostly of one side; the table that it was laid out from, and cell by cell what hovering tells of it."""

    name: str
    grid: DataFrame
    table: DataFrame
    told: np.ndarray | None = None

    def on(self, axes: Mapping[str, Sequence[Any]]) -> Panel:
        """The panel with these rows and columns: a line without a value where it has none."""
        rows, columns = (pd.Index(entries, name=name) for name, entries in axes.items())
        told = DataFrame(self.told, self.grid.index, self.grid.columns, dtype=object)
        words = None if self.told is None else told.reindex(index=rows, columns=columns, fill_value="").to_numpy()
        return self._replace(grid=self.grid.reindex(index=rows, columns=columns), told=words)


def heatmap(
    effects: Effects | DataFrame,
    rows: str | None = None,
    columns: str | None = None,
    value: str = "fraction",
    side: str | None = None,
    title: str | None = None,
    *,
    limit: float | None = None,
    **how: Any,
) -> Figure:
    """A plotly figure of one value of the table, laid out by two columns of the index; a panel for each side.

    Unless told otherwise slot x layer, of single heads or neurons without slots unit x layer, of edges sender x
    receiver.

    Colours run from -limit to limit, white at 0; without `limit` it is the largest absolute value of all panels. Cells
    are printed when they are few; hovering tells value, interval, mean signed effect and pairs. Grey cells have
    no counterpart. Edges are laid out by "sender" and "receiver", in the order of the tower; there grey is no path. For
    `resid`, layer 0 is the embedding and layer l the stream after l blocks. `effects` may be a grid, as `Effects.grid`
    gives it; `how` goes to `Effects.table`. `title=""` leaves the heading out.

    Raises:
        ValueError: as `Effects.grid`, or a result without places.

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
) -> Figure:
    """One figure of panels that share their axes' meaning and their colours.

    Example:
        >>> grid = DataFrame([[1.0, -2.0]])
        >>> assemble([Panel("one", grid, grid), Panel("two", grid, grid)], "effect", grid).layout.coloraxis.cmin
        -2.0
    """
    limit = limit or max((largest(panel.grid) for panel in panels), default=0.0) or 1.0
    figure, heading = _canvas(panels, title)
    for number, panel in enumerate(panels, start=1):
        where = {"row": number, "col": 1} if _stacked(panels) else {"row": 1, "col": number}
        _draw(figure, panel, value, where, effects)
    _axes(figure, panels, effects)
    carrying(figure, pd.concat([panel.table for panel in panels], ignore_index=True))
    figure.update_layout(
        coloraxis={
            "colorscale": SCALE,
            "cmin": -limit,
            "cmax": limit,
            "colorbar": _colour_bar(value_name(value, effects), figure.layout.height),
        },
        title={"text": heading, "font": {"size": LARGE}} if heading else None,
        template=template(),
    )
    return figure


def largest(grid: DataFrame) -> float:
    """The largest absolute value of a grid: the limit of its colours; 0 where there is none.

    Example:
        >>> largest(DataFrame([[-2.0, 1.0, float("nan")]]))
        2.0
    """
    numbers = np.abs(grid.to_numpy(dtype=float))
    return float(numbers[~np.isnan(numbers)].max(initial=0.0))


def _panels(
    effects: Effects | DataFrame,
    rows: str | None,
    columns: str | None,
    value: str,
    side: str | None,
    how: dict[str, Any],
) -> list[Panel]:
    if isinstance(effects, DataFrame):
        return [Panel("", effects, _long(effects, value))]
    if not effects.places:
        raise ValueError(f"nothing to draw: the result has no places, {effects!r}")
    rows, columns = axes_of(effects.index, rows, columns)
    table, axes = effects.table(**how), effects.axes()
    parts = {name: one_side(table, name) for name in (dict.fromkeys(table["side"]) if side is None else [side])}
    names = {name: side_name(str(name), map(str, parts)) for name in parts}
    return [laid_out(names[name], part, rows, columns, value, effects, axes) for name, part in parts.items()]


def laid_out(
    name: str,
    table: DataFrame,
    rows: str,
    columns: str,
    value: str,
    effects: Effects,
    known: Mapping[str, Sequence[str]],
) -> Panel:
    """A panel of the rows of one side of a result's table, laid out by two of its columns.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> table = one_side(toy_effects().table(), "foil")
        >>> laid_out("foil", table, "slot", "layer", "effect", toy_effects(), {}).told[0][0][:30]
        '<br>recovered fraction <b>1.00'
    """
    grid = pivot(table, rows, columns, value, known)
    words = np.array([*hovers(table, effects, value), ""], dtype=object)
    row = pivot(table.assign(row=np.arange(len(table))), rows, columns, "row", known).fillna(-1).to_numpy(dtype=int)
    return Panel(name, grid, table[["place", "side", *shown(effects, value)]], words[row])


def _long(grid: DataFrame, value: str) -> DataFrame:
    """A grid as a table with a row for each cell that has a value."""
    named = grid.rename_axis(index=grid.index.name or "row", columns=grid.columns.name or "column")
    return named.stack().dropna().rename(value).reset_index()


def _stacked(panels: Sequence[Panel]) -> bool:
    """Panels stand side by side only where numbers in their cells stay readable on a narrow screen."""
    return sum(panel.grid.shape[1] for panel in panels) > BESIDE


def _canvas(panels: Sequence[Panel], title: str | None) -> tuple[Figure, str]:
    """An empty figure whose height follows from the rows, and its heading."""
    n_rows = max(len(panel.grid) for panel in panels)
    several, stacked = len(panels) > 1, _stacked(panels)
    heading = title if title is not None else ("" if several else _describe(panels[0], ", "))
    cell = 30 if n_rows <= 12 else max(15, 24 - n_rows // 8)
    inner, gap = min(max(n_rows, 2) * cell, 1100), 118  # labels turned upright, a title and a note fit into the gap
    top = (44 if heading else 12) + (34 if several else 0)
    down = len(panels) if stacked else 1
    height = top + inner * down + gap * (down - 1) + BELOW
    figure = subplots(
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
    if "n" not in panel.table or panel.told is None:
        return escape(panel.name)
    counts = panel.table["n"][panel.table["n"] > 0]
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    pairs = f"n = {high} pairs" if low == high else f"n = {low} to {high} pairs"
    return f"{panel.name}{between}{pairs}" if panel.name else pairs


def _draw(figure: Figure, panel: Panel, value: str, where: dict[str, int], drawn: Effects | DataFrame) -> None:
    """A panel's cells, and over the gaps a second, grey trace: a place without a counterpart is not a 0."""
    grid = panel.grid.to_numpy(dtype=float)
    gaps = np.isnan(grid)
    printed = grid.shape[0] <= 24 and grid.shape[1] <= 14
    spot = _spot(panel.grid, printed)
    figure.add_heatmap(
        z=grid,
        text=[[_number(cell, value) for cell in line] for line in grid] if printed else _spots(panel.grid),
        texttemplate="%{text}" if printed else None,
        coloraxis="coloraxis",
        name=panel.name,
        hovertext=panel.told,
        hovertemplate=spot + ("<br>%{z:.3f}" if panel.told is None else "%{hovertext}") + "<extra></extra>",
        **CELLS,
        **where,
    )
    if gaps.any():
        figure.add_heatmap(
            z=np.where(gaps, 0.0, np.nan),
            text=None if printed else _spots(panel.grid),
            colorscale=[[0, GREY], [1, GREY]],
            showscale=False,
            name=_gap(panel.grid, drawn),
            hovertemplate=f"{spot}<br>{_gap(panel.grid, drawn)}<extra></extra>",
            **CELLS,
            **where,
        )


def _gap(grid: DataFrame, drawn: Effects | DataFrame) -> str:
    """What a grey cell is: among senders and receivers mostly two that no edge joins, where nothing is patched a place
    that there isn't."""
    if {grid.index.name, grid.columns.name} & {"sender", "receiver"}:
        return "no path"
    return "no counterpart" if record_of(drawn).method.patches else "no value"


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
    return f"{cell:.0f}" if value in ("n", "dropped") else decimals(cell)


def _axes(figure: Figure, panels: Sequence[Panel], effects: Effects | DataFrame) -> None:
    """Rows from top to bottom, labels of at least 11 pixels that don't overlap, the axes' meaning in words."""
    grid = panels[0].grid
    across, down = str(grid.columns.name), str(grid.index.name)
    kinds = set() if isinstance(effects, DataFrame) else set(effects.index["kind"])
    room = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    gap = any(panel.grid.isna().any(axis=None) for panel in panels)
    note = f"<br><span style='font-size:11px'>grey: {_gap(grid, effects)}</span>" if gap else ""
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


def _colour_bar(title: str, height: int) -> dict[str, Any]:
    """A flat bar at the figure's foot: beside the cells it would take a fifth of a narrow screen."""
    return {
        "orientation": "h", "thickness": 10, "ypad": 0, "len": 0.7, "x": 0.5, "yref": "container", "y": 58 / height,
        "yanchor": "top", "tickfont": {"size": 11}, "outlinewidth": 0,
        "title": {"text": title, "side": "bottom", "font": {"size": 12}},
    }  # fmt: skip
