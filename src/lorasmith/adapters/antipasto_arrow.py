"""AntiPaSTO-Arrow: free mixing of the first singular directions of W, gains on the others.

Source: of the family after Clark 2026, "AntiPaSTO: Self-Supervised Honesty Steering via
Anti-Parallel Representations" (arXiv 2601.07473); the gains are those of ``antipasto``. The
paper has no mixing block.

    W = W_res + U diag(S) V                    r singular triplets of W, frozen
    h = diag(S) V x
    y = W_res x + U [ (I + coeff · M) h_1…b ; (1 + ELU(coeff · g)) ∘ h_b+1…r ] + b

    x [d_in]     input      U [d_out, r], S [r], V [r, d_in]   frozen, V Vᵀ = UᵀU = I
    y [d_out]    output     M [b, b]     trainable, on the b directions of the largest S
    W, b         frozen     g [r − b]    trainable
                            coeff        how strongly both act

A gain can make a direction stronger or weaker; M can also send what comes in along one of
the first directions out along another.

Identity at t = 0: M = 0 and g = 0. W_res is never formed: what acts is W x plus the
difference. b is capped at r, and r at min(d_in, d_out), layer by layer; where b = r there is
no g (an empty tensor).

Needs W in plain form, once. Fuses exactly up to rounding; ΔW has rank r. See ``antipasto``
for the cost and the size of files.

Files: a type of our own, ``ANTIPASTO_ARROW``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.antipasto import CoreVariant, SpectralConfig, gains, wide
from lorasmith.core.config import check_count
from lorasmith.core.variant import LayerState

__all__ = ["AntiPaSTOArrow", "AntiPaSTOArrowConfig"]


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOArrowConfig(SpectralConfig):
    """Configuration of AntiPaSTO-Arrow.

    Args:
        r: Number of singular directions that it acts on; capped at min(d_in, d_out).
        block: b, the number of directions that are mixed; capped at r.
        coeff: Factor on the mixing and on the gains; negative turns their effect round.
    """

    variant: ClassVar[str] = "antipasto_arrow"

    block: int = 8
    coeff: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.block, "block", "number")
        self._number("coeff", -100.0, 100.0)


class AntiPaSTOArrow(CoreVariant):
    """y = W x + U [coeff · M, 0; 0, diag(ELU(coeff · g))] diag(S) V x + b."""

    name = "antipasto_arrow"
    config_class: ClassVar[type[SpectralConfig]] = AntiPaSTOArrowConfig
    peft_type = "ANTIPASTO_ARROW"
    formula = "y = W x + U [c M ⊕ ELU(c g)] S V x, W = U S V"

    def core_shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        block = min(config.block, r)
        return {"mixing": (block, block), "gain": (r - block,)}

    def change(self, state: LayerState, h: Tensor) -> Tensor:
        config: Any = state.config
        M = wide(state["mixing"], h)
        block = M.shape[0]
        top, tail = torch.split(wide(state["S"], h), [block, h.shape[-1] - block])
        mixed = F.linear(h[..., :block], (config.coeff * M * top).to(h.dtype))
        elu = gains(wide(state["gain"], h), config.coeff, suppress_only=False)
        return torch.cat((mixed, h[..., block:] * (tail * elu).to(h.dtype)), dim=-1)
