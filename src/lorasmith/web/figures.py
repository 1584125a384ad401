"""Matplotlib figures as SVG text that follows the light or dark theme of the page around it.

Matplotlib writes every colour as a literal. Here it draws with a handful of reserved
colours, and :func:`figure_to_svg` turns each of them into a CSS variable with that colour
as its fallback: inside a report the figure takes the page's theme, and on its own it is a
plain light figure. Text stays text (searchable, in the page's font).

The series colours are those of Okabe and Ito (2008), which people with the common forms of
colour blindness can tell apart; lines differ in their dashes and markers too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorasmith.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["GRID", "INK", "MUTED", "SERIES", "figure_to_svg", "loss_figure", "themed"]

INK = "#1b1f24"
"""Titles and what must be read."""
MUTED = "#5c6570"
"""Axis labels and ticks."""
GRID = "#e3e5e8"
"""Grid lines and spines."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of the data, in the order in which to use them."""

_VARIABLES = {
    INK: "--figure-ink",
    MUTED: "--figure-muted",
    GRID: "--figure-grid",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}

# More points than this do not show on a page, and only make the file larger.
_MAX_POINTS = 600


@contextmanager
def themed(*, width: float = 8.6, height: float = 3.4) -> Iterator[tuple[MatplotlibFigure, Axes]]:
    """A Matplotlib figure with one axes, drawn in the reserved colours of this module.

    The figure belongs to no window and no global state, and the settings hold only inside
    the ``with`` block, so a notebook's own style is neither used nor changed.

    Args:
        width: Width in inches; the page scales the figure to its column.
        height: Height in inches.

    Yields:
        The figure and its axes. Call :func:`figure_to_svg` inside the block.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "figures need Matplotlib, which is not installed",
            fix='pip install "lorasmith[plots]"',
        ) from error

    settings = {
        **mpl.rcParamsDefault,
        "axes.axisbelow": True,
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": MUTED,
        "axes.labelsize": 10,
        "axes.prop_cycle": cycler(color=list(SERIES)),
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "grid.color": GRID,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
        "svg.hashsalt": "lorasmith",
        "text.color": INK,
        "xtick.bottom": True,
        "xtick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.color": GRID,
        "ytick.labelcolor": MUTED,
        "ytick.left": False,
    }
    # Which window system to use is the program's choice, never a figure's.
    for key in ("backend", "interactive", "toolbar"):
        settings.pop(key, None)
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_subplot()


def figure_to_svg(figure: MatplotlibFigure) -> str:
    """A Matplotlib figure as SVG text that can stand inside an HTML page.

    Args:
        figure: Any figure; one made by :func:`themed` also follows the page's theme.

    Returns:
        One ``<svg>`` element without XML prologue, fixed size or embedded font. Equal
        figures give equal text.
    """
    buffer = io.StringIO()
    # No date: equal figures then give equal files.
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, count=1, flags=re.DOTALL)
    # The page decides how wide the figure is; viewBox keeps its proportions.
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(re.escape(colour), f"var({variable}, {colour})", svg, flags=re.IGNORECASE)
    # Matplotlib lists its own candidates, quotes included; the page's font is the right one.
    return re.sub(r"font-family:[^;\"]*;?\s*|(font:[^;\"]*?px)[^;\"]*", _keep_size, svg)


def _keep_size(match: re.Match[str]) -> str:
    # `font: 10px 'DejaVu Sans', ...` needs some family to be valid.
    return f"{match[1]} var(--figure-font, system-ui, sans-serif)" if match[1] else ""


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
