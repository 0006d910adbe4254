"""`via`: another intervened run as a source, so that interventions compose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.rows import Chunk, needed, prepare, whole_hooks
from clip_lens.core.source import Fetch, Function, Source, as_source, counterpart
from clip_lens.core.source import source as make_source
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder
from clip_lens.model.site import Kind, Place, hook_name, label, place_of


def via(place: Place | str, *, source: Source | Function | str = counterpart, freeze: Sequence[Kind] = ()) -> Source:
    """A source: the run's own activations after another intervention, `place` patched from `source`.

    Sites of the kinds in `freeze` hold what the unpatched run has, wherever `place` is not: `freeze=("head",)` lets the
    change travel through MLPs and residual stream only (Wang et al. 2023). A pair with nothing at `place` is NaN.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> through = via(Site("head", 0, unit=1), freeze=("head",))
        >>> clip_lens.patch_effects(encoder, batch, [Site("q", 2, unit=0)], source=through).record.source.name
        'via(head 0.1 from counterpart, head frozen)'
    """

    given, place = as_source(source), place_of(place)

    def make(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        fetch, addresses = given(encoder, batch), address((place,), encoder, batch)
        frozen = tuple(hook_name(site, encoder.n_layers) for kind in freeze for site in encoder.sites(kind))

        def get(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
            chunk = prepare(encoder, batch, addresses, fetch, pairs, own=frozen)
            row = torch.arange(len(pairs), device=pairs.device)
            return intervened(chunk, torch.zeros_like(row), row, frozen, names)

        return get

    kept = f", {' '.join(freeze)} frozen" if freeze else ""
    # An anonymous source makes this one anonymous too.
    return make_source(make, name=f"via({label(place)} from {given.name}{kept})", holds=(place, given, tuple(freeze)))


def intervened(
    chunk: Chunk, place: Int[Tensor, "row"], pair: Int[Tensor, "row"], frozen: Iterable[str], names: Iterable[str]
) -> Cache:
    """The activations of whole runs, a row each, in which a pair of the chunk is patched at a place; the hooks in
    `frozen` hold what the unpatched run has, which the chunk must have cached. NaN where a pair has nothing there."""
    tokens = chunk.tokens[pair]
    hooks: list[Hook] = [(name, partial(_held, value=chunk.run[name][pair])) for name in frozen]
    hooks += whole_hooks(chunk, place, pair)
    with chunk.encoder.tower.hooks(fwd_hooks=hooks):
        _, found = chunk.encoder.tower.run_with_cache(tokens, names_filter=set(names), return_cache_object=False)
    cache = cast(Cache, found)
    nothing = ~needed(chunk)[0][place, pair]
    return {
        name: value.masked_fill(nothing.reshape(-1, *[1] * (value.ndim - 1)), float("nan"))
        for name, value in cache.items()
    }


def _held(activation: Tensor, hook: object, *, value: Tensor) -> Tensor:
    return value.clone()
