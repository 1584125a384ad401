"""What a training run came to, as records that JSON can hold.

Trainer keeps its log as a list of mappings; :func:`loss_points` and :func:`eval_points` read it
into records. Numbers that are not finite are null in a checkpoint and in ``training.json``
(JSON has none), and NaN again where they are read.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = [
    "EvalPoint",
    "LossPoint",
    "TrainResult",
    "TrainingInterrupted",
    "eval_points",
    "finite_or_none",
    "loss_points",
    "number_or_nan",
    "peak_memory_bytes",
    "versions",
]


@dataclass(frozen=True)
class LossPoint:
    """The training loss up to one optimiser step.

    Attributes:
        step: Optimiser steps done.
        epoch: Passes over the rows done.
        loss: Cross-entropy in nats a supervised token, mean since the point before.
        learning_rate: That of the step.
        grad_norm: Norm of the gradient before clipping; None where it is not known.
        tasks: Task → its loss since the point before, of those seen.
        dynamics: ``RULE/NUMBER`` → value, what the dynamics report.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    tasks: dict[str, float] = field(default_factory=dict)
    dynamics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation.

    Attributes:
        step: Optimiser steps done.
        epoch: Passes over the rows done.
        loss: Cross-entropy in nats, mean over all supervised tokens.
        perplexity: exp(loss).
        tokens: Supervised tokens.
        seconds: Wall time.
        tasks: Task → its loss, where rows have a task.
    """

    step: int
    epoch: float
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        status: ``"finished"``, ``"stopped early"`` (early stopping) or ``"interrupted"``.
        output: Directory of the run.
        adapter_path: The final adapter, None if the run was interrupted.
        checkpoint: The newest checkpoint, if there is one.
        steps: Optimiser steps done, those before a resume included.
        epochs: Passes over the rows done.
        losses: The training loss, a point every ``log_steps`` steps.
        evaluations: Evaluations in order.
        final_loss: The last training loss.
        eval_loss: Loss of the adapter that was kept; None without evaluation.
        best_step: Step of the adapter that was kept; only with early stopping.
        rows: Rows trained on in each epoch.
        tokens: Tokens seen, prompts included, padding not.
        seconds: Wall time of training, evaluation included, model loading not.
        tokens_per_second: Tokens a second of training, evaluation not included.
        peak_memory_bytes: Of the accelerator if there is one, else of the process (resident,
            since it began).
        trainable_parameters: Values that are trained.
        total_parameters: Values of base model and adapter; a quantised layer counts as the
            matrix that it stands for.
        packing: How rows become batches, and why.
        base: Name of the base model.
        dtype: dtype of the base model.
        device: Where it was trained.
        processes: Number of processes.
        config: The run's configuration.
        adapter: The adapter's configuration, defaults filled in.
        versions: Of the packages that matter.
        task_adapters: Task → directory of its own adapter, if a stress controller left some.
        subspace: Of a task that was trained in a fleet's basis: ``"task"``, its id;
            ``"saved"``, the directory of the fleet that it was added to, or None;
            ``"parameters"``, a ``ParameterCount`` as a mapping.
    """

    status: Literal["finished", "stopped early", "interrupted"]
    output: str
    adapter_path: str | None
    checkpoint: str | None
    steps: int
    epochs: float
    losses: tuple[LossPoint, ...]
    evaluations: tuple[EvalPoint, ...]
    final_loss: float | None
    eval_loss: float | None
    best_step: int | None
    rows: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    packing: str
    base: str
    dtype: str
    device: str
    processes: int
    config: dict[str, Any]
    adapter: dict[str, Any]
    versions: dict[str, str]
    task_adapters: dict[str, str] = field(default_factory=dict)
    subspace: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON can hold; numbers that are not finite become None."""
        values: dict[str, Any] = finite_or_none(dataclasses.asdict(self))
        return values


def finite_or_none(value: Any) -> Any:
    """The same, with None for every number in it that is not finite; tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    return value


class TrainingInterrupted(SystemExit):
    """A signal ended the run, after a checkpoint was written.

    It ends the process with 128 + signal (143 for SIGTERM, 130 for Ctrl-C) unless it is
    caught, so that a script never goes on as if training had finished.

    Attributes:
        signal: Number of the signal.
        result: The run so far; ``result.checkpoint`` is what to resume from.
    """

    def __init__(self, signal_number: int, result: TrainResult) -> None:
        super().__init__(128 + signal_number)
        self.code: int = 128 + signal_number
        self.signal = signal_number
        self.result = result


def loss_points(log: Iterable[Mapping[str, Any]], rules: Set[str]) -> tuple[LossPoint, ...]:
    """The training loss of Trainer's log, with what the dynamics of these names report."""
    return tuple(
        LossPoint(
            int(e["step"]),
            float(e["epoch"]),
            number_or_nan(e["loss"]),
            float(e["learning_rate"]),
            number_or_nan(e["grad_norm"]) if "grad_norm" in e else None,
            _with_prefix(e, "loss_"),
            {k: number_or_nan(v) for k, v in e.items() if k.partition("/")[0] in rules},
        )
        for e in log
        if "loss" in e
    )


def eval_points(log: Iterable[Mapping[str, Any]]) -> tuple[EvalPoint, ...]:
    """The evaluations of Trainer's log."""
    return tuple(
        EvalPoint(
            int(e["step"]),
            float(e["epoch"]),
            number_or_nan(e["eval_loss"]),
            number_or_nan(e["eval_perplexity"]),
            int(e["eval_tokens"]),
            float(e["eval_runtime"]),
            _with_prefix(e, "eval_loss_"),
        )
        for e in log
        if "eval_loss" in e
    )


def _with_prefix(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """What an entry of the log says of each task."""
    return {k[len(prefix) :]: number_or_nan(v) for k, v in entry.items() if k.startswith(prefix)}


def number_or_nan(value: float | None) -> float:
    """A number of the log; one that was not finite is null in a checkpoint."""
    return math.nan if value is None else float(value)


def versions() -> dict[str, str]:
    """Of the packages that matter."""
    import accelerate
    import transformers

    from lorasmith import __version__

    return {
        "lorasmith": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of a CUDA device, else of this process (resident); 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
