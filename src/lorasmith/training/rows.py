"""The rows of a run: read, looked at, tokenised, and how they become batches.

``training.data`` and ``training.collate`` know rows and batches; here a configuration says which
ones. :func:`raw_rows` comes before the model, which may take minutes: what is wrong with the data
shows at once.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from lorasmith.errors import DataError, in_file
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
    tokenise_with_report,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["check_tokens", "collator_of", "raw_rows", "read_from", "tokenised_rows"]

logger = logging.getLogger(__name__)


def raw_rows(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and to evaluate on, as they are; the first ones have been looked at."""
    rows = load_rows(config.data, split=config.split, limit=config.limit, seed=config.seed)
    eval_rows = None
    if config.eval_data is not None:
        eval_rows = load_rows(
            config.eval_data, split=config.eval_data_split, limit=config.eval_limit
        )
    for source, read in ((config.data, rows), (config.eval_data, eval_rows)):
        if read is not None:
            with read_from(source):
                examples_of(read[0])
    return rows, eval_rows


@contextlib.contextmanager
def read_from(source: str | None) -> Iterator[None]:
    """Adds to what is wrong with rows where they come from."""
    try:
        yield
    except DataError as error:
        if error.file is not None:
            raise
        raise in_file(error, source, DataError, "data") from error


def tokenised_rows(
    config: TrainConfig, tokenizer: Any, rows: Dataset, eval_rows: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Tokenised rows to train on and to evaluate on."""
    source = config.data if config.eval_data is None else config.eval_data
    column = choose_task_column(config.task_column, rows)
    if config.eval_data is None and config.eval_split > 0:
        rows, eval_rows = split_rows(rows, fraction=config.eval_split, seed=config.seed, by=column)
        if config.eval_limit is not None and config.eval_limit < len(eval_rows):
            eval_rows = eval_rows.select(
                first_rows(eval_rows, config.eval_limit, by=column or TASK)
            )
    with read_from(config.data):
        tokens, report = tokenise_with_report(
            rows, tokenizer, max_length=config.max_length, task_column=column
        )
        if report.unanswered == report.examples + report.dropped:
            raise DataError(
                "Every answer is empty, so there is nothing to learn.",
                expected="a completion or an assistant turn with something in it",
                got=f"{report.rows} rows",
                fix="check the columns that the answers are in, and fill them",
                key="data",
            )
        if report.unanswered:
            logger.warning(
                "%d of %d examples have an empty answer: they teach the model to say nothing.",
                report.unanswered,
                report.examples + report.dropped,
            )
    if (message := report.warning()) is not None:
        warnings.warn(message, stacklevel=2)
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
    with read_from(source):
        eval_tokens = tokenise(
            eval_rows, tokenizer, max_length=config.max_length, task_column=column
        )
    return tokens, eval_tokens


def check_tokens(model: Any, tokenizer: Any, rows: Dataset, eval_rows: Dataset | None) -> None:
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


def collator_of(config: TrainConfig, model: nn.Module, tokenizer: Any) -> tuple[Collator, str]:
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
