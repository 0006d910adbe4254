"""`Original`: an opened model before anything is made of it, whichever library it came from."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn


class Preparation(ABC):
    """A preprocessing that says what it does: a picture in, its pixels out."""

    @property
    @abstractmethod
    def settings(self) -> str:
        """All that decides the pixels, as sorted JSON: the same text for the same preprocessing, wherever it lies."""

    @abstractmethod
    def __call__(self, image: Any) -> Tensor: ...


@dataclass(frozen=True)
class Original:
    """A model as it came, with everything that says which one it is.

    `tokenizer` is None where none was asked for. `vocabulary` holds the token ids that the model saw in training, where
    that is known (the embedded model); None = all. `library` is the package that its module and preprocessing are from.
    """

    module: nn.Module
    tokenizer: Callable[..., Any] | None
    preprocess: Callable[[Any], Tensor] | None
    name: str
    pretrained: str | None
    vocabulary: frozenset[int] | None = None
    library: str = "open_clip_torch"
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    image_doubts: tuple[str, ...] = ()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A sha256 over names, shapes and numbers of tensors: the same weights give the same 16 hexadecimal digits.

    Numbers are hashed as float32, tensors that it does not hold exactly as float64.

    Example:
        >>> digest({"w": torch.ones(2)}) == digest({"w": torch.ones(2, dtype=torch.float64)})
        True
    """
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _exact(tensors[name].detach().cpu()).contiguous()
        hasher.update(f"{name}{tuple(tensor.shape)}".encode())
        hasher.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")  # type: ignore[arg-type]
    return hasher.hexdigest()[:16]


def _exact(tensor: Tensor) -> Tensor:
    single = tensor.float()
    if tensor.dtype not in (torch.float64, torch.int32, torch.int64) or torch.equal(single.double(), tensor.double()):
        return single
    return tensor.double()


def in_one_line(error: Exception, width: int = 240) -> str:
    """What an error says, short enough to stand in another's message, and without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return shorten(plain, width, placeholder=" ...") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries log and warn on their way to an error that we word ourselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
