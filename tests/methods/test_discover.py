"""Circuits found on one split and judged on the other: the parts are the functions' own, and nothing runs twice."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import handmade
from towers import random_encoder, random_store

import clip_lens
from clip_lens.core.effects import Effects
from clip_lens.core.keep import Keep
from clip_lens.core.record import Method
from clip_lens.data.pairs import Pairs
from clip_lens.methods.circuits import discover as module
from clip_lens.methods.circuits import finders
from clip_lens.methods.circuits.circuit import Circuit, Graph, random_circuit
from clip_lens.methods.circuits.discover import agreement, discover
from clip_lens.methods.circuits.faithfulness import faithfulness
from clip_lens.methods.circuits.selection import SHARES, random_sizes, sized_circuits, stability, top_edges
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects

EDGES = 15


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(module, "BASELINES", 2)
    monkeypatch.setattr(module, "RESAMPLES", 10)


@pytest.fixture(scope="module")
def tower():
    """A small random tower and twelve pairs of six images, split; of each noun both orders, not at the same image."""
    encoder = random_encoder(layers=2, heads=2, width=32, dtype=torch.float64)
    nouns = ("dogs", "cats", "cars", "trees", "birds", "boats")
    texts = [(f"There are no {noun}.", f"There are some {noun}.") for noun in nouns]
    captions, foils = zip(*(pair[::turn] for pair in texts for turn in (1, -1)), strict=True)
    pairs = Pairs([str(n) for n in range(12)], captions, foils, [f"{n % 6}.png" for n in range(12)])
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")
    return encoder, *batch.split()


def test_a_split_parts_a_batch_as_it_parts_its_pairs(tower):
    _, found, judged = tower
    assert not set(found.pairs.image) & set(judged.pairs.image) and len(found) + len(judged) == 12
    whole = clip_lens.read_pairs()[:20]
    batch = clip_lens.align(whole, clip_lens.ImageStore.open("tiny"), clip_lens.load())
    for ours, theirs in zip(batch.split(0.3, 2), batch.pairs.split(0.3, 2), strict=True):
        assert ours.pairs == theirs and len(ours.tokens) == len(theirs)


@pytest.mark.parametrize(
    ("method", "run", "options"),
    [
        ("exact", patch_effects, {}),
        ("eap", gradient_effects, {}),
        ("eap-ig", gradient_effects, {"steps": 3}),
    ],
)
def test_its_parts_are_what_the_functions_give(tower, method, run, options):
    encoder, found, judged = tower
    done = discover(encoder, found, judged, method=method, edges=EDGES, steps=3, exact=True, seed=4)
    scores = run(encoder, found, encoder.edges(), **options)
    torch.testing.assert_close(done.scores.values, scores.values)
    top = top_edges(scores, EDGES)
    assert done.circuit.keep.equal(top.keep) and done.circuit.selection == top.selection
    circuits = [circuit for signed in (True, False) for circuit in sized_circuits(scores, signed=signed)]
    judge = faithfulness(encoder, judged, circuits)
    own = [row for row, place in enumerate(done.judged.places) if place.circuit == done.name]
    torch.testing.assert_close(done.judged.effects.values[own], judge.effects.values)
    assert all(place.pruned for place in done.judged.places)
    pd.testing.assert_frame_equal(
        done.areas[done.areas["circuit"] == done.name].drop(columns="circuit").reset_index(drop=True),
        judge.areas(seed=4).drop(columns="circuit"),
    )
    verdict = faithfulness(encoder, judged, [top, top.pruned()]).table(seed=4)
    same = done.verdict[done.verdict["circuit"] == done.name].reset_index(drop=True)
    pd.testing.assert_frame_equal(same.drop(columns="circuit"), verdict.drop(columns="circuit"))
    pd.testing.assert_frame_equal(done.stability, stability(scores, [EDGES], resamples=10, seed=4))
    torch.testing.assert_close(done.exact.values, patch_effects(encoder, judged, encoder.edges()).values)
    row = done.summary.iloc[-1]
    assert row["side"] == "pooled" and row["edges"] == EDGES and row["pairs"] == len(judged)
    assert row["edges_pruned"] == len(top.pruned())
    for form in (False, True):
        line = verdict[(verdict["side"] == "pooled") & (verdict["pruned"] == form)].iloc[0]
        chance = done.verdict.query(f"circuit != {done.name!r} and side == 'pooled' and pruned == {form}")["f"]
        ending = "_pruned" if form else ""
        for name in ("f", "lower", "upper"):
            assert row[f"{name}{ending}"] == pytest.approx(line[name], rel=1e-9)
        assert row[f"random_f{ending}"] == pytest.approx(chance.mean()) and len(chance) == 2
    assert (
        row["CMD"] == done.areas[(done.areas["circuit"] == done.name) & (done.areas["side"] == "pooled")]["CMD"].item()
    )
    chance = done.areas[(done.areas["circuit"] != done.name) & (done.areas["side"] == "pooled")]
    assert row["random_CPR"] == pytest.approx(chance["CPR"].mean()) and len(chance) == 2


def test_agreement_is_numpys_correlation_of_the_means_per_side(tower):
    encoder, found, judged = tower
    exact, estimate = patch_effects(encoder, judged, encoder.edges()), gradient_effects(encoder, found, encoder.edges())
    shuffled = replace(estimate, values=estimate.values.flip(0), places=estimate.places[::-1])
    table = agreement(exact, shuffled).set_index("side")
    assert list(table.index) == ["caption", "foil", "pooled"] and set(table["edges"]) == {len(encoder.edges())}
    for side in ("caption", "foil"):
        one, two = (effects.where(side=side).signed().mean(1).numpy() for effects in (exact, estimate))
        assert table.loc[side, "r"] == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-12)
    both = np.corrcoef(exact.signed().mean(1).numpy(), estimate.signed().mean(1).numpy())[0, 1]
    assert table.loc["pooled", "r"] == pytest.approx(both, abs=1e-12)
    with pytest.raises(ValueError, match="no edge in common"):
        agreement(replace(exact, values=exact.values[:1], places=exact.places[:1]), replace(
            estimate, values=estimate.values[1:2], places=estimate.places[1:2]))  # fmt: skip


def test_random_circuits_are_nested_of_the_sizes_asked_for_and_of_no_scores(tower):
    encoder, found, judged = tower
    n = len(encoder.edges())
    sizes = random_sizes(encoder, 3)
    assert [circuit.selection.share for circuit in sizes] == list(SHARES)
    whole = [random_circuit(Circuit(first_edges(encoder, int(share * n)), 2, 2), 3) for share in SHARES]
    for circuit, drawn in zip(sizes, whole, strict=True):
        assert len(drawn) == int(circuit.selection.share * n) and circuit.keep.equal(drawn.pruned().keep)
    assert all(len(a - b) == 0 for a, b in pairwise(whole))
    done = discover(encoder, found, judged, method="random", edges=EDGES, seed=5)
    assert done.scores is None and done.name == "random(5)" and done.stability.empty
    assert set(done.areas["circuit"]) == {"random(5)", "random(6)", "random(7)"}
    assert done.areas[["CPR", "CMD"]].notna().all().all()
    full = done.curve[done.curve["share"] == 1.0]
    assert full["f"].to_numpy() == pytest.approx(1.0, abs=1e-9)


def first_edges(encoder, n):
    graph = Graph.of(encoder.n_layers, encoder.n_heads)
    keep = torch.zeros_like(graph.edges)
    rows, columns = graph.edges.nonzero()[:n].T
    keep[rows, columns] = True
    return keep


def test_a_result_says_how_the_pairs_were_held_out_and_which_judged_texts_were_found_on(tower):
    encoder, found, judged = tower
    nouns = [text.split()[-1] for text in judged.pairs.caption]
    pairs = Pairs(
        ["new", "again", "turned"],
        ["There are no kites.", "There are no kites.", f"There are some {nouns[0]}"],
        ["There are some kites.", found.pairs.foil[0], "There are some kites."],
        ["k.png", "l.png", "m.png"],
    )
    batch = clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")
    assert nouns[0] not in " ".join(found.pairs.caption)
    done = discover(encoder, found, batch, method="eap", edges=EDGES)
    assert done.repeated == 1 and set(done.summary["repeated"]) == {1}
    assert repr(done).endswith("judged on 3, 1 of them with a text that it was found on)")
    halves = batch_of_both(tower).split(by="text")
    apart = discover(encoder, *halves, method="eap", edges=EDGES)
    assert (apart.repeated, apart.held_out) == (0, "by text") and set(apart.summary["held_out"]) == {"by text"}
    assert apart.circuit.record.held_out == "by text" and repr(apart).endswith("held out by text)")


def batch_of_both(tower):
    encoder, found, judged = tower
    texts = [
        [*getattr(found.pairs, name), *getattr(judged.pairs, name)] for name in ("key", "caption", "foil", "image")
    ]
    pairs = Pairs(*texts)
    return clip_lens.align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")


def test_a_finder_of_ones_own_is_one_entry(tower, monkeypatch):
    encoder, found, judged = tower
    everything = lambda setting, options: Circuit.full(setting.encoder).named("everything")
    mine = finders.Finder(Method("mine", "mine"), search=everything)
    monkeypatch.setitem(finders.FINDERS, "mine", mine)
    done = discover(encoder, found, judged, method="mine", edges=EDGES)
    assert done.name == "everything" and done.method is mine.method
    assert done.summary["f"].to_numpy() == pytest.approx(1.0, abs=1e-9)


def test_a_finder_says_how_it_finds():
    empty = finders.Finder(Method("mine", "mine"))
    with pytest.raises(TypeError, match="'mine' has neither a score nor a search"):
        empty.circuit(None, finders.Options(), None, None)
    assert all((finder.score is None) != (finder.search is None) for finder in finders.FINDERS.values())
    assert [finder.file(finders.Options()) for finder in finders.FINDERS.values()] == [
        "exact-200", "eap-200", "eap-ig-200", "eap-ig-certain-200", "eap-ig-both-ends-200", "eap-ig-nodes-200",
        "eap-ig-loss-200", "acdc-0.02", "learned-200", "random-200",
    ]  # fmt: skip


def test_either_form_of_the_circuit_is_judged(tower):
    """From zeros they part: a pruned circuit's f is another number."""
    encoder, found, judged = tower
    apart, same = (
        discover(encoder, found, judged, method="random", edges=8, source=source).summary.iloc[-1]
        for source in (clip_lens.zeros, clip_lens.counterpart)
    )
    assert apart["edges_pruned"] == same["edges_pruned"] < 8 == same["edges"]
    assert abs(apart["f_pruned"] - apart["f"]) > 0.01
    assert same["f_pruned"] == pytest.approx(same["f"], abs=1e-9)


def test_acdc_has_a_circuit_and_no_areas(tower):
    encoder, found, judged = tower
    done = discover(encoder, found, judged, method="acdc", threshold=0.5)
    assert done.circuit.keep.equal(clip_lens.acdc(encoder, found, 0.5).keep)
    assert done.summary[["CPR", "CMD", "jaccard", "r"]].isna().all().all()
    own = done.curve[done.curve["circuit"] == "ACDC"]
    assert len(own) == 2 * 3 and set(own["ranking"]) == {"signed", "absolute"}


@pytest.mark.parametrize("method", ["exact", "eap", "eap-ig"])
def test_a_tower_whose_circuit_is_known_gives_it(method):
    tower = handmade("parallel")
    half = len(tower.batch) // 2
    splits = tower.batch[:half], tower.batch[half:]
    done = discover(tower.encoder, *splits, method=method, edges=len(tower.edges))
    assert set(done.circuit.edges()) == tower.edges
    own = done.verdict[done.verdict["circuit"] == done.name]
    assert own["f"].to_numpy() == pytest.approx(1.0, abs=1e-8)


def test_what_is_finished_is_not_computed_again(tower, tmp_path, monkeypatch):
    encoder, found, judged = tower
    common, files = Keep(tmp_path), {"exact": f"exact-{EDGES}", "acdc": "acdc-0.02"}
    how = {"edges": EDGES, "exact": True, "shared": common}
    first = {m: discover(encoder, found, judged, method=m, keep=Keep(tmp_path / m), **how) for m in ("exact", "acdc")}

    def computed(*_, **__):
        raise AssertionError("computed again")

    for where, name in ((finders, "patch_effects"), (finders, "acdc"), (module, "faithfulness"), (module, "stability")):
        monkeypatch.setattr(where, name, computed)
    for method, done in first.items():
        again = discover(encoder, found, judged, method=method, keep=Keep(tmp_path / method), **how)
        pd.testing.assert_frame_equal(again.summary, done.summary)
        assert Circuit.load(tmp_path / method / f"circuit-{files[method]}.json").jaccard(done.circuit) == 1.0
        saved = pd.read_csv(tmp_path / method / f"summary-{files[method]}-exact.csv")
        assert saved["f"].to_numpy() == pytest.approx(done.summary["f"].to_numpy())
    assert (tmp_path / "exact" / f"stability-{files['exact']}.parquet").exists()
    assert Effects.load(tmp_path / "exact" / "scores-exact.parquet").values.equal(first["exact"].scores.values)
    with pytest.raises(AssertionError, match="computed again"):
        discover(encoder, found, judged, method="acdc", threshold=0.7, keep=Keep(tmp_path / "acdc"), **how)
    with pytest.raises(ValueError, match=r"another result: .*batch"):
        discover(encoder, found[:4], judged, method="exact", keep=Keep(tmp_path / "exact"), **how)
    with pytest.raises(ValueError, match=r"another circuit: .*batch"):
        discover(encoder, found[:4], judged, method="acdc", keep=Keep(tmp_path / "acdc"), **how)
    with pytest.raises(AssertionError, match="computed again"):
        again = Keep(tmp_path / "acdc", overwrite=True)
        discover(encoder, found[:4], judged, method="acdc", keep=again, **how)


def test_an_interrupted_sweep_goes_on_with_its_next_part(tower, tmp_path, monkeypatch):
    encoder, found, judged = tower
    monkeypatch.setattr("clip_lens.core.keep.PART", 20 * len(found))
    sizes = []

    def interrupted(encoder, batch, places, **how):
        sizes.append(len(places))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return patch_effects(encoder, batch, places, **how)

    monkeypatch.setattr(finders, "patch_effects", interrupted)
    with pytest.raises(KeyboardInterrupt):
        discover(encoder, found, judged, method="exact", edges=EDGES, keep=Keep(tmp_path))
    done = discover(encoder, found, judged, method="exact", edges=EDGES, keep=Keep(tmp_path))
    assert sum(sizes) == len(encoder.edges()) + 20  # the part that was interrupted, once more
    torch.testing.assert_close(done.scores.values, patch_effects(encoder, found, encoder.edges()).values)


def test_what_does_not_fit_is_refused_before_anything_runs(tower):
    encoder, found, judged = tower
    with pytest.raises(ValueError, match=r"there are exact, eap, eap-ig, .*acdc, learned, random"):
        discover(encoder, found, judged, method="EAP")
    with pytest.raises(ValueError, match="edges to select from"):
        discover(encoder, found, judged, edges=10**6)
    with pytest.raises(ValueError, match="in both splits"):
        discover(encoder, found, found[:2], edges=EDGES)
    with pytest.raises(ValueError, match="run='caption' and 'foil'"):
        discover(encoder, found, judged.flip(), edges=EDGES)


@pytest.mark.slow
def test_what_the_methods_are_worth_on_the_embedded_model(tmp_path):
    """Found on 150 pairs, judged on 150 others that share no text, captions run; in comments what was measured.

    Exact scores agree with themselves on other pairs with r = .98 and .91: that is as far as an estimate can come.
    Single edges are far from linear here: of the negation in the foil they say little, since the negator is read
    through queries, keys and values together, and the gradients along the line, where all move together, say much. So
    EAP-IG is the worse estimate of single edges there, and the better order for circuits when edges are ranked signed.
    """
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    halves = clip_lens.align(clip_lens.read_pairs(), store, encoder, run="caption").split(by="text")
    found, judged = (half[:150] for half in halves)
    how = {"keep": None, "shared": Keep(tmp_path), "exact": True, "progress": False}
    ig, eap = (discover(encoder, found, judged, method=method, **how) for method in ("eap-ig", "eap"))
    r = {done.method.key: done.agreement.set_index("side")["r"] for done in (ig, eap)}
    assert r["eap-ig"]["caption"] > 0.8 > r["eap"]["caption"] + 0.2  # .85, .47
    assert r["eap"]["foil"] > 0.75 > r["eap-ig"]["foil"] + 0.2  # .82, .34
    worth = {done.method.key: done.summary.set_index("side").loc["pooled"] for done in (ig, eap)}
    assert worth["eap-ig"]["CPR"] > 0.7 > worth["eap"]["CPR"] + 0.4  # .76, .25
    assert worth["eap-ig"]["CMD"] < 0.27 < worth["eap"]["CMD"] - 0.03  # .23, .32
    assert worth["eap"]["CMD"] < worth["eap"]["random_CMD"] - 0.3  # .72
    assert ig.repeated == 0 and ig.held_out == "by text"
    exact = patch_effects(encoder, found, encoder.edges(), progress=False)
    assert stability(exact, 100)["jaccard"].item() > 0.78  # .80
    most = gradient_effects(encoder, halves[0], encoder.edges(), steps=5, progress=False)
    assert stability(most, 100)["jaccard"].item() > 0.85  # .87 on 600 pairs


@pytest.mark.parametrize("method", ["eap-ig-certain", "eap-ig-both-ends", "eap-ig-nodes", "eap-ig-loss"])
def test_other_rules_choose_by_the_scores_they_name(tower, method, tmp_path):
    encoder, found, judged = tower
    finder = finders.FINDERS[method]
    done = discover(encoder, found, judged, method=method, edges=EDGES, steps=3, keep=Keep(tmp_path))
    measure = finders.loss_of(clip_lens.logit) if method == "eap-ig-loss" else clip_lens.logit
    scores = gradient_effects(encoder, found, encoder.edges(), steps=3, metric=measure)
    torch.testing.assert_close(done.scores.values, scores.values)
    assert done.circuit.keep.equal(top_edges(scores, EDGES, **finder.choose).keep)
    assert done.name == finder.method.title and not done.areas[done.areas["circuit"] == done.name].empty
    named = "scores-eap-ig-loss.parquet" if method == "eap-ig-loss" else "scores-eap-ig.parquet"
    assert (tmp_path / named).exists()


def test_the_loss_of_a_metric_is_its_squared_change():
    u = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    readout = clip_lens.core.metric.Readout(torch.full((3, 4), 2.0), u.roll(1, 0), u)
    expected = [(2 * float(a.sum()) - 2 * float(b.sum())) ** 2 for a, b in zip(u, u.roll(1, 0), strict=True)]
    loss = finders.loss_of(clip_lens.logit)
    assert loss(u, readout).tolist() == pytest.approx(expected, rel=1e-5)
    assert finders.loss_of(loss) is loss and loss.identity != finders.loss_of(clip_lens.cosine).identity


def test_a_learned_circuit_is_discovered_and_reused(tower, tmp_path, monkeypatch):
    encoder, found, judged = tower
    keep = Keep(tmp_path)
    done = discover(encoder, found, judged, method="learned", edges=EDGES, seed=2, keep=keep)
    alone = clip_lens.learn_circuit(encoder, found, share=EDGES / 46, seed=2)[0]
    assert done.circuit.digest == alone.digest and done.circuit.selection.asked == EDGES
    monkeypatch.setattr(finders, "learn_circuit", None)
    again = discover(encoder, found, judged, method="learned", edges=EDGES, seed=2, keep=keep)
    assert again.circuit.digest == done.circuit.digest and again.circuit.training.equals(done.circuit.training)
    assert len(done.summary) == 3 and done.summary["CMD"].isna().all()
