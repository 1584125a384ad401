"""The adapter variants, one file each; importing this package registers them.

A new one is a file here and a line below.
"""

from __future__ import annotations

import sys
from types import ModuleType

from torch import nn

from lorasmith.adapters.dora import DoRA, DoRAConfig
from lorasmith.adapters.ia3 import IA3, IA3Config
from lorasmith.adapters.ia3_ff import IA3FF, IA3FFConfig
from lorasmith.adapters.lora import LoRA, LoRAConfig
from lorasmith.core.adapter import Adapter, adapters
from lorasmith.core.registry import register

__all__ = [
    "DoRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRAConfig",
]


class _CallableModule(ModuleType):
    """``lorasmith.adapters`` is this package and the function of the same name at once.

    The import system binds the name to the package, whatever ``lorasmith.__getattr__``
    would give; calling it gives what ``lorasmith.core.adapter.adapters`` gives.
    """

    def __call__(self, model: nn.Module) -> dict[str, Adapter]:
        return adapters(model)


sys.modules[__name__].__class__ = _CallableModule

for _variant in (LoRA(), DoRA(), IA3(), IA3FF()):
    register(_variant)
