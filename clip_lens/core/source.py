"""Sources: with what a place is patched, and which source that is.

A source is called once with the encoder and the whole batch and gives a `Fetch`: pairs and hook names in, their
activations out, in the run's positions, NaN = nothing here. A fetch may have an attribute `first`: for each pair the
number of leading positions at which it is known to give what the run has, so that patching there changes nothing; and
`is_run`: what it gives are the activations of a run on other tokens, with its own biases and residual streams; and
`tower`: the encoder whose activations it gives, where that is another one.
A plain function serves as a source; `source` makes a value of it that says what it holds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from clip_lens.core.identity import adopt, identity_of_function
from clip_lens.core.precision import precise
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder
from clip_lens.model.site import Kind, Site, hook_name, layout_at
from clip_lens.words import unknown

Fetch: TypeAlias = Callable[[Int[Tensor, "pair"], Iterable[str]], Cache]
Function: TypeAlias = Callable[[HookedTextEncoder, Batch], Fetch]

How = Literal["add", "remove"]

STEERABLE: tuple[Kind, ...] = ("embed", "resid", "mid", "attn", "mlp")
CHUNK = 256
"""Texts that are run at a time where nothing but one activation of each is kept."""
AT_ONCE = 16
"""Hooks whose activations are kept of so many texts; of more hooks fewer texts are run at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """A function from an encoder and a batch to a `Fetch`, with what it says of itself.

    `holds` is what a closure or a partial holds.
    `swaps`: it gives the other text's own activations, so that the run becomes the other text where everything is
    patched, and effects are shares of what lies between the two.
    """

    function: Function
    name: str = ""
    holds: Any = None
    swaps: bool = False

    def __post_init__(self) -> None:
        own = getattr(self.function, "__name__", type(self.function).__name__)
        object.__setattr__(self, "name", self.name or own)
        adopt(self, self.function)

    def __call__(self, encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        return self.function(encoder, batch)

    @property
    def identity(self) -> str | None:
        """A digest of what it computes and holds, as it is now; None where that can't be told: then no kept result is
        taken for it."""
        return identity_of_function(self.function, self.holds)

    def __repr__(self) -> str:
        return f"Source({self.name})"


def source(function: Function, *, name: str = "", holds: Any = None, swaps: bool = False) -> Source:
    """A source of a function `(encoder, batch) -> fetch`.

    `name` stands in tables and pages. `holds` is what a closure or a partial holds, such as its tensors: with it kept
    results are told apart, without it none is taken for such a function. `swaps`: it gives the other text's own
    activations.

    Example:
        >>> half = source(lambda encoder, batch: zeros(encoder, batch), name="half", holds=0.5)
        >>> half, half.identity == source(lambda encoder, batch: None, holds=0.25).identity
        (Source(half), False)
    """
    if not callable(function):
        raise TypeError(f"a source is a function (encoder, batch) -> fetch. Got {function!r}")
    return Source(function, name, holds, swaps)


def as_source(given: object) -> Source:
    """The source itself, one made of a plain function, or the one of a name: "counterpart", "zeros", "mean".

    Raises:
        ValueError: a name of no source, or of one that has to be told something.
        TypeError: no function, or one that makes sources and was not called.

    Example:
        >>> as_source(counterpart) is counterpart, as_source(zeros).name
        (True, 'zeros')
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, str):
        return as_source(_named(given))
    if given in (resample, noise, steered, other_tower):
        raise TypeError(f"{given.__name__} makes a source: call it, as in resample(0), noise(1.0), other_tower(it)")
    if not callable(given):
        raise TypeError(
            f"source={given!r} is no function; give counterpart, zeros, mean, resample(seed), noise(std) ..."
        )
    return source(given)


TOLD = {
    "resample": "its seed: source=clip_lens.resample(0)",
    "noise": "how much: source=clip_lens.noise(1.0, seed=0), in standard deviations",
    "via": "a place: source=clip_lens.via(place)",
    "steered": "directions: clip_lens.steer(encoder, batch, {place: direction})",
}
"""What has to be said of the sources that a name alone does not make."""


def _named(name: str) -> Source | Function:
    if name in TOLD:
        raise ValueError(f"source={name!r} has to be told {TOLD[name]}")
    named: dict[str, Source | Function] = {"counterpart": counterpart, "zeros": zeros, "mean": mean}
    if name not in named:
        raise ValueError(unknown("source", name, [*named, *TOLD]))
    return named[name]


@dataclass(frozen=True)
class Counterpart:
    """The fetch of `counterpart`."""

    encoder: HookedTextEncoder
    batch: Batch
    is_run = True
    is_other = True
    """What it gives is the run of the other text itself."""

    @property
    def first(self) -> Int[Tensor, "pair"]:
        return self.batch.shared if self.encoder.causal else torch.zeros_like(self.batch.shared)

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        origin = self.batch.origin[pairs]
        cache = self.encoder.cache(self.batch.other[pairs], names=names)
        return {name: _realigned(name, value, origin) for name, value in cache.items()}


def _counterpart(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
    """A source: the activations of each pair's other text, moved to the run's positions (method, section 3).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> fetch = counterpart(encoder, batch)
        >>> fetch(torch.arange(3), ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"].shape[::2]
        torch.Size([3, 128])
    """
    return Counterpart(encoder, batch)


counterpart = Source(_counterpart, "counterpart", swaps=True)


def _realigned(name: str, value: Tensor, origin: Int[Tensor, "pair pos"]) -> Tensor:
    if layout_at(name).query_by_key:
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
    """A source: zero in place of an activation, zero ablation. A head at zero keeps the attention's output bias, an MLP
    at zero loses its own (method, section 9).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"), source=zeros).values.shape
        torch.Size([6, 8])
    """

    def fetch(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        return {name: torch.zeros_like(value) for name, value in _own(encoder, batch, pairs, names).items()}

    return fetch


@overload
def mean(encoder: HookedTextEncoder, batch: Batch) -> Fetch: ...
@overload
def mean(*, over: Batch) -> Source: ...
def mean(
    encoder: HookedTextEncoder | None = None, batch: Batch | None = None, *, over: Batch | None = None
) -> Fetch | Source:
    """A source: the mean of an activation over the run texts of the whole batch, per slot, tokens pooled, the pair
    itself too: mean ablation (method, section 9). Tokens of no slot have a mean of their own, all together.

    `mean(over=batch)` is the source that takes its means over the run texts of that batch, whichever batch is patched:
    a pair or a split reads the means of the whole. Slots that no text of it has are nothing here: NaN.

    Raises:
        ValueError: (from the fetch) patterns have no mean: texts differ in length.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:64], store, encoder)
        >>> places = encoder.sites("mlp")
        >>> whole = clip_lens.patch_effects(encoder, batch, places, source=mean).values[:, :1]
        >>> one = clip_lens.patch_effects(encoder, batch[:1], places, source=mean(over=batch)).values
        >>> torch.allclose(one, whole, atol=1e-4)
        True
    """
    if over is not None:
        whole = over
        return source(
            lambda encoder, patched: MeanOver(Mean(encoder, whole), patched),
            name=f"mean over {len(whole)} texts of {whole.pairs.name}",
            holds=(whole.tokens, whole.length, whole.slot, whole.slots),
        )
    if encoder is None or batch is None:
        raise TypeError("give mean as it is, source=mean, or with the batch to average over: mean(over=batch)")
    return Mean(encoder, batch)


@dataclass(frozen=True)
class Mean:
    """The fetch of `mean`; each hook's means are computed when it is first asked for."""

    encoder: HookedTextEncoder
    batch: Batch
    known: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        names = set(names)
        if patterns := sorted(name for name in names if layout_at(name).query_by_key):
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
        counts = precise(torch.zeros(len(self.batch.slots) + 1, device=self.encoder.device))
        first, times = _distinct(self.batch)
        texts = self.batch[first]
        for index in texts.chunks(max(1, CHUNK // (1 + len(names) // AT_ONCE))):
            own = _own(self.encoder, texts, index, names)
            width = next(iter(own.values())).shape[1]
            inside = texts.inside[index][:, :width]
            slot = texts.slot[index][:, :width][inside] % len(counts)
            weight = times[index][:, None].expand_as(inside)[inside].to(counts.dtype)
            counts.index_add_(0, slot, weight)
            for name, value in own.items():
                empty = counts.new_zeros(len(counts), *value.shape[2:])
                weighed = value[inside].to(counts.dtype) * weight.reshape(-1, *[1] * (value.ndim - 2))
                sums[name] = sums.get(name, empty).index_add(0, slot, weighed)
        means = {name: total / counts.reshape(-1, *[1] * (total.ndim - 1)) for name, total in sums.items()}
        return {name: value.to(self.encoder.dtype) for name, value in means.items()}


def _distinct(batch: Batch) -> tuple[Int[Tensor, "text"], Int[Tensor, "text"]]:
    """Which pairs have the different run texts, slots and all, one pair each, and how many pairs have that text."""
    texts = torch.cat([batch.tokens, batch.slot, batch.length[:, None]], 1)
    _, number, times = texts.unique(dim=0, return_inverse=True, return_counts=True)
    pair = torch.arange(len(batch), device=number.device)
    return torch.zeros_like(times).scatter_reduce(0, number, pair, "amin", include_self=False), times


@dataclass(frozen=True)
class MeanOver:
    """The fetch of `mean(over=)`: the means of `whole`, at the slots of another batch."""

    whole: Mean
    batch: Batch

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        names = set(names)
        self.whole(torch.arange(1, device=pairs.device), names)  # computes the means that are not known yet
        known = {name: self._at_slots(self.whole.known[name]) for name in names}
        return replace(self.whole, batch=self.batch, known=known)(pairs, names)

    def _at_slots(self, means: Shaped[Tensor, "slot ..."]) -> Shaped[Tensor, "slot ..."]:
        """Means at the slots of the other batch, which may count them otherwise: NaN where the whole has no such
        slot."""
        number = {name: at for at, name in enumerate(self.whole.batch.slots)}
        missing = len(means)
        lines = torch.tensor([number.get(name, missing) for name in self.batch.slots] + [missing - 1])
        return torch.cat([means, torch.full_like(means[:1], torch.nan)])[lines.to(means.device)]


def resample(seed: int = 0) -> Source:
    """A source: the activations of another pair's run text with the same slot structure, drawn once per batch
    (resample ablation; method, section 9). A pair without such a partner has no effect there: NaN, and counted.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:64], store, encoder)
        >>> clip_lens.patch_effects(encoder, batch, encoder.sites("attn"), source=resample(1)).record.source.name
        'resample(1)'
    """

    def resampled(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
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

    return source(resampled, name=f"resample({seed})", holds=seed)


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

    def noisy(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        def fetch(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
            own = _own(encoder, batch, pairs, names)
            return {name: _noisy(name, value, batch, pairs, std, seed) for name, value in own.items()}

        return fetch

    return source(noisy, name=f"noise({std:g}, seed={seed})", holds=(float(std), seed))


def _noisy(name: str, value: Tensor, batch: Batch, pairs: Int[Tensor, "pair"], std: float, seed: int) -> Tensor:
    result, layout = value.clone(), layout_at(name)
    for row, pair in enumerate(pairs.tolist()):
        length = min(int(batch.length[pair]), value.shape[layout.pos_axis])
        key = hashlib.sha256(f"{seed}|{batch.pairs.key[pair]}|{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        here = (slice(None), slice(length), slice(length)) if layout.query_by_key else (slice(length),)
        own = value[row][here]
        drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own)
        result[row][here] = own + std * own.std(correction=0) * drawn
    return result


def other_tower(other: HookedTextEncoder) -> Source:
    """A source: the activations of the same text, the run's own, in another tower of the same shape: which parts must
    be swapped to get the other model's score?

    A site gives the other tower's activation there. An edge carries what its sender writes in the other tower, by that
    tower's weights, a head with its equal share of the attention's bias (`z W_O + b_O / H`). What reads is the
    encoder's own: every edge swapped is the encoder's final LayerNorm and projection on the other's last residual
    stream, `Site("norm")` swaps that LayerNorm too, `Site("projection")` also the projection. The total is everything
    swapped: the other tower's metric minus the encoder's, along the batch's directions. Circuits swap edges alone, so
    theirs is that of every edge.

    A patched head gives `z`, which the encoder's `W_O` then writes; `Site("result", layer, head)` is what the head
    writes in the other tower. Towers that were trained apart share no basis: swapping one part between them is
    possible, but says little. The identity is the other tower's weights as they are, and what it does with them.

    Raises:
        ValueError: (from the source) a tower that differs in layers, heads, widths, context, vocabulary, pooling or
            tokens, or that has hooks on.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch, other = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder), clip_lens.load()
        >>> other.tower.blocks[1].mlp.b_out[0].add_(1)
        tensor(...)
        >>> places = [Site("attn", 1), Site("mlp", 1), Site("resid", 6)]
        >>> effects = clip_lens.patch_effects(encoder, batch, places, source=other_tower(other))
        >>> [round(share, 4) for share in effects.fraction()["fraction"].iloc[:3].tolist()]
        [0.0, 1.0, 1.0]
    """
    held = _Tower(other)
    return source(held.beside, name=f"tower of {other.full_name}", holds=held, swaps=True)


@dataclass(frozen=True)
class _Tower:
    """What `other_tower` holds."""

    encoder: HookedTextEncoder

    @property
    def identity(self) -> str | None:
        return None if self.encoder.hooked else f"{self.encoder.digest}, {self.encoder.architecture}"

    def beside(self, encoder: HookedTextEncoder, batch: Batch) -> OtherTower:
        """The fetch for a batch of an encoder, refused where the two don't fit each other."""
        _require_alike(encoder, self.encoder, batch)
        if hooks := self.encoder.hooked:
            raise ValueError(
                f"the other tower, {self.encoder.full_name}, has hooks of yours on, at {', '.join(hooks)}; take them "
                "off"
            )
        _warn_of_images(encoder, self.encoder)
        return OtherTower(encoder, batch, self.encoder)


@dataclass(frozen=True)
class OtherTower:
    """The fetch of `other_tower`."""

    encoder: HookedTextEncoder
    batch: Batch
    tower: HookedTextEncoder

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        # The run's own cut: under hooks of the user's that is every position.
        tokens = self.encoder.cut(self.batch.tokens[pairs]).to(self.tower.device)
        _, cache = self.tower.tower.run_with_cache(tokens, names_filter=set(names), return_cache_object=False)
        return {name: value.to(self.encoder.device, self.encoder.dtype) for name, value in cache.items()}


def _require_alike(encoder: HookedTextEncoder, other: HookedTextEncoder, batch: Batch) -> None:
    """Refuses two towers between which an activation has no meaning; says everything in which they differ."""
    here, there = _shape(encoder), _shape(other)
    differ = [f"{name} {here[name]} and {there[name]}" for name in here if here[name] != there[name]]
    if differ:
        raise ValueError(
            f"{encoder.full_name} and {other.full_name} are no towers of one shape: they have {'; '.join(differ)}. "
            "other_tower is for two trainings of one architecture, such as a model and its fine-tune"
        )
    for texts in (batch.pairs.caption, batch.pairs.foil):
        if strange := [text for text, same in zip(texts, _same_tokens(encoder, other, texts), strict=True) if not same]:
            raise ValueError(
                f"the tokenizers of {encoder.full_name} and {other.full_name} read {len(strange)} of {len(texts)} "
                f"texts differently, such as {strange[0][:80]!r}: the same activation would belong to other words"
            )


def _warn_of_images(encoder: HookedTextEncoder, other: HookedTextEncoder) -> None:
    digests = encoder.image_digest, other.image_digest
    if None not in digests and len(set(digests)) == 2:
        warnings.warn(
            f"{other.full_name} has another image tower than {encoder.full_name}: both are judged along the directions "
            "of the batch; batch.along(of_other.direction) judges both along those of a batch aligned for the other",
            stacklevel=2,
        )


def _shape(encoder: HookedTextEncoder) -> dict[str, Any]:
    """What two towers must share for an activation of one to fit into the other."""
    cfg, tower, pool = encoder.tower.cfg, encoder.tower, encoder.pool
    return {
        "layers": cfg.n_layers, "heads": cfg.n_heads, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp,
        "d_embed": encoder.d_embed, "context": cfg.n_ctx, "vocabulary": len(tower.W_E),
        "attention": cfg.attention_dir, "pooling": pool.type if pool.eos_id is None else f"{pool.type} {pool.eos_id}",
    }  # fmt: skip


def _same_tokens(encoder: HookedTextEncoder, other: HookedTextEncoder, texts: Sequence[str]) -> list[bool]:
    """For each text whether both tokenizers read it alike; where one tower has none there is nothing to compare."""
    if encoder.tower.tokenizer is None or other.tower.tokenizer is None:
        return [True] * len(texts)
    return (encoder.raw_tokens(texts) == other.raw_tokens(texts)).all(1).tolist()


def steered(
    directions: Mapping[Site, Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]],
    how: How = "add",
    *,
    origin: Mapping[Site, Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]] | None = None,
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

    def changed(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        return Steered(
            encoder, batch, _by_hook(directions, encoder, batch), how, _by_hook(origin or {}, encoder, batch)
        )

    name = f"steered({how} {', '.join(map(str, directions))})"
    return source(changed, name=name, holds=(how, dict(directions), dict(origin or {})))


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
        origin = self.origin[name][pairs] if name in self.origin else None
        return _turned(value, self.directions[name][pairs], self.how, origin)


def steered_together(
    sites: Sequence[Site],
    directions: Sequence[Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]],
    how: How = "add",
    *,
    origin: Sequence[Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]] | None = None,
) -> Source:
    """A source: the activations of a run that is steered at every one of the sites, at its slot's positions.

    As `steered`, but the tower runs once with all of it: what is added early has changed what the later sites have
    before theirs is added. Patching the sites together from it is steering them together.

    Raises:
        ValueError: (from the source) as `steered`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> sites = Site("resid", 3, slot="eot"), Site("resid", 4, slot="eot")
        >>> steered_together(sites, [torch.zeros(128)] * 2)
        Source(steered(add resid 3 @eot + resid 4 @eot))
    """

    def changed(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        vectors, origins = (
            [_per_pair(site, vector, encoder, batch) for site, vector in zip(sites, given, strict=True)]
            for given in (directions, origin or [torch.zeros(encoder.tower.cfg.d_model)] * len(sites))
        )

        def fetch(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
            hooks: list[Hook] = [
                (
                    hook_name(site, encoder.n_layers),
                    partial(_at, where=batch.where(site.slot)[pairs], v=v[pairs], how=how, origin=start[pairs]),
                )
                for site, v, start in zip(sites, vectors, origins, strict=True)
            ]
            return encoder.cache(batch.tokens[pairs], hooks, names=names)

        fetch.is_run = True  # type: ignore[attr-defined]
        return fetch

    name = f"steered({how} {' + '.join(map(str, sites))})"
    return source(changed, name=name, holds=(how, tuple(sites), tuple(directions), tuple(origin or ())))


def _at(
    value: Float[Tensor, "pair pos d_model"],
    hook: object,
    *,
    where: Bool[Tensor, "pair pos"],
    v: Float[Tensor, "pair d_model"],
    how: How,
    origin: Float[Tensor, "pair d_model"],
) -> Float[Tensor, "pair pos d_model"]:
    return torch.where(where[:, : value.shape[1], None], _turned(value, v, how, origin), value)


def _turned(
    value: Float[Tensor, "pair pos d_model"],
    v: Float[Tensor, "pair d_model"],
    how: How,
    origin: Float[Tensor, "pair d_model"] | None,
) -> Float[Tensor, "pair pos d_model"]:
    """`steered`'s equation."""
    if how == "add":
        return value + v.unsqueeze(1)
    unit = torch.nn.functional.normalize(v, dim=-1).unsqueeze(1)
    start = 0.0 if origin is None else origin.unsqueeze(1)
    return value - ((value - start) * unit).sum(-1, keepdim=True) * unit


def _by_hook(
    vectors: Mapping[Site, Tensor], encoder: HookedTextEncoder, batch: Batch
) -> dict[str, Float[Tensor, "pair d_model"]]:
    """Vectors by the hook that they are for, one line per pair."""
    found: dict[str, Tensor] = {}
    for site, vector in vectors.items():
        expanded, name = _per_pair(site, vector, encoder, batch), hook_name(site, encoder.n_layers)
        if name in found:
            raise ValueError(
                f"two directions for the activation of {site}: steer its slots one after the other, or together in a "
                "tuple of sites (clip_lens.steer)"
            )
        found[name] = expanded
    return found


def _per_pair(site: Site, vector: Tensor, encoder: HookedTextEncoder, batch: Batch) -> Float[Tensor, "pair d_model"]:
    """A direction at a site, one line per pair, after what can be refused."""
    shape = (len(batch), encoder.tower.cfg.d_model)
    if site.kind not in STEERABLE:
        raise ValueError(f"{site} can't be steered by a direction of the stream; {', '.join(STEERABLE)} can")
    if vector.shape not in (shape, shape[1:]):
        raise ValueError(f"the direction at {site} has shape {tuple(vector.shape)}; give {shape[1:]} or {shape}")
    if not vector.isfinite().all():
        raise ValueError(f"the direction at {site} has components that are not finite")
    return vector.to(encoder.device, encoder.dtype).expand(shape)


def _own(encoder: HookedTextEncoder, batch: Batch, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
    """The unpatched run's activations."""
    return encoder.cache(batch.tokens[pairs], names=names)


def _resized(name: str, value: Tensor, width: int) -> Tensor:
    """An activation cut or padded with NaN to `width` positions."""
    if layout_at(name).query_by_key:
        value = _padded(_padded(value, 3, width).nan_to_num(0.0), 2, width)
        return value
    return _padded(value, 1, width)


def _padded(value: Tensor, axis: int, width: int) -> Tensor:
    if value.shape[axis] >= width:
        return value.narrow(axis, 0, width)
    shape = list(value.shape)
    shape[axis] = width - value.shape[axis]
    return torch.cat([value, value.new_full(shape, float("nan"))], axis)
