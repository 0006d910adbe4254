"""Metrics by hand: cosine with the counterpart, KL over a bank, and the direction between two images."""

import math

import pytest
import torch
from oracle import batch_of, tower

from clip_lens.core.metric import Readout, cosine, kl
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site

PLACES = [Site("mlp", 1), Edge(Site("head", 0, 1), Site("q", 1, 2)), Site("resid", 3)]


def bank_of(number=5, seed=0):
    drawn = torch.randn(number, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def near():
    """A bank of texts like those that run, so that the softmax is not decided beforehand."""
    return tower("causal")[1](
        ["There are cats.", "There are no cats in it.", "dogs", "A blue ball.", "There is no zebra."]
    )


def patched_by_hook():
    """The unit embeddings of the run and of the run with MLP 1 at zero."""
    encoder, batch = tower("causal")[1], batch_of("causal", True)
    zero = ("blocks.1.hook_mlp_out", lambda value, hook: 0 * value)
    return encoder(batch.tokens), encoder(batch.tokens, hooks=[zero])


def zero_source(encoder, batch):
    return lambda pairs, names: {n: 0 * v for n, v in encoder.cache(batch.tokens[pairs], names=names).items()}


def test_cosine_is_with_the_counterparts_embedding():
    encoder, batch = tower("causal")[1], batch_of("causal", True)
    effects = patch_effects(encoder, batch, PLACES, source=zero_source, metric=cosine)
    run, patched = patched_by_hook()
    other = encoder(batch.other)
    by_hand = [torch.nn.functional.cosine_similarity(u, other) for u in (run, patched)]
    assert torch.allclose(effects.baseline, by_hand[0], atol=1e-12)
    assert torch.allclose(effects.values[0], by_hand[1] - by_hand[0], atol=1e-12)
    whole = patch_effects(encoder, batch, PLACES, metric=cosine)
    assert torch.allclose(whole.baseline + whole.values[2], torch.ones(len(batch), dtype=torch.float64))
    assert torch.allclose(whole.baseline + whole.total, torch.ones(len(batch), dtype=torch.float64))
    assert whole.meta["metric"] == "cosine"


def kl_by_hand(run, patched, direction, bank):
    def p(u):
        logits = [float(text @ direction) for text in (u, *bank)]
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        return [weight / sum(weights) for weight in weights]

    return sum(a * math.log(a / b) for a, b in zip(p(run), p(patched), strict=True) if a > 0)


def test_kl_is_that_of_the_softmax_over_this_text_and_the_bank():
    encoder, batch, bank = tower("causal")[1], batch_of("causal", True), near()
    effects = patch_effects(encoder, batch, PLACES, source=zero_source, metric=kl(bank))
    run, patched = patched_by_hook()
    expected = [kl_by_hand(u, v, w, bank) for u, v, w in zip(run, patched, batch.direction, strict=True)]
    assert effects.values[0].tolist() == pytest.approx(expected, abs=1e-10)
    assert (effects.baseline == 0).all() and (effects.values >= -1e-12).all() and max(expected) > 1e-3
    assert effects.meta["metric"] == "kl over 5 texts"


def test_kl_stays_finite_at_clips_scale():
    u, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[100.0, 0.0]])
    readout = Readout(direction=w, run=u, other=u)
    value = kl(torch.tensor([[-1.0, 0.0]]))(-u, readout)
    assert torch.allclose(value, torch.tensor([math.log(2.0)]), atol=1e-5)


@pytest.mark.parametrize("bank", [torch.zeros(0, 16), torch.ones(16), 2 * bank_of(), torch.zeros(3, 16)])
def test_kl_refuses_what_is_no_bank(bank):
    with pytest.raises(ValueError, match="unit embeddings of texts"):
        kl(bank)


def test_kl_refuses_a_bank_of_another_width():
    with pytest.raises((ValueError, RuntimeError)):
        patch_effects(
            tower("causal")[1],
            batch_of("causal"),
            PLACES,
            metric=kl(bank_of()[:, :8] / bank_of()[:, :8].norm(dim=-1, keepdim=True)),
        )


def test_two_images_and_one_text_is_a_difference_within_one_run():
    encoder, batch = tower("causal")[1], batch_of("causal", True)
    images = bank_of(2, seed=4)
    effects = patch_effects(encoder, batch.along(encoder.scale * (images[0] - images[1])), PLACES, source=zero_source)
    run, patched = patched_by_hook()
    logits = lambda u: encoder.scale * u @ images.T
    difference = [(logits(u)[:, 0] - logits(u)[:, 1]) for u in (run, patched)]
    assert torch.allclose(effects.baseline, difference[0], atol=1e-11)
    assert torch.allclose(effects.values[0], difference[1] - difference[0], atol=1e-11)
    for wrong in (images[0, :5], images, images[0] * float("nan")):
        with pytest.raises(ValueError, match="direction"):
            batch.along(wrong)
