"""Replacing the files of a directory as a whole, durably.

A new generation of files is written to a temporary sibling directory, brought to disk
(``fsync``), and swapped in by name. On Linux and macOS the two directories change places
in one system call (``renameat2`` with ``RENAME_EXCHANGE``, ``renamex_np`` with
``RENAME_SWAP``), so that the path names the old generation or the new one at every moment.
Where that call is missing, two renames follow each other; a process that dies between them
leaves no directory under the path but the old generation beside it, and whoever reads or
writes the path next puts it back (:func:`recover`).

What the directory holds beside our own files stays: files are hard links to the same
inodes (copies where the file system has none), subdirectories are moved over after the
swap, and are found again by :func:`recover` if the process dies just then.

Writers of one path take turns (a lock file beside it, ``.<name>.lock``). Readers take no
lock.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasmith.errors import AdapterFileError

__all__ = ["interrupted", "locked", "recover", "replace_files"]

#: Seconds to wait for another writer of the same path.
LOCK_TIMEOUT = 120.0

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2


@contextmanager
def locked(target: Path, *, timeout: float | None = None) -> Iterator[None]:
    """Holds the writers' lock of a path.

    Raises:
        AdapterFileError: If another process keeps it longer than ``timeout`` seconds
            (default ``LOCK_TIMEOUT``).
    """
    from filelock import FileLock, Timeout

    seconds = LOCK_TIMEOUT if timeout is None else timeout
    lock = FileLock(_sibling(target, "lock"))
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise AdapterFileError(
            f"Another process has been writing here for over {seconds:g} s.",
            file=target,
            fix="wait for it to finish; its lock ends with the process",
        ) from error
    try:
        yield
    finally:
        # The lock file stays: removing it while another process waits for it would let
        # two writers in.
        lock.release()


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def replace_files(target: Path, owned: Collection[str], write: Callable[[Path], None]) -> None:
    """Replaces the ``owned`` files of a directory by what ``write`` puts into a new one.

    Args:
        target: The directory; made if it does not exist. Its parent must be writable.
        owned: Names of the files that belong to a generation: those of the old one
            disappear with it, everything else in the directory stays.
        write: Called with an empty directory on the same file system.

    Raises:
        Whatever ``write`` raises; ``target`` is as it was then.
    """
    target = Path(os.path.realpath(target))  # a link to a directory stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        recover(target, owned)
        stage = _sibling(target, f"{secrets.token_hex(4)}.new")
        stage.mkdir()
        try:
            write(stage)
            if target.exists():
                shutil.copymode(target, stage)
                _keep_files(target, stage, owned)
            for entry in stage.iterdir():
                if entry.name in owned:
                    _sync(entry)
            _sync(stage)
            if not target.exists():
                stage.rename(target)
            elif not _exchange(stage, target):
                aside = _sibling(target, f"{secrets.token_hex(4)}.old")
                target.rename(aside)
                try:
                    stage.rename(target)
                except BaseException:
                    aside.rename(target)
                    raise
                stage = aside
        except BaseException:
            _discard(stage, target, owned)
            raise
        _sync(target.parent)
        if stage.exists():
            _discard(stage, target, owned)


def recover(target: Path, owned: Collection[str]) -> None:
    """Cleans up after writers that died; only for who holds the writers' lock.

    Puts an old generation back if there is nothing under the path, moves what was not
    ours to where it belongs, and deletes the rest.
    """
    target = Path(os.path.realpath(target))
    for left in _leftovers(target):
        if left.suffix == ".old" and not target.exists():
            left.rename(target)
        else:
            _discard(left, target, owned)


def _leftovers(target: Path) -> list[Path]:
    """Temporary directories of this path, old generations first."""
    # By the whole name: those of the path "a.b" begin like those of "a".
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(old|new)")
    if not target.parent.is_dir():
        return []
    found = (e for e in target.parent.iterdir() if ours.fullmatch(e.name) and e.is_dir())
    return sorted(found, key=lambda e: (e.suffix != ".old", e.name))


def interrupted(target: Path) -> bool:
    """Whether a writer died between the two renames, so that only ``.old`` is there."""
    target = Path(os.path.realpath(target))
    return not target.exists() and any(e.suffix == ".old" for e in _leftovers(target))


def _keep_files(old: Path, new: Path, owned: Collection[str]) -> None:
    for entry in old.iterdir():
        if entry.name in owned or (entry.is_dir() and not entry.is_symlink()):
            continue
        copy = new / entry.name
        try:
            os.link(entry, copy, follow_symlinks=False)
        except OSError:
            shutil.copy2(entry, copy, follow_symlinks=False)


def _discard(stale: Path, target: Path, owned: Collection[str]) -> None:
    """Deletes a stale generation, after moving what is not ours into the current one."""
    if target.is_dir():
        for entry in stale.iterdir():
            if entry.name not in owned and not os.path.lexists(target / entry.name):
                entry.rename(target / entry.name)
    shutil.rmtree(stale, ignore_errors=True)


def _sync(path: Path) -> None:
    """Brings a file or the entries of a directory to disk."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    if path.is_dir() and os.name == "nt":
        return  # directories cannot be opened there, and renames are journalled
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Lets two directories change places in one step; ``False`` if the system cannot."""
    if sys.platform == "linux":
        name, flags = "renameat2", (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b))
        arguments = (*flags, _RENAME_EXCHANGE)
    elif sys.platform == "darwin":
        name, arguments = "renamex_np", (os.fsencode(a), os.fsencode(b), _RENAME_SWAP)
    else:
        return False
    function = getattr(ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True), name, None)
    if function is None:  # glibc before 2.28
        return False
    if function(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    # An old kernel, or a file system that cannot exchange (some network, FUSE and overlay
    # ones).
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), os.fspath(a), None, os.fspath(b))
