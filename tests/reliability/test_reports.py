"""Reports that lorasmith reads back: a history and a diagnosis that are damaged are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from lorasmith.dynamics.stress_history import StressRecord, read_json, write_json
from lorasmith.errors import AdapterFileError, ConfigError
from tests.io import support

RECORDS = [
    StressRecord(0, 0.1, 0.2, 0.3, 0.4, "single", 2.0),
    StressRecord(1, 0.9, 0.2, 0.3, 0.4, "mirror", math.nan, "enter mirror"),
]


def test_a_history_comes_back(tmp_path: Path) -> None:
    write_json(RECORDS, tmp_path / "stress.json")
    assert repr(read_json(tmp_path / "stress.json")) == repr(RECORDS)
    write_json([], tmp_path / "stress.json")
    assert read_json(tmp_path / "stress.json") == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[{",
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b'[], "x": [',
        b"[" * 100_000,
        b'[{"step": NaN}]',
    ],
    ids=["empty", "cut", "not UTF-8", "object", "numbers", "two", "nested", "NaN"],
)
def test_a_history_that_is_none(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "stress.json"
    file.write_bytes(data)
    with pytest.raises(AdapterFileError) as caught:
        read_json(file)
    assert caught.value.file == str(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", None), ("step", -1), ("phi", "x"), ("loss", True), ("mode", "os"), ("event", 1)],
)
def test_a_field_of_a_history(key: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "stress.json"
    write_json(RECORDS, file)
    rows = json.loads(file.read_text())
    rows[1][key] = value
    file.write_text(json.dumps(rows))
    with pytest.raises(AdapterFileError) as caught:
        read_json(file)
    assert caught.value.file == str(file)
    assert caught.value.key == f"record 1 {key}"
    assert caught.value.got == repr(value)


def test_a_history_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_json(tmp_path / "stress.json")
    assert caught.value.file == str(tmp_path / "stress.json")


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("diagnosis")
    lora = support.saved(folder / "lora")
    report = ls.diagnose(support.llama(), lora, spectrum=True, diversity=True)
    return report.save(folder / "diagnosis.json").read_text()


def unit(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["units"][0].update(changes)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("units.0.mode", lambda v: v["units"][0].pop("mode")),
        ("units.0.theta_deg", unit(theta_deg="os")),
        ("units.0.change", unit(change="os")),
        ("units.0.layer", unit(layer=0.5)),
        ("units.0.weight_norm", unit(weight_norm=10**400)),
        ("units.0", lambda v: v.update(units=[1])),
        ("units", lambda v: v.update(units="x")),
        ("spectra.0.singular_values.0", lambda v: v["spectra"][0].update(singular_values=["x"])),
        ("versions.torch", lambda v: v["versions"].update(torch=2)),
        ("head_dim", lambda v: v.update(head_dim=[8])),
        ("retention", lambda v: v.update(retention=3)),
        ("format", lambda v: v.update(format=99)),
    ],
)
def test_a_field_of_a_diagnosis(key: str, change: Any, diagnosis: str, tmp_path: Path) -> None:
    file = tmp_path / "diagnosis.json"
    values = json.loads(diagnosis)
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        ls.RotationReport.load(file)
    assert caught.value.file == str(file)
    assert caught.value.key == key
    assert caught.value.expected is not None
    assert caught.value.got is not None


@pytest.mark.parametrize("data", ["[" * 100_000, "[1]", "{"], ids=["nested", "list", "cut"])
def test_a_diagnosis_that_is_none(data: str, tmp_path: Path) -> None:
    file = tmp_path / "diagnosis.json"
    file.write_text(data)
    with pytest.raises(ConfigError) as caught:
        ls.RotationReport.load(file)
    assert caught.value.file == str(file)


def test_numbers_at_the_end_of_what_there_is(diagnosis: str, tmp_path: Path) -> None:
    """They are numbers; sums over them may be infinite, and raise nothing."""
    file = tmp_path / "diagnosis.json"
    values = json.loads(diagnosis)
    for one in values["units"]:
        one.update(relative_change=1e300, weight_norm=1e300, kept=-1e300)
    file.write_text(json.dumps(values))
    report = ls.RotationReport.load(file)
    assert report.summary()
    report.save(tmp_path / "again.json")
