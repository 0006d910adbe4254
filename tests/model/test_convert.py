"""Every text tower of open_clip's that is supported gives what open_clip's own `encode_text` gives."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from towers import VISION, random_clip, randomise

from clip_lens.model.convert import Pool, convert

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Of the largest component of an embedding."""


def config_of(name: str, **reduced: Any) -> dict[str, Any]:
    """open_clip's config of a model, its image tower a toy: what is left is the text tower, as built in."""
    config = open_clip.get_model_config(name)
    text = {key: value for key, value in config["text_cfg"].items() if "tokenizer" not in key}
    return {**config, "vision_cfg": VISION, "text_cfg": {**text, **reduced}}


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    make = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    return randomise(make(**arguments), seed)


def tokens_for(text: dict[str, Any], n: int = 3) -> Tensor:
    """Random ids with an end of text (the highest id, and the eos id) at another place in each row, then padding."""
    n_ctx, d_vocab = text.get("context_length", 77), text.get("vocab_size", 49408)
    tokens = torch.randint(3, d_vocab - 1, (n, n_ctx), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((n_ctx // 4, n_ctx // 2, n_ctx - 1)[:n]):
        tokens[row, end:] = 0
        tokens[row, end] = text.get("eos_id", 2) if text.get("pool_type") == "eos" else d_vocab - 1
    return tokens


@torch.no_grad()
def disagreement(module: nn.Module, tokens: Tensor) -> float:
    tower, pool = convert(module, name="it")
    expected = (module.encode_text if hasattr(module, "encode_text") else module)(tokens)
    found = tower(tokens)[torch.arange(len(tokens)), pool(tokens)]
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def assert_parity(module: nn.Module, tokens: Tensor) -> None:
    for dtype, tolerance in TOLERANCE.items():
        assert disagreement(module.to(dtype), tokens) <= tolerance, dtype


def supported() -> dict[str, list[str]]:
    """The distinct text towers among open_clip's configs -> the names that have each."""
    towers: dict[str, list[str]] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config:
            continue
        width = config["text_cfg"]["width"]
        reduced = config_of(name, layers=2 if width <= 768 else 1, vocab_size=500)
        towers.setdefault(json.dumps(reduced, sort_keys=True), []).append(name)
    return towers


SUPPORTED = supported()


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14"])
def test_full_size(name: str) -> None:
    config = config_of(name)
    assert_parity(build(config), tokens_for(config["text_cfg"], 2))


@pytest.mark.parametrize("config", SUPPORTED, ids=[names[0] for names in SUPPORTED.values()])
def test_builtin_configs(config: str) -> None:
    chosen = json.loads(config)
    assert_parity(build(chosen), tokens_for(chosen["text_cfg"]))


def test_builtin_configs_are_all_covered() -> None:
    covered = {name for names in SUPPORTED.values() for name in names}
    left = set(open_clip.list_models()) - covered
    assert len(covered) >= 131
    assert len(left) <= 13
    for name in left:
        config = open_clip.get_model_config(name)
        assert "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config


OPTIONS: dict[str, dict[str, Any]] = {
    "layer scale": {"ls_init_value": 1e-5},
    "projection with a bias": {"proj_bias": True},
    "no projection": {"proj_type": "none"},
    "pooled at eos": {"pool_type": "eos", "eos_id": 2},
    "pooled at the last": {"pool_type": "last"},
    "pooled at the last, bidirectional": {"pool_type": "last", "no_causal_mask": True},
    "pooled at the first, bidirectional": {"pool_type": "first", "no_causal_mask": True},
    "bidirectional": {"no_causal_mask": True},
    "tanh GELU": {"act_kwargs": {"approximate": "tanh"}},
    "eps 1e-6": {"norm_kwargs": {"eps": 1e-6}},
    "large eps": {"norm_kwargs": {"eps": 0.3}},
    "wide MLP": {"mlp_ratio": 3.7362},
    "d_head 72": {"width": 144, "heads": 2},
    "short context": {"context_length": 9},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_options(option: str, custom: bool) -> None:
    text = {"context_length": 20, "vocab_size": 300, "width": 64, "heads": 4, "layers": 3} | OPTIONS[option]
    module = build({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": text, "custom_text": custom})
    assert_parity(module, tokens_for(text))


@pytest.mark.parametrize(
    ("changed", "back"),
    [
        (
            {"ls_init_value": 1e-5},
            lambda text: [block.register_module("ls_1", nn.Identity()) for block in blocks_of(text)],
        ),
        ({"act_kwargs": {"approximate": "tanh"}}, lambda text: [set_gelu(block) for block in blocks_of(text)]),
        ({"norm_kwargs": {"eps": 1e-3}}, lambda text: setattr(text.ln_final, "eps", 1e-5)),
        ({"proj_bias": True}, lambda text: nn.init.zeros_(text.text_projection.bias)),
    ],
    ids=["layer scale", "tanh", "eps", "projection bias"],
)
def test_the_yardstick_sees_each_option(changed: dict[str, Any], back: Any) -> None:
    """A tower that ignored one of these would be caught: the option moves the embedding by far more than is allowed."""
    text = {
        "context_length": 20,
        "vocab_size": 300,
        "width": 64,
        "heads": 4,
        "layers": 3,
        "pool_type": "last",
    } | changed
    module = build({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": text, "custom_text": True}).double()
    tokens = tokens_for(text)
    with torch.no_grad():
        tower, pool = convert(module, name="it")
        back(module.text)
        expected = module.encode_text(tokens)
        found = tower(tokens)[torch.arange(len(tokens)), pool(tokens)]
    assert (found - expected).abs().max() / expected.abs().max() > 1e-5


def blocks_of(text: nn.Module) -> Any:
    return text.transformer.resblocks


def set_gelu(block: Any) -> None:
    block.mlp.gelu = nn.GELU()


def test_a_text_transformer_by_itself() -> None:
    module = randomise(TextTransformer(context_length=20, vocab_size=300, width=64, heads=4, layers=2, output_dim=24))
    assert_parity(module, tokens_for({"context_length": 20, "vocab_size": 300}))


def test_config_is_read_from_the_module() -> None:
    tower, pool = convert(random_clip(layers=2, heads=2, width=48, d_embed=20), name="mine")
    cfg = tower.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp) == (2, 2, 48, 24, 192)
    assert (cfg.n_ctx, cfg.d_vocab, cfg.d_vocab_out, cfg.act_fn) == (77, 49408, 20, "quick_gelu")
    assert (cfg.attention_dir, cfg.normalization_type, cfg.model_name) == ("causal", "LN", "mine")
    assert (cfg.eps, cfg.dtype, pool) == (1e-5, torch.float32, Pool("argmax"))


@pytest.mark.parametrize(
    ("act", "name"),
    [({}, "gelu"), ({"approximate": "tanh"}, "gelu_pytorch_tanh")],
)
def test_activation_names(act: dict[str, str], name: str) -> None:
    tower, _ = convert(random_clip(causal=False, act_kwargs=act, norm_kwargs={"eps": 1e-6}), name="it")
    assert (tower.cfg.act_fn, tower.cfg.eps) == (name, 1e-6)
    assert tower.cfg.attention_dir == "bidirectional"


def test_the_module_is_left_as_it_is_and_not_shared() -> None:
    module = random_clip(ls_init_value=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tower, _ = convert(module, name="it")
    pointers = {value.data_ptr() for value in module.state_dict().values()}
    assert not pointers & {parameter.data_ptr() for parameter in tower.parameters()}
    assert not set(module.modules()) & set(tower.modules())
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any(hasattr(part, "name") for part in module.modules())


def small_text(**options: Any) -> nn.Module:
    sizes = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "output_dim": 8}
    return TextTransformer(**{**sizes, **options})


def with_part(part: str, value: object, module: nn.Module) -> nn.Module:
    owner, _, name = part.rpartition(".")
    setattr(module.get_submodule(owner), name, value)
    return module


def coca() -> nn.Module:
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "embed_cls": True}
    decoder = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    return open_clip.CoCa(32, decoder, text, vision)


def hugging_face() -> nn.Module:
    import transformers
    from open_clip.hf_model import HFTextEncoder

    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return HFTextEncoder("roberta", output_dim=8, config=transformers.RobertaConfig(**sizes), pretrained=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (coca, "CoCa"),
        (hugging_face, "Hugging Face"),
        (lambda: small_text(embed_cls=True), "class embedding"),
        (lambda: small_text(use_pad_mask=True, no_causal_mask=True), "padding mask"),
        (lambda: small_text(qk_norm=True), "attention of type Attention"),
        (lambda: small_text(scale_fc=True), "attention of type Attention"),
        (lambda: small_text(pool_type="none"), "pooling 'none'"),
        (lambda: with_part("ln_final", nn.RMSNorm(32), small_text()), "RMSNorm"),
        (lambda: with_part("attn_mask", torch.zeros(16, 16), small_text()), "mask"),
        (lambda: nn.Linear(2, 2), "Linear"),
    ],
    ids=["CoCa", "HF", "class", "pad mask", "qk norm", "scale fc", "no pooling", "RMS norm", "odd mask", "no tower"],
)
def test_refuses_by_name(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert(make(), name="this one")


@pytest.mark.parametrize(
    ("pool", "expected"),
    [(Pool("argmax"), [2, 0]), (Pool("eos", 7), [1, 0]), (Pool("last"), [3, 3]), (Pool("first"), [0, 0])],
)
def test_pool(pool: Pool, expected: list[int]) -> None:
    assert pool(torch.tensor([[5, 7, 9, 7], [9, 3, 9, 0]])).tolist() == expected
