"""Sites + a source -> hooks. What a receiver reads at a patched site = what the source gives, on each row of its own.

A *row* is one place of one pair: many interventions are rows of one forward pass, and each hook touches only its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from clip_lens.core.address import Addresses
from clip_lens.model.encoder import Hook
from clip_lens.model.site import LAYOUTS, Kind


def present(kind: Kind, value: Shaped[Tensor, "pair ..."]) -> Bool[Tensor, "pair pos"]:
    """At which positions a source has something: anything that is not NaN."""
    axis = LAYOUTS[kind].pos_axis
    return ~value.isnan().movedim(axis, 1).flatten(2).all(-1)


def patch_hooks(
    addresses: Addresses,
    source: Mapping[str, Shaped[Tensor, "pair ..."]],
    positions: Bool[Tensor, "slot pair pos"],
    place: Int[Tensor, "row"],
    pair: Int[Tensor, "row"],
    at: Callable[[str], Int[Tensor, "row at"]],
) -> list[Hook]:
    """The hooks that give each row what the source has at the row's sites, where it has something.

    `at(hook name)` says which of the text's positions the activation at that hook holds, for each row.
    """
    hooks: list[Hook] = []
    every_row, every_column = addresses.sites.rows(place)
    for number in every_column[:, 0].unique().tolist():
        mine = every_column[:, 0] == number
        rows, entry_row = every_row[mine].unique(return_inverse=True)
        _, unit, slot = every_column[mine].unbind(1)
        name, kind = addresses.hooks[number], addresses.kinds[number]
        here = at(name)[rows]
        where = positions[slot, pair[rows][entry_row]].gather(1, here[entry_row])
        patch = partial(
            _patched, rows=rows, entry_row=entry_row, where=where, unit=unit, kind=kind,
            value=_gathered(source[name], pair[rows], here, kind),
        )  # fmt: skip
        hooks.append((name, patch))
    return hooks


def _gathered(
    value: Shaped[Tensor, "pair ..."], pair: Int[Tensor, "row"], at: Int[Tensor, "row at"], kind: Kind
) -> Shaped[Tensor, "row ..."]:
    """A cached activation's lines for some rows, at the positions that each row holds."""
    if LAYOUTS[kind].pos_axis == 1:
        return value[pair[:, None], at]
    return value.movedim(2, 1)[pair[:, None], at].movedim(1, 2)


def _patched(
    activation: Shaped[Tensor, "row ..."],
    hook: object,
    *,
    rows: Int[Tensor, "some"],
    entry_row: Int[Tensor, "entry"],
    where: Bool[Tensor, "entry at"],
    unit: Int[Tensor, "entry"],
    kind: Kind,
    value: Shaped[Tensor, "some ..."],
) -> Shaped[Tensor, "row ..."]:
    every = len(rows) == len(activation)
    current = activation if every else activation[rows]
    mask = _mask(entry_row, where, unit, kind, current)
    patched = torch.where(mask & ~value.isnan(), value, current)
    if every:
        return patched
    result = activation.clone()
    result[rows] = patched
    return result


def _mask(
    entry_row: Int[Tensor, "entry"],
    where: Bool[Tensor, "entry at"],
    unit: Int[Tensor, "entry"],
    kind: Kind,
    like: Shaped[Tensor, "row ..."],
) -> Bool[Tensor, "row ..."]:
    """Entries' positions and units (-1 = all) -> a mask that broadcasts over an activation of a kind."""
    layout = LAYOUTS[kind]
    units = 1 if layout.unit_axis is None else like.shape[layout.unit_axis]
    all_units = unit < 0
    whole = _any_of(entry_row[all_units], where[all_units], len(like)).unsqueeze(1)
    line = entry_row[~all_units] * units + unit[~all_units]
    single = _any_of(line, where[~all_units], len(like) * units).unflatten(0, (len(like), units))
    mask = whole | single  # row unit at
    if layout.pos_axis == 1:
        mask = mask.transpose(1, 2)
    return mask.reshape([*mask.shape, *[1] * (like.ndim - mask.ndim)])


def _any_of(line: Int[Tensor, "entry"], where: Bool[Tensor, "entry at"], n: int) -> Bool[Tensor, "line at"]:
    """Entries joined by the line that they belong to: a position is in if any of them has it."""
    return where.new_zeros(n, where.shape[1], dtype=torch.int32).index_add(0, line, where.int()) > 0
