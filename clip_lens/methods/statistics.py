"""Statistics over pairs: correlations, shares and regressions with intervals, which say why where there is none.

scipy and statsmodels are imported when something is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import atanh, sqrt, tanh
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from jaxtyping import Float
from pandas import DataFrame, Series

from clip_lens.core.effects import Effects
from clip_lens.core.table import sides_of

Method = Literal["pearson", "spearman"]
Numbers: TypeAlias = npt.ArrayLike | Series
NAN = float("nan")
FEWEST = 3  # two points always lie on a line
ROUNDING = 1e-12  # a column that varies by less, relative to its size, is constant
COLLINEAR = 1e-8  # what a standardised column must have that those before it have not
ESTIMATES = ("coefficient", "standardised", "error", "lower", "upper", "p")


class Correlation(NamedTuple):
    """A correlation coefficient `r` with its interval, the two-sided p of no correlation, the `n` pairs of numbers that
    entered, and a note: empty, or why numbers are missing."""

    r: float
    lower: float
    upper: float
    p: float
    n: int
    note: str


class Proportion(NamedTuple):
    """A share of `n` with its interval; NaN of none."""

    share: float
    lower: float
    upper: float
    n: int


def correlation(
    x: Numbers,
    y: Numbers,
    *,
    interval: float = 0.95,
    method: Method = "pearson",
    names: tuple[str, str] = ("the first", "the second"),
) -> Correlation:
    """The correlation of two lists of numbers: r, lower, upper, p, n, note.

    scipy's `pearsonr` or `spearmanr`; the interval is Fisher's, `tanh(atanh(r) +- z * se)` with se = 1 / sqrt(n - 3),
    for Spearman sqrt((1 + r^2 / 2) / (n - 3)) (Bonett and Wright 2000); with three pairs it is (-1, 1). Pairs with a
    number that is missing or infinite are left out, and `note` counts them. Where there is no correlation (fewer than
    three pairs, one list constant) the numbers are NaN and `note` says why; `names` are what it calls the two.

    Raises:
        ValueError: lists of different lengths, an interval outside of (0, 1), or an unknown method.

    Example:
        >>> [round(number, 3) for number in correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])[:5]]
        [0.8, -0.28, 0.986, 0.104, 5]
        >>> correlation([1, 1, 1], [1, 2, 3]).note
        'the first is constant'
    """
    _check_interval(interval)
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method must be 'pearson' or 'spearman'. Got {method!r}")
    first, second = _floats(x), _floats(y)
    if len(first) != len(second):
        raise ValueError(f"a correlation takes as many numbers of one as of the other. Got {len(first)}, {len(second)}")
    there = np.isfinite(first) & np.isfinite(second)
    first, second, lost = first[there], second[there], int((~there).sum())
    notes = [f"{lost} of {len(there)} without a value left out"] if lost else []
    if why := _why_none(first, second, names):
        return Correlation(NAN, NAN, NAN, NAN, len(first), "; ".join([why, *notes]))
    found = _pearson(first, second, interval) if method == "pearson" else _spearman(first, second, interval)
    return Correlation(*found, len(first), "; ".join(notes))


def _floats(numbers: Numbers) -> Float[np.ndarray, "n"]:
    return np.asarray(pd.to_numeric(Series(numbers), errors="coerce").astype("float64"))


def _why_none(first: np.ndarray, second: np.ndarray, names: tuple[str, str]) -> str:
    if len(first) < FEWEST:
        return f"{len(first)} pair{'' if len(first) == 1 else 's'}, a correlation needs {FEWEST}"
    flat = [name for name, numbers in zip(names, (first, second), strict=True) if _constant(numbers)]
    return f"{' and '.join(flat)} {'are' if len(flat) == 2 else 'is'} constant" if flat else ""


def _constant(numbers: np.ndarray) -> bool:
    return bool(np.ptp(numbers) <= ROUNDING * np.abs(numbers).max())


def _pearson(x: np.ndarray, y: np.ndarray, interval: float) -> tuple[float, float, float, float]:
    from scipy.stats import pearsonr

    with _quiet():
        result = pearsonr(x, y)
        low, high = result.confidence_interval(interval)
    return float(result.statistic), float(low), float(high), float(result.pvalue)


def _spearman(x: np.ndarray, y: np.ndarray, interval: float) -> tuple[float, float, float, float]:
    from scipy.stats import norm, spearmanr

    with _quiet():
        result = spearmanr(x, y)
    r, n = float(result.statistic), len(x)
    if n == FEWEST:
        return r, -1.0, 1.0, float(result.pvalue)
    if abs(r) >= 1:
        return r, r, r, float(result.pvalue)
    reach = float(norm.ppf((1 + interval) / 2)) * sqrt((1 + r * r / 2) / (n - 3))
    return r, tanh(atanh(r) - reach), tanh(atanh(r) + reach), float(result.pvalue)


def correlations(
    effects: Effects, column: str = "d", *, interval: float = 0.95, pooled: bool = False, method: Method = "pearson"
) -> DataFrame:
    """What each place moves, correlated over pairs with a column of `effects.pairs`: one row per place and side.

    Signed effects enter (method, section 1). Columns: those of `effects.index`, side, r, lower, upper, p, n, note, as
    `correlation` gives them; n counts columns of `values`, which after `by_slot` are not independent of each other.

    Raises:
        ValueError: no such column in `pairs`, or one without numbers.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> correlations(toy_effects(), pooled=True)[["place", "side", "r", "n"]].round(3).head(2)
                         place    side    r  n
        0  resid 0 @negator     pooled  1.0  3
        1      resid 0 @eot     pooled  NaN  3
    """
    if column not in effects.pairs:
        raise ValueError(f"no column {column!r} in the pairs; they have {', '.join(map(str, effects.pairs.columns))}")
    with_this = effects.pairs[column]
    if not pd.api.types.is_numeric_dtype(with_this):
        raise ValueError(f"the column {column!r} has {with_this.dtype} entries; a correlation needs numbers")
    signed, frames = effects.signed().double().numpy(), []
    for side in sides_of(effects.pairs, pooled):
        chosen = np.ones(len(with_this), bool) if side == "pooled" else (effects.pairs["side"] == side).to_numpy()
        how: dict[str, Any] = {"interval": interval, "method": method, "names": ("the effect", column)}
        rows = [correlation(line[chosen], with_this[chosen], **how) for line in signed]
        frames.append(pd.concat([effects.index.assign(side=side), frame_of(rows, Correlation)], axis=1))
    return pd.concat(frames, ignore_index=True)


def frame_of(rows: Sequence[NamedTuple], kind: type[NamedTuple]) -> DataFrame:
    """A DataFrame with a row per named tuple of one kind, and its columns also if there is none.

    Example:
        >>> frame_of([proportion(1, 2)], Proportion)["n"].tolist()
        [2]
    """
    return DataFrame(list(rows), columns=list(kind._fields))


def proportion(count: float, n: int, *, interval: float = 0.95) -> Proportion:
    """The share `count / n` with Wilson's score interval (Wilson 1927; statsmodels), all NaN if n is 0.

    A `count` with a fraction is fine: of two texts that count as one, one may be right.

    Raises:
        ValueError: a count below 0 or above n, or an interval outside of (0, 1).

    Example:
        >>> share = proportion(9, 10)
        >>> share.share, round(share.lower, 3), round(share.upper, 3)
        (0.9, 0.596, 0.982)
    """
    from statsmodels.stats.proportion import proportion_confint

    _check_interval(interval)
    if not 0 <= count <= n:
        raise ValueError(f"a share counts 0 to n of n. Got {count} of {n}")
    if n == 0:
        return Proportion(NAN, NAN, NAN, 0)
    low, high = proportion_confint(count, n, alpha=1 - interval, method="wilson")
    return Proportion(count / n, float(low), float(high), n)


def regression(y: Numbers, features: DataFrame, *, interval: float = 0.95, least: int = 10) -> DataFrame:
    """Ordinary least squares of `y` on every feature at once, with errors robust to unequal variance: a row per term.

    Columns: term, coefficient (change of y per unit of the feature, the others held), standardised (the same in
    standard deviations: of y per one of the feature, over the rows that enter; NaN for the intercept and where y is
    constant), error (of the coefficient; HC3; MacKinnon and White 1985; statsmodels), lower, upper, p (Student's t with
    n - terms degrees of freedom), n, r2, note. Truth values count as 0 and 1. Of a Categorical every category but the
    first that occurs becomes a term `name = category`; of a column of texts every text that occurs `least` times,
    against all the rarer ones together (or the most frequent, if none is rarer). Rows without a number in some feature
    are left out.

    A feature that is missing everywhere, constant, collinear with those before it, or together with them all that sets
    one row apart (which it would then fit exactly) has no coefficient: its row is NaN, its note says why.

    Raises:
        ValueError: `y` and the features differ in length, or an interval outside of (0, 1).

    Example:
        >>> table = regression([1, 3, 2, 5, 6, 4], DataFrame({"x": [0, 1, 0, 2, 2, 1], "flat": 1}))
        >>> table[["term", "coefficient", "standardised", "error", "note"]].round(3)
                term  coefficient  standardised  error          note
        0  intercept          1.5           NaN  0.534
        1          x          2.0         0.956  0.429
        2       flat          NaN           NaN    NaN  constant (1)
    """
    _check_interval(interval)
    target = _floats(y)
    if len(target) != len(features):
        raise ValueError(f"y has {len(target)} numbers, the features {len(features)} rows")
    numbers = {str(name): _floats(features[name]) for name in features if _is_number(features[name])}
    absent = [name for name, column in numbers.items() if not np.isfinite(column).any()]
    partly = {name: int((~np.isfinite(column)).sum()) for name, column in numbers.items() if name not in absent}
    usable = [np.isfinite(numbers[name]) for name in partly]
    rows = np.logical_and.reduce([np.isfinite(target), *usable])
    chosen = features.loc[rows, [name for name in features if str(name) not in absent]]
    design, notes = _independent(_terms(chosen, least))
    table = _fitted(target[rows], design, interval)
    lost = {name: f"missing in {count}, which are left out" for name, count in partly.items() if count}
    why = {**dict.fromkeys(absent, "missing"), **lost, **notes}
    extra = DataFrame({"term": [name for name in why if name not in design]})
    table = pd.concat([table, extra], ignore_index=True)
    table["n"], table["r2"] = int(rows.sum()), table["r2"].iloc[0]
    table["note"] = [why.get(term, note) for term, note in zip(table["term"], table["note"], strict=True)]
    return table


def _is_number(column: Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column))


def _terms(features: DataFrame, least: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each term with its column, or with the reason why it has none; the intercept first."""
    yield "intercept", np.ones(len(features))
    for name, column in features.items():
        if _is_number(column):
            yield str(name), _floats(column)
            continue
        levels = _levels(column, least)
        if not levels:
            yield str(name), _too_few_levels(column, least)
        for level in levels:
            yield f"{name} = {level}", (column == level).to_numpy(dtype=np.float64, na_value=0.0)


def _levels(column: Series, least: int) -> list[object]:
    """The levels that get a term; the others are what they are compared with."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        present = set(column.dropna())
        return [level for level in column.cat.categories if level in present][1:]
    counts = column.value_counts()
    frequent = counts[counts >= least].index.tolist()
    return sorted(frequent if counts[frequent].sum() < len(column) else frequent[1:], key=str)


def _too_few_levels(column: Series, least: int) -> str:
    seen = column.dropna().unique()
    if len(seen) == 0:
        return "missing"
    return f"constant ({seen[0]})" if len(seen) == 1 and column.notna().all() else f"no entry occurs {least} times"


def _independent(terms: Iterable[tuple[str, np.ndarray | str]]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The terms that can be told apart, and why the others can't."""
    kept: dict[str, np.ndarray] = {}
    notes: dict[str, str] = {}
    for name, column in terms:
        why = column if isinstance(column, str) else _indistinct(column, kept)
        if why:
            notes[name] = why
        else:
            kept[name] = np.asarray(column)
    return kept, notes


def _indistinct(column: np.ndarray, kept: dict[str, np.ndarray]) -> str:
    """Why a column adds nothing that can be told from the columns kept so far, or that can be tested; "" if it does."""
    if not kept or not len(column):
        return ""
    if _constant(column):
        return f"constant ({column[0]:g})"
    basis = np.stack([*kept.values()], 1)
    basis = np.linalg.qr(basis / np.linalg.norm(basis, axis=0))[0]
    centred = column - column.mean()
    centred /= np.linalg.norm(centred)
    rest = centred - basis @ (basis.T @ centred)
    if np.linalg.norm(rest) < COLLINEAR:
        return "collinear with those above"
    rest /= np.linalg.norm(rest)
    leverage = (basis**2).sum(1) + rest**2
    # A row that is fitted exactly, whatever its y is, has a residual of 0 and no error can be had from it.
    return "would fit one row exactly" if leverage.max() > 1 - COLLINEAR else ""


def _fitted(y: np.ndarray, design: dict[str, np.ndarray], interval: float) -> DataFrame:
    import statsmodels.api as sm

    table = DataFrame({"term": list(design), **dict.fromkeys(ESTIMATES, NAN), "n": len(y), "r2": NAN, "note": ""})
    if len(y) <= len(design):
        return table.assign(note=f"{len(y)} rows don't determine {len(design)} terms")
    with _quiet():
        fit = sm.OLS(y, np.stack([*design.values()], 1)).fit(cov_type="HC3", use_t=True)
        bounds = fit.conf_int(alpha=1 - interval)
        columns = (fit.params, _standardised(fit.params, y, design), fit.bse, bounds[:, 0], bounds[:, 1], fit.pvalues)
        return table.assign(**dict(zip(ESTIMATES, columns, strict=True)), r2=fit.rsquared)


def _standardised(slopes: np.ndarray, y: np.ndarray, design: dict[str, np.ndarray]) -> np.ndarray:
    """The slopes in standard deviations of y per standard deviation of the term; NaN where one of them is constant."""
    spread = np.array([NAN if _constant(column) else column.std() for column in design.values()])
    return slopes * spread / (NAN if _constant(y) else y.std())


@contextmanager
def _quiet() -> Iterator[None]:
    """What scipy and statsmodels warn about is in the numbers: an exact fit, a value that all but a few have."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _check_interval(interval: float) -> None:
    if not 0 < interval < 1:
        raise ValueError(f"interval must lie between 0 and 1, as .95 does. Got {interval}")
