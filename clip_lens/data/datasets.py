"""Readers of published data sets in their own files, on the base of `formats`. Which key means what is from their
public repositories; what each makes of an item stands in docs/pairs.md."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from clip_lens.data.crops import crop_id
from clip_lens.data.formats import Format, Item, Items, Unusable, choices, pair, register, swapped, texts_in
from clip_lens.data.pairs import FOIL_IMAGE

VALSE_VOTES = 2  # of three annotators; Parcalabescu et al. 2022, section 4.4


def _valse(key: str, item: Item) -> Iterator[Item]:
    mturk = item.get("mturk")
    votes = mturk.get("caption", 0) if isinstance(mturk, dict) else VALSE_VOTES
    if not isinstance(votes, int | float):
        raise ValueError(f"{votes!r} votes in mturk; they must be a number, or left out")
    if votes < VALSE_VOTES:
        raise Unusable(f"not valid: {votes} annotators chose the caption, VALSE asks for {VALSE_VOTES}")
    file = item.pop("image_file", "") if "image" not in item else ""
    yield pair(item.pop("caption", ""), item.pop("foil", ""), item.pop("image", file))


register(Format("valse", "VALSE: items by key", ("caption", "foil", "image_file"), _valse))
BY_KEY = Format("plain", "items by key", ("caption", "foil"), _valse)
"""A dict of items like VALSE's with the columns of plain pairs."""


def _sugarcrepe(key: str, item: Item) -> Iterator[Item]:
    yield pair(item.pop("caption"), item.pop("negative_caption"), item.pop("filename"))


register(Format("sugarcrepe", "SugarCrepe: items by number", ("filename", "caption", "negative_caption"), _sugarcrepe))


def _sugarcrepe_pp(key: str, item: Item) -> Iterator[Item]:
    captions = [item.pop("caption"), item.pop("caption2")]
    return choices(key, captions, [item.pop("negative_caption")], item.pop("filename"))


register(
    Format(
        "sugarcrepe++",
        "SugarCrepe++: a list of items with two captions",
        ("filename", "caption", "caption2", "negative_caption"),
        _sugarcrepe_pp,
    )
)


def _negbench_mcq(key: str, item: Item) -> Iterator[Item]:
    columns = sorted((name for name in item if _numbered(name)), key=_numbered)
    captions = [item.pop(name) for name in columns]
    right = int(item.pop("correct_answer"))
    if not 0 <= right < len(captions):
        raise ValueError(f"correct_answer is {right}; it is one of 0 to {len(captions) - 1}")
    return choices(key, [captions.pop(right)], captions, item.pop("image_path"))


def _numbered(name: str) -> int:
    """caption_0 -> 1, caption_1 -> 2, ...; 0 for other names."""
    head, _, number = name.rpartition("_")
    return int(number) + 1 if head == "caption" and number.isdecimal() else 0


register(
    Format(
        "negbench-mcq",
        "NegBench, multiple choice: caption_0, caption_1, ... and which of them is right",
        ("image_path", "caption_0", "caption_1", "correct_answer"),
        _negbench_mcq,
    )
)


def _partners(items: Items) -> None:
    """Gives every image of a retrieval set another one, two by two, an odd last one the one before it."""
    if len(items) < 2:
        raise ValueError("a foil is a caption of another image, and there is one image only")
    taken = [(item["filepath"], texts_in(item["captions"], "captions")) for _, _, item in items]
    for number, (_, _, item) in enumerate(items):
        partner = number ^ 1 if number ^ 1 < len(items) else number - 1
        item[FOIL_IMAGE], item["captions of another"] = taken[partner]


def _negbench_retrieval(key: str, item: Item) -> Iterator[Item]:
    foils, image = item.pop("captions of another"), item.pop("filepath")
    for number, caption in enumerate(texts_in(item.pop("captions"), "captions")):
        yield pair(caption, foils[number % len(foils)], image, key=f"{key}/{number}")


register(
    Format(
        "negbench-retrieval",
        "NegBench, retrieval: an image and a list of captions in each row",
        ("filepath", "captions"),
        _negbench_retrieval,
        detected=False,
        together=_partners,
    )
)


def _cc_neg(key: str, item: Item) -> Iterator[Item]:
    told = item.pop("annotations")
    yield pair(told["json"]["caption"], told["sop_data"]["negative-prompt"], item.pop("image_paths"), negation="foil")


register(Format("cc-neg", "CC-Neg: lists of image_paths and annotations", ("image_paths", "annotations"), _cc_neg))


def _aro(key: str, item: Item) -> Iterator[Item]:
    box = tuple(item.pop(f"bbox_{side}") for side in "xywh")
    yield pair(item.pop("true_caption"), item.pop("false_caption"), crop_id(_image(item.pop("image_path")), box))


register(
    Format(
        "aro",
        "ARO, relations or attributes of Visual Genome: items with a box",
        ("image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h"),
        _aro,
    )
)


def _whatsup(key: str, item: Item) -> Iterator[Item]:
    true, *foils = texts_in(item.pop("caption_options"), "caption_options")
    return choices(key, [true], foils, item.pop("image_path"))


register(Format("whatsup", "What'sUp: items whose first option is true", ("image_path", "caption_options"), _whatsup))


def _whatsup_coco(key: str, item: Item) -> Iterator[Item]:
    yield pair(item.pop("1"), item.pop("2"), f"{_image(item.pop('0')).zfill(12)}.jpg")


def _whatsup_vg(key: str, item: Item) -> Iterator[Item]:
    yield pair(item.pop("1"), item.pop("2"), f"{_image(item.pop('0'))}.jpg")


for _name, _reader in (("whatsup-coco", _whatsup_coco), ("whatsup-vg", _whatsup_vg)):
    _lists = "What'sUp on photographs: lists of an image's number, a true and a false caption"
    register(Format(_name, _lists, ("0", "1", "2"), _reader, detected=False))


def _crepe(column: str, key: str, item: Item) -> Iterator[Item]:
    image = f"{_image(item.pop('image_id'))}.jpg"
    if {"x", "y", "width", "height"} <= item.keys():
        image = crop_id(image, (item.pop("x"), item.pop("y"), item.pop("width"), item.pop("height")))
    return choices(key, [item.pop("caption")], texts_in(item.pop(column), column), image)


for _name, _column in (
    ("crepe", "hard_negs"),
    ("crepe-atom", "valid_hard_negs_atom"),
    ("crepe-comp", "valid_hard_negs_comp"),
):
    _rows = "CREPE: rows with a caption and the text of a list of foils"
    register(
        Format(
            _name,
            _rows,
            ("image_id", "caption", _column),
            partial(_crepe, _column),
        )
    )


def _colorswap(key: str, item: Item) -> Iterator[Item]:
    captions, images = ((item.pop(f"{what}_1"), item.pop(f"{what}_2")) for what in ("caption", "image"))
    return swapped(key, captions, images)


def _winoground(key: str, item: Item) -> Iterator[Item]:
    captions, images = ((item.pop(f"{what}_0"), item.pop(f"{what}_1")) for what in ("caption", "image"))
    return swapped(key, captions, images)


register(Format("colorswap", "ColorSwap: caption_1, caption_2 and their images",
                ("caption_1", "caption_2", "image_1", "image_2"), _colorswap))  # fmt: skip
register(Format("winoground", "Winoground: caption_0, caption_1 and their images",
                ("caption_0", "caption_1", "image_0", "image_1"), _winoground))  # fmt: skip


def _image(value: Any) -> str:
    """An image's name or number as a text."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{value!r} is no name or number of an image")
    return str(value)
