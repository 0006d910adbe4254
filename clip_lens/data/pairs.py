"""Pairs: captions, their foils and the ids of their images, as read from a file. No tensors, no model.

A pair is (caption c, foil f, image i); the caption is true of the image and the foil is not. What can't be used is
listed with its key and a reason in `Pairs.dropped`.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from clip_lens.data.groups import SplitBy, first_part
from clip_lens.data.repairs import offered
from clip_lens.words import close, counted, some

NEGATORS = ("no", "not", "without", "n't", "never", "none", "nobody", "nothing")

SIDES = ("caption", "foil", "none")
TEXTS = ("caption", "foil", "image")
OWN = ("key", *TEXTS, "side", "sigma", "d", "segment", "unaligned")
"""Columns that results on the pairs have of their own."""

QUESTION = "question"
"""The column that says which pairs belong together: one question with several foils, or a group of two images."""
FOIL_IMAGE = "foil_image"
"""The column with the image that the foil is true of."""
FOILS = "foils"
"""The column that says how many pairs a question has: one that lost some on the way is not scored."""

VALSE_SIDES = {"zero_to_something": "caption", "something_to_zero": "foil"}

_NEGATOR = re.compile(r"\b(?:no|not|without|never|none|nobody|nothing)\b|n't\b", re.IGNORECASE)
_THERE_ARE = re.compile(r"there are\b", re.IGNORECASE)
_THERE_IS = re.compile(r"there is\b", re.IGNORECASE)

_ANSWER = re.compile(r"(?<=[?.!])\s*(?:yes|no)\W*$", re.IGNORECASE)

Dropped = list[tuple[str, str]]


def _nothing_dropped() -> pd.DataFrame:
    return pd.DataFrame({"key": [], "reason": []}, dtype=str)


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Pairs of a caption and a foil about one image, in the order of the file; of texts alone, every image is empty.

    A column `question` of `info` says which pairs belong together, such as one caption with several foils: they are
    scored as one, and no split parts them. `info` has a row per pair for every further column of the file. `dropped`
    (columns key, reason) lists what was lost on the way here; what a caller asked to leave out, by an index, `where` or
    `split`, is not a loss.

    Raises:
        ValueError: the columns differ in length, keys or columns repeat, a column of `info` is named like one that
            results have (`OWN`), or its column `negation` says something else than caption, foil or none.

    Example:
        >>> pairs = Pairs(["a"], ["There are no cats."], ["There are some cats."], ["1.jpg"])
        >>> pairs.side
        ('caption',)
    """

    key: Sequence[str]
    caption: Sequence[str]
    foil: Sequence[str]
    image: Sequence[str]
    info: pd.DataFrame = field(default_factory=pd.DataFrame)
    name: str = "pairs"
    dropped: pd.DataFrame = field(default_factory=_nothing_dropped)

    def __post_init__(self) -> None:
        for name in ("key", *TEXTS):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        info = self.info.reset_index(drop=True) if len(self.info.columns) else pd.DataFrame(index=range(len(self.key)))
        object.__setattr__(self, "info", info)
        lengths = {name: len(getattr(self, name)) for name in ("key", *TEXTS, "info")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"key, caption, foil, image and info must have one entry per pair, got {lengths}")
        taken = [name for name in OWN if name in info]
        if taken:
            raise ValueError(
                f"{self.name} can't have further columns named {', '.join(taken)}: results have their own by these "
                "names; rename them, or leave them out"
            )
        refuse_repeated_columns(list(info.columns), self.name)
        _unique_keys(self.key, self.name)
        _negation(self)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, name: str = "frame") -> Pairs:
        """The pairs of a DataFrame with columns caption, foil, image, read by the rules of `read_pairs`.

        Example:
            >>> read = Pairs.from_frame(clip_lens.read_pairs("tiny").to_frame().head(3))
            >>> len(read)
            3
        """
        return pairs_of(frame.reset_index(drop=True), name, [])

    def __len__(self) -> int:
        return len(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pairs) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Pairs({self.name}: {_summary(self)})"

    def _repr_html_(self) -> str:
        shown = self.to_frame().head(5)[["key", "caption", "foil", "image", "side"]]
        return f"<p><b>{html.escape(self.name)}</b>: {_summary(self)}</p>{shown.to_html(index=False)}"

    def __getitem__(self, index: Any) -> Pairs:
        """The pairs at an index, a slice, a sequence of indices or a boolean mask; always `Pairs`, also for one.

        Raises:
            IndexError: an index is out of range, or a mask has another length than the pairs.

        Example:
            >>> len(clip_lens.read_pairs("tiny")[:10])
            10
        """
        rows = _rows(index, len(self))
        columns = {name: [getattr(self, name)[row] for row in rows] for name in ("key", *TEXTS)}
        return Pairs(**columns, info=self.info.iloc[rows], name=self.name, dropped=self.dropped)

    @property
    def side(self) -> tuple[str, ...]:
        """Where the negation stands in each pair: "caption", "foil" or "none".

        The column `negation` if there is one; else VALSE's `provenance_of_foils`; else the one text that has more
        tokens of `NEGATORS`, without a last "no" that answers a question ("Is it sunny? no."); otherwise none.
        """
        stated = _negation(self)
        if stated is not None:
            return stated
        provenance = self.info.get("provenance_of_foils", pd.Series("", index=self.info.index))
        return tuple(
            VALSE_SIDES.get(origin) or _counted_side(caption, foil)
            for origin, caption, foil in zip(provenance, self.caption, self.foil, strict=True)
        )

    @property
    def question(self) -> tuple[str, ...] | None:
        """The question that each pair belongs to, one of its own where the column is empty; None without the column.

        Example:
            >>> pairs = clip_lens.read_pairs("tiny")[:3]
            >>> pairs.question is None, Pairs.from_frame(pairs.to_frame().assign(question="one")).question
            (True, ('one', 'one', 'one'))
        """
        return tuple(questions(self.info[QUESTION], self.key)) if QUESTION in self.info else None

    @property
    def has_images(self) -> bool:
        """Whether the pairs are about images; texts alone are not."""
        return any(self.image)

    @property
    def images(self) -> tuple[str, ...]:
        """Every image once, those that foils are true of too.

        Example:
            >>> Pairs(["a", "b"], ["no cat", "no dog"], ["a cat", "a dog"], ["1.jpg", "1.jpg"]).images
            ('1.jpg',)
        """
        return tuple(dict.fromkeys([*filter(None, self.image), *map(str, self.info.get(FOIL_IMAGE, ()))]))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a sha256 over the pairs and their info: the same content gives the same digest."""
        texts = json.dumps([self.key, self.caption, self.foil, self.image])
        return hashlib.sha256((texts + self.info.to_csv(index=False, lineterminator="\n")).encode()).hexdigest()[:16]

    def to_frame(self) -> pd.DataFrame:
        """A DataFrame with a row per pair: key, caption, foil, image, side, and the columns of `info`.

        Example:
            >>> list(clip_lens.read_pairs("tiny").to_frame().columns[:5])
            ['key', 'caption', 'foil', 'image', 'side']
        """
        columns = {name: list(getattr(self, name)) for name in ("key", *TEXTS, "side")}
        return pd.concat([pd.DataFrame(columns, dtype=str), self.info], axis=1)

    def where(self, **filters: Any) -> Pairs:
        """The pairs whose columns have the given values: one value, a collection of those that fit, or a function from
        the column to a truth value per pair, as in `Effects.where`.

        Columns are those of `to_frame()`.

        Raises:
            ValueError: there is no such column, no pair is left (the message lists what there is), or a function gives
                something else than a truth value per pair.

        Example:
            >>> set(clip_lens.read_pairs("tiny").where(side="foil").side)
            {'foil'}
        """
        frame = self.to_frame()
        mask = np.ones(len(self), dtype=bool)
        for column, wanted in filters.items():
            if column not in frame:
                raise ValueError(f"pairs have no column {column!r}{close(column, frame.columns)}")
            mask &= _fits(frame[column], wanted)
        if len(self) and not mask.any():
            there = "; ".join(f"{column} has {some(frame[column].unique(), quote=True)}" for column in filters)
            asked = ", ".join(f"{column}={wanted!r}" for column, wanted in filters.items())
            raise ValueError(f"no pair of {self.name} has {asked}: {there}")
        return self[mask]

    def split(self, fraction: float = 0.5, seed: int = 0, by: SplitBy = "image") -> tuple[Pairs, Pairs]:
        """Two parts, the first with about `fraction` of the pairs, drawn at random by `seed`; the order stays.

        `by="image"` keeps the pairs of one image together. `by="text"` keeps those together that share a text, as
        caption or as foil, or an image, directly or over other pairs: no text of one part stands in the other. The
        pairs of one question stay together either way. The parts come as close to `fraction` as such groups allow.

        Raises:
            ValueError: `fraction` isn't between 0 and 1, an unknown `by`, by image where there are none, or all pairs
                are of one group.

        Example:
            >>> first, second = clip_lens.read_pairs("tiny").split(0.3, seed=1, by="text")
            >>> set(first.caption + first.foil) & set(second.caption + second.foil)
            set()
        """
        texts = zip(self.caption, self.foil, strict=True)
        first = first_part(self.image, texts, fraction, seed, by, self.question)
        return self[first], self[~first]

    def repaired(self, ids: Iterable[str]) -> Pairs:
        """The pairs with the ids of a store in place of images' names that differ from one in folders, letters' case,
        kind of slash or ending alone ("C:\\\\pictures\\\\p04.jpg", "p04.gif").

        A name that none or several of the ids may be meant by stays, and so does one that is an id.

        Example:
            >>> Pairs(["a"], ["no cat"], ["a cat"], ["/data/p04.jpg"]).repaired(["p04.gif", "p05.gif"]).image
            ('p04.gif',)
        """
        found = offered([*self.image, *map(str, self.info.get(FOIL_IMAGE, ()))], ids)
        info = self.info.copy()
        if FOIL_IMAGE in info:
            info[FOIL_IMAGE] = [found.get(name, name) for name in info[FOIL_IMAGE]]
        return replace(self, image=[found.get(name, name) for name in self.image], info=info)

    def rephrased(self) -> Pairs:
        """The pairs with caption and foil equally long, as in Quantmeyer et al. 2024.

        Where the caption starts with "There are", "some" is put after "are" in the text without the negation, if it
        isn't there; captions that start with "There is" stay. All other pairs are listed in `dropped`, with the reason.

        Raises:
            ValueError: no pair fits.

        Example:
            >>> Pairs(["a"], ["There are no cats."], ["There are cats."], ["1.jpg"]).rephrased().foil
            ('There are some cats.',)
        """
        texts = [_rephrase(*pair) for pair in zip(self.caption, self.foil, self.side, strict=True)]
        lost = [(key, text) for key, text in zip(self.key, texts, strict=True) if isinstance(text, str)]
        if len(lost) == len(self):
            raise ValueError(f"no pair of {self.name} can be rephrased; {listed(lost)}")
        kept = self[[row for row, text in enumerate(texts) if not isinstance(text, str)]]
        caption, foil = zip(*(text for text in texts if not isinstance(text, str)), strict=True)
        dropped = pd.concat([self.dropped, _dropped(lost)], ignore_index=True)
        return replace(kept, caption=caption, foil=foil, name=f"{self.name} (rephrased)", dropped=dropped)


def pairs_of(frame: pd.DataFrame, name: str, dropped: Dropped) -> Pairs:
    """The pairs of a table, after what was dropped on the way to it; `read_pairs` says by which rules.

    Without a column image, or with an empty one, they are pairs of texts alone.

    Raises:
        ValueError: a column is missing or stands there twice, a key repeats or is empty, or no pair is left.

    Example:
        >>> table = pd.DataFrame({"caption": ["no cat", "a cat"], "foil": ["a cat", ""], "image": ["1.jpg", "2.jpg"]})
        >>> pairs_of(table, "table", [])
        Pairs(table: 1 pair, negation in 1 caption, 0 foil, 0 none; 1 dropped)
    """
    refuse_repeated_columns(list(frame.columns), name)
    absent = [column for column in TEXTS if column not in frame.columns]
    if set(absent) - {"image"} and len(frame.columns):
        raise ValueError(
            f"{name} has no column {', '.join(absent)}; found {some(frame.columns, 12, quote=True)}; "
            "name the columns caption, foil, image"
        )
    frame = _one_negation_column(frame, name)
    keys = _keys(frame, name)
    texts = {column: [_text(value) for value in frame.get(column, [""] * len(frame))] for column in TEXTS}
    about_images = any(map(str.strip, texts["image"]))
    reasons = [_reason(row, about_images) for row in zip(*texts.values(), strict=True)]
    dropped = dropped + [(key, reason) for key, reason in zip(keys, reasons, strict=True) if reason]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    if not kept:
        raise ValueError(f"no pair of {name} is left; {listed(dropped) if dropped else 'it has no rows'}")
    info = frame.iloc[kept].drop(columns=[column for column in ("key", *TEXTS) if column in frame])
    columns = {column: [values[row] for row in kept] for column, values in texts.items()}
    key = [keys[row] for row in kept]
    return Pairs(key, **columns, info=info.infer_objects(), name=name, dropped=_dropped(dropped))


def refuse_repeated_columns(columns: Sequence[Any], where: str) -> None:
    """Nothing, if every column has a name of its own: of several the first would be taken unsaid.

    Raises:
        ValueError: names repeat.
    """
    repeated = repetitions(map(str, columns))
    if repeated:
        raise ValueError(f"{where} has several columns named {some(repeated)}; remove or rename all but one")


def _one_negation_column(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """`to_frame()` writes the side as `side`; read back it is the column `negation`."""
    if "side" not in frame:
        return frame
    if "negation" not in frame:
        return frame.rename(columns={"side": "negation"})
    if [_stated(value) for value in frame["side"]] != [_stated(value) for value in frame["negation"]]:
        raise ValueError(f"{name} has the columns side and negation and they differ; keep the one that is right")
    return frame.drop(columns="side")


def _keys(frame: pd.DataFrame, name: str) -> list[str]:
    if "key" not in frame:
        return [str(row) for row in range(len(frame))]
    keys = [_text(value) for value in frame["key"]]
    empty = [str(row) for row, key in enumerate(keys) if not key.strip()]
    if empty:
        raise ValueError(
            f"{name} has no key in rows {some(empty, quote=True)} (from 0); fill the column key or leave it out"
        )
    _unique_keys(keys, name)
    return keys


def _unique_keys(keys: Sequence[str], name: str) -> None:
    repeated = repetitions(keys)
    if repeated:
        raise ValueError(
            f"{name} repeats {len(repeated)} keys: {some(repeated, quote=True)}; every pair needs a key of its own"
        )


def questions(asked: Iterable[Any], keys: Iterable[str]) -> list[str]:
    """The question of each pair as a text; a pair without one has one of its own, which no other is called.

    Example:
        >>> questions([1.0, 1.0, None, ""], ["0", "1", "2", "3"])
        ['1.0', '1.0', 'pair 2', 'pair 3']
    """
    missing = [(not isinstance(value, str) and bool(pd.isna(value))) or value == "" for value in asked]
    return [f"pair {key}" if none else str(value) for value, key, none in zip(asked, keys, missing, strict=True)]


def repetitions(names: Iterable[str]) -> list[str]:
    series = pd.Series(list(names), dtype=str)
    return list(series[series.duplicated()].unique())


def _text(value: Any) -> str:
    """A cell as text; whole numbers keep their digits, what is missing or no text becomes empty."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    return ""


def _reason(row: Sequence[str], about_images: bool) -> str | None:
    for column, value in zip(TEXTS, row, strict=True):
        if not value.strip() and (about_images or column != "image"):
            return f"{column} is empty or not text"
    return "caption and foil are equal" if row[0] == row[1] else None


def _negation(pairs: Pairs) -> tuple[str, ...] | None:
    if "negation" not in pairs.info:
        return None
    stated = tuple(_stated(value) for value in pairs.info["negation"])
    unknown = sorted(set(stated) - set(SIDES))
    if unknown:
        raise ValueError(
            f"the column negation of {pairs.name} says {some(unknown, quote=True)}; it must say caption, foil or none, "
            "the text with the negation; rename the column if it means something else"
        )
    return stated


def _stated(value: Any) -> str:
    missing = value is None or (not isinstance(value, str) and bool(pd.isna(value)))
    return "none" if missing else str(value).strip().lower() or "none"


def _counted_side(caption: str, foil: str) -> str:
    """The text with more negators; a "no" that answers a question is none."""
    in_caption, in_foil = (
        len(_NEGATOR.findall(_ANSWER.sub("", text.replace("\u2019", "'")))) for text in (caption, foil)
    )
    return "none" if in_caption == in_foil else "caption" if in_caption > in_foil else "foil"


def _rephrase(caption: str, foil: str, side: str) -> tuple[str, str] | str:
    """The rephrased texts, or the reason why there are none."""
    if side == "none":
        return "can't be rephrased: no side has the negation"
    if _THERE_IS.match(caption):
        return caption, foil
    if not _THERE_ARE.match(caption):
        return 'can\'t be rephrased: starts neither with "There is" nor with "There are"'
    affirmative = foil if side == "caption" else caption
    if not _THERE_ARE.match(affirmative):
        return "can't be rephrased: the text without negation doesn't start with \"There are\""
    there_are, rest = affirmative[:9], affirmative[9:]
    longer = affirmative if re.match(r"\s+some\b", rest, re.IGNORECASE) else f"{there_are} some{rest}"
    return (caption, longer) if side == "caption" else (longer, foil)


def _rows(index: Any, length: int) -> list[int]:
    if isinstance(index, slice):
        return list(range(length)[index])
    rows = np.atleast_1d(np.asarray(index))
    if rows.dtype == bool:
        if len(rows) != length:
            raise IndexError(f"the mask has {len(rows)} entries for {length} pairs; give one per pair")
        return list(np.flatnonzero(rows))
    if rows.size and not np.issubdtype(rows.dtype, np.integer):
        raise IndexError(
            f"pairs are indexed by numbers, slices and masks, got {index!r}; use where(key=...) for keys, and "
            "pairs.to_frame() for columns"
        )
    outside = [int(row) for row in rows if not -length <= row < length]
    if outside:
        raise IndexError(f"there are {length} pairs, got index {some(outside, quote=True)}")
    return [int(row) for row in rows]


def _fits(column: pd.Series, wanted: Any) -> np.ndarray:
    if not callable(wanted):
        return column.isin(_collection(wanted)).to_numpy(dtype=bool)
    found = np.asarray(wanted(column))
    if found.shape != (len(column),):
        raise ValueError(f"a filter on {column.name!r} must give one truth value per pair. Got {found!r}")
    return found.astype(bool)


def _collection(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, (str, bytes)) else [wanted]


def _summary(pairs: Pairs) -> str:
    sides = pairs.side
    counts = ", ".join(f"{sides.count(side)} {side}" for side in SIDES)
    told = f", negation in {counts}" if set(sides) - {"none"} else ""
    lost = f"; {len(pairs.dropped)} dropped" if len(pairs.dropped) else ""
    asked = f" of {counted(len(set(pairs.question)), 'question')}" if pairs.question else ""
    bare = "" if pairs.has_images else ", without images"
    return f"{counted(len(pairs), 'pair')}{asked}{bare}{told}{lost}"


def _dropped(rows: Dropped) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["key", "reason"], dtype=str)


def listed(dropped: Dropped) -> str:
    return f"{len(dropped)} were dropped: " + some([f"{key} ({reason})" for key, reason in dropped], 3)
