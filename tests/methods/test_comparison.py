"""Differences of two results: by hand, from resamples drawn here, and refused where there is nothing to compare."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clip_lens.core.effects import Effects, toy_effects
from clip_lens.core.record import Method, MetricRecord, Record, SourceRecord
from clip_lens.core.table import SIDES
from clip_lens.methods.compare import compare
from clip_lens.model.site import Edge, Site
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.report.report import report

KEYS, PLACES = 24, tuple(Site("resid", layer, slot=slot) for layer in (0, 1, 2) for slot in ("negator", "eot"))
RECORD = Record(
    Method("patching", "activation patching"), model="one", scale=100.0, data_digest="of the pairs", run="foil",
    source=SourceRecord("counterpart", "c", swaps=True), metric=MetricRecord(identity="l"),
)  # fmt: skip


def result(seed, **changed):
    """A made-up result on pairs of both sides, some of which have nothing at some places."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([1, -1]).repeat(KEYS // 2)
    values = drawn(len(PLACES), KEYS)
    values[2, 3:9] = torch.nan
    d = drawn(KEYS) + 5
    pairs = pd.DataFrame({
        "key": [f"p{n}" for n in range(KEYS)], "caption": "a", "foil": "b", "image": "i.png",
        "side": ["foil", "caption"] * (KEYS // 2), "sigma": sigma.tolist(), "d": d.tolist(), "segment": "correct",
    })  # fmt: skip
    return Effects(values, sigma * d, drawn(KEYS), PLACES, pairs, replace(RECORD, **changed))


def by_hand(effects, rows, weights):
    """Fraction and mean signed effect of each place over some pairs, counted so often."""
    sigma = effects.pairs["sigma"].to_numpy(dtype=float)[rows]
    found = []
    for line in effects.values.numpy()[:, rows]:
        known = ~np.isnan(line)
        w, s = weights[known], sigma[known]
        effect, total = (w * s * line[known]).sum(), (w * s * effects.total.numpy()[rows][known]).sum()
        found.append((effect / total, effect / w.sum()))
    return np.array(found)


@pytest.mark.parametrize("side", ["caption", "foil", "pooled"])
def test_the_table_is_the_difference_by_hand_with_the_same_draws_for_both(side):
    a, b = result(0), result(1, model="two")
    table = compare(a, b).table(0.9, pooled=side == "pooled", resamples=300, seed=7)
    table = table[table["side"] == side].reset_index(drop=True)
    rows = np.flatnonzero((a.pairs["side"] == side) | (side == "pooled"))
    one, two = (by_hand(effects, rows, np.ones(len(rows))) for effects in (a, b))
    for column, at in (("fraction", 0), ("effect", 1)):
        assert np.allclose(table[column], two[:, at] - one[:, at], rtol=1e-12)
        assert np.allclose(table[f"{column}_a"], one[:, at], rtol=1e-12)
        assert np.allclose(table[f"{column}_b"], two[:, at], rtol=1e-12)
    stream = np.random.default_rng([7, SIDES.index(side)])
    draws = stream.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 300)
    drawn = np.stack([by_hand(b, rows, w) - by_hand(a, rows, w) for w in draws.astype(float)])
    bounds = np.quantile(drawn, [0.05, 0.95], axis=0)
    assert np.allclose(table[["lower", "effect_lower"]], bounds[0], rtol=1e-10)
    assert np.allclose(table[["upper", "effect_upper"]], bounds[1], rtol=1e-10)
    assert table["n"].tolist() == [len(rows) - int(np.isnan(line[rows]).sum()) for line in a.values.numpy()]


def test_pairing_takes_what_both_share_out_of_the_interval():
    """What both have in common cancels pair by pair: the interval is as narrow as the difference is constant."""
    a = result(0)
    b = replace(a, values=a.values + 0.25 * a.orientation, record=replace(a.record, model="two"))
    table = compare(a, b).table(resamples=200)
    assert np.allclose(table[["effect", "effect_lower", "effect_upper"]], 0.25, rtol=1e-12)
    alone = b.table(resamples=200)
    assert (alone["effect_upper"] - alone["effect_lower"]).min() > 0.1


def test_differences_are_a_result_that_tables_and_pictures_take(tmp_path):
    a, b = result(0), result(1, model="two", scale=50.0)
    effects = compare(a, b).effects
    assert effects.values.equal(b.values - a.values) or torch.allclose(
        effects.values, b.values - a.values, equal_nan=True
    )
    assert torch.equal(effects.total, b.total - a.total) and torch.equal(effects.baseline, b.baseline - a.baseline)
    assert np.allclose(effects.pairs["d"], b.pairs["d"] - a.pairs["d"]) and list(effects.pairs["d_b"]) == list(
        b.pairs["d"]
    )
    # shares of what lies between two texts can't be subtracted: only effects are shown
    assert not effects.record.shares and effects.record.method.title == "activation patching: two minus one"
    assert "100 and 50" in " ".join(effects.record.notes)
    assert heatmap(effects, value="effect", side="foil").data[0].z.shape == (2, 3)
    table = compare(a, b).table(resamples=20)
    figure = bars(table, n=3, side="caption")
    row = table[table["side"] == "caption"].set_index("place").loc[figure.data[0].hovertext[0]]
    assert (
        figure.data[0].x[0] == row["effect"] and figure.data[0].error_x.array[0] == row["effect_upper"] - row["effect"]
    )
    page = report({"difference": effects}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "in two minus that in one" in page and "difference of the mean signed effects" in page
    effects.save(tmp_path / "difference.parquet")
    assert Effects.load(tmp_path / "difference.parquet").record == effects.record


def test_pairs_and_places_are_matched_by_what_they_are():
    a, b = result(0), result(1, model="two")
    expected = compare(a, b).effects.values
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        b, values=b.values[torch.arange(len(PLACES)).flip(0)][:, order], total=b.total[order],
        baseline=b.baseline[order], places=PLACES[::-1], pairs=b.pairs.iloc[order.numpy()],
    )  # fmt: skip
    assert torch.allclose(compare(a, shuffled).effects.values, expected, equal_nan=True)
    assert torch.equal(compare(a, shuffled).effects.total, b.total - a.total)


def test_pairs_of_one_question_are_drawn_together():
    """Six questions of four pairs each: the bounds are quantiles over draws of whole questions."""
    a, b = (
        replace(effects, pairs=effects.pairs.assign(question=[f"q{n // 4}" for n in range(KEYS)]))
        for effects in (result(0), result(1))
    )
    table = compare(a, b).table(0.9, pooled=True, resamples=200, seed=3)
    draws = np.random.default_rng([3, SIDES.index("pooled")]).multinomial(6, np.full(6, 1 / 6), 200).astype(float)
    rows = np.arange(KEYS)
    drawn = np.stack([by_hand(b, rows, w.repeat(4)) - by_hand(a, rows, w.repeat(4)) for w in draws])
    assert np.allclose(table[["effect_lower", "effect_upper"]].T, np.quantile(drawn[:, :, 1], [0.05, 0.95], axis=0))


def test_the_top_rows_have_the_largest_differences_of_each_side():
    compared = compare(result(0), result(1))
    table, top = compared.table(), compared.top(2)
    for side in ("caption", "foil"):
        sizes = table[table["side"] == side]["effect"].abs().sort_values(ascending=False)
        assert top[top["side"] == side]["effect"].abs().tolist() == sizes.tolist()[:2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": Method("direct", "direct logit attribution")}, "method: activation patching and direct logit attr"),
        ({"metric": MetricRecord("cosine", False, "cosine", "x")}, r"metric: logit \(l\) and cosine \(x\)"),
        ({"source": SourceRecord("zeros", "z")}, r"source: counterpart \(c\) and zeros \(z\)"),
        ({"source": None}, r"source: counterpart \(c\) and none"),
        ({"run": "caption"}, "run: 'foil' and 'caption'"),
        ({"data_digest": "of others"}, "data digest: 'of the pairs' and 'of others'"),
        ({"settings": {"steps": 5}}, r"settings: \{\} and \{'steps': 5\}"),
    ],
)
def test_what_differs_in_more_than_the_model_is_refused_by_name(changed, said):
    with pytest.raises(ValueError, match=f"differ in more than the model; .*{said}"):
        compare(result(0), result(1, **changed))


def test_other_pairs_and_places_are_refused_by_name():
    a, b = result(0), result(1)
    with pytest.raises(ValueError, match=r"of their pairs, 24 and 23, only the first has p3; take"):
        compare(a, b.where(key=lambda key: key != "p3"))
    with pytest.raises(ValueError, match=r"of their places, 4 and 6, only the second has resid 2 @"):
        compare(a.where(layer=[0, 1]), b)
    edge = replace(b, places=(Edge(Site("embed"), Site("out")), *PLACES[1:]))
    with pytest.raises(ValueError, match=r"only the first has resid 0 @negator; only the second has embed -> out"):
        compare(a, edge)
    foil = replace(b, pairs=b.pairs.assign(foil=["b"] * 23 + ["c"]))
    with pytest.raises(ValueError, match=r"foil differs in 1 of their pairs, such as 'p23'"):
        compare(a, foil)
    asked = lambda effects, question: replace(effects, pairs=effects.pairs.assign(question=question))
    assert (
        compare(asked(a, [None, "q"] * 12), asked(b, [float("nan"), "q"] * 12)).a.pairs["question"].notna().sum() == 12
    )
    with pytest.raises(ValueError, match=r"question differs in 24 of their pairs"):
        compare(a, asked(b, "q"))
    with pytest.raises(ValueError, match="an interval lies between 0 and 1"):
        compare(a, b).table(1.0)


def test_names_tell_two_results_of_one_model_apart():
    toy = toy_effects()
    assert compare(toy, toy).names == ("toy (a)", "toy (b)")
    assert compare(toy, toy, names=("x", "y")).effects.record.model == "y minus x"
    assert repr(compare(toy, toy, names=("x", "y"))).startswith("Comparison(y minus x: 4 places x 3 pairs; 1 caption")
