"""Several tasks' adapters into one, when the stress controller leaves Multi.

Each layer's factors become the best rank-r form of the mean of the tasks' B A
(:func:`~.stress_signals.merge_products`), in the gauge in which A is nearest to the mean of the
A_t; everything else that trains becomes its mean. The optimiser's moments become the mean of the
tasks' moments, which that gauge keeps meaningful, or zero where there is none such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorasmith.dynamics.protocol import Site
from lorasmith.dynamics.stress_signals import align_gauge, merge_products

__all__ = ["merge_adapters"]


def merge_adapters(
    sites: Sequence[tuple[Site, Sequence[Site]]],
    parameters: Mapping[str, nn.Parameter],
    copies: Sequence[Mapping[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Writes the merge to the shared adapter and to its state in the optimiser.

    Args:
        sites: Each layer's shared site, and those of the tasks.
        parameters: Key → parameter of the shared adapter.
        copies: The same of each task's adapter.
        optimizer: Whose state is merged.

    Returns:
        The relative error of ΔW over all layers, from what rank r cannot hold.
    """
    unaligned: set[int] = set()
    factors: set[int] = set()
    lost = total = 0.0
    for site, mine in sites:
        V, US, cut, whole = merge_products([s.A for s in mine], [s.B for s in mine])
        mean_A = torch.stack([s.A.detach().to(V.dtype) for s in mine]).mean(dim=0)
        A, B, aligned = align_gauge(V, US, mean_A)
        site.A.copy_(A)
        site.B.copy_(B)
        factors |= {id(site.A), id(site.B)}
        if not aligned:
            unaligned |= {id(site.A), id(site.B)}
        lost += site.scaling**2 * float(cut)
        total += site.scaling**2 * float(whole)
    for key, parameter in parameters.items():
        mine_there = [copy[key] for copy in copies]
        if id(parameter) not in factors:
            parameter.copy_(torch.stack([p.detach() for p in mine_there]).mean(dim=0))
        _average_state(optimizer, parameter, mine_there, zero=id(parameter) in unaligned)
    return math.sqrt(lost / total) if total > 0 else 0.0


def _average_state(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    copies: Sequence[nn.Parameter],
    *,
    zero: bool,
) -> None:
    """The copies' mean optimiser state becomes the parameter's; moments 0 with ``zero``."""
    states = [s for s in (optimizer.state.get(p) for p in copies) if s]
    if not states:
        return
    mine = optimizer.state[parameter]
    for key, first in states[0].items():
        values = [s[key] for s in states if key in s]
        if not isinstance(first, Tensor):
            mine[key] = max(values) if isinstance(first, int | float) else first
        elif first.shape == parameter.shape:
            mine[key] = torch.zeros_like(first) if zero else torch.stack(values).mean(dim=0)
        else:  # counters: the longest-trained copy knows best how far moments have warmed up
            mine[key] = torch.stack(values).amax(dim=0)
