"""A part of a verb's work: every n-th of the chunks in which it goes through the pairs, and the parts put together.

The chunks are those of the whole run, so that the parts put together are the whole run, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from clip_lens.core.effects import Effects

ROW = "row"
"""The column of a part's pairs that says which row of the batch each is."""


@dataclass(frozen=True)
class Shard:
    """The chunks `number`, `number + of`, ... of all: one of `of` parts that together are the whole.

    Raises:
        ValueError: a number that is none of 0 .. of - 1.

    Example:
        >>> Shard.parse("0/3"), [chunk for chunk in range(7) if Shard(0, 3).takes(chunk)]
        (Shard(number=0, of=3), [0, 3, 6])
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(f"shard {self}: of {self.of} shards the first is 0 and the last {self.of - 1}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that "0/3" names.

        Raises:
            ValueError: the text names none.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or match[2] == "0":
            raise ValueError(f"no shard {text!r}: give its number and how many there are, such as 0/3, 1/3 or 2/3")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def takes(self, chunk: int) -> bool:
        """Whether a chunk is of this part."""
        return chunk % self.of == self.number


def gather(parts: Sequence[Effects]) -> Effects:
    """The whole of its shards: pairs in the batch's order, the record that of the whole run.

    Raises:
        ValueError: none, results that are no shards, shards of different runs, one that is missing or comes twice.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> of = lambda part: clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"), executor=part)
        >>> gather([of(Shard(0, 2)), of(Shard(1, 2))])
        Effects(6 places x 8 pairs; 4 caption, 4 foil; activation patching tiny)
    """
    if not parts:
        raise ValueError("no shards to gather")
    first = parts[0]
    _check(parts)
    row = torch.cat([torch.tensor(part.pairs[ROW].tolist(), dtype=torch.long) for part in parts])
    order = row.argsort()
    if row[order].tolist() != list(range(first.record.pairs or 0)):
        raise ValueError(f"these shards have {len(row)} rows, the whole has {first.record.pairs}, each of them once")
    values, total, baseline = (
        torch.cat([getattr(part, name) for part in parts], -1)[..., order] for name in ("values", "total", "baseline")
    )
    filled = [part.pairs for part in parts if len(part.pairs)]
    pairs = pd.concat(filled, ignore_index=True).iloc[order.tolist()].drop(columns=ROW)
    settings = {name: value for name, value in first.record.settings.items() if name != "shard"}
    record = replace(first.record, settings=settings, unsourced=sum(part.record.unsourced for part in parts))
    return Effects(values, total, baseline, first.places, pairs, record)


def _check(parts: Sequence[Effects]) -> None:
    """Refuses what is not all the shards of one run, and nothing else."""
    said = [part.record.settings.get("shard") for part in parts]
    if None in said:
        raise ValueError(f"{parts[said.index(None)]!r} is no shard; a run with a shard (--shard 0/3) gives some")
    shards = [Shard.parse(str(text)) for text in said]
    of = shards[0].of
    if others := [str(shard) for shard in shards if shard.of != of]:
        raise ValueError(f"shards of {of} and others, {', '.join(others)}: they are not of one run")
    numbers = [shard.number for shard in shards]
    if missing := sorted(set(range(of)) - set(numbers)):
        raise ValueError(f"of {of} shards these are missing: {', '.join(f'{number}/{of}' for number in missing)}")
    if len(numbers) > of:
        twice = sorted({f"{number}/{of}" for number in numbers if numbers.count(number) > 1})
        raise ValueError(f"shards that come twice: {', '.join(twice)}")
    whole = [replace(part.record, settings={**part.record.settings, "shard": ""}) for part in parts]
    for shard, part, record in zip(shards, parts, whole, strict=True):
        if part.places != parts[0].places:
            raise ValueError(f"shard {shard} is of other places than shard {shards[0]}")
        if replace(record, unsourced=0) != replace(whole[0], unsourced=0):
            differ = "; ".join(record.differences(whole[0])) or "their records differ"
            raise ValueError(f"shard {shard} is of another run than shard {shards[0]}: {differ}")


def gather_files(paths: Iterable[Path]) -> Effects:
    """The whole of shards that were saved.

    Raises:
        ValueError: as `gather`, or a file that is no result.
    """
    return gather([Effects.load(path) for path in paths])
