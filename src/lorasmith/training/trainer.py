"""The training run, on Transformers' Trainer and Accelerate.

:func:`train` takes a :class:`~lorasmith.training.config.TrainConfig` and leaves an adapter.
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
  step that accumulates gradients of many batches is given up instead, if it takes long.
- The evaluation loss is a mean over tokens. (Trainer's is a mean of batch means.)
- Where rows have a task, every batch is of one task, the same on all devices, and losses are
  reported for each task as well.
- Dynamics (:mod:`lorasmith.dynamics`) act through the hooks of their driver, which is told what
  the loss computation has at hand already. Their state is in ``optimizer.safetensors``.
- No pickle is written or read: states are safetensors files (``training.states``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import torch
from rich.console import Console
from torch import Tensor, nn

from lorasmith.core.optim import check_lora_plus, param_groups
from lorasmith.core.quantized import numel
from lorasmith.core.registry import variant_of
from lorasmith.errors import (
    BaseMismatchError,
    ConfigError,
    DataError,
    LorasmithError,
    MissingDependencyError,
    NonFiniteLossError,
    TrainingError,
)
from lorasmith.io.files import check_base, read_adapter
from lorasmith.io.strict import read_object
from lorasmith.io.tokenizers import TokenizerRecord, check_tokenizer
from lorasmith.redaction import redact_all
from lorasmith.training import checkpoints
from lorasmith.training.anchor import load_anchors
from lorasmith.training.calibration import calibration_batches
from lorasmith.training.collate import Collator, PackingCollator, choose_collator
from lorasmith.training.config import TrainConfig
from lorasmith.training.data import (
    TASK,
    choose_task_column,
    examples_of,
    first_rows,
    load_rows,
    split_rows,
    tasks_of,
    tokenise,
)
from lorasmith.training.evaluate import (
    contiguous_head_input,
    evaluating,
    exp_or_inf,
    length_batches,
)
from lorasmith.training.loss import LossOutput, model_loss_output
from lorasmith.training.models import load_model, quiet, resolve_device, resolve_model
from lorasmith.training.outputs import bytes_needed, check_space, check_writable
from lorasmith.training.progress import bar
from lorasmith.training.states import (
    check_optimizer,
    load_state,
    load_tensors,
    of_this_run,
    random_state,
    save_state,
    set_random_state,
)

try:
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise MissingDependencyError(
        "Training needs Transformers and Accelerate, which are not installed.",
        fix='pip install "lorasmith[train]"',
    ) from error

if TYPE_CHECKING:
    from datasets import Dataset

    from lorasmith.core.adapter import Adapter
    from lorasmith.core.config import AdapterConfig
    from lorasmith.dynamics.driver import Dynamics
    from lorasmith.dynamics.protocol import Dynamic
    from lorasmith.fleet.trainable import SubspaceTrainer

__all__ = ["EvalPoint", "LossPoint", "TrainResult", "TrainingInterrupted", "train"]

logger = logging.getLogger(__name__)

ADAPTER_STATE = "adapter_state.safetensors"
BEST_STATE = "best_state.safetensors"
BEST_DYNAMICS = "best_dynamics.safetensors"
OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.safetensors"
SCALER = "scaler.safetensors"
RUN_STATE = "run_state.json"
RESULT = "training.json"
LAST_FINITE = "last-finite"
#: Seconds after a signal from which a step of several batches is given up between two of them.
GIVE_UP_AFTER = 15.0
TASK_FOLDER = "task-"
#: The dynamic that deals with a loss that is not finite by itself, and switches adapters.
STRESS = "stress"


# Records --------------------------------------------------------------------------------------


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
        values: dict[str, Any] = _finite(dataclasses.asdict(self))
        return values


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
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


# The run --------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> TrainResult:
    """Trains an adapter and saves it.

    The adapter lands in ``config.output`` as a PEFT directory, with the course of the run in
    ``training.json`` beside it and checkpoints in ``checkpoint-STEP``. Seeds the global
    random number generators.

    Args:
        config: The run.
        model: The base model, if it is in memory already; ``config.model`` is then only its
            name. It keeps the trained adapter, named ``"default"``.
        tokenizer: Its tokenizer; given if and only if ``model`` is.
        progress: Whether to show progress on stderr.

    Raises:
        ConfigError: The configuration cannot work here.
        ModelError, DataError: Model or data cannot be read.
        TrainingError: The output is taken, or there is nothing good to resume from.
        NonFiniteLossError: Loss or gradient became NaN or infinite. The last finite adapter
            is in ``output/last-finite``.
        TrainingInterrupted: SIGTERM or Ctrl-C.
    """
    if (model is None) != (tokenizer is None):
        raise ConfigError(
            "A model in memory comes with its tokenizer.",
            expected="both model and tokenizer, or neither",
            key="tokenizer",
        )
    adapter_config = _adapter_config(config)
    rules = config.make_dynamics()
    if config.lora_plus_ratio is not None:
        check_lora_plus(variant_of(adapter_config))
    device = _device(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = checkpoints.choose_checkpoint(config.resume, config.output, processes=processes)
    with _nothing_empty_left(config.output):
        _prepare_output(config, checkpoint)
        return _train(config, adapter_config, rules, device, checkpoint, model, tokenizer, progress)


def _adapter_config(config: TrainConfig) -> AdapterConfig:
    """What is trained, of a subspace as far as it is known without the fleet."""
    if config.subspace is None:
        return config.adapter.to_config()
    from lorasmith.adapters.subspace import SubspaceConfig
    from lorasmith.fleet.store import is_subspace

    for path, there in ((config.subspace, True), (config.subspace_save, False)):
        if path is not None and not is_subspace(path) and (there or path.exists()):
            raise ConfigError(
                "That is not the directory of a fleet.",
                expected="what lorasmith fleet compress writes" + ("" if there else ", or nothing"),
                file=path,
                key="subspace" if there else "subspace_save",
            )
    return SubspaceConfig(init="fleet")


def _in_subspace(config: TrainConfig, model: Any) -> SubspaceTrainer:
    """Attaches what is trained inside a fleet's basis."""
    from lorasmith.fleet.trainable import SubspaceTrainer

    assert config.subspace is not None
    options = config.adapter
    made = SubspaceTrainer(
        model,
        config.subspace,
        config.subspace_task or config.output.resolve().name,
        form=config.subspace_form,
        extra=config.subspace_extra,
        modules=options.targets,
        exclude=options.exclude or (),
        layers=options.layers,
        modules_to_save=options.modules_to_save or (),
        dropout=options.dropout or 0.0,
    )
    count = made.parameter_count()
    logger.info(
        "Training %s numbers on %d layers; LoRA of rank %d would train %s.",
        f"{count.trained:,}",
        count.layers,
        count.lora_rank,
        f"{count.lora:,}",
    )
    return made


@contextlib.contextmanager
def _nothing_empty_left(output: Path) -> Iterator[None]:
    """On failure, takes away the directories that were made for a run and hold nothing."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if _is_main():
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                for path in made:
                    path.rmdir()
        raise


def _train(
    config: TrainConfig,
    adapter_config: AdapterConfig,
    rules: tuple[Dynamic, ...],
    device: torch.device,
    checkpoint: Path | None,
    model: Any,
    tokenizer: Any,
    progress: bool,
) -> TrainResult:
    import lorasmith as ls

    before = _Before(config, checkpoint)
    loaded = model is None
    # Before the model, which may take minutes: what is wrong with the rows shows at once.
    raw = _raw_rows(config)
    if model is None:
        model, tokenizer = load_model(
            config.model,
            dtype=config.dtype,
            device=str(device),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            quantize=config.quantize,
        )
    with quiet(), contextlib.ExitStack() as failed, contextlib.ExitStack() as stack:
        rows, eval_rows = _rows(config, tokenizer, *raw)
        _check_tokens(model, tokenizer, rows, eval_rows)
        before.check_rows(rows)
        before.check_base(model, tokenizer)
        if variant_of(adapter_config).weight_use(adapter_config) == "start":
            logger.info(
                "The adapter starts from the base's weights: they are read layer by layer, "
                "which may take a while."
            )
        transformers.set_seed(config.seed)
        there = frozenset(ls.attached(model))
        batches = calibration_batches(config, adapter_config, tokenizer, rows)
        task = None if config.subspace is None else _in_subspace(config, model)
        if task is not None:
            adapter = task.adapter
        else:
            with bar(Console(stderr=True), shown=progress) as advance:
                adapter = ls.attach(
                    model,
                    adapter_config,
                    calibration=batches,
                    dequantize=config.dequantize,
                    originals=_originals(config, adapter_config) if loaded else None,
                    progress=advance,
                )
        if not loaded:
            # On failure a model that belongs to the caller must be as it was.
            failed.callback(_detach_new, model, there)
        if _is_main():
            _check_space(config, adapter)
        collate, packing = _collator(config, model, tokenizer)
        load_anchors(
            rules,
            model,
            tokenizer,
            collate=collate,
            batch_size=config.eval_batch_size or config.batch_size,
            max_length=config.max_length,
            device=device,
            seed=config.seed,
        )
        stack.enter_context(_restored(model))
        trainer = _AdapterTrainer(
            config,
            model,
            adapter,
            rules,
            rows,
            eval_rows,
            collate,
            packing,
            before,
            progress,
            task,
            TokenizerRecord.of(tokenizer),
        )
        stack.callback(trainer.close_dynamics)
        stack.enter_context(contiguous_head_input(model))
        stack.enter_context(_GradientCheckpointing(model, config.gradient_checkpointing))
        result = trainer.run(checkpoint)
        failed.pop_all()
    return result


def _originals(config: TrainConfig, adapter: AdapterConfig) -> Any:
    """The weights before ``--quantize``, for an adapter that corrects what it has lost."""
    if config.quantize is None or not variant_of(adapter).corrects(adapter):
        return None
    resolved = resolve_model(config.model, revision=config.revision)
    if any(Path(resolved.path).glob("model*.safetensors*")):
        return resolved.path  # read one tensor at a time
    model, _ = load_model(
        config.model,
        dtype=config.dtype,
        device="cpu",
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return model


def _detach_new(model: nn.Module, there: frozenset[str]) -> None:
    """Takes off every adapter that was not there before."""
    import lorasmith as ls

    for name in [name for name in ls.attached(model) if name not in there]:
        # The error that is under way says more than a second one would.
        with contextlib.suppress(LorasmithError):
            ls.detach(model, name)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _device(config: TrainConfig) -> torch.device:
    device = resolve_device(config.device)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and device.index not in (None, rank):
        raise ConfigError(
            "Trainer chooses among CUDA devices by itself.",
            expected=f"cuda or cuda:{rank}",
            got=config.device,
            fix=f"set CUDA_VISIBLE_DEVICES={device.index} and give device cuda",
            key="device",
        )
    return device


def _prepare_output(config: TrainConfig, checkpoint: Path | None) -> None:
    """Makes room for the run, or refuses to if there is something that it would destroy."""
    output = config.output
    if output.exists() and not output.is_dir():
        raise ConfigError("The output is a file.", expected="a directory", file=output)
    if not _is_main():
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "The output cannot be written.",
            expected="a directory that can be made and written",
            got=error.strerror or error,
            fix="check the path and its permissions, or choose another output",
            file=output,
            key="output",
        ) from error
    check_writable(output)
    checkpoints.remove_partial(output)
    if checkpoint is None:
        old = [*checkpoints.list_checkpoints(output)]
        results = (output / name for name in ("adapter_config.json", RESULT, LAST_FINITE))
        old += [path for path in results if path.exists()]
        old += [p.parent for p in output.glob(f"{TASK_FOLDER}*/adapter_config.json")]
        if old and not config.overwrite:
            raise TrainingError(
                "The output directory holds an earlier run.",
                expected="a new or empty directory",
                got=", ".join(sorted(p.name for p in old)),
                fix="choose another one, go on with --resume last, or give --overwrite",
                file=output,
            )
        for path in old:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name == RESULT:
                path.unlink()  # the adapter itself is replaced only by the new one


class _Before:
    """What an interrupted run had come to, and whether this one can go on from it."""

    #: Options without influence on what is learned, or that may well change on a resume.
    _FREE = frozenset(
        {"output", "resume", "overwrite", "save_steps", "save_total_limit", "log_steps"}
        | {"report_to", "run_name", "device", "eval_batch_size", "trust_remote_code"}
        | {"subspace_task", "subspace_save", "subspace_in_place", "changed"}
    )

    #: Options that say where to find what is compared by itself, the rows or the base.
    _JUDGED = frozenset({"model", "revision", "data", "split", "limit"})

    def __init__(self, config: TrainConfig, checkpoint: Path | None) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.eval_seconds = 0.0
        self.best: tuple[int, float] | None = None
        self.evaluations_since_best = 0
        self._rows: str | None = None
        self._checkpoint: Path | None = None
        self._accept = config.changed == "accept"
        if checkpoint is None:
            return
        self._checkpoint = checkpoint
        state = read_object(checkpoint / RUN_STATE, root=checkpoint)
        with of_this_run(checkpoint / RUN_STATE):
            self.tokens = int(state["tokens"])
            self.seconds = float(state["seconds"])
            self.eval_seconds = float(state["eval_seconds"])
            if state["best"] is not None:
                self.best = (int(state["best"][0]), float(state["best"][1]))
            self.evaluations_since_best = int(state["evaluations_since_best"])
            self._rows = str(state["rows"])
            # Written without secrets.
            self._compare(state["config"], redact_all(config.to_dict()))
        checkpoints.check_states(checkpoint)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old["adapter"] != new["adapter"]:
            raise TrainingError(
                "The checkpoint is of another adapter than the one asked for.",
                expected=old["adapter"],
                got=new["adapter"],
                fix="give the same adapter options, or start anew with --overwrite",
                file=self._checkpoint,
            )
        for key in ("dynamics", "dynamics_options"):
            if (old.get(key) or None) != (new[key] or None):
                raise TrainingError(
                    "The checkpoint is of a run with other dynamics than those asked for.",
                    expected=old.get(key) or "none",
                    got=new[key] or "none",
                    fix="give the same dynamics, or start anew with --overwrite",
                    file=self._checkpoint,
                    key=key,
                )
        changed = [
            key
            for key in new
            if key not in self._FREE and key != "adapter" and key in old and old[key] != new[key]
        ]
        names = [key for key in changed if key not in self._JUDGED]
        if names and not self._accept:
            raise TrainingError(
                "The run began with other options than those given now.",
                expected=", ".join(f"{name} {old[name]!r}" for name in names),
                got=", ".join(f"{name} {new[name]!r}" for name in names),
                fix="give the same options, go on with these by --changed accept, or start anew "
                "with --overwrite",
                file=self._checkpoint,
                key=names[0],
            )
        if changed:
            logger.warning(
                "The run goes on with other options than it began with: %s.",
                ", ".join(f"{key} {old[key]!r} → {new[key]!r}" for key in changed),
            )

    def check_rows(self, rows: Dataset) -> None:
        """Raises a TrainingError unless the rows are those of the checkpoint, or may be others."""
        if self._rows is None or self._rows == rows_digest(rows):
            return
        if self._accept:
            logger.warning("The run goes on with other rows than it began with.")
            return
        count, _, digest = self._rows.partition(":")
        raise TrainingError(
            "The rows are not those with which the run began.",
            expected=f"{count} rows, SHA-256 {digest[:12]}…",
            got="{} rows, SHA-256 {:.12}…".format(*rows_digest(rows).split(":")),
            fix="give the same data, go on with these by --changed accept, or start anew with "
            "--overwrite",
            file=self._checkpoint,
            key="data",
        )

    def check_base(self, model: Any, tokenizer: Any) -> None:
        """Raises a TrainingError if base or tokenizer are not those of the checkpoint."""
        if self._checkpoint is None:
            return
        weights = read_adapter(self._checkpoint)
        try:
            check_base(model, weights, self._accept)
            check_tokenizer(
                weights.base.tokenizer, tokenizer, allow=self._accept, file=self._checkpoint
            )
        except BaseMismatchError as error:
            raise TrainingError(
                f"The checkpoint cannot be gone on from here: {error.what[0].lower()}"
                f"{error.what[1:]}",
                expected=error.expected,
                got=error.got,
                fix="give the same model, go on with this one by --changed accept, or start anew "
                "with --overwrite",
                file=self._checkpoint,
                key=error.key or "model",
            ) from error


def rows_digest(rows: Dataset) -> str:
    """Number of rows and a digest of their tokens, to tell whether two runs see the same."""
    digest = hashlib.sha256()
    columns = ["input_ids", "labels", *([TASK] if TASK in rows.column_names else [])]
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        digest.update(repr(tuple(batch[column] for column in columns)).encode())
    return f"{len(rows)}:{digest.hexdigest()}"


def _raw_rows(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and to evaluate on, as they are; the first ones have been looked at."""
    rows = load_rows(config.data, split=config.split, limit=config.limit, seed=config.seed)
    eval_rows = None
    if config.eval_data is not None:
        eval_rows = load_rows(
            config.eval_data, split=config.eval_data_split, limit=config.eval_limit
        )
    for source, read in ((config.data, rows), (config.eval_data, eval_rows)):
        try:
            if read is not None:
                examples_of(read[0])
        except DataError as error:  # noqa: PERF203 - two at most
            raise DataError(
                error.what,
                expected=error.expected,
                got=error.got,
                fix=error.fix,
                file=source,
                key=error.key or "data",
            ) from error
    return rows, eval_rows


def _check_tokens(model: Any, tokenizer: Any, rows: Dataset, eval_rows: Dataset | None) -> None:
    """Raises a DataError if a token or label lies outside the model's vocabulary."""
    sizes = [int(model.get_input_embeddings().weight.shape[0])]
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        sizes.append(int(getattr(head, "out_features", 0) or head.weight.shape[0]))
    limit = min(sizes)
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= limit:
        raise _outside("pad_token_id", int(pad), limit, "")
    for key, read in (("data", rows), ("eval_data", eval_rows)):
        for start in range(0, 0 if read is None else len(read), 1000):
            assert read is not None
            batch = read[start : start + 1000]
            for column in ("input_ids", "labels"):
                for offset, ids in enumerate(batch[column]):
                    if max(ids) >= limit:
                        raise _outside(key, max(ids), limit, f", in example {start + offset}")


def _outside(key: str, highest: int, limit: int, where: str) -> DataError:
    return DataError(
        f"The tokenizer gives tokens that the model does not have{where}.",
        expected=f"token ids below {limit}",
        got=highest,
        fix="use the model's own tokenizer, or resize the model's embeddings first "
        "(model.resize_token_embeddings(len(tokenizer)))",
        key=key,
    )


def _check_space(config: TrainConfig, adapter: Adapter) -> None:
    """Raises a TrainingError if the checkpoints will not fit."""
    size = sum(value.numel() * value.element_size() for value in adapter.state_dict().values())
    kept = 0 if config.save_steps is None else config.save_total_limit
    if config.steps is not None and config.save_steps is not None:
        kept = min(kept, config.steps // config.save_steps)
    needed = bytes_needed(size, checkpoints=kept, keeps_best=config.early_stopping is not None)
    there = [f for path in checkpoints.list_checkpoints(config.output) for f in path.iterdir()]
    check_space(config.output, needed - sum(file.stat().st_size for file in there))


def _rows(
    config: TrainConfig, tokenizer: Any, rows: Dataset, eval_rows: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Tokenised rows to train on and to evaluate on."""
    column = choose_task_column(config.task_column, rows)
    if config.eval_data is None and config.eval_split > 0:
        rows, eval_rows = split_rows(rows, fraction=config.eval_split, seed=config.seed, by=column)
        if config.eval_limit is not None and config.eval_limit < len(eval_rows):
            eval_rows = eval_rows.select(
                first_rows(eval_rows, config.eval_limit, by=column or TASK)
            )
    tokens = tokenise(rows, tokenizer, max_length=config.max_length, task_column=column)
    names = tasks_of(tokens)
    if names is not None:
        logger.info(
            "Every batch is of one of %d tasks: %s.",
            len(set(names)),
            ", ".join(f"{name} ({number:,} rows)" for name, number in Counter(names).items()),
        )
    if eval_rows is None:
        return tokens, None
    if config.task_column == "auto":
        column = choose_task_column("auto", eval_rows)
    elif column not in eval_rows.column_names:
        column = None
    return tokens, tokenise(eval_rows, tokenizer, max_length=config.max_length, task_column=column)


def _collator(config: TrainConfig, model: nn.Module, tokenizer: Any) -> tuple[Collator, str]:
    """The collator, and one sentence on how rows become batches."""
    collate, support = choose_collator(
        model,
        int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id),
        packing={"auto": "auto", "on": True, "off": False}[config.packing],  # type: ignore[arg-type]
        max_length=config.max_length,
    )
    how = "packed" if isinstance(collate, PackingCollator) else "padded, grouped by length"
    text = f"{how}: {support.reason}"
    logger.info("Rows are %s.", text)
    return collate, text


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Trainer switches the cache off and training mode on; this puts both back."""
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    training = model.training
    try:
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]
        model.train(training)


class _GradientCheckpointing:
    """Recomputation of activations for the time of a run."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.model, self.wanted = model, wanted

    def __enter__(self) -> None:
        if not self.wanted:
            return
        # The reentrant form needs inputs with gradients, which a frozen base does not have.
        settings = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def __exit__(self, *_: object) -> None:
        if not self.wanted:
            return
        if hasattr(self.model, "activation_checkpointing_disable"):
            self.model.activation_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_disable()


# Trainer --------------------------------------------------------------------------------------

_TOKENS = "row_tokens"


@dataclass(frozen=True)
class _Counting:
    """A collator that also says how many tokens the rows of a batch have, and their task."""

    collate: Collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.collate(rows))
        batch[_TOKENS] = sum(len(row["input_ids"]) for row in rows)
        if TASK in rows[0]:
            (batch[TASK],) = {row[TASK] for row in rows}
        return batch


class _RowOrder(torch.utils.data.Sampler[int]):
    """The rows in an order that depends on seed and epoch alone.

    Without tasks every row comes once. With tasks the order is made of whole batches of one
    task, in turns: a task with twice the rows has twice the turns, evenly spread. The last
    batch of a task is filled up with rows of that task from the head of the epoch's order.

    Args:
        lengths: Tokens of each row, to batch rows of similar length; None for any order.
        count: Number of rows.
        batch_size: Rows a batch, on all devices together.
        seed: Seed.
        epoch: Gives the epoch when an order is asked for.
        tasks: The task of each row.
    """

    #: Batches among which rows are sorted by length.
    WINDOW = 50

    def __init__(
        self,
        lengths: Sequence[int] | None,
        count: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.lengths, self.count = lengths, count
        self.batch_size, self.seed, self.epoch = batch_size, seed, epoch
        self.tasks = tasks

    def __len__(self) -> int:
        return epoch_rows(self.count, self.tasks, self.batch_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # Seeds of neighbouring runs and epochs must not meet.
        key = hashlib.sha256(f"{self.seed}:{self.epoch()}".encode()).digest()
        generator.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        order: list[int] = torch.randperm(self.count, generator=generator).tolist()
        batches = (
            self._batches(order, generator)
            if self.tasks is None
            else self._in_turns(order, self.tasks, generator)
        )
        return iter([i for batch in batches for i in batch])

    def _batches(self, order: list[int], generator: torch.Generator) -> list[list[int]]:
        """Cuts an order into batches, of rows of like length if lengths are known."""
        size, lengths = self.batch_size, self.lengths
        if lengths is None:
            return [order[i : i + size] for i in range(0, len(order), size)]
        batches: list[list[int]] = []
        window = size * self.WINDOW
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: -lengths[i])
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        # A short batch stays at the end: in front it would shift all others.
        short = [batches.pop()] if len(batches[-1]) < size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [*(batches[k] for k in shuffled), *short]

    def _in_turns(
        self, order: list[int], tasks: Sequence[str], generator: torch.Generator
    ) -> list[list[int]]:
        """Whole batches of one task each; those of a task are evenly spread over the epoch."""
        members: dict[str, list[int]] = {name: [] for name in dict.fromkeys(tasks)}
        for i in order:
            members[tasks[i]].append(i)
        starts = torch.rand(len(members), generator=generator).tolist()
        placed: list[tuple[float, int, list[int]]] = []
        for number, rows in enumerate(members.values()):
            missing = -len(rows) % self.batch_size
            filled = rows + [rows[i % len(rows)] for i in range(missing)]
            batches = self._batches(filled, generator)
            placed += [
                ((k + starts[number]) / len(batches), number, batch)
                for k, batch in enumerate(batches)
            ]
        return [batch for _, _, batch in sorted(placed, key=lambda item: item[:2])]


def epoch_rows(count: int, tasks: Sequence[str] | None, batch_size: int) -> int:
    """Rows of one epoch: with tasks, those that fill up the last batch of each count twice."""
    if tasks is None:
        return count
    return sum(-(-number // batch_size) * batch_size for number in Counter(tasks).values())


class _InterruptedError(Exception):
    """A signal came during an evaluation, or during a step that goes on for long."""


class _AdapterTrainer(Trainer):
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
        before: _Before,
        progress: bool,
        task: SubspaceTrainer | None,
        tokenizer: TokenizerRecord,
    ) -> None:
        self.run_config = config
        self.tokenizer_record = tokenizer
        self.task = task
        self.base: Any = model
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
        self.tokens_here = 0  # of this process, since it began
        self.eval_seconds = before.eval_seconds
        self.best = before.best
        self.evaluations_since_best = before.evaluations_since_best
        self.best_state: dict[str, Tensor] | None = None
        #: State of the dynamics at the best evaluation, if tasks had adapters of their own then.
        self.best_dynamics: dict[str, Any] | None = None
        self.merged_loss: float | None = None
        self.stopped_early = False
        self.step_loss: Tensor | None = None
        #: Random state and tokens after the last step, where the next can be given up.
        self.step_start: tuple[dict[str, Any], int] | None = None
        self.stop = _StopSignals()
        self.started = time.perf_counter()
        self.plain_collate = collate
        self.rows_digest = rows_digest(rows)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        #: Rows of an epoch, those that fill up a task's last batch included.
        self.epoch_rows = epoch_rows(len(rows), self.row_tasks, config.batch_size * world)
        arguments = _arguments(
            config,
            self.epoch_rows,
            evaluates=eval_rows is not None,
            find_unused=any(rule.name == STRESS for rule in rules),
        )
        self.bar = _Bar() if progress and _is_main() else None
        callbacks: list[TrainerCallback] = [_Watch(self)]
        if self.bar is not None:
            callbacks.append(self.bar)
        try:
            super().__init__(
                model=model,
                args=arguments,
                data_collator=_Counting(collate),
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
        self.remove_callback(transformers.PrinterCallback)
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
        self.tokens_here += int(inputs.pop(_TOKENS, 0))
        task = inputs.pop(TASK, None)
        driver = self.driver
        if driver is not None:
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
        if self._gives_up_step():
            raise _InterruptedError
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def end_step(self) -> None:
        """Notes what the batches of the next step will change before the optimiser acts."""
        self.step_start = None
        accumulates = self.args.gradient_accumulation_steps > 1 and self.args.world_size == 1
        # The rules take note of every batch, and would have to be copied in every step.
        if accumulates and self.driver is None:
            self.step_start = (random_state(self.args.device), self.tokens_here)

    def _gives_up_step(self) -> bool:
        """Whether a step that was asked to end takes too long; its start is gone back to then."""
        if self.step_start is None or not self.stop.waited(GIVE_UP_AFTER):
            return False
        state, self.tokens_here = self.step_start
        set_random_state(state, self.args.device)
        return True

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

    def _keep_last_finite(self) -> Path | None:
        state = self.adapter.state_dict().values()
        if not all(bool(t.isfinite().all()) for t in state if t.is_floating_point()):
            # Cannot happen by training, since every step is checked; but a file must not lie.
            found = checkpoints.list_checkpoints(self.run_config.output)
            return found[0] if found else None
        path = self.run_config.output / LAST_FINITE
        if _is_main():
            self._save_adapter(path)
        return path

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

    def _get_train_sampler(self, train_dataset: Any = None) -> _RowOrder:
        rows = self.rows if train_dataset is None else train_dataset
        # Packed rows leave no padding, so that their lengths do not matter.
        grouped = not isinstance(self.plain_collate, PackingCollator)
        world = self.args.world_size
        per_epoch = steps_per_epoch(self.epoch_rows, self.run_config, world)
        return _RowOrder(
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
                output = model_loss_output(self.base, {k: v.to(device) for k, v in inputs.items()})
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

    # -- checkpoints ---------------------------------------------------------------------

    def _save_adapter(self, path: Path) -> None:
        import lorasmith as ls

        ls.save(
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
        import lorasmith as ls
        from lorasmith.dynamics.task_adapters import adapter_name

        names = {task: adapter_name(self.adapter.name, task) for task in self.tasks}
        there = ls.attached(self.base)
        return {task: name for task, name in names.items() if name in there}

    def _save_task_adapters(self) -> None:
        import lorasmith as ls

        for task, name in self._task_adapters().items():
            ls.save(
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
        step = self.state.global_step
        output = self.run_config.output
        partial = checkpoints.partial_path(output, step)
        tokens = self._all_tokens()
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            self._save_adapter(partial)
            _save_tensors(self.adapter.state_dict(), partial / ADAPTER_STATE)
            if self.best_state is not None:
                _save_tensors(self.best_state, partial / BEST_STATE)
            if self.best_dynamics is not None:
                save_state(self.best_dynamics, partial / BEST_DYNAMICS)
            checkpoints.write_json(partial / RUN_STATE, self._run_state(tokens))
            # Trainer would write NaN and Infinity, which JSON does not have.
            state = _finite(dataclasses.asdict(self.state))
            checkpoints.write_json(partial / "trainer_state.json", state)
        self.accelerator.wait_for_everyone()
        self._save_optimizer_and_scheduler(str(partial))
        self._save_scaler(str(partial))
        self._save_rng_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(partial, output / f"checkpoint-{step}")
            checkpoints.rotate(output, self.run_config.save_total_limit)
            checkpoints.remove_partial(output)  # the lock of what has been renamed
        self.accelerator.wait_for_everyone()

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
        with of_this_run(Path(checkpoint) / SCHEDULER):
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))

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
        save_state(random_state(self.args.device), self._rng_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's, without a pickle."""
        if checkpoint is None:
            return
        file = self._rng_file(checkpoint)
        state = load_state(file)
        with of_this_run(file):
            set_random_state(state, self.args.device)

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
            except _InterruptedError:
                self._save_checkpoint(self.base)
                self.stop.honoured = True
            finally:
                if self.bar is not None:
                    self.bar.close()
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

    def _finish(self) -> None:
        """Ends the dynamics, with the best adapter if one was looked for, and measures it."""
        if self.eval_rows is not None and self.evaluated_at(self.state.global_step) is None:
            metrics = self.evaluate()
            self.consider(metrics["eval_loss"])
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
                return _number(entry["eval_loss"])
        return None

    def _write_result(self, result: TrainResult) -> None:
        if self.args.should_save:
            checkpoints.write_json(self.run_config.output / RESULT, result.to_dict())

    def _result(self, status: Literal["finished", "stopped early", "interrupted"]) -> TrainResult:
        history = self.state.log_history
        rules = {rule.name for rule in self.rules}
        losses = tuple(
            LossPoint(
                int(e["step"]),
                float(e["epoch"]),
                _number(e["loss"]),
                float(e["learning_rate"]),
                _number(e["grad_norm"]) if "grad_norm" in e else None,
                _with_prefix(e, "loss_"),
                {k: _number(v) for k, v in e.items() if k.partition("/")[0] in rules},
            )
            for e in history
            if "loss" in e
        )
        evaluations = tuple(
            EvalPoint(
                int(e["step"]),
                float(e["epoch"]),
                _number(e["eval_loss"]),
                _number(e["eval_perplexity"]),
                int(e["eval_tokens"]),
                float(e["eval_runtime"]),
                _with_prefix(e, "eval_loss_"),
            )
            for e in history
            if "eval_loss" in e
        )
        kept = self.best if self.best_state is not None and status != "interrupted" else None
        eval_loss = evaluations[-1].loss if evaluations else None
        found = checkpoints.list_checkpoints(self.run_config.output)
        seconds, tokens = self.seconds, self._all_tokens()
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
            versions=_versions(),
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


def _with_prefix(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """What an entry of the log says of each task."""
    return {k[len(prefix) :]: _number(v) for k, v in entry.items() if k.startswith(prefix)}


def _number(value: float | None) -> float:
    """A number of the log; one that was not finite is null in a checkpoint."""
    return math.nan if value is None else float(value)


def steps_per_epoch(rows: int, config: TrainConfig, processes: int) -> int:
    """Optimiser steps in one pass over the rows."""
    batches = math.ceil(math.ceil(rows / config.batch_size) / processes)
    return max(1, math.ceil(batches / config.gradient_accumulation))


#: Number of points that the loss curve of a run has, unless log_steps says otherwise.
_LOG_POINTS = 200


def _arguments(
    config: TrainConfig, rows: int, *, evaluates: bool, find_unused: bool = False
) -> TrainingArguments:
    device = resolve_device(config.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = config.steps or math.ceil(config.epochs * steps_per_epoch(rows, config, processes))
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if evaluates and config.eval_steps is not None:
        evaluation = {"eval_strategy": "steps", "eval_steps": config.eval_steps}
    elif evaluates:
        evaluation = {"eval_strategy": "epoch"}
    saving: dict[str, Any] = {"save_strategy": "no"}
    if config.save_steps is not None:
        saving = {"save_strategy": "steps", "save_steps": config.save_steps}
    arguments = TrainingArguments(
        output_dir=str(config.output),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size or config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule
        if config.schedule != "constant"
        else "constant_with_warmup",
        # Trainer would round a fraction up, and the first step of a warm-up has learning
        # rate 0: a short run would begin with a step that does nothing.
        warmup_steps=int(config.warmup * steps) if config.warmup < 1 else round(config.warmup),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="steps",
        logging_steps=config.log_steps or max(1, steps // _LOG_POINTS),
        logging_first_step=True,
        # On by default, it would log a NaN as if it had been 0.0.
        logging_nan_inf_filter=False,
        save_total_limit=config.save_total_limit,
        report_to=list(config.report_to) or "none",
        run_name=config.run_name,
        disable_tqdm=True,
        log_level="error",
        # Rows have exactly the columns that the collator takes.
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        # Every adapter parameter has a gradient in every step, and looking costs time; but not
        # where tasks may have adapters of their own.
        ddp_find_unused_parameters=find_unused,
        **evaluation,
        **saving,
    )
    # Several GPUs in one process would be nn.DataParallel, which is slower than one of them.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(path))


def _versions() -> dict[str, str]:
    import accelerate

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


# Signals and progress -------------------------------------------------------------------------


class _StopSignals:
    """Catches SIGTERM and Ctrl-C for the time of a run.

    The first one asks the run to stop after the step; a second one acts as it would
    without us, for those who cannot wait.

    Attributes:
        received: Number of the signal that came.
        honoured: Whether the run has stopped because of it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = math.inf
        self.honoured = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def waited(self, seconds: float) -> bool:
        """Whether a signal came that long ago."""
        return time.monotonic() - self._at >= seconds

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._at = time.monotonic()
        self._restore()
        name = signal.Signals(number).name
        # Not through logging: its locks may be held where the signal came in.
        os.write(2, f"\n{name}: finishing the step and writing a checkpoint.\n".encode())


class _Watch(TrainerCallback):
    """Ties the run's own rules to Trainer's loop."""

    def __init__(self, trainer: _AdapterTrainer) -> None:
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


class _Bar(TrainerCallback):
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
