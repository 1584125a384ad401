"""A seeded search for the weights of a merge, under a budget of trials.

    w = s p        p on the simplex, s > 0 the sum of the weights

Trial 1 is the mean, p = (1/N, …), s = 1. Of the rest, the first half are drawn anew: p ~
Dirichlet(1, …, 1), log₂ s uniform in [−1, max(1, log₂ N)] (sums above 1 often win: the paper on
task arithmetic takes λ of 0.3 to 0.5 per task). The second half start from the best so far: every
weight is multiplied by exp(σ ξ), ξ ~ N(0, 1), with σ falling from 0.5 to 0.05.

Weights are never negative. The generator is numpy's, seeded; no global state is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorasmith.errors import ConfigError

__all__ = ["Trial", "search_weights"]

_WIDE, _NARROW = 0.5, 0.05


@dataclass(frozen=True)
class Trial:
    """One set of weights that was tried.

    Attributes:
        weights: The weights.
        score: What the objective gave; lower is better.
    """

    weights: tuple[float, ...]
    score: float


def search_weights(
    objective: Callable[[Sequence[float]], float],
    count: int,
    *,
    trials: int = 20,
    seed: int = 0,
    sums: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Trial, ...]:
    """Tries weights; gives all trials, best first.

    Args:
        objective: Weights → score, lower is better; one that is not finite is the worst.
        count: Number of adapters.
        trials: How often to call it.
        seed: Of the draws.
        sums: Whether the sum of the weights may change; else it is 1.
        progress: Called with ("search", trials done, trials in all).

    Raises:
        ConfigError: There are no trials or no adapters.
    """
    counts: dict[str, object] = {"trials": trials, "count": count}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{name} is no count.", expected="at least 1", got=repr(value), key=name
            )
    random = np.random.default_rng(seed)
    done: list[Trial] = []
    fresh = 1 + trials // 2
    for number in range(trials):
        if number == 0:
            weights = np.full(count, 1 / count)
        elif number < fresh:
            weights = random.dirichlet(np.ones(count))
            size = random.uniform(-1.0, max(1.0, math.log2(count)))
            weights = weights * 2.0**size if sums else weights
        else:
            share = (number - fresh) / max(1, trials - fresh - 1)
            sigma = _WIDE * (_NARROW / _WIDE) ** share
            best = np.array(min(done, key=lambda t: t.score).weights)
            weights = best * np.exp(sigma * random.standard_normal(count))
            weights = weights if sums else weights / weights.sum()
        chosen = tuple(float(w) for w in weights)
        score = float(objective(chosen))
        done.append(Trial(chosen, score if math.isfinite(score) else math.inf))
        if progress is not None:
            progress("search", number + 1, trials)
    return tuple(sorted(done, key=lambda t: t.score))
