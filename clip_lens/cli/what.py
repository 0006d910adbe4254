"""What a model or a file is, in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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
        ".parquet": _result, ".safetensors": _store, ".csv": _table, ".json": _json, ".jsonl": _pairs
    }  # fmt: skip
    if path.suffix in known and not path.is_dir():
        return known[path.suffix](path)
    return _model(what, **weights)


def _result(path: Path) -> Iterator[str]:
    """An `Effects`, or a table that was kept."""
    from clip_lens.core.effects import Effects
    from clip_lens.core.store import is_frame, read_frame

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


def _store(path: Path) -> Iterator[str]:
    from clip_lens.data.images import ImageStore

    store = ImageStore.open(path)
    store.verify()
    yield repr(store)
    yield from _said(store.provenance)
    yield "  its embeddings are what was written"


def _table(path: Path) -> Iterator[str]:
    """Pairs, or the table of a result."""
    from clip_lens.data.pairs import TEXTS
    from clip_lens.data.read import read_pairs

    try:
        pairs = read_pairs(path)
    except ValueError:
        import pandas as pd

        frame = pd.read_csv(path)
        if set(TEXTS) <= set(frame.columns):
            raise
        yield f"no pairs, but a table of {len(frame)} rows: {', '.join(map(str, frame.columns))}"
    else:
        yield repr(pairs)


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
