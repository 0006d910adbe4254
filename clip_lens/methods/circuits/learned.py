"""`learn_circuit`: a circuit whose edges are learned together, as gates on their weights, with senders that are live.

A gate g of an edge lets `g * run + (1 - g) * source` pass. Gates are hard-concrete (Louizos et al. 2018): drawn anew at
each step for each pair, mostly exactly 0 or 1, with a gradient. How many are expected to be open isn't a term of the
loss but held: after each step all logits are moved by the one number that makes it so, which is a Lagrangian whose
multiplier is solved for. That share falls from all edges to the first size, and on to the next (method, section 10;
edge pruning, Bhaskar et al. 2024; subnetwork probing, Cao et al. 2021).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Shaped
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.metric import Metric, logit
from clip_lens.core.record import Record
from clip_lens.core.setting import Setting
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.data.batch import Batch
from clip_lens.methods.circuits.circuit import Circuit, Graph, Selection, Slots
from clip_lens.methods.circuits.selection import number_of
from clip_lens.methods.circuits.weights import Weighted, weighted
from clip_lens.methods.registry import LEARNED
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.progress import progress_bar

log = logging.getLogger(__name__)

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
"""The stretch and the temperature of Louizos et al."""
OFFSET = TEMPERATURE * math.log(-LOW / HIGH)
"""A gate is open with the probability `sigmoid(logit - OFFSET)`."""
OPEN = 3.0
"""The logit at which gates begin: open, and free to move."""
FALLING = 2 / 3
"""The part of a size's steps in which the share falls; in the rest it stays."""
MEAN = 3.0
"""How much the square of a side's mean counts beside the mean of the squares: f is a ratio of means."""
TRIED = (16, 4, 2, 1)
"""How many edges an exchange tries to open at once, the most first."""
ALL = 0.999
"""The largest share that is held: logits of gates that are all surely open would be infinite."""
COURSE = ("step", "share", "loss", "held_out", "edges")
CHECK, PATIENCE = 10, 3
"""Steps between two looks at the pairs held out, and how many looks without a better one end a size."""


def learn_circuit(
    encoder: HookedTextEncoder,
    batch: Batch,
    *,
    share: float | Sequence[float] = 0.2,
    slots: Iterable[str | int] = (),
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    steps: int = 90,
    rate: float = 0.3,
    held_out: float = 0.2,
    exchanges: int = 0,
    seed: int = 0,
    rows: int = 32,
    progress: bool = True,
) -> list[Circuit]:
    """A circuit for each share of the edges, learned on all of them together: gates as scores, 1 = open.

    What is learned is a gate per edge, with `slots` per edge and slot (method, section 10). The loss is the mean over
    pairs of `((m(gates) - m(run)) / mean |m(source) - m(run)|)^2` and three times the square of the mean, which is what
    f sees; each side is counted alike, so that one is not bought with the other. Of a divergence from the run, such as
    `kl(...)`, it is the mean alone. Sizes are learned from the largest to the smallest in one course, each from where
    the last one ended, in `steps` steps of Adam on `rows` pairs each. Of a size of n edges the circuit has the gates
    above one half, at most the n largest.

    The part `held_out` of the pairs, kept apart by text, isn't trained on: of each size the circuit is the one that
    loses least there, and a size ends when nothing better comes. With 0 every pair is trained on, and the last gates
    count. `training` of each circuit is the course up to it: step, share (held), loss, held_out (the same loss of the
    circuit, where looked at), edges (of that circuit). With `exchanges` each circuit is then mended without noise, at
    most so often: edges are opened, and others closed for them, where the gradient says that it helps most, as long as
    the loss of all pairs falls. Weak edges that a course misses come back so, as gates of one half. An interruption
    (Ctrl-C) gives the sizes that are done. A random order of pairs and gates follows from `seed`.

    Raises:
        ValueError: a share outside of (0, 1], steps or a rate that are not positive, `held_out` outside of [0, 1) or
            with pairs that can't be kept apart by text, a source that moves nothing, a metric without gradient, an
            encoder that was loaded in inference mode, or what `faithfulness` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:16], store, encoder, run="caption")
        >>> circuits = learn_circuit(encoder, batch, share=[0.5, 0.2], steps=3)
        >>> [circuit.selection.asked for circuit in circuits], circuits[0].name
        ([554, 221], 'learned gates')
    """
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows, progress=progress)
    plan = Plan(tuple(slots), steps, float(rate), float(held_out), exchanges, seed)
    shares = [float(one) for one in ([share] if isinstance(share, int | float) else share)]
    plan.check(shares)
    record, done = learned_record(setting, plan, shares), dict[float, Circuit]()
    bar = progress_bar(steps * len(set(shares)), "step", "learning gates", show=progress)
    with torch.inference_mode(False), torch.enable_grad(), bar:
        course = begun(setting, plan)
        try:
            for one in sorted(set(shares), reverse=True):
                for steps_done in course.size(one):
                    bar.update(steps_done)
                course.mend(one)
                done[one] = course.circuit(one, encoder, record)
        except KeyboardInterrupt:
            if not done:
                raise
            log.warning("interrupted: of the shares %s, %s are learned", shares, list(done))
    return [done[one] for one in shares if one in done]


def begun(setting: Setting, plan: Plan) -> Course:
    """A course at its beginning.

    Raises:
        ValueError: what `learn_circuit` refuses before the first step.
    """
    if setting.encoder.tower.W_U.is_inference():
        raise ValueError(
            f"{setting.encoder.name} was loaded in torch.inference_mode, which keeps no gradients; load it outside"
        )
    if setting.metric.target is not None:
        raise ValueError(
            f"{setting.metric.name} is an activation of the tower; gates are learned on what the text says: give a "
            "metric of the embedding, such as logit or cosine"
        )
    fit, look = plan.parted(setting.batch)
    parts = weighted(replace(setting, batch=fit), plan.slots)
    held = [] if look is None else weighted(replace(setting, batch=look), plan.slots)
    return Course(plan, Objective.of(setting.metric, parts), parts, held)


@dataclass(frozen=True)
class Plan:
    """How gates are learned."""

    slots: Slots = ()
    steps: int = 90
    rate: float = 0.3
    held_out: float = 0.2
    exchanges: int = 0
    seed: int = 0

    def check(self, shares: Sequence[float]) -> None:
        """Refuses what can't be learned."""
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"share={shares}: shares of the edges, each more than 0 and at most 1")
        if self.steps < 1 or not self.rate > 0:
            raise ValueError(f"steps={self.steps} and rate={self.rate}: both must be positive")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a part of the pairs, at least 0 and less than 1")

    def parted(self, batch: Batch) -> tuple[Batch, Batch | None]:
        """The pairs to learn on, and those to look at."""
        if self.held_out == 0:
            return batch, None
        try:
            return batch.split(1 - self.held_out, self.seed, "text")
        except ValueError as error:
            raise ValueError(f"held_out={self.held_out}: {error}. With held_out=0 every pair is learned on") from error


def learned_record(setting: Setting, plan: Plan, shares: Sequence[float]) -> Record:
    """What learning says of itself, whichever of the sizes of a course."""
    said: dict[str, str | int | float] = {
        "sizes": ", ".join(f"{share:g}" for share in sorted(set(shares), reverse=True)), "steps": plan.steps,
        "rate": plan.rate, "not_trained_on": plan.held_out, "exchanges": plan.exchanges, "seed": plan.seed,
        "rows": setting.rows, "slots": ", ".join(map(str, plan.slots)) or "none",
        "loss": "divergence" if setting.metric.divergence else "squared difference, sides alike",
    }  # fmt: skip
    return setting.record(LEARNED, **said)


@dataclass(eq=False)
class Gates:
    """Hard-concrete gates on a graph's edges, as one logit each."""

    graph: Graph
    logits: Float[Tensor, "edge"]

    @classmethod
    def of(cls, graph: Graph, like: Tensor) -> Gates:
        """Gates that are open, of the precision and on the device of `like`."""
        logits = torch.full((int(graph.edges.sum()),), OPEN, dtype=like.dtype, device=like.device)
        return cls(graph, logits.requires_grad_())

    @property
    def open(self) -> Float[Tensor, "edge"]:
        """The probability that each is open at all."""
        return (self.logits - OFFSET).sigmoid()

    @property
    def expected(self) -> Float[Tensor, "edge"]:
        """Each as it is without noise, from 0 to 1."""
        return (self.logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def drawn(self, n: int, generator: torch.Generator) -> Float[Tensor, "n edge"]:
        """n draws of every gate. Their gradient leaves the expected share as it is."""
        noise = torch.rand(n, len(self.logits), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        noise = noise.logit().to(self.logits)
        slope = (self.open * (1 - self.open)).detach()
        along = (slope * self.logits).sum() / slope.sum()
        logits = self.logits - (along - along.detach())
        return (((noise + logits) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    @torch.no_grad()
    def hold(self, share: float) -> None:
        """Moves all logits by the one number at which the expected share that is open is this one."""
        low, high = -100.0, 100.0
        logits = self.logits.double() - OFFSET
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if (logits + middle).sigmoid().mean() > share else (middle, high)
        self.logits += (low + high) / 2

    def kept(self, n: int) -> Bool[Tensor, "edge"]:
        """The gates above one half, at most the n largest; of equals those that come first in the tower."""
        best = self.logits.detach().sort(descending=True, stable=True).indices[:n]
        keep = torch.zeros_like(self.logits, dtype=torch.bool)
        keep[best] = True
        return keep & (self.expected > 0.5)

    def weights(self, gates: Float[Tensor, "n edge"]) -> Float[Tensor, "n receiver sender"]:
        """How much of the source each edge carries."""
        edges = self.graph.edges.to(gates.device).expand(len(gates), -1, -1)
        return torch.zeros(edges.shape, dtype=gates.dtype, device=gates.device).masked_scatter(edges, 1 - gates)

    def matrix(self, values: Shaped[Tensor, "edge"], other: float = 0.0) -> Shaped[Tensor, "receiver sender"]:
        """Values of edges as a matrix on the CPU, another number where there is no edge."""
        values = values.cpu()
        return torch.full(self.graph.edges.shape, other).to(values.dtype).masked_scatter(self.graph.edges, values)


@dataclass(frozen=True)
class Objective:
    """The loss of pairs, from what is moved in units of what the source moves on average; sides are counted alike."""

    metric: Metric
    scale: float

    @classmethod
    def of(cls, metric: Metric, parts: Sequence[Weighted]) -> Objective:
        total = torch.cat([part.total.cpu() for part in parts]).double()
        scale = float(total.abs().nanmean())
        if not scale > 0:
            raise ValueError("the source moves the metric in none of the pairs, so that no edge is better than another")
        return cls(metric, scale)

    def __call__(self, parts: Sequence[Weighted], weights: Float[Tensor, "#pair receiver sender"]) -> Float[Tensor, ""]:
        """The loss of some pairs with these weights; those for which the source has nothing do not count."""
        moved = torch.cat([part.moved(weights) for part in parts]) / self.scale
        known = ~torch.cat([part.total for part in parts]).isnan()
        sides = [side for part in parts for side in part.sides]
        each = []
        for side in dict.fromkeys(sides):
            own = moved[known & torch.tensor([other == side for other in sides], device=moved.device)]
            if len(own):
                each.append(own.mean() if self.metric.divergence else own.square().mean() + MEAN * own.mean() ** 2)
        return torch.stack(each).mean() if each else moved.sum() * 0


@dataclass(eq=False)
class Course:
    """The training of one set of gates through all sizes, from the largest on."""

    plan: Plan
    objective: Objective
    parts: Sequence[Weighted]
    held: Sequence[Weighted]
    share: float = 1.0
    lines: list[tuple[float, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gates = Gates.of(self.parts[0].graph, self.parts[0].total)
        self.optimiser = torch.optim.Adam([self.gates.logits], lr=self.plan.rate)
        self.generator = torch.Generator().manual_seed(self.plan.seed)

    def size(self, share: float) -> Iterator[int]:
        """Learns a size from where the last one ended; yields how many of its steps are done, or saved."""
        size = number_of(share, len(self.gates.logits))
        began, least = self.share, max(size, 0.5) / len(self.gates.logits)
        self.best, best_loss, worse = self._now(size), math.inf, 0
        for step in range(1, self.plan.steps + 1):
            fallen = min(1.0, step / (FALLING * self.plan.steps))
            self.share = min(ALL, began ** (1 - fallen) * least**fallen)
            loss, looked, edges = self.step(), math.nan, math.nan
            if fallen == 1 and (step % CHECK == 0 or step == self.plan.steps):
                now = self._now(size)
                looked, edges = self._look(now[0]), int(now[0].sum())
                better = not self.held or looked < best_loss
                self.best, best_loss, worse = (now, looked, 0) if better else (self.best, best_loss, worse + 1)
            self.lines.append((len(self.lines) + 1, self.share, loss, looked, edges))
            if worse == PATIENCE:
                yield self.plan.steps - step + 1
                return
            yield 1

    def step(self) -> float:
        """One step of the gates on some pairs."""
        self.gates.hold(self.share)
        part = self.parts[int(torch.randint(len(self.parts), (1,), generator=self.generator))]
        gates = self.gates.drawn(len(part), self.generator)
        loss = self.objective([part], self.gates.weights(gates))
        if not loss.requires_grad:
            raise ValueError("the metric has no gradient with respect to the embedding: compute it from `u` in torch")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def _now(self, size: int) -> tuple[Bool[Tensor, "edge"], Float[Tensor, "edge"]]:
        """The circuit of a size as the gates have it, and the gates."""
        self.gates.hold(self.share)
        return self.gates.kept(size), self.gates.expected.detach()

    def _look(self, kept: Bool[Tensor, "edge"]) -> float:
        """What a circuit loses of the pairs held out; NaN without any."""
        if not self.held:
            return math.nan
        with torch.no_grad():
            return float(self.objective(self.held, self.gates.weights(kept[None].to(self.gates.logits))))

    def mend(self, share: float) -> None:
        """Exchanges edges of the size that was learned last while the loss of all pairs falls."""
        (kept, gates), size = self.best, number_of(share, len(self.gates.logits))
        for _ in range(self.plan.exchanges):
            loss, slope = self._slope(kept)
            better = (other for count in TRIED if (other := exchanged(kept, slope, size, count)) is not None)
            found = next((other for other in better if self._slope(other, slopes=False)[0] < loss), None)
            if found is None:
                break
            kept = found
        self.best = kept, torch.where(kept, gates.clamp(min=0.5), gates.clamp(max=0.5))

    def _slope(self, kept: Bool[Tensor, "edge"], *, slopes: bool = True) -> tuple[float, Float[Tensor, "edge"]]:
        """The loss of a circuit over all pairs, a part at a time, and how opening each gate would change it."""
        every = [*self.parts, *self.held]
        gates = kept[None].to(self.gates.logits).requires_grad_(slopes)
        slope, total, pairs = torch.zeros_like(gates), 0.0, sum(map(len, every))
        for part in every:
            with torch.set_grad_enabled(slopes):
                loss = self.objective([part], self.gates.weights(gates)) * len(part) / pairs
            slope = slope + torch.autograd.grad(loss, gates)[0] if slopes else slope
            total += float(loss.detach())
        return total, slope[0]

    def circuit(self, share: float, encoder: HookedTextEncoder, record: Record) -> Circuit:
        """The circuit of the size that was learned last."""
        graph, (kept, gates) = self.gates.graph, self.best
        size = number_of(share, len(kept))
        return Circuit(
            self.gates.matrix(kept), encoder.n_layers, encoder.n_heads, self.gates.matrix(gates, math.nan), "", record,
            Selection("learned", share=share, asked=size, of=len(kept)), graph.slots,
            DataFrame(self.lines, columns=list(COURSE)),
        )  # fmt: skip


def exchanged(
    kept: Bool[Tensor, "edge"], slope: Float[Tensor, "edge"], size: int, count: int
) -> Bool[Tensor, "edge"] | None:
    """A circuit with some closed edges opened, those whose opening lowers the loss most, and as many open ones closed
    as the size asks for, those that are needed least; None where there are not so many that would help."""
    opening = slope.masked_fill(kept, torch.inf).sort(stable=True)
    if count > size or not opening.values[count - 1] < 0:
        return None
    other, over = kept.clone(), max(0, int(kept.sum()) + count - size)
    other[slope.masked_fill(~kept, -torch.inf).sort(descending=True, stable=True).indices[:over]] = False
    other[opening.indices[:count]] = True
    return other
