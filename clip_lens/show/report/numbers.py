"""The numbers that a figure shows, read from its traces: for readers who can't see it, and for files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame

COLUMNS = ("panel", "series", "text", "x", "y", "lower", "upper", "value")


def numbers(figure: go.Figure) -> DataFrame:
    """A row per point, bar or cell of a figure: series (of several), text, x, y, the bounds of error bars, value.

    Ticks' words stand for their positions. Left out are traces that answer to no hover, like the bands of intervals,
    grids of one colour, which mark gaps, and empty cells and points. Of a diagram, whose lines carry what they tell as
    their `meta`, it is a row per line, that on top first, with the words that hovering tells.

    Example:
        >>> numbers(go.Figure(go.Heatmap(z=[[1.0, None]], x=["a", "b"], y=["r"])))
           x  y  value
        0  a  r    1.0
    """
    traces = [trace for trace in figure.data if not _mute(trace)]
    if lines := [trace for trace in traces if isinstance(trace.meta, list | tuple) and trace.hovertemplate]:
        return _lines(lines[::-1])
    parts = [_cells(figure, t) if getattr(t, "z", None) is not None else _points(figure, t) for t in traces]
    if sum(len(part) > 0 for part in parts) > 1:
        names = [trace.name or f"series {number}" for number, trace in enumerate(traces, start=1)]
        parts = [part.assign(series=unescape(name)) for part, name in zip(parts, names, strict=True)]
    kept = [part for part in parts if len(part)]
    table = pd.concat(kept, ignore_index=True) if kept else DataFrame()
    return table[[name for name in COLUMNS if name in table]]


def _mute(trace: Any) -> bool:
    colours = getattr(trace, "colorscale", None)
    marks = trace.type == "heatmap" and colours is not None and len({colour for _, colour in colours}) == 1
    return marks or getattr(trace, "hoverinfo", None) == "skip"


def _lines(traces: list[Any]) -> DataFrame:
    """The lines of a diagram: their names and their hover in words."""
    panels = [int((trace.xaxis or "x")[1:] or 1) for trace in traces]
    rows = DataFrame({"series": [trace.name for trace in traces], "text": [_told(trace) for trace in traces]})
    return rows if len(set(panels)) == 1 else rows.assign(panel=panels)[["panel", "series", "text"]]


def _told(trace: Any) -> str:
    """A trace's hover template with its `meta` filled in, a line break as a semicolon."""
    words = re.sub(r"<extra>.*?</extra>", "", trace.hovertemplate)
    filled = re.sub(
        r"%\{meta\[(\d+)\](?::([^}]*))?\}", lambda found: _formatted(trace.meta[int(found[1])], found[2] or ""), words
    )
    return unescape(re.sub(r"<[^>]*>", "", filled.replace("<br>", "; ")))


def _formatted(value: Any, how: str) -> str:
    return format(int(value) if how == "d" else value, how)


def _points(figure: go.Figure, trace: Any) -> DataFrame:
    axes = [name for name in ("x", "y") if getattr(trace, name, None) is not None]
    size = max((len(getattr(trace, name)) for name in axes), default=0)
    columns: dict[str, Any] = {name: getattr(trace, name) for name in axes if len(getattr(trace, name)) == size}
    bounds = _bounds(trace, columns)
    columns = {name: _named(figure, trace, name, list(column)) for name, column in columns.items()}
    for words in (getattr(trace, "text", None), getattr(trace, "hovertext", None)):
        if words is not None and not isinstance(words, str) and len(words) == size:
            columns["text"] = [unescape(str(word)) for word in words]
    return DataFrame({**columns, **bounds}).dropna(subset=list(axes))


def _bounds(trace: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """The ends of a trace's error bars."""
    for name, column in columns.items():
        error = getattr(trace, f"error_{name}", None)
        if error is not None and error.array is not None:
            middle, above = np.asarray(column, dtype=float), np.asarray(error.array, dtype=float)
            below = above if error.arrayminus is None else np.asarray(error.arrayminus, dtype=float)
            return {"lower": middle - below, "upper": middle + above}
    return {}


def _cells(figure: go.Figure, trace: Any) -> DataFrame:
    grid = np.asarray(trace.z, dtype=float)
    if grid.ndim != 2:
        return DataFrame()
    down, across = (
        list(range(size)) if own is None or len(own) != size else list(own)
        for own, size in zip((trace.y, trace.x), grid.shape, strict=True)
    )
    rows, columns = np.nonzero(~np.isnan(grid))
    down, across = _named(figure, trace, "y", down), _named(figure, trace, "x", across)
    return DataFrame({"x": [across[i] for i in columns], "y": [down[i] for i in rows], "value": grid[rows, columns]})


def _named(figure: go.Figure, trace: Any, axis: str, places: Sequence[Any]) -> list[Any]:
    """Places on an axis in the words of its ticks, where all of them have one."""
    name = (getattr(trace, f"{axis}axis", None) or axis).replace(axis, f"{axis}axis", 1)
    ticks = figure.layout[name]
    if ticks.tickvals is None or ticks.ticktext is None:
        return list(places)
    words = {place: unescape(str(word)) for place, word in zip(ticks.tickvals, ticks.ticktext, strict=False)}
    return [words[place] for place in places] if all(place in words for place in places) else list(places)
