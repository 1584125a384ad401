"""The commands put together, and the entry point."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from lorasmith.cli.output import exit_code, report_error
from lorasmith.errors import ConfigError

__all__ = ["COMMANDS", "main", "make_app"]


def _version() -> str:
    from lorasmith import __version__

    return __version__


def _read_config(app: App, _: tuple[str, ...], arguments: Any) -> None:
    """Fills in what the command line left open from the file that ``--config`` names."""
    for argument in arguments:
        if "--config" in argument.names and argument.tokens:
            path = Path(argument.tokens[0].value).expanduser()
            # As the values of this command, reached already: else those that are called like
            # another command ("dynamics") would be taken for that command's and left out.
            values = read_yaml(path)
            if values.get("trust_remote_code") or values.get("trust-remote-code"):
                raise ConfigError(
                    "A configuration file cannot let a model's own code run.",
                    file=path,
                    key="trust_remote_code",
                    expected="the option on the command line, said for this very call",
                    got="true in the file",
                    fix="take it out, and add --trust-remote-code if you trust the model",
                )
            _join_dynamics_options(arguments, values)
            source = Dict(values, use_commands_as_keys=True, source=str(path))
            source(app, (), arguments)


def _join_dynamics_options(arguments: Any, values: dict[str, Any]) -> None:
    """Options of rules on the command line replace single ones of the file, not all of them."""
    import json

    argument = next((a for a in arguments if "--dynamics-options" in a.names and a.tokens), None)
    if argument is None or not isinstance(values.get("dynamics_options"), str):
        return
    both: dict[str, dict[str, Any]] = {}

    def add(rule: str, options: Any) -> None:
        into = both.setdefault(rule, {})
        into.update({key.replace("-", "_"): value for key, value in dict(options or {}).items()})

    try:
        for rule, options in json.loads(values["dynamics_options"]).items():
            add(rule, options)
        for token in argument.tokens:
            if token.keys:
                rule, option = token.keys
                add(rule, {option: token.value})
            else:
                for rule, options in json.loads(token.value).items():
                    add(rule, options)
    except (AttributeError, TypeError, ValueError):
        return  # what is wrong with them is said where they are used
    first = argument.tokens[0]
    argument.tokens[:] = [first.evolve(keys=(), value=json.dumps(both))]


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
            "The configuration file cannot be read.",
            expected="a YAML file in UTF-8",
            got=error,
            fix="check the path, its permissions and its encoding",
            file=path,
            key="--config",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            "The configuration file is not YAML.",
            expected="a mapping of option names to values, without tags",
            got=" ".join(str(error).split()),
            fix="correct the line that is named",
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
            fix="write one NAME: VALUE on each line",
            file=path,
            key="--config",
        )
    # Patterns have dots in their keys, which would read as nested options.
    adapter = values.get("adapter")
    if isinstance(adapter, dict):
        for name, value in adapter.items():
            if isinstance(value, dict):
                adapter[name] = json.dumps(value)
    _tell_dynamics(values)
    _join_sources(values)
    return values


def _tell_dynamics(values: dict[str, Any]) -> None:
    """A mapping of rules to their options, as names and options apart."""
    import json

    given = values.get("dynamics")
    if isinstance(given, dict):
        values["dynamics"] = list(given)
        own = {name: options for name, options in given.items() if options}
        both = {**own, **(values.get("dynamics_options") or {})}
        if both:
            values["dynamics_options"] = both
    if isinstance(values.get("dynamics_options"), dict):
        values["dynamics_options"] = json.dumps(values["dynamics_options"])


def _join_sources(values: dict[str, Any]) -> None:
    """Several sources of data, as a list or as task: source, in the form of one option."""
    for name in ("data", "eval_data", "calibration"):
        given = values.get(name)
        if isinstance(given, dict):
            given = [f"{task}={source}" for task, source in given.items()]
        if isinstance(given, list):
            values[name] = ",".join(str(source) for source in given)


#: Command → its function and what the list of commands says of it.
COMMANDS = {
    "train": ("lorasmith.cli.train:train", "Fine-tune an adapter on a base model."),
    "eval": (
        "lorasmith.cli.eval:evaluate",
        "Measure a model, with or without an adapter: loss, perplexity, exact match.",
    ),
    "generate": (
        "lorasmith.cli.generate:generate",
        "Let a model answer a prompt, with or without an adapter.",
    ),
    "diagnose": (
        "lorasmith.cli.diagnose:diagnose",
        "Measure what fine-tuning did to the weights: angles, norms, modes, spectra.",
    ),
    "info": (
        "lorasmith.cli.info:info",
        "Describe a base model, an adapter or a compressed fleet. No model's weights are loaded.",
    ),
    "variants": (
        "lorasmith.cli.variants:variants",
        "List the adapter families: formula, parameters on a model, and what each can do.",
    ),
    "dynamics": (
        "lorasmith.cli.dynamics:dynamics",
        "List the rules that can act during training, and their options.",
    ),
    "convert": (
        "lorasmith.cli.convert:convert",
        "Turn an adapter into the nearest plain LoRA, and say how near it is.",
    ),
    "fuse": (
        "lorasmith.cli.fuse:fuse",
        "Write a full model with an adapter fused into its weights, and say how near it is.",
    ),
    "export": (
        "lorasmith.cli.export:export",
        "Write an adapter in the form that llama.cpp, Ollama, vLLM, SGLang, TGI or PEFT loads.",
    ),
    "push": (
        "lorasmith.cli.push:push",
        "Upload an adapter, a compressed fleet or a directory of adapters.",
    ),
    "merge": (
        "lorasmith.cli.merge:merge",
        "Merge adapters of one base model into one plain LoRA, and say what it costs.",
    ),
    "fleet": (
        "lorasmith.cli.fleet:app",
        "Many adapters of one model: compare, compress, check and manage them.",
    ),
    "demo": (
        "lorasmith.cli.demo:demo",
        "Fine-tune a language model, and measure what it learned and what it forgot.",
    ),
    "doctor": (
        "lorasmith.cli.doctor:doctor",
        "Check the installation, or what is under a path, and say what is wrong and what to do.",
    ),
    "version": (
        "lorasmith.cli.version:version",
        "Show the versions of lorasmith and of the packages it works with.",
    ),
}


def make_app(command: str | None = None) -> App:
    """The command line.

    Args:
        command: The command that is going to be called. It alone is imported; the others
            are known by name, so that ``lorasmith --help`` does not wait for all of them.
    """
    app = App(
        name="lorasmith",
        help="Train, evaluate and use LoRA-family adapters of language models.",
        version=_version,
        config=_read_config,
        default_parameter=Parameter(negative_iterable=()),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, (function, summary) in COMMANDS.items():
        if name == command:
            module, _, attribute = function.partition(":")
            app.command(getattr(import_module(module), attribute), name=name)
        else:
            app.command(function, name=name, help=summary)
    return app


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
        app = make_app(next((a for a in arguments if not a.startswith("-")), None))
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
