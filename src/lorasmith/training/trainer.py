"""The loop of a run, on Transformers' Trainer and Accelerate.

The loop, mixed precision, gradient accumulation and data parallelism are Trainer's. What is
done differently here, and why:

- The loss is computed at supervised positions only (``training.loss``), averaged over all
  supervised tokens of an optimiser step, on however many devices and batches they are.
- The order of rows is a function of seed and epoch alone, so that a resumed run sees the
  rows that it would have seen; evaluation draws no random numbers.
- Checkpoints hold the adapter and never the base weights; they appear whole or not at all
  and are checked before a run goes on from them (``training.checkpoints``).
- A loss or gradient that is not finite stops the run before it reaches the adapter. (Trainer
  by default logs a NaN as 0.0 and goes on.)
- An output that cannot be written, and files that will not fit, show before training
  (``training.outputs``); other data, base, tokenizer or options on a resume are refused.
- SIGTERM and Ctrl-C finish the step, write a checkpoint, and end the process with 143 or 130. A
  step that takes long is given up instead, in the middle of a batch (``training.signals``).
- The evaluation loss is a mean over tokens. (Trainer's is a mean of batch means.)
- Where rows have a task, every batch is of one task, the same on all devices, and losses are
  reported for each task as well.
- Dynamics (:mod:`lorasmith.dynamics`) act through the hooks of their driver, which is told what
  the loss computation has at hand already. Their state is in ``optimizer.safetensors``.
- No pickle is written or read: states are safetensors files (``training.states``).

What comes before is in :mod:`lorasmith.training.run`. The options become Trainer's in
``training.arguments``; the loop stands on ``training.checkpointing`` (what is written and read),
``training.order``, ``training.callbacks`` and ``training.signals``, and ends in
``training.records``.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.core.optim import param_groups
from lorasmith.errors import (
    MissingDependencyError,
    NonFiniteLossError,
    TrainingError,
)
from lorasmith.io.tokenizers import TokenizerRecord
from lorasmith.training.arguments import training_arguments
from lorasmith.training.callbacks import Bar, Watch
from lorasmith.training.checkpointing import STRESS, CheckpointingTrainer
from lorasmith.training.collate import (
    ROW_TOKENS,
    Collator,
    CountingCollator,
    PackingCollator,
)
from lorasmith.training.config import TrainConfig
from lorasmith.training.data import TASK, tasks_of
from lorasmith.training.evaluate import (
    evaluating,
    exp_or_inf,
    length_batches,
)
from lorasmith.training.huggingface import PrinterCallback, TrainerCallback
from lorasmith.training.loss import LossOutput, model_loss_output
from lorasmith.training.order import RowOrder, epoch_rows, steps_per_epoch
from lorasmith.training.outputs import (
    is_main,
)
from lorasmith.training.records import (
    TrainingInterrupted,
    TrainResult,
    number_or_nan,
)
from lorasmith.training.resuming import Before, rows_digest
from lorasmith.training.signals import StepGivenUpError, StopSignals
from lorasmith.training.states import on_device, random_state

if TYPE_CHECKING:
    from datasets import Dataset

    from lorasmith.core.adapter import Adapter
    from lorasmith.dynamics.driver import Dynamics
    from lorasmith.dynamics.protocol import Dynamic
    from lorasmith.fleet.trainable import SubspaceTrainer

__all__ = ["AdapterTrainer"]

logger = logging.getLogger(__name__)

#: Seconds for the first of several processes to say how it went, before the others end.
_AFTER_THE_FIRST = 3.0


class _InterruptedError(Exception):
    """A signal came during an evaluation."""


class AdapterTrainer(CheckpointingTrainer):
    """Trainer for an adapter on a frozen base model."""

    # ``compute_loss`` divides by the tokens of the whole optimiser step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        adapter: Adapter,
        rules: tuple[Dynamic, ...],
        rows: Dataset,
        eval_rows: Dataset | None,
        collate: Collator,
        packing: str,
        before: Before,
        progress: bool,
        task: SubspaceTrainer | None,
        tokenizer: TokenizerRecord,
        leave: Callable[[TrainingInterrupted], None] | None,
    ) -> None:
        self.run_config = config
        self.leave = leave
        self.tokenizer_record = tokenizer
        self.task = task
        self.base = model
        self.adapter = adapter
        self.rows, self.eval_rows = rows, eval_rows
        self.rules = rules
        self.driver: Dynamics | None = None
        self.row_tasks, self.eval_tasks = tasks_of(rows), None
        if eval_rows is not None:
            self.eval_tasks = tasks_of(eval_rows)
        self.tasks = tuple(dict.fromkeys(self.row_tasks or ()))
        #: Task → [sum of the loss, tokens] since the last log, on the device.
        self.task_sums: dict[str, Tensor] = {}
        self.packing = packing
        self.before = before
        self.tokens_here = self.step_tokens = 0
        self.eval_seconds = before.eval_seconds
        self.best = before.best
        self.evaluations_since_best = before.evaluations_since_best
        self.best_state = self.best_dynamics = None
        self.merged_loss = None
        self.stopped_early = False
        self.step_loss: Tensor | None = None
        self.last_random = None
        world = int(os.environ.get("WORLD_SIZE", "1"))
        # Of several processes those that have left a batch would leave the others in a collective,
        # so that all of them must end from within it.
        self.stop = StopSignals(
            self._save_last_step if world == 1 or leave is not None else None,
            None if leave is None else self._leave,
            wait=world == 1,
        )
        self.tokens_saved: int | None = None
        self.started = time.perf_counter()
        self.plain_collate = collate
        self.rows_digest = rows_digest(rows)
        #: Rows of an epoch, those that fill up a task's last batch included.
        self.epoch_rows = epoch_rows(len(rows), self.row_tasks, config.batch_size * world)
        arguments = training_arguments(
            config,
            self.epoch_rows,
            evaluates=eval_rows is not None,
            find_unused=any(rule.name == STRESS for rule in rules),
        )
        self.bar = Bar() if progress and is_main() else None
        callbacks: list[TrainerCallback] = [Watch(self)]
        if self.bar is not None:
            callbacks.append(self.bar)
        try:
            super().__init__(
                model=model,
                args=arguments,
                data_collator=CountingCollator(collate),
                train_dataset=rows,
                eval_dataset=eval_rows,
                callbacks=callbacks,
            )
        except (RuntimeError, ImportError, ValueError) as error:
            if config.report_to and any(n in str(error).lower() for n in config.report_to):
                raise MissingDependencyError(
                    "A tracker in report_to cannot be used.",
                    got=str(error).partition("\n")[0],
                    fix="install its package, or leave it out",
                    key="report_to",
                ) from error
            raise
        self.remove_callback(PrinterCallback)
        # The loss takes the number of tokens of the step, and predicts t + 1 from t.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainingError(
                "Adapters are trained with data parallelism only.",
                expected="torchrun or accelerate launch without FSDP and DeepSpeed",
                got="FSDP" if self.is_fsdp_enabled else "DeepSpeed",
                fix="launch it with torchrun --nproc-per-node N",
            )

    # -- the step ------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss at supervised positions, a share of the whole step's mean."""
        inputs = dict(inputs)
        self.step_tokens += int(inputs.pop(ROW_TOKENS, 0))
        task = inputs.pop(TASK, None)
        driver = self.driver
        if driver is not None:
            with self.stop.changing():  # a task that is met may get an adapter
                driver.select(task)
        output = model_loss_output(
            model,
            inputs,
            num_items_in_batch=num_items_in_batch,
            with_entropy=driver is not None and "entropy" in driver.needs,
        )
        self._observe(output, task)
        loss = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, the number of tokens is their sum.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _observe(self, output: LossOutput, task: str | None) -> None:
        """Tells the dynamics of a batch, and adds its loss to its task's."""
        summed = output.summed
        assert summed is not None  # it comes from a model
        if task is not None:
            new = torch.stack([summed.float(), summed.new_tensor(output.count).float()])
            known = self.task_sums.get(task)
            self.task_sums[task] = new if known is None else known + new
        if self.driver is not None:
            self.driver.observe(
                loss=summed / output.count,
                entropy=None if output.entropy is None else output.entropy.mean(),
                tokens=output.count,
                task=task,
            )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Trainer's step; keeps the loss for the check before the optimiser acts."""
        with self.stop.unchanging():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's batches of a step."""
        with self.stop.unchanging():
            return super().get_batch_samples(*arguments, **options)

    def end_step(self) -> None:
        """Notes what the batches of the next step will change, for a checkpoint without them."""
        self.tokens_here += self.step_tokens
        self.step_tokens = 0
        self.last_random = random_state(self.args.device)

    def _save_last_step(self) -> None:
        """Writes the checkpoint of the last whole step, from a thread."""
        with on_device(self.args.device):
            self.tokens_saved = self.save_last_step()

    def _leave(self) -> None:
        """Says how it went, from a thread, before the process ends."""
        assert self.stop.received is not None
        assert self.leave is not None
        if not is_main():
            # The launcher ends all processes when one has ended, and the first has more to say.
            time.sleep(_AFTER_THE_FIRST)
            return
        if self.bar is not None:
            self.bar.close()  # it hides the cursor
        result = self._result("interrupted", self.tokens_saved)
        self._write_result(result)
        self.leave(TrainingInterrupted(self.stop.received, result))

    def check_finite(self) -> None:
        """Raises NonFiniteLossError if loss or gradients of the step are not finite."""
        loss, self.step_loss = self.step_loss, None
        if any(rule.name == STRESS for rule in self.rules):
            return  # it skips the step, and takes it for full stress
        trained = list(self.adapter.parameters())
        if self.driver is not None:
            trained += self.driver.context.added.values()
        gradients = [p.grad for p in trained if p.grad is not None]
        # One number and so one wait for the device, however many tensors there are.
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        total = norm.double() if loss is None else norm.double() + loss.to(norm.device).double()
        if math.isfinite(float(total)):
            return
        value = float("nan") if loss is None else float(loss) / self.accelerator.num_processes
        what = "loss" if not math.isfinite(value) else "gradient"
        raise NonFiniteLossError(
            f"The {what} is not finite at step {self.state.global_step + 1}.",
            expected="a finite number",
            got=f"loss {value}, gradient norm {float(norm)}",
            fix=f"lower the learning rate (now {self._get_learning_rate():.3g}), raise warmup, or "
            "try dtype float32; the last finite adapter is kept",
            file=self._keep_last_finite(),
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: nobody reads Trainer's estimate, and making it walks through all parameters."""
        return 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimiser; with LoRA+ over groups with rates of their own."""
        config = self.run_config
        if self.optimizer is not None:
            return self.optimizer
        made: torch.optim.Optimizer = (
            super().create_optimizer(model)
            if config.lora_plus_ratio is None
            else self._lora_plus(config.lora_plus_ratio)
        )
        self.optimizer = made
        if self.rules and self.driver is None:
            from lorasmith.dynamics.driver import Dynamics

            # Before a checkpoint is loaded: the rules' state comes with the optimiser's.
            self.driver = Dynamics(
                self.base,
                self.rules,
                made,
                adapter=self.adapter.name,
                tasks=self.tasks,
                observe="manual",
            )
        return made

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Trainer's pass over the rows; none for a run that was killed after its last step.

        Trainer looks whether it is at the end after a step only, and would make one too many.
        """
        patience = self.run_config.early_stopping
        enough = patience is not None and self.evaluations_since_best >= patience
        if enough or self.state.global_step >= self.state.max_steps:
            self.stopped_early = self.state.global_step < self.state.max_steps
            self.control.should_training_stop = True
            return
        if self.last_random is None:
            self.last_random = random_state(self.args.device)
        super()._run_epoch(*arguments, **options)  # type: ignore[no-untyped-call]

    def _lora_plus(self, ratio: float) -> torch.optim.Optimizer:
        config = self.run_config
        groups = param_groups(
            self.adapter,
            config.lr,
            lora_plus_ratio=ratio,
            weight_decay=config.weight_decay,
        )
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.base)
        made: torch.optim.Optimizer = kind(groups, **settings)
        return made

    def close_dynamics(self) -> None:
        """Takes the rules' hooks off the model and the optimiser."""
        if self.driver is not None:
            self.driver.close()
            self.driver = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log; that of the training loss gets the tasks' losses and the dynamics."""
        if "loss" in logs:
            logs = {**logs, **self._task_losses()}
            if self.driver is not None:
                logs |= self.driver.metrics()
            running = getattr(self, "_tr_loss", None)
            if running is not None and not math.isfinite(logs["loss"]):
                # Trainer subtracts the sum from itself, which leaves a NaN for ever.
                running.zero_()
        super().log(logs, start_time)

    def _task_losses(self) -> dict[str, float]:
        """Mean loss of each task since the last log, over all processes."""
        if not self.tasks:
            return {}
        sums, self.task_sums = self.task_sums, {}
        none = torch.zeros(2, device=self.args.device)
        table = torch.stack([sums.get(task, none) for task in self.tasks])
        if self.args.world_size > 1:
            table = self.accelerator.reduce(table, "sum")
        return {
            f"loss_{task}": total / tokens
            for task, (total, tokens) in zip(self.tasks, table.tolist(), strict=True)
            if tokens
        }

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: gains and magnitudes do not belong near zero."""
        return [n for n, p in model.named_parameters() if p.requires_grad and p.dim() >= 2]

    # -- data ----------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        rows = self.rows if train_dataset is None else train_dataset
        # Packed rows leave no padding, so that their lengths do not matter.
        grouped = not isinstance(self.plain_collate, PackingCollator)
        world = self.args.world_size
        per_epoch = steps_per_epoch(self.epoch_rows, self.run_config, world)
        return RowOrder(
            list(rows["length"]) if grouped else None,
            len(rows),
            self.run_config.batch_size * world,
            self.run_config.seed,
            lambda: self.state.global_step // per_epoch,
            self.row_tasks,
        )

    # -- evaluation ----------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over all supervised tokens, the rows shared out over the processes."""
        started = time.perf_counter()
        rows = self.eval_rows if eval_dataset is None else eval_dataset
        if rows is None:
            raise TrainingError("There is nothing to evaluate on.", fix="give eval_data")
        size = self.run_config.eval_batch_size or self.run_config.batch_size
        lengths = list(rows["length"])
        names = self.eval_tasks if eval_dataset is None else tasks_of(rows)
        # Batches of one task: the dynamics may compute each with an adapter of its own.
        groups: dict[str | None, list[int]] = {}
        for i in range(len(lengths)):
            groups.setdefault(None if names is None else names[i], []).append(i)
        batches = [
            (number, task, [members[k] for k in batch])
            for number, (task, members) in enumerate(groups.items())
            for batch in length_batches([lengths[i] for i in members], size)
        ]
        world, rank = self.args.world_size, self.args.process_index
        device = self.args.device
        sums = torch.zeros(len(groups), 2, dtype=torch.float64)
        with evaluating(self.base):
            for number, task, batch in batches[rank::world]:
                if world == 1 and self.stop.received is not None and self.is_in_train:
                    raise _InterruptedError
                if self.driver is not None:
                    self.driver.select(task)
                inputs = self.plain_collate([rows[i] for i in batch])
                inputs = {k: v.to(device) for k, v in inputs.items()}
                with self.stop.unchanging():
                    output = model_loss_output(self.base, inputs)
                sums[number] += torch.tensor([float(output.loss) * output.count, output.count])
        if world > 1:
            # float64 does not exist on every accelerator.
            sums = self.accelerator.reduce(sums.float().to(device), "sum").double().cpu()
        total, tokens = sums.sum(dim=0).tolist()
        seconds = time.perf_counter() - started
        self.eval_seconds += seconds
        loss = total / tokens
        if not math.isfinite(loss):
            logger.warning(
                "The evaluation loss is not finite at step %d: %s.", self.state.global_step, loss
            )
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": exp_or_inf(loss),
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_runtime": seconds,
        }
        for task, (part, number) in zip(groups, sums.tolist(), strict=True):
            if task is not None:
                metrics[f"{metric_key_prefix}_loss_{task}"] = part / number
        if self.driver is not None:
            self.driver.on_evaluate(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # -- early stopping ------------------------------------------------------------------

    def consider(self, loss: float) -> bool:
        """Takes note of an evaluation; True if it is time to stop."""
        patience = self.run_config.early_stopping
        if patience is None:
            return False
        if math.isfinite(loss) and (self.best is None or loss < self.best[1]):
            self.best = (self.state.global_step, loss)
            self.evaluations_since_best = 0
            self.best_state = {k: v.cpu().clone() for k, v in self.adapter.state_dict().items()}
            self.best_dynamics = None
            if self.driver is not None and self.driver.context.added:
                # Where tasks have adapters of their own, the shared one is not what was measured.
                self.best_dynamics = copy.deepcopy(self.driver.state_dict())
        else:
            self.evaluations_since_best += 1
        return self.evaluations_since_best >= patience

    # -- the whole -----------------------------------------------------------------------

    def run(self, checkpoint: Path | None) -> TrainResult:
        """Trains, saves, and says how it went."""
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)
        self.started = time.perf_counter()
        with self.stop:
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                if not self.stop.honoured:
                    self._evaluate_last()
            except _InterruptedError:
                self._save_checkpoint(self.base)
                self.stop.honoured = True
            except StepGivenUpError:
                self.stop.honoured = True
            finally:
                if self.bar is not None:
                    self.bar.close()
            self.stop.keep_step()
            if self.stop.honoured:
                result = self._result("interrupted")
                self._write_result(result)
                assert self.stop.received is not None
                raise TrainingInterrupted(self.stop.received, result)
            self._finish()
        self.check_state("adapter")
        result = self._result("stopped early" if self.stopped_early else "finished")
        if self.args.should_save:
            self._save_adapter(self.run_config.output)
            self._save_task_adapters()
            self._save_histories()
            if self.task is not None and self.run_config.subspace_target is not None:
                self.task.finish().save(self.run_config.subspace_target)
        self._write_result(result)
        self.accelerator.wait_for_everyone()
        return result

    def _evaluate_last(self) -> None:
        """The evaluation at the end, unless there has just been one."""
        if self.eval_rows is not None and self.evaluated_at(self.state.global_step) is None:
            metrics = self.evaluate()
            self.consider(metrics["eval_loss"])

    def _finish(self) -> None:
        """Ends the dynamics, with the best adapter if one was looked for, and measures it."""
        if self.best_dynamics is not None:
            self._load_best_dynamics(self.best_dynamics)
        before = {k: v.clone() for k, v in self.adapter.state_dict().items()}
        self.close_dynamics()
        if self.best_state is not None and self.best_dynamics is None:
            self.adapter.load_state_dict(self.best_state)
            return
        after = self.adapter.state_dict()
        moved = not all(torch.equal(before[key], after[key]) for key in before)
        if moved and self.eval_rows is not None:
            # The adapters of several tasks have become one, which nobody has measured yet.
            self.merged_loss = self.evaluate()["eval_loss"]

    def _load_best_dynamics(self, state: dict[str, Any]) -> None:
        """Goes back to the best evaluation, when each task had an adapter of its own."""
        assert self.driver is not None
        histories = {rule.name: list(getattr(rule, "history", ())) for rule in self.rules}
        self.driver.load_state_dict(state)
        for rule in self.rules:
            history = getattr(rule, "history", None)
            if history is not None:  # the course of the run was what it was
                history.clear()
                history.extend(histories[rule.name])

    def evaluated_at(self, step: int) -> float | None:
        """The evaluation loss after that step, if there was an evaluation."""
        for entry in reversed(self.state.log_history):
            if "eval_loss" in entry and entry["step"] == step:
                return number_or_nan(entry["eval_loss"])
        return None
