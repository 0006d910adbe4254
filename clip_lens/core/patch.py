"""Places + a source -> hooks. What a reader reads at a patched place = what the source gives, on each row of its own.

A *row* is one place of one pair: many interventions are rows of one forward pass, and each hook touches only its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Kind, Place, Site, hook_name, sites_of, start_layer

Slot = str | int | None
Patch = tuple[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Addresses:
    """Places as index tensors: the k-th site of a place is at `hooks[hook[place, k]]`, -1 = it has fewer sites."""

    hooks: tuple[str, ...]
    kinds: tuple[Kind, ...]
    slots: tuple[Slot, ...]
    hook: Int[Tensor, "place k"]
    unit: Int[Tensor, "place k"]
    slot: Int[Tensor, "place k"]
    start: Int[Tensor, "place"]


def address(places: Sequence[Place], encoder: HookedTextEncoder, batch: Batch) -> Addresses:
    """The places' addresses in this encoder and batch.

    Raises:
        ValueError: a place has a layer, unit or slot that does not exist here, or is an empty tuple.
    """
    members = [sites_of(place) for place in places]
    if not all(members):
        raise ValueError("an empty tuple is no place: name at least one site")
    for site in dict.fromkeys(site for sites in members for site in sites):
        _check(site, encoder, batch)
    named = {site: hook_name(site, encoder.n_layers) for sites in members for site in sites}
    hooks = {name: site.kind for site, name in named.items()}
    names, slots = list(hooks), list(dict.fromkeys(site.slot for site in named))
    number = {name: index for index, name in enumerate(names)}
    width = max(map(len, members))
    table = torch.full((3, len(members), width), -1)
    slot_number = {(type(slot), slot): index for index, slot in enumerate(slots)}
    for row, sites in enumerate(members):
        for k, site in enumerate(sites):
            unit = -1 if site.unit is None else site.unit
            table[:, row, k] = torch.tensor([number[named[site]], unit, slot_number[type(site.slot), site.slot]])
    start = torch.tensor([start_layer(place) for place in places], device=encoder.device)
    hook, unit, slot = table.to(encoder.device)
    return Addresses(tuple(names), tuple(hooks.values()), tuple(slots), hook, unit, slot, start)


def _check(site: Site, encoder: HookedTextEncoder, batch: Batch) -> None:
    depth = encoder.n_layers + (site.kind == "resid")
    if site.layer >= depth:
        raise ValueError(f"{site}: {encoder.name} has {site.kind} sites at layers 0..{depth - 1}")
    if site.unit is not None and site.unit not in (units := encoder.units(site.kind)):
        raise ValueError(f"{site}: {encoder.name} has {site.kind} units 0..{len(list(units)) - 1}")
    if isinstance(site.slot, str) and site.slot not in batch.slots:
        raise ValueError(f"{site}: no slot {site.slot!r}; the batch has {', '.join(batch.slots)}")
    if isinstance(site.slot, int) and site.slot >= batch.tokens.shape[1]:
        raise ValueError(f"{site}: the batch has positions 0..{batch.tokens.shape[1] - 1}")


def slot_positions(slots: Sequence[Slot], batch: Batch) -> Bool[Tensor, "slot pair pos"]:
    """Which positions each slot has in each pair: a named slot's tokens, one raw position, or all of the text."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    found = []
    for slot in slots:
        if slot is None:
            where = torch.ones_like(batch.inside)
        elif isinstance(slot, str):
            where = batch.slot == batch.slots.index(slot)
        else:
            where = (position == slot).expand_as(batch.inside)
        found.append(where & batch.inside)
    return torch.stack(found)


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
) -> list[Patch]:
    """The hooks that give each row what the source has at the row's place, where it has something.

    `at(hook name)` says which of the text's positions the activation at that hook holds, for each row.
    """
    hooks: list[Patch] = []
    for k in range(addresses.hook.shape[1]):
        used = addresses.hook[place, k]
        for number in used[used >= 0].unique().tolist():
            rows = (used == number).nonzero().flatten()
            name, kind = addresses.hooks[number], addresses.kinds[number]
            here = at(name)[rows]
            where = positions[addresses.slot[place[rows], k], pair[rows]].gather(1, here)
            patch = partial(
                _patched,
                rows=rows,
                where=where,
                unit=addresses.unit[place[rows], k],
                kind=kind,
                value=_gathered(source[name], pair[rows], here, kind),
            )
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
    where: Bool[Tensor, "some at"],
    unit: Int[Tensor, "some"],
    kind: Kind,
    value: Shaped[Tensor, "some ..."],
) -> Shaped[Tensor, "row ..."]:
    every = len(rows) == len(activation)
    current = activation if every else activation[rows]
    mask = _broadcast(where, unit, kind, current)
    patched = torch.where(mask & ~value.isnan(), value, current)
    if every:
        return patched
    result = activation.clone()
    result[rows] = patched
    return result


def _broadcast(
    where: Bool[Tensor, "row at"], unit: Int[Tensor, "row"], kind: Kind, like: Shaped[Tensor, "row ..."]
) -> Bool[Tensor, "row ..."]:
    """A mask over positions and a unit per row (-1 = all) -> a mask that broadcasts over an activation of a kind."""
    layout = LAYOUTS[kind]
    mask = where.reshape([*where.shape, *[1] * (like.ndim - 2)]).movedim(1, layout.pos_axis)
    if layout.unit_axis is None or bool((unit < 0).all()):
        return mask
    units = torch.arange(like.shape[layout.unit_axis], device=like.device)
    chosen = (unit[:, None] == units) | (unit[:, None] < 0)
    shape = [len(unit), *[1] * (like.ndim - 1)]
    shape[layout.unit_axis] = len(units)
    return mask & chosen.reshape(shape)
