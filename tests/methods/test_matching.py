"""attention_attribution: its sum is the score, and taking out a part with a frozen LayerNorm is a row of it."""

import math

import pytest
import torch
from oracle import Text, batch_of, tower

from clip_lens.core.effects import Effects
from clip_lens.methods.matching import attention_attribution
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Match, Site, members
from clip_lens.show.figures.heatmap import heatmap

NAMES = pytest.mark.parametrize("name", ["causal", "bidirectional", "bidirectional, pooled last"])


def scores(encoder, tokens, layer, head, query, key):
    cache = encoder.cache(tokens, names=f"blocks.{layer}.attn.hook_attn_scores")
    return next(iter(cache.values()))[torch.arange(len(tokens)), head, query, key]


@pytest.mark.parametrize("layer", [0, 1, 2])
@NAMES
def test_it_sums_to_the_score(name, layer):
    encoder, batch = tower(name)[1], batch_of(name)
    found = attention_attribution(encoder, batch, layer, 3, None, 1)
    expected = scores(encoder, batch.tokens, layer, 3, encoder.pool(batch.tokens), 1)
    assert (found.values.sum(0) - expected).abs().max() <= 1e-10 * expected.abs().max() > 0
    assert torch.allclose(found.total, expected, atol=1e-12) and torch.equal(found.baseline, found.total)
    assert len(found.places) == (3 + 6 * layer) ** 2


@NAMES
def test_a_contrast_is_the_other_text_minus_the_run_at_matched_positions(name):
    encoder, batch = tower(name)[1], batch_of(name, True)
    found = attention_attribution(encoder, batch, 2, 1, "eot", 3, contrast=True)
    back = attention_attribution(encoder, batch.flip(), 2, 1, "eot", 3)
    run = attention_attribution(encoder, batch, 2, 1, "eot", 3)
    assert torch.allclose(found.values, back.values - run.values, atol=1e-12)
    assert (found.values.sum(0) - found.total).abs().max() <= 1e-10 * found.total.abs().max() > 0
    d = batch.sigma * ((encoder(batch.other) - encoder(batch.tokens)) * batch.direction).sum(-1)
    for effects in (found, run):
        assert effects.pairs["d"].tolist() == pytest.approx(d.tolist())


@pytest.mark.parametrize("side", ["query", "key"])
@NAMES
def test_taking_a_part_out_of_one_side_with_layernorm_frozen_is_its_row_or_column(name, side):
    """By hand on open_clip's blocks: the stream that q or k reads, less one sender, over the unpatched scale."""
    clip, encoder = tower(name)
    batch, layer, head, query, key = batch_of(name)[[1, 4]], 2, 1, 2, 1
    found = attention_attribution(encoder, batch, layer, head, query, key)
    block = getattr(clip, "text", clip).transformer.resblocks[layer]
    weight = block.attn.in_proj_weight.unflatten(0, (3, 4, -1))[:, head]
    bias = block.attn.in_proj_bias.unflatten(0, (3, 4, -1))[:, head]
    for pair in range(len(batch)):
        text = Text(clip, batch, pair)
        whole = stream_into(clip, text, layer)
        std = (whole.var(-1, correction=0, keepdim=True) + block.ln_1.eps).sqrt()

        def score(q, k, std=std):
            normed = ((x - x.mean(-1, keepdim=True)) / std * block.ln_1.weight + block.ln_1.bias for x in (q, k))
            q, k = (x @ weight[n].T + bias[n] for n, x in enumerate(normed))
            return float(q[query] @ k[key]) / math.sqrt(8)

        for part in (Site("head", 0, 2), Site("head", 1, 0), Site("mlp", 1)):
            less = whole - text.run[part]
            taken = score(less, whole) if side == "query" else score(whole, less)
            line = [at for at, place in enumerate(found.places) if getattr(place, side) == part]
            assert -float(found.values[line, pair].sum()) == pytest.approx(taken - score(whole, whole), abs=1e-10)


def stream_into(clip, text, layer):
    """The residual stream that enters a block, from what the oracle's components give."""
    below = [site for site in text.run if site.kind in ("head", "mlp") and site.layer < layer]
    blocks = getattr(clip, "text", clip).transformer.resblocks
    biases = sum(block.ls_1(block.attn.out_proj.bias) for block in blocks[:layer])
    return sum(text.run[site] for site in (Site("embed"), *below)) + biases


def test_it_is_kept_and_drawn(tmp_path):
    encoder, batch = tower("causal")[1], batch_of("causal")
    found = attention_attribution(encoder, batch, 1, 0, "eot", 1)
    found.save(tmp_path / "a.parquet")
    again = Effects.load(tmp_path / "a.parquet")
    assert again.places == found.places and torch.equal(again.values, found.values)
    assert isinstance(found.places[0], Match) and members(found.places[0]) == ()
    assert (found.record.unit, found.record.metric.oriented) == ("attention score", False)
    grid = found.grid("sender", "receiver", "effect", side="foil")
    assert list(grid.index) == list(grid.columns)
    assert list(grid.index)[:3] == ["token", "position", "head 0.0"] and grid.index[-1] == "constant"
    assert len(heatmap(found, "sender", "receiver", "effect", side="foil").data[0].z) == 9
    with pytest.raises(ValueError, match="patch the edges into q and k"):
        patch_effects(encoder, batch, found.places[:1])


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ((3, 0, None, 1), "layers 0..2"),
        ((0, 4, None, 1), "units 0..3"),
        ((0, 0, None, "negator"), "no token at 'negator'"),
        ((0, 0, None, "noun"), "no slot 'noun'"),
    ],
)
def test_what_is_not_there_is_refused(where, says):
    with pytest.raises(ValueError, match=says):
        attention_attribution(tower("causal")[1], batch_of("causal"), *where)
