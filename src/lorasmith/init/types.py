"""The shape of an initialisation."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.core.variant import BaseLayer

__all__ = ["Initialisation", "Shape", "Start", "Weight"]

#: Gives W [d_out, d_in]; called only if it is needed, since a quantised weight may not be
#: readable, and is dequantised for each call.
Weight = Callable[[], Tensor]

NO_STATISTICS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer and where its adapter is to be made."""

    d_out: int
    d_in: int
    device: torch.device


@dataclass(frozen=True)
class Start:
    """How a pair of factors starts.

    Attributes:
        A: [r, d_in], float32.
        B: [d_out, r], float32.
        takes_over: Whether B A is part of W, to be subtracted from what the base does.
    """

    A: Tensor
    B: Tensor
    takes_over: bool = False


@dataclass(frozen=True)
class Initialisation(ABC):
    """A way to start. Its options are the fields of the subclass, a frozen dataclass.

    A subclass checks its options in ``__post_init__`` (with :func:`check_choice` and its
    like), and is listed in ``lorasmith.init.INITIALISATIONS``.
    """

    name: ClassVar[str]

    @property
    def reads_weight(self) -> bool:
        """Whether it must know W."""
        return False

    @property
    def corrects(self) -> bool:
        """Whether it corrects the error of quantised layers, given their original weights.

        Its statistics then have ``"original"`` for such a layer: a function of the
        dequantised weight that gives W [d_out, d_in].
        """
        return False

    def statistics(self, rank: int) -> frozenset[str]:
        """Which statistics of calibration data it needs: see ``core.calibration``.

        Args:
            rank: The largest rank of any layer.
        """
        return frozenset()

    def adjust(self, config: Any, bases: Sequence[BaseLayer]) -> Any:
        """The configuration to use on these layers: e.g. with ranks chosen by calibration.

        Args:
            config: A ``LoRAConfig``.
            bases: The layers, with their statistics.
        """
        return config

    @abstractmethod
    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        """The factors of one layer.

        Args:
            weight: Gives W [d_out, d_in].
            shape: Sizes of the layer.
            rank: r.
            scaling: s, the factor on B A.
            statistics: What :meth:`statistics` asked for, of this layer.

        Raises:
            ConfigError: If the layer has not what it takes.
        """

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Initialisation:
        """The initialisation with these options; the others take their defaults.

        Raises:
            ConfigError: If it does not have such an option, or refuses its value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise ConfigError(
                    f"init={cls.name!r} has no option {key!r}.",
                    expected=f"options among {', '.join(known)}" if known else "no options",
                    got=key,
                    key="init_options",
                )
        return cls(**options)


def check_choice(init: str, key: str, value: object, choices: Sequence[str]) -> None:
    """Raises a ``ConfigError`` unless the option is one of the choices."""
    if value not in choices:
        raise ConfigError(
            f"{key} of init={init!r} is not one of its choices.",
            expected=", ".join(choices),
            got=repr(value),
            key=f"init_options[{key!r}]",
        )


def check_flag(init: str, key: str, value: object) -> None:
    """Raises a ``ConfigError`` unless the option is true or false."""
    if type(value) is not bool:
        raise ConfigError(
            f"{key} of init={init!r} is neither true nor false.",
            got=repr(value),
            key=f"init_options[{key!r}]",
        )


def check_number(
    init: str,
    key: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> None:
    """Raises a ``ConfigError`` unless the option is a number in its range."""
    good = (
        not isinstance(value, bool)
        and isinstance(value, int if whole else int | float)
        and math.isfinite(value)
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
    )
    if not good:
        kind = "an integer" if whole else "a number"
        limit = f" of at least {at_least:g}" if at_least is not None else ""
        limit += f" above {above:g}" if above is not None else ""
        raise ConfigError(
            f"{key} of init={init!r} cannot be used.",
            expected=kind + limit,
            got=repr(value),
            key=f"init_options[{key!r}]",
        )


def check_rank(init: str, rank: int, limit: int, what: str) -> None:
    """Raises a ``ConfigError`` if there are not as many directions as are needed.

    Args:
        init: Name of the initialisation.
        rank: r.
        limit: The largest r that works.
        what: What there are too few of: ``"r singular vectors of W"``.
    """
    if rank > limit:
        more = "give more calibration data, " if "calibration" in what else ""
        raise ConfigError(
            f"init={init!r} needs {what}, and there are fewer.",
            expected=f"r <= {limit}",
            got=rank,
            fix=f"{more}lower r, exclude the layer, or give it a rank of its own in rank_pattern",
            key="r",
        )


def check_scaling(init: str, scaling: float) -> None:
    """Raises a ``ConfigError`` unless s is positive, so that it has a square root."""
    if scaling <= 0:
        raise ConfigError(
            f"init={init!r} needs a positive scaling.",
            expected="alpha > 0",
            got=scaling,
            key="alpha",
        )


def blank(shape: Shape, rank: int, *, takes_over: bool = False) -> Start:
    """Factors without values, for a layer on the meta device."""
    return Start(
        torch.empty(rank, shape.d_in, device=shape.device),
        torch.empty(shape.d_out, rank, device=shape.device),
        takes_over,
    )
