"""Where weights come from: a model in memory, a checkpoint on disk, an adapter of either.

A *side* of a comparison is a set of base weights and, perhaps, an adapter on top of it:

    what the user gives                       weights                       adapter
    a model                                   its own, without adapters     the attached one
    a ``PeftModel``                           its own, without adapters     the active one
    a directory with ``config.json``          its safetensors, mapped out   none
    a ``.gguf`` file                          what its blocks stand for     none
    a name (``smollm2``, a hub id)            the checkpoint it stands for  none
    an adapter: directory, hub id,            those of the other side,      that
    ``AdapterWeights``                        else of the base it names
    a handle of an attached adapter           its model's                   that

Nothing is changed, no model is built from a checkpoint, and no code that comes with one
is run. The names and orientations of a checkpoint's layers are those of its class in
Transformers, instantiated without values (meta device); where that class is not known,
the names and shapes in the file must do, and a warning says so.

A checkpoint's tensors are read in blocks of rows with plain reads into one small buffer.
They are not mapped: pages of a mapped file count as memory of the process, and a
comparison of two checkpoints would then hold all of both.

GGUF files are read the same way, and their blocks unpacked a few rows at a time
(``io.gguf``). (``smollm2`` itself is unpacked once into a cache of safetensors, in bfloat16.)
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.core.adapter import Adapter, attached, get_adapter, unwrap
from lorasmith.core.fusing import fused_name
from lorasmith.core.heads import HeadLayout, head_layout, layout_of
from lorasmith.core.layers import LayerInfo, describe, read_weight
from lorasmith.core.state import SAVED, SLOT, slots
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    FuseError,
    LorasmithError,
    ModelError,
)
from lorasmith.io import peft
from lorasmith.io.files import check_base, read_adapter
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.gguf import GgufModel, GgufTensor
from lorasmith.io.hub import locate
from lorasmith.io.models import ResolvedModel, check_sizes, remote_code, resolve_model, snapshot
from lorasmith.io.strict import read_object
from lorasmith.io.tensors import FileTensors, MemoryTensors
from lorasmith.io.weights import AdapterWeights, translate

__all__ = [
    "CheckpointFile",
    "CheckpointWeights",
    "GgufWeights",
    "Given",
    "Matrix",
    "MemoryMatrix",
    "ModelWeights",
    "Side",
    "Unreadable",
    "WeightSource",
    "align",
    "open_sides",
]

#: What a user may pass for either side.
Given: TypeAlias = nn.Module | Adapter | AdapterWeights | str | os.PathLike[str]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: What wrappers, and saving a model without its head, put before or take from names.
_PREFIXES = ("", "base_model.model.", "base_model.", "module.", "_orig_mod.")


# One matrix -------------------------------------------------------------------------------------


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


class _LayerMatrix(Matrix):
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


class _FileMatrix(Matrix):
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


class _GgufMatrix(Matrix):
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


@dataclass(frozen=True)
class Unreadable:
    """A layer of a model whose weight cannot be read.

    Attributes:
        name: Name of the layer.
        reason: ``"missing"``: it is not there; ``"shape"``: its shape is not the class's;
            ``"dtype"``: it is stored in a form that is not read.
        message: The same in words.
    """

    name: str
    reason: Literal["missing", "shape", "dtype"]
    message: str


# A set of weights -------------------------------------------------------------------------------


class WeightSource(ABC):
    """The linear layers of a model, in its order.

    Attributes:
        label: What it is, for people.
        layers: Name of the layer → its weight.
        layouts: Name of the layer → how it is cut into heads, of those that are.
        config: The model's configuration, or ``None``.
        quantised: Types of blocks that a GGUF file holds the layers in; empty elsewhere.
        problems: Layers that cannot be read, by name.
        heads: Names of the layers that are the model's output head.
    """

    label: str
    layers: dict[str, Matrix]
    layouts: Mapping[str, HeadLayout]
    config: object | None
    quantised: tuple[str, ...] = ()
    problems: dict[str, Unreadable]
    heads: frozenset[str]

    @abstractmethod
    def check_adapter(self, adapter: AdapterWeights, allow: bool) -> None:
        """Raises a ``BaseMismatchError`` if the adapter was made for another base."""


def _output_heads(model: nn.Module, names: Mapping[str, nn.Module]) -> frozenset[str]:
    get_head = getattr(model, "get_output_embeddings", None)
    try:
        head = get_head() if callable(get_head) else None
    except (AttributeError, NotImplementedError):  # inherited, and there is none
        head = None
    return frozenset(n for n, m in names.items() if head is not None and m is head)


class ModelWeights(WeightSource):
    """The base weights of a model in memory, whatever adapters it carries."""

    def __init__(self, model: nn.Module) -> None:
        root = unwrap(model)
        get_base = getattr(root, "get_base_model", None)
        if callable(get_base) and hasattr(root, "peft_config"):
            root = get_base()
        self.root = root
        self.label = peft.base_name(root) or type(root).__name__
        self.config = getattr(root, "config", None)
        self.problems = {}
        self.layouts = head_layout(root)
        originals = {n: slot for n, _, slot in slots(root) if slot.fused is not None}
        self.layers = {}
        modules = {}
        for name, module in _own_modules(root):
            info = describe(module, name)
            if info is None:
                continue
            plain = _without_wrappers(name)
            modules[plain] = module
            if name in originals:
                kept = originals[name].originals.get("weight")
                if kept is None or info.kind == "opaque":
                    raise FuseError(
                        f"The adapter {fused_name(root)!r} is fused, so that the base weights "
                        "are not at hand.",
                        fix="unfuse(model) first",
                        key=name,
                    )
                self.layers[plain] = MemoryMatrix(plain, kept, info.kind == "conv1d")
            else:
                self.layers[plain] = _LayerMatrix(plain, module, info)
        self.heads = _output_heads(root, modules)
        if not self.layers:
            raise ModelError(
                "The model has no linear layer to look at.",
                got=type(root).__name__,
                fix="pass the model itself, not its configuration or a layer of it",
            )

    def check_adapter(self, adapter: AdapterWeights, allow: bool) -> None:
        check_base(self.root, adapter, allow)


def _own_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules, without what adapters of ours or of PEFT's have added."""
    tuners: set[str] = set()
    for name, module in root.named_modules():
        parts = name.split(".")
        if SLOT in parts or SAVED in parts or "modules_to_save" in parts:
            continue
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            if getattr(module, "merged", False):
                raise FuseError(
                    "A PEFT adapter is merged into the model, so that the base weights are not "
                    "at hand.",
                    fix="call unmerge_adapter() first, or compare with the original checkpoint",
                    key=name,
                )
            tuners.add(name)
            continue
        inside = next((t for t in tuners if name.startswith(f"{t}.")), None)
        if inside is not None and not f"{name}.".startswith(f"{inside}.base_layer."):
            continue
        yield name, module


def _without_wrappers(name: str) -> str:
    return ".".join(p for p in name.split(".") if p not in ("base_layer", "original_module"))


class StoredWeights(WeightSource):
    """Weights in files: what checkpoints and GGUF files have in common.

    Attributes:
        path: The directory or file.
        base_name: The name under which adapters record it, where that is another one.
        skeleton: The model's class without values; ``None`` where it is not known.
    """

    path: Path
    base_name: str | None
    skeleton: nn.Module | None

    def _problem(
        self, name: str, reason: Literal["missing", "shape", "dtype"], message: str
    ) -> None:
        self.problems[name] = Unreadable(name, reason, message)

    def _by_class(
        self, model: nn.Module, take: Callable[[str, list[str], LayerInfo], None]
    ) -> None:
        """Goes through the layers of the class, and ``take``s each with its weight's names."""
        self.config = getattr(model, "config", None)
        self.layouts = head_layout(model)
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        modules = {}
        for name, module in _own_modules(model):
            info = describe(module, name)
            if info is None:
                continue
            modules[name] = module
            # A head that is tied to the embedding is stored under the embedding's name.
            shared = owners.get(id(getattr(module, "weight", None)), [])
            take(name, [f"{name}.weight", *shared], info)
        self.heads = _output_heads(model, modules)

    def check_adapter(self, adapter: AdapterWeights, allow: bool) -> None:
        stored = adapter.base.fingerprint
        if stored is None or allow:
            self._warn_of_name(adapter, "Whether they are the same was not checked.")
            return
        # Names and shapes from the class, values from the file.
        structure = stored if self.skeleton is None else fingerprint(self.skeleton, names=())
        sketch = {}
        for name, values in stored.sketch.items():
            found = self._sample(name, len(values))
            if found is not None:
                sketch[name] = found
        current = Fingerprint(structure.structure, structure.tensors, structure.parameters, sketch)
        difference = stored.compare(current)
        if not difference.same:
            raise BaseMismatchError(
                f"The adapter was made for another base model: {difference}.",
                file=adapter.path,
                expected=adapter.base.name,
                got=self.label,
                fix="name the right base model, or pass allow_base_mismatch=True",
            )

    @abstractmethod
    def _sample(self, name: str, count: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """``count`` evenly spaced values of a parameter as a fingerprint has them, or ``None``."""

    def _warn_of_name(self, adapter: AdapterWeights, what: str) -> None:
        wanted = adapter.base.name
        names = {self.label, self.base_name, os.fspath(self.path)}
        names.add(getattr(self.config, "_name_or_path", None))
        if wanted is not None and wanted not in names and Path(wanted).name != self.path.name:
            warnings.warn(
                f"The adapter names {wanted!r} as its base model, and this one is "
                f"{self.label!r}. {what}",
                UserWarning,
                stacklevel=4,
            )


def _places(count: int, shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """Row and column of each value of a fingerprint's sketch; ``None`` if it has more or fewer."""
    total = math.prod(shape)
    if count != min(16, total):
        return None
    flat = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    return [divmod(place, shape[-1]) for place in flat]


class GgufWeights(StoredWeights):
    """The weights of a GGUF file.

    Attributes:
        model: Its table of tensors.
    """

    def __init__(self, resolved: ResolvedModel, label: str) -> None:
        self.label, self.base_name = label, resolved.base_name
        self.problems, self.layers = {}, {}
        self.model = GgufModel(resolved)
        self.path = self.model.path
        kinds = {t.kind for t in self.model.tensors.values() if t.quantised}
        self.quantised = tuple(sorted(kinds))
        self.skeleton = self.model.skeleton
        self._by_class(self.model.skeleton, self._take)
        if not self.layers:
            raise ModelError(
                "None of the model's linear layers is in the file.",
                expected=", ".join(s.message for s in [*self.problems.values()][:1]) or None,
                file=self.path,
            )

    def _take(self, name: str, keys: list[str], info: LayerInfo) -> None:
        tensor = next((t for k in keys if (t := self.model.tensors.get(k))), None)
        wanted = (info.d_out, info.d_in)
        if tensor is None:
            self._problem(name, "missing", "the file has no tensor of that layer")
        elif tensor.shape != wanted:
            message = f"stored as {list(tensor.shape)}, where the model has {list(wanted)}"
            self._problem(name, "shape", message)
        else:
            self.layers[name] = _GgufMatrix(name, tensor, info.kind == "conv1d")

    def _sample(self, name: str, count: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        # Vectors are left out: some norms are stored as what they add to one.
        tensor = self.model.tensors.get(name)
        matrix = self.layers.get(name.removesuffix(".weight"))
        if tensor is None:
            return None
        transposed = matrix is not None and matrix.transposed
        places = _places(count, tensor.shape[::-1] if transposed else tensor.shape)
        if places is None:
            return None
        line = torch.empty((1, tensor.shape[1]), dtype=tensor.dtype)
        picked = []
        for row, column in places:
            row, column = (column, row) if transposed else (row, column)
            tensor.read(row, line)
            picked.append(line[0, column].to(torch.float32).item())
        return np.array(picked, dtype=np.float32)


class CheckpointWeights(StoredWeights):
    """The weights of a checkpoint directory (one safetensors file, or shards and an index).

    Attributes:
        places: Name in the files → the file that has it.
    """

    def __init__(self, folder: Path, label: str, base_name: str | None = None) -> None:
        self.path, self.label, self.base_name = folder, label, base_name
        self.problems, self.layers = {}, {}
        fields = read_object(folder / "config.json")
        if fields.get("quantization_config"):
            raise ModelError(
                "The checkpoint is quantised: its tensors are packed and cannot be compared.",
                expected="a checkpoint in floating-point numbers",
                got=str((fields["quantization_config"] or {}).get("quant_method", "quantised")),
                fix="load it with Transformers and pass the model",
                file=folder,
            )
        self._files = [CheckpointFile(path) for path in _files(folder)]
        self.places = {key: file for file in self._files for key in file.tensors}
        self.skeleton = _skeleton(folder, fields)
        if self.skeleton is None:
            self._by_shape(fields)
        else:
            self._by_class(self.skeleton, self._take)
        if not self.layers:
            raise ModelError(
                "None of the model's linear layers is in the checkpoint.",
                got=", ".join(sorted(self.places)[:3]) or "no tensors",
                file=folder,
            )

    def _take(self, name: str, keys: list[str], info: LayerInfo) -> None:
        key = next((k for n in keys if (k := self.key_of(n))), None)
        if key is None:
            self._problem(name, "missing", "the checkpoint has no tensor of that layer")
        else:
            self._add(name, key, info.kind == "conv1d", (info.d_out, info.d_in))

    def key_of(self, wanted: str) -> str | None:
        """The name under which the files have a tensor: with a prefix more or less."""
        own = getattr(self.skeleton, "base_model_prefix", "")
        for prefix in (*_PREFIXES, *((f"{own}.",) if own else ())):
            for candidate in (f"{prefix}{wanted}", wanted.removeprefix(prefix)):
                if candidate in self.places:
                    return candidate
        return None

    def _by_shape(self, fields: Mapping[str, Any]) -> None:
        self.config = config = _namespace(fields)
        self.heads = frozenset()
        layouts = {}
        for key in sorted(self.places, key=_natural):
            shape = self.places[key].tensors.shape(key)
            name = key.removesuffix(".weight")
            if name == key or len(shape) != 2 or re.search(r"embed|wte|wpe|norm", name):
                continue
            self._add(name, key, False, (shape[0], shape[1]))
            layout = layout_of(config, name, shape[0], shape[1])
            if layout is not None:
                layouts[name] = layout
        self.layouts = layouts

    def _add(self, name: str, key: str, transposed: bool, wanted: tuple[int, int]) -> None:
        tensors = self.places[key].tensors
        shape = tensors.shape(key)
        if tuple(shape[::-1] if transposed else shape) != wanted:
            message = f"stored as {list(shape)}, where the model has {list(wanted)}"
            self._problem(name, "shape", message)
            return
        try:
            dtype = tensors.dtype(key)
        except AdapterFileError as error:
            self._problem(name, "dtype", f"stored as {error.got}, which is not read")
            return
        if not dtype.is_floating_point:
            what = str(dtype).removeprefix("torch.")
            self._problem(name, "dtype", f"stored as {what}: quantised")
            return
        self.layers[name] = _FileMatrix(name, self.places[key], key, transposed)

    def _sample(self, name: str, count: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        key = self.key_of(name)
        if key is None:
            return None
        file = self.places[key]
        shape = file.tensors.shape(key)
        places = _places(count, shape)
        if places is None:
            return None
        picked = []
        line = torch.empty((1, shape[-1]), dtype=file.tensors.dtype(key))
        for row, column in places:
            # A vector is one row to the sketch, and many to the file.
            file.read(key, row if len(shape) > 1 else 0, line)
            picked.append(line[0, column].to(torch.float32).item())
        return np.array(picked, dtype=np.float32)


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    index = folder / _INDEX
    if index.is_file():
        mapped = read_object(index).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(v, str) for v in mapped.values()):
            raise ModelError("The index of the checkpoint is malformed.", file=index)
        names = sorted(set(mapped.values()))
        if any(Path(n).name != n for n in names):
            raise ModelError("The index names files outside its directory.", file=index)
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ModelError(
                "A shard of the checkpoint is missing.",
                expected=missing[0],
                file=folder,
                fix="download or save it again",
            )
        return [folder / n for n in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(others) == 1:
        return [folder / others[0]]
    pickled = any(folder.glob("pytorch_model*.bin"))
    raise ModelError(
        "The checkpoint's weights are pickle files, which can run any code when they are read."
        if pickled
        else "The checkpoint has no weights.",
        expected=f"{_SINGLE}, or shards with {_INDEX}",
        got=", ".join(others) or None,
        fix="load it where you trust it, and save_pretrained it again" if pickled else None,
        file=folder,
    )


def _skeleton(folder: Path, fields: Mapping[str, Any]) -> nn.Module | None:
    """The checkpoint's class without values, or ``None`` (with a warning) if it has none here."""
    why: str
    try:
        import transformers
    except ImportError:
        why = "Transformers is not installed"
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(
                os.fspath(folder), local_files_only=True, **remote_code(False)
            )
            check_sizes(config, os.fspath(folder))
            with torch.device("meta"):
                return _instance(transformers, config)
        except LorasmithError:
            raise
        except Exception as error:  # noqa: BLE001 - any, as the fields are a stranger's
            lines = str(error).strip().splitlines()
            why = lines[0] if lines else type(error).__name__
    warnings.warn(
        f"The architecture {fields.get('model_type')!r} is not known here ({why}): layers are "
        "told by their names and shapes, and heads by the configuration alone.",
        UserWarning,
        stacklevel=4,
    )
    return None


def _instance(transformers: Any, config: Any) -> nn.Module:
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            model: nn.Module = kind(config)
            return model
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, **remote_code(False))
    except ValueError:
        model = transformers.AutoModel.from_config(config, **remote_code(False))
    return model


def _namespace(fields: Mapping[str, Any]) -> SimpleNamespace:
    """``config.json`` as attributes; of a model of several parts, the text part's."""
    inner = fields.get("text_config")
    values = {**fields, **inner} if isinstance(inner, dict) else fields
    return SimpleNamespace(**values)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = name.split(".")
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


# Sides ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        label: What it is, for people.
        weights: Its base weights.
        adapter: What acts on them, or ``None``.
    """

    label: str
    weights: WeightSource
    adapter: AdapterWeights | None = None


def open_sides(
    base: Given, tuned: Given | None, *, adapter: str | None = None, allow_base_mismatch: bool
) -> tuple[Side, Side]:
    """Both sides of a comparison; nothing of the weights is read yet.

    Args:
        base: What was before.
        tuned: What came of it; ``None``: ``base`` with the adapter that it carries or is.
        adapter: Which adapter of a model that carries several.
        allow_base_mismatch: Whether an adapter may have been made for another base.

    Raises:
        ModelError: There is no such model, or it cannot be read.
        AdapterFileError: There is no such adapter, or it cannot be used.
        BaseMismatchError: An adapter was made for another base.
        ConfigError: ``base`` has no adapter, and there is no ``tuned``.
    """
    first = _open(base, adapter if tuned is None else None)
    if tuned is None:
        if first.adapter is None:
            raise ConfigError(
                "There is nothing to compare: no tuned side, and the base carries no adapter.",
                expected="a second model, checkpoint or adapter",
                got=first.label,
                key="tuned",
            )
        weights = _placed(first, None, allow_base_mismatch)
        return Side(weights.label, weights), Side(first.label, weights, first.adapter)
    second = _open(tuned, adapter)
    if first.weights is None:
        # What an adapter is the base of may carry one itself; a merged model is no base.
        near = second.weights if second.adapter is not None else None
        weights = _placed(first, near, allow_base_mismatch)
        before = Side(first.label, weights, first.adapter)
    else:
        # A model that carries an adapter is, as a base, the model without it.
        weights = first.weights
        before = Side(weights.label, weights)
    if second.weights is not None and _same(weights, second.weights):
        if second.adapter is None:
            raise ConfigError(
                "Both sides are the same model, and it carries no adapter.",
                got=second.label,
                key="tuned",
            )
        second = _Open(second.label, weights, second.adapter)
    return before, Side(second.label, _placed(second, weights, allow_base_mismatch), second.adapter)


def _placed(opened: _Open, near: WeightSource | None, allow: bool) -> WeightSource:
    """The weights that something acts on: its own, those at hand, or those that it names."""
    if opened.adapter is not None:
        _usable(opened.adapter)
    if opened.weights is not None:
        return opened.weights
    assert opened.adapter is not None
    weights = near if near is not None else _named_base(opened.adapter)
    weights.check_adapter(opened.adapter, allow)
    return weights


def _same(one: WeightSource, other: WeightSource) -> bool:
    """Whether two sources are the same model in memory."""
    return (
        isinstance(one, ModelWeights) and isinstance(other, ModelWeights) and one.root is other.root
    )


@dataclass(frozen=True)
class _Open:
    """What one argument stands for: weights, an adapter, or both."""

    label: str
    weights: WeightSource | None
    adapter: AdapterWeights | None


def _open(given: Given, adapter: str | None) -> _Open:
    if isinstance(given, Adapter):
        weights = ModelWeights(given.model)
        return _Open(given.name, weights, AdapterWeights.from_model(given.model, given.name))
    if isinstance(given, AdapterWeights):
        label = given.variant.name if given.path is None else os.fspath(given.path)
        return _Open(label, None, given)
    if isinstance(given, nn.Module):
        return _open_model(given, adapter)
    return _open_path(os.fspath(given))


def _open_model(model: nn.Module, name: str | None) -> _Open:
    weights = ModelWeights(model)
    root = unwrap(model)
    if hasattr(root, "peft_config"):
        found, chosen = _peft_weights(root, name)
        return _Open(f"{weights.label} + {chosen}", weights, found)
    if not attached(root):
        if name is not None:
            get_adapter(root, name)  # says that there is none
        return _Open(weights.label, weights, None)
    handle = get_adapter(root, name)
    found = AdapterWeights.from_model(root, handle.name)
    return _Open(f"{weights.label} + {handle.name}", weights, found)


def _peft_weights(model: nn.Module, name: str | None) -> tuple[AdapterWeights, str]:
    """The active adapter of a model that PEFT has put one on, as its files would hold it."""
    from peft.utils import get_peft_model_state_dict

    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if name is None:
        active = getattr(model, "active_adapters", None)
        active = active() if callable(active) else active
        chosen = (
            list(configs)
            if active is None
            else [active]
            if isinstance(active, str)
            else list(active)
        )
        if len(chosen) != 1:
            raise ConfigError(
                "Which of the model's adapters is meant is not clear.",
                expected=f"adapter=, one of {', '.join(configs)}",
                got=", ".join(chosen) or "none is active",
                key="adapter",
            )
        name = chosen[0]
    if name not in configs:
        raise ConfigError(
            f"The model has no adapter named {name!r}.",
            expected=", ".join(configs),
            key="adapter",
        )
    fields = {k: _plain_value(v) for k, v in configs[name].to_dict().items()}
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    values = {
        key if key.startswith(peft.PREFIX) else f"{peft.PREFIX}{key}": value.detach()
        for key, value in state.items()
    }
    tensors = MemoryTensors(values)
    config, unsupported = translate(fields, tensors, Path(peft.CONFIG))
    return AdapterWeights(config, fields, tensors, unsupported=unsupported), name


def _plain_value(value: Any) -> Any:
    """As JSON would hold it: PEFT's configurations have sets and enumerations."""
    if isinstance(value, dict):
        return {str(getattr(k, "value", k)): _plain_value(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain_value(v) for v in value]
    return getattr(value, "value", value)


def _open_path(text: str) -> _Open:
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / peft.CONFIG).is_file():
            return _Open(text, None, read_adapter(path))
        if (path / "config.json").is_file():
            return _Open(text, CheckpointWeights(path, text), None)
        if any((entry / peft.CONFIG).is_file() for entry in path.iterdir()):
            return _Open(text, None, read_adapter(path))
    return _open_name(text)


def _open_name(text: str) -> _Open:
    """An alias, a hub id or a GGUF file; an adapter on the hub too."""
    try:
        resolved = resolve_model(text)
    except ModelError as error:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text) is None:
            raise
        try:
            return _Open(text, None, read_adapter(locate(text)))
        except LorasmithError:
            raise error from None
    if resolved.gguf_file is not None:
        return _Open(text, GgufWeights(resolved, text), None)
    folder = snapshot(resolved)
    if (folder / peft.CONFIG).is_file():
        return _Open(text, None, read_adapter(folder))
    return _Open(text, CheckpointWeights(folder, text, resolved.base_name), None)


def _named_base(adapter: AdapterWeights) -> WeightSource:
    name = adapter.base.name
    if name is None:
        raise ConfigError(
            "The adapter does not say which base model it was made for.",
            expected="base=, the model or its checkpoint",
            key="base",
        )
    opened = _open_path(name)
    if opened.weights is None:
        raise ConfigError("The adapter names another adapter as its base.", got=name, key="base")
    return opened.weights


def _usable(adapter: AdapterWeights) -> None:
    if adapter.unsupported is not None:
        raise AdapterFileError(
            adapter.unsupported,
            file=adapter.path and adapter.path / peft.CONFIG,
            fix="merge it with PEFT, save the merged model, and compare the two checkpoints",
        )
    if not adapter.variant.fusable:
        raise FuseError(
            f"What {adapter.variant.name} does depends on the input: there is no weight that "
            "acts like the adapted layer, so that no angle can be given.",
            fix="measure what it does instead (retention on held-out text)",
        )


def align(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Our name → their name of the same layer, where the two may differ by a prefix.

    Models saved with and without their head differ so (``model.layers.0…``, ``layers.0…``),
    and models under a wrapper (``base_model.model.…``, ``language_model.…``). One prefix is
    taken off one side, the one that makes most names meet.
    """
    here = set(theirs)
    best = {n: n for n in ours if n in here}
    if len(best) == min(len(set(ours)), len(here)):
        return best
    for names, flip in ((ours, False), (theirs, True)):
        other = here if not flip else set(ours)
        for prefix in _openings(names):
            found = {n: n[len(prefix) :] for n in names if n.startswith(prefix)}
            met = {a: b for a, b in found.items() if b in other}
            if len(met) > len(best):
                best = {b: a for a, b in met.items()} if flip else met
    return best


def _openings(names: Sequence[str]) -> list[str]:
    """First one, two and three parts of the names, most frequent first."""
    seen: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for count in range(1, min(4, len(parts))):
            seen[".".join(parts[:count]) + "."] += 1
    return [p for p, _ in seen.most_common(32)]
