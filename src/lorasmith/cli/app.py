"""The commands put together, and the entry point."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from lorasmith.cli.demo import demo
from lorasmith.cli.eval import evaluate
from lorasmith.cli.generate import generate
from lorasmith.cli.info import info
from lorasmith.cli.output import exit_code, report_error
from lorasmith.cli.train import train
from lorasmith.cli.version import version
from lorasmith.errors import ConfigError

__all__ = ["app", "main"]


def _version() -> str:
    from lorasmith import __version__

    return __version__


def _read_config(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Fills in what the command line left open from the file that ``--config`` names."""
    for argument in arguments:
        if "--config" in argument.names and argument.tokens:
            path = Path(argument.tokens[0].value).expanduser()
            source = Dict(read_yaml(path), use_commands_as_keys=False, source=str(path))
            source(app, commands, arguments)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, in the form in which options are filled in from it.

    Raises:
        ConfigError: It cannot be read, is no mapping, or says something twice.
    """
    import json

    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, which YAML forbids and PyYAML lets pass."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        with path.open(encoding="utf-8") as file:
            # A SafeLoader with one more check.
            values = yaml.load(file, Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "The configuration file cannot be read.", got=error, file=path, key="--config"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            "The configuration file is not YAML.",
            got=" ".join(str(error).split()),
            file=path,
            key="--config",
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ConfigError(
            "The configuration file does not hold options.",
            expected="a mapping of option names to values",
            got=type(values).__name__,
            file=path,
            key="--config",
        )
    # Patterns have dots in their keys, which would read as nested options.
    adapter = values.get("adapter")
    if isinstance(adapter, dict):
        for name, value in adapter.items():
            if isinstance(value, dict):
                adapter[name] = json.dumps(value)
    return values


app = App(
    name="lorasmith",
    help="Train, evaluate and use LoRA-family adapters of language models.",
    version=_version,
    config=_read_config,
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(train)
app.command(evaluate, name="eval")
app.command(generate)
app.command(info)
app.command(demo)
app.command(version)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name. Default: those of this process.

    Returns:
        The exit code; see ``lorasmith.cli.output``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        result = app(arguments, exit_on_error=False, print_error=False, help_on_error=False)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except (CycloptsError, Exception) as error:  # noqa: BLE001 - the last place to catch it
        report_error(error, as_json=as_json, debug=debug)
        return exit_code(error)
    return result if isinstance(result, int) else 0
