"""Two gains: y = g ∘ (W (h ∘ x) + b) with g [d_out] and h [d_in], both 1 at the start."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import lorasmith as ls
from lorasmith.core.layers import device_of
from lorasmith.core.variant import NewTensors, TensorSpec, Variant


@dataclass(frozen=True, kw_only=True)
class TwoGainsConfig(ls.AdapterConfig):
    """What can be said of it beside the targets."""

    variant: ClassVar[str] = "two_gains"
    start: float = 1.0  # anything else, and training does not begin at the base model


class TwoGains(Variant):
    """What its tensors are and what they do."""

    name, config_class, peft_type = "two_gains", TwoGainsConfig, "TWO_GAINS"
    family, formula, transforms_input = "gain", "y = g ∘ (W (h ∘ x) + b)", True

    def shapes(self, config, info):
        return {"g": (info.d_out,), "h": (info.d_in,)}

    def new_tensors(self, base, config):
        sizes, device = self.shapes(config, base.info), device_of(base.module)
        return NewTensors({n: torch.full(s, config.start, device=device) for n, s in sizes.items()})

    def before(self, state, x, base):
        return x * state["h"].to(x.dtype), None

    def after(self, state, y, carry, base):
        return y * state["g"].to(y.dtype)

    def effective_weight(self, state, weight):  # what fuse and convert go by
        return state["g"].to(weight.dtype)[:, None] * weight * state["h"].to(weight.dtype)

    def effective_bias(self, state, bias):
        return state["g"].to(bias.dtype) * bias

    def tensor_specs(self, config, info):  # the last four are for files
        return {n: TensorSpec(n, shape) for n, shape in self.shapes(config, info).items()}

    def sizes_from_file(self, shapes):
        return shapes["h"][0], shapes["g"][0]

    def to_peft(self, config, modules):
        return {"start": config.start}

    def from_peft(self, fields, common):
        ours = fields.get("peft_type") == self.peft_type
        return TwoGainsConfig(start=fields.get("start", 1.0), **common) if ours else None


VARIANT = ls.register(TwoGains())
