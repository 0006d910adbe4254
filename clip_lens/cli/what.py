"""What a model or a file is, in lines."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

LISTED = 20
"""Tensors of a file that are named."""


def lines_on(what: str, **weights: Any) -> Iterator[str]:
    """What there is to say of a file, by its kind, or of a model; a file's content is checked against what was written.

    `weights` go to `load`: pretrained, like, quick_gelu.

    Raises:
        ValueError: no such model, or a file that is damaged or of a kind that is not known.

    Example:
        >>> next(lines_on("tiny"))[:24]
        'HookedTextEncoder(tiny: '
    """
    path = Path(what)
    known = {
        ".parquet": _result, ".safetensors": _store, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _pairs,
        ".npz": _arrays,
    }  # fmt: skip
    if path.suffix in known and not path.is_dir():
        return known[path.suffix](path)
    return _model(what, **weights)


def _result(path: Path) -> Iterator[str]:
    """An `Effects`, a table that was kept, or another's table."""
    from clip_lens.core.effects import Effects
    from clip_lens.core.store import is_frame, read_frame

    if _is_anothers(path):
        import pandas as pd

        yield _said_of_table("a Parquet file of another program's", pd.read_parquet(path))
        return
    if is_frame(path):
        frame, record = read_frame(path)
        yield f"a table of {len(frame)} rows: {', '.join(map(str, frame.columns))}"
        yield from _said(record.as_text())
        yield from _said({name: str(value) for name, value in frame.attrs.items()})
    else:
        effects = Effects.load(path)
        yield repr(effects)
        yield from _said(effects.record.as_text())
    yield "  its content is what was written"


def _is_anothers(path: Path) -> bool:
    """Whether a readable Parquet file says nothing of this package."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        told = pq.read_schema(path).metadata or {}
    except (ArrowException, OSError):
        return False  # what is wrong with it, the reader of results says
    return not any(b"clip_lens" in name or b"clip_lens" in value for name, value in told.items())


def _said_of_table(what: str, frame: DataFrame) -> str:
    return f"{what}, with {len(frame)} rows: {', '.join(map(str, frame.columns))}"


def _arrays(path: Path) -> Iterator[str]:
    """The arrays of a file of numpy's."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            told = {name: f"{arrays[name].dtype} {list(arrays[name].shape)}" for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} can't be read as numpy's arrays: {error}") from error
    yield f"{len(told)} arrays of numpy's; ImageStore.from_tensors(ids, embeddings) makes a store of some"
    yield from _said(told)


def _tensors(path: Path) -> Iterator[str]:
    """The tensors of a safetensors file that is no store, such as a checkpoint; nothing of what can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            shapes = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in told.items()}
            if str((file.metadata() or {}).get("format", "")).startswith("clip_lens"):
                return
    except (SafetensorError, OSError):
        return
    yield f"no store of images, but {len(shapes)} tensors; a checkpoint goes to load(model, pretrained=FILE)"
    yield from islice(_said(shapes), LISTED)
    if len(shapes) > LISTED:
        yield f"  and {len(shapes) - LISTED} more"


def _store(path: Path) -> Iterator[str]:
    from clip_lens.data.images import ImageStore

    if told := list(_tensors(path)):
        yield from told
        return
    store = ImageStore.open(path)
    store.verify()
    yield repr(store)
    yield from _said(store.provenance)
    yield "  its embeddings are what was written"


def _table(path: Path) -> Iterator[str]:
    """Pairs, or the table of a result."""
    import pandas as pd

    from clip_lens.data.pairs import TEXTS, pairs_of
    from clip_lens.data.read import read_pairs

    tabs = path.suffix == ".tsv"
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        pairs = pairs_of(_read_tsv(path), path.stem, []) if tabs else read_pairs(path)
    except ValueError:
        frame = _read_tsv(path) if tabs else pd.read_csv(path)
        if set(TEXTS) <= set(frame.columns):
            raise
        yield f"no pairs, but a table of {len(frame)} rows: {', '.join(map(str, frame.columns))}"
    else:
        yield repr(pairs)


def _read_tsv(path: Path) -> DataFrame:
    import pandas as pd

    return pd.read_csv(path, sep="\t", keep_default_na=False)


def _pairs(path: Path) -> Iterator[str]:
    from clip_lens.data.read import read_pairs

    yield repr(read_pairs(path))


def _json(path: Path) -> Iterator[str]:
    """Pairs, or a circuit."""
    import json

    from clip_lens.methods.circuits.circuit import Circuit

    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        told = None  # what is wrong with it, the reader of pairs says
    if not (isinstance(told, dict) and isinstance(told.get("format"), str)):
        yield from _pairs(path)
        return
    circuit = Circuit.load(path)
    yield repr(circuit)
    if circuit.record is not None:
        yield from _said(circuit.record.as_text())


def _model(name: str, **weights: Any) -> Iterator[str]:
    from clip_lens.model.load import load

    encoder = load(name, **weights)
    yield repr(encoder)
    yield f"  weights {encoder.digest}, image tower {encoder.image_digest}"
    yield f"  {encoder.architecture}"
    yield from (f"  {note}" for note in encoder.notes)


def _said(told: Mapping[str, str]) -> Iterator[str]:
    return (f"  {name}: {value}" for name, value in told.items())
