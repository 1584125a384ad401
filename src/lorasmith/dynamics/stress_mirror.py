"""What Mirror does to the factors: how far they are from a snapshot, and the pull towards it.

    drift = ‖ΔW − ΔW_s‖ / (‖ΔW‖ + ‖ΔW_s‖)    over all layers, in [0, 1]
    pull  = gradient of ½ κ ‖s (B A − B_s A_s)‖²

Both from r × r products (:mod:`~.stress_signals`); layers without two trained factors take no
part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorasmith.dynamics.protocol import Site, Step
from lorasmith.dynamics.snapshot import Snapshot
from lorasmith.dynamics.stress_signals import difference, inner, pull_gradient

__all__ = ["add_pull", "drift"]


def drift(sites: Iterable[Site], snapshot: Snapshot) -> Tensor | None:
    """Drift from the snapshot, 0-dimensional; ``None`` if it has none of the sites."""
    sums: list[list[Tensor]] = []
    for site in sites:
        old = snapshot.of(site)
        if old is None:
            continue
        frozen = (site.factors.A0, site.factors.B0)
        norms = [inner(*difference(site.A, site.B, *old))]
        for A, B in ((site.A, site.B), old):
            start = frozen if frozen[0] is not None and frozen[1] is not None else None
            Q, P = (
                (A.detach().float(), B.detach().float())
                if start is None
                else difference(A, B, *start)  # type: ignore[arg-type]
            )
            norms.append(inner(Q, P))
        sums.append([n * site.scaling**2 for n in norms])
    if not sums:
        return None
    device = sums[0][0].device
    table = torch.stack([torch.stack(row).to(device) for row in sums]).sum(dim=0)
    change, now, then = table.clamp(min=0).sqrt().unbind()
    return change / (now + then).clamp(min=1e-30)


def add_pull(
    step: Step, sites: Sequence[Site], snapshot: Snapshot, *, pull: float, kappa: float | None
) -> None:
    """Adds the pull to the gradients of the factors that have one.

    Args:
        step: The step.
        sites: Whose factors.
        snapshot: Where to.
        pull: The norm of the pull is this × drift × the norm of the task's gradient, over all
            factors.
        kappa: κ itself instead; ``None`` for ``pull``.
    """
    if kappa == 0 or (pull == 0 and kappa is None):
        return
    found: list[tuple[Tensor, Tensor]] = []
    for site in sites:
        old = snapshot.of(site)
        if old is not None and site.A.grad is not None and site.B.grad is not None:
            pulls = pull_gradient(site.A, site.B, *old, site.scaling)
            found += zip((site.A, site.B), pulls, strict=True)
    if not found:
        return
    strength: Tensor | float
    if kappa is not None:
        strength = kappa
    else:
        distance = drift(sites, snapshot)
        assert distance is not None
        task = _norm([p.grad for p, _ in found if p.grad is not None])
        strength = pull * distance * task / _norm([g for _, g in found]).clamp(min=1e-30)
    for parameter, gradient in found:
        factor = strength.to(gradient.device) if isinstance(strength, Tensor) else strength
        step.add_gradient(parameter, gradient * factor)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm([t.float() for t in tensors])
    total: Tensor = torch.stack([n.to(norms[0].device) for n in norms]).square().sum().sqrt()
    return total
