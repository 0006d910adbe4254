"""Effects: hand-computed fractions, signs, NaN, the bootstrap, slots, grids, filters, files."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_lens.core.effects import BOUNDS, Effects, pivot, segments, toy_effects
from clip_lens.core.record import Method, Record
from clip_lens.data.slots import SLOTS
from clip_lens.model.site import Site

EXACT = 1e-12  # the same sums in float64, in another order
NAN = float("nan")
MADE = Record(model="made by hand")


def make(values, total, sides=None, sigma=None, keys=None, places=None, dtype=torch.float64, record=MADE, **info):
    """Effects from plain lists; `places` default to the residual stream at position p of layer 0."""
    values, total = torch.tensor(values, dtype=dtype), torch.tensor(total, dtype=dtype)
    n = values.shape[1]
    sigma = sigma or [1] * n
    d = [s * t for s, t in zip(sigma, total.tolist(), strict=True)]
    pairs = pd.DataFrame(
        {
            "key": keys or [f"pair {i}" for i in range(n)],
            "caption": [f"caption {i}" for i in range(n)],
            "foil": [f"foil {i}" for i in range(n)],
            "image": [f"{i}.png" for i in range(n)],
            "side": sides or ["foil"] * n,
            "sigma": sigma,
            "d": d,
            **{"segment": ["correct"] * n, **info},
        }
    )
    places = places or tuple(Site("resid", 0, slot=p) for p in range(len(values)))
    return Effects(values, total, total * 0 + 20, places, pairs, record)


def random_effects(n_places=6, n_pairs=20, seed=0, missing=0.2, sides=("caption", "foil"), **other):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(n_places, n_pairs))
    values[generator.random(values.shape) < missing] = NAN
    side = [sides[i % len(sides)] for i in range(n_pairs)]
    sigma = [1 if s == "caption" else -1 for s in side]
    total = [s * (1 + abs(x)) for s, x in zip(sigma, generator.normal(size=n_pairs), strict=True)]
    return make(values.tolist(), total, side, sigma, **other)


def row(table, place=0, side="foil"):
    return table[table["side"] == side].iloc[place]


# Fractions and signs


def test_ratio_of_means_is_sum_over_sum_of_the_same_pairs():
    effects = make([[1.0, 3.0], [2.0, NAN]], [2.0, 8.0])
    first, second = row(effects.fraction(), 0), row(effects.fraction(), 1)
    assert (first.fraction, first.effect, first.n, first.dropped) == (0.4, 2.0, 2, 0)
    assert (second.fraction, second.effect, second.n, second.dropped) == (1.0, 2.0, 1, 1)


def test_mean_of_ratios_drops_small_totals():
    effects = make([[1.0, 4.0, 5.0]], [2.0, 16.0, 0.5])
    assert row(effects.fraction("ratios")).fraction == pytest.approx((0.5 + 0.25 + 10) / 3, rel=EXACT)
    kept = row(effects.fraction("ratios", floor=1.0))
    assert (kept.fraction, kept.effect, kept.n, kept.dropped) == (0.375, 2.5, 2, 1)
    assert row(effects.fraction("ratios", floor=0.5)).n == 3  # |total| equal to the floor stays


def test_both_sides_of_one_effect_agree_and_pool_without_cancelling():
    """The same pairs, run from the foil and from the caption: fractions equal, signed effects equal."""
    effects = make([[1.0, 2.0, -1.0, -2.0]], [2.0, 2.0, -2.0, -2.0], ["caption"] * 2 + ["foil"] * 2, [1, 1, -1, -1])
    table = effects.fraction()
    assert list(table["side"]) == ["caption", "foil"]
    assert list(table["fraction"]) == [0.75, 0.75]
    assert list(table["effect"]) == [1.5, 1.5]
    for of in ("means", "ratios"):
        pooled = effects.fraction(of, pooled=True)
        assert (list(pooled["side"]), list(pooled["fraction"]), list(pooled["n"])) == (["pooled"], [0.75], [4])


def test_signed_total_is_d():
    effects = toy_effects()
    signed = replace(effects, values=effects.total[None].repeat(4, 1)).signed()
    assert signed[0].tolist() == effects.pairs["d"].tolist()


def test_against_a_loop_over_pairs():
    effects = random_effects()
    for of in ("means", "ratios"):
        table = effects.fraction(of, floor=1.3)
        for place in range(6):
            for side in ("caption", "foil"):
                used = [
                    (s * v, s * t)
                    for v, t, s, where in zip(
                        effects.values[place].tolist(),
                        effects.total.tolist(),
                        effects.pairs["sigma"],
                        effects.pairs["side"],
                        strict=True,
                    )
                    if where == side and v == v and abs(t) >= 1.3
                ]
                means = sum(v for v, _ in used) / sum(t for _, t in used)
                ratios = sum(v / t for v, t in used) / len(used)
                found = row(table, place, side)
                assert found.fraction == pytest.approx(means if of == "means" else ratios, rel=1e-10)
                assert found.effect == pytest.approx(sum(v for v, _ in used) / len(used), rel=1e-10)
                assert (found.n, found.dropped) == (len(used), 10 - len(used))


@pytest.mark.filterwarnings("error")
def test_nothing_to_divide_by_is_nan_with_n_zero():
    effects = make([[1.0, 2.0], [NAN, NAN], [1.0, 1.0]], [0.0, 0.0])
    for of in ("means", "ratios"):
        table = effects.table(of=of, resamples=10)
        assert table[["fraction", "lower", "upper"]].isna().all(axis=None)
        assert list(table["n"]) == [0, 0, 0]
        assert list(table["dropped"]) == [2, 2, 2]
    assert effects.where(side=lambda side: side == "caption").table(resamples=5)["n"].tolist() == [0, 0, 0]
    assert row(make([[1.0]], [NAN]).fraction()).n == 0


def test_pairs_are_counted_by_key():
    effects = make([[1.0, 1.0, NAN, 2.0]], [2.0, 2.0, 2.0, 4.0], keys=["a", "a", "b", "c"])
    found = row(effects.fraction())
    assert (found.n, found.dropped, found.fraction) == (2, 1, 0.5)


# The bootstrap


def test_bootstrap_equals_a_plain_loop_with_the_same_draws():
    effects = random_effects(n_pairs=28, keys=[f"k{i // 4}-{i % 2}" for i in range(28)])
    for of in ("means", "ratios"):
        table = effects.table(0.9, of=of, resamples=60, seed=3)
        for number, side in enumerate(("caption", "foil")):
            columns = np.flatnonzero(effects.pairs["side"] == side)
            keys = list(dict.fromkeys(effects.pairs["key"][columns]))
            draws = np.random.default_rng([3, number]).multinomial(len(keys), [1 / len(keys)] * len(keys), 60)
            for place in range(6):
                fractions, means = [], []
                for draw in draws:
                    drawn = [c for c in columns for _ in range(draw[keys.index(effects.pairs["key"][c])])]
                    used = [c for c in drawn if not effects.values[place, c].isnan()]
                    sigma = effects.pairs["sigma"].to_numpy()[used]
                    v, t = effects.values[place, used].numpy() * sigma, effects.total[used].numpy() * sigma
                    means.append(v.mean() if used else NAN)
                    fractions.append(((v / t).mean() if of == "ratios" else v.sum() / t.sum()) if used else NAN)
                expected = [*np.nanquantile(fractions, [0.05, 0.95]), *np.nanquantile(means, [0.05, 0.95])]
                assert row(table, place, side)[list(BOUNDS)].tolist() == pytest.approx(expected, rel=1e-9)


def test_bootstrap_agrees_with_scipy():
    """Two independent streams of 4000 resamples: percentiles agree to a tenth of the interval's width."""
    from scipy import stats

    effects = random_effects(n_places=1, n_pairs=60, missing=0, sides=("foil",))
    found = row(effects.table(resamples=4000))
    values, total = effects.values[0].numpy(), effects.total.numpy()
    peer = stats.bootstrap(
        (values, total), lambda v, t, axis: v.sum(axis) / t.sum(axis), paired=True, method="percentile",
        n_resamples=4000, random_state=1, vectorized=True,
    ).confidence_interval  # fmt: skip
    width = peer.high - peer.low
    assert found.lower == pytest.approx(peer.low, abs=width / 10)
    assert found.upper == pytest.approx(peer.high, abs=width / 10)


def test_interval_collapses_when_all_pairs_are_equal():
    table = make([[0.5] * 8], [2.0] * 8).table(resamples=50)
    assert table[["lower", "upper"]].to_numpy().tolist() == [[0.25, 0.25]]
    assert table[["effect_lower", "effect_upper"]].to_numpy().tolist() == [[0.5, 0.5]]


def test_repeated_columns_of_a_pair_move_together():
    """Doubling every pair's column adds no information: same intervals."""
    once = random_effects(n_pairs=12, keys=[f"k{i}" for i in range(12)])
    twice = replace(
        once,
        values=once.values.repeat(1, 2),
        total=once.total.repeat(2),
        baseline=once.baseline.repeat(2),
        pairs=pd.concat([once.pairs, once.pairs]),
    )
    pd.testing.assert_frame_equal(once.table(resamples=40), twice.table(resamples=40), rtol=EXACT)


def test_an_interval_depends_neither_on_chunks_nor_on_what_else_is_there():
    effects = random_effects(n_places=50, n_pairs=10)
    whole = effects.table(resamples=100_000)  # 21 places fit a chunk
    part = effects.where(side="foil", slot=[3, 30, 49]).table(resamples=100_000)
    expected = whole[(whole["side"] == "foil") & whole["slot"].isin([3, 30, 49])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected, rtol=EXACT)
    many = random_effects(n_places=1, n_pairs=60)
    assert not many.table(seed=1)["lower"].equals(many.table(seed=2)["lower"])


def test_float32_is_summed_in_float64():
    effects = random_effects(n_pairs=40)
    single = replace(effects, values=effects.values.float(), total=effects.total.float())
    assert single.fraction()["fraction"].to_numpy() == pytest.approx(
        effects.fraction()["fraction"].to_numpy(), abs=1e-6
    )


# Slots


@dataclass
class Slots:
    slot: torch.Tensor
    slots: tuple[str, ...]
    pairs: object


def slotted(seed=0, n_pairs=5, n_pos=7):
    generator = np.random.default_rng(seed)
    slot = torch.tensor(generator.integers(-2, 3, size=(n_pairs, n_pos)))
    places = [Site("resid", layer, slot=p) for layer in (0, 2) for p in range(n_pos)] + [
        Site("head", 1, 3, p) for p in (1, 4)
    ]
    effects = random_effects(len(places), n_pairs, seed, places=tuple(places))
    return effects, Slots(slot, ("negator", "prefix", "subject", "never"), effects.pairs)


@pytest.mark.parametrize("seed", range(5))
def test_by_slot_equals_a_loop_over_pairs_and_tokens(seed):
    effects, batch = slotted(seed)
    named = effects.by_slot(batch)
    assert not any(place.slot == "never" for place in named.places)
    for n, place in enumerate(named.places):
        number = batch.slots.index(place.slot)
        for m, (key, token) in enumerate(zip(named.pairs["key"], named.pairs["token"], strict=True)):
            pair = list(effects.pairs["key"]).index(key)
            held = [p for p in range(7) if batch.slot[pair, p] == number]
            source = replace(place, slot=held[token]) if token < len(held) else None
            expected = effects.values[effects.places.index(source), pair] if source in effects.places else NAN
            assert named.values[n, m].item() == pytest.approx(float(expected), nan_ok=True, abs=0)
            assert named.total[m] == effects.total[pair] and named.baseline[m] == effects.baseline[pair]


def test_by_slot_weighs_a_slot_by_its_tokens():
    effects = make([[1.0, 1.0], [3.0, 9.0]], [4.0, 8.0])
    named = effects.by_slot(Slots(torch.tensor([[0, 0], [0, -1]]), ("subject",), effects.pairs))
    found = row(named.fraction())
    assert found.fraction == (1 + 3 + 1) / (4 + 4 + 8)
    assert (found.n, found.dropped) == (2, 0)


def test_by_slot_is_nan_where_a_slot_lies_behind_every_place():
    effects = make([[1.0, 1.0], [3.0, 9.0]], [4.0, 8.0])  # places at positions 0 and 1
    slots = Slots(torch.tensor([[0, -1, 1], [0, 0, 1]]), ("subject", "eot"), effects.pairs)
    named = effects.by_slot(slots)
    values = {place.slot: named.values[n].tolist() for n, place in enumerate(named.places)}
    assert values["subject"][0] == 1.0 and len(values["subject"]) == 3
    assert all(value != value for value in values.get("eot", [NAN]))


def test_by_slot_finds_pairs_by_key():
    effects, batch = slotted()
    some = effects.where(key=["pair 3", "pair 1"])
    whole = effects.by_slot(batch)
    torch.testing.assert_close(
        some.by_slot(batch).values, whole.where(key=["pair 3", "pair 1"]).values, equal_nan=True, rtol=0, atol=0
    )


def test_by_slot_takes_tuples_and_refuses_names():
    together = tuple((Site("attn", 0, slot=p), Site("mlp", 0, slot=p)) for p in (0, 1))
    effects = make([[1.0], [2.0]], [4.0], places=together)
    batch = Slots(torch.tensor([[0, 1]]), ("negator", "eot"), effects.pairs)
    assert effects.by_slot(batch).places[1] == (Site("attn", 0, slot="eot"), Site("mlp", 0, slot="eot"))
    with pytest.raises(ValueError, match="raw positions"):
        toy_effects().by_slot(batch)
    with pytest.raises(ValueError, match="twice"):
        make([[1.0], [2.0]], [4.0], places=(Site("mlp", 0, slot=0),) * 2).by_slot(batch)
    with pytest.raises(ValueError, match="1 pairs of the result are not in the batch"):
        effects.by_slot(Slots(batch.slot, batch.slots, SimpleNamespace(key=["another"])))


# Index, grids, localisation, top


def test_index_keeps_the_types_of_slots():
    places = (Site("mlp", 0, slot="eot"), Site("mlp", 0, slot=4), Site("head", 1, 2), (Site("mlp", 0), Site("attn", 1)))
    index = make([[1.0]] * 4, [2.0], places=places).index
    assert list(map(repr, index["slot"])) == ["'eot'", "4", "None", "None"]
    assert index["unit"].isna().tolist() == [True, True, False, True]
    assert index["layer"].tolist()[:3] == [0, 0, 1] and pd.isna(index["layer"][3])


def test_grid_orders_slots_as_the_text_and_then_positions():
    slots = [3, "eot", "zebra", 1, None, "negator", "alpha", "there"]
    effects = make([[float(n)] for n in range(8)], [1.0], places=tuple(Site("resid", 2, slot=s) for s in slots))
    grid = effects.grid()
    assert list(grid.index) == ["there", "negator", "zebra", "alpha", "eot", 1, 3, None]
    assert grid[2].tolist() == [7, 5, 2, 6, 1, 3, 0, 4]


def test_grid_holds_the_table():
    places = tuple(Site("head", layer, unit) for layer in (1, 0) for unit in (2, 0, 1))
    effects = random_effects(6, places=places)
    for value in ("fraction", "effect", "lower", "n"):
        grid = effects.grid("unit", "layer", value, side="caption", resamples=20)
        table = effects.table(resamples=20)
        for _, found in table[table["side"] == "caption"].iterrows():
            assert grid.loc[found.unit, found.layer] == found[value]
    assert grid.index.tolist() == [0, 1, 2] and grid.columns.tolist() == [0, 1]


def test_grid_axes_are_numbers_where_all_entries_are():
    places = tuple(Site("resid", layer, slot=slot) for layer in (0, 1) for slot in (2, 3, None))
    grid = make([[float(n)] for n in range(6)], [1.0], places=places).grid()
    assert grid.columns.dtype == np.int64 and grid.columns.tolist() == [0, 1]
    assert grid.index.dtype == object and grid.index.tolist() == [2, 3, None]  # not NaN


def test_grid_is_nan_where_no_place_is():
    places = (Site("mlp", 0, slot="eot"), Site("mlp", 1, slot="negator"))
    assert make([[1.0], [2.0]], [4.0], places=places).grid().isna().to_numpy().tolist() == [
        [True, False],
        [False, True],
    ]


@pytest.mark.parametrize(("known", "end"), [(7, "'6'$"), (8, "'7'$"), (9, "'7' and 1 more$"), (20, "'7' and 12 more$")])
def test_what_there_is_is_listed_up_to_eight(known, end):
    effects = make([[1.0] * known], [1.0] * known, keys=[str(n) for n in range(known)])
    with pytest.raises(ValueError, match=end):
        effects.where(key="none")


def test_grid_errors_say_what_to_choose():
    effects = make([[1.0], [2.0]], [4.0], places=(Site("mlp", 0, slot="eot"), Site("attn", 0, slot="eot")))
    with pytest.raises(ValueError, match=r"differ in kind \('mlp' and 'attn'\).*where\(kind"):
        effects.grid()
    with pytest.raises(ValueError, match="the same in every column"):
        replace(effects, places=(Site("mlp", 0),) * 2).grid()
    with pytest.raises(ValueError, match="side='caption' or side='foil'"):
        toy_effects().grid()
    with pytest.raises(ValueError, match=r"no side 'none'.*'caption', 'foil'"):
        toy_effects().grid(side="none")
    with pytest.raises(ValueError, match=r"no value 'fractoin'.*fraction, effect"):
        toy_effects().grid(value="fractoin", side="foil")
    with pytest.raises(ValueError, match="no column 'head'"):
        toy_effects().grid(rows="head", side="foil")
    with pytest.raises(TypeError, match="poold"):
        toy_effects().grid(poold=True)


def test_localisation_is_the_spread_from_negator_to_eot():
    effects = make(
        [[8.0], [1.0], [3.0], [5.0], [NAN]],
        [10.0],
        places=tuple(Site("resid", 1, slot=s) for s in ("be", "negator", "stop", "eot", "suffix")),
    )
    found = effects.localisation().iloc[0]
    assert found.localisation == pytest.approx(np.std([0.1, 0.3, 0.5]), rel=EXACT)
    assert (found.layer, found.side, found.slots) == (1, "foil", 3)
    with pytest.raises(ValueError, match="by_slot"):
        make([[1.0]], [2.0]).localisation()


def test_top_sorts_by_absolute_effect_per_side():
    effects = random_effects(n_places=9)
    top = effects.top(4, resamples=30)
    table = effects.table(resamples=30)
    for side in ("caption", "foil"):
        all_rows = table[table["side"] == side]
        expected = all_rows.loc[all_rows["effect"].abs().sort_values(ascending=False).index[:4]]
        pd.testing.assert_frame_equal(
            top.loc[top["side"] == side, list(table)].reset_index(drop=True),
            expected.reset_index(drop=True),
            rtol=EXACT,
        )
    assert len(effects.top(100, resamples=5)) == 18
    assert len(effects.top(3, pooled=True, resamples=5)) == 3


# Filters


def test_where_filters_places_and_pairs():
    places = tuple(Site("resid", layer, slot=slot) for layer in (0, 1) for slot in ("eot", 3))
    effects = random_effects(4, 6, missing=0, places=places, noun=list("xyzxyz"))
    assert effects.where(slot=3).places == (Site("resid", 0, slot=3), Site("resid", 1, slot=3))
    assert effects.where(slot=["eot", 3], layer=range(1, 4)).values.equal(effects.values[2:])
    assert effects.where(noun="x").pairs["key"].tolist() == ["pair 0", "pair 3"]
    assert effects.where(noun={"x", "z"}, side="caption").pairs["key"].tolist() == ["pair 0", "pair 2"]
    assert effects.where(d=lambda d: d > 1.5).total.tolist() == [t for t in effects.total.tolist() if abs(t) > 1.5]
    assert len(effects.where(unit=None).places) == 4
    assert len(effects.where(slot=lambda slot: slot == "nowhere").fraction()) == 0
    assert effects.where(slot=3, key=lambda key: key == key).record.selected == ()
    twice = effects.where(slot=3, noun="x", d=lambda d: d > -9).where(key=["pair 3"])
    assert twice.record.selected == (
        "d filtered, noun = x: 2 of 6 (2 x, 2 y, 2 z)",
        "key = ['pair 3']: 1 of 2 (1 pair 0, 1 pair 3)",
    )
    assert effects.where(key=["pair 3", "pair 1"]).record.selected == ("key = ['pair 3', 'pair 1']: 2 of 6",)
    assert effects.where(noun=lambda column: column.isin(["y"])).pairs["key"].tolist() == ["pair 1", "pair 4"]
    assert effects.where(slot=lambda slot: slot == "eot", layer=lambda layer: layer > 0).places == (places[2],)
    with pytest.raises(ValueError, match="one truth value per row"):
        effects.where(noun=lambda column: True)
    with pytest.raises(ValueError, match=r"no column 'nuon'.*place, kind.*noun"):
        effects.where(nuon="x")
    with pytest.raises(ValueError, match=r"no slot is 'eto'.*; there are .*'eot'"):
        effects.where(slot="eto")
    with pytest.raises(ValueError, match=r"no noun is \['q'\]; there are 'x', 'y', 'z'"):
        effects.where(noun=["q"])


def test_a_selection_says_how_many_pairs_each_segment_had():
    effects = random_effects(2, 9, segment=["correct"] * 4 + ["ambiguous"] * 3 + ["incorrect"] * 2)
    assert effects.where(segment="correct").record.selected == (
        "segment = correct: 4 of 9 (4 correct, 3 ambiguous, 2 incorrect)",
    )
    assert effects.where(segment=["correct", "ambiguous", "incorrect"]).record.selected == ()
    tokens = Slots(torch.zeros(9, 2, dtype=torch.long), ("subject",), effects.pairs)
    assert (
        effects.by_slot(tokens).where(segment="incorrect").record.selected[0].startswith("segment = incorrect: 2 of 9")
    )


# Files


def same(one, two):
    assert one.values.dtype == two.values.dtype and one.total.dtype == two.total.dtype
    for name in ("values", "total", "baseline"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0, equal_nan=True)
    assert one.places == two.places
    assert [type(site) for site in one.places] == [type(site) for site in two.places]
    assert one.record == two.record
    pd.testing.assert_frame_equal(one.pairs, two.pairs)
    pd.testing.assert_frame_equal(one.index, two.index)


PLACES = (
    Site("head", 3, 1, "eot"),
    Site("resid", 12, slot=7),
    Site("embed"),
    (Site("mlp", 0, slot="negator"), Site("attn", 1)),
    (Site("mlp", 2),),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_file_round_trip(tmp_path, dtype):
    effects = random_effects(5, 6, places=PLACES, keys=["a", "a", "a#1", "place", "kind", "é</script>"], dtype=dtype)
    effects.pairs["tokens"] = pd.Series([1, None, 3, 4, 5, 6], dtype="Int64")
    effects.pairs["size"] = [0.1, NAN, float("inf"), 1 / 3, 0.0, -1e-300]
    effects.pairs["note"] = ["x", None, "z", "", "u", "v"]
    effects.pairs["valid"] = [True, False] * 3
    effects.save(tmp_path / "e.parquet")
    same(effects, Effects.load(tmp_path / "e.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


numbers = st.floats(width=32, allow_infinity=False)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n_places=st.integers(0, 5), n_pairs=st.integers(0, 4), double=st.booleans())
def test_any_result_survives_a_file(tmp_path, data, n_places, n_pairs, double):
    dtype = torch.float64 if double else torch.float32

    def draw(strategy, n):
        return data.draw(st.lists(strategy, min_size=n, max_size=n))

    values = torch.tensor([draw(numbers, n_pairs) for _ in range(n_places)], dtype=dtype).reshape(n_places, n_pairs)
    texts = {
        name: pd.Series(draw(st.text(max_size=8), n_pairs), dtype="str") for name in ("key", "caption", "foil", "image")
    }
    rest = {
        "side": pd.Series(draw(st.sampled_from(["caption", "foil", "none"]), n_pairs), dtype="str"),
        "sigma": pd.Series(draw(st.sampled_from([-1, 1]), n_pairs), dtype="int64"),
        "d": pd.Series(draw(st.floats(allow_nan=False), n_pairs), dtype="float64"),
        "segment": pd.Series(["correct"] * n_pairs, dtype="str"),
    }
    total = torch.tensor(draw(numbers, n_pairs), dtype=dtype)
    effects = Effects(values, total, -total, PLACES[:n_places], pd.DataFrame(texts | rest), Record(notes=("é", "</b>")))
    effects.save(tmp_path / "e.parquet")
    same(effects, Effects.load(tmp_path / "e.parquet"))


def test_pandas_reads_the_file_alone(tmp_path):
    effects = random_effects(3, 4)
    effects.save(tmp_path / "e.parquet")
    frame = pd.read_parquet(tmp_path / "e.parquet")
    assert frame["place"].tolist() == ["resid 0 @0", "resid 0 @1", "resid 0 @2"]
    assert frame["slot"].tolist() == [0, 1, 2] and frame["layer"].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(frame[effects.pairs["key"]].to_numpy(), effects.values.numpy())


def test_other_files_are_refused_and_an_old_one_survives_a_failure(tmp_path):
    path = tmp_path / "e.parquet"
    effects = random_effects(3, 4)
    effects.save(path)
    whole = path.read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.parquet").write_text("no parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    for name, words in (("short", "truncated"), ("text", "truncated"), ("foreign", "not one that")):
        with pytest.raises(ValueError, match=f"{name}.parquet.*{words}"):
            Effects.load(tmp_path / f"{name}.parquet")
    with pytest.raises(FileNotFoundError):
        Effects.load(tmp_path / "none.parquet")
    effects.pairs["thing"] = pd.Series([object()] * 4, dtype=object)
    with pytest.raises(TypeError, match="Got <object"):
        effects.save(path)
    assert path.read_bytes() == whole
    assert b"clip_lens" in pq.read_schema(path).metadata


# Construction, words


def test_bad_input_is_refused():
    good = toy_effects()
    with pytest.raises(ValueError, match=r"\[4, 3\].*Got \(3, 4\)"):
        replace(good, values=good.values.T)
    with pytest.raises(ValueError, match=r"floats.*int64"):
        replace(good, values=good.values.long())
    with pytest.raises(ValueError, match="total must have one number for each of 3 pairs"):
        replace(good, total=good.total[:2])
    with pytest.raises(ValueError, match=r"sigma.*Got 0"):
        replace(good, pairs=good.pairs.assign(sigma=0))
    with pytest.raises(ValueError, match=r"side must be.*Got 'left'"):
        replace(good, pairs=good.pairs.assign(side="left"))
    with pytest.raises(ValueError, match="lacks sigma, d"):
        replace(good, pairs=good.pairs.drop(columns=["sigma", "d"]))
    with pytest.raises(ValueError, match="of must be"):
        good.fraction("median")
    with pytest.raises(ValueError, match="interval"):
        good.table(95)
    with pytest.raises(ValueError, match="resamples"):
        good.table(resamples=0)
    with pytest.raises(ValueError, match=r"choose|no column"):
        pivot(good.fraction(), "slot", "layer", "nothing")


def test_segments_include_their_lower_bound():
    assert segments([-1.01, -1.0, 0.0, 1.0, 1.01]) == ["incorrect", "ambiguous", "ambiguous", "correct", "correct"]
    assert segments(torch.tensor([0.4, 0.6]), (0.5, 0.5)) == ["incorrect", "correct"]
    with pytest.raises(ValueError, match="low <= high"):
        segments([0.0], (1.0, -1.0))
    with pytest.raises(ValueError, match="NaN for 1 of 2"):
        segments([0.0, NAN])


def test_notebook_view_escapes_and_counts():
    record = Record(Method("patch", "<i>patched</i>"), model="<script>x</script>", dropped={"no image": 2})
    effects = random_effects(3, 6, record=record)
    shown = effects._repr_html_()
    assert "<script>" not in shown and "<i>" not in shown and "2 no image" in shown and "3 caption, 3 foil" in shown
    assert "0 places" in effects.where(layer=lambda layer: layer == 9)._repr_html_()
    assert "0 pairs" in effects.where(key=lambda key: key == "none").__repr__()


def test_slots_are_in_the_order_of_the_text():
    assert SLOTS == ("sot", "prefix", "there", "be", "negator", "subject", "subject_rest", "suffix", "stop", "eot")
