"""``lorasmith dynamics``: the rules that can act during training, and their options."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorasmith.cli.output import Common, CommonOptions, emit, session

__all__ = ["describe", "dynamics"]


def dynamics(
    *,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """List the rules that can act during training, and their options.

    Those of installed packages and of --plugin are among them. Use: lorasmith train …
    --dynamics NAME,NAME --dynamics-options.NAME.OPTION VALUE.
    """
    with session(common):
        from lorasmith.dynamics.registry import dynamic_names

        found = [describe(name) for name in dynamic_names()]
        emit(common, {"dynamics": found}, lambda console: _show(console, found))
    return 0


def describe(name: str) -> dict[str, Any]:
    """What a rule is, and what can be set."""
    import dataclasses

    from lorasmith.dynamics.registry import dynamic_options, get_dynamic

    kind = get_dynamic(name)
    return {
        "name": name,
        "class": kind.__name__,
        "module": kind.__module__,
        "summary": (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "),
        "options": [dataclasses.asdict(option) for option in dynamic_options(kind)],
    }


def _show(console: Console, found: list[dict[str, Any]]) -> None:
    for one in found:
        heading = Text.assemble((one["name"], "bold"), "  ", (one["class"], "dim"))
        console.print(heading)
        console.print(Padding(Text(one["summary"].replace("``", "")), (0, 0, 0, 2)))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for option in one["options"]:
            text = Text(option["help"].replace("``", ""))
            default = option["default"]
            text.append(f" [{option['type']}" + (f" = {default}]" if default else "]"), "dim")
            table.add_row(Text(option["name"]), text)
        console.print(Padding(table, (0, 0, 1, 4)))
    legend = (
        "lorasmith train … --dynamics NAME,NAME --dynamics-options.NAME.OPTION VALUE; in YAML, "
        "dynamics: {NAME: {OPTION: VALUE}}."
    )
    console.print(Text(legend, style="dim"))
