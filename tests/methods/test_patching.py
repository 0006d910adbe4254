"""patch_effects, every kind of site, against an open_clip forward written out by hand: one forward per pair and place.

The oracle below shares nothing with the package: it computes with open_clip's own parameters, one text at a time,
padded to the full context, and patches token by token. Alignments and slots of its texts are written down by hand.
"""

import math
from dataclasses import replace
from functools import cache

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from towers import random_clip, random_encoder, random_store

from clip_lens.core.metric import logit, metric
from clip_lens.core.source import counterpart, noise, resample
from clip_lens.data.batch import align
from clip_lens.data.pairs import Pairs
from clip_lens.data.slots import template_slots
from clip_lens.methods.patching import patch_effects
from clip_lens.model.load import load
from clip_lens.model.site import LAYOUTS, NO_LAYER, Layout, Site, members

NAN = float("nan")
LAYERS, HEADS, WIDTH = 2, 4, 32
HEAD_LIKE = ("head", "q", "k", "v", "pattern", "result")

# (text, its slots), token by token; "skateboarders" is three tokens. "There are dogs." and "no" are their other texts
# with words left out, "photo" without/with fits no template.
NO_PEOPLE = ("There are no people in it.", "sot there be negator subject subject_rest subject_rest stop eot")
SOME_PEOPLE = ("There are some people in it.", NO_PEOPLE[1])
NO_DOGS = ("There are no dogs.", "sot there be negator subject stop eot")
DOGS = ("There are dogs.", "sot there be subject stop eot")
RED_ZEBRA = ("There is a red zebra.", "sot there be negator subject subject_rest stop eot")
NO_ZEBRA = ("There is no zebra!", "sot there be negator subject stop eot")
WITHOUT = ("photo without skateboarders", "sot between changed after after after eot")
WITH = ("a photo of skateboarders", "sot changed between changed after after after eot")
BARE = ("no", "sot negator eot")
# (caption, foil, for each token of the caption its counterpart in the foil)
CASES = (
    (NO_PEOPLE, SOME_PEOPLE, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    (DOGS, NO_DOGS, [0, 1, 2, 4, 5, 6]),
    (RED_ZEBRA, NO_ZEBRA, [0, 1, 2, 3, -1, 4, 5, 6]),
    (WITH, WITHOUT, [0, -1, 1, 2, 3, 4, 5, 6]),
    (NO_DOGS, DOGS, [0, 1, 2, -1, 3, 4, 5]),
    (BARE, NO_PEOPLE, [0, 3, 8]),
)
TOWERS = {
    "causal": {},
    "causal, layer scale, pooled at an eos id": {"causal_custom": True, "pool_type": "eos", "eos_id": 49407},
    "causal, pooled last": {"causal_custom": True, "pool_type": "last"},
    "bidirectional": {"causal": False},
    "bidirectional, pooled last": {"causal": False, "pool_type": "last", "proj_bias": True},
}


# The oracle


def leave(kind, layer, value):
    return value


def oracle_run(clip, tokens, edit=leave):
    """The unit embedding of one text, [pos] tokens; `edit(kind, layer, value)` sees and may replace each activation."""
    text = getattr(clip, "text", clip)
    x = text.token_embedding.weight[tokens] + text.positional_embedding
    for layer, block in enumerate(text.transformer.resblocks):
        x = edit("resid", layer, x)
        packed = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.reshape(len(tokens), HEADS, -1) for part in packed.chunk(3, -1))
        q, k, v = edit("q", layer, q), edit("k", layer, k), edit("v", layer, v)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        if text.attn_mask is not None:
            scores = scores + text.attn_mask
        pattern = edit("pattern", layer, scores.softmax(-1))
        z = edit("head", layer, torch.einsum("hqk,khd->qhd", pattern, v))
        out = block.attn.out_proj.weight.unflatten(1, (HEADS, -1))
        result = edit("result", layer, block.ls_1(torch.einsum("qhe,dhe->qhd", z, out)))
        attn = edit("attn", layer, result.sum(1) + block.ls_1(block.attn.out_proj.bias))
        mid = edit("mid", layer, x + attn)
        hidden = edit("neuron", layer, block.mlp.gelu(block.mlp.c_fc(block.ln_2(mid))))
        x = mid + edit("mlp", layer, block.ls_2(block.mlp.c_proj(hidden)))
    normed = edit("norm", 0, text.ln_final(edit("resid", LAYERS, x)))
    projection = text.text_projection
    y = projection(normed) if isinstance(projection, nn.Linear) else normed @ projection
    y = edit("projection", 0, y)[oracle_pool(text, tokens)]
    return y / y.norm()


def oracle_pool(text, tokens):
    last = getattr(text, "pool_type", "argmax") == "last"
    return len(tokens) - 1 if last else tokens.tolist().index(49407)


def oracle_cache(clip, tokens):
    found = {}

    def keep(kind, layer, value):
        found[kind, layer] = value
        return value

    oracle_run(clip, tokens, keep)
    return found


def written(site, value, other, where, origin):
    """`value` with the site's part overwritten, position by position; the positions that had something to write."""
    value, done = value.clone(), []
    for p in where:
        if origin[p] < 0:
            continue
        done.append(p)
        units = slice(None) if site.unit is None else site.unit
        if site.kind == "pattern":
            row = [other[units, origin[p], j] if j >= 0 else 0 * other[units, 0, 0] for j in origin]
            value[units, p] = torch.stack(row, -1)
        elif site.unit is None:
            value[p] = other[origin[p]]
        else:
            value[p, units] = other[origin[p], units]
    return value, done


class Oracle:
    """One pair and direction of a case, ready to be patched slowly."""

    def __init__(self, clip, tokenize, case, run, direction):
        caption, foil, origin = case
        back = [origin.index(j) if j in origin else -1 for j in range(len(foil[1].split()))]
        self.text, other, origin = (caption, foil, origin) if run == "caption" else (foil, caption, back)
        self.clip, self.direction = clip, direction
        self.tokens, other_tokens = tokenize([self.text[0], other[0]])
        n, other_n = len(self.text[1].split()), len(other[1].split())
        width, module = len(self.tokens), getattr(clip, "text", clip)
        assert self.tokens.tolist().index(49407) == n - 1 and other_tokens.tolist().index(49407) == other_n - 1
        padded = module.attn_mask is None or getattr(module, "pool_type", "argmax") == "last"
        pads = [p if p >= other_n and padded else -1 for p in range(n, width)]
        self.origin = [*origin, *pads]
        self.length = width if padded else n
        self.pooled = oracle_pool(module, self.tokens)
        self.slots = [*self.text[1].split(), *["-"] * (width - n)]
        if self.pooled >= n:
            self.slots[n - 1] = "after" if "after" in self.slots else "-"
        self.slots[self.pooled] = "eot"
        self.run, self.other = oracle_cache(clip, self.tokens), oracle_cache(clip, other_tokens)
        self.baseline, self.target = self.metric(self.tokens), self.metric(other_tokens)

    def metric(self, tokens, edit=leave):
        return float(oracle_run(self.clip, tokens, edit) @ self.direction)

    def where(self, slot):
        positions = range(self.length)
        if slot is None:
            return list(positions)
        if isinstance(slot, int):
            return [slot] if slot in positions else []
        return [p for p in positions if self.slots[p] == slot]

    def effect(self, place):
        patched = []

        def edit(kind, layer, value):
            for site in members(place):
                at = ("resid", 0) if site.kind == "embed" else (site.kind, site.layer)
                if at == (kind, layer):
                    value, done = written(site, value, self.other[at], self.where(site.slot), self.origin)
                    patched.extend(done)
            return value

        result = self.metric(self.tokens, edit)
        return result - self.baseline if patched else NAN


@cache
def clip_of(name):
    options = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "d_embed": 16, "seed": 5} | TOWERS[name]
    if options.pop("causal_custom", False):
        # A CustomTextCLIP that looks back only: with layer scale, other pools.
        clip = random_clip(causal=False, no_causal_mask=True, ls_init_value=0.5, **options).double()
        clip.text.attn_mask = torch.full((16, 16), float("-inf"), dtype=torch.float64).triu(1)
    else:
        clip = random_clip(**options).double()
    return clip.requires_grad_(False)


@cache
def tower(name, dtype=torch.float64):
    """The original in float64 and the package's encoder of it."""
    clip = clip_of(name)
    tokenizer = open_clip.SimpleTokenizer(context_length=77 if name == "causal" else 16)
    return clip, load(clip, tokenizer=tokenizer, dtype=dtype), tokenizer


def batch_of(encoder, run, cases=CASES):
    keys = [f"pair {CASES.index(case)}" for case in cases]
    images = [f"{key}.png" for key in keys]
    pairs = Pairs(keys, [case[0][0] for case in cases], [case[1][0] for case in cases], images)
    everything = Pairs(
        [str(n) for n in range(len(CASES))], ["a"] * len(CASES), ["b"] * len(CASES), [f"pair {i}.png" for i in range(6)]
    )
    return align(pairs, random_store(everything, encoder.d_embed), encoder, run=run, slots=template_slots)


def oracles(name, run):
    clip, encoder, tokenizer = tower(name)
    batch = batch_of(encoder, run)
    return [Oracle(clip, tokenizer, case, run, batch.direction[row].double()) for row, case in enumerate(CASES)]


def places_of(kind):
    """Single units and all of them, whole, at named slots and at raw positions, at every layer."""
    layers = [0] if kind in NO_LAYER else range(LAYERS + (kind == "resid"))
    units = (None, 0, HEADS - 1) if kind in HEAD_LIKE else (None, 17) if kind == "neuron" else (None,)
    slots = (None, "sot", "negator", "subject_rest", "eot", 3, 5, 8)
    return [Site(kind, layer, unit, slot) for layer in layers for unit in units for slot in slots]


TUPLES = (
    (Site("head", 0, 1), Site("head", 0, 2)),
    (Site("head", 0, 1, "negator"), Site("mlp", 1, slot="eot")),
    (Site("mlp", 1, slot=3), Site("embed", slot="subject")),
    (Site("resid", 1, slot="stop"), Site("resid", LAYERS, slot=4)),
    (Site("pattern", 0, 0), Site("v", 0, 0), Site("q", 1), Site("k", 1, slot="eot")),
    (Site("mid", 0, slot="subject_rest"), Site("neuron", 1, 3), Site("attn", 1)),
    (Site("resid", 0, slot=2), Site("resid", 1, slot=2), Site("mlp", 0, slot=5)),
    (Site("resid", LAYERS),),
)


def check(effects, expected, places, tolerance):
    """Equal values, relative to the largest |effect| (of a whole run too), and NaN in the same places."""
    found, expected = effects.values.double(), torch.tensor(expected, dtype=torch.float64)
    differ = found.isnan() != expected.isnan()
    assert not differ.any(), [(str(places[place]), pair) for place, pair in differ.nonzero().tolist()]
    error = (found - expected).nan_to_num().abs()
    worst = divmod(int(error.argmax()), error.shape[1])
    largest = max(expected.nan_to_num().abs().max(), effects.total.abs().max())
    assert error.max() <= tolerance * largest, (str(places[worst[0]]), worst[1], float(error.max() / largest))


# Equal to the oracle


@pytest.mark.parametrize("name", TOWERS)
def test_the_oracle_is_open_clips_forward(name):
    clip, _, tokenizer = tower(name)
    for tokens in tokenizer([text for case in CASES for text, _ in case[:2]]):
        expected = clip.encode_text(tokens[None], normalize=True)[0]
        assert (oracle_run(clip, tokens) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("run", ["caption", "foil"])
@pytest.mark.parametrize("name", TOWERS)
def test_batch_has_the_alignment_and_slots_that_were_written_down(name, run):
    """The premise of what follows, so that a wrong alignment isn't taken for a wrong patch."""
    batch = batch_of(tower(name)[1], run)
    for row, oracle in enumerate(oracles(name, run)):
        inside = int(batch.length[row])
        assert inside == oracle.length
        assert batch.origin[row, :inside].tolist() == oracle.origin[:inside]
        names = [*batch.slots, "-"]
        assert [names[slot] for slot in batch.slot[row, :inside].tolist()] == oracle.slots[:inside]


@pytest.mark.parametrize("kind", [*LAYOUTS, "tuples"])
@pytest.mark.parametrize("run", ["caption", "foil"])
@pytest.mark.parametrize("name", TOWERS)
def test_effects_equal_one_forward_per_pair_and_place(name, run, kind):
    """Noising, denoising and the flipped batch; float64 and float32."""
    places = TUPLES if kind == "tuples" else places_of(kind)
    slow = oracles(name, run)
    _, encoder, _ = tower(name)
    flipped = batch_of(encoder, "foil" if run == "caption" else "caption").flip()
    expected = [[oracle.effect(place) for oracle in slow] for place in places]
    for batch in (batch_of(encoder, run), flipped):
        effects = patch_effects(encoder, batch, places, rows=16)
        check(effects, expected, places, 1e-10)
        assert effects.baseline.tolist() == pytest.approx([oracle.baseline for oracle in slow], abs=1e-11)
        assert effects.total.tolist() == pytest.approx([oracle.target - oracle.baseline for oracle in slow], abs=1e-11)
    _, single, _ = tower(name, torch.float32)
    check(patch_effects(single, batch_of(single, run), places), expected, places, 1e-5)


@pytest.mark.parametrize("run", ["affirmative", "negated"])
def test_runs_by_side_equal_the_run_that_they_name(run):
    """Both sides in one batch: each column is what the caption or the foil as the run gives."""
    _, encoder, _ = tower("causal")
    places = [site for kind in ("resid", "head", "pattern") for site in places_of(kind)]
    mixed = patch_effects(encoder, batch_of(encoder, run), places)
    by_text = {
        sigma: patch_effects(encoder, batch_of(encoder, text), places) for sigma, text in ((-1, "caption"), (1, "foil"))
    }
    assert sorted(set(mixed.pairs.sigma)) == [-1, 1]
    for column, (key, sigma) in enumerate(zip(mixed.pairs.key, mixed.pairs.sigma, strict=True)):
        one = by_text[sigma]
        there = list(one.pairs.key).index(key)
        same = torch.isclose(mixed.values[:, column], one.values[:, there], rtol=0, atol=1e-12, equal_nan=True)
        assert same.all()


def test_nan_is_where_the_method_says_and_nowhere_else():
    """An inserted token, a slot that a text has not, a position behind its end; a whole site is never NaN."""
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "foil")
    places = [Site("mlp", 0, slot=slot) for slot in (None, 0, 3, 7, "negator", "subject_rest", "prefix", "eot")]
    expected = torch.tensor(
        # pairs: some people, no dogs (other: dogs), no zebra, without, dogs (other: no dogs), no people (other: no)
        [
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 1],
            [0, 1, 0, 1, 1, 0],
            [0, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0],
        ]
    ).bool()
    assert torch.equal(patch_effects(encoder, batch, places).values.isnan(), expected)


# What changes nothing


def fits(place, batch):
    return all(not isinstance(site.slot, int) or site.slot < batch.tokens.shape[1] for site in members(place))


MIXED = (*TUPLES, *(site for kind in LAYOUTS for site in places_of(kind)[::4]))


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
@pytest.mark.parametrize("rows", [1, 3, 7, 256])
def test_rows_bound_the_work_and_change_nothing(name, rows):
    _, encoder, _ = tower(name)
    batch = batch_of(encoder, "foil")
    expected = patch_effects(encoder, batch, MIXED, rows=64).values
    found = patch_effects(encoder, batch, MIXED, rows=rows).values
    assert torch.allclose(found, expected, rtol=0, atol=1e-12, equal_nan=True)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    name=st.sampled_from(["causal", "bidirectional"]),
    order=st.permutations(range(len(CASES))),
    number=st.integers(1, len(CASES)),
    places=st.lists(st.sampled_from(MIXED), min_size=1, max_size=9),
    rows=st.integers(1, 9),
)
def test_pairs_and_places_do_not_see_each_other(name, order, number, places, rows):
    """Any pairs in any order, any places in any order and repeated: each value stays what it is alone."""
    _, encoder, _ = tower(name)
    chosen = batch_of(encoder, "caption", [CASES[row] for row in order[:number]])
    places = [Site("resid", 0, slot=0), *(place for place in places if fits(place, chosen))]
    expected = patch_effects(encoder, batch_of(encoder, "caption"), places).values[:, order[:number]]
    found = patch_effects(encoder, chosen, places, rows=rows).values
    assert torch.allclose(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_raw_positions_of_a_wider_batch_stay_the_runs_own():
    """Pairs in chunks of their own length: position 8 exists in the longest text only."""
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "caption")
    effects = patch_effects(encoder, batch, [Site("resid", 0, slot=8)], rows=2)
    assert effects.values.isnan().tolist() == [[False, True, True, True, True, True]]


# Sources, metrics, errors


def test_a_source_that_does_not_know_where_it_differs_gives_the_same():
    """`first` only saves work."""
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "foil")
    plain = patch_effects(encoder, batch, MIXED, source=lambda *of: counterpart(*of).__call__).values
    assert torch.allclose(patch_effects(encoder, batch, MIXED).values, plain, rtol=0, atol=1e-12, equal_nan=True)


def test_own_sources_and_metrics_are_functions():
    """Zeros as the source, the cosine with the other text's embedding as the metric."""
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "foil")

    def zeros(encoder, batch):
        return lambda pairs, names: {
            name: 0 * value for name, value in encoder.cache(batch.tokens[pairs], names=names).items()
        }

    @metric(oriented=False, unit="cosine")
    def cosine(u, readout):
        return (u * readout.other).sum(-1)

    effects = patch_effects(encoder, batch, [Site("mlp", 1)], source=zeros, metric=cosine)
    hook = ("blocks.1.hook_mlp_out", lambda value, hook: 0 * value)
    expected = (encoder(batch.tokens, hooks=[hook]) - encoder(batch.tokens)) * encoder(batch.other)
    assert torch.allclose(effects.values[0], expected.sum(1), atol=1e-12)
    assert (effects.record.source.name, effects.record.metric.name) == ("zeros", "cosine")
    assert not effects.record.metric.oriented and effects.record.source.swaps is False


def test_result_says_what_it_is():
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "foil")
    effects = patch_effects(encoder, batch, [Site("mlp", 1)])
    slow = oracles("causal", "foil")
    assert effects.pairs.d.tolist() == pytest.approx([oracle.target - oracle.baseline for oracle in slow], abs=1e-11)
    assert torch.allclose(effects.signed()[0], effects.values[0])
    noised = patch_effects(encoder, batch.flip(), [Site("mlp", 1)])
    assert noised.pairs.d.tolist() == pytest.approx(effects.pairs.d.tolist(), abs=1e-11)
    assert (noised.signed() + noised.values).abs().max() == 0
    assert list(effects.pairs.unaligned) == [0, 1, 0, 0, 0, 6]
    assert (
        effects.meta["run"].endswith("foil is run and patched") and effects.meta["positions without counterpart"] == "7"
    )


def test_model_is_left_as_it_was():
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "foil")
    before = encoder(batch.tokens)
    patch_effects(encoder, batch, MIXED)
    assert torch.equal(encoder(batch.tokens), before)
    assert not any(point.fwd_hooks for point in encoder.tower.hook_dict.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": []}, "no places"),
        ({"places": [Site("mlp", 1), ()]}, "empty tuple"),
        ({"places": [Site("mlp", 2)]}, r"mlp 2: .* has mlp sites at layers 0\.\.1"),
        ({"places": [Site("resid", 3)]}, r"resid 3: .* at layers 0\.\.2"),
        ({"places": [Site("head", 0, 4)]}, r"head units 0\.\.3"),
        ({"places": [Site("neuron", 0, 128)]}, r"neuron units 0\.\.127"),
        ({"places": [Site("mlp", 0, slot="verb")]}, "no slot 'verb'; there are sot, prefix"),
        ({"places": [(Site("mlp"), Site("mlp", 0, slot=9))]}, r"positions 0\.\.8"),
        ({"rows": 0}, "rows=0"),
        (
            {"metric": metric(lambda u, readout: u, oriented=True)},
            r"one number per row, \(6,\); this one gave \(6, 16\)",
        ),
        ({"metric": metric(lambda u, readout: 0 * logit(u, readout) / 0, oriented=True)}, "not finite"),
    ],
)
def test_bad_input_gets_its_error(change, message):
    _, encoder, _ = tower("causal")
    arguments = {"places": [Site("mlp", 1)]} | change
    with pytest.raises(ValueError, match=message):
        patch_effects(encoder, batch_of(encoder, "foil"), arguments.pop("places"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": Site("mlp", 1)}, r"got one place, mlp 1; write \[Site\(kind='mlp', layer=1"),
        ({"source": noise}, "noise makes a source: call it"),
        ({"source": resample}, "resample makes a source: call it"),
        ({"metric": lambda u, readout: u.sum(-1)}, "does not say whether its sign turns with the side.*oriented=True"),
    ],
)
def test_a_name_or_a_maker_in_the_place_of_a_function_is_refused(change, message):
    _, encoder, _ = tower("causal")
    arguments = {"places": [Site("mlp", 1)]} | change
    with pytest.raises(TypeError, match=message):
        patch_effects(encoder, batch_of(encoder, "foil"), arguments.pop("places"), **arguments)


def test_batch_of_another_width_is_refused():
    _, encoder, _ = tower("causal")
    batch = batch_of(encoder, "foil")
    with pytest.raises(ValueError, match="7 components"):
        patch_effects(encoder, replace(batch, direction=batch.direction[:, :7]), [Site("mlp", 1)])


@pytest.mark.parametrize(
    ("kind", "layout", "twin"),
    [
        ("pre", Layout("blocks.{layer}.mlp.hook_pre", unit_axis=2), "neuron"),
        ("scores", Layout("blocks.{layer}.attn.hook_attn_scores", unit_axis=1, pos_axis=2), "pattern"),
    ],
)
def test_a_new_kind_of_site_is_one_line(kind: str, layout: Layout, twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons before and behind their activation function, patterns before and behind the softmax, patched whole from a
    text of equal length, do the same."""
    monkeypatch.setitem(LAYOUTS, kind, layout)
    encoder = random_encoder(dtype=torch.float64)
    pairs = Pairs(["a"], ["There are no dogs in it."], ["There are some dogs in it."], ["1.jpg"])
    batch = align(pairs, random_store(pairs, encoder.d_embed), encoder, run="caption")
    mine, known = (patch_effects(encoder, batch, encoder.sites(name, slots=(None, "eot"))) for name in (kind, twin))
    assert str(mine.places[-1]).startswith(f"{kind} 2.") and len(mine.places) == len(known.places)
    torch.testing.assert_close(mine.values, known.values, atol=1e-10, rtol=0)
    assert mine.values.abs().max() > 1e-3
