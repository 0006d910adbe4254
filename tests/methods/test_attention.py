"""Selectivity against open_clip's own attention modules, run one text at a time with 77 tokens, and by hand."""

import importlib.resources
import json

import open_clip
import pandas as pd
import pytest
import torch
from slow_study import patterns
from towers import random_clip, random_store

import clip_lens
from clip_lens.core.metric import logit
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.data.read import read_pairs
from clip_lens.methods.attention import attention_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.statistics import correlations
from clip_lens.model.load import load
from clip_lens.model.site import Site
from clip_lens.tiny import scenes

LAYERS, HEADS = 2, 4
SLOTS = {"there": [1], "be": [2], "negator": [3], "subject": [4]}  # "There is/are NEGATOR ..." in a rephrased text


@pytest.fixture(scope="module")
def clip():
    return random_clip(layers=LAYERS, width=32, heads=HEADS, d_embed=16, seed=2).double().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(clip):
    return load(clip, tokenizer=open_clip.SimpleTokenizer(), dtype=torch.float64)


@pytest.fixture(scope="module")
def rephrased(shared):
    return read_pairs(shared / "data" / "valse" / "existence.json").rephrased()


def sides(pairs):
    """(text with the negation, text without) of every pair."""
    rows = zip(pairs.caption, pairs.foil, pairs.side, strict=True)
    return [(caption, foil) if side == "caption" else (foil, caption) for caption, foil, side in rows]


@pytest.fixture(scope="module")
def slow(clip, rephrased):
    """Of every pair the patterns of the text with and without, and the end of text."""
    found = []
    for texts in sides(rephrased):
        (negated, end), (affirmative, other_end) = (patterns(clip, text) for text in texts)
        assert end == other_end
        found.append((negated, affirmative, end))
    return found


@pytest.fixture(scope="module")
def batch(rephrased, encoder):
    return align(rephrased, random_store(rephrased, 16, seed=3), encoder)


@pytest.mark.parametrize("slot", ["negator", "subject", "be"])
def test_selectivity_of_all_490_pairs_equals_the_plain_loop(slot, slow, batch, encoder):
    effects = attention_effects(encoder, batch, slot)
    assert effects.values.shape == (LAYERS * HEADS, 490)
    (q,) = SLOTS[slot]
    for pair, (negated, affirmative, end) in enumerate(slow):
        extra = negated - affirmative
        expected = torch.stack([extra[:, :, p, q] for p in range(q + 1, end + 1)]).amax(0)
        assert (effects.values[:, pair] - expected.flatten()).abs().max() < 1e-9


def test_in_float32_selectivity_agrees_to_a_thousandth(slow, clip, rephrased):
    encoder = load(clip, tokenizer=open_clip.SimpleTokenizer(), dtype=torch.float32)
    assert encoder.dtype == torch.float32
    batch = align(rephrased, random_store(rephrased, 16, seed=3), encoder)
    values = attention_effects(encoder, batch).values
    for pair, (negated, affirmative, end) in enumerate(slow):
        expected = (negated - affirmative)[:, :, 4 : end + 1, 3].amax(-1).flatten()
        assert (values[:, pair].double() - expected).abs().max() < 1e-5  # of a weight, at most 1


def test_whichever_text_is_run_the_one_without_is_subtracted(batch, encoder, rephrased):
    effects = attention_effects(encoder, batch)
    for other in (batch.flip(), align(rephrased, random_store(rephrased, 16, seed=3), encoder, run="foil")):
        assert torch.allclose(attention_effects(encoder, other).values, effects.values, rtol=0, atol=1e-12)


def test_absolute_attention_is_that_of_the_text_with_the_negation(slow, batch, encoder):
    effects = attention_effects(encoder, batch, contrast=False)
    assert effects.meta["method"] == "attention"
    for pair, (negated, _, end) in enumerate(slow):
        expected = negated[:, :, 4 : end + 1, 3].amax(-1).flatten()
        assert (effects.values[:, pair] - expected).abs().max() < 1e-9


def test_queries_are_maxima_over_one_category_each(slow, batch, encoder):
    queries = ("be", "subject", "subject_rest", "eot")
    effects = attention_effects(encoder, batch, queries=queries)
    assert effects.places[:5] == (*(Site("pattern", 0, 0, slot=name) for name in queries), Site("pattern", 0, 1, "be"))
    assert effects.where(slot="be").values.isnan().all()  # before the negator
    grid = effects.where(layer=1).grid("unit", "slot", side="caption")
    assert list(grid.columns) == list(queries)
    for pair, (negated, affirmative, end) in enumerate(slow):
        slots = [batch.slots[number] if number >= 0 else None for number in batch.slot[pair].tolist()]
        for name in queries[1:]:
            where = [p for p in range(4, end + 1) if slots[p] == name]
            values = effects.where(slot=name).values[:, pair]
            if where:
                expected = (negated - affirmative)[:, :, where, 3].amax(-1).flatten()
                assert (values - expected).abs().max() < 1e-9
            else:
                assert values.isnan().all()


def test_every_position_as_a_query_is_regrouped_by_slot(batch, encoder):
    raw = attention_effects(encoder, batch, queries=range(batch.tokens.shape[1]))
    named = raw.by_slot(batch)
    rest = named.where(slot="subject_rest").values
    keys = named.pairs.key
    largest = pd.DataFrame(rest.T.numpy()).groupby(keys.to_numpy(), sort=False).max()
    expected = attention_effects(encoder, batch, queries=["subject_rest"]).values.T.numpy()
    pd.testing.assert_frame_equal(largest, pd.DataFrame(expected, index=largest.index), check_exact=False, atol=1e-12)
    whole = attention_effects(encoder, batch).values
    assert torch.allclose(raw.values.reshape(8, -1, 490).nan_to_num(-9).amax(1), whole, rtol=0, atol=1e-12)


def test_it_is_a_result_like_any_other(batch, encoder):
    effects = attention_effects(encoder, batch)
    table = effects.fraction()
    for side in ("caption", "foil"):
        chosen = torch.tensor([each == side for each in batch.pairs.side])
        means = effects.values[:, chosen].mean(1).tolist()
        rows = table[table.side == side]
        assert rows.fraction.tolist() == pytest.approx(means, abs=1e-12)
        assert rows.effect.tolist() == pytest.approx(means, abs=1e-12)
    pooled = effects.fraction(pooled=True).fraction.tolist()
    assert pooled == pytest.approx(effects.values.mean(1).tolist(), abs=1e-12)
    assert not effects.record.metric.oriented and torch.equal(effects.signed(), effects.values)
    assert set(effects.total.tolist()) == {1.0}
    reference = patch_effects(encoder, batch, encoder.sites("resid", layers=[2], slots=("eot",))).pairs
    columns = list(reference)
    pd.testing.assert_frame_equal(effects.pairs[columns], reference[columns], check_exact=False, atol=1e-10)
    assert list(correlations(effects).n[:1]) == [250]


TEXTS = {
    "inserted words behind": ("There is a dog.", "There is no dog in it."),
    "inserted subject": ("There are no red big dogs.", "There are some big dogs."),
    "inserted negator": ("There are people.", "There are no people."),
    "equal": ("There are no red big dogs.", "There are some red big dogs."),
    "no side, no template": ("a red cube left of a ball", "a blue cube left of a ball"),
}


@pytest.fixture(scope="module")
def texts():
    captions, foils = zip(*TEXTS.values(), strict=True)
    return Pairs(list(TEXTS), captions, foils, [f"{row}.png" for row in range(len(TEXTS))])


@pytest.mark.parametrize("run", ["caption", "foil"])
def test_texts_of_unequal_length_by_hand(clip, encoder, texts, run):
    """Positions: 0 start, 1 There, 2 is/are, ... ; keys and queries as (with the negation, without)."""
    batch = align(texts, random_store(texts, 16), encoder, run=run)
    assert texts.side == ("foil", "caption", "foil", "caption", "none")
    cases = [
        (0, "negator", [(3, 3)], [(4, 4), (7, 5), (8, 6)]),
        (1, "negator", [(3, 3)], [(5, 4), (6, 5), (7, 6), (8, 7)]),
        (1, "subject_rest", [(6, 5)], [(7, 6), (8, 7)]),  # "big" is the subject in one text and its rest in the other
        (1, "subject", [], []),
        (0, "subject_rest", [], []),
        (2, "negator", [], []),
        (2, "there", [(1, 1)], [(2, 2), (4, 3), (5, 4), (6, 5)]),  # the caption fits no template, the foil does
        (2, "subject", [(4, 3)], [(5, 4), (6, 5)]),
        (3, "subject_rest", [(5, 5), (6, 6)], [(7, 7), (8, 8)]),
        (4, "negator", [], []),
        (3, "eot", [], []),
        (4, "sot", [(0, 0)], [(p, p) for p in range(1, 9)]),
    ]
    for pair, slot, keys, queries in cases:
        found = attention_effects(encoder, batch, slot).values[:, pair]
        caption, foil = TEXTS[texts.key[pair]]
        two = (foil, caption) if texts.side[pair] == "foil" else (caption, foil)
        if texts.side[pair] == "none":  # the other minus the run
            two = (foil, caption) if run == "caption" else (caption, foil)
        negated, affirmative = (patterns(clip, text)[0] for text in two)
        if not keys:
            assert found.isnan().all(), (pair, slot)
            continue
        extra = [sum(negated[:, :, p, q] - affirmative[:, :, o, k] for q, k in keys) for p, o in queries]
        assert (found - torch.stack(extra).amax(0).flatten()).abs().max() < 1e-12, (pair, slot)


def test_absolute_attention_needs_no_counterpart(clip, encoder, texts):
    batch = align(texts, random_store(texts, 16), encoder, run="caption")
    found = attention_effects(encoder, batch, contrast=False).values[:, 2]
    negated, end = patterns(clip, TEXTS["inserted negator"][1])
    assert (found - negated[:, :, 4 : end + 1, 3].amax(-1).flatten()).abs().max() < 1e-12


def test_raw_positions_are_the_runs(encoder, texts):
    """The run's last two positions in the pair whose other text is longer by two words."""
    batch = align(texts, random_store(texts, 16), encoder, run="caption")[:1]
    named = attention_effects(encoder, batch, "stop", queries=["eot"]).values
    assert torch.equal(attention_effects(encoder, batch, 5, queries=[6]).values, named)
    assert attention_effects(encoder, batch, "stop", queries=[5, 7]).values.isnan().all()


@pytest.mark.parametrize("slot", ["negator", "subject_rest", "there"])
def test_bidirectional_towers_read_their_padding_too(slot, texts):
    clip = random_clip(layers=2, width=32, heads=4, d_embed=16, causal=False, pool_type="last", seed=4).double()
    encoder = load(clip, tokenizer=open_clip.SimpleTokenizer(context_length=16), dtype=torch.float64)
    batch = align(texts, random_store(texts, 16), encoder, run="caption")
    found = attention_effects(encoder, batch, slot)
    flipped = attention_effects(encoder, batch.flip(), slot)
    sided = [row for row, side in enumerate(texts.side) if side != "none"]
    assert torch.equal(found.values.isnan(), flipped.values.isnan())
    assert torch.allclose(found.values[:, sided], flipped.values[:, sided], atol=1e-12, equal_nan=True)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    run, other = (
        torch.stack([*encoder.cache(t[3:4], names=names).values()])[:, 0] for t in (batch.tokens, batch.other)
    )
    keys = {"negator": [3], "subject_rest": [5, 6], "there": [1]}[slot]
    extra = (run - other)[:, :, keys[-1] + 1 :, keys].sum(-1).amax(-1)  # the caption has the negation; equal lengths
    assert torch.allclose(found.values[:, 3], extra.flatten(), atol=1e-12)


def test_pairs_are_the_same_in_any_company(encoder, batch, monkeypatch):
    some = batch[::9]
    whole = attention_effects(encoder, some, "subject", queries=["stop", "eot"])
    monkeypatch.setattr("clip_lens.methods.attention.CHUNK", 7)
    chunked = attention_effects(encoder, some, "subject", queries=["stop", "eot"])
    assert torch.allclose(whole.values, chunked.values, atol=1e-12, equal_nan=True)
    assert whole.pairs.d.to_numpy() == pytest.approx(chunked.pairs.d.to_numpy(), abs=1e-12)


def test_the_result_says_what_was_compared(encoder, texts):
    batch = align(texts, random_store(texts, 16), encoder, run="caption")
    meta = attention_effects(encoder, batch).meta
    assert meta["method"] == "attention selectivity" and meta["slot"] == "negator"
    assert "without a side, other minus run" in meta["convention"] and meta["pairs without a source"] == "2"
    sided = attention_effects(encoder, batch[:4]).meta
    assert "side" not in sided["convention"] and sided["metric"] == "attention weight, in attention weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slot": "negation"}, "no slot 'negation'.*there are sot,"),
        ({"slot": 99}, "the batch has positions 0.."),
        ({"queries": ["verb"]}, "no slot 'verb'"),
        ({"queries": []}, "one or several different slots"),
        ({"queries": ["eot", "eot"]}, "one or several different slots"),
    ],
)
def test_what_is_not_there_is_refused(encoder, batch, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_effects(encoder, batch, **arguments)


def test_a_batch_of_another_width_is_refused(batch):
    with pytest.raises(ValueError, match="16 components, tiny 128"):
        attention_effects(clip_lens.load(), batch)


def card():
    with (importlib.resources.files("clip_lens") / "tiny" / "assets" / "card.json").open() as file:
        return json.load(file)["seeds"]["1"]["selectivity (layer x head)"]


@pytest.mark.slow
def test_the_embedded_models_selective_heads_are_those_of_its_card_on_its_cards_pairs():
    """The 6,000 pairs on which the card's numbers were computed, by the training script's own code."""
    asked, encoder = ("present", "absent", "apart"), clip_lens.load()
    tables = [
        scenes.scene_pairs(600, first=scenes.FRESH + 50_000 + 3000 * number, forms=(form,), kinds=asked)
        for number, form in enumerate(scenes.FORMS)
    ]
    frame = pd.concat(tables, ignore_index=True).assign(key=range(6000))
    pairs = Pairs.from_frame(frame)
    batch = align(pairs, random_store(pairs, encoder.d_embed), encoder)
    means = attention_effects(encoder, batch).values.mean(1).reshape(6, 4)
    assert (means - torch.tensor(card())).abs().max() < 2e-4  # the card rounds to 4 places
    assert (means >= 0.6).sum() == 12 and (means >= 0.6).any(1).sum() == 4


def test_the_shipped_pairs_show_the_same_heads():
    encoder = clip_lens.load()
    batch = align(read_pairs("tiny"), clip_lens.ImageStore.open("tiny"), encoder)
    effects = attention_effects(encoder, batch)
    grid = effects.grid("layer", "unit", value="fraction", pooled=True)
    assert (grid >= 0.6).to_numpy().sum() == 12
    assert abs(grid.to_numpy() - torch.tensor(card()).numpy()).max() < 0.05
    direct = patch_effects(encoder, batch, encoder.sites("resid", layers=[0], slots=("eot",)), metric=logit).pairs.d
    assert effects.pairs.d.to_numpy() == pytest.approx(direct.to_numpy(), abs=1e-4)
