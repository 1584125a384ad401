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
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import itertools
import json
import logging
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lorasmith.errors import ConfigError, DataError, LorasmithError, MissingDependencyError
from lorasmith.training.builtin import load_builtin

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as in PyTorch and Transformers."""

TASK = "task"
"""Column with the task of each tokenised row, where rows have one."""

BUILTIN_PREFIX = "builtin:"

_READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_BATCH_ROWS = 1000
#: Seconds that a hub gets to take a connection before only the cache is asked.
_HUB_TIMEOUT = 2.0

Message = dict[str, Any]


# --- reading -----------------------------------------------------------------------------


def load_rows(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Read rows from a file, a directory, the hub or a built-in data set.

    Args:
        source: Several sources with a comma between them (see :func:`task_sources`), or one:
            ``builtin:NAME`` (see :mod:`lorasmith.training.builtin`); a file ending in
            .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt (one row a line); a directory
            (saved by ``datasets``, or with data files); or a hub id ``owner/name``, with
            ``:config`` behind it where the data set has several.
        split: The split to read. A single file has only one, which is read whatever the split.
        limit: Keep a random sample of that many rows, in their original order. For a built-in
            data set: the number of rows made. Of several sources: so many of each.
        seed: Seed of that sample, or of the built-in data set.
        cache_dir: Where ``datasets`` keeps its Arrow files. Default: its own cache.

    Returns:
        A ``datasets.Dataset``. CSV and TSV cells stay text as written (``007``, ``NA``). TSV
        is read without quoting, as the format is defined, and a byte-order mark is skipped.

    Raises:
        DataError: The source cannot be found or read, or has no rows.
        UnknownNameError: No such built-in data set.
        MissingDependencyError: The package ``datasets`` is missing.
    """
    if limit is not None and limit < 1:
        raise ConfigError("The limit is too small.", expected="at least 1 row", got=limit)
    several = task_sources(source)
    if several is not None:
        return load_tasks(
            several,
            lambda one: load_rows(one, split=split, limit=limit, seed=seed, cache_dir=cache_dir),
        )
    if source.startswith(BUILTIN_PREFIX):
        return load_builtin(source[len(BUILTIN_PREFIX) :], split, limit, seed)
    cache = None if cache_dir is None else str(cache_dir)
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path, cache)
    elif path.is_dir():
        rows = _read_directory(path, split, cache)
    elif path.suffix.lower() in _READERS or not _HUB_ID.fullmatch(source):
        raise _no_such_file(path)
    else:
        rows = _read_hub(source, split, cache)
    if len(rows) == 0:
        raise _no_rows(source)
    if limit is not None and limit < len(rows):
        rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))
    return rows


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
            name = last[: -len(ending)] if ending in _READERS else last
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
    datasets = _datasets()
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
            got=_first_line(error),
            fix="bring them into the same form",
        ) from error


#: Tasks that a column named "task" may have to be taken for one without being asked.
_MOST_TASKS = 64


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


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "Reading training data needs the package datasets.",
            got="it is not installed",
            fix="pip install 'lorasmith[train]'",
        ) from error
    return datasets


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    """Keeps off the terminal the progress of reading a local file."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _read_file(path: Path, cache: str | None) -> Dataset:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            "Unknown kind of data file.",
            expected="a name ending in " + ", ".join(_READERS),
            got=path.suffix or "no ending",
            file=path,
        )
    if path.stat().st_size == 0:
        raise DataError(
            "The data file is empty.",
            expected="at least one row",
            got="0 bytes",
            file=path,
            key="data",
        )
    if reader != "parquet":
        _check_text(path)
    options: dict[str, Any] = {}
    if reader == "csv":
        options = _csv_options(path)
    elif reader == "json":
        _check_json(path)
    datasets = _datasets()
    try:
        with _no_bars(datasets):
            rows: Dataset = datasets.load_dataset(
                reader, data_files=str(path), split="train", cache_dir=cache, **options
            )
    except Exception as error:  # datasets raises many types, most of them its own
        if "corresponds to no data" in str(error):
            raise _no_rows(path) from error
        raise DataError(
            f"The file cannot be read as {path.suffix[1:]}.",
            got=_first_line(error.__cause__ or error),
            file=path,
            fix="check that every row has the same columns with the same types",
        ) from error
    if reader == "text":
        rows = rows.select([i for i, line in enumerate(rows["text"]) if line.strip()])
    if reader == "json" and "timestamp" in str(rows.features.arrow_schema.types):
        rows = datasets.Dataset.from_list(_json_rows(path))
    return rows


_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}


def _check_text(path: Path) -> None:
    """Names the first line that is not UTF-8; readers name a byte at most, or replace it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            wrong = _not_utf8(line)
            if wrong is None:
                continue
            kind = next((k for mark, k in _MARKS.items() if line.startswith(mark)), None)
            kind = kind if number == 1 else None
            raise DataError(
                f"Line {number} is not UTF-8.",
                expected="text in UTF-8",
                got=f"byte 0x{line[wrong]:02x} at place {wrong + 1} of the line"
                + (f"; it looks like {kind}" if kind else ""),
                fix="unpack it first"
                if kind in ("gzip", "zip")
                else f"save it as UTF-8, e.g. iconv -f {kind or 'LATIN1'} -t UTF-8",
                file=path,
                key=f"line {number}",
            )


def _not_utf8(line: bytes) -> int | None:
    """Where bytes stop being UTF-8, or None if they are."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file with every string left a string.

    Arrow's reader makes a timestamp of a column in which every string looks like one, and
    then nobody can tell whether the answer was to be ``2026-03-03`` or
    ``2026-03-03 00:00:00``.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            "The file is not a list of rows.",
            expected='[{"column": value, …}, …] or one object a line',
            got=_short(rows),
            file=path,
        )
    return rows


def _csv_options(path: Path) -> dict[str, Any]:
    """Options that keep every cell as written, and no row lost to a stray quotation mark."""
    datasets = _datasets()
    tabs = path.suffix.lower() == ".tsv"
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    delimiter = "\t" if tabs else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=delimiter, quoting=quoting))
    except (UnicodeDecodeError, StopIteration, csv.Error) as error:
        raise DataError(
            "The header line cannot be read.", expected="UTF-8 text", got=error, file=path
        ) from error
    if len(set(header)) != len(header) or "" in header:
        raise DataError(
            "The header line is not usable.",
            expected="one distinct, non-empty name a column",
            got=header,
            file=path,
        )
    return {
        "delimiter": delimiter,
        "quoting": quoting,
        "encoding": "utf-8-sig",
        "na_filter": False,
        "features": datasets.Features({name: datasets.Value("string") for name in header}),
    }


def _check_json(path: Path) -> None:
    """Name the first bad line of a JSON-lines file; ``datasets`` names at most a byte offset."""
    if path.suffix.lower() == ".json":
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"Line {number} is not JSON.",
                    expected="one object a line",
                    got=error,
                    file=path,
                    key=f"line {number}",
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"Line {number} is not an object.",
                    expected='{"column": value, …}',
                    got=_short(row),
                    file=path,
                    key=f"line {number}",
                )


def _read_directory(path: Path, split: str, cache: str | None) -> Dataset:
    datasets = _datasets()
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            rows = datasets.load_from_disk(str(path))
            if not isinstance(rows, dict):
                return cast("Dataset", rows)
        else:
            rows = datasets.load_dataset(str(path), cache_dir=cache)
    except Exception as error:
        raise DataError(
            "The directory cannot be read as a data set.",
            expected="one saved by datasets, or data files such as train.jsonl",
            got=_first_line(error),
            file=path,
        ) from error
    return _choose_split(rows, split, str(path))


def _read_hub(source: str, split: str, cache: str | None) -> Dataset:
    from lorasmith.io.models import hub_reachable

    datasets = _datasets()
    name, _, config = source.partition(":")
    reachable = hub_reachable(_HUB_TIMEOUT)
    try:
        with contextlib.nullcontext() if reachable else _kept_offline(datasets):
            rows = datasets.load_dataset(name, config or None, cache_dir=cache)
    except Exception as error:
        got = _first_line(error)
        if not reachable:
            got = (
                f"it is not cached in {cache or datasets.config.HF_DATASETS_CACHE}, and the hub is "
                "not reached (or HF_HUB_OFFLINE is set)"
            )
        raise DataError(
            f"The data set {source!r} is neither a file here nor readable from the hub.",
            expected="a path, builtin:NAME, or a hub id OWNER/NAME[:CONFIG]",
            got=got,
            fix="check the spelling, the configuration and the network; "
            "builtin:dates-en, builtin:numbers-es and their like are made offline",
            key="data",
        ) from error
    return _choose_split(rows, split, source)


@contextlib.contextmanager
def _kept_offline(datasets: Any) -> Iterator[None]:
    """Keeps ``datasets`` to its cache: asking a hub that does not answer takes it minutes."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _choose_split(rows: Any, split: str, source: str) -> Dataset:
    if split not in rows:
        raise DataError(
            f"The data set has no split {split!r}.",
            expected=", ".join(rows),
            got=split,
            file=source,
        )
    return cast("Dataset", rows[split])


def _no_such_file(path: Path) -> DataError:
    beside = path.parent
    try:
        names = [p.name for p in beside.iterdir()] if beside.is_dir() else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=3)
    return DataError(
        "There is no such data file.",
        expected="a file, builtin:NAME, or a hub id"
        + (f"; near: {', '.join(near)}" if near else ""),
        got=str(path),
        file=path,
        fix=None if beside.is_dir() else f"the directory {beside} does not exist",
    )


def _no_rows(source: str | Path) -> DataError:
    return DataError(
        "The data set has no rows.",
        expected="at least one row",
        got="none",
        file=source,
        key="data",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- row forms ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One training example in a form that no longer depends on the columns it came from.

    Exactly one of ``messages`` (a conversation), ``prompt`` with ``completion`` (both texts),
    or ``text`` is set.

    Attributes:
        messages: Turns with at least ``role`` and ``content``.
        first_supervised: Assistant turns from this index on are supervised.
        prompt: Text that is given.
        completion: Text that is learned.
        text: Text that is learned from its first token on.
    """

    messages: tuple[Message, ...] = ()
    first_supervised: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    def as_prompt(self) -> tuple[str | tuple[Message, ...], str]:
        """What a model is given, and the reference for what it should answer.

        For a conversation: all turns before the last assistant turn, and that turn's content.

        Raises:
            DataError: The example is plain text, or its conversation has no answer.
        """
        if self.prompt is not None and self.completion is not None:
            return self.prompt, self.completion
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        if not turns or turns[-1] < self.first_supervised:
            raise DataError(
                "The row has no prompt with an answer to compare with.",
                expected="prompt and completion, or messages with an assistant turn",
                got="plain text" if self.text is not None else "no assistant turn",
            )
        return self.messages[: turns[-1]], str(self.messages[turns[-1]]["content"])


_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"))
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


def examples_of(row: Mapping[str, Any], *, index: int = 0) -> tuple[Example, ...]:
    """The examples in one row; more than one only for ``instances``.

    Args:
        row: Column → value.
        index: Number of the row, for error messages.

    Raises:
        DataError: The columns fit no form, or a value has the wrong type.
    """
    # A column that is null in this row counts as absent: Arrow fills mixed rows with nulls.
    have = {name for name, value in row.items() if value is not None}
    for column in ("messages", "conversations"):
        if column in have:
            return (Example(messages=_messages(row[column], column, index)),)
    for first, second in _PAIRS:
        if first in have and second in have:
            return (_pair(row[first], row[second], (first, second), index),)
    output = next((c for c in ("output", "response") if c in have), None)
    if "instruction" in have and output is not None:
        context = next((c for c in ("input", "context") if c in have), None)
        prompt = _instruction(row["instruction"], row[context] if context else "", index)
        return (Example(prompt=prompt, completion=_text(row[output], output, index)),)
    if "instruction" in have and "instances" in have:
        return tuple(
            Example(
                prompt=_instruction(row["instruction"], instance.get("input") or "", index),
                completion=_text(instance.get("output"), "instances.output", index),
            )
            for instance in row["instances"]
        )
    if "text" in have:
        return (Example(text=_text(row["text"], "text", index)),)
    empty = sorted(set(row) - have)
    raise DataError(
        f"Row {index} has none of the known forms.",
        expected="messages; prompt and completion; question and answer; "
        "instruction, [input] and output; or text",
        got=f"the columns {sorted(have)}" + (f", empty: {empty}" if empty else ""),
        fix="rename the columns, e.g. dataset.rename_columns({'source': 'prompt', …})",
    )


def _text(value: Any, column: str, index: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"Row {index}: {column} is not text.", expected="a string", got=_short(value), key=column
    )


def _task(value: Any, column: str, index: int) -> str:
    named = isinstance(value, (str, int)) and not isinstance(value, bool)
    if not named or not str(value).strip():
        raise DataError(
            f"Row {index} has no task.",
            expected="a name or a number in every row",
            got=_short(value),
            fix="give every row a task, or leave tasks out with --task-column none",
            key=column,
        )
    return str(value).strip()


def _instruction(instruction: Any, context: Any, index: int) -> str:
    head = _text(instruction, "instruction", index)
    body = _text(context, "input", index)
    return f"{head}\n\n{body}" if body.strip() else head


def _pair(prompt: Any, completion: Any, columns: tuple[str, str], index: int) -> Example:
    if isinstance(prompt, (list, tuple)) or isinstance(completion, (list, tuple)):
        before = (
            _messages(prompt, columns[0], index)
            if isinstance(prompt, (list, tuple))
            else ({"role": "user", "content": _text(prompt, columns[0], index)},)
        )
        after = (
            _messages(completion, columns[1], index)
            if isinstance(completion, (list, tuple))
            else ({"role": "assistant", "content": _text(completion, columns[1], index)},)
        )
        return Example(messages=before + after, first_supervised=len(before))
    return Example(
        prompt=_text(prompt, columns[0], index), completion=_text(completion, columns[1], index)
    )


def _messages(value: Any, column: str, index: int) -> tuple[Message, ...]:
    def bad(what: str, got: object) -> DataError:
        return DataError(
            f"Row {index}: {column} {what}.",
            expected="a non-empty list of {'role': …, 'content': …}",
            got=_short(got),
            key=column,
        )

    if not isinstance(value, (list, tuple)) or not value:
        raise bad("is not a list of messages", value)
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise bad("has a turn that is not an object", turn)
        # Arrow gives every turn every key that any turn has.
        message = {key: item for key, item in turn.items() if item is not None}
        if "role" not in message and isinstance(message.get("from"), str):
            role = message.pop("from")
            message["role"] = _SHAREGPT_ROLES.get(role, role)
            message["content"] = message.pop("value", None)
        if not isinstance(message.get("role"), str):
            raise bad("has a turn without a role", turn)
        if message.get("content") is None and "tool_calls" not in message:
            raise bad("has a turn without content", turn)
        message.setdefault("content", "")
        messages.append(message)
    return tuple(messages)


# --- tokens ------------------------------------------------------------------------------


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
    encoder = _Encoder(tokenizer, system, separator)
    datasets = _datasets()
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
    parts = []
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
            if task_column is not None:
                tasks += [_task(row[task_column], task_column, index)] * len(examples)
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
            fix=f"raise max_length above {max_length}, or check that completions are not empty",
        )
    return datasets.concatenate_datasets(parts), counts


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    separator: str = "\n",
    reference: str = "",
) -> list[int]:
    """Token ids from which to generate an answer: those that precede it in training.

    Args:
        prompt: A prompt, or the turns of a conversation so far.
        tokenizer: As in :func:`tokenise`.
        system: As in :func:`tokenise`.
        separator: As in :func:`tokenise`.
        reference: The expected answer, where it is known. Only matters without a chat template:
            no separator is put before an answer that begins with white space of its own.
    """
    encoder = _Encoder(tokenizer, system, separator)
    if not encoder.has_template:
        if not isinstance(prompt, str):
            raise encoder.no_template(0)
        return encoder.ids([encoder.join(prompt, reference)], bos=True)[0]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = encoder.render(encoder.with_system(turns), 0, generation=True)
    return encoder.ids([text])[0]


_Tokens = tuple[list[int], list[int], bool]


def _fit(
    encoded: Iterable[_Tokens], counts: TokeniseReport
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


@dataclass(frozen=True)
class _Span:
    """A rendered conversation and the character ranges [start, end) that are supervised."""

    index: int
    text: str
    spans: tuple[tuple[int, int], ...]


class _Encoder:
    """Examples → token ids and labels, for one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None, separator: str
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.system = system
        self.separator = separator
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so a model could not learn to stop.",
                fix="set tokenizer.eos_token to a token of the vocabulary",
            )
        if system is not None and not self.has_template:
            raise DataError(
                "A system message needs a chat template, and this tokenizer has none.",
                fix="leave the system message out, or put it into the prompts",
            )
        self.eos: int = self.tokenizer.eos_token_id
        # Whether the tokenizer begins a text with its bos token differs from model to model,
        # and a bos token alone does not tell (SmolLM2 has one that it never adds).
        bos = self.tokenizer.bos_token_id
        first = self.tokenizer("a").input_ids[:1]
        self.bos: list[int] = [bos] if bos is not None and first == [bos] else []
        # Often the end of a turn is not the eos token, only some special token of the vocabulary.
        added = self.tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        self.stops = frozenset(special | set(self.tokenizer.all_special_ids) | {self.eos})

    def encode(self, found: Sequence[tuple[int, Example]]) -> Iterator[_Tokens]:
        """Token ids, labels, and whether the example may be cut into several."""
        done: dict[int, _Tokens] = {}
        conversations: list[tuple[int, _Span]] = []
        pairs: list[tuple[int, int, str, str]] = []
        texts: list[tuple[int, str]] = []
        for place, (index, example) in enumerate(found):
            if example.text is not None:
                texts.append((place, example.text))
            elif example.prompt is not None and example.completion is not None:
                if self.has_template:
                    turns = (
                        {"role": "user", "content": example.prompt},
                        {"role": "assistant", "content": example.completion},
                    )
                    conversations.append((place, self.conversation(turns, 1, index)))
                else:
                    prompt = self.join(example.prompt, example.completion)
                    pairs.append((place, index, prompt, example.completion))
            else:
                if not self.has_template:
                    raise self.no_template(index)
                span = self.conversation(example.messages, example.first_supervised, index)
                conversations.append((place, span))
        for (place, _), ids in zip(texts, self.ids([t for _, t in texts], bos=True), strict=True):
            ids = [*ids, self.eos]
            done[place] = (ids, [IGNORE_INDEX, *ids[1:]], True)
        self._encode_pairs(pairs, done)
        self._encode_conversations(conversations, done)
        for place in range(len(found)):
            yield done[place]

    def ids(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """Token ids of each text, with no special token added but (if asked) bos."""
        if not texts:
            return []
        # Length is limited later and reported then, so the tokenizer's own warning is noise.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        start = self.bos if bos else []
        return [[*start, *ids] for ids in encoded.input_ids]

    # Texts without a template

    def join(self, prompt: str, completion: str) -> str:
        """The prompt with what stands between it and the completion."""
        open_end = not prompt or not prompt[-1].isspace()
        open_start = not completion or not completion[0].isspace()
        return prompt + self.separator if open_end and open_start else prompt

    def _encode_pairs(
        self, pairs: Sequence[tuple[int, int, str, str]], done: dict[int, _Tokens]
    ) -> None:
        prompts = self.ids([prompt for _, _, prompt, _ in pairs], bos=True)
        wholes = self.ids([prompt + answer for _, _, prompt, answer in pairs], bos=True)
        for (place, index, prompt, answer), before, whole in zip(
            pairs, prompts, wholes, strict=True
        ):
            cuts = [len(prompt)]
            ids, ends = self._cut(prompt + answer, cuts, [before], whole, index, True)
            ids = [*ids, self.eos]
            done[place] = _labelled(ids, [(ends[0], len(ids))])

    # Conversations

    def no_template(self, index: int) -> DataError:
        return DataError(
            f"Row {index} is a conversation, and the tokenizer has no chat template.",
            expected="a tokenizer with a chat template, or rows with prompt and completion",
            fix="use an instruction-tuned model, or set tokenizer.chat_template",
        )

    def with_system(self, turns: Sequence[Message]) -> list[Message]:
        if self.system is None or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def render(self, turns: Sequence[Message], index: int, *, generation: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns), tokenize=False, add_generation_prompt=generation
                )
            )
        except LorasmithError:
            raise
        except Exception as error:  # a template raises whatever it likes
            raise DataError(
                f"Row {index}: the chat template cannot be applied.",
                got=_first_line(error),
                fix="check that roles alternate as the model's chat template requires",
            ) from error

    def conversation(self, turns: Sequence[Message], first: int, index: int) -> _Span:
        """Render a conversation and find its supervised spans by rendering its prefixes."""
        shift = len(self.with_system(turns)) - len(turns)
        turns, first = self.with_system(turns), first + shift
        text = self.render(turns, index, generation=False)
        spans: list[tuple[int, int]] = []
        for i in range(first, len(turns)):
            if turns[i]["role"] != "assistant":
                continue
            if i == 0:
                raise DataError(
                    f"Row {index} begins with the assistant's turn.",
                    expected="a user's or system's turn before it",
                )
            before = self.render(turns[:i], index, generation=True)
            last = i + 1 == len(turns)
            upto = text if last else self.render(turns[: i + 1], index, generation=False)
            if not upto.startswith(before) or not text.startswith(upto):
                raise DataError(
                    f"Row {index}: the chat template renders turn {i} differently once more "
                    "turns follow, so its tokens cannot be supervised.",
                    expected="each prefix of the conversation to be a prefix of its text",
                    got=_divergence(upto, before)
                    if not upto.startswith(before)
                    else _divergence(text, upto),
                    fix="make one row of each answer, or use a template without such rules",
                )
            spans.append((len(before), len(upto)))
        return _Span(index, text, tuple(spans))

    def _encode_conversations(
        self, conversations: Sequence[tuple[int, _Span]], done: dict[int, _Tokens]
    ) -> None:
        wholes = self.ids([span.text for _, span in conversations])
        # All prefixes of all rows in one call: a fast tokenizer then uses every core.
        wanted = [
            span.text[:cut] for _, span in conversations for pair in span.spans for cut in pair
        ]
        prefixes = iter(self.ids(wanted))
        for (place, span), whole in zip(conversations, wholes, strict=True):
            cuts = [cut for pair in span.spans for cut in pair]
            before = [next(prefixes) for _ in cuts]
            ids, ends = self._cut(span.text, cuts, before, whole, span.index, False)
            ranges = [
                (start, self._end_of_turn(ids, start, end))
                for start, end in zip(ends[::2], ends[1::2], strict=True)
            ]
            if ranges and ranges[-1][1] == len(ids) and ids[-1] not in self.stops:
                # The template marks no end of turn: without eos the model never learns to stop.
                ids = [*ids, self.eos]
                ranges[-1] = (ranges[-1][0], len(ids))
            done[place] = _labelled(ids, ranges)

    def _end_of_turn(self, ids: Sequence[int], start: int, end: int) -> int:
        """Leave out what follows the end-of-turn token (a newline): generation stops before."""
        for i in range(end - 1, start - 1, -1):
            if ids[i] in self.stops:
                return i + 1
        return end

    def _cut(
        self,
        text: str,
        cuts: Sequence[int],
        prefixes: Sequence[list[int]],
        whole: list[int],
        index: int,
        bos: bool,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a text and, for every character cut, the number of tokens before it.

        The tokens of each prefix must begin the tokens of the whole text. Where a token would
        reach over a cut (a newline before the cut and one after it, say), the pieces between
        the cuts are tokenised one by one: the cut is what generation sees.
        """
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            return whole, [len(prefix) for prefix in prefixes]
        edges = [0, *cuts, len(text)]
        pieces = self.ids([text[a:b] for a, b in itertools.pairwise(edges)])
        ids = list(self.bos) if bos else []
        ends = []
        for piece in pieces:
            ids += piece
            ends.append(len(ids))
        if ids[: len(prefixes[0])] != prefixes[0] or self.tokenizer.decode(
            ids
        ) != self.tokenizer.decode(whole):
            raise DataError(
                f"Row {index}: the tokenizer gives no stable boundary between prompt and answer.",
                expected="the tokens of the prompt to begin the tokens of the whole",
                got=_short(text[max(0, cuts[0] - 20) : cuts[0] + 20]),
                fix="separate prompt and completion by a space or newline",
            )
        return ids, ends[:-1]


def _labelled(ids: list[int], ranges: Iterable[tuple[int, int]]) -> _Tokens:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in ranges:
        labels[start:end] = ids[start:end]
    if labels:
        labels[0] = IGNORE_INDEX
    return ids, labels, False


def _divergence(text: str, prefix: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b),
        min(len(text), len(prefix)),
    )
    begin = max(0, at - 10)
    return f"{_short(prefix[begin : at + 30])} becomes {_short(text[begin : at + 30])}"
