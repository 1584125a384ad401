"""The scripts in examples/ run on a tiny model and show what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def _main(name: str) -> Any:
    return runpy.run_path(str(FOLDER / name))["main"]


def test_a_loop_of_ones_own(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("train_any_loop.py")(str(base), str(tmp_path / "a"))
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 13
    assert losses[-1] <= losses[-2] < losses[0]
    assert ls.read_adapter(tmp_path / "a").config.variant == "lora"


def test_several_adapters(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main("several_adapters.py")(str(base))
    lines = capsys.readouterr().out.splitlines()
    found = [[float(x) for x in re.findall(r"(?:parrot|tortoise) +([\d.]+)", x)] for x in lines]
    plain, parrot, tortoise, rows, mix, _, fused = (f[-2:] for f in found)
    assert rows == [parrot[0], tortoise[1]]
    assert parrot[0] < plain[0]
    assert tortoise[1] < plain[1]
    assert fused == pytest.approx(mix, abs=2e-3)
