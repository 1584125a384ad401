"""A run's configuration in Trainer's terms: its arguments, and the device it trains on."""

from __future__ import annotations

import math
import os
from typing import Any

from lorasmith.training.config import TrainConfig
from lorasmith.training.huggingface import TrainingArguments
from lorasmith.training.models import resolve_device
from lorasmith.training.order import steps_per_epoch

__all__ = ["training_arguments"]

#: Number of points that the loss curve of a run has, unless log_steps says otherwise.
_LOG_POINTS = 200


def training_arguments(
    config: TrainConfig, rows: int, *, evaluates: bool, find_unused: bool = False
) -> TrainingArguments:
    """Trainer's arguments.

    Args:
        config: The run.
        rows: Rows of an epoch.
        evaluates: Whether there is something to evaluate on.
        find_unused: Whether a step may leave parameters without a gradient.
    """
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
