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
lock. Whatever fails, the last ``fsync`` too, the call raises and the old generation is back.

A single file is written under another name and renamed (:func:`replace_file`). Its writers need
not take turns; each locks the file it writes into, so that the next one can tell what a dead
process has left from what a living one is writing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from lorasmith.errors import AdapterFileError, LorasmithError

__all__ = [
    "exchange",
    "explained_failure",
    "interrupted",
    "leftovers",
    "locked",
    "read_one_generation",
    "recover",
    "replace_file",
    "replace_files",
    "replace_text",
]

#: Seconds to wait for another writer of the same path.
LOCK_TIMEOUT = 120.0

#: Times that files are read again while somebody is replacing them, and seconds between.
_TRIES = 20
_PAUSE = 0.02

#: What safetensors writes into before it renames; a writer that dies there leaves it.
_UNFINISHED = re.compile(r"\.tmp[0-9A-Za-z]{6}")

_T = TypeVar("_T")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2


@contextmanager
def locked(target: Path, *, timeout: float | None = None) -> Iterator[None]:
    """Holds the writers' lock of a path.

    Raises:
        AdapterFileError: If another process keeps it longer than ``timeout`` seconds
            (default ``LOCK_TIMEOUT``), or the directory takes no file.
    """
    from filelock import FileLock, Timeout

    seconds = LOCK_TIMEOUT if timeout is None else timeout
    file = _sibling(target, "lock")
    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            # Where no file can be made, as below /proc, the lock waits as if somebody had it.
            if not file.exists():
                raise AdapterFileError(
                    "No file can be made in this directory.",
                    file=target.parent,
                    fix="choose another place to write to",
                ) from error
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
            try:
                write(stage)
            except Exception as error:
                _as_os_error(error)
                raise
            if target.exists():
                shutil.copymode(target, stage)
                _keep_files(target, stage, owned)
            for entry in stage.iterdir():
                if entry.name in owned:
                    _sync(entry)
            _sync(stage)
        except BaseException:
            _discard(stage, target, owned)
            raise
        _swap_in(stage, target, owned)


@contextmanager
def explained_failure(
    what: str, target: Path, kind: type[LorasmithError] = AdapterFileError
) -> Iterator[None]:
    """Around writing: turns an ``OSError`` into an error of ours that says what was not written.

    Args:
        what: What is written, e.g. ``"The export"``.
        target: Where it would be.
        kind: Class of the error.
    """
    try:
        yield
    except OSError as error:
        mount = os.path.ismount(target)
        raise kind(
            f"{what} could not be written: {error}.",
            expected="a directory that can be written, as well as the one above it",
            got="a mount point, which cannot be replaced as a whole"
            if mount
            else error.strerror or error,
            fix=f"choose a directory in it, e.g. {target / 'new'}"
            if mount
            else "check free space and permissions of the directory above",
            file=target,
            key="output",
        ) from error


def _swap_in(stage: Path, target: Path, owned: Collection[str]) -> None:
    """Gives a finished generation its name; puts the old one back if anything fails."""
    old: Path | None = None
    try:
        if not target.exists():
            stage.rename(target)
        else:
            old = exchange(stage, target)
            _hand_over(old, target, owned)
        _sync(target.parent)
    except BaseException:
        if old is not None:
            stage = exchange(old, target)
        elif not stage.exists() and target.exists():
            target.rename(stage)
        _discard(stage, target, owned)
        raise
    if old is not None:
        # It is no longer anybody's: what cannot be deleted now, the next writer deletes.
        shutil.rmtree(old, ignore_errors=True)


def exchange(stage: Path, target: Path) -> Path:
    """Puts a directory in the place of another.

    Returns:
        Where the other one is now.

    Raises:
        OSError: It failed; both are where they were.
    """
    if _exchange(stage, target):
        return stage
    aside = _sibling(target, f"{secrets.token_hex(4)}.old")
    target.rename(aside)
    try:
        stage.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    return aside


def _as_os_error(error: Exception) -> None:
    """Raises what safetensors says of a full or broken disk as the ``OSError`` that it is."""
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        found = re.search(r"(?:code:|os error) (\d+)", str(error))
        if found is None:
            raise OSError(str(error)) from error
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def replace_file(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Replaces one file, durably: whoever opens it reads the old one or the new one.

    Args:
        target: The file; its directory exists.
        write: Called with a binary stream.

    Raises:
        Whatever ``write`` raises; ``target`` is as it was then.
    """
    target = Path(os.path.realpath(target))
    for left in leftovers(target):
        if left.is_file() and _abandoned(left):
            left.unlink(missing_ok=True)
    stream = _own_part(target)
    part = Path(stream.name)
    old = target.exists()
    placed = swapped = False
    try:
        write(stream)
        stream.flush()
        if old:
            shutil.copymode(target, part)
        os.fsync(stream.fileno())
        if sys.platform == "win32":
            stream.close()  # an open file cannot be renamed there
        # Elsewhere it stays open: its lock ends when it is closed, and as long as the file has the
        # name of an unfinished one, another writer would take it for abandoned.
        # The old one is kept under the other name until the new one is on disk.
        swapped = old and _exchange(part, target)
        if not swapped:
            os.replace(part, target)
        placed = True
        _sync(target.parent)
    except BaseException:
        if swapped:
            with suppress(FileNotFoundError):  # another writer has cleared the old one away
                _exchange(part, target)
        elif placed and not old:
            target.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        raise
    finally:
        stream.close()
    part.unlink(missing_ok=True)


def replace_text(target: Path, text: str) -> None:
    """Replaces one file by a text in UTF-8, line ends as they are; see :func:`replace_file`."""
    data = text.encode("utf-8")

    def write(stream: BinaryIO) -> None:
        stream.write(data)

    replace_file(target, write)


def _own_part(target: Path) -> BinaryIO:
    """A new file beside the target, with the lock by which others see that it is in use."""
    while True:
        part = _sibling(target, f"{secrets.token_hex(4)}.part")
        stream = part.open("xb")
        # Before it was locked another writer may have taken it for abandoned.
        if _lock(stream) and part.exists():
            return stream
        stream.close()
        part.unlink(missing_ok=True)


def _lock(stream: BinaryIO) -> bool:
    """Whether nobody else holds the file; it is ours until it is closed then."""
    if sys.platform == "win32":
        return True  # an open file cannot be deleted there
    import fcntl

    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: then nothing is taken for abandoned.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _abandoned(part: Path) -> bool:
    """Whether the process that wrote it is gone."""
    if sys.platform == "win32":
        try:
            part.unlink(missing_ok=True)
        except OSError:
            return False
        return True
    import fcntl

    try:
        with part.open("rb") as stream:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def recover(target: Path, owned: Collection[str]) -> None:
    """Cleans up after writers that died; only for who holds the writers' lock.

    Puts an old generation back if there is nothing under the path, moves what was not
    ours to where it belongs, and deletes the rest.
    """
    target = Path(os.path.realpath(target))
    for left in leftovers(target):
        if left.suffix == ".part":
            continue  # of a single file
        if left.suffix == ".old" and not target.exists():
            left.rename(target)
        else:
            _discard(left, target, owned)


def leftovers(target: Path) -> list[Path]:
    """What writers of this path have beside it, or have left there: old generations first."""
    target = Path(os.path.realpath(target))
    # By the whole name: those of the path "a.b" begin like those of "a".
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(old|new|part)")
    if not target.parent.is_dir():
        return []
    found = (
        e
        for e in target.parent.iterdir()
        if ours.fullmatch(e.name) and e.is_dir() == (e.suffix != ".part")
    )
    return sorted(found, key=lambda e: (e.suffix != ".old", e.name))


def interrupted(target: Path) -> bool:
    """Whether a writer died between the two renames, so that only ``.old`` is there."""
    target = Path(os.path.realpath(target))
    return not target.exists() and any(e.suffix == ".old" for e in leftovers(target))


def read_one_generation(folder: Path, names: Collection[str], read: Callable[[], _T]) -> _T:
    """What ``read`` makes of files of a directory that somebody may be replacing meanwhile.

    It is called again where the files became others while it read, and a few times at most.

    Args:
        folder: The directory.
        names: The files of a generation.
        read: Must open whatever it needs before it returns.

    Raises:
        LorasmithError: What ``read`` raised of files that stayed the same; or they change faster
            than they can be read.
    """
    failure: LorasmithError | None = None
    for _ in range(_TRIES):
        before = _identities(folder, names)
        try:
            found = read()
        except LorasmithError as error:
            failure = error
        else:
            if _identities(folder, names) == before:
                return found
            failure = None
        # Where nothing has changed yet, the exchange may be under way on a system that needs two
        # renames for it.
        time.sleep(_PAUSE)
        if failure is not None and _identities(folder, names) == before:
            raise failure
    raise failure or AdapterFileError(
        "The files change faster than they can be read.",
        file=folder,
        fix="wait until whoever writes them has finished",
    )


def _identities(folder: Path, names: Collection[str]) -> list[tuple[int, ...] | None]:
    return [_identity(folder / name) for name in sorted(names)]


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


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
    _hand_over(stale, target, owned)
    shutil.rmtree(stale, ignore_errors=True)


def _hand_over(stale: Path, target: Path, owned: Collection[str]) -> None:
    """Moves what is not ours, and not there, into the current generation."""
    if target.is_dir() and stale.is_dir():
        for entry in stale.iterdir():
            if entry.name in owned or _UNFINISHED.fullmatch(entry.name):
                continue
            if not os.path.lexists(target / entry.name):
                entry.rename(target / entry.name)


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
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
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
