"""Each process's part of a checkpoint, handed over in files where collectives cannot be used.

Several processes that are in the middle of a batch wait for each other in its collectives, or will;
another collective in between would be taken for one of those. So each process but the first leaves
what only it knows (random numbers, tokens) in the run's directory, which all of them see, and the
first one writes the checkpoint if it finds all parts of its own step in time. Whoever waits does so
for a bounded time: processes that are at different steps, or of which only some have got the
signal, go on to the end of the step and agree there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasmith.training.checkpoints import MANIFEST
from lorasmith.training.states import load_state, save_state

__all__ = ["COLLECT_WITHIN", "TAKEN_WITHIN", "collect", "dismiss", "hand_in"]

#: Seconds for which the first process waits for the parts of the others, and they for it.
COLLECT_WITHIN = 5.0
TAKEN_WITHIN = 30.0

_PAUSE = 0.02


def _path(output: Path, step: int, index: int) -> Path:
    return output / f".checkpoint-{step}.part-{index}"


def hand_in(output: Path, step: int, index: int, part: dict[str, Any]) -> bool:
    """Leaves a process's part for the first one, and waits.

    Args:
        output: The run's directory.
        step: The step after which the checkpoint is.
        index: Of the process, from 1 on.
        part: What :func:`collect` returns of it.

    Returns:
        Whether a checkpoint of the step was published meanwhile.
    """
    path = _path(output, step, index)
    before = _published(output, step)
    unfinished = path.with_name(f"{path.name}.new")
    save_state(part, unfinished)
    os.replace(unfinished, path)
    _wait(lambda: not path.exists(), TAKEN_WITHIN)
    path.unlink(missing_ok=True)
    return _published(output, step) != before


def collect(output: Path, step: int, processes: int) -> list[dict[str, Any]]:
    """The parts of all processes but the first, in order.

    Args:
        output: The run's directory.
        step: The step after which the checkpoint is.
        processes: Number of processes.

    Raises:
        TimeoutError: They are not all there in time.
    """
    paths = [_path(output, step, index) for index in range(1, processes)]
    if not _wait(lambda: all(p.exists() for p in paths), COLLECT_WITHIN):
        missing = [i for i, path in enumerate(paths, 1) if not path.exists()]
        raise TimeoutError(f"no part of step {step} from processes {missing}")
    return [load_state(path) for path in paths]


def dismiss(output: Path, step: int, processes: int) -> None:
    """Lets the others go on, which see for themselves whether there is a checkpoint."""
    for index in range(1, processes):
        _path(output, step, index).unlink(missing_ok=True)


def _published(output: Path, step: int) -> tuple[int, int] | None:
    """Which checkpoint of a step there is; another one has another manifest."""
    try:
        found = (output / f"checkpoint-{step}" / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _wait(happened: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(_PAUSE)
    return done
