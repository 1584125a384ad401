"""Where an adapter's files are: a directory, one in it, a repository of the hub, or a URL.

URLs are read through fsspec (``s3://``, ``gs://``, ``https://``, ``memory://``, …; the package
for the protocol must be installed). safetensors maps files, and those of a URL cannot be, so the
adapter's two or three files are copied into a temporary directory of this process first. A
copy serves again while the file system says the same of the files (size, time, ETag), until
the process ends; or until all that it was made for have said that they are done with it
(:func:`release`), as fleets of many adapters do.
``hf://owner/name[@revision][/folder]`` goes through the hub's own cache. :func:`fetch` does the
same for directories of other files.

A store replaces single files, not directories. What is copied is therefore compared with the
SHA-256 in its record (``lorasmith.json``, ``subspace.json``). While somebody pushes a new
generation (:mod:`lorasmith.io.push`), the files of the one that the record names are also in
``.lorasmith/<sha256>-<name>``, and are taken from there.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lorasmith.errors import AdapterFileError, MissingDependencyError
from lorasmith.io import peft
from lorasmith.io.atomic import interrupted, locked, recover
from lorasmith.io.models import hub_cache, hub_offline, hub_reachable
from lorasmith.io.strict import read_object
from lorasmith.io.tensors import sha256_of
from lorasmith.io.weights import OWN, OWNED, as_path

__all__ = [
    "FLEET",
    "FLEET_FILES",
    "HF",
    "HUB_ID",
    "RECORDS",
    "STAGING",
    "adapters_below",
    "copied",
    "failures",
    "fetch",
    "file_system",
    "hashes_in",
    "is_url",
    "listed",
    "locate",
    "release",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::)")
HF = re.compile(
    r"hf://(?:models/)?(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+?))?/*"
)
_FILES = (peft.CONFIG, peft.WEIGHTS, OWN)

#: The manifest of a compressed fleet, and all files of one.
FLEET = "subspace.json"
FLEET_FILES = (FLEET, "basis.safetensors", "codes.safetensors", "rest.safetensors")
#: File that says which others are of its generation → the field that lists them.
RECORDS = {OWN: "manifest", FLEET: "files"}
#: Directory of a store for files on their way in and out; ``<sha256>-<name>``.
STAGING = ".lorasmith"
_SHA = re.compile(r"[0-9a-f]{64}")
#: Times that files are copied again while somebody is replacing them, and seconds between.
_TRIES = 5
_PAUSE = 0.2


def locate(path: str | os.PathLike[str]) -> Path:
    """The directory that holds an adapter's files.

    Args:
        path: A directory with ``adapter_config.json``; one with a single subdirectory
            that has it (PEFT keeps adapters not named "default" so); or, if there is
            nothing under that path, the id ``owner/name`` of a repository on the hub. Of
            that only the adapter's files are downloaded; ``HF_HUB_OFFLINE=1`` keeps to
            the local cache. Or a URL that fsspec knows.

    Raises:
        AdapterFileError: If there is no adapter, or more than one.
        MissingDependencyError: If the hub is needed and ``huggingface_hub`` is missing, or
            a package for the URL's protocol.
    """
    if isinstance(path, str) and is_url(path):
        return _locate_url(path)
    try:
        return _locate(path, as_path(path).expanduser())
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no such user
        raise AdapterFileError(f"The path cannot be read: {error}.", file=path) from error


def _locate(path: str | os.PathLike[str], folder: Path) -> Path:
    if not folder.exists() and folder.name and interrupted(folder):
        # A writer is between its two renames, or died there.
        try:
            with locked(folder):
                recover(folder, OWNED)
        except OSError as error:
            raise AdapterFileError(
                f"A writer was interrupted, and its traces cannot be cleaned up: {error}.",
                file=folder,
                fix="rename the hidden directory .<name>.<number>.old beside it",
            ) from error
    if not folder.exists():
        text = os.fspath(path)
        if isinstance(path, str) and HUB_ID.fullmatch(text):
            folder = _download(text)
        else:
            raise AdapterFileError(
                "There is no such adapter.",
                file=folder,
                expected=f"a directory that holds {peft.CONFIG}, or a hub id owner/name",
                fix="check the path",
            )
    if not folder.is_dir():
        raise AdapterFileError(
            "An adapter is a directory, and this is a file.",
            file=folder,
            fix=f"pass the directory: {os.fspath(folder.parent)!r}",
        )
    if (folder / peft.CONFIG).is_file():
        return folder
    below = sorted(e for e in folder.iterdir() if (e / peft.CONFIG).is_file())
    if len(below) == 1:
        return below[0]
    raise AdapterFileError(
        "The directory holds several adapters." if below else "The directory holds no adapter.",
        file=folder,
        expected=peft.CONFIG,
        got=", ".join(e.name for e in below)
        or ", ".join(sorted(e.name for e in folder.iterdir())[:8])
        or "an empty directory",
        fix=f"choose one, e.g. {os.fspath(below[0])!r}"
        if below
        else "it is a compressed fleet: take an adapter out of it first (lorasmith fleet export)"
        if (folder / "subspace.json").is_file()
        else "check the path",
    )


def fetch(path: str | os.PathLike[str], names: Sequence[str]) -> Path | None:
    """The directory of this machine that holds certain files, copied from elsewhere if need be.

    Args:
        path: A directory; a URL; or, if there is nothing under that path, a hub id.
        names: Names of the files. Without the first one it is not such a directory.

    Returns:
        The directory, or ``None`` where it does not hold the first file.

    Raises:
        AdapterFileError: If the URL, or the hub, cannot be read.
        MissingDependencyError: If a package for it is missing.
    """
    if isinstance(path, str) and is_url(path):
        if (named := HF.fullmatch(path)) is not None:
            folder = _download(named["id"], named["revision"], named["folder"], names)
            folder = folder / named["folder"] if named["folder"] else folder
        elif path.startswith(("file://", "local://")):
            folder = Path(_local(path))
        else:
            files, root = file_system(path)
            return (
                _fetch(files, root, path, names) if _is_file(files, f"{root}/{names[0]}") else None
            )
    else:
        folder = as_path(path).expanduser()
        if not folder.exists() and isinstance(path, str) and HUB_ID.fullmatch(path):
            folder = _download(path, names=names)
    return folder if (folder / names[0]).is_file() else None


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it has the form of a URL, ``protocol://…``."""
    return isinstance(path, str) and _URL.match(path) is not None


def adapters_below(path: str | os.PathLike[str]) -> list[str] | None:
    """The adapters in the subdirectories of a directory that is not one itself, sorted.

    Args:
        path: A directory or a URL.

    Returns:
        Their paths or URLs; ``None`` where the path is an adapter, or nothing that can be
        listed (a hub id).

    Raises:
        AdapterFileError: If it is a URL that cannot be read.
        MissingDependencyError: If a package for the URL's protocol is missing.
    """
    if isinstance(path, str) and is_url(path):
        if HF.fullmatch(path):
            return None
        if not path.startswith(("file://", "local://")):
            files, root = file_system(path)
            return (
                None
                if _is_file(files, f"{root}/{peft.CONFIG}")
                else [files.unstrip_protocol(folder) for folder in _below(files, root, path)]
            )
        path = _local(path)
    folder = as_path(path).expanduser()
    try:
        if not folder.is_dir() or (folder / peft.CONFIG).is_file():
            return None
        return [os.fspath(e) for e in sorted(folder.iterdir()) if (e / peft.CONFIG).is_file()]
    except OSError as error:
        raise AdapterFileError(f"The path cannot be read: {error}.", file=path) from error


def _local(url: str) -> str:
    """The path that a URL of this machine's files names."""
    return file_system(url)[1]


def _locate_url(url: str) -> Path:
    named = HF.fullmatch(url)
    if named is not None:
        folder = named["folder"]
        snapshot = _download(named["id"], named["revision"], folder)
        return _locate(url, snapshot / folder if folder else snapshot)
    if url.startswith(("file://", "local://")):
        return locate(_local(url))
    files, root = file_system(url)
    if not _is_file(files, f"{root}/{peft.CONFIG}"):
        below = _below(files, root, url)
        if len(below) != 1:
            raise AdapterFileError(
                "The directory holds several adapters." if below else "There is no such adapter.",
                file=url,
                expected=peft.CONFIG,
                got=", ".join(f.rsplit("/", 1)[-1] for f in below) or None,
                fix=f"choose one, e.g. {files.unstrip_protocol(below[0])!r}"
                if below
                else "check the URL",
            )
        root = below[0]
    return _fetch(files, root, url)


def file_system(url: str) -> tuple[Any, str]:
    """(file system, path in it without a slash at its end) of a URL.

    Raises:
        AdapterFileError: If fsspec does not know it.
        MissingDependencyError: If fsspec, or a package for the protocol, is missing.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {url!r} needs the package fsspec.", fix='pip install "lorasmith[fleet]"'
        ) from error
    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {url!r} needs a package that is not installed: {error}",
            fix='install the package for that protocol (pip install "lorasmith[s3]" for s3://; '
            "gcsfs, adlfs, …)",
        ) from error
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"The URL cannot be read: {error}", file=url) from error
    # What it listed earlier may be others by now.
    files.invalidate_cache()
    return files, str(root).rstrip("/")


def _is_file(files: Any, path: str) -> bool:
    try:
        return bool(files.isfile(path))
    except failures() as error:
        raise AdapterFileError(f"The URL cannot be read: {error}.", file=path) from error


def _below(files: Any, root: str, url: str) -> list[str]:
    """Subdirectories that hold an adapter."""
    try:
        entries = files.ls(root, detail=True)
    except FileNotFoundError:
        return []
    except failures() as error:
        raise AdapterFileError(f"The URL cannot be read: {error}.", file=url) from error
    folders = sorted(str(e["name"]).rstrip("/") for e in entries if e.get("type") == "directory")
    return [f for f in folders if _is_file(files, f"{f}/{peft.CONFIG}")]


def _fetch(files: Any, root: str, url: str, names: Sequence[str] = _FILES) -> Path:
    """A local copy of files of these names, as many as there are, of one generation."""
    try:
        for left in reversed(range(_TRIES)):
            found = _copy(files, root, names, last=left == 0)
            if found is not None:
                return found
            time.sleep(_PAUSE)
    except failures() as error:
        raise AdapterFileError(f"The URL cannot be read: {error}.", file=url) from error
    raise AdapterFileError(
        "Somebody is pushing other files to this place, or began to and was interrupted.",
        file=url,
        expected="files with the SHA-256 that their record names",
        got="others",
        fix="wait until the upload is done, or push it again with overwrite",
    )


def _copy(files: Any, root: str, names: Sequence[str], *, last: bool) -> Path | None:
    """A copy, or ``None`` where the files change or are not of one generation."""
    # What a listing says of a file differs from what the store says when asked for it.
    files.invalidate_cache()
    present = _present(files, root, names)
    identity = repr((files.to_json(), root, sorted(present.items())))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = _Copies.root() / digest / (root.rsplit("/", 1)[-1] or "adapter")
    if _Copies.take(folder):
        return folder
    # Whole or not at all: what was cut off is not taken for a copy the next time.
    partial = Path(tempfile.mkdtemp(dir=_Copies.root()))
    try:
        try:
            # The record first: what is replaced after it is noticed.
            for name in sorted(present, key=lambda name: name not in RECORDS):
                files.get_file(f"{root}/{name}", os.fspath(partial / name))
            wrong = _exchange_others(files, root, partial, names)
        except FileNotFoundError:
            if last:
                raise
            return None
        files.invalidate_cache()
        if _present(files, root, names) != present:
            return None
        # Without files on their way it is for the reader to say what does not fit.
        if wrong and _has_staging(files, root):
            return None
        _Copies.put(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _present(files: Any, root: str, names: Sequence[str]) -> dict[str, str]:
    """Name → all that the store says of a file, of those that are there."""
    return {n: str(files.info(f"{root}/{n}")) for n in names if files.isfile(f"{root}/{n}")}


def _exchange_others(files: Any, root: str, folder: Path, names: Sequence[str]) -> list[str]:
    """Puts what the record names in the place of files of another generation.

    Returns:
        Names of files that are others than the record names, and nowhere else either.
    """
    wrong = []
    for name, sha in _named(folder).items():
        file = folder / name
        if name not in names or (file.is_file() and sha256_of(file) == sha):
            continue
        kept = f"{root}/{STAGING}/{sha}-{name}"
        spare = folder / f"{name}.other"
        if files.isfile(kept):
            files.get_file(kept, os.fspath(spare))
        if spare.is_file() and sha256_of(spare) == sha:
            os.replace(spare, file)
        else:
            spare.unlink(missing_ok=True)
            wrong.append(name)
    return wrong


def _named(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of the files that a record names, as far as it can be understood."""
    found: dict[str, str] = {}
    for record, key in RECORDS.items():
        file = folder / record
        try:
            size = file.stat().st_size
            values = read_object(file, limit=2**30, values=200_000 + size // 4)
        except (OSError, AdapterFileError):
            continue  # the reader says what is wrong with it
        found |= hashes_in(values, key)
    return found


def hashes_in(record: Mapping[str, Any], key: str) -> dict[str, str]:
    """Name → SHA-256 of the files that a record names; what is malformed is left out."""
    entries = record.get(key)
    found = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        sha = entry.get("sha256") if isinstance(entry, dict) else None
        if isinstance(sha, str) and _SHA.fullmatch(sha):
            found[name] = sha
    return found


def _has_staging(files: Any, root: str) -> bool:
    return bool(listed(files, f"{root}/{STAGING}"))


def listed(files: Any, root: str) -> dict[str, dict[str, Any]]:
    """Name → entry, of what is in a directory of a store; empty where there is none."""
    try:
        entries = files.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except NotImplementedError:  # https:// cannot always list
        return {}
    # Some stores list the directory itself, as an empty object of that name.
    return {
        str(e["name"]).rstrip("/").rsplit("/", 1)[-1]: e
        for e in entries
        if str(e["name"]).strip("/") != root.strip("/")
    }


def copied(files: Any, root: str, url: str, names: Sequence[str]) -> Path:
    """A local copy of the files of these names in a store, of one generation; to be read only.

    Raises:
        AdapterFileError: If they cannot be read, or change all the time.
    """
    return _fetch(files, root, url, names)


def failures() -> tuple[type[BaseException], ...]:
    """What a file system raises where it cannot be read or written.

    Of libraries that do not use Python's own classes, as far as they have been imported.
    """
    found: list[type[BaseException]] = [OSError, ValueError, NotImplementedError]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
        ("fsspec.exceptions", "FSTimeoutError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("gcsfs.retry", "HttpError"),
        ("azure.core.exceptions", "AzureError"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            found.append(kind)
    return tuple(found)


def release(folder: Path) -> None:
    """Says that a directory that ``locate`` or ``fetch`` gave is not read any more.

    A copy of what is at a URL is removed as soon as all to whom it was given have said so; of
    any other directory nothing happens. What has been mapped can be read all the same.
    """
    _Copies.release(folder)


class _Copies:
    """The directory of this process for copies of files that cannot be mapped."""

    _root: Path | None = None
    _owner = 0
    _lock = threading.RLock()
    #: Copy → how many have been given it and not released it.
    _readers: ClassVar[Counter[Path]] = Counter()

    @classmethod
    def root(cls) -> Path:
        """The directory; made at the first call, and removed when the process ends."""
        if cls._root is None or cls._owner != os.getpid():
            cls._root, cls._owner = Path(tempfile.mkdtemp(prefix="lorasmith-")), os.getpid()
            atexit.register(cls._remove, cls._root, cls._owner)
        return cls._root

    @classmethod
    def take(cls, folder: Path) -> bool:
        """Whether there is that copy; then it has one reader more."""
        with cls._lock:
            if not folder.is_dir():
                return False
            cls._readers[folder] += 1
            return True

    @classmethod
    def put(cls, made: Path, folder: Path) -> None:
        """Puts a copy into its place, unless another thread was faster, for one reader more."""
        with cls._lock:
            if not folder.is_dir():
                folder.parent.mkdir(exist_ok=True)
                made.rename(folder)
            cls._readers[folder] += 1

    @classmethod
    def release(cls, folder: Path) -> None:
        """One reader less; without any the copy goes. Of its own process only."""
        with cls._lock:
            if cls._owner != os.getpid() or not cls._readers[folder]:
                return
            cls._readers[folder] -= 1
            if not cls._readers[folder]:
                del cls._readers[folder]
                shutil.rmtree(folder.parent, ignore_errors=True)

    @staticmethod
    def _remove(folder: Path, owner: int) -> None:
        if os.getpid() == owner:  # not in a process that was forked
            shutil.rmtree(folder, ignore_errors=True)


def _download(
    repository: str,
    revision: str | None = None,
    folder: str | None = None,
    names: Sequence[str] = _FILES,
) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no directory {repository!r}, and reading it from the hub needs the "
            "package huggingface_hub.",
            fix="pip install huggingface_hub, or correct the path",
        ) from error
    inside = f"{folder}/" if folder else ""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    offline = hub_offline()
    unreachable = not offline and not hub_reachable()
    if unreachable:  # it would be waited for, several times
        options["local_files_only"] = True
    try:
        found = snapshot_download(
            repository,
            **options,
            allow_patterns=[f"{inside}{star}{name}" for star in ("", "*/") for name in names],
        )
    # Not found, no access, no network, offline and not cached, an impossible id.
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        got = reason[0] if reason else type(error).__name__
        if offline or unreachable:
            why = "HF_HUB_OFFLINE is set" if offline else "the hub is not reached"
            got = f"it is not cached in {hub_cache()} and {why}"
        raise AdapterFileError(
            f"{repository!r} is neither a directory nor an adapter that the hub gives: {got}",
            expected="a directory, or the id of an adapter on the hub",
            got=got,
            file=repository,
            fix="check the path; for a hub id check its spelling, access and the network "
            "(HF_HUB_OFFLINE keeps to what is cached)",
        ) from error
    return Path(found)
