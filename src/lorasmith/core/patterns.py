"""Matching of module names, with a limit on the time a regular expression may take.

Patterns come from configuration files of strangers, and a pattern such as ``(a+)+b``
takes exponential time in Python's own ``re``, which cannot be interrupted. The ``regex``
package can, and one match may take ``TIME_LIMIT``. A file may hold many slow patterns and a
model has many names, so what a match or a compilation takes beyond the usual microseconds is
drawn from an allowance of ``TIME_LIMIT`` for each operation (:func:`one_operation`), as reading
one adapter is. Matches at other times are of patterns that have been through one: those of over a
millisecond draw from an allowance that all share, and that fills up again at a hundredth of the
time that passes; where it is used up, only patterns are refused that have drawn on it themselves.
So a slow pattern of one adapter does not lead to the refusal of the next one's.
Compiling cannot be interrupted: very long patterns, large counts and recursion (which ``re``, and
so PEFT, does not have) are refused before.

Names and lists of names, which nearly all patterns are, are told by their form and matched
without regular expressions, with the same result.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import regex

from lorasmith.errors import ConfigError

__all__ = [
    "check_amount",
    "check_regex",
    "first_matching_key",
    "match_beginning",
    "matches_name",
    "matches_regex",
    "one_operation",
    "value_for",
]

T = TypeVar("T")

#: Seconds that one match of one name may take, and that slow ones may take together.
TIME_LIMIT = 0.5
#: Seconds of processor time that a match, and a compilation, may take without drawing on that;
#: and a match outside of an operation, where threads that take turns are no reason to refuse one.
_USUAL, _COMPILING, _OUTSIDE = 30e-6, 1e-3, 1e-3
#: Seconds that a pattern may have drawn and not be a slow one: now and then a match of any takes
#: a while, when memory is not at hand. They are forgotten at this share of the time that passes.
_NOISE, _FORGOTTEN = 5e-2, 1e-4
#: Characters of a pattern; the product of its counts; patterns of one mapping or list.
_LONGEST, _COUNTS, _MOST = 8192, 10_000, 100
#: Patterns of which it is known what they have drawn; names of which a mapping's key is known.
_REMEMBERED, _ANSWERS = 1024, 10_000
_COUNT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*))?")
_RECURSION = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")
#: The end of a module's name: nothing in it but dots is special, and a dot is one character.
_NAME = re.compile(r"(?:[\w-]|\\?\.)+", re.ASCII)
#: Names in which nothing is special, as ``io.peft.shorten`` writes a list of them.
_NAMES = re.compile(r"(?:[\w-]|\\[.-])+(?:\|(?:[\w-]|\\[.-])+)*", re.ASCII)


@dataclass
class _Spent:
    """Seconds that were drawn, less what was given back at a share of the time that passes."""

    seconds: float = 0.0
    when: float = 0.0

    def add(self, seconds: float, now: float, back: float) -> float:
        self.seconds = max(0.0, self.seconds - (now - self.when) * back) + seconds
        self.when = now
        return self.seconds


class _Allowance:
    """What slow matches of this process have taken, in all and by pattern."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all = _Spent()
        self._each: OrderedDict[str, _Spent] = OrderedDict()

    def spend(self, pattern: str, seconds: float) -> bool:
        """Draws on it, unless ``seconds`` is negative; whether the pattern may go on."""
        if seconds <= 0:
            return True
        with self._lock:
            now = time.monotonic()
            together = self._all.add(seconds, now, 1e-2)
            own = self._each.setdefault(pattern, _Spent()).add(seconds, now, _FORGOTTEN)
            self._each.move_to_end(pattern)
            if len(self._each) > _REMEMBERED:
                self._each.popitem(last=False)
            return together <= TIME_LIMIT or own <= _NOISE


_allowance = _Allowance()
#: Seconds that the operation going on in this thread or task has drawn.
_operation: ContextVar[_Spent | None] = ContextVar("operation", default=None)


@contextlib.contextmanager
def one_operation() -> Iterator[None]:
    """What is matched inside has an allowance of its own; also a decorator.

    An operation inside another is part of it.
    """
    if _operation.get() is not None:
        yield
        return
    token = _operation.set(_Spent())
    try:
        yield
    finally:
        _operation.reset(token)


def _may_go_on(pattern: str, seconds: float, inside: float, outside: float) -> bool:
    """Draws what was taken beyond the usual, inside or outside of an operation."""
    operation = _operation.get()
    if operation is None:
        return _allowance.spend(pattern, seconds - outside)
    operation.seconds += max(0.0, seconds - inside)
    return operation.seconds <= TIME_LIMIT


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    counts = 1
    for least, most in _COUNT.findall(pattern):
        # More digits than a count can have: as large as it is long.
        counts *= max(1, *(int(n) if len(n) < 8 else 10 ** len(n[:9]) for n in (least, most) if n))
    for what, value, limit in (
        ("characters", len(pattern), _LONGEST),
        ("repetitions, all counts multiplied", counts, _COUNTS),
    ):
        if value > limit:
            raise ValueError(f"{value:,} {what}, at most {limit:,} are taken")
    if _RECURSION.search(pattern):
        raise ValueError("it calls itself, or a group of its own")
    started = time.thread_time()
    compiled = regex.compile(pattern)
    if not _may_go_on(pattern, time.thread_time() - started, _COMPILING, _COMPILING):
        raise ValueError("compiling it and others took too long")
    return compiled


@functools.lru_cache(maxsize=64)
def _listed(pattern: str) -> frozenset[str] | None:
    """The names that a pattern lists, if that is all it does."""
    if not _NAMES.fullmatch(pattern):
        return None
    return frozenset(pattern.replace("\\", "").split("|"))


def check_regex(pattern: str, *, key: str) -> None:
    """Raises a ``ConfigError`` unless ``pattern`` is a usable regular expression."""
    if _listed(pattern) is None:
        _compile(pattern, key)


def _compile(pattern: str, key: str) -> Any:
    try:
        return _compiled(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise ConfigError(
            f"{pattern[:200]!r} is not a valid regular expression: {error}.",
            key=key,
            expected="a regular expression for names of modules",
            got=pattern[:200],
        ) from error


def check_amount(parts: Iterable[str], *, key: str) -> None:
    """Refuses a list with too many patterns that are more than a name.

    Raises:
        ConfigError: If there are over 100.
    """
    _check_amount([p for p in parts if not _NAME.fullmatch(p)], key=key)


def _check_amount(expressions: Sequence[str], *, key: str | None) -> None:
    if len(expressions) > _MOST:
        raise ConfigError(
            "There are too many regular expressions.",
            key=key or expressions[0],
            expected=f"at most {_MOST} that are more than the end of a name",
            got=len(expressions),
            fix="name the modules",
        )


def matches_regex(pattern: str, name: str, *, key: str = "targets") -> bool:
    """Whether ``pattern`` matches the whole of ``name``.

    Raises:
        ConfigError: If the pattern is not valid, takes longer than ``TIME_LIMIT``, or is one of
            many slow ones.
    """
    listed = _listed(pattern)
    if listed is not None:
        return name in listed
    return _match(_compile(pattern, key), name, key)


def match_beginning(pattern: str, name: str, *, key: str) -> Any:
    """The match of ``pattern`` with the beginning of ``name``, or ``None``.

    Raises:
        ConfigError: As :func:`matches_regex` does.
    """
    return _timed(_compile(pattern, key).match, pattern, name, key)


def _match(compiled: Any, name: str, key: str) -> bool:
    return _timed(compiled.fullmatch, compiled.pattern, name, key) is not None


def _timed(match: Callable[..., Any], pattern: str, name: str, key: str) -> Any:
    started = time.thread_time()
    try:
        found = match(name, timeout=TIME_LIMIT)
        if _may_go_on(pattern, time.thread_time() - started, _USUAL, _OUTSIDE):
            return found
    except TimeoutError:
        _may_go_on(pattern, TIME_LIMIT, 0.0, 0.0)
    except (RecursionError, MemoryError):
        pass
    raise ConfigError(
        f"The regular expression {pattern[:200]!r} took over {TIME_LIMIT} s on "
        f"{name[:200]!r}, by itself or together with others.",
        key=key,
        expected="microseconds for a name",
        got=f"over {TIME_LIMIT} s",
        fix="avoid nested repetition such as (a+)+, or name the modules",
    )


def matches_name(pattern: str, name: str) -> bool:
    """Whether ``name`` is ``pattern``, ends in ``.pattern``, or fits it as a glob."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return any(c in pattern for c in "*?[") and fnmatch.fnmatchcase(name, pattern)


class _Keys:
    """The keys of a mapping, those that are ends of names apart from regular expressions."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        #: (length, text after the last wildcard) → (place among the keys, parts between
        #: wildcards with where they begin).
        self.ends: dict[tuple[int, str], list[tuple[int, list[tuple[int, str]]]]] = {}
        self.others: list[tuple[int, str]] = []
        for place, key in enumerate(keys):
            if not _NAME.fullmatch(key):
                self.others.append((place, key))
                continue
            parts, start = [], 0
            # An escaped dot is a dot, a plain one any character.
            for part in key.replace("\\.", "\0").split("."):
                parts.append((start, part.replace("\0", ".")))
                start += len(part) + 1
            self.ends.setdefault((start - 1, parts[-1][1]), []).append((place, parts))
        self.tails = sorted({(length, len(tail)) for length, tail in self.ends})
        #: Name → key that was found. The same is asked of a layer again and again.
        self.found: dict[str, str | None] = {}

    def first(self, name: str) -> int | None:
        """Place of the first of the ends that ``name`` or its dotted end is."""
        found = None
        for length, tail in self.tails:
            rest = len(name) - length
            if rest < 0 or (rest and name[rest - 1] != "."):
                continue
            for place, parts in self.ends.get((length, name[len(name) - tail :]), ()):
                if found is not None and place > found:
                    break
                if all(name.startswith(text, rest + start) for start, text in parts):
                    found = place
                    break
        return found


@functools.lru_cache(maxsize=32)
def _sorted(keys: tuple[str, ...]) -> _Keys:
    return _Keys(keys)


def first_matching_key(keys: Iterable[str], name: str) -> str | None:
    """The first key that, as a regular expression, matches ``name`` or its dotted end.

    This is the rule of PEFT's ``rank_pattern`` and ``alpha_pattern`` (0.21.2,
    ``get_pattern_key``), so that its files mean the same here.

    Raises:
        ConfigError: If a key is not valid, takes too long, or there are too many that are more
            than the end of a name.
    """
    listed = tuple(keys)
    if not listed:
        return None
    known = _sorted(listed)
    if name in known.found:
        return known.found[name]
    key = _first(known, listed, name)
    if len(known.found) < _ANSWERS:
        known.found[name] = key
    return key


def _first(known: _Keys, listed: tuple[str, ...], name: str) -> str | None:
    _check_amount([key for _, key in known.others], key=None)
    # No dot stands for a line end, so that such names go the long way.
    best = known.first(name) if "\n" not in name else None
    if "\n" in name:
        for key in listed:
            if _match(_compile(rf"(.*\.)?({key})", key), name, key):
                return key
        return None
    for place, key in known.others:
        if best is not None and place > best:
            break
        if _match(_compile(rf"(.*\.)?({key})", key), name, key):
            return key
    return None if best is None else listed[best]


def value_for(pattern: Mapping[str, T], name: str, default: T) -> T:
    """What ``pattern`` says of the module of that name, by :func:`first_matching_key`."""
    key = first_matching_key(pattern, name)
    return default if key is None else pattern[key]
