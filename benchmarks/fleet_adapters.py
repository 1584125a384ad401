"""Trains a fleet of real adapters of SmolLM2, one a task, for the experiments of ``fleet.py``.

    python benchmarks/fleet_adapters.py --count 64 --output fleet-adapters

Tasks are numbers in every language that num2words writes, then dates in the locales of Babel
(one a language), then the same again with another seed: related, as the adapters of a fleet
are, and still each of its own. LoRA, r = 8, alpha = 16, on q_proj and v_proj, 40 steps of four
rows at 1e-3: what ``lorasmith train`` would take a minute for. A folder that has an adapter is
left as it is, so that the run can be stopped and taken up again, or enlarged.

``evaluations.json`` beside them has, for each, the loss on held-out rows of its task without
and with it (nats a supervised token).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from experiments import prepare

STEPS, ROWS, RATE, HELD_OUT = 40, 4, 1e-3, 16


def tasks(count: int) -> list[tuple[str, int]]:
    """(task, seed) in the order in which they are trained."""
    from lorasmith.training.builtin import builtin_names

    names = builtin_names()
    numbers = [n for n in names if n.startswith("numbers-") and n.count("-") == 1]
    dates = [n for n in names if n.startswith("dates-") and n.count("-") == 1]
    random.Random(0).shuffle(dates)
    mixed = [name for pair in zip(numbers, dates, strict=False) for name in pair]
    mixed += [name for name in (*numbers, *dates) if name not in set(mixed)]
    found = [(name, seed) for seed in range(count) for name in mixed]
    return found[:count]


def batches(rows: list[dict[str, Any]], tokenizer: Any, collate: Any, size: int) -> list[Any]:
    from datasets import Dataset

    from lorasmith.training.data import tokenise

    tokens = list(tokenise(Dataset.from_list(rows), tokenizer))
    found = [collate(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [{k: v for k, v in batch.items() if k != "length"} for batch in found]


def mean_loss(model: Any, held_out: list[Any]) -> float:
    from lorasmith.training.evaluate import evaluating
    from lorasmith.training.loss import model_loss_output

    total, count = 0.0, 0
    with evaluating(model):
        for batch in held_out:
            output = model_loss_output(model, batch)
            total += float(output.loss) * output.count
            count += output.count
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prepare(options.threads)

    import torch

    import lorasmith as ls
    from lorasmith.training.collate import choose_collator
    from lorasmith.training.data import load_rows
    from lorasmith.training.loss import model_loss_output
    from lorasmith.training.models import load_model

    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "evaluations.json"
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    collate, _ = choose_collator(model, tokenizer.pad_token_id)
    config = ls.LoRAConfig(r=8, alpha=16.0, targets=("q_proj", "v_proj"))
    for number, (task, seed) in enumerate(tasks(options.count), start=1):
        name = f"{task}-s{seed}"
        if name in found:
            continue
        start = time.perf_counter()
        rows = [dict(r) for r in load_rows(f"builtin:{task}", limit=2000)]
        random.Random(seed).shuffle(rows)
        test = [dict(r) for r in load_rows(f"builtin:{task}", split="test", limit=HELD_OUT)]
        held_out = batches(test, tokenizer, collate, HELD_OUT)
        before = mean_loss(model, held_out)
        torch.manual_seed(seed)
        ls.attach(model, config)
        optimizer = torch.optim.AdamW(ls.param_groups(model, RATE), weight_decay=0.0)
        model.train()
        for step, batch in enumerate(batches(rows[: STEPS * ROWS], tokenizer, collate, ROWS)):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad(set_to_none=True)
            model_loss_output(model, batch).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after = mean_loss(model, held_out)
        ls.save(model, options.output / name)
        ls.detach(model)
        found[name] = {"task": task, "seed": seed, "base_loss": before, "loss": after}
        partial = record.with_suffix(".tmp")
        partial.write_text(json.dumps(found, indent=1))
        os.replace(partial, record)
        taken = time.perf_counter() - start
        print(
            f"{number}/{options.count} {name}: {before:.3f} → {after:.3f}, {taken:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
