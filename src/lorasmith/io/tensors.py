"""Named tensors that are read only when asked for."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError

__all__ = ["FileTensors", "MemoryTensors", "TensorSource", "identity", "sha256_of"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSource(Mapping[str, Tensor]):
    """Tensors by name, with shape and dtype known without reading them."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""


class MemoryTensors(TensorSource):
    """Tensors that are in memory already."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._values[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._values[key].dtype

    def __getitem__(self, key: str) -> Tensor:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; ``None`` if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


class FileTensors(TensorSource):
    """The tensors of a safetensors file; each access reads one of them into memory.

    The file is mapped when the object is made: what is read later is that generation,
    even if the path has been given to another one since. After pickling or in another
    process the path is opened again, and must still hold the same file.

    Args:
        path: The file.

    Raises:
        AdapterFileError: If it is cut off or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = identity(path)
        self._open()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            opened: Any = safe_open(os.fspath(self.path), framework="pt", device="cpu")
            self._file = opened
            self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
            for key in sorted(opened.keys()):
                part = opened.get_slice(key)
                self._headers[key] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(
                f"The weights cannot be read: {error}.",
                file=self.path,
                expected="a whole safetensors file",
                fix="the file may be cut off; copy or download it again",
            ) from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._headers[key][0]

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        stored = self._headers[key][1]
        if stored not in _DTYPES:
            raise AdapterFileError(
                "A tensor has a data type that lorasmith does not read.",
                file=self.path,
                key=key,
                expected=", ".join(_DTYPES),
                got=stored,
            )
        return _DTYPES[stored]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._headers:
            raise KeyError(key)
        now = identity(self.path)
        # Another file under the path leaves ours whole; one that was written into does not.
        if now != self.identity and now is not None and now[:2] == (self.identity or ())[:2]:
            raise self._replaced()
        # A copy: the mapped pages would go wrong if somebody wrote into the file later.
        value: Tensor = self._file.get_tensor(key).clone()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def changed(self) -> bool:
        """Whether the path holds another file by now."""
        return identity(self.path) != self.identity

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "identity": self.identity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.identity = state["path"], state["identity"]
        if self.changed():
            raise self._replaced()
        self._open()

    def _replaced(self) -> AdapterFileError:
        return AdapterFileError(
            "The weights have been replaced since the adapter was read.",
            file=self.path,
            fix="read the adapter again",
        )
