"""`path_effects`: what travels from senders to receivers, directly or through MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.core.address import Addresses, address
from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, Readout, logit
from clip_lens.core.rows import Chunk, chunk_effects, needed
from clip_lens.core.setting import Setting
from clip_lens.core.shard import Shard
from clip_lens.core.source import Function, Source, counterpart
from clip_lens.core.spread import Engine, Spread, shared_out
from clip_lens.core.sweep import Part, sweep, swept, unpatched
from clip_lens.core.via import intervened
from clip_lens.data.batch import Batch
from clip_lens.methods.registry import PATHS, PATHS_THROUGH_MLPS
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Edge, Place, Site, hook_name, place_of, precedes

Through = Literal["direct", "mlp"]
METHODS = {"direct": PATHS, "mlp": PATHS_THROUGH_MLPS}
Ends: TypeAlias = Site | tuple[Site, ...]
Path: TypeAlias = tuple[Ends, Ends, Place]


@shared_out
def path_effects(
    encoder: HookedTextEncoder,
    batch: Batch,
    senders: Sequence[Ends | str],
    receivers: Sequence[Ends | str],
    *,
    through: Through = "direct",
    source: Source | Function | str = counterpart,
    metric: Metric | str = logit,
    rows: int = 256,
    progress: bool = True,
    jobs: int = 1,
    executor: Engine | Spread | Shard | None = None,
) -> Effects:
    """What each sender moves through each receiver, per pair, in units of the metric: a place per path that exists.

    `through="direct"` patches only the edge between them (Goldowsky-Dill et al. 2023). `through="mlp"` patches the
    sender, holds every other head at its unpatched output, lets the MLPs recompute, and patches the receiver with what
    arrives (Wang et al. 2023). A tuple of senders or of receivers is one joint set; a
    site without unit, such as `Site("k", 2)`, is all heads of its layer. Where no receiver comes after a sender there
    is no path, and the combination is left out; `effects.index` says what there is. `jobs` and `executor` are
    those of `patch_effects`.

    Raises:
        ValueError: no path at all, a place that the encoder or the batch does not have, or, through MLPs, a source of
            another tower, or the output joined with other receivers: what arrives at the output would overwrite what
            they do to it.

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
    from_, to = ([cast(Ends, place_of(end)) for end in ends] for ends in (senders, receivers))
    paths = existing_paths(from_, to)
    if through == "mlp" and any(len(_ends(r)) > 1 and Site("out") in _ends(r) for r in to):
        raise ValueError("out is a receiver of its own through MLPs: it can't be joined with others")
    setting = Setting.of(encoder, batch, source=source, metric=metric, rows=rows, progress=progress, executor=executor)
    if through == "mlp" and hasattr(setting.fetch, "tower"):
        raise ValueError(
            f"through MLPs a sender is patched as an activation, and what it writes in another tower, "
            f"{setting.source}, is none of this one's; give through='direct', or patch_effects with "
            "via(Site('result', layer, head), source=other_tower(...), freeze=('head',))"
        )
    if through == "direct":
        return sweep(setting, [place for _, _, place in paths], chunk_effects, setting.record(METHODS[through]))
    return _through_mlps(setting, paths)


def _through_mlps(setting: Setting, paths: Sequence[Path]) -> Effects:
    """Every sender of a pair is a row of one intervened run; what arrives is then patched into rows of their own."""
    places = setting.patchable([place for _, _, place in paths])
    senders = [*dict.fromkeys(sender for sender, _, _ in paths)]
    receivers = [*dict.fromkeys(receiver for _, receiver, _ in paths)]
    sites: list[list[Place]] = [
        [*senders],
        [_arrival(receiver, setting.encoder) for receiver in receivers],
        [setting.everything],
    ]
    addresses = address([*places, *(site for some in sites for site in some)], setting.encoder, setting.batch)
    ends = [*accumulate(map(len, (places, *sites)))]
    edges, sending, arriving, whole = (addresses.some(*span) for span in pairwise([0, *ends]))
    frozen = [*dict.fromkeys(hook_name(site, setting.encoder.n_layers) for site in setting.encoder.sites("head"))]
    lines = torch.tensor([(senders.index(s), receivers.index(r)) for s, r, _ in paths]).T

    def parts(advance: Callable[[int], object]) -> Iterator[Part]:
        for index, chunk, readout in setting.chunks(addresses, own=frozen):
            moved = _moved(setting, replace(chunk, addresses=sending), arriving, readout, frozen)
            exists = needed(replace(chunk, addresses=edges))[0]
            total = chunk_effects(
                replace(chunk, addresses=whole), setting.metric, readout, setting.rows, lambda done: None
            )
            advance(exists.numel())
            values = moved[lines[0], lines[1]].masked_fill(~exists, float("nan"))
            yield index, {"values": values, "total": total[0], **unpatched(setting, chunk, readout)}

    return swept(setting, places, parts, setting.record(METHODS["mlp"]), len(places) * len(setting.batch))


def _moved(
    setting: Setting, chunk: Chunk, arriving: Addresses, readout: Readout, frozen: Sequence[str]
) -> Float[Tensor, "sender receiver pair"]:
    """What each receiver moves in each pair when it reads what arrives of each of the senders, the chunk's places."""
    every, pairs = torch.arange(len(chunk.addresses)), torch.arange(len(chunk.tokens), device=chunk.first.device)
    found = []
    for some in every.split(max(1, setting.rows // len(pairs))):
        place, pair = some.to(pairs).repeat_interleave(len(pairs)), pairs.repeat(len(some))
        arrived = intervened(chunk, place, pair, frozen, arriving.hooked)
        rows = chunk.rows(pair)
        rows = replace(rows, addresses=arriving, source={**rows.source, **arrived}, first=torch.zeros_like(pair))
        values = chunk_effects(rows, setting.metric, readout.rows(pair), setting.rows, lambda done: None)
        found.append(values.unflatten(1, (len(some), len(pairs))).movedim(1, 0))
    return torch.cat(found)


def existing_paths(senders: Sequence[Ends], receivers: Sequence[Ends]) -> list[Path]:
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
