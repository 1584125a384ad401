"""The layers of a Share basis: the gauge, how many components each keeps, and all loadings.

The mathematics of one layer is in :mod:`lorasmith.fleet.share`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.fleet import joint, parallel, share
from lorasmith.fleet.building import GAUGES, Built, FixedGauge, Gauge, Target, counts_tried, unit_of
from lorasmith.fleet.codec import Rows
from lorasmith.fleet.codes import LOADINGS, Layer
from lorasmith.fleet.stacks import Stack, Stacks

__all__ = ["best_gauge", "build_share"]


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
    unit = unit_of(total) if relative else torch.ones_like(total)
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
    count = min(L, 4 if stacks.is_small(stacks.modules[0]) else 2)
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
    stacks: Stacks, stack: Stack, target: Target, unit: Tensor, r: int, gauge: FixedGauge
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
    ks = [0, *counts_tried(most)] if most else [0]
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
