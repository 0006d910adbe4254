"""Is what tells texts apart there, and is it used? A linear probe per layer, and its causal test.

Both at the pooled position of the residual stream, on pairs that the probe and the direction have not seen.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, get_args

import numpy as np
import torch
from numpy import ndarray
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.setting import Setting
from clip_lens.core.source import How
from clip_lens.data.batch import Batch
from clip_lens.methods.probes.controls import CONTROLS, control_fit, permuted_fit, shuffled, swapped, types_of
from clip_lens.methods.probes.fit import C, Fit, tell
from clip_lens.methods.probes.labelled import Labels
from clip_lens.methods.probes.split import Split, split_texts, streams_of
from clip_lens.methods.probes.used import RANDOM_DIRECTIONS, patched_shares, run_of, steering_of, used_shares
from clip_lens.methods.registry import PROBE
from clip_lens.methods.statistics import proportion
from clip_lens.methods.steering import steer
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.words import some


def probe(
    encoder: HookedTextEncoder,
    batch: Batch,
    *,
    labels: Labels | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    test_share: float = 0.5,
    interval: float = 0.95,
    metric: Metric | str = logit,
) -> DataFrame:
    """One row per layer: can a text's label be read from the stream at the pooled position, and is it used?

    Without `labels` it is the negation that is read: the texts with it against those without. `labels` may be a column
    of the pairs (the captions' labels; foils are left out), two columns (the captions', the foils'), or a function from
    a text to its label; None, NaN and "" are no label. Several classes make the probe multinomial.

    Layers run over resid 0..L; all numbers are shares. Pairs that share a text are one group, and groups are
    held out whole. *Readable* is column by column (each of `accuracy`, `shuffled`, `noun` with `_lower`, `_upper`, a
    Wilson interval in which a pair of texts counts once):

    - `accuracy`: logistic regression on standardised coordinates (C = 1) tells the classes; `n` distinct held-out pairs
      of texts. `chance` is what the most frequent class of the training texts gets: .5 for the negation. `balanced` is
      the mean over classes of the accuracy on each one's texts; its chance is 1 / (classes held out).
    - `shuffled`: the same, trained and tested on texts whose words are shuffled. Where it does as well, accuracy says
      only that the words are there (the negator), not what they do (that something is negated).
    - `control`: the accuracy for labels drawn at random for each subject, in the shares of the true ones (Hewitt &
      Liang 2019), on held-out texts with a subject that was trained on (`control_n` texts; the subject's first token
      counts where no whole one recurs); `selectivity` = accuracy - control.
    - `permuted` (with `labels`): the accuracy of probes trained on the training texts' labels dealt anew among them.
    - `noun` (without `labels`): tells which of two nouns is negated in the same words: texts like "a ring and no star"
      and "no ring and a star", made by swapping the negator with the counterpart's determiner where that stands in the
      text once more (`noun_n` held-out ones; NaN without any).

    *Used*: with mu_c the mean stream of the training texts of class c, a pair whose run is of class a and whose other
    text is of class b has the direction `v = mu_b - mu_a`. `cosine` is that of v with the difference of the two
    classes' weights (both on standardised coordinates), `norm` the length of v over that of the mean of the mu, both
    averaged over every two classes. Per side of the negation, caption, foil or none, over `n_{side}` held-out pairs
    of two classes, as shares of d (a ratio of means, with a bootstrap interval over pairs):

    - `patched_{side}`: for comparison, the run has the whole stream of the other text;
    - `added_{side}`: `x + v`, the run is moved from its class to the other's;
    - `removed_{side}`: `x' - <x' - mu_a, v/|v|> v/|v|`, the other text loses what is of its class along v: its
      coordinate becomes the mean of the run's class;
    - `added_{side}_random`, `removed_{side}_random`: the largest |share| of 5 random directions of the same norm.

    1 = all that separates the texts, and used where the interval clears what random directions do *on both sides*.
    One direction for all pairs of two classes knows neither subject nor image: shares of opposite sign on the two sides
    mean that it raises or lowers the score of every image alike, not that it negates. Where the texts of each pair are
    of equal length, layer 0 holds nothing; where not, it says what length alone tells. Where no pair has texts of two
    classes there is no causal test, and its columns are left out. `metric=cosine`
    takes shares of the way to the other text instead of d, and needs no image. `note` says what did not work, `attrs`
    how it came about.

    Raises:
        ValueError: no column of that name, two labels of one text, too few texts that differ or too few of a class, a
            share or an interval outside of (0, 1), or a layer that does not exist. Without `labels`: runs with the
            negation are mixed with runs without, or pairs have no side.
        TypeError: labels that are neither columns nor a function.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:60], store, encoder)
        >>> table = probe(encoder, batch, layers=[0, 5])
        >>> table[["layer", "accuracy", "added_foil"]].abs().round(1).to_numpy()[0].tolist()
        [0.0, 0.5, 0.0]
        >>> table = probe(encoder, batch, labels=lambda text: "no" in text.split(), layers=[0, 5])
        >>> table[["accuracy", "chance"]].round(1).to_numpy().tolist()
        [[0.5, 0.5], [1.0, 0.5]]
    """
    if not 0 < interval < 1:
        raise ValueError(f"interval={interval}: it lies between 0 and 1, as .95 does")
    split = split_texts(encoder, batch, layers, seed, test_share, labels)
    table = DataFrame({"layer": list(split.layers)})
    table = table.join(_readable(encoder, split, seed, interval))
    record = Setting.of(encoder, split.batch, metric=metric).record(PROBE).as_text()
    if len(split.contrasted):
        table = table.assign(**patched_shares(encoder, split, metric))
        for how in get_args(How):
            effects = steer(encoder, run_of(split, how), metric=metric, **steering_of(split, how, split.directions))
            table = table.assign(**used_shares(encoder, split, effects, how, seed, interval, metric))
        record = effects.meta
    table["note"] = table.pop("note")
    table.attrs = {**record, **_meta(split, seed, test_share), **_probe_meta(split.negation, interval)}
    return table


def probe_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    *,
    how: How = "add",
    labels: Labels | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    test_share: float = 0.5,
    metric: Metric | str = logit,
) -> Effects:
    """The causal test behind `probe` as an `Effects`: a place per layer, a column per held-out pair of two classes.

    The directions are those of `probe` with the same labels, seed and share. `how="add"` runs the batch's runs (the
    texts without negation where there are no labels), `how="remove"` the other texts; `fraction()` is the share of d
    that the direction moves.

    Raises:
        ValueError: as `probe`, or no held-out pair has texts of two classes.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:60], store, encoder)
        >>> effects = probe_effects(encoder, batch, how="remove", layers=[3, 6])
        >>> effects.record.run, len(effects.places)
        ('negated', 2)
    """
    split = split_texts(encoder, batch, layers, seed, test_share, labels)
    if not len(split.contrasted):
        raise ValueError(f"no causal test: {NO_CONTRAST}")
    effects = steer(encoder, run_of(split, how), metric=metric, **steering_of(split, how, split.directions))
    return replace(effects, record=effects.record.saying(**_meta(split, seed, test_share)))


NO_CONTRAST = (
    "no held-out pair has texts of two classes; with labels=(the captions' column, the foils' column), or a function "
    "from a text to its label, foils have labels too"
)


def _readable(encoder: HookedTextEncoder, split: Split, seed: int, interval: float) -> DataFrame:
    """The columns on what can be read, one row per layer."""
    tokens = [part[split.distinct] for part in (split.batch.tokens, split.batch.other)]
    mixed = torch.stack([streams_of(encoder, shuffled(encoder, part, seed), split.layers) for part in tokens], 1)
    nouns = _noun_fits(encoder, split) if split.negation else [{}] * len(split.layers)
    types, test, labels = types_of(split), split.test, split.labels
    rows = []
    for layer, streams in enumerate(split.streams):
        fits = {"accuracy": tell(streams, test, labels), "shuffled": tell(mixed[layer], test, labels), **nouns[layer]}
        control = control_fit(streams, test, types, labels, seed)
        row = _row(fits, control, _geometry(split, layer, fits["accuracy"]), interval)
        if not split.negation:
            row["permuted"] = permuted_fit(streams, test, labels, seed).accuracy
        rows.append(row | {"note": "; ".join([*row["note"], *_notes(split)])})
    left_out = PERMUTED if split.negation else NOUN
    return DataFrame(rows).reindex(columns=[name for name in READABLE if name not in left_out])


def _noun_fits(encoder: HookedTextEncoder, split: Split) -> list[dict[str, Fit]]:
    """By layer, whether a probe tells which of two nouns is negated; nothing where too few texts can be swapped."""
    swap = swapped(split)
    if not swap.possible:
        return [{}] * len(split.layers)
    nouns = streams_of(encoder, swap.texts.flatten(0, 1), split.layers).unflatten(1, swap.texts.shape[:2])
    return [{"noun": tell(streams, swap.test, swap.first)} for streams in nouns]


NOUN = ["noun", "noun_lower", "noun_upper", "noun_n"]
PERMUTED = ["permuted"]
READABLE = [
    "n",
    *(name + bound for name in ("accuracy", "shuffled", "noun") for bound in ("", "_lower", "_upper")),
    *("noun_n", "balanced", "chance", "permuted", "control", "control_n", "selectivity", "cosine", "norm", "note"),
]


def _row(fits: Mapping[str, Fit], control: Fit | None, geometry: dict[str, float], interval: float) -> dict[str, Any]:
    told = fits["accuracy"]
    row: dict[str, Any] = {"n": told.pairs, "noun_n": 0, "control_n": 0, **geometry}
    row |= {"balanced": told.balanced, "chance": told.chance}
    for name, fit in fits.items():
        row |= dict(zip((name, f"{name}_lower", f"{name}_upper"), _wilson(fit, interval), strict=True))
    if "noun" in fits:
        row["noun_n"] = fits["noun"].pairs
    if control:
        selectivity = told.accuracy - control.accuracy
        row |= {"control": control.accuracy, "control_n": len(control.right) // CONTROLS, "selectivity": selectivity}
    notes = [f"{name} did not converge" for name, fit in fits.items() if not fit.converged]
    notes += [] if control else ["no subject is both trained on and held out: no control"]
    notes += ["the classes have the same mean: no direction"] if math.isnan(geometry["cosine"]) else []
    return row | {"note": notes}


def _notes(split: Split) -> list[str]:
    """What is to be said of the labels at every layer."""
    notes = []
    if split.unseen:
        notes.append(f"held-out texts labelled {some(split.unseen, quote=True)} left out: no training text is")
    if not len(split.contrasted):
        notes.append(f"no causal test: {NO_CONTRAST}")
    return notes


def _wilson(fit: Fit, interval: float) -> tuple[float, float, float]:
    """The accuracy with Wilson's interval (1927). The two texts of a pair depend on each other, so that pairs count."""
    return proportion(fit.right_pairs, fit.pairs, interval=interval)[:3]


def _geometry(split: Split, layer: int, fit: Fit) -> dict[str, float]:
    """How long the directions between two classes are beside the mean stream, and their cosine with the differences of
    the classes' weights, in the probe's units; means over every two classes."""
    means = split.means[layer].double().cpu().numpy()
    found = [_contrast(means[b] - means[a], fit.weights[b] - fit.weights[a], fit.unit) for a, b in _couples(split)]
    norms, cosines = np.array(found).T
    whole = float(np.linalg.norm(means[split.trained].mean(0)))
    known = cosines[~np.isnan(cosines)]
    return {
        "cosine": float(known.mean()) if len(known) else math.nan,
        "norm": float(norms.mean()) / whole if whole else math.nan,
    }


def _couples(split: Split) -> list[tuple[int, int]]:
    return list(combinations(split.trained, 2))


def _contrast(direction: ndarray, weight: ndarray, unit: ndarray) -> tuple[float, float]:
    """The direction's length, and its cosine with the weights on standardised coordinates; NaN without a direction."""
    scaled = direction / unit
    lengths = np.linalg.norm(scaled) * np.linalg.norm(weight)
    return float(np.linalg.norm(direction)), float(scaled @ weight / lengths) if lengths else math.nan


def _meta(split: Split, seed: int, test_share: float) -> dict[str, str]:
    trained, tested = (~split.test).sum(), split.test.sum()
    return {
        "classes": "; ".join(f"{name}: {_count(split, number)}" for number, name in enumerate(split.classes)),
        "texts": f"{trained} distinct pairs of texts to train on, {tested} held out, {split.groups} groups",
        "test share": f"{test_share:g}",
        "probe seed": str(seed),
    }


def _count(split: Split, number: int) -> str:
    trained, tested = ((split.labels[:, part] == number).sum() for part in (~split.test, split.test))
    return f"{trained} texts to train on, {tested} held out"


def _probe_meta(negation: bool, interval: float) -> dict[str, str]:
    return {
        "method": f"linear probes: logistic regression with C={C:g} on standardised coordinates; steering with the "
        "difference of the class means",
        "run": "added to the text without negation, removed from the text with it"
        if negation
        else "added to the run, removed from the other text",
        "controls": f"{CONTROLS} draws of random labels, {RANDOM_DIRECTIONS} random directions",
        "interval": f"{interval:g}",
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }
