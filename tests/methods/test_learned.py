"""Learned circuits: the known ones on towers written by hand; gates by their definition; how a course ends."""

import math

import pytest
import torch
from handmade import EMBED, NAMES, READ, handmade, head

import clip_lens
from clip_lens.core.metric import metric
from clip_lens.core.source import zeros
from clip_lens.methods.circuits import learned as module
from clip_lens.methods.circuits.circuit import Circuit, Graph
from clip_lens.methods.circuits.faithfulness import faithfulness
from clip_lens.methods.circuits.learned import Gates, exchanged, learn_circuit
from clip_lens.methods.circuits.weights import Weighted
from clip_lens.model.site import Edge, Site

BEHIND = ("negator", "subject", "subject_rest", "stop", "eot")
"""The slots from the word on: an even head of a causal tower carries it to each of them."""


def at(site, *slots):
    return [Site(site.kind, site.layer, site.unit, slot) for slot in slots]


def known_by_slot(name):
    """The edges of a causal tower with the slots at which they matter: the word is read where it stands, what a head
    made of it at that place and behind it, and a query or an MLP behind which only the output is at the end."""
    slots = {("v", 0): ("negator",), ("q", 1): ("eot",), ("mlp", 1): ("eot",), ("mlp", 2): ("eot",)}
    return [
        Edge(edge.sender, receiver)
        for edge in handmade(name).edges
        for receiver in (
            [edge.receiver] if edge.receiver == READ else
            at(edge.receiver, *slots.get((edge.receiver.kind, edge.receiver.layer), BEHIND))
        )
    ]  # fmt: skip


def known(name, causal, slots):
    edges = known_by_slot(name) if slots else handmade(name, causal).edges
    return Circuit.of(edges, n_layers=3, n_heads=4, slots=slots)


def learned(tower, n, slots=(), **how):
    of = int(Graph.of(3, 4, slots).edges.sum())
    return learn_circuit(tower.encoder, tower.batch, share=n / of, slots=slots, held_out=0, progress=False, **how)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_slot", [False, True])
def test_the_known_circuit_is_learned(name, by_slot):
    tower = handmade(name)
    slots = tower.batch.occurring if by_slot else ()
    expected = known(name, True, slots)
    found = learned(tower, len(expected), slots, steps=120, exchanges=20)
    assert found.digest == expected.digest, ((expected - found).edges(), (found - expected).edges())
    assert found.scores[found.keep].min() >= 0.5 and found.scores[~found.keep].isnan().all()


def test_the_known_circuit_of_a_bidirectional_tower_is_learned():
    expected = known("parallel", False, ())
    assert learned(handmade("parallel", False), len(expected), steps=120, exchanges=20).digest == expected.digest


def test_more_edges_than_matter_are_not_kept():
    """Gates that nothing depends on share what is left, and none of them is above one half."""
    tower = handmade("chain")
    found = learned(tower, 9, steps=90)
    assert known("chain", True, ()).edges() == [edge for edge in found.edges() if edge in tower.edges]
    assert len(found) <= 9


@pytest.fixture(scope="module")
def pairs():
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    return encoder, clip_lens.align(clip_lens.read_pairs()[:24], store, encoder, run="caption")


def test_gates_by_their_definition():
    """Louizos et al. 2018, equations 10 to 12, one number at a time."""
    gates = Gates.of(Graph.of(1, 1), torch.zeros(1, dtype=torch.float64))
    with torch.no_grad():
        gates.logits.copy_(torch.linspace(-3, 3, len(gates.logits)))
    drawn = gates.drawn(2, torch.Generator().manual_seed(3))
    noise = torch.rand(2, len(gates.logits), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for line, u in zip(drawn.tolist(), noise.tolist(), strict=True):
        for gate, x, logit in zip(line, u, gates.logits.tolist(), strict=True):
            s = 1 / (1 + math.exp(-(math.log(x) - math.log(1 - x) + logit) / (2 / 3)))
            assert abs(gate - min(1, max(0, s * 1.2 - 0.1))) <= 1e-12
    many = gates.drawn(200_000, torch.Generator().manual_seed(1)) > 0
    assert (many.double().mean(0) - gates.open).abs().max() <= 5e-3


def test_the_share_that_is_open_is_held_and_the_gradient_knows():
    """The gradient of a draw is that of moving one logit and then all, so that the expected share stays."""
    gates = Gates.of(Graph.of(2, 2), torch.zeros(1, dtype=torch.float64))
    began = torch.randn(len(gates.logits), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aim = torch.randn(len(gates.logits), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def drawn(logits):
        with torch.no_grad():
            gates.logits.copy_(logits)
        gates.hold(0.2)
        return (gates.drawn(50, torch.Generator().manual_seed(2)) * aim).sum()

    for share in (0.9, 0.2, 0.01):
        gates.hold(share)
        assert abs(gates.open.mean().item() - share) <= 1e-12
    (gradient,) = torch.autograd.grad(drawn(began), gates.logits)
    held = gates.logits.detach().clone()
    assert torch.equal(held.argsort(), began.argsort())
    for edge in range(0, len(held), 9):
        step = 1e-6 * torch.eye(len(held), dtype=torch.float64)[edge]
        slope = (drawn(held + step) - drawn(held - step)).item() / 2e-6
        assert abs(slope - gradient[edge].item()) <= 1e-4 * gradient.abs().max().item()


def test_the_circuit_is_the_best_on_the_pairs_held_out(pairs):
    encoder, batch = pairs
    found = learn_circuit(encoder, batch, share=[0.5, 0.3], steps=30, seed=1, progress=False)
    fit, held = batch.split(0.8, 1, "text")
    for circuit in found:
        course = circuit.training.dropna(subset="held_out")
        course = course[course["share"] <= circuit.selection.share]
        judged = faithfulness(encoder, held, circuit, progress=False).effects
        scale = faithfulness(encoder, fit, circuit, progress=False).effects.total.abs().mean()
        sides = [
            judged.values[0, [other == side for other in held.pairs.side]] / scale for side in set(held.pairs.side)
        ]
        loss = sum(float(side.square().mean() + 3 * side.mean() ** 2) for side in sides) / len(sides)
        assert abs(loss - course["held_out"].min()) <= 1e-4 * loss
        assert len(circuit) == course.set_index("held_out")["edges"][course["held_out"].min()]
    assert len(found[0].training) < len(found[1].training) and found[1].selection.asked == 332
    assert (
        found[0].record.settings["sizes"] == "0.5, 0.3"
        and found[0].record.settings["not_trained_on"] == 0.2
        and found[0].record.method.key == "learned"
    )


def test_a_size_ends_when_nothing_better_comes(pairs, monkeypatch):
    looks = iter([0.5, *[0.6] * 100])
    monkeypatch.setattr(module.Course, "_look", lambda self, kept: next(looks))
    circuit, = learn_circuit(*pairs, share=0.5, steps=120, progress=False)  # fmt: skip
    assert circuit.training["step"].max() == 80 + (1 + module.PATIENCE - 1) * module.CHECK


def test_one_seed_gives_one_circuit_and_rows_are_held_out_by_text(pairs):
    first, again, other = (
        learn_circuit(*pairs, share=0.2, steps=12, seed=seed, progress=False)[0] for seed in (3, 3, 4)
    )
    assert first.digest == again.digest != other.digest
    assert first.training.equals(again.training)


def test_an_interruption_gives_what_is_done(pairs, monkeypatch):
    step = Weighted.moved
    calls = iter(range(1000))

    def interrupted(self, weights):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return step(self, weights)

    monkeypatch.setattr(Weighted, "moved", interrupted)
    found = learn_circuit(*pairs, share=[0.2, 0.5], steps=5, held_out=0, progress=False)
    assert [circuit.selection.share for circuit in found] == [0.5]
    with pytest.raises(KeyboardInterrupt):
        calls = iter(range(8, 10))
        learn_circuit(*pairs, share=0.5, steps=5, held_out=0, progress=False)


def test_any_source_and_metric_will_do(pairs):
    encoder, batch = pairs

    @metric(oriented=False, divergence=True)
    def away(u, readout):
        return (u - readout.run).square().sum(-1)

    for how in ({"source": zeros}, {"metric": away}):
        circuit = learn_circuit(encoder, batch, share=0.5, steps=4, held_out=0, progress=False, **how)[0]
        assert len(circuit) <= 554 and circuit.training["loss"].notna().all()


def test_a_learned_circuit_is_read_as_it_was_written(pairs, tmp_path):
    circuit = learn_circuit(*pairs, share=0.1, slots=pairs[1].occurring, steps=12, progress=False)[0]
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert (again.digest, again.slots, again.selection) == (circuit.digest, circuit.slots, circuit.selection)
    assert again.training.equals(circuit.training) and torch.equal(
        again.scores.nan_to_num(), circuit.scores.nan_to_num()
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"share": 0}, "more than 0"),
        ({"share": []}, "more than 0"),
        ({"steps": 0}, "must be positive"),
        ({"rate": 0.0}, "must be positive"),
        ({"held_out": 1.0}, "less than 1"),
        ({"metric": metric(lambda u, readout: u.detach()[:, 0], oriented=True)}, "no gradient"),
        ({"metric": clip_lens.attention_score(0, 1, "eot", "eot")}, "activation of the tower"),
        ({"source": lambda encoder, batch: lambda index, names: own(encoder, batch, index, names)}, "moves the metric"),
    ],
)
def test_what_can_not_be_learned_is_refused(pairs, how, message):
    with pytest.raises(ValueError, match=message):
        learn_circuit(*pairs, **{"steps": 2, "progress": False, **how})


def own(encoder, batch, index, names):
    """The run itself as the source: nothing is moved."""
    return encoder.cache(batch.tokens[index], names=list(names))


def test_it_learns_inside_of_inference_mode(pairs):
    encoder, batch = pairs
    with torch.inference_mode():
        inside = learn_circuit(encoder, batch, share=0.5, steps=3, held_out=0, progress=False)[0]
    assert inside.digest == learn_circuit(encoder, batch, share=0.5, steps=3, held_out=0, progress=False)[0].digest


def test_pairs_that_all_hang_together_need_held_out_0(pairs):
    encoder, batch = pairs
    with pytest.raises(ValueError, match="With held_out=0 every pair"):
        learn_circuit(encoder, batch[:1], progress=False)


def test_edges_that_stand_for_every_slot():
    edge = Edge(head(0, 1), Site("v", 2, 0))
    circuit = Circuit.of([edge, Edge(EMBED, Site("q", 0, 0, "eot"))], n_layers=3, n_heads=4, slots=BEHIND)
    assert [str(one) for one in circuit.edges()][1:] == [f"head 0.1 -> v 2.0 @{slot}" for slot in BEHIND]


def test_an_exchange_opens_what_helps_most_and_closes_what_is_needed_least():
    kept = torch.tensor([True, True, True, False, False, False])
    slope = torch.tensor([-3.0, 0.5, -1.0, -2.0, 1.0, -4.0])
    assert exchanged(kept, slope, 3, 1).tolist() == [True, False, True, False, False, True]
    assert exchanged(kept, slope, 4, 1).tolist() == [True, True, True, False, False, True]
    assert exchanged(kept, slope, 3, 2).tolist() == [True, False, False, True, False, True]
    assert exchanged(kept, slope, 3, 3) is None and exchanged(kept, slope, 1, 2) is None
