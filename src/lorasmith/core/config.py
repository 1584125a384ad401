"""Adapter configurations: frozen dataclasses that validate themselves.

The same field has the same name and meaning in every variant. A configuration never
holds a tensor, a model or a path, so it can be compared, printed and written as JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, cast

from lorasmith.core.patterns import check_amount, check_regex, value_for
from lorasmith.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "LowRankConfig",
    "Targets",
    "check_count",
    "check_factor",
    "check_number",
    "check_probability",
    "checked_pattern",
    "is_number",
]

Targets: TypeAlias = str | Sequence[str]

SCALINGS = ("standard", "rslora")


def as_names(value: Targets | None, field_name: str) -> tuple[str, ...]:
    """Brings a string or a sequence of strings into a tuple without losing its order."""
    if value is None:
        return ()
    items: tuple[object, ...] = (value,)
    if not isinstance(value, str) and isinstance(value, Iterable):
        items = tuple(value)
    for item in items:
        if not isinstance(item, str) or not item:
            raise ConfigError(
                f"{field_name} holds something that is not a name.",
                expected="a string or a sequence of non-empty strings",
                got=repr(value),
                key=field_name,
            )
    names = cast("tuple[str, ...]", items)
    check_amount([n[3:] for n in names if n.startswith("re:")], key=field_name)
    return names


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every variant can be told.

    Args:
        targets: Which layers to adapt: ``"all-linear"`` (every linear-like layer but the
            output head), a role (``"attention"``, ``"mlp"``, ``"reader"``, ``"writer"``,
            ``"inner"``), a module name or the end of one (``"q_proj"``,
            ``"layers.0.mlp.up_proj"``), a glob (``"*.self_attn.?_proj"``) or a regular
            expression marked ``"re:"`` that must match the whole module name. A sequence
            takes the union.
        exclude: The same forms; what they match is left out.
        layers: Indices of the transformer blocks to adapt, negative ones counted from
            the last block. ``None`` adapts all of them.
        modules_to_save: Names of modules (ends of names, as in ``targets``) that are
            trained as a whole, as a copy, and saved beside the adapter, e.g. the new
            classification head of a sequence classifier.

    Raises:
        ConfigError: If a value cannot be used.
    """

    #: Name of the variant in the registry.
    variant: ClassVar[str] = ""

    targets: Targets = "all-linear"
    exclude: Targets = ()
    layers: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        targets = as_names(self.targets, "targets")
        if not targets:
            raise ConfigError(
                "targets is empty, so no layer would be adapted.",
                expected='"all-linear", a role, names, a glob or "re:<expression>"',
                key="targets",
            )
        # A lone string stays one: it is how people write it and how it reads back.
        self._set("targets", targets[0] if len(targets) == 1 else targets)
        self._set("exclude", as_names(self.exclude, "exclude"))
        self._set("modules_to_save", as_names(self.modules_to_save, "modules_to_save"))
        if self.layers is not None:
            given: object = self.layers
            layers = tuple(given) if isinstance(given, Iterable) else ()
            if not layers or not all(type(i) is int for i in layers):
                raise ConfigError(
                    "layers holds something that is not an index.",
                    expected="a non-empty sequence of integers, or None for all layers",
                    got=repr(self.layers),
                    key="layers",
                )
            self._set("layers", layers)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def target_list(self) -> tuple[str, ...]:
        """``targets`` as a tuple, whatever form the user gave."""
        return as_names(self.targets, "targets")

    def to_dict(self) -> dict[str, Any]:
        """All fields and the variant's name, in types that JSON can hold."""
        values: dict[str, Any] = {"variant": self.variant}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            values[f.name] = value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The inverse of :meth:`to_dict`; an unknown field is an error."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"variant"})
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}.",
                expected=f"fields among {', '.join(sorted(known))}",
                got=", ".join(unknown),
                key=unknown[0],
            )
        return cls(**{k: v for k, v in values.items() if k != "variant"})


def check_count(value: object, key: str, what: str = "rank") -> None:
    """Raises a ``ConfigError`` unless ``value`` is an integer of at least 1."""
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{key} is not a usable {what}.",
            expected="an integer of at least 1",
            got=repr(value),
            key=key,
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(value)  # type: ignore[arg-type]


def check_number(value: object, key: str) -> None:
    """Raises a ``ConfigError`` unless ``value`` is a finite number."""
    if not is_number(value):
        raise ConfigError(f"{key} is not a finite number.", got=repr(value), key=key)


def check_factor(value: object, key: str) -> None:
    """Raises a ``ConfigError`` unless ``value`` is a finite number other than 0."""
    if not is_number(value) or value == 0:
        raise ConfigError(
            f"{key} is not a usable factor: at 0 the adapter would do nothing and learn nothing.",
            expected="a finite number other than 0",
            got=repr(value),
            key=key,
        )


def check_probability(value: object, key: str) -> None:
    """Raises a ``ConfigError`` unless 0 <= ``value`` < 1."""
    if not is_number(value) or not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ConfigError(
            f"{key} is not a probability below 1.",
            expected=f"0 <= {key} < 1",
            got=repr(value),
            key=key,
        )


def checked_pattern(
    value: object, key: str, check: Callable[[object, str], None]
) -> dict[str, Any]:
    """A copy of a mapping from module names to values.

    Args:
        value: What the user gave.
        key: Name of the field.
        check: Called with each value and what to call it.

    Raises:
        ConfigError: If it is no such mapping, a name is no valid regular expression, or
            ``check`` refuses a value.
    """
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and k for k in value):
        raise ConfigError(
            f"{key} is not a mapping of names.",
            expected="{module name, its end, or a regular expression: number}",
            got=repr(value),
            key=key,
        )
    check_amount(value, key=key)
    for pattern, item in value.items():
        check_regex(pattern, key=key)
        check(item, f"{key}[{pattern!r}]")
    return dict(value)


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What every low-rank variant can be told, beyond :class:`AdapterConfig`.

    Args:
        r: Rank of the update, the number of rows of A and of columns of B.
        alpha: Numerator of the scaling.
        dropout: Probability with which an element of the input of A is zeroed during
            training (elementwise, scaled up by 1 / (1 - dropout)); never applied to the
            base layer's input.
        scaling: ``"standard"`` for alpha / r (Hu et al. 2021, section 4.1) or
            ``"rslora"`` for alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        init: Name of the initialisation, see ``lorasmith.init``.
        rank_pattern: Module name, its end, or a regular expression for its end → rank
            of the layers it matches (PEFT's rule: the first key that matches wins).
        alpha_pattern: The same for alpha.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: str = "standard"
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r")
        check_factor(self.alpha, "alpha")
        check_probability(self.dropout, "dropout")
        if self.scaling not in SCALINGS:
            raise ConfigError(
                "scaling is not a known rule.",
                expected=" or ".join(SCALINGS),
                got=repr(self.scaling),
                key="scaling",
            )
        init: object = self.init
        if not isinstance(init, str):
            raise ConfigError("init is not a name.", got=repr(init), key="init")
        self._set("rank_pattern", checked_pattern(self.rank_pattern, "rank_pattern", check_count))
        self._set(
            "alpha_pattern", checked_pattern(self.alpha_pattern, "alpha_pattern", check_number)
        )

    def rank_of(self, module_name: str) -> int:
        """Rank for the layer of that name."""
        return value_for(self.rank_pattern, module_name, self.r)

    def alpha_of(self, module_name: str) -> float:
        """Alpha for the layer of that name."""
        return value_for(self.alpha_pattern, module_name, self.alpha)

    def scaling_of(self, module_name: str) -> float:
        """The factor on B A for the layer of that name."""
        rank = self.rank_of(module_name)
        divisor = math.sqrt(rank) if self.scaling == "rslora" else rank
        return self.alpha_of(module_name) / divisor
