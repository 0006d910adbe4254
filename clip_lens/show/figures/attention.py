"""Attention patterns over the tokens of a pair: what the run attends to, what its counterpart does, the difference."""

from __future__ import annotations

from html import escape, unescape
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas import DataFrame
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.show.figures.figure import Figure, carrying, subplots
from clip_lens.show.figures.heatmap import CELLS
from clip_lens.show.figures.style import LIGHT, NORMAL, SMALL, scale, template

TITLES = {"caption": "caption", "foil": "foil", "affirmative": "without negation", "negated": "with negation"}
OTHERS = {"caption": "foil", "foil": "caption", "affirmative": "negated", "negated": "affirmative"}
BESIDE = 14  # tokens; of more the two texts stand one above the other
CELL, TOP, GAP, BELOW = 21, 62, 100, 144  # pixels: of a token, the heading, between panels, labels and colour bars
CHANGE = "difference, other - run"


class _Pattern(NamedTuple):
    """One text's attention [query, key] with its tokens."""

    title: str
    tokens: list[str]
    weights: np.ndarray


def patterns(encoder: HookedTextEncoder, batch: Batch | str, layer: int = 0, head: int = 0, pair: int = 0) -> Figure:
    """A plotly figure of one head's attention in both texts of a pair, and of the difference, other minus run; or in a
    text of its own, `patterns(encoder, "There are no circles.", 2, 1)`.

    Rows are queries, columns keys; weights of a row sum to 1. In the difference each position of the run stands against
    the one it is aligned with (method section 3); grey: no counterpart. Its limit is its largest absolute value.

    Raises:
        ValueError: no such layer, head or pair.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder, run="foil")
        >>> figure = patterns(encoder, batch, layer=2, head=1)
        >>> [trace.name for trace in figure.data][:3]
        ['run: foil', 'other: caption', 'difference, other - run']
        >>> patterns(encoder, "There are no circles.", layer=2, head=1).data[0].z.shape
        (7, 7)
    """
    alone = isinstance(batch, str)
    for name, number, most in (
        ("layer", layer, encoder.n_layers), ("head", head, encoder.n_heads), ("pair", pair, 1 if alone else len(batch))
    ):  # fmt: skip
        if not 0 <= number < most:
            raise ValueError(f"{name} counts from 0 to {most - 1} here. Got {number}")
    if not isinstance(batch, str | Batch):
        raise TypeError(f"patterns are of a Batch, or of one text. Got {batch!r}")
    hook, heading = f"blocks.{layer}.attn.hook_pattern", f"head {layer}.{head}"
    if isinstance(batch, str):
        tokens = encoder.tokens(batch)
        tokens = tokens[0, : int(encoder.length(tokens))]
        return _figure([_Pattern("attention", _words(encoder, tokens), _weights(encoder, tokens, hook, head))], heading)
    both = [
        (f"{role}: {TITLES.get(which, which)}", tokens[pair, : int(length[pair])])
        for role, which, tokens, length in (
            ("run", batch.run, batch.tokens, batch.length),
            ("other", OTHERS.get(batch.run, "counterpart"), batch.other, batch.other_length),
        )
    ]
    texts = [_Pattern(title, _words(encoder, tokens), _weights(encoder, tokens, hook, head)) for title, tokens in both]
    origin = batch.origin[pair, : len(texts[0].tokens)].cpu().numpy()
    moved = difference(texts[0].weights, texts[1].weights, origin)
    return _figure([*texts, _Pattern(CHANGE, _both(texts[0], texts[1], origin), moved)], heading)


def difference(run: np.ndarray, other: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """The other's pattern minus the run's, [query, key] in the run's positions; NaN where one has no counterpart.

    `origin[p]` is the position in the other that matches position p of the run, -1 = none.

    Example:
        >>> run, other = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[1.0]])
        >>> difference(run, other, np.array([0, -1])).tolist()
        [[0.0, nan], [nan, nan]]
    """
    known = origin >= 0
    moved = other[np.ix_(np.where(known, origin, 0), np.where(known, origin, 0))]
    return np.where(known[:, None] & known[None, :], moved - run, np.nan)


def _weights(encoder: HookedTextEncoder, tokens: Tensor, hook: str, head: int) -> np.ndarray:
    return encoder.cache(tokens[None], names=hook)[hook][0, head, : len(tokens), : len(tokens)].cpu().numpy()


def _words(encoder: HookedTextEncoder, tokens: Tensor) -> list[str]:
    """The tokens as texts, the special ones shortened; their ids where there is no tokenizer."""
    if encoder.tower.tokenizer is None:
        return [str(token) for token in tokens.tolist()]
    words = encoder.tower.to_str_tokens(tokens)
    return [escape(word.replace("_of_text>", ">"), quote=False) for word in words]


def _both(run: _Pattern, other: _Pattern, origin: np.ndarray) -> list[str]:
    """The run's tokens, and behind those that are another in the counterpart what stands there."""
    there = ["none" if place < 0 else other.tokens[place] for place in origin]
    return [word if word == match else f"{word} / {match}" for word, match in zip(run.tokens, there, strict=True)]


def _figure(drawn: list[_Pattern], heading: str) -> Figure:
    """One text's pattern, or those of two texts and the difference."""
    longest, moved = max(len(text.tokens) for text in drawn), drawn[-1].weights
    beside = longest <= BESIDE and len(drawn) > 1
    inner = CELL * longest
    shape: list[list[dict[str, int] | None]]
    shape = [[{}, {}], [{"colspan": 2}, None]] if beside else [[{}] for _ in drawn]
    figure = subplots(
        rows=len(shape), cols=len(shape[0]), specs=shape, horizontal_spacing=0.2 if beside else 0,
        subplot_titles=[text.title for text in drawn],
        vertical_spacing=GAP / (inner * len(shape) + GAP * (len(shape) - 1)) if len(shape) > 1 else None,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    places = [(1, 1), (1, 2), (2, 1)] if beside else [(1, 1), (2, 1), (3, 1)]
    for text, (row, col), axis in zip(drawn, places, ("coloraxis", "coloraxis", "coloraxis2"), strict=False):
        for trace in _cells(text, axis):
            figure.add_trace(trace, row=row, col=col)
        figure.update_xaxes(_ticks(text.tokens, across=True), row=row, col=col)
        figure.update_yaxes(_ticks(text.tokens, across=False), row=row, col=col)
    height = TOP + inner * len(shape) + GAP * (len(shape) - 1) + BELOW
    limit = float(np.nanmax(np.abs(moved), initial=0.0)) or 1.0
    figure.update_layout(
        template=template(), height=height, margin={"t": TOP, "b": BELOW, "l": 10, "r": 14},
        title={"text": f"{heading}: queries down, keys across"},
        coloraxis={
            "colorscale": scale(LIGHT.sequential), "cmin": 0, "cmax": 1,
            "colorbar": _bar("attention", 0.22, height),
        },
        coloraxis2={
            "colorscale": scale(LIGHT.diverging), "cmin": -limit, "cmax": limit,
            "colorbar": _bar("difference", 0.78, height),
        },
    )  # fmt: skip
    return carrying(figure, pd.concat([_long(text) for text in drawn]))


def _long(text: _Pattern) -> DataFrame:
    """A pattern as a table with a row for each query and key."""
    query, key = np.nonzero(~np.isnan(text.weights))
    words = np.array([unescape(word) for word in text.tokens], dtype=object)
    return DataFrame(
        {
            "text": text.title, "query": query, "query token": words[query], "key": key, "key token": words[key],
            "weight": text.weights[query, key],
        }
    )  # fmt: skip


def _cells(text: _Pattern, axis: str) -> list[go.Heatmap]:
    words = [[f"{query} → {key}" for key in text.tokens] for query in text.tokens]
    gaps = np.isnan(text.weights)
    traces = [
        go.Heatmap(
            z=text.weights, coloraxis=axis, name=text.title, text=words,
            hovertemplate="%{text}<br><b>%{z:.3f}</b><extra></extra>", **CELLS,
        )
    ]  # fmt: skip
    if gaps.any():
        traces.append(
            go.Heatmap(
                z=np.where(gaps, 0.0, np.nan), colorscale=[[0, LIGHT.gap], [1, LIGHT.gap]], showscale=False, text=words,
                name="no counterpart", hovertemplate="%{text}<br>no counterpart<extra></extra>", **CELLS,
            )
        )  # fmt: skip
    return traces


def _ticks(tokens: list[str], across: bool) -> dict[str, object]:
    count = len(tokens)
    axis = {"tickvals": list(range(count)), "ticktext": tokens, "tickfont": {"size": SMALL}, "showgrid": False}
    return axis | ({"tickangle": -90} if across else {"range": [count - 0.5, -0.5]})


def _bar(title: str, x: float, height: int) -> dict[str, object]:
    return {
        "orientation": "h", "thickness": 10, "ypad": 0, "len": 0.4, "x": x, "yref": "container", "y": 58 / height,
        "yanchor": "top", "tickfont": {"size": SMALL}, "outlinewidth": 0, "nticks": 4,
        "title": {"text": title, "side": "bottom", "font": {"size": NORMAL}},
    }  # fmt: skip
