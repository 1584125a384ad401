"""Extending a shared subspace by adapters: the steps of ``SharedSubspace.absorb``.

The formulas are those of :mod:`lorasmith.fleet.incremental`. From :func:`absorb_joint` and
:func:`absorb_share` layers come back in float32; :func:`absorb` rounds them again as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasmith.fleet import incremental, parallel, share
from lorasmith.fleet.accounting import distances
from lorasmith.fleet.building import Progress, Target
from lorasmith.fleet.building_joint import joint_pairs, pair_costs
from lorasmith.fleet.codec import Rows
from lorasmith.fleet.codes import LOADINGS, PARTS, Code, Layer, absent, coded
from lorasmith.fleet.incremental import orthonormal, square
from lorasmith.fleet.joint import choose, lost
from lorasmith.fleet.members import Member
from lorasmith.fleet.options import Basis
from lorasmith.fleet.quantizing import requantise
from lorasmith.fleet.records import Adapter
from lorasmith.fleet.trimming import trim

__all__ = ["absorb", "absorb_joint", "absorb_share"]

#: Numbers of products of factors with components that are kept at a time.
_PRODUCTS = 2**23


def absorb(
    layers: Sequence[Layer],
    old: Sequence[Adapter],
    new: Sequence[Adapter],
    members: Sequence[Member],
    allowed: float,
    most: int | None,
    *,
    basis: Basis,
    gauge: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[Layer], Tensor, bool]:
    """The layers with further adapters in them, cut to a budget, stored in the codecs they had.

    Args:
        layers: As they are; not changed. There is at least one.
        old: The adapters that are in them.
        new: Records of the further ones; ‖ΔW‖² of each layer is entered.
        members: These adapters.
        allowed: The most that any adapter may lose; 0 cuts nothing.
        most: In its place: the largest number of directions or components.
        basis: Which basis.
        gauge: In which the factors of a Share fleet are; ``"aligned"`` by default.
        progress: Called with (phase, layers done, layers).

    Returns:
        New layers; ‖ΔŴ − ΔŴ'‖² [N, L] that each adapter was moved by; and whether the layers were
        rounded, which is in that of the old adapters, and not yet in that of the new ones.
    """
    codecs = {name: getattr(layers[0], name).codec for name in PARTS}
    if basis == "share":
        made, moved = absorb_share(
            layers, old, new, members, allowed, most, gauge or "aligned", progress=progress
        )
    else:
        made, moved = absorb_joint(layers, old, new, members, allowed, most, progress=progress)
    rounds = any(codec != "float32" for codec in codecs.values())
    if rounds:
        for place, (was, layer) in enumerate(zip(layers, made, strict=True)):
            requantise(layer, codecs)
            moved[: len(old), place] = distances(was, layer, len(old))
            if progress is not None:
                progress("rounding", place + 1, len(layers))
    return made, moved, rounds


def absorb_joint(
    layers: Sequence[Layer],
    old: Sequence[Adapter],
    new: Sequence[Adapter],
    members: Sequence[Member],
    allowed: float,
    most: int | None,
    *,
    progress: Progress | None = None,
) -> tuple[list[Layer], Tensor]:
    """The layers with further adapters in them, cut to a budget.

    Args:
        layers: As they are; not changed.
        old: The adapters that are in them.
        new: Records of the further ones; ‖ΔW‖² of each layer is entered.
        members: These adapters.
        allowed: The most that any adapter may lose; 0 cuts nothing.
        most: In its place: the largest number of directions or components.
        progress: Called with ("bases" or "cores", layers done, layers).

    Returns:
        New layers, and ‖ΔŴ − ΔŴ'‖² [N, L] that each adapter was moved by.
    """
    layers = list(layers)
    everyone = [*old, *new]

    def teller(phase: str) -> Callable[[int], None] | None:
        return None if progress is None else lambda n: progress(phase, n, len(layers))

    def first(place: int) -> _Turned:
        return _extended(layers[place], new, members, place)

    turned = parallel.each(first, range(len(layers)), tell=teller("bases"))
    totals = torch.tensor([float(a.energy.sum()) for a in everyone], dtype=torch.float64)
    weights = torch.where(totals > 0, totals, torch.ones_like(totals)).reciprocal()

    def turn(place: int) -> _Options:
        one = turned[place]
        one.state, _, _ = incremental.rotate(one.state, one.sizes, weights)
        return one.options(layers[place].sizes, allowed, most)

    options = parallel.each(turn, range(len(layers)))
    # What may still be lost: from √ε to √budget of each adapter's norm.
    errors = torch.tensor([a.error for a in everyone], dtype=torch.float64)
    room = (math.sqrt(allowed) - errors.sqrt()).clamp_min(0).square() * totals
    if allowed and most is None:
        chosen = choose([o[0] for o in options], [o[1] for o in options], room)
    else:
        chosen = [len(o[2]) - 1 for o in options]
    moved = torch.zeros(len(everyone), len(layers), dtype=torch.float64)

    def cut(place: int) -> Layer:
        one, option, c = turned[place], options[place], chosen[place]
        a, b = option[2][c]
        whole = (a, b) == (one.state.up.shape[0], one.state.down.shape[0])
        moved[:, place] = 0 if whole else option[0][:, c]
        return one.layer(layers[place], a, b, len(old))

    layers = parallel.each(cut, range(len(layers)), tell=teller("cores"))
    if allowed and most is None and not any(layer.diagonal for layer in layers):
        moved += trim(layers, room - moved.sum(1))
    return layers, moved


def absorb_share(
    layers: Sequence[Layer],
    old: Sequence[Adapter],
    new: Sequence[Adapter],
    members: Sequence[Member],
    allowed: float,
    most: int | None,
    gauge: str = "aligned",
    *,
    progress: Progress | None = None,
) -> tuple[list[Layer], Tensor]:
    """The layers with further adapters in them, cut to a budget.

    Args:
        layers: As they are; not changed.
        old: The adapters that are in them.
        new: Records of the further ones; ‖ΔW‖² of each layer is entered.
        members: These adapters.
        allowed: The most that any adapter may lose; 0 cuts nothing.
        most: In its place: the largest number of directions or components.
        gauge: In which the factors of the fleet are.
        progress: Called with ("factors" or "components", layers done, layers).

    Returns:
        New layers, and ‖ΔŴ − ΔŴ'‖² [N, L] that each adapter was moved by.
    """
    layers = list(layers)
    everyone = [*old, *new]
    highest = max([layers[0].width, *(m.rank(k) for m in members for k in m.modules)])
    if highest > layers[0].width:
        layers = [_widened(layer, highest) for layer in layers]
    moved = torch.zeros(len(everyone), len(layers), dtype=torch.float64)

    def teller(phase: str) -> Callable[[int], None] | None:
        return None if progress is None else lambda n: progress(phase, n, len(layers))

    def first(place: int) -> _Gathered:
        return _gathered(layers[place], new, members, place, gauge)

    gathered = parallel.each(first, range(len(layers)), tell=teller("factors"))
    totals = torch.tensor([float(a.energy.sum()) for a in everyone], dtype=torch.float64)
    scales = torch.where(totals > 0, totals, torch.ones_like(totals)).pow(0.25)
    room = [max(0.0, math.sqrt(allowed) - math.sqrt(a.error)) ** 2 for a in everyone]

    def rebuild(place: int) -> Layer:
        layer, found = layers[place], gathered[place]
        if not found.who:
            return layer
        energy = torch.tensor([float(everyone[n].energy[place]) for n in found.who])
        limit = energy.to(torch.float64) * torch.tensor(
            [room[n] for n in found.who], dtype=torch.float64
        )
        # An adapter that does nothing here has no part in the mean, and no loadings.
        sizes = torch.where(energy > 0, scales[found.who], 0.0)
        made, gone = _share_cut(
            layer, found, sizes, limit if allowed and most is None else None, most, len(everyone)
        )
        moved[found.who, place] = gone
        return made

    return parallel.each(rebuild, range(len(layers)), tell=teller("components")), moved


@dataclass(frozen=True)
class _Gathered:
    """Codes of the old adapters of a layer, flat factors A (down) and B (up) of the new ones."""

    codes: list[Code]
    down: list[Tensor]
    up: list[Tensor]
    who: list[int]


def _gathered(
    layer: Layer, new: Sequence[Adapter], members: Sequence[Member], place: int, gauge: str
) -> _Gathered:
    """Codes of the old adapters and factors of the new ones, placed in the gauge.

    ‖ΔW‖² of the new adapters is entered into their records.
    """
    up, down, r = layer.up.unpack(), layer.down.unpack(), layer.width
    had = len(layer.index)
    rows_A: list[Tensor] = []
    rows_B: list[Tensor] = []
    who = [n for n in range(had) if layer.has(n)]
    present = layer.codes()
    codes = [present[n] for n in who]
    for k, member in enumerate(members):
        if layer.module not in member.modules:
            continue
        factors = member.factors(layer.module)
        new[k].energy[place] = square(factors.A, factors.B.mT)
        A, B = share.placed(factors.A, factors.B.mT.contiguous(), down[:r], up[:r], gauge)
        rows_A.append(A.flatten())
        rows_B.append(B.flatten())
        who.append(had + k)
    return _Gathered(codes, rows_A, rows_B, who)


def _share_cut(
    layer: Layer,
    found: _Gathered,
    sizes: Tensor,
    limit: Tensor | None,
    most: int | None,
    count: int,
) -> tuple[Layer, Tensor]:
    """The layer of all adapters, and ‖ΔŴ − ΔŴ'‖² of those that have it.

    Args:
        layer: As it was.
        found: What it is made of.
        sizes: [n], what rows are divided by for the statistics; 0 leaves one out of them.
        limit: [n], what each adapter may be moved by; ``None`` for no cut but ``most``.
        most: Components at most.
        count: Adapters of the fleet.
    """
    r = layer.width
    sides = []
    for basis, loads, rows in (
        (layer.up.unpack(), [c.left for c in found.codes], found.up),
        (layer.down.unpack(), [c.right for c in found.codes], found.down),
    ):
        flat = basis.reshape(-1, r * basis.shape[1])
        sides.append(_share_side(flat, loads, rows, sizes))
    (mean_B, axes_B, load_B), (mean_A, axes_A, load_A) = sides
    full = max(axes_A.shape[0], axes_B.shape[0])
    cut = _Cut(mean_A, mean_B, axes_A, axes_B, load_A, load_B, r)
    k, gone = full, torch.zeros(len(found.who), dtype=torch.float64)
    if most is not None and most < full:
        k = most
        gone = cut.loss(k)
    elif limit is not None:
        for tried in range(full):
            gone_here = cut.loss(tried)
            if bool((gone_here <= limit).all()):
                k, gone = tried, gone_here
                break
    made = _share_rebuilt(
        layer,
        mean_A,
        mean_B,
        axes_A[:k],
        axes_B[:k],
        load_A[:, : k + 1],
        load_B[:, : k + 1],
        found.who,
        count,
    )
    return made, gone


def _widened(layer: Layer, r: int) -> Layer:
    """Rows of zeros, so that the Share basis holds adapters of a higher rank."""

    def wide(rows: Rows) -> Rows:
        values = rows.unpack().view(-1, layer.width, rows.columns)
        padded = torch.nn.functional.pad(values, (0, 0, 0, r - layer.width))
        return Rows.pack(padded.flatten(0, 1))

    return replace(layer, width=r, up=wide(layer.up), down=wide(layer.down))


def _extended(
    layer: Layer, new: Sequence[Adapter], members: Sequence[Member], place: int
) -> _Turned:
    """A layer whose basis spans the new adapters, too; ‖ΔW‖² is entered into their records."""
    lefts, rights = [], []
    up, down = orthonormal(layer.up.unpack()), orthonormal(layer.down.unpack())
    for code in layer.codes():
        left, right = layer.wide(code)
        if left.shape[0] > right.shape[1]:
            left, right = right.mT @ left, torch.eye(right.shape[1])
        lefts.append(left)
        rights.append(right)
    sizes = [len(x) for x in lefts]
    left, right = (
        torch.cat([torch.zeros(0, len(T)), *rows]).to(torch.float64) @ T
        for rows, (_, T) in ((lefts, up), (rights, down))
    )
    rows_A, rows_B = [], []
    for member, adapter in zip(members, new, strict=True):
        if layer.module not in member.modules:
            sizes.append(0)
            continue
        factors = member.factors(layer.module)
        rows_A.append(factors.A)
        rows_B.append(factors.B.mT)
        sizes.append(factors.rank)
        adapter.energy[place] = square(factors.A, factors.B.mT)
    state = incremental.Turned(up[0], down[0], left, right)
    if rows_A:
        state = incremental.extend(state, torch.cat(rows_A), torch.cat(rows_B))
    return _Turned(state, sizes)


#: (losses [N, options], bytes [options], (R_u, R_d) of each).
_Options = tuple[Tensor, Tensor, list[tuple[int, int]]]


@dataclass
class _Turned:
    """A layer whose basis is being extended."""

    state: incremental.Turned
    sizes: list[int]

    def options(self, sizes: tuple[int, int], allowed: float, most: int | None) -> _Options:
        """What each cut of the basis loses, and what it costs."""
        Ru, Rd = self.state.up.shape[0], self.state.down.shape[0]
        if not Ru or not Rd:
            none = torch.zeros(len(self.sizes), 1, dtype=torch.float64)
            return none, none[0], [(Ru, Rd)]
        if allowed or most:
            pairs = joint_pairs(Ru, Rd, Target(error=allowed, components=most))
        else:
            pairs = [(Ru, Rd)]
        left, right = self.padded()
        energy = ((left @ left.mT) * (right @ right.mT)).sum((-2, -1))
        ups, downs = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
        table = lost(left[None], right[None], energy[None], ups, downs)[0]
        flat = table[:, [ups.index(a) for a, _ in pairs], [downs.index(b) for _, b in pairs]]
        own = torch.tensor(self.sizes, dtype=torch.float64)
        return flat, pair_costs(pairs, own, sizes), pairs

    def padded(self) -> tuple[Tensor, Tensor]:
        """Cores [N, r, R] filled up with rows of zeros."""
        left, right = (
            incremental.padded(x, self.sizes) for x in (self.state.left, self.state.right)
        )
        return left, right

    def layer(self, old: Layer, a: int, b: int, count: int) -> Layer:
        """The layer anew, its basis cut to (a, b)."""
        up, down = self.state.up[:a].float(), self.state.down[:b].float()
        made = Layer.new(old.module, up, down, len(self.sizes))
        left, right = (rows[..., :k] for rows, k in zip(self.padded(), (a, b), strict=True))
        right, left = share.balance(right, left)
        before = old.codes()
        codes = []
        for n, size in enumerate(self.sizes):
            if not size and not (n < count and old.has(n)):
                codes.append(absent(made.sizes, (a, b)))
                continue
            rank = min(size, a, b)
            code = coded(left[n, :rank].float(), right[n, :rank].float(), made.sizes)
            if n < count:
                was = before[n]
                code = replace(code, residual_up=was.residual_up, residual_down=was.residual_down)
            codes.append(code)
        made.refill(codes)
        return made


def _share_side(
    basis: Tensor, loadings: Sequence[Tensor], rows: Sequence[Tensor], sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], components [K, D] and loadings [n, K + 1] of old and new rows together."""
    wide = torch.float64
    flat = basis.to(wide)
    axes, turned = incremental.append(flat[:0], flat)  # an orthonormal basis of all components
    old = torch.cat([flat.new_zeros(0, flat.shape[0]), *(x.to(wide) for x in loadings)]) @ turned
    if rows:
        axes, new = incremental.append(axes, torch.stack(list(rows)))
        points = torch.cat((incremental.widen(old, axes.shape[0]), new))
    else:
        points = old
    known = torch.cat((points.new_zeros(len(points), 1), points), 1)
    mean, components, found, _ = incremental.share_rotate(
        axes.new_zeros(axes.shape[1]), axes, known, sizes
    )
    return mean, components, found


class _Cut:
    """What adapters lose where only the first components are kept, ‖ΔW − ΔW'‖².

    By way of the products of components with each other, in float64, as long as these are few;
    else by way of the factors.
    """

    def __init__(
        self,
        mean_A: Tensor,
        mean_B: Tensor,
        axes_A: Tensor,
        axes_B: Tensor,
        load_A: Tensor,
        load_B: Tensor,
        r: int,
    ) -> None:
        n = len(load_A)
        self._sides = []
        for mean, axes, load in ((mean_A, axes_A, load_A), (mean_B, axes_B, load_B)):
            rows = torch.cat((mean[None], axes)).to(torch.float64)
            self._sides.append((rows.view(len(rows), r, -1), load.to(torch.float64)))
        most = max(len(rows) for rows, _ in self._sides)
        self._grams: list[Tensor] = []
        if n * most * r * r <= _PRODUCTS:
            for rows, _ in self._sides:
                flat = rows.flatten(0, 1)
                product = (flat @ flat.mT).view(len(rows), r, len(rows), r)
                self._grams.append(product.permute(0, 2, 1, 3))

    def loss(self, k: int) -> Tensor:
        """[n], float64, with k components beside the mean."""
        if self._grams:
            whole, cross, kept = (
                torch.stack([self._product(i, *cuts) for i in (0, 1)]).prod(0).sum((-2, -1))
                for cuts in ((None, None), (None, k + 1), (k + 1, k + 1))
            )
            return (whole - 2 * cross + kept).clamp_min(0)
        rows = [
            torch.einsum("nf,frd->nrd", load[:, :cut], rows[:cut])
            for cut in (None, k + 1)
            for rows, load in self._sides
        ]
        return share.distance(*rows)

    def _product(self, side: int, one: int | None, other: int | None) -> Tensor:
        """Factors with so many components times factors with so many others [n, r, r]."""
        load, G = self._sides[side][1], self._grams[side]
        half = torch.einsum("nf,fgab->ngab", load[:, :one], G[:one, :other])
        return torch.einsum("ng,ngab->nab", load[:, :other], half)


def _share_rebuilt(
    old: Layer,
    mean_A: Tensor,
    mean_B: Tensor,
    axes_A: Tensor,
    axes_B: Tensor,
    load_A: Tensor,
    load_B: Tensor,
    who: Sequence[int],
    count: int,
) -> Layer:
    r = old.width
    d_out, d_in = old.sizes
    down = torch.cat((mean_A[None], axes_A)).float().view(-1, d_in)
    up = torch.cat((mean_B[None], axes_B)).float().view(-1, d_out)
    made = Layer.new(old.module, up, down, count, r)
    codes = [absent(made.sizes, (len(axes_B) + 1, len(axes_A) + 1)) for _ in range(count)]
    had = len(old.index)
    for i, n in enumerate(who):
        none = torch.zeros(0, d_out), torch.zeros(0, d_in)
        if n < had:
            was = old.code(n)
            none = was.residual_up, was.residual_down
        codes[n] = Code(LOADINGS, load_B[i : i + 1].float(), load_A[i : i + 1].float(), *none)
    made.refill(codes)
    return made
