"""The doorway for names: a name and weights in, the original model, its tokenizer and its preprocessing out.

open_clip's models are opened here, a folder that transformers saved in `clip_lens.originals.transformers`. Both towers
come this way: `clip_lens.load` converts the text tower, `clip_lens.embed_images` runs the image tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clip_lens.originals.checkpoint import Checkpoint, fill, read
from clip_lens.originals.original import Original, Preparation, in_one_line, quiet
from clip_lens.originals.original import digest as digest
from clip_lens.originals.settings import settings
from clip_lens.originals.transformers import adopt, adopted, cached, open_folder
from clip_lens.tiny.opener import open_tiny, tiny_tokenizer

RANDOM = "random"


def open_original(
    name: str = "tiny",
    *,
    pretrained: str | None = None,
    tokenizer: Callable[..., Tensor] | None = None,
    with_tokenizer: bool = True,
    like: str | None = None,
    quick_gelu: bool | None = None,
) -> Original:
    """The model `name` with weights, both towers, float32, on the CPU, in evaluation mode.

    `pretrained` is a tag of open_clip's (`open_clip.list_pretrained()`), the path of a checkpoint (see
    `clip_lens.originals.checkpoint`), or "random" for untrained weights, the same ones each time ("random:7" for
    others). `name` may also be "tiny" (the embedded model; `pretrained` may be weights that `scripts/train_tiny.py`
    wrote with another seed) or open_clip's `local-dir:PATH` and `hf-hub:ORG/REPO`, which bring their weights with them,
    or the path of a folder that transformers' `save_pretrained` wrote, or a repository's name that lies in Hugging
    Face's cache ("openai/clip-vit-base-patch32"), which do too. A `tokenizer` takes the place of the model's own, which
    may have to be downloaded; `with_tokenizer=False` does without, for work on images alone.

    A tag that was trained with QuickGELU gets it, whatever the model's configuration says: "ViT-B-32" with "openai" is
    "ViT-B-32-quickgelu". A checkpoint's file does not tell; `like`, the tag whose activation and image preprocessing it
    shares, and `quick_gelu` do, and see `clip_lens.originals.settings`.

    Raises:
        ValueError: the model does not exist, or no weights are named, or they can't be read or don't fit, or `like` or
            `quick_gelu` is given for anything but a file.

    Example:
        >>> open_original("tiny").module.text_pool_type
        'argmax'
    """
    of_file = name in open_clip.list_models() and _is_file(name, pretrained)
    if (like is not None or quick_gelu is not None) and not of_file:
        raise ValueError(
            f"like= and quick_gelu= say how the weights in a file were trained; {name} with pretrained={pretrained!r} "
            "is no name of open_clip's with a file"
        )
    if name == "tiny":
        tiny, vocabulary = open_tiny(pretrained)
        tokenizer = tokenizer or (tiny_tokenizer() if with_tokenizer else None)
        return Original(tiny, tokenizer, _preprocess(tiny), name, pretrained, vocabulary)
    if name not in open_clip.list_models() and Path(name).is_dir():
        _refuse_weights(name, pretrained)
        return open_folder(name, tokenizer=tokenizer, with_tokenizer=with_tokenizer)
    if name not in open_clip.list_models() and (folder := cached(name)) is not None:
        _refuse_weights(name, pretrained)
        if not (folder / "config.json").is_file():
            return open_original(f"hf-hub:{name}", tokenizer=tokenizer, with_tokenizer=with_tokenizer)
        return open_folder(folder, name=name, tokenizer=tokenizer, with_tokenizer=with_tokenizer)
    _refuse_name(name, pretrained)
    if with_tokenizer and tokenizer is None:  # it may have to be downloaded: asked for before a tower is built
        with quiet():
            tokenizer = _tokenizer(name)
    if of_file:
        opened = _of_file(name, str(pretrained), like, quick_gelu)
    else:
        with quiet():
            module = _create(name, pretrained)
        opened = Original(module.eval(), None, _preprocess(module), name, pretrained)
    return replace(opened, tokenizer=tokenizer)


def _is_file(name: str, pretrained: str | None) -> bool:
    return pretrained is not None and not open_clip.get_pretrained_cfg(name, pretrained) and Path(pretrained).is_file()


@dataclass(frozen=True)
class Preprocess(Preparation):
    """The preprocessing that open_clip makes of a configuration."""

    config: open_clip.transform.PreprocessCfg

    @cached_property
    def _transform(self) -> Callable[[Any], Tensor]:
        return open_clip.transform.image_transform_v2(self.config, is_train=False)

    @property
    def settings(self) -> str:
        size = self.config.size
        sides = [size, size] if isinstance(size, int) else size
        return json.dumps({**asdict(self.config), "size": sides}, sort_keys=True)

    def __call__(self, image: Any) -> Tensor:
        return self._transform(image)

    def __str__(self) -> str:
        return str(self._transform)


def _preprocess(module: Any) -> Preprocess | None:
    if module.visual is None:
        return None
    return Preprocess(open_clip.transform.PreprocessCfg(**module.visual.preprocess_cfg))


def _of_file(name: str, file: str, like: str | None, quick_gelu: bool | None) -> Original:
    """The weights of a file in the architecture `name`."""
    try:
        with quiet():
            checkpoint = Checkpoint({}) if _has_its_own_reader(name, file) else read(file)
            found = settings(name, file, like=like, quick_gelu=quick_gelu, in_archive=checkpoint.quick_gelu)
            module: Any = open_clip.create_model(
                name,
                pretrained_image=False,
                pretrained_text=False,
                quick_gelu=found.quick_gelu.value,
                force_preprocess_cfg=dict(found.preprocessing.value),
            )
            if checkpoint.state:
                said = fill(module, checkpoint)
            else:
                said, _ = (), open_clip.load_checkpoint(module, file)
    except ValueError as error:
        raise ValueError(f"can't load {name} with pretrained={file!r}: {in_one_line(error, 600)}") from error
    except Exception as error:  # readers of weights raise what they like; the cause stays attached
        raise ValueError(
            f"can't load {name} with pretrained={file!r}: {in_one_line(error)} (a truncated or foreign file?)"
        ) from error
    activation = found.quick_gelu.doubt and (
        f"{file} does not say which activation it was trained with, and {name}'s tags differ: "
        f"{found.quick_gelu.doubt}. Say quick_gelu=True or False, or like=TAG"
    )
    images = found.preprocessing.doubt and (
        f"{file} does not say how images are prepared for it, and {name}'s tags differ: "
        f"{found.preprocessing.doubt}. Say like=TAG"
    )
    unusual = f"{file}: {'; '.join(said)}" if said else ""
    return Original(
        module.eval(),
        None,
        _preprocess(module),
        name,
        file,
        notes=(*found.notes, *said),
        doubts=tuple(filter(None, (activation, unusual))),
        image_doubts=(images,) if images else (),
    )


def _has_its_own_reader(name: str, file: str) -> bool:
    """Whether open_clip reads a file itself: big_vision's arrays, and weights around a text model of transformers'."""
    return Path(file).suffix in (".npz", ".npy") or "hf_model_name" in builtin_config(name).get("text_cfg", {})


def open_module(
    module: nn.Module,
    *,
    tokenizer: Callable[..., Any] | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
) -> Original:
    """A module in memory as an `Original`, with the preprocessing that `open_clip.create_model` left on it, if it did.

    Raises:
        ValueError: the module has no text tower that is supported.

    Example:
        >>> open_module(open_original("tiny").module).name
        'CLIP in memory'
    """
    taken: Any = adopt(module)
    if preprocess is None and hasattr(getattr(taken, "visual", None), "preprocess_cfg"):
        preprocess = _preprocess(taken)
    return adopted(Original(taken, tokenizer, preprocess, f"{type(module).__name__} in memory", None))


def builtin_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a built-in model; empty for any other.

    Example:
        >>> builtin_config("ViT-L-14")["text_cfg"]["heads"]
        12
    """
    return open_clip.get_model_config(name) if name in open_clip.list_models() else {}


HOSTED = ("local-dir:", "hf-hub:")


def _refuse_name(name: str, pretrained: str | None) -> None:
    """A name that does not exist, or weights that are not named or named twice."""
    hosted = name.startswith(HOSTED)
    if not hosted and name not in open_clip.list_models():
        raise ValueError(f"no model {name!r}: {_nearest(name, open_clip.list_models())}")
    if pretrained is None and not hosted:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag of open_clip's fits"
        raise ValueError(
            f"{name} needs weights, got pretrained=None; give a tag ({tags}), the path of a checkpoint, "
            f"or {RANDOM!r} (or {RANDOM}:SEED) for an untrained model"
        )
    if hosted:
        _refuse_weights(name, pretrained)
    if name.startswith("hf-hub:"):
        try:
            with quiet():
                open_clip.get_model_config(name)
        except Exception as error:
            raise ValueError(f"can't load {name} with pretrained=None: {in_one_line(error)}") from error


def _create(name: str, pretrained: str | None) -> nn.Module:
    hosted = name.startswith(HOSTED)
    seed = None if hosted else _seed(str(pretrained))
    trained = {} if hosted or seed is not None else open_clip.get_pretrained_cfg(name, str(pretrained))
    try:
        with _seeded(seed):
            return open_clip.create_model(
                name,
                pretrained=pretrained if seed is None else None,
                pretrained_image=False,
                pretrained_text=False,
                require_pretrained=seed is None,  # else a folder without weights gives an untrained model
                force_quick_gelu=bool(trained.get("quick_gelu")),  # open_clip only warns where the two disagree
            )
    except Exception as error:  # open_clip raises whatever its readers raise; the cause stays attached
        reason = _reason(name, pretrained, error)
        raise ValueError(f"can't load {name} with pretrained={pretrained!r}: {reason}") from error


def _seed(pretrained: str) -> int | None:
    """The seed of untrained weights, "random" or "random:SEED"; None = trained ones."""
    word, _, number = pretrained.partition(":")
    if word != RANDOM or Path(pretrained).exists():
        return None
    if not number.isdecimal() and number:
        raise ValueError(f"pretrained={pretrained!r}: a seed is a whole number, as in {RANDOM}:7")
    return int(number or 0)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draws on the CPU are the seed's inside, and go on as if nothing had been drawn; None leaves them alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _refuse_weights(name: str, pretrained: str | None) -> None:
    if pretrained is not None:
        raise ValueError(f"{name} has its weights with it, got pretrained={pretrained!r}; leave it None")


def _reason(name: str, pretrained: str | None, error: Exception) -> str:
    cause = in_one_line(error)
    if pretrained is None or pretrained.startswith(RANDOM):
        return cause
    tags = open_clip.list_pretrained_tags_by_model(name)
    if open_clip.get_pretrained_cfg(name, pretrained):
        return (
            f"{cause} (without a network: download its file elsewhere and load it with pretrained=PATH, "
            f"like={pretrained!r}, which keeps the tag's activation and image preprocessing)"
        )
    return f"neither a file nor one of its tags: {', '.join(tags) or 'it has none'}"


def _nearest(name: str, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    hub = f"{name} is not in Hugging Face's cache (`hf download {name}` puts it there); " if "/" in name else ""
    return (
        f"{hint}{hub}open_clip.list_models() lists all of them; 'tiny' is the embedded one; "
        "a folder that transformers saved goes by its path"
    )


def _tokenizer(name: str) -> Callable[..., Tensor]:
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        raise ValueError(
            f"can't load the tokenizer of {name}: {in_one_line(error)} (load(..., tokenizer=...) takes one of yours)"
        ) from error
