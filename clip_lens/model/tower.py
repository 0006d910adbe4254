"""A CLIP text tower with HookedTransformer's hook names, weights and cache, on TransformerLens' `HookedRootModule`.

| hook | shape |
|---|---|
| hook_embed, hook_pos_embed | pair pos d_model |
| blocks.{l}.hook_resid_pre, hook_resid_mid, hook_resid_post | pair pos d_model |
| blocks.{l}.hook_attn_out, hook_mlp_in, hook_mlp_out | pair pos d_model |
| blocks.{l}.hook_q_input, hook_k_input, hook_v_input, and behind each attn.hook_q_input ... | pair pos head d_model |
| blocks.{l}.attn.hook_q, hook_k, hook_v, hook_z | pair pos head d_head |
| blocks.{l}.attn.hook_attn_scores, hook_pattern | pair head query key |
| blocks.{l}.attn.hook_result | pair pos head d_model |
| blocks.{l}.mlp.hook_pre, hook_post | pair pos d_mlp |
| blocks.{l}.ln1, blocks.{l}.ln2, ln_final: hook_scale | pair pos 1 |
| blocks.{l}.ln1, blocks.{l}.ln2, ln_final: hook_normalized (before weight and bias) | pair pos d_model |
| hook_norm (what ln_final gives), hook_projection (the output) | pair pos d_model, pair pos d_embed |

Split inputs, `hook_mlp_in` and `hook_result` need no flag: they are computed when something is hooked there. The flags,
`set_use_attn_result` and the like, say what a cache of everything holds.
`hook_norm` and `hook_projection` are not HookedTransformer's, so a cache has them when they are asked for by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from clip_lens.model.tokens import TextTokens
from clip_lens.model.turn import Turn, in_turn
from clip_lens.model.weights import TowerWeights
from clip_lens.words import nearest

ON_DEMAND = {
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_result": "use_attn_result",
    "hook_norm": None,
    "hook_projection": None,
}
"""Hooks that cost, that would change which path is computed, or that HookedTransformer has not, and the flag with which
HookedTransformer has them: cached only when they are asked for, by name or by flag."""


PYTORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what was registered on it: PyTorch has no public way to ask."""


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _pick(x: Float[Tensor, "pair pos d_model"], only: Int[Tensor, "pair 1"]) -> Float[Tensor, "pair 1 d_model"]:
    return x.gather(1, only.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _filled(
    layer: int, at: Int[Tensor, "#pair pos"], rest: Callable[[str], Tensor] | None
) -> Callable[[Tensor, str], Tensor]:
    """Keys or values at some positions -> at all positions, the others' taken from `rest`."""
    if rest is None:
        return lambda here, part: here
    return lambda here, part: rest(f"blocks.{layer}.attn.hook_{part}").scatter(
        1, at[:, :, None, None].expand_as(here), here
    )


class Settable(nn.Module):
    """A module whose weights can be assigned to, views of packed ones too: `attn.W_O = value` writes the numbers into
    the weight that is there, which stays as frozen as it is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property) or name in self.__dict__.get("_parameters", ()):
            with torch.no_grad():
                getattr(self, name).copy_(torch.as_tensor(value))  # shapes that differ are PyTorch's error
        else:
            super().__setattr__(name, value)


class LayerNorm(nn.Module):
    """`w * (x - mean) / scale + b` with `scale = sqrt(var + eps)`."""

    def __init__(self, w: Float[Tensor, "d_model"], b: Float[Tensor, "d_model"], eps: float):
        super().__init__()
        self.w, self.b, self.eps = _frozen(w), _frozen(b), eps
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        if not (self.hook_scale.has_hooks() or self.hook_normalized.has_hooks()):
            return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of float16 overflow above 256
        centred = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype))
        return self.hook_normalized((centred / scale).to(x.dtype)) * self.w + self.b


class Attention(Settable):
    """Multi-head attention on packed weights; `W_Q [head d_model d_head]` and the like are views of them."""

    def __init__(self, n_heads: int, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor, causal: bool):
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.d_model = out.shape[0]
        self.d_head = out.shape[1] // n_heads
        self.qkv_weight, self.qkv_bias = _frozen(qkv), _frozen(qkv_bias)
        self.out_weight, self.b_O = _frozen(out), _frozen(out_bias)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()
        self.hook_q_input, self.hook_k_input, self.hook_v_input = HookPoint(), HookPoint(), HookPoint()

    def _weight(self, part: int) -> Float[Tensor, "head d_model d_head"]:
        return self.qkv_weight.view(3, self.n_heads, self.d_head, self.d_model)[part].transpose(1, 2)

    def _bias(self, part: int) -> Float[Tensor, "head d_head"]:
        return self.qkv_bias.view(3, self.n_heads, self.d_head)[part]

    W_Q = property(lambda self: self._weight(0), doc="head d_model d_head")
    W_K = property(lambda self: self._weight(1), doc="head d_model d_head")
    W_V = property(lambda self: self._weight(2), doc="head d_model d_head")
    b_Q = property(lambda self: self._bias(0), doc="head d_head")
    b_K = property(lambda self: self._bias(1), doc="head d_head")
    b_V = property(lambda self: self._bias(2), doc="head d_head")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.out_weight.view(self.d_model, self.n_heads, self.d_head).permute(1, 2, 0)

    @property
    def QK(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_V, self.W_O)

    def project(self, part: slice, x: Tensor) -> tuple[Float[Tensor, "pair pos head d_head"], ...]:
        """Some of q, k, v (`part` of the three) of an input that all heads share, `pair pos d_model`."""
        rows = slice(part.start * self.d_model, part.stop * self.d_model)
        packed = F.linear(x, self.qkv_weight[rows], self.qkv_bias[rows])
        return packed.unflatten(-1, (part.stop - part.start, self.n_heads, self.d_head)).unbind(2)

    def project_split(
        self, part: int, x: Float[Tensor, "pair pos head d_model"]
    ) -> Float[Tensor, "pair pos head d_head"]:
        """q, k or v of an input that each head has for itself."""
        return torch.einsum("bphd,hde->bphe", x, self._weight(part)) + self._bias(part)

    def forward(
        self,
        q: Float[Tensor, "pair query head d_head"],
        k: Float[Tensor, "pair pos head d_head"],
        v: Float[Tensor, "pair pos head d_head"],
        at: Int[Tensor, "#pair query"],
        rest: Callable[[Tensor, str], Tensor],
    ) -> Float[Tensor, "pair query d_model"]:
        q, k, v = self.hook_q(q), rest(self.hook_k(k), "k"), rest(self.hook_v(v), "v")
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / sqrt(self.d_head)
        if self.causal:
            ahead = torch.arange(k.shape[1], device=k.device) > at[:, None, :, None]
            scores = scores.masked_fill(ahead, float("-inf"))
        pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(-1))
        z = self.hook_z((pattern @ v.transpose(1, 2)).transpose(1, 2))
        if self.hook_result.has_hooks():
            return self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O)).sum(2) + self.b_O
        return F.linear(z.flatten(2), self.out_weight, self.b_O)


class MLP(Settable):
    """`act(x W_in + b_in) W_out + b_out`."""

    def __init__(self, fc: nn.Linear, act: nn.Module, out_weight: Tensor, out_bias: Tensor):
        super().__init__()
        self.in_weight, self.b_in = _frozen(fc.weight), _frozen(fc.bias)
        self.out_weight, self.b_out = _frozen(out_weight), _frozen(out_bias)
        self.act = act
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    W_in = property(lambda self: self.in_weight.T, doc="d_model d_mlp")
    W_out = property(lambda self: self.out_weight.T, doc="d_mlp d_model")

    def forward(self, x: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_model"]:
        post = self.hook_post(self.act(self.hook_pre(F.linear(x, self.in_weight, self.b_in))))
        return F.linear(post, self.out_weight, self.b_out)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP."""

    hook_out_is_single_residual_stream = True
    """What TransformerLens' logit lens asks of a block before it reads `hook_resid_post`."""

    def __init__(self, ln1: LayerNorm, attn: Attention, ln2: LayerNorm, mlp: MLP):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_q_input, self.hook_k_input, self.hook_v_input = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_in, self.hook_mlp_out = HookPoint(), HookPoint(), HookPoint()
        self._splits = (
            (self.hook_q_input, attn.hook_q_input),
            (self.hook_k_input, attn.hook_k_input),
            (self.hook_v_input, attn.hook_v_input),
        )  # HookedTransformer's name of each and TransformerBridge's; a tuple, since looking up submodules takes time

    def _split_qkv(self, x: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
        heads = lambda y: y.unsqueeze(2).repeat(1, 1, self.attn.n_heads, 1)
        found = [
            self.attn.project_split(part, self.ln1(second(first(heads(y)))))
            for part, ((first, second), y) in enumerate(zip(self._splits, (queries, x, x), strict=True))
        ]
        if self.ln1.hook_scale.has_hooks() or self.ln1.hook_normalized.has_hooks():
            self.ln1(x)  # last, so that a cache holds what all heads share and not one split input's
        return tuple(found)

    def _qkv(self, x: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
        if any(hook.fwd_hooks or hook.bwd_hooks for names in self._splits for hook in names):
            return self._split_qkv(x, queries)
        normalized = self.ln1(x)
        if queries is x:
            return self.attn.project(slice(0, 3), normalized)
        return self.attn.project(slice(0, 1), self.ln1(queries)) + self.attn.project(slice(1, 3), normalized)

    def forward(
        self,
        x: Float[Tensor, "pair pos d_model"],
        at: Int[Tensor, "#pair pos"],
        rest: Callable[[Tensor, str], Tensor],
        only: Int[Tensor, "pair 1"] | None = None,
    ) -> Float[Tensor, "pair query d_model"]:
        """The residual stream behind the block, at every position or (`only`) at one of `x`'s positions in each row."""
        x = self.hook_resid_pre(x)
        queries = x if only is None else _pick(x, only)
        at = at if only is None else at.expand(len(x), -1).gather(1, only)
        q, k, v = self._qkv(x, queries)
        mid = self.hook_resid_mid(queries + self.hook_attn_out(self.attn(q, k, v, at, rest)))
        mlp_in = self.hook_mlp_in(mid.clone()) if self.hook_mlp_in.has_hooks() else mid
        return self.hook_resid_post(mid + self.hook_mlp_out(self.mlp(self.ln2(mlp_in))))


class HookedTextTower(TextTokens, TowerWeights, HookedRootModule):
    """CLIP's text tower: tokens in, `pair pos d_embed` out, unpooled and unnormalised.

        tokens -> embed + pos_embed -> resid 0
               -> [ln1 -> attn (+) -> resid_mid -> ln2 -> mlp (+)] x L -> ln_final -> W_U

    Notebook code written for HookedTransformer runs on it: `run_with_cache` gives an `ActivationCache`,
    `run_with_hooks` and `hooks()` take the same arguments. What differs: the output is an embedding, so `W_U` is the
    text projection (d_model x d_embed), a "logit" is a direction in the joint space, and `return_type="loss"` does not
    exist. Weights are frozen: for gradients, give backward hooks, or make the embedding (`hook_embed`) a leaf.

    Threads take turns: a forward pass, and a `with tower.hooks(...)` from its beginning to its end, have the tower for
    themselves, since hooks on a module act on every thread's runs. Waiting inside such a block for another thread that
    runs the same tower waits for ever; a copy of the tower (`copy.deepcopy`) has a turn of its own.
    """

    def __init__(
        self,
        cfg: TransformerBridgeConfig,
        W_E: Float[Tensor, "d_vocab d_model"],
        W_pos: Float[Tensor, "n_ctx d_model"],
        blocks: Sequence[Block],
        ln_final: LayerNorm,
        W_U: Float[Tensor, "d_model d_embed"],
        b_U: Float[Tensor, "d_embed"],
        tokenizer: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        self.cfg, self.tokenizer, self.turn, self._traced = cfg, tokenizer, Turn(), False
        self.W_E, self.W_pos, self.W_U, self.b_U = _frozen(W_E), _frozen(W_pos), _frozen(W_U), _frozen(b_U)
        self._modules |= {"blocks": nn.ModuleList(blocks), "ln_final": ln_final}
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.hook_norm, self.hook_projection = HookPoint(), HookPoint()
        self.eval()
        self.setup()

    @property
    def causal(self) -> bool:
        return self.cfg.attention_dir == "causal"

    @property
    @in_turn
    def hooked(self) -> tuple[str, ...]:
        """The names of the modules on which something intervenes right now: hooks of either direction, of
        TransformerLens' or PyTorch's, and a `forward` that was put in the place of the class's own. The tower is "".

        Example:
            >>> tower = clip_lens.load().tower
            >>> with tower.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]):
            ...     tower.hooked
            ('blocks.0.hook_mlp_out',)
            >>> tower.hooked
            ()
        """
        return tuple(
            name
            for name, module in self.named_modules()
            if "forward" in vars(module) or any(getattr(module, kind) for kind in PYTORCH_HOOKS)
        )

    @contextmanager
    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any) -> Iterator[HookedTextTower]:
        """TransformerLens' hooks on this tower inside a `with`, which other threads wait for. With backward hooks, the
        embedding takes part in gradients, since the weights are frozen."""
        with self.turn, super().hooks(fwd_hooks, bwd_hooks, *args, **kwargs):
            outer, self._traced = self._traced, self._traced or bool(bwd_hooks)
            try:
                yield self
            finally:
                self._traced = outer

    add_hook = in_turn(HookedRootModule.add_hook)
    reset_hooks = in_turn(HookedRootModule.reset_hooks)

    @in_turn
    def embed(self, tokens: Int[Tensor, "pair pos"]) -> Float[Tensor, "pair pos d_model"]:
        """The residual stream that enters block 0: token plus position embedding."""
        positions = self.W_pos[: tokens.shape[1]].repeat(len(tokens), 1, 1)  # a copy: hooks may edit in place
        embedded = self.W_E[tokens]
        if self._traced and torch.is_grad_enabled():
            embedded = embedded.requires_grad_().clone()  # a copy of the leaf: hooks may edit in place
        return self.hook_embed(embedded) + self.hook_pos_embed(positions)

    @in_turn
    def forward(
        self,
        input: str | list[str] | Tensor,
        return_type: Literal["logits"] | None = "logits",
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        at: Int[Tensor, "pair pos"] | None = None,
        rest: Callable[[str], Float[Tensor, "pair every head d_head"]] | None = None,
        read: Int[Tensor, "pair"] | None = None,
    ) -> Float[Tensor, "pair read d_embed"] | Float[Tensor, "pair read d_model"] | None:
        """The text embedding at every position, or the residual stream that enters block `stop_at_layer`.

        `input` is text, tokens or, with `start_at_layer=l`, the residual stream that enters block l: the blocks below
        are skipped. It may hold some positions of each row only: `at` says which, and `rest("blocks.{l}.attn.hook_k")`,
        `...hook_v` give keys and values at every position, of which those at `at` are replaced. That is exact when
        nothing at the other positions depends on what changed: in a causal tower, for all positions from the change on.
        `read` says which of the context's positions the last block to run and the output are computed at, one in each
        row.

        Raises:
            ValueError: tokens longer than the context, a return type that CLIP has not, `at` without `rest`,
                `start_at_layer` without a residual stream.

        Example:
            >>> tower = clip_lens.load().tower
            >>> tower("There are no circles.").shape, tower("There are no circles.", stop_at_layer=2).shape
            (torch.Size([1, 77, 128]), torch.Size([1, 77, 128]))
        """
        if return_type not in ("logits", None):
            raise ValueError(f"return_type={return_type!r}: CLIP's text tower has no loss; give 'logits' or None")
        if (at is None) != (rest is None):
            raise ValueError("at= and rest= go together: some positions of each row, and keys and values of the others")
        x = self._entering(input, start_at_layer)
        if at is None:
            at = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        only = None if read is None else (at == read[:, None]).int().argmax(1, keepdim=True)
        layers = range(self.cfg.n_layers)[start_at_layer or 0 : stop_at_layer]
        for layer in layers:
            x = self.blocks[layer](x, at, _filled(layer, at, rest), only if layer == layers[-1] else None)
        if stop_at_layer is not None:
            return x
        x = _pick(x, only) if only is not None and not layers else x
        return self.hook_projection(self.unembed(self.hook_norm(self.ln_final(x)))) if return_type else None

    def _entering(self, input: str | list[str] | Tensor, layer: int | None) -> Float[Tensor, "pair pos d_model"]:
        """The residual stream that enters the first block to run."""
        if layer is None:
            return self.embed(self._tokens(input))
        if not isinstance(input, Tensor) or not input.is_floating_point():
            raise ValueError(f"start_at_layer={layer} needs the residual stream that enters that block")
        return input

    def _tokens(self, input: str | list[str] | Tensor) -> Int[Tensor, "pair pos"]:
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input)
        if tokens.ndim == 1:
            tokens = tokens.unsqueeze(0)
        if tokens.shape[1] > self.cfg.n_ctx:
            raise ValueError(f"{tokens.shape[1]} positions given, the tower's context has {self.cfg.n_ctx}")
        return tokens.to(self.W_E.device)

    def run_with_cache(
        self, *args: Any, names_filter: Any = None, return_cache_object: bool = True, **kwargs: Any
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """The output and the `ActivationCache` of a run; `names_filter=None` caches all but the hooks on demand.

        Warns about names that are no hook's.

        Example:
            >>> _, cache = clip_lens.load().tower.run_with_cache("There are no circles.")
            >>> cache["pattern", 2].shape, cache["blocks.2.hook_mlp_out"].shape
            (torch.Size([1, 4, 77, 77]), torch.Size([1, 77, 128]))
        """
        chosen = self._asked(names_filter)
        output, cache = super().run_with_cache(*args, names_filter=chosen, **kwargs)
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def _asked(self, names_filter: Any) -> Callable[[str], bool]:
        if names_filter is None:
            left_out = tuple(name for name, flag in ON_DEMAND.items() if not (flag and getattr(self.cfg, flag)))
            return lambda name: not name.endswith(left_out)
        if callable(names_filter):
            return names_filter
        names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
        strange = sorted(names - set(self.hook_dict))
        if strange:
            near = nearest(strange[0], self.hook_dict)
            warnings.warn(f"names_filter: no hook {strange}{near}; tower.hook_dict lists all of them", stacklevel=3)
        return names.__contains__

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether a cache of everything holds `attn.hook_result`; the hook itself needs no flag."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether a cache of everything holds the split inputs; the hooks themselves need no flag."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether a cache of everything holds `hook_mlp_in`; the hook itself needs no flag."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def _apply(self, *args: Any, **kwargs: Any) -> HookedTextTower:
        """What `to`, `half`, `double`, `cuda` ... all do."""
        super()._apply(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.W_E.device), self.W_E.dtype
        return self

    def tokens_to_residual_directions(
        self, direction: Float[Tensor, "*batch d_embed"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What a direction of the joint space reads in the final residual stream, centred and divided by `ln_final`'s
        scale: `ln_final.w * (W_U @ direction)`.

        That is what TransformerLens' `cache.apply_ln_to_stack` gives, and so what `cache.logit_attrs` takes. What it
        gives of everything that is written sums to `y @ direction` less the constant
        `(ln_final.b @ W_U + b_U) @ direction`. (`cache.accumulated_resid(apply_ln=True)` has applied all of `ln_final`:
        its rows are read by `tower.unembed`.)

        Raises:
            TypeError: tokens were given: CLIP has no vocabulary to unembed to.

        Example:
            >>> tower = clip_lens.load().tower
            >>> y, cache = tower.run_with_cache("There are no circles.")
            >>> cache.logit_attrs(cache.decompose_resid(), y[0, 6]).shape  # of each part written, at each position
            torch.Size([14, 1, 77])
        """
        if not isinstance(direction, Tensor) or not direction.is_floating_point():
            raise TypeError(f"CLIP's output is an embedding: give a direction with {self.cfg.d_vocab_out} components")
        return (direction @ self.W_U.T) * self.ln_final.w
