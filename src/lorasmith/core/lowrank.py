"""The low-rank product, added into a layer's output with nothing to spare.

    y ← y + s · dropout(x) Aᵀ Bᵀ      x [..., d_in], A [r, d_in], B [d_out, r], y [..., d_out]

The obvious form (two linear layers, a product with s and a sum) allocates a second and a
third output, a second gradient of x, and with dropout a copy of x with a mask of floats.
Here the forward is cut in two around the base layer, ``down`` before and ``up`` after it:

* ``up`` adds into the base layer's own output (one ``addmm``);
* on the way back, the base layer hands its gradient of x to ``down``, which adds its own
  share to that very buffer (one ``addmm``), so no second gradient of x exists;
* saved for the backward pass: x (which the base layer, being frozen, does not save
  itself), x Aᵀ, and with dropout one byte an element.

Where no gradient is needed, and under ``torch.compile`` (which fuses on its own), the
same formulas run as plain operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Down", "compute_dtype", "dropout_mask", "product", "up"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would compute on ``x`` here: autocast's, or x's."""
    if x.is_floating_point() and x.dtype != torch.float64:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return x.dtype


def dropout_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A random mask of the elements to keep, and the probability of keeping.

    On CPU the mask comes from 16 bits of PyTorch's generator an element, compared with a
    threshold: a fifth of the time of ``bernoulli_``. The probability is therefore a
    multiple of 2⁻¹⁶; the one really used is returned, so that the expectation is exact.

    Returns:
        int8 mask of x's shape with ones where the element is kept, and the probability.
    """
    if x.device.type != "cpu":
        keep = 1.0 - p
        return torch.empty(x.shape, dtype=torch.int8, device=x.device).bernoulli_(keep), keep
    dropped = round(p * 65536)
    count = x.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count] >= dropped - 32768
    return kept.view(torch.int8).view(x.shape), 1.0 - dropped / 65536


class _Down(torch.autograd.Function):
    """(x, A) → (x, h = dropout(x) Aᵀ); takes x's gradient from the base layer and adds."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        A0: Tensor | None,
        dropout: float,
        dtype: torch.dtype,
        through: bool,
        owned: bool,
    ) -> Any:
        ctx.set_materialize_grads(False)
        passed = x.to(dtype)
        flat = passed.reshape(-1, passed.shape[-1])
        a = (A if A0 is None else torch.cat((A, A0))).to(dtype)
        mask, keep = dropout_mask(flat, dropout) if dropout else (None, 1.0)
        h = (flat if mask is None else flat * mask) @ a.T
        if mask is not None:
            h *= 1.0 / keep
        ctx.save_for_backward(flat, a, mask)
        ctx.keep, ctx.rank, ctx.owned = keep, A.shape[0], owned
        ctx.x_dtype, ctx.a_dtype, ctx.x_shape = x.dtype, A.dtype, x.shape
        h = h.view(*x.shape[:-1], a.shape[0])
        return (passed, h) if through else h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g_x, g_h = grads if len(grads) == 2 else (None, grads[0])
        flat, a, mask = ctx.saved_tensors
        g_a = None
        if g_h is not None:
            g_h = g_h.reshape(-1, a.shape[0])
            if mask is not None:
                g_h = g_h * (1.0 / ctx.keep)
            if ctx.needs_input_grad[1]:
                kept = flat if mask is None else flat * mask
                g_a = (g_h[:, : ctx.rank].T @ kept).to(ctx.a_dtype)
            if ctx.needs_input_grad[0]:
                g_x = _accumulate(g_x, g_h, a, mask, ctx.owned)
        if g_x is not None:
            g_x = g_x.reshape(ctx.x_shape).to(ctx.x_dtype)
        return g_x, g_a, None, None, None, None, None


def _accumulate(
    g_x: Tensor | None, g_h: Tensor, a: Tensor, mask: Tensor | None, owned: bool
) -> Tensor:
    """g_x + (g_h a) ∘ mask, in g_x's own memory where nothing else can hold it."""
    if mask is not None:
        share = (g_h @ a) * mask
        if g_x is None:
            return share
        flat = g_x.reshape(share.shape)
        # With grad mode on, the caller wants second derivatives: stay out of place.
        return flat.add_(share) if owned and not torch.is_grad_enabled() else flat + share
    if g_x is None:
        return g_h @ a
    flat = g_x.reshape(-1, a.shape[1])
    if owned and not torch.is_grad_enabled() and flat.is_contiguous():
        return flat.addmm_(g_h, a)
    return torch.addmm(flat, g_h, a)


class _Up(torch.autograd.Function):
    """(y, h, B) → y + s h Bᵀ, in y's memory if it is ours to use."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, B: Tensor, B0: Tensor | None, s: float, owned: bool
    ) -> Tensor:
        b = (B if B0 is None else torch.cat((B, -B0), dim=1)).to(y.dtype)
        flat = h.reshape(-1, h.shape[-1]).to(y.dtype)
        ctx.save_for_backward(flat, b)
        ctx.s, ctx.rank = s, B.shape[1]
        ctx.h_shape, ctx.h_dtype, ctx.b_dtype = h.shape, h.dtype, B.dtype
        return add_product(y, flat, b, s, owned)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        h, b = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        g_h = g_b = None
        if ctx.needs_input_grad[1]:
            g_h = (flat @ b).mul_(ctx.s).view(ctx.h_shape).to(ctx.h_dtype)
        if ctx.needs_input_grad[2]:
            g_b = (flat.T @ h[:, : ctx.rank]).to(ctx.b_dtype).mul_(ctx.s)
        return g, g_h, g_b, None, None, None


def add_product(y: Tensor, h: Tensor, b: Tensor, s: float, owned: bool) -> Tensor:
    """y + s h bᵀ for y [..., d_out], h [tokens, r], b [d_out, r]; in place if ``owned``."""
    if owned and y.is_contiguous():
        # Through ``detach``, so that autograd does not see a view changed in place: the
        # base layer's output has no other reader, and CopySlices would copy it.
        out = y.detach()
        out.view(-1, out.shape[-1]).addmm_(h, b.T, alpha=s)
        return out
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, b.T, alpha=s).view(y.shape)


@dataclass
class Down:
    """The factors that ``down`` has used, kept for ``up`` of the same call."""

    h: Tensor
    owned: bool


def down(
    x: Tensor,
    A: Tensor,
    *,
    A0: Tensor | None = None,
    dropout: float = 0.0,
    owned: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x to give to the base layer, h = dropout(x) [A; A0]ᵀ).

    Args:
        x: [..., d_in].
        A: [r, d_in].
        A0: Frozen rows under A, [r, d_in].
        dropout: Probability of zeroing an element of x on this path; 0 outside training.
        owned: Whether the gradient that the base layer gives for its input is a tensor
            of its own, so that ours may be added into it.

    Returns:
        x (in the compute dtype) and h [..., r] or [..., 2r].
    """
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        kept = x.to(dtype)
        if dropout:
            kept = _plain_dropout(kept, dropout)
        a = A if A0 is None else torch.cat((A, A0))
        return x, F.linear(kept, a.to(dtype))
    if x.requires_grad:
        passed, h = _Down.apply(x, A, A0, dropout, dtype, True, owned)
        return passed, h
    # x has no gradient (the first layer): were it to pass through the function, A would
    # make it require one, and the base layer would compute it for nothing.
    h = _Down.apply(x, A, A0, dropout, dtype, False, owned)
    return x, h


def _plain_dropout(x: Tensor, p: float) -> Tensor:
    if torch.compiler.is_compiling():
        return F.dropout(x, p, training=True)
    mask, keep = dropout_mask(x, p)
    return x * mask * (1.0 / keep)


def up(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    s: float,
    *,
    B0: Tensor | None = None,
    owned: bool = False,
) -> Tensor:
    """y + s h [B, −B0]ᵀ, in y's memory if it is ``owned``.

    Args:
        y: The base layer's output [..., d_out].
        h: What :func:`down` gave.
        B: [d_out, r].
        s: Scaling.
        B0: Frozen columns beside B, [d_out, r].
        owned: Whether y is a tensor that nothing else reads.
    """
    if torch.compiler.is_compiling():
        b = B if B0 is None else torch.cat((B, -B0), dim=1)
        return y + F.linear(h.to(y.dtype), b.to(y.dtype)) * s
    if not torch.is_grad_enabled():
        b = B if B0 is None else torch.cat((B, -B0), dim=1)
        return add_product(y, h.reshape(-1, h.shape[-1]).to(y.dtype), b.to(y.dtype), s, owned)
    out: Tensor = _Up.apply(y, h, B, B0, s, owned)
    return out


def product(A: Tensor, B: Tensor, s: float) -> Tensor:
    """s B A [d_out, d_in]."""
    return torch.mm(B * s, A)
