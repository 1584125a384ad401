"""LoRA-GA: start such that the first step goes where full fine-tuning would go.

Source: Wang, Yu, Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (arXiv
2407.05000), theorems 3.1 and 3.2, algorithm 1; names of PEFT 0.21.2.

    G = mean over batches of ∂loss/∂W [d_out, d_in] = U S Vᵀ, singular values falling
    A0 = c V_Iᵀ [r, d_in],   B0 = c U_J [d_out, r],   I, J among 1 … 2r

    direction   I               J
    ArB2r       1 … r           r + 1 … 2r
    A2rBr       r + 1 … 2r      1 … r
    ArBr        2, 4, 6, …      1, 3, 5, …
    random      r of 1 … 2r     the others

    scale       c
    stable      d_out^¼ / √γ
    weight_svd  mean of √(σ_i / s), i ≤ r, σ the singular values of W
    gd_scale    1 / s
    unit        1

Identity at t = 0: B = B0 and A = A0, and what acts is W + s (B A − B0 A0).

Deviations. From the paper: none in the formula (``ArB2r`` and ``stable`` with γ = 16 are what
its code takes); the SVD is exact up to 1024 features and a subspace iteration beyond. From PEFT
0.21.2, which multiplies B0, and B0 alone, with c and with the singular values of G (some
1e-4, so that B0 all but vanishes): the paper and its code have no S, and c on both factors.
PEFT's ``random`` takes I = J; the authors' code and ours take no direction of G twice. W
stays as it is (PEFT writes the residual), so it may be quantised, except with
``weight_svd``.

Needs calibration data with a loss. Not possible where 2r exceeds min(d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.init.pissa import principal
from lorasmith.init.types import (
    NO_STATISTICS,
    Initialisation,
    Shape,
    Start,
    Weight,
    blank,
    check_choice,
    check_flag,
    check_number,
    check_rank,
    check_scaling,
)

__all__ = ["LoRAGA"]

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")

#: Up to this many features the whole SVD is taken.
_EXACT = 1024


@dataclass(frozen=True)
class LoRAGA(Initialisation):
    """A0 and B0 as above.

    Args:
        direction: Which singular vectors of the gradient A0 and B0 take.
        scale: How long they are.
        stable_gamma: γ.
        sketch: Whether to keep random sketches of the gradient while it is summed up,
            instead of all of it: some 10 r (d_in + d_out) numbers a layer, at the price of
            singular vectors that are only close.
    """

    name: ClassVar[str] = "lora_ga"

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16
    sketch: bool = False

    def __post_init__(self) -> None:
        check_choice(self.name, "direction", self.direction, DIRECTIONS)
        check_choice(self.name, "scale", self.scale, SCALES)
        check_number(self.name, "stable_gamma", self.stable_gamma, above=0)
        check_flag(self.name, "sketch", self.sketch)

    @property
    def reads_weight(self) -> bool:
        return self.scale == "weight_svd"

    def statistics(self, rank: int) -> frozenset[str]:
        return frozenset({f"gradient_sketch:{2 * rank}" if self.sketch else "gradient"})

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        limit = min(shape.d_in, shape.d_out) // 2
        check_rank(self.name, rank, limit, "2 r singular vectors of the gradient")
        check_scaling(self.name, scaling)
        if shape.device.type == "meta":
            return blank(shape, rank, takes_over=True)
        if self.sketch:
            found = next(v for k, v in statistics.items() if k.startswith("gradient_sketch:"))
            u, v = found.U[:, : 2 * rank], found.V[:, : 2 * rank]
        else:
            u, v = _singular_vectors(statistics["gradient"], 2 * rank)
        for_a, for_b = self._chosen(rank)
        factor = self._factor(weight, shape, rank, scaling)
        a, b = v[:, for_a].T * factor, u[:, for_b] * factor
        return Start(
            a.to(shape.device, torch.float32).contiguous(),
            b.to(shape.device, torch.float32).contiguous(),
            takes_over=True,
        )

    def _chosen(self, rank: int) -> tuple[Tensor, Tensor]:
        """I and J, from 0."""
        first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
        if self.direction == "ArB2r":
            return first, second
        if self.direction == "A2rBr":
            return second, first
        if self.direction == "ArBr":
            return 2 * first + 1, 2 * first
        order = torch.randperm(2 * rank)
        return order[:rank], order[rank:]

    def _factor(self, weight: Weight, shape: Shape, rank: int, scaling: float) -> float:
        """c."""
        if self.scale == "stable":
            return float(shape.d_out**0.25 / self.stable_gamma**0.5)
        if self.scale == "gd_scale":
            return 1 / scaling
        if self.scale == "weight_svd":
            _, s, _ = principal(weight(), rank)
            return float((s / scaling).sqrt().mean())
        return 1.0


def _singular_vectors(gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """U [d_out, count] and V [d_in, count], orthonormal also where the gradient has no rank."""
    if min(gradient.shape) <= _EXACT:
        u, _, vt = principal(gradient, count)
        v = vt.T
    else:
        over = min(2 * count, *gradient.shape)
        u, _, v = torch.svd_lowrank(gradient, q=over, niter=4)
        u, v = u[:, :count], v[:, :count]
    return _completed(u), _completed(v)


def _completed(columns: Tensor) -> Tensor:
    """Orthonormal columns, with new ones in place of those that are zero."""
    q, r = torch.linalg.qr(columns.to(torch.float64))
    sign = r.diagonal().sign()
    made: Tensor = q * torch.where(sign == 0, torch.ones_like(sign), sign)
    return made
