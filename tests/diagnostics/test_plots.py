"""Figures of a diagnosis: what they draw is in the report, and no report breaks them."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.diagnostics import plots
from lorasmith.diagnostics.compare import compare
from lorasmith.diagnostics.records import RotationReport
from lorasmith.errors import ConfigError, DataError
from tests.diagnostics.reports import report, unit

ALL: dict[str, Callable[..., Any]] = {
    name: getattr(plots, name)
    for name in plots.__all__
    if name not in ("COLUMN", "PAGE", "save", "comparison")
}
OF_UNITS = ("heat_map", "layer_profile", "projection_comparison", "mode_distribution")


def _with(angles: list[float], **changes: Any) -> RotationReport:
    """One layer after another, one q head each."""
    units = tuple(unit(t, layer=i, **changes) for i, t in enumerate(angles))
    return report(0, retention=False, units=units)


def _heat(figure: Any) -> Any:
    return figure.axes[0].images[0].get_array()


def _texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def _q_and_v() -> RotationReport:
    """What PEFT adapts by default, of a model with few heads."""
    full = report(30, 9, 3, retention=False, spectra=False, diversity=False)
    units = tuple(u for u in full.units if u.projection in ("q_proj", "v_proj"))
    return report(0, retention=False, spectra=False, diversity=False, units=units)


CASES = {
    "one layer": lambda: report(1, 2, 1),
    "q and v of few heads": _q_and_v,
    "one unit": lambda: _with([1.5]),
    "by projection": lambda: report(3, 0),
    "40 layers of 64 heads": lambda: report(40, 64, 8, spread=1.3, intruders=True),
    "only MLP": lambda: report(2, 0, attention=False),
    "all angles zero": lambda: _with([0.0] * 4, floor_deg=0.0),
    "a NaN": lambda: _with([0.5, math.nan, 1.0]),
    "only NaN": lambda: _with([math.nan, math.nan]),
    "six decades": lambda: _with([1e-9, 1e-6, 0.0, 1e-3, 1.0, 179.9]),
    "scattered layers": lambda: report((3, 17, 40), 2, 1),
    "all below noise": lambda: _with([1e-3, 2e-3], floor_deg=0.5),
    "no layer": lambda: report(0, units=(unit(1.0, layer=None, head=None, role=None),)),
    "long names": lambda: _with([1.0, 2.0], projection="a_very_long_projection_name_indeed"),
}


@pytest.mark.parametrize("width", [plots.COLUMN, plots.PAGE])
@pytest.mark.parametrize("case", CASES)
def test_no_report_breaks_a_figure(case: str, width: float, tmp_path: Path) -> None:
    given = CASES[case]()
    drawn = 0
    for name, plot in ALL.items():
        try:
            figure = plot(given, width=width)
        except DataError:
            assert name not in ("heat_map", "mode_distribution", "report_figure")
            continue
        path = plots.save(figure, tmp_path / f"{name}.png", dpi=72)
        with Image.open(path) as picture:
            assert picture.width == pytest.approx(72 * width, abs=1)
        drawn += 1
    assert drawn >= 4


@pytest.mark.parametrize("width", [plots.COLUMN, plots.PAGE, 8.6])  # the last: of the web page
@pytest.mark.parametrize(
    "case", ["one layer", "q and v of few heads", "40 layers of 64 heads", "only MLP"]
)
def test_no_text_lies_on_another_or_leaves_the_figure(case: str, width: float) -> None:
    from matplotlib.text import Text

    given = CASES[case]()
    for name in ("heat_map", "head_map", "layer_profile", "mode_distribution", "report_figure"):
        if name == "head_map" and not any(u.head is not None for u in given.units):
            continue
        figure = ALL[name](given, width=width)
        figure.draw_without_rendering()
        page, hidden = figure.bbox, _hidden(figure)
        boxes = [
            (t.get_text(), t.get_window_extent())
            for t in figure.findobj(Text)
            if t.get_text().strip() and t.get_visible() and id(t) not in hidden
        ]
        for text, box in boxes:
            assert box.x0 >= -2, (name, text)
            assert box.x1 <= page.x1 + 2, (name, text)
            assert box.y0 >= -2, (name, text)
            assert box.y1 <= page.y1 + 2, (name, text)
        for i, (text, box) in enumerate(boxes):
            for other, against in boxes[:i]:
                across = min(box.x1, against.x1) - max(box.x0, against.x0)
                down = min(box.y1, against.y1) - max(box.y0, against.y0)
                assert not (across > 1.5 and down > 2.5), (name, text, other)


def _hidden(figure: Any) -> set[int]:
    """Labels of ticks outside the limits, which exist but are not drawn."""
    found = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    found |= {id(tick.label1), id(tick.label2)}
    return found


def test_the_heat_map_holds_the_means() -> None:
    given = report(3, 4, 2)
    cells = _heat(plots.heat_map(given))
    labels = list(given.by_projection)
    assert cells.shape == (len(labels), 3)
    for row, label in enumerate(labels):
        for layer in range(3):
            angles = [u.theta_deg for u in given.units if (u.label, u.layer) == (label, layer)]
            assert cells[row, layer] == pytest.approx(sum(angles) / len(angles))


def test_the_head_map_has_a_panel_a_projection_with_its_own_number_of_heads() -> None:
    given = report(5, 6, 2)
    figure: Any = plots.head_map(given)
    panels: dict[str, Any] = {
        a.get_title(loc="left"): a.images[0].get_array() for a in figure.axes if a.images
    }
    assert [(t, p.shape) for t, p in panels.items() if p is not None] == [
        ("q_proj: 6 heads", (6, 5)),
        ("o_proj: 6 heads", (6, 5)),
        ("k_proj: 2 heads", (2, 5)),
        ("v_proj: 2 heads", (2, 5)),
    ]
    want = {(u.head, u.layer): u.theta_deg for u in given.units if u.label == "k_proj"}
    got = panels["k_proj: 2 heads"]
    assert got is not None
    assert {(h, x): float(got[h, x]) for h in range(2) for x in range(5)} == pytest.approx(want)


def test_missing_cells_stay_empty_and_broken_ones_get_a_cross() -> None:
    units = (
        unit(1.0, layer=0),
        unit(2.0, layer=1, projection="k_proj"),
        unit(math.nan, layer=1),
    )
    figure = plots.heat_map(report(0, units=units))
    cells = _heat(figure)
    assert np.ma.getmaskarray(cells).tolist() == [[False, True], [True, False]]
    (cross,) = figure.axes[0].lines
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([1], [0])


def test_cells_below_the_noise_floor_are_hatched() -> None:
    figure = plots.heat_map(_with([0.5, 0.005, 0.002, 0.4], floor_deg=0.01))
    (patch,) = figure.axes[0].patches
    assert patch.get_hatch()
    box = patch.get_path().get_extents()
    assert (box.x0, box.x1) == (0.5, 2.5)
    assert not plots.heat_map(_with([0.5, 0.02], floor_deg=0.01)).axes[0].patches


def test_the_profile_draws_mean_and_percentiles_by_role() -> None:
    given = report(6, 8, 2, spread=0.2)
    axes = plots.layer_profile(given).axes[0]
    named = {str(line.get_label()): line for line in axes.lines}
    lines: dict[str, Any] = {k: line for k, line in named.items() if k[0] != "_"}
    assert list(lines) == ["q", "k", "v", "o", "MLP"]
    for layer, mean in zip(lines["q"].get_xdata(), lines["q"].get_ydata(), strict=True):
        angles = [u.theta_deg for u in given.units if u.role == "q" and u.layer == layer]
        assert mean == pytest.approx(np.mean(angles))
    assert axes.get_ylabel() == "rotation θ (degrees)"


@pytest.mark.parametrize(
    ("largest", "lines"),
    [(1.0, []), (4.0, ["3°"]), (6.0, ["3°", "5°"]), (10.0, ["3°", "5°", "θ crit"])],
)
def test_thresholds_appear_only_where_the_data_reach_them(largest: float, lines: list[str]) -> None:
    figure = plots.layer_profile(_with([0.2 * largest, largest]))
    found = [t for t in _texts(figure) if "°" in t or t == "θ crit"]
    assert ", ".join(found).split(", ") == (lines or [""])


@pytest.mark.parametrize(
    ("angles", "scale", "expected"),
    [
        ([1.0, 2.0, 3.0], "auto", "linear"),
        ([1e-3, 1e-2, 1.0, 50.0], "auto", "log"),
        ([1.0, 2.0, 3.0], "log", "log"),
        ([1e-3, 50.0], "linear", "linear"),
        ([0.0, 0.0], "log", "linear"),
    ],
)
def test_the_axis_is_logarithmic_where_the_spread_is_large(
    angles: list[float], scale: Any, expected: str
) -> None:
    axes = plots.layer_profile(_with(angles), scale=scale).axes[0]
    assert axes.get_yscale() == expected
    low, high = axes.get_ylim()
    assert low <= min(a for a in angles if a > 0 or expected == "linear")
    assert high >= max(angles)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match="scale"):
        plots.heat_map(report(1), scale="cubic")  # type: ignore[arg-type]


def test_boxes_are_the_percentiles() -> None:
    angles = [float(t) for t in range(1, 12)]
    figure = plots.projection_comparison(_with(angles))
    (box,) = figure.axes[0].patches[:1]
    assert (box.get_x(), box.get_x() + box.get_width()) == pytest.approx((3.5, 8.5))


def test_classes_are_counted_side_by_side() -> None:
    given = _with([0.001, 1.0, 6.0, 90.0])
    texts = _texts(plots.mode_distribution(given))
    assert {"EgoRA's classes", "our classes"} <= set(texts)
    assert texts.count("2 (50 %)") >= 2  # preserved and substitutive
    assert "1 (25 %)" in texts


def test_the_spectrum_draws_the_singular_values() -> None:
    given = report(1, 2, 1)
    axes = plots.spectrum(given).axes[0]
    by_label = {line.get_label(): line for line in axes.lines}
    for one in given.spectra:
        assert list(by_label[one.projection].get_ydata()) == pytest.approx(one.singular_values)
    assert axes.get_yscale() == "log"


def test_a_spectrum_of_zeros_can_be_drawn() -> None:
    given = report(2, 2, 1)
    spectra = tuple(
        dataclasses.replace(s, singular_values=(0.0, 0.0), rank=0, effective_rank=0.0)
        for s in given.spectra
    )
    plots.spectrum(dataclasses.replace(given, spectra=spectra)).draw_without_rendering()


def test_intruders_have_a_panel_where_they_were_counted() -> None:
    assert len(plots.spectrum(report(3, 2, 1)).axes) == 2
    given = report(3, 2, 1, intruders=True)
    cells: Any = plots.spectrum(given).axes[2].images[0].get_array()
    assert cells is not None
    assert cells.sum() == sum(int(s.intruders or 0) for s in given.spectra)


def test_diversity_before_after_and_change() -> None:
    given = report(4, 4, 2)
    upper, lower = plots.head_diversity(given).axes
    q = [d for d in given.diversity if d.role == "q"]
    before, after = upper.lines[:2]
    assert list(before.get_ydata()) == pytest.approx([d.before for d in q])
    assert list(after.get_ydata()) == pytest.approx([d.after for d in q])
    assert list(lower.lines[0].get_ydata()) == pytest.approx([d.after - d.before for d in q])


def test_retention_of_several_runs() -> None:
    texts = _texts(plots.retention({"a": report(1), "b": report(1, retention=False)}))
    assert {"17.61", "18.93"} <= set(texts)
    assert any(t.startswith("a\n") for t in texts)
    assert not any(t.startswith("b\n") for t in texts)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("width", [plots.COLUMN, plots.PAGE])
def test_reports_are_paired(count: int, width: float) -> None:
    reports = {f"run {i}": report(4, seed=i) for i in range(count)}
    figure = plots.comparison(reports, width=width)
    figure.draw_without_rendering()
    both = compare(reports)
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    for i, name in enumerate(reports):
        means = [m[i] for m in both.by_layer().values()]
        assert list(lines[name].get_ydata()) == pytest.approx(means)
    if count == 2:
        points: list[Any] = [x for x in figure.axes[0].lines if x.get_marker() != "None"]
        assert sum(len(line.get_xdata()) for line in points) == len(both.units)


@pytest.mark.parametrize("name", [*OF_UNITS, "head_map"])
def test_what_is_not_there_is_said(name: str) -> None:
    with pytest.raises(DataError, match=r"nothing to draw|no heads"):
        ALL[name](report(0))


@pytest.mark.parametrize("name", ["spectrum", "head_diversity", "retention"])
def test_what_was_not_measured_is_said_with_how_to(name: str) -> None:
    bare = report(1, spectra=False, diversity=False, retention=False)
    with pytest.raises(DataError) as caught:
        ALL[name](bare)
    assert caught.value.fix


def test_a_report_without_changes_says_so() -> None:
    assert "No weight changed." in _texts(plots.report_figure(report(0)))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_figures_give_equal_files_in_each_form(suffix: str, tmp_path: Path) -> None:
    given = report(2, 2, 1)
    one, two = (
        plots.save(plots.report_figure(given), tmp_path / "new" / f"{i}.{suffix}") for i in range(2)
    )
    assert one.read_bytes() == two.read_bytes()
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert one.read_bytes().startswith(start)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg or \.pdf"):
        plots.save(plots.heat_map(report(1)), tmp_path / "figure.bmp")


@pytest.fixture
def loud() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 40.0, "lines.linewidth": 20.0, "axes.grid": False}):
        yield


def test_a_users_own_settings_are_neither_used_nor_changed(tmp_path: Path, loud: None) -> None:
    import matplotlib as mpl

    path = plots.save(plots.report_figure(report(2)), tmp_path / "loud.png")
    assert mpl.rcParams["font.size"] == 40.0
    quiet = tmp_path / "quiet.png"
    code = (
        "from tests.diagnostics.reports import report\n"
        "from lorasmith.diagnostics import plots\n"
        f"plots.save(plots.report_figure(report(2)), {str(quiet)!r})"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    with Image.open(path) as a, Image.open(quiet) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_importing_them_loads_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys; from lorasmith.diagnostics import plots;"
        "print([name for name in ('matplotlib', 'jinja2', 'torch') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
