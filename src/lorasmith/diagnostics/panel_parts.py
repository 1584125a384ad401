"""Parts of which the panels of a diagnosis are made: cells, boxes, axes, lines and legends.

Each function draws one thing into axes that it is given, and decides nothing about what a figure
holds: that is for :mod:`~lorasmith.diagnostics.angle_panels` and
:mod:`~lorasmith.diagnostics.further_panels`. Here is what all panels say in the same way:
hatching below the noise floor, a cross for an angle that is not a number, thresholds only where
the data reach them, ticks that are plain numbers, and legends that never lie on data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorasmith.diagnostics.modes import DANGER_DEG, WARNING_DEG
from lorasmith.diagnostics.panel_scales import (
    THETA,
    Canvas,
    Grid,
    even_sample,
    font_size,
)
from lorasmith.diagnostics.records import RotationReport, UnitRotation
from lorasmith.theme import GRID, INK, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = [
    "cell_image",
    "cell_means",
    "colour_bar",
    "floor_span",
    "index_ticks",
    "layer_axis",
    "legend_above",
    "log_ticks",
    "reference_line",
    "reference_lines",
    "theta_axis",
    "unit_boxes",
]

#: Points drawn for a projection: more only make the file larger.
_POINTS = 150


def cell_means(
    units: Sequence[UnitRotation],
    rows: Sequence[Any],
    layers: Sequence[int | None],
    row_of: Callable[[UnitRotation], Any],
) -> tuple[Grid, NDArray[np.bool_]]:
    """Mean θ [rows, layers], infinite where there is no unit; and whether it is below noise."""
    row_at = {row: i for i, row in enumerate(rows)}
    layer_at = {layer: i for i, layer in enumerate(layers)}
    shape = (len(rows), len(layers))
    total, count, floor = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for u in units:
        at = row_at[row_of(u)], layer_at[u.layer]
        total[at] += u.theta_deg
        count[at] += 1
        floor[at] = max(floor[at], u.floor_deg)
    values = np.full(shape, math.inf)
    np.divide(total, count, out=values, where=count > 0)
    return values, values < floor


def cell_image(axes: Axes, values: Grid, below: NDArray[np.bool_], norm: Any, written: bool) -> Any:
    """Cells [rows, layers] in colours; hatched where ``below``, crossed where not a number."""
    image = axes.imshow(
        np.ma.masked_invalid(values), aspect="auto", cmap="viridis", norm=norm,
        interpolation="none",
    )  # fmt: skip
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if below.any():
        _hatch_cells(axes, below)
    broken = np.argwhere(np.isnan(values))
    if len(broken):
        axes.plot(broken[:, 1], broken[:, 0], linestyle="none", marker="x", color=SERIES[1],
                  markersize=4, markeredgewidth=1)  # fmt: skip
    if written:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                # viridis turns light at about two thirds.
                colour = "#000000" if norm(max(value, norm.vmin)) > 0.6 else "#ffffff"
                text = f"{value:.2g}" if 0 < value < 1 else f"{value:.3g}"
                axes.text(column, row, text, ha="center", va="center", color=colour,
                          fontsize="small")  # fmt: skip
    return image


def _hatch_cells(axes: Axes, below: NDArray[np.bool_]) -> None:
    """One path over all cells that are below the noise floor."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as MatplotlibPath

    boxes = []
    for row in range(below.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], below[row].astype(int), [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            x0, x1, y0, y1 = start - 0.5, end - 0.5, row - 0.5, row + 0.5
            corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
            boxes.append(MatplotlibPath(corners, closed=True))
    path = MatplotlibPath.make_compound_path(*boxes)
    # White shows on the dark end of the map, where what is small lies.
    patch = PathPatch(path, facecolor="none", edgecolor="#ffffff", hatch="////", linewidth=0)
    axes.add_patch(patch)


def colour_bar(figure: Canvas, image: Any, axes: Any) -> None:
    """Beside the axes, with plain numbers."""
    from matplotlib.colors import LogNorm

    bar = figure.colorbar(image, ax=axes, label=THETA, pad=0.02, fraction=0.05, aspect=16)
    bar.outline.set_visible(False)
    if isinstance(image.norm, LogNorm):
        log_ticks(bar.ax.yaxis, image.norm.vmin or 1e-9, image.norm.vmax or 1.0)
        bar.ax.minorticks_off()
    bar.ax.tick_params(length=2)


def unit_boxes(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    edge: float,
    colours: Sequence[str],
) -> None:
    """A row a label: points, the middle half and median, whiskers from 5 to 95 %."""
    rng = np.random.default_rng(0)  # the same figure each time
    for row, (group, colour) in enumerate(zip(values, colours, strict=True)):
        if not group:
            axes.text(0.01, row, "no finite angle", transform=axes.get_yaxis_transform(),
                      va="center", color=MUTED, fontsize="small")  # fmt: skip
            continue
        data = np.maximum(group, edge)
        points = np.array(even_sample(sorted(data.tolist()), _POINTS))
        axes.plot(
            points,
            row + (rng.uniform(-0.3, 0.3, len(points)) if len(points) > 1 else 0.0),
            linestyle="none",
            marker="o",
            markersize=2.2 if len(points) > 8 else 4,
            markeredgewidth=0,
            alpha=0.45,
            color=colour,
        )
        if len(data) < 4:
            continue
        low, first, median, third, high = np.percentile(data, [5, 25, 50, 75, 95])
        axes.hlines(row, low, first, color=INK, linewidth=0.9)
        axes.hlines(row, third, high, color=INK, linewidth=0.9)
        axes.barh(row, third - first, 0.46, first, facecolor="none", edgecolor=INK, linewidth=0.9)
        axes.vlines(median, row - 0.23, row + 0.23, color=INK, linewidth=1.8)
    axes.set_yticks(range(len(labels)), list(labels))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def theta_axis(axes: Axes, which: Literal["x", "y"], kind: str, drawn: Sequence[float]) -> None:
    """Limits and ticks of an axis of angles."""
    low, high = min(drawn, default=0.0), max(drawn, default=0.0)
    if kind == "log":
        low, high = low / 1.3, min(high * 1.3, 180.0)
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    elif high == 0:
        low, high = 0.0, 1.0
    else:
        low, high = (0.0 if low < 0.5 * high else low - 0.1 * (high - low or high)), high * 1.06
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    if kind == "log":
        log_ticks(axes.xaxis if which == "x" else axes.yaxis, low, high)


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers, about four to seven of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = max(low, 1e-300), max(high, 1e-299)
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 3 else (1,)
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [s * 10.0**p for p in span for s in steps if low <= s * 10.0**p <= high]
    if len(ticks) < 2:
        ticks = [float(f"{v:.2g}") for v in np.geomspace(low, high, 4)]
    ticks = ticks[:: math.ceil(len(ticks) / 8)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("e-0", "e-")))


def reference_lines(axes: Axes, report: RotationReport, which: Literal["x", "y"]) -> None:
    """EgoRA's thresholds and θ_crit, where the data reach them."""
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    lines = [(WARNING_DEG, f"{WARNING_DEG:g}°"), (DANGER_DEG, f"{DANGER_DEG:g}°")]
    if report.theta_crit_deg is not None:
        lines.append((report.theta_crit_deg, "θ crit"))
    log = (axes.get_yscale() if which == "y" else axes.get_xscale()) == "log"

    def place(value: float) -> float:
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    # Labels that would lie on one another become one, in the middle of their lines.
    merged: list[list[tuple[float, str]]] = []
    for value, label in sorted(v for v in lines if low < v[0] < high):
        axes_line = axes.axhline if which == "y" else axes.axvline
        axes_line(value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
        if merged and place(value) - place(merged[-1][-1][0]) < (0.09 if which == "y" else 0.14):
            merged[-1].append((value, label))
        else:
            merged.append([(value, label)])
    for group in merged:
        middle = math.sqrt(group[0][0] * group[-1][0])
        _line_label(axes, which, middle, ", ".join(label for _, label in group))


def reference_line(axes: Axes, which: Literal["x", "y"], value: float, label: str) -> None:
    """A dashed line with its label."""
    line = axes.axhline if which == "y" else axes.axvline
    line(value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    _line_label(axes, which, value, label)


def _line_label(axes: Axes, which: Literal["x", "y"], value: float, label: str) -> None:
    """Beside the axes, where there is no data."""
    at = (1.0, value) if which == "y" else (value, 1.0)
    axes.annotate(
        label,
        at,
        xycoords=axes.get_yaxis_transform() if which == "y" else axes.get_xaxis_transform(),
        xytext=(3, 0) if which == "y" else (0, 2),
        textcoords="offset points",
        va="center" if which == "y" else "bottom",
        ha="left" if which == "y" else "center",
        color=MUTED,
        fontsize="small",
        annotation_clip=False,
    )


def floor_span(
    axes: Axes, report: RotationReport, which: Literal["x", "y"], *, at_edge: bool
) -> None:
    """Hatching up to the noise floor, if any of it is in range."""
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    floor = report.floor_deg
    span = high / low if low > 0 else math.inf
    log = (axes.get_yscale() if which == "y" else axes.get_xscale()) == "log"
    visible = floor > low and ((log and span > 1) or floor > 0.02 * (high - low))
    if not visible:
        return
    axes_span = axes.axhspan if which == "y" else axes.axvspan
    axes_span(
        low, min(floor, high), facecolor="none", edgecolor=GRID, hatch="////", linewidth=0,
        zorder=0.5,
    )  # fmt: skip
    if at_edge and floor < high:
        _line_label(axes, which, floor, "noise")


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Whole numbers of layers, with a margin."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(layers), max(layers)
    margin = max(0.5, 0.02 * (last - first)) if last > first else 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=min(8, last - first + 1), min_n_ticks=1)
    )


def index_ticks(axis: Any, labels: Sequence[str], room: float) -> None:
    """As many of the labels as there is room for, evenly spaced."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 500, 1000)
    fits = (step for step in steps if len(labels) / step <= max(room, 1))
    step = next(fits, len(labels))
    at = list(range(0, len(labels), step))
    axis.set_ticks(at, [labels[i] for i in at])


def legend_above(
    figure: Canvas, axes: Axes, width: float, entries: tuple[list[Any], list[str]] | None = None
) -> None:
    """Above the axes, in as many columns as fit, so that it never lies on data."""
    handles, names = entries or axes.get_legend_handles_labels()
    if not names:
        return
    # Width of one entry in inches: its letters and its sample.
    wide = (0.6 * max(map(len, names)) + 4.2) * font_size(width) / 72
    columns = max(1, min(len(names), int((width - 0.2) / wide)))
    columns = math.ceil(len(names) / math.ceil(len(names) / columns))  # rows of even length
    figure.legend(
        handles, names, loc="outside upper center", ncols=columns, handlelength=2.2,
        columnspacing=1.2,
    )  # fmt: skip
