"""The factors of a fleet, a few layers at a time.

Layers of one shape are stacked and go through each step together. In memory at a time are the
factors of one stack, or all of them while they fit into a limit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from lorasmith.core.config import LowRankConfig
from lorasmith.errors import AdapterFileError
from lorasmith.fleet import joint, parallel
from lorasmith.fleet.building import Progress
from lorasmith.fleet.members import Member
from lorasmith.io import peft
from lorasmith.io.tensors import FileTensors

__all__ = ["Stack", "Stacks"]

_T = TypeVar("_T")
#: (modules, their places, A, B).
Stack = tuple[tuple[str, ...], list[int], Tensor, Tensor]

#: Bytes of a stack, so that it stays in the cache while it is worked on, and its most layers.
_STACK, _MOST = 2**23, 16


class Stacks:
    """The factors of a fleet, layers of one shape at a time.

    Args:
        members: The fleet.
        modules: The layers, of all members together.
        memory: Bytes that factors may take in memory.
        progress: Called with (phase, done, total).
    """

    def __init__(
        self,
        members: Sequence[Member],
        modules: Sequence[str],
        sizes: dict[str, tuple[int, int]],
        *,
        memory: int = 2**31,
        progress: Progress | None = None,
    ) -> None:
        self.members, self.modules, self.sizes = members, tuple(modules), sizes
        self.progress = progress
        self._has = [frozenset(m.modules) for m in members]
        self.ranks = torch.zeros(len(members), len(self.modules), dtype=torch.int64)
        for n, member in enumerate(members):
            for i, module in enumerate(self.modules):
                if module in self._has[n]:
                    self.ranks[n, i] = member.rank(module)
        self._plain = [_plain(m) for m in members]
        self._where = {m: i for i, m in enumerate(self.modules)}
        self.memory = memory
        self.chunks = self._chunks(min(memory // 8, _STACK))
        whole = sum(self._bytes(chunk) for chunk in self.chunks)
        # What is mapped is read again as fast as from memory of its own.
        self._keep = whole <= memory and not all(self._plain)
        roots = 16 * sum(len(chunk) * self.rank(chunk) ** 2 for chunk in self.chunks)
        self._keep_roots = roots * len(members) <= memory // 4
        self._kept: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._buffers = threading.local()
        #: ‖ΔW‖² [N, L].
        self.energy = torch.zeros(len(members), len(self.modules), dtype=torch.float64)
        self._roots: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

        def first(chunk: tuple[str, ...]) -> None:
            T, R = self.roots(chunk)
            self.energy[:, self.places(chunk)] = (R.mT @ T).square().sum((-2, -1)).mT

        parallel.each(first, self.chunks, workers=self.workers, tell=self._teller("read"))

    @property
    def workers(self) -> int:
        """How many stacks may be in memory at a time, with what is made of them."""
        largest = max((self._bytes(chunk) for chunk in self.chunks), default=1)
        return max(1, self.memory // max(1, 4 * largest))

    def _teller(self, phase: str) -> Callable[[int], None]:
        return lambda done: self.tell(phase, done, len(self.chunks))

    def each(self, run: Callable[[Stack], _T], phase: str) -> list[_T]:
        """``run`` of (modules, their places, A, B) for each stack, several at a time.

        A and B are those of the thread, and hold the next stack after it.
        """

        def one(chunk: tuple[str, ...]) -> _T:
            return run((chunk, self.places(chunk), *self.read(chunk)))

        return parallel.each(one, self.chunks, workers=self.workers, tell=self._teller(phase))

    def places(self, chunk: Sequence[str]) -> list[int]:
        """Where the layers stand among all."""
        return [self._where[m] for m in chunk]

    def rank(self, chunk: Sequence[str]) -> int:
        """The highest rank there."""
        return max(1, int(self.ranks[:, self.places(chunk)].max()))

    def present(self, chunk: Sequence[str]) -> Tensor:
        """[L, N] booleans."""
        return (self.ranks[:, self.places(chunk)] > 0).mT

    def tell(self, phase: str, done: int, total: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(phase, done, total)

    def layer(self, module: str) -> Stack:
        """The stack of one layer alone."""
        chunk = next(c for c in self.chunks if module in c)
        A, B = self.read(chunk)
        i = chunk.index(module)
        return (module,), [self._where[module]], A[i : i + 1], B[i : i + 1]

    def roots_of(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """:meth:`roots` of the layers of a stack, which may be part of one."""
        chunk = next(c for c in self.chunks if stack[0][0] in c)
        if chunk not in self._roots:
            return joint.factor_root(stack[2]), joint.factor_root(stack[3])
        T, R = self._roots[chunk]
        inside = [chunk.index(m) for m in stack[0]]
        return T[inside], R[inside]

    def bytes_of(self, module: str) -> int:
        """Bytes of the factors of one layer."""
        return self._bytes((module,))

    def is_small(self, module: str) -> bool:
        """Whether the factors of one layer are less than one stack may be."""
        return self.bytes_of(module) < _STACK

    def _bytes(self, chunk: Sequence[str]) -> int:
        d_in, d_out = self.sizes[chunk[0]]
        return 4 * len(chunk) * len(self.members) * self.rank(chunk) * (d_in + d_out)

    def _chunks(self, memory: int) -> list[tuple[str, ...]]:
        shapes: dict[tuple[int, int], list[str]] = {}
        for module in self.modules:
            shapes.setdefault(self.sizes[module], []).append(module)
        found = []
        for names in shapes.values():
            one = max(1, self._bytes(names) // len(names))
            step = max(1, min(len(names), memory // one, _MOST))
            found += [tuple(names[i : i + step]) for i in range(0, len(names), step)]
        return found

    def read(self, chunk: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A [L, N, r, d_in] and B [L, N, r, d_out] (columns as rows), float32.

        They may lie in a buffer of this thread that is used again by its next call.
        """
        if chunk in self._kept:
            return self._kept[chunk]
        (d_in, d_out), r = self.sizes[chunk[0]], self.rank(chunk)
        A = self._buffer("A", (len(chunk), len(self.members), r, d_in))
        B = self._buffer("B", (len(chunk), len(self.members), r, d_out))
        for i, module in enumerate(chunk):
            if not self._read_at_once(module, A[i], B[i]):
                self._read_each(module, A[i], B[i])
        for n, i in (~(_finite(A) & _finite(B))).nonzero().flip(-1).tolist():
            self.members[n].factors(chunk[i])  # names file and tensor
            raise AdapterFileError(
                f"A factor of the adapter {self.members[n].id!r} is not finite.", key=chunk[i]
            )
        if self._keep:
            self._kept[chunk] = (A, B)
        return A, B

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory for a stack: new pages cost as much time as the reading itself."""
        if self._keep:
            return torch.empty(shape)
        size = math.prod(shape)
        held: Tensor | None = getattr(self._buffers, name, None)
        if held is None or held.numel() < size:
            held = torch.empty(size)
            setattr(self._buffers, name, held)
        return held[:size].view(shape)

    def _read_at_once(self, module: str, A: Tensor, B: Tensor) -> bool:
        """Reads a layer that all adapters have alike, or says that they do not."""
        if not all(self._plain):
            return False
        key = f"{peft.PREFIX}{module}.lora_"
        place = self._where[module]
        if (
            int(self.ranks[:, place].min()) != A.shape[1]
            or int(self.ranks[:, place].max()) != (A.shape[1])
        ):
            return False
        sources = [cast("FileTensors", m.weights.tensors) for m in self.members]
        if any(s.dtype(f"{key}{side}.weight") != torch.float32 for s in sources for side in "AB"):
            return False
        torch.stack([s.view(f"{key}A.weight") for s in sources], out=A)
        stored = self._buffer("stored", (len(sources), B.shape[2], B.shape[1]))
        torch.stack([s.view(f"{key}B.weight") for s in sources], out=stored)
        scalings = [_scaling(m, module) for m in self.members]
        if any(s != 1 for s in scalings):
            stored *= torch.tensor(scalings)[:, None, None]
        B.copy_(stored.mT)
        return True

    def _read_each(self, module: str, A: Tensor, B: Tensor) -> None:
        """Reads a layer of one adapter after the other; missing rows are zero."""
        for n, member in enumerate(self.members):
            rank = 0
            if module in self._has[n]:
                own_A, own_B = _factors(member, module)
                rank = len(own_A)
                A[n, :rank] = own_A
                B[n, :rank] = own_B.mT
            A[n, rank:] = 0
            B[n, rank:] = 0

    def roots(self, chunk: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """:func:`lorasmith.fleet.joint.factor_root` of A and of B, [L, N, r, r]."""
        if chunk in self._roots:
            return self._roots[chunk]
        A, B = self.read(chunk)
        found = joint.factor_root(A), joint.factor_root(B)
        if self._keep_roots:
            self._roots[chunk] = found
        return found


def _plain(member: Member) -> bool:
    """Whether the factors are tensors of a file as they are, B times the scaling."""
    weights = member.weights
    plain = weights.variant.name in ("lora", "dora") and not weights.frozen
    return plain and isinstance(weights.tensors, FileTensors)


def _scaling(member: Member, module: str) -> float:
    return cast("LowRankConfig", member.weights.config).scaling_of(module)


def _factors(member: Member, module: str) -> tuple[Tensor, Tensor]:
    """A and scaled B; values of plain files are not checked one by one."""
    weights = member.weights
    if weights.variant.name in ("lora", "dora") and not weights.frozen:
        key = f"{peft.PREFIX}{module}.lora_"
        tensors = weights.tensors
        get = tensors.view if isinstance(tensors, FileTensors) else tensors.__getitem__
        A, B = get(f"{key}A.weight"), get(f"{key}B.weight")
        return A.float(), B.float() * _scaling(member, module)
    found = member.factors(module)
    return found.A, found.B


def _finite(X: Tensor) -> Tensor:
    """Whether all of [L, N, r, d] is finite, [L, N]: the sum of what is not is not."""
    return torch.isfinite(X.sum((-2, -1)))
