"""A plotly figure that carries the table it was drawn from."""

from __future__ import annotations

from typing import Any, TypeVar

import plotly.graph_objects as go
from pandas import DataFrame
from plotly.subplots import make_subplots

F = TypeVar("F", bound="Figure")


class Figure(go.Figure):
    """A plotly figure like others, with `frame`: the table that it shows, a row for each cell, bar or point.

    Copies, pickles and `themed` keep the frame; what is written for a page or a browser is without it.

    Example:
        >>> import copy
        >>> figure = carrying(Figure(), DataFrame({"side": ["foil"], "effect": [0.5]}))
        >>> copy.deepcopy(figure).frame.equals(figure.frame), "effect" in figure.to_json()
        (True, False)
    """

    frame: DataFrame | None = None

    def __reduce__(self) -> Any:
        make, given = super().__reduce__()
        return _remade, (make, given, self.frame)


def carrying(figure: F, frame: DataFrame | None) -> F:
    """The figure itself, with the table that it was drawn from.

    Example:
        >>> carrying(Figure(), DataFrame({"r": [0.5]})).frame.columns.tolist()
        ['r']
    """
    figure.frame = None if frame is None else frame.reset_index(drop=True)
    return figure


def subplots(**how: Any) -> Figure:
    """An empty figure of several panels; `how` goes to plotly's `make_subplots`.

    Example:
        >>> subplots(rows=2, cols=1).layout.yaxis2.anchor
        'x2'
    """
    return make_subplots(figure=Figure(), **how)


def _remade(make: type[F], given: tuple[Any, ...], frame: DataFrame | None) -> F:
    return carrying(make(*given), frame)
