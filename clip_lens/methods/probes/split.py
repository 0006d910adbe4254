"""Which texts a probe is trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.data.groups import connected
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, hook_name

LEAST = 2
"""Groups of texts without which there is no training or no testing."""
TEXTS_AT_ONCE = 64


class TooFewTexts(ValueError):
    """Texts too much alike for any to be held out: a `ValueError` that a report on more than probes can leave out."""


@dataclass(frozen=True, eq=False)
class Split:
    """Pairs whose run has no negation, split by groups that share no text; streams are those of the distinct texts."""

    batch: Batch
    held: Bool[Tensor, "pair"]
    distinct: Int[Tensor, "distinct"]
    layers: tuple[int, ...]
    streams: Float[Tensor, "layer text distinct d_model"]
    groups: int

    @property
    def test(self) -> ndarray:
        """Which of the distinct pairs of texts are held out."""
        return self.held[self.distinct].cpu().numpy()

    @property
    def means(self) -> Float[Tensor, "layer text d_model"]:
        """The class means of the training texts: without negation, with it."""
        return self.streams[:, :, ~self.held[self.distinct]].mean(2)

    @property
    def directions(self) -> Float[Tensor, "layer d_model"]:
        """The difference of the class means, exactly 0 where the texts of each pair have the same stream."""
        streams = self.streams[:, :, ~self.held[self.distinct]]
        return (streams[:, 1] - streams[:, 0]).mean(1)

    @property
    def places(self) -> list[Site]:
        return [Site("resid", layer, slot="eot") for layer in self.layers]


def split_texts(
    encoder: HookedTextEncoder, batch: Batch, layers: Sequence[int] | None, seed: int, test_share: float
) -> Split:
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share}: it lies between 0 and 1, as .5 does")
    batch = _without_negation(batch)
    layers = tuple(site.layer for site in encoder.sites("resid", layers=layers))
    group, distinct = _groups(batch)
    groups = int(group.max()) + 1
    tested = round(test_share * groups)
    if min(tested, groups - tested) < LEAST:
        raise TooFewTexts(
            f"{len(batch)} pairs make {groups} groups that share no text, {tested} of them to test on; at least "
            f"{LEAST} must be left to train on and to test on: give more texts that differ, or another test_share"
        )
    chosen = np.random.default_rng(seed).permutation(groups)[:tested]
    held = torch.from_numpy(np.isin(group, chosen)).to(batch.tokens.device)
    first = torch.from_numpy(distinct).to(batch.tokens.device)
    streams = [streams_of(encoder, tokens[first], layers) for tokens in (batch.tokens, batch.other)]
    return Split(batch, held, first, layers, torch.stack(streams, 1), groups)


def _without_negation(batch: Batch) -> Batch:
    """The batch turned so that every run is the text without negation."""
    if "none" in batch.pairs.side:
        raise ValueError(
            f"{batch.pairs.side.count('none')} of {len(batch)} pairs have no side, neither text is the negated one; "
            "align(..., run='affirmative') leaves them out"
        )
    foils = (batch.sigma == 1).tolist()
    negated = [(side == "foil") == is_foil for side, is_foil in zip(batch.pairs.side, foils, strict=True)]
    if any(negated) and not all(negated):
        raise ValueError(
            f"{sum(negated)} of {len(batch)} runs are the text with the negation, the others the one without; "
            "align(..., run='affirmative') runs the same one everywhere"
        )
    return batch.flip() if any(negated) else batch


def _groups(batch: Batch) -> tuple[Int[ndarray, "pair"], Int[ndarray, "distinct"]]:
    """Which group each pair belongs to, pairs that share a text being of one; the first pair of each pair of texts."""
    texts = [
        list(_texts(tokens, length))
        for tokens, length in ((batch.tokens, batch.length), (batch.other, batch.other_length))
    ]
    distinct = dict.fromkeys(zip(*texts, strict=True))
    first = {both: number for number, both in reversed([*enumerate(zip(*texts, strict=True))])}
    return connected(zip(*texts, strict=True)), np.array([first[both] for both in distinct])


def _texts(tokens: Int[Tensor, "pair pos"], length: Int[Tensor, "pair"]) -> Iterable[tuple[int, ...]]:
    return (tuple(text[:n]) for text, n in zip(tokens.tolist(), length.tolist(), strict=True))


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
