"""The one list of variants, open to users.

A variant of your own needs no fork: call :func:`register` with an instance, or name it
under the entry point ``lorasmith.variants`` of your package.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from lorasmith.core.config import AdapterConfig
from lorasmith.core.variant import Variant
from lorasmith.errors import ConfigError, UnknownNameError

__all__ = ["config_from_dict", "get_variant", "register", "variant_of", "variants"]

_VARIANTS: dict[str, Variant] = {}
_entry_points_read = False


def register(variant: Variant, *, replace: bool = False) -> Variant:
    """Adds a variant to the registry.

    Args:
        variant: An instance of a :class:`~lorasmith.core.variant.Variant`.
        replace: Whether a variant of the same name may be replaced.

    Returns:
        The same instance.

    Raises:
        ConfigError: If its declarations contradict each other or the name is taken.
    """
    name = variant.name
    if variant.config_class.variant != name:
        raise ConfigError(
            f"The variant {name!r} and its configuration class disagree on the name.",
            expected=f"{variant.config_class.__name__}.variant == {name!r}",
            got=repr(variant.config_class.variant),
        )
    if _VARIANTS.get(name, variant) is not variant and not replace:
        raise ConfigError(
            f"A variant named {name!r} is registered already.",
            fix="choose another name, or pass replace=True",
        )
    _VARIANTS[name] = variant
    return variant


def variants() -> Mapping[str, Variant]:
    """All registered variants by name, those of installed packages included (read-only)."""
    global _entry_points_read
    import_module("lorasmith.adapters")  # ours register themselves when imported
    if not _entry_points_read:
        for entry in entry_points(group="lorasmith.variants"):
            if entry.name not in _VARIANTS:
                _register_entry(entry)
        _entry_points_read = True
    return MappingProxyType(_VARIANTS)


def _register_entry(entry: EntryPoint) -> None:
    """Registers the variant that an installed package names."""
    try:
        loaded = entry.load()
        register(loaded() if isinstance(loaded, type) else loaded)
    except Exception as error:
        raise ConfigError(
            f"The variant {entry.name!r} of an installed package cannot be used: {error}",
            expected="the entry point of a lorasmith.Variant",
            got=entry.value,
            fix="repair or uninstall "
            + (entry.dist.name if entry.dist is not None else "the package that names it"),
            key=f"lorasmith.variants:{entry.name}",
        ) from error


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        UnknownNameError: If there is none.
    """
    known = variants()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        raise UnknownNameError(
            f"There is no variant named {name!r}.",
            expected=", ".join(sorted(known)),
            got=name,
            fix=f"did you mean {near[0]!r}?"
            if near
            else "lorasmith.register(...) adds your own; --plugin FILE, on the command line",
        )
    return known[name]


def variant_of(config: AdapterConfig) -> Variant:
    """The variant that a configuration belongs to."""
    if not isinstance(config, AdapterConfig):
        raise ConfigError(
            "That is not an adapter configuration.",
            expected="e.g. lorasmith.LoRAConfig(r=16)",
            got=f"{type(config).__module__}.{type(config).__qualname__}",
        )
    return get_variant(config.variant)


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """The configuration that :meth:`AdapterConfig.to_dict` described.

    Raises:
        UnknownNameError: If the variant does not exist.
        ConfigError: If a field does not exist or has an impossible value.
    """
    return get_variant(str(values.get("variant", "lora"))).config_class.from_dict(values)
