"""`patch_effects`: what a metric does when places read from a source. Activation patching, causal tracing, ablation."""

from __future__ import annotations

from collections.abc import Sequence

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.rows import chunk_effects
from clip_lens.core.setting import Setting
from clip_lens.core.shard import Shard
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.core.spread import Engine, Spread, shared_out
from clip_lens.core.sweep import sweep
from clip_lens.data.batch import Batch
from clip_lens.methods.registry import PATCHING
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Place


@shared_out
def patch_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    places: Sequence[Place | str],
    *,
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    rows: int = 256,
    progress: bool = True,
    jobs: int = 1,
    executor: Engine | Spread | Shard | None = None,
) -> Effects:
    """What each place moves in each pair, in units of the metric (CLIP logits at the model's scale): an `Effects`.

    `values[place, pair] = metric(patched) - metric(run)`, where the patched run reads, at that place, the source's
    activation instead of its own (method, section 4; Vig et al. 2020, Meng et al. 2022). A tuple of sites is patched
    together. NaN: the pair has no counterpart there, or not that slot; of a tuple what there is gets patched, and NaN
    means that there is nothing of it. Under hooks of yours on the tower every row runs whole, so that they act as in a
    plain run, and `record.hooks` names them. `rows` bounds the sequences in one forward and with them the memory; it
    changes nothing else. `jobs=2` works in two processes, `executor` on whatever it is given (`Spread`), a `Shard`
    computes its part alone; put together they are the same numbers, bit for bit.

    Raises:
        ValueError: no places, a place that this encoder or batch does not have, a batch of another width than the
            encoder's embedding, `rows` below 1, or a metric that gives something else than one number per row.
        TypeError: one place instead of a list of places, a source that is no function, or a metric that does not say
            whether its sign turns with the side (`clip_lens.metric`).

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> effects = patch_effects(encoder, batch, encoder.sites("resid", slots=("negator", "eot")))
        >>> effects.values.shape, bool((effects.values[-1] - effects.total).abs().max() < 1e-4)
        (torch.Size([14, 8]), True)
    """
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows, progress=progress, executor=executor)
    return sweep(setting, places, chunk_effects, setting.record(PATCHING))
