"""What the change of a weight looks like from within: rank, spectrum, and new directions.

For W [d_out, d_in] and W' = W + ΔW, with ΔW = s (B A − B0 A0) from factors or W' − W from two
checkpoints; σ are the singular values of ΔW, U and V the singular vectors of W.

    rank              number of σ above the rounding error τ (below)
    effective rank    exp(H),  H = −Σ p ln p,  p = σ² / Σσ²
    stable rank       Σσ² / σ₁²
    energy in top     ‖U_kᵀ ΔW V_k‖² / ‖ΔW‖²
    intruders         number of j ≤ k with  c_j = max_i |⟨y_j, u_i⟩| < ε,
                      y_j the j-th left singular vector of W', u_i all those of W

Sources: effective rank, Roy and Vetterli, "The effective rank" (EUSIPCO 2007); they take
p = σ / Σσ, here p are shares of energy, as in the other two measures, so that a long tail of
small σ counts for little. Always 1 ≤ stable rank ≤ effective rank ≤ rank. Intruder dimensions:
Shuttleworth et al. 2024, arXiv 2410.21228, with k = 10 and ε = 0.5 as there. For a ΔW that has
nothing to do with W, the energy in top is k² / (d_out d_in) on average.

**Factors.** ΔW = L Rᵀ is never formed: L = Q_L T_L, R = Q_R T_R, and σ are those of the small
core T_L T_Rᵀ, all in float64 (Gram matrices would lose half of the digits). With a frozen part
L = s [B, B − B0] and R = [A − A0; A0]ᵀ, so that small changes of large factors do not cancel.

**Rounding error.** A number stored with a spacing δ errs by at most δ / 2, so with variance
v ≤ δ² / 4 (δ² / 12 where it may lie anywhere). A matrix of independent errors of variances v_ij
has a norm of at most about

    ν = (max_i Σ_j v_ij)^½ + (max_j Σ_i v_ij)^½

(Bandeira and van Handel 2016, arXiv 1408.6185; sharp for equal v_ij). For a dense W', τ = ν of
W' as it is stored, W being taken as it is. For factors, τ = s (ν_B ‖A‖ + ‖B‖ ν_A); it is the one
number here that depends on the gauge, because rounding does. Both at least what float64
resolves. Values below τ are left out of everything, so a change that is all rounding has rank 0.
Errors are independent where ΔW is large against δ. Where it is not, as after a short training
of bfloat16 weights, they follow ΔW: below δ / 3 most of it is gone and the rank reads too low,
from there to 3 δ a rank of 1 may read 2 (higher ranks came out right).

**Singular vectors of W.** Up to n = min(d_out, d_in) = 1024 all are found at once, from the
smaller Gram matrix (``eigh``, float64, O(n³)). Above, only the leading ones of W and W' are
computed at first, by a block Krylov method with Rayleigh-Ritz steps, to a residual of 1e-10 of
σ₁². That gives the energy. For c_j it often suffices too: with m_j the greatest |⟨y_j, u_i⟩| so
far, whatever has not been looked at yet is at most (1 − Σ_i ⟨y_j, u_i⟩²)^½, so c_j = m_j exactly
where m_j is not below that. If it is for some j, which intruders make sure of, the whole basis of
W is found after all. The result is the same either way. Directions in which W has no more than
3e-7 σ₁ are not its singular vectors but rounding, and not compared.

Limits: where singular values of W are equal, its vectors are any basis of a plane, and c_j may be
as low as 1/√2 in a plane without anything new; a rotation among m vectors may lower it to 1/√m.
The definition is the paper's; read few intruders near ε with care. In float64 the whole basis
needs about 4 n² numbers, a Krylov space 32 (2k + 6) n; a dense change is held in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.core.variant import Factors
from lorasmith.diagnostics.records import LayerSpectrum
from lorasmith.errors import ConfigError

__all__ = [
    "EPSILON",
    "TOP",
    "TopEnergy",
    "WeightSVD",
    "effective_rank",
    "energy_in_top",
    "intruder_cosines",
    "layer_spectrum",
    "rounding_norm",
    "singular_values",
    "stable_rank",
    "weight_svd",
]

#: ε and k of the paper on intruder dimensions.
EPSILON = 0.5
TOP = 10

_F64 = torch.float64
#: Elements that are widened to float64 at a time.
_BLOCK = 2**20
#: Singular values below this share of the largest one are not resolved by a Gram matrix.
_RESOLVED = 3e-7
_TOLERANCE = 1e-10
#: Side of a Gram matrix up to which all its eigenvectors are found at once.
_SMALL = 1024
#: Side of a dense change up to which all its singular values are found, without a Gram matrix.
_EXACT = 512

Apply = Callable[[Tensor], Tensor]


# -- numbers from singular values ------------------------------------------------------


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of σ² / Σσ²; 0 without a positive σ.

    Args:
        values: σ, any shape and scale.
    """
    shares = values.to(_F64).flatten()
    shares = shares[shares > 0]
    if not shares.numel():
        return 0.0
    shares = (shares / shares.max()).square()
    shares = shares[shares > 0]
    shares = shares / shares.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """Σσ² / σ₁²; 0 without a positive σ.

    Args:
        values: σ, any shape and scale.
    """
    if not values.numel() or float(values.max()) <= 0:
        return 0.0
    return float((values.to(_F64) / values.max().to(_F64)).square().sum())


# -- the change ------------------------------------------------------------------------


@dataclass(frozen=True)
class _LowRank:
    """ΔW = left @ right.T, and its core; float64."""

    left: Tensor
    right: Tensor
    noise: float


def _low_rank(factors: Factors) -> _LowRank:
    """L, R and τ of an adapter's change."""
    if not factors.exact:
        raise ConfigError(
            "The factors are not the whole change of this layer.",
            expected="factors of an adapter that only adds B A, or the tuned weight itself",
            got="factors with exact=False (DoRA, for one)",
            fix="pass the tuned weight W'",
        )
    A, B = factors.A.detach(), factors.B.detach()
    s = float(factors.scaling)
    a, b = A.to(_F64), B.to(_F64)
    sizes = _norm(a), _norm(b)
    noise = rounding_norm(B) * sizes[0] + sizes[1] * rounding_norm(A)
    noise = abs(s) * max(noise, 32 * torch.finfo(_F64).eps * sizes[0] * sizes[1])
    if factors.A0 is None or factors.B0 is None:
        return _LowRank(s * b, a.T, noise)
    a0, b0 = factors.A0.detach().to(_F64), factors.B0.detach().to(_F64)
    return _LowRank(s * torch.cat((b, b - b0), dim=1), torch.cat((a - a0, a0)).T, noise)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0


def _core(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left @ right.T, float64, descending."""
    small_left = torch.linalg.qr(left, mode="r").R
    small_right = torch.linalg.qr(right, mode="r").R
    values: Tensor = torch.linalg.svdvals(small_left @ small_right.T)
    return values


def rounding_norm(stored: Tensor) -> float:
    """ν: about the largest singular value that rounding to its dtype can add to a matrix.

    Args:
        stored: [m, n] in the dtype of its storage.
    """
    stored = stored.detach()
    limits = torch.finfo(stored.dtype)
    rows, columns = 0.0, torch.zeros(stored.shape[1], dtype=_F64, device=stored.device)
    for block in _split(stored):
        exponent = torch.frexp(block.to(_F64)).exponent - 1
        binade = torch.ldexp(torch.ones_like(exponent, dtype=_F64), exponent)
        # Below the smallest normal number, numbers are as far apart as there.
        spacing = torch.where(block != 0, binade, 0.0).clamp_(min=limits.tiny) * limits.eps
        variance = (spacing / 2).square_()
        rows = max(rows, float(variance.sum(dim=1).max()))
        columns += variance.sum(dim=0)
    return math.sqrt(rows) + math.sqrt(float(columns.max()))


@torch.no_grad()
def singular_values(change: Factors | Tensor) -> Tensor:
    """σ of ΔW, descending, float64, with nothing left out.

    Args:
        change: Exact factors: min(d_out, d_in, r) values (2r with a frozen part), to float64.
            A dense ΔW: min(d_out, d_in) values; above a side of 512 from a Gram matrix,
            which resolves no value below 3e-7 of the largest.
    """
    if isinstance(change, Factors):
        low = _low_rank(change)
        return _core(low.left, low.right)
    dense = change.detach()
    values: Tensor
    if min(dense.shape) <= _EXACT:
        values = torch.linalg.svdvals(dense.to(_F64))
    else:
        values = torch.linalg.eigvalsh(_gram(_tall(dense))).flip(0).clamp_(min=0).sqrt_()
    return values


def _difference(weight: Tensor, tuned: Tensor) -> Tensor:
    """W' − W, in float32 where that loses less than the storage of W' has lost."""
    double = _F64 in (weight.dtype, tuned.dtype) or weight.numel() <= 4 * _BLOCK
    dtype = _F64 if double else torch.float32
    return tuned.detach().to(dtype) - weight.detach().to(dtype)


def _values_above(weight: Tensor, change: Factors | Tensor) -> Tensor:
    """Those σ of ΔW that are above τ, descending."""
    if isinstance(change, Factors):
        low = _low_rank(change)
        values = _core(low.left, low.right)
        return values[values > low.noise]
    delta, noise = _difference(weight, change), rounding_norm(change)
    if not bool(delta.any()):
        return torch.zeros(0, dtype=_F64, device=weight.device)
    tall = _tall(delta)
    n = tall.shape[1]
    if n > _EXACT:
        few = _few_values(tall, noise)
        if few is not None:
            return few
    values = singular_values(delta)
    resolved = _RESOLVED if n > _EXACT else 4 * n * torch.finfo(_F64).eps
    return values[values > max(noise, resolved * float(values[0]))]


def _sum_of_squares(matrix: Tensor) -> Tensor:
    return torch.stack([block.to(_F64).square().sum() for block in _split(matrix)]).sum()


def _few_values(tall: Tensor, noise: float) -> Tensor | None:
    """The σ above τ, found without the others; ``None`` where there are too many of them.

    Ritz values never exceed the values they stand for, and the largest come first: done when
    those above τ² are exact and the next one, with its error, is below.
    """
    apply, n = _gram_apply(_ready(tall)), tall.shape[1]
    for width in (32, 160):
        if n < 8 * width:
            break
        for squares, _, errors in _krylov(apply, n, width, tall.device):
            least = max(noise, _RESOLVED * math.sqrt(float(squares[0]))) ** 2
            count = int((squares > least).sum())
            if count == width:  # and there may be more
                break
            exact = errors[:count] <= _TOLERANCE * squares[0]
            if bool(exact.all()) and float(squares[count] + errors[count]) <= least:
                return squares[:count].sqrt()
        else:
            break
    return None


# -- leading singular vectors ----------------------------------------------------------


def _split(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.split(matrix, max(1, _BLOCK // max(1, matrix.shape[1])))


def _tall(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, with no more columns than rows."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _times(tall: Tensor, x: Tensor) -> Tensor:
    return torch.cat([block.to(_F64) @ x for block in _split(tall)])


def _times_transposed(tall: Tensor, x: Tensor) -> Tensor:
    total = x.new_zeros(tall.shape[1], x.shape[1])
    at = 0
    for block in _split(tall):
        total.addmm_(block.to(_F64).T, x[at : at + block.shape[0]])
        at += block.shape[0]
    return total


def _gram(tall: Tensor) -> Tensor:
    """MᵀM [n, n] in float64."""
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=_F64, device=tall.device)
    for block in _split(tall):
        wide = block.to(_F64)
        total.addmm_(wide.T, wide)
    return total


def _gram_apply(tall: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Apply:
    """X → M'ᵀ M' X with M' = M + left rightᵀ, in one pass over M."""
    if left is None or right is None:

        def plain(x: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for block in _split(tall):
                wide = block.to(_F64)
                total.addmm_(wide.T, wide @ x)
            return total

        return plain
    cross = _times_transposed(tall, left)
    both = left.T @ left

    def updated(x: Tensor) -> Tensor:
        inner = right.T @ x
        return bare(x) + cross @ inner + right @ (cross.T @ x + both @ inner)

    bare = _gram_apply(tall)
    return updated


def _orthonormal(x: Tensor, basis: Tensor | None, seeded: torch.Generator) -> Tensor:
    """An orthonormal basis of what x adds to an orthonormal one, and of chance where it adds none.

    Nothing is added by images under an operator of low rank, once its range is in the basis;
    to normalise what rounding leaves of them would give what the basis has already.
    """
    for turn in range(6):
        sizes = torch.linalg.vector_norm(x, dim=0)
        if basis is not None:
            x = x - basis @ (basis.T @ x)
        q, r = torch.linalg.qr(x)
        lost = r.diagonal().abs() <= 1e-8 * sizes
        x = q
        if bool(lost.any()):
            x = torch.where(
                lost, torch.randn(x.shape, generator=seeded, dtype=_F64).to(x.device), q
            )
        elif turn:  # once leaves a share of the rounding error behind
            break
    return x


def _leading(apply: Apply, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of a symmetric operator ≥ 0 on ℝⁿ, with their vectors.

    A block Krylov space, grown until the Ritz vectors are exact to ``_TOLERANCE``, and begun
    anew from the best ones where it gets large. Blocks find equal eigenvalues, which single
    vectors do not.

    Returns:
        Values [k], descending, and vectors [n, k]; float64.
    """
    k = min(k, n)
    width = k + 6
    if n > max(_SMALL, 16 * width):  # else a Krylov space has no advantage
        for values, vectors, errors in _krylov(apply, n, width, device):
            if float(errors[:k].max()) <= _TOLERANCE * float(values[0]):
                return values[:k], vectors[:, :k]
    return _all(apply(torch.eye(n, dtype=_F64, device=device)), k)


def _krylov(
    apply: Apply, n: int, width: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The best ``width`` Ritz values, their vectors and residuals, better and better."""
    # A seed of its own: the same weight must give the same figures in every run.
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=seeded, dtype=_F64).to(device)
    basis = _orthonormal(x, None, seeded)
    image = apply(basis)
    largest = min(16 * width, n // 2)
    for _ in range(_ROUNDS):
        small = basis.T @ image
        values, inner = torch.linalg.eigh((small + small.T) / 2)
        values, inner = values.flip(0), inner.flip(1)
        take = inner[:, :width]
        vectors = basis @ take
        rest = image @ take - vectors * values[:width]
        errors = torch.linalg.vector_norm(rest, dim=0)
        yield values[:width].clamp(min=0), vectors, errors
        if basis.shape[1] + _STEPS * width > largest:
            keep = inner[:, : largest // 2]
            basis, image = basis @ keep, image @ keep
        for _ in range(_STEPS):
            new = _orthonormal(rest, basis, seeded)
            rest = apply(new)
            basis, image = torch.cat((basis, new), dim=1), torch.cat((image, rest), dim=1)


#: Rayleigh-Ritz steps before giving up on it, and blocks added between two of them.
_ROUNDS = 100
_STEPS = 3


def _all(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return values.flip(0)[:k].clamp(min=0), vectors.flip(1)[:, :k]


@dataclass(frozen=True)
class WeightSVD:
    """Singular values of a weight, with its singular vectors on its shorter side.

    Attributes:
        values: σ [k], descending, float64; only those that are not rounding.
        vectors: [min(d_out, d_in), k]: right singular vectors if d_out ≥ d_in, else left ones.
        whole: Whether these are all.
    """

    values: Tensor
    vectors: Tensor
    whole: bool

    def top(self, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """U_k [d_out, k] and V_k [d_in, k] of the weight that this belongs to."""
        near = self.vectors[:, :k]
        far = _times(_tall(weight), near) / self.values[: near.shape[1]]
        return (far, near) if weight.shape[0] >= weight.shape[1] else (near, far)

    def left_cosines(self, weight: Tensor, vectors: Tensor) -> Tensor:
        """Uᵀ Y [k, m] for unit vectors Y [d_out, m]."""
        if weight.shape[0] < weight.shape[1]:
            return self.vectors.T @ vectors
        return (self.vectors.T @ _times_transposed(weight, vectors)) / self.values[:, None]


@torch.no_grad()
def weight_svd(weight: Tensor, top: int | None = None) -> WeightSVD:
    """Singular values and vectors of a weight, in float64.

    Args:
        weight: W [d_out, d_in], any floating dtype.
        top: How many of the largest are needed; ``None``: all. Up to a side of 1024, and where
            it is quicker, all are found anyhow.
    """
    weight = weight.detach()
    tall = _tall(weight)
    n = tall.shape[1]
    if top is None or n <= _SMALL:
        top = None
        squared, vectors = _all(_gram(tall), n)
    else:
        squared, vectors = _leading(_gram_apply(_ready(tall)), n, top, tall.device)
    values = squared.sqrt()
    kept = int((values > _RESOLVED * values[0]).sum()) if values.numel() else 0
    whole = top is None or top >= n or kept < values.numel()
    return WeightSVD(values[:kept], vectors[:, :kept], whole)


def _ready(tall: Tensor) -> Tensor:
    """A small matrix in float64 once and for all; a large one as it is, widened in passing."""
    return tall.to(_F64) if tall.numel() <= 4 * _BLOCK else tall


# -- where the change lies -------------------------------------------------------------


@dataclass(frozen=True)
class TopEnergy:
    """Shares of ‖ΔW‖² in the top singular subspaces of W.

    Attributes:
        both: ‖U_kᵀ ΔW V_k‖² / ‖ΔW‖².
        left: ‖U_kᵀ ΔW‖² / ‖ΔW‖².
        right: ‖ΔW V_k‖² / ‖ΔW‖².
    """

    both: float
    left: float
    right: float


@torch.no_grad()
def energy_in_top(
    weight: Tensor, change: Factors | Tensor, *, top: int = TOP, svd: WeightSVD | None = None
) -> TopEnergy | None:
    """How much of ΔW lies in the k leading singular directions of W.

    Args:
        weight: W [d_out, d_in].
        change: Exact factors, or W' (not ΔW).
        top: k; less where W has a lower rank.
        svd: Of ``weight``, of at least ``top``.

    Returns:
        ``None`` for a change of zero, of which no share can be said.
    """
    weight = weight.detach()
    svd = svd or weight_svd(weight, top)
    U, V = svd.top(weight, top)
    if isinstance(change, Factors):
        low = _low_rank(change)
        left, right = U.T @ low.left, low.right.T @ V
        small_left = torch.linalg.qr(low.left, mode="r").R
        small_right = torch.linalg.qr(low.right, mode="r").R
        total = float((small_left @ small_right.T).square().sum())
        parts = left @ right, left @ small_right.T, small_left @ right
    else:
        delta = _difference(weight, change)
        total = float(_sum_of_squares(delta))
        onto = _times(delta, V)
        parts = U.T @ onto, _times_transposed(delta, U), onto
    if total == 0:
        return None
    both, one, other = (min(1.0, float(p.square().sum()) / total) for p in parts)
    return TopEnergy(both, one, other)


@torch.no_grad()
def intruder_cosines(
    weight: Tensor, change: Factors | Tensor, *, top: int = TOP, svd: WeightSVD | None = None
) -> Tensor:
    """c_j: how near the j-th left singular vector of W' comes to the nearest one of W.

    Args:
        weight: W [d_out, d_in].
        change: Exact factors, or W' (not ΔW).
        top: k, how many vectors of W'; fewer where W' has a lower rank.
        svd: Of ``weight``: spares the first part of it, or with the whole one both.

    Returns:
        float64 [k] in [0, 1], in the order of the singular values of W'.
    """
    weight = weight.detach()
    tall = _tall(weight)
    n, flipped = tall.shape[1], weight.shape[0] < weight.shape[1]
    if isinstance(change, Factors):
        low = _low_rank(change)
        left, right = (low.right, low.left) if flipped else (low.left, low.right)
        base = _ready(tall)
        squared, near = _leading(_gram_apply(base, left, right), n, top, tall.device)
        far = _times(base, near) + left @ (right.T @ near)
    else:
        base = _ready(_tall(change.detach()))
        squared, near = _leading(_gram_apply(base), n, top, tall.device)
        far = _times(base, near)
    values = squared.sqrt()
    kept = int((values > _RESOLVED * values[0]).sum()) if values.numel() else 0
    if not kept:
        return torch.zeros(0, dtype=_F64, device=weight.device)
    Y = near[:, :kept] if flipped else far[:, :kept] / values[:kept]
    svd = svd or weight_svd(weight, min(2 * top, n))
    found = _greatest(svd, weight, Y)
    if found is None:
        found = _greatest(weight_svd(weight), weight, Y)
    assert found is not None
    return found


def _greatest(svd: WeightSVD, weight: Tensor, Y: Tensor) -> Tensor | None:
    """c_j, or ``None`` where the vectors of W that are missing might come nearer."""
    if not svd.values.numel():
        return torch.zeros(Y.shape[1], dtype=_F64, device=Y.device)
    cosines = svd.left_cosines(weight, Y).abs()
    nearest = cosines.amax(dim=0)
    rest = (1.0 - cosines.square().sum(dim=0)).clamp(min=0).sqrt()
    if not svd.whole and bool((nearest < rest).any()):
        return None
    return nearest.clamp(max=1.0)


# -- the record ------------------------------------------------------------------------


@torch.no_grad()
def layer_spectrum(
    weight: Tensor,
    change: Factors | Tensor,
    *,
    name: str,
    layer: int | None = None,
    projection: str | None = None,
    top: int = TOP,
    intruders: bool = True,
    epsilon: float = EPSILON,
    keep: int = 64,
    svd: WeightSVD | None = None,
) -> LayerSpectrum:
    """The spectrum of one layer's change.

    Args:
        weight: W [d_out, d_in], as the base stores it.
        change: Exact factors, or the tuned weight W' as it is stored (not ΔW).
        name: Name of the layer.
        layer: Index of its transformer block.
        projection: Default: the last part of the name.
        top: k, for the energy and for the intruders; 0 leaves both out, and W unread if there
            are factors.
        intruders: Whether to look for them: the costly part.
        epsilon: ε.
        keep: How many singular values the record holds.
        svd: Of ``weight``, if it is at hand.
    """
    if not isinstance(change, Factors) and change.shape != weight.shape:
        raise ConfigError(
            f"The tuned weight of {name!r} has another shape than the base weight.",
            expected=tuple(weight.shape),
            got=tuple(change.shape),
            key=name,
        )
    weight = weight.detach()
    values = _values_above(weight, change)
    energy: float | None = None
    used, count = 0, None
    cosines: tuple[float, ...] = ()
    if top:
        svd = svd or weight_svd(weight, min(2 * top, *weight.shape) if intruders else top)
        used = min(top, svd.values.numel())
        share = energy_in_top(weight, change, top=top, svd=svd)
        energy = None if share is None else share.both
        if intruders:
            # Without a change W' is W.
            near = svd.values.new_ones(used)
            if share is not None:
                near = intruder_cosines(weight, change, top=top, svd=svd)
            cosines = tuple(near.tolist())
            count = sum(c < epsilon for c in cosines)
    return LayerSpectrum(
        name=name,
        layer=layer,
        projection=projection if projection is not None else name.rpartition(".")[2],
        rank=values.numel(),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        singular_values=tuple(values[:keep].tolist()),
        energy_in_top=energy,
        top=used,
        intruders=count,
        intruder_cosines=cosines,
    )
