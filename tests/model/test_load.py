"""Loading: what is handed out is the original, or there is one readable error."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from towers import VISION, random_clip, randomise

import clip_lens.model.load as loading
from clip_lens.model.load import load
from clip_lens.originals.open_clip import Original, digest, open_original

TEXTS = ["There are no circles.", "There is a red square.", "", "zeppelins over a pond"]


def tokenizer() -> Any:
    return open_clip.SimpleTokenizer()


@torch.no_grad()
def disagreement(encoder: loading.HookedTextEncoder, module: Any) -> float:
    tokens = tokenizer()(TEXTS)
    expected = module.eval().encode_text(tokens, normalize=True)
    return float((encoder(tokens) - expected).abs().max())


def test_the_embedded_model_is_open_clips() -> None:
    encoder, original = load(), open_original("tiny")
    assert disagreement(encoder, original.module) <= 1e-6
    assert (encoder.name, encoder.pretrained, encoder.full_name) == ("tiny", None, "tiny")
    assert abs(encoder.scale - float(original.module.logit_scale.detach().exp())) <= 1e-5
    assert encoder.image_digest == digest(original.module.visual.state_dict())
    assert encoder.digest == load().digest


def test_an_untrained_model_by_name() -> None:
    torch.manual_seed(0)
    encoder = load("ViT-S-32-alt", pretrained="random")
    assert encoder.full_name == "ViT-S-32-alt (random)"
    assert (encoder.n_layers, encoder.n_heads, encoder.d_embed, encoder.causal) == (10, 4, 256, True)
    torch.manual_seed(0)
    module = open_clip.create_model("ViT-S-32-alt")
    assert disagreement(encoder, module) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_in_memory_is_left_as_it_is(dtype: torch.dtype) -> None:
    module = random_clip(layers=2)
    module.train()
    module.visual.eval()
    module.transformer.resblocks[0].eval()
    module.ln_final.weight.requires_grad_(False)
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    encoder = load(module, tokenizer=tokenizer(), dtype=dtype)
    assert [part.training for part in module.modules()] == modes
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["ln_final.weight"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not set(module.modules()) & set(encoder.tower.modules())
    plain = encoder(TEXTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(encoder(TEXTS), plain)
    assert encoder.dtype == dtype and encoder.name == "CLIP in memory"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True], ids=["all half", "norms in float32"])
def test_half_precision_weights_are_taken_exactly(dtype: torch.dtype, mixed: bool) -> None:
    """A module in half precision gives the encoder of the same weights in float32, and stays in half precision."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    module = randomise(open_clip.CLIP(32, dict(VISION), text, cast_dtype=dtype if mixed else None))
    open_clip.model.convert_weights_to_lp(module, dtype=dtype) if mixed else module.to(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    encoder = load(module, tokenizer=tokenizer())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert encoder.dtype == torch.float32
    assert disagreement(encoder, module.float()) <= 1e-6
    assert encoder.image_digest == digest(module.visual.state_dict())


def test_the_image_tower_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def remember(*args: Any, **options: Any) -> Original:
        original = open_original(*args, **options)
        seen.append(weakref.ref(original.module.visual))
        seen.append(weakref.ref(original.module))
        return original

    monkeypatch.setattr(loading, "open_original", remember)
    encoder = load()
    gc.collect()
    assert len(seen) == 2
    assert [reference() for reference in seen] == [None, None]
    tower, d = encoder.tower, 128
    d_mlp = tower.cfg.d_mlp
    blocks = 6 * (4 * d**2 + 2 * d * d_mlp + 5 * d + d_mlp + 4 * d)  # weights, biases, two norms
    rest = (tower.cfg.d_vocab + tower.cfg.n_ctx) * d + 2 * d + d * d + d  # tables, last norm, projection
    assert sum(parameter.numel() for parameter in tower.parameters()) == blocks + rest


def test_logit_scale_however_it_is_kept() -> None:
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1}
    module = randomise(open_clip.CLIP(32, dict(VISION), text, nonscalar_logit_scale=True, init_logit_bias=-10))
    assert abs(load(module).scale - 20.0855) <= 1e-3
    alone = open_clip.transformer.TextTransformer(layers=1, width=64, heads=4)
    assert load(alone, scale=1).scale == 1.0
    with pytest.raises(ValueError, match=r"TextTransformer in memory has no logit scale with it; give scale="):
        load(alone)
    with pytest.raises(ValueError, match=r"CLIP in memory has its own scale, 20.09, got scale=1; leave it out"):
        load(module, scale=1)


# --- the check ------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A block that does something else than its parts say."""

    def __init__(self, block: nn.Module, factor: float):
        super().__init__()
        self.block, self.factor = block, factor
        for name, part in block.named_children():
            setattr(self, name, part)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return x + self.factor * (self.block(x, **options) - x)


@pytest.mark.parametrize("tokenized", [True, False], ids=["tokenizer", "no tokenizer"])
@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 49407}, {"pool_type": "last"}])
def test_a_tower_with_a_part_that_is_not_reproduced_is_refused(text: dict[str, Any], tokenized: bool) -> None:
    module = random_clip(layers=2, **text)
    load(module, tokenizer=tokenizer() if tokenized else None)
    module.transformer.resblocks[1] = Doubled(module.transformer.resblocks[1], 1.2)
    with pytest.raises(ValueError, match=r"CLIP in memory: .*disagrees .* by 0\.\d+ of the largest .*allowed 0.0001"):
        load(module, tokenizer=tokenizer() if tokenized else None)


@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 49407}], ids=["argmax", "eos"])
def test_the_check_reads_attention_even_without_a_tokenizer(text: dict[str, Any]) -> None:
    module = random_clip(layers=2, **text)

    def no_mixing(q_x: Tensor, **ignored: Any) -> Tensor:
        """Each position attends to itself alone: right at position 0, wrong everywhere else."""
        attn = module.transformer.resblocks[0].attn
        value = q_x @ attn.in_proj_weight[128:].T + attn.in_proj_bias[128:]
        return attn.out_proj(value)

    module.transformer.resblocks[0].attention = no_mixing
    with pytest.raises(ValueError, match="disagrees"):
        load(module)


def test_a_small_difference_is_measured() -> None:
    module = random_clip(layers=2)
    module.transformer.resblocks[1] = Doubled(module.transformer.resblocks[1], 1.001)
    with pytest.raises(ValueError, match=r"by 0\.000\d+ of"):
        load(module, tokenizer=tokenizer())
    module.transformer.resblocks[1].factor = 1 + 1e-6
    load(module, tokenizer=tokenizer())


def test_a_part_that_gives_nan_is_refused() -> None:
    module = random_clip(layers=1)
    with torch.no_grad():
        module.ln_final.bias[0] = float("nan")
    with pytest.raises(ValueError, match="by nan of"):
        load(module, tokenizer=tokenizer())


def test_output_tokens() -> None:
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1, "output_tokens": True}
    module = randomise(open_clip.CustomTextCLIP(32, dict(VISION), text))
    encoder = load(module, tokenizer=tokenizer())
    pooled, _ = module.text(tokenizer()(TEXTS))
    assert (encoder(TEXTS) - pooled / pooled.norm(dim=-1, keepdim=True)).abs().max() <= 1e-6


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_can_not_be_loaded() -> None:
    with pytest.raises(ValueError, match=r"weights with it; pretrained= goes with a model's name"):
        load(random_clip(layers=1), pretrained="openai")
    with pytest.raises(ValueError, match="Linear is no open_clip text tower"):
        load(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"context_length": 16}, r"gives 77 positions and ids up to 49407, the tower has 16 positions"),
        ({"vocab_size": 100}, r"ids up to 49407, the tower has 77 positions and 100 ids"),
    ],
)
def test_a_tokenizer_that_does_not_fit(text: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(random_clip(layers=1, **text), tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("roberta-ViT-B-32", "Hugging Face"),
        ("mt5-base-ViT-B-32", "Hugging Face"),
        ("nllb-clip-base-siglip", "Hugging Face"),
        ("coca_roberta-ViT-B-32", "Hugging Face"),
        ("coca_ViT-L-14", "CoCa"),
        ("coca_base", "CoCa"),
    ],
)
def test_unsupported_towers_are_refused_before_anything_is_built(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_original", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(ValueError, match=f"{name}: .*{said}.* supported"):
        load(name, pretrained="random")


def test_a_tokenizer_of_ones_own_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *args, **options: pytest.fail("asked for the model's own"))
    encoder = load("ViT-S-32-alt", pretrained="random", tokenizer=tokenizer())
    assert encoder(TEXTS).shape == (4, 256)
    assert load(tokenizer=tokenizer())(["There are no circles."]).shape == (1, 128)
