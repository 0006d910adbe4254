"""A result, or a table, in one Parquet file and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.record import Record, as_json, of_json
from clip_lens.files import written_whole
from clip_lens.model.site import Edge, Match, Outside, Place, Site

FORMAT = 2
EFFECTS, TABLE, DIGEST = b"clip_lens", b"clip_lens_table", b"clip_lens_digest"
"""Under which names a file's schema says what it holds, and the digest of that."""
INDEX = ("place", "kind", "layer", "unit", "slot", "sender", "receiver")


def write(path: str | os.PathLike[str], index: DataFrame, fields: Mapping[str, Any]) -> None:
    """Writes a result: a row per place with its index, a float column per pair, the rest as JSON in the schema.

    Raises:
        TypeError: a pair's information that JSON does not have.
    """
    values = fields["values"]
    numbers = (values if values.dtype == torch.float64 else values.float()).numpy()
    head = pa.Table.from_pandas(index.assign(slot=_column_of_slots(index["slot"])), preserve_index=False)
    names = _column_names(fields["pairs"]["key"])
    columns = [pa.array(np.ascontiguousarray(column), from_pandas=False) for column in numbers.T]
    table = pa.table([*head.columns, *columns], names=[*head.column_names, *names])
    _write(path, table, {}, EFFECTS, _json(_note(fields)), _bytes(numbers))


def write_frame(path: str | os.PathLike[str], frame: DataFrame, record: Record) -> None:
    """Writes a table with the record of what it was made of; `pandas.read_parquet` opens it without this package.

    Raises:
        TypeError: a record or `frame.attrs` that JSON does not have.
    """
    note = _json({"format": FORMAT, "record": as_json(record), "attrs": dict(frame.attrs)})
    table = pa.Table.from_pandas(frame)
    _write(path, table, table.schema.metadata, TABLE, note, _text(table))


def _write(
    path: str | os.PathLike[str],
    table: pa.Table,
    metadata: Mapping[bytes, bytes],
    kind: bytes,
    note: bytes,
    content: memoryview | bytes,
) -> None:
    table = table.replace_schema_metadata({**metadata, kind: note, DIGEST: _digest(note, content)})
    with written_whole(path) as temporary:
        pq.write_table(table, temporary)


def _json(note: Mapping[str, Any]) -> bytes:
    return json.dumps(note, default=_as_json).encode()


def _digest(note: bytes, content: memoryview | bytes) -> bytes:
    """What a file's content comes down to: a bit that flipped since it was written is noticed."""
    hasher = hashlib.sha256(note)
    hasher.update(content)
    return hasher.hexdigest().encode()


def _bytes(numbers: np.ndarray) -> memoryview:
    return np.ascontiguousarray(numbers).view(np.uint8).data


def _text(table: pa.Table) -> bytes:
    return repr(table.to_pydict()).encode()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a saved result: values, total, baseline, places, pairs, record.

    Raises:
        ValueError: the file is truncated, damaged, not Parquet, not written by `write`, or written by a version that
            did not record what a result must know of itself.
    """
    table = _table(path)
    told = _told(path, table, EFFECTS, "Effects.save")
    with _sound(path):
        columns = [column.to_numpy() for column in table.columns[len(INDEX) :]]
        stored = columns[0].dtype if columns else np.dtype(np.float32)
        numbers = np.array(columns, stored).T if columns else np.zeros((table.num_rows, 0), stored)
    note = _verified(path, table, told, _bytes(numbers))
    with _understood(path):
        dtype = getattr(torch, note["dtype"])
        return {
            "values": torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype),
            "total": _tensor(note["total"], dtype),
            "baseline": _tensor(note["baseline"], dtype),
            "places": tuple(_place(entry) for entry in note["places"]),
            "pairs": _frame(note["pairs"]),
            "record": of_json(note["record"]),
        }


def read_frame(path: str | os.PathLike[str]) -> tuple[DataFrame, Record]:
    """The table that `write_frame` wrote, and its record.

    Raises:
        ValueError: the file is truncated, damaged, not Parquet, or not written by `write_frame`.
    """
    table = _table(path)
    told = _told(path, table, TABLE, "Keep.frame")
    with _sound(path):
        content = _text(table)
    note = _verified(path, table, told, content)
    with _understood(path):
        frame = table.to_pandas()
        frame.attrs = note["attrs"]
        return frame, of_json(note["record"])


def is_frame(path: str | os.PathLike[str]) -> bool:
    """Whether a Parquet file holds a table that `write_frame` wrote.

    Raises:
        ValueError: the file is truncated or not Parquet.
    """
    with _sound(path), pq.ParquetFile(path) as file:
        return TABLE in (file.schema_arrow.metadata or {})


def _table(path: str | os.PathLike[str]) -> pa.Table:
    # A reader of one file: of a very wide one a dataset's scanner, as in read_table, takes twenty times the memory.
    with _sound(path), pq.ParquetFile(path) as file:
        return file.read()


@contextmanager
def _sound(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a damaged file makes its reader say becomes one error with the file's name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # not there, not allowed: nothing is wrong with the file
            raise
        raise ValueError(_unsound(path, error)) from error
    except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ValueError(_unsound(path, error)) from error


def _unsound(path: str | os.PathLike[str], error: Exception) -> str:
    return f"{path} is no whole Parquet file, it may be truncated or damaged: {error}. Remove it and compute it again"


def _told(path: str | os.PathLike[str], table: pa.Table, kind: bytes, writer: str) -> bytes:
    """What a file says of itself, as bytes; refused where this version did not write it."""
    metadata = table.schema.metadata or {}
    if kind in metadata and (DIGEST in metadata or not _of_the_first_format(metadata[kind])):
        return metadata[kind]
    if kind in metadata:
        raise ValueError(
            f"{path} was written by clip_lens 0.1, which did not record whether a metric turns with the side nor what "
            "its source held; compute it again (pandas.read_parquet reads its numbers)"
        )
    raise ValueError(f"{path} is a Parquet file, but not one that {writer} wrote; pandas.read_parquet may read it")


def _of_the_first_format(note: bytes) -> bool:
    try:
        told = json.loads(note)
    except ValueError:
        return False
    return isinstance(told, dict) and told.get("format") == 1


def _verified(
    path: str | os.PathLike[str], table: pa.Table, note: bytes, content: memoryview | bytes
) -> dict[str, Any]:
    """What a file says of itself, once its content is what was written."""
    if _digest(note, content) != table.schema.metadata.get(DIGEST):
        raise ValueError(f"{path} is damaged: its content is not what was written. Remove it and compute it again")
    told = json.loads(note)
    if told["format"] != FORMAT:
        raise ValueError(f"{path} is of format {told['format']}, this version reads {FORMAT}; {OTHER_VERSION}")
    return told


OTHER_VERSION = "read it with the version of clip_lens that wrote it, or compute it again"


@contextmanager
def _understood(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is sound, but says something that this version does not know, was written by another one."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version of clip_lens ({error}); {OTHER_VERSION}") from error


def plain(column: pd.Series) -> list[Any]:
    """A column's entries as Python values, None for what is missing.

    Example:
        >>> plain(pd.Series([1, None], dtype="Int64"))
        [1, None]
    """
    return [None if missing else value for value, missing in zip(column.astype(object), column.isna(), strict=True)]


def _column_of_slots(slots: pd.Series) -> pd.Series:
    """A Parquet column has one type: positions stay numbers, names stay text, a mixture becomes text."""
    found = plain(slots)
    if all(slot is None or not isinstance(slot, str) for slot in found):
        return pd.Series(found, dtype="Int64")
    return pd.Series([None if slot is None else str(slot) for slot in found], dtype="str")


def _column_names(keys: Iterable[Any]) -> list[str]:
    taken = set(INDEX)
    names = []
    for key in keys:
        name, number = str(key), 0
        while name in taken:
            number += 1
            name = f"{key}#{number}"
        taken.add(name)
        names.append(name)
    return names


def _note(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All but index and values, as JSON: a site is [kind, layer, unit, slot], an edge {"sender": .., "receiver": ..}, a
    tuple a list of those, a circuit's outside and a term of a score their fields."""
    return {
        "format": FORMAT,
        "dtype": str(fields["values"].dtype).removeprefix("torch."),
        "places": [_entry(place) for place in fields["places"]],
        "total": _numbers(fields["total"]),
        "baseline": _numbers(fields["baseline"]),
        "pairs": [
            {"name": str(name), "dtype": _dtype_name(column), "values": plain(column)}
            for name, column in fields["pairs"].items()
        ],
        "record": as_json(fields["record"]),
    }


def _numbers(numbers: Float[Tensor, "pair"]) -> list[float | None]:
    return [None if number != number else number for number in numbers.double().tolist()]


def _tensor(numbers: list[float | None], dtype: torch.dtype) -> Float[Tensor, "pair"]:
    exact = [torch.nan if number is None else number for number in numbers]
    return torch.tensor(exact, dtype=torch.float64).to(dtype)


def _entry(place: Place) -> Any:
    if isinstance(place, tuple):
        return [_entry(member) for member in place]
    if isinstance(place, Edge):
        return {"sender": _entry(place.sender), "receiver": _entry(place.receiver)}
    if isinstance(place, Outside):
        return asdict(place)
    if isinstance(place, Match):
        return {"head": _entry(place.head), "at": place.at, "query": _entry(place.query), "key": _entry(place.key)}
    return [place.kind, place.layer, place.unit, place.slot]


def _place(entry: Any) -> Any:
    if isinstance(entry, dict) and "circuit" in entry:
        return Outside(**entry)
    if isinstance(entry, dict) and "head" in entry:
        return Match(_place(entry["head"]), entry["at"], _place(entry["query"]), _place(entry["key"]))
    if isinstance(entry, dict):
        return Edge(_place(entry["sender"]), _place(entry["receiver"]))
    return Site(*entry) if isinstance(entry[0], str) else tuple(_place(member) for member in entry)


def _dtype_name(column: pd.Series) -> str:
    return "str" if isinstance(column.dtype, pd.StringDtype) else str(column.dtype)


def _frame(columns: list[dict[str, Any]]) -> DataFrame:
    return DataFrame({column["name"]: pd.Series(column["values"], dtype=column["dtype"]) for column in columns})


def _as_json(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    raise TypeError(f"a pair's information must be text, numbers, lists or mappings to be saved. Got {value!r}")
