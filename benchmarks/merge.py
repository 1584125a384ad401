"""What merging costs: in factors, densely, and by PEFT's ``add_weighted_adapter``.

    python benchmarks/merge.py [--parts svd,methods] [--adapters 4] [--rank 16] [--repeat 5]
    python benchmarks/merge.py --quick                     # half a minute: does it run?

N adapters of rank r, merged to rank r.

``svd``: one layer [d, d] (``--sizes``), in memory. The dense way makes Σ wᵢ Bᵢ Aᵢ and decomposes
it with ``torch.linalg.svd``, as PEFT does with "svd" (measured too, where PEFT is installed). The
error is that of ΔW against the dense way in float64.
``methods``: ``lorasmith.merge`` of whole adapters in memory (``--layers`` of ``--width``²), beside
what PEFT calls the same: on changes with a full SVD ("ties_svd", …) and on factors ("ties",
"dare_linear"), which is another and cheaper thing: A and B are thinned out by themselves. In
milliseconds a layer. ``lost`` is the share of the merged change's energy that truncation took.

Medians and least of repetitions that take turns, on one thread. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorasmith.core.truncation import Product
from lorasmith.fleet.members import LayerFactors
from lorasmith.fleet.merge import svd

#: Ours → its options, and what PEFT calls it (on changes, on factors).
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "svd": ({}, ("svd",)),
    "ties": ({"density": 0.2}, ("ties_svd", "ties")),
    "magnitude_prune": ({"density": 0.2}, ("magnitude_prune_svd", "magnitude_prune")),
    "dare": ({"density": 0.3}, ("dare_linear_svd", "dare_linear")),
    "dare_ties": ({"density": 0.3}, ("dare_ties_svd", "dare_ties")),
    "breadcrumbs": ({"density": 0.2, "gamma": 0.01}, ()),
    "sce": ({"density": 0.1}, ()),
    "della": ({"density": 0.3}, ()),
    "knots": ({"density": 0.3}, ()),
}


def changes(count: int, rank: int, size: int, seed: int = 0) -> list[LayerFactors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LayerFactors(
            torch.randn(rank, size, generator=generator) / size**0.5,
            torch.randn(size, rank, generator=generator),
        )
        for _ in range(count)
    ]


def factored(deltas: list[LayerFactors], rank: int) -> LayerFactors:
    """Ours, as ``merge`` does it."""
    wide = [LayerFactors(d.A.double(), d.B.double()) for d in deltas]
    merged = svd(wide, [1 / len(deltas)] * len(deltas))
    made = Product(merged.B, merged.A).leading(rank).factors(rank, 1.0)
    return LayerFactors(made["A"], made["B"])


def densely(deltas: list[LayerFactors], rank: int) -> LayerFactors:
    total = sum((d.B @ d.A for d in deltas[1:]), deltas[0].B @ deltas[0].A) / len(deltas)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return LayerFactors(Vh[:rank], U[:, :rank] * S[:rank])


def peft_model(layers: Sequence[list[LayerFactors]], rank: int) -> Any | None:
    """A model whose i-th layer has these adapters; ``None`` without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    size, count = layers[0][0].A.shape[1], len(layers[0])
    names = [str(i) for i in range(len(layers))]
    model: Any = peft.get_peft_model(
        nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in layers)),
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names),
        adapter_name="a0",
    )
    for i in range(1, count):
        model.add_adapter(f"a{i}", model.peft_config["a0"])
    with torch.no_grad():
        for layer, deltas in zip(model.base_model.model, layers, strict=True):
            for i, d in enumerate(deltas):
                layer.lora_A[f"a{i}"].weight.copy_(d.A)
                layer.lora_B[f"a{i}"].weight.copy_(d.B)
    return model


def by_peft(
    layers: Sequence[list[LayerFactors]], rank: int, kind: str = "svd", **options: Any
) -> Callable[[], Any] | None:
    model = peft_model(layers, rank)
    if model is None:
        return None
    names = [f"a{i}" for i in range(len(layers[0]))]
    if kind.endswith("svd"):
        options["svd_rank"] = rank

    def run() -> None:
        model.add_weighted_adapter(
            names, [1 / len(names)] * len(names), "m", combination_type=kind, **options
        )
        model.delete_adapter("m")

    return run


def adapters(layers: Sequence[list[LayerFactors]], rank: int) -> list[Any]:
    """The same adapters as values of ours."""
    import lorasmith as ls

    names = [f"layers.{i}" for i in range(len(layers))]
    config = ls.LoRAConfig(r=rank, alpha=rank, targets=tuple(names))
    return [
        ls.AdapterWeights.from_tensors(
            config, {n: {"A": d[i].A, "B": d[i].B} for n, d in zip(names, layers, strict=True)}
        )
        for i in range(len(layers[0]))
    ]


def measured(ways: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Way → seconds; the ways take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def measure(ways: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Way → median seconds."""
    return {name: statistics.median(t) for name, t in measured(ways, repeat).items()}


def part_svd(given: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for size in map(int, given.sizes.split(",")):
        deltas = changes(given.adapters, given.rank, size)
        ways: dict[str, Callable[[], Any]] = {
            "factors": lambda d=deltas: factored(d, given.rank),  # type: ignore[misc]
            "dense": lambda d=deltas: densely(d, given.rank),  # type: ignore[misc]
        }
        theirs = by_peft([deltas], given.rank)
        if theirs is not None:
            ways["peft"] = theirs
        times = measured(ways, given.repeat)
        wide = densely([LayerFactors(d.A.double(), d.B.double()) for d in deltas], given.rank)
        wanted = wide.delta(torch.float64)
        error = float((factored(deltas, given.rank).delta(torch.float64) - wanted).norm())
        found.append({"size": size, **summary(times), "error": error / float(wanted.norm())})
    return found


def summary(times: Mapping[str, list[float]], layers: int = 1) -> dict[str, Any]:
    """Milliseconds a layer, and ours ÷ each of the others (medians, least)."""
    mine = next(iter(times))
    return {
        "ms": {n: round(1e3 * statistics.median(t) / layers, 3) for n, t in times.items()},
        "least_ms": {n: round(1e3 * min(t) / layers, 3) for n, t in times.items()},
        "ratio": {
            n: [
                round(statistics.median(times[mine]) / statistics.median(t), 4),
                round(min(times[mine]) / min(t), 4),
            ]
            for n, t in times.items()
            if n != mine
        },
    }


def part_methods(given: argparse.Namespace) -> list[dict[str, Any]]:
    import lorasmith as ls

    layers = [changes(given.adapters, given.rank, given.width, i) for i in range(given.layers)]
    mine = adapters(layers, given.rank)
    found = []
    for number, (name, (options, theirs)) in enumerate(METHODS.items()):
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda n=name, o=options: ls.merge(mine, n, rank=given.rank, **o)  # type: ignore[misc]
        }
        for kind in theirs:
            density = {} if kind == "svd" else {"density": options["density"]}
            run = by_peft(layers, given.rank, kind, **density)
            if run is not None:
                ways[f"PEFT {kind}"] = run
        times = measured(ways, given.repeat)
        lost = ls.merge(mine, name, rank=given.rank, **options).report.discarded
        found.append({"method": name, **summary(times, given.layers), "lost": round(lost, 4)})
        print(f"  {number + 1}/{len(METHODS)} {json.dumps(found[-1])}", file=sys.stderr, flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "svd": part_svd,
    "methods": part_methods,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sizes", default="576,2048", help="d of the layer of svd")
    parser.add_argument("--width", type=int, default=576, help="d of the layers of methods")
    parser.add_argument("--layers", type=int, default=4, help="of methods")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small round of everything")
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.width, given.layers, given.repeat = "256", 256, 1, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {part: PARTS[part](given) for part in given.parts.split(",")}
    print(json.dumps({**vars(given), "results": results}, indent=1))


if __name__ == "__main__":
    main()
