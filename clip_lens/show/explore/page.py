"""The explorer's panels as HTML: the same markup for the widget and for the static picture."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from importlib.resources import files
from math import isfinite
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from pandas import DataFrame

from clip_lens.model.site import Site, label
from clip_lens.show.explore.view import Panels, Text, View
from clip_lens.show.figures.words import SLOT_NAMES
from clip_lens.words import decimals

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


@lru_cache(1)
def _template() -> Template:
    text = (files("clip_lens.show.explore") / "explore.html.j2").read_text(encoding="utf-8")
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
    layer = min(view.layer, len(panels.direct.columns) - 1)
    head = f"head {view.head} of block {layer}"
    ran = _ran(panels)
    return {
        "grid": _effects_grid(panels),
        "says": _says(panels),
        "picture": picture,
        "alt": view.image,
        "bars": _bars(panels),
        "d": f"{panels.d:.2f}",
        "verdict": "the caption fits better: right" if panels.d > 0 else "the foil fits better: wrong",
        "strip_title": f"Attention of {head} from the outlined token",
        "strips": [_strip(text, text.name == ran) for text in panels.texts],
        "patterns": [_pattern(text, head) for text in panels.texts],
        "direct": _direct_grid(panels, layer),
    }


def _ran(panels: Panels) -> str:
    return "caption" if int(panels.effects.pairs["sigma"].iloc[0]) < 0 else "foil"


# Grids


def _cell(value: float, limit: float, sets: dict[str, Any] | None, title: str, **more: Any) -> dict[str, Any]:
    gap = not isfinite(value)
    size = 0.0 if gap or not limit else min(abs(value) / limit, 1.0)
    text = "" if gap else _signed(value).removeprefix("+")
    cell = {"value": 0.0 if gap else value, "sets": sets, "title": title, "size": size, "gap": gap}
    return {**cell, "text": text, "on": False, "kind": "signed", **more}


def _signed(value: float) -> str:
    return decimals(value, sign=True)


def _effects_grid(panels: Panels) -> dict[str, Any]:
    view, grid = panels.view, panels.grid
    limit = _limit(grid)
    total = float(panels.effects.total[0]) * int(panels.effects.pairs["sigma"].iloc[0])
    rows = []
    for number, name in enumerate(panels.labels):
        cells = []
        for layer in grid.columns:
            value = float(grid.iloc[number, layer])
            on = number == panels.chosen and layer == view.layer
            sets = {"layer": int(layer), **_row_sets(view, panels, number)}
            cells.append(_cell(value, limit, sets, _title(view, name, layer, value, total), on=on))
        rows.append({"label": _row_name(view, name), "title": _row_name(view, name), "cells": cells})
    what = KIND_NAMES[view.kind].capitalize().replace("Mlp", "MLP")
    where = "layer (0: embedding, l: after l blocks)" if view.kind == "resid" else "block"
    return {
        "title": f"{what} from {SOURCE_NAMES[view.source]}, patched into the {_ran(panels)}",
        "below": f"Columns: {where}. Each cell: the part of d that this patch moves, in logits; {total:.2f} when all "
        "is patched. Blue is above 0, red below; hatched: no counterpart.",
        "columns": list(grid.columns),
        "rows": rows,
    }


def _row_sets(view: View, panels: Panels, number: int) -> dict[str, int]:
    """What a click on a row sets: a head, or the token whose attention is shown."""
    if view.by_head:
        return {"head": number}
    return {"query": panels.positions[number]}


def _row_name(view: View, name: str) -> str:
    return SLOT_NAMES.get(name, name) if view.rows == "slot" and not view.by_head else name


def _title(view: View, name: str, layer: int, value: float, total: float) -> str:
    place = f"{view.kind} {layer}, {_row_name(view, name)}"
    if not isfinite(value):
        return f"{place}: no counterpart"
    share = f", {value / total:.2f} of what all would move" if total else ""
    return f"{place}: {value:+.3f} logits{share}"


def _limit(grid: DataFrame) -> float:
    numbers = grid.abs().to_numpy(dtype=float)
    numbers = numbers[numbers == numbers]
    return float(numbers.max(initial=0.0))


def _direct_grid(panels: Panels, layer: int) -> dict[str, Any]:
    direct, view = panels.direct, panels.view
    limit = _limit(direct)
    rows = []
    for number, name in enumerate(direct.index):
        cells = []
        for column in direct.columns:
            value = float(direct.iloc[number, column])
            head = number < len(direct) - 1
            title = f"{name} of block {column} adds {value:+.3f} logits to d directly"
            sets = {"layer": int(column), "head": number} if head else None
            cells.append(_cell(value, limit, sets, title, on=head and (number, column) == (view.head, layer)))
        rows.append({"label": name, "title": name, "cells": cells})
    return {
        "title": "Direct contribution to d",
        "below": "In logits, caption minus foil, at the token that is read, norms frozen. Columns: block.",
        "columns": list(direct.columns),
        "rows": rows,
    }


# Texts


def _strip(text: Text, run: bool) -> dict[str, Any]:
    cells = []
    for position, token in enumerate(text.tokens):
        weight = 0.0 if text.query is None else float(text.pattern[text.query, position])
        seen = text.query is not None and position <= text.query
        cells.append(
            _token(text, position, token, weight, f"{token}: {weight:.3f}" if seen else f"{token}: not attended")
        )
    return {"name": text.name, "run": run, "cells": cells}


def _token(text: Text, position: int, token: str, weight: float, title: str) -> dict[str, Any]:
    origin = text.origin[position]
    sets = {"query": origin} if origin >= 0 else None
    return _cell(weight, 1.0, sets, title, text=token, on=position == text.query, kind="token", gap=False)


def _pattern(text: Text, head: str) -> dict[str, Any]:
    rows = []
    for query, token in enumerate(text.tokens):
        origin = text.origin[query]
        sets = {"query": origin} if origin >= 0 else None
        cells = []
        for key, seen in enumerate(text.tokens):
            weight = float(text.pattern[query, key])
            title = f"{token} looks at {seen}: {weight:.3f}"
            cells.append(_cell(weight, 1.0, sets, title, text="", on=query == text.query, kind="weight"))
        rows.append({"label": token, "title": token, "cells": cells})
    return {"title": f"{head.capitalize()}, {text.name}", "name": text.name, "columns": text.tokens, "rows": rows}


def _bars(panels: Panels) -> list[dict[str, Any]]:
    ran = _ran(panels)
    values = [(text.name, text.logit, text.name) for text in panels.texts]
    if isfinite(panels.patched) and panels.chosen is not None:
        values.append((f"{ran}, patched", panels.patched, "patched"))
    low, high = min(0.0, *(value for _, value, _ in values)), max(0.0, *(value for _, value, _ in values))
    span = (high - low) or 1.0
    return [
        {
            "name": name,
            "kind": kind,
            "text": f"{value:.2f}",
            "left": round(100 * (min(value, 0.0) - low) / span, 2),
            "width": round(100 * abs(value) / span, 2),
        }
        for name, value, kind in values
    ]


def _says(panels: Panels) -> str:
    """The chosen cell in a sentence."""
    view = panels.view
    layer = min(view.layer, len(panels.direct.columns) - 1)
    head = f"Head {layer}.{view.head} adds {_signed(panels.direct.iloc[view.head, layer])} logits to d directly."
    if panels.chosen is None:
        return head
    value = float(panels.grid.iloc[panels.chosen, view.layer])
    place = label(Site(view.kind, view.layer, view.head if view.by_head else None))
    where = "" if view.by_head else f" at “{_row_name(view, panels.labels[panels.chosen])}”"
    moved = f"moves {_signed(value)} logits of d" if isfinite(value) else "has no counterpart"
    return f"Patching {place}{where} {moved}. {head}"
