"""What the experiments of this folder share: runs, intervals, tables, angles, memory.

A run is a frozen dataclass with a ``key``, the name of its file. It is a process of its own
and leaves one JSON file; what is there is not run again, so that an experiment can be stopped
and resumed at any time. A key should hold everything that could change the result
(:func:`digest`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

__all__ = [
    "PRELOAD",
    "Interval",
    "Results",
    "digest",
    "markdown",
    "measured",
    "perform",
    "prepare",
    "resident_mb",
    "rotation",
    "write_report",
]

#: Student's t at 97.5 % for n − 1 degrees of freedom.
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
#: Imported once, in a server that never computes; each run is a fork of it.
PRELOAD = ("torch", "transformers", "datasets", "torchao", "lorasmith.training")


class Keyed(Protocol):
    """A run: a frozen dataclass that names its file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> str:
        """Name of its file: readable, and different whenever the run is."""


R = TypeVar("R", bound=Keyed)


def digest(run: Keyed) -> str:
    """Ten characters that differ whenever any field of the run does."""
    values = json.dumps(asdict(run), sort_keys=True)
    return sha256(values.encode()).hexdigest()[:10]


class Results:
    """The folder of finished runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, run: Keyed) -> dict[str, Any] | None:
        """What the run measured, if it has been done."""
        path = self.folder / f"{run.key}.json"
        if not path.is_file():
            return None
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values["result"]  # type: ignore[no-any-return]

    def put(self, run: Keyed, result: Mapping[str, Any]) -> None:
        """Keeps it; a reader sees all of the file or none."""
        path = self.folder / f"{run.key}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"run": asdict(run), "result": result}, indent=1))
        part.replace(path)


def prepare(threads: int) -> None:
    """Sets this process up for a run: offline, quiet, with so many threads."""
    os.environ.update(HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def perform(
    runs: Iterable[R],
    results: Results,
    work: Callable[[Any], tuple[str, dict[str, Any]]],
    *arguments: Any,
    jobs: int,
    shown: Sequence[str],
) -> None:
    """Does those of the runs that have not been done, each in a fresh process.

    Args:
        runs: The runs, in order.
        results: Where they are kept. A run that failed is tried again.
        work: Takes ``(run, *arguments)``; gives the run's key and what it measured, or
            ``{"failed": why}``.
        *arguments: The same for all runs.
        jobs: Processes at a time.
        shown: Which of the numbers measured to print.
    """
    todo = {
        run.key: run
        for run in runs
        if (results.get(run) or {"failed": ""}).get("failed") is not None
    }
    if not todo:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    start = time.perf_counter()
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        made = pool.imap_unordered(work, [(run, *arguments) for run in todo.values()])
        for done, (key, result) in enumerate(made, start=1):
            results.put(todo[key], result)
            left = (time.perf_counter() - start) / done * (len(todo) - done)
            text = result.get("failed") or ", ".join(
                f"{k.partition('_')[0]} {result[k]:.4f}" for k in shown if result.get(k) is not None
            )
            print(f"{done}/{len(todo)} {key}: {text} ({left / 60:.0f} min left)", flush=True)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval over seeds (Student's t)."""

    mean: float
    half: float
    values: tuple[float, ...] = field(default=())

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """From one value a seed; the half-width is infinite for a single one."""
        n = len(values)
        if not all(map(math.isfinite, values)):  # a run that diverged has no number
            return cls(math.nan, math.inf, tuple(values))
        mean = statistics.mean(values)
        half = T[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return cls(mean, half, tuple(values))

    def show(self, digits: int, factor: float = 1.0, *, sign: bool = False) -> str:
        """``mean ± half``; a dash where a run diverged."""
        if math.isnan(self.mean):
            return "–"
        plus = "+" if sign else ""
        return f"{factor * self.mean:{plus}.{digits}f} ± {factor * self.half:.{digits}f}"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return abs(self.mean) > self.half


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write_report(path: Path, name: str, text: str) -> None:
    """Puts the text between ``<!-- NAME start -->`` and its end in a Markdown file."""
    start_mark, end_mark = f"<!-- {name} start -->", f"<!-- {name} end -->"
    page = path.read_text(encoding="utf-8")
    before, start, rest = page.partition(start_mark)
    _, end, after = rest.partition(end_mark)
    if not start or not end:
        sys.exit(f"{path} has no markers {start_mark} and {end_mark}")
    path.write_text(f"{before}{start_mark}\n\n{text}\n\n{end_mark}{after}", encoding="utf-8")


def resident_mb(name: str) -> float:
    """A line of this process's memory, such as ``"VmRSS"``, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{name} is not in /proc/self/status: this benchmark needs Linux")


def measured(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns, with its time and the peak of memory beyond what is in use now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what is needed
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    found = run()
    taken = time.perf_counter() - start
    return {**found, "seconds": taken, "peak_mb": resident_mb("VmHWM") - before}


def rotation(model: Any) -> float:
    """Mean angle between W and the weight that acts, over the adapted layers, in degrees.

    Each as one long vector, products in float64.
    """
    import torch

    from lorasmith.core.adapter import get_adapter
    from lorasmith.core.layers import read_weight

    angles = []
    adapter = get_adapter(model, None)
    with torch.no_grad():
        for name, part in adapter.layers().items():
            weight = read_weight(adapter.model.get_submodule(name), part.info).double()
            acting = part.variant.effective_weight(part, weight)
            length = torch.linalg.vector_norm(weight)
            change = acting - weight
            along = (change * weight).sum() / length
            across = torch.linalg.vector_norm(change).square() - along.square()
            angles.append(math.atan2(math.sqrt(max(float(across), 0.0)), float(length + along)))
    return math.degrees(statistics.mean(angles))
