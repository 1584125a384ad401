"""What a shared subspace tells of itself and of what was done to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorasmith.fleet.members import MemberRecord

__all__ = ["Absorbed", "Adapter", "BudgetWarning", "Projection", "Quantized", "Stats", "limit"]


#: Errors below this are float32's rounding: ‖ΔW‖² and what is kept of it come from products in
#: float32, each right to about 1e-7, and their difference can be no better.
ROUNDING = 1e-6


def limit(budget: float) -> float:
    """The budget and the rounding of what is compared with it."""
    return budget * (1 + 1e-6) + ROUNDING


class BudgetWarning(UserWarning):
    """An adapter has lost more of its change than the budget allows."""


@dataclass(frozen=True)
class Projection:
    """What a subspace holds of an adapter.

    Attributes:
        id: The adapter.
        error: Relative squared error of ΔW over all layers.
        layers: Module name → the same of one layer; 1 where the subspace has nothing.
        budget: What was allowed.
        residual_rank: Module name → rank of the residual that is kept beside the core.
        nbytes: Bytes that the adapter takes, basis not counted.
        codes: Module name → core [R_u, R_d], float32; empty unless made by ``project``.
    """

    id: str
    error: float
    layers: Mapping[str, float]
    budget: float
    residual_rank: Mapping[str, int] = field(default_factory=dict)
    nbytes: int = 0
    codes: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def within(self) -> bool:
        """Whether the error is within the budget, rounding aside."""
        return self.error <= limit(self.budget)

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "id": self.id,
            "error": self.error,
            "budget": self.budget,
            "within": self.within,
            "residual_rank": dict(self.residual_rank),
            "bytes": self.nbytes,
            "layers": dict(self.layers),
        }


@dataclass(frozen=True)
class Absorbed:
    """What extending the basis did.

    Attributes:
        added: One record a new adapter.
        moved: Id of an old adapter → ‖ΔŴ − ΔŴ'‖² / ‖ΔW‖² by the truncation, and by rounding
            anew where the fleet is in few bits; 0 where there was neither.
        ranks: Module name → (R_u, R_d) before and after.
    """

    added: tuple[Projection, ...]
    moved: Mapping[str, float]
    ranks: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "added": [p.to_dict() for p in self.added],
            "moved": dict(self.moved),
            "ranks": {m: [list(a), list(b)] for m, (a, b) in self.ranks.items()},
        }


@dataclass(frozen=True)
class Quantized:
    """What quantising did.

    Attributes:
        before: Bytes of basis, codes and residuals before.
        after: And after.
        moved: Id → ‖ΔŴ − ΔŴ'‖² / ‖ΔW‖², measured.
    """

    before: int
    after: int
    moved: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {"before": self.before, "after": self.after, "moved": dict(self.moved)}


@dataclass(frozen=True)
class Stats:
    """Bytes, counted on the tensors that are held.

    Attributes:
        adapters: Number of adapters.
        layers: Number of layers.
        basis: Bytes of U and V.
        codes: Bytes of all cores.
        residuals: Bytes of all residuals.
        rest: Bytes of what is carried beside the factors (magnitudes, modules_to_save).
        index: Bytes of the bookkeeping: which rows are whose, errors.
        original: Bytes of all tensors of the adapters as they were stored.
        original_rest: Of these, what is carried and not compressed.
        disk: Bytes of the files it was last saved to or loaded from, or ``None``.
        per_adapter: Id → bytes of its codes, residuals and rest.
        ranks: Module name → (R_u, R_d).
        codecs: Part → how it is stored.
    """

    adapters: int
    layers: int
    basis: int
    codes: int
    residuals: int
    rest: int
    index: int
    original: int
    original_rest: int
    disk: int | None
    per_adapter: Mapping[str, int]
    ranks: Mapping[str, tuple[int, int]]
    codecs: Mapping[str, str]

    @property
    def total(self) -> int:
        """All bytes in memory."""
        return self.basis + self.codes + self.residuals + self.rest + self.index

    @property
    def ratio(self) -> float:
        """Original bytes ÷ bytes in memory."""
        return self.original / self.total if self.total else math.inf

    @property
    def disk_ratio(self) -> float | None:
        """Original bytes ÷ bytes on disk."""
        return None if not self.disk else self.original / self.disk

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "adapters": self.adapters,
            "layers": self.layers,
            "bytes": {
                "basis": self.basis,
                "codes": self.codes,
                "residuals": self.residuals,
                "rest": self.rest,
                "index": self.index,
                "total": self.total,
                "original": self.original,
                "disk": self.disk,
            },
            "ratio": self.ratio,
            "disk_ratio": self.disk_ratio,
            "per_adapter": dict(self.per_adapter),
            "ranks": {m: list(r) for m, r in self.ranks.items()},
            "codecs": dict(self.codecs),
        }


@dataclass(eq=False)
class Adapter:
    """What a subspace holds of an adapter beside its codes.

    Attributes:
        id: Its name.
        record: What it takes to rebuild it.
        rest: Tensors beside the factors, as they were stored.
        nbytes: Bytes of all its tensors as they were stored.
        energy: ‖ΔW‖² of each layer [L], float64.
        lost: What of it is lost at most [L], float64.
    """

    id: str
    record: MemberRecord
    rest: dict[str, Tensor]
    nbytes: int
    energy: Tensor
    lost: Tensor

    @property
    def error(self) -> float:
        """Relative squared error over all layers."""
        whole = float(self.energy.sum())
        return float(self.lost.sum()) / whole if whole else 0.0
