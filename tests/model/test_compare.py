"""Where two towers differ: per tensor, against differences put there by hand."""

from __future__ import annotations

import math

import torch
from open_clip.transformer import QuickGELU
from towers import random_clip, random_encoder

from clip_lens.model.compare import ACTIVATION, same_weights
from clip_lens.model.load import load


def test_the_same_towers_differ_nowhere() -> None:
    compared = same_weights(random_encoder(layers=2), random_encoder(layers=2, dtype=torch.float64))
    assert (compared.difference == 0).all() and (compared.relative == 0).all()
    assert len(compared) == 2 * 12 + 6 + 2  # of each block, of the tower, scale and activation
    assert compared.loc["W_U", "shape"] == compared.loc["W_U", "other_shape"] == (64, 32)


def test_a_difference_is_found_where_it_is_and_measured() -> None:
    a, b = (random_encoder(layers=2, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        b.tower.blocks[1].mlp.b_in[7] += 0.25
        b.tower.W_E[5, 3] -= 1e-9
    b.scale = 1.5 * a.scale
    compared = same_weights(a, b)
    found = compared[compared.difference > 0]
    assert found.index.tolist() == ["W_E", "blocks.1.mlp.b_in", "scale"]
    assert abs(found.difference["blocks.1.mlp.b_in"] - 0.25) <= 1e-12
    assert abs(found.relative["blocks.1.mlp.b_in"] - 0.25 / float(a.tower.blocks[1].mlp.b_in.abs().max())) <= 1e-12
    assert abs(found.difference["W_E"] - 1e-9) <= 1e-15
    assert abs(found.relative["scale"] - 0.5) <= 1e-12


def test_towers_of_other_shapes_and_depths_are_listed() -> None:
    compared = same_weights(random_encoder(layers=2), random_encoder(layers=1, d_embed=16))
    assert compared.loc["W_U", "other_shape"] == (64, 16) and math.isnan(compared.difference["W_U"])
    assert compared.loc["blocks.1.ln1.w", "other_shape"] is None
    assert math.isnan(compared.difference["blocks.1.ln1.w"])


def test_equal_weights_that_compute_otherwise_are_told_apart() -> None:
    """The slip that weights alone don't show: GELU where QuickGELU was trained."""
    module = random_clip(layers=2)
    quick = load(module)
    for block in module.transformer.resblocks:  # type: ignore[union-attr]
        assert isinstance(block.mlp.gelu, QuickGELU)  # type: ignore[union-attr]
        block.mlp.gelu = torch.nn.GELU()  # type: ignore[union-attr]
    plain = load(module)
    compared = same_weights(quick, plain)
    assert quick.digest == plain.digest
    assert compared[compared.difference > 0].index.tolist() == [ACTIVATION]
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    expected = (x * torch.sigmoid(1.702 * x) - x * 0.5 * (1 + torch.erf(x / 2**0.5))).abs().max()
    assert abs(compared.difference[ACTIVATION] - float(expected)) <= 1e-12
