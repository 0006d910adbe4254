"""The file of an `ImageStore`: one safetensors file, of which embeddings are read when they are asked for.

Format 2 has the tensors

- `embeddings` [image, d_embed], float32,
- `checks` [image, 4], the crc32 of each embedding's bytes and its id,
- `ids`, `contents` and `failed` (name and reason by turns), UTF-8 texts with a NUL between them;

and as metadata the format, the store's provenance, and `whole`, a sha256 of all that but the embeddings. A change of
the file is found when it is opened, one of an embedding when it is read.

Format 1, which is read and not written, has ids, contents and failed in the metadata, as json, and no checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens.files import written_whole

FORMAT = "clip_lens.images/2"
OLD_FORMAT = "clip_lens.images/1"
ROWS_AT_ONCE = 1024
"""Rows that are worked on together: few enough that what is made of them on the way stays in the processor's cache."""

LABELS = ("model", "pretrained", "digest", "preprocessing", "versions", "origin")
Failures = Sequence[tuple[str, str]]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Stored:
    """What a file holds: `rows` are mapped from it, and `checks` is None where it has none."""

    ids: Sequence[str]
    rows: Float[Tensor, "image d_embed"]
    provenance: Mapping[str, str]
    failed: Failures
    contents: Sequence[str]
    checks: UInt8[Tensor, "image 4"] | None


def checks_of(rows: Float[Tensor, "image d_embed"], ids: Sequence[str]) -> UInt8[Tensor, "image 4"]:
    """The crc32 of each embedding in float32 and its id.

    Example:
        >>> rows = torch.eye(2)
        >>> checks_of(rows, ["a", "b"]).tolist() != checks_of(rows, ["b", "a"]).tolist()
        True
    """
    sums = np.empty(len(ids), dtype="<u4")
    for start in range(0, len(ids), ROWS_AT_ONCE):
        part = np.ascontiguousarray(rows[start : start + ROWS_AT_ONCE].numpy(), dtype="<f4")
        content, width = part.tobytes(), 4 * part.shape[1]
        for row, name in enumerate(ids[start : start + ROWS_AT_ONCE]):
            sums[start + row] = crc32(_encoded(name), crc32(content[row * width : (row + 1) * width]))
    return torch.from_numpy(sums.view(np.uint8).reshape(-1, 4))


def write(path: PathLike, stored: Stored) -> None:
    """Writes a store; the file appears whole or not at all, and its folder with it."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = stored.rows.float().contiguous()
    tensors = {
        "checks": checks_of(rows, stored.ids) if stored.checks is None else stored.checks,
        "ids": _joined(stored.ids),
        "contents": _joined(stored.contents),
        "failed": _joined([text for entry in stored.failed for text in entry]),
    }
    metadata = {**stored.provenance, "format": FORMAT}
    with written_whole(file) as temporary:
        whole = _whole(tensors, metadata)
        save_file({"embeddings": rows, **tensors}, temporary, metadata={**metadata, "whole": whole})


def read(path: PathLike) -> Stored:
    """What a file holds.

    Raises:
        ValueError: the file is truncated, damaged, no store of images, or of a later version of the format.
    """
    try:
        handle = safe_open(path, "pt")
        metadata = handle.metadata() or {}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} can't be read: truncated, or not a safetensors file ({error}); embed the images again"
        ) from error
    reader = {FORMAT: _read_tensors, OLD_FORMAT: _read_json}.get(metadata.get("format", ""))
    if reader is None:
        raise ValueError(_foreign(path, metadata.get("format", "")))
    try:
        return _fitting(reader(handle, metadata))
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}; embed the images again") from error


def _read_tensors(handle: Any, metadata: dict[str, str]) -> Stored:
    tensors = {name: handle.get_tensor(name) for name in ("embeddings", "checks", "ids", "contents", "failed")}
    rows = tensors.pop("embeddings")
    whole = metadata.pop("whole", None)
    if whole != _whole(tensors, metadata):
        raise ValueError("its ids or its provenance are not what was written")
    del metadata["format"]
    failed = _split(tensors["failed"])
    return Stored(
        _split(tensors["ids"]),
        rows,
        metadata,
        list(zip(failed[::2], failed[1::2], strict=True)),
        _split(tensors["contents"]),
        tensors["checks"].clone(),
    )


def _read_json(handle: Any, metadata: dict[str, str]) -> Stored:
    ids, failed, contents = (json.loads(metadata.get(name, "[]")) for name in ("ids", "failed", "contents"))
    provenance = {name: metadata[name] for name in LABELS if name in metadata}
    return Stored(ids, handle.get_tensor("embeddings"), provenance, failed, contents, None)


def _fitting(stored: Stored) -> Stored:
    shape = tuple(stored.rows.shape)
    if len(shape) != 2 or shape[0] != len(stored.ids) or stored.rows.dtype != torch.float32:
        raise ValueError(f"{len(stored.ids)} ids and embeddings of shape {shape}, {stored.rows.dtype}")
    if stored.contents and len(stored.contents) != len(stored.ids):
        raise ValueError(f"{len(stored.ids)} ids and {len(stored.contents)} contents")
    return stored


def _foreign(path: PathLike, form: str) -> str:
    if form.startswith(FORMAT.rpartition("/")[0]):
        return f"{path} has the format {form}, this version reads {FORMAT}; upgrade clip_lens"
    return (
        f"{path} is a safetensors file but no store of images (format {form or 'not given'!r}, not {FORMAT!r}); "
        "for embeddings from elsewhere use ImageStore.from_tensors(ids, embeddings).save(FILE)"
    )


def _whole(tensors: Mapping[str, UInt8[Tensor, "..."]], metadata: Mapping[str, str]) -> str:
    hasher = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        hasher.update(f"{name}{tuple(tensors[name].shape)}".encode())
        hasher.update(tensors[name].numpy().tobytes())
    return hasher.hexdigest()


def _joined(texts: Sequence[str]) -> UInt8[Tensor, "byte"]:
    """Texts with a NUL behind each, so that no text and an empty one differ."""
    content = bytearray(_encoded("".join(f"{text}\0" for text in texts)))
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _split(content: UInt8[Tensor, "byte"]) -> list[str]:
    return content.numpy().tobytes().decode("utf-8", "surrogatepass").split("\0")[:-1]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # the name of a file may be no valid text
