"""Sources that swap a projection: the ends are identities, what is between is written out by hand."""

import pytest
import torch
from oracle import Text, agree, batch_of, tower

from clip_lens.core.source import counterpart
from clip_lens.core.subspace import orthonormal, subspace
from clip_lens.methods.gradient import gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.model.site import Edge, Site

SITES = {
    "the stream": (Site("resid", 1), 32),
    "an MLP": (Site("mlp", 1), 32),
    "a head": (Site("head", 1, 2), 8),
    "keys": (Site("k", 1, 0), 8),
    "neurons": (Site("neuron", 1), 128),
}
CAUSAL = tower("causal")[1], batch_of("causal")
BOTH = pytest.mark.parametrize("name", ["causal", "bidirectional"])


def drawn(n, rank, seed=0):
    return torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("what", SITES)
@BOTH
def test_full_rank_is_the_patch_of_the_site_and_rank_0_is_nothing(name, what):
    encoder, batch, (site, width) = tower(name)[1], batch_of(name), SITES[what]
    places = [site, Site(site.kind, site.layer, site.unit, 2), Site(site.kind, site.layer, site.unit, "eot")]
    whole = patch_effects(encoder, batch, places)
    full = patch_effects(encoder, batch, places, source=subspace(site, drawn(width, width)))
    nothing = patch_effects(encoder, batch, places, source=subspace(site, drawn(width, 0)))
    scale = whole.values.nan_to_num().abs().max()
    for found, expected in ((full, whole.values), (nothing, torch.zeros_like(whole.values))):
        assert torch.equal(found.values.isnan(), whole.values.isnan())
        assert (found.values - expected).nan_to_num().abs().max() <= 1e-10 * scale and scale > 1e-2
        assert torch.allclose(found.total, whole.total, atol=1e-12)
    assert full.record.shares and not full.record.stands_for(nothing.record)


@BOTH
def test_a_projection_is_what_it_is_by_hand(name):
    """What the MLP gives plus the other's part along three directions, on open_clip's blocks."""
    clip, encoder = tower(name)
    batch, site, basis = batch_of(name)[[1, 3, 4]], Site("mlp", 1), drawn(32, 3)
    projection = basis @ torch.linalg.inv(basis.T @ basis) @ basis.T
    texts = [Text(clip, batch, pair) for pair in range(len(batch))]
    places = [site, Edge(site, Site("v", 2, 1)), Edge(site, Site("out"))]
    expected = [
        [
            text.effect(place, {site: text.run[site] + (text.counterpart()[site] - text.run[site]) @ projection})
            for text in texts
        ]
        for place in places
    ]
    found = patch_effects(encoder, batch, places, source=subspace(site, basis))
    assert (
        found.values - torch.tensor(expected, dtype=torch.float64)
    ).nan_to_num().abs().max() <= 1e-10 * found.total.abs().max()
    turned = patch_effects(encoder, batch, places, source=subspace(site, basis @ drawn(3, 3, 1)))
    assert torch.allclose(turned.values, found.values, atol=1e-12, equal_nan=True)


def test_of_orthogonal_subspaces_gradients_add_up_to_the_whole():
    encoder, batch, site = tower("causal")[1], batch_of("causal"), Site("resid", 2, slot="eot")
    whole = orthonormal(drawn(32, 32))
    parts = [
        gradient_effects(encoder, batch, [site], source=subspace(site, some)).values
        for some in (whole[:, :5], whole[:, 5:])
    ]
    agree(gradient_effects(encoder, batch, [site]), sum(parts).tolist())


def test_a_control_moves_as_far_in_its_own_subspace():
    encoder, batch, site = tower("causal")[1], batch_of("causal"), Site("mlp", 1)
    mine, random, name = drawn(32, 2), drawn(32, 2, 1), "blocks.1.hook_mlp_out"
    rows = torch.arange(len(batch))
    own = encoder.cache(batch.tokens, names=name)[name]
    move, control = (
        make(encoder, batch)(rows, [name])[name] - own
        for make in (subspace(site, mine), subspace(site, random, norm_of=mine))
    )
    assert torch.allclose(move.norm(dim=-1), control.norm(dim=-1), atol=1e-12, equal_nan=True)
    q = orthonormal(random)
    assert torch.allclose(control, control @ q @ q.T, atol=1e-12, equal_nan=True)
    assert not torch.allclose(move.nan_to_num(), control.nan_to_num(), atol=1e-2)


def test_elsewhere_it_is_the_counterpart():
    encoder, batch, site = tower("causal")[1], batch_of("causal"), Site("head", 1, 2)
    places = [Site("mlp", 1), Site("head", 1, 0), Site("resid", 2)]
    found = patch_effects(encoder, batch, places, source=subspace(site, drawn(8, 1)))
    assert torch.allclose(
        found.values, patch_effects(encoder, batch, places, source=counterpart).values, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: subspace(Site("pattern", 1, 0), drawn(8, 1)), "no vector"),
        (lambda: subspace(Site("head", 1), drawn(8, 1)), "name one head"),
        (lambda: subspace(Site("neuron", 1, 3), drawn(8, 1)), "of neurons none"),
        (lambda: subspace(Site("mlp", 1), drawn(32, 1)[:, 0]), "a finite matrix"),
        (lambda: subspace(Site("mlp", 1), torch.ones(32, 2)), "1 are independent"),
        (lambda: patch_effects(*CAUSAL, [Site("mlp", 1)], source=subspace(Site("mlp", 1), drawn(8, 1))), "32 numbers"),
    ],
)  # fmt: skip
def test_what_spans_nothing_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
