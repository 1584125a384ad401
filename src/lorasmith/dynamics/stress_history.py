"""What the stress controller has seen and done, as records, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lorasmith.errors import AdapterFileError
from lorasmith.io.atomic import replace_text
from lorasmith.io.strict import parse_object, read_limited

__all__ = ["MODES", "Mode", "StressRecord", "read_json", "write_csv", "write_json"]

Mode = Literal["single", "multi", "mirror"]
MODES: tuple[Mode, ...] = ("single", "multi", "mirror")


@dataclass(frozen=True)
class StressRecord:
    """One optimiser step.

    Attributes:
        step: Number of the step, from 0.
        phi: φ after it.
        error: E.
        conflict: C.
        memory: S.
        mode: The mode in which the step was made.
        loss: Mean loss in nats a token; NaN if it was not finite.
        event: What happened, e.g. ``"enter mirror"``, ``"rollback"``, ``"skip: loss"``,
            ``"leave multi: error 0.0123"`` (relative error of the merge); several are
            separated by ``"; "``.
    """

    step: int
    phi: float
    error: float
    conflict: float
    memory: float
    mode: Mode
    loss: float
    event: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Field → value; what is not finite is ``None``, as JSON has no word for it."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


_FIELDS = frozenset(f.name for f in fields(StressRecord))


def write_json(history: Iterable[StressRecord], path: str | Path) -> None:
    """Writes a list of objects, one a step."""
    rows = [record.to_dict() for record in history]
    replace_text(Path(path), json.dumps(rows, allow_nan=False) + "\n")


def write_csv(history: Iterable[StressRecord], path: str | Path) -> None:
    """Writes a table with a header, one line a step; what is not finite is empty."""
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, [f.name for f in fields(StressRecord)], lineterminator="\n")
    table.writeheader()
    table.writerows(record.to_dict() for record in history)
    replace_text(Path(path), file.getvalue())


def read_json(path: str | Path) -> list[StressRecord]:
    """The records of a file from :func:`write_json`, such as a run's ``stress.json``.

    Raises:
        AdapterFileError: It is not such a file.
    """
    file = Path(path)
    try:
        data = read_limited(file, limit=_BYTES)
    except OSError as error:
        raise AdapterFileError(
            "The history cannot be read.", file=file, expected="a file", got=error.strerror
        ) from error
    if data.lstrip()[:1] != b"[":
        raise _malformed(file, "", "a list of records", repr(data[:40]))
    # As a field of an object, which is what is read without guessing.
    rows = parse_object(b'{"rows": ' + data + b"}", file, limit=2 * _BYTES, values=_VALUES)["rows"]
    return [_record(row, number, file) for number, row in enumerate(rows)]


#: Bytes of a history, some 150 a step, and values in it.
_BYTES, _VALUES = 2**28, 20_000_000
_NUMBERS = ("phi", "error", "conflict", "memory", "loss")


def _record(row: Any, number: int, file: Path) -> StressRecord:
    if not isinstance(row, dict) or not _FIELDS - {"event"} <= row.keys() <= _FIELDS:
        raise _malformed(file, f"record {number}", ", ".join(sorted(_FIELDS)), repr(row)[:200])
    wrong = [k for k in _NUMBERS if row[k] is not None and type(row[k]) not in (int, float)]
    if type(row["step"]) is not int or row["step"] < 0:
        wrong.append("step")
    if row["mode"] not in MODES:
        wrong.append("mode")
    if not isinstance(row.get("event", ""), str):
        wrong.append("event")
    if wrong:
        raise _malformed(
            file,
            f"record {number} {wrong[0]}",
            "a step, numbers or null, a mode and a text",
            repr(row[wrong[0]])[:200],
        )
    numbers = {k: math.nan if row[k] is None else float(row[k]) for k in _NUMBERS}
    return StressRecord(**{**row, **numbers})


def _malformed(file: Path, key: str, expected: str, got: str) -> AdapterFileError:
    return AdapterFileError(
        "The history is not one that the stress controller has written.",
        file=file,
        key=key or None,
        expected=expected,
        got=got,
        fix="take the file from the run again",
    )
