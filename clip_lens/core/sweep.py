"""The one loop of every sweep: places x pairs, some pairs at a time, scored and put together as an `Effects`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, Readout
from clip_lens.core.record import Record
from clip_lens.core.rows import Chunk
from clip_lens.core.setting import Setting, gathered, logit_difference
from clip_lens.model.site import Place
from clip_lens.progress import progress_bar

log = logging.getLogger(__name__)

Score: TypeAlias = Callable[
    [Chunk, Metric, Readout, int, Callable[[int], object]], Float[Tensor, "place_and_everything pair"]
]
"""(chunk, metric, readout, rows, what to call with the number of values done) -> a value per place and pair of the
chunk, and on the last line the total."""
Part: TypeAlias = tuple[Int[Tensor, "pair"], dict[str, Tensor]]


def sweep(
    setting: Setting,
    places: Sequence[Place | str],
    score: Score,
    record: Record,
    *,
    also: Iterable[str] = (),
    gradients: bool = False,
) -> Effects:
    """What `score` says of each place, some pairs at a time, as an `Effects`; `also` names hooks whose source it needs
    beside those of the places, `gradients` says that what is cached will enter an autograd graph."""
    known = setting.patchable(places)
    addresses = address((*known, setting.everything), setting.encoder, setting.batch)

    def parts(advance: Callable[[int], object]) -> Iterator[Part]:
        for index, chunk, readout in setting.chunks(addresses, also):
            values = score(chunk, setting.metric, readout, setting.rows, advance)
            yield index, {"values": values[:-1], "total": values[-1], **unpatched(setting, chunk, readout)}

    return swept(setting, known, parts, record, (len(known) + 1) * len(setting.batch), gradients=gradients)


def unpatched(setting: Setting, chunk: Chunk, readout: Readout) -> dict[str, Tensor]:
    """The metric of a chunk's unpatched run, and d."""
    baseline = setting.metric(chunk.seen, readout)
    return {"baseline": baseline, "d": logit_difference(chunk.batch.sigma, readout)}


def swept(
    setting: Setting,
    places: tuple[Place, ...],
    parts: Callable[[Callable[[int], object]], Iterator[Part]],
    record: Record,
    rows: int,
    *,
    what: str = "patching",
    gradients: bool = False,
) -> Effects:
    """The `Effects` of parts with values, total, baseline and d, which are told how to advance a bar of `rows`."""
    began = time.perf_counter()
    bar = progress_bar(rows // (setting.shard.of if setting.shard else 1), "row", what, show=setting.progress)
    with torch.no_grad() if gradients else torch.inference_mode(), bar:
        whole = setting.shard is None
        which, found = gathered_all(setting, parts(bar.update)) if whole else gathered_some(places, parts(bar.update))
    log.info("%d places x %d pairs in %.1f s", len(places), len(which), time.perf_counter() - began)
    values, total, baseline = (found[name] for name in ("values", "total", "baseline"))
    record = replace(record, unsourced=int(total.isnan().sum()))
    record = record if setting.shard is None else record.saying(shard=str(setting.shard))
    return Effects(values, total, baseline, places, setting.some_pairs(found["d"], which), record)


def gathered_all(setting: Setting, parts: Iterator[Part]) -> tuple[Tensor, dict[str, Tensor]]:
    """Every pair of a batch, and what was found of them."""
    return torch.arange(len(setting.batch)), gathered(len(setting.batch), parts)


def gathered_some(places: Sequence[Place], parts: Iterator[Part]) -> tuple[Tensor, dict[str, Tensor]]:
    """The pairs of a shard, in the batch's order, and what was found of them: no more than theirs is held."""
    done = [(index.cpu(), {name: value.cpu() for name, value in part.items()}) for index, part in parts]
    if not done:
        return torch.arange(0), _nothing(places)
    which = torch.cat([index for index, _ in done])
    order = which.argsort()
    return which[order], {name: torch.cat([part[name] for _, part in done], -1)[..., order] for name in done[0][1]}


def _nothing(places: Sequence[Place]) -> dict[str, Tensor]:
    """What a shard without pairs has found."""
    return {"values": torch.zeros(len(places), 0), **{name: torch.zeros(0) for name in ("total", "baseline", "d")}}
