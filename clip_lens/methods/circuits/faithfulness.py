"""How much of what a model does a circuit does: faithfulness, CPR and CMD, completeness, minimality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.identity import identity_of
from clip_lens.core.metric import Metric, logit
from clip_lens.core.record import Record
from clip_lens.core.setting import Setting
from clip_lens.core.shard import Shard
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.core.spread import Engine, Spread, shared_out
from clip_lens.core.sweep import Part, swept, unpatched
from clip_lens.core.table import FEWEST, Draws, divide, sides_of, units_of
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.circuit import Circuit, Graph
from clip_lens.methods.circuits.removal import Removal, at_once
from clip_lens.methods.circuits.removal import parts as removals
from clip_lens.methods.registry import FAITHFULNESS
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Outside

By = Literal["node", "edge"]
MEASURES = {"signed": "CPR", "absolute": "CMD"}
"""MIB's two areas, by the ranking of the circuits that each is of."""
AREAS = [f"{measure}{end}" for measure in MEASURES.values() for end in ("", "_lower", "_upper")]


def faithfulness(
    encoder: HookedTextEncoder,
    batch: Batch,
    circuits: Circuit | Sequence[Circuit],
    *,
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    rows: int = 256,
    progress: bool = True,
    jobs: int = 1,
    executor: Engine | Spread | Shard | None = None,
) -> Faithfulness:
    """What each circuit loses in each pair, in units of the metric, with its tables: a `Faithfulness`.

    In a circuit's run every edge outside it carries the source's value (method, section 8). Each circuit is run as it
    is given; whether it was pruned, its place says. Circuits usually run the caption: `align(..., run="caption")`.
    Circuits by slot count weights, an edge at a slot each; one of edges stands beside them as it is, or counted like
    them as `circuit.at_slots(slots)`.
    `jobs` and `executor` are those of `patch_effects`.

    Raises:
        ValueError: no circuit, one of a tower of another shape, circuits by different slots, hooks of yours on the
            tower, a source that differs from the run at a token in none of the slots, or what `patch_effects` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> full = clip_lens.Circuit.full(encoder)
        >>> judged = faithfulness(encoder, batch, [full, (full - full).named("nothing")])
        >>> judged.table(resamples=10)[["circuit", "side", "f"]].tail(2).round(6)
              circuit    side    f
        4  every edge  pooled  1.0
        5     nothing  pooled  0.0
    """
    some = (circuits,) if isinstance(circuits, Circuit) else tuple(circuits)
    how: dict[str, Any] = {"source": source, "metric": metric, "rows": rows, "progress": progress}
    return Faithfulness(_lost(encoder, batch, some, jobs=jobs, executor=executor, **how))


@shared_out
def _lost(
    encoder: HookedTextEncoder,
    batch: Batch,
    circuits: tuple[Circuit, ...],
    *,
    source: Source | Function,
    metric: Metric,
    rows: int,
    progress: bool,
    jobs: int = 1,
    executor: Engine | Spread | Shard | None = None,
) -> Effects:
    """What each circuit loses in each pair: a place per circuit, its outside."""
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows, progress=progress, executor=executor)
    if not circuits:
        raise ValueError("no circuits to judge; top_edges and acdc find some")
    for circuit in circuits:
        _fits(circuit, encoder)
    slots = next((circuit.slots for circuit in circuits if circuit.slots), ())
    run = [circuit.at_slots(slots) for circuit in circuits]
    removed = torch.stack([circuit.graph.edges & ~circuit.keep for circuit in run])
    distinct, which = removed.unique(dim=0, return_inverse=True)  # small circuits are often empty once pruned

    def parts(advance: Callable[[int], object]) -> Iterator[Part]:
        for part in removals(setting, slots):
            moved = {"values": part.values(distinct)[which], "total": part.total}
            yield part.index, {**moved, **unpatched(setting, part.chunk, part.readout)}
            advance(len(circuits) * len(part.index))

    record = faithfulness_record(setting, circuits)
    rows = len(circuits) * len(batch)
    return swept(setting, tuple(map(outside, circuits)), parts, record, rows, what="running circuits")


def faithfulness_record(setting: Setting, circuits: Sequence[Circuit]) -> Record:
    """What judging some circuits says of itself: which ones, and which of them were found on the very pairs that judge
    them, those whose figures flatter."""
    here = setting.batch.digest
    names = dict.fromkeys(circuit.name for circuit in circuits if circuit.record and circuit.record.batch == here)
    which = identity_of(*(circuit.digest for circuit in circuits))
    return setting.record(FAITHFULNESS, circuits=which, found_on_these_pairs=", ".join(names) or "none")


def outside(circuit: Circuit) -> Outside:
    """The place under which `faithfulness` says what a circuit loses.

    Example:
        >>> str(outside(Circuit.full(clip_lens.load())))
        'outside every edge, 1108 of 1108 edges'
    """
    chosen, size = circuit.selection, int(circuit.graph.edges.sum())
    return Outside(circuit.name, len(circuit), size, chosen.share, chosen.ranking, chosen.pruned)


def _fits(circuit: Circuit, encoder: HookedTextEncoder) -> None:
    if (circuit.n_layers, circuit.n_heads) != (encoder.n_layers, encoder.n_heads):
        raise ValueError(
            f"{circuit} is of a tower of {circuit.n_layers} layers x {circuit.n_heads} heads, {encoder.full_name} has "
            f"{encoder.n_layers} x {encoder.n_heads}"
        )


@dataclass(frozen=True, repr=False)
class Faithfulness:
    """How much of what the model does some circuits do: a view of an `Effects` that has a place per circuit, its
    outside.

    `effects.values = m(C) - m(full)`, `effects.total = m(empty) - m(full)`, per pair: a circuit that loses nothing has
    0, one that keeps nothing the total, and `f(C) = 1 - values / total`, a ratio of means over pairs (Mueller et al.
    2025, MIB). `Faithfulness(Effects.load(path))` is what was saved by `.effects.save(path)`.

    Raises:
        ValueError: the result has places that are no circuits' outsides.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> faithfulness(encoder, batch, clip_lens.Circuit.full(encoder))
        Faithfulness(1 circuit x 8 pairs; 4 caption, 4 foil; faithfulness of circuits tiny)
    """

    effects: Effects

    def __post_init__(self) -> None:
        if wrong := [place for place in self.effects.places if not isinstance(place, Outside)]:
            raise ValueError(f"this says how faithful circuits are, from the result of faithfulness. Got {wrong[0]}")

    @property
    def places(self) -> list[Outside]:
        """The outside of each circuit."""
        return [place for place in self.effects.places if isinstance(place, Outside)]

    def __repr__(self) -> str:
        n = len(self.effects.places)
        said = repr(self.effects).partition(" places x ")[2].removesuffix(")")
        return f"Faithfulness({n} circuit{'' if n == 1 else 's'} x {said})"

    def table(self, interval: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> DataFrame:
        """f of every circuit: a row per circuit and side, and if there are several sides, over all pairs ("pooled").

        Columns: circuit, ranking, share (asked for, else kept), pruned (whether it is the form without edges on no
        path), edges (kept), of (all edges), side, f, lower, upper (the bootstrap over pairs of `Effects.table`), lost
        (mean of what the circuit loses of d, metric units), n, dropped.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
            >>> judged = faithfulness(encoder, batch, clip_lens.Circuit.full(encoder))
            >>> judged.table(resamples=10)[["side", "f", "lower", "upper", "lost", "n"]].tail(1)
                 side    f  lower  upper  lost  n
            2  pooled  1.0    1.0    1.0   0.0  8
        """
        several = len(sides_of(self.effects.pairs, pooled=False)) > 1
        found = []
        for pooled in (False, True) if several else (False,):
            table = self.effects.table(interval, pooled=pooled, resamples=resamples, seed=seed)
            repeats = len(table) // max(1, len(self.places))
            found.append(_described(self.places * repeats).assign(
                side=table["side"], f=1 - table["fraction"], lower=1 - table["upper"], upper=1 - table["lower"],
                lost=table["effect"], n=table["n"], dropped=table["dropped"],
            ))  # fmt: skip
        return pd.concat(found, ignore_index=True)

    def areas(self, interval: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> DataFrame:
        """MIB's two areas of each method: a row per name of circuits and side, and "pooled" if there are several sides.

        `CPR` = integral of f over the share of edges asked for (larger is better), of circuits ranked by signed score;
        `CMD` = integral of |1 - f| (smaller is better), of circuits ranked by size: trapezoids on a linear axis from
        the smallest share to 1, where f = 1 by definition (method, section 8; Mueller et al. 2025). NaN where that
        ranking is missing; circuits without a ranking, such as learned ones, count for both. Columns: circuit, side,
        CPR, CPR_lower, CPR_upper, CMD, CMD_lower, CMD_upper, points, n.
        Pairs are resampled jointly at all sizes, with the draws of `Effects.table`; below five pairs there is no
        interval: NaN.

        Raises:
            ValueError: circuits without a share, as `sized_circuits` and `learn_circuit` give them, or a share that
                comes twice.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
            >>> scores = clip_lens.patch_effects(encoder, batch, encoder.edges())
            >>> judged = faithfulness(encoder, batch, clip_lens.sized_circuits(scores, (.1, .5, 1)))
            >>> judged.areas(resamples=10)[["circuit", "side", "points", "n"]].tail(1)
                           circuit    side  points  n
            2  activation patching  pooled       3  8
        """
        draws, curves = Draws(interval, resamples, seed), _curves(self.places)
        sides = sides_of(self.effects.pairs, pooled=False)
        lines = []
        for name in dict.fromkeys(name for name, _ in curves):
            for side in [*sides, "pooled"] if len(sides) > 1 else sides:
                line: dict[str, object] = {"circuit": name, "side": side}
                for ranking, measure in MEASURES.items():
                    line |= _areas(self.effects, curves.get((name, ranking), {}), side, measure, draws)
                lines.append(line)
        return DataFrame(lines)[["circuit", "side", *AREAS, "points", "n"]]


def _described(places: Sequence[Outside]) -> DataFrame:
    lines = [(p.circuit, p.ranking, _share(p), p.pruned, p.edges, p.of) for p in places]
    return DataFrame(lines, columns=["circuit", "ranking", "share", "pruned", "edges", "of"])


def _share(place: Outside) -> float:
    return place.edges / place.of if place.share is None else place.share


def _curves(places: Sequence[Outside]) -> dict[tuple[str, str], dict[float, int]]:
    """The rows of each name's circuits by share, for either ranking."""
    curves: dict[tuple[str, str], dict[float, int]] = {}
    for row, place in enumerate(places):
        if place.share is None or place.ranking not in ("", *MEASURES):
            raise ValueError(f"CPR and CMD need circuits of several sizes, as sized_circuits gives them. Got {place}")
        for ranking in [place.ranking] if place.ranking else MEASURES:
            curve = curves.setdefault((place.circuit, ranking), {})
            if place.share in curve:
                raise ValueError(
                    f"the share {place.share:g} of {place.circuit} ({ranking}) comes twice; name them apart"
                )
            curve[place.share] = row
    return curves


def _areas(effects: Effects, curve: dict[float, int], side: str, measure: str, draws: Draws) -> dict[str, object]:
    if not curve:
        return dict.fromkeys((measure, f"{measure}_lower", f"{measure}_upper"), float("nan"))
    shares = sorted(curve)
    f, drawn, n = _f(effects, [curve[share] for share in shares], side, draws)
    if shares[-1] < 1:
        shares.append(1.0)
        f, drawn = (torch.cat([curve_, torch.ones_like(curve_[:1])]) for curve_ in (f, drawn))
    x = torch.tensor(shares, dtype=torch.float64)
    area, areas = (
        torch.trapezoid(curve_ if measure == "CPR" else (1 - curve_).abs(), x, dim=0) for curve_ in (f, drawn)
    )
    tail = (1 - draws.interval) / 2
    lower, upper = areas.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    if n < FEWEST:
        lower = upper = float("nan")
    return {
        measure: float(area), f"{measure}_lower": lower, f"{measure}_upper": upper, "points": len(curve), "n": n,
    }  # fmt: skip


def _f(
    effects: Effects, rows: list[int], side: str, draws: Draws
) -> tuple[Float[Tensor, "circuit 1"], Float[Tensor, "circuit draw"], int]:
    """f of some circuits over one side's pairs, and in each resample of them; NaN where nothing is lost without them
    all."""
    columns = (effects.pairs["side"] == side).to_numpy() | (side == "pooled")
    pairs = effects.pairs[columns]
    units, n_units = units_of(pairs)
    weight = draws.counts(side, units, n_units)
    chosen = torch.from_numpy(columns)
    total = (effects.total * effects.orientation).double()[chosen]
    values = effects.signed().double()[rows][:, chosen]
    known = ~total.isnan()
    values, total, weight = values[:, known], total[known], weight[known]
    whole = torch.ones(len(total), 1, dtype=torch.float64)
    f, drawn = (1 - divide(values @ w, total @ w) for w in (whole, weight))
    if len(set(units[known.numpy()])) < FEWEST:
        drawn = torch.full_like(drawn, torch.nan)
    return f, drawn, pairs["key"][known.numpy()].nunique()


@dataclass(frozen=True)
class _Trial:
    """A circuit ready to lose members: an edge goes with any of the (at most two) members that `goes_with` numbers for
    it, where the number of all members stands for none."""

    removal: Removal
    circuit: Circuit
    members: list[str]
    goes_with: Int[Tensor, "2 receiver sender"]

    @classmethod
    def of(cls, removal: Removal, circuit: Circuit, by: By) -> _Trial:
        if by not in get_args(By):
            raise ValueError(f"by={by!r}; give one of {', '.join(get_args(By))}")
        if by == "edge":
            names = [str(edge) for edge in circuit.edges()]
            goes_with = torch.full((2, *circuit.keep.shape), len(names))
            goes_with[:, circuit.keep] = torch.arange(len(names))
            return cls(removal, circuit, names, goes_with)
        names = [name for name in circuit.nodes()["node"] if name not in ("embed", "out")]
        return cls(removal, circuit, names, _of_nodes(names, circuit.graph))

    def removed(self, chosen: Bool[Tensor, "set member"], whole: bool) -> Bool[Tensor, "set receiver sender"]:
        """The edges removed with some members, from the whole model or from the circuit."""
        goes = torch.cat([chosen, chosen.new_zeros(len(chosen), 1)], 1)
        edges = (goes[:, self.goes_with[0]] | goes[:, self.goes_with[1]]) & self.circuit.graph.edges
        return edges if whole else edges | (self.circuit.graph.edges & ~self.circuit.keep)

    def means(self, chosen: Bool[Tensor, "set member"], *, whole: bool = False) -> Float[Tensor, "set"]:
        """What the circuit, or the whole model, loses without some members; as many sets at a time as memory is for."""
        some = chosen.split(at_once(self.circuit.graph))
        return torch.cat([self.removal.means(self.removed(sets, whole)) for sets in some])

    def gap(self, chosen: Bool[Tensor, "set member"]) -> tuple[Float[Tensor, "set"], Float[Tensor, "set"]]:
        """What the circuit and the model lose without some members."""
        return self.means(chosen), self.means(chosen, whole=True)

    def shares(self, changes: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Changes as shares of what removing every edge moves, NaN where that is nothing."""
        return divide(changes, changes.new_tensor(abs(self.removal.total)))

    def label(self, chosen: Bool[Tensor, "member"]) -> str:
        return ", ".join(self.members[number] for number in chosen.nonzero().flatten().tolist())


def _of_nodes(names: Sequence[str], graph: Graph) -> Int[Tensor, "2 receiver sender"]:
    """For every edge the number of the member that it leaves, and of the one that it enters."""
    numbers = {name: number for number, name in enumerate(names)}
    of = torch.tensor([*(numbers.get(str(site), len(names)) for site in graph.senders), len(names)])
    return torch.stack([of[:-1].expand(graph.edges.shape), of[graph.node_of][:, None].expand(graph.edges.shape)])


def completeness(
    encoder: HookedTextEncoder,
    batch: Batch,
    circuit: Circuit,
    *,
    by: By = "node",
    samples: int = 20,
    greedy: int = 0,
    seed: int = 0,
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    rows: int = 256,
) -> DataFrame:
    """How far circuit C and model M part when both lose the same members K: a row per K (Wang et al. 2023).

    `incompleteness = |F(C \\ K) - F(M \\ K)|`, F the mean over pairs of the signed metric and 0 the best. K is part of
    the circuit's heads and MLPs (`by="node"`: every edge that enters or leaves them goes) or of its edges: first
    none, then `samples` sets in which each member is with probability 1/2, then the sets of a greedy search of `greedy`
    steps, which adds of ten members drawn the one that parts C and M most. Columns: found, size, removed (K's names),
    circuit and model (F(C \\ K) and F(M \\ K), relative to the plain run), incompleteness, share (of what removing
    every edge moves).

    Raises:
        ValueError: a circuit of a tower of another shape, an unknown `by`, or what `faithfulness` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> completeness(encoder, batch, clip_lens.Circuit.full(encoder), samples=3)["incompleteness"].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    _fits(circuit, encoder)
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows)
    trial = _Trial.of(Removal.of(setting, circuit.slots), circuit, by)
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.zeros(1, len(trial.members), dtype=torch.bool)
    drawn = torch.rand(samples, len(trial.members), generator=generator) < 0.5
    steps = list(_greedy(trial, greedy, generator)) if trial.members else []
    chosen = torch.cat([nothing, drawn, *steps])
    found = ["nothing"] + ["sampled"] * samples + ["greedy"] * len(steps)
    circuit_means, model_means = trial.gap(chosen)
    gap = (circuit_means - model_means).abs()
    return DataFrame(
        {
            "found": found,
            "size": chosen.sum(1).numpy(),
            "removed": [trial.label(row) for row in chosen],
            "circuit": -circuit_means.numpy(),
            "model": -model_means.numpy(),
            "incompleteness": gap.numpy(),
            "share": trial.shares(gap).numpy(),
        }
    )


TRIED = 10
"""Members that a greedy step tries."""


def _greedy(trial: _Trial, steps: int, generator: torch.Generator) -> Iterable[Bool[Tensor, "1 member"]]:
    chosen = torch.zeros(1, len(trial.members), dtype=torch.bool)
    for _ in range(min(steps, len(trial.members))):
        left = (~chosen[0]).nonzero().flatten()
        tried = left[torch.randperm(len(left), generator=generator)[:TRIED]]
        sets = chosen.repeat(len(tried), 1)
        sets[torch.arange(len(tried)), tried] = True
        circuit, model = trial.gap(sets)
        best = int((circuit - model).abs().argmax())
        chosen = sets[best : best + 1]
        yield chosen


def minimality(
    encoder: HookedTextEncoder,
    batch: Batch,
    circuit: Circuit,
    *,
    by: By = "edge",
    samples: int = 5,
    seed: int = 0,
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    rows: int = 256,
) -> DataFrame:
    """What each member of a circuit is there for: a row per member, the least needed last (Wang et al. 2023).

    `minimality(v) = max over K of |F(C \\ (K + v)) - F(C \\ K)|`, F the mean over pairs of the signed metric, K nothing
    or one of `samples` sets of the other members, each in with probability 1/2: a backup matters only when
    what it stands in for is gone. Members are the circuit's edges or (`by="node"`) its heads and MLPs. Columns: member,
    minimality (metric units), share (of what removing every edge moves), alone (the signed change with K nothing:
    positive = it supports d), removed (the K of the maximum).

    Raises:
        ValueError: what `completeness` refuses.

    Example:
        >>> from clip_lens import Circuit, Edge, Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder, run="caption")
        >>> circuit = Circuit.of([Edge(Site("mlp", 0), Site("out"))], n_layers=6, n_heads=4)
        >>> minimality(encoder, batch, circuit)["member"].tolist()
        ['mlp 0 -> out']
    """
    _fits(circuit, encoder)
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows)
    trial = _Trial.of(Removal.of(setting, circuit.slots), circuit, by)
    n = len(trial.members)
    generator = torch.Generator().manual_seed(seed)
    others = torch.cat([torch.zeros(1, n, dtype=torch.bool), torch.rand(samples, n, generator=generator) < 0.5])
    without = others[:, None] & ~torch.eye(n, dtype=torch.bool)  # K, member, member
    with_it = without | torch.eye(n, dtype=torch.bool)
    before, after = (trial.means(sets.flatten(0, 1)) for sets in (without, with_it))
    change = (after - before).unflatten(0, (len(others), n))
    largest, at = change.abs().max(0)
    frame = DataFrame(
        {
            "member": trial.members,
            "minimality": largest.numpy(),
            "share": trial.shares(largest).numpy(),
            "alone": change[0].numpy(),
            "removed": [trial.label(without[k, v]) for v, k in enumerate(at.tolist())],
        }
    )
    return frame.sort_values("minimality", ascending=False, kind="stable").reset_index(drop=True)
