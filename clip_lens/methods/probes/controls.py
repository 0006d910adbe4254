"""What a probe is compared with: shuffled words, labels drawn at random, swapped nouns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from clip_lens.methods.probes.fit import Fit, tell
from clip_lens.methods.probes.split import LEAST, Split
from clip_lens.model.encoder import HookedTextEncoder

CONTROLS = 5
"""Draws of random labels that the control task is averaged over."""


def shuffled(encoder: HookedTextEncoder, tokens: Int[Tensor, "text pos"], seed: int) -> Int[Tensor, "text pos"]:
    """The texts with their words in another order, drawn per (seed, text); start, end and padding stay."""
    empty = encoder.cut(encoder.tokenize([""]).expand(len(tokens), -1))
    width = min(empty.shape[1], tokens.shape[1])
    start = (empty[:, :width] == tokens[:, :width]).int().cumprod(1).sum(1)
    closing = encoder.length(empty) - start
    result = tokens.clone()
    for row, (begin, end) in enumerate(zip(start.tolist(), (encoder.length(tokens) - closing).tolist(), strict=True)):
        words = tokens[row, begin:end]
        key = hashlib.sha256(f"{seed}|{words.tolist()}".encode()).digest()
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big")))
        result[row, begin:end] = words[order.to(words.device)]
    return result


def types_of(split: Split) -> Int[ndarray, "distinct"]:
    """The subject of each distinct pair, by number: the whole phrase, or its first token where no held-out phrase was
    trained on; -1 where the text has no such slot."""
    for slots in (("subject", "subject_rest"), ("subject",)):
        types = _subjects(split, slots)
        if _recurring(types, split.test).any():
            break
    return types


def _recurring(types: Int[ndarray, "distinct"], test: Bool[ndarray, "distinct"]) -> Bool[ndarray, "distinct"]:
    """Which held-out pairs have a subject that was trained on."""
    return test & (types >= 0) & np.isin(types, types[~test])


def _subjects(split: Split, slots: Sequence[str]) -> Int[ndarray, "distinct"]:
    batch = split.batch[split.distinct]
    numbers = torch.tensor([batch.slots.index(name) for name in slots], device=batch.slot.device)
    inside = torch.isin(batch.slot, numbers)
    subjects = [tuple(text[where].tolist()) for text, where in zip(batch.tokens, inside, strict=True)]
    number = {subject: index for index, subject in enumerate(dict.fromkeys(filter(None, subjects)))}
    return np.array([number.get(subject, -1) for subject in subjects])


def control_fit(
    streams: Float[Tensor, "text distinct d_model"],
    test: Bool[ndarray, "distinct"],
    types: Int[ndarray, "distinct"],
    seed: int,
) -> Fit | None:
    """Probes for labels drawn at random for each subject, half of them 1; None if no subject is on both sides."""
    known, tested = np.setdiff1d(types[~test], [-1]), _recurring(types, test)
    if len(known) < 2 or not tested.any():
        return None
    kept = tested | (~test & (types >= 0))
    fits = []
    for draw in range(CONTROLS):
        ones = np.random.default_rng([seed, draw]).permutation(known)[: len(known) // 2]
        labels = np.broadcast_to(np.isin(types[kept], ones).astype(int), (2, kept.sum()))
        fits.append(tell(streams[:, torch.from_numpy(kept).to(streams.device)], tested[kept], labels))
    return fits[0]._replace(
        right=np.concatenate([fit.right for fit in fits]), converged=all(fit.converged for fit in fits)
    )


class Swap(NamedTuple):
    """Texts with the negation, as they are and with their two determiners swapped; which of the two comes first; which
    are held out."""

    texts: Int[Tensor, "text swapped pos"]
    first: Int[ndarray, "text swapped"]
    test: Bool[ndarray, "swapped"]

    @property
    def possible(self) -> bool:
        """Whether there is enough to train and to test on: swapping makes the classes equal by construction."""
        return min(self.test.sum(), (~self.test).sum()) >= LEAST


def swapped(split: Split) -> Swap:
    """The distinct pairs in which one token is replaced by the negator and stands in the text once more."""
    batch = split.batch[split.distinct]
    texts, first, test = [], [], []
    width = min(batch.tokens.shape[1], batch.other.shape[1])
    run, negated = batch.tokens[:, :width], batch.other[:, :width]
    for pair, differs in enumerate(run != negated):
        where = differs.nonzero().flatten()
        same = batch.length[pair] == batch.other_length[pair]
        again = (negated[pair] == run[pair, where[0]]).nonzero().flatten() if len(where) == 1 and same else where[:0]
        if len(again) == 1:
            swapped = batch.other[pair].clone()
            swapped[[int(where), int(again)]] = swapped[[int(again), int(where)]]
            texts.append(torch.stack([batch.other[pair], swapped]))
            first.append([int(where < again), int(again < where)])
            test.append(split.test[pair])
    empty = batch.other.new_zeros(0, 2, batch.other.shape[1])
    return Swap(
        torch.stack(texts, 1) if texts else empty.transpose(0, 1),
        np.array(first, dtype=int).reshape(-1, 2).T,
        np.array(test, dtype=bool),
    )
