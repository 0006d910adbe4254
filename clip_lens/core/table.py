"""From effects per pair to a table: sums by side, fractions, counts, and bootstrap intervals over pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.data.pairs import QUESTION, questions

SIDES = ("caption", "foil", "none", "pooled")  # "pooled" is never in `pairs`, only in tables
POINTS = ("fraction", "effect", "n", "dropped")
FEWEST = 5
"""Pairs without which there is no interval."""
BOUNDS = ("lower", "upper", "effect_lower", "effect_upper")


def units_of(pairs: DataFrame) -> tuple[Int[np.ndarray, "row"], int]:
    """What is resampled, a number for each row, and how many there are: questions, where pairs belong to some, else
    pairs.

    Example:
        >>> units_of(DataFrame({"key": ["a", "b", "c", "c"], "question": ["1", "1", None, None]}))
        (array([0, 0, 1, 1]), 2)
    """
    unit = questions(pairs[QUESTION].tolist(), pairs["key"]) if QUESTION in pairs else pairs["key"].tolist()
    codes, units = pd.factorize(np.array(unit, dtype=object))
    return codes, len(units)


class Sample(NamedTuple):
    """What a table is made of: effects and totals as they are, the pairs' key and side, the places' index, and the sign
    with which each pair counts."""

    index: DataFrame
    values: Float[Tensor, "place pair"]
    total: Float[Tensor, "pair"]
    pairs: DataFrame
    orientation: Float[Tensor, "pair"]


class Draws(NamedTuple):
    """How to resample pairs: the interval's level, how often, from which seed. Pairs of one question go together."""

    interval: float
    resamples: int
    seed: int

    def counts(self, side: str, units: Int[np.ndarray, "row"], n: int) -> Float[Tensor, "row resample"]:
        """How often each row's unit is drawn in each resample, of n; a side has a stream of its own."""
        stream = np.random.default_rng([self.seed, SIDES.index(side)])
        drawn = stream.multinomial(n, np.full(n, 1 / n), self.resamples)
        return torch.from_numpy(drawn.T.astype(np.float64)[units])


class _Sums(NamedTuple):
    """What each pair adds to a place's fraction = numerator / denominator and to its mean effect = effect / entered."""

    effect: Float[Tensor, "place key"]
    entered: Float[Tensor, "place key"]
    numerator: Float[Tensor, "place key"]
    denominator: Float[Tensor, "place key"]


def sides_of(pairs: DataFrame, pooled: bool) -> list[str]:
    """The sides that a table has, in their order; "pooled" alone where both are taken together.

    Example:
        >>> sides_of(DataFrame({"side": ["foil", "caption", "foil"]}), pooled=False)
        ['caption', 'foil']
    """
    present = set(pairs["side"])
    return ["pooled"] if pooled else [side for side in SIDES if side in present] or ["none"]


def tabulate(sample: Sample, of: str, floor: float, pooled: bool, draws: Draws | None) -> DataFrame:
    """One row per place and side: the index, side, fraction, effect, n, dropped, and with `draws` their bounds.

    Raises:
        ValueError: `of` is neither "means" nor "ratios".

    Example:
        >>> pairs, sigma = DataFrame({"key": ["a", "b"], "side": "foil"}), -torch.ones(2)
        >>> values, total = torch.tensor([[-1.0, -1.0]]), torch.tensor([-1.0, -3.0])
        >>> tabulate(Sample(DataFrame({"place": ["mlp 0"]}), values, total, pairs, sigma), "means", 0.0, False, None)
           place  side  fraction  effect  n  dropped
        0  mlp 0  foil       0.5     1.0  2        0
    """
    if of not in ("means", "ratios"):
        raise ValueError(f"of must be 'means' (a ratio of means) or 'ratios' (a mean of ratios). Got {of!r}")
    frames = [
        sample.index.assign(side=side, **_columns(sample, side, of, floor, draws))
        for side in sides_of(sample.pairs, pooled)
    ]
    return pd.concat(frames, ignore_index=True).astype({"n": np.int64, "dropped": np.int64})


def _columns(sample: Sample, side: str, of: str, floor: float, draws: Draws | None) -> dict[str, Any]:
    """One side's columns, a chunk of places at a time."""
    keys, parts = _by_chunks(sample, side, of, floor, draws.resamples if draws else 1)
    units, n = units_of(keys)
    counts = draws.counts(side, units, n) if draws and n else None
    made = [{**_points(sums, len(keys)), **(_bounds(sums, counts, draws, units) if draws else {})} for sums in parts]
    names = POINTS + BOUNDS if draws else POINTS
    return {name: torch.cat([part[name] for part in made]).numpy() for name in names}


def tabulate_differences(
    first: Sample, second: Sample, names: tuple[str, str], of: str, pooled: bool, draws: Draws
) -> DataFrame:
    """One row per place and side of two samples of the same places and pairs: fraction and effect of the second minus
    those of the first, with bounds from the same resamples of pairs for both, and each sample's own.

    Example:
        >>> pairs, one = DataFrame({"key": list("abcde"), "side": "foil"}), torch.ones(5)
        >>> first = Sample(DataFrame({"place": ["mlp 0"]}), torch.full((1, 5), 0.5), one, pairs, one)
        >>> second, draws = first._replace(values=one[None]), Draws(0.95, 3, 0)
        >>> table = tabulate_differences(first, second, ("a", "b"), "means", False, draws)
        >>> table[["effect", "effect_lower", "effect_a", "effect_b"]].iloc[0].tolist()
        [0.5, 0.5, 0.5, 1.0]
    """
    frames = []
    for side in sides_of(first.pairs, pooled):
        both = [_by_chunks(sample, side, of, 0.0, draws.resamples) for sample in (first, second)]
        keys = both[0][0]
        units, n = units_of(keys)
        counts = draws.counts(side, units, n)
        made = [_differences(two, len(keys), counts, draws, units) for two in zip(both[0][1], both[1][1], strict=True)]
        columns = {name: torch.cat([part[name] for part in made]).numpy() for name in made[0]}
        named = {
            f"{value}_{name}": columns.pop(f"{value} {at}") for at, name in enumerate(names) for value in POINTS[:2]
        }
        frames.append(first.index.assign(side=side, **columns, **named))
    return pd.concat(frames, ignore_index=True).astype({"n": np.int64, "dropped": np.int64})


def _differences(
    two: tuple[_Sums, _Sums], n_keys: int, counts: Tensor, draws: Draws, units: Int[np.ndarray, "key"]
) -> dict[str, Tensor]:
    """The columns of some places: differences with bounds, each sample's own points, and the pairs in both."""
    points = [_points(sums, n_keys) for sums in two]
    drawn = [b - a for a, b in zip(*(_estimates(sums, counts) for sums in two), strict=True)]
    few = _few(two[0], units) | _few(two[1], units)
    n = torch.stack([own["n"] for own in points]).amin(0)
    difference = {name: points[1][name] - points[0][name] for name in POINTS[:2]}
    own = {f"{name} {at}": points[at][name] for name in POINTS[:2] for at in (0, 1)}
    return {**difference, **_quantiles(drawn, few, draws), **own, "n": n, "dropped": n_keys - n}


def drawn_fractions(
    sample: Sample, side: str, of: str, floor: float, draws: Draws
) -> Float[np.ndarray, "place resample"]:
    """The fraction of every place on one side, in each resample of its pairs: those whose quantiles are its interval.

    Example:
        >>> pairs, one = DataFrame({"key": list("abcde"), "side": "foil"}), torch.ones(5)
        >>> sample = Sample(DataFrame({"place": ["mlp 0"]}), torch.full((1, 5), 0.5), one, pairs, one)
        >>> drawn_fractions(sample, "foil", "means", 0.0, Draws(0.95, 3, 0)).tolist()
        [[0.5, 0.5, 0.5]]
    """
    keys, parts = _by_chunks(sample, side, of, floor, draws.resamples)
    counts = draws.counts(side, *units_of(keys))
    return torch.cat([_estimates(sums, counts)[0] for sums in parts]).numpy()


def _by_chunks(sample: Sample, side: str, of: str, floor: float, resamples: int) -> tuple[DataFrame, Iterator[_Sums]]:
    """The pairs of a side, and what they add up to, a chunk of places at a time: that bounds memory to tens of
    MB."""
    chosen = sample.pairs if side == "pooled" else sample.pairs[sample.pairs["side"] == side]
    columns = torch.tensor(chosen.index.to_numpy(), dtype=torch.long)
    codes, keys = pd.factorize(chosen["key"])
    sign, total = sample.orientation[columns].double(), sample.total[columns].double()
    size = max(1, 2**21 // max(len(columns), resamples))
    parts = (
        _sums(values[:, columns].double() * sign, total * sign, torch.from_numpy(codes), len(keys), of, floor)
        for values in sample.values.split(size)
    )
    return chosen.drop_duplicates("key"), parts


def _sums(
    values: Float[Tensor, "place pair"], total: Float[Tensor, "pair"], codes: Tensor, n_keys: int, of: str, floor: float
) -> _Sums:
    """Sums of signed values over each key's columns; a column enters where it has a value and its total is large
    enough."""
    enters = ~values.isnan() & (total.abs() >= floor)  # a NaN total is never >= floor
    if of == "ratios":
        enters &= total != 0
    zero = torch.zeros((), dtype=torch.float64)

    def per_key(numbers: Tensor) -> Tensor:
        kept = torch.where(enters, numbers, zero)
        return kept.new_zeros(len(values), n_keys).index_add_(1, codes, kept)

    effect, count = per_key(values), per_key(torch.ones_like(total))
    if of == "ratios":
        return _Sums(effect, count, per_key(values / total), count)
    return _Sums(effect, count, effect, per_key(total))


def _points(sums: _Sums, n_keys: int) -> dict[str, Tensor]:
    fraction, effect = _estimates(sums, torch.ones(n_keys, 1, dtype=torch.float64))
    n = torch.where(fraction[:, 0].isnan(), 0, (sums.entered > 0).sum(1))
    return {"fraction": fraction[:, 0], "effect": effect[:, 0], "n": n, "dropped": n_keys - n}


def _bounds(sums: _Sums, counts: Tensor | None, draws: Draws, units: Int[np.ndarray, "key"]) -> dict[str, Tensor]:
    """The intervals' bounds; NaN where fewer than `FEWEST` units entered, of which a resample says next to nothing."""
    if counts is None or not len(sums.effect):
        return dict.fromkeys(BOUNDS, torch.full((len(sums.effect),), torch.nan, dtype=torch.float64))
    return _quantiles(_estimates(sums, counts), _few(sums, units), draws)


def _few(sums: _Sums, units: Int[np.ndarray, "key"]) -> Tensor:
    """Whether too few units entered at each place for an interval."""
    entered = torch.zeros_like(sums.entered).index_add_(1, torch.from_numpy(units), sums.entered)
    return (entered > 0).sum(1) < FEWEST


def _quantiles(drawn: Iterable[Tensor], few: Tensor, draws: Draws) -> dict[str, Tensor]:
    """The bounds of resampled fractions and effects; NaN where too few pairs entered."""
    tail = (1 - draws.interval) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    found = (bound for some in drawn for bound in some.nanquantile(levels, dim=1))
    bounds = [bound.masked_fill(few, torch.nan) for bound in found]
    return dict(zip(BOUNDS, bounds, strict=True))


def _estimates(sums: _Sums, weights: Float[Tensor, "key resample"]) -> tuple[Tensor, Tensor]:
    """Fraction and mean signed effect, [place, resample], of pairs that count `weights` times."""
    fraction = divide(sums.numerator @ weights, _weigh(sums.denominator, weights))
    return fraction, divide(sums.effect @ weights, _weigh(sums.entered, weights))


def _weigh(parts: Tensor, weights: Tensor) -> Tensor:
    """`parts @ weights`; without NaN values every place has the same denominator, and one row does for all."""
    return (parts[:1] if len(parts) and bool((parts == parts[:1]).all()) else parts) @ weights


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, NaN where nothing is divided by.

    Example:
        >>> divide(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor([0.5000,    nan])
    """
    return torch.where(denominator == 0, torch.nan, numerator / denominator)
