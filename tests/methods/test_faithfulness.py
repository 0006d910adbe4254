"""What circuits keep: against the oracle with every removed edge as one place, and areas and intervals by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import NAMES, handmade
from oracle import TOWERS, agree, batch_of, texts_of, tower

from clip_lens.core.effects import Effects
from clip_lens.core.metric import cosine, kl
from clip_lens.core.record import Record
from clip_lens.core.setting import Setting
from clip_lens.core.source import counterpart, mean, resample, zeros
from clip_lens.methods.circuits.circuit import Circuit, Graph, Selection
from clip_lens.methods.circuits.faithfulness import Faithfulness, _Trial, completeness, faithfulness, minimality
from clip_lens.methods.circuits.removal import Part as RemovalPart
from clip_lens.methods.circuits.removal import Removal
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import FAITHFULNESS
from clip_lens.model.site import Outside, Site

LAYERS, HEADS = 3, 4


def drawn(seed, density, name="drawn"):
    edges = Graph.of(LAYERS, HEADS).edges
    keep = edges & (torch.rand(edges.shape, generator=torch.Generator().manual_seed(seed)) < density)
    return Circuit(keep, LAYERS, HEADS, name=name)


CIRCUITS = [drawn(seed, density) for seed, density in enumerate((0.02, 0.3, 0.7, 0.98))]
FULL, EMPTY = drawn(0, 2.0), drawn(0, -1.0)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", TOWERS)
def test_a_circuits_run_is_every_other_edge_patched_by_hand(name, equal):
    effects = faithfulness(tower(name)[1], batch_of(name, equal), CIRCUITS).effects
    texts = texts_of(name, equal)
    agree(effects, [[text.effect(tuple(circuit.removed())) for text in texts] for circuit in CIRCUITS])


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_with_zeros_it_is_what_is_left_when_they_give_nothing(name):
    effects = faithfulness(tower(name)[1], batch_of(name, False), CIRCUITS, source=zeros).effects
    texts = texts_of(name, False)
    nothing = [{site: torch.zeros_like(value) for site, value in text.run.items()} for text in texts]
    both = list(zip(texts, nothing, strict=True))
    agree(effects, [[text.effect(tuple(c.removed()), source) for text, source in both] for c in CIRCUITS])


@pytest.mark.parametrize(("source", "equal", "parts"), [(None, True, False), (None, False, True), (zeros, True, True)])
def test_a_pruned_circuit_is_another_one_unless_the_source_is_a_run_on_equal_lengths(source, equal, parts):
    """Selected and pruned against two runs by hand: a head cut off from the embedding still computes, on what the
    source gives it, and that is what the source has there only where the source is a run that passes no position by."""
    encoder, batch, texts = tower("causal")[1], batch_of("causal", equal), texts_of("causal", equal)
    selected = replace(drawn(21, 0.3, "mine"), selection=Selection("top", "absolute", asked=300))
    both = [selected, selected.pruned()]
    assert 0 < len(both[1]) < len(selected)
    found = faithfulness(encoder, batch, both, source=source or counterpart)
    given = [{site: torch.zeros_like(value) for site, value in text.run.items()} if source else None for text in texts]
    each = list(zip(texts, given, strict=True))
    agree(found.effects, [[text.effect(tuple(c.removed()), nothing) for text, nothing in each] for c in both])
    apart = (found.effects.values[0] - found.effects.values[1]).abs().max() / found.effects.total.abs().max()
    assert apart > 0.01 if parts else apart < 1e-10
    assert [place.pruned for place in found.places] == [False, True]


@pytest.mark.parametrize("source", [zeros, mean])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_sets_of_edges_are_patched_like_tuples_of_them(name, source):
    encoder, batch = tower(name)[1], batch_of(name)
    circuits = [drawn(5, 0.9), drawn(6, 0.97)]
    expected = patch_effects(encoder, batch, [tuple(circuit.removed()) for circuit in circuits], source=source)
    found = faithfulness(encoder, batch, circuits, source=source).effects
    agree(found, expected.values.tolist())
    scale = expected.total.abs().max()
    assert (found.total - expected.total).abs().max() <= 1e-10 * scale
    assert found.baseline.equal(expected.baseline) and found.pairs["d"].equals(expected.pairs["d"])


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_how_many_rows_run_at_once_changes_nothing(rows):
    encoder, batch = tower("causal")[1], batch_of("causal")
    expected = faithfulness(encoder, batch, [*CIRCUITS, FULL]).effects
    agree(faithfulness(encoder, batch, [*CIRCUITS, FULL], rows=rows).effects, expected.values.tolist())


def test_circuits_of_the_same_edges_run_once(monkeypatch):
    encoder, batch, held = tower("causal")[1], batch_of("causal"), []
    expected = [faithfulness(encoder, batch, circuit).effects.values for circuit in (*CIRCUITS, EMPTY)]
    values = RemovalPart.values
    monkeypatch.setattr(RemovalPart, "values", lambda part, sets: held.append(len(sets)) or values(part, sets))
    every = [EMPTY, *CIRCUITS, EMPTY.named("again"), CIRCUITS[1], EMPTY]
    found = faithfulness(encoder, batch, every).effects
    agree(found, torch.cat([expected[n] for n in (4, 0, 1, 2, 3, 4, 1, 4)]).tolist())
    assert held == [len(CIRCUITS) + 1]


@pytest.mark.parametrize("run", ["caption", "foil"])
@pytest.mark.parametrize("name", TOWERS)
def test_everything_is_1_and_nothing_is_0(name, run):
    encoder, batch = tower(name)[1], batch_of(name, run=run)
    effects = faithfulness(encoder, batch, [FULL, EMPTY]).effects
    assert effects.values[0].abs().max() == 0
    other = patch_effects(encoder, batch, [Site("resid", LAYERS)]).total
    for empty in (effects.values[1], effects.total):
        assert (empty - other).abs().max() <= 1e-10 * other.abs().max()
    table = Faithfulness(effects).table(resamples=5)
    assert table["f"].to_numpy() == pytest.approx(np.tile([1.0, 0.0], len(table) // 2), abs=1e-9)


def test_a_pair_without_a_source_has_no_value():
    encoder, batch = tower("causal")[1], batch_of("causal")
    effects = faithfulness(encoder, batch, [FULL, EMPTY, CIRCUITS[1]], source=zeros_but_for_pair_2).effects
    assert effects.record.unsourced == 1
    assert (effects.values.isnan() == (torch.arange(len(batch)) == 2)).all() and effects.total[2].isnan()
    table = Faithfulness(effects).table(resamples=5)
    assert table.groupby("side")[["n", "dropped"]].sum().loc["pooled"].tolist() == [18, 3]
    without = faithfulness(encoder, batch[[0, 1, 3, 4, 5, 6]], [CIRCUITS[1]], source=zeros).effects
    assert torch.allclose(effects.values[2, [0, 1, 3, 4, 5, 6]], without.values[0], rtol=1e-10)
    few = Removal.of(Setting.of(encoder, batch, source=zeros_but_for_pair_2))
    assert few.n == 6 and float(few.means(EMPTY.graph.edges[None])) == pytest.approx(few.total)
    with pytest.raises(ValueError, match="nothing for any of the 7 pairs"):
        Removal.of(Setting.of(encoder, batch, source=resample(0)))


def zeros_but_for_pair_2(encoder, batch):
    def fetch(pairs, names):
        given = zeros(encoder, batch)(pairs, names)
        none = pairs == 2
        return {n: v.masked_fill(none.reshape(-1, *[1] * (v.ndim - 1)), torch.nan) for n, v in given.items()}

    return fetch


@pytest.mark.parametrize("name", NAMES)
def test_the_circuits_written_by_hand_do_everything_and_no_part_of_them_does(name):
    tower_ = handmade(name)
    whole = Circuit.of(tower_.edges, n_layers=LAYERS, n_heads=HEADS)
    parts = [Circuit.of(tower_.edges - {edge}, n_layers=LAYERS, n_heads=HEADS) for edge in tower_.edges]
    f = faithfulness(tower_.encoder, tower_.batch, [whole, *parts]).table(resamples=5)
    assert f["f"][f["edges"] == len(whole)].to_numpy() == pytest.approx(1, abs=1e-9)
    assert (f["f"][f["edges"] < len(whole)] - 1).abs().min() > 0.01


def test_a_result_says_what_was_judged_and_is_small_on_disk(tmp_path):
    encoder, batch = tower("causal")[1], batch_of("causal")
    here = replace(drawn(1, 0.3, "mine"), selection=Selection("top", "signed", 0.3))
    found = faithfulness(encoder, batch, [here, here.pruned()]).effects
    ends = (len(FULL), 0.3, "signed")
    assert found.places == (Outside("mine", len(here), *ends), Outside("mine", len(here.pruned()), *ends, True))
    assert Faithfulness(found).table()["pruned"].tolist() == [False, True] * 4
    assert found.index.iloc[0][["place", "kind"]].tolist() == [str(found.places[0]), "circuit"]
    assert found.record.method is FAITHFULNESS and found.record.settings["found_on_these_pairs"] == "none"
    same = replace(here, record=Record(batch=batch.digest))
    again = faithfulness(encoder, batch, [same]).effects.record.settings
    assert again["found_on_these_pairs"] == "mine"
    assert again["circuits"] != faithfulness(encoder, batch, CIRCUITS[:1]).effects.record.settings["circuits"]
    found.save(tmp_path / "f.parquet")
    again = Effects.load(tmp_path / "f.parquet")
    assert again.places == found.places and again.values.equal(found.values)
    assert (tmp_path / "f.parquet").stat().st_size < 40_000


def judged(values, total, side, places):
    """A result as faithfulness gives it, from numbers; every run is a caption."""
    n = range(len(side))
    text = {name: [f"{name} {i}" for i in n] for name in ("key", "caption", "foil", "image")}
    pairs = pd.DataFrame({**text, "side": side, "sigma": -1, "d": 1.0, "segment": "correct"})
    values, total = (-torch.as_tensor(x, dtype=torch.float64) for x in (values, total))
    return Effects(values, total, torch.zeros(len(side), dtype=torch.float64), places, pairs)


def curve(name, ranking, shares):
    return [Outside(name, int(share * 1000), 1000, share, ranking) for share in shares]


SHARES = (0.001, 0.1, 0.5)
SIDE = ["caption", "caption", "foil", "foil", "foil"]
TOTAL = [4.0, 6.0, 5.0, 3.0, 2.0]


def made(seed=0):
    """Two methods, either ranking, at three shares."""
    places = [p for name in ("a", "b") for ranking in ("signed", "absolute") for p in curve(name, ranking, SHARES)]
    values = np.random.default_rng(seed).normal(2, 3, (len(places), 5))
    return judged(values, TOTAL, SIDE, tuple(places)), values


def by_hand(values, columns):
    return 1 - values[:, columns].mean(1) / np.array(TOTAL)[columns].mean()


def area(f, measure):
    heights = np.append(f if measure == "CPR" else abs(1 - f), 1.0 if measure == "CPR" else 0.0)
    x = np.array([*SHARES, 1.0])
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(x)).sum())


@pytest.mark.parametrize(("side", "columns"), [("caption", [0, 1]), ("foil", [2, 3, 4]), ("pooled", [0, 1, 2, 3, 4])])
def test_f_is_a_ratio_of_means_and_the_areas_are_trapezoids(side, columns):
    effects, values = made()
    table = Faithfulness(effects).table(resamples=5)
    table = table[table["side"] == side]
    f = by_hand(values, columns)
    assert table["f"].to_numpy() == pytest.approx(f, abs=1e-12) and set(table["n"]) == {len(columns)}
    assert table["lost"].to_numpy() == pytest.approx(values[:, columns].mean(1), abs=1e-12)
    areas = Faithfulness(effects).areas(resamples=5).set_index(["circuit", "side"])
    for number, name in enumerate("ab"):
        line = areas.loc[(name, side)]
        assert line["CPR"] == pytest.approx(area(f[6 * number : 6 * number + 3], "CPR"), abs=1e-12)
        assert line["CMD"] == pytest.approx(area(f[6 * number + 3 : 6 * number + 6], "CMD"), abs=1e-12)
        assert line["n"] == len(columns) and line["points"] == 3


def test_a_circuit_that_is_perfect_at_every_size_has_all_of_cpr_and_none_of_cmd():
    places = tuple(curve("best", "signed", SHARES) + curve("best", "absolute", SHARES))
    line = Faithfulness(judged(np.zeros((6, 5)), TOTAL, SIDE, places)).areas(resamples=5).iloc[0]
    assert line["CPR"] == pytest.approx(0.999) and line["CMD"] == 0


def test_intervals_are_of_pairs_drawn_anew():
    effects, values = made()
    counts = np.random.default_rng([4, 3]).multinomial(5, np.full(5, 1 / 5), 40)  # "pooled": fewer pairs have none
    columns = [0, 1, 2, 3, 4]
    f = np.array([1 - (values[:, columns] @ row) / (np.array(TOTAL)[columns] @ row) for row in counts])
    every = Faithfulness(effects).table(resamples=40, seed=4)
    table = every[every["side"] == "pooled"]
    assert every.loc[every["side"] != "pooled", ["lower", "upper"]].isna().all().all()
    lower, upper = np.quantile(f, [0.025, 0.975], axis=0)
    assert table["lower"].to_numpy() == pytest.approx(lower) and table["upper"].to_numpy() == pytest.approx(upper)
    areas = [area(line[3:6], "CMD") for line in f]
    drawn_anew = Faithfulness(effects).areas(resamples=40, seed=4)
    assert drawn_anew.loc[drawn_anew["side"] != "pooled", ["CPR_lower", "CMD_upper"]].isna().all().all()
    line = drawn_anew.query("circuit == 'a' and side == 'pooled'").iloc[0]
    assert [line["CMD_lower"], line["CMD_upper"]] == pytest.approx(np.quantile(areas, [0.025, 0.975]))


def test_metrics_that_are_not_oriented_are_averaged_as_they_are():
    """By cosine both sides grow: `sigma * value` would cancel them in f and in the areas."""
    encoder, batch = tower("causal")[1], batch_of("causal", True, run="affirmative")
    assert len(set(batch.sigma.tolist())) == 2
    sized = [
        replace(drawn(3, 0.6, "a"), selection=Selection("top", ranking, 0.5)) for ranking in ("signed", "absolute")
    ]
    found = faithfulness(encoder, batch, sized, metric=cosine)
    f = 1 - float(found.effects.values[0].sum() / found.effects.total.sum())
    assert found.table(resamples=5).query("side == 'pooled'")["f"].tolist() == pytest.approx([f, f], abs=1e-12)
    line = found.areas(resamples=5).query("side == 'pooled'").iloc[0]
    assert line[["CPR", "CMD"]].tolist() == pytest.approx([(f + 1) / 4, abs(1 - f) / 4], abs=1e-12)


def test_f_is_nan_where_the_source_moves_nothing():
    places = tuple(curve("a", "signed", SHARES))
    found = Faithfulness(judged(np.ones((3, 5)), [0.0] * 5, SIDE, places))
    areas = found.areas(resamples=5)
    assert areas[["CPR", "CPR_lower"]].isna().all().all() and found.table(resamples=5)["f"].isna().all()


def test_a_measure_whose_ranking_is_missing_is_nan():
    effects, _ = made()
    signed = replace(effects, values=effects.values[:3], places=effects.places[:3])
    line = Faithfulness(signed).areas(resamples=5).iloc[0]
    assert np.isnan(line["CMD"]) and not np.isnan(line["CPR"])


def members_of(circuit, by):
    if by == "edge":
        return {str(edge): [edge] for edge in circuit.edges()}
    every = Circuit(circuit.graph.edges, LAYERS, HEADS).edges()
    names = [name for name in circuit.nodes()["node"] if name not in ("embed", "out")]
    return {name: [edge for edge in every if name in (str(edge.sender), owner(edge.receiver))] for name in names}


def owner(receiver):
    return f"head {receiver.layer}.{receiver.unit}" if receiver.kind in ("q", "k", "v") else str(receiver)


class ByHand:
    def __init__(self, circuit, by):
        self.texts, self.outside = texts_of("causal", True)[:1], circuit.removed()
        self.sign = batch_of("causal", True)[:1].sigma.tolist()
        self.members = members_of(circuit, by)

    def means(self, names, whole):
        removed = {edge for name in names for edge in self.members[name]} | set([] if whole else self.outside)
        if not removed:
            return 0.0
        effects = [s * text.effect(tuple(removed)) for s, text in zip(self.sign, self.texts, strict=True)]
        return sum(effects) / len(effects)


@pytest.mark.parametrize("by", ["node", "edge"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_edges_that_go_with_members_are_those_of_a_product_of_matrices(by, whole):
    circuit = drawn(9, 0.1)
    trial = _Trial.of(None, circuit, by)
    members = members_of(circuit, by)
    assert trial.members == list(members)
    touching = torch.stack([Circuit.of(e, n_layers=LAYERS, n_heads=HEADS).keep for e in members.values()])
    chosen = torch.rand(7, len(members), generator=torch.Generator().manual_seed(1)) < 0.3
    chosen[0], chosen[1] = False, True
    edges = (chosen.double() @ touching.flatten(1).double() > 0).unflatten(1, circuit.keep.shape)
    expected = edges if whole else edges | (circuit.graph.edges & ~circuit.keep)
    assert trial.removed(chosen, whole).equal(expected)


@pytest.mark.parametrize("by", ["node", "edge"])
def test_how_many_sets_are_held_at_once_changes_nothing(by, monkeypatch):
    encoder, batch, circuit, held = tower("causal")[1], batch_of("causal", True)[:1], drawn(8, 0.2), []
    whole = [f(encoder, batch, circuit, by=by, samples=3) for f in (completeness, minimality)]
    means = Removal.means
    monkeypatch.setattr(Removal, "means", lambda removal, sets: held.append(len(sets)) or means(removal, sets))
    monkeypatch.setattr("clip_lens.methods.circuits.faithfulness.at_once", lambda graph: 2)
    few = [f(encoder, batch, circuit, by=by, samples=3) for f in (completeness, minimality)]
    assert max(held) == 2 and sum(held) > 20
    for one, two in zip(whole, few, strict=True):
        one, two = (frame.sort_values(list(frame)[:1], kind="stable").select_dtypes("number") for frame in (one, two))
        assert one.abs().to_numpy().max() > 1e-3
        np.testing.assert_allclose(one.to_numpy(), two.to_numpy(), atol=1e-10)


def test_a_circuit_without_edges_has_no_members():
    encoder, batch = tower("causal")[1], batch_of("causal", True)[:1]
    assert minimality(encoder, batch, EMPTY).empty and minimality(encoder, batch, EMPTY, by="node").empty
    assert completeness(encoder, batch, EMPTY, samples=2, greedy=3)["size"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("call", [faithfulness, completeness, minimality])
def test_hooks_of_the_users_are_refused(call):
    encoder = tower("causal")[1]
    hooks = encoder.tower.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value * 0)])
    with hooks, pytest.raises(ValueError, match=r"hooks of yours on, at blocks\.0\.hook_mlp_out"):
        call(encoder, batch_of("causal", True), FULL)


@pytest.mark.parametrize("by", ["node", "edge"])
def test_completeness_is_how_far_circuit_and_model_part(by):
    circuit = drawn(9, 0.04)
    table = completeness(tower("causal")[1], batch_of("causal", True)[:1], circuit, by=by, samples=4, greedy=2)
    hand, scale = (
        ByHand(circuit, by),
        abs(faithfulness(tower("causal")[1], batch_of("causal", True)[:1], EMPTY).effects.total).max(),
    )
    assert table["found"].tolist() == ["nothing"] + ["sampled"] * 4 + ["greedy"] * 2
    assert table["size"].tolist()[0] == 0 and table["size"].tolist()[-2:] == [1, 2]
    for row in table.itertuples():
        names = row.removed.split(", ") if row.removed else []
        of_circuit, of_model = hand.means(names, whole=False), hand.means(names, whole=True)
        assert abs(row.circuit + of_circuit) <= 1e-10 * scale and abs(row.model + of_model) <= 1e-10 * scale
        assert abs(row.incompleteness - abs(of_circuit - of_model)) <= 1e-10 * scale


@pytest.mark.parametrize("by", ["node", "edge"])
def test_minimality_is_the_largest_change_that_a_member_makes(by):
    circuit = drawn(9, 0.03)
    encoder, batch = tower("causal")[1], batch_of("causal", True)[:1]
    table = minimality(encoder, batch, circuit, by=by, samples=2)
    hand, scale = ByHand(circuit, by), abs(faithfulness(encoder, batch, EMPTY).effects.total).max()
    assert sorted(table["member"]) == sorted(hand.members) and table["minimality"].is_monotonic_decreasing
    alone_changes = []
    for row in table.itertuples():
        names = row.removed.split(", ") if row.removed else []
        change = hand.means([*names, row.member], False) - hand.means(names, False)
        alone = hand.means([row.member], False) - hand.means([], False)
        assert abs(row.minimality - abs(change)) <= 1e-10 * scale and abs(row.alone - alone) <= 1e-10 * scale
        assert row.member not in names and row.minimality >= abs(row.alone) - 1e-12
        alone_changes.append(row.removed != "")
    assert any(alone_changes)  # for some member a set of others taken away says more


def test_every_edge_of_a_circuit_written_by_hand_is_needed_and_it_is_complete():
    made_ = handmade("parallel")
    circuit = Circuit.of(made_.edges, n_layers=LAYERS, n_heads=HEADS)
    assert minimality(made_.encoder, made_.batch, circuit)["share"].min() > 0.01
    assert completeness(made_.encoder, made_.batch, circuit, greedy=2)["share"].max() < 1e-9


def test_a_backup_matters_only_when_what_it_stands_in_for_is_gone():
    """By KL over a bank the change is not signed; the two ways of `parallel` are judged alike."""
    made_ = handmade("parallel")
    bank = made_.encoder([f"There are no {noun}." for noun in ("dogs", "cats")])
    circuit = Circuit.of(made_.edges, n_layers=LAYERS, n_heads=HEADS)
    table = minimality(made_.encoder, made_.batch, circuit, metric=kl(bank))
    assert (table["alone"] >= -1e-9).all() and table["minimality"].max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda encoder, batch: faithfulness(encoder, batch, []), "no circuits"),
        (lambda encoder, batch: faithfulness(encoder, batch, FULL, rows=0), "rows=0"),
        (
            lambda encoder, batch: faithfulness(encoder, batch, Circuit(Graph.of(2, 2).edges, 2, 2)),
            "2 layers x 2 heads, .* has 3 x 4",
        ),
        (lambda encoder, batch: completeness(encoder, batch, FULL, by="head"), "one of node, edge"),
        (lambda encoder, batch: faithfulness(encoder, batch, FULL).areas(), "as sized_circuits gives them"),
        (lambda encoder, batch: Faithfulness(patch_effects(encoder, batch, [Site("mlp", 0)])), "Got mlp 0"),
        (lambda encoder, batch: patch_effects(encoder, batch, [Outside("a", 1, 2)]), "give the circuit itself"),
    ],
)
def test_what_can_not_be_judged_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tower("causal")[1], batch_of("causal", True))


def test_a_share_that_comes_twice_is_refused():
    effects, _ = made()
    with pytest.raises(ValueError, match=r"0.001 of a \(signed\) comes twice"):
        Faithfulness(replace(effects, places=(effects.places[0],) * 12)).areas()
