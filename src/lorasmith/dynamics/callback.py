"""Dynamics in Transformers' Trainer and in everything built on it (TRL), without a subclass.

    trainer = Trainer(model, args, ..., callbacks=[ls.DynamicsCallback([ls.GaugeProjection()])])

The callback only binds and unbinds; what acts are the hooks of
:class:`~lorasmith.dynamics.driver.Dynamics` on the optimiser and the model. Penalties therefore
come after clipping: ``max_grad_norm`` bounds the task's gradient alone.

Checkpoints: the rules' state is in ``optimizer.pt``, which Trainer writes and reads by itself: a
pickle, which it opens with ``weights_only=True``, so that no code in it is run.

A column ``task`` reaches the rules if it reaches the model call: ``remove_unused_columns=False``
and a collator that passes it on. The model never sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorasmith.dynamics.carried_state import Changed, check_changed
from lorasmith.dynamics.driver import Dynamics
from lorasmith.dynamics.protocol import Dynamic
from lorasmith.dynamics.rules import as_rules
from lorasmith.errors import MissingDependencyError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "DynamicsCallback needs Transformers, which is not installed.",
        fix='pip install "lorasmith[train]"',
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["DynamicsCallback"]

logger = logging.getLogger(__name__)


class DynamicsCallback(TrainerCallback):
    """Makes rules act during ``Trainer.train``.

    Args:
        rules: One rule or several, in the order in which they act.
        adapter: Name of the adapter; by default the active one.
        tasks: Names of the tasks, where there are several; a number in the batch's ``task``
            is an index into them.
        changed: Of a resumed run: ``"refuse"`` a checkpoint of the same rules with other options
            or in another order, or ``"accept"`` it with a warning; see
            :class:`~lorasmith.dynamics.driver.Dynamics`.

    Attributes:
        driver: The rules at work, between ``on_train_begin`` and ``on_train_end``.
    """

    def __init__(
        self,
        rules: Dynamic | Iterable[Dynamic],
        *,
        adapter: str | None = None,
        tasks: Sequence[str] = (),
        changed: Changed = "refuse",
    ) -> None:
        self.rules = as_rules(rules)
        self.adapter = adapter
        self.tasks = tuple(tasks)
        check_changed(changed)
        self.changed = changed
        self.driver: Dynamics | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Binds the rules; a resumed optimiser brings their state."""
        self.close()  # what an earlier run left when it failed
        self.driver = Dynamics(
            model,
            self.rules,
            optimizer,
            adapter=self.adapter,
            tasks=self.tasks,
            changed=self.changed,
        )
        if state.global_step and not self.driver.resumed:
            logger.warning(
                "The checkpoint at step %d holds no state of the dynamics; they start anew.",
                state.global_step,
            )
            self.driver.steps = state.global_step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Passes the evaluation on."""
        if self.driver is not None and metrics is not None:
            self.driver.on_evaluate(metrics)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the rules' numbers to a log of the training loss."""
        if self.driver is None or logs is None or "loss" not in logs:
            return
        numbers = self.driver.metrics()
        logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            # Trainer has appended a copy before the callbacks are asked.
            state.log_history[-1].update(numbers)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Takes the hooks off."""
        self.close()

    def close(self) -> None:
        """Takes the hooks off; also after a run that failed."""
        if self.driver is not None:
            self.driver.close()
            self.driver = None
