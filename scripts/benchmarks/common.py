"""What the benchmarks share: clocks, memory, and towers of a real model's size with random weights."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from time import perf_counter, process_time
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Time(NamedTuple):
    """Seconds on the clock, and of all threads together, which other jobs on the machine disturb less."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.1f} s ({self.cpu:.1f} s CPU)"

    def plus(self, other: Time) -> Time:
        return Time(self.wall + other.wall, self.cpu + other.cpu)


def timed(function: Callable[[], T]) -> tuple[T, Time]:
    wall, cpu = perf_counter(), process_time()
    result = function()
    return result, Time(perf_counter() - wall, process_time() - cpu)


def peak() -> float:
    """The most memory that the process has held, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def randomised(model: str):
    """A CLIP with the text tower of an open_clip model, random in every parameter, and next to no image tower."""
    import open_clip
    import torch

    config = open_clip.get_model_config(model)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    clip = open_clip.CLIP(config["embed_dim"], vision, config["text_cfg"], config.get("quick_gelu", False)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.named_parameters():
        if not name.startswith("visual.") and parameter.ndim:
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            centre = float(parameter.ndim == 1 and name.endswith("weight"))
            parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    return clip


def tokenizer(model: str):
    import open_clip

    return open_clip.get_tokenizer(model)
