"""LoHa: the Hadamard product of two low-rank matrices.

Sources: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-
Efficient Federated Learning" (arXiv 2108.06098), proposition 1; Yeh et al. 2023, LyCORIS
(arXiv 2309.14859), equation 3; semantics of PEFT 0.21.2.

    y = W x + b + ΔW x,   ΔW = s (A1 B1) ∘ (A2 B2)

    x [d_in]     input          A1, A2 [d_out, r], B1, B2 [r, d_in]   trainable
    y [d_out]    output         s                                     alpha / r
    W, b         frozen

Identity at t = 0: B2 = 0; the others start Kaiming uniform.

ΔW has rank up to r². It is the low-rank product of rank r² of the row-wise Khatri-Rao
products,

    ΔW = s U Vᵀ,   U_(o, ij) = A1_oi A2_oj,   V_(k, ij) = B1_ik B2_jk ,

which costs r² (d_in + d_out) a token and never forms a d_out × d_in matrix. Where that is
more than d_in d_out (r² above half the width of a square layer), ΔW itself is formed, one
layer at a time, in the dtype of x. Which of the two it is depends on the layer's sizes
alone. Either way x and the four factors are all that is kept for the backward pass.

``factors`` gives none: the exact rank is r², and U and V are not what is trained.

Deviations from PEFT: none in what is computed. Convolutions, hence
``use_effective_conv2d``, are not adapted. PEFT does not adapt GPT-2's ``Conv1D``.

ΔW does not depend on W: works on quantised layers, fuses exactly up to rounding.

Files: PEFT's ``LOHA``; A1, B1, A2, B2 are ``hada_w1_a``, ``hada_w1_b``, ``hada_w2_a``,
``hada_w2_b``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters import lycoris
from lorasmith.adapters.lycoris import LycorisConfig
from lorasmith.core import lowrank, recomputed
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)

__all__ = ["LoHa", "LoHaConfig"]

#: Our names in the order of the formula → PEFT's.
_KEYS = {"A1": "hada_w1_a", "B1": "hada_w1_b", "A2": "hada_w2_a", "B2": "hada_w2_b"}


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa; the fields are those of ``LycorisConfig``."""

    variant: ClassVar[str] = "loha"


def khatri_rao(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
    """(x V [..., r²], U [d_out, r²]) in the dtype of x."""
    wide = torch.promote_types(x.dtype, A1.dtype)
    A1, B1, A2, B2 = (t.to(wide) for t in (A1, B1, A2, B2))
    u = (A1[:, :, None] * A2[:, None, :]).flatten(1)
    v = (B1[:, None, :] * B2[None, :, :]).flatten(0, 1)
    return F.linear(x, v.to(x.dtype)), u.to(x.dtype)


def hadamard(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
    """(x, (A1 B1) ∘ (A2 B2)) in the dtype of x."""
    A1, B1, A2, B2 = (t.to(x.dtype) for t in (A1, B1, A2, B2))
    return x, (A1 @ B1) * (A2 @ B2)


class LoHa(Variant):
    """y = W x + b + s ((A1 B1) ∘ (A2 B2)) x."""

    name = "loha"
    config_class = LoHaConfig
    peft_type = "LOHA"
    peft_fields = frozenset(lycoris.PEFT_FIELDS.split())
    family = "low-rank product"
    formula = "y = W x + s ((A1 B1) ∘ (A2 B2)) x"

    def new_tensors(self, base: BaseLayer, config: LoHaConfig) -> NewTensors:
        device = device_of(base.module)
        made = {
            n: torch.zeros(*shape, device=device)
            for n, shape in self.shapes(config, base.info).items()
        }
        for name in ("A1", "B1", "A2"):
            nn.init.kaiming_uniform_(made[name], a=math.sqrt(5))
        return NewTensors(made)

    def constants(self, config: LoHaConfig, info: LayerInfo) -> dict[str, Any]:
        rank = config.rank_of(info.name) ** 2
        factored = rank * (info.d_in + info.d_out) <= info.d_in * info.d_out
        return {
            "scaling": config.scaling_of(info.name),
            "product": khatri_rao if factored else hadamard,
            "size": rank * (info.d_in + info.d_out) if factored else info.d_in * info.d_out,
        }

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        return x, x.to(lowrank.compute_dtype(x))

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        return recomputed.add(
            y,
            carry,
            state.constants["product"],
            [state[n] for n in _KEYS],
            state.constants["scaling"],
            size=state.constants["size"],
            gain=lycoris.output_gain(state, y, rescale=True),
            owned=owns_output(base.module, base),
        )

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        _, delta = hadamard(weight, *(state[n].detach() for n in _KEYS))
        return weight + delta.mul_(state.constants["scaling"])

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: LoHaConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        rank = config.rank_of(info.name)
        a, b = (info.d_out, rank), (rank, info.d_in)
        return {"A1": a, "B1": b, "A2": a, "B2": b}

    def tensor_specs(self, config: LoHaConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        return {n: TensorSpec(_KEYS[n], s) for n, s in self.shapes(config, info).items()}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["hada_w1_b"][1], shapes["hada_w1_a"][0]

    def to_peft(self, config: LoHaConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return lycoris.to_fields(config)

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> LoHaConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        return LoHaConfig(**lycoris.lycoris_fields(fields), **common)
