"""ACDC: many candidates a run must give what one edge after the other gives, by the oracle; and find what is known."""

from functools import cache

import open_clip
import pytest
import torch
from handmade import NAMES, handmade
from oracle import TEXTS, TOWERS, Text, forward, same
from towers import random_clip, random_store

from clip_lens.core.metric import kl, metric
from clip_lens.core.setting import Setting
from clip_lens.core.source import zeros
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.methods.circuits import acdc as module
from clip_lens.methods.circuits.acdc import acdc
from clip_lens.methods.circuits.circuit import Circuit, Selection
from clip_lens.methods.circuits.removal import Removal
from clip_lens.methods.registry import ACDC
from clip_lens.model.load import load

BANK = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(8)).double(), dim=-1)


class Divergence(Text):
    """A pair judged by KL(P_run || P_patched) over itself and a bank."""

    def metric(self, gives=same, reads=same):
        logits = torch.cat([forward(self.clip, self.tokens, gives, reads)[None], BANK]) @ self.direction
        patched = logits.log_softmax(0)
        self.plain = getattr(self, "plain", patched)
        return float((self.plain.exp() * (self.plain - patched)).sum())


@cache
def setting(name, equal):
    """A tower of two layers and two heads, three pairs, as the oracle and as the package have them."""
    clip = random_clip(**{"layers": 2, "width": 16, "heads": 2, "d_embed": 16, "seed": 11} | TOWERS[name])
    clip = clip.double().requires_grad_(False)
    encoder = load(
        clip, tokenizer=open_clip.SimpleTokenizer(context_length=77 if name == "causal" else 16), dtype=torch.float64
    )
    texts = (TEXTS[True][:3]) if equal else (TEXTS[False][:3])
    pairs = Pairs(range(3), *zip(*texts, strict=True), [f"{row}.png" for row in range(3)])
    batch = align(pairs, random_store(pairs, 16), encoder, run="affirmative" if equal is None else "caption")
    return clip, encoder, batch


def one_by_one(clip, encoder, batch, threshold, metric="logit", start=None, two_sided=False):
    """Conmy et al.'s loop as it is told: every candidate a run of its own, each pair by hand."""
    texts = [(Text if metric == "logit" else Divergence)(clip, batch, pair) for pair in range(len(batch))]
    sign = batch.sigma.tolist() if metric == "logit" else [1] * len(batch)
    every = encoder.edges()
    start = every if start is None else start
    removed = [edge for edge in every if edge not in start]

    def mean(edges):
        return (
            sum(s * text.effect(tuple(edges)) for s, text in zip(sign, texts, strict=True)) / len(texts)
            if edges
            else 0.0
        )

    current, kept = mean(removed), {}
    for edge in reversed([edge for edge in every if edge in start]):
        after = mean([*removed, edge])
        change = after - current if metric == "kl" and not two_sided else abs(after - current)
        if change < threshold:
            removed, current = [*removed, edge], after
        else:
            kept[edge] = after - current
    return kept


@pytest.mark.parametrize(("metric", "threshold"), [("logit", 0.05), ("logit", 0.3), ("kl", 3e-4), ("kl", 1e-3)])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_many_candidates_a_run_give_what_one_by_one_gives(name, equal, metric, threshold):
    clip, encoder, batch = setting(name, equal)
    expected = one_by_one(clip, encoder, batch, threshold, metric)
    circuit = acdc(encoder, batch, threshold, metric=kl(BANK) if metric == "kl" else module.logit)
    assert set(circuit.edges()) == set(expected) and 0 < len(expected) < len(encoder.edges())
    largest = max(map(abs, expected.values()))
    assert all(abs(circuit.scored()[edge] - change) < 1e-10 * largest for edge, change in expected.items())


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
@pytest.mark.parametrize("equal", [True, False])
def test_how_many_run_at_once_changes_nothing(equal, rows):
    _, encoder, batch = setting("causal", equal)
    found = [acdc(encoder, batch, 0.1, rows=n) for n in (256, rows)]
    assert found[0].keep.equal(found[1].keep)


def test_pairs_of_either_side_count_alike():
    clip, encoder, _ = setting("causal", True)
    texts = TEXTS[True][:2]
    pairs = Pairs(range(2), *zip(*texts, strict=True), ["0.png", "1.png"])
    batch = align(pairs, random_store(pairs, 16), encoder, run="affirmative")
    assert sorted(batch.sigma.tolist()) == [-1, 1]
    assert set(acdc(encoder, batch, 0.2).edges()) == set(one_by_one(clip, encoder, batch, 0.2))


def test_a_search_among_some_edges_starts_with_the_others_removed():
    clip, encoder, batch = setting("causal", False)
    every = encoder.edges()
    some = [edge for number, edge in enumerate(every) if number % 3 or edge.receiver.kind == "out"]
    expected = set(one_by_one(clip, encoder, batch, 0.2, start=some))
    assert set(acdc(encoder, batch, 0.2, among=some).edges()) == expected and expected < set(some)
    among = Circuit.of(some, n_layers=2, n_heads=2)
    assert set(acdc(encoder, batch, 0.2, among=among).edges()) == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_circuits_written_by_hand_are_what_is_left(name, causal):
    if name == "key" and not causal:
        name = "chain"
    tower = handmade(name, causal)
    circuit = acdc(tower.encoder, tower.batch, 0.05)
    assert set(circuit.edges()) == tower.edges
    assert {edge for edge, change in circuit.scored().items() if change < 0} == tower.negative
    assert set(acdc(tower.encoder, tower.batch, 0.05, among=circuit).edges()) == tower.edges


def test_edges_that_nothing_reads_any_more_do_not_run(monkeypatch):
    tower = handmade("chain")
    sets, means = [], Removal.means
    monkeypatch.setattr(Removal, "means", lambda removal, removed: sets.append(len(removed)) or means(removal, removed))
    acdc(tower.encoder, tower.batch, 0.05)
    assert 0 < sum(sets) < len(tower.encoder.edges()) / 3


def test_unaligned_positions_pass_what_is_removed_so_that_nothing_is_skipped():
    _, encoder, batch = setting("causal", False)
    assert not Removal.of(Setting.of(encoder, batch)).complete
    assert Removal.of(Setting.of(encoder, batch, source=zeros)).complete


def test_a_high_threshold_leaves_nothing_and_the_circuit_says_how():
    _, encoder, batch = setting("causal", True)
    circuit = acdc(encoder, batch, 1e6, source=zeros)
    assert len(circuit) == 0 and circuit.name == "ACDC"
    assert circuit.record.method is ACDC and circuit.record.batch == batch.digest
    assert (circuit.record.source.name, circuit.record.metric.name) == ("zeros", "logit")
    settings = {"threshold": 1e6, "one_sided": False, "started_from": Circuit.full(encoder).digest}
    assert circuit.record.settings == settings
    assert circuit.selection == Selection("removal", of=len(encoder.edges()), threshold=1e6)


def test_what_a_metric_is_decides_which_changes_count_not_its_name():
    """`kl` wrapped in a function of another name finds what it finds; said to be no divergence, every change counts."""
    clip, encoder, batch = setting("causal", True)
    divergence = kl(BANK)
    wrapped = metric(lambda u, readout: divergence(u, readout), oriented=False, name="mine", divergence=True)
    own = acdc(encoder, batch, 3e-3, metric=divergence)
    assert acdc(encoder, batch, 3e-3, metric=wrapped).keep.equal(own.keep)
    two_sided = metric(lambda u, readout: divergence(u, readout), oriented=False, name="kl over 5 texts")
    both = acdc(encoder, batch, 3e-3, metric=two_sided)
    assert set(both.edges()) == set(one_by_one(clip, encoder, batch, 3e-3, "kl", two_sided=True)) != set(own.edges())
    with pytest.raises(ValueError, match="a divergence grows on both sides"):
        metric(lambda u, readout: u[:, 0], oriented=True, divergence=True)


def test_candidates_that_need_no_run_need_no_mask(monkeypatch):
    """What is held at once are the sets that run: the same ones as when every candidate had its own."""
    tower, held = handmade("chain"), []
    means = Removal.means

    def noted(removal, removed):
        held.append(removed)
        return means(removal, removed)

    monkeypatch.setattr(Removal, "means", noted)
    without = module.Search._without
    repeated = []

    def every(search, cells, running):
        sets = search.removed.repeat(len(cells), 1, 1)
        for number, cell in enumerate(cells):
            sets[number:, cell[0], cell[1]] = True
        repeated.append(len(cells))
        found = without(search, cells, running)
        assert found.equal(sets[running])
        return found

    monkeypatch.setattr(module.Search, "_without", every)
    acdc(tower.encoder, tower.batch, 0.05, rows=16)
    most = max(1, 16 // len(tower.batch))
    assert max(map(len, held)) <= most < max(repeated)


def test_hooks_of_the_users_are_refused():
    _, encoder, batch = setting("causal", True)
    hooks = encoder.tower.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value * 0)])
    with hooks, pytest.raises(ValueError, match=r"hooks of yours on, at blocks\.0\.hook_mlp_out"):
        acdc(encoder, batch, 0.1)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_is_positive(threshold):
    _, encoder, batch = setting("causal", True)
    with pytest.raises(ValueError, match="more than 0"):
        acdc(encoder, batch, threshold)


def test_a_circuit_of_another_tower_is_refused():
    _, encoder, batch = setting("causal", True)
    other = handmade("chain").encoder
    with pytest.raises(ValueError, match="2 layers x 2 heads and 3 x 4"):
        acdc(encoder, batch, 0.1, among=Circuit.full(other))
