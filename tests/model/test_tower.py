"""The tower as HookedTransformer's users know it: hooks, caches, weights, layers in part; oracle: open_clip."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from towers import random_clip
from transformer_lens import ActivationCache, FactoredMatrix, patching
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights

from clip_lens.model.convert import convert
from clip_lens.model.tower import ON_DEMAND, HookedTextTower, LayerNorm

LAYERS, HEADS, WIDTH, D_HEAD, D_MLP, D_EMBED = 3, 4, 64, 16, 256, 32
EXACT = 1e-12
"""Largest difference in float64 between two ways to the same number of order 1."""


def module_of(causal: bool) -> nn.Module:
    return random_clip(layers=LAYERS, width=WIDTH, heads=HEADS, d_embed=D_EMBED, causal=causal).double()


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return module_of(causal=True)


@pytest.fixture(scope="module")
def tower(module: nn.Module) -> HookedTextTower:
    return convert(module, name="it")[0]


def sample(n: int = 3, n_pos: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(1, 49000, (n, n_pos), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens() -> Tensor:
    return sample()


@pytest.fixture
def other() -> Tensor:
    return sample(seed=1)


def close(left: Tensor, right: Tensor, tolerance: float = EXACT) -> None:
    assert left.shape == right.shape
    assert float((left - right).detach().abs().max()) <= tolerance


# --- every hook against a run by hand -------------------------------------------------------------------------------


def _norm(layer_norm: nn.LayerNorm, x: Tensor) -> dict[str, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + layer_norm.eps)
    return {"scale": scale, "normalized": centred / scale, "out": layer_norm(x)}


@torch.no_grad()
def by_hand(module: Any, tokens: Tensor) -> dict[str, Tensor]:
    """All activations of an open_clip text tower, head by head, from its own modules and packed weights."""
    text = getattr(module, "text", module)
    n_pos = tokens.shape[1]
    seen = {"hook_embed": text.token_embedding(tokens)}
    seen["hook_pos_embed"] = text.positional_embedding[:n_pos].repeat(len(tokens), 1, 1)
    x = seen["hook_embed"] + seen["hook_pos_embed"]
    for layer, block in enumerate(text.transformer.resblocks):
        here = f"blocks.{layer}."
        seen[here + "hook_resid_pre"] = x
        for part in ("q", "k", "v"):
            seen[here + f"hook_{part}_input"] = torch.stack([x] * HEADS, dim=2)
            seen[here + f"attn.hook_{part}_input"] = seen[here + f"hook_{part}_input"]
        first = _norm(block.ln_1, x)
        seen |= {here + "ln1.hook_scale": first["scale"], here + "ln1.hook_normalized": first["normalized"]}
        attn, out = block.attn, torch.zeros_like(x) + block.attn.out_proj.bias
        kept: dict[str, list[Tensor]] = {}
        for head in range(HEADS):
            rows = [slice(part * WIDTH + head * D_HEAD, part * WIDTH + (head + 1) * D_HEAD) for part in range(3)]
            q, k, v = (first["out"] @ attn.in_proj_weight[row].T + attn.in_proj_bias[row] for row in rows)
            scores = q @ k.mT / D_HEAD**0.5
            if text.attn_mask is not None:
                scores = scores + text.attn_mask[:n_pos, :n_pos]
            pattern = torch.softmax(scores, dim=-1)
            z = pattern @ v
            result = z @ attn.out_proj.weight[:, head * D_HEAD : (head + 1) * D_HEAD].T
            out = out + result
            named = {"q": q, "k": k, "v": v, "attn_scores": scores, "pattern": pattern, "z": z, "result": result}
            for name, value in named.items():
                kept.setdefault(name, []).append(value)
        for name, values in kept.items():
            seen[f"{here}attn.hook_{name}"] = torch.stack(values, dim=1 if name in ("attn_scores", "pattern") else 2)
        seen[here + "hook_attn_out"] = out
        x = x + out
        seen[here + "hook_resid_mid"] = seen[here + "hook_mlp_in"] = x
        second = _norm(block.ln_2, x)
        seen |= {here + "ln2.hook_scale": second["scale"], here + "ln2.hook_normalized": second["normalized"]}
        seen[here + "mlp.hook_pre"] = block.mlp.c_fc(second["out"])
        seen[here + "mlp.hook_post"] = block.mlp.gelu(seen[here + "mlp.hook_pre"])
        seen[here + "hook_mlp_out"] = block.mlp.c_proj(seen[here + "mlp.hook_post"])
        x = x + seen[here + "hook_mlp_out"]
        seen[here + "hook_resid_post"] = x
    last = _norm(text.ln_final, x)
    seen |= {"ln_final.hook_scale": last["scale"], "ln_final.hook_normalized": last["normalized"]}
    projection = text.text_projection
    seen["output"] = projection(last["out"]) if isinstance(projection, nn.Module) else last["out"] @ projection
    seen |= {"hook_norm": last["out"], "hook_projection": seen["output"]}
    return seen


TABLE = {
    "embed pos_embed resid_pre attn_out resid_mid mlp_in mlp_out resid_post normalized norm": (3, 9, WIDTH),
    "q_input k_input v_input result": (3, 9, HEADS, WIDTH),
    "q k v z": (3, 9, HEADS, D_HEAD),
    "attn_scores pattern": (3, HEADS, 9, 9),
    "pre post": (3, 9, D_MLP),
    "scale": (3, 9, 1),
    "projection": (3, 9, D_EMBED),
}
"""HookedTransformer's shapes for 3 texts of 9 tokens: pair pos d_model, and so on."""


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_every_hook_has_the_value_and_shape_of_a_run_by_hand(causal: bool, tokens: Tensor) -> None:
    module = module_of(causal)
    tower, _ = convert(module, name="it")
    expected = by_hand(module, tokens)
    output, cache = tower.run_with_cache(tokens, names_filter=lambda name: "_input" not in name)
    _, split = tower.run_with_cache(tokens, names_filter=lambda name: "_input" in name)
    found = {**cache, **split, "output": output}
    assert set(found) == set(expected) == {*tower.hook_dict, "output"}
    shapes = {name: shape for names, shape in TABLE.items() for name in names.split()}
    for name in tower.hook_dict:
        assert found[name].shape == shapes[name.rpartition("hook_")[2]], name
    for name, value in expected.items():
        finite = value.isfinite()
        assert torch.equal(finite, found[name].isfinite()), name
        close(found[name][finite], value[finite], 1e-11 if "scores" in name else EXACT)


def test_costly_hooks_are_cached_only_by_name(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    assert set(tower.hook_dict) - set(cache.keys()) == {
        name for name in tower.hook_dict if name.endswith(tuple(ON_DEMAND))
    }
    for asked in (
        "blocks.1.attn.hook_result",
        ["blocks.1.attn.hook_result"],
        lambda name: name.endswith("1.attn.hook_result"),
    ):
        _, cache = tower.run_with_cache(tokens, names_filter=asked)
        assert list(cache.keys()) == ["blocks.1.attn.hook_result"]
    _, plain = tower.run_with_cache(tokens, names_filter={"hook_embed"}, return_cache_object=False)
    assert type(plain) is dict


def test_run_with_cache_of_one_text_without_the_batch_axis(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert not cache.has_batch_dim
    assert cache["resid_pre", 0].shape == (9, WIDTH)
    close(cache.decompose_resid().sum(0) + 0, cache["resid_post", -1])


def test_a_bidirectional_tower_looks_ahead_and_a_causal_one_does_not(tower: HookedTextTower, tokens: Tensor) -> None:
    both, _ = convert(module_of(causal=False), name="it")
    ahead = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for layer in range(LAYERS):
        pattern = tower.run_with_cache(tokens)[1]["pattern", layer]
        assert (pattern[..., ahead] == 0).all()
        assert (both.run_with_cache(tokens)[1]["pattern", layer][..., ahead] > 0).all()
        close(pattern.sum(-1), torch.ones(3, HEADS, 9))


# --- ActivationCache ------------------------------------------------------------------------------------------------


def test_everything_written_sums_to_the_final_residual_stream(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens)
    final = cache["resid_post", -1]
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == [
        "embed",
        "pos_embed",
        "0_attn_out",
        "0_mlp_out",
        "1_attn_out",
        "1_mlp_out",
        "2_attn_out",
        "2_mlp_out",
    ]
    close(parts.sum(0), final)
    split = cache.get_full_resid_decomposition(expand_neurons=True)
    close(split.sum(0), final)
    heads = cache.stack_head_results()
    assert heads.shape == (LAYERS * HEADS, 3, 9, WIDTH)
    embedded = cache["embed"] + cache["pos_embed"]
    neurons = torch.stack([cache["post", layer] @ tower.W_out[layer] for layer in range(LAYERS)])
    close(embedded + heads.sum(0) + neurons.sum(0) + tower.accumulated_bias(LAYERS), final)


def test_accumulated_resid(module: nn.Module, tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens)
    expected = by_hand(module, tokens)
    streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    for value, label in zip(streams, labels, strict=True):
        layer, part = label.replace("final", "2").split("_")
        close(value, expected[f"blocks.{layer}.hook_resid_{part}"])


def test_head_results_are_the_hooks(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens)
    _, asked = tower.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_result"))
    expected = torch.cat([asked["result", layer].movedim(2, 0) for layer in range(LAYERS)])
    close(cache.stack_head_results(), expected)
    kept, labels = cache.stack_head_results(layer=2, incl_remainder=True, return_labels=True)
    assert labels[-1] == "remainder"
    close(kept.sum(0), cache["resid_pre", 2])


def test_apply_ln_to_stack_is_the_final_norm_without_its_weights(tower: HookedTextTower, tokens: Tensor) -> None:
    output, cache = tower.run_with_cache(tokens)
    parts = cache.apply_ln_to_stack(cache.decompose_resid())
    close(parts.sum(0), cache["ln_final.hook_normalized"])
    close((parts.sum(0) * tower.ln_final.w + tower.ln_final.b) @ tower.W_U + tower.b_U, output)
    within = cache.apply_ln_to_stack(cache.decompose_resid(layer=1), layer=1)
    close(within.sum(0), cache["blocks.1.ln1.hook_normalized"])


@pytest.mark.parametrize("layer", range(LAYERS))
def test_accumulated_bias(layer: int, tower: HookedTextTower, module: nn.Module) -> None:
    below = module.transformer.resblocks[:layer]
    attention = sum((block.attn.out_proj.bias for block in below), torch.zeros(WIDTH))
    mlps = sum((block.mlp.c_proj.bias for block in below), torch.zeros(WIDTH))
    this = module.transformer.resblocks[layer].attn.out_proj.bias
    close(tower.accumulated_bias(layer), attention + mlps)
    close(tower.accumulated_bias(layer, include_mlp_biases=False), attention)
    close(tower.accumulated_bias(layer, mlp_input=True), attention + mlps + this)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_of_half_precision_is_the_same_with_hooks(dtype: torch.dtype) -> None:
    """PyTorch's own norm as the oracle; 300 squared is more than float16 holds."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((5, 64), (64,), (64,)))
    x[:, 7] = 300.0
    norm, seen = LayerNorm(w.to(dtype), b.to(dtype), 1e-5), []
    plain = torch.nn.functional.layer_norm(x.to(dtype), (64,), w.to(dtype), b.to(dtype), 1e-5)
    norm.hook_scale.add_hook(lambda value, hook: seen.append(value))
    found = norm(x.to(dtype))
    assert found.dtype == seen[0].dtype == dtype and found.isfinite().all()
    assert (found - plain).float().abs().max() <= 4 * torch.finfo(dtype).eps * plain.float().abs().max()


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_views_of_the_packed_ones(tower: HookedTextTower, module: nn.Module) -> None:
    for layer, block in enumerate(module.transformer.resblocks):
        packed, bias, out = block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj.weight
        for head in range(HEADS):
            for part, name in enumerate("QKV"):
                rows = slice(part * WIDTH + head * D_HEAD, part * WIDTH + (head + 1) * D_HEAD)
                assert torch.equal(getattr(tower, f"W_{name}")[layer, head], packed[rows].T)
                assert torch.equal(getattr(tower, f"b_{name}")[layer, head], bias[rows])
            assert torch.equal(tower.W_O[layer, head], out[:, head * D_HEAD : (head + 1) * D_HEAD].T)
        assert torch.equal(tower.b_O[layer], block.attn.out_proj.bias)
        assert torch.equal(tower.W_in[layer], block.mlp.c_fc.weight.T)
        assert torch.equal(tower.b_in[layer], block.mlp.c_fc.bias)
        assert torch.equal(tower.W_out[layer], block.mlp.c_proj.weight.T)
        assert torch.equal(tower.b_out[layer], block.mlp.c_proj.bias)
    attn = tower.blocks[1].attn
    pointers = {attn.W_Q.data_ptr(), attn.W_K.data_ptr(), attn.W_V.data_ptr()}
    start, stop = attn.qkv_weight.data_ptr(), attn.qkv_weight.data_ptr() + attn.qkv_weight.nbytes
    assert len(pointers) == 3 and all(start <= pointer < stop for pointer in pointers)
    assert torch.equal(tower.W_E, module.token_embedding.weight)
    assert torch.equal(tower.W_pos, module.positional_embedding)
    assert torch.equal(tower.W_U, module.text_projection)


def test_factored_circuits(tower: HookedTextTower, module: nn.Module) -> None:
    assert isinstance(tower.QK, FactoredMatrix) and isinstance(tower.OV, FactoredMatrix)
    QK, OV = tower.QK.AB, tower.OV.AB
    assert QK.shape == OV.shape == (LAYERS, HEADS, WIDTH, WIDTH)
    for layer, block in enumerate(module.transformer.resblocks):
        packed, out = block.attn.in_proj_weight, block.attn.out_proj.weight
        for head in range(HEADS):
            q, k, v = (packed[part * WIDTH + head * D_HEAD :][:D_HEAD] for part in range(3))
            close(QK[layer, head], q.T @ k)
            close(OV[layer, head], v.T @ out[:, head * D_HEAD : (head + 1) * D_HEAD].T)
        close(tower.blocks[layer].attn.QK.AB, QK[layer])
        close(tower.blocks[layer].attn.OV.AB, OV[layer])


def test_runtime_protocols(tower: HookedTextTower) -> None:
    assert isinstance(tower, TransformerLensModel)
    assert isinstance(tower, TransformerLensModelWithWeights)
    for name in ("cfg", "blocks", "ln_final"):  # as Python 3.12 looks for a protocol's members
        inspect.getattr_static(tower, name)


def test_a_direction_reads_the_normalised_residual_stream(tower: HookedTextTower, tokens: Tensor) -> None:
    output, cache = tower.run_with_cache(tokens)
    direction = torch.randn(D_EMBED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constant = (tower.ln_final.b @ tower.W_U + tower.b_U) @ direction
    read = tower.tokens_to_residual_directions(direction)
    close(cache["ln_final.hook_normalized"] @ read, output @ direction - constant)
    with pytest.raises(TypeError, match="32 components"):
        tower.tokens_to_residual_directions(tokens)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stack", ["decompose_resid", "stack_head_results"])
def test_attributions_sum_to_the_score_less_the_constant(causal: bool, stack: str, tokens: Tensor) -> None:
    """TransformerLens' own attribution over all that is written, against open_clip's own text embedding."""
    module = module_of(causal)
    tower, pool = convert(module, name="it")
    text = getattr(module, "text", module)
    assert (text.ln_final.weight - 1).abs().max() > 0.3  # without which this would say nothing
    bias = getattr(text.text_projection, "bias", None)
    projection = text.text_projection.weight.T if bias is not None else text.text_projection
    tokens = torch.nn.functional.pad(tokens, (0, tower.cfg.n_ctx - tokens.shape[1]))
    directions = torch.randn(len(tokens), D_EMBED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        score = (module.encode_text(tokens) * directions).sum(-1)
        constant = (directions * (text.ln_final.bias @ projection + (0 if bias is None else bias))).sum(-1)
        _, cache = tower.run_with_cache(tokens)
        cache.compute_head_results()
        parts = cache.decompose_resid() if stack == "decompose_resid" else cache.stack_head_results(incl_remainder=True)
        found = cache.logit_attrs(parts, directions).sum(0)[torch.arange(len(tokens)), pool(tokens)]
    assert (found - (score - constant)).abs().max() <= 1e-10
    assert constant.abs().max() > 0.01


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_results_agree_with_and_without_costly_hooks() -> None:
    tower, _ = convert(module_of(causal=True).float(), name="it")
    plain = tower(sample())
    keep = lambda value, hook: None
    largest = plain.abs().max()
    for name in tower.hook_dict:
        hooked = tower.run_with_hooks(sample(), fwd_hooks=[(name, keep)])
        assert (hooked - plain).abs().max() <= 2e-6 * largest, name
    hooked = tower.run_with_hooks(sample(), fwd_hooks=[(lambda name: True, keep)])
    assert (hooked - plain).abs().max() <= 2e-6 * largest


@pytest.mark.parametrize(
    ("split", "moved", "still"),
    [("q", ["q"], ["k", "v"]), ("k", ["k"], ["q", "v"]), ("v", ["v"], ["q", "k"])],
)
def test_a_split_input_moves_its_own_head_only(
    split: str, moved: list[str], still: list[str], tower: HookedTextTower, tokens: Tensor
) -> None:
    def shift(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, :, 2] += torch.linspace(-1, 1, WIDTH, dtype=value.dtype)
        return value

    _, plain = tower.run_with_cache(tokens)
    with tower.hooks(fwd_hooks=[(f"blocks.1.hook_{split}_input", shift)]):
        _, patched = tower.run_with_cache(tokens)
    others = [0, 1, 3]
    for part in moved:
        close(patched[part, 1][:, :, others], plain[part, 1][:, :, others])
        assert (patched[part, 1][:, :, 2] - plain[part, 1][:, :, 2]).abs().max() > 0.01
        x = F.layer_norm(plain["resid_pre", 1] + torch.linspace(-1, 1, WIDTH, dtype=torch.float64), (WIDTH,))
        x = x * tower.blocks[1].ln1.w + tower.blocks[1].ln1.b
        weight, bias = getattr(tower, f"W_{part.upper()}")[1, 2], getattr(tower, f"b_{part.upper()}")[1, 2]
        close(patched[part, 1][:, :, 2], x @ weight + bias)
    for part in still:
        close(patched[part, 1], plain[part, 1])
    close(patched["z", 1][:, :, others], plain["z", 1][:, :, others])
    assert (patched["z", 1][:, :, 2] - plain["z", 1][:, :, 2]).abs().max() > 1e-3


def test_mlp_in_moves_the_mlp_and_not_the_residual_stream(tower: HookedTextTower, tokens: Tensor) -> None:
    _, plain = tower.run_with_cache(tokens)
    with tower.hooks(fwd_hooks=[("blocks.1.hook_mlp_in", lambda value, hook: value.copy_(value.flip(-1)))]):
        _, patched = tower.run_with_cache(tokens)
    close(patched["resid_mid", 1], plain["resid_mid", 1])
    assert (patched["mlp_out", 1] - plain["mlp_out", 1]).abs().max() > 1e-3
    close(patched["resid_post", 1], plain["resid_mid", 1] + patched["mlp_out", 1])


def test_one_heads_result_removed_is_its_z_removed(tower: HookedTextTower, tokens: Tensor) -> None:
    def remove(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, :, 3] = 0
        return value

    by_result = tower.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_result", remove)])
    by_z = tower.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", remove)])
    close(by_result, by_z)
    assert (by_z - tower(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_residual_stream_patched_whole_gives_the_other_run(
    name: str, layer: int, tower: HookedTextTower, tokens: Tensor, other: Tensor
) -> None:
    expected, cache = tower.run_with_cache(other)
    hook = (f"blocks.{layer}.hook_{name}", lambda value, hook: cache[hook.name])
    found = tower.run_with_hooks(tokens, fwd_hooks=[hook])
    assert torch.equal(found, tower.run_with_hooks(other, fwd_hooks=[hook]))
    close(found, expected)


@pytest.mark.parametrize("kind", ["pre_edit", "hook_scale", "hook_normalized"])
def test_edits_of_the_norms_and_neurons_reach_the_output(kind: str, tower: HookedTextTower, tokens: Tensor) -> None:
    name = "blocks.1.mlp.hook_pre" if kind == "pre_edit" else f"blocks.1.ln2.{kind}"
    edited = tower.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value * 1.5)])
    assert (edited - tower(tokens)).abs().max() > 1e-3


def test_edits_in_place_are_edits_and_leave_the_model_alone(tower: HookedTextTower, tokens: Tensor) -> None:
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    for name in tower.hook_dict:
        fresh = tower.run_with_hooks(tokens[:1], fwd_hooks=[(name, lambda value, hook: value * 0.5)])
        in_place = tower.run_with_hooks(tokens[:1], fwd_hooks=[(name, lambda value, hook: value.mul_(0.5))])
        assert torch.equal(fresh, in_place), name
    tower.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.hook_q_input", lambda value, hook: value.index_fill_(2, torch.tensor([1]), 0))]
    )
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def live_hooks(tower: HookedTextTower) -> list[str]:
    return [name for name, point in tower.hook_dict.items() if point.has_hooks()]


def test_hooks_are_gone_after_a_run_and_after_an_exception(tower: HookedTextTower, tokens: Tensor) -> None:
    def fail(value: Tensor, hook: object) -> Tensor:
        raise RuntimeError("in a hook")

    plain = tower(tokens)
    tower.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: 0 * value)])
    assert live_hooks(tower) == []
    with pytest.raises(RuntimeError, match="in a hook"):
        tower.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_q_input", fail), ("blocks.2.hook_resid_pre", fail)])
    with pytest.raises(RuntimeError, match="in a hook"), tower.hooks(fwd_hooks=[(lambda name: "ln" in name, fail)]):
        tower.run_with_cache(tokens)
    assert live_hooks(tower) == []
    assert torch.equal(tower(tokens), plain)


def test_gradients_reach_an_embedding_made_a_leaf(tower: HookedTextTower, tokens: Tensor) -> None:
    leaves = []

    def make_leaf(value: Tensor, hook: object) -> Tensor:
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    direction = torch.randn(D_EMBED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (tower.run_with_hooks(tokens, fwd_hooks=[("hook_embed", make_leaf)])[:, 5] @ direction).sum().backward()
    (leaf,) = leaves
    step = torch.zeros_like(leaf)
    step[1, 3, 7] = 1e-5
    run = lambda sign: tower.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda value, hook: value + sign * step)])
    slope = float(((run(1) - run(-1))[:, 5] @ direction).sum() / 2e-5)
    assert abs(float(leaf.grad[1, 3, 7]) - slope) <= 1e-7
    assert (leaf.grad[:, 6:] == 0).all()  # causal: nothing behind position 5
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_backward_hooks_see_gradients(tower: HookedTextTower, tokens: Tensor) -> None:
    seen = {}
    leaf = lambda value, hook: value.detach().requires_grad_()
    back = lambda gradient, hook: seen.update({hook.name: gradient.clone()})
    with tower.hooks(fwd_hooks=[("hook_embed", leaf)], bwd_hooks=[("blocks.1.hook_q_input", back)]):
        tower(tokens).sum().backward()
    assert seen["blocks.1.hook_q_input"].shape == (3, 9, HEADS, WIDTH)
    assert seen["blocks.1.hook_q_input"].abs().max() > 0


# --- layers and positions in part -----------------------------------------------------------------------------------


@contextmanager
def counted(tower: HookedTextTower) -> Iterator[list[int]]:
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
        for layer, block in enumerate(tower.blocks)
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_stopping_and_starting_at_a_layer_is_the_whole_run(layer: int, tower: HookedTextTower, tokens: Tensor) -> None:
    output, cache = tower.run_with_cache(tokens)
    with counted(tower) as calls:
        x = tower(tokens, stop_at_layer=layer)
    assert calls == list(range(layer))
    close(x, cache["resid_pre", layer] if layer < LAYERS else cache["resid_post", -1])
    with counted(tower) as calls:
        resumed = tower(x, start_at_layer=layer)
    assert calls == list(range(layer, LAYERS))
    assert torch.equal(resumed, tower(tokens))
    close(resumed, output)


def test_negative_layers_slice_as_in_hooked_transformer(tower: HookedTextTower, tokens: Tensor) -> None:
    assert torch.equal(tower(tokens, stop_at_layer=-1), tower(tokens, stop_at_layer=LAYERS - 1))
    x = tower(tokens, stop_at_layer=-2)
    assert torch.equal(x, tower(tokens, stop_at_layer=1))
    with counted(tower) as calls:
        resumed = tower(x, start_at_layer=-2)
    assert calls == [1, 2]
    assert torch.equal(resumed, tower(tokens))
    with counted(tower) as calls:
        tower(x, start_at_layer=1, stop_at_layer=2)
    assert calls == [1]
    assert torch.equal(tower(x, start_at_layer=1, stop_at_layer=1), x)


def test_stopping_caches_no_later_layer(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens, stop_at_layer=1)
    assert {name.split(".")[1] for name in cache if name.startswith("blocks.")} == {"0"}


def rest_of(cache: Any) -> Callable[[str], Tensor]:
    return lambda name: cache[name]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_some_positions_of_a_causal_run_are_the_whole_run(start: int, tower: HookedTextTower, tokens: Tensor) -> None:
    """From position 4 on, keys and values in front cached; the embedding of position 4 changed."""
    change = torch.zeros(3, 9, WIDTH, dtype=torch.float64)
    change[:, 4] = 1.0
    hook = (f"blocks.{start}.hook_resid_pre", lambda value, hook: value + change)
    expected = tower.run_with_hooks(tokens, fwd_hooks=[hook])
    _, cache = tower.run_with_cache(tokens)
    at = torch.arange(4, 9).expand(3, -1)
    x = (cache["resid_pre", start] + change)[:, 4:]
    close(tower(x, start_at_layer=start, at=at, rest=rest_of(cache)), expected[:, 4:])


def test_some_positions_may_differ_by_row(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens)
    at = torch.tensor([[2, 3, 4, 5], [5, 6, 7, 8], [0, 3, 4, 8]])
    x = cache["resid_pre", 1].gather(1, at[..., None].expand(-1, -1, WIDTH)) * 1.0
    found = tower(x, start_at_layer=1, at=at, rest=rest_of(cache))
    close(found, tower(tokens).gather(1, at[..., None].expand(-1, -1, D_EMBED)))


@pytest.mark.parametrize("start", [None, 1, LAYERS])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_reading_one_position_of_each_row(start: int | None, causal: bool, tokens: Tensor) -> None:
    tower, _ = convert(module_of(causal), name="it")
    read = torch.tensor([8, 0, 4])
    expected = tower(tokens)[torch.arange(3), read][:, None]
    x = tokens if start is None else tower(tokens, stop_at_layer=start)
    found = tower(x, start_at_layer=start, read=read)
    assert found.shape == (3, 1, D_EMBED)
    close(found, expected)


def test_reading_and_some_positions_together(tower: HookedTextTower, tokens: Tensor) -> None:
    _, cache = tower.run_with_cache(tokens)
    at, read = torch.tensor([[2, 3, 4, 5], [5, 6, 7, 8], [0, 3, 4, 8]]), torch.tensor([5, 7, 8])
    change = torch.randn(3, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change[2] = 0  # its positions are not all those behind the change
    x = cache["resid_pre", 1].gather(1, at[..., None].expand(-1, -1, WIDTH)) + change

    def whole(value: Tensor, hook: object) -> Tensor:
        return value.scatter_add(1, at[..., None].expand(-1, -1, WIDTH), change)

    # rows 0 and 1 hold every position from their change to the one that is read
    expected = tower.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", whole)])
    found = tower(x, start_at_layer=1, at=at, rest=rest_of(cache), read=read)
    close(found, expected[torch.arange(3), read][:, None])


def test_the_last_block_runs_at_the_read_position_only(tower: HookedTextTower, tokens: Tensor) -> None:
    shapes = {}
    hooks = [
        (f"blocks.{layer}.{name}", lambda value, hook: shapes.update({hook.name: value.shape[1]}))
        for layer in range(LAYERS)
        for name in ("hook_resid_post", "attn.hook_k")
    ]
    with tower.hooks(fwd_hooks=hooks):
        tower(tokens, read=torch.tensor([8, 0, 4]))
    assert [shapes[f"blocks.{layer}.hook_resid_post"] for layer in range(LAYERS)] == [9, 9, 1]
    assert [shapes[f"blocks.{layer}.attn.hook_k"] for layer in range(LAYERS)] == [9, 9, 9]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"return_type": "loss"}, "no loss"),
        ({"at": torch.zeros(3, 1, dtype=torch.long)}, "at= and rest="),
        ({"start_at_layer": 1}, "residual stream"),
    ],
)
def test_clear_errors(options: dict[str, Any], said: str, tower: HookedTextTower, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=said):
        tower(tokens, **options)


def test_too_many_positions_and_no_tokenizer(tower: HookedTextTower) -> None:
    with pytest.raises(ValueError, match=r"78 positions .* has 77"):
        tower(sample(1, 78))
    with pytest.raises(ValueError, match="no tokenizer"):
        tower("a text")


def test_one_dimension_of_tokens_is_one_text(tower: HookedTextTower, tokens: Tensor) -> None:
    assert torch.equal(tower(tokens[0]), tower(tokens[:1]))
    assert tower(tokens, return_type=None) is None


def test_moving_and_casting_keeps_the_config(tokens: Tensor) -> None:
    tower, _ = convert(module_of(causal=True), name="it")
    assert tower.cfg.dtype == torch.float64
    assert tower.to(torch.float32) is tower
    assert (tower.cfg.dtype, tower.cfg.device) == (torch.float32, "cpu")
    assert tower(tokens).dtype == torch.float32


# --- TransformerLens' own patching, against loops -------------------------------------------------------------------

SWEEPS: dict[str, tuple[Callable[..., Tensor], str, tuple[str, ...]]] = {
    "resid_pre": (patching.get_act_patch_resid_pre, "blocks.{}.hook_resid_pre", ("pos",)),
    "resid_mid": (patching.get_act_patch_resid_mid, "blocks.{}.hook_resid_mid", ("pos",)),
    "attn_out": (patching.get_act_patch_attn_out, "blocks.{}.hook_attn_out", ("pos",)),
    "mlp_out": (patching.get_act_patch_mlp_out, "blocks.{}.hook_mlp_out", ("pos",)),
    "z": (patching.get_act_patch_attn_head_out_all_pos, "blocks.{}.attn.hook_z", ("head",)),
    "q": (patching.get_act_patch_attn_head_q_all_pos, "blocks.{}.attn.hook_q", ("head",)),
    "k": (patching.get_act_patch_attn_head_k_all_pos, "blocks.{}.attn.hook_k", ("head",)),
    "v": (patching.get_act_patch_attn_head_v_all_pos, "blocks.{}.attn.hook_v", ("head",)),
    "z by pos": (patching.get_act_patch_attn_head_out_by_pos, "blocks.{}.attn.hook_z", ("pos", "head")),
    "q by pos": (patching.get_act_patch_attn_head_q_by_pos, "blocks.{}.attn.hook_q", ("pos", "head")),
    "k by pos": (patching.get_act_patch_attn_head_k_by_pos, "blocks.{}.attn.hook_k", ("pos", "head")),
    "v by pos": (patching.get_act_patch_attn_head_v_by_pos, "blocks.{}.attn.hook_v", ("pos", "head")),
    "pattern": (patching.get_act_patch_attn_head_pattern_all_pos, "blocks.{}.attn.hook_pattern", ("pattern head",)),
    "pattern by pos": (
        patching.get_act_patch_attn_head_pattern_by_pos,
        "blocks.{}.attn.hook_pattern",
        ("pattern head", "pos"),
    ),
    "pattern from pos to pos": (
        patching.get_act_patch_attn_head_pattern_dest_src_pos,
        "blocks.{}.attn.hook_pattern",
        ("pattern head", "pos", "pos"),
    ),
}


@torch.no_grad()
def run_by_hand(module: Any, tokens: Tensor, edits: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """A run of an open_clip tower with edits of q, k, v, pattern, z, of what is written, or of the residual stream."""
    edit = lambda name, value: edits.get(name, lambda same: same)(value)
    n_pos = tokens.shape[1]
    x = module.token_embedding(tokens) + module.positional_embedding[:n_pos]
    for layer, block in enumerate(module.transformer.resblocks):
        here = f"blocks.{layer}."
        x = edit(here + "hook_resid_pre", x)
        packed = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        parts = [part.reshape(len(tokens), n_pos, HEADS, D_HEAD) for part in packed.chunk(3, dim=-1)]
        q, k, v = (edit(f"{here}attn.hook_{name}", part) for name, part in zip("qkv", parts, strict=True))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / D_HEAD**0.5 + module.attn_mask[:n_pos, :n_pos]
        pattern = edit(here + "attn.hook_pattern", scores.softmax(-1))
        z = edit(here + "attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        x = x + edit(here + "hook_attn_out", block.attn.out_proj(z.flatten(2)))
        x = edit(here + "hook_resid_mid", x)
        x = x + edit(here + "hook_mlp_out", block.mlp(block.ln_2(x)))
    return module.ln_final(x) @ module.text_projection


@pytest.mark.parametrize("sweep", SWEEPS)
def test_transformer_lens_patching_agrees_with_a_loop(
    sweep: str, module: nn.Module, tower: HookedTextTower, tokens: Tensor, other: Tensor
) -> None:
    function, hook, axes = SWEEPS[sweep]
    tokens, other = tokens[:, :4], other[:, :4]
    direction = torch.randn(D_EMBED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric = lambda y: (F.normalize(y[:, -1], dim=-1) @ direction).sum()
    _, clean = tower.run_with_cache(other)
    found = function(tower, tokens, clean, metric)
    wanted = by_hand(module, other)
    sizes = {"pos": 4, "head": HEADS, "pattern head": HEADS}
    expected = torch.zeros(LAYERS, *(sizes[axis] for axis in axes))
    for index in torch.cartesian_prod(*(torch.arange(size) for size in expected.shape)).tolist():
        name = hook.format(index[0])
        where = (slice(None), index[1]) if axes != ("head",) else (slice(None), slice(None), index[1])
        where = (slice(None), *index[1:]) if len(axes) > 1 else where

        def put(value: Tensor, name: str = name, where: tuple[Any, ...] = where) -> Tensor:
            value = value.clone()
            value[where] = wanted[name][where]
            return value

        expected[tuple(index)] = metric(run_by_hand(module, tokens, {name: put}))
    assert found.shape == expected.shape
    close(found, expected, 2e-6)  # TransformerLens keeps its results in float32
    assert float((expected - metric(tower(tokens))).abs().max()) > 1e-3


# --- who intervenes, and whose turn it is ---------------------------------------------------------------------------


def double(value: Tensor, hook: object) -> Tensor:
    return 2 * value


def test_hooks_of_every_kind_are_named_while_they_are_on() -> None:
    tower, _ = convert(random_clip(layers=2), name="it")
    assert tower.hooked == ()
    name = "blocks.1.attn.hook_z"
    with tower.hooks(fwd_hooks=[(name, double)]):
        assert tower.hooked == (name,)
    with tower.hooks(bwd_hooks=[(name, double)]):
        assert tower.hooked == (name,)
    assert tower.hooked == ()
    tower.add_perma_hook(name, double)
    tower.reset_hooks()
    assert tower.hooked == (name,)
    tower.reset_hooks(including_permanent=True)
    registered = {
        "blocks.0.mlp": "register_forward_hook",
        "blocks.1": "register_forward_pre_hook",
        "ln_final": "register_full_backward_hook",
        "": "register_full_backward_pre_hook",
    }
    handles = [getattr(tower.get_submodule(module), kind)(lambda *of_any: None) for module, kind in registered.items()]
    assert set(tower.hooked) == set(registered)
    for handle in handles:
        handle.remove()
    tower.blocks[0].mlp.forward = lambda x: 0 * x  # type: ignore[method-assign]
    assert tower.hooked == ("blocks.0.mlp",)


def test_a_tower_and_its_copies_have_turns_of_their_own(tower: HookedTextTower, tokens: Tensor) -> None:
    expected = tower(tokens)
    for again in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert again.turn is not tower.turn
        with tower.hooks(fwd_hooks=[("hook_embed", double)]), ThreadPoolExecutor(1) as pool:
            found = pool.submit(again, tokens).result(timeout=60)
        assert torch.equal(found, expected)


def test_a_run_in_another_thread_waits_for_hooks_to_go(tower: HookedTextTower, tokens: Tensor) -> None:
    """Whatever runs the tower or looks at its hooks finds it as its own thread left it."""
    expected, embedded = tower(tokens), tower.embed(tokens)
    waiting = [
        partial(tower, tokens),
        partial(tower.forward, tokens),
        partial(tower.run_with_hooks, tokens),
        partial(tower.embed, tokens),
        lambda: tower.hooked,
        lambda: tower.run_with_cache(tokens, names_filter="hook_embed")[0],
        tower.reset_hooks,
    ]
    with ThreadPoolExecutor(len(waiting)) as pool:
        with tower.hooks(fwd_hooks=[("hook_embed", double)]):
            futures = [pool.submit(call) for call in waiting]
            done, _ = wait(futures, timeout=0.2)
            assert not done and tower.hooked == ("hook_embed",)
            assert not torch.equal(tower(tokens), expected)
        plain, forward, hooked, embed, names, cached, _ = (future.result(timeout=60) for future in futures)
    assert all(torch.equal(found, expected) for found in (plain, forward, hooked, cached))
    assert torch.equal(embed, embedded) and names == ()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_the_config_knows_however_the_tower_was_cast(cast: str) -> None:
    tower, _ = convert(random_clip(layers=1), name="it")
    assert getattr(tower, cast)().cfg.dtype == tower.W_E.dtype != torch.float32
