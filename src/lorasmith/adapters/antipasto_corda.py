"""AntiPaSTO-CorDA: gains on the singular values of W as the layer's inputs see it.

Sources: the gains are those of ``antipasto`` (after Clark 2026, arXiv 2601.07473); the
decomposition oriented by the covariance of the inputs is that of Yang et al. 2024, "CorDA:
Context-Oriented Decomposition Adaptation" (arXiv 2406.05223), section 3.2, here with C^½ in
the place of C.

    C = E[x xᵀ] + 1e-3 I                            of calibration data, uncentred
    W C^½ = U diag(S) Vᵀ,      P = Vᵀ C^-½          its r leading triplets
    y = W x + U diag(S ∘ ELU(coeff · g)) P x + b

    x [d_in]     input          U [d_out, r], S [r], P [r, d_in]   frozen
    y [d_out]    output         g [r]                              trainable
    W, b         frozen         coeff                              how strongly g acts

With all directions U diag(S) P is W; with r of them it is the matrix of rank r whose output
is nearest to that of W on such inputs, E‖W x − U diag(S) P x‖² (1e-3 ‖·‖² added). The rows
of P are not orthogonal, but P x has covariance I: each direction carries S_i² of the output.

Identity at t = 0: g = 0. See ``antipasto`` for the gains, ``suppress_only`` (here S_eff ≤ S
means that no part of the output grows in that mean, not for every single x), the cap on r,
fusing and conversion.

1e-3 is absolute, so that inputs far smaller than 0.03 are decomposed as if they had no
preferred direction.

Needs W in plain form, once, and calibration data, on the untouched model.

Files: a type of our own, ``ANTIPASTO_CORDA``. U, S and P (as ``V``) are in the file, in
float32: loading needs no data and gives the very same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.adapters.antipasto import AntiPaSTO, GainConfig, SpectralConfig, triplets
from lorasmith.core.variant import BaseLayer

__all__ = ["AntiPaSTOCorDA", "AntiPaSTOCorDAConfig"]

_RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOCorDAConfig(GainConfig):
    """Configuration of AntiPaSTO-CorDA; the fields are those of ``GainConfig``."""

    variant: ClassVar[str] = "antipasto_corda"


class AntiPaSTOCorDA(AntiPaSTO):
    """y = W x + U diag(S ∘ ELU(coeff · g)) P x + b."""

    name = "antipasto_corda"
    config_class: ClassVar[type[SpectralConfig]] = AntiPaSTOCorDAConfig
    peft_type = "ANTIPASTO_CORDA"
    formula = "y = W x + U S ELU(c g) P x, W C^½ = U S V, P = V C^-½"

    def statistics(self, config: Any) -> frozenset[str]:
        return frozenset({"covariance"})

    def basis(
        self, base: BaseLayer, weight: Tensor, config: Any, r: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = weight.to(torch.float64)
        covariance = base.statistics["covariance"].to(weight.device)
        root, axes = _roots(covariance)
        u, s, v = triplets((weight @ (axes * root)) @ axes.T, r)
        return u, s, (v @ (axes / root)) @ axes.T


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """√λ and axes of C + 1e-3 I, float64: kept on C itself, which q, k and v share."""
    kept: tuple[Tensor, Tensor] | None = getattr(covariance, "_lorasmith_roots", None)
    if kept is None:
        wide = covariance.to(torch.float64)
        values, axes = torch.linalg.eigh((wide + wide.T) / 2)
        kept = (values.clamp_min(0) + _RIDGE).sqrt(), axes
        covariance._lorasmith_roots = kept  # type: ignore[attr-defined]
    return kept
