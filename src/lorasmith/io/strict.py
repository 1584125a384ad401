"""Reading JSON of strangers without guessing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from lorasmith.errors import AdapterFileError

__all__ = ["parse_object"]

#: Bytes. A configuration with an entry for every layer of the largest model has far less.
_LIMIT = 16 * 2**20


def parse_object(data: bytes, file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises:
        AdapterFileError: If it is not UTF-8, not JSON, not an object, too large, gives a
            key twice or holds NaN or Infinity (which JSON does not have).
    """
    if len(data) > _LIMIT:
        raise AdapterFileError(
            "The file is too large for a configuration.",
            file=file,
            expected=f"at most {_LIMIT:,} bytes",
            got=f"{len(data):,} bytes",
        )

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise AdapterFileError(
                    f"The key {key!r} is given twice, so its value is not clear.",
                    file=file,
                    key=key,
                    got=f"{found[key]!r} and {value!r}",
                    fix="delete the wrong one",
                )
            found[key] = value
        return found

    def refuse(constant: str) -> NoReturn:
        raise AdapterFileError(
            "A number is not finite.", file=file, expected="a finite number", got=constant
        )

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"The file is not UTF-8 text: {error}.", file=file) from error
    except json.JSONDecodeError as error:
        raise AdapterFileError(
            f"The file is not valid JSON: {error}.",
            file=file,
            fix="the file may be cut off; copy or download it again",
        ) from error
    except RecursionError as error:
        raise AdapterFileError("The file is nested too deeply.", file=file) from error
    if not isinstance(value, dict):
        raise AdapterFileError(
            "The file does not hold a JSON object.",
            file=file,
            expected="{...}",
            got=type(value).__name__,
        )
    return value
