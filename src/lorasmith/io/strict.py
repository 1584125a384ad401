"""Reading JSON of strangers without guessing."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterFileError

__all__ = ["check_inside", "parse_object", "read_limited", "read_object"]

#: Bytes. A configuration with an entry for every layer of the largest model has far less.
_LIMIT = 16 * 2**20
#: Values in it. A few bytes of JSON become some hundred bytes of Python objects.
_VALUES = 200_000


def read_object(
    file: Path, *, limit: int = _LIMIT, values: int = _VALUES, root: Path | None = None
) -> dict[str, Any]:
    """The JSON object in a file; see :func:`parse_object`.

    Args:
        file: The file.
        limit: Largest size in bytes; a larger file is not read at all.
        values: Largest number of values in it.
        root: The directory that it must be in, links followed.

    Raises:
        AdapterFileError: If it is not a regular file, too large, or holds no such object.
        OSError: If it is not there or cannot be read.
    """
    return parse_object(read_limited(file, limit=limit, root=root), file, values=values)


def read_limited(file: Path, *, limit: int = _LIMIT, root: Path | None = None) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes, in the directory ``root``."""
    if root is not None:
        check_inside(file, root)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        # A pipe would be waited for, and a device never ends.
        raise AdapterFileError("That is not a regular file.", file=file, expected="a file")
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    _check_size(len(data) if found.st_size <= limit else found.st_size, file, limit)
    return data


def _check_size(size: int, file: str | os.PathLike[str], limit: int) -> None:
    if size > limit:
        raise AdapterFileError(
            "The file is too large for a configuration.",
            file=file,
            expected=f"at most {limit:,} bytes",
            got=f"{size:,} bytes",
        )


def check_inside(file: Path, root: Path) -> None:
    """Refuses a link that leads out of the directory it is in.

    Who passes a directory has not asked for the files elsewhere that a stranger's link names.
    The hub's cache is an exception: its snapshots are links into ``blobs`` of the same
    repository.

    Raises:
        AdapterFileError: If the file, links followed, is not below ``root``.
    """
    real, inside = Path(os.path.realpath(file)), Path(os.path.realpath(root))
    if real.is_relative_to(inside):
        return
    blobs = real.parent
    if blobs.name == "blobs" and blobs.parent / "snapshots" in inside.parents:
        return
    raise AdapterFileError(
        "The file is a link that leads out of its directory.",
        file=file,
        key=file.name,
        expected=f"a file in {inside}",
        got=real,
        fix="copy the file there in place of the link",
    )


class _NotFinite:
    def __init__(self, text: str) -> None:
        self.text = text


def parse_object(
    data: bytes, file: str | os.PathLike[str], *, limit: int = _LIMIT, values: int = _VALUES
) -> dict[str, Any]:
    """The JSON object in ``data``.

    Args:
        data: UTF-8 text.
        file: Where it is from, for messages.
        limit: Largest size in bytes.
        values: Largest number of values in it.

    Raises:
        AdapterFileError: If it is not UTF-8, not JSON, not an object, too large, gives a
            key twice, holds NaN or Infinity (which JSON does not have), a number too large
            for a float, or half a surrogate pair (which no file can hold).
    """
    _check_size(len(data), file, limit)
    if data[:3] == b"\xef\xbb\xbf":
        raise AdapterFileError(
            "The file begins with a byte-order mark, which JSON does not have.",
            file=file,
            expected="UTF-8 text that begins with {",
            got="EF BB BF",
            fix="save it as UTF-8 without a byte-order mark",
        )
    count = sum(map(data.count, (b",", b"[", b"{")))
    if count > values:
        raise AdapterFileError(
            "The file holds too many values for a configuration.",
            file=file,
            expected=f"at most {values:,}",
            got=f"about {count:,}",
        )

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise AdapterFileError(
                    f"The key {key!r} is given twice, so its value is not clear.",
                    file=file,
                    key=key,
                    expected="each key once",
                    got=f"{found[key]!r} and {value!r}"[:200],
                    fix="delete the wrong one",
                )
            wrong = _not_finite(value)
            if wrong is not None:
                raise AdapterFileError(
                    "A number is not finite.",
                    file=file,
                    key=key,
                    expected="a finite number",
                    got=wrong[:40],
                )
            found[key] = value
        return found

    def number(text: str) -> Any:
        value = float(text)
        return value if math.isfinite(value) else _NotFinite(text)

    def integer(text: str) -> Any:
        # Beyond a float's range it cannot be meant, and converting it can take long.
        return int(text) if len(text) <= 300 else _NotFinite(text)

    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=_NotFinite,
            parse_float=number,
            parse_int=integer,
        )
        # Only an escape can make one: the decoder refuses it in the text itself.
        if "\\u" in text and _has_surrogate(value):
            raise AdapterFileError(
                "A text holds half a surrogate pair, which is no character.",
                file=file,
                expected="whole characters",
                got="an escape from \\ud800 to \\udfff on its own",
            )
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"The file is not UTF-8 text: {error}.",
            file=file,
            expected="JSON",
            got=f"the byte {data[error.start]:#04x} at {error.start}",
        ) from error
    except json.JSONDecodeError as error:
        raise AdapterFileError(
            f"The file is not valid JSON: {error}.",
            file=file,
            expected="a JSON object",
            got=f"{len(data):,} bytes",
            fix="the file may be cut off; copy or download it again",
        ) from error
    except RecursionError as error:
        raise AdapterFileError(
            "The file is nested too deeply.", file=file, expected="a few levels"
        ) from error
    if not isinstance(value, dict):
        raise AdapterFileError(
            "The file does not hold a JSON object.",
            file=file,
            expected="{...}",
            got=type(value).__name__,
        )
    return value


def _not_finite(value: Any) -> str | None:
    """The text of a number in it that is not finite; objects in it have been looked through."""
    if isinstance(value, _NotFinite):
        return value.text
    if isinstance(value, list):
        return next((text for v in value if (text := _not_finite(v)) is not None), None)
    return None


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in value.items())
    return isinstance(value, list) and any(map(_has_surrogate, value))
