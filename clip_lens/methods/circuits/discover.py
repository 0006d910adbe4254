"""`discover`: a circuit found on some pairs and judged on others, by any finder, beside random circuits.

A finder is one entry of `FINDERS`: the method that it is, and how it scores every edge or finds a circuit at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.keep import REMEDY, Keep, joined
from clip_lens.core.metric import Metric, logit
from clip_lens.core.record import Method, Record
from clip_lens.core.setting import Setting
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.core.spreadsheet import write_csv
from clip_lens.core.table import sides_of
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.acdc import acdc, acdc_record
from clip_lens.methods.circuits.circuit import Circuit, random_circuit
from clip_lens.methods.circuits.faithfulness import (
    MEASURES,
    Faithfulness,
    faithfulness,
    faithfulness_record,
    outside,
)
from clip_lens.methods.circuits.selection import EdgeScores, random_sizes, sized_circuits, stability, top_edges
from clip_lens.methods.gradient import conventions, gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import ACDC, EAP, EAP_IG, EXACT, PATCHING, RANDOM
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge

BASELINES = 5
"""Random circuits of each size, drawn from as many seeds."""
RESAMPLES = 200
"""Of the stability."""
STABLE = 100
"""The number of edges whose stability is told beside that of the circuit's."""
PASS = 64
"""Pairs in one backward pass at most: a backward pass keeps what a forward pass can forget."""


@dataclass(frozen=True)
class Options:
    """What finders may be told: how many edges, the steps of a gradient, the threshold of a search, a seed."""

    edges: int = 200
    steps: int = 5
    threshold: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Finder:
    """A way to find a circuit: the method that it is, and how it scores edges or finds a circuit at once.

    `score` gives the effects of some edges on a setting's pairs, of which the strongest are the circuit; `search` gives
    a circuit. `record` says beforehand what the result will say of itself, so that a kept one can stand for it; None
    where nothing is worth keeping. `in_parts`: edges can be scored some at a time. `bound` is the option that decides
    how large the circuit is; the names of its files say it.
    """

    method: Method
    score: Callable[[Setting, Sequence[Edge], Options], Effects] | None = None
    search: Callable[[Setting, Options], Circuit] | None = None
    record: Callable[[Setting, Options], Record] | None = None
    in_parts: bool = False
    bound: Literal["edges", "threshold"] = "edges"

    def file(self, options: Options) -> str:
        """What the files of a circuit found in this way are called."""
        return f"{self.method.key}-{getattr(options, self.bound):g}"


def _given(setting: Setting) -> dict[str, Any]:
    """The keyword arguments that a verb has for a setting."""
    return {"source": setting.source, "metric": setting.metric, "rows": setting.rows, "progress": setting.progress}


def _exact(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    return patch_effects(setting.encoder, setting.batch, edges, **_given(setting))


def _eap(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    how = {**_given(setting), "rows": min(setting.rows, PASS)}
    return gradient_effects(setting.encoder, setting.batch, edges, **how)


def _eap_ig(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    how = {**_given(setting), "rows": min(setting.rows, PASS)}
    return gradient_effects(setting.encoder, setting.batch, edges, steps=options.steps, **how)


def _eap_ig_record(setting: Setting, options: Options) -> Record:
    method = EAP_IG if options.steps > 1 else EAP
    return setting.record(method, **conventions(options.steps))


def _acdc(setting: Setting, options: Options) -> Circuit:
    return acdc(setting.encoder, setting.batch, options.threshold, **_given(setting))


def _drawn(setting: Setting, options: Options) -> Circuit:
    return random_circuit(_of_size(setting.encoder, options.edges), options.seed)


FINDERS = {
    finder.method.key: finder
    for finder in (
        Finder(EXACT, _exact, record=lambda setting, options: setting.record(PATCHING), in_parts=True),
        Finder(EAP, _eap, record=lambda setting, options: setting.record(EAP, **conventions(1))),
        Finder(EAP_IG, _eap_ig, record=_eap_ig_record),
        Finder(
            ACDC, search=_acdc, record=lambda setting, options: acdc_record(setting, options.threshold),
            bound="threshold",
        ),
        Finder(RANDOM, search=_drawn),
    )
}  # fmt: skip
"""Every way to find a circuit that `discover` knows, by its method's key. One of your own is one entry more."""


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """A circuit, what it was found by, and how it does on pairs that it was not found on.

    `circuit` is what was selected, not pruned. `scores` are the method's effects of every edge on the pairs of the
    first split (None where the method scores none), `exact` those of patching every edge on the pairs of the second.
    `judged` says what circuits of MIB's sizes lose on the second split, selected by `scores` and drawn at random, all
    pruned, as MIB's are; `chosen` the same of `circuit` and of random ones of its size, each as it was selected and
    pruned: two circuits, that do the same only where the source is a run on texts of equal length (`Circuit.pruned`).
    `stability` is the table of that name, without rows where there are no scores.

    `held_out` says how the pairs were kept apart, "by image" or "by text", "" where nobody said; `repeated` how many of
    the judged pairs have a text that the circuit was found on: they judge less than they seem to.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = discover(encoder, *batch.split(by="text"), method="eap", edges=50)
        >>> found
        Discovery(EAP: 50 of 1108 edges; found on 8 pairs, judged on 8 held out by text)
    """

    method: Method
    circuit: Circuit
    judged: Faithfulness
    chosen: Faithfulness
    found_on: int
    repeated: int
    seed: int
    scores: Effects | None = None
    exact: Effects | None = None
    stability: DataFrame = field(default_factory=DataFrame)

    def __repr__(self) -> str:
        edges = f"{self.circuit.selection.asked} of {int(self.circuit.graph.edges.sum())} edges"
        held_out = f" held out {self.held_out}" if self.held_out else ""
        repeated = f", {self.repeated} of them with a text that it was found on" if self.repeated else ""
        pairs = f"found on {self.found_on} pairs, judged on {len(self.judged.effects.pairs)}{held_out}{repeated}"
        return f"Discovery({self.name}: {edges}; {pairs})"

    @property
    def name(self) -> str:
        """What tables and pictures call the method."""
        return self.circuit.name

    @property
    def held_out(self) -> str:
        """How the judged pairs were kept apart from those that it was found on: "by image", "by text", or ""."""
        return self.judged.effects.record.held_out

    @cached_property
    def curve(self) -> DataFrame:
        """f over size, of pruned circuits: the rows of `judged.table()`; of a method without scores its circuit's."""
        table = self.judged.table(seed=self.seed)
        if self.name in set(table["circuit"]):
            return table
        verdict = self.verdict
        own = verdict[(verdict["circuit"] == self.name) & verdict["pruned"]]
        both = [own.assign(ranking=ranking) for ranking in MEASURES]
        return pd.concat([*both, table], ignore_index=True)

    @cached_property
    def areas(self) -> DataFrame:
        """CPR and CMD of the method and of each of the random baselines: the rows of `judged.areas()`."""
        return self.judged.areas(seed=self.seed)

    @cached_property
    def verdict(self) -> DataFrame:
        """f of the circuit and of random ones of its size, of either form: the rows of `chosen.table()`."""
        return self.chosen.table(seed=self.seed)

    @cached_property
    def agreement(self) -> DataFrame:
        """Pearson's r of the scores of one split with exact ones of the other, a row per side (and "pooled" over
        several): side, r, edges (that both have a score of); empty without both."""
        if self.scores is None or self.exact is None:
            return DataFrame(columns=list(AGREEMENT))
        return agreement(self.exact, self.scores)

    @cached_property
    def summary(self) -> DataFrame:
        """A row per side, and "pooled" over several: what the other tables say of the method, and the random mean.

        Columns: method, side, edges (of the circuit), f, lower, upper, random_f, the same of the pruned circuit with
        the ending _pruned, CPR, random_CPR, CMD, random_CMD, r (with exact scores), jaccard (mean over resamples, at
        the circuit's size), found_on, pairs (judged), held_out, repeated.
        """
        areas, jaccard = self.areas.set_index("side"), self._jaccard()
        r = self.agreement.set_index("side")["r"]
        lines = []
        for side in dict.fromkeys(self.verdict["side"]):
            over, over_chance = _own(areas.loc[areas.index == side], self.name)
            measured = {
                key: number
                for name in MEASURES.values()
                for key, number in {**_first(over, (name,)), f"random_{name}": over_chance[name].mean()}.items()
            }
            lines.append({
                "method": self.name, "side": side, **self._form(side, pruned=False),
                **{f"{name}_pruned": number for name, number in self._form(side, pruned=True).items()},
                **measured, "r": r.get(side, np.nan), "jaccard": jaccard, "found_on": self.found_on,
                "pairs": self._pairs(side), "held_out": self.held_out, "repeated": self.repeated,
            })  # fmt: skip
        return DataFrame(lines)

    def _form(self, side: str, *, pruned: bool) -> dict[str, float]:
        """What one form of the circuit does on a side, and on average random ones do."""
        table = self.verdict
        own, by_chance = _own(table[(table["side"] == side) & (table["pruned"] == pruned)], self.name)
        edges = int(own["edges"].iloc[0])
        return {"edges": edges, **_first(own, ("f", "lower", "upper")), "random_f": by_chance["f"].mean()}

    def _pairs(self, side: str) -> int:
        return int(_own(self.verdict[self.verdict["side"] == side], self.name)[0]["n"].iloc[0])

    def _jaccard(self) -> float:
        if self.stability.empty:
            return float("nan")
        return float(self.stability.set_index("edges")["jaccard"].get(self.circuit.selection.asked, np.nan))


def discover(
    encoder: HookedTextEncoder,
    found: Batch,
    judged: Batch,
    *,
    method: str = "eap-ig",
    edges: int = 200,
    steps: int = 5,
    threshold: float = 0.02,
    exact: bool = False,
    source: Source | Function = counterpart,
    metric: Metric = logit,
    keep: Keep | None = None,
    shared: Keep | None = None,
    rows: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """The circuit that a method finds on the pairs of `found`, and how it does on those of `judged`: a `Discovery`.

    `method` is a key of `FINDERS`. "exact" patches every edge by itself, "eap" and "eap-ig" (with `steps`) estimate
    that, and the `edges` with the largest mean signed scores by size are the circuit; "random" draws as many; "acdc"
    removes edges from the whole tower while the metric changes by less than `threshold`. f, CPR, CMD (method, section
    8; MIB, 2504.13151) are measured on `judged` alone: of circuits of MIB's sizes, pruned after selection, for the
    method and for random circuits from five seeds; and of the circuit, as selected and pruned. `exact=True` patches
    every edge on `judged`, to compare the method's scores with. ACDC gives one circuit and no order of edges, so it has
    neither CPR nor CMD.

    The two batches usually run the caption, `align(..., run="caption")`, and come from `Batch.split`: by text where
    texts recur (`batch.split(by="text")`), since a split by image leaves texts that the circuit was found on among
    those that judge it. The result says which it was, and how many pairs have such a text.

    With `keep` results are saved in its folder, under names that say the method, and reused when they are the same:
    scores-eap.parquet and others, circuit-eap-200.json, summary-eap-200.csv. What does not depend on the method goes to
    `shared`, by default the same folder.

    Raises:
        ValueError: an unknown method, a number of edges that the encoder does not have, batches that share a pair or
            run different texts, or what the method refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = discover(encoder, *batch.split(by="text"), method="eap", edges=50)
        >>> found.summary[["method", "side", "pairs"]].tail(1)
          method    side  pairs
        2    EAP  pooled      8
    """
    finder, options = _finder(method), Options(edges, steps, threshold, seed)
    _check(encoder, found, judged, finder, edges)
    on = Setting.of(encoder, found, source=source, metric=metric, rows=rows, progress=progress)
    held_out = Setting.of(encoder, judged, source=source, metric=metric, rows=rows, progress=progress)
    common, file = keep if shared is None else shared, finder.file(options)
    scores = _scores(finder, on, options, keep)
    circuit = _circuit(finder, on, options, scores, keep)
    done = Discovery(
        finder.method, circuit,
        Faithfulness(_sizes(finder, held_out, options, scores, keep, common)),
        Faithfulness(_chosen(held_out, options, circuit, file, keep, common)),
        len(found), repeated(found, judged), seed, scores,
        _kept(FINDERS[EXACT.key], held_out, options, common, "held-out-exact") if exact else None,
        DataFrame() if scores is None else _stability(scores, options, file, keep),
    )  # fmt: skip
    if keep is not None:
        _write(done, keep, file)
    return done


AGREEMENT = ("side", "r", "edges")


def agreement(exact: Effects, estimate: Effects) -> DataFrame:
    """Pearson's r over edges of two results' mean signed scores, that may come from different pairs: a row per side.

    Columns: side (and "pooled" over several), r, edges (that both have a score of). NaN where one of them is constant.

    Raises:
        ValueError: places that are not single edges at every position, or no edge in common.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder, run="caption")
        >>> effects = clip_lens.gradient_effects(encoder, batch, encoder.edges())
        >>> agreement(effects, effects)["r"].round(6).unique().tolist()
        [1.0]
    """
    sides = [side for side in sides_of(exact.pairs, pooled=False) if side in set(estimate.pairs["side"])]
    lines = []
    for side in [*sides, "pooled"] if len(sides) > 1 else sides:
        one, two = (_mean_scores(effects, side) for effects in (exact, estimate))
        both = one.index.intersection(two.index)
        if not len(both):
            raise ValueError("the two results have no edge in common; give both the same edges")
        lines.append((side, one[both].corr(two[both]), len(both)))
    return DataFrame(lines, columns=list(AGREEMENT))


def _mean_scores(effects: Effects, side: str) -> pd.Series:
    chosen = effects if side == "pooled" else effects.where(side=side)
    means = EdgeScores.of(chosen).means()[:, 0].numpy()
    return pd.Series(means, index=[str(place) for place in effects.places]).dropna()


def repeated(found: Batch, judged: Batch) -> int:
    """How many judged pairs have a text, as the encoder reads it, that stands among those that were found on.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:200], store, encoder)
        >>> repeated(*batch.split(by="image")) > repeated(*batch.split(by="text")) == 0
        True
    """
    known = {text for pair in _texts(found) for text in pair}
    return sum(any(text in known for text in pair) for pair in _texts(judged))


def _texts(batch: Batch) -> list[tuple[tuple[int, ...], ...]]:
    """Both texts of every pair, as token ids."""
    each = ((batch.tokens, batch.length), (batch.other, batch.other_length))
    sides = [
        [tuple(ids[:end]) for ids, end in zip(tokens.tolist(), length.tolist(), strict=True)] for tokens, length in each
    ]
    return list(zip(*sides, strict=True))


def _finder(method: str) -> Finder:
    if method not in FINDERS:
        raise ValueError(f"method={method!r}; give one of {', '.join(FINDERS)}")
    return FINDERS[method]


def _scores(finder: Finder, setting: Setting, options: Options, keep: Keep | None) -> Effects | None:
    return None if finder.score is None else _kept(finder, setting, options, keep, f"scores-{finder.method.key}")


def _kept(finder: Finder, setting: Setting, options: Options, keep: Keep | None, name: str) -> Effects:
    """A finder's scores of all edges, kept in parts where they can be."""
    score, edges = cast(Any, finder.score), setting.encoder.edges()
    compute = lambda some: score(setting, some, options)
    if keep is None or finder.record is None:
        return compute(edges)
    return keep.effects(name, finder.record(setting, options), edges, compute, whole=not finder.in_parts)


def _circuit(finder: Finder, setting: Setting, options: Options, scores: Effects | None, keep: Keep | None) -> Circuit:
    """What the finder finds, under its method's name."""
    if scores is not None:
        return top_edges(scores, options.edges).named(finder.method.title)
    compute = lambda: cast(Any, finder.search)(setting, options)
    if keep is None or finder.record is None:
        return compute()
    return _searched(_circuit_path(keep, finder.file(options)), keep, finder.record(setting, options), compute)


def _circuit_path(keep: Keep, file: str) -> Path:
    return keep.folder / f"circuit-{file}.json"


def _searched(path: Path, keep: Keep, wanted: Record, compute: Callable[[], Circuit]) -> Circuit:
    """A search's circuit: read if it is there and its record stands for the one that is wanted, else searched.

    Raises:
        ValueError: the file is there and is another circuit.
    """
    if not path.exists() or keep.overwrite:
        return compute()
    there = Circuit.load(path)
    said = Record() if there.record is None else there.record
    if not said.stands_for(wanted):
        raise ValueError(f"{path} is there, and is another circuit: {'; '.join(said.differences(wanted))}. {REMEDY}")
    keep.say(f"{path} is there already and fits: reused")
    return there


def _stability(scores: Effects, options: Options, file: str, keep: Keep | None) -> DataFrame:
    sizes = sorted(size for size in {STABLE, options.edges} if size <= len(scores.places))
    compute = lambda: stability(scores, sizes, resamples=RESAMPLES, seed=options.seed)
    if keep is None:
        return compute()
    wanted = scores.record.saying(sizes=str(sizes), resamples=RESAMPLES, seed=options.seed)
    return keep.frame(f"stability-{file}", wanted, compute)


def _sizes(
    finder: Finder, setting: Setting, options: Options, scores: Effects | None, keep: Keep | None, shared: Keep | None
) -> Effects:
    """What circuits of MIB's sizes lose: the method's, by either ranking, and random ones."""
    drawn_itself = finder.score is None and finder.method == RANDOM
    seeds = range(options.seed + (not drawn_itself), options.seed + BASELINES + 1)
    parts = [_random_sizes(setting, seed, shared) for seed in seeds]
    if scores is not None:
        both = [circuit for signed in (True, False) for circuit in sized_circuits(scores, signed=signed)]
        own = [circuit.named(finder.method.title) for circuit in both]
        parts.insert(0, _judged(setting, own, keep, f"sizes-{finder.method.key}"))
    return joined(parts)


def _random_sizes(setting: Setting, seed: int, keep: Keep | None) -> Effects:
    """Circuits drawn at random have no scores to rank by: each counts for either ranking."""
    effects = _judged(setting, random_sizes(setting.encoder, seed), keep, f"sizes-random-{seed}")
    signed = [replace(place, ranking="signed") for place in Faithfulness(effects).places]
    return joined([replace(effects, places=tuple(signed)), effects])


def _chosen(
    setting: Setting, options: Options, circuit: Circuit, file: str, keep: Keep | None, shared: Keep | None
) -> Effects:
    """What the circuit loses, and random ones of its size, of either form."""
    like = _of_size(setting.encoder, len(circuit))
    seeds = range(options.seed + 1, options.seed + BASELINES + 1)
    drawn = [random_circuit(like, seed) for seed in seeds]
    name = f"random-{len(circuit)}-{seeds[0]}-to-{seeds[-1]}"
    parts = [(circuit,), drawn]
    forms = [[*some, *(one.pruned() for one in some)] for some in parts]
    own, by_chance = forms
    return joined([_judged(setting, own, keep, f"chosen-{file}"), _judged(setting, by_chance, shared, name)])


def _judged(setting: Setting, circuits: Sequence[Circuit], keep: Keep | None, name: str) -> Effects:
    """What some circuits lose, kept."""
    compute = lambda _: faithfulness(setting.encoder, setting.batch, circuits, **_given(setting)).effects
    if keep is None:
        return compute(())
    wanted = faithfulness_record(setting, circuits)
    return keep.effects(name, wanted, tuple(map(outside, circuits)), compute, whole=True)


def _of_size(encoder: HookedTextEncoder, n: int) -> Circuit:
    """A circuit of the encoder that stands for any of n edges: how many a random one is to have."""
    full = Circuit.full(encoder)
    return replace(full, keep=full.keep & (full.keep.flatten().cumsum(0).unflatten(0, full.keep.shape) <= n))


def _check(encoder: HookedTextEncoder, found: Batch, judged: Batch, finder: Finder, edges: int) -> None:
    n = len(encoder.edges())
    if finder.bound == "edges" and not 1 <= edges <= n:
        raise ValueError(f"edges={edges}: {encoder.full_name} has {n} edges to select from")
    if found.run != judged.run:
        raise ValueError(f"a circuit is judged on the texts it is found on, got run={found.run!r} and {judged.run!r}")
    pairs = [set(zip(b.pairs.caption, b.pairs.foil, b.pairs.image, strict=True)) for b in (found, judged)]
    if both := pairs[0] & pairs[1]:
        raise ValueError(
            f"{len(both)} pairs are in both splits, such as {min(both)[0]!r}: a circuit is judged on other pairs than "
            "it is found on; Batch.split parts them by image or by text"
        )


def _write(done: Discovery, keep: Keep, file: str) -> None:
    done.circuit.save(_circuit_path(keep, file))
    write_csv(done.summary, keep.folder / f"summary-{file}.csv")


def _own(table: DataFrame, name: str) -> tuple[DataFrame, DataFrame]:
    """The rows of the method, and those of the random baselines."""
    own = table["circuit"] == name
    return table[own], table[~own]


def _first(rows: DataFrame, columns: Sequence[str]) -> dict[str, float]:
    return {name: float(rows[name].iloc[0]) if len(rows) else float("nan") for name in columns}
