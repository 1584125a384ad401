"""Options of a shared subspace: their defaults, and the refusal of values that are not usable.

Every check raises a ``ConfigError`` that names the option and what it may be. Nothing here looks
at an adapter or a layer.
"""

from __future__ import annotations

from typing import Literal, get_args

from lorasmith.errors import ConfigError
from lorasmith.fleet.building import GAUGES, Target
from lorasmith.fleet.codec import Codec, codec_of
from lorasmith.fleet.quantizing import FOUR_BITS

__all__ = [
    "BASES",
    "CORES",
    "DEFAULT_ERROR",
    "MEMORY",
    "Basis",
    "budget_of",
    "check_bits",
    "check_choice",
    "check_gauge",
    "check_rank",
    "check_share",
    "codecs_of",
    "target_of",
]

#: Which basis.
Basis = Literal["joint", "share"]
BASES: tuple[Basis, ...] = get_args(Basis)
#: What is kept of a core of the joint basis.
CORES = ("full", "diagonal")
#: Share of ‖ΔW‖² that an adapter may lose unless told otherwise.
DEFAULT_ERROR = 0.05
#: Bytes of factors in memory while a basis is built.
MEMORY = 2**31


def target_of(
    error: float | None,
    variance: float | None = None,
    components: int | None = None,
    per_layer: bool = True,
) -> Target:
    """How many directions to keep, of the three ways to say it; :data:`DEFAULT_ERROR` without one.

    Args:
        error: The most that each adapter may lose, 0 to 1.
        variance: The share of ‖ΔW‖² that every layer keeps in the mean, 0 to 1.
        components: Directions or components of every layer, at least 1.
        per_layer: Whether layers may differ in number.

    Raises:
        ConfigError: More than one is given, or one is not usable.
    """
    given = [
        k
        for k, v in (("error", error), ("variance", variance), ("components", components))
        if v is not None
    ]
    if len(given) > 1:
        raise ConfigError(
            "These exclude each other.", expected="one of them", got=", ".join(given), key=given[1]
        )
    if components is not None and (type(components) is not int or components < 1):
        raise ConfigError(
            "components is not usable.",
            expected="an integer of at least 1",
            got=repr(components),
            key="components",
        )
    if variance is not None:
        check_share("variance", variance)
    if not given:
        error = DEFAULT_ERROR
    if error is not None:
        check_share("error", error)
    return Target(error, variance, components, per_layer)


def budget_of(target: Target) -> float:
    """The error that a fleet keeps from then on: that of the target, or the default."""
    return target.error if target.error is not None else DEFAULT_ERROR


def check_share(name: str, value: float) -> float:
    """The value, if it is a number from 0 to 1; else a ``ConfigError`` about the option."""
    number: object = value
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1:
        return float(number)
    raise ConfigError(f"{name} is not a share.", expected="0 to 1", got=repr(value), key=name)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ``ConfigError`` about the option if the value is not one of the choices."""
    if value not in choices:
        raise ConfigError(
            f"{name} is not usable.",
            expected=", ".join(map(repr, choices)),
            got=repr(value),
            key=name,
        )


def check_gauge(value: str) -> None:
    """Raises a ``ConfigError`` if that is not a gauge, nor ``"auto"``."""
    check_choice("gauge", value, ("auto", *GAUGES))


def check_bits(bits: int | str | None) -> None:
    """Raises a ``ConfigError`` if there is no codec of so many bits; ``None`` rounds nothing."""
    if bits is not None:
        codec_of(bits)


def codecs_of(
    bits: int | str,
    basis: int | str | None = None,
    codes: int | str | None = None,
    residuals: int | str | None = None,
    *,
    loadings: bool = False,
) -> dict[str, Codec]:
    """Part of a layer → how to store it in so many bits.

    Args:
        bits: 32, 16, 8, 4 or ``"nf4"``; see :mod:`lorasmith.fleet.codec`.
        basis: Of the basis, if others.
        codes: Of the codes, if others.
        residuals: Of the residuals, if others.
        loadings: Whether codes are loadings, which have 8 bits at least unless ``codes`` says
            otherwise.

    Raises:
        ConfigError: There is no such codec.
    """
    found: dict[str, Codec] = {}
    for parts, own in (
        (("up", "down"), basis),
        (("left", "right"), codes),
        (("residual_up", "residual_down"), residuals),
    ):
        codec = codec_of(bits if own is None else own)
        if own is None and loadings and "left" in parts and codec in FOUR_BITS:
            codec = "int8"
        found |= dict.fromkeys(parts, codec)
    return found


def check_rank(rank: object) -> None:
    """Raises a ``ConfigError`` if an adapter cannot be reconstructed with that rank."""
    if rank not in ("original", "exact") and (type(rank) is not int or rank < 1):
        raise ConfigError(
            "rank is not usable.",
            expected='"original", "exact", or an integer of at least 1',
            got=repr(rank),
            key="rank",
        )
