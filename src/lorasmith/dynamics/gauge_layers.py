"""Gauge projection of many layers: their factors and μ, grouped by rank and device.

Gram matrices, R and the products with the factors are computed in float64 and rounded once,
all layers of one rank in one batch. (On a CPU, where R is near the identity, as in every step
but the first: A + (R − 1) A with the product in float32, whose rounding is below that of the
sum.) Knows factors by the names of their layers; a model only as its sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lorasmith.core.lowrank import no_autocast
from lorasmith.core.variant import Factors
from lorasmith.dynamics.gauge_batches import add_product, batch_of, multiply, stack
from lorasmith.dynamics.gauge_moments import move_state, moves_of
from lorasmith.dynamics.gauge_solver import Core, common_residual, solve, tolerance_of
from lorasmith.dynamics.protocol import Site
from lorasmith.errors import ConfigError

__all__ = ["AnyFactors", "Mu"]

#: μ of all layers, ``"auto"`` for r / d_out, or a function of a layer's name and factors.
Mu: TypeAlias = float | Literal["auto"] | Callable[[str, Factors], float]
AnyFactors: TypeAlias = Factors | tuple[Tensor, Tensor]

#: Eigenvalues of R up to this, and from its inverse, are near enough to 1 to add R − 1.
_NEAR = 1.25


@dataclass(frozen=True, eq=False)
class Pair:
    """One layer's factors and its μ."""

    name: str
    A: Tensor
    B: Tensor
    mu: float


class Group:
    """Layers of one rank on one device."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.names = [p.name for p in pairs]
        self.layers = [(p.name, p.A, p.B) for p in pairs]
        self.rank = pairs[0].A.shape[0]
        self.device = pairs[0].A.device
        self.mu = torch.tensor([p.mu for p in pairs], dtype=torch.float64, device=self.device)
        kinds = {t.dtype for p in pairs for t in (p.A, p.B)}
        self.float32 = kinds == {torch.float32}
        wide = kinds == {torch.float64}
        self.tolerance = tolerance_of(self.rank, torch.float64 if wide else torch.float32)
        self.A = self._chunks([p.A for p in pairs])
        self.B = self._chunks([p.B for p in pairs])

    def _chunks(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """(places, tensors) of equal shape and dtype, not too many elements at once."""
        alike: dict[Any, list[int]] = {}
        for place, tensor in enumerate(tensors):
            alike.setdefault((tensor.shape, tensor.dtype), []).append(place)
        chunks = []
        for places in alike.values():
            step = batch_of(tensors[places[0]])
            for start in range(0, len(places), step):
                part = places[start : start + step]
                index = torch.tensor(part, device=self.device)
                chunks.append((index, [tensors[i] for i in part]))
        return chunks

    def grams(self) -> tuple[Tensor, Tensor]:
        """A Aᵀ and Bᵀ B of all [n, r, r], in float64."""
        shape = (len(self.pairs), self.rank, self.rank)
        g_a, g_b = (torch.empty(shape, dtype=torch.float64, device=self.device) for _ in "AB")
        for index, tensors in self.A:
            a = stack(tensors, torch.float64)
            g_a.index_copy_(0, index, a @ a.mT)
        for index, tensors in self.B:
            b = stack(tensors, torch.float64)
            g_b.index_copy_(0, index, b.mT @ b)
        return g_a, g_b

    def project(self, state: Mapping[Tensor, Any] | None) -> Core:
        g_a, g_b = self.grams()
        core = solve(g_a, g_b, self.mu, self.tolerance, self.names)
        moves = [] if state is None else moves_of(self.layers, state)  # raises before we write
        one = torch.eye(self.rank, dtype=torch.float64, device=self.device)
        near = self._near(core)
        for chunks, matrix, left in ((self.A, core.R, True), (self.B, core.R_inverse, False)):
            change = (matrix - one).to(torch.float32) if near else matrix
            for index, tensors in chunks:
                if near:
                    add_product(tensors, change[index], left=left)
                else:
                    multiply(tensors, change[index], left=left)
        if moves:
            move_state(moves, core.R, core.R_inverse)
        return core

    def _near(self, core: Core) -> bool:
        """Whether A + (R − 1) A may be computed in float32: its rounding is that of the sum.

        Every step but the first is such a one. Elsewhere than on a CPU the question costs
        more than it saves, and float32 products may be of fewer digits (TF32).
        """
        return (
            self.device.type == "cpu"
            and self.float32
            and torch.get_float32_matmul_precision() == "highest"
            and bool(core.distance.max() <= _NEAR)
        )


class Projector:
    """Many layers' factors, and how to project them all."""

    def __init__(self, pairs: Sequence[Pair], *, allow_low_precision: bool) -> None:
        self.pairs = tuple(pairs)
        self.allow_low_precision = allow_low_precision
        self._check()
        self._signature: list[Any] = []
        self._groups: list[Group] = []

    def _check(self) -> None:
        owner: dict[int, str] = {}
        for pair in self.pairs:
            if pair.A.dim() != 2 or pair.B.dim() != 2 or pair.A.shape[0] != pair.B.shape[1]:
                raise ConfigError(
                    f"The factors of layer {pair.name!r} do not fit together.",
                    expected="A [r, d_in] and B [d_out, r]",
                    got=f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)}",
                    key=pair.name,
                )
            for factor in (pair.A, pair.B):
                other = owner.setdefault(id(factor), pair.name)
                if other != pair.name:
                    raise ConfigError(
                        f"The layers {other!r} and {pair.name!r} share a factor.",
                        expected="factors of its own for each layer: a shared one cannot be "
                        "balanced against two partners",
                        got="one parameter in two layers",
                        key=pair.name,
                    )
                if factor.device.type == "mps":
                    raise ConfigError(
                        "Gauge projection needs float64, which MPS devices do not have.",
                        expected="factors on a CPU or a CUDA device",
                        got=str(factor.device),
                        key=pair.name,
                    )
                narrow = factor.dtype not in (torch.float32, torch.float64)
                if narrow and not self.allow_low_precision:
                    raise ConfigError(
                        f"The factors of layer {pair.name!r} are stored in {factor.dtype}.",
                        expected="float32 or float64: rounding to bfloat16 changes B A by some "
                        "2e-3 at each projection",
                        got=str(factor.dtype),
                        fix="train the factors in float32 (PEFT: autocast_adapter_dtype=True), "
                        "or allow_low_precision=True",
                        key=pair.name,
                    )

    @property
    def groups(self) -> list[Group]:
        """Made anew when parameters have been moved to another device or dtype."""
        signature = [(t.device, t.dtype) for p in self.pairs for t in (p.A, p.B)]
        if signature != self._signature:
            if self._signature:
                self._check()
            by_kind: dict[Any, list[Pair]] = {}
            for pair in self.pairs:
                by_kind.setdefault((pair.A.shape[0], pair.A.device), []).append(pair)
            self._groups = [Group(pairs) for pairs in by_kind.values()]
            self._signature = signature
        return self._groups

    @torch.no_grad()
    def project(self, state: Mapping[Tensor, Any] | None = None) -> list[Core]:
        """Projects all layers, with their optimiser state if it is given."""
        cores = []
        for group in self.groups:
            with no_autocast(group.device):
                cores.append(group.project(state))
        return cores

    @torch.no_grad()
    def residuals(self) -> list[Tensor]:
        """Of each group [n]: the residual now, on the directions that both factors have."""
        found = []
        for group in self.groups:
            with no_autocast(group.device):
                found.append(common_residual(*group.grams(), group.mu, group.tolerance))
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Groups are made of what is here; a copy must make them of its own tensors.
        return {**self.__dict__, "_groups": [], "_signature": []}


def _mu_of(mu: Mu, name: str, factors: Factors) -> float:
    value: object = mu(name, factors) if callable(mu) else mu
    if value == "auto":
        return factors.rank / factors.B.shape[0]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"mu cannot be {value!r}" + (f" (layer {name!r})." if callable(mu) else "."),
            expected='a positive number, "auto" (r / d_out), or a function that returns one',
            got=repr(value),
            key="mu",
        )
    return float(value)  # type: ignore[arg-type]


def of_sites(sites: Iterable[Site], mu: Mu) -> list[Pair]:
    sites = tuple(sites)
    several = len({site.adapter for site in sites}) > 1
    pairs = []
    seen: set[tuple[int, int]] = set()
    for site in sites:
        # One module under two names is one layer.
        if (key := (id(site.A), id(site.B))) not in seen:
            seen.add(key)
            name = site.key if several else site.name
            pairs.append(Pair(name, site.A, site.B, _mu_of(mu, name, site.factors)))
    return pairs


def of_factors(
    given: AnyFactors | Mapping[str, AnyFactors] | Sequence[AnyFactors], mu: Mu
) -> list[Pair]:
    if isinstance(given, Factors) or _is_pair(given):
        given = [given]  # type: ignore[list-item]
    named: Iterable[tuple[str, Any]]
    if isinstance(given, Mapping):
        named = [(str(name), value) for name, value in given.items()]
    else:
        named = [(str(i), value) for i, value in enumerate(given)]
    pairs = []
    for name, value in named:
        if _is_pair(value):
            value = Factors(value[0], value[1], 1.0)
        if not isinstance(value, Factors):
            raise ConfigError(
                f"The entry {name!r} is not a pair of factors.",
                expected="Factors, or a tuple (A [r, d_in], B [d_out, r])",
                got=type(value).__name__,
            )
        pairs.append(Pair(name, value.A, value.B, _mu_of(mu, name, value)))
    return pairs


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)
    )


def check_options(mu: Mu, every: object, start_step: object, moments: object) -> None:
    if not callable(mu):
        _mu_of(mu, "", Factors(torch.empty(1, 1), torch.empty(1, 1), 1.0))
    for key, value, least in (("every", every, 1), ("start_step", start_step, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{key} cannot be {value!r}.",
                expected=f"a whole number of at least {least}",
                got=repr(value),
                key=key,
            )
    if moments not in ("transport", "keep"):
        raise ConfigError(
            "Unknown moments.", expected="transport or keep", got=repr(moments), key="moments"
        )


def largest(tensors: Iterable[Tensor]) -> float:
    return max((float(t.max()) for t in tensors), default=0.0)
