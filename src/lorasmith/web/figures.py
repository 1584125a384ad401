"""Figures of a training run; how figures look is in ``lorasmith.theme``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.errors import DataError
from lorasmith.theme import GRID, INK, MUTED, SERIES, figure_to_svg, themed

__all__ = ["GRID", "INK", "MUTED", "SERIES", "figure_to_svg", "loss_figure", "themed"]

# More points than this do not show on a page, and only make the file larger.
_MAX_POINTS = 600


def loss_figure(history: Sequence[Mapping[str, Any]]) -> str:
    """The loss curve of one training run.

    Args:
        history: One mapping a log entry, as in ``Trainer.state.log_history``: ``step`` with
            ``loss`` (training) or ``eval_loss`` (held out), both in nats a token. Other keys,
            and entries with neither, are passed over; a non-finite loss leaves a gap.

    Returns:
        SVG text. Where the training loss has at least 20 entries, its centred moving
        average is drawn over the faint raw values.

    Raises:
        DataError: No entry holds a step with a loss.
        MissingDependencyError: Matplotlib is not installed.
    """
    train = _series(history, "loss")
    held_out = _series(history, "eval_loss")
    if not train and not held_out:
        keys = sorted({key for entry in history for key in entry})
        raise DataError(
            "there is no loss to draw",
            expected="entries with 'step' and 'loss' or 'eval_loss'",
            got=f"{len(history)} entries with the keys {keys}",
            fix="log at least one step (for the Trainer: logging_steps)",
        )
    with themed() as (figure, axes):
        from matplotlib.ticker import MaxNLocator

        if train:
            steps, losses = zip(*train, strict=True)
            if len(train) >= 20:
                axes.plot(steps, losses, color=SERIES[0], alpha=0.28, linewidth=1.0)
                axes.plot(steps, _smoothed(losses), color=SERIES[0], label="training (smoothed)")
            else:
                axes.plot(
                    steps, losses, color=SERIES[0], marker="o", markersize=3.5, label="training"
                )
        if held_out:
            steps, losses = zip(*held_out, strict=True)
            axes.plot(
                steps,
                losses,
                color=SERIES[1],
                linestyle=(0, (5, 2)),
                marker="s",
                markersize=5,
                label="held out",
            )
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss (nats per token)")
        finite = [loss for _, loss in train + held_out if math.isfinite(loss)]
        axes.set_ylim(bottom=0 if not finite or min(finite) >= 0 else None)
        axes.margins(x=0.015)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axes.legend(loc="upper right", ncols=2)
        return figure_to_svg(figure)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [
        (float(entry["step"]), float(entry[key]))
        for entry in history
        if entry.get("step") is not None and entry.get(key) is not None
    ]
    stride = math.ceil(len(points) / _MAX_POINTS)
    # The last point is the one people look for, so it is always kept.
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _smoothed(values: Sequence[float]) -> list[float]:
    # Centred, since a trailing average lags: it would draw a falling training loss above the
    # held-out loss and so look like the opposite of over-fitting. Near both ends the window
    # narrows, so that the curve starts and ends on the data.
    half = max(len(values) // 24, 2)
    result = []
    for here in range(len(values)):
        reach = min(half, here, len(values) - 1 - here)
        window = [x for x in values[here - reach : here + reach + 1] if math.isfinite(x)]
        keep = math.isfinite(values[here])
        result.append(sum(window) / len(window) if keep else math.nan)
    return result
