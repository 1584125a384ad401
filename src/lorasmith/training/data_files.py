"""One file of training data: from JSON, CSV, TSV, Parquet or plain text to rows.

``datasets`` reads. What it would take wrongly is settled before it does: a line that is not UTF-8
or not JSON is named by its number, cells of a CSV file stay text as written (``007``, ``NA``), a
stray quotation mark in a TSV file costs no row, and a string that looks like a timestamp stays a
string.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.errors import DataError, MissingDependencyError, first_line, short

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["READERS", "datasets_package", "no_rows", "read_file"]

READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Ending of a file → the reader of ``datasets`` for it."""


def datasets_package() -> Any:
    """The package ``datasets``, imported on first use.

    Raises:
        MissingDependencyError: It is not installed.
    """
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


def read_file(path: Path, cache: str | None) -> Dataset:
    """All rows of one file, read as its ending says.

    Args:
        path: A file with one of the endings of :data:`READERS`.
        cache: Where ``datasets`` keeps its Arrow files. None: its own cache.

    Raises:
        DataError: The ending is unknown, or the file is empty or not what its ending says; the
            line is named where there is one.
        MissingDependencyError: The package ``datasets`` is missing.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            "Unknown kind of data file.",
            expected="a name ending in " + ", ".join(READERS),
            got=path.suffix or "no ending",
            fix="unpack it first"
            if path.suffix.lower() in _PACKED
            else "convert it to one of these, or name it by what it is",
            file=path,
            key="data",
        )
    if path.stat().st_size == 0:
        raise DataError(
            "The data file is empty.",
            expected="at least one row",
            got="0 bytes",
            fix="write the rows into it, or name another file",
            file=path,
            key="data",
        )
    if reader != "parquet":
        _check_text(path)
    options: dict[str, Any] = {}
    if reader == "csv":
        options = _csv_options(path)
        _check_cells(path, len(options["features"]))
    elif reader == "json":
        _check_json(path)
    datasets = datasets_package()
    try:
        with _no_bars(datasets):
            rows: Dataset = datasets.load_dataset(
                reader, data_files=str(path), split="train", cache_dir=cache, **options
            )
    except Exception as error:  # datasets raises many types, most of them its own
        if "corresponds to no data" in str(error):
            raise no_rows(path) from error
        if reader == "json":
            _check_objects(path)
        raise DataError(
            f"The file cannot be read as {path.suffix[1:]}.",
            expected="a whole parquet file"
            if reader == "parquet"
            else "rows that have the same columns with the same types",
            got=first_line(error.__cause__ or error),
            fix="get it again, or name it by what it is"
            if reader == "parquet"
            else "check that it is whole, and that its rows have the same columns with the same "
            "types",
            file=path,
            key="data",
        ) from error
    if reader == "text":
        rows = rows.select([i for i, line in enumerate(rows["text"]) if line.strip()])
    if reader == "json" and "timestamp" in str(rows.features.arrow_schema.types):
        rows = datasets.Dataset.from_list(_json_rows(path))
    return rows


#: How files begin that are no text → what they are.
_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")


def _check_text(path: Path) -> None:
    """Names the first line that is not UTF-8; readers name a byte at most, or replace it."""
    with path.open("rb") as file:
        kind = None
        for number, line in enumerate(file, start=1):
            if number == 1:
                kind = next((k for mark, k in _MARKS.items() if line.startswith(mark)), None)
            wrong = _not_utf8(line)
            if wrong is None:
                continue
            fix = f"save it as UTF-8, e.g. iconv -f {kind or 'LATIN1'} -t UTF-8"
            if kind in ("gzip", "zip"):
                fix = "unpack it first"
            elif kind == "parquet":
                fix = "let its name end in .parquet"
            raise DataError(
                f"Line {number} is not UTF-8.",
                expected="text in UTF-8",
                got=f"byte 0x{line[wrong]:02x} at place {wrong + 1} of the line"
                + (f"; it looks like {kind}" if kind else ""),
                fix=fix,
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
            got=short(rows),
            fix="write it as a list of objects",
            file=path,
            key="data",
        )
    return rows


def _dialect(path: Path) -> tuple[str, Literal[0, 3]]:
    """What separates cells, and whether quotation marks mean anything: not in TSV files."""
    return ("\t", csv.QUOTE_NONE) if path.suffix.lower() == ".tsv" else (",", csv.QUOTE_MINIMAL)


def _csv_options(path: Path) -> dict[str, Any]:
    """Options that keep every cell as written, and no row lost to a stray quotation mark."""
    datasets = datasets_package()
    delimiter, quoting = _dialect(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=delimiter, quoting=quoting))
    except (UnicodeDecodeError, StopIteration, csv.Error) as error:
        raise DataError(
            "The header line cannot be read.",
            expected="the names of the columns in UTF-8",
            got=first_line(error),
            fix="write the names of the columns into the first line",
            file=path,
            key="line 1",
        ) from error
    if len(set(header)) != len(header) or "" in header:
        raise DataError(
            "The header line is not usable.",
            expected="one distinct, non-empty name a column",
            got=header,
            fix="give every column a name of its own in the first line",
            file=path,
            key="line 1",
        )
    return {
        "delimiter": delimiter,
        "quoting": quoting,
        "encoding": "utf-8-sig",
        "na_filter": False,
        "features": datasets.Features({name: datasets.Value("string") for name in header}),
    }


def _check_cells(path: Path, columns: int) -> None:
    """Names the first row that has not as many cells as there are columns.

    pandas, which reads, takes the first cells of longer rows for an index if the first row is one,
    so that every cell stands in a wrong column; and it fills shorter ones.
    """
    delimiter, quoting = _dialect(path)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, quoting=quoting)
            for cells in rows:
                # Lines with white space alone are left out when the rows are read.
                if len(cells) == columns or (len(cells) < 2 and not "".join(cells).strip()):
                    continue
                raise DataError(
                    f"The file cannot be read as {path.suffix[1:]}: line {rows.line_num} has "
                    "another number of cells than the header.",
                    expected=f"{columns} cells",
                    got=f"{len(cells)}: {short(cells)}",
                    fix="fill in what is missing"
                    + (", and put text with a comma in quotation marks" if quoting == 0 else ""),
                    file=path,
                    key=f"line {rows.line_num}",
                )
    except csv.Error as error:
        raise DataError(
            f"The file cannot be read as {path.suffix[1:]}.",
            expected="cells of text",
            got=first_line(error),
            fix="check the line that is named",
            file=path,
            key=f"line {rows.line_num}",
        ) from error
    finally:
        csv.field_size_limit(limit)


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
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                raise DataError(
                    f"Line {number} is not JSON.",
                    expected="one object a line",
                    got="lists or objects in one another, too deep to be read" if deep else error,
                    fix="write every row as one object on a line of its own",
                    file=path,
                    key=f"line {number}",
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"Line {number} is not an object.",
                    expected='{"column": value, …}',
                    got=short(row),
                    fix="write every row as one object on a line of its own"
                    + (", or let the name end in .json" if isinstance(row, list) else ""),
                    file=path,
                    key=f"line {number}",
                )


def _check_objects(path: Path) -> None:
    """Names the line that Arrow does not take although it is JSON; called if it took none."""
    if path.suffix.lower() == ".json":
        return

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{short(twice)} twice")
        return dict(pairs)

    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=once)
                json.dumps(row, ensure_ascii=False).encode()
            except ValueError as error:
                broken = isinstance(error, UnicodeEncodeError)
                raise DataError(
                    f"Line {number} cannot be read as a row.",
                    expected="text that UTF-8 can hold" if broken else "every column once",
                    got="half of a surrogate pair" if broken else error,
                    fix="write the row anew" if broken else "leave one of the two out",
                    file=path,
                    key=f"line {number}",
                ) from error


def no_rows(source: str | Path) -> DataError:
    """The error of a source that can be read and holds nothing."""
    return DataError(
        "The data set has no rows.",
        expected="at least one row",
        got="none",
        fix="write the rows into it, or name other data",
        file=source,
        key="data",
    )
