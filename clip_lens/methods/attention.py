"""`attention_effects`: how much more each head attends to a slot in the text with the negation than in the one
without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from clip_lens.core.address import address
from clip_lens.core.effects import Effects
from clip_lens.core.metric import Readout
from clip_lens.core.record import MetricRecord, Record
from clip_lens.core.setting import Setting, logit_difference, over_pairs
from clip_lens.core.source import CHUNK
from clip_lens.data.batch import Batch
from clip_lens.methods.registry import ATTENTION, SELECTIVITY
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, hook_name

Slot: TypeAlias = str | int
Attention: TypeAlias = Float[Tensor, "layer head pair pos"]
"""What each position attends to a slot: the sum over the slot's tokens of the attention weights."""


def attention_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    slot: Slot = "negator",
    *,
    contrast: bool = True,
    queries: Sequence[Slot] | None = None,
) -> Effects:
    """Every head's selectivity for a slot, an attention weight between -1 and 1 per pair: an `Effects`.

    `sel = max over q < p <= e(t) of (A_neg[l,h,p,q] - A_aff[l,h,p,q])`, q the slot's position, A_neg the pattern of
    the text with the negation, whichever is run (Quantmeyer et al. 2024; method, section 5). Of a slot with several
    tokens q, the weights are summed and p lies behind the last. Pairs without a side have the other text in A_neg and
    the run in A_aff. Places are `Site("pattern", l, h)`; `queries` names slots, each of which gives places
    `Site("pattern", l, h, slot=query)`: the maximum over that slot's positions p alone. `contrast=False`: the largest
    weight itself, in the text with the negation. A raw position, of slot or query, is the run's.

    Texts that differ in length are compared at matched positions, of slot and queries: both texts have the slot there,
    or one has and the other fits no template. Tokens without counterpart are left out; `meta` counts them. NaN: nothing
    is left to compare.
    Values are oriented already, whichever text is run. `total` is 1, the most that a weight can change, so that
    `fraction()` and its effect are the mean selectivity, per side; `baseline` is 0. `d` is the pairs' own.

    Raises:
        ValueError: a slot that the batch does not have, no or repeated queries, or a batch of another width than the
            encoder's embedding.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:200], store, encoder)
        >>> table = attention_effects(encoder, batch).fraction(pooled=True).round(2)
        >>> table.nlargest(2, "fraction")[["place", "fraction"]]
                 place  fraction
        3  pattern 0.3      0.99
        1  pattern 0.1      0.98
    """
    setting = Setting.reading(encoder, batch, directed=False)
    asked: tuple[Slot | None, ...] = (None,) if queries is None else tuple(queries)
    places = tuple(encoder.sites("pattern", slots=asked))
    _check(encoder, batch, slot, asked)
    with torch.inference_mode():
        found = over_pairs(batch, CHUNK, lambda index: _chunk(encoder, batch[index], slot, asked, contrast))
    one = torch.ones(len(batch), dtype=found["values"].dtype)
    unsourced = int(found["values"].isnan().all(0).sum())
    record = replace(attention_record(setting, slot, contrast), unsourced=unsourced)
    return Effects(found["values"], one, torch.zeros_like(one), places, setting.pairs(found["d"]), record)


def negation_is_run(batch: Batch) -> Bool[Tensor, "pair"]:
    """Whether the run is the text with the negation; False too where neither is, and the other text stands for it.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder, run="negated")
        >>> negation_is_run(batch), negation_is_run(batch.flip())
        (tensor([True, True, True]), tensor([False, False, False]))
    """
    with_negation = [{"caption": -1, "foil": 1}.get(side, 0) for side in batch.pairs.side]
    return torch.tensor(with_negation, device=batch.sigma.device) == batch.sigma


class _Slots(NamedTuple):
    """Which positions of a text have a slot, a line per slot: the one attended to, then the queries. And which have no
    name at all, as in a text that fits no template, so that their counterpart's may stand."""

    has: Bool[Tensor, "slot pair pos"]
    unnamed: Bool[Tensor, "slot pair pos"]


def _chunk(
    encoder: HookedTextEncoder, batch: Batch, slot: Slot, queries: Sequence[Slot | None], contrast: bool
) -> dict[str, Tensor]:
    """Values and d of some pairs."""
    flipped = batch.flip()
    run, other = _slots((slot, *queries), batch, flipped)
    mine, theirs = run.has, other.has
    if contrast:
        mine = _matched(run, other, batch)
        theirs = batch.moved(mine, inverse=True)
    paid, u = _attention(encoder, batch.tokens, mine[0])
    paid_other, v = _attention(encoder, batch.other, theirs[0])
    later = _later(mine, encoder.pool(batch.tokens))
    negated = negation_is_run(batch)
    if contrast:
        extra = batch.moved(paid_other) - paid
        values = _largest(torch.where(negated[:, None], -extra, extra), later)
    else:
        later_other = _later(theirs, encoder.pool(batch.other))
        values = torch.where(negated, _largest(paid, later), _largest(paid_other, later_other))
    readout = Readout.of(batch, u, v)
    return {"values": values.flatten(0, 2).to(encoder.precision), "d": logit_difference(batch.sigma, readout)}


def _slots(slots: Sequence[Slot | None], batch: Batch, flipped: Batch) -> tuple[_Slots, _Slots]:
    """Where run and other have each slot. Raw positions are the run's, in the other their counterparts."""
    own = _positions(slots, batch)
    raw = torch.tensor([isinstance(each, int) for each in slots], device=own.device)[:, None, None]
    named = torch.tensor([isinstance(each, str) for each in slots], device=own.device)[:, None, None]
    names = [None if isinstance(each, int) else each for each in slots]
    other = torch.where(raw, batch.moved(own, inverse=True), _positions(names, flipped))
    return _Slots(own, named & (batch.slot < 0)), _Slots(other, named & (flipped.slot < 0))


def _positions(slots: Sequence[Slot | None], batch: Batch) -> Bool[Tensor, "slot pair pos"]:
    return torch.stack([batch.where(slot) for slot in slots])


def _matched(run: _Slots, other: _Slots, batch: Batch) -> Bool[Tensor, "slot pair pos"]:
    """Which of the run's positions have the slot together with their counterpart: both, or one if the other has no
    name."""
    has, unnamed = batch.moved(other.has), batch.moved(other.unnamed)
    return (run.has & (has | unnamed)) | (run.unnamed & has)


def _later(slots: Bool[Tensor, "slot pair pos"], pooled: Int[Tensor, "pair"]) -> Bool[Tensor, "query pair pos"]:
    """The queries behind the first slot's last token, up to the pooled position; none where it has no token."""
    position = torch.arange(slots.shape[-1], device=pooled.device)
    last = torch.where(slots[0], position, -1).amax(1, keepdim=True)
    return slots[1:] & (position > last) & (last >= 0) & (position <= pooled[:, None])


def _attention(
    encoder: HookedTextEncoder, tokens: Int[Tensor, "pair pos"], keys: Bool[Tensor, "pair pos"]
) -> tuple[Attention, Float[Tensor, "pair d_embed"]]:
    """What every head pays these keys, summed as the patterns come by, so that none is kept; and the embedding."""
    paid: list[Tensor] = []

    def keep(pattern: Float[Tensor, "pair head query key"], hook: object) -> None:
        weights = keys[:, : pattern.shape[-1]].to(pattern.dtype)
        # The encoder cuts what lies behind the chunk's longest text; nothing is attended from there.
        paid.append(pad(torch.einsum("bhqk,bk->hbq", pattern, weights), (0, keys.shape[1] - pattern.shape[2])))

    names = [hook_name(Site("pattern", layer), encoder.n_layers) for layer in range(encoder.n_layers)]
    embedding = encoder(tokens, hooks=[(name, keep) for name in names])
    return torch.stack(paid), embedding


def _largest(attention: Attention, where: Bool[Tensor, "query pair pos"]) -> Float[Tensor, "layer head query pair"]:
    """The maximum over each query's positions, NaN where there is none."""
    found = attention.unsqueeze(2).masked_fill(~where, -torch.inf).amax(-1)
    return found.masked_fill(~where.any(-1), torch.nan)


def _check(encoder: HookedTextEncoder, batch: Batch, slot: Slot, queries: Sequence[Slot | None]) -> None:
    if not queries or len(set(queries)) < len(queries):
        raise ValueError(f"queries are one or several different slots, None for all together. Got {queries}")
    address([Site("pattern", slot=each) for each in (slot, *queries)], encoder, batch)  # says which slots there are


def attention_record(setting: Setting, slot: Slot = "negator", contrast: bool = True) -> Record:
    """The record of `attention_effects`, but for the pairs without a value, which only its values tell.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> attention_record(Setting.reading(encoder, batch)).stands_for(attention_effects(encoder, batch).record)
        True
    """
    what = f"weights to {slot!r} (its tokens' sum) from the later position with the largest, up to the pooled one"
    compared = "the text with the negation minus the text without, at matched positions"
    absolute = "the text with the negation"
    if "none" in setting.batch.pairs.side:
        compared, absolute = f"{compared}; without a side, other minus run", f"{absolute}; without a side, the other"
    record = setting.record(
        SELECTIVITY if contrast else ATTENTION,
        slot=slot,
        convention=f"{what}: {compared if contrast else absolute}",
        texts="both texts are run, nothing is patched",
    )
    return replace(record, metric=WEIGHT)


WEIGHT = MetricRecord("attention weight", oriented=False, unit="attention weight", identity="attention weight")
"""Already turned: A_neg minus A_aff, whichever text is run."""
