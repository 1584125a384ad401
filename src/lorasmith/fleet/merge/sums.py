"""Weighted sums of changes: linear, concatenation, SVD, task arithmetic.

Sources: Ilharco et al. 2022, "Editing Models with Task Arithmetic" (arXiv 2212.04089), section 2,
for ``task_arithmetic``; Eckart and Young 1936 for ``svd``.

    ΔW = Σ wᵢ ΔWᵢ = [w₁ B₁ … w_N B_N] [A₁; …; A_N]

ΔWᵢ = Bᵢ Aᵢ [d_out, d_in], wᵢ ≥ 0 or < 0. All four give this sum, as stacked factors of rank
Σ rᵢ and without making ΔW; they differ in what becomes of it. ``concatenation`` keeps the stacked
factors; ``linear`` and ``task_arithmetic`` keep all that is more than rounding (N copies of an
adapter have its rank again); ``svd`` keeps the leading singular directions of ΔW, by default as
many as the largest input has, which is the nearest adapter of that rank.

Not the sum of factors (Σ wᵢ Bᵢ) (Σ wᵢ Aᵢ), which other libraries call linear: that one depends on
how each adapter happens to be factored, and the weights act squared.

``task_arithmetic`` multiplies by λ (``scale``) as the paper does. Its sum has no 1/N: with the
default weights 1/N, λ = N is the paper's λ = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorasmith.fleet.members import LayerFactors
from lorasmith.fleet.merge.checks import check_factor
from lorasmith.fleet.merge.registry import register

__all__ = ["concatenation", "linear", "svd", "task_arithmetic", "weighted"]


def weighted(deltas: Sequence[LayerFactors], factors: Sequence[float]) -> LayerFactors:
    """Σ cᵢ Bᵢ Aᵢ as stacked factors of rank Σ rᵢ."""
    return LayerFactors(
        torch.cat([d.A for d in deltas]),
        torch.cat([d.B * c for d, c in zip(deltas, factors, strict=True)], dim=1),
    )


@register("linear", form="factors", formula="Σ wᵢ ΔWᵢ", rank="exact")
def linear(deltas: Sequence[LayerFactors], weights: Sequence[float]) -> LayerFactors:
    """Σ wᵢ ΔWᵢ; the weighted mean with the default weights."""
    return weighted(deltas, weights)


@register("concatenation", form="factors", formula="[wᵢ Bᵢ …] [Aᵢ; …]", rank="stacked")
def concatenation(deltas: Sequence[LayerFactors], weights: Sequence[float]) -> LayerFactors:
    """The same sum as ``linear``, as the stacked factors themselves: exact, rank Σ rᵢ."""
    return weighted(deltas, weights)


@register(
    "svd", form="factors", formula="nearest of rank r to Σ wᵢ ΔWᵢ", source="Eckart and Young 1936"
)
def svd(deltas: Sequence[LayerFactors], weights: Sequence[float]) -> LayerFactors:
    """The same sum as ``linear``; what is written is the nearest adapter of rank r."""
    return weighted(deltas, weights)


@register(
    "task_arithmetic",
    form="factors",
    formula="λ Σ wᵢ ΔWᵢ",
    source="arXiv 2212.04089",
    rank="exact",
)
def task_arithmetic(
    deltas: Sequence[LayerFactors], weights: Sequence[float], *, scale: float = 1.0
) -> LayerFactors:
    """λ Σ wᵢ ΔWᵢ.

    Args:
        deltas: ΔWᵢ.
        weights: wᵢ.
        scale: λ.
    """
    scale = check_factor("scale", scale)
    return weighted(deltas, [scale * w for w in weights])
