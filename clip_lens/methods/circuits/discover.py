"""`discover`: a circuit found on some pairs and judged on others, by any finder, beside random circuits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.keep import Keep, joined
from clip_lens.core.metric import Metric, logit
from clip_lens.core.record import Method
from clip_lens.core.setting import Setting
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.core.spread import Engine, Spread, refuse_shard
from clip_lens.core.spreadsheet import write_csv
from clip_lens.core.table import sides_of
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.circuit import Circuit, random_circuit
from clip_lens.methods.circuits.faithfulness import (
    MEASURES,
    Faithfulness,
    faithfulness,
    faithfulness_record,
    outside,
)
from clip_lens.methods.circuits.finders import FINDERS, Finder, Options, circuit_path, finder_of, of_size
from clip_lens.methods.circuits.finders import shared as sharing
from clip_lens.methods.circuits.selection import EdgeScores, random_sizes, sized_circuits, stability
from clip_lens.methods.registry import EXACT
from clip_lens.model.encoder import HookedTextEncoder

BASELINES = 5
"""Random circuits of each size, drawn from as many seeds."""
RESAMPLES = 200
"""Of the stability."""
STABLE = 100
"""The number of edges whose stability is told beside that of the circuit's."""


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
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    keep: Keep | None = None,
    shared: Keep | None = None,
    rows: int = 256,
    seed: int = 0,
    progress: bool = True,
    jobs: int = 1,
    executor: Engine | Spread | None = None,
) -> Discovery:
    """The circuit that a method finds on the pairs of `found`, and how it does on those of `judged`: a `Discovery`.

    `method` is a key of `FINDERS`. "exact" patches every edge by itself, "eap" and "eap-ig" (with `steps`) estimate
    that, and the `edges` with the largest mean signed scores by size are the circuit. "eap-ig-certain",
    "eap-ig-both-ends" and "eap-ig-nodes" choose otherwise by the scores of "eap-ig" (`top_edges`); "eap-ig-loss" scores
    edges by the squared change of the metric. "acdc" removes edges from the whole tower while the metric changes by
    less than `threshold`, "learned" learns `edges` of them together (`learn_circuit`), "random" draws as many.

    f, CPR, CMD (method, section 8; MIB, 2504.13151) are measured on `judged` alone: of circuits of MIB's sizes, pruned
    after selection, for the method and for random circuits from five seeds; and of the circuit, as selected and pruned.
    `exact=True` patches every edge on `judged`, to compare the method's scores with. ACDC gives one circuit and no
    order of edges, so it has neither CPR nor CMD; nor has a learned one here, whose other sizes `learn_circuit` learns.

    The two batches usually run the caption, `align(..., run="caption")`, and come from `Batch.split`: by text where
    texts recur (`batch.split(by="text")`), since a split by image leaves texts that the circuit was found on among
    those that judge it. The result says which it was, and how many pairs have such a text.

    With `keep` results are saved in its folder, under names that say the method, and reused when they are the same:
    scores-eap.parquet and others, circuit-eap-200.json, summary-eap-200.csv (with `exact` summary-eap-200-exact.csv).
    What does not depend on the method goes to `shared`, by default the same folder. `jobs` and `executor` share
    out what scores edges and judges circuits (`patch_effects`).

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
    refuse_shard(executor)
    finder, options = finder_of(method), Options(edges, steps, threshold, seed)
    _check(encoder, found, judged, finder, edges)
    how: dict[str, Any] = {"source": source, "metric": metric, "rows": rows, "progress": progress}
    on, held_out = (Setting.of(encoder, batch, jobs=jobs, executor=executor, **how) for batch in (found, judged))
    shared, file = keep if shared is None else shared, finder.file(options)
    scores = finder.scores(on, options, keep)
    circuit = finder.circuit(on, options, scores, keep)
    bench = _Bench(held_out, seed, keep, shared)
    done = Discovery(
        method=finder.method,
        circuit=circuit,
        judged=Faithfulness(bench.sizes(circuit, scores, finder)),
        chosen=Faithfulness(bench.chosen(circuit, f"chosen-{file}")),
        found_on=len(found),
        repeated=repeated(found, judged),
        seed=seed,
        scores=scores,
        exact=FINDERS[EXACT.key].scores(held_out, options, shared, "held-out-exact") if exact else None,
        stability=DataFrame() if scores is None else _stability(scores, options, file, keep),
    )
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


@dataclass(frozen=True)
class _Bench:
    """The pairs that judge, and where what comes of it is kept: a method's own results, and those that all share."""

    setting: Setting
    seed: int
    keep: Keep | None
    shared: Keep | None

    def sizes(self, circuit: Circuit, scores: Effects | None, finder: Finder) -> Effects:
        """What circuits of MIB's sizes lose: those that the scores select, by either ranking, and random ones."""
        drawn_itself = circuit.selection.rule == "drawn"
        seeds = range(self.seed + (not drawn_itself), self.seed + BASELINES + 1)
        parts = [self.random(seed) for seed in seeds]
        if scores is not None:
            both = [one for signed in (True, False) for one in sized_circuits(scores, signed=signed, **finder.choose)]
            own = self.judged([one.named(circuit.name) for one in both], self.keep, f"sizes-{finder.method.key}")
            parts.insert(0, own)
        return joined(parts)

    def random(self, seed: int) -> Effects:
        """Circuits drawn at random have no scores to rank by: each counts for either ranking."""
        effects = self.judged(random_sizes(self.setting.encoder, seed), self.shared, f"sizes-random-{seed}")
        signed = [replace(place, ranking="signed") for place in Faithfulness(effects).places]
        return joined([replace(effects, places=tuple(signed)), effects])

    def chosen(self, circuit: Circuit, name: str) -> Effects:
        """What the circuit loses, and random ones of its size, of either form."""
        like, seeds = of_size(self.setting.encoder, len(circuit)), range(self.seed + 1, self.seed + BASELINES + 1)
        by_chance = [random_circuit(like, seed) for seed in seeds]
        kept_as = f"random-{len(circuit)}-{seeds[0]}-to-{seeds[-1]}"
        own = self.judged(_both_forms([circuit]), self.keep, name)
        return joined([own, self.judged(_both_forms(by_chance), self.shared, kept_as)])

    def judged(self, circuits: Sequence[Circuit], keep: Keep | None, name: str) -> Effects:
        """What some circuits lose, kept."""
        setting = self.setting
        compute = lambda _: faithfulness(setting.encoder, setting.batch, circuits, **sharing(setting)).effects
        if keep is None:
            return compute(())
        wanted = faithfulness_record(setting, circuits)
        return keep.effects(name, wanted, tuple(map(outside, circuits)), compute, whole=True)


def _both_forms(circuits: Sequence[Circuit]) -> list[Circuit]:
    return [*circuits, *(circuit.pruned() for circuit in circuits)]


def _stability(scores: Effects, options: Options, file: str, keep: Keep | None) -> DataFrame:
    sizes = sorted(size for size in {STABLE, options.edges} if size <= len(scores.places))
    compute = lambda: stability(scores, sizes, resamples=RESAMPLES, seed=options.seed)
    if keep is None:
        return compute()
    wanted = scores.record.saying(sizes=str(sizes), resamples=RESAMPLES, seed=options.seed)
    return keep.frame(f"stability-{file}", wanted, compute)


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
    done.circuit.save(circuit_path(keep, file))
    compared = "" if done.exact is None else "-exact"  # its r is in no other
    write_csv(done.summary, keep.folder / f"summary-{file}{compared}.csv")


def _own(table: DataFrame, name: str) -> tuple[DataFrame, DataFrame]:
    """The rows of the method, and those of the random baselines."""
    own = table["circuit"] == name
    return table[own], table[~own]


def _first(rows: DataFrame, columns: Sequence[str]) -> dict[str, float]:
    return {name: float(rows[name].iloc[0]) if len(rows) else float("nan") for name in columns}
