"""IA3-FF: learned gains on the inputs of layers alone.

Source: Liu et al. 2022 (arXiv 2205.05638), the feed-forward half of IA3 (see ``ia3``),
applied to every target.

    y = W (l ∘ x) + b            x [d_in], l [d_in] trainable, W and b frozen

Identity at t = 0: l = 1.

Files: PEFT's ``IA3`` with every target also in ``feedforward_modules``. A file of PEFT's
own that is so reads as ``ia3`` with ``feedforward``, which computes the same.

Works on quantised layers; fuses exactly up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lorasmith.adapters.ia3 import IA3
from lorasmith.core.config import AdapterConfig

__all__ = ["IA3FF", "IA3FFConfig"]


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """Configuration of IA3-FF; the fields are those of every variant."""

    variant: ClassVar[str] = "ia3_ff"


class IA3FF(IA3):
    """y = W (l ∘ x) + b."""

    name = "ia3_ff"
    formula = "y = W (l ∘ x)"
    config_class: ClassVar[type[AdapterConfig]] = IA3FFConfig

    @staticmethod
    def on_input(config: Any, module_name: str) -> bool:
        return True

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> None:
        # A file cannot tell the two apart unless our own record beside it does; IA3 with
        # ``feedforward`` reads every file of PEFT.
        return None
