"""Rounding a shared subspace to few bits, and building one that keeps a budget after it.

**Rounding.** Values that share a scale lose least where they are of one size. Of a joint basis
they are not: the first directions hold most, so that of a code's row the first values are large
and set the scale for all. Basis and codes are therefore turned before they are rounded,

    U C V = (U Pᵀ) (P C Qᵀ) (Q V),    P [R_u, R_u], Q [R_d, R_d] orthogonal, drawn at random,

which changes nothing and costs no byte, and makes all values of a row alike: incoherence
processing (Chee et al. 2023, QuIP, arXiv 2307.13304; Ashkboos et al. 2024, QuaRot, arXiv
2404.00456), here between U and V, so that neither inputs nor outputs need to be turned. On 24
adapters of rank 8 it lowers what int4 loses from 8.5 to 3.8 % of ‖ΔW‖², nf4 from 5.1 to 3.1 %,
and int8 from 0.04 to 0.02 %. Codes are fitted to the basis as it is after rounding. Diagonal
cores and loadings have nothing to be turned, and loadings are stored in 8 bits at the least:
each of them moves a whole component.

**Budget.** Rounding a matrix X to X + E, E about at right angles to all else, costs a share of
‖X‖² that then depends on the codec and hardly on X (:func:`expected`). An adapter loses about

    ε_i ≈ τ_i + ρ_i,    τ_i by the truncation,  ρ_i by rounding U, V and the two factors of C_i.

To end within a budget ε the truncation has to stop at ε − max ρ_i. That is not known before it is
done: :func:`within_budget` starts from :func:`expected`, measures, and builds again where the
measurement asks for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet import incremental, share
from lorasmith.fleet.codec import Codec, Rows, codec_of
from lorasmith.fleet.codes import ABSENT, FACTORED, FULL, LOADINGS, Layer
from lorasmith.fleet.members import Member
from lorasmith.fleet.records import Adapter, limit

if TYPE_CHECKING:
    from lorasmith.fleet.subspace import SharedSubspace

__all__ = ["FINER", "FOUR_BITS", "expected", "measure", "requantise", "within_budget"]

#: Codecs that lose less than one does, in the order of their bits.
FINER: Mapping[Codec, tuple[Codec, ...]] = {
    "int4": ("nf4", "int8", "bfloat16", "float32"),
    "nf4": ("int8", "bfloat16", "float32"),
    "int8": ("bfloat16", "float32"),
    "bfloat16": ("float32",),
    "float32": (),
}
#: Codecs in which values share a scale.
_SCALED = ("int8", "int4", "nf4")
FOUR_BITS: tuple[Codec, ...] = ("int4", "nf4")
#: How often a fleet is built to meet a budget with rounding.
_ATTEMPTS = 4
#: Matrices that are rounded on the way from one side to the other: U, C in two factors, V.
_ROUNDINGS = 4
#: A budget of which less than this share is left over is used up.
_SLACK = 0.1
#: Of a budget, the least that the truncation is tried with.
_LEAST = 0.02


@lru_cache(maxsize=8)
def expected(codec: Codec) -> float:
    """The share of ‖X‖² by which rounding moves a matrix of normal numbers."""
    made = torch.Generator().manual_seed(0)
    X = torch.randn(64, 512, generator=made)
    moved = (Rows.pack(X, codec).unpack() - X).square().sum()
    return float(moved / X.square().sum())


def requantise(layer: Layer, codecs: Mapping[str, Codec]) -> Tensor:
    """Stores a layer in other codecs, codes fitted to the basis as it is then.

    Args:
        layer: The layer; changed.
        codecs: Part of the layer → its codec, for all of them.

    Returns:
        ‖ΔŴ − ΔŴ'‖² [N], float64, by which each adapter has moved.
    """
    old_up, old_down = layer.up.unpack(), layer.down.unpack()
    codes = layer.codes()
    old = [layer.rows(code, old_up, old_down) for code in codes]
    kinds = {code.kind for code in codes}
    turns = codecs["right"] in _SCALED and kinds <= {ABSENT, FULL, FACTORED}
    for part, basis in (("up", old_up), ("down", old_down)):
        turned = _turn(len(basis)) @ basis if turns else basis
        setattr(layer, part, Rows.pack(turned, codecs[part]))
    new_up, new_down = layer.up.unpack(), layer.down.unpack()
    fit_up = _refit(old_up, new_up, layer.width)
    fit_down = _refit(old_down, new_down, layer.width)
    for part in ("left", "right", "residual_up", "residual_down"):
        rows = getattr(layer, part)
        setattr(layer, part, type(rows).empty(rows.columns, codecs[part]))
    fitted = []
    for code in codes:
        if code.kind == FULL:
            code = replace(code, right=fit_up.mT @ code.right @ fit_down)
        elif code.kind in (FACTORED, LOADINGS):
            code = replace(code, left=code.left @ fit_up, right=code.right @ fit_down)
        fitted.append(code)
    layer.fill(fitted)
    moved = torch.zeros(len(codes), dtype=torch.float64)
    for n, ((A, B), code) in enumerate(zip(old, layer.codes(), strict=True)):
        if len(A):
            moved[n] = share.distance(A, B, *layer.rows(code, new_up, new_down))
    return moved


@lru_cache(maxsize=64)
def _turn(size: int) -> Tensor:
    """An orthogonal matrix, the same for a size."""
    made = torch.Generator().manual_seed(size)
    Q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=made, dtype=torch.float64))[0]
    return Q.to(torch.float32)


def _refit(old: Tensor, new: Tensor, width: int) -> Tensor:
    """T [R, R] such that (c T) new is nearest to c old for every row c of coordinates."""
    if not len(old):
        return torch.zeros(0, 0)
    n = len(old) // width
    return incremental.coordinates(old.reshape(n, -1), new.reshape(n, -1))


def measure(
    layers: Sequence[Layer], adapters: Sequence[Adapter], members: Sequence[Member], first: int = 0
) -> None:
    """Enters the true ‖ΔW‖² and ‖ΔW − ΔŴ‖² of adapters that follow one another.

    Args:
        layers: The subspace.
        adapters: All its adapters; those measured are changed.
        members: The originals of some of them.
        first: The number of the first of these.
    """
    for place, layer in enumerate(layers):
        up, down = layer.up.unpack(), layer.down.unpack()
        for number, member in enumerate(members, start=first):
            if not layer.has(number):
                continue
            factors = member.factors(layer.module)
            A, B = factors.A, factors.B.mT
            adapters[number].energy[place] = incremental.square(A, B)
            held = layer.rows(number, up, down)
            adapters[number].lost[place] = float(share.distance(A, B, *held))


def within_budget(
    build: Callable[[float], SharedSubspace],
    measured: Callable[[SharedSubspace], None] | None,
    budget: float,
    bits: int | str,
    *,
    again: bool = True,
) -> SharedSubspace:
    """A fleet in few bits of which every adapter keeps the budget, for about the fewest bytes.

    Where the basis by itself does not keep it, whatever the bits (a diagonal core, too few
    directions), it is given back as it is; the caller warns.

    Args:
        build: Makes the fleet, not rounded, with at most that error.
        measured: Puts the true errors in the place of their bounds, if that is possible.
        budget: The most that an adapter may lose, rounding included.
        bits: See ``SharedSubspace.quantize``.
        again: Whether it can be built more than once. If not, it may end above the budget.

    Raises:
        ConfigError: The bits alone lose more than the budget. Says which would do.
    """
    codec = codec_of(bits)
    if codec == "float32":
        return build(budget)
    if not budget:
        raise ConfigError(
            f"error = 0 leaves no room for rounding to {codec}.",
            expected="an error above 0, or 32 bits",
            got=f"error = 0 and bits = {bits!r}",
            key="bits",
        )
    aim = max(budget - _ROUNDINGS * expected(codec), _LEAST * budget)
    best: SharedSubspace | None = None
    least = None
    for attempt in range(_ATTEMPTS):
        made, cut, after = _rounded(build, measured, aim, codec)
        if not again or float(cut.max()) > limit(aim):
            return made
        worst = float(after.max())
        if worst <= limit(budget):
            if best is None or made.stats().total < best.stats().total:
                best = made
            left = budget - worst
            if attempt or left <= _SLACK * budget:
                break
            aim += 0.9 * left
            continue
        if best is not None:
            break
        least = worst if least is None else min(least, worst)
        rounding = float((after - cut).max())
        # First what is too much; where that does not do, room for the worst rounding of all.
        wanted = aim - 1.05 * (worst - budget) if not attempt else budget - 1.05 * rounding
        if aim <= _LEAST * budget or rounding >= 2 * budget:
            break
        aim = max(min(wanted, 0.99 * aim), _LEAST * budget)
    if best is not None:
        return best
    would = _would_do(build, measured, budget, codec)
    raise ConfigError(
        f"Rounding to {codec} alone loses more than the budget.",
        expected=f"an error of at most {budget:.3g}",
        got=f"{least:.3g} at the least",
        fix=f"give bits={would!r} (--quantize {would}), with which the budget is kept, "
        f"or an error of more than {least:.2g}",
        key="bits",
    )


def _rounded(
    build: Callable[[float], SharedSubspace],
    measured: Callable[[SharedSubspace], None] | None,
    aim: float,
    codec: Codec,
) -> tuple[SharedSubspace, Tensor, Tensor]:
    """A fleet built with at most that error, rounded; errors [N] before and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one at the end tells all
        made = build(aim)
    before = _errors(made)
    made.quantize(codec)
    if measured is not None:
        measured(made)
    return made, before, _errors(made)


def _errors(subspace: SharedSubspace) -> Tensor:
    return torch.tensor([0.0, *subspace.errors.values()], dtype=torch.float64)


def _would_do(
    build: Callable[[float], SharedSubspace],
    measured: Callable[[SharedSubspace], None] | None,
    budget: float,
    codec: Codec,
) -> int | str:
    """The fewest bits with which a fleet keeps the budget."""
    names: dict[str, int | str] = {"bfloat16": 16, "int8": 8, "nf4": "nf4"}
    for finer in FINER[codec]:
        if finer in names:
            _, _, after = _rounded(build, measured, _LEAST * budget, finer)
            if float(after.max()) <= limit(budget):
                return names[finer]
    return 32
