"""A tower's weights as HookedTransformer's users ask for them: stacked, by name, multiplied, and processed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from clip_lens.model import fold
from clip_lens.model.turn import Turn, in_turn

PARAMETERS = {
    "ln1": ("w", "b"),
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "ln2": ("w", "b"),
    "mlp": ("W_in", "b_in", "W_out", "b_out"),
}
"""HookedTransformer's names of a block's weights."""


@dataclass(frozen=True)
class Unembed:
    """The text projection of a normalised residual stream."""

    W_U: Float[Tensor, "d_model d_embed"]
    b_U: Float[Tensor, "d_embed"]

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_embed"]:
        return x @ self.W_U + self.b_U


class TowerWeights:
    """What a tower's weights are called, and what can be done with them."""

    cfg: Any
    turn: Turn
    _modules: dict[str, Any]
    W_E: Tensor
    W_pos: Tensor
    W_U: Tensor
    b_U: Tensor

    # Submodules as attributes of the class: protocols are checked, from Python 3.12 on, without `__getattr__`.
    blocks = property(lambda self: self._modules["blocks"], doc="The blocks, layer by layer.")
    ln_final = property(lambda self: self._modules["ln_final"], doc="The norm in front of the text projection.")

    @property
    def unembed(self) -> Unembed:
        """The text projection of a normalised residual stream: to call, and with `W_U` and `b_U`."""
        return Unembed(self.W_U, self.b_U)

    def _stacked(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    W_Q = property(lambda self: self._stacked("attn", "W_Q"), doc="layer head d_model d_head")
    W_K = property(lambda self: self._stacked("attn", "W_K"), doc="layer head d_model d_head")
    W_V = property(lambda self: self._stacked("attn", "W_V"), doc="layer head d_model d_head")
    W_O = property(lambda self: self._stacked("attn", "W_O"), doc="layer head d_head d_model")
    b_Q = property(lambda self: self._stacked("attn", "b_Q"), doc="layer head d_head")
    b_K = property(lambda self: self._stacked("attn", "b_K"), doc="layer head d_head")
    b_V = property(lambda self: self._stacked("attn", "b_V"), doc="layer head d_head")
    b_O = property(lambda self: self._stacked("attn", "b_O"), doc="layer d_model")
    W_in = property(lambda self: self._stacked("mlp", "W_in"), doc="layer d_model d_mlp")
    W_out = property(lambda self: self._stacked("mlp", "W_out"), doc="layer d_mlp d_model")
    b_in = property(lambda self: self._stacked("mlp", "b_in"), doc="layer d_mlp")
    b_out = property(lambda self: self._stacked("mlp", "b_out"), doc="layer d_model")

    @property
    def QK(self) -> FactoredMatrix:
        """Every head's query-key circuit, layer head d_model d_model."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """Every head's value-output circuit, layer head d_model d_model."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def W_E_pos(self) -> Float[Tensor, "token_or_position d_model"]:
        """Every token's embedding, then every position's."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def all_head_labels(self) -> list[str]:
        """L0H0, L0H1 and so on, as heads are stacked."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def blocks_with(self, submodule: str) -> list[tuple[int, Any]]:
        """The blocks that have a part of that name, with their layers: all or none."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if hasattr(block, submodule)]

    def all_composition_scores(
        self, mode: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much a head's output weights say in a later head's queries, keys or values, 0 where it isn't later:
        `|left right| / (|left| |right|)`, Frobenius norms of OV and QK.

        Raises:
            ValueError: another mode.

        Example:
            >>> clip_lens.load().tower.all_composition_scores("K").shape
            torch.Size([6, 4, 6, 4])
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode={mode!r}: give 'Q', 'K' or 'V'")
        right = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        layer = torch.arange(self.cfg.n_layers, device=self.W_E.device)
        later = (layer[:, None] < layer)[:, None, :, None]
        return torch.where(later, composition_scores(self.OV, right, broadcast_dims=True), 0.0)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """The sum of the output biases that blocks below `layer` write (and, `mlp_input`, this layer's attention)."""
        blocks: list[Any] = list(self.blocks)
        total = torch.zeros_like(blocks[0].attn.b_O)
        for block in blocks[:layer]:
            total = total + block.attn.b_O
            total = total + block.mlp.b_out if include_mlp_biases else total
        return total + blocks[layer].attn.b_O if mlp_input else total

    @in_turn
    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = False,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens' weight processing, in place: the norms' weights and biases go into what reads behind them
        (into `W_U` and `b_U` at the end), what is written loses its mean, value biases go into `b_O`. Outputs stay.

        `digest` names other weights then.

        Raises:
            ValueError: `center_unembed` (a logit's softmax does not change with it, an embedding does), or
                `refactor_factored_attn_matrices`.

        Example:
            >>> tower = clip_lens.load().tower
            >>> before = tower("There are no circles.")
            >>> tower.process_weights_()
            >>> torch.allclose(before, tower("There are no circles."), atol=1e-4), tower.ln_final.w.unique()
            (True, tensor([1.]))
        """
        if center_unembed:
            raise ValueError("center_unembed: an embedding without its components' mean is another one; leave it out")
        if refactor_factored_attn_matrices:
            raise ValueError("refactor_factored_attn_matrices is not supported; `QK` and `OV` give the products")
        if fold_ln:
            fold.fold_layer_norm(self)
        if fold_value_biases:
            fold.fold_value_biases(self)
        if center_writing_weights:
            fold.center_writing_weights(self)

    def fold_layer_norm(self) -> None:
        """Only the norms' part of `process_weights_`."""
        self.process_weights_(center_writing_weights=False, fold_value_biases=False)

    def center_writing_weights(self) -> None:
        """Only the centring part of `process_weights_`."""
        self.process_weights_(fold_ln=False, fold_value_biases=False)

    def fold_value_biases(self) -> None:
        """Only the value biases' part of `process_weights_`."""
        self.process_weights_(fold_ln=False, center_writing_weights=False)

    def tl_parameters(self) -> dict[str, Tensor]:
        """The weights by TransformerLens' names; those that are packed here are views.

        Example:
            >>> clip_lens.load().tower.tl_parameters()["blocks.2.attn.W_O"].shape
            torch.Size([4, 32, 128])
        """
        found = {"embed.W_E": self.W_E, "pos_embed.W_pos": self.W_pos}
        for layer in range(self.cfg.n_layers):
            for part, names in PARAMETERS.items():
                module = getattr(self.blocks[layer], part)
                found |= {f"blocks.{layer}.{part}.{name}": getattr(module, name) for name in names}
        found |= {"ln_final.w": self.ln_final.w, "ln_final.b": self.ln_final.b}
        return found | {"unembed.W_U": self.W_U, "unembed.b_U": self.b_U}

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """`tl_parameters`, one after the other."""
        yield from self.tl_parameters().items()
