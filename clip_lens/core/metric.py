"""Metrics: a text embedding -> one number per row. A metric is a function; anything with this signature serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
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


UNSIGNED = ("cosine", "kl")


def unsigned(name: str) -> bool:
    """Whether a metric, by its name, has the same sign on both sides: the more a patch moves, the larger it is.

    Others are signed: what they say of a run that is the caption counts against d, and averages over pairs take
    `sigma * value` (method, section 1).

    Example:
        >>> unsigned("cosine"), unsigned("kl over 8 texts"), unsigned("logit")
        (True, True, False)
    """
    return name.split(" ")[0] in UNSIGNED


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


def cosine(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
    """The cosine with the counterpart's embedding: 1 where the patch turned the run into the other text.

    Example:
        >>> import torch
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> cosine(u, Readout(direction=u, run=u, other=torch.tensor([[1.0, 0.0]])))
        tensor([0.6000])
    """
    return (u * readout.other).sum(-1)


def kl(bank: Float[Tensor, "text d_embed"]) -> Metric:
    """A metric: `KL(P_run || P_patched)` in nats, with P the softmax of the logits along the direction over this text
    and a bank of candidate texts (their unit embeddings), image fixed (method, section 1). 0 for the unpatched run.

    Raises:
        ValueError: the bank is empty, or its embeddings are not unit vectors.

    Example:
        >>> import torch
        >>> u, w = torch.tensor([[0.6, 0.8]]), torch.tensor([[100.0, 0.0]])
        >>> kl(torch.tensor([[0.0, 1.0]]))(u, Readout(direction=w, run=u, other=u))
        tensor([0.])
    """
    if bank.ndim != 2 or len(bank) == 0 or not torch.allclose(bank.norm(dim=-1), bank.new_ones(len(bank)), atol=1e-3):
        raise ValueError(f"a bank has the unit embeddings of texts as rows; got a tensor of shape {tuple(bank.shape)}")

    def metric(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
        others = readout.direction @ bank.to(readout.direction).T
        run, patched = (
            torch.cat([logit(text, readout).unsqueeze(1), others], 1).log_softmax(-1) for text in (readout.run, u)
        )
        return (run.exp() * (run - patched)).sum(-1)

    metric.__name__ = f"kl over {len(bank)} texts"
    return metric
