"""`scores`: how often the caption beats the foil, as VALSE reports it; and what CLIP says of each pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.metric import Readout, logit
from clip_lens.core.setting import Setting, over_pairs, pairs_frame
from clip_lens.core.source import CHUNK
from clip_lens.core.table import sides_of
from clip_lens.data.batch import Batch
from clip_lens.methods.statistics import proportion
from clip_lens.model.encoder import HookedTextEncoder


class PairScores(NamedTuple):
    """What CLIP says of each pair: S(caption, image) and S(foil, image) in logits at the model's scale, their
    difference d, and the cosine of the two texts' embeddings."""

    caption: Float[Tensor, "pair"]
    foil: Float[Tensor, "pair"]
    d: Float[Tensor, "pair"]
    cosine: Float[Tensor, "pair"]


def pair_scores(encoder: HookedTextEncoder, batch: Batch) -> PairScores:
    """S(caption), S(foil), d = S(caption) - S(foil) and cos(u(caption), u(foil)) of every pair, on the CPU.

    Along the batch's direction: CLIP's logits of the pair's image, unless `batch.along` turned it (method, section 1).
    The unpatched texts are run and nothing else; which of them is the run makes no difference.

    Raises:
        ValueError: a batch of another width than the encoder's embedding, or scores that are not finite.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> pair_scores(encoder, batch).d.shape
        torch.Size([3])
    """
    Setting.reading(encoder, batch)

    def compute(index: Int[Tensor, "pair"]) -> dict[str, Tensor]:
        run, other = encoder(batch.tokens[index]), encoder(batch.other[index])
        readout = Readout.of(batch[index], run, other)
        scores = torch.stack([logit(run, readout), logit(other, readout)])
        Setting.check_metric(scores.sum(0), index)
        caption, foil = torch.where(batch.sigma[index] > 0, scores.flip(0), scores)
        return {"caption": caption, "foil": foil, "d": caption - foil, "cosine": (run * other).sum(-1)}

    with torch.inference_mode():
        return PairScores(**over_pairs(batch, CHUNK, compute))


def scores(encoder: HookedTextEncoder, batch: Batch, *, interval: float = 0.95) -> DataFrame:
    """VALSE's score: the share of pairs with d > 0, overall and by the side of the negation, one row each.

    Pairwise accuracy as VALSE's ranking models get it (Parcalabescu et al. 2022; method, section 2). Columns: side
    ("overall", then those there are: caption, foil, none), accuracy, lower, upper (Wilson's interval), n, right, ties
    (pairs with d = 0, which count as wrong), tied (their keys), mean_d (logits at the model's scale). Pairs that could
    not be aligned are not among the n; `batch.dropped` has them.

    Raises:
        ValueError: a batch of another width than the encoder's embedding, or an interval outside of (0, 1).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:200], store, encoder)
        >>> scores(encoder, batch)[["side", "accuracy", "n", "ties"]]
              side  accuracy    n  ties
        0  overall      0.99  200     0
        1  caption      0.99  100     0
        2     foil      0.99  100     0
    """
    return tally(pairs_frame(batch, pair_scores(encoder, batch).d), interval=interval)


def tally(pairs: DataFrame, *, interval: float = 0.95) -> DataFrame:
    """The rows of `scores` for pairs whose side and d are known, such as `effects.pairs`.

    Example:
        >>> tally(clip_lens.core.effects.toy_effects().pairs)[["side", "accuracy", "n"]]
              side  accuracy  n
        0  overall       1.0  3
        1  caption       1.0  1
        2     foil       1.0  2
    """
    sides = [side for side in sides_of(pairs, pooled=False) if len(pairs)]
    parts = [("overall", pairs), *((side, pairs[pairs["side"] == side]) for side in sides)]
    return DataFrame([_row(side, part, interval) for side, part in parts])


def _row(side: str, pairs: DataFrame, interval: float) -> dict[str, object]:
    right, tied = int((pairs["d"] > 0).sum()), pairs["d"] == 0
    share = proportion(right, len(pairs), interval=interval)
    return {
        "side": side,
        "accuracy": share.share,
        "lower": share.lower,
        "upper": share.upper,
        "n": share.n,
        "right": right,
        "ties": int(tied.sum()),
        "tied": tuple(pairs.loc[tied, "key"]),
        "mean_d": pairs["d"].mean(),
    }
