"""Sources against open_clip's blocks run by hand, for sites and for edges."""

from dataclasses import replace

import pytest
import torch
from oracle import NAN, Text, agree, batch_of, given, same, texts_of, tower
from towers import random_store

from clip_lens.core import source as sources
from clip_lens.core.source import counterpart, mean, noise, resample, zeros
from clip_lens.core.via import via
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site

NAMES = ("causal", "bidirectional")
OUT, HEAD, MLP = Site("out"), Site("head", 1, 2), Site("mlp", 1)
SITES = [
    Site("embed", slot="negator"),
    HEAD,
    Site("head", 0, 1, "negator"),
    Site("q", 1, 0),
    Site("v", 2, 3, "eot"),
    MLP,
    Site("mlp", 0, slot="subject"),
]
EDGES = [
    Edge(Site("embed"), Site("q", 1, 0)),
    Edge(HEAD, Site("v", 2, 1, "eot")),
    Edge(Site("head", 0, 1), Site("mlp", 1, slot="negator")),
    Edge(MLP, Site("k", 2, 2)),
    Edge(MLP, OUT),
    Edge(Site("head", 2, 0), OUT),
]
PLACES = [*SITES, *EDGES, (HEAD, MLP, EDGES[2]), tuple(EDGES)]


def by_hand(name, source_of):
    """Every place's effect with what `source_of(text, row)` gives, {site: [pos ...]}, plus everything as the total."""
    texts, encoder = texts_of(name), tower(name)[1]
    given_by = [source_of(text, row) for row, text in enumerate(texts)]
    everything = tuple(encoder.edges())
    lines = [[text.effect(place, what) for text, what in zip(texts, given_by, strict=True)] for place in PLACES]
    return lines, [text.effect(everything, what) for text, what in zip(texts, given_by, strict=True)]


def hold(name, source, source_of, rows=40):
    effects = patch_effects(tower(name)[1], batch_of(name), PLACES, source=source, rows=rows)
    expected, total = by_hand(name, source_of)
    agree(effects, expected)
    assert torch.allclose(effects.total, torch.tensor(total, dtype=torch.float64), rtol=0, atol=1e-9, equal_nan=True)
    all_edges = patch_effects(tower(name)[1], batch_of(name), [tuple(tower(name)[1].edges())], source=source)
    assert torch.allclose(all_edges.values[0], all_edges.total, rtol=0, atol=1e-10, equal_nan=True)
    return effects


def named_site(encoder, cache, site):
    """What a component gives, from the activation at its hook."""
    if site.kind == "embed":
        return cache["blocks.0.hook_resid_pre"]
    if site.kind == "mlp":
        return cache[f"blocks.{site.layer}.hook_mlp_out"]
    if site.kind == "head":
        return cache[f"blocks.{site.layer}.attn.hook_z"][:, site.unit] @ encoder.tower.W_O[site.layer, site.unit]
    return cache[f"blocks.{site.layer}.attn.hook_{site.kind}"][:, site.unit]


def every_hook(encoder):
    layers = range(encoder.n_layers)
    attention = [f"blocks.{layer}.attn.hook_{part}" for layer in layers for part in "qkvz"]
    return ["blocks.0.hook_resid_pre", *attention, *(f"blocks.{layer}.hook_mlp_out" for layer in layers)]


# Each source


@pytest.mark.parametrize("name", NAMES)
def test_counterpart(name):
    hold(name, counterpart, lambda text, row: text.counterpart())


@pytest.mark.parametrize("name", NAMES)
def test_zeros(name):
    """By the oracle a head gives its part without the attention's bias, an MLP its output with the bias."""
    effects = hold(name, zeros, lambda text, row: {site: 0 * value for site, value in text.run.items()})
    assert effects.record.source.name == "zeros"
    clip, encoder = tower(name)
    layers = [block.ls_1(block.attn.out_proj.bias) for block in getattr(clip, "text", clip).transformer.resblocks]
    last = sum(layers).expand(len(batch_of(name)), 1, -1)
    left = encoder.read(encoder.tower(last, start_at_layer=encoder.n_layers), 0)
    found = (left * batch_of(name).direction).sum(-1) - effects.baseline
    assert torch.allclose(found, effects.total, atol=1e-10)


def means_by_hand(name):
    """Per slot over the run texts; the tokens of no slot together."""
    lines = {}
    for text in texts_of(name):
        for site, value in text.run.items():
            for p in range(text.length):
                lines.setdefault((site, text.slots[p]), []).append(value[p])
    return {key: torch.stack(values).mean(0) for key, values in lines.items()}


@pytest.mark.parametrize("name", NAMES)
def test_mean(name, monkeypatch):
    means = means_by_hand(name)

    def source_of(text, row):
        return {
            site: torch.stack([means.get((site, slot), torch.full_like(value[0], NAN)) for slot in text.slots])
            for site, value in text.run.items()
        }

    once = hold(name, mean, source_of).values
    monkeypatch.setattr(sources, "CHUNK", 2)
    chunked = patch_effects(tower(name)[1], batch_of(name), PLACES, source=mean, rows=2).values
    assert torch.allclose(once, chunked, rtol=0, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_mean_over_others_is_theirs_at_the_slots_of_the_run(name):
    """The means of pairs of unequal length, at the slots of pairs of equal length: other texts, other positions."""
    encoder, over, batch = tower(name)[1], batch_of(name, False, "foil"), batch_of(name, True)
    hook, lines = "blocks.1.hook_mlp_out", {}
    for n, value in enumerate(encoder.cache(over.tokens, names=hook)[hook]):
        for p in range(int(over.length[n])):
            lines.setdefault(int(over.slot[n, p]), []).append(value[p])
    index = torch.tensor([2, 0])
    found = mean(over=over)(encoder, batch)(index, [hook])[hook]
    seen = 0
    for row, n in enumerate(index.tolist()):
        for p in range(int(batch.length[n])):
            values = lines.get(int(batch.slot[n, p]))
            if values is None:
                assert found[row, p].isnan().all()
            else:
                seen += 1
                assert torch.allclose(found[row, p], torch.stack(values).mean(0), rtol=1e-10, atol=1e-12)
    assert seen > 5
    assert not torch.equal(batch.slot[index][:, : over.slot.shape[1]], over.slot[index][:, : batch.slot.shape[1]])


def test_a_text_that_many_pairs_have_is_run_once_and_counts_for_each(monkeypatch):
    encoder, texts = (
        tower("causal")[1],
        ["There is a dog.", "There are no red cats.", "There is a dog."] * 3 + ["A cat."],
    )
    pairs = Pairs(range(10), texts, ["There is no bird."] * 10, ["1.png"] * 10)
    batch = align(pairs, random_store(pairs, 16), encoder, run="caption")
    hook, lines = "blocks.1.hook_mlp_out", {}
    for n, value in enumerate(encoder.cache(batch.tokens, names=hook)[hook]):
        for p in range(int(batch.length[n])):
            lines.setdefault(int(batch.slot[n, p]), []).append(value[p])
    ran, cache = [], type(encoder).cache
    monkeypatch.setattr(
        type(encoder), "cache", lambda self, texts, **how: ran.append(len(texts)) or cache(self, texts, **how)
    )
    found = mean(encoder, batch)(torch.arange(10), [hook])[hook]
    assert sum(ran) == 3
    for n in range(10):
        for p in range(int(batch.length[n])):
            by_hand = torch.stack(lines[int(batch.slot[n, p])]).mean(0)
            assert torch.allclose(found[n, p], by_hand, rtol=1e-10, atol=1e-12)


def test_mean_of_a_pattern_is_refused():
    with pytest.raises(ValueError, match=r"mean of blocks\.1\.attn\.hook_pattern is not defined"):
        patch_effects(tower("causal")[1], batch_of("causal"), [Site("pattern", 1)], source=mean)


def structure(batch, pair):
    return tuple(batch.slot[pair, : int(batch.length[pair])].tolist())


RESAMPLED = (
    ("There are no dogs.", "There are some dogs."),
    ("There are no cats.", "There are some cats."),
    ("There is a zebra.", "There is no zebra."),
    ("There are no red dogs.", "There are red dogs."),
    ("cat", "dog"),
    ("bird", "dog"),
    ("A red cube left of it.", "A blue cube."),
)


def resampled_batch(name):
    pairs = Pairs(range(len(RESAMPLED)), *zip(*RESAMPLED, strict=True), [f"{row}.png" for row in range(7)])
    return align(pairs, random_store(pairs, 16), tower(name)[1], run="caption")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_resample(name, seed):
    """Another pair of the same slot structure, found out from what the fetch gives, and patched by hand."""
    clip, encoder = tower(name)
    batch = resampled_batch(name)
    names = every_hook(encoder)
    fetch = resample(seed)(encoder, batch)
    got = fetch(torch.arange(len(batch)), names)
    embed, partner = "blocks.0.hook_resid_pre", {}
    for pair in range(len(batch)):
        length = int(batch.length[pair])
        own = encoder.cache(batch.tokens, names=[embed])[embed]
        partner[pair] = [
            other for other in range(len(batch)) if torch.allclose(own[other, :length], got[embed][pair, :length])
        ]
        same_structure = [o for o in range(len(batch)) if o != pair and structure(batch, o) == structure(batch, pair)]
        assert bool(partner[pair]) == bool(same_structure) and set(partner[pair]) <= set(same_structure)
        assert bool(got[embed][pair, :length].isnan().all()) != bool(same_structure)
    effects = patch_effects(encoder, batch, PLACES, source=resample(seed), rows=3)
    for pair, found in partner.items():
        if not found:
            assert effects.values[:, pair].isnan().all() and effects.total[pair].isnan()
            continue
        text, other = Text(clip, batch, pair), given(clip, batch.tokens[found[0]])
        expected = torch.tensor([text.effect(place, other) for place in PLACES], dtype=torch.float64)
        assert torch.allclose(effects.values[:, pair], expected, rtol=0, atol=1e-10, equal_nan=True)
    lonely = len([found for found in partner.values() if not found])
    assert effects.values.isnan().all(0).sum() == lonely > 0
    assert effects.meta["pairs without a source"] == str(lonely)


def test_resample_is_seeded():
    pairs = Pairs(range(8), [f"There are no {x}s." for x in "abcdefgh"], ["a"] * 8, [f"{row}.png" for row in range(8)])
    encoder = tower("causal")[1]
    batch = align(pairs, random_store(pairs, 16), encoder, run="caption")
    drawn = [patch_effects(encoder, batch, [MLP], source=resample(seed)).values for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", NAMES)
def test_noise(name):
    """What the fetch gives is what is patched, and it is the run plus noise of the right size."""
    encoder, batch = tower(name)[1], batch_of(name)
    names = every_hook(encoder)
    got = noise(0.5, 3)(encoder, batch)(torch.arange(len(batch)), names)

    def source_of(text, row):
        cache = {name: value[row] for name, value in got.items()}
        return {site: named_site(encoder, cache, site) for site in text.run if site.kind != "out"}

    effects = hold(name, noise(0.5, 3), source_of)
    assert effects.record.source.name == "noise(0.5, seed=3)"
    own = encoder.cache(batch.tokens, names=names)
    for name_ in names:
        for pair, length in enumerate(batch.length.tolist()):
            change = (got[name_] - own[name_])[pair, :length] / own[name_][pair, :length].std(correction=0)
            assert abs(float(change.std()) - 0.5) < 4 * 0.5 / (2 * change.numel()) ** 0.5
            assert abs(float(change.mean())) < 4 * 0.5 / change.numel() ** 0.5


def test_noise_is_drawn_per_seed_key_and_hook():
    encoder, batch = tower("causal")[1], batch_of("causal")
    places = [MLP, HEAD, EDGES[0], Site("pattern", 1)]
    whole = patch_effects(encoder, batch, places, source=noise(0.3, 1)).values
    assert torch.equal(whole, patch_effects(encoder, batch, places, source=noise(0.3, 1)).values)
    order = [4, 2, 0, 5]
    some = patch_effects(encoder, batch[order], places, source=noise(0.3, 1), rows=3).values
    assert torch.allclose(some, whole[:, order], rtol=0, atol=1e-10)
    assert not torch.allclose(whole, patch_effects(encoder, batch, places, source=noise(0.3, 2)).values)
    renamed = replace(batch, pairs=replace_keys(batch.pairs))
    assert not torch.allclose(whole, patch_effects(encoder, renamed, places, source=noise(0.3, 1)).values)
    still = patch_effects(encoder, batch, places, source=noise(0.0)).values
    assert still.abs().max() < 1e-12
    for std in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite standard deviation"):
            noise(std)


def replace_keys(pairs):
    return Pairs([f"other {key}" for key in pairs.key], pairs.caption, pairs.foil, pairs.image)


# via


@pytest.mark.parametrize("freeze", [(), ("head",), ("mlp",), ("head", "mlp")])
@pytest.mark.parametrize("name", NAMES)
def test_via_is_a_run_patched_by_hand_with_the_rest_held(name, freeze):
    places = [HEAD, Site("head", 0, 1, "negator"), Site("mlp", 0, slot="subject")]
    for place in places:
        slot, site = place.slot, Site(place.kind, place.layer, place.unit)

        def source_of(text, row, slot=slot, site=site):
            other = text.counterpart()

            def gives(here, value):
                if here == site:
                    return text.blend(text.run[here] if here.kind in freeze else value, other[here], slot)
                return text.run[here] if here.kind in freeze else value

            arrived = held(text, gives)
            nothing = all(other[site][p].isnan().all() for p in text.where(slot))
            return {key: value * NAN if nothing else value for key, value in arrived.items()}

        effects = hold(name, via(place, freeze=freeze), source_of)
        assert effects.record.source.name.startswith(f"via({place} from counterpart")


def held(text, gives=same):
    """What the components of an intervened run give in the end."""
    found = {}

    def keep(site, value):
        found[site] = gives(site, value)
        return found[site]

    given(text.clip, text.tokens, keep)
    return found


def test_via_an_edge_and_via_of_via():
    encoder, batch = tower("causal")[1], batch_of("causal")
    edge = Edge(HEAD, Site("v", 2, 1))
    through = patch_effects(encoder, batch, [Site("resid", 3), Site("v", 2, 1)], source=via(edge)).values
    expected = patch_effects(encoder, batch, [edge]).values[0]
    assert torch.allclose(through, expected.expand(2, -1), rtol=0, atol=1e-10, equal_nan=True)
    twice = patch_effects(encoder, batch, [Site("resid", 3)], source=via(MLP, source=via(Site("embed")))).values
    once = patch_effects(encoder, batch, [MLP], source=via(Site("embed"))).values
    assert torch.allclose(twice, once, rtol=0, atol=1e-10)
    named = via(MLP, source=zeros, freeze=("head",)).name
    assert named == "via(mlp 1 from zeros, head frozen)"
