"""`scores`: how often the caption beats the foil, as VALSE reports it; and what CLIP says of each pair."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.metric import Readout, logit
from clip_lens.core.setting import Setting, over_pairs, pairs_frame
from clip_lens.core.source import CHUNK
from clip_lens.core.table import sides_of, units_of
from clip_lens.data.batch import Batch
from clip_lens.data.pairs import FOILS, QUESTION, questions
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
    """VALSE's score: the share of pairs with d > 0, overall and by the side of the negation, one row each; and of
    questions, where pairs belong to some.

    Pairwise accuracy as VALSE's ranking models get it (Parcalabescu et al. 2022; method, section 2). Columns: by
    ("pair" or "question"), side ("overall", then those there are: caption, foil, none), accuracy, lower, upper
    (Wilson's interval), n, right, ties (pairs with d = 0, which count as wrong), tied (their keys), mean_d (logits at
    the model's scale), incomplete. Pairs that could not be aligned are not among the n; `batch.dropped` has them.

    A question (a column of the pairs) is right when all of its pairs are: its d is the smallest of theirs. One that
    lost a pair on the way, as the column `foils` tells, would be easier than it was asked: it is `incomplete`, and none
    of the n.

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
    rows = [_row("pair", side, part, interval) for side, part in parts]
    if QUESTION in pairs:
        asked, incomplete = _questions(pairs)
        rows.append(_row("question", "overall", asked, interval, incomplete))
    return DataFrame(rows)


def _questions(pairs: DataFrame) -> tuple[DataFrame, int]:
    """The questions that have all of their pairs, with the smallest d of them, and how many have not."""
    units, _ = units_of(pairs)
    groups = pairs.assign(key=questions(pairs[QUESTION].tolist(), pairs["key"])).groupby(units)
    asked = groups.agg(key=("key", "first"), d=("d", "min"))
    if FOILS not in pairs:
        return asked, 0
    wanted = pd.to_numeric(groups[FOILS].first(), errors="coerce")
    whole = wanted.isna() | (groups.size() == wanted)
    return asked[whole], int((~whole).sum())


def _row(by: str, side: str, pairs: DataFrame, interval: float, incomplete: int = 0) -> dict[str, object]:
    right, tied = int((pairs["d"] > 0).sum()), pairs["d"] == 0
    share = proportion(right, len(pairs), interval=interval)
    return {
        "by": by,
        "side": side,
        "accuracy": share.share,
        "lower": share.lower,
        "upper": share.upper,
        "n": share.n,
        "right": right,
        "ties": int(tied.sum()),
        "tied": tuple(pairs.loc[tied, "key"]),
        "mean_d": pairs["d"].mean(),
        "incomplete": incomplete,
    }


def group_scores(encoder: HookedTextEncoder, batch: Batch, *, interval: float = 0.95) -> DataFrame:
    """Winoground's scores of groups of two captions and two images: a row each for text, image and group.

    A group is a question of two pairs, each one's caption being the other's foil (Thrush et al.
    2022). Text: both captions are preferred for their image, image: both images for their caption, group: both.
    Columns: score, accuracy, lower, upper (Wilson's interval), n, right, incomplete: groups of which a pair is missing,
    none of the n. A tie counts as wrong.

    Raises:
        ValueError: no column `question`, no group of two such pairs, or a batch along the difference of two images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> images = ["scene-500005.png", "scene-500001.png"]
        >>> captions = ["We can see no star.", "We can see a star."]
        >>> pairs = DataFrame({"caption": captions, "foil": captions[::-1], "image": images, "question": "stars"})
        >>> batch = clip_lens.align(clip_lens.read_pairs(pairs), store, encoder)
        >>> group_scores(encoder, batch)[["score", "accuracy", "n"]]
           score  accuracy  n
        0   text       1.0  1
        1  image       1.0  1
        2  group       1.0  1
    """
    first, second, incomplete = _groups(batch)
    if torch.equal(batch.direction[first], -batch.direction[second]):
        raise ValueError("these pairs are judged along the difference of two images; align them without against=")
    found = pair_scores(encoder, batch)
    text = (found.d[first] > 0) & (found.d[second] > 0)
    image = (found.caption[first] > found.foil[second]) & (found.caption[second] > found.foil[first])
    rows = []
    for score, right in {"text": text, "image": image, "group": text & image}.items():
        share = proportion(int(right.sum()), len(right), interval=interval)
        rows.append((score, *share, int(right.sum()), incomplete))
    return DataFrame(rows, columns=["score", "accuracy", "lower", "upper", "n", "right", "incomplete"])


def _groups(batch: Batch) -> tuple[list[int], list[int], int]:
    """The first and the second pair of each group, and how many groups have lost one."""
    pairs = batch.pairs
    if pairs.question is None:
        raise ValueError(f"{pairs.name} has no column {QUESTION!r}, which says which pairs are one group")
    groups: dict[str, list[int]] = {}
    for row, question in enumerate(pairs.question):
        groups.setdefault(question, []).append(row)
    texts = list(zip(pairs.caption, pairs.foil, strict=True))
    twos = [rows for rows in groups.values() if len(rows) == 2]
    strange = [rows for rows in groups.values() if len(rows) > 2] + [
        (one, two) for one, two in twos if texts[one] != texts[two][::-1] or pairs.image[one] == pairs.image[two]
    ]
    if strange or not twos:
        told = (
            f"question {pairs.question[strange[0][0]]!r} is none" if strange else f"none of {len(groups)} questions is"
        )
        raise ValueError(
            f"{told}: a group is two pairs about two images, the caption of one being the foil of the other; "
            "`scores` scores other questions"
        )
    return [one for one, _ in twos], [two for _, two in twos], len(groups) - len(twos)
