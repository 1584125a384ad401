"""From a file, a hub id or a built-in data set to token ids and labels.

Reading (:func:`load_rows`) and tokenising (:func:`tokenise`) are separate. A row takes one of
these forms, told apart by the columns of the data set, in this order:

===================================  ==========================================================
columns                              what is supervised (carries a label)
===================================  ==========================================================
``messages`` (or ``conversations``)  every assistant turn with its end-of-turn token
``prompt``, ``completion``           the completion; both may be text or lists of messages
``question``, ``answer``             the answer
``instruction``, [``input``],        the output
``output`` (or ``response``)
``instruction``, ``instances``       the output of each instance (one row an instance)
``text``                             everything
===================================  ==========================================================

A column ``task`` beside these (the name can be chosen) says which task a row belongs to, for runs
that train several tasks and report them apart. Several sources with a comma between them,
``NAME=SOURCE,NAME=SOURCE``, are read one after the other and make that column
(:func:`task_sources`).

A tokenizer with a chat template sees prompt and completion as a user's and an assistant's
turn. Without one the tokens are [bos] + prompt + separator + completion + eos, where the
separator is a newline unless prompt or completion bring white space of their own.

The tokens before a supervised span are always exactly those that generation starts from
(:func:`encode_prompt`), so that what is trained is what will be asked for.

Here is the way through: rows to examples (:mod:`lorasmith.training.examples`), examples to tokens
(:mod:`~lorasmith.training.encoding`), tokens cut to the limit and counted. Rows come from
:mod:`~lorasmith.training.reading`, their tasks from :mod:`~lorasmith.training.tasks`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.errors import ConfigError, DataError
from lorasmith.training.data_files import datasets_package
from lorasmith.training.encoding import IGNORE_INDEX, Encoder, Tokens, encode_prompt
from lorasmith.training.examples import Example, examples_of
from lorasmith.training.reading import load_rows
from lorasmith.training.tasks import (
    TASK,
    choose_task_column,
    first_rows,
    load_tasks,
    split_rows,
    task_of,
    task_sources,
    tasks_of,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE_INDEX",
    "TASK",
    "Example",
    "TokeniseReport",
    "choose_task_column",
    "encode_prompt",
    "examples_of",
    "first_rows",
    "load_rows",
    "load_tasks",
    "split_rows",
    "task_sources",
    "tasks_of",
    "tokenise",
    "tokenise_with_report",
]

_BATCH_ROWS = 1000


@dataclass(frozen=True)
class TokeniseReport:
    """What happened to the rows on their way to tokens.

    Attributes:
        rows: Rows read.
        examples: Examples made of them and kept.
        tokens: Tokens kept.
        supervised_tokens: Tokens kept that carry a label.
        truncated: Kept examples that lost tokens at the end to ``max_length``.
        lost_supervised_tokens: Supervised tokens cut off, dropped examples included.
        dropped: Examples dropped because no supervised token was left (or ever there).
        split: Plain texts longer than ``max_length``, cut into several examples without loss.
        longest: Tokens of the longest example before truncation.
        max_length: The limit, in tokens.
        unanswered: Examples whose answers are empty, so that they teach to end at once.
    """

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    truncated: int
    lost_supervised_tokens: int
    dropped: int
    split: int
    longest: int
    max_length: int
    unanswered: int = 0

    def warning(self) -> str | None:
        """One sentence on what was lost, or None if nothing was."""
        lost = []
        if self.dropped:
            lost.append(f"{self.dropped} dropped because no supervised token was left")
        if self.truncated:
            lost.append(f"{self.truncated} truncated at the end")
        if not lost:
            return None
        return (
            f"Of {self.examples + self.dropped} examples "
            + " and ".join(lost)
            + f" at max_length={self.max_length} ({self.lost_supervised_tokens} supervised tokens "
            f"lost; the longest example has {self.longest} tokens)."
        )


def tokenise(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    system: str | None = None,
    separator: str = "\n",
    task_column: str | None = None,
) -> Dataset:
    """The data set of :func:`tokenise_with_report`, with a warning if anything was lost."""
    tokens, report = tokenise_with_report(
        dataset,
        tokenizer,
        max_length=max_length,
        system=system,
        separator=separator,
        task_column=task_column,
    )
    message = report.warning()
    if message is not None:
        warnings.warn(message, stacklevel=2)
    return tokens


def tokenise_with_report(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    system: str | None = None,
    separator: str = "\n",
    task_column: str | None = None,
) -> tuple[Dataset, TokeniseReport]:
    """Turn rows into token ids and labels.

    Args:
        dataset: Rows in any form of this module's table.
        tokenizer: A Transformers tokenizer. Its chat template is used if it has one.
        max_length: Longest example, in tokens, at least 2. Longer ones lose their end; plain
            texts are cut into several examples instead (consecutive ones share one token, so
            that every token is still predicted exactly once).
        system: System message before prompts, and before conversations that have none. Needs a
            chat template.
        separator: Between prompt and completion where there is no chat template and neither
            side has white space there.
        task_column: Column with the task of each row, which the result keeps as ``task``.

    Returns:
        A ``datasets.Dataset`` in memory (8 bytes a token) with ``input_ids`` and ``labels``
        (int32 lists; -100 where nothing is supervised, always so at the first token, which
        nothing predicts), ``length`` (int32) and, with a task column, ``task`` (string); and
        the report.

    Raises:
        DataError: A row fits no form, or has no task where all must have one; the chat template
            cannot be applied or rewrites earlier turns, so that no prefix is stable; the
            tokenizer has no end-of-sequence token; or no example is left.
    """
    if max_length < 2:
        raise ConfigError("max_length is too small.", expected="at least 2", got=max_length)
    encoder = Encoder(tokenizer, system, separator)
    datasets = datasets_package()
    columns_made: dict[str, Any] = {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int32"),
    }
    if task_column is not None:
        if task_column not in dataset.column_names:
            near = difflib.get_close_matches(task_column, dataset.column_names, n=1)
            raise DataError(
                f"The rows have no column {task_column!r}, which is to name their tasks.",
                expected=f"one of {', '.join(dataset.column_names)}",
                got=task_column,
                fix=f"did you mean {near[0]!r}?" if near else None,
                key="task_column",
            )
        columns_made[TASK] = datasets.Value("string")
    features = datasets.Features(columns_made)
    counts = TokeniseReport(len(dataset), 0, 0, 0, 0, 0, 0, 0, 0, max_length)
    parts, unanswered = [], 0
    for start in range(0, len(dataset), _BATCH_ROWS):
        batch = dataset[start : start + _BATCH_ROWS]
        columns = list(batch)
        found: list[tuple[int, Example]] = []
        tasks: list[str] = []
        for offset in range(len(batch[columns[0]]) if columns else 0):
            row = {name: batch[name][offset] for name in columns}
            index = start + offset
            examples = examples_of(row, index=index)
            found += [(index, example) for example in examples]
            unanswered += sum(example.answers_nothing for example in examples)
            if task_column is not None:
                tasks += [task_of(row[task_column], task_column, index)] * len(examples)
        kept, counts = _fit(encoder.encode(found), counts)
        if kept:
            ids, labels, places = zip(*kept, strict=True)
            made = {"input_ids": ids, "labels": labels, "length": [len(i) for i in ids]}
            if task_column is not None:
                made[TASK] = [tasks[place] for place in places]
            parts.append(datasets.Dataset.from_dict(made, features=features))
    if not parts:
        raise DataError(
            "No example with a supervised token is left.",
            expected="a completion that begins before max_length",
            key="data",
            got=f"{counts.rows} rows, the longest example has {counts.longest} tokens",
            fix=f"raise max_length above {max_length}"
            if counts.longest > max_length
            else "give the rows something to learn: a text, or a completion or an assistant turn "
            "with something in it",
        )
    return datasets.concatenate_datasets(parts), replace(counts, unanswered=unanswered)


def _fit(
    encoded: Iterable[Tokens], counts: TokeniseReport
) -> tuple[list[tuple[list[int], list[int], int]], TokeniseReport]:
    """Cut examples to the limit, drop those without supervision, and count.

    Gives ids, labels and the number of the example that they are from.
    """
    limit = counts.max_length
    kept: list[tuple[list[int], list[int], int]] = []
    for place, (ids, labels, divisible) in enumerate(encoded):
        longest = max(counts.longest, len(ids))
        if divisible and len(ids) > limit:
            # Consecutive pieces share a token: the last one of a piece predicts nothing there,
            # and is the context of the next piece's first prediction.
            starts = range(0, len(ids) - 1, limit - 1)
            pieces = [(ids[s : s + limit], labels[s : s + limit]) for s in starts]
            for _, part in pieces:
                part[0] = IGNORE_INDEX
            counts = replace(counts, split=counts.split + 1)
        else:
            pieces = [(ids[:limit], labels[:limit])]
        lost = 0 if len(pieces) > 1 else sum(v != IGNORE_INDEX for v in labels[limit:])
        for part_ids, part_labels in pieces:
            supervised = sum(v != IGNORE_INDEX for v in part_labels)
            if supervised:
                kept.append((part_ids, part_labels, place))
            cut = len(pieces) == 1 and len(ids) > limit
            counts = replace(
                counts,
                examples=counts.examples + bool(supervised),
                tokens=counts.tokens + (len(part_ids) if supervised else 0),
                supervised_tokens=counts.supervised_tokens + supervised,
                truncated=counts.truncated + bool(supervised and cut),
                dropped=counts.dropped + (not supervised),
            )
        counts = replace(
            counts,
            longest=longest,
            lost_supervised_tokens=counts.lost_supervised_tokens + lost,
        )
    return kept, counts
