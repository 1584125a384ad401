"""How every figure of this package looks, and SVG text that follows the theme of its page.

Matplotlib writes every colour as a literal. Here it draws with a handful of reserved
colours, and :func:`figure_to_svg` turns each of them into a CSS variable with that colour
as its fallback: inside a report the figure takes the page's theme, and on its own it is a
plain light figure. Text stays text (searchable, in the page's font).

The series colours are those of Okabe and Ito (2008), which people with the common forms of
colour blindness can tell apart; lines differ in their dashes and markers too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorasmith.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["GRID", "INK", "MUTED", "SERIES", "canvas", "figure_to_svg", "style", "themed"]

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


@contextmanager
def canvas(width: float, height: float, *, font_size: float = 10) -> Iterator[MatplotlibFigure]:
    """An empty Matplotlib figure, to be drawn on in the reserved colours of this module.

    The figure belongs to no window and no global state, and the settings hold only inside
    the ``with`` block, so a notebook's own style is neither used nor changed.

    Args:
        width: Width in inches; the page scales the figure to its column.
        height: Height in inches.
        font_size: Of all text, in points.

    Yields:
        The figure. Save it, or call :func:`figure_to_svg`, inside the block.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    with style(font_size):
        from matplotlib.figure import Figure

        yield Figure(figsize=(width, height))


@contextmanager
def style(font_size: float = 10) -> Iterator[None]:
    """The settings of this module, within the ``with`` block.

    Matplotlib looks some of them up when a figure is saved, so that is to be done inside, too.

    Args:
        font_size: Of all text, in points.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from cycler import cycler
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
        "axes.labelsize": font_size,
        "axes.prop_cycle": cycler(color=list(SERIES)),
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": font_size,
        "grid.color": GRID,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "pdf.fonttype": 42,  # TrueType, as publishers ask for
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
        yield


@contextmanager
def themed(*, width: float = 8.6, height: float = 3.4) -> Iterator[tuple[MatplotlibFigure, Axes]]:
    """A figure with one axes, otherwise as :func:`canvas`.

    Args:
        width: Width in inches; the page scales the figure to its column.
        height: Height in inches.

    Yields:
        The figure and its axes. Call :func:`figure_to_svg` inside the block.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    with canvas(width, height) as figure:
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
    with style():
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
