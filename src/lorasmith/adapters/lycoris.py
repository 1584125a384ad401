"""What LoHa and LoKr have in common: their options, and what drops out in training.

Source: LyCORIS (Yeh et al. 2023, arXiv 2309.14859); semantics of PEFT 0.21.2. During
training, ``rank_dropout`` drops outputs of the update ΔW x, the same ones for all tokens of
a call, and ``module_dropout`` drops the whole update of a layer for one call:

    y = W x + b + k m ∘ ΔW x,   k ∈ {0, 1},  m ∈ {0, 1}^d_out

LoHa divides m by its mean, LoKr on request. Where all of m is 0 it stays so (PEFT: NaN).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.fields import refuse
from lorasmith.core.config import (
    AdapterConfig,
    check_count,
    check_factor,
    check_probability,
    checked_pattern,
)
from lorasmith.core.patterns import value_for
from lorasmith.core.variant import LayerState

__all__ = ["LycorisConfig", "lycoris_fields", "output_gain", "to_fields"]

PEFT_FIELDS = (
    "alpha alpha_pattern init_weights layers_pattern layers_to_transform module_dropout r "
    "rank_dropout rank_pattern use_effective_conv2d"
)
#: PEFT fields that change more than we have, with the value at which they do nothing.
_UNSUPPORTED = {"use_effective_conv2d": False}


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """What LoHa and LoKr can be told, beyond ``AdapterConfig``.

    Args:
        r: Rank of the low-rank factors.
        alpha: Numerator of the scaling s = alpha / r.
        rank_dropout: Probability of dropping an output of the update, for all tokens of a
            call, during training.
        module_dropout: Probability of dropping the update of a layer, for one call,
            during training.
        rank_pattern: Module name, its end, or a regular expression for its end → rank of
            the layers it matches (PEFT's rule: the first key that matches wins).
        alpha_pattern: The same for alpha.
    """

    r: int = 8
    alpha: float = 8.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r")
        check_factor(self.alpha, "alpha")
        check_probability(self.rank_dropout, "rank_dropout")
        check_probability(self.module_dropout, "module_dropout")
        self._set("rank_pattern", checked_pattern(self.rank_pattern, "rank_pattern", check_count))
        self._set(
            "alpha_pattern", checked_pattern(self.alpha_pattern, "alpha_pattern", check_factor)
        )

    def rank_of(self, module_name: str) -> int:
        """Rank for the layer of that name."""
        return value_for(self.rank_pattern, module_name, self.r)

    def scaling_of(self, module_name: str) -> float:
        """s for the layer of that name."""
        return value_for(self.alpha_pattern, module_name, self.alpha) / self.rank_of(module_name)


def output_gain(state: LayerState, y: Tensor, *, rescale: bool) -> Tensor | None:
    """k m of the formula above ([d_out], or [1] if m = 1), or ``None`` where both are 1.

    Args:
        state: The layer's adapter.
        y: The layer's output, for its dtype and device.
        rescale: Whether m is divided by its mean.
    """
    config: LycorisConfig = state.config  # type: ignore[assignment]
    if not state.training or not (config.rank_dropout or config.module_dropout):
        return None
    # No branch on it, which would stall a device and break a compiled graph.
    kept = torch.rand(1, device=y.device) > config.module_dropout
    if not config.rank_dropout:
        return kept.to(y.dtype)
    mask = (torch.rand(y.shape[-1], device=y.device) > config.rank_dropout).to(torch.float32)
    if rescale:
        mask = mask / mask.mean().clamp(min=1 / mask.numel())
    return (mask * kept).to(y.dtype)


def to_fields(config: LycorisConfig) -> dict[str, Any]:
    """The fields that PEFT's configurations of both have."""
    return {
        "r": config.r,
        "alpha": config.alpha,
        "rank_dropout": config.rank_dropout,
        "module_dropout": config.module_dropout,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_effective_conv2d": False,
        "init_weights": True,
    }


def lycoris_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from PEFT's.

    Raises:
        UnsupportedFeatureError: If the file uses what lorasmith does not have.
    """
    refuse(fields, _UNSUPPORTED)
    return {
        "r": fields.get("r", 8),
        "alpha": fields.get("alpha", 8),
        "rank_dropout": fields.get("rank_dropout") or 0.0,
        "module_dropout": fields.get("module_dropout") or 0.0,
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }
