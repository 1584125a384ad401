"""A product added into a layer's output, with all that leads up to it computed twice.

    y ← y + s · gain ∘ (h Bᵀ),   (h, B) = product(x, tensors)

Variants whose update is built from small tensors (LoHa, LoKr, MiSS) would leave the
d_out × d_in matrices or wide intermediate results that they pass through to autograd, for
every layer of the model at once. Here x and the small tensors are all that is kept between
the passes; the backward pass runs ``product`` again, one layer at a time. The last product
itself, which is the expensive one, is not repeated.

On small inputs, under ``torch.compile``, inside ``torch.func`` and where no gradient is
needed, the same formula runs as plain operations. Second derivatives are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core import lowrank

__all__ = ["Product", "add"]

#: (x, *tensors) → (h [..., q], B [k, q]), where h has as many rows as y has parts of width k.
Product: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class _Add(torch.autograd.Function):
    """(y, x, tensors) → y + s · gain ∘ (h Bᵀ), in y's memory if it is ours to use."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        gain: Tensor | None,
        product: Product,
        s: float,
        owned: bool,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, gain, *tensors)
        ctx.product, ctx.s = product, s
        h, b = _run(product, x, *tensors)
        return _sum(y, h, b, gain, s, owned)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, gain, *tensors = ctx.saved_tensors
        needed = (ctx.needs_input_grad[1], *ctx.needs_input_grad[6:])
        result: list[Tensor | None] = [g, *(None for _ in range(5 + len(tensors)))]
        if not any(needed):
            return tuple(result)
        # With grad mode on, the caller wants second derivatives, through what was saved.
        twice = torch.is_grad_enabled()
        inputs = [x, *tensors]
        if not twice:
            inputs = [t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
        with torch.enable_grad():
            h, b = _run(ctx.product, *inputs)
        with torch.set_grad_enabled(twice):
            flat = (g if gain is None else g * gain).reshape(-1, b.shape[0])
            g_h = g_b = None
            if h.requires_grad:
                g_h = (flat @ b).mul(ctx.s).view(h.shape)
            if b.requires_grad:
                g_b = (flat.T @ h.reshape(-1, h.shape[-1])).mul(ctx.s)
        outputs = [(o, d) for o, d in ((h, g_h), (b, g_b)) if d is not None]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in outputs],
                [t for t, n in zip(inputs, needed, strict=True) if n],
                [d for _, d in outputs],
                create_graph=twice,
            )
        )
        found = [next(grads) if n else None for n in needed]
        result[1], result[6:] = found[0], found[1:]
        return tuple(result)


def _run(product: Product, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    # It chooses its dtypes itself, and must choose the same when autocast is over.
    with lowrank.no_autocast(inputs[0]):
        return product(*inputs)


def _sum(y: Tensor, h: Tensor, b: Tensor, gain: Tensor | None, s: float, owned: bool) -> Tensor:
    flat = h.reshape(-1, h.shape[-1]).to(y.dtype)
    if gain is not None:
        return y + (flat @ b.to(y.dtype).T).view(y.shape) * (gain * s)
    return lowrank.add_product(y, flat, b.to(y.dtype), s, owned)


def add(
    y: Tensor,
    x: Tensor,
    product: Product,
    tensors: Sequence[Tensor],
    s: float,
    *,
    size: int,
    gain: Tensor | None = None,
    owned: bool = False,
) -> Tensor:
    """y + s · gain ∘ (h Bᵀ) with (h, B) = product(x, *tensors).

    Args:
        y: The base layer's output [..., d_out].
        x: What the layer was fed [..., d_in], in the compute dtype.
        product: See ``Product``; differentiable plain operations, in the dtype of x.
        tensors: What else it takes.
        s: Scaling.
        size: Elements that ``product`` makes beside x, to tell whether it pays to compute
            them twice.
        gain: A constant factor on each output [d_out], or on all of them [1].
        owned: Whether y is a tensor that nothing else reads.
    """
    if lowrank.plain(y):
        h, b = _run(product, x, *tensors)
        delta = F.linear(h, b).reshape(y.shape).to(y.dtype)
        return y + delta * (s if gain is None else gain * s)
    if not torch.is_grad_enabled():
        h, b = _run(product, x, *tensors)
        return _sum(y, h, b, gain, s, owned)
    if max(x.numel(), size) >= lowrank.SMALL:
        out: Tensor = _Add.apply(y, x, gain, product, s, owned, *tensors)  # type: ignore[no-untyped-call]
        return out
    h, b = _run(product, x, *tensors)
    return _sum(y, h, b, gain, s, owned=False)
