"""Ways to find a circuit, each one entry of `FINDERS`: the method that it is, and how it scores edges or searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.keep import REMEDY, Keep
from clip_lens.core.metric import Metric, Readout
from clip_lens.core.record import Method, Record
from clip_lens.core.setting import Setting
from clip_lens.methods.circuits.acdc import acdc, acdc_record
from clip_lens.methods.circuits.circuit import Circuit, random_circuit
from clip_lens.methods.circuits.learned import Plan, learn_circuit, learned_record
from clip_lens.methods.circuits.selection import top_edges
from clip_lens.methods.gradient import conventions, gradient_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import (
    ACDC,
    EAP,
    EAP_IG,
    EAP_IG_CERTAIN,
    EAP_IG_ENDS,
    EAP_IG_LOSS,
    EAP_IG_NODES,
    EXACT,
    LEARNED,
    PATCHING,
    RANDOM,
)
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge
from clip_lens.words import unknown

CERTAIN = 0.95
"""The share of resamples that have to agree on the sign of an edge's score."""
LEARNED_ON = 32
"""Pairs of a step when gates are learned."""
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
    where nothing is worth keeping. `scored_by` is the key of the method whose scores these are, where that is another
    one; `choose` says how `top_edges` takes edges by them. `in_parts`: edges can be scored some at a time. `bound` is
    the option that decides how large the circuit is; the names of its files say it.
    """

    method: Method
    score: Callable[[Setting, Sequence[Edge], Options], Effects] | None = None
    search: Callable[[Setting, Options], Circuit] | None = None
    record: Callable[[Setting, Options], Record] | None = None
    in_parts: bool = False
    scored_by: str = ""
    choose: Mapping[str, Any] = field(default_factory=dict)
    bound: Literal["edges", "threshold"] = "edges"

    def file(self, options: Options) -> str:
        """What the files of a circuit found in this way are called."""
        return f"{self.method.key}-{getattr(options, self.bound)}"

    def scores(self, setting: Setting, options: Options, keep: Keep | None, name: str = "") -> Effects | None:
        """The effects of every edge, read or computed and kept; None where the finder scores none."""
        if self.score is None:
            return None
        score, edges = self.score, setting.encoder.edges()
        compute = lambda some: score(setting, some, options)
        if keep is None or self.record is None:
            return compute(edges)
        name, wanted = name or f"scores-{self.scored_by or self.method.key}", self.record(setting, options)
        return keep.effects(name, wanted, edges, compute, whole=not self.in_parts)

    def circuit(self, setting: Setting, options: Options, scores: Effects | None, keep: Keep | None) -> Circuit:
        """The circuit that the scores select, or that the search finds, not pruned."""
        if scores is not None:
            return top_edges(scores, options.edges, **self.choose).named(self.method.title)
        if self.search is None:
            raise TypeError(f"the finder {self.method.key!r} has neither a score nor a search; give it one")
        there = None if keep is None or self.record is None else kept_circuit(
            keep, circuit_path(keep, self.file(options)), self.record(setting, options)
        )  # fmt: skip
        return self.search(setting, options) if there is None else there


def given(setting: Setting) -> dict[str, Any]:
    """The keyword arguments that a verb has for a setting."""
    return {"source": setting.source, "metric": setting.metric, "rows": setting.rows, "progress": setting.progress}


def shared(setting: Setting) -> dict[str, Any]:
    """The keyword arguments that a sweep has for a setting, with those that share its work out."""
    return {**given(setting), **setting.sharing}


def _exact(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    return patch_effects(setting.encoder, setting.batch, edges, **shared(setting))


def _eap(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    how = {**shared(setting), "rows": min(setting.rows, PASS)}
    return gradient_effects(setting.encoder, setting.batch, edges, **how)


def _eap_ig(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    how = {**shared(setting), "rows": min(setting.rows, PASS)}
    return gradient_effects(setting.encoder, setting.batch, edges, steps=options.steps, **how)


def _eap_ig_loss(setting: Setting, edges: Sequence[Edge], options: Options) -> Effects:
    return _eap_ig(replace(setting, metric=loss_of(setting.metric)), edges, options)


def _eap_ig_loss_record(setting: Setting, options: Options) -> Record:
    return _eap_ig_record(replace(setting, metric=loss_of(setting.metric)), options)


def loss_of(measure: Metric) -> Metric:
    """What a metric loses, squared: 0 for the unpatched run, so that edges are scored by how much a circuit needs them
    whichever way they work. A divergence is its own loss.

    Example:
        >>> loss_of(clip_lens.logit)
        Metric(squared change of logit, not oriented, in logits squared)
    """
    if measure.target is not None:
        raise ValueError(f"{measure.name} is an activation of the tower; its loss is not defined: take 'eap-ig'")
    if measure.divergence:
        return measure

    def squared(u: Float[Tensor, "row d_embed"], readout: Readout) -> Float[Tensor, "row"]:
        return (measure(u, readout) - measure(readout.run, readout)).square()

    name, unit = f"squared change of {measure.name}", f"{measure.unit} squared"
    return Metric(squared, False, unit, name, holds=measure.identity, divergence=True)


def _eap_ig_record(setting: Setting, options: Options) -> Record:
    method = EAP_IG if options.steps > 1 else EAP
    return setting.record(method, **conventions(options.steps))


def _acdc(setting: Setting, options: Options) -> Circuit:
    return acdc(setting.encoder, setting.batch, options.threshold, **given(setting))


def _learned(setting: Setting, options: Options) -> Circuit:
    how = {**given(setting), "rows": min(setting.rows, LEARNED_ON), "seed": options.seed}
    every = len(setting.encoder.edges())
    return learn_circuit(setting.encoder, setting.batch, share=options.edges / every, **how)[0]


def _learned_record(setting: Setting, options: Options) -> Record:
    every = len(setting.encoder.edges())
    of_one = replace(setting, rows=min(setting.rows, LEARNED_ON))
    return learned_record(of_one, Plan(seed=options.seed), [options.edges / every])


def _drawn(setting: Setting, options: Options) -> Circuit:
    return random_circuit(of_size(setting.encoder, options.edges), options.seed)


FINDERS = {
    finder.method.key: finder
    for finder in (
        Finder(EXACT, _exact, record=lambda setting, options: setting.record(PATCHING), in_parts=True),
        Finder(EAP, _eap, record=lambda setting, options: setting.record(EAP, **conventions(1))),
        Finder(EAP_IG, _eap_ig, record=_eap_ig_record),
        Finder(
            EAP_IG_CERTAIN, _eap_ig, record=_eap_ig_record, scored_by=EAP_IG.key, choose={"certain": CERTAIN},
        ),
        Finder(EAP_IG_ENDS, _eap_ig, record=_eap_ig_record, scored_by=EAP_IG.key, choose={"select": "both ends"}),
        Finder(EAP_IG_NODES, _eap_ig, record=_eap_ig_record, scored_by=EAP_IG.key, choose={"select": "nodes"}),
        Finder(EAP_IG_LOSS, _eap_ig_loss, record=_eap_ig_loss_record),
        Finder(
            ACDC, search=_acdc, record=lambda setting, options: acdc_record(setting, options.threshold),
            bound="threshold",
        ),
        Finder(LEARNED, search=_learned, record=_learned_record),
        Finder(RANDOM, search=_drawn),
    )
}  # fmt: skip
"""Every way to find a circuit that `discover` knows, by its method's key. One of your own is one entry more."""


def finder_of(method: str) -> Finder:
    """The finder of a method's key.

    Raises:
        ValueError: there is none.
    """
    if method not in FINDERS:
        raise ValueError(unknown("method", method, FINDERS))
    return FINDERS[method]


def circuit_path(keep: Keep, file: str) -> Path:
    """Where a circuit is kept."""
    return keep.folder / f"circuit-{file}.json"


def kept_circuit(keep: Keep, path: Path, wanted: Record) -> Circuit | None:
    """The circuit of a file whose record stands for the one that is wanted, None where there is no file.

    Raises:
        ValueError: the file is there and is another circuit.
    """
    if not path.exists() or keep.overwrite:
        return None
    there = Circuit.load(path)
    said = Record() if there.record is None else there.record
    if not said.stands_for(wanted):
        raise ValueError(f"{path} is there, and is another circuit: {'; '.join(said.differences(wanted))}. {REMEDY}")
    keep.say(f"{path} is there already and fits: reused")
    return there


def of_size(encoder: HookedTextEncoder, n: int) -> Circuit:
    """A circuit of the encoder that stands for any of n edges: how many a random one is to have."""
    full = Circuit.full(encoder)
    return replace(full, keep=full.keep & (full.keep.flatten().cumsum(0).unflatten(0, full.keep.shape) <= n))
