"""`read_pairs`: the pairs of a csv, a json or a json lines file, a DataFrame, or a published data set's own file."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from clip_lens.data.datasets import BY_KEY
from clip_lens.data.formats import FORMATS, Format, Items, format_of, read_items
from clip_lens.data.pairs import TEXTS, Dropped, Pairs, listed, pairs_of, refuse_repeated_columns, repetitions
from clip_lens.tiny.assets import ASSETS
from clip_lens.words import some

TINY = ASSETS / "pairs.csv"
Table: TypeAlias = tuple[pd.DataFrame, Dropped]


def read_pairs(path: str | Path | pd.DataFrame = "tiny", *, format: str | None = None) -> Pairs:
    """The pairs of a file, in its order: a csv, a json list of objects, json lines, or a published data set's own file.

    "tiny" reads the embedded pairs about rendered scenes; a DataFrame is read like a file with its columns. The columns
    caption and foil are needed, and image for pairs about images; they stay text ("00123" is not 123). `key` names a
    pair, else its row number does ("0", "1", ...); every other column goes to `info`, nested values as json text. A
    column `negation` (or `side`) of caption | foil | none says where the negation stands, a column `question` which
    pairs belong together. Results have columns sigma, d, segment and unaligned of their own, so that pairs can't.

    Files of VALSE, SugarCrepe, NegBench, CC-Neg, ARO, What'sUp, CREPE, ColorSwap and Winoground are recognised by their
    columns, or read as what `format` says (docs/pairs.md lists the names, and what each makes of an item). Of VALSE
    (Parcalabescu et al. 2022), items that fewer than two annotators confirmed (`mturk["caption"] < 2`) are dropped.
    Pairs with an empty text or image, or with equal texts, are dropped as well; `dropped` lists them all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, empty, broken, lacks a column, repeats a column or a key, has a column
            that results have of their own, fits several formats, or has no usable pair.

    Example:
        >>> pairs = read_pairs("tiny")
        >>> sorted(set(pairs.side) - {"none"})
        ['caption', 'foil']
    """
    if isinstance(path, pd.DataFrame):
        return pairs_of(*_of_frame(path.reset_index(drop=True), "frame", format))
    file = TINY if str(path) == "tiny" else Path(path)
    reader = _READERS.get(file.suffix.lower())
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{file} {what}; give a {_KINDS} file of pairs, or 'tiny' for the embedded ones")
    if reader is None:
        raise ValueError(f"can't read pairs from {file}: its name ends in {file.suffix!r}, known are {_KINDS}, .pt")
    frame, dropped = reader(file, format)
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


def _read_csv(file: Path, asked: str | None) -> Table:
    text = _text_of(file)
    header = _checked_header(text, file)
    format = format_of(header, asked, str(file))
    read_as_text = ("key", *TEXTS, *(format.needs if format else ()))
    # An empty field is missing; "None" or "NA" is a text like any other.
    missing = {column: [""] for column in header if column not in read_as_text}
    texts = dict.fromkeys(read_as_text, str)
    frame = pd.read_csv(StringIO(text), dtype=texts, keep_default_na=False, na_values=missing, low_memory=False)
    return _of_format(format, _rows_of(frame), str(file)) if format else (frame, [])


def _of_frame(frame: pd.DataFrame, name: str, asked: str | None) -> tuple[pd.DataFrame, str, Dropped]:
    """A DataFrame, the name of its pairs, and what was dropped."""
    refuse_repeated_columns(list(frame.columns), name)
    format = format_of([str(column) for column in frame.columns], asked, name)
    found, dropped = _of_format(format, _rows_of(frame), name) if format else (frame, [])
    return found, name, dropped


def _rows_of(frame: pd.DataFrame) -> Items:
    """The rows of a table as items; cells of numbers are Python's, as a file's are."""
    rows = frame.astype(object).to_dict("records")
    return [(f"row {number}", str(number), {str(k): v for k, v in row.items()}) for number, row in enumerate(rows)]


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


def _read_jsonl(file: Path, asked: str | None) -> Table:
    lines = enumerate(_text_of(file).split("\n"), start=1)
    held = [(f"line {number}", _parse(line, f"{file}, line {number}")) for number, line in lines if line.strip()]
    return _of_list(held, file, asked)


def _read_json(file: Path, asked: str | None) -> Table:
    content = _parse(_text_of(file), str(file))
    if isinstance(content, Mapping) and content and all(isinstance(item, Mapping) for item in content.values()):
        items = [(f"item {key!r}", key, item) for key, item in content.items()]
        return _of_format(format_of(_columns(items), asked, str(file)) or BY_KEY, items, str(file))
    if isinstance(content, Mapping) and (lists := _columns_of(content, asked, str(file))):
        return lists
    if isinstance(content, list):
        return _of_list([(f"entry {number}", item) for number, item in enumerate(content)], file, asked)
    raise ValueError(
        f"{file} holds {_kind(content)}; it must hold a list of objects with caption, foil, image, "
        "or VALSE's dict of items with caption, foil, image_file"
    )


def _read_pt(file: Path, asked: str | None) -> Table:
    """A dict of lists as torch.save wrote it; nothing in it is run."""
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds Python objects, which would run code when they are loaded; where you trust it, load it with "
            "torch.load(..., weights_only=False), take the lists that it needs, and save them as json"
        ) from error
    except Exception as error:  # whatever a truncated or foreign archive raises
        raise ValueError(f"{file} is damaged, or not what torch.save writes ({_first_line(error)})") from error
    table = _columns_of(content, asked, str(file)) if isinstance(content, Mapping) else None
    if table is None:
        raise ValueError(
            f"{file} holds {_kind(content)}; it must hold a dict of the lists of a known format, as CC-Neg"
        )
    return table


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".pt": _read_pt,
}
_KINDS = ", ".join(kind for kind in _READERS if kind != ".pt")


def _of_list(held: Sequence[tuple[str, Any]], file: Path, asked: str | None) -> Table:
    """The pairs of a list of objects; where a format is asked for, of lists too, whose columns are 0, 1, ..."""
    if asked in FORMATS:
        held = [(at, {str(n): cell for n, cell in enumerate(item)} if isinstance(item, list) else item)
                for at, item in held]  # fmt: skip
    for where, item in held:
        if not isinstance(item, Mapping):
            raise ValueError(f"{file}, {where}, is {_kind(item)}; it must be an object with caption, foil, image")
    items = [(where, str(number), dict(item)) for number, (where, item) in enumerate(held)]
    format = format_of(_columns(items), asked, str(file))
    return _of_format(format, items, str(file)) if format else (_frame([item for _, _, item in items]), [])


def _columns(items: Items) -> list[str]:
    """The columns that any item has."""
    return list(dict.fromkeys(column for _, _, item in items for column in item))


def _columns_of(content: Mapping[str, Any], asked: str | None, where: str) -> Table | None:
    """The pairs of a dict of columns; None if it is none of a known format."""
    format = format_of([str(name) for name in content], asked, where)
    if format is None or not set(format.needs) <= set(content):
        return None
    columns = {name: content[name] for name in format.needs}
    lengths = {name: len(column) if isinstance(column, list) else _kind(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1 or not all(isinstance(column, list) for column in columns.values()):
        raise ValueError(f"{where} must have lists of one length in {some(format.needs)}, it has {lengths}")
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return _of_format(format, [(f"entry {number}", str(number), row) for number, row in enumerate(rows)], where)


def _of_format(format: Format, items: Items, where: str) -> Table:
    made, dropped = read_items(format, items, where)
    if not made and dropped:
        raise ValueError(f"no pair of {where} is left; {listed(dropped)}")
    return _frame([item for _, item in made]), dropped


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


def _frame(items: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    records = [{name: _flat(name, value) for name, value in item.items()} for item in items]
    # As objects: a column of integers with a gap would turn into floats, and an image's id with it.
    return pd.DataFrame(records, dtype=object)


def _flat(name: str, value: Any) -> Any:
    nested = isinstance(value, (Mapping, list)) and name not in ("key", *TEXTS)
    return json.dumps(value, ensure_ascii=False) if nested else value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
