"""Statistics against scipy and statsmodels called directly, against formulas written out, and where there are none."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from formulas import by_formula
from pandas import DataFrame
from statsmodels.stats.proportion import proportion_confint

from clip_lens.core.effects import toy_effects
from clip_lens.methods.statistics import correlation, correlations, proportion, regression
from clip_lens.model.site import Site


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def drawn():
    generator = np.random.default_rng(0)
    x = generator.normal(size=60)
    return x, 0.4 * x + generator.normal(size=60)


@pytest.mark.parametrize("interval", [0.95, 0.8])
def test_pearson_is_scipys(drawn, interval):
    found, expected = correlation(*drawn, interval=interval), scipy.stats.pearsonr(*drawn)
    assert found[:4] == pytest.approx(
        (expected.statistic, *expected.confidence_interval(interval), expected.pvalue), abs=1e-15
    )
    assert (found.n, found.note) == (60, "")


def test_spearman_is_scipys_with_an_interval_by_hand(drawn):
    found, expected = correlation(*drawn, method="spearman"), scipy.stats.spearmanr(*drawn)
    assert (found.r, found.p) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-15)
    reach = 1.959963984540054 * np.sqrt((1 + found.r**2 / 2) / 57)
    middle = np.arctanh(found.r)
    assert np.arctanh([found.lower, found.upper]) == pytest.approx([middle - reach, middle + reach], abs=1e-12)


def test_missing_numbers_are_left_out_and_counted(drawn):
    x, y = (numbers.copy() for numbers in drawn)
    x[3], y[7], y[8] = np.nan, np.inf, np.nan
    kept = np.isfinite(x) & np.isfinite(y)
    found = correlation(x, y)
    assert found.n == 57 and found.note == "3 of 60 without a value left out"
    assert found.r == pytest.approx(scipy.stats.pearsonr(x[kept], y[kept]).statistic, abs=1e-15)
    assert correlation([1, None, 3, 4], pd.Series([True, True, False, True])).n == 3


@pytest.mark.parametrize(
    ("x", "y", "n", "note"),
    [
        ([1, 1, 1, 1], [1, 2, 3, 4], 4, "the first is constant"),
        ([1, 2, 3, 4], [0.3] * 4, 4, "the second is constant"),
        ([0.1] * 4, [0.2] * 4, 4, "the first and the second are constant"),
        ([1e8 + step * 1e-9 for step in range(4)], [1, 2, 3, 4], 4, "the first is constant"),
        ([1, 2], [1, 2], 2, "2 pairs, a correlation needs 3"),
        ([], [], 0, "0 pairs, a correlation needs 3"),
        ([np.nan, 2, 3], [1, np.nan, 3], 1, "1 pair, a correlation needs 3; 2 of 3 without a value left out"),
    ],
)
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_where_there_is_none_the_note_says_why(x, y, n, note, method):
    found = correlation(x, y, method=method)
    assert np.isnan(found[:4]).all() and (found.n, found.note) == (n, note)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_short_and_perfect_lists_have_the_widest_and_the_narrowest_interval(method):
    assert correlation([1, 2, 3], [1, 3, 2], method=method)[1:3] == (-1, 1)
    assert correlation([1, 2, 3, 4], [2, 4, 6, 8], method=method)[:3] == pytest.approx((1, 1, 1))


def test_a_correlation_refuses_what_it_cant_compare():
    with pytest.raises(ValueError, match="Got 3, 2"):
        correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="between 0 and 1"):
        correlation([1, 2, 3], [1, 2, 3], interval=95)
    with pytest.raises(ValueError, match="'kendall'"):
        correlation([1, 2, 3], [1, 2, 3], method="kendall")


@pytest.fixture(scope="module")
def effects():
    """Two places, 30 pairs of both sides and signs; the second place has a hole."""
    toy, generator = toy_effects(), torch.Generator().manual_seed(0)
    d = torch.randn(30, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    values[1, 4] = torch.nan
    pairs = toy.pairs.iloc[[0] * 30].assign(key=range(30), d=d.numpy())
    pairs["side"] = ["caption", "foil", "foil"] * 10
    pairs["sigma"] = [1, -1] * 15
    places = (Site("mlp", 0), Site("mlp", 1))
    return type(toy)(values, d, d, places, pairs)


def test_correlations_are_scipys_per_place_and_side_of_signed_effects(effects):
    table = correlations(effects)
    assert list(table.columns) == [*effects.index.columns, "side", "r", "lower", "upper", "p", "n", "note"]
    assert list(zip(table.place, table.side, strict=True)) == [
        (place, side) for side in ("caption", "foil") for place in ("mlp 0", "mlp 1")
    ]
    for row in table.itertuples():
        chosen = (effects.pairs.side == row.side).to_numpy()
        x = (effects.values[row.layer] * torch.tensor([1.0, -1.0] * 15)).numpy()[chosen]
        y = effects.pairs.d.to_numpy()[chosen]
        expected = scipy.stats.pearsonr(x[~np.isnan(x)], y[~np.isnan(x)])
        assert (row.r, row.p) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-14)
        assert (row.lower, row.upper) == pytest.approx(tuple(expected.confidence_interval()), abs=1e-14)
        assert row.n == len(x) - np.isnan(x).sum()


def test_correlations_pooled_and_with_another_column(effects):
    other = effects.pairs.assign(size=effects.pairs.d**2)
    table = correlations(type(effects)(effects.values, effects.total, effects.total, effects.places, other), "size")
    pooled = correlations(effects, pooled=True)
    assert list(pooled.side) == ["pooled"] * 2 and list(pooled.n) == [30, 29]
    assert (table.r - correlations(effects).r).abs().min() > 1e-3
    with pytest.raises(ValueError, match="no column 'sise'"):
        correlations(effects, "sise")
    with pytest.raises(ValueError, match="needs numbers"):
        correlations(effects, "caption")


def test_correlations_of_no_pairs_are_empty_rows(effects):
    table = correlations(effects.where(key=lambda key: key == ""))
    assert table.r.isna().all() and set(table.n) == {0} and len(table) == 2


@pytest.mark.parametrize(("count", "n"), [(0, 5), (5, 5), (64, 100), (1, 1)])
def test_a_share_has_wilsons_interval(count, n):
    found = proportion(count, n, interval=0.9)
    z, share = scipy.stats.norm.ppf(0.95), count / n
    middle, reach = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    by_hand = (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)
    assert found[:3] == pytest.approx((share, *by_hand), abs=1e-12)
    assert found[1:3] == pytest.approx(proportion_confint(count, n, alpha=0.1, method="wilson"), abs=1e-12)


def test_a_share_of_nothing_is_nan_and_of_less_than_nothing_an_error():
    assert np.isnan(proportion(0, 0)[:3]).all() and proportion(0, 0).n == 0
    for count, n in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="0 to n of n"):
            proportion(count, n)


@pytest.fixture(scope="module")
def features():
    generator = np.random.default_rng(1)
    frame = DataFrame({"size": generator.random(40), "flag": generator.random(40) > 0.5})
    frame["side"] = pd.Categorical(generator.choice(["caption", "foil"], 40), ["caption", "foil", "none"])
    frame["subject"] = ["dog"] * 15 + ["cat"] * 12 + ["cow", "pig", None] + ["horse"] * 10
    return frame


@pytest.fixture(scope="module")
def y(features):
    generator = np.random.default_rng(2)
    return 2 * features["size"].to_numpy() + (features["subject"] == "cat") + generator.normal(size=40)


def dummies(features):
    columns = [np.ones(len(features)), features["size"], features["flag"], features["side"] == "foil"]
    return np.stack([*columns, *(features["subject"] == name for name in ("cat", "dog", "horse"))], 1).astype(float)


def test_regression_is_least_squares_with_hc3_by_formula(features, y):
    table = regression(y, features, interval=0.9)
    names = ["intercept", "size", "flag", "side = foil", "subject = cat", "subject = dog", "subject = horse"]
    assert list(table.term) == names and set(table.n) == {40} and set(table.note) == {""}
    expected, r2 = by_formula(y, dummies(features), 0.9)
    found = table[["coefficient", "error", "lower", "upper", "p"]].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert table.r2.to_numpy() == pytest.approx([r2] * 7, abs=1e-12)


def test_features_without_information_are_named_and_left_out(features, y):
    more = features.assign(
        gone=np.nan, empty=None, flat=3, once=[0.0] * 39 + [1.0], twice=2 * features["size"] + 1, word="dog"
    )
    table = regression(y, more, least=13).set_index("term")
    assert list(table.index[:4]) == ["intercept", "size", "flag", "side = foil"]
    assert table.note[table.note != ""].to_dict() == {
        "gone": "missing",
        "empty": "missing",
        "flat": "constant (3)",
        "once": "would fit one row exactly",
        "twice": "collinear with those above",
        "word": "constant (dog)",
    }
    assert table.loc[table.note != "", "coefficient"].isna().all()
    expected = by_formula(y, dummies(features)[:, [0, 1, 2, 3, 5]])[0]
    found = table.loc[table.note == "", ["coefficient", "error", "lower", "upper", "p"]]
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-9, atol=1e-12)


def test_two_features_that_together_set_one_row_apart():
    """Of the rows with x only one is without z: HC3 would divide by 0 there."""
    frame = DataFrame({"x": [1, 1, 1, 0, 0, 0, 0, 0], "z": [1, 1, 0, 0, 0, 0, 0, 0]})
    y = [3.0, 4.0, 2.0, 1.0, 2.0, 0.0, 1.0, 3.0]
    table = regression(y, frame)
    assert table.note.tolist() == ["", "", "would fit one row exactly"]
    expected = by_formula(np.array(y), np.stack([np.ones(8), frame.x], 1))[0]
    np.testing.assert_allclose(table.error[:2], expected[:, 1], rtol=1e-9)


def test_rows_without_a_number_are_left_out_and_counted(features, y):
    holes = features.assign(size=features["size"].where(np.arange(40) % 8 > 0))
    table = regression(y, holes.drop(columns="subject")).set_index("term")
    kept = np.arange(40) % 8 > 0
    assert table.note["size"] == "missing in 5, which are left out" and set(table.n) == {35}
    expected = by_formula(y[kept], dummies(features)[kept][:, :4])[0]
    np.testing.assert_allclose(table["error"], expected[:, 1], rtol=1e-9)


def test_too_few_rows_and_texts_that_all_differ_are_said():
    few = regression(range(4), DataFrame({"a": [1, 2, 4, 4], "b": [2, 1, 1, 2], "c": [0, 5, 1, 5], "d": list("wxyz")}))
    assert list(few.term) == ["intercept", "a", "b", "c", "d"]
    assert list(few.coefficient.notna()) == [True, True, True, False, False]
    assert list(few.note[3:]) == ["would fit one row exactly", "no entry occurs 10 times"]
    assert set(regression([1.0], DataFrame({"a": [1]})).note) == {"1 rows don't determine 1 terms", "constant (1)"}
    assert len(regression([], DataFrame({"a": []}))) == 2
    with pytest.raises(ValueError, match="y has 2 numbers, the features 1 rows"):
        regression([1, 2], DataFrame({"a": [1]}))
