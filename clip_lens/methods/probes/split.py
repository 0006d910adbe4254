"""Which texts a probe is trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.data.groups import connected
from clip_lens.methods.probes.labelled import UNLABELLED, Labelled, Labels, labelled
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, hook_name
from clip_lens.words import counted, some

LEAST = 2
"""Groups of texts without which there is no training or no testing."""
TEXTS_AT_ONCE = 64
NEGATION = ("without negation", "with negation")


class TooFewTexts(ValueError):
    """Texts too much alike for any to be held out: a `ValueError` that a report on more than probes can leave out."""


@dataclass(frozen=True, eq=False)
class Split:
    """Pairs with the class of each text, split by groups that share no text; streams are those of the distinct texts.

    `label` is an index into `classes`, -1 where a text has no label, or was held out with one that no training text
    has (`unseen`).
    """

    batch: Batch
    held: Bool[Tensor, "pair"]
    distinct: Int[Tensor, "distinct"]
    layers: tuple[int, ...]
    streams: Float[Tensor, "layer text distinct d_model"]
    groups: int
    label: Int[ndarray, "text pair"]
    classes: tuple[Hashable, ...]
    unseen: tuple[Hashable, ...] = ()

    @property
    def negation(self) -> bool:
        """Whether the classes are those of the negation: every run is without it, every other text with it."""
        return self.classes is NEGATION

    @property
    def test(self) -> Bool[ndarray, "distinct"]:
        """Which of the distinct pairs of texts are held out."""
        return self.held[self.distinct].cpu().numpy()

    @property
    def labels(self) -> Int[ndarray, "text distinct"]:
        """The classes of the distinct pairs of texts."""
        return self.label[:, self.distinct.cpu().numpy()]

    @property
    def trained(self) -> list[int]:
        """The classes that training texts have."""
        return np.setdiff1d(self.labels[:, ~self.test], [UNLABELLED]).tolist()

    @cached_property
    def means(self) -> Float[Tensor, "layer class d_model"]:
        """The class means of the training texts, NaN for a class without any; exactly equal where all streams are."""
        first = self.streams[:, 0, :1]
        means = self.streams.new_full((len(self.layers), len(self.classes), self.streams.shape[-1]), torch.nan)
        for number in self.trained:
            chosen = torch.from_numpy((self.labels == number) & ~self.test).to(self.streams.device)
            means[:, number] = first[:, 0] + (self.streams[:, chosen] - first).mean(1)
        return means

    @property
    def contrasted(self) -> Int[Tensor, "moved"]:
        """The held-out pairs whose texts are of two classes."""
        known = (self.label != UNLABELLED).all(0) & (self.label[0] != self.label[1])
        return (self.held.cpu() & torch.from_numpy(known)).nonzero().flatten().to(self.held.device)

    @property
    def ends(self) -> Int[ndarray, "text moved"]:
        """The classes of the two texts of each of those pairs: from the run's to the other's."""
        return self.label[:, self.contrasted.cpu().numpy()]

    @property
    def directions(self) -> Float[Tensor, "layer moved d_model"]:
        """For each of those pairs the difference of the class means, the other's minus the run's."""
        run, other = (self.means[:, torch.from_numpy(each).to(self.means.device)] for each in self.ends)
        return other - run

    @property
    def places(self) -> list[Site]:
        return [Site("resid", layer, slot="eot") for layer in self.layers]


def split_texts(
    encoder: HookedTextEncoder,
    batch: Batch,
    layers: Sequence[int] | None,
    seed: int,
    test_share: float,
    labels: Labels | None = None,
) -> Split:
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share}: it lies between 0 and 1, as .5 does")
    batch = _without_negation(batch) if labels is None else batch
    layers = tuple(site.layer for site in encoder.sites("resid", layers=layers))
    texts = _texts(batch.tokens, batch.length), _texts(batch.other, batch.other_length)
    named = _negation(batch) if labels is None else labelled(batch, texts, labels)
    group, distinct = connected(zip(*texts, strict=True)), _distinct(texts)
    groups = int(group.max()) + 1
    tested = round(test_share * groups)
    if min(tested, groups - tested) < LEAST:
        raise TooFewTexts(
            f"{len(batch)} pairs make {groups} groups that share no text, {tested} of them to test on; at least "
            f"{LEAST} must be left to train on and to test on: give more texts that differ, or another test_share"
        )
    held = np.isin(group, np.random.default_rng(seed).permutation(groups)[:tested])
    label, unseen = _told(named, held)
    device = batch.tokens.device
    first = torch.from_numpy(distinct).to(device)
    streams = [streams_of(encoder, tokens[first], layers) for tokens in (batch.tokens, batch.other)]
    return Split(
        batch, torch.from_numpy(held).to(device), first, layers, torch.stack(streams, 1), groups, label, named.classes,
        unseen,
    )  # fmt: skip


def _negation(batch: Batch) -> Labelled:
    return Labelled(np.stack([np.zeros(len(batch), int), np.ones(len(batch), int)]), NEGATION)


def _told(named: Labelled, held: Bool[ndarray, "pair"]) -> tuple[Int[ndarray, "text pair"], tuple[Hashable, ...]]:
    """The labels without those of held-out texts that no training text has, and these.

    Raises:
        TooFewTexts: fewer than two classes are on both sides.
    """
    trained, tested = (np.setdiff1d(named.number[:, part], [UNLABELLED]) for part in (~held, held))
    both = np.intersect1d(trained, tested)
    if len(both) < LEAST:
        raise TooFewTexts(
            f"{counted(len(both), 'class', 'classes')} of {len(named.classes)} ({some(named.classes, quote=True)}) "
            f"have texts both to train on and to test on, at least {LEAST} must: give more texts of each, another "
            "seed, or fewer classes (numbers in ranges: a function of the text may name them)"
        )
    unseen = np.setdiff1d(tested, trained)
    label = np.where(held & np.isin(named.number, unseen), UNLABELLED, named.number)
    return label, tuple(named.classes[number] for number in unseen)


def _without_negation(batch: Batch) -> Batch:
    """The batch turned so that every run is the text without negation."""
    if "none" in batch.pairs.side:
        raise ValueError(
            f"{batch.pairs.side.count('none')} of {len(batch)} pairs have no side, neither text is the negated one; "
            "align(..., run='affirmative') leaves them out; to tell something else apart than negation give labels="
        )
    foils = (batch.sigma == 1).tolist()
    negated = [(side == "foil") == is_foil for side, is_foil in zip(batch.pairs.side, foils, strict=True)]
    if any(negated) and not all(negated):
        raise ValueError(
            f"{sum(negated)} of {len(batch)} runs are the text with the negation, the others the one without; "
            "align(..., run='affirmative') runs the same one everywhere"
        )
    return batch.flip() if any(negated) else batch


def _distinct(texts: Iterable[Sequence[Hashable]]) -> Int[ndarray, "distinct"]:
    """The first pair of each two texts, whichever of them is run."""
    first: dict[frozenset[Hashable], int] = {}
    for number, both in enumerate(zip(*texts, strict=True)):
        first.setdefault(frozenset(both), number)
    return np.array(list(first.values()))


def _texts(tokens: Int[Tensor, "pair pos"], length: Int[Tensor, "pair"]) -> list[tuple[int, ...]]:
    return [tuple(text[:n]) for text, n in zip(tokens.tolist(), length.tolist(), strict=True)]


@torch.no_grad()
def streams_of(
    encoder: HookedTextEncoder, tokens: Int[Tensor, "text pos"], layers: Sequence[int]
) -> Float[Tensor, "layer text d_model"]:
    """The residual stream at the pooled position."""
    names = [hook_name(Site("resid", layer), encoder.n_layers) for layer in layers]
    parts = []
    for chunk in tokens.split(TEXTS_AT_ONCE):
        cache, row = encoder.cache(chunk, names=names), torch.arange(len(chunk), device=tokens.device)
        parts.append(torch.stack([cache[name][row, encoder.pool(chunk)] for name in names]))
    return torch.cat(parts, 1)
