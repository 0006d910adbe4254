"""What no weight tells: the activation that a checkpoint was trained with, and how its images are prepared.

A tag of open_clip's brings both. A file has weights only; what decides about it, the first that does:

1. what is said: `like=TAG` (both) and `quick_gelu=` (the activation),
2. the archive itself, where it holds the activation's code (TorchScript),
3. the file is a public one: open_clip's addresses have the checksums of many,
4. an `open_clip_config.json` beside the file, of a model of the same shape,
5. the name, where all its tags agree.

Where tags differ and nothing decides, the name's own configuration is taken, and that it was a guess is said.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import open_clip

T = TypeVar("T")
Preprocessing = tuple[tuple[str, Any], ...]

ACTIVATIONS = {True: "QuickGELU", False: "GELU"}
CHECKSUM = re.compile(r"(?<![0-9a-f])([0-9a-f]{64}|[0-9a-f]{8})(?=/[^/]*$|\.[a-z]+$)")
"""In the address of a public checkpoint: OpenAI's folders, open_clip's own file names."""


@dataclass(frozen=True)
class Decided(Generic[T]):
    """A setting, where it is from, and if it is a guess what else it may be."""

    value: T
    source: str
    doubt: str = ""


@dataclass(frozen=True)
class Settings:
    """A checkpoint's activation and image preprocessing, each with where it is from."""

    quick_gelu: Decided[bool]
    preprocessing: Decided[Preprocessing]

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"activation {ACTIVATIONS[self.quick_gelu.value]}: {self.quick_gelu.source}",
            f"image preprocessing: {self.preprocessing.source}",
        )


def of_tag(name: str, tag: str) -> tuple[bool, Preprocessing]:
    """What open_clip's tag was trained with.

    Example:
        >>> of_tag("ViT-B-32", "openai")[0], of_tag("ViT-B-32", "laion2b_e16")[0]
        (True, False)
    """
    known = open_clip.get_pretrained_cfg(name, tag)
    return bool(known.get("quick_gelu")), _preprocessing(known)


def settings(
    name: str,
    file: str,
    *,
    like: str | None = None,
    quick_gelu: bool | None = None,
    in_archive: bool | None = None,
) -> Settings:
    """How the weights in `file` are to be used in the architecture `name`.

    Raises:
        ValueError: `like` is no tag of that name, or `quick_gelu` contradicts the archive.

    Example:
        >>> print(settings("ViT-B-32", "mine.pt", like="openai").notes[0])
        activation QuickGELU: as the tag 'openai' has it
    """
    tags = {tag: of_tag(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    if like is not None and like not in tags:
        raise ValueError(f"like={like!r} is no tag of {name}; its tags are {', '.join(tags) or '(none)'}")
    if None not in (quick_gelu, in_archive) and quick_gelu != in_archive:
        trained = ACTIVATIONS[bool(in_archive)]
        raise ValueError(f"{file} was trained with {trained}, as its own code says; leave quick_gelu= out")
    config = open_clip.get_model_config(name) or {}
    known = _known(name, file, tags, config) if like is None else (*tags[like], f"as the tag {like!r} has it")
    both: tuple[Decided[bool], Decided[Preprocessing]]
    if known:
        both = Decided(known[0], known[2]), Decided(known[1], known[2])
    else:
        activation = _by_name(name, bool(config.get("quick_gelu")), tags, 0, ACTIVATIONS.__getitem__)
        both = activation, _by_name(name, _preprocessing({}), tags, 1, _in_words)
    if quick_gelu is not None:
        return Settings(Decided(quick_gelu, "as quick_gelu= says"), both[1])
    return Settings(both[0] if in_archive is None else Decided(in_archive, "the archive's own code"), both[1])


def _preprocessing(given: Mapping[str, Any]) -> Preprocessing:
    default = open_clip.transform.PreprocessCfg()
    merged = open_clip.transform.merge_preprocess_dict(default, dict(given))
    return tuple(
        (key, tuple(value) if isinstance(value, list | tuple) else value)
        for key, value in sorted(merged.items())
        if key not in ("size", "mode")  # the size is the image tower's
    )


def _in_words(preprocessing: Preprocessing) -> str:
    values = dict(preprocessing)
    return f"mean {values['mean']}, {values['interpolation']}, {values['resize_mode']}"


def _known(
    name: str, file: str, tags: Mapping[str, tuple[bool, Preprocessing]], config: Mapping[str, Any]
) -> tuple[bool, Preprocessing, str] | None:
    """What is known about this very file."""
    if public := _public(name, file):
        return *tags[public], f"the file is that of the tag {public!r}"
    beside = _beside(file, config)
    if beside is None:
        return None
    quick_gelu, preprocessing = beside["model_cfg"].get("quick_gelu"), beside.get("preprocess_cfg") or {}
    return bool(quick_gelu), _preprocessing(preprocessing), "the open_clip_config.json beside the file"


def _public(name: str, file: str) -> str | None:
    """The tag whose file this is, by the checksum in its address."""
    sums = {
        tag: found[1]
        for tag in open_clip.list_pretrained_tags_by_model(name)
        if (found := CHECKSUM.search(open_clip.get_pretrained_cfg(name, tag).get("url", "")))
    }
    if not sums or not Path(file).is_file():
        return None
    found_sum = _sha256(file)
    return next((tag for tag, checksum in sums.items() if found_sum.startswith(checksum)), None)


def _sha256(file: str) -> str:
    hasher = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(2**24):
            hasher.update(piece)
    return hasher.hexdigest()


def _beside(file: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration that lies beside a file, if it is about a model of this shape."""
    path = Path(file).parent / "open_clip_config.json"
    try:
        beside = json.loads(path.read_text(encoding="utf-8"))
        model = beside["model_cfg"]
        same = all(_shape(model, part) == _shape(config, part) for part in ("embed_dim", "text_cfg", "vision_cfg"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return beside if same else None


def _shape(config: Mapping[str, Any], part: str) -> Any:
    value = config[part]
    return {key: value.get(key) for key in ("width", "layers")} if isinstance(value, Mapping) else value


def _by_name(
    name: str, own: T, tags: Mapping[str, tuple[bool, Preprocessing]], part: int, in_words: Callable[[Any], str]
) -> Decided[T]:
    """What the name alone says of one setting: its tags' if they agree, else its configuration's, which is a guess."""
    ways: dict[Any, list[str]] = {}
    for tag, both in tags.items():
        ways.setdefault(both[part], []).append(tag)
    if not ways:
        return Decided(own, f"as {name} is configured")
    if len(ways) == 1:
        return Decided(next(iter(ways)), f"as all tags of {name} have it")
    said = "; ".join(f"{in_words(way)}: {_some(of)}" for way, of in ways.items())
    return Decided(own, f"a guess, as {name} is configured: its tags differ", f"{in_words(own)} is taken ({said})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
