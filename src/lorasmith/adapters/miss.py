"""MiSS: all blocks of a row of W are moved by the same shard.

Source: Kang & Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-
Sharing Structure" (arXiv 2409.15371; first called Bone), section 4.2, equations 4 to 7, for
"balance", which is the paper's efficient form (MiSSᵉ); PEFT 0.21.2 for "mini" and "bat".

    y = W x + b + Dᵀ Σ_j x_j                     "balance"
    y_i = (W x + b)_i + Dᵀ Σ_j x_j               "mini", for each part y_i [q] of y
    y_o = (W x + b)_o + Σ_j (W_oj + I) D_o x_j   "bat"

    x [d_in]     input, cut into parts x_j [r]         D [r, d_out]          trainable
    y [d_out]    output                                D [r, q]              mini
    W, b         frozen                                D [d_out / r, r, r]   bat; W_oj [r, r]

The last part of x is filled up with zeros where r does not divide d_in. q is ``mini_r``,
which must divide d_out; "bat" needs an r that divides both sizes.

Identity at t = 0: D = 0.

"balance" and "mini" sum the parts of x first, so that what is left is one product of width
r (mini: q); nothing but that sum [r] is kept for the backward pass, neither x nor a weight.
"bat" forms its ΔW, one layer at a time, and keeps x and D.

``factors``: "balance" and "mini" are of rank r: A [r, d_in] is I repeated, B is Dᵀ (mini:
repeated). A is not trained. None where a file does not tell d_in; none for "bat".

Deviation from the paper: its other form (equation 3), in which neighbouring outputs share a
row of D, is not here, nor in PEFT. Deviations from PEFT: ``dropout`` acts on the input of
the update in all forms (PEFT: not with "bat"). PEFT does not adapt GPT-2's ``Conv1D``.

"balance" and "mini" do not read W: they work on quantised layers. "bat" reads it on every
forward. All fuse exactly up to rounding.

Files: PEFT's ``MISS``; D is ``miss_block``, the form its ``init_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.fields import refuse_trained_biases
from lorasmith.core import lowrank, recomputed
from lorasmith.core.config import AdapterConfig, check_count, check_probability
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    Carry,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
    WeightUse,
)
from lorasmith.errors import ConfigError

__all__ = ["MiSS", "MiSSConfig"]

_FORMS = ("balance", "mini", "bat")


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(AdapterConfig):
    """Configuration of MiSS.

    Args:
        r: Size of the parts of the input, the rank of the update.
        form: ``"balance"``, ``"mini"`` or ``"bat"`` (PEFT: ``init_weights``).
        mini_r: Size of the parts of the output with "mini".
        dropout: Probability of zeroing an element of the input of the update during
            training.
    """

    variant: ClassVar[str] = "miss"

    r: int = 64
    form: str = "balance"
    mini_r: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r")
        check_count(self.mini_r, "mini_r", "size")
        check_probability(self.dropout, "dropout")
        if self.form not in _FORMS:
            raise ConfigError(
                "form is not known.", expected=" or ".join(_FORMS), got=repr(self.form), key="form"
            )


def sum_of_parts(x: Tensor, r: int) -> Tensor:
    """Σ_j x_j [..., r] of x [..., d], the last part filled up with zeros."""
    over = -x.shape[-1] % r
    if over and lowrank.plain(x):
        x, over = F.pad(x, (0, over)), 0
    whole = x.shape[-1] - (r - over if over else 0)
    total = x[..., :whole].reshape(*x.shape[:-1], whole // r, r).sum(dim=-2)
    if over:
        # Without a padded copy of x.
        total = total + F.pad(x[..., whole:], (0, over))
    return total


def add_to_parts(y: Tensor, part: Tensor, owned: bool) -> Tensor:
    """y [..., d] with ``part`` [..., r] added to each of its parts, in place if ``owned``."""
    r, over = part.shape[-1], y.shape[-1] % part.shape[-1]
    out = y if owned and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
    whole = y.shape[-1] - over
    flat = out.detach().view(-1, y.shape[-1])
    part = part.reshape(-1, r)
    torch.unflatten(flat[:, :whole], 1, (whole // r, r)).add_(part[:, None, :])
    if over:
        flat[:, whole:].add_(part[:, :over])
    return out


class _SumOfParts(torch.autograd.Function):
    """x → (x, Σ_j (mask ∘ x)_j); takes the gradient of x from the base layer and adds to it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, r: int, through: bool, owned: bool
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.through, ctx.owned, ctx.shape, ctx.r = through, owned, x.shape, r
        h = sum_of_parts(x if mask is None else x * mask, r)
        return (x, h) if through else h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g_x, g_h = grads if ctx.through else (None, grads[0])
        (mask,) = ctx.saved_tensors
        if g_h is None or not ctx.needs_input_grad[0]:
            return g_x, None, None, None, None
        if g_x is not None and mask is None and not torch.is_grad_enabled():
            return add_to_parts(g_x, g_h, ctx.owned), None, None, None, None
        share = _repeat(g_h, ctx.shape[-1])
        if mask is not None:
            share = share * mask
        return (share if g_x is None else g_x + share), None, None, None, None


class _AddToParts(torch.autograd.Function):
    """(y, part) → y with ``part`` added to each of its parts."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, part: Tensor, owned: bool) -> Tensor:
        ctx.r = part.shape[-1]
        out = add_to_parts(y, part, owned)
        # Through ``detach``: see ``lowrank.add_product``.
        return out.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, sum_of_parts(g, ctx.r) if ctx.needs_input_grad[1] else None, None


def _repeat(part: Tensor, size: int) -> Tensor:
    """[..., r] → [..., size], over and over."""
    times = -(-size // part.shape[-1])
    return part.repeat(*(1 for _ in part.shape[:-1]), times)[..., :size]


def guided(x: Tensor, D: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x, ΔW [d_out, d_in]) of "bat", ΔW_oj = (W_oj + I) D_o, in the dtype of x."""
    r = D.shape[-1]
    rows, columns = weight.shape[0] // r, weight.shape[1] // r
    d = D.to(x.dtype)
    # W_o, all its blocks side by side below each other: one product of [r · columns, r].
    blocks = weight.to(x.dtype).reshape(rows, r * columns, r)
    delta = torch.bmm(blocks, d).view(rows, r, columns, r) + d[:, :, None, :]
    return x, delta.view(rows * r, columns * r)


class MiSS(Variant):
    """y = W x + b + Dᵀ Σ_j x_j, and its relatives."""

    name = "miss"
    config_class = MiSSConfig
    peft_type = "MISS"
    peft_fields = frozenset(
        "bias init_weights layers_pattern layers_to_transform mini_r miss_dropout r".split()
    )
    family = "shared shards"
    formula = "y = W x + Dᵀ Σ_j x_j over the parts x_j of x"

    def weight_use(self, config: MiSSConfig) -> WeightUse:
        return "always" if config.form == "bat" else "never"

    def adjust(self, config: MiSSConfig, bases: Sequence[BaseLayer]) -> MiSSConfig:
        for info in (base.info for base in bases):
            sizes = f"{info.d_in} → {info.d_out}"
            if config.form == "bat" and (info.d_in % config.r or info.d_out % config.r):
                raise ConfigError(
                    f'MiSS with form="bat" cuts W into blocks of {config.r}, which does not '
                    f"divide {info.name}.",
                    expected="an r that divides both sizes",
                    got=sizes,
                    fix="choose another r, exclude the layer, or form='balance'",
                    key="r",
                )
            if config.r > info.d_in:
                raise ConfigError(
                    f"r is larger than the input of {info.name}.",
                    expected=f"r <= {info.d_in}",
                    got=config.r,
                    key="r",
                )
            if config.form == "mini" and info.d_out % config.mini_r:
                raise ConfigError(
                    f"mini_r does not divide the output of {info.name}.",
                    expected=f"a divisor of {info.d_out}",
                    got=config.mini_r,
                    key="mini_r",
                )
        return config

    def new_tensors(self, base: BaseLayer, config: MiSSConfig) -> NewTensors:
        shape = self.shapes(config, base.info)["D"]
        return NewTensors({"D": torch.zeros(*shape, device=device_of(base.module))})

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        config: MiSSConfig = state.config  # type: ignore[assignment]
        kept = x.to(lowrank.compute_dtype(x))
        p = config.dropout if state.training else 0.0
        if config.form == "bat":
            return x, F.dropout(kept, p) if p else kept
        r = state["D"].shape[0]
        if lowrank.plain(x):
            return x, sum_of_parts(F.dropout(kept, p) if p else kept, r)
        mask, keep = lowrank.dropout_mask(kept, p) if p else (None, 1.0)
        if not lowrank.fast(x) or not x.requires_grad:
            h = sum_of_parts(kept if mask is None else kept * mask, r)
            return x, h if mask is None else h * (1.0 / keep)
        owned = owns_output(base.module, base)
        passed, h = _SumOfParts.apply(kept, mask, r, True, owned)  # type: ignore[no-untyped-call]
        return passed, h if mask is None else h * (1.0 / keep)

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        config: MiSSConfig = state.config  # type: ignore[assignment]
        owned = owns_output(base.module, base)
        D = state["D"]
        if config.form == "bat":
            weight = base.weight
            size = weight.numel()
            return recomputed.add(y, carry, guided, (D, weight), 1.0, size=size, owned=owned)
        if config.form == "balance":
            return lowrank.up(y, carry, D.T, 1.0, owned=owned)
        part = (carry @ D.to(carry.dtype)).to(y.dtype)
        if lowrank.plain(y):
            return y + _repeat(part, y.shape[-1])
        if torch.is_grad_enabled():
            out: Tensor = _AddToParts.apply(y, part, owned)  # type: ignore[no-untyped-call]
            return out
        return add_to_parts(y, part, owned)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        config: MiSSConfig = state.config  # type: ignore[assignment]
        D = state["D"].detach().to(weight.dtype)
        if config.form == "bat":
            return weight + guided(weight, D, weight)[1]
        shard = _repeat(D, weight.shape[0]).T
        return weight + _repeat(shard, weight.shape[1])

    def factors(self, state: LayerState) -> Factors | None:
        config: MiSSConfig = state.config  # type: ignore[assignment]
        info = state.info
        if config.form == "bat" or not info.d_in or not info.d_out:
            return None
        D = state["D"]
        identity = torch.eye(D.shape[0], dtype=D.dtype, device=D.device)
        return Factors(_repeat(identity, info.d_in), _repeat(D, info.d_out).T, 1.0)

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: MiSSConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        r = config.r
        if config.form == "bat":
            return {"D": (info.d_out // r, r, r)}
        return {"D": (r, config.mini_r if config.form == "mini" else info.d_out)}

    def tensor_specs(self, config: MiSSConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        return {"D": TensorSpec("miss_block", self.shapes(config, info)["D"])}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        shape = shapes["miss_block"]
        return 0, shape[0] * shape[1] if len(shape) == 3 else shape[1]

    def layer_sizes(
        self, config: MiSSConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        return (0, 0) if config.form == "mini" else self.sizes_from_file(shapes)

    def sizes_from_tensors(
        self, config: MiSSConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        return self.layer_sizes(config, {"miss_block": shapes["D"]})

    def to_peft(self, config: MiSSConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            "r": config.r,
            "mini_r": config.mini_r,
            "miss_dropout": config.dropout,
            "init_weights": True if config.form == "balance" else config.form,
            "bias": "none",
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> MiSSConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        refuse_trained_biases(fields)
        form = fields.get("init_weights", True)
        return MiSSConfig(
            r=fields.get("r", 64),
            mini_r=fields.get("mini_r", 1),
            dropout=fields.get("miss_dropout") or 0.0,
            form="balance" if isinstance(form, bool) else form,
            **common,
        )
