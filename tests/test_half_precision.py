"""Half precision: the tower runs in what was asked for; embeddings, metrics, sums and counts don't."""

import pytest
import torch

import clip_lens
from clip_lens import Edge, Site
from clip_lens.core.metric import cosine, kl, logit
from clip_lens.core.source import counterpart, mean, noise, resample, zeros
from clip_lens.methods.scores import pair_scores

HALVES = (torch.bfloat16, torch.float16)
ERROR = {torch.bfloat16: 0.3, torch.float16: 0.05}
"""Logits of scale 30: what rounding every activation may cost in the mean of an effect."""


@pytest.fixture(scope="module", params=[torch.float32, *HALVES], ids=str)
def setting(request):
    encoder = clip_lens.load(dtype=request.param)
    batch = clip_lens.align(clip_lens.read_pairs()[:60], clip_lens.ImageStore.open("tiny"), encoder, run="caption")
    return encoder, batch


def verbs(encoder, batch):
    sites = [
        Site("resid", 2, slot="eot"),
        Site("head", 1, 2),
        Site("mlp", 0),
        Site("pattern", 1, 2),
        Site("neuron", 0, 3),
    ]
    edges = [
        Edge(Site("head", 0, 1), Site("q", 1, 2)),
        Edge(Site("embed"), Site("mlp", 1)),
        Edge(Site("mlp", 0), Site("out")),
    ]
    bank = encoder(["There is a ring.", "There are no rings."])
    yield "patch", clip_lens.patch_effects(encoder, batch, [*sites, *edges])
    for source in (zeros, resample(0), noise(0.5)):
        yield source, clip_lens.patch_effects(encoder, batch, [s for s in sites if s.kind != "pattern"], source=source)
    yield "mean", clip_lens.patch_effects(encoder, batch, sites[:3], source=mean)
    for metric in (cosine, kl(bank)):
        yield metric, clip_lens.patch_effects(encoder, batch, sites, metric=metric)
    yield (
        "paths",
        clip_lens.path_effects(encoder, batch, [Site("head", 0, 1)], [Site("q", 1, 2), Site("out")], through="mlp"),
    )
    for steps in (1, 3):
        yield steps, clip_lens.gradient_effects(encoder, batch, [*sites, *edges], steps=steps)
    yield "direct", clip_lens.direct_effects(encoder, batch)
    yield "lens", clip_lens.logit_lens(encoder, batch)
    yield "attention", clip_lens.attention_effects(encoder, batch)
    yield "steer", clip_lens.steer(encoder, batch, {Site("resid", 3, slot="eot"): torch.ones(128)})
    yield "circuit", clip_lens.faithfulness(encoder, batch, clip_lens.Circuit.full(encoder))


def test_every_verb_runs_and_sums_in_float32(setting):
    encoder, batch = setting
    assert batch.direction.dtype == encoder(batch.tokens).dtype == torch.float32
    for name, found in verbs(encoder, batch):
        effects = getattr(found, "effects", found)
        assert effects.values.dtype == effects.total.dtype == effects.baseline.dtype == torch.float32, name
        assert int((~effects.total.isfinite()).sum()) == effects.record.unsourced < len(batch), name
        assert effects.record.dtype == str(encoder.dtype).removeprefix("torch."), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_half_precision_costs(dtype):
    """Means over pairs are those of float32 but for the rounding of activations; the counts of `mean` are exact."""
    pairs, store = clip_lens.read_pairs()[:600], clip_lens.ImageStore.open("tiny")
    places = [Site("resid", 3, slot="eot"), Site("mlp", 0), Site("head", 1, 2)]
    found = []
    for kind in (torch.float32, dtype):
        encoder = clip_lens.load(dtype=kind)
        batch = clip_lens.align(pairs, store, encoder, run="caption")
        effects = [clip_lens.patch_effects(encoder, batch, places, source=source) for source in (counterpart, mean)]
        found.append(torch.stack([each.signed().mean(1) for each in effects]))
    assert (found[0] - found[1]).abs().max() < ERROR[dtype], found[0] - found[1]
    assert found[0].abs().max() > 1  # there is something to be wrong about


@pytest.mark.parametrize(
    ("dtype", "largest", "on_average"), [(torch.float16, 0.015, 0.003), (torch.bfloat16, 0.17, 0.026)], ids=str
)
def test_what_the_readme_says_of_d(dtype, largest, on_average):
    """The embedded model on all its pairs, against float64: no pair changes side."""
    found = []
    for kind in (torch.float64, dtype):
        encoder = clip_lens.load(dtype=kind)
        batch = clip_lens.align(clip_lens.read_pairs(), clip_lens.ImageStore.open("tiny"), encoder)
        found.append(pair_scores(encoder, batch).d.double())
    error = (found[0] - found[1]).abs()
    assert 0.5 * largest < error.max() <= largest and 0.5 * on_average < error.mean() <= on_average
    assert torch.equal(found[0] > 0, found[1] > 0) and found[0].abs().mean() == pytest.approx(7.1, abs=0.05)


def test_a_metric_is_taken_in_float32():
    u = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    encoder = clip_lens.load(dtype=torch.bfloat16)
    assert encoder.read(u.bfloat16().unsqueeze(1), 0).dtype == torch.float32
    assert logit.oriented
