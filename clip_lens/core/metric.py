"""Metrics: a text embedding -> one number per row. A metric is a function; anything with this signature serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """What a metric may compare a row's embedding with: the direction, and the unpatched run's and the other's unit
    embeddings, one line per pair."""

    direction: Float[Tensor, "row d_embed"]
    run: Float[Tensor, "row d_embed"]
    other: Float[Tensor, "row d_embed"]

    def rows(self, pairs: Int[Tensor, "row"]) -> Readout:
        """The readout of some pairs, one line per row."""
        return Readout(self.direction[pairs], self.run[pairs], self.other[pairs])


Metric: TypeAlias = Callable[[Float[Tensor, "row d_embed"], Readout], Float[Tensor, "row"]]


def logit(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
    """`<u, w>` in CLIP logits, with `w = scale * v_image` unless the batch was turned along another direction
    (method, section 1).

    Example:
        >>> import torch
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> logit(u, Readout(direction=torch.tensor([[100.0, 0.0]]), run=u, other=u))
        tensor([60.0000])
    """
    return (u * readout.direction).sum(-1)
