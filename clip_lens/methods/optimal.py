"""`optimal`: constants that change the metric as little as constants can, learned in place of means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.metric import Metric, Readout, logit
from clip_lens.core.rows import Chunk
from clip_lens.core.setting import Setting, logit_difference
from clip_lens.core.source import Mean, MeanOver, Source, mean
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Site, hook_name
from clip_lens.progress import progress_bar


@dataclass(frozen=True, eq=False, repr=False)
class Optimal(Source):
    """A source of learned constants. `training` has the loss of every step: place, step, loss; step 0 is the mean."""

    training: DataFrame = field(default_factory=DataFrame)


def optimal(
    encoder: HookedTextEncoder,
    batch: Batch,
    places: Sequence[Site] | None = None,
    *,
    metric: Metric = logit,
    steps: int = 60,
    rate: float = 0.1,
    progress: bool = True,
) -> Optimal:
    """A source: optimal ablation, constants learned on a batch so that each place at them changes the metric least.

    Each place (every head and MLP by default) has one constant per slot, tokens pooled, as `mean` has, and one for
    tokens of no slot. They begin at the means and minimise, this place alone ablated, the mean over pairs of
    `((metric(ablated) - metric(run)) / mean |d|)^2` (Li & Janson 2024; method, section 9); the best step is kept, so
    that on this batch none is worse than the mean. Where nothing was learned the source is the mean over this batch.
    Learn on some pairs and judge on others: `batch.split(by="text")`. `rate` is Adam's, in standard deviations of the
    activation, falling to 0 over the steps. There is no chance in it, and no seed.

    Raises:
        ValueError: no places, a pattern or a place twice, fewer than one step, or what `patch_effects` refuses.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:40], store, encoder)
        >>> source = optimal(encoder, batch, [Site("mlp", 1)], steps=5, progress=False)
        >>> list(source.training.columns), bool(source.training.loss.min() < source.training.loss[0])
        (['place', 'step', 'loss'], True)
    """
    setting = Setting.of(encoder, batch, source=mean, metric=metric)
    setting.without_hooks("constants are learned through parts of runs")
    sites = [*encoder.sites("head"), *encoder.sites("mlp")] if places is None else list(places)
    _check(sites, encoder, steps)
    whole = Mean(encoder, batch)
    bar, lines = progress_bar(len(sites) * steps, "step", "learning", show=progress), []
    with torch.inference_mode(False), torch.no_grad(), bar:
        for site in sites:
            learned, losses = _Place.of(setting, whole, site).learn(steps, rate, bar)
            _units(whole.known[hook_name(site, encoder.n_layers)], site).copy_(learned)
            lines += [(str(site), step, loss) for step, loss in enumerate(losses)]
    names = ", ".join(map(str, sites[:2])) + (f" ... ({len(sites)} places)" if len(sites) > 2 else "")
    return Optimal(
        lambda encoder, patched: MeanOver(whole, patched),
        name=f"optimal constants at {names}, learned on {len(batch)} pairs",
        holds=(batch.tokens, batch.length, batch.slot, batch.slots, dict(whole.known)),
        training=pd.DataFrame(lines, columns=["place", "step", "loss"]),
    )


def _check(sites: Sequence[Site], encoder: HookedTextEncoder, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: learning takes at least one")
    if wrong := [site for site in sites if LAYOUTS[site.kind].query_by_key]:
        raise ValueError(
            f"{wrong[0]}: patterns have no constants, texts differ in length; learn z, the head's, instead"
        )
    taken = [(hook_name(site, encoder.n_layers), unit) for site in sites for unit in _covered(site, encoder)]
    if not sites or len(set(taken)) < len(taken):
        raise ValueError("give places that don't overlap, each once: a unit of an activation has one constant per slot")


def _covered(site: Site, encoder: HookedTextEncoder) -> list[int | None]:
    return list(encoder.units(site.kind)) if site.unit is None else [site.unit]


def _units(value: Tensor, site: Site) -> Tensor:
    """The part of means by slot, or of an activation by position, that a site stands for."""
    axis = LAYOUTS[site.kind].unit_axis
    return (
        value
        if site.unit is None or axis is None
        else value.select(value.ndim - (2 if site.kind != "neuron" else 1), site.unit)
    )


@dataclass(frozen=True)
class _Place:
    """A place, some pairs ready to be ablated there, and where its constants begin."""

    site: Site
    hook: str
    parts: list[tuple[Chunk, Readout, Int[Tensor, "pair pos"], Bool[Tensor, "pair pos"]]]
    metric: Metric
    mean: Float[Tensor, "slot ..."]
    scale: float
    """A standard deviation of the activation."""
    spread: float
    """The mean |d|."""

    @classmethod
    def of(cls, setting: Setting, whole: Mean, site: Site) -> _Place:
        encoder, batch = setting.encoder, setting.batch
        hook = hook_name(site, encoder.n_layers)
        whole(torch.arange(1, device=encoder.device), [hook])  # computes the means
        addresses = address([site], encoder, batch)
        parts, d, values = [], [], []
        for index, chunk, readout in setting.chunks(addresses, own=[hook]):
            width = chunk.tokens.shape[1]
            parts.append((chunk, readout, batch.slot[index][:, :width], batch.where(site.slot)[index][:, :width]))
            d.append(logit_difference(chunk.batch.sigma, readout).abs())
            values.append(_units(chunk.run[hook], site)[parts[-1][3]].flatten())
        scale, spread = float(torch.cat(values).std()), float(torch.cat(d).mean())
        middle = _units(whole.known[hook], site).clone()
        spread = spread if spread > 0 else 1.0  # of texts alone there is no d
        return cls(site, hook, parts, setting.metric, middle, scale or 1.0, spread)

    def learn(self, steps: int, rate: float, bar: Any) -> tuple[Tensor, list[float]]:
        """The best constants, and the loss of every step."""
        moved = torch.zeros_like(self.mean, requires_grad=True)
        adam = torch.optim.Adam([moved], lr=rate)
        losses: list[float] = []
        best = self.mean
        for step in range(steps + 1):
            constants = self.mean + self.scale * moved.detach()
            loss = self._loss(moved)
            if not losses or loss < min(losses):
                best = constants
            losses.append(loss)
            if step < steps:
                adam.param_groups[0]["lr"] = rate * (1 - step / steps)
                adam.step()
                adam.zero_grad()
                bar.update(1)
        return best, losses

    def _loss(self, moved: Tensor) -> float:
        """The loss, its gradient left on `moved`."""
        n, total = sum(len(chunk.tokens) for chunk, *_ in self.parts), 0.0
        for chunk, readout, slot, where in self.parts:
            with torch.enable_grad():
                constants = (self.mean.nan_to_num() + self.scale * moved)[slot]
                change = self._metric(chunk, readout, constants, where) - self.metric(chunk.seen, readout)
                loss = (change / self.spread).square().sum() / n
            loss.backward()
            total += float(loss)
        return total

    def _metric(self, chunk: Chunk, readout: Readout, constants: Tensor, where: Bool[Tensor, "pair pos"]) -> Tensor:
        """The metric of runs whose activation is constant at some positions."""

        def patch(value: Tensor, hook: object) -> Tensor:
            result = value.clone()
            part, mask = _units(result, self.site), where.reshape(*where.shape, *[1] * (constants.ndim - 2))
            part.copy_(torch.where(mask, constants.to(value.dtype), part.clone()))
            return result

        seen: dict[str, Tensor] = {}
        hooks: list[Any] = [(self.hook, patch)]
        for name in chunk.read.hooks:
            hooks.append((name, lambda value, hook, name=name: seen.update({name: value})))
        encoder, layer = chunk.encoder, min(self.site.layer, chunk.encoder.n_layers - 1)
        y = encoder.tower.run_with_hooks(chunk.resid(layer), fwd_hooks=hooks, start_at_layer=layer)
        return self.metric(chunk.target_in(seen) if seen else encoder.read(y, chunk.pooled), readout)
