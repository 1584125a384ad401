"""Whether a run will be able to write its output, found out before it trains.

Two things are tried, not asked: a small file in the directory, and one beside it, since an
adapter is written to a sibling directory that then takes the place of the old one
(``lorasmith.io.atomic``).
Free space is compared with an estimate; quotas show only where the trial write hits them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from lorasmith.errors import ConfigError, TrainingError

__all__ = ["bytes_needed", "check_space", "check_writable"]

_PROBE = 1 << 16
#: For configurations, training.json and the like, in bytes.
_SMALL = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(output: Path) -> None:
    """Tries to write into a directory and beside it.

    Args:
        output: A directory that exists.

    Raises:
        ConfigError: It cannot be written, or its name cannot pass to another directory.
    """
    output = output.resolve()
    if os.path.ismount(output):
        raise ConfigError(
            "The output is a mount point, whose content cannot be replaced as a whole.",
            expected="a directory in it",
            got=output,
            fix=f"give {output / 'run'}",
            file=output,
            key="output",
        )
    for folder in (output, output.parent):
        error = _trial(folder)
        if error is None:
            continue
        full = error.errno in _FULL
        raise ConfigError(
            "The output cannot be written: there is no room left."
            if full
            else "The output cannot be written.",
            expected="a directory that can be written, as well as the one above it",
            got=f"{folder}: {error.strerror or error}",
            fix="make room, or choose another output"
            if full
            else "change its permissions, or choose another output",
            file=output,
            key="output",
        ) from error


def _trial(folder: Path) -> OSError | None:
    """What is in the way of writing a file into a directory."""
    try:
        _try(folder)
    except OSError as error:
        return error
    return None


def _try(folder: Path) -> None:
    """Writes a file to the disk and takes it away."""
    descriptor, name = tempfile.mkstemp(prefix=".lorasmith-", suffix=".probe", dir=folder)
    try:
        try:
            os.write(descriptor, bytes(_PROBE))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def bytes_needed(adapter: int, *, checkpoints: int, keeps_best: bool = False) -> int:
    """Most bytes that a run occupies at a time.

    A checkpoint holds the adapter twice (as PEFT has it, and exactly), two moments of AdamW, and
    with early stopping the best adapter. One more than are kept exists while it is written, and
    the adapter itself is written beside its predecessor.

    Args:
        adapter: Bytes of the trained tensors.
        checkpoints: How many are kept.
        keeps_best: Whether there is early stopping.
    """
    return (checkpoints + 1) * ((4 + keeps_best) * adapter + _SMALL) + 2 * adapter + _SMALL


def check_space(output: Path, needed: int) -> None:
    """Compares the free space of a file system with what a run will write.

    Args:
        output: A directory that exists.
        needed: Bytes, see :func:`bytes_needed`.

    Raises:
        TrainingError: There is less.
    """
    free = shutil.disk_usage(output).free
    if free < needed:
        raise TrainingError(
            "There is too little room for the run's checkpoints and its adapter.",
            expected=f"{needed / 2**20:,.0f} MiB",
            got=f"{free / 2**20:,.0f} MiB free",
            fix="make room, choose another output, or keep fewer checkpoints "
            "(--save-total-limit 1, --adapter.r with a smaller rank)",
            file=output,
            key="output",
        )
