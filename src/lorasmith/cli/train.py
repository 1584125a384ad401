"""``lorasmith train MODEL DATA -o OUTPUT``: fine-tune an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    from lorasmith.training.records import TrainResult

__all__ = ["show_result", "train"]


def train(
    options: Annotated[TrainConfig, Parameter(name="*")],
    *,
    config: Path | None = None,  # noqa: ARG001 - lorasmith.cli.app has read it
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Fine-tune an adapter on a base model.

    The result is a PEFT directory with the course of the run in training.json. Stopped by
    Ctrl-C or SIGTERM, it writes a checkpoint first; --resume last goes on from there.

    Parameters
    ----------
    options
        The run.
    config
        YAML file with options of this command (names as above, the adapter's nested under
        "adapter", dynamics as a list or as NAME: {OPTION: VALUE}). The command line wins.
    """
    with session(common):
        from lorasmith.training.records import TrainingInterrupted
        from lorasmith.training.run import train as run

        def interrupted(stop: TrainingInterrupted) -> None:
            result = stop.result
            stderr().print(
                f"Stopped after step {result.steps:,}; its checkpoint is {result.checkpoint}. The "
                "same command with --resume last goes on from there.",
                markup=False,
                soft_wrap=True,
            )
            emit(common, result.to_dict(), lambda console: show_result(result, console))
            sys.stdout.flush()

        try:
            result = run(options, progress=not common.quiet, leave=interrupted)
        except TrainingInterrupted as stop:
            interrupted(stop)
            return stop.code
        emit(common, result.to_dict(), lambda console: show_result(result, console))
    return 0


def show_result(result: TrainResult, console: Console) -> None:
    """The loss table and what it took."""
    table = Table(title="Loss", title_justify="left")
    for heading in ("step", "training", "evaluation", "learning rate"):
        table.add_column(heading, justify="right")
    for row in loss_rows(result):
        table.add_row(*row)
    console.print(table)
    _show_tasks(result, console)
    memory = result.peak_memory_bytes
    console.print(
        grid(
            {
                "status": result.status,
                "adapter": result.adapter_path,
                **{f"task {task}": path for task, path in result.task_adapters.items()},
                "checkpoint": result.checkpoint,
                "dynamics": _dynamics(result),
                "parameters": f"{result.trainable_parameters:,} trained of "
                f"{result.total_parameters:,}",
                **_subspace(result),
                "time": f"{result.seconds:.1f} s, {result.tokens_per_second:,.0f} tokens/s",
                "peak memory": f"{memory / 2**30:.2f} GiB" if memory else None,
            }
        )
    )


def _subspace(result: TrainResult) -> dict[str, str | None]:
    """The task in its fleet, and what it costs beside LoRA."""
    if result.subspace is None:
        return {}
    count = result.subspace["parameters"]
    return {
        "task": result.subspace["task"],
        "fleet": result.subspace["saved"],
        "each layer": f"{number(count['per_layer'], 3)} numbers; LoRA of rank "
        f"{count['lora_rank']} would train {number(count['ratio'], 3)} times as many in all",
    }


def _dynamics(result: TrainResult) -> str | None:
    """The rules and their last numbers, a line for each."""
    names: list[str] = result.config["dynamics"]
    last = next((p.dynamics for p in reversed(result.losses) if p.dynamics), {})
    lines = []
    for name in names:
        numbers = [
            f"{key.partition('/')[2]} {number(value, 3)}"
            for key, value in last.items()
            if key.partition("/")[0] in (name, name.replace("-", "_"))
        ]
        lines.append(f"{name}: {', '.join(numbers)}" if numbers else name)
    return "\n".join(lines) or None


def _show_tasks(result: TrainResult, console: Console) -> None:
    """The last loss of each task, in training and in evaluation."""
    training: dict[str, float] = {}
    for point in result.losses:
        training.update(point.tasks)
    held = result.evaluations[-1].tasks if result.evaluations else {}
    if not training and not held:
        return
    table = Table(title="Last loss of each task", title_justify="left")
    table.add_column("task")
    table.add_column("training", justify="right")
    table.add_column("evaluation", justify="right")
    for task in {**training, **held}:
        table.add_row(
            task,
            number(training[task]) if task in training else "",
            number(held[task]) if task in held else "",
        )
    console.print(table)


def loss_rows(result: TrainResult, most: int = 12) -> list[tuple[str, str, str, str]]:
    """At most about ``most`` rows of the history, spread evenly, evaluations always among them."""
    evaluations = {e.step: e.loss for e in result.evaluations}
    losses = {e.step: e for e in result.losses}
    stride = max(1, -(-len(losses) // most))
    chosen = set(list(losses)[::stride]) | set(list(losses)[-1:]) | set(evaluations)
    rows = []
    for step in sorted(chosen):
        entry = losses.get(step)
        rows.append(
            (
                str(step),
                number(entry.loss) if entry else "",
                number(evaluations[step]) if step in evaluations else "",
                number(entry.learning_rate, 3) if entry else "",
            )
        )
    return rows
