"""Results that are computed once: what a folder has already and fits is read, long sweeps go on where they stopped."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.store import written_whole
from clip_lens.model.site import Place

log = logging.getLogger(__name__)

PART = 2**18
"""Rows (places x pairs) of a part of a sweep: what an interruption can cost, about a minute on a CLIP-sized tower."""


def _silent(line: str) -> None:
    """Nothing is said unless someone listens."""


@dataclass(frozen=True)
class Keep:
    """A folder of finished results, each reused when it is of the same places and says the same of how it came about.

    `say` hears a line for every result that is reused.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> keep, toy = Keep(getfixture("tmp_path")), toy_effects()
        >>> runs = []
        >>> compute = lambda places: runs.append(places) or toy
        >>> for _ in range(2):
        ...     _ = keep.effects("toy", {"model": "toy"}, toy.places, compute)
        >>> len(runs)
        1
    """

    folder: Path
    say: Callable[[str], object] = _silent

    def effects(
        self,
        name: str,
        meta: Mapping[str, str],
        places: Sequence[Place],
        compute: Callable[[Sequence[Place]], Effects],
        *,
        whole: bool = False,
    ) -> Effects:
        """The result `name` of these places whose meta has what `meta` has: read, or computed and saved.

        A long sweep is computed and saved in parts, so that after an interruption it goes on with the next one; where
        places can't be computed apart from the others, `whole=True` computes them at once.

        Raises:
            ValueError: the file is there and damaged.
        """
        path, places = self._path(name), tuple(places)
        done = _fitting(path, meta, places)
        if done is not None:
            self.say(f"{path} is there already and fits: reused")
            return done
        effects = compute(places) if whole else _in_parts(path.with_suffix(".parts"), meta, places, compute)
        effects.save(path)
        log.info("%s: %r", path, effects)
        shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
        return effects

    def frame(self, name: str, meta: Mapping[str, str], compute: Callable[[], DataFrame]) -> DataFrame:
        """The table `name`, read if it was made with the same `meta`, else computed and saved as Parquet.

        Raises:
            ValueError: the file is there and damaged.
        """
        path, wanted = self._path(name), json.dumps(dict(sorted(meta.items())))
        if path.exists():
            try:
                found = pd.read_parquet(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is no whole Parquet file, it may be truncated; remove it: {error}") from error
            if found.attrs.get("clip_lens") == wanted:
                self.say(f"{path} is there already and fits: reused")
                return found
        made = compute()
        made.attrs["clip_lens"] = wanted
        return self.save(name, made)

    def save(self, name: str, made: DataFrame) -> DataFrame:
        """The table itself, written as Parquet under its name."""
        with written_whole(self._path(name)) as temporary:
            made.to_parquet(temporary)
        log.info("%s: %d rows", self._path(name), len(made))
        return made

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.parquet"


def _fitting(path: Path, meta: Mapping[str, str], places: Sequence[Place]) -> Effects | None:
    """The saved result, if it is of these places and was made as `meta` says."""
    if not path.exists():
        return None
    done = Effects.load(path)
    return done if meta.items() <= dict(done.meta).items() and done.places == tuple(places) else None


def _in_parts(
    folder: Path, meta: Mapping[str, str], places: tuple[Place, ...], compute: Callable[[Sequence[Place]], Effects]
) -> Effects:
    at_once = max(1, PART // max(1, int(meta.get("pairs", "1"))))
    if len(places) <= at_once:
        return compute(places)
    folder.mkdir(exist_ok=True)
    parts = []
    for start in range(0, len(places), at_once):
        chosen, path = places[start : start + at_once], folder / f"{start}.parquet"
        part = _fitting(path, meta, chosen)
        if part is None:
            part = compute(chosen)
            part.save(path)
            log.info("%s: places %d to %d of %d", path, start, start + len(chosen) - 1, len(places))
        parts.append(part)
    return joined(parts)


def joined(parts: Sequence[Effects]) -> Effects:
    """One result of several on the same pairs, one's places after the other's; its meta is the first one's.

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
