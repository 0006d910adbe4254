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
from clip_lens.methods.probes.labelled import UNLABELLED
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


def types_of(split: Split) -> Int[ndarray, "text distinct"]:
    """The subject of each text of the distinct pairs, by number: the whole phrase, or its first token where no held-out
    phrase was trained on; -1 where a text has no such slot."""
    for slots in (("subject", "subject_rest"), ("subject",)):
        types = _subjects(split, slots)
        if _recurring(types, split.test).any():
            break
    return types


def _recurring(types: Int[ndarray, "text distinct"], test: Bool[ndarray, "distinct"]) -> Bool[ndarray, "text distinct"]:
    """Which held-out texts have a subject that was trained on."""
    return test & (types >= 0) & np.isin(types, types[:, ~test])


def _subjects(split: Split, slots: Sequence[str]) -> Int[ndarray, "text distinct"]:
    batch = split.batch[split.distinct]
    there = [batch.slots.index(name) for name in slots if name in batch.slots]
    numbers = torch.tensor(there, device=batch.slot.device, dtype=batch.slot.dtype)
    subjects = [
        [tuple(text[where].tolist()) for text, where in zip(tokens, torch.isin(slot, numbers), strict=True)]
        for tokens, slot in ((batch.tokens, batch.slot), (batch.other, batch.other_slot))
    ]
    known = dict.fromkeys(subject for each in subjects for subject in each if subject)
    number = {subject: index for index, subject in enumerate(known)}
    return np.array([[number.get(subject, -1) for subject in each] for each in subjects])


def control_fit(
    streams: Float[Tensor, "text distinct d_model"],
    test: Bool[ndarray, "distinct"],
    types: Int[ndarray, "text distinct"],
    labels: Int[ndarray, "text distinct"],
    seed: int,
) -> Fit | None:
    """Probes for classes drawn at random for each subject, as frequent as the labels among the training texts; None if
    no subject is on both sides."""
    known, tested = np.setdiff1d(types[:, ~test], [-1]), _recurring(types, test)
    chosen = (tested | (~test & (types >= 0))) & (labels != UNLABELLED)
    if len(known) < 2 or not (chosen & test).any():
        return None
    fits = []
    for draw in range(CONTROLS):
        dealt = _dealt(known, labels[:, ~test], np.random.default_rng([seed, draw]))
        drawn = np.where(chosen, dealt[np.searchsorted(known, types).clip(max=len(known) - 1)], UNLABELLED)
        if len(np.setdiff1d(drawn[:, ~test], [UNLABELLED])) < 2:
            return None
        fits.append(tell(streams, test, drawn))
    return together(fits)


def permuted_fit(
    streams: Float[Tensor, "text distinct d_model"],
    test: Bool[ndarray, "distinct"],
    labels: Int[ndarray, "text distinct"],
    seed: int,
) -> Fit:
    """Probes trained on the training texts' labels dealt anew among them, judged by the true ones: chance, as found."""
    known = (labels != UNLABELLED) & ~test
    fits = []
    for draw in range(CONTROLS):
        dealt = labels.copy()
        dealt[known] = np.random.default_rng([seed, draw]).permutation(labels[known])
        fits.append(tell(streams, test, dealt))
    return together(fits)


def together(fits: Sequence[Fit]) -> Fit:
    """Several draws' answers as one fit's."""
    right = np.concatenate([fit.right for fit in fits])
    return fits[0]._replace(right=right, converged=all(fit.converged for fit in fits))


def _dealt(
    types: Int[ndarray, "type"], labels: Int[ndarray, "text distinct"], drawn: np.random.Generator
) -> Int[ndarray, "type"]:
    """A class for each type at random, in the shares that the labels have; the last class's share is dealt first."""
    classes, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
    ends = len(types) * counts[::-1].cumsum() // counts.sum()
    dealt = np.empty(len(types), int)
    dealt[drawn.permutation(len(types))] = classes[::-1][np.searchsorted(ends, np.arange(len(types)), side="right")]
    return dealt


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
