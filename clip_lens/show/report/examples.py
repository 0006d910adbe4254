"""Example pairs of a report, and their pictures as small copies inside the page."""

from __future__ import annotations

from typing import Any, NamedTuple

from pandas import DataFrame

from clip_lens.core.effects import SEGMENTS, SIDES
from clip_lens.show.figures.thumbnails import Pictures, picture_file, thumbnail


class Example(NamedTuple):
    """A pair as a report shows it; `picture` is a data URI, None without a readable file."""

    key: str
    caption: str
    foil: str
    side: str
    segment: str
    d: float
    picture: str | None


def examples(pairs: DataFrame, pictures: Pictures = None) -> dict[str, list[Example]]:
    """Example pairs by segment, failures first: on each side the pair of the smallest, the middle and the largest d.

    Of the pairs of a segment and side that have a picture, where some have. `pairs` as in `Effects`. `pictures` is a
    folder that holds the image ids, or a mapping from image id to file.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> {segment: [pair.key for pair in found] for segment, found in examples(toy_effects().pairs).items()}
        {'correct': ['a', 'c', 'b']}
    """
    pairs = pairs.drop_duplicates("key").sort_values("d", kind="stable")
    seen = pairs["image"].map(lambda image: picture_file(str(image), pictures) is not None)
    found: dict[str, list[Example]] = {}
    for segment in dict.fromkeys([*SEGMENTS, *pairs["segment"]]):
        for side in SIDES:
            chosen = (pairs["segment"] == segment) & (pairs["side"] == side)
            part = pairs[chosen & seen] if (chosen & seen).any() else pairs[chosen]
            for number in sorted({0, len(part) // 2, len(part) - 1} if len(part) else ()):
                found.setdefault(str(segment), []).append(example_of(part.iloc[number], pictures))
    return found


def example_of(row: Any, pictures: Pictures) -> Example:
    """A row of a result's pairs as a report shows it.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> example_of(toy_effects().pairs.iloc[0], None).key
        'a'
    """
    texts = {name: str(row[name]) for name in ("key", "caption", "foil", "side", "segment")}
    return Example(**texts, d=float(row["d"]), picture=thumbnail(picture_file(str(row["image"]), pictures)))
