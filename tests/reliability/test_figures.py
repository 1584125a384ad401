"""Figures are replaced whole or not at all, as all that is saved."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

plt = pytest.importorskip("matplotlib.figure")


def _plot(path: Path, number: float) -> None:
    from lorasmith.diagnostics import plots

    figure = plt.Figure()
    figure.add_subplot().plot([0.0, number])
    plots.save(figure, path, dpi=40)


def _stress(path: Path, number: float) -> None:
    from lorasmith.dynamics.stress_history import StressRecord
    from lorasmith.web.stress_figure import stress_figure

    stress_figure([StressRecord(i, number, 0.1, 0.2, 0.3, "single", 2.0) for i in range(3)], path)


@pytest.mark.parametrize(
    ("draw", "name", "call"),
    [(_plot, "a.svg", "fsync"), (_plot, "a.png", "write"), (_stress, "a.svg", "fsync")],
)
def test_a_disk_that_fails_leaves_the_old_figure(
    draw: Callable[[Path, float], None],
    name: str,
    call: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    draw(path, 0.25)
    before = path.read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr("os.fsync", refuse)
        else:
            patch.setattr("lorasmith.io.atomic._own_part", _failing(refuse))
        with pytest.raises(OSError, match="No space"):
            draw(path, 0.75)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    draw(path, 0.75)
    assert path.read_bytes() != before


def _failing(refuse: Callable[..., None]) -> Callable[[Path], Any]:
    """The part file with a stream that takes no byte."""
    from lorasmith.io import atomic

    original = atomic._own_part

    def make(target: Path) -> Any:
        stream = original(target)

        class Full:
            name = stream.name
            write = staticmethod(refuse)
            close = staticmethod(stream.close)

        return Full()

    return make
