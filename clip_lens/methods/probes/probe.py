"""Is the direction of negation there, and is it used? A linear probe per layer, and its causal test.

Both at the pooled position of the residual stream, on pairs that the probe and the direction have not seen.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.source import How, steered
from clip_lens.data.batch import Batch
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import STEERING
from clip_lens.methods.statistics import proportion
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, hook_name

C = 1.0
"""The inverse strength of the probe's L2 penalty, on standardised coordinates."""
MAX_ITER = 2000
CONTROLS = 5
"""Draws of random labels that the control task is averaged over."""
RANDOM = 5
"""Random directions that a direction is compared with."""
LEAST = 2
"""Groups of texts without which there is no training or no testing."""
TEXTS_AT_ONCE = 64

NAMES: dict[How, str] = {"add": "added", "remove": "removed"}
Columns: TypeAlias = dict[str, ndarray]


class TooFewTexts(ValueError):
    """Texts too much alike for any to be held out: a `ValueError` that a report on more than probes can leave out."""


def steer(
    encoder: HookedTextEncoder,
    batch: Batch,
    directions: Mapping[Site, Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]],
    *,
    how: How = "add",
    origin: Mapping[Site, Float[Tensor, "d_model"]] | None = None,
    metric: Metric = logit,
    rows: int = 256,
) -> Effects:
    """What adding or removing a direction at each site moves in each pair, in units of the metric: an `Effects`.

    The sites are the places, each steered alone, at its slot's positions. `how="add"` adds the direction to the run's
    stream, `how="remove"` takes its component away, down to that of `origin` (0 if left out; see `steered`). The total
    is the counterpart's, `metric(other) - metric(run)`, so that a fraction is the share of d that the direction moves.

    Raises:
        ValueError: no directions, or what `patch_effects` and `steered` refuse.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> site = Site("resid", 4, slot="eot")
        >>> effects = steer(encoder, batch, {site: torch.randn(128)}, how="remove")
        >>> effects.values.shape, effects.record.method.title
        (torch.Size([1, 8]), 'steering: remove a direction')
    """
    source = steered(directions, how, origin=origin)
    effects = patch_effects(encoder, batch, tuple(directions), source=source, metric=metric, rows=rows)
    total = patch_effects(encoder, batch, [Site("resid", encoder.n_layers)], metric=metric, rows=rows).total
    record = replace(effects.record, method=STEERING[how]).saying(total="metric(other) - metric(run)")
    return replace(effects, total=total, record=record)


def probe(
    encoder: HookedTextEncoder,
    batch: Batch,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    test_share: float = 0.5,
    interval: float = 0.95,
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
    length, layer 0 holds nothing; where not, it says what length alone tells. `note` says what did not work, `attrs`
    how it came about.

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
    split = _split(encoder, batch, layers, seed, test_share)
    table = DataFrame({"layer": list(split.layers)})
    table = table.join(_readable(encoder, split, seed, interval))
    table = table.assign(**_patched(encoder, split))
    for how in get_args(How):
        effects = steer(encoder, _runs(split, how), **_steering(split, how, split.directions))
        table = table.assign(**_used(encoder, split, effects, how, seed, interval))
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
    split = _split(encoder, batch, layers, seed, test_share)
    effects = steer(encoder, _runs(split, how), metric=metric, **_steering(split, how, split.directions))
    return replace(effects, record=effects.record.saying(**_meta(split, seed, test_share)))


# Which texts are trained on, and which are held out


@dataclass(frozen=True, eq=False)
class Split:
    """Pairs whose run has no negation, split by groups that share no text; streams are those of the distinct texts."""

    batch: Batch
    held: Bool[Tensor, "pair"]
    distinct: Int[Tensor, "distinct"]
    layers: tuple[int, ...]
    streams: Float[Tensor, "layer text distinct d_model"]
    groups: int

    @property
    def test(self) -> ndarray:
        """Which of the distinct pairs of texts are held out."""
        return self.held[self.distinct].cpu().numpy()

    @property
    def means(self) -> Float[Tensor, "layer text d_model"]:
        """The class means of the training texts: without negation, with it."""
        return self.streams[:, :, ~self.held[self.distinct]].mean(2)

    @property
    def directions(self) -> Float[Tensor, "layer d_model"]:
        """The difference of the class means, exactly 0 where the texts of each pair have the same stream."""
        streams = self.streams[:, :, ~self.held[self.distinct]]
        return (streams[:, 1] - streams[:, 0]).mean(1)

    @property
    def places(self) -> list[Site]:
        return [Site("resid", layer, slot="eot") for layer in self.layers]


def _split(
    encoder: HookedTextEncoder, batch: Batch, layers: Sequence[int] | None, seed: int, test_share: float
) -> Split:
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share}: it lies between 0 and 1, as .5 does")
    batch = _without_negation(batch)
    layers = tuple(site.layer for site in encoder.sites("resid", layers=layers))
    group, distinct = _groups(batch)
    groups = int(group.max()) + 1
    tested = round(test_share * groups)
    if min(tested, groups - tested) < LEAST:
        raise TooFewTexts(
            f"{len(batch)} pairs make {groups} groups that share no text, {tested} of them to test on; at least "
            f"{LEAST} must be left to train on and to test on: give more texts that differ, or another test_share"
        )
    chosen = np.random.default_rng(seed).permutation(groups)[:tested]
    held = torch.from_numpy(np.isin(group, chosen)).to(batch.tokens.device)
    first = torch.from_numpy(distinct).to(batch.tokens.device)
    streams = [_streams(encoder, tokens[first], layers) for tokens in (batch.tokens, batch.other)]
    return Split(batch, held, first, layers, torch.stack(streams, 1), groups)


def _without_negation(batch: Batch) -> Batch:
    """The batch turned so that every run is the text without negation."""
    if "none" in batch.pairs.side:
        raise ValueError(
            f"{batch.pairs.side.count('none')} of {len(batch)} pairs have no side, neither text is the negated one; "
            "align(..., run='affirmative') leaves them out"
        )
    foils = (batch.sigma == 1).tolist()
    negated = [(side == "foil") == is_foil for side, is_foil in zip(batch.pairs.side, foils, strict=True)]
    if any(negated) and not all(negated):
        raise ValueError(
            f"{sum(negated)} of {len(batch)} runs are the text with the negation, the others the one without; "
            "align(..., run='affirmative') runs the same one everywhere"
        )
    return batch.flip() if any(negated) else batch


def _groups(batch: Batch) -> tuple[Int[ndarray, "pair"], Int[ndarray, "distinct"]]:
    """Which group each pair belongs to, pairs that share a text being of one; the first pair of each pair of texts."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number: dict[tuple[int, ...], int] = {}
    ends = [
        [number.setdefault(text, len(number)) for text in _texts(tokens, length)]
        for tokens, length in ((batch.tokens, batch.length), (batch.other, batch.other_length))
    ]
    links = coo_matrix((np.ones(len(batch)), ends), shape=(len(number), len(number)))
    _, component = connected_components(links, directed=False)
    _, distinct = np.unique(np.array(ends), axis=1, return_index=True)
    return component[ends[0]], np.sort(distinct)


def _texts(tokens: Int[Tensor, "pair pos"], length: Int[Tensor, "pair"]) -> Iterable[tuple[int, ...]]:
    return (tuple(text[:n]) for text, n in zip(tokens.tolist(), length.tolist(), strict=True))


@torch.no_grad()
def _streams(
    encoder: HookedTextEncoder, tokens: Int[Tensor, "text pos"], layers: Sequence[int]
) -> Float[Tensor, "layer text d_model"]:
    """The residual stream at the pooled position."""
    names = [hook_name(Site("resid", layer), encoder.n_layers) for layer in layers]
    parts = []
    for chunk in tokens.split(TEXTS_AT_ONCE):
        cache, row = encoder.cache(chunk, names=names), torch.arange(len(chunk), device=tokens.device)
        parts.append(torch.stack([cache[name][row, encoder.pool(chunk)] for name in names]))
    return torch.cat(parts, 1)


# Readable


class Fit(NamedTuple):
    """A probe's answers on held-out texts, its weights on standardised coordinates, their units, did it converge."""

    right: Bool[ndarray, "text"]
    weight: Float[ndarray, "d_model"]
    unit: Float[ndarray, "d_model"]
    converged: bool

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def _fit(
    train: Float[ndarray, "text d_model"],
    labels: Int[ndarray, "text"],
    test: Float[ndarray, "text d_model"],
    truth: Int[ndarray, "text"],
) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler, model = StandardScaler().fit(train), LogisticRegression(C=C, max_iter=MAX_ITER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it goes into the table's notes
        model.fit(scaler.transform(train), labels)
    right = model.predict(scaler.transform(test)) == truth
    return Fit(right, model.coef_[0], scaler.scale_, int(model.n_iter_[0]) < MAX_ITER)


def _tell(
    streams: Float[Tensor, "text pair d_model"], test: Bool[ndarray, "pair"], labels: Int[ndarray, "text pair"]
) -> Fit:
    """A probe that tells the labels, trained on the pairs that are not held out."""
    x = streams.double().cpu().numpy()
    train = ~test
    return _fit(*(part[:, chosen].reshape(-1, *part.shape[2:]) for chosen in (train, test) for part in (x, labels)))


def _readable(encoder: HookedTextEncoder, split: Split, seed: int, interval: float) -> DataFrame:
    """The columns on what can be read, one row per layer."""
    tokens = [part[split.distinct] for part in (split.batch.tokens, split.batch.other)]
    mixed = torch.stack([_streams(encoder, _shuffled(encoder, part, seed), split.layers) for part in tokens], 1)
    swap = _swapped(split)
    nouns = _streams(encoder, swap.texts.flatten(0, 1), split.layers).unflatten(1, swap.texts.shape[:2])
    types, test = _types(split), split.test
    rows = []
    for layer, streams in enumerate(split.streams):
        label = np.stack([np.zeros(len(test)), np.ones(len(test))]).astype(int)
        fits = {"accuracy": _tell(streams, test, label), "shuffled": _tell(mixed[layer], test, label)}
        if swap.possible:
            fits["noun"] = _tell(nouns[layer], swap.test, swap.first)
        control = _control(streams, test, types, seed)
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


# Controls


def _shuffled(encoder: HookedTextEncoder, tokens: Int[Tensor, "text pos"], seed: int) -> Int[Tensor, "text pos"]:
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


def _types(split: Split) -> Int[ndarray, "distinct"]:
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


def _control(
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
        fits.append(_tell(streams[:, torch.from_numpy(kept).to(streams.device)], tested[kept], labels))
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


def _swapped(split: Split) -> Swap:
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


# Used


def _runs(split: Split, how: How) -> Batch:
    """The held-out pairs: what is added goes to the text without negation, what is removed leaves the one with it."""
    held = split.batch[split.held.nonzero().flatten()]
    return held if how == "add" else held.flip()


def _steering(split: Split, how: How, directions: Float[Tensor, "layer d_model"]) -> dict[str, Any]:
    """What `steer` and `steered` are to do with a direction per layer."""
    origin = dict(zip(split.places, split.means[:, 0], strict=True)) if how == "remove" else None
    return {"directions": dict(zip(split.places, directions, strict=True)), "how": how, "origin": origin}


def _patched(encoder: HookedTextEncoder, split: Split) -> Columns:
    """The columns on what the whole stream at the pooled position carries, patched from the text with the negation."""
    shares = patch_effects(encoder, _runs(split, "add"), split.places).fraction().groupby("side")
    names = {"n": "n", "fraction": "patched"}
    return {f"{names[name]}_{side}": rows[name].to_numpy() for side, rows in shares for name in names}


def _used(encoder: HookedTextEncoder, split: Split, effects: Effects, how: How, seed: int, interval: float) -> Columns:
    """The columns of one intervention, by name."""
    table = effects.table(interval, seed=seed).assign(random=_random_share(encoder, split, effects, how, seed))
    suffixes = {"fraction": "", "lower": "_lower", "upper": "_upper", "random": "_random"}
    columns: Columns = {}
    for side, rows in table.groupby("side"):
        columns |= {f"{NAMES[how]}_{side}{suffix}": rows[name].to_numpy() for name, suffix in suffixes.items()}
    return columns


def _random_share(
    encoder: HookedTextEncoder, split: Split, effects: Effects, how: How, seed: int
) -> Float[ndarray, "place_and_side"]:
    """The largest |share| that one of some random directions moves, for each row of the effects' table."""
    shares = []
    for draw in range(RANDOM):
        source = steered(**_steering(split, how, _random_like(split, (seed, draw))))
        moved = patch_effects(encoder, _runs(split, how), split.places, source=source)
        shares.append(replace(moved, total=effects.total).fraction()["fraction"].abs())
    return np.max(shares, axis=0)


def _random_like(split: Split, seed: tuple[int, int]) -> Float[Tensor, "layer d_model"]:
    """Random directions with the norms of the split's, each drawn from the seed and its layer."""
    width = split.directions.shape[1]
    drawn = np.stack([np.random.default_rng([*seed, layer]).standard_normal(width) for layer in split.layers])
    unit = torch.nn.functional.normalize(torch.from_numpy(drawn), dim=-1)
    return unit.to(split.directions) * split.directions.norm(dim=-1, keepdim=True)


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
        "controls": f"{CONTROLS} draws of random labels, {RANDOM} random directions",
        "interval": f"{interval:g}",
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }
