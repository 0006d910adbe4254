"""`patch_effects`: what a metric does when places read from a source. Activation patching, causal tracing, ablation."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.effects import Effects, segments
from clip_lens.core.metric import Metric, Readout, logit
from clip_lens.core.rows import Chunk, chunk_effects, pairs_at_once, prepare
from clip_lens.core.source import Fetch, Source, counterpart, noise, resample
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Place, Site
from clip_lens.originals.open_clip import digest
from clip_lens.progress import progress_bar

log = logging.getLogger(__name__)


def patch_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    places: Sequence[Place],
    *,
    source: Source = counterpart,
    metric: Metric = logit,
    rows: int = 256,
    progress: bool = True,
) -> Effects:
    """What each place moves in each pair, in units of the metric (CLIP logits at the model's scale): an `Effects`.

    `values[place, pair] = metric(patched) - metric(run)`, where the patched run reads, at that place, the source's
    activation instead of its own (method, section 4; Vig et al. 2020, Meng et al. 2022). A tuple of sites is patched
    together. NaN: the pair has no counterpart there, or not that slot; of a tuple what there is gets patched, and NaN
    means that there is nothing of it. `rows` bounds the sequences in one forward and with them the memory; it changes
    nothing else.

    Raises:
        ValueError: no places, a place that this encoder or batch does not have, a batch of another width than the
            encoder's embedding, `rows` below 1, or a metric that gives something else than one number per row.
        TypeError: one place instead of a list of places, or a source or metric that is no function.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> effects = patch_effects(encoder, batch, encoder.sites("resid", slots=("negator", "eot")))
        >>> effects.values.shape, bool((effects.values[-1] - effects.total).abs().max() < 1e-4)
        (torch.Size([14, 8]), True)
    """
    return sweep(encoder, batch, places, chunk_effects, source=source, metric=metric, rows=rows, progress=progress)


Score: TypeAlias = Callable[
    [Chunk, Metric, Readout, int, Callable[[int], object]], Float[Tensor, "place_and_everything pair"]
]
"""(chunk, metric, readout, rows, what to call with the number of values done) -> a value per place and pair of the
chunk, and on the last line the total."""


def sweep(
    encoder: HookedTextEncoder,
    batch: Batch,
    places: Sequence[Place],
    score: Score,
    *,
    source: Source,
    metric: Metric,
    rows: int,
    progress: bool,
    also: Iterable[str] = (),
    gradients: bool = False,
) -> Effects:
    """What `score` says of each place, some pairs at a time, as an `Effects`; `also` names hooks whose source it needs
    beside those of the places, `gradients` says that what is cached will enter an autograd graph."""
    began = time.perf_counter()
    places = checked(places, encoder, batch, rows)
    check_functions(source, metric)
    fetch = source(encoder, batch)
    addresses = address((*places, everything(encoder, fetch)), encoder, batch)
    values = torch.zeros(len(places) + 1, len(batch), dtype=encoder.dtype)
    baseline, d = torch.zeros(len(batch), dtype=encoder.dtype), torch.zeros(len(batch), dtype=encoder.dtype)
    bar = progress_bar(values.numel(), "row", "patching", show=progress)
    with torch.no_grad() if gradients else torch.inference_mode(), bar:
        for index in batch.length.argsort(stable=True).split(pairs_at_once(addresses, encoder, batch, rows)):
            chunk = prepare(encoder, batch, addresses, fetch, index, also)
            readout = Readout(chunk.batch.direction, chunk.embedding, encoder(chunk.batch.other))
            check_metric(metric(chunk.embedding, readout), index)
            values[:, index.cpu()] = score(chunk, metric, readout, rows, bar.update).cpu()
            baseline[index.cpu()] = metric(chunk.embedding, readout).cpu()
            d[index.cpu()] = (batch.sigma[index] * (logit(readout.other, readout) - logit(readout.run, readout))).cpu()
    meta = describe(encoder, batch, method=METHOD, source=source, metric=metric)
    if missing := int(values[-1].isnan().sum()):
        meta["pairs without a source"] = str(missing)
    log.info("%d places x %d pairs in %.1f s", len(places), len(batch), time.perf_counter() - began)
    return Effects(values[:-1], values[-1], baseline, places, pairs_frame(batch, d), meta)


def checked(places: Sequence[Place], encoder: HookedTextEncoder, batch: Batch, rows: int) -> tuple[Place, ...]:
    """The places, after what can be refused before anything runs."""
    if isinstance(places, Site | Edge):
        raise TypeError(f"places are a list, got one place, {places}; write [{places!r}]")
    if not (places := tuple(places)):
        raise ValueError("no places to patch; encoder.sites('resid') lists some")
    if rows < 1:
        raise ValueError(f"rows={rows}: at least one sequence must fit into a forward")
    if batch.direction.shape[1] != encoder.d_embed:
        raise ValueError(
            f"the batch's direction has {batch.direction.shape[1]} components, {encoder.name} {encoder.d_embed}"
        )
    return places


def check_functions(source: object, metric: object) -> None:
    """Refuses a name in a function's place, and a maker of sources that was not called."""
    if not callable(source):
        raise TypeError(
            f"source={source!r} is no function; give counterpart, zeros, mean, resample(seed), noise(std) ..."
        )
    if source is resample or source is noise:
        raise TypeError(f"{_name(source)} makes a source: call it, as in resample(0) and noise(1.0)")
    if not callable(metric):
        raise TypeError(f"metric={metric!r} is no function; give clip_lens.logit, clip_lens.cosine or one of your own")


def everything(encoder: HookedTextEncoder, fetch: Fetch) -> Place:
    """The place that patches every edge: of a run its last residual stream, else what every sender sends to the output
    (with every edge patched, nothing else reaches it)."""
    if getattr(fetch, "is_run", False):
        return Site("resid", encoder.n_layers)
    return tuple(encoder.edges(receivers=[Site("out")]))


def check_metric(values: Tensor, index: Tensor) -> None:
    """Refuses a metric that does not give one finite number per row."""
    if values.shape != index.shape:
        raise ValueError(
            f"a metric gives one number per row, {tuple(index.shape)}; this one gave {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        raise ValueError("the metric of the unpatched run is not finite: check the directions and the weights for NaN")


def pairs_frame(batch: Batch, d: Float[Tensor, "pair"]) -> pd.DataFrame:
    """One row per pair: key, caption, foil, image, side, sigma, d, segment, unaligned, and the pairs' own columns."""
    pairs = batch.pairs
    columns = {
        "key": list(pairs.key),
        "caption": list(pairs.caption),
        "foil": list(pairs.foil),
        "image": list(pairs.image),
        "side": list(pairs.side),
        "sigma": batch.sigma.tolist(),
        "d": d.tolist(),
        "segment": segments(d),
        "unaligned": batch.unaligned.tolist(),
    }
    frame = pd.DataFrame(columns)
    extra = pairs.info[[column for column in pairs.info if column not in frame]].reset_index(drop=True)
    return pd.concat([frame, extra], axis=1)


def describe(
    encoder: HookedTextEncoder, batch: Batch, *, method: str, source: Source, metric: Metric
) -> dict[str, str]:
    """What was run, on what: the `meta` of a result."""
    reasons = batch.dropped.reason.value_counts()
    return {
        "model": encoder.full_name,
        "weights": encoder.digest,
        "layers": str(encoder.n_layers),
        "heads": str(encoder.n_heads),
        "data": batch.pairs.name,
        "data digest": batch.pairs.digest,
        "images": batch.images,
        "batch": digest({name: getattr(batch, name) for name in ("tokens", "other", "origin", "slot", "direction")}),
        "method": method,
        "run": f"{RUNS.get(batch.run, batch.run)} is run and patched",
        "source": _name(source),
        "metric": _name(metric),
        "scale": f"{encoder.scale:.6g}",
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "pairs": str(len(batch)),
        "pairs dropped": "; ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none",
        "without a template of slots": str(batch.untemplated),
        "positions without counterpart": str(int(batch.unaligned.sum())),
        "versions": _versions(),
    }


METHOD = "activation patching"
RUNS = {"affirmative": "the text without negation", "negated": "the text with negation"}
RUNS |= {name: f"the {name}" for name in ("caption", "foil")}
PACKAGES = ("clip_lens", "transformer_lens", "open_clip_torch", "torch")


@cache
def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _name(function: object) -> str:
    return getattr(function, "__name__", None) or repr(function)
