"""Sources: with what a place is patched. A source is a function; anything with this signature serves.

A source is called once with the encoder and the whole batch and gives a `Fetch`: pairs and hook names in, their
activations out, in the run's positions, NaN = nothing here. A fetch may have an attribute `first`: for each pair the
number of leading positions at which it is known to give what the run has, so that patching there changes nothing; and
`is_run`: what it gives are the activations of a run on other tokens, with its own biases and residual streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, HookedTextEncoder
from clip_lens.model.site import Kind, Site, hook_name

Fetch: TypeAlias = Callable[[Int[Tensor, "pair"], Iterable[str]], Cache]
Source: TypeAlias = Callable[[HookedTextEncoder, Batch], Fetch]

How = Literal["add", "remove"]

QUERY_BY_KEY = ("hook_pattern", "hook_attn_scores")
STEERABLE: tuple[Kind, ...] = ("embed", "resid", "mid", "attn", "mlp")
CHUNK = 256


@dataclass(frozen=True)
class Counterpart:
    """The fetch of `counterpart`."""

    encoder: HookedTextEncoder
    batch: Batch
    is_run = True

    @property
    def first(self) -> Int[Tensor, "pair"]:
        return self.batch.shared if self.encoder.causal else torch.zeros_like(self.batch.shared)

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        origin = self.batch.origin[pairs]
        cache = self.encoder.cache(self.batch.other[pairs], names=names)
        return {name: _realigned(name, value, origin) for name, value in cache.items()}


def counterpart(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
    """The activations of each pair's other text, moved to the run's positions (method, section 3).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> fetch = counterpart(encoder, batch)
        >>> fetch(torch.arange(3), ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"].shape[::2]
        torch.Size([3, 128])
    """
    return Counterpart(encoder, batch)


def _realigned(name: str, value: Tensor, origin: Int[Tensor, "pair pos"]) -> Tensor:
    if name.endswith(QUERY_BY_KEY):
        return _realigned_pattern(value, origin)
    origin = torch.where(origin < value.shape[1], origin, -1)
    rows = torch.arange(len(value), device=value.device)[:, None]
    moved = value[rows, origin.clamp(min=0)]
    missing = (origin < 0).reshape(*origin.shape, *[1] * (value.ndim - 2))
    return moved.masked_fill(missing, float("nan"))


def _realigned_pattern(
    value: Float[Tensor, "pair head query key"], origin: Int[Tensor, "pair pos"]
) -> Float[Tensor, "pair head pos pos"]:
    """Queries without counterpart are NaN, keys without counterpart get weight 0, nothing is renormalised."""
    origin = torch.where(origin < value.shape[2], origin, -1)
    rows = torch.arange(len(value), device=value.device)[:, None, None]
    safe = origin.clamp(min=0)
    moved = value.permute(0, 2, 3, 1)[rows, safe[:, :, None], safe[:, None, :]].permute(0, 3, 1, 2)
    moved = moved.masked_fill((origin < 0)[:, None, None, :], 0.0)
    return moved.masked_fill((origin < 0)[:, None, :, None], float("nan"))


def zeros(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
    """Zero in place of an activation: zero ablation. A head at zero keeps the attention's output bias, an MLP at zero
    loses its own (method, section 9).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"), source=zeros).values.shape
        torch.Size([6, 8])
    """

    def fetch(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        return {name: torch.zeros_like(value) for name, value in _own(encoder, batch, pairs, names).items()}

    return fetch


def mean(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
    """The mean of an activation over the run texts of the whole batch, per slot, tokens pooled, the pair itself too:
    mean ablation (method, section 9). Tokens of no slot have a mean of their own, all together.

    Raises:
        ValueError: (from the fetch) patterns have no mean: texts differ in length.
    """
    return Mean(encoder, batch)


@dataclass(frozen=True)
class Mean:
    """The fetch of `mean`; each hook's means are computed when it is first asked for."""

    encoder: HookedTextEncoder
    batch: Batch
    known: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        names = set(names)
        if patterns := sorted(name for name in names if name.endswith(QUERY_BY_KEY)):
            raise ValueError(
                f"the mean of {', '.join(patterns)} is not defined: texts differ in length; ablate z instead"
            )
        if missing := names - set(self.known):
            self.known.update(self._means(missing))
        slot = self.encoder.cut(self.batch.tokens[pairs])
        slot = self.batch.slot[pairs][:, : slot.shape[1]]
        return {name: self.known[name][slot] for name in names}

    def _means(self, names: set[str]) -> dict[str, Shaped[Tensor, "slot ..."]]:
        """Means by slot; the last line is that of no slot, which the index -1 finds."""
        sums: dict[str, Tensor] = {}
        counts = torch.zeros(len(self.batch.slots) + 1, dtype=self.encoder.dtype, device=self.encoder.device)
        for index in torch.arange(len(self.batch), device=self.encoder.device).split(CHUNK):
            own = _own(self.encoder, self.batch, index, names)
            width = next(iter(own.values())).shape[1]
            inside = self.batch.inside[index][:, :width]
            slot = self.batch.slot[index][:, :width][inside] % len(counts)
            counts.index_add_(0, slot, torch.ones_like(slot, dtype=counts.dtype))
            for name, value in own.items():
                empty = value.new_zeros(len(counts), *value.shape[2:])
                sums[name] = sums.get(name, empty).index_add(0, slot, value[inside])
        return {name: total / counts.reshape(-1, *[1] * (total.ndim - 1)) for name, total in sums.items()}


def mean_over(batch: Batch) -> Source:
    """A source: `mean`, with the means taken over the run texts of this batch, whichever batch is patched: a pair or a
    split reads the means of the whole. Slots that no text of the batch has are nothing here: NaN.

    Raises:
        ValueError: (from the fetch) patterns have no mean: texts differ in length.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:64], store, encoder)
        >>> places = encoder.sites("mlp")
        >>> whole = clip_lens.patch_effects(encoder, batch, places, source=clip_lens.mean).values[:, :1]
        >>> one = clip_lens.patch_effects(encoder, batch[:1], places, source=mean_over(batch)).values
        >>> torch.allclose(one, whole, atol=1e-4)
        True
    """

    def source(encoder: HookedTextEncoder, patched: Batch) -> Fetch:
        return MeanOver(Mean(encoder, batch), patched)

    return named(source, f"mean_over({batch!r})")


@dataclass(frozen=True)
class MeanOver:
    """The fetch of `mean_over`: the means of `whole`, at the slots of another batch."""

    whole: Mean
    batch: Batch

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        names = set(names)
        self.whole(torch.arange(1, device=pairs.device), names)  # computes the means that are not known yet
        return replace(self.whole, batch=self.batch)(pairs, names)


def resample(seed: int = 0) -> Source:
    """A source: the activations of another pair's run text with the same slot structure, drawn once per batch
    (resample ablation; method, section 9). A pair without such a partner has no effect there: NaN, and counted.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:64], store, encoder)
        >>> clip_lens.patch_effects(encoder, batch, encoder.sites("attn"), source=resample(1)).meta["source"]
        'resample(1)'
    """

    def source(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        partner = _partners(batch, seed)

        def fetch(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
            others = partner[pairs]
            width = encoder.cut(batch.tokens[pairs]).shape[1]
            cache = _own(encoder, batch, others.clamp(min=0), names)
            missing = others < 0
            return {
                name: _resized(name, value, width).masked_fill(
                    missing.reshape(-1, *[1] * (value.ndim - 1)), float("nan")
                )
                for name, value in cache.items()
            }

        return fetch

    return named(source, f"resample({seed})")


def _partners(batch: Batch, seed: int) -> Int[Tensor, "pair"]:
    """For each pair another one whose run has the same slots at the same positions, -1 = there is none."""
    structure = torch.where(batch.inside, batch.slot, -2)
    _, group = structure.unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    partner = torch.full((len(batch),), -1)
    for number in group.unique().tolist():
        rows = (group == number).nonzero().flatten().cpu()
        if len(rows) > 1:
            order = rows[torch.randperm(len(rows), generator=generator)]
            partner[order] = order.roll(1)
    return partner.to(batch.tokens.device)


def noise(std: float, seed: int = 0) -> Source:
    """A source: the run's own activation plus `std` times its standard deviation (over the pair's positions and
    components) times N(0, 1), drawn per (seed, pair key, hook), so that chunks and order change nothing (method, 9).

    Raises:
        ValueError: `std` is negative or not finite.
    """
    if not 0 <= std < float("inf"):
        raise ValueError(f"std={std}: noise has a finite standard deviation of 0 or more")

    def source(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        def fetch(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
            own = _own(encoder, batch, pairs, names)
            return {name: _noisy(name, value, batch, pairs, std, seed) for name, value in own.items()}

        return fetch

    return named(source, f"noise({std:g}, seed={seed})")


def _noisy(name: str, value: Tensor, batch: Batch, pairs: Int[Tensor, "pair"], std: float, seed: int) -> Tensor:
    result = value.clone()
    for row, pair in enumerate(pairs.tolist()):
        length = min(int(batch.length[pair]), value.shape[-2 if name.endswith(QUERY_BY_KEY) else 1])
        key = hashlib.sha256(f"{seed}|{batch.pairs.key[pair]}|{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        here = (slice(None), slice(length), slice(length)) if name.endswith(QUERY_BY_KEY) else (slice(length),)
        own = value[row][here]
        drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own)
        result[row][here] = own + std * own.std(correction=0) * drawn
    return result


def steered(
    directions: Mapping[Site, Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]],
    how: How = "add",
    *,
    origin: Mapping[Site, Float[Tensor, "d_model"]] | None = None,
) -> Source:
    """A source: the run's own activations with a direction added or removed at some sites, as they are elsewhere.

    `how="add"`: `x + v`. `how="remove"`: `x - <x - o, v/|v|> v/|v|`, the projection onto the plane through `origin` o
    (0 where it names none) that has no component along v; a direction of 0 removes nothing. One direction for all pairs
    or one each. The place that is patched says at which positions, a site's slot is not read here. The total is what
    the last residual stream gives: 0 unless that one is steered.

    Raises:
        ValueError: an unknown `how`, an `origin` for what is added; (from the source) a site whose activation is not
            d_model wide, two sites of one activation, a direction of another shape or one that is not finite.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch, site = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder), Site("resid", 3, slot="eot")
        >>> source = steered({site: torch.zeros(128)})
        >>> clip_lens.patch_effects(encoder, batch, [site], source=source).values.abs().max() < 1e-5
        tensor(True)
    """
    if how not in get_args(How):
        raise ValueError(f"how={how!r}; give one of {', '.join(get_args(How))}")
    if origin and how == "add":
        raise ValueError("an origin says what a direction is removed from; leave it out where one is added")

    def source(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        return Steered(
            encoder, batch, _by_hook(directions, encoder, batch), how, _by_hook(origin or {}, encoder, batch)
        )

    return named(source, f"steered({how} {', '.join(map(str, directions))})")


@dataclass(frozen=True)
class Steered:
    """The fetch of `steered`."""

    encoder: HookedTextEncoder
    batch: Batch
    directions: Mapping[str, Float[Tensor, "pair d_model"]]
    how: How
    origin: Mapping[str, Float[Tensor, "pair d_model"]]
    is_run = True

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        own = _own(self.encoder, self.batch, pairs, names)
        return {name: self._changed(name, value, pairs) for name, value in own.items()}

    def _changed(self, name: str, value: Tensor, pairs: Int[Tensor, "pair"]) -> Tensor:
        if name not in self.directions:
            return value
        v = self.directions[name][pairs].unsqueeze(1)
        if self.how == "add":
            return value + v
        unit = torch.nn.functional.normalize(v, dim=-1)
        origin = self.origin[name][pairs].unsqueeze(1) if name in self.origin else torch.zeros_like(v)
        return value - ((value - origin) * unit).sum(-1, keepdim=True) * unit


def _by_hook(
    vectors: Mapping[Site, Tensor], encoder: HookedTextEncoder, batch: Batch
) -> dict[str, Float[Tensor, "pair d_model"]]:
    """Vectors by the hook that they are for, one line per pair."""
    found: dict[str, Tensor] = {}
    shape = (len(batch), encoder.tower.cfg.d_model)
    for site, vector in vectors.items():
        if site.kind not in STEERABLE:
            raise ValueError(f"{site} can't be steered by a direction of the stream; {', '.join(STEERABLE)} can")
        if vector.shape not in (shape, shape[1:]):
            raise ValueError(f"the direction at {site} has shape {tuple(vector.shape)}; give {shape[1:]} or {shape}")
        if not vector.isfinite().all():
            raise ValueError(f"the direction at {site} has components that are not finite")
        name = hook_name(site, encoder.n_layers)
        if name in found:
            raise ValueError(f"two directions for the activation of {site}: steer its slots one after the other")
        found[name] = vector.to(encoder.device, encoder.dtype).expand(shape)
    return found


def named(source: Source, name: str) -> Source:
    """The source with the name that results record."""
    source.__name__ = name
    return source


def _own(encoder: HookedTextEncoder, batch: Batch, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
    """The unpatched run's activations."""
    return encoder.cache(batch.tokens[pairs], names=names)


def _resized(name: str, value: Tensor, width: int) -> Tensor:
    """An activation cut or padded with NaN to `width` positions."""
    if name.endswith(QUERY_BY_KEY):
        value = _padded(_padded(value, 3, width).nan_to_num(0.0), 2, width)
        return value
    return _padded(value, 1, width)


def _padded(value: Tensor, axis: int, width: int) -> Tensor:
    if value.shape[axis] >= width:
        return value.narrow(axis, 0, width)
    shape = list(value.shape)
    shape[axis] = width - value.shape[axis]
    return torch.cat([value, value.new_full(shape, float("nan"))], axis)
