"""Pictures of a diagnosis, for a paper or a screen.

Each function takes a :class:`~lorasmith.diagnostics.records.RotationReport` (two of them also
several) and gives a Matplotlib figure of its own, tied to no window and to no global setting:

    from lorasmith.diagnostics import plots

    plots.save(plots.report_figure(report), "diagnosis.pdf")
    plots.save(plots.heat_map(report, width=plots.COLUMN), "heat-map.png")

    heat_map, head_map        θ by layer and projection; by layer and head, a panel a projection
    layer_profile             mean θ by layer, a line a role, with the middle 80 % of the units
    projection_comparison     θ of the units of each projection: box, whiskers, points
    mode_distribution         EgoRA's classes and ours
    spectrum                  singular values of ΔW, its effective rank, intruder dimensions
    head_diversity            angle between heads, before and after
    retention                 perplexity before and after
    comparison                two reports or more
    report_figure             four of them on one page

``width`` is in inches: ``COLUMN`` for one column of a paper, ``PAGE`` for both; type is 7.5 and
8.5 points in print at these sizes. Colours are those of Okabe and Ito (2008) and viridis, which
can be told apart without colour vision; lines differ in dashes and markers too.

What is drawn how: axes are logarithmic where the largest angle is over 30 times the tenth
percentile (``scale=`` decides otherwise), and angles of 0 then lie on the lower edge. Hatching
marks angles below the noise floor, which rounding to the storage dtype alone can make. The
lines at 3° and 5° (EgoRA's thresholds for θ̄) and at θ_crit appear where they are in the range
of the data, and never stretch it. A cross is an angle that is not a number; an empty cell has
no unit.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np

from lorasmith.diagnostics.compare import Comparison, compare
from lorasmith.diagnostics.modes import DANGER_DEG, WARNING_DEG
from lorasmith.diagnostics.records import RotationReport, UnitRotation
from lorasmith.errors import ConfigError, DataError
from lorasmith.theme import GRID, INK, MUTED, SERIES, canvas, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import NDArray

__all__ = [
    "COLUMN",
    "PAGE",
    "comparison",
    "head_diversity",
    "head_map",
    "heat_map",
    "layer_profile",
    "mode_distribution",
    "projection_comparison",
    "report_figure",
    "retention",
    "save",
    "spectrum",
]

COLUMN = 3.4
"""Width of one column of a paper, in inches."""
PAGE = 7.0
"""Width of a page, in inches."""

Scale: TypeAlias = Literal["auto", "linear", "log"]
_Canvas: TypeAlias = "Figure | SubFigure"
_Grid: TypeAlias = "NDArray[np.float64]"

_THETA = "rotation θ (degrees)"
#: Largest angle over the tenth percentile from which an axis is logarithmic.
_WIDE = 30.0
#: Decades that a logarithmic axis shows at most; what is smaller lies on its edge.
_DECADES = 6
#: Points drawn for a projection: more only make the file larger.
_POINTS = 150
#: Numbers are written into the cells of heat maps that have no more columns.
_WRITTEN = 8
_ROLES = ("q", "k", "v", "o", "mlp")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


# What is called from outside ---------------------------------------------------------------


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 300) -> Path:
    """Writes a figure, on white, in the form that the suffix asks for.

    Equal figures give equal files. In SVG and PDF text stays text. Who opens the file meanwhile
    finds the old one or the new one (:mod:`lorasmith.io.atomic`).

    Args:
        figure: Any Matplotlib figure.
        path: A name that ends in ``.png``, ``.svg`` or ``.pdf``. Missing folders are made.
        dpi: Dots an inch of a PNG.

    Raises:
        ConfigError: The suffix is another one.
        OSError: It cannot be written; what was there is as it was.
    """
    from lorasmith.io.atomic import replace_file  # loads PyTorch, which drawing does not need

    target = Path(path)
    form = target.suffix.lower().lstrip(".")
    if form not in ("png", "svg", "pdf"):
        raise ConfigError(
            "The form of the figure cannot be told from the name of the file.",
            expected="a name that ends in .png, .svg or .pdf",
            got=target.name,
            key="path",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    buffer = io.BytesIO()
    with style(_font(figure.get_figwidth())):
        figure.savefig(buffer, format=form, dpi=dpi, facecolor="white", metadata=metadata)
    data = buffer.getvalue()
    if form == "svg":
        # Names of clip paths hold addresses of memory.
        text = data.decode("utf-8")
        for number, name in enumerate(re.findall(r'<clipPath id="(\w+)"', text)):
            text = text.replace(name, f"clip-{number}")
        data = text.encode("utf-8")

    def write(stream: BinaryIO) -> None:
        stream.write(data)

    replace_file(target, write)
    return target


def heat_map(report: RotationReport, *, width: float = PAGE, scale: Scale = "auto") -> Figure:
    """Mean θ of each projection in each layer.

    Args:
        report: What to draw.
        width: In inches.
        scale: Of the colours.

    Raises:
        DataError: Nothing changed.
        MissingDependencyError: Matplotlib is not installed.
    """
    _units(report)
    rows = len({u.label for u in report.units})
    # At least what the label of the colour bar needs.
    with _figure(width, 0.95 + max(rows * 0.026, 0.09) * _font(width)) as figure:
        _heat_map(figure, report, width, scale)
        return figure


def head_map(report: RotationReport, *, width: float = PAGE, scale: Scale = "auto") -> Figure:
    """θ of each head in each layer, one panel a projection.

    A row of panels is as high as the most heads in it; fewer key and value heads, of grouped
    queries, are higher cells.

    Args:
        report: What to draw, measured with ``per="head"``.
        width: In inches.
        scale: Of the colours.

    Raises:
        DataError: The report has no heads.
        MissingDependencyError: Matplotlib is not installed.
    """
    panels = _head_panels(report)
    across = 2 if width >= 5 and len(panels) > 1 else 1
    heights = _panel_heights(panels, across)
    # At least what the label of the colour bar needs.
    enlarged = max(1.0, (0.12 * _font(width) - 0.3 * (len(heights) - 1)) / sum(heights))
    heights = [enlarged * height for height in heights]
    with _figure(width, sum(heights) + 0.5 + 0.3 * len(heights)) as figure:
        _head_map(figure, width, scale, panels, across, heights)
        return figure


def layer_profile(report: RotationReport, *, width: float = PAGE, scale: Scale = "auto") -> Figure:
    """Mean θ by layer, one line a role, over the band from the 10th to the 90th percentile.

    Args:
        report: What to draw.
        width: In inches.
        scale: Of the angles.

    Raises:
        DataError: Nothing in a numbered layer changed.
        MissingDependencyError: Matplotlib is not installed.
    """
    _units(report)
    with _figure(width, _plain_height(width)) as figure:
        _layer_profile(figure, report, width, scale)
        return figure


def projection_comparison(
    report: RotationReport, *, width: float = PAGE, scale: Scale = "auto"
) -> Figure:
    """θ of the units of each projection.

    Boxes hold the middle half and the median, whiskers reach from the 5th to the 95th
    percentile, and points are units (the largest, and a sample of at most 150).

    Args:
        report: What to draw.
        width: In inches.
        scale: Of the angles.

    Raises:
        DataError: Nothing changed.
        MissingDependencyError: Matplotlib is not installed.
    """
    _units(report)
    rows = len({u.label for u in report.units})
    with _figure(width, 0.7 + max(rows, 3) * 0.036 * _font(width)) as figure:
        _projection_comparison(figure, report, scale)
        return figure


def mode_distribution(report: RotationReport, *, width: float = PAGE) -> Figure:
    """How many units are in each of EgoRA's classes, and in each of ours.

    Args:
        report: What to draw.
        width: In inches.

    Raises:
        DataError: Nothing changed.
        MissingDependencyError: Matplotlib is not installed.
    """
    _units(report)
    with _figure(width, 2.0 if width >= 5 else 3.2) as figure:
        _mode_distribution(figure, report, width)
        return figure


def spectrum(report: RotationReport, *, width: float = PAGE) -> Figure:
    """Singular values of ΔW, its effective rank by layer, and intruders where they were counted.

    Args:
        report: What to draw, measured with ``spectrum=True``.
        width: In inches.

    Raises:
        DataError: The report has no spectra.
        MissingDependencyError: Matplotlib is not installed.
    """
    if not report.spectra:
        raise DataError(
            "There is no spectrum to draw.",
            expected="a report with spectra",
            fix="measure with diagnose(..., spectrum=True)",
        )
    panels = 3 if any(s.intruders is not None for s in report.spectra) else 2
    wide = width >= 5
    with _figure(width, 3.0 if wide else 0.5 + 2.0 * panels) as figure:
        _spectrum(figure, report, width, panels)
        return figure


def head_diversity(report: RotationReport, *, width: float = PAGE) -> Figure:
    """Mean angle between the heads of a projection by layer, before and after, and its change.

    Args:
        report: What to draw, measured with ``diversity=True``.
        width: In inches.

    Raises:
        DataError: The report has no diversity.
        MissingDependencyError: Matplotlib is not installed.
    """
    if not any(d.layer is not None for d in report.diversity):
        raise DataError(
            "There is no head diversity to draw.",
            expected="a report with diversity, of a model of several heads",
            fix="measure with diagnose(..., diversity=True)",
        )
    with _figure(width, 3.0 if width >= 5 else 3.8) as figure:
        _head_diversity(figure, report, width)
        return figure


def retention(
    reports: RotationReport | Mapping[str, RotationReport], *, width: float = PAGE
) -> Figure:
    """Perplexity on held-out text before and after, with the divergence from the base.

    Args:
        reports: One report, or several by name.
        width: In inches.

    Raises:
        DataError: No report measured it.
        MissingDependencyError: Matplotlib is not installed.
    """
    given = {"": reports} if isinstance(reports, RotationReport) else dict(reports)
    given = {name: report for name, report in given.items() if report.retention is not None}
    if not given:
        raise DataError(
            "There is no retention to draw.",
            expected="a report with retention",
            fix="measure it: see lorasmith.retention, or lorasmith diagnose --text",
        )
    # Each has three or four lines beside it.
    each = (3.4 if "" in given else 4.6) * 1.2 * 0.833 * _font(width) / 72
    with _figure(width, 0.85 + max(each, 0.5) * len(given)) as figure:
        _retention(figure, given, width)
        return figure


def comparison(
    reports: Mapping[str, RotationReport] | Comparison,
    *,
    width: float = PAGE,
    scale: Scale = "auto",
) -> Figure:
    """Two reports or more of one base: θ unit by unit, and by layer.

    Two reports are drawn as pairs, the second against the first; more as one box each.

    Args:
        reports: Reports by name, or what :func:`~lorasmith.diagnostics.compare.compare` made.
        width: In inches.
        scale: Of the angles.

    Raises:
        ConfigError: There are fewer than two, or they are not of one base.
        DataError: Nothing changed in any.
        MissingDependencyError: Matplotlib is not installed.
    """
    both = reports if isinstance(reports, Comparison) else compare(reports)
    if not any(math.isfinite(t) for u in both.units for t in u.theta_deg):
        raise DataError("There is nothing to compare: no weight changed in any report.")
    with _figure(width, 3.1 if width >= 5 else 5.4) as figure:
        _comparison(figure, both, width, scale)
        return figure


def report_figure(report: RotationReport, *, width: float = PAGE) -> Figure:
    """The diagnosis on one page: heat map, layer profile, projections, classes.

    Where nothing changed it says so.

    Args:
        report: What to draw.
        width: In inches.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    rows = len({u.label for u in report.units})
    wide = width >= 5
    top = 0.95 + max(rows, 3) * 0.026 * _font(width)
    if not report.units:
        with _figure(width, 1.2) as figure:
            text = "No weight changed."
            figure.text(0.5, 0.5, text, ha="center", va="center", color=INK)
            return figure
    numbered = any(u.layer is not None for u in report.units)
    low = 0.7 + max(rows, 5) * 0.036 * _font(width)
    heights = [top, 2.5] if wide else [top, 2.4, low, 3.1]
    heights[1] = max(heights[1], low) if wide else heights[1]
    heights += [1.9] if wide else []
    with _figure(width, sum(heights) + (0.35 if wide else 0.6)) as figure:
        floor = report.floor_deg
        facts = [
            f"θ̄ = {_degrees(report.theta_bar_deg)}: {report.verdict} by EgoRA's rule",
            f"{len(report.units):,} {_units_word(report)}, largest "
            f"{_degrees(report.max_theta_deg)}" + (f", noise {_degrees(floor)}" if floor else ""),
        ]
        kept = report.retention
        if kept is not None:
            facts.append(f"perplexity {kept.perplexity_before:.4g} → {kept.perplexity_after:.4g}")
        figure.suptitle(("   ·   " if wide else "\n").join(facts), fontsize=_font(width), color=INK)
        if wide:
            rows_of: Any = figure.subfigures(3, 1, height_ratios=heights)
            middle: Any = rows_of[1].subfigures(1, 2)
            places = [rows_of[0], middle[0], middle[1], rows_of[2]]
        else:
            stacked: Any = figure.subfigures(4, 1, height_ratios=heights)
            places = list(stacked)
        half = width / 2 if wide else width
        _heat_map(places[0], report, width, "auto")
        if numbered:
            _layer_profile(places[1], report, half, "auto")
        _projection_comparison(places[2], report, "auto")
        _mode_distribution(places[3], report, width)
        return figure


# Panels ------------------------------------------------------------------------------------


def _heat_map(figure: _Canvas, report: RotationReport, width: float, scale: Scale) -> None:
    units = _units(report)
    labels = list(dict.fromkeys(u.label for u in units))
    layers = _layers(units)
    values, below = _cells(units, labels, layers, lambda u: u.label)
    axes = figure.add_subplot()
    norm = _norm(values, scale)
    written = len(layers) <= _WRITTEN
    image = _image(axes, values, below, norm, written)
    names = ["other" if layer is None else str(layer) for layer in layers]
    _index_ticks(axes.xaxis, names, width * 4.2)
    _index_ticks(axes.yaxis, labels, len(labels))
    axes.set_xlabel("layer")
    _colour_bar(figure, image, axes)


def _head_map(
    figure: _Canvas,
    width: float,
    scale: Scale,
    panels: Mapping[str, list[UnitRotation]],
    across: int,
    heights: Sequence[float],
) -> None:
    layers = _layers([u for units in panels.values() for u in units])
    grid = figure.subplots(len(heights), across, height_ratios=heights, squeeze=False, sharex=True)
    drawn = []
    for label, units in panels.items():
        heads = list(range(1 + max(u.head or 0 for u in units)))
        drawn.append((label, heads, *_cells(units, heads, layers, lambda u: u.head)))
    everything = np.concatenate([values.ravel() for _, _, values, _ in drawn])
    norm = _norm(everything, scale)
    image = None
    for place, axes in enumerate(grid.ravel()):
        if place >= len(drawn):
            axes.set_axis_off()
            continue
        label, heads, values, below = drawn[place]
        image = _image(axes, values, below, norm, written=False)
        count = f"{len(heads)} head{'s' if len(heads) != 1 else ''}"
        axes.set_title(f"{label}: {count}", loc="left", fontsize=_font(width))
        _index_ticks(axes.yaxis, [str(h) for h in heads], heights[place // across] * 4)
        if place % across == 0:
            axes.set_ylabel("head")
        if place + across >= len(drawn):
            axes.set_xlabel("layer")
            names = ["other" if layer is None else str(layer) for layer in layers]
            _index_ticks(axes.xaxis, names, width / across * 4.2)
            axes.tick_params(labelbottom=True)
    _colour_bar(figure, image, grid.ravel().tolist())


def _layer_profile(figure: _Canvas, report: RotationReport, width: float, scale: Scale) -> None:
    units = [u for u in _units(report) if u.layer is not None]
    if not units:
        raise DataError("There is no profile to draw: no numbered layer changed.")
    layers = sorted({u.layer for u in units if u.layer is not None})
    roles = [r for r in _ROLES if any(u.role == r for u in units)]
    others = [u for u in units if u.role not in _ROLES]
    axes = figure.add_subplot()
    every = _finite([u.theta_deg for u in units])
    kind = _kind(every, scale)
    edge = _edge(every, kind)
    drawn: list[float] = []
    for role in [*roles, *([None] if others else [])]:
        chosen = others if role is None else [u for u in units if u.role == role]
        by_layer: dict[int, list[float]] = {}
        for u in chosen:
            if u.layer is not None and math.isfinite(u.theta_deg):
                by_layer.setdefault(u.layer, []).append(u.theta_deg)
        style = _style(len(_ROLES) if role is None else _ROLES.index(role), len(layers))
        at = [layer for layer in layers if layer in by_layer]
        if not at:
            continue
        mean = [max(float(np.mean(by_layer[x])), edge) for x in at]
        low, high = (
            [max(float(np.percentile(by_layer[x], p)), edge) for x in at] for p in (10, 90)
        )
        drawn += [*mean, *low, *high]
        if len(at) > 1:
            axes.fill_between(at, low, high, color=style["color"], alpha=0.13, linewidth=0)
        elif high[0] > low[0]:
            axes.vlines(at, low, high, color=style["color"], alpha=0.4)
        axes.plot(at, mean, label={"mlp": "MLP", None: "other"}.get(role, role), **style)
    _theta_axis(axes, "y", kind, drawn)
    _references(axes, report, "y")
    _floor_span(axes, report, "y", at_edge=True)
    axes.set_ylabel(_THETA)
    axes.set_xlabel("layer")
    _layer_axis(axes, layers)
    _legend(figure, axes, width)


def _projection_comparison(figure: _Canvas, report: RotationReport, scale: Scale) -> None:
    units = _units(report)
    labels = list(dict.fromkeys(u.label for u in units))
    values = [_finite([u.theta_deg for u in units if u.label == label]) for label in labels]
    axes = figure.add_subplot()
    every = _finite([u.theta_deg for u in units])
    kind = _kind(every, scale)
    edge = _edge(every, kind)
    _boxes(axes, labels, values, edge, [_colour(units, label) for label in labels])
    _theta_axis(axes, "x", kind, [max(v, edge) for v in every])
    _references(axes, report, "x")
    _floor_span(axes, report, "x", at_edge=True)
    axes.set_xlabel(_THETA)


def _mode_distribution(figure: _Canvas, report: RotationReport, width: float) -> None:
    total = len(_units(report))
    grid = figure.subplots(1, 2) if width >= 5 else figure.subplots(2, 1, height_ratios=(4, 5))
    panels: tuple[tuple[str, dict[str, int], tuple[int, ...]], ...] = (
        ("EgoRA's classes", {str(k): n for k, n in report.mode_counts.items()}, (2, 0, 4, 1)),
        ("our classes", {str(k): n for k, n in report.change_counts.items()}, (2, 5, 0, 4, 1)),
    )
    for axes, (title, counts, colours) in zip(grid, panels, strict=True):
        names = list(counts)
        share = [100 * counts[name] / total for name in names]
        axes.barh(names, share, height=0.62, color=[SERIES[c] for c in colours])
        for row, (name, percent) in enumerate(zip(names, share, strict=True)):
            count = counts[name]
            digits = 2 if percent < 10 else 3
            text = f"{count:,} ({percent:.{digits}g} %)" if count else "0"
            axes.annotate(
                text,
                (percent, row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize="small",
            )
        axes.invert_yaxis()
        axes.set_xlim(0, 142)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_title(title, loc="left", fontsize=_font(width))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
    grid[-1].set_xlabel(f"share of the {_units_word(report)} (%)")
    if width >= 5:
        grid[0].set_xlabel(f"share of the {_units_word(report)} (%)")


def _spectrum(figure: _Canvas, report: RotationReport, width: float, panels: int) -> None:
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(s.projection for s in report.spectra))
    wide = width >= 5
    grid = figure.subplots(1, panels) if wide else figure.subplots(panels, 1)
    first, second = grid[0], grid[1]
    layers = sorted({s.layer for s in report.spectra if s.layer is not None})
    for number, label in enumerate(labels):
        style = _style(number, len(layers))
        chosen = [s for s in report.spectra if s.projection == label]
        lines = [[v for v in s.singular_values if v > 0] for s in chosen]
        lines = [line for line in lines if line]
        if lines:
            length = max(map(len, lines))
            columns = [[line[i] for line in lines if i < len(line)] for i in range(length)]
            at = range(1, length + 1)
            plain = {**style, "marker": style["marker"] if length == 1 else None, "markevery": 1}
            first.plot(at, [float(np.median(c)) for c in columns], label=label, **plain)
            if len(lines) > 1:
                first.fill_between(
                    at, list(map(min, columns)), list(map(max, columns)),
                    color=style["color"], alpha=0.1, linewidth=0,
                )  # fmt: skip
        numbered = [s for s in chosen if s.layer is not None]
        by_layer = _by_layer(numbered, lambda s: s.effective_rank)
        second.plot(*by_layer, label="" if lines else label, **style)
    first.set_yscale("log")
    _log_ticks(first.yaxis, *first.get_ylim())
    first.set_xlabel("index i")
    first.set_ylabel("singular value σᵢ of ΔW")
    first.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    second.set_ylabel("effective rank of ΔW")
    second.set_ylim(bottom=0)
    ranks = {s.rank for s in report.spectra}
    if len(ranks) == 1 and second.get_ylim()[1] > 0.6 * min(ranks):
        _line(second, "y", min(ranks), f"rank {min(ranks)}")
        second.set_ylim(top=max(second.get_ylim()[1], min(ranks) * 1.06))
    second.set_xlabel("layer")
    if layers:
        _layer_axis(second, layers)
    if panels == 3:
        _intruders(figure, grid[2], report, width / 3 if wide else width)
    _legend(figure, first, width)


def _intruders(figure: _Canvas, axes: Axes, report: RotationReport, width: float) -> None:
    """Counts by projection and layer, in whole colours."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    counted = [s for s in report.spectra if s.intruders is not None]
    labels = list(dict.fromkeys(s.projection for s in counted))
    layers: list[int | None] = [*sorted({s.layer for s in counted if s.layer is not None})]
    layers += [None] if any(s.layer is None for s in counted) else []
    values = np.full((len(labels), len(layers)), math.inf)
    for s in counted:
        at = labels.index(s.projection), layers.index(s.layer)
        known = values[at] if math.isfinite(values[at]) else 0  # experts share a cell
        values[at] = known + (s.intruders or 0)
    most = max(_finite(values.ravel().tolist()), default=0)
    norm = Normalize(0, max(most, 1))
    image = _image(axes, values, np.zeros(values.shape, bool), norm, len(layers) <= _WRITTEN)
    names = ["other" if layer is None else str(layer) for layer in layers]
    _index_ticks(axes.xaxis, names, width * 2.6)
    _index_ticks(axes.yaxis, labels, len(labels))
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, label="intruder dimensions", pad=0.02, aspect=16)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def _head_diversity(figure: _Canvas, report: RotationReport, width: float) -> None:
    from matplotlib.lines import Line2D

    wide = width >= 5
    grid = figure.subplots(1, 2) if wide else figure.subplots(2, 1, sharex=True)
    found = [d for d in report.diversity if d.layer is not None]
    layers = sorted({d.layer for d in found if d.layer is not None})
    roles = list(dict.fromkeys(d.role for d in found))
    for role in roles:
        style = _style(_ROLES.index(role) if role in _ROLES else len(_ROLES), len(layers))
        chosen = [d for d in found if d.role == role]
        at, before = _by_layer(chosen, lambda d: d.before)
        _, after = _by_layer(chosen, lambda d: d.after)
        hollow = {**style, "linestyle": (0, (2, 2)), "linewidth": 0.9, "markerfacecolor": "none"}
        grid[0].plot(at, before, **hollow)
        grid[0].plot(at, after, label=role, **{**style, "linestyle": "-"})
        change = [b - a for a, b in zip(before, after, strict=True)]
        grid[1].plot(at, change, **{**style, "linestyle": "-"})
    grid[0].set_ylabel("mean angle between heads\n(degrees)")
    grid[1].set_ylabel("change of it (degrees)")
    grid[1].axhline(0, color=MUTED, linewidth=0.8)
    for axes in grid if wide else grid[1:]:
        axes.set_xlabel("layer")
    for axes in grid:
        _layer_axis(axes, layers)
        axes.ticklabel_format(axis="y", useOffset=False)
    handles, names = grid[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=0.9))
    _legend(figure, grid[0], width, (handles, [*names, "before"]))


def _retention(figure: _Canvas, given: Mapping[str, RotationReport], width: float) -> None:
    axes = figure.add_subplot()
    names = []
    for row, (name, report) in enumerate(given.items()):
        kept = report.retention
        assert kept is not None  # the caller kept only these
        for shift, colour, value, label in (
            (-0.19, MUTED, kept.perplexity_before, "before"),
            (0.19, SERIES[0], kept.perplexity_after, "after"),
        ):
            shown = value if math.isfinite(value) else 0.0
            axes.barh(row + shift, shown, 0.34, color=colour, label=label if row == 0 else None)
            axes.annotate(
                f"{value:.4g}",
                (shown, row + shift),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize="small",
            )
        detail = "\n".join(
            (
                f"θ̄ {_degrees(report.theta_bar_deg)}",
                f"KL {kept.kl:.3g} nats",
                f"same token {100 * kept.agreement:.3g} %",
            )
        )
        names.append(f"{name}\n{detail}" if name else detail)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel("perplexity on held-out text (lower is better)")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    _legend(figure, axes, width)


def _comparison(figure: _Canvas, both: Comparison, width: float, scale: Scale) -> None:
    wide = width >= 5
    left, right = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
    every = _finite([t for u in both.units for t in u.theta_deg])
    kind = _kind(every, scale)
    edge = _edge(every, kind)
    shown = [max(t, edge) for t in every]
    names = both.names
    if len(names) == 2:
        roles = list(dict.fromkeys(u.role if u.role in _ROLES else None for u in both.units))
        for role in roles:
            style = _style(len(_ROLES) if role is None else _ROLES.index(role))
            pairs = [
                [max(t, edge) for t in u.theta_deg]
                for u in both.units
                if (u.role if u.role in _ROLES else None) == role
                and all(map(math.isfinite, u.theta_deg))
            ]
            if pairs:
                left.plot(
                    *np.array(_sample(pairs, 600)).T,
                    label={"mlp": "MLP", None: "other"}.get(role, role),
                    linestyle="none",
                    marker=style["marker"],
                    markersize=2.6,
                    markeredgewidth=0,
                    alpha=0.6,
                    color=style["color"],
                )
        for which in ("x", "y"):
            _theta_axis(left, which, kind, shown)
        low, high = left.get_xlim()
        left.set_ylim(low, high)
        left.plot([low, high], [low, high], color=MUTED, linewidth=0.9, zorder=1)
        left.set_box_aspect(1)
        left.set_xlabel(f"θ of {names[0]} (degrees)")
        left.set_ylabel(f"θ of {names[1]} (degrees)")
        left.grid(visible=True, axis="x")
        left.legend(
            markerscale=1.8,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(roles),
            handletextpad=0.1,
            columnspacing=0.9,
        )
    else:
        values = [_finite([u.theta_deg[i] for u in both.units]) for i in range(len(names))]
        colours = [_style(i)["color"] for i in range(len(names))]
        _boxes(left, list(names), values, edge, colours)
        _theta_axis(left, "x", kind, shown)
        left.set_xlabel(_THETA)
    by_layer = {x: means for x, means in both.by_layer().items() if x is not None}
    layers = sorted(by_layer)
    means: list[float] = []
    for i, name in enumerate(names):
        style = _style(i, len(layers))
        line = [by_layer[x][i] for x in layers]
        drawn = [max(v, edge) if math.isfinite(v) else math.nan for v in line]
        means += [v for v in drawn if math.isfinite(v)]
        right.plot(layers, drawn, label=name, **style)
    _theta_axis(right, "y", kind, means)
    right.set_ylabel("mean θ (degrees)")
    right.set_xlabel("layer")
    if layers:
        _layer_axis(right, layers)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if len(names) < 5 else 3)


# Parts of panels ---------------------------------------------------------------------------


def _cells(
    units: Sequence[UnitRotation],
    rows: Sequence[Any],
    layers: Sequence[int | None],
    row_of: Callable[[UnitRotation], Any],
) -> tuple[_Grid, NDArray[np.bool_]]:
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


def _image(axes: Axes, values: _Grid, below: NDArray[np.bool_], norm: Any, written: bool) -> Any:
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


def _colour_bar(figure: _Canvas, image: Any, axes: Any) -> None:
    from matplotlib.colors import LogNorm

    bar = figure.colorbar(image, ax=axes, label=_THETA, pad=0.02, fraction=0.05, aspect=16)
    bar.outline.set_visible(False)
    if isinstance(image.norm, LogNorm):
        _log_ticks(bar.ax.yaxis, image.norm.vmin or 1e-9, image.norm.vmax or 1.0)
        bar.ax.minorticks_off()
    bar.ax.tick_params(length=2)


def _boxes(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    edge: float,
    colours: Sequence[str],
) -> None:
    rng = np.random.default_rng(0)  # the same figure each time
    for row, (group, colour) in enumerate(zip(values, colours, strict=True)):
        if not group:
            axes.text(0.01, row, "no finite angle", transform=axes.get_yaxis_transform(),
                      va="center", color=MUTED, fontsize="small")  # fmt: skip
            continue
        data = np.maximum(group, edge)
        points = np.array(_sample(sorted(data.tolist()), _POINTS))
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


def _theta_axis(axes: Axes, which: Literal["x", "y"], kind: str, drawn: Sequence[float]) -> None:
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
        _log_ticks(axes.xaxis if which == "x" else axes.yaxis, low, high)


def _log_ticks(axis: Any, low: float, high: float) -> None:
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


def _references(axes: Axes, report: RotationReport, which: Literal["x", "y"]) -> None:
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


def _line(axes: Axes, which: Literal["x", "y"], value: float, label: str) -> None:
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


def _floor_span(
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


def _layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    first, last = min(layers), max(layers)
    margin = max(0.5, 0.02 * (last - first)) if last > first else 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=min(8, last - first + 1), min_n_ticks=1)
    )


def _index_ticks(axis: Any, labels: Sequence[str], room: float) -> None:
    """As many of the labels as there is room for, evenly spaced."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 500, 1000)
    fits = (step for step in steps if len(labels) / step <= max(room, 1))
    step = next(fits, len(labels))
    at = list(range(0, len(labels), step))
    axis.set_ticks(at, [labels[i] for i in at])


def _legend(
    figure: _Canvas, axes: Axes, width: float, entries: tuple[list[Any], list[str]] | None = None
) -> None:
    """Above the axes, in as many columns as fit, so that it never lies on data."""
    handles, names = entries or axes.get_legend_handles_labels()
    if not names:
        return
    # Width of one entry in inches: its letters and its sample.
    wide = (0.6 * max(map(len, names)) + 4.2) * _font(width) / 72
    columns = max(1, min(len(names), int((width - 0.2) / wide)))
    columns = math.ceil(len(names) / math.ceil(len(names) / columns))  # rows of even length
    figure.legend(
        handles, names, loc="outside upper center", ncols=columns, handlelength=2.2,
        columnspacing=1.2,
    )  # fmt: skip


# Numbers -----------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with canvas(width, height, font_size=_font(width)) as figure:
        figure.set_facecolor("white")
        yield figure
        # Ticks are made when they are first drawn, by the settings of that moment.
        figure.draw_without_rendering()


def _font(width: float) -> float:
    return 7.5 if width < 5 else 8.5 if width < 8 else 10.0


def _plain_height(width: float) -> float:
    return max(2.3, min(0.42 * width, 3.6))


def _units(report: RotationReport) -> Sequence[UnitRotation]:
    if not report.units:
        raise DataError("There is nothing to draw: no weight changed.")
    return report.units


def _units_word(report: RotationReport) -> str:
    return "units" if any(u.head is not None for u in report.units) else "projections"


def _degrees(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:.3g}°"


def _layers(units: Sequence[UnitRotation]) -> list[int | None]:
    numbered: list[int | None] = [*sorted({u.layer for u in units if u.layer is not None})]
    return [*numbered, None] if any(u.layer is None for u in units) else numbered


def _head_panels(report: RotationReport) -> dict[str, list[UnitRotation]]:
    panels: dict[str, list[UnitRotation]] = {}
    for u in report.units:
        if u.head is not None:
            panels.setdefault(u.label, []).append(u)
    if not panels:
        raise DataError(
            "There are no heads to draw.",
            expected="a report by head of changed attention layers",
            fix='measure with diagnose(..., per="head")',
        )
    # Wide panels beside wide ones: q and o, then k and v.
    return dict(sorted(panels.items(), key=lambda p: -max(u.head or 0 for u in p[1])))


def _panel_heights(panels: Mapping[str, list[UnitRotation]], across: int) -> list[float]:
    heads = [1 + max(u.head or 0 for u in units) for units in panels.values()]
    rows = [max(heads[i : i + across]) for i in range(0, len(heads), across)]
    return [min(max(0.05 * n, 0.55), 2.6) for n in rows]


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _kind(values: Sequence[float], scale: Scale) -> Literal["linear", "log"]:
    if scale not in get_args(Scale):
        raise ConfigError(
            "There is no such scale.",
            expected=", ".join(get_args(Scale)),
            got=repr(scale),
            key="scale",
        )
    positive = [v for v in values if v > 0]
    if not positive:
        return "linear"
    if scale == "auto":
        wide = max(positive) > _WIDE * float(np.percentile(positive, 10))
        return "log" if wide else "linear"
    return scale


def _least(values: Sequence[float]) -> float:
    """The smallest value that a logarithmic axis shows."""
    positive = [v for v in values if v > 0]
    return max(min(positive), max(positive) / 10**_DECADES) if positive else 1e-3


def _edge(values: Sequence[float], kind: str) -> float:
    """What is smaller is drawn here."""
    return _least(values) if kind == "log" else 0.0


def _norm(values: _Grid, scale: Scale) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    finite = _finite(values.ravel().tolist())
    if _kind(finite, scale) == "log":
        low, high = _least(finite), max(finite)
        return LogNorm(low, high if high > low else low * 1.01, clip=True)
    high = max(finite, default=0.0)
    low = min(finite, default=0.0)
    if high <= 0:
        return Normalize(0, 1)
    return Normalize(low if 0.5 * high < low < high else 0.0, high)


def _style(number: int, points: int = 1) -> dict[str, Any]:
    """Of the n-th line, with a marker on about twelve of its points."""
    colours = (*SERIES, INK)
    return {
        "color": colours[number % len(colours)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 3.0,
        "linewidth": 1.3,
        "markevery": max(1, round(points / 12)),
    }


def _colour(units: Sequence[UnitRotation], label: str) -> str:
    role = next(u.role for u in units if u.label == label)
    return str(_style(_ROLES.index(role) if role in _ROLES else len(_ROLES))["color"])


def _by_layer(records: Sequence[Any], value: Callable[[Any], float]) -> tuple[Any, Any]:
    """Layers and the mean of a value in each, infinite ones left out."""
    groups: dict[int, list[float]] = {}
    for one in records:
        groups.setdefault(one.layer, []).append(value(one))
    at = sorted(groups)
    return at, [float(np.mean(groups[x])) for x in at]


def _sample(values: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]
