"""Low-rank factors of whatever a model carries: our adapters, or HF PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from lorasmith.core.adapter import attached, get_adapter, unwrap
from lorasmith.core.layers import describe
from lorasmith.core.variant import BaseLayer, Factors
from lorasmith.errors import UnknownNameError

__all__ = ["factors_of"]


def factors_of(model: nn.Module, name: str | None = None) -> dict[str, Factors]:
    """Module name → factors of one adapter; the tensors are the live ones.

    Args:
        model: A model with adapters of ours, or a ``PeftModel`` with LoRA layers.
        name: Which adapter; by default the active one.

    Raises:
        UnknownNameError: If there is no such adapter or it has no low-rank layer; the
            message says what was looked for.
    """
    root = unwrap(model)
    if attached(root):
        found = {}
        for module_name, part in get_adapter(root, name).layers().items():
            factors = part.variant.factors(part)
            if factors is not None:
                base = BaseLayer(root.get_submodule(module_name), part.info)
                found[module_name] = _with_base(factors, base)
    else:
        found = _peft_factors(root, name)
    if not found:
        raise UnknownNameError(
            "No low-rank factors were found on the model.",
            expected="adapters attached by lorasmith, or PEFT layers with lora_A and lora_B",
            got=f"{type(root).__name__} with adapters {list(attached(root)) or 'none'}",
        )
    return found


def _with_base(factors: Factors, base: BaseLayer) -> Factors:
    return Factors(
        factors.A, factors.B, factors.scaling, factors.A0, factors.B0, factors.exact, base
    )


def _peft_factors(root: nn.Module, name: str | None) -> dict[str, Factors]:
    found = {}
    for module_name, module in root.named_modules():
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        scaling = getattr(module, "scaling", None)
        if not (isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict)):
            continue
        assert isinstance(scaling, Mapping)
        chosen = name
        if chosen is None:
            active = getattr(module, "active_adapters", None) or list(a)
            chosen = next(iter(active))
        if chosen not in a:
            continue
        layer = getattr(module, "base_layer", None)
        info = describe(layer, module_name) if isinstance(layer, nn.Module) else None
        variants = getattr(module, "use_dora", {})
        found[module_name] = Factors(
            cast("Tensor", a[chosen].weight),
            cast("Tensor", b[chosen].weight),
            float(scaling[chosen]),
            exact=not variants.get(chosen, False),
            base=None if info is None or layer is None else BaseLayer(layer, info),
        )
    return found
