"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

    from clip_lens.core.effects import Effects

SIDES = {"caption": "negation in the caption", "foil": "in the foil", "none": "no side", "pooled": "together"}


def print_effects(effects: Effects) -> None:
    """A table per side: by slot and layer where each cell is one place, else the largest effects."""
    index = effects.index
    laid_out = index["slot"].notna().all() and not index.duplicated(["slot", "layer"]).any()
    for side in (side for side in SIDES if side in set(effects.pairs["side"])):
        _show(_grid(effects, side) if laid_out else _largest(effects, side))


def print_sides(frame: DataFrame, title: str) -> None:
    """A table with a column per side, numbers with two decimals; lines without any are left out."""
    from rich.table import Table

    table = Table("", *(SIDES[side] for side in frame.index), title=title)
    for name, column in frame.dropna(axis=1, how="all").items():
        table.add_row(str(name).replace("_", " "), *_cells(column))
    _show(table)


def print_overlap(overlap: DataFrame) -> None:
    """What two circuits share, a line per number."""
    from rich.table import Table

    table = Table("", "edges", title="two circuits as sets")
    (line,) = overlap.to_dict("records")
    for name, value in line.items():
        table.add_row(name.replace("_", " "), *_cells([value]))
    _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _titled(effects: Effects, side: str) -> Table:
    from rich.table import Table

    from clip_lens.show.report.words import whole

    record, count = effects.record, int((effects.pairs["side"] == side).sum())
    patch = f"{record.unit} that a patch {record.method.verb}"
    patch = patch if record.method.patches else f"{record.method.noun} in {record.unit}"
    what = f"share of {whole(effects)} that a patch {record.method.verb}" if record.shares else patch
    return Table(title=f"{what}; negation in the {side}, {count} pairs" if side != "none" else f"{what}, {count} pairs")


def _grid(effects: Effects, side: str) -> Table:
    grid = effects.grid(side=side, value="fraction" if effects.record.shares else "effect")
    table = _titled(effects, side)
    table.add_column("slot \\ layer")
    for layer in grid.columns:
        table.add_column(str(layer), justify="right")
    for slot, line in grid.iterrows():
        table.add_row(str(slot), *_cells(line))
    return table


def _largest(effects: Effects, side: str) -> Table:
    from clip_lens.words import decimals

    share = ["share"] if effects.record.shares else []
    table = _titled(effects, side)
    for column in ("place", *share, effects.record.unit, "95% interval"):
        table.add_column(column, justify="left" if column == "place" else "right")
    for line in effects.where(side=side).top(10).itertuples():
        bounds = [decimals(bound, sign=True) for bound in (line.effect_lower, line.effect_upper)]
        shown = [decimals(line.fraction)] if share else []
        interval = " .. ".join(bounds) if all(bounds) else ""  # below five pairs there is none
        table.add_row(line.place, *shown, decimals(line.effect, sign=True), interval)
    return table


def _cells(values: Iterable[object]) -> Iterator[str]:
    from clip_lens.words import decimals

    return (decimals(value) if isinstance(value, float) else str(value) for value in values)
