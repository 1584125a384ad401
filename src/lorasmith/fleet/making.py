"""Making a shared subspace of a whole fleet: the steps of ``from_adapters`` and ``from_stream``.

A fleet is built for a target (:func:`built`; of a stream by
:class:`lorasmith.fleet.streaming.JointStream`, or one block of adapters after the other,
:func:`in_blocks`), rounded if it is to be stored in few bits, measured against its adapters where
they can be read again, and compared with its budget (:func:`finished`).

The class is not imported here, and is made by functions that are given: it is above this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lorasmith.errors import AdapterFileError
from lorasmith.fleet.accounting import entry
from lorasmith.fleet.building import Built, Gauge, Progress, Target
from lorasmith.fleet.building_joint import build_joint
from lorasmith.fleet.building_share import build_share
from lorasmith.fleet.codes import Layer
from lorasmith.fleet.members import Member
from lorasmith.fleet.options import Basis
from lorasmith.fleet.quantizing import measure, within_budget
from lorasmith.fleet.records import Adapter, BudgetWarning
from lorasmith.fleet.stacks import Stacks
from lorasmith.fleet.streaming import JointStream, Stream, blocks
from lorasmith.io.weights import BaseModel

if TYPE_CHECKING:
    from lorasmith.fleet.subspace import SharedSubspace

__all__ = [
    "base_of",
    "built",
    "cut",
    "finished",
    "in_blocks",
    "measure_stream",
    "passed",
    "sizes_of",
]


def base_of(members: Sequence[Member]) -> BaseModel:
    """The base model of the one that knows most of it: a fingerprint, or else a name."""
    bases = [m.weights.base for m in members]
    known = [b for b in bases if b.fingerprint is not None] or [b for b in bases if b.name] or bases
    return known[0]


def sizes_of(members: Sequence[Member]) -> dict[str, tuple[int, int]]:
    """Module name → (d_in, d_out) of all layers of a fleet, in the order in which they come.

    Factors are read where the files do not tell the sizes.
    """
    found: dict[str, tuple[int, int]] = {}
    for member in members:
        for module, (d_in, d_out) in member.sizes.items():
            if module in found:
                continue
            if not d_in or not d_out:
                factors = member.factors(module)
                d_in, d_out = factors.A.shape[1], factors.B.shape[0]
            found[module] = (d_in, d_out)
    return found


def built(
    stacks: Stacks,
    target: Target,
    basis: Basis,
    *,
    relative: bool,
    sweeps: int,
    diagonal: bool,
    gauge: Gauge,
) -> tuple[Built, list[Adapter]]:
    """The layers of a fleet, and the records of its adapters.

    Args:
        stacks: The adapters.
        target: How many directions to keep.
        basis: Which basis.
        relative: Whether every adapter counts alike.
        sweeps: Alternating improvements of the joint basis.
        diagonal: Whether cores of the joint basis are cut to their diagonals.
        gauge: What is done to factors for the Share basis.
    """
    with torch.no_grad():
        if basis == "joint":
            made = build_joint(stacks, target, relative=relative, sweeps=sweeps, diagonal=diagonal)
        else:
            made = build_share(stacks, target, relative=relative, gauge=gauge)
    adapters = [
        entry(member, stacks.energy[n].clone(), made.lost[n].clone())
        for n, member in enumerate(stacks.members)
    ]
    return made, adapters


def passed(
    stream: Stream, made: JointStream, block: int, progress: Progress | None
) -> list[Adapter]:
    """Feeds a joint basis with all adapters of a stream; their records, errors not yet known.

    Args:
        stream: The adapters.
        made: The basis; changed.
        block: Adapters in memory at a time.
        progress: Called with (phase, done, total).

    Raises:
        AdapterFileError: There is no adapter, or one cannot be read.
    """
    records: list[Adapter] = []
    with torch.no_grad():
        for group in blocks(stream, block):
            made.feed(group)
            zero = torch.zeros(0, dtype=torch.float64)
            records += [entry(member, zero, zero) for member in group]
            if progress is not None:
                progress("bases", made.count, stream.total)
        if not records:
            raise _empty()
        if not made.once:
            done = 0
            for group in blocks(stream, block):
                made.code(done, group)
                done += len(group)
                if progress is not None:
                    progress("cores", done, stream.total)
    return records


def cut(
    made: JointStream, records: Sequence[Adapter], target: Target, progress: Progress | None
) -> tuple[Built, list[Adapter]]:
    """The layers of a joint basis that has been fed, and the records with their errors.

    Args:
        made: The basis.
        records: Those of its adapters, as :func:`passed` gives them; not changed.
        target: With ``error`` or ``components``.
        progress: Called with (phase, done, total).
    """
    with torch.no_grad():
        built, energy = made.build(target, progress)
    adapters = [
        replace(a, energy=energy[n].clone(), lost=built.lost[n].clone())
        for n, a in enumerate(records)
    ]
    return built, adapters


def in_blocks(
    first: Callable[..., SharedSubspace],
    stream: Stream,
    target: Target,
    block: int,
    measured: Callable[[SharedSubspace], None] | None,
    progress: Progress | None,
    allow_base_mismatch: bool,
) -> SharedSubspace:
    """A fleet of which the first block is built at once, and further ones are absorbed.

    Args:
        first: ``from_adapters``, which makes the fleet of the first block.
        stream: The adapters.
        target: With ``error`` or ``components``.
        block: Adapters in memory at a time.
        measured: Puts the true errors in the place of their bounds, if that is possible.
        progress: Called with (phase, done, total).
        allow_base_mismatch: Whether they may name different base models.

    Raises:
        AdapterFileError: There is no adapter, or one cannot be read.
    """
    options: dict[str, Any] = {
        "error": target.error,
        "components": target.components,
        "allow_base_mismatch": allow_base_mismatch,
    }
    whole: SharedSubspace | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # one at the end tells all
        for group in blocks(stream, block):
            if whole is None:
                whole = first(group, **options)
            else:
                whole.absorb(group, **options)
            if progress is not None:
                progress("components", len(whole), stream.total)
        if whole is None:
            raise _empty()
        if measured is not None:
            measured(whole)
    return whole


def measure_stream(
    layers: Sequence[Layer],
    adapters: Sequence[Adapter],
    stream: Iterable[Member],
    block: int,
    tell: Callable[[int], None],
) -> None:
    """Enters the true errors of adapters that are read again, one block at a time.

    Args:
        layers: The subspace.
        adapters: All its adapters; changed.
        stream: The originals, in the same order.
        block: How many are in memory at a time.
        tell: Called with the number of those that are done.
    """
    done = 0
    for group in blocks(stream, block):
        with torch.no_grad():
            measure(layers, adapters, group, done)
        done += len(group)
        tell(done)


def finished(
    build: Callable[[Target], SharedSubspace],
    measured: Callable[[SharedSubspace], None] | None,
    target: Target,
    bits: int | str | None,
    *,
    again: bool = True,
) -> SharedSubspace:
    """A fleet in so many bits; warns where adapters are beyond the budget.

    Args:
        build: Makes the fleet, not rounded, for a target.
        measured: Puts the true errors in the place of their bounds, if that is possible.
        target: How many directions to keep.
        bits: See ``SharedSubspace.quantize``; ``None`` rounds nothing.
        again: Whether it can be built more than once.

    Raises:
        ConfigError: The bits alone lose more than the target's error.
    """
    if bits is None:
        made = build(target)
    elif target.error is None:
        made = build(target)
        made.quantize(bits)
        if measured is not None:
            measured(made)
    else:
        made = within_budget(
            lambda error: build(replace(target, error=error)),
            measured,
            target.error,
            bits,
            again=again,
        )
    made.check_budget()
    return made


def _empty() -> AdapterFileError:
    return AdapterFileError("There is no adapter.", expected="at least one", key="sources")
