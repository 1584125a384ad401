"""AntiPaSTO-Ablate: directions in the singular space of W that are taken out, or partly.

Source: of the family after Clark 2026, "AntiPaSTO: Self-Supervised Honesty Steering via
Anti-Parallel Representations" (arXiv 2601.07473), whose decomposition it has; the paper has
no ablation.

    W = W_res + U diag(S) V                    r singular triplets of W, frozen
    h = diag(S) V x
    y = W_res x + U (h − coeff · Ĉ diag(α̂) Ĉᵀ h) + b,     α̂ = min(|α|, 1)

    x [d_in]     input      U [d_out, r], S [r], V [r, d_in]   frozen, V Vᵀ = UᵀU = I
    y [d_out]    output     C [r, k]    trainable; Ĉ its columns made orthonormal
    W, b         frozen     α [k]       trainable strength of each; 1 takes h's part along
                            coeff       Ĉ_i out altogether (with coeff = 1)

Contractive: ‖(I − coeff Ĉ diag(α̂) Ĉᵀ) h‖ ≤ ‖h‖ for 0 < coeff ≤ 2, and U is orthonormal and
orthogonal to W_res, so that ‖y − b‖ ≤ ‖W x‖ for every x, whatever the parameters are.

Identity at t = 0: α = 0; C is random, of unit columns. W_res is never formed: what acts is
W x − coeff · U Ĉ diag(α̂) Ĉᵀ diag(S) V x.

Start: with α clamped to 0 … 1 and α = 0.05 at the start, as one would write it down, it is
not the identity; and a clamped α that has become negative has no gradient any more. With
|α| it starts at 0 with a gradient (the derivative there is 1), and turns back from 0. As
with LoRA's A and B, C gets a gradient once α has moved. The alternative of acting relative
to the start, with α = 0.05, could amplify by 1 / 0.95.

k is capped at r, and r at min(d_in, d_out), layer by layer.

Acts as a LoRA of rank k whose A = Ĉᵀ diag(S) V and B = −coeff · U Ĉ diag(α̂) are made anew
in each call (2 k r (d_in + d_out) operations), and costs as much; it converts to one.

Needs W in plain form, once. Fuses exactly up to rounding. See ``antipasto`` for the size of
files.

Files: a type of our own, ``ANTIPASTO_ABLATE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.antipasto import SpectralConfig, SpectralVariant, wide
from lorasmith.core.config import check_count
from lorasmith.core.variant import LayerState

__all__ = ["AntiPaSTOAblate", "AntiPaSTOAblateConfig", "strengths"]


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOAblateConfig(SpectralConfig):
    """Configuration of AntiPaSTO-Ablate.

    Args:
        r: Number of singular directions that it acts on; capped at min(d_in, d_out).
        k: Number of directions within them that are taken out; capped at r.
        coeff: Factor on the strengths, above 0 and at most 2 (beyond, it would amplify).
    """

    variant: ClassVar[str] = "antipasto_ablate"

    k: int = 1
    coeff: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.k, "k", "number")
        self._number("coeff", 0.0, 2.0)


def strengths(alpha: Tensor) -> Tensor:
    """min(|α|, 1), with the derivative at 0 taken from above."""
    return torch.where(alpha < 0, -alpha, alpha).clamp_max(1)


class AntiPaSTOAblate(SpectralVariant):
    """y = W x − coeff · U Ĉ diag(α̂) Ĉᵀ diag(S) V x + b."""

    name = "antipasto_ablate"
    config_class: ClassVar[type[SpectralConfig]] = AntiPaSTOAblateConfig
    peft_type = "ANTIPASTO_ABLATE"
    formula = "y = W x − c U Ĉ α Ĉᵀ S V x, W = U S V"

    def core_shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        k = min(config.k, r)
        return {"direction": (r, k), "strength": (k,)}

    def start(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> dict[str, Tensor]:
        direction = torch.empty(shapes["direction"], device=device).normal_()
        return {
            "direction": F.normalize(direction, dim=0),
            "strength": torch.zeros(shapes["strength"], device=device),
        }

    def pair(self, state: LayerState, like: Tensor) -> tuple[Tensor, Tensor]:
        config: Any = state.config
        U, S, V, C = (wide(state[n], like) for n in ("U", "S", "V", "direction"))
        # One direction needs no decomposition, which on a device is slow.
        axes = F.normalize(C, dim=0) if C.shape[1] == 1 else torch.linalg.qr(C).Q
        weights = -config.coeff * strengths(wide(state["strength"], like))
        return (S[:, None] * axes).T @ V, U @ (axes * weights)
