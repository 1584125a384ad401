"""Pictures of a fleet, for a paper or a screen.

    from lorasmith.fleet import plots, analysis

    groups = analysis.clusters(similar)
    plots.save(plots.heat_map(similar, groups), "similarity.pdf")

    heat_map      cosines of all pairs, similar adapters side by side, groups framed
    dendrogram    1 − cosine at which groups are joined, with the cut
    plane         the adapters as points, nearer where their directions are alike
    frontier      bytes against error of the ways to compress a fleet

Each function gives a Matplotlib figure of its own, tied to no window and to no global setting.
The colours of groups are those of Okabe and Ito (2008), with other markers where there are more
groups than colours; the heat map runs from blue over white to orange, with 0 in the middle.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasmith.diagnostics.plots import COLUMN, PAGE, save
from lorasmith.fleet.analysis import Clusters, Embedding, clusters, scipy_part
from lorasmith.fleet.benchmark import FleetBenchmark, Setting
from lorasmith.fleet.similarity import SimilarityMatrix
from lorasmith.theme import GRID, INK, MUTED, SERIES, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMN", "PAGE", "dendrogram", "frontier", "heat_map", "plane", "save", "save_all"]

#: Adapters up to which their names, and the numbers in the cells, are written.
_NAMED = 60
_WRITTEN = 20
_LONGEST = 28
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FONT = 8.0
#: Errors below this are drawn here: what is left of nothing lost is rounding.
_LEAST_ERROR = 1e-8
_DASHES: dict[str, Any] = {"joint": "-", "share": (0, (4, 2))}


def heat_map(
    similar: SimilarityMatrix, groups: Clusters | None = None, *, width: float = PAGE
) -> Figure:
    """Cosines of all pairs in the order of the dendrogram.

    Args:
        similar: The inner products.
        groups: Which groups to frame; those of :func:`~lorasmith.fleet.analysis.clusters` by
            default.
        width: In inches.

    Raises:
        MissingDependencyError: Matplotlib or SciPy is not installed.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    groups = clusters(similar) if groups is None else groups
    order = list(groups.order)
    values = similar.cosine[np.ix_(order, order)]
    n = len(order)
    with canvas(width, 0.86 * width, font_size=_font(n)) as figure:
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("cosine", [SERIES[0], "#ffffff", SERIES[1]])
        image = axes.imshow(values, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        _frame(axes)
        if n <= _NAMED:
            names = [_short(similar.ids[i]) for i in order]
            axes.set_xticks(range(n), names, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(n), names)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{n:,} adapters in the order of the dendrogram")
        if n <= _WRITTEN:
            for row, column in np.ndindex(n, n):
                value = values[row, column]
                axes.text(
                    column,
                    row,
                    f"{value:.2f}".replace("0.", ".").replace("-.00", ".00"),
                    ha="center",
                    va="center",
                    fontsize=_FONT - 2,
                    color="#ffffff" if abs(value) > 0.75 else INK,
                )
        for start, stop in _runs([groups.labels[i] for i in order]):
            if stop - start > 1:
                corner = (start - 0.5, start - 0.5)
                size = stop - start
                axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=INK, lw=1.2))
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("cosine of ΔW", color=MUTED)
        return figure


def dendrogram(groups: Clusters, *, width: float = PAGE) -> Figure:
    """At which 1 − cosine groups are joined.

    Args:
        groups: The groups.
        width: In inches.

    Raises:
        MissingDependencyError: Matplotlib or SciPy is not installed.
    """
    n = len(groups.ids)
    height = min(11.0, 1.1 + 0.2 * max(n, 3))
    with canvas(width, height, font_size=_font(n)) as figure:
        axes = figure.add_subplot()
        order = list(groups.order)
        if n > 1:
            drawn = scipy_part("cluster.hierarchy").dendrogram(groups.merges, no_plot=True)
            order = drawn["leaves"]
            where = _leaf_groups(groups, order)
            for heights, places in zip(drawn["dcoord"], drawn["icoord"], strict=True):
                colour = MUTED
                if max(heights) <= groups.height:
                    # Leaves stand at 5, 15, 25, …: any of those below tells the group.
                    colour = _colour(where[int(places[0] // 10)])
                axes.plot(heights, places, color=colour, lw=1.6, solid_joinstyle="miter")
            axes.axvline(groups.height, color=INK, lw=1.0, ls=(0, (4, 2)))
            # In data units of the height, above the topmost leaf.
            axes.annotate(
                f"cut at {groups.height:.2f}: {len(groups.groups)} groups",
                (groups.height, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=INK,
            )
        axes.set_ylim(0, 10 * n)
        axes.set_xlim(left=0)
        axes.grid(visible=False)
        if n <= _NAMED:
            axes.set_yticks([10 * i + 5 for i in range(n)], [_short(groups.ids[i]) for i in order])
            for label, place in zip(axes.get_yticklabels(), order, strict=True):
                label.set_color(_label_colour(groups, place))
        else:
            axes.set_yticks([])
        axes.set_xlabel("1 − cosine of ΔW")
        return figure


def plane(points: Embedding, groups: Clusters | None = None, *, width: float = PAGE) -> Figure:
    """The adapters as points of the plane in which their directions differ most.

    Args:
        points: The points.
        groups: Groups to colour.
        width: In inches.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    n = len(points.ids)
    with canvas(width, 0.72 * width, font_size=_FONT) as figure:
        axes = figure.add_subplot()
        for label in range(1 if groups is None else len(groups.groups)):
            here = [i for i in range(n) if groups is None or groups.labels[i] == label]
            axes.plot(
                points.points[here, 0],
                points.points[here, 1],
                _MARKERS[(label // len(SERIES)) % len(_MARKERS)],
                color=_colour(label),
                ms=6,
                mec="#ffffff",
                mew=0.6,
            )
        axes.margins(0.14)
        axes.set_aspect("equal", adjustable="datalim")
        axes.axhline(0, color=GRID, lw=0.8, zorder=0)
        axes.axvline(0, color=GRID, lw=0.8, zorder=0)
        axes.grid(visible=False)
        axes.set_xlabel(f"two directions with {points.share:.0%} of the variance between adapters")
        if n <= _NAMED:
            _write_names(figure, axes, points)
        return figure


def frontier(found: FleetBenchmark, *, width: float = PAGE) -> Figure:
    """Bytes against error: lower and further left is better.

    A line is a basis in one codec over its budgets, drawn at the mean error, with a stroke up to
    the worst one; crosses are plain factors; the upright line is the adapters as they are stored.
    Errors below 1e-8 lie at 1e-8.

    Args:
        found: What was measured.
        width: In inches.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    with canvas(width, 0.6 * width, font_size=_FONT) as figure:
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        axes = figure.add_subplot()
        series: dict[tuple[str, str], list[Setting]] = {}
        for one in found.settings:
            series.setdefault((one.basis, one.codec), []).append(one)
        codecs: list[str] = list(dict.fromkeys(one.codec for one in found.settings))
        for (basis, codec), points in series.items():
            here = sorted(points, key=lambda one: one.bytes.total)
            _with_worst(
                axes,
                [(one.bytes.total, one.mean, one.worst) for one in here],
                label=f"{basis}, {codec}",
                color=_colour(codecs.index(codec)),
                marker=_MARKERS[codecs.index(codec) % len(_MARKERS)],
                ls=_DASHES[basis],
                mfc=None if basis == "joint" else "#ffffff",
            )
        for number, each in enumerate(found.plain):
            _with_worst(
                axes,
                [(each.total, each.mean, each.worst)],
                label=f"plain, {each.codec}",
                color=INK,
                marker=("x", "+", "1", "2", "3")[number % 5],
                ls="none",
            )
        axes.axvline(found.stored, color=MUTED, lw=1.0, ls=(0, (1, 2)), label="as stored")
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Small fleets lie within one power of ten.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"size of {len(found.ids):,} adapters")
        axes.set_ylabel("relative squared error of ΔW, mean to worst")
        axes.grid(visible=True, axis="both")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=_FONT - 1)
        return figure


def save_all(
    similar: SimilarityMatrix, groups: Clusters, points: Embedding, folder: Path
) -> list[Path]:
    """Writes the three figures as PNG files: heat-map, dendrogram, map."""
    return [
        save(heat_map(similar, groups), folder / "heat-map.png"),
        save(dendrogram(groups), folder / "dendrogram.png"),
        save(plane(points, groups), folder / "map.png"),
    ]


def _with_worst(axes: Any, points: list[tuple[int, float, float]], **look: Any) -> None:
    """A line through (bytes, mean error), and from each point a stroke up to the worst error."""
    sizes = [size for size, _, _ in points]
    mean = [max(value, _LEAST_ERROR) for _, value, _ in points]
    worst = [max(value, _LEAST_ERROR) for _, _, value in points]
    axes.plot(sizes, mean, ms=5, lw=1.4, **look)
    axes.vlines(sizes, mean, worst, color=look["color"], lw=0.9)


def _write_names(figure: Any, axes: Any, points: Embedding) -> None:
    """Names beside the points, moved up or down until they do not cover each other."""
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    line = 1.15 * _FONT * figure.dpi / 72
    spots = to_pixels(points.points)
    taken = [(float(x) - 5, float(x) + 5, float(y)) for x, y in spots]
    right = axes.get_window_extent().x1
    for place in np.argsort(-spots[:, 1]):
        x, y = (float(v) for v in spots[place])
        name = _short(points.ids[place])
        size = 0.56 * _FONT * len(name) * figure.dpi / 72
        left = x + 7 + size > right
        start = x - 7 - size if left else x + 7
        lowest = y
        # Downwards only, in the order from the top: then every name finds a place.
        for begin, end, at in sorted(taken, key=lambda t: -t[2]):
            if begin < start + size and start < end and abs(at - lowest) < line:
                lowest = at - line
        taken.append((start, start + size, lowest))
        moved = y - lowest > 0.5 * line
        axes.annotate(
            name,
            tuple(points.points[place]),
            xytext=((start - x) * 72 / figure.dpi, (lowest - y) * 72 / figure.dpi),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=_FONT - 1,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "relpos": (0, 0.5)}
            if moved
            else None,
        )


def _font(n: int) -> float:
    return _FONT if n <= 30 else 6.0


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[:12]}…{name[-(_LONGEST - 13) :]}"


def _frame(axes: Any) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of equal labels side by side."""
    edges = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]
    return list(pairwise(edges))


def _leaf_groups(groups: Clusters, order: list[int]) -> list[int]:
    return [groups.labels[i] for i in order]


def _colour(label: int) -> str:
    return SERIES[label % len(SERIES)]


def _label_colour(groups: Clusters, place: int) -> str:
    alone = len(groups.groups[groups.labels[place]]) == 1
    return MUTED if alone else _colour(groups.labels[place])
