"""The page of a diagnosis: complete, honest, usable when large, and right in a real browser."""

from __future__ import annotations

import dataclasses
import html as html_module
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lorasmith.diagnostics.compare import compare
from lorasmith.diagnostics.records import Retention, RotationReport, Skipped
from lorasmith.errors import ConfigError
from lorasmith.web.diagnosis import read_report, write_report
from lorasmith.web.report import Cell, Column, Section, Table, render_report
from tests.diagnostics.reports import report, unit

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def _text(path: Path) -> str:
    """What a reader sees, without markup, scripts and styles."""
    html = path.read_text(encoding="utf-8")
    html = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html_module.unescape(re.sub(r"<[^>]+>", " ", html)))


def _units(*angles: float, **changes: Any) -> RotationReport:
    units = tuple(unit(t, layer=i) for i, t in enumerate(angles))
    return report(0, **{"retention": False, "units": units, **changes})


def test_the_page_says_what_it_means_and_what_the_verdict_is_worth(tmp_path: Path) -> None:
    given = report(2, 4, 2)
    text = _text(write_report(given, tmp_path / "report.html"))
    assert "SAFE" in text
    assert f"θ̄ = {given.theta_bar_deg:.3g}°" in text
    assert "EgoRA's rule" in text
    assert "The rule looks at weights alone" in text
    assert "17.61" in text
    assert "18.93" in text
    for heading in ("Rotation", "Classes", "What is still known", "Spectrum", "Head diversity"):
        assert heading in text
    assert "model.vision.patch another shape" in text


@pytest.mark.parametrize(
    ("angle", "after", "says"),
    [
        (0.5, 40.0, "too kind"),
        (20.0, 17.6, "too strict"),
        (0.5, 17.6, "Believe what was measured"),
    ],
)
def test_what_was_measured_is_set_against_the_rule(
    angle: float, after: float, says: str, tmp_path: Path
) -> None:
    kept = Retention("builtin", 4096, 17.61, after, 0.1, 0.8)
    given = _units(angle, angle, retention=kept)
    text = _text(write_report(given, tmp_path / "report.html"))
    assert says in text
    assert ("too kind" in text) == (says == "too kind")


def test_without_retention_the_page_says_that_it_was_not_measured(tmp_path: Path) -> None:
    path = write_report(_units(0.5), tmp_path / "report.html")
    assert "was not measured" in _text(path)
    assert 'class="block note good"' not in path.read_text(encoding="utf-8")


def test_angles_that_are_not_numbers_leave_no_verdict(tmp_path: Path) -> None:
    text = _text(write_report(_units(0.5, math.nan), tmp_path / "report.html"))
    assert "1 of 2 angles are not numbers" in text
    assert "the verdict means nothing" in text


@pytest.mark.parametrize(
    "given",
    [
        report(0, retention=False),
        report(1, 2, 1),
        report(2, 0, attention=False, retention=False),
        _units(math.nan),
        _units(0.0, 0.0),
        report(0, units=(unit(1.0, layer=None, head=None, role=None),)),
    ],
    ids=["nothing changed", "tiny", "only MLP", "NaN", "zero", "no layer"],
)
def test_every_report_has_a_page(given: RotationReport, tmp_path: Path) -> None:
    path = given.save(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>")


def test_the_report_comes_out_of_the_page_again(tmp_path: Path) -> None:
    given = report(2, 4, 2, intruders=True)
    found = read_report(write_report(given, tmp_path / "report.html"))
    assert isinstance(found, RotationReport)
    for mine, theirs in zip(given.units, found.units, strict=True):
        assert theirs.theta_deg == pytest.approx(mine.theta_deg, rel=1e-8)
        assert (theirs.name, theirs.head, theirs.mode) == (mine.name, mine.head, mine.mode)
    assert found.retention == given.retention
    assert [s.intruders for s in found.spectra] == [s.intruders for s in given.spectra]
    assert found.skipped == given.skipped


def test_another_page_holds_no_report(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_report(title="another"), encoding="utf-8")
    with pytest.raises(ConfigError, match="no diagnosis"):
        read_report(page)


def test_several_reports_stand_side_by_side(tmp_path: Path) -> None:
    given = {"first run": report(3, 2, 1), "second run": report(3, 2, 1, size=4.0, seed=1)}
    path = write_report(given, tmp_path / "report.html")
    text = _text(path)
    for run in compare(given).runs:
        assert f"{run.theta_bar_deg:.4g}" in text
    assert "Side by side" in text
    found = read_report(path)
    assert isinstance(found, dict)
    assert list(found) == list(given)
    with pytest.raises(ConfigError, match="no report"):
        write_report({}, path)


def test_a_large_report_stays_small_enough_to_use(tmp_path: Path) -> None:
    given = report(32, 32, 8, spread=1.2, intruders=True)
    assert len(given.units) == 32 * (32 + 8 + 8 + 32 + 3)
    path = write_report(given, tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    assert len(html) < 3_000_000
    assert html.count("<tr>") < 300  # the others are data
    found = read_report(path)
    assert isinstance(found, RotationReport)
    assert len(found.units) == len(given.units)


def test_names_from_files_cannot_do_anything_but_be_shown(tmp_path: Path) -> None:
    given = report(
        0,
        base=HOSTILE,
        tuned=HOSTILE,
        skipped=(Skipped(HOSTILE, "missing", HOSTILE),),
        units=tuple(unit(1.0, name=HOSTILE, projection=HOSTILE, layer=i) for i in range(60)),
    )
    html = write_report(given, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in html
    assert html.count("document.title='owned'</script>") == 0
    found = read_report(tmp_path / "report.html")
    assert isinstance(found, RotationReport)
    assert found.base == HOSTILE


def test_a_long_table_keeps_its_first_rows_without_scripts() -> None:
    table = Table("t", (Column("n", "number"),), tuple((i,) for i in range(100)), page=7)
    html = render_report(title="t", sections=[Section("s", (table,))])
    assert html.count("<tr>") == 8
    data = re.search(r'class="rows">(.*?)</script>', html)
    assert data is not None
    assert json.loads(data[1])["rows"] == [[i] for i in range(100)]
    short = dataclasses.replace(table, page=100)
    assert 'class="rows"' not in render_report(title="t", sections=[Section("s", (short,))])


def test_a_page_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="shows no rows"):
        Table("t", ("a",), (), page=0)


# In a real browser -------------------------------------------------------------------------


def _browse(chromium: str, page: Path, profile: Path, *more: str) -> tuple[str, str]:
    result = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=5000",
            *more,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return result.stdout, console


def _requests(log: Path) -> set[str]:
    urls = set(re.findall(r'"url":"(https?:[^"]{0,200})', log.read_text(encoding="utf-8")))
    # The browser itself may try to call home.
    return {url for url in urls if not re.search(r"google|gstatic|gvt1", url)}


def _run(chromium: str, html: str, script: str, folder: Path) -> Any:
    """What a script finds on a page: it puts JSON into the title."""
    # A second script is against the page's own policy, so the test lifts it.
    html = re.sub(r"<meta http-equiv[^>]*>", "", html)
    page = folder / "with-script.html"
    body = f"<script>{script}\ndocument.title = JSON.stringify(found);</script></body>"
    page.write_text(html.replace("</body>", body), encoding="utf-8")
    dom, console = _browse(chromium, page, folder / "profile")
    assert console == ""
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return json.loads(html_module.unescape(title[1]))


@pytest.mark.integration
@pytest.mark.parametrize("size", ["tiny", "large", "two"])
def test_a_browser_shows_it_without_errors_or_requests(
    size: str, chromium: str, tmp_path: Path
) -> None:
    given: Any = {
        "tiny": report(1, 2, 1),
        "large": report(32, 32, 8, intruders=True),
        "two": {"a": report(2), "b": report(2, seed=1)},
    }[size]
    path = write_report(given, tmp_path / "report.html")
    log = tmp_path / "net.json"
    dom, console = _browse(chromium, path, tmp_path / "profile", f"--log-net-log={log}")
    assert console == ""
    assert _requests(log) == set()
    assert dom.count('role="img"') >= 2
    assert "rows 1–20 of" in dom or size == "tiny"


@pytest.mark.integration
def test_units_are_sorted_filtered_and_paged_by_click(chromium: str, tmp_path: Path) -> None:
    given = report(32, 32, 8)
    html = write_report(given, tmp_path / "report.html").read_text(encoding="utf-8")
    script = """
    const block = [...document.querySelectorAll(".block")]
      .find((one) => one.querySelector("h3")?.textContent === "Every unit");
    const table = block.querySelector("table");
    const theta = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "θ (°)");
    const heading = table.tHead.rows[0].cells[theta];
    const see = () => ({
      sort: heading.getAttribute("aria-sort"),
      rows: table.tBodies[0].rows.length,
      first: [...table.tBodies[0].rows[0].cells].map((cell) => cell.textContent),
      status: block.querySelector("output").textContent,
    });
    const found = { start: see() };
    const click = heading.querySelector("button");
    click.click(); found.ascending = see();
    click.click(); found.descending = see();
    block.querySelectorAll(".pager button")[1].click(); found.second = see();
    const select = [...block.querySelectorAll("select")]
      .find((one) => one.getAttribute("aria-label") === "Projection");
    select.value = "k_proj"; select.dispatchEvent(new Event("change")); found.chosen = see();
    const search = block.querySelector("input");
    search.value = "31 k_proj turned"; search.dispatchEvent(new Event("input"));
    select.value = ""; select.dispatchEvent(new Event("change")); found.searched = see();
    search.value = "no such thing"; search.dispatchEvent(new Event("input"));
    found.none = block.querySelector("output").textContent;
    search.value = ""; search.dispatchEvent(new Event("input"));
    click.click(); found.back = see();
    """
    found = _run(chromium, html, script, tmp_path)
    angles = sorted(u.theta_deg for u in given.units)
    at = 4

    def theta(key: str) -> float:
        return float(found[key]["first"][at].replace("−", "-"))

    assert found["start"]["rows"] == 20
    assert found["start"]["sort"] is None
    assert theta("start") == pytest.approx(given.units[0].theta_deg, rel=1e-3)
    assert found["start"]["status"] == f"rows 1–20 of {len(given.units):,}"
    assert found["ascending"]["sort"] == "ascending"
    assert theta("ascending") == pytest.approx(angles[0], rel=1e-3)
    assert found["descending"]["sort"] == "descending"
    assert theta("descending") == pytest.approx(angles[-1], rel=1e-3)
    assert theta("second") == pytest.approx(angles[-21], rel=1e-3)
    k = [u for u in given.units if u.projection == "k_proj"]
    assert theta("chosen") == pytest.approx(max(u.theta_deg for u in k), rel=1e-3)
    assert found["chosen"]["status"] == f"rows 1–20 of {len(k)} (of {len(given.units):,})"
    assert found["searched"]["first"][1] == "k_proj"
    assert found["none"] == f"0 rows (of {len(given.units):,})"
    assert found["back"] == found["start"]


@pytest.mark.integration
def test_numbers_read_alike_in_the_page_and_in_its_data(chromium: str, tmp_path: Path) -> None:
    values = [
        0.123456, 1.0, 12.5, -0.5, 123456.7, 9999.4, 1e-3, 1.2345e-4, 1.2345e-5, -3.1e-7, 0.0,
        1e-12, 1234.56, 2.0000004, 99.995, 87.654321,
    ]  # fmt: skip
    special = [None, math.inf, -math.inf, math.nan, True, "text < & >", Cell(2.5, "bad")]
    rows = tuple(
        (v, v, int(v * 10**6) if isinstance(v, float) and math.isfinite(v) else None)
        for v in [*values, *special]
    )
    columns = (Column("a", "number"), Column("b", "number", 3), Column("c", "number"))
    plain = Table("plain", columns, rows)
    paged = Table("paged", columns, rows, page=len(rows) - 1)
    html = render_report(title="t", sections=[Section("s", (plain, paged))])
    script = """
    const cells = (table) => [...table.tBodies[0].rows].map((row) =>
      [...row.cells].map((cell) => `${cell.textContent}|${cell.className}`));
    const [plain, paged] = document.querySelectorAll("table");
    const first = cells(paged);
    document.querySelectorAll(".pager button")[1].click();
    const found = { plain: cells(plain), paged: [...first, ...cells(paged)] };
    """
    found = _run(chromium, html, script, tmp_path)
    assert found["plain"] == found["paged"]


@pytest.mark.integration
def test_headings_and_tables_are_named(chromium: str, tmp_path: Path) -> None:
    html = write_report(report(3), tmp_path / "report.html").read_text(encoding="utf-8")
    script = """
    const all = (selector, value) => [...document.querySelectorAll(selector)].map(value);
    const label = (element) => element.getAttribute("aria-label");
    const found = {
      levels: all("h1, h2, h3", (heading) => Number(heading.tagName[1])),
      tables: all("table", label),
      figures: all("figure svg", label),
      fields: all("input, select", label),
      headings: all("th", (heading) => heading.scope),
      ids: all("[id]", (element) => element.id),
      wide: document.documentElement.scrollWidth <= window.innerWidth,
    };
    """
    found = _run(chromium, html, script, tmp_path)
    assert found["levels"][0] == 1
    assert found["levels"].count(1) == 1
    for one, following in zip(found["levels"], found["levels"][1:], strict=False):
        assert following <= one + 1
    for kind in ("tables", "figures", "fields"):
        assert found[kind]
        assert all(found[kind]), kind
    assert set(found["headings"]) == {"col"}
    assert len(found["ids"]) == len(set(found["ids"]))
    assert found["wide"]
