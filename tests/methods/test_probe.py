"""Probes against scikit-learn by hand, steering against hooks on open_clip's own blocks, and a tower that is known."""

import warnings
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import EOT, batch_of, pooled, tower
from sklearn.linear_model import LogisticRegression
from towers import random_clip, random_encoder, random_store

import clip_lens
from clip_lens.core.source import steered
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.probes import controls
from clip_lens.methods.probes import fit as fit_module
from clip_lens.methods.probes import probe as module
from clip_lens.methods.probes import split as splitting
from clip_lens.methods.probes.probe import probe, probe_effects
from clip_lens.methods.steering import steer
from clip_lens.model.load import load
from clip_lens.model.site import Site
from clip_lens.tiny.scenes import COLOURS

TOWERS = ("causal", "bidirectional", "bidirectional, pooled last")
L = 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(layers=range(L + 1)):
    return [Site("resid", layer, slot="eot") for layer in layers]


def made_up(texts, encoder, run="affirmative"):
    """A batch of (caption, foil) texts with made-up images."""
    captions, foils = zip(*texts, strict=True)
    pairs = Pairs(range(len(texts)), captions, foils, [f"{row}.png" for row in range(len(texts))])
    return align(pairs, random_store(pairs, encoder.d_embed), encoder, run=run)


@pytest.fixture(scope="module")
def tiny():
    return clip_lens.load()


@pytest.fixture(scope="module")
def embedded(tiny):
    return align(clip_lens.read_pairs()[:300], clip_lens.ImageStore.open("tiny"), tiny)


@pytest.fixture(scope="module")
def table(tiny, embedded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return probe(tiny, embedded, layers=[0, 1, 4, 6])


# Steering


def by_hand(name, change, layer):
    """Unit embeddings of a batch's runs by open_clip, the pooled position's stream changed before block `layer`."""
    clip, batch = tower(name)[0], batch_of(name)
    text, tokens = getattr(clip, "text", clip), batch.tokens
    tokens = torch.nn.functional.pad(tokens, (0, text.positional_embedding.shape[0] - tokens.shape[1]))
    at, rows = [pooled(text, line) for line in tokens], range(len(tokens))

    def hook(block, args, output=None):
        x = (args[0] if output is None else output).clone()
        x[rows, at] = torch.stack([change(x[row, at[row]], row) for row in rows])
        return x if output is not None else (x, *args[1:])

    blocks = text.transformer.resblocks
    register = blocks[-1].register_forward_hook if layer == len(blocks) else blocks[layer].register_forward_pre_hook
    handle = register(hook)
    try:
        return clip.encode_text(tokens, normalize=True)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("how", ["add", "remove"])
def test_steering_is_hooks_by_hand(name, how):
    encoder, batch = tower(name)[1], batch_of(name)
    v, origin = draw(L + 1, 32), draw(L + 1, 32, seed=1)
    sites = places()
    given = {"origin": dict(zip(sites, origin, strict=True))} if how == "remove" else {}
    effects = steer(encoder, batch, dict(zip(sites, v, strict=True)), how=how, rows=5, **given)
    for layer in range(L + 1):

        def change(x, row, v=v[layer], o=origin[layer]):
            return x + v if how == "add" else x - ((x - o) @ v) / (v @ v) * v

        moved = by_hand(name, change, layer) - by_hand(name, lambda x, row: x, layer)
        expected = (moved * batch.direction).sum(-1)
        assert expected.abs().max() > 1e-3
        assert (effects.values[layer] - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", TOWERS)
def test_adding_what_separates_a_pair_is_the_counterparts_patch(name):
    encoder, batch = tower(name)[1], batch_of(name)
    hooks = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(L)), f"blocks.{L - 1}.hook_resid_post"]
    streams = []
    for tokens in (batch.tokens, batch.other):
        _, cache = encoder.tower.run_with_cache(tokens)
        at = [pooled(getattr(tower(name)[0], "text", tower(name)[0]), line) for line in tokens]
        streams.append([cache[hook][range(len(tokens)), at] for hook in hooks])
    apart = {site: other - run for site, run, other in zip(places(), *streams, strict=True)}
    effects = steer(encoder, batch, apart)
    patched = patch_effects(encoder, batch, places())
    largest = patched.total.abs().max()
    assert (effects.values - patched.values).abs().max() <= 1e-10 * largest
    assert (effects.values[-1] - effects.total).abs().max() <= 1e-10 * largest
    assert torch.equal(effects.total, patched.total)
    assert effects.meta["method"] == "steering: add a direction"


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("how", ["add", "remove"])
def test_several_layers_steered_together_is_one_run_under_hooks(name, how):
    """Later sites are steered on top of what the earlier ones did; two slots of one stream, an MLP among them."""
    encoder, batch = tower(name)[1], batch_of(name)
    place = (
        Site("resid", 1, slot="negator"),
        Site("resid", 1, slot="eot"),
        Site("mlp", 1),
        Site("resid", 2, slot="eot"),
    )
    alone = Site("resid", 2, slot="eot")
    v, origin = draw(4, 32), draw(4, 32, seed=1)
    given = {"origin": {place: list(origin), alone: origin[3]}} if how == "remove" else {}
    effects = steer(encoder, batch, {place: list(v), alone: v[3]}, how=how, rows=5, **given)

    def hooked(*numbers):
        def hook(site, v, o):
            where = batch.where(site.slot)

            def change(x, hook):
                x = x.clone()
                inside = where[:, : x.shape[1]]
                moved = x[inside] + v if how == "add" else x[inside] - torch.outer((x[inside] - o) @ v / (v @ v), v)
                x[inside] = moved
                return x

            return change

        names = [
            "blocks.1.hook_resid_pre",
            "blocks.1.hook_resid_pre",
            "blocks.1.hook_mlp_out",
            "blocks.2.hook_resid_pre",
        ]
        hooks = [(names[number], hook(place[number], v[number], origin[number])) for number in numbers]
        return ((encoder(batch.tokens, hooks) - encoder(batch.tokens)) * batch.direction).sum(-1)

    for row, numbers in enumerate([(0, 1, 2, 3), (3,)]):
        expected = hooked(*numbers)
        assert (effects.values[row] - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (effects.values[0] - effects.values[1]).abs().max() > 1e-3
    assert effects.places == (place, alone)
    again = steer(
        encoder, batch, {place: list(v)}, how=how, rows=5, **({"origin": {place: list(origin)}} if given else {})
    )
    assert torch.equal(again.values[0], effects.values[0])
    assert again.record.source.identity != effects.record.source.identity


def test_one_direction_for_sites_that_are_steered_together():
    encoder, batch, v = tower("causal")[1], batch_of("causal"), draw(32)
    place = (Site("resid", 1, slot="eot"), Site("resid", 2, slot="eot"))
    assert torch.equal(steer(encoder, batch, {place: v}).values, steer(encoder, batch, {place: [v, v]}).values)
    with pytest.raises(ValueError, match="3 directions for the 2 sites that are steered together"):
        steer(encoder, batch, {place: [v] * 3})
    with pytest.raises(ValueError, match="leave it out where one is added"):
        steer(encoder, batch, {place: v}, origin={place: v})
    with pytest.raises(ValueError, match="give one of add, remove"):
        steer(encoder, batch, {place: v}, how="turn")
    with pytest.raises(ValueError, match="no places"):
        steer(encoder, batch, {})


def test_other_sites_slots_and_pairs():
    """An MLP's output at the negator, another direction for each pair."""
    encoder, batch = tower("causal")[1], batch_of("causal")
    site, v = Site("mlp", 1, slot="negator"), draw(len(batch), 32)
    effects = steer(encoder, batch, {site: v})
    where = batch.slot == batch.slots.index("negator")
    hook = ("blocks.1.hook_mlp_out", lambda value, hook: value + where.unsqueeze(-1) * v.unsqueeze(1))
    moved = ((encoder(batch.tokens, [hook]) - encoder(batch.tokens)) * batch.direction).sum(-1)
    has = where.any(1)
    assert torch.equal(effects.values[0].isnan(), ~has)
    assert torch.allclose(effects.values[0][has], moved[has], rtol=0, atol=1e-10)


def test_what_is_removed_is_gone_and_nothing_else():
    encoder, batch = tower("causal")[1], batch_of("causal")
    site, v, origin = Site("resid", 2), draw(32), draw(32, seed=1)
    source = steered({site: v}, "remove", origin={site: origin})
    index, names = torch.arange(len(batch)), ["blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"]
    found = source(encoder, batch)(index, names)
    own = encoder.cache(batch.tokens, names=names)
    changed, unit = found[names[0]], v / v.norm()
    assert torch.allclose(changed @ unit, (origin @ unit).expand(changed.shape[:2]), atol=1e-10)
    away = own[names[0]] - (own[names[0]] @ unit).unsqueeze(-1) * unit
    assert torch.allclose(changed - (changed @ unit).unsqueeze(-1) * unit, away, atol=1e-10)
    assert torch.equal(found[names[1]], own[names[1]])
    nothing = steer(encoder, batch, {site: torch.zeros(32)}, how="remove")
    assert nothing.values.abs().max() < 1e-10


def test_what_cannot_be_steered():
    encoder, batch = tower("causal")[1], batch_of("causal")
    site = Site("resid", 1, slot="eot")
    with pytest.raises(ValueError, match="give one of add, remove"):
        steer(encoder, batch, {site: draw(32)}, how="turn")
    with pytest.raises(ValueError, match="leave it out where one is added"):
        steer(encoder, batch, {site: draw(32)}, origin={site: draw(32)})
    with pytest.raises(ValueError, match=r"shape \(31,\); give \(32,\) or \(7, 32\)"):
        steer(encoder, batch, {site: draw(31)})
    with pytest.raises(ValueError, match="not finite"):
        steer(encoder, batch, {site: draw(32) / 0})
    with pytest.raises(ValueError, match=r"head 1\.0 can't be steered"):
        steer(encoder, batch, {Site("head", 1, 0): draw(32)})
    with pytest.raises(ValueError, match="two directions"):
        steer(encoder, batch, {site: draw(32), Site("resid", 1): draw(32)})
    with pytest.raises(ValueError, match="no places"):
        steer(encoder, batch, {})


# The probe


def streams_by_hand(encoder, texts, layer):
    tokens = encoder.tower.tokenizer(list(texts))
    _, cache = encoder.tower.run_with_cache(tokens)
    hook = f"blocks.{layer}.hook_resid_pre" if layer < encoder.n_layers else f"blocks.{layer - 1}.hook_resid_post"
    return cache[hook][range(len(tokens)), tokens.argmax(-1)].double().numpy()


def test_the_probe_is_scikit_learns():
    """Texts of unequal length on a random tower of 16 dimensions, where the negation is hard to read."""
    encoder = random_encoder(width=16, heads=2, layers=2, d_embed=8, dtype=torch.float64, seed=2)
    pairs = clip_lens.read_pairs()[:240]
    batch = align(pairs, random_store(pairs, 8), encoder)
    table = probe(encoder, batch, layers=[1, 2], seed=3, test_share=0.4, interval=0.9)
    held = probe_effects(encoder, batch, layers=[1], seed=3, test_share=0.4).pairs
    texts = {
        (caption, foil) if side == "foil" else (foil, caption): key in set(held["key"])
        for key, caption, foil, side in zip(batch.pairs.key, pairs.caption, pairs.foil, pairs.side, strict=True)
    }
    tested = np.array(list(texts.values()) * 2)
    labels = np.repeat([0, 1], len(texts))
    for row in table.itertuples():
        both = [[text[number] for text in texts] for number in (0, 1)]
        x = streams_by_hand(encoder, both[0] + both[1], row.layer)
        mean, std = x[~tested].mean(0), x[~tested].std(0)
        model = LogisticRegression(C=1.0, max_iter=5000).fit((x[~tested] - mean) / std, labels[~tested])
        accuracy = model.score((x[tested] - mean) / std, labels[tested])
        assert row.accuracy == accuracy
        assert 0.5 < accuracy < 1.0
        means = [x[~tested & (labels == number)].mean(0) for number in (0, 1)]
        direction, weight = means[1] - means[0], model.coef_[0]
        lengths = np.linalg.norm(direction / std) * np.linalg.norm(weight)
        assert row.cosine == pytest.approx((direction / std) @ weight / lengths)
        assert row.norm == pytest.approx(np.linalg.norm(direction) * 2 / np.linalg.norm(means[0] + means[1]))
        assert row.n == tested.sum() / 2
        low, high = wilson(accuracy, row.n, 1.6448536269514722)
        assert (row.accuracy_lower, row.accuracy_upper) == pytest.approx((low, high))


def wilson(p, n, z):
    """The roots of (p - q)^2 = z^2 q (1 - q) / n."""
    return sorted(np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2]))


def test_the_causal_columns_are_tables_of_effects(tiny, embedded, table):
    for how, name in (("add", "added"), ("remove", "removed")):
        expected = probe_effects(tiny, embedded, how=how, layers=[0, 1, 4, 6]).table()
        for side in ("caption", "foil"):
            mine = expected[expected["side"] == side]
            assert np.allclose(table[f"{name}_{side}"], mine["fraction"], equal_nan=True)
            assert np.allclose(table[f"{name}_{side}_lower"], mine["lower"])
            assert np.allclose(table[f"{name}_{side}_upper"], mine["upper"])
            assert (table[f"n_{side}"] == mine["n"].to_numpy()).all()
    rows = [list(embedded.pairs.key).index(key) for key in probe_effects(tiny, embedded, layers=[0]).pairs["key"]]
    patched = patch_effects(tiny, embedded[rows], places([0, 1, 4, 6])).fraction()
    for side in ("caption", "foil"):
        assert np.allclose(table[f"patched_{side}"], patched[patched["side"] == side]["fraction"], atol=1e-6)
    assert np.allclose(table.iloc[-1][["patched_caption", "patched_foil"]].to_numpy(dtype=float), 1.0)


def test_the_direction_of_the_causal_test(tiny, embedded):
    """From the training texts, added to the texts without negation, removed from those with it."""
    embedded = embedded[:100]
    added, removed = (probe_effects(tiny, embedded, how=how, layers=[3]) for how in ("add", "remove"))
    held = set(added.pairs["key"])
    pairs = embedded.pairs
    texts = {
        (caption, foil) if side == "foil" else (foil, caption)
        for key, caption, foil, side in zip(pairs.key, pairs.caption, pairs.foil, pairs.side, strict=True)
        if key not in held
    }
    means = [torch.tensor(streams_by_hand(tiny, [t[number] for t in texts], 3).mean(0)).float() for number in (0, 1)]
    rows = torch.tensor([row for row, key in enumerate(pairs.key) if key in held])
    site = Site("resid", 3, slot="eot")
    by_hand = steer(tiny, embedded[rows], {site: means[1] - means[0]})
    assert torch.allclose(added.values, by_hand.values, atol=1e-4)
    without = steer(tiny, embedded[rows].flip(), {site: means[1] - means[0]}, how="remove", origin={site: means[0]})
    assert torch.allclose(removed.values, without.values, atol=1e-4)
    assert torch.allclose(removed.total, -added.total, atol=1e-4)


def test_turned_batches_say_the_same(tiny, embedded):
    part = embedded[:40]
    turned = align(part.pairs, clip_lens.ImageStore.open("tiny"), tiny, run="negated")
    one, two = (probe(tiny, batch, layers=[2]) for batch in (part, turned))
    assert one.drop(columns="note").equals(two.drop(columns="note"))


NOUNS = ("dog", "cat", "zebra", "cube", "star", "ball", "ring", "tree", "car", "man", "horse", "cross")


@st.composite
def linked(draw):
    """Pairs of nouns, (in the text without negation, in the text with it), in 4 to 6 parts that share no noun; within
    a part pairs share texts by chance, so that most are linked through others."""
    parts, size = draw(st.integers(4, 6)), 2
    nouns = [NOUNS[part * size : (part + 1) * size] for part in range(parts)]
    some = [draw(st.lists(st.tuples(*[st.sampled_from(own)] * 2), min_size=1, max_size=5)) for own in nouns]
    return draw(st.permutations([(*pair, draw(st.booleans())) for pairs in some for pair in pairs]))


@settings(max_examples=50, deadline=None)
@given(linked(), st.integers(0, 5))
def test_no_text_is_on_both_sides_of_the_split(nouns, seed):
    """Groups by a search of its own: a text's pairs, their texts, those texts' pairs, until nothing is added."""
    encoder = small()
    texts = [(f"There is a {one}.", f"There is no {two}.")[:: 1 if order else -1] for one, two, order in nouns]
    split = splitting.split_texts(encoder, made_up(texts, encoder), [0], seed, 0.4)
    texts = [
        {tuple(run), tuple(other)}
        for run, other in zip(split.batch.tokens.tolist(), split.batch.other.tolist(), strict=True)
    ]
    held = split.held.tolist()
    trained = set().union(*(text for text, is_held in zip(texts, held, strict=True) if not is_held))
    tested = set().union(*(text for text, is_held in zip(texts, held, strict=True) if is_held))
    assert trained
    assert tested
    assert not trained & tested
    groups = connected(texts)
    assert split.groups == len(groups)
    assert sum(group <= tested for group in groups) == round(0.4 * len(groups))
    kinds = {tuple(sorted(text)) for text in texts}
    assert len({tuple(sorted(texts[row])) for row in split.distinct.tolist()}) == len(split.distinct) == len(kinds)


def connected(texts):
    """Sets of texts that are linked by pairs."""
    groups = []
    for pair in texts:
        apart = [group for group in groups if not group & pair]
        groups = [*apart, pair.union(*(group for group in groups if group & pair))]
    return groups


@pytest.fixture(scope="module", autouse=True)
def _small():
    small.encoder = random_encoder(width=16, heads=2, layers=1, d_embed=8)


def small():
    return small.encoder


# Controls


def test_shuffled_texts_keep_their_words_and_ends():
    for causal in (True, False):
        encoder = random_encoder(causal=causal, width=16, heads=2, layers=1, d_embed=8)
        texts = ["There are no red dogs in the old picture.", "no", "There is a skateboarder on a red zebra."]
        tokens = encoder.tokens(texts)
        shuffled = controls.shuffled(encoder, tokens, 0)
        for before, after in zip(tokens.tolist(), shuffled.tolist(), strict=True):
            end = before.index(EOT)
            assert sorted(before) == sorted(after)
            assert (before[0], before[end:]) == (after[0], after[end:])
        assert tokens[0].tolist() != shuffled[0].tolist()
        alone = controls.shuffled(encoder, encoder.tokens(texts[2:]), 0)
        assert alone[0].tolist()[:8] == shuffled[2].tolist()[:8]
        assert not torch.equal(shuffled, controls.shuffled(encoder, tokens, 1))


def test_shuffled_is_the_probe_on_shuffled_texts(tiny, embedded):
    split = splitting.split_texts(tiny, embedded, [2], 0, 0.5)
    tokens = [controls.shuffled(tiny, part[split.distinct], 0) for part in (split.batch.tokens, split.batch.other)]
    batch = replace(split.batch[split.distinct], tokens=tokens[0], other=tokens[1])
    again = torch.stack([splitting.streams_of(tiny, part, [2])[0] for part in (batch.tokens, batch.other)])
    labels = np.stack([np.zeros(len(batch)), np.ones(len(batch))]).astype(int)
    fit = fit_module.tell(again, split.test, labels)
    assert module._readable(tiny, split, 0, 0.95)["shuffled"][0] == fit.accuracy


def test_the_control_is_what_memory_gives():
    types, test = np.tile(np.arange(10), (2, 12)), np.repeat([True, False], 60)
    labels = np.repeat([[0], [1]], 120, axis=1)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(types)).double()
    assert controls.control_fit(one_hot, test, types, labels, 0).accuracy == 1.0
    noise = draw(2, 120, 5)
    assert 0.3 < controls.control_fit(noise, test, types, labels, 0).accuracy < 0.7
    assert controls.control_fit(one_hot, test, np.where(test, 1, 0 * types), labels, 0) is None
    assert controls.control_fit(one_hot, test, np.full((2, 120), -1), labels, 0) is None
    unseen = np.where(test & (types < 5), 99, types)
    assert len(controls.control_fit(one_hot, test, unseen, labels, 0).right) == 2 * 30 * controls.CONTROLS


def test_subjects_that_never_recur_count_by_their_first_token():
    encoder = small()
    nouns = ("dog", "cat", "cube", "ball")
    texts = [(f"There is no {n} {end}.", f"There is a {n} {end}.") for n in nouns for end in ("here", "there", "too")]
    split = splitting.split_texts(encoder, made_up(texts, encoder), [0], 0, 0.5)
    types, words = controls.types_of(split), [text.split()[3] for text in split.batch.pairs.caption]
    assert types[0].tolist() == types[1].tolist()
    assert len({*zip(types[0].tolist(), words, strict=True)}) == len(set(types[0])) == 4
    phrases = [(f"{start} is no {n}.", f"{start} is a {n}.") for n in nouns for start in ("In it there", "There")]
    split = splitting.split_texts(encoder, made_up(phrases, encoder), [0], 0, 0.5)
    split = replace(split, held=torch.tensor([True, False] * 3 + [True, True]))
    whole = controls._subjects(split, ("subject", "subject_rest"))
    assert controls._recurring(whole, split.test).tolist() == [[True, False] * 3 + [False, False]] * 2
    assert controls.types_of(split).tolist() == whole.tolist()


def test_swapped_determiners(tiny):
    texts = [
        ("There is a red circle and no blue star.", "There is a red circle and a blue star."),
        ("There is no ring and a cross.", "There is a ring and a cross."),
        ("There are no circles.", "There are some circles."),
        *((f"There is no {colour} star.", f"There is a {colour} star.") for colour in ("red", "green", "white")),
    ]
    split = splitting.split_texts(tiny, made_up(texts, tiny), [0], 0, 0.5)
    swap = controls.swapped(split)
    words = {tiny.tower.tokenizer.decode(text[1:].tolist()).split("<end")[0] for line in swap.texts for text in line}
    assert {" ".join(text.split()) for text in words} == {
        "there is a red circle and no blue star .",
        "there is no red circle and a blue star .",
        "there is a ring and no cross .",
        "there is no ring and a cross .",
    }
    assert sorted(map(tuple, swap.first.T.tolist())) == [(0, 1), (1, 0)]


def test_what_is_missing_is_noted(tiny):
    texts = [(f"There are no {colour} stars.", f"There are some {colour} stars.") for colour in COLOURS]
    table = probe(tiny, made_up(texts, tiny), layers=[0, 2])
    assert table["noun"].isna().all()
    assert (table["noun_n"] == 0).all()
    assert table["control"].isna().all()
    assert table["selectivity"].isna().all()
    assert table["note"].str.contains("no control").all()
    assert table["note"].str.contains("no direction").tolist() == [True, False]
    assert table["cosine"].isna().tolist() == [True, False]


def test_a_probe_that_does_not_converge(tiny, embedded, monkeypatch):
    monkeypatch.setattr(fit_module, "MAX_ITER", 1)
    split = splitting.split_texts(tiny, embedded[:60], [2], 0, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "accuracy did not converge" in module._readable(tiny, split, 0, 0.95)["note"][0]


# Towers that are known


def only_the_words(**vectors):
    """A tower whose stream at the end is 0, plus the known vector of the one word that the text has."""
    clip = random_clip(width=32, heads=4, layers=1, d_embed=16).double().requires_grad_(False)
    block = clip.transformer.resblocks[0]
    clip.token_embedding.weight.zero_()
    clip.positional_embedding.zero_()
    for word, v in vectors.items():
        clip.token_embedding.weight[open_clip.tokenize([word])[0, 1]] = v
    for part in (block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj.bias, block.ln_1.bias):
        part.zero_()
    block.ln_1.weight.fill_(1.0)
    block.attn.in_proj_weight[64:] = torch.eye(32)
    block.attn.out_proj.weight.copy_(torch.eye(32))
    block.mlp.c_proj.weight.zero_()
    block.mlp.c_proj.bias.zero_()
    return load(clip, tokenizer=open_clip.SimpleTokenizer(context_length=77), dtype=torch.float64)


def test_a_direction_that_is_known():
    v = draw(32)
    encoder = only_the_words(no=v)
    nouns = ("dog", "cat", "horse", "ball", "cube", "man", "car", "tree")
    texts = [(f"There is a {noun}.", f"There is no {noun}.")[:: (-1) ** row] for row, noun in enumerate(nouns)]
    table = probe(encoder, made_up(texts, encoder))
    assert table["accuracy"].tolist() == [0.5, 1.0]
    assert table["shuffled"].tolist() == [0.5, 1.0]
    assert table["cosine"][1] == pytest.approx(1.0, abs=1e-4)
    for name in ("added_caption", "added_foil", "removed_caption", "removed_foil"):
        assert table[name].tolist() == pytest.approx([0.0, 1.0], abs=1e-9)
    split = splitting.split_texts(encoder, made_up(texts, encoder), [1], 0, 0.5)
    cosine = torch.nn.functional.cosine_similarity(split.directions[0], v - v.mean(), dim=1)
    assert (cosine > 1 - 1e-5).all()  # LayerNorm's eps
    assert table["removed_caption_random"][1] < 0.5


def test_the_embedded_model(table):
    """Nothing at the embedding, readable at once, used late, and more than random directions are."""
    early, first, _, last = (row for _, row in table.iterrows())
    assert early["accuracy"] == 0.5
    assert early["added_caption"] == pytest.approx(0.0, abs=1e-3)
    assert first["accuracy"] > 0.95
    assert first["shuffled"] > 0.9
    assert first["noun"] > 0.8
    assert last["selectivity"] > 0.15
    for name in ("added_caption", "added_foil", "removed_caption", "removed_foil"):
        assert abs(last[name]) > 2 * last[f"{name}_random"]
        assert abs(last[name]) > 2 * abs(first[name])
        assert last[f"{name}_random"] < 0.3
    assert table.attrs["model"] == "tiny"
    assert table.attrs["probe seed"] == "0"


# Labels of one's own


def colour_of(text):
    """The last colour that a text names, if any."""
    return next((word for word in reversed(text.strip(".").split()) if word in COLOURS), None)


def coloured(colours=("red", "blue", "green"), nouns=("dog", "cat", "horse", "ball", "cube", "man", "car", "tree")):
    """Pairs of texts that differ in a colour; every two colours in both orders."""
    couples = [(one, two) for one in colours for two in colours if one != two]
    return [
        tuple(f"There is a {colour} {noun}." for colour in couples[(row + step) % len(couples)])
        for row, noun in enumerate(nouns)
        for step in (0, 1)
    ]


def test_negation_as_a_label_is_the_probe_of_negation(tiny, embedded, table):
    """`no` as a function of the text, and as two columns: the numbers of the probe without labels."""
    says_no = lambda text: "no" in text.lower().split()
    info = embedded.pairs.info.assign(
        in_caption=[says_no(text) for text in embedded.pairs.caption],
        in_foil=[says_no(text) for text in embedded.pairs.foil],
    )
    columns = replace(embedded, pairs=replace(embedded.pairs, info=info))
    layers = [0, 1, 4, 6]
    found = probe(tiny, embedded, labels=says_no, layers=layers)
    assert found.equals(probe(tiny, columns, labels=("in_caption", "in_foil"), layers=layers))
    assert set(table) - set(found) == {"noun", "noun_lower", "noun_upper", "noun_n"}
    for name in set(table) & set(found) - {"note"}:
        assert np.allclose(found[name], table[name], rtol=1e-5, atol=1e-6, equal_nan=True), name
    assert found["note"].equals(table["note"])
    assert found.attrs["classes"].startswith("False: ")


def test_a_probe_of_several_classes_is_scikit_learns():
    """Six colours on a random tower by hand; a column labels the captions alone."""
    from sklearn.metrics import balanced_accuracy_score

    encoder = random_encoder(width=16, heads=2, layers=2, d_embed=8, dtype=torch.float64, seed=2)
    pairs = clip_lens.read_pairs().where(form="there-are")[:120]
    pairs = replace(pairs, info=pairs.info.assign(hue=[colour_of(text) for text in pairs.caption]))
    batch = align(pairs, random_store(pairs, 8), encoder, run="foil")
    table = probe(encoder, batch, labels="hue", layers=[2], seed=3, test_share=0.4, interval=0.9)
    only_captions = lambda text: colour_of(text) if text in pairs.caption else None
    assert table.equals(probe(encoder, batch, labels=only_captions, layers=[2], seed=3, test_share=0.4, interval=0.9))
    split = splitting.split_texts(encoder, batch, [2], 3, 0.4, "hue")
    captions = [str(text) for text in pairs.caption]
    rows = [(row, text) for row in split.distinct.tolist() for text in pairs.caption[row : row + 1] if colour_of(text)]
    rows += [(row, pairs.foil[row]) for row in split.distinct.tolist() if pairs.foil[row] in captions]
    tested = np.array([bool(split.held[row]) for row, text in rows if colour_of(text)])
    texts = [text for _, text in rows if colour_of(text)]
    labels = np.array([colour_of(text) for text in texts])
    x = streams_by_hand(encoder, texts, 2)
    mean, std = x[~tested].mean(0), x[~tested].std(0)
    model = LogisticRegression(C=1.0, max_iter=5000).fit((x[~tested] - mean) / std, labels[~tested])
    answers = model.predict((x[tested] - mean) / std)
    row = table.iloc[0]
    assert len(model.classes_) == 6
    assert row["balanced"] == pytest.approx(balanced_accuracy_score(labels[tested], answers), abs=1e-12)
    values, counts = np.unique(labels[~tested], return_counts=True)
    assert row["chance"] == pytest.approx((labels[tested] == values[counts.argmax()]).mean(), abs=1e-12)
    assert not [name for name in table if name.startswith(("added", "removed", "patched"))]
    assert "no causal test: no held-out pair has texts of two classes" in row["note"]


def test_classes_that_are_known():
    """Three colours, each a known vector: read and moved without fault at layer 1, not there at layer 0."""
    vectors = {colour: draw(32, seed=seed) for seed, colour in enumerate(("red", "blue", "green"))}
    encoder = only_the_words(**vectors)
    batch = made_up(coloured(), encoder, run="foil")
    table = probe(encoder, batch, labels=colour_of)
    assert table["accuracy"][1] == table["balanced"][1] == 1.0
    assert table["balanced"][0] == pytest.approx(1 / 3)
    assert table["accuracy"][0] == table["chance"][0] == table["chance"][1] < 0.5
    assert table["permuted"][1] < 0.8
    for name in ("added_none", "removed_none", "patched_none"):
        assert table[name].tolist() == pytest.approx([0.0, 1.0], abs=1e-9)
    assert table["added_none_random"][0] == 0.0 < table["added_none_random"][1]
    assert table["n_none"][1] == 8
    split = splitting.split_texts(encoder, batch, [1], 0, 0.5, colour_of)
    assert split.classes == ("blue", "green", "red")
    for place, (run, other) in enumerate(split.ends.T):
        apart = vectors[split.classes[other]] - vectors[split.classes[run]]
        cosine = torch.nn.functional.cosine_similarity(split.directions[0, place], apart - apart.mean(), dim=0)
        assert cosine > 0.99  # each went through a LayerNorm of its own
    no_control = "no subject is both trained on and held out: no control"
    assert table["note"].tolist() == [f"{no_control}; the classes have the same mean: no direction", no_control]


def test_the_causal_test_of_several_classes_by_hand(tiny):
    """Means of the training texts by class, moved from the run's class to the other's, by plain `steer`."""
    texts = coloured(("red", "blue", "green"), ("circle", "star", "cross", "ring", "square"))
    batch = made_up(texts, tiny, run="caption")
    added, removed = (
        probe_effects(tiny, batch, how=how, labels=colour_of, layers=[4], seed=1) for how in ("add", "remove")
    )
    held = [int(key) for key in added.pairs["key"]]
    rest = [both for row, both in enumerate(texts) if row not in held]
    distinct = {frozenset(both): both for both in reversed(rest)}.values()
    trained = [text for both in distinct for text in both]
    stream = torch.from_numpy(streams_by_hand(tiny, trained, 4)).float()
    mean = {
        colour: stream[[row for row, text in enumerate(trained) if colour_of(text) == colour]].mean(0)
        for colour in ("red", "blue", "green")
    }
    site = Site("resid", 4, slot="eot")
    run, other = (torch.stack([mean[colour_of(texts[row][which])] for row in held]) for which in (0, 1))
    by_hand = steer(tiny, batch[held], {site: other - run})
    assert torch.allclose(added.values, by_hand.values, atol=1e-4)
    without = steer(tiny, batch[held].flip(), {site: other - run}, how="remove", origin={site: run})
    assert torch.allclose(removed.values, without.values, atol=1e-4)
    assert added.values.abs().max() > 0.1


def test_random_labels_have_the_shares_of_the_true_ones():
    labels, types = np.array([[0] * 6 + [1] * 3 + [2] * 3 + [-1] * 5]), np.arange(100)
    dealt = controls._dealt(types, labels, np.random.default_rng(0))
    assert np.bincount(dealt).tolist() == [50, 25, 25]
    assert dealt.tolist() != sorted(dealt)
    assert np.bincount(controls._dealt(np.arange(5), np.array([[0, 1]]), np.random.default_rng(0))).tolist() == [3, 2]


def test_what_no_training_text_is_labelled_is_left_out_and_said():
    tiny = small()
    nouns = ("dog", "cat", "horse", "ball", "cube", "man")
    texts = [(f"There is a red {noun}.", f"There is a blue {noun}.") for noun in nouns]
    batch = made_up([*texts, ("There is a red fish.", "There is a white fish.")], tiny, run="caption")
    for seed in range(20):
        table = probe(tiny, batch, labels=colour_of, layers=[1], seed=seed)
        split = splitting.split_texts(tiny, batch, [1], seed, 0.5, colour_of)
        assert split.unseen == (("white",) if split.held[-1] else ())
        assert ("labelled 'white' left out" in table["note"][0]) == bool(split.held[-1])
        assert len(split.contrasted) == split.held[:-1].sum()
        assert table["n"][0] == split.held.sum()


def test_labels_that_do_not_fit(tiny, embedded):
    with pytest.raises(ValueError, match=r"no column 'color' of labels; did you mean 'colour'\?"):
        probe(tiny, embedded, labels="color")
    with pytest.raises(ValueError, match=r"is labelled 'scene-\d+.png' in one pair and 'scene-\d+.png' in another"):
        probe(tiny, clip_lens.align(clip_lens.read_pairs(), clip_lens.ImageStore.open("tiny"), tiny), labels="image")
    with pytest.raises(ValueError, match="at least two classes apart; the texts have 'x'"):
        probe(tiny, embedded, labels=lambda text: "x")
    with pytest.raises(ValueError, match="the texts have none"):
        probe(tiny, embedded, labels=lambda text: None)
    with pytest.raises(ValueError, match=r"0 classes of 460 .* have texts both to train on and to test on"):
        probe(tiny, embedded, labels=lambda text: text)
    with pytest.raises(TypeError, match="labels=3; give a column of the pairs"):
        probe(tiny, embedded, labels=3)
    with pytest.raises(TypeError, match="a label is a word, a number or None"):
        probe(tiny, embedded, labels=lambda text: [text])
    with pytest.raises(ValueError, match="no causal test"):
        probe_effects(tiny, embedded, labels="colour")
    with pytest.raises(ValueError, match="to tell something else apart than negation give labels="):
        probe(small(), made_up(coloured(), small(), run="foil"))


# Errors


def test_what_cannot_be_probed(tiny, embedded):
    store = clip_lens.ImageStore.open("tiny")
    with pytest.raises(ValueError, match="run='affirmative'\\) runs the same one everywhere"):
        probe(tiny, align(clip_lens.read_pairs()[:40], store, tiny, run="caption"))
    texts = [("a red star", "a blue star"), ("no star", "a star")]
    with pytest.raises(ValueError, match="1 of 2 pairs have no side"):
        probe(tiny, made_up(texts, tiny, run="caption"))
    with pytest.raises(ValueError, match="3 pairs make 3 groups that share no text, 2 of them to test on"):
        probe(tiny, embedded[:3])
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match=f"test_share={share}"):
            probe(tiny, embedded, test_share=share)
    with pytest.raises(ValueError, match="interval=95"):
        probe(tiny, embedded, interval=95)
    with pytest.raises(ValueError, match=r"resid sites at layers 0..6, got \[7\]"):
        probe(tiny, embedded, layers=[7])
    with pytest.raises(ValueError, match="give one of add, remove"):
        probe_effects(tiny, embedded, how="turn")
