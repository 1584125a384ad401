"""Base models with numbers that are not finite: said of their layers, and never in a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.errors import BaseMismatchError
from tests.io import support

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a tuned one, and adapters of PEFT's and ours."""
    folder = tmp_path_factory.mktemp("faults")
    model = support.llama()
    model.save_pretrained(folder / "base")
    config = ls.LoRAConfig(r=4, targets=["q_proj", "up_proj"])
    support.saved(folder / "ours", config)
    support.foreign(support.saved(folder / "foreign", config))
    support.stir(model.parameters())
    model.save_pretrained(folder / "tuned")
    return folder


def _spoiled(places: Path, source: str, tmp_path: Path, value: float, *names: str) -> Path:
    model = support.llama().from_pretrained(places / source)
    with torch.no_grad():
        for name in names:
            model.get_parameter(f"{name}.weight").view(-1)[::2] = value
    model.save_pretrained(tmp_path / "spoiled")
    return tmp_path / "spoiled"


def _read(report: Any) -> Any:
    """A report as a file holds it."""
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tuned", ["foreign", "tuned"])
def test_a_layer_that_is_not_finite_is_left_out_and_named(
    tuned: str, value: float, places: Path, tmp_path: Path
) -> None:
    healthy = _read(ls.diagnose(places / "base", places / tuned))
    base = _spoiled(places, "base", tmp_path, value, LAYER)
    report = ls.diagnose(base, places / tuned)
    assert [(one.name, one.reason) for one in report.skipped] == [(LAYER, "not_finite")]
    found = _read(report)
    wanted = [unit for unit in healthy["units"] if unit["name"] != LAYER]
    assert wanted
    assert found["units"] == wanted
    assert all(math.isfinite(u.theta_deg) for u in report.units)
    assert math.isfinite(report.theta_bar_deg)


def test_so_is_a_layer_of_the_tuned_model(places: Path, tmp_path: Path) -> None:
    tuned = _spoiled(places, "tuned", tmp_path, math.nan, LAYER)
    for report in (ls.diagnose(places / "base", tuned), ls.diagnose(tuned, places / "base")):
        assert [(one.name, one.reason) for one in report.skipped] == [(LAYER, "not_finite")]
        assert LAYER not in {unit["name"] for unit in _read(report)["units"]}


def test_a_base_without_a_finite_layer(
    places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    every = [n for n, m in support.llama().named_modules() if isinstance(m, torch.nn.Linear)]
    base = _spoiled(places, "base", tmp_path, math.nan, *every)
    report = ls.diagnose(base, places / "foreign")
    assert not report.units
    assert {one.reason for one in report.skipped} == {"not_finite"}
    found = _read(report)
    assert {one["reason"] for one in found["skipped"]} == {"not_finite"}
    capfd.readouterr()
    arguments = ["diagnose", str(base), str(places / "foreign"), "--json", "--fail-above", "180"]
    assert main(arguments) == 3  # it cannot be measured, so it does not pass
    text = capfd.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail)["skipped"] == found["skipped"]


def test_the_adapter_s_own_record_knows_another_base(places: Path, tmp_path: Path) -> None:
    """A NaN is a difference, whatever a norm of it would be."""
    base = _spoiled(places, "base", tmp_path, math.nan, LAYER)
    with pytest.raises(BaseMismatchError) as caught:
        ls.diagnose(base, places / "ours")
    assert LAYER in caught.value.what
    assert caught.value.got == str(base)
    report = ls.diagnose(base, places / "ours", allow_base_mismatch=True)
    assert [(one.name, one.reason) for one in report.skipped] == [(LAYER, "not_finite")]
    _read(report)
