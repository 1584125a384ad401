"""The adapter variants, one file each; importing this package registers them.

A new one is a file here and a line below.
"""

from __future__ import annotations

from lorasmith.adapters.dora import DoRA, DoRAConfig
from lorasmith.adapters.ia3 import IA3, IA3Config
from lorasmith.adapters.ia3_ff import IA3FF, IA3FFConfig
from lorasmith.adapters.lora import LoRA, LoRAConfig
from lorasmith.core.registry import register

__all__ = [
    "DoRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRAConfig",
]


for _variant in (LoRA(), DoRA(), IA3(), IA3FF()):
    register(_variant)
