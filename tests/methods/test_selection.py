"""Selection by score and its stability: against sorted lists, a slow greedy search, and resampling by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import NAMES, handmade

from clip_lens.core.effects import Effects
from clip_lens.core.record import Method, MetricRecord, Record
from clip_lens.methods.circuits.circuit import Circuit, Graph, Selection
from clip_lens.methods.circuits.selection import (
    selection_frequency,
    sized_circuits,
    stability,
    top_edges,
)
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site

LAYERS, HEADS = 2, 2


def made(values=None, places=None, sigma=None, seed=0, **said):
    """Effects over all edges of a small tower, eight pairs, four of either sigma."""
    places = Circuit(Graph.of(LAYERS, HEADS).edges, LAYERS, HEADS).edges() if places is None else places
    sigma = np.array([1, -1] * 4) if sigma is None else np.array(sigma)
    if values is None:
        values = torch.randn(
            len(places), len(sigma), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    n = range(len(sigma))
    text = {name: [f"{name} {i}" for i in n] for name in ("key", "caption", "foil", "image")}
    pairs = pd.DataFrame({**text, "side": "caption", "sigma": sigma, "d": 1.0, "segment": "correct"})
    total = torch.ones(len(sigma), dtype=torch.float64)
    record = Record(**{"method": Method("made", "made"), "layers": LAYERS, "heads": HEADS, **said})
    return Effects(values, total, total, tuple(places), pairs, record)


def lines(circuit):
    return [str(edge) for edge in circuit.edges()]


def ranked(effects, signed, columns=None):
    """Edges and scores, best first, by plain Python."""
    sigma = effects.pairs["sigma"].tolist()
    columns = range(len(sigma)) if columns is None else columns
    scores = []
    for place, line in zip(effects.places, effects.values.tolist(), strict=True):
        known = [sigma[c] * line[c] for c in columns if line[c] == line[c]]
        scores.append((str(place), sum(known) / len(known) if known else float("-inf")))
    return sorted(scores, key=lambda e: -(e[1] if signed or e[1] == float("-inf") else abs(e[1])))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 46])
def test_top_edges_are_the_first_of_a_sorted_list(n, signed):
    effects = made()
    circuit = top_edges(effects, n, signed=signed)
    expected = ranked(effects, signed)[:n]
    assert set(lines(circuit)) == {name for name, _ in expected}
    scores = {str(edge): score for edge, score in circuit.scored().items()}
    assert all(abs(scores[name] - score) < 1e-12 for name, score in expected)
    ranking = "signed" if signed else "absolute"
    assert circuit.selection == Selection("top", ranking, asked=n, of=46, entered=(8, 8))
    assert circuit.name == "made" and circuit.record is effects.record


def test_pairs_of_both_sides_are_signed_before_they_are_averaged():
    effects = made(sigma=[1, -1])
    values = torch.zeros(46, 2)
    values[3], values[5] = torch.tensor([1.0, -1.0]), torch.tensor([9.0, 9.0])  # the same part of d; one that cancels
    assert lines(top_edges(replace(effects, values=values), 1)) == [str(effects.places[3])]


def test_metrics_without_sides_are_taken_as_they_are_whatever_they_are_called():
    values = torch.zeros(46, 2)
    values[3], values[5] = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])
    for name in ("cosine", "kl over 5 texts", "mine", "logit"):
        plain, turning = (
            made(values, sigma=[1, -1], metric=MetricRecord(name, oriented)) for oriented in (False, True)
        )
        assert lines(top_edges(plain, 1, signed=True)) == [str(plain.places[5])]
        assert lines(top_edges(turning, 1, signed=True)) == [str(plain.places[3])]


def test_a_mean_is_over_the_pairs_that_have_a_value_and_their_number_is_said():
    effects = made()
    values = effects.values.clone()
    values[3, 1:], values[3, 0], values[4] = torch.nan, 50.0, torch.nan
    effects = replace(effects, values=values)
    circuit = top_edges(effects, 1)
    assert lines(circuit) == [str(effects.places[3])] and circuit.selection.entered == (0, 8)
    assert effects.places[4] not in top_edges(effects, 45) and len(top_edges(effects, 46)) == 46
    assert effects.places[4] not in top_edges(effects, threshold=0.0)


def test_of_equals_the_first_in_the_tower_is_taken_whatever_the_order_of_the_result():
    effects = made(torch.ones(46, 8))
    backwards = replace(effects, places=effects.places[::-1])
    assert (
        lines(top_edges(backwards, 5, signed=False))
        == lines(top_edges(effects, 5))
        == list(map(str, effects.places[:5]))
    )


@pytest.mark.parametrize("signed", [True, False])
def test_edges_above_a_threshold(signed):
    effects = made()
    expected = {name for name, score in ranked(effects, signed) if (score if signed else abs(score)) > 0.2}
    circuit = top_edges(effects, threshold=0.2, signed=signed)
    assert 0 < len(expected) < 46 and set(lines(circuit)) == expected
    ranking = "signed" if signed else "absolute"
    assert circuit.selection == Selection("above", ranking, None, len(expected), False, 46, 0.2, (8, 8))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_strongest_edge_into_what_it_has(seed):
    effects = made(seed=seed)
    left = {
        place: abs(score) for place in effects.places for name, score in ranked(effects, False) if str(place) == name
    }
    nodes, chosen = {"out"}, []
    for _ in range(12):
        open_ = {edge: score for edge, score in left.items() if node(edge.receiver) in nodes}
        best = max(open_, key=open_.get)
        chosen.append(str(best))
        nodes.add(node(best.sender))
        del left[best]
    circuit = top_edges(effects, 12, select="greedy")
    assert set(lines(circuit)) == set(chosen)


def node(site):
    return str(Site("head", site.layer, site.unit)) if site.kind in ("q", "k", "v") else str(site)


@pytest.mark.parametrize("select", ["top", "greedy"])
@pytest.mark.parametrize("name", NAMES)
def test_the_circuits_written_by_hand_are_found(name, select):
    tower = handmade(name)
    effects = patch_effects(tower.encoder, tower.batch, tower.encoder.edges())
    circuit = top_edges(effects, len(tower.edges), select=select)
    assert set(circuit.edges()) == tower.edges == set(circuit.pruned().edges())
    assert set(top_edges(effects, threshold=0.1).edges()) == tower.edges
    supporting = top_edges(effects, len(tower.edges - tower.negative), signed=True)
    assert set(supporting.edges()) == tower.edges - tower.negative


def test_circuits_of_sizes_are_cut_before_they_are_pruned():
    effects = made()
    circuits = sized_circuits(effects, (0.05, 0.5, 1.0))
    for share, circuit in zip((0.05, 0.5, 1.0), circuits, strict=True):
        whole = top_edges(effects, int(share * 46))
        assert lines(circuit) == lines(whole.pruned()) and circuit.selection.share == share
        assert circuit.selection.pruned and circuit.selection.asked == int(share * 46)


def test_shares_are_counted_without_rounding_errors():
    places = [Edge(Site("embed"), Site("v", 0, unit)) for unit in range(100)]
    effects = made(torch.ones(100, 8), places, heads=100)
    assert str(sized_circuits(effects, (0.29,))[0].selection) == "the top 29 of 100 edges by absolute score, pruned"


def test_a_result_of_some_edges_says_how_deep_its_tower_is():
    effects = made(
        places=[Edge(Site("embed"), Site("v", 0, 0)), Edge(Site("embed"), Site("out"))], values=torch.ones(2, 8)
    )
    circuit = top_edges(effects, 2)
    assert (circuit.n_layers, circuit.n_heads) == (LAYERS, HEADS) and len(circuit) == 2


@pytest.mark.parametrize("select", ["top", "greedy"])
@pytest.mark.parametrize("signed", [True, False])
def test_stability_is_ranking_again_on_drawn_pairs(signed, select):
    effects = made(seed=3)
    counts = np.random.default_rng([7, 3]).multinomial(8, np.full(8, 1 / 8), 25)
    full = set(lines(top_edges(effects, 10, signed=signed, select=select)))
    found = []
    for row in counts:
        columns = np.repeat(np.arange(8), row)
        again = replace(effects, values=effects.values[:, columns], pairs=effects.pairs.iloc[columns],
                        total=effects.total[columns], baseline=effects.baseline[columns])  # fmt: skip
        found.append(set(lines(top_edges(again, 10, signed=signed, select=select))))
    table = stability(effects, [10], signed=signed, select=select, resamples=25, seed=7)
    jaccard = [len(full & drawn) / len(full | drawn) for drawn in found]
    assert table["jaccard"][0] == pytest.approx(np.mean(jaccard), abs=1e-12)
    assert table["lower"][0] == pytest.approx(np.quantile(jaccard, 0.025), abs=1e-12)
    pairwise = [len(a & b) / len(a | b) for i, a in enumerate(found) for b in found[i + 1 :]]
    assert table["pairwise"][0] == pytest.approx(np.mean(pairwise), abs=1e-12)
    assert table["certain"][0] == len(set.intersection(*found))
    frequency = selection_frequency(effects, 10, signed=signed, select=select, resamples=25, seed=7)
    for row in frequency.itertuples():
        assert row.frequency == pytest.approx(np.mean([row.edge in drawn for drawn in found]), abs=1e-12)
        assert row.selected == (row.edge in full)
    assert frequency["frequency"].is_monotonic_decreasing


def test_edges_that_never_change_are_stable():
    values = torch.arange(46.0)[:, None].expand(46, 8) * torch.tensor([1.0, -1.0] * 4)
    assert stability(made(values), 10, resamples=20)[["jaccard", "lower", "pairwise", "certain"]].iloc[0].tolist() == [
        1,
        1,
        1,
        10,
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: top_edges(e, 47), "has 46 edges"),
        (lambda e: top_edges(e, -1), "n=-1"),
        (lambda e: top_edges(e, 3, select="best"), "one of top, greedy"),
        (lambda e: top_edges(e), "either a number of edges or a threshold"),
        (lambda e: top_edges(e, 3, threshold=0.1), "either a number of edges or a threshold"),
        (lambda e: top_edges(e, threshold=0.1, select="greedy"), "for select='top' alone"),
        (lambda e: top_edges(e, threshold=float("nan")), "a threshold is a number"),
        (lambda e: sized_circuits(e, (1.5,)), "between 0 and 1. Got 1.5"),
        (lambda e: stability(e, 3, resamples=0), "at least 1"),
        (lambda e: stability(e, 3, interval=1), "between 0 and 1"),
        (lambda e: top_edges(replace(e, places=(Site("mlp", 0),) * 46), 1), "single edges .* Got"),
        (lambda e: top_edges(replace(e, places=(e.places[0],) * 46), 1), "more than once"),
    ],
)
def test_what_can_not_be_selected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(made())


def ends(edge):
    """The nodes that an edge runs between; a head's q, k and v are the head."""
    owner = Site("head", edge.receiver.layer, edge.receiver.unit) if edge.receiver.kind in "qkv" else edge.receiver
    return edge.sender, owner


@pytest.mark.parametrize("seed", range(3))
def test_from_both_ends_takes_the_strongest_edge_at_what_it_has(seed):
    effects = made(seed=seed)
    scores = {edge: abs(dict(ranked(effects, False))[str(edge)]) for edge in effects.places}
    behind, ahead, taken = {Site("out")}, {Site("embed")}, []
    for _ in range(12):
        near = [e for e in scores if e not in taken and (ends(e)[1] in behind or ends(e)[0] in ahead)]
        best = max(near, key=scores.__getitem__)
        taken.append(best)
        sender, owner = ends(best)
        behind |= {sender} if owner in behind else set()
        ahead |= {owner} if sender in ahead else set()
    circuit = top_edges(effects, 12, select="both ends")
    assert set(circuit.edges()) == set(taken)
    assert str(circuit.selection) == "12 of 46 edges grown from both ends by absolute score"


@pytest.mark.parametrize("signed", [False, True])
def test_nodes_are_taken_by_the_sum_of_what_they_send(signed):
    effects = made(seed=4)
    scores = dict(ranked(effects, True))
    sums = {}
    for edge in effects.places:
        sums[edge.sender] = sums.get(edge.sender, 0.0) + scores[str(edge)]
    del sums[Site("embed")]
    order = sorted(sums, key=lambda site: -(sums[site] if signed else abs(sums[site])))
    for n in (0, 1, 20, 46):
        expected = []
        for size in range(len(order) + 1):
            nodes = {Site("embed"), Site("out"), *order[:size]}
            among = [str(edge) for edge in effects.places if set(ends(edge)) <= nodes]
            if len(among) > n:
                break
            expected = among
        assert sorted(lines(top_edges(effects, n, select="nodes", signed=signed))) == sorted(expected)


def test_edges_with_a_certain_sign_are_those_that_keep_it_in_resamples():
    values = torch.full((46, 8), 0.01, dtype=torch.float64)
    values[:6] = 0.5
    values[3] = torch.tensor([10.0, -8.0] * 4)  # the largest mean of all, of no certain sign
    effects = made(values, sigma=[1] * 8)
    assert effects.places[3] in top_edges(effects, 1)
    circuit = top_edges(effects, 6, certain=0.95)
    assert circuit.edges() == list(effects.places[:3] + effects.places[4:7])
    assert len(top_edges(effects, 46, certain=1.0)) == 45
    assert str(circuit.selection) == (
        "the top 6 of 46 edges with a sign that is certain in 0.95 of the resamples by absolute score"
    )
    assert [len(one) for one in sized_circuits(effects, (1.0,), certain=0.95)] == [len(circuit_of_45(effects).pruned())]
    with pytest.raises(ValueError, match=r"certain=1\.5"):
        top_edges(effects, 3, certain=1.5)
    with pytest.raises(ValueError, match="for select='top'"):
        top_edges(effects, 3, certain=0.9, select="greedy")


def circuit_of_45(effects):
    return top_edges(effects, 46, certain=0.95)


@pytest.mark.parametrize("name", NAMES)
def test_every_other_rule_finds_what_is_written_by_hand(name):
    tower = handmade(name)
    effects = patch_effects(tower.encoder, tower.batch, tower.encoder.edges(), progress=False)
    for how in ({"certain": 0.95}, {"select": "both ends"}):
        assert set(top_edges(effects, len(tower.edges), **how).edges()) == tower.edges
    nodes = {node for edge in tower.edges for node in ends(edge)}
    among = [edge for edge in tower.encoder.edges() if set(ends(edge)) <= nodes]
    found = top_edges(effects, len(among), select="nodes")
    assert set(found.edges()) == set(among) and set(top_edges(effects, len(among)).edges()) >= tower.edges
