"""The shape of an initialisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Initialisation", "Shape", "Start"]


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


class Initialisation(Protocol):
    """A way to start.

    Args:
        weight: Gives W [d_out, d_in]; called only if it is needed, since a quantised
            weight cannot be read.
        shape: Sizes of the layer.
        rank: r.
        scaling: s, the factor on B A.
    """

    def __call__(
        self, weight: Callable[[], Tensor], shape: Shape, rank: int, scaling: float
    ) -> Start: ...
