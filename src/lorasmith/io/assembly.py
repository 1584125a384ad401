"""An adapter as the tensors and fields of its files: from a model, or from tensors by layer.

The tensors go through ``Variant.to_file``, the fields through
:func:`lorasmith.io.configuration.peft_fields`. What PEFT will ask for when it loads them is
written too, ours or not: it finds ``modules_to_save`` by the end of the name alone, and adds the
head of a task on its own accord. Modules that are not ours among them get the base's own values
(*padding*), which lorasmith leaves aside when it reads the file.

Values of a model are copied; tensors that are given are kept as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import Adapter
from lorasmith.core.config import AdapterConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.registry import variant_of
from lorasmith.core.state import SAVED, SLOT, LayerAdapter
from lorasmith.errors import AdapterFileError
from lorasmith.io import peft
from lorasmith.io.configuration import peft_fields
from lorasmith.io.layout import BLANK, FileState, bare, sized

__all__ = ["Files", "adopt", "of_model", "of_tensors"]


@dataclass(frozen=True)
class Files:
    """What an adapter's files hold.

    Attributes:
        fields: PEFT's ``adapter_config.json``.
        tensors: Name in the file → value.
        infos: Module name → layer.
        frozen: Names of the frozen tensors that each layer has of its own.
        padding: ``"<module>.<tensor>"`` of copies of base weights.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    infos: Mapping[str, LayerInfo]
    frozen: Collection[str]
    padding: Collection[str] = ()

    @property
    def conv1d(self) -> set[str]:
        """Layers that store their weight transposed."""
        return {m for m, info in self.infos.items() if info.kind == "conv1d"}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module name → (d_in, d_out)."""
        return {m: (info.d_in, info.d_out) for m, info in self.infos.items()}


def of_model(adapter: Adapter, copies: Mapping[str, nn.Module]) -> Files:
    """The files of an adapter on a model; every value is a copy.

    Warns if PEFT cannot load them.

    Args:
        adapter: The adapter.
        copies: Module name → what is saved of it as a whole.

    Raises:
        AdapterFileError: A tensor cannot be saved.
    """
    root, config = adapter.model, adapter.config
    parts: dict[str, LayerAdapter] = adapter.layers()
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
    padding = []
    for module in peft.replaced_modules((*copies, *implied), names):
        if module in parts:
            warnings.warn(
                f"PEFT cannot load this adapter: it takes {module!r} for one of "
                f"modules_to_save={list(copies)}, going by the end of the name, and there is "
                "an adapter on it. lorasmith can.",
                UserWarning,
                stacklevel=4,
            )
        elif module not in copies:
            for leaf, value in _own_state(root.get_submodule(module)).items():
                padding.append(f"{module}.{leaf}")
                tensors[f"{peft.PREFIX}{module}.{leaf}"] = _snapshot(value)
    infos = {m: part.info for m, part in parts.items()}
    tensors.update(_shared_tensors(config, infos, parts))
    fields = peft_fields(
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
    return Files(fields, tensors, infos, frozen, padding)


def of_tensors(
    config: AdapterConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
    layouts: Mapping[str, LayerInfo],
    task: str | None,
    base: str | None,
) -> Files:
    """The files of an adapter of which the tensors are given.

    Args:
        config: Its configuration; ranks must be those of the tensors.
        tensors: Module name → tensor name of the variant → value; at least one layer.
        shared: Tensor name → value of what all layers share; by default that of the first layer.
        extras: ``"<module>.<tensor>"`` → value of ``modules_to_save``.
        layouts: Module name → what is known of the layer.
        task: PEFT's ``task_type``.
        base: The name or path of the base model.

    Raises:
        AdapterFileError: Tensors are missing, or of a wrong shape.
    """
    variant = variant_of(config)
    infos: dict[str, LayerInfo] = {}
    own: dict[str, Any] = {}
    for module, values in tensors.items():
        infos[module] = info = sized(variant, config, module, values, layouts.get(module))
        own[module] = variant.shapes(config, info)
    places = variant.shared_specs(config, ())
    common = {*places, *variant.shared_tensors(config, bare([BLANK]))}
    frozen = {n for m, values in tensors.items() for n in values if n not in own[m]} - common
    flat: dict[str, Tensor] = {}
    for module, values in tensors.items():
        missing = [n for n in (*own[module], *sorted(frozen)) if n not in values]
        if missing:
            raise AdapterFileError("A tensor is missing.", key=f"{module}.{missing[0]}")
        state = FileState(config, infos[module], values)
        for suffix, value in variant.to_file(state).items():
            flat[f"{peft.PREFIX}{module}.{suffix}"] = value.detach().contiguous()
    given = {**next(iter(tensors.values())), **shared}
    for name, place in places.items():
        if name not in given:
            raise AdapterFileError("A tensor that the layers share is missing.", key=name)
        flat[place.key] = given[name].detach().contiguous()
    saved: list[str] = []
    for key, value in extras.items():
        flat[f"{peft.PREFIX}{key}"] = value.detach().contiguous()
        owner = peft.replaced_module(config.modules_to_save, key) or key.rpartition(".")[0]
        saved.append(owner)
    fields = peft_fields(
        variant,
        variant.file_config(config, frozen),
        infos,
        names=(),
        saved=list(dict.fromkeys(saved)),
        task=task,
        base=base,
    )
    return Files(fields, flat, infos, frozen)


def adopt(fields: dict[str, Any], known: Mapping[str, Any], *, targets: bool) -> None:
    """Takes over from another adapter's fields what holds of an adapter like it.

    Args:
        fields: ``adapter_config.json`` of the new one; changed.
        known: That of the other.
        targets: Whether both adapt the same layers, in the same kind of adapter: the names of its
            targets are then those of the new one.
    """
    fields["auto_mapping"] = known.get("auto_mapping")
    # What else narrows the layers is not taken over, so that short names would be too many.
    narrowed = any(known.get(k) for k in ("exclude_modules", "layers_to_transform"))
    if targets and not narrowed:
        for key in ("target_modules", "feedforward_modules"):
            if key in fields and key in known:
                fields[key] = known[key]


def _shared_tensors(
    config: AdapterConfig, infos: Mapping[str, LayerInfo], parts: Mapping[str, LayerAdapter]
) -> dict[str, Tensor]:
    """Name in the file → value of what the layers of an attached adapter share."""
    shared = next(part.shared for part in parts.values())
    if shared is None:
        return {}
    variant, layers = variant_of(config), list(infos.values())
    specs = variant.shared_specs(config, layers)
    if specs:
        return {spec.key: _snapshot(shared[name]) for name, spec in specs.items()}
    for name, value in variant.shared_tensors(config, bare(layers)).items():
        mine = shared[name]
        if not mine.is_meta and not torch.equal(mine.to(value.device), value):
            raise AdapterFileError(
                "What the layers share is not to be saved, and could not be made again: the "
                "adapter has other values than its configuration gives here.",
                key=name,
                fix="save these tensors as well (save_projection=True, with VeRA)",
            )
    return {}


def _snapshot(value: Tensor) -> Tensor:
    """A copy; of a DTensor all of it, in which every rank takes part."""
    gather = getattr(value, "full_tensor", None)
    if callable(gather):
        value = gather()
    return value.detach().clone(memory_format=torch.contiguous_format)


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without what adapters have put into it."""
    return {
        n: t
        for n, t in module.state_dict().items()
        if SLOT not in n.split(".") and SAVED not in n.split(".")
    }
