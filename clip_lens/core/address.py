"""The compiler of places: sites and edges -> index columns, checked against an encoder and a batch.

Sites and edges are both flat lists of entries, one per member of a place; `sites.py` and `edges.py` make hooks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import PARTS, Edge, Kind, Match, Outside, Place, Site, hook_name, members, start_layer
from clip_lens.words import unknown

Slot: TypeAlias = str | int | None


@dataclass(frozen=True)
class Entries:
    """The members of places as index columns, those of one place together: place p's are `offset[p]:offset[p + 1]`.

    Columns of a site: hook, unit (-1 = all), slot. Of an edge: sender, receiver, slot.
    """

    columns: Int[Tensor, "entry 3"]
    offset: Int[Tensor, "place_and_end"]

    @classmethod
    def of(cls, lines: Sequence[Sequence[tuple[int, int, int]]], device: torch.device) -> Entries:
        flat = [line for place in lines for line in place]
        columns = torch.tensor(flat, dtype=torch.long, device=device).reshape(-1, 3)
        counts = torch.tensor([0, *map(len, lines)], device=device)
        return cls(columns, counts.cumsum(0))

    def some(self, first: int, last: int) -> Entries:
        """The entries of the places from `first` to before `last`."""
        start, end = int(self.offset[first]), int(self.offset[last])
        return Entries(self.columns[start:end], self.offset[first : last + 1] - start)

    def rows(self, place: Int[Tensor, "row"]) -> tuple[Int[Tensor, "entry"], Int[Tensor, "entry 3"]]:
        """The entries of some rows' places: which row each belongs to, and its columns."""
        count = self.offset[place + 1] - self.offset[place]
        row = torch.repeat_interleave(torch.arange(len(place), device=place.device), count)
        nth = torch.arange(len(row), device=place.device) - (count.cumsum(0) - count)[row]
        return row, self.columns[self.offset[place][row] + nth]


@dataclass(frozen=True)
class Addresses:
    """Places as numbers: which hooks, senders, receivers and slots they name, and the block at which each starts."""

    hooks: tuple[str, ...]
    kinds: tuple[Kind, ...]
    senders: tuple[Site, ...]
    receivers: tuple[Site, ...]
    slots: tuple[Slot, ...]
    sites: Entries
    edges: Entries
    start: Int[Tensor, "place"]

    def __len__(self) -> int:
        return len(self.start)

    def some(self, first: int, last: int) -> Addresses:
        """The addresses of the places from `first` to before `last`, numbered as in all of them."""
        sites, edges = self.sites.some(first, last), self.edges.some(first, last)
        return replace(self, sites=sites, edges=edges, start=self.start[first:last])

    @property
    def hooked(self) -> tuple[str, ...]:
        """The hooks that these places' sites name."""
        return tuple(self.hooks[number] for number in self.sites.columns[:, 0].unique().tolist())


class _Numbers(dict[object, int]):
    """Values -> the order in which they first came."""

    def __missing__(self, value: object) -> int:
        self[value] = len(self)
        return self[value]


def address(places: Sequence[Place], encoder: HookedTextEncoder, batch: Batch) -> Addresses:
    """The places' addresses in this encoder and batch.

    Raises:
        ValueError: a place has a layer, unit or slot that does not exist here, or is an empty tuple.
    """
    hooks, senders, receivers, slots = _Numbers(), _Numbers(), _Numbers(), _Numbers()
    kinds: dict[str, Kind] = {}
    sites: list[list[tuple[int, int, int]]] = []
    edges: list[list[tuple[int, int, int]]] = []
    for place in places:
        if not members(place):
            if isinstance(place, Outside):
                raise ValueError(f"{place}: a name only; give the circuit itself to faithfulness")
            if isinstance(place, Match):
                raise ValueError(f"{place}: a term of a sum can't be patched; patch the edges into q and k")
            raise ValueError("an empty tuple is no place: name at least one site or edge")
        sites.append([])
        edges.append([])
        for member in members(place):
            if isinstance(member, Edge):
                for sender, receiver in _ends(member, encoder):
                    bare = replace(receiver, slot=None)
                    edges[-1].append((senders[sender], receivers[bare], slots[_typed(receiver.slot)]))
            else:
                if member.kind == "out":
                    raise ValueError(
                        f"out receives edges and is no site; Site('resid', {encoder.n_layers}) is what it reads"
                    )
                if member.kind in PARTS:
                    raise ValueError(
                        f"{member} is a part of a sum and can't be patched; direct_effects attributes to it"
                    )
                name = hook_name(member, encoder.n_layers)
                kinds.setdefault(name, member.kind)
                unit = -1 if member.unit is None else member.unit
                sites[-1].append((hooks[name], unit, slots[_typed(member.slot)]))
    every = [member for place in places for member in members(place)]
    for site in dict.fromkeys(end for member in every for end in _sites(member)):
        _check(site, encoder, batch)
    return Addresses(
        tuple(hooks),  # type: ignore[arg-type]
        tuple(kinds[name] for name in hooks),  # type: ignore[index]
        tuple(senders),  # type: ignore[arg-type]
        tuple(receivers),  # type: ignore[arg-type]
        tuple(pair[1] for pair in slots),  # type: ignore[index]
        Entries.of(sites, encoder.device),
        Entries.of(edges, encoder.device),
        torch.tensor([start_layer(place, encoder.n_layers) for place in places], device=encoder.device),
    )


def address_edges(
    chosen: Bool[Tensor, "place receiver sender"], senders: Sequence[Site], receivers: Sequence[Site], n_layers: int
) -> Addresses:
    """The addresses of sets of edges given as masks, one place per mask: single units, at their receivers' slots.

    Masks of several places hold thousands of edges; as `Edge` objects they would cost more than running them.
    """
    _, receiver, sender = chosen.nonzero(as_tuple=True)
    device = chosen.device
    counts = chosen.flatten(1).sum(1)
    layer = torch.tensor([start_layer(Edge(Site("embed"), site), n_layers) for site in receivers], device=device)
    start = torch.where(chosen.any(2), layer, n_layers).amin(1)
    none = Entries(chosen.new_zeros(0, 3, dtype=torch.long), chosen.new_zeros(len(chosen) + 1, dtype=torch.long))
    offset = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    bare, slots = _Numbers(), _Numbers()
    at = torch.tensor([(bare[replace(site, slot=None)], slots[_typed(site.slot)]) for site in receivers], device=device)
    edges = Entries(torch.stack([sender, *at[receiver].unbind(1)], 1), offset)
    names = tuple(pair[1] for pair in slots)  # type: ignore[index]
    return Addresses((), (), tuple(senders), tuple(bare), names, none, edges, start)  # type: ignore[arg-type]


def _typed(slot: Slot) -> tuple[type, Slot]:
    return type(slot), slot


def _sites(member: Site | Edge) -> tuple[Site, ...]:
    return (member.sender, member.receiver) if isinstance(member, Edge) else (member,)


def _ends(edge: Edge, encoder: HookedTextEncoder) -> list[tuple[Site, Site]]:
    """An edge as edges between single units."""
    ends = [
        [replace(site, unit=unit) for unit in encoder.units(site.kind)] if site.unit is None else [site]
        for site in (edge.sender, edge.receiver)
    ]
    return [(sender, receiver) for sender in ends[0] for receiver in ends[1]]


def _check(site: Site, encoder: HookedTextEncoder, batch: Batch) -> None:
    depth = encoder.n_layers + (site.kind == "resid")
    if site.layer >= depth:
        raise ValueError(f"{site}: {encoder.name} has {site.kind} sites at layers 0..{depth - 1}")
    if site.unit is not None and site.unit not in (units := encoder.units(site.kind)):
        raise ValueError(f"{site}: {encoder.name} has {site.kind} units 0..{len(list(units)) - 1}")
    if isinstance(site.slot, str) and site.slot not in batch.slots:
        raise ValueError(f"{site}: {unknown('slot', site.slot, batch.slots)}")
    if isinstance(site.slot, int) and site.slot >= batch.tokens.shape[1]:
        raise ValueError(f"{site}: the batch has positions 0..{batch.tokens.shape[1] - 1}")
