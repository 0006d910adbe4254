"""In which precision numbers are summed."""

from __future__ import annotations

from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """A tensor in float64 where the device has it: thousands of parts sum to a whole that may be close to 0.

    Example:
        >>> import torch
        >>> precise(torch.ones(1)).dtype
        torch.float64
    """
    return x if x.device.type == "mps" else x.double()
