"""Trainer's files for an adapter: itself, checkpoints without a pickle, and ``training.json``.

What Trainer would write of the model is replaced by the adapter; its states of optimiser,
schedule, scaler and random numbers by safetensors files (``training.states``). A checkpoint is
filled here and published by ``training.checkpoints``. Nothing that is not finite is written.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import torch
from torch import Tensor

from lorasmith.core.adapter import attached
from lorasmith.core.quantized import numel
from lorasmith.errors import NonFiniteLossError
from lorasmith.io import save
from lorasmith.io.tokenizers import TokenizerRecord
from lorasmith.training import checkpoints, parts
from lorasmith.training.checkpoints import (
    ADAPTER_STATE,
    BEST_DYNAMICS,
    BEST_STATE,
    OPTIMIZER,
    RUN_STATE,
    SCALER,
    SCHEDULER,
)
from lorasmith.training.config import TrainConfig
from lorasmith.training.huggingface import Trainer
from lorasmith.training.outputs import LAST_FINITE, RESULT, TASK_FOLDER, is_main
from lorasmith.training.records import (
    TrainResult,
    eval_points,
    finite_or_none,
    loss_points,
    peak_memory_bytes,
    versions,
)
from lorasmith.training.resuming import Before
from lorasmith.training.states import (
    check_optimizer,
    check_scheduler,
    load_state,
    load_tensors,
    of_this_run,
    random_state,
    save_state,
    save_tensors,
    set_random_state,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from lorasmith.core.adapter import Adapter
    from lorasmith.dynamics.protocol import Dynamic
    from lorasmith.fleet.trainable import SubspaceTrainer

__all__ = ["STRESS", "CheckpointingTrainer"]

#: The dynamic that deals with a loss that is not finite by itself, and switches adapters.
STRESS = "stress"


class CheckpointingTrainer(Trainer):
    """Trainer that keeps the adapter and the state of its run, and never the base weights.

    Attributes:
        run_config: The run.
        base: The base model.
        adapter: What is trained.
        rules: The dynamics.
        rows: Those that it trains on.
        packing: How they become batches, and why.
        tasks: Names of their tasks.
        task: What trains inside a fleet's basis, if it does.
        tokenizer_record: Goes into the adapter's directory.
        before: What the run had come to before a resume.
        rows_digest: Of the rows.
        started: When this process began to train, on the clock of ``time.perf_counter``.
        tokens_here: Tokens that this process has seen since it began, in whole steps.
        last_random: The random state after the last step, or before the first.
        eval_seconds: Wall time of evaluations, those before a resume included.
        best: Step and loss of the best evaluation, with early stopping.
        evaluations_since_best: Evaluations since then.
        best_state: The adapter at that step.
        best_dynamics: State of the dynamics at the best evaluation, if tasks had adapters of
            their own then.
        merged_loss: Evaluation loss after the adapters of several tasks have become one.
    """

    run_config: TrainConfig
    base: Any
    adapter: Adapter
    rules: tuple[Dynamic, ...]
    rows: Dataset
    packing: str
    tasks: tuple[str, ...]
    task: SubspaceTrainer | None
    tokenizer_record: TokenizerRecord
    before: Before
    rows_digest: str
    started: float
    tokens_here: int
    last_random: dict[str, Any] | None
    eval_seconds: float
    best: tuple[int, float] | None
    evaluations_since_best: int
    best_state: dict[str, Tensor] | None
    best_dynamics: dict[str, Any] | None
    merged_loss: float | None

    def check_state(self, what: str) -> None:
        """Raises NonFiniteLossError if the adapter or the optimiser's state is not finite.

        The loss of the last step says nothing of what that step has done.
        """
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        values = {
            "adapter": list(self.adapter.state_dict().values()),
            "optimiser's state": [v for s in states for v in s.values() if torch.is_tensor(v)],
        }
        for name, tensors in values.items():
            if all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
                continue
            found = [
                path
                for path in checkpoints.list_checkpoints(self.run_config.output)
                if checkpoints.defect(path, processes=self.args.world_size) is None
            ]
            raise NonFiniteLossError(
                f"The {name} is not finite after step {self.state.global_step}, so the {what} "
                "is not written.",
                expected="finite numbers",
                got="NaN or infinity",
                fix=f"lower the learning rate (now {self._get_learning_rate():.3g}) or raise "
                "warmup" + ("; the last good checkpoint is kept" if found else ""),
                file=found[0] if found else None,
                key=name,
            )

    def _keep_last_finite(self) -> Path | None:
        state = self.adapter.state_dict().values()
        if not all(bool(t.isfinite().all()) for t in state if t.is_floating_point()):
            # Cannot happen by training, since every step is checked; but a file must not lie.
            found = checkpoints.list_checkpoints(self.run_config.output)
            return found[0] if found else None
        path = self.run_config.output / LAST_FINITE
        if is_main():
            self._save_adapter(path)
        return path

    def _save_adapter(self, path: Path) -> None:
        save(
            self.adapter.model,
            path,
            name=self.adapter.name,
            beside=True,
            tokenizer=self.tokenizer_record,
        )

    def _task_adapters(self) -> dict[str, str]:
        """Task → name of its own adapter, of those that are on the model."""
        if not any(rule.name == STRESS for rule in self.rules):
            return {}
        from lorasmith.dynamics.task_adapters import adapter_name

        names = {task: adapter_name(self.adapter.name, task) for task in self.tasks}
        there = attached(self.base)
        return {task: name for task, name in names.items() if name in there}

    def _save_task_adapters(self) -> None:
        for task, name in self._task_adapters().items():
            save(
                self.adapter.model,
                self._task_folder(task),
                name=name,
                tokenizer=self.tokenizer_record,
            )

    def _task_folder(self, task: str) -> Path:
        # Whatever a task is called, this is one folder in the output.
        return self.run_config.output / f"{TASK_FOLDER}{quote(task, safe=' ')}"

    def _save_histories(self) -> None:
        """Records that a rule keeps of every step, beside the adapter."""
        for rule in self.rules:
            save = getattr(rule, "save_history", None)
            if save is not None:
                save(self.run_config.output / f"{rule.name}.json")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter, never the base model."""
        if self.args.should_save:
            self._save_adapter(Path(output_dir or self.run_config.output))

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.check_state("checkpoint")
        partial = checkpoints.partial_path(self.run_config.output, self.state.global_step)
        tokens = self._all_tokens()
        if self.args.should_save:
            self._fill(partial, tokens)
        self.accelerator.wait_for_everyone()
        self._save_rng_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(partial)
        self.accelerator.wait_for_everyone()

    def _fill(self, partial: Path, tokens: int) -> None:
        """What the first of all processes writes."""
        shutil.rmtree(partial, ignore_errors=True)
        self._save_adapter(partial)
        save_tensors(self.adapter.state_dict(), partial / ADAPTER_STATE)
        if self.best_state is not None:
            save_tensors(self.best_state, partial / BEST_STATE)
        if self.best_dynamics is not None:
            save_state(self.best_dynamics, partial / BEST_DYNAMICS)
        checkpoints.write_json(partial / RUN_STATE, self._run_state(tokens))
        # Trainer would write NaN and Infinity, which JSON does not have.
        state = finite_or_none(dataclasses.asdict(self.state))
        checkpoints.write_json(partial / "trainer_state.json", state)
        self._save_optimizer_and_scheduler(str(partial))
        self._save_scaler(str(partial))

    def _publish(self, partial: Path) -> None:
        output = self.run_config.output
        checkpoints.publish(partial, output / f"checkpoint-{self.state.global_step}")
        checkpoints.rotate(output, self.run_config.save_total_limit)
        checkpoints.remove_partial(output)  # the lock of what has been renamed

    def save_last_step(self) -> int:
        """Writes the checkpoint of the last whole step in the middle of the next one.

        Without a collective, for the processes may be in one; see ``training.parts``.

        Returns:
            Tokens seen by all processes; of the first one only.

        Raises:
            TimeoutError: The processes are not at the same step.
        """
        self.check_state("checkpoint")
        step, output = self.state.global_step, self.run_config.output
        world, index = self.args.world_size, self.args.process_index
        assert self.last_random is not None
        if index > 0:
            part = {"random": self.last_random, "tokens": self.tokens_here}
            if not parts.hand_in(output, step, index, part):
                raise TimeoutError(f"there is no checkpoint of step {step}")
            return 0
        try:
            others = parts.collect(output, step, world)
            partial = checkpoints.partial_path(output, step)
            tokens = self.before.tokens + self.tokens_here
            tokens += sum(int(other["tokens"]) for other in others)
            self._fill(partial, tokens)
            states = [self.last_random, *(other["random"] for other in others)]
            for number, state in enumerate(states):
                save_state(state, partial / checkpoints.rng_name(number, world))
            self._publish(partial)
        finally:
            parts.dismiss(output, step, world)
        return tokens

    def _all_tokens(self) -> int:
        """Tokens seen by all processes; all of them must ask."""
        here = torch.tensor([self.tokens_here], device=self.args.device)
        return self.before.tokens + int(self.accelerator.reduce(here, "sum").item())

    def _run_state(self, tokens: int) -> dict[str, Any]:
        return {
            "format": 1,
            "config": self.run_config.to_dict(),
            "rows": self.rows_digest,
            "tokens": tokens,
            "seconds": self.seconds,
            "eval_seconds": self.eval_seconds,
            "best": None if self.best is None else list(self.best),
            "evaluations_since_best": self.evaluations_since_best,
        }

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, that before a resume included."""
        return self.before.seconds + time.perf_counter() - self.started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.last_random = load_state(self._rng_file(resume_from_checkpoint))
        state = load_tensors(folder / ADAPTER_STATE)
        with of_this_run(folder / ADAPTER_STATE):
            self.adapter.load_state_dict(state)
        if (folder / BEST_STATE).is_file():
            self.best_state = load_tensors(folder / BEST_STATE)
        if (folder / BEST_DYNAMICS).is_file():
            self.best_dynamics = load_state(folder / BEST_DYNAMICS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's, without a pickle."""
        if self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            save_state(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER)
            save_state(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, without a pickle; a state that is not of this run's optimiser is refused."""
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        file = Path(checkpoint) / OPTIMIZER
        state = load_state(file)
        with of_this_run(file):
            check_optimizer(state, self.optimizer, file)
            self.optimizer.load_state_dict(state)
        file = Path(checkpoint) / SCHEDULER
        state = load_state(file)
        with of_this_run(file):
            check_scheduler(state, self.lr_scheduler, file)
            self.lr_scheduler.load_state_dict(state)

    def _save_scaler(self, output_dir: str) -> None:
        """Trainer's, without a pickle."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(scaler.state_dict(), Path(output_dir) / SCALER)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Trainer's, without a pickle."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None or checkpoint is None:
            return
        file = Path(checkpoint) / SCALER
        if file.is_file():
            with of_this_run(file):
                scaler.load_state_dict(load_state(file))

    def _rng_file(self, folder: str) -> Path:
        world, index = self.args.world_size, self.args.process_index
        return Path(folder) / checkpoints.rng_name(index, world)

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's, without a pickle: random numbers of Python, NumPy, PyTorch, the device."""
        # Not the present one: a checkpoint may be written in the middle of the step after it.
        state = self.last_random or random_state(self.args.device)
        save_state(state, self._rng_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's, without a pickle."""
        if checkpoint is None:
            return
        file = self._rng_file(checkpoint)
        state = load_state(file)
        with of_this_run(file):
            set_random_state(state, self.args.device)

    # -- the result ----------------------------------------------------------------------

    def _write_result(self, result: TrainResult) -> None:
        if self.args.should_save:
            checkpoints.write_json(self.run_config.output / RESULT, result.to_dict())

    def _result(
        self,
        status: Literal["finished", "stopped early", "interrupted"],
        tokens: int | None = None,
    ) -> TrainResult:
        """How it went; all processes must ask, unless the tokens of all are known."""
        history = self.state.log_history
        rules = {rule.name for rule in self.rules}
        losses, evaluations = loss_points(history, rules), eval_points(history)
        kept = self.best if self.best_state is not None and status != "interrupted" else None
        eval_loss = evaluations[-1].loss if evaluations else None
        found = checkpoints.list_checkpoints(self.run_config.output)
        seconds, tokens = self.seconds, self._all_tokens() if tokens is None else tokens
        parameters = list(self.base.parameters())
        base = next(p for p in parameters if not p.requires_grad) if parameters else None
        return TrainResult(
            status=status,
            output=str(self.run_config.output),
            adapter_path=None if status == "interrupted" else str(self.run_config.output),
            checkpoint=str(found[0]) if found else None,
            steps=self.state.global_step,
            epochs=float(self.state.epoch or 0.0),
            losses=losses,
            evaluations=evaluations,
            final_loss=losses[-1].loss if losses else None,
            eval_loss=eval_loss if kept is None or self.merged_loss is not None else kept[1],
            best_step=None if kept is None else kept[0],
            rows=len(self.rows),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / max(seconds - self.eval_seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(self.args.device),
            trainable_parameters=self.adapter.num_parameters(),
            total_parameters=numel(self.base),
            packing=self.packing,
            base=str(getattr(self.base, "name_or_path", "") or self.run_config.model),
            dtype=str(base.dtype if base is not None else "").removeprefix("torch."),
            device=str(self.args.device),
            processes=self.args.world_size,
            config=self.run_config.to_dict(),
            adapter=self.adapter.config.to_dict(),
            versions=versions(),
            task_adapters={}
            if status == "interrupted"
            else {task: str(self._task_folder(task)) for task in self._task_adapters()},
            subspace=None if self.task is None else self._subspace(self.task, status),
        )

    def _subspace(self, task: SubspaceTrainer, status: str) -> dict[str, Any]:
        saved = None if status == "interrupted" else self.run_config.subspace_target
        return {
            "task": task.task,
            "saved": None if saved is None else str(saved),
            "parameters": task.parameter_count().to_dict(),
        }
