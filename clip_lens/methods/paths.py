"""`path_effects`: what travels from senders to receivers, directly or through MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.rows import patchable
from clip_lens.core.source import Source, counterpart
from clip_lens.core.via import via
from clip_lens.data.batch import Batch
from clip_lens.methods.patching import patch_effects
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Place, Site, precedes

Through = Literal["direct", "mlp"]
METHODS = {"direct": "path patching, direct", "mlp": "path patching through MLPs, attention frozen"}
Ends = Site | tuple[Site, ...]


def path_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    senders: Sequence[Ends],
    receivers: Sequence[Ends],
    *,
    through: Through = "direct",
    source: Source = counterpart,
    metric: Metric = logit,
    rows: int = 256,
    progress: bool = True,
) -> Effects:
    """What each sender moves through each receiver, per pair, in units of the metric: a place per path that exists.

    `through="direct"` patches only the edge between them (Goldowsky-Dill et al. 2023). `through="mlp"` patches the
    sender, holds every other head at its unpatched output, lets the MLPs recompute, and patches the receiver with what
    arrives (Wang et al. 2023). A tuple of senders or of receivers is one joint
    set; a site without unit, such as `Site("k", 2)`, is all heads of its layer. Combinations in which no receiver
    comes after a sender are no paths and left out; `effects.index` says what there is.

    Raises:
        ValueError: no path at all, a place that the encoder or the batch does not have, or, through MLPs, the output
            joined with other receivers: what arrives at the output would overwrite what they do to it.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> effects = path_effects(encoder, batch, encoder.sites("head", layers=[0]), [Site("v", 1), Site("out")])
        >>> effects.grid("sender", "receiver", side="caption").shape
        (4, 2)
    """
    if through not in get_args(Through):
        raise ValueError(f"through={through!r}; give one of {', '.join(get_args(Through))}")
    paths = existing_paths(senders, receivers)
    if through == "mlp" and any(len(_ends(r)) > 1 and Site("out") in _ends(r) for r in receivers):
        raise ValueError("out is a receiver of its own through MLPs: it can't be joined with others")
    places = [place for _, _, place in paths]
    if through == "direct":
        effects = patch_effects(encoder, batch, places, source=source, metric=metric, rows=rows, progress=progress)
        return replace(effects, meta={**effects.meta, "method": METHODS[through]})
    parts = {
        sender: patch_effects(
            encoder, batch, [_arrival(r, encoder) for s, r, _ in paths if s == sender],
            source=via(sender, source=source, freeze=("head",)), metric=metric, rows=rows, progress=progress,
        )
        for sender in dict.fromkeys(s for s, _, _ in paths)
    }  # fmt: skip
    lines = {sender: iter(part.values) for sender, part in parts.items()}
    values = torch.stack([next(lines[sender]) for sender, _, _ in paths])
    whole = patch_effects(encoder, batch, [Site("resid", encoder.n_layers)], source=source, metric=metric, rows=rows)
    meta = {**whole.meta, "method": METHODS[through]}
    values = values.masked_fill(~patchable(encoder, batch, places, source, rows), float("nan"))
    return Effects(values, whole.total, whole.baseline, tuple(places), whole.pairs, meta)


def existing_paths(senders: Sequence[Ends], receivers: Sequence[Ends]) -> list[tuple[Ends, Ends, Place]]:
    """Sender, receiver and place of every path there is: an edge, or the edges of a joint set.

    Raises:
        ValueError: there is none.
    """
    paths = [(s, r, edges) for r in receivers for s in senders if (edges := _edges(s, r))]
    if not paths:
        raise ValueError("no path: none of the receivers comes after any of the senders")
    return paths


def _ends(ends: Ends) -> tuple[Site, ...]:
    return ends if isinstance(ends, tuple) else (ends,)


def _edges(senders: Ends, receivers: Ends) -> Place:
    """The place of a path: its edges, one or several, or an empty tuple."""
    pairs = [(s, r) for r in _ends(receivers) for s in _ends(senders)]
    edges = tuple(Edge(sender, receiver) for sender, receiver in pairs if precedes(sender, receiver))
    return edges[0] if len(edges) == 1 else edges


def _arrival(receivers: Ends, encoder: HookedTextEncoder) -> Place:
    """The sites at which a receiver's changed value is patched in: for the output the last residual stream."""
    sites = tuple(Site("resid", encoder.n_layers) if r.kind == "out" else r for r in _ends(receivers))
    return sites[0] if len(sites) == 1 else sites
