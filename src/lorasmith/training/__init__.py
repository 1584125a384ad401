"""Fine-tuning: data, loss, the training run and its evaluation.

Names are looked up when they are first used, so that importing this package, as the
command line does for its help texts, imports neither torch nor Transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.training.config import AdapterOptions, TrainConfig
    from lorasmith.training.evaluate import (
        EvalReport,
        evaluate,
        general_text,
        generate,
        perplexity,
    )
    from lorasmith.training.models import load_model, resolve_model
    from lorasmith.training.records import TrainResult
    from lorasmith.training.run import train

_HOME = {
    "AdapterOptions": "config",
    "TrainConfig": "config",
    "EvalReport": "evaluate",
    "evaluate": "evaluate",
    "general_text": "evaluate",
    "generate": "evaluate",
    "perplexity": "evaluate",
    "load_model": "models",
    "resolve_model": "models",
    "TrainResult": "records",
    "train": "run",
}

__all__ = [
    "AdapterOptions",
    "EvalReport",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "general_text",
    "generate",
    "load_model",
    "perplexity",
    "resolve_model",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
