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
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

Kind = Literal["embed", "resid", "mid", "attn", "mlp", "head", "q", "k", "v", "pattern", "neuron"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Layout(NamedTuple):
    """How a kind's activation is laid out: its hook, the axis of its units, the axis of its positions."""

    hook: str
    unit_axis: int | None = None
    pos_axis: int = 1


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
}


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
        if self.kind not in LAYOUTS:
            raise ValueError(f"no kind of site {self.kind!r}; the kinds are {', '.join(KINDS)}")
        if self.unit is not None and LAYOUTS[self.kind].unit_axis is None:
            raise ValueError(f"a site of kind {self.kind!r} has no units, got unit={self.unit}; leave it None")
        if self.kind == "embed" and self.layer != 0:
            raise ValueError(f"the embedding is at layer 0, got layer={self.layer}; Site('resid', {self.layer})?")
        for name, value in (("layer", self.layer), ("unit", self.unit), ("slot", self.slot)):
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} counts from 0, got {value} in a site of kind {self.kind!r}")

    def __str__(self) -> str:
        unit = "" if self.unit is None else f".{self.unit}"
        slot = "" if self.slot is None else f" @{self.slot}"
        return f"{self.kind}{slot}" if self.kind == "embed" else f"{self.kind} {self.layer}{unit}{slot}"


Place: TypeAlias = Site | tuple[Site, ...]


def sites_of(place: Place) -> tuple[Site, ...]:
    """The sites of a place: one, or the members of a tuple that are patched together.

    Example:
        >>> sites_of(Site("mlp", 1))
        (Site(kind='mlp', layer=1, unit=None, slot=None),)
    """
    return place if isinstance(place, tuple) else (place,)


def hook_name(site: Site, n_layers: int) -> str:
    """The name of the hook point at which a site is read and patched, in a tower of `n_layers` blocks.

    Example:
        >>> hook_name(Site("resid", 12), 12), hook_name(Site("q", 3), 12)
        ('blocks.11.hook_resid_post', 'blocks.3.attn.hook_q')
    """
    if site.kind == "resid" and site.layer == n_layers:
        return f"blocks.{n_layers - 1}.hook_resid_post"
    return LAYOUTS[site.kind].hook.format(layer=site.layer)


def start_layer(place: Place) -> int:
    """The earliest block whose computation a place touches: everything below it is as in the unpatched run.

    Example:
        >>> start_layer((Site("mlp", 4), Site("resid", 2)))
        2
    """
    return min(site.layer for site in sites_of(place))


def label(place: Place) -> str:
    """A place in a few characters, for axes and tables.

    Example:
        >>> label((Site("mlp", 4), Site("head", 2, 3)))
        'mlp 4 + head 2.3'
    """
    return " + ".join(str(site) for site in sites_of(place))


def index_rows(places: Iterable[Place]) -> list[dict[str, object]]:
    """One mapping per place: `place, kind, layer, unit, slot`; a tuple's columns hold what its sites share.

    Example:
        >>> index_rows([Site("mlp", 4)])
        [{'place': 'mlp 4', 'kind': 'mlp', 'layer': 4, 'unit': None, 'slot': None}]
    """
    rows = []
    for place in places:
        sites = sites_of(place)
        shared = {
            name: getattr(sites[0], name) if len({getattr(site, name) for site in sites}) == 1 else None
            for name in ("kind", "layer", "unit", "slot")
        }
        rows.append({"place": label(place), **shared})
    return rows
