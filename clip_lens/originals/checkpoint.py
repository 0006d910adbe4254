"""A checkpoint's file -> the weights in it, whoever wrote it, and from there into a module of open_clip's.

Read are safetensors, `torch.save` in both of its formats, and TorchScript archives such as OpenAI's ViT-B-32.pt. The
weights may lie in entries of the file ("state_dict", "model", "model_ema" ...) and below names of wrappers (of DDP,
FSDP, `torch.compile`, Lightning): they are found by the text tower's token and position embeddings. Nothing but
tensors, numbers and names is ever unpickled.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What `torch.compile`, FSDP and activation checkpointing put into the middle of names."""
EMBEDDINGS = ("token_embedding.weight", "positional_embedding")
LOGITS = ("logit_scale", "logit_bias")
RECORDED = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives keep among the weights."""
AVERAGE = re.compile("(^|_)ema(_|$)")
"""How training scripts name a moving average of the weights, which is what they evaluate."""
EXAMPLES = 3
"""Names that a message lists of many."""

_multiarray: Any = np.core.multiarray if np.__version__ < "2" else np._core.multiarray  # type: ignore[attr-defined]
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type)),
    *(
        (getattr(_multiarray, what), f"numpy.{core}.multiarray.{what}")
        for what in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ),
]
"""What training scripts leave beside the weights, and that runs nothing when it is read."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model under open_clip's names, what was unusual in finding them, and the activation where the
    file has its code."""

    state: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    quick_gelu: bool | None = None


def read(file: str) -> Checkpoint:
    """The weights of a CLIP model or of its text tower alone.

    Raises:
        ValueError: the file holds no such weights, or those of several models; the message says what was found.
    """
    if _is_safetensors(file):
        from safetensors.torch import load_file

        return _found(load_file(file))
    if _is_archive(file):
        script = torch.jit.load(file, map_location="cpu")
        state = {name: value for name, value in script.state_dict().items() if name not in RECORDED}
        return replace(_found(state), quick_gelu=_activation(script))
    return _found(_unpickled(file))


def _is_safetensors(file: str) -> bool:
    with open(file, "rb") as stream:
        length, start = int.from_bytes(stream.read(8), "little"), stream.read(1)
    return start == b"{" and length < Path(file).stat().st_size


def _is_archive(file: str) -> bool:
    """Whether a file is a TorchScript archive: it holds code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _activation(script: Any) -> bool | None:
    """Whether an archive's activation is QuickGELU, by what it does; None where that can't be told."""
    x = torch.linspace(-4, 4, 33)
    for name, part in script.named_modules():
        if not name.endswith("mlp.gelu") or "visual" in name:
            continue
        try:
            y = part(x)
        except RuntimeError:  # traced on another device
            return None
        for quick, expected in ((True, x * torch.sigmoid(1.702 * x)), (False, F.gelu(x))):
            if torch.allclose(y, expected, atol=1e-4):
                return quick
    return None


def _unpickled(file: str) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        try:
            with torch.serialization.safe_globals(HARMLESS):
                foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        except Exception:  # a damaged file, or one of the old format
            foreign = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not foreign:
            raise
        raise ValueError(
            f"beside tensors it holds {some(foreign)}, which may run code when they are read. Where you trust the "
            "file, save its weights alone: torch.save(torch.load(file, weights_only=False)['state_dict'], 'new.pt')"
        ) from error


def _found(content: Any) -> Checkpoint:
    """The one model in what a file holds."""
    towers = list(_towers(content))
    averaged = [tower for tower in towers if any(AVERAGE.search(entry) for entry in tower[0])]
    chosen = averaged if len(averaged) == 1 else towers
    if not chosen:
        raise ValueError(_described(content))
    if len(chosen) > 1:
        found = some([".".join([*entries, root]).rstrip(".") or "the file itself" for entries, root, _ in chosen])
        raise ValueError(f"it holds several text towers, at {found}; save the one you mean alone")
    entries, root, tensors = chosen[0]
    state = {name.removeprefix(root): value for name, value in tensors.items() if name.startswith(root)}
    notes = []
    if averaged:
        others = some([".".join(other) or "the file itself" for other, *_ in towers if other != entries])
        notes.append(f"the moving average {'.'.join(entries)!r} is taken; the file also has {others or 'no other'}")
    if left := [name for name in tensors if not name.startswith(root)]:
        notes.append(f"{len(left)} tensors beside {root!r} are left out: {some(left)}")
    return Checkpoint(state, tuple(notes))


def _towers(content: Any, entries: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, dict[str, Tensor]]]:
    """Every text tower in nested entries: the way there, what stands before a model's names, and the tensors."""
    if not isinstance(content, Mapping):
        return
    tensors = {_unwrapped(name): value for name, value in content.items() if isinstance(value, Tensor)}
    token, position = EMBEDDINGS
    for name in tensors:
        root = name.removesuffix(token)
        if name.endswith(token) and root + position in tensors:
            yield entries, root.removesuffix("text."), tensors
    for name, value in content.items():
        yield from _towers(value, (*entries, str(name)))


def _unwrapped(name: Any) -> str:
    name = str(name)
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _described(content: Any) -> str:
    """What a file holds that has no text tower of CLIP's, and what to do with it."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}; expected are tensors by name (model.state_dict())"
    inside = [content, *(value for value in content.values() if isinstance(value, Mapping))]
    names = next(
        filter(None, ([str(key) for key, value in of.items() if isinstance(value, Tensor)] for of in inside)), []
    )
    if not names:
        return f"it holds no tensors by name, but {some([str(name) for name in content]) or 'nothing'}"
    found = f"it holds {len(names)} tensors ({some(names)}) and no text tower under open_clip's names"
    hints = {
        "lora_": "these are adapters: merge them into their model first (peft: merge_and_unload) and save that",
        "text_model.": "these are transformers' names: give the folder with its config.json as the model's name",
        "encoder.layers.": "these are transformers' names: give the folder with its config.json as the model's name",
        "visual.": "this is an image tower alone",
    }
    hint = next((said for part, said in hints.items() if any(part in name for name in names)), "")
    return f"{found}; {hint or 'is it a CLIP?'}"


def some(names: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    shown = ", ".join(names[:EXAMPLES])
    return shown if len(names) <= EXAMPLES else f"{shown} and {len(names) - EXAMPLES} more"


def fill(module: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Puts a checkpoint's weights into a module of open_clip's, every one in its place, and returns what to say of it.

    A text tower that came alone leaves the module without an image tower and, where the file has none, without a scale.

    Raises:
        RuntimeError: (of PyTorch's) names or shapes that don't fit.
    """
    state = _laid_out(module, checkpoint.state)
    notes = [*checkpoint.notes, *_without_images(module, state), *_logits(module, state)]
    _drop_computed(module, state)
    notes += _stretched(module, state)
    module.load_state_dict(state, strict=True)
    return tuple(notes)


def _without_images(module: Any, state: Mapping[str, Tensor]) -> Iterator[str]:
    if any(name.startswith("visual.") for name in state):
        return
    module.visual = None
    if "logit_scale" not in state:
        module.logit_scale = None
    yield "the file holds a text tower alone"


def _logits(module: Any, state: dict[str, Tensor]) -> Iterator[str]:
    """Scale and bias are kept as one number or as a list of one; a bias, which cancels, may be on either side only."""
    for name in LOGITS:
        place = getattr(module, name, None)
        if place is None and state.pop(name, None) is not None:
            yield f"{name} is left out: the model has none"
        elif place is not None and name in state:
            state[name] = state[name].reshape(place.shape)
        elif name == "logit_bias":
            module.logit_bias = None


def _drop_computed(module: Any, state: dict[str, Tensor]) -> None:
    """TorchScript saves buffers that the model computes by itself, as the attention mask."""
    kept = module.state_dict()
    for name, buffer in module.named_buffers():
        if name in state and name not in kept and torch.equal(state[name], buffer):
            del state[name]


def _stretched(module: Any, state: dict[str, Tensor]) -> Iterator[str]:
    """Position embeddings of another image size or context, as open_clip fits them in."""
    shapes = {name: list(value.shape) for name, value in state.items()}
    if module.visual is not None:
        open_clip.model.resize_pos_embed(state, module)
    open_clip.model.resize_text_pos_embed(state, module)
    for name, value in state.items():
        if list(value.shape) != shapes[name]:
            yield f"{name} was stretched from {shapes[name]} to {list(value.shape)} to fit the model"


def _laid_out(module: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the module's own names: its text tower's lie below "text." or not."""
    if hasattr(module, "text"):
        if any(name.startswith("text.") for name in state):
            return dict(state)
        others = (*LOGITS, "visual.")
        return {name if name.startswith(others) else f"text.{name}": value for name, value in state.items()}
    return {name.removeprefix("text."): value for name, value in state.items()}
