"""Runs that are killed at random and gone on with, compared bit by bit with one that was not.

Used by the suite, which kills with an exception in the middle of a step, and by
``benchmarks/reliability_training.py``, which kills processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasmith.training import checkpoints, run, trainer
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.loss import LossOutput, model_loss_output
from lorasmith.training.records import TrainResult

__all__ = ["ACCUMULATION", "STEPS", "Killed", "Watched", "config", "differences"]

STEPS = 8
ACCUMULATION = 2


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def config(base: Path, rows: Path, output: Path, **changes: Any) -> TrainConfig:
    """Three epochs with dropout, accumulation, rules that have a state, and a schedule."""
    settings: dict[str, Any] = {
        "output": output,
        "adapter": AdapterOptions(r=4, dropout=0.2),
        "batch_size": 4,
        "gradient_accumulation": ACCUMULATION,
        "steps": STEPS,
        "lr": 1e-2,
        "schedule": "cosine",
        "warmup": 2.0,
        "save_steps": 2,
        "log_steps": 1,
        "dynamics": ("gauge", "entropy", "budget"),
        "device": "cpu",
        "resume": "auto",
    }
    return TrainConfig(str(base), str(rows), **{**settings, **changes})


class Watched:
    """Notes the batches of a run, as digests of their token ids, and kills it if asked to.

    Args:
        kill: Number of the batch, from 0, in which the run is killed; after its loss is computed.
    """

    def __init__(self, kill: int | None = None) -> None:
        self.kill = kill
        self.batches: list[str] = []

    def __call__(self, model: Any, inputs: Mapping[str, Any], **options: Any) -> LossOutput:
        ids = inputs["input_ids"]
        self.batches.append(hashlib.sha256(ids.numpy().tobytes()).hexdigest())
        output = model_loss_output(model, inputs, **options)
        if self.kill is not None and len(self.batches) > self.kill:
            raise Killed
        return replace(output)

    def train(self, made: TrainConfig) -> TrainResult:
        """Trains with the watch on."""
        before = trainer.model_loss_output
        trainer.model_loss_output = self  # type: ignore[assignment]
        try:
            return run.train(made, progress=False)
        finally:
            trainer.model_loss_output = before


_TIMES = {"seconds", "eval_seconds", "output", "resume", "runtime", "total_flos"}


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs differ: the adapter, and all that their last checkpoints hold.

    Compared are adapter, exact tensors, optimiser with the state of the dynamics, scheduler,
    random numbers (Python, NumPy, PyTorch), Trainer's state and ours; of times nothing.
    """
    found: list[str] = []
    paths = [checkpoints.list_checkpoints(folder)[0] for folder in (one, other)]
    if paths[0].name != paths[1].name:
        return [f"{paths[0].name} and {paths[1].name}"]
    names = [sorted(p.name for p in path.iterdir()) for path in paths]
    if names[0] != names[1]:
        return [f"files {names[0]} and {names[1]}"]
    for name in [n for n in names[0] if n not in (checkpoints.MANIFEST, "adapter_config.json")]:
        first, second = (_read(path / name) for path in paths)
        _compare(name, first, second, found)
    first, second = (_read(folder / "adapter_model.safetensors") for folder in (one, other))
    _compare("adapter", first, second, found)
    return found


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    raise AssertionError(f"{path.name} is of no known kind")


def _compare(place: str, first: Any, second: Any, found: list[str]) -> None:
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            found.append(f"{place}: other keys")
            return
        for key in first:
            if key not in _TIMES and not str(key).endswith("runtime"):
                _compare(f"{place}.{key}", first[key], second[key], found)
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            found.append(f"{place}: other lengths")
            return
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            _compare(f"{place}[{i}]", a, b, found)
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            found.append(place)
    elif isinstance(first, np.ndarray):
        if not np.array_equal(first, second):
            found.append(place)
    elif first != second:
        found.append(f"{place}: {str(first)[:60]} and {str(second)[:60]}")
