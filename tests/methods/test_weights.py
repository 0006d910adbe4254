"""Runs with weights on edges: 0 and 1 are patching and what lies between them too, by the oracle; gradients by finite
differences."""

import pytest
import torch
from oracle import TOWERS, Text, bare, batch_of, texts_of, tower

from clip_lens.core.setting import Setting
from clip_lens.core.source import zeros
from clip_lens.methods.circuits import weights as module
from clip_lens.methods.circuits.circuit import Circuit, Graph
from clip_lens.methods.circuits.weights import weighted
from clip_lens.model.site import Edge


def moved(parts, weights):
    """What weights move in every pair, in the batch's order."""
    found = torch.zeros(sum(len(part) for part in parts), dtype=torch.float64)
    for part in parts:
        found[part.index] = part.moved(weights)
    return found


def at_work(name, slots=(), rows=3, equal=None, **how):
    encoder = tower(name)[1]
    return weighted(Setting.of(encoder, batch_of(name, equal), rows=rows, **how), slots)


def positions(name):
    return tuple(range(tower(name)[1].cut(batch_of(name).tokens).shape[1]))


def graph_of(name, slots):
    encoder = tower(name)[1]
    return Graph.of(encoder.n_layers, encoder.n_heads, slots)


def some(graph, seed, probability=0.5):
    drawn = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(seed)) < probability
    return drawn & graph.edges


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_weights_of_0_and_1_are_patching(name, by_position):
    slots = positions(name) if by_position else ()
    graph, parts = graph_of(name, slots), at_work(name, slots)
    for seed in (0, 1):
        removed = some(graph, seed)
        encoder = tower(name)[1]
        patched = tuple(Circuit(removed, encoder.n_layers, encoder.n_heads, slots=slots).edges())
        expected = torch.tensor([text.effect(patched) for text in texts_of(name)], dtype=torch.float64)
        assert expected.abs().max() > 0.1
        assert (moved(parts, removed[None].double()) - expected).abs().max() <= 1e-10
    nothing, everything = torch.zeros_like(removed), graph.edges
    assert moved(parts, nothing[None].double()).abs().max() <= 1e-12
    total = torch.zeros(len(batch_of(name)), dtype=torch.float64)
    for part in parts:
        total[part.index] = part.total.double()
    assert (moved(parts, everything[None].double()) - total).abs().max() <= 1e-10


class Shared(Text):
    """A pair in which every edge carries a mixture, written as the oracle has its edges."""

    def mixed(self, weights, graph):
        source, live = self.counterpart(), {}

        def gives(site, value):
            live[site] = value
            return value

        def reads(site, x):
            shift = torch.zeros_like(x)
            for row, receiver in enumerate(graph.receivers):
                if bare(receiver) != site:
                    continue
                where = self.where(receiver.slot)
                for column, sender in enumerate(graph.senders):
                    if float(weights[row, column]):
                        change = (source[sender] - live[sender]).nan_to_num(0)
                        shift[where] += weights[row, column] * change[where]
            return x + shift

        return self.metric(gives, reads) - self.baseline


@pytest.mark.parametrize("by_position", [False, True])
def test_weights_between_are_mixtures(by_position):
    name = "causal"
    slots = positions(name) if by_position else ()
    graph = graph_of(name, slots)
    drawn = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = drawn * some(graph, 5, 0.2 if by_position else 1.0)
    clip, batch = tower(name)[0], batch_of(name)
    mixed = [Shared(clip, batch, pair).mixed(weights, graph) for pair in range(len(batch))]
    expected = torch.tensor(mixed, dtype=torch.float64)
    assert (moved(at_work(name, slots), weights[None]) - expected).abs().max() <= 1e-10


def test_each_pair_may_have_weights_of_its_own():
    graph, (part,) = graph_of("causal", ()), at_work("causal", rows=100)
    sets = torch.stack([some(graph, seed).double() for seed in range(len(part))])
    alone = torch.stack([part.moved(sets[[pair]])[pair] for pair in range(len(part))])
    assert (part.moved(sets) - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("by_position", [False, True])
def test_the_gradient_of_a_weight_is_a_finite_difference(by_position, again, monkeypatch):
    if again:
        monkeypatch.setattr(module, "KEPT", 0)
    slots = positions("causal") if by_position else ()
    graph, parts = graph_of("causal", slots), at_work("causal", slots)
    assert all(part._again == again for part in parts)
    drawn = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = (drawn * graph.edges)[None].requires_grad_()
    loss = lambda w: sum(part.moved(w).square().sum() for part in parts)
    (gradient,) = torch.autograd.grad(loss(weights), weights)
    largest = gradient[0].abs().flatten().topk(6).indices
    cells = torch.cat([largest, graph.edges.flatten().nonzero().flatten()[::97][:6]])
    for cell in cells.tolist():
        step = torch.zeros_like(weights).flatten()
        step[cell] = 1e-5
        with torch.no_grad():
            slope = (loss(weights + step.view_as(weights)) - loss(weights - step.view_as(weights))) / 2e-5
        assert abs(slope - gradient.flatten()[cell]) <= 1e-6 * gradient.abs().max()


def test_any_source_will_do():
    name = "bidirectional"
    graph = graph_of(name, ())
    removed = some(graph, 3)
    source = {site: torch.zeros_like(value) for site, value in texts_of(name)[0].run.items()}
    patched = tuple(Edge(graph.senders[s], graph.receivers[r]) for r, s in removed.nonzero().tolist())
    expected = texts_of(name)[0].effect(patched, source)
    assert abs(float(moved(at_work(name, source=zeros), removed[None].double())[0]) - expected) <= 1e-10


def test_tokens_in_no_slot_are_refused():
    with pytest.raises(ValueError, match=r"in none of the slots negator, eot, in .* pairs such as"):
        at_work("causal", ("negator", "eot"))
    with pytest.raises(ValueError, match="no slot 'verb'"):
        at_work("causal", ("verb",))
