"""What several variants do with the fields of PEFT's configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasmith.core.layers import LayerInfo
from lorasmith.errors import UnsupportedFeatureError

__all__ = ["refuse", "refuse_trained_biases", "transposed"]


def refuse(fields: Mapping[str, Any], unsupported: Mapping[str, object]) -> None:
    """Raises an ``UnsupportedFeatureError`` if the file uses what lorasmith does not have.

    Args:
        fields: The parsed ``adapter_config.json``.
        unsupported: Field that changes what a layer computes → the value at which it does
            not. ``None`` and what is empty do nothing either.
    """
    for key, neutral in unsupported.items():
        value = fields.get(key, neutral)
        if value not in (neutral, None, [], {}):
            raise UnsupportedFeatureError(
                f"The adapter uses PEFT's {key}, which lorasmith cannot reproduce.",
                expected=f"{key} = {neutral!r}",
                got=repr(value),
                key=key,
            )


def refuse_trained_biases(fields: Mapping[str, Any]) -> None:
    """Raises an ``UnsupportedFeatureError`` where PEFT has trained the base's biases, too."""
    value = fields.get("bias", "none")
    if value not in ("none", None):
        raise UnsupportedFeatureError(
            "The adapter has trained biases of the base model, which lorasmith does not have.",
            expected="bias = 'none'",
            got=repr(value),
            key="bias",
        )


def transposed(modules: Mapping[str, LayerInfo]) -> dict[str, bool]:
    """PEFT's ``fan_in_fan_out``: whether layers store W as [d_in, d_out], as GPT-2's do."""
    return {"fan_in_fan_out": any(info.kind == "conv1d" for info in modules.values())}
