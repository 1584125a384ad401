"""Stress over a training run: φ, its thresholds, and the modes as shaded spans."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from lorasmith.dynamics.stress_history import StressRecord
from lorasmith.errors import DataError
from lorasmith.web.figures import GRID, INK, MUTED, SERIES, figure_to_svg, themed

__all__ = ["stress_figure"]

_SHADES = {"multi": (SERIES[5], None), "mirror": (SERIES[1], "//")}


def stress_figure(history: Iterable[StressRecord], path: str | Path | None = None) -> str:
    """φ by step, with the modes shaded and rollbacks marked.

    Args:
        history: Records, as in ``StressController.history``.
        path: Where to write it, too, if anywhere: ``.svg``, ``.png`` or ``.pdf``, on white.

    Returns:
        SVG text; Single is left white, Multi is plain, Mirror hatched as well as coloured.

    Raises:
        DataError: The history is empty.
        MissingDependencyError: Matplotlib is not installed.
    """
    records = list(history)
    if not records:
        raise DataError("There is no history to draw.", expected="at least one record")
    with themed(width=7.2, height=4.5) as (figure, upper):
        from matplotlib.ticker import MaxNLocator

        upper.remove()
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.7))
        steps = [r.step for r in records]
        for axes in (upper, lower):
            for mode, (colour, hatch) in _SHADES.items():
                for number, (start, end) in enumerate(_spans(records, mode)):
                    axes.axvspan(
                        start - 0.5,
                        end + 0.5,
                        facecolor=colour,
                        edgecolor=colour,
                        hatch=hatch,
                        alpha=0.22,
                        linewidth=0,
                        label=mode.capitalize() if number == 0 else None,
                    )
        upper.plot(steps, [r.loss for r in records], color=MUTED, linewidth=1.0)
        finite = [r.loss for r in records if math.isfinite(r.loss)]
        upper.set_ylim(bottom=0 if not finite or min(finite) >= 0 else None)
        upper.set_ylabel("loss\n(nats per token)")
        parts = (
            ("error E", SERIES[2], (0, (4, 1.5)), [r.error for r in records]),
            ("conflict C", SERIES[3], (0, (1, 1)), [r.conflict for r in records]),
            ("memory S", SERIES[4], (0, (5, 1, 1, 1)), [r.memory for r in records]),
        )
        for label, colour, dashes, values in parts:
            lower.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.1, label=label)
        lower.plot(steps, [r.phi for r in records], color=SERIES[0], label="stress φ")
        back = [r for r in records if "rollback" in r.event]
        if back:
            lower.plot(
                [r.step for r in back],
                [r.phi for r in back],
                linestyle="none",
                marker="v",
                markersize=8,
                color=INK,
                label="rollback",
            )
        lower.set_ylim(-0.02, 1.02)
        lower.set_xlabel("optimiser step")
        lower.set_ylabel("stress and its parts\n(0 to 1)")
        lower.margins(x=0.01)
        lower.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        lower.axhline(0, color=GRID, linewidth=0.8)
        handles, labels = lower.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
        if path is not None:
            _write(figure, Path(path))
        return figure_to_svg(figure)


def _write(figure: Any, path: Path) -> None:
    """Writes the figure whole or not at all."""
    from lorasmith.io.atomic import replace_file

    buffer = io.BytesIO()
    form = path.suffix.lower().lstrip(".") or "png"
    figure.savefig(buffer, format=form, facecolor="white", dpi=160)

    def write(stream: BinaryIO) -> None:
        stream.write(buffer.getvalue())

    replace_file(path, write)


def _spans(records: list[StressRecord], mode: str) -> list[tuple[int, int]]:
    """(first, last step) of each stretch of a mode."""
    spans: list[tuple[int, int]] = []
    previous = None
    for record in records:
        if record.mode == mode:
            if previous == mode:
                spans[-1] = spans[-1][0], record.step
            else:
                spans.append((record.step, record.step))
        previous = record.mode
    return spans
