"""What the rotation budget costs of a training step.

    python benchmarks/rotation_budget.py                          # 30 blocks, 512 tokens
    python benchmarks/rotation_budget.py --blocks 6 --rounds 5 --json rotation_budget.json

The model has the shapes of SmolLM2-135M (30 blocks, width 576, 9 heads, 3 key-value heads,
MLP 1536, vocabulary 49152) with random weights; adapters sit on all linear layers with
r = 16. One round times one whole step (forward, loss, backward, AdamW), and then what each
budget adds to it, in a new random order; the table shows medians of the ratios within a round.

"within": every unit is within its budget, as in most of a training run. "beyond": every unit
of every layer is 2 % beyond its budget and has to be brought back, which is the worst case.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorasmith as ls
from lorasmith.dynamics import Statistics, Step, find_sites
from lorasmith.dynamics.rotation_budget import RotationBudget

BUDGET = 5.0


def make_model(blocks: int, dtype: torch.dtype, device: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(llama)
    model.to(device=device, dtype=dtype)
    ls.attach(model, config)
    return model.train()


def rules(model: nn.Module) -> dict[str, RotationBudget]:
    context: Any = SimpleNamespace(model=model, sites=find_sites(model))
    found = {}
    for per in ("head", "projection"):
        for kind in ("projection", "penalty"):
            rule = RotationBudget(BUDGET, per=per, kind=kind)
            rule.bind(context)
            found[f"{kind} per {per}"] = rule
    return found


def states(parameters: list[nn.Parameter], rule: RotationBudget) -> dict[str, list[Tensor]]:
    """Factors with which every unit is within its budget, and 2 % beyond."""
    torch.manual_seed(1)
    with torch.no_grad():
        for site in rule.context.sites:
            site.B.normal_(std=0.5)
        rule.project()
        found = {}
        for name, factor in (("within", 0.5), ("beyond", 1.02)):
            found[name] = [p.clone() for p in parameters]
            for site in rule.context.sites:
                index = next(i for i, p in enumerate(parameters) if p is site.B)
                found[name][index] *= factor
    return found


def clock(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    config = {"LoRA": ls.LoRAConfig, "DoRA": ls.DoRAConfig}[variant](r=16)
    model = make_model(args.blocks, dtype, args.device, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, 49152, (1, args.tokens), device=args.device)
    watched = rules(model)
    kept = {name: states(parameters, rule) for name, rule in watched.items()}
    units = {name: int(rule.metrics()["units"]) for name, rule in watched.items()}

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def act(rule: RotationBudget) -> None:
        moment = Step(0, Statistics(), optimizer)
        rule.before_step(moment)
        rule.after_step(moment)

    cases = [(name, case) for name in watched for case in ("within", "beyond")]
    ratios: dict[tuple[str, str], list[float]] = {c: [] for c in cases}
    times: dict[tuple[str, str], list[float]] = {c: [] for c in cases}
    whole = []
    for round_ in range(args.rounds + 1):
        now = clock(step, args.device)
        order = random.sample(cases, len(cases))
        for name, case in order:
            with torch.no_grad():
                for p, value in zip(parameters, kept[name][case], strict=True):
                    p.copy_(value)
            spent = clock(lambda name=name: act(watched[name]), args.device)  # type: ignore[misc]
            if round_:  # the first round warms up
                ratios[name, case].append(spent / now)
                times[name, case].append(spent)
        if round_:
            whole.append(now)
    return {
        "step_seconds": statistics.median(whole),
        "rules": {
            name: {
                "units": units[name],
                **{
                    case: {
                        "share_of_step": statistics.median(ratios[name, case]),
                        "seconds": statistics.median(times[name, case]),
                    }
                    for case in ("within", "beyond")
                },
            }
            for name in watched
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", default="LoRA,DoRA")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random.seed(0)
    found = {v: measure(args, v) for v in args.variants.split(",")}
    for variant, result in found.items():
        print(f"\n{variant}: one step {result['step_seconds']:.3f} s")
        print(f"{'':26}{'units':>6}{'within':>10}{'beyond':>10}")
        for name, row in result["rules"].items():
            shares = "".join(
                f"{100 * row[case]['share_of_step']:>8.2f} %" for case in ("within", "beyond")
            )
            print(f"{name:26}{row['units']:>6}{shares}")
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items() if k != "json"}
        machine = {
            "machine": platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        record = {"settings": settings, "machine": machine, "results": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
