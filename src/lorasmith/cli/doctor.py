"""``lorasmith doctor [PATH]``: what is wrong with an installation or an artefact, and the cure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorasmith.cli.output import Common, CommonOptions, emit, session, stderr
from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasmith.cli.health import Finding

__all__ = ["doctor"]

#: Level → sign and style.
_SIGNS = {
    "ok": ("✓", "green"),
    "note": ("·", "cyan"),
    "warning": ("!", "yellow"),
    "error": ("✗", "bold red"),
}


def doctor(
    path: Path | None = None,
    /,
    *,
    model: str | None = None,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Check the installation, or what is under a path, and say what is wrong and what to do.

    Without PATH: versions, processors, memory, disk, caches, optional packages, and a small
    adapter trained, saved and loaded. Nothing is changed and nothing is downloaded. The exit code
    is 1 if anything is wrong; warnings and notes alone leave it at 0.

    Parameters
    ----------
    path
        An adapter, a directory of adapters, a fleet, a router, a checkpoint, a run, a model, or a
        GGUF file.
    model
        The base model that the adapter is to fit: alias, directory, or hub id.
    """
    with session(common):
        from lorasmith.cli import health
        from lorasmith.progress import bar

        if path is None and model is not None:
            raise ConfigError(
                "--model says what an adapter is to fit, and there is no adapter.",
                fix="lorasmith doctor ADAPTER --model MODEL",
                key="--model",
            )
        with bar(stderr(), shown=not common.quiet) as progress:
            if path is None:
                found = list(health.of_installation())
            else:
                found = list(health.of_path(path.expanduser(), model=model, progress=progress))
        wrong = sum(one.level == "error" for one in found)
        payload = {
            "ok": not wrong,
            "path": None if path is None else str(path),
            "kind": "installation" if path is None else health.kind_of(path.expanduser()),
            "errors": wrong,
            "warnings": sum(one.level == "warning" for one in found),
            "findings": [one.to_dict() for one in found],
        }
        emit(common, payload, lambda console: _show(console, found))
    return 1 if wrong else 0


def _show(console: Console, found: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for one in found:
        sign, style = _SIGNS[one.level]
        text = Text(one.text)
        if one.fix is not None:
            text.append(f"\nto fix: {one.fix}", style="dim")
        table.add_row(Text(sign, style=style), one.subject, text)
    console.print(table)
    wrong = sum(one.level == "error" for one in found)
    doubtful = sum(one.level == "warning" for one in found)
    if wrong or doubtful:
        console.print(f"{wrong:,} wrong, {doubtful:,} to be warned of")
    else:
        console.print("nothing wrong")
