"""Progress bars, under the name that training has always used."""

from __future__ import annotations

from lorasmith.progress import bar

__all__ = ["bar"]
