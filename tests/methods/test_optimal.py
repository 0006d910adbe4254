"""Optimal ablation: the constants of a linear metric are a weighted least-squares solution, worked out by hand."""

from dataclasses import replace

import pytest
import torch
from oracle import batch_of, tower

import clip_lens
from clip_lens.core.metric import activation
from clip_lens.core.source import mean
from clip_lens.methods.optimal import optimal
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Site

ALONG = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def weighted():
    """A metric of the stream behind block 1 that weighs pairs: w_n <x, along>, w_n the first number of a direction."""
    plain = activation(Site("resid", 2, slot="eot"), ALONG)
    return replace(plain, function=lambda x, readout: (x @ ALONG.to(x)) * readout.direction[:, 0], holds="weighted")


def test_of_a_linear_metric_it_is_the_weighted_mean():
    """One neuron adds c <W_out, along> to it, whatever the pair: the best c is sum w^2 x / sum w^2."""
    encoder, batch, site = tower("causal")[1], batch_of("causal"), Site("neuron", 1, 5)
    source = optimal(encoder, batch, [site], metric=weighted(), steps=300, progress=False)
    at = encoder.pool(batch.tokens)
    x = encoder.cache(batch.tokens, names="blocks.1.mlp.hook_post")["blocks.1.mlp.hook_post"][torch.arange(7), at, 5]
    weight = batch.direction[:, 0] ** 2
    expected = (weight * x).sum() / weight.sum()
    fetched = source(encoder, batch)(torch.arange(7), ["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"]
    found = fetched[torch.arange(7), at, 5]
    assert torch.allclose(found, expected.expand(7), atol=1e-3 * float(x.std()))
    assert (expected - x.mean()).abs() > 0.02 * x.std()  # the plain mean is another number
    others = mean(encoder, batch)(torch.arange(7), ["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"]
    assert torch.equal(fetched[:, :, 6], others[:, :, 6])  # what was not learned is the mean


def test_on_its_own_pairs_it_changes_d_less_than_the_mean():
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs()[:60], store, encoder, run="caption")
    sites = [Site("head", 0, 3), Site("mlp", 2)]
    source = optimal(encoder, batch, sites, steps=8, progress=False)
    by_mean, learned = (patch_effects(encoder, batch, sites, source=s, progress=False) for s in (mean, source))
    spread = torch.tensor(batch_d(by_mean)).abs().mean()
    losses = source.training.groupby("place", sort=False).loss
    for effects, expected in ((by_mean, losses.first()), (learned, losses.min())):
        by_hand = (effects.values / spread).square().mean(1)
        assert by_hand.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert (losses.min() < 0.9 * losses.first()).all()
    assert source.identity and source.identity != optimal(encoder, batch, sites, steps=1, progress=False).identity


def batch_d(effects):
    return effects.pairs["d"].tolist()


@pytest.mark.parametrize(
    ("sites", "steps", "says"),
    [
        ([], 1, "don't overlap"),
        ([Site("head", 1), Site("head", 1, 2)], 1, "don't overlap"),
        ([Site("pattern", 1, 2)], 1, "no constants"),
        ([Site("mlp", 1)], 0, "at least one"),
    ],
)
def test_what_has_no_constants_is_refused(sites, steps, says):
    with pytest.raises(ValueError, match=says):
        optimal(tower("causal")[1], batch_of("causal"), sites, steps=steps)
