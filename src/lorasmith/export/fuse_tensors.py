"""The tensors of a base in the layout in which a fused model stores them, a block at a time.

A tensor of the model to be written is one of the base's, one of an adapter's, or a matrix with
adapters in it (``export.fuse_matrix``). All of them are a :class:`Stored`: shape, dtype and an
iterator over blocks of rows, so that no more than a block of any of them has to be in memory.
Nothing is read before the blocks are asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError, ModelError
from lorasmith.export.shards import KINDS
from lorasmith.io.gguf import GgufTensor
from lorasmith.io.matrices import CheckpointFile, Matrix

__all__ = ["FromCall", "FromFile", "FromGguf", "FromMatrix", "Stored"]

#: Numbers that are read and computed at a time.
_BLOCK = 2**19


class Stored(ABC):
    """One tensor of the base, in the layout in which it will be written.

    Attributes:
        shape: Its shape.
        dtype: Of what is read, or ``None`` where PyTorch has no dtype for it.
        kind: The format's name of the dtype.
        file: The one it is in, if it is in one as it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""
        assert self.dtype is not None
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Consecutive blocks of its rows; each good until the next."""

    @property
    def rows(self) -> int:
        """Rows a block."""
        return max(1, _BLOCK // max(1, math.prod(self.shape[1:])))


class FromFile(Stored):
    """Of a safetensors file."""

    def __init__(self, file: CheckpointFile, key: str) -> None:
        self._file, self._key, self.file = file, key, file.tensors.path
        self._first, self._last, self.kind = file.place(key)
        self.shape = file.tensors.shape(key)
        try:
            self.dtype = file.tensors.dtype(key)
        except AdapterFileError:
            self.dtype = None

    @property
    def nbytes(self) -> int:
        return self._last - self._first

    def blocks(self) -> Iterator[Tensor]:
        if self.dtype is None:
            yield from self._bytes()
            return
        count = self.shape[0] if self.shape else 1
        buffer = torch.empty((min(self.rows, count), *self.shape[1:]), dtype=self.dtype)
        for first in range(0, count, self.rows):
            block = buffer[: min(self.rows, count - first)]
            self._file.read(self._key, first, block)
            yield block

    def _bytes(self) -> Iterator[Tensor]:
        with self._file.path.open("rb") as stream:
            stream.seek(self._first)
            left = self.nbytes
            while left:
                data = stream.read(min(left, 4 * _BLOCK))
                if not data:
                    raise ModelError("The file ends too early.", file=self._file.path)
                left -= len(data)
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8)


class FromMatrix(Stored):
    """Of anything that gives W [d_out, d_in]: a matrix of a GGUF file, a quantised layer."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self.shape = matrix.stored_shape
        self.dtype = matrix.dtype
        self.kind = KINDS[self.dtype]

    def blocks(self) -> Iterator[Tensor]:
        yield from self._matrix.blocks(self.rows)


class FromGguf(Stored):
    """A matrix of a GGUF file that is no layer's, as it is there: an embedding."""

    def __init__(self, tensor: GgufTensor) -> None:
        self._tensor = tensor
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.kind = KINDS[self.dtype]

    def blocks(self) -> Iterator[Tensor]:
        buffer = torch.empty((min(self.rows, self.shape[0]), self.shape[1]), dtype=self.dtype)
        for first in range(0, self.shape[0], self.rows):
            block = buffer[: min(self.rows, self.shape[0] - first)]
            self._tensor.read(first, block)
            yield block


class FromCall(Stored):
    """Made when it is asked for: an adapter's tensor, a vector."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, get: Callable[[], Tensor]
    ) -> None:
        self.shape, self.dtype, self.kind = tuple(shape), dtype, KINDS[dtype]
        self._get = get

    def blocks(self) -> Iterator[Tensor]:
        value = self._get().contiguous()
        if value.dim() == 0:
            yield value.view(1)
        else:
            yield from torch.split(value, self.rows)
