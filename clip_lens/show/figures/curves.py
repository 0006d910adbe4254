"""Lines with bands, and points: a quantity over layers, sizes or thresholds, and two estimates of the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from pandas import DataFrame, api
from plotly.subplots import make_subplots

from clip_lens.core.effects import SIDES, Effects
from clip_lens.model.site import label
from clip_lens.show.figures.heatmap import SIDE_NAMES, value_name
from clip_lens.show.figures.style import LIGHT, SIDE_COLOURS, faded, template, under

DASHES = ("solid", "dash", "dot", "dashdot")  # a second turn through the colours
MARKED = 20  # points of a line; of more each is too close to the next to be marked


def curve(
    frame: DataFrame,
    x: str,
    y: str,
    *,
    lower: str | None = None,
    upper: str | None = None,
    by: str | None = None,
    log: bool = False,
    title: str = "",
) -> go.Figure:
    """A plotly figure of the column y over the column x, a line for each entry of `by`, with bands from lower to upper.

    Lines run in the order of x; rows without an x, a y or a `by` are left out. `log=True` has a logarithmic x axis.

    Raises:
        ValueError: no such column, one that holds no numbers, only one of lower and upper, x <= 0 on a logarithmic
            axis, or nothing to draw.

    Example:
        >>> frame = DataFrame({"edges": [100, 10], "f": [0.9, 0.4], "low": [0.8, 0.3], "high": [1.0, 0.5]})
        >>> figure = curve(frame, "edges", "f", lower="low", upper="high", log=True)
        >>> figure.data[-1].x.tolist(), figure.data[-1].y.tolist()
        ([10.0, 100.0], [0.4, 0.9])
    """
    if (lower is None) != (upper is None):
        raise ValueError(f"a band needs both lower and upper, got lower={lower!r} and upper={upper!r}")
    need(frame, [x, y, *filter(None, (lower, upper))], [by] if by else [])
    frame = frame.dropna(subset=[x, y, *([by] if by else [])])
    if frame.empty:
        raise ValueError(f"nothing to draw: no row has both {x!r} and {y!r}")
    if log and (frame[x] <= 0).any():
        raise ValueError(
            f"a logarithmic axis has no place for {frame[x].min()}; give rows with {x!r} > 0, or log=False"
        )
    figure = _canvas(title, 390)
    series = list(dict.fromkeys(frame[by])) if by else [""]
    for number, name in enumerate(series):
        part = (frame[frame[by] == name] if by else frame).sort_values(x, kind="stable")
        colour, dash = _look(number, name if by == "side" else None)
        for trace in _line(part, (x, y, lower, upper), colour, dash):
            shown = SIDE_NAMES.get(str(name), str(name)) if by == "side" else str(name)
            figure.add_trace(trace.update(name=escape(shown, quote=False), legendgroup=str(name)))
    figure.update_layout(showlegend=len(series) > 1)
    figure.update_xaxes(title_text=escape(x), type="log" if log else "linear", **_whole(frame[x], log))
    figure.update_yaxes(title_text=value_name(y))
    return figure


def lens_lines(effects: Effects, value: str = "effect", **how: Any) -> go.Figure:
    """A plotly figure of one value over the layers, a line with its interval for each side: the logit lens, for one.

    The places are of one kind, with one place a layer; `how` goes to `Effects.table`.

    Raises:
        ValueError: two places are in one layer, or the table has no such value.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> lens_lines(toy_effects().where(slot="eot")).data[-1].y.tolist()
        [0.0, 1.75]
    """
    layers = list(effects.index["layer"])
    twice = [number for number, layer in enumerate(layers) if layers.index(layer) != number]
    if twice:
        first, second = (label(effects.places[number]) for number in (layers.index(layers[twice[0]]), twice[0]))
        raise ValueError(f"one line has one place a layer, got {first} and {second}; choose with where(...)")
    table = effects.table(**how)
    need(table, [value], [])
    bounds = {"fraction": ("lower", "upper"), "effect": ("effect_lower", "effect_upper")}.get(value, (None, None))
    figure = curve(table, "layer", value, lower=bounds[0], upper=bounds[1], by="side")
    resid = set(effects.index["kind"]) == {"resid"}
    figure.update_xaxes(title_text="layer (0: embedding, l: after l blocks)" if resid else "block, counted from 0")
    figure.update_yaxes(title_text=value_name(value, effects))
    figure.add_hline(y=0, line={"color": LIGHT.soft, "width": 1})
    return figure


def scatter(exact: Effects, estimate: Effects, side: str | None = None) -> go.Figure:
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
    headings = [_agreement(name, across, up, left_out) for name, _, across, up, left_out in panels]
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=headings, vertical_spacing=0.2 / len(panels))
    figure.update_annotations(font_size=13)
    for row, (name, places, across, up, _) in enumerate(panels, start=1):
        for trace in _cloud(name, places, across, up):
            figure.add_trace(trace, row=row, col=1)
    figure.update_layout(
        template=template(), height=20 + 400 * len(panels), showlegend=False, hovermode="closest",
        margin={"t": 52, "b": 56, "l": 10, "r": 14},
    )  # fmt: skip
    figure.update_xaxes(title_text=_source(exact, "exact"), row=len(panels), col=1)
    figure.update_xaxes(nticks=7)
    figure.update_yaxes(title_text=_source(estimate, "estimate"), nticks=7)
    return figure


def need(frame: DataFrame, numbers: Sequence[str], further: Sequence[str]) -> None:
    """Nothing, if a table has these columns, `numbers` with numbers in them.

    Raises:
        ValueError: a column is missing, or holds something else; the message has the columns that there are.

    Example:
        >>> need(DataFrame({"f": [0.5]}), ["f"], [])
    """
    for name in (*numbers, *further):
        if name not in frame:
            raise ValueError(f"no column {name!r} in the table; it has {', '.join(map(str, frame.columns))}")
    for name in numbers:
        if not api.types.is_numeric_dtype(frame[name]):
            raise ValueError(f"the column {name!r} holds no numbers, but {frame[name].iloc[:1].tolist()}")


def _canvas(title: str, height: int) -> go.Figure:
    figure = go.Figure()
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


def _line(
    part: DataFrame, columns: tuple[str, str, str | None, str | None], colour: str, dash: str
) -> list[go.Scatter]:
    """The line, and before it the band, one closed outline that goes with it when the legend hides it."""
    x, y, lower, upper = columns
    traces, told = [], f"{escape(x)} %{{x}}<br>{escape(y)} <b>%{{y:.3f}}</b>"
    details = None
    if lower and upper:
        bounded = part.dropna(subset=[lower, upper])
        across, low, high = (bounded[name].to_numpy(dtype=float) for name in (x, lower, upper))
        traces.append(
            go.Scatter(
                x=np.concatenate([across, across[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
                mode="lines", line_width=0, fillcolor=faded(colour), hoverinfo="skip", showlegend=False,
            )
        )  # fmt: skip
        details = part[[lower, upper]].to_numpy(dtype=float)
        told += " [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
    traces.append(
        go.Scatter(
            x=part[x].to_numpy(dtype=float), y=part[y].to_numpy(dtype=float), customdata=details,
            mode="lines+markers" if len(part) <= MARKED else "lines", marker_size=6,
            line={"color": colour, "width": 2, "dash": dash}, hovertemplate=told,
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


def _matched(exact: Effects, estimate: Effects, side: str) -> tuple[list[str], np.ndarray, np.ndarray, int]:
    """The places that both results have, the mean signed effect of each in either, and how many places do not match."""
    one, two = (_means(effects, side) for effects in (exact, estimate))
    shared = [place for place in one if place in two]
    if len(shared) < 2:
        raise ValueError(
            f"{len(shared)} places are in both results, such as {label(next(iter(exact.places)))} in the first and "
            f"{label(next(iter(estimate.places)))} in the second; give the same places to both methods"
        )
    across, up = (np.array([means[place] for place in shared]) for means in (one, two))
    return [label(place) for place in shared], across, up, len({*one, *two}) - len(shared)


def _means(effects: Effects, side: str) -> dict[Any, float]:
    means = effects.where(side=side).signed().double().nanmean(1)
    return {
        place: float(mean) for place, mean in zip(effects.places, means, strict=True) if not bool(torch.isnan(mean))
    }


def _agreement(side: str, across: np.ndarray, up: np.ndarray, left_out: int) -> str:
    constant = np.ptp(across) == 0 or np.ptp(up) == 0
    r = "not defined, one side is constant" if constant else f"{np.corrcoef(across, up)[0, 1]:.3f}"
    missing = f", {left_out} only in one result" if left_out else ""
    return f"{SIDE_NAMES[side]}<br>Pearson r = {r}, {len(across)} places{missing}"


def _cloud(side: str, places: list[str], across: np.ndarray, up: np.ndarray) -> list[go.Scatter]:
    both = np.concatenate([across, up])
    ends = [float(both.min()), float(both.max())]
    return [
        go.Scatter(
            x=ends, y=ends, mode="lines", name="equal", hoverinfo="skip", line={"color": LIGHT.soft, "width": 1}
        ),
        go.Scatter(
            x=across, y=up, mode="markers", name=SIDE_NAMES[side],
            hovertext=[escape(place, quote=False) for place in places],
            marker={"color": LIGHT.series[SIDE_COLOURS[side]], "size": 6, "opacity": 0.6},
            hovertemplate="<b>%{hovertext}</b><br>%{x:.4f} exact, %{y:.4f} estimated<extra></extra>",
        ),
    ]  # fmt: skip


def _source(effects: Effects, role: str) -> str:
    method = effects.meta.get("method", "")
    return f"{role}, mean signed effect" + (f"<br>{escape(method)}" if 0 < len(method) <= 40 else "")
