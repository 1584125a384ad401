"""One adapter against another, layer by layer and exactly.

Differences of ΔW come through QR of both factors side by side in float64, without forming ΔW;
with them go the principal angles of column and row spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lorasmith.fleet.analysis import scipy_part
from lorasmith.fleet.members import Member, Source, default_ids, open_members

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Diff", "LayerDiff", "Product", "diff", "norm_of"]

_Array: TypeAlias = "NDArray[np.float64]"
_Progress: TypeAlias = Callable[[str, int, int], None] | None
#: (A [r, d_in], B [d_out, r]), float64.
Product: TypeAlias = tuple[Tensor, Tensor]

#: Directions below this share of a layer's largest singular value are rounding.
_NOISE = 1e-6


@dataclass(frozen=True)
class LayerDiff:
    """Two adapters on one layer.

    Attributes:
        module: Name of the layer.
        norm_a, norm_b: ‖ΔW‖ of each; 0 where it does not adapt the layer.
        difference: ‖ΔW_a − ΔW_b‖.
        relative: The same over max(‖ΔW_a‖, ‖ΔW_b‖); 0 where both are 0.
        cosine: Of the two; ``None`` where one is 0.
        rank_a, rank_b: Numerical ranks.
        output_angles: Principal angles of the column spaces in degrees, the smallest one first.
        input_angles: Those of the row spaces.
    """

    module: str
    norm_a: float
    norm_b: float
    difference: float
    relative: float
    cosine: float | None
    rank_a: int
    rank_b: int
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]


@dataclass(frozen=True)
class Diff:
    """Two adapters, layer by layer.

    Attributes:
        a, b: Their names.
        layers: One record for each layer that at least one of them adapts.
        norm_a, norm_b, difference, relative, cosine: As in :class:`LayerDiff`, of all layers.
        only_a, only_b: Layers that only one of them adapts.
        rest: Tensor beside the factors (DoRA's magnitudes, modules_to_save) → relative
            difference; ``None`` where only one has it or the shapes differ.
        notes: What the figures leave out.
    """

    a: str
    b: str
    layers: tuple[LayerDiff, ...]
    norm_a: float
    norm_b: float
    difference: float
    relative: float
    cosine: float | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    rest: Mapping[str, float | None]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return asdict(self)


def diff(
    a: Source,
    b: Source,
    *,
    allow_base_mismatch: bool = False,
    progress: _Progress = None,
) -> Diff:
    """Compares two adapters layer by layer, exactly.

    Args:
        a: The one.
        b: The other.
        allow_base_mismatch: Whether they may be of different base models.
        progress: Called with ("diff", layers done, layers).

    Raises:
        AdapterFileError: If one cannot be read.
        BaseMismatchError: If they are of different base models.
        UnsupportedFeatureError: If one has no low-rank factors.
        MissingDependencyError: SciPy is not installed.
    """
    angles = scipy_part("linalg").subspace_angles
    # A mapping: each is one adapter, and a directory of several is refused with their names.
    first, second = open_members(
        dict(zip(default_ids([a, b]), [a, b], strict=True)),
        allow_base_mismatch=allow_base_mismatch,
    )
    modules = list(dict.fromkeys((*first.modules, *second.modules)))
    records = []
    inner = 0.0
    for done, module in enumerate(modules):
        left, right = (_wide(m, module) for m in (first, second))
        norm_a, norm_b = (norm_of(p) for p in (left, right))
        difference = norm_of(_minus(left, right))
        product = _inner(left, right)
        inner += product
        (U_a, V_a), (U_b, V_b) = (_spaces(p) for p in (left, right))
        shared = bool(U_a.shape[1] and U_b.shape[1])
        largest = max(norm_a, norm_b)
        records.append(
            LayerDiff(
                module=module,
                norm_a=norm_a,
                norm_b=norm_b,
                difference=difference,
                relative=difference / largest if largest else 0.0,
                cosine=_cosine(product, norm_a, norm_b),
                rank_a=U_a.shape[1],
                rank_b=U_b.shape[1],
                output_angles=_degrees(angles(U_a, U_b)) if shared else (),
                input_angles=_degrees(angles(V_a, V_b)) if shared else (),
            )
        )
        if progress is not None:
            progress("diff", done + 1, len(modules))
    norm_a, norm_b, difference = (
        math.sqrt(math.fsum(getattr(r, key) ** 2 for r in records))
        for key in ("norm_a", "norm_b", "difference")
    )
    notes = []
    if first.dora or second.dora:
        notes.append(
            "DoRA is compared by its low-rank part; its magnitudes stand under the other tensors"
        )
    return Diff(
        a=first.id,
        b=second.id,
        layers=tuple(records),
        norm_a=norm_a,
        norm_b=norm_b,
        difference=difference,
        relative=difference / max(norm_a, norm_b) if max(norm_a, norm_b) else 0.0,
        cosine=_cosine(inner, norm_a, norm_b),
        only_a=tuple(m for m in first.modules if m not in second.modules),
        only_b=tuple(m for m in second.modules if m not in first.modules),
        rest=_rest(first, second),
        notes=tuple(notes),
    )


def _wide(member: Member, module: str) -> Product | None:
    if module not in member.modules:
        return None
    found = member.factors(module)
    return found.A.double(), found.B.double()


def _minus(left: Product | None, right: Product | None) -> Product | None:
    if left is None or right is None:
        return left if right is None else right
    return torch.cat((left[0], right[0])), torch.cat((left[1], -right[1]), dim=1)


def norm_of(product: Product | None) -> float:
    """‖B A‖ without cancellation: of a product of two triangles."""
    if product is None:
        return 0.0
    A, B = product
    small = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T
    return float(torch.linalg.vector_norm(small))


def _inner(left: Product | None, right: Product | None) -> float:
    if left is None or right is None:
        return 0.0
    return float(((left[1].T @ right[1]) * (left[0] @ right[0].T)).sum())


def _cosine(inner: float, a: float, b: float) -> float | None:
    return max(-1.0, min(1.0, inner / (a * b))) if a and b else None


def _spaces(product: Product | None) -> tuple[_Array, _Array]:
    """Orthonormal bases of column and row space [d_out, k], [d_in, k]; of numerical rank k."""
    if product is None:
        return np.zeros((0, 0)), np.zeros((0, 0))
    A, B = product
    q_out, r_out = torch.linalg.qr(B)
    q_in, r_in = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    k = int((_NOISE * S[0] < S).sum()) if S.numel() and float(S[0]) > 0 else 0
    return (q_out @ U[:, :k]).numpy(force=True), (q_in @ Vh[:k].T).numpy(force=True)


def _degrees(angles: _Array) -> tuple[float, ...]:
    return tuple(float(x) for x in np.sort(np.degrees(angles)))


def _rest(first: Member, second: Member) -> dict[str, float | None]:
    mine, theirs = first.rest, second.rest
    found: dict[str, float | None] = {}
    for key in dict.fromkeys((*mine, *theirs)):
        if key not in mine or key not in theirs:
            found[key] = None
            continue
        a, b = mine[key].double(), theirs[key].double()
        if a.shape != b.shape:
            found[key] = None
            continue
        largest = max(float(a.norm()), float(b.norm()))
        found[key] = float((a - b).norm()) / largest if largest else 0.0
    return found
