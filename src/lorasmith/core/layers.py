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

from lorasmith.core import quantized
from lorasmith.errors import AttachError

__all__ = [
    "LayerInfo",
    "describe",
    "device_of",
    "keep_weight",
    "put_weight_back",
    "read_bias",
    "read_weight",
    "weight_version",
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
            or ``"opaque"`` (the weight is quantised or otherwise not to be read as is;
            ``core.quantized`` knows more).
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
    # Never from the shape of a weight that may be packed.
    sizes = quantized.sizes_of(module)
    if sizes is None:
        return None
    d_in, d_out = sizes
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
    """The layer's weight as W [d_out, d_in], detached.

    A view in the stored dtype where the weight is a plain matrix. A quantised weight is
    dequantised: a copy, as large as the matrix, that should not be held longer than needed.

    Raises:
        AttachError: If it cannot be read.
    """
    weight = getattr(module, "weight", None)
    if info.kind == "opaque" or not isinstance(weight, Tensor):
        return quantized.dequantize(module, info.name)
    weight = weight.detach()
    return weight.T if info.kind == "conv1d" else weight


def weight_version(module: nn.Module, info: LayerInfo) -> tuple[int, ...]:
    """Changes whenever W is replaced or written in place: a key for what is kept of it.

    Of a quantised layer, what identifies W is its storage: what it is dequantised to is
    another tensor every time, perhaps in the same place.
    """
    if info.kind != "opaque":
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.data_ptr(), weight._version
    return tuple(n for t in quantized.storage(module) for n in (t.data_ptr(), t._version))


def write_weight(module: nn.Module, info: LayerInfo, value: Tensor) -> None:
    """Stores W [d_out, d_in]: in place in the weight's dtype, or quantised anew.

    Raises:
        FuseError: If the layer is quantised with settings that cannot be applied again.
    """
    if info.kind == "opaque":
        quantized.requantize_(module, info.name, value)
    else:
        read_weight(module, info).copy_(value)


def keep_weight(module: nn.Module, info: LayerInfo) -> dict[str, Tensor]:
    """What :func:`put_weight_back` needs to bring the weight back bit for bit.

    A copy of a plain weight; of a quantised layer the stored tensors themselves, which
    :func:`write_weight` replaces.
    """
    if info.kind == "opaque":
        return quantized.keep(module)
    return {"weight": read_weight(module, info).clone()}


def put_weight_back(module: nn.Module, info: LayerInfo, kept: dict[str, Tensor]) -> None:
    """The inverse of :func:`keep_weight`."""
    if info.kind == "opaque":
        quantized.put_back(module, kept)
    else:
        write_weight(module, info, kept["weight"])


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
