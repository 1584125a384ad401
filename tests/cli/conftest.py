"""How the tests of this folder call the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import main


class Called:
    """Exit code, stdout and stderr of one call; ``json`` is the one object on stdout."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LORASMITH_DEBUG", raising=False)

    def run(*arguments: str | Path) -> Called:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Called(code, out, err)

    return run
