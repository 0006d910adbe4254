"""Pictures by image id, and small copies of them that a page can hold."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path

Pictures = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None
"""A folder that holds the image ids, or a mapping from image id to file."""
EDGE = 192  # pixels, the longer edge of an embedded picture


def picture_file(image: str, pictures: Pictures) -> Path | None:
    """The file of an image id, None where there is none; an id never leads out of the folder.

    Example:
        >>> picture_file("../secret.png", "pictures") is None
        True
    """
    if pictures is None:
        return None
    if isinstance(pictures, Mapping):
        file = Path(pictures[image]) if image in pictures else None
    else:
        folder = Path(pictures).resolve()
        file = (folder / image).resolve()
        file = file if file.is_relative_to(folder) else None
    return file if file is not None and file.is_file() else None


def thumbnail(file: Path | None, edge: int = EDGE) -> str | None:
    """A small copy of a picture as a data URI of JPEG, its longer edge so many pixels; None without a readable file.

    Example:
        >>> thumbnail(Path("no such file")) is None
        True
    """
    from PIL import Image

    if file is None or not file.is_file():
        return None
    try:
        with Image.open(file) as opened:
            opened.thumbnail((edge, edge))
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "JPEG", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
