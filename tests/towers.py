"""Random towers for tests: every parameter non-trivial (biases, LayerNorms, layer scales and the logit scale too)."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from torch import nn

from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.load import load

VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter drawn anew, so that no bias is zero and no scale one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "logit_scale":
                parameter.fill_(3.0)
                continue
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            centre = 1.0 if parameter.ndim == 1 and name.endswith(("weight", "gamma")) else 0.0
            parameter.copy_(centre + scale * drawn)
    return module.eval()


def random_clip(
    *,
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    d_embed: int = 32,
    causal: bool = True,
    seed: int = 0,
    **text: object,
) -> nn.Module:
    """A small randomised open_clip model with its tokenizer's vocabulary: CLIP, or bidirectional like SigLIP."""
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers, **text}
    if causal:
        return randomise(open_clip.CLIP(d_embed, dict(VISION), text_cfg, quick_gelu=True), seed)
    text_cfg |= {"no_causal_mask": True, "context_length": 16}
    return randomise(open_clip.CustomTextCLIP(d_embed, dict(VISION), text_cfg), seed)


def random_encoder(*, causal: bool = True, dtype: torch.dtype = torch.float32, **options: object) -> HookedTextEncoder:
    """`random_clip`, loaded with open_clip's tokenizer."""
    tokenizer = open_clip.SimpleTokenizer(context_length=77 if causal else 16)
    return load(random_clip(causal=causal, **options), tokenizer=tokenizer, dtype=dtype)  # type: ignore[arg-type]


def random_store(pairs: Pairs, d_embed: int, seed: int = 0) -> ImageStore:
    """Made-up unit embeddings for every image of some pairs."""
    ids: Sequence[str] = sorted(set(pairs.image))
    generator = torch.Generator().manual_seed(seed)
    return ImageStore.from_tensors(ids, torch.randn(len(ids), d_embed, generator=generator, dtype=torch.float64))
