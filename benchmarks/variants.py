"""Every variant on the same tasks: score, cost, and what was forgotten.

    python benchmarks/variants.py --data-dir DIR                  # about two hours on 2 cores
    python benchmarks/variants.py --data-dir DIR --setting gpu    # a larger model, GSM8K
    python benchmarks/variants.py --data-dir DIR --only lora,dora --report docs/variants.md

The same base model, targets (all linear layers), rows, order of rows, number of steps, batch
size, schedule and optimiser for all. Only the learning rate is a variant's own, chosen for
each task among the three of its grid (``GRIDS``) by the loss on a validation split, with
seed 0, and up to ``WIDER`` rates beyond while the best one is the first or the last; then two
more seeds. The test split decides nothing.

Every run is a process of its own and leaves one JSON file in ``--results`` (by default beside
this script); what is there is not run again, so that the benchmark can be stopped and resumed
at any time. A run's file is
named after everything that could change its result.

Step time and peak memory come from a phase of their own (``--phase cost``), in which each
variant takes turns with LoRA, so that runs which share the machine do not disturb them.

``e2e_valid.txt`` (E2E NLG) and ``gsm8k_*.jsonl`` are read from ``--data-dir``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import (
    PRELOAD,
    Interval,
    Results,
    digest,
    markdown,
    perform,
    prepare,
    rotation,
    write_report,
)

#: Learning rates to choose from. What multiplies activations (gains, angles, a small core
#: between frozen factors) needs larger steps than what adds products of matrices; where both
#: factors start large, or their product is scaled up, smaller ones.
GRIDS = {
    "factors": (4e-4, 1.6e-3, 6.4e-3),
    "large factors": (1e-4, 4e-4, 1.6e-3),
    "gains": (4e-3, 1.6e-2, 6.4e-2),
}
#: Two neighbours of a grid are this factor apart.
STEP = 4.0
#: So many further rates may be tried beyond an end of a grid.
WIDER = 2
#: Entries whose runs are done together.
GROUP = 4


@dataclass(frozen=True)
class Entry:
    """One row of the table: a variant with its options and its grid of learning rates."""

    name: str
    options: Mapping[str, Any]
    grid: str = "factors"
    #: Left out unless ``--only`` names it.
    extra: bool = False

    @property
    def shown(self) -> str:
        """Its name in texts: a start stands in brackets."""
        variant, _, start = self.name.partition(", ")
        return f"{variant} ({start})" if start else variant


def _entries() -> list[Entry]:
    low_rank: dict[str, Any] = {"r": 16, "alpha": 32.0}
    lora = {"variant": "lora", **low_rank}
    return [
        Entry("lora", lora),
        Entry("lora, rslora", {**lora, "scaling": "rslora"}, "large factors", extra=True),
        Entry("lora, pissa", {**lora, "init": "pissa"}, "large factors"),
        Entry("lora, olora", {**lora, "init": "olora"}, "large factors", extra=True),
        Entry("lora, eva", {**lora, "init": "eva"}),
        Entry("lora, corda", {**lora, "init": "corda"}, "large factors", extra=True),
        Entry("lora, lora_ga", {**lora, "init": "lora_ga"}, "large factors", extra=True),
        Entry("lora-fa", {**lora, "options": {"train_A": False}}, extra=True),
        Entry("dora", {"variant": "dora", **low_rank}),
        Entry("delora", {"variant": "delora", "r": 16, "init": "subtract"}),
        Entry("hra", {"variant": "hra", "r": 32}),
        Entry("oft", {"variant": "oft", "options": {"block_size": 32}}),
        Entry("loha", {"variant": "loha", "r": 8, "alpha": 8.0}),
        Entry("lokr", {"variant": "lokr", "r": 8, "alpha": 8.0}),
        Entry("miss", {"variant": "miss", "r": 32}),
        Entry("lora_xs", {"variant": "lora_xs", "r": 32, "alpha": 32.0}),
        Entry("vera", {"variant": "vera", "r": 256}, "gains"),
        Entry("ia3", {"variant": "ia3"}, "gains"),
        Entry("ia3_ff", {"variant": "ia3_ff"}, "gains"),
        Entry("road", {"variant": "road"}, "gains"),
        Entry("antipasto", {"variant": "antipasto"}, "gains"),
        Entry("antipasto_corda", {"variant": "antipasto_corda"}, "gains"),
        Entry("antipasto_rot", {"variant": "antipasto_rot"}, "gains"),
        Entry("antipasto_ablate", {"variant": "antipasto_ablate"}, "gains"),
        Entry("antipasto_arrow", {"variant": "antipasto_arrow"}, "gains"),
    ]


ENTRIES = {entry.name: entry for entry in _entries()}


@dataclass(frozen=True)
class Setting:
    """How large the benchmark is."""

    model: str
    tasks: tuple[str, ...]
    #: Rows a step, by task: so many that the tokens of a step are about as many.
    batches: tuple[int, ...]
    steps: int
    validation_rows: int
    test_rows: int
    characters: int
    device: str
    dtype: str
    seeds: int = 3

    def batch(self, task: str) -> int:
        """Rows a step."""
        return self.batches[self.tasks.index(task)]


SETTINGS = {
    "cpu": Setting("smollm2", ("numbers-en", "e2e"), (8, 4), 16, 32, 64, 6_000, "cpu", "bfloat16"),
    "gpu": Setting("Qwen/Qwen3-0.6B", ("gsm8k",), (16,), 200, 100, 300, 24_000, "cuda", "bfloat16"),
}


@dataclass(frozen=True)
class Run:
    """One training run, or (``entry=None``) the base model as it is."""

    entry: Entry | None
    task: str
    lr: float
    seed: int
    setting: Setting

    @property
    def key(self) -> str:
        """Name of its file: readable, and different whenever the run is."""
        name = "base" if self.entry is None else self.entry.name.replace(", ", "-")
        return f"{name}-{self.task}-lr{self.lr:g}-s{self.seed}-{digest(self)}"


# Tasks ----------------------------------------------------------------------------------


def _rows(task: str, data: Path, seed: int, setting: Setting) -> dict[str, list[dict[str, str]]]:
    """Rows to train on (in the seed's order), to choose the rate on, and to test on."""
    wanted = setting.steps * setting.batch(task)
    if task == "e2e":
        train, valid, test = _e2e(data / "e2e_valid.txt")
    elif task == "gsm8k":
        lines = (data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        known = [_gsm8k(line) for line in lines]
        valid, train = known[: setting.validation_rows], known[setting.validation_rows :]
        lines = (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
        test = [_gsm8k(line) for line in lines]
    else:
        from lorasmith.training.data import load_rows

        source = f"builtin:{task}"
        known = [dict(row) for row in load_rows(source)]
        valid, train = known[: setting.validation_rows], known[setting.validation_rows :]
        seen = {row["prompt"] for row in valid}
        train = [row for row in train if row["prompt"] not in seen]
        test = [dict(row) for row in load_rows(source, split="test", limit=setting.test_rows)]
    generator = random.Random(seed)
    generator.shuffle(train)
    rows = [train[i % len(train)] for i in range(wanted)]
    return {
        "train": rows,
        "valid": valid[: setting.validation_rows],
        "test": test[: setting.test_rows],
    }


def _gsm8k(line: str) -> dict[str, str]:
    row = json.loads(line)
    return {"prompt": row["question"], "completion": row["answer"]}


def _e2e(path: Path) -> tuple[list[dict[str, str]], ...]:
    """Train, validation and test rows that share no meaning representation."""
    splits: tuple[list[dict[str, str]], ...] = ([], [], [])
    for line in path.read_text(encoding="utf-8").splitlines():
        meaning, _, text = line.partition("||")
        if not text.strip():
            continue
        bucket = hashlib.sha256(meaning.strip().encode()).digest()[0] % 10
        row = {
            "prompt": f"Describe the restaurant in one sentence.\n{meaning.strip()}",
            "completion": text.strip(),
        }
        splits[0 if bucket < 8 else bucket - 7].append(row)
    for rows in splits[1:]:
        random.Random(0).shuffle(rows)  # several sentences of one meaning stand in a row
    return splits


def _answer(text: str) -> str:
    """The number behind the last ``####`` of a GSM8K answer."""
    return text.rpartition("####")[2].strip().replace(",", "").rstrip(".")


# One run --------------------------------------------------------------------------------


def _train(run: Run, model: Any, tokenizer: Any, rows: Sequence[Any], scratch: Path) -> Any:
    from lorasmith.training.config import AdapterOptions, TrainConfig
    from lorasmith.training.run import train

    assert run.entry is not None
    data = scratch / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = TrainConfig(
        model=run.setting.model,
        data=str(data),
        output=scratch / "adapter",
        adapter=AdapterOptions(**run.entry.options),
        steps=run.setting.steps,
        batch_size=run.setting.batch(run.task),
        lr=run.lr,
        seed=run.seed,
        dtype=run.setting.dtype,  # type: ignore[arg-type]
        device=run.setting.device,
        save_steps=None,
    )
    return train(config, model=model, tokenizer=tokenizer, progress=False)


def work(job: tuple[Run, Path, Path, int]) -> tuple[str, dict[str, Any]]:
    """One run, in this process; what it measured, or why it failed."""
    run, data, folder, threads = job
    prepare(threads)
    try:
        return run.key, _measure(run, data, _best_so_far(run, Results(folder)))
    except Exception as error:  # noqa: BLE001 - one variant that fails must not end the rest
        return run.key, {"failed": f"{type(error).__name__}: {error}"}


def _best_so_far(run: Run, results: Results) -> float | None:
    """The least validation loss among the other rates of a run that chooses the rate."""
    if run.entry is None or run.seed:
        return None
    others = tried(run.entry, run.task, run.setting, results)
    return min((loss for lr, loss in others.items() if lr != run.lr), default=None)


def _measure(run: Run, data: Path, best: float | None) -> dict[str, Any]:
    from lorasmith.training.evaluate import evaluate, general_text, perplexity
    from lorasmith.training.models import load_model

    setting = run.setting
    model, tokenizer = load_model(setting.model, dtype=setting.dtype, device=setting.device)
    rows = _rows(run.task, data, run.seed, setting)
    found: dict[str, Any] = {}
    if run.entry is not None:
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            result = _train(run, model, tokenizer, rows["train"], Path(scratch))
            found["seconds"] = time.perf_counter() - start
        found["parameters"] = result.trainable_parameters
        found["train_loss"] = result.final_loss
        found["rotation_deg"] = rotation(model)
    batch = setting.validation_rows
    if run.seed == 0:  # the seed that chooses the rate
        valid = evaluate(model, tokenizer, rows["valid"], batch_size=batch, exact_match=False)
        found["valid_loss"] = valid.loss
        if best is not None and not valid.loss < best:
            return found  # another rate does better: the test split is not looked at
    report = evaluate(
        model, tokenizer, rows["test"], batch_size=batch, exact_match=run.task != "e2e"
    )
    found["test_loss"] = report.loss
    if run.task == "gsm8k":
        right = [_answer(e.got) == _answer(e.expected) for e in report.examples]
        found["accuracy"] = sum(right) / len(right)
    elif report.exact_match is not None:
        found["accuracy"] = report.exact_match
    found["perplexity"] = perplexity(model, tokenizer, general_text(setting.characters))
    return found


# All runs -------------------------------------------------------------------------------


def search_runs(entry: Entry, setting: Setting) -> Iterator[Run]:
    """The runs that choose the learning rate."""
    low, middle, high = GRIDS[entry.grid]
    for lr in (middle, low, high):  # the likely one first: those that it beats are cut short
        for task in setting.tasks:
            yield Run(entry, task, lr, 0, setting)


def seed_runs(entry: Entry, setting: Setting, results: Results) -> Iterator[Run]:
    """The further seeds at the chosen rate; seed 0 has been run."""
    for task in setting.tasks:
        lr = chosen_rate(entry, task, setting, results)
        if lr is not None:
            for seed in range(1, setting.seeds):
                yield Run(entry, task, lr, seed, setting)


def wider_runs(entry: Entry, setting: Setting, results: Results) -> Iterator[Run]:
    """One rate further, by task, where the best one so far has no neighbour on one side."""
    grid = GRIDS[entry.grid]
    for task in setting.tasks:
        lr = chosen_rate(entry, task, setting, results)
        for beyond in () if lr is None else (lr / STEP, lr * STEP):
            run = Run(entry, task, beyond, 0, setting)
            if beyond in _rates(grid) and results.get(run) is None:
                yield run


def _rates(grid: Sequence[float]) -> list[float]:
    """Every rate that may be tried, ascending."""
    below = [grid[0] / STEP**n for n in range(WIDER, 0, -1)]
    above = [grid[-1] * STEP**n for n in range(1, WIDER + 1)]
    return [*below, *grid, *above]


def tried(entry: Entry, task: str, setting: Setting, results: Results) -> dict[float, float]:
    """Rate → validation loss with seed 0, ascending; what failed counts as infinite."""
    losses = {}
    for lr in _rates(GRIDS[entry.grid]):
        result = results.get(Run(entry, task, lr, 0, setting))
        if result is not None:
            loss = result.get("valid_loss", math.inf)
            losses[lr] = loss if math.isfinite(loss) else math.inf
    return losses


def chosen_rate(entry: Entry, task: str, setting: Setting, results: Results) -> float | None:
    """The rate with the least validation loss; ``None`` if no run came through."""
    losses = tried(entry, task, setting, results)
    lr = min(losses, key=lambda lr: losses[lr], default=None)
    return None if lr is None or math.isinf(losses[lr]) else lr


# Cost -----------------------------------------------------------------------------------


def cost(job: tuple[Entry, Setting, Path, int, int]) -> tuple[str, dict[str, Any]]:
    """Step time of one variant against LoRA's in turns, and its peak memory, in this process."""
    entry, setting, data, threads, steps = job
    prepare(threads)
    try:
        return entry.name, _cost(entry, setting, data, steps)
    except Exception as error:  # noqa: BLE001 - one variant that fails must not end the rest
        return entry.name, {"failed": f"{type(error).__name__}: {error}"}


def _cost(entry: Entry, setting: Setting, data: Path, steps: int) -> dict[str, Any]:
    import torch

    import lorasmith as ls
    from lorasmith.training.collate import PaddingCollator
    from lorasmith.training.config import AdapterOptions
    from lorasmith.training.data import tokenise
    from lorasmith.training.loss import model_loss
    from lorasmith.training.models import load_model

    model, tokenizer = load_model(setting.model, dtype=setting.dtype, device=setting.device)
    rows = _rows(setting.tasks[-1], data, 0, setting)["train"]
    from datasets import Dataset

    tokens = tokenise(Dataset.from_list(rows), tokenizer)
    collate = PaddingCollator(tokenizer.pad_token_id)
    count = setting.batch(setting.tasks[-1])
    batches = []
    for i in range(0, len(tokens) - count + 1, count):
        batch = collate([tokens[j] for j in range(i, i + count)])
        batch.pop("length", None)
        batches.append({k: v.to(setting.device) for k, v in batch.items()})
    memory = _Memory(setting.device)

    def one(optimizer: Any, batch: Any) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        memory.wait()
        return time.perf_counter() - start

    config = AdapterOptions(**entry.options).to_config()
    needs = ls.variants()[config.variant].statistics(config)
    model.train()
    for batch in batches[:2]:  # what the base alone touches is not the adapter's
        with torch.no_grad():
            model(**{k: v for k, v in batch.items() if k != "labels"})
    before = memory.used()
    start = time.perf_counter()
    mine = ls.attach(model, config, name="mine", calibration=batches[:8] if needs else None)
    made = time.perf_counter() - start
    optimizers = {"mine": torch.optim.AdamW(mine.parameters(), lr=1e-5)}
    memory.reset()
    for batch in batches[:2]:
        one(optimizers["mine"], batch)
    peak = memory.peak() - before
    lora = ls.attach(model, ls.LoRAConfig(r=16, alpha=32.0), name="lora")
    optimizers["lora"] = torch.optim.AdamW(lora.parameters(), lr=1e-5)
    times: dict[str, list[float]] = {"mine": [], "lora": []}
    for step in range(steps + 1):
        for name in ("mine", "lora") if step % 2 else ("lora", "mine"):
            ls.use(model, name)
            seconds = one(optimizers[name], batches[step % len(batches)])
            if step:  # the first one of each warms up
                times[name].append(seconds)
    ratios = [a / b for a, b in zip(times["mine"], times["lora"], strict=True)]
    return {
        "parameters": mine.num_parameters(),
        "attach_seconds": made,
        "step_seconds": statistics.median(times["mine"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "peak_mb": peak,
    }


class _Memory:
    """Memory in use and its peak, in MB: the accelerator's, or the process's."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.cuda if device == "cuda" else None

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda is not None:
            self.cuda.synchronize()

    def used(self) -> float:
        """In use now."""
        if self.cuda is not None:
            return float(self.cuda.memory_allocated()) / 2**20
        return _status("VmRSS")

    def reset(self) -> None:
        """Starts the peak anew."""
        if self.cuda is not None:
            self.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Most in use since then."""
        if self.cuda is not None:
            return float(self.cuda.max_memory_allocated()) / 2**20
        return _status("VmHWM")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{name} is not in /proc/self/status: this benchmark needs Linux")


def measure_costs(options: argparse.Namespace, setting: Setting, path: Path) -> None:
    """The cost of every entry, one after the other, alone on the machine."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    jobs = [
        (entry, setting, options.data_dir, os.cpu_count() or 1, options.cost_steps)
        for entry in options.entries
        if entry.name not in known or "failed" in known[entry.name]
    ]
    with context.Pool(1, maxtasksperchild=1) as pool:
        for name, result in pool.imap(cost, jobs):
            known[name] = result
            path.write_text(json.dumps(known, indent=1))
            shown = result.get("failed") or f"{result['ratio']:.2f} x LoRA's step"
            print(f"cost of {name}: {shown}", flush=True)


# The report -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All seeds of one entry on one task."""

    entry: Entry
    task: str
    lr: float
    runs: tuple[dict[str, Any], ...]
    #: Whether no lower or no higher rate was tried.
    edge: bool

    def interval(self, key: str) -> Interval:
        """Over the seeds."""
        return Interval.of([run[key] for run in self.runs])

    def against(self, other: Outcome, key: str) -> Interval:
        """The difference to another entry, seed by seed (same rows, same order)."""
        pairs = zip(self.runs, other.runs, strict=True)
        return Interval.of([a[key] - b[key] for a, b in pairs])


def outcomes(
    options: argparse.Namespace, setting: Setting, results: Results
) -> tuple[dict[str, list[Outcome]], dict[str, str]]:
    """Task → complete outcomes, best test loss first; and entry → why it has none."""
    found: dict[str, list[Outcome]] = {task: [] for task in setting.tasks}
    failed: dict[str, str] = {}
    for entry in options.entries:
        for task in setting.tasks:
            lr = chosen_rate(entry, task, setting, results)
            if lr is None:
                first = [results.get(run) for run in search_runs(entry, setting)]
                why = next((r["failed"] for r in first if r and "failed" in r), "not run")
                failed[entry.name] = why
                continue
            runs = [results.get(Run(entry, task, lr, s, setting)) for s in range(setting.seeds)]
            bad = [r for r in runs if r is None or "failed" in r]
            if bad:
                failed[entry.name] = "a seed is missing" if bad[0] is None else bad[0]["failed"]
                continue
            losses = list(tried(entry, task, setting, results))
            edge = lr in (losses[0], losses[-1])
            found[task].append(Outcome(entry, task, lr, tuple(r for r in runs if r), edge))
    for complete in found.values():
        complete.sort(key=lambda o: o.interval("test_loss").mean)
    return found, failed


def table(found: Sequence[Outcome], base: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """One task's outcomes as Markdown."""
    lora = next((o for o in found if o.entry.name == "lora"), None)
    accuracy = "accuracy" in base
    head = ["variant", "learning rate", "test loss", "− LoRA's, paired"]
    head += ["exact, %"] if accuracy else []
    head += ["parameters", "step ÷ LoRA's", "peak memory, MB", "perplexity elsewhere", "θ̄, °"]
    lines = []
    row = ["*base model*", "", f"{base['test_loss']:.3f}", ""]
    row += [f"{100 * base['accuracy']:.0f}"] if accuracy else []
    lines.append([*row, "0", "", "", f"{base['perplexity']:.2f}", "0"])
    for outcome in found:
        edge = " (edge)" if outcome.edge else ""
        row = [outcome.entry.shown, f"{outcome.lr:g}{edge}"]
        row.append(outcome.interval("test_loss").show(3))
        if lora is None or outcome is lora:
            row.append("")
        else:
            difference = outcome.against(lora, "test_loss")
            text = f"{difference.mean:+.3f} ± {difference.half:.3f}"
            row.append(f"**{text}**" if difference.excludes_zero else text)
        if accuracy:
            row.append(outcome.interval("accuracy").show(0, 100))
        cost = costs.get(outcome.entry.name, {})
        row.append(f"{outcome.runs[0]['parameters']:,}")
        row.append(f"{cost['ratio']:.2f}" if "ratio" in cost else "")
        row.append(f"{cost['peak_mb']:.0f}" if "peak_mb" in cost else "")
        row.append(outcome.interval("perplexity").show(2))
        row.append(outcome.interval("rotation_deg").show(2))
        lines.append(row)
    return markdown(head, lines)


def claims(task: str, found: Sequence[Outcome]) -> str:
    """What the intervals allow one to say about a task, in words."""
    if not found:
        return ""
    best = found[0]
    level = [o.entry.shown for o in found[1:] if not o.against(best, "test_loss").excludes_zero]
    text = f"On `{task}` the least mean test loss is that of **{best.entry.shown}**. "
    text += (
        "The paired interval of the difference to it contains zero for "
        + ", ".join(level)
        + ": no order among these can be claimed."
        if level
        else "The paired interval of the difference to it excludes zero for all others."
    )
    lora = next((o for o in found if o.entry.name == "lora"), None)
    if lora is not None:
        compared = [(o, o.against(lora, "test_loss")) for o in found if o is not lora]
        better = [o.entry.shown for o, d in compared if d.excludes_zero and d.mean < 0]
        worse = [o.entry.shown for o, d in compared if d.excludes_zero and d.mean > 0]
        text += f" Against LoRA, {len(compared)} comparisons: "
        text += f"better {', '.join(better) or 'none'}; worse {', '.join(worse) or 'none'}; "
        text += "the rest cannot be told apart."
        expected = 0.05 * len(compared)
        text += f" At 95 %, {expected:.1f} such verdicts are to be expected by chance alone."
    return text


def figure(
    found: Mapping[str, Sequence[Outcome]],
    bases: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Test loss, what was forgotten, and parameters: a row a variant, the best on top, by task.

    What did not get below the base model's loss is left out: it would squeeze all others.
    """
    found = {
        task: [o for o in outcomes if o.interval("test_loss").mean < bases[task]["test_loss"]]
        for task, outcomes in found.items()
    }
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from lorasmith.web.figures import GRID, INK, MUTED, SERIES

    tasks = [t for t in found if found[t]]
    rows = max(len(found[t]) for t in tasks)
    plot, grid = plt.subplots(
        len(tasks), 3, figsize=(11, (0.22 * rows + 0.9) * len(tasks)), squeeze=False,
        sharey="row", layout="constrained",
    )  # fmt: skip
    panels = {
        "test_loss": "test loss on {}, nats a token",
        "perplexity": "perplexity on other text (line: base)",
        "parameters": "trainable parameters",
    }
    for line, task in zip(grid, tasks, strict=True):
        shown = [o.entry.shown for o in found[task]]
        for axes, (key, label) in zip(line, panels.items(), strict=True):
            for place, outcome in enumerate(found[task]):
                colour = SERIES[list(GRIDS).index(outcome.entry.grid)]
                value = outcome.interval(key)
                half = 0.0 if key == "parameters" else value.half
                axes.errorbar(value.mean, place, xerr=half, fmt="o", ms=4, lw=1.2, color=colour)
            if key == "parameters":
                axes.set_xscale("log")
            if key == "perplexity":
                axes.axvline(bases[task]["perplexity"], color=MUTED, lw=0.8, ls=":")
            axes.set_yticks(range(len(shown)), shown)
            axes.tick_params(axis="x", which="both", labelsize=8, labelcolor=MUTED)
            axes.tick_params(axis="y", labelsize=8, labelcolor=INK, length=0)
            axes.set_xlabel(label.format(task), color=MUTED, fontsize=9)
            axes.grid(visible=True, axis="x", color=GRID, lw=0.5)
            axes.spines[["top", "right", "left"]].set_visible(False)
        line[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=150)
    plt.close(plot)


def report(options: argparse.Namespace, setting: Setting, results: Results, costs: Path) -> str:
    """All tables and claims as Markdown; also draws the figure."""
    found, failed = outcomes(options, setting, results)
    known: dict[str, Any] = json.loads(costs.read_text()) if costs.is_file() else {}
    pairs = zip(setting.tasks, setting.batches, strict=True)
    rows = " and ".join(f"{n} rows ({task})" for task, n in pairs)
    conditions = (
        f"Base model `{setting.model}` ({setting.dtype}), {setting.steps} steps of {rows}, AdamW, "
        f"linear schedule, all linear layers, {setting.seeds} seeds; {platform.machine()}, "
        f"{os.cpu_count()} cores."
    )
    parts = [conditions]
    for task in setting.tasks:
        base = results.get(Run(None, task, 0.0, 0, setting))
        if base is None or "failed" in base or not found[task]:
            continue
        parts += [f"### `{task}`", table(found[task], base, known), claims(task, found[task])]
    if failed:
        reasons = "\n".join(f"- {name}: {why}" for name, why in failed.items())
        parts += ["### Without a result", reasons]
    if options.figure and any(found.values()):
        bases = {t: results.get(Run(None, t, 0.0, 0, setting)) or {} for t in setting.tasks}
        figure(found, bases, options.figure)
    return "\n\n".join(parts)


def main() -> None:
    """Runs what has not been run, then reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--only", help="names of entries, separated by commas (no blanks)")
    parser.add_argument("--phase", choices=["all", "score", "cost", "report"], default="all")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "variants"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--cost-steps", type=int, default=8)
    parser.add_argument("--report", type=Path, help="Markdown file to put the tables into")
    parser.add_argument("--figure", type=Path, help="file for the figure (png, svg)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    wanted: Callable[[str], bool] = lambda _: True  # noqa: E731
    if options.only:
        names = {n.strip().replace(" ", "") for n in options.only.split(",")}
        wanted = lambda name: name.replace(", ", "-") in names  # noqa: E731
    options.entries = [
        e for e in ENTRIES.values() if wanted(e.name) and (options.only or not e.extra)
    ]
    if not options.entries:
        parser.error(f"--only names none of {', '.join(n.replace(', ', '-') for n in ENTRIES)}")
    results = Results(options.results / options.setting)
    costs = options.results / f"{options.setting}-cost.json"
    if options.phase in ("all", "score"):

        def score(runs: Sequence[Run]) -> None:
            perform(
                runs,
                results,
                work,
                options.data_dir,
                results.folder,
                options.threads,
                jobs=options.jobs,
                shown=("valid_loss", "test_loss"),
            )

        score([Run(None, task, 0.0, 0, setting) for task in setting.tasks])
        # A few entries at a time, so that what is stopped half-way has complete rows.
        for first in range(0, len(options.entries), GROUP):
            group = options.entries[first : first + GROUP]
            score([r for e in group for r in search_runs(e, setting)])
            for _ in range(WIDER):
                further = [r for e in group for r in wider_runs(e, setting, results)]
                score(further)
            score([r for e in group for r in seed_runs(e, setting, results)])
    if options.phase in ("all", "cost"):
        measure_costs(options, setting, costs)
    text = report(options, setting, results, costs)
    print(text)
    if options.report:
        write_report(options.report, "variants:", text)
    if options.json:
        found, failed = outcomes(options, setting, results)
        record = {
            "setting": asdict(setting),
            "grids": GRIDS,
            "outcomes": {t: [asdict(o) for o in found[t]] for t in found},
            "failed": failed,
            "cost": json.loads(costs.read_text()) if costs.is_file() else {},
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
