"""The unquantised weights of a quantised model, read one tensor at a time.

They come from a safetensors file, from a directory with one or with shards and an index (as
Transformers saves models), from another model, or from a mapping of tensors. Names are those
of the model, with or without the prefix of the base model (``model.``, ``transformer.``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lorasmith.core.layers import LayerInfo, describe, read_weight
from lorasmith.errors import AttachError

__all__ = ["Originals", "Source"]

Source: TypeAlias = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: An original further than this from its quantised weight, relative to it, is another one.
_FAR = 0.5


class Originals:
    """Gives the original weight of each layer.

    Args:
        source: Where they are.

    Raises:
        AttachError: If there is nothing to read at that place.
    """

    def __init__(self, source: Source) -> None:
        self.label = type(source).__name__
        self._read: dict[str, Callable[[], Tensor]] = {}
        if isinstance(source, nn.Module):
            for name, module in source.named_modules():
                info = describe(module, name)
                if info is not None and info.kind != "opaque":
                    self._read[f"{name}.weight"] = _reader(module, info)
        elif isinstance(source, Mapping):
            self._read = {name: _holder(tensor) for name, tensor in source.items()}
        else:
            self.label = os.fspath(source)
            for file in _files(Path(source)):
                self._read.update(_file_readers(file))

    def of(self, info: LayerInfo) -> Callable[[Tensor], Tensor]:
        """A function of the dequantised weight Q [d_out, d_in] that gives W [d_out, d_in].

        Raises:
            AttachError: If there is no weight of that layer. The function raises it where
                the weight is none that Q could be the quantisation of.
        """
        key = self._key(f"{info.name}.weight")
        read = self._read[key]

        def original(quantised: Tensor) -> Tensor:
            found = read().to(quantised.device, torch.float32)
            shape = (info.d_out, info.d_in)
            # Conv1D keeps its weight transposed, which the shape of a square one does not tell.
            forms = [t for t in (found, found.T) if tuple(t.shape) == shape]
            distance = [float(torch.dist(form, quantised)) for form in forms]
            limit = _FAR * float(torch.linalg.vector_norm(quantised))
            if not forms or min(distance) > limit:
                raise AttachError(
                    f"What is given as the original weight of {info.name} is not that.",
                    expected=f"a weight {shape} close to the quantised one",
                    got=f"{tuple(found.shape)}"
                    + (f", {min(distance) / limit * _FAR:.0%} away" if forms and limit else ""),
                    fix="give the model that was quantised",
                    file=self.label,
                    key=key,
                )
            return forms[distance.index(min(distance))]

        return original

    def _key(self, wanted: str) -> str:
        """The name under which the source has it: as it is, or with another prefix."""
        if wanted in self._read:
            return wanted
        found = [k for k in self._read if k.endswith("." + wanted) or wanted.endswith("." + k)]
        if len(found) != 1:
            raise AttachError(
                "The original weights of a layer were not found.",
                expected=wanted,
                got=", ".join(found) or f"{len(self._read)} tensors of other names",
                fix="give the model that was quantised",
                file=self.label,
                key=wanted,
            )
        return found[0]


def _reader(module: nn.Module, info: LayerInfo) -> Callable[[], Tensor]:
    return lambda: read_weight(module, info)


def _holder(tensor: Tensor) -> Callable[[], Tensor]:
    return tensor.detach


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model."""
    if path.is_file():
        return [path]
    if (path / _INDEX).is_file():
        return [path / name for name in _shards(path / _INDEX)]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    raise AttachError(
        "There are no original weights at that place.",
        expected=f"a safetensors file, or a directory with {_SINGLE} or {_INDEX}",
        got="a directory without them" if path.is_dir() else "nothing",
        fix="name the directory that the model was loaded from before it was quantised",
        file=path,
        key="originals",
    )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, all of them beside it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if all(Path(n).name == n and n not in ("", ".", "..") for n in names):
            return names
        got = next(n for n in names if Path(n).name != n)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
    raise AttachError(
        "The index of the original weights is malformed.",
        expected="names of tensors, and of the files beside it that hold them",
        got=str(got)[:200],
        file=index,
        key="weight_map",
    )


def _file_readers(file: Path) -> dict[str, Callable[[], Tensor]]:
    from safetensors import SafetensorError, safe_open

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
            return tensor

        return read

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: reader(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AttachError(
            f"The original weights cannot be read: {error}.",
            expected="a whole safetensors file",
            file=file,
            key="originals",
        ) from error
