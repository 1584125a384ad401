"""A ~ N(0, 1/r²), B = 0: the start described in the text of the LoRA paper.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1, "a random Gaussian initialization
for A and zero for B"; the standard deviation 1/r is PEFT's (0.21.2). ΔW = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorasmith.init.types import Shape, Start

__all__ = ["gaussian"]


def gaussian(weight: Callable[[], Tensor], shape: Shape, rank: int, scaling: float) -> Start:
    """A [r, d_in] Gaussian with standard deviation 1/r, B [d_out, r] zero."""
    a = torch.empty(rank, shape.d_in, device=shape.device).normal_(std=1 / rank)
    return Start(a, torch.zeros(shape.d_out, rank, device=shape.device))
