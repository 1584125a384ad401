"""``lorasmith fleet benchmark``, and errors that ``fleet compress --quantize`` measures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from tests.io.support import saved


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for name, r in (("one", 2), ("two", 3), ("three", 4)):
        saved(tmp_path / "adapters" / name, ls.LoRAConfig(r=r))
    return tmp_path / "adapters"


def true_errors(adapters: Path, fleet: Path) -> dict[str, float]:
    """Relative squared errors of a saved fleet, from dense matrices in float64."""
    held = ls.SharedSubspace.load(fleet)
    found = {}
    for name in held.ids:
        one = ls.read_adapter(adapters / name)
        made = held.reconstruct(name, "exact", dtype=torch.float32)
        gone = whole = 0.0
        for module in one.factors:
            wanted, got = (w.factors[module].delta(torch.float64) for w in (one, made))
            gone += float((wanted - got).square().sum())
            whole += float(wanted.square().sum())
        found[name] = gone / whole
    return found


def test_it_is_listed(call: Any) -> None:
    assert " benchmark " in call("fleet", "--help").out
    shown = call("fleet", "benchmark", "--help")
    assert shown.code == 0
    assert all(f"--{n}" in shown.out for n in ("error", "basis", "quantize", "rounds", "plot"))


def test_json_is_one_object(call: Any, adapters: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.svg"
    options = ["--error", "0.02, 0.1", "--quantize", "none,nf4", "--rounds", "2"]
    called = call("fleet", "benchmark", adapters, *options, "--plot", figure, "--json")
    assert called.code == 0, called.err
    found = called.json
    assert found["ids"] == ["one", "three", "two"]
    settings = [(s["basis"], s["budget"], s["codec"]) for s in found["settings"]]
    assert settings == [
        (basis, budget, codec)
        for basis in ("joint", "share")
        for budget in (0.02, 0.1)
        for codec in ("float32", "nf4")
    ]
    for one in found["settings"]:
        held = dict(one["bytes"])
        assert held.pop("total") == sum(held.values())
        assert set(held) == {"basis", "codes", "residuals", "rest", "index"}
        assert one["ratio"] == found["stored"]["total"] / one["bytes"]["total"]
        assert set(one["error"]["adapters"]) == {"one", "two", "three"}
        assert one["error"]["worst"] == max(one["error"]["adapters"].values())
        assert set(one["seconds"]) == {"build", "quantize", "absorb", "reconstruct"}
        assert one["seconds"]["absorb"] > 0
    assert [p["codec"] for p in found["plain"]] == ["int8", "int4"]
    assert list(found["best"]) == ["0.02", "0.1"]
    assert found["plot"] == str(figure)
    assert "<svg" in figure.read_text()
    assert sorted(e.name for e in tmp_path.iterdir()) == ["adapters", "figure.svg"]


def test_the_tables_fit_eighty_columns(
    call: Any, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    called = call("fleet", "benchmark", adapters, "--error", "0.05")
    assert called.code == 0, called.err
    lines = called.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in called.out
    for name in ("joint 0.05 none", "joint 0.05 nf4", "share 0.05 8", "plain 8", "plain 4"):
        assert any(line.strip().startswith(name) for line in lines), name
    assert "fewest bytes with errors up to 0.05" in called.out
    assert not called.err  # no bar where there is no terminal, no warning of what is shown


def test_a_compressed_fleet_can_be_measured(call: Any, adapters: Path, tmp_path: Path) -> None:
    ls.SharedSubspace.from_adapters(adapters, error=0.0).save(tmp_path / "fleet")
    options = ["--error", "0.1", "--basis", "joint", "--quantize", "8", "--json"]
    called = call("fleet", "benchmark", tmp_path / "fleet", *options)
    assert called.json["ids"] == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--error", "small"), "no numbers"),
        (("--error", "0.1,"), "empty place"),
        (("--error", "2"), "not a share"),
        (("--basis", "vera"), "vera"),
        (("--quantize", "3"), "no such way"),
        (("--rounds", "0"), "at least 1"),
        (("--plot", "figure.gif"), "figure.gif"),
    ],
)
def test_mistakes(call: Any, adapters: Path, options: tuple[str, str], said: str) -> None:
    called = call("fleet", "benchmark", adapters, *options)
    assert called.code == 2
    assert said in " ".join(called.err.replace("│", " ").split())


@pytest.mark.filterwarnings("always::lorasmith.fleet.records.BudgetWarning")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("basis", ["joint", "share"])
def test_compress_measures_after_rounding(
    call: Any, adapters: Path, tmp_path: Path, basis: str, stream: bool
) -> None:
    """It has the originals, so that a bound is not all that can be said."""
    out = tmp_path / "out"
    options = ["--basis", basis, "--error", "0.05", "--quantize", "4", *(["--stream"] * stream)]
    called = call("fleet", "compress", adapters, "-o", out, *options, "--json")
    wanted = true_errors(adapters, out)
    assert called.json["errors"] == pytest.approx(wanted, rel=1e-3)
    assert ls.SharedSubspace.load(out).errors == pytest.approx(wanted, rel=1e-3)
    assert ("lose more than" in called.err) is (max(wanted.values()) > 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = ls.SharedSubspace.from_adapters(adapters, basis=basis, error=0.05)  # type: ignore[arg-type]
        other.quantize(4)
    if not stream:
        assert all(other.errors[name] > wanted[name] * 1.01 for name in wanted)  # the bound


@pytest.mark.parametrize("stream", [True, False])
def test_compressing_a_compressed_fleet(
    call: Any, adapters: Path, tmp_path: Path, stream: bool
) -> None:
    ls.SharedSubspace.from_adapters(adapters, error=0.0).save(tmp_path / "fleet")
    out = tmp_path / "out"
    options = ["--error", "0.2", "--quantize", "16", *(["--stream"] * stream), "--json"]
    called = call("fleet", "compress", tmp_path / "fleet", "-o", out, *options)
    assert called.code == 0, called.err
    assert called.json["errors"] == pytest.approx(true_errors(adapters, out), rel=1e-3, abs=1e-9)
