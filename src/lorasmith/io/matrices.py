"""One weight of a base model, read when it is asked for: from memory, safetensors, or GGUF.

A :class:`Matrix` is W [d_out, d_in] of a layer, whatever way round it is stored, and gives it
whole or in blocks of rows.

Tensors in files are read with plain reads into one small buffer. They are not mapped: pages of a
mapped file count as memory of the process, and a comparison of two checkpoints would then hold
all of both. The blocks of GGUF files are unpacked a few rows at a time (``io.gguf``).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.core.layers import LayerInfo, read_weight
from lorasmith.errors import AdapterFileError, ModelError
from lorasmith.io.gguf import GgufTensor
from lorasmith.io.tensors import FileTensors

__all__ = [
    "CheckpointFile",
    "FileMatrix",
    "GgufMatrix",
    "LayerMatrix",
    "Matrix",
    "MemoryMatrix",
]


class Matrix(ABC):
    """A weight W [d_out, d_in] that is read when asked for.

    Attributes:
        name: Name of its layer.
        d_out: Rows of W.
        d_in: Columns of W.
        dtype: Of the stored numbers.
        transposed: Whether what is stored is Wᵀ (GPT-2's ``Conv1D``).
    """

    def __init__(
        self, name: str, d_out: int, d_in: int, dtype: torch.dtype, transposed: bool
    ) -> None:
        self.name = name
        self.d_out, self.d_in = d_out, d_in
        self.dtype = dtype
        self.transposed = transposed

    @property
    def info(self) -> LayerInfo:
        """What an adapter must know of the layer."""
        kind = "conv1d" if self.transposed else "linear"
        return LayerInfo(self.name, self.d_in, self.d_out, kind, False, False)  # type: ignore[arg-type]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape as it is stored."""
        return (self.d_in, self.d_out) if self.transposed else (self.d_out, self.d_in)

    @abstractmethod
    def read(self) -> Tensor:
        """W [d_out, d_in] in its stored dtype; a view where it is in memory."""

    @abstractmethod
    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Consecutive blocks of so many rows of what is stored; good until the next one."""


class MemoryMatrix(Matrix):
    """A weight that is in memory, given as W [d_out, d_in]."""

    def __init__(self, name: str, weight: Tensor, transposed: bool = False) -> None:
        super().__init__(name, weight.shape[0], weight.shape[1], weight.dtype, transposed)
        self._weight = weight

    def read(self) -> Tensor:
        return self._weight

    def blocks(self, rows: int) -> Iterator[Tensor]:
        weight = self.read()
        yield from torch.split(weight.T if self.transposed else weight, rows)


class LayerMatrix(Matrix):
    """The weight of a layer of a model; a quantised one is dequantised at each reading."""

    def __init__(self, name: str, layer: nn.Module, info: LayerInfo) -> None:
        weight = getattr(layer, "weight", None)
        plain = info.kind != "opaque" and isinstance(weight, Tensor)
        dtype = weight.dtype if plain and isinstance(weight, Tensor) else _compute_dtype(layer)
        super().__init__(name, info.d_out, info.d_in, dtype, info.kind == "conv1d")
        self._layer, self._info = layer, info

    def read(self) -> Tensor:
        weight = read_weight(self._layer, self._info)
        if weight.is_meta:
            raise ModelError(
                "A weight of the model has no values (it is on the meta device, or offloaded).",
                key=self.name,
                fix="pass the checkpoint's directory instead: it is read tensor by tensor",
            )
        return weight

    def blocks(self, rows: int) -> Iterator[Tensor]:
        weight = self.read()
        yield from torch.split(weight.T if self.transposed else weight, rows)


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """In which a quantised layer gives its values: the dtype of what it computes."""
    for owner in (layer, getattr(layer, "weight", None), getattr(layer, "bias", None)):
        for key in ("compute_dtype", "dtype"):
            found = getattr(owner, key, None)
            if isinstance(found, torch.dtype) and found.is_floating_point:
                return found
    return torch.float32


class CheckpointFile:
    """One safetensors file of a checkpoint, read with plain reads.

    Attributes:
        path: The file.
        tensors: Names, shapes and dtypes.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.tensors = FileTensors(path)  # checks that the file is whole
        except AdapterFileError as error:
            raise ModelError(
                "A file of the checkpoint cannot be read.",
                expected="a whole safetensors file",
                got=error.what,
                fix="download or save it again",
                file=path,
            ) from error
        self.path = path
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self._places = {
            k: (8 + length + v["data_offsets"][0], 8 + length + v["data_offsets"][1], v["dtype"])
            for k, v in header.items()
            if k[:2] != "__"
        }

    def place(self, key: str) -> tuple[int, int, str]:
        """First byte of a tensor in the file, the byte after it, and the format's dtype name."""
        return self._places[key]

    def read(self, key: str, first: int, target: Tensor) -> None:
        """Fills ``target`` with the tensor's values from row ``first`` on."""
        self._check()
        shape = self.tensors.shape(key)
        row = target.element_size() * int(np.prod(shape[1:], dtype=np.int64))
        if not target.numel():
            return
        buffer = memoryview(target.view(-1).view(torch.uint8).numpy().data)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self._places[key][0] + first * row)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise ModelError("The file ends too early.", file=self.path, key=key)
                done += count

    def _check(self) -> None:
        if self.tensors.changed():
            raise ModelError(
                "The checkpoint has been replaced while it was being read.",
                file=self.path,
                fix="run it again",
            )


class FileMatrix(Matrix):
    """A weight in a safetensors file."""

    def __init__(self, name: str, file: CheckpointFile, key: str, transposed: bool) -> None:
        shape = file.tensors.shape(key)
        d_out, d_in = shape[::-1] if transposed else shape
        super().__init__(name, d_out, d_in, file.tensors.dtype(key), transposed)
        self._file, self._key = file, key

    def read(self) -> Tensor:
        value = torch.empty(self.stored_shape, dtype=self.dtype)
        self._file.read(self._key, 0, value)
        return value.T if self.transposed else value

    def blocks(self, rows: int) -> Iterator[Tensor]:
        count, columns = self.stored_shape
        buffer = torch.empty((min(rows, count), columns), dtype=self.dtype)
        for first in range(0, count, rows):
            block = buffer[: min(rows, count - first)]
            self._file.read(self._key, first, block)
            yield block


class GgufMatrix(Matrix):
    """A weight in a GGUF file, unpacked at each reading.

    A ``Conv1D``'s is transposed when it is read, since the file holds W itself.
    """

    def __init__(self, name: str, tensor: GgufTensor, transposed: bool) -> None:
        super().__init__(name, *tensor.shape, tensor.dtype, transposed)
        self._tensor = tensor

    def read(self) -> Tensor:
        value = torch.empty((self.d_out, self.d_in), dtype=self.dtype)
        self._tensor.read(0, value)
        return value

    def blocks(self, rows: int) -> Iterator[Tensor]:
        if self.transposed:
            yield from torch.split(self.read().T, rows)
            return
        buffer = torch.empty((min(rows, self.d_out), self.d_in), dtype=self.dtype)
        for first in range(0, self.d_out, rows):
            block = buffer[: min(rows, self.d_out - first)]
            self._tensor.read(first, block)
            yield block
