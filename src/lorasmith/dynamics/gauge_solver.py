"""Gauge projection, its mathematics: R of A → R A, B → B R⁻¹. Tensors and numbers only.

Sought is the point of the orbit of a pair of factors where

    A Aᵀ = μ Bᵀ B          A [r, d_in], B [d_out, r], μ > 0

With G_A = A Aᵀ and G_B = Bᵀ B [r, r], R must solve R G_A R = μ R⁻¹ G_B R⁻¹. The positive
definite S = R² that does is unique, the geometric mean of G_A⁻¹ and μ G_B:

    S = G_A^-½ (μ G_A^½ G_B G_A^½)^½ G_A^-½ = L⁻ᵀ (μ Lᵀ G_B L)^½ L⁻¹,    G_A = L Lᵀ

and R = S^½ is the symmetric R, the one nearest to the identity; another R = Q S^½ with an
orthogonal Q meets the constraint as well but turns the factors, and Adam's path with them.
The second form of S costs one Cholesky and, with the root, two symmetric eigenproblems
where the first costs three. All is float64, and many layers of one rank are one batch.

Rank deficiency. Directions of the r-dimensional space in which B vanishes (all of them
before the first step) or A does cannot be balanced: R would have to be 0 or infinite there.
They are left as they are. R is the identity on their complement's orthogonal rest, and the
constraint holds on U = range(P G_A P), P the projector onto range(Bᵀ): as many directions as
B A has. "Vanishes" means a singular value below r · 1.2e-7 of that factor's norm (float64
factors: 4 √(r · 2.2e-16)), that is, below the rounding of the stored numbers. A factor
that is small, but not zero, is balanced however small it is.

How far a layer is from the constraint is therefore measured on U alone: with P_U the projector
onto it,

    ‖P_U (A Aᵀ − μ BᵀB) P_U‖_F / ½ (‖P_U A Aᵀ P_U‖_F + μ ‖P_U BᵀB P_U‖_F)        0 to 2

and 0 where U is empty. With full rank P_U = 1. On all directions, a layer with B = 0 would read 2
for ever, which no gauge could change.

Limits: ``torch.linalg.eigh`` makes a GPU wait once a projection, and so does the check for
deficient and non-finite layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorasmith.core.lowrank import no_autocast
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["gauge_residual", "gauge_transform"]

#: Squared relative singular values below which the exact, slower form decides.
_SAFE = 1e-8


def gauge_transform(A: Tensor, B: Tensor, mu: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """The symmetric R, and R⁻¹, for which A' = R A and B' = B R⁻¹ have A' A'ᵀ = μ B'ᵀ B'.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        mu: μ > 0, a number or [...].

    Returns:
        R and R⁻¹ [..., r, r] in float64; the identity in directions in which A or B vanishes
        (see the module's text).

    Raises:
        TrainingError: If a factor is not finite.
    """
    batch, r = A.shape[:-2], A.shape[-2]
    with torch.no_grad(), no_autocast(A):
        a, b = A.detach().to(torch.float64), B.detach().to(torch.float64)
        g_a, g_b = (a @ a.mT).reshape(-1, r, r), (b.mT @ b).reshape(-1, r, r)
        factor = torch.as_tensor(mu, dtype=torch.float64, device=A.device)
        core = solve(g_a, g_b, factor.expand(batch).reshape(-1), tolerance_of(r, A.dtype), None)
    return core.R.reshape(*batch, r, r), core.R_inverse.reshape(*batch, r, r)


def gauge_residual(
    A: Tensor,
    B: Tensor,
    mu: float | Tensor = 1.0,
    *,
    directions: Literal["all", "common"] = "all",
) -> Tensor:
    """How far factors are from the constraint, 0 to 2: ‖A Aᵀ − μ Bᵀ B‖ over half the norms' sum.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        mu: μ > 0, a number or [...].
        directions: ``"all"`` r, or ``"common"``: those that A and B both have, which are what a
            projection can balance (U in the module's text).

    Returns:
        [...] in float64; 0 where both factors are zero (``"common"``: where no direction is in
        both), NaN where a factor is not finite.

    Raises:
        ConfigError: If ``directions`` is something else.
    """
    if directions not in ("all", "common"):
        raise ConfigError(
            "Unknown directions.", expected="all or common", got=repr(directions), key="directions"
        )
    batch, r = A.shape[:-2], A.shape[-2]
    with torch.no_grad(), no_autocast(A):
        a, b = A.detach().to(torch.float64), B.detach().to(torch.float64)
        g_a, g_b = a @ a.mT, b.mT @ b
        factor = torch.as_tensor(mu, dtype=torch.float64, device=A.device)
        if directions == "all":
            return _residual(g_a, g_b, factor)
        g_a, g_b, factor = g_a.reshape(-1, r, r), g_b.reshape(-1, r, r), factor.expand(batch)
        found = common_residual(g_a, g_b, factor.reshape(-1), tolerance_of(r, A.dtype))
    return found.reshape(batch)


def _residual(g_a: Tensor, g_b: Tensor, mu: Tensor) -> Tensor:
    g_b = mu[..., None, None] * g_b
    size = (torch.linalg.matrix_norm(g_a) + torch.linalg.matrix_norm(g_b)) / 2
    off: Tensor = torch.linalg.matrix_norm(g_a - g_b)
    return off / torch.where(size > 0, size, 1.0)


def _inside(projector: Tensor, gram: Tensor) -> Tensor:
    """P G P."""
    return projector @ gram @ projector


def common_residual(g_a: Tensor, g_b: Tensor, mu: Tensor, tolerance: float) -> Tensor:
    """The residual [n] of Gram matrices [n, r, r] on the directions that both have."""
    finite = (torch.isfinite(g_a) & torch.isfinite(g_b)).flatten(1).all(1)
    g_a, g_b = (torch.where(finite[:, None, None], g, 0.0) for g in (g_a, g_b))
    common = _common(_unit(g_a)[0], _unit(g_b)[0], tolerance)
    projector = _spectral(common.vectors, common.active.to(g_a.dtype))
    found = _residual(_inside(projector, g_a), _inside(projector, g_b), mu)
    return torch.where(finite, found, math.nan)


def tolerance_of(r: int, dtype: torch.dtype) -> float:
    """Relative singular value below which a direction of a factor counts as zero.

    Relative to the Frobenius norm. Gram matrices in float64 resolve √(r ε); what is stored in
    float32 is not known better than r ε of its own. The noise of coarser dtypes cannot be
    told from signal.
    """
    if dtype == torch.float64:
        return 4 * math.sqrt(r * torch.finfo(torch.float64).eps)
    return r * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Core:
    """R and R⁻¹ [n, r, r], and [n] of each.

    Residual before (on the balanced directions), condition number of R, balanced directions,
    and the largest factor by which R or R⁻¹ makes a vector longer.
    """

    R: Tensor
    R_inverse: Tensor
    residual: Tensor
    condition: Tensor
    directions: Tensor
    distance: Tensor


def _unit(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices [n, r, r] of trace 1 (or 0), whose largest eigenvalues are in [1 / r, 1].

    Returns:
        They, and what they were divided by [n]; R takes the scale back.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = torch.where(size > 0, size, 1.0)
    return gram / size[:, None, None], size


@dataclass(frozen=True)
class _Common:
    """The directions in which neither factor vanishes, of Gram matrices of trace 1 or 0.

    P G_A P = V diag(values) Vᵀ with P the projector onto range(Bᵀ), but −1 in ``values`` for what
    is not in that; ``active`` [n, r] says which columns of V [n, r, r] span U.
    """

    vectors: Tensor
    values: Tensor
    active: Tensor
    #: P, and the eigenvalues and eigenvectors of G_B.
    reached: Tensor
    values_b: Tensor
    vectors_b: Tensor


def _common(g_a: Tensor, g_b: Tensor, tolerance: float) -> _Common:
    one = torch.eye(g_a.shape[-1], dtype=g_a.dtype, device=g_a.device)
    values_b, vectors_b = torch.linalg.eigh(g_b)
    reached = _spectral(vectors_b, (values_b > tolerance**2).to(g_a.dtype))
    # A as seen from there.
    inner = _inside(reached, g_a)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2 - (one - reached))
    return _Common(vectors, values, values > tolerance**2, reached, values_b, vectors_b)


def _spectral(vectors: Tensor, values: Tensor) -> Tensor:
    """V diag(values) Vᵀ."""
    product: Tensor = (vectors * values.unsqueeze(-2)) @ vectors.mT
    return product


def solve(
    g_a: Tensor, g_b: Tensor, mu: Tensor, tolerance: float, names: Sequence[str] | None
) -> Core:
    """R of Gram matrices [n, r, r] in float64."""
    n, r = g_a.shape[:2]
    one = torch.eye(r, dtype=g_a.dtype, device=g_a.device)
    residual = _residual(g_a, g_b, mu)
    (unit_a, size_a), (unit_b, size_b) = _unit(g_a), _unit(g_b)
    scale = (mu * size_b / size_a).sqrt()
    lower, failed_a = torch.linalg.cholesky_ex(unit_a)
    lower_b, failed_b = torch.linalg.cholesky_ex(unit_b)
    inverse = torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False)
    inverse_b = torch.linalg.solve_triangular(lower_b, one.expand_as(lower), upper=False)
    # 1 / ‖L⁻¹‖² is a lower bound of the smallest eigenvalue.
    regular = (failed_a == 0) & (failed_b == 0)
    for inverted in (inverse, inverse_b):
        regular &= inverted.square().sum((-2, -1)) < 1 / _SAFE
    finite = (torch.isfinite(unit_a) & torch.isfinite(unit_b)).flatten(1).all(1)
    all_finite, all_regular = torch.stack((finite.all(), regular.all())).tolist()
    if not all_finite:
        raise _not_finite(finite, names)
    if not all_regular:
        lower, unit_b_safe, inverse = (
            torch.where(regular[:, None, None], t, one) for t in (lower, unit_b, inverse)
        )
    else:
        unit_b_safe = unit_b
    squared, q = torch.linalg.eigh(lower.mT @ unit_b_safe @ lower)
    s = inverse.mT @ _spectral(q, squared.clamp(min=torch.finfo(q.dtype).tiny).sqrt()) @ inverse
    values, vectors = torch.linalg.eigh((s + s.mT) / 2)
    roots = (values.clamp(min=torch.finfo(q.dtype).tiny) * scale[:, None]).sqrt()
    directions = torch.full((n,), r, device=g_a.device)
    if not all_regular:
        odd = (~regular).nonzero().squeeze(1)
        found = _solve_deficient(unit_a[odd], unit_b[odd], scale[odd], tolerance)
        vectors = vectors.index_copy(0, odd, found[0])
        roots = roots.index_copy(0, odd, found[1])
        directions = directions.index_copy(0, odd, found[2].sum(1))
        projector = _spectral(found[3], found[2].to(g_a.dtype))
        some = _residual(_inside(projector, g_a[odd]), _inside(projector, g_b[odd]), mu[odd])
        residual = residual.index_copy(0, odd, some)
    largest, smallest = roots.amax(-1), roots.amin(-1)
    return Core(
        R=_spectral(vectors, roots),
        R_inverse=_spectral(vectors, 1 / roots),
        residual=residual,
        condition=largest / smallest,
        directions=directions,
        distance=torch.maximum(largest, 1 / smallest),
    )


def _solve_deficient(
    g_a: Tensor, g_b: Tensor, scale: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvectors and eigenvalues of R where a factor is (nearly) rank deficient.

    Gram matrices have trace 1, or are zero.
    Eigenvalues that mean "left alone" are kept apart from all others as −1.

    Returns:
        [k, r, r] and [k, r], and as a mask [k, r] which columns of the fourth [k, r, r] span the
        balanced directions.
    """
    one = torch.eye(g_a.shape[-1], dtype=g_a.dtype, device=g_a.device)
    tiny = torch.finfo(g_a.dtype).tiny

    common = _common(g_a, g_b, tolerance)
    values, vectors, active = common.values, common.vectors, common.active
    values_b, vectors_b = common.values_b, common.vectors_b
    # Exactly nothing, where nothing is to be moved: a dead layer stays as it is bit by bit.
    vectors = torch.where(active.any(1)[:, None, None], vectors, one)
    basis = vectors
    root_values = torch.where(active, values.clamp(min=0), 0.0).sqrt()
    root_a = _spectral(vectors, root_values)
    inverse = _spectral(vectors, torch.where(active, 1 / root_values, 0.0))
    rest = _spectral(vectors, (~active).to(g_a.dtype))
    # (G_A^½ G_B G_A^½)^½ = V Σ Vᵀ of G_B^½ G_A^½ = U Σ Vᵀ, which squares nothing.
    root_b = _spectral(vectors_b, values_b.clamp(min=0).sqrt())
    _, sigma, v_transposed = torch.linalg.svd(root_b @ root_a)
    s = inverse @ _spectral(v_transposed.mT, sigma) @ inverse
    values, vectors = torch.linalg.eigh((s + s.mT) / 2 - rest)
    kept = values < -0.5
    roots = torch.where(kept, 1.0, (values.clamp(min=tiny) * scale[:, None]).sqrt())
    none = kept.all(1)
    vectors = torch.where(none[:, None, None], one, vectors)
    return vectors, roots, active, basis


def _not_finite(finite: Tensor, names: Sequence[str] | None) -> TrainingError:
    bad = [i for i, good in enumerate(finite.tolist()) if not good]
    labels = [names[i] if names is not None else str(i) for i in bad]
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return TrainingError(
        f"The factors of layer {labels[0]!r}{more} are not finite.",
        expected="numbers whose squares can be summed",
        got="NaN or infinity in A or B",
        fix="lower the learning rate, clip gradients, or go back to an earlier checkpoint",
        key=labels[0],
    )
