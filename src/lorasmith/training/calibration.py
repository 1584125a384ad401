"""Batches for variants and initialisations that look at data before they start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lorasmith.core.registry import variant_of
from lorasmith.errors import ConfigError
from lorasmith.training.collate import PaddingCollator
from lorasmith.training.config import TrainConfig
from lorasmith.training.data import first_rows, load_rows, tokenise
from lorasmith.training.rows import read_from

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from lorasmith.core.config import AdapterConfig

__all__ = ["ROWS", "calibration_batches"]

logger = logging.getLogger(__name__)

#: Rows to calibrate on unless the run says otherwise.
ROWS = 128


def calibration_batches(
    config: TrainConfig, adapter: AdapterConfig, tokenizer: Any, rows: Dataset
) -> list[dict[str, Tensor]] | None:
    """What to hand to ``attach(calibration=…)``; ``None`` where the adapter needs no data.

    Args:
        config: The run; its ``calibration`` names the data, else the first of ``rows`` serve.
        adapter: The adapter's configuration.
        tokenizer: The base model's tokenizer.
        rows: The tokenised rows that are trained on.

    Raises:
        ConfigError: The run names calibration data that the adapter does not take.
        DataError: They cannot be read.
    """
    if not variant_of(adapter).statistics(adapter):
        for key in ("calibration", "calibration_rows"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"{type(adapter).__name__} takes no calibration data as it is configured.",
                    got=f"{key} = {getattr(config, key)!r}",
                    fix="leave it out",
                    key=key,
                )
        return None
    count = config.calibration_rows or ROWS
    if config.calibration is None:
        chosen = rows.select(first_rows(rows, count))
        logger.info(
            "The adapter starts from data: it is calibrated on the first %d training rows. "
            "--calibration names others.",
            len(chosen),
        )
    else:
        read = load_rows(
            config.calibration, split=config.calibration_split, limit=count, seed=config.seed
        )
        with read_from(config.calibration):
            chosen = tokenise(read, tokenizer, max_length=config.max_length)
        rows_said = "1 row" if len(chosen) == 1 else f"{len(chosen):,} rows"
        logger.info("The adapter is calibrated on %s.", rows_said)
    collate = PaddingCollator(int(tokenizer.pad_token_id or 0))
    # Rows of like length together: less padding, and the statistics do not depend on order.
    order = sorted(range(len(chosen)), key=lambda i: -int(chosen[i]["length"]))
    size = config.batch_size
    return [
        collate([chosen[i] for i in order[start : start + size]])
        for start in range(0, len(order), size)
    ]
