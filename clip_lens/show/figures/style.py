"""One palette and one base layout for every picture: on light paper, on dark paper, or on none.

Diverging colours are red below 0, neutral at 0, blue above; the colours of series are Okabe and Ito's, which are told
apart with every common colour blindness. Nothing global is set: each figure carries its own template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import plotly.graph_objects as go

from clip_lens.show.figures.figure import Figure, carrying

SMALL, NORMAL, LARGE = 11, 12, 15  # font sizes in pixels


class Theme(NamedTuple):
    """The colours of a picture by their role; a role has another colour in each theme."""

    paper: str
    ink: str
    soft: str
    grid: str
    gap: str
    fill: str
    positive: str
    negative: str
    diverging: tuple[str, ...]
    sequential: tuple[str, ...]
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#222222",
    soft="#5a5a5a",
    grid="#ececec",
    gap="#d4d4d4",
    fill="#fdfdfd",
    positive="#2166ac",
    negative="#b2182b",
    diverging=(
        "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
        "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
    ),
    sequential=("#f6f6f6", "#d5dbec", "#9fb4dd", "#5f88c8", "#2a5ca0", "#0b2f66"),
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b"),
)  # fmt: skip
DARK = Theme(
    paper="#1b1b1b",
    ink="#e6e6e6",
    soft="#a8a8a8",
    grid="#343434",
    gap="#4a4a4a",
    fill="#262626",
    positive="#6cb0e8",
    negative="#f0897b",
    diverging=(
        "#ffc4b8", "#f0897b", "#c2564d", "#85403b", "#523330", "#303030",
        "#2c4256", "#2b5f8c", "#3c86c2", "#6cb0e8", "#b5dbff",
    ),
    sequential=("#2f2f2f", "#2d405e", "#33588f", "#4b7fc4", "#86b1e6", "#d3e6ff"),
    series=("#4a90e2", "#ff8a4c", "#35c9a0", "#f5b8d8", "#ffd24a", "#c5ecff", "#7d7d7d"),
)  # fmt: skip
TRANSPARENT = LIGHT._replace(
    paper="rgba(0,0,0,0)",
    ink="#777777",
    soft="#787878",
    grid="rgba(128,128,128,0.25)",
    positive="#3d83c4",
    negative="#d0503f",
    diverging=(*LIGHT.diverging[:1], "#d0503f", *LIGHT.diverging[2:9], "#3d83c4", *LIGHT.diverging[10:]),
)
"""No paper, and words in a grey that is read on white as on black (4.5 : 1 on both)."""
THEMES = {"light": LIGHT, "dark": DARK, "transparent": TRANSPARENT}

SIDE_COLOURS = {"caption": 0, "foil": 1, "pooled": 2, "overall": 2, "none": 6}
"""The number in a theme's `series` of each side of a pair."""


FigureT = TypeVar("FigureT", bound=go.Figure)


def themed(figure: FigureT, theme: str = "light") -> FigureT:
    """A copy of a figure of this package in the colours of a theme: "light", "dark" or "transparent".

    Every colour of the palette is replaced by that of the same role; other colours, one's own, stay. A transparent
    figure shows the page behind it and is readable on a white as on a black one.

    Raises:
        ValueError: there is no such theme.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> figure = clip_lens.heatmap(toy_effects(), side="foil")
        >>> dark = themed(figure, "dark")
        >>> figure.layout.template.layout.paper_bgcolor, dark.layout.template.layout.paper_bgcolor
        ('#ffffff', '#1b1b1b')
    """
    if theme not in THEMES:
        raise ValueError(f"no theme {theme!r}; the themes are {', '.join(THEMES)}")
    colours = swaps(theme)
    parts = [trace.to_plotly_json() for trace in figure.data], figure.layout.to_plotly_json()
    data, layout = _swapped(list(parts), colours, coloured=False)
    copied = type(figure)(data=data, layout=layout)
    return carrying(copied, figure.frame) if isinstance(figure, Figure) else copied


def swaps(theme: str) -> dict[str, str]:
    """For every colour of every theme the one of the same role in this theme.

    Example:
        >>> swaps("dark")["#ffffff"]
        '#1b1b1b'
    """
    target = list(_roles(THEMES[theme]))
    pairs = [pair for source in THEMES.values() for pair in zip(_roles(source), target, strict=True)]
    return {**dict(pairs), **{faded(colour): faded(swap) for colour, swap in pairs if colour.startswith("#")}}


def faded(colour: str, alpha: float = 0.2) -> str:
    """A colour that lets others through, for the bands of intervals.

    Example:
        >>> faded("#ff0000")
        'rgba(255,0,0,0.2)'
    """
    if not colour.startswith("#"):
        return colour
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def scale(colours: tuple[str, ...]) -> list[list[Any]]:
    """Colours at equal distances, as plotly wants them.

    Example:
        >>> scale(("#ffffff", "#000000"))
        [[0.0, '#ffffff'], [1.0, '#000000']]
    """
    return [[number / (len(colours) - 1), colour] for number, colour in enumerate(colours)]


def template() -> go.layout.Template:
    """The base layout of every picture: paper, words, grid and hover labels.

    Example:
        >>> template().layout.font.color
        '#222222'
    """
    axis = {
        "gridcolor": LIGHT.grid, "linecolor": LIGHT.gap, "tickfont": {"size": NORMAL}, "zeroline": False,
        "zerolinecolor": LIGHT.gap, "title": {"font": {"size": NORMAL}, "standoff": 6}, "automargin": True,
    }  # fmt: skip
    return go.layout.Template(
        layout={
            "paper_bgcolor": LIGHT.paper,
            "plot_bgcolor": LIGHT.paper,
            "font": {"size": NORMAL, "color": LIGHT.ink, "family": "system-ui, sans-serif"},
            "title": {"x": 0.01, "y": 0.99, "yanchor": "top", "font": {"size": LARGE}},
            "hoverlabel": {
                "font": {"size": 13, "color": LIGHT.ink},
                "bgcolor": LIGHT.fill,
                "bordercolor": LIGHT.gap,
                "align": "left",
            },
            "colorway": list(LIGHT.series),
            "xaxis": axis,
            "yaxis": axis,
            "autosize": True,
        }
    )


def under(pixels: int, inner: int) -> dict[str, Any]:
    """A legend in lines, so many pixels below axes of the height `inner`: beside them it would take half of a narrow
    screen. Where it needs more lines it takes room from the axes.

    Example:
        >>> under(40, 400)["y"]
        -0.1
    """
    return {
        "orientation": "h", "y": -pixels / inner, "yanchor": "top", "x": 0.0, "xanchor": "left",
        "font": {"size": NORMAL}, "itemsizing": "trace",
    }  # fmt: skip


def _roles(theme: Theme) -> Iterator[str]:
    for colours in theme:
        yield from (colours,) if isinstance(colours, str) else colours


def _swapped(part: Any, colours: dict[str, str], coloured: bool) -> Any:
    """The part with its colours replaced: only where a name says colour, so that data that looks like one stays."""
    if isinstance(part, dict):
        return {name: _swapped(value, colours, "color" in name) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_swapped(value, colours, coloured) for value in part]
    return colours.get(part, part) if coloured and isinstance(part, str) else part
