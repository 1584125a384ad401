"""Numbers, scales and styles of the figures of a diagnosis.

What :mod:`~lorasmith.diagnostics.plots`, its panels and their parts
(:mod:`~lorasmith.diagnostics.panel_parts`) agree on, so that one role has one colour and one
angle one place in every figure: the size of type at a width, the units and layers of a report in
their order, whether an axis is logarithmic and where it begins, the colours of cells and the
style of the n-th line. Nothing is drawn here but the empty figure.

An axis is logarithmic where the largest angle is over 30 times the tenth percentile, shows six
decades at most, and what is smaller lies on its edge. Angles are in degrees, widths in inches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from lorasmith.diagnostics.records import RotationReport, UnitRotation
from lorasmith.errors import ConfigError, DataError
from lorasmith.theme import INK, SERIES, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import NDArray

__all__ = [
    "ROLES",
    "THETA",
    "WRITTEN_COLUMNS",
    "Canvas",
    "Grid",
    "Scale",
    "changed_units",
    "colour_norm",
    "even_sample",
    "finite_only",
    "font_size",
    "in_degrees",
    "layers_of",
    "least_shown",
    "line_style",
    "lower_edge",
    "mean_by_layer",
    "plain_figure",
    "plain_height",
    "role_colour",
    "scale_kind",
    "units_word",
]

Scale: TypeAlias = Literal["auto", "linear", "log"]
Canvas: TypeAlias = "Figure | SubFigure"
Grid: TypeAlias = "NDArray[np.float64]"

#: Label of an axis of angles.
THETA = "rotation θ (degrees)"
#: Largest angle over the tenth percentile from which an axis is logarithmic.
_WIDE = 30.0
#: Decades that a logarithmic axis shows at most; what is smaller lies on its edge.
_DECADES = 6
#: Numbers are written into the cells of heat maps that have no more columns.
WRITTEN_COLUMNS = 8
#: Roles in the order of their colours.
ROLES = ("q", "k", "v", "o", "mlp")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def plain_figure(width: float, height: float) -> Iterator[Figure]:
    """A white figure in inches, drawn once while the settings of its canvas hold."""
    with canvas(width, height, font_size=font_size(width)) as figure:
        figure.set_facecolor("white")
        yield figure
        # Ticks are made when they are first drawn, by the settings of that moment.
        figure.draw_without_rendering()


def font_size(width: float) -> float:
    """Points of the type at a width in inches."""
    return 7.5 if width < 5 else 8.5 if width < 8 else 10.0


def plain_height(width: float) -> float:
    """Inches of one plot of lines at a width in inches."""
    return max(2.3, min(0.42 * width, 3.6))


def changed_units(report: RotationReport) -> Sequence[UnitRotation]:
    """The units of a report; a DataError where there are none."""
    if not report.units:
        raise DataError("There is nothing to draw: no weight changed.")
    return report.units


def units_word(report: RotationReport) -> str:
    """What a unit of the report is called."""
    return "units" if any(u.head is not None for u in report.units) else "projections"


def in_degrees(value: float) -> str:
    """Three digits and the sign."""
    return "not a number" if math.isnan(value) else f"{value:.3g}°"


def layers_of(units: Sequence[UnitRotation]) -> list[int | None]:
    """Numbered layers in order, and None last where a unit is in no layer."""
    numbered: list[int | None] = [*sorted({u.layer for u in units if u.layer is not None})]
    return [*numbered, None] if any(u.layer is None for u in units) else numbered


def finite_only(values: Sequence[float]) -> list[float]:
    """The values without infinite ones and those that are not numbers."""
    return [v for v in values if math.isfinite(v)]


def scale_kind(values: Sequence[float], scale: Scale) -> Literal["linear", "log"]:
    """Linear or logarithmic; ConfigError where there is no such scale."""
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


def least_shown(values: Sequence[float]) -> float:
    """The smallest value that a logarithmic axis shows."""
    positive = [v for v in values if v > 0]
    return max(min(positive), max(positive) / 10**_DECADES) if positive else 1e-3


def lower_edge(values: Sequence[float], kind: str) -> float:
    """What is smaller is drawn here."""
    return least_shown(values) if kind == "log" else 0.0


def colour_norm(values: Grid, scale: Scale) -> Any:
    """Of colours over angles, by the same rule as axes."""
    from matplotlib.colors import LogNorm, Normalize

    finite = finite_only(values.ravel().tolist())
    if scale_kind(finite, scale) == "log":
        low, high = least_shown(finite), max(finite)
        return LogNorm(low, high if high > low else low * 1.01, clip=True)
    high = max(finite, default=0.0)
    low = min(finite, default=0.0)
    if high <= 0:
        return Normalize(0, 1)
    return Normalize(low if 0.5 * high < low < high else 0.0, high)


def line_style(number: int, points: int = 1) -> dict[str, Any]:
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


def role_colour(units: Sequence[UnitRotation], label: str) -> str:
    """That of the role of a projection."""
    role = next(u.role for u in units if u.label == label)
    return str(line_style(ROLES.index(role) if role in ROLES else len(ROLES))["color"])


def mean_by_layer(records: Sequence[Any], value: Callable[[Any], float]) -> tuple[Any, Any]:
    """Layers and the mean of a value in each, infinite ones left out."""
    groups: dict[int, list[float]] = {}
    for one in records:
        groups.setdefault(one.layer, []).append(value(one))
    at = sorted(groups)
    return at, [float(np.mean(groups[x])) for x in at]


def even_sample(values: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]
