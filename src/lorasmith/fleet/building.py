"""What the two ways to build a shared subspace have in common: the target, and what comes out.

The number of directions a layer is chosen last, by one of

* ``error``: the most that any adapter may lose, Σ_l ‖ΔW_l − ΔŴ_l‖² / Σ_l ‖ΔW_l‖², for the
  fewest bytes (:func:`lorasmith.fleet.joint.choose`). Of the joint basis each adapter's cores
  are cut as well, to the rank that it needs (:mod:`lorasmith.fleet.trimming`);
* ``variance``: the least share of ‖ΔW‖² to keep, of each layer, in the mean over the adapters;
* ``components``: as many, on every layer.

Factors come from :mod:`lorasmith.fleet.stacks`; :mod:`lorasmith.fleet.building_joint` and
:mod:`lorasmith.fleet.building_share` build the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lorasmith.fleet.codes import Layer

__all__ = [
    "GAUGES",
    "Built",
    "FixedGauge",
    "Gauge",
    "Progress",
    "Target",
    "counts_tried",
    "unit_of",
]

#: What is done to factors before they are flattened for the Share basis.
FixedGauge = Literal["aligned", "balanced", "stored"]
#: The same, or whichever is best.
Gauge = Literal["auto", "aligned", "balanced", "stored"]
GAUGES: tuple[FixedGauge, ...] = get_args(FixedGauge)
#: (phase, done, total).
Progress = Callable[[str, int, int], None]


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


def unit_of(total: Tensor) -> Tensor:
    """1 / norm, 1 where it is 0."""
    return torch.where(total > 0, total, torch.ones_like(total)).rsqrt()


def counts_tried(most: int) -> list[int]:
    """Numbers of directions that are tried: ever wider steps up to the most."""
    found, k = [], 1
    while k < most:
        found.append(k)
        k += max(1, k // 6)
    return [*found, most] if most else [0]
