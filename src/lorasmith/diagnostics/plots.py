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

Here are the functions to call, with the sizes of their figures; what fills them is in
:mod:`~lorasmith.diagnostics.angle_panels` and :mod:`~lorasmith.diagnostics.further_panels`.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from lorasmith.diagnostics import angle_panels, further_panels, panel_scales
from lorasmith.diagnostics.compare import Comparison, compare
from lorasmith.diagnostics.panel_scales import (
    changed_units,
    font_size,
    in_degrees,
    plain_figure,
    plain_height,
    units_word,
)
from lorasmith.diagnostics.records import RotationReport
from lorasmith.errors import ConfigError, DataError
from lorasmith.theme import INK, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

Scale: TypeAlias = panel_scales.Scale
"""Of angles: logarithmic or not, or as they need it."""


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
    with style(font_size(figure.get_figwidth())):
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
    changed_units(report)
    rows = len({u.label for u in report.units})
    # At least what the label of the colour bar needs.
    with plain_figure(width, 0.95 + max(rows * 0.026, 0.09) * font_size(width)) as figure:
        angle_panels.heat_map(figure, report, width, scale)
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
    panels = angle_panels.head_panels(report)
    across = 2 if width >= 5 and len(panels) > 1 else 1
    heights = angle_panels.panel_heights(panels, across)
    # At least what the label of the colour bar needs.
    enlarged = max(1.0, (0.12 * font_size(width) - 0.3 * (len(heights) - 1)) / sum(heights))
    heights = [enlarged * height for height in heights]
    with plain_figure(width, sum(heights) + 0.5 + 0.3 * len(heights)) as figure:
        angle_panels.head_map(figure, width, scale, panels, across, heights)
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
    changed_units(report)
    with plain_figure(width, plain_height(width)) as figure:
        angle_panels.layer_profile(figure, report, width, scale)
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
    changed_units(report)
    rows = len({u.label for u in report.units})
    with plain_figure(width, 0.7 + max(rows, 3) * 0.036 * font_size(width)) as figure:
        angle_panels.projection_comparison(figure, report, scale)
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
    changed_units(report)
    with plain_figure(width, 2.0 if width >= 5 else 3.2) as figure:
        angle_panels.mode_distribution(figure, report, width)
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
    with plain_figure(width, 3.0 if wide else 0.5 + 2.0 * panels) as figure:
        further_panels.spectrum(figure, report, width, panels)
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
    with plain_figure(width, 3.0 if width >= 5 else 3.8) as figure:
        further_panels.head_diversity(figure, report, width)
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
    each = (3.4 if "" in given else 4.6) * 1.2 * 0.833 * font_size(width) / 72
    with plain_figure(width, 0.85 + max(each, 0.5) * len(given)) as figure:
        further_panels.retention(figure, given, width)
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
    with plain_figure(width, 3.1 if width >= 5 else 5.4) as figure:
        angle_panels.comparison(figure, both, width, scale)
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
    top = 0.95 + max(rows, 3) * 0.026 * font_size(width)
    if not report.units:
        with plain_figure(width, 1.2) as figure:
            text = "No weight changed."
            figure.text(0.5, 0.5, text, ha="center", va="center", color=INK)
            return figure
    numbered = any(u.layer is not None for u in report.units)
    low = 0.7 + max(rows, 5) * 0.036 * font_size(width)
    heights = [top, 2.5] if wide else [top, 2.4, low, 3.1]
    heights[1] = max(heights[1], low) if wide else heights[1]
    heights += [1.9] if wide else []
    with plain_figure(width, sum(heights) + (0.35 if wide else 0.6)) as figure:
        floor = report.floor_deg
        facts = [
            f"θ̄ = {in_degrees(report.theta_bar_deg)}: {report.verdict} by EgoRA's rule",
            f"{len(report.units):,} {units_word(report)}, largest "
            f"{in_degrees(report.max_theta_deg)}"
            + (f", noise {in_degrees(floor)}" if floor else ""),
        ]
        kept = report.retention
        if kept is not None:
            facts.append(f"perplexity {kept.perplexity_before:.4g} → {kept.perplexity_after:.4g}")
        figure.suptitle(
            ("   ·   " if wide else "\n").join(facts), fontsize=font_size(width), color=INK
        )
        if wide:
            rows_of: Any = figure.subfigures(3, 1, height_ratios=heights)
            middle: Any = rows_of[1].subfigures(1, 2)
            places = [rows_of[0], middle[0], middle[1], rows_of[2]]
        else:
            stacked: Any = figure.subfigures(4, 1, height_ratios=heights)
            places = list(stacked)
        half = width / 2 if wide else width
        angle_panels.heat_map(places[0], report, width, "auto")
        if numbered:
            angle_panels.layer_profile(places[1], report, half, "auto")
        angle_panels.projection_comparison(places[2], report, "auto")
        angle_panels.mode_distribution(places[3], report, width)
        return figure
