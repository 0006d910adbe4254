"""`read_pairs`: the pairs of a csv, a json or a json lines file, or of any of VALSE's."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from clip_lens.data.pairs import TEXTS, Dropped, Pairs, listed, pairs_of, refuse_repeated_columns, repetitions
from clip_lens.tiny.assets import ASSETS
from clip_lens.words import some

TINY = ASSETS / "pairs.csv"
VALSE_VOTES = 2  # of three annotators; Parcalabescu et al. 2022, section 4.4


def read_pairs(path: str | Path = "tiny") -> Pairs:
    """The pairs of a file, in its order: a csv, a json list of objects, json lines, or any file of VALSE's.

    "tiny" reads the embedded pairs about rendered scenes. The columns caption, foil, image are needed and stay text
    ("00123" is not 123); `key` names a pair, else its row number does ("0", "1", ...); every other column goes to
    `info`, nested values as json text. A column `negation` (or `side`) of caption | foil | none says where the
    negation stands. Results have columns sigma, d, segment and unaligned of their own, so that pairs can't.

    VALSE (Parcalabescu et al. 2022) is recognised by its content, a dict of items with `image_file`: the dict's keys
    become keys, and items that fewer than two annotators confirmed (`mturk["caption"] < 2`) are dropped. Pairs with an
    empty text or image, or with equal texts, are dropped as well; `dropped` lists them all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, empty, broken, lacks a column, repeats a column or a key, has a column
            that results have of their own, or no usable pair.

    Example:
        >>> pairs = read_pairs("tiny")
        >>> sorted(set(pairs.side) - {"none"})
        ['caption', 'foil']
    """
    file = TINY if str(path) == "tiny" else Path(path)
    reader = _READERS.get(file.suffix.lower())
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{file} {what}; give a {_KINDS} file of pairs, or 'tiny' for the embedded ones")
    if reader is None:
        raise ValueError(f"can't read pairs from {file}: its name ends in {file.suffix!r}, known are {_KINDS}")
    frame, dropped = reader(_text_of(file), file)
    return pairs_of(frame, "tiny" if file == TINY else file.name, dropped)


def _text_of(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}, line {line}, has a NUL: the file is damaged, or no text; save it anew as UTF-8")
    if not text.strip():
        raise ValueError(f"{file} is empty; it must have columns caption, foil, image and a pair per row")
    return text


def _read_csv(text: str, file: Path) -> tuple[pd.DataFrame, Dropped]:
    header = _checked_header(text, file)
    # An empty field is missing; "None" or "NA" is a text like any other.
    missing = {column: [""] for column in header if column not in ("key", *TEXTS)}
    texts = dict.fromkeys(("key", *TEXTS), str)
    return pd.read_csv(StringIO(text), dtype=texts, keep_default_na=False, na_values=missing, low_memory=False), []


def _checked_header(text: str, file: Path) -> list[str]:
    """The names of the columns, after every row was found to have a field for each: pandas fills and guesses."""
    rows = csv.reader(StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in rows:
            if fields and not (len(fields) == 1 and not fields[0].strip()):
                if not header:
                    header = fields
                    refuse_repeated_columns([name for name in header if name], str(file))
                if len(fields) != len(header):
                    raise ValueError(
                        f"{file}, line {line}, has {len(fields)} fields, the header has {len(header)}; "
                        "put quotes around texts with commas"
                    )
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {line}, is not readable as csv ({error}); close every quote, "
            "and double those inside a quoted text"
        ) from error
    return header


def _read_jsonl(text: str, file: Path) -> tuple[pd.DataFrame, Dropped]:
    items = [
        (f"line {number}", _parse(line, f"{file}, line {number}"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    return _frame(items, file), []


def _read_json(text: str, file: Path) -> tuple[pd.DataFrame, Dropped]:
    content = _parse(text, str(file))
    if isinstance(content, Mapping) and content and all(isinstance(item, Mapping) for item in content.values()):
        return _read_items(content, file)
    if isinstance(content, list):
        return _frame([(f"entry {number}", item) for number, item in enumerate(content)], file), []
    raise ValueError(
        f"{file} holds {_kind(content)}; it must hold a list of objects with caption, foil, image, "
        "or VALSE's dict of items with caption, foil, image_file"
    )


_READERS: dict[str, Callable[[str, Path], tuple[pd.DataFrame, Dropped]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}
_KINDS = ", ".join(_READERS)


def _read_items(content: Mapping[str, Mapping[str, Any]], file: Path) -> tuple[pd.DataFrame, Dropped]:
    """VALSE's form: items under their keys, with the annotators' votes."""
    dropped, kept = [], []
    for key, item in content.items():
        votes = item["mturk"].get("caption", 0) if isinstance(item.get("mturk"), Mapping) else VALSE_VOTES
        if not isinstance(votes, int | float):
            raise ValueError(f"{file}, item {key!r}: {votes!r} votes in mturk; they must be a number, or left out")
        if votes < VALSE_VOTES:
            dropped.append((key, f"not valid: {votes} annotators chose the caption, VALSE asks for {VALSE_VOTES}"))
        else:
            kept.append((key, {**_renamed(item, "image_file", "image"), "key": key}))
    if not kept:
        raise ValueError(f"no pair of {file} is left; {listed(dropped)}")
    return _frame(kept, file), dropped


def _renamed(item: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old and new not in item else name: value for name, value in item.items()}


def _parse(text: str, where: str) -> Any:
    def unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = repetitions([name for name, _ in entries])
        if repeated:
            raise ValueError(f"{where}: an object repeats {some(repeated, quote=True)}; every key may stand once")
        return dict(entries)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{where} is broken json: it is nested too deeply; mend or remove it") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ValueError(f"{where} is broken json: {error.msg} at {position}; mend or remove it") from error


def _frame(items: list[tuple[str, Any]], file: Path) -> pd.DataFrame:
    for where, item in items:
        if not isinstance(item, Mapping):
            raise ValueError(f"{file}, {where}, is {_kind(item)}; it must be an object with caption, foil, image")
    records = [{name: _flat(name, value) for name, value in item.items()} for _, item in items]
    # As objects: a column of integers with a gap would turn into floats, and an image's id with it.
    return pd.DataFrame(records, dtype=object)


def _flat(name: str, value: Any) -> Any:
    nested = isinstance(value, (Mapping, list)) and name not in ("key", *TEXTS)
    return json.dumps(value, ensure_ascii=False) if nested else value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
