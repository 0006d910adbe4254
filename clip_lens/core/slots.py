"""Positions regrouped as named slots: which token of its slot stands where in each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.model.site import Place, at_slot, members, slot_of


class Instances(NamedTuple):
    """The (pair, token) columns of by_slot: which pair, which token of its slot, and at which position (-1 = none)."""

    pair: Int[Tensor, "instance"]
    token: Int[Tensor, "instance"]
    position: Int[Tensor, "slot instance"]


def instances(slot: Int[Tensor, "pair pos"], n_slots: int) -> Instances:
    one_hot = slot.unsqueeze(-1) == torch.arange(n_slots)
    rank = one_hot.cumsum(1) - 1  # the how-manieth token of its slot a position holds
    longest = one_hot.sum(1).amax(1).clamp(min=1) if n_slots else torch.ones(len(slot), dtype=torch.long)
    start = longest.cumsum(0) - longest
    pair = torch.arange(len(slot)).repeat_interleave(longest)
    position = torch.full((n_slots, len(pair)), -1)
    row, pos, number = one_hot.nonzero(as_tuple=True)
    position[number, start[row] + rank[row, pos, number]] = pos
    return Instances(pair, torch.arange(len(pair)) - start[pair], position)


def positions_of(places: Sequence[Place]) -> tuple[list[Place], Int[Tensor, "base pos"]]:
    """The places without their position, in order, and for each the row of `values` at each position (-1 = none)."""
    rows: dict[Place, dict[int, int]] = {}
    for number, place in enumerate(places):
        slots = {slot_of(member) for member in members(place)}
        position = slots.pop() if slots else None
        if slots or not isinstance(position, int | np.integer):
            raise ValueError(f"by_slot regroups raw positions, such as Site('resid', 3, slot=5). Got {place}")
        base = rows.setdefault(at_slot(place, None), {})
        if int(position) in base:
            raise ValueError(f"by_slot needs each place once. Got {place} twice")
        base[int(position)] = number
    width = 1 + max((position for base in rows.values() for position in base), default=-1)
    row_at = torch.tensor([[base.get(position, -1) for position in range(width)] for base in rows.values()])
    return list(rows), row_at.reshape(len(rows), width).long()


def gather(values: Tensor, row_at: Tensor, found: Instances, number: int) -> Float[Tensor, "base instance"]:
    position = found.position[number]
    known = (position >= 0) & (position < row_at.shape[1])
    if not known.any():
        return values.new_full((len(row_at), len(position)), torch.nan)
    rows = row_at[:, position.where(known, 0)].where(known, -1)
    return values[rows.clamp(min=0), found.pair].where(rows >= 0, torch.nan)


def rows_of(keys: list[Any], batch_keys: list[Any]) -> list[int]:
    if keys == batch_keys:
        return list(range(len(keys)))
    row = {key: number for number, key in enumerate(batch_keys)}
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(
            f"{len(missing)} pairs of the result are not in the batch, such as {missing[0]!r}; give the one patched"
        )
    return [row[key] for key in keys]
