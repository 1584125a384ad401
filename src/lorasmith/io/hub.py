"""Where an adapter's files are: a directory, a directory in it, or a repository of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorasmith.errors import AdapterFileError, MissingDependencyError
from lorasmith.io import peft
from lorasmith.io.atomic import interrupted, locked, recover
from lorasmith.io.weights import OWN, OWNED, as_path

__all__ = ["locate"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(path: str | os.PathLike[str]) -> Path:
    """The directory that holds an adapter's files.

    Args:
        path: A directory with ``adapter_config.json``; one with a single subdirectory
            that has it (PEFT keeps adapters not named "default" so); or, if there is
            nothing under that path, the id ``owner/name`` of a repository on the hub. Of
            that only the adapter's files are downloaded; ``HF_HUB_OFFLINE=1`` keeps to
            the local cache.

    Raises:
        AdapterFileError: If there is no adapter, or more than one.
        MissingDependencyError: If the hub is needed and ``huggingface_hub`` is missing.
    """
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
        if isinstance(path, str) and _HUB_ID.fullmatch(text):
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
        fix=f"choose one, e.g. {os.fspath(below[0])!r}" if below else "check the path",
    )


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no directory {repository!r}, and reading it from the hub needs the "
            "package huggingface_hub.",
            fix="pip install huggingface_hub, or correct the path",
        ) from error
    names = (peft.CONFIG, peft.WEIGHTS, OWN)
    try:
        found = snapshot_download(
            repository, allow_patterns=[*names, *(f"*/{name}" for name in names)]
        )
    # Not found, no access, no network, offline and not cached, an impossible id.
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise AdapterFileError(
            f"{repository!r} is neither a directory nor an adapter that the hub gives: "
            f"{reason[0] if reason else type(error).__name__}",
            file=repository,
            fix="check the path; for a hub id check its spelling, access and the network "
            "(HF_HUB_OFFLINE keeps to what is cached)",
        ) from error
    return Path(found)
