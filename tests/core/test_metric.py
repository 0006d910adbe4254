"""Metrics by hand: cosine with the counterpart, KL over a bank, and the direction between two images."""

import math
from functools import partial

import pandas as pd
import pytest
import torch
from oracle import batch_of, tower

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Readout, as_metric, cosine, kl, logit, metric
from clip_lens.data.batch import align
from clip_lens.data.images import ImageStore
from clip_lens.data.read import read_pairs
from clip_lens.methods.patching import patch_effects
from clip_lens.model.load import load
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
    assert whole.record.metric.name == whole.record.unit == "cosine" and not whole.record.metric.oriented


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
    assert (effects.record.metric.name, effects.record.unit) == ("kl over 5 texts", "nats")


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


# Orientation


@pytest.fixture(scope="module")
def embedded():
    """Eighty of the embedded pairs, the affirmative text run: sigma is +1 for half of them and -1 for the others."""
    encoder = load()
    return encoder, align(read_pairs()[:80], ImageStore.open("tiny"), encoder)


def overwritten(value, hook, *, at, line):
    value[:, at] = line
    return value


def cosines_by_hand(encoder, batch, layer):
    """Per pair: the cosine with the other text, of the run, and of the run with the stream at its end swapped."""
    found = []
    for pair in range(len(batch)):
        run, other = batch.tokens[pair : pair + 1], batch.other[pair : pair + 1]
        at, there = int(run.argmax()), int(other.argmax())
        name = f"blocks.{layer}.hook_resid_pre"
        _, cache = encoder.tower.run_with_cache(other, names_filter=[name], return_cache_object=False)
        swap = partial(overwritten, at=at, line=cache[name][:, there])
        ys = encoder.tower(run)[0, at], encoder.tower.run_with_hooks(run, fwd_hooks=[(name, swap)])[0, at]
        found.append([float(torch.cosine_similarity(y, encoder.tower(other)[0, there], dim=0)) for y in ys])
    return torch.tensor(found, dtype=torch.float64).T


def test_an_unoriented_metric_is_averaged_as_it_is(embedded):
    encoder, batch = embedded
    effects = patch_effects(encoder, batch, [Site("resid", 2, slot="eot")], metric=cosine, progress=False)
    run, patched = cosines_by_hand(encoder, batch, 2)
    assert set(effects.pairs["sigma"]) == {-1, 1}
    by_hand = float((patched - run).sum() / (1 - run).sum())
    pooled = effects.fraction(pooled=True).iloc[0]
    assert pooled.fraction == pytest.approx(by_hand, rel=1e-4)
    assert pooled.effect == pytest.approx(float((patched - run).mean()), rel=1e-4)
    ratios = effects.fraction("ratios", pooled=True).iloc[0].fraction
    assert ratios == pytest.approx(float(((patched - run) / (1 - run)).mean()), rel=1e-4)
    turned = float(((patched - run) * batch.sigma).sum() / ((1 - run) * batch.sigma).sum())
    assert abs(turned - by_hand) > 0.1  # what turning the sign with the side would give
    assert effects.signed().equal(effects.values)


def test_an_oriented_metric_is_averaged_with_its_sign(embedded):
    encoder, batch = embedded
    effects = patch_effects(encoder, batch, [Site("resid", 2, slot="eot")], progress=False)
    signed = effects.values[0].double() * batch.sigma
    assert effects.fraction(pooled=True).iloc[0].fraction == pytest.approx(
        float(signed.sum() / (effects.total.double() * batch.sigma).sum()), rel=1e-5
    )
    assert effects.signed()[0].tolist() == pytest.approx(signed.tolist())


def mine(u, readout):
    return cosine(u, readout)


PLACES_6 = [Site("resid", layer, slot="eot") for layer in range(6)]


@pytest.mark.parametrize(
    "wrapped",
    [metric(lambda u, r: cosine(u, r), oriented=False), metric(mine, oriented=False), metric(cosine, oriented=False)],
    ids=["a lambda", "a function", "cosine itself"],
)
def test_a_wrapped_metric_gives_the_same_tables(embedded, wrapped):
    encoder, batch = embedded
    one, two = (patch_effects(encoder, batch, PLACES_6, metric=m, progress=False) for m in (cosine, wrapped))
    for pooled in (False, True):
        for table in (
            lambda e, pooled=pooled: e.fraction(pooled=pooled),
            lambda e, pooled=pooled: e.fraction("ratios", pooled=pooled),
            lambda e, pooled=pooled: e.table(pooled=pooled, resamples=50),
            lambda e, pooled=pooled: e.top(3, pooled=pooled, resamples=50),
        ):
            pd.testing.assert_frame_equal(table(one), table(two))


def test_saved_orientation_is_read_back(embedded, tmp_path):
    encoder, batch = embedded
    effects = patch_effects(encoder, batch, PLACES_6[:1], metric=metric(mine, oriented=False), progress=False)
    effects.save(tmp_path / "e.parquet")
    again = Effects.load(tmp_path / "e.parquet")
    assert again.record == effects.record and not again.record.metric.oriented
    pd.testing.assert_frame_equal(again.fraction(pooled=True), effects.fraction(pooled=True))


@pytest.mark.parametrize("plain", [mine, lambda u, r: u[:, 0], partial(mine)])
def test_a_plain_function_is_asked_for_its_orientation(plain):
    with pytest.raises(TypeError, match=r"clip_lens\.metric\(function, oriented=True\)"):
        patch_effects(tower("causal")[1], batch_of("causal"), PLACES, metric=plain)
    with pytest.raises(TypeError, match="no function"):
        as_metric(3)


def test_a_metric_says_what_it_is():
    assert (logit.oriented, logit.unit, logit.name) == (True, "logits", "logit")
    assert (cosine.oriented, kl(bank_of()).oriented) == (False, False)
    named = metric(mine, oriented=True, unit="apples", name="another")
    assert repr(named) == "Metric(another, oriented, in apples)"
    effects = patch_effects(tower("causal")[1], batch_of("causal"), PLACES, metric=named, progress=False)
    assert effects.meta["metric"] == "another, in apples"
