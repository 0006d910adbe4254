"""`direct_effects`: how much of the metric each part of the tower writes.

Nothing is patched. With the final LayerNorm's standard deviation and the embedding's norm frozen at each text's own
values, what is left between the residual stream and the metric is linear, and one vector per text reads it:

    C(a) = <a, reading vector> / (std * norm),    reading vector = centred(gamma * (W_U @ w))

for whatever `a` a component writes at the pooled position. The constant `<W_U^T beta + b_U, w> / norm` is a component
too, and the components add up to the metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.precision import precise
from clip_lens.core.record import Record
from clip_lens.core.setting import Setting
from clip_lens.data.batch import Batch
from clip_lens.methods.reading import (
    FROZEN,
    Reader,
    Text,
    attributed,
    block_of,
    both_texts,
    constant_of,
    metric_of,
    observe,
    read_out,
    reading_vector,
    stream_name,
    with_values,
)
from clip_lens.methods.registry import DIRECT
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import NO_LAYER, Edge, Kind, Place, Site, hook_name, members
from clip_lens.words import unknown

By = Literal["head", "neuron", "source", "layer", "sublayer"]
Slot: TypeAlias = str | int | None
Group: TypeAlias = tuple[Kind, int]
"""A kind in one layer, whose lines are read together."""
UNNAMED = "unnamed"
"""The source slot of the tokens that are in none of the batch's named slots (a bidirectional tower's padding too)."""
UNALIGNED = "unaligned"
"""The source slot, among raw positions, of the other text's tokens that match no token of the run."""
SOURCES = "what a head reads from a source slot is Site('v', layer, head, slot=...)"
STREAMS: tuple[Kind, ...] = ("embed", "resid", "mid", "attn", "mlp")
FIXED: tuple[Kind, ...] = ("token", "position", "attn_bias", "mlp_bias", "constant")
ATTRIBUTABLE: tuple[Kind, ...] = (*FIXED, *STREAMS, "head", "v", "neuron")


def direct_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    places: Iterable[Place] | None = None,
    *,
    contrast: bool = True,
    progress: bool = True,
) -> Effects:
    """How much of the logit difference each place writes by itself, in units of the metric: an `Effects`.

    `C(a) = <W_U^T (gamma * (a - mean(a)) / std), w> / norm` of what a place writes at the pooled position, `std` and
    `norm` each text's own (method, section 7; Elhage et al. 2021, Wang et al. 2023). With `contrast`
    `values = C(other) - C(run)` and `total = metric(other) - metric(run)`, so that `signed()` has the parts of d.
    Without it `values = C(run)` and `total = metric(run)`; there is nothing to orient, and the tables' mean effect is
    the mean of C. `baseline` is metric(run) in both.

    `places=None` is everything by head, `components(encoder, batch)`; the values of a complete list sum to `total`.
    Places may be token, position, head, attn_bias, mlp, neuron, mlp_bias, constant; embed, attn, resid, mid (all that
    they hold; resid L is everything but the constant); an edge into `out`, which is its sender; and
    `Site("v", l, h, slot=s)`, what head h reads from source slot s. A tuple is the sum of its members (one that
    overlaps another counts twice), a site without unit that of its units. A source slot that one text lacks adds 0 from
    that text, and is NaN where both lack it. A raw position is the run's, with the token of the other text that it is
    matched with; tokens in no named slot are at "unnamed", the other text's unmatched ones at "unaligned".

    Raises:
        ValueError: no places, a place without attribution (q, k, a pattern, an edge that does not end in out), one
            that this encoder or batch does not have, or a batch of another width than the encoder's embedding.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> effects = direct_effects(encoder, batch)
        >>> bool((effects.values.sum(0) - effects.total).abs().max() < 1e-4)
        True
        >>> effects.where(kind="head").grid("unit", "layer", "effect", side="foil").shape
        (4, 6)
    """
    places = tuple(components(encoder, batch) if places is None else places)
    sums = _sums(places, encoder, batch)
    read = lambda text: _contributions(encoder, text, sums)
    setting = Setting.reading(encoder, batch, progress=progress)
    record = direct_record(setting, contrast)
    if sums.slots:
        unnamed = sum(int((text.slot < 0)[text.inside].sum()) for text in both_texts(batch))
        record = record.saying(**{"source tokens in no named slot": unnamed})
    return attributed(setting, places, read, contrast, record)


def direct_record(setting: Setting, contrast: bool = True) -> Record:
    """The record of `direct_effects` of places without source slots.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> direct_record(Setting.reading(encoder, batch)).stands_for(direct_effects(encoder, batch).record)
        True
    """
    return with_values(setting.record(DIRECT, norms=FROZEN), contrast)


def components(
    encoder: HookedTextEncoder, batch: Batch, by: By = "head", *, slots: Sequence[str | int] | None = None
) -> list[Place]:
    """A list of places that hold everything that is written, each once: their `direct_effects` sum to the whole.

    `by="head"`: token, position, every head, attn_bias and mlp of every layer, constant. "neuron": the same with every
    neuron and mlp_bias for mlp. "source": the same with every head by the slot that it reads from. "layer": embed, each
    layer (a tuple of its attn and mlp), constant. "sublayer": embed, every attn and mlp, constant.

    `slots` are the source slots: names, or the run's positions; by default the names that occur in the batch. Tokens in
    none of them are one more place per head, so that nothing is lost.

    Raises:
        ValueError: another `by`, slots without `by="source"`, names together with positions, or a slot that the batch
            does not have.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> {by: len(components(encoder, batch, by)) for by in ("head", "neuron", "layer", "sublayer")}
        {'head': 39, 'neuron': 1575, 'layer': 8, 'sublayer': 14}
        >>> str(components(encoder, batch, "source", slots=["negator"])[2])
        'v 0.0 @negator'
    """
    if by not in get_args(By):
        raise ValueError(f"by={by!r}; give one of {', '.join(get_args(By))}")
    if slots is not None and by != "source":
        raise ValueError(f"slots are what by='source' splits heads into; by={by!r} has none")
    layers = range(encoder.n_layers)
    attn, mlp = encoder.sites("attn"), encoder.sites("mlp")
    if by in ("layer", "sublayer"):
        steps = list(zip(attn, mlp, strict=True))
        inner: list[Place] = list(steps) if by == "layer" else [site for step in steps for site in step]
        return [Site("embed"), *inner, Site("constant")]
    parts: list[Place] = [Site("token"), Site("position")]
    split = _source_slots(batch, slots) if by == "source" else []
    for layer in layers:
        heads = encoder.sites("head", layers=[layer])
        parts += [_source(head, slot) for head in heads for slot in split] or heads
        parts.append(Site("attn_bias", layer))
        parts += [*encoder.sites("neuron", layers=[layer]), Site("mlp_bias", layer)] if by == "neuron" else [mlp[layer]]
    return [*parts, Site("constant")]


def _source(head: Site, slots: Sequence[Slot]) -> Place:
    sites = tuple(Site("v", head.layer, head.unit, slot) for slot in slots)
    return sites[0] if len(sites) == 1 else sites


def _source_slots(batch: Batch, slots: Sequence[str | int] | None) -> list[tuple[Slot, ...]]:
    """The slots of a head's source places: each asked for, and together those that are left and have a token."""
    named = slots is None or any(isinstance(slot, str) for slot in slots)
    if named:
        every: list[Slot] = [*batch.slots, UNNAMED]
        if slots is not None and not all(isinstance(slot, str) for slot in slots):
            raise ValueError(f"slots are names or positions, not both: a token would count twice. Got {list(slots)}")
    else:
        every = [*range(batch.tokens.shape[1]), UNALIGNED]
    for slot in slots or ():
        _check_slot(Site("v", slot=slot), batch)
    has = torch.stack([_where(every, text).flatten(1).any(1) for text in both_texts(batch)]).any(0).tolist()
    occur = [slot for slot, any_token in zip(every, has, strict=True) if any_token]
    asked = occur if slots is None else list(dict.fromkeys(slots))
    rest = tuple(slot for slot in occur if slot not in asked)
    return [*((slot,) for slot in asked), *([rest] if rest else [])]


def _where(slots: Sequence[Slot], text: Text) -> Bool[Tensor, "slot pair pos"]:
    """Which tokens of a text each source slot has."""

    def tokens(slot: Slot) -> Bool[Tensor, "pair pos"]:
        if slot is None:
            return text.inside
        if slot == UNALIGNED:
            return text.position < 0
        if isinstance(slot, str):
            return text.slot == (-1 if slot == UNNAMED else text.slots.index(slot))
        return text.position == slot

    found = [tokens(slot) & text.inside for slot in slots]
    return torch.stack(found) if found else text.inside.new_zeros(0, *text.inside.shape)


@dataclass(frozen=True)
class _Sums:
    """Places as sums of lines. A group's lines are its units, of v each unit's slots; `place` and `line` are the terms'
    columns."""

    groups: tuple[Group, ...]
    slots: tuple[Slot, ...]
    place: Int[Tensor, "term"]
    line: Int[Tensor, "term"]
    places: int

    def of(self, lines: Float[Tensor, "line pair"]) -> Float[Tensor, "place pair"]:
        """The places' sums; NaN where a place has no line that is a number."""
        values = lines.new_zeros(self.places, lines.shape[1])
        absent = lines.isnan()
        values = values.index_add(0, self.place, lines.nan_to_num()[self.line])
        if not absent.any():
            return values
        here = torch.zeros_like(values).index_add(0, self.place, (~absent).to(values)[self.line])
        return values.masked_fill(here == 0, float("nan"))


def _sums(places: Sequence[Place], encoder: HookedTextEncoder, batch: Batch) -> _Sums:
    """The places' terms.

    Raises:
        ValueError: no places, or one that can't be attributed to here.
    """
    if not places:
        raise ValueError("no places to attribute to; components(encoder, batch) lists some that sum to the whole")
    sites = [[_site(member) for member in members(place)] for place in places]
    for site in dict.fromkeys(site for line in sites for site in line):
        _check(site, encoder, batch)
    if not all(sites):
        raise ValueError("an empty tuple, or a circuit's outside, has no attribution: name sites or edges into out")
    groups = tuple(dict.fromkeys((site.kind, site.layer) for line in sites for site in line))
    slots = tuple(dict.fromkeys(site.slot for line in sites for site in line if site.kind == "v"))
    ends = list(accumulate(len(_units(kind, encoder)) * (len(slots) if kind == "v" else 1) for kind, _ in groups))
    start = dict(zip(groups, [0, *ends], strict=False))
    number = {slot: number for number, slot in enumerate(slots)}
    terms = [
        (place, start[site.kind, site.layer] + (unit * len(slots) + number[site.slot] if site.kind == "v" else unit))
        for place, line in enumerate(sites)
        for site in line
        for unit in (_units(site.kind, encoder) if site.unit is None else [site.unit])
    ]
    columns = torch.tensor(terms, device=encoder.device)
    return _Sums(groups, slots, columns[:, 0], columns[:, 1], len(places))


def _units(kind: Kind, encoder: HookedTextEncoder) -> range:
    return range(len(list(encoder.units(kind))))


def _site(member: Site | Edge) -> Site:
    """The site whose output is read: an edge into the output has its sender's."""
    if isinstance(member, Site):
        return member
    if member.receiver.kind != "out":
        raise ValueError(
            f"{member} has no direct effect on the metric: only edges into out have; path_effects patches it"
        )
    return member.sender


def _check(site: Site, encoder: HookedTextEncoder, batch: Batch) -> None:
    if site.kind not in ATTRIBUTABLE:
        raise ValueError(
            f"{site} writes nothing into what the output reads; {', '.join(ATTRIBUTABLE)} do, and {SOURCES}"
        )
    depth = 1 if site.kind in NO_LAYER else encoder.n_layers + (site.kind == "resid")
    if site.layer >= depth:
        raise ValueError(f"{site}: {encoder.name} has {site.kind} at layers 0..{depth - 1}")
    if site.unit is not None and site.unit not in encoder.units(site.kind):
        raise ValueError(f"{site}: {encoder.name} has {site.kind} units 0..{len(_units(site.kind, encoder)) - 1}")
    if site.kind != "v" and site.slot is not None:
        raise ValueError(f"{site}: the output reads the pooled position alone, so leave slot=None; {SOURCES}")
    _check_slot(site, batch)


def _check_slot(site: Site, batch: Batch) -> None:
    named = (*batch.slots, UNNAMED, UNALIGNED)
    if isinstance(site.slot, str) and site.slot not in named:
        raise ValueError(f"{site}: {unknown('slot', site.slot, named)}")
    if isinstance(site.slot, int) and site.slot >= batch.tokens.shape[1]:
        raise ValueError(f"{site}: the batch has positions 0..{batch.tokens.shape[1] - 1}")


def _contributions(
    encoder: HookedTextEncoder, text: Text, sums: _Sums
) -> tuple[Float[Tensor, "place pair"], Float[Tensor, "pair"]]:
    """What each place of one text writes, and its metric."""
    tokens, w = encoder.cut(text.tokens), precise(text.direction)
    along, last = reading_vector(encoder, w), stream_name(encoder)
    names = {last}.union(*(_hooks(group, encoder) for group in sums.groups))
    seen = observe(encoder, tokens, names, _attention_readers(encoder, tokens, along, sums.groups))
    std, y = read_out(encoder, seen[last])
    where = _where(sums.slots, text)[..., : tokens.shape[1]]
    run = _Run(encoder, tokens, along, constant_of(encoder, w) * std, seen, where)  # the constant is not divided by std
    lines = torch.cat([run.lines(*group) for group in sums.groups])
    return sums.of(lines / (std * y.norm(dim=-1))), metric_of(y, w)


def _hooks(group: Group, encoder: HookedTextEncoder) -> list[str]:
    """The hooks that a group is read from at the pooled position."""
    kind, layer = group
    return [] if kind in FIXED or kind == "v" else [hook_name(Site(kind, layer), encoder.n_layers)]


def _attention_readers(
    encoder: HookedTextEncoder,
    tokens: Int[Tensor, "pair pos"],
    along: Float[Tensor, "pair d_model"],
    groups: Sequence[Group],
) -> dict[str, Reader]:
    """What source slots need of each layer: how much each key's value writes along, and the pooled query's pattern."""
    rows, at = torch.arange(len(tokens), device=tokens.device), encoder.pool(tokens)
    readers: dict[str, Reader] = {}
    for layer in (layer for kind, layer in groups if kind == "v"):
        readers[_pattern(layer)] = lambda pattern: precise(pattern[rows, :, at])
        readers[_values(layer)] = partial(_per_key, _through_heads(encoder, layer, along))
    return readers


def _per_key(
    along: Float[Tensor, "pair head d_head"], v: Float[Tensor, "pair key head d_head"]
) -> Float[Tensor, "pair head key"]:
    return torch.einsum("pkhe,phe->phk", precise(v), along)


def _pattern(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"


def _values(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_v"


def _through_heads(
    encoder: HookedTextEncoder, layer: int, along: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "pair head d_head"]:
    """What a vector in the residual stream reads in each head's z."""
    return torch.einsum("hed,pd->phe", precise(block_of(encoder, layer).attn.W_O), along)


@dataclass(frozen=True)
class _Run:
    """A text's run, read at the pooled position: what its groups write along a vector, yet to be divided by
    `std * norm`."""

    encoder: HookedTextEncoder
    tokens: Int[Tensor, "pair pos"]
    along: Float[Tensor, "pair d_model"]
    constant: Float[Tensor, "pair"]
    seen: Mapping[str, Tensor]
    where: Bool[Tensor, "slot pair pos"]

    def lines(self, kind: Kind, layer: int) -> Float[Tensor, "line pair"]:
        """One line per unit of the group, of v one per unit and slot."""
        if kind == "v":
            return self.sources(layer)
        if kind in FIXED:
            return self.fixed(kind, layer).unsqueeze(0)
        value = self.seen[hook_name(Site(kind, layer), self.encoder.n_layers)]
        if kind == "head":
            return (value * _through_heads(self.encoder, layer, self.along)).sum(-1).T
        if kind == "neuron":
            return (value * (self.along @ precise(block_of(self.encoder, layer).mlp.W_out).T)).T
        return (value * self.along).sum(-1).unsqueeze(0)

    def fixed(self, kind: Kind, layer: int) -> Float[Tensor, "pair"]:
        """What is known without a run: embeddings, biases and the constant."""
        tower, at = self.encoder.tower, self.encoder.pool(self.tokens)
        if kind == "constant":
            return self.constant
        if kind == "token":
            return (precise(tower.W_E[self.tokens.gather(1, at[:, None])[:, 0]]) * self.along).sum(-1)
        if kind == "position":
            return (precise(tower.W_pos[at]) * self.along).sum(-1)
        block = block_of(self.encoder, layer)
        return self.along @ precise(block.attn.b_O if kind == "attn_bias" else block.mlp.b_out)

    def sources(self, layer: int) -> Float[Tensor, "line pair"]:
        """`A[e, p] * v_p W_O` summed over each slot's positions; NaN where the text does not have the slot."""
        weighed = self.seen[_pattern(layer)] * self.seen[_values(layer)]
        summed = torch.einsum("phk,spk->hsp", weighed, self.where.to(weighed))
        return summed.masked_fill(~self.where.any(-1), float("nan")).flatten(0, 1)
