"""The joint basis of a fleet: one row space and one column space a layer.

Brüel-Gabrielsson et al. 2024, "Compress then Serve", arXiv 2407.00066 (their JD-Full):

    ΔW_i ≈ U C_i V          U [d_out, R_u], V [R_d, d_in] shared, C_i [R_u, R_d] one an adapter

with orthonormal columns of U and rows of V, so that C_i = Uᵀ ΔW_i Vᵀ is the best core and
‖ΔW_i − U C_i V‖² = ‖ΔW_i‖² − ‖C_i‖². Nothing here depends on the gauge of the factors.

U holds the leading eigenvectors of Σ ΔW_i ΔW_iᵀ, V those of Σ ΔW_iᵀ ΔW_i (the truncated
higher-order singular value decomposition, De Lathauwer et al. 2000); :func:`sweep` improves
both in turn for fixed ranks (HOOI). ΔW_i is never formed: with ΔW_i = B_i A_i and
A_i A_iᵀ = T_i T_iᵀ (r × r),

    Σ ΔW_i ΔW_iᵀ = Σ (B_i T_i)(B_i T_i)ᵀ,

whose eigenvectors come from the smaller of the Gram matrices [d, d] and [Σr, Σr], in
float64, or for a few of many directions by block iteration (Halko et al. 2011, arXiv 0909.4061,
algorithm 4.4).

Deviations from the paper: adapters may be scaled to unit norm before (else large adapters
decide the basis, and small ones lose their relative accuracy); R_u and R_d differ; they are
chosen by an error budget (:func:`choose`) that every adapter meets, not only their mean.

Shapes: ``A`` [L, N, r, d_in] and ``B`` [L, N, r, d_out] hold the rows of A_i and the columns
of B_i of N adapters on L layers of one shape, zero where an adapter has a lower rank or does
not adapt the layer, which is exact. ``up`` [L, R_u, d_out] is Uᵀ, ``down`` [L, R_d, d_in] is V.
A core in factored form is left [r, R_u], right [r, R_d] with C = leftᵀ right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["basis", "choose", "factor_root", "gram", "lost", "norms", "project", "root", "sweep"]

#: Eigenvalues below this share of the largest are rounding.
_NOISE = 1e-13
#: Columns beyond those wanted, and passes, of the block iteration.
_MORE, _PASSES = 16, 3
#: Columns that are multiplied at once in float32.
_COLUMNS = 1024
#: Ratio of a root's diagonal entries below which float32 products do not do.
_SKEWED = 0.03


def root(G: Tensor) -> Tensor:
    """T [..., r, r] with T Tᵀ = G for positive semidefinite G, float64."""
    G = G.to(torch.float64)
    size = G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    # The shift keeps rank-deficient matrices positive; zeros would still have no root.
    T: Tensor
    T, failed = torch.linalg.cholesky_ex(G + size * (4 * torch.finfo(G.dtype).eps) * eye)
    bad = (failed != 0) | (size[..., 0, 0] == 0)
    if bool(bad.any()):
        values, vectors = torch.linalg.eigh(G[bad])
        T = T.clone()
        T[bad] = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return T


def gram(X: Tensor) -> Tensor:
    """X Xᵀ of rows [..., n, d] in float64.

    float32 rows are multiplied in float32, at most 1,024 columns at a time, and the products
    added up in float64: right to 10⁻⁶ of the largest entry. Few columns are widened first.
    """
    if X.dtype == torch.float64 or X.shape[-1] <= 64:
        wide: Tensor = X.to(torch.float64)
        return wide @ wide.mT
    total: Tensor | None = None
    for start in range(0, X.shape[-1], _COLUMNS):
        part = X[..., start : start + _COLUMNS]
        product = (part @ part.mT).to(torch.float64)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def factor_root(X: Tensor) -> Tensor:
    """T [..., r, r] with T Tᵀ = X Xᵀ for factors X [..., r, d], float64.

    Of factors with very unequal rows (an adapter in a skewed gauge has them, and what one factor
    has too little of the other has too much) the products are made in float64.
    """
    T = root(gram(X))
    if X.dtype == torch.float64 or X.shape[-1] <= 64:
        return T
    diagonal = T.diagonal(dim1=-2, dim2=-1).abs()
    skewed = diagonal.amin(-1) < _SKEWED * diagonal.amax(-1)
    if bool(skewed.any()):
        T = T.clone()
        T[skewed] = root(gram(X[skewed].to(torch.float64)))
    return T


def norms(A: Tensor, B: Tensor) -> Tensor:
    """‖ΔW_i‖² [L, N] in float64: tr(BᵀB A Aᵀ)."""
    wide_A, wide_B = A.to(torch.float64), B.to(torch.float64)
    found: Tensor = ((wide_A @ wide_A.mT) * (wide_B @ wide_B.mT)).sum((-2, -1))
    return found.clamp_min(0)


def basis(
    A: Tensor, B: Tensor, most: int | None = None, roots: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The leading common directions of ΔW_i on each layer, most important first.

    Args:
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
        most: Number of directions to compute; all that are above rounding by default.
        roots: :func:`factor_root` of A and of B, if they are at hand.

    Returns:
        ``up`` [L, k, d_out] and ``down`` [L, k', d_in], float32, orthonormal rows; on layers
        with fewer directions the last rows are zero.
    """
    T, S = (factor_root(A), factor_root(B)) if roots is None else roots
    return _side(T, B, most), _side(S, A, most)


def _side(T: Tensor, outer: Tensor, most: int | None) -> Tensor:
    """Leading directions of Σ outerᵀ T Tᵀ outer, as rows [L, k, d]."""
    _, N, r, d = outer.shape
    kind = outer.dtype if _few(N * r, d, most) else torch.float64
    X = T.mT.to(kind) @ outer.to(kind)
    return _leading(X.flatten(1, 2), most).to(torch.float32)


def _few(n: int, d: int, most: int | None) -> bool:
    """Whether so few of min(n, d) directions are wanted that block iteration is faster."""
    full = min(n, d)
    return (full if most is None else min(most, full)) + _MORE < full // 3


def _leading(X: Tensor, most: int | None) -> Tensor:
    """Leading right singular vectors of X [L, n, d], rows [L, k, d], zero beyond the rank."""
    n, d = X.shape[1:]
    full = min(n, d)
    wanted = full if most is None else min(most, full)
    if _few(n, d, most):
        rows, values = _block(X, wanted)
    elif n < d:
        values, vectors = torch.linalg.eigh(X @ X.mT)
        values, vectors = values.flip(-1)[:, :wanted], vectors.flip(-1)[..., :wanted]
        keep = values > _NOISE * values[:, :1]
        scale = torch.where(keep, values.clamp_min(torch.finfo(X.dtype).tiny), 1.0).rsqrt()
        rows = (vectors * scale.unsqueeze(1)).mT @ X
    else:
        values, vectors = torch.linalg.eigh(X.mT @ X)
        values, rows = values.flip(-1)[:, :wanted], vectors.flip(-1)[..., :wanted].mT
    keep = (values > _NOISE * values[:, :1]) & (values > 0)
    rows = rows * keep.unsqueeze(-1)
    if n < d:
        # Vectors of small values are orthogonal to a few digits only. QR keeps the order.
        Q, R = torch.linalg.qr(rows.mT)
        sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        rows = (Q * sign.unsqueeze(1)).mT * keep.unsqueeze(-1)
    used = int(keep.sum(1).max()) if keep.numel() else 0
    return rows[:, :used]


def _block(X: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of X [L, n, d] by block iteration, and their values²."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(X.shape[2], wanted + _MORE, generator=generator, dtype=X.dtype)
    Q = torch.linalg.qr(X.mT @ (X @ start.to(X.device)))[0]
    for _ in range(_PASSES - 1):
        Q = torch.linalg.qr(X.mT @ (X @ Q))[0]
    # The iteration corrects what float32 rounds; what it ends with is made exact.
    Q = torch.linalg.qr(Q.to(torch.float64))[0]
    S = (X @ Q.to(X.dtype)).to(torch.float64)
    values, vectors = torch.linalg.eigh(S.mT @ S)
    rows = (Q @ vectors.flip(-1)[..., :wanted]).mT
    return rows, values.flip(-1)[:, :wanted]


def project(up: Tensor, down: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The best cores for orthonormal bases, factored: C_i = left_iᵀ right_i.

    Returns:
        left [L, N, r, R_u] = B_i U and right [L, N, r, R_d] = A_i Vᵀ.
    """
    L, N, r, _ = A.shape
    left = B.flatten(1, 2) @ up.mT.to(B.dtype)
    right = A.flatten(1, 2) @ down.mT.to(A.dtype)
    return left.view(L, N, r, -1), right.view(L, N, r, -1)


def sweep(up: Tensor, down: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """One alternating improvement of both bases at their present ranks (HOOI).

    Never raises Σ ‖ΔW_i − U C_i V‖².

    Args:
        up: [L, R_u, d_out].
        down: [L, R_d, d_in].
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
    """
    L, N, r, _ = A.shape
    right = (A.flatten(1, 2) @ down.mT).view(L, N, r, -1)
    new_up = _side(factor_root(right), B, up.shape[1])
    left = (B.flatten(1, 2) @ new_up.mT).view(L, N, r, -1)
    return new_up, _side(factor_root(left), A, down.shape[1])


def lost(
    left: Tensor, right: Tensor, energy: Tensor, ups: Sequence[int], downs: Sequence[int]
) -> Tensor:
    """‖ΔW_i − U C_i V‖² if only the first directions of each basis are kept.

    ‖C[:a, :b]‖² = ⟨left[:, :a] left[:, :a]ᵀ, right[:, :b] right[:, :b]ᵀ⟩, so that no core is
    formed.

    Args:
        left: [L, N, r, R_u], see :func:`project`.
        right: [L, N, r, R_d].
        energy: ‖ΔW_i‖² [L, N].
        ups: Candidates for R_u, ascending.
        downs: Candidates for R_d, ascending.

    Returns:
        [L, N, len(ups), len(downs)], float64, at least 0.
    """
    kept = torch.einsum("lnaij,lnbij->lnab", _growing(left, ups), _growing(right, downs))
    return (energy[..., None, None] - kept).clamp_min(0)


def _growing(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """rows[..., :k] rows[..., :k]ᵀ for each k: [L, N, len(sizes), r, r]."""
    found, total, before = [], None, 0
    for size in sizes:
        part = rows[..., before:size].to(torch.float64)
        product = part @ part.mT
        total = product if total is None else total + product
        found.append(total)
        before = size
    return torch.stack(found, dim=2)


def choose(
    losses: Sequence[Tensor], costs: Sequence[Tensor], budget: Tensor, *, rounds: int = 80
) -> list[int]:
    """The cheapest option a layer such that no adapter loses more than its budget in all.

    A multiple-choice knapsack with one constraint an adapter: Lagrange multipliers by
    multiplicative updates, then options that are not needed are given back one by one. The
    result meets the budget; it is near the optimum, not proven to be it.

    Args:
        losses: For each layer [N, options] what each adapter loses there.
        costs: For each layer [options]; bytes.
        budget: [N] the most that each adapter may lose over all layers.
        rounds: Updates of the multipliers.

    Returns:
        Index of the option of each layer. Where the budget cannot be met, the option with the
        smallest loss.
    """
    size = max((c.numel() for c in costs), default=0)
    pad = torch.nn.functional.pad
    E = torch.stack(
        [pad(e.to(torch.float64), (0, size - e.shape[1]), value=0.0) for e in losses]
    )  # [L, N, options]
    cost = torch.stack(
        [pad(c.to(torch.float64), (0, size - c.numel()), value=float("inf")) for c in costs]
    )
    L = E.shape[0]
    layers = torch.arange(L)
    finest = torch.where(torch.isinf(cost), torch.inf, E.sum(1)).argmin(1)
    best, best_cost = finest, float(cost[layers, finest].sum())
    tight = budget.clamp_min(torch.finfo(torch.float64).tiny)
    E = E / tight[:, None]
    feasible = E[layers, :, best].sum(0)
    if bool((feasible > 1).any()):
        return [int(i) for i in best]
    weight = torch.ones(E.shape[1], dtype=torch.float64)
    finite = cost[torch.isfinite(cost)]
    scale = float(finite.mean()) * L / max(E.shape[1], 1)
    step = 1.0
    for number in range(rounds):
        priced = cost + scale * torch.einsum("lno,n->lo", E, weight)
        option = priced.argmin(1)
        used = E[layers, :, option].sum(0)
        total = float(cost[layers, option].sum())
        if bool((used <= 1).all()) and total < best_cost:
            best, best_cost = option, total
        step = 1.5 / (1 + number / 10)
        weight = weight * ((used - 1).clamp(-1, 2) * step).exp()
        weight = weight.clamp(1e-12, 1e12)
    return [int(i) for i in _give_back(E, cost, best)]


def _give_back(E: Tensor, cost: Tensor, option: Tensor) -> Tensor:
    """Takes cheaper options, the largest saving first, while every budget is still met."""
    L = E.shape[0]
    layers = torch.arange(L)
    option = option.clone()
    used = E[layers, :, option].sum(0)
    for _ in range(64):
        saving = cost[layers, option].unsqueeze(1) - cost  # [L, options]
        new = used[None, :, None] - E[layers, :, option].unsqueeze(2) + E
        allowed = (new <= 1).all(1) & (saving > 0) & torch.isfinite(cost)
        if not bool(allowed.any()):
            break
        flat = int(torch.where(allowed, saving, -torch.inf).argmax())
        layer, choice = divmod(flat, cost.shape[1])
        used = used - E[layer, :, option[layer]] + E[layer, :, choice]
        option[layer] = choice
    return option
