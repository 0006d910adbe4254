"""The head of a report: what d is, the picture to look at first, and three sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from pandas import DataFrame

from clip_lens.show.figures.thumbnails import Pictures, picture_file
from clip_lens.show.report.examples import Example, example_of
from clip_lens.show.report.section import Picture, Section

MOST_POINTS = 3
"""Sentences under the title: what is remembered of a page."""
D_IS = (
    "d is how many logits higher the model scores an image's caption, which is true of it, than the foil, which is "
    "not; where d is above 0, the model is right."
)


class Point(NamedTuple):
    """A sentence under the title, and the section that it comes from."""

    text: str
    section: str = ""


def points_of(sections: Mapping[str, Section], given: Sequence[str] = ()) -> list[Point]:
    """Three sentences at most: those given, then the headlines of the sections, or else their first findings in turn.

    Example:
        >>> points_of({"a": Section("A", ["1", "2"]), "b": Section("B", ["3", "4"])}, ["0"])
        [Point(text='0', section=''), Point(text='1', section='a'), Point(text='3', section='b')]
    """
    said = [[Point(line, name) for line in section.findings] for name, section in sections.items()]
    findings = [point for turn in zip_longest(*said) for point in turn if point is not None]
    every = [Point(section.headline, name) for name, section in sections.items() if section.headline] or findings
    different = list({point.text: point for point in reversed(every)}.values())[::-1]
    names, room = list(sections), max(0, MOST_POINTS - len(given))
    return [*map(Point, given), *sorted(different[:room], key=lambda point: names.index(point.section))]


def main_row(sections: Mapping[str, Section]) -> tuple[str, list[Picture]]:
    """The pictures under the title, and whose they are: the main one with its pair, by default the first of all.

    Example:
        >>> main_row({"a": Section("A")})
        ('', [])
    """
    rows = [(name, row) for name, section in sections.items() for row in in_rows(section.pictures)]
    chosen = (at for at in rows if any(picture.main for picture in at[1]))
    return next(chosen, rows[0] if rows else ("", []))


def in_rows(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Pictures as they stand: those of one pair together, a wide one by itself, others two by two.

    Example:
        >>> import plotly.graph_objects as go
        >>> make = lambda title, **how: Picture(go.Figure(), title, "A point is a pair.", **how)
        >>> made = make("a"), make("b", pair="x"), make("c", pair="x"), make("d", wide=True), make("e")
        >>> [[picture.title for picture in row] for row in in_rows(made)]
        [['a'], ['b', 'c'], ['d'], ['e']]
    """
    rows: list[list[Picture]] = []
    for picture in pictures:
        last = rows[-1] if rows else []
        joins = bool(last) and not picture.wide and not last[-1].wide and last[-1].pair == picture.pair
        if joins and (picture.pair or len(last) < 2):
            last.append(picture)
        else:
            rows.append([picture])
    return rows


def lead(sections: Mapping[str, Section], summary: str | None) -> str:
    """The first sentences of a page: what d is, where it has pairs with a d, and a summary.

    Example:
        >>> lead({"a": Section("A")}, "In a sentence.")
        'In a sentence.'
    """
    known = any(pairs["d"].notna().any() for pairs in _pairs(sections))
    return " ".join(filter(None, (D_IS if known else "", summary)))


def illustration(sections: Mapping[str, Section], pictures: Pictures) -> Example | None:
    """The pair that shows what d is: of those that have a picture the one of the middle d; None where none has one.

    Example:
        >>> illustration({"a": Section("A")}, None) is None
        True
    """
    for pairs in _pairs(sections):
        known = pairs.drop_duplicates("key").dropna(subset="d").sort_values("d", kind="stable")
        for row in _middle_first(len(known)):
            if picture_file(str(known["image"].iloc[row]), pictures) is not None:
                found = example_of(known.iloc[row], pictures)
                return found if found.picture else None
    return None


def _middle_first(count: int) -> Iterator[int]:
    """Every row, from the middle outwards."""
    return iter(sorted(range(count), key=lambda row: abs(2 * row + 1 - count)))


def _pairs(sections: Mapping[str, Section]) -> Iterator[DataFrame]:
    return (section.pairs for section in sections.values() if section.pairs is not None)
