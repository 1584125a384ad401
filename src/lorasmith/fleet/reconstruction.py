"""An adapter of its own again, from what a shared subspace holds of it.

Code and residual of a layer are factors of ΔŴ, of as many rows as both have together
(:meth:`lorasmith.fleet.codes.Layer.rows`). An adapter has the rank that it had before, or another
one that is asked for: a product of higher rank is cut to its leading singular vectors (Eckart and
Young 1936), which is the nearest one; configuration, dtype and all that was carried beside the
factors come from the record (:func:`lorasmith.fleet.members.rebuild`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from lorasmith.core.truncation import Product
from lorasmith.fleet.codes import Layer
from lorasmith.fleet.members import LayerFactors, rebuild
from lorasmith.fleet.records import Adapter
from lorasmith.io.weights import AdapterWeights

__all__ = ["cut", "factors", "reconstruct"]


def factors(layers: Sequence[Layer], number: int) -> dict[str, LayerFactors]:
    """Module name → factors of what is held of an adapter, code and residual together.

    Args:
        layers: The subspace.
        number: The adapter.
    """
    found = {}
    for layer in layers:
        if layer.has(number):
            A, B = layer.rows(number)
            found[layer.module] = LayerFactors(A, B.mT)
    return found


def cut(whole: LayerFactors, most: int) -> LayerFactors:
    """Factors of at most that rank, and of 1 at the least; the nearest ones."""
    d_out, d_in = whole.B.shape[0], whole.A.shape[1]
    if 0 < whole.rank <= most:
        return whole
    if not whole.rank:
        return LayerFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
    spectrum = Product(whole.B.to(torch.float64), whole.A.to(torch.float64)).spectrum()
    made = spectrum.factors(max(1, min(most, spectrum.useful)), 1.0)
    return LayerFactors(made["A"], made["B"])


def reconstruct(
    layers: Sequence[Layer],
    number: int,
    adapter: Adapter,
    rank: Literal["original", "exact"] | int,
    dtype: torch.dtype | None,
) -> AdapterWeights:
    """An adapter as it was, configuration and all, of what is held of it.

    Args:
        layers: The subspace.
        number: The adapter's place in it.
        adapter: Its record.
        rank: ``"original"``, ``"exact"``, or the most that a layer may have.
        dtype: In which to store the factors; as before by default.
    """
    sizes = {layer.module: layer.sizes for layer in layers}
    made = {}
    for module, whole in factors(layers, number).items():
        if rank == "exact":
            most = min(*sizes[module])
        elif rank == "original":
            most = adapter.record.ranks[module]
        else:
            most = min(rank, *sizes[module])
        made[module] = cut(whole, most)
    if rank == "original":
        return rebuild(adapter.record, made, rest=adapter.rest, rank="original", dtype=dtype)
    return rebuild(adapter.record, made, rest=adapter.rest, dtype=dtype)
