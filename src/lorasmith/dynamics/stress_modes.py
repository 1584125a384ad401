"""When the stress controller changes its mode: hysteresis, rest and patience.

A mode is entered at one φ and left at a lower one. After a change its kind rests for
c, 3c, 9c … steps, by the number of earlier changes of that kind in the last 20 c steps: at most
4 of a kind in 2000 steps for c = 100, whatever φ does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Patience", "Switch"]

_FALLEN = 0.02


@dataclass
class Switch:
    """A state with hysteresis, and a rest after each change that grows if changes come thick.

    Attributes:
        leave: φ below which it is left.
        enter: φ from which it is entered.
        cooldown: c.
        on: Whether it is entered.
        rest: Steps until it may change again.
        ages: Steps since each of the changes that still count.
    """

    leave: float
    enter: float
    cooldown: int
    on: bool = False
    rest: int = 0
    ages: tuple[int, ...] = ()

    def tick(self) -> None:
        """One step passes."""
        window = 20 * self.cooldown
        self.rest = max(0, self.rest - 1)
        self.ages = tuple(age + 1 for age in self.ages if age + 1 < window)

    def wants(self, phi: float, *, may_enter: bool) -> bool:
        """Whether to change now."""
        if self.rest:
            return False
        return phi < self.leave if self.on else may_enter and phi >= self.enter

    def change(self) -> None:
        """Enters or leaves, and rests."""
        self.on = not self.on
        self.rest = self.cooldown * 3 ** len(self.ages)
        self.ages = (*self.ages, 0)

    def state(self) -> list[object]:
        """What changes."""
        return [self.on, self.rest, list(self.ages)]

    def restore(self, state: Sequence[object]) -> None:
        """Goes back to a state."""
        self.on, self.rest, ages = state  # type: ignore[assignment]
        self.ages = tuple(ages)  # type: ignore[arg-type]


@dataclass
class Patience:
    """Whether a mode that should bring φ down does so: by 0.02 in so many steps.

    Attributes:
        limit: How many.
        steps: Steps since φ was last compared.
        reference: φ then.
        tries: How often in a row it had not fallen.
    """

    limit: int
    steps: int = 0
    reference: float = 0.0
    tries: int = 0

    def start(self, phi: float) -> None:
        """The mode begins."""
        self.steps, self.reference, self.tries = 0, phi, 0

    def ended(self, phi: float) -> bool:
        """One step passes; whether φ has not fallen in the last ``limit`` of them."""
        self.steps += 1
        if self.steps < self.limit:
            return False
        fallen = phi <= self.reference - _FALLEN
        self.steps, self.reference = 0, phi
        return not fallen
