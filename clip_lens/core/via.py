"""`via`: another intervened run as a source, so that interventions compose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.rows import Chunk, needed, place_hooks, prepare
from clip_lens.core.source import Fetch, Source, counterpart, named
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder
from clip_lens.model.site import Kind, Place, hook_name, label


def via(place: Place, *, source: Source = counterpart, freeze: Sequence[Kind] = ()) -> Source:
    """A source: the run's own activations after another intervention, `place` patched from `source`.

    Sites of the kinds in `freeze` hold what the unpatched run has, wherever `place` is not: `freeze=("head",)` lets the
    change travel through MLPs and residual stream only (Wang et al. 2023). A pair with nothing at `place` is NaN.

    Example:
        >>> from clip_lens import Site
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder)
        >>> through = via(Site("head", 0, unit=1), freeze=("head",))
        >>> clip_lens.patch_effects(encoder, batch, [Site("q", 2, unit=0)], source=through).meta["source"]
        'via(head 0.1 from counterpart, head frozen)'
    """

    def make(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        fetch, addresses = source(encoder, batch), address((place,), encoder, batch)
        frozen = tuple(hook_name(site, encoder.n_layers) for kind in freeze for site in encoder.sites(kind))

        def get(pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
            chunk = prepare(encoder, batch, addresses, fetch, pairs)
            return _intervened(chunk, dict.fromkeys(frozen), names)

        return get

    name = getattr(source, "__name__", repr(source))
    kept = f", {' '.join(freeze)} frozen" if freeze else ""
    return named(make, f"via({label(place)} from {name}{kept})")


def _intervened(chunk: Chunk, frozen: Iterable[str], names: Iterable[str]) -> Cache:
    """The activations of a whole run in which every pair is patched at the chunk's only place."""
    encoder, tokens = chunk.encoder, chunk.encoder.cut(chunk.batch.tokens)
    pair = torch.arange(len(tokens), device=tokens.device)
    everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    own = encoder.cache(tokens, names=frozen)
    hooks: list[Hook] = [(name, partial(_held, value=value)) for name, value in own.items()]
    hooks += place_hooks(chunk, torch.zeros_like(pair), pair, 0, lambda name: everywhere)
    cache = encoder.cache(tokens, hooks, names=names)
    nothing = ~needed(chunk)[0][0]
    return {
        name: value.masked_fill(nothing.reshape(-1, *[1] * (value.ndim - 1)), float("nan"))
        for name, value in cache.items()
    }


def _held(activation: Tensor, hook: object, *, value: Tensor) -> Tensor:
    return value.clone()
