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

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "ROUNDING",
    "Stop",
    "basis",
    "choose",
    "factor_root",
    "gaussian",
    "gram",
    "lost",
    "norms",
    "project",
    "root",
    "spaces",
    "sweep",
]

#: Eigenvalues below this share of the largest are rounding.
_NOISE = 1e-13
#: Columns beyond those wanted, and the most passes, of the block iteration.
_MORE, _PASSES = 16, 16
#: It ends where further passes would win less than this share of what is lost, ...
_GAIN = 2e-3
#: ... or this share of all, which float32 cannot tell.
ROUNDING = 1e-7
#: In place of 0 below a fraction.
_TINY = 1e-300
#: Numbers below which there is nothing to gain from float32.
_SMALL = 2**18
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
    A: Tensor,
    B: Tensor,
    most: int | None = None,
    roots: tuple[Tensor, Tensor] | None = None,
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
    up, down, _, _ = spaces(A, B, most, roots)
    return up, down


def spaces(
    A: Tensor,
    B: Tensor,
    most: int | None = None,
    roots: tuple[Tensor, Tensor] | None = None,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`basis`, and :func:`project` of the same factors on it.

    Args:
        A: [L, N, r, d_in].
        B: [L, N, r, d_out].
        most: As for :func:`basis`.
        roots: As for :func:`basis`; both times a weight w_i of each adapter, bases are those of
            Σ w_i² ΔW_i ΔW_iᵀ and Σ w_i² ΔW_iᵀ ΔW_i.
        energy: Σ w_i² ‖ΔW_i‖² [L], if it is at hand.
    """
    T, S = (factor_root(A), factor_root(B)) if roots is None else roots
    if energy is None and roots is None:
        energy = (S.mT @ T).square().sum((1, 2, 3))
    up, left = _side(T, B, most, energy)
    down, right = _side(S, A, most, energy)
    return up, down, left, right


def _side(
    T: Tensor, outer: Tensor, most: int | None, energy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leading directions of Σ outerᵀ T Tᵀ outer, as rows [L, k, d], and outer rowsᵀ."""
    L, N, r, d = outer.shape
    full = min(N * r, d)
    if _few(N * r, d, most):
        assert most is not None
        if energy is None:
            energy = (T.mT @ gram(outer) @ T).diagonal(dim1=-2, dim2=-1).sum((1, 2))
        rows, coordinates = _block(T.to(outer.dtype), outer, most, energy)
        return rows.to(torch.float32), coordinates
    # Of all directions the last ones are small differences.
    kind = torch.float64 if most is None or most >= full or outer.numel() < _SMALL else outer.dtype
    X = (T.mT.to(kind) @ outer.to(kind)).flatten(1, 2)
    rows = _leading(X, most).to(torch.float32)
    return rows, (outer.flatten(1, 2) @ rows.mT.to(outer.dtype)).view(L, N, r, -1)


@functools.lru_cache(maxsize=16)
def gaussian(*shape: int) -> Tensor:
    """Standard normal numbers, the same for a shape each time; not to be written to."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Stop:
    """When block iteration has found the leading directions, on all layers of a stack.

    A pass wins energy, and the next one less of it, by a factor that is known from the last two
    gains, or at first from the values: σ⁴ at the end of the block ÷ σ⁴ of the last one wanted.
    Enough is what leaves little to be won, as a share of what is lost in any case.

    Args:
        energy: ‖X‖² [L], float64.
        wanted: Number of directions.
    """

    def __init__(self, energy: Tensor, wanted: int) -> None:
        self._energy, self._wanted = energy, wanted
        self._kept: Tensor | None = None
        self._won: Tensor | None = None
        self._passes = 0

    def __call__(self, values: Tensor) -> bool:
        """Whether to stop.

        Args:
            values: [L, m], squared singular values in the span of this pass, falling.
        """
        kept, before = values[:, : self._wanted].sum(1), self._kept
        self._kept, self._passes = kept, self._passes + 1
        if before is None:
            return False
        won, lost = (kept - before).clamp_min(0), (self._energy - kept).clamp_min(0)
        if self._won is None:
            last = values[:, min(self._wanted, values.shape[1]) - 1]
            fall = (values[:, -1] / last.clamp_min(_TINY)).square()
        else:
            fall = won / self._won.clamp_min(_TINY)
        fall = fall.clamp(0, 0.95)
        self._won = won
        more = won * fall / (1 - fall)
        done = (more <= _GAIN * lost) | (won <= ROUNDING * self._energy)
        return bool(done.all()) or self._passes >= _PASSES


def _few(n: int, d: int, most: int | None) -> bool:
    """Whether so few of min(n, d) directions are wanted that block iteration is faster."""
    full = min(n, d)
    return (full if most is None else min(most, full)) + _MORE < full // 3


def _leading(X: Tensor, most: int | None) -> Tensor:
    """Leading right singular vectors of X [L, n, d], rows [L, k, d], zero beyond the rank."""
    n, d = X.shape[1:]
    wanted = min(n, d) if most is None else min(most, n, d)
    values, vectors = torch.linalg.eigh(gram(X) if n < d else gram(X.mT))
    values, vectors = values.flip(-1)[:, :wanted], vectors.flip(-1)[..., :wanted]
    keep = (values > _NOISE * values[:, :1]) & (values > 0)
    if n < d:
        wide = X.to(torch.float64)
        scale = torch.where(keep, values.clamp_min(torch.finfo(wide.dtype).tiny), 1.0).rsqrt()
        # Vectors of small values are orthogonal to a few digits only. QR keeps the order.
        Q, R = torch.linalg.qr(wide.mT @ (vectors * (scale * keep).unsqueeze(1)))
        sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        vectors = Q * sign.unsqueeze(1)
    used = int(keep.sum(1).max()) if keep.numel() else 0
    rows: Tensor = (vectors * keep.unsqueeze(1)).mT[:, :used]
    return rows


def _block(T: Tensor, outer: Tensor, wanted: int, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of X, X_i = T_iᵀ outer_i, by block iteration.

    Starts in the span of a few random combinations of the rows, which the adapters take turns
    in. Each pass multiplies by XᵀX, in factors, and ends with the best directions in its
    span (Rayleigh-Ritz), until :class:`Stop` says that they are good enough.

    Args:
        T: [L, N, r, r].
        outer: [L, N, r, d].
        wanted: Number of directions.
        energy: ‖X‖² [L].

    Returns:
        Rows [L, wanted, d], float64, and outer rowsᵀ [L, N, r, wanted].
    """
    L, N, r, _ = outer.shape
    flat = outer.flatten(1, 2)

    def across(root: Tensor, rows: Tensor) -> Tensor:
        return (root @ rows.view(L, N, r, -1)).flatten(1, 2)

    mixing = gaussian(N, r, r).to(outer)
    turns = -(-(wanted + _MORE) // r)
    mixed = T @ mixing
    start = [
        outer[:, turn::turns].flatten(1, 2).mT @ mixed[:, turn::turns].flatten(1, 2)
        for turn in range(turns)
    ]
    Y = torch.cat(start, -1)
    stop = Stop(energy, wanted)
    while True:
        Q = torch.linalg.qr(Y.to(torch.float64))[0]
        left = flat @ Q.to(flat.dtype)
        S = across(T.mT, left)
        values, vectors = torch.linalg.eigh((S.mT @ S).to(torch.float64))
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        if stop(values):
            break
        Y = flat.mT @ across(T, S)
    chosen = vectors[..., :wanted]
    here = values[:, :wanted] > ROUNDING**2 * values[:, :1]
    rows = (Q @ chosen).mT * here.unsqueeze(-1)
    coordinates = left @ (chosen * here.unsqueeze(1)).to(left.dtype)
    return rows, coordinates.view(L, N, r, -1)


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
    new_up, left = _side(factor_root(right), B, up.shape[1])
    new_down, _ = _side(factor_root(left), A, down.shape[1])
    return new_up, new_down


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
