"""Another tower as the source, against open_clip's blocks run by hand in both towers."""

from functools import cache

import open_clip
import pytest
import torch
from oracle import NAN, TOWERS, agree, batch_of, forward, given, pooled, texts_of, tower
from torch import nn
from towers import random_clip, random_encoder

from clip_lens.core.keep import Keep
from clip_lens.core.record import SourceRecord
from clip_lens.core.source import other_tower
from clip_lens.core.via import via
from clip_lens.methods.circuits.acdc import acdc
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.methods.circuits.faithfulness import completeness, faithfulness
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.paths import path_effects
from clip_lens.methods.registry import PATCHING
from clip_lens.model.load import load
from clip_lens.model.site import LAYOUTS, NO_LAYER, Edge, Site

pytestmark = pytest.mark.filterwarnings("ignore:.*has another image tower")
NAMES = list(TOWERS)
OUT, HEAD, MLP = Site("out"), Site("head", 1, 2), Site("mlp", 1)
SITES = [
    Site("embed"),
    Site("embed", slot="negator"),
    Site("q", 1, 0),
    Site("k", 0, 1, "subject"),
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
    (HEAD, Edge(HEAD, OUT), Edge(Site("head", 0, 1), Site("q", 2, 1))),
]


@cache
def other(name, seed=6):
    """Another training of the same architecture: original and encoder, as `oracle.tower`'s."""
    options = {"layers": 3, "width": 32, "heads": 4, "d_embed": 16, "seed": seed} | TOWERS[name]
    clip = random_clip(**options).double().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=77 if name == "causal" else 16)
    return clip, load(clip, tokenizer=tokenizer, dtype=torch.float64)


def text_of(clip):
    return getattr(clip, "text", clip)


def bias(clip, layer):
    block = text_of(clip).transformer.resblocks[layer]
    return block.ls_1(block.attn.out_proj.bias)


def sent_by(name, text):
    """What the other tower's senders send: by hand, a head's output with a quarter of its attention's bias, less the
    quarter that the oracle's own run does not count either."""
    here, there = tower(name)[0], other(name)[0]
    found = given(there, text.tokens)
    return {
        site: value + (bias(there, site.layer) - bias(here, site.layer)) / 4 if site.kind == "head" else value
        for site, value in found.items()
    }


def numbers(given):
    return torch.tensor(given, dtype=torch.float64)


def score(clip, text):
    return float(forward(clip, text.tokens) @ text.direction)


def read_by(clip, text, stream):
    """The metric of a residual stream behind the last block, by the final LayerNorm and projection of a tower."""
    module = text_of(clip)
    y = module.ln_final(stream)[pooled(module, text.tokens)]
    y = module.text_projection(y) if isinstance(module.text_projection, nn.Linear) else y @ module.text_projection
    return float(y / y.norm() @ text.direction)


def swaps(name):
    """What the whole swap moves in each pair, by hand."""
    return numbers([score(other(name)[0], text) - text.baseline for text in texts_of(name)])


def everything(encoder):
    """Every site of every kind, as one place."""
    return tuple(site for kind in LAYOUTS for site in encoder.sites(kind))


@pytest.mark.parametrize("name", NAMES)
def test_a_site_gives_what_the_other_tower_has_there(name):
    source = other_tower(other(name)[1])
    effects = patch_effects(tower(name)[1], batch_of(name), SITES, source=source, rows=40)
    agree(
        effects, [[text.effect(site, given(other(name)[0], text.tokens)) for text in texts_of(name)] for site in SITES]
    )
    result = patch_effects(tower(name)[1], batch_of(name), [Site("result", 1, 2)], source=source)
    # The oracle's head is what a head writes by its own output matrix, without the attention's bias.
    agree(result, [[text.effect(HEAD, given(other(name)[0], text.tokens)) for text in texts_of(name)]])


@pytest.mark.parametrize("name", NAMES)
def test_an_edge_carries_what_its_sender_writes_in_the_other_tower(name):
    edges = [place for place in EDGES if isinstance(place, Edge)]
    effects = patch_effects(tower(name)[1], batch_of(name), edges, source=other_tower(other(name)[1]), rows=40)
    agree(effects, [[text.effect(edge, sent_by(name, text)) for text in texts_of(name)] for edge in edges])
    assert effects.values.nan_to_num().abs().max(1).values.min() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_everything_swapped_is_the_other_tower_and_nothing_the_own(name):
    encoder, batch = tower(name)[1], batch_of(name)
    places = [everything(encoder), Site("projection"), (Site("resid", 3), Site("norm"), Site("projection"))]
    effects = patch_effects(encoder, batch, places, source=other_tower(other(name)[1]))
    expected = swaps(name)
    assert expected.abs().min() > 1e-3
    for found in (*effects.values, effects.total):
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    own = patch_effects(encoder, batch, [*places, *EDGES], source=other_tower(encoder))
    assert own.values.nan_to_num().abs().max() < 1e-10 and own.total.abs().max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_every_edge_swapped_is_the_encoders_reading_of_the_others_stream(name):
    encoder, batch = tower(name)[1], batch_of(name)
    source = other_tower(other(name)[1])
    streams = [given(other(name)[0], text.tokens)[OUT] for text in texts_of(name)]
    expected = numbers(
        [read_by(tower(name)[0], text, x) - text.baseline for text, x in zip(texts_of(name), streams, strict=True)]
    )
    places = [tuple(encoder.edges()), tuple(encoder.edges(receivers=[OUT])), Site("resid", 3)]
    effects = patch_effects(encoder, batch, places, source=source)
    for found in effects.values:
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    behind = patch_effects(encoder, batch, [(*encoder.edges(), Site("projection"))], source=source)
    assert torch.allclose(behind.values[0], effects.total, rtol=0, atol=1e-10)
    empty = Circuit.full(encoder) - Circuit.full(encoder)
    judged = faithfulness(encoder, batch, [empty, Circuit.full(encoder)], source=source).effects
    assert torch.allclose(judged.total, expected, rtol=0, atol=1e-10)
    assert torch.allclose(judged.values[0], expected, rtol=0, atol=1e-10) and judged.values[1].abs().max() == 0


def sharing_the_readout(name):
    """The other tower with this one's final LayerNorm and projection: what is left to swap are edges."""
    clip = random_clip(**{"layers": 3, "width": 32, "heads": 4, "d_embed": 16, "seed": 6} | TOWERS[name]).double()
    for part in ("ln_final", "text_projection"):
        setattr(text_of(clip), part, getattr(text_of(tower(name)[0]), part))
    tokenizer = open_clip.SimpleTokenizer(context_length=77 if name == "causal" else 16)
    return clip, load(clip, tokenizer=tokenizer, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_of_two_towers_that_read_alike_every_edge_swapped_is_the_other_tower(name):
    encoder, batch = tower(name)[1], batch_of(name)
    clip, encoder_of_clip = sharing_the_readout(name)
    source = other_tower(encoder_of_clip)
    expected = numbers([score(clip, text) - text.baseline for text in texts_of(name)])
    empty = Circuit.full(encoder) - Circuit.full(encoder)
    for effects in (
        patch_effects(encoder, batch, [tuple(encoder.edges())], source=source),
        faithfulness(encoder, batch, empty, source=source).effects,
    ):
        assert torch.allclose(effects.values[0], expected, rtol=0, atol=1e-10)
        assert torch.allclose(effects.total, expected, rtol=0, atol=1e-10)
    without = completeness(encoder, batch, Circuit.full(encoder), samples=2, source=source)
    assert without["incompleteness"].abs().max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_edges_are_finite_differences(name):
    encoder, batch, edges = tower(name)[1], batch_of(name), [place for place in EDGES if isinstance(place, Edge)]
    effects = gradient_effects(encoder, batch, edges, source=other_tower(other(name)[1]))
    assert torch.allclose(effects.total, swaps(name), rtol=0, atol=1e-10)
    h = 1e-5

    def slope(text, edge):
        if not text.has(sent_by(name, text), edge):
            return NAN
        change = sent_by(name, text)[edge.sender] - text.run[edge.sender]
        last = pooled(text_of(text.clip), text.tokens)
        where = [last] if edge.receiver.kind == "out" else text.where(edge.receiver.slot)
        bare = Site(edge.receiver.kind, edge.receiver.layer, edge.receiver.unit)
        step = torch.zeros_like(change)
        step[where] = h * change[where]
        nudge = lambda sign: text.metric(reads=lambda site, x: x + sign * step if site == bare else x)
        return (nudge(1) - nudge(-1)) / (2 * h)

    agree(effects, [[slope(text, edge) for text in texts_of(name)] for edge in edges], 1e-6)


def test_gradients_of_sites_and_along_the_line_of_both_embeddings():
    encoder, batch, source = tower("causal")[1], batch_of("causal"), other_tower(other("causal")[1])
    kinds = [Site(kind, 0 if kind in NO_LAYER else 1) for kind in LAYOUTS]
    effects = gradient_effects(encoder, batch, kinds, source=source)
    fetch, pairs = source(encoder, batch), torch.arange(len(batch))
    run = encoder.cache(batch.tokens)
    name, h = "blocks.1.hook_mlp_out", 1e-5
    change = fetch(pairs, [name])[name] - run[name]
    nudged = lambda sign: encoder(batch.tokens, hooks=[(name, lambda x, hook: x + sign * h * change)])
    slope = ((nudged(1) - nudged(-1)) * batch.direction).sum(1) / (2 * h)
    assert torch.allclose(effects.values[kinds.index(Site("mlp", 1))], slope, rtol=0, atol=1e-6)
    integrated = gradient_effects(encoder, batch, [Edge(Site("embed"), OUT)], source=source, steps=3)
    assert integrated.values.isfinite().all()


def test_the_search_for_a_circuit_takes_it_as_a_source():
    encoder, batch, source = tower("causal")[1], batch_of("causal", True), other_tower(other("causal")[1])
    circuit = acdc(encoder, batch, 1e-9, among=encoder.edges(receivers=[OUT]), source=source, progress=False)
    assert circuit.record.source == SourceRecord.of(source) and len(circuit) == len(encoder.edges(receivers=[OUT]))


def test_its_intervened_run_is_a_source_too():
    """`via` another tower's head is the encoder's own run in which that head writes what the other's does."""
    encoder, batch, source = tower("causal")[1], batch_of("causal"), other_tower(other("causal")[1])
    direct = patch_effects(encoder, batch, [Edge(HEAD, OUT), Site("result", 1, 2)], source=source).values
    for place, expected in zip((Edge(HEAD, OUT), Site("result", 1, 2)), direct, strict=True):
        through = patch_effects(encoder, batch, [Site("resid", 3)], source=via(place, source=source)).values[0]
        assert torch.allclose(through, expected, rtol=0, atol=1e-10)


def test_hooks_of_ones_own_leave_it_the_same_positions():
    encoder, batch, source = tower("causal")[1], batch_of("causal"), other_tower(other("causal")[1])
    places = [Site("mlp", 1), Site("resid", 3, slot="eot"), Site("norm"), Site("projection")]
    expected = patch_effects(encoder, batch, places, source=source).values
    with encoder.tower.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value)]):
        effects = patch_effects(encoder, batch, places, source=source)
    assert effects.record.hooks and torch.allclose(effects.values, expected, rtol=0, atol=1e-10)
    there = other("causal")[1]
    with (
        there.tower.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value)]),
        pytest.raises(ValueError, match=r"the other tower, .* has hooks of yours on, at blocks.0.hook_mlp_out"),
    ):
        assert source.identity is None
        patch_effects(encoder, batch, places, source=source)


def test_through_mlps_there_is_no_activation_that_says_what_the_others_head_writes():
    with pytest.raises(ValueError, match=r"tower of .*through='direct'"):
        source = other_tower(other("causal")[1])
        path_effects(tower("causal")[1], batch_of("causal"), [HEAD], [OUT], through="mlp", source=source)


def test_another_precision_is_cast():
    exact, rounded = (
        other("causal")[1],
        load(other("causal")[0], tokenizer=open_clip.SimpleTokenizer(), dtype=torch.float32),
    )
    both = [
        patch_effects(tower("causal")[1], batch_of("causal"), [MLP, EDGES[1]], source=other_tower(encoder))
        for encoder in (exact, rounded)
    ]
    assert both[1].values.dtype == torch.float64 and both[0].values.abs().max() > 1e-3
    assert torch.allclose(both[0].values, both[1].values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 2}, "layers 3 and 2"),
        ({"heads": 2}, "heads 4 and 2"),
        ({"width": 64}, r"d_model 32 and 64; d_mlp 128 and 256"),
        ({"mlp_ratio": 2.0}, "d_mlp 128 and 64"),
        ({"d_embed": 8}, "d_embed 16 and 8"),
        ({"vocab_size": 49409}, "vocabulary 49408 and 49409"),
        ({"causal": False}, "context 77 and 16; attention causal and bidirectional"),
    ],
)
def test_towers_of_another_shape_are_refused_by_what_differs(options, said):
    given = {"layers": 3, "width": 32, "heads": 4, "d_embed": 16} | options
    with pytest.raises(ValueError, match=f"no towers of one shape: they have .*{said}"):
        patch_effects(tower("causal")[1], batch_of("causal"), [MLP], source=other_tower(random_encoder(**given)))


def test_towers_that_pool_or_read_differently_are_refused():
    encoder, batch = tower("bidirectional")[1], batch_of("bidirectional")
    with pytest.raises(ValueError, match="pooling argmax and last"):
        patch_effects(encoder, batch, [MLP], source=other_tower(tower("bidirectional, pooled last")[1]))
    plain = open_clip.SimpleTokenizer()
    shouting = lambda texts, context_length=77: plain([text.replace("dogs", "cats") for text in texts], context_length)
    strange = load(other("causal")[0], tokenizer=shouting, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"read 2 of 7 texts differently, such as 'There are no dogs in it.'"):
        patch_effects(tower("causal")[1], batch_of("causal"), [MLP], source=other_tower(strange))
    without = load(other("causal")[0], dtype=torch.float64)
    assert (
        patch_effects(tower("causal")[1], batch_of("causal"), [MLP], source=other_tower(without)).values.abs().max() > 0
    )


def test_another_image_tower_is_said():
    other = load("ViT-B-32", pretrained="random:1")
    assert other_tower(other).name == "tower of ViT-B-32 (random:1)"
    encoder, batch = tower("causal")[1], batch_of("causal")
    one, two = (load(random_clip(layers=3, width=32, heads=4, d_embed=16, seed=seed)) for seed in (1, 2))
    with pytest.warns(UserWarning, match="has another image tower"):
        other_tower(two)(one, batch)
    other_tower(one)(encoder, batch)  # of the same seed as far as is known: of a text tower alone nothing is


def test_a_kept_result_is_taken_for_the_same_other_weights_only(tmp_path):
    encoder, batch = tower("causal")[1], batch_of("causal")
    there = load(other("causal")[0], tokenizer=open_clip.SimpleTokenizer(), dtype=torch.float64)
    source, runs = other_tower(there), []

    def compute(places):
        runs.append(places)
        return patch_effects(encoder, batch, places, source=source)

    from clip_lens.core.setting import Setting

    record = lambda: Setting.of(encoder, batch, source=source).record(PATCHING)
    assert record().shares and record().source.name.startswith("tower of ")
    for _ in range(2):
        Keep(tmp_path).effects("swapped", record(), [MLP], compute)
    assert len(runs) == 1
    with torch.no_grad():
        there.tower.blocks[1].mlp.b_out[0].add_(1)
    with pytest.raises(ValueError, match="is another result: source"):
        Keep(tmp_path).effects("swapped", record(), [MLP], compute)
