"""How much of an adapter lies in given subspaces: ‖U Uᵀ ΔW Vᵀ V‖² / ‖ΔW‖², layer by layer.

Of an adapter that does nothing there is nothing to cover, so that all of it is covered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet.differences import norm_of
from lorasmith.fleet.members import Source, default_ids, open_members

__all__ = ["Coverage", "LayerCoverage", "Subspace", "coverage"]


class Subspace(Protocol):
    """What :func:`coverage` needs of a subspace, e.g. a ``SharedSubspace``."""

    @property
    def modules(self) -> Sequence[str]:
        """The layers that it has."""

    def up(self, module: str) -> Tensor:
        """U [d_out, k]."""

    def down(self, module: str) -> Tensor:
        """V [k, d_in]."""


@dataclass(frozen=True)
class LayerCoverage:
    """Shares of ‖ΔW‖² of one layer.

    Attributes:
        module: Name of the layer.
        norm: ‖ΔW‖.
        both: Share inside both spaces.
        output: Share of it whose columns are inside the column space.
        input: Share of it whose rows are inside the row space.
    """

    module: str
    norm: float
    both: float
    output: float
    input: float


@dataclass(frozen=True)
class Coverage:
    """How much of an adapter lies in a subspace.

    Attributes:
        id: The adapter.
        share: Of ‖ΔW‖² over all layers, in [0, 1]; 1 of an adapter that does nothing.
        error: √(1 − share), the relative error of its best approximation in the subspace.
        layers: The same for each layer.
        missing: Layers that the subspace does not have; nothing of them is covered.
    """

    id: str
    share: float
    error: float
    layers: tuple[LayerCoverage, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return asdict(self)


def coverage(
    source: Source, subspace: Subspace | Mapping[str, tuple[Tensor | None, Tensor | None]]
) -> Coverage:
    """The share of an adapter's ‖ΔW‖² that lies in given spaces of columns and rows.

    Args:
        source: The adapter.
        subspace: A ``SharedSubspace``; or module name → (U [d_out, k], V [l, d_in]), where
            ``None`` stands for the whole space. They need not be orthonormal.

    Raises:
        AdapterFileError: If the adapter cannot be read.
        ConfigError: If a basis does not fit its layer.
        UnsupportedFeatureError: If it has no low-rank factors.
    """
    (member,) = open_members({default_ids([source])[0]: source})
    given = (
        subspace
        if isinstance(subspace, Mapping)
        else {
            m: (subspace.up(m), subspace.down(m)) for m in subspace.modules if m in member.modules
        }
    )
    layers: list[LayerCoverage] = []
    missing: list[str] = []
    for module in member.modules:
        found = member.factors(module)
        product = found.A.double(), found.B.double()
        norm = norm_of(product)
        if module not in given:
            missing.append(module)
            layers.append(LayerCoverage(module, norm, 0.0, 0.0, 0.0))
            continue
        up, down = given[module]
        d_in, d_out = found.A.shape[1], found.B.shape[0]
        for basis, size, name in ((up, (d_out, None), "U"), (down, (None, d_in), "V")):
            fits = basis is None or (
                basis.dim() == 2
                and all(w in (None, s) for w, s in zip(size, basis.shape, strict=True))
            )
            if not fits:
                assert basis is not None
                raise ConfigError(
                    f"The basis {name} does not fit the layer.",
                    expected=[s if s is not None else "any" for s in size],
                    got=list(basis.shape),
                    key=module,
                )
        A, B = product
        inside_B = B if up is None else _orthonormal(up).T @ B
        inside_A = A if down is None else A @ _orthonormal(down.T)

        def share(A: Tensor, B: Tensor, norm: float = norm) -> float:
            return min(1.0, (norm_of((A, B)) / norm) ** 2) if norm else 1.0

        layers.append(
            LayerCoverage(
                module, norm, share(inside_A, inside_B), share(A, inside_B), share(inside_A, B)
            )
        )
    total = math.fsum(layer.norm**2 for layer in layers)
    inside = math.fsum(layer.norm**2 * layer.both for layer in layers)
    share_of_all = inside / total if total else 1.0
    return Coverage(
        member.id,
        share_of_all,
        math.sqrt(max(0.0, 1.0 - share_of_all)),
        tuple(layers),
        tuple(missing),
    )


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis [d, k] of the space of the columns, whatever their rank."""
    U, S, _ = torch.linalg.svd(columns.detach().double(), full_matrices=False)
    noise = torch.finfo(torch.float32).eps * max(columns.shape)
    found: Tensor = U[:, noise * S[:1] < S]
    return found
