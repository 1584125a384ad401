"""E of the stress controller: how far a loss is above what it was, whatever its size.

With m the median of the last three losses (one outlier is not a shock), t their number:

    f ← f + max(ρ, 1/t) (m − f)                     a fast average; ρ = 0.2
    σ ← σ + c · max(0.02, 1/(t − 1)) (|loss − loss before| − σ)
    b ← f                                           where f < b: the baseline follows down at once
    b ← b + c · max(0.02, 1/t) (f − b)              else
    e = max(0, f − b − σ) / (|b| + σ),    E = e / (0.06 + e)

c is 1, and 0.1 while E ≥ ½: a shock must not become the new normal. σ is taken from
differences, which a falling loss does not widen, so that a run is known well after a few steps,
where the loss falls fastest. The 1/t let a first loss that was low by chance be forgotten.

A loss that only falls gives 0, and so does noise within σ. The constants come from
``benchmarks/stress_calibration.py``; what they detect and what they miss is in
docs/dynamics-stress.md.

Limits. A loss that stays higher for good (harder data, another task) is a shock at first: b needs
hundreds of steps, if nobody calls :meth:`LossBaseline.accept`. A rise of less than a third, or
within the noise, is not seen; nor, for some hundred steps, is one that follows an outlier of a
hundred times the level, which widens σ.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lorasmith.dynamics.stress_signals import relative_excess, saturate

__all__ = ["LossBaseline"]

_RISE = 0.02
_SPREAD = 0.02
#: c.
_STRESSED = 0.1
_HALF = 0.06


@dataclass
class LossBaseline:
    """Averages of one loss.

    Attributes:
        fast: f.
        slow: b.
        spread: σ.
        error: E.
        share: How often the task of this loss comes, for whoever has several.
        steps: t.
        recent: The last losses, up to three.
    """

    fast: float
    slow: float
    spread: float = 0.0
    error: float = 0.0
    share: float = 0.0
    steps: int = 0
    recent: tuple[float, ...] = ()

    def update(self, loss: float, rate: float) -> None:
        """Takes a loss in; it must be finite.

        Args:
            loss: In nats, of any sign.
            rate: ρ.
        """
        if self.recent:
            change = abs(loss - self.recent[-1])
            self.spread += self._slowed(max(_SPREAD, 1 / self.steps)) * (change - self.spread)
        self.steps += 1
        self.recent = (*self.recent[-2:], loss)
        self.fast += max(rate, 1 / self.steps) * (statistics.median(self.recent) - self.fast)
        self.error = self.error_of(self.fast)
        if self.fast < self.slow:
            self.slow = self.fast
        else:
            self.slow += self._slowed(max(_RISE, 1 / self.steps)) * (self.fast - self.slow)

    def _slowed(self, rate: float) -> float:
        return rate if self.error < 0.5 else _STRESSED * rate

    def error_of(self, loss: float) -> float:
        """E of a loss against this baseline."""
        return saturate(relative_excess(loss, self.slow, self.spread), _HALF)

    @property
    def now(self) -> float:
        """E of the last three losses alone, without any average of what was before."""
        return self.error_of(statistics.median(self.recent)) if self.recent else 0.0

    def accept(self) -> None:
        """Takes the present level for the new baseline."""
        self.slow, self.error = self.fast, 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LossBaseline:
        """The baseline that a state is of."""
        return cls(**{**state, "recent": tuple(state["recent"])})
