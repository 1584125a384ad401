"""Building a shared subspace from adapters that are read one at a time.

**Joint.** The two scatter matrices of a layer are kept as leading eigenvectors and eigenvalues,
(E, Λ), and a block of adapters with rows X (see :mod:`lorasmith.fleet.joint`) is merged in:
E' Λ' E'ᵀ = E Λ Eᵀ + Xᵀ X in the span of both, cut to ``most`` directions. Memory is
``most`` (d_in + d_out) numbers a layer, and one block of adapters, whatever their number; what
grows is the result, the cores.

Where the adapters can be read twice, cores are made in a second pass against the final basis,
each with its exact error, and the numbers of directions are chosen then. Where they come once
(a generator), a core is made when its adapter passes, and turned with the basis afterwards; each
truncation in between moves it by a known amount δ, and the error reported is the bound (Σ δ)².

**Share.** The first block is built at once, and decides about the gauge; further ones are absorbed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet import incremental, joint, share
from lorasmith.fleet.building import (
    Built,
    Progress,
    Target,
    absent,
    coded,
    joint_pairs,
    pair_costs,
)
from lorasmith.fleet.codes import Layer
from lorasmith.fleet.members import (
    Member,
    Source,
    check_base,
    default_ids,
    expand,
    open_members,
)
from lorasmith.fleet.trimming import split, trim
from lorasmith.io.weights import BaseModel

__all__ = ["JointStream", "Stream", "blocks", "merge"]


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
    wide, coordinates = incremental.append(basis, rows)
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
        base: What is known of their base model so far.
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
        self.base = BaseModel()
        self._seen: dict[str, tuple[tuple[int, int], Member]] = {}
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
        self._first: Member | None = None

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
            if self._first is None:
                self._first, self.base = member, member.weights.base
            else:
                # Against the first one, and every layer against the one that had it first.
                check_base([self._first, member], allow_base_mismatch=self._allow)
            for module, size in member.sizes.items():
                known, other = self._seen.setdefault(module, (size, member))
                if known != size:
                    check_base([other, member], allow_base_mismatch=self._allow)
            yield member


@dataclass
class _State:
    """One layer while adapters pass."""

    sizes: tuple[int, int]  # (d_out, d_in)
    up: Tensor
    down: Tensor
    up_values: Tensor
    down_values: Tensor
    #: Block number → (T of up, T of down) that followed on it.
    turns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: Adapter number → (block, left, right).
    cores: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)
    energy: dict[int, float] = field(default_factory=dict)
    rank: dict[int, int] = field(default_factory=dict)


class JointStream:
    """The joint basis of adapters that pass one block at a time.

    Args:
        most: Directions that are kept of each side of a layer on the way.
        relative: Whether every adapter counts alike, whatever its norm.
        once: Whether cores are made while adapters pass; else :meth:`code` makes them later.
    """

    def __init__(self, most: int, *, relative: bool = True, once: bool = False) -> None:
        self.most, self.relative, self.once = most, relative, once
        self.layers: dict[str, _State] = {}
        self.count = 0
        self.block = 0

    def feed(self, members: Sequence[Member]) -> None:
        """Merges a block of adapters into the basis."""
        rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        read: list[dict[str, tuple[Tensor, Tensor]]] = []
        for member in members:
            factors = {m: member.factors(m) for m in member.modules}
            own = {m: (f.A.double(), f.B.mT.double()) for m, f in factors.items()}
            energy = {m: float(((A @ A.mT) * (B @ B.mT)).sum()) for m, (A, B) in own.items()}
            total = sum(energy.values())
            weight = total**-0.5 if self.relative and total else 1.0
            number = self.count + len(read)
            read.append(own)
            for module, (A, B) in own.items():
                state = self._state(module, A, B)
                state.energy[number], state.rank[number] = energy[module], len(A)
                ups, downs = rows.setdefault(module, ([], []))
                ups.append(weight * (joint.root(A @ A.mT).mT @ B))
                downs.append(weight * (joint.root(B @ B.mT).mT @ A))
        for module, (ups, downs) in rows.items():
            state = self.layers[module]
            up, up_values, turn_up = merge(state.up, state.up_values, torch.cat(ups), self.most)
            down, down_values, turn_down = merge(
                state.down, state.down_values, torch.cat(downs), self.most
            )
            state.turns[self.block] = (turn_up, turn_down)
            state.up, state.up_values = up, up_values
            state.down, state.down_values = down, down_values
        if self.once:
            for offset, own in enumerate(read):
                for module, (A, B) in own.items():
                    state = self.layers[module]
                    left, right = (B @ state.up.mT).float(), (A @ state.down.mT).float()
                    state.cores[self.count + offset] = (self.block, left, right)
        self.count += len(members)
        self.block += 1

    def _state(self, module: str, A: Tensor, B: Tensor) -> _State:
        if module not in self.layers:
            none = A.new_zeros(0)
            sizes = (B.shape[1], A.shape[1])
            self.layers[module] = _State(sizes, B[:0], A[:0], none, none.clone())
        return self.layers[module]

    def code(self, number: int, member: Member) -> None:
        """Makes the cores of an adapter in the final basis."""
        for module in member.modules:
            state = self.layers[module]
            factors = member.factors(module)
            left = factors.B.mT.double() @ state.up.mT
            right = factors.A.double() @ state.down.mT
            state.cores[number] = (self.block, left.float(), right.float())

    def _final(self, state: _State) -> dict[int, tuple[Tensor, Tensor, float]]:
        """Adapter number → (left, right, √ of what was lost on the way) in the final basis."""
        found = {}
        last = max(state.turns, default=-1)
        # Turns after each block put together, from the last one backwards.
        after: dict[int, list[tuple[Tensor, Tensor]]] = {}
        chain: list[tuple[Tensor, Tensor]] = []
        for block in range(last, -1, -1):
            after[block] = list(chain)
            if block in state.turns:
                chain.insert(0, state.turns[block])
        for number, (block, left, right) in state.cores.items():
            whole = state.energy[number]
            left, right = left.double(), right.double()
            kept = _square(left, right)
            gone = max(0.0, whole - kept) ** 0.5
            for turn_up, turn_down in after.get(block, []):
                left, right = left @ turn_up, right @ turn_down
                now = _square(left, right)
                gone += max(0.0, kept - now) ** 0.5
                kept = now
            found[number] = (left, right, gone)
        return found

    def build(self, target: Target, progress: Progress | None = None) -> tuple[Built, Tensor]:
        """Layers cut to the target, and ‖ΔW‖² [N, L].

        Args:
            target: With ``error`` or ``components``.
            progress: Called with (phase, done, total).
        """
        N, modules = self.count, list(self.layers)
        energy = torch.zeros(N, len(modules), dtype=torch.float64)
        finals, tables, costs, pairs, spectra = [], [], [], [], []
        for place, (module, state) in enumerate(self.layers.items()):
            final = self._final(state)
            r = max(left.shape[0] for left, _, _ in final.values())
            left = torch.zeros(1, N, r, len(state.up), dtype=torch.float64)
            right = torch.zeros(1, N, r, len(state.down), dtype=torch.float64)
            gone = torch.zeros(N, dtype=torch.float64)
            for n, (one, other, moved) in final.items():
                left[0, n, : len(one)], right[0, n, : len(other)] = one, other
                gone[n], energy[n, place] = moved, state.energy[n]
            held = joint.norms(right, left)
            sizes = joint_pairs(len(state.up), len(state.down), target)
            ups, downs = sorted({a for a, _ in sizes}), sorted({b for _, b in sizes})
            table = joint.lost(left, right, held, ups, downs)[0]
            flat = table[:, [ups.index(a) for a, _ in sizes], [downs.index(b) for _, b in sizes]]
            # Against the final basis both losses are at right angles; else they may add up.
            before = gone.unsqueeze(1)
            both = flat + before.square()
            tables.append((flat.sqrt() + before).square() if self.once else both)
            ranks = torch.tensor([state.rank.get(n, 0) for n in range(N)], dtype=torch.float64)
            costs.append(pair_costs(sizes, ranks, state.sizes))
            pairs.append(sizes)
            inner = joint.factor_root(left[0]).mT @ joint.factor_root(right[0])
            spectra.append(torch.linalg.eigvalsh(inner.mT @ inner).flip(-1).clamp_min(0))
            finals.append((module, state, final))
            if progress is not None:
                progress("choose", place + 1, len(modules))
        total = energy.sum(1)
        if target.error is not None and self.once:
            chosen = joint.choose(tables, costs, target.error * total)
        elif target.error is not None:
            chosen = self._split(tables, pairs, spectra, target.error * total)
        else:
            chosen = [0] * len(modules)
        layers = []
        lost = torch.zeros_like(energy)
        for place, (module, state, final) in enumerate(finals):
            a, b = pairs[place][chosen[place]]
            layer = Layer.new(module, state.up[:a].float(), state.down[:b].float(), N)
            codes = []
            for n in range(N):
                if n not in final:
                    codes.append(absent(layer.sizes, (a, b)))
                    continue
                left, right, _ = final[n]
                right, left = share.balance(right[:, :b], left[:, :a])
                codes.append(coded(left.float(), right.float(), layer.sizes))
            layer.fill(codes)
            layers.append(layer)
            lost[:, place] = tables[place][:, chosen[place]]
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
