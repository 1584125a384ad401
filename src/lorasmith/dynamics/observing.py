"""What the model did in the batches of one optimiser step: loss and entropy, by task.

Batches are added up as sums over tokens, on the device: nothing waits for them, and several
processes add theirs up once a step. What was observed of batches whose gradients were thrown away
is forgotten. This file sees outputs, labels and names of tasks; of rules it knows only whether one
needs the entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorasmith.dynamics.context import Context
from lorasmith.dynamics.entropy import TokenStatistics, token_statistics
from lorasmith.dynamics.processes import distributed
from lorasmith.dynamics.protocol import Statistics
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["TASK_KEY", "Observer", "StepSums", "tasks_of"]

#: Name under which a batch says to which task its rows belong.
TASK_KEY = "task"


class StepSums:
    """Sums over the batches of one optimiser step, on the device; nothing waits for it."""

    def __init__(self) -> None:
        #: Task, or ``None`` for rows without one → [loss, tokens, entropy, tokens with entropy].
        self.by_task: dict[str | None, Tensor] = {}

    def add(self, task: str | None, values: Sequence[Tensor]) -> None:
        new = torch.stack([v.detach().to(torch.float32).reshape(()) for v in values])
        known = self.by_task.get(task)
        self.by_task[task] = new if known is None else known + new.to(known.device)

    def statistics(self, tasks: Sequence[str], device: torch.device, entropy: bool) -> Statistics:
        """The step's, over all processes; starts anew."""
        sums, self.by_task = self.by_task, {}
        if distributed():
            names: list[str | None] = [None, *tasks]
            unknown = sorted(str(t) for t in sums.keys() - set(names))
            if unknown:
                raise TrainingError(
                    f"The task {unknown[0]!r} was not declared.",
                    expected=", ".join(tasks) or "tasks=…, which several processes need",
                    got=", ".join(unknown),
                )
            table = torch.stack([sums.get(n, torch.zeros(4)).to(device) for n in names])
            dist.all_reduce(table)
            sums = dict(zip(names, table, strict=True))
        if not sums:
            return Statistics()
        total = torch.stack(list(sums.values())).sum(dim=0)
        loss, tokens, surprise, counted = total.unbind()
        return Statistics(
            tokens=tokens,
            loss=loss / tokens.clamp(min=1),
            entropy=surprise / counted.clamp(min=1) if entropy else None,
            tasks={
                task: (row[0] / row[1].clamp(min=1), row[1])
                for task, row in sums.items()
                if task is not None
            },
        )


class Observer:
    """The batches of one optimiser step.

    Args:
        context: Model, its low-rank layers, and the declared tasks.
        entropy: Whether a rule needs the entropy.

    Attributes:
        tasks: Of the batch under way: one name for all rows, or one for each.
        backward: Whether gradients have come since the last step.
    """

    def __init__(self, context: Context, entropy: Callable[[], bool]) -> None:
        self.context = context
        self.tasks: tuple[str, ...] | None = None
        self.backward = False
        self._entropy = entropy
        self._sums = StepSums()
        #: Whether a batch of the step came without logits and without an entropy.
        self._blind = False
        self._shift: bool | None = None

    def observe_output(self, output: Any, labels: Any) -> None:
        """Adds what a model gave for a batch, as far as it says it."""
        fused = _fused(output)
        if fused is not None:
            self._drop_abandoned()
            self._add(fused, self.tasks)
            return
        logits = getattr(output, "logits", None)
        if isinstance(labels, Tensor) and isinstance(logits, Tensor) and logits.dim() >= 2:
            if labels.is_floating_point():  # regression has no distribution
                self._observe_loss(getattr(output, "loss", None), labels.shape[0])
            elif logits.shape[:-1] == labels.shape:
                self.observe(logits=logits, labels=labels)
            return
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self._observe_loss(loss, int(labels.shape[0]) if isinstance(labels, Tensor) else 1)

    def _observe_loss(self, loss: Tensor | None, rows: int) -> None:
        if loss is not None:
            self.observe(loss=loss, tokens=rows)

    def observe(
        self,
        *,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        shift: bool | None = None,
        loss: Tensor | None = None,
        entropy: Tensor | None = None,
        tokens: Tensor | int = 1,
    ) -> None:
        """Adds a batch of the selected tasks; see :meth:`Dynamics.observe`."""
        self._drop_abandoned()
        names = self.tasks
        with torch.no_grad():
            if logits is not None and labels is not None:
                found = token_statistics(
                    logits.detach(),
                    labels,
                    shift=self._shifts() if shift is None else shift,
                    entropy=self._entropy(),
                )
                self._add(found, names)
                return
            if loss is None:
                raise ConfigError("Nothing to observe.", expected="logits and labels, or a loss")
            if names is not None and len(set(names)) > 1:
                raise ConfigError(
                    "One loss for rows of several tasks cannot be told apart.",
                    expected="logits and labels, or batches of one task",
                    got=", ".join(sorted(set(names))),
                )
            device = loss.device
            count = (
                tokens.to(device, torch.float32)
                if isinstance(tokens, Tensor)
                else torch.full((), float(tokens), device=device)  # nothing waits for it
            )
            none = torch.zeros((), device=device)
            # The mean over no tokens is NaN, and says nothing.
            loss = torch.where(count > 0, loss.float(), none)
            if entropy is not None:
                entropy = torch.where(count > 0, entropy.to(device).float(), none)
            self._blind = self._blind or entropy is None
            self._sums.add(
                names[0] if names else None,
                [
                    loss * count,
                    count,
                    none if entropy is None else entropy * count,
                    none if entropy is None else count,
                ],
            )

    def _add(self, found: TokenStatistics, tasks: tuple[str, ...] | None) -> None:
        rows = (1,) if found.loss.dim() > 1 else ()  # sum over positions, if there are any
        count = found.supervised.to(torch.float32)
        columns = [found.loss, count]
        if found.entropy is None:
            columns += [torch.zeros_like(count)] * 2
        else:
            columns += [found.entropy, count]
        by_row = [c.sum(dim=rows) if rows else c for c in columns]
        if tasks is None or len(set(tasks)) == 1:
            self._sums.add(tasks[0] if tasks else None, [c.sum() for c in by_row])
            return
        if len(tasks) != len(by_row[0]):
            raise ConfigError(
                "The batch names another number of tasks than it has rows.",
                expected=f"{len(by_row[0])} names",
                got=len(tasks),
            )
        for task in dict.fromkeys(tasks):
            mask = torch.tensor([t == task for t in tasks], device=count.device)
            zero = torch.zeros((), device=count.device)
            self._sums.add(task, [torch.where(mask, c, zero).sum() for c in by_row])

    def finish(self, device: torch.device) -> Statistics:
        """The step's statistics, over all processes; the next step starts anew.

        Raises:
            TrainingError: A rule needs the entropy, and none was observed; or, with several
                processes, a task was not declared.
        """
        needed = self._entropy()
        statistics = self._sums.statistics(self.context.tasks, device, entropy=needed)
        blind, self._blind = self._blind or statistics.tokens is None, False
        if needed and blind:
            raise TrainingError(
                "A dynamic needs the entropy of the model's predictions, and none was observed.",
                expected="a model called with labels that returns logits, or Dynamics.observe(…)",
                got="no observation since the last optimiser step"
                if statistics.tokens is None
                else "a batch with its loss alone",
                fix="give labels to the model in training mode (model.train()), or call "
                "observe(logits=…, labels=…) in the loop",
            )
        return statistics

    def forget(self) -> None:
        """Forgets the step's batches."""
        self._sums.by_task.clear()
        self._blind = False

    def _drop_abandoned(self) -> None:
        """Forgets batches whose gradients were thrown away: the step was dropped.

        ``GradScaler`` does that after an overflow, and so may a loop.
        """
        gone = self.backward and all(site.B.grad is None for site in self.context.sites)
        if gone:
            self.forget()
            self.backward = False

    def _shifts(self) -> bool:
        """Whether the model's own loss predicts label t + 1 from position t."""
        if self._shift is None:
            inner: Any = self.context.model
            if hasattr(inner, "get_base_model"):
                inner = inner.get_base_model()
            kind = getattr(inner, "loss_type", None) or type(inner).__name__
            self._shift = "CausalLM" in str(kind) or str(kind).endswith("LMHeadModel")
        return self._shift


def tasks_of(
    task: str | int | Sequence[Any] | Tensor, declared: Sequence[str], training: bool
) -> tuple[str, ...]:
    """Names of the tasks of a batch, one for all rows or one for each.

    Args:
        task: Names, or numbers: indices into ``declared``, or names if that is empty.
        declared: Names of the tasks, if they were given.
        training: Whether a name that was not declared is an error.
    """
    values = task.tolist() if isinstance(task, Tensor) else task
    values = [values] if isinstance(values, str | int) else list(values)
    names = []
    for value in values:
        index = isinstance(value, int) and bool(declared)
        if index and not 0 <= value < len(declared):
            raise ConfigError(
                "There is no task of that number.",
                expected=f"0 to {len(declared) - 1}",
                got=value,
            )
        name = declared[value] if index else str(value)
        if declared and name not in declared and training:
            raise ConfigError(
                "That task was not declared.",
                expected=", ".join(declared),
                got=name,
                fix="name it in tasks=…, or leave tasks out and they are met as they come",
            )
        names.append(name)
    return tuple(names)


def _fused(output: Any) -> TokenStatistics | None:
    """What TRL's models say that compute their head and loss in one: each [batch, T]."""
    found = [getattr(output, name, None) for name in ("log_probs", "entropy", "label_mask")]
    tensors = [t for t in found if isinstance(t, Tensor) and t.dim() == 2]
    if len(tensors) < len(found):
        return None
    log_probs, entropy, mask = (t.detach() for t in tensors)
    mask = mask.bool()
    loss, entropy = (torch.where(mask, t.float(), 0.0) for t in (-log_probs, entropy))
    return TokenStatistics(loss, entropy, mask)
