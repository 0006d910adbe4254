"""Places: where in a text tower something is read or patched. Frozen values, no behaviour.

| kind | hook | shape of the activation |
|---|---|---|
| embed | blocks.0.hook_resid_pre | pair pos d_model |
| resid | blocks.{l}.hook_resid_pre; l = L: blocks.{L-1}.hook_resid_post | pair pos d_model |
| mid | blocks.{l}.hook_resid_mid | pair pos d_model |
| attn | blocks.{l}.hook_attn_out | pair pos d_model |
| mlp | blocks.{l}.hook_mlp_out | pair pos d_model |
| head | blocks.{l}.attn.hook_z | pair pos head d_head |
| q, k, v | blocks.{l}.attn.hook_q, hook_k, hook_v | pair pos head d_head |
| pattern | blocks.{l}.attn.hook_pattern | pair head query key |
| neuron | blocks.{l}.mlp.hook_post | pair pos d_mlp |
| result | blocks.{l}.attn.hook_result; what a head writes, without the attention's bias | pair pos head d_model |
| norm | hook_norm; what ln_final gives, read at the pooled position | pair pos d_model |
| projection | hook_projection; the embedding, not yet of unit length, read at the pooled position | pair pos d_embed |
| out | the pooled position of what ln_final reads; a receiver of edges only | pair d_model |
| token, position, attn_bias, mlp_bias, constant | parts of a sum, for attribution only: no hook, can't be patched | |

An `Edge` is the direct path from a writer of the residual stream (embed, head, mlp) to a reader of it (a head's q, k or
v, mlp, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

from clip_lens.words import unknown

Kind = Literal[
    "embed", "resid", "mid", "attn", "mlp", "head", "q", "k", "v", "pattern", "neuron", "result",
    "norm", "projection", "out",
    "token", "position", "attn_bias", "mlp_bias", "constant",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
PARTS: tuple[Kind, ...] = KINDS[KINDS.index("token") :]
"""Parts of a sum that no hook holds alone: places of an attribution, never of a patch."""
NO_LAYER: tuple[Kind, ...] = ("embed", "norm", "projection", "out", "token", "position", "constant")
BEHIND: tuple[Kind, ...] = ("norm", "projection", "out")
"""Kinds behind the last block, which matter at the pooled position alone."""
SENDERS: tuple[Kind, ...] = ("embed", "head", "mlp")
RECEIVERS: tuple[Kind, ...] = ("q", "k", "v", "mlp", "out")


class Layout(NamedTuple):
    """How a kind's activation is laid out: its hook, the axis of its units, the axis of its positions."""

    hook: str
    unit_axis: int | None = None
    pos_axis: int = 1

    @property
    def query_by_key(self) -> bool:
        """Whether it has two axes of positions, queries and behind them keys, as patterns have."""
        return self.pos_axis == 2


LAYOUTS: dict[Kind, Layout] = {
    "embed": Layout("blocks.{layer}.hook_resid_pre"),
    "resid": Layout("blocks.{layer}.hook_resid_pre"),
    "mid": Layout("blocks.{layer}.hook_resid_mid"),
    "attn": Layout("blocks.{layer}.hook_attn_out"),
    "mlp": Layout("blocks.{layer}.hook_mlp_out"),
    "head": Layout("blocks.{layer}.attn.hook_z", unit_axis=2),
    "q": Layout("blocks.{layer}.attn.hook_q", unit_axis=2),
    "k": Layout("blocks.{layer}.attn.hook_k", unit_axis=2),
    "v": Layout("blocks.{layer}.attn.hook_v", unit_axis=2),
    "pattern": Layout("blocks.{layer}.attn.hook_pattern", unit_axis=1, pos_axis=2),
    "neuron": Layout("blocks.{layer}.mlp.hook_post", unit_axis=2),
    "result": Layout("blocks.{layer}.attn.hook_result", unit_axis=2),
    "norm": Layout("hook_norm"),
    "projection": Layout("hook_projection"),
}
"""Every kind that can be patched as a site. A line more is a kind more: with
`LAYOUTS["pre"] = Layout("blocks.{layer}.mlp.hook_pre", unit_axis=2)` the place `Site("pre", 3)` is like any other."""


def layout_at(name: str) -> Layout:
    """How the activation at a hook is laid out; one that no kind has is `pair pos ...`.

    Example:
        >>> layout_at("blocks.3.attn.hook_pattern").query_by_key, layout_at("blocks.0.hook_resid_post").pos_axis
        (True, 1)
    """
    template = re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", name)
    return next((layout for layout in LAYOUTS.values() if layout.hook == template), Layout(template))


def unknown_kind(kind: str, kinds: Iterable[str]) -> str:
    """What is wrong with a kind that there isn't; a hook of TransformerLens' is said to be that of a kind.

    Example:
        >>> unknown_kind("mlp_out", ["head", "mlp"])
        "no kind of site 'mlp_out' (that is the hook of kind 'mlp'); there are head, mlp"
    """
    kinds = list(kinds)
    hooks = {layout.hook.rpartition("hook_")[2]: name for name, layout in LAYOUTS.items()}
    known = hooks.get(str(kind).rpartition(".")[2].removeprefix("hook_"))
    if known in kinds:
        return f"no kind of site {kind!r} (that is the hook of kind {known!r}); there are {', '.join(kinds)}"
    return unknown("kind of site", str(kind), kinds)


@dataclass(frozen=True)
class Site:
    """A slice of one activation.

    `layer` counts blocks from 0; `resid` runs over 0..L, where resid 0 is the embedding and resid L leaves the last
    block. `unit` is a head or a neuron, None = all of them as one place. `slot` is a named slot (all its tokens
    together), an int = the run's position, None = every token.

    Raises:
        ValueError: the kind does not exist, or has no units and one is given, or a number is negative.

    Example:
        >>> Site("head", 2, unit=3, slot="negator")
        Site(kind='head', layer=2, unit=3, slot='negator')
        >>> str(Site("head", 2, unit=3, slot="negator"))
        'head 2.3 @negator'
    """

    kind: Kind
    layer: int = 0
    unit: int | None = None
    slot: str | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.kind not in LAYOUTS:
            raise ValueError(unknown_kind(self.kind, dict.fromkeys([*KINDS, *LAYOUTS])))
        if self.unit is not None and (self.kind not in LAYOUTS or LAYOUTS[self.kind].unit_axis is None):
            raise ValueError(f"a site of kind {self.kind!r} has no units, got unit={self.unit}; leave it None")
        if self.kind in NO_LAYER and self.layer != 0:
            raise ValueError(f"{self.kind} has no layer, got layer={self.layer}; Site('resid', {self.layer})?")
        for name, number in (("layer", self.layer), ("unit", 0 if self.unit is None else self.unit)):
            if not hasattr(number, "__index__"):
                raise ValueError(f"{name} is a number, got {number!r}; write Site(kind, layer, unit=..., slot=...)")
        for name, value in (("layer", self.layer), ("unit", self.unit), ("slot", self.slot)):
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} counts from 0, got {value} in a site of kind {self.kind!r}")

    def __str__(self) -> str:
        unit = "" if self.unit is None else f".{self.unit}"
        slot = "" if self.slot is None else f" @{self.slot}"
        return f"{self.kind}{slot}" if self.kind in NO_LAYER else f"{self.kind} {self.layer}{unit}{slot}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `str` writes so: a kind, a layer, behind a dot a unit, behind an @ a slot.

        A slot of digits is a position, any other a name.

        Raises:
            ValueError: no such kind, a layer where it has none or none where it has one, or other words.

        Example:
            >>> Site.parse("head 2.1 @eot")
            Site(kind='head', layer=2, unit=1, slot='eot')
            >>> Site.parse("mlp 3 @7").slot, Site.parse("embed")
            (7, Site(kind='embed', layer=0, unit=None, slot=None))
        """
        match = re.fullmatch(r"\s*([A-Za-z_]+)\s*(?:(\d+)(?:\.(\d+))?)?\s*(?:@(.+))?", text, re.DOTALL)
        if match is None:
            raise ValueError(f"{text!r} is no site; write one as 'head 2.1 @eot': a kind, a layer, a unit, a slot")
        kind, layer, unit, slot = match.groups()
        if layer is None and kind in LAYOUTS and kind not in NO_LAYER:
            raise ValueError(f"{text!r} names no layer; write '{kind} 0', with the layer behind the kind")
        return cls(
            kind,  # type: ignore[arg-type]
            int(layer or 0),
            None if unit is None else int(unit),
            int(slot) if slot is not None and re.fullmatch(r"[0-9]+", slot) else slot,
        )


@dataclass(frozen=True)
class Edge:
    """The direct path from a writer of the residual stream to a reader of it, past everything in between.

    The sender is `embed`, a head or an MLP, the receiver a head's q, k or v, an MLP or `out`. A sender or receiver
    without unit stands for all heads of its layer. An edge's slot is its receiver's: the positions that read.

    Raises:
        ValueError: a kind that sends or receives nothing, a receiver that does not come after the sender, or a slot
            where none can be.

    Example:
        >>> edge = Edge(Site("head", 1, 2), Site("v", 3, 0, slot="eot"))
        >>> str(edge)
        'head 1.2 -> v 3.0 @eot'
    """

    sender: Site
    receiver: Site

    def __post_init__(self) -> None:
        if self.sender.kind not in SENDERS or self.receiver.kind not in RECEIVERS:
            raise ValueError(
                f"no edge from {self.sender} to {self.receiver}: "
                f"{', '.join(SENDERS)} send, {', '.join(RECEIVERS)} receive"
            )
        if not precedes(self.sender, self.receiver):
            raise ValueError(
                f"no edge from {self.sender} to {self.receiver}: the receiver does not come after the sender"
            )
        if self.sender.slot is not None:
            raise ValueError(f"an edge's slot is its receiver's, got one at the sender {self.sender}")
        if self.receiver.kind == "out" and self.receiver.slot is not None:
            raise ValueError(f"out is read at the pooled position, it has no slot; got {self.receiver}")

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"

    @classmethod
    def parse(cls, text: str) -> Edge:
        """The edge that `str` writes so: its sender, an arrow, its receiver, as `Site.parse` reads them.

        Raises:
            ValueError: not two sites with `->` between them, or no edge runs there.

        Example:
            >>> str(Edge.parse("head 1.2 -> v 3.0 @eot"))
            'head 1.2 -> v 3.0 @eot'
        """
        ends = text.split("->")
        if len(ends) != 2:
            raise ValueError(f"{text!r} is no edge; write one as 'head 1.2 -> v 3.0 @eot'")
        return cls(Site.parse(ends[0].rstrip()), Site.parse(ends[1]))


def precedes(sender: Site, receiver: Site) -> bool:
    """Whether a writer's output reaches a reader: blocks in order, in each attention before the MLP.

    Example:
        >>> precedes(Site("head", 2, 0), Site("mlp", 2)), precedes(Site("mlp", 2), Site("mlp", 2))
        (True, False)
    """
    writes = (-1, 0) if sender.kind == "embed" else (sender.layer, 1 if sender.kind == "head" else 3)
    return receiver.kind == "out" or writes < (receiver.layer, 2 if receiver.kind == "mlp" else 0)


def order(site: Site) -> tuple[int, int, int, int, str]:
    """A key that sorts senders, or receivers, as the tower computes them; q, k, v of a head together.

    Example:
        >>> [str(site) for site in sorted([Site("out"), Site("mlp", 0), Site("v", 0, 1), Site("q", 0, 1)], key=order)]
        ['q 0.1', 'v 0.1', 'mlp 0', 'out']
    """
    layer = 10**9 if site.kind in (*BEHIND, "constant") else -1 if site.kind in NO_LAYER else site.layer
    kind = KINDS.index(site.kind) if site.kind in KINDS else len(KINDS)
    return layer, site.kind == "mlp", site.unit or 0, kind, str(site.slot)


@dataclass(frozen=True)
class Outside:
    """Every edge outside a circuit, patched together: a place by name, since it may have tens of thousands of members.

    `edges` of the tower's `of` edges are in the circuit; `share` of them was asked for, where a circuit was selected by
    size, `ranking` says by which score, "signed" or "absolute". `pruned`: what lies on no path from the embedding to
    the output was taken out after the selection, which is another circuit.

    Example:
        >>> str(Outside("exact", edges=20, of=1108)), str(Outside("exact", edges=18, of=1108, pruned=True))
        ('outside exact, 20 of 1108 edges', 'outside exact, 18 of 1108 edges, pruned')
    """

    circuit: str
    edges: int
    of: int
    share: float | None = None
    ranking: str = ""
    pruned: bool = False

    def __str__(self) -> str:
        ranking, pruned = f" ({self.ranking})" if self.ranking else "", ", pruned" if self.pruned else ""
        return f"outside {self.circuit}{ranking}, {self.edges} of {self.of} edges{pruned}"


@dataclass(frozen=True)
class Match:
    """A term of a head's attention score: what its query reads of one part of the stream times what its key reads of
    another. A place of an attribution, never of a patch.

    `head` is the pattern whose score it is, its slot the query's; `at` is the key's slot.

    Example:
        >>> str(Match(Site("pattern", 2, 1, "eot"), "negator", Site("mlp", 0), Site("token")))
        'mlp 0 x token in score 2.1 @eot -> @negator'
    """

    head: Site
    at: str | int
    query: Site
    key: Site

    def __str__(self) -> str:
        return f"{self.query} x {self.key} in {str(self.head).replace('pattern', 'score')} -> @{self.at}"


Place: TypeAlias = Site | Edge | Outside | Match | tuple[Site | Edge, ...]


def place_of(given: Place | str) -> Place:
    """The place itself, or the one that a text names: a site, an edge, or several that are patched together, with plus
    signs between them.

    Raises:
        ValueError: a text that names no site or edge.

    Example:
        >>> place_of("mlp 4 + head 2.3 @eot")
        (Site(kind='mlp', layer=4, unit=None, slot=None), Site(kind='head', layer=2, unit=3, slot='eot'))
    """
    if not isinstance(given, str):
        return given
    found = tuple(Edge.parse(each) if "->" in each else Site.parse(each) for each in given.split(" + "))
    return found if len(found) > 1 else found[0]


def members(place: Place) -> tuple[Site | Edge, ...]:
    """The sites and edges of a place: one, or those of a tuple, which are patched together; a circuit's outside and a
    term of a score list none.

    Example:
        >>> members(Site("mlp", 1))
        (Site(kind='mlp', layer=1, unit=None, slot=None),)
    """
    if isinstance(place, Outside | Match):
        return ()
    return place if isinstance(place, tuple) else (place,)


def writers(n_layers: int, n_heads: int) -> list[Site]:
    """Every sender of a tower, single units each, in the order in which it computes them.

    Example:
        >>> [str(site) for site in writers(1, 2)]
        ['embed', 'head 0.0', 'head 0.1', 'mlp 0']
    """
    heads = [Site("head", layer, unit) for layer in range(n_layers) for unit in range(n_heads)]
    return sorted([Site("embed"), *heads, *(Site("mlp", layer) for layer in range(n_layers))], key=order)


def readers(n_layers: int, n_heads: int) -> list[Site]:
    """Every receiver of a tower, single units each, in the order in which it computes them.

    Example:
        >>> [str(site) for site in readers(1, 1)]
        ['q 0.0', 'k 0.0', 'v 0.0', 'mlp 0', 'out']
    """
    units = [(layer, unit) for layer in range(n_layers) for unit in range(n_heads)]
    inputs = [Site(kind, *at) for at in units for kind in ("q", "k", "v")]
    return sorted([*inputs, *(Site("mlp", layer) for layer in range(n_layers)), Site("out")], key=order)


def slot_of(member: Site | Edge) -> str | int | None:
    """The slot of a site, or of an edge's receiver.

    Example:
        >>> slot_of(Edge(Site("embed"), Site("mlp", 4, slot="negator")))
        'negator'
    """
    return member.receiver.slot if isinstance(member, Edge) else member.slot


def at_slot(place: Place, slot: str | int | None) -> Place:
    """The same place at another slot.

    Example:
        >>> str(at_slot(Site("mlp", 4), "eot"))
        'mlp 4 @eot'
    """
    if isinstance(place, Outside | Match):
        raise ValueError(f"{place} has no slot of its own")
    moved = tuple(
        replace(member, receiver=replace(member.receiver, slot=slot))
        if isinstance(member, Edge)
        else replace(member, slot=slot)
        for member in members(place)
    )
    return moved if isinstance(place, tuple) else moved[0]


def hook_name(site: Site, n_layers: int) -> str:
    """The name of the hook point at which a site is read and patched, in a tower of `n_layers` blocks.

    Example:
        >>> hook_name(Site("resid", 12), 12), hook_name(Site("q", 3), 12)
        ('blocks.11.hook_resid_post', 'blocks.3.attn.hook_q')
    """
    if site.kind == "resid" and site.layer == n_layers:
        return f"blocks.{n_layers - 1}.hook_resid_post"
    return LAYOUTS[site.kind].hook.format(layer=site.layer)


def start_layer(place: Place, n_layers: int) -> int:
    """The earliest block whose computation a place touches: everything below it is as in the unpatched run.

    Example:
        >>> start_layer((Site("mlp", 4), Site("resid", 2)), 6), start_layer(Edge(Site("embed"), Site("out")), 6)
        (2, 6)
    """
    touched = [member.receiver if isinstance(member, Edge) else member for member in members(place)]
    return min(n_layers if site.kind in BEHIND else site.layer for site in touched)


def label(place: Place) -> str:
    """A place in a few characters, for axes and tables.

    Example:
        >>> label((Site("mlp", 4), Site("head", 2, 3)))
        'mlp 4 + head 2.3'
        >>> label(tuple(Site("head", 2, head) for head in range(8)))
        'head 2.0 + head 2.1 + ... (8 places)'
    """
    names = [str(place)] if isinstance(place, Outside | Match) else [str(member) for member in members(place)]
    if len(names) > 4:
        return f"{names[0]} + {names[1]} + ... ({len(names)} places)"
    return " + ".join(names)


def index_rows(places: Iterable[Place]) -> list[dict[str, object]]:
    """One mapping per place with the columns `place, kind, layer, unit, slot, sender, receiver`; what a tuple's members
    don't share is None. An edge's layer and unit are in its sender and receiver, its slot is the receiver's. A
    circuit's outside has the kind "circuit". A term of a score has the kind "score"; its sender is what the query
    reads, its receiver what the key reads.

    Example:
        >>> index_rows([Edge(Site("embed"), Site("mlp", 4))])[0]["sender"]
        'embed'
    """
    rows = []
    for place in places:
        fields = [_fields(member) for member in ([place] if isinstance(place, Outside | Match) else members(place))]
        shared = {name: value for name, value in fields[0].items() if all(line[name] == value for line in fields)}
        rows.append({"place": label(place), **dict.fromkeys(fields[0]), **shared})
    return rows


def _fields(member: Site | Edge | Outside | Match) -> dict[str, object]:
    if isinstance(member, Match):
        head = {"kind": "score", "layer": member.head.layer, "unit": member.head.unit, "slot": member.head.slot}
        return {**head, "sender": str(member.query), "receiver": str(member.key)}
    if isinstance(member, Outside):
        empty = dict.fromkeys(("layer", "unit", "slot", "sender", "receiver"))
        return {"kind": "circuit", **empty}
    if isinstance(member, Edge):
        ends = {"sender": str(member.sender), "receiver": str(replace(member.receiver, slot=None))}
        return {"kind": "edge", "layer": None, "unit": None, "slot": member.receiver.slot, **ends}
    own = {name: getattr(member, name) for name in ("kind", "layer", "unit", "slot")}
    layer = None if member.kind in PARTS and member.kind in NO_LAYER else member.layer
    return {**own, "layer": layer, "sender": None, "receiver": None}
