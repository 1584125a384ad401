"""Low-rank factors of whatever a model carries: our adapters, HF PEFT's, or plain parameters."""

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
        model: A model with adapters of ours, a ``PeftModel`` with LoRA layers, or any module
            that carries ``lora_A`` [r, d_in] and ``lora_B`` [d_out, r] as parameters or as
            ``nn.Linear``, with ``scaling`` beside them if it is not 1.
        name: Which adapter; by default the active one. Plain parameters have no names.

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
        found = _peft_factors(root, name) or ({} if name else _plain_factors(root))
    if not found:
        raise UnknownNameError(
            "No low-rank factors were found on the model.",
            expected="adapters attached by lorasmith, PEFT layers with lora_A and lora_B, or "
            "modules that carry such parameters",
            got=_found(root, name),
            fix="attach one with low-rank factors (LoRA, DoRA) first",
        )
    return found


def _found(root: nn.Module, name: str | None) -> str:
    if not attached(root):
        return f"{type(root).__name__} without an adapter" + (f" {name!r}" if name else "")
    adapter = get_adapter(root, name)
    return f"{type(root).__name__} with the {adapter.config.variant} adapter {adapter.name!r}"


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


def _plain_factors(root: nn.Module) -> dict[str, Factors]:
    """Of modules with parameters ``lora_A`` and ``lora_B``, as in loralib and small scripts."""
    found = {}
    for module_name, module in root.named_modules():
        A, B = (_plain(getattr(module, key, None)) for key in ("lora_A", "lora_B"))
        if A is None or B is None or A.shape[0] != B.shape[1]:
            continue
        scaling = getattr(module, "scaling", 1.0)
        weight = getattr(module, "weight", None)
        fits = isinstance(weight, Tensor) and weight.shape == (B.shape[0], A.shape[1])
        info = describe(module, module_name) if fits else None
        found[module_name] = Factors(
            A,
            B,
            float(scaling) if isinstance(scaling, int | float) else 1.0,
            base=None if info is None else BaseLayer(module, info),
        )
    return found


def _plain(value: object) -> Tensor | None:
    weight = value.weight if isinstance(value, nn.Linear) else value
    return weight if isinstance(weight, nn.Parameter) and weight.dim() == 2 else None
