"""Step time and memory of an adapter, against HF PEFT and against the frozen base.

One run measures everything alternately: each round times one step (forward and backward)
of every contestant, in a new random order, and the table shows medians of the ratios
within a round, so that a machine that is busy for a while does not favour anybody.

    python benchmarks/step.py                        # 512 and 32 tokens, float32
    python benchmarks/step.py --dtype bfloat16 --rounds 40 --json step.json
    python benchmarks/step.py --only HRA,DeLoRA,OFT --blocks 2

The model has the shapes of SmolLM2-135M (30 blocks, width 576, 9 heads, 3 key-value
heads, MLP 1536) with random weights, without the output head; adapters sit on all linear
layers with r = 16. "frozen" is the base alone: forward, and the gradient with respect to
the embedded input, which is what any adapter has to pay on top of.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import lorasmith as ls

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(blocks: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1024,
        use_cache=False,
    )
    model: nn.Module = LlamaModel(config)
    return model.to(dtype).requires_grad_(False)


def ours(base: nn.Module, config: ls.AdapterConfig) -> nn.Module:
    model = _copy(base)
    ls.attach(model, config)
    return model


def theirs(base: nn.Module, config: Any) -> nn.Module:
    model: nn.Module = get_peft_model(_copy(base), config)
    return model


def _copy(base: nn.Module) -> nn.Module:
    """A model of its own over the same weights, which no contestant writes."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def pairs(r: int) -> dict[str, tuple[Any, Any]]:
    """Name → PEFT's configuration and ours."""
    alpha = 2 * r
    common: dict[str, Any] = {"r": r, "lora_alpha": alpha, "target_modules": LAYERS}
    layers: dict[str, Any] = {"target_modules": LAYERS}
    ours_low: dict[str, Any] = {"r": r, "alpha": alpha}
    return {
        "LoRA": (LoraConfig(**common), ls.LoRAConfig(**ours_low)),
        "LoRA dropout 0.05": (
            LoraConfig(**common, lora_dropout=0.05),
            ls.LoRAConfig(**ours_low, dropout=0.05),
        ),
        "DoRA": (LoraConfig(**common, use_dora=True), ls.DoRAConfig(**ours_low)),
        "IA3": (
            peft.IA3Config(**layers, feedforward_modules=["down_proj"]),
            ls.IA3Config(targets=LAYERS, feedforward=["down_proj"]),
        ),
        "DeLoRA": (peft.DeloraConfig(r=r, **layers), ls.DeLoRAConfig(r=r, init="zero")),
        "HRA": (peft.HRAConfig(r=r, **layers), ls.HRAConfig(r=r)),
        "OFT": (
            peft.OFTConfig(oft_block_size=32, r=0, **layers),
            ls.OFTConfig(block_size=32),
        ),
        "RoAd": (peft.RoadConfig(variant="road_1", **layers), ls.RoAdConfig()),
        "VeRA": (peft.VeraConfig(r=256, **layers), ls.VeRAConfig(r=256)),
        "LoHa": (peft.LoHaConfig(r=8, **layers), ls.LoHaConfig(r=8)),
        "LoKr": (peft.LoKrConfig(r=8, **layers), ls.LoKrConfig(r=8)),
        "MiSS": (peft.MissConfig(r=64, **layers), ls.MiSSConfig(r=64)),
        # PEFT has none of these.
        "LoRA-XS": (None, ls.LoRAXSConfig(r=32)),
        "AntiPaSTO": (None, ls.AntiPaSTOConfig()),
    }


#: What is measured unless ``--only`` says otherwise: PEFT's HRA alone takes gigabytes.
USUAL = ("LoRA", "LoRA dropout 0.05", "DoRA", "IA3")


def contestants(base: nn.Module, r: int, names: Sequence[str]) -> dict[str, nn.Module]:
    models = {"frozen": _copy(base)}
    known = pairs(r)
    for name in names:
        peer, mine = known[name]
        if peer is not None:
            models[f"PEFT {name}"] = theirs(base, peer)
        models[f"ours {name}"] = ours(base, mine)
    for model in models.values():
        model.train()
    return models


def step(model: nn.Module, embedded: Tensor) -> None:
    x = embedded.detach().requires_grad_(True)
    hidden = model(inputs_embeds=x).last_hidden_state
    hidden.backward(torch.ones_like(hidden))
    for parameter in model.parameters():
        parameter.grad = None


def saved_bytes(model: nn.Module, embedded: Tensor) -> int:
    """Bytes kept between forward and backward, parameters and constants left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        hidden = model(inputs_embeds=embedded.detach().requires_grad_(True)).last_hidden_state
    total = sum(seen.values())
    del hidden
    return total


def peak_bytes(model: nn.Module, embedded: Tensor) -> int:
    """Highest sum of live allocations during a step, from the allocator's own events."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(model, embedded)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak


def measure(models: dict[str, nn.Module], embedded: Tensor, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        step(model, embedded)
    for number in range(rounds):
        order = list(models)
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            step(models[name], embedded)
            times[name].append(time.perf_counter() - start)
        print(f"\r  round {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of a / b within each round."""
    values = [x / y for x, y in zip(a, b, strict=True)]
    q = statistics.quantiles(values, n=4)
    return statistics.median(values), q[0], q[2]


GOALS = {
    ("LoRA", 512): 0.95,
    ("LoRA", 32): 0.95,
    ("LoRA dropout 0.05", 512): 0.80,
    ("LoRA dropout 0.05", 32): 0.80,
    ("DoRA", 512): 0.75,
    ("DoRA", 32): 0.50,
    ("HRA", 512): 0.20,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 32])
    parser.add_argument("--only", help="names of variants, separated by commas; all for all")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    base = make_base(options.blocks, getattr(torch, options.dtype))
    names = (options.only or ",".join(USUAL)).split(",")
    names = list(pairs(options.r)) if names == ["all"] else names
    if unknown := set(names) - pairs(options.r).keys():
        parser.error(f"--only knows {', '.join(pairs(options.r))}; not {', '.join(unknown)}")
    models = contestants(base, options.r, names)
    record: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": {k: str(v) for k, v in vars(options).items()},
        "results": [],
    }
    for tokens in options.tokens:
        batch = 4 if tokens >= 128 else 1
        embedded = torch.randn(batch, tokens // batch, 576, dtype=getattr(torch, options.dtype))
        times = measure(models, embedded, options.rounds)
        print(f"\n{tokens} tokens ({batch} x {tokens // batch}), r = {options.r}, {options.dtype}")
        head = f"{'':26}{'ms':>8}{'/ frozen':>10}{'/ PEFT':>9}  {'quartiles':>13}{'goal':>7}"
        print(head + f"{'saved MB':>10}{'peak MB':>9}")
        for name in models:
            saved = saved_bytes(models[name], embedded) / 1e6
            peak = peak_bytes(models[name], embedded) / 1e6
            family = name.removeprefix("ours ").removeprefix("PEFT ")
            row: dict[str, Any] = {
                "tokens": tokens,
                "name": name,
                "ms": statistics.median(times[name]) * 1e3,
                "to_frozen": ratio(times[name], times["frozen"])[0],
                "saved_mb": saved,
                "peak_mb": peak,
            }
            line = f"{name:26}{row['ms']:8.1f}{row['to_frozen']:10.2f}"
            peer = f"PEFT {family}"
            if name.startswith("ours") and peer in times:
                row["to_peft"] = ratio(times[name], times[peer])
                goal = GOALS.get((family, tokens))
                mid, low, high = row["to_peft"]
                line += f"{mid:9.2f}  {low:5.2f} - {high:4.2f}{goal or '':>7}"
            else:
                line += " " * 31
            print(line + f"{saved:10.0f}{peak:9.0f}", flush=True)
            record["results"].append(row)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
