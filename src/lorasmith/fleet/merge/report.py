"""What merging did, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.io.weights import AdapterWeights

__all__ = ["MergeReport", "Merged", "MergedLayer"]


@dataclass(frozen=True)
class MergedLayer:
    """One layer of a merge.

    Attributes:
        name: Name of the module.
        rank: Rank of the factors that were written.
        full_rank: Numerical rank of the merged ΔW; ``None`` where it was not looked for (the
            layer is large, or nothing was truncated).
        norm: ‖ΔW‖, Frobenius norm of the merged change before truncation.
        discarded: ‖ΔW − ΔW_r‖² / ‖ΔW‖², the share of its energy that truncation took; 0 where
            ΔW is 0. Storing the factors in float32 adds about 1e-7 of the norm.
        missing: Ids of the adapters that do not adapt the layer: their change of it is 0.
    """

    name: str
    rank: int
    full_rank: int | None
    norm: float
    discarded: float
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeReport:
    """What was merged how, and what of it was lost.

    Attributes:
        method: Name of the method.
        ids: The adapters.
        weights: The weight of each.
        options: The options of the method, defaults included.
        seed: Seed of the random numbers; ``None`` where the method draws none.
        layers: One record a layer.
        saved_modules: ``modules_to_save`` that were averaged → how: ``"mean"`` (weights of sum
            1) or ``"base"`` (base + Σ wᵢ (Tᵢ − base)).
        notes: What a reader should know, in sentences.
    """

    method: str
    ids: tuple[str, ...]
    weights: tuple[float, ...]
    options: Mapping[str, Any]
    seed: int | None
    layers: tuple[MergedLayer, ...]
    saved_modules: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def discarded(self) -> float:
        """Share of the energy of all layers that truncation took, 0 to 1."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        lost = math.fsum(layer.discarded * layer.norm**2 for layer in self.layers)
        return lost / total if total else 0.0

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all layers, before truncation."""
        return math.sqrt(math.fsum(layer.norm**2 for layer in self.layers))

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Id → the layers that this adapter does not adapt and another one does."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            for name in layer.missing:
                found.setdefault(name, []).append(layer.name)
        return {name: tuple(layers) for name, layers in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON can hold."""
        return {
            "method": self.method,
            "ids": list(self.ids),
            "weights": list(self.weights),
            "options": dict(self.options),
            "seed": self.seed,
            "discarded_energy": self.discarded,
            "norm": self.norm,
            "missing": {name: len(layers) for name, layers in self.missing.items()},
            "saved_modules": dict(self.saved_modules),
            "notes": list(self.notes),
            "layers": [{**asdict(layer), "missing": list(layer.missing)} for layer in self.layers],
        }

    def __str__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        worst = max(self.layers, key=lambda layer: layer.discarded)
        return (
            f"{self.method} of {len(self.ids)} adapters → lora of rank {shown} on "
            f"{len(self.layers)} layers: {self.discarded:.2%} of the energy discarded, "
            f"at most {worst.discarded:.2%} in a layer" + "".join(f"; {n}" for n in self.notes)
        )


@dataclass(frozen=True)
class Merged:
    """The adapter that came out of a merge, and the report of it.

    Attributes:
        weights: The adapter, a plain LoRA: ``merged.weights.save(path)``, or :meth:`save`.
        report: What was done.
    """

    weights: AdapterWeights
    report: MergeReport

    def save(self, path: str | os.PathLike[str], *, beside: bool = False) -> Path:
        """Writes the adapter as a PEFT directory, see :meth:`AdapterWeights.save`."""
        return self.weights.save(path, beside=beside)

    def to_dict(self) -> dict[str, Any]:
        """The report and the configuration, in types that JSON can hold."""
        return {
            **self.report.to_dict(),
            "parameters": self.weights.num_parameters,
            "config": self.weights.config.to_dict(),
        }

    def __str__(self) -> str:
        return str(self.report)
