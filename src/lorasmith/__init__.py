"""lorasmith: train, diagnose, manage and serve LoRA-family adapters.

    import lorasmith as ls

    adapter = ls.attach(model, ls.LoRAConfig(r=16))
    ...                               # any loop, HF Trainer, TRL
    ls.save(model, "my-adapter")      # a PEFT directory

Names are loaded on first use (PEP 562), so that ``import lorasmith`` and
``lorasmith --help`` do not wait for PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name → module that defines it: the one list of what is exported.
_EXPORTS = {
    "Adapter": "lorasmith.core.adapter",
    "AdapterConfig": "lorasmith.core.config",
    "AdapterWeights": "lorasmith.io",
    "DoRAConfig": "lorasmith.adapters",
    "Factors": "lorasmith.core.variant",
    "FuseReport": "lorasmith.core.fusing",
    "IA3Config": "lorasmith.adapters",
    "IA3FFConfig": "lorasmith.adapters",
    "LoRAConfig": "lorasmith.adapters",
    "LorasmithError": "lorasmith.errors",
    "Variant": "lorasmith.core.variant",
    "attach": "lorasmith.core.attach",
    "attached": "lorasmith.core.adapter",
    "config_from_dict": "lorasmith.core.registry",
    "detach": "lorasmith.core.attach",
    "factors": "lorasmith.io",
    "fuse": "lorasmith.core.fusing",
    "load": "lorasmith.io",
    "read_adapter": "lorasmith.io",
    "register": "lorasmith.core.registry",
    "save": "lorasmith.io",
    "unfuse": "lorasmith.core.fusing",
    "use": "lorasmith.core.attach",
    "variants": "lorasmith.core.registry",
}

if TYPE_CHECKING:
    from lorasmith.adapters import DoRAConfig as DoRAConfig
    from lorasmith.adapters import IA3Config as IA3Config
    from lorasmith.adapters import IA3FFConfig as IA3FFConfig
    from lorasmith.adapters import LoRAConfig as LoRAConfig
    from lorasmith.core.adapter import Adapter as Adapter
    from lorasmith.core.adapter import attached as attached
    from lorasmith.core.attach import attach as attach
    from lorasmith.core.attach import detach as detach
    from lorasmith.core.attach import use as use
    from lorasmith.core.config import AdapterConfig as AdapterConfig
    from lorasmith.core.fusing import FuseReport as FuseReport
    from lorasmith.core.fusing import fuse as fuse
    from lorasmith.core.fusing import unfuse as unfuse
    from lorasmith.core.registry import config_from_dict as config_from_dict
    from lorasmith.core.registry import register as register
    from lorasmith.core.registry import variants as variants
    from lorasmith.core.variant import Factors as Factors
    from lorasmith.core.variant import Variant as Variant
    from lorasmith.errors import LorasmithError as LorasmithError
    from lorasmith.io import AdapterWeights as AdapterWeights
    from lorasmith.io import factors as factors
    from lorasmith.io import load as load
    from lorasmith.io import read_adapter as read_adapter
    from lorasmith.io import save as save

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    from importlib import import_module

    # The variants register themselves; whoever asks for anything may meet one.
    import_module("lorasmith.adapters")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
