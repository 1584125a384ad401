"""Building a shared subspace from adapters that are read one at a time.

**Joint.** The two scatter matrices of a layer are kept as leading eigenvectors and eigenvalues,
(E, Λ), and a block of adapters with rows X (see :mod:`lorasmith.fleet.joint`) is merged in:
E' Λ' E'ᵀ = E Λ Eᵀ + Xᵀ X in the span of both, cut to ``most`` directions. As long as there is
room for it (``_WHOLE``), a layer's matrices are kept whole instead when something would be cut,
which is exact and, with d of some hundreds, several times as fast. Memory is ``most``
(d_in + d_out) numbers a layer beside that, and one block of adapters, whatever their number; what
grows is the result, the cores.

Where the adapters can be read twice, cores are made in a second pass against the final basis,
each with its exact error, and the numbers of directions are chosen then. Where they come once
(a generator), a core is made when its adapter passes, and turned with the basis afterwards; each
truncation in between moves it by a known amount δ, and the error reported is the bound (Σ δ)².

**Share.** The first block is built at once, and decides about the gauge; further ones are absorbed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet import joint, parallel, share
from lorasmith.fleet.building import Built, Progress, Target
from lorasmith.fleet.building_joint import joint_pairs, pair_costs
from lorasmith.fleet.codes import Layer, absent, coded
from lorasmith.fleet.members import (
    BaseCheck,
    Member,
    Source,
    default_ids,
    expand,
    open_members,
)
from lorasmith.fleet.trimming import split, trim
from lorasmith.io.weights import BaseModel

__all__ = ["JointStream", "Stream", "blocks", "merge"]

#: Bytes of matrices [d, d] that may be kept whole.
_WHOLE = 2**29


def merge(basis: Tensor, values: Tensor, rows: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merges rows into the leading directions of a scatter matrix.

    Args:
        basis: [R, d], orthonormal rows.
        values: [R], their eigenvalues.
        rows: [n, d].
        most: Directions to keep.

    Returns:
        The new basis [R', d], R' ≤ most; its eigenvalues; and T [R, R'], with which coordinates
        in the old basis become coordinates in the new one, all float64.
    """
    basis, rows = basis.to(torch.float64), rows.to(torch.float64)
    inside = rows @ basis.mT
    rest = rows - inside @ basis
    again = rest @ basis.mT  # once more, since what is left may be small
    inside, rest = inside + again, rest - again @ basis
    # Directions of Q that the rows do not have are arbitrary; their eigenvalues are 0 below.
    Q, R = torch.linalg.qr(rest.mT)
    wide, coordinates = torch.cat((basis, Q.mT)), torch.cat((inside, R.mT), dim=1)
    scatter = coordinates.mT @ coordinates
    scatter[: len(values), : len(values)] += torch.diag(values.to(scatter))
    found, vectors = torch.linalg.eigh(scatter)
    found, vectors = found.flip(-1)[:most], vectors.flip(-1)[:, :most]
    keep = found > 1e-13 * found[:1]
    found, vectors = found[keep], vectors[:, keep]
    return vectors.mT @ wide, found, vectors[: len(values)]


def blocks(members: Iterable[Member], size: int) -> Iterator[list[Member]]:
    """The members in groups of at most that many."""
    group: list[Member] = []
    for member in members:
        group.append(member)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class Stream:
    """Adapters one after the other, opened and checked as they come; twice if that is possible.

    Attributes:
        again: Whether they can be gone through more than once.
        total: Their number, 0 where it is not known.
    """

    def __init__(
        self,
        sources: Iterable[Source] | Mapping[str, Source],
        ids: Iterable[str] | None,
        allow_base_mismatch: bool,
    ) -> None:
        if isinstance(sources, Mapping):
            if ids is not None:
                raise ConfigError("A mapping brings its own ids.", fix="leave ids out", key="ids")
            ids, sources = list(sources), list(sources.values())
        self.again = isinstance(sources, Collection)
        self._sources: Iterable[Source] = expand(sources) if self.again else sources
        self._ids = None if ids is None else iter(ids)
        self._allow = allow_base_mismatch
        self._names: list[str] = []
        self._check = BaseCheck(allow_base_mismatch=allow_base_mismatch)
        self._checked = False
        self.total = 0
        if self.again:
            given = cast("Sequence[Source]", self._sources)
            self.total = len(given)
            self._names = list(self._ids) if self._ids is not None else default_ids(given)
            if len(self._names) != self.total or len(set(self._names)) != self.total:
                raise ConfigError(
                    "Ids are not one for each adapter, each of them once.",
                    expected=f"{self.total} different ids",
                    got=f"{len(set(self._names))} different ones of {len(self._names)}",
                    key="ids",
                )

    @property
    def base(self) -> BaseModel:
        """What is known of their base model so far."""
        return self._check.base

    def __iter__(self) -> Iterator[Member]:
        taken: set[str] = set()
        for number, source in enumerate(self._sources):
            if self.again:
                name = self._names[number]
            elif self._ids is not None:
                name = next(self._ids, "")
            else:
                name = default_ids([source])[0]
                if name in taken:
                    name = f"{name}#{number + 1}"
            if name in taken:
                raise ConfigError(
                    "Two adapters have the same id.",
                    expected="unique ids",
                    got=repr(name),
                    key="ids",
                )
            taken.add(name)
            (member,) = open_members({name: source}, allow_base_mismatch=self._allow)
            if not self._checked:
                self._check.add(member)
            yield member
        if not self._checked:
            self._checked = True
            self._check.warn()


@dataclass
class _Side:
    """Σ Xᵀ X of the rows on one side of a layer: its leading directions, or all of it.

    Attributes:
        basis: [R, d], orthonormal rows, float64.
        values: [R], their eigenvalues.
        room: Whether it may be kept whole, as soon as directions would have to be dropped.
        whole: [d, d] then.
    """

    basis: Tensor
    values: Tensor
    room: bool
    whole: Tensor | None = None

    @classmethod
    def empty(cls, d: int, room: bool) -> _Side:
        """Before the first row."""
        wide = torch.float64
        return cls(torch.zeros(0, d, dtype=wide), torch.zeros(0, dtype=wide), room)

    def add(self, rows: Tensor, most: int) -> Tensor:
        """Enters rows [n, d]; T [R, R'] of :func:`merge`, where directions are kept."""
        if self.room and self.whole is None and len(self.basis) + len(rows) > most:
            self.whole = (self.basis.mT * self.values) @ self.basis
        if self.whole is None:
            self.basis, self.values, turn = merge(self.basis, self.values, rows, most)
            return turn
        self.whole.addmm_(rows.mT, rows)
        return rows.new_zeros(0, 0)

    def close(self, keep: int) -> None:
        """Leaves at most so many leading directions; there are no rows after this."""
        if self.whole is not None:
            values, vectors = torch.linalg.eigh(self.whole)
            kept = values > 1e-13 * values[-1:]
            self.values, self.basis = values[kept].flip(-1), vectors[:, kept].flip(-1).mT
            self.whole = None
        self.values, self.basis = self.values[:keep], self.basis[:keep].contiguous()


@dataclass
class _State:
    """One layer while adapters pass."""

    up: _Side
    down: _Side
    #: Block number → (T of up, T of down) that followed on it.
    turns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: Adapter number → (block, left, right).
    cores: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)
    energy: dict[int, float] = field(default_factory=dict)
    rank: dict[int, int] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.up.basis.shape[1], self.down.basis.shape[1]


@dataclass(frozen=True)
class _Held:
    """The adapters that have a layer, in the final basis."""

    numbers: list[int]
    ranks: list[int]
    left: Tensor  # [n, r, R_u], float64
    right: Tensor  # [n, r, R_d]
    gone: Tensor  # [n], the norm that was lost on the way


@dataclass(frozen=True)
class _Read:
    """A layer's factors of those of a block of adapters that have it."""

    who: list[int]
    ranks: list[int]
    A: Tensor  # [n, r, d_in], filled up with rows of zeros
    B: Tensor  # [n, r, d_out], the columns of B as rows
    energy: Tensor  # [n], ‖B A‖², float64


def _read(module: str, members: Sequence[Member]) -> _Read:
    who = [k for k, member in enumerate(members) if module in member.modules]
    factors = [members[k].factors(module) for k in who]
    ranks = [f.rank for f in factors]
    A = torch.zeros(len(who), max(ranks), factors[0].A.shape[1])
    B = torch.zeros(len(who), max(ranks), factors[0].B.shape[0])
    for i, f in enumerate(factors):
        A[i, : f.rank], B[i, : f.rank] = f.A, f.B.mT
    return _Read(who, ranks, A, B, joint.norms(A.double(), B.double()))


@dataclass(frozen=True)
class _Options:
    """Where a layer's basis can be cut, (R_u, R_d)."""

    sizes: list[tuple[int, int]]
    lost: Tensor  # [N, options]
    bytes: Tensor  # [options]
    spectra: Tensor  # [N, r], squared singular values of each core


class JointStream:
    """The joint basis of adapters that pass one block at a time.

    Args:
        most: Directions that are kept of each side of a layer on the way.
        keep: Directions that are kept in the end; as many by default.
        relative: Whether every adapter counts alike, whatever its norm.
        once: Whether cores are made while adapters pass; else :meth:`code` makes them later.
    """

    def __init__(
        self, most: int, *, keep: int | None = None, relative: bool = True, once: bool = False
    ) -> None:
        self.most, self.relative, self.once = most, relative, once
        self.keep = most if keep is None or once else keep
        self.layers: dict[str, _State] = {}
        self.count = 0
        self.block = 0
        self._left = _WHOLE
        self._closed = False

    def feed(self, members: Sequence[Member]) -> None:
        """Merges a block of adapters into the basis."""
        numbers = range(self.count, self.count + len(members))
        modules = list(dict.fromkeys(m for member in members for m in member.modules))
        read = parallel.each(lambda m: _read(m, members), modules)
        totals = torch.zeros(len(members), dtype=torch.float64)
        for one in read:
            totals[one.who] += one.energy
        weights = torch.ones_like(totals)
        if self.relative:
            weights = torch.where(totals > 0, totals, weights).rsqrt()
        for module, one in zip(modules, read, strict=True):
            state = self._state(module, one)
            for i, k in enumerate(one.who):
                state.energy[numbers[k]] = float(one.energy[i])
                state.rank[numbers[k]] = one.ranks[i]

        def enter(place: int) -> None:
            state, one = self.layers[modules[place]], read[place]
            A, B = one.A.double(), one.B.double()
            scale = weights[one.who][:, None, None]
            rows_up = scale * (joint.root(A @ A.mT).mT @ B)
            rows_down = scale * (joint.root(B @ B.mT).mT @ A)
            turns = (
                state.up.add(rows_up.flatten(0, 1), self.most),
                state.down.add(rows_down.flatten(0, 1), self.most),
            )
            if self.once:
                state.turns[self.block] = turns
                self._code(state, one, numbers)

        parallel.each(enter, range(len(modules)))
        self.count += len(members)
        self.block += 1

    def _state(self, module: str, one: _Read) -> _State:
        if module not in self.layers:
            d_out, d_in = one.B.shape[-1], one.A.shape[-1]
            # Turns are not known of what is kept whole.
            wanted = 8 * (d_out**2 + d_in**2)
            room = not self.once and wanted <= self._left
            self._left -= wanted if room else 0
            self.layers[module] = _State(_Side.empty(d_out, room), _Side.empty(d_in, room))
        return self.layers[module]

    def close(self) -> None:
        """Ends the first pass: the basis is final."""
        if self._closed:
            return
        self._closed = True

        def end(state: _State) -> None:
            state.up.close(self.keep)
            state.down.close(self.keep)

        parallel.each(end, list(self.layers.values()))

    def code(self, first: int, members: Sequence[Member]) -> None:
        """Makes the cores of adapters, the first of which has that number, in the final basis."""
        self.close()
        numbers = range(first, first + len(members))
        modules = list(dict.fromkeys(m for member in members for m in member.modules))
        parallel.each(lambda m: self._code(self.layers[m], _read(m, members), numbers), modules)

    def _code(self, state: _State, one: _Read, numbers: Sequence[int]) -> None:
        left = (one.B.double() @ state.up.basis.mT).float()
        right = (one.A.double() @ state.down.basis.mT).float()
        for i, (k, rank) in enumerate(zip(one.who, one.ranks, strict=True)):
            state.cores[numbers[k]] = (self.block, left[i, :rank].clone(), right[i, :rank].clone())

    def _held(self, state: _State) -> _Held:
        """All cores in the final basis, and √ of what was lost on the way."""
        last = max(state.turns, default=-1)
        # Turns after each block put together, from the last one backwards.
        after: dict[int, list[tuple[Tensor, Tensor]]] = {}
        chain: list[tuple[Tensor, Tensor]] = []
        for block in range(last, -1, -1):
            after[block] = list(chain)
            if block in state.turns:
                chain.insert(0, state.turns[block])
        numbers = list(state.cores)
        ranks = [len(left) for _, left, _ in state.cores.values()]
        r = max(ranks)
        left = torch.zeros(len(numbers), r, len(state.up.basis), dtype=torch.float64)
        right = torch.zeros(len(numbers), r, len(state.down.basis), dtype=torch.float64)
        gone = torch.zeros(len(numbers), dtype=torch.float64)
        for i, (block, one, other) in enumerate(state.cores.values()):
            turns = after.get(block, [])
            if turns:
                one, other = one.double(), other.double()
                kept = _square(one, other)
                gone[i] = max(0.0, state.energy[numbers[i]] - kept) ** 0.5
                for turn_up, turn_down in turns:
                    one, other = one @ turn_up, other @ turn_down
                    now = _square(one, other)
                    gone[i] += max(0.0, kept - now) ** 0.5
                    kept = now
            left[i, : len(one)], right[i, : len(other)] = one, other
        whole = torch.tensor([state.energy[n] for n in numbers], dtype=torch.float64)
        never = [i for i, (block, _, _) in enumerate(state.cores.values()) if not after.get(block)]
        gone[never] = (whole - joint.norms(right, left)).clamp_min(0).sqrt()[never]
        return _Held(numbers, ranks, left, right, gone)

    def _options(self, state: _State, target: Target) -> _Options:
        """What each cut of a layer's basis loses, and costs."""
        N, held = self.count, self._held(state)
        sizes = joint_pairs(len(state.up.basis), len(state.down.basis), target)
        ups, downs = sorted({a for a, _ in sizes}), sorted({b for _, b in sizes})
        norms = joint.norms(held.right, held.left)
        table = joint.lost(held.left[None], held.right[None], norms[None], ups, downs)[0]
        flat = table[:, [ups.index(a) for a, _ in sizes], [downs.index(b) for _, b in sizes]]
        # Against the final basis both losses are at right angles; else they may add up.
        before = held.gone.unsqueeze(1)
        both = (flat.sqrt() + before).square() if self.once else flat + before.square()
        lost = torch.zeros(N, len(sizes), dtype=torch.float64)
        lost[held.numbers] = both
        ranks = torch.zeros(N, dtype=torch.float64)
        ranks[held.numbers] = torch.tensor(held.ranks, dtype=torch.float64)
        inner = joint.factor_root(held.left).mT @ joint.factor_root(held.right)
        spectra = torch.zeros(N, inner.shape[-1], dtype=torch.float64)
        spectra[held.numbers] = torch.linalg.eigvalsh(inner.mT @ inner).flip(-1).clamp_min(0)
        return _Options(sizes, lost, pair_costs(sizes, ranks, state.sizes), spectra)

    def _layer(self, module: str, state: _State, a: int, b: int) -> Layer:
        """A layer cut to (a, b) directions."""
        up, down = state.up.basis[:a].float(), state.down.basis[:b].float()
        layer, held = Layer.new(module, up, down, self.count), self._held(state)
        codes = [absent(layer.sizes, (a, b))] * self.count
        right, left = share.balance(held.right[..., :b], held.left[..., :a])
        for i, (n, rank) in enumerate(zip(held.numbers, held.ranks, strict=True)):
            codes[n] = coded(left[i, :rank].float(), right[i, :rank].float(), layer.sizes)
        layer.fill(codes)
        return layer

    def build(self, target: Target, progress: Progress | None = None) -> tuple[Built, Tensor]:
        """Layers cut to the target, and ‖ΔW‖² [N, L].

        Args:
            target: With ``error`` or ``components``.
            progress: Called with (phase, done, total).
        """
        self.close()
        modules, states = list(self.layers), list(self.layers.values())

        def teller(phase: str) -> Callable[[int], None] | None:
            return None if progress is None else lambda n: progress(phase, n, len(modules))

        energy = torch.zeros(self.count, len(modules), dtype=torch.float64)
        for place, state in enumerate(states):
            values = torch.tensor(list(state.energy.values()), dtype=torch.float64)
            energy[list(state.energy), place] = values
        options = parallel.each(
            lambda state: self._options(state, target), states, tell=teller("choose")
        )
        tables = [one.lost for one in options]
        pairs = [one.sizes for one in options]
        costs = [one.bytes for one in options]
        spectra = [one.spectra for one in options]
        total = energy.sum(1)
        if target.error is not None and self.once:
            chosen = joint.choose(tables, costs, target.error * total)
        elif target.error is not None:
            chosen = self._split(tables, pairs, spectra, target.error * total)
        else:
            chosen = [0] * len(modules)
        sizes = [pairs[place][c] for place, c in enumerate(chosen)]
        layers = parallel.each(
            lambda place: self._layer(modules[place], states[place], *sizes[place]),
            range(len(modules)),
            tell=teller("layers"),
        )
        lost = torch.stack([table[:, c] for table, c in zip(tables, chosen, strict=True)], 1)
        if target.error is not None and not self.once:
            lost += trim(layers, target.error * total - lost.sum(1))
        return Built(layers, lost), energy

    def _split(
        self,
        tables: Sequence[Tensor],
        pairs: Sequence[Sequence[tuple[int, int]]],
        spectra: Sequence[Tensor],
        budget: Tensor,
    ) -> list[int]:
        """The option of each layer, where cores are trimmed afterwards."""
        sizes = [state.sizes for state in self.layers.values()]
        most = max(s.shape[1] for s in spectra)
        pad = torch.nn.functional.pad

        def cost(place: int, ranks: Tensor) -> Tensor:
            return pair_costs(pairs[place], ranks.to(torch.float64), sizes[place])

        energies = torch.stack([pad(s, (0, most - s.shape[1])) for s in spectra])
        return split(tables, pairs, cost, energies, budget)


def _square(left: Tensor, right: Tensor) -> float:
    return max(0.0, float(((left @ left.mT) * (right @ right.mT)).sum()))
