"""One self-contained HTML file: summary cards, figures and tables.

A report is described by frozen records (:class:`Card`, :class:`Table`, :class:`Figure`,
:class:`Note`, grouped by :class:`Section`) and rendered by one template. The file needs
nothing else: no server, no network, no fonts, no libraries. It opens from disk, follows the
system's light or dark theme, prints, and reads on a phone. Its Content-Security-Policy
forbids every load and every script except the one that sorts tables, so text that came out
of a model or a data set cannot do anything but be shown.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lorasmith.errors import ConfigError, LorasmithError, MissingDependencyError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = [
    "Block",
    "Card",
    "Cell",
    "Column",
    "Figure",
    "Note",
    "Section",
    "Table",
    "render_report",
    "write_report",
]

Tone: TypeAlias = Literal["neutral", "good", "warn", "bad"]
"""What a value means to the reader. Shown by a sign as well as by a colour."""

Value: TypeAlias = str | int | float | bool | None
"""What a table cell can hold. Numbers are formatted and sorted as numbers; ``None`` is a dash."""

_TONES = ("neutral", "good", "warn", "bad")
_TEMPLATES = Path(__file__).with_name("templates")


def _check(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"unknown {field} in a report",
            expected=f"one of {', '.join(allowed)}",
            got=repr(value),
            fix="use one of the names above",
            key=field,
        )


@dataclass(frozen=True)
class Card:
    """One headline figure at the top of the report.

    Args:
        label: What is measured, for example ``"Exact match"``.
        value: The figure with its unit, ready to show.
        detail: A short line below it.
        tone: Whether the figure is good news; ``"neutral"`` where that is no question.
        before: The figure before the change; shown as ``before → value``.
    """

    label: str
    value: str
    detail: str = ""
    tone: Tone = "neutral"
    before: str = ""

    def __post_init__(self) -> None:
        _check("tone", self.tone, _TONES)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        label: The heading, with the unit where there is one.
        kind: ``"text"``, ``"code"`` (monospaced, white space kept) or ``"number"``
            (aligned to the right). A code column shows numbers as they would be typed.
        digits: Decimals of the floats in a number column; default: four significant digits.
    """

    label: str
    kind: Literal["text", "code", "number"] = "text"
    digits: int | None = None

    def __post_init__(self) -> None:
        _check("kind", self.kind, ("text", "code", "number"))


@dataclass(frozen=True)
class Cell:
    """A table cell that says more than its value.

    Args:
        value: What is shown.
        tone: ``"good"``, ``"warn"`` and ``"bad"`` put a sign before the value.
    """

    value: Value
    tone: Tone = "neutral"

    def __post_init__(self) -> None:
        _check("tone", self.tone, _TONES)


@dataclass(frozen=True)
class Table:
    """A table. Readers can sort it by any column.

    Args:
        title: Its heading.
        columns: The columns; a plain string is a text column of that label.
        rows: The rows, each as long as ``columns``.
        caption: A sentence below the heading.
        sortable: Whether a click on a heading sorts. Turn it off where order has a meaning.
        search: Whether to offer a field that filters rows, and a choice of value for each text
            column of few different values.
        page: Rows to show at a time, if there are more. Others are kept as data, not as
            elements, so that thousands of rows do not make the page slow.
    """

    title: str
    columns: tuple[Column | str, ...]
    rows: tuple[tuple[Cell | Value, ...], ...]
    caption: str = ""
    sortable: bool = True
    search: bool = False
    page: int | None = None

    def __post_init__(self) -> None:
        if self.page is not None and self.page < 1:
            raise ConfigError(
                f"the table {self.title!r} shows no rows",
                expected="page of 1 or more, or None for all rows at once",
                got=repr(self.page),
                key="page",
            )
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"row {number} of the table {self.title!r} has the wrong length",
                    expected=f"{len(self.columns)} cells",
                    got=f"{len(row)} cells",
                    fix="give one cell a column; None for an empty one",
                )

    @classmethod
    def from_mapping(cls, title: str, mapping: Mapping[str, object], *, caption: str = "") -> Table:
        """A table of settings: one row a key, nested mappings flattened with dots."""
        return cls(
            title=title,
            columns=(Column("Setting"), Column("Value", "code")),
            rows=tuple(_flatten(mapping)),
            caption=caption,
            sortable=False,
        )


def _flatten(mapping: Mapping[str, object], prefix: str = "") -> list[tuple[str, Value]]:
    rows: list[tuple[str, Value]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
            # An empty collection is a value too, and a reader wants to see that it was empty.
            rows.append((name, ", ".join(map(str, value)) or "none"))
        elif isinstance(value, (str, int, float)):
            rows.append((name, value))
        elif value is None:
            rows.append((name, "none"))
        else:
            rows.append((name, str(value)))
    return rows


@dataclass(frozen=True)
class Figure:
    """A figure.

    Args:
        title: Its heading; also what a screen reader says.
        svg: One ``<svg>`` element, for example from
            :func:`lorasmith.web.figures.figure_to_svg`.
        caption: A sentence below it.

    Raises:
        ConfigError: The text is not SVG, or it holds a script or a reference to something
            outside itself.
    """

    title: str
    svg: str
    caption: str = ""

    def __post_init__(self) -> None:
        _parse_svg(self.svg, self.title)


@dataclass(frozen=True)
class Note:
    """A paragraph.

    Args:
        text: Plain text; blank lines separate paragraphs.
        title: Its heading, if any.
        tone: Anything but ``"neutral"`` makes it a box with a sign.
    """

    text: str
    title: str = ""
    tone: Tone = "neutral"

    def __post_init__(self) -> None:
        _check("tone", self.tone, _TONES)


Block: TypeAlias = Table | Figure | Note
"""What a section is made of."""


@dataclass(frozen=True)
class Section:
    """A titled part of the report.

    Args:
        title: Its heading; also its entry in the contents.
        blocks: What it shows, in order.
        intro: A paragraph below the heading.
        columns: 1, or 2 to set the blocks side by side where the page is wide enough.
    """

    title: str
    blocks: tuple[Block, ...]
    intro: str = ""
    columns: Literal[1, 2] = 1


def render_report(
    *,
    title: str,
    subtitle: str = "",
    cards: Sequence[Card] = (),
    sections: Sequence[Section] = (),
    footer: str = "",
    generated: datetime | None = None,
    data: Mapping[str, object] | None = None,
) -> str:
    """The report as HTML text.

    Args:
        title: What the report is about.
        subtitle: One line below it.
        cards: Headline figures.
        sections: The body.
        footer: A line at the end, for example the command that made the report.
        generated: When the report was made; default: now, in local time.
        data: What the report was made of, for programs: put into the page as JSON, in the
            element ``<script type="application/json" id="data">``. No NaN and no infinity.

    Returns:
        A whole HTML document. Every text is escaped; control characters and lone
        surrogates, which HTML cannot hold, become visible signs.

    Raises:
        MissingDependencyError: Jinja is not installed.
    """
    from lorasmith import __version__

    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = _template().render(
        title=title,
        subtitle=subtitle,
        cards=cards,
        sections=[(f"section-{number}", one) for number, one in enumerate(sections, start=1)],
        footer=footer,
        generated=(generated or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M %Z").strip(),
        version=__version__,
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
        data=data,
    )
    return _TRAILING.sub("", html)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str = "",
    cards: Sequence[Card] = (),
    sections: Sequence[Section] = (),
    footer: str = "",
    generated: datetime | None = None,
    data: Mapping[str, object] | None = None,
) -> Path:
    """Write the report to one HTML file; see :func:`render_report` for the arguments.

    The file appears whole or not at all: a reader who has the old one open never sees half
    of the new one. Missing folders are made.

    Args:
        path: The file to write.
        title: See :func:`render_report`, like the rest.
        subtitle: One line below the title.
        cards: Headline figures.
        sections: The body.
        footer: A line at the end.
        generated: When the report was made.
        data: What the report was made of, for programs.

    Returns:
        The path written.

    Raises:
        LorasmithError: The file cannot be written.
        MissingDependencyError: Jinja is not installed.
    """
    html = render_report(
        title=title,
        subtitle=subtitle,
        cards=cards,
        sections=sections,
        footer=footer,
        generated=generated,
        data=data,
    )
    # Here, since the package of files loads PyTorch, which a page does not need.
    from lorasmith.io.atomic import replace_text

    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, html)
    except OSError as error:
        raise LorasmithError(
            "the report cannot be written",
            expected="a path in a folder that can be written to",
            got=str(error),
            fix="choose another path, or free some space",
            file=target,
        ) from error
    return target


# Rendering -------------------------------------------------------------------------------

_TRAILING = re.compile(r"[ \t]+(?=\n)")
# What HTML cannot hold: control characters other than tab and line ends, and surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@cache
def _template() -> Template:
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingDependencyError(
            "reports need Jinja, which is not installed",
            fix='pip install "lorasmith[plots]"',
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters |= {
        "cell": lambda value: value if isinstance(value, Cell) else Cell(value),
        "column": lambda value: value if isinstance(value, Column) else Column(value),
        "paragraphs": lambda text: [part for part in re.split(r"\n\s*\n", text) if part.strip()],
        "shown": _shown,
        "sort_key": _sort_key,
        "kind_of": lambda block: type(block).__name__.lower(),
        "row_data": lambda table: markupsafe.Markup(_json(_row_data(table))),
        "json_data": lambda data: markupsafe.Markup(_json(data)),
        # Parsed and checked when the Figure was made, hence safe as it is.
        "inline_svg": lambda figure: markupsafe.Markup(_inline_svg(figure)),
    }
    return environment.get_template("report.html")


def _clean(value: object) -> object:
    """Replace what HTML cannot hold; called by Jinja on everything that is put into the page."""
    if not isinstance(value, str):
        return value
    kind = type(value)  # Markup stays Markup
    shown = _CONTROL.sub(lambda match: chr(0x2400 + min(ord(match[0]), 0x21)), value)
    return kind(_SURROGATE.sub("\ufffd", shown))


def _shown(value: Value, column: Column) -> str:
    """The text of a cell."""
    if isinstance(value, str):
        return value
    if value is None:
        return "–"
    if column.kind == "code":
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if isinstance(value, int):
        text = f"{value:,}"
    elif column.digits is not None:
        text = f"{value:,.{column.digits}f}"
    else:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return text.replace("-", "−")


def _sort_key(value: Value) -> str | None:
    """The number to sort a cell by, or None where it sorts by its text."""
    if value is None or isinstance(value, str):
        return None
    number = float(value)
    return None if math.isnan(number) else repr(number)


def _json(value: object) -> str:
    """JSON that can stand inside a script element: nothing in it closes it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _row_data(table: Table) -> dict[str, object]:
    """All rows of a table as the page's script reads them; see ``fromData`` there."""
    columns = [c if isinstance(c, Column) else Column(c) for c in table.columns]
    plain = [[c.value if isinstance(c, Cell) else c for c in row] for row in table.rows]
    whole = [
        all(isinstance(row[i], int) or row[i] is None for row in plain) for i in range(len(columns))
    ]
    return {
        "columns": [
            {"label": str(_clean(c.label)), "kind": c.kind, "digits": c.digits, "integer": w}
            for c, w in zip(columns, whole, strict=True)
        ],
        "rows": [
            [
                _cell_data(cell, column, integer)
                for cell, column, integer in zip(row, columns, whole, strict=True)
            ]
            for row in table.rows
        ],
    }


def _cell_data(cell: Cell | Value, column: Column, integer: bool) -> object:
    """What stands for itself where it can, else the shown text, its sort key and its tone."""
    tone = cell.tone if isinstance(cell, Cell) else "neutral"
    value = cell.value if isinstance(cell, Cell) else cell
    if tone == "neutral":
        if value is None:
            return None
        if isinstance(value, str):
            return _clean(value)
        regular = column.kind == "number" and not isinstance(value, bool) and math.isfinite(value)
        if regular and integer:
            return value
        if regular and isinstance(value, float):
            return float(f"{value:.9g}")
    found: dict[str, object] = {"s": _clean(_shown(value, column)), "t": tone}
    key = _sort_key(value)
    if key is not None:
        found["n"] = {"inf": "Infinity", "-inf": "-Infinity"}.get(key, key)
    return found


# Figures ---------------------------------------------------------------------------------

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_ACTIVE = {"script", "foreignObject", "iframe", "animate", "set", "handler"}
_OUTSIDE = re.compile(r"@import|url\(\s*['\"]?(?!#)(?!['\"]?#)", re.IGNORECASE)


def _parse_svg(svg: str, title: str) -> ET.Element:
    def refuse(got: str) -> ConfigError:
        return ConfigError(
            f"the figure {title!r} cannot be put into a report",
            expected="one <svg> element without scripts and without references to other files",
            got=got,
            fix="make it with lorasmith.web.figures.figure_to_svg",
        )

    try:
        root = ET.fromstring(svg)
    except ET.ParseError as error:
        raise refuse(f"text that is not XML ({error})") from error
    if root.tag not in ("svg", f"{{{_SVG}}}svg"):
        raise refuse(f"an element <{root.tag}>")
    for element in root.iter():
        name = str(element.tag).rpartition("}")[2]
        if name in _ACTIVE:
            raise refuse(f"an element <{name}>")
        for attribute, value in element.attrib.items():
            key = attribute.rpartition("}")[2].lower()
            if key.startswith("on"):
                raise refuse(f"the attribute {key!r}")
            embedded = name == "image" and value.startswith("data:image/png;")
            if key in ("href", "src") and not value.startswith("#") and not embedded:
                raise refuse(f"a reference to {value[:60]!r}")
            if _OUTSIDE.search(value):
                raise refuse(f"a reference in {key}={value[:60]!r}")
        if name == "style" and _OUTSIDE.search(element.text or ""):
            raise refuse("a reference in a style sheet")
    return root


def _inline_svg(figure: Figure) -> str:
    """The figure's SVG with names of its own, so that several can stand in one page."""
    root = _parse_svg(figure.svg, figure.title)
    prefix = hashlib.sha256(figure.svg.encode("utf-8", "replace")).hexdigest()[:8]
    text = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(['\"]?#([^)'\"]+)", text))
    used |= set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}-{name}")
        for key, value in list(element.attrib.items()):
            if "url(" in value:
                element.set(key, re.sub(r"url\((['\"]?)#", rf"url(\1#{prefix}-", value))
            elif key.rpartition("}")[2] == "href" and value.startswith("#"):
                element.set(key, f"#{prefix}-{value[1:]}")
    root.set("role", "img")
    root.set("aria-label", str(_clean(figure.title)))
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")
