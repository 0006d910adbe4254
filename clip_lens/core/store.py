"""A result in one Parquet file and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.record import as_json, of_json
from clip_lens.files import written_whole
from clip_lens.model.site import Edge, Outside, Place, Site

FORMAT = 2
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
    note = json.dumps(_note(fields), default=_as_json).encode()
    metadata = {b"clip_lens": note, b"clip_lens_digest": _digest(note, numbers)}
    table = pa.table([*head.columns, *columns], names=[*head.column_names, *names]).replace_schema_metadata(metadata)
    with written_whole(path) as temporary:
        pq.write_table(table, temporary)


def _digest(note: bytes, numbers: np.ndarray) -> bytes:
    """What a file's content comes down to: a bit that flipped since it was written is noticed."""
    hasher = hashlib.sha256(note)
    hasher.update(np.ascontiguousarray(numbers).view(np.uint8).data)
    return hasher.hexdigest().encode()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a saved result: values, total, baseline, places, pairs, record.

    Raises:
        ValueError: the file is truncated, damaged, not Parquet, not written by `write`, or written by a version that
            did not record what a result must know of itself.
    """
    note, table = _content(Path(path))
    pairs = _frame(note["pairs"])
    dtype = getattr(torch, note["dtype"])
    columns = [column.to_numpy() for column in table.columns[len(INDEX) :]]
    stored = np.float64 if dtype == torch.float64 else np.float32
    numbers = np.array(columns, dtype=stored).T if columns else np.zeros((table.num_rows, 0), stored)
    metadata = table.schema.metadata
    if _digest(metadata[b"clip_lens"], numbers) != metadata.get(b"clip_lens_digest"):
        raise ValueError(f"{path} is damaged: its content is not what was written; compute it again")
    return {
        "values": torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype),
        "total": _tensor(note["total"], dtype),
        "baseline": _tensor(note["baseline"], dtype),
        "places": tuple(_place(entry) for entry in note["places"]),
        "pairs": pairs,
        "record": of_json(note["record"]),
    }


def _content(path: Path) -> tuple[dict[str, Any], pa.Table]:
    """The note and the table of a file that this version can read."""
    try:
        # A reader of one file: of a very wide one a dataset's scanner, as in read_table, takes twenty times the memory.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no whole Parquet file, it may be truncated: {error}") from error
    try:
        note = json.loads((table.schema.metadata or {}).get(b"clip_lens", b"null"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; compute it again") from error
    if isinstance(note, dict) and note.get("format") == 1:
        raise ValueError(
            f"{path} was written by clip_lens 0.1, which did not record whether a metric turns with the side nor what "
            "its source held; compute it again (pandas.read_parquet reads its numbers)"
        )
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        raise ValueError(f"{path} is a Parquet file, but not one that this version's Effects.save wrote")
    return note, table


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
    tuple a list of those, a circuit's outside its fields."""
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
    return [place.kind, place.layer, place.unit, place.slot]


def _place(entry: Any) -> Any:
    if isinstance(entry, dict) and "circuit" in entry:
        return Outside(**entry)
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
