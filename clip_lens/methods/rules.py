"""Gradient rules: what the gradient of an attribution goes through, and what it takes for a constant.

A rule is hooks that detach parts of a run, and two switches: whether the softmax is computed anew where a query or a
key changes, and whether one layer after the other is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clip_lens.core.record import Method
from clip_lens.methods.registry import ATP_STAR, EXACT_SOFTMAX, RELP
from clip_lens.model.encoder import Cache, Hook, HookedTextEncoder

RuleName = Literal["plain", "relp", "qk", "atp*"]


def _none(encoder: HookedTextEncoder) -> list[Hook]:
    return []


@dataclass(frozen=True)
class Rule:
    """What a gradient goes through: `hooks` act in its run; `says` stands in the result's record."""

    says: str
    method: Method | None = None
    hooks: Callable[[HookedTextEncoder], list[Hook]] = _none
    exact: bool = False
    """Whether the softmax is computed anew where a query or a key changes."""
    drops: bool = False
    """Whether every layer in turn is left out of the gradient: GradDrop."""

    def reads(self, names: Iterable[str]) -> list[str]:
        """The hooks that it needs beside the places' own: what the softmax of each layer with a q or a k is made of."""
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(("hook_q", "hook_k")))
        return [f"{attn}.hook_{part}" for attn in blocks for part in ("q", "k", "pattern")] if self.exact else []

    def dropping(self, layer: int | None) -> list[Hook]:
        """The hooks that leave a layer's attention and MLP out of the gradient."""
        outputs = () if layer is None else ("attn", "mlp")
        return [(f"blocks.{layer}.hook_{part}_out", lambda value, hook: value.detach()) for part in outputs]

    def joined(self, values: Sequence[Float[Tensor, "place pair"]]) -> Float[Tensor, "place pair"]:
        """The attributions with each layer left out as one, by GradDrop; or the only ones there are."""
        return sum(value.abs() for value in values) / (len(values) - 1) if self.drops else values[0]  # type: ignore[return-value]


def relevance(encoder: HookedTextEncoder) -> list[Hook]:
    """The hooks of RelP: LayerNorm's scale and patterns are constants, an activation function is its slope f(x)/x."""
    hooks: list[Hook] = [("ln_final.hook_scale", _constant)]
    for layer in range(encoder.n_layers):
        block, seen = f"blocks.{layer}", {}  # type: ignore[var-annotated]
        hooks += [(f"{block}.{norm}.hook_scale", _constant) for norm in ("ln1", "ln2")]
        hooks.append((f"{block}.attn.hook_pattern", lambda value, hook: value.detach().requires_grad_()))
        hooks.append((f"{block}.mlp.hook_pre", partial(_keep, into=seen)))
        hooks.append((f"{block}.mlp.hook_post", partial(_sloped, seen=seen)))
    return hooks


def _constant(value: Tensor, hook: object) -> Tensor:
    return value.detach()


def _keep(value: Tensor, hook: object, *, into: dict[str, Tensor]) -> None:
    into["pre"] = value


def _sloped(post: Tensor, hook: object, *, seen: Mapping[str, Tensor]) -> Tensor:
    """The same values, as a constant slope times what went in; at 0 the slope is the derivative."""
    pre = seen["pre"]
    slope = post.detach() / pre.detach()
    if (pre == 0).any():
        derivative = torch.autograd.grad(post.sum(), pre, retain_graph=True)[0]
        slope = torch.where(pre == 0, derivative, slope)
    return post.detach() + slope * (pre - pre.detach())


def through_softmax(
    name: str, change: Float[Tensor, "pair pos head d_head"], value: Cache, gradient: Cache, causal: bool
) -> Float[Tensor, "pair pos head"]:
    """What a change of queries, or of keys (`name` is the hook), moves through the softmax, which is computed anew; the
    metric's gradient is taken at the pattern. Every position of a key is changed by itself.

    For a key j, with D the change of its score and G the gradient at a query's pattern A, the new pattern moves
    `A_j (e^D - 1) (G_j - sum_k A_k G_k) / (1 + A_j (e^D - 1))`.
    """
    attn = name.rpartition(".")[0]
    q, k, pattern = (value[f"{attn}.hook_{part}"] for part in ("q", "k", "pattern"))
    slope, root = gradient[f"{attn}.hook_pattern"], sqrt(q.shape[-1])
    if name.endswith("hook_q"):
        new = torch.einsum("pqhe,pkhe->phqk", q + change, k) / root
        new = new.masked_fill(~_seen(new, causal), float("-inf")).softmax(-1)
        return torch.einsum("phqk,phqk->pqh", new - pattern, slope)
    moved = torch.einsum("pqhe,pkhe->phqk", q, change) / root
    # With e^-|D| nothing overflows: numerator and denominator are multiplied by e^-D where D is positive.
    small = torch.where(moved > 0, (-moved).exp(), 1.0)
    step = pattern * torch.where(moved > 0, -torch.expm1(-moved), torch.expm1(moved.clamp(max=0.0)))
    above = slope - (pattern * slope).sum(-1, keepdim=True)
    return (step * above / (small + step)).nan_to_num(0.0).sum(2).transpose(1, 2)


def _seen(scores: Float[Tensor, "pair head query key"], causal: bool) -> Tensor:
    every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return every.tril() if causal else every


PLAIN = Rule("plain: through everything")
RULES: dict[str, Rule] = {
    "plain": PLAIN,
    "relp": Rule("relp: LayerNorm's scale, patterns and slopes f(x)/x are constants", RELP, relevance),
    "qk": Rule("qk: LayerNorm and softmax of queries and keys computed anew", EXACT_SOFTMAX, exact=True),
    "atp*": Rule(
        "atp*: softmax of queries and keys computed anew; mean over layers of |attribution| with that layer left out",
        ATP_STAR,
        exact=True,
        drops=True,
    ),
}
"""By the name that `gradient_effects` takes."""
