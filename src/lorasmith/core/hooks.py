"""The two forward hooks through which adapters act.

Plain functions that find everything on the module they are called with, so a hooked
model can be copied, pickled and compiled like any other. What ``before`` computes for
``after`` travels on the input tensor itself (the hooks of one call share nothing else),
which keeps the engine free of state between calls, hence safe under threads, recursion
and exceptions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorasmith.core.lowrank import fast
from lorasmith.core.state import SAVED, SLOT, AdapterSlot, SavedModule
from lorasmith.core.variant import BaseLayer
from lorasmith.errors import AttachError

__all__ = ["CARRY", "install", "install_saved", "owns_output", "uninstall", "uninstall_saved"]

#: Attribute of a layer's input under which ``before`` hands over to ``after``.
CARRY = "_lorasmith_carry"
#: Names under which linear-like layers take their input as a keyword.
_INPUT_NAMES = ("input", "x", "hidden_states")


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any], slot: AdapterSlot) -> Tensor:
    if args:
        found = args[0]
    elif len(kwargs) == 1:
        found = next(iter(kwargs.values()))
    else:
        found = next((kwargs[n] for n in _INPUT_NAMES if n in kwargs), None)
    if not isinstance(found, Tensor):
        raise AttachError(
            f"{slot.info.name} was called without a tensor that could be its input.",
            expected="the input as first positional argument or as input=, x= or hidden_states=",
            got=f"{len(args)} positional arguments and keywords {sorted(kwargs)}",
            key=slot.info.name,
        )
    return found


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (new, *args[1:]), kwargs
    return args, {k: new if v is old else v for k, v in kwargs.items()}


def _alone(module: nn.Module) -> bool:
    """Whether no hook but ours can see or replace what goes into and out of the layer.

    A hook that replaces the input, or a full backward hook, would lose what ``before_layer``
    hands over; one that keeps the output, or a gradient, must not see it change.
    """
    return not (
        len(module._forward_hooks) > 1
        or len(module._forward_pre_hooks) > 1
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # Accelerate's offloading, for one, wraps it
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _early(module: nn.Module, slot: AdapterSlot, x: Tensor) -> bool:
    """Whether ``before`` must, or had better, run before the base layer."""
    return slot.transforms_input or (fast(x) and _alone(module))


def before_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: the live adapters act on the layer's input."""
    slot: AdapterSlot = module._modules[SLOT]  # type: ignore[assignment]
    live = slot.live
    if not live:
        plan = slot.plan
        if plan is None or not plan.transforms_input:
            return None
        old = _input_of(args, kwargs, slot)
        x = plan.before(BaseLayer(module, slot.info), old)
        return None if x is old else _with_input(args, kwargs, old, x)
    x = old = _input_of(args, kwargs, slot)
    if not _early(module, slot, x):
        return None
    base = BaseLayer(module, slot.info)
    carries = []
    for adapter in live:
        x, carry = adapter.variant.before(adapter, x, base)
        carries.append(carry)
    if any(carry is not None for carry in carries):
        if x is old:
            # A tensor of our own to write on: the caller's may feed several layers.
            x = x.view_as(x)
        setattr(x, CARRY, carries)
    return None if x is old else _with_input(args, kwargs, old, x)


def after_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
    """Forward hook: the live adapters act on the layer's output."""
    slot: AdapterSlot = module._modules[SLOT]  # type: ignore[assignment]
    live, plan = slot.live, slot.plan
    if not live and plan is None:
        return None
    base = BaseLayer(module, slot.info)
    x = _input_of(args, kwargs, slot)
    if plan is not None:

        def run(other: Tensor) -> Tensor:
            new_args, new_kwargs = _with_input(args, kwargs, x, other)
            result: Tensor = module.forward(*new_args, **new_kwargs)
            return result

        return plan.after(base, x, output, run)
    y: Tensor = output
    if not _early(module, slot, x):
        for adapter in live:
            _, carry = adapter.variant.before(adapter, x, base)
            y = adapter.variant.after(adapter, y, carry, base)
        return y
    carries = None if torch.compiler.is_compiling() else x.__dict__.pop(CARRY, None)
    for adapter, carry in zip(live, carries or [None] * len(live), strict=True):
        y = adapter.variant.after(adapter, y, carry, base)
    return y


def owns_output(module: nn.Module, base: BaseLayer) -> bool:
    """Whether the layer's output (and its input's gradient) has no reader but us."""
    return base.info.fresh_output and _alone(module)


def replace_output(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of ``modules_to_save``: the live copy's output stands in."""
    saved: SavedModule = module._modules[SAVED]  # type: ignore[assignment]
    if saved.plan is not None:
        copies = {n: copy for n in saved.names() if (copy := saved.get(n)) is not None}
        return saved.plan.output(copies, output, args, kwargs, _run_copy)
    copy = None if saved.live is None else saved.get(saved.live)
    if copy is None:
        return None
    result = _run_copy(copy, args, kwargs)
    if isinstance(result, Tensor) and isinstance(output, Tensor):
        return result.to(output.dtype)
    return result


def _run_copy(copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a copy in the dtype of its own parameters."""
    mine = next((p.dtype for p in copy.parameters() if p.is_floating_point()), None)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and mine is not None:
            return value.to(mine)
        return value

    return copy(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})


def install(module: nn.Module, slot: AdapterSlot) -> None:
    """Puts a slot and its hooks on a layer."""
    module.add_module(SLOT, slot)
    module.register_forward_pre_hook(before_layer, with_kwargs=True)
    slot.last_hook = module.register_forward_hook(after_layer, with_kwargs=True).id


def uninstall(module: nn.Module) -> None:
    """Takes slot and hooks off a layer again."""
    _drop_hooks(module, before_layer, after_layer)
    del module._modules[SLOT]


def install_saved(module: nn.Module, saved: SavedModule) -> None:
    """Puts trainable copies and their hook on a module."""
    module.add_module(SAVED, saved)
    saved.last_hook = module.register_forward_hook(replace_output, with_kwargs=True).id


def uninstall_saved(module: nn.Module) -> None:
    """Takes trainable copies and their hook off a module again."""
    _drop_hooks(module, replace_output)
    del module._modules[SAVED]


def _drop_hooks(module: nn.Module, *functions: Any) -> None:
    # By identity of the function: handles would be a second thing to keep, copy and
    # pickle, and would point at the original after ``copy.deepcopy``.
    for hooks, extra in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (
            module._forward_hooks,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
    ):
        for key in [k for k, f in hooks.items() if f in functions]:
            handle = RemovableHandle(hooks, extra_dict=list(extra))
            handle.id = key
            handle.remove()
