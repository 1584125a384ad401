"""The mathematics of the stress controller: signals, pull and merge, on tensors and numbers.

Notation: a layer has A [r, d_in], B [d_out, r] and ΔW = s B A. Nothing here ever forms a
d_out × d_in matrix: a difference of two products of rank r is itself a product of rank 2r,

    B A − B' A' = P Q,    P = [B − B', B'] [d_out, 2r],    Q = [A; A − A'] [2r, d_in],

and ⟨P Q, P' Q'⟩ = Σ (Pᵀ P') ∘ (Q Q'ᵀ). In this form the parts are as small as the difference
is, so that nothing cancels, as it would in ‖B A‖² − 2 ⟨B A, B' A'⟩ + ‖B' A'‖².

Formulas: DESIGN of this project; Unified-LoRA, which the controller is named after, defines
none of them beyond the average of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "align_gauge",
    "conflict_from_gram",
    "difference",
    "gradient_gram",
    "inner",
    "merge_products",
    "pull_gradient",
    "relative_excess",
    "saturate",
]

_TINY = 1e-30


def saturate(excess: float, scale: float) -> float:
    """x / (scale + x): [0, ∞] → [0, 1], ½ at ``scale``."""
    if math.isinf(excess):
        return 1.0
    return excess / (scale + excess) if excess > 0 else 0.0


def relative_excess(fast: float, slow: float, spread: float) -> float:
    """max(0, fast − slow − spread) / (|slow| + spread): how far a loss is above its baseline.

    Unchanged if all three are multiplied by a positive number. ``spread`` (how much single
    losses differ) is what does not count, and keeps noise small where the baseline is near zero.
    """
    excess = fast - slow - spread
    if not excess > 0:
        return 0.0
    unit = abs(slow) + spread
    return excess / unit if unit > 0 else math.inf


def conflict_from_gram(gram: Sequence[Sequence[float]]) -> float | None:
    """(1 − mean cosine of all pairs) / 2, in [0, 1], from inner products [T, T].

    0: the tasks agree; ½: they have nothing to do with each other; 1 (two tasks): each undoes
    what the other does. ``None`` if fewer than two of the vectors are different from zero.
    """
    alive = [i for i in range(len(gram)) if gram[i][i] > 0]
    cosines = [
        max(-1.0, min(1.0, gram[i][j] / math.sqrt(gram[i][i]) / math.sqrt(gram[j][j])))
        for i in alive
        for j in alive
        if i < j
    ]
    if not cosines or not all(map(math.isfinite, cosines)):
        return None
    return (1.0 - sum(cosines) / len(cosines)) / 2.0


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """(Q [2r, d_in], P [d_out, 2r]) with P Q = B A − B0 A0, in float32 or better."""
    A, B, A0, B0 = (_wide(t) for t in (A, B, A0, B0))
    return torch.cat((A, A - A0)), torch.cat((B - B0, B0), dim=1)


def inner(Q: Tensor, P: Tensor, Q2: Tensor | None = None, P2: Tensor | None = None) -> Tensor:
    """⟨P Q, P2 Q2⟩ of two products, 0-dimensional; ‖P Q‖² where the second is left out."""
    Q2, P2 = (Q if Q2 is None else Q2), (P if P2 is None else P2)
    return ((P.mT @ P2) * (Q @ Q2.mT)).sum()


def pull_gradient(
    A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradient of ½ ‖s (B A − B0 A0)‖² in A [r, d_in] and B [d_out, r].

        ∂A = s² Bᵀ P Q,    ∂B = s² P Q Aᵀ

    Args:
        A: [r, d_in].
        B: [d_out, r].
        A0: [r, d_in], constant.
        B0: [d_out, r], constant.
        scaling: s.
    """
    Q, P = difference(A, B, A0, B0)
    A, B = _wide(A), _wide(B)
    return (B.mT @ P) @ Q * scaling**2, P @ (Q @ A.mT) * scaling**2


def gradient_gram(
    A: Tensor, B: Tensor, grad_A: Sequence[Tensor], grad_B: Sequence[Tensor], ridge: float = 1e-3
) -> Tensor:
    """Inner products [T, T] of T gradients of one layer, as the weight sees them.

    With G the gradient in ΔW, the factors have ∂A = s Bᵀ G and ∂B = s G Aᵀ: multiplied by a
    number, A and B move against each other, and so does the plain cosine of (∂A, ∂B). The
    metric of scaled gradient descent (Tong, Ma and Chi 2021, arXiv 2005.08898) takes this out:

        ⟨∂A₁, (BᵀB)⁻¹ ∂A₂⟩ + ⟨∂B₁ (A Aᵀ)⁻¹, ∂B₂⟩ = s² (⟨U G₁, U G₂⟩ + ⟨G₁ V, G₂ V⟩)

    with U and V the orthogonal projections onto the columns of B and the rows of A.

    Args:
        A: [r, d_in].
        B: [d_out, r].
        grad_A: T tensors [r, d_in].
        grad_B: T tensors [d_out, r].
        ridge: Added to the diagonals, relative to their mean: near B = 0, small directions of
            B would otherwise rule. Keeps the invariance under rotations (R orthogonal) and
            multiples; any other gauge moves the result as far as the ridge matters.
    """
    left = torch.stack([_wide(g) for g in grad_A])  # [T, r, d_in]
    right = torch.stack([_wide(g).mT for g in grad_B])  # [T, r, d_out]
    A, B = _wide(A), _wide(B)
    # No two factors of r × r can be shared here: one belongs to B, the other to A.
    total = A.new_zeros(len(left), len(left))
    for gram, gradients in ((B.mT @ B, left), (A @ A.mT, right)):
        diagonal = gram.diagonal()
        diagonal += ridge * diagonal.mean() + _TINY
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), gradients, upper=False)
        flat = half.flatten(1)
        total += flat @ flat.mT
    return total


def merge_products(
    A: Sequence[Tensor], B: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best rank-r approximation of the mean of T products B_t A_t, through QR and one SVD.

    Args:
        A: T tensors [r, d_in].
        B: T tensors [d_out, r].

    Returns:
        V [r, d_in] with orthonormal rows and UΣ [d_out, r], whose product is the
        approximation; the squared norm of what was cut off; that of the mean. All in float64
        where the device has it. Rows of V that the mean does not need (it has a lower rank,
        B = 0 for one) are those that keep most of the mean of A.
    """
    exact = torch.float32 if A[0].device.type == "mps" else torch.float64
    r = A[0].shape[0]
    wide_A = torch.cat([a.detach().to(exact) for a in A])  # [T r, d_in]
    wide_B = torch.cat([b.detach().to(exact) for b in B], dim=1) / len(A)  # [d_out, T r]
    q_b, r_b = torch.linalg.qr(wide_B)
    q_a, r_a = torch.linalg.qr(wide_A.mT)
    u, values, vh = torch.linalg.svd(r_b @ r_a.mT)
    squares = values.square()
    keep = min(r, len(values))
    noise = torch.finfo(exact).eps * 8 * max(wide_B.norm().item() * wide_A.norm().item(), 0.0)
    # On the host: a merge is rare, and the shapes that follow depend on it.
    rank = int((values[:keep] > noise).sum())
    V = vh[:rank] @ q_a.mT
    US = (q_b @ u[:, :rank]) * values[:rank]
    if rank < r:
        mean = torch.stack([a.detach().to(exact) for a in A]).mean(dim=0)
        rest = mean - (mean @ V.mT) @ V
        more = torch.linalg.svd(rest, full_matrices=False)[2][: r - rank]
        more = more - (more @ V.mT) @ V
        V = torch.cat((V, torch.linalg.qr(more.mT)[0].mT))
        US = torch.cat((US, US.new_zeros(len(US), r - rank)), dim=1)
    return V, US, squares[rank:].sum(), squares.sum()


def align_gauge(
    V: Tensor, US: Tensor, mean_A: Tensor, limit: float = 1e4
) -> tuple[Tensor, Tensor, bool]:
    """The factors of (UΣ) V in the gauge in which A is nearest to a given one.

        R = argmin ‖R V − Ā‖ = Ā Vᵀ (V Vᵀ)⁻¹ = Ā Vᵀ,    A = R V,    B = UΣ R⁻¹

    so that moments which belong to Ā's coordinates still mean what they meant.

    Args:
        V: [r, d_in], orthonormal rows.
        US: [d_out, r].
        mean_A: Ā [r, d_in].
        limit: R is used if no singular value is below the largest of Ā over this.

    Returns:
        A, B and whether they are so aligned. Where R is near singular (Ā has nothing in
        some direction of V), A = c V with ‖A‖ = ‖Ā‖, and the moments mean nothing.
    """
    mean_A = mean_A.to(V.dtype)
    R = mean_A @ V.mT
    smallest = torch.linalg.svdvals(R)[-1]
    if float(smallest) * limit >= float(torch.linalg.matrix_norm(mean_A, 2)) > 0:
        return R @ V, torch.linalg.solve(R.mT, US.mT).mT, True
    size = float(mean_A.norm()) / math.sqrt(len(V)) or 1.0
    return size * V, US / size, False


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
