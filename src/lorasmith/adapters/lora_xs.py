"""LoRA-XS: an r × r matrix between the principal singular vectors of W.

Source: Bałazy, Banaei, Aberer, Tabor 2024, "LoRA-XS: Low-Rank Adaptation with Extremely
Small Number of Parameters" (arXiv 2405.17604), section 3.

    W ≈ U_r S_r V_rᵀ,   A = S_r V_rᵀ,   B = U_r,   y = W x + b + s B R A dropout(x)

    x [d_in]     input of the layer          R [r, r]                    trainable
    y [d_out]    output                      A [r, d_in], B [d_out, r]   frozen
    W, b         frozen                      s        alpha / r, or alpha / √r (rslora)

The singular values stand beside the input, as in the authors' code, which takes Wᵀ apart.

Identity at t = 0: R = 0. The paper draws R from N(0, 1e-5²), which is hardly another start:
A and B are fixed and not zero, so that R has a gradient at 0, and there is no symmetry to
break. Ours is the base model exactly.

ΔW = s B R A: fuses exactly up to rounding. W is needed to start alone, and r must not
exceed min(d_in, d_out). The gradient of R is (s g B)ᵀ (A x), of factors that the pass needs
anyway, so a step costs less than LoRA's of that rank, and x is not saved for it.

Files: PEFT 0.21.2 has no LoRA-XS (its TinyLoRA trains a vector in place of R). They have a
type of our own, ``LORA_XS``, and hold A, B and R, so that W is not needed to load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.lora import low_rank_fields, low_rank_to_peft, scaling
from lorasmith.core import lowrank
from lorasmith.core.config import LowRankConfig
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo
from lorasmith.core.variant import (
    BaseLayer,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
    WeightUse,
)
from lorasmith.errors import ConfigError
from lorasmith.init.pissa import principal

__all__ = ["LoRAXS", "LoRAXSConfig"]

_INIT = re.compile(r"svd(?:_niter_([0-9]{1,2}))?")


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(LowRankConfig):
    """Configuration of LoRA-XS; the fields are those of ``LowRankConfig``.

    Args:
        init: How A and B are found: ``"svd"`` exactly, ``"svd_niter_N"`` by a randomised SVD
            with N rounds (Halko et al. 2011), much faster on large layers.
    """

    variant: ClassVar[str] = "lora_xs"

    init: str = "svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _INIT.fullmatch(self.init):
            raise ConfigError(
                "LoRA-XS has no initialisation of that name.",
                expected="svd or svd_niter_N",
                got=repr(self.init),
                key="init",
            )


class LoRAXS(Variant):
    """y = W x + b + s B R A dropout(x)."""

    name = "lora_xs"
    config_class = LoRAXSConfig
    peft_type = "LORA_XS"
    family = "low-rank"
    formula = "y = W x + s B R A x, A and B from the SVD of W"
    faster = ("R",)

    def weight_use(self, config: LoRAXSConfig) -> WeightUse:
        return "start"

    def new_tensors(self, base: BaseLayer, config: LoRAXSConfig) -> NewTensors:
        info, weight = base.info, base.weight
        rank, limit = config.rank_of(info.name), min(info.d_in, info.d_out)
        if rank > limit:
            raise ConfigError(
                "LoRA-XS needs r singular vectors of W, which has fewer.",
                expected=f"r <= min(d_in, d_out) = {limit} of {info.name}",
                got=rank,
                fix="lower r, exclude the layer, or give it a rank of its own in rank_pattern",
                key="r",
            )
        found = _INIT.fullmatch(config.init)
        assert found is not None
        if found[1] is None:
            u, s, vt = principal(weight, rank)
        else:
            u, s, v = torch.svd_lowrank(weight.to(torch.float32), q=rank, niter=int(found[1]))
            vt = v.T
        frozen = {"A": (s[:, None] * vt).to(torch.float32), "B": u.to(torch.float32)}
        return NewTensors({"R": torch.zeros(rank, rank, device=weight.device)}, frozen)

    def constants(self, config: LoRAXSConfig, info: LayerInfo) -> dict[str, Any]:
        return {"scaling": config.scaling_of(info.name)}

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        config: LoRAXSConfig = state.config  # type: ignore[assignment]
        return lowrank.down(
            x,
            state["A"],
            dropout=config.dropout if state.training else 0.0,
            owned=owns_output(base.module, base),
            member=state,
            siblings=getattr(state, "siblings", None),
        )

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        turned = F.linear(carry, state["R"].to(carry.dtype))
        owned = owns_output(base.module, base)
        return lowrank.up(y, turned, state["B"], scaling(state), owned=owned)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        A, B, R = (state[n].detach().to(weight.dtype) for n in ("A", "B", "R"))
        return torch.addmm(weight, B @ R, A, alpha=scaling(state))

    def factors(self, state: LayerState) -> Factors:
        return Factors(state["A"], state["B"] @ state["R"], scaling(state))

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: LoRAXSConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        rank = config.rank_of(info.name)
        return {"R": (rank, rank)}

    def tensor_specs(self, config: LoRAXSConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        rank = config.rank_of(info.name)
        return {
            "R": TensorSpec("lora_xs_R", (rank, rank)),
            "A": TensorSpec("lora_xs_A", (rank, info.d_in)),
            "B": TensorSpec("lora_xs_B", (info.d_out, rank)),
        }

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["lora_xs_A"][1], shapes["lora_xs_B"][0]

    def to_peft(self, config: LoRAXSConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {**low_rank_to_peft(config, modules), "init_lora_xs": config.init}

    def from_peft(
        self, fields: Mapping[str, Any], common: Mapping[str, Any]
    ) -> LoRAXSConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        init = fields.get("init_lora_xs", "svd")
        return LoRAXSConfig(**low_rank_fields(fields), init=init, **common)
