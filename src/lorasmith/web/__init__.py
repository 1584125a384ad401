"""Self-contained HTML reports and the figures in them.

Importing this package imports neither Jinja nor Matplotlib: they are loaded by the first
call that needs them.
"""

from __future__ import annotations

from lorasmith.web.figures import figure_to_svg, loss_figure, themed
from lorasmith.web.report import (
    Block,
    Card,
    Cell,
    Column,
    Figure,
    Note,
    Section,
    Table,
    render_report,
    write_report,
)

__all__ = [
    "Block",
    "Card",
    "Cell",
    "Column",
    "Figure",
    "Note",
    "Section",
    "Table",
    "figure_to_svg",
    "loss_figure",
    "render_report",
    "themed",
    "write_report",
]
