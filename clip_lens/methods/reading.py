"""Reading both texts of every pair at the pooled position, with the norms frozen: what `direct` and `lens` share.

Nothing is patched. What a vector of the joint space reads in the residual stream is one vector per text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.precision import precise
from clip_lens.core.record import Record, SourceRecord
from clip_lens.core.setting import Setting, over_pairs
from clip_lens.core.source import counterpart
from clip_lens.data.batch import Batch
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Place, Site, hook_name
from clip_lens.progress import progress_bar

Reader: TypeAlias = Callable[[Tensor], Tensor]
PAIRS_AT_ONCE = 256
LINES_AT_ONCE = 2**25
"""Numbers that one chunk of pairs may hold at a time: 256 MB in float64."""
FROZEN = "each text's own std of the final LayerNorm and norm of its embedding, frozen"


@dataclass(frozen=True)
class Text:
    """One of the two texts of each pair: its tokens, their slots, which positions it has, and for each token the run's
    position that it stands for (-1 = none)."""

    tokens: Int[Tensor, "pair pos"]
    slot: Int[Tensor, "pair pos"]
    inside: Bool[Tensor, "pair pos"]
    position: Int[Tensor, "pair pos"]
    direction: Float[Tensor, "pair d_embed"]
    slots: tuple[str, ...]


def both_texts(batch: Batch) -> tuple[Text, Text]:
    """The run and the other text."""
    own, other = torch.arange(batch.tokens.shape[1], device=batch.tokens.device), batch.flip()
    return tuple(  # type: ignore[return-value]
        Text(text.tokens, text.slot, text.inside, position, text.direction, text.slots)
        for text, position in ((batch, own.expand_as(batch.tokens)), (other, other.origin))
    )


Read: TypeAlias = Callable[[Text], tuple[Float[Tensor, "place pair"], Float[Tensor, "pair"]]]


def attributed(setting: Setting, places: tuple[Place, ...], read: Read, contrast: bool, record: Record) -> Effects:
    """The result of reading both texts of every pair, as many pairs at a time as fit."""
    setting.without_hooks("what is read is taken apart by the tower's own weights")
    encoder, batch = setting.encoder, setting.batch
    bar = progress_bar(len(batch), "pair", "attributing", show=setting.progress)

    def compute(index: Int[Tensor, "pair"]) -> dict[str, Tensor]:
        (own, run), (its, other) = (read(text) for text in both_texts(batch[index]))
        setting.check_metric(run, index)
        setting.check_metric(other, index)
        bar.update(len(index))
        values = (_difference(its, own) if contrast else own).to(encoder.precision)
        return {"values": values, "metrics": torch.stack([run, other])}

    with torch.inference_mode(), bar:
        found = over_pairs(batch, _at_once(encoder, batch, len(places)), compute)
    values, (baseline, other) = found["values"], found["metrics"]
    pairs = setting.pairs(batch.sigma.cpu() * (other - baseline))
    total = other - baseline if contrast else baseline
    return Effects(values, total.to(values), baseline.to(values), places, pairs, record)


def _at_once(encoder: HookedTextEncoder, batch: Batch, places: int) -> int:
    """How many pairs are read together: the widest activation of one forward, and every neuron's line, must fit."""
    width = max(batch.tokens.shape[1], batch.other.shape[1]) + encoder.n_layers
    held = places + width * encoder.tower.cfg.d_mlp
    return max(1, min(PAIRS_AT_ONCE, LINES_AT_ONCE // held))


def with_values(record: Record, contrast: bool) -> Record:
    """What the values are: of a contrast parts of what lies between the two texts, else of the run's metric, which has
    no side to turn with."""
    if contrast:
        of = "C(other) - C(run), of a total of metric(other) - metric(run)"
        return replace(record.saying(values=of), source=SourceRecord.of(counterpart))
    return replace(
        record.saying(values="C(run), of a total of metric(run)"), metric=replace(record.metric, oriented=False)
    )


def _difference(other: Float[Tensor, "place pair"], run: Float[Tensor, "place pair"]) -> Float[Tensor, "place pair"]:
    """What only one text has counts as 0 in the other; NaN where neither has it."""
    return (other.nan_to_num() - run.nan_to_num()).masked_fill(other.isnan() & run.isnan(), float("nan"))


def observe(
    encoder: HookedTextEncoder,
    tokens: Int[Tensor, "pair pos"],
    names: Iterable[str],
    readers: Mapping[str, Reader] | None = None,
) -> dict[str, Tensor]:
    """What a run has at some hooks at the pooled position, or what `readers` keep of others, in float64.

    `tokens` are cut already. Nothing else is kept, so memory does not grow with the texts' length.

    Example:
        >>> encoder = clip_lens.load()
        >>> seen = observe(encoder, encoder.tokens("There are no circles."), ["blocks.1.hook_mlp_out"])
        >>> seen["blocks.1.hook_mlp_out"].shape
        torch.Size([1, 128])
    """
    rows, at = torch.arange(len(tokens), device=tokens.device), encoder.pool(tokens)
    every = {**dict.fromkeys(names, lambda value: precise(value[rows, at])), **(readers or {})}
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: object) -> None:
        name = hook.name  # type: ignore[attr-defined]
        seen[name] = every[name](value)

    encoder.tower.run_with_hooks(tokens, return_type=None, fwd_hooks=[(name, keep) for name in every])
    return seen


def read_out(
    encoder: HookedTextEncoder, x: Float[Tensor, "*batch d_model"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch d_embed"]]:
    """The final LayerNorm's std of residual streams, and their embeddings before these are normalised.

    Example:
        >>> std, y = read_out(clip_lens.load(), torch.randn(3, 128).double())
        >>> std.shape, y.shape
        (torch.Size([3]), torch.Size([3, 128]))
    """
    norm, tower = encoder.tower.ln_final, encoder.tower
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().mean(-1) + norm.eps).sqrt()
    normed = centred / std.unsqueeze(-1) * precise(norm.w) + precise(norm.b)
    return std, normed @ precise(tower.W_U) + precise(tower.b_U)


def stream_name(encoder: HookedTextEncoder) -> str:
    """The hook of the residual stream that the final LayerNorm reads.

    Example:
        >>> stream_name(clip_lens.load())
        'blocks.5.hook_resid_post'
    """
    return hook_name(Site("resid", encoder.n_layers), encoder.n_layers)


def reading_vector(encoder: HookedTextEncoder, w: Float[Tensor, "pair d_embed"]) -> Float[Tensor, "pair d_model"]:
    """The vector with which a direction reads the residual stream, but for `std * norm`: `centred(gamma * (W_U @ w))`.

    Centring it is what subtracting the mean of whatever it reads comes to.

    Example:
        >>> encoder = clip_lens.load()
        >>> reading_vector(encoder, torch.randn(2, 128)).sum(-1).abs().max() < 1e-4
        tensor(True)
    """
    weighed = precise(encoder.tower.ln_final.w) * (precise(w) @ precise(encoder.tower.W_U).T)
    return weighed - weighed.mean(-1, keepdim=True)


def metric_of(y: Float[Tensor, "*batch d_embed"], w: Float[Tensor, "pair d_embed"]) -> Float[Tensor, "*batch"]:
    return (torch.nn.functional.normalize(y, dim=-1) * w).sum(-1)


def constant_of(encoder: HookedTextEncoder, w: Float[Tensor, "pair d_embed"]) -> Float[Tensor, "pair"]:
    tower = encoder.tower
    return w @ (precise(tower.ln_final.b) @ precise(tower.W_U) + precise(tower.b_U))


def block_of(encoder: HookedTextEncoder, layer: int) -> Any:
    """A tower's block, whose attention and MLP have HookedTransformer's weights.

    Example:
        >>> block_of(clip_lens.load(), 2).attn.W_O.shape
        torch.Size([4, 32, 128])
    """
    return encoder.tower.blocks[layer]
