"""`steer`: what adding a direction to the stream, or taking it away, moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.record import SourceRecord
from clip_lens.core.source import How, Source, steered, steered_together
from clip_lens.data.batch import Batch
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import STEERING
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, place_of

Direction: TypeAlias = Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]
Steerable: TypeAlias = Site | tuple[Site, ...]


def steer(
    encoder: HookedTextEncoder,
    batch: Batch,
    directions: Mapping[Steerable, Direction | Sequence[Direction]],
    *,
    how: How = "add",
    origin: Mapping[Steerable, Direction | Sequence[Direction]] | None = None,
    metric: Metric | str = logit,
    rows: int = 256,
) -> Effects:
    """What adding or removing a direction at each place moves in each pair, in units of the metric: an `Effects`.

    Each place is steered alone, at its slot's positions. A tuple of sites is steered together in one run, with one
    direction for all of them or a list with one each: what is added at an early layer has changed the stream of the
    later ones before theirs is added. `how="add"` adds the direction to the run's stream, `how="remove"` takes its
    component away, down to that of `origin` (0 if left out; see `steered`). The total is the counterpart's,
    `metric(other) - metric(run)`, so that a fraction is the share of d that the direction moves.

    Raises:
        ValueError: no directions, another number of directions or origins than a tuple has sites, or what
            `patch_effects` and `steered` refuse.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> early, late = Site("resid", 4, slot="eot"), Site("resid", 5, slot="eot")
        >>> v = torch.randn(128)
        >>> effects = steer(encoder, batch, {early: v, late: v, (early, late): v}, how="remove")
        >>> effects.values.shape, effects.record.method.title
        (torch.Size([3, 8]), 'steering: remove a direction')
    """
    directions, origin = _by_place(directions), _by_place(origin or {})
    places = tuple(directions)
    single = {place: directions[place] for place in places if isinstance(place, Site)}
    jobs: list[tuple[tuple[Steerable, ...], Source]] = [
        ((place,), _together(place, directions[place], how, origin)) for place in places if not isinstance(place, Site)
    ]
    if single or not jobs:
        starts = {site: start for site, start in origin.items() if isinstance(site, Site)}
        jobs.insert(0, (tuple(single), steered(single, how, origin=starts)))
    found = [patch_effects(encoder, batch, some, source=given, metric=metric, rows=rows) for some, given in jobs]
    done = [place for some, _ in jobs for place in some]
    order = torch.tensor([done.index(place) for place in places])
    total = patch_effects(encoder, batch, [Site("resid", encoder.n_layers)], metric=metric, rows=rows).total
    told = SourceRecord.of(_all_of([given for _, given in jobs]))
    record = replace(found[0].record, method=STEERING[how], source=told).saying(total="metric(other) - metric(run)")
    values = torch.cat([effects.values for effects in found])[order]
    return replace(found[0], values=values, total=total, places=places, record=record)


def _by_place(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Places given as texts parsed, arrays as tensors."""
    tensors = lambda value: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    return {place_of(place): tensors(value) for place, value in given.items()}


def _together(place: tuple[Site, ...], given: Any, how: How, origin: Mapping[Any, Any]) -> Source:
    """The source of a tuple of sites."""
    if how not in get_args(How) or (origin and how == "add"):
        steered({}, how, origin=origin)  # says why not
    starts = _one_each(place, origin[place]) if place in origin else None
    return steered_together(place, _one_each(place, given), how, origin=starts)


def _one_each(place: tuple[Site, ...], given: Direction | Sequence[Direction]) -> list[Direction]:
    """One direction for each site of a tuple."""
    if isinstance(given, Tensor):
        return [given] * len(place)
    if len(given) != len(place):
        raise ValueError(
            f"{len(given)} directions for the {len(place)} sites that are steered together; give one for all of them "
            "or a list with one each"
        )
    return list(given)


def _all_of(sources: Sequence[Source]) -> Source:
    """What a result of several sources was made with."""
    if len(sources) == 1:
        return sources[0]
    return replace(sources[0], name=", ".join(each.name for each in sources), holds=tuple(sources))
