"""Effects -> a section of a report: what moved most in words, a figure per side, the largest effects, all numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.table import SIDES
from clip_lens.model.site import Edge
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.figure import Figure
from clip_lens.show.figures.heatmap import heatmap, largest
from clip_lens.show.figures.network import network
from clip_lens.show.figures.words import SHARES, place_name, side_name, slot_name, value_name
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.show.report.words import gap, reading, what_is_shown, whole
from clip_lens.words import capital, counted, decimals, interval, listed, minus

NEGATION_IN = {"caption": "the caption", "foil": "the foil", "none": "neither"}
MOST_FIGURES = 12  # per result
MOST_UNITS = 40  # heads or neurons, as rows of a figure; bars
MOST_ENDS = 48  # senders, or receivers, of a figure
MOST_PATHS = 30  # edges of a path diagram
TOP = 8  # rows of the table, per side


Mark = Literal["cell", "line", "bar"]
FIGURES: dict[Mark, str] = {"cell": "Heat map", "line": "Diagram", "bar": "Bars"}
"""What a figure is in which a place is a cell, a line or a bar."""


class _View(NamedTuple):
    """A part of a result that one figure per side can show: a heat map by `rows` and `columns`, lines or bars."""

    effects: Effects
    rows: str = "place"
    columns: str = "side"
    name: str = ""
    note: str = ""
    mark: Mark = "cell"


def section_of(name: str, effects: Effects) -> Section:
    """A section on one result: findings, a figure per side and part, the largest effects, the whole table as data.

    Raises:
        ValueError: the result has no places or no pairs.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> section = section_of("resid", toy_effects())
        >>> [picture.title for picture in section.pictures]
        ['Negation in the caption (1 pair)', 'Negation in the foil (2 pairs)']
    """
    if not effects.places or not len(effects.pairs):
        raise ValueError(f"the result {name!r} is empty: {effects!r}")
    table = effects.table()  # before its parts are taken, which are read off it
    views, data = _moving(_views(effects)), re.sub(r"[^\w.]+", "-", name).strip("-") + ".csv"
    sides = [side for side in SIDES if side in set(effects.pairs["side"])]
    shown = [(view, side) for view in views for side in sides]
    grids = [_grid(view, side) for view, side in shown if view.mark == "cell"]
    limit = max((largest(grid) for grid in grids), default=0.0)
    wide = any(grid.shape[1] > 16 for grid in grids)
    widest = {view.name: _widest(view) for view in views}
    left_out = len(shown) - MOST_FIGURES
    return Section(
        name,
        findings=[_finding(views, effects, side, sides) for side in sides],
        pictures=[
            _picture(view, side, widest[view.name] if view.mark == "line" else limit, data, wide, sides)
            for view, side in shown[:MOST_FIGURES]
        ],
        tables=[_largest_effects(effects, data)],
        meta=effects.meta,
        notes=[f"{left_out} further figures are left out; Effects.grid and heatmap give them."] if left_out > 0 else [],
        pairs=effects.pairs,
        data={data: table},
    )


def _largest_effects(effects: Effects, data: str) -> Table:
    names = {
        "place": "place", "side": "negation in", "fraction": "fraction", "lower": "lower", "upper": "upper",
        "effect": "effect", "effect_lower": "effect, lower", "effect_upper": "effect, upper",
        "n": "pairs", "dropped": "dropped",
    }  # fmt: skip
    top, sided = effects.top(TOP), set(effects.pairs["side"]) != {"none"}
    left_out = [*([] if effects.record.shares else SHARES), *([] if sided else ["side"])]
    left_out += [] if top["dropped"].any() else ["dropped"]
    names = {key: name for key, name in names.items() if key not in left_out}
    words = {
        name: place_name(place).removeprefix("the ")
        for name, place in zip(effects.index["place"], effects.places, strict=True)
    }
    top = top.assign(side=lambda table: table["side"].map(NEGATION_IN), place=lambda table: table["place"].map(words))
    which = f"The largest {effects.record.method.noun}s{' on each side' if sided else ''}"
    return Table(
        top[list(names)].rename(columns=names),
        "The largest effects",
        f"{which}, in {effects.record.unit}, with 95 % bootstrap intervals over pairs.",
        rows=len(top),
        data=data,
    )


# Figures


def _views(effects: Effects) -> list[_View]:
    """Slots (else heads or neurons) as rows and layers as columns; a view for each kind, and for each slot of units.

    Edges: a diagram of the strongest, and senders by receivers, for each slot.
    """
    index = effects.index
    if all(isinstance(place, Edge) for place in effects.places):
        return [_View(effects, "sender", "receiver", "the strongest paths", mark="line"), *_ends(effects)]
    if index[["kind", "layer"]].isna().any(axis=None):  # places of several kinds or layers, or of none
        return [_busiest(_View(effects, mark="bar"), "place", MOST_UNITS, "places")]
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


def moving(effects: Effects, rows: str) -> Effects:
    """The result without the rows of a map that are exactly 0 in every pair.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> moving(toy_effects().where(layer=0), "slot").index["slot"].tolist()
        ['negator']
    """
    return _moving([_View(effects, rows, "layer")])[0].effects


def _moving(views: list[_View]) -> list[_View]:
    """The views without the rows, and without the maps, that are 0 in every pair; a note says which these are."""
    shown, still = [], []
    for view in views:
        entries = _entries(view)
        zero = [entry for entry, moves in entries.items() if moves == 0]
        if entries and len(zero) == len(entries):
            still.append(view)
        elif zero and view.mark != "line":
            kept = [entry for entry in entries if entry not in zero]
            note = f"{view.note} {_why(view, zero, list(entries))}"
            shown.append(view._replace(effects=view.effects.where(**{view.rows: kept}), note=note))
        else:
            shown.append(view)
    if not shown:
        return views
    if still:
        note = f" Not shown: {listed([view.name for view in still])}, where every effect is exactly 0 in every pair."
        shown = [view._replace(note=view.note + note) for view in shown]
    return shown


def _entries(view: _View) -> dict[Any, float]:
    """The largest size of an effect, on any pair, in each row of a view; NaN where there is none."""
    sizes = view.effects.values.abs().nan_to_num(-1.0).amax(1)
    table = DataFrame({"entry": view.effects.index[view.rows].astype(object), "size": sizes.numpy()})
    largest = table.groupby("entry", sort=False, dropna=False)["size"].max()
    return {None if pd.isna(entry) else entry: size if size >= 0 else float("nan") for entry, size in largest.items()}


def _why(view: _View, zero: Sequence[Any], entries: Sequence[Any]) -> str:
    """Which rows are left out, and what makes them 0."""
    record = view.effects.record
    names = listed([slot_name(entry) if view.rows == "slot" else str(entry) for entry in zero])
    first = list(entries[: len(zero)]) == list(zero)
    alike = record.shares and record.method.patches and view.rows == "slot" and first
    why = ": up to there the two texts are the same, and so is what the model computes" if alike else ""
    return f"Not shown: {names}, exactly 0 in every pair{why}."


def _widest(view: _View) -> float:
    """The effect that the widest line of a diagram shows, on any side."""
    return float(view.effects.fraction()["effect"].abs().max()) if view.mark == "line" else 0.0


def _grid(view: _View, side: str) -> DataFrame:
    return view.effects.grid(view.rows, view.columns, _value(view.effects), side=side)


def _value(effects: Effects) -> str:
    return "fraction" if effects.record.shares else "effect"


def _picture(view: _View, side: str, limit: float, data: str, wide: bool, sides: Sequence[str]) -> Picture:
    chosen = view.effects.where(side=side)
    words = ", ".join(filter(None, (view.name, side_name(side, sides)))) or "all pairs"
    count = counted(chosen.pairs["key"].nunique(), "pair")
    return Picture(
        _figure(view, chosen, limit),
        f"{capital(words)} ({count})",
        _caption(view, side),
        _alt(view, f"{words}, {count}", chosen.fraction().dropna(subset=_value(chosen))),
        data,
        wide=wide or view.mark == "line",
        pair=view.name or "sides",
    )


def _figure(view: _View, chosen: Effects, limit: float) -> Figure:
    if view.mark == "line":
        return network(chosen, n=MOST_PATHS, limit=limit)
    if view.mark == "bar":
        return bars(chosen, MOST_UNITS, _value(chosen))
    return heatmap(chosen, view.rows, view.columns, _value(chosen), title="", limit=limit)


def _alt(view: _View, words: str, values: DataFrame) -> str:
    """A figure in a sentence or two."""
    value = "effect" if view.mark == "line" else _value(view.effects)
    laid = f" by {view.rows} and {view.columns}" if view.mark == "cell" else ""
    what = f"{FIGURES[view.mark]} of the {value_name(value, view.effects)}{laid}"
    if values.empty:
        return f"{what}: {words}."
    peak = values.loc[values[value].abs().idxmax()]
    place = place_name(view.effects.places[list(view.effects.index["place"]).index(peak["place"])])
    return f"{what}: {words}. The largest, {decimals(peak[value])}, is at {place}."


def _caption(view: _View, side: str) -> str:
    """How to read a figure."""
    shown = what_is_shown(view.effects, view.mark)
    if view.mark == "line":
        return (
            f"{shown} The wider the line, the larger the {view.effects.record.method.noun}: blue is positive, red "
            f"negative. Up to {MOST_PATHS} lines are drawn, those of the largest effects."
        )
    of_resid = set(view.effects.index["kind"]) == {"resid"} and view.mark == "cell"
    lines = [
        f"{shown} {reading(view.effects, view.mark)}",
        " Layer 0 is the embedding; layer l is the stream after l blocks." if of_resid else "",
        f" Grey: {gap(view.effects)}." if view.mark == "cell" and _grid(view, side).isna().any(axis=None) else "",
        f" {view.note.strip()}" if view.note else "",
    ]
    return "".join(lines)


# Words and numbers


def _finding(views: list[_View], effects: Effects, side: str, sides: Sequence[str]) -> str:
    """One side's numbers as a sentence: the slot of the largest share at each layer, else the largest effect of all."""
    count = effects.pairs.loc[effects.pairs["side"] == side, "key"].nunique()
    start = f"{capital(side_name(side, sides) or 'all pairs')} ({counted(count, 'pair')}): "
    by_slot = len(views) == 1 and views[0].rows == "slot" and effects.record.shares
    table = effects.table()
    runs = slots_by_layer(table[table["side"] == side]) if by_slot else []
    if 0 < len(runs) <= 4 and len(views[0].effects.index["slot"].drop_duplicates()) > 1:
        layer = "layer" if set(effects.index["kind"]) == {"resid"} else "block"
        steps = [f'"{slot_name(slot)}" {_span(layer, cells)}' for slot, cells in runs]
        return (
            f"{start}the largest share of {whole(effects)} {effects.record.method.verb} at {', then at '.join(steps)}."
        )
    top = effects.where(side=side).top(1)
    if top["effect"].isna().all():
        return f"{start}no place has a value."
    row = next(top.itertuples())
    share = ""
    if effects.record.shares and row.fraction == row.fraction:
        bounds = minus(interval(row.lower, row.upper, 3))
        share = (
            f", {minus(decimals(row.fraction, 3))} of {whole(effects)}{f' (95 % interval {bounds})' if bounds else ''}"
        )
    effect = minus(f"{decimals(row.effect, 3)} {interval(row.effect_lower, row.effect_upper, 3)}".rstrip())
    noun = effects.record.method.noun
    place = place_name(effects.places[list(effects.index["place"]).index(row.place)])
    return f"{start}the largest {noun} in size is that of {place}: {effect}{share}."


def slots_by_layer(table: DataFrame) -> list[tuple[Any, list[Any]]]:
    """Consecutive layers at which the same slot has the largest fraction: the slot, and its row at each of them.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> [(slot, len(rows)) for slot, rows in slots_by_layer(toy_effects().table().query("side == 'foil'"))]
        [('negator', 1), ('eot', 1)]
    """
    known = table.dropna(subset="fraction")
    best = known.loc[known.groupby("layer")["fraction"].idxmax()]
    return [(slot, list(rows)) for slot, rows in groupby(best.itertuples(), key=lambda row: row.slot)]


def _span(layer: str, rows: list[Any]) -> str:
    first, last = rows[0], rows[-1]
    if first is last:
        return f"in {layer} {first.layer} ({_per_cent(first)})"
    return f"from {layer} {first.layer} ({_per_cent(first)}) to {layer} {last.layer} ({_per_cent(last)})"


def _per_cent(row: Any) -> str:
    share, bounds = decimals(100 * row.fraction, 0), interval(100 * row.lower, 100 * row.upper, 0)
    bounds = "" if bounds == f"[{share}, {share}]" else bounds  # all of d in every resample: nothing was estimated
    return minus(f"{share} % {bounds}".rstrip())
