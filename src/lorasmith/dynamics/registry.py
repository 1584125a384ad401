"""The one list of dynamics by name, for configuration files and the command line.

A rule of your own needs no fork: call :func:`register_dynamic` with its class, or name it under
the entry point ``lorasmith.dynamics`` of your package. On the command line ``--plugin FILE``
imports the file that registers it. In Python no registration is needed: hand over the instance.

The options of a rule are the keyword parameters of its class. Names are known without importing
a rule (and so without PyTorch); options are looked at when the class is.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, get_type_hints

from lorasmith.errors import ConfigError, LorasmithError, UnknownNameError

if TYPE_CHECKING:
    from lorasmith.dynamics.protocol import Dynamic

__all__ = [
    "DynamicOption",
    "dynamic_names",
    "dynamic_options",
    "get_dynamic",
    "make_dynamics",
    "register_dynamic",
]

#: Name → "module:class".
_BUILTIN = {
    "gauge": "lorasmith.dynamics.gauge:GaugeProjection",
    "entropy": "lorasmith.dynamics.entropy:EntropyGovernor",
    "orthogonality": "lorasmith.dynamics.orthogonality:OrthogonalityPenalty",
    "budget": "lorasmith.dynamics.rotation_budget:RotationBudget",
    "stress": "lorasmith.dynamics.stress:StressController",
}
_GROUP = "lorasmith.dynamics"
_registered: dict[str, type[Dynamic]] = {}


@dataclass(frozen=True)
class DynamicOption:
    """An option of a rule.

    Attributes:
        name: The keyword.
        type: Its annotation, as text.
        default: The default, as text; None where a value must be given.
        help: What the class says of it.
    """

    name: str
    type: str
    default: str | None
    help: str = ""


def register_dynamic(kind: type[Dynamic], *, replace: bool = False) -> type[Dynamic]:
    """Makes a rule known under its ``name``; also usable as a decorator.

    Args:
        kind: A subclass of :class:`~lorasmith.dynamics.protocol.Dynamic`.
        replace: Whether a rule of the same name may be replaced.

    Returns:
        The same class.

    Raises:
        ConfigError: It is no rule, has no name, or the name is taken.
    """
    from lorasmith.dynamics.protocol import Dynamic

    given: Any = kind  # an entry point may name anything
    if not (isinstance(given, type) and issubclass(given, Dynamic)):
        raise ConfigError(
            "That is not a dynamic.",
            expected="a subclass of lorasmith.Dynamic",
            got=repr(kind),
        )
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{kind.__name__} has no name.", expected="a class attribute name", got=repr(name)
        )
    taken = name in _BUILTIN or _registered.get(name, kind) is not kind
    if taken and not replace:
        raise ConfigError(
            f"A dynamic named {name!r} is registered already.",
            fix="choose another name, or pass replace=True",
        )
    _registered[name] = kind
    return kind


def dynamic_names() -> tuple[str, ...]:
    """All names: ours, those that were registered, and those of installed packages."""
    found = entry_points(group=_GROUP)
    return tuple(dict.fromkeys([*_BUILTIN, *_registered, *(entry.name for entry in found)]))


def _canonical(name: str) -> str:
    # On a command line dashes are at home, in Python names underscores.
    known = dynamic_names()
    others = (name, name.replace("-", "_"), name.replace("_", "-"))
    return next((other for other in others if other in known), name)


def get_dynamic(name: str) -> type[Dynamic]:
    """The class of that name.

    Raises:
        UnknownNameError: There is none.
        ConfigError: An installed package names one that cannot be used.
    """
    name = _canonical(name)
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        kind: type[Dynamic] = getattr(import_module(module), attribute)
        return kind
    for entry in entry_points(group=_GROUP):
        if entry.name == name:
            try:
                return register_dynamic(entry.load())
            except Exception as error:
                raise ConfigError(
                    f"The dynamic {name!r} of an installed package cannot be used: {error}",
                    expected="the entry point of a subclass of lorasmith.Dynamic",
                    got=entry.value,
                    key=f"{_GROUP}:{name}",
                ) from error
    near = difflib.get_close_matches(name, dynamic_names(), n=1)
    raise UnknownNameError(
        f"There is no dynamic named {name!r}.",
        expected=", ".join(dynamic_names()),
        got=name,
        fix=f"did you mean {near[0]!r}?"
        if near
        else "lorasmith.register_dynamic(...) adds your own; --plugin FILE, on the command line",
        key="dynamics",
    )


def dynamic_options(kind: type[Dynamic]) -> tuple[DynamicOption, ...]:
    """The options of a rule, in order."""
    found = []
    said = _arguments(inspect.getdoc(kind) or "")
    try:
        hints = get_type_hints(kind.__init__)
    except (NameError, TypeError):  # a name that is there for type checkers only
        hints = {}
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = hints.get(parameter.name, parameter.annotation)
        kind_text = (
            annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        )
        found.append(
            DynamicOption(
                parameter.name,
                "" if annotation is parameter.empty else _short(kind_text),
                None if parameter.default is parameter.empty else _shown(parameter.default),
                re.sub(r":\w+:`~?([^`]*)`", r"\1", said.get(parameter.name, "")),
            )
        )
    return tuple(found)


def _shown(default: Any) -> str:
    return f"{default:.6g}" if isinstance(default, float) else repr(default)


def _short(annotation: str) -> str:
    """An annotation without the modules that its names are from."""
    return re.sub(r"\b[a-z_]\w*(?:\.[a-z_]\w*)*\.(?=[A-Z])", "", annotation)


def _arguments(doc: str) -> dict[str, str]:
    """Name → text of a docstring's section Args."""
    found: dict[str, str] = {}
    name = None
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        if line and not line[0].isspace():
            break
        start = re.fullmatch(r"    (\w+): (.*)", line)
        if start is not None:
            name = start[1]
            found[name] = start[2]
        elif name is not None and line.strip():
            found[name] += " " + line.strip()
    return found


def make_dynamics(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Dynamic, ...]:
    """The rules of these names.

    Args:
        names: In the order in which they act.
        options: Name → keyword arguments of its class.

    Raises:
        UnknownNameError: There is no rule of that name.
        ConfigError: A rule is named twice, does not take an option, or refuses its value.
    """
    wanted = [_canonical(name) for name in names]
    for name in wanted:
        if wanted.count(name) > 1:
            raise ConfigError(f"The dynamic {name!r} is there twice.", key="dynamics")
    given = {_canonical(name): dict(values) for name, values in (options or {}).items()}
    for name in given:
        if name not in wanted:
            get_dynamic(name)  # a misspelt name is the likelier mistake
            raise ConfigError(
                f"There are options for the dynamic {name!r}, which is not switched on.",
                expected=f"options of {', '.join(wanted)}" if wanted else "no options",
                got=name,
                fix=f"add {name} to dynamics",
                key=f"dynamics_options.{name}",
            )
    return tuple(_make(name, given.get(name, {})) for name in wanted)


def _make(name: str, values: Mapping[str, Any]) -> Dynamic:
    kind = get_dynamic(name)
    known = {option.name: option for option in dynamic_options(kind)}
    made: dict[str, Any] = {}
    for key, value in values.items():
        option = key.replace("-", "_")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise ConfigError(
                f"The dynamic {name!r} has no option {key!r}.",
                expected=", ".join(known) or "no options",
                got=key,
                fix=f"did you mean {near[0]!r}?" if near else "leave it out",
                key=f"dynamics_options.{name}.{key}",
            )
        made[option] = _converted(name, known[option], value)
    try:
        return kind(**made)
    except LorasmithError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The dynamic {name!r} cannot be made with these options.",
            expected="; ".join(f"{o.name}: {o.type}" for o in known.values()),
            got=f"{made}: {error}",
            key=f"dynamics_options.{name}",
        ) from error


def _converted(name: str, option: DynamicOption, value: Any) -> Any:
    """A value as JSON and YAML can say it, as the option takes it."""
    if isinstance(value, list) and "tuple[" in option.type:
        return tuple(value)
    if "Penalty" not in option.type or not isinstance(value, str | Mapping):
        return value
    # A rule inside a rule: its name, or {name: options}.
    nested = {value: None} if isinstance(value, str) else dict(value)
    if len(nested) != 1:
        raise ConfigError(
            f"The dynamic {name!r} takes one rule as {option.name}.",
            expected="a name, or {NAME: {OPTION: VALUE}}",
            got=repr(value),
            key=f"dynamics_options.{name}.{option.name}",
        )
    ((inner, options),) = nested.items()
    return _make(_canonical(inner), options or {})
