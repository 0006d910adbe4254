"""The doorway to transformers: a folder that `save_pretrained` wrote, or a module in memory, under open_clip's names.

Nothing is ever downloaded. transformers is imported when something is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clip_lens.originals.original import Original, in_one_line, quiet

MODEL_TYPES = {
    "clip": "CLIPModel",
    "clip_text_model": "CLIPTextModelWithProjection",
    "siglip": "SiglipModel",
    "siglip_text_model": "SiglipTextModel",
}
"""What a config.json calls itself -> the class that is opened."""
SUPPORTED = ", ".join(MODEL_TYPES.values())

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


class TransformersModel(nn.Module):
    """A CLIP or SigLIP of transformers' with open_clip's names: `encode_text`, `encode_image`, `visual`, `logit_scale`.

    It holds the model itself, not a copy of it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def text(self) -> Any:
        """The module that has the text tower's embeddings, blocks and last norm."""
        inner: Any = self.model
        while not hasattr(inner, "embeddings"):
            inner = inner.text_model
        return inner

    @property
    def text_projection(self) -> nn.Linear:
        """SigLIP's is a part of its text tower, CLIP's is not."""
        return self.text.head if self.siglip else self.model.text_projection  # type: ignore[return-value]

    @property
    def siglip(self) -> bool:
        return hasattr(self.text, "head")

    @property
    def visual(self) -> nn.ModuleDict | None:
        """The parts of the image tower, None where there is none."""
        parts = [part for part in ("vision_model", "visual_projection") if hasattr(self.model, part)]
        return nn.ModuleDict({part: getattr(self.model, part) for part in parts}) if parts else None

    @property
    def logit_scale(self) -> nn.Parameter | None:
        return getattr(self.model, "logit_scale", None)

    def encode_text(self, tokens: Int[Tensor, "pair pos"]) -> Float[Tensor, "pair d_embed"]:
        """The model's own text embeddings, unnormalised."""
        model: Any = self.model
        output = (model.get_text_features if hasattr(model, "get_text_features") else model)(input_ids=tokens)
        return _embedding(output)

    def encode_image(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image d_embed"]:
        """The model's own image embeddings, unnormalised."""
        model: Any = self.model
        return _embedding(model.get_image_features(pixel_values=pixels))


def _embedding(output: Any) -> Tensor:
    return output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output


def adopt(module: nn.Module) -> nn.Module:
    """A module of transformers' under open_clip's names; any other module as it is.

    Raises:
        ValueError: a module of transformers' that has no text tower with a projection to the joint space, or one that
            is TorchScript, whose parts can't be taken out.

    Example:
        >>> adopt(torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    import transformers

    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"the module in memory is TorchScript ({module.original_name}): save it, torch.jit.save(module, 'it.pt'), "
            "and give the file: load(NAME, pretrained='it.pt') with open_clip's name of its architecture"
        )
    if not isinstance(module, transformers.PreTrainedModel):
        return module
    if not isinstance(module, tuple(getattr(transformers, name) for name in MODEL_TYPES.values())):
        raise ValueError(_unsupported("the module in memory", type(module).__name__))
    return TransformersModel(module)


def _unsupported(what: str, kind: str) -> str:
    hint = ": it has no projection to the joint space" if kind == "CLIPTextModel" else ""
    return f"{what} is a {kind}, which is not supported{hint}; of transformers' models {SUPPORTED} are"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers', called as open_clip's are: texts in, padded rows of ids out.

    There is no attention mask: CLIP's end of text sees no padding, and SigLIP was trained to read it.
    """

    tokenizer: Any
    context_length: int

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "pair pos"]:
        rows = self.tokenizer(
            [texts] if isinstance(texts, str) else list(texts),
            padding="max_length",
            truncation=True,
            max_length=context_length or self.context_length,
            padding_side="right",
            return_tensors="pt",
        )
        return rows["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


def fitted(tokenizer: Callable[..., Any] | None, context_length: int) -> Callable[..., Tensor] | None:
    """A tokenizer that pads to the context: transformers' are wrapped, any other is returned as it is.

    Example:
        >>> fitted(None, 77)
    """
    import transformers

    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return Tokenizer(tokenizer, context_length)
    return tokenizer


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of a folder's own image processor, read on first use: a picture in, its pixels out."""

    folder: Path

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        try:
            with _quiet():
                return AutoImageProcessor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ValueError(f"can't read the image processor in {self.folder}: {in_one_line(error)}") from error

    def __call__(self, image: Any) -> Float[Tensor, "channel height width"]:
        return self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def __str__(self) -> str:
        """Its settings, the same wherever the folder lies."""
        settings = {name: value for name, value in self._processor.to_dict().items() if value is not None}
        return f"{type(self._processor).__name__} {json.dumps(settings, sort_keys=True, default=str)}"


def open_folder(name: str, *, tokenizer: Callable[..., Any] | None = None, with_tokenizer: bool = True) -> Original:
    """The model in a folder that transformers' `save_pretrained` wrote: float32, on the CPU, in evaluation mode.

    Its tokenizer and image processor are the folder's own. What transformers would fill in at random or leave out
    without an error is an error here.

    Raises:
        ValueError: the folder has no model that is supported, or a file is missing, damaged or does not fit.

    Example:
        >>> open_folder("nowhere")
        Traceback (most recent call last):
        ValueError: nowhere has no config.json of a model that transformers saved
    """
    folder = Path(name)
    model = _model(folder, _kind(folder))
    if with_tokenizer and tokenizer is None:
        tokenizer = _tokenizer(folder)
    preprocess = Preprocess(folder) if _has(folder, PREPROCESSORS) else None
    return Original(TransformersModel(model.eval()), tokenizer, preprocess, name, None, library="transformers")


def _has(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / file).is_file() for file in files)


def _kind(folder: Path) -> str:
    """The class of the model in a folder, from its config.json."""
    if not (folder / "config.json").is_file():
        hint = "; give its name as local-dir:PATH" if _has(folder, ["open_clip_config.json"]) else ""
        raise ValueError(f"{folder} has no config.json of a model that transformers saved{hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, architectures = config["model_type"], config.get("architectures") or []
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{folder / 'config.json'} can't be read as a model's config ({in_one_line(error)})"
        ) from error
    default = MODEL_TYPES.get(kind)
    found = architectures[0] if architectures else default or f"model of the type {kind!r}"
    if default is None or found not in MODEL_TYPES.values():
        raise ValueError(_unsupported(f"the model in {folder}", found))
    return found


def _model(folder: Path, kind: str) -> Any:
    import transformers

    if not _has(folder, WEIGHTS):
        raise ValueError(f"no weights in {folder}: there is none of {', '.join(WEIGHTS)}; save the model there again")
    try:
        with _quiet():
            model, report = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # readers of weights raise what they like; the cause stays attached
        raise ValueError(f"can't load {folder}: {_damaged(folder) or in_one_line(error)}") from error
    _refuse_misfit(folder, report)
    return model


def _refuse_misfit(folder: Path, report: Mapping[str, Any]) -> None:
    """transformers draws missing weights at random and drops those without a place."""
    for label, said in (("missing_keys", "are missing"), ("unexpected_keys", "have no place in the model")):
        keys = sorted(key for key in report[label] if not key.endswith("position_ids"))
        if keys:
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(f"{folder}: the weights don't fit its config.json, {len(keys)} {said}: {shown}")


def _damaged(folder: Path) -> str:
    """Names the file of weights that can't be read; empty if all can."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        try:
            if file.suffix == ".bin":
                torch.load(file, map_location="meta", weights_only=True)
            else:
                safe_open(file, framework="pt")
        except Exception as error:  # of many kinds: the format's own, EOFError, RuntimeError ...
            return f"{file.name} can't be read ({in_one_line(error)}; a truncated file?)"
    return ""


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    remedy = "save one there, or load(..., tokenizer=...) takes one of yours"
    if not _has(folder, TOKENIZERS):  # transformers would make one without a vocabulary
        raise ValueError(f"no tokenizer in {folder}: there is none of {', '.join(TOKENIZERS)}; {remedy}")
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"can't load the tokenizer in {folder}: {in_one_line(error)} ({remedy})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' logs and bars are off; they are on again afterwards where they were."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
