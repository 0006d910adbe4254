"""What a reader of a data set's own files is: a name, the columns of its items, and the pairs that an item makes.

A reader takes from an item what it uses (`item.pop`); what is left over stays as columns of the pairs. Further readers
are registered by name:

    register(Format("mine", "my pairs", ("file", "good", "bad"), mine))

with a function `mine(key, item)` that yields the pairs of one item, made by `pair`, `choices` or `swapped`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from clip_lens.data.pairs import FOIL_IMAGE, FOILS, QUESTION, TEXTS, Dropped
from clip_lens.words import close, some

Item: TypeAlias = dict[str, Any]
Items: TypeAlias = Sequence[tuple[str, str, Item]]
"""Where each item stands in its file, its key, and what it holds."""


class Unusable(ValueError):
    """An item that makes no pair, for this reason; it is listed in `dropped`."""


def _as_they_are(items: Items) -> None:
    """Most readers need nothing of an item's neighbours."""


@dataclass(frozen=True)
class Format:
    """A data set's own layout.

    `needs` are the columns that every item has. `pairs(key, item)` yields the pairs of one item. `detected`: items with
    these columns are of this format, unless several are; without it a file is read so only where `format=` says it.
    `together` is called with all items before, where one needs something of the others.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    pairs: Callable[[str, Item], Iterable[Item]]
    detected: bool = True
    together: Callable[[Items], None] = _as_they_are


_FORMATS: dict[str, Format] = {}
FORMATS: Mapping[str, Format] = MappingProxyType(_FORMATS)
"""Every registered format by its name."""
PLAIN = "plain"
"""The name of files with the columns caption, foil, image."""


def register(format: Format) -> Format:
    """The format itself, known by its name from now on; the same one may be registered again.

    Raises:
        ValueError: another format has that name.

    Example:
        >>> register(FORMATS["sugarcrepe"]).needs
        ('filename', 'caption', 'negative_caption')
    """
    known = PLAIN if format.name == PLAIN else _FORMATS.setdefault(format.name, format)
    if known != format:
        raise ValueError(f"a format {format.name!r} is registered already; choose another name")
    return format


def format_of(columns: Collection[str], asked: str | None, where: str) -> Format | None:
    """The format of items with these columns: the one that is asked for, else the one that they fit; None: plain pairs.

    Of two formats of which one needs all that the other needs, and more, the columns fit that one.

    Raises:
        ValueError: an unknown format, or columns that fit several.

    Example:
        >>> format_of(["filename", "caption", "negative_caption"], None, "swap_att.json").name
        'sugarcrepe'
        >>> format_of(["caption", "foil", "image"], None, "my.csv") is None
        True
    """
    if asked is not None and asked != PLAIN:
        if asked not in FORMATS:
            raise ValueError(f"format={asked!r} is none{close(asked, [PLAIN, *FORMATS])}")
        return FORMATS[asked]
    if asked == PLAIN or set(TEXTS) <= set(columns):
        return None
    fits = [format for format in FORMATS.values() if format.detected and set(format.needs) <= set(columns)]
    best = [format for format in fits if not any(set(format.needs) < set(other.needs) for other in fits)]
    if len(best) > 1:
        raise ValueError(f"{where} fits the formats {some(format.name for format in best)}; say which with format=")
    return best[0] if best else None


def read_items(format: Format, items: Items, where: str) -> tuple[list[tuple[str, Item]], Dropped]:
    """The pairs that items make, each with its place in the file, and the items that make none.

    Raises:
        ValueError: an item lacks a column that the format needs, or holds something else there; the message names it.

    Example:
        >>> item = {"filename": "1.jpg", "caption": "a red cup", "negative_caption": "a blue cup", "source": "coco"}
        >>> read_items(FORMATS["sugarcrepe"], [("entry 0", "0", item)], "swap_att.json")[0][0][1]
        {'source': 'coco', 'key': '0', 'caption': 'a red cup', 'foil': 'a blue cup', 'image': '1.jpg'}
    """
    for place, _, item in items:
        absent = [column for column in format.needs if column not in item]
        if absent:
            raise ValueError(
                f"{where}, {place}, has no {some(absent)}; a file of the format {format.name} has "
                f"{some(format.needs, 8)}, {place} has {some(item, 8) or 'nothing'}"
            )
    made: list[tuple[str, Item]] = []
    dropped: Dropped = []
    items = [(place, key, dict(item)) for place, key, item in items]
    try:
        format.together(items)
        for place, key, item in items:
            try:
                pairs = list(format.pairs(key, item))
            except Unusable as reason:
                dropped.append((key, str(reason)))
                continue
            made += [(place, {**item, "key": key, **one}) for one in pairs]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}, {place}: {told}; a file of the format {format.name} is {format.about}") from error
    return made, dropped


def pair(caption: Any, foil: Any, image: Any = "", **more: Any) -> Item:
    """One pair."""
    return {"caption": caption, "foil": foil, "image": image, **more}


def choices(key: str, captions: Sequence[Any], foils: Sequence[Any], image: Any = "", **more: Any) -> Iterator[Item]:
    """One question as a pair for each caption and each foil: right when every caption beats every foil.

    Example:
        >>> [(one["key"], one["foil"], one["foils"]) for one in choices("7", ["a cup on a box"], ["under", "beside"])]
        [('7/0', 'under', 2), ('7/1', 'beside', 2)]

    Raises:
        ValueError: no caption, or no foil.
    """
    both = [(caption, foil) for caption in captions for foil in foils]
    if not both:
        raise ValueError(f"a question has a caption and a foil, got {len(captions)} and {len(foils)}")
    for number, (caption, foil) in enumerate(both):
        asked = {"key": f"{key}/{number}", QUESTION: key, FOILS: len(both)}
        yield pair(caption, foil, image, **asked, **more)


def swapped(key: str, captions: tuple[Any, Any], images: tuple[Any, Any]) -> Iterator[Item]:
    """A group of two captions and two images as two pairs, each caption being the foil of the other one's image.

    Example:
        >>> [one["foil_image"] for one in swapped("7", ("a red cup", "a blue cup"), ("r.png", "b.png"))]
        ['b.png', 'r.png']
    """
    for number in (0, 1):
        asked = {"key": f"{key}/{number}", QUESTION: key, FOILS: 2, FOIL_IMAGE: images[1 - number]}
        yield pair(captions[number], captions[1 - number], images[number], **asked)


def texts_in(value: Any, column: str) -> list[str]:
    """The texts of a list, which a csv has as the text of a Python list.

    Raises:
        ValueError: it is no list of texts, or an empty one.

    Example:
        >>> texts_in("['a cup', 'two cups']", "captions")
        ['a cup', 'two cups']
    """
    found = value
    if isinstance(value, str):
        try:
            found = ast.literal_eval(value.strip())  # never eval: a file of pairs runs no code
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{column} is {value[:60]!r}, no list of texts") from error
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{column} is {str(value)[:60]!r}, no list of texts")
    return list(found)
