"""Which weights are these: where two text towers differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor

from clip_lens.model.encoder import HookedTextEncoder

ACTIVATION = "activation, on -4 .. 4"


def same_weights(a: HookedTextEncoder, b: HookedTextEncoder) -> DataFrame:
    """One line per tensor of two text towers: its largest difference, also as a share of its largest number in `a`.

    The columns are `shape`, `other_shape` (None where a tower lacks the tensor; the differences are then NaN, as they
    are where shapes differ), `difference` and `relative`. Beside the weights stand the logit scale and the activation
    as a function: two towers of equal weights may still compute otherwise. Towers are the same where every difference
    is 0; numbers are compared in float64.

    Example:
        >>> a, b = clip_lens.load(), clip_lens.load()
        >>> float(clip_lens.same_weights(a, b).difference.max())
        0.0
        >>> b.tower.blocks[2].attn.W_O[1].zero_(), clip_lens.same_weights(a, b).query("difference > 0").index.tolist()
        (tensor(...), ['blocks.2.attn.out_weight'])
    """
    mine, other = dict(_tensors(a)), dict(_tensors(b))
    lines = [_line(mine.get(name), other.get(name)) for name in dict.fromkeys([*mine, *other])]
    return DataFrame(lines, index=list(dict.fromkeys([*mine, *other])))


def _tensors(encoder: HookedTextEncoder) -> Iterator[tuple[str, Tensor]]:
    blocks: list[Any] = list(encoder.tower.blocks)
    yield from ((name, parameter.detach().cpu().double()) for name, parameter in encoder.tower.named_parameters())
    yield "scale", torch.tensor(encoder.scale, dtype=torch.float64)
    yield ACTIVATION, blocks[0].mlp.act(torch.linspace(-4, 4, 161, dtype=torch.float64))


def _line(mine: Tensor | None, other: Tensor | None) -> dict[str, Any]:
    shapes = {
        name: None if tensor is None else tuple(tensor.shape)
        for name, tensor in (("shape", mine), ("other_shape", other))
    }
    if mine is None or other is None or mine.shape != other.shape:
        return {**shapes, "difference": float("nan"), "relative": float("nan")}
    difference, largest = float((mine - other).abs().max()), float(mine.abs().max())
    return {**shapes, "difference": difference, "relative": difference / largest if largest else difference}
