"""Panels of a diagnosis that show angles: maps, profiles, projections, classes, a comparison.

Each function fills a figure, or a part of one (``report_figure`` puts four on a page), with the
angles θ of a report; :mod:`~lorasmith.diagnostics.plots` makes the figure, gives it its size and
refuses reports that have nothing to draw. ``width`` is that of the place in inches: two panels
lie side by side from 5 on. What is measured besides angles is in
:mod:`~lorasmith.diagnostics.further_panels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lorasmith.diagnostics.compare import Comparison
from lorasmith.diagnostics.panel_parts import (
    cell_image,
    cell_means,
    colour_bar,
    floor_span,
    index_ticks,
    layer_axis,
    legend_above,
    reference_lines,
    theta_axis,
    unit_boxes,
)
from lorasmith.diagnostics.panel_scales import (
    ROLES,
    THETA,
    WRITTEN_COLUMNS,
    Canvas,
    Scale,
    changed_units,
    colour_norm,
    even_sample,
    finite_only,
    font_size,
    layers_of,
    line_style,
    lower_edge,
    role_colour,
    scale_kind,
    units_word,
)
from lorasmith.diagnostics.records import RotationReport, UnitRotation
from lorasmith.errors import DataError
from lorasmith.theme import INK, MUTED, SERIES

__all__ = [
    "comparison",
    "head_map",
    "head_panels",
    "heat_map",
    "layer_profile",
    "mode_distribution",
    "panel_heights",
    "projection_comparison",
]


def heat_map(figure: Canvas, report: RotationReport, width: float, scale: Scale) -> None:
    """Cells of mean θ by projection and layer, with a colour bar."""
    units = changed_units(report)
    labels = list(dict.fromkeys(u.label for u in units))
    layers = layers_of(units)
    values, below = cell_means(units, labels, layers, lambda u: u.label)
    axes = figure.add_subplot()
    norm = colour_norm(values, scale)
    written = len(layers) <= WRITTEN_COLUMNS
    image = cell_image(axes, values, below, norm, written)
    names = ["other" if layer is None else str(layer) for layer in layers]
    index_ticks(axes.xaxis, names, width * 4.2)
    index_ticks(axes.yaxis, labels, len(labels))
    axes.set_xlabel("layer")
    colour_bar(figure, image, axes)


def head_map(
    figure: Canvas,
    width: float,
    scale: Scale,
    panels: Mapping[str, list[UnitRotation]],
    across: int,
    heights: Sequence[float],
) -> None:
    """Cells of θ by head and layer, a panel a projection, on one scale of colours."""
    layers = layers_of([u for units in panels.values() for u in units])
    grid = figure.subplots(len(heights), across, height_ratios=heights, squeeze=False, sharex=True)
    drawn = []
    for label, units in panels.items():
        heads = list(range(1 + max(u.head or 0 for u in units)))
        drawn.append((label, heads, *cell_means(units, heads, layers, lambda u: u.head)))
    everything = np.concatenate([values.ravel() for _, _, values, _ in drawn])
    norm = colour_norm(everything, scale)
    image = None
    for place, axes in enumerate(grid.ravel()):
        if place >= len(drawn):
            axes.set_axis_off()
            continue
        label, heads, values, below = drawn[place]
        image = cell_image(axes, values, below, norm, written=False)
        count = f"{len(heads)} head{'s' if len(heads) != 1 else ''}"
        axes.set_title(f"{label}: {count}", loc="left", fontsize=font_size(width))
        index_ticks(axes.yaxis, [str(h) for h in heads], heights[place // across] * 4)
        if place % across == 0:
            axes.set_ylabel("head")
        if place + across >= len(drawn):
            axes.set_xlabel("layer")
            names = ["other" if layer is None else str(layer) for layer in layers]
            index_ticks(axes.xaxis, names, width / across * 4.2)
            axes.tick_params(labelbottom=True)
    colour_bar(figure, image, grid.ravel().tolist())


def layer_profile(figure: Canvas, report: RotationReport, width: float, scale: Scale) -> None:
    """A line a role over its band, with thresholds and the noise floor."""
    units = [u for u in changed_units(report) if u.layer is not None]
    if not units:
        raise DataError("There is no profile to draw: no numbered layer changed.")
    layers = sorted({u.layer for u in units if u.layer is not None})
    roles = [r for r in ROLES if any(u.role == r for u in units)]
    others = [u for u in units if u.role not in ROLES]
    axes = figure.add_subplot()
    every = finite_only([u.theta_deg for u in units])
    kind = scale_kind(every, scale)
    edge = lower_edge(every, kind)
    drawn: list[float] = []
    for role in [*roles, *([None] if others else [])]:
        chosen = others if role is None else [u for u in units if u.role == role]
        by_layer: dict[int, list[float]] = {}
        for u in chosen:
            if u.layer is not None and math.isfinite(u.theta_deg):
                by_layer.setdefault(u.layer, []).append(u.theta_deg)
        style = line_style(len(ROLES) if role is None else ROLES.index(role), len(layers))
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
    theta_axis(axes, "y", kind, drawn)
    reference_lines(axes, report, "y")
    floor_span(axes, report, "y", at_edge=True)
    axes.set_ylabel(THETA)
    axes.set_xlabel("layer")
    layer_axis(axes, layers)
    legend_above(figure, axes, width)


def projection_comparison(figure: Canvas, report: RotationReport, scale: Scale) -> None:
    """Boxes and points of the units, a row a projection."""
    units = changed_units(report)
    labels = list(dict.fromkeys(u.label for u in units))
    values = [finite_only([u.theta_deg for u in units if u.label == label]) for label in labels]
    axes = figure.add_subplot()
    every = finite_only([u.theta_deg for u in units])
    kind = scale_kind(every, scale)
    edge = lower_edge(every, kind)
    unit_boxes(axes, labels, values, edge, [role_colour(units, label) for label in labels])
    theta_axis(axes, "x", kind, [max(v, edge) for v in every])
    reference_lines(axes, report, "x")
    floor_span(axes, report, "x", at_edge=True)
    axes.set_xlabel(THETA)


def mode_distribution(figure: Canvas, report: RotationReport, width: float) -> None:
    """Bars of EgoRA's classes and of ours, beside one another if ``width`` allows."""
    total = len(changed_units(report))
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
        axes.set_title(title, loc="left", fontsize=font_size(width))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
    grid[-1].set_xlabel(f"share of the {units_word(report)} (%)")
    if width >= 5:
        grid[0].set_xlabel(f"share of the {units_word(report)} (%)")


def comparison(figure: Canvas, both: Comparison, width: float, scale: Scale) -> None:
    """θ unit by unit on the left (or above), mean θ by layer on the right."""
    wide = width >= 5
    left, right = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
    every = finite_only([t for u in both.units for t in u.theta_deg])
    kind = scale_kind(every, scale)
    edge = lower_edge(every, kind)
    shown = [max(t, edge) for t in every]
    names = both.names
    if len(names) == 2:
        roles = list(dict.fromkeys(u.role if u.role in ROLES else None for u in both.units))
        for role in roles:
            style = line_style(len(ROLES) if role is None else ROLES.index(role))
            pairs = [
                [max(t, edge) for t in u.theta_deg]
                for u in both.units
                if (u.role if u.role in ROLES else None) == role
                and all(map(math.isfinite, u.theta_deg))
            ]
            if pairs:
                left.plot(
                    *np.array(even_sample(pairs, 600)).T,
                    label={"mlp": "MLP", None: "other"}.get(role, role),
                    linestyle="none",
                    marker=style["marker"],
                    markersize=2.6,
                    markeredgewidth=0,
                    alpha=0.6,
                    color=style["color"],
                )
        for which in ("x", "y"):
            theta_axis(left, which, kind, shown)
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
        values = [finite_only([u.theta_deg[i] for u in both.units]) for i in range(len(names))]
        colours = [line_style(i)["color"] for i in range(len(names))]
        unit_boxes(left, list(names), values, edge, colours)
        theta_axis(left, "x", kind, shown)
        left.set_xlabel(THETA)
    by_layer = {x: means for x, means in both.by_layer().items() if x is not None}
    layers = sorted(by_layer)
    means: list[float] = []
    for i, name in enumerate(names):
        style = line_style(i, len(layers))
        line = [by_layer[x][i] for x in layers]
        drawn = [max(v, edge) if math.isfinite(v) else math.nan for v in line]
        means += [v for v in drawn if math.isfinite(v)]
        right.plot(layers, drawn, label=name, **style)
    theta_axis(right, "y", kind, means)
    right.set_ylabel("mean θ (degrees)")
    right.set_xlabel("layer")
    if layers:
        layer_axis(right, layers)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if len(names) < 5 else 3)


def head_panels(report: RotationReport) -> dict[str, list[UnitRotation]]:
    """Units with a head by projection, in the order in which they are drawn."""
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


def panel_heights(panels: Mapping[str, list[UnitRotation]], across: int) -> list[float]:
    """Inches of each row of ``across`` panels, by the most heads in it."""
    heads = [1 + max(u.head or 0 for u in units) for units in panels.values()]
    rows = [max(heads[i : i + across]) for i in range(0, len(heads), across)]
    return [min(max(0.05 * n, 0.55), 2.6) for n in rows]
