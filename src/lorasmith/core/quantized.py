"""Quantised layers: what their weight is, and what adapters must know of them.

One table, :data:`KINDS`. A kind is told by the names of classes and by attributes, so no
library is imported that the model has not brought along. What it says:

=================  ========================================  ======  ========  =========
kind               layer                                     read W  write W   gradient
=================  ========================================  ======  ========  =========
bnb-4bit           bitsandbytes ``Linear4bit`` (nf4, fp4)    yes     yes       yes
bnb-8bit           bitsandbytes ``Linear8bitLt``             yes     yes       yes
torchao            ``nn.Linear`` with a torchao tensor       yes     some      asked once
gptq               ``QuantLinear`` of 2, 4 or 8 bits, in     yes     no        yes
                   the published layout
awq                ``WQLinear_GEMM`` and its like, 4 bits    yes     no        yes
gguf               Transformers' ``GgufLinear``              yes     no        no
dequantize         whatever has a method of that name        yes     no        unknown
=================  ========================================  ======  ========  =========

"Gradient" is whether the layer hands a gradient on to its input. Where it does not, all
adapters below it would train on nothing, in silence: see :func:`refuse_gradless`.

bitsandbytes on CPUs with AVX512-BF16 repacks a 4-bit weight for its inference kernel the
first time the layer runs in eval mode; from then on the layer gives no gradient, even in
training. While adapters are attached this is switched off, and what has been repacked is
unpacked (same values): see :func:`prepare`.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.errors import AttachError, ConfigError, FuseError

__all__ = [
    "KINDS",
    "QuantizedKind",
    "dequantize",
    "describe_kind",
    "is_quantized",
    "keep",
    "kind_of",
    "numel",
    "passes_gradient",
    "pointers",
    "prepare",
    "put_back",
    "refuse_gradless",
    "release",
    "requantize_",
    "sizes_of",
    "storage",
]


@dataclass(frozen=True)
class QuantizedKind:
    """How layers of one library are read and written.

    Attributes:
        name: Name in messages and reports.
        matches: Whether a module is of this kind.
        read: W [d_out, d_in], a copy. Raises an ``AttachError`` where it cannot.
        write: Quantises W with the layer's own settings and puts it in; ``None`` where
            that cannot be done.
        label: The format in a word, for reports: ``"nf4"``.
        gradient: Whether the layer hands a gradient on to its input.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[Any], Tensor]
    write: Callable[[Any, Tensor], None] | None
    label: Callable[[Any], str]
    gradient: Callable[[Any], bool]


def _is_a(value: object, name: str, package: str) -> bool:
    """Whether one of the value's classes has that name and is of that package."""
    classes = (c for c in type(value).__mro__ if c.__name__ == name)
    return any(c.__module__.partition(".")[0] == package for c in classes)


def _library(name: str) -> Any:
    """A module of the library that the layer comes from, so it is there."""
    return importlib.import_module(name)


# bitsandbytes, 4 bits ------------------------------------------------------------------------


def _packed_for_cpu(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _state_4bit(module: Any) -> Any:
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undoes the repacking for CPUs without a change to either argument.

    The scales stay as the repacking has left them (rounded to bfloat16, no longer
    quantised themselves), so that the weight is the one that the layer has been using.
    """
    found = copy.copy(state)
    scales = state.absmax
    # Else it would quantise the scales again, or leave them in the kernel's order.
    found.original_nested = False
    codes, found = _library("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(
        data, found
    )
    found.absmax = scales.T.reshape(-1).to(torch.float32)
    return codes, found


def _read_4bit(module: Any) -> Tensor:
    state, data = _state_4bit(module), module.weight.data
    if state is None:
        if data.is_floating_point() and data.dim() == 2:
            copied: Tensor = data.clone()  # not yet quantised: that happens when it is moved
            return copied
        raise AttachError(
            "A 4-bit layer of bitsandbytes has lost its scales.",
            expected="weight.quant_state",
            fix="load the base model again",
        )
    if _packed_for_cpu(state):
        data, state = _unpacked(data, state)
    value: Tensor = _library("bitsandbytes.functional").dequantize_4bit(data.view(-1, 1), state)
    return value


def _write_4bit(module: Any, value: Tensor) -> None:
    old, state = module.weight, _state_4bit(module)
    dtype = torch.float32 if state is None else state.dtype
    if _packed_for_cpu(state):
        dtype = state.original_dtype
    new = (
        _library("bitsandbytes.nn")
        .Params4bit(
            value.to(dtype).contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        .to(old.device)
    )
    module._parameters["weight"] = new
    module.quant_state = new.quant_state


def _label_4bit(module: Any) -> str:
    return str(getattr(module.weight, "quant_type", "4 bit"))


# bitsandbytes, 8 bits ------------------------------------------------------------------------


def _state_8bit(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """(codes, scales of the rows): on the weight until the first forward, then in ``state``."""
    weight = module.weight
    if getattr(weight, "CB", None) is not None:
        return weight.CB, weight.SCB
    return module.state.CB, module.state.SCB


def _read_8bit(module: Any) -> Tensor:
    codes, scales = _state_8bit(module)
    data = module.weight.data
    if data.is_floating_point():  # has_fp16_weights, or not yet quantised
        copied: Tensor = data.clone()
        return copied
    if codes is None or scales is None:
        raise AttachError(
            "An 8-bit layer of bitsandbytes has lost its scales.",
            expected="weight.SCB or state.SCB",
            fix="load the base model again",
        )
    value: Tensor = codes.to(torch.float32) * (scales.to(torch.float32) / 127.0)[:, None]
    return value


def _write_8bit(module: Any, value: Tensor) -> None:
    params = _library("bitsandbytes.nn").Int8Params
    old = module.weight
    if old.data.is_floating_point():
        module._parameters["weight"] = params(
            value.to(old.dtype).contiguous(),
            requires_grad=old.requires_grad,
            has_fp16_weights=old.has_fp16_weights,
        )
        return
    # The library's own rounding takes float16 alone.
    codes, scales, _ = _library("bitsandbytes.functional").int8_vectorwise_quant(
        value.to(old.device, torch.float16).contiguous()
    )
    new = params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    module._parameters["weight"] = new
    module.state.CB = module.state.SCB = None


# torchao -------------------------------------------------------------------------------------


def _is_torchao(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return any(c.__module__.partition(".")[0] == "torchao" for c in type(weight).__mro__)


def _read_torchao(module: Any) -> Tensor:
    weight = module.weight.detach()
    # Not every format of torchao's has the method that its base class promises.
    try:
        value: Tensor = weight.dequantize()
    except NotImplementedError:
        value = _by_identity(weight)
    return value


def _by_identity(weight: Tensor) -> Tensor:
    """W from what the layer makes of unit vectors, some at a time."""
    d_in = weight.shape[1]
    block = max(1, 2**22 // max(1, d_in))
    rows = []
    for start in range(0, d_in, block):
        size = min(block, d_in - start)
        unit = torch.zeros(size, d_in, dtype=weight.dtype, device=weight.device)
        unit[:, start : start + size].fill_diagonal_(1)
        rows.append(F.linear(unit, weight))
    return torch.cat(rows).T.contiguous()


def _mapping(zeros: Tensor | None) -> Any:
    """torchao's name for whether codes are symmetric about 0."""
    kinds = _library("torchao.quantization.quant_primitives").MappingType
    return kinds.ASYMMETRIC if zeros is not None and bool(zeros.any()) else kinds.SYMMETRIC


def _write_torchao(module: Any, value: Tensor) -> None:
    old = module.weight.detach()
    value = value.to(old.dtype).contiguous()
    name = type(old).__name__
    if name == "Int8Tensor" and old.act_pre_scale is None and old.act_quant_scale is None:
        kinds = _library("torchao.quantization.granularity")
        rows, columns = old.block_size
        granularity = kinds.PerGroup(columns)
        if columns == old.shape[1]:
            whole = rows == old.shape[0] and rows > 1
            granularity = kinds.PerTensor() if whole else kinds.PerRow()
        new = type(old).from_hp(
            value,
            granularity,
            mapping_type=_mapping(old.zero_point),
            act_quant_kwargs=old.act_quant_kwargs,
            reduce_range=old.reduce_range,
        )
    elif name == "IntxUnpackedToInt8Tensor" and not old.zero_point.is_floating_point():
        settings = {
            "hp_tensor": value,
            "block_size": tuple(old.block_size),
            "target_dtype": old.target_dtype,
            "activation_quantization": old.activation_quantization,
        }
        # torchao's scales make room for one step more than the codes have, so that fresh
        # ones can be further off than the old, where W has changed little.
        fresh = type(old).from_hp(mapping_type=_mapping(old.zero_point), **settings)
        same = type(old).from_hp(
            intx_choose_qparams_algorithm=None,
            custom_scale=old.scale,
            custom_zero_point=old.zero_point,
            **settings,
        )
        new = min(fresh, same, key=lambda t: float((t.dequantize() - value).norm()))
    else:
        raise FuseError(
            f"A torchao weight of type {name} cannot be quantised anew with its own settings.",
            expected="Int8Tensor or IntxUnpackedToInt8Tensor",
            got=name,
            fix="keep the adapter attached, or fuse it into the full-precision model and "
            "quantise that",
        )
    module._parameters["weight"] = nn.Parameter(new, requires_grad=False)


def _label_torchao(module: Any) -> str:
    return f"torchao {type(module.weight).__name__}"


_GRADIENTS: dict[tuple[str, ...], bool] = {}


def _gradient_torchao(module: Any) -> bool:
    """Asked of the layer itself, once a format: torchao's answer differs by format."""
    weight = module.weight.detach()
    if weight.device.type == "meta":
        return True
    settings = ("act_quant_kwargs", "activation_quantization", "act_mapping_type")
    key = (
        type(weight).__name__,
        str(weight.dtype),
        weight.device.type,
        *(repr(getattr(weight, s, None)) for s in settings),
    )
    if key not in _GRADIENTS:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
            x.requires_grad_(True)
            try:
                torch.autograd.backward(F.linear(x, weight).sum())
            except (RuntimeError, NotImplementedError):
                x.grad = None
        _GRADIENTS[key] = x.grad is not None
    return _GRADIENTS[key]


# GPTQ and AWQ --------------------------------------------------------------------------------

#: Classes that keep GPTQ's published layout. The others (Marlin, ExLlama, …) shuffle the
#: codes for their kernels, each in its own way.
_GPTQ = frozenset({"TorchQuantLinear", "TritonV2QuantLinear", "QuantLinear"})
_GPTQ_FILES = frozenset({"qlinear_cuda", "qlinear_cuda_old", "qlinear_triton", "qlinear_tritonv2"})
_AWQ = frozenset({"WQLinear_GEMM", "AwqTorchQuantLinear", "AwqGEMMQuantLinear"})
#: Where the eight 4-bit codes of an AWQ word stand: code i at position _AWQ_ORDER[i].
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def _is_packed(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, n, None), Tensor) for n in ("qweight", "scales"))


def _is_awq(module: nn.Module) -> bool:
    return _is_packed(module) and type(module).__name__ in _AWQ


def _is_gptq(module: nn.Module) -> bool:
    return _is_packed(module) and not _is_awq(module) and hasattr(module, "qzeros")


def _codes(words: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned codes from 32-bit words, the lowest bits first, along ``dim``."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = -1
    spread = words.to(torch.int32).unsqueeze(dim + 1) >> shifts.view(shape)
    found: Tensor = spread & (2**bits - 1)
    return found.flatten(dim, dim + 1)


def _read_gptq(module: Any) -> Tensor:
    kind, file = type(module).__name__, type(module).__module__.rpartition(".")[2]
    if kind not in _GPTQ or (kind == "QuantLinear" and file not in _GPTQ_FILES):
        raise AttachError(
            f"The GPTQ kernel {kind} stores its weight in an order of its own.",
            expected="GPTQ's published layout: " + ", ".join(sorted(_GPTQ)),
            got=f"{type(module).__module__}.{kind}",
            fix='load the model with the backend "torch" or "triton"',
        )
    bits = int(getattr(module, "bits", 4))
    if bits not in (2, 4, 8) or module.qweight.dtype != torch.int32:
        raise AttachError(
            "GPTQ weights of that width cannot be read.",
            expected="2, 4 or 8 bits in 32-bit words",
            got=f"{bits} bits in {module.qweight.dtype}",
        )
    scales = module.scales.to(torch.float32)  # [groups, d_out]
    codes = _codes(module.qweight, bits, 0)  # [d_in, d_out]
    zeros = _codes(module.qzeros, bits, 1)[:, : scales.shape[1]]
    version = getattr(module, "qzero_format", None)
    # Format 1 stores zero − 1, and so do all layers that know of no formats.
    if (version() if callable(version) else 1) == 1:
        zeros = (zeros + 1) & (2**bits - 1)
    d_in = codes.shape[0]
    group = getattr(module, "g_idx", None)
    if not isinstance(group, Tensor) or group.numel() == 0:
        size = -(-d_in // scales.shape[0])
        group = torch.arange(d_in, device=codes.device) // size
    index = group.to(torch.long)[:d_in]
    value: Tensor = (codes - zeros[index]).to(torch.float32) * scales[index]
    return value.T.contiguous()


def _read_awq(module: Any) -> Tensor:
    scales = module.scales.to(torch.float32)
    codes, zeros = _codes(module.qweight, 4, 1), _codes(module.qzeros, 4, 1)
    columns = torch.arange(codes.shape[1], device=codes.device).view(-1, 8)
    columns = columns[:, list(_AWQ_ORDER)].reshape(-1)
    size = codes.shape[0] // scales.shape[0]
    codes, zeros = codes[:, columns], zeros[:, columns].repeat_interleave(size, dim=0)
    spread = scales.repeat_interleave(size, dim=0)
    value: Tensor = (codes - zeros).to(torch.float32) * spread
    return value.T.contiguous()


def _bits(module: Any) -> str:
    return f"{getattr(module, 'bits', getattr(module, 'w_bit', 4))} bit"


def _trains(module: Any) -> bool:
    """What the layers of GPTQModel say of themselves; others are taken at their word."""
    return bool(getattr(module, "SUPPORTS_TRAINING", True))


# GGUF blocks, and what can dequantise itself -------------------------------------------------


def _read_gguf(module: Any) -> Tensor:
    unpack = _library("transformers.integrations.gguf.dequant").dequantize
    value: Tensor = unpack(module.weight.data, module.ggml_type, torch.float32)
    value = value.reshape(module.out_features, module.in_features)
    order = module.input_permutation
    if order is None:
        return value
    # It computes W x[order], so column j of W belongs to x[order[j]].
    placed = torch.empty_like(value)
    placed[:, order] = value
    return placed


def _own_method(module: nn.Module) -> Callable[[], Tensor] | None:
    """A ``dequantize`` of the layer (HQQ) or of its weight (Quanto)."""
    for owner in (module, module._parameters.get("weight")):
        # Every tensor has the method; what counts is that a subclass has one of its own.
        classes = [c for c in type(owner).__mro__ if c.__module__.partition(".")[0] != "torch"]
        if any("dequantize" in c.__dict__ for c in classes):
            return owner.dequantize  # type: ignore[union-attr, return-value]
    return None


def _read_own(module: Any) -> Tensor:
    method = _own_method(module)
    assert method is not None
    value: Any = method()
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
        raise AttachError(
            f"{type(module).__name__}.dequantize() does not give a matrix.",
            expected="a floating-point tensor [d_out, d_in]",
            got=type(value).__name__,
        )
    return value.detach()


#: All kinds; the first that matches counts.
KINDS: tuple[QuantizedKind, ...] = (
    QuantizedKind(
        "bnb-4bit",
        lambda m: _is_a(m, "Linear4bit", "bitsandbytes"),
        _read_4bit,
        _write_4bit,
        _label_4bit,
        lambda m: not _packed_for_cpu(_state_4bit(m)),
    ),
    QuantizedKind(
        "bnb-8bit",
        lambda m: _is_a(m, "Linear8bitLt", "bitsandbytes"),
        _read_8bit,
        _write_8bit,
        lambda _: "int8 (bitsandbytes)",
        lambda _: True,
    ),
    QuantizedKind(
        "torchao", _is_torchao, _read_torchao, _write_torchao, _label_torchao, _gradient_torchao
    ),
    QuantizedKind("awq", _is_awq, _read_awq, None, lambda m: f"AWQ {_bits(m)}", _trains),
    QuantizedKind("gptq", _is_gptq, _read_gptq, None, lambda m: f"GPTQ {_bits(m)}", _trains),
    QuantizedKind(
        "gguf",
        lambda m: _is_a(m, "GgufLinear", "transformers"),
        _read_gguf,
        None,
        lambda m: f"GGUF type {int(m.ggml_type)}",
        lambda _: False,
    ),
    QuantizedKind(
        "dequantize",
        lambda m: _own_method(m) is not None,
        _read_own,
        None,
        lambda m: type(m).__name__,
        lambda _: True,
    ),
)


def kind_of(module: nn.Module) -> QuantizedKind | None:
    """The kind of a quantised layer, or ``None`` if it is none that we know."""
    return next((k for k in KINDS if k.matches(module)), None)


def describe_kind(module: nn.Module) -> str:
    """Its format in a word, for reports: ``"nf4"``."""
    kind = kind_of(module)
    return type(module).__name__ if kind is None else kind.label(module)


def dequantize(module: nn.Module, name: str) -> Tensor:
    """W [d_out, d_in] of a quantised layer: a copy, in the dtype that the library unpacks to.

    Args:
        module: The layer.
        name: Its name, for messages.

    Raises:
        AttachError: If the layer is of no kind that we know, or without values (meta).
    """
    kind = kind_of(module)
    if kind is None:
        weight = getattr(module, "weight", None)
        raise AttachError(
            f"The weight of {name} cannot be read as a plain matrix.",
            expected="a floating-point weight [d_out, d_in], or a quantised layer of a known kind ("
            + ", ".join(k.name for k in KINDS)
            + ")",
            got=f"{type(module).__name__} with {type(weight).__name__}",
            fix="use a variant that does not read W, such as LoRA with init='kaiming'",
            key=name,
        )
    if any(t.is_meta for t in storage(module)):
        raise AttachError(
            f"The quantised weight of {name} has no values yet.",
            expected="a layer with values",
            got="the meta device",
            fix="load the base model first",
            key=name,
        )
    with torch.no_grad():
        try:
            return kind.read(module)
        except AttachError as error:
            raise AttachError(
                error.what, expected=error.expected, got=error.got, fix=error.fix, key=name
            ) from error


def requantize_(module: nn.Module, name: str, value: Tensor) -> None:
    """Quantises W [d_out, d_in] with the layer's own settings and puts it in.

    The old storage is replaced, not overwritten: :func:`keep` and :func:`put_back` bring it
    back bit for bit.

    Raises:
        FuseError: If the layer's settings came from data (GPTQ, AWQ) or are not known.
    """
    kind = kind_of(module)
    if kind is None or kind.write is None:
        raise FuseError(
            f"The quantised weight of {name} cannot be written with its own settings.",
            expected="a layer of bitsandbytes or torchao",
            got=type(module).__name__ if kind is None else kind.name,
            fix="keep the adapter attached, or fuse it into the full-precision model and "
            "quantise that",
            key=name,
        )
    with torch.no_grad():
        kind.write(module, value)


# The stored tensors --------------------------------------------------------------------------


def pointers(tensor: Tensor) -> tuple[int, ...]:
    """Where a tensor's values are; those of a wrapper subclass are in several places."""
    names = _inner_names(tensor)
    if not names:
        return (tensor.data_ptr(),)
    return tuple(p for n in names for p in pointers(getattr(tensor, n)))


def _inner_names(tensor: Tensor) -> list[str]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, nn.Parameter):
        return []
    names: list[str] = flatten()[0]
    return names


def storage(module: nn.Module) -> list[Tensor]:
    """The tensors in which a quantised layer keeps its weight: they change when W does."""
    found: list[Tensor] = []
    for name in ("weight", "qweight", "qzeros", "scales", "g_idx", "W_q"):
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            inner = _inner_names(value)
            found += [getattr(value, n) for n in inner] if inner else [value]
    for owner in (getattr(module, "weight", None), getattr(module, "state", None)):
        for name in ("CB", "SCB"):
            value = getattr(owner, name, None)
            if isinstance(value, Tensor):
                found.append(value)
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    scales = getattr(state, "absmax", None)
    if isinstance(scales, Tensor):
        found.append(scales)
    return found


_PLACES = ("CB", "SCB")


def keep(module: nn.Module) -> dict[str, Tensor]:
    """The layer's storage, to be put back later; the objects themselves, no copies."""
    kept: dict[str, Tensor] = {}
    weight = module._parameters.get("weight")
    if weight is not None:
        kept["weight"] = weight
        for place in _PLACES:
            value = getattr(weight, place, None)
            if isinstance(value, Tensor):
                kept[f"weight.{place}"] = value
    state = getattr(module, "state", None)
    for place in _PLACES:
        value = getattr(state, place, None)
        if isinstance(value, Tensor):
            kept[f"state.{place}"] = value
    return kept


def put_back(module: Any, kept: dict[str, Tensor]) -> None:
    """The inverse of :func:`keep`, after :func:`requantize_`; follows the layer's device."""
    weight: Any = kept.get("weight")
    if weight is None:
        return
    device = next((t.device for t in storage(module)), weight.device)
    moved = weight.device != device
    if moved:
        weight = weight.to(device)
    module._parameters["weight"] = weight
    if _is_a(module, "Linear4bit", "bitsandbytes"):
        module.quant_state = weight.quant_state
    if _is_a(module, "Linear8bitLt", "bitsandbytes"):
        for place in _PLACES:
            for owner, key in ((weight, "weight"), (module.state, "state")):
                value = kept.get(f"{key}.{place}")
                setattr(owner, place, value if value is None else value.to(device))


def numel(model: nn.Module) -> int:
    """Values of all parameters, a quantised layer counted as the matrix it stands for."""
    count = 0
    seen: set[int] = set()
    for module in model.modules():
        quantised, sizes = is_quantized(module), sizes_of(module)
        if quantised and sizes is not None:
            count += sizes[0] * sizes[1]
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not (quantised and name == "weight"):
                seen.add(id(parameter))
                count += parameter.numel()
    return count


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) as a linear-like layer says them itself, or ``None``."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = tuple(getattr(module, n, None) for n in names)
        if all(type(s) is int for s in sizes):
            return sizes  # type: ignore[return-value]
    return None


# Training ------------------------------------------------------------------------------------


def _quantised(root: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedKind]]:
    for name, module in root.named_modules():
        # Adapter modules have sizes of their own kind, never these attributes.
        if sizes_of(module) is not None and (kind := kind_of(module)) is not None:
            yield name, module, kind


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantised layer of a kind that we know."""
    return sizes_of(module) is not None and kind_of(module) is not None


def passes_gradient(module: nn.Module) -> bool:
    """Whether a layer hands a gradient on to its input (unknown kinds are taken to)."""
    kind = kind_of(module)
    return kind is None or kind.gradient(module)


def refuse_gradless(root: nn.Module) -> None:
    """Raises a ``ConfigError`` if a layer of the model keeps the gradient from its input.

    All layers are looked at, adapted or not: one such layer in the middle leaves every
    adapter below it without part of its gradient, and nothing says so.
    """
    blocked = [
        (name, module, kind)
        for name, module, kind in _quantised(root)
        # What bitsandbytes has repacked is unpacked by ``prepare``.
        if kind.name != "bnb-4bit" and not kind.gradient(module)
    ]
    if not blocked:
        return
    name, module, kind = blocked[0]
    raise ConfigError(
        f"{len(blocked)} quantised layers ({kind.label(module)}) pass no gradient to their "
        "input, so adapters in the layers before them would train on nothing.",
        expected="a base that can be trained through: bitsandbytes nf4, fp4 or int8, torchao "
        "int8 or int4 weight-only without quantised activations",
        got=f"e.g. {name}",
        fix="load the base in another format to train; an adapter that is trained already "
        "can be loaded onto this one",
        key="quantize",
    )


_PREPARED = "_lorasmith_quantised"


def prepare(root: nn.Module) -> None:
    """Makes a quantised base ready for adapters; :func:`release` takes it back.

    Keeps bitsandbytes from repacking 4-bit weights into a form without a gradient, and lets
    Transformers' Trainer accept the model.
    """
    if _PREPARED in root.__dict__:
        return
    flags: dict[str, bool] = {}
    root.__dict__[_PREPARED] = flags  # first, so that ``release`` undoes half of it, too
    for name, module, kind in _quantised(root):
        if kind.name == "bnb-4bit":
            layer: Any = module
            flag = layer.__dict__.get("support_avx512bf16_for_cpu")
            if flag is not None:
                flags[name] = flag
                layer.support_avx512bf16_for_cpu = False
            state = _state_4bit(layer)
            if _packed_for_cpu(state):
                layer.weight.data, state = _unpacked(layer.weight.data, state)
                layer.weight.quant_state = layer.quant_state = state
    marked = _mark(root)
    if not (flags or marked):
        del root.__dict__[_PREPARED]


def release(root: nn.Module) -> None:
    """Undoes :func:`prepare` when the last adapter has gone."""
    flags = root.__dict__.pop(_PREPARED, None)
    if flags is None:
        return
    for name, flag in flags.items():
        layer: Any = root.get_submodule(name)
        layer.support_avx512bf16_for_cpu = flag
    _unmark(root)


# Trainer refuses a quantised model unless HF PEFT's marks are on it, or its quantiser says
# that the model can be trained as it is. PEFT's mark (``_hf_peft_config_loaded``) changes
# what ``save_pretrained`` writes and makes it look for PEFT's layers, so it would be a lie
# with consequences. What the quantiser says of training is asked by that one check alone.
# It says so through properties of its class; hence a subclass, put on while adapters are
# attached.

_ACCEPTING: dict[type, type] = {}


def _remake(plain: type) -> Any:
    return object.__new__(_accepting(plain))


def _reduce(self: Any, _protocol: int) -> Any:
    # A class made at run time cannot be pickled by name.
    return _remake, (type(self).__mro__[1],), dict(self.__dict__)


def _accepting(plain: type) -> type:
    if plain not in _ACCEPTING:
        _ACCEPTING[plain] = type(
            plain.__name__,
            (plain,),
            {
                "__module__": plain.__module__,
                "__doc__": "Trained through adapters of lorasmith.",
                "__reduce_ex__": _reduce,
                "is_trainable": True,
                "is_qat_trainable": True,
            },
        )
    return _ACCEPTING[plain]


def _mark(root: nn.Module) -> bool:
    quantizer = root.__dict__.get("hf_quantizer")
    plain = type(quantizer)
    if quantizer is None or plain in _ACCEPTING.values():
        return False
    # Where a layer keeps the gradient back, Trainer is right to refuse.
    if not all(kind.gradient(module) for _, module, kind in _quantised(root)):
        return False
    quantizer.__class__ = _accepting(plain)
    return True


def _unmark(root: nn.Module) -> None:
    quantizer = root.__dict__.get("hf_quantizer")
    if type(quantizer) in _ACCEPTING.values():
        quantizer.__class__ = type(quantizer).__mro__[1]
