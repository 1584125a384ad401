"""A batch in which every row has its own adapter, against HF PEFT's ``adapter_names``.

One run measures everything alternately: each round times a few calls of every contestant,
in a new random order, and the table shows medians of the ratios within a round, so that a
machine that is busy for a while does not favour anybody.

    python benchmarks/mixed_batch.py                     # one layer 576 x 576, and a stack
    python benchmarks/mixed_batch.py --dtype bfloat16 --json mixed.json

Decode is one token a row, prefill 64. "base" is the same model without adapters. The stack
has the shapes of SmolLM2-135M (width 576, 9 heads, 3 key-value heads, MLP 1536; random
weights, no output head), cut to a few blocks; adapters of rank 16 sit on all linear layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import lorasmith as ls

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: (adapters, rows, tokens a row)
CASES = [(8, 8, 1), (8, 32, 1), (32, 32, 1), (8, 8, 64), (32, 32, 64)]


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(576, 576, bias=False))


def stack(blocks: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
        use_cache=False,
    )
    model: nn.Module = LlamaModel(config)
    return model


def names(adapters: int) -> list[str]:
    return [f"adapter{i}" for i in range(adapters)]


def ours(base: nn.Module, adapters: int, r: int, targets: list[str]) -> nn.Module:
    model = copy.deepcopy(base)
    for name in names(adapters):
        made = ls.attach(model, ls.LoRAConfig(r=r, alpha=2 * r, targets=targets), name=name)
        _fill(p for n, p in made.named_parameters() if n.endswith(".B"))
    return model.eval()


def theirs(base: nn.Module, adapters: int, r: int, targets: list[str]) -> nn.Module:
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
    model: Any = None
    for name in names(adapters):
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    _fill(p for n, p in model.named_parameters() if "lora_B" in n)
    result: nn.Module = model.eval()
    return result


def _fill(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def contestants(
    base: nn.Module, ours_model: nn.Module, peft_model: Any, x: Tensor, rows: list[str]
) -> dict[str, Callable[[], object]]:
    if isinstance(base, nn.Sequential):
        inner = peft_model.base_model.model[0]
        ls.use(ours_model, rows)
        return {
            "base": lambda: base[0](x),
            "PEFT": lambda: inner(x, adapter_names=rows),
            "ours": lambda: ours_model[0](x),  # type: ignore[index]
        }
    ls.use(ours_model, rows)
    return {
        "base": lambda: base(inputs_embeds=x),
        "PEFT": lambda: peft_model(inputs_embeds=x, adapter_names=rows),
        "ours": lambda: ours_model(inputs_embeds=x),
    }


def measure(
    calls: dict[str, Callable[[], object]], rounds: int, repeat: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for number in range(rounds):
        order = list(calls)
        random.shuffle(order)
        for name in order:
            best = float("inf")
            for _ in range(repeat):
                start = time.perf_counter()
                calls[name]()
                best = min(best, time.perf_counter() - start)
            times[name].append(best)
        print(f"\r  round {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of a / b within each round."""
    values = [x / y for x, y in zip(a, b, strict=True)]
    q = statistics.quantiles(values, n=4)
    return statistics.median(values), q[0], q[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    parser.add_argument(
        "--models", choices=["layer", "stack"], nargs="+", default=["layer", "stack"]
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": {k: str(v) for k, v in vars(options).items()},
        "results": [],
    }
    for dtype_name in options.dtype:
        for kind in options.models:
            print(f"\n{kind}, r = {options.r}, {dtype_name}, {torch.get_num_threads()} threads")
            print(
                f"{'adapters':>8}{'rows':>6}{'tokens':>8}{'base ms':>10}{'PEFT ms':>10}"
                f"{'ours ms':>10}{'/ base':>8}{'/ PEFT':>8}  {'quartiles':>13}{'goal':>7}"
            )
            torch.manual_seed(0)
            dtype = getattr(torch, dtype_name)
            base = layer() if kind == "layer" else stack(options.blocks)
            base = base.to(dtype).requires_grad_(False).eval()
            targets = ["0"] if kind == "layer" else LAYERS
            made: dict[int, tuple[nn.Module, nn.Module]] = {}
            for adapters, rows, tokens in CASES:
                if adapters not in made:
                    made = {
                        adapters: (
                            ours(base, adapters, options.r, targets),
                            theirs(base, adapters, options.r, targets),
                        )
                    }
                x = torch.randn(rows, tokens, 576, dtype=dtype)
                chosen = [names(adapters)[i % adapters] for i in range(rows)]
                repeat = (20 if tokens == 1 else 5) if kind == "layer" else 1
                with torch.inference_mode():
                    calls = contestants(base, *made[adapters], x, chosen)
                    times = measure(calls, options.rounds, repeat)
                mid, low, high = ratio(times["ours"], times["PEFT"])
                to_base = ratio(times["ours"], times["base"])
                ms = {n: statistics.median(t) * 1e3 for n, t in times.items()}
                goal = "0.33" if (kind, adapters, rows, tokens) == ("layer", 8, 8, 1) else ""
                print(
                    f"{adapters:8}{rows:6}{tokens:8}{ms['base']:10.3f}{ms['PEFT']:10.3f}"
                    f"{ms['ours']:10.3f}{to_base[0]:8.2f}{mid:8.2f}  {low:5.2f} - {high:4.2f}"
                    f"{goal:>7}",
                    flush=True,
                )
                record["results"].append(
                    {
                        "model": kind,
                        "dtype": dtype_name,
                        "adapters": adapters,
                        "rows": rows,
                        "tokens": tokens,
                        "ms": ms,
                        "to_base": to_base,
                        "to_peft": (mid, low, high),
                    }
                )
    if options.json:
        options.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
