"""Whether a command will be able to write its report or picture, found out before the work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lorasmith.errors import ConfigError

__all__ = ["check_file"]

_TRIAL = bytes(1 << 16)


def check_file(path: Path, key: str) -> None:
    """Tries to write some bytes where a file, or the directories above it, will be made.

    Nothing is left there.

    Args:
        path: The file.
        key: The option that names it.

    Raises:
        ConfigError: It is a directory, or nothing can be written.
    """
    if path.is_dir():
        raise ConfigError(
            "What is to be written is a file, and there is a directory under that path.",
            expected="the name of a file",
            got=path,
            fix=f"give {path / 'report'}{path.suffix}",
            file=path,
            key=key,
        )
    folder = next(p for p in path.absolute().parents if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_TRIAL)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            "The file cannot be written.",
            expected="a path in a directory that can be written",
            got=f"{folder}: {error.strerror or error}",
            fix="choose another path, or free some space",
            file=path,
            key=key,
        ) from error
