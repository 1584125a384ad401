"""Building the layers of a shared subspace from a fleet, a few layers at a time.

Layers of one shape are stacked and go through each step together. In memory at a time are the
factors of one stack, or all of them while they fit into a limit. The number of directions a
layer is chosen last, by one of

* ``error``: the most that any adapter may lose, Σ_l ‖ΔW_l − ΔŴ_l‖² / Σ_l ‖ΔW_l‖², for the
  fewest bytes (:func:`lorasmith.fleet.joint.choose`);
* ``variance``: the least share of ‖ΔW‖² to keep, of each layer, in the mean over the adapters;
* ``components``: as many, on every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lorasmith.core.config import LowRankConfig
from lorasmith.errors import AdapterFileError
from lorasmith.fleet import joint, share
from lorasmith.fleet.codes import ABSENT, DIAGONAL, FACTORED, FULL, LOADINGS, Code, Layer
from lorasmith.fleet.members import Member
from lorasmith.io import peft

__all__ = [
    "Built",
    "Gauge",
    "Stacks",
    "Target",
    "absent",
    "build_joint",
    "build_share",
    "coded",
    "joint_pairs",
    "pair_costs",
]

#: What is done to factors before they are flattened for the Share basis.
Gauge = Literal["aligned", "balanced", "stored"]
#: (phase, done, total).
Progress = Callable[[str, int, int], None]

#: Directions that are looked for first where there could be many more.
_FIRST = 96
#: A basis reaches far enough if no adapter loses more than this share of its budget beyond it.
_REACH = 0.25
#: Errors below this share of ‖ΔW‖² are lost in the rounding of ‖ΔW‖² − ‖C‖².
_CANCELS = 1e-5


@dataclass(frozen=True)
class Target:
    """How many directions to keep; exactly one of the first three is set.

    Attributes:
        error: The most that any adapter may lose of its ‖ΔW‖², over all layers.
        variance: The share of ‖ΔW‖² that every layer keeps, in the mean over the adapters.
        components: Directions a layer (joint), or components beside the mean (Share).
        per_layer: Whether layers may differ in number.
    """

    error: float | None = None
    variance: float | None = None
    components: int | None = None
    per_layer: bool = True


@dataclass(frozen=True)
class Built:
    """Layers with the codes of all adapters.

    Attributes:
        layers: One a module.
        lost: ‖ΔW − ΔŴ‖² [N, L], float64.
    """

    layers: list[Layer]
    lost: Tensor


class Stacks:
    """The factors of a fleet, layers of one shape at a time.

    Args:
        members: The fleet.
        modules: The layers, of all members together.
        memory: Bytes that factors may take in memory.
        progress: Called with (phase, done, total).
    """

    def __init__(
        self,
        members: Sequence[Member],
        modules: Sequence[str],
        sizes: dict[str, tuple[int, int]],
        *,
        memory: int = 2**31,
        progress: Progress | None = None,
    ) -> None:
        self.members, self.modules, self.sizes = members, tuple(modules), sizes
        self.progress = progress
        self._has = [frozenset(m.modules) for m in members]
        self.ranks = torch.zeros(len(members), len(self.modules), dtype=torch.int64)
        for n, member in enumerate(members):
            for i, module in enumerate(self.modules):
                if module in self._has[n]:
                    self.ranks[n, i] = member.rank(module)
        self.chunks = self._chunks(memory // 8)
        whole = sum(self._bytes(chunk) for chunk in self.chunks)
        self._keep = whole <= memory
        self._kept: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        #: ‖ΔW‖² [N, L].
        self.energy = torch.zeros(len(members), len(self.modules), dtype=torch.float64)
        self._roots: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        for number, chunk in enumerate(self.chunks):
            T, R = self.roots(chunk)
            self.energy[:, self.places(chunk)] = (R.mT @ T).square().sum((-2, -1)).mT
            self.tell("read", number + 1, len(self.chunks))

    def places(self, chunk: Sequence[str]) -> list[int]:
        """Where the layers stand among all."""
        where = {m: i for i, m in enumerate(self.modules)}
        return [where[m] for m in chunk]

    def rank(self, chunk: Sequence[str]) -> int:
        """The highest rank there."""
        return max(1, int(self.ranks[:, self.places(chunk)].max()))

    def present(self, chunk: Sequence[str]) -> Tensor:
        """[L, N] booleans."""
        return (self.ranks[:, self.places(chunk)] > 0).mT

    def tell(self, phase: str, done: int, total: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(phase, done, total)

    def _bytes(self, chunk: Sequence[str]) -> int:
        d_in, d_out = self.sizes[chunk[0]]
        return 4 * len(chunk) * len(self.members) * self.rank(chunk) * (d_in + d_out)

    def _chunks(self, memory: int) -> list[tuple[str, ...]]:
        shapes: dict[tuple[int, int], list[str]] = {}
        for module in self.modules:
            shapes.setdefault(self.sizes[module], []).append(module)
        found = []
        for names in shapes.values():
            one = max(1, self._bytes(names) // len(names))
            step = max(1, min(len(names), memory // one, 16))
            found += [tuple(names[i : i + step]) for i in range(0, len(names), step)]
        return found

    def read(self, chunk: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A [L, N, r, d_in] and B [L, N, r, d_out] (columns as rows), float32."""
        if chunk in self._kept:
            return self._kept[chunk]
        (d_in, d_out), r = self.sizes[chunk[0]], self.rank(chunk)
        A = torch.zeros(len(chunk), len(self.members), r, d_in)
        B = torch.zeros(len(chunk), len(self.members), r, d_out)
        for n, member in enumerate(self.members):
            for i, module in enumerate(chunk):
                if module in self._has[n]:
                    own_A, own_B = _factors(member, module)
                    A[i, n, : len(own_A)] = own_A
                    B[i, n, : len(own_A)] = own_B.mT
        for n, i in (~(_finite(A) & _finite(B))).nonzero().flip(-1).tolist():
            self.members[n].factors(chunk[i])  # names file and tensor
            raise AdapterFileError(
                f"A factor of the adapter {self.members[n].id!r} is not finite.", key=chunk[i]
            )
        if self._keep:
            self._kept[chunk] = (A, B)
        return A, B

    def roots(self, chunk: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """:func:`lorasmith.fleet.joint.factor_root` of A and of B, [L, N, r, r]."""
        if chunk in self._roots:
            return self._roots[chunk]
        A, B = self.read(chunk)
        found = joint.factor_root(A), joint.factor_root(B)
        if self._keep:
            self._roots[chunk] = found
        return found

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], list[int], Tensor, Tensor]]:
        """(modules, their places, A, B) for each stack."""
        for chunk in self.chunks:
            yield chunk, self.places(chunk), *self.read(chunk)


def _factors(member: Member, module: str) -> tuple[Tensor, Tensor]:
    """A and scaled B; values of plain files are not checked one by one."""
    weights = member.weights
    if weights.variant.name in ("lora", "dora") and not weights.frozen:
        key = f"{peft.PREFIX}{module}.lora_"
        A, B = weights.tensors[f"{key}A.weight"], weights.tensors[f"{key}B.weight"]
        return A.float(), B.float() * cast("LowRankConfig", weights.config).scaling_of(module)
    found = member.factors(module)
    return found.A, found.B


def _finite(X: Tensor) -> Tensor:
    """Whether all of [L, N, r, d] is finite, [L, N]: the sum of what is not is not."""
    return torch.isfinite(X.sum((-2, -1)))


def absent(sizes: tuple[int, int], columns: tuple[int, int]) -> Code:
    """The code of an adapter that has nothing on a layer.

    Args:
        sizes: (d_out, d_in).
        columns: Lengths of the rows of left and right.
    """
    return Code(
        ABSENT,
        torch.zeros(0, columns[0]),
        torch.zeros(0, columns[1]),
        torch.zeros(0, sizes[0]),
        torch.zeros(0, sizes[1]),
    )


def coded(left: Tensor, right: Tensor, sizes: tuple[int, int], *, diagonal: bool = False) -> Code:
    """The core leftᵀ right in the kind that takes the fewest numbers; without a residual.

    Args:
        left: [k, R_u].
        right: [k, R_d].
        sizes: (d_out, d_in) of the layer.
        diagonal: Whether to keep the diagonal only.
    """
    none = torch.zeros(0, sizes[0]), torch.zeros(0, sizes[1])
    Ru, Rd = left.shape[1], right.shape[1]
    if diagonal:
        size = min(Ru, Rd)
        return Code(
            DIAGONAL, left[:0], (left[:, :size] * right[:, :size]).sum(0, keepdim=True), *none
        )
    if left.shape[0] * (Ru + Rd) < Ru * Rd:
        return Code(FACTORED, left.contiguous(), right.contiguous(), *none)
    core = (left.to(torch.float64).mT @ right.to(torch.float64)).to(torch.float32)
    return Code(FULL, left[:0], core, *none)


# Joint ----------------------------------------------------------------------------------------


@dataclass
class _Options:
    """What could be kept of a layer, and what that costs and loses."""

    up: Tensor
    down: Tensor
    sizes: list[tuple[int, int]]
    lost: Tensor  # [N, options]
    cost: Tensor  # [options]
    energy: Tensor  # [N]


def build_joint(
    stacks: Stacks,
    target: Target,
    *,
    relative: bool = True,
    sweeps: int = 0,
    diagonal: bool = False,
) -> Built:
    """The joint basis and all cores.

    Args:
        stacks: The factors.
        target: How many directions.
        relative: Whether every adapter counts alike, whatever its norm.
        sweeps: Alternating improvements once the numbers are chosen. Where one would lift an
            adapter above the error budget it is not used.
        diagonal: Whether cores are diagonal.
    """
    total = stacks.energy.sum(1)
    unit = _unit(total) if relative else torch.ones_like(total)
    options: dict[str, _Options] = {}
    for number, (chunk, places, A, B) in enumerate(stacks):
        scaled = B * unit.to(B.dtype)[None, :, None, None]
        energy = stacks.energy[:, places].mT * unit.square()
        T, R = stacks.roots(chunk)
        roots = T, R * unit[None, :, None, None]
        own = stacks.ranks[:, places].mT
        made = _options(A, scaled, roots, energy, own, total * unit.square(), target)
        options.update(zip(chunk, made, strict=True))
        stacks.tell("bases", number + 1, len(stacks.chunks))
    ordered = [options[m] for m in stacks.modules]
    chosen = _chosen(ordered, total * unit.square(), target)
    ranks = {m: o.sizes[c] for m, o, c in zip(stacks.modules, ordered, chosen, strict=True)}
    first = _cores(stacks, options, ranks, unit, 0, diagonal)
    if not sweeps:
        return first
    better = _cores(stacks, options, ranks, unit, sweeps, diagonal)
    if target.error is not None:
        over = better.lost.sum(1) > target.error * total
        if bool((over & (first.lost.sum(1) <= target.error * total)).any()):
            return first
    return better


def _unit(total: Tensor) -> Tensor:
    """1 / norm, 1 where it is 0."""
    return torch.where(total > 0, total, torch.ones_like(total)).rsqrt()


def _grid(most: int) -> list[int]:
    """Numbers of directions that are tried: ever wider steps up to the most."""
    found, k = [], 1
    while k < most:
        found.append(k)
        k += max(1, k // 6)
    return [*found, most] if most else [0]


def _options(
    A: Tensor,
    B: Tensor,
    roots: tuple[Tensor, Tensor],
    energy: Tensor,
    ranks: Tensor,
    total: Tensor,
    target: Target,
) -> list[_Options]:
    """The bases of a stack of layers and the losses at all numbers of directions tried."""
    L, N, r, d_in = A.shape
    d_out = B.shape[-1]
    full = min(N * r, max(d_in, d_out))
    most = target.components or min(full, _FIRST)
    while True:
        up, down = joint.basis(A, B, most, roots)
        left, right = joint.project(up, down, A, B)
        reach = joint.lost(left, right, energy, [up.shape[1]], [down.shape[1]])[..., 0, 0]
        if most >= full or target.components:
            break
        if target.error is not None:
            enough = bool((reach <= _REACH * target.error * energy + 1e-9 * total).all())
        else:
            assert target.variance is not None
            enough = bool((reach.sum(1) <= (1 - target.variance) * energy.sum(1)).all())
        if enough:
            break
        most = full if most * 4 >= full else most * 3
    pairs = joint_pairs(up.shape[1], down.shape[1], target)
    ups, downs = sorted({p[0] for p in pairs}), sorted({p[1] for p in pairs})
    table = joint.lost(left, right, energy, ups, downs)
    where_up, where_down = {k: i for i, k in enumerate(ups)}, {k: i for i, k in enumerate(downs)}
    flat = table[:, :, [where_up[a] for a, _ in pairs], [where_down[b] for _, b in pairs]]
    found = []
    for layer in range(L):
        cost = pair_costs(pairs, ranks[layer].to(torch.float64), (d_out, d_in))
        found.append(_Options(up[layer], down[layer], pairs, flat[layer], cost, energy[layer]))
    return found


def joint_pairs(ups: int, downs: int, target: Target) -> list[tuple[int, int]]:
    """The (R_u, R_d) that are tried where there are so many directions."""
    if target.components:
        return [(min(target.components, ups), min(target.components, downs))]
    grid = _grid(max(ups, downs))
    if not target.per_layer or target.variance is not None:
        return [(min(k, ups), min(k, downs)) for k in grid]
    near = range(len(grid))
    return sorted(
        {
            (min(grid[i], ups), min(grid[j], downs))
            for i in near
            for j in near[max(0, i - 3) : i + 4]
        }
    )


def pair_costs(pairs: Sequence[tuple[int, int]], ranks: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Numbers that basis and cores take together for each (R_u, R_d).

    Args:
        pairs: (R_u, R_d).
        ranks: [N], float64; 0 where an adapter does not have the layer.
        sizes: (d_out, d_in).
    """
    a, b = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    whole = (ranks > 0).unsqueeze(1) * (a * b)
    codes = torch.minimum(whole, ranks.unsqueeze(1) * (a + b)).sum(0)
    return a * sizes[0] + b * sizes[1] + codes


def _chosen(options: Sequence[_Options], total: Tensor, target: Target) -> list[int]:
    """The option of each layer."""
    if target.components:
        return [0] * len(options)
    if target.variance is not None:
        found = []
        for option in options:
            allowed = (1 - target.variance) * option.energy.sum() + 1e-12
            good = option.lost.sum(0) <= allowed
            found.append(int(good.nonzero()[0]) if bool(good.any()) else len(option.sizes) - 1)
        if target.per_layer:
            return found
        most = max(max(options[i].sizes[c]) for i, c in enumerate(found))
        return [_at_least(o, most) for o in options]
    assert target.error is not None
    budget = target.error * total
    if target.per_layer:
        return joint.choose([o.lost for o in options], [o.cost for o in options], budget)
    for k in sorted({max(s) for o in options for s in o.sizes}):
        picked = [_at_least(o, k) for o in options]
        lost = torch.stack([o.lost[:, c] for o, c in zip(options, picked, strict=True)]).sum(0)
        if bool((lost <= budget).all()):
            return picked
    return [len(o.sizes) - 1 for o in options]


def _at_least(option: _Options, k: int) -> int:
    for i, size in enumerate(option.sizes):
        if max(size) >= k:
            return i
    return len(option.sizes) - 1


def _cores(
    stacks: Stacks,
    options: dict[str, _Options],
    ranks: dict[str, tuple[int, int]],
    unit: Tensor,
    sweeps: int,
    diagonal: bool,
) -> Built:
    """Cores in the bases cut to the ranks chosen, after some sweeps."""
    layers: dict[str, Layer] = {}
    lost = torch.zeros_like(stacks.energy)
    done = 0
    for chunk, places, A, B in stacks:
        same: dict[tuple[int, int], list[int]] = {}
        for i, module in enumerate(chunk):
            same.setdefault(ranks[module], []).append(i)
        for (a, b), members in same.items():
            part_A, part_B = A[members], B[members]
            up = torch.stack([options[chunk[i]].up[:a] for i in members])
            down = torch.stack([options[chunk[i]].down[:b] for i in members])
            if sweeps:
                scaled = part_B * unit.to(B.dtype)[None, :, None, None]
                for _ in range(sweeps):
                    new_up, new_down = joint.sweep(up, down, part_A, scaled)
                    if new_up.shape != up.shape or new_down.shape != down.shape:
                        break
                    up, down = new_up, new_down
            left, right = joint.project(up, down, part_A, part_B)
            energy = stacks.energy[:, [places[i] for i in members]].mT
            if diagonal:
                size = min(a, b)
                kept = (left[..., :size] * right[..., :size]).sum(2).to(torch.float64)
                left_out = (energy - kept.square().sum(-1)).clamp_min(0)
            else:
                left_out = joint.lost(left, right, energy, [a], [b])[..., 0, 0]
                small = (left_out < _CANCELS * energy).nonzero()
                for k, n in small.tolist():
                    # Too small for a difference of squares: the difference itself.
                    one = slice(n, n + 1)
                    left_out[k, n] = share.distance(
                        part_A[k, one],
                        part_B[k, one],
                        right[k, one] @ down[k],
                        left[k, one] @ up[k],
                    )
                right, left = share.balance(right, left)
            for k, i in enumerate(members):
                module = chunk[i]
                layer = Layer.new(module, up[k], down[k], len(stacks.members))
                codes = []
                for n in range(len(stacks.members)):
                    rank = int(stacks.ranks[n, places[i]])
                    if not rank:
                        codes.append(absent(layer.sizes, layer.ranks))
                        continue
                    own = left[k, n, :rank], right[k, n, :rank]
                    codes.append(coded(*own, layer.sizes, diagonal=diagonal))
                layer.fill(codes)
                layers[module] = layer
                lost[:, places[i]] = left_out[k]
        done += len(chunk)
        stacks.tell("cores", done, len(stacks.modules))
    return Built([layers[m] for m in stacks.modules], lost)


# Share ----------------------------------------------------------------------------------------


@dataclass
class _Components:
    """Mean, components and loadings of one layer, in units of the adapters' sizes."""

    mean_down: Tensor
    mean_up: Tensor
    down: Tensor
    up: Tensor
    right: Tensor
    left: Tensor
    sizes: list[tuple[int, int]]
    lost: Tensor
    cost: Tensor


def build_share(
    stacks: Stacks, target: Target, *, relative: bool = True, gauge: Gauge = "aligned"
) -> Built:
    """The Share basis and all loadings.

    Args:
        stacks: The factors.
        target: How many components.
        relative: Whether every adapter counts alike, whatever its norm.
        gauge: ``"aligned"``: balanced, and turned to the fleet; ``"balanced"`` only;
            ``"stored"``: factors as they are.
    """
    total = stacks.energy.sum(1)
    unit = _unit(total) if relative else torch.ones_like(total)
    r = max(stacks.rank(chunk) for chunk in stacks.chunks)
    made: dict[str, _Components] = {}
    wide = unit.sqrt()[None, :, None, None]
    root = wide.to(torch.float32)
    for number, (chunk, places, A, B) in enumerate(stacks):
        if gauge == "stored":
            A, B = A * root, B * root
        else:
            M, N = share.balancing(*stacks.roots(chunk))
            if gauge == "aligned":
                M, N = share.aligning(A, B, M * wide, N * wide)
            else:
                M, N = M * wide, N * wide
            A, B = M.to(A.dtype) @ A, N.to(B.dtype) @ B
        more = r - A.shape[2]
        if more:
            A = torch.nn.functional.pad(A, (0, 0, 0, more))
            B = torch.nn.functional.pad(B, (0, 0, 0, more))
        present = stacks.present(chunk)
        mean_A, rows_A, load_A, var_A = share.components(A.flatten(2), present, target.components)
        mean_B, rows_B, load_B, var_B = share.components(B.flatten(2), present, target.components)
        most = max(rows_A.shape[1], rows_B.shape[1])
        rows_A, load_A = _filled(rows_A, load_A, most)
        rows_B, load_B = _filled(rows_B, load_B, most)
        energy = stacks.energy[:, places].mT * unit.square()
        ks = _share_grid(most, var_A, var_B, target)
        losses = []
        for k in ks:
            hat_A = (mean_A.unsqueeze(1) + load_A[..., :k] @ rows_A[:, :k]).view_as(A)
            hat_B = (mean_B.unsqueeze(1) + load_B[..., :k] @ rows_B[:, :k]).view_as(B)
            gone = share.loss(A, B, hat_A, hat_B, energy)
            losses.append(torch.where(present, gone, energy * 0))
        table = torch.stack(losses, -1)  # [L, N, options]
        for i, module in enumerate(chunk):
            d = A.shape[-1] + B.shape[-1]
            cost = torch.tensor(
                [(k + 1) * (r * d + 2 * int(present[i].sum())) for k in ks], dtype=torch.float64
            )
            made[module] = _Components(
                mean_A[i],
                mean_B[i],
                rows_A[i, : ks[-1]].clone(),
                rows_B[i, : ks[-1]].clone(),
                load_A[i, :, : ks[-1]],
                load_B[i, :, : ks[-1]],
                [(k, k) for k in ks],
                table[i],
                cost,
            )
        stacks.tell("components", number + 1, len(stacks.chunks))
    ordered = [made[m] for m in stacks.modules]
    chosen = _share_chosen(
        ordered, total * unit.square(), target, stacks.energy * unit.square()[:, None]
    )
    layers, lost = [], torch.zeros_like(stacks.energy)
    scale = unit.rsqrt().to(torch.float32)
    for place, (module, one, c) in enumerate(zip(stacks.modules, ordered, chosen, strict=True)):
        k = one.sizes[c][0]
        layers.append(_share_layer(module, one, k, r, scale, stacks, place))
        lost[:, place] = one.lost[:, c] / unit.square()
    return Built(layers, lost)


def _filled(rows: Tensor, loadings: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Components of zero at the end, where the other factor has more of them."""
    more = most - rows.shape[1]
    pad = torch.nn.functional.pad
    return pad(rows, (0, 0, 0, more)), pad(loadings, (0, more))


def _share_grid(most: int, var_A: Tensor, var_B: Tensor, target: Target) -> list[int]:
    """Numbers of components worth trying: those whose factors lose about what may be lost."""
    if target.components:
        return [most]
    ks = [0, *_grid(most)] if most else [0]
    aim = target.error if target.error is not None else 1 - (target.variance or 0.0)
    if len(ks) <= 6 or not aim:
        return ks[-1:] if not aim else ks
    wanted = []
    for k in ks:
        gone = torch.stack([v[:, k:].sum(1) / v.sum(1).clamp_min(1e-300) for v in (var_A, var_B)])
        wanted.append(float(gone.max()))
    # The error of ΔW is about the sum of those of A and B.
    return [k for k, w in zip(ks, wanted, strict=True) if aim / 30 <= w <= 3 * aim] + [most]


def _share_chosen(
    options: Sequence[_Components], total: Tensor, target: Target, energy: Tensor
) -> list[int]:
    if target.components:
        return [0] * len(options)
    if target.variance is not None:
        found = []
        for i, o in enumerate(options):
            good = o.lost.sum(0) <= (1 - target.variance) * energy[:, i].sum() + 1e-12
            found.append(int(good.nonzero()[0]) if bool(good.any()) else len(o.sizes) - 1)
        if target.per_layer:
            return found
        k = max(options[i].sizes[c][0] for i, c in enumerate(found))
        return [
            next((j for j, s in enumerate(o.sizes) if s[0] >= k), len(o.sizes) - 1) for o in options
        ]
    assert target.error is not None
    budget = target.error * total
    if target.per_layer:
        return joint.choose([o.lost for o in options], [o.cost for o in options], budget)
    for k in sorted({s[0] for o in options for s in o.sizes}):
        picked = [
            next((j for j, s in enumerate(o.sizes) if s[0] >= k), len(o.sizes) - 1) for o in options
        ]
        lost = torch.stack([o.lost[:, c] for o, c in zip(options, picked, strict=True)]).sum(0)
        if bool((lost <= budget).all()):
            return picked
    return [len(o.sizes) - 1 for o in options]


def _share_layer(
    module: str, one: _Components, k: int, r: int, scale: Tensor, stacks: Stacks, place: int
) -> Layer:
    down = torch.cat((one.mean_down[None], one.down[:k])).view((k + 1) * r, -1)
    up = torch.cat((one.mean_up[None], one.up[:k])).view((k + 1) * r, -1)
    layer = Layer.new(module, up, down, len(scale), r)
    ones = torch.ones(len(scale), 1)
    left = torch.cat((ones, one.left[:, :k]), 1) * scale[:, None]
    right = torch.cat((ones, one.right[:, :k]), 1) * scale[:, None]
    none = torch.zeros(0, up.shape[1]), torch.zeros(0, down.shape[1])
    codes = [
        Code(LOADINGS, left[n : n + 1], right[n : n + 1], *none)
        if stacks.ranks[n, place]
        else absent(layer.sizes, (k + 1, k + 1))
        for n in range(len(scale))
    ]
    layer.fill(codes)
    return layer
