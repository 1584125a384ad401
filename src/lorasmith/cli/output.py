"""What the commands have in common: common options, stdout and stderr, errors, exit codes.

stdout carries the result and nothing else: with ``--json`` exactly one JSON object.
Messages, progress and errors go to stderr.

Exit codes: 0 done, 1 it failed, 2 it was asked for in a wrong way, 3 what was measured is
beyond a limit that the user gave, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import Group, Parameter
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorasmith.errors import (
    AdapterFileError,
    AttachError,
    ConfigError,
    DataError,
    FuseError,
    LorasmithError,
    MissingDependencyError,
    ModelError,
    TargetError,
    UnknownNameError,
)
from lorasmith.redaction import redact

__all__ = [
    "Common",
    "CommonOptions",
    "emit",
    "exit_code",
    "grid",
    "number",
    "report_error",
    "session",
    "stderr",
    "stdout",
]

#: Errors that the user can put right by asking differently.
_MISTAKES = (
    AdapterFileError,
    AttachError,
    ConfigError,
    DataError,
    FuseError,
    MissingDependencyError,
    ModelError,
    TargetError,
    UnknownNameError,
)

#: Loggers of libraries that report, when Transformers imports them, which of their kernels
#: this machine lacks.
_CHATTER = ("bitsandbytes", "torch.utils._pytree", "torchao")

_GROUP = Group("Common options", sort_key=100)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    json: Annotated[bool, Parameter(negative="", group=_GROUP)] = False
    """Print the result as one JSON object on stdout, and everything else on stderr."""

    quiet: Annotated[bool, Parameter(negative="", alias="-q", group=_GROUP)] = False
    """No progress and no notes; warnings and errors only."""

    debug: Annotated[bool, Parameter(negative="", group=_GROUP)] = False
    """Show where an error comes from. The same as LORASMITH_DEBUG=1."""

    plugin: Annotated[tuple[str, ...], Parameter(group=_GROUP)] = ()
    """Python file or module to import first, e.g. with a variant of your own. LORASMITH_PLUGINS
    names some for every command."""


#: The annotation with which a command takes them.
CommonOptions = Annotated[Common, Parameter(name="*")]


def stderr() -> Console:
    """For messages. Made anew each time, so that redirections count."""
    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    """For results."""
    return Console(highlight=False)


def debugging(flag: bool = False) -> bool:
    """Whether tracebacks are wanted."""
    return flag or os.environ.get("LORASMITH_DEBUG", "") not in ("", "0")


class _Messages(logging.Handler):
    """Shows log records as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        text = redact(record.getMessage())
        if record.levelno >= logging.WARNING:
            stderr().print(Text.assemble(("warning: ", "yellow"), text))
        else:
            stderr().print(Text(text, style="dim"))


@contextlib.contextmanager
def session(common: Common) -> Iterator[None]:
    """Messages and warnings to stderr for the time of a command, and plugins at its start.

    With ``--json`` whatever a library prints goes to stderr as well.
    """
    from lorasmith.cli.plugins import load_plugins

    logger = logging.getLogger("lorasmith")
    handler = _Messages()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if common.quiet else logging.INFO)
    logger.propagate = False
    others = {name: logging.getLogger(name) for name in _CHATTER}
    levels = {name: other.level for name, other in others.items()}
    if not debugging(common.debug):
        for other in others.values():
            other.setLevel(logging.ERROR)
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,  # noqa: ARG001 - the signature that warnings calls
        line: str | None = None,  # noqa: ARG001
    ) -> None:
        text = " ".join(str(message).split())
        if debugging(common.debug):
            text += f" ({category.__name__}, {filename}:{lineno})"
        elif issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
            return  # for developers of the libraries, not for users of this program
        if text not in shown:
            shown.add(text)
            stderr().print(Text.assemble(("warning: ", "yellow"), text))

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = show
            if common.json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            load_plugins(common.plugin)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        for name, other in others.items():
            other.setLevel(levels[name])


def emit(
    common: Common, payload: Mapping[str, Any], render: Callable[[Console], None] | None = None
) -> None:
    """Prints a result: the JSON object with ``--json``, else what ``render`` shows.

    Of several processes that torchrun started, the first one speaks for all.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if common.json:
        print_json(payload)
    elif render is not None:
        render(stdout())


def print_json(payload: Mapping[str, Any]) -> None:
    """Writes one JSON object and a line end to the program's real stdout."""
    text = json.dumps(plain(payload), ensure_ascii=False, allow_nan=False)
    # ``session`` has put stderr in the place of sys.stdout.
    stream = sys.stdout if sys.stdout is not sys.stderr else (sys.__stdout__ or sys.stdout)
    stream.write(text + "\n")
    stream.flush()


def plain(value: Any) -> Any:
    """The value in types that JSON has; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    return str(value)


def grid(rows: Mapping[str, object], *, title: str | None = None) -> Table:
    """A table of names and values without lines."""
    table = Table.grid(padding=(0, 2))
    if title is not None:
        table.title = title
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(str(value)))
    return table


def number(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}"


def exit_code(error: BaseException) -> int:
    """2 where the user can ask differently, 1 where it failed."""
    from cyclopts import CycloptsError

    return 2 if isinstance(error, (*_MISTAKES, CycloptsError)) else 1


def report_error(error: Exception, *, as_json: bool, debug: bool) -> None:
    """Shows an error: a JSON object on stdout, or a panel on stderr.

    The traceback comes only when debugging, and always on stderr.
    """
    if debugging(debug):
        import traceback

        text = redact("".join(traceback.format_exception(error)))
        stderr().print(Text(text.rstrip(), style="dim"))
    if as_json:
        print_json({"error": _fields(error)})
        return
    if isinstance(error, LorasmithError):
        body = Text(error.what)
        for label, value in (
            ("file", error.file),
            ("key", error.key),
            ("expected", error.expected),
            ("got", error.got),
            ("to fix", error.fix),
        ):
            if value is not None:
                body.append(f"\n{label + ':':<10}", style="bold")
                body.append(value)
    elif exit_code(error) == 2:
        body = Text(redact(str(error)))
    else:
        body = Text(redact(f"{type(error).__name__}: {error}"))
        if not debugging(debug):
            body.append("\nRun it with --debug to see where this comes from.", style="dim")
    stderr().print(Panel(body, title="error", border_style="red", title_align="left"))


def _fields(error: Exception) -> dict[str, Any]:
    if isinstance(error, LorasmithError):
        return {
            "type": type(error).__name__,
            "message": error.what,
            "expected": error.expected,
            "got": error.got,
            "fix": error.fix,
            "file": error.file,
            "key": error.key,
        }
    if exit_code(error) == 2:
        return {"type": "UsageError", "message": redact(str(error))}
    return {"type": type(error).__name__, "message": redact(str(error))}
