"""What every merging method asks of its options and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorasmith.errors import ConfigError

__all__ = ["check_factor", "check_not_negative", "check_share", "is_number"]


def is_number(value: object) -> bool:
    """Whether it is a finite number (and no truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: float) -> float:
    """The value, if it is a share: 0 ≤ value ≤ 1."""
    if is_number(value) and 0 <= value <= 1:
        return float(value)
    raise ConfigError(f"{name} is not a share.", expected="0 to 1", got=repr(value), key=name)


def check_factor(name: str, value: float) -> float:
    """The value, if it is a finite number."""
    if is_number(value):
        return float(value)
    raise ConfigError(
        f"{name} is not a number.", expected="a finite number", got=repr(value), key=name
    )


def check_not_negative(method: str, weights: Sequence[float]) -> float:
    """The sum of the weights of a method that needs them not to be negative."""
    if any(w < 0 for w in weights):
        raise ConfigError(
            f"{method} has no meaning with a negative weight.",
            expected="weights of at least 0",
            got=list(weights),
            fix="take linear or task_arithmetic to subtract an adapter",
            key="weights",
        )
    return math.fsum(weights)
