"""`acdc`: a circuit by taking edges away, one after the other, where the metric hardly changes (Conmy et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clip_lens.core.metric import Metric, logit
from clip_lens.core.source import Source, counterpart
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.circuit import Circuit, Graph
from clip_lens.methods.circuits.removal import Removal
from clip_lens.methods.patching import describe
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge
from clip_lens.progress import progress_bar

Cell = tuple[int, int]


def acdc(
    encoder: HookedTextEncoder,
    batch: Batch,
    threshold: float,
    *,
    among: Circuit | Iterable[Edge] | None = None,
    source: Source = counterpart,
    metric: Metric = logit,
    rows: int = 256,
    progress: bool = True,
) -> Circuit:
    """The circuit that is left when every edge goes whose removal changes the metric by less than `threshold`.

    Latest receiver first, within it latest sender first; an edge goes when removing it, given what is removed
    already, changes the mean over pairs of the signed metric (`sigma * metric`, so that both sides count alike) by less
    than the threshold in absolute value; of a metric `kl(...)`, when it increases its mean by less (method, section 8;
    Conmy et al. 2023). Removed edges carry the source's value. `among` starts from a circuit: what is outside of it is
    removed from the beginning. The circuit's scores are those changes, positive = the edge supports d.

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
        >>> circuit.meta["method"], set(circuit.edges()) < set(out)
        ('ACDC', True)
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: a change of the metric below which an edge goes, so more than 0")
    start = _start(encoder, among)
    removal = Removal.of(encoder, batch, source, metric, rows)
    name = getattr(metric, "__name__", "")
    search = Search(
        removal,
        start.graph,
        start.graph.edges & ~start.keep,
        threshold,
        name.startswith("kl"),
        max(1, rows // removal.n),
    )
    bar = progress_bar(len(start), "edge", "ACDC", show=progress)
    with bar:
        for done in search.run([(r, s) for r, s in start.keep.nonzero().flip(0).tolist()]):
            bar.update(done)
    described = describe(encoder, batch, method="ACDC", source=source, metric=metric)
    meta = {key: value for key, value in described.items() if key not in ("layers", "heads")}
    meta |= {"threshold": f"{threshold:g}", "started from": f"{len(start)} edges", "sets run": str(search.sets)}
    return Circuit(start.keep & ~search.removed, start.n_layers, start.n_heads, search.scores, meta)


def _start(encoder: HookedTextEncoder, among: Circuit | Iterable[Edge] | None) -> Circuit:
    full = Circuit.full(encoder)
    if among is None:
        return full
    if not isinstance(among, Circuit):
        among = Circuit.of(among, n_layers=encoder.n_layers, n_heads=encoder.n_heads)
    return full & among


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
        self.removed = self.removed.clone()
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
        removed, block, node, reads = self.removed.clone(), [], -1, True
        for cell in candidates:
            if self.skips and node != (node := int(self.graph.node_of[cell[0]])):
                reads = bool(self.graph.to_out(self.graph.edges & ~removed)[node])
            if reads and ahead == 0:
                break
            ahead -= reads
            removed[cell] = True
            block.append((cell, not reads))
        return block

    def _decide(self, block: list[tuple[Cell, bool]]) -> int:
        """Removes the candidates up to the first that has to stay; how many went."""
        running = [number for number, (_, free) in enumerate(block) if not free]
        sets = self.removed.repeat(len(block), 1, 1)
        for number, (cell, _) in enumerate(block):
            sets[number:, cell[0], cell[1]] = True
        means = dict(zip(running, self._means(sets[running]), strict=True))
        for number, (cell, free) in enumerate(block):
            change = 0.0 if free else means[number] - self.current
            if not (change if self.one_sided else abs(change)) < self.threshold:
                self.scores[cell] = change
                return number
            self.removed[cell] = True
            self.current = means.get(number, self.current)
        return len(block)

    def _means(self, sets: Bool[Tensor, "set receiver sender"]) -> list[float]:
        self.sets += len(sets)
        means: Float[Tensor, "set"] = self.removal.means(sets)
        return means.tolist()
