"""Sources: with what a place is patched. A source is a function; anything with this signature serves.

A source is called once with the encoder and the whole batch and gives a `Fetch`: pairs and hook names in, their
activations out, in the run's positions, NaN = nothing here. A fetch may have an attribute `first`: for each pair the
number of leading positions at which it is known to give what the run has, so that patching there changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, HookedTextEncoder

Fetch: TypeAlias = Callable[[Int[Tensor, "pair"], Iterable[str]], Cache]
Source: TypeAlias = Callable[[HookedTextEncoder, Batch], Fetch]


@dataclass(frozen=True)
class Counterpart:
    """The fetch of `counterpart`."""

    encoder: HookedTextEncoder
    batch: Batch

    @property
    def first(self) -> Int[Tensor, "pair"]:
        return self.batch.shared if self.encoder.causal else torch.zeros_like(self.batch.shared)

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        origin = self.batch.origin[pairs]
        cache = self.encoder.cache(self.batch.other[pairs], names=names)
        return {name: _realigned(name, value, origin) for name, value in cache.items()}


def counterpart(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
    """The activations of each pair's other text, moved to the run's positions (method, section 3).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> fetch = counterpart(encoder, batch)
        >>> fetch(torch.arange(3), ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"].shape[::2]
        torch.Size([3, 128])
    """
    return Counterpart(encoder, batch)


def _realigned(name: str, value: Tensor, origin: Int[Tensor, "pair pos"]) -> Tensor:
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        return _realigned_pattern(value, origin)
    origin = torch.where(origin < value.shape[1], origin, -1)
    rows = torch.arange(len(value), device=value.device)[:, None]
    moved = value[rows, origin.clamp(min=0)]
    missing = (origin < 0).reshape(*origin.shape, *[1] * (value.ndim - 2))
    return moved.masked_fill(missing, float("nan"))


def _realigned_pattern(
    value: Float[Tensor, "pair head query key"], origin: Int[Tensor, "pair pos"]
) -> Float[Tensor, "pair head pos pos"]:
    """Queries without counterpart are NaN, keys without counterpart get weight 0, nothing is renormalised."""
    origin = torch.where(origin < value.shape[2], origin, -1)
    rows = torch.arange(len(value), device=value.device)[:, None, None]
    safe = origin.clamp(min=0)
    moved = value.permute(0, 2, 3, 1)[rows, safe[:, :, None], safe[:, None, :]].permute(0, 3, 1, 2)
    moved = moved.masked_fill((origin < 0)[:, None, None, :], 0.0)
    return moved.masked_fill((origin < 0)[:, None, :, None], float("nan"))
