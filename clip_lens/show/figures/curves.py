"""Lines with bands, and points: a quantity over layers, sizes or thresholds, and two estimates of the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame, api

from clip_lens.core.effects import Effects
from clip_lens.core.grid import one_side
from clip_lens.core.table import SIDES
from clip_lens.model.site import label
from clip_lens.show.figures.figure import Figure, carrying, subplots
from clip_lens.show.figures.style import LIGHT, SIDE_COLOURS, faded, template, under
from clip_lens.show.figures.words import BOUNDS, bold, side_name, value_name
from clip_lens.words import close

DASHES = ("solid", "dash", "dot", "dashdot")  # a second turn through the colours
MARKED = 20  # points of a line; of more each is too close to the next to be marked


def curve(
    drawn: Effects | DataFrame,
    x: str = "layer",
    y: str = "effect",
    *,
    lower: str | None = None,
    upper: str | None = None,
    by: str | None = None,
    log: bool = False,
    title: str = "",
    **how: Any,
) -> Figure:
    """A plotly figure of the column y over the column x, a line for each entry of `by`, with bands from lower to upper.

    Of a table, lines run in the order of x; rows without an x, a y or a `by` are left out. `log=True` has a logarithmic
    x axis. Of a result, such as the logit lens, it is a value of its table over the layers, a line with its interval
    for each side; its places are of one kind, with one place a layer, and `how` goes to `Effects.table`.

    Raises:
        ValueError: no such column, one that holds no numbers, only one of lower and upper, x <= 0 on a logarithmic
            axis, two places of a result at one x, or nothing to draw.

    Example:
        >>> frame = DataFrame({"edges": [100, 10], "f": [0.9, 0.4], "low": [0.8, 0.3], "high": [1.0, 0.5]})
        >>> figure = curve(frame, "edges", "f", lower="low", upper="high", log=True)
        >>> figure.data[-1].x.tolist(), figure.data[-1].y.tolist()
        ([10.0, 100.0], [0.4, 0.9])
        >>> from clip_lens.core.effects import toy_effects
        >>> curve(toy_effects().where(slot="eot")).data[-1].y.tolist()
        [0.0, 1.75]
    """
    if isinstance(drawn, Effects):
        return _of_result(drawn, x, y, title, how)
    if how:
        raise ValueError(f"a table is drawn as it is, {', '.join(how)} is for a result")
    if (lower is None) != (upper is None):
        raise ValueError(f"a band needs both lower and upper, got lower={lower!r} and upper={upper!r}")
    columns = _Columns(x, y, lower, upper, by)
    return _lines(_checked(drawn, columns, log), columns, log, title)


class _Columns(NamedTuple):
    """Which columns of a table are drawn."""

    x: str
    y: str
    lower: str | None
    upper: str | None
    by: str | None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.by, self.x, self.y, self.lower, self.upper) if name))


def _checked(frame: DataFrame, columns: _Columns, log: bool) -> DataFrame:
    """The rows that can be drawn."""
    x, y, lower, upper, by = columns
    need(frame, [x, y, *filter(None, (lower, upper))], [by] if by else [])
    frame = frame.dropna(subset=[x, y, *([by] if by else [])])
    if frame.empty:
        raise ValueError(f"nothing to draw: no row has both {x!r} and {y!r}")
    if log and (frame[x] <= 0).any():
        raise ValueError(
            f"a logarithmic axis has no place for {frame[x].min()}; give rows with {x!r} > 0, or log=False"
        )
    return frame


def _lines(frame: DataFrame, columns: _Columns, log: bool, title: str) -> Figure:
    x, y, by = columns.x, columns.y, columns.by
    figure = _canvas(title, 390)
    series = list(dict.fromkeys(frame[by])) if by else [""]
    for number, name in enumerate(series):
        part = (frame[frame[by] == name] if by else frame).sort_values(x, kind="stable")
        colour, dash = _look(number, name if by == "side" else None)
        for trace in _line(part, columns, colour, dash):
            shown = side_name(str(name), map(str, series)) if by == "side" else str(name)
            figure.add_trace(trace.update(name=escape(shown, quote=False), legendgroup=str(name)))
    figure.update_layout(showlegend=len(series) > 1)
    figure.update_xaxes(title_text=escape(x), type="log" if log else "linear", **_whole(frame[x], log))
    figure.update_yaxes(title_text=value_name(y))
    return carrying(figure, frame[columns.names])


def _of_result(effects: Effects, x: str, y: str, title: str, how: dict[str, Any]) -> Figure:
    """A value of a result over the layers."""
    table = effects.table(**how)
    need(table, [x, y], [])
    twice = table.drop_duplicates("place").duplicated(x)
    if twice.any():
        both = [place for place, at in zip(table["place"], table[x], strict=True) if at == table[x][twice.idxmax()]]
        first, second = list(dict.fromkeys(both))[:2]
        raise ValueError(f"one line has one place a {x}, got {first} and {second}; choose with where(...)")
    lower, upper = BOUNDS.get(y, (None, None))
    columns = _Columns(x, y, lower, upper, "side")
    figure = _lines(_checked(table, columns, log=False), columns, False, title)
    if x == "layer":
        resid = set(effects.index["kind"]) == {"resid"}
        figure.update_xaxes(title_text="layer (0: embedding, l: after l blocks)" if resid else "block, counted from 0")
    figure.update_yaxes(title_text=value_name(y, effects))
    figure.add_hline(y=0, line={"color": LIGHT.soft, "width": 1})
    return figure


def scatter(exact: Effects, estimate: Effects, side: str | None = None) -> Figure:
    """A plotly figure of the mean signed effect of each place in two results, a panel for each side, with Pearson's r.

    Across the first result, upwards the second; the thin line is where both are equal. Places are found by what they
    are, those that only one result has are left out and counted in the heading (method section 8).

    Raises:
        ValueError: fewer than two places or no side in common, or no such side.

    Example:
        >>> from dataclasses import replace
        >>> from clip_lens.core.effects import toy_effects
        >>> exact = toy_effects()
        >>> figure = scatter(exact, replace(exact, values=2 * exact.values), side="foil")
        >>> figure.layout.annotations[0].text
        'negation in the foil<br>Pearson r = 1.000, 4 places'
    """
    sides = _common_sides(exact, estimate, side)
    panels = [(name, *_matched(exact, estimate, name)) for name in sides]
    headings = [_agreement(side_name(name, sides), points, left_out) for name, points, left_out in panels]
    figure = subplots(rows=len(panels), cols=1, subplot_titles=headings, vertical_spacing=0.2 / len(panels))
    figure.update_annotations(font_size=13)
    for row, (name, points, _) in enumerate(panels, start=1):
        for trace in _cloud(name, points):
            figure.add_trace(trace, row=row, col=1)
    figure.update_layout(
        template=template(), height=20 + 400 * len(panels), showlegend=False, hovermode="closest",
        margin={"t": 52, "b": 56, "l": 10, "r": 14},
    )  # fmt: skip
    figure.update_xaxes(title_text=_source(exact, "exact"), row=len(panels), col=1)
    figure.update_xaxes(nticks=7)
    figure.update_yaxes(title_text=_source(estimate, "estimate"), nticks=7)
    return carrying(figure, pd.concat([points for _, points, _ in panels]))


def need(frame: DataFrame, numbers: Sequence[str], further: Sequence[str]) -> None:
    """Nothing, if a table has these columns, `numbers` with numbers in them.

    Raises:
        ValueError: a column is missing, or holds something else; the message has the columns that there are.

    Example:
        >>> need(DataFrame({"f": [0.5]}), ["f"], [])
    """
    for name in (*numbers, *further):
        if name not in frame:
            raise ValueError(f"no column {name!r} in the table{close(name, frame.columns)}")
    for name in numbers:
        if not api.types.is_numeric_dtype(frame[name]):
            raise ValueError(f"the column {name!r} holds no numbers, but {frame[name].iloc[:1].tolist()}")


def _canvas(title: str, height: int) -> Figure:
    figure = Figure()
    figure.update_layout(
        template=template(), height=height, margin={"t": 40 if title else 14, "b": 76, "l": 10, "r": 14},
        title={"text": escape(title)} if title else None, legend=under(46, height - 90), hovermode="closest",
    )  # fmt: skip
    return figure


def _look(number: int, side: str | None) -> tuple[str, str]:
    colours = LIGHT.series
    if side in SIDE_COLOURS:
        return colours[SIDE_COLOURS[side]], "solid"
    if side is not None:  # an entry beside the sides has a colour that none of them has
        return colours[3 + number % 3], "solid"
    return colours[number % len(colours)], DASHES[number // len(colours) % len(DASHES)]


def _line(part: DataFrame, columns: _Columns, colour: str, dash: str) -> list[go.Scatter]:
    """The line, and before it the band, one closed outline that goes with it when the legend hides it."""
    x, y, lower, upper, _ = columns
    traces, drawn = [], [y]
    if lower and upper:
        drawn += [lower, upper]
        bounded = part.dropna(subset=[lower, upper])
        across, low, high = (bounded[name].to_numpy(dtype=float) for name in (x, lower, upper))
        traces.append(
            go.Scatter(
                x=np.concatenate([across, across[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
                mode="lines", line_width=0, fillcolor=faded(colour), hoverinfo="skip", showlegend=False,
            )
        )  # fmt: skip
    traces.append(
        go.Scatter(
            x=part[x].to_numpy(dtype=float), y=part[y].to_numpy(dtype=float), marker_size=6,
            mode="lines+markers" if len(part) <= MARKED else "lines",
            customdata=[bold(*line) for line in part[drawn].to_numpy(dtype=float)],
            line={"color": colour, "width": 2, "dash": dash},
            hovertemplate=f"{escape(x)} %{{x}}<br>{escape(y)} %{{customdata}}",
        )
    )  # fmt: skip
    return traces


def _whole(column: Any, log: bool) -> dict[str, Any]:
    """Ticks at every whole number where there are few: layers have no halves."""
    numbers = column.to_numpy(dtype=float)
    few = not log and (numbers == np.round(numbers)).all() and numbers.max() - numbers.min() <= 24
    return {"dtick": max(1, int(numbers.max() - numbers.min()) // 12)} if few else {}


def _common_sides(exact: Effects, estimate: Effects, side: str | None) -> list[str]:
    both = set(exact.pairs["side"]) & set(estimate.pairs["side"])
    if side is not None and side not in both:
        raise ValueError(f"no side {side!r} in both results; they share {sorted(both) or 'none'}")
    if not both:
        raise ValueError("the two results have no side in common; compare results of the same pairs")
    return [name for name in SIDES if name in both and side in (None, name)]


def _matched(exact: Effects, estimate: Effects, side: str) -> tuple[DataFrame, int]:
    """The mean signed effect in either result of the places that both have, and how many places do not match."""
    one, two = (_means(effects, side) for effects in (exact, estimate))
    shared = [place for place in one if place in two]
    if len(shared) < 2:
        raise ValueError(
            f"{len(shared)} places are in both results, such as {label(next(iter(exact.places)))} in the first and "
            f"{label(next(iter(estimate.places)))} in the second; give the same places to both methods"
        )
    columns = {"place": [label(place) for place in shared], "side": side}
    means = {"exact": [one[place] for place in shared], "estimate": [two[place] for place in shared]}
    return DataFrame({**columns, **means}), len({*one, *two}) - len(shared)


def _means(effects: Effects, side: str) -> dict[Any, float]:
    effect = one_side(effects.fraction(), side)["effect"]
    return {place: float(mean) for place, mean in zip(effects.places, effect, strict=True) if mean == mean}


def _agreement(label: str, points: DataFrame, left_out: int) -> str:
    constant = (points[["exact", "estimate"]].nunique() == 1).any()
    r = "not defined, one side is constant" if constant else f"{points['exact'].corr(points['estimate']):.3f}"
    missing = f", {left_out} only in one result" if left_out else ""
    return f"{label}{'<br>' if label else ''}Pearson r = {r}, {len(points)} places{missing}"


def _cloud(side: str, points: DataFrame) -> list[go.Scatter]:
    both = points[["exact", "estimate"]].to_numpy()
    ends = [float(both.min()), float(both.max())]
    return [
        go.Scatter(
            x=ends, y=ends, mode="lines", name="equal", hoverinfo="skip", line={"color": LIGHT.soft, "width": 1}
        ),
        go.Scatter(
            x=points["exact"], y=points["estimate"], mode="markers", name="places",
            hovertext=[escape(place, quote=False) for place in points["place"]],
            marker={"color": LIGHT.series[SIDE_COLOURS[side]], "size": 6, "opacity": 0.6},
            hovertemplate="<b>%{hovertext}</b><br>%{x:.4f} exact, %{y:.4f} estimated<extra></extra>",
        ),
    ]  # fmt: skip


def _source(effects: Effects, role: str) -> str:
    title = effects.record.method.title
    return f"{role}, mean signed effect" + (f"<br>{escape(title)}" if 0 < len(title) <= 40 else "")
