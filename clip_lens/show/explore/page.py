"""The explorer's panels as HTML: the same markup for the widget and for the static picture."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.resources import files
from math import isfinite, isnan
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from pandas import DataFrame

from clip_lens.model.site import Site, at_slot, label
from clip_lens.show.explore.desk import LOGITS
from clip_lens.show.explore.view import Panels, Text, View
from clip_lens.show.figures.words import slot_name
from clip_lens.words import capital, counted, decimals, minus

KIND_NAMES = {
    "resid": "residual stream",
    "mid": "residual stream in mid-block",
    "attn": "attention's output",
    "mlp": "MLP's output",
    "head": "head's output",
    "q": "queries of a head",
    "k": "keys of a head",
    "v": "values of a head",
    "pattern": "attention pattern of a head",
}
SOURCE_NAMES = {
    "counterpart": "the other text",
    "zeros": "zeros",
    "mean": "the batch's mean",
    "noise": "itself with noise",
}
FAINT = 0.02
"""Attention weights below it are left out of small patterns, where they would not be seen."""


def render(
    panels: Panels | None,
    *,
    said: list[dict[str, str]],
    code: str,
    picture: str | None,
    live: bool,
    opened: bool = False,
) -> str:
    """The panels as HTML; with `live` every cell is a button that carries what it sets.

    Example:
        >>> render(None, said=[{"kind": "error", "text": "no text"}], code="", picture=None, live=False).count("<li")
        1
    """
    shown = None if panels is None else _words(panels, picture)
    return _template().render(panels=shown, said=said, code=code, live=live, open=opened)


def style() -> str:
    """The style sheet of the panels."""
    return (files("clip_lens.show.explore") / "explore.css").read_text(encoding="utf-8")


def whole_page(html: str, title: str) -> str:
    """A page that shows the panels by itself, light or dark as the browser is.

    Example:
        >>> whole_page("<p>It</p>", "There is <no> star.").count("&lt;no&gt;")
        1
    """
    return _template("page.html.j2").render(html=html, title=title, style=style())


@lru_cache(2)
def _template(name: str = "explore.html.j2") -> Template:
    text = (files("clip_lens.show.explore") / name).read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(
        text
    )


def data_uri(picture: Any) -> str:
    """A PIL image as a PNG inside the page.

    Example:
        >>> from PIL import Image
        >>> data_uri(Image.new("RGB", (1, 1)))[:22]
        'data:image/png;base64,'
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _words(panels: Panels, picture: str | None) -> dict[str, Any]:
    """What the template needs of the panels: titles, cells, bars."""
    view = panels.view
    head = f"head {view.head} of block {panels.block}"
    after = [] if panels.patched is None else [panels.patched.text]
    texts = [*panels.texts, *after]
    return {
        "grid": _effects_grid(panels),
        "says": _says(panels),
        "together": _together(panels),
        "add": _addition(panels),
        "picture": picture,
        "alt": view.image or "no image: judged by the text's own embedding",
        "bars_title": "Logits with the image" if panels.unit == LOGITS else "Cosine with the text's own embedding",
        "bars": _bars(panels),
        "verdict": _verdict(panels),
        "strip_title": f"Attention of {head} from the outlined token",
        "strips": [_strip(text, view.head, text is panels.run) for text in texts],
        "heads_title": f"All heads of block {panels.block}",
        "heads": [_thumbs(text, panels) for text in texts],
        "patterns": [_pattern(text, head, view.head) for text in texts],
        "direct": _direct_grid(panels),
        "sources": _sources_grid(panels),
        "lens": _lens_grid(panels),
    }


def _score(panels: Panels) -> str:
    """What the score is called."""
    return "d" if not panels.view.alone else "the logit" if panels.unit == LOGITS else "the cosine"


def _number(value: float, panels: Panels, *, sign: bool = False) -> str:
    return minus(decimals(value, 2 if panels.unit == LOGITS else 3, sign=sign))


def _in_units(value: float, panels: Panels) -> str:
    """A signed number with its unit where it has one."""
    return f"{_number(value, panels, sign=True)}{' logits' if panels.unit == LOGITS else ''}"


def _change(panels: Panels, moved: float) -> str:
    """The score before and after a patch that takes `moved` away."""
    words = f"{_score(panels)}: {_number(panels.score, panels)} → {_number(panels.score - moved, panels)}"
    return words.replace(" ", "\N{NO-BREAK SPACE}")


# Grids


def _cell(
    value: float, limit: float, text: str, sets: dict[str, Any] | None, title: str, **more: Any
) -> dict[str, Any]:
    gap = not isfinite(value)
    size = 0.0 if gap or not limit else min(abs(value) / limit, 1.0)
    cell = {"value": 0.0 if gap else value, "sets": sets, "title": title, "size": size, "gap": gap, "site": None}
    return {**cell, "text": text, "on": False, "kind": "signed", "joined": False, **more}


def _grid(title: str, below: str, columns: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "below": below, "columns": columns, "rows": rows}


def _row(name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"label": name, "title": name, "cells": cells}


def _effects_grid(panels: Panels) -> dict[str, Any]:
    view, grid = panels.view, panels.grid
    limit = _limit(grid)
    rows = [
        _row(_row_name(view, name), [_effect(panels, number, column, limit) for column in grid.columns])
        for number, name in enumerate(panels.labels)
    ]
    what = capital(KIND_NAMES[view.kind])
    block = f" {view.layer}" if view.one_block else ""
    where = f"heads of block{block}" if view.one_block else _layers_named(view)
    score = _score(panels)
    below = (
        f"Columns: {where}. A cell: the part of {score} that goes when this place is patched"
        f"{', in logits' if panels.unit == LOGITS else ''}; {_number(panels.total, panels)} when all is. "
        "Blue is above 0, red below; hatched: no counterpart."
    )
    title = f"{what} from {SOURCE_NAMES[view.source]}, patched into the {panels.run.name}"
    return _grid(title, below, list(grid.columns), rows)


def _layers_named(view: View) -> str:
    return "layer (0: embedding, l: after l blocks)" if view.kind == "resid" else "block"


def _effect(panels: Panels, row: int, column: int, limit: float) -> dict[str, Any]:
    """A cell of the main grid."""
    value, site = float(panels.grid.iloc[row, column]), panels.layout.at(row, column)
    sets: dict[str, int] = {"layer": site.layer}
    if site.unit is not None:
        sets["head"] = site.unit
    if site.slot is not None:
        sets["query"] = panels.first[row]
    place = _place(panels, site)
    if not isfinite(value):
        title = f"{place}: no counterpart"
    else:
        share = f", {value / panels.total:.2f} of what all would move" if panels.total else ""
        title = f"{place}: {_in_units(value, panels)}{share}; {_change(panels, value)}"
    text = "" if isnan(value) else _number(value, panels)
    on, joined = (row, column) == panels.chosen, site in panels.view.together
    return _cell(value, limit, text, sets, title, on=on, joined=joined, site=asdict(site))


def _row_name(view: View, name: str) -> str:
    return slot_name(name) if view.rows == "slot" else name


def _place(panels: Panels, site: Site) -> str:
    """A place in words: its position is its token."""
    bare = label(at_slot(site, None))
    if site.slot is None:
        return bare
    words: dict[str | int, str] = dict(zip(panels.run.origin, panels.run.tokens, strict=True))
    return f"{bare} at “{words.get(site.slot) or slot_name(site.slot)}”"


def _limit(grid: DataFrame) -> float:
    numbers = grid.abs().to_numpy(dtype=float)
    numbers = numbers[numbers == numbers]
    return float(numbers.max(initial=0.0))


def _direct_grid(panels: Panels) -> dict[str, Any]:
    direct, view = panels.direct, panels.view
    limit, rows, here = _limit(direct), [], (view.head, panels.block)
    for number, name in enumerate(direct.index):
        cells = []
        for column in direct.columns:
            value = float(direct.iloc[number, column])
            head = number < len(direct) - 1
            title = f"{name} of block {column} adds {_in_units(value, panels)} to {_score(panels)} directly"
            sets = {"layer": int(column), "head": number} if head else None
            cells.append(_cell(value, limit, _number(value, panels), sets, title, on=head and (number, column) == here))
        rows.append(_row(name, cells))
    return _grid(
        f"Direct contribution to {_score(panels)}",
        f"{_measured(panels)}, at the token that is read, norms frozen. Columns: block.",
        list(direct.columns),
        rows,
    )


def _measured(panels: Panels) -> str:
    if panels.unit != LOGITS:
        return "Parts of the cosine with the text's own embedding, which is 1"
    return "In logits" if panels.view.alone else "In logits, caption minus foil"


def _sources_grid(panels: Panels) -> dict[str, Any]:
    sources, block = panels.sources, panels.block
    limit, rows = _limit(sources), []
    for number, name in enumerate(panels.tokens):
        cells = []
        for head in sources.columns:
            value = float(sources.iloc[number, head])
            title = f"head {block}.{head} adds {_in_units(value, panels)} from what it reads at “{name}”"
            text = "" if isnan(value) else _number(value, panels)
            cells.append(_cell(value, limit, text, {"layer": block, "head": head}, title))
        rows.append(_row(name, cells))
    return _grid(
        f"Heads of block {block}, by the token they read",
        "A column adds up to the head's direct contribution. Columns: head.",
        list(sources.columns),
        rows,
    )


def _lens_grid(panels: Panels) -> dict[str, Any]:
    lens, rows = panels.lens, []
    limit = _limit(lens)
    for name in lens.index:
        cells = []
        for layer in lens.columns:
            value = float(lens.loc[name, layer])
            title = f"{name} read from layer {layer}: {_number(value, panels)}"
            cells.append(_cell(value, limit, _number(value, panels), {"layer": layer}, title))
        rows.append(_row(str(name), cells))
    what = "logit" if panels.unit == LOGITS else "cosine"
    below = f"The {what} as it would be read before each layer, norms of that layer. Columns: layer."
    return _grid("Logit lens", below, list(lens.columns), rows)


# Texts


def _strip(text: Text, head: int, run: bool) -> dict[str, Any]:
    weights = None if text.query is None else text.patterns[head, text.query]
    cells = []
    for position, token in enumerate(text.tokens):
        weight = 0.0 if weights is None else float(weights[position])
        title = f"{token}: {weight:.3f}" if weights is not None else f"{token}: the outlined token is not in this text"
        on = position == text.query
        cells.append(_cell(weight, 1.0, token, _asks(text, position), title, on=on, kind="token"))
    return {"name": text.name, "run": run, "cells": cells}


def _asks(text: Text, position: int) -> dict[str, int] | None:
    """What a click on a token sets: the run's token that it is matched with."""
    return {"query": text.origin[position]} if text.origin[position] >= 0 else None


def _thumbs(text: Text, panels: Panels) -> dict[str, Any]:
    """The patterns of all heads of the block, small."""
    cells = []
    for head, pattern in enumerate(text.patterns.numpy()):
        sets, on = {"layer": panels.block, "head": head}, head == panels.view.head
        title = f"head {panels.block}.{head}, {text.name}"
        cells.append({"sets": sets, "on": on, "title": title, "head": head, **_drawn(pattern)})
    return {"name": text.name, "cells": cells}


def _drawn(pattern: np.ndarray) -> dict[str, Any]:
    """A pattern as squares of a drawing: where they lie, and how strong."""
    at = np.argwhere(pattern >= FAINT)
    return {"side": len(pattern), "squares": [(int(k), int(q), f"{pattern[q, k]:.2f}") for q, k in at]}


def _pattern(text: Text, title: str, head: int) -> dict[str, Any]:
    rows = []
    for query, token in enumerate(text.tokens):
        cells = []
        for key, seen in enumerate(text.tokens):
            weight = float(text.patterns[head, query, key])
            told = f"{token} looks at {seen}: {weight:.3f}"
            cells.append(_cell(weight, 1.0, "", _asks(text, query), told, on=query == text.query, kind="weight"))
        rows.append(_row(token, cells))
    return {**_grid(f"{capital(title)}, {text.name}", "", text.tokens, rows), "name": text.name}


# Numbers in words


def _bars(panels: Panels) -> dict[str, Any]:
    values = [(text.name, text.logit, text.name) for text in panels.texts]
    if panels.patched is not None:
        values.append((panels.patched.text.name, panels.patched.text.logit, "patched"))
    low, high = min(0.0, *(value for _, value, _ in values)), max(0.0, *(value for _, value, _ in values))
    span = (high - low) or 1.0
    bars = [
        {
            "name": name,
            "kind": kind,
            "text": _number(value, panels),
            "left": round(100 * (min(value, 0.0) - low) / span, 2),
            "width": round(100 * abs(value) / span, 2),
        }
        for name, value, kind in values
    ]
    return {"zero": round(-100 * low / span, 2), "bars": bars}


def _verdict(panels: Panels) -> str:
    if panels.view.alone:
        return ""
    fits = "the caption fits better: right" if panels.score > 0 else "the foil fits better: wrong"
    return minus(f"d = caption - foil = {_number(panels.score, panels)}, {fits}")


def _says(panels: Panels) -> str:
    """The chosen cell in a sentence."""
    view, score = panels.view, _score(panels)
    added = float(panels.direct.iloc[view.head, panels.block])
    head = f"Head {panels.block}.{view.head} adds {_in_units(added, panels)} to {score} directly."
    if panels.chosen is None:
        return head
    place, value = _place(panels, panels.layout.at(*panels.chosen)), float(panels.grid.iloc[panels.chosen])
    if not isfinite(value):
        return f"{capital(place)} has no counterpart. {head}"
    return f"Patching {place}: {_change(panels, value)}. {head}"


def _together(panels: Panels) -> dict[str, Any] | None:
    """The places that are patched together: a chip each, and what they do."""
    view, patched = panels.view, panels.patched
    if not view.together:
        return None
    chips = [
        {"text": _place(panels, site), "site": asdict(site), "rest": _without(view, site)} for site in view.together
    ]
    if patched is None:
        return {"chips": chips, "says": "Nothing of this has a counterpart."}
    together, apart = _change(panels, patched.moved), _change(panels, patched.apart)
    says = f"Patched together: {together}. Their single changes add up to {apart}."
    return {"chips": chips, "says": says}


def _without(view: View, site: Site) -> list[dict[str, Any]]:
    return [asdict(other) for other in view.together if other != site]


def _addition(panels: Panels) -> dict[str, Any] | None:
    """What the button sets that adds the chosen cell to those that are patched together."""
    if panels.chosen is None:
        return None
    site = panels.layout.at(*panels.chosen)
    if site in panels.view.together:
        return None
    sites = replace(panels.view, together=(*panels.view.together, site)).together
    count = counted(len(panels.view.together), "other place")
    text = f"Patch {_place(panels, site)} together with {count if panels.view.together else 'other places'}"
    return {"text": text, "sets": {"together": [asdict(each) for each in sites]}}
