"""A text tower of open_clip's or transformers' -> `HookedTextTower`, read from the live module, not from its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig

from clip_lens.model.tower import MLP, Attention, Block, HookedTextTower, LayerNorm
from clip_lens.originals.transformers import SUPPORTED, TransformersModel, fitted

PoolType = Literal["argmax", "eos", "last", "first"]


@dataclass(frozen=True)
class Pool:
    """Which position of a text is read: the highest token id, the first `eos_id`, the last or the first position."""

    type: PoolType
    eos_id: int | None = None

    def __call__(self, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair"]:
        if self.type == "argmax":
            return tokens.argmax(-1)
        if self.type == "eos":
            return tokens.eq(self.eos_id).int().argmax(-1)  # type: ignore[arg-type]
        position = 0 if self.type == "first" else tokens.shape[1] - 1
        return torch.full((len(tokens),), position, device=tokens.device)


@dataclass(frozen=True)
class Parts:
    """A text tower taken apart, as `HookedTextTower` wants it."""

    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"]
    blocks: list[Block]
    ln_final: LayerNorm
    W_U: Float[Tensor, "d_model d_embed"]
    b_U: Float[Tensor, "d_embed"]
    pool: Pool


def convert(
    module: nn.Module, *, name: str, tokenizer: Callable[..., Any] | None = None
) -> tuple[HookedTextTower, Pool]:
    """The hooked copy of a CLIP model's text tower, and how it pools.

    `module` is an `open_clip.CLIP`, a `CustomTextCLIP`, a `TextTransformer`, OpenAI's `clip.model.CLIP`, or a
    `TransformersModel`; it is left as it is. Layer scales are folded into the output weights that they multiply.

    Raises:
        ValueError: the tower has a part that this package does not reproduce; the message names it.

    Example:
        >>> from clip_lens.originals.open_clip import open_original
        >>> tower, pool = convert(open_original("tiny").module, name="tiny")
        >>> tower.cfg.n_layers, tower.cfg.n_heads, pool.type
        (6, 4, 'argmax')
    """
    parts = _of_transformers(module, name) if isinstance(module, TransformersModel) else _of_open_clip(module, name)
    tower = HookedTextTower(
        _config(parts, name),
        parts.W_E,
        parts.W_pos,
        parts.blocks,
        parts.ln_final,
        parts.W_U,
        parts.b_U,
        fitted(tokenizer, len(parts.W_pos), lower_case=isinstance(module, TransformersModel) and module.siglip),
    )
    return tower, parts.pool


def _of_open_clip(module: nn.Module, name: str) -> Parts:
    text: Any = getattr(module, "text", module)
    _refuse_foreign(module, text, name)
    causal = _mask(text) is not None
    blocks = [_block(block, causal) for block in text.transformer.resblocks]
    ln_final, (W_U, b_U) = _layer_norm(text.ln_final), _projection(text)
    return Parts(text.token_embedding.weight, text.positional_embedding, blocks, ln_final, W_U, b_U, _pool(text, name))


def _of_transformers(module: TransformersModel, name: str) -> Parts:
    text, projection = module.text, module.text_projection
    blocks = [_separate_block(layer, causal=not module.siglip) for layer in text.encoder.layers]
    W_U, b_U = _linear(projection, text.final_layer_norm.weight)
    return Parts(
        text.embeddings.token_embedding.weight,
        text.embeddings.position_embedding.weight,
        blocks,
        _layer_norm(text.final_layer_norm),
        W_U,
        b_U,
        Pool("last") if module.siglip else _end_of_text(module.pools_at, name),
    )


def _separate_block(layer: Any, causal: bool) -> Block:
    """A block whose queries, keys and values come from linear layers of their own; here they are packed."""
    attn, mlp = layer.self_attn, layer.mlp
    linears = (attn.q_proj, attn.k_proj, attn.v_proj)
    weight, bias = (torch.cat([getattr(linear, part) for linear in linears]) for part in ("weight", "bias"))
    attention = Attention(attn.num_heads, weight, bias, attn.out_proj.weight, attn.out_proj.bias, causal)
    act = copy.deepcopy(mlp.activation_fn)
    return Block(
        _layer_norm(layer.layer_norm1),
        attention,
        _layer_norm(layer.layer_norm2),
        MLP(mlp.fc1, act, mlp.fc2.weight, mlp.fc2.bias),
    )


def _end_of_text(eos_id: Any, name: str) -> Pool:
    """transformers' CLIP reads the first `eos_token_id`, or (None) the highest id."""
    if eos_id is None:
        return Pool("argmax")
    if not isinstance(eos_id, int):
        raise ValueError(f"{name}: pooling at eos_token_id={eos_id!r} is not supported; it must be one token's id")
    return Pool("eos", eos_id)


def _refuse_foreign(module: nn.Module, text: Any, name: str) -> None:
    kind = type(text).__name__
    if not all(hasattr(text, part) for part in ("transformer", "token_embedding", "positional_embedding", "ln_final")):
        raise ValueError(
            f"{name}: a {kind} is no open_clip text tower (of Hugging Face's models, {SUPPORTED} are supported)"
        )
    if hasattr(module, "text_decoder") or getattr(text, "cls_emb", None) is not None:
        raise ValueError(f"{name}: CoCa's text tower (class embedding, padding mask) is not supported")
    if getattr(text, "use_pad_mask", False):
        raise ValueError(f"{name}: a text tower with a padding mask is not supported")
    if not hasattr(text.transformer, "resblocks"):
        raise ValueError(f"{name}: no residual blocks in {type(text.transformer).__name__}")
    mask = _mask(text)
    if mask is not None and not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        raise ValueError(f"{name}: the attention mask is neither causal nor absent")
    for block in text.transformer.resblocks:
        if not isinstance(block.attn, nn.MultiheadAttention) or hasattr(block, "ln_1_kv"):
            raise ValueError(f"{name}: attention of type {type(block.attn).__name__} is not supported")


def _mask(text: Any) -> Tensor | None:
    """The attention mask; in the `clip` package's towers every block has it."""
    return text.attn_mask if hasattr(text, "attn_mask") else text.transformer.resblocks[0].attn_mask


def _layer_norm(module: nn.Module) -> LayerNorm:
    if not isinstance(module, nn.LayerNorm) or module.bias is None:
        raise ValueError(f"a normalisation of type {type(module).__name__} is not supported; LayerNorm with bias is")
    return LayerNorm(module.weight, module.bias, module.eps)


def _scaled(linear: nn.Linear, scale: Any) -> tuple[Tensor, Tensor]:
    """The weights behind a layer scale, where there is one."""
    if scale is None or isinstance(scale, nn.Identity):
        return linear.weight, linear.bias
    gamma = scale.gamma
    return linear.weight * gamma[:, None], linear.bias * gamma


def _block(block: Any, causal: bool) -> Block:
    attn, scales = block.attn, [getattr(block, name, None) for name in ("ls_1", "ls_2")]
    attention = Attention(
        attn.num_heads, attn.in_proj_weight, attn.in_proj_bias, *_scaled(attn.out_proj, scales[0]), causal
    )
    mlp = MLP(block.mlp.c_fc, copy.deepcopy(block.mlp.gelu), *_scaled(block.mlp.c_proj, scales[1]))
    return Block(_layer_norm(block.ln_1), attention, _layer_norm(block.ln_2), mlp)


def _projection(text: Any) -> tuple[Float[Tensor, "d_model d_embed"], Float[Tensor, "d_embed"]]:
    """open_clip's text projection, which is a parameter, a linear layer or absent."""
    projection = text.text_projection
    if isinstance(projection, nn.Parameter):
        return projection, projection.new_zeros(projection.shape[1])
    return _linear(projection, text.ln_final.weight)


def _linear(
    projection: nn.Linear | None, like: Float[Tensor, "d_model"]
) -> tuple[Float[Tensor, "d_model d_embed"], Float[Tensor, "d_embed"]]:
    """The weight and bias of a linear layer; where there is none, texts stay where they are."""
    if projection is None:
        return torch.eye(len(like), dtype=like.dtype, device=like.device), torch.zeros_like(like)
    weight = projection.weight.T
    return weight, weight.new_zeros(weight.shape[1]) if projection.bias is None else projection.bias


def _pool(text: Any, name: str) -> Pool:
    own = getattr(text, "pool_type", "argmax")  # the `clip` package's towers don't say it
    type_: Any = getattr(text, "text_pool_type", None) or own
    if type_ not in get_args(PoolType):
        raise ValueError(f"{name}: pooling {type_!r} is not supported; {', '.join(get_args(PoolType))} are")
    eos_id = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
    return Pool(type_, eos_id if type_ == "eos" else None)


def _config(parts: Parts, name: str) -> TransformerBridgeConfig:
    block = parts.blocks[0]
    attn, mlp = block.attn, block.mlp
    d_vocab, d_model = parts.W_E.shape
    return TransformerBridgeConfig(
        d_model=d_model,
        d_head=attn.d_head,
        n_layers=len(parts.blocks),
        n_ctx=len(parts.W_pos),
        n_heads=attn.n_heads,
        d_vocab=d_vocab,
        d_vocab_out=parts.W_U.shape[1],
        d_mlp=mlp.in_weight.shape[0],
        eps=block.ln1.eps,
        act_fn=_activation_name(mlp.act),
        attention_dir="causal" if attn.causal else "bidirectional",
        normalization_type="LN",
        model_name=name,
        architecture="CLIPText",
        device=str(attn.b_O.device),
        dtype=attn.b_O.dtype,
    )


ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
}


def _activation_name(act: nn.Module | partial) -> str:
    if isinstance(act, nn.GELU):
        return "gelu_pytorch_tanh" if act.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(act).__name__, type(act).__name__.lower())
