"""Progress bars for work that goes through rows, batches or layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = ["bar"]


@contextlib.contextmanager
def bar(
    console: Console, *, shown: bool = True, unit: Literal["items", "bytes"] = "items"
) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each phase; gives what is called with (phase, done, total).

    Gives None where nothing is to be shown, as on a console that is not a terminal.
    """
    if not shown or not console.is_terminal:
        yield None
        return
    counts = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *counts)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tasks: dict[str, int] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total or None)
            progress.update(progress.task_ids[list(tasks).index(phase)], completed=done)

        yield advance
