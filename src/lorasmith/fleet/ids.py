"""Ids of a fleet's adapters: which there can be, and what is said of one that there is not.

Ids are names, not paths: any non-empty text of at most 255 characters without control
characters.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from lorasmith.errors import ConfigError, UnknownNameError

__all__ = ["MAX_ID", "check_id", "unknown_id"]

#: Longest id, in characters.
MAX_ID = 255


def check_id(name: object) -> str:
    """The id, if it is one.

    Raises:
        ConfigError: If it is not a non-empty text of at most 255 characters without control
            characters.
    """
    # Cc: control characters; Cs: lone surrogates, which no file can hold.
    if (
        isinstance(name, str)
        and 0 < len(name) <= MAX_ID
        and not any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
    ):
        return name
    raise ConfigError(
        "That cannot be the id of an adapter.",
        expected=f"1 to {MAX_ID} characters, none of them a control character",
        got=repr(name)[:80],
        key="ids",
    )


def unknown_id(
    what: str,
    id: str,  # noqa: A002 - its name
    ids: Sequence[str],
    *,
    key: str | None = None,
) -> UnknownNameError:
    """The error for an id that no adapter has, with those that are spelt alike.

    Args:
        what: What went wrong, a sentence.
        id: The id.
        ids: Those that there are.
        key: The argument that it was given as.
    """
    plain = {name.casefold(): name for name in reversed(ids)}
    near = difflib.get_close_matches(str(id).casefold(), plain, n=3)
    return UnknownNameError(
        what,
        expected=", ".join(map(repr, ids[:6])) + (f", … ({len(ids)})" if len(ids) > 6 else "")
        if ids
        else "there is none",
        got=repr(id),
        fix=f"did you mean {' or '.join(repr(plain[n]) for n in near)}?" if near else None,
        key=key,
    )
