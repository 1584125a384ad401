"""Panels of a diagnosis that show what was measured besides angles.

Spectra of ΔW with intruder dimensions, diversity of heads, and retention of what the base knew:
each is in a report only where it was asked for, and
:mod:`~lorasmith.diagnostics.plots`, which makes the figures, calls these functions only then.
``width`` is that of the figure in inches: panels lie side by side from 5 on. Angles are in
:mod:`~lorasmith.diagnostics.angle_panels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lorasmith.diagnostics.panel_parts import (
    cell_image,
    index_ticks,
    layer_axis,
    legend_above,
    log_ticks,
    reference_line,
)
from lorasmith.diagnostics.panel_scales import (
    ROLES,
    WRITTEN_COLUMNS,
    Canvas,
    finite_only,
    in_degrees,
    line_style,
    mean_by_layer,
)
from lorasmith.diagnostics.records import RotationReport
from lorasmith.theme import INK, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["head_diversity", "retention", "spectrum"]


def spectrum(figure: Canvas, report: RotationReport, width: float, panels: int) -> None:
    """Singular values, effective rank by layer, and as a third panel intruders."""
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(s.projection for s in report.spectra))
    wide = width >= 5
    grid = figure.subplots(1, panels) if wide else figure.subplots(panels, 1)
    first, second = grid[0], grid[1]
    layers = sorted({s.layer for s in report.spectra if s.layer is not None})
    for number, label in enumerate(labels):
        style = line_style(number, len(layers))
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
        by_layer = mean_by_layer(numbered, lambda s: s.effective_rank)
        second.plot(*by_layer, label="" if lines else label, **style)
    first.set_yscale("log")
    log_ticks(first.yaxis, *first.get_ylim())
    first.set_xlabel("index i")
    first.set_ylabel("singular value σᵢ of ΔW")
    first.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    second.set_ylabel("effective rank of ΔW")
    second.set_ylim(bottom=0)
    ranks = {s.rank for s in report.spectra}
    if len(ranks) == 1 and second.get_ylim()[1] > 0.6 * min(ranks):
        reference_line(second, "y", min(ranks), f"rank {min(ranks)}")
        second.set_ylim(top=max(second.get_ylim()[1], min(ranks) * 1.06))
    second.set_xlabel("layer")
    if layers:
        layer_axis(second, layers)
    if panels == 3:
        _intruders(figure, grid[2], report, width / 3 if wide else width)
    legend_above(figure, first, width)


def _intruders(figure: Canvas, axes: Axes, report: RotationReport, width: float) -> None:
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
    most = max(finite_only(values.ravel().tolist()), default=0)
    norm = Normalize(0, max(most, 1))
    image = cell_image(
        axes, values, np.zeros(values.shape, bool), norm, len(layers) <= WRITTEN_COLUMNS
    )
    names = ["other" if layer is None else str(layer) for layer in layers]
    index_ticks(axes.xaxis, names, width * 2.6)
    index_ticks(axes.yaxis, labels, len(labels))
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, label="intruder dimensions", pad=0.02, aspect=16)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def head_diversity(figure: Canvas, report: RotationReport, width: float) -> None:
    """Angle between heads by layer, hollow before and full after; and its change."""
    from matplotlib.lines import Line2D

    wide = width >= 5
    grid = figure.subplots(1, 2) if wide else figure.subplots(2, 1, sharex=True)
    found = [d for d in report.diversity if d.layer is not None]
    layers = sorted({d.layer for d in found if d.layer is not None})
    roles = list(dict.fromkeys(d.role for d in found))
    for role in roles:
        style = line_style(ROLES.index(role) if role in ROLES else len(ROLES), len(layers))
        chosen = [d for d in found if d.role == role]
        at, before = mean_by_layer(chosen, lambda d: d.before)
        _, after = mean_by_layer(chosen, lambda d: d.after)
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
        layer_axis(axes, layers)
        axes.ticklabel_format(axis="y", useOffset=False)
    handles, names = grid[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=0.9))
    legend_above(figure, grid[0], width, (handles, [*names, "before"]))


def retention(figure: Canvas, given: Mapping[str, RotationReport], width: float) -> None:
    """A pair of bars a report; all of them have a retention."""
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
                f"θ̄ {in_degrees(report.theta_bar_deg)}",
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
    legend_above(figure, axes, width)
