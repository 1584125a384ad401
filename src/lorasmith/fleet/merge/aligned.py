"""KnOTS: merging in the space that the singular vectors of all changes together span.

Source: Stoica et al. 2024, "Model merging with SVD to tie the Knots" (arXiv 2410.19735), section 4.

    [ΔW₁ … ΔW_N] = U Σ [V₁ᵀ … V_Nᵀ]        U [d_out, k], Σ [k], Vᵢᵀ [k, d_in]
    ΔW = U Σ · merge(V₁ᵀ, …, V_Nᵀ)

The changes side by side have one set of left singular vectors; what is left of each adapter, Vᵢ,
is in common coordinates, in which TIES, DARE or a mean act on entries that mean the same. With a
mean (``inner="linear"``) it is the mean itself.

Without forming ΔWᵢ: with QR of [B₁ … B_N] = Q R and Aᵢᵀ = Qᵢ Lᵢ, the small matrix
[R₁ L₁ᵀ … R_N L_Nᵀ] [Σrᵢ, Σrᵢ] has the same Σ, and U, Vᵢ follow from its singular vectors. The
result has rank k ≤ Σ rᵢ. Singular values that are rounding are left out, for V would be noise
there; and entries of Vᵢᵀ that are rounding, below ε σ₁ / σ_j in row j, are 0, since in the mean of
TIES each entry counts that has the elected sign, however small: an adapter that does nothing
would halve what another one does. ``density`` trims Vᵢᵀ, not ΔWᵢ, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet.members import LayerFactors
from lorasmith.fleet.merge.checks import check_factor, check_share
from lorasmith.fleet.merge.consensus import disjoint_mean
from lorasmith.fleet.merge.dropping import dropped
from lorasmith.fleet.merge.registry import register
from lorasmith.fleet.merge.sparse import trimmed, weighted_sum

__all__ = ["align", "knots"]

_INNER = ("ties", "linear", "dare", "dare_ties")


def align(deltas: Sequence[LayerFactors]) -> tuple[Tensor, list[Tensor]]:
    """U Σ [d_out, k] and Vᵢᵀ [k, d_in] of [ΔW₁ … ΔW_N], k its numerical rank (at least 1)."""
    q, r = torch.linalg.qr(torch.cat([d.B for d in deltas], dim=1))
    sizes = [d.rank for d in deltas]
    bases, blocks = [], []
    for delta, part in zip(deltas, r.split(sizes, dim=1), strict=True):
        base, small = torch.linalg.qr(delta.A.T)
        bases.append(base)
        blocks.append(part @ small.T)
    U, S, Vh = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    noise = torch.finfo(S.dtype).eps * max(*Vh.shape, 8)
    k = max(1, int((noise * S[:1] < S).sum()))
    split = Vh[:k].split([b.shape[1] for b in blocks], dim=1)
    parts = [p @ b.T for p, b in zip(split, bases, strict=True)]
    # The smallest singular value that is left is above 0, unless there is nothing at all.
    least = (noise * S[:1] / S[:k].clamp_min(torch.finfo(S.dtype).tiny))[:, None]
    return q @ U[:, :k] * S[:k], [p * (p.abs() > least) for p in parts]


@register(
    "knots",
    form="factors",
    formula="U Σ merge(V₁ᵀ … V_Nᵀ), [ΔW₁ … ΔW_N] = U Σ Vᵀ",
    source="arXiv 2410.19735",
)
def knots(
    deltas: Sequence[LayerFactors],
    weights: Sequence[float],
    *,
    inner: str = "ties",
    density: float = 1.0,
    scale: float = 1.0,
    generator: torch.Generator,
) -> LayerFactors:
    """Aligns the changes, and merges what is left of each.

    Args:
        deltas: ΔWᵢ.
        weights: wᵢ.
        inner: What merges the Vᵢ: ties, linear, dare or dare_ties.
        density: Share of the entries of Vᵢ to keep (linear keeps all), 0 to 1.
        scale: λ.
        generator: Source of DARE's masks.
    """
    density, scale = check_share("density", density), check_factor("scale", scale)
    if inner not in _INNER:
        raise ConfigError(
            "inner is no method that knots has.",
            expected=", ".join(_INNER),
            got=repr(inner),
            key="inner",
        )
    left, parts = align(deltas)
    if inner == "ties":
        parts = [trimmed(p, density) for p in parts]
    elif inner != "linear":
        parts = [dropped(p, density, generator) for p in parts]
    merge = disjoint_mean if inner.endswith("ties") else weighted_sum
    return LayerFactors(merge(parts, weights), left * scale)
