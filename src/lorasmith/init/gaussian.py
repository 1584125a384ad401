"""A ~ N(0, 1/r²), B = 0: the start described in the text of the LoRA paper.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1, "a random Gaussian initialization
for A and zero for B"; the standard deviation 1/r is PEFT's (0.21.2). ΔW = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorasmith.init.types import NO_STATISTICS, Initialisation, Shape, Start, Weight

__all__ = ["Gaussian"]


@dataclass(frozen=True)
class Gaussian(Initialisation):
    """A [r, d_in] Gaussian with standard deviation 1/r, B [d_out, r] zero."""

    name: ClassVar[str] = "gaussian"

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        a = torch.empty(rank, shape.d_in, device=shape.device).normal_(std=1 / rank)
        return Start(a, torch.zeros(shape.d_out, rank, device=shape.device))
