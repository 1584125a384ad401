"""Where the tensors of attached adapters live: one slot on each adapted layer.

A slot is a child module of the layer, so that ``model.to``, ``parameters``,
``state_dict``, ``copy.deepcopy``, pickling, DDP and FSDP see adapter tensors as they see
any other. No module of the model is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorasmith.core.config import AdapterConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.lowrank import Siblings
from lorasmith.core.variant import NewTensors, Variant

if TYPE_CHECKING:
    from lorasmith.core.mixing import LayerMix, LayerRows, Plan, SavedPlan

__all__ = [
    "SAVED",
    "SLOT",
    "AdapterSlot",
    "LayerAdapter",
    "SavedModule",
    "SharedTensors",
    "saved_modules",
    "slot_of",
    "slots",
]

#: Attribute under which a layer carries its slot.
SLOT = "lorasmith"
#: Attribute under which a module carries its trainable copies (``modules_to_save``).
SAVED = "lorasmith_saved"


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``fn`` does to a tensor's device, but not to its dtype."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype == tensor.dtype or not tensor.is_floating_point():
            return moved
        if moved.is_meta or tensor.is_meta:
            return moved.to(tensor.dtype)
        # Not ``moved.to(float32)``: the digits would already be lost.
        return tensor.to(device=moved.device)

    return apply


class SharedTensors(nn.Module):
    """Frozen tensors that all layers of one adapter share (VeRA's random matrices).

    A child of the slot of the adapter's first layer, so that the model moves, copies and
    pickles it once; the layers' adapters point to it.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, _master(value))
        #: Scratch for :meth:`cast`; never saved or copied.
        self._casts: dict[Any, tuple[Tensor, tuple[int, int], Tensor]] = {}

    def cast(self, tensor: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One of them on a device and in a dtype, kept until it changes."""
        value = self[tensor]
        if value.is_inference() or (value.device, value.dtype) == (device, dtype):
            return value.to(device, dtype)
        key, stamp = (tensor, device, dtype), (value.data_ptr(), value._version)
        kept = self._casts.get(key)
        if kept is None or kept[0] is not value or kept[1] != stamp:
            # Tensors made in inference mode could not be used where x has a gradient.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._casts[key] = value, stamp, value.to(device, dtype)
        return kept[2]

    def __getitem__(self, tensor: str) -> Tensor:
        value = self._buffers[tensor]
        assert value is not None
        return value

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._buffers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_casts": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedTensors:
        self._casts.clear()
        super()._apply(_keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class LayerAdapter(nn.Module):
    """One adapter's tensors on one layer; satisfies ``core.variant.LayerState``.

    Floating-point tensors stay float32 (or float64 if they were made so) when the model
    is cast: in bfloat16 an AdamW step of 1e-4 on a gain of 1.0 rounds to nothing, so a
    bfloat16 adapter would silently not train. Devices follow the model.
    """

    def __init__(
        self,
        variant: Variant,
        config: AdapterConfig,
        info: LayerInfo,
        tensors: NewTensors,
        shared: SharedTensors | None = None,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.config = config
        self.info = info
        self.constants = variant.constants(config, info)
        for name, value in tensors.trainable.items():
            self.register_parameter(name, nn.Parameter(_master(value)))
        for name, value in tensors.frozen.items():
            self.register_buffer(name, _master(value))
        #: In a tuple, so that it is nobody's child: it would be moved and saved once a layer.
        self._shared = (shared,)
        #: Scratch for what a variant may keep between calls; never saved or copied.
        self.cache: dict[str, Any] = {}
        #: Adapters of neighbouring layers that products may be shared with.
        self.siblings: Siblings | None = None

    @property
    def shared(self) -> SharedTensors | None:
        """What all layers of the adapter share, if there is anything."""
        return self._shared[0]

    def __getitem__(self, tensor: str) -> Tensor:
        value: Tensor | None = self._parameters.get(tensor)
        if value is None:
            value = self._buffers.get(tensor)
        if value is None and self._shared[0] is not None:
            value = self._shared[0][tensor]
        if value is None:
            raise KeyError(tensor)
        return value

    def __contains__(self, tensor: object) -> bool:
        shared = self._shared[0]
        mine = tensor in self._parameters or tensor in self._buffers
        return mine or (shared is not None and tensor in shared)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of its own, trainable ones first."""
        yield from self.named_parameters()
        yield from self.named_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerAdapter:
        self.cache.clear()
        super()._apply(_keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{n}{list(t.shape)}" for n, t in self.tensors())
        return f"variant={self.variant.name}, {shapes}"


def _master(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)
    return value.clone(memory_format=torch.contiguous_format)


class _Hooked(nn.Module):
    """A child module that comes with hooks on its parent.

    PyTorch numbers hooks by process. In a model that was pickled in another one, the next
    hook a user registers could get the number of ours and replace it in silence.
    """

    def __init__(self) -> None:
        super().__init__()
        #: The highest number among the hooks of the parent that are ours.
        self.last_hook = -1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.last_hook + 1)


class AdapterSlot(_Hooked):
    """All adapters of one layer, and which of them act.

    Attributes:
        live: The adapters that act, in order. A plain tuple, replaced as a whole, so
            that switching rebuilds no module and a forward sees one consistent set.
        transforms_input: Whether one of them changes what the base layer sees.
        plan: The mix or rows that act where none is live.
        fused: What is in the base weights at the moment: an adapter or a mix.
    """

    def __init__(self, info: LayerInfo) -> None:
        super().__init__()
        self.info = info
        self.live: tuple[LayerAdapter, ...] = ()
        self.transforms_input = False
        self.plan: LayerMix | LayerRows | None = None
        self.fused: Plan = None
        self.originals: dict[str, Tensor] = {}

    # Names of users may collide with attributes of nn.Module ("train", "type"), so
    # they are never attributes themselves.
    @staticmethod
    def _key(name: str) -> str:
        return f"adapter_{name}"

    def get(self, name: str) -> LayerAdapter | None:
        """The adapter of that name, or ``None``."""
        found = self._modules.get(self._key(name))
        assert found is None or isinstance(found, LayerAdapter)
        return found

    def put(self, name: str, adapter: LayerAdapter, shared: SharedTensors | None = None) -> None:
        """Adds an adapter; it does not act until it is live.

        Args:
            name: Its name.
            adapter: Its tensors.
            shared: What its layers share, where this is the first of them.
        """
        self.add_module(self._key(name), adapter)
        if shared is not None:
            self.add_module(f"shared_{name}", shared)

    def remove(self, name: str) -> None:
        """Takes an adapter away."""
        gone = self._modules.pop(self._key(name))
        self._modules.pop(f"shared_{name}", None)
        if gone in self.live:
            self.set_live(a for a in self.live if a is not gone)

    def set_live(self, adapters: Iterable[LayerAdapter]) -> None:
        """Says which adapters act, in which order; no mix and no rows do then."""
        self.plan = None
        self.live = tuple(adapters)
        self.transforms_input = any(a.variant.transforms_input for a in self.live)

    def set_plan(self, plan: LayerMix | LayerRows | None) -> None:
        """Makes a mix or rows act, and no adapter beside them."""
        self.set_live(())
        self.plan = plan

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterSlot:
        if self.plan is not None:
            self.plan.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def names(self) -> tuple[str, ...]:
        """Names of the adapters on this layer."""
        keys = (key for key in self._modules if key.startswith("adapter_"))
        return tuple(key.removeprefix("adapter_") for key in keys)


class SavedModule(_Hooked):
    """Trainable copies of one module, one for each adapter (``modules_to_save``).

    The copy's output stands in for the module's. The module itself is not touched, so
    that switching the adapter off gives the base model back bit for bit.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        #: Name of the adapter whose copy acts, or ``None`` for the module itself.
        self.live: str | None = None
        #: The mix or rows that act where none is live.
        self.plan: SavedPlan | None = None

    _key = staticmethod(AdapterSlot._key)

    def get(self, name: str) -> nn.Module | None:
        """The copy that belongs to the adapter of that name, or ``None``."""
        return self._modules.get(self._key(name))

    def put(self, name: str, copy: nn.Module) -> None:
        """Adds a copy; it does not act until it is live."""
        self.add_module(self._key(name), copy)

    def remove(self, name: str) -> None:
        """Takes a copy away."""
        del self._modules[self._key(name)]
        if self.live == name:
            self.live = None

    def names(self) -> tuple[str, ...]:
        """Names of the adapters that have a copy."""
        return tuple(key.removeprefix("adapter_") for key in self._modules)


def slot_of(module: nn.Module) -> AdapterSlot | None:
    """The slot that a layer carries, or ``None``."""
    found = module._modules.get(SLOT)
    return found if isinstance(found, AdapterSlot) else None


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSlot]]:
    """(module name, layer, slot) of every adapted layer, in the model's order."""
    for name, module in model.named_modules():
        slot = slot_of(module)
        if slot is not None:
            yield name, module, slot


def saved_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, SavedModule]]:
    """(module name, module, its copies) of every module that is trained as a whole."""
    for name, module in model.named_modules():
        found = module._modules.get(SAVED)
        if isinstance(found, SavedModule):
            yield name, module, found
