"""Paths and values that an adapter cannot have, and the words for them.

What reading, writing, exporting and sending adapters all refuse: values that are not finite,
paths that no file can have, directories that hold something else, tensors that no configuration
explains. Each raises an ``AdapterFileError``; none changes anything.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError
from lorasmith.io import peft

__all__ = ["as_path", "check_finite", "check_target", "reason_for", "some"]

#: What a URL, or the Path that was made of one, begins with.
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
#: Reasons for tensors that lorasmith does not load, by the end of their names.
_REASONS = (
    (
        re.compile(r"\.lora_[AB]\.(?!weight$|bias$).+\.weight$"),
        "its name still holds an adapter's name, as in a raw state dict of PEFT",
    ),
    (re.compile(r"\.lora_embedding_[AB]$"), "it belongs to a LoRA on an embedding"),
    (re.compile(r"\.trainable_tokens_delta$"), "it belongs to PEFT's trainable tokens"),
    (re.compile(r"\.lora_B\.bias$"), "it is the bias of a LoRA layer (lora_bias)"),
    (re.compile(r"\.lora_magnitude_vector$"), "it belongs to DoRA, which use_dora denies"),
)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path that the system can have, or an ``AdapterFileError``."""
    try:
        encoded = os.fsencode(path)
    except (TypeError, ValueError):
        encoded = b"\0"
    if b"\0" in encoded or not isinstance(path, str | os.PathLike):
        raise AdapterFileError(
            "That cannot be a path.",
            expected="a string or path that the file system can have, without null characters",
            got=repr(path),
        )
    found = Path(path)
    # A Path of a URL has one slash: s3:/bucket. A drive of Windows is one letter.
    if _REMOTE.match(os.fspath(path)) and not (found.parts and Path(found.parts[0]).exists()):
        raise AdapterFileError(
            "That is a URL, and a path of this machine is needed here.",
            file=os.fspath(path),
            expected="a directory",
            fix="save to a directory and copy it there: lorasmith push DIRECTORY URL, or ls.push",
        )
    return found


def check_target(path: str | os.PathLike[str], beside: bool = False) -> None:
    """Raises an ``AdapterFileError`` if no adapter can be written there."""
    target = as_path(path)
    if target.is_file() or (target.is_symlink() and not target.exists()):
        raise AdapterFileError(
            "An adapter is a directory, and there is a file under that path.",
            file=target,
            fix="choose another path",
        )
    if beside or not target.is_dir() or not any(target.iterdir()):
        return
    if not any((target / name).is_file() for name in (peft.CONFIG, peft.WEIGHTS)):
        raise AdapterFileError(
            "The directory holds something, but no adapter; it is not touched.",
            file=target,
            got=some(sorted(e.name for e in target.iterdir())),
            fix="choose a new or empty directory, e.g. a subdirectory of this one; with "
            "beside=True the adapter is put next to these files",
        )


def check_finite(value: Tensor, key: str, file: str | os.PathLike[str] | None) -> None:
    """Raises an ``AdapterFileError`` that names the tensor if a value is NaN or infinite."""
    if value.is_meta:
        raise AdapterFileError(
            "A tensor has no values (it is on the meta device).", key=key, file=file
        )
    if not value.is_floating_point():
        return
    # A finite sum has finite terms, and costs a tenth of looking at each (float8 has no sums).
    if value.dtype.itemsize > 1 and math.isfinite(value.sum()):
        return
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise AdapterFileError(
            "A tensor holds values that are not finite.",
            file=file,
            key=key,
            expected="finite numbers",
            got=f"{bad} of {value.numel()} are NaN or infinite",
            fix="training has diverged; go back to an earlier checkpoint",
        )


def reason_for(key: str) -> str:
    """Why a tensor is unexpected, as far as its name tells."""
    for pattern, reason in _REASONS:
        if pattern.search(key):
            return reason
    return "nothing in the configuration asks for it"


def some(names: Collection[str], count: int = 4) -> str:
    """The first names, and how many more there are."""
    shown = list(names)[:count]
    return ", ".join(shown) + (f" and {len(names) - count} more" if len(names) > count else "")
