"""The command line: ``lorasmith train``, ``eval``, ``generate``, ``info``, ``variants`` and others.

One file a command. Everything that takes long to import is imported by the commands when
they run, so that help texts and mistakes in options answer at once.
"""

from __future__ import annotations

from lorasmith.cli.app import main

__all__ = ["main"]
