from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from lorasmith.errors import DataError
from lorasmith.web.figures import INK, SERIES, figure_to_svg, loss_figure, themed


def _history(steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 3 / step, "learning_rate": 1e-3} for step in range(1, steps + 1)]


def _curve(svg: str, color: str) -> list[tuple[float, float]]:
    """The points of the longest path drawn in a colour, in SVG units (y grows downwards)."""
    paths = [
        element.attrib["d"]
        for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
        if color in element.attrib.get("style", "") and "opacity" not in element.attrib["style"]
    ]
    lines = [path for path in paths if "C" not in path]  # round markers are made of curves
    numbers = [word for word in max(lines, key=len).split() if word not in "MLz"]
    return list(zip(map(float, numbers[::2]), map(float, numbers[1::2]), strict=True))


def test_the_figure_is_one_svg_element_that_scales_and_follows_the_theme() -> None:
    svg = loss_figure([*_history(5), {"step": 5, "eval_loss": 1.0}])
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"optimiser step", "loss (nats per token)", "training", "held out"} <= texts
    assert f"var(--series-1, {SERIES[0]})" in svg
    assert f"var(--figure-ink, {INK})" in svg
    assert "DejaVu" not in svg


def test_the_points_drawn_are_the_losses() -> None:
    points = _curve(loss_figure(_history(6)), SERIES[0])
    losses = [3 / step for step in range(1, 7)]
    assert len(points) == len(losses)
    # Affine in both axes: the same fractions of the range as in the data, y upside down.
    top, bottom = points[0][1], points[-1][1]
    for (x, y), step, loss in zip(points, range(1, 7), losses, strict=True):
        assert (x - points[0][0]) / (points[-1][0] - points[0][0]) == pytest.approx((step - 1) / 5)
        expected = (loss - losses[-1]) / (losses[0] - losses[-1])
        assert (bottom - y) / (bottom - top) == pytest.approx(expected, abs=1e-4)


def test_the_smoothed_curve_of_a_straight_line_is_that_line() -> None:
    history = [{"step": step, "loss": 10 - 0.1 * step} for step in range(60)]
    points = _curve(loss_figure(history), SERIES[0])
    (x0, y0), (x1, y1) = points[0], points[-1]
    for x, y in points:
        assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=1e-3)


def test_a_non_finite_loss_leaves_a_gap() -> None:
    history = _history(30)
    history[14]["loss"] = math.nan
    svg = loss_figure(history)
    assert "nan" not in svg.lower().replace("nats", "")


def test_long_runs_are_thinned_but_keep_their_last_step() -> None:
    long = loss_figure(_history(50_000))
    assert len(long) < 120_000
    clip = next(ET.fromstring(long).iter("{http://www.w3.org/2000/svg}rect")).attrib
    # The data fill the axes but for a margin of 1.5 % of their range on both sides.
    end = float(clip["x"]) + float(clip["width"]) * 1.015 / 1.03
    assert _curve(long, SERIES[0])[-1][0] == pytest.approx(end, abs=0.01)


def test_equal_histories_give_equal_text() -> None:
    assert loss_figure(_history(9)) == loss_figure(_history(9))


@pytest.mark.parametrize("history", [[], [{"step": 1, "learning_rate": 1e-3}]])
def test_without_a_loss_there_is_an_error_that_says_so(history: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="no loss to draw"):
        loss_figure(history)


def test_a_users_own_matplotlib_settings_are_neither_used_nor_changed() -> None:
    import matplotlib as mpl

    plain = loss_figure(_history(5))
    with mpl.rc_context({"lines.linewidth": 9.0, "font.size": 30}):
        before = dict(mpl.rcParams)
        assert loss_figure(_history(5)) == plain
        assert dict(mpl.rcParams) == before


def test_any_matplotlib_figure_can_be_turned_into_svg() -> None:
    with themed(width=3, height=2) as (figure, axes):
        axes.imshow([[0.0, 1.0], [2.0, 3.0]], cmap="viridis")
        svg = figure_to_svg(figure)
    assert "data:image/png;base64," in svg


def test_importing_the_package_loads_neither_matplotlib_nor_jinja_nor_torch() -> None:
    code = (
        "import sys, lorasmith.web;"
        "print([name for name in ('matplotlib', 'jinja2', 'torch') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
