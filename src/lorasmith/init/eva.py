"""EVA: start from the principal directions of the layer's inputs.

Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
Variance Adaptation" (arXiv 2410.07170), section 3 and algorithm 1; semantics of PEFT 0.21.2.

    X [tokens, d_in] the layer's inputs, less their mean;   X = U Σ Vᵀ
    A = V_rᵀ [r, d_in],   B = 0

Identity at t = 0 since B = 0; ΔW = 0 and W is not touched.

Ranks (``rho`` above 1): of all directions k ≤ ρ r of all layers those that explain the
largest share σ_k² / Σσ² of their layer's variance are kept, as many as there were ranks to
give away. The scaling of a layer stays what it was (its alpha moves with its rank) unless
``adjust_scaling`` is false.

The directions come from sums whose size does not depend on the number of tokens: see
``core.calibration``.

Deviations. From the paper: the mean of the inputs is subtracted, as in the authors' code and
in PEFT; ``centered=False`` leaves it in. From PEFT: every batch is seen once and none is
left out for convergence; a layer keeps at least rank 1 (PEFT takes it out of the adapter);
padded tokens are left out, prompt tokens (labels of −100) are not.

Needs calibration data with at least r tokens. Works on quantised layers.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lorasmith.init.types import (
    NO_STATISTICS,
    Initialisation,
    Shape,
    Start,
    Weight,
    blank,
    check_flag,
    check_number,
    check_rank,
)

if TYPE_CHECKING:
    from lorasmith.core.calibration import InputComponents
    from lorasmith.core.variant import BaseLayer

__all__ = ["EVA"]

_WHAT = "r features, and r tokens of calibration data"


@dataclass(frozen=True)
class EVA(Initialisation):
    """A as above, B zero.

    Args:
        rho: Largest rank of a layer as a multiple of r; 1 leaves all ranks alone.
        whiten: Whether each direction is divided by √σ.
        adjust_scaling: Whether alpha moves with a layer's rank, so that s stays.
        centered: Whether the mean of the inputs is subtracted.
    """

    name: ClassVar[str] = "eva"

    rho: float = 2.0
    whiten: bool = False
    adjust_scaling: bool = True
    centered: bool = True

    def __post_init__(self) -> None:
        check_number(self.name, "rho", self.rho, at_least=1)
        for key in ("whiten", "adjust_scaling", "centered"):
            check_flag(self.name, key, getattr(self, key))

    def _most(self, rank: int) -> int:
        return round(rank * self.rho)

    def statistics(self, rank: int) -> frozenset[str]:
        kind = "inputs_svd" if self.centered else "raw_inputs_svd"
        return frozenset({f"{kind}:{self._most(rank)}"})

    @staticmethod
    def _components(statistics: Mapping[str, Any]) -> InputComponents:
        found: InputComponents = next(v for k, v in statistics.items() if "inputs_svd:" in k)
        return found

    def adjust(self, config: Any, bases: Sequence[BaseLayer]) -> Any:
        found = {b.info.name: self._components(b.statistics) for b in bases}
        if self.rho == 1 or any(c.singular.is_meta for c in found.values()):
            return config
        budget = {name: config.rank_of(name) for name in found}
        for name, components in found.items():
            check_rank(self.name, budget[name], len(components.vectors), _WHAT)
        shares = {n: c.explained[: self._most(budget[n])].tolist() for n, c in found.items()}
        # One each, then whatever explains most.
        rest = [(share, name) for name, all_ in shares.items() for share in all_[1:]]
        kept = heapq.nlargest(max(0, sum(budget.values()) - len(budget)), rest)
        ranks = dict.fromkeys(budget, 1)
        for _, name in kept:
            ranks[name] += 1
        if ranks == budget:
            return config
        # A key also matches the end of a longer name, and the first that matches counts.
        order = sorted(ranks, key=lambda n: -len(n))
        alphas = {
            n: config.alpha_of(n) * (ranks[n] / budget[n] if self.adjust_scaling else 1)
            for n in order
        }
        return dataclasses.replace(
            config, rank_pattern={n: ranks[n] for n in order}, alpha_pattern=alphas
        )

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        if shape.device.type == "meta":
            return blank(shape, rank)
        found = self._components(statistics)
        check_rank(self.name, rank, len(found.vectors), _WHAT)
        a = found.vectors[:rank]
        if self.whiten:
            a = a / found.singular[:rank, None].sqrt().clamp_min(torch.finfo(a.dtype).tiny)
        b = torch.zeros(shape.d_out, rank, device=shape.device)
        return Start(a.to(shape.device).clone(), b)
