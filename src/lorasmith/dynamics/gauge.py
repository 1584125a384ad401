"""Gauge projection: of all factors with the same product, the balanced ones, after every step.

Source: GP-LoRA (gauge-projected LoRA). B A does not change under A → R A, B → B R⁻¹, but the
path of an optimiser does: it sees A and B, not their product. After each step the factors
are moved to the point of that orbit where

    A Aᵀ = μ Bᵀ B          A [r, d_in], B [d_out, r], μ > 0

With G_A = A Aᵀ and G_B = Bᵀ B [r, r], R must solve R G_A R = μ R⁻¹ G_B R⁻¹. The positive
definite S = R² that does is unique, the geometric mean of G_A⁻¹ and μ G_B:

    S = G_A^-½ (μ G_A^½ G_B G_A^½)^½ G_A^-½ = L⁻ᵀ (μ Lᵀ G_B L)^½ L⁻¹,    G_A = L Lᵀ

and R = S^½ is the symmetric R, the one nearest to the identity; another R = Q S^½ with an
orthogonal Q meets the constraint as well but turns the factors, and Adam's path with them.
The second form of S costs one Cholesky and, with the root, two symmetric eigenproblems
where the first costs three. Gram matrices, cores and the products with the factors are
computed in float64 and rounded once, all layers of one rank in one batch. (On a CPU, where R
is near the identity, as in every step but the first: A + (R − 1) A with the product in
float32, whose rounding is below that of the sum.)

μ = r / d_out by default (``"auto"``), as in GP-LoRA: an entry of B is then about
√(d_in / r) times as large as one of A, so that under an optimiser with steps of one size
for all entries (Adam) A turns the faster of the two. μ = 1 shares the singular values of
B A evenly, √σ each. ``"auto"`` is what was published, not a proven best. μ may be given for
each layer.

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

Optimiser state (``moments="transport"``). A gradient moves as g_A → R⁻ᵀ g_A, g_B → g_B Rᵀ
(R symmetric), and so, being linear in gradients, does a first moment: exactly. The second
moment E[g ∘ g] of the moved gradient needs the covariances between the rows of g, which no
optimiser keeps; taken as zero, it is

    v_A → (R⁻¹ ∘ R⁻¹) v_A          v_B → v_B (R ∘ R)

exact for a diagonal R, never negative, and of the right scale: without it Adam would divide
gradients of the new size by roots of the old one. max_exp_avg_sq moves alike, which keeps
it above exp_avg_sq. See :data:`STATE_RULES` for other optimisers; state that has no rule is
an error that says so, and ``moments="keep"`` leaves all state where it is.

Deviations from GP-LoRA's code: no ε (with it the constraint fails for small B, and A shrinks
to zero at B = 0); float64 inside; moments are transported; all layers at once. The frozen
part of PiSSA-like starts stays: the gauge acts on A and B alone, whose product is kept, and
so are ΔW and what DoRA makes of it.

Limits: ``torch.linalg.eigh`` makes a GPU wait once a projection, and so does the check for
deficient and non-finite layers. Factors stored in bfloat16 or float16 are refused unless
asked for: rounding them moves B A by some 2e-3 (bfloat16) at each projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lorasmith.core.lowrank import no_autocast
from lorasmith.core.variant import Factors
from lorasmith.dynamics.protocol import Dynamic, Site, Step
from lorasmith.dynamics.sites import find_sites
from lorasmith.errors import ConfigError, TrainingError

__all__ = [
    "STATE_RULES",
    "GaugeProjectedOptimizer",
    "GaugeProjection",
    "GaugeReport",
    "Mu",
    "gauge_residual",
    "gauge_transform",
    "project_gauge_",
]

#: μ of all layers, ``"auto"`` for r / d_out, or a function of a layer's name and factors.
Mu: TypeAlias = float | Literal["auto"] | Callable[[str, Factors], float]
Moments: TypeAlias = Literal["transport", "keep"]
StateRule: TypeAlias = Literal["gradient", "squares", "magnitude", "parameter", "update squares"]

#: Optimiser state of a parameter's shape → how it moves with the parameter. T is what a
#: gradient is multiplied with, T_p what the parameter is.
STATE_RULES: dict[str, StateRule] = {
    "exp_avg": "gradient",  # T: Adam, NAdam, RAdam, Adamax, Lion
    "momentum_buffer": "gradient",  # SGD, Muon
    "grad_avg": "gradient",  # centred RMSprop
    "exp_avg_sq": "squares",  # T ∘ T: Adam and its kin
    "max_exp_avg_sq": "squares",  # amsgrad
    "square_avg": "squares",  # RMSprop, Adadelta
    "sum": "squares",  # Adagrad
    "exp_inf": "magnitude",  # |T|, an upper bound of the largest: Adamax
    "ax": "parameter",  # T_p: the average of ASGD
    "acc_delta": "update squares",  # T_p ∘ T_p: Adadelta
}

#: Elements of a batch: what fits a core's cache in float64; elsewhere, what keeps a GPU busy.
_CHUNK_CPU, _CHUNK = 2**16, 2**22
#: Eigenvalues of R up to this, and from its inverse, are near enough to 1 to add R − 1.
_NEAR = 1.25
#: Squared relative singular values below which the exact, slower form decides.
_SAFE = 1e-8


# -- mathematics -----------------------------------------------------------------------------


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
        core = _solve(g_a, g_b, factor.expand(batch).reshape(-1), _tolerance(r, A.dtype), None)
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
        found = _common_residual(g_a, g_b, factor.reshape(-1), _tolerance(r, A.dtype))
    return found.reshape(batch)


def _residual(g_a: Tensor, g_b: Tensor, mu: Tensor) -> Tensor:
    g_b = mu[..., None, None] * g_b
    size = (torch.linalg.matrix_norm(g_a) + torch.linalg.matrix_norm(g_b)) / 2
    off: Tensor = torch.linalg.matrix_norm(g_a - g_b)
    return off / torch.where(size > 0, size, 1.0)


def _inside(projector: Tensor, gram: Tensor) -> Tensor:
    """P G P."""
    return projector @ gram @ projector


def _common_residual(g_a: Tensor, g_b: Tensor, mu: Tensor, tolerance: float) -> Tensor:
    """The residual [n] of Gram matrices [n, r, r] on the directions that both have."""
    finite = (torch.isfinite(g_a) & torch.isfinite(g_b)).flatten(1).all(1)
    g_a, g_b = (torch.where(finite[:, None, None], g, 0.0) for g in (g_a, g_b))
    common = _common(_unit(g_a)[0], _unit(g_b)[0], tolerance)
    projector = _spectral(common.vectors, common.active.to(g_a.dtype))
    found = _residual(_inside(projector, g_a), _inside(projector, g_b), mu)
    return torch.where(finite, found, math.nan)


def _tolerance(r: int, dtype: torch.dtype) -> float:
    """Relative singular value below which a direction of a factor counts as zero.

    Relative to the Frobenius norm. Gram matrices in float64 resolve √(r ε); what is stored in
    float32 is not known better than r ε of its own. The noise of coarser dtypes cannot be
    told from signal.
    """
    if dtype == torch.float64:
        return 4 * math.sqrt(r * torch.finfo(torch.float64).eps)
    return r * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Core:
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


def _solve(
    g_a: Tensor, g_b: Tensor, mu: Tensor, tolerance: float, names: Sequence[str] | None
) -> _Core:
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
    return _Core(
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


# -- many layers -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pair:
    """One layer's factors and its μ."""

    name: str
    A: Tensor
    B: Tensor
    mu: float


class _Group:
    """Layers of one rank on one device."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self.pairs = pairs
        self.names = [p.name for p in pairs]
        self.rank = pairs[0].A.shape[0]
        self.device = pairs[0].A.device
        self.mu = torch.tensor([p.mu for p in pairs], dtype=torch.float64, device=self.device)
        kinds = {t.dtype for p in pairs for t in (p.A, p.B)}
        self.float32 = kinds == {torch.float32}
        wide = kinds == {torch.float64}
        self.tolerance = _tolerance(self.rank, torch.float64 if wide else torch.float32)
        self.A = self._chunks([p.A for p in pairs])
        self.B = self._chunks([p.B for p in pairs])

    def _chunks(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """(places, tensors) of equal shape and dtype, not too many elements at once."""
        alike: dict[Any, list[int]] = {}
        for place, tensor in enumerate(tensors):
            alike.setdefault((tensor.shape, tensor.dtype), []).append(place)
        chunks = []
        for places in alike.values():
            step = _batch(tensors[places[0]])
            for start in range(0, len(places), step):
                part = places[start : start + step]
                index = torch.tensor(part, device=self.device)
                chunks.append((index, [tensors[i] for i in part]))
        return chunks

    def grams(self) -> tuple[Tensor, Tensor]:
        """A Aᵀ and Bᵀ B of all [n, r, r], in float64."""
        shape = (len(self.pairs), self.rank, self.rank)
        g_a, g_b = (torch.empty(shape, dtype=torch.float64, device=self.device) for _ in "AB")
        for index, tensors in self.A:
            a = _stack(tensors, torch.float64)
            g_a.index_copy_(0, index, a @ a.mT)
        for index, tensors in self.B:
            b = _stack(tensors, torch.float64)
            g_b.index_copy_(0, index, b.mT @ b)
        return g_a, g_b

    def project(self, state: Mapping[Tensor, Any] | None) -> _Core:
        g_a, g_b = self.grams()
        core = _solve(g_a, g_b, self.mu, self.tolerance, self.names)
        moves = [] if state is None else _moves(self.pairs, state)  # raises before we write
        one = torch.eye(self.rank, dtype=torch.float64, device=self.device)
        near = self._near(core)
        for chunks, matrix, left in ((self.A, core.R, True), (self.B, core.R_inverse, False)):
            change = (matrix - one).to(torch.float32) if near else matrix
            for index, tensors in chunks:
                if near:
                    _add_product(tensors, change[index], left=left)
                else:
                    _multiply(tensors, change[index], left=left)
        if moves:
            self._move_state(moves, core)
        return core

    def _near(self, core: _Core) -> bool:
        """Whether A + (R − 1) A may be computed in float32: its rounding is that of the sum.

        Every step but the first is such a one. Elsewhere than on a CPU the question costs
        more than it saves, and float32 products may be of fewer digits (TF32).
        """
        return (
            self.device.type == "cpu"
            and self.float32
            and torch.get_float32_matmul_precision() == "highest"
            and bool(core.distance.max() <= _NEAR)
        )

    def _move_state(self, moves: list[tuple[int, bool, StateRule, Tensor]], core: _Core) -> None:
        alike: dict[Any, tuple[list[int], list[Tensor]]] = {}
        for place, of_a, rule, tensor in moves:
            places, tensors = alike.setdefault(
                (of_a, rule, tensor.shape, tensor.dtype, tensor.device), ([], [])
            )
            places.append(place)
            tensors.append(tensor)
        for (of_a, rule, *_), (places, tensors) in alike.items():
            # What multiplies gradients is the inverse of what multiplies the factor.
            inverted = of_a != (rule in ("parameter", "update squares"))
            matrix = core.R_inverse if inverted else core.R
            if rule in ("squares", "update squares"):
                matrix = matrix.square()
            elif rule == "magnitude":
                matrix = matrix.abs()
            step = _batch(tensors[0])
            for start in range(0, len(places), step):
                part = slice(start, start + step)
                index = torch.tensor(places[part], device=self.device)
                wide = tensors[0].dtype == torch.float64
                some = matrix[index].to(tensors[0].device)
                _multiply(
                    tensors[part], some, left=of_a, dtype=torch.float64 if wide else torch.float32
                )


def _batch(like: Tensor) -> int:
    """How many tensors of that size to take at once."""
    chunk = _CHUNK_CPU if like.device.type == "cpu" else _CHUNK
    return max(1, chunk // max(1, like.numel()))


def _stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All of them in one tensor [k, …], converted on the way."""
    stacked = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(stacked.unbind()), list(tensors))
    return stacked


def _multiply(
    tensors: Sequence[Tensor], matrix: Tensor, *, left: bool, dtype: torch.dtype = torch.float64
) -> None:
    """Each tensor times its r × r matrix, in its own memory."""
    stacked, matrix = _stack(tensors, dtype), matrix.to(dtype)
    product = matrix @ stacked if left else stacked @ matrix
    torch._foreach_copy_(list(tensors), list(product.unbind()))


def _add_product(tensors: Sequence[Tensor], matrix: Tensor, *, left: bool) -> None:
    """Adds to each float32 tensor its product with an r × r matrix that is small."""
    stacked = _stack(tensors, torch.float32)
    product = matrix @ stacked if left else stacked @ matrix
    torch._foreach_add_(list(tensors), list(product.unbind()))


def _moves(
    pairs: Sequence[_Pair], state: Mapping[Tensor, Any]
) -> list[tuple[int, bool, StateRule, Tensor]]:
    """(place, whether it is A's, rule, tensor) of all optimiser state that must move."""
    moves = []
    for place, pair in enumerate(pairs):
        for of_a, factor in ((True, pair.A), (False, pair.B)):
            entries = state.get(factor)
            if not entries:
                continue
            for key, value in entries.items():
                if _is_scalar(value):
                    continue
                rule = STATE_RULES.get(key)
                if key == "momentum_buffer" and "square_avg" in entries:
                    rule = None  # RMSprop's holds steps, not gradients
                if rule is None or not isinstance(value, Tensor) or value.shape != factor.shape:
                    raise _no_rule(pair.name, key, value)
                moves.append((place, of_a, rule, value))
    return moves


def _is_scalar(value: Any) -> bool:
    """Step counts and the like, which no gauge changes."""
    if isinstance(value, Tensor):
        return value.numel() <= 1 and value.dim() < 2
    return value is None or isinstance(value, bool | int | float | str)


def _no_rule(layer: str, key: str, value: Any) -> ConfigError:
    got = f"{key!r} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{key!r}"
    return ConfigError(
        f"The optimiser keeps state of {layer!r} that cannot be moved with the factors.",
        expected=f"state of the factor's shape under one of {', '.join(STATE_RULES)}",
        got=got,
        fix='moments="keep", which leaves the state as it is; or Adam, AdamW, SGD, Lion',
        key="moments",
    )


class _Projector:
    """Many layers' factors, and how to project them all."""

    def __init__(self, pairs: Sequence[_Pair], *, allow_low_precision: bool) -> None:
        self.pairs = tuple(pairs)
        self.allow_low_precision = allow_low_precision
        self._check()
        self._signature: list[Any] = []
        self._groups: list[_Group] = []

    def _check(self) -> None:
        owner: dict[int, str] = {}
        for pair in self.pairs:
            if pair.A.dim() != 2 or pair.B.dim() != 2 or pair.A.shape[0] != pair.B.shape[1]:
                raise ConfigError(
                    f"The factors of layer {pair.name!r} do not fit together.",
                    expected="A [r, d_in] and B [d_out, r]",
                    got=f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)}",
                    key=pair.name,
                )
            for factor in (pair.A, pair.B):
                other = owner.setdefault(id(factor), pair.name)
                if other != pair.name:
                    raise ConfigError(
                        f"The layers {other!r} and {pair.name!r} share a factor.",
                        expected="factors of its own for each layer: a shared one cannot be "
                        "balanced against two partners",
                        got="one parameter in two layers",
                        key=pair.name,
                    )
                if factor.device.type == "mps":
                    raise ConfigError(
                        "Gauge projection needs float64, which MPS devices do not have.",
                        expected="factors on a CPU or a CUDA device",
                        got=str(factor.device),
                        key=pair.name,
                    )
                narrow = factor.dtype not in (torch.float32, torch.float64)
                if narrow and not self.allow_low_precision:
                    raise ConfigError(
                        f"The factors of layer {pair.name!r} are stored in {factor.dtype}.",
                        expected="float32 or float64: rounding to bfloat16 changes B A by some "
                        "2e-3 at each projection",
                        got=str(factor.dtype),
                        fix="train the factors in float32 (PEFT: autocast_adapter_dtype=True), "
                        "or allow_low_precision=True",
                        key=pair.name,
                    )

    @property
    def groups(self) -> list[_Group]:
        """Made anew when parameters have been moved to another device or dtype."""
        signature = [(t.device, t.dtype) for p in self.pairs for t in (p.A, p.B)]
        if signature != self._signature:
            if self._signature:
                self._check()
            by_kind: dict[Any, list[_Pair]] = {}
            for pair in self.pairs:
                by_kind.setdefault((pair.A.shape[0], pair.A.device), []).append(pair)
            self._groups = [_Group(pairs) for pairs in by_kind.values()]
            self._signature = signature
        return self._groups

    @torch.no_grad()
    def project(self, state: Mapping[Tensor, Any] | None = None) -> list[_Core]:
        """Projects all layers, with their optimiser state if it is given."""
        cores = []
        for group in self.groups:
            with no_autocast(group.device):
                cores.append(group.project(state))
        return cores

    @torch.no_grad()
    def residuals(self) -> list[Tensor]:
        """Of each group [n]: the residual now, on the directions that both factors have."""
        found = []
        for group in self.groups:
            with no_autocast(group.device):
                found.append(_common_residual(*group.grams(), group.mu, group.tolerance))
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Groups are made of what is here; a copy must make them of its own tensors.
        return {**self.__dict__, "_groups": [], "_signature": []}


def _mu_of(mu: Mu, name: str, factors: Factors) -> float:
    value: object = mu(name, factors) if callable(mu) else mu
    if value == "auto":
        return factors.rank / factors.B.shape[0]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"mu cannot be {value!r}" + (f" (layer {name!r})." if callable(mu) else "."),
            expected='a positive number, "auto" (r / d_out), or a function that returns one',
            got=repr(value),
            key="mu",
        )
    return float(value)  # type: ignore[arg-type]


def _check_options(mu: Mu, every: object, start_step: object, moments: object) -> None:
    if not callable(mu):
        _mu_of(mu, "", Factors(torch.empty(1, 1), torch.empty(1, 1), 1.0))
    for key, value, least in (("every", every, 1), ("start_step", start_step, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{key} cannot be {value!r}.",
                expected=f"a whole number of at least {least}",
                got=repr(value),
                key=key,
            )
    if moments not in ("transport", "keep"):
        raise ConfigError(
            "Unknown moments.", expected="transport or keep", got=repr(moments), key="moments"
        )


def _of_sites(sites: Iterable[Site], mu: Mu) -> list[_Pair]:
    sites = tuple(sites)
    several = len({site.adapter for site in sites}) > 1
    pairs = []
    seen: set[tuple[int, int]] = set()
    for site in sites:
        # One module under two names is one layer.
        if (key := (id(site.A), id(site.B))) not in seen:
            seen.add(key)
            name = site.key if several else site.name
            pairs.append(_Pair(name, site.A, site.B, _mu_of(mu, name, site.factors)))
    return pairs


# -- by hand ---------------------------------------------------------------------------------


class GaugeReport:
    """What a projection found and did. Numbers wait on their device until they are read.

    Residuals are those of the directions that A and B both have (``directions="common"`` of
    :func:`gauge_residual`), 0 where there are none.
    """

    def __init__(self, groups: Sequence[_Group], cores: Sequence[_Core], after: list[Tensor]):
        self._names = [name for group in groups for name in group.names]
        self._cores = cores
        self._after = after

    def _read(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        values = [value for tensor in tensors for value in tensor.tolist()]
        return dict(zip(self._names, values, strict=True))

    @property
    def before(self) -> dict[str, float]:
        """Layer → residual before (:func:`gauge_residual`); makes the device wait."""
        return self._read(core.residual for core in self._cores)

    @property
    def after(self) -> dict[str, float]:
        """Layer → residual right after; makes the device wait."""
        return self._read(self._after)

    @property
    def condition(self) -> dict[str, float]:
        """Layer → condition number of R, 1 where nothing was moved; makes the device wait."""
        return self._read(core.condition for core in self._cores)

    @property
    def directions(self) -> dict[str, int]:
        """Layer → directions that were balanced, r if none was left alone; makes it wait."""
        return self._read(core.directions for core in self._cores)

    def __repr__(self) -> str:
        if not self._names:
            return "GaugeReport(no layers)"
        before, after = max(self.before.values()), max(self.after.values())
        return f"GaugeReport({len(self._names)} layers, residual {before:.2g} -> {after:.2g})"


AnyFactors: TypeAlias = Factors | tuple[Tensor, Tensor]


@torch.no_grad()
def project_gauge_(
    model_or_factors: nn.Module | AnyFactors | Mapping[str, AnyFactors] | Sequence[AnyFactors],
    mu: Mu = "auto",
    *,
    adapter: str | None = None,
    allow_low_precision: bool = False,
) -> GaugeReport:
    """Balances factors in place: A Aᵀ = μ Bᵀ B with B A as it was.

        ls.project_gauge_(model)                 # an adapter of ours, or a PeftModel
        ls.project_gauge_([(A, B)], mu=1.0)

    Args:
        model_or_factors: A model with a low-rank adapter (ours, a ``PeftModel``, or modules
            with ``lora_A`` and ``lora_B``), of which the layers whose A and B are trained are
            projected; or ``Factors`` or (A, B), one, a sequence, or a mapping of them by name.
            A [r, d_in], B [d_out, r].
        mu: μ: a positive number, ``"auto"`` for r / d_out, or a function of a layer's name
            and ``Factors``.
        adapter: Of a model: which adapter; by default the active one.
        allow_low_precision: Also projects factors stored in bfloat16 or float16, at the price
            of rounding them.

    Returns:
        What was found and done; nothing in it makes the device wait before it is read.

    Raises:
        TrainingError: If factors are not finite; the message names the layer, and no factor
            of its rank has been changed.
        ConfigError: If factors do not fit, are shared between layers, or μ is unusable.
        UnknownNameError: If the model has no low-rank layers.
    """
    _check_options(mu, 1, 0, "keep")
    if isinstance(model_or_factors, nn.Module):
        pairs = _of_sites(find_sites(model_or_factors, adapter), mu)
    else:
        pairs = _of_factors(model_or_factors, mu)
    projector = _Projector(pairs, allow_low_precision=allow_low_precision)
    cores = projector.project()
    return GaugeReport(projector.groups, cores, projector.residuals())


def _of_factors(
    given: AnyFactors | Mapping[str, AnyFactors] | Sequence[AnyFactors], mu: Mu
) -> list[_Pair]:
    if isinstance(given, Factors) or _is_pair(given):
        given = [given]  # type: ignore[list-item]
    named: Iterable[tuple[str, Any]]
    if isinstance(given, Mapping):
        named = [(str(name), value) for name, value in given.items()]
    else:
        named = [(str(i), value) for i, value in enumerate(given)]
    pairs = []
    for name, value in named:
        if _is_pair(value):
            value = Factors(value[0], value[1], 1.0)
        if not isinstance(value, Factors):
            raise ConfigError(
                f"The entry {name!r} is not a pair of factors.",
                expected="Factors, or a tuple (A [r, d_in], B [d_out, r])",
                got=type(value).__name__,
            )
        pairs.append(_Pair(name, value.A, value.B, _mu_of(mu, name, value)))
    return pairs


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)
    )


# -- in training -----------------------------------------------------------------------------


class GaugeProjection(Dynamic):
    """Balances the factors after every step: A Aᵀ = μ Bᵀ B (see the module's text).

        ls.Dynamics(model, ls.GaugeProjection(), optimizer)

    Args:
        mu: μ: a positive number, ``"auto"`` for r / d_out, or a function of a layer's name
            and ``Factors``.
        every: Project after every so many optimiser steps.
        start_step: The first optimiser step, counted from 0, after which to project.
        moments: ``"transport"``: the optimiser's moments move with the factors. ``"keep"``:
            they stay as they are, as in GP-LoRA.
        allow_low_precision: Also act on factors stored in bfloat16 or float16, which are
            otherwise refused.

    Metrics: ``imbalance``, the largest residual that the last projection found before it
    acted; ``residual``, the largest now; both on the directions that A and B both have, as a
    layer with B = 0, which is all of them before the first step, has nothing to balance
    (``directions="common"`` of :func:`gauge_residual`). ``deficient``, the number of layers in
    which the last projection left a direction alone; ``condition``, the largest condition
    number of R.

    Raises:
        ConfigError: From ``bind``: layers share factors, or are stored in few bits. In a step:
            the optimiser keeps state that cannot be moved (``moments="transport"``).
        TrainingError: In a step: factors are not finite; the message names the layer.
    """

    name: ClassVar[str] = "gauge"
    last: ClassVar[bool] = True

    def __init__(
        self,
        mu: Mu = "auto",
        *,
        every: int = 1,
        start_step: int = 0,
        moments: Moments = "transport",
        allow_low_precision: bool = False,
    ) -> None:
        _check_options(mu, every, start_step, moments)
        self.mu, self.every, self.start_step, self.moments = mu, every, start_step, moments
        self.allow_low_precision = allow_low_precision
        self._projector: _Projector | None = None
        self._last: list[_Core] = []

    def on_sites(self, sites: Sequence[Site]) -> None:
        _check_trained(sites)
        pairs = _of_sites(sites, self.mu)
        self._projector = _Projector(pairs, allow_low_precision=self.allow_low_precision)
        self._last = []
        optimizer = getattr(getattr(self, "context", None), "optimizer", None)
        if isinstance(optimizer, torch.optim.Optimizer):
            _check_owned(optimizer, sites)
            if self.moments == "transport":
                _check_optimizer(optimizer)

    def after_step(self, step: Step) -> None:
        done = step.number - self.start_step
        if self._projector is None or step.skipped or done < 0 or done % self.every:
            return
        state = step.optimizer.state if self.moments == "transport" else None
        self._last = self._projector.project(state)

    def metrics(self) -> dict[str, float]:
        if self._projector is None:
            return {}
        found = {"residual": _largest(self._projector.residuals())}
        if self._last:
            found["imbalance"] = _largest(core.residual for core in self._last)
            found["condition"] = _largest(core.condition for core in self._last)
            left = [(core.directions < core.R.shape[-1]).sum() for core in self._last]
            found["deficient"] = float(sum(int(n) for n in left))
        return found


def _largest(tensors: Iterable[Tensor]) -> float:
    return max((float(t.max()) for t in tensors), default=0.0)


def _check_trained(sites: Sequence[Site]) -> None:
    for site in sites:
        for name, factor in (("A", site.factors.A), ("B", site.factors.B)):
            if not isinstance(factor, nn.Parameter) or not factor.requires_grad:
                what = "frozen" if isinstance(factor, nn.Parameter) else "not a parameter"
                raise ConfigError(
                    f"The factor {name} of layer {site.name!r} cannot be moved: it is {what}.",
                    expected="A and B that are both trained; the gauge changes both",
                    got=f"{name} {what}",
                    fix="train both (LoRA-FA and the like have no gauge to choose)",
                    key=site.name,
                )


def _check_owned(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """Another optimiser's moments would stay behind, and its next step go astray."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for site in sites:
        if id(site.A) not in owned or id(site.B) not in owned:
            raise ConfigError(
                f"The optimiser does not train the factors of layer {site.name!r}.",
                expected="an optimiser made of the model's trainable parameters",
                got=f"{len(owned)} parameters without them",
                fix="make it after the adapter is attached: "
                "torch.optim.AdamW(ls.param_groups(model, lr))",
                key=site.name,
            )


def _check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """What is known beforehand to keep state that cannot move."""
    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        raise ConfigError(
            "The history of L-BFGS cannot be moved with the factors.",
            expected="an optimiser such as AdamW or SGD",
            got="LBFGS",
            fix='moments="keep"',
            key="moments",
        )


class GaugeProjectedOptimizer(torch.optim.Optimizer):
    """An optimiser that projects the factors after each of its steps.

        optimizer = ls.GaugeProjectedOptimizer(torch.optim.AdamW(params, lr=1e-4), model)

    It is the optimiser that it wraps, seen from outside: ``param_groups``, ``state`` and
    ``defaults`` are the very objects of the inner one, so that learning-rate schedulers,
    ``GradScaler``, Accelerate and checkpoints work as with that. Its ``state_dict`` can be
    loaded by the inner optimiser alone, and the other way round (then ``every`` and
    ``start_step`` count from there). It acts on the layers that the model had when it was
    made. A deep copy or pickle of it together with the model stays tied to the model.

    In a trainer that makes its own optimiser, use :class:`GaugeProjection` instead.

    Args:
        optimizer: The optimiser that trains the factors; not to be stepped by itself.
        model: A model with a low-rank adapter: ours, a ``PeftModel``, or modules with
            ``lora_A`` and ``lora_B``.
        mu: μ: a positive number, ``"auto"`` for r / d_out, or a function of a layer's name
            and ``Factors``.
        every: Project after every so many steps.
        start_step: The first step, counted from 0, after which to project.
        moments: ``"transport"`` or ``"keep"``, see :class:`GaugeProjection`.
        adapter: Name of the adapter; by default the active one.
        allow_low_precision: Also act on factors stored in bfloat16 or float16.

    Attributes:
        optimizer: The inner optimiser.

    Raises:
        ConfigError: An option is unusable; the optimiser does not train the factors; layers
            share factors.
        UnknownNameError: The model has no low-rank layers.
        TrainingError: In :meth:`step`: factors are not finite; the message names the layer.
    """

    #: Entry of the state dict that carries the number of steps.
    STATE_KEY: ClassVar[str] = "lorasmith_gauge"

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        mu: Mu = "auto",
        *,
        every: int = 1,
        start_step: int = 0,
        moments: Moments = "transport",
        adapter: str | None = None,
        allow_low_precision: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "Gauge projection needs an optimiser of PyTorch.",
                expected="a torch.optim.Optimizer",
                got=type(optimizer).__name__,
            )
        _check_options(mu, every, start_step, moments)
        if moments == "transport":
            _check_optimizer(optimizer)
        sites = find_sites(model, adapter)
        _check_owned(optimizer, sites)
        pairs = _of_sites(sites, mu)
        self.__setstate__(
            {
                "optimizer": optimizer,
                "every": every,
                "start_step": start_step,
                "moments": moments,
                "_projector": _Projector(pairs, allow_low_precision=allow_low_precision),
                "_steps": 0,
            }
        )

    # The base class would make groups and state of its own; its ``__setstate__`` makes all
    # the rest (the registers of hooks), as for an optimiser that comes out of a file.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimiser's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimiser's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # What inner optimisers offer beyond the base class, such as ``train`` and ``eval``.
        # Nothing private: GradScaler must not take this for a fused optimiser.
        if name.startswith("_") or name == "optimizer":
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the inner optimiser, then the projection.

        Args:
            closure: Evaluates the model again and returns the loss, for optimisers that need
                it (LBFGS); the projection follows the last evaluation.

        Returns:
            What the inner optimiser returns.
        """
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        done = self._steps - self.start_step
        self._steps += 1
        if done >= 0 and done % self.every == 0:
            self._projector.project(self.state if self.moments == "transport" else None)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimiser; factors in it are not projected."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state, and the number of steps."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = {**self.optimizer.state_dict(), self.STATE_KEY: {"steps": self._steps}}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a state of this or of the inner optimiser."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        mine = state_dict.pop(self.STATE_KEY, {})
        self.optimizer.load_state_dict(state_dict)
        self._steps = int(mine.get("steps", 0))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def residual(self) -> float:
        """The largest residual of all layers now, a device waits.

        On the directions that both factors have (:func:`gauge_residual`, ``"common"``).
        """
        return _largest(self._projector.residuals())

    def __getstate__(self) -> dict[str, Any]:
        keys = ("optimizer", "every", "start_step", "moments", "_projector", "_steps")
        return {key: self.__dict__[key] for key in keys}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
