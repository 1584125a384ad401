"""Fine-tuning from rows to adapter: lorasmith against HF PEFT + Trainer.

Both get the same base model (SmolLM2-135M-Instruct), the same rows tokenised the same way
with the loss on the response only, the same adapter (LoRA, r = 16, all linear layers),
batch size, number of steps, learning rate and schedule. PEFT's side is what its users
write: ``get_peft_model``, ``Trainer``, ``DataCollatorForSeq2Seq``, all else default. Ours
is ``lorasmith.training.train`` with its defaults.

    python benchmarks/end_to_end.py                                  # builtin:dates-en
    python benchmarks/end_to_end.py --data gsm8k.jsonl --dtype float32 --json out.json

Every run is a process of its own, the two sides take turns, and before each a new random
order of rows is drawn (the same for both). Reported: wall time of training alone, the peak
of resident memory above what the loaded base model takes, and the loss on held-out rows
after training, computed by one function for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LR = 1e-3
R = 16


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{field} is not in /proc/self/status: this benchmark needs Linux")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _rows(options: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any]:
    from lorasmith.training.data import load_rows, split_rows, tokenise

    rows = load_rows(options.data)
    if options.data.startswith("builtin:"):
        held_out = load_rows(options.data, split="test", limit=64)
    else:
        rows, held_out = split_rows(rows, fraction=64 / len(rows))
    rows = rows.shuffle(seed=options.seed).select(range(options.steps * options.batch))
    return rows, tokenise(held_out, tokenizer)


def _eval_loss(model: Any, rows: Any, pad: int) -> float:
    import torch

    from lorasmith.training.collate import PaddingCollator
    from lorasmith.training.loss import model_loss_output

    collate = PaddingCollator(pad)
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            batch = collate([rows[i] for i in range(start, min(start + 8, len(rows)))])
            batch.pop("length", None)
            out = model_loss_output(model, batch)
            total += float(out.loss) * int(out.count)
            count += int(out.count)
    return total / count


def worker(options: argparse.Namespace) -> dict[str, float]:
    """One run of one side, in this process."""
    import torch
    import transformers

    from lorasmith.training.models import load_model

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model, tokenizer = load_model("smollm2", dtype=options.dtype, device="cpu")
    train_rows, held_out = _rows(options, tokenizer)
    # Pages of the weights file count once they are read: touch them all first.
    sum(float(p.float().sum()) for p in model.parameters())
    before = _resident_mb("VmRSS")
    _reset_peak()
    start = time.perf_counter()
    run = _train_peft if options.side == "peft" else _train_ours
    with tempfile.TemporaryDirectory() as scratch:
        model = run(options, model, tokenizer, train_rows, Path(scratch))
        seconds = time.perf_counter() - start
        peak = _resident_mb("VmHWM")
    return {
        "seconds": seconds,
        "peak_above_base_mb": peak - before,
        "base_mb": before,
        "loss": _eval_loss(model, held_out, tokenizer.pad_token_id),
        "threads": torch.get_num_threads(),
    }


def _train_peft(
    options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, scratch: Path
) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from lorasmith.training.data import tokenise

    model = get_peft_model(
        model, LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = tokenise(rows, tokenizer)
    keep = {"input_ids", "labels"}
    rows = rows.remove_columns([c for c in rows.column_names if c not in keep])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=LR,
            seed=options.seed,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(scratch / "adapter")
    return model


def _train_ours(
    options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, scratch: Path
) -> Any:
    from lorasmith.training.config import AdapterOptions, TrainConfig
    from lorasmith.training.run import train

    data = scratch / "rows.jsonl"
    rows.to_json(str(data))
    config = TrainConfig(
        model="smollm2",
        data=str(data),
        output=scratch / "adapter",
        adapter=AdapterOptions(r=R, alpha=2 * R),
        steps=options.steps,
        batch_size=options.batch,
        lr=LR,
        warmup=0.0,
        seed=options.seed,
        dtype=options.dtype,
        device="cpu",
    )
    train(config, model=model, tokenizer=tokenizer, progress=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin:dates-en")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["peft", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("RESULT " + json.dumps(worker(options)))
        return
    results: dict[str, list[dict[str, float]]] = {"peft": [], "ours": []}
    for repeat in range(options.repeats):
        for side in ("peft", "ours") if repeat % 2 == 0 else ("ours", "peft"):
            command = [sys.executable, __file__, "--side", side, "--seed", str(repeat)]
            for key in ("data", "dtype", "steps", "batch"):
                command += [f"--{key}", str(getattr(options, key))]
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if done.returncode or not lines:
                sys.exit(f"the {side} run failed:\n{done.stdout}\n{done.stderr}")
            result = json.loads(lines[-1].removeprefix("RESULT "))
            results[side].append(result)
            print(
                f"  repeat {repeat}, {side}: {result['seconds']:.1f} s, "
                f"{result['peak_above_base_mb']:.0f} MB above base, loss {result['loss']:.4f}",
                file=sys.stderr,
            )
    print(f"\n{options.data}, {options.steps} steps of {options.batch} rows, dtype {options.dtype}")
    print(f"{'':28}{'PEFT + Trainer':>16}{'lorasmith':>12}{'ratio':>8}   range of ratios   goal")
    goals = {"seconds": "0.50", "peak_above_base_mb": "0.50", "loss": "1.00"}
    for key, label in (
        ("seconds", "training time, s"),
        ("peak_above_base_mb", "peak memory above base, MB"),
        ("loss", "held-out loss"),
    ):
        a = [r[key] for r in results["peft"]]
        b = [r[key] for r in results["ours"]]
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        print(
            f"{label:28}{statistics.median(a):16.3f}{statistics.median(b):12.3f}"
            f"{statistics.median(ratios):8.2f}   {min(ratios):7.2f} - {max(ratios):.2f}"
            f"{goals[key]:>9}"
        )
    if options.json:
        record = {
            "machine": platform.processor() or platform.machine(),
            "options": {k: str(v) for k, v in vars(options).items()},
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
