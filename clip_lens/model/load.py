"""`load`: a name, a checkpoint, a folder or a module in memory -> `HookedTextEncoder`, checked against the original."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from clip_lens.model.convert import Pool, convert
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.tower import HookedTextTower
from clip_lens.originals.open_clip import Original, Preparation, builtin_config, digest, open_module, open_original
from clip_lens.originals.transformers import SUPPORTED

TOLERANCE = 1e-4
PROBES = ("There are no circles.", "There is a red square and no blue star.", "A picture.", "")


def load(
    name: str | os.PathLike[str] | nn.Module = "tiny",
    pretrained: str | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    scale: float | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    like: str | None = None,
    quick_gelu: bool | None = None,
) -> HookedTextEncoder:
    """The hooked text encoder of a CLIP model; its image tower is dropped.

    `name` is "tiny" (the embedded model), a model of open_clip's (`pretrained`: a tag, a checkpoint's path, "random" or
    "random:SEED"), open_clip's `local-dir:PATH` and `hf-hub:ORG/REPO`, or a module of either library or of OpenAI's
    `clip` package in memory, which is copied and left as it is. Of transformers' models CLIP, SigLIP, SigLIP 2,
    MetaCLIP 2, CLIPSeg, X-CLIP and their text models go by the path of a folder that `save_pretrained` wrote, or by a
    repository's name in Hugging Face's cache ("openai/clip-vit-base-patch32"); nothing is downloaded. The copy is
    compared with the original on a few texts before it is handed out.

    A checkpoint's file does not tell which activation it was trained with: `like` is the tag of open_clip's that it is
    used like (a fine-tuned "openai": `like="openai"`), `quick_gelu` says it directly. Without them the file itself is
    asked, what lies beside it, and the name; a guess is warned of, and `encoder.notes` say where it is from.

    `dtype` is what the tower runs in; None leaves the weights as they are read: float32, also where a file or a module
    holds half precision, and float64 of a module in memory that is in float64. In bfloat16 and float16 it is the tower
    alone that is imprecise: embeddings, metrics and sums are float32.

    `tokenizer` takes the place of the model's own, and a module in memory has none without it; it is called as
    open_clip's are, or is one of transformers'. `scale`, exp(logit_scale), is for a text tower that came alone and so
    without one. A SigLIP's logit bias is left out: it cancels in every difference of logits.

    Raises:
        ValueError: an unknown model or tag, files that can't be read, a tower that is not supported, no `scale` or two,
            or a copy that disagrees with the original (the message has the measured difference).

    Example:
        >>> clip_lens.load()
        HookedTextEncoder(tiny: 6 layers x 4 heads, d_model 128, d_embed 128, causal, pooled at argmax, scale ...)
    """
    if isinstance(name, nn.Module):
        if (pretrained, like, quick_gelu) != (None, None, None):
            raise ValueError("a module in memory has its weights with it; pretrained= goes with a model's name")
        original = open_module(name, tokenizer=tokenizer)
    else:
        name = os.fspath(name)
        _refuse_early(name)
        original = open_original(name, pretrained=pretrained, tokenizer=tokenizer, like=like, quick_gelu=quick_gelu)
    for doubt in original.doubts:
        warnings.warn(doubt, stacklevel=2)
    encoder = _encoder(original, scale)
    return encoder.to(device=torch.device(device), dtype=dtype)


def _refuse_early(name: str) -> None:
    """The towers that `convert` refuses, before their weights are downloaded."""
    config = builtin_config(name)
    if "hf_model_name" in config.get("text_cfg", {}):
        raise ValueError(
            f"{name}: its text tower is a Hugging Face model; open_clip's own are supported, and {SUPPORTED}"
        )
    if "multimodal_cfg" in config:
        raise ValueError(f"{name}: CoCa's text tower (class embedding, padding mask) is not supported")


def _encoder(original: Original, scale: float | None) -> HookedTextEncoder:
    module = _full_precision(original.module)
    visual = getattr(original.module, "visual", None)
    tower, pool = convert(module, name=original.name, tokenizer=original.tokenizer)
    _check(module, tower, pool, original.name)
    return HookedTextEncoder(
        tower,
        pool,
        scale=_scale(module, scale, original.name),
        name=original.name,
        pretrained=original.pretrained,
        image_digest=None if visual is None else digest(visual.state_dict()),
        preparation=_preparation(original),
        vocabulary=original.vocabulary,
        notes=original.notes,
    )


def _preparation(original: Original) -> Preparation | None:
    """How the original's images are prepared, unless that is a guess."""
    known = isinstance(original.preprocess, Preparation) and not original.image_doubts
    return cast(Preparation, original.preprocess) if known else None


def _scale(module: Any, given: float | None, name: str) -> float:
    logit_scale = getattr(module, "logit_scale", None)
    if logit_scale is not None:
        own = float(logit_scale.detach().exp())
        if given is not None:
            raise ValueError(f"{name} has its own scale, {own:.4g}, got scale={given:g}; leave it out")
        return own
    if given is None:
        raise ValueError(
            f"{name} has no logit scale with it; give scale=, the exp(logit_scale) of the whole model (100 for most "
            "CLIPs), or scale=1 for cosines in the place of logits"
        )
    return float(given)


def _full_precision(module: nn.Module) -> nn.Module:
    """The module itself, or a copy of its text tower with half precision weights in float32, which holds them exactly:
    compared at half precision, nothing could be told from rounding."""
    visual = getattr(module, "visual", None)
    image = set() if visual is None else set(visual.parameters())
    if all(parameter.dtype in (torch.float32, torch.float64) for parameter in set(module.parameters()) - image):
        return module
    # The `clip` package asks its first convolution which precision to run in.
    dropped = [] if visual is None else [part for part in visual.children() if not isinstance(part, nn.Conv2d)]
    memo: dict[int, nn.Module] = {id(part): nn.Identity() for part in dropped}
    return copy.deepcopy(module, memo).float()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def _check(module: Any, tower: HookedTextTower, pool: Pool, name: str) -> None:
    """Refuses a copy that differs from the original's own `encode_text`, relative to the largest component."""
    tokens = _probe_tokens(tower, pool, name)
    with _evaluating(module):
        expected = (module.encode_text if hasattr(module, "encode_text") else module)(tokens)
    if isinstance(expected, tuple):  # output_tokens: (pooled, tokens)
        expected = expected[0]
    found = tower(tokens)[torch.arange(len(tokens), device=tokens.device), pool(tokens)]
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{name}: the converted tower disagrees with the original's own text embeddings by {difference:.2g} of the "
            f"largest component (allowed {TOLERANCE:g}); this tower has a part that is not reproduced, please report it"
        )


def _probe_tokens(tower: HookedTextTower, pool: Pool, name: str) -> Tensor:
    n_ctx, d_vocab = tower.cfg.n_ctx, tower.cfg.d_vocab
    if tower.tokenizer is not None:
        tokens = tower.to_tokens(list(PROBES))
        if tokens.shape[1] != n_ctx or int(tokens.max()) >= d_vocab:
            raise ValueError(
                f"the tokenizer does not fit {name}: it gives {tokens.shape[1]} positions and ids up to "
                f"{int(tokens.max())}, the tower has {n_ctx} positions and {d_vocab} ids"
            )
        if pool.eos_id is not None and not bool(tokens.eq(pool.eos_id).any(1).all()):
            raise ValueError(
                f"the tokenizer does not fit {name}: its texts don't have the end, {pool.eos_id}, to pool at"
            )
        return tokens
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(d_vocab, (4, n_ctx), generator=generator)
    tokens[:, -1] = d_vocab - 1 if pool.eos_id is None else pool.eos_id  # pooled late: it reads all that can differ
    return tokens.to(tower.W_E.device)
