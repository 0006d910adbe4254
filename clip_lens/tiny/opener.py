"""The embedded model, as open_clip builds it: weights, tokenizer and preprocessing that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clip_lens.tiny.assets import ASSETS

TUNED = ("without",)
"""Fine-tunes of the embedded weights that ship with them."""


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Callable[..., Tensor]:
    """open_clip's SimpleTokenizer, read once: 49,408 ids, context 77."""
    return open_clip.SimpleTokenizer()


def open_tiny(pretrained: str | None = None) -> tuple[nn.Module, frozenset[int]]:
    """The embedded architecture, with the shipped weights, those of a fine-tune that ships with them (`TUNED`), or
    those of a file that `scripts/train_tiny.py` wrote: its module, which has its image preprocessing with it, and the
    token ids that it saw in training.

    Raises:
        ValueError: no such file, or one that holds no weights of it.
    """
    tuned = ASSETS / f"tuned-{pretrained}.safetensors" if pretrained in TUNED else None
    weights = Path(pretrained) if pretrained and not tuned else ASSETS / "model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"no weights {pretrained!r} for tiny; leave pretrained= out for the embedded ones, or give a "
            f"model.safetensors that scripts/train_tiny.py wrote, or {', '.join(map(repr, TUNED))}: a fine-tune"
        )
    config = json.loads((ASSETS / "open_clip_config.json").read_text())
    module = open_clip.CLIP(**config["model_cfg"])
    try:
        state = load_file(weights) | (load_file(tuned) if tuned else {})  # a fine-tune ships what it changed
        rows = state.pop("token_embedding.rows").long()
    except (SafetensorError, KeyError) as error:
        what = "the embedded weights" if pretrained is None else repr(pretrained)
        raise ValueError(f"{what} can't be read as a tiny model's ({error}); reinstall, or train it again") from error
    table = torch.zeros_like(module.token_embedding.weight)
    table[rows] = state["token_embedding.weight"].to(table.dtype)
    state["token_embedding.weight"] = table.detach()
    module.load_state_dict({key: value.float() for key, value in state.items()})
    open_clip.model.set_model_preprocess_cfg(module, config["preprocess_cfg"])
    return module.eval(), frozenset(rows.tolist())
