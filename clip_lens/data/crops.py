"""Ids of parts of images: "2317.jpg#xywh=10,20,100,80", a media fragment (W3C), is a box of an image in pixels."""

from __future__ import annotations

import re
from typing import Any

Box = tuple[int, int, int, int]
"""Left, upper, width and height of a part of an image, in pixels."""

_CROP = re.compile(r"^(?P<image>.+)#xywh=(?P<box>-?\d+,-?\d+,\d+,\d+)$")


def crop_id(image: str, box: tuple[Any, Any, Any, Any]) -> str:
    """The id of a part of an image.

    Raises:
        ValueError: the box is not four whole numbers, or has no area.

    Example:
        >>> crop_id("2317.jpg", (10, 20, "100", 80.0))
        '2317.jpg#xywh=10,20,100,80'
    """
    try:
        numbers = [float(number) for number in box]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or any(number != round(number) for number in numbers) or min(numbers[2:]) <= 0:
        raise ValueError(f"the box {box} is none: it has left, upper, width and height as whole numbers of pixels")
    return f"{image}#xywh={','.join(str(round(number)) for number in numbers)}"


def cut_out(image: Any, box: Box | None) -> Any:
    """The part of a picture (PIL's), the picture itself without a box.

    Raises:
        ValueError: the box lies outside of the picture.
    """
    if box is None:
        return image
    left, upper, width, height = box
    if left >= image.width or upper >= image.height or left + width <= 0 or upper + height <= 0:
        raise ValueError(f"the box {left},{upper},{width},{height} is outside of {image.width} x {image.height} pixels")
    return image.crop((left, upper, left + width, upper + height))


def cropped(name: str) -> tuple[str, Box | None]:
    """The image that an id is of, and the box if it names a part of it.

    Example:
        >>> cropped("2317.jpg#xywh=10,20,100,80"), cropped("2317.jpg")
        (('2317.jpg', (10, 20, 100, 80)), ('2317.jpg', None))
    """
    found = _CROP.match(name)
    if found is None:
        return name, None
    left, upper, width, height = map(int, found["box"].split(","))
    return found["image"], (left, upper, width, height)
