"""Several tasks in one run: their sources, their column, and rows of which each has its share.

A task is a name that a row carries in a column (:data:`TASK` once it is tokenised). It comes
with the rows, or from the names of several sources (:func:`task_sources`). Where few rows are
taken of many (:func:`first_rows`) or some held out (:func:`split_rows`), every task is served.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorasmith.errors import ConfigError, DataError, first_line, short
from lorasmith.training.data_files import READERS, datasets_package

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "TASK",
    "choose_task_column",
    "first_rows",
    "load_tasks",
    "split_rows",
    "task_of",
    "task_sources",
    "tasks_of",
]

logger = logging.getLogger(__name__)

TASK = "task"
"""Column with the task of each tokenised row, where rows have one."""

#: Tasks that a column named "task" may have to be taken for one without being asked.
_MOST_TASKS = 64
_TASK_NAME = re.compile(r"[\w.-]+")


def task_sources(source: str) -> dict[str, str] | None:
    """The sources in a text that names several tasks; None if it is one source without a name.

    ``NAME=SOURCE,NAME=SOURCE`` has a comma between sources. Without ``NAME=`` a task is called
    by the last part of its source: ``dates-en`` for ``builtin:dates-en``, ``a`` for
    ``data/a.jsonl``. A file or directory that exists under the whole text is that file.

    Raises:
        ConfigError: Two sources have one name, or one of them is empty.
    """
    if ("," not in source and "=" not in source) or Path(source).expanduser().exists():
        return None
    found: dict[str, str] = {}
    named = False
    for part in (part.strip() for part in source.split(",")):
        name, equals, rest = part.partition("=")
        if equals and _TASK_NAME.fullmatch(name.strip()):
            name, one, named = name.strip(), rest.strip(), True
        else:
            one = part
            last = re.split(r"[/\\:]", one.rstrip("/"))[-1]
            ending = Path(last).suffix.lower()
            name = last[: -len(ending)] if ending in READERS else last
        if not one or not name or name in found:
            raise ConfigError(
                "The sources cannot be told apart." if name in found else "A source is empty.",
                expected="NAME=SOURCE,NAME=SOURCE with a name of its own for each",
                got=source,
                key="data",
            )
        found[name] = one
    return found if named or len(found) > 1 else None


def load_tasks(sources: Mapping[str, str], load: Callable[[str], Dataset]) -> Dataset:
    """Rows of several tasks, one after the other, with a column ``task``.

    Args:
        sources: Task → source.
        load: Reads one source.

    Raises:
        DataError: A source cannot be read, or the columns of two of them contradict each other.
    """
    datasets = datasets_package()
    parts = []
    for name, source in sources.items():
        rows = load(source)
        if TASK in rows.column_names:
            rows = rows.remove_columns(TASK)
        parts.append(rows.add_column(TASK, [name] * len(rows)))
    try:
        return cast("Dataset", datasets.concatenate_datasets(parts))
    except ValueError as error:
        raise DataError(
            "The sources have columns of the same name with different types.",
            expected="prompt, completion and their like of one type in all sources",
            got=first_line(error),
            fix="bring them into the same form",
        ) from error


def choose_task_column(wanted: str, rows: Dataset) -> str | None:
    """The column with the task of each row, or None if there are to be no tasks.

    Args:
        wanted: A column; ``"none"``; or ``"auto"`` for the column ``task``, if there is one and
            it has at most 64 values.
        rows: The rows, not tokenised.
    """
    if wanted != "auto":
        return None if wanted == "none" else wanted
    if TASK not in rows.column_names:
        return None
    number = len(rows.unique(TASK))
    if number > _MOST_TASKS:
        logger.warning(
            "The column task has %d values, too many to be taken for tasks unasked. "
            "--task-column task takes them; --task-column none ends this warning.",
            number,
        )
        return None
    return TASK


def tasks_of(rows: Dataset) -> list[str] | None:
    """The task of each tokenised row, or None where rows have none."""
    return list(rows[TASK]) if TASK in rows.column_names else None


def task_of(value: Any, column: str, index: int) -> str:
    """The task that a row's cell names.

    Args:
        value: The cell.
        column: The column it is in, for error messages.
        index: Number of the row, for error messages.

    Raises:
        DataError: It is neither a text with something in it nor a whole number.
    """
    named = isinstance(value, (str, int)) and not isinstance(value, bool)
    if not named or not str(value).strip():
        raise DataError(
            f"Row {index} has no task.",
            expected="a name or a number in every row",
            got=short(value),
            fix="give every row a task, or leave tasks out with --task-column none",
            key=column,
        )
    return str(value).strip()


def first_rows(rows: Dataset, count: int, *, by: str = TASK) -> list[int]:
    """Indices of the first rows; with several tasks, of the first rows of each in turn.

    Args:
        rows: The rows.
        count: How many; all, if there are fewer.
        by: Column with the tasks, if there is one.
    """
    order = list(range(len(rows)))
    if by in rows.column_names:
        seen: Counter[Any] = Counter()
        turns = []
        for task in rows[by]:
            turns.append(seen[task])
            seen[task] += 1
        order.sort(key=turns.__getitem__)
    return sorted(order[:count])


def split_rows(
    dataset: Dataset, *, fraction: float, seed: int = 0, by: str | None = None
) -> tuple[Dataset, Dataset]:
    """Split off rows for evaluation, at random but always the same for a seed.

    Args:
        dataset: At least two rows.
        fraction: Share of the rows that goes to the second part, in (0, 1); at least one row
            and at most all but one.
        seed: Seed of the choice.
        by: Split the rows of each value of this column for themselves, if there is such a
            column. A value with a single row keeps it for training.

    Returns:
        (training rows, evaluation rows), both in their original order.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError("Not a fraction.", expected="0 < fraction < 1", got=fraction)
    total = len(dataset)
    groups: dict[Any, list[int]] = {}
    values = dataset[by] if by is not None and by in dataset.column_names else [None] * total
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    if all(len(members) < 2 for members in groups.values()):
        raise DataError("Too few rows to split.", expected="at least 2 rows", got=total)
    generator = random.Random(seed)
    held_out: set[int] = set()
    for members in groups.values():
        size = len(members)
        count = min(size - 1, max(1, round(size * fraction)))
        held_out |= set(generator.sample(members, count))
    return (
        dataset.select([i for i in range(total) if i not in held_out]),
        dataset.select(sorted(held_out)),
    )
