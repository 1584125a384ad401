"""Fusing an adapter into the base weights, and taking it out again exactly.

Written once for all variants: a variant says which weight acts like the adapted layer
(``effective_weight``), this file computes it in higher precision than the base stores,
writes it, measures what was lost to rounding, and keeps the original. W + ΔW − ΔW is not
W in floating point, so undoing by subtraction would not do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import activate, get_adapter, state_of, unwrap
from lorasmith.core.layers import read_bias, read_weight, write_bias, write_weight
from lorasmith.core.state import AdapterSlot, LayerAdapter, slots
from lorasmith.errors import FuseError

__all__ = ["FuseReport", "FusedLayer", "fuse", "fused_name", "refuse_shared", "unfuse"]


@dataclass(frozen=True)
class FusedLayer:
    """What fusing did to one layer.

    Attributes:
        name: Name of the module.
        delta_norm: Frobenius norm of the change of the weight.
        weight_norm: Frobenius norm of the weight before.
        rounding_error: Norm of what rounding to the base's dtype changed, relative to
            ``delta_norm`` (0 where nothing changed at all).
    """

    name: str
    delta_norm: float
    weight_norm: float
    rounding_error: float


@dataclass(frozen=True)
class FuseReport:
    """What fusing did to a model, layer by layer.

    Attributes:
        adapter: Name of the adapter.
        dtype: Storage dtype of the base weights.
        layers: One record a layer.
    """

    adapter: str
    dtype: str
    layers: tuple[FusedLayer, ...]

    @property
    def max_rounding_error(self) -> float:
        """The largest relative rounding error over all layers."""
        return max((layer.rounding_error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {**asdict(self), "max_rounding_error": self.max_rounding_error}

    def __str__(self) -> str:
        return (
            f"fused {self.adapter!r} into {len(self.layers)} layers ({self.dtype}), "
            f"rounding error at most {self.max_rounding_error:.2e} of the change"
        )


def fused_name(model: nn.Module) -> str | None:
    """Name of the adapter that is in the base weights at the moment, if any."""
    return next((slot.fused for _, _, slot in slots(model) if slot.fused is not None), None)


def fuse(model: nn.Module, name: str | None = None, *, keep_original: bool = True) -> FuseReport:
    """Writes an adapter into the base weights, so that the layers run bare.

    Computed in float64 for a float32 base and in float32 for a 16-bit one, then rounded
    once. Copies made by ``modules_to_save`` keep standing in for their modules.

    Args:
        model: The model.
        name: Which adapter; the active one by default.
        keep_original: Whether to keep the original weights, which :func:`unfuse` and
            :func:`~lorasmith.detach` need. Costs the adapted weights a second time.

    Returns:
        How large the change was and what rounding did to it, layer by layer.

    Raises:
        FuseError: If an adapter is fused already, the variant or a layer cannot be
            fused, or a weight is shared with a module that has no adapter. The model is
            unchanged then.
    """
    root = unwrap(model)
    adapter = get_adapter(root, name)
    already = fused_name(root)
    if already is not None:
        raise FuseError(
            f"The adapter {already!r} is fused already; fusing twice would apply it twice.",
            fix="unfuse(model) first",
        )
    work = [(n, m, s, part) for n, m, s in slots(root) if (part := s.get(adapter.name)) is not None]
    for module_name, module, *_ in work:
        _refuse_computed(module_name, module)
    refuse_shared(root, {n for n, *_ in work})
    done: list[tuple[nn.Module, AdapterSlot]] = []
    records = []
    try:
        with torch.no_grad():
            for module_name, module, slot, part in work:
                originals = {"weight": read_weight(module, slot.info).clone()}
                bias = read_bias(module)
                if bias is not None:
                    originals["bias"] = bias.clone()
                slot.originals = originals
                done.append((module, slot))
                records.append(_fuse_layer(module_name, module, slot, part))
    except BaseException:
        for module, slot in done:
            _write_back(module, slot)
        raise
    state = state_of(root)
    assert state is not None
    # All of it, so that the copies of ``modules_to_save`` are this adapter's too.
    activate(root, state, adapter.name)
    for _, _, slot in slots(root):
        slot.set_live(())
    for _, _, slot, _ in work:
        slot.fused = adapter.name
        if not keep_original:
            slot.originals = {}
    dtypes = sorted(
        {str(read_weight(m, s.info).dtype).removeprefix("torch.") for _, m, s, _ in work}
    )
    return FuseReport(adapter.name, ", ".join(dtypes), tuple(records))


def _refuse_computed(name: str, module: nn.Module) -> None:
    """Weight normalisation and its like compute the weight anew on every call."""
    for tensor in ("weight", "bias"):
        own = tensor in module._parameters or tensor in module._buffers
        if not own and isinstance(getattr(module, tensor, None), Tensor):
            raise FuseError(
                f"The {tensor} of {name} is computed from other parameters, so that what is "
                "written into it would be lost.",
                expected="a parameter",
                got="a parametrisation",
                fix="torch.nn.utils.parametrize.remove_parametrizations first",
                key=name,
            )


def refuse_shared(root: nn.Module, fused: set[str]) -> None:
    """Raises a ``FuseError`` if writing the weights of these modules would change others."""
    owners: dict[int, list[str]] = {}
    for module_name, module in root.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_meta:
            owners.setdefault(weight.data_ptr(), []).append(module_name)
    for names in owners.values():
        if len(names) > 1 and fused.intersection(names):
            raise FuseError(
                "A weight to be fused is shared with another module, which would change too.",
                got=" and ".join(names),
                fix="untie the weights first, or keep the adapter attached",
                key=names[0],
            )


def _fuse_layer(name: str, module: nn.Module, slot: AdapterSlot, part: LayerAdapter) -> FusedLayer:
    stored = read_weight(module, slot.info)
    wide = torch.float64 if stored.dtype in (torch.float32, torch.float64) else torch.float32
    weight = stored.to(wide)
    wanted = part.variant.effective_weight(part, weight)
    if not bool(torch.isfinite(wanted).all()):
        raise FuseError(
            f"Fusing into {name} gives a weight that is not finite.",
            fix="check the adapter: lorasmith info PATH",
            key=name,
        )
    write_weight(module, slot.info, wanted)
    bias = read_bias(module)
    if bias is not None:
        write_bias(module, part.variant.effective_bias(part, bias.to(wide)))
    change = _norm(wanted - weight)
    lost = _norm(read_weight(module, slot.info).to(wide) - wanted)
    return FusedLayer(name, change, _norm(weight), lost / change if change else 0.0)


def _norm(value: Tensor) -> float:
    # Accumulated in float64: float32 norms of large matrices are off in the 4th digit.
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _write_back(module: nn.Module, slot: AdapterSlot) -> None:
    write_weight(module, slot.info, slot.originals["weight"])
    if "bias" in slot.originals:
        write_bias(module, slot.originals["bias"])
    slot.originals = {}
    slot.fused = None


def unfuse(model: nn.Module) -> None:
    """Takes the fused adapter out again; the base weights return bit for bit.

    Raises:
        FuseError: If nothing is fused, or the original weights were not kept.
    """
    root = unwrap(model)
    name = fused_name(root)
    if name is None:
        raise FuseError("No adapter is fused.", fix="fuse(model) first")
    work = [(m, s) for _, m, s in slots(root) if s.fused is not None]
    if any(not slot.originals for _, slot in work):
        raise FuseError(
            f"The adapter {name!r} was fused with keep_original=False.",
            fix="detach(model, keep_fused=True) leaves it in; or load the base model again",
        )
    with torch.no_grad():
        for module, slot in work:
            _write_back(module, slot)
    for _, _, slot in slots(root):
        part = slot.get(name)
        slot.set_live(() if part is None else (part,))
