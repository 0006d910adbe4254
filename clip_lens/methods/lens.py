"""`logit_lens`: the metric as it would be read from the residual stream before each layer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.precision import precise
from clip_lens.core.record import Record
from clip_lens.core.setting import Setting
from clip_lens.data.batch import Batch
from clip_lens.methods.reading import (
    FROZEN,
    Text,
    attributed,
    constant_of,
    metric_of,
    observe,
    read_out,
    reading_vector,
    with_values,
)
from clip_lens.methods.registry import LENS
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import hook_name

Norms = Literal["frozen", "recomputed"]
NORMS = {
    "frozen": FROZEN,
    "recomputed": "std of the final LayerNorm and norm of the embedding recomputed at each layer",
}


def logit_lens(
    encoder: HookedTextEncoder, batch: Batch, *, norms: Norms = "frozen", contrast: bool = True, progress: bool = True
) -> Effects:
    """The metric as the residual stream before each layer has it already, resid 0..L, in units of the metric.

    The stream at the pooled position is read through the final LayerNorm and the projection (nostalgebraist 2020), the
    constant term included. `norms="frozen"` keeps the run's final std and norm, so that the steps from layer to layer
    are what the layers write, `direct_effects` by layer; "recomputed" reads each layer as if it were the last.
    At L both are the metric. With `contrast` the values are lens(other) - lens(run), with `total` metric(other) -
    metric(run); without it they are lens(run), with `total` metric(run), not oriented.

    Raises:
        ValueError: other norms, or a batch of another width than the encoder's embedding.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> lens = logit_lens(encoder, batch, norms="recomputed")
        >>> lens.values.shape, bool((lens.values[-1] - lens.total).abs().max() < 1e-4)
        (torch.Size([7, 8]), True)
    """
    if norms not in get_args(Norms):
        raise ValueError(f"norms={norms!r}; give one of {', '.join(get_args(Norms))}")
    places = tuple(encoder.sites("resid"))
    setting = Setting.reading(encoder, batch, progress=progress)
    record = lens_record(setting, norms, contrast)
    return attributed(setting, places, lambda text: _lens(encoder, text, norms), contrast, record)


def lens_record(setting: Setting, norms: Norms = "frozen", contrast: bool = True) -> Record:
    """The record of `logit_lens`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:3], store, encoder)
        >>> lens_record(Setting.reading(encoder, batch)).stands_for(logit_lens(encoder, batch).record)
        True
    """
    return with_values(setting.record(LENS, norms=NORMS[norms]), contrast)


def _lens(
    encoder: HookedTextEncoder, text: Text, norms: Norms
) -> tuple[Float[Tensor, "place pair"], Float[Tensor, "pair"]]:
    """The metric from every residual stream of one text, and its metric."""
    names = [hook_name(site, encoder.n_layers) for site in encoder.sites("resid")]
    seen, w = observe(encoder, encoder.cut(text.tokens), names), precise(text.direction)
    stream = torch.stack([seen[name] for name in names])
    std, y = read_out(encoder, stream)
    if norms == "recomputed":
        return metric_of(y, w), metric_of(y[-1], w)
    values = (stream * reading_vector(encoder, w)).sum(-1) / std[-1] + constant_of(encoder, w)
    return values / y[-1].norm(dim=-1), metric_of(y[-1], w)
