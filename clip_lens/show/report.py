"""Named results -> one HTML file that needs nothing else: findings in words, figures, tables, example pairs."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup
from pandas import DataFrame
from plotly.offline import get_plotlyjs

from clip_lens.core.effects import SEGMENTS, SIDES, Effects
from clip_lens.core.files import written_whole
from clip_lens.model.site import Edge
from clip_lens.show.edges import path_diagram
from clip_lens.show.plots import SIDE_NAMES, VALUE_NAMES, heatmap, largest, slot_name

WHAT = (
    "method",
    "run",
    "source",
    "metric",
    "scale",
    "model",
    "weights",
    "data",
    "images",
    "pairs",
    "selected",
    "versions",
)
NEGATION_IN = {"caption": "the caption", "foil": "the foil", "none": "neither"}
DROPPED = ("pairs dropped", "dropped")
KIND_NAMES = {
    "embed": "the embedding",
    "resid": "the residual stream",
    "mid": "the residual stream between attention and MLP",
    "attn": "the attention's output",
    "mlp": "the MLP's output",
    "head": "a head's output",
    "q": "the queries",
    "k": "the keys",
    "v": "the values",
    "pattern": "the attention pattern",
    "neuron": "a neuron's activation",
}
MOST_FIGURES = 12  # per result
MOST_UNITS = 40  # heads, neurons or joint places, as rows of a figure
MOST_ENDS = 48  # senders, or receivers, of a figure
MOST_PATHS = 30  # edges of a path diagram
PICTURE = 192  # pixels, the longer edge of an embedded picture


class _View(NamedTuple):
    """A part of a result that one figure per side can show; `paths`: as a path diagram."""

    effects: Effects
    rows: str
    columns: str
    name: str = ""
    note: str = ""
    paths: bool = False


def report(
    results: Mapping[str, Effects],
    out: str | os.PathLike[str],
    *,
    title: str = "What patching moves",
    summary: str | None = None,
    pictures: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
) -> Path:
    """The path of one HTML file that shows named results and loads nothing from anywhere.

    It states in words which places move the largest share, what was run on what, how many pairs there were and which
    were dropped, and shows a figure per side, the largest effects with their intervals and example pairs. `pictures` is
    a folder that holds the image ids, or a mapping from image id to file; a pair without a picture shows its texts.
    `summary` is a sentence of yours, put first. An interrupted call leaves an existing file as it was.

    Raises:
        ValueError: no results, or one without places or pairs.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> page = report({"resid": toy_effects()}, getfixture("tmp_path") / "report.html", title="Toy")
        >>> "negator" in page.read_text(encoding="utf-8")
        True
    """
    if not results:
        raise ValueError("no results to report on; give a mapping from a name to an Effects")
    for name, effects in results.items():
        if not effects.places or not len(effects.pairs):
            raise ValueError(f"the result {name!r} is empty: {effects!r}")
    figures: dict[str, dict[str, Any]] = {}
    shared = _shared(results)
    page = _template().render(
        title=title,
        summary=summary,
        results=[_result(name, effects, shared, figures) for name, effects in results.items()],
        shared={name: shared[name] for name in WHAT if name in shared},
        pair_counts=_pair_counts(results),
        dropped="; ".join(dict.fromkeys(e.meta[name] for e in results.values() for name in DROPPED if name in e.meta)),
        examples=_examples(next(iter(results.values())), pictures),
        figures_json=Markup(
            json.dumps(figures).replace("<", "\\u003c")
        ),  # "</script>" in a label must not end the script
        plotly_js=Markup(get_plotlyjs()),
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _template() -> Any:
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)


def _shared(results: Mapping[str, Effects]) -> dict[str, str]:
    """The meta that all results have in common."""
    first, *others = (effects.meta for effects in results.values())
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _result(
    name: str, effects: Effects, shared: Mapping[str, str], figures: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What the template shows of one result; its figures are added to `figures` under their ids."""
    views = _views(effects)
    sides = [side for side in SIDES if side in set(effects.pairs["side"])]
    shown = [(view, side) for view in views for side in sides]
    limit = max((largest(_grid(view, side)) for view, side in shown if not view.paths), default=0.0)
    left_out = len(shown) - MOST_FIGURES
    return {
        "name": name,
        "findings": [_finding(views, effects, side) for side in sides],
        "own": {key: effects.meta[key] for key in WHAT if key in effects.meta and key not in shared},
        "figures": [_figure(view, side, limit, figures) for view, side in shown[:MOST_FIGURES]],
        "left_out": f"{left_out} further figures are left out; Effects.grid and heatmap give them."
        if left_out > 0
        else "",
        "wide": any(_grid(view, side).shape[1] > 16 for view, side in shown),
        "shares": _is_share(effects),
        "unit": _unit(effects),
        "table": [_table_row(row) for row in effects.top(8).itertuples()],
        "meta": effects.meta,
    }


# Figures


def _views(effects: Effects) -> list[_View]:
    """Slots (else heads or neurons) as rows and layers as columns; a view for each kind, and for each slot of units.

    Edges: a diagram of the strongest, and senders by receivers, for each slot.
    """
    index = effects.index
    if all(isinstance(place, Edge) for place in effects.places):
        return [_View(effects, "sender", "receiver", "the strongest paths", paths=True), *_ends(effects)]
    if index[["kind", "layer"]].isna().any(axis=None):  # sites of several kinds or layers, patched together
        return [_busiest(_View(effects, "place", "kind"), "place", MOST_UNITS, "places")]
    rows = "unit" if index["unit"].notna().any() else "slot"
    parts = [part for part in ("kind", "slot") if part != rows]
    views = []
    for entries in index[parts].astype(object).drop_duplicates().itertuples(index=False):
        chosen = dict(zip(parts, (None if entry is pd.NA else entry for entry in entries), strict=True))
        part = effects.where(**chosen)
        names = [str(chosen["kind"])] if index["kind"].nunique() > 1 else []
        names += [slot_name(chosen["slot"])] if "slot" in chosen and index["slot"].nunique(dropna=False) > 1 else []
        view = _View(part, rows, "layer", ", ".join(names))
        views.append(_busiest(view, "unit", MOST_UNITS, "units") if rows == "unit" else view)
    return views


def _ends(effects: Effects) -> list[_View]:
    """Senders by receivers, a view for each slot."""
    slots = dict.fromkeys(None if slot is pd.NA else slot for slot in effects.index["slot"].astype(object))
    views = []
    for slot in slots:
        name = f"senders and receivers, {slot_name(slot)}" if len(slots) > 1 else "senders and receivers"
        view = _View(effects.where(slot=slot), "sender", "receiver", name)
        view = _busiest(view, "sender", MOST_ENDS, "senders")
        views.append(_busiest(view, "receiver", MOST_ENDS, "receivers"))
    return views


def _busiest(view: _View, column: str, most: int, words: str) -> _View:
    """The view with no more entries of a column than a figure can show: those of the largest effects."""
    count = view.effects.index[column].nunique()
    if count <= most:
        return view
    order = view.effects.fraction().assign(size=lambda table: table["effect"].abs()).groupby(column)["size"].max()
    kept = order.nlargest(most).index
    note = f"{view.note} Shown are the {most} of {count} {words} with the largest effects."
    return view._replace(effects=view.effects.where(**{column: list(kept)}), note=note)


def _grid(view: _View, side: str) -> DataFrame:
    if view.paths:
        return DataFrame()
    return view.effects.grid(view.rows, view.columns, _value(view.effects), side=side)


def _is_share(effects: Effects) -> bool:
    """Whether fractions mean something: with the counterpart patched everywhere, the run becomes the other text's."""
    return effects.meta.get("source", "counterpart") == "counterpart"


def _value(effects: Effects) -> str:
    return "fraction" if _is_share(effects) else "effect"


def _unit(effects: Effects) -> str:
    return "logits" if effects.meta.get("metric", "logit").startswith("logit") else "metric units"


def _figure(view: _View, side: str, limit: float, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    chosen = view.effects.where(side=side)
    value = _value(view.effects)
    if view.paths:
        figure = path_diagram(chosen, MOST_PATHS)
    else:
        figure = heatmap(chosen, view.rows, view.columns, value, title="", limit=limit)
    name = f"figure-{len(figures) + 1}"
    grid = _grid(view, side)
    figures[name] = {**json.loads(figure.to_json()), "columns": grid.shape[1]}
    top = chosen.fraction().dropna(subset=value)
    peak = top.loc[top[value].abs().idxmax()] if len(top) else None
    words = ", ".join(filter(None, (view.name, SIDE_NAMES[side])))
    count = chosen.pairs["key"].nunique()
    what = "Path diagram" if view.paths else f"Heat map of the {VALUE_NAMES[value]} by {view.rows} and {view.columns}"
    alt = f"{what}: {words}, {count} pairs."
    return {
        "id": name,
        "title": f"{words[0].upper()}{words[1:]} ({_counted(count)})",
        "height": figure.layout.height,
        "alt": alt if peak is None else f"{alt} The largest, {peak[value]:.2f}, is at {peak['place']}.",
        "caption": _caption(view, bool(grid.isna().any(axis=None))),
    }


def _caption(view: _View, gaps: bool) -> str:
    """How to read a figure."""
    if view.paths:
        return (
            f"The up to {MOST_PATHS} paths of the largest mean signed effect. A line is a path, its width the effect, "
            "blue where that is positive, red where it is negative. Hover over a line or a node for the numbers."
        )
    lines = [
        f"{_what_is_patched(view.effects)} {_reading(view.effects)}",
        " Layer 0 is the embedding, layer l the output of block l." if _kinds(view.effects) == {"resid"} else "",
        (" Grey: no such path." if view.rows == "sender" else " Grey: no pair has a counterpart there.")
        if gaps
        else "",
        view.note,
    ]
    return "".join(lines)


def _kinds(effects: Effects) -> set[str]:
    return set(effects.index["kind"])


def _what_is_patched(effects: Effects) -> str:
    source = effects.meta.get("source", "counterpart")
    if _kinds(effects) == {"edge"}:
        through = " and through MLPs" if "MLP" in effects.meta.get("method", "") else ""
        return f"Each cell patches what a sender gives a receiver directly{through}, from the {source}."
    kinds = [KIND_NAMES.get(kind, kind) for kind in dict.fromkeys(effects.index["kind"].dropna())]
    tokens = "single tokens, averaged over pairs and tokens" if "token" in effects.pairs else "a slot's tokens together"
    slots = f" ({tokens})" if effects.index["slot"].notna().any() else ""
    patched = f"Each cell replaces {' and '.join(kinds) or 'several activations'} at one place"
    return f"{patched}{slots} by what the {source} gives there."


def _reading(effects: Effects) -> str:
    """What a cell's number is."""
    if not _is_share(effects):
        return f"Its number is the mean signed effect in {_unit(effects)}: {_signs(effects)} 0, white, is nothing."
    return (
        f"Its number is the share of {_whole(effects)} that this alone moves, a ratio of means over pairs: "
        f"0, white, is nothing and 1 all of it; {_signs(effects)}"
    )


def _signs(effects: Effects) -> str:
    """What blue and red mean: an effect times sigma counts with d, whichever text is run."""
    if _is_share(effects):
        return "blue moves it the way the whole does, red the other way."
    if _unit(effects) == "logits":
        return "blue lowers the caption's lead over the foil by that much, red raises it."
    return "blue is positive, red negative."


# Words and numbers


def _whole(effects: Effects) -> str:
    """What the fractions are shares of."""
    plain = effects.meta.get("source", "counterpart") == "counterpart"
    return "d" if plain and effects.meta.get("metric", "logit").startswith("logit") else "the total effect"


def _finding(views: list[_View], effects: Effects, side: str) -> str:
    """One side's numbers as a sentence: the slot of the largest share at each layer, else the largest effect of all."""
    count = effects.pairs.loc[effects.pairs["side"] == side, "key"].nunique()
    start = f"{SIDE_NAMES[side].capitalize()} ({_counted(count)}): "
    by_slot = len(views) == 1 and views[0].rows == "slot" and _is_share(effects)
    runs = _runs(_grid(views[0], side)) if by_slot else []
    if 0 < len(runs) <= 4 and len(views[0].effects.index["slot"].drop_duplicates()) > 1:
        layer = "layer" if set(effects.index["kind"]) == {"resid"} else "block"
        steps = [f'"{slot_name(slot)}" {_span(layer, cells)}' for slot, cells in runs]
        return f"{start}the largest share of {_whole(effects)} moves at {', then at '.join(steps)}."
    top = effects.where(side=side).top(1)
    if top["effect"].isna().all():
        return f"{start}no place has a value."
    row = _table_row(next(top.itertuples()))
    share = (
        f", {row['fraction']} of {_whole(effects)} (95 % interval {row['interval']})"
        if row["fraction"] and _is_share(effects)
        else ""
    )
    effect = f"{row['effect']} {row['effect_interval']}"
    return f"{start}the largest mean signed effect in size is that of {row['place']}: {effect}{share}."


def _runs(grid: DataFrame) -> list[tuple[Any, list[tuple[Any, float]]]]:
    """Consecutive layers at which the same slot has the largest fraction: [(slot, [(layer, fraction), ...]), ...]."""
    grid = grid.loc[:, grid.notna().any()]
    best = [(grid.index[int(grid[layer].argmax())], layer, float(grid[layer].max())) for layer in grid.columns]
    return [
        (slot, [(layer, share) for _, layer, share in run]) for slot, run in groupby(best, key=lambda cell: cell[0])
    ]


def _span(layer: str, cells: list[tuple[Any, float]]) -> str:
    (first, share), (last, end) = cells[0], cells[-1]
    if first == last:
        return f"in {layer} {first} ({100 * share:.0f} %)"
    return f"from {layer} {first} ({100 * share:.0f} %) to {layer} {last} ({100 * end:.0f} %)"


def _counted(count: int) -> str:
    return f"{count} pair" if count == 1 else f"{count} pairs"


def _table_row(row: Any) -> dict[str, Any]:
    return {
        "place": row.place,
        "side": NEGATION_IN[row.side],
        "fraction": _number(row.fraction),
        "interval": f"[{_number(row.lower)}, {_number(row.upper)}]",
        "effect": _number(row.effect),
        "effect_interval": f"[{_number(row.effect_lower)}, {_number(row.effect_upper)}]",
        "n": row.n,
        "dropped": row.dropped,
    }


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


# Pairs


def _pair_counts(results: Mapping[str, Effects]) -> list[dict[str, Any]]:
    """Pairs by side and segment; results on the same pairs share a table."""
    tables: list[dict[str, Any]] = []
    for name, effects in results.items():
        pairs = effects.pairs.drop_duplicates("key")
        found = list(dict.fromkeys([*SEGMENTS, *pairs["segment"]]))
        rows = []
        for side in (side for side in SIDES if side in set(pairs["side"])):
            part = pairs[pairs["side"] == side]
            counts = [int((part["segment"] == segment).sum()) for segment in found]
            rows.append(
                {"side": NEGATION_IN[side], "counts": counts, "total": len(part), "d": _number(part["d"].mean())}
            )
        same = next((table for table in tables if table["rows"] == rows and table["segments"] == found), None)
        if same:
            same["names"] += f", {name}"
        else:
            tables.append({"names": name, "segments": found, "rows": rows})
    return tables


def _examples(effects: Effects, pictures: Any) -> list[dict[str, Any]]:
    """On each side the pair of the largest, the middle and the smallest d."""
    pairs = effects.pairs.drop_duplicates("key").sort_values("d", ascending=False, kind="stable")
    examples = []
    for side in SIDES:
        part = pairs[pairs["side"] == side]
        for number in sorted({0, len(part) // 2, len(part) - 1} if len(part) else ()):
            row = part.iloc[number]
            texts = {name: str(row[name]) for name in ("key", "caption", "foil", "segment")}
            picture = _picture(str(row["image"]), pictures)
            examples.append({**texts, "side": SIDE_NAMES[side], "d": _number(float(row["d"])), "picture": picture})
    return examples


def _picture(image: str, pictures: Any) -> Markup | None:
    """A small copy as a data URI; None without a readable file. An id never leads out of the folder."""
    from PIL import Image

    if pictures is None:
        return None
    if isinstance(pictures, Mapping):
        file = Path(pictures[image]) if image in pictures else None
    else:
        folder = Path(pictures).resolve()
        file = (folder / image).resolve()
        file = file if file.is_relative_to(folder) else None
    if file is None or not file.is_file():
        return None
    try:
        with Image.open(file) as opened:
            opened.thumbnail((PICTURE, PICTURE))
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "JPEG", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return Markup("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
