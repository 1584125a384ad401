"""Fusing an adapter into the base weights, and taking it out again exactly.

Written once for all variants: a variant says which weight acts like the adapted layer
(``effective_weight``), this file computes it in higher precision than the base stores,
writes it, measures what was lost to rounding, and keeps the original. W + ΔW − ΔW is not
W in floating point, so undoing by subtraction would not do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import activate, get_adapter, state_of, unwrap
from lorasmith.core.layers import (
    device_of,
    keep_weight,
    put_weight_back,
    read_bias,
    read_weight,
    write_bias,
    write_weight,
)
from lorasmith.core.lowrank import no_autocast
from lorasmith.core.mixing import Blend, Mix, Plan, Rows, describe, names_in, plan_of
from lorasmith.core.quantized import describe_kind, pointers
from lorasmith.core.state import AdapterSlot, LayerAdapter, slots
from lorasmith.errors import FuseError

__all__ = [
    "FuseReport",
    "FusedLayer",
    "fuse",
    "fused_name",
    "fused_plan",
    "refuse_shared",
    "unfuse",
]


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
        adapter: Name of the adapter, or the mix in words.
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


def fused_plan(model: nn.Module) -> Plan:
    """What is in the base weights at the moment: an adapter's name, a mix, or ``None``."""
    return next((slot.fused for _, _, slot in slots(model) if slot.fused is not None), None)


def fused_name(model: nn.Module) -> str | None:
    """What is in the base weights at the moment, in words, if anything."""
    plan = fused_plan(model)
    return None if plan is None else describe(plan)


def fuse(
    model: nn.Module,
    name: str | Mapping[str, float] | None = None,
    *,
    keep_original: bool = True,
) -> FuseReport:
    """Writes an adapter, or a mix of several, into the base weights: the layers run bare.

    Computed in float64 for a float32 base and in float32 for a 16-bit one, then rounded
    once. Copies made by ``modules_to_save`` keep standing in for their modules.

    Args:
        model: The model.
        name: Which adapter, or name → weight for W + Σ w_i (W_i − W) as in
            :func:`~lorasmith.use`; by default what is active.
        keep_original: Whether to keep the original weights, which :func:`unfuse` and
            :func:`~lorasmith.detach` need. Costs the adapted weights a second time.

    Returns:
        How large the change was and what rounding did to it, layer by layer.

    Raises:
        FuseError: If an adapter is fused already, each row of the batch has its own, the
            variant or a layer cannot be fused, or a weight is shared with a module that has
            no adapter. The model is unchanged then.
    """
    root = unwrap(model)
    plan = _plan(root, name)
    already = fused_name(root)
    if already is not None:
        raise FuseError(
            f"The adapter {already!r} is fused already; fusing twice would apply it twice.",
            fix="unfuse(model) first",
        )
    work = [(n, m, s, part) for n, m, s in slots(root) if (part := _part(s, plan)) is not None]
    for module_name, module, *_ in work:
        _refuse_computed(module_name, module)
    refuse_shared(root, {n for n, *_ in work})
    done: list[tuple[nn.Module, AdapterSlot]] = []
    records = []
    try:
        with torch.no_grad():
            for module_name, module, slot, part in work:
                originals = keep_weight(module, slot.info)
                bias = read_bias(module)
                if bias is not None:
                    originals["bias"] = bias.clone()
                slot.originals = originals
                done.append((module, slot))
                with no_autocast(device_of(module)):
                    records.append(_fuse_layer(module_name, module, slot, part))
    except BaseException:
        for module, slot in done:
            _write_back(module, slot)
        raise
    state = state_of(root)
    assert state is not None
    # All of it, so that the copies of ``modules_to_save`` are this adapter's too.
    activate(root, state, plan)
    for _, _, slot in slots(root):
        slot.set_live(())
    for _, _, slot, _ in work:
        slot.fused = plan
        if not keep_original:
            slot.originals = {}
    dtypes = sorted({_stored_as(m, s) for _, m, s, _ in work})
    _warn_of_requantising([(m, s) for _, m, s, _ in work], records)
    return FuseReport(describe(plan), ", ".join(dtypes), tuple(records))


#: Share of the change that requantising may lose before a warning says so.
_LOST = 0.1


def _stored_as(module: nn.Module, slot: AdapterSlot) -> str:
    if slot.info.kind == "opaque":
        return describe_kind(module)
    return str(read_weight(module, slot.info).dtype).removeprefix("torch.")


def _warn_of_requantising(
    work: Sequence[tuple[nn.Module, AdapterSlot]], records: Sequence[FusedLayer]
) -> None:
    """Says what the coarse steps of quantised weights have left of the change."""
    names = {slot.info.name for _, slot in work if slot.info.kind == "opaque"}
    lost = [r for r in records if r.name in names and r.rounding_error > _LOST]
    if lost:
        worst = max(lost, key=lambda r: r.rounding_error)
        warnings.warn(
            f"Quantising the fused weights again has distorted the adapter's change in "
            f"{len(lost)} of {len(names)} quantised layers, by {worst.rounding_error:.0%} of its "
            f"norm in {worst.name} (see the report's rounding_error). unfuse(model) takes it "
            "back exactly; to keep the adapter whole, leave it attached, or fuse it into the "
            "full-precision model.",
            UserWarning,
            stacklevel=3,
        )


def _plan(root: nn.Module, name: str | Mapping[str, float] | None) -> str | Mix:
    """What is to be fused."""
    state = state_of(root)
    plan: Plan
    if name is None and state is not None and isinstance(state.active, Mix | Rows):
        plan = state.active
    elif name is not None and not isinstance(name, str):
        plan = plan_of(name)
    else:
        plan = get_adapter(root, name).name
    if isinstance(plan, Rows):
        raise FuseError(
            "Each row of the batch has its own adapter; a weight has room for one.",
            expected="the name of an adapter, or name → weight",
            got=describe(plan),
            fix="fuse(model, name)",
        )
    for each in names_in(plan):
        get_adapter(root, each)
    if plan is None:
        raise FuseError("A mix of no adapter cannot be fused.", expected="name → weight")
    return plan


def _part(slot: AdapterSlot, plan: str | Mix) -> LayerAdapter | None:
    """What acts on one layer: an adapter, or what can be asked the same questions."""
    if isinstance(plan, str):
        return slot.get(plan)
    found = [(slot.get(n), w) for n, w in plan.weights]
    parts = [(part, w) for part, w in found if part is not None]
    return cast("LayerAdapter", Blend(parts)) if parts else None


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
            owners.setdefault(pointers(weight)[0], []).append(module_name)
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
    put_weight_back(module, slot.info, slot.originals)
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
    plan, state = fused_plan(root), state_of(root)
    if plan is None or state is None:
        raise FuseError("No adapter is fused.", fix="fuse(model) first")
    work = [(m, s) for _, m, s in slots(root) if s.fused is not None]
    if any(not slot.originals for _, slot in work):
        raise FuseError(
            f"The adapter {describe(plan)!r} was fused with keep_original=False.",
            fix="detach(model, keep_fused=True) leaves it in; or load the base model again",
        )
    with torch.no_grad():
        for module, slot in work:
            _write_back(module, slot)
    activate(root, state, plan)
