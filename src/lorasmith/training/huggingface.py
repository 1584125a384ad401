"""Trainer and what belongs to it, or an error that says how to install them.

All of training that is built on Transformers' Trainer takes it from here.
"""

from __future__ import annotations

from lorasmith.errors import MissingDependencyError

try:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
except ImportError as error:
    raise MissingDependencyError(
        "Training needs Transformers and Accelerate, which are not installed.",
        fix='pip install "lorasmith[train]"',
    ) from error

__all__ = ["PrinterCallback", "Trainer", "TrainerCallback", "TrainingArguments", "set_seed"]
