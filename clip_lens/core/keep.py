"""Results that are computed once: what a folder has already and fits is read, long sweeps go on where they stopped."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.record import Record
from clip_lens.core.spread import sharing
from clip_lens.core.store import read_frame, write_frame
from clip_lens.files import in_folder
from clip_lens.model.site import Place

log = logging.getLogger(__name__)
T = TypeVar("T")

PART = 2**18
"""Rows (places x pairs) of a part of a sweep: what an interruption can cost, about a minute on a CLIP-sized tower."""


PARTS = ".parts"


def _silent(line: str) -> None:
    """Nothing is said unless someone listens."""


@dataclass(frozen=True)
class Keep:
    """A folder of finished results, each reused when it is of the same places and its record stands for what is asked.

    A result that is there and is another one is never replaced unsaid: that is an error, unless `overwrite`. `say`
    hears a line for every result that is reused.

    Example:
        >>> from dataclasses import replace
        >>> from clip_lens.core.effects import toy_effects
        >>> from clip_lens.core.record import MetricRecord, Record
        >>> record = Record(metric=MetricRecord(identity="of the logit"))
        >>> keep, toy, runs = Keep(getfixture("tmp_path")), replace(toy_effects(), record=record), []
        >>> compute = lambda places: runs.append(places) or toy
        >>> for _ in range(2):
        ...     _ = keep.effects("toy", record, toy.places, compute)
        >>> len(runs)
        1
    """

    folder: Path
    say: Callable[[str], object] = _silent
    overwrite: bool = False

    def effects(
        self,
        name: str,
        wanted: Record,
        places: Sequence[Place],
        compute: Callable[[Sequence[Place]], Effects],
        *,
        whole: bool = False,
    ) -> Effects:
        """The result `name` of these places whose record stands for `wanted`: read, or computed and saved.

        A long sweep is computed and saved in parts, so that after an interruption it goes on with the next one; where
        places can't be computed apart from the others, `whole=True` computes them at once.

        Raises:
            ValueError: the file is there and damaged, or is another result.
        """
        path, places = self._path(name), tuple(places)
        if path.exists() and not self.overwrite:
            done = _checked(path, wanted, places)
            self.say(f"{path} is there already and fits: reused")
            return done
        effects = compute(places) if whole else _in_parts(path.with_suffix(PARTS), wanted, places, compute)
        effects.save(path)
        log.info("%s: %r", path, effects)
        shutil.rmtree(path.with_suffix(PARTS), ignore_errors=True)
        return effects

    def sharing(self, name: str, jobs: int = 1, executor: object = None) -> dict[str, Any]:
        """The options with which a verb shares out the work of the result `name`; what its workers have done lies
        beside it until all is.

        Example:
            >>> keep = Keep(getfixture("tmp_path"))
            >>> keep.sharing("toy"), keep.sharing("toy", jobs=2)["executor"].folder.name
            ({}, 'shards')
        """
        return sharing(self._path(name).with_suffix(PARTS) / "shards", jobs, executor)

    def frame(self, name: str, wanted: Record, compute: Callable[[], DataFrame]) -> DataFrame:
        """The table `name`, read if it was made with a record that stands for `wanted`, else computed and saved.

        Raises:
            ValueError: the file is there and damaged, or is another table.
        """
        path = self._path(name)
        if path.exists() and not self.overwrite:
            found, there = _read(read_frame, path)
            _refuse_another(path, there, wanted)
            self.say(f"{path} is there already and fits: reused")
            return found
        made = compute()
        write_frame(path, made, wanted)
        log.info("%s: %d rows", path, len(made))
        return made

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.parquet"


def _checked(path: Path, wanted: Record, places: Sequence[Place]) -> Effects:
    """The saved result, refused if it is another one than is asked for."""
    done = _read(Effects.load, path)
    _refuse_another(path, done.record, wanted)
    if done.places != tuple(places):
        raise ValueError(f"{path} is there, of {len(done.places)} other places than the {len(places)} now. {REMEDY}")
    return done


def _read(reader: Callable[[Path], T], path: Path) -> T:
    """What is there, or why it can't be read and what to do."""
    try:
        return reader(path)
    except ValueError as error:
        raise ValueError(f"{error}. {REMEDY}") from error


REMEDY = "Give another folder, or overwrite it (--overwrite, Keep(..., overwrite=True))"


def _refuse_another(path: Path, there: Record, wanted: Record) -> None:
    if not there.stands_for(wanted):
        raise ValueError(f"{path} is there, and is another result: {'; '.join(there.differences(wanted))}. {REMEDY}")


def _part(path: Path, wanted: Record, places: Sequence[Place]) -> Effects | None:
    """A part of this very sweep that an interrupted run left, None where there is none."""
    try:
        done = Effects.load(path)
    except (FileNotFoundError, ValueError):  # not there, or half of it: computed again
        return None
    return done if done.record.stands_for(wanted) and done.places == tuple(places) else None


def _in_parts(
    folder: Path, wanted: Record, places: tuple[Place, ...], compute: Callable[[Sequence[Place]], Effects]
) -> Effects:
    at_once = max(1, PART // max(1, wanted.pairs or 1))
    if len(places) <= at_once:
        return compute(places)
    parts = []
    for start in range(0, len(places), at_once):
        chosen, path = places[start : start + at_once], folder / f"{start}.parquet"
        part = _part(path, wanted, chosen)
        if part is None:
            part = compute(chosen)
            in_folder(folder, partial(part.save, path))  # which another run into the same folder may remove
            log.info("%s: places %d to %d of %d", path, start, start + len(chosen) - 1, len(places))
        parts.append(part)
    return joined(parts)


def joined(parts: Sequence[Effects]) -> Effects:
    """One result of several on the same pairs, one's places after the other's; its record is the first one's.

    Raises:
        ValueError: no parts, or parts on different pairs.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> toy = toy_effects()
        >>> joined([toy.where(layer=0), toy.where(layer=1)]).values.equal(toy.values)
        True
    """
    if not parts:
        raise ValueError("no results to join")
    first = parts[0]
    if strange := [part for part in parts if list(part.pairs["key"]) != list(first.pairs["key"])]:
        raise ValueError(f"results on different pairs can't be joined: {first!r} and {strange[0]!r}")
    places = tuple(place for part in parts for place in part.places)
    return replace(first, values=torch.cat([part.values for part in parts]), places=places)
