"""CorDA: start from the singular vectors of W weighted by the covariance of its inputs.

Source: Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language
Models" (arXiv 2406.05223), equations 2 to 4; semantics of PEFT 0.21.2.

    C = E[x xᵀ] [d_in, d_in], scaled to a mean diagonal of 1, plus 0.01 on its diagonal
    W C = U S Vᵀ,   B0 = U_k (S_k / s)^½ [d_out, r],   A0 = (S_k / s)^½ V_kᵀ C⁻¹ [r, d_in]

so that s B0 A0 is the part of W that acts on the strongest (``mode="ipm"``,
instruction-previewed: the r largest S) or the weakest directions of the data
(``mode="kpm"``, knowledge-preserved: the r smallest).

Identity at t = 0: B = B0 and A = A0, and what acts is W + s (B A − B0 A0).

Deviations from PEFT: C is scaled by its own diagonal (PEFT divides the inputs of each batch
by their largest value), which shares the same product out differently between A0 and B0, the
same for all layers; C counts every token alike, and is inverted in float64, where 0.01 on
the diagonal is always enough (PEFT raises it until float32 can invert C). W stays as it is
(PEFT writes the residual).

Needs W in plain form and calibration data. Not possible where r exceeds min(d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorasmith.init.pissa import principal
from lorasmith.init.types import (
    NO_STATISTICS,
    Initialisation,
    Shape,
    Start,
    Weight,
    blank,
    check_choice,
    check_number,
    check_rank,
    check_scaling,
)

__all__ = ["CorDA"]

MODES = ("ipm", "kpm")


@dataclass(frozen=True)
class CorDA(Initialisation):
    """A0 and B0 as above.

    Args:
        mode: ``"ipm"`` trains the directions that the data use most, for the best result on
            a task like it; ``"kpm"`` those that they use least, to keep what the data show.
        damping: What is added to the diagonal of C, as a share of its mean.
    """

    name: ClassVar[str] = "corda"

    mode: str = "ipm"
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_choice(self.name, "mode", self.mode, MODES)
        check_number(self.name, "damping", self.damping, above=0)

    @property
    def reads_weight(self) -> bool:
        return True

    def statistics(self, rank: int) -> frozenset[str]:
        return frozenset({"covariance"})

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        check_rank(self.name, rank, min(shape.d_in, shape.d_out), "r singular vectors of W C")
        check_scaling(self.name, scaling)
        if shape.device.type == "meta":
            return blank(shape, rank, takes_over=True)
        c = statistics["covariance"].to(shape.device, torch.float64)
        mean = c.diagonal().mean()
        c = c / mean.clamp_min(torch.finfo(torch.float64).tiny)
        c.diagonal().add_(self.damping)
        product = weight().to(torch.float64) @ c
        if self.mode == "ipm":
            u, s, vt = principal(product, rank)
        else:
            u, s, vt = torch.linalg.svd(product, full_matrices=False)
            u, s, vt = u[:, -rank:], s[-rank:], vt[-rank:]
        # C is symmetric: Vᵀ C⁻¹ = (C⁻¹ V)ᵀ.
        v = torch.linalg.solve(c, vt.T)
        root = (s / scaling).sqrt()
        return Start((v * root).T.to(torch.float32), (u * root).to(torch.float32), takes_over=True)
