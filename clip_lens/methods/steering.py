"""`steer`: what adding a direction to the stream, or taking it away, moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.source import How, steered
from clip_lens.data.batch import Batch
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import STEERING
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site


def steer(
    encoder: HookedTextEncoder,
    batch: Batch,
    directions: Mapping[Site, Float[Tensor, "d_model"] | Float[Tensor, "pair d_model"]],
    *,
    how: How = "add",
    origin: Mapping[Site, Float[Tensor, "d_model"]] | None = None,
    metric: Metric = logit,
    rows: int = 256,
) -> Effects:
    """What adding or removing a direction at each site moves in each pair, in units of the metric: an `Effects`.

    The sites are the places, each steered alone, at its slot's positions. `how="add"` adds the direction to the run's
    stream, `how="remove"` takes its component away, down to that of `origin` (0 if left out; see `steered`). The total
    is the counterpart's, `metric(other) - metric(run)`, so that a fraction is the share of d that the direction moves.

    Raises:
        ValueError: no directions, or what `patch_effects` and `steered` refuse.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> site = Site("resid", 4, slot="eot")
        >>> effects = steer(encoder, batch, {site: torch.randn(128)}, how="remove")
        >>> effects.values.shape, effects.record.method.title
        (torch.Size([1, 8]), 'steering: remove a direction')
    """
    source = steered(directions, how, origin=origin)
    effects = patch_effects(encoder, batch, tuple(directions), source=source, metric=metric, rows=rows)
    total = patch_effects(encoder, batch, [Site("resid", encoder.n_layers)], metric=metric, rows=rows).total
    record = replace(effects.record, method=STEERING[how]).saying(total="metric(other) - metric(run)")
    return replace(effects, total=total, record=record)
