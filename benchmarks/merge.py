"""What merging costs: SVD merge in factors against the dense way and PEFT's.

    python benchmarks/merge.py [--adapters 4] [--rank 16] [--sizes 576,2048] [--repeat 5]

One layer [d, d], N adapters of rank r, merged to rank r. The dense way makes Σ wᵢ Bᵢ Aᵢ and
decomposes it with ``torch.linalg.svd``, as PEFT's ``add_weighted_adapter`` does with "svd" (that is
measured too, where PEFT is installed). Medians of interleaved
repetitions on one thread; the error is that of ΔW against float64. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.truncation import Product
from lorasmith.fleet.members import LayerFactors
from lorasmith.fleet.merge import svd


def changes(count: int, rank: int, size: int) -> list[LayerFactors]:
    generator = torch.Generator().manual_seed(0)
    return [
        LayerFactors(
            torch.randn(rank, size, generator=generator) / size**0.5,
            torch.randn(size, rank, generator=generator),
        )
        for _ in range(count)
    ]


def in_factors(deltas: list[LayerFactors], rank: int) -> Tensor:
    wide = [LayerFactors(d.A.double(), d.B.double()) for d in deltas]
    merged = svd(wide, [1 / len(deltas)] * len(deltas))
    made = Product(merged.B, merged.A).spectrum().factors(rank, 1.0)
    product: Tensor = made["B"] @ made["A"]
    return product


def densely(deltas: list[LayerFactors], rank: int) -> Tensor:
    total = sum((d.B @ d.A for d in deltas[1:]), deltas[0].B @ deltas[0].A) / len(deltas)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    cut: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return cut


def by_peft(deltas: list[LayerFactors], rank: int) -> Callable[[], Any] | None:
    try:
        import peft
    except ImportError:
        return None
    size = deltas[0].A.shape[1]
    model: Any = peft.get_peft_model(
        nn.Sequential(nn.Linear(size, size, bias=False)),
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]),
        adapter_name="a0",
    )
    for i in range(1, len(deltas)):
        model.add_adapter(f"a{i}", model.peft_config["a0"])
    layer = model.base_model.model[0]
    with torch.no_grad():
        for i, d in enumerate(deltas):
            layer.lora_A[f"a{i}"].weight.copy_(d.A)
            layer.lora_B[f"a{i}"].weight.copy_(d.B)
    names = [f"a{i}" for i in range(len(deltas))]

    def run() -> None:
        model.add_weighted_adapter(
            names, [1 / len(names)] * len(names), "m", combination_type="svd", svd_rank=rank
        )
        model.delete_adapter("m")

    return run


def measure(ways: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Way → median seconds; the ways take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sizes", default="576,2048")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []
    for size in map(int, given.sizes.split(",")):
        deltas = changes(given.adapters, given.rank, size)
        ways: dict[str, Callable[[], Any]] = {
            "factors": lambda d=deltas: in_factors(d, given.rank),  # type: ignore[misc]
            "dense": lambda d=deltas: densely(d, given.rank),  # type: ignore[misc]
        }
        theirs = by_peft(deltas, given.rank)
        if theirs is not None:
            ways["peft"] = theirs
        seconds = measure(ways, given.repeat)
        wanted = densely([LayerFactors(d.A.double(), d.B.double()) for d in deltas], given.rank)
        error = float((in_factors(deltas, given.rank) - wanted).norm() / wanted.norm())
        ratios = {n: seconds["factors"] / s for n, s in seconds.items() if n != "factors"}
        results.append({"size": size, "seconds": seconds, "ratio": ratios, "error": error})
    print(json.dumps({**vars(given), "results": results}, indent=2))


if __name__ == "__main__":
    main()
