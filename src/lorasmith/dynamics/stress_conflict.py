"""Between which tasks the stress controller sees conflict: their gradients, their deltas.

A task's gradient is estimated from whole steps: a step with token shares w_t has
g = Σ w_t g_t, and the estimates move by

    ĝ_t += 0.1 · w_t / Σw² · (g − Σ w_u ĝ_u),

a plain average where each step has one task. Steps that always mix the tasks in equal shares
cannot tell them apart, and show no conflict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.dynamics.protocol import Site
from lorasmith.dynamics.stress_signals import gradient_gram, inner

__all__ = ["TaskGradients", "gram_of_products"]

_RATE = 0.1


class TaskGradients:
    """Each task's average gradient on the factors of some sites.

    Attributes:
        estimates: Task → ĝ: A's and B's of each site in turn, float32.
        counts: Task → steps that it had a part in.
    """

    def __init__(self) -> None:
        self.estimates: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    def learn(self, sites: Iterable[Site], tokens: Mapping[str, float]) -> None:
        """Takes in the gradients of a step, by how many tokens each task had in it."""
        total = sum(tokens.values())
        if not total > 0:
            return
        shares = {t: n / total for t, n in tokens.items() if n > 0}
        gradients = [
            torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()
            for site in sites
            for p in (site.A, site.B)
        ]
        for task in shares:
            if task not in self.estimates:
                self.estimates[task] = [torch.zeros_like(g) for g in gradients]
            self.counts[task] = self.counts.get(task, 0) + 1
        if len(shares) == 1:
            (task,) = shares
            torch._foreach_lerp_(self.estimates[task], gradients, _RATE)
            return
        rest = [g.clone() for g in gradients]
        for task, share in shares.items():
            torch._foreach_add_(rest, self.estimates[task], alpha=-share)
        squares = sum(share**2 for share in shares.values())
        for task, share in shares.items():
            torch._foreach_add_(self.estimates[task], rest, alpha=_RATE * share / squares)

    def gram(self, sites: Iterable[Site], tasks: Sequence[str]) -> Tensor | None:
        """Inner products [T, T] of those tasks that are known well; ``None`` below two."""
        known = [t for t in tasks if self.counts.get(t, 0) >= round(1 / _RATE)]
        if len(known) < 2:
            return None
        total: Tensor | None = None
        for i, site in enumerate(sites):
            pairs = [self.estimates[t][2 * i : 2 * i + 2] for t in known]
            gram = gradient_gram(site.A, site.B, [a for a, _ in pairs], [b for _, b in pairs])
            total = gram if total is None else total + gram.to(total.device)
        return total

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "estimates": {t: list(g) for t, g in self.estimates.items()},
            "counts": dict(self.counts),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], sites: Iterable[Site]) -> TaskGradients:
        """The estimates that a state is of, each on the device of its factor."""
        made = cls()
        factors = [p for site in sites for p in (site.A, site.B)]
        made.counts = dict(state["counts"])
        made.estimates = {
            task: [g.to(p.device, copy=True) for g, p in zip(values, factors, strict=True)]
            for task, values in state["estimates"].items()
        }
        return made


def gram_of_products(layers: Iterable[Sequence[tuple[Tensor, Tensor]]]) -> Tensor | None:
    """Inner products [T, T] of T tasks, summed over layers.

    Args:
        layers: By layer, each task's (Q, P); its delta is P Q.
    """
    total: Tensor | None = None
    for products in layers:
        gram = torch.stack(
            [torch.stack([inner(*one, *other) for other in products]) for one in products]
        )
        total = gram if total is None else total + gram.to(total.device)
    return total
