"""TransformerLens' weight processing, for a tower that ends in a projection: other weights, the same outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from clip_lens.model.tower import LayerNorm
    from clip_lens.model.weights import TowerWeights


def _fold(norm: LayerNorm, weight: Float[Tensor, "out d_model"], bias: Float[Tensor, "out"]) -> None:
    """What a normalised stream is read by takes over the norm's scale and shift. A normalised stream has mean 0, so
    that the mean of what reads it does nothing and is taken off."""
    wide = weight.double()
    folded = wide * norm.w.double()
    bias.copy_(bias.double() + wide @ norm.b.double())
    weight.copy_(folded - folded.mean(1, keepdim=True))


def _plain(norm: LayerNorm) -> None:
    norm.w.fill_(1)
    norm.b.zero_()


@torch.no_grad()
def fold_layer_norm(tower: TowerWeights) -> None:
    """Every norm's weight and bias go into what reads behind it: q, k, v, the MLP, and the text projection."""
    for block in tower.blocks:
        _fold(block.ln1, block.attn.qkv_weight, block.attn.qkv_bias)
        _fold(block.ln2, block.mlp.in_weight, block.mlp.b_in)
        _plain(block.ln1)
        _plain(block.ln2)
    _fold(tower.ln_final, tower.W_U.T, tower.b_U)
    _plain(tower.ln_final)
    tower.cfg.normalization_type = "LNPre"


def _centre(weight: Float[Tensor, "*in_ d_model"]) -> None:
    wide = weight.double()
    weight.copy_(wide - wide.mean(-1, keepdim=True))


@torch.no_grad()
def center_writing_weights(tower: TowerWeights) -> None:
    """Everything that is written to the residual stream loses its mean, which every norm takes off when it reads."""
    written = [tower.W_E, tower.W_pos]
    for block in tower.blocks:
        written += [block.attn.out_weight.T, block.attn.b_O, block.mlp.out_weight.T, block.mlp.b_out]
    for weight in written:
        _centre(weight)


@torch.no_grad()
def fold_value_biases(tower: TowerWeights) -> None:
    """Attention sums to 1, so that what heads write of their value's bias is a constant: it goes into `b_O`."""
    for block in tower.blocks:
        attn = block.attn
        bias = attn.qkv_bias[2 * attn.d_model :]
        attn.b_O.copy_(attn.b_O.double() + attn.out_weight.double() @ bias.double())
        bias.zero_()
