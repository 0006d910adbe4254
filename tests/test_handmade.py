"""The towers written by hand are what they say: their edges matter, each with its sign, and no others do."""

import pytest
from handmade import NAMES, handmade
from oracle import Text

from clip_lens.methods.patching import patch_effects

EVERY = [(name, True) for name in NAMES] + [(name, False) for name in NAMES if name != "key"]


@pytest.mark.parametrize(("name", "causal"), EVERY)
def test_the_edges_that_matter_are_those_written(name, causal):
    tower = handmade(name, causal)
    effects = patch_effects(tower.encoder, tower.batch, tower.encoder.edges())
    signed, total = effects.signed().mean(1), effects.pairs["d"].mean()
    matter = {edge for edge, score in zip(effects.places, signed, strict=True) if abs(score) > 1e-2 * total}
    assert total > 1 and matter == tower.edges
    others = [number for number, edge in enumerate(effects.places) if edge not in tower.edges]
    assert effects.values[others].abs().max() <= 1e-12 * total
    against = {edge for edge, score in zip(effects.places, signed, strict=True) if score < -1e-2 * total}
    assert against == tower.negative


@pytest.mark.parametrize(("name", "causal"), EVERY)
def test_without_its_circuit_nothing_is_left_by_hand(name, causal):
    tower = handmade(name, causal)
    text = Text(tower.clip, tower.batch, 0)
    outside = tuple(edge for edge in tower.encoder.edges() if edge not in tower.edges)
    assert abs(text.effect(outside)) <= 1e-10
    assert abs(text.effect(tuple(tower.edges)) - text.effect(tuple(tower.encoder.edges()))) <= 1e-10
