"""Which directions of each adapter are not worth their bytes.

An adapter of rank r rarely needs it on every layer: of the adapters in ``docs/fleet.md`` the
first of eight directions holds four fifths of ‖ΔW‖². What an adapter may lose is therefore shared
between the basis, which leaves out directions for all, and the adapter's own cores, which leave
out those of their singular directions that hold least:

    ΔW_i = U C_i V + E_i,  C_i = Σ_j σ_j p_j q_jᵀ      ‖ΔW_i − U C_i' V‖² = ‖E_i‖² + Σ_dropped σ_j²,

exactly, since E_i is orthogonal to all of U · V (Eckart and Young 1936 for each core). A
direction costs R_u + R_d numbers on its layer, so that the best ones to drop, for a given loss
over all layers, are those with the least σ² for each number: a knapsack filled in order of worth
(Dantzig 1957), at most one direction short of the optimum.

The more adapters there are, the less a direction of the basis costs each of them, and the more of
the budget is better spent on the cores. :func:`split` finds out how much by trying.

Shapes: L layers, N adapters, r the highest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasmith.fleet.codec import Rows
from lorasmith.fleet.codes import FACTORED, FULL, Layer
from lorasmith.fleet.joint import choose

__all__ = ["kept_ranks", "split", "trim"]

#: Shares of the budget that the basis may have; the next is tried while bytes fall.
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)


def kept_ranks(energies: Tensor, costs: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """How many directions each adapter keeps on each layer, so that it loses no more than it may.

    Args:
        energies: σ² [L, N, r], falling along the last dimension, zero beyond an adapter's rank.
        costs: What a direction costs on each layer, [L]; positive where there is any.
        room: The most that each adapter may lose by this over all layers, [N].

    Returns:
        Ranks [L, N], int64, where directions of nothing are dropped in any case; and what is lost
        by it [L, N], float64.
    """
    L, N, r = energies.shape
    # From the last direction of a layer to the first: of equal ones the last goes first.
    wide = energies.to(torch.float64).clamp_min(0).flip(-1)
    worth = wide / costs.to(torch.float64).clamp_min(1)[:, None, None]
    flat = wide.transpose(0, 1).reshape(N, L * r)
    order = worth.transpose(0, 1).reshape(N, L * r).argsort(dim=1, stable=True)
    lost = flat.gather(1, order).cumsum(1)
    # Worth grows towards the first direction, so that what goes of a layer is its tail.
    fits = lost <= room.to(torch.float64).clamp_min(0)[:, None]
    gone = torch.zeros(N, L * r, dtype=torch.bool, device=energies.device)
    gone = gone.scatter_(1, order, fits).view(N, L, r).transpose(0, 1)
    return (~gone).sum(-1), torch.where(gone, wide, 0.0).sum(-1)


def split(
    lost: Sequence[Tensor],
    pairs: Sequence[Sequence[tuple[int, int]]],
    cost: Callable[[int, Tensor], Tensor],
    energies: Tensor,
    budget: Tensor,
) -> list[int]:
    """The directions of the basis, such that basis and trimmed cores together take least.

    Args:
        lost: For each layer [N, options] what each adapter loses by the basis alone.
        pairs: For each layer (R_u, R_d) of each option.
        cost: Called with the number of a layer and the ranks of the cores there [N]; what each
            option costs [options].
        energies: σ² of ΔW [L, N, r], falling, zero beyond an adapter's rank. Those of a core are
            not larger.
        budget: The most that each adapter may lose in all, [N].

    Returns:
        The option of each layer. An adapter loses no more than its budget by them, and
        :func:`kept_ranks` has the rest for its core.
    """
    L = len(pairs)
    best, least = None, float("inf")
    for share in _SHARES:
        # Which directions will go depends on what they cost, which is not known yet.
        ranks, _ = kept_ranks(energies, torch.ones(L), (1 - share) * budget)
        chosen = choose(lost, [cost(i, ranks[i]) for i in range(L)], share * budget)
        gone = torch.stack([lost[i][:, c] for i, c in enumerate(chosen)]).sum(0)
        if share < 1 and bool((gone > budget).any()):
            break  # no such basis: there are not so many directions
        taken = torch.tensor([float(sum(pairs[i][c])) for i, c in enumerate(chosen)])
        kept, _ = kept_ranks(energies, taken, budget - gone)
        total = sum(float(cost(i, kept[i])[c]) for i, c in enumerate(chosen))
        if total >= least:
            break
        best, least = chosen, total
    assert best is not None
    return best


def trim(layers: Sequence[Layer], room: Tensor) -> Tensor:
    """Takes out of cores what is not worth its bytes. Nothing else is changed.

    Cores in factors have them in the balanced gauge
    (:func:`lorasmith.fleet.share.balance`), so that the rows j of left and right are at right
    angles to all others and hold σ_j = ‖left_j‖ ‖right_j‖; full cores are taken apart. A full
    core that can be held in factors for less is, others stay whole.

    Args:
        layers: Of a joint basis, not rounded; changed.
        room: The most that each adapter may lose by it over all layers, [N].

    Returns:
        ‖C − C'‖² [N, L], float64.
    """
    apart = [_apart(layer) for layer in layers]
    most = max([1, *(left.shape[1] for left, _ in apart)])
    L, N = len(layers), len(room)
    energies = torch.zeros(L, N, most, dtype=torch.float64)
    for i, (left, right) in enumerate(apart):
        squares = [x.to(torch.float64).square().sum(2) for x in (left, right)]
        energies[i, :, : left.shape[1]] = squares[0] * squares[1]
    # Rounding may put nearly equal ones in the wrong order.
    ordered = energies.flip(-1).cummax(-1)[0].flip(-1)
    costs = torch.tensor([float(sum(layer.ranks)) for layer in layers])
    ranks, _ = kept_ranks(ordered, costs, room)
    lost = torch.zeros(N, L, dtype=torch.float64)
    for i, (layer, (left, right)) in enumerate(zip(layers, apart, strict=True)):
        Ru, Rd = layer.ranks
        kind, index = layer.index[:, 0], layer.index.clone()
        cut = (kind == FACTORED) | ((kind == FULL) & (ranks[i] * (Ru + Rd) < Ru * Rd))
        keep = (torch.arange(left.shape[1]) < ranks[i][:, None]) & cut[:, None]
        lost[:, i] = (energies[i, :, : left.shape[1]] * (cut[:, None] & ~keep)).sum(1)
        index[cut, 0] = FACTORED
        index[cut, 1:3] = keep.sum(1)[cut].unsqueeze(1)
        before = torch.split(layer.right.unpack(), layer.index[:, 2].tolist())
        rows = [right[n, keep[n]] if cut[n] else before[n] for n in range(N)]
        layer.left, layer.right = Rows.pack(left[keep]), Rows.pack(torch.cat(rows))
        layer.index = index
    return lost


def _apart(layer: Layer) -> tuple[Tensor, Tensor]:
    """The cores as left [N, k, R_u] and right [N, k, R_d], balanced, filled up with zeros."""
    kind, many = layer.index[:, 0], layer.index[:, 2]
    Ru, Rd = layer.ranks
    full, factored = kind == FULL, kind == FACTORED
    most = max([0, *many[factored].tolist(), *([min(Ru, Rd)] if bool(full.any()) else [])])
    left, right = torch.zeros(len(kind), most, Ru), torch.zeros(len(kind), most, Rd)
    own = torch.arange(most) < torch.where(factored, many, 0)[:, None]
    values = layer.right.unpack()
    left[own] = layer.left.unpack()  # full cores have no rows there
    right[own] = values[torch.repeat_interleave(factored, many)]
    if most and bool(full.any()):
        cores = values[torch.repeat_interleave(full, many)].view(int(full.sum()), Ru, Rd)
        P, S, Q = torch.linalg.svd(cores.to(torch.float64), full_matrices=False)
        root = S.sqrt().unsqueeze(-1)
        size = S.shape[1]
        left[full, :size] = (root * P.mT).to(torch.float32)
        right[full, :size] = (root * Q).to(torch.float32)
    return left, right
