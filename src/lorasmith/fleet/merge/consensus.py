"""Merging by agreement: TIES, and SCE.

Sources: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models" (arXiv
2306.01708), section 4, for ``ties``; Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models"
(arXiv 2408.07990), section 3.3, for ``sce``.

**TIES**, entry by entry of a layer, τ̂ᵢ the largest entries of ΔWᵢ (``density``; the paper's k):

    γ = sgn Σ wᵢ τ̂ᵢ                                           the sign with the larger mass
    ΔW = λ W · Σ_{i ∈ 𝒜} wᵢ τ̂ᵢ / Σ_{i ∈ 𝒜} |wᵢ|             𝒜 = {i : sgn(wᵢ τ̂ᵢ) = γ, τ̂ᵢ ≠ 0}

With equal weights that sum to 1 this is the paper's disjoint mean, whatever N: N equal adapters
give that adapter. Weights are ours: they count in the election, in the mean, and W = Σ |wᵢ|
scales the result as it does that of ``linear``. The paper trims the changes of all layers
together; here, as everything, layer by layer. The paper's k is 20 %.

**SCE**, layer by layer:

    select       the share ``density`` of the entries with the largest variance over i: δ̂ᵢ
    calculate    ηᵢ = W · wᵢ ‖δ̂ᵢ‖² / Σⱼ wⱼ ‖δ̂ⱼ‖²
    erase        ΔW = Σ ηᵢ δ̂ᵢ over those with sgn δ̂ᵢ = sgn Σⱼ wⱼ δ̂ⱼ

W = Σ wᵢ; with equal weights of sum 1 it is the paper's. Weights are not negative. Entries in which
all agree exactly have no variance and are the first to go where density < 1 (the paper's τ is
10 %); of N equal adapters nothing but that is defined, so all entries are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.fleet.merge.checks import check_factor, check_not_negative, check_share
from lorasmith.fleet.merge.registry import register
from lorasmith.fleet.merge.sparse import largest, masked, trimmed

__all__ = ["disjoint_mean", "sce", "ties"]


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """W · Σ wᵢ ΔWᵢ / Σ |wᵢ|, entry by entry over those whose sign has the larger mass.

    Args:
        deltas: ΔWᵢ of one shape; entries of 0 take no part.
        weights: wᵢ; a negative one turns the signs of its ΔWᵢ. W = Σ |wᵢ|.
    """
    mass = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        mass.add_(delta, alpha=weight)
    sign = mass.sign_()
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = (delta * weight).mul_(sign).clamp_min_(0)  # |wᵢ ΔWᵢ| where its sign is γ
        total += agreeing
        share.add_(agreeing > 0, alpha=abs(weight))
    # No share is as small as what stands in for a share of 0, over which the sum is 0.
    mean = total.div_(share.clamp_min_(torch.finfo(share.dtype).tiny)).mul_(sign)
    return mean.mul_(math.fsum(abs(w) for w in weights))


@register(
    "ties",
    form="dense",
    formula="λ · mean of top(ΔWᵢ, density) over those of the elected sign",
    source="arXiv 2306.01708",
)
def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Trim, elect sign, disjoint merge.

    Args:
        deltas: ΔWᵢ [d_out, d_in].
        weights: wᵢ.
        density: Share of the entries of each to keep, 0 to 1.
        scale: λ.
    """
    density, scale = check_share("density", density), check_factor("scale", scale)
    return scale * disjoint_mean([trimmed(d, density) for d in deltas], weights)


@register(
    "sce",
    form="dense",
    formula="Σ ηᵢ ΔWᵢ, ηᵢ ∝ wᵢ‖ΔWᵢ‖², where they vary most and agree in sign",
    source="arXiv 2408.07990",
)
def sce(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float = 1.0) -> Tensor:
    """Select, calculate, erase.

    Args:
        deltas: ΔWᵢ [d_out, d_in].
        weights: wᵢ, not negative.
        density: Share of the entries to select, 0 to 1.
    """
    density = check_share("density", density)
    total = check_not_negative("sce", weights)
    count = len(deltas)
    mean = sum(deltas[1:], deltas[0]) / count
    variance = torch.zeros_like(mean)
    for delta in deltas:
        apart = delta - mean
        variance.addcmul_(apart, apart, value=1 / count)
    chosen = largest(variance, round(density * variance.numel()))
    selected = [masked(d, chosen) for d in deltas]
    energy = [
        w * float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2
        for w, d in zip(weights, selected, strict=True)
    ]
    whole = math.fsum(energy)
    if not whole:
        return torch.zeros_like(mean)
    mass = torch.zeros_like(mean)
    for delta, weight in zip(selected, weights, strict=True):
        mass.add_(delta, alpha=weight)
    sign = mass.sign_()
    made = torch.zeros_like(mean)
    for delta, part in zip(selected, energy, strict=True):
        # |δ̂ᵢ| where its sign is the elected one
        made.add_((delta * sign).clamp_min_(0), alpha=total * part / whole)
    return made.mul_(sign)
