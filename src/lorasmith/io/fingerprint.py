"""Which base model an adapter was made for, in a few kilobytes.

A fingerprint has two parts. The *structure* is a hash over names and shapes of all base
parameters. The *sketch* is 16 evenly spaced values of up to 64 weight matrices spread over
the model, kept as float32 numbers, so that two bases can be compared with a tolerance:
the same weights cast to another floating-point type still agree (bfloat16 rounds by at
most 0.2 %), while further training shows, and the difference can be named.

Neither depends on adapters that are attached (their own tensors are left out, and where
one is fused the original weights are looked at), on ``requires_grad``, on ties between
weights, or on the wrappers of ``torch.compile`` and of parallel training. Weights that
cannot be read (meta device, quantised, sharded) have no part in the sketch.

A quantised layer counts with the shape of the matrix that it stands for, so the structure
is that of the full-precision model. The sketch of a quantised base is made of what is left
unquantised, embeddings and head and the vectors (norms, biases) too, and compared with
those alone: an adapter trained on it loads on the same base in full precision or in
another quantisation, and the other way round. What differs in quantised layers only is
not seen.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.core.adapter import unwrap
from lorasmith.core.layers import describe
from lorasmith.core.state import SAVED, SLOT, slots
from lorasmith.errors import AdapterFileError

__all__ = ["TOLERANCE", "Difference", "Fingerprint", "fingerprint"]

#: Relative difference that casts between floating-point types may cause.
TOLERANCE = 0.005
_MATRICES = 64
_VALUES = 16
#: Absolute difference a value may have besides: float16 has no smaller steps near zero.
_STEP = 1e-7
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Difference:
    """How a base model differs from the one of a fingerprint.

    Attributes:
        structure: What is different in names, shapes or number of parameters, or ``None``.
        values: Relative difference ‖w − w'‖ / ‖w‖ over all compared values.
        worst: The matrix that differs most, and by how much.
    """

    structure: str | None
    values: float
    worst: tuple[str, float] | None

    @property
    def same(self) -> bool:
        """Whether it is the same base, up to a cast."""
        return self.structure is None and (self.worst is None or self.worst[1] <= TOLERANCE)

    def __str__(self) -> str:
        if self.same:
            return "the same base"
        if self.structure is not None:
            return self.structure
        assert self.worst is not None
        name, most = self.worst
        return f"the base's weights differ by {self.values:.1%} (most in {name}, by {most:.1%})"


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a base model.

    Attributes:
        structure: SHA-256 over the sorted names and shapes of all parameters.
        tensors: Number of parameter tensors.
        parameters: Number of values in them.
        sketch: Parameter name → a few of its values, float32 [at most 16].
    """

    structure: str
    tensors: int
    parameters: int
    sketch: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]] = field(compare=False)

    def compare(self, other: Fingerprint) -> Difference:
        """How ``other`` differs; only values that both have are compared."""
        structure = None
        if self.structure != other.structure:
            structure = (
                f"its base has {self.parameters:,} parameters in {self.tensors} tensors, "
                f"this model {other.parameters:,} in {other.tensors}"
            )
            if (self.parameters, self.tensors) == (other.parameters, other.tensors):
                structure = "its base has parameters of other names or shapes"
        worst: tuple[str, float] | None = None
        distance = norm = 0.0
        for name, mine in self.sketch.items():
            theirs = other.sketch.get(name)
            if theirs is None or theirs.shape != mine.shape:
                continue
            wide = mine.astype(np.float64)
            gap = np.abs(wide - theirs.astype(np.float64))
            gap = np.where(np.isfinite(gap), gap, np.inf)
            gap = np.maximum(gap - _STEP, 0.0)
            here = float(np.square(gap).sum())
            size = float(np.square(wide).sum())
            distance, norm = distance + here, norm + size
            share = 0.0 if here == 0 else math.sqrt(here / size) if size else math.inf
            if worst is None or share > worst[1]:
                worst = (name, share)
        total = 0.0 if distance == 0 else math.sqrt(distance / norm) if norm else math.inf
        return Difference(structure, total, worst)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold; values as base64 of little-endian float32."""
        return {
            "structure": self.structure,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "sketch": {
                name: base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
                for name, values in self.sketch.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`.

        Raises:
            AdapterFileError: If ``values`` is not a fingerprint.
        """
        try:
            sketch = {
                str(name): np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
                for name, text in values["sketch"].items()
            }
            return cls(
                str(values["structure"]), int(values["tensors"]), int(values["parameters"]), sketch
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterFileError(
                f"The record of the base model cannot be read: {error!r}.",
                key="fingerprint",
                expected="structure, tensors, parameters and sketch",
                got=repr(values)[:200],
            ) from error


def fingerprint(
    model: nn.Module,
    *,
    without: Collection[str] = (),
    names: Collection[str] | None = None,
) -> Fingerprint:
    """The fingerprint of a base model, whatever adapters it carries.

    Args:
        model: The model.
        without: Names of modules whose values are left out of the sketch: what an
            adapter replaces as a whole says nothing about its base.
        names: Parameters to sketch (those of a fingerprint to compare with); chosen
            evenly over the model by default.
    """
    root = unwrap(model)
    entries: list[tuple[str, tuple[int, ...]]] = []
    values: dict[str, Tensor] = {}
    fused = {name: slot for name, _, slot in slots(root) if slot.fused is not None}
    quantised = False
    for module_name, module in _base_modules(root):
        info = describe(module, module_name)
        plain = _plain(module_name)
        if info is not None and info.kind == "opaque":
            entries.append((_join(plain, "weight"), (info.d_out, info.d_in)))
            if info.has_bias:
                entries.append((_join(plain, "bias"), (info.d_out,)))
            quantised = True
            continue
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = _join(plain, leaf)
            entries.append((name, tuple(parameter.shape)))
            value: Tensor | None = parameter
            if leaf in ("weight", "bias") and module_name in fused:
                value = fused[module_name].originals.get(leaf)
                conv1d = info is not None and info.kind == "conv1d"
                if leaf == "weight" and value is not None and conv1d:
                    value = value.T  # as it is stored
            if value is not None and not _inside(plain, without) and _readable(value):
                values[name] = value.detach()
    entries.sort()
    digest = hashlib.sha256()
    for name, shape in entries:
        digest.update(f"{name}{list(shape)}\n".encode())
    # Few matrices are left of a quantised model: there, vectors must do as well.
    able = sorted(n for n, v in values.items() if quantised or v.dim() == 2)
    chosen = _spread(able) if names is None else [n for n in names if n in values]
    return Fingerprint(
        f"sha256:{digest.hexdigest()}",
        len(entries),
        sum(math.prod(shape) for _, shape in entries),
        {name: _sample(values[name]) for name in chosen},
    )


def _base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Duplicates stay, so that it does not matter whether two modules share their weights.
    for name, module in root.named_modules(remove_duplicate=False):
        parts = name.split(".")
        if SLOT not in parts and SAVED not in parts:
            yield name, module


def _plain(name: str) -> str:
    return ".".join(p for p in name.split(".") if p not in _WRAPPERS)


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def _readable(value: Tensor) -> bool:
    return (
        value.dim() in (1, 2)
        and value.numel() > 0
        and value.is_floating_point()
        and not value.is_meta
        and type(value) in (Tensor, nn.Parameter)
    )


def _spread(names: list[str]) -> list[str]:
    if len(names) <= _MATRICES:
        return names
    return [names[round(i * (len(names) - 1) / (_MATRICES - 1))] for i in range(_MATRICES)]


def _sample(value: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Up to 16 evenly spaced values of a matrix, read row by row, or a vector, as float32."""
    value = value.view(1, -1) if value.dim() == 1 else value
    rows, columns = value.shape
    count = min(_VALUES, rows * columns)
    flat = [round(i * (rows * columns - 1) / max(count - 1, 1)) for i in range(count)]
    where = torch.tensor(flat, device=value.device)
    picked = value[where // columns, where % columns]
    return np.array(picked.to(torch.float32).cpu().numpy(), dtype=np.float32)
