"""What a probe is to tell apart: a label for each text, from a column, two columns, or a function of the text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray

from clip_lens.data.batch import Batch
from clip_lens.words import close, some

Labels: TypeAlias = str | tuple[str, str] | Callable[[str], Hashable]
UNLABELLED = -1


class Labelled(NamedTuple):
    """The class of each run and of each other text, as an index into `classes`; -1 where a text has none."""

    number: Int[ndarray, "text pair"]
    classes: tuple[Hashable, ...]


def labelled(batch: Batch, texts: Sequence[Sequence[Hashable]], labels: Labels) -> Labelled:
    """The labels of a batch's texts; `texts` are the run's and the other's, as the encoder reads them.

    A text that stands in several pairs has its label in all of them.

    Raises:
        ValueError: no such column, two labels of one text, or fewer than two different labels.
        TypeError: labels that are neither columns nor a function, or a label that can't be hashed.
    """
    known: dict[Hashable, Hashable] = {}
    for row, each in enumerate(_directed(batch, _by_text(batch, labels))):
        for text, label in zip(texts[row], each, strict=True):
            if label is not None and known.setdefault(text, label) != label:
                raise ValueError(_conflict(batch, texts, text, known[text], label))
    classes = _in_order(dict.fromkeys(known.values()))
    if len(classes) < 2:
        raise ValueError(
            f"a probe tells at least two classes apart; the texts have {some(classes, quote=True) or 'none'}"
        )
    number = {label: index for index, label in enumerate(classes)}
    number_of = {text: number[label] for text, label in known.items()}
    return Labelled(np.array([[number_of.get(text, UNLABELLED) for text in each] for each in texts]), classes)


def _by_text(batch: Batch, labels: Labels) -> tuple[list[Any], list[Any]]:
    """The label of every caption and of every foil."""
    pairs = batch.pairs
    if callable(labels):
        return [_label(labels(text)) for text in pairs.caption], [_label(labels(text)) for text in pairs.foil]
    if isinstance(labels, str):
        return _column(batch, labels), [None] * len(pairs)
    if isinstance(labels, tuple) and len(labels) == 2:
        return _column(batch, labels[0]), _column(batch, labels[1])
    raise TypeError(
        f"labels={labels!r}; give a column of the pairs (the captions' labels), two columns (the captions', the "
        "foils') or a function from a text to its label"
    )


def _column(batch: Batch, name: str) -> list[Any]:
    frame = batch.pairs.to_frame()
    if name not in frame:
        raise ValueError(f"the pairs have no column {name!r} of labels{close(name, map(str, frame.columns))}")
    return [_label(value) for value in frame[name]]


def _label(value: Any) -> Hashable:
    """A label as plain Python has it; None for what is missing or empty."""
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, Hashable):
        raise TypeError(f"a label is a word, a number or None. Got {value!r}")
    missing = value is None or value == "" or (not isinstance(value, str | tuple) and bool(pd.isna(value)))
    return None if missing else value


def _directed(batch: Batch, by_text: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
    """Captions' and foils' labels as those of the runs and of the others."""
    foils = (batch.sigma == 1).tolist()
    texts = zip(*by_text, foils, strict=True)
    both = [(foil, caption) if is_foil else (caption, foil) for caption, foil, is_foil in texts]
    return [run for run, _ in both], [other for _, other in both]


def _in_order(labels: Iterable[Any]) -> tuple[Hashable, ...]:
    every = list(labels)
    try:
        return tuple(sorted(every))
    except TypeError:  # words among numbers
        return tuple(sorted(every, key=str))


def _conflict(batch: Batch, texts: Sequence[Sequence[Hashable]], text: Hashable, one: object, two: object) -> str:
    row, pair = next((row, each.index(text)) for row, each in enumerate(texts) if text in each)
    is_foil = bool(batch.sigma[pair] == 1) == (row == 0)
    words = (batch.pairs.foil if is_foil else batch.pairs.caption)[pair]
    return (
        f"the text {words!r} is labelled {one!r} in one pair and {two!r} in another; a probe reads texts alone, so "
        "that a label must be of the text, not of its image or its pair"
    )
