"""Building the layers of a shared subspace from a fleet, a few layers at a time.

Layers of one shape are stacked and go through each step together. In memory at a time are the
factors of one stack, or all of them while they fit into a limit. The number of directions a
layer is chosen last, by one of

* ``error``: the most that any adapter may lose, Σ_l ‖ΔW_l − ΔŴ_l‖² / Σ_l ‖ΔW_l‖², for the
  fewest bytes (:func:`lorasmith.fleet.joint.choose`). Of the joint basis each adapter's cores
  are cut as well, to the rank that it needs (:mod:`lorasmith.fleet.trimming`);
* ``variance``: the least share of ‖ΔW‖² to keep, of each layer, in the mean over the adapters;
* ``components``: as many, on every layer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from lorasmith.core.config import LowRankConfig
from lorasmith.errors import AdapterFileError
from lorasmith.fleet import joint, parallel, share
from lorasmith.fleet.codec import Rows
from lorasmith.fleet.codes import ABSENT, DIAGONAL, FACTORED, FULL, LOADINGS, Code, Layer
from lorasmith.fleet.members import Member
from lorasmith.fleet.trimming import split, trim
from lorasmith.io import peft
from lorasmith.io.tensors import FileTensors

__all__ = [
    "Built",
    "FixedGauge",
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
FixedGauge = Literal["aligned", "balanced", "stored"]
#: The same, or whichever is best.
Gauge = Literal["auto", "aligned", "balanced", "stored"]
GAUGES: tuple[FixedGauge, ...] = get_args(FixedGauge)
_T = TypeVar("_T")
#: (phase, done, total).
Progress = Callable[[str, int, int], None]

#: Directions that are looked for first where there could be many more.
_FIRST = 96
#: A basis reaches far enough if no adapter loses more than this share of its budget beyond it.
_REACH = 0.25
#: Bytes of a stack, so that it stays in the cache while it is worked on, and its most layers.
_STACK, _MOST = 2**23, 16
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
        gauge: What was done to the factors, of the Share basis.
    """

    layers: list[Layer]
    lost: Tensor
    gauge: FixedGauge | None = None


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
        self._plain = [_plain(m) for m in members]
        self._where = {m: i for i, m in enumerate(self.modules)}
        self.memory = memory
        self.chunks = self._chunks(min(memory // 8, _STACK))
        whole = sum(self._bytes(chunk) for chunk in self.chunks)
        # What is mapped is read again as fast as from memory of its own.
        self._keep = whole <= memory and not all(self._plain)
        roots = 16 * sum(len(chunk) * self.rank(chunk) ** 2 for chunk in self.chunks)
        self._keep_roots = roots * len(members) <= memory // 4
        self._kept: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._buffers = threading.local()
        #: ‖ΔW‖² [N, L].
        self.energy = torch.zeros(len(members), len(self.modules), dtype=torch.float64)
        self._roots: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

        def first(chunk: tuple[str, ...]) -> None:
            T, R = self.roots(chunk)
            self.energy[:, self.places(chunk)] = (R.mT @ T).square().sum((-2, -1)).mT

        parallel.each(first, self.chunks, workers=self.workers, tell=self._teller("read"))

    @property
    def workers(self) -> int:
        """How many stacks may be in memory at a time, with what is made of them."""
        largest = max((self._bytes(chunk) for chunk in self.chunks), default=1)
        return max(1, self.memory // max(1, 4 * largest))

    def _teller(self, phase: str) -> Callable[[int], None]:
        return lambda done: self.tell(phase, done, len(self.chunks))

    def each(self, run: Callable[[_Stack], _T], phase: str) -> list[_T]:
        """``run`` of (modules, their places, A, B) for each stack, several at a time.

        A and B are those of the thread, and hold the next stack after it.
        """

        def one(chunk: tuple[str, ...]) -> _T:
            return run((chunk, self.places(chunk), *self.read(chunk)))

        return parallel.each(one, self.chunks, workers=self.workers, tell=self._teller(phase))

    def places(self, chunk: Sequence[str]) -> list[int]:
        """Where the layers stand among all."""
        return [self._where[m] for m in chunk]

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

    def layer(self, module: str) -> _Stack:
        """The stack of one layer alone."""
        chunk = next(c for c in self.chunks if module in c)
        A, B = self.read(chunk)
        i = chunk.index(module)
        return (module,), [self._where[module]], A[i : i + 1], B[i : i + 1]

    def roots_of(self, stack: _Stack) -> tuple[Tensor, Tensor]:
        """:meth:`roots` of the layers of a stack, which may be part of one."""
        chunk = next(c for c in self.chunks if stack[0][0] in c)
        if chunk not in self._roots:
            return joint.factor_root(stack[2]), joint.factor_root(stack[3])
        T, R = self._roots[chunk]
        inside = [chunk.index(m) for m in stack[0]]
        return T[inside], R[inside]

    def bytes_of(self, module: str) -> int:
        """Bytes of the factors of one layer."""
        return self._bytes((module,))

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
            step = max(1, min(len(names), memory // one, _MOST))
            found += [tuple(names[i : i + step]) for i in range(0, len(names), step)]
        return found

    def read(self, chunk: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A [L, N, r, d_in] and B [L, N, r, d_out] (columns as rows), float32.

        They may lie in a buffer of this thread that is used again by its next call.
        """
        if chunk in self._kept:
            return self._kept[chunk]
        (d_in, d_out), r = self.sizes[chunk[0]], self.rank(chunk)
        A = self._buffer("A", (len(chunk), len(self.members), r, d_in))
        B = self._buffer("B", (len(chunk), len(self.members), r, d_out))
        for i, module in enumerate(chunk):
            if not self._read_at_once(module, A[i], B[i]):
                self._read_each(module, A[i], B[i])
        for n, i in (~(_finite(A) & _finite(B))).nonzero().flip(-1).tolist():
            self.members[n].factors(chunk[i])  # names file and tensor
            raise AdapterFileError(
                f"A factor of the adapter {self.members[n].id!r} is not finite.", key=chunk[i]
            )
        if self._keep:
            self._kept[chunk] = (A, B)
        return A, B

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory for a stack: new pages cost as much time as the reading itself."""
        if self._keep:
            return torch.empty(shape)
        size = math.prod(shape)
        held: Tensor | None = getattr(self._buffers, name, None)
        if held is None or held.numel() < size:
            held = torch.empty(size)
            setattr(self._buffers, name, held)
        return held[:size].view(shape)

    def _read_at_once(self, module: str, A: Tensor, B: Tensor) -> bool:
        """Reads a layer that all adapters have alike, or says that they do not."""
        if not all(self._plain):
            return False
        key = f"{peft.PREFIX}{module}.lora_"
        place = self._where[module]
        if (
            int(self.ranks[:, place].min()) != A.shape[1]
            or int(self.ranks[:, place].max()) != (A.shape[1])
        ):
            return False
        sources = [cast("FileTensors", m.weights.tensors) for m in self.members]
        if any(s.dtype(f"{key}{side}.weight") != torch.float32 for s in sources for side in "AB"):
            return False
        torch.stack([s.view(f"{key}A.weight") for s in sources], out=A)
        stored = self._buffer("stored", (len(sources), B.shape[2], B.shape[1]))
        torch.stack([s.view(f"{key}B.weight") for s in sources], out=stored)
        scalings = [_scaling(m, module) for m in self.members]
        if any(s != 1 for s in scalings):
            stored *= torch.tensor(scalings)[:, None, None]
        B.copy_(stored.mT)
        return True

    def _read_each(self, module: str, A: Tensor, B: Tensor) -> None:
        """Reads a layer of one adapter after the other; missing rows are zero."""
        for n, member in enumerate(self.members):
            rank = 0
            if module in self._has[n]:
                own_A, own_B = _factors(member, module)
                rank = len(own_A)
                A[n, :rank] = own_A
                B[n, :rank] = own_B.mT
            A[n, rank:] = 0
            B[n, rank:] = 0

    def roots(self, chunk: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """:func:`lorasmith.fleet.joint.factor_root` of A and of B, [L, N, r, r]."""
        if chunk in self._roots:
            return self._roots[chunk]
        A, B = self.read(chunk)
        found = joint.factor_root(A), joint.factor_root(B)
        if self._keep_roots:
            self._roots[chunk] = found
        return found


#: (modules, their places, A, B).
_Stack = tuple[tuple[str, ...], list[int], Tensor, Tensor]


def _plain(member: Member) -> bool:
    """Whether the factors are tensors of a file as they are, B times the scaling."""
    weights = member.weights
    plain = weights.variant.name in ("lora", "dora") and not weights.frozen
    return plain and isinstance(weights.tensors, FileTensors)


def _scaling(member: Member, module: str) -> float:
    return cast("LowRankConfig", member.weights.config).scaling_of(module)


def _factors(member: Member, module: str) -> tuple[Tensor, Tensor]:
    """A and scaled B; values of plain files are not checked one by one."""
    weights = member.weights
    if weights.variant.name in ("lora", "dora") and not weights.frozen:
        key = f"{peft.PREFIX}{module}.lora_"
        tensors = weights.tensors
        get = tensors.view if isinstance(tensors, FileTensors) else tensors.__getitem__
        A, B = get(f"{key}A.weight"), get(f"{key}B.weight")
        return A.float(), B.float() * _scaling(member, module)
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
    spectrum: Tensor  # σ² of ΔW [N, r], falling; of the same units as what is lost
    #: Left [N, r, R_u] and right [N, r, R_d] of all adapters, where there is room for them.
    coordinates: tuple[Tensor, Tensor] | None


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

    def prepare(stack: _Stack) -> list[_Options]:
        _, places, A, B = stack
        roots = stacks.roots_of(stack)
        energy, own = stacks.energy[:, places].mT, stacks.ranks[:, places].mT
        room = stacks.memory // len(stacks.modules)
        return _options(A, B, roots, unit, energy, own, total, target, room)

    made = stacks.each(prepare, "bases")
    options = {
        m: o
        for chunk, each in zip(stacks.chunks, made, strict=True)
        for m, o in zip(chunk, each, strict=True)
    }
    ordered = [options[m] for m in stacks.modules]
    if target.error is not None and target.per_layer and not diagonal:
        chosen = _split(ordered, target.error * total * unit.square())
    else:
        chosen = _chosen(ordered, total * unit.square(), target)
    ranks = {m: o.sizes[c] for m, o, c in zip(stacks.modules, ordered, chosen, strict=True)}
    built = _cores(stacks, options, ranks, unit, 0, diagonal)
    budget = None if target.error is None else target.error * total
    if sweeps:
        better = _cores(stacks, options, ranks, unit, sweeps, diagonal)
        worse = torch.zeros(len(total), dtype=torch.bool)
        if budget is not None:
            worse = (better.lost.sum(1) > budget) & (built.lost.sum(1) <= budget)
        built = built if bool(worse.any()) else better
    if budget is None or diagonal:
        return built
    more = trim(built.layers, budget - built.lost.sum(1))
    return Built(built.layers, built.lost + more)


def _split(options: Sequence[_Options], budget: Tensor) -> list[int]:
    """The option of each layer, where cores are trimmed afterwards."""
    most = max(o.spectrum.shape[1] for o in options)
    pad = torch.nn.functional.pad
    energies = torch.stack([pad(o.spectrum, (0, most - o.spectrum.shape[1])) for o in options])

    def cost(place: int, ranks: Tensor) -> Tensor:
        one = options[place]
        sizes = one.up.shape[1], one.down.shape[1]
        return pair_costs(one.sizes, ranks.to(torch.float64), sizes)

    return split([o.lost for o in options], [o.sizes for o in options], cost, energies, budget)


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
    unit: Tensor,
    energy: Tensor,
    ranks: Tensor,
    total: Tensor,
    target: Target,
    room: int,
) -> list[_Options]:
    """The bases of a stack of layers and the losses at all numbers of directions tried."""
    L, N, r, d_in = A.shape
    d_out = B.shape[-1]
    full = min(N * r, max(d_in, d_out))
    most = target.components or min(full, _FIRST)
    spectrum = energy[..., None]
    if target.error is not None:
        inner = roots[1].mT @ roots[0]
        spectrum = torch.linalg.eigvalsh(inner.mT @ inner).flip(-1).clamp_min(0)
        spectrum = spectrum * unit.square()[None, :, None]
    weight = unit[None, :, None, None]
    roots = roots[0] * weight, roots[1] * weight
    whole = energy * unit.square()
    while True:
        up, down, left, right = joint.spaces(A, B, most, roots, whole.sum(1))
        if most >= full or target.components:
            break
        reach = joint.lost(left, right, energy, [up.shape[1]], [down.shape[1]])[..., 0, 0]
        if target.error is not None:
            enough = bool((reach <= _REACH * target.error * energy + 1e-9 * total).all())
        else:
            assert target.variance is not None
            missed = (reach * unit.square()).sum(1)
            enough = bool((missed <= (1 - target.variance) * whole.sum(1)).all())
        if enough:
            break
        most = full if most * 4 >= full else most * 3
    pairs = joint_pairs(up.shape[1], down.shape[1], target)
    ups, downs = sorted({p[0] for p in pairs}), sorted({p[1] for p in pairs})
    table = joint.lost(left, right, energy, ups, downs)
    where_up, where_down = {k: i for i, k in enumerate(ups)}, {k: i for i, k in enumerate(downs)}
    flat = table[:, :, [where_up[a] for a, _ in pairs], [where_down[b] for _, b in pairs]]
    flat = flat * unit.square()[:, None]
    small = 4 * (left[0].numel() + right[0].numel()) <= room
    found = []
    for layer in range(L):
        cost = pair_costs(pairs, ranks[layer].to(torch.float64), (d_out, d_in))
        kept = (left[layer].clone(), right[layer].clone()) if small else None
        own = flat[layer], cost, whole[layer], spectrum[layer], kept
        found.append(_Options(up[layer], down[layer], pairs, *own))
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

    def run(chunk: tuple[str, ...]) -> list[tuple[Layer, Tensor]]:
        found: dict[str, tuple[Layer, Tensor]] = {}
        same: dict[tuple[int, int], list[str]] = {}
        for module in chunk:
            same.setdefault(ranks[module], []).append(module)
        for sizes, modules in same.items():
            given = [options[m] for m in modules]
            made = _cores_of(stacks, chunk, modules, given, sizes, unit, sweeps, diagonal)
            found.update(zip(modules, made, strict=True))
        return [found[m] for m in chunk]

    made = parallel.each(
        run,
        stacks.chunks,
        workers=stacks.workers,
        tell=lambda n: stacks.tell("cores", n, len(stacks.chunks)),
    )
    for chunk, each in zip(stacks.chunks, made, strict=True):
        for module, place, (layer, gone) in zip(chunk, stacks.places(chunk), each, strict=True):
            layers[module] = layer
            lost[:, place] = gone
    return Built([layers[m] for m in stacks.modules], lost)


def _cores_of(
    stacks: Stacks,
    chunk: tuple[str, ...],
    modules: Sequence[str],
    options: Sequence[_Options],
    sizes: tuple[int, int],
    unit: Tensor,
    sweeps: int,
    diagonal: bool,
) -> list[tuple[Layer, Tensor]]:
    """The layers of a stack that have as many directions, and what each adapter loses there."""
    a, b = sizes
    up = torch.stack([o.up[:a] for o in options])
    down = torch.stack([o.down[:b] for o in options])
    places, inside = stacks.places(modules), [chunk.index(m) for m in modules]
    energy = stacks.energy[:, places].mT

    def factors() -> tuple[Tensor, Tensor]:
        A, B = stacks.read(chunk)
        return (A, B) if len(inside) == len(chunk) else (A[inside], B[inside])

    kept = [o.coordinates for o in options if o.coordinates is not None]
    if sweeps or len(kept) < len(options):
        A, B = factors()
        scaled = B * unit.to(B.dtype)[None, :, None, None] if sweeps else B
        for _ in range(sweeps):
            new_up, new_down = joint.sweep(up, down, A, scaled)
            if new_up.shape != up.shape or new_down.shape != down.shape:
                break
            up, down = new_up, new_down
        left, right = joint.project(up, down, A, B)
    else:
        left = torch.stack([own[0][..., :a] for own in kept])
        right = torch.stack([own[1][..., :b] for own in kept])
    if diagonal:
        size = min(a, b)
        held = (left[..., :size] * right[..., :size]).sum(2).to(torch.float64)
        gone = (energy - held.square().sum(-1)).clamp_min(0)
    else:
        gone = joint.lost(left, right, energy, [a], [b])[..., 0, 0]
        small = gone < _CANCELS * energy
        if bool(small.any()):
            # Too small for a difference of squares: the difference itself.
            A, B = factors()
            for k in range(len(modules)):
                where = small[k].nonzero().squeeze(1)
                for some in torch.split(where, 64):
                    near_A, near_B = right[k, some] @ down[k], left[k, some] @ up[k]
                    gone[k, some] = share.distance(A[k, some], B[k, some], near_A, near_B)
        right, left = share.balance(right, left)
    return [
        (_joint_layer(m, up[k], down[k], left[k], right[k], stacks.ranks[:, p], diagonal), gone[k])
        for k, (m, p) in enumerate(zip(modules, places, strict=True))
    ]


def _joint_layer(
    module: str,
    up: Tensor,
    down: Tensor,
    left: Tensor,
    right: Tensor,
    ranks: Tensor,
    diagonal: bool,
) -> Layer:
    """A layer with the cores leftᵀ right of all adapters, as :func:`coded` would store each.

    Args:
        module: Its name.
        up: [R_u, d_out].
        down: [R_d, d_in].
        left: [N, r, R_u], zero beyond an adapter's rank.
        right: [N, r, R_d].
        ranks: [N], 0 where an adapter does not have the layer.
        diagonal: Whether to keep diagonals only.
    """
    Ru, Rd = len(up), len(down)
    layer = Layer.new(module, up, down, len(ranks))
    here = ranks > 0
    index = torch.zeros(len(ranks), 4, dtype=torch.int64)
    if diagonal:
        size = min(Ru, Rd)
        rows = (left[..., :size] * right[..., :size]).sum(1)[here]
        index[here] = torch.tensor([DIAGONAL, 0, 1, 0])
        layer.right, layer.index = Rows.pack(rows), index
        return layer
    factored = here & (ranks * (Ru + Rd) < Ru * Rd)
    index[here] = torch.tensor([FULL, 0, Ru, 0])
    index[factored, 0] = FACTORED
    index[factored, 1:3] = ranks[factored].unsqueeze(1)
    own = (torch.arange(left.shape[1]) < ranks.unsqueeze(1)) & factored.unsqueeze(1)
    if bool((factored == here).all()):
        rows = right[own]
    else:
        cores = (left.to(torch.float64).mT @ right.to(torch.float64)).to(torch.float32)
        parts = [
            right[n, :rank] if factored[n] else cores[n]
            for n, rank in enumerate(ranks.tolist())
            if rank
        ]
        rows = torch.cat([right[0, :0], *parts])
    layer.left, layer.right, layer.index = Rows.pack(left[own]), Rows.pack(rows), index
    return layer


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
    stacks: Stacks, target: Target, *, relative: bool = True, gauge: Gauge = "auto"
) -> Built:
    """The Share basis and all loadings.

    Args:
        stacks: The factors.
        target: How many components.
        relative: Whether every adapter counts alike, whatever its norm.
        gauge: ``"aligned"``: balanced, and turned to the fleet; ``"balanced"`` only;
            ``"stored"``: factors as they are; ``"auto"``: the best (:func:`best_gauge`).
    """
    total = stacks.energy.sum(1)
    unit = _unit(total) if relative else torch.ones_like(total)
    r = max(stacks.rank(chunk) for chunk in stacks.chunks)
    used: FixedGauge = best_gauge(stacks, target, unit, r) if gauge == "auto" else gauge
    parts = stacks.each(
        lambda stack: _share_stack(stacks, stack, target, unit, r, used), "components"
    )
    made = {
        m: one
        for chunk, each in zip(stacks.chunks, parts, strict=True)
        for m, one in zip(chunk, each, strict=True)
    }
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
    return Built(layers, lost, used)


def best_gauge(stacks: Stacks, target: Target, unit: Tensor, r: int) -> FixedGauge:
    """The gauge in which some layers take the fewest bytes for the target, or else lose least.

    Aligning finds what adapters have in common whatever their gauge, but only as far as it is in
    both factors alike; of adapters that were made from one initialisation the stored factors may
    have more in common. Which it is, is measured: on layers spread evenly over the model,
    fewer of them where they are large.

    Args:
        stacks: The factors.
        target: How many components.
        unit: [N], what each adapter is multiplied by.
        r: The rank of the basis.
    """
    L = len(stacks.modules)
    count = min(L, 4 if stacks.bytes_of(stacks.modules[0]) < _STACK else 2)
    picked = [stacks.modules[(2 * i + 1) * L // (2 * count)] for i in range(count)]

    def tried(module: str) -> list[tuple[float, float]]:
        found = []
        for gauge in GAUGES:
            stack = stacks.layer(module)
            (one,) = _share_stack(stacks, stack, target, unit, r, gauge)
            energy = stacks.energy[:, stack[1][0]] * unit.square()
            if target.error is not None:
                good = (one.lost <= target.error * energy.unsqueeze(1) + 1e-12).all(0)
            elif target.variance is not None:
                good = one.lost.sum(0) <= (1 - target.variance) * energy.sum() + 1e-12
            else:
                good = torch.ones(len(one.sizes), dtype=torch.bool)
            c = int(good.nonzero()[0]) if bool(good.any()) else len(one.sizes) - 1
            found.append((float(one.cost[c]), float(one.lost[:, c].sum() / energy.sum())))
        return found

    scores = torch.tensor(parallel.each(tried, picked, workers=stacks.workers))
    cost, lost = scores.sum(0).unbind(-1)
    return min(zip(cost.tolist(), lost.tolist(), range(len(GAUGES)), GAUGES, strict=True))[-1]


def _share_stack(
    stacks: Stacks, stack: _Stack, target: Target, unit: Tensor, r: int, gauge: FixedGauge
) -> list[_Components]:
    """Components, loadings and losses of a stack of layers."""
    chunk, places, A, B = stack
    wide = unit.sqrt()[None, :, None, None]
    if gauge == "stored":
        root = wide.to(torch.float32)
        A, B = A * root, B * root
    else:
        M, N = share.balancing(*stacks.roots_of(stack))
        if gauge == "aligned":
            M, N = share.aligning(A, B, M * wide, N * wide)
        else:
            M, N = M * wide, N * wide
        A, B = M.to(A.dtype) @ A, N.to(B.dtype) @ B
    more = r - A.shape[2]
    if more:
        A = torch.nn.functional.pad(A, (0, 0, 0, more))
        B = torch.nn.functional.pad(B, (0, 0, 0, more))
    energy = stacks.energy[:, places].mT * unit.square()
    # An adapter that does nothing there has no part in the mean, and no loadings.
    present = stacks.present(chunk) & (energy > 0)
    mean_A, rows_A, load_A, var_A = share.components(A.flatten(2), present, target.components)
    mean_B, rows_B, load_B, var_B = share.components(B.flatten(2), present, target.components)
    most = max(rows_A.shape[1], rows_B.shape[1])
    rows_A, load_A = _filled(rows_A, load_A, most)
    rows_B, load_B = _filled(rows_B, load_B, most)
    ks = _share_grid(most, var_A, var_B, target)
    losses = []
    for k in ks:
        hat_A = (mean_A.unsqueeze(1) + load_A[..., :k] @ rows_A[:, :k]).view_as(A)
        hat_B = (mean_B.unsqueeze(1) + load_B[..., :k] @ rows_B[:, :k]).view_as(B)
        gone = share.loss(A, B, hat_A, hat_B, energy)
        losses.append(torch.where(present, gone, energy * 0))
    table = torch.stack(losses, -1)  # [L, N, options]
    d = A.shape[-1] + B.shape[-1]
    found = []
    for i in range(len(chunk)):
        cost = torch.tensor(
            [(k + 1) * (r * d + 2 * int(present[i].sum())) for k in ks], dtype=torch.float64
        )
        found.append(
            _Components(
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
        )
    return found


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
    here = stacks.ranks[:, place] > 0
    scale = torch.where(stacks.energy[:, place] > 0, scale, torch.zeros_like(scale))
    ones = torch.ones(len(scale), 1)
    left = torch.cat((ones, one.left[:, :k]), 1) * scale[:, None]
    right = torch.cat((ones, one.right[:, :k]), 1) * scale[:, None]
    layer.left, layer.right = Rows.pack(left[here]), Rows.pack(right[here])
    layer.index[here] = torch.tensor([LOADINGS, 1, 1, 0])
    return layer
