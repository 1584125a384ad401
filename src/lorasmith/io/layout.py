"""Which tensors of a weights file belong to which layer, and how large the layers are.

An adapter's file is a flat list of names, ``base_model.model.<module>.<key>``. The variant knows
the keys of a layer and their shapes in terms of the layer's sizes (``Variant.tensor_specs``), so
that names and shapes together tell the layers and, of most variants, their sizes; what they do
not tell stands in our own file, or is 0. Everything is checked on the file's header, without
reading a value: that each layer has all of its tensors and no other, that shapes agree with each
other and with the configuration, that dtypes are floating-point.

**Cache.** The adapters of a fleet are mostly alike in all that the checks depend on (variant,
configuration, header, sizes), and checking layer by layer takes longer than reading them: the
last few findings are kept, and serve again where all of it is equal. They hold names and sizes,
no tensors and no file.

Symbols: a *key* is what the variant calls a tensor in PEFT's names (``lora_A.weight``), a *name*
the whole name in the file. Functions take the file's configuration (``Variant.file_config``)
where they speak of the file, and the adapter's where they speak of the variant's own tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorasmith.core.config import AdapterConfig, LowRankConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.registry import variant_of
from lorasmith.core.variant import BaseLayer, NewTensors, Variant
from lorasmith.errors import AdapterFileError
from lorasmith.io import peft
from lorasmith.io.checks import some
from lorasmith.io.tensors import FileTensors, TensorSource
from lorasmith.io.writing import OWN

__all__ = [
    "BLANK",
    "FileState",
    "Layout",
    "arrange",
    "bare",
    "blank_tensors",
    "check_shapes",
    "check_shared",
    "layout_of",
    "outline",
    "shared_outline",
    "sized",
]

#: A layer of no model, for questions that do not depend on it.
BLANK = LayerInfo("", 1, 1, "linear", False, False)


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


@dataclass(frozen=True)
class Layout:
    """What the names, shapes and dtypes of a file tell.

    Attributes:
        keys: Module name → key → name in the file.
        rest: Names that are no layer's tensor, nor one that all layers share.
        infos: Module name → layer, sorted (by number where they have one).
        sizes: Module name → (d_in, d_out) where the tensors do not tell, so that our own file must.
        factor_names: Names of the tensors that are a layer's factors as they are.
    """

    keys: Mapping[str, Mapping[str, str]]
    rest: Sequence[str]
    infos: Mapping[str, LayerInfo]
    sizes: Mapping[str, tuple[int, int]]
    factor_names: Set[str]


@dataclass(frozen=True, eq=False)
class _Question:
    """What a layout depends on."""

    variant: Variant
    config: AdapterConfig
    headers: Mapping[str, tuple[tuple[int, ...], str]]
    transposed: bool
    conv1d: tuple[str, ...] | None
    sizes: Mapping[str, tuple[int, int]]

    def same(self, other: _Question) -> bool:
        return (
            self.variant is other.variant
            and self.headers == other.headers
            and self.transposed == other.transposed
            and self.conv1d == other.conv1d
            and self.sizes == other.sizes
            and type(self.config) is type(other.config)
            and self.config == other.config
        )


#: The last few layouts that were found to be right.
_known: deque[tuple[_Question, Layout]] = deque(maxlen=4)


def layout_of(
    config: AdapterConfig,
    file_config: AdapterConfig,
    tensors: TensorSource,
    *,
    transposed: bool = False,
    conv1d: Collection[str] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    folder: Path | None = None,
) -> Layout:
    """The layers of an adapter, all of its tensors checked.

    Args:
        config: The adapter's configuration.
        file_config: The same as its file has it.
        tensors: The file's tensors.
        transposed: Whether the layers store their weights transposed, as far as is known.
        conv1d: Names of those that do, if they are known one by one.
        sizes: Module name → (d_in, d_out) as far as they are known from elsewhere.
        folder: The adapter's directory, for messages.

    Raises:
        AdapterFileError: A tensor is missing, or has an impossible shape or dtype.
    """
    asked = None
    if isinstance(tensors, FileTensors):
        named = None if conv1d is None else tuple(sorted(conv1d))
        variant = variant_of(config)
        asked = _Question(
            variant, file_config, tensors.headers, transposed, named, dict(sizes or {})
        )
        for question, layout in tuple(_known):
            if question.same(asked):
                return layout
    layout = _found(config, file_config, tensors, transposed, conv1d, sizes or {}, folder)
    if asked is not None:
        _known.append((asked, layout))
    return layout


def _found(
    config: AdapterConfig,
    file_config: AdapterConfig,
    tensors: TensorSource,
    transposed: bool,
    conv1d: Collection[str] | None,
    sizes: Mapping[str, tuple[int, int]],
    folder: Path | None,
) -> Layout:
    variant = variant_of(config)
    file = folder and folder / peft.WEIGHTS
    keys, rest = arrange(variant, file_config, tensors)
    infos: dict[str, LayerInfo] = {}
    needed: dict[str, tuple[int, int]] = {}
    for module, own in keys.items():
        kind: Literal["linear", "conv1d"] = (
            "conv1d" if (transposed if conv1d is None else module in conv1d) else "linear"
        )
        told = _sizes_told(variant, file_config, module, kind, own, tensors, file)
        d_in, d_out = told
        if module in sizes and not (d_in and d_out):
            d_in, d_out = _completed(module, told, sizes[module], folder)
            if d_in and d_out:
                needed[module] = (d_in, d_out)
        infos[module] = LayerInfo(module, d_in, d_out, kind, False, False)
        check_shapes(variant, file_config, infos[module], own, tensors, file)
        for name in own.values():
            _check_dtype(tensors, name, file)
    for spec in variant.shared_specs(file_config, ()).values():
        if spec.key not in tensors:
            raise AdapterFileError(
                "A tensor that the layers share is missing.",
                file=file,
                key=spec.key,
                fix="the file is incomplete; save or download the adapter again",
            )
        _check_dtype(tensors, spec.key, file)
    check_shared(variant, file_config, list(infos.values()), tensors, file)
    names = _factor_names(config, file_config, keys, infos, tensors)
    return Layout(keys, rest, infos, needed, names)


# Names ---------------------------------------------------------------------------------------


def arrange(
    variant: Variant, config: AdapterConfig, tensors: Collection[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module name → key → name in the file; and the names that fit no key.

    What the layers share is in neither.

    Args:
        variant: The variant.
        config: Its configuration, as the file has it.
        tensors: All names.

    Raises:
        AdapterFileError: None of them belongs to a layer.
    """
    suffixes = [spec.key for spec in variant.tensor_specs(config, BLANK).values()]
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
            got=some(tensors),
            key=next(iter(tensors), None),
        )
    return {n: found[n] for n in sorted(found, key=_natural)}, rest


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 9; what a file says about order is of no use."""
    parts = name.split(".")
    return [(p.isdecimal(), len(p) if p.isdecimal() else 0, p) for p in parts]


def _factor_names(
    config: AdapterConfig,
    file_config: AdapterConfig,
    keys: Mapping[str, Mapping[str, str]],
    infos: Mapping[str, LayerInfo],
    tensors: TensorSource,
) -> set[str]:
    """Names of the tensors that are a layer's factors as they are."""
    variant = variant_of(config)
    shared = shared_outline(config, file_config, infos.values())
    names = set()
    for module, info in infos.items():
        state = outline(config, info, keys[module], tensors, shared)
        found = variant.factors(state)
        if found is None:
            continue
        shown = {id(t) for t in (found.A, found.B)}
        for name, spec in variant.tensor_specs(file_config, info).items():
            # What stands in the file may be made of the variant's tensors.
            if id(state.values.get(name)) in shown:
                names.add(keys[module][spec.key])
    return names


# Sizes and shapes ----------------------------------------------------------------------------


def _sizes_told(
    variant: Variant,
    config: AdapterConfig,
    module: str,
    kind: Literal["linear", "conv1d"],
    keys: Mapping[str, str],
    tensors: TensorSource,
    file: Path | None,
) -> tuple[int, int]:
    """(d_in, d_out) of a layer by its tensors, 0 where they do not tell; none is missing."""
    blank = LayerInfo(module, 0, 0, kind, False, False)
    wanted = variant.tensor_specs(config, blank)
    for spec in wanted.values():
        if spec.key not in keys:
            raise AdapterFileError(
                "A tensor is missing.",
                file=file,
                key=f"{peft.PREFIX}{module}.{spec.key}",
                expected=", ".join(one.key for one in wanted.values()),
                got=", ".join(keys),
                fix="the file is incomplete; save or download the adapter again",
            )
    shapes = {key: tensors.shape(name) for key, name in keys.items()}
    try:
        return variant.layer_sizes(config, shapes)
    except (IndexError, KeyError, ValueError) as error:
        raise AdapterFileError(
            "The tensors of a layer have impossible shapes.",
            file=file,
            key=module,
            got=", ".join(f"{s} {list(shape)}" for s, shape in shapes.items()),
        ) from error


def _completed(
    module: str, told: tuple[int, int], known: tuple[int, int], folder: Path | None
) -> tuple[int, int]:
    """The sizes of a layer that our own file knows, if the tensors do not say otherwise."""
    d_in, d_out = told
    if (d_in or known[0], d_out or known[1]) != known:
        raise AdapterFileError(
            "The sizes of a layer are others than its tensors say.",
            file=folder and folder / OWN,
            key=module,
            expected=f"{d_in or 'd_in'} → {d_out or 'd_out'}",
            got=f"{known[0]} → {known[1]}",
        )
    return known


def check_shapes(
    variant: Variant,
    config: AdapterConfig,
    info: LayerInfo,
    keys: Mapping[str, str],
    tensors: TensorSource,
    file: Path | None,
) -> None:
    """Compares the tensors of a layer with what its sizes and the configuration ask for.

    Args:
        variant: The variant.
        config: The configuration, as the file has it.
        info: The layer.
        keys: Key → name in the file, of the tensors that it has.
        tensors: The file's tensors.
        file: The weights file, for messages.

    Raises:
        AdapterFileError: There is one too many or too few, or one has another shape.
    """
    specs = variant.tensor_specs(config, info)
    for key in sorted(keys.keys() ^ {spec.key for spec in specs.values()}):
        # Which tensors there are can depend on the sizes.
        raise AdapterFileError(
            "A tensor is not one that its layer has." if key in keys else "A tensor is missing.",
            file=file,
            key=f"{peft.PREFIX}{info.name}.{key}",
            fix="is it the right base model, and the right adapter_config.json?",
        )
    for spec in specs.values():
        name = keys[spec.key]
        got = tensors.shape(name)
        if not _agrees(spec.shape, got):
            rank = (
                f", rank {config.rank_of(info.name)}" if isinstance(config, LowRankConfig) else ""
            )
            raise AdapterFileError(
                "A tensor has another shape than its layer and configuration ask for.",
                file=file,
                key=name,
                expected=f"{list(spec.shape)} (layer {info.d_in} → {info.d_out}{rank})",
                got=list(got),
                fix="is it the right base model, and the right adapter_config.json?",
            )


def check_shared(
    variant: Variant,
    config: AdapterConfig,
    infos: Sequence[LayerInfo],
    tensors: TensorSource,
    file: Path | None,
) -> None:
    """Compares what the layers share with what their sizes and the configuration ask for.

    Args:
        variant: The variant.
        config: The configuration, as the file has it.
        infos: All layers of the adapter.
        tensors: The file's tensors.
        file: The weights file, for messages.

    Raises:
        AdapterFileError: One of the tensors has another shape.
    """
    for spec in variant.shared_specs(config, infos).values():
        got = tensors.shape(spec.key)
        if not _agrees(spec.shape, got):
            raise AdapterFileError(
                "A tensor that the layers share has another shape than they and the "
                "configuration ask for.",
                file=file,
                key=spec.key,
                expected=[size or "any" for size in spec.shape],
                got=list(got),
                fix="is it the right base model, and the right adapter_config.json?",
            )


def _check_dtype(tensors: TensorSource, name: str, file: Path | None) -> None:
    if not tensors.dtype(name).is_floating_point:
        raise AdapterFileError(
            "A tensor does not hold floating-point numbers.",
            file=file,
            key=name,
            expected="float32, float16, bfloat16 or float64",
            got=str(tensors.dtype(name)).removeprefix("torch."),
        )


def sized(
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

    Raises:
        AdapterFileError: One is missing, or no sizes fit them all.
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


# Tensors without values ----------------------------------------------------------------------


def bare(infos: Iterable[LayerInfo], device: str = "cpu") -> list[BaseLayer]:
    """Layers without a model: sizes, and a device."""
    holder = nn.Module()
    holder.register_buffer("none", torch.empty(0, device=device))
    return [BaseLayer(holder, info) for info in infos]


def shared_outline(
    config: AdapterConfig, file_config: AdapterConfig, infos: Iterable[LayerInfo]
) -> Mapping[str, Tensor]:
    """What the layers share, without the values: tensor name → tensor on the meta device."""
    variant, layers = variant_of(config), list(infos)
    specs = variant.shared_specs(file_config, layers)
    made = {n: torch.empty(s.shape, device="meta") for n, s in specs.items()}
    return made or variant.shared_tensors(config, bare(layers, device="meta"))


def outline(
    config: AdapterConfig,
    info: LayerInfo,
    keys: Mapping[str, str],
    tensors: TensorSource,
    shared: Mapping[str, Tensor],
) -> FileState:
    """One layer without the values: a state whose tensors are on the meta device.

    Args:
        config: The adapter's configuration.
        info: The layer.
        keys: Key → name in the file, of its tensors.
        tensors: The file's tensors.
        shared: What :func:`shared_outline` gives.
    """
    new = blank_tensors(config, info, keys, tensors)
    return FileState(config, info, {**shared, **dict(new.trainable), **dict(new.frozen)})


def blank_tensors(
    config: AdapterConfig, info: LayerInfo, keys: Mapping[str, str], tensors: TensorSource
) -> NewTensors:
    """The variant's own tensors on one layer without their values, trainable and frozen ones."""
    blank = {key: torch.empty(tensors.shape(name), device="meta") for key, name in keys.items()}
    return variant_of(config).from_file(config, info, blank)
