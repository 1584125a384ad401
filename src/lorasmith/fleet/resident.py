"""What of a fleet is unpacked at the moment: least recently used goes first.

A fleet holds its cores and residuals packed (int8, int4, nf4 …); to act they must be unpacked,
all layers of a task at a time. Unpacked tasks are kept until together they exceed a budget of
bytes; then those go that have not been asked for the longest. What acts at the moment is held
by the layers and stays until something else acts, whatever the budget.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorasmith.errors import ConfigError
from lorasmith.fleet.serving import Piece

__all__ = ["Resident", "ResidentStats"]

#: Module name → what a task has there.
Pieces = Mapping[str, Piece]


@dataclass(frozen=True)
class ResidentStats:
    """How often what was asked for was there.

    Attributes:
        hits: Tasks asked for that were unpacked.
        misses: Tasks that had to be unpacked.
        evictions: Tasks that went because the budget was exceeded.
        tasks: Those that are unpacked, the one asked for the longest ago first.
        nbytes: Bytes that they take.
        budget: Bytes that they may take, ``None`` for any number.
    """

    hits: int
    misses: int
    evictions: int
    tasks: tuple[str, ...]
    nbytes: int
    budget: int | None

    @property
    def hit_rate(self) -> float | None:
        """Share of hits, ``None`` before the first question."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {**asdict(self), "tasks": list(self.tasks), "hit_rate": self.hit_rate}


class Resident:
    """The unpacked tasks.

    Args:
        unpack: Task → its pieces.
        budget: Bytes that unpacked tasks may take; ``None`` for any number.

    Raises:
        ConfigError: If the budget is not a positive integer.
    """

    def __init__(self, unpack: Callable[[str], Pieces], budget: int | None = None) -> None:
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ConfigError(
                "The budget is not usable.",
                expected="a number of bytes, at least 1, or None",
                got=repr(budget),
                key="budget_bytes",
            )
        self._unpack = unpack
        self._budget = budget
        self._kept: OrderedDict[str, tuple[Pieces, int]] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = self._evictions = 0

    def get(self, task: str, fresh: Callable[[Pieces], bool] | None = None) -> Pieces:
        """What a task has, unpacked if need be.

        Args:
            task: Its id.
            fresh: Whether what is kept still holds (device, base weights); always by default.
        """
        found = self._kept.get(task)
        if found is not None and (fresh is None or fresh(found[0])):
            self._hits += 1
            self._kept.move_to_end(task)
            return found[0]
        self.drop(task)
        self._misses += 1
        with torch.inference_mode(False), torch.no_grad():
            pieces = self._unpack(task)
        size = sum(piece.nbytes for piece in pieces.values())
        self._kept[task] = (pieces, size)
        self._bytes += size
        while self._budget is not None and self._bytes > self._budget and self._kept:
            _, (_, gone) = self._kept.popitem(last=False)
            self._bytes -= gone
            self._evictions += 1
        return pieces

    def drop(self, task: str | None = None) -> None:
        """Forgets a task, or with ``None`` all."""
        if task is None:
            self._kept.clear()
            self._bytes = 0
        elif task in self._kept:
            self._bytes -= self._kept.pop(task)[1]

    @property
    def stats(self) -> ResidentStats:
        """The figures so far."""
        return ResidentStats(
            self._hits, self._misses, self._evictions, tuple(self._kept), self._bytes, self._budget
        )
