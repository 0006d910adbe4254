"""Results and sections -> one HTML file that needs nothing else: findings, figures, tables, methods, data, examples."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment
from markupsafe import Markup, escape
from pandas import DataFrame
from plotly.offline import get_plotlyjs

from clip_lens.core.effects import SEGMENTS, Effects
from clip_lens.core.table import SIDES
from clip_lens.files import written_whole
from clip_lens.show.figures.alike import alike
from clip_lens.show.figures.figure import Figure
from clip_lens.show.figures.style import swaps
from clip_lens.show.figures.thumbnails import Pictures, picture_file, thumbnail
from clip_lens.show.figures.words import column_name, side_name
from clip_lens.show.report.cautions import cautions_of
from clip_lens.show.report.effects_section import NEGATION_IN, section_of
from clip_lens.show.report.examples import Example, examples
from clip_lens.show.report.head import Point, illustration, in_rows, lead, main_row, points_of
from clip_lens.show.report.packed import File, as_json, pack
from clip_lens.show.report.section import PROBABILITY, Data, Picture, Section, Table
from clip_lens.show.report.words import methods_of
from clip_lens.words import capital, formatted, minus, probability, unbroken

WHAT = (
    "method",
    "run",
    "source",
    "metric",
    "scale",
    "model",
    "weights",
    "tower",
    "hooks of yours that were on",
    "notes",
    "data",
    "images",
    "held out",
    "pairs",
    "selected",
    "versions",
)
"""What of a record comes first in "What was run"."""
DROPPED = ("pairs dropped", "dropped")
LARGEST = 6_000_000  # bytes of a page: what mail and previews still take
WORDS = 300_000  # bytes of it kept for words and tables
HEIGHT = 450  # pixels of a figure that has none: plotly's own
CELL = 96  # pixels of a picture in a table, shown at half of that


def report(
    results: Mapping[str, Effects | Section] | Effects,
    out: str | os.PathLike[str],
    *,
    title: str = "What patching moves",
    summary: str | None = None,
    points: Sequence[str] = (),
    pictures: Pictures = None,
    warnings: Sequence[str] = (),
    methods: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    data: Mapping[str, Data] | None = None,
    name: str = "",
) -> Path:
    """The path of one HTML file that shows named results and sections, and loads nothing from anywhere.

    An `Effects` becomes a section that states in words which places move the largest share, with a figure per side, the
    largest effects with their intervals and its whole table as a file to save. The names stand in the page's contents.
    Under the title stand what d is and `summary`, the main picture (see `Picture`; by default the first), and
    `points`, with the first findings of the sections where they are less than three; the sections say the others.
    Every table gives its numbers as CSV, and every figure that carries its own (see `Picture`) as a table too; example
    pairs come from the first section that has pairs. `warnings` are what
    must be known before any number; what follows from the results themselves (hooks that were on, few pairs) is added.
    `methods` are headings and texts, shown folded (those of `Effects` where it is None); `data` are further files to
    save, by name: tables, paths or bytes. `pictures` is a folder that holds the image ids, or maps an image id to a
    file; a pair without a picture shows its texts. `name` is what the page calls itself, for `page_in`. A file that
    would bring the page over 6 MB is left out and the page says so. In a CSV, an apostrophe stands before a text that a
    spreadsheet would run as a formula. An interrupted call leaves an existing file as it was.

    Raises:
        ValueError: no results, an `Effects` without places or pairs, or a picture or table whose `data` is not there.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> page = report({"resid": toy_effects()}, getfixture("tmp_path") / "report.html", title="Toy")
        >>> "negator" in page.read_text(encoding="utf-8")
        True
    """
    if isinstance(results, Effects):
        results = {capital(results.record.method.title) or "Effects": results}
    if not results:
        raise ValueError("no results to report on; give a mapping from a name to an Effects or a Section")
    sections = {name: item if isinstance(item, Section) else section_of(name, item) for name, item in results.items()}
    effects = {name: item for name, item in results.items() if isinstance(item, Effects)}
    methods = methods_of(effects.values()) if methods is None else methods
    given = [warnings] if isinstance(warnings, str) else warnings
    chosen = points_of(sections, [points] if isinstance(points, str) else points)
    page = _Page(dict(data or {}), pictures)
    first = lead(sections, summary)
    page.take(sections, chosen, first)
    words = {
        "name": name,
        "title": title,
        "lead": first,
        "shown": _shown(illustration(sections, pictures)),
        "warnings": list(dict.fromkeys([*given, *cautions_of(effects)])),
        "methods": list(methods.items() if isinstance(methods, Mapping) else methods),
        **_what_was_run(sections),
        "examples": _examples(sections.values(), pictures),
    }
    return _write(Path(out), page.render(words))


HEAD = 4096  # bytes of a page in which its name stands


def page_in(folder: str | os.PathLike[str], name: str) -> Path:
    """Where a report of this name goes: to report.html, or to NAME.html where report.html is another page already.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> folder = getfixture("tmp_path")
        >>> for name in ("heads", "streams", "heads"):
        ...     print(report({"toy": toy_effects()}, page_in(folder, name), name=name).name)
        report.html
        streams.html
        report.html
    """
    page = Path(folder) / "report.html"
    if not page.exists():
        return page
    with page.open("rb") as file:
        found = re.search(rb'<meta name="clip-lens" content="([^"]*)">', file.read(HEAD))
    return page if found and found[1].decode() == str(escape(name)) else page.with_name(f"{name}.html")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@cache
def _plotly() -> File:
    return pack("plotly.js", get_plotlyjs().encode())


@dataclass
class _Page:
    """The parts of a page as they come in: figures and tables are numbered through, files get ids."""

    given: dict[str, Data]
    images: Pictures = None
    head: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    n_tables: int = 0
    files: dict[str, File] = field(default_factory=dict)
    data: dict[tuple[str, str], Data] = field(default_factory=dict)

    def take(self, sections: Mapping[str, Section], points: Sequence[Point], lead: str) -> None:
        """All sections, those of their pictures and findings that stand at the head there alone."""
        keys = {name: f"part-{number}" for number, name in enumerate(sections, start=1)}
        for name, section in sections.items():  # known to figures and tables by name, before those of the report
            self.data |= {(keys[name], entry): content for entry, content in section.data.items()}
        owner, first = main_row(sections)
        said = [{"text": point.text, "id": keys.get(point.section, "")} for point in points]
        self.head = {"row": self._row(keys.get(owner, ""), first), "points": said}
        for name, section in sections.items():
            self._add(keys[name], name, section, first if name == owner else [], [lead, *(p.text for p in points)])

    def _add(self, key: str, name: str, section: Section, first: Sequence[Picture], said: Sequence[str]) -> None:
        rest = [picture for picture in section.pictures if all(picture is not other for other in first)]
        self.parts.append(
            {
                "id": key,
                "name": name,
                "section": section,
                "above": self.head["row"] if first else [],
                "findings": [line for line in section.findings if not any(line in words for words in said)],
                "paragraphs": paragraphs(section.text),
                "rows": [self._row(key, row) for row in in_rows(rest)],
                "tables": [self._table(key, table) for table in section.tables],
            }
        )

    def _row(self, key: str, row: Sequence[Picture]) -> list[dict[str, Any]]:
        """Figures side by side; those of a pair look alike."""
        figures = [picture.figure for picture in row]
        figures = alike(figures) if row and row[0].pair else figures
        return [self._picture(key, picture, figure) for picture, figure in zip(row, figures, strict=True)]

    def _picture(self, key: str, picture: Picture, figure: go.Figure) -> dict[str, Any]:
        number = len(self.figures) + 1
        name = f"figure-{number}"
        self.figures[name] = {**json.loads(str(figure.to_json())), "columns": _columns(figure)}
        if (shown := numbers_of(picture)) is not None:
            self.files[f"{name}-numbers"] = pack(f"{name}.csv", shown)
        caption = self.captions.setdefault(picture.caption, number)
        names = None if shown is None else [column_name(column) for column in shown.columns]
        return {
            "id": name, "number": number, "picture": picture, "height": figure.layout.height or HEIGHT,
            "names": names, "as": caption if caption != number else None, "data": self._behind(key, picture.data),
        }  # fmt: skip

    def _table(self, key: str, table: Table) -> dict[str, Any]:
        self.n_tables += 1
        name = f"table-{self.n_tables}"
        self.files[f"{name}-numbers"] = pack(f"{name}.csv", table.frame)
        return {
            "id": name,
            "number": self.n_tables,
            "table": table,
            **cells(table, self.images),
            "data": self._behind(key, table.data),
        }

    def _behind(self, key: str, name: str | None) -> tuple[str, str] | None:
        """The file that a figure or table names."""
        if name is None:
            return None
        if (key, name) in self.data:
            return key, name
        if name not in self.given:
            names = [entry for part, entry in self.data if part == key] + list(self.given)
            raise ValueError(f"no data {name!r} behind a figure or table; there are {', '.join(names) or 'none'}")
        return "report", name

    def render(self, words: dict[str, Any]) -> str:
        self.files["figures"] = pack("figures.json", json.dumps(self.figures).encode())
        self.files["plotly"] = _plotly()
        room = LARGEST - WORDS - sum(len(file.packed) for file in self.files.values())
        room -= sum(len(pair["picture"] or "") for group in words["examples"] for pair in group["pairs"])
        entries = {**self.data, **{("report", name): content for name, content in self.given.items()}}
        listed = {}
        for number, (entry, content) in enumerate(entries.items(), start=1):
            file, name = pack(entry[1], content), f"data-{number}"
            fits = len(file.packed) <= room
            if fits:
                self.files[name], room = file, room - len(file.packed)
            listed[entry] = {"id": name, "file": file, "fits": fits}
        return str(
            _template().render(
                **words, head=self.head, parts=self.parts, data=listed, files=as_json(self.files),
                dark=Markup(json.dumps(swaps("dark"))),
                css=_own("report.css"), js=_own("report.js"), paragraphs=paragraphs,
            )
        )  # fmt: skip


def numbers_of(picture: Picture) -> DataFrame | None:
    """The table that a picture shows: the one it was given, else the one that its figure carries; None without either.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> from clip_lens.show.figures.heatmap import heatmap
        >>> len(numbers_of(Picture(heatmap(toy_effects(), side="foil"), "Places", "A cell is a place.")))
        4
    """
    if picture.numbers is not None:
        return picture.numbers
    return picture.figure.frame if isinstance(picture.figure, Figure) else None


def _own(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _template() -> Any:
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_unbroken)
    return made.from_string(_own("report.html.j2"))


def _unbroken(value: Any) -> Any:
    """Words as a page shows them; what is markup already stays."""
    return (
        unbroken(value).replace(" -> ", " \N{RIGHTWARDS ARROW} ")
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


def _shown(example: Example | None) -> dict[str, Any] | None:
    """A pair that shows what d is."""
    if example is None:
        return None
    words = "above" if example.d >= 0 else "below"
    return {**example._asdict(), "by": f"{abs(example.d):.1f} logits {words}"}


def _columns(figure: go.Figure) -> float:
    """How many cells would stand side by side if a figure's narrowest grid took its whole width; 0 without grids."""
    found = [0.0]
    for trace in figure.data:
        if trace.type == "heatmap" and trace.z is not None:
            domain = figure.layout[(trace.xaxis or "x").replace("x", "xaxis", 1)].domain or (0, 1)
            found.append(np.asarray(trace.z).shape[-1] / (domain[1] - domain[0]))
    return max(found)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which empty lines part.

    Example:
        >>> paragraphs("One\\nline.\\n\\nTwo.")
        ['One\\nline.', 'Two.']
    """
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def cells(table: Table, pictures: Pictures = None) -> dict[str, Any]:
    """What a page shows of a table: its columns in words, with whether they hold some, and the cells as text, or as
    the picture that they name.

    Example:
        >>> shown = cells(Table(DataFrame({"head": ["1.2"], "mean_d": [-0.5]}), "Heads"))
        >>> shown["lines"][0][0], [(column["name"], column["words"]) for column in shown["columns"]]
        ({'text': '1.2', 'picture': None}, [('head', True), ('mean d', False)])
    """
    frame = table.frame.head(table.rows)
    written = [[_shown_cell(value, name, table, pictures) for value in frame[name]] for name in frame.columns]
    words = [not pd.api.types.is_numeric_dtype(table.frame[name]) for name in frame.columns]
    columns = [{"name": column_name(name), "words": kind} for name, kind in zip(frame.columns, words, strict=True)]
    return {"columns": columns, "lines": [list(line) for line in zip(*written, strict=True)]}


def _shown_cell(value: Any, column: Any, table: Table, pictures: Pictures) -> dict[str, str | None]:
    file = picture_file(str(value), pictures) if column in table.pictured else None
    return {"text": _cell(value, table.formats.get(column)), "picture": thumbnail(file, CELL)}


def _cell(value: Any, how: str | None) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, (int, float, np.number)):
        return format(value, how) if how else str(value)
    if how == PROBABILITY:
        return probability(float(value))
    return minus(formatted(value, how or (".3f" if isinstance(value, (float, np.floating)) else "")))


# What was run, on which pairs


def _what_was_run(sections: Mapping[str, Section]) -> dict[str, Any]:
    """Each thing once: what all results have in common, in the order of `WHAT`, then what is a result's own."""
    shared = _shared([section.meta for section in sections.values() if section.meta])
    drops = (section.meta[name] for section in sections.values() for name in DROPPED if name in section.meta)
    own = [
        (section.title, {key: value for key, value in section.meta.items() if key not in shared})
        for section in sections.values()
    ]
    order = [*(name for name in WHAT if name in shared), *(name for name in shared if name not in WHAT)]
    return {
        "shared": {name: shared[name] for name in order},
        "recorded": [(title, meta) for title, meta in own if meta],
        "pair_counts": _pair_counts(sections),
        "dropped": "; ".join(dict.fromkeys(drops)),
    }


def _shared(metas: list[Mapping[str, str]]) -> dict[str, str]:
    """The meta that all results have in common."""
    if not metas:
        return {}
    first, *others = metas
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _pair_counts(sections: Mapping[str, Section]) -> list[dict[str, Any]]:
    """Pairs by side and segment; results on the same pairs share a table."""
    tables: list[dict[str, Any]] = []
    for name, section in sections.items():
        if section.pairs is None:
            continue
        found = _count(section.pairs.drop_duplicates("key"))
        same = next((table for table in tables if table["counts"] == found), None)
        if same:
            same["names"] += f", {name}"
        else:
            tables.append({"names": name, "counts": found})
    return tables


def _count(pairs: DataFrame) -> dict[str, Any]:
    segments = list(dict.fromkeys([*SEGMENTS, *pairs["segment"]]))
    rows = []
    for side in (side for side in SIDES if side in set(pairs["side"])):
        part = pairs[pairs["side"] == side]
        counts = [int((part["segment"] == segment).sum()) for segment in segments]
        rows.append(
            {"side": NEGATION_IN[side], "counts": counts, "total": len(part), "d": _cell(float(part["d"].mean()), None)}
        )
    return {"segments": segments, "rows": rows, "sided": set(pairs["side"]) != {"none"}}


def _examples(sections: Iterable[Section], pictures: Pictures) -> list[dict[str, Any]]:
    """Example pairs by segment, with how many pairs the segment has."""
    pairs = next((section.pairs for section in sections if section.pairs is not None), None)
    if pairs is None:
        return []
    counts, sides = pairs.drop_duplicates("key")["segment"].value_counts(), set(pairs["side"])
    return [
        {
            "segment": segment,
            "count": int(counts[segment]),
            "pairs": [
                {**pair._asdict(), "side": side_name(pair.side, sides), "d": _cell(pair.d, None)} for pair in found
            ],
        }
        for segment, found in examples(pairs, pictures).items()
    ]
