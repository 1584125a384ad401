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

from lorasmith.core.config import AdapterConfig
from lorasmith.core.patterns import check_regex, first_matching_key
from lorasmith.core.variant import LayerState
from lorasmith.errors import ConfigError, UnsupportedFeatureError

__all__ = ["LycorisConfig", "check_rank", "lycoris_fields", "output_gain", "refuse", "to_fields"]

PEFT_FIELDS = (
    "alpha alpha_pattern init_weights layers_pattern layers_to_transform module_dropout r "
    "rank_dropout rank_pattern use_effective_conv2d"
)
#: PEFT fields that change more than we have, with the value at which they do nothing.
_UNSUPPORTED = {"use_effective_conv2d": False}


def check_rank(value: object, key: str) -> None:
    """Raises a ``ConfigError`` unless ``value`` is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{key} is not a usable size.",
            expected="an integer of at least 1",
            got=repr(value),
            key=key,
        )


def check_probability(value: object, key: str) -> None:
    """Raises a ``ConfigError`` unless 0 <= ``value`` < 1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ConfigError(
            f"{key} is not a probability below 1.",
            expected=f"0 <= {key} < 1",
            got=repr(value),
            key=key,
        )


def _check_alpha(value: object, key: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < abs(value) < float("inf"):  # type: ignore[arg-type]
        raise ConfigError(f"{key} is not a finite number other than 0.", got=repr(value), key=key)


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
        check_rank(self.r, "r")
        _check_alpha(self.alpha, "alpha")
        check_probability(self.rank_dropout, "rank_dropout")
        check_probability(self.module_dropout, "module_dropout")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", _check_alpha)):
            pattern: object = getattr(self, name)
            if not isinstance(pattern, Mapping) or not all(isinstance(k, str) for k in pattern):
                raise ConfigError(
                    f"{name} is not a mapping of names.",
                    expected="{module name, its end, or a regular expression: number}",
                    got=repr(pattern),
                    key=name,
                )
            for key, value in pattern.items():
                check_regex(key, key=name)
                check(value, f"{name}[{key!r}]")
            self._set(name, dict(pattern))

    def rank_of(self, module_name: str) -> int:
        """Rank for the layer of that name."""
        key = first_matching_key(self.rank_pattern, module_name)
        return self.r if key is None else self.rank_pattern[key]

    def scaling_of(self, module_name: str) -> float:
        """s for the layer of that name."""
        key = first_matching_key(self.alpha_pattern, module_name)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / self.rank_of(module_name)


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


def refuse(fields: Mapping[str, Any], unsupported: Mapping[str, object]) -> None:
    """Raises an ``UnsupportedFeatureError`` if a field has another than its neutral value."""
    for key, neutral in unsupported.items():
        value = fields.get(key, neutral)
        if value not in (neutral, None):
            raise UnsupportedFeatureError(
                f"The adapter uses PEFT's {key}, which lorasmith cannot reproduce.",
                expected=f"{key} = {neutral!r}",
                got=repr(value),
                key=key,
            )
