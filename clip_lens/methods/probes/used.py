"""Whether a direction that can be read is used: its causal test beside random directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.metric import Metric, logit
from clip_lens.core.source import How, steered
from clip_lens.data.batch import Batch
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.probes.split import Split
from clip_lens.model.encoder import HookedTextEncoder

RANDOM_DIRECTIONS = 5
"""Random directions that a direction is compared with."""
NAMES: dict[How, str] = {"add": "added", "remove": "removed"}
Columns: TypeAlias = dict[str, ndarray]


def run_of(split: Split, how: How) -> Batch:
    """The held-out pairs of two classes: what is added goes to the run, what is removed leaves the other text."""
    held = split.batch[split.contrasted]
    return held if how == "add" else held.flip()


def steering_of(split: Split, how: How, directions: Float[Tensor, "layer moved d_model"]) -> dict[str, Any]:
    """What `steer` and `steered` are to do with a direction per layer and pair."""
    origin = None
    if how == "remove":
        run = torch.from_numpy(split.ends[0]).to(split.means.device)
        origin = dict(zip(split.places, split.means[:, run], strict=True))
    return {"directions": dict(zip(split.places, directions, strict=True)), "how": how, "origin": origin}


def patched_shares(encoder: HookedTextEncoder, split: Split, metric: Metric | str = logit) -> Columns:
    """The columns on what the whole stream at the pooled position carries, patched from the other text."""
    shares = patch_effects(encoder, run_of(split, "add"), split.places, metric=metric).fraction().groupby("side")
    names = {"n": "n", "fraction": "patched"}
    return {f"{names[name]}_{side}": rows[name].to_numpy() for side, rows in shares for name in names}


def used_shares(
    encoder: HookedTextEncoder,
    split: Split,
    effects: Effects,
    how: How,
    seed: int,
    interval: float,
    metric: Metric | str = logit,
) -> Columns:
    """The columns of one intervention, by name."""
    table = effects.table(interval, seed=seed).assign(random=random_share(encoder, split, effects, how, seed, metric))
    suffixes = {"fraction": "", "lower": "_lower", "upper": "_upper", "random": "_random"}
    columns: Columns = {}
    for side, rows in table.groupby("side"):
        columns |= {f"{NAMES[how]}_{side}{suffix}": rows[name].to_numpy() for name, suffix in suffixes.items()}
    return columns


def random_share(
    encoder: HookedTextEncoder, split: Split, effects: Effects, how: How, seed: int, metric: Metric | str = logit
) -> Float[ndarray, "place_and_side"]:
    """The largest |share| that one of some random directions moves, for each row of the effects' table."""
    shares = []
    for draw in range(RANDOM_DIRECTIONS):
        source = steered(**steering_of(split, how, _random_like(split, (seed, draw))))
        moved = patch_effects(encoder, run_of(split, how), split.places, source=source, metric=metric)
        shares.append(replace(moved, total=effects.total).fraction()["fraction"].abs())
    return np.max(shares, axis=0)


def _random_like(split: Split, seed: tuple[int, int]) -> Float[Tensor, "layer moved d_model"]:
    """Random directions with the norms of the split's, one for each two classes (turned with them), each drawn from the
    seed and its layer."""
    directions, (run, other) = split.directions, split.ends
    _, which = np.unique(np.sort(split.ends, axis=0), axis=1, return_inverse=True)
    shape = which.max() + 1, directions.shape[-1]
    drawn = np.stack([np.random.default_rng([*seed, layer]).standard_normal(shape) for layer in split.layers])
    unit = torch.nn.functional.normalize(torch.from_numpy(drawn), dim=-1)[:, which.reshape(-1)]
    turned = unit * torch.from_numpy(np.where(run < other, 1.0, -1.0))[:, None]
    return turned.to(directions) * directions.norm(dim=-1, keepdim=True)
