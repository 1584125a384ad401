"""Named tensors that are read only when asked for."""

from __future__ import annotations

import hashlib
import json
import os
import stat
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


#: Bytes of a header, and tensors in it. An adapter on the layers of the largest model has
#: fewer, and each takes a few hundred bytes once it is read.
_HEADER, _TENSORS = 32 * 2**20, 100_000


def _check_header(path: Path, most: int) -> None:
    """Refuses a header that would take more time and memory than the file is worth.

    safetensors checks the rest: lengths, offsets without gaps, sizes and shapes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise _unreadable(path, "it is not a regular file", "not a regular file")
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > found.st_size - 8:
            raise _unreadable(
                path,
                "its header does not fit into it",
                f"a header of {length:,} bytes in a file of {found.st_size:,}",
            )
        if length > _HEADER:
            raise _unreadable(path, "its header is too large", f"{length:,} bytes")
        header = stream.read(length)
    count = header.count(b"{")
    if count > most + 2:  # with that of the whole, and of the metadata
        raise _unreadable(path, f"it holds more than {most:,} tensors", f"about {count:,}")


def _unreadable(path: Path, why: str, got: str) -> AdapterFileError:
    return AdapterFileError(
        f"The weights cannot be read: {why}.",
        file=path,
        expected="a whole safetensors file",
        got=got,
        fix="the file may be cut off; copy or download it again",
    )


class FileTensors(TensorSource):
    """The tensors of a safetensors file; each access reads one of them into memory.

    The file is mapped when the object is made: what is read later is that generation,
    even if the path has been given to another one since. After pickling or in another
    process the path is opened again, and must still hold the same file.

    Args:
        path: The file.
        most: Largest number of tensors in it.

    Raises:
        AdapterFileError: If it is cut off or not a safetensors file.
    """

    def __init__(self, path: Path, *, most: int = _TENSORS) -> None:
        self.path = path
        self._most = most
        self.identity = identity(path)
        self._mapped: dict[str, tuple[Tensor, int]] | None = None
        self._open()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            _check_header(self.path, self._most)
            opened: Any = safe_open(os.fspath(self.path), framework="pt", device="cpu")
            self._file = opened
            self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
            for key in sorted(opened.keys()):
                part = opened.get_slice(key)
                self._headers[key] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError, RuntimeError) as error:
            # safetensors opens the path twice, for the header and for the mapping. Where a smaller
            # file has come under it in between, PyTorch refuses to map it, with a RuntimeError.
            raise _unreadable(self.path, str(error)[:300], type(error).__name__) from error

    @property
    def headers(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Key → (shape, dtype as the file says it), in the order of the keys."""
        return self._headers

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

    def view(self, key: str) -> Tensor:
        """A tensor on the mapped file itself: for what copies or reduces it at once.

        It is not to be written to, and changes if somebody writes into the file. The first call
        maps the file a second time, if it is still the one that was opened.
        """
        if self._mapped is None:
            self._mapped = self._map()
        found = self._mapped.get(key)
        if found is None:
            return self[key]
        values, start = found
        shape = self.shape(key)
        strides = [1] * len(shape)
        for i in range(len(shape) - 1, 0, -1):
            strides[i - 1] = strides[i] * shape[i]
        return values.as_strided(shape, strides, start)

    def _map(self) -> dict[str, tuple[Tensor, int]]:
        """Key → (values of its dtype, where it starts in them); nothing for another file."""
        try:
            whole = torch.from_file(
                os.fspath(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8
            )
        except (OSError, RuntimeError):
            return {}
        if identity(self.path) != self.identity:
            return {}
        begin = 8 + int.from_bytes(bytes(whole[:8].tolist()), "little")
        header = json.loads(bytes(whole[8:begin].numpy()))
        found, typed = {}, {}
        for key in self._headers:
            start, stop = header[key]["data_offsets"]
            dtype = _DTYPES.get(header[key]["dtype"])
            if dtype is None or stop == start or (begin + start) % dtype.itemsize:
                continue
            if dtype not in typed:
                typed[dtype] = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
            found[key] = typed[dtype], (begin + start) // dtype.itemsize
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def changed(self) -> bool:
        """Whether the path holds another file by now."""
        return identity(self.path) != self.identity

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "identity": self.identity, "most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.identity, self._most = state["path"], state["identity"], state["most"]
        self._mapped = None
        if self.changed():
            raise self._replaced()
        self._open()

    def _replaced(self) -> AdapterFileError:
        return AdapterFileError(
            "The weights have been replaced since the adapter was read.",
            file=self.path,
            fix="read the adapter again",
        )
