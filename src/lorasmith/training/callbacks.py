"""Trainer's callbacks: the run's own rules in its loop, and progress on stderr."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lorasmith.training.huggingface import TrainerCallback

if TYPE_CHECKING:
    from lorasmith.training.trainer import AdapterTrainer

__all__ = ["Bar", "Watch"]


class Watch(TrainerCallback):
    """Ties the run's own rules to Trainer's loop."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A run that was stopped by a signal skipped the evaluation that was due.
        due = args.eval_strategy == "steps" and state.global_step > 0
        due = due and state.global_step % args.eval_steps == 0
        if due and self.trainer.evaluated_at(state.global_step) is None:
            self.trainer.evaluate()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.check_finite()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step()
        stop = self.trainer.stop.received is not None
        if args.world_size > 1:
            # All processes must stop after the same step.
            flag = torch.tensor([float(stop)], device=args.device)
            stop = bool(self.trainer.accelerator.reduce(flag, "sum").item() > 0)
        at_end = state.global_step >= state.max_steps
        if at_end and (args.save_strategy == "no" or state.global_step % args.save_steps):
            # Trainer saves at the end of every run; here the adapter itself is saved then.
            control.should_save = False
        if stop and not at_end:
            if self.trainer.stop.received is None:  # it came to another process only
                self.trainer.stop.received = signal.SIGTERM
            self.trainer.stop.honoured = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stop.honoured:
            control.should_save = False  # it has just been done
            control.should_evaluate = False

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if metrics is None:
            return
        if self.trainer.is_in_train and self.trainer.consider(metrics["eval_loss"]):
            self.trainer.stopped_early = state.global_step < state.max_steps
            control.should_training_stop = True


class Bar(TrainerCallback):
    """Progress on stderr: a bar on a terminal, now and then a line elsewhere."""

    #: Lines in all, where there is no terminal.
    LINES = 10

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: Any = None
        self.task: Any = None
        self.loss = ""
        self.next_line = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.console.is_terminal:
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss=""
        )
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        if "eval_loss" in logs:
            self._line(state, f"evaluation {logs['eval_loss']:.4f}")
        if self.bar is not None:
            self.bar.update(self.task, loss=self.loss)
        elif "loss" in logs and state.global_step >= self.next_line:
            self._line(state, self.loss)
            self.next_line = state.global_step + max(1, state.max_steps // self.LINES)

    def _line(self, state: Any, text: str) -> None:
        self.console.print(f"step {state.global_step:,} of {state.max_steps:,}  {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar off the terminal; a run that failed never gets to its end."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
