"""`confounds`: which properties of a pair go along with the score, besides what the text says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pandas import DataFrame, Series
from torch import Tensor

from clip_lens.core.effects import segments
from clip_lens.core.setting import pairs_frame
from clip_lens.core.table import SIDES, sides_of
from clip_lens.data.batch import Batch
from clip_lens.data.pairs import Pairs
from clip_lens.data.slots import template_slots
from clip_lens.methods.scores import pair_scores, tally
from clip_lens.methods.statistics import Correlation, Method, correlation, frame_of, proportion, regression
from clip_lens.model.encoder import HookedTextEncoder

FEATURES = ("cosine", "tokens", "subject_size", "most_frequent")
"""The features with numbers, besides those that a caller names."""
ALL, WITHOUT = "all", "without the most frequent caption"
RECURRING = 0.05
"""The share of the pairs from which on the most frequent caption is a feature: a rarer one carries no correlation."""


@dataclass(frozen=True, eq=False, repr=False)
class Confounds:
    """Properties of every pair, and how they go along with d: correlations, accuracy by subject size, a regression.

    `frame` has a row per pair: key, caption, foil, image, side (of the negation), d (logits at the model's scale),
    correct (d > 0), segment, cosine (of the caption's and the foil's embedding), tokens (of the caption, start and end
    included), subject (the noun phrase), subject_size (share of the image, 0 to 1), most_frequent (whether the caption
    is the most frequent one), then the columns that were asked for. `missing` says what is not known, and why.

    The subject's size is not defined where the negation is in the caption: there the subject is not in the picture.
    `most_frequent` is a feature only if that caption is at least 5 % of the pairs; then every table has its rows twice,
    for all pairs and without that caption: column `pairs`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> found = confounds(encoder, clip_lens.align(clip_lens.read_pairs()[:100], store, encoder))
        >>> found
        Confounds(100 pairs; cosine, tokens, subject_size, side, subject; missing: subject_size, most_frequent)
        >>> found.missing["subject_size"]
        'not defined for negation in the caption (50 of 100 pairs)'
    """

    frame: DataFrame
    features: tuple[str, ...] = FEATURES
    missing: Mapping[str, str] = field(default_factory=dict)
    most_frequent: str = ""

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        d: Sequence[float] | Float[Tensor, "pair"],
        cosine: Sequence[float] | Float[Tensor, "pair"],
        tokens: Sequence[int] | Int[Tensor, "pair"],
        *,
        columns: Sequence[str] = (),
    ) -> Confounds:
        """The same of scores that are known already, such as those that somebody has published of a model.

        `d` in logits, `cosine` of the two texts' embeddings and `tokens` of the caption: a number per pair.

        Raises:
            ValueError: a column that the pairs don't have, lists of another length, or a d that is NaN.

        Example:
            >>> pairs = clip_lens.read_pairs()[:3]
            >>> Confounds.of(pairs, [2.0, -1.0, 0.5], [0.9, 0.8, 0.9], [11, 8, 12]).frame[["d", "segment", "tokens"]]
                 d    segment  tokens
            0  2.0    correct      11
            1 -1.0  ambiguous       8
            2  0.5  ambiguous      12
        """
        numbers = {"d": np.asarray(d, float), "cosine": np.asarray(cosine, float), "tokens": np.asarray(tokens, int)}
        if wrong := [name for name, column in numbers.items() if column.shape != (len(pairs),)]:
            raise ValueError(f"{', '.join(wrong)} must have one number for each of {len(pairs)} pairs")
        known = pairs.to_frame().assign(d=numbers["d"], segment=segments(d))
        return cls._of(pairs, known, numbers["cosine"], numbers["tokens"], columns)

    @classmethod
    def _of(
        cls, pairs: Pairs, known: DataFrame, cosine: np.ndarray, tokens: np.ndarray, columns: Sequence[str]
    ) -> Confounds:
        """From what is known of every pair: the table's own columns and those that may be asked for."""
        if absent := [name for name in columns if name not in known]:
            raise ValueError(
                f"the pairs have no column {', '.join(absent)}; they have {', '.join(map(str, known.columns))}"
            )
        frame = known[["key", "caption", "foil", "image", "side", "d", "segment"]].copy()
        frame.insert(6, "correct", frame["d"] > 0)
        frame["cosine"], frame["tokens"] = cosine, tokens
        frame["subject"] = Series(subject_phrases(pairs), index=frame.index, dtype=object)
        frame["subject_size"] = _given_sizes(known).where(_size_defined(frame))
        most, why = _most_frequent(frame["caption"])
        frame["most_frequent"] = (frame["caption"] == most) & bool(most)
        more = [_numbers_if_all(known[name]) for name in columns if name not in frame]
        frame = pd.concat([frame, *more], axis=1)
        names = [*FEATURES, *(name for name in columns if name not in ("subject", "side"))]
        features = tuple(dict.fromkeys(name for name in names if most or name != "most_frequent"))
        return cls(frame, features, {**_missing(frame, features, known), **why}, most)

    def correlations(self, interval: float = 0.95, *, method: Method = "pearson") -> DataFrame:
        """Every feature with numbers, correlated with d: a row per feature, side (and "pooled") and choice of pairs.

        Columns: feature, side, pairs, r, lower, upper, p, n, note (`clip_lens.methods.statistics.correlation`).

        Example:
            >>> table = toy_confounds().correlations()
            >>> table[(table.feature == "subject_size") & (table.side == "pooled")][["pairs", "r", "n"]].round(2)
                                            pairs     r  n
            8                                 all  0.91  6
            20  without the most frequent caption  0.97  4
        """
        cells, rows = [], []
        for pairs, chosen in self._variants():
            numbers = [name for name in self.features if pd.api.types.is_numeric_dtype(chosen[name])]
            for name in numbers:
                for side in [*sides_of(self.frame, pooled=False), "pooled"]:
                    part = chosen if side == "pooled" else chosen[chosen["side"] == side]
                    cells.append((name, side, pairs))
                    found = correlation(part[name], part["d"], interval=interval, method=method, names=(name, "d"))
                    rows.append(found)
        return pd.concat([DataFrame(cells, columns=["feature", "side", "pairs"]), frame_of(rows, Correlation)], axis=1)

    def accuracy(self, interval: float = 0.95) -> DataFrame:
        """The share of pairs with d > 0, overall and per side: the rows of `scores`, with the column `pairs`.

        Example:
            >>> toy_confounds().accuracy()[["side", "accuracy", "n", "pairs"]].tail(2)
                  side  accuracy  n                              pairs
            4  caption       0.5  2  without the most frequent caption
            5     foil       1.0  2  without the most frequent caption
        """
        tables = [tally(chosen, interval=interval).assign(pairs=pairs) for pairs, chosen in self._variants()]
        return pd.concat(tables, ignore_index=True)

    def by_size(self, thresholds: Sequence[float] | None = None, interval: float = 0.95) -> DataFrame:
        """Accuracy among the pairs with size > t, the subject's share of the image, for several thresholds t.

        More than t, not t itself, as in Quantmeyer et al. 2024 (method, section 6). A row per threshold, side (and
        "overall") and choice of pairs. Columns: threshold, side, pairs, accuracy, lower, upper (Wilson's interval), n.
        `thresholds=None`: 0 and the deciles of the sizes that there are. Pairs without a size are in no row; without
        any size there are no rows.

        Example:
            >>> table = toy_confounds().by_size([0, .25])
            >>> table[(table.side == "overall") & (table.pairs == "all")][["threshold", "accuracy", "n"]].round(2)
               threshold  accuracy  n
            0       0.00       0.8  5
            3       0.25       1.0  3
        """
        sizes = self.frame["subject_size"].dropna()
        if thresholds is None:
            thresholds = np.unique([0.0, *sizes.quantile(np.arange(1, 10) / 10)]).tolist() if len(sizes) else ()
        rows = []
        for pairs, chosen in self._variants():
            for threshold in thresholds if len(sizes) else ():
                large = chosen[chosen["subject_size"] > threshold]
                for side in ["overall", *sides_of(self.frame, pooled=False)]:
                    right = large["correct"] if side == "overall" else large.loc[large["side"] == side, "correct"]
                    rows.append((threshold, side, pairs, *proportion(int(right.sum()), len(right), interval=interval)))
        return DataFrame(rows, columns=["threshold", "side", "pairs", "accuracy", "lower", "upper", "n"])

    def regression(self, interval: float = 0.95, *, least: int = 20) -> DataFrame:
        """d regressed on all features at once: a row per term, in logits per unit of the feature.

        The features with numbers, the side of the negation, and the subject phrases that occur `least` times, against
        all the rarer ones. Errors are HC3. Columns: pairs, then those of `clip_lens.methods.statistics.regression`,
        whose note says why a feature has no coefficient: missing, constant, collinear with those above.

        Where the subject's size is not defined the mean of the sizes stands for it, and the side's own term takes up
        what that adds: these pairs stay in the regression, and the coefficient is the slope among those with a size.

        Example:
            >>> table = toy_confounds().regression()
            >>> table[table.pairs == "all"][["term", "note"]]
                         term                      note
            0       intercept
            1    subject_size
            2   most_frequent
            3     side = foil
            4          cosine              constant (0)
            5          tokens              constant (7)
            6         subject   no entry occurs 20 times
        """
        tables = []
        for pairs, chosen in self._variants():
            table = regression(chosen["d"], self._regressors(chosen), interval=interval, least=least)
            table.insert(0, "pairs", pairs)
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def _regressors(self, chosen: DataFrame) -> DataFrame:
        side = pd.Categorical(chosen["side"], categories=SIDES[:3])
        features = chosen[list(self.features)].assign(side=Series(side, index=chosen.index))
        if "subject_size" in features:
            sizes = features["subject_size"]
            features["subject_size"] = sizes.where(_size_defined(chosen), sizes.mean())
        return features.assign(subject=chosen["subject"])

    def _variants(self) -> list[tuple[str, DataFrame]]:
        most = self.frame["most_frequent"]
        return [(ALL, self.frame), *([(WITHOUT, self.frame[~most])] if most.any() else [])]

    def __repr__(self) -> str:
        lacks = f"; missing: {', '.join(self.missing)}" if self.missing else ""
        return f"Confounds({len(self.frame)} pairs; {', '.join([*self.features, 'side', 'subject'])}{lacks})"

    def _repr_html_(self) -> str:
        lacks = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in self.missing.items())
        shown = self.frame.head(5)[["key", "side", "d", "correct", *self.features, "subject"]]
        return f"<p>{escape(repr(self))}</p><ul>{lacks}</ul>{shown.to_html(index=False)}"


def confounds(encoder: HookedTextEncoder, batch: Batch, *, columns: Sequence[str] = ()) -> Confounds:
    """The properties of every pair that may go along with its score (method, section 6): a `Confounds`.

    Subject phrases come from the pairs' column `subject`, or from the template "There is/are NEGATOR subject.", sizes
    from the column `subject_size` (`scripts/subject_size.py` adds one), which is used unless the negation is in the
    caption. `columns` names further columns of the pairs that are to be features, of numbers or of texts. What is
    missing is counted in `missing` and never filled in.

    Raises:
        ValueError: a column that the pairs don't have, or a batch of another width than the encoder's embedding.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:400], store, encoder)
        >>> confounds(encoder, batch).frame[["d", "side", "tokens", "subject", "subject_size"]].round(2).head(2)
              d     side  tokens      subject  subject_size
        0  1.89  caption      11  red circles           NaN
        1  4.87     foil       8         star          0.03
    """
    found = pair_scores(encoder, batch)
    run, other = encoder.length(batch.tokens), encoder.length(batch.other)
    tokens = run.where(batch.sigma < 0, other).cpu().numpy()
    return Confounds._of(batch.pairs, pairs_frame(batch, found.d), found.cosine.numpy(), tokens, columns)


def subject_phrases(pairs: Pairs) -> list[str | None]:
    """Each pair's subject noun phrase: its column `subject`, or what follows the negator in the caption or the foil.

    None where neither is there (method, section 2: "There is/are NEGATOR subject ... .").

    Example:
        >>> texts = ["There are no red cars."], ["There are some red cars."]
        >>> subject_phrases(clip_lens.Pairs(["a"], *texts, ["1.png"]))
        ['red cars']
    """
    named = pairs.info["subject"] if "subject" in pairs.info else [None] * len(pairs)
    rows = zip(named, pairs.caption, pairs.foil, strict=True)
    return [
        given.strip() if isinstance(given, str) and given.strip() else _phrase(caption) or _phrase(foil)
        for given, caption, foil in rows
    ]


def _phrase(text: str) -> str | None:
    ends = {name: end for end, name in template_slots(text) or ()}
    if "subject" not in ends:
        return None
    return text[ends["negator"] : ends.get("subject_rest", ends["subject"])].strip()


def _given_sizes(known: DataFrame) -> Series:
    given = known["subject_size"] if "subject_size" in known else Series(np.nan, index=known.index)
    return pd.to_numeric(given, errors="coerce").astype("float64")


def _size_defined(pairs: DataFrame) -> Series:
    """Whether the subject can have a size: where the caption negates it, it is not in the picture."""
    return pairs["side"] != "caption"


def _numbers_if_all(column: Series) -> Series:
    """Numbers, if every entry that is there is one; else the column as it is."""
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if (numbers.notna() == column.notna()).all() else column


def _most_frequent(captions: Series) -> tuple[str, dict[str, str]]:
    """The caption that occurs most often, of several the first; or "" and why there is none to speak of."""
    counts = captions.value_counts(sort=False)
    most, count = (str(counts.idxmax()), int(counts.max())) if len(counts) else ("", 0)
    if count <= 1:
        return "", {"most_frequent": "every caption occurs once"} if count else {}
    if count < RECURRING * len(captions):
        why = f"{most!r} is the most frequent caption, {count} of {len(captions)} pairs: below {RECURRING:.0%}"
        return "", {"most_frequent": why}
    return most, {}


def _missing(frame: DataFrame, features: Sequence[str], known: DataFrame) -> dict[str, str]:
    """What is not known of how many pairs, and why."""
    found = {}
    for name in dict.fromkeys([*features, "subject"]):
        where = "" if name in known or name == "subject" else f"; the pairs have no column {name}"
        found[name] = _lacking(frame[name], where)
    defined = _size_defined(frame)
    if "subject_size" in known and not defined.all():
        rest = _lacking(frame.loc[defined, "subject_size"])
        found["subject_size"] = _undefined(known[~defined], len(frame)) + (f"; of the others {rest}" if rest else "")
    return {name: why for name, why in found.items() if why}


def _lacking(column: Series, where: str = "") -> str:
    lacks = int(column.isna().sum())
    return f"missing in {lacks} of {len(column)} pairs{where}" if lacks else ""


def _undefined(outside: DataFrame, n: int) -> str:
    """For how many of n pairs the subject's size is not defined, and of how many of them a given one is not used."""
    unused = int((_given_sizes(outside).fillna(0) != 0).sum())
    left = f"; the sizes given for {unused} of them are not used" if unused else ""
    return f"not defined for negation in the caption ({len(outside)} of {n} pairs){left}"


def toy_confounds() -> Confounds:
    """A small result made by hand, for examples: six pairs, two of them with the most frequent caption.

    Example:
        >>> toy_confounds().most_frequent
        'There are no people.'
    """
    d = [3.0, 2.0, -1.0, 4.0, 2.0, -2.0]
    frame = DataFrame({"key": list("abcdef"), "side": ["caption", "foil"] * 3, "d": d})
    captions = ["There are no people.", "There is a dog.", "There is no cat."]
    frame["caption"] = [*captions, "There is a cow.", "There is no pig.", captions[0]]
    frame = frame.assign(foil="", image="", correct=frame["d"] > 0, segment="", cosine=0.0, tokens=7)
    frame["subject"] = ["people", "dog", "cat", "cow", "pig", "people"]
    frame["subject_size"] = [0.4, 0.3, 0.0, 0.5, 0.2, 0.1]
    frame["most_frequent"] = frame["caption"] == captions[0]
    return Confounds(frame, most_frequent=captions[0])
