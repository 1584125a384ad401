"""Orthogonal start: A and B both random, their rows and columns in orthogonal subspaces.

Source: Dattatreya 2024, "Rethinking LoRA initialisation" (datta0.github.io/posts/
rethink-lora-init), as in PEFT 0.21.2.

    Q [r, r] random orthogonal, Q₁ its rows 1, 3, 5, …, Q₂ its rows 2, 4, 6, …
    A = Q₁ᵀ N₁ / 10,   N₁ [⌈r/2⌉, d_in] ~ N(0, 1)
    B = N₂ Q₂ / 10,    N₂ [d_out, ⌊r/2⌋] ~ N(0, 1)

Identity at t = 0: B A = N₂ Q₂ Q₁ᵀ N₁ / 100 = 0, since the rows of Q are orthogonal (up to
rounding). Unlike with B = 0 both factors have a gradient from the first step on.

Deviation from PEFT: an odd r works too; one half is then a row wider. With r = 1 B is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.init.types import NO_STATISTICS, Initialisation, Shape, Start, Weight

__all__ = ["Orthogonal"]


@dataclass(frozen=True)
class Orthogonal(Initialisation):
    """A [r, d_in] and B [d_out, r] as above."""

    name: ClassVar[str] = "orthogonal"

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        def normal(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64, device=shape.device)

        q, _ = torch.linalg.qr(normal(rank, rank))
        first, second = q[0::2], q[1::2]
        a = first.T @ normal(len(first), shape.d_in) / 10
        b = normal(shape.d_out, len(second)) @ second / 10
        return Start(a.to(torch.float32), b.to(torch.float32))
