"""The doorway for names: a name and weights in, the original model, its tokenizer and its preprocessing out.

open_clip's models are opened here, a folder that transformers saved in `clip_lens.originals.transformers`. Both towers
come this way: `clip_lens.load` converts the text tower, `clip_lens.embed_images` runs the image tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from clip_lens.originals.original import Original, in_one_line, quiet
from clip_lens.originals.original import digest as digest
from clip_lens.originals.transformers import open_folder
from clip_lens.tiny.opener import open_tiny, tiny_tokenizer

RANDOM = "random"


def open_original(
    name: str = "tiny",
    *,
    pretrained: str | None = None,
    tokenizer: Callable[..., Tensor] | None = None,
    with_tokenizer: bool = True,
) -> Original:
    """The model `name` with weights, both towers, float32, on the CPU, in evaluation mode.

    `pretrained` is a tag of open_clip's (`open_clip.list_pretrained()`), the path of a checkpoint (.pt, .safetensors),
    or "random" for untrained weights. `name` may also be "tiny" (the embedded model; `pretrained` may be weights that
    `scripts/train_tiny.py` wrote with another seed) or open_clip's `local-dir:PATH` and `hf-hub:ORG/REPO`, which bring
    their weights with them, or the path of a folder that transformers' `save_pretrained` wrote, which does too. A
    `tokenizer` takes the place of the model's own, which may have to be downloaded; `with_tokenizer=False` does
    without, for work on images alone.

    A tag that was trained with QuickGELU gets it, whatever the model's configuration says: "ViT-B-32" with "openai" is
    "ViT-B-32-quickgelu". A checkpoint's file does not tell; there the name decides.

    Raises:
        ValueError: the model does not exist, or no weights are named, or they can't be read or don't fit.

    Example:
        >>> open_original("tiny").module.text_pool_type
        'argmax'
    """
    if name == "tiny":
        tiny, preprocess, vocabulary = open_tiny(pretrained)
        tokenizer = tokenizer or (tiny_tokenizer() if with_tokenizer else None)
        return Original(tiny, tokenizer, preprocess, name, pretrained, vocabulary)
    if name not in open_clip.list_models() and Path(name).is_dir():
        _refuse_weights(name, pretrained)
        return open_folder(name, tokenizer=tokenizer, with_tokenizer=with_tokenizer)
    with quiet():
        module: Any = _create(name, pretrained)
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**module.visual.preprocess_cfg), is_train=False
    )
    if with_tokenizer and tokenizer is None:
        with quiet():
            tokenizer = _tokenizer(name)
    return Original(module.eval(), tokenizer, preprocess, name, pretrained)


def builtin_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a built-in model; empty for any other.

    Example:
        >>> builtin_config("ViT-L-14")["text_cfg"]["heads"]
        12
    """
    return open_clip.get_model_config(name) if name in open_clip.list_models() else {}


def _create(name: str, pretrained: str | None) -> nn.Module:
    hosted = name.startswith(("local-dir:", "hf-hub:"))
    if not hosted and name not in open_clip.list_models():
        raise ValueError(f"no model {name!r}: {_nearest(name, open_clip.list_models())}")
    if pretrained is None and not hosted:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag of open_clip's fits"
        raise ValueError(
            f"{name} needs weights, got pretrained=None; give a tag ({tags}), the path of a checkpoint, "
            f"or {RANDOM!r} for an untrained model"
        )
    if hosted:
        _refuse_weights(name, pretrained)
    weights = None if pretrained == RANDOM else pretrained
    trained = {} if hosted or weights is None else open_clip.get_pretrained_cfg(name, weights)
    try:
        return open_clip.create_model(
            name,
            pretrained=weights,
            pretrained_image=False,
            pretrained_text=False,
            require_pretrained=pretrained != RANDOM,  # else a folder without weights gives an untrained model
            force_quick_gelu=bool(trained.get("quick_gelu")),  # open_clip only warns where the two disagree
        )
    except Exception as error:  # open_clip raises whatever its readers raise; the cause stays attached
        reason = _reason(name, pretrained, error)
        raise ValueError(f"can't load {name} with pretrained={pretrained!r}: {reason}") from error


def _refuse_weights(name: str, pretrained: str | None) -> None:
    if pretrained is not None:
        raise ValueError(f"{name} has its weights with it, got pretrained={pretrained!r}; leave it None")


def _reason(name: str, pretrained: str | None, error: Exception) -> str:
    cause = in_one_line(error)
    if pretrained in (None, RANDOM):
        return cause
    if Path(pretrained).is_file():
        return f"{cause} (a truncated or foreign file?)"
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return f"{cause} (without a network, download it elsewhere and give the file's path)"
    return f"neither a file nor one of its tags: {', '.join(tags) or 'it has none'}"


def _nearest(name: str, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return (
        hint + "open_clip.list_models() lists all of them; 'tiny' is the embedded one; "
        "a folder that transformers saved goes by its path"
    )


def _tokenizer(name: str) -> Callable[..., Tensor]:
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        raise ValueError(
            f"can't load the tokenizer of {name}: {in_one_line(error)} (load(..., tokenizer=...) takes one of yours)"
        ) from error
