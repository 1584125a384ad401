"""One view of every linear-like layer, whatever library it comes from.

Everywhere else in lorasmith a layer's weight is W [d_out, d_in] and acts as
``y = x Wᵀ + b``. GPT-2's ``Conv1D`` stores the transpose; quantised layers store
something else altogether. Only this file knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lorasmith.errors import AttachError

__all__ = [
    "LayerInfo",
    "describe",
    "device_of",
    "read_bias",
    "read_weight",
    "write_bias",
    "write_weight",
]

Kind = Literal["linear", "conv1d", "opaque"]


@dataclass(frozen=True)
class LayerInfo:
    """What an adapter must know of the layer it sits on.

    Attributes:
        name: Dotted name of the module in the model.
        d_in: Size of the last dimension of the layer's input.
        d_out: Size of the last dimension of its output.
        kind: ``"linear"`` (weight [d_out, d_in]), ``"conv1d"`` (weight [d_in, d_out])
            or ``"opaque"`` (the weight is quantised or otherwise not to be read as is).
        has_bias: Whether the layer adds a bias.
        fresh_output: Whether the forward is known to return a tensor that nothing else
            holds, so that the engine may add into it in place.
    """

    name: str
    d_in: int
    d_out: int
    kind: Kind
    has_bias: bool
    fresh_output: bool


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be imported to find out.
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def describe(module: nn.Module, name: str) -> LayerInfo | None:
    """The :class:`LayerInfo` of ``module``, or ``None`` if it is not linear-like.

    Linear-like is ``nn.Linear`` and what derives from it, Transformers' ``Conv1D``, and
    any other module that has integer ``in_features`` and ``out_features`` (the quantised
    layers of bitsandbytes, torchao, GPTQ, AWQ and their like).
    """
    has_bias = getattr(module, "bias", None) is not None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and is_lazy(weight):
        raise AttachError(
            f"{name} is lazy: its sizes are not known yet.",
            expected="a layer with a weight",
            got=type(module).__name__,
            fix="run the model once on an example before attaching",
            key=name,
        )
    if _is_conv1d(module):
        assert isinstance(weight, Tensor)
        d_in, d_out = weight.shape
        exact = type(module).__name__ == "Conv1D"
        return LayerInfo(name, d_in, d_out, "conv1d", has_bias, exact)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if type(sizes[0]) is not int or type(sizes[1]) is not int:
        return None
    d_in, d_out = sizes[0], sizes[1]
    plain = (
        isinstance(module, nn.Linear)
        and isinstance(weight, Tensor)
        and tuple(weight.shape) == (d_out, d_in)
        and weight.is_floating_point()
        and type(weight) in (Tensor, nn.Parameter)
    )
    exact = type(module).forward is nn.Linear.forward
    return LayerInfo(name, d_in, d_out, "linear" if plain else "opaque", has_bias, plain and exact)


def read_weight(module: nn.Module, info: LayerInfo) -> Tensor:
    """The layer's weight as W [d_out, d_in]: a view, no copy, in the stored dtype.

    Raises:
        AttachError: If the weight is quantised or otherwise cannot be read as it is.
    """
    weight = getattr(module, "weight", None)
    if info.kind == "opaque" or not isinstance(weight, Tensor):
        raise AttachError(
            f"The weight of {info.name} cannot be read as a plain matrix.",
            expected="a floating-point weight [d_out, d_in]",
            got=f"{type(module).__name__} with {type(weight).__name__}",
            fix="use a variant that does not read W, such as LoRA with init='kaiming'",
            key=info.name,
        )
    weight = weight.detach()
    return weight.T if info.kind == "conv1d" else weight


def write_weight(module: nn.Module, info: LayerInfo, value: Tensor) -> None:
    """Overwrites the stored weight in place with W [d_out, d_in], cast to its dtype."""
    read_weight(module, info).copy_(value)


def read_bias(module: nn.Module) -> Tensor | None:
    """The layer's bias [d_out], detached, or ``None``."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def write_bias(module: nn.Module, value: Tensor) -> None:
    """Overwrites the stored bias in place, cast to its dtype."""
    bias = module.bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.detach().copy_(value)


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's tensors are: quantised layers may hold buffers and no parameter."""
    tensors: Iterator[Tensor] = chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))
