"""Is the direction of negation there, and is it used? A linear probe per layer, and its causal test.

Both at the pooled position of the residual stream, on pairs that the probe and the direction have not seen.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.source import How
from clip_lens.data.batch import Batch
from clip_lens.methods.probes.controls import CONTROLS, control_fit, shuffled, swapped, types_of
from clip_lens.methods.probes.fit import C, Fit, tell
from clip_lens.methods.probes.split import Split, split_texts, streams_of
from clip_lens.methods.probes.used import RANDOM_DIRECTIONS, patched_shares, run_of, steering_of, used_shares
from clip_lens.methods.statistics import proportion
from clip_lens.methods.steering import steer
from clip_lens.model.encoder import HookedTextEncoder


def probe(
    encoder: HookedTextEncoder,
    batch: Batch,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    test_share: float = 0.5,
    interval: float = 0.95,
    metric: Metric = logit,
) -> DataFrame:
    """One row per layer: can the negation be read from the stream at the pooled position, and is it used?

    Layers run over resid 0..L; all numbers are shares. Pairs that share a text are one group, and groups are
    held out whole. *Readable* is column by column (each of `accuracy`, `shuffled`, `noun` with `_lower`, `_upper`, a
    Wilson interval in which a pair of texts counts once):

    - `accuracy`: logistic regression on standardised coordinates (C = 1) tells the texts with the negation from those
      without; chance is .5; `n` distinct held-out pairs of texts.
    - `shuffled`: the same, trained and tested on texts whose words are shuffled. Where it does as well, accuracy says
      only that the negator is there, not that something is negated.
    - `control`: the accuracy for labels drawn at random for each subject (Hewitt & Liang 2019), on held-out texts with
      a subject that was trained on (`control_n` texts; the subject's first token counts where no whole one recurs);
      `selectivity` = accuracy - control.
    - `noun`: tells which of two nouns is negated in the same words: texts like "a ring and no star" and "no ring and a
      star", made by swapping the negator with the counterpart's determiner where that stands in the text once more
      (`noun_n` held-out ones; NaN without any).

    *Used*: the direction is the difference of the class means over the training texts; `cosine` is its cosine with the
    probe's weights (both on standardised coordinates), `norm` its length over that of the mean stream. Per side of the
    negation, caption and foil, over `n_{side}` held-out pairs, as shares of d (a ratio of means, with a bootstrap
    interval over pairs):

    - `patched_{side}`: for comparison, the text without negation has the whole stream of the text with it;
    - `added_{side}`: it is added to the text without negation;
    - `removed_{side}`: the text with the negation loses it: its coordinate becomes the mean of the texts without;
    - `added_{side}_random`, `removed_{side}_random`: the largest |share| of 5 random directions of the same norm.

    1 = all that separates the texts, and used where the interval clears what random directions do *on both sides*.
    One direction for all pairs knows neither subject nor image: shares of opposite sign on the two sides mean that it
    raises or lowers the score of every image alike, not that it negates. Where the texts of each pair are of equal
    length, layer 0 holds nothing; where not, it says what length alone tells. `metric=cosine` takes shares of the way
    to the other text instead of d, and needs no image. `note` says what did not work, `attrs` how it came about.

    Raises:
        ValueError: runs with the negation are mixed with runs without, pairs without a side, too few texts that differ,
            a share or an interval outside of (0, 1), or a layer that does not exist.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:60], store, encoder)
        >>> table = probe(encoder, batch, layers=[0, 5])
        >>> table[["layer", "accuracy", "added_foil"]].abs().round(1).to_numpy()[0].tolist()
        [0.0, 0.5, 0.0]
    """
    if not 0 < interval < 1:
        raise ValueError(f"interval={interval}: it lies between 0 and 1, as .95 does")
    split = split_texts(encoder, batch, layers, seed, test_share)
    table = DataFrame({"layer": list(split.layers)})
    table = table.join(_readable(encoder, split, seed, interval))
    table = table.assign(**patched_shares(encoder, split, metric))
    for how in get_args(How):
        effects = steer(encoder, run_of(split, how), metric=metric, **steering_of(split, how, split.directions))
        table = table.assign(**used_shares(encoder, split, effects, how, seed, interval, metric))
    table["note"] = table.pop("note")
    table.attrs = {**effects.meta, **_meta(split, seed, test_share), **_probe_meta(interval)}
    return table


def probe_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    *,
    how: How = "add",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    test_share: float = 0.5,
    metric: Metric = logit,
) -> Effects:
    """The causal test behind `probe` as an `Effects`: a place per layer, a column per held-out pair.

    The direction is that of `probe` with the same seed and share. `how="add"` runs the texts without negation,
    `how="remove"` those with it; `fraction()` is the share of d that the direction moves.

    Raises:
        ValueError: as `probe`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:60], store, encoder)
        >>> effects = probe_effects(encoder, batch, how="remove", layers=[3, 6])
        >>> effects.record.run, len(effects.places)
        ('negated', 2)
    """
    split = split_texts(encoder, batch, layers, seed, test_share)
    effects = steer(encoder, run_of(split, how), metric=metric, **steering_of(split, how, split.directions))
    return replace(effects, record=effects.record.saying(**_meta(split, seed, test_share)))


def _readable(encoder: HookedTextEncoder, split: Split, seed: int, interval: float) -> DataFrame:
    """The columns on what can be read, one row per layer."""
    tokens = [part[split.distinct] for part in (split.batch.tokens, split.batch.other)]
    mixed = torch.stack([streams_of(encoder, shuffled(encoder, part, seed), split.layers) for part in tokens], 1)
    swap = swapped(split)
    nouns = streams_of(encoder, swap.texts.flatten(0, 1), split.layers).unflatten(1, swap.texts.shape[:2])
    types, test = types_of(split), split.test
    rows = []
    for layer, streams in enumerate(split.streams):
        label = np.stack([np.zeros(len(test)), np.ones(len(test))]).astype(int)
        fits = {"accuracy": tell(streams, test, label), "shuffled": tell(mixed[layer], test, label)}
        if swap.possible:
            fits["noun"] = tell(nouns[layer], swap.test, swap.first)
        control = control_fit(streams, test, types, seed)
        rows.append(_row(fits, control, _geometry(split, layer, fits["accuracy"]), interval))
    return DataFrame(rows).reindex(columns=READABLE)


READABLE = [
    "n",
    *(name + bound for name in ("accuracy", "shuffled", "noun") for bound in ("", "_lower", "_upper")),
    *("noun_n", "control", "control_n", "selectivity", "cosine", "norm", "note"),
]


def _row(fits: Mapping[str, Fit], control: Fit | None, geometry: dict[str, float], interval: float) -> dict:
    row: dict[str, object] = {"n": len(fits["accuracy"].right) // 2, "noun_n": 0, "control_n": 0, **geometry}
    for name, fit in fits.items():
        row |= dict(zip((name, f"{name}_lower", f"{name}_upper"), _wilson(fit, interval), strict=True))
    if "noun" in fits:
        row["noun_n"] = len(fits["noun"].right) // 2
    if control:
        selectivity = fits["accuracy"].accuracy - control.accuracy
        row |= {"control": control.accuracy, "control_n": len(control.right) // CONTROLS, "selectivity": selectivity}
    notes = [f"{name} did not converge" for name, fit in fits.items() if not fit.converged]
    notes += [] if control else ["no subject is both trained on and held out: no control"]
    notes += ["both classes have the same mean: no direction"] if math.isnan(geometry["cosine"]) else []
    return row | {"note": "; ".join(notes)}


def _wilson(fit: Fit, interval: float) -> tuple[float, float, float]:
    """The accuracy with Wilson's interval (1927). The two texts of a pair depend on each other, so that pairs count."""
    return proportion(float(fit.right.sum()) / 2, len(fit.right) // 2, interval=interval)[:3]


def _geometry(split: Split, layer: int, fit: Fit) -> dict[str, float]:
    """How long the direction is beside the mean stream, and its cosine with the probe's weights, in their units."""
    direction, mean = (v.double().cpu().numpy() for v in (split.directions[layer], split.means[layer].mean(0)))
    scaled = direction / fit.unit
    lengths, norm, whole = np.linalg.norm(scaled) * np.linalg.norm(fit.weight), *map(np.linalg.norm, (direction, mean))
    return {
        "cosine": float(scaled @ fit.weight / lengths) if lengths else math.nan,
        "norm": float(norm / whole) if whole else math.nan,
    }


def _meta(split: Split, seed: int, test_share: float) -> dict[str, str]:
    trained, tested = (~split.test).sum(), split.test.sum()
    return {
        "texts": f"{trained} distinct pairs of texts to train on, {tested} held out, {split.groups} groups",
        "test share": f"{test_share:g}",
        "probe seed": str(seed),
    }


def _probe_meta(interval: float) -> dict[str, str]:
    return {
        "method": f"linear probes: logistic regression with C={C:g} on standardised coordinates; steering with the "
        "difference of the class means",
        "run": "added to the text without negation, removed from the text with it",
        "controls": f"{CONTROLS} draws of random labels, {RANDOM_DIRECTIONS} random directions",
        "interval": f"{interval:g}",
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }
