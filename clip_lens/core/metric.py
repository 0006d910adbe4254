"""Metrics: a text embedding, or an activation -> one number per row, and what a reader of that number must know.

A metric says itself whether its sign turns with the side (*oriented*), in which unit it is, and which one it is: a
digest of what it holds. `metric` makes one of a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.core.identity import adopt, identity_of_function
from clip_lens.core.target import Slot, Target
from clip_lens.data.batch import Batch
from clip_lens.model.site import BEHIND, LAYOUTS, Site
from clip_lens.words import unknown


@dataclass(frozen=True)
class Readout:
    """What a metric may compare a row's embedding with: the direction, and the unpatched run's and the other's unit
    embeddings, one line per pair."""

    direction: Float[Tensor, "row d_embed"]
    run: Float[Tensor, "row d_embed"]
    other: Float[Tensor, "row d_embed"]

    def rows(self, pairs: Int[Tensor, "row"]) -> Readout:
        """The readout of some pairs, one line per row."""
        return Readout(self.direction[pairs], self.run[pairs], self.other[pairs])

    @classmethod
    def of(
        cls,
        batch: Batch,
        run: Float[Tensor, "row d_embed"],
        other: Float[Tensor, "row d_embed"],
    ) -> Readout:
        """The readout of a batch's pairs, of these embeddings."""
        return cls(batch.direction, run, other) if batch.has_direction else TextsOnly(run, other)


class TextsOnly(Readout):
    """The readout of pairs without an image: whatever asks for the direction is refused.

    Example:
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> cosine(u, TextsOnly(u, u))
        tensor([1.])
    """

    def __init__(self, run: Float[Tensor, "row d_embed"], other: Float[Tensor, "row d_embed"]):
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "other", other)

    @property
    def direction(self) -> Float[Tensor, "row d_embed"]:
        raise ValueError(NO_DIRECTION)

    def rows(self, pairs: Int[Tensor, "row"]) -> Readout:
        return TextsOnly(self.run[pairs], self.other[pairs])


NO_DIRECTION = (
    "this needs the direction of an image, and these pairs are texts alone: align them with a store of images, give a "
    "direction (batch.along(w)), or take what needs none (metric=cosine, attention_effects, patterns, probe)"
)


Function: TypeAlias = Callable[[Float[Tensor, "row n"], Readout], Float[Tensor, "row"]]


@dataclass(frozen=True, eq=False, repr=False)
class Metric:
    """A function from embeddings to one number per row, with what it says of itself.

    `oriented`: its sign turns with the side. What it says of a run that is the caption counts against d, and averages
    over pairs of both sides take `sigma * value` (method, section 1), as for the logit. Not oriented is what grows on
    both sides the more a patch moves, such as the cosine with the other text. `divergence`: it says how far a row is
    from the unpatched run, where it is 0 and smallest, so that a change for the better is none. `holds` is what a
    closure or a partial holds. `target`: the activation that it reads in place of the unit embedding.

    Raises:
        ValueError: a divergence that is oriented.
    """

    function: Function
    oriented: bool
    unit: str = "metric units"
    name: str = ""
    holds: Any = None
    divergence: bool = False
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.divergence and self.oriented:
            raise ValueError("a divergence grows on both sides the more is moved: give it with oriented=False")
        own = getattr(self.function, "__name__", type(self.function).__name__)
        object.__setattr__(self, "name", self.name or own)
        adopt(self, self.function)

    def __call__(self, u: Float[Tensor, "row n"], readout: Readout) -> Float[Tensor, "row"]:
        return self.function(u, readout)

    @property
    def identity(self) -> str | None:
        """A digest of what it computes and holds, as it is now; None where that can't be told: then no kept result is
        taken for it."""
        return identity_of_function(self.function, self.holds)

    def __repr__(self) -> str:
        return f"Metric({self.name}, {'' if self.oriented else 'not '}oriented, in {self.unit})"


@overload
def metric(
    function: Function, *, oriented: bool, unit: str = ..., name: str = ..., holds: Any = ..., divergence: bool = ...
) -> Metric: ...
@overload
def metric(
    function: None = None,
    *,
    oriented: bool,
    unit: str = ...,
    name: str = ...,
    holds: Any = ...,
    divergence: bool = ...,
) -> Callable[[Function], Metric]: ...
def metric(
    function: Function | None = None,
    *,
    oriented: bool,
    unit: str = "metric units",
    name: str = "",
    holds: Any = None,
    divergence: bool = False,
) -> Metric | Callable[[Function], Metric]:
    """A metric of a function `(u, readout) -> one number per row`, by call or as a decorator.

    `oriented=True` where its sign turns with the side, as the logit's; False where it grows on both sides the more
    is moved, as the cosine with the other text does (method, section 8). `unit` and `name` stand in tables and pages.
    `holds` is what a closure or a partial holds, such as its tensors: with it kept results are told apart, without it
    none is taken for such a function. `divergence=True` where it is the distance from the unpatched run, 0 there and
    larger elsewhere, as `kl` is: then `acdc` minds increases alone.

    Example:
        >>> import torch
        >>> @metric(oriented=False, unit="cosine")
        ... def to_the_run(u, readout):
        ...     return (u * readout.run).sum(-1)
        >>> to_the_run
        Metric(to_the_run, not oriented, in cosine)
    """
    if function is None:
        how: dict[str, Any] = {"unit": unit, "name": name, "holds": holds, "divergence": divergence}
        return lambda given: metric(given, oriented=oriented, **how)
    if not callable(function):
        raise TypeError(f"a metric is a function (u, readout) -> one number per row. Got {function!r}")
    return Metric(function, oriented, unit, name, holds, divergence)


def as_metric(given: object) -> Metric:
    """The metric itself, or the one of a name, "logit" or "cosine"; a plain function is asked for its orientation.

    Raises:
        ValueError: a name of no metric, or of one that has to be told something.
        TypeError: no metric.

    Example:
        >>> as_metric(logit) is as_metric("logit") is logit
        True
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return _named(given)
    if not callable(given):
        raise TypeError(f"metric={given!r} is no function; give clip_lens.logit, clip_lens.cosine or one of your own")
    name = getattr(given, "__name__", repr(given))
    raise TypeError(
        f"the metric {name} does not say whether its sign turns with the side, which decides how pairs are averaged; "
        "say it once: clip_lens.metric(function, oriented=True) for one like the logit, oriented=False for one "
        "that grows on both sides the more is moved, like the cosine with the other text"
    )


def _named(name: str) -> Metric:
    named = {"logit": logit, "cosine": cosine}
    if name == "kl":
        raise ValueError("metric='kl' has to be told a bank of texts: metric=clip_lens.kl(encoder(texts))")
    if name not in named:
        raise ValueError(unknown("metric", name, [*named, "kl"]))
    return named[name]


@metric(oriented=True, unit="logits")
def logit(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
    """`<u, w>` in CLIP logits, with `w = scale * v_image` unless the batch was turned along another direction
    (method, section 1).

    Example:
        >>> import torch
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> logit(u, Readout(direction=torch.tensor([[100.0, 0.0]]), run=u, other=u))
        tensor([60.0000])
    """
    return (u * readout.direction).sum(-1)


@metric(oriented=False, unit="cosine")
def cosine(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
    """The cosine with the counterpart's embedding: 1 where the patch turned the run into the other text. Not oriented.

    Example:
        >>> import torch
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> cosine(u, Readout(direction=u, run=u, other=torch.tensor([[1.0, 0.0]])))
        tensor([0.6000])
    """
    return (u * readout.other).sum(-1)


TIE = 1e-6
"""Cosines closer than this are the same: rounding would else decide which of two equal texts comes first."""


def rank(bank: Float[Tensor, "entry d_embed"], *, of: Literal["texts", "images"] = "texts") -> Metric:
    """A metric: how many of a bank the text, or its image, comes before; `len(bank)` means that it ranks first.

    `of="texts"`: the bank has the unit embeddings of texts, and counted are those that fit the pair's image less than
    this text does. `of="images"`: those of images, and counted are those that this text fits less than its own image.
    A tie (within 1e-6 in cosine) counts for the bank, so that a bank may have the text or the image itself. Oriented:
    more is better, as for the logit. It is a step function: most small patches move it by nothing, and what needs a
    gradient (`gradient_effects`, `discover` by eap or eap-ig) refuses it.

    Raises:
        ValueError: the bank is empty, its embeddings are not unit vectors, or an unknown `of`.

    Example:
        >>> import torch
        >>> u, w = torch.tensor([[0.6, 0.8]]), torch.tensor([[100.0, 0.0]])
        >>> rank(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))(u, Readout(direction=w, run=u, other=u))
        tensor([1.])
    """
    if of not in ("texts", "images"):
        raise ValueError(f"of={of!r}; a bank is one of texts or of images")
    bank = _bank(bank)

    def places(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
        w = torch.nn.functional.normalize(readout.direction, dim=-1)
        others = (w if of == "texts" else u) @ bank.to(u).T
        return ((u * w).sum(-1, keepdim=True) - others > TIE).sum(-1).to(u.dtype)

    name = f"rank among {len(bank)} {of}"
    return metric(places, oriented=True, unit="places", name=name, holds=(bank, of))


def _bank(bank: Float[Tensor, "entry d_embed"]) -> Float[Tensor, "entry d_embed"]:
    if bank.ndim != 2 or len(bank) == 0 or not torch.allclose(bank.norm(dim=-1), bank.new_ones(len(bank)), atol=1e-3):
        raise ValueError(f"a bank has the unit embeddings of texts as rows; got a tensor of shape {tuple(bank.shape)}")
    return bank.detach().clone()


def kl(bank: Float[Tensor, "text d_embed"]) -> Metric:
    """A metric: `KL(P_run || P_patched)` in nats, with P the softmax of the logits along the direction over this text
    and a bank of candidate texts (their unit embeddings), image fixed (method, section 1). 0 for the unpatched run, and
    not oriented.

    Raises:
        ValueError: the bank is empty, or its embeddings are not unit vectors.

    Example:
        >>> import torch
        >>> u, w = torch.tensor([[0.6, 0.8]]), torch.tensor([[100.0, 0.0]])
        >>> kl(torch.tensor([[0.0, 1.0]]))(u, Readout(direction=w, run=u, other=u))
        tensor([0.])
    """
    bank = _bank(bank)

    def divergence(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
        others = readout.direction @ bank.to(readout.direction).T
        run, patched = (
            torch.cat([logit(text, readout).unsqueeze(1), others], 1).log_softmax(-1) for text in (readout.run, u)
        )
        return (run.exp() * (run - patched)).sum(-1)

    name = f"kl over {len(bank)} texts"
    return metric(divergence, oriented=False, unit="nats", name=name, holds=bank, divergence=True)


def activation(site: Site, along: Float[Tensor, "n"] | None = None, *, key: Slot = None) -> Metric:
    """A metric: an activation of the run in place of its embedding: every verb then says what moves it. Not oriented.

    It is read at the last token of the site's slot, at the pooled position where the site names none. `along` is the
    direction `<x, along>` of what has several numbers: of a stream (`embed resid mid attn mlp`, d_model), of a head or
    its q, k, v (d_head), of all neurons (d_mlp). A neuron is its one number after the activation function. A pattern's
    cell is the weight that the site's slot pays to the last token of `key`. The unit is that of the activation.

    What is computed behind the site moves nothing, 0, and does not run. `total` is what patching everything before
    the site moves (method, section 10).

    Raises:
        ValueError: a head or a pattern without unit, a pattern without `key`, a `key` of something else, or a direction
            where one number is read and none where several are; (from the verb) a site that this encoder or batch does
            not have, a pair without that slot, or a direction of another length.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> neuron = activation(Site("neuron", 2, 17, slot="negator"))
        >>> clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"), metric=neuron).values[2:].abs().max()
        tensor(0.)
    """
    layout = LAYOUTS.get(site.kind)
    if layout is None or site.kind in BEHIND:
        kinds = ", ".join(kind for kind in LAYOUTS if kind not in BEHIND)
        raise ValueError(f"{site} has no activation within the tower; {kinds} have")
    one = site.unit is not None and site.kind in ("pattern", "neuron")
    if layout.unit_axis is not None and site.unit is None and site.kind != "neuron":
        raise ValueError(f"{site}: name one head, as in Site({site.kind!r}, {site.layer}, 0)")
    if layout.query_by_key != (key is not None):
        raise ValueError(f"{site}: give key= for a pattern, the slot that is attended to, and for nothing else")
    if one != (along is None):
        raise ValueError(
            f"{site} has {'one number, so that along= says nothing' if one else 'several numbers: give along='}"
        )
    return _of_target(Target(site, key), along, "attention weight" if layout.query_by_key else "activation")


def attention_score(layer: int, head: int, query: Slot, key: Slot) -> Metric:
    """A metric: `q . k / sqrt(d_head)`, the attention score of a head before the softmax, from the last token of the
    slot `query` (None = the pooled position) to that of `key`. Not oriented.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> score = attention_score(0, 3, "eot", "negator")
        >>> queries = encoder.edges(receivers=[Site("q", 0, 3)])
        >>> clip_lens.patch_effects(encoder, batch, queries, metric=score).record.metric
        MetricRecord(name='score 0.3 @eot -> @negator', oriented=False, unit='attention score', ...)
    """
    return _of_target(Target(Site("pattern", layer, head, query), key, scores=True), None, "attention score")


def _of_target(target: Target, along: Float[Tensor, "n"] | None, unit: str) -> Metric:
    direction = None if along is None else torch.as_tensor(along).detach().clone()

    def read(x: Float[Tensor, "row n"], readout: Readout) -> Float[Tensor, "row"]:
        if direction is None:
            return x[:, 0]
        if direction.shape != x.shape[1:]:
            raise ValueError(f"{target} has {x.shape[1]} numbers; along= has the shape {tuple(direction.shape)}")
        return x @ direction.to(x)

    return Metric(
        read,
        False,
        unit,
        f"{target}{'' if along is None else ' along a direction'}",
        (target, direction),
        target=target,
    )
