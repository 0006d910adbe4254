"""`subspace`: the other text's activations, of which a site takes a projection only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.source import Counterpart, Fetch, Source, source
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import Cache, HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Site, hook_name


def subspace(
    site: Site, basis: Float[Tensor, "n rank"], *, norm_of: Float[Tensor, "n rank_of_that"] | None = None
) -> Source:
    """A source: the other text's activations, but at `site` the run's plus what the two differ by in a subspace.

    `x + P (x' - x)`, P the orthogonal projection onto the span of the basis' columns: of full rank that is the patch of
    the site, of rank 0 nothing (method, section 10; Geiger et al. 2021). The place that is patched says at which
    positions, the site's slot is not read here; what is patched elsewhere is the counterpart's. A head's site, or that
    of its q, k, v, has the basis of its own d_head numbers. The columns need not be orthonormal.

    `norm_of` is for controls: the move in this subspace is made as long, position by position, as the one in the span
    of that basis would be.

    Raises:
        ValueError: columns that depend on each other or are not finite, a site of several heads or of one neuron, a
            pattern; (from the source) a basis of another length than the activation.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch, site = clip_lens.align(clip_lens.read_pairs()[:8], store, encoder), Site("resid", 3, slot="eot")
        >>> whole = clip_lens.patch_effects(encoder, batch, [site]).values
        >>> all_of_it = clip_lens.patch_effects(encoder, batch, [site], source=subspace(site, torch.eye(128))).values
        >>> torch.allclose(whole, all_of_it, atol=1e-3)
        True
    """
    layout = LAYOUTS.get(site.kind)
    if layout is None or layout.query_by_key:
        raise ValueError(f"{site} has no vector at a position; {', '.join(k for k in LAYOUTS if k != 'pattern')} have")
    if (site.unit is None) == (layout.unit_axis is not None and site.kind != "neuron"):
        raise ValueError(f"{site}: name one head, and of neurons none, whose activations are one vector")
    span, reference = orthonormal(basis), None if norm_of is None else orthonormal(norm_of)

    def make(encoder: HookedTextEncoder, batch: Batch) -> Fetch:
        address([site], encoder, batch)  # says what there is
        return Projected(encoder, batch, site, span, reference)

    matched = "" if reference is None else f", as long as in another of rank {reference.shape[1]}"
    name = f"subspace of rank {span.shape[1]} at {Site(site.kind, site.layer, site.unit)}{matched}"
    return source(make, name=name, holds=(site.kind, site.layer, site.unit, span, reference), swaps=True)


def orthonormal(basis: Float[Tensor, "n rank"]) -> Float[Tensor, "n rank"]:
    """An orthonormal basis, in float64, of the span of some columns.

    Raises:
        ValueError: no matrix, columns that are not finite or depend on each other.

    Example:
        >>> orthonormal(torch.tensor([[3.0], [4.0]])).abs().flatten()
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    basis = torch.as_tensor(basis).detach().double().cpu()
    if basis.ndim != 2 or not basis.isfinite().all():
        raise ValueError(f"a basis is a finite matrix, a column per direction. Got shape {tuple(basis.shape)}")
    rank = int(torch.linalg.matrix_rank(basis)) if basis.numel() else 0
    if rank < basis.shape[1]:
        raise ValueError(
            f"the basis has {basis.shape[1]} columns of which {rank} are independent; leave out the others"
        )
    return torch.linalg.qr(basis).Q


@dataclass(frozen=True)
class Projected(Counterpart):
    """The fetch of `subspace`."""

    site: Site
    basis: Float[Tensor, "n rank"]
    reference: Float[Tensor, "n rank_of_that"] | None
    is_other = False

    @property
    def is_run(self) -> bool:  # type: ignore[override]
        """Not where the last stream itself is projected: the total is the other text's all the same."""
        return hook_name(self.site, self.encoder.n_layers) != hook_name(
            Site("resid", self.encoder.n_layers), self.encoder.n_layers
        )

    def __call__(self, pairs: Int[Tensor, "pair"], names: Iterable[str]) -> Cache:
        names = set(names)
        found = dict(super().__call__(pairs, names))
        name = hook_name(self.site, self.encoder.n_layers)
        if name in names:
            own = self.encoder.cache(self.batch.tokens[pairs], names=[name])[name]
            found[name] = self._mixed(own, found[name][:, : own.shape[1]])
        return found

    def _mixed(self, own: Tensor, other: Tensor) -> Tensor:
        """The run's activation with the other's part of the subspace."""
        unit = self.site.unit
        change = (other if unit is None else other[:, :, unit]) - (own if unit is None else own[:, :, unit])
        if change.shape[-1] != len(self.basis):
            raise ValueError(f"{self.site} has {change.shape[-1]} numbers, the basis {len(self.basis)}")
        if unit is None:
            return own + self._move(change)
        result = other.clone()
        result[:, :, unit] = own[:, :, unit] + self._move(change)
        return result

    def _move(self, change: Float[Tensor, "pair pos n"]) -> Float[Tensor, "pair pos n"]:
        move = _within(change, self.basis)
        if self.reference is not None:
            length = _within(change, self.reference).norm(dim=-1, keepdim=True)
            move = move * (length / move.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        return torch.where(change.isnan(), change, move)  # what is not there stays so


def _within(change: Float[Tensor, "pair pos n"], basis: Float[Tensor, "n rank"]) -> Float[Tensor, "pair pos n"]:
    basis = basis.to(change)
    return change @ basis @ basis.T
