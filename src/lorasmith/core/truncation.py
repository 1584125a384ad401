"""The best low-rank approximation of a matrix, given as a product of two factors or as it is.

    M ≈ U_k S_k V_kᵀ        M [d_out, d_in], U [d_out, k], S [k] falling, V [d_in, k]

No other matrix of rank k is nearer to M in the Frobenius norm (Eckart and Young 1936), and
‖M − M_k‖² = Σ_{j>k} S_j². Everything is computed in float64 (float32 on devices that have no
wider numbers).

* A product M = L R, L [d_out, n], R [n, d_in], with n below both sides is never multiplied out:
  QR of L and of Rᵀ, and the decomposition of the n × n product of the two triangles. Exact to
  rounding; O((d_out + d_in) n² + n³).
* Where only k leading vectors of it are wanted, by the Gram matrices: R Rᵀ = C Cᵀ (Cholesky),
  Cᵀ (LᵀL) C = W S² Wᵀ, U_k S_k = L (C W_k) and V_k S_k² = Rᵀ (LᵀL C W_k); no QR and nothing
  inverted. Squares lose what is below their precision ε, so that it is done only where all of S_k²
  are above ``_SQUARED`` · ‖LᵀL‖ ‖RRᵀ‖ (S_k is right to n ε / ``_SQUARED`` then, 10⁻⁸ for n = 64);
  else by QR.
* A dense matrix of up to ``EXACT`` rows (the smaller side) goes through the eigenvectors of the
  smaller of MᵀM and MMᵀ, exact down to singular values of 10⁻⁸ of the largest; up to ``SMALL``
  rows by a decomposition that does not square them.
* Of a larger one, or where the caller asks for it, only the leading vectors, in a block Krylov
  space (Musco and Musco 2015, arXiv 1504.05477, algorithm 2) of r + 8 random vectors with a fixed
  seed, fully reorthogonalised: K = [X, G X, G² X, …], G = MᵀM, and the singular vectors of M K.
  It grows until what is still to be won, estimated from the last two gains as a geometric series,
  is below ``_MISSED`` of ‖M − M_r‖²: the norm of what is lost is then within 10⁻³ of the least
  possible, of noise (the worst case) too. Torch's global random state is not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.core.variant import Factors

__all__ = [
    "EXACT",
    "SMALL",
    "Product",
    "Spectrum",
    "decompose",
    "exact_spectrum",
    "leading_spectrum",
    "norm",
    "wide",
]

#: Rows of the smaller side up to which the whole spectrum is computed, unless less will do. On
#: two CPU cores 2,048 rows take 1.3 s and eight times as long with every doubling.
EXACT = 2048
#: Below this a decomposition that does not square the singular values costs as little.
SMALL = 512
#: The Krylov space stops growing when less than this share of ‖M − M_r‖² is still to be won,
_MISSED = 1e-3
#: or a pass has won less than this share of ‖M‖²,
_NOTHING = 1e-13
#: or after so many passes.
_PASSES = 24
#: Its blocks have so many vectors more than are wanted.
_MORE = 8
#: Share of ‖LᵀL‖ ‖RRᵀ‖ above which squared singular values come from Gram matrices.
_SQUARED = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Leading singular vectors of a matrix M ≈ U diag(S) Vᵀ, float64.

    Attributes:
        U: [d_out, k].
        S: [k], falling.
        V: [d_in, k].
        tolerance: Singular values below this share of the largest are noise.
        whole: Whether those that are not here are noise.
        squares: ‖M‖², where it is known though not all of S is here.
        found: Numerical rank of M, where it is known though not all of S is here.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    tolerance: float
    whole: bool
    squares: float | None = None
    found: int | None = None

    @property
    def energy(self) -> float:
        """‖M‖², or of the leading part, if that is all that is known."""
        return float(self.S.square().sum()) if self.squares is None else self.squares

    @property
    def useful(self) -> int:
        """Number of singular values that are more than noise."""
        return int((self.tolerance * self.S[:1] < self.S).sum())

    @property
    def rank(self) -> int | None:
        """Numerical rank of M, or ``None`` where only the leading vectors are here."""
        return self.useful if self.whole else self.found

    def rank_for(self, energy: float, most: int | None) -> int:
        """The smallest rank that keeps that share of ‖M‖²; at least 1."""
        kept = self.S[: self.useful].square().cumsum(0)
        if kept.numel() == 0:
            return 1
        # A share of 1 is all that is more than noise, however the sum was rounded.
        wanted = kept[-1] * energy if energy < 1 else kept[-1]
        rank = int((kept < wanted).sum()) + 1
        return rank if most is None else min(rank, most)

    def factors(self, rank: int, scaling: float) -> dict[str, Tensor]:
        """A [r, d_in] and B [d_out, r] in float32, on the CPU, with s B A = M_r."""
        k = min(rank, self.useful)
        root = (self.S[:k] / abs(scaling)).sqrt()
        A = torch.zeros(rank, self.V.shape[0])
        B = torch.zeros(self.U.shape[0], rank)
        A[:k] = ((self.V[:, :k] * root).T * math.copysign(1.0, scaling)).float().cpu()
        B[:, :k] = (self.U[:, :k] * root).float().cpu()
        return {"A": A, "B": B}


@dataclass(frozen=True)
class Product:
    """A product that is never multiplied out.

    Attributes:
        left: [d_out, n], float64.
        right: [n, d_in], float64.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, factors: Factors) -> Product:
        """ΔW of an adapter's factors, scaling included."""
        A, B = (wide(t) for t in factors.stacked())
        return cls(B * factors.scaling, A)

    def triangles(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Q_left, small, Q_right) with product = Q_left · small · Q_rightᵀ."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        return q_left, r_left @ r_right.T, q_right

    def norm(self) -> float:
        """‖left · right‖."""
        return norm(self.triangles()[1])

    def spectrum(self) -> Spectrum:
        """All singular vectors that are more than nothing."""
        q_left, small, q_right = self.triangles()
        U, S, Vh = torch.linalg.svd(small, full_matrices=False)
        noise = torch.finfo(S.dtype).eps * max(*small.shape, 8)
        return Spectrum(q_left @ U, S, q_right @ Vh.T, noise, whole=True)

    def leading(self, rank: int) -> Spectrum:
        """The leading singular vectors: by Gram matrices where these are exact enough.

        Args:
            rank: How many; all of them if there are fewer.
        """
        n = self.left.shape[1]
        if rank >= n or self.left.dtype != torch.float64:
            return self.spectrum()
        gram, other = self.left.T @ self.left, self.right @ self.right.T
        C, failed = torch.linalg.cholesky_ex(other)
        if int(failed) or not math.isfinite(scale := norm(gram) * norm(other)):
            return self.spectrum()
        turned = gram @ C
        squares, W = torch.linalg.eigh(C.T @ turned)
        squares, W = squares.flip(0), W[:, n - rank :].flip(1)
        if not float(squares[rank - 1]) > _SQUARED * scale:
            return self.spectrum()
        S = squares[:rank].sqrt()
        noise = torch.finfo(S.dtype).eps * n * scale
        return Spectrum(
            self.left @ (C @ W / S),
            S,
            self.right.T @ (turned @ W / squares[:rank]),
            torch.finfo(S.dtype).eps * max(n, 8),
            whole=False,
            squares=float(squares.clamp_min(0).sum()),
            found=int((squares > noise).sum()),
        )

    def distance(self, A: Tensor, B: Tensor, scaling: float) -> float:
        """‖left · right − s B A‖, without cancellation of squares."""
        left = torch.cat((self.left, wide(B).to(self.left) * -scaling), dim=1)
        return Product(left, torch.cat((self.right, wide(A).to(self.right)))).norm()


def decompose(delta: Tensor, rank: int | None = None, *, exact: int | None = None) -> Spectrum:
    """The singular vectors of a dense matrix: all of them, or of a large one the leading ones.

    Args:
        delta: M [d_out, d_in].
        rank: How many are wanted; ``None`` for all, whatever they cost.
        exact: Rows of the smaller side up to which all of them are computed; ``EXACT`` by default.
    """
    delta = wide(delta)
    most = EXACT if exact is None else exact
    if rank is None or min(delta.shape) <= max(most, 4 * (rank + _MORE)):
        return exact_spectrum(delta)
    return leading_spectrum(delta, rank)


def exact_spectrum(delta: Tensor) -> Spectrum:
    """The whole spectrum: of large matrices through eigenvectors of the smaller Gram matrix."""
    if min(delta.shape) <= SMALL:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return Spectrum(U, S, Vh.T, torch.finfo(S.dtype).eps * max(delta.shape), whole=True)
    broad = delta.shape[0] <= delta.shape[1]
    rows = delta if broad else delta.T  # [n, m], n ≤ m
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    vectors = vectors.flip(1)
    # Not the roots of the eigenvalues, whose small ones are noise: the lengths themselves.
    projected = rows.T @ vectors
    S = torch.linalg.vector_norm(projected, dim=0)
    other = projected / S.clamp_min(torch.finfo(S.dtype).tiny)
    U, V = (vectors, other) if broad else (other, vectors)
    return Spectrum(U, S, V, _gram_noise(rows), whole=True)


def leading_spectrum(delta: Tensor, rank: int) -> Spectrum:
    """The leading singular vectors, in a block Krylov space with a fixed seed."""
    columns = min(rank + _MORE, *delta.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], columns, generator=generator, dtype=delta.dtype)
    basis = torch.linalg.qr(delta.T @ (delta @ start.to(delta)))[0]  # K
    image = delta @ basis  # M K
    total = float(delta.square().sum())
    captured, gain = 0.0, 0.0
    for number in range(_PASSES):
        squares, W = torch.linalg.eigh(image.T @ image)
        before, last = captured, gain
        captured = float(squares[-rank:].sum())
        gain = captured - before
        if number:
            ratio = min(0.9, gain / last) if number > 1 and last > 0 else 0.9
            to_come = gain * ratio / (1 - ratio)
            if to_come <= _MISSED * max(0.0, total - captured) or gain <= _NOTHING * total:
                break
        if basis.shape[1] + columns > min(delta.shape):
            break
        basis, image = _grown(delta, basis, image, columns)
    U, S, Vh = torch.linalg.svd(delta @ (basis @ W[:, -columns:]), full_matrices=False)
    # Orthonormal to rounding once more: basis and W are only nearly so.
    V, turn = torch.linalg.qr(basis @ (W[:, -columns:] @ Vh.T))
    V = V * turn.diagonal().sign()
    noise = _gram_noise(delta)
    whole = bool(S[-1] <= noise * S[0])  # the basis was wide enough for all there is
    return Spectrum(U, S, V, noise, whole, squares=total)


def _grown(delta: Tensor, basis: Tensor, image: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """K and M K with one block more."""
    block = delta.T @ image[:, -columns:]
    for _ in range(2):  # once leaves what cancellation has made of it
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return torch.cat((basis, block), dim=1), torch.cat((image, delta @ block), dim=1)


def _gram_noise(delta: Tensor) -> float:
    """Singular values are lost below the root of the precision of their squares."""
    return math.sqrt(torch.finfo(delta.dtype).eps * max(delta.shape))


def wide(value: Tensor) -> Tensor:
    """The tensor in float64, or float32 on a device that has no wider numbers."""
    value = value.detach()
    return value.float() if value.device.type == "mps" else value.double()


def norm(value: Tensor) -> float:
    """Frobenius norm, summed up in float64."""
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
