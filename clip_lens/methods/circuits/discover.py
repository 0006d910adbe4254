"""`discover`: a circuit found on some pairs and judged on others, by any of the methods, beside random circuits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.keep import Keep, joined
from clip_lens.core.metric import Metric, logit
from clip_lens.core.source import Source, counterpart
from clip_lens.core.table import sides_of
from clip_lens.data.batch import Batch
from clip_lens.files import written_whole
from clip_lens.methods.circuits import faithfulness as judging
from clip_lens.methods.circuits.acdc import acdc
from clip_lens.methods.circuits.circuit import Circuit, random_circuit
from clip_lens.methods.circuits.faithfulness import cpr_cmd, faithfulness, faithfulness_table
from clip_lens.methods.circuits.selection import SHARES, EdgeScores, sized_circuits, stability, top_edges
from clip_lens.methods.gradient import conventions, gradient_effects
from clip_lens.methods.patching import METHOD, describe, patch_effects
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Outside
from clip_lens.originals.open_clip import digest

Method = Literal["exact", "eap", "eap-ig", "acdc", "random"]
BASELINES = 5
"""Random circuits of each size, drawn from as many seeds."""
RESAMPLES = 200
"""Of the stability."""
STABLE = 100
"""The number of edges whose stability is told beside that of the circuit's."""
PASS = 64
"""Pairs in one backward pass at most: a backward pass keeps what a forward pass can forget."""


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """A circuit, what it was found by, and how it does on pairs that it was not found on.

    `scores` are the method's effects of every edge on the pairs of the first split (None for "acdc" and "random"),
    `exact` those of patching every edge on the pairs of the second. `judged` says what circuits of MIB's sizes lose on
    the second split, selected by `scores` and drawn at random, `chosen` the same of `circuit` and of random ones of its
    size; both are results of `faithfulness`. `stability` is the table of that name, without rows where there are no
    scores.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = discover(encoder, *batch.split(), method="eap", edges=50)
        >>> found
        Discovery(EAP: 50 of 1108 edges; found on 8 pairs, judged on 8)
    """

    method: str
    circuit: Circuit
    judged: Effects
    chosen: Effects
    found_on: int
    seed: int
    scores: Effects | None = None
    exact: Effects | None = None
    stability: DataFrame = field(default_factory=DataFrame)

    def __repr__(self) -> str:
        edges = f"{self.circuit.meta['asked']} of {int(self.circuit.graph.edges.sum())} edges"
        return f"Discovery({self.name}: {edges}; found on {self.found_on} pairs, judged on {len(self.judged.pairs)})"

    @property
    def name(self) -> str:
        """What tables and pictures call the method."""
        return self.circuit.name

    @cached_property
    def curve(self) -> DataFrame:
        """f over size: the rows of `faithfulness_table` of `judged`; of ACDC, which has no scores, its circuit's."""
        table = faithfulness_table(self.judged, seed=self.seed)
        if self.name in set(table["circuit"]):
            return table
        own = self.verdict[self.verdict["circuit"] == self.name]
        both = [own.assign(ranking=ranking) for ranking in judging.MEASURES]
        return pd.concat([*both, table], ignore_index=True)

    @cached_property
    def areas(self) -> DataFrame:
        """CPR and CMD of the method and of each of the random baselines: the rows of `cpr_cmd`."""
        return cpr_cmd(self.judged, seed=self.seed)

    @cached_property
    def verdict(self) -> DataFrame:
        """f of the circuit and of random ones of its size: the rows of `faithfulness_table` of `chosen`."""
        return faithfulness_table(self.chosen, seed=self.seed)

    @cached_property
    def agreement(self) -> DataFrame:
        """Pearson's r of the scores of one split with exact ones of the other: `agreement`; empty without both."""
        if self.scores is None or self.exact is None:
            return DataFrame(columns=list(AGREEMENT))
        return agreement(self.exact, self.scores)

    @cached_property
    def summary(self) -> DataFrame:
        """A row per side, and "pooled" over several: what the other tables say of the method, and the random mean.

        Columns: method, side, edges (of the circuit, pruned), f, lower, upper, random_f, CPR, random_CPR, CMD,
        random_CMD, r (with exact scores), jaccard (mean over resamples, at the circuit's size), found_on, pairs.
        """
        verdict, areas = (table.set_index("side") for table in (self.verdict, self.areas))
        r = self.agreement.set_index("side")["r"]
        stable = self.stability.set_index("edges")["jaccard"] if len(self.stability) else pd.Series(dtype=float)
        lines = []
        for side in dict.fromkeys(self.verdict["side"]):
            at, by_chance = _own(verdict.loc[[side]], self.name)
            over, over_chance = _own(areas.loc[[side]], self.name)
            lines.append({
                "method": self.name, "side": side, "edges": len(self.circuit), **_first(at, ("f", "lower", "upper")),
                "random_f": by_chance["f"].mean(),
                **{key: number for name in judging.MEASURES.values() for key, number in {
                    **_first(over, (name,)), f"random_{name}": over_chance[name].mean()}.items()},
                "r": r.get(side, np.nan), "jaccard": stable.get(int(self.circuit.meta["asked"]), np.nan),
                "found_on": self.found_on, "pairs": int(at["n"].iloc[0]),
            })  # fmt: skip
        return DataFrame(lines)


def discover(
    encoder: HookedTextEncoder,
    found: Batch,
    judged: Batch,
    *,
    method: Method = "eap-ig",
    edges: int = 200,
    steps: int = 5,
    threshold: float = 0.02,
    exact: bool = False,
    source: Source = counterpart,
    metric: Metric = logit,
    keep: Keep | None = None,
    shared: Keep | None = None,
    rows: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """The circuit that a method finds on the pairs of `found`, and how it does on those of `judged`: a `Discovery`.

    "exact" patches every edge by itself, "eap" and "eap-ig" (with `steps`) estimate that, and the `edges` with the
    largest mean signed scores by size are the circuit; "random" draws as many; "acdc" removes edges from the whole
    tower while the metric changes by less than `threshold`. Circuits are pruned after selection. f, CPR, CMD (method,
    section 8; MIB, 2504.13151) are measured on `judged` alone, of circuits of MIB's sizes, for the method and for
    random circuits from five seeds; `exact=True` patches every edge on `judged`, to compare the method's scores with.
    ACDC gives one circuit and no order of edges, so it has neither CPR nor CMD.

    With `keep` results are saved in its folder and reused when they fit: scores-*.parquet and
    others, circuit.json, summary.csv. What does not depend on the method goes to `shared`, by default the same folder.
    Batches usually run the caption, `align(..., run="caption")`, and come from `Batch.split`.

    Raises:
        ValueError: an unknown method, a number of edges that the encoder does not have, batches that share a pair or
            run different texts, or what the method refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> found = discover(encoder, *batch.split(), method="eap", edges=50)
        >>> found.summary[["method", "side", "pairs"]].tail(1)
          method    side  pairs
        2    EAP  pooled      8
    """
    _check(encoder, found, judged, method, edges)
    common = keep if shared is None else shared
    job = _Job(
        encoder, found, judged, method, edges, steps, threshold, source, metric, keep, common, rows, seed, progress
    )
    circuit, scores = job.circuit()
    patched = job.effects(common, "held-out-exact", METHOD, judged, patch_effects, rows=rows) if exact else None
    done = Discovery(
        method, circuit.pruned(), job.sizes(scores), job.chosen(circuit), len(found), seed, scores, patched,
        DataFrame() if scores is None else job.stability(scores),
    )  # fmt: skip
    if keep is not None:
        _write(done, keep)
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


@dataclass(frozen=True)
class _Job:
    """What every step of a discovery works with."""

    encoder: HookedTextEncoder
    found: Batch
    judged: Batch
    method: str
    edges: int
    steps: int
    threshold: float
    source: Source
    metric: Metric
    keep: Keep | None
    shared: Keep | None
    rows: int
    seed: int
    progress: bool

    @cached_property
    def places(self) -> list[Edge]:
        return self.encoder.edges()

    @property
    def name(self) -> str:
        ig = conventions(self.places[:1], self.steps)["method"]
        names = {"exact": "exact", "eap": "EAP", "eap-ig": ig, "acdc": "ACDC", "random": f"random({self.seed})"}
        return names[self.method]

    def meta(self, batch: Batch, method: str) -> dict[str, str]:
        """What a finished result must say of itself to be reused."""
        return describe(self.encoder, batch, method=method, source=self.source, metric=self.metric)

    def effects(
        self, keep: Keep | None, name: str, method: str, batch: Batch, run: Callable[..., Effects], **how: int
    ) -> Effects:
        """Scores of all edges on some pairs, kept in parts."""
        compute = lambda places: run(
            self.encoder, batch, places, source=self.source, metric=self.metric, progress=self.progress, **how
        )
        if keep is None:
            return compute(self.places)
        whole = run is gradient_effects  # one backward pass gives all edges
        return keep.effects(name, self.meta(batch, method), self.places, compute, whole=whole)

    def circuit(self) -> tuple[Circuit, Effects | None]:
        """What the method finds, not pruned yet, and its scores where it has some."""
        if self.method == "random":
            first = _first_edges(self.encoder, self.edges)
            return self._labelled(random_circuit(first, self.seed), self.edges), None
        if self.method == "acdc":
            found = _kept_circuit(self.keep, "acdc", self._acdc_meta(), self._acdc)
            return self._labelled(found, len(found)), None
        scores = self.scores()
        return self._labelled(top_edges(scores, self.edges), self.edges), scores

    def scores(self) -> Effects:
        name = f"scores-{self.method}"
        if self.method == "exact":
            return self.effects(self.keep, name, METHOD, self.found, patch_effects, rows=self.rows)
        steps = self.steps if self.method == "eap-ig" else 1
        method = conventions(self.places, steps)["method"]
        rows = min(self.rows, PASS)
        return self.effects(self.keep, name, method, self.found, gradient_effects, rows=rows, steps=steps)

    def _labelled(self, circuit: Circuit, size: int) -> Circuit:
        circuit = circuit.named(self.name)
        return replace(circuit, meta={**circuit.meta, "asked": str(size)})

    def _acdc(self) -> Circuit:
        return acdc(
            self.encoder, self.found, self.threshold,
            source=self.source, metric=self.metric, rows=self.rows, progress=self.progress,
        )  # fmt: skip

    def _acdc_meta(self) -> dict[str, str]:
        said = self.meta(self.found, "ACDC")
        return {name: value for name, value in said.items() if name not in ("layers", "heads")} | {
            "threshold": f"{self.threshold:g}"
        }

    def stability(self, scores: Effects) -> DataFrame:
        sizes = sorted(size for size in {STABLE, self.edges} if size <= len(self.places))
        compute = lambda: stability(scores, sizes, resamples=RESAMPLES, seed=self.seed)
        if self.keep is None:
            return compute()
        said = {**scores.meta, "sizes": str(sizes), "resamples": str(RESAMPLES), "seed": str(self.seed)}
        return self.keep.frame(f"stability-{self.method}", said, compute)

    def sizes(self, scores: Effects | None) -> Effects:
        """What circuits of MIB's sizes lose: the method's, by either ranking, and random ones."""
        parts = [self._random(self.seed + number) for number in range(1, BASELINES + 1)]
        if self.method == "random":
            parts.insert(0, self._random(self.seed))
        if scores is not None:
            own = [
                circuit.named(self.name)
                for signed in (True, False)
                for circuit in sized_circuits(scores, signed=signed)
            ]
            parts.insert(0, self._judge(self.keep, f"sizes-{self.method}", own))
        return joined(parts)

    def _random(self, seed: int) -> Effects:
        """Circuits drawn at random have no scores to rank by: each counts for either ranking."""
        circuits = random_sizes(self.encoder, seed)
        effects = self._judge(self.shared, f"sizes-random-{seed}", circuits)
        outsides = [place for place in effects.places if isinstance(place, Outside)]
        signed = replace(effects, places=tuple(replace(place, ranking="signed") for place in outsides))
        return joined([signed, effects])

    def chosen(self, circuit: Circuit) -> Effects:
        """What the circuit loses, and random ones of its size."""
        by_chance = [random_circuit(circuit, self.seed + number) for number in range(1, BASELINES + 1)]
        pruned = [circuit.pruned(), *(replace(other, meta={"name": other.name}).pruned() for other in by_chance)]
        return self._judge(self.keep, f"circuit-{self.method}", pruned)

    def _judge(self, keep: Keep | None, name: str, circuits: Sequence[Circuit]) -> Effects:
        which = digest({"keep": torch.stack([circuit.keep for circuit in circuits])})
        run = lambda _: faithfulness(
            self.encoder, self.judged, circuits,
            source=self.source, metric=self.metric, rows=self.rows, progress=self.progress,
        )  # fmt: skip
        compute = lambda places: _saying(run(places), {"circuits": which})
        if keep is None:
            return compute(None)
        meta = self.meta(self.judged, judging.METHOD) | {"circuits": which}
        return keep.effects(name, meta, tuple(map(judging.outside, circuits)), compute, whole=True)


def random_sizes(encoder: HookedTextEncoder, seed: int, shares: Sequence[float] = SHARES) -> list[Circuit]:
    """A random circuit per share of the edges, each part of the next one, pruned: the baseline of `sized_circuits`.

    Example:
        >>> [circuit.meta["share"] for circuit in random_sizes(clip_lens.load(), 0, (0.1, 0.5))]
        ['0.1', '0.5']
    """
    n = len(encoder.edges())
    found = []
    for share in shares:
        like = _first_edges(encoder, int(share * n + 1e-9))
        like = replace(like, meta={**like.meta, "share": f"{share:g}", "ranking": "absolute"})
        found.append(random_circuit(like, seed).pruned())
    return found


def _first_edges(encoder: HookedTextEncoder, n: int) -> Circuit:
    """Any n edges: how many a random circuit is to have."""
    full = Circuit.full(encoder)
    keep = torch.zeros_like(full.keep)
    rows, columns = full.keep.nonzero()[:n].T
    keep[rows, columns] = True
    return replace(full, keep=keep)


def _check(encoder: HookedTextEncoder, found: Batch, judged: Batch, method: str, edges: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; give one of {', '.join(get_args(Method))}")
    n = len(encoder.edges())
    if method != "acdc" and not 1 <= edges <= n:
        raise ValueError(f"edges={edges}: {encoder.full_name} has {n} edges to select from")
    if found.run != judged.run:
        raise ValueError(f"a circuit is judged on the texts it is found on, got run={found.run!r} and {judged.run!r}")
    pairs = [set(zip(b.pairs.caption, b.pairs.foil, b.pairs.image, strict=True)) for b in (found, judged)]
    if both := pairs[0] & pairs[1]:
        raise ValueError(
            f"{len(both)} pairs are in both splits, such as {min(both)[0]!r}: a circuit is judged on other pairs than "
            "it is found on; Batch.split parts them by image"
        )


def _saying(effects: Effects, more: Mapping[str, str]) -> Effects:
    return replace(effects, meta={**effects.meta, **more})


def _kept_circuit(keep: Keep | None, name: str, meta: Mapping[str, str], compute: Callable[[], Circuit]) -> Circuit:
    """A search's circuit, read if its file was made as `meta` says."""
    if keep is None:
        return compute()
    path = keep.folder / f"{name}.json"
    if path.exists():
        found = Circuit.load(path)
        if meta.items() <= dict(found.meta).items():
            keep.say(f"{path} is there already and fits: reused")
            return found
    made = compute()
    keep.folder.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def _write(done: Discovery, keep: Keep) -> None:
    done.circuit.save(keep.folder / "circuit.json")
    with written_whole(keep.folder / "summary.csv") as temporary:
        done.summary.to_csv(temporary, index=False)


def _own(table: DataFrame, name: str) -> tuple[DataFrame, DataFrame]:
    """The rows of the method, and those of the random baselines."""
    own = table["circuit"] == name
    return table[own], table[~own]


def _first(rows: DataFrame, columns: Sequence[str]) -> dict[str, float]:
    return {name: float(rows[name].iloc[0]) if len(rows) else float("nan") for name in columns}
