"""Figures that are compared side by side: one range of colours and of axes for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

MARGIN = 0.05
"""Of an axis' range, beyond what is drawn."""


def alike(figures: Sequence[go.Figure]) -> list[go.Figure]:
    """Copies of figures whose colours have the same limits, whose lines and bars the same range, and that are equally
    high.

    Example:
        >>> from pandas import DataFrame
        >>> from clip_lens.show.figures.heatmap import heatmap
        >>> grids = [DataFrame([[1.0]]), DataFrame([[-3.0]])]
        >>> [figure.layout.coloraxis.cmax for figure in alike([heatmap(grid, value="effect") for grid in grids])]
        [3.0, 3.0]
    """
    copies = [go.Figure(figure.data, figure.layout) for figure in figures]
    if len(copies) < 2:
        return copies
    highest = max((figure.layout.height or 0 for figure in copies), default=0)
    limits = [figure.layout.coloraxis.cmax for figure in copies]
    ranges = {f"{letter}axis": _range(letter, copies) for letter in "xy"}
    for figure in copies:
        figure.update_layout(height=highest or None)
        if all(limit is not None for limit in limits):
            figure.update_layout(coloraxis={"cmin": -max(limits), "cmax": max(limits)})
        for axis, reach in ranges.items():
            if reach is not None:
                figure.update_layout({axis: {"range": reach}})
    return copies


def _range(letter: str, figures: Iterable[go.Figure]) -> list[float] | None:
    """What an axis must reach for all figures; None where it is no axis of values, or each has its own kind."""
    numbers = [_values(trace, letter) for figure in figures for trace in figure.data]
    if any(part is None for part in numbers):
        return None
    known = np.concatenate([np.zeros(0), *(part for part in numbers if part is not None)])
    known = known[np.isfinite(known)]
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    margin = MARGIN * (high - low) or 1.0
    return [low - margin, high + margin]


def _values(trace: Any, letter: str) -> np.ndarray | None:
    """The numbers that a line or a bar reaches to on an axis, with their bounds; None where it counts or names."""
    if trace.type == "bar":
        along = "x" if trace.orientation == "h" else "y"
        return np.concatenate([np.zeros(1), *_reached(trace, along)]) if letter == along else None
    if trace.type != "scatter" or letter == "x":
        return None
    return np.asarray(trace.y, dtype=float)


def _reached(trace: Any, along: str) -> Iterator[np.ndarray]:
    ends, error = np.asarray(trace[along], dtype=float), trace[f"error_{along}"]
    yield ends
    if error.array is not None:
        yield ends + np.asarray(error.array, dtype=float)
        yield ends - np.asarray(error.arrayminus if error.arrayminus is not None else error.array, dtype=float)
