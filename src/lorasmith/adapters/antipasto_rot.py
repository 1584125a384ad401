"""AntiPaSTO-Rot: the singular vectors of W rotated in small blocks, its values shifted.

Source: after the adapter of Clark 2026, "AntiPaSTO: Self-Supervised Honesty Steering via
Anti-Parallel Representations" (arXiv 2601.07473), equations 4 and 6 to 8.

    W = W_res + U diag(S) V                    r singular triplets of W, frozen
    y = W_res x + U R_u diag(S + δs) R_v V x + b

    R = diag(R_1, R_2, …),   R_k = (I − A_k)⁻¹ (I + A_k)
    A_k = tan(max_angle / 2) · skew(θ_k) / √(1 + ‖θ_k‖²)

    x [d_in]     input      U [d_out, r], S [r], V [r, d_in]   frozen, V Vᵀ = UᵀU = I
    y [d_out]    output     δs [r]                             trainable
    W, b         frozen     θ [r/4 · 6]                        trainable, for each R in use

``rotate`` says which R is in use (``"V"``, ``"U"`` or ``"both"``); the other one is I. Blocks
have ``block`` = 4 directions of neighbouring S, the last one what is left over of r.

R is orthogonal whatever θ is. ‖A_k‖₂ ≤ tan(max_angle / 2) ‖θ_k‖ / √(1 + ‖θ_k‖²), since the
eigenvalues ±iλ of skew(θ) satisfy Σ λ² = ‖θ‖²; and R_k turns by 2 arctan λ. So no vector is
turned by ``max_angle`` or more, there is no θ where the gradient is undefined, and
θ ≪ 1 is a rotation by about θ · max_angle.

Identity at t = 0: θ = 0 and δs = 0. W_res is never formed: what acts is W x + U K V x with
K = R_u diag(S + δs) R_v − diag(S), summed from parts that are 0 at the start.

Deviations from the paper: R in blocks, and U rotated on request; the bound is on each block
as a whole, where the paper puts tanh on each entry of A; ``max_angle`` is 0.5 and not π / 3;
no coefficient α that turns both R and δs round. δs starts at 0: a random start, such as
N(4e-4, 4e-4), would change the model, and nothing needs it, since the gradient with respect
to θ and δs is not 0 there.

Needs W in plain form, once. Fuses exactly up to rounding; ΔW has rank r. See ``antipasto``
for the cap on r, the cost, and the size of files.

Files: a type of our own, ``ANTIPASTO_ROT``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.antipasto import CoreVariant, SpectralConfig, wide
from lorasmith.core.config import check_count
from lorasmith.core.variant import LayerState

__all__ = ["AntiPaSTORot", "AntiPaSTORotConfig", "turns"]

ROTATE = ("V", "U", "both")


@dataclass(frozen=True, kw_only=True)
class AntiPaSTORotConfig(SpectralConfig):
    """Configuration of AntiPaSTO-Rot.

    Args:
        r: Number of singular directions that it acts on; capped at min(d_in, d_out).
        rotate: Which singular vectors are rotated: ``"V"``, ``"U"`` or ``"both"``.
        block: Number of directions that are rotated into one another.
        max_angle: What no rotation exceeds, in radians; below π.
    """

    variant: ClassVar[str] = "antipasto_rot"

    rotate: str = "V"
    block: int = 4
    max_angle: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("rotate", ROTATE)
        check_count(self.block, "block", "number")
        self._number("max_angle", 0.0, 3.14)


def turns(theta: Tensor, count: int, block: int, max_angle: float) -> Tensor:
    """R_k − I of all blocks [count, block, block]; exactly 0 where θ is 0.

    Args:
        theta: What is below the diagonals of skew(θ_1), skew(θ_2), …, row by row. A last
            block that is smaller has the first rows only.
        count: Number of blocks.
        block: Number of rows of a block.
        max_angle: As in the configuration.
    """
    pairs = block * (block - 1) // 2
    theta = F.pad(theta, (0, count * pairs - theta.shape[-1])).reshape(count, pairs)
    entries = theta * (1 + theta.square().sum(dim=1, keepdim=True)).rsqrt()
    rows = torch.split(entries * math.tan(max_angle / 2), list(range(block)), dim=1)
    below = torch.stack([F.pad(row, (0, block - i)) for i, row in enumerate(rows)], dim=1)
    skew = below - below.mT
    eye = torch.eye(block, dtype=skew.dtype, device=skew.device)
    # (I − A)⁻¹ (I + A) − I, without the difference of two numbers near 1.
    solved: Tensor = torch.linalg.solve(eye - skew, skew)
    return 2 * solved


class AntiPaSTORot(CoreVariant):
    """y = W x + U (R_u diag(S + δs) R_v − diag(S)) V x + b."""

    name = "antipasto_rot"
    config_class: ClassVar[type[SpectralConfig]] = AntiPaSTORotConfig
    peft_type = "ANTIPASTO_ROT"
    formula = "y = W x + U (R (S + δs) − S) V x, W = U S V"

    def core_shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        full, rest = divmod(r, config.block)
        angles = full * config.block * (config.block - 1) // 2 + rest * (rest - 1) // 2
        turned = [t for t in ("V", "U") if config.rotate in (t, "both")]
        return {"shift": (r,), **{f"rotation_{t}": (angles,) for t in turned}}

    def change(self, state: LayerState, h: Tensor) -> Tensor:
        blocks, r = self._blocks(state, h), h.shape[-1]
        count, block, _ = blocks.shape
        full = h if r == count * block else F.pad(h, (0, count * block - r))
        parts = full.reshape(*h.shape[:-1], count, block)
        z = torch.einsum("...nj,nij->...ni", parts, blocks.to(h.dtype)).reshape(full.shape)
        return z if full is h else z[..., :r]

    @staticmethod
    def _blocks(state: LayerState, h: Tensor) -> Tensor:
        """The blocks of K [r/block, block, block], the last one filled up with zeros."""
        config: Any = state.config
        r, block = h.shape[-1], config.block
        count = -(-r // block)
        S, shift = (
            F.pad(wide(state[name], h), (0, count * block - r)).reshape(count, block)
            for name in ("S", "shift")
        )
        moved, total = S + shift, torch.diag_embed(shift)
        left, right = (
            turns(wide(state[name], h), count, block, config.max_angle) if name in state else None
            for name in ("rotation_U", "rotation_V")
        )
        # R_u D R_v − S = δs + (R_u − I) D + D (R_v − I) + (R_u − I) D (R_v − I)
        if right is not None:
            right = moved[:, :, None] * right
            total = total + right
        if left is not None:
            total = total + left * moved[:, None, :]
        if left is not None and right is not None:
            # Not ``@``, which autocast would round to 16 bits.
            total = total + (left[:, :, :, None] * right[:, None, :, :]).sum(dim=2)
        return total
