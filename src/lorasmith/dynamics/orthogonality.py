"""Penalties that keep the directions of a low-rank change in use.

The change of a layer is M = B A, with A [r, d_in], B [d_out, r] and singular values σ_1 ≥ …
≥ σ_r. Two penalties, each with its gradient in closed form through r × r matrices: no
d_out × d_in matrix exists, and no autograd graph.

**Spectral** (ours, the default). How unequal the singular values are: the logarithm of the
arithmetic over the geometric mean of σ², with a floor ε on each,

    P = log(1 + ε) − (1/r) Σ_i log(m_i + ε)        m_i = r σ_i² / Σ_j σ_j²
      = log(1 + ε) − (1/r) log det X               X = ε I + (r/t) G K
    G = BᵀB,  K = A Aᵀ,  t = tr(G K) = ‖M‖²,  Y = X⁻¹,  κ = 1 − (ε/r) tr Y
    ∂P/∂B = (2/t) B (κ K − K Y)                    ∂P/∂A = (2/t) (κ G − Y G) A

The m_i are the eigenvalues of (r/t) G K, and G K turns into a similar matrix in another
gauge: P depends on neither the gauge nor the scale of M. P ≥ 0, and P = 0 exactly where all
σ are equal. Since P does not change with scale, its gradient is orthogonal to A and to B and
so does not ask M to grow; with finite steps, only the square of the step remains.

Towards rank collapse each vanishing σ_i is pushed up with a slope 2 σ_i / (r (σ_i² + ε σ²)),
σ² the mean square: as −log would have it (ever steeper) down to σ_i = √ε σ, and finite below.
At ε = 1e-4 the push on a direction 10,000 times smaller than the rest is still that on a
healthy one. A direction that is missing exactly gets none: all that could fill it are alike,
for any function of the singular values, and the task's next gradient decides. At M = 0 value
and gradient are 0.

A scale-free function has a gradient ∝ 1 / ‖M‖, and M starts at 0: on its own it would own
the first steps and Adam's second moment for long after (on a toy regression of two layers,
AdamW at 1e-3, the task then learned nothing at all). So what is added at each of n sites is

    weight · ∇P · min(1/n, max_ratio · ‖∇task‖ / ‖∇P‖)        norms over A and B of the site

linear in the weight always, and at most weight · max_ratio times the task's own gradient.

**Shadow** (EgoRA's form, kept for comparison). With a slowly moving S ≈ pinv(M)ᵀ [d_out, d_in],

    P = √(‖M Sᵀ − I‖_F² + 1e-8)        (M Sᵀ where d_out ≤ d_in, else Mᵀ S)

S is kept as U Vᵀ of rank k ≤ 2r; with H = A Aᵀ, E = A V, F = Bᵀ U [r, k]:

    d_out ≤ d_in:  ‖·‖² = ⟨G E UᵀU, E⟩ − 2 ⟨F, E⟩ + d_out
    else:          ‖·‖² = ⟨H F VᵀV, F⟩ − 2 ⟨F, E⟩ + d_in

A refresh appends to U and V what B and Aᵀ have beyond them. In these bases all is small: it
takes pinv(M)ᵀ there, by QR and SVD, and moves S towards it: S ← m' S + (1 − m') pinv(M)ᵀ, S
truncated at rank 2r and where σ(S) < τ σ_1(S). The error against the exact mean obeys
e ← m' e + ‖dropped‖_F, and is reported. m' corrects the mean for its start at zero as Adam
does, m' = m (1 − m^(n−1)) / (1 − m^n): without (``debias=False``, as published) the minimum
after the first refresh lies at M / (1 − m) and the penalty rewards growth. P has the floor
√(min(d_out, d_in) − r), whatever M is; what is reported is the excess over it. P tells nothing
of the condition of M: right after an undamped refresh M Sᵀ is a projector for every M.

The cap of 2r keeps the shadow at twice the adapter's memory. The exact mean of n refreshes
would need rank n r; what the cap costs is the dropped part, in practice old directions with
weights m², m³, …

Where an initialisation took B0 A0 out of W (PiSSA), M is the change B A − B0 A0, of rank up
to 2r, and only A and B get a gradient. To equalise B A itself would be to flatten the
principal part of W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    cast,
    runtime_checkable,
)

import torch
from torch import Tensor

from lorasmith.core.lowrank import no_autocast
from lorasmith.dynamics.protocol import Dynamic, Need, Site, Step
from lorasmith.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from lorasmith.dynamics.context import Context

__all__ = [
    "OrthogonalityPenalty",
    "Penalty",
    "effective_rank",
    "refresh_shadow",
    "shadow_penalty",
    "shadow_penalty_gradient",
    "spectral_penalty",
    "spectral_penalty_gradient",
]

#: Under the root of the shadow penalty, so that it has a gradient at 0.
_UNDER_ROOT = 1e-8
#: Relative: singular values below this are rounding of what is stored in float32.
_EPS = torch.finfo(torch.float32).eps
#: Below this ‖B‖_F a site has no shadow penalty and its shadow is not refreshed.
_NOTHING = 1e-6

Kind = Literal["spectral", "shadow"]
Scale = Literal["mean", "sum"]


@runtime_checkable
class Penalty(Protocol):
    """What an entropy governor can drive: a rule whose strength is given step by step."""

    weight: float
    needs: frozenset[Need]

    def apply(self, step: Step, weight: float | Tensor) -> None:
        """Adds ``weight`` times the penalty's gradient; a 0-d tensor must not be waited for."""

    def value(self) -> Tensor:
        """The penalty at the present factors, without weight, 0-dimensional."""

    def bind(self, context: Context) -> None: ...
    def on_sites(self, sites: Sequence[Site]) -> None: ...
    def select(self, tasks: Sequence[str]) -> None: ...
    def after_step(self, step: Step) -> None: ...
    def on_evaluate(self, metrics: Mapping[str, float]) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


# -- mathematics ---------------------------------------------------------------------------


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached, in float64 (float32 on Apple's devices, which have no other)."""
    return tuple(
        t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64) for t in tensors
    )


def _full(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached, in one dtype: the widest of theirs, and at least float32."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return tuple(t.detach().to(dtype) for t in tensors)


def _positive(x: Tensor, floor: float | Tensor) -> tuple[Tensor, Tensor]:
    """Where x > floor, and x there with 1 elsewhere, so that dividing by it is safe."""
    there = x > floor
    return there, torch.where(there, x, torch.ones_like(x))


@dataclass(frozen=True)
class _Core:
    """The r × r part of the spectral penalty, float64 [..., r, r].

    X is in a balanced gauge: row i of A and column i of B brought to one norm, and A and B then
    to norm 1. So the squares of tiny factors do not underflow, and a gauge far from balance
    costs no digits. G and K are those of the factors as they are.
    """

    G: Tensor
    K: Tensor
    #: What makes them those of the balanced gauge: G ∘ scale_of_g and K ∘ scale_of_k.
    scale_of_k: Tensor
    scale_of_g: Tensor
    t: Tensor
    there: Tensor
    X: Tensor


def _core(A: Tensor, B: Tensor, eps: float) -> _Core:
    if not eps > 0:
        raise ConfigError("The floor must be positive.", expected="> 0", got=eps, key="eps")
    A, B = _wide(A, B)
    r = A.shape[-2]
    G, K = B.mT @ B, A @ A.mT
    a, b = (t.diagonal(dim1=-2, dim2=-1).sqrt() for t in (K, G))
    both, ratio = _positive(b / _positive(a, 0.0)[1], 0.0)
    balance = torch.where(both & (a > 0), ratio.sqrt(), torch.ones_like(a))
    norm_A = _positive(torch.linalg.vector_norm(a * balance, dim=-1, keepdim=True), 0.0)[1]
    norm_B = _positive(torch.linalg.vector_norm(b / balance, dim=-1, keepdim=True), 0.0)[1]
    rows, columns = balance / norm_A, 1 / (balance * norm_B)
    scale_of_k, scale_of_g = (s.unsqueeze(-1) * s.unsqueeze(-2) for s in (rows, columns))
    product = (G * scale_of_g) @ (K * scale_of_k)
    # Relative to ‖A‖ ‖B‖ = 1: what cancels to rounding is nothing.
    there, t = _positive(product.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None], 1e-13)
    eye = torch.eye(r, dtype=A.dtype, device=A.device)
    X = torch.where(there, eps * eye + (r / t) * product, (1 + eps) * eye)
    return _Core(G, K, scale_of_k, scale_of_g, t, there, X)


def _spread(core: _Core, eps: float) -> Tensor:
    log_det: Tensor = torch.linalg.slogdet(core.X)[1]
    spread = math.log1p(eps) - log_det / core.X.shape[-1]
    return torch.where(core.there[..., 0, 0], spread, 0.0)


def _slopes(core: _Core, eps: float) -> tuple[Tensor, Tensor]:
    """T_A and T_B [..., r, r] with ∂P/∂A = T_A A and ∂P/∂B = B T_B."""
    r = core.X.shape[-1]
    Y = torch.linalg.inv_ex(core.X)[0]  # its eigenvalues are at least ε: it has an inverse
    G, K = core.G * core.scale_of_g, core.K * core.scale_of_k
    kappa = 1 - (eps / r) * Y.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    factor = torch.where(core.there, 2 / core.t, torch.zeros_like(core.t))
    for_A = _symmetric(kappa * G - Y @ G) * factor * core.scale_of_k
    for_B = _symmetric(kappa * K - K @ Y) * factor * core.scale_of_g
    return for_A, for_B


def spectral_penalty(A: Tensor, B: Tensor, eps: float = 1e-4) -> Tensor:
    """How unequal the singular values of B A are; see the module.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        eps: The floor ε on each σ_i², relative to their mean.

    Returns:
        P [...] ≥ 0, float64; 0 where B A = 0.
    """
    return _spread(_core(A, B, eps), eps)


def spectral_penalty_gradient(
    A: Tensor, B: Tensor, eps: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    """The spectral penalty and its gradient.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        eps: The floor ε on each σ_i², relative to their mean.

    Returns:
        P [...], ∂P/∂A [..., r, d_in] and ∂P/∂B [..., d_out, r], float64. All are 0 where
        B A = 0.
    """
    core = _core(A, B, eps)
    for_A, for_B = _slopes(core, eps)
    A, B = _wide(A, B)
    return _spread(core, eps), for_A @ A, B @ for_B


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def effective_rank(A: Tensor, B: Tensor) -> Tensor:
    """The effective rank of B A: exp of the entropy of σ_i / Σ σ (Roy and Vetterli 2007).

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].

    Returns:
        [...] between 1 and r, float64; 0 where B A = 0, NaN where it is not finite.
    """
    A, B = _wide(A, B)
    finite, A, B = _finite(A, B)
    sigma = torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT)
    size = torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(B)
    there, total = _positive(sigma.sum(-1), 0.0)
    p = sigma / total.unsqueeze(-1)
    rank = torch.special.entr(p).sum(-1).exp()
    rank = torch.where(there & (sigma[..., 0] > 1e-10 * size), rank, torch.zeros_like(rank))
    return torch.where(finite, rank, math.nan)


def _finite(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where both are finite, and both with 0 elsewhere: decompositions raise on NaN."""
    finite = A.isfinite().all(-1).all(-1) & B.isfinite().all(-1).all(-1)
    where = finite[..., None, None]
    return finite, torch.where(where, A, 0.0), torch.where(where, B, 0.0)


def _shadow_square(
    factors: tuple[Tensor, ...], gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """‖M Sᵀ − I‖² (or its transpose's) and half its gradient, from A, B, U and V."""
    A, B, U, V = factors
    E, F = A @ V, B.mT @ U
    cross = (E * F).sum((-2, -1))
    if B.shape[-2] <= A.shape[-1]:
        weighed = E @ (U.mT @ U)
        applied = (B.mT @ B) @ weighed
        square = (applied * E).sum((-2, -1)) - 2 * cross + B.shape[-2]
        if not gradient:
            return square, None, None
        return square, (applied - F) @ V.mT, B @ (weighed @ E.mT) - U @ E.mT
    weighed = F @ (V.mT @ V)
    applied = (A @ A.mT) @ weighed
    square = (applied * F).sum((-2, -1)) - 2 * cross + A.shape[-1]
    if not gradient:
        return square, None, None
    return square, (weighed @ F.mT) @ A - F @ V.mT, U @ (applied - E).mT


def shadow_penalty(A: Tensor, B: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """EgoRA's penalty √(‖(B A) Sᵀ − I‖_F² + 1e-8) with S = U Vᵀ.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        U: [..., d_out, k].
        V: [..., d_in, k].

    Returns:
        P [...], float64. Where d_out > d_in, P of the transposes, which is the smaller one.
    """
    square = _shadow_square(_wide(A, B, U, V), gradient=False)[0]
    return (square.clamp(min=0.0) + _UNDER_ROOT).sqrt()


def shadow_penalty_gradient(
    A: Tensor, B: Tensor, U: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`shadow_penalty` and its gradient.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        U: [..., d_out, k].
        V: [..., d_in, k].

    Returns:
        P [...], ∂P/∂A [..., r, d_in] and ∂P/∂B [..., d_out, r], float64.
    """
    square, half_A, half_B = _shadow_square(_wide(A, B, U, V), gradient=True)
    assert half_A is not None  # asked for
    assert half_B is not None
    value = (square.clamp(min=0.0) + _UNDER_ROOT).sqrt()
    by = value[..., None, None]
    return value, half_A / by, half_B / by


def refresh_shadow(
    U: Tensor,
    V: Tensor,
    A: Tensor,
    B: Tensor,
    momentum: float | Tensor,
    rank: int,
    truncate: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """m U Vᵀ + (1 − m) pinv(B A)ᵀ, back at a given rank; with U = V = 0 and m = 0, pinv(B A)ᵀ.

    What B and Aᵀ have beyond U and V is appended to these. The pseudo-inverse and the mean are
    then small matrices in those bases. Products with tall matrices are in float32, or float64
    if that is what comes in; small matrices in float64.

    Args:
        U: [..., d_out, k], orthogonal columns.
        V: [..., d_in, k], orthonormal columns, or 0 where U is.
        A: [..., r, d_in].
        B: [..., d_out, r].
        momentum: m, a number or a tensor that broadcasts against [..., 1, 1].
        rank: Columns of the result.
        truncate: τ: singular values of the result below τ times its largest are dropped; below
            1e-7 in any case, where they cannot be told from rounding.

    Returns:
        U [..., d_out, rank], orthogonal columns; V [..., d_in, rank], orthonormal columns; the
        Frobenius norm [...] of what was dropped. Columns beyond the rank are 0. Singular values
        of B A up to max(d_out, d_in) · 1.2e-7 times its largest count as 0.
    """
    U, V, A, B = _full(U, V, A, B)
    (sizes,) = _wide(torch.linalg.vector_norm(U, dim=-2).unsqueeze(-1))
    by_U, by_V = 1 / _positive(sizes, 0.0)[1], torch.ones_like(sizes)
    sides = (_Side.of(U, by_U, B), _Side.of(V, by_V, A.mT))
    coordinates, norms, to_W = _append(sides)
    # QR once more, of small matrices: a Gram matrix would square the condition number.
    Q, R = torch.linalg.qr(coordinates)
    left, sigma, right = torch.linalg.svd((R[0] * (norms[0] * norms[1])) @ R[1].mT)
    there, safe = _positive(sigma, max(B.shape[-2], A.shape[-1]) * _EPS * sigma[..., :1])
    inverse = torch.where(there, 1 / safe, 0.0).unsqueeze(-2)
    core = (Q[0] @ (left * inverse * (1 - momentum))) @ (Q[1] @ right.mT).mT
    core.diagonal(dim1=-2, dim2=-1)[..., : U.shape[-1]] += (sizes * momentum).squeeze(-1)
    # An eigenproblem costs half of an SVD. It gives the right singular vectors; the left ones
    # and the singular values come from the product, which squares nothing.
    Y = torch.linalg.eigh(core.mT @ core)[1].flip(-1)
    X = core @ Y
    sigma = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    keep = sigma > max(truncate, _EPS) * sigma[..., :1]
    keep[..., rank:] = False
    dropped = torch.linalg.vector_norm(torch.where(keep, 0.0, sigma), dim=(-2, -1))
    found = []
    for side, small, to in zip(sides, (X, Y), to_W, strict=True):
        tall = side.combined(torch.where(keep, small, 0.0)[..., :rank], to)
        short = rank - tall.shape[-1]
        found.append(torch.nn.functional.pad(tall, (0, short)) if short > 0 else tall)
    return found[0], found[1], dropped


@dataclass(frozen=True)
class _Side:
    """An orthonormal basis Q [..., d, k], and what N [..., d, r] has beyond it.

    Q is kept as Q = T / norms. P = N − Q QᵀN is orthogonal to Q but for rounding, which counts
    where P is small: E = QᵀP is what is left.
    """

    T: Tensor
    #: 1 / norms of T's columns [..., k, 1]; QᵀN, E [..., k, r] and PᵀP [..., r, r]: float64.
    by: Tensor
    inside: Tensor
    P: Tensor
    E: Tensor
    gram: Tensor

    @classmethod
    def of(cls, T: Tensor, by: Tensor, N: Tensor) -> _Side:
        inside = _wide(T.mT @ N)[0] * by
        P = (T @ (inside * -by).to(T.dtype)).add_(N)
        E, wide = _wide(T.mT @ P, P)
        return cls(T, by, inside, P, by * E, wide.mT @ wide)

    def combined(self, X: Tensor, to_W: Tensor) -> Tensor:
        """[Q, W] X with W = (P − Q E) to_W, for X [..., k + r, n] of float64."""
        k = self.T.shape[-1]
        below = to_W @ X[..., k:, :]
        above = self.by * (X[..., :k, :] - self.E @ below)
        return (self.T @ above.to(self.T.dtype)).add_(self.P @ below.to(self.T.dtype))


def _append(sides: tuple[_Side, _Side]) -> tuple[Tensor, Tensor, Tensor]:
    """N in an orthonormal basis [Q, W]; both sides in the first dimension, float64.

    Returns:
        N's coordinates, each column divided by its norm [2, ..., k + r, r], the norms
        [2, ..., 1, r], and ``to_W`` [2, ..., r, r] (see :class:`_Side`), of which columns are 0
        where N has fewer directions beyond Q.
    """
    inside, E, gram = (
        torch.stack(t) for t in zip(*((s.inside, s.E, s.gram) for s in sides), strict=True)
    )
    inside, gram = inside + E, gram - E.mT @ E  # twice is enough, whatever the angle to Q
    squares = inside.square().sum(-2) + gram.diagonal(dim1=-2, dim2=-1)
    norms = _positive(squares, 0.0)[1].sqrt().unsqueeze(-2)
    values, vectors = torch.linalg.eigh(gram / (norms.mT * norms))
    # What is below the rounding of N, or of the Gram matrix, is no direction.
    relative = 4 * values.shape[-1] * torch.finfo(values.dtype).eps
    floor = relative * values[..., -1:] + (4 * torch.finfo(sides[0].T.dtype).eps) ** 2
    there, safe = _positive(values, floor)
    roots, there = safe.sqrt().unsqueeze(-2), there.unsqueeze(-2)
    outside = torch.where(there, vectors * roots, 0.0).mT
    to_W = torch.where(there, vectors / roots, 0.0) / norms.mT
    return torch.cat((inside / norms, outside), -2), norms, to_W


# -- the rule ------------------------------------------------------------------------------


@dataclass
class _Shadow:
    """One site's S = U Vᵀ in float32, of a fixed number of columns; never written in place."""

    U: Tensor
    V: Tensor
    #: Refreshes that found something, and the bound on the error, 0-dimensional.
    refreshes: Tensor
    error: Tensor


@dataclass(frozen=True)
class _Gradients:
    """Gradients of a group of sites: their squared norms [sites], and them times a factor."""

    square: Tensor
    #: Factor [sites, 1, 1] → gradients of A [sites, r, d_in] and B [sites, d_out, r].
    gradients: Callable[[Tensor], tuple[Tensor, Tensor]]


class OrthogonalityPenalty(Dynamic):
    """Adds the gradient of an orthogonality penalty once an optimiser step.

        ls.dynamics(model, ls.OrthogonalityPenalty(weight=0.1), optimizer)

    The loss that is reported, in training and in evaluation, stays the task's alone.

    Args:
        kind: ``"spectral"``: spread of the singular values, from the first step on.
            ``"shadow"``: EgoRA's form, from the first refresh on; see the module.
        weight: Factor on the penalty.
        scale: ``"mean"`` over the sites, so that one weight means the same in a model of 24
            adapted layers and of 224, as it is with the loss, which is a mean over tokens.
            ``"sum"``, as EgoRA has it.
        max_ratio: At each site the added gradient is at most ``weight * max_ratio`` times
            the task's, in the norm over A and B; ``None`` for no limit. Default: 0.05 for
            ``"spectral"``, ``None`` for ``"shadow"`` (as published).
        eps: Spectral: floor on σ_i² relative to their mean.
        refresh_every: Shadow: optimiser steps between refreshes.
        momentum: Shadow: m of the moving average.
        truncate: Shadow: τ, relative to the shadow's largest singular value.
        debias: Shadow: whether the average is corrected for its start at zero.

    Raises:
        ConfigError: A value cannot be used.
    """

    name: ClassVar[str] = "orthogonality"

    def __init__(
        self,
        kind: Kind = "spectral",
        *,
        weight: float = 1.0,
        scale: Scale = "mean",
        max_ratio: float | Literal["auto"] | None = "auto",
        eps: float = 1e-4,
        refresh_every: int = 100,
        momentum: float = 0.9,
        truncate: float = 1e-6,
        debias: bool = True,
    ) -> None:
        _check(kind in ("spectral", "shadow"), "kind", "spectral or shadow", kind)
        _check(scale in ("mean", "sum"), "scale", "mean or sum", scale)
        _check(_number(weight) >= 0, "weight", "a finite number of at least 0", weight)
        limit: float | None
        limit = (0.05 if kind == "spectral" else None) if max_ratio == "auto" else max_ratio
        usable = limit is None or _number(limit) > 0
        _check(usable, "max_ratio", "a number above 0, or None", limit)
        _check(0 < _number(eps) < 1, "eps", "above 0 and below 1", eps)
        whole = _number(refresh_every) >= 1 and int(refresh_every) == refresh_every
        _check(whole, "refresh_every", "a whole number of at least 1", refresh_every)
        _check(0 <= _number(momentum) < 1, "momentum", "0 to below 1", momentum)
        _check(0 <= _number(truncate) < 1, "truncate", "0 to below 1", truncate)
        self.kind: Kind = kind
        self.weight = weight
        self.scale: Scale = scale
        self.max_ratio = limit
        self.eps = eps
        self.refresh_every = refresh_every
        self.momentum = momentum
        self.truncate = truncate
        self.debias = debias
        self._groups: list[list[Site]] = []
        self._shadows: dict[str, _Shadow] = {}
        #: Of the last step: masks of the sites where ``max_ratio`` has limited the gradient.
        self._limited: list[Tensor] = []

    def bind(self, context: Context) -> None:
        if getattr(self, "context", None) is not None:
            raise ConfigError(
                "This penalty belongs to a training run already.",
                expected="one instance for each run, given to the governor or listed as a rule",
                got="the same instance twice",
            )
        super().bind(context)

    def on_sites(self, sites: Sequence[Site]) -> None:
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in sites:
            frozen = site.factors.A0 is not None
            key = (*site.B.shape, *site.A.shape, frozen, site.A.device, site.A.dtype, site.B.dtype)
            groups.setdefault(key, []).append(site)
        self._groups = list(groups.values())
        # An adapter that is born as a copy of another one, or takes over from some, goes on
        # with a shadow of theirs.
        by_name = {key.partition("/")[2]: shadow for key, shadow in self._shadows.items()}
        found = {site.key: self._shadows.get(site.key, by_name.get(site.name)) for site in sites}
        self._shadows = {key: shadow for key, shadow in found.items() if shadow is not None}

    def close(self) -> None:
        del self.context

    def before_step(self, step: Step) -> None:
        self.apply(step, self.weight)

    def apply(self, step: Step, weight: float | Tensor) -> None:
        """Adds ``weight`` times the penalty's gradient to the gradients of the factors.

        Args:
            step: The step.
            weight: A number, or a 0-dimensional tensor, which nothing waits for.
        """
        count = sum(map(len, self._groups))
        start = 1 / count if self.scale == "mean" and count else 1.0
        limited: list[Tensor] = []
        with torch.no_grad():
            for sites, A, B, shadow in self._factors():
                with no_autocast(A):
                    found = (
                        self._spectral(sites, A, B)
                        if shadow is None
                        else self._shadowed(sites, A, B, shadow)
                    )
                    factor = found.square.new_full(found.square.shape, start)
                    if self.max_ratio is not None:
                        task = torch.stack([_task_norm(step, site) for site in sites])
                        there, norm = _positive(found.square.clamp(min=0.0).sqrt(), 0.0)
                        limit = torch.where(there, self.max_ratio * task / norm, math.inf)
                        limited.append(limit < factor)
                        factor = torch.minimum(factor, limit)
                    if isinstance(weight, Tensor):
                        weight = weight.detach().to(factor.device, factor.dtype)
                    g_A, g_B = found.gradients((factor * weight)[:, None, None])
                for i, site in enumerate(sites):
                    step.add_gradient(site.A, g_A[i])
                    step.add_gradient(site.B, g_B[i])
        self._limited = limited

    def _spectral(self, sites: Sequence[Site], A: Tensor, B: Tensor) -> _Gradients:
        core = _core(A, B, self.eps)
        for_A, for_B = _slopes(core, self.eps)
        if sites[0].factors.A0 is not None:  # A takes part as A and as A − A0: see _stacked
            r = sites[0].rank
            for_A, for_B = for_A[:, :r] + for_A[:, r:], for_B[..., :r]
        A, B = _full(A, B)

        def gradients(factor: Tensor) -> tuple[Tensor, Tensor]:
            # The small matrix takes the factor and the rounding: A and B are read once.
            return (for_A * factor).to(A.dtype) @ A, B @ (for_B * factor).to(B.dtype)

        square = ((for_A @ core.K) * for_A).sum((-2, -1)) + ((core.G @ for_B) * for_B).sum((-2, -1))
        return _Gradients(square, gradients)

    def _shadowed(self, sites: Sequence[Site], A: Tensor, B: Tensor, shadow: _Shadow) -> _Gradients:
        _, g_A, g_B = shadow_penalty_gradient(A, B, shadow.U, shadow.V)
        if sites[0].factors.A0 is not None:
            r = sites[0].rank
            g_A, g_B = g_A[:, :r] + g_A[:, r:], g_B[..., :r]
        active = self._active(A, B, shadow)[:, None, None]
        g_A, g_B = (torch.where(active, g, 0.0) for g in (g_A, g_B))
        square = g_A.square().sum((-2, -1)) + g_B.square().sum((-2, -1))
        return _Gradients(square, lambda factor: (g_A * factor, g_B * factor))

    def after_step(self, step: Step) -> None:
        if self.kind == "shadow" and (step.number + 1) % self.refresh_every == 0:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Moves every site's shadow towards pinv(B A)ᵀ; the rule does it by itself.

        New tensors are made: what holds the old ones keeps what it had. The decompositions
        make the host wait for an accelerator, once in ``refresh_every`` steps.
        """
        for sites in self._groups:
            A, B = _stacked(sites)
            shape = (len(sites), 2 * sites[0].rank)
            old = self._shadow(sites) or _Shadow(
                B.new_zeros(shape[0], B.shape[-2], shape[1], dtype=torch.float32),
                A.new_zeros(shape[0], A.shape[-1], shape[1], dtype=torch.float32),
                torch.zeros(shape[0], dtype=torch.float64, device=A.device),
                torch.zeros(shape[0], dtype=torch.float64, device=A.device),
            )
            finite, A, B = _finite(A, B)
            with no_autocast(A):
                found = _something(A, B) & finite
                count = old.refreshes + found
                momentum = torch.full_like(count, self.momentum)
                if self.debias:
                    m = self.momentum
                    momentum = m * (1 - m ** (count - 1)) / (1 - m ** count.clamp(min=1))
                U, V, dropped = refresh_shadow(
                    old.U, old.V, A, B, momentum[:, None, None], shape[1], self.truncate
                )
            where = found[:, None, None]
            new = _Shadow(
                torch.where(where, U.float(), old.U),
                torch.where(where, V.float(), old.V),
                count,
                torch.where(found, momentum * old.error + dropped, old.error),
            )
            for i, site in enumerate(sites):
                # Clones: a slice would keep the whole group alive when adapters go.
                parts = (new.U[i], new.V[i], new.refreshes[i], new.error[i])
                self._shadows[site.key] = _Shadow(*(t.clone() for t in parts))

    def _shadow(self, sites: Sequence[Site]) -> _Shadow | None:
        """The shadows of a group, stacked; new sites' are 0. ``None`` if there is none."""
        found = [self._shadows.get(site.key) for site in sites]
        one = next((s for s in found if s is not None), None)
        if one is None:
            return None
        empty = _Shadow(*(torch.zeros_like(t) for t in (one.U, one.V, one.refreshes, one.error)))
        whole = [s or empty for s in found]
        return _Shadow(
            torch.stack([s.U for s in whole]),
            torch.stack([s.V for s in whole]),
            torch.stack([s.refreshes for s in whole]),
            torch.stack([s.error for s in whole]),
        )

    def _factors(self) -> Iterator[tuple[list[Site], Tensor, Tensor, _Shadow | None]]:
        """Each group with its factors, and its shadows; without those that have none yet."""
        for sites in self._groups:
            shadow = self._shadow(sites) if self.kind == "shadow" else None
            if self.kind == "spectral" or shadow is not None:
                yield sites, *_stacked(sites), shadow

    @staticmethod
    def _active(A: Tensor, B: Tensor, shadow: _Shadow) -> Tensor:
        return _something(A, B) & (shadow.refreshes > 0)

    @torch.no_grad()
    def _values(self) -> Tensor:
        """The penalty at every site; of the shadow form, 0 where it does nothing."""
        values = []
        for _, A, B, shadow in self._factors():
            if shadow is None:
                values.append(spectral_penalty(A, B, self.eps))
                continue
            value = shadow_penalty(A, B, shadow.U, shadow.V)
            active = self._active(A, B, shadow)
            values.append(torch.where(active, value, torch.zeros_like(value)))
        return torch.cat([v.to(values[0].device) for v in values]) if values else torch.zeros(1)

    def value(self) -> Tensor:
        """The penalty at the present factors, mean or sum over the sites, without weight.

        Returns:
            0-dimensional, float64; of the shadow form 0 before the first refresh.
        """
        count = sum(map(len, self._groups))
        total = self._values().sum()
        return total / max(count, 1) if self.scale == "mean" else total

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """``penalty`` as :meth:`value`, and the mean ``effective_rank`` of the changes.

        With a ``max_ratio`` also ``limited``, the share of the sites where it limited the
        gradient in the last step.
        Of the shadow form also ``excess``, the mean over the sites of the penalty above its
        floor √(min(d_out, d_in) − r), and ``shadow_error``, the largest bound on the error of
        a shadow relative to the shadow.
        """
        ranks = [effective_rank(*_stacked(sites)).cpu() for sites in self._groups]
        found = {"penalty": float(self.value())}
        if ranks:
            found["effective_rank"] = float(torch.cat(ranks).mean())
        if self._limited:
            found["limited"] = float(torch.cat([m.cpu() for m in self._limited]).double().mean())
        if self.kind == "shadow":
            excesses, errors = [torch.zeros(0)], [torch.zeros(1)]
            for _, A, B, shadow in self._factors():
                assert shadow is not None  # of that kind
                floor = math.sqrt(max(min(B.shape[-2], A.shape[-1]) - A.shape[-2], 0))
                value = shadow_penalty(A, B, shadow.U, shadow.V) - floor
                active = self._active(A, B, shadow)
                excesses.append(torch.where(active, value, torch.zeros_like(value)).cpu())
                _, size = _positive(torch.linalg.matrix_norm(shadow.U).double(), 0.0)
                errors.append((shadow.error / size).cpu())
            excess = torch.cat([e.double() for e in excesses])
            found["excess"] = float(excess.mean()) if excess.numel() else 0.0
            found["shadow_error"] = float(torch.cat([e.double() for e in errors]).max())
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shadows": {
                key: {
                    "U": s.U.clone(),
                    "V": s.V.clone(),
                    "refreshes": s.refreshes.clone(),
                    "error": s.error.clone(),
                }
                for key, s in self._shadows.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise TrainingError(
                "The checkpoint is of a run with another orthogonality penalty.",
                expected=self.kind,
                got=state["kind"],
                fix=f"resume with kind={state['kind']!r}",
            )
        sites = {site.key: site for group in self._groups for site in group}
        shadows = {}
        for key, saved in state["shadows"].items():
            site = sites.get(key)
            if site is None:
                raise TrainingError(
                    "The checkpoint has a shadow of a layer that is not in training.",
                    expected=", ".join(sites),
                    got=key,
                    key=key,
                )
            wanted = [(n, 2 * site.rank) for n in (site.B.shape[0], site.A.shape[1])]
            shapes = [tuple(saved[n].shape) for n in ("U", "V")]
            if shapes != wanted:
                raise TrainingError(
                    "A shadow in the checkpoint has another shape than its layer needs.",
                    expected=wanted,
                    got=shapes,
                    key=key,
                )
            parts = (saved[n].to(site.A.device).clone() for n in ("U", "V", "refreshes", "error"))
            shadows[key] = _Shadow(*parts)
        self._shadows = shadows


def _stacked(sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """Factors of the changes of a group: A [sites, r, d_in] and B [sites, d_out, r].

    With a frozen part B A − B0 A0 = [B − B0, B0] [A; A − A0]: so written, nothing cancels
    while the change is small.
    """
    A = torch.stack([site.A.detach() for site in sites])
    B = torch.stack([site.B.detach() for site in sites])
    if sites[0].factors.A0 is None:
        return A, B
    A0 = torch.stack([cast("Tensor", site.factors.A0).detach() for site in sites])
    B0 = torch.stack([cast("Tensor", site.factors.B0).detach() for site in sites])
    A, B, A0, B0 = _wide(A, B, A0, B0)
    return torch.cat((A, A - A0), dim=-2), torch.cat((B - B0, B0), dim=-1)


def _something(A: Tensor, B: Tensor) -> Tensor:
    """Where there is a change: ‖B‖ ≥ 1e-6, and B A is more than rounding."""
    A, B = _wide(A, B)
    norm_A, norm_B = torch.linalg.matrix_norm(A), torch.linalg.matrix_norm(B)
    square = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1))
    something: Tensor = (norm_B >= _NOTHING) & (square > 1e-13 * (norm_A * norm_B).square())
    return something


def _task_norm(step: Step, site: Site) -> Tensor:
    """Norm of the task's gradient over A and B, in the loss's own scale, 0-dimensional."""
    grads = [g for g in (step.gradient(site.A), step.gradient(site.B)) if g is not None]
    if not grads:
        return torch.zeros((), device=site.A.device)
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])
    )
    return norm


def _number(value: object) -> float:
    """The value if it is a finite number, else NaN, which no condition accepts."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (
        float(cast("float", value)) if usable and math.isfinite(cast("float", value)) else math.nan
    )


def _check(usable: bool, key: str, expected: str, got: object) -> None:
    if not usable:
        raise ConfigError(f"{key} cannot be {got!r}.", expected=expected, got=repr(got), key=key)
