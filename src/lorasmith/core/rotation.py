"""The angle by which a low-rank update turns a weight, without forming the update.

For a part u of W [d_out, d_in] (the whole of it, the rows of a head, or the columns of one)
and ΔW = s (B A − B0 A0), flattened, θ_u is the angle between W_u and W_u + ΔW_u:

    n = ‖W_u‖      par = ⟨W_u, ΔW_u⟩ / n      perp² = ‖ΔW_u‖² − par²
    θ = atan2(perp, n + par)                   ‖W_u + ΔW_u‖² = (n + par)² + perp²

All three come from r-wide products, row by row:

    ⟨W_i, ΔW_i⟩ = s (W Aᵀ)_i · B_i             ‖ΔW_i‖² = s² B_i (A Aᵀ) B_iᵀ

Columns are rows of the transpose: Wᵀ, with Bᵀ for A and Aᵀ for B.

Accuracy. Sums run in float64, over blocks: a float64 copy of W is never made, and what is
used beyond W is a few megabytes. (``norm()`` over 4096² float32 entries errs by 6.5e-4, which
hides anything below 3°.) With W Aᵀ in float64 the relative error of θ is below 1e-6 from
5e-4° to 83°, and an update that only scales W reads below 1e-5°. With W Aᵀ in float32 it is
as good while ΔW is not nearly parallel to W; otherwise θ errs by up to 1e-3 ‖ΔW‖ / ‖W‖.

:func:`rotation` therefore begins in float32, at half the cost, and goes over W again in
float64 if that could be wrong. With ε = 2^-22, four roundings, the error of ⟨W, ΔW⟩ / ‖W‖ is
taken to be at most e = ε s ‖P‖ ‖L‖ for ΔW = s P L (rounding errors do not all point the same
way), and that of θ with it

    |dθ| / θ ≤ e |par| / perp² + e / |n + par| .

Scaling ΔW by c ≥ 0 gives tan θ(c) = c perp / (n + c par), which grows with c. So

    θ(c) ≤ M < 90°   ⇔   c (perp − tan M · par) ≤ n tan M .

With a frozen part, c (B A) is not the way back; (A0, B0) is. On the straight line to it,

    A_t = A0 + t a,  B_t = B0 + t b   (a = A − A0, b = B − B0)
    ΔW_t = s (t (b A0 + B0 a) + t² b a)

of which inner products are polynomials in t with r-wide coefficients. Written by the
differences a and b, small updates of large factors do not cancel.

DoRA's weight is W' = diag(m / c) (W + ΔW) with c_i = ‖W_i + ΔW_i‖. With g = m / c the change
is E_i = (g_i − 1) W_i + g_i ΔW_i, and

    ⟨W_i, E_i⟩ = (g_i − 1) ‖W_i‖² + g_i ⟨W_i, ΔW_i⟩
    ‖E_i‖² = (g_i − 1)² ‖W_i‖² + 2 (g_i − 1) g_i ⟨W_i, ΔW_i⟩ + g_i² ‖ΔW_i‖² .

Its way back moves m_i to ‖W_i‖ as well.

A part of W that is zero has no direction; its angle is given as 0.

Source: the angle is that of EgoRA's diagnostics (θ between flattened weights); the closed
forms are derived here and tested against dense float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

__all__ = [
    "Path",
    "Rotation",
    "angle",
    "change_bound",
    "inner_factor",
    "inner_terms",
    "largest_fraction",
    "largest_scale",
    "make_path",
    "noise_floor",
    "norms_and_product",
    "product",
    "product_dtype",
    "rotation",
    "squared_norms",
    "wide_product",
]

#: Elements of W that are widened at a time: on a device, and on CPU (what its cache holds).
_BLOCK = (2**24, 2**17)


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, _block_rows(weight, 1))


def _block_rows(weight: Tensor, row: int) -> int:
    """How many rows of ``weight.shape[row]`` elements a block has."""
    return max(1, _BLOCK[weight.device.type == "cpu"] // max(1, weight.shape[row]))


def squared_norms(weight: Tensor, parts: int = 1) -> Tensor:
    """‖W_iu‖² of each row i, in ``parts`` equal pieces u of its columns.

    Args:
        weight: W [d_out, d_in], any floating dtype.
        parts: Number of pieces; must divide d_in.

    Returns:
        float64 [parts, d_out].
    """
    columns = weight.shape[1] // parts
    found = [
        block.to(torch.float64).square_().view(-1, parts, columns).sum(dim=2)
        if block.is_contiguous() and block.dtype != torch.float64
        else block.to(torch.float64).square().reshape(-1, parts, columns).sum(dim=2)
        for block in _blocks(weight)
    ]
    return torch.cat(found).T.contiguous()


def product_dtype(weight: Tensor) -> torch.dtype:
    """In what to compute W Aᵀ where speed counts: float32, unless that would not be float32.

    The user may allow TF32 or bfloat16 for products of float32; then, and for a float64
    base, float64.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if exact and weight.dtype != torch.float64 else torch.float64


def product(weight: Tensor, factor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """W Fᵀ, computed in ``dtype`` block by block; differentiable in F.

    Args:
        weight: W [d_out, d_in], any floating dtype; a constant.
        factor: F [k, d_in].
        dtype: float32 or float64.

    Returns:
        [d_out, k] in ``dtype``.
    """
    return cast("Tensor", _Product.apply(weight, factor, dtype))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """W Fᵀ that keeps no widened copy of W for the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.like = weight, factor.dtype
        return _product(weight, factor, dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        total = None
        rows = [block.shape[0] for block in _blocks(ctx.weight)]
        for block, part in zip(_blocks(ctx.weight), torch.split(g, rows), strict=True):
            share = part.T @ block.to(g.dtype)
            total = share if total is None else total.add_(share)
        assert total is not None
        return None, total.to(ctx.like), None


def _product(weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return torch.mm(factor.to(dtype), weight.T).T  # this way round is no slower for any W
    narrow = factor.to(dtype).T
    return torch.cat([torch.mm(block.to(dtype), narrow) for block in _blocks(weight)])


def norms_and_product(
    weight: Tensor, factor: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """:func:`squared_norms` and :func:`product` in one pass over W.

    Args:
        weight: W [d_out, d_in], any floating dtype, or the transpose of a stored one.
        factor: F [k, d_in].
        dtype: Of the product, float32 or float64. With float32 the norms run in float32 over
            up to 512 elements, and in float64 over these.

    Returns:
        ‖W_i‖², float64 [d_out]; W Fᵀ [d_out, k] in ``dtype``.
    """
    across = weight.stride(0) == 1 < weight.stride(1)  # what lies together is a column
    stored = weight.T if across else weight
    count, length = stored.shape
    # Without a copy the cache need not hold a block; a call costs what 10,000 elements do.
    rows = _block_rows(stored, 1) * (1 if weight.dtype != dtype else 4)
    narrow = factor.to(dtype).T.contiguous()
    buffer = None
    if weight.dtype != dtype:
        buffer = narrow.new_empty(min(rows, count), length)
    squared = narrow.new_zeros(weight.shape[0], dtype=torch.float64)
    # Where products are added up over blocks, in float64, so that this rounds nothing.
    kind = torch.float64 if across else dtype
    wide = narrow.new_zeros(weight.shape[0], narrow.shape[1], dtype=kind)
    for first in range(0, count, rows):
        block = stored[first : first + rows]
        if buffer is not None:
            block = buffer[: len(block)].copy_(block)
        here = slice(first, first + rows)
        if across:
            wide += torch.mm(block.T, narrow[here])
            squared += torch.linalg.vector_norm(block, dim=0, dtype=torch.float64).square_()
        else:
            torch.mm(block, narrow, out=wide[here])
            _row_norms(block, squared[here])
    return squared, wide


#: Elements over which a norm may run in float32: as many additions as are in one lane of the
#: vector unit then err by 1e-7, at random.
_RUN = 512


def _row_norms(block: Tensor, out: Tensor) -> None:
    """‖W_i‖² of each row into ``out`` (float64)."""
    rows, length = block.shape
    run = math.gcd(length, _RUN)
    if block.dtype != torch.float32 or run < _RUN // 8 or not block.is_contiguous():
        torch.linalg.vector_norm(block, dim=1, dtype=torch.float64, out=out)
        out.square_()
        return
    runs = torch.linalg.vector_norm(block.view(-1, run), dim=1).double().square_()
    torch.sum(runs.view(rows, -1), dim=1, out=out)


def angle(squared: Tensor, inner: Tensor, delta: Tensor, slack: float = 0.0) -> Tensor:
    """θ in radians between W_u and W_u + ΔW_u.

    Args:
        squared: ‖W_u‖², any shape, float64.
        inner: ⟨W_u, ΔW_u⟩, of the same shape.
        delta: ‖ΔW_u‖².
        slack: Adds ``slack · ‖ΔW‖²`` to perp², which bounds what an error of ``inner`` by
            slack / 2 · ‖W‖ ‖ΔW‖ can hide.

    Returns:
        Of the same shape, 0 to π; 0 where W_u is zero.
    """
    norm, par, perp = _decompose(squared, inner, delta, slack)
    return torch.where(squared > 0, torch.atan2(perp, norm + par), torch.zeros_like(norm))


def _decompose(
    squared: Tensor, inner: Tensor, delta: Tensor, slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """‖W_u‖, and the parts of ΔW_u along it and across it."""
    norm = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
    par = inner / norm
    across = delta * (1.0 + slack) - par.square()
    # Where nothing is left of it, its root must have a gradient of 0 and not of NaN.
    perp = torch.where(across > 0, across, torch.ones_like(across)).sqrt()
    return norm, par, torch.where(across > 0, perp, torch.zeros_like(perp))


def largest_scale(
    squared: Tensor, inner: Tensor, delta: Tensor, limit: float, slack: float = 0.0
) -> Tensor:
    """The largest c in [0, 1] for which c ΔW_u turns W_u by no more than ``limit``.

    Args:
        squared: ‖W_u‖².
        inner: ⟨W_u, ΔW_u⟩.
        delta: ‖ΔW_u‖².
        limit: M in radians, 0 to below π / 2.
        slack: See :func:`angle`.

    Returns:
        Of the same shape; 1 where W_u is zero.
    """
    norm, par, perp = _decompose(squared, inner, delta, slack)
    slope = perp - math.tan(limit) * par
    scale = norm * math.tan(limit) / slope.clamp(min=torch.finfo(slope.dtype).tiny)
    free = (slope <= 0) | (squared <= 0)
    return torch.where(free, torch.ones_like(scale), scale.clamp(max=1.0))


@dataclass(frozen=True)
class Path:
    """The way from the weight as it was (t = 0) to what the adapter makes of it (t = 1).

    The shapes are [n, units, rows], n updates of equal shape at once. Without a magnitude
    nothing asks for single rows, and rows is 1.

    Attributes:
        squared: ‖W_iu‖².
        inner: Coefficients of t and t² of ⟨W_iu, ΔW_iu⟩; the second is ``None`` without a
            frozen part.
        delta: Coefficients of t², t³ and t⁴ of ‖ΔW_iu‖²; likewise.
        magnitude: DoRA's m, [n, units, rows], or [n, 1, rows] where units are columns; or
            ``None``.
    """

    squared: Tensor
    inner: tuple[Tensor, Tensor | None]
    delta: tuple[Tensor, Tensor | None, Tensor | None]
    magnitude: Tensor | None = None

    @property
    def straight(self) -> bool:
        """Whether ΔW_t = t ΔW and nothing else happens, so that closed forms hold."""
        return self.inner[1] is None and self.magnitude is None

    @property
    def shared(self) -> bool:
        """Whether all units must go the same way: they share what moves."""
        columns = self.magnitude is not None and self.magnitude.shape[1] != self.squared.shape[1]
        return self.inner[1] is not None or columns

    def select(self, index: Tensor) -> Path:
        """The path of some of the n updates."""
        x1, x2 = self.inner
        q1, q2, q3 = self.delta

        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]

        return Path(
            self.squared[index],
            (x1[index], of(x2)),
            (q1[index], of(q2), of(q3)),
            of(self.magnitude),
        )

    def with_inner(self, inner: tuple[Tensor, Tensor | None]) -> Path:
        """The same path, with the inner products it was made without."""
        return Path(self.squared, inner, self.delta, self.magnitude)

    def _update(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """⟨W, ΔW_t⟩ and ‖ΔW_t‖² of every row."""
        t = t[..., None] if isinstance(t, Tensor) else t
        (x1, x2), (q1, q2, q3) = self.inner, self.delta
        x, q = t * x1, t * t * q1
        if x2 is not None and q2 is not None and q3 is not None:
            x = x + t * t * x2
            q = q + t**3 * q2 + t**4 * q3
        return x, q.clamp(min=0)

    def at(self, t: Tensor | float = 1.0, slack: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """‖W_u‖², ⟨W_u, E_u⟩ and ‖E_u‖² of the change E there: [n, units] each.

        Args:
            t: Where: one number, or [n, units], or [n, 1].
            slack: See :func:`angle`; relative to the update, also where DoRA has undone
                most of it.
        """
        x, q = self._update(t)
        n2 = self.squared.sum(dim=-1)
        if self.magnitude is None:
            return n2, x.sum(dim=-1), q.sum(dim=-1) * (1.0 + slack)
        rows, length = self.squared, (self.squared + 2 * x + q)
        if self.magnitude.shape[1] != rows.shape[1]:  # units are columns: c is of whole rows
            rows, length = rows.sum(dim=1, keepdim=True), length.sum(dim=1, keepdim=True)
        norms = rows.sqrt()
        steps = t[..., None] if isinstance(t, Tensor) else t
        m = norms + steps * (self.magnitude - norms)
        c = length.clamp(min=1e-200).sqrt()  # what is masked below must have a finite gradient
        g = torch.where(length > 0, m / c, torch.zeros_like(c))
        e = g - 1
        inner = (e * self.squared + g * x).sum(dim=-1)
        delta = (e.square() * self.squared + 2 * e * g * x + g.square() * q).sum(dim=-1)
        return n2, inner, delta.clamp(min=0) + slack * (g.square() * q).sum(dim=-1)

    def theta(self, t: Tensor | float = 1.0, slack: float = 0.0) -> Tensor:
        """θ in radians at t: [n, units]."""
        return angle(*self.at(t, slack))


def change_bound(path: Path) -> Tensor:
    """An upper bound of ‖E_u‖² that does not use ⟨W, ΔW⟩, and so not W: [n, units].

    sin θ ≤ ‖E_u‖ / ‖W_u‖. Infinite where it cannot be told (DoRA, units of columns, with
    ‖ΔW_i‖ ≥ ‖W_i‖).
    """
    q1, q2, q3 = path.delta
    q = q1 if q2 is None or q3 is None else q1 + q2 + q3
    q = q.clamp(min=0)
    if path.magnitude is None:
        return q.sum(dim=-1)
    m, own = path.magnitude, path.squared.sqrt()
    if m.shape[1] == path.squared.shape[1]:
        # E_i = (m − n) v + n (v − w) for the directions v of W_i + ΔW_i and w of W_i, and the
        # sine of the angle between these is at most d / n.
        ratio = (q.sqrt() / own).clamp(max=1.0)
        chord = ((1 - (1 - ratio.square()).sqrt()) * 2).sqrt()  # 2 sin(½ asin(d / n))
        chord = torch.where(q < path.squared, chord, torch.full_like(chord, 2.0))
        return ((m - own).abs() + own * chord).square().sum(dim=-1)
    # Of a part of a row nothing is known but that c lies between n − d and n + d.
    n, d = (x.sum(dim=1, keepdim=True).sqrt() for x in (path.squared, q))
    nearest = (n - d).clamp(min=0)
    g = m.abs() / nearest
    e = torch.maximum((m / nearest - 1).abs(), (m / (n + d) - 1).abs())
    change = (e * own + g * q.sqrt()).square()
    return torch.where(nearest > 0, change, torch.full_like(change, torch.inf)).sum(dim=-1)


def make_path(
    squared: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wide: Tensor | None,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    units: int = 1,
    magnitude: Tensor | None = None,
    columns: bool = False,
) -> Path:
    """The :class:`Path` of n updates of equal shape, units being blocks of rows of W.

    Units that are columns: give Wᵀ, Bᵀ for A and Aᵀ for B instead (and A0, B0 likewise);
    with a magnitude, which belongs to rows, ``columns``.

    Args:
        squared: float64 [n, d_out] (``columns``: [n, units, d_out]), of
            :func:`squared_norms`.
        A: [n, r, d_in].
        B: [n, d_out, r].
        scaling: s.
        wide: See :func:`inner_terms`. ``None``: the inner products of the path are 0 until
            :meth:`Path.with_inner`, and only :func:`change_bound` makes sense.
        A0: The frozen part, of the shape of A.
        B0: Likewise.
        units: Number of units of equal size.
        magnitude: DoRA's m [n, d_out].
        columns: Whether units are blocks of columns.
    """
    low = inner_factor(A, A0).to(torch.float64)
    first, second = _outer_factors(B, B0)
    if columns:
        low = low.view(len(low), low.shape[1], units, -1).transpose(1, 2)  # [n, units, k, size]
        first, second = first[:, None], None if second is None else second[:, None]
    gram = low @ low.mT
    rows = _Rows(units, whole=magnitude is None, columns=columns)
    s2 = scaling * scaling
    spread = first @ gram
    q1, q2, q3 = s2 * rows.dot(spread, first), None, None
    if second is not None:
        q2 = 2 * s2 * rows.dot(spread, second)
        q3 = s2 * rows.dot(second @ gram, second)
    if wide is None:
        inner: tuple[Tensor, Tensor | None] = (torch.zeros_like(q1), None)
        if second is not None:
            inner = (inner[0], inner[0])
    else:
        inner = inner_terms(
            B, scaling, wide, B0=B0, units=units, by_row=magnitude is not None, columns=columns
        )
    m = None
    if magnitude is not None:
        m = magnitude.to(torch.float64)
        m = m[:, None] if columns else m.view(len(m), units, -1)
    return Path(rows.sum(squared), inner, (q1, q2, q3), m)


def inner_terms(
    B: Tensor,
    scaling: float,
    wide: Tensor,
    *,
    B0: Tensor | None = None,
    units: int = 1,
    by_row: bool = False,
    columns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Coefficients of t and t² of ⟨W_iu, ΔW_iu⟩: ``Path.inner``.

    Args:
        B: [n, d_out, r].
        scaling: s.
        wide: W Lᵀ [n, d_out, k] (``columns``: [n, units, d_out, k], a unit's columns of W
            and L at a time) with L of :func:`inner_factor`.
        B0: The frozen part.
        units: Number of units of equal size.
        by_row: Whether single rows are asked for, as with DoRA.
        columns: Whether units are blocks of columns.
    """
    first, second = _outer_factors(B, B0)
    rows = _Rows(units, whole=not by_row, columns=columns)
    wide = wide.to(torch.float64)
    if columns:
        first, second = first[:, None], None if second is None else second[:, None]
    x2 = None if second is None else scaling * rows.dot(second, wide)
    return scaling * rows.dot(first, wide), x2


def _outer_factors(B: Tensor, B0: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """P and Q of ΔW_t = s (t P + t² Q) L with L of :func:`inner_factor`."""
    b = B.to(torch.float64)
    if B0 is None:
        return b, None
    b0 = B0.to(torch.float64)
    b = b - b0
    return torch.cat((b, b0), dim=2), torch.cat((torch.zeros_like(b), b), dim=2)


@dataclass(frozen=True)
class _Rows:
    """Puts what belongs to rows into [n, units, rows of a unit], or their sum."""

    units: int
    whole: bool
    columns: bool

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        return self.sum((x * y).sum(dim=-1))

    def sum(self, x: Tensor) -> Tensor:
        if self.columns:
            return x
        x = x.reshape(len(x), self.units, -1)
        return x.sum(dim=-1, keepdim=True) if self.whole else x


def inner_factor(A: Tensor, A0: Tensor | None = None) -> Tensor:
    """L, the rows that W is multiplied with: A, or [A0; A − A0]; [..., k, d_in]."""
    return A if A0 is None else torch.cat((A0.to(A.dtype), A - A0.to(A.dtype)), dim=-2)


def largest_fraction(
    excess: Callable[[Tensor], Tensor], like: Tensor, *, tolerance: float, monotone: bool
) -> Tensor:
    """The largest t found in [0, 1] with ``excess(t) ≤ 0``, where that holds at t = 0.

    The Illinois form of the secant method between a t that is allowed and one that is not;
    where ``excess`` may cross 0 several times, between the two uppermost neighbours on a
    grid, dense near 1, of which the lower is allowed. No value is read back from a device.

    Args:
        excess: t of the shape of ``like`` → numbers of that shape, continuous in t.
        like: Gives shape, dtype and device.
        tolerance: What is aimed at is ``excess(t) = −tolerance``.
        monotone: Whether ``excess`` grows with t.

    Returns:
        t, allowed, of the shape of ``like``.
    """
    low, high = torch.zeros_like(like), torch.ones_like(like)
    # What is sought is the root of excess + tolerance; up to tolerance above it is allowed.
    at_low, at_high = excess(low) + tolerance, excess(high) + tolerance
    free = at_high <= tolerance
    if not monotone:
        done = free
        for point in _GRID:
            t = torch.full_like(like, point)
            value = excess(t) + tolerance
            good = (value <= 0) & ~done
            low, at_low = torch.where(good, t, low), torch.where(good, value, at_low)
            done = done | good
            high, at_high = torch.where(done, high, t), torch.where(done, at_high, value)
    best = low
    for _ in range(_STEPS):
        t = low - (high - low) * at_low / (at_high - at_low)
        t = torch.where((t > low) & (t < high), t, (low + high) / 2)
        value = excess(t) + tolerance
        best = torch.where(value <= tolerance, torch.maximum(best, t), best)
        below = value <= 0
        # The end that stays where it is pulls less the next time.
        at_low, at_high = (
            torch.where(below, value, at_low / 2),
            torch.where(below, at_high / 2, value),
        )
        low, high = torch.where(below, t, low), torch.where(below, high, t)
        # On CPU it costs nothing to ask.
        if like.device.type == "cpu" and bool((free | (value.abs() <= tolerance)).all()):
            break
    return torch.where(free, torch.ones_like(best), best)


_GRID = (*(1 - 2.0**-k for k in range(20, 4, -1)), *(k / 32 for k in range(30, 0, -1)))
_STEPS = 16


@dataclass(frozen=True)
class Rotation:
    """How far an adapter turns the units of one layer.

    Attributes:
        theta: θ in radians, float64 [units]; 0 for a unit of W that is zero.
        norm_ratio: ‖W'_u‖ / ‖W_u‖, float64 [units]; infinite for a unit that is zero.
        squared: ‖W_u‖².
        inner: ⟨W_u, W'_u − W_u⟩.
        delta: ‖W'_u − W_u‖².
    """

    theta: Tensor
    norm_ratio: Tensor
    squared: Tensor
    inner: Tensor
    delta: Tensor

    @property
    def degrees(self) -> Tensor:
        """θ in degrees."""
        return torch.rad2deg(self.theta)


def rotation(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    units: int = 1,
    axis: str = "out",
    magnitude: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Rotation:
    """The rotation of one layer by W' = W + s (B A − B0 A0), or DoRA's of that.

    Args:
        weight: W [d_out, d_in], any floating dtype.
        A: [r, d_in].
        B: [d_out, r].
        scaling: s.
        A0: A frozen part, of the shape of A.
        B0: Likewise.
        units: In how many blocks of equal size to look at it.
        axis: ``"out"``: blocks of rows; ``"in"``: of columns.
        magnitude: DoRA's m [d_out].
        dtype: In which W Aᵀ is computed. ``None``: float32 where that is enough for a relative
            error of 1e-6, float64 where it may not be (and with a magnitude); see the
            module's words on accuracy.
    """
    columns = axis == "in" and magnitude is not None
    if axis == "in" and not columns:
        weight, A, B = weight.T, B.T, A.T
        if A0 is not None and B0 is not None:
            A0, B0 = B0.T, A0.T
    low = inner_factor(A, A0)
    first = dtype or (torch.float64 if magnitude is not None else product_dtype(weight))

    def measured(dtype: torch.dtype) -> Rotation:
        if A0 is None and magnitude is None:  # the usual case, in the fewest operations
            squared, wide = norms_and_product(weight, low, dtype)
            return _plain(squared, low, B, scaling, wide, units)
        if columns:
            squared = squared_norms(weight, units)
            wide = wide_product(weight, low, units, dtype)
        else:
            squared, wide = norms_and_product(weight, low, dtype)
        path = make_path(
            squared[None],
            A[None],
            B[None],
            scaling,
            wide[None],
            A0=None if A0 is None else A0[None],
            B0=None if B0 is None else B0[None],
            units=units,
            magnitude=None if magnitude is None else magnitude[None],
            columns=columns,
        )
        return _rotation_of(*(x[0] for x in path.at()))

    found = measured(first)
    if dtype is None and first == torch.float32:
        outer = B if B0 is None else torch.cat((B, B - B0), dim=1)
        if not _float32_suffices(found, low, outer.reshape(units, -1), scaling):
            found = measured(torch.float64)
    return found


def _plain(
    squared: Tensor, A: Tensor, B: Tensor, scaling: float, wide: Tensor, units: int
) -> Rotation:
    """What :func:`make_path` and :meth:`Path.at` give for ΔW = s B A alone."""
    low, outer = A.to(torch.float64), B.to(torch.float64)
    inner = (outer * wide).reshape(units, -1).sum(dim=1).mul_(scaling)
    delta = (outer @ (low @ low.T)).mul_(outer).reshape(units, -1).sum(dim=1).mul_(scaling**2)
    return _rotation_of(squared.view(units, -1).sum(dim=1), inner, delta)


def _rotation_of(squared: Tensor, inner: Tensor, delta: Tensor) -> Rotation:
    ratio = ((squared + 2 * inner + delta).clamp(min=0) / squared).sqrt()
    return Rotation(angle(squared, inner, delta), ratio, squared, inner, delta)


#: Relative error of θ up to which a product in float32 will do, and what it may be off by.
_ENOUGH = 5e-7
_ROUNDING = 2.0**-22


def _float32_suffices(found: Rotation, low: Tensor, outer: Tensor, scaling: float) -> bool:
    """Whether θ of every unit is good to ``_ENOUGH``, see the module's words on accuracy.

    Args:
        found: What float32 gave.
        low: L [k, d_in].
        outer: P of each unit, flattened: [units, ·].
        scaling: s.
    """
    n, par, perp = _decompose(found.squared, found.inner, found.delta, 0.0)
    sizes = torch.linalg.vector_norm(outer, dim=1) * torch.linalg.vector_norm(low)
    error = (_ROUNDING * abs(scaling)) * sizes.to(n)
    worst = error * (par.abs() / perp.square() + 1 / (n + par).abs())
    # Where neither W nor ΔW is there, no error can be made; not a number is not enough.
    return bool(((worst <= _ENOUGH) | (found.delta == 0) | (found.squared == 0)).all())


def wide_product(weight: Tensor, factor: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """W Fᵀ [d_out, k]; with ``parts`` above 1, W_u F_uᵀ [parts, d_out, k] of blocks of columns."""
    if parts == 1:
        return product(weight, factor, dtype)
    size = weight.shape[1] // parts
    blocks = zip(torch.split(weight, size, dim=1), torch.split(factor, size, dim=1), strict=True)
    return torch.stack([product(w, f, dtype) for w, f in blocks])


def noise_floor(dtype: torch.dtype) -> float:
    """The angle in radians by which rounding a generic weight to ``dtype`` turns it by itself.

    A number in [2^e, 2^(e+1)) is rounded with an error of variance (2^(e−p))² / 12, p being
    the bits of the mantissa. For magnitudes spread evenly over the logarithm within a binade,
    the sum of these is ln 2 / 1.5 · 2^(−2p) / 12 of the sum of squares, so

        θ_floor = 2^−p √(ln 2 / 18):    bfloat16 0.088°, float16 0.011°, float32 1.3e-6° .

    A Gaussian weight has it within 10 % (tested). No rotation below it can be seen in a fused
    checkpoint of that dtype, nor held to. Numbers below 6e-5 in float16 are rounded worse.
    """
    return float(torch.finfo(dtype).eps) * math.sqrt(math.log(2) / 18)
