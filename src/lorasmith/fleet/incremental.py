"""Extending a basis by further adapters, exactly, and truncating it by a stated amount.

**Joint** (incremental Tucker decomposition; Brand 2002 for the matrix case). A new adapter
B A is split into what the basis spans and the rest, by QR of B − U Uᵀ B and Aᵀ − Vᵀ V Aᵀ:

    U' = (U, Q_u)    V' = (V; Q_v)    C_new = (Uᵀ B; R_u)(A Vᵀ, R_vᵀ)    C_i' = (C_i 0; 0 0)

Nothing has been lost so far, for old or new adapters. The common directions of all adapters as
they are held follow from their cores alone: with Σ C_i' C_i'ᵀ = E Λ Eᵀ and
Σ C_i'ᵀ C_i' = F M Fᵀ the basis turns to U' E and F V', every core to Eᵀ C_i' F, and the last
columns can be dropped. That is the decomposition of the whole fleet at once
(:mod:`lorasmith.fleet.joint`) as long as nothing was truncated before.

**Share** (incremental principal components with a moving mean): in the basis of the old
components and the part of the new rows outside of them, the centred coordinates of all rows
are known; the mean moves within that span, and the eigenvectors of their scatter matrix turn
components and loadings: ℓ' = (ℓ − mean ℓ) V, again exact until truncated.

**Error of old adapters.** A truncation moves what is held of adapter i by
δ_i = ‖C_i' − E E ᵀ C_i' F Fᵀ‖ (computed, not estimated), so that its error against the original,
ε_i before (both norms, not squares), is at most ε_i + δ_i afterwards.

Shapes: ``up`` [R_u, d_out], ``down`` [R_d, d_in], both with orthonormal rows; cores in factored
form, left [r, R_u] and right [r, R_d] with C = leftᵀ right, of all adapters below each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.fleet.joint import root

__all__ = [
    "Turned",
    "append",
    "coordinates",
    "extend",
    "orthonormal",
    "padded",
    "rotate",
    "scatter",
    "share_rotate",
    "square",
    "widen",
]

#: Directions outside of the basis that hold less than this share of a row's norm are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Turned:
    """A basis and the cores that belong to it.

    Attributes:
        up: [R_u, d_out].
        down: [R_d, d_in].
        left: [n, R_u], the factored cores of all adapters below each other.
        right: [n, R_d].
    """

    up: Tensor
    down: Tensor
    left: Tensor
    right: Tensor


def append(basis: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Adds to an orthonormal basis what rows have outside of it.

    Args:
        basis: [R, d], orthonormal rows.
        rows: [n, d].

    Returns:
        The basis [R', d] with R ≤ R' ≤ R + n, float64, its first R rows as they were, and
        the coordinates of the rows in it [n, R']: coordinates @ basis = rows.
    """
    basis, rows = basis.to(torch.float64), rows.to(torch.float64)
    inside = rows @ basis.mT
    rest = rows - inside @ basis
    again = rest @ basis.mT  # once more, since what is left may be small
    inside, rest = inside + again, rest - again @ basis
    U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
    size = torch.linalg.vector_norm(rows)
    room = basis.shape[1] - basis.shape[0]
    k = min(int((_ROUNDING * size < S).sum()), room) if float(size) else 0
    return torch.cat((basis, Vh[:k])), torch.cat((inside, U[:, :k] * S[:k]), dim=1)


def widen(values: Tensor, columns: int) -> Tensor:
    """Columns of zeros at the end."""
    return torch.nn.functional.pad(values, (0, columns - values.shape[1]))


def extend(old: Turned, A: Tensor, B: Tensor) -> Turned:
    """The basis that also spans new adapters, exactly; the new cores stand last.

    Args:
        old: The basis and all cores so far.
        A: [n, d_in], the rows of the new adapters' A below each other.
        B: [n, d_out], the columns of B as rows, in the same order.
    """
    up, left = append(old.up, B)
    down, right = append(old.down, A)
    return Turned(
        up,
        down,
        torch.cat((widen(old.left.to(left), left.shape[1]), left)),
        torch.cat((widen(old.right.to(right), right.shape[1]), right)),
    )


def padded(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """[N, r, R]: the rows of each adapter [n, R], filled up with zeros.

    Args:
        rows: [n, R], of all adapters below each other.
        sizes: Rows of each adapter; they add up to n.
    """
    counts = torch.tensor(list(sizes), dtype=torch.int64)
    r = max([1, *sizes])
    wide = rows.new_zeros(len(counts), r, rows.shape[1])
    wide[torch.arange(r) < counts.unsqueeze(1)] = rows
    return wide


def scatter(
    left: Tensor, right: Tensor, sizes: Sequence[int], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ w_i C_i C_iᵀ [R_u, R_u] and Σ w_i C_iᵀ C_i [R_d, R_d], in float64.

    Args:
        left: [n, R_u].
        right: [n, R_d].
        sizes: Rows of each adapter; they add up to n.
        weights: [N], on squared norms.
    """
    one, other = (padded(rows.to(torch.float64), sizes) for rows in (left, right))
    scale = weights.to(one).sqrt()[:, None, None]
    X = (scale * (root(other @ other.mT).mT @ one)).flatten(0, 1)
    Y = (scale * (root(one @ one.mT).mT @ other)).flatten(0, 1)
    return X.mT @ X, Y.mT @ Y


def rotate(old: Turned, sizes: Sequence[int], weights: Tensor) -> tuple[Turned, Tensor, Tensor]:
    """Turns the basis to the common directions of the cores, most important first.

    Returns:
        The same adapters in the new basis, and the weighted energies of its directions
        [R_u], [R_d], falling.
    """
    G_up, G_down = scatter(old.left, old.right, sizes, weights)
    (up_values, E), (down_values, F) = torch.linalg.eigh(G_up), torch.linalg.eigh(G_down)
    E, F = E.flip(-1), F.flip(-1)
    turned = Turned(
        E.mT @ old.up.to(E), F.mT @ old.down.to(F), old.left.to(E) @ E, old.right.to(F) @ F
    )
    return turned, up_values.flip(-1).clamp_min(0), down_values.flip(-1).clamp_min(0)


def share_rotate(
    mean: Tensor, basis: Tensor, loadings: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and principal components of rows that are known by their coordinates.

    Args:
        mean: [D].
        basis: [K, D], orthonormal rows.
        loadings: [n, K + 1]: row i is loadings[i, 0] · mean + loadings[i, 1:] @ basis.
        scales: [n], the size t_i that each row is divided by before; those with 0 are left out
            of the statistics, and only rewritten.

    Returns:
        The new mean, the components, the loadings of the same rows, and the variances [K].
    """
    wide = torch.float64
    mean, basis, loadings = mean.to(wide), basis.to(wide), loadings.to(wide)
    # The mean has a part in the basis and one outside, which is a direction of its own.
    axes, centre_in = append(basis, mean.unsqueeze(0))
    points = widen(loadings[:, 1:], axes.shape[0]) + loadings[:, :1] * centre_in
    counted = scales > 0
    unit = points[counted] / scales[counted].to(wide).unsqueeze(1)
    centre = unit.mean(0) if len(unit) else unit.new_zeros(unit.shape[1])
    centred = unit - centre
    values, vectors = torch.linalg.eigh(centred.mT @ centred)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    keep = values > 1e-12 * values[:1]
    values, vectors = values[keep], vectors[:, keep]
    new = (points - scales.to(wide).unsqueeze(1) * centre) @ vectors
    new = torch.cat((scales.to(wide).unsqueeze(1), new), dim=1)
    return centre @ axes, vectors.mT @ axes, new, values


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Q [k, d] with orthonormal rows, T [R, k]) with rows = T Q, float64."""
    wide = rows.to(torch.float64)
    if not len(wide):
        return wide, wide.new_zeros(0, 0)
    Q, R = torch.linalg.qr(wide.mT)
    return Q.mT, R.mT


def coordinates(rows: Tensor, basis: Tensor) -> Tensor:
    """Least-squares coordinates [n, R] of rows [n, d] in a basis [R, d], float32."""
    wide, against = rows.to(torch.float64), basis.to(torch.float64)
    G = against @ against.mT
    products = wide @ against.mT
    L, failed = torch.linalg.cholesky_ex(G)
    if int(failed):
        found: Tensor = products @ torch.linalg.pinv(G, hermitian=True)
    else:
        found = torch.cholesky_solve(products.mT, L).mT
    return found.to(torch.float32)


def square(A: Tensor, B: Tensor) -> float:
    """‖B A‖² of rows A [k, d_in] and B [k, d_out]."""
    wide_A, wide_B = A.to(torch.float64), B.to(torch.float64)
    return max(0.0, float(((wide_A @ wide_A.mT) * (wide_B @ wide_B.mT)).sum()))
