"""Random adapters in memory, and their ΔW in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.io import AdapterWeights

SIZES = {"layers.0.q_proj": (12, 10), "layers.0.up_proj": (12, 20), "layers.1.q_proj": (12, 10)}


def adapter(
    r: int = 3,
    *,
    seed: int = 0,
    alpha: float = 6.0,
    modules: Sequence[str] = tuple(SIZES),
    dtype: torch.dtype = torch.float32,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    rslora: bool = False,
) -> AdapterWeights:
    """An adapter with random factors, or with the (A, B) given."""
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        d_in, d_out = SIZES[module]
        A = torch.randn(r, d_in, generator=made)
        B = torch.randn(d_out, r, generator=made)
        if factors is not None:
            A, B = factors[module]
        tensors[module] = {"A": A.to(dtype), "B": B.to(dtype)}
    config = ls.LoRAConfig(
        r=r, alpha=alpha, targets=tuple(modules), scaling="rslora" if rslora else "standard"
    )
    return AdapterWeights.from_tensors(config, tensors)


def dense(weights: AdapterWeights) -> Tensor:
    """All ΔW of SIZES in one vector, float64; zeros where a layer is not adapted."""
    parts = []
    for module, (d_in, d_out) in SIZES.items():
        if module in weights.modules:
            found = weights.factors[module]
            parts.append((found.scaling * found.B.double() @ found.A.double()).flatten())
        else:
            parts.append(torch.zeros(d_in * d_out, dtype=torch.float64))
    return torch.cat(parts)


def related(count: int, *, seed: int, noise: float = 1.0, odd: int | None = None) -> list[Tensor]:
    """[count] vectors of ΔW-like noise around a common direction; one of them without it."""
    made = torch.Generator().manual_seed(seed)
    common = torch.randn(400, generator=made, dtype=torch.float64)
    vectors = [
        common + noise * torch.randn(400, generator=made, dtype=torch.float64) for _ in range(count)
    ]
    if odd is not None:
        vectors[odd] = (1 + noise**2) ** 0.5 * torch.randn(400, generator=made, dtype=torch.float64)
    return vectors
