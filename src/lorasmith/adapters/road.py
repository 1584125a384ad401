"""RoAd: rotations of pairs of outputs.

Source: Liao et al. 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient
Batching and Composability" (arXiv 2409.00119), equations 3 and 4; semantics of PEFT 0.21.2.

    y = R (W x + b),   R = [ α₁ cos θ₁   −α₂ sin θ₂ ]   for every pair of outputs
                           [ α₃ sin θ₃    α₄ cos θ₄ ]

    x [d_in]     input of the layer          θ, α    trainable angles and scales:
    y [d_out]    output                      "road_1"  [d_out / 2], one of each a pair
    W, b         frozen                      "road_2"  [d_out], one of each a row of R
                                             "road_4"  [2 d_out], one of each an entry of R

Deviation from the paper, as in PEFT: it pairs neighbours (outputs 2i − 1 and 2i); here they
are paired inside groups of ``group_size``, the first half of a group with the second half.

R is never formed; with c and s [d_out] the factors on an output and on its partner,

    y ← c ∘ y + s ∘ (−y₂, y₁) .

Identity at t = 0: θ = 0 and α = 1.

The bias is rotated with the rest. W is not looked at: works on quantised layers; fuses
exactly up to rounding. A layer whose output is not a multiple of the group size is refused
when the adapter is attached (PEFT refuses it, too).

Files: PEFT's ``ROAD``, which has no layer for GPT-2's ``Conv1D``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    Carry,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)
from lorasmith.errors import ConfigError

__all__ = ["RoAd", "RoAdConfig"]

#: Form → values of θ (and of α) for two outputs.
_FORMS = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True, kw_only=True)
class RoAdConfig(AdapterConfig):
    """Configuration of RoAd.

    Args:
        form: ``"road_1"``: one angle and one scale for each pair of outputs; ``"road_2"``:
            for each output; ``"road_4"``: for each entry of the 2 × 2 matrices (PEFT's
            ``variant``).
        group_size: Number of outputs inside which pairs are made: the first with the first
            of the second half, and so on. Even; must divide the output of every layer.

    Raises:
        ConfigError: If a value cannot be used.
    """

    variant: ClassVar[str] = "road"

    form: str = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in _FORMS:
            raise ConfigError(
                "form is not one of RoAd's.",
                expected=" or ".join(_FORMS),
                got=repr(self.form),
                key="form",
            )
        if type(self.group_size) is not int or self.group_size < 2 or self.group_size % 2:
            raise ConfigError(
                "group_size does not make pairs.",
                expected="a positive even integer",
                got=repr(self.group_size),
                key="group_size",
            )


def _factors(config: RoAdConfig, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """c and s [d_out]: the factors on each output and on its partner."""
    if config.form == "road_4":
        theta, alpha = (t.view(-1, 2, config.group_size) for t in (theta, alpha))
        own, other = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        return own.reshape(-1), other.reshape(-1)
    own, other = alpha * theta.cos(), alpha * theta.sin()
    if config.form == "road_1":
        half = config.group_size // 2
        own, other = (t.view(-1, 1, half).expand(-1, 2, -1).reshape(-1) for t in (own, other))
    return own, other


def _halves(t: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """First and second halves of all groups: two views [..., groups, group / 2]."""
    pairs = t.view(*t.shape[:-1], t.shape[-1] // group, 2, group // 2)
    return pairs[..., 0, :], pairs[..., 1, :]


def _turn(y: Tensor, own: Tensor, first: Tensor, second: Tensor, group: int) -> Tensor:
    """own ∘ y + (first ∘ y₂, second ∘ y₁), for contiguous y [..., d_out]."""
    out = y * own
    (o1, o2), (y1, y2) = _halves(out, group), _halves(y, group)
    o1.addcmul_(y2, first)
    o2.addcmul_(y1, second)
    return out


class _Rotate(torch.autograd.Function):
    """(y, c, s) → c ∘ y + s ∘ (−y₂, y₁).

    By views of halves: the partner of each output is read where it lies, not copied.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, own: Tensor, other: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(y if any(ctx.needs_input_grad[1:]) else None, own, other)
        ctx.group = group
        own, other = own.to(y.dtype), other.to(y.dtype)
        s1, s2 = _halves(other, group)
        # Not through a view: what follows may write on the result (a ReLU in place).
        return _turn(y.contiguous(), own, -s1, s2, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        y, own, other = ctx.saved_tensors
        group, wide = ctx.group, own.dtype
        g = g.contiguous()
        g_y = g_own = g_other = None
        if ctx.needs_input_grad[0]:
            s1, s2 = _halves(other.to(g.dtype), group)
            g_y = _turn(g, own.to(g.dtype), s2, -s1, group)
        if y is not None:
            flat, rows = (t.reshape(-1, t.shape[-1]) for t in (g, y))
            g_own = lowrank.column_dot(flat, rows, wide)
            (g1, g2), (y1, y2) = _halves(flat, group), _halves(rows, group)
            first, second = (g1 * y2).sum(dim=0, dtype=wide), (g2 * y1).sum(dim=0, dtype=wide)
            g_other = torch.stack((-first, second), dim=1).view(other.shape)
        return g_y, g_own, g_other, None


def _rotated(y: Tensor, own: Tensor, other: Tensor, group: int) -> Tensor:
    """The same by plain operations."""
    y1, y2 = _halves(y, group)
    partner = torch.stack((-y2, y1), dim=-2).reshape(y.shape)
    return y * own + partner * other


class RoAd(Variant):
    """y = R (W x + b), R rotating and scaling pairs of outputs."""

    name = "road"
    config_class = RoAdConfig
    peft_type = "ROAD"
    peft_fields = frozenset({"group_size", "init_weights", "variant"})
    family = "rotation"
    formula = "y = R (W x), R = α [cos θ, −sin θ; sin θ, cos θ] on pairs"

    def adjust(self, config: RoAdConfig, bases: Sequence[BaseLayer]) -> RoAdConfig:
        odd = [b.info for b in bases if b.info.d_out % config.group_size]
        if odd:
            raise ConfigError(
                f"The outputs of {len(odd)} layers are not a multiple of the group size.",
                expected=f"group_size that divides {', '.join(map(str, _sizes(odd)))}",
                got=f"{config.group_size}, e.g. for {odd[0].name} with {odd[0].d_out} outputs",
                fix="choose a smaller even group_size, or exclude these layers",
                key="group_size",
            )
        return config

    def new_tensors(self, base: BaseLayer, config: RoAdConfig) -> NewTensors:
        shape = self.shapes(config, base.info)["theta"]
        device = device_of(base.module)
        zeros, ones = torch.zeros(*shape, device=device), torch.ones(*shape, device=device)
        return NewTensors({"theta": zeros, "alpha": ones})

    def after(self, state: LayerState, y: Tensor, carry: Carry, base: BaseLayer) -> Tensor:
        config: RoAdConfig = state.config  # type: ignore[assignment]
        own, other = _factors(config, state["theta"], state["alpha"])
        if lowrank.fast(y):
            out: Tensor = _Rotate.apply(y, own, other, config.group_size)  # type: ignore[no-untyped-call]
            return out
        return _rotated(y, own.to(y.dtype), other.to(y.dtype), config.group_size)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        return self.effective_bias(state, weight.T).T

    def effective_bias(self, state: LayerState, bias: Tensor) -> Tensor:
        config: RoAdConfig = state.config  # type: ignore[assignment]
        theta, alpha = (state[n].detach().to(bias.dtype) for n in ("theta", "alpha"))
        own, other = _factors(config, theta, alpha)
        return _rotated(bias.contiguous(), own, other, config.group_size)

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: RoAdConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        size = info.d_out * _FORMS[config.form] // 2
        return {"theta": (size,), "alpha": (size,)}

    def tensor_specs(self, config: RoAdConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        shapes = self.shapes(config, info)
        return {n: TensorSpec(f"road_{n}", shape) for n, shape in shapes.items()}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return 0, 0  # what the sizes are depends on the form

    def layer_sizes(
        self, config: RoAdConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        (size,) = shapes["road_theta"]
        return 0, 2 * size // _FORMS[config.form]

    def to_peft(self, config: RoAdConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {"variant": config.form, "group_size": config.group_size, "init_weights": True}

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> RoAdConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        return RoAdConfig(
            form=fields.get("variant", "road_1"),
            group_size=fields.get("group_size", 64),
            **common,
        )


def _sizes(infos: Sequence[LayerInfo]) -> list[int]:
    return sorted({i.d_out for i in infos})
