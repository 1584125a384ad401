"""DoRA: weight-decomposed low-rank adaptation.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353),
equations 5 and 11; semantics of PEFT 0.21.2.

    V = W + s B A,   c_i = ‖V_i‖,   y = (m / c) ∘ (V x) + b

    x [d_in]     input          A [r, d_in], B [d_out, r]   trainable
    y [d_out]    output         m [d_out]                   trainable magnitude of each row
    W, b         frozen         c [d_out]                   norms, a constant in the backward
                                                            pass (section 4.3 of the paper)

Identity at t = 0: B = 0 (or B A − B0 A0 = 0) and m_i = ‖W_i‖, so m / c = 1.

No d_out × d_in matrix is formed. The norms follow from r-wide products,

    c_i² = ‖W_i‖² + Σ_k B_ik (2 s W Aᵀ + s² B A Aᵀ)_ik ,

with ‖W_i‖² kept between calls, in float32 whatever the base's dtype. Where c_i² falls
below 0.01 ‖W_i‖² the sum cancels; on CPU those rows are computed densely. Elsewhere (and
under ``torch.compile``), where asking would stall the device, c_i² is kept above
1e-6 ‖W_i‖²; a row that short has lost two digits. While no gradient is needed, the norms
are kept (on CPU) until A, B or W change.

Deviations from the paper and PEFT: the paper writes the magnitude of W [d, k] as one number
for each column (m [1, k]); PEFT, and we, take it of each output of the layer. Dropout
acts on the low-rank path alone (PEFT also drops the base path's input, which would make
the frozen layer noisy). A zero row of W has no direction and stays zero (PEFT: NaN).

Needs W (its rows' norms): a quantised layer is dequantised anew whenever the norms are.
Fuses exactly up to rounding.

Files: PEFT's ``LORA`` with ``use_dora``; m is ``lora_magnitude_vector``, the rest as in
``lora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.adapters.lora import LoRA, LoRAConfig, low_rank_fields, scaling
from lorasmith.core import lowrank
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo
from lorasmith.core.variant import (
    Affine,
    BaseLayer,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    WeightUse,
)

__all__ = ["DoRA", "DoRAConfig"]

#: Below this share of ‖W_i‖², c_i² has lost two of float32's seven digits.
_CANCELLED = 0.01
_FLOOR = 1e-6
#: Elements of W that are widened at a time: on a device, and on CPU (what its cache holds).
_BLOCK = (2**24, 2**17)


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """Configuration of DoRA; the fields are those of ``LoRAConfig``."""

    variant: ClassVar[str] = "dora"


def factored_squared_norms(
    squared: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float
) -> Tensor:
    """Squared norms of the rows of W + s B A without forming it.

    Args:
        squared: ‖W_i‖² [d_out].
        weight: W [d_out, d_in], in any floating dtype.
        A: [r, d_in].
        B: [d_out, r].
        s: Scaling.

    Returns:
        [d_out], in the dtype of A; may be slightly negative where it cancels.
    """
    inner = _wide_product(weight, A).mul_(2 * s).addmm_(B, A @ A.T, alpha=s * s)
    return squared + (B * inner).sum(dim=1)


def _wide_product(weight: Tensor, A: Tensor) -> Tensor:
    """W Aᵀ [d_out, r] in the dtype of A; a 16-bit W is widened block by block, never whole."""
    if weight.dtype == A.dtype or torch.compiler.is_compiling():
        return torch.mm(weight.to(A.dtype), A.T)
    rows = max(1, _BLOCK[weight.device.type == "cpu"] // weight.shape[1])
    return torch.cat([torch.mm(part.to(A.dtype), A.T) for part in torch.split(weight, rows)])


class _Rescale(torch.autograd.Function):
    """(y, h, B, m) → (m / c) ∘ (y − b + s h Bᵀ) + b for the base layer's output y."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        B: Tensor,
        B0: Tensor | None,
        m: Tensor,
        norms: Tensor,
        bias: Tensor | None,
        s: float,
        owned: bool,
    ) -> Tensor:
        b = (B if B0 is None else torch.cat((B, -B0), dim=1)).to(y.dtype)
        flat_h = h.reshape(-1, h.shape[-1]).to(y.dtype)
        u = (
            y.detach()
            if owned and y.is_contiguous()
            else y.clone(memory_format=torch.contiguous_format)
        )
        flat = u.view(-1, u.shape[-1])
        if bias is not None:
            flat.sub_(bias.to(y.dtype))
        flat.addmm_(flat_h, b.T, alpha=s)
        inverse = _inverse(norms)
        gain = (m * inverse).to(y.dtype)
        out = u * gain if bias is None else torch.addcmul(bias.to(y.dtype), u, gain)
        saved_u = flat if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(
            saved_u, flat_h if ctx.needs_input_grad[2] else None, b, gain, inverse
        )
        ctx.s, ctx.rank = s, B.shape[1]
        ctx.h_shape, ctx.h_dtype, ctx.b_dtype = h.shape, h.dtype, B.dtype
        return out

    # Of a gradient that takes c for a constant there is no second derivative worth having:
    # an error rather than a number.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u, h, b, gain, inverse = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        g_m = g_h = g_b = g_bias = None
        if ctx.needs_input_grad[4]:
            g_m = lowrank.column_dot(flat, u, inverse.dtype) * inverse
        g_u = flat * gain
        if ctx.needs_input_grad[1]:
            g_h = (g_u @ b).mul_(ctx.s).view(ctx.h_shape).to(ctx.h_dtype)
        if ctx.needs_input_grad[2]:
            g_b = (g_u.T @ h[:, : ctx.rank]).to(ctx.b_dtype).mul_(ctx.s)
        if ctx.needs_input_grad[6]:  # the user trains the bias as well; y holds it once
            g_bias = (flat * (1 - gain)).sum(dim=0)
        return g_u.view(g.shape), g_h, g_b, None, g_m, None, g_bias, None, None


def _fingerprint(factor: Tensor) -> tuple[float, float]:
    """Changes whenever the values do, for all that training can do to them."""
    return float(factor.sum()), float(torch.linalg.vector_norm(factor))


def _wide(weight: Tensor) -> torch.dtype:
    """The dtype in which norms are computed: float32, or float64 for a float64 base."""
    return torch.promote_types(weight.dtype, torch.float32)


def _inverse(norms: Tensor) -> Tensor:
    """1 / c, and 0 where c is 0."""
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


class DoRA(LoRA):
    """y = (m / ‖W + s B A‖) ∘ ((W + s B A) x) + b."""

    name = "dora"
    config_class = DoRAConfig
    formula = "y = m / ‖W + s B A‖ ∘ (W + s B A) x"

    def weight_use(self, config: LoRAConfig) -> WeightUse:
        return "always"

    def new_tensors(self, base: BaseLayer, config: LoRAConfig) -> NewTensors:
        low_rank = super().new_tensors(base, config)
        weight = base.weight
        if config.initialisation.corrects and "B0" not in low_rank.frozen:
            tensors = {**low_rank.frozen, **low_rank.trainable}
            s = config.scaling_of(base.info.name)
            weight = weight.to(_wide(weight)) + s * tensors["B"] @ tensors["A"]
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=_wide(weight)).to(torch.float32)
        return NewTensors({**low_rank.trainable, "magnitude": norms}, low_rank.frozen)

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        norms = self._norms(state, base)
        B, m, s, bias = state["B"], state["magnitude"], scaling(state), base.bias
        B0 = state["B0"] if "B0" in state else None
        owned = owns_output(base.module, base)
        if lowrank.fast(y):
            out: Tensor = _Rescale.apply(y, carry, B, B0, m, norms, bias, s, owned)  # type: ignore[no-untyped-call]
            return out
        gain = (m * _inverse(norms)).to(y.dtype)
        if bias is None:
            return lowrank.up(y, carry, B, s, B0=B0, owned=owned) * gain
        bias = bias.to(y.dtype)
        return torch.addcmul(bias, lowrank.up(y - bias, carry, B, s, B0=B0, owned=True), gain)

    def _norms(self, state: LayerState, base: BaseLayer) -> Tensor:
        """c [d_out], a constant as far as autograd is concerned."""
        A, B = (t.detach() for t in self.factors(state).stacked())
        compiling = lowrank.plain(A)
        cache: dict[str, Any] = {} if compiling else getattr(state, "cache", {})
        # Only while no gradient is wanted, and only on CPU: versions prove nothing, since
        # some optimisers and averaging tools write ``parameter.data`` without telling
        # autograd, and to look at the values (cheap beside W Aᵀ) would stall a device.
        keep = not (torch.is_grad_enabled() or compiling) and A.device.type == "cpu"
        key = (base.weight_version, *map(_fingerprint, (A, B))) if keep else None
        if keep and cache.get("key") == key:
            norms: Tensor = cache["norms"]
            return norms
        weight = base.weight  # of a quantised layer a copy, so only where it is needed
        with torch.no_grad(), lowrank.no_autocast(weight):
            version = None if compiling else base.weight_version
            squared = self._squared(weight, version, cache)
            s = scaling(state)
            sums = factored_squared_norms(squared, weight, A, B, s)
            if not compiling and sums.device.type == "cpu":
                short = sums < _CANCELLED * squared
                if bool(short.any()):
                    rows = weight[short].to(A.dtype).addmm_(B[short], A, alpha=s)
                    sums[short] = rows.square().sum(dim=1)
            else:
                sums = torch.maximum(sums, _FLOOR * squared)
            norms = sums.sqrt()
        if keep:
            cache.update(key=key, norms=norms)
        else:
            cache.pop("key", None)
        return norms

    @staticmethod
    def _squared(weight: Tensor, version: tuple[int, ...] | None, cache: dict[str, Any]) -> Tensor:
        """‖W_i‖² [d_out] in float32 (or float64), kept while W stays the same."""
        wide = _wide(weight)
        if version is not None and cache.get("weight_key") == version:
            kept: Tensor = cache["squared"]
            return kept
        squared: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        if version is not None:
            cache.update(weight_key=version, squared=squared)
        return squared

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        direction = super().effective_weight(state, weight)
        norms = torch.linalg.vector_norm(direction, dim=1)
        gain = state["magnitude"].detach().to(weight.dtype) * _inverse(norms)
        return gain[:, None] * direction

    def factors(self, state: LayerState) -> Factors:
        low_rank = super().factors(state)
        return Factors(
            low_rank.A, low_rank.B, low_rank.scaling, low_rank.A0, low_rank.B0, exact=False
        )

    def affine(self, state: LayerState, base: BaseLayer) -> Affine | None:
        config: LoRAConfig = state.config  # type: ignore[assignment]
        if state.training and config.dropout:
            return None
        low_rank, m = self.factors(state), state["magnitude"]
        gain = m * _inverse(self._norms(state, base)).to(m.dtype)
        shift = None if base.bias is None else base.bias.to(m.dtype) * (1 - gain)
        return Affine(*low_rank.stacked(), low_rank.scaling, gain=gain, shift=shift)

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: LoRAConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(config, info), "magnitude": (info.d_out,)}

    def tensor_specs(self, config: LoRAConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        magnitude = TensorSpec("lora_magnitude_vector", (info.d_out,))
        return {**super().tensor_specs(config, info), "magnitude": magnitude}

    def to_peft(self, config: LoRAConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {**super().to_peft(config, modules), "use_dora": True}

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> DoRAConfig | None:
        if fields.get("peft_type") != self.peft_type or not fields.get("use_dora"):
            return None
        return DoRAConfig(**low_rank_fields(fields), **common)
