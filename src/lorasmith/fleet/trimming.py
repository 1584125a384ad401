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

from lorasmith.fleet.joint import choose

__all__ = ["kept_ranks", "split"]

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
