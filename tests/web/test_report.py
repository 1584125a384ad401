from __future__ import annotations

import os
import re
import stat
import subprocess
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.web import (
    Card,
    Cell,
    Column,
    Figure,
    Note,
    Section,
    Table,
    loss_figure,
    render_report,
    write_report,
)

HOSTILE = "</td><script>document.title='owned'</script><img src=x onerror=\"alert('1')\">&amp; \x00"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{}</svg>'


def _report(**changes: Any) -> dict[str, Any]:
    history = [{"step": step, "loss": 3 / step} for step in range(1, 30)]
    history += [{"step": step, "eval_loss": 3.2 / step} for step in (10, 20)]
    predictions = Table(
        "Held-out dates",
        ("Prompt", Column("Expected", "code"), Column("After", "code")),
        (
            ("4 March 2031", "2031-03-04", Cell("2031-03-04", "good")),
            (HOSTILE, "1987-11-17", Cell(HOSTILE, "bad")),
        ),
        HOSTILE,
    )
    numbers = Table(
        "Numbers",
        ("Module", Column("Value", "number")),
        (("a", 10), ("b", 9.0), ("c", None), ("d", -1.5)),
    )
    return {
        "title": f"Report {HOSTILE}",
        "subtitle": HOSTILE,
        "cards": [Card("Exact match", "94 %", HOSTILE, "good", before="2 %"), Card("Time", "3 s")],
        "sections": [
            Section("Training", (Figure("Loss", loss_figure(history), HOSTILE),), HOSTILE),
            Section("Samples", (predictions, numbers)),
            Section(
                "Details",
                (
                    Note(HOSTILE, HOSTILE, "warn"),
                    Table.from_mapping("Configuration", {HOSTILE: {"r": 8, "path": HOSTILE}}),
                ),
                columns=2,
            ),
        ],
        "footer": HOSTILE,
        **changes,
    }


class Page(HTMLParser):
    """Counts elements and attributes, and checks that elements close in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_is_loaded_from_anywhere() -> None:
    html = render_report(**_report(title="Plain"))
    page = Page(html)
    loads = [
        value
        for _, name, value in page.attributes
        if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    ]
    assert loads
    assert [value for value in loads if not value.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    # The only addresses left are the names of XML namespaces.
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_hostile_text_is_shown_and_never_becomes_markup() -> None:
    page = Page(render_report(**_report()))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    assert page.text.count("document.title='owned'") >= 8


def test_what_html_cannot_hold_becomes_visible() -> None:
    html = render_report(title="a\x00b\x1bc\x7fd\ud800e\tf")
    assert "<h1>a\u2400b\u241bc\u2421d\ufffde\tf</h1>" in html
    html.encode("utf-8")


def test_ids_are_unique_although_two_figures_are_the_same_drawing() -> None:
    drawing = loss_figure([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    blocks = (Figure("One", drawing), Figure("Two", drawing.replace("training", "trained")))
    page = Page(render_report(title="t", sections=[Section("s", blocks)]))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) > 3
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        for target in re.findall(r"url\(#([^)]+)\)", value):
            assert target in ids
        if name in ("href", "xlink:href") and value.startswith("#"):
            assert value[1:] in ids


@pytest.mark.parametrize(
    ("value", "kind", "digits", "shown"),
    [
        (4587520, "number", None, "4,587,520"),
        (-3, "number", None, "−3"),
        (0.123456, "number", None, "0.1235"),
        (123456.7, "number", None, "123,457"),
        (0.5, "number", 3, "0.500"),
        (float("nan"), "number", None, "not a number"),
        (float("-inf"), "number", 2, "−∞"),
        (None, "number", None, "–"),
        (True, "text", None, "yes"),
        (True, "code", None, "true"),
        (1, "code", None, "1"),
        (1e-05, "code", None, "1e-05"),
        ("x < y", "text", None, "x &lt; y"),
    ],
)
def test_cells_are_formatted_for_their_column(
    value: Any, kind: Any, digits: int | None, shown: str
) -> None:
    table = Table("t", (Column("c", kind, digits),), ((value,),))
    html = render_report(title="t", sections=[Section("s", (table,))])
    assert f"<span>{shown}</span></td>" in html


def test_settings_are_flattened_and_empty_ones_are_kept() -> None:
    table = Table.from_mapping(
        "t", {"adapter": {"r": 8, "exclude": [], "init": {"a": None}}, "betas": (0.9, 0.99)}
    )
    assert table.rows == (
        ("adapter.r", 8),
        ("adapter.exclude", "none"),
        ("adapter.init.a", "none"),
        ("betas", "0.9, 0.99"),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Card("a", "b", tone="great"),  # type: ignore[arg-type]
        lambda: Column("a", "date"),  # type: ignore[arg-type]
        lambda: Cell("a", "x y"),  # type: ignore[arg-type]
        lambda: Table("t", ("a", "b"), ((1, 2), (3,))),
        lambda: Figure("f", "<p>no figure</p>"),
        lambda: Figure("f", "<svg"),
        lambda: Figure("f", SVG.format("<script>1</script>")),
        lambda: Figure("f", SVG.format("<foreignObject/>")),
        lambda: Figure("f", SVG.format('<g onclick="1"/>')),
        lambda: Figure("f", SVG.format('<a href="https://example.org"/>')),
        lambda: Figure("f", SVG.format('<image href="data:image/svg+xml;base64,AA"/>')),
        lambda: Figure("f", SVG.format('<g style="fill: url(https://example.org/a)"/>')),
        lambda: Figure("f", SVG.format("<style>@import 'a.css';</style>")),
    ],
)
def test_what_cannot_be_shown_is_refused_when_it_is_made(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.fix


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Card("a", "b").value = "c"  # type: ignore[misc]


def test_the_file_is_the_rendered_text_in_a_folder_made_for_it(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
    report = _report(generated=now)
    path = write_report(tmp_path / "new" / "report.html", **report)
    assert path.read_bytes() == render_report(**report).encode("utf-8")
    assert "2026-01-02 03:04 UTC" in path.read_text(encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(tmp_path / "report.html", title="old")
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LorasmithError, match="No space left") as caught:
        write_report(path, title="new")
    assert caught.value.file == str(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", title="0")
    stop = threading.Event()
    torn = []

    def read() -> None:
        while not stop.is_set():
            if not path.read_text(encoding="utf-8").endswith("</html>"):
                torn.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        write_report(path, title=str(number) * 5000)
    stop.set()
    reader.join()
    assert torn == []


# In a real browser -----------------------------------------------------------------------


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
            "--virtual-time-budget=2000",
            *more,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return result.stdout, console


def _requests(log: Path) -> set[str]:
    """The addresses that a page asked the network for."""
    urls = set(re.findall(r'"url":"(https?:[^"]{0,200})', log.read_text(encoding="utf-8")))
    # The browser itself may try to call home.
    return {url for url in urls if not re.search(r"google|gstatic|gvt1", url)}


@pytest.mark.integration
def test_a_page_that_asks_for_something_would_be_noticed(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/a.png'>", encoding="utf-8")
    log = tmp_path / "net.json"
    _browse(chromium, page, tmp_path / "profile", f"--log-net-log={log}")
    assert "http://127.0.0.1:9/a.png" in _requests(log)


@pytest.mark.integration
def test_a_browser_shows_it_without_errors_or_requests(chromium: str, tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", **_report())
    log = tmp_path / "net.json"
    dom, console = _browse(chromium, path, tmp_path / "profile", f"--log-net-log={log}")
    assert console == ""
    assert "owned'" in dom  # shown as text ...
    assert "<title>owned" not in dom  # ... but never run
    assert "<svg" in dom
    assert _requests(log) == set()


@pytest.mark.integration
def test_clicking_a_heading_sorts_numbers_as_numbers(chromium: str, tmp_path: Path) -> None:
    table = Table(
        "Numbers",
        ("Module", Column("Value", "number")),
        (("ten", 10), ("nine", 9.0), ("none", None), ("minus", -1.5)),
    )
    html = render_report(title="t", sections=[Section("s", (table,))])
    # A second script that clicks is against the page's own policy, so the test lifts it.
    html = re.sub(r"<meta http-equiv[^>]*>", "", html)
    click = (
        "<script>"
        "const order = () => [...document.querySelectorAll('tbody td:first-child')]"
        ".map((cell) => cell.textContent).join(' ');"
        "const heading = document.querySelectorAll('th button')[1]; const seen = [order()];"
        "for (let i = 0; i < 3; i++) { heading.click(); seen.push(order()); }"
        "document.title = seen.join(' | ');"
        "</script></body>"
    )
    page = tmp_path / "report.html"
    page.write_text(html.replace("</body>", click), encoding="utf-8")
    dom, console = _browse(chromium, page, tmp_path / "profile")
    assert console == ""
    title = re.search("<title>(.*)</title>", dom)
    assert title is not None
    assert title[1].split(" | ") == [
        "ten nine none minus",
        "minus nine ten none",
        "none ten nine minus",
        "ten nine none minus",
    ]


@pytest.mark.integration
def test_the_policy_stops_scripts_that_are_not_the_pages_own(chromium: str, tmp_path: Path) -> None:
    html = render_report(title="quiet")
    page = tmp_path / "report.html"
    injected = "<script>document.title = 'owned'</script><img src='https://example.org/a.png'>"
    page.write_text(html.replace("</body>", injected + "</body>"), encoding="utf-8")
    dom, console = _browse(chromium, page, tmp_path / "profile")
    assert "<title>quiet</title>" in dom
    assert console.count("Content Security Policy") == 2
