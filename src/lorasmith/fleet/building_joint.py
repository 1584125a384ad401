"""The layers of a joint basis: how many directions each keeps, and every adapter's core there.

The mathematics of one layer is in :mod:`lorasmith.fleet.joint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.fleet import joint, parallel, share
from lorasmith.fleet.building import Built, Target, counts_tried, unit_of
from lorasmith.fleet.codec import Rows
from lorasmith.fleet.codes import DIAGONAL, FACTORED, FULL, Layer
from lorasmith.fleet.stacks import Stack, Stacks
from lorasmith.fleet.trimming import split, trim

__all__ = ["build_joint", "joint_pairs", "pair_costs"]

#: Directions that are looked for first where there could be many more.
_FIRST = 96
#: A basis reaches far enough if no adapter loses more than this share of its budget beyond it.
_REACH = 0.25
#: Errors below this share of ‖ΔW‖² are lost in the rounding of ‖ΔW‖² − ‖C‖².
_CANCELS = 1e-5


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
    unit = unit_of(total) if relative else torch.ones_like(total)

    def prepare(stack: Stack) -> list[_Options]:
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
    grid = counts_tried(max(ups, downs))
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
