"""Targets: where a metric reads that is not the output, an activation of the tower at one position of each text.

A metric of a target gets that activation instead of the unit embedding, `row n`: the numbers that the hook has at the
position, of a head or a neuron where the site names one, of a score or a weight the one cell. What is computed behind
the target's block does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import BEHIND, LAYOUTS, Kind, Site, hook_name, precedes, writers

Slot: TypeAlias = str | int | None
WITHIN: tuple[tuple[Kind, ...], ...] = (
    ("embed", "resid"),
    ("q", "k", "v"),
    ("pattern",),
    ("head", "result"),
    ("attn",),
    ("mid",),
    ("neuron",),
    ("mlp",),
)
"""The kinds of one block in the order in which it computes them."""
BEHIND_ATTENTION: tuple[Kind, ...] = ("mid", "neuron", "mlp")


@dataclass(frozen=True)
class Target:
    """An activation at the last token of a site's slot, the pooled position where it names none.

    Of patterns `key` names the slot that is attended to, its last token too; `scores`: before the softmax.
    """

    site: Site
    key: Slot = None
    scores: bool = False

    def __str__(self) -> str:
        name = replace(self.site, slot=None) if self.site.slot is None else self.site
        text = str(name).replace("pattern", "score", 1) if self.scores else str(name)
        return text if self.key is None else f"{text} -> @{self.key}"

    def hook(self, n_layers: int) -> str:
        """The hook at which it is read."""
        if self.scores:
            return f"blocks.{self.site.layer}.attn.hook_attn_scores"
        return hook_name(self.site, n_layers)

    def value(
        self, activation: Shaped[Tensor, "row ..."], column: Int[Tensor, "row"], key: Int[Tensor, "row"] | None
    ) -> Float[Tensor, "row n"]:
        """What it reads of the activation at its hook: `column` is where that holds the position, `key` the key's."""
        rows, unit = torch.arange(len(activation), device=activation.device), self.site.unit
        if LAYOUTS[self.site.kind].query_by_key:
            return activation[rows, unit, column, key].unsqueeze(1)
        found = activation[rows, column]
        return (found if unit is None else found[:, unit]).reshape(len(rows), -1)

    def reads(self, kind: Kind, layer: int, n_layers: int) -> bool:
        """Whether what a site of a kind or a receiver of edges has there can reach it; where that isn't known, yes."""
        own: Kind = "q" if self.scores else self.site.kind
        return _step(kind, layer, n_layers) <= _step(own, self.site.layer, n_layers)

    def senders(self, n_layers: int, n_heads: int) -> tuple[Site, ...]:
        """Every sender of the tower whose output reaches it."""
        seen = Site("mlp" if self.site.kind in BEHIND_ATTENTION else "q", min(self.site.layer, n_layers))
        return tuple(sender for sender in writers(n_layers, n_heads) if precedes(sender, seen))

    def behind_edges(self, n_layers: int) -> bool:
        """Whether all that reaches it passes an edge's receiver: not where it is a stream that is only summed up."""
        return self.site.kind not in ("embed", "resid", "mid") or self.site.layer == n_layers

    def last(self, n_layers: int) -> int:
        """The last block that must run."""
        return min(self.site.layer, n_layers - 1)

    def at(self, encoder: HookedTextEncoder, batch: Batch) -> Int[Tensor, "pair"]:
        """The position of each pair's run at which it is read."""
        return encoder.pool(batch.tokens) if self.site.slot is None else last_token(batch, self.site.slot)

    def check(self, encoder: HookedTextEncoder, batch: Batch) -> None:
        """Refuses what a pair has not.

        Raises:
            ValueError: pairs without one of the slots, or, in a causal tower, with the key behind the query.
        """
        for slot in (self.site.slot, self.key):
            missing = ~batch.where(slot).any(1)
            if missing.any():
                raise ValueError(
                    f"{self} reads at {slot!r}, which {int(missing.sum())} of {len(batch)} runs don't have, the first "
                    f"that of pair {batch.pairs.key[int(missing.int().argmax())]!r}; choose pairs that have it: "
                    f"batch[batch.where({slot!r}).any(1)]"
                )
        if self.key is not None and encoder.causal:
            ahead = last_token(batch, self.key) > self.at(encoder, batch)
            if ahead.any():
                raise ValueError(
                    f"{self}: in {int(ahead.sum())} of {len(batch)} runs the key stands behind the query, where a "
                    "causal tower never looks"
                )


def _step(kind: Kind, layer: int, n_layers: int) -> tuple[int, int]:
    """When a kind's activation is computed; `out` is what the last residual stream is read as."""
    if kind in BEHIND:
        return n_layers, 0 if kind == "out" else 1
    return layer, next((step for step, kinds in enumerate(WITHIN) if kind in kinds), -1)


def last_token(batch: Batch, slot: Slot) -> Int[Tensor, "pair"]:
    """The last position of each pair's run that a slot has."""
    where = batch.where(slot)
    return where.shape[1] - 1 - where.flip(1).int().argmax(1)


@dataclass(frozen=True)
class Read:
    """What a metric reads of the runs of some pairs: the embedding, or its target; and where, by pair or by row."""

    target: Target | None
    hook: str
    last: int
    """The last block that must run."""
    at: Int[Tensor, "pair"]
    key: Int[Tensor, "pair"] | None = None

    @classmethod
    def of(
        cls, target: Target | None, encoder: HookedTextEncoder, batch: Batch, tokens: Int[Tensor, "pair pos"]
    ) -> Read:
        """What a metric of a target, or of none, reads of a batch's runs; `tokens` are cut already."""
        if target is None:
            return cls(None, "", encoder.n_layers - 1, encoder.pool(tokens))
        key = None if target.key is None else last_token(batch, target.key)
        return cls(target, target.hook(encoder.n_layers), target.last(encoder.n_layers), target.at(encoder, batch), key)

    def rows(self, pair: Int[Tensor, "row"]) -> Read:
        """The same, a line per row."""
        return replace(self, at=self.at[pair], key=None if self.key is None else self.key[pair])

    @property
    def hooks(self) -> Sequence[str]:
        """The hooks that it needs."""
        return [self.hook] if self.hook else []

    def value(self, activation: Shaped[Tensor, "row ..."], held: Int[Tensor, "row held"]) -> Float[Tensor, "row n"]:
        """What the target reads of the activation at its hook, of which each row holds the positions `held`."""
        assert self.target is not None
        column = (held == self.at[:, None]).int().argmax(1)
        return self.target.value(activation, column, self.key)
