"""A fleet served from its shared basis: memory, switching, and decoding with mixed tasks.

    python benchmarks/multitask.py                         # both parts, SmolLM2
    python benchmarks/multitask.py --part memory --tasks 1000
    python benchmarks/multitask.py --part decode --rows 8 --repeats 5

memory: a synthetic fleet (random orthonormal bases of R directions on all linear layers, cores of
rank r, int8) serves batches whose tasks keep changing, under a byte budget for unpacked tasks.
Peak resident memory of the process, the model included; time to switch to tasks that are
unpacked and to ones that are not.

decode: the same kind of fleet with a task for each row, and PEFT with the same tasks as LoRA
factors. Greedy decoding of one batch: the base model alone, one task for all rows, a task of its
own for each row, and the same by PEFT's mixed batch (``adapter_names``). Runs of all kinds
alternate, so that a machine that is busy slows all of them alike; median and least over the
repeats. ``same_tokens`` is the share of tokens in which ours and PEFT's mixed batches agree.
A few blocks of the model (``--blocks``) are enough for a look, but the output head, which no
adapter slows down, then weighs more.

Each part runs in a process of its own. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _model(name: str, blocks: int | None = None) -> tuple[Any, Any]:
    from lorasmith.training.models import load_model

    model, tokenizer = load_model(name, dtype="float32")
    inner: Any = model
    if blocks is not None:
        inner.model.layers = inner.model.layers[:blocks]
        inner.config.num_hidden_layers = len(inner.model.layers)
    return model.eval(), tokenizer


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _peak() -> float:
    """Peak resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _batch(tokenizer: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, len(tokenizer) - 100, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _synthetic(model: Any, tasks: int, directions: int, rank: int) -> Any:
    """A fleet of random tasks on all linear layers, int8."""
    import lorasmith as ls
    from lorasmith.fleet.codes import Layer, coded
    from lorasmith.fleet.members import MemberRecord
    from lorasmith.fleet.records import Adapter
    from lorasmith.fleet.subspace import SharedSubspace
    from lorasmith.io.weights import AdapterWeights

    ls.attach(model, ls.LoRAConfig(r=rank))
    weights = AdapterWeights.from_model(model, "default")
    record = MemberRecord.of(weights)
    ls.detach(model)
    layers: list[Any] = []
    for module, (d_in, d_out) in record.sizes.items():
        if len(layers) % 30 == 0:
            _say(f"{tasks} tasks: layer {len(layers)} of {len(record.sizes)}")
        up = torch.linalg.qr(torch.randn(d_out, min(directions, d_out)))[0].mT
        down = torch.linalg.qr(torch.randn(d_in, min(directions, d_in)))[0].mT
        layer = Layer.new(module, up, down, tasks)
        layer.recode(left="int8", right="int8")
        scale = 0.02 / rank
        codes = [
            coded(torch.randn(rank, len(up)) * scale, torch.randn(rank, len(down)), (d_out, d_in))
            for _ in range(tasks)
        ]
        layer.fill(codes)
        layers.append(layer)
    stored = sum(2 * rank * (a + b) for a, b in record.sizes.values())  # bfloat16
    zeros = torch.zeros(len(layers), dtype=torch.float64)
    adapters = [
        Adapter(f"task-{i}", record, {}, stored, zeros + 1, zeros.clone()) for i in range(tasks)
    ]
    fleet = SharedSubspace("joint", layers, adapters)
    fleet.quantize(8)
    return fleet


def memory(options: argparse.Namespace) -> None:
    """Peak memory and switching times of a large fleet."""
    from lorasmith.fleet.multitask import MultiTaskModel

    model, tokenizer = _model(options.model)
    loaded = _peak()
    fleet = _synthetic(model, options.tasks, options.directions, options.rank)
    served = MultiTaskModel(model, fleet, budget_bytes=options.budget * 2**20)
    batch = _batch(tokenizer, options.rows, 16)
    cold: list[float] = []
    warm: list[float] = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(options.repeats):
        chosen = torch.randperm(options.tasks, generator=generator)[: options.rows].tolist()
        tasks = [f"task-{i}" for i in chosen]
        for times in (cold, warm):
            start = time.perf_counter()
            served.use(tasks)
            times.append((time.perf_counter() - start) / options.rows)
        served.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    stats = served.stats()
    bf16 = fleet.stats().original
    _print(
        "memory",
        tasks=options.tasks,
        layers=len(fleet.modules),
        peak_gb=_peak(),
        model_gb=loaded,
        basis_mb=stats.basis / 1e6,
        packed_mb=stats.packed / 1e6,
        acting_mb=stats.acting / 1e6,
        resident_mb=stats.resident.nbytes / 1e6,
        resident_tasks=len(stats.resident.tasks),
        as_bf16_adapters_gb=bf16 / 1e9,
        switch_cold_ms_per_task=1e3 * statistics.median(cold),
        switch_warm_ms_per_task=1e3 * statistics.median(warm),
    )


def decode(options: argparse.Namespace) -> None:
    """Tokens a second with mixed tasks, beside one task, the base and PEFT."""
    import peft

    from lorasmith.fleet.multitask import MultiTaskModel

    base, tokenizer = _model(options.model, options.blocks)
    fleet = _synthetic(base, options.rows, options.directions, options.rank)
    names = list(fleet.ids)
    model, _ = _model(options.model, options.blocks)
    config = peft.LoraConfig(
        target_modules=list(fleet.modules), r=options.rank, lora_alpha=options.rank
    )
    theirs: Any = peft.get_peft_model(model, config, adapter_name=names[0])
    for number, name in enumerate(names):
        if number:
            theirs.add_adapter(name, config)
        for module, factors in fleet.factors(name).items():
            layer = theirs.base_model.model.get_submodule(module)
            layer.lora_A[name].weight.copy_(factors.A)
            layer.lora_B[name].weight.copy_(factors.B)
        _say(f"PEFT: adapter {number + 1} of {len(names)}")
    theirs.eval()
    served = MultiTaskModel(base, fleet)
    batch = _batch(tokenizer, options.rows, options.prompt)

    def settings(tokens: int) -> dict[str, Any]:
        return {
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }

    runs: dict[str, Callable[[int], Any]] = {
        "base": lambda n: served.generate(batch, tasks=None, **settings(n)),
        "one task": lambda n: served.generate(batch, tasks=names[0], **settings(n)),
        "mixed": lambda n: served.generate(batch, tasks=names, **settings(n)),
        "PEFT mixed": lambda n: theirs.generate(**batch, adapter_names=names, **settings(n)),
    }
    # What a token costs: the time of all of them less that of the first one, which reads
    # the prompt, too.
    times: dict[str, list[float]] = {name: [] for name in runs}
    written: dict[str, Tensor] = {}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            seconds = []
            for tokens in (1, 1 + options.tokens):
                start = time.perf_counter()
                written[name] = run(tokens)
                seconds.append(time.perf_counter() - start)
            if repeat:  # the first one warms up
                times[name].append(max(seconds[1] - seconds[0], 1e-9) / options.tokens)
            _say(f"decode: repeat {repeat} of {options.repeats}, {name}: {seconds[1]:.2f} s")
    ours, peers = (written[n][:, options.prompt :] for n in ("mixed", "PEFT mixed"))
    same = float((ours == peers).double().mean())
    for name, each in times.items():
        _print(
            "decode",
            kind=name,
            rows=options.rows,
            blocks=len(base.model.layers),
            ms_per_token=1e3 * statistics.median(each),
            ms_per_token_least=1e3 * min(each),
            time_over_base=_over(each, times["base"]),
            time_over_peft_mixed=_over(each, times["PEFT mixed"]),
            same_tokens=same,
        )


def _over(mine: list[float], theirs: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _print(part: str, **figures: Any) -> None:
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=("memory", "decode"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--blocks", type=int, help="of the model (decode); all by default")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of a prompt (decode)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens written a row (decode)")
    parser.add_argument("--rank", type=int, default=8, help="rank of a task")
    parser.add_argument("--directions", type=int, default=64, help="R of the shared basis")
    parser.add_argument("--budget", type=int, default=256, help="MiB of unpacked tasks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    if options.part is None:
        for part in ("memory", "decode"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)
        return
    {"memory": memory, "decode": decode}[options.part](options)


if __name__ == "__main__":
    main()
