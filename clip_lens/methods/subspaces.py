"""`learn_basis`: the direction, or directions, of an activation in which the two texts of a pair differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_lens.core.address import address
from clip_lens.core.source import CHUNK, STEERABLE, Source
from clip_lens.core.subspace import orthonormal, subspace
from clip_lens.core.target import last_token
from clip_lens.data.batch import Batch
from clip_lens.methods.attention import negation_is_run
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Site, hook_name

How = Literal["means", "probe", "das"]


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis of an activation's subspace, with how it was learned: `how`, `seed`, on how many pairs,
    whether the labels were shuffled, and for DAS the loss of each epoch."""

    site: Site
    vectors: Float[Tensor, "n rank"]
    how: str
    pairs: int
    seed: int = 0
    shuffled: bool = False
    losses: tuple[float, ...] = ()

    @property
    def source(self) -> Source:
        """What swaps this subspace: `subspace(site, vectors)`."""
        return subspace(self.site, self.vectors)

    def random(self, seed: int) -> Source:
        """A control: as far a move, position by position, in a random subspace of the same rank.

        Example:
            >>> Basis(Site("resid", 1), torch.eye(128)[:, :2], "means", 8).random(0).name
            'subspace of rank 2 at resid 1, as long as in another of rank 2'
        """
        drawn = np.random.default_rng(seed).standard_normal(tuple(self.vectors.shape))
        return subspace(self.site, torch.from_numpy(drawn), norm_of=self.vectors)


def learn_basis(
    encoder: HookedTextEncoder,
    batch: Batch,
    site: Site,
    how: How = "means",
    *,
    rank: int = 1,
    seed: int = 0,
    shuffled: bool = False,
    epochs: int = 20,
) -> Basis:
    """The subspace of a residual stream, an attention's or an MLP's output that tells the two texts of a pair apart.

    Read at the last token of the site's slot (None = the pooled position) in the run, at its counterpart in the other
    text. "means": the mean difference of the text with the negation and the one without (of pairs without a side,
    other and run). "probe": the weights of a logistic regression that tells them apart, in units of the activation.
    "das": `rank` directions such that swapping them makes the run's embedding the other text's rather than its own
    (cross-entropy of the two logits; distributed alignment search, Geiger et al. 2024, by TransformerLens' `fit_das`).
    `shuffled` is the control, drawn by `seed`: of means and a probe, which text of a pair is which; of DAS, the
    activations that are to turn a run into its other text come from another pair's run. Learn on some pairs,
    judge on others.

    Raises:
        ValueError: an unknown `how`, a site of another kind or one that is not there, a rank other than 1 that is not
            DAS's, or pairs without a counterpart at the slot.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:60], store, encoder)
        >>> site = Site("resid", 6)
        >>> basis = learn_basis(encoder, batch, site)
        >>> clip_lens.patch_effects(encoder, batch, [Site("resid", 6, slot="eot")], source=basis.source).values.shape
        torch.Size([1, 60])
    """
    if how not in get_args(How):
        raise ValueError(f"how={how!r}; give one of {', '.join(get_args(How))}")
    if site.kind not in STEERABLE:
        raise ValueError(f"{site}: a basis is learned of {', '.join(STEERABLE)}; give subspace one of your own")
    if rank < 1 or (rank != 1 and how != "das"):
        raise ValueError(
            f"rank={rank}: means and a probe have one direction, DAS as many as it is asked for, 1 or more"
        )
    address([site], encoder, batch)  # says what there is
    at = encoder.pool(batch.tokens) if site.slot is None else last_token(batch, site.slot)
    there = batch.origin[torch.arange(len(batch), device=at.device), at]
    absent = (there < 0) | (~batch.where(site.slot).any(1) if site.slot is not None else torch.zeros_like(there).bool())
    if absent.any():
        raise ValueError(f"{site}: {int(absent.sum())} of {len(batch)} pairs have no counterpart there; leave them out")
    random = np.random.default_rng(seed)
    swap = torch.from_numpy(random.random(len(batch)) < 0.5).to(at.device) & shuffled
    losses: tuple[float, ...] = ()
    if how == "das":
        given = len(batch) + torch.arange(len(batch))
        if shuffled:
            given = torch.from_numpy(random.permutation(len(batch)))
        vectors, losses = _das(encoder, batch, site, torch.cat([at, there]), given.to(at.device), rank, seed, epochs)
    else:
        run, other = (_read(encoder, tokens, site, p) for tokens, p in ((batch.tokens, at), (batch.other, there)))
        first = (negation_is_run(batch) ^ swap).unsqueeze(1)
        with_negation, without = torch.where(first, run, other), torch.where(first, other, run)
        direction = (with_negation - without).mean(0) if how == "means" else _probe(without, with_negation)
        vectors = direction.unsqueeze(1)
    return Basis(Site(site.kind, site.layer), orthonormal(vectors), how, len(batch), seed, shuffled, losses)


def _read(
    encoder: HookedTextEncoder, tokens: Int[Tensor, "pair pos"], site: Site, at: Int[Tensor, "pair"]
) -> Float[Tensor, "pair n"]:
    name, parts = hook_name(site, encoder.n_layers), []
    with torch.no_grad():
        for index in torch.arange(len(tokens), device=tokens.device).split(CHUNK):
            cached = encoder.cache(tokens[index], names=name)[name]
            parts.append(cached[torch.arange(len(index), device=tokens.device), at[index]].double())
    return torch.cat(parts)


def _probe(without: Float[Tensor, "pair n"], with_negation: Float[Tensor, "pair n"]) -> Float[Tensor, "n"]:
    """The probe's weights, in units of the activation."""
    from clip_lens.methods.probes.fit import fitted

    x = torch.cat([without, with_negation]).cpu().numpy()
    label = np.repeat([0, 1], len(without))
    fit = fitted(x, label, x, label, np.tile(np.arange(len(without)), 2))
    return torch.from_numpy(fit.weights[1] / fit.unit)


def _das(
    encoder: HookedTextEncoder,
    batch: Batch,
    site: Site,
    at: Int[Tensor, "text"],
    given: Int[Tensor, "pair"],
    rank: int,
    seed: int,
    epochs: int,
) -> tuple[Float[Tensor, "n rank"], tuple[float, ...]]:
    """DAS by TransformerLens; its inputs are the numbers of texts, the runs first and behind them the others. `given`
    says which text each run's activations come from, `at` at which position each text is read."""
    from transformer_lens.tools.analysis.interchange import fit_das

    n = len(batch)
    width = max(batch.tokens.shape[1], batch.other.shape[1])
    texts = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (batch.tokens, batch.other)]
    tokens = encoder.cut(torch.cat(texts))
    with torch.no_grad():
        own = torch.stack([encoder(batch.tokens), encoder(batch.other)], 1) * encoder.scale

    def logits(numbers: Int[Tensor, "text"]) -> Float[Tensor, "text own_and_other"]:
        some = tokens[numbers]
        u = encoder.read(encoder.tower(some), encoder.pool(some))
        return torch.einsum("nd,ncd->nc", u, own[numbers % n])

    numbers = torch.arange(n, device=tokens.device)
    fit = fit_das(
        encoder.tower, hook_name(site, encoder.n_layers), numbers, given, torch.ones_like(numbers), logits,
        rank=rank, base_positions=at[:n], source_positions=at[given], epochs=epochs, seed=seed,
    )  # fmt: skip
    return fit.subspace.basis.detach().double(), tuple(fit.losses)
