"""How different the heads of one projection are from each other, before and after.

Each head's weights are taken as one vector: its rows of W [d_out, d_in] for queries, keys and
values, its columns for the output projection, as the model's own layout cuts them
(``core.heads``; key-value heads are counted once, and a fused layer has three groups). For a
group of H heads,

    G_hg = ⟨W_h, W_g⟩            α_hg = arccos(G_hg / √(G_hh G_gg))

and the diversity is the mean of α over the H (H − 1) / 2 pairs: 0° if all heads are the same,
90° if they are unrelated. Fine-tuning that makes heads alike lowers it.

With factors, ΔW = L Rᵀ (L = s [B, B − B0], R = [A − A0; A0]ᵀ), nothing of the size of W is
formed for the weights after:

    G'_hg = G_hg + X_hg + X_gh + ⟨L_h (RᵀR), L_g⟩      X_hg = ⟨(W R)_h, L_g⟩

and for columns the same with Wᵀ, R for L and L for R.

Sums run in float64, so angles are right to 1e-10° above 0.01°, and to 3e-6° below. A head that
is zero has no direction: its angles are given as 0 and left out of the mean.

Counterpart: EgoRA's inter-head diversity matrix. Written from its description alone. Heads are
cut by the model's real head size and layout, so they are right under grouped queries and in
fused layers, where hidden_size / heads is not; keys and values have diversities of their own;
and it is measured before and after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorasmith.core.heads import HeadLayout, Role
from lorasmith.core.rotation import product
from lorasmith.core.variant import Factors
from lorasmith.diagnostics.records import HeadDiversity
from lorasmith.errors import ConfigError

__all__ = ["head_angles", "head_diversity", "head_gram", "mean_angle", "tuned_head_gram"]

_F64 = torch.float64
#: Elements that are widened to float64 at a time.
_BLOCK = 2**20


def head_gram(weight: Tensor, head_dim: int, axis: str = "out") -> Tensor:
    """⟨W_h, W_g⟩ of every two blocks of rows (``"out"``) or columns (``"in"``).

    Args:
        weight: W [d_out, d_in], any floating dtype.
        head_dim: Rows or columns of a block; must divide them.
        axis: Which.

    Returns:
        float64 [blocks, blocks].
    """
    return _inner(weight, weight, head_dim, axis)


def _inner(one: Tensor, other: Tensor, head_dim: int, axis: str) -> Tensor:
    """⟨X_h, Y_g⟩ of every two blocks of two matrices of equal shape, float64."""
    total: Tensor | None = None
    same = one is other
    for x in _cut(one, head_dim, axis) if same else ():
        wide = x.to(_F64).reshape(x.shape[0], -1)
        part = wide @ wide.T
        total = part if total is None else total.add_(part)
    if not same:
        for x, y in zip(_cut(one, head_dim, axis), _cut(other, head_dim, axis), strict=True):
            count = x.shape[0]
            part = x.to(_F64).reshape(count, -1) @ y.to(_F64).reshape(count, -1).T
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _cut(matrix: Tensor, head_dim: int, axis: str) -> tuple[Tensor, ...]:
    """Pieces [blocks, ...] of a matrix that hold the same part of every block."""
    rows, columns = matrix.shape
    if axis == "out":
        heads = matrix.view(rows // head_dim, head_dim, columns)
        size = max(1, _BLOCK // max(1, heads.shape[0] * columns))
        return torch.split(heads, size, dim=1)
    heads = matrix.view(rows, columns // head_dim, head_dim).transpose(0, 1)
    return torch.split(heads, max(1, _BLOCK // max(1, columns)), dim=1)


@torch.no_grad()
def tuned_head_gram(
    weight: Tensor, factors: Factors, head_dim: int, axis: str = "out", gram: Tensor | None = None
) -> Tensor:
    """⟨W'_h, W'_g⟩ of W' = W + ΔW, without W'.

    Args:
        weight: W [d_out, d_in].
        factors: Exact factors of the change.
        head_dim: As in :func:`head_gram`.
        axis: Likewise.
        gram: What :func:`head_gram` gives of W.

    Returns:
        float64 [blocks, blocks].
    """
    if not factors.exact:
        raise ConfigError(
            "The factors are not the whole change of this layer.",
            expected="factors of an adapter that only adds B A, or the tuned weight itself",
            got="factors with exact=False (DoRA, for one)",
            fix="pass the tuned weight W'",
        )
    weight = weight.detach()
    A, B = factors.A.detach().to(_F64), factors.B.detach().to(_F64)
    if factors.A0 is not None and factors.B0 is not None:
        A0, B0 = factors.A0.detach().to(_F64), factors.B0.detach().to(_F64)
        A, B = torch.cat((A - A0, A0)), torch.cat((B, B - B0), dim=1)
    left, right = factors.scaling * B, A.T
    if gram is None:
        gram = head_gram(weight, head_dim, axis)
    if axis == "in":
        weight, left, right = weight.T, right, left
    cross = _inner(product(weight, right.T), left, head_dim, "out")
    return gram + cross + cross.T + _inner(left @ (right.T @ right), left, head_dim, "out")


def head_angles(gram: Tensor) -> Tensor:
    """Angles in degrees between vectors of which ``gram`` [H, H] holds the inner products.

    Returns:
        [H, H]; 0 on the diagonal, and for a vector that is zero.
    """
    squares = gram.diagonal().clamp(min=0)
    sizes = (squares[:, None] * squares).sqrt()
    across = ((sizes - gram) * (sizes + gram)).clamp(min=0).sqrt()
    angles = torch.rad2deg(torch.atan2(across, gram))
    angles = torch.where(sizes > 0, angles, 0.0)
    return angles.fill_diagonal_(0.0)


def mean_angle(gram: Tensor) -> float:
    """Mean of :func:`head_angles` over the pairs of which neither is zero; 0 without any."""
    return _mean(head_angles(gram), gram)


def _mean(angles: Tensor, gram: Tensor) -> float:
    alive = gram.diagonal() > 0
    pairs = (alive[:, None] & alive).triu(diagonal=1)
    count = int(pairs.sum())
    return float(angles[pairs].sum()) / count if count else 0.0


@torch.no_grad()
def head_diversity(
    weight: Tensor,
    change: Factors | Tensor | None,
    layout: HeadLayout,
    *,
    name: str,
    layer: int | None = None,
    projection: str | None = None,
    matrices: bool = True,
) -> list[HeadDiversity]:
    """The diversity of each group of heads in one layer, before and after.

    Args:
        weight: W [d_out, d_in].
        change: Exact factors, or the tuned weight W' (not ΔW); ``None``: nothing changed.
        layout: How W is cut into heads.
        name: Name of the layer.
        layer: Index of its transformer block.
        projection: Default: the last part of the name.
        matrices: Whether the records hold the angles of every pair.

    Returns:
        One record for each of q, k, v and o that the layer makes with two heads or more, in
        this order; heads in theirs.
    """
    width = weight.shape[0 if layout.axis == "out" else 1]
    tuned = change if isinstance(change, Tensor) else None
    if width != layout.count * layout.head_dim or (
        tuned is not None and tuned.shape != weight.shape
    ):
        raise ConfigError(
            f"The weights of {name!r} do not fit its heads.",
            expected=f"{layout.count} heads of {layout.head_dim}, and equal shapes",
            got=[tuple(w.shape) for w in (weight, tuned) if w is not None],
            key=name,
        )
    before = after = head_gram(weight.detach(), layout.head_dim, layout.axis)
    if isinstance(change, Factors):
        after = tuned_head_gram(weight, change, layout.head_dim, layout.axis, before)
    elif tuned is not None:
        after = head_gram(tuned.detach(), layout.head_dim, layout.axis)
    records = []
    for role, blocks in _groups(layout).items():
        if len(blocks) < 2:
            continue
        index = torch.tensor(blocks, device=before.device)
        grams = [g[index][:, index] for g in (before, after)]
        angles = [head_angles(g) for g in grams]
        old, new = (tuple(map(tuple, a.tolist())) if matrices else () for a in angles)
        records.append(
            HeadDiversity(
                name=name,
                layer=layer,
                projection=projection if projection is not None else name.rpartition(".")[2],
                role=role,
                before=_mean(angles[0], grams[0]),
                after=_mean(angles[1], grams[1]),
                matrix_before=old,
                matrix_after=new,
            )
        )
    return records


def _groups(layout: HeadLayout) -> dict[Role, list[int]]:
    """Role → its blocks, in the order of the heads."""
    found: dict[Role, list[tuple[int, int]]] = {}
    for block, (role, head) in enumerate(layout.heads):
        found.setdefault(role, []).append((head, block))
    order: tuple[Role, ...] = ("q", "k", "v", "o")
    return {role: [block for _, block in sorted(found[role])] for role in order if role in found}
