"""The one list of merging methods by name, open to users.

A method is one pure function of the changes of one layer,

    merge(deltas, weights, *, option=default, …) → delta

in one of two forms. ``form="factors"``: deltas and result are ``LayerFactors`` (ΔW = B A, [r, d_in]
and [d_out, r]), and no matrix of W's size is made. ``form="dense"``: they are tensors [d_out,
d_in]. An adapter that does not adapt the layer is there with a change of zero (of rank 0). Its
options are its keyword-only parameters; one named ``generator`` is handed a ``torch.Generator``
on the CPU, seeded for each layer by itself.

A method of your own needs no fork:

    from lorasmith.fleet import merge

    @merge.register("median", form="dense", formula="scale · median_i ΔW_i")
    def median(deltas, weights, *, scale=1.0):
        return scale * torch.stack(deltas).median(dim=0).values

or the entry point ``lorasmith.merging`` of your package; ``--plugin FILE`` on the command line.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from lorasmith.errors import ConfigError, UnknownNameError

__all__ = ["MergeMethod", "MergeOption", "get_method", "methods", "register"]

_GROUP = "lorasmith.merging"
_ALIASES = {"cat": "concatenation", "dare_linear": "dare"}
_GENERATOR = "generator"

_methods: dict[str, MergeMethod] = {}
_entry_points_read = False

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeOption:
    """An option of a method.

    Attributes:
        name: The keyword.
        default: Its default.
    """

    name: str
    default: Any


@dataclass(frozen=True)
class MergeMethod:
    """How the changes of one layer become one.

    Attributes:
        name: Its name.
        function: (deltas, weights, **options) → delta.
        form: What it works on: ``"factors"`` or ``"dense"`` matrices.
        formula: What it computes, in one line.
        source: Where it is from.
        rank: Rank of the result unless the user says another: ``"stacked"`` Σ rᵢ, ``"exact"``
            the numerical rank of the result, ``"largest"`` that of the largest input.
        count: How many adapters it takes; ``None`` for any number.
        options: Its options.
        random: Whether it draws random numbers.
    """

    name: str
    function: Callable[..., Any]
    form: Literal["factors", "dense"]
    formula: str
    source: str
    rank: Literal["stacked", "exact", "largest"]
    count: int | None
    options: tuple[MergeOption, ...]
    random: bool

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options by name, with their defaults where they are not given.

        Raises:
            ConfigError: There is no such option, or its value has another type.
        """
        known = {option.name: option.default for option in self.options}
        for name, value in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"The merging method {self.name!r} has no option {name!r}.",
                    expected=", ".join(known) or "no options",
                    got=f"{name}={value!r}",
                    fix=f"did you mean {near[0]!r}?" if near else "leave it out",
                    key=name,
                )
            default = known[name]
            number = isinstance(default, int | float) and not isinstance(default, bool)
            fits = isinstance(value, int | float) if number else isinstance(value, type(default))
            if default is not None and (not fits or (number and isinstance(value, bool))):
                raise ConfigError(
                    f"The option {name!r} of {self.name!r} has an impossible type.",
                    expected=f"such as {default!r}",
                    got=repr(value),
                    key=name,
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(
                    f"{name} is not a number.", expected="a finite number", got=value, key=name
                )
        return {**known, **given}


def register(
    name: str,
    *,
    form: Literal["factors", "dense"],
    formula: str = "",
    source: str = "",
    rank: Literal["stacked", "exact", "largest"] = "largest",
    count: int | None = None,
    replace: bool = False,
) -> Callable[[_F], _F]:
    """Makes a function known as a merging method; a decorator.

    Args:
        name: Its name, a Python identifier.
        form: What it takes and gives: ``"factors"`` or ``"dense"``.
        formula: What it computes, for lists.
        source: Where it is from, for lists.
        rank: Rank of the result by default, see :class:`MergeMethod`.
        count: How many adapters it takes, if not any number.
        replace: Whether a method of the same name may be replaced.

    Raises:
        ConfigError: The name is taken or none, or the function has another form.
    """

    def add(function: _F) -> _F:
        if not name.isidentifier():
            raise ConfigError(
                "That cannot be the name of a method.",
                expected="letters, digits and underscores",
                got=repr(name),
            )
        if form not in ("factors", "dense"):
            raise ConfigError(
                "form is unknown.", expected="factors or dense", got=repr(form), key="form"
            )
        if (name in _methods or name in _ALIASES) and not replace:
            raise ConfigError(
                f"A merging method named {name!r} is registered already.",
                fix="choose another name, or pass replace=True",
            )
        parameters = list(inspect.signature(function).parameters.values())
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        options = [p for p in own if p.name != _GENERATOR]
        bare = [p.name for p in options if p.default is p.empty]
        if len(places) != 2 or bare:
            raise ConfigError(
                f"The merging method {name!r} takes other arguments than it should.",
                expected="(deltas, weights, *, option=default, …)",
                got=f"{function.__name__}{inspect.signature(function)}",
            )
        _methods[name] = MergeMethod(
            name=name,
            function=function,
            form=form,
            formula=formula,
            source=source,
            rank=rank,
            count=count,
            options=tuple(MergeOption(p.name, p.default) for p in options),
            random=len(options) < len(own),
        )
        return function

    return add


def methods() -> Mapping[str, MergeMethod]:
    """All methods by name, those of installed packages included (read-only)."""
    global _entry_points_read
    if not _entry_points_read:
        _entry_points_read = True
        for entry in entry_points(group=_GROUP):
            _load(entry)
    return MappingProxyType(_methods)


def _load(entry: EntryPoint) -> None:
    """Imports what an installed package names; that registers it."""
    try:
        entry.load()
    except Exception as error:
        raise ConfigError(
            f"The merging method {entry.name!r} of an installed package cannot be used: {error}",
            got=entry.value,
            key=f"{_GROUP}:{entry.name}",
        ) from error


def get_method(name: str) -> MergeMethod:
    """The method of that name; dashes are as good as underscores.

    Raises:
        UnknownNameError: There is none.
    """
    known = methods()
    plain = str(name).strip().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, n=1)
    raise UnknownNameError(
        f"There is no merging method named {name!r}.",
        expected=", ".join(known),
        got=name,
        fix=f"did you mean {near[0]!r}?"
        if near
        else "lorasmith.fleet.merge.register adds your own; on the command line, --plugin FILE",
        key="method",
    )
