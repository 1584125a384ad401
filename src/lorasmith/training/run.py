"""The one call: from a :class:`~lorasmith.training.config.TrainConfig` to an adapter on disk.

Here is what a run looks at before it trains, cheapest first: its options, its directory
(``training.outputs``), the checkpoint that it goes on from (``training.resuming``), its rows
(``training.rows``), then the model and what is attached to it (``training.attaching``). What is
wrong with any of these shows before the next is touched. The loop itself is in
:mod:`lorasmith.training.trainer`, which is imported when everything stands: Transformers' Trainer
takes seconds to import.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lorasmith.core.optim import check_lora_plus
from lorasmith.core.registry import variant_of
from lorasmith.errors import ConfigError
from lorasmith.io.models import resolve_model
from lorasmith.io.tokenizers import TokenizerRecord
from lorasmith.training import checkpoints
from lorasmith.training.anchor import load_anchors
from lorasmith.training.attaching import (
    GradientCheckpointing,
    attach_in_subspace,
    choose_adapter_config,
    detach_new,
    original_weights,
    restored,
)
from lorasmith.training.calibration import calibration_batches
from lorasmith.training.config import TrainConfig
from lorasmith.training.evaluate import contiguous_head_input
from lorasmith.training.models import load_model, quiet, resolve_device
from lorasmith.training.outputs import (
    check_room,
    is_main,
    make_output,
    nothing_empty_left,
    only_run,
    prepare_output,
)
from lorasmith.training.progress import bar
from lorasmith.training.resuming import Before
from lorasmith.training.rows import check_tokens, collator_of, raw_rows, tokenised_rows

if TYPE_CHECKING:
    from lorasmith.core.config import AdapterConfig
    from lorasmith.dynamics.protocol import Dynamic
    from lorasmith.training.records import TrainingInterrupted, TrainResult

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    leave: Callable[[TrainingInterrupted], None] | None = None,
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
        leave: Called from a thread with what would be raised, if a batch goes on for 3 s after it
            was given up and its checkpoint was written; the process ends when it returns. By
            default it goes on, and TrainingInterrupted is raised when the batch is done.

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
    adapter_config = choose_adapter_config(config)
    rules = config.make_dynamics()
    if config.lora_plus_ratio is not None:
        check_lora_plus(variant_of(adapter_config))
    device = _choose_device(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_empty_left(config.output))
        make_output(config.output)
        stack.enter_context(only_run(config.output))
        found = checkpoints.choose_checkpoint(config.resume, config.output, processes=processes)
        prepare_output(config, found)
        return _train(
            config, adapter_config, rules, device, found, model, tokenizer, progress, leave
        )


def _choose_device(config: TrainConfig) -> torch.device:
    """The device of this process; a ConfigError where it is not the one that Trainer takes."""
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


def _train(
    config: TrainConfig,
    adapter_config: AdapterConfig,
    rules: tuple[Dynamic, ...],
    device: torch.device,
    checkpoint: Path | None,
    model: Any,
    tokenizer: Any,
    progress: bool,
    leave: Callable[[TrainingInterrupted], None] | None,
) -> TrainResult:
    import lorasmith as ls

    before = Before(config, checkpoint)
    loaded = model is None
    # Before the model, which may take minutes: a name that stands for nothing, and what is wrong
    # with the rows, show at once.
    if loaded:
        resolve_model(config.model, revision=config.revision)
    raw = raw_rows(config)
    if model is None:
        model, tokenizer = load_model(
            config.model,
            dtype=config.dtype,
            device=str(device),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            quantize=config.quantize,
        )
    from lorasmith.training.huggingface import set_seed
    from lorasmith.training.trainer import AdapterTrainer

    with quiet(), contextlib.ExitStack() as failed, contextlib.ExitStack() as stack:
        rows, eval_rows = tokenised_rows(config, tokenizer, *raw)
        check_tokens(model, tokenizer, rows, eval_rows)
        before.check_rows(rows)
        before.check_base(model, tokenizer)
        if variant_of(adapter_config).weight_use(adapter_config) == "start":
            logger.info(
                "The adapter starts from the base's weights: they are read layer by layer, "
                "which may take a while."
            )
        set_seed(config.seed)
        there = frozenset(ls.attached(model))
        batches = calibration_batches(config, adapter_config, tokenizer, rows)
        task = None if config.subspace is None else attach_in_subspace(config, model)
        if task is not None:
            adapter = task.adapter
        else:
            with bar(Console(stderr=True), shown=progress) as advance:
                adapter = ls.attach(
                    model,
                    adapter_config,
                    calibration=batches,
                    dequantize=config.dequantize,
                    originals=original_weights(config, adapter_config) if loaded else None,
                    progress=advance,
                )
        if not loaded:
            # On failure a model that belongs to the caller must be as it was.
            failed.callback(detach_new, model, there)
        if is_main():
            check_room(config, adapter)
        collate, packing = collator_of(config, model, tokenizer)
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
        stack.enter_context(restored(model))
        trainer = AdapterTrainer(
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
            leave,
        )
        stack.callback(trainer.close_dynamics)
        stack.enter_context(contiguous_head_input(model))
        stack.enter_context(GradientCheckpointing(model, config.gradient_checkpointing))
        result = trainer.run(checkpoint)
        failed.pop_all()
    return result
