"""Kills or stops training processes at random moments and compares what their runs come to.

    python benchmarks/reliability_training.py --count 20 --output results.json
    python benchmarks/reliability_training.py --signal TERM --count 60

Each run trains an adapter with dropout, accumulation and dynamics on a tiny model (CPU), in a
process of its own that gets SIGKILL after a random time: one kill in four at any time from its
start, the others between its first checkpoint and its end, while it trains or writes one. The same
call is then made again, and again killed with probability one half, until it comes to its end. Its
last checkpoint (exact tensors, optimiser, state of the dynamics, scheduler, random numbers,
Trainer's state) and its adapter are compared bit by bit with those of a run that was never killed,
see ``tests/training/killing.py``.

With ``--signal TERM`` the runs are asked to stop instead, and wait 0, 0.05 or 15 s (drawn anew each
time) before they give a step up in the middle of a batch. Every second run is without dropout,
accumulation and dynamics, and is compared with a whole one of its kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: What the server imports once, so that runs start within a fraction of a second.
PRELOAD = ["torch", "transformers", "datasets", "accelerate", "lorasmith.training.trainer"]


#: Seconds before a step is given up, one of them for each process that gets SIGTERM.
PATIENCE = (0.0, 0.05, 15.0)
#: Of a run without dropout, accumulation and dynamics.
PLAIN = {"gradient_accumulation": 1, "dynamics": ()}
#: Exit codes of a run that SIGTERM stopped: after a step, and in the middle of a batch.
STOPPED, GIVEN_UP = 128 + signal.SIGTERM, 100


def _run(base: str, rows: str, output: str, plain: bool, patience: float) -> None:
    import logging

    from lorasmith.training import signals
    from lorasmith.training.checkpointing import CheckpointingTrainer
    from lorasmith.training.config import AdapterOptions
    from lorasmith.training.records import TrainingInterrupted
    from tests.training.killing import Watched, config

    # A checkpoint that was being written when the run was killed is told of in a warning.
    logging.getLogger("lorasmith").setLevel(logging.ERROR)
    signals.GIVE_UP_AFTER = patience
    changes: dict[str, Any] = {**PLAIN, "adapter": AdapterOptions(r=4)} if plain else {}
    codes = [STOPPED]
    save = CheckpointingTrainer.save_last_step

    def saved(self: Any) -> int:
        tokens = save(self)
        codes.append(GIVEN_UP)
        return tokens

    CheckpointingTrainer.save_last_step = saved  # type: ignore[method-assign]
    try:
        Watched().train(config(Path(base), Path(rows), Path(output), **changes))
    except TrainingInterrupted:
        sys.exit(codes[-1])


def _one(
    context: Any,
    arguments: tuple[str, str, str, bool, float],
    seconds: float | None,
    *,
    wait: bool = False,
    number: int = signal.SIGKILL,
) -> int:
    """Starts a run; returns its exit code, 0 if it came to its end before the signal.

    Args:
        context: Where processes come from.
        arguments: Of the run.
        seconds: When to kill it; ``None`` for never.
        wait: Whether the seconds count from its first new checkpoint on.
        number: The signal.
    """
    before = _newest(arguments[2])
    process = context.Process(target=_run, args=arguments)
    process.start()
    while wait and process.exitcode is None and _newest(arguments[2]) == before:
        time.sleep(0.002)
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, number)
        process.join()
    if process.exitcode not in (0, -number, STOPPED, GIVEN_UP):
        raise SystemExit(f"a run ended by itself with {process.exitcode}")
    return int(process.exitcode)


def _newest(output: str) -> str | None:
    from lorasmith.training import checkpoints

    found = checkpoints.list_checkpoints(Path(output))
    return found[0].name if found else None


def measure(count: int, seed: int, folder: Path, number: int) -> dict[str, Any]:
    """Sends that signal to ``count`` runs, at least once to each."""
    from lorasmith.training import checkpoints
    from tests.training.killing import differences
    from tests.training.tiny import save_tiny, write_rows

    generator = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    base, rows = save_tiny(folder / "base"), write_rows(folder / "rows.jsonl")
    asked = number == signal.SIGTERM

    def of(output: Path, plain: bool = False) -> tuple[str, str, str, bool, float]:
        return str(base), str(rows), str(output), plain, generator.choice(PATIENCE)

    wholes = [folder / "whole", *([folder / "whole-plain"] if asked else [])]
    for plain, whole in enumerate(wholes):
        _one(context, of(whole, bool(plain)), None)  # starts the server, too
    began = time.monotonic()
    _one(context, of(folder / "second"), None)
    typical = time.monotonic() - began
    began = time.monotonic()
    _one(context, of(folder / "third"), 0.0, wait=True)
    training = max(0.05, typical - (time.monotonic() - began))
    wrong = {"second": found} if (found := differences(wholes[0], folder / "second")) else {}
    ends: Counter[int] = Counter()
    resumed_at = []
    for index in range(count):
        output = folder / f"run-{index}"
        plain = index % len(wholes)
        hit = False
        while True:
            again = not hit or generator.random() < 0.5
            early = generator.random() < 0.25
            seconds = generator.uniform(0.0, typical if early else training)
            code = _one(
                context,
                of(output, bool(plain)),
                seconds if again else None,
                wait=again and not early,
                number=number,
            )
            if code == 0:
                if hit:
                    break
                # It was quicker than the signal: once more from the start.
                shutil.rmtree(output)
                continue
            hit = True
            ends[code] += 1
            found_now = checkpoints.list_checkpoints(output)
            resumed_at.append(checkpoints.step_of(found_now[0]) if found_now else 0)
        left = [p.name for p in output.iterdir() if p.name.startswith(".")]
        found = differences(wholes[plain], output)
        if problems := [*found, *(f"left: {name}" for name in left)]:
            wrong[output.name] = problems
        print(
            f"{index + 1} of {count} runs, {ends.total()} signals, {len(wrong)} different",
            flush=True,
        )
    stopped = {"stopped_after_a_step": ends[STOPPED], "given_up_in_a_batch": ends[GIVEN_UP]}
    return {
        "runs": count,
        "signal": signal.Signals(number).name,
        # By SIGTERM: while the model was being loaded.
        "kills": ends[-number],
        **(stopped if asked else {}),
        "resumed_at_steps": resumed_at,
        "different": wrong,
        "seconds_of_a_run": round(typical, 2),
        "seed": seed,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        number = signal.Signals[f"SIG{given.signal}"]
        result = measure(given.count, given.seed, Path(folder), number)
    print(json.dumps(result))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
