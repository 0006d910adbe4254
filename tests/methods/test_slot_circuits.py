"""Circuits by slot: what every method finds on towers written by hand, and that they are circuits like any other."""

from functools import cache

import pytest
import torch
from handmade import NAMES, handmade
from oracle import batch_of, texts_of, tower
from test_learned import known_by_slot

from clip_lens.core.effects import Effects
from clip_lens.core.record import Record
from clip_lens.methods.circuits.acdc import acdc
from clip_lens.methods.circuits.circuit import Circuit, Graph, random_circuit
from clip_lens.methods.circuits.faithfulness import faithfulness
from clip_lens.methods.circuits.selection import cancellation, top_edges
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site, at_slot
from clip_lens.show.figures.network import network


@cache
def scored(name, method=patch_effects):
    made = handmade(name)
    edges = made.encoder.edges(slots=made.batch.occurring)
    return method(made.encoder, made.batch, edges, progress=False)


def known(name):
    return Circuit.of(known_by_slot(name), n_layers=3, n_heads=4, slots=handmade(name).batch.occurring)


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_of_edges_at_slots_are_non_zero_where_they_are_known_to_matter(name):
    expected = known(name)
    found = top_edges(scored(name), threshold=1e-9)
    assert found.digest == expected.digest == top_edges(scored(name), len(expected)).digest
    assert faithfulness(
        handmade(name).encoder, handmade(name).batch, found, progress=False
    ).effects.values.abs().max() < (1e-9)


@pytest.mark.parametrize("name", ["chain", "query", "opposed"])
def test_acdc_leaves_the_known_circuit_by_slot(name):
    made = handmade(name)
    least = top_edges(scored(name), len(known(name))).scores.abs().nan_to_num(float("inf")).min()
    found = acdc(made.encoder, made.batch, float(least) / 10, slots=made.batch.occurring, progress=False)
    assert found.digest == known(name).digest and found.slots == made.batch.occurring


def test_gradients_by_slot_find_it_where_the_tower_is_nearly_linear():
    found = top_edges(scored("chain", gradient_effects), len(known("chain")))
    assert found.digest == known("chain").digest


def test_a_circuit_of_edges_is_one_by_slot_that_has_every_slot():
    made = handmade("parallel")
    slots = made.batch.occurring
    plain = Circuit.of(list(made.edges)[:4], n_layers=3, n_heads=4, name="plain")
    judged = faithfulness(made.encoder, made.batch, [plain, plain.at_slots(slots), known("parallel")], progress=False)
    assert (judged.effects.values[0] - judged.effects.values[1]).abs().max() <= 1e-12
    assert [place.of for place in judged.places] == [262, 1984, 1984]
    into_out = sum(edge.receiver.kind == "out" for edge in plain.edges())
    assert len(plain.at_slots(slots)) == len(slots) * (len(plain) - into_out) + into_out


def test_what_a_circuit_by_slot_loses_by_the_oracle():
    encoder, batch = tower("causal")[1], batch_of("causal")
    slots = tuple(range(encoder.cut(batch.tokens).shape[1]))
    full = Circuit.full(encoder, slots)
    drawn = random_circuit(full & full, seed=4)
    keep = drawn.keep & (torch.rand(drawn.keep.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    circuit = Circuit(keep, 3, 4, slots=slots)
    expected = torch.tensor([text.effect(tuple(circuit.removed())) for text in texts_of("causal")], dtype=torch.float64)
    judged = faithfulness(encoder, batch, [circuit, full, full - full], progress=False)
    assert (judged.effects.values[0] - expected).abs().max() <= 1e-10 and expected.abs().max() > 0.1
    assert judged.effects.values[1].abs().max() == 0
    assert (judged.effects.values[2] - judged.effects.total).abs().max() <= 1e-10


def on_a_path(circuit, slots):
    """Edges on a path from the embedding to the output, by following every path."""
    edges = circuit.edges()

    def follows(one, two):
        """Whether what enters by one edge may leave by the other."""
        owner = ("mlp", one.receiver.layer, None) if one.receiver.kind == "mlp" else (
            "head", one.receiver.layer, one.receiver.unit
        )  # fmt: skip
        if one.receiver.kind == "out" or (two.sender.kind, two.sender.layer, two.sender.unit) != owner:
            return False
        stays = one.receiver.kind in ("q", "mlp") and two.receiver.kind != "out"
        return not stays or one.receiver.slot == two.receiver.slot

    ahead = {edge for edge in edges if edge.sender.kind == "embed"}
    behind = {edge for edge in edges if edge.receiver.kind == "out"}
    for _ in edges:
        ahead |= {two for one in ahead for two in edges if two not in ahead and follows(one, two)}
        behind |= {one for two in behind for one in edges if one not in behind and follows(one, two)}
    return ahead & behind


@pytest.mark.parametrize("seed", range(3))
def test_pruning_by_slot_keeps_what_lies_on_a_path(seed):
    slots = ("negator", "eot")
    graph = Graph.of(2, 2, slots)
    drawn = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(seed)) < 0.25
    circuit = Circuit(drawn & graph.edges, 2, 2, slots=slots)
    assert set(circuit.pruned().edges()) == on_a_path(circuit, slots)
    assert 0 < len(circuit.pruned()) < len(circuit)


def test_circuits_by_slots_in_another_order_are_the_same():
    edges = [Edge(Site("embed"), Site("v", 0, 1, "eot")), Edge(Site("head", 0, 1), Site("out"))]
    one, two = (Circuit.of(edges, n_layers=2, n_heads=2, slots=slots) for slots in (("eot", "sot"), ("sot", "eot")))
    assert one.digest == two.digest and one.jaccard(two) == 1 and len(one & two) == 2
    with pytest.raises(ValueError, match="by the same slots"):
        one.jaccard(Circuit.of(edges[1:], n_layers=2, n_heads=2))
    with pytest.raises(ValueError, match="at others"):
        one.at_slots(("eot",))


def test_a_circuit_by_slot_is_written_read_and_drawn(tmp_path):
    circuit = top_edges(scored("query"), 3)
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert (again.digest, again.slots, again.selection) == (circuit.digest, circuit.slots, circuit.selection)
    assert torch.equal(again.scores.nan_to_num(), circuit.scores.nan_to_num())
    assert any("@" in line for line in network(circuit).frame["edge"])
    through = dict(circuit.to_networkx().edges)["embed", "head 0.1"]["through"]
    assert through == ("v @negator",)


def test_cancellation_by_hand():
    edges = [Edge(Site("embed"), Site("v", 0, 0)), Edge(Site("embed"), Site("mlp", 0))]
    places = [at_slot(edge, slot) for edge in edges for slot in ("negator", "eot")] + [Edge(Site("embed"), Site("out"))]
    like = scored("chain")
    like = like.where(key=list(like.pairs["key"][:2]))
    values = torch.tensor([[1.0, 3.0], [-1.0, -1.0], [2.0, 2.0], [0.5, 0.5], [9.0, 9.0]], dtype=torch.float64)
    effects = Effects(
        values * like.orientation, like.total, like.baseline, tuple(places), like.pairs,
        Record(metric=like.record.metric, layers=1, heads=1),
    )  # fmt: skip
    table = cancellation(effects).set_index("edge")
    assert table.loc["embed -> v 0.0"].tolist() == [1.0, 3.0, pytest.approx(2 / 3), 2]
    assert table.loc["embed -> mlp 0"].tolist() == [2.5, 2.5, 0.0, 2] and len(table) == 2
    with pytest.raises(ValueError, match="one result"):
        top_edges(Effects(values[:2], like.total, like.baseline, (places[0], edges[1]), like.pairs, effects.record), 1)
