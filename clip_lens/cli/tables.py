"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table

    from clip_lens.core.effects import Effects

SIDES = {
    "caption": "negation in the caption",
    "foil": "in the foil",
    "none": "pairs without a side",
    "pooled": "together",
}


def print_effects(effects: Effects) -> None:
    """A table per side: by slot and layer where each cell is one place, else the largest effects."""
    index = effects.index
    laid_out = index["slot"].notna().all() and not index.duplicated(["slot", "layer"]).any()
    for side in (side for side in SIDES if side in set(effects.pairs["side"])):
        for table in _grids(effects, side) if laid_out else [_largest(effects, side)]:
            _show(table)


def print_sides(frame: DataFrame, title: str) -> None:
    """A table with a column per side, numbers with two decimals; lines without any are left out."""
    from rich.table import Table

    sided = set(frame.index) - {"none", "pooled"}
    table = Table("", *(SIDES[side] if sided or side != "none" else "all pairs" for side in frame.index), title=title)
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


def _console() -> Console:
    from rich.console import Console

    return Console()


def _show(table: Table) -> None:
    _console().print(table)


def _titled(effects: Effects, side: str) -> Table:
    from rich.table import Table

    from clip_lens.show.report.words import whole

    record, count = effects.record, int((effects.pairs["side"] == side).sum())
    where = (
        "" if set(effects.pairs["side"]) == {"none"} else SIDES[side] if side == "none" else f"negation in the {side}"
    )
    patch = f"{record.unit} that a patch {record.method.verb}"
    patch = patch if record.method.patches else f"{record.method.noun} in {record.unit}"
    what = f"share of {whole(effects)} that a patch {record.method.verb}" if record.shares else patch
    return Table(title=f"{what}; {where}, {count} pairs" if where else f"{what}, {count} pairs")


def _grids(effects: Effects, side: str) -> Iterator[Table]:
    """A line per layer, so that a deep tower fits; slots that don't fit beside each other come in further tables."""
    from rich.box import SIMPLE

    grid = effects.grid("layer", "slot", side=side, value="fraction" if effects.record.shares else "effect")
    heads = {slot: str(slot).replace("_", " ") for slot in grid}
    cells = {slot: list(_cells(grid[slot])) for slot in grid}
    widths = {slot: 1 + max(map(len, [*heads[slot].split(), *cells[slot]])) for slot in grid}
    for slots in _fitting(widths, _console().width - len("layer")):
        table = _titled(effects, side)
        table.box, table.padding, table.show_edge = SIMPLE, (0, 0), False
        table.add_column("layer", justify="right")
        for slot in slots:
            table.add_column(heads[slot], justify="right", vertical="bottom")
        for number, layer in enumerate(grid.index):
            table.add_row(str(layer), *(cells[slot][number] for slot in slots))
        yield table


def _fitting(widths: Mapping[Any, int], room: int) -> Iterator[list[Any]]:
    """Columns in groups that are no wider than the room, at least one in each."""
    group: list[Any] = []
    for name, width in widths.items():
        if group and sum(widths[each] for each in group) + width > room:
            yield group
            group = []
        group.append(name)
    yield group


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
