"""What fine-tuning did to the weights: angles, spectra, diversity, and what is still known.

Nothing here writes a weight: tensors are read, one at a time, and frozen records returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

#: Name → module that defines it; loaded on first use (PEP 562).
_EXPORTS = {
    "Comparison": "lorasmith.diagnostics.compare",
    "RotationReport": "lorasmith.diagnostics.records",
    "UnitRotation": "lorasmith.diagnostics.records",
    "compare": "lorasmith.diagnostics.compare",
    "diagnose": "lorasmith.diagnostics.rotation",
}

if TYPE_CHECKING:
    from lorasmith.diagnostics.compare import Comparison as Comparison
    from lorasmith.diagnostics.compare import compare as compare
    from lorasmith.diagnostics.records import RotationReport as RotationReport
    from lorasmith.diagnostics.records import UnitRotation as UnitRotation
    from lorasmith.diagnostics.rotation import diagnose as diagnose

__all__ = ["Comparison", "RotationReport", "UnitRotation", "compare", "diagnose"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lorasmith.diagnostics' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
