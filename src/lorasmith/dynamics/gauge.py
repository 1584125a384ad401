"""Gauge projection: of all factors with the same product, the balanced ones, after every step.

Source: GP-LoRA (gauge-projected LoRA). B A does not change under A → R A, B → B R⁻¹, but the
path of an optimiser does: it sees A and B, not their product. After each step the factors
are moved to the point of that orbit where

    A Aᵀ = μ Bᵀ B          A [r, d_in], B [d_out, r], μ > 0

by the symmetric R that does it. Here are the rule and the function for factors in hand. R, what
is done where a factor is rank deficient, and how far a layer is from the constraint:
:mod:`~.gauge_solver`. Many layers at once: :mod:`~.gauge_layers`, in place by
:mod:`~.gauge_batches`. The optimiser's state (``moments="transport"``; ``moments="keep"`` leaves
all of it where it is): :mod:`~.gauge_moments`. The wrapper of an optimiser:
:mod:`~.gauge_optimizer`.

μ = r / d_out by default (``"auto"``), as in GP-LoRA: an entry of B is then about
√(d_in / r) times as large as one of A, so that under an optimiser with steps of one size
for all entries (Adam) A turns the faster of the two. μ = 1 shares the singular values of
B A evenly, √σ each. ``"auto"`` is what was published, not a proven best. μ may be given for
each layer.

Deviations from GP-LoRA's code: no ε (with it the constraint fails for small B, and A shrinks
to zero at B = 0); float64 inside; moments are transported; all layers at once. The frozen
part of PiSSA-like starts stays: the gauge acts on A and B alone, whose product is kept, and
so are ΔW and what DoRA makes of it.

Limits: a GPU waits once a projection. Factors stored in bfloat16 or float16 are refused unless
asked for: rounding them moves B A by some 2e-3 (bfloat16) at each projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasmith.dynamics.gauge_layers import (
    AnyFactors,
    Group,
    Mu,
    Projector,
    check_options,
    largest,
    of_factors,
    of_sites,
)
from lorasmith.dynamics.gauge_moments import (
    STATE_RULES,
    Moments,
    check_optimizer,
    check_owned,
)
from lorasmith.dynamics.gauge_optimizer import GaugeProjectedOptimizer
from lorasmith.dynamics.gauge_solver import Core, gauge_residual, gauge_transform
from lorasmith.dynamics.protocol import Dynamic, Site, Step
from lorasmith.dynamics.sites import find_sites
from lorasmith.errors import ConfigError

__all__ = [
    "STATE_RULES",
    "GaugeProjectedOptimizer",
    "GaugeProjection",
    "GaugeReport",
    "Mu",
    "gauge_residual",
    "gauge_transform",
    "project_gauge_",
]


class GaugeReport:
    """What a projection found and did. Numbers wait on their device until they are read.

    Residuals are those of the directions that A and B both have (``directions="common"`` of
    :func:`gauge_residual`), 0 where there are none.
    """

    def __init__(self, groups: Sequence[Group], cores: Sequence[Core], after: list[Tensor]):
        self._names = [name for group in groups for name in group.names]
        self._cores = cores
        self._after = after

    def _read(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        values = [value for tensor in tensors for value in tensor.tolist()]
        return dict(zip(self._names, values, strict=True))

    @property
    def before(self) -> dict[str, float]:
        """Layer → residual before (:func:`gauge_residual`); makes the device wait."""
        return self._read(core.residual for core in self._cores)

    @property
    def after(self) -> dict[str, float]:
        """Layer → residual right after; makes the device wait."""
        return self._read(self._after)

    @property
    def condition(self) -> dict[str, float]:
        """Layer → condition number of R, 1 where nothing was moved; makes the device wait."""
        return self._read(core.condition for core in self._cores)

    @property
    def directions(self) -> dict[str, int]:
        """Layer → directions that were balanced, r if none was left alone; makes it wait."""
        return self._read(core.directions for core in self._cores)

    def __repr__(self) -> str:
        if not self._names:
            return "GaugeReport(no layers)"
        before, after = max(self.before.values()), max(self.after.values())
        return f"GaugeReport({len(self._names)} layers, residual {before:.2g} -> {after:.2g})"


@torch.no_grad()
def project_gauge_(
    model_or_factors: nn.Module | AnyFactors | Mapping[str, AnyFactors] | Sequence[AnyFactors],
    mu: Mu = "auto",
    *,
    adapter: str | None = None,
    allow_low_precision: bool = False,
) -> GaugeReport:
    """Balances factors in place: A Aᵀ = μ Bᵀ B with B A as it was.

        ls.project_gauge_(model)                 # an adapter of ours, or a PeftModel
        ls.project_gauge_([(A, B)], mu=1.0)

    Args:
        model_or_factors: A model with a low-rank adapter (ours, a ``PeftModel``, or modules
            with ``lora_A`` and ``lora_B``), of which the layers whose A and B are trained are
            projected; or ``Factors`` or (A, B), one, a sequence, or a mapping of them by name.
            A [r, d_in], B [d_out, r].
        mu: μ: a positive number, ``"auto"`` for r / d_out, or a function of a layer's name
            and ``Factors``.
        adapter: Of a model: which adapter; by default the active one.
        allow_low_precision: Also projects factors stored in bfloat16 or float16, at the price
            of rounding them.

    Returns:
        What was found and done; nothing in it makes the device wait before it is read.

    Raises:
        TrainingError: If factors are not finite; the message names the layer, and no factor
            of its rank has been changed.
        ConfigError: If factors do not fit, are shared between layers, or μ is unusable.
        UnknownNameError: If the model has no low-rank layers.
    """
    check_options(mu, 1, 0, "keep")
    if isinstance(model_or_factors, nn.Module):
        pairs = of_sites(find_sites(model_or_factors, adapter), mu)
    else:
        pairs = of_factors(model_or_factors, mu)
    projector = Projector(pairs, allow_low_precision=allow_low_precision)
    cores = projector.project()
    return GaugeReport(projector.groups, cores, projector.residuals())


class GaugeProjection(Dynamic):
    """Balances the factors after every step: A Aᵀ = μ Bᵀ B (see the module's text).

        ls.Dynamics(model, ls.GaugeProjection(), optimizer)

    Args:
        mu: μ: a positive number, ``"auto"`` for r / d_out, or a function of a layer's name
            and ``Factors``.
        every: Project after every so many optimiser steps.
        start_step: The first optimiser step, counted from 0, after which to project.
        moments: ``"transport"``: the optimiser's moments move with the factors. ``"keep"``:
            they stay as they are, as in GP-LoRA.
        allow_low_precision: Also act on factors stored in bfloat16 or float16, which are
            otherwise refused.

    Metrics: ``imbalance``, the largest residual that the last projection found before it
    acted; ``residual``, the largest now; both on the directions that A and B both have, as a
    layer with B = 0, which is all of them before the first step, has nothing to balance
    (``directions="common"`` of :func:`gauge_residual`). ``deficient``, the number of layers in
    which the last projection left a direction alone; ``condition``, the largest condition
    number of R.

    Raises:
        ConfigError: From ``bind``: layers share factors, or are stored in few bits. In a step:
            the optimiser keeps state that cannot be moved (``moments="transport"``).
        TrainingError: In a step: factors are not finite; the message names the layer.
    """

    name: ClassVar[str] = "gauge"
    last: ClassVar[bool] = True

    def __init__(
        self,
        mu: Mu = "auto",
        *,
        every: int = 1,
        start_step: int = 0,
        moments: Moments = "transport",
        allow_low_precision: bool = False,
    ) -> None:
        check_options(mu, every, start_step, moments)
        self.mu, self.every, self.start_step, self.moments = mu, every, start_step, moments
        self.allow_low_precision = allow_low_precision
        self._projector: Projector | None = None
        self._last: list[Core] = []

    def on_sites(self, sites: Sequence[Site]) -> None:
        _check_trained(sites)
        pairs = of_sites(sites, self.mu)
        self._projector = Projector(pairs, allow_low_precision=self.allow_low_precision)
        self._last = []
        optimizer = getattr(getattr(self, "context", None), "optimizer", None)
        if isinstance(optimizer, torch.optim.Optimizer):
            check_owned(optimizer, sites)
            if self.moments == "transport":
                check_optimizer(optimizer)

    def after_step(self, step: Step) -> None:
        done = step.number - self.start_step
        if self._projector is None or step.skipped or done < 0 or done % self.every:
            return
        state = step.optimizer.state if self.moments == "transport" else None
        self._last = self._projector.project(state)

    def metrics(self) -> dict[str, float]:
        if self._projector is None:
            return {}
        found = {"residual": largest(self._projector.residuals())}
        if self._last:
            found["imbalance"] = largest(core.residual for core in self._last)
            found["condition"] = largest(core.condition for core in self._last)
            left = [(core.directions < core.R.shape[-1]).sum() for core in self._last]
            found["deficient"] = float(sum(int(n) for n in left))
        return found


def _check_trained(sites: Sequence[Site]) -> None:
    for site in sites:
        for name, factor in (("A", site.factors.A), ("B", site.factors.B)):
            if not isinstance(factor, nn.Parameter) or not factor.requires_grad:
                what = "frozen" if isinstance(factor, nn.Parameter) else "not a parameter"
                raise ConfigError(
                    f"The factor {name} of layer {site.name!r} cannot be moved: it is {what}.",
                    expected="A and B that are both trained; the gauge changes both",
                    got=f"{name} {what}",
                    fix="train both (LoRA-FA and the like have no gauge to choose)",
                    key=site.name,
                )
