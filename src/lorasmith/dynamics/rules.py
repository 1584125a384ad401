"""Rules given to a loop together: as a tuple, and whether they can act side by side."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from lorasmith.dynamics.protocol import Dynamic
from lorasmith.errors import ConfigError

__all__ = ["as_rules", "check_rules", "warn_of_two_penalties"]


def as_rules(rules: Dynamic | Iterable[Dynamic]) -> tuple[Dynamic, ...]:
    """One rule or several as a tuple; what is neither is left for the check of rules."""
    given: Any = rules
    several = isinstance(given, Iterable) and not isinstance(given, Dynamic | str | type)
    return tuple(given if several else [given])


def check_rules(rules: tuple[Dynamic, ...]) -> None:
    """Raises if there is none, one that is no rule, or one twice."""
    if not rules:
        raise ConfigError("There is no dynamic.", expected="at least one rule")
    for rule in rules:
        if not isinstance(rule, Dynamic):
            raise ConfigError(
                "That is not a dynamic.",
                expected="an instance, such as lorasmith.GaugeProjection()",
                got=repr(rule),
            )
    names = [rule.name for rule in rules]
    double = sorted({n for n in names if names.count(n) > 1})
    if double:
        raise ConfigError("A dynamic is there twice.", got=", ".join(double))


def warn_of_two_penalties(rules: tuple[Dynamic, ...]) -> None:
    """Whoever names a governor and its penalty may well mean one."""
    names = [rule.name for rule in rules]
    for rule in rules:
        driven = getattr(getattr(rule, "penalty", None), "name", None)
        if driven in names:
            warnings.warn(
                f"The dynamics {rule.name!r} and {driven!r} add two penalties: {rule.name} drives "
                f"a penalty {driven!r} of its own, and the other one comes on top, with its fixed "
                f"weight. If one is meant, give {rule.name} alone; options of what it drives are "
                f"its option penalty.",
                stacklevel=3,
            )
