"""Means on the sphere: SLERP of two changes, and the Karcher mean of any number.

Sources: Shoemake 1985, "Animating Rotation with Quaternion Curves", section 3.3, for ``slerp``;
Karcher 1977, "Riemannian center of mass and mollifier smoothing", and the fixed-point iteration
of Buss and Fillmore 2001, "Spherical Averages and Applications to Spherical Splines and
Interpolation", algorithm A1, for ``karcher``.

Each layer is one point: uᵢ = ΔWᵢ / ‖ΔWᵢ‖ on the unit sphere of [d_out, d_in] matrices with the
Frobenius inner product. Both methods go layer by layer, not over all layers at once.

    slerp     ΔW = W [sin((1−t) Ω) ΔW₁ + sin(t Ω) ΔW₂] / sin Ω,    cos Ω = ⟨u₁, u₂⟩
    karcher   ΔW = (Σ wᵢ ‖ΔWᵢ‖) u,    u = argmin Σ wᵢ ∠(u, uᵢ)²

with W = Σ wᵢ and t = w₂ / W. Both are linear combinations Σ cᵢ ΔWᵢ whose coefficients follow from
the N × N inner products ⟨BᵢAᵢ, BⱼAⱼ⟩ = Σ (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ), so that everything stays in factors.

The mean of orthogonal changes of equal norm: linear shortens it by √N, these do not. SLERP acts on
the changes as they are, as interpolation of weights does everywhere, and not on uᵢ: where norms
differ, the longer one counts for more.

Iteration for ``karcher``: u ← exp_u(Σ wᵢ log_u uᵢ / W), log_u uᵢ = (θᵢ / sin θᵢ)(uᵢ − cos θᵢ u),
until a step is below 1e-7 (that one is taken too); it starts at the normalised Σ wᵢ uᵢ.

Limits: weights are not negative. A change of zero (a layer that an adapter lacks) has no
direction; it counts with its weight and norm 0, which is linear interpolation. Opposite changes
have no mean direction and are refused. For points that are not within a quarter turn of each other
the Karcher mean is a local minimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet.members import LayerFactors
from lorasmith.fleet.merge.checks import check_not_negative
from lorasmith.fleet.merge.registry import register
from lorasmith.fleet.merge.sums import weighted

__all__ = ["inner_products", "karcher", "karcher_coefficients", "slerp", "slerp_coefficients"]

_STEPS = 500
#: Lengths of steps are roots of sums that cancel to about 1e-16.
_STEP = 1e-7
#: Below this angle sin is its argument to rounding.
_SMALL = 1e-6


def inner_products(deltas: Sequence[LayerFactors]) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ [N, N], float64."""
    A = torch.cat([d.A for d in deltas]).double()
    B = torch.cat([d.B for d in deltas], dim=1).double()
    shared = (B.T @ B) * (A @ A.T)
    sizes = [d.rank for d in deltas]
    rows = torch.stack([block.sum(dim=0) for block in torch.split(shared, sizes)])
    return torch.stack([block.sum(dim=1) for block in torch.split(rows, sizes, dim=1)], dim=1)


def _opposite(method: str) -> ConfigError:
    return ConfigError(
        f"{method} has no result on a layer where the changes are opposite: every direction is "
        "as near as every other.",
        fix="take linear, or other weights",
        key="method",
    )


def slerp_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """c₁ and c₂ of c₁ ΔW₁ + c₂ ΔW₂.

    Args:
        products: Their inner products [2, 2].
        weights: w₁ and w₂.
    """
    total = check_not_negative("slerp", weights)
    lengths = products.diagonal().clamp_min(0).sqrt()
    if total == 0 or not bool((lengths > 0).all()):
        return list(weights)
    t = weights[1] / total
    cosine = float(products[0, 1] / lengths.prod())
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if angle < _SMALL:
        return list(weights)
    if math.pi - angle < _SMALL:
        raise _opposite("slerp")
    return [total * math.sin(x * angle) / math.sin(angle) for x in (1 - t, t)]


def karcher_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """cᵢ of Σ cᵢ ΔWᵢ.

    Args:
        products: Inner products [N, N].
        weights: wᵢ.
    """
    total = check_not_negative("karcher", weights)
    lengths = products.diagonal().clamp_min(0).sqrt()
    w = torch.tensor(list(weights), dtype=torch.float64)
    used = (lengths > 0) & (w > 0)
    if total == 0 or not bool(used.any()):
        return [0.0] * len(weights)
    # Only points with a direction count for the direction.
    chosen = used.nonzero().flatten().tolist()
    inverse = lengths[chosen].reciprocal()
    cosines = products[chosen][:, chosen] * inverse[:, None] * inverse
    shares = w[chosen] / w[chosen].sum()
    u = _unit(shares, cosines)
    for _ in range(_STEPS):
        near = (cosines @ u).clamp(-1, 1)
        angles = near.acos()
        ratio = torch.where(angles > _SMALL, angles / angles.sin(), 1.0)
        if bool((math.pi - angles < _SMALL).any()):
            raise _opposite("karcher")
        step = shares * ratio
        step = step - (shares * ratio * near).sum() * u
        size = math.sqrt(max(0.0, float(step @ cosines @ step)))
        u = _unit(math.cos(size) * u + (math.sin(size) / size if size else 1.0) * step, cosines)
        if size < _STEP:
            break
    norm = float((w * lengths).sum())
    found = torch.zeros_like(w)
    found[chosen] = norm * u * inverse
    return [float(c) for c in found]


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor:
    length = math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))
    if length < _SMALL:
        raise _opposite("karcher")
    return coefficients / length


@register(
    "slerp",
    form="factors",
    formula="[sin((1−t)Ω) ΔW₁ + sin(tΩ) ΔW₂] / sin Ω",
    source="Shoemake 1985",
    count=2,
)
def slerp(deltas: Sequence[LayerFactors], weights: Sequence[float]) -> LayerFactors:
    """The point at t = w₂ / (w₁ + w₂) on the arc from one change to the other.

    Args:
        deltas: ΔW₁ and ΔW₂.
        weights: w₁ and w₂, not negative; their sum scales the result.
    """
    return weighted(deltas, slerp_coefficients(inner_products(deltas), weights))


@register(
    "karcher",
    form="factors",
    formula="(Σ wᵢ‖ΔWᵢ‖) · argmin_u Σ wᵢ ∠(u, ΔWᵢ)²",
    source="Karcher 1977",
)
def karcher(deltas: Sequence[LayerFactors], weights: Sequence[float]) -> LayerFactors:
    """The mean direction on the sphere, with the mean norm.

    Args:
        deltas: ΔWᵢ.
        weights: wᵢ, not negative; their sum scales the result.
    """
    return weighted(deltas, karcher_coefficients(inner_products(deltas), weights))
