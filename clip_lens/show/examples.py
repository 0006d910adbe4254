"""Example pairs of a report, and their pictures as small copies inside the page."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from clip_lens.core.effects import SEGMENTS, SIDES

Pictures = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None
EDGE = 192  # pixels, the longer edge of an embedded picture


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
    seen = pairs["image"].map(lambda image: _file(str(image), pictures) is not None)
    found: dict[str, list[Example]] = {}
    for segment in dict.fromkeys([*SEGMENTS, *pairs["segment"]]):
        for side in SIDES:
            chosen = (pairs["segment"] == segment) & (pairs["side"] == side)
            part = pairs[chosen & seen] if (chosen & seen).any() else pairs[chosen]
            for number in sorted({0, len(part) // 2, len(part) - 1} if len(part) else ()):
                found.setdefault(str(segment), []).append(_example(part.iloc[number], pictures))
    return found


def _example(row: Any, pictures: Pictures) -> Example:
    texts = {name: str(row[name]) for name in ("key", "caption", "foil", "side", "segment")}
    return Example(**texts, d=float(row["d"]), picture=thumbnail(_file(str(row["image"]), pictures)))


def _file(image: str, pictures: Pictures) -> Path | None:
    """The file of an image id, None where there is none; an id never leads out of the folder."""
    if pictures is None:
        return None
    if isinstance(pictures, Mapping):
        file = Path(pictures[image]) if image in pictures else None
    else:
        folder = Path(pictures).resolve()
        file = (folder / image).resolve()
        file = file if file.is_relative_to(folder) else None
    return file if file is not None and file.is_file() else None


def thumbnail(file: Path | None) -> str | None:
    """A small copy of a picture as a data URI of JPEG; None without a readable file.

    Example:
        >>> thumbnail(Path("no such file")) is None
        True
    """
    from PIL import Image

    if file is None or not file.is_file():
        return None
    try:
        with Image.open(file) as opened:
            opened.thumbnail((EDGE, EDGE))
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "JPEG", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
