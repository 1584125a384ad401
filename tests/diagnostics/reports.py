"""Reports made up for the tests of figures and pages."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from lorasmith.diagnostics.modes import change_of, mode_of
from lorasmith.diagnostics.records import (
    HeadDiversity,
    LayerSpectrum,
    Retention,
    RotationReport,
    Skipped,
    UnitRotation,
)

_RETENTION = Retention("builtin", 4096, 17.61, 18.93, 0.0812, 0.871)
MLP = ("gate_proj", "up_proj", "down_proj")


def unit(theta: float, **changes: Any) -> UnitRotation:
    """A unit turned by θ, of the norm that it had."""
    radians = math.radians(theta)
    floor = changes.pop("floor_deg", 0.01)
    values: dict[str, Any] = {
        "name": "model.layers.0.self_attn.q_proj",
        "layer": 0,
        "projection": "q_proj",
        "role": "q",
        "head": 0,
        "parameters": 64 * 576,
        "theta_deg": theta,
        "norm_ratio": 1.0,
        "kept": math.cos(radians),
        "relative_change": 2 * math.sin(radians / 2),
        "floor_deg": floor,
        "mode": mode_of(theta, 1.0),
        "change": change_of(math.cos(radians), math.sin(radians), math.radians(floor), 64 * 576),
        "weight_norm": 12.0,
    }
    return UnitRotation(**{**values, **changes})


def report(
    layers: int | Sequence[int] = 4,
    heads: int = 4,
    kv_heads: int = 2,
    *,
    size: float = 1.0,
    spread: float = 0.6,
    attention: bool = True,
    mlp: bool = True,
    spectra: bool = True,
    intruders: bool = False,
    diversity: bool = True,
    retention: bool | Retention = True,
    seed: int = 0,
    **changes: Any,
) -> RotationReport:
    """A diagnosis of a Llama with angles about ``size`` degrees; ``heads=0``: by projection."""
    chance = random.Random(seed)
    numbers = list(range(layers)) if isinstance(layers, int) else list(layers)
    units, found, angles = [], [], []
    for number, layer in enumerate(numbers):
        slope = 0.5 + number / max(1, len(numbers) - 1)

        def theta(share: float, slope: float = slope) -> float:
            return min(179.0, size * share * slope * math.exp(chance.gauss(0, spread)))

        rows = [
            ("q", "self_attn.q_proj", heads, 1.0),
            ("k", "self_attn.k_proj", kv_heads if heads else 0, 1.4),
            ("v", "self_attn.v_proj", kv_heads if heads else 0, 0.7),
            ("o", "self_attn.o_proj", heads, 0.5),
        ]
        modules = [*(rows if attention else [])]
        modules += [("mlp", f"mlp.{name}", 0, 0.4) for name in MLP if mlp]
        for role, path, count, share in modules:
            name, projection = f"model.layers.{layer}.{path}", path.rpartition(".")[2]
            place = {"name": name, "layer": layer, "projection": projection, "role": role}
            cut = range(count) if count else [None]
            units += [unit(theta(share), head=head, **place) for head in cut]
            top = chance.uniform(0.5, 2.0)
            found.append(
                LayerSpectrum(
                    name,
                    layer,
                    projection,
                    rank=16,
                    effective_rank=chance.uniform(3, 12),
                    stable_rank=chance.uniform(1, 4),
                    singular_values=tuple(top * 0.75**i for i in range(16)),
                    energy_in_top=chance.random(),
                    top=10,
                    intruders=chance.randrange(4) if intruders else None,
                    intruder_cosines=(0.9, 0.4) if intruders else (),
                )
            )
            if count > 1 and role in ("q", "k", "v", "o"):
                before = chance.uniform(84, 89.5)
                matrix = tuple(
                    tuple(0.0 if i == j else before for j in range(count)) for i in range(count)
                )
                angles.append(
                    HeadDiversity(
                        name, layer, projection, role, before,
                        before + chance.gauss(-0.2, 0.1), matrix, matrix,
                    )
                )  # fmt: skip
    values: dict[str, Any] = {
        "base": "HuggingFaceTB/SmolLM2-135M",
        "tuned": "runs/dates",
        "per": "head" if heads else "projection",
        "units": tuple(units),
        "spectra": tuple(found) if spectra else (),
        "diversity": tuple(angles) if diversity else (),
        "retention": (_RETENTION if retention is True else retention) or None,
        "head_dim": 64,
        "skipped": (Skipped("model.vision.patch", "shape", "another shape"),),
        "unchanged": 1,
        "seconds": 1.25,
        "versions": {"lorasmith": "0.1.0", "torch": "2.13.0"},
    }
    return RotationReport(**{**values, **changes})
