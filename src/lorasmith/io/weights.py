"""An adapter without a model: configuration, tensors, and where it comes from.

All other tools (diagnostics, fleets, merging) take an adapter in this form, and there is
one writer: ``save(model, path)`` is ``AdapterWeights.from_model(model).save(path)``.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lorasmith import __version__
from lorasmith.core.adapter import get_adapter
from lorasmith.core.config import AdapterConfig, LowRankConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.patterns import first_matching_key
from lorasmith.core.registry import config_from_dict, variant_of, variants
from lorasmith.core.state import SAVED, SLOT, LayerAdapter
from lorasmith.core.variant import BaseLayer, Factors, NewTensors, TensorSpec, Variant
from lorasmith.errors import (
    AdapterFileError,
    ConfigError,
    LorasmithError,
    UnknownNameError,
    UnsupportedFeatureError,
)
from lorasmith.io import peft
from lorasmith.io.atomic import replace_files
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.tensors import FileTensors, MemoryTensors, TensorSource, sha256_of
from lorasmith.io.tokenizers import TokenizerRecord
from lorasmith.redaction import redact_all

__all__ = [
    "OWN",
    "AdapterWeights",
    "BaseModel",
    "FileState",
    "as_path",
    "check_finite",
    "translate",
]

#: Our own file beside PEFT's two.
OWN = "lorasmith.json"
#: Version of its format. A higher one is not read.
FORMAT = 1
#: Files of one generation; ``adapter_model.bin`` would be a stale older one.
OWNED = frozenset({peft.CONFIG, peft.WEIGHTS, peft.PICKLE, OWN})
#: Largest factor on B A that can be meant. PEFT's default is 1, usual values are below
#: 10, rank-stabilised ones below 50.
MAX_SCALING = 1000.0

#: What a URL, or the Path that was made of one, begins with.
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

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


@dataclass(frozen=True)
class FileState:
    """One adapter's tensors on one layer, read from a file: a ``LayerState``.

    Attributes:
        config: Configuration of the adapter.
        info: The layer. Sizes that the file does not tell are 0.
        values: Tensor name → value, float32 (or float64); also of those that all layers share.
        training: Always ``False``.
    """

    config: AdapterConfig
    info: LayerInfo
    values: Mapping[str, Tensor]
    training: bool = field(default=False, init=False)

    @property
    def constants(self) -> Mapping[str, Any]:
        """What the configuration says of the layer."""
        return variant_of(self.config).constants(self.config, self.info)

    def __getitem__(self, tensor: str) -> Tensor:
        return self.values[tensor]

    def __contains__(self, tensor: object) -> bool:
        return tensor in self.values


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
        # No model at hand: PEFT has one flag for all layers.
        transposed = bool(peft_fields.get("fan_in_fan_out"))
        self._shared_values: dict[str, Tensor] | None = None
        self._blank_shared: dict[str, Tensor] | None = None
        #: (d_in, d_out) of layers whose tensors do not tell, so that our own file must.
        self._sizes: dict[str, tuple[int, int]] = {}
        same = None
        if isinstance(tensors, FileTensors):
            given = (
                transposed,
                None if conv1d is None else tuple(sorted(conv1d)),
                dict(sizes or {}),
            )
            same = _Layout(self._variant, self._file_config, tensors.headers, given)
        known = None if same is None else _layouts.find(same)
        if known is None:
            self._keys, rest = _arrange(self._variant, self._file_config, tensors)
            self._infos = {
                name: self._describe(
                    name, transposed if conv1d is None else name in conv1d, (sizes or {}).get(name)
                )
                for name in self._keys
            }
            self._check_shared_keys()
            self.check_shared(list(self._infos.values()))
            self._factor_keys = self._keys_of_factors()
            if same is not None:
                same.found = self._keys, rest, self._infos, self._sizes, self._factor_keys
                _layouts.keep(same)
        else:
            self._keys, rest, self._infos, self._sizes, self._factor_keys = known
        self._saved = _saved_tensors(rest, self.peft)
        missing = [p for p in self.padding if p not in self._saved]
        if missing:
            raise self._error("A tensor is missing.", key=missing[0])
        others = (k.removeprefix(peft.PREFIX) for k in rest)
        self._unexpected = tuple(k for k in others if k not in self._saved)
        self._check_scaling()

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
        root, config = adapter.model, adapter.config
        parts: dict[str, LayerAdapter] = adapter.layers()
        copies = adapter.saved_modules()
        variant = variant_of(config)
        frozen = {n for part in parts.values() for n, _ in part.named_buffers()}
        tensors: dict[str, Tensor] = {}
        for module, part in parts.items():
            for suffix, value in variant.to_file(part).items():
                tensors[f"{peft.PREFIX}{module}.{suffix}"] = _snapshot(value)
        for module, made in copies.items():
            for leaf, value in made.state_dict().items():
                tensors[f"{peft.PREFIX}{module}.{leaf}"] = _snapshot(value)
        names = peft.module_names(root)
        task = peft.task_type(root)
        implied = peft.implied_modules(task)
        if any(peft.replaced_module(implied, f"{m}.weight") is not None for m in parts):
            # PEFT would train the head as a whole and keep the adapter off it.
            task, implied = None, ()
        # PEFT looks for modules_to_save by the end of the name alone, and asks the file for
        # every module it finds: what is not ours among them gets the base's own values.
        padding = []
        for module in peft.replaced_modules((*copies, *implied), names):
            if module in parts:
                warnings.warn(
                    f"PEFT cannot load this adapter: it takes {module!r} for one of "
                    f"modules_to_save={list(copies)}, going by the end of the name, and there is "
                    "an adapter on it. lorasmith can.",
                    UserWarning,
                    stacklevel=3,
                )
            elif module not in copies:
                for leaf, value in _own_state(root.get_submodule(module)).items():
                    padding.append(f"{module}.{leaf}")
                    tensors[f"{peft.PREFIX}{module}.{leaf}"] = _snapshot(value)
        infos = {m: part.info for m, part in parts.items()}
        tensors.update(_shared_tensors(variant, config, list(infos.values()), parts))
        fields = _peft_fields(
            variant,
            variant.file_config(config, frozen),
            infos,
            names=names,
            saved=list(copies),
            task=task,
            base=peft.base_name(root),
        )
        if task is None:
            origin = type(root)
            fields["auto_mapping"] = {
                "base_model_class": origin.__name__,
                "parent_library": origin.__module__,
            }
        return cls(
            config,
            fields,
            MemoryTensors(tensors),
            base=BaseModel(peft.base_name(root), fingerprint(root, without=list(copies))),
            frozen=frozen,
            padding=padding,
            conv1d={m for m, info in infos.items() if info.kind == "conv1d"},
            sizes={m: (info.d_in, info.d_out) for m, info in infos.items()},
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
        variant = variant_of(config)
        infos, own = {}, {}
        known_layers = {**(layouts or {}), **(like.layers if like is not None else {})}
        for module, values in tensors.items():
            layout = known_layers.get(module)
            infos[module] = info = _sizes(variant, config, module, values, layout)
            own[module] = variant.shapes(config, info)
        places = variant.shared_specs(config, ())
        common = {*places, *variant.shared_tensors(config, _bare([_BLANK]))}
        frozen = {n for m, values in tensors.items() for n in values if n not in own[m]} - common
        flat: dict[str, Tensor] = {}
        for module, values in tensors.items():
            missing = [n for n in (*own[module], *sorted(frozen)) if n not in values]
            if missing:
                raise AdapterFileError("A tensor is missing.", key=f"{module}.{missing[0]}")
            state = FileState(config, infos[module], values)
            for suffix, value in variant.to_file(state).items():
                flat[f"{peft.PREFIX}{module}.{suffix}"] = value.detach().contiguous()
        given = {**next(iter(tensors.values())), **(shared or {})}
        for name, place in places.items():
            if name not in given:
                raise AdapterFileError("A tensor that the layers share is missing.", key=name)
            flat[place.key] = given[name].detach().contiguous()
        saved: list[str] = []
        for key, value in (extras or {}).items():
            flat[f"{peft.PREFIX}{key}"] = value.detach().contiguous()
            owner = peft.replaced_module(config.modules_to_save, key) or key.rpartition(".")[0]
            saved.append(owner)
        known = {} if like is None else like.peft
        fields = _peft_fields(
            variant,
            variant.file_config(config, frozen),
            infos,
            names=(),
            saved=list(dict.fromkeys(saved)),
            task=known.get("task_type"),
            base=known.get("base_model_name_or_path", base.name if base else None),
        )
        if like is not None:
            fields["auto_mapping"] = known.get("auto_mapping")
            # What else narrows the layers is not taken over, so that short names would be too many.
            narrowed = any(known.get(k) for k in ("exclude_modules", "layers_to_transform"))
            same = set(like.modules) == set(infos) and not narrowed
            if same and type(config) is type(like.config):
                for key in ("target_modules", "feedforward_modules"):
                    if key in fields and key in known:
                        fields[key] = known[key]
        return cls(
            config,
            fields,
            MemoryTensors(flat),
            base=base or (None if like is None else like.base),
            frozen=frozen,
            conv1d={m for m, info in infos.items() if info.kind == "conv1d"},
            sizes={m: (info.d_in, info.d_out) for m, info in infos.items()},
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
        having = [m for m in self._infos if self._outline_of_factors(m) is not None]
        return _Lazy(having, self._factors_of)

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Everything beside the factors, ``"<module>.<tensor>"`` → value as it is stored.

        What the layers share stands under its name in the file. Gains, magnitudes,
        ``modules_to_save``, and what lorasmith does not know; read at each access.
        """
        keys = {k.removeprefix(peft.PREFIX): k for k in self.tensors if k not in self._factor_keys}
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
            total += sum(t.numel() for t in self._outline(module).trainable.values())
        for key in self._saved:
            if key not in self.padding:
                total += _numel(self.tensors.shape(f"{peft.PREFIX}{key}"))
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
                expected=_some(self._infos),
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
            values = self._variant.shared_tensors(self.config, _bare(layers))
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
        check_finite(value, key, self.path and self.path / peft.WEIGHTS)
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
        self._refuse_negative()
        try:
            check_target(target, beside)
            for key in self.tensors:
                check_finite(self.tensors[key], key, None)
            replace_files(target, OWNED, self._write)
        except OSError as error:
            raise AdapterFileError(
                f"The adapter could not be written: {error}.",
                file=target,
                fix="check free space and permissions of the directory above",
            ) from error
        return target

    def _write(self, folder: Path) -> None:
        import shutil

        weights, config = folder / peft.WEIGHTS, folder / peft.CONFIG
        copied = False
        if isinstance(self.tensors, FileTensors) and not self.tensors.changed():
            shutil.copyfile(self.tensors.path, weights)
            copied = not self.tensors.changed()
        if not copied:
            from safetensors.torch import save_file

            values = {k: self.tensors[k].detach().cpu().contiguous() for k in self.tensors}
            # Tensors that share memory are no copy of each other to safetensors.
            save_file(_unshared(values), weights, metadata={"format": "pt"})
        config.write_text(_json(self.peft), encoding="utf-8")
        # safetensors makes files that only their owner can read, whatever the umask.
        shutil.copymode(config, weights)
        record = {
            "format": FORMAT,
            "version": __version__,
            "config": None if self.unsupported else self.config.to_dict(),
            "frozen": list(self.frozen),
            "padding": list(self.padding),
            "sizes": {m: list(sizes) for m, sizes in self._sizes.items()},
            "base": {
                "name": self.base.name,
                "fingerprint": None
                if self.base.fingerprint is None
                else self.base.fingerprint.to_dict(),
                **(
                    {}
                    if self.base.tokenizer is None
                    else {"tokenizer": self.base.tokenizer.to_dict()}
                ),
            },
            "manifest": {
                f.name: {"sha256": sha256_of(f), "size": f.stat().st_size}
                for f in (config, weights)
            },
        }
        (folder / OWN).write_text(_json(record), encoding="utf-8")

    # -- inside ----------------------------------------------------------------------

    def _error(self, what: str, **details: Any) -> AdapterFileError:
        return AdapterFileError(what, file=self.path, **details)

    def _describe(self, module: str, conv1d: bool, sizes: tuple[int, int] | None) -> LayerInfo:
        """The layer of a module by the sizes of its tensors, all of which are checked.

        Args:
            module: Its name.
            conv1d: Whether it stores its weight transposed.
            sizes: (d_in, d_out) as far as they are known from elsewhere.
        """
        keys = self._keys[module]
        kind: Literal["linear", "conv1d"] = "conv1d" if conv1d else "linear"
        weights = self.path and self.path / peft.WEIGHTS
        blank = LayerInfo(module, 0, 0, kind, False, False)
        wanted = self._variant.tensor_specs(self._file_config, blank)
        for spec in wanted.values():
            if spec.key not in keys:
                raise AdapterFileError(
                    "A tensor is missing.",
                    file=weights,
                    key=f"{peft.PREFIX}{module}.{spec.key}",
                    expected=", ".join(one.key for one in wanted.values()),
                    got=", ".join(keys),
                    fix="the file is incomplete; save or download the adapter again",
                )
        shapes = {suffix: self.tensors.shape(key) for suffix, key in keys.items()}
        try:
            d_in, d_out = self._variant.layer_sizes(self._file_config, shapes)
        except (IndexError, KeyError, ValueError) as error:
            raise AdapterFileError(
                "The tensors of a layer have impossible shapes.",
                file=weights,
                key=module,
                got=", ".join(f"{s} {list(shape)}" for s, shape in shapes.items()),
            ) from error
        if sizes is not None and not (d_in and d_out):
            if (d_in or sizes[0], d_out or sizes[1]) != sizes:
                raise AdapterFileError(
                    "The sizes of a layer are others than its tensors say.",
                    file=self.path and self.path / OWN,
                    key=module,
                    expected=f"{d_in or 'd_in'} → {d_out or 'd_out'}",
                    got=f"{sizes[0]} → {sizes[1]}",
                )
            d_in, d_out = sizes
            if d_in and d_out:
                self._sizes[module] = sizes
        info = LayerInfo(module, d_in, d_out, kind, False, False)
        self.check_shapes(info)
        for key in keys.values():
            self._check_dtype(key)
        return info

    def _check_dtype(self, key: str) -> None:
        if not self.tensors.dtype(key).is_floating_point:
            raise AdapterFileError(
                "A tensor does not hold floating-point numbers.",
                file=self.path and self.path / peft.WEIGHTS,
                key=key,
                expected="float32, float16, bfloat16 or float64",
                got=str(self.tensors.dtype(key)).removeprefix("torch."),
            )

    def _shared_specs(self, infos: Sequence[LayerInfo] = ()) -> dict[str, TensorSpec]:
        return self._variant.shared_specs(self._file_config, infos)

    def _check_shared_keys(self) -> None:
        for spec in self._shared_specs().values():
            if spec.key not in self.tensors:
                raise AdapterFileError(
                    "A tensor that the layers share is missing.",
                    file=self.path and self.path / peft.WEIGHTS,
                    key=spec.key,
                    fix="the file is incomplete; save or download the adapter again",
                )
            self._check_dtype(spec.key)

    def check_shared(self, infos: Sequence[LayerInfo]) -> None:
        """Compares what the layers share with what their sizes and the configuration ask for.

        Args:
            infos: All layers of the adapter.

        Raises:
            AdapterFileError: If one of the tensors has another shape.
        """
        for spec in self._shared_specs(infos).values():
            got = self.tensors.shape(spec.key)
            if not _agrees(spec.shape, got):
                raise AdapterFileError(
                    "A tensor that the layers share has another shape than they and the "
                    "configuration ask for.",
                    file=self.path and self.path / peft.WEIGHTS,
                    key=spec.key,
                    expected=[size or "any" for size in spec.shape],
                    got=list(got),
                    fix="is it the right base model, and the right adapter_config.json?",
                )

    def check_shapes(self, info: LayerInfo) -> None:
        """Compares the tensors of a layer with what its sizes and the configuration ask for.

        Raises:
            AdapterFileError: If one has another shape.
        """
        weights, keys = self.path and self.path / peft.WEIGHTS, self._keys[info.name]
        specs = self._variant.tensor_specs(self._file_config, info)
        for suffix in sorted(keys.keys() ^ {spec.key for spec in specs.values()}):
            # Which tensors there are can depend on the sizes.
            raise AdapterFileError(
                "A tensor is not one that its layer has."
                if suffix in keys
                else "A tensor is missing.",
                file=weights,
                key=f"{peft.PREFIX}{info.name}.{suffix}",
                fix="is it the right base model, and the right adapter_config.json?",
            )
        for spec in specs.values():
            key = keys[spec.key]
            got = self.tensors.shape(key)
            if not _agrees(spec.shape, got):
                raise AdapterFileError(
                    "A tensor has another shape than its layer and configuration ask for.",
                    file=weights,
                    key=key,
                    expected=f"{list(spec.shape)} (layer {info.d_in} → {info.d_out}"
                    + (
                        f", rank {self._file_config.rank_of(info.name)})"
                        if isinstance(self._file_config, LowRankConfig)
                        else ")"
                    ),
                    got=list(got),
                    fix="is it the right base model, and the right adapter_config.json?",
                )

    def _check_scaling(self) -> None:
        if not isinstance(self.config, LowRankConfig):
            return
        for module in self._infos:
            scaling = self.config.scaling_of(module)
            if not abs(scaling) <= MAX_SCALING:
                raise AdapterFileError(
                    "The scaling of the adapter is not plausible.",
                    file=self.path and self.path / peft.CONFIG,
                    key=module,
                    expected=f"alpha / r (or alpha / √r) of at most {MAX_SCALING:g}",
                    got=f"{scaling:g} (alpha {self.config.alpha_of(module):g}, "
                    f"r {self.config.rank_of(module)})",
                    fix="correct lora_alpha",
                )
        if self.path is not None:
            self._refuse_negative()

    def _refuse_negative(self) -> None:
        """No training leaves a negative alpha; in a file it turns the adapter round."""
        if not isinstance(self.config, LowRankConfig):
            return
        for module in self._infos:
            alpha = self.config.alpha_of(module)
            if alpha < 0:
                raise self._error_in(
                    peft.CONFIG,
                    "The scaling of the adapter is negative.",
                    key="lora_alpha",
                    expected="alpha of 0 or more",
                    got=f"{alpha:g} for {module}",
                    fix="correct lora_alpha; to take an adapter away, merge it with weight -1",
                )

    def _error_in(self, name: str, what: str, **details: Any) -> AdapterFileError:
        return AdapterFileError(what, file=self.path and self.path / name, **details)

    def _outline(self, module: str) -> NewTensors:
        """The variant's tensors on one layer without their values."""
        blank = {
            suffix: torch.empty(self.tensors.shape(key), device="meta")
            for suffix, key in self._keys[module].items()
        }
        return self._variant.from_file(self.config, self._infos[module], blank)

    def _outline_state(self, module: str) -> FileState:
        """What :meth:`state` gives, without the values."""
        infos = list(self._infos.values())
        if self._blank_shared is None:
            specs = self._shared_specs(infos)
            made = {n: torch.empty(s.shape, device="meta") for n, s in specs.items()}
            bare = _bare(infos, device="meta")
            self._blank_shared = made or self._variant.shared_tensors(self.config, bare)
        new = self._outline(module)
        values = {**self._blank_shared, **dict(new.trainable), **dict(new.frozen)}
        return FileState(self.config, self._infos[module], values)

    def _outline_of_factors(self, module: str) -> Factors | None:
        return self._variant.factors(self._outline_state(module))

    def _keys_of_factors(self) -> set[str]:
        """Names in the file of the tensors that are a layer's factors as they are."""
        names = set()
        for module, info in self._infos.items():
            state = self._outline_state(module)
            found = self._variant.factors(state)
            if found is None:
                continue
            shown = {id(t) for t in (found.A, found.B)}
            for name, spec in self._variant.tensor_specs(self._file_config, info).items():
                # What stands in the file may be made of the variant's tensors.
                if id(state.values.get(name)) in shown:
                    names.add(self._keys[module][spec.key])
        return names

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


@dataclass
class _Layout:
    """What the checks of names, shapes and dtypes depend on, and what they have found.

    Adapters of a fleet are mostly alike in all of it, and checking layer by layer takes longer
    than reading them.
    """

    variant: Variant
    config: AdapterConfig
    headers: Mapping[str, tuple[tuple[int, ...], str]]
    given: tuple[bool, tuple[str, ...] | None, dict[str, tuple[int, int]]]
    found: (
        tuple[
            dict[str, dict[str, str]],
            list[str],
            dict[str, LayerInfo],
            dict[str, tuple[int, int]],
            set[str],
        ]
        | None
    ) = None


class _Layouts:
    """The last few layouts that were found to be right."""

    def __init__(self, most: int = 4) -> None:
        self._kept: deque[_Layout] = deque(maxlen=most)

    def find(self, wanted: _Layout) -> Any:
        """What was found for the same layout, or ``None``."""
        for one in tuple(self._kept):
            if (
                one.variant is wanted.variant
                and one.headers == wanted.headers
                and one.given == wanted.given
                and type(one.config) is type(wanted.config)
                and one.config == wanted.config
            ):
                return one.found
        return None

    def keep(self, layout: _Layout) -> None:
        """Remembers one in the place of the oldest."""
        self._kept.append(layout)


_layouts = _Layouts()


def translate(
    fields: Mapping[str, Any], tensors: TensorSource, file: Path
) -> tuple[AdapterConfig, str | None]:
    """Our configuration for PEFT's fields, and why the adapter cannot be loaded, if so.

    Args:
        fields: ``adapter_config.json``.
        tensors: Those of the weights file.
        file: The configuration's path, for messages.

    Raises:
        AdapterFileError: If no variant knows the file, or a value in it is impossible.
    """
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterFileError(
            "The configuration does not say what kind of adapter it is.",
            file=file,
            key="peft_type",
            expected="a string such as 'LORA'",
            got=repr(kind),
        )
    try:
        config = _claim(fields, tensors)
    except UnsupportedFeatureError as error:
        # What is left of the configuration describes the factors all the same.
        readable = {k: v for k, v in fields.items() if k != error.key}
        config, more = translate(readable, tensors, file)
        reason = f"{error.what} ({error.key} = {error.got})"
        return config, reason if more is None else f"{reason}\n{more}"
    except LorasmithError as error:
        # What the tensors lack is the other file's fault.
        of_weights = isinstance(error, AdapterFileError)
        raise in_file(error, file.with_name(peft.WEIGHTS) if of_weights else file) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise AdapterFileError(
            f"A value in the configuration has an impossible type: {error}.",
            file=file,
            expected="what PEFT writes",
            got=f"{type(error).__name__}: {error}"[:200],
        ) from error
    if config is not None:
        _warn_of_unknown(fields, file)
        return config, None
    known = sorted({v.peft_type for v in variants().values()})
    raise AdapterFileError(
        f"Adapters of PEFT's type {kind} are not known.",
        file=file,
        key="peft_type",
        expected=", ".join(known),
        got=kind,
        fix="lorasmith.register(...) adds a variant of your own; on the command line, "
        "--plugin FILE",
    )


def _warn_of_unknown(fields: Mapping[str, Any], file: Path) -> None:
    kind = fields.get("peft_type")
    own = [v.peft_fields for v in variants().values() if v.peft_type == kind and v.peft_fields]
    known = peft.COMMON_FIELDS.union(*own) if own else None
    neutral: tuple[object, ...] = (None, False, "", [], {})
    unknown = [k for k, v in fields.items() if known and k not in known and v not in neutral]
    if unknown:
        warnings.warn(
            f"{file} holds fields that lorasmith does not know, perhaps of a newer PEFT: "
            f"{_some(sorted(unknown))}. They are ignored; if they change what the adapter "
            "computes, it will not act as it did in training.",
            UserWarning,
            stacklevel=6,
        )


def _claim(fields: Mapping[str, Any], tensors: TensorSource) -> AdapterConfig | None:
    told: dict[str, Any] = {}
    for variant in variants().values():
        told |= variant.fields_from_tensors(tensors, tensors.shape)
    fields = {**fields, **told}
    for variant in variants().values():
        # First with any targets: which tensors are the variant's own, hence which modules
        # it adapts, is only known once it has read its fields.
        common: dict[str, Any] = {
            "targets": "all-linear",
            "exclude": (),
            "layers": None,
            "modules_to_save": (),
        }
        config = variant.from_peft(fields, common)
        if config is None:
            continue
        keys, rest = _arrange(variant, config, tensors)
        saved = _saved_tensors(rest, fields)
        common["targets"] = peft.plain_targets(fields, list(keys))
        common["modules_to_save"] = tuple(dict.fromkeys(saved.values()))
        found: AdapterConfig | None = variant.from_peft(fields, common)
        return found
    return None


def _arrange(
    variant: Variant, config: AdapterConfig, tensors: Collection[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module name → PEFT key → name in the file; and the names that fit no PEFT key.

    What the layers share is in neither.
    """
    suffixes = [spec.key for spec in variant.tensor_specs(config, _BLANK).values()]
    shared = {spec.key for spec in variant.shared_specs(config, ()).values()}
    found: dict[str, dict[str, str]] = {}
    rest = []
    for key in tensors:
        if key in shared:
            continue
        name = key.removeprefix(peft.PREFIX)
        suffix = next((s for s in suffixes if name.endswith(f".{s}")), None)
        if suffix is None or name == key:
            rest.append(key)
        else:
            found.setdefault(name[: -len(suffix) - 1], {})[suffix] = key
    if not found:
        raise AdapterFileError(
            "The file holds no tensor of an adapter.",
            expected=f"names such as {peft.PREFIX}<module>.{suffixes[0]}",
            got=_some(tensors),
            key=next(iter(tensors), None),
        )
    return {n: found[n] for n in sorted(found, key=_natural)}, rest


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 9; what a file says about order is of no use."""
    parts = name.split(".")
    return [(p.isdecimal(), len(p) if p.isdecimal() else 0, p) for p in parts]


def _saved_tensors(rest: Collection[str], fields: Mapping[str, Any]) -> dict[str, str]:
    """``"<module>.<tensor>"`` → module, of the tensors that ``modules_to_save`` explains."""
    given = fields.get("modules_to_save") or ()
    wanted = [
        m
        for m in (*given, *peft.implied_modules(fields.get("task_type")))
        if isinstance(m, str) and m
    ]
    found = {}
    for key in rest:
        name = key.removeprefix(peft.PREFIX)
        module = peft.replaced_module(wanted, name)
        if module is not None and name != key:
            found[name] = module
    return found


def _peft_fields(
    variant: Variant,
    config: AdapterConfig,
    infos: Mapping[str, LayerInfo],
    *,
    names: Collection[str],
    saved: list[str],
    task: str | None,
    base: str | None,
) -> dict[str, Any]:
    fields = variant.to_peft(config, infos)
    feedforward = fields.get("feedforward_modules")
    reach = (*saved, *peft.implied_modules(task))
    targets, inner = peft.shorten(list(infos), feedforward, list(names), reach)
    fields = {
        "peft_type": variant.peft_type,
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": saved or None,
        **fields,
    }
    if inner is not None:
        fields["feedforward_modules"] = inner
    for name in ("rank_pattern", "alpha_pattern"):
        if fields.get(name):
            # PEFT warns of keys that match nothing.
            used = {first_matching_key(fields[name], m) for m in infos}
            fields[name] = {k: v for k, v in fields[name].items() if k in used}
    return {k: _whole(v) for k, v in fields.items()}


def _whole(value: Any) -> Any:
    """16.0 → 16: PEFT and vLLM declare alpha as an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    return value


#: A layer of no model, for questions that do not depend on it.
_BLANK = LayerInfo("", 1, 1, "linear", False, False)


def _bare(infos: Sequence[LayerInfo], device: str = "cpu") -> list[BaseLayer]:
    """Layers without a model: sizes, and a device."""
    holder = nn.Module()
    holder.register_buffer("none", torch.empty(0, device=device))
    return [BaseLayer(holder, info) for info in infos]


def _shared_tensors(
    variant: Variant,
    config: AdapterConfig,
    infos: Sequence[LayerInfo],
    parts: Mapping[str, LayerAdapter],
) -> dict[str, Tensor]:
    """Name in the file → value of what the layers of an attached adapter share."""
    shared = next(part.shared for part in parts.values())
    if shared is None:
        return {}
    specs = variant.shared_specs(config, infos)
    if specs:
        return {spec.key: _snapshot(shared[name]) for name, spec in specs.items()}
    for name, value in variant.shared_tensors(config, _bare(infos)).items():
        mine = shared[name]
        if not mine.is_meta and not torch.equal(mine.to(value.device), value):
            raise AdapterFileError(
                "What the layers share is not to be saved, and could not be made again: the "
                "adapter has other values than its configuration gives here.",
                key=name,
                fix="save these tensors as well (save_projection=True, with VeRA)",
            )
    return {}


def _sizes(
    variant: Variant,
    config: AdapterConfig,
    module: str,
    values: Mapping[str, Tensor],
    layout: LayerInfo | None,
) -> LayerInfo:
    """The layer that the variant's tensors fit; a size that nothing tells is 0.

    Args:
        variant: The variant.
        config: Its configuration.
        module: Name of the layer.
        values: Tensor name → value.
        layout: What another adapter knows of the layer.
    """
    kind = layout.kind if layout is not None else "linear"
    shapes = {n: tuple(t.shape) for n, t in values.items()}

    def fits(info: LayerInfo) -> bool:
        return all(_agrees(s, shapes.get(n)) for n, s in variant.shapes(config, info).items())

    if layout is not None and layout.d_in and layout.d_out and fits(layout):
        return LayerInfo(module, layout.d_in, layout.d_out, kind, False, False)
    # Where a file holds the tensors as they are, the variant can tell ...
    try:
        d_in, d_out = variant.sizes_from_tensors(config, shapes)
    except (IndexError, KeyError, ValueError):
        pass
    else:
        info = LayerInfo(module, d_in, d_out, kind, False, False)
        if fits(info):
            return info
    # ... else sizes that no rank can equal show which dimension of each tensor is which.
    probe = {"d_in": 2**61 - 1, "d_out": 2**31 - 1}
    blank = LayerInfo(module, probe["d_in"], probe["d_out"], kind, False, False)
    sizes: dict[str, int] = {}
    for name, shape in variant.shapes(config, blank).items():
        if name not in shapes:
            raise AdapterFileError("A tensor is missing.", key=f"{module}.{name}")
        got, wanted = shapes[name], []
        for place, size in enumerate(shape):
            role = next((r for r, p in probe.items() if p == size), None)
            if role is not None and place < len(got):
                size = sizes.setdefault(role, got[place])
            wanted.append(size)
        if got != tuple(wanted):
            raise AdapterFileError(
                "A tensor has another shape than the configuration and the others ask for.",
                key=f"{module}.{name}",
                expected=wanted,
                got=list(got),
            )
    return LayerInfo(module, sizes.get("d_in", 0), sizes.get("d_out", 0), kind, False, False)


def _agrees(wanted: tuple[int, ...], got: tuple[int, ...] | None) -> bool:
    """Whether a shape is the wanted one, where a size of 0 is not known and may be any."""
    return (
        got is not None
        and len(got) == len(wanted)
        and all(want in (0, size) for want, size in zip(wanted, got, strict=True))
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


def _snapshot(value: Tensor) -> Tensor:
    gather = getattr(value, "full_tensor", None)
    if callable(gather):  # DTensor: every rank takes part
        value = gather()
    return value.detach().clone(memory_format=torch.contiguous_format)


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without what adapters have put into it."""
    return {
        n: t
        for n, t in module.state_dict().items()
        if SLOT not in n.split(".") and SAVED not in n.split(".")
    }


def _unshared(values: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for key, value in values.items():
        place = value.untyped_storage().data_ptr()
        if place in seen or value.untyped_storage().nbytes() != value.numel() * value.itemsize:
            values[key] = value.clone()
        seen.add(place)
    return values


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
            got=_some(sorted(e.name for e in target.iterdir())),
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


def in_file(error: LorasmithError, file: str | os.PathLike[str]) -> AdapterFileError:
    """The same error as one of that file."""
    return AdapterFileError(
        error.what,
        expected=error.expected,
        got=error.got,
        fix=error.fix,
        key=error.key,
        file=file,
    )


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(redact_all(value), indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The configuration cannot be written as JSON: {error}.") from error


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _some(names: Collection[str], count: int = 4) -> str:
    shown = list(names)[:count]
    return ", ".join(shown) + (f" and {len(names) - count} more" if len(names) > count else "")


def record_config(record: Mapping[str, Any], file: Path) -> AdapterConfig | None:
    """The configuration in our own file, or ``None`` if it holds none.

    Raises:
        AdapterFileError: If it cannot be used.
    """
    values = record.get("config")
    if values is None:
        return None
    try:
        return config_from_dict(values)
    except LorasmithError as error:
        raise in_file(error, file) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise AdapterFileError(
            f"The configuration is malformed: {error}.",
            file=file,
            key="config",
            expected="an object, as lorasmith writes it",
            got=repr(values)[:200],
        ) from error


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


def reason_for(key: str) -> str:
    """Why a tensor is unexpected, as far as its name tells."""
    for pattern, reason in _REASONS:
        if pattern.search(key):
            return reason
    return "nothing in the configuration asks for it"
