"""Rows from wherever they are: a file, a directory, the hub or a built-in data set.

What a source is, is told by its text: ``builtin:NAME``, something that exists on this machine, or
a hub id. A file is read by :mod:`lorasmith.training.data_files`, several sources at once are told
apart by :mod:`lorasmith.training.tasks`. Where the hub is not reached, only the cache is asked.
"""

from __future__ import annotations

import contextlib
import difflib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorasmith.errors import ConfigError, DataError, first_line
from lorasmith.training.builtin import load_builtin
from lorasmith.training.data_files import READERS, datasets_package, no_rows, read_file
from lorasmith.training.tasks import load_tasks, task_sources

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_rows"]

_BUILTIN_PREFIX = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
#: Seconds that a hub gets to take a connection before only the cache is asked.
_HUB_TIMEOUT = 2.0


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
    if source.startswith(_BUILTIN_PREFIX):
        return load_builtin(source[len(_BUILTIN_PREFIX) :], split, limit, seed)
    cache = None if cache_dir is None else str(cache_dir)
    path = Path(source).expanduser()
    if path.is_file():
        rows = read_file(path, cache)
    elif path.is_dir():
        rows = _read_directory(path, split, cache)
    elif path.exists():
        raise DataError(
            "The data is neither a file nor a directory.",
            expected="a file that can be read more than once, or a directory",
            got=f"a {_kind_of(path)}",
            fix="write it to a file first",
            file=path,
            key="data",
        )
    elif path.suffix.lower() in READERS or not _HUB_ID.fullmatch(source):
        raise _no_such_file(path)
    else:
        rows = _read_hub(source, split, cache)
    if len(rows) == 0:
        raise no_rows(source)
    if limit is not None and limit < len(rows):
        rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))
    return rows


def _kind_of(path: Path) -> str:
    """What stands at a path, if it is neither file nor directory."""
    kinds = ((path.is_fifo, "pipe"), (path.is_socket, "socket"), (path.is_char_device, "device"))
    return next((kind for is_kind, kind in kinds if is_kind()), "special file")


def _read_directory(path: Path, split: str, cache: str | None) -> Dataset:
    datasets = datasets_package()
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
            got=first_line(error),
            fix="name the file itself, or put files of one of the kinds "
            f"{', '.join(READERS)} there",
            file=path,
            key="data",
        ) from error
    return _choose_split(rows, split, str(path))


def _read_hub(source: str, split: str, cache: str | None) -> Dataset:
    from lorasmith.io.models import hub_reachable

    datasets = datasets_package()
    name, _, config = source.partition(":")
    reachable = hub_reachable(_HUB_TIMEOUT)
    try:
        with contextlib.nullcontext() if reachable else _kept_offline(datasets):
            rows = datasets.load_dataset(name, config or None, cache_dir=cache)
    except Exception as error:
        got = first_line(error)
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
            fix="name one of them (--split, or --eval-data-split for the evaluation)",
            file=source,
            key="split",
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
        fix="check the path"
        if beside.is_dir()
        else f"check the path: the directory {beside} does not exist",
        key="data",
    )
