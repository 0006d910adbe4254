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
from clip_lens.show.plots import SIDE_NAMES, heatmap, largest, slot_name

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
MOST_UNITS = 40  # heads or neurons, as rows of a figure
PICTURE = 192  # pixels, the longer edge of an embedded picture


class _View(NamedTuple):
    """A part of a result that one figure per side can show."""

    effects: Effects
    rows: str
    columns: str
    name: str = ""
    note: str = ""


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
    limit = max(largest(_grid(view, side)) for view, side in shown)
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
        "table": [_table_row(row) for row in effects.top(8).itertuples()],
        "meta": effects.meta,
    }


# Figures


def _views(effects: Effects) -> list[_View]:
    """Slots (else heads or neurons) as rows and layers as columns; a view for each kind, and for each slot of units."""
    index = effects.index
    if index[["kind", "layer"]].isna().any(axis=None):  # sites of several kinds or layers, patched together
        return [_View(effects, "place", "kind")]
    rows = "unit" if index["unit"].notna().any() else "slot"
    parts = [part for part in ("kind", "slot") if part != rows]
    views = []
    for entries in index[parts].astype(object).drop_duplicates().itertuples(index=False):
        chosen = dict(zip(parts, (None if entry is pd.NA else entry for entry in entries), strict=True))
        part = effects.where(**chosen)
        names = [str(chosen["kind"])] if index["kind"].nunique() > 1 else []
        names += [slot_name(chosen["slot"])] if "slot" in chosen and index["slot"].nunique(dropna=False) > 1 else []
        views.append(_busiest(_View(part, rows, "layer", ", ".join(names))))
    return views


def _busiest(view: _View) -> _View:
    """The view with no more heads or neurons than a figure can show: those of the largest effects."""
    units = view.effects.index["unit"].nunique()
    if view.rows != "unit" or units <= MOST_UNITS:
        return view
    order = view.effects.fraction().assign(size=lambda table: table["effect"].abs()).groupby("unit")["size"].max()
    kept = order.nlargest(MOST_UNITS).index
    note = f" Shown are the {MOST_UNITS} of {units} units with the largest effects."
    return view._replace(effects=view.effects.where(unit=list(kept)), note=note)


def _grid(view: _View, side: str) -> DataFrame:
    return view.effects.grid(view.rows, view.columns, side=side)


def _figure(view: _View, side: str, limit: float, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    chosen = view.effects.where(side=side)
    figure = heatmap(chosen, view.rows, view.columns, title="", limit=limit)
    name = f"figure-{len(figures) + 1}"
    grid = _grid(view, side)
    figures[name] = {**json.loads(figure.to_json()), "columns": grid.shape[1]}
    top = chosen.fraction().dropna(subset="fraction")
    peak = top.loc[top["fraction"].abs().idxmax()] if len(top) else None
    words = ", ".join(filter(None, (view.name, SIDE_NAMES[side])))
    count = chosen.pairs["key"].nunique()
    alt = f"Heat map of the recovered fraction by {view.rows} and {view.columns}: {words}, {count} pairs."
    return {
        "id": name,
        "title": f"{words[0].upper()}{words[1:]} ({_counted(count)})",
        "height": figure.layout.height,
        "alt": alt if peak is None else f"{alt} The largest, {peak['fraction']:.2f}, is at {peak['place']}.",
        "caption": _caption(view, bool(grid.isna().any(axis=None))),
    }


def _caption(view: _View, gaps: bool) -> str:
    """How to read a figure."""
    effects = view.effects
    kinds = [KIND_NAMES.get(kind, kind) for kind in dict.fromkeys(effects.index["kind"].dropna())]
    slots = effects.index["slot"].notna().any()
    tokens = "single tokens, averaged over pairs and tokens" if "token" in effects.pairs else "a slot's tokens together"
    source = effects.meta.get("source", "counterpart")
    patched = f"Each cell replaces {' and '.join(kinds) or 'several activations'} at one place"
    lines = [
        f"{patched} ({tokens})" if slots else patched,
        f" by what the {source} gives there. Its number is the share of {_whole(effects)} that this alone moves,",
        " a ratio of means over pairs: 0, white, is nothing and 1 all of it; blue moves it the way the whole does,",
        " red the other way.",
        " Layer 0 is the embedding, layer l the output of block l." if set(effects.index["kind"]) == {"resid"} else "",
        " Grey: no pair has a counterpart there." if gaps else "",
        view.note,
    ]
    return "".join(lines)


# Words and numbers


def _whole(effects: Effects) -> str:
    """What the fractions are shares of."""
    plain = effects.meta.get("source", "counterpart") == "counterpart"
    return "d" if plain and effects.meta.get("metric", "logit").startswith("logit") else "the total effect"


def _finding(views: list[_View], effects: Effects, side: str) -> str:
    """One side's numbers as a sentence: the slot of the largest share at each layer, else the largest effect of all."""
    count = effects.pairs.loc[effects.pairs["side"] == side, "key"].nunique()
    start = f"{SIDE_NAMES[side].capitalize()} ({_counted(count)}): "
    runs = _runs(_grid(views[0], side)) if len(views) == 1 and views[0].rows == "slot" else []
    if 0 < len(runs) <= 4 and len(views[0].effects.index["slot"].drop_duplicates()) > 1:
        layer = "layer" if set(effects.index["kind"]) == {"resid"} else "block"
        steps = [f'"{slot_name(slot)}" {_span(layer, cells)}' for slot, cells in runs]
        return f"{start}the largest share of {_whole(effects)} moves at {', then at '.join(steps)}."
    top = effects.where(side=side).top(1)
    if top["effect"].isna().all():
        return f"{start}no place has a value."
    row = _table_row(next(top.itertuples()))
    share = f", {row['fraction']} of {_whole(effects)} (95 % interval {row['interval']})" if row["fraction"] else ""
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
