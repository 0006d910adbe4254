"""Learned bases: each by its definition, DAS by what it must reach, and their controls."""

import numpy as np
import pytest
import torch
from oracle import batch_of, tower

import clip_lens
from clip_lens.core.subspace import subspace
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.subspaces import learn_basis
from clip_lens.model.site import Site

SITE, PLACE = Site("resid", 3), Site("resid", 3, slot="eot")


@pytest.fixture(scope="module")
def tiny():
    encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
    batch = clip_lens.align(clip_lens.read_pairs()[:120], store, encoder, run="affirmative")
    return encoder, batch, *batch.split(0.5, by="text")


def streams(encoder, tokens):
    cached = encoder.cache(tokens, names="blocks.3.hook_resid_pre")["blocks.3.hook_resid_pre"]
    return cached[torch.arange(len(tokens)), encoder.pool(tokens)].double()


def test_means_are_the_mean_difference(tiny):
    encoder, batch, *_ = tiny
    mean = (streams(encoder, batch.other) - streams(encoder, batch.tokens)).mean(0)
    for given in (batch, batch.flip()):
        found = learn_basis(encoder, given, SITE).vectors[:, 0]
        assert abs(float(found @ mean) / float(mean.norm())) == pytest.approx(1, abs=1e-6)


def test_a_probe_tells_the_texts_apart_and_a_shuffled_one_does_not(tiny):
    encoder, _, found, judged = tiny
    run, other = (streams(encoder, tokens) for tokens in (judged.tokens, judged.other))

    def right(basis):
        along = (other - run) @ basis.vectors[:, 0]
        return max(float((along > 0).double().mean()), float((along < 0).double().mean()))

    assert right(learn_basis(encoder, found, SITE, "probe")) > 0.95
    means = [learn_basis(encoder, found, SITE, shuffled=True, seed=seed) for seed in range(3)]
    assert all(basis.shuffled for basis in means)
    real = learn_basis(encoder, found, SITE).vectors[:, 0]
    assert np.median([abs(float(basis.vectors[:, 0] @ real)) for basis in means]) < 0.95


def test_das_moves_more_than_a_random_direction_of_its_length_and_than_one_learned_from_other_texts(tiny):
    """On texts it has not seen, the negation in the caption; in the foil one direction carries none of it."""
    encoder, _, found, judged = tiny
    site, place = Site("resid", 5), Site("resid", 5, slot="eot")
    basis, control = (
        learn_basis(encoder, found, site, "das", epochs=15, shuffled=shuffled) for shuffled in (False, True)
    )
    assert basis.losses[-1] < 0.8 * basis.losses[0] and len(basis.losses) == 15
    learned, shuffled, *random = (
        patch_effects(encoder, judged, [place], source=source).fraction().set_index("side").fraction["caption"]
        for source in (basis.source, control.source, *(basis.random(seed) for seed in range(5)))
    )
    assert learned > 2 * max(map(abs, random)) and learned > 1.5 * shuffled


def test_of_the_last_stream_the_total_is_still_the_other_text(tiny):
    encoder, _, _, judged = tiny
    place, one = Site("resid", 6, slot="eot"), torch.eye(128)[:, :1]
    found = patch_effects(encoder, judged, [place], source=subspace(Site("resid", 6), one))
    whole = patch_effects(encoder, judged, [place])
    assert torch.allclose(found.total, whole.total, atol=1e-3)
    assert (found.values - found.total).abs().max() > 1


def test_das_is_of_its_seed_and_leaves_the_tower_as_it_was(tiny):
    encoder, _, found, _ = tiny
    before = encoder.digest
    one, two = (learn_basis(encoder, found, SITE, "das", rank=2, epochs=2, seed=3).vectors for _ in range(2))
    assert torch.equal(one, two) and one.shape == (128, 2)
    assert torch.allclose(one.T @ one, torch.eye(2).double(), atol=1e-9)
    assert encoder.digest == before and not encoder.hooked
    assert not any(parameter.requires_grad for parameter in encoder.tower.parameters())


def test_random_bases_of_full_rank_behave_as_the_site(tiny):
    """The control of a full basis is the whole patch; of one direction it is far from it."""
    encoder, _, _, judged = tiny
    whole = patch_effects(encoder, judged, [PLACE]).values
    drawn = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    full = patch_effects(encoder, judged, [PLACE], source=subspace(SITE, drawn, norm_of=torch.eye(128))).values
    assert torch.allclose(full, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("site", "how", "rank", "says"),
    [
        (Site("head", 1, 2), "means", 1, "a basis is learned of"),
        (Site("mlp", 1), "pca", 1, "give one of means"),
        (Site("mlp", 1), "means", 2, "one direction"),
        (Site("mlp", 1, slot="negator"), "means", 1, "no counterpart there"),
    ],
)
def test_what_has_no_basis_is_refused(site, how, rank, says):
    with pytest.raises(ValueError, match=says):
        learn_basis(tower("causal")[1], batch_of("causal"), site, how, rank=rank)
