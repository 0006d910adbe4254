"""The causal tracing effect on VALSE existence, against plain forward hooks on open_clip's own modules.

Quantmeyer et al. 2024 (method, section 4): the text without negation receives, at one layer and position, the residual
stream of the text with negation; `CTE = d*/d`. The loop below does that once per pair, layer and position, with texts
padded to 77 tokens, and shares no code with the package.
"""

from collections import defaultdict

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from slow_study import slow_tracing
from towers import random_clip, random_store

from clip_lens.data.batch import align
from clip_lens.data.read import read_pairs
from clip_lens.data.slots import SLOTS
from clip_lens.methods.patching import patch_effects
from clip_lens.model.load import load

LAYERS = 2
SCALE = 200.0  # so that |d| >= 1 for most pairs: random towers tell a word from another by little
EVERY = 7  # in float32 the loop runs over every seventh pair


@pytest.fixture(scope="module")
def rephrased(shared):
    pairs = read_pairs(shared / "data" / "valse" / "existence.json").rephrased()
    assert (len(pairs), pairs.side.count("caption"), pairs.side.count("foil")) == (490, 250, 240)
    return pairs


@pytest.fixture(scope="module")
def clip():
    clip = random_clip(layers=LAYERS, width=32, heads=4, d_embed=16, seed=2).requires_grad_(False)
    clip.logit_scale.fill_(np.log(SCALE))
    return clip


@pytest.fixture(scope="module")
def store(rephrased):
    return random_store(rephrased, 16, seed=3)


@torch.no_grad()
def slow_table(clip, pairs, store, dtype):
    """A table of every pair, layer and position with the paper's effect, `d*/d`, signed as d is."""
    rows = []
    model = clip.to(dtype)
    texts = zip(pairs.key, pairs.caption, pairs.foil, pairs.side, pairs.image, strict=True)
    for key, caption, foil, side, image in texts:
        ordered, sign = ([foil, caption], 1) if side == "caption" else ([caption, foil], -1)
        moved, total = slow_tracing(model, ordered, store[[image]][0].to(dtype))
        for layer, line in enumerate(moved.tolist()):
            rows += [(key, side, layer, p, sign * m, sign * float(total)) for p, m in enumerate(line)]
    return pd.DataFrame(rows, columns=["key", "side", "layer", "position", "moved", "d"])


def fast(clip, pairs, store, dtype):
    encoder = load(clip, tokenizer=open_clip.SimpleTokenizer(), dtype=dtype)
    batch = align(pairs, store, encoder, run="affirmative")
    sites = encoder.sites("resid", slots=range(batch.tokens.shape[1]))
    return batch, patch_effects(encoder, batch, sites)


def as_table(effects):
    """The fast result in the slow table's form."""
    signed = effects.signed().double()
    columns = []
    for row, place in enumerate(effects.places):
        columns.append(pd.DataFrame({"key": effects.pairs.key, "side": effects.pairs.side, "layer": place.layer}))
        columns[-1]["position"], columns[-1]["moved"] = place.slot, signed[row].numpy()
        columns[-1]["d"] = effects.pairs.d
    return pd.concat(columns).dropna(subset="moved")


def together(slow, found):
    both = slow.merge(found, on=["key", "side", "layer", "position"], suffixes=("", "_found"), validate="one_to_one")
    assert len(both) == len(slow) == len(found)
    return both


@pytest.fixture(scope="module")
def slow(clip, rephrased, store):
    return slow_table(clip, rephrased, store, torch.float64)


@pytest.fixture(scope="module")
def traced(clip, rephrased, store, slow):
    return fast(clip.double(), rephrased, store, torch.float64)


def test_effects_on_all_490_pairs_equal_the_slow_loop(slow, traced):
    both = together(slow, as_table(traced[1]))
    assert both.key.nunique() == 490 and both.layer.nunique() == LAYERS + 1
    assert (both.moved - both.moved_found).abs().max() < 1e-9
    assert (both.d - both.d_found).abs().max() < 1e-9
    large = both[both.d.abs() >= 1]
    assert large.key.nunique() > 300
    assert (large.moved / large.d - large.moved_found / large.d_found).abs().max() < 1e-9


def test_float32_agrees_where_d_is_not_small(clip, rephrased, store):
    some = rephrased[::EVERY]
    slow = slow_table(clip, some, store, torch.float32)
    both = together(slow, as_table(fast(clip, some, store, torch.float32)[1]))
    large = both[both.d.abs() >= 1]
    assert large.key.nunique() > 40 and set(large.side) == {"caption", "foil"}
    assert (large.moved / large.d - large.moved_found / large.d_found).abs().max() < 1e-3


def test_whole_effect_is_moved_at_both_ends(traced):
    """All of d at the pooled position behind the last block; at layer 0 all of it at the negator's place."""
    batch, effects = traced
    named = effects.by_slot(batch)
    for layer, slot in ((LAYERS, "eot"), (0, "negator")):
        values = named.where(layer=layer, slot=slot).values[0]
        there = ~values.isnan()
        assert torch.allclose(values[there], named.total[there], atol=1e-9)


def test_category_averages_equal_a_plain_loop(slow, traced, rephrased):
    """`by_slot`: the mean over (pair, token) of d* over that of d, per side, as the paper averages positions."""
    batch, effects = traced
    names = [*SLOTS, None]
    slots = {key: [names[s] for s in line] for key, line in zip(batch.pairs.key, batch.slot.tolist(), strict=True)}
    moved, total, ratios = defaultdict(list), defaultdict(list), defaultdict(list)
    for key, side, layer, position, m, d in slow.itertuples(index=False):
        cell = (layer, slots[key][position], side)
        moved[cell].append(m)
        total[cell].append(d)
        if abs(d) >= 1:
            ratios[cell].append(m / d)
    named = effects.by_slot(batch)
    for of, floor in (("means", 0.0), ("ratios", 1.0)):
        table = named.fraction(of=of, floor=floor).set_index(["layer", "slot", "side"]).fraction
        assert set(table.index) == set(moved) and len(table) == 2 * 8 * (LAYERS + 1)
        for cell, found in table.items():
            expected = np.sum(moved[cell]) / np.sum(total[cell]) if of == "means" else np.mean(ratios[cell])
            assert found == pytest.approx(expected, abs=1e-9), cell


def test_localisation_is_the_spread_of_the_category_means(slow, traced):
    batch, effects = traced
    named = effects.by_slot(batch)
    found = named.localisation().set_index(["layer", "side"]).localisation
    means = named.fraction().set_index(["layer", "side", "slot"]).fraction
    for cell, spread in found.items():
        line = [means[(*cell, slot)] for slot in ("negator", "subject", "subject_rest", "stop", "eot")]
        assert spread == pytest.approx(np.std(line), abs=1e-12)
