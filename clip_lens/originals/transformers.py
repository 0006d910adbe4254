"""The doorway to transformers: a folder that `save_pretrained` wrote, or a module in memory, under open_clip's names.

Nothing is ever downloaded. transformers is imported when something is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clip_lens.originals.original import Original, Preparation, in_one_line, quiet

MODEL_TYPES = {
    "clip": ("CLIPModel",),
    "clip_text_model": ("CLIPTextModelWithProjection", "CLIPTextModel"),
    "siglip": ("SiglipModel",),
    "siglip_text_model": ("SiglipTextModel",),
    "siglip2": ("Siglip2Model",),
    "siglip2_text_model": ("Siglip2TextModel",),
    "metaclip_2": ("MetaClip2Model",),
    "metaclip_2_text_model": ("MetaClip2TextModelWithProjection",),
    "clipseg": ("CLIPSegModel",),
    "xclip": ("XCLIPModel",),
}
"""What a config.json calls itself -> the classes that are opened, the one that is meant without a word first."""
CLASSES = tuple(name for names in MODEL_TYPES.values() for name in names)
SUPPORTED = ", ".join(CLASSES)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


class TransformersModel(nn.Module):
    """A CLIP or SigLIP of transformers' with open_clip's names: `encode_text`, `encode_image`, `visual`, `logit_scale`.

    It holds the model itself, not a copy of it. `text_projection` is None where texts stay in the tower's own space.
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
    def text_projection(self) -> nn.Linear | None:
        """SigLIP's is a part of its text tower, CLIP's is not."""
        return self.text.head if self.siglip else getattr(self.model, "text_projection", None)

    @property
    def siglip(self) -> bool:
        return hasattr(self.text, "head")

    @property
    def pools_at(self) -> int | None:
        """The id whose first token is read; None = the highest id, as of old configs, where 2 stands for it."""
        import transformers

        eos = self.text.eos_token_id
        return None if eos == 2 and not isinstance(self.model, transformers.MetaClip2PreTrainedModel) else eos

    @property
    def notes(self) -> tuple[str, ...]:
        """What the model can't do."""
        import transformers

        if self.text_projection is None:
            return (
                "it has no projection to the joint space: its texts can be compared with texts, not with images "
                "(CLIPTextModelWithProjection has one)",
            )
        if isinstance(self.model, transformers.XCLIPPreTrainedModel):
            return ("texts are read alone: X-CLIP's own score adds to them what it sees in the video",)
        return ()

    @property
    def visual(self) -> nn.ModuleDict | None:
        """The parts of the image tower, None where there is none that takes single pictures of one size."""
        import transformers

        if isinstance(self.model, (transformers.XCLIPPreTrainedModel, transformers.Siglip2PreTrainedModel)):
            return None
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
        ValueError: a module of transformers' that has no text tower that is supported, or one that is TorchScript,
            whose parts can't be taken out.

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
    if not isinstance(module, tuple(getattr(transformers, name) for name in CLASSES)):
        raise ValueError(_unsupported("the module in memory", type(module).__name__))
    return TransformersModel(module)


def _unsupported(what: str, kind: str) -> str:
    return f"{what} is a {kind}, which is not supported; of transformers' models {SUPPORTED} are"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers', called as open_clip's are: texts in, padded rows of ids out.

    There is no attention mask: CLIP's end of text sees no padding, and SigLIP was trained to read it. `lower_case`: the
    model was trained on texts in lower case, whatever the tokenizer does.
    """

    tokenizer: Any
    context_length: int
    lower_case: bool = False

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "pair pos"]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = self.tokenizer(
            [text.lower() for text in texts] if self.lower_case else texts,
            padding="max_length",
            truncation=True,
            max_length=context_length or self.context_length,
            padding_side="right",
            return_tensors="pt",
        )
        return rows["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


def fitted(
    tokenizer: Callable[..., Any] | None, context_length: int, lower_case: bool = False
) -> Callable[..., Tensor] | None:
    """A tokenizer that pads to the context: transformers' are wrapped, any other is returned as it is.

    Example:
        >>> fitted(None, 77)
    """
    import transformers

    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return Tokenizer(tokenizer, context_length, lower_case)
    return tokenizer


def tokenizer_notes(module: nn.Module, tokenizer: Callable[..., Any] | None) -> tuple[str, ...]:
    """What is done otherwise than a tokenizer of transformers' does it by itself: SigLIP was trained on texts in lower
    case, padded on the right, and reads the padding.

    Example:
        >>> tokenizer_notes(torch.nn.Linear(2, 2), None)
        ()
    """
    import transformers

    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase) or not isinstance(module, TransformersModel):
        return ()
    notes, side = [], tokenizer.padding_side
    if module.siglip and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        notes.append("texts are put into lower case, as the model was trained; its tokenizer keeps capitals")
    if module.siglip and side != "right":
        notes.append(f"texts are padded on the right, as the model was trained; its tokenizer pads on the {side}")
    if module.siglip and "attention_mask" in tokenizer.model_input_names:
        notes.append("padding is read, as the model was trained; its tokenizer masks it")
    return tuple(notes)


DECISIVE = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip
"""What decides the pixels, of an image processor's settings; the rest says its class and who saved it."""


@dataclass(frozen=True)
class Preprocess(Preparation):
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

    @property
    def settings(self) -> str:
        said = self._processor.to_dict()
        return json.dumps({name: said[name] for name in DECISIVE if name in said}, sort_keys=True, default=dict)

    def __call__(self, image: Any) -> Float[Tensor, "channel height width"]:
        return self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def __str__(self) -> str:
        """Its settings, the same wherever the folder lies."""
        settings = {name: value for name, value in self._processor.to_dict().items() if value is not None}
        return f"{type(self._processor).__name__} {json.dumps(settings, sort_keys=True, default=str)}"


def open_folder(
    folder: str | Path,
    *,
    name: str = "",
    tokenizer: Callable[..., Any] | None = None,
    with_tokenizer: bool = True,
) -> Original:
    """The model in a folder that transformers' `save_pretrained` wrote: float32, on the CPU, in evaluation mode.

    Its tokenizer and image processor are the folder's own, its name is the folder's unless one is given. What
    transformers would fill in at random or leave out without an error is an error here.

    Raises:
        ValueError: the folder has no model that is supported, or a file is missing, damaged or does not fit.

    Example:
        >>> open_folder("nowhere")
        Traceback (most recent call last):
        ValueError: nowhere has no config.json of a model that transformers saved
    """
    folder = Path(folder)
    kind = _kind(folder)
    if with_tokenizer and tokenizer is None:
        tokenizer = _tokenizer(folder)
    model = _model(folder, kind)
    preprocess = Preprocess(folder) if _has(folder, PREPROCESSORS) else None
    module = TransformersModel(model.eval())
    return adopted(Original(module, tokenizer, preprocess, name or str(folder), None))


def adopted(original: Original) -> Original:
    """An original of transformers' with what is to say of it; any other as it is."""
    module = original.module
    if not isinstance(module, TransformersModel):
        return original
    notes = (*module.notes, *tokenizer_notes(module, original.tokenizer))
    doubts = tuple(f"{original.name}: {note}" for note in module.notes)
    return replace(original, library="transformers", notes=notes, doubts=doubts)


def cached(name: str) -> Path | None:
    """The folder of a repository, `ORG/NAME`, in the cache that transformers and `hf download` fill; None = not there.

    Example:
        >>> cached("nobody/nothing")
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "open_clip_config.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


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
    classes = MODEL_TYPES.get(kind, ())
    found = architectures[0] if architectures else next(iter(classes), f"model of the type {kind!r}")
    if found not in classes:
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
