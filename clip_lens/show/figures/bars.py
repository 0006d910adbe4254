"""Signed bars with their intervals: the largest effects of a result, or any table of estimates."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame, Series, api

from clip_lens.core.effects import Effects
from clip_lens.show.figures.curves import need
from clip_lens.show.figures.figure import Figure, carrying, subplots
from clip_lens.show.figures.style import LIGHT, SMALL, template
from clip_lens.show.figures.words import bold, hovers, shown, side_name, value_name
from clip_lens.words import counted

LINE, HEAD, FOOT = 20, 40, 52  # pixels: of a bar, of a panel's heading, of the axis below
LABEL = "__label"
ARROW = "\N{RIGHTWARDS ARROW}"
LONG = 24  # characters of a label; of a longer one the middle is left out


class _Columns(NamedTuple):
    """Which columns of a table are drawn."""

    value: str
    lower: str | None
    upper: str | None
    name: str | None


def bars(
    effects: Effects | DataFrame,
    n: int = 20,
    value: str = "effect",
    side: str | None = None,
    *,
    name: str | None = None,
    title: str = "",
    **how: Any,
) -> Figure:
    """A plotly figure of the n largest absolute values of each side as signed bars with intervals, the largest on top.

    Of a result these are the rows of `Effects.top(n, value)`, `how` goes to `Effects.table`. A `DataFrame` needs the
    column `value`; its interval is in `{value}_lower` and `{value}_upper`, or in `lower` and `upper`, where it has
    these; its labels are in the column `name`, by default the first one that holds no numbers, or else its index; a
    column `side` makes panels. Blue bars are positive, red ones negative. Rows without a value are left out.

    Raises:
        ValueError: n is not positive, no such column or side, a column of values that holds no numbers, or nothing to
            draw.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> figure = bars(toy_effects(), n=2, side="foil")
        >>> figure.data[0].x.tolist(), figure.data[0].hovertext
        ([2.5, 1.75], ('resid 0 @negator', 'resid 1 @eot'))
    """
    if n < 1:
        raise ValueError(f"n is the number of bars, at least 1. Got {n}")
    table = effects.top(n, value, **how) if isinstance(effects, Effects) else effects
    columns = _columns(table, value, "place" if isinstance(effects, Effects) else name)
    parts = [(name, _largest(part, n, columns)) for name, part in _by_side(table, side)]
    parts = [(name, part) for name, part in parts if len(part)]
    if not parts:
        raise ValueError(f"nothing to draw: no row has a value of {value!r}")
    labels = [side_name(name, [name for name, _ in parts]) for name, _ in parts]
    figure = _canvas(
        [(_heading(label, part), len(part)) for label, (_, part) in zip(labels, parts, strict=True)], title
    )
    for row, (label, (_, part)) in enumerate(zip(labels, parts, strict=True), start=1):
        trace = _trace(part, columns, label, _hovers(part, columns, effects))
        figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(_labels(part[LABEL]), row=row, col=1)
    figure.update_xaxes(title_text=value_name(value, effects), row=len(parts), col=1)
    figure.update_xaxes(range=_reach(parts, columns), matches="x")
    return carrying(figure, _frame(pd.concat([part for _, part in parts]), effects, value))


def _frame(drawn: DataFrame, effects: Effects | DataFrame, value: str) -> DataFrame:
    """The rows that are drawn: all columns of a table, of a result's those that a figure tells."""
    if isinstance(effects, Effects):
        return drawn[["place", "side", *shown(effects, value)]]
    named = any(name is not None for name in drawn.index.names)
    return drawn.drop(columns=LABEL).reset_index(drop=not named)


def shortened(label: str, most: int = LONG) -> str:
    """A label without its middle, where it is longer than `most` characters.

    Example:
        >>> shortened("head 0.1 -> v 2.3 @subject_rest", 20)
        'head 0.1 …bject_rest'
    """
    return label if len(label) <= most else f"{label[: (most - 1) // 2]}…{label[-(most - 1 - (most - 1) // 2) :]}"


def _columns(table: DataFrame, value: str, name: str | None) -> _Columns:
    need(table, [value], [name] if name else [])
    pairs = [(f"{value}_lower", f"{value}_upper"), ("lower", "upper")]
    own = value in ("n", "dropped") or value in [bound for pair in pairs for bound in pair]
    # `lower` and `upper` of an Effects' table are those of the fraction
    pairs = [] if own else pairs[:1] if "effect_lower" in table and value != "fraction" else pairs
    lower, upper = next(((low, high) for low, high in pairs if low in table and high in table), (None, None))
    words = [column for column in table if column != "side" and not api.types.is_numeric_dtype(table[column])]
    return _Columns(value, lower, upper, name if name is not None else words[0] if words else None)


def _by_side(table: DataFrame, side: str | None) -> list[tuple[str, DataFrame]]:
    if "side" not in table:
        if side is not None:
            raise ValueError(f"the table has no column 'side', so there is no side {side!r}; leave it out")
        return [("", table)]
    sides = list(dict.fromkeys(table["side"]))
    if side is not None and side not in sides:
        raise ValueError(f"no side {side!r} in the result; it has {', '.join(map(repr, sides))}")
    return [(str(name), table[table["side"] == name]) for name in sides if side in (None, name)]


def _largest(part: DataFrame, n: int, columns: _Columns) -> DataFrame:
    """The n rows to draw, the largest first, with the label of each."""
    sizes = part[columns.value].abs().to_numpy(dtype=float, na_value=np.nan)
    order = np.argsort(-sizes, kind="stable")  # NaN comes last
    rows = part.iloc[order[: min(n, int((~np.isnan(sizes)).sum()))]]
    labels = rows[columns.name] if columns.name else rows.index
    return rows.assign(**{LABEL: [escape(str(label), quote=False) for label in labels]})


def _heading(name: str, part: DataFrame) -> str:
    pairs = f"<br>{_range(part['n'])} pairs" if "n" in part and api.types.is_numeric_dtype(part["n"]) else ""
    return f"{escape(name)}{pairs}" if name else ""


def _range(counts: Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _canvas(panels: Sequence[tuple[str, int]], title: str) -> Figure:
    """Panels one above the other, as high as their bars, so that labels have the room of the whole width."""
    headed = any(heading for heading, _ in panels)
    top, gap = (36 if title else 10) + (HEAD if headed else 0), HEAD + 34
    inner = [LINE * max(count, 2) for _, count in panels]
    room = sum(inner) + gap * (len(panels) - 1)
    figure = subplots(
        rows=len(panels), cols=1, row_heights=inner, vertical_spacing=gap / room if len(panels) > 1 else None,
        subplot_titles=[heading for heading, _ in panels] if headed else None,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    figure.update_layout(
        template=template(), height=top + room + FOOT, showlegend=False, bargap=0.3,
        margin={"t": top, "b": FOOT, "l": 10, "r": 14}, title={"text": escape(title)} if title else None,
    )  # fmt: skip
    figure.update_xaxes(zeroline=True, zerolinecolor=LIGHT.soft, tickfont_size=SMALL, nticks=7)
    return figure


def _trace(part: DataFrame, columns: _Columns, name: str, told: list[str]) -> go.Bar:
    values = part[columns.value].to_numpy(dtype=float)
    bounds = None
    if columns.lower and columns.upper:
        low, high = (part[column].to_numpy(dtype=float) for column in (columns.lower, columns.upper))
        bounds = {
            "type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low,
            "color": LIGHT.ink, "thickness": 1.2, "width": 3,
        }  # fmt: skip
    return go.Bar(
        x=values, y=np.arange(len(part)), orientation="h", name=name, error_x=bounds, hovertext=list(part[LABEL]),
        marker={"color": [LIGHT.positive if number >= 0 else LIGHT.negative for number in values]},
        customdata=told, hovertemplate="<b>%{hovertext}</b>%{customdata}<extra></extra>",
    )  # fmt: skip


def _hovers(part: DataFrame, columns: _Columns, effects: Effects | DataFrame) -> list[str]:
    """What hovering tells of each bar: all of a result's numbers, or the value of a table with its interval and number
    of pairs."""
    if isinstance(effects, Effects):
        return hovers(part, effects, columns.value)
    drawn = [name for name in columns[:3] if name]
    numbers = part[drawn].to_numpy(dtype=float)
    told = [f"<br>{escape(columns.value)} {bold(*line)}" for line in numbers]
    if "n" in part and api.types.is_numeric_dtype(part["n"]):
        told = [f"{words}<br>{counted(int(n), 'pair')}" for words, n in zip(told, part["n"], strict=True)]
    return told


def _labels(labels: Series) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(labels))), "ticktext": [_short(label) for label in labels],
        "tickfont": {"size": SMALL}, "range": [len(labels) - 0.5, -0.5], "showgrid": False,
    }  # fmt: skip


def _short(label: str) -> str:
    return shortened(label.replace("-&gt;", ARROW))


def _reach(parts: Sequence[tuple[str, DataFrame]], columns: _Columns) -> list[float]:
    """One range for all panels, so that their bars can be compared; 0 is always in it."""
    drawn = [column for column in columns[:3] if column]
    numbers = np.concatenate([part[drawn].to_numpy(dtype=float).ravel() for _, part in parts])
    low, high = min(0.0, float(np.nanmin(numbers))), max(0.0, float(np.nanmax(numbers)))
    margin = 0.04 * (high - low) or 1.0
    return [low - margin * (low < 0 or low == high), high + margin * (high > 0 or low == high)]
