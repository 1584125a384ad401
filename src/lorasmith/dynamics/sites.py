"""Where a model can be trained as low rank: the layers whose A and B are its parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lorasmith.core.adapter import attached, get_adapter, unwrap
from lorasmith.core.factors import factors_of
from lorasmith.core.variant import Factors
from lorasmith.dynamics.protocol import Site
from lorasmith.errors import ConfigError

__all__ = ["active_adapter", "find_sites"]


def active_adapter(model: nn.Module, name: str | None) -> str:
    """The adapter that is meant: ``name``, or the one that acts; ``""`` where none has a name."""
    root = unwrap(model)
    if attached(root):
        return get_adapter(root, name).name
    if name is not None:
        return name
    active = getattr(root, "active_adapter", None)  # PeftModel's: a name, or several
    if isinstance(active, str):
        return active
    return str(active[0]) if isinstance(active, Sequence) and active else ""


def find_sites(model: nn.Module, adapter: str | None = None) -> tuple[Site, ...]:
    """The layers of an adapter whose factors A and B are parameters that are being trained.

    Args:
        model: A model with adapters of ours, a ``PeftModel``, or one with modules that carry
            ``lora_A`` and ``lora_B`` (see :func:`lorasmith.core.factors.factors_of`).
        adapter: Its name; by default the active one.

    Raises:
        UnknownNameError: If nothing low-rank is found; the message says what was looked for.
        ConfigError: If what is found cannot be moved, and why.
    """
    root = unwrap(model)
    name = active_adapter(root, adapter)
    found = factors_of(root, name or None)
    magnitudes = _magnitudes(root, name)
    sites = tuple(
        Site(name, module, factors, magnitudes.get(module))
        for module, factors in found.items()
        if _trained(factors.A) and _trained(factors.B)
    )
    if not sites:
        raise ConfigError(
            "None of the adapter's layers has two factors that are trained.",
            expected="layers whose A and B are parameters with requires_grad: LoRA, rsLoRA, DoRA",
            got=_why(next(iter(found.values()))) + f" on all {len(found)} layers",
            fix="train both factors of a LoRA, rsLoRA or DoRA adapter",
        )
    return sites


def _trained(factor: Tensor) -> bool:
    return isinstance(factor, nn.Parameter) and factor.requires_grad


def _why(factors: Factors) -> str:
    words = {
        name: "not a parameter"
        if not isinstance(factor, nn.Parameter)
        else "trained"
        if factor.requires_grad
        else "frozen"
        for name, factor in (("A", factors.A), ("B", factors.B))
    }
    return ", ".join(f"{name} {word}" for name, word in words.items())


def _magnitudes(root: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Module name → DoRA's magnitudes there, of ours or PEFT's."""
    found: dict[str, Tensor] = {}
    if attached(root):
        for module, part in get_adapter(root, adapter).layers().items():
            if "magnitude" in part:
                found[module] = part["magnitude"]
        return found
    for name, inner in root.named_modules():
        vectors = getattr(inner, "lora_magnitude_vector", None)
        if isinstance(vectors, nn.ModuleDict) and adapter in vectors:
            weight = getattr(vectors[adapter], "weight", None)
            if isinstance(weight, Tensor):
                found[name] = weight
    return found
