"""What a shared subspace tells of itself: errors and bytes, counted on what is held.

**Errors** are kept as ‖ΔW‖² and ‖ΔW − ΔŴ‖² of each adapter on each layer
(:class:`lorasmith.fleet.records.Adapter`). What is done later moves what is held of adapter i by
δ_i = ‖ΔŴ_i − ΔŴ_i'‖ (:func:`distances`); without the originals it is only known that the norm of
the error has grown by δ_i at most, √lost' ≤ √lost + δ on every layer, which is what
:func:`enter` writes down.

**Bytes** are those of the tensors in memory, as they are stored. What is shared (basis) and what
is an adapter's own (codes, residual, the rest beside the factors) are told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.fleet import share
from lorasmith.fleet.codec import Codec
from lorasmith.fleet.codes import COLUMNS, PARTS, Layer
from lorasmith.fleet.members import Member, MemberRecord
from lorasmith.fleet.records import Adapter, Projection, Stats, limit
from lorasmith.fleet.residuals import Part

__all__ = [
    "adapter_bytes",
    "beyond",
    "compressed",
    "distances",
    "enter",
    "entry",
    "original_bytes",
    "over_budget",
    "projected",
    "projection",
    "ratios",
    "stats",
]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# Errors --------------------------------------------------------------------------------------


def entry(member: Member, energy: Tensor, lost: Tensor) -> Adapter:
    """The record of an adapter that enters, with copies of what it carries beside the factors.

    Args:
        member: The adapter.
        energy: ‖ΔW‖² of each layer [L], float64.
        lost: ‖ΔW − ΔŴ‖² likewise.
    """
    carried = member.rest
    rest = {k: carried[k].clone() for k in carried}
    return Adapter(member.id, member.record, rest, member.nbytes, energy, lost)


def distances(old: Layer, new: Layer, count: int) -> Tensor:
    """‖ΔŴ − ΔŴ'‖² of the first adapters [count], float64, between two states of a layer."""
    before, after = ((x, x.up.unpack(), x.down.unpack()) for x in (old, new))
    found = torch.zeros(count, dtype=torch.float64)
    for n in range(count):
        if old.has(n):
            was, now = (x.rows(n, up, down) for x, up, down in (before, after))
            found[n] = share.distance(*was, *now)
    return found


def enter(adapters: Sequence[Adapter], moved: Tensor) -> dict[str, float]:
    """Enters squared distances that adapters have moved by into their errors.

    Args:
        adapters: The records; their ``lost`` is replaced.
        moved: ‖ΔŴ − ΔŴ'‖² [N, L], float64.

    Returns:
        Id → Σ_l ‖ΔŴ − ΔŴ'‖² / Σ_l ‖ΔW‖².
    """
    report = {}
    for n, adapter in enumerate(adapters):
        adapter.lost = (adapter.lost.sqrt() + moved[n].sqrt()).square()
        whole = float(adapter.energy.sum())
        report[adapter.id] = float(moved[n].sum()) / whole if whole else 0.0
    return report


def inherit(
    modules: Sequence[str],
    adapters: Sequence[Adapter],
    before: Sequence[str],
    others: Sequence[Adapter],
) -> None:
    """Adds what adapters had lost before, in another subspace that they were rebuilt from.

    By the triangle inequality, layer by layer: (√lost + √lost before)², of the ‖ΔW‖² that they
    had at first.

    Args:
        modules: Layers of this subspace.
        adapters: Its records; ``energy`` and ``lost`` are replaced, where the id is known.
        before: Layers of the other one.
        others: Its records.
    """
    known = {a.id: a for a in others}
    place = {m: n for n, m in enumerate(modules)}
    rows = [place[m] for m in before]
    for adapter in adapters:
        first = known.get(adapter.id)
        if first is not None:
            lost = torch.zeros_like(adapter.lost)
            lost[rows] = first.lost
            adapter.lost = (adapter.lost.sqrt() + lost.sqrt()).square()
            adapter.energy = torch.zeros_like(adapter.energy)
            adapter.energy[rows] = first.energy


def ratios(modules: Iterable[str], lost: Tensor, energy: Tensor) -> dict[str, float]:
    """Module name → lost / energy [L], of the layers on which the adapter does something."""
    found = {}
    for module, gone, whole in zip(modules, lost.tolist(), energy.tolist(), strict=True):
        if whole:
            found[module] = gone / whole
    return found


def projected(name: str, parts: Mapping[str, Part], allowed: float) -> Projection:
    """What a basis can hold of an adapter that is not in the subspace.

    Args:
        name: Its id.
        parts: Module name → what the basis holds there.
        allowed: The budget to compare its error with.
    """
    energy = sum(p.energy for p in parts.values())
    gone = sum(p.lost for p in parts.values())
    codes = {}
    for module, part in parts.items():
        if part.layer is not None:
            left, right = part.layer.wide(part.code)
            codes[module] = left.mT @ right
    return Projection(
        name,
        gone / energy if energy else 0.0,
        {m: p.lost / p.energy if p.energy else 0.0 for m, p in parts.items()},
        allowed,
        codes=codes,
    )


def projection(
    layers: Sequence[Layer], adapters: Sequence[Adapter], number: int, allowed: float
) -> Projection:
    """What is held of an adapter that is in the subspace.

    Args:
        layers: The subspace.
        adapters: All its adapters.
        number: Which of them.
        allowed: The budget to compare its error with.
    """
    adapter = adapters[number]
    ranks = {
        layer.module: int(layer.index[number, 3]) for layer in layers if layer.index[number, 3]
    }
    return Projection(
        adapter.id,
        adapter.error,
        ratios((layer.module for layer in layers), adapter.lost, adapter.energy),
        allowed,
        ranks,
        adapter_bytes(layers, adapter, number),
    )


def beyond(found: Projection, residual: Codec = "float32") -> str:
    """What to say of an adapter that is beyond its budget.

    Args:
        found: What is held of it.
        residual: How residuals are stored, where its own is what brings it beyond the budget.
    """
    text = (
        f"The subspace holds the adapter {found.id!r} with an error of {found.error:.3g} of its "
        f"squared change of the weights, above the budget of {found.budget:.3g}."
    )
    if found.residual_rank and residual != "float32":
        text += (
            f" That is the rounding of its residual to {residual}; remove it, "
            "quantize(…, residuals=16), and add it again."
        )
    return text


def over_budget(adapters: Sequence[Adapter], budget: float) -> str | None:
    """What to say of the adapters that are beyond a budget; ``None`` if there are none."""
    over = [a for a in adapters if a.error > limit(budget)]
    if not over:
        return None
    worst = max(over, key=lambda a: a.error)
    return (
        f"{len(over)} of {len(adapters)} adapters lose more than {budget:.3g} of their "
        f"change of the weights (relative squared error), {worst.id!r} most, with "
        f"{worst.error:.3g}."
    )


# Bytes ---------------------------------------------------------------------------------------


def original_bytes(record: MemberRecord, carried: Iterable[Tensor]) -> int:
    """Bytes that an adapter takes as a file of its own: its factors, and what it carries."""
    size = {"float32": 4, "float64": 8}.get(record.dtype, 2)
    numbers = sum(r * sum(record.sizes[m]) for m, r in record.ranks.items() if m in record.sizes)
    return size * numbers + _nbytes(carried)


def adapter_bytes(layers: Sequence[Layer], adapter: Adapter, number: int) -> int:
    """Bytes of an adapter's codes, residuals and rest; the basis is everybody's.

    Args:
        layers: The subspace.
        adapter: Its record.
        number: Its place in the index of every layer.
    """
    total = _nbytes(adapter.rest.values())
    for layer in layers:
        for name, column in COLUMNS.items():
            rows = getattr(layer, name)
            one = rows.take(0, 1).nbytes if len(rows) else 0
            total += one * int(layer.index[number, column])
    return total


def stats(layers: Sequence[Layer], adapters: Sequence[Adapter], disk: int | None) -> Stats:
    """Bytes of everything that is held.

    Args:
        layers: The subspace.
        adapters: All its adapters.
        disk: Bytes of its files, if there are any.
    """
    sums = {name: sum(getattr(layer, name).nbytes for layer in layers) for name in PARTS}
    rest = _nbytes(t for a in adapters for t in a.rest.values())
    index = _nbytes(layer.index for layer in layers)
    index += _nbytes(t for a in adapters for t in (a.energy, a.lost))
    codecs = {}
    if layers:
        like = layers[0]
        codecs = {
            "basis": like.up.codec,
            "codes": like.right.codec,
            "residuals": like.residual_up.codec,
        }
    return Stats(
        adapters=len(adapters),
        layers=len(layers),
        basis=sums["up"] + sums["down"],
        codes=sums["left"] + sums["right"],
        residuals=sums["residual_up"] + sums["residual_down"],
        rest=rest,
        index=index,
        original=sum(a.nbytes for a in adapters),
        original_rest=rest,
        disk=disk,
        per_adapter={a.id: adapter_bytes(layers, a, n) for n, a in enumerate(adapters)},
        ranks={layer.module: layer.ranks for layer in layers},
        codecs=codecs,
    )


def compressed(found: Stats) -> int:
    """Bytes of what quantising can make smaller."""
    return found.basis + found.codes + found.residuals
