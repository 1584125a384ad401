"""Kills training processes at random moments and compares what their runs come to.

    python benchmarks/reliability_training.py --count 20 --output results.json

Each run trains an adapter with dropout, accumulation and dynamics on a tiny model (CPU), in a
process of its own that gets SIGKILL after a random time: one kill in four at any time from its
start, the others between its first checkpoint and its end, while it trains or writes one. The same
call is then made again, and again killed with probability one half, until it comes to its end. Its
last checkpoint (exact tensors, optimiser, state of the dynamics, scheduler, random numbers,
Trainer's state) and its adapter are compared bit by bit with those of a run that was never killed,
see ``tests/training/killing.py``.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: What the server imports once, so that runs start within a fraction of a second.
PRELOAD = ["torch", "transformers", "datasets", "accelerate", "lorasmith.training.trainer"]


def _run(base: str, rows: str, output: str) -> None:
    import logging

    from tests.training.killing import Watched, config

    # A checkpoint that was being written when the run was killed is told of in a warning.
    logging.getLogger("lorasmith").setLevel(logging.ERROR)
    Watched().train(config(Path(base), Path(rows), Path(output)))


def _one(
    context: Any, arguments: tuple[str, str, str], seconds: float | None, *, wait: bool = False
) -> bool:
    """Starts a run; True if it came to its end before it was killed.

    Args:
        context: Where processes come from.
        arguments: Of the run.
        seconds: When to kill it; ``None`` for never.
        wait: Whether the seconds count from its first new checkpoint on.
    """
    before = _newest(arguments[2])
    process = context.Process(target=_run, args=arguments)
    process.start()
    while wait and process.exitcode is None and _newest(arguments[2]) == before:
        time.sleep(0.002)
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended by itself with {process.exitcode}")
    return bool(process.exitcode == 0)


def _newest(output: str) -> str | None:
    from lorasmith.training import checkpoints

    found = checkpoints.list_checkpoints(Path(output))
    return found[0].name if found else None


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills ``count`` runs at least once each."""
    from lorasmith.training import checkpoints
    from tests.training.killing import differences
    from tests.training.tiny import save_tiny, write_rows

    generator = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    base, rows = save_tiny(folder / "base"), write_rows(folder / "rows.jsonl")
    whole = folder / "whole"
    _one(context, (str(base), str(rows), str(whole)), None)  # starts the server, too
    began = time.monotonic()
    _one(context, (str(base), str(rows), str(folder / "second")), None)
    typical = time.monotonic() - began
    began = time.monotonic()
    _one(context, (str(base), str(rows), str(folder / "third")), 0.0, wait=True)
    training = max(0.05, typical - (time.monotonic() - began))
    wrong = {"second": found} if (found := differences(whole, folder / "second")) else {}
    kills, resumed_at = 0, []
    for number in range(count):
        output = folder / f"run-{number}"
        arguments = (str(base), str(rows), str(output))
        killed = False
        while True:
            again = not killed or generator.random() < 0.5
            early = generator.random() < 0.25
            seconds = generator.uniform(0.0, typical if early else training)
            if _one(context, arguments, seconds if again else None, wait=again and not early):
                if killed:
                    break
                # It was quicker than the signal: once more from the start.
                shutil.rmtree(output)
                continue
            killed = True
            kills += 1
            found_now = checkpoints.list_checkpoints(output)
            resumed_at.append(checkpoints.step_of(found_now[0]) if found_now else 0)
        left = [p.name for p in output.iterdir() if p.name.startswith(".")]
        if problems := [*differences(whole, output), *(f"left: {name}" for name in left)]:
            wrong[output.name] = problems
        print(f"{number + 1} of {count} runs, {kills} kills, {len(wrong)} different", flush=True)
    return {
        "runs": count,
        "kills": kills,
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
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given.count, given.seed, Path(folder))
    print(json.dumps(result))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
