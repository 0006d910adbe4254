"""Two results, two circuits or two models side by side: tables, files and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lens.cli.job import Job, name_of, say
from clip_lens.cli.tables import print_effects, print_overlap

if TYPE_CHECKING:
    from clip_lens.core.effects import Effects
    from clip_lens.methods.compare import Comparison
    from clip_lens.model.site import Place
    from clip_lens.show.report.section import Section


def results(a: Path, b: Path, out: Path) -> None:
    """Two kept results."""
    from clip_lens.core.effects import Effects
    from clip_lens.methods.compare import compare

    _write(compare(Effects.load(a), Effects.load(b)), out, name_of("compare", a.stem, b.stem))


def models(a: Job, b: Job, names: tuple[str, str], kind: str, places: Callable[[Job], Sequence[Place]]) -> None:
    """Two models on the same pairs: every place patched from the other text in each, and swapped for the other's."""
    from clip_lens.core.source import counterpart, other_tower
    from clip_lens.methods.compare import compare

    parts = [
        job.patched(name_of("compare", name, kind), places(job), counterpart)
        for job, name in zip((a, b), names, strict=True)
    ]
    name = name_of("compare", *names, kind)
    swapped = {}
    try:
        source = other_tower(b.encoder)
        source(a.encoder, a.batch)
    except ValueError as why:
        say(f"No part is swapped: {why}")
    else:
        swapped = {f"{names[0]}, swapped for {names[1]}": a.patched(f"{name}-swapped", places(a), source)}
    _write(compare(*parts, names=names), a.out, name, swapped)


def _write(comparison: Comparison, out: Path, name: str, further: Mapping[str, Effects] | None = None) -> None:
    """The table of the differences on the screen and as csv, the differences as a result, and the report of all."""
    from clip_lens.core.spreadsheet import write_csv

    table = out / f"{name}.csv"
    out.mkdir(parents=True, exist_ok=True)
    write_csv(comparison.table(), table)
    comparison.effects.save(out / f"{name}.parquet")
    one, two = comparison.names
    parts = {f"{two} minus {one}": comparison.effects, one: comparison.a, two: comparison.b, **(further or {})}
    print_effects(comparison.effects)
    _page(parts, out, name, f"{two} beside {one}", f"{table.name} and the .parquet files")


def circuits(a: Path, b: Path, out: Path) -> None:
    """Two circuits as sets of edges."""
    from clip_lens.core.spreadsheet import write_csv
    from clip_lens.methods.circuits.circuit import Circuit
    from clip_lens.show.questions.sets import sets

    one, two = (Circuit.load(path) for path in (a, b))
    names = (str(a), str(b)) if one.name == two.name else (one.name, two.name)
    overlap, name = Circuit.overlaps(dict(zip(names, (one, two), strict=True))), name_of("compare", a.stem, b.stem)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(overlap, out / f"{name}.csv")
    print_overlap(overlap)
    _page({"Edges": sets(one, two, names)}, out, name, f"{names[1]} beside {names[0]}", f"{name}.csv")


def _page(parts: Mapping[str, Effects | Section], out: Path, name: str, title: str, files: str) -> None:
    from clip_lens.show.report.report import page_in, report

    page = report(parts, page_in(out, name), title=title, name=name)
    say(f"\nThe report is {page}; {files} beside it hold the numbers.")
