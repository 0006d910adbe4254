"""`confounds`: which properties of a pair go along with the score, besides what the text says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from clip_lens.core.setting import pairs_frame
from clip_lens.core.table import SIDES, sides_of
from clip_lens.data.batch import Batch, template_slots
from clip_lens.data.pairs import Pairs
from clip_lens.methods.scores import pair_scores, tally
from clip_lens.methods.statistics import Correlation, Method, correlation, frame_of, proportion, regression
from clip_lens.model.encoder import HookedTextEncoder

FEATURES = ("cosine", "tokens", "subject_size", "most_frequent")
"""The features with numbers, besides those that a caller names."""
ALL, WITHOUT = "all", "without the most frequent caption"


@dataclass(frozen=True, eq=False, repr=False)
class Confounds:
    """Properties of every pair, and how they go along with d: correlations, accuracy by subject size, a regression.

    `frame` has a row per pair: key, caption, foil, image, side (of the negation), d (logits at the model's scale),
    correct (d > 0), segment, cosine (of the caption's and the foil's embedding), tokens (of the caption, start and end
    included), subject (the noun phrase), subject_size (share of the image, 0 to 1), most_frequent (whether the caption
    is the most frequent one), then the columns that were asked for. `missing` says what is not known, and why.
    Every table has its rows twice, for all pairs and without the most frequent caption: column `pairs`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> found = confounds(encoder, clip_lens.align(clip_lens.read_pairs()[:100], store, encoder))
        >>> found
        Confounds(100 pairs; cosine, tokens, subject_size, most_frequent, side, subject)
    """

    frame: DataFrame
    features: tuple[str, ...] = FEATURES
    missing: Mapping[str, str] = field(default_factory=dict)
    most_frequent: str = ""

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
        """Accuracy among the pairs whose subject takes at least a share of the image, for several such thresholds.

        A row per threshold, side (and "overall") and choice of pairs. Columns: threshold, side, pairs, accuracy, lower,
        upper (Wilson's interval), n. `thresholds=None`: 0 and the deciles of the sizes that there are. Pairs without a
        size are in no row; without any size there are no rows.

        Example:
            >>> table = toy_confounds().by_size([0, .25])
            >>> table[(table.side == "overall") & (table.pairs == "all")][["threshold", "accuracy", "n"]].round(2)
               threshold  accuracy  n
            0       0.00      0.67  6
            3       0.25      1.00  3
        """
        sizes = self.frame["subject_size"].dropna()
        if thresholds is None:
            thresholds = np.unique([0.0, *sizes.quantile(np.arange(1, 10) / 10)]).tolist() if len(sizes) else ()
        rows = []
        for pairs, chosen in self._variants():
            for threshold in thresholds if len(sizes) else ():
                large = chosen[chosen["subject_size"] >= threshold]
                for side in ["overall", *sides_of(self.frame, pooled=False)]:
                    right = large["correct"] if side == "overall" else large.loc[large["side"] == side, "correct"]
                    rows.append((threshold, side, pairs, *proportion(int(right.sum()), len(right), interval=interval)))
        return DataFrame(rows, columns=["threshold", "side", "pairs", "accuracy", "lower", "upper", "n"])

    def regression(self, interval: float = 0.95, *, least: int = 20) -> DataFrame:
        """d regressed on all features at once: a row per term, in logits per unit of the feature.

        The features with numbers, the side of the negation, and the subject phrases that occur `least` times, against
        all the rarer ones. Errors are HC3. Columns: pairs, then those of `clip_lens.methods.statistics.regression`,
        whose note says why a feature has no coefficient: missing, constant, collinear with those above.

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
        return features.assign(subject=chosen["subject"])

    def _variants(self) -> list[tuple[str, DataFrame]]:
        return [(ALL, self.frame), (WITHOUT, self.frame[~self.frame["most_frequent"]])]

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
    from the column `subject_size` (`scripts/subject_size.py` adds one). `columns` names further columns of the pairs
    that are to be features, of numbers or of texts. What is missing is counted in `missing` and never filled in.

    Raises:
        ValueError: a column that the pairs don't have, or a batch of another width than the encoder's embedding.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:400], store, encoder)
        >>> confounds(encoder, batch).frame[["d", "side", "tokens", "subject", "subject_size"]].round(2).head(2)
              d     side  tokens      subject  subject_size
        0  1.89  caption      11  red circles          0.00
        1  4.87     foil       8         star          0.03
    """
    found = pair_scores(encoder, batch)
    known = pairs_frame(batch, found.d)
    if absent := [name for name in columns if name not in known]:
        raise ValueError(
            f"the pairs have no column {', '.join(absent)}; they have {', '.join(map(str, known.columns))}"
        )
    caption = (batch.sigma < 0).cpu()
    frame = known[["key", "caption", "foil", "image", "side", "d", "segment"]].copy()
    frame.insert(6, "correct", frame["d"] > 0)
    frame["cosine"] = found.cosine.tolist()
    run, other = encoder.length(batch.tokens).cpu(), encoder.length(batch.other).cpu()
    frame["tokens"] = run.where(caption, other).tolist()
    frame["subject"] = Series(subject_phrases(batch.pairs), index=frame.index, dtype=object)
    frame["subject_size"] = _sizes(known)
    most = _most_frequent(frame["caption"])
    frame["most_frequent"] = frame["caption"] == most
    more = [_numbers_if_all(known[name]) for name in columns if name not in frame]
    frame = pd.concat([frame, *more], axis=1)
    features = tuple(dict.fromkeys([*FEATURES, *(name for name in columns if name not in ("subject", "side"))]))
    return Confounds(frame, features, _missing(frame, features, known), most)


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


def _sizes(known: DataFrame) -> Series:
    given = known["subject_size"] if "subject_size" in known else Series(np.nan, index=known.index)
    return pd.to_numeric(given, errors="coerce").astype("float64")


def _numbers_if_all(column: Series) -> Series:
    """Numbers, if every entry that is there is one; else the column as it is."""
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if (numbers.notna() == column.notna()).all() else column


def _most_frequent(captions: Series) -> str:
    """The caption that occurs most often, of several the first; "" where every caption occurs once."""
    counts = captions.value_counts(sort=False)
    return str(counts.idxmax()) if len(counts) and counts.max() > 1 else ""


def _missing(frame: DataFrame, features: Sequence[str], known: DataFrame) -> dict[str, str]:
    missing = {}
    for name in dict.fromkeys([*features, "subject"]):
        lacks = int(frame[name].isna().sum())
        if lacks:
            where = "" if name in known or name == "subject" else f"; the pairs have no column {name}"
            missing[name] = f"missing in {lacks} of {len(frame)} pairs{where}"
    if len(frame) and not frame["most_frequent"].any():
        missing["most_frequent"] = "every caption occurs once"
    return missing


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
