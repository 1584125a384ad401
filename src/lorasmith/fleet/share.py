"""The Share basis of a fleet: principal components of factors.

Share (arXiv 2602.06043) is the basis that vLoRA builds: the factors of all adapters are
flattened, centred and reduced to K components a layer, for A and B apart,

    A_i ≈ t_i (a_0 + Σ_k ℓ_ik a_k)      B_i ≈ t_i (b_0 + Σ_k m_ik b_k)      ΔW_i ≈ B_i A_i,

so that a further adapter costs 2 (K + 1) numbers a layer. Written with one core, as the joint
basis is: V = (a_0; …; a_K) [(K+1) r, d_in], U = (b_0, …, b_K) [d_out, (K+1) r] and
C_i = (m_i ℓ_iᵀ) ⊗ I_r. The mean is component 0, and its loading t_i the adapter's size.

Deviations from the paper and vLoRA, each of which lowers the error of ΔW:

* A and B mean nothing each by itself: (Q A, B Q⁻¹) is the same adapter. Factors are brought
  to the balanced gauge first (:func:`balance`: ΔW = P S Zᵀ, B = P S^½, A = S^½ Zᵀ, so that
  A Aᵀ = Bᵀ B), which fixes them up to an orthogonal r × r matrix, and that is chosen by
  generalised Procrustes analysis (:func:`align`; Gower 1975): each adapter is turned to the
  mean of the others, [A_i, B_iᵀ] → Q_i [A_i, B_iᵀ].
  Where adapters have more in common as they are stored (made from one initialisation, say), that
  does harm; ``building.best_gauge`` measures which it is, and the factors stay as they are then.
* Ranks may differ: missing rows are zero, which is exact.
* Adapters can be scaled to unit norm before, so that small ones keep their relative accuracy.

The components come from the eigenvectors of the N × N Gram matrix, accumulated in float64
(:func:`components`): D = r d enters in one product only; a few of many by block iteration.

Limits: with N adapters there are N − 1 components at most, and an adapter that was not among
them is hardly in their span. What is left is measured on ΔW (:func:`distance`), not on factors.

Shapes: ``A`` [L, N, r, d_in] and ``B`` [L, N, r, d_out] as in :mod:`lorasmith.fleet.joint`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorasmith.fleet.joint import ROUNDING, Stop, factor_root, gaussian, gram

__all__ = [
    "align",
    "aligning",
    "balance",
    "balancing",
    "components",
    "distance",
    "flatten",
    "loss",
    "placed",
    "polar",
    "turn",
]

#: Eigenvalues below this share of the largest are rounding.
_NOISE = 1e-12
#: Muon's polynomial, and how often it is applied: singular values from 2e-4 on come to about 1.
_QUINTIC, _STEPS = (3.4445, -4.7750, 2.0315), 7
#: Mean square of Q - 1 below which all are where they belong.
_STILL = 1e-7
#: Columns beyond those wanted of the block iteration.
_MORE = 8


def balancing(T: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """What brings factors into the balanced gauge: A' = M A, B' = N B.

    With A Aᵀ = T Tᵀ, Bᵀ B = R Rᵀ and Rᵀ T = P S Z: M = S^-½ Pᵀ Rᵀ and N = S^-½ Z Tᵀ (B as
    rows). Directions in which B A has rounding only become zero.

    Args:
        T: [..., r, r], :func:`lorasmith.fleet.joint.factor_root` of A.
        R: That of B.
    """
    product = R.mT @ T
    # Half the time of the singular value decomposition. What its eigenvalues are wrong by,
    # 1e-16 of the largest, moves B A by 1e-16 S_1² / S_k in the direction k.
    values, P = torch.linalg.eigh(product @ product.mT)
    values, P = values.flip(-1), P.flip(-1)
    keep = (1e-12 * values[..., :1] < values) & (values > 0)
    S = torch.where(keep, values, torch.ones_like(values)).sqrt()
    left = (P * (S.rsqrt() * keep).unsqueeze(-2)).mT  # S^-½ Pᵀ
    return left @ R.mT, (left @ product / S.unsqueeze(-1)) @ T.mT


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced gauge: the same B A with A Aᵀ = Bᵀ B diagonal and falling.

    Args:
        A: [..., r, d_in].
        B: [..., r, d_out], the columns of the factor as rows.

    Returns:
        Both in the dtype given.
    """
    M, N = balancing(factor_root(A), factor_root(B))
    return M.to(A.dtype) @ A, N.to(B.dtype) @ B


def turn(A: Tensor, B: Tensor, like_A: Tensor, like_B: Tensor) -> Tensor:
    """The orthogonal Q [..., r, r] that brings (Q A, Q B) nearest to a reference.

    Least squares over both factors (orthogonal Procrustes problem, Schönemann 1966): the polar
    factor of A' Aᵀ + B' Bᵀ.
    """
    return polar(like_A @ A.mT + like_B @ B.mT)


def placed(
    A: Tensor, B: Tensor, like_A: Tensor, like_B: Tensor, gauge: str
) -> tuple[Tensor, Tensor]:
    """The factors of a further adapter, in the gauge of a fleet and with the rank of its basis.

    Of a higher rank than that it is the best part, in whichever gauge.

    Args:
        A: [k, d_in].
        B: [k, d_out].
        like_A: [r, d_in], the mean of the fleet.
        like_B: [r, d_out].
        gauge: ``"aligned"``, ``"balanced"`` or ``"stored"``.
    """
    r = like_A.shape[0]
    higher = A.shape[0] > r
    if higher or gauge != "stored":
        A, B = balance(A, B)
    A, B = (torch.nn.functional.pad(X[:r], (0, 0, 0, max(0, r - X.shape[0]))) for X in (A, B))
    if gauge == "aligned" or (higher and gauge == "stored"):
        Q = turn(A, B, like_A, like_B).to(A.dtype)
        A, B = Q @ A, Q @ B
    return A, B


def polar(M: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each of M [..., r, r], float64.

    By polynomials in M Mᵀ, which bring all singular values to 1: of degree five in float32
    (Jordan et al. 2024, Muon; small values grow by 3.4 a step), then Newton and Schulz's, which
    converges quadratically. Where a value is too small for that, or zero, by the singular value
    decomposition, which takes five times as long.
    """
    M = M.to(torch.float64)
    size = torch.linalg.matrix_norm(M)[..., None, None]
    X = (M / torch.where(size > 0, size, torch.ones_like(size))).to(torch.float32)
    eye = torch.eye(M.shape[-1], device=M.device)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        G = X.mT @ X
        X = X @ (a * eye + G @ (b * eye + c * G))
    for number in range(5):
        if number == 2:
            X, eye = X.to(torch.float64), eye.to(torch.float64)
        X = X @ (1.5 * eye - 0.5 * (X.mT @ X))
    off = (X.mT @ X - eye).abs().amax((-2, -1))
    bad = ~(off < 1e-10)
    if bool(bad.any()):
        P, _, Z = torch.linalg.svd(M[bad])
        X[bad] = P @ Z
    return X


def aligning(
    A: Tensor, B: Tensor, M: Tensor, N: Tensor, *, sweeps: int = 3
) -> tuple[Tensor, Tensor]:
    """What turns all adapters of each layer to their common mean (generalised Procrustes analysis).

    Starts at the largest adapter of the highest rank; every sweep lowers
    Σ ‖Q_i (M_i A_i, N_i B_i) − mean‖² or leaves it.

    Args:
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
        M: [L, N, r, r] with M A balanced, float64.
        N: [L, N, r, r] with N B balanced.
        sweeps: How often the mean is computed anew.

    Returns:
        Q M and Q N.
    """
    # One of the highest rank: on what a reference does not have nothing would be determined.
    ranks = (M != 0).any(-1).sum(-1)
    size = (M.to(A.dtype) @ A).square().sum((2, 3))
    part = size / (2 * size.amax(1, keepdim=True)).clamp_min(torch.finfo(size.dtype).tiny)
    first = (ranks + part).argmax(1)
    layers = torch.arange(A.shape[0], device=A.device)
    eye = torch.eye(A.shape[2], dtype=torch.float64, device=A.device)
    for number in range(sweeps):
        product = None
        for X, turned in ((A, M), (B, N)):
            T = turned.to(X.dtype)
            if number:
                mean = T.transpose(1, 2).flatten(2) @ X.flatten(1, 2)
            else:
                mean = T[layers, first] @ X[layers, first]
            inner = (X.flatten(1, 2) @ mean.mT).view(*X.shape[:3], -1).to(torch.float64)
            product = inner.mT @ turned.mT if product is None else product + inner.mT @ turned.mT
        assert product is not None
        Q = polar(product)
        M, N = Q @ M, Q @ N
        # A turn by little moves the mean, and what follows from it, by its square.
        if number and float((Q - eye).square().mean()) < _STILL:
            break
    return M, N


def align(A: Tensor, B: Tensor, *, sweeps: int = 3) -> tuple[Tensor, Tensor]:
    """:func:`aligning` of factors that are balanced already; B A of every adapter stays.

    Args:
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
        sweeps: How often the mean is computed anew.
    """
    rows = torch.diag_embed((A != 0).any(-1).to(torch.float64))
    M, N = aligning(A, B, rows, rows, sweeps=sweeps)
    return M.to(A.dtype) @ A, N.to(B.dtype) @ B


def flatten(A: Tensor) -> Tensor:
    """[L, N, r, d] → [L, N, r d]."""
    return A.flatten(2)


def components(
    X: Tensor, present: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and principal components of rows, by way of their Gram matrix.

    Args:
        X: [L, N, D]; zero where an adapter does not have the layer.
        present: [L, N] booleans.
        most: Number of components to compute; all by default.

    Returns:
        mean [L, D]; components [L, K, D] with orthonormal rows (zero beyond the rank);
        loadings [L, N, K], zero where absent; the variance of each component [L, K]
        (squared singular values, float64).
    """
    here = present.to(X.dtype).unsqueeze(-1)
    count = here.sum(1).clamp_min(1)
    mean = (X * here).sum(1) / count
    # Centred without a centred copy: G − 1 gᵀ − g 1ᵀ + ḡ would cancel; the copy is exact.
    Y = X - mean.unsqueeze(1)
    if not bool(present.all()):
        Y = Y * here
    wanted = max(0, int(count.max()) - 1)
    wanted = wanted if most is None else min(most, wanted)
    if 4 * (wanted + _MORE) <= X.shape[1]:
        rows, loadings, variance = _block(Y, wanted)
        return mean, rows, loadings * here, variance
    values, vectors = torch.linalg.eigh(gram(Y))
    values, vectors = values.flip(-1)[:, :wanted], vectors.flip(-1)[..., :wanted]
    keep = (values > _NOISE * values[:, :1]) & (values > 0)
    singular = torch.where(keep, values.clamp_min(0), 0.0).sqrt()
    K = int(keep.sum(1).max()) if keep.numel() else 0
    singular, vectors, keep = singular[:, :K], vectors[..., :K], keep[:, :K]
    scale = torch.where(keep, singular, 1.0).reciprocal() * keep
    rows = (vectors * scale.unsqueeze(1)).mT.to(X.dtype) @ Y
    return mean, rows, (vectors * singular.unsqueeze(1)).to(X.dtype), singular.square()


def _block(Y: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """A few of many components of centred rows, by block iteration until ``joint.Stop``."""
    start = gaussian(Y.shape[2], wanted + _MORE).to(Y)
    energy = torch.linalg.vector_norm(Y, dim=(1, 2), dtype=torch.float64).square()
    Z, stop = Y @ start, Stop(energy, wanted)
    while True:
        W = torch.linalg.qr(Z.to(torch.float64))[0]
        rows = W.mT.to(Y.dtype) @ Y
        values, vectors = torch.linalg.eigh((rows @ rows.mT).to(torch.float64))
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        if stop(values):
            break
        Z = Y @ rows.mT
    values, vectors = values[:, :wanted], vectors[..., :wanted]
    keep = (values > ROUNDING**2 * values[:, :1]) & (values > 0)
    singular = torch.where(keep, values, 0.0).sqrt()
    scale = torch.where(keep, singular, 1.0).reciprocal() * keep
    components = (vectors * scale.unsqueeze(1)).mT.to(Y.dtype) @ rows
    loadings = (W @ (vectors * singular.unsqueeze(1))).to(Y.dtype)
    return components, loadings, singular.square()


def distance(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> Tensor:
    """‖B A − B' A'‖² [L, N] in float64, from r × r products.

    Args:
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
        other_A: [L, N, r', d_in].
        other_B: [L, N, r', d_out].
    """
    wide_A = torch.cat((A, other_A), dim=-2)
    wide_B = torch.cat((B, -other_B), dim=-2)
    return (gram(wide_A) * gram(wide_B)).sum((-2, -1)).clamp_min(0)


def loss(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor, energy: Tensor) -> Tensor:
    """:func:`distance` in float32 where it is a difference that float32 can tell.

    Args:
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
        other_A: [L, N, r, d_in].
        other_B: [L, N, r, d_out].
        energy: ‖B A‖² [L, N].
    """
    cross = ((A @ other_A.mT) * (B @ other_B.mT)).sum((-2, -1), dtype=torch.float64)
    held = ((other_A @ other_A.mT) * (other_B @ other_B.mT)).sum((-2, -1), dtype=torch.float64)
    found = (energy - 2 * cross + held).clamp_min(0)
    near = found < 1e-3 * energy
    if bool(near.any()):
        found[near] = distance(A[near], B[near], other_A[near], other_B[near])
    return found
