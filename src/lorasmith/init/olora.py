"""OLoRA: start from the QR decomposition of W.

Source: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
(arXiv 2406.01775), section 3; semantics of PEFT 0.21.2.

    W = Q R,   B0 = Q[:, :r] [d_out, r],   A0 = R[:r, :] [r, d_in]

Identity at t = 0: B = B0 and A = A0, and what acts is W + s (B A − B0 A0).

Deviation from the paper and PEFT: both write the residual W − s B0 A0 into the base; here
W stays, which is the same function.

Needs W in plain form. Not possible where r exceeds min(d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorasmith.init.types import (
    NO_STATISTICS,
    Initialisation,
    Shape,
    Start,
    Weight,
    blank,
    check_rank,
)

__all__ = ["OLoRA"]


@dataclass(frozen=True)
class OLoRA(Initialisation):
    """A0 and B0 as above."""

    name: ClassVar[str] = "olora"

    @property
    def reads_weight(self) -> bool:
        return True

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        check_rank(self.name, rank, min(shape.d_in, shape.d_out), "r columns of Q of W = Q R")
        if shape.device.type == "meta":
            return blank(shape, rank, takes_over=True)
        w = weight().to(torch.float64)
        # The first r columns of W alone make the first r of Q, which then give R's rows.
        q, r = torch.linalg.qr(w[:, :rank])
        rows = q.T @ w
        # Householder leaves rounding below the diagonal of what it has made triangular.
        rows[:, :rank] = r
        return Start(rows.to(torch.float32), q.to(torch.float32), takes_over=True)
