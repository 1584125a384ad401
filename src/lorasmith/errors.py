"""The one family of exceptions that lorasmith raises on purpose.

Every message answers three questions in the same order: what was expected, what
was got, and what to do about it. Code that catches :class:`LorasmithError` catches
everything below; the subclasses that replace a built-in also inherit from it, so
``except ValueError`` keeps working where users expect it.
"""

from __future__ import annotations

import os
from typing import TypeVar

from lorasmith.redaction import redact

__all__ = [
    "AdapterFileError",
    "AttachError",
    "BaseMismatchError",
    "ConfigError",
    "DataError",
    "FuseError",
    "LorasmithError",
    "MissingDependencyError",
    "ModelError",
    "NonFiniteLossError",
    "TargetError",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedFeatureError",
    "first_line",
    "in_file",
    "short",
]


class LorasmithError(Exception):
    """Base class of every error raised by lorasmith.

    Args:
        what: One sentence that says what went wrong.
        expected: What a correct input would have looked like.
        got: What was found instead.
        fix: What the user can do now.
        file: The file or directory concerned, if any.
        key: The tensor, option or field concerned, if any.

    Secrets in them (passwords in URLs, tokens) are replaced by ``***``, see
    :mod:`lorasmith.redaction`. All of them are kept as attributes, so that ``--json`` output
    and callers can read them without parsing the message.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
    ) -> None:
        self.what = redact(what)
        self.expected = None if expected is None else redact(str(expected))
        self.got = None if got is None else redact(str(got))
        self.fix = None if fix is None else redact(fix)
        self.file = None if file is None else redact(os.fspath(file))
        self.key = None if key is None else redact(key)
        lines = [self.what]
        for label, value in (
            ("file", self.file),
            ("key", self.key),
            ("expected", self.expected),
            ("got", self.got),
            ("to fix", self.fix),
        ):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # The default would replay only the rendered message through ``__init__``
        # and lose the fields when an error crosses a process boundary.
        return (_rebuild, (type(self), self.__dict__.copy()))


_E = TypeVar("_E", bound=LorasmithError)


def in_file(
    error: LorasmithError,
    file: str | os.PathLike[str] | None,
    kind: type[_E],
    key: str | None = None,
) -> _E:
    """The same error as one of that file, for what is read without knowing where it comes from.

    Args:
        error: What was raised.
        file: Where what it is about stands.
        kind: Class of the new one.
        key: Its key, where the error has none.
    """
    return kind(
        error.what,
        expected=error.expected,
        got=error.got,
        fix=error.fix,
        file=file,
        key=error.key or key,
    )


def _rebuild(kind: type[LorasmithError], fields: dict[str, object]) -> LorasmithError:
    error = kind(
        str(fields["what"]),
        expected=fields["expected"],
        got=fields["got"],
        fix=fields["fix"],  # type: ignore[arg-type]
        file=fields["file"],  # type: ignore[arg-type]
        key=fields["key"],  # type: ignore[arg-type]
    )
    error.__dict__.update(fields)
    return error


class ConfigError(LorasmithError, ValueError):
    """A configuration value is outside what it may be."""


class UnsupportedFeatureError(ConfigError):
    """A configuration of another library asks for something that lorasmith does not have.

    ``key`` names the field; without it the rest of the configuration could be read.
    """


class UnknownNameError(LorasmithError, KeyError):
    """A variant, initialisation, adapter or data set of that name does not exist."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class TargetError(LorasmithError, ValueError):
    """No layer, or no usable layer, matches the targets asked for."""


class AttachError(LorasmithError, RuntimeError):
    """An adapter cannot be attached, detached or selected in the model's present state."""


class FuseError(LorasmithError, RuntimeError):
    """An adapter cannot be fused into, or taken out of, the base weights."""


class AdapterFileError(LorasmithError, ValueError):
    """An adapter on disk is incomplete, inconsistent or not an adapter at all."""


class BaseMismatchError(AdapterFileError):
    """An adapter was made for another base model than the one at hand."""


class ModelError(LorasmithError, ValueError):
    """A base model cannot be found or loaded."""


class DataError(LorasmithError, ValueError):
    """Training or evaluation data cannot be read or has the wrong shape."""


class TrainingError(LorasmithError, RuntimeError):
    """Training cannot start or go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class MissingDependencyError(LorasmithError, ImportError):
    """An optional package is needed for what was asked."""


def first_line(error: BaseException) -> str:
    """What an exception is and says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def short(value: object, limit: int = 120) -> str:
    """A value as it is written in Python, cut to at most ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
