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

* layers that are fed the same tensor (q, k and v; gate and up) share the product with A.

Where no gradient is needed, on small inputs, under ``torch.compile`` (which fuses on its
own), inside ``torch.func`` and on nested tensors, the same formulas run as plain operations.

Second derivatives are exact: the functions save their inputs, never something derived
from them, and compute out of place while autograd records their backward pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Siblings",
    "column_dot",
    "compute_dtype",
    "down",
    "dropout_mask",
    "fast",
    "no_autocast",
    "plain",
    "up",
]


#: Member → its A and A0.
Rows = Callable[[Any], tuple[Tensor, Tensor | None]]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would compute on ``x`` here: autocast's, or x's."""
    if x.is_floating_point() and x.dtype != torch.float64:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(where: Tensor | torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on that device keep the dtypes they are given."""
    kind = (where.device if isinstance(where, Tensor) else where).type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def dropout_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A random mask of the elements to keep, and the probability of keeping.

    On CPU the mask comes from one byte of PyTorch's generator an element, compared with a
    threshold: a tenth of the time of ``bernoulli_``. Within one call the probability is
    therefore a multiple of 1/256, drawn such that over the calls its mean is ``p``; the
    one really used is returned, so that the expectation of the product is exact.

    Returns:
        int8 mask of x's shape with ones where the element is kept, and the probability.
    """
    if x.device.type != "cpu":
        keep = 1.0 - p
        return torch.empty(x.shape, dtype=torch.int8, device=x.device).bernoulli_(keep), keep
    below, rest = divmod(p * 256, 1)
    dropped = min(int(below) + int(rest > 0 and float(torch.rand(())) < rest), 255)
    count = x.numel()
    bits = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int8)[:count] >= dropped - 128
    return kept.view(torch.int8).view(x.shape), 1.0 - dropped / 256


#: Elements of a tensor below which plain operations are faster on CPU: the functions below
#: save passes over x and y, but cost some 50 µs of Python.
SMALL = 65536


def plain(x: Tensor) -> bool:
    """Whether the plain operations must run instead of the functions below."""
    return (
        torch.compiler.is_compiling() or x.is_nested or torch._C._are_functorch_transforms_active()
    )


def fast(x: Tensor) -> bool:
    """Whether the functions below may run, and pay, for a layer called with ``x``."""
    return torch.is_grad_enabled() and x.numel() >= SMALL and not plain(x)


def _rows(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """All parts below each other, in the compute dtype."""
    rows = [t for t in parts if t is not None]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)


def _columns(B: Tensor, B0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, −B0] in the compute dtype."""
    return (B if B0 is None else torch.cat((B, -B0), dim=1)).to(dtype)


class _Down(torch.autograd.Function):
    """(x, A₁, A0₁, A₂, A0₂, …) → (x, h₁, h₂, …), hᵢ = dropout(x) [Aᵢ; A0ᵢ]ᵀ.

    Takes the gradient of x from the base layers that x is passed on to and adds its own
    share. Several A share one product in each direction: a narrow product is bound by
    reading x, so three of width r cost nearly three times one of width 3r.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: float, through: bool, owned: bool, *pairs: Tensor | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        flat = x.reshape(-1, x.shape[-1])
        a = _rows(pairs, x.dtype)
        mask, keep = dropout_mask(flat, dropout) if dropout else (None, 1.0)
        h = (flat if mask is None else flat * mask) @ a.T
        if mask is not None:
            h *= 1.0 / keep
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, mask, *pairs)
        ctx.keep, ctx.owned, ctx.through = keep, owned, through
        ctx.shape, ctx.dtype = x.shape, x.dtype
        widths = _widths(pairs)
        if len(widths) == 1:
            hs = [h.view(*x.shape[:-1], widths[0])]
        else:
            hs = [p.reshape(*x.shape[:-1], p.shape[1]) for p in torch.split(h, widths, dim=1)]
        return (x, *hs) if through else tuple(hs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.spent = True  # for ``Siblings``: what still waits must not join this graph
        g_x, g_hs = (grads[0], grads[1:]) if ctx.through else (None, grads)
        x, mask, *pairs = ctx.saved_tensors
        result: list[Tensor | None] = [g_x, None, None, None, *(None for _ in pairs)]
        if all(g is None for g in g_hs):
            return tuple(result)
        widths = _widths(pairs)
        g_h = _side_by_side(g_hs, widths)
        if mask is not None:
            g_h = g_h * (1.0 / ctx.keep)
        if any(ctx.needs_input_grad[4:]):
            flat = x.reshape(-1, x.shape[-1])
            kept = flat if mask is None else flat * mask
            # Alone, what is frozen comes last; it needs no gradient.
            needed = g_h[:, : pairs[0].shape[0]] if len(widths) == 1 else g_h
            g_a = needed.T @ kept
            start = 0
            for i, width in enumerate(widths):
                A = pairs[2 * i]
                if ctx.needs_input_grad[4 + 2 * i]:
                    result[4 + 2 * i] = g_a[start : start + A.shape[0]].to(A.dtype)
                start += width
        if ctx.needs_input_grad[0]:
            a = _rows(pairs, ctx.dtype)
            result[0] = _accumulate(g_x, g_h, a, mask, ctx.owned).view(ctx.shape)
        return tuple(result)


def _widths(pairs: Sequence[Tensor | None]) -> list[int]:
    """Rows of each [Aᵢ; A0ᵢ]."""
    rows = [0 if t is None else t.shape[0] for t in pairs]
    return [r + r0 for r, r0 in zip(rows[::2], rows[1::2], strict=True)]


def _side_by_side(grads: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor:
    """The gradients of all h in one matrix [tokens, Σ r]; zero where there is none."""
    flat = [g if g is None else g.reshape(-1, w) for g, w in zip(grads, widths, strict=True)]
    if len(flat) == 1 and flat[0] is not None:
        return flat[0]
    like = next(g for g in flat if g is not None)
    return torch.cat(
        [
            like.new_zeros(like.shape[0], w) if g is None else g
            for g, w in zip(flat, widths, strict=True)
        ],
        dim=1,
    )


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
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, B, B0)
        ctx.s, ctx.h_shape = s, h.shape
        return add_product(y, h.reshape(-1, h.shape[-1]), _columns(B, B0, y.dtype), s, owned)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        h, B, B0 = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        g_h = g_b = None
        if ctx.needs_input_grad[1]:
            g_h = (flat @ _columns(B, B0, g.dtype)).mul_(ctx.s).view(ctx.h_shape)
        if ctx.needs_input_grad[2]:
            narrow = h.reshape(-1, h.shape[-1])[:, : B.shape[1]]
            g_b = (flat.T @ narrow).to(B.dtype).mul_(ctx.s)
        return g, g_h, g_b, None, None, None


def add_product(y: Tensor, h: Tensor, b: Tensor, s: float, owned: bool) -> Tensor:
    """y + s h bᵀ, in place if ``owned``.

    y [..., d_out] as rows as wide as b [d_out, r] is high, one for each row of h [tokens, r].
    """
    if not torch.is_grad_enabled() and not (owned and y.is_contiguous()):
        # Inside a function the result must be a tensor of its own: what returns a view
        # forbids whoever comes behind to write in place.
        y, owned = y.clone(memory_format=torch.contiguous_format), True
    if owned and y.is_contiguous():
        # Through ``detach``, so that autograd does not see a view changed in place: the
        # base layer's output has no other reader, and CopySlices would copy it.
        out = y.detach()
        out.view(-1, b.shape[0]).addmm_(h, b.T, alpha=s)
        return out
    # Autocast would give the sum of a float32 output (of a quantised layer) its own dtype.
    with no_autocast(y):
        return torch.addmm(y.reshape(-1, b.shape[0]), h, b.T, alpha=s).view(y.shape)


class Siblings:
    """Adapters of neighbouring layers, some of which are fed the same tensor (q, k, v).

    Which ones are is at first a guess from their names, and then seen: where a layer is
    called with the very tensor object that a neighbour was just called with, the neighbour
    remembers, and the next time computes the product for both. A guess that proves wrong is
    forgotten. With dropout, those who share the product share the mask, as in the reference
    code of LoRA for fused q, k, v.

    What waits is used only while it is what the follower would compute itself: on the same
    values of x and A, in a graph that no backward pass has gone through, in the same thread.
    """

    def __init__(self) -> None:
        self._followers: dict[Any, list[Any]] = {}
        self._local = threading.local()

    def expect(self, members: Sequence[Any]) -> None:
        """Guesses that all of them are fed the same tensor, the first one first.

        Without it the first step would be computed otherwise than the second, so that a
        run that is resumed would differ in the last digits from one that was not.
        """
        self._followers = {members[0]: list(members[1:])} if members else {}

    @property
    def _shared(self) -> _Shared:
        found: _Shared | None = getattr(self._local, "shared", None)
        return _Shared(None, lambda: None, None, {}) if found is None else found

    def __reduce__(self) -> Any:
        # Nothing in here outlives a copy or a file: it is learnt anew in one step.
        return (Siblings, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        copy: Siblings = memo.setdefault(id(self), Siblings())
        return copy

    def take(self, member: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What a neighbour has computed for ``member`` on this very ``x``, if anything."""
        shared = self._shared
        if shared.input() is not x:
            return None
        waiting = shared.ready.pop(member, None)
        if waiting is not None and shared.passed is not None:
            passed, (h, versions) = shared.passed, waiting
            if not shared.ready:
                shared.passed = None  # nobody else waits: do not keep the graph alive
            spent = getattr(h.grad_fn, "spent", False)
            fresh = versions == _versions(x, member) and not spent
            return (passed, h) if fresh else None
        followers = self._followers.setdefault(shared.leader, [])
        if member is not shared.leader and member not in followers:
            followers.append(member)
        return None

    def followers(self, member: Any) -> list[Any]:
        """Those who are expected to be called next with the input of ``member``."""
        shared = self._shared
        known = self._followers.get(shared.leader, [])
        for unused in shared.ready:  # a guess that did not come true
            if unused in known:
                known.remove(unused)
        return list(self._followers.get(member, ()))

    def offer(self, leader: Any, x: Tensor, passed: Tensor, ready: dict[Any, Tensor]) -> None:
        """Keeps what has been computed on ``x`` until the followers take it."""
        waiting = {m: (h, _versions(x, m)) for m, h in ready.items()}
        self._local.shared = _Shared(leader, weakref.ref(x), passed if ready else None, waiting)


@dataclass
class _Shared:
    """One tensor, who computed on it, what it was passed on as, and what waits."""

    leader: Any
    input: Callable[[], Tensor | None]
    passed: Tensor | None
    ready: dict[Any, tuple[Tensor, tuple[int, ...]]]


def _versions(x: Tensor, member: Any) -> tuple[int, ...]:
    """Changes when x or A (HRA: U) is written in place."""
    return x._version, member["A" if "A" in member else "U"]._version


def _recomputed() -> bool:
    """Whether somebody (non-reentrant checkpointing) replays what is saved here.

    The replay must save exactly what the first pass saved, so nothing may be learnt, or
    done differently for having learnt, in between.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None


def down(
    x: Tensor,
    A: Tensor | None = None,
    *,
    A0: Tensor | None = None,
    dropout: float = 0.0,
    owned: bool = False,
    member: Any = None,
    siblings: Siblings | None = None,
    common: bool = False,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """(x to give to the base layer, h = dropout(x) [A; A0]ᵀ).

    Args:
        x: [..., d_in].
        A: [r, d_in].
        A0: Frozen rows under A, [r, d_in].
        dropout: Probability of zeroing an element of x on this path; 0 outside training.
        owned: Whether the gradient that the base layer gives for its input is a tensor
            of its own, so that ours may be added into it.
        member: Who asks: something that has ``["A"]`` and perhaps ``["A0"]``.
        siblings: Whom it may share products with.
        common: Whether A is one and the same for all siblings (VeRA), and with it h.
        rows: Gives A and A0 of a member, in place of the arguments and of what is stored
            under these names, where they are computed from its tensors.

    Returns:
        x (in the compute dtype) and h [..., r] or [..., 2r].
    """
    # Cast by autograd's own operation, not inside the function, so that what the function
    # saves is its input.
    kept = x.to(compute_dtype(x))
    get = rows or stored_rows
    if not fast(x):
        a = _rows((A, A0) if rows is None else rows(member), kept.dtype)
        return x, _dropped_linear(kept, a, dropout) if dropout else F.linear(kept, a)
    # If x has no gradient (the first layer) it does not pass through the function: A
    # would make it require one, and the base layer would compute it for nothing.
    through = x.requires_grad
    share = siblings is not None and owned and not _recomputed()
    found = siblings.take(member, x) if share and siblings is not None else None
    if found is not None:
        return found
    others = siblings.followers(member) if share and siblings is not None else []
    pairs = [*((A, A0) if rows is None else rows(member))]
    for other in () if common else others:
        pairs += get(other)
    out = _Down.apply(kept, dropout, through, owned, *pairs)  # type: ignore[no-untyped-call]
    passed, hs = (out[0], out[1:]) if through else (x, out)
    if share and siblings is not None:
        theirs = hs[:1] * len(others) if common else hs[1:]
        siblings.offer(member, x, passed, dict(zip(others, theirs, strict=True)))
    return passed, hs[0]


def stored_rows(member: Any) -> tuple[Tensor, Tensor | None]:
    """A and A0 as a member stores them."""
    return member["A"], member["A0"] if "A0" in member else None


def _dropped_linear(x: Tensor, a: Tensor, p: float) -> Tensor:
    """dropout(x) aᵀ by plain operations."""
    if plain(x):
        return F.linear(F.dropout(x, p, training=True), a)
    mask, keep = dropout_mask(x, p)
    # Scaled where it is r wide, not d_in.
    return F.linear(x * mask, a) * (1.0 / keep)


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
    h = h.to(y.dtype)
    if fast(y):
        out: Tensor = _Up.apply(y, h, B, B0, s, owned)  # type: ignore[no-untyped-call]
        return out
    b = _columns(B, B0, y.dtype)
    if plain(y):
        return y + F.linear(h, b) * s
    return add_product(y, h.reshape(-1, h.shape[-1]), b, s, owned and not torch.is_grad_enabled())


def column_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_t a_ti b_ti of two [tokens, d] matrices: [d], summed in ``dtype``.

    On CPU in blocks that stay in the cache: the product of the whole would be one more
    tensor of their size, written and read for nothing.
    """
    block = max(1, SMALL // max(1, a.shape[1]))
    if a.device.type != "cpu" or a.shape[0] <= 2 * block:
        return (a * b).sum(dim=0, dtype=dtype)
    total = torch.zeros(a.shape[1], dtype=dtype, device=a.device)
    for x, y in zip(torch.split(a, block), torch.split(b, block), strict=True):
        total += (x * y).sum(dim=0, dtype=dtype)
    return total
