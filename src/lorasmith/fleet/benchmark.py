"""What compression buys on a given fleet: bytes against error, and seconds, for many settings.

    found = benchmark("adapters/", errors=(0.01, 0.05), codecs=("none", 4))
    found.best(0.05)    # the fewest bytes with which no adapter loses more than that

A setting is a basis, an error budget and a codec (:mod:`lorasmith.fleet.codec`). Of each one

- **bytes**: of the tensors that are held (:class:`~lorasmith.fleet.records.Stats`), beside those
  of the adapters as they are stored; what is carried (magnitudes, modules_to_save) counts on
  both sides,
- **error** of every adapter, ε = Σ_l ‖ΔW_l − ΔŴ_l‖² / Σ_l ‖ΔW_l‖² over its layers l: relative
  and squared, as budgets are, and of DoRA that of its low-rank part. It is measured against the
  originals *after* rounding (``SharedSubspace.measure``), and is no bound; with few bits it may be
  above the budget, which the basis alone keeps,
- **seconds**: to build from the files; to round to the codec; to absorb one adapter into a fleet of
  the others (leave one out, at the same budget and codec); to reconstruct one adapter at its
  original rank, all values computed.

**Plain** is what bases compete with: every adapter by itself, the rows of its factors A [r, d_in]
and Bᵀ [r, d_out] (scaling folded into B, gauge as it is stored) in the same codecs: int8 with one
scale a row, int4 and NF4 with one for 64 values of a row.

The adapters are read once before any time is taken, so that no setting pays for a cold disk. Of
several rounds each leaves out, and reconstructs, another adapter; seconds are medians. They are of
this machine and whatever else it does.

Limits: a basis is built twice (once without the adapter that is absorbed) for each budget and
round, and every adapter is read again for each setting. Memory is that of about four times the
compressed fleet, and what :meth:`SharedSubspace.from_adapters` takes.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from lorasmith.errors import ConfigError
from lorasmith.fleet.building import Progress
from lorasmith.fleet.codec import Codec, Rows, codec_of
from lorasmith.fleet.incremental import square
from lorasmith.fleet.members import Member, Source, open_members
from lorasmith.fleet.options import Basis, check_choice, check_share
from lorasmith.fleet.records import BudgetWarning, limit
from lorasmith.fleet.share import distance
from lorasmith.fleet.subspace import SharedSubspace

__all__ = ["Bytes", "FleetBenchmark", "Plain", "Seconds", "Setting", "benchmark"]

#: Budgets, bases and codecs that are tried unless told otherwise.
ERRORS = (0.01, 0.05, 0.1)
BASES: tuple[Basis, ...] = get_args(Basis)
CODECS: tuple[int | str, ...] = ("none", 8, 4, "nf4")
#: Codecs of the plain factors.
PLAIN: tuple[int | str, ...] = (8, 4)


@dataclass(frozen=True)
class Bytes:
    """Bytes of a compressed fleet in memory.

    Attributes:
        basis: U and V.
        codes: All cores.
        residuals: All residuals; 0 in a fleet that was built at once.
        rest: What is carried beside the factors.
        index: Bookkeeping: which rows are whose, errors.
    """

    basis: int
    codes: int
    residuals: int
    rest: int
    index: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.basis + self.codes + self.residuals + self.rest + self.index

    def to_dict(self) -> dict[str, int]:
        """The parts and their sum."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Seconds:
    """How long it took, medians of the rounds.

    Attributes:
        build: The basis and all cores, reading included.
        quantize: Rounding them; 0 where nothing is rounded.
        absorb: One more adapter into a fleet of the others; ``None`` with one adapter only.
        reconstruct: One adapter.
    """

    build: float
    quantize: float
    absorb: float | None
    reconstruct: float


@dataclass(frozen=True)
class Setting:
    """One way of compressing the fleet, and what came of it.

    Attributes:
        basis: ``"joint"`` or ``"share"``.
        budget: The error that was allowed before rounding.
        codec: How numbers are stored; ``"float32"`` is not rounded.
        bytes: What it takes.
        ratio: Bytes of the adapters as they are stored ÷ bytes in memory.
        errors: Id → relative squared error of ΔW, measured after rounding.
        seconds: What it took.
    """

    basis: Basis
    budget: float
    codec: Codec
    bytes: Bytes
    ratio: float
    errors: Mapping[str, float]
    seconds: Seconds

    @property
    def total(self) -> int:
        """All bytes."""
        return self.bytes.total

    @property
    def mean(self) -> float:
        """Mean error of the adapters."""
        return statistics.fmean(self.errors.values())

    @property
    def worst(self) -> float:
        """Largest error."""
        return max(self.errors.values())

    @property
    def within(self) -> bool:
        """Whether every adapter keeps the budget after rounding, too."""
        return self.worst <= limit(self.budget)

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "basis": self.basis,
            "budget": self.budget,
            "codec": self.codec,
            "bytes": self.bytes.to_dict(),
            "ratio": self.ratio,
            "error": {"mean": self.mean, "worst": self.worst, "adapters": dict(self.errors)},
            "within": self.within,
            "seconds": vars(self.seconds).copy(),
        }


@dataclass(frozen=True)
class Plain:
    """Every adapter by itself, its factors in few bits.

    Attributes:
        codec: How numbers are stored.
        factors: Bytes of all factors, scales included.
        rest: Bytes of what is carried beside the factors.
        ratio: Bytes of the adapters as they are stored ÷ these.
        errors: Id → relative squared error of ΔW.
    """

    codec: Codec
    factors: int
    rest: int
    ratio: float
    errors: Mapping[str, float]

    @property
    def total(self) -> int:
        """All bytes."""
        return self.factors + self.rest

    @property
    def mean(self) -> float:
        """Mean error of the adapters."""
        return statistics.fmean(self.errors.values())

    @property
    def worst(self) -> float:
        """Largest error."""
        return max(self.errors.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "codec": self.codec,
            "bytes": {"factors": self.factors, "rest": self.rest, "total": self.total},
            "ratio": self.ratio,
            "error": {"mean": self.mean, "worst": self.worst, "adapters": dict(self.errors)},
        }


@dataclass(frozen=True)
class FleetBenchmark:
    """What was measured on a fleet.

    Attributes:
        ids: The adapters.
        base: Name of their base model, if they tell it.
        layers: Number of layers that any of them adapts.
        stored: Bytes of all tensors of the adapters as they are stored.
        stored_rest: Of these, what is carried and not compressed.
        rounds: How often everything was timed.
        settings: Each way of compressing, in the order basis, budget, codec.
        plain: Each way of rounding the factors.
    """

    ids: tuple[str, ...]
    base: str | None
    layers: int
    stored: int
    stored_rest: int
    rounds: int
    settings: tuple[Setting, ...]
    plain: tuple[Plain, ...]

    def best(self, error: float) -> Setting | Plain | None:
        """What takes the fewest bytes of all in which no adapter has a larger error, measured."""
        tried: list[Setting | Plain] = [*self.settings, *self.plain]
        kept = [one for one in tried if one.worst <= limit(error)]
        return min(kept, key=lambda one: one.total, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "ids": list(self.ids),
            "base": self.base,
            "adapters": len(self.ids),
            "layers": self.layers,
            "stored": {"total": self.stored, "rest": self.stored_rest},
            "rounds": self.rounds,
            "settings": [s.to_dict() for s in self.settings],
            "plain": [p.to_dict() for p in self.plain],
        }


def benchmark(
    sources: Source | Sequence[Source] | Mapping[str, Source],
    ids: Sequence[str] | None = None,
    *,
    errors: Sequence[float] = ERRORS,
    bases: Sequence[Basis] = BASES,
    codecs: Sequence[int | str] = CODECS,
    plain: Sequence[int | str] = PLAIN,
    rounds: int = 1,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> FleetBenchmark:
    """Compresses a fleet in every way that is asked for, and measures what comes of it.

    Nothing is written. All combinations of ``errors``, ``bases`` and ``codecs`` are tried.

    Args:
        sources: Directories, hub ids, URLs, adapters that have been read; or a mapping of ids
            to these. A directory of adapters stands for all of them.
        ids: One for each adapter; by default names made of their paths.
        errors: Budgets, relative squared error of ΔW.
        bases: ``"joint"``, ``"share"``.
        codecs: ``"none"``, 32, 16, 8, 4, ``"nf4"``: of basis and codes.
        plain: The same, of factors that are stored by themselves.
        rounds: How often to time everything; see the module.
        allow_base_mismatch: Whether the adapters may name different base models.
        progress: Called with (phase, done, total).

    Raises:
        ConfigError: An argument that is not usable.
        AdapterFileError: An adapter cannot be read.
        BaseMismatchError: They belong to different base models.
        UnsupportedFeatureError: One cannot be part of a fleet.
    """
    for name, given in (("errors", errors), ("bases", bases), ("codecs", codecs)):
        if not given:
            raise ConfigError("There is nothing to measure.", expected="at least one", key=name)
    budgets = list(dict.fromkeys(check_share("errors", e) for e in errors))
    for basis in bases:
        check_choice("bases", basis, BASES)
    stored_as = list(dict.fromkeys(_codec(c) for c in codecs))
    if type(rounds) is not int or rounds < 1:
        raise ConfigError(
            "rounds is not usable.",
            expected="an integer of at least 1",
            got=repr(rounds),
            key="rounds",
        )
    members = open_members(sources, ids, allow_base_mismatch=allow_base_mismatch)
    ways = [(basis, budget) for basis in dict.fromkeys(bases) for budget in budgets]
    alone = list(dict.fromkeys(_codec(c) for c in plain))
    builds = rounds * (1 if len(members) == 1 else 2)
    step = _steps(progress, len(alone) + len(ways) * (builds + rounds * len(stored_as)))
    stored = sum(m.nbytes for m in members)
    rest = sum(m.rest[k].nbytes for m in members for k in m.rest)
    with torch.no_grad(), warnings.catch_warnings():
        # Errors are what this is about; they are in the result.
        warnings.simplefilter("ignore", BudgetWarning)
        rounded = tuple(_plain(members, codec, stored, rest, step) for codec in alone)
        settings: list[Setting] = []
        for basis, budget in ways:
            settings += _measured(members, basis, budget, stored_as, rounds, step)
    return FleetBenchmark(
        tuple(m.id for m in members),
        next((m.weights.base.name for m in members if m.weights.base.name), None),
        len({module for m in members for module in m.modules}),
        stored,
        rest,
        rounds,
        tuple(settings),
        rounded,
    )


def _measured(
    members: Sequence[Member],
    basis: Basis,
    budget: float,
    codecs: Sequence[Codec],
    rounds: int,
    step: Callable[[], None],
) -> list[Setting]:
    """One basis at one budget, in all codecs."""

    def build(chosen: Sequence[Member]) -> SharedSubspace:
        # What they name has been looked at, and allowed, already.
        return SharedSubspace.from_adapters(
            chosen, basis=basis, error=budget, allow_base_mismatch=True
        )

    built: list[float] = []
    took: dict[Codec, dict[str, list[float]]] = {
        c: {"quantize": [], "absorb": [], "reconstruct": []} for c in codecs
    }
    found: dict[Codec, tuple[Bytes, float, dict[str, float]]] = {}
    for number in range(rounds):
        out = members[-1 - number % len(members)]
        seconds, whole = _timed(lambda: build(members))
        built.append(seconds)
        step()
        others = None
        if len(members) > 1:
            others = build([m for m in members if m is not out])
            step()
        for codec in codecs:
            fleet = copy.deepcopy(whole)
            took[codec]["quantize"].append(_quantised(fleet, codec))
            if codec not in found:
                measured = {
                    m.id: fleet.measure(m, m.id, allow_base_mismatch=True).error for m in members
                }
                stats = fleet.stats()
                held = Bytes(stats.basis, stats.codes, stats.residuals, stats.rest, stats.index)
                found[codec] = held, stats.ratio, measured
            took[codec]["reconstruct"].append(_timed(lambda: _rebuilt(fleet, out.id))[0])  # noqa: B023 - called at once
            if others is not None:
                fleet = copy.deepcopy(others)
                _quantised(fleet, codec)
                absorb = _timed(
                    lambda: fleet.absorb({out.id: out}, error=budget, allow_base_mismatch=True)  # noqa: B023 - likewise
                )
                took[codec]["absorb"].append(absorb[0])
            step()
    return [
        Setting(
            basis,
            budget,
            codec,
            *found[codec],
            Seconds(
                statistics.median(built),
                statistics.median(took[codec]["quantize"]),
                statistics.median(took[codec]["absorb"]) if took[codec]["absorb"] else None,
                statistics.median(took[codec]["reconstruct"]),
            ),
        )
        for codec in codecs
    ]


def _quantised(fleet: SharedSubspace, codec: Codec) -> float:
    """Rounds a fleet; seconds that it took."""
    if codec == "float32":  # as it is built
        return 0.0
    return _timed(lambda: fleet.quantize(codec))[0]


def _rebuilt(fleet: SharedSubspace, name: str) -> None:
    """Reconstructs an adapter, down to the last value."""
    for factors in fleet.reconstruct(name).factors.values():
        factors.stacked()


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made


def _plain(
    members: Sequence[Member], codec: Codec, stored: int, rest: int, step: Callable[[], None]
) -> Plain:
    """All adapters with their factors in one codec."""
    total, errors = 0, {}
    for member in members:
        gone = energy = 0.0
        for module in member.modules:
            factors = member.factors(module)
            A, B = factors.A, factors.B.mT.contiguous()
            packed_A, packed_B = Rows.pack(A, codec), Rows.pack(B, codec)
            total += packed_A.nbytes + packed_B.nbytes
            gone += float(distance(A, B, packed_A.unpack(), packed_B.unpack()))
            energy += square(A, B)
        errors[member.id] = gone / energy if energy else 0.0
    step()
    return Plain(codec, total, rest, stored / (total + rest), errors)


def _codec(bits: int | str) -> Codec:
    return "float32" if bits == "none" else codec_of(bits)


def _steps(progress: Progress | None, total: int) -> Callable[[], None]:
    """What to call after each step of the whole."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("settings", done, total)

    return step
