"""Matching of module names, with a limit on the time a regular expression may take.

Patterns come from configuration files of strangers, and a pattern such as ``(a+)+b``
takes exponential time in Python's own ``re``, which cannot be interrupted. The ``regex``
package can.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

import regex

from lorasmith.errors import ConfigError

__all__ = ["check_regex", "first_matching_key", "matches_name", "matches_regex", "value_for"]

T = TypeVar("T")

#: Seconds that one match of one name may take. A sane pattern needs microseconds.
TIME_LIMIT = 0.5


def check_regex(pattern: str, *, key: str) -> None:
    """Raises a ``ConfigError`` unless ``pattern`` is a valid regular expression."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(
            f"{pattern!r} is not a valid regular expression: {error}.", key=key, got=pattern
        ) from error


def matches_regex(pattern: str, name: str, *, key: str = "targets") -> bool:
    """Whether ``pattern`` matches the whole of ``name``.

    Raises:
        ConfigError: If the pattern is not valid or takes longer than ``TIME_LIMIT``.
    """
    check_regex(pattern, key=key)
    try:
        return regex.fullmatch(pattern, name, timeout=TIME_LIMIT) is not None
    except TimeoutError as error:
        raise ConfigError(
            f"The regular expression {pattern!r} took over {TIME_LIMIT} s on {name!r}.",
            key=key,
            fix="avoid nested repetition such as (a+)+, or name the modules",
        ) from error


def matches_name(pattern: str, name: str) -> bool:
    """Whether ``name`` is ``pattern``, ends in ``.pattern``, or fits it as a glob."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return any(c in pattern for c in "*?[") and fnmatch.fnmatchcase(name, pattern)


def first_matching_key(keys: Iterable[str], name: str) -> str | None:
    """The first key that, as a regular expression, matches ``name`` or its dotted end.

    This is the rule of PEFT's ``rank_pattern`` and ``alpha_pattern`` (0.21.2,
    ``get_pattern_key``), so that its files mean the same here.
    """
    for key in keys:
        if matches_regex(rf"(.*\.)?({key})", name, key=key):
            return key
    return None


def value_for(pattern: Mapping[str, T], name: str, default: T) -> T:
    """What ``pattern`` says of the module of that name, by :func:`first_matching_key`."""
    key = first_matching_key(pattern, name)
    return default if key is None else pattern[key]
