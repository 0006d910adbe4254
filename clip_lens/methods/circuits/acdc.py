"""`acdc`: a circuit by taking edges away, one after the other, where the metric hardly changes (Conmy et al. 2023)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clip_lens.core.metric import Metric, logit
from clip_lens.core.record import Record
from clip_lens.core.setting import Setting
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.circuit import Circuit, Graph, Selection, Slots
from clip_lens.methods.circuits.removal import Removal
from clip_lens.methods.registry import ACDC
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge
from clip_lens.progress import progress_bar

log = logging.getLogger(__name__)

Cell = tuple[int, int]


def acdc(
    encoder: HookedTextEncoder,
    batch: Batch,
    threshold: float,
    *,
    among: Circuit | Iterable[Edge] | None = None,
    slots: Iterable[str | int] = (),
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    rows: int = 256,
    progress: bool = True,
) -> Circuit:
    """The circuit that is left when every edge goes whose removal changes the metric by less than `threshold`.

    Latest receiver first, within it latest sender first; an edge goes when removing it, given what is removed
    already, changes the mean over pairs of the metric (of an oriented one `sigma * metric`, so that both sides count
    alike) by less than the threshold in absolute value; of a divergence from the run, such as `kl(...)`, when it
    increases its mean by less (method, section 8; Conmy et al. 2023). Removed edges carry the source's value. `among`
    starts from a circuit: what is outside of it is removed from the beginning. With `slots` an edge goes at one slot at
    a time, and what is left is a circuit by slot (method, section 10). The circuit's scores are those changes, in units
    of the metric; of an oriented one positive = the edge supports d.

    The next candidates run together, each with all before it removed too, and count up to the first that stays; edges
    into what the output can no longer read are not run where the source has every position. Both give what
    one edge at a time gives.

    Raises:
        ValueError: a threshold that is not positive, a circuit of another tower, or what `patch_effects` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder, run="caption")
        >>> out = encoder.edges(receivers=[clip_lens.Site("out")])
        >>> circuit = acdc(encoder, batch, 0.1, among=out)
        >>> circuit.name, set(circuit.edges()) < set(out)
        ('ACDC', True)
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: a change of the metric below which an edge goes, so more than 0")
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows, progress=progress)
    start = _start(encoder, among, tuple(slots))
    removal = Removal.of(setting, start.slots)
    search = Search(
        removal, start.graph, ~start.keep, threshold, setting.metric.divergence, max(1, rows // removal.n)
    )  # fmt: skip
    bar = progress_bar(len(start), "edge", "ACDC", show=progress)
    with bar:
        for done in search.run([(r, s) for r, s in start.keep.nonzero().flip(0).tolist()]):
            bar.update(done)
    log.info("ACDC ran %d sets of edges on %d pairs", search.sets, removal.n)
    selection = Selection("removal", of=len(start), threshold=threshold)
    record = acdc_record(setting, threshold, start)
    return replace(
        start, keep=start.keep & ~search.removed, scores=search.scores, name="", record=record, selection=selection
    )


def acdc_record(setting: Setting, threshold: float, start: Circuit | None = None) -> Record:
    """What the search with a threshold says of itself, from every edge or from those of a circuit."""
    start = Circuit.full(setting.encoder) if start is None else start
    one_sided, edges = setting.metric.divergence, start.digest
    return setting.record(ACDC, threshold=float(threshold), one_sided=one_sided, started_from=edges)


def _start(encoder: HookedTextEncoder, among: Circuit | Iterable[Edge] | None, slots: Slots) -> Circuit:
    if among is None:
        return Circuit.full(encoder, slots)
    if not isinstance(among, Circuit):
        among = Circuit.of(among, n_layers=encoder.n_layers, n_heads=encoder.n_heads, slots=slots)
    among = among.at_slots(slots or among.slots)
    return Circuit.full(encoder, among.slots) & among


@dataclass(eq=False)
class Search:
    """The state of the search: what is removed, and the mean metric with that."""

    removal: Removal
    graph: Graph
    removed: Bool[Tensor, "receiver sender"]
    threshold: float
    one_sided: bool
    most: int
    sets: int = 0

    def __post_init__(self) -> None:
        self.removed = self.removed & self.graph.edges
        self.scores = torch.full(self.removed.shape, torch.nan, dtype=torch.float64)
        self.skips = self.removal.complete
        self.current = float(self.removal.means(self.removed[None])[0])

    def run(self, candidates: list[Cell]) -> Iterator[int]:
        """Decides on the candidates in their order; yields how many more are decided."""
        at, ahead = 0, self.most
        while at < len(candidates):
            block = self._block(candidates[at:], ahead)
            accepted = self._decide(block)
            run = sum(not free for _, free in block[:accepted])
            full = accepted == len(block)
            ahead = min(self.most, 2 * ahead) if full else max(1, min(self.most, run + 1))
            done = accepted if full else accepted + 1
            yield done
            at += done

    def _block(self, candidates: list[Cell], ahead: int) -> list[tuple[Cell, bool]]:
        """The next candidates, `ahead` of which must run, and which need not: what they enter is read by nothing any
        more, if all before them go."""
        removed, block, receiver, reads = self.removed.clone(), [], -1, True
        for cell in candidates:
            if self.skips and receiver != (receiver := cell[0]):
                reads = bool(self.graph.read(self.graph.edges & ~removed)[receiver])
            if reads and ahead == 0:
                break
            ahead -= reads
            removed[cell] = True
            block.append((cell, not reads))
        return block

    def _decide(self, block: list[tuple[Cell, bool]]) -> int:
        """Removes the candidates up to the first that has to stay; how many went."""
        running = [number for number, (_, free) in enumerate(block) if not free]
        means = dict(zip(running, self._means(self._without([cell for cell, _ in block], running)), strict=True))
        for number, (cell, free) in enumerate(block):
            change = 0.0 if free else means[number] - self.current
            if not (change if self.one_sided else abs(change)) < self.threshold:
                self.scores[cell] = change
                return number
            self.removed[cell] = True
            self.current = means.get(number, self.current)
        return len(block)

    def _without(self, cells: list[Cell], running: list[int]) -> Bool[Tensor, "set receiver sender"]:
        """What is removed when each running candidate goes with all before it: those that don't run need no set."""
        sets, done = self.removed.repeat(len(running), 1, 1), 0
        for number, end in enumerate(running):
            receivers, senders = zip(*cells[done : end + 1], strict=True)
            sets[number:, list(receivers), list(senders)] = True
            done = end + 1
        return sets

    def _means(self, sets: Bool[Tensor, "set receiver sender"]) -> list[float]:
        self.sets += len(sets)
        means: Float[Tensor, "set"] = self.removal.means(sets)
        return means.tolist()
