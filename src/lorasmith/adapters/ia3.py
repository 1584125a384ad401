"""IA3: learned gains on the outputs (and, in feed-forward layers, the inputs) of layers.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
than In-Context Learning" (arXiv 2205.05638), section 3.3; semantics of PEFT 0.21.2.

    y = l ∘ (W x + b)            outputs, l [d_out]
    y = W (l ∘ x) + b            layers named in ``feedforward``, l [d_in]

The paper scales keys, values and the hidden units between the two feed-forward layers:
``targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",)`` in a Llama.

Identity at t = 0: l = 1.

Works on quantised layers; fuses exactly up to rounding (the bias is scaled with the rows).
The paper's losses (unlikelihood, length normalisation) are not part of an adapter.

Files: PEFT's ``IA3``; l is ``ia3_l`` [d_out, 1], or [1, d_in] in feed-forward layers.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.adapters.fields import transposed
from lorasmith.core.config import AdapterConfig, Targets, as_names
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.patterns import matches_name, matches_regex
from lorasmith.core.variant import (
    Affine,
    BaseLayer,
    Carry,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)

__all__ = ["IA3", "IA3Config"]


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Configuration of IA3.

    Args:
        feedforward: Those of the targets whose input is scaled instead of their output:
            names, ends of names, globs or ``"re:"`` expressions.
    """

    variant: ClassVar[str] = "ia3"

    feedforward: Targets = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("feedforward", as_names(self.feedforward, "feedforward"))

    def scales_input(self, module_name: str) -> bool:
        """Whether the gain of that layer acts on its input."""
        return any(
            matches_regex(f[3:], module_name, key="feedforward")
            if f.startswith("re:")
            else matches_name(f, module_name)
            for f in self.feedforward
        )


class IA3(Variant):
    """y = l ∘ (W x + b), or y = W (l ∘ x) + b."""

    name = "ia3"
    config_class: ClassVar[type[AdapterConfig]] = IA3Config
    peft_type = "IA3"
    peft_fields = frozenset({"feedforward_modules", "init_ia3_weights"})
    family = "gain"
    formula = "y = l ∘ (W x), or y = W (l ∘ x) in feedforward layers"
    transforms_input = True

    @staticmethod
    def on_input(config: Any, module_name: str) -> bool:
        """Whether the gain of that layer acts on its input."""
        return bool(config.scales_input(module_name))

    def new_tensors(self, base: BaseLayer, config: AdapterConfig) -> NewTensors:
        shape = self.shapes(config, base.info)["gain"]
        return NewTensors({"gain": torch.ones(*shape, device=device_of(base.module))})

    def constants(self, config: AdapterConfig, info: LayerInfo) -> dict[str, Any]:
        return {"on_input": self.on_input(config, info.name)}

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        if state.constants["on_input"]:
            return x * state["gain"].to(x.dtype), None
        return x, None

    def after(self, state: LayerState, y: Tensor, carry: Carry, base: BaseLayer) -> Tensor:
        if state.constants["on_input"]:
            return y
        return y * state["gain"].to(y.dtype)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        gain = state["gain"].detach().to(weight.dtype)
        if state.constants["on_input"]:
            return weight * gain
        return weight * gain[:, None]

    def effective_bias(self, state: LayerState, bias: Tensor) -> Tensor:
        if state.constants["on_input"]:
            return bias
        return bias * state["gain"].detach().to(bias.dtype)

    def affine(self, state: LayerState, base: BaseLayer) -> Affine:
        if state.constants["on_input"]:
            return Affine(input_gain=state["gain"])
        return Affine(gain=state["gain"])

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: AdapterConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {"gain": (info.d_in if self.on_input(config, info.name) else info.d_out,)}

    def tensor_specs(self, config: AdapterConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        (size,) = self.shapes(config, info)["gain"]
        shape = (1, size) if self.on_input(config, info.name) else (size, 1)
        return {"gain": TensorSpec("ia3_l", shape)}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, columns = shapes["ia3_l"]
        return (columns, 0) if rows == 1 else (0, rows)

    def to_peft(self, config: AdapterConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            "feedforward_modules": [n for n in modules if self.on_input(config, n)],
            **transposed(modules),
            # PEFT: "initialise the gains to 1", which is the identity.
            "init_ia3_weights": True,
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> Any | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        return IA3Config(**common, feedforward=feedforward_of(fields))


def feedforward_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """PEFT's ``feedforward_modules`` in our form.

    PEFT asks whether the module's name *ends* in one of them, with or without a dot in
    between, so "proj" there means "*proj" here.
    """
    given = fields.get("feedforward_modules") or ()
    if isinstance(given, str):
        return (f"re:{given}",)
    return tuple(f"*{glob.escape(name)}" for name in sorted(given))
