"""What a report is made of: sections of findings, figures and tables, with the data behind them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
from pandas import DataFrame

PAIRS = ("key", "caption", "foil", "image", "side", "d", "segment")
PROBABILITY = "p"
"""The format of a column of p values."""
Data = DataFrame | bytes | str | os.PathLike[str]  # a str is a path


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure of a report, with what a reader needs who cannot hover, or cannot see it.

    `caption` says how to read it; `alt` says in a sentence what is seen, for a screen reader. `numbers` are what the
    page shows on "show as table" and saves as CSV: by default the `frame` that this package's figures carry; a figure
    of your own has none, and without `numbers` the page says so. `data` names an entry of the section's or the report's
    data that holds more than the figure shows. A `wide` one takes the whole width of the page; those that name the same
    `pair` share a row, their colours' limits and the range of their axes. The `main` one, with its pair, stands under
    the page's title. Colours follow the page, light or dark; a background of the figure's own is dropped.

    Raises:
        TypeError: no plotly figure.
        ValueError: no title or no caption.

    Example:
        >>> Picture(go.Figure(go.Bar(x=["yes", "no"], y=[1, 2])), "Votes", "A bar is an answer.").alt
        'Votes. A bar is an answer.'
    """

    figure: go.Figure
    title: str
    caption: str
    alt: str = ""
    data: str | None = None
    numbers: DataFrame | None = None
    wide: bool = False
    pair: str = ""
    main: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.figure, go.Figure):
            raise TypeError(f"a picture is made of a plotly.graph_objects.Figure. Got {type(self.figure).__name__}")
        for name in ("title", "caption"):
            if not getattr(self, name).strip():
                raise ValueError(f"a picture needs a {name}: in a page it stands without the code that made it")
        object.__setattr__(self, "alt", self.alt or f"{self.title}. {self.caption}")


@dataclass(frozen=True, eq=False)
class Table:
    """A table of a report: the first column names the rows, a named index is a column before it.

    `formats` maps a column to a format specification (".1f", "+.3f", ".0%"), or to "p" where it holds p values: three
    decimals, or "< .001". Other floats get three decimals, missing entries stay empty. The page shows the first `rows`
    rows and saves all of them, unrounded, as CSV. `pictured` are columns that hold ids of images: the page shows the
    image where it has it. `data` is as a `Picture`'s.

    Raises:
        ValueError: no title, or a format for a column that is not there.

    Example:
        >>> table = Table(DataFrame({"side": ["foil"], "accuracy": [0.5]}), "Scores", formats={"accuracy": ".0%"})
        >>> list(table.frame.columns)
        ['side', 'accuracy']
    """

    frame: DataFrame
    title: str
    caption: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)
    rows: int = 30
    data: str | None = None
    pictured: Sequence[str] = ()

    def __post_init__(self) -> None:
        named = any(name is not None for name in self.frame.index.names)
        object.__setattr__(self, "frame", self.frame.reset_index(drop=not named))
        if not self.title.strip():
            raise ValueError("a table needs a title")
        if unknown := [name for name in self.formats if name not in self.frame.columns]:
            columns = ", ".join(map(str, self.frame.columns))
            raise ValueError(f"no column {', '.join(map(repr, unknown))} to format; there are {columns}")


@dataclass(frozen=True, eq=False)
class Section:
    """One part of a report: what was found, how it was found, and what shows it. Everything but the title is optional.

    `findings` are sentences; `headline` is the one that stands under the page's title, by default a finding; `text` is
    prose, paragraphs parted by an empty line; `notes` stand small below the figures. `meta` is what was run: what all
    sections have in common is said once. `pairs` (as `Effects.pairs`, with the columns `PAIRS` of this module) are
    counted, and those of the first section that has any give the example pairs. `data` maps a file's name to a table or
    a file that readers can save.

    Raises:
        ValueError: no title, a single str for findings or notes, or pairs without one of their columns.

    Example:
        >>> Section("Accuracy", findings=["The model is right on 60 % of the pairs."]).pictures
        ()
    """

    title: str
    findings: Sequence[str] = ()
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    pairs: DataFrame | None = None
    data: Mapping[str, Data] = field(default_factory=dict)
    headline: str = ""

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError("a section needs a title")
        if isinstance(self.findings, str) or isinstance(self.notes, str):
            raise ValueError("findings and notes are lists of sentences. Got a single str; put it into a list")
        if self.pairs is not None and (missing := [name for name in PAIRS if name not in self.pairs]):
            raise ValueError(f"pairs of a section need the columns {', '.join(PAIRS)}; missing: {', '.join(missing)}")
        for name in ("findings", "pictures", "tables", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
