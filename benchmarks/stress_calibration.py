"""What the stress controller notices, how soon, and what it takes for a shock that is none.

    python benchmarks/stress_calibration.py                                   # half a minute
    python benchmarks/stress_calibration.py --report docs/dynamics-stress.md
    python benchmarks/stress_calibration.py --record --data-dir DIR           # 15 minutes

Losses are fed to the controller's own baseline, and φ follows from E as the controller makes it
(no conflict; S is 0.5 in healthy runs and 0 in shocks, against it both times). Entering Mirror
at φ ≥ 0.7 is what counts: in a healthy run it is a false alarm, in a shock it should come soon.
"former" is the rule that stood before the calibration (f at rate 0.1, its baseline down at 0.05,
E = e / (¼ + e) without the σ that is taken off).

Synthetic: 1 + (r − 1) exp(−t / τ) with r in 1.5, 6, 30 and τ in 5, 20, 100, 500 steps, times
log-normal noise; a shock multiplies it for so many steps. Real: SmolLM2-135M on E2E and GSM8K,
four rows a step, at a fixed learning rate; the answers are shuffled among the rows from some
step on (``--record`` makes these again). The constants were chosen on other seeds of the
synthetic losses and on the first three of the real ones; neither task is in part c of
``benchmarks/dynamics.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import markdown, prepare, write_report
from lorasmith.dynamics.stress_loss import LossBaseline
from lorasmith.dynamics.stress_signals import saturate

TRACES = Path(__file__).parent / "results" / "stress_traces.json"
ENTER, LEAVE = 0.7, 0.55
RATIOS, TIMES = (1.5, 6.0, 30.0), (5, 20, 100, 500)
#: Coefficients of variation of a single loss.
NOISES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
HEIGHTS, STARTS, DURATIONS = (1.3, 1.5, 2.0, 3.0, 4.0), (30, 100, 500), (20, 60, 200)
SHOCK_NOISES = (0.1, 0.3)
#: Not those that the constants were chosen with.
SEEDS = range(100, 106)

#: E after each loss.
Rule = Callable[[Sequence[float]], Iterator[float]]


def present(losses: Sequence[float]) -> Iterator[float]:
    """The controller's E."""
    baseline = LossBaseline(losses[0], losses[0])
    for loss in losses:
        baseline.update(loss, 0.2)
        yield baseline.error


def former(losses: Sequence[float]) -> Iterator[float]:
    """E as it was before."""
    fast = slow = losses[0]
    spread = 0.0
    for loss in losses:
        spread += 0.02 * (abs(loss - fast) - spread)
        fast += 0.1 * (loss - fast)
        error = saturate(max(0.0, fast - slow) / (abs(slow) + spread), 0.25)
        rise = 0.02 if error < 0.5 else 0.002
        slow += (rise if fast > slow else 0.05) * (fast - slow)
        yield error


RULES: dict[str, Rule] = {"former": former, "present": present}


def stress(rule: Rule, losses: Sequence[float], memory: float) -> list[float]:
    """φ after each loss, with the controller's default weights."""
    phi, before, found = 0.0, 0.0, []
    for number, error in enumerate(rule(losses)):
        x = min(1.0, error + 0.25 * max(0.0, error - before) + 0.15 * memory)
        phi += (0.1 if number else 1.0) * (x - phi)
        before = error
        found.append(phi)
    return found


@dataclass(frozen=True)
class Curve:
    """A synthetic loss.

    Attributes:
        ratio: First level over the last.
        time: Steps in which the distance falls to 1/e.
        noise: Coefficient of variation.
        seed: Of the noise.
    """

    ratio: float
    time: int
    noise: float
    seed: int

    def losses(
        self, steps: int, start: int = 0, duration: int = 0, height: float = 1
    ) -> list[float]:
        """The course, with a shock of this height."""
        generator = random.Random(f"{self.ratio} {self.time} {self.noise} {self.seed}")
        width = math.sqrt(math.log1p(self.noise**2))
        made = []
        for step in range(steps):
            level = 1 + (self.ratio - 1) * math.exp(-step / self.time)
            level *= height if start <= step < start + duration else 1.0
            made.append(level * math.exp(generator.gauss(-(width**2) / 2, width)))
        return made


@dataclass
class Tally:
    """What happened in the runs of one cell of a table."""

    delays: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def add(self, phi: Sequence[float], start: int, duration: int) -> None:
        """Takes in a run with a shock."""
        inside = range(start, min(start + duration, len(phi)))
        delay = next((s - start for s in inside if phi[s] >= ENTER), math.inf)
        self.delays.append(delay)
        end = start + duration
        if math.isfinite(delay) and end < len(phi):
            gone = (s - end for s in range(end, len(phi)) if phi[s] < LEAVE)
            self.after.append(next(gone, math.inf))

    def within(self, steps: float) -> float:
        """Share of runs in Mirror so many steps from the start of the shock."""
        return sum(d <= steps for d in self.delays) / len(self.delays)

    def show(self) -> str:
        """Share within 25 steps, and the median delay of those that enter at all."""
        found = [d for d in self.delays if math.isfinite(d)]
        median = f"{statistics.median(found):.0f}" if found else "–"
        return f"{100 * self.within(25):.0f} %, {median}"


def false_alarms() -> str:
    """By noise: the share of healthy runs of 1000 steps that ever enter Mirror."""
    rows = []
    for name, rule in RULES.items():
        cells = []
        for noise in NOISES:
            runs = [
                max(stress(rule, Curve(ratio, time, noise, seed).losses(1000), 0.5))
                for ratio, time, seed in itertools.product(RATIOS, TIMES, SEEDS)
            ]
            share = sum(phi >= ENTER for phi in runs) / len(runs)
            cells.append(f"{100 * share:.0f} % ({max(runs):.2f})")
        rows.append([name, *cells])
    return markdown(["noise", *(f"{100 * n:.0f} %" for n in NOISES)], rows)


def delays() -> str:
    """By height and start of the shock: whether Mirror comes, and when."""
    table: dict[tuple[str, float, int], Tally] = {}
    settled: dict[tuple[str, float], Tally] = {}
    for name, rule in RULES.items():
        for ratio, time, noise, seed in itertools.product(RATIOS, TIMES, SHOCK_NOISES, SEEDS):
            curve = Curve(ratio, time, noise, seed)
            for height, start in itertools.product(HEIGHTS, STARTS):
                phi = stress(rule, curve.losses(start + 200, start, 200, height), 0.0)
                table.setdefault((name, height, start), Tally()).add(phi, start, 200)
                if start >= 5 * time or ratio == min(RATIOS):
                    settled.setdefault((name, height), Tally()).add(phi, start, 200)
    rows = []
    for height in HEIGHTS:
        for name in RULES:
            cells = [table[name, height, start].show() for start in STARTS]
            rows.append([f"{height:g}", name, *cells, settled[name, height].show()])
    head = ["height", "rule", *(f"at step {s}" for s in STARTS), "loss settled"]
    return markdown(head, rows)


def durations() -> str:
    """By duration: whether it is noticed while it lasts, and when Mirror could be left."""
    rows = []
    for duration in DURATIONS:
        for name, rule in RULES.items():
            tally = Tally()
            combined = itertools.product(RATIOS, TIMES[:2], SHOCK_NOISES, (2.0, 3.0), SEEDS)
            for ratio, time, noise, height, seed in combined:
                losses = Curve(ratio, time, noise, seed).losses(
                    100 + duration + 150, 100, duration, height
                )
                tally.add(stress(rule, losses, 0.0), 100, duration)
            after = f"{statistics.median(tally.after):.0f}" if tally.after else "–"
            rows.append([str(duration), name, f"{100 * tally.within(duration):.0f} %", after])
    head = ["duration", "rule", "noticed while it lasts", "steps from its end to φ < 0.55"]
    return markdown(head, rows)


def real() -> str:
    """The recorded losses."""
    rows = []
    for trace in json.loads(TRACES.read_text(encoding="utf-8")):
        losses, start = trace["losses"], trace["shock"]
        level = statistics.mean(losses[start - 10 : start])
        now = [losses[start : start + 5], losses[-10:]]
        heights = " → ".join(f"{statistics.mean(part) / level:.1f}" for part in now)
        cells = [f"{trace['task']}, {trace['lr']:g}", f"{start}", heights]
        for rule in RULES.values():
            phi = stress(rule, losses, 0.0)
            delay = next((s - start for s in range(start, len(phi)) if phi[s] >= ENTER), None)
            entered = "–" if delay is None else str(delay)
            cells.append(f"{max(phi[:start]):.2f}, {max(phi[start:]):.2f}, {entered}")
        rows.append(cells)
    return markdown(["task, rate", "shock at", "height", *RULES], rows)


def report() -> str:
    """All tables."""
    runs = len(RATIOS) * len(TIMES) * len(SEEDS)
    alarms = f"""**False alarms**: healthy runs of 1000 steps that ever enter Mirror (largest φ), by
the coefficient of variation of a loss; {runs} runs each."""
    found = """**Detection**: share of shocks that are in Mirror within 25 steps, and median delay
in steps of those that get there, by height of the shock (times the loss) and the step at which it
begins. Noise 10 and 30 %. At step 30 half of the losses still fall steeply (from up to 18 times
their last level); the last column leaves those out."""
    measured = """**Real losses**, SmolLM2-135M with its answers shuffled: height over the ten steps
before (first five steps → last ten); largest φ before the shock, in it, and delay in steps."""
    parts = [
        (alarms, false_alarms()),
        (found, delays()),
        ("**Short and long shocks**, of height 2 and 3 at step 100.", durations()),
        (measured, real()),
    ]
    return "\n\n".join(f"{text}\n\n{table}" for text, table in parts)


# Recording ------------------------------------------------------------------------------

#: Task, most characters of a question or an answer, learning rate, steps before, steps of
#: shock, seed.
RECORDED = (
    ("e2e", 1000, 1.6e-3, 30, 60, 0),
    ("gsm8k", 160, 1.6e-3, 30, 16, 0),
    ("e2e", 1000, 4e-4, 100, 40, 1),
    ("e2e", 1000, 6.4e-3, 40, 30, 2),
)


def read_rows(task: str, folder: Path, characters: int) -> list[dict[str, Any]]:
    """Rows of a task, the short ones."""
    if task == "e2e":
        lines = (folder / "e2e_valid.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.partition("||")[::2] for line in lines]
        return [{"prompt": f"{a.strip()}\n", "completion": b.strip()} for a, b in pairs]
    lines = (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": f"{r['question']}\n", "completion": r["answer"]}
        for r in rows
        if max(len(r["question"]), len(r["answer"])) < characters
    ]


def record(folder: Path) -> None:
    """Trains, and writes the losses."""
    from dynamics import Arm, Language, Run, Size, shuffled

    prepare(1)
    traces = []
    for task, characters, lr, before, shock, seed in RECORDED:
        rows = read_rows(task, folder, characters)
        random.Random(seed).shuffle(rows)
        size = Size(steps=before, shock=shock, batch=4, every=0, validation_rows=0)
        language = Language(Run("c", Arm("fixed"), lr, seed, size), before + shock)
        first, rest = rows[: 4 * before], rows[4 * before :][: 4 * shock]
        for part in (first, shuffled(rest, seed)):
            for batch in language.batches(part, 4):
                language.train(batch)
        losses = [round(loss, 4) for loss in language.loop.record["losses"]]
        traces.append({"task": task, "lr": lr, "seed": seed, "shock": before, "losses": losses})
        print(f"{task} {lr:g}: {losses[0]:.2f} → {losses[before - 1]:.2f} → {losses[-1]:.2f}")
        TRACES.write_text(json.dumps(traces) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="train, and keep the losses")
    parser.add_argument("--data-dir", type=Path, help="with e2e_valid.txt and gsm8k_train.jsonl")
    parser.add_argument("--report", type=Path, help="write the tables into this page")
    arguments = parser.parse_args()
    if arguments.record:
        if arguments.data_dir is None:
            parser.error("--record needs --data-dir")
        record(arguments.data_dir)
        return
    text = report()
    print(text)
    if arguments.report is not None:
        write_report(arguments.report, "stress-calibration", text)


if __name__ == "__main__":
    main()
