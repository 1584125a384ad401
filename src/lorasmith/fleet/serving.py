"""The layers of a model that serve a fleet from its shared basis; see ``multitask``.

    y_j = y0_j + U (C_t(j) (V x_j)) + B_t(j) A_t(j) x_j         j a row, t(j) its task

    x [b, n, d_in]       input, b rows of n tokens      V [R_d, d_in], U [d_out, R_u]   shared
    y0 [b, n, d_out]     the base layer's output        C_t [R_u, R_d]                  a task's
                                                        A_t [r, d_in], B_t [d_out, r]   residual

V x and the product with U are one matrix product each for the whole batch, whatever its tasks.
Between them stands a product of the width of the basis, by kind of the cores:

* full: one batched product with the stacked C, gathered by row;
* diagonal: an elementwise product;
* factored, C = leftᵀ right of rank k: two batched products. Loadings of the Share basis are the
  same with k = 1 on components of r rows each.

Tasks of different kinds together are brought into one (full if one is, else factored).
Residuals of equal rank are stacked: as one wide product whose columns of other tasks are put to
zero where few (``_WIDE``) columns come together, else by batched products on the rows concerned.

What acts is a **combination** for each row: nothing, a task, or Σ_i w_i (task i), which is
linear in C and in the residuals.

DoRA's rows are rescaled: with g = m / c, c the norms of the rows of W + ΔW, as it is held,

    y = g ∘ (y0 − b + ΔW x) + b.

g is computed once a member (densely, a block of rows at a time, without cancellation) and kept
beside its core. A combination of several tasks, or with a weight other than 1, is

    y0 + Σ_i w_i (y_i − y0) = (1 + Σ w_i (g_i − 1)) ∘ y0 + Σ w_i g_i ∘ (ΔW_i x) + Σ w_i (1 − g_i) b,

where g_i no longer leaves the basis: DoRA's terms act as residuals of rank R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo
from lorasmith.core.mixing import wrong_rows
from lorasmith.core.state import LayerAdapter
from lorasmith.core.variant import BaseLayer, LayerState, NewTensors, TensorSpec, Variant
from lorasmith.errors import FuseError, UnsupportedFeatureError
from lorasmith.fleet.codes import ABSENT, DIAGONAL, FULL, LOADINGS, Code

__all__ = ["Acting", "Combination", "FleetConfig", "FleetLayer", "Piece", "combine", "gain_of"]

#: A task and its weight, as often as there are tasks; empty for the base model.
Combination = tuple[tuple[str, float], ...]

#: Up to how many columns the residuals of a batch act as one product.
_WIDE = 64
#: Elements of W that are widened at a time to find the norms of its rows.
_BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class Piece:
    """What one task has on one layer, ready to be multiplied.

    Attributes:
        kind: ``FULL``, ``DIAGONAL``, ``FACTORED`` or ``LOADINGS``; ``ABSENT`` for no core.
        left: [k, R_u / width].
        right: FULL: C [R_u, R_d]; DIAGONAL: [1, R]; else [k, R_d / width].
        width: Rows of the basis that go together.
        down: The residual's A [r, d_in], or ``None``.
        up: The residual's B as rows [r, d_out].
        gain: DoRA's g [d_out], or ``None``.
        weight: The version of W for which ``gain`` holds.
    """

    kind: int
    left: Tensor
    right: Tensor
    width: int
    down: Tensor | None
    up: Tensor | None
    gain: Tensor | None = None
    weight: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, code: Code, ranks: tuple[int, int], where: torch.device, dtype: torch.dtype
    ) -> Piece:
        """A code as it is stored, brought to a device and a dtype.

        Args:
            code: What the subspace holds.
            ranks: (R_u, R_d) of the layer.
            where: The layer's device.
            dtype: In which to multiply.
        """
        width = ranks[0] // code.left.shape[1] if code.kind == LOADINGS else 1
        residual = len(code.residual_up) > 0
        return cls(
            code.kind,
            code.left.to(where, dtype),
            code.right.to(where, dtype),
            width,
            code.residual_down.to(where, dtype) if residual else None,
            code.residual_up.to(where, dtype) if residual else None,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""
        found = (self.left, self.right, self.down, self.up, self.gain)
        return tuple(t for t in found if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.right.device

    def dense(self, ranks: tuple[int, int]) -> Tensor:
        """C [R_u, R_d]."""
        if self.kind == FULL:
            return self.right
        left, right = self.factors(ranks)
        return left.mT @ right

    def factors(self, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Left [k, R_u] and right [k, R_d] with C = leftᵀ right."""
        if self.kind == ABSENT:
            return self.left.new_zeros(0, ranks[0]), self.left.new_zeros(0, ranks[1])
        if self.kind == FULL:
            eye = torch.eye(min(ranks), device=self.device, dtype=self.right.dtype)
            return (eye, self.right) if ranks[0] <= ranks[1] else (self.right.mT, eye)
        if self.kind == DIAGONAL:
            size = self.right.shape[1]
            eye = torch.eye(size, ranks[0], device=self.device, dtype=self.right.dtype)
            return eye, F.pad(torch.diag(self.right[0]), (0, ranks[1] - size))
        if self.width == 1:
            return self.left, self.right
        eye = torch.eye(self.width, device=self.device, dtype=self.right.dtype)
        return torch.kron(self.left, eye), torch.kron(self.right, eye)

    def change(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """A [k, d_in] and the columns of B as rows [k, d_out] of all of its ΔW = B A.

        Args:
            up: U [d_out, R_u].
            down: V [R_d, d_in].
        """
        left, right = self.factors((up.shape[1], down.shape[0]))
        A, B = right @ down, left @ up.mT
        if self.down is not None and self.up is not None:
            A, B = torch.cat((A, self.down)), torch.cat((B, self.up))
        return A, B


def gain_of(magnitude: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """DoRA's m / ‖W_i + (B A)_i‖ [d_out], float32, and 0 where a row is zero.

    Args:
        magnitude: m [d_out].
        weight: W [d_out, d_in], in any floating dtype; read a block of rows at a time.
        A: [k, d_in].
        B: The columns of B as rows [k, d_out].
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    rows = max(1, _BLOCK // weight.shape[1])
    found = []
    with lowrank.no_autocast(weight):
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows].to(wide)
            moved = torch.addmm(block, B[:, start : start + rows].mT, A)
            found.append(torch.linalg.vector_norm(moved, dim=1))
    norms = torch.cat(found)
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return (magnitude.to(inverse) * inverse).to(torch.float32)


# -- what acts -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Core:
    """The cores of n combinations.

    Attributes:
        kind: ``"full"``, ``"diagonal"`` or ``"factored"``.
        right: full [n, R_d, R_u]; diagonal [n, R]; factored [n, k, R_d / width].
        left: factored [n, k, R_u / width], else ``None``.
        width: Rows of the basis that go together.
        index: Which of the n belongs to each row; ``None`` if the j-th is the j-th row's.
    """

    kind: str
    right: Tensor
    left: Tensor | None
    width: int
    index: Tensor | None

    def __call__(self, h: Tensor, ranks: tuple[int, int]) -> Tensor:
        """C h: [b, n, R_d] → [b, n, R_u]."""
        right, left = self.right, self.left
        if self.index is not None:
            right = right.index_select(0, self.index)
            left = None if left is None else left.index_select(0, self.index)
        if self.kind == "full":
            return torch.bmm(h, right)
        if self.kind == "diagonal":
            size = right.shape[1]
            return F.pad(h[..., :size] * right[:, None], (0, ranks[0] - size))
        assert left is not None
        if self.width == 1:
            return torch.bmm(torch.bmm(h, right.mT), left)
        # Components first: [b, K, n r], so that loadings sum over them in one product.
        b, tokens, r = h.shape[0], h.shape[1], self.width
        parts = h.view(b, tokens, -1, r).transpose(1, 2).reshape(b, -1, tokens * r)
        turned = torch.bmm(left.mT, torch.bmm(right, parts))
        return turned.view(b, -1, tokens, r).transpose(1, 2).reshape(b, tokens, ranks[0])


@dataclass(frozen=True, eq=False)
class Residual:
    """Residuals of one rank.

    Attributes:
        A: [n, r, d_in].
        B: [n, r, d_out].
        rows: The rows concerned; ``None`` for all.
        index: Which of the n belongs to each of these rows.
        mask: [b, 1, n r], ones in each row's own columns: all act as one product then.
    """

    A: Tensor
    B: Tensor
    rows: Tensor | None = None
    index: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Acting:
    """What acts on one layer.

    Attributes:
        rows: Number of rows that were spoken of; 0 if one combination acts on everything.
        core: The cores, or ``None``.
        residuals: The residuals, by rank.
        pre: Factor on the base layer's output [b, 1, d_out] or [d_out].
        gain: Factor on the sum, of the same shape.
        shift: What is added at last, of the same shape.
        bare: Whether there is a core and nothing else.
    """

    rows: int
    core: Core | None = None
    residuals: tuple[Residual, ...] = ()
    pre: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    bare: bool = field(init=False)

    def __post_init__(self) -> None:
        others = (self.pre, self.gain, self.shift)
        bare = self.core is not None and not self.residuals and all(t is None for t in others)
        object.__setattr__(self, "bare", bare)

    def moved(self, fn: Callable[[Tensor], Tensor]) -> Acting:
        """The same with every tensor replaced by what ``fn`` makes of it."""

        def each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else fn(tensor)

        core = self.core
        if core is not None:
            core = replace(core, right=fn(core.right), left=each(core.left), index=each(core.index))
        residuals = tuple(
            Residual(fn(r.A), fn(r.B), each(r.rows), each(r.index), each(r.mask))
            for r in self.residuals
        )
        return Acting(self.rows, core, residuals, each(self.pre), each(self.gain), each(self.shift))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        found = [self.pre, self.gain, self.shift]
        if self.core is not None:
            found += [self.core.right, self.core.left]
        for residual in self.residuals:
            found += [residual.A, residual.B, residual.mask]
        return sum(t.numel() * t.element_size() for t in found if t is not None)


@dataclass
class _Terms:
    """One combination on one layer: cores and residuals with their weights, and DoRA's gains."""

    cores: list[tuple[float, Piece]] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    pre: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return sum(a.shape[0] for a in self.A)


def combine(
    layer: FleetLayer,
    combinations: Sequence[Combination],
    index: Sequence[int] | None,
    pieces: Mapping[str, Piece],
    bias: Tensor | None,
) -> Acting | None:
    """What combinations of tasks make of one layer; ``None`` if they leave it as it is.

    Args:
        layer: The layer.
        combinations: The distinct ones.
        index: Which of them each row of the batch gets; ``None`` where there is one, for all.
        pieces: Task → what it has there; tasks that have nothing may be missing.
        bias: The layer's bias [d_out], or ``None``.
    """
    with torch.inference_mode(False), torch.no_grad():
        terms = [_terms(layer, c, pieces, bias) for c in combinations]
        core = _core(layer, terms, index)
        residuals = _residuals(terms, index)
        vectors = {
            name: _vectors([getattr(t, name) for t in terms], neutral, index)
            for name, neutral in (("pre", 1.0), ("gain", 1.0), ("shift", 0.0))
        }
    if core is None and not residuals and all(v is None for v in vectors.values()):
        return None
    return Acting(0 if index is None else len(index), core, residuals, **vectors)


def _terms(
    layer: FleetLayer, combination: Combination, pieces: Mapping[str, Piece], bias: Tensor | None
) -> _Terms:
    made = _Terms()
    present = [(pieces[t], w) for t, w in combination if t in pieces and w != 0.0]
    if len(present) == 1 and present[0][1] == 1.0:
        piece = present[0][0]
        made.gain = piece.gain
        if piece.gain is not None and bias is not None:
            made.shift = (1 - piece.gain) * bias.to(piece.gain)
        _add(made, piece, 1.0)
        return made
    for piece, weight in present:
        if piece.gain is None:
            _add(made, piece, weight)
            continue
        A, B = piece.change(layer["up"], layer["down"])
        made.A.append(A)
        made.B.append(B * (weight * piece.gain).to(B.dtype))
        less = weight * (1 - piece.gain)
        made.pre = (torch.ones_like(less) if made.pre is None else made.pre) - less
        if bias is not None:
            part = less * bias.to(less)
            made.shift = part if made.shift is None else made.shift + part
    return made


def _add(made: _Terms, piece: Piece, weight: float) -> None:
    if piece.kind != ABSENT:
        made.cores.append((weight, piece))
    if piece.down is not None and piece.up is not None:
        made.A.append(piece.down)
        made.B.append(piece.up if weight == 1.0 else piece.up * weight)


def _core(layer: FleetLayer, terms: Sequence[_Terms], index: Sequence[int] | None) -> Core | None:
    used = [piece for t in terms for _, piece in t.cores]
    ranks = layer.ranks
    if not used or not ranks[0] or not ranks[1]:
        return None
    kinds = {piece.kind for piece in used}
    where = _order(index, used[0].device)
    if kinds == {DIAGONAL}:
        zero = torch.zeros_like(used[0].right[0])
        rows = [sum((w * p.right[0] for w, p in t.cores), zero) for t in terms]
        return Core("diagonal", torch.stack(rows), None, 1, where)
    if FULL in kinds:
        if len(terms) == 1 and len(used) == 1 and terms[0].cores[0][0] == 1.0:
            dense = used[0].dense(ranks)[None]  # as it is: nothing is copied
        else:
            zero = used[0].right.new_zeros(ranks)
            dense = torch.stack(
                [sum((w * p.dense(ranks) for w, p in t.cores), zero) for t in terms]
            )
        return Core("full", dense.mT, None, 1, where)
    width = used[0].width if kinds == {LOADINGS} else 1
    pairs = []
    for t in terms:
        found = [
            (w, (p.left, p.right) if p.width == width and p.kind != DIAGONAL else p.factors(ranks))
            for w, p in t.cores
        ]
        if found:
            pairs.append(
                (
                    torch.cat([left * w for w, (left, _) in found]),
                    torch.cat([right for _, (_, right) in found]),
                )
            )
        else:
            pairs.append(
                (
                    used[0].right.new_zeros(0, ranks[0] // width),
                    used[0].right.new_zeros(0, ranks[1] // width),
                )
            )
    k = max(1, *(len(left) for left, _ in pairs)) if pairs else 1
    lefts, rights = (torch.stack([_below(pair[i], k) for pair in pairs]) for i in (0, 1))
    return Core("factored", rights, lefts, width, where)


def _below(rows: Tensor, k: int) -> Tensor:
    """[r, d] with rows of zeros below, to [k, d]."""
    return F.pad(rows, (0, 0, 0, k - rows.shape[0])) if rows.shape[0] < k else rows


def _order(index: Sequence[int] | None, where: torch.device) -> Tensor | None:
    if index is None or list(index) == list(range(len(index))):
        return None
    return torch.tensor(list(index), dtype=torch.int64, device=where)


def _residuals(terms: Sequence[_Terms], index: Sequence[int] | None) -> tuple[Residual, ...]:
    with_some = [i for i, t in enumerate(terms) if t.rank]
    if not with_some:
        return ()
    pairs = {i: (torch.cat(terms[i].A), torch.cat(terms[i].B)) for i in with_some}
    if index is None:
        A, B = pairs[0]
        return (Residual(A[None], B[None]),)
    where = pairs[with_some[0]][0].device
    if sum(terms[i].rank for i in with_some) <= _WIDE:
        A, B = (torch.cat([pairs[i][k] for i in with_some])[None] for k in (0, 1))
        own = torch.cat([torch.full((terms[i].rank,), i, device=where) for i in with_some])
        of_row = torch.tensor(list(index), device=where)
        mask = (of_row[:, None] == own[None]).to(A.dtype)[:, None]
        return (Residual(A, B, mask=mask),)
    groups: dict[int, list[int]] = {}
    for i in with_some:
        groups.setdefault(terms[i].rank, []).append(i)
    made = []
    for members in groups.values():
        A, B = (torch.stack([pairs[i][k] for i in members]) for k in (0, 1))
        place = {i: n for n, i in enumerate(members)}
        rows = [j for j, i in enumerate(index) if i in place]
        made.append(
            Residual(
                A,
                B,
                torch.tensor(rows, device=where),
                torch.tensor([place[index[j]] for j in rows], device=where),
            )
        )
    return tuple(made)


def _vectors(
    found: Sequence[Tensor | None], neutral: float, index: Sequence[int] | None
) -> Tensor | None:
    like = next((v for v in found if v is not None), None)
    if like is None:
        return None
    full = [torch.full_like(like, neutral) if v is None else v for v in found]
    return full[0] if index is None else torch.stack([full[i] for i in index])[:, None]


# -- on the model ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FleetConfig(AdapterConfig):
    """The fleet as the model's adapter: which layers; the rest is the subspace's."""

    variant: ClassVar[str] = "fleet"


class FleetLayer(LayerAdapter):
    """The shared basis of one layer and what acts there at the moment.

    Args:
        info: The layer.
        up: U [d_out, R_u].
        down: V [R_d, d_in].
        dtype: In which to keep and multiply them.
    """

    def __init__(self, info: LayerInfo, up: Tensor, down: Tensor, dtype: torch.dtype) -> None:
        super().__init__(_VARIANT, FleetConfig(targets=info.name), info, NewTensors({}))
        self.register_buffer("up", up.to(dtype).contiguous(), persistent=False)
        self.register_buffer("down", down.to(dtype).contiguous(), persistent=False)
        self.acting: Acting | None = None

    @property
    def ranks(self) -> tuple[int, int]:
        """(R_u, R_d)."""
        return self["up"].shape[1], self["down"].shape[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FleetLayer:
        super()._apply(fn, recurse)
        if self.acting is not None:
            # Devices follow the model; dtypes stay, as those of the basis do.
            self.acting = self.acting.moved(lambda t: t.to(fn(t).device))
        return self


class FleetVariant(Variant):
    """The mathematics of :class:`FleetLayer`, driven by the core's hooks."""

    name = "fleet"
    config_class = FleetConfig
    peft_type = "FLEET"
    family = "low-rank"
    formula = "y = W x + U C_t V x + B_t A_t x"

    def new_tensors(self, base: BaseLayer, config: Any) -> NewTensors:
        raise _not_alone()

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        return x, x

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        acting: Acting | None = state.acting  # type: ignore[attr-defined]
        if acting is None:
            return y
        if acting.rows and (carry.dim() < 2 or carry.shape[0] % acting.rows):
            raise wrong_rows(acting.rows, f"input of shape {tuple(carry.shape)}", base.info.name)
        owned = owns_output(base.module, base)
        if acting.bare and owned and not torch.is_grad_enabled():
            up, down = state["up"], state["down"]
            if _as_it_is(carry, y, up, acting):
                return _added(acting, carry, y, up, down)
        x = carry.to(lowrank.compute_dtype(carry))
        if acting.pre is not None:
            y, owned = _scaled(y, acting.pre, acting.rows), True
        core = acting.core
        if core is not None:
            up, down = state["up"].to(x.dtype), state["down"].to(x.dtype)
            h = _by_row(F.linear(x, down), acting.rows)
            z = _cast(core, x.dtype)(h, (up.shape[1], down.shape[0]))
            y = lowrank.up(y, z.view(*x.shape[:-1], up.shape[1]), up, 1.0, owned=owned)
            owned = True
        for residual in acting.residuals:
            y, owned = _residual(x, y, residual, acting.rows, owned), True
        if acting.gain is not None:
            y = _scaled(y, acting.gain, acting.rows)
        if acting.shift is not None:
            shift = acting.shift.to(y.dtype)
            y = (_by_row(y, acting.rows) + shift).view(y.shape) if acting.rows else y + shift
        return y

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        acting = _one(state)
        if acting is None:
            return weight
        if acting.pre is not None:
            weight = weight * acting.pre.to(weight.dtype)[:, None]
        if acting.core is not None:
            up, down = state["up"].to(weight.dtype), state["down"].to(weight.dtype)
            ranks = (up.shape[1], down.shape[0])
            # Row by row of the identity: C as the forward applies it.
            eye = torch.eye(ranks[1], dtype=weight.dtype, device=weight.device)[None]
            turned = _cast(acting.core, weight.dtype)(eye, ranks)[0]
            weight = torch.addmm(weight, up, turned.mT @ down)
        for residual in acting.residuals:
            B, A = residual.B[0].to(weight.dtype), residual.A[0].to(weight.dtype)
            weight = torch.addmm(weight, B.mT, A)
        if acting.gain is not None:
            weight = weight * acting.gain.to(weight.dtype)[:, None]
        return weight

    def effective_bias(self, state: LayerState, bias: Tensor) -> Tensor:
        acting = _one(state)
        if acting is None:
            return bias
        for factor in (acting.pre, acting.gain):
            bias = bias if factor is None else bias * factor.to(bias.dtype)
        return bias if acting.shift is None else bias + acting.shift.to(bias.dtype)

    # -- files: a fleet has its own (``SharedSubspace.save``) -------------------------------

    def to_peft(self, config: Any, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        raise _not_alone()

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> Any | None:
        return None

    def tensor_specs(self, config: Any, info: LayerInfo) -> dict[str, TensorSpec]:
        raise _not_alone()

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        raise _not_alone()

    def shapes(self, config: Any, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {}


_VARIANT = FleetVariant()


def _not_alone() -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        "A fleet that serves a model is not an adapter that could be attached or saved.",
        expected="SharedSubspace.save for the fleet, MultiTaskModel.adapter(task).save for a task",
        key="variant",
    )


def _one(state: LayerState) -> Acting | None:
    acting: Acting | None = state.acting  # type: ignore[attr-defined]
    if acting is not None and acting.rows:
        raise FuseError(
            "Each row of the batch has its own task; a weight has room for one.",
            expected="a task, or task → weight",
            got=f"{acting.rows} rows",
            fix="fuse(task)",
        )
    return acting


def _cast(core: Core, dtype: torch.dtype) -> Core:
    if core.right.dtype == dtype:
        return core
    return replace(
        core,
        right=core.right.to(dtype),
        left=None if core.left is None else core.left.to(dtype),
    )


def _as_it_is(x: Tensor, y: Tensor, up: Tensor, acting: Acting) -> bool:
    """Whether nothing needs to be cast, and y [b, n, d_out] can be written into."""
    return (
        acting.core is not None
        and x.dtype == up.dtype == y.dtype == acting.core.right.dtype
        and x.dim() == y.dim() == 3
        and y.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)
        and not lowrank.plain(y)
    )


def _added(acting: Acting, x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y + U (C (V x)) in y's memory: :meth:`FleetVariant.after` without what is not there.

    Of one token a row the products take no longer than the Python around them.

    Args:
        acting: A core and nothing else, in x's dtype.
        x: [b, n, d_in].
        y: [b, n, d_out], contiguous.
        up: U [d_out, R_u].
        down: V [R_d, d_in].
    """
    core, rows = acting.core, acting.rows or 1
    assert core is not None
    h = F.linear(x, down)
    if h.shape[0] != rows:
        h = _by_row(h, rows)
    z = core(h, (up.shape[1], down.shape[0]))
    y.view(-1, y.shape[2]).addmm_(z.reshape(-1, z.shape[2]), up.mT)
    return y


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[rows · k, …, d] as [rows, tokens, d]: what is repeated lies side by side."""
    rows = rows or 1
    return x.reshape(rows, x.numel() // max(1, rows * x.shape[-1]), x.shape[-1])


def _scaled(y: Tensor, factor: Tensor, rows: int) -> Tensor:
    factor = factor.to(y.dtype)
    return (_by_row(y, rows) * factor).view(y.shape) if rows else y * factor


def _residual(x: Tensor, y: Tensor, residual: Residual, rows: int, owned: bool) -> Tensor:
    A, B = residual.A.to(x.dtype), residual.B.to(x.dtype)
    if residual.rows is None:
        h = F.linear(x, A[0])
        if residual.mask is not None:
            h = (_by_row(h, rows) * residual.mask.to(h.dtype)).view(*x.shape[:-1], -1)
        return lowrank.up(y, h, B[0].mT, 1.0, owned=owned)
    assert residual.index is not None
    mine = _by_row(x, rows).index_select(0, residual.rows)
    h = torch.bmm(mine, A.index_select(0, residual.index).mT)
    change = torch.bmm(h, B.index_select(0, residual.index)).to(y.dtype)
    out = _by_row(y, rows)
    if owned and not torch.is_grad_enabled() and not lowrank.plain(y) and y.is_contiguous():
        out.index_add_(0, residual.rows, change)
        return y
    return out.index_add(0, residual.rows, change).view(y.shape)
