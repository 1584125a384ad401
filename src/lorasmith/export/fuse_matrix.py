"""One matrix with adapters in it, and what rounding has left of the change.

    W' = round(W + Σ w ΔW)

A block of rows at a time where ΔW = L R is all that the adapters do (L [rows, r], R [r, columns],
in the layout that is stored), otherwise the whole matrix at once from the variant's effective
weight. ``wide`` is the dtype of computing, float64 where what is read or written is float32, and
float32 otherwise; it is rounded once, to the dtype that is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.errors import FuseError
from lorasmith.export.fuse_adapters import Part
from lorasmith.export.fuse_tensors import Stored
from lorasmith.export.shards import KINDS

__all__ = ["Embedding", "FusedMatrix", "FusedWeight", "Measured", "finite", "narrowed"]

#: (A [r, vocabulary], B [d, r], scaling) of a LoRA on an embedding.
Embedding = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class FusedWeight:
    """What fusing did to one matrix.

    Attributes:
        name: Name of its layer.
        delta_norm: ‖ΔW‖, Frobenius norm of the change.
        weight_norm: ‖W‖ before.
        rounding_error: ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ (0 where nothing changed).
        unmoved: Share of the entries with ΔW ≠ 0 that are, once rounded, what W rounds to:
            there the change is lost.
    """

    name: str
    delta_norm: float
    weight_norm: float
    rounding_error: float
    unmoved: float


class Measured:
    """Sums over the blocks of one matrix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.change = self.weight = self.lost = 0.0
        self.moved = self.stuck = 0

    def add(self, before: Tensor, wanted: Tensor, out: Tensor) -> None:
        """Counts a block: W and W + ΔW in the dtype of computing, and what is written."""
        delta = wanted - before
        moved = delta != 0
        self.change += _square(delta)
        self.weight += _square(before)
        self.stuck += int((moved & (out == before.to(out.dtype))).sum())
        self.moved += int(moved.sum())
        self.lost += _square(torch.sub(out.to(wanted.dtype), wanted, out=delta))

    def record(self) -> FusedWeight:
        """The figures."""
        change = math.sqrt(self.change)
        return FusedWeight(
            self.name,
            change,
            math.sqrt(self.weight),
            math.sqrt(self.lost) / change if change else 0.0,
            self.stuck / self.moved if self.moved else 0.0,
        )


def _square(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2


class FusedMatrix(Stored):
    """A matrix of the base with adapters in it, given in the dtype that is written.

    Args:
        module: Name of the layer or embedding.
        start: The matrix before, the base's or an adapter's copy.
        acting: The adapters that act on the layer.
        embedded: The LoRAs on the embedding.
        out: The dtype that is written.
        wide: The dtype of computing.
        sums: What is counted of the blocks.
    """

    def __init__(
        self,
        module: str,
        start: Stored,
        acting: Sequence[Part],
        embedded: Sequence[Embedding],
        out: torch.dtype,
        wide: torch.dtype,
        sums: Measured,
    ) -> None:
        self.shape, self.dtype, self.kind = start.shape, out, KINDS[out]
        self._module, self._start, self._sums = module, start, sums
        self._acting, self._embedded, self._wide = acting, embedded, wide

    def blocks(self) -> Iterator[Tensor]:
        low = self._low_rank()
        if low is None:
            yield from self._whole()
            return
        left, right = low
        first = 0
        for block in self._start.blocks():
            before = block.to(self._wide)
            rows = left[first : first + block.shape[0]]
            wanted = torch.addmm(before, rows, right)
            yield self._written(before, wanted)
            first += block.shape[0]

    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(L, R) with ΔW = L R in the layout that is stored; ``None`` if it is not all."""
        wide = self._wide
        lefts, rights = [], []
        for A, B, scaling in self._embedded:
            # E [vocabulary, d] is stored as a Conv1D's weight is.
            lefts.append(A.to(wide).T * scaling)
            rights.append(B.to(wide).T)
        for part in self._acting:
            state = part.state(self._module, wide)
            found = part.weights.variant.factors(state)
            if found is None or not found.exact:
                return None
            A, B = found.stacked()
            B = B * (found.scaling * part.weight)
            transposed = state.info.kind == "conv1d"
            lefts.append(A.T if transposed else B)
            rights.append(B.T if transposed else A)
        return torch.cat(lefts, dim=1).contiguous(), torch.cat(rights).contiguous()

    def _whole(self) -> Iterator[Tensor]:
        stored = torch.empty(self.shape, dtype=self._wide)
        first = 0
        for block in self._start.blocks():
            stored[first : first + block.shape[0]].copy_(block)
            first += block.shape[0]
        transposed = self._acting[0].infos[self._module].kind == "conv1d"
        weight = stored.T if transposed else stored
        wanted: Tensor | None = None
        for part in self._acting:
            state = part.state(self._module, self._wide)
            made = part.weights.variant.effective_weight(state, weight)
            if len(self._acting) == 1 and part.weight == 1.0:
                wanted = made
            else:
                change = made.sub(weight).mul_(part.weight)
                wanted = weight + change if wanted is None else wanted.add_(change)
        assert wanted is not None
        wanted = wanted.T if transposed else wanted
        for before, after in zip(
            torch.split(stored, self.rows), torch.split(wanted, self.rows), strict=True
        ):
            yield self._written(before, after)

    def _written(self, before: Tensor, wanted: Tensor) -> Tensor:
        if not bool(torch.isfinite(wanted).all()) and not bool(torch.isfinite(before).all()):
            raise FuseError(
                f"The base's weight of {self._module} is not finite.",
                expected="finite numbers",
                got="NaN or infinity",
                fix="download or save the base model again",
                file=self._start.file,
                key=self._module,
            )
        finite(wanted, self._module)
        assert self.dtype is not None
        out = narrowed(wanted, self.dtype, self._module)
        self._sums.add(before, wanted, out)
        return out


def finite(value: Tensor, name: str) -> Tensor:
    """The value itself; raises a ``FuseError`` if a number in it is NaN or infinite."""
    if not bool(torch.isfinite(value).all()):
        raise FuseError(
            f"Fusing into {name} gives a weight that is not finite.",
            expected="finite numbers",
            got="NaN or infinity",
            fix="check the adapter: lorasmith info PATH",
            key=name,
        )
    return value


def narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A cast that makes no infinity of a number."""
    if value.dtype == dtype:
        return value.contiguous()
    out = value.to(dtype).contiguous()
    if dtype == torch.float16 and bool((torch.isinf(out) & torch.isfinite(value)).any()):
        raise FuseError(
            "A weight is too large for float16, which ends at 65504.",
            key=name,
            fix='dtype="bfloat16", or "auto"',
        )
    return out
