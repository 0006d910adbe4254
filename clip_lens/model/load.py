"""`load`: a model's name, a checkpoint or a module in memory -> `HookedTextEncoder`, checked against the original."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clip_lens.model.convert import Pool, convert
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.tower import HookedTextTower
from clip_lens.openclip import Original, digest, open_original

TOLERANCE = 1e-4
PROBES = ("There are no circles.", "There is a red square and no blue star.", "A picture.", "")


def load(
    name: str | nn.Module = "tiny",
    *,
    pretrained: str | None = None,
    tokenizer: Callable[..., Tensor] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedTextEncoder:
    """The hooked text encoder of a CLIP model; its image tower is dropped.

    `name` is "tiny" (the embedded model), a model of open_clip's (`pretrained`: a tag, a checkpoint's path, or "random"),
    open_clip's `local-dir:PATH` and `hf-hub:ORG/REPO`, or an open_clip module in memory, which is copied and left as it is.
    The copy is compared with the original on a few texts before it is handed out.

    Raises:
        ValueError: an unknown model or tag, weights that can't be read, a tower that is not supported, or a copy that
            disagrees with the original (the message has the measured difference).

    Example:
        >>> clip_lens.load()
        HookedTextEncoder(tiny: 6 layers x 4 heads, d_model 128, d_embed 128, causal, pooled at argmax, scale ...)
    """
    if isinstance(name, nn.Module):
        if pretrained is not None:
            raise ValueError("a module in memory has its weights with it; pretrained= goes with a model's name")
        title = f"{type(name).__name__} in memory"
        original = Original(name, tokenizer, None, title, None)  # type: ignore[arg-type]
    else:
        original = open_original(name, pretrained=pretrained)
        original = original if tokenizer is None else _with_tokenizer(original, tokenizer)
    encoder = _encoder(original)
    return encoder.to(device=torch.device(device), dtype=dtype)


def _with_tokenizer(original: Original, tokenizer: Callable[..., Tensor]) -> Original:
    from dataclasses import replace

    return replace(original, tokenizer=tokenizer)


def _encoder(original: Original) -> HookedTextEncoder:
    module = original.module
    visual = getattr(module, "visual", None)
    tower, pool = convert(module, name=original.name, tokenizer=original.tokenizer)
    _check(module, tower, pool, original.name)
    scale = getattr(module, "logit_scale", None)
    return HookedTextEncoder(
        tower,
        pool,
        scale=1.0 if scale is None else float(scale.detach().exp()),
        name=original.name,
        pretrained=original.pretrained,
        digest=digest(dict(tower.named_parameters())),
        image_digest=None if visual is None else digest(visual.state_dict()),
        vocabulary=original.vocabulary,
    )


@torch.no_grad()
def _check(module: nn.Module, tower: HookedTextTower, pool: Pool, name: str) -> None:
    """Refuses a copy that differs from the original's own `encode_text`, relative to the largest component."""
    tokens = _probe_tokens(tower)
    was_training = module.training
    module.eval()
    expected = (module.encode_text if hasattr(module, "encode_text") else module)(tokens)
    module.train(was_training)
    found = tower(tokens)[torch.arange(len(tokens), device=tokens.device), pool(tokens)]
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{name}: the converted tower disagrees with open_clip's own encode_text by {difference:.2g} of the largest "
            f"component (allowed {TOLERANCE:g}); this tower has a part that is not reproduced, please report it"
        )


def _probe_tokens(tower: HookedTextTower) -> Tensor:
    if tower.tokenizer is not None:
        return tower.to_tokens(list(PROBES))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(tower.cfg.d_vocab, (4, tower.cfg.n_ctx), generator=generator)
    return tokens.to(tower.W_E.device)
