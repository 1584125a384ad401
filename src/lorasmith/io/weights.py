"""An adapter without a model: configuration, tensors, and where it comes from.

All other tools (diagnostics, fleets, merging) take an adapter in this form, and there is
one writer: ``save(model, path)`` is ``AdapterWeights.from_model(model).save(path)``.

The class is the table of contents. What it is made of stands beside it: which tensors are whose
(:mod:`lorasmith.io.layout`), what the configuration's fields mean and how they are written
(:mod:`lorasmith.io.configuration`), tensors and fields for the files of a new adapter
(:mod:`lorasmith.io.assembly`), the files (:mod:`lorasmith.io.writing`), and what every part
refuses (:mod:`lorasmith.io.checks`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import get_adapter
from lorasmith.core.config import AdapterConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.registry import variant_of
from lorasmith.core.variant import Factors, NewTensors, TensorSpec, Variant
from lorasmith.errors import AdapterFileError, UnknownNameError
from lorasmith.io import assembly, layout, peft
from lorasmith.io.atomic import explained_failure, replace_files
from lorasmith.io.checks import as_path, check_finite, check_target, reason_for, some
from lorasmith.io.configuration import (
    MAX_SCALING,
    check_scaling,
    record_config,
    saved_tensors,
    translate,
)
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.layout import FileState
from lorasmith.io.tensors import MemoryTensors, TensorSource
from lorasmith.io.tokenizers import TokenizerRecord
from lorasmith.io.writing import FORMAT, OWN, OWNED, write

__all__ = [
    "FORMAT",
    "MAX_SCALING",
    "OWN",
    "OWNED",
    "AdapterWeights",
    "BaseModel",
    "FileState",
    "as_path",
    "check_finite",
    "check_target",
    "reason_for",
    "record_config",
    "translate",
]

_V = TypeVar("_V")


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was made for, as far as its files tell.

    Attributes:
        name: Hub id or path that it was loaded from.
        fingerprint: Its identity; adapters written by PEFT have none.
        tokenizer: Identity of the tokenizer that it was trained with, where training wrote it.
    """

    name: str | None = None
    fingerprint: Fingerprint | None = None
    tokenizer: TokenizerRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """What ``lorasmith.json`` says of it."""
        found = {
            "name": self.name,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
        }
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer.to_dict()
        return found


class _Lazy(Mapping[str, _V]):
    """Values that are computed at each access."""

    def __init__(self, keys: Collection[str], get: Callable[[str], _V]) -> None:
        self._keys = dict.fromkeys(keys)
        self._get = get

    def __getitem__(self, key: str) -> _V:
        if key not in self._keys:
            raise KeyError(key)
        return self._get(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # without computing the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<{len(self._keys)} entries, read on access>"


class AdapterWeights:
    """An adapter as a value, read lazily if it comes from a file.

    Made by :func:`lorasmith.read_adapter`, :meth:`from_model` or :meth:`from_tensors`.
    What is wrong with names, shapes and dtypes is found when it is made; whether values
    are finite when they are read.

    Attributes:
        config: The configuration.
        peft: The fields of PEFT's ``adapter_config.json``.
        tensors: Name in the file → tensor in its stored dtype, read at each access.
        base: The model it was made for.
        frozen: Names of the frozen tensors that each layer has of its own, e.g. a part of W
            that an initialisation took over, folded into PEFT's tensors in the file.
        padding: Tensors of ``extras`` that are plain copies of base weights, written
            because PEFT would ask for them.
        unsupported: Why :func:`lorasmith.load` refuses it, or ``None``.
        path: The directory it was read from, or ``None``.
    """

    def __init__(
        self,
        config: AdapterConfig,
        peft_fields: Mapping[str, Any],
        tensors: TensorSource,
        *,
        base: BaseModel | None = None,
        frozen: Collection[str] = (),
        padding: Collection[str] = (),
        unsupported: str | None = None,
        conv1d: Collection[str] | None = None,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        path: Path | None = None,
    ) -> None:
        self.config = config
        self.peft = dict(peft_fields)
        self.tensors = tensors
        self.base = base or BaseModel()
        self.frozen = tuple(sorted(frozen))
        self.padding = tuple(sorted(padding))
        self.unsupported = unsupported
        self.path = path
        self._variant = variant_of(config)
        self._file_config = self._variant.file_config(config, self.frozen)
        found = layout.layout_of(
            config,
            self._file_config,
            tensors,
            # No model at hand: PEFT has one flag for all layers.
            transposed=bool(peft_fields.get("fan_in_fan_out")),
            conv1d=conv1d,
            sizes=sizes,
            folder=path,
        )
        self._keys, self._infos = found.keys, found.infos
        self._sizes, self._factor_names = found.sizes, found.factor_names
        self._saved = saved_tensors(found.rest, self.peft)
        missing = [p for p in self.padding if p not in self._saved]
        if missing:
            raise self._error("A tensor is missing.", key=missing[0])
        others = (k.removeprefix(peft.PREFIX) for k in found.rest)
        self._unexpected = tuple(k for k in others if k not in self._saved)
        self._shared_values: dict[str, Tensor] | None = None
        check_scaling(config, self._infos, self._file(peft.CONFIG), negative=path is None)

    # -- making ----------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: nn.Module, name: str | None = None) -> AdapterWeights:
        """A snapshot of an adapter on a model; later training does not change it.

        With sharded tensors (DTensor) every rank must call this, since they are gathered.

        Args:
            model: The model.
            name: Which adapter; the active or only one by default.

        Raises:
            UnknownNameError: If there is no such adapter.
            AdapterFileError: If a tensor cannot be saved (partitioned, meta device).
        """
        adapter = get_adapter(model, name)
        copies = adapter.saved_modules()
        made = assembly.of_model(adapter, copies)
        root = adapter.model
        return cls(
            adapter.config,
            made.fields,
            MemoryTensors(made.tensors),
            base=BaseModel(peft.base_name(root), fingerprint(root, without=list(copies))),
            frozen=made.frozen,
            padding=made.padding,
            conv1d=made.conv1d,
            sizes=made.sizes,
        )

    @classmethod
    def from_tensors(
        cls,
        config: AdapterConfig,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        shared: Mapping[str, Tensor] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        like: AdapterWeights | None = None,
        layouts: Mapping[str, LayerInfo] | None = None,
        base: BaseModel | None = None,
    ) -> AdapterWeights:
        """An adapter made of tensors, e.g. by merging others.

        Args:
            config: Its configuration; ranks must be those of the tensors.
            tensors: Module name → tensor name of the variant (``"A"``, ``"B"``,
                ``"magnitude"``, ``"gain"``, …; frozen ones too) → value. Kept in the dtype
                given, and not copied.
            shared: Tensor name → value of what all layers share, if the variant's files hold
                such tensors; by default that of the first layer in ``tensors``.
            extras: ``"<module>.<tensor>"`` → value of ``modules_to_save``.
            like: An adapter of the same base: base, task type and layout are taken over.
            layouts: Module name → what is known of the layer, if ``like`` does not say it.
            base: The base model, if ``like`` does not say it.

        Raises:
            AdapterFileError: If tensors are missing, unexpected or of a wrong shape.
        """
        if not tensors:
            raise AdapterFileError("An adapter needs at least one layer.", key="tensors")
        known = {} if like is None else like.peft
        made = assembly.of_tensors(
            config,
            tensors,
            shared=shared or {},
            extras=extras or {},
            layouts={**(layouts or {}), **(like.layers if like is not None else {})},
            task=known.get("task_type"),
            base=known.get("base_model_name_or_path", base.name if base else None),
        )
        if like is not None:
            same = set(like.modules) == set(made.infos) and type(config) is type(like.config)
            assembly.adopt(made.fields, known, targets=same)
        return cls(
            config,
            made.fields,
            MemoryTensors(made.tensors),
            base=base or (None if like is None else like.base),
            frozen=made.frozen,
            conv1d=made.conv1d,
            sizes=made.sizes,
        )

    # -- reading ---------------------------------------------------------------------

    @property
    def variant(self) -> Variant:
        """The variant it is of."""
        return self._variant

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers, sorted (by number where they have one)."""
        return tuple(self._infos)

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """Module name → what the files tell of the layer (sizes they do not tell are 0)."""
        return dict(self._infos)

    @property
    def saved_modules(self) -> Mapping[str, tuple[str, ...]]:
        """``modules_to_save``: module name → names of its tensors, without padding."""
        found: dict[str, list[str]] = {}
        for key, module in self._saved.items():
            if key not in self.padding:
                found.setdefault(module, []).append(key[len(module) + 1 :])
        return {module: tuple(leaves) for module, leaves in found.items()}

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Names of tensors that nothing in the configuration explains."""
        return self._unexpected

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Module name → low-rank factors, float32; read at each access.

        Empty for variants that have none.
        """
        having = [m for m in self._infos if self._variant.factors(self._outline(m)) is not None]
        return _Lazy(having, self._factors_of)

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Everything beside the factors, ``"<module>.<tensor>"`` → value as it is stored.

        What the layers share stands under its name in the file. Gains, magnitudes,
        ``modules_to_save``, and what lorasmith does not know; read at each access.
        """
        keys = {k.removeprefix(peft.PREFIX): k for k in self.tensors if k not in self._factor_names}
        return _Lazy(keys, lambda key: self.tensors[keys[key]])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the variant's tensors are stored; the widest if they differ."""
        kinds = {self.tensors.dtype(k) for keys in self._keys.values() for k in keys.values()}
        kinds |= {self.tensors.dtype(spec.key) for spec in self._shared_specs().values()}
        found = kinds.pop()
        for kind in kinds:
            found = torch.promote_types(found, kind)
        return found

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, those of ``modules_to_save`` included."""
        total = 0
        for module in self._infos:
            new = layout.blank_tensors(
                self.config, self._infos[module], self._keys[module], self.tensors
            )
            total += sum(t.numel() for t in new.trainable.values())
        for key in self._saved:
            if key not in self.padding:
                total += math.prod(self.tensors.shape(f"{peft.PREFIX}{key}"))
        return total

    def state(self, module: str) -> FileState:
        """The variant's tensors on one layer, under the variant's own names, float32.

        Raises:
            UnknownNameError: If the adapter does not adapt that layer.
            AdapterFileError: If a value is not finite, or what the layers share is not in the
                file and cannot be made without the model.
        """
        new = self.new_tensors(module)
        values = {**self.shared_tensors(), **dict(new.trainable), **dict(new.frozen)}
        return FileState(self.config, self._infos[module], values)

    def new_tensors(self, module: str, info: LayerInfo | None = None) -> NewTensors:
        """What :meth:`state` gives, told apart into trainable and frozen tensors.

        Args:
            module: The layer.
            info: The layer as a model has it; what the files tell by default.
        """
        if module not in self._keys:
            raise UnknownNameError(
                "The adapter does not adapt that layer.",
                expected=some(self._infos),
                got=module,
                key=module,
            )
        values = {suffix: self._value(key) for suffix, key in self._keys[module].items()}
        return self._variant.from_file(self.config, info or self._infos[module], values)

    def shared_tensors(self, infos: Sequence[LayerInfo] | None = None) -> dict[str, Tensor]:
        """What all layers share (VeRA's matrices): name → value on the CPU, float32.

        Read, or where files do not hold it made anew, and then kept.

        Args:
            infos: All layers as a model has them; what the files tell by default.

        Raises:
            AdapterFileError: If a value is not finite, or it must be made anew and the files
                do not tell the sizes of the layers.
        """
        if self._shared_values is not None and infos is None:
            return dict(self._shared_values)
        layers = list(self._infos.values()) if infos is None else list(infos)
        specs = self._shared_specs()
        if specs:
            values = {name: self._value(spec.key) for name, spec in specs.items()}
        else:
            values = self._variant.shared_tensors(self.config, layout.bare(layers))
            if values and not all(i.d_in and i.d_out for i in layers):
                raise self._error(
                    "The file does not hold what the layers share, nor tell the sizes of the "
                    "layers that it could be made from.",
                    key=next(iter(values)),
                    fix="load it onto its model, or save it with these tensors",
                )
        if infos is None:
            self._shared_values = values
        return dict(values)

    def _value(self, key: str) -> Tensor:
        """One tensor of the file, checked, float32 or float64."""
        value = self.tensors[key]
        check_finite(value, key, self._file(peft.WEIGHTS))
        return value if value.dtype == torch.float64 else value.to(torch.float32)

    def delta(
        self,
        module: str,
        weight: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """ΔW [d_out, d_in] of one layer.

        Args:
            module: The layer.
            weight: W [d_out, d_in] of the base, for variants whose change depends on it
                (DoRA, IA3); the transpose of what GPT-2's ``Conv1D`` stores. Otherwise it
                is not looked at.
            dtype: In which to compute and return it.

        Raises:
            AdapterFileError: If the variant needs ``weight`` and it is not given, or it
                has another shape.
        """
        state = self.state(module)
        found = self._variant.factors(state)
        if found is not None and found.exact:
            return found.delta(dtype)
        if weight is None:
            raise self._error(
                f"What {self._variant.name} changes depends on the base weight.",
                key=module,
                expected="weight=W [d_out, d_in] of that layer",
                fix="pass the layer's weight of the base model",
            )
        info = state.info
        shape = tuple(weight.shape)
        fits = len(shape) == 2 and shape == (info.d_out or shape[0], info.d_in or shape[1])
        if not fits:
            raise self._error(
                "The base weight has another shape than the adapter's layer.",
                key=module,
                expected=f"[{info.d_out or 'd_out'}, {info.d_in or 'd_in'}]",
                got=list(shape),
            )
        wide = weight.detach().to(dtype)
        moved = FileState(
            state.config,
            replace(info, d_out=shape[0], d_in=shape[1]),
            {n: t.to(wide.device, dtype) for n, t in state.values.items()},
        )
        return self._variant.effective_weight(moved, wide) - wide

    # -- checking against a model ----------------------------------------------------

    def check_shared(self, infos: Sequence[LayerInfo]) -> None:
        """Compares what the layers share with what their sizes and the configuration ask for.

        Args:
            infos: All layers of the adapter.

        Raises:
            AdapterFileError: If one of the tensors has another shape.
        """
        file = self._file(peft.WEIGHTS)
        layout.check_shared(self._variant, self._file_config, infos, self.tensors, file)

    def check_shapes(self, info: LayerInfo) -> None:
        """Compares the tensors of a layer with what its sizes and the configuration ask for.

        Raises:
            AdapterFileError: If one has another shape.
        """
        keys, file = self._keys[info.name], self._file(peft.WEIGHTS)
        layout.check_shapes(self._variant, self._file_config, info, keys, self.tensors, file)

    # -- writing ---------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, beside: bool = False) -> Path:
        """Writes it as a directory that PEFT can load; every value as it is, bit for bit.

        The directory's files are replaced as a whole or not at all, and are on disk when
        this returns. Other files in the directory stay.

        Args:
            path: The directory; made with its parents if it does not exist.
            beside: Whether a directory that holds other files and no adapter will do. By
                default it will not: most often such a path is a slip.

        Raises:
            AdapterFileError: If the path holds something other than an adapter, a value is
                not finite, or writing fails; the path is as it was then.
        """
        target = as_path(path)
        check_scaling(self.config, self._infos, self._file(peft.CONFIG), negative=False)
        with explained_failure("The adapter", target):
            check_target(target, beside)
            for key in self.tensors:
                check_finite(self.tensors[key], key, None)
            replace_files(target, OWNED, self._write)
        return target

    def _write(self, folder: Path) -> None:
        record = {
            "config": None if self.unsupported else self.config.to_dict(),
            "frozen": list(self.frozen),
            "padding": list(self.padding),
            "sizes": {m: list(sizes) for m, sizes in self._sizes.items()},
            "base": self.base.to_dict(),
        }
        write(folder, self.tensors, self.peft, record)

    # -- inside ----------------------------------------------------------------------

    def _error(self, what: str, **details: Any) -> AdapterFileError:
        return AdapterFileError(what, file=self.path, **details)

    def _file(self, name: str) -> Path | None:
        """The path of one of its files, for messages."""
        return self.path and self.path / name

    def _shared_specs(self) -> dict[str, TensorSpec]:
        return self._variant.shared_specs(self._file_config, ())

    @cached_property
    def _shared_outline(self) -> Mapping[str, Tensor]:
        return layout.shared_outline(self.config, self._file_config, self._infos.values())

    def _outline(self, module: str) -> FileState:
        """What :meth:`state` gives, without the values."""
        info, keys = self._infos[module], self._keys[module]
        return layout.outline(self.config, info, keys, self.tensors, self._shared_outline)

    def _factors_of(self, module: str) -> Factors:
        found = self._variant.factors(self.state(module))
        assert found is not None
        return found

    def __repr__(self) -> str:
        return (
            f"AdapterWeights({self._variant.name}, {len(self._infos)} layers, "
            f"{self.num_parameters:,} parameters"
            + (f", {os.fspath(self.path)!r})" if self.path is not None else ")")
        )
