"""PiSSA: start from the principal singular vectors of W.

Source: Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors
Adaptation of Large Language Models" (arXiv 2404.02948), equations 2 to 4.

    W = U S Vᵀ,   B0 = U_r (S_r / s)^½ [d_out, r],   A0 = (S_r / s)^½ V_rᵀ [r, d_in]

so that s B0 A0 is the best rank-r approximation of W, and training moves the principal
part while the residual stays frozen.

Identity at t = 0: B = B0 and A = A0, and what acts is W + s (B A − B0 A0).

Deviation from the paper: the paper stores the residual W − s B0 A0 as the base weight.
Here W stays and B0 A0 is subtracted on the fly, which is the same function; it costs the
product with a factor pair of rank 2r instead of r, and leaves the base model bit for bit
as it was. A 16-bit base loses nothing to the rounding of a residual.

The randomised form (``iterations=N``, or the name ``pissa_niter_N``) is that of the paper's
section 4: a subspace iteration with N rounds (Halko et al. 2011).

Needs W in plain form. Not possible where r exceeds min(d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.init.types import (
    NO_STATISTICS,
    Initialisation,
    Shape,
    Start,
    Weight,
    check_number,
    check_rank,
    check_scaling,
)

__all__ = ["PiSSA", "principal"]


def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of W [d_out, d_in]: U [d_out, r], S [r], Vᵀ [r, d_in].

    From the eigenvectors of the smaller Gram matrix in float64: several times faster
    than a full SVD, and as exact for the leading triplets, whose squares lie far above
    the rounding of float64.
    """
    wide = weight.to(torch.float64)
    tall = wide.shape[0] >= wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    # eigh sorts upwards
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    image = wide @ vectors if tall else wide.T @ vectors
    # The image of an orthonormal singular basis has orthogonal columns of length S.
    s = torch.linalg.vector_norm(image, dim=0)
    other = image / s.clamp_min(torch.finfo(torch.float64).tiny)
    u, v = (other, vectors) if tall else (vectors, other)
    return u, s, v.T


@dataclass(frozen=True)
class PiSSA(Initialisation):
    """A0 and B0 as above.

    Args:
        iterations: Rounds of the randomised SVD; ``None`` for the exact one.
    """

    name: ClassVar[str] = "pissa"

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None:
            check_number(self.name, "iterations", self.iterations, at_least=0, whole=True)

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
        limit = min(shape.d_in, shape.d_out)
        check_rank(self.name, rank, limit, "r singular vectors of W")
        check_scaling(self.name, scaling)
        w = weight()
        if self.iterations is None:
            u, s, vt = principal(w, rank)
        else:
            u, s, v = torch.svd_lowrank(w.to(torch.float32), q=rank, niter=self.iterations)
            vt = v.T
        root = (s / scaling).sqrt()
        return Start(
            (root[:, None] * vt).to(torch.float32), (u * root).to(torch.float32), takes_over=True
        )
