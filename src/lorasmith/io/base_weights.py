"""The linear layers of a base model: one in memory, a checkpoint on disk, a GGUF file.

Nothing is changed, no model is built from a checkpoint, and no code that comes with one
is run. The names and orientations of a checkpoint's layers are those of its class in
Transformers, instantiated without values (meta device); where that class is not known,
the names and shapes in the file must do, and a warning says so.

Whether an adapter was made for these weights is told by a few values of them, those of the
fingerprint that it has stored (``io.fingerprint``).
"""

from __future__ import annotations

import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lorasmith.core.adapter import unwrap
from lorasmith.core.fusing import fused_name
from lorasmith.core.heads import HeadLayout, head_layout, layout_of
from lorasmith.core.layers import LayerInfo, describe
from lorasmith.core.state import SAVED, SLOT, slots
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    FuseError,
    LorasmithError,
    ModelError,
)
from lorasmith.io import peft
from lorasmith.io.files import check_base
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.gguf import GgufModel
from lorasmith.io.matrices import (
    CheckpointFile,
    FileMatrix,
    GgufMatrix,
    LayerMatrix,
    Matrix,
    MemoryMatrix,
)
from lorasmith.io.models import ResolvedModel, check_counts, check_sizes, remote_code
from lorasmith.io.strict import check_inside, read_object
from lorasmith.io.weights import AdapterWeights

__all__ = [
    "CheckpointWeights",
    "GgufWeights",
    "ModelWeights",
    "StoredWeights",
    "Unreadable",
    "WeightSource",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: What wrappers, and saving a model without its head, put before or take from names.
_PREFIXES = ("", "base_model.model.", "base_model.", "module.", "_orig_mod.")


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
                self.layers[plain] = LayerMatrix(plain, module, info)
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
            self.layers[name] = GgufMatrix(name, tensor, info.kind == "conv1d")

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
        fields = read_object(folder / "config.json", root=folder)
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
                expected="the layers of a model",
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
        self.layers[name] = FileMatrix(name, self.places[key], key, transposed)

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
        mapped = read_object(index, root=folder).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(v, str) for v in mapped.values()):
            raise ModelError(
                "The index of the checkpoint is malformed.",
                file=index,
                key="weight_map",
                expected="{tensor: file}",
                got=repr(mapped)[:200],
            )
        names = sorted(set(mapped.values()))
        # A file's name has 255 bytes at most; to look for a longer one fails.
        outside = [n for n in names if Path(n).name != n or len(os.fsencode(n)) > 255]
        if outside:
            raise ModelError(
                "The index names files that cannot be in its directory.",
                file=index,
                key="weight_map",
                expected="names of files beside it",
                got=outside[0][:200],
            )
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ModelError(
                "A shard of the checkpoint is missing.",
                expected=missing[0],
                file=folder,
                fix="download or save it again",
            )
        return [_inside(folder, n) for n in names]
    if (folder / _SINGLE).is_file():
        return [_inside(folder, _SINGLE)]
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(others) == 1:
        return [_inside(folder, others[0])]
    pickled = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    raise ModelError(
        "The checkpoint's weights are pickle files, which can run any code when they are read."
        if pickled
        else "The checkpoint has no weights.",
        expected=f"{_SINGLE}, or shards with {_INDEX}",
        got=", ".join(others or pickled) or None,
        fix="load it where you trust it, and save_pretrained it again" if pickled else None,
        file=folder,
    )


def _inside(folder: Path, name: str) -> Path:
    check_inside(folder / name, folder)
    return folder / name


def _skeleton(folder: Path, fields: Mapping[str, Any]) -> nn.Module | None:
    """The checkpoint's class without values, or ``None`` (with a warning) if it has none here."""
    # Before Transformers sees them: it makes lists and mappings of as many entries.
    check_counts(fields, folder / "config.json")
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
    # Where Transformers has it from: a name of anything else would be imported all the same.
    homes = getattr(transformers, "_class_to_module", {})
    for name in getattr(config, "architectures", None) or ():
        if not str(homes.get(name, "models.")).startswith("models."):
            continue
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
