"""`clip-lens gather`: the shards in a folder, put together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from clip_lens.core.effects import Effects
from clip_lens.core.shard import gather_files

SHARD = re.compile(r"(.+)\.shard-(\d+)-of-(\d+)\.parquet")


def gathered(folder: Path, overwrite: bool = False) -> Iterator[str]:
    """Writes each result whose shards lie in a folder, and says so in a line each.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no shards, one that is missing, shards of different runs, or another result under that name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")):
        if match := SHARD.fullmatch(path.name):
            found[match[1], int(match[3])].append(path)
    if not found:
        raise ValueError(f"no shards in {folder}; a command with --shard 0/3 writes some")
    names = [name for name, _ in found]
    if several := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{folder} has shards of several divisions of {several[0]}; keep those of one")
    for (name, of), paths in found.items():
        yield _one(folder / f"{name}.parquet", of, paths, overwrite)


def _one(path: Path, of: int, paths: list[Path], overwrite: bool) -> str:
    """One result, and what is said of it."""
    try:
        effects = gather_files(paths)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if path.exists() and not overwrite:
        there = Effects.load(path)
        if not (there.record.stands_for(effects.record) and there.places == effects.places):
            raise ValueError(f"{path} is there, and is another result. Give --overwrite, or another folder")
    effects.save(path)
    return f"{path}: {of} shards put together, {effects!r}"
