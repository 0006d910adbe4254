"""`direct_effects`: how much of the metric each part of the tower writes. `logit_lens`: the metric read early.

Nothing is patched. With the final LayerNorm's standard deviation and the embedding's norm frozen at each text's own
values, what is left between the residual stream and the metric is linear, and one vector per text reads it:

    C(a) = <a, reader> / (std * norm),    reader = centred(gamma * (W_U @ w))

for whatever `a` a component writes at the pooled position. The constant `<W_U^T beta + b_U, w> / norm` is a component
too, and the components add up to the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.precision import precise
from clip_lens.core.record import Record, SourceRecord
from clip_lens.core.setting import Setting, over_pairs
from clip_lens.core.source import counterpart
from clip_lens.data.batch import Batch
from clip_lens.methods.registry import DIRECT, LENS
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import NO_LAYER, Edge, Kind, Place, Site, hook_name, members
from clip_lens.progress import progress_bar

By = Literal["head", "neuron", "source", "layer", "sublayer"]
Norms = Literal["frozen", "recomputed"]
Slot: TypeAlias = str | int | None
Group: TypeAlias = tuple[Kind, int]
"""A kind in one layer, whose lines are read together."""
Reader: TypeAlias = Callable[[Tensor], Tensor]

UNNAMED = "unnamed"
"""The source slot of the tokens that are in none of the batch's named slots (a bidirectional tower's padding too)."""
UNALIGNED = "unaligned"
"""The source slot, among raw positions, of the other text's tokens that match no token of the run."""
SOURCES = "what a head reads from a source slot is Site('v', layer, head, slot=...)"
STREAMS: tuple[Kind, ...] = ("embed", "resid", "mid", "attn", "mlp")
FIXED: tuple[Kind, ...] = ("token", "position", "attn_bias", "mlp_bias", "constant")
READABLE: tuple[Kind, ...] = (*FIXED, *STREAMS, "head", "v", "neuron")

PAIRS_AT_ONCE = 256
HELD = 2**25
"""Numbers that one chunk of pairs may hold at a time: 256 MB in float64."""
FROZEN = "each text's own std of the final LayerNorm and norm of its embedding, frozen"
NORMS = {
    "frozen": FROZEN,
    "recomputed": "std of the final LayerNorm and norm of the embedding recomputed at each layer",
}


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
        unnamed = sum(int((text.slot < 0)[text.inside].sum()) for text in _both(batch))
        record = record.saying(**{"source tokens in no named slot": unnamed})
    return _attributed(setting, places, read, contrast, record)


def direct_record(setting: Setting, contrast: bool = True) -> Record:
    """The record of `direct_effects` of places without source slots.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> direct_record(Setting.reading(encoder, batch)).stands_for(direct_effects(encoder, batch).record)
        True
    """
    return _said(setting.record(DIRECT, norms=FROZEN), contrast)


def logit_lens(
    encoder: HookedTextEncoder, batch: Batch, *, norms: Norms = "frozen", contrast: bool = True, progress: bool = True
) -> Effects:
    """The metric as the residual stream before each layer has it already, resid 0..L, in units of the metric.

    The stream at the pooled position is read through the final LayerNorm and the projection (nostalgebraist 2020), the
    constant term included. `norms="frozen"` keeps the run's final std and norm, so that the steps from layer to layer
    are what the layers write, `direct_effects` by layer; "recomputed" reads each layer as if it were the last.
    At L both are the metric. With `contrast` the values are lens(other) - lens(run), with `total` metric(other) -
    metric(run); without it they are lens(run), with `total` metric(run), not oriented.

    Raises:
        ValueError: other norms, or a batch of another width than the encoder's embedding.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> lens = logit_lens(encoder, batch, norms="recomputed")
        >>> lens.values.shape, bool((lens.values[-1] - lens.total).abs().max() < 1e-4)
        (torch.Size([7, 8]), True)
    """
    if norms not in get_args(Norms):
        raise ValueError(f"norms={norms!r}; give one of {', '.join(get_args(Norms))}")
    places = tuple(encoder.sites("resid"))
    setting = Setting.reading(encoder, batch, progress=progress)
    record = lens_record(setting, norms, contrast)
    return _attributed(setting, places, lambda text: _lens(encoder, text, norms), contrast, record)


def lens_record(setting: Setting, norms: Norms = "frozen", contrast: bool = True) -> Record:
    """The record of `logit_lens`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> lens_record(Setting.reading(encoder, batch)).stands_for(logit_lens(encoder, batch).record)
        True
    """
    return _said(setting.record(LENS, norms=NORMS[norms]), contrast)


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
    has = torch.stack([_where(every, text).flatten(1).any(1) for text in _both(batch)]).any(0).tolist()
    occur = [slot for slot, any_token in zip(every, has, strict=True) if any_token]
    asked = occur if slots is None else list(dict.fromkeys(slots))
    rest = tuple(slot for slot in occur if slot not in asked)
    return [*((slot,) for slot in asked), *([rest] if rest else [])]


# Both texts


@dataclass(frozen=True)
class _Text:
    """One of the two texts of each pair: its tokens, their slots, which positions it has, and for each token the run's
    position that it stands for (-1 = none)."""

    tokens: Int[Tensor, "pair pos"]
    slot: Int[Tensor, "pair pos"]
    inside: Bool[Tensor, "pair pos"]
    position: Int[Tensor, "pair pos"]
    direction: Float[Tensor, "pair d_embed"]
    slots: tuple[str, ...]


def _both(batch: Batch) -> tuple[_Text, _Text]:
    """The run and the other text."""
    own, other = torch.arange(batch.tokens.shape[1], device=batch.tokens.device), batch.flip()
    return tuple(  # type: ignore[return-value]
        _Text(text.tokens, text.slot, text.inside, position, text.direction, text.slots)
        for text, position in ((batch, own.expand_as(batch.tokens)), (other, other.origin))
    )


def _where(slots: Sequence[Slot], text: _Text) -> Bool[Tensor, "slot pair pos"]:
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


Read: TypeAlias = Callable[[_Text], tuple[Float[Tensor, "place pair"], Float[Tensor, "pair"]]]


def _attributed(setting: Setting, places: tuple[Place, ...], read: Read, contrast: bool, record: Record) -> Effects:
    """The result of reading both texts of every pair, as many pairs at a time as fit."""
    setting.without_hooks("what is read is taken apart by the tower's own weights")
    encoder, batch = setting.encoder, setting.batch
    bar = progress_bar(len(batch), "pair", "attributing", show=setting.progress)

    def compute(index: Int[Tensor, "pair"]) -> dict[str, Tensor]:
        (own, run), (its, other) = (read(text) for text in _both(batch[index]))
        setting.check_metric(run, index)
        setting.check_metric(other, index)
        bar.update(len(index))
        values = (_difference(its, own) if contrast else own).to(encoder.precision)
        return {"values": values, "metrics": torch.stack([run, other])}

    with torch.inference_mode(), bar:
        found = over_pairs(batch, _at_once(encoder, batch, len(places)), compute)
    values, (baseline, other) = found["values"], found["metrics"]
    pairs = setting.pairs(batch.sigma.cpu() * (other - baseline))
    total = other - baseline if contrast else baseline
    return Effects(values, total.to(values), baseline.to(values), places, pairs, record)


def _at_once(encoder: HookedTextEncoder, batch: Batch, places: int) -> int:
    """How many pairs are read together: the widest activation of one forward, and every neuron's line, must fit."""
    width = max(batch.tokens.shape[1], batch.other.shape[1]) + encoder.n_layers
    held = places + width * encoder.tower.cfg.d_mlp
    return max(1, min(PAIRS_AT_ONCE, HELD // held))


def _said(record: Record, contrast: bool) -> Record:
    """What the values are: of a contrast parts of what lies between the two texts, else of the run's metric, which has
    no side to turn with."""
    if contrast:
        of = "C(other) - C(run), of a total of metric(other) - metric(run)"
        return replace(record.saying(values=of), source=SourceRecord.of(counterpart))
    return replace(
        record.saying(values="C(run), of a total of metric(run)"), metric=replace(record.metric, oriented=False)
    )


def _difference(other: Float[Tensor, "place pair"], run: Float[Tensor, "place pair"]) -> Float[Tensor, "place pair"]:
    """What only one text has counts as 0 in the other; NaN where neither has it."""
    return (other.nan_to_num() - run.nan_to_num()).masked_fill(other.isnan() & run.isnan(), float("nan"))


# One text, read at the pooled position


def observe(
    encoder: HookedTextEncoder,
    tokens: Int[Tensor, "pair pos"],
    names: Iterable[str],
    readers: Mapping[str, Reader] | None = None,
) -> dict[str, Tensor]:
    """What a run has at some hooks at the pooled position, or what `readers` keep of others, in float64.

    `tokens` are cut already. Nothing else is kept, so memory does not grow with the texts' length.

    Example:
        >>> encoder = clip_lens.load()
        >>> seen = observe(encoder, encoder.tokens("There are no circles."), ["blocks.1.hook_mlp_out"])
        >>> seen["blocks.1.hook_mlp_out"].shape
        torch.Size([1, 128])
    """
    rows, at = torch.arange(len(tokens), device=tokens.device), encoder.pool(tokens)
    every = {**dict.fromkeys(names, lambda value: precise(value[rows, at])), **(readers or {})}
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: object) -> None:
        name = hook.name  # type: ignore[attr-defined]
        seen[name] = every[name](value)

    encoder.tower.run_with_hooks(tokens, return_type=None, fwd_hooks=[(name, keep) for name in every])
    return seen


def read_out(
    encoder: HookedTextEncoder, x: Float[Tensor, "*batch d_model"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch d_embed"]]:
    """The final LayerNorm's std of residual streams, and their embeddings before these are normalised.

    Example:
        >>> std, y = read_out(clip_lens.load(), torch.randn(3, 128).double())
        >>> std.shape, y.shape
        (torch.Size([3]), torch.Size([3, 128]))
    """
    norm, tower = encoder.tower.ln_final, encoder.tower
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().mean(-1) + norm.eps).sqrt()
    normed = centred / std.unsqueeze(-1) * precise(norm.w) + precise(norm.b)
    return std, normed @ precise(tower.W_U) + precise(tower.b_U)


def stream_name(encoder: HookedTextEncoder) -> str:
    """The hook of the residual stream that the final LayerNorm reads.

    Example:
        >>> stream_name(clip_lens.load())
        'blocks.5.hook_resid_post'
    """
    return hook_name(Site("resid", encoder.n_layers), encoder.n_layers)


def reading_vector(encoder: HookedTextEncoder, w: Float[Tensor, "pair d_embed"]) -> Float[Tensor, "pair d_model"]:
    """The vector with which a direction reads the residual stream, but for `std * norm`: `centred(gamma * (W_U @ w))`.

    Centring it is what subtracting the mean of whatever it reads comes to.

    Example:
        >>> encoder = clip_lens.load()
        >>> reading_vector(encoder, torch.randn(2, 128)).sum(-1).abs().max() < 1e-4
        tensor(True)
    """
    weighed = precise(encoder.tower.ln_final.w) * (precise(w) @ precise(encoder.tower.W_U).T)
    return weighed - weighed.mean(-1, keepdim=True)


def _metric(y: Float[Tensor, "*batch d_embed"], w: Float[Tensor, "pair d_embed"]) -> Float[Tensor, "*batch"]:
    return (torch.nn.functional.normalize(y, dim=-1) * w).sum(-1)


def _lens(
    encoder: HookedTextEncoder, text: _Text, norms: Norms
) -> tuple[Float[Tensor, "place pair"], Float[Tensor, "pair"]]:
    """The metric from every residual stream of one text, and its metric."""
    names = [hook_name(site, encoder.n_layers) for site in encoder.sites("resid")]
    seen, w = observe(encoder, encoder.cut(text.tokens), names), precise(text.direction)
    stream = torch.stack([seen[name] for name in names])
    std, y = read_out(encoder, stream)
    if norms == "recomputed":
        return _metric(y, w), _metric(y[-1], w)
    values = (stream * reading_vector(encoder, w)).sum(-1) / std[-1] + _constant(encoder, w)
    return values / y[-1].norm(dim=-1), _metric(y[-1], w)


def _constant(encoder: HookedTextEncoder, w: Float[Tensor, "pair d_embed"]) -> Float[Tensor, "pair"]:
    tower = encoder.tower
    return w @ (precise(tower.ln_final.b) @ precise(tower.W_U) + precise(tower.b_U))


# Places as sums of lines


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
    if site.kind not in READABLE:
        raise ValueError(f"{site} writes nothing into what the output reads; {', '.join(READABLE)} do, and {SOURCES}")
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
        raise ValueError(f"{site}: no slot {site.slot!r}; the batch has {', '.join(named)}")
    if isinstance(site.slot, int) and site.slot >= batch.tokens.shape[1]:
        raise ValueError(f"{site}: the batch has positions 0..{batch.tokens.shape[1] - 1}")


def _contributions(
    encoder: HookedTextEncoder, text: _Text, sums: _Sums
) -> tuple[Float[Tensor, "place pair"], Float[Tensor, "pair"]]:
    """What each place of one text writes, and its metric."""
    tokens, w = encoder.cut(text.tokens), precise(text.direction)
    along, last = reading_vector(encoder, w), stream_name(encoder)
    names = {last}.union(*(_hooks(group, encoder) for group in sums.groups))
    seen = observe(encoder, tokens, names, _attention_readers(encoder, tokens, along, sums.groups))
    std, y = read_out(encoder, seen[last])
    where = _where(sums.slots, text)[..., : tokens.shape[1]]
    run = _Run(encoder, tokens, along, _constant(encoder, w) * std, seen, where)  # the constant is not divided by std
    lines = torch.cat([run.lines(*group) for group in sums.groups])
    return sums.of(lines / (std * y.norm(dim=-1))), _metric(y, w)


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


def block_of(encoder: HookedTextEncoder, layer: int) -> Any:
    """A tower's block, whose attention and MLP have HookedTransformer's weights.

    Example:
        >>> block_of(clip_lens.load(), 2).attn.W_O.shape
        torch.Size([4, 32, 128])
    """
    return encoder.tower.blocks[layer]


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
