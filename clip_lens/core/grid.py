"""A table of one side laid out by two columns of its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from clip_lens.core.store import INDEX, plain
from clip_lens.data.slots import order_of
from clip_lens.model.site import KINDS
from clip_lens.words import nearest, unknown


def one_side(table: DataFrame, side: str | None) -> DataFrame:
    """The rows of one side of a table; None = the only side there is.

    Raises:
        ValueError: the side does not occur, or there are several and none is named.

    Example:
        >>> len(one_side(clip_lens.core.effects.toy_effects().fraction(), "foil"))
        4
    """
    sides = list(dict.fromkeys(table["side"]))
    if side is None and len(sides) > 1:
        choices = " or ".join(f"side={name!r}" for name in sides)
        raise ValueError(f"the result has several sides; choose {choices}, or pool them with pooled=True")
    if side is not None and side not in sides:
        has = ", ".join(map(repr, sides))
        raise ValueError(f"no side {side!r}{nearest(side, sides)} in the result; it has {has}")
    return table if side is None else table[table["side"] == side]


def axes_of(index: DataFrame, rows: str | None, columns: str | None) -> tuple[str, str]:
    """The rows and columns of a grid of some places, where they are not given: edges sender by receiver, single units
    without slots unit by layer, others slot by layer.

    Example:
        >>> axes_of(clip_lens.core.effects.toy_effects().index, None, None)
        ('slot', 'layer')
    """
    if len(index) and (index["kind"] == "edge").all() and rows is None and columns is None:
        return "sender", "receiver"
    units = index["slot"].isna().all() and index["unit"].notna().any()
    return rows or ("unit" if units and columns != "unit" else "slot"), columns or "layer"


def pivot(
    table: DataFrame, rows: str, columns: str, value: str, known: Mapping[str, Sequence[str]] | None = None
) -> DataFrame:
    """A column of a table of one side, laid out by two columns of the index; NaN where there is no place.

    `known` has the order of a column's entries, as `Effects.axes` gives it; slots are in the order of the text anyway.

    Raises:
        ValueError: no such columns, or two places that fall in one cell.

    Example:
        >>> pivot(one_side(clip_lens.core.effects.toy_effects().fraction(), "foil"), "place", "side", "fraction").shape
        (4, 1)
    """
    for name in (rows, columns, value):
        if name not in table:
            raise ValueError(unknown("column", name, table.columns))
    known = {"kind": KINDS, **(known or {})}
    known["slot"] = order_of(plain(table["slot"]) if "slot" in table else (), known.get("slot", ()))
    row_labels, column_labels = (_ordered(table[name], known.get(name, ())) for name in (rows, columns))
    row_at = {label: number for number, label in enumerate(row_labels)}
    column_at = {label: number for number, label in enumerate(column_labels)}
    cells = np.full((len(row_labels), len(column_labels)), np.nan)
    taken: dict[tuple[int, int], int] = {}
    keys = zip(plain(table[rows]), plain(table[columns]), table[value].to_numpy(), strict=True)
    for number, (row, column, content) in enumerate(keys):
        cell = row_at[row], column_at[column]
        if cell in taken:
            raise ValueError(_collision(table.iloc[[taken[cell], number]], rows, columns))
        taken[cell] = number
        cells[cell] = content
    return DataFrame(cells, index=_axis(rows, row_labels), columns=_axis(columns, column_labels))


def _ordered(column: pd.Series, known: Sequence[str]) -> list[Any]:
    """The distinct entries in reading order: known ones as listed, others as seen, numbers ascending, None last."""
    seen = list(dict.fromkeys(plain(column)))
    position = {entry: number for number, entry in enumerate(known)}
    first = {entry: number for number, entry in enumerate(seen)}

    def rank(entry: Any) -> tuple[int, int]:
        if entry is None:
            return 3, 0
        if isinstance(entry, int | np.integer):
            return 2, int(entry)
        return (0, position[entry]) if entry in position else (1, first[entry])

    return sorted(seen, key=rank)


def _axis(name: str, labels: list[Any]) -> pd.Index:
    uniform = len({type(label) for label in labels}) == 1 and None not in labels
    return pd.Index(labels, name=name) if uniform else pd.Index(labels, name=name, dtype=object)


def _collision(two: DataFrame, rows: str, columns: str) -> str:
    cell = ", ".join(f"{name}={plain(two[name])[0]!r}" for name in (rows, columns))
    further = [name for name in INDEX[1:] if name not in (rows, columns) and len(set(plain(two[name]))) > 1]
    if not further:
        return f"two places fall on {cell}: {' and '.join(two['place'])}, the same in every column"
    name = further[0]
    values = " and ".join(repr(value) for value in plain(two[name]))
    return f"two places fall on {cell} and differ in {name} ({values}); choose with where({name}=...), or lay out by it"
