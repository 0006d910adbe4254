"""`attention_attribution`: which parts of the stream make up a head's attention score, query side by key side.

With the LayerNorm's scale frozen at each text's own, what a query and a key read is linear in what the parts of the
tower write, so that the score is a bilinear sum over pairs of parts:

    score = sum over i, j of (a_i W_Q) . (b_j W_K) / sqrt(d_head)

`a_i`, `b_j` are the parts at the query's and the key's position after `gamma * (x - mean) / scale`. One more part on
each side is what no component writes, `beta W_Q + b_Q` and `beta W_K + b_K`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.effects import Effects
from clip_lens.core.metric import Readout, attention_score
from clip_lens.core.precision import precise
from clip_lens.core.record import MetricRecord, SourceRecord
from clip_lens.core.setting import Setting, logit_difference, over_pairs
from clip_lens.core.source import CHUNK, counterpart
from clip_lens.data.batch import Batch
from clip_lens.methods.reading import Reader, Text, block_of, both_texts
from clip_lens.methods.registry import MATCHED
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Match, Site, hook_name


def attention_attribution(
    encoder: HookedTextEncoder,
    batch: Batch,
    layer: int,
    head: int,
    query: str | int | None,
    key: str | int,
    *,
    contrast: bool = False,
) -> Effects:
    """What each pair of parts adds to a head's attention score, before the softmax, in each run: an `Effects`.

    A place per (what the query reads, what the key reads): token, position, every head below, the attention's output
    biases, the MLPs, and `constant`, the biases of LayerNorm and projection. `query` (None = the pooled position) and
    `key` are slots, the last token of each; a raw position is the run's. LayerNorm is frozen at each text's own scale,
    so that the values sum to the score exactly: `total`. With `contrast` values and total are the other text's minus
    the run's, each with its own scale (method, section 10).

    In tables and grids `sender` is the query's side and `receiver` the key's: `heatmap(effects, "sender", "receiver")`.
    The sum over the key's side is what the score loses when that query's part is taken out and LayerNorm stays.

    Raises:
        ValueError: a head that the encoder does not have, a slot that the batch or one of the texts does not have, or
            hooks of yours on the tower.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> effects = attention_attribution(encoder, batch, 1, 2, "eot", "negator")
        >>> effects.values.shape, bool((effects.values.sum(0) - effects.total).abs().max() < 1e-4)
        (torch.Size([81, 8]), True)
    """
    setting, score = Setting.reading(encoder, batch), attention_score(layer, head, query, key)
    setting.without_hooks("what is read is taken apart by the tower's own weights")
    whose = Site("pattern", layer, head, query)
    address([whose, Site("k", layer, head, key)], encoder, batch)  # says what there is
    side = _Score(encoder, parts_below(encoder, layer), whose, key)
    places = tuple(Match(whose, key, mine, theirs) for mine in side.parts for theirs in side.parts)

    def compute(index: Int[Tensor, "pair"]) -> dict[str, Tensor]:
        part = batch[index]
        run, other = (side.of(text) for text in both_texts(part)) if contrast else (side.of(both_texts(part)[0]), None)
        values = run.terms if other is None else other.terms - run.terms
        total = run.score if other is None else other.score - run.score
        readout = Readout.of(part, run.u, encoder(part.other) if other is None else other.u)
        return {"values": values, "baseline": run.score, "total": total, "d": logit_difference(part.sigma, readout)}

    with torch.inference_mode():
        found = {name: value.to(encoder.precision) for name, value in over_pairs(batch, CHUNK, compute).items()}
    what = "other minus run" if contrast else "the run"
    record = setting.record(MATCHED, score=score.name, values=what, norms="each text's own scale of LayerNorm, frozen")
    record = replace(record, metric=MetricRecord.of(score), source=SourceRecord.of(counterpart) if contrast else None)
    return Effects(found["values"], found["total"], found["baseline"], places, setting.pairs(found["d"]), record)


def parts_below(encoder: HookedTextEncoder, layer: int) -> list[Site]:
    """Everything that the residual stream entering a block holds, each once, and the constant.

    Example:
        >>> [str(site) for site in parts_below(clip_lens.load(), 1)][2:]
        ['head 0.0', 'head 0.1', 'head 0.2', 'head 0.3', 'attn_bias 0', 'mlp 0', 'constant']
    """
    parts = [Site("token"), Site("position")]
    for below in range(layer):
        parts += [*encoder.sites("head", layers=[below]), Site("attn_bias", below), Site("mlp", below)]
    return [*parts, Site("constant")]


class _Found(NamedTuple):
    """Of one text of each pair: the terms of the score, the score itself, the unit embedding."""

    terms: Float[Tensor, "place pair"]
    score: Float[Tensor, "pair"]
    u: Float[Tensor, "pair d_embed"]


@dataclass(frozen=True)
class _Score:
    """A head's score from one slot to another, taken apart."""

    encoder: HookedTextEncoder
    parts: Sequence[Site]
    head: Site
    key: str | int

    def of(self, text: Text) -> _Found:
        """The terms in one text of each pair."""
        tokens = self.encoder.cut(text.tokens)
        at = torch.stack([self._position(text, slot) for slot in (self.head.slot, self.key)], 1)
        seen, u = self._observed(tokens, at)
        normed = self._normed(seen, torch.stack([self._written(part, seen, tokens, at) for part in self.parts[:-1]]))
        query, key = (self._projected(normed[:, :, side], name) for side, name in enumerate("QK"))
        terms = torch.einsum("ipe,jpe->ijp", query, key) / sqrt(self._block.attn.d_head)
        return _Found(terms.flatten(0, 1), precise(seen[self._scores]), u)

    @property
    def _block(self) -> Any:
        return block_of(self.encoder, self.head.layer)

    @property
    def _scores(self) -> str:
        return f"blocks.{self.head.layer}.attn.hook_attn_scores"

    def _position(self, text: Text, slot: str | int | None) -> Int[Tensor, "pair"]:
        """The slot's last token."""
        if slot is None:
            return self.encoder.pool(text.tokens)
        where = _where(text, slot)
        if missing := int((~where.any(1)).sum()):
            raise ValueError(
                f"{missing} of {len(where)} texts, runs or their counterparts, have no token at {slot!r}; choose pairs "
                f"that have it, as in batch[batch.where({slot!r}).any(1)]"
            )
        return where.shape[1] - 1 - where.flip(1).int().argmax(1)

    def _observed(
        self, tokens: Int[Tensor, "pair pos"], at: Int[Tensor, "pair query_and_key"]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "pair d_embed"]]:
        """What the run has at the two positions, in float64, of scores the one cell; and the embedding."""
        rows, n_layers = torch.arange(len(tokens), device=tokens.device), self.encoder.n_layers
        read = [site for site in (Site("resid", self.head.layer), *self.parts) if site.kind in ("resid", "head", "mlp")]
        readers: dict[str, Reader] = dict.fromkeys(
            (hook_name(site, n_layers) for site in read), lambda value: precise(value[rows[:, None], at])
        )
        readers[self._scores] = lambda value: value[rows, self.head.unit, at[:, 0], at[:, 1]]
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: object) -> None:
            name = hook.name  # type: ignore[attr-defined]
            seen[name] = readers[name](value)

        y = self.encoder.tower.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in readers])
        return seen, self.encoder.read(y, self.encoder.pool(tokens))

    def _written(
        self,
        part: Site,
        seen: dict[str, Tensor],
        tokens: Int[Tensor, "pair pos"],
        at: Int[Tensor, "pair query_and_key"],
    ) -> Float[Tensor, "pair query_and_key d_model"]:
        """What a part has written into the stream at the two positions."""
        tower = self.encoder.tower
        if part.kind in ("token", "position"):
            return precise(tower.W_E[tokens.gather(1, at)] if part.kind == "token" else tower.W_pos[at])
        attn = block_of(self.encoder, part.layer).attn
        if part.kind == "attn_bias":
            return precise(attn.b_O).expand(*at.shape, -1)
        value = seen[hook_name(part, self.encoder.n_layers)]
        return value if part.kind == "mlp" else value[:, :, cast(int, part.unit)] @ precise(attn.W_O[part.unit])

    def _normed(
        self, seen: dict[str, Tensor], written: Float[Tensor, "part pair query_and_key d_model"]
    ) -> Float[Tensor, "part pair query_and_key d_model"]:
        """Parts behind the LayerNorm, its scale that of the whole stream."""
        stream, norm = seen[hook_name(Site("resid", self.head.layer), self.encoder.n_layers)], self._block.ln1
        scale = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return (written - written.mean(-1, keepdim=True)) / scale * precise(norm.w)

    def _projected(self, normed: Float[Tensor, "part pair d_model"], name: str) -> Float[Tensor, "part pair d_head"]:
        """What the query ("Q") or the key ("K") makes of each part, and last of the constant."""
        weight, bias = (precise(getattr(self._block.attn, f"{kind}_{name}")[self.head.unit]) for kind in "Wb")
        constant = (precise(self._block.ln1.b) @ weight + bias).expand(1, normed.shape[1], -1)
        return torch.cat([normed @ weight, constant])


def _where(text: Text, slot: str | int) -> Bool[Tensor, "pair pos"]:
    """A slot's tokens in either text; a raw position is the run's."""
    found = text.slot == text.slots.index(slot) if isinstance(slot, str) else text.position == slot
    return found & text.inside
