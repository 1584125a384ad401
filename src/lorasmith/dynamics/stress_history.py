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

from lorasmith.io.atomic import replace_text

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
    """The records of a file from :func:`write_json`, such as a run's ``stress.json``."""
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    for row in rows:
        row.update({key: math.nan for key, value in row.items() if value is None})
    return [StressRecord(**row) for row in rows]
