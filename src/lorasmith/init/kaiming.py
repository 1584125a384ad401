"""LoRA's usual start: A ~ U(−1/√d_in, 1/√d_in), B = 0.

Source: the reference code of Hu et al. 2021 (arXiv 2106.09685), which gives A PyTorch's
default for linear layers (Kaiming uniform with a = √5). ΔW = 0 since B = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lorasmith.init.types import NO_STATISTICS, Initialisation, Shape, Start, Weight

__all__ = ["Kaiming"]


@dataclass(frozen=True)
class Kaiming(Initialisation):
    """A [r, d_in] Kaiming uniform, B [d_out, r] zero."""

    name: ClassVar[str] = "kaiming"

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        a = torch.empty(rank, shape.d_in, device=shape.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return Start(a, torch.zeros(shape.d_out, rank, device=shape.device))
