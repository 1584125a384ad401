"""Reports: their sums, and their way into files and back."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lorasmith.diagnostics.records import (
    HeadDiversity,
    LayerSpectrum,
    Retention,
    RotationReport,
    Skipped,
    UnitRotation,
)
from lorasmith.errors import ConfigError


def unit(name: str = "model.layers.0.self_attn.q_proj", **changes: object) -> UnitRotation:
    values = {
        "name": name,
        "layer": 0,
        "projection": name.rpartition(".")[2],
        "role": "q",
        "head": 0,
        "parameters": 64,
        "theta_deg": 1.0,
        "norm_ratio": 1.0,
        "kept": 1.0,
        "relative_change": 0.1,
        "floor_deg": 0.09,
        "mode": "preserved",
        "change": "turned",
        "weight_norm": 2.0,
    }
    return UnitRotation(**{**values, **changes})  # type: ignore[arg-type]


def report(*units: UnitRotation, **changes: object) -> RotationReport:
    values = {"base": "base", "tuned": "tuned", "per": "head", "units": units}
    return RotationReport(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def full() -> RotationReport:
    return report(
        unit(),
        unit(head=1, theta_deg=7.0, mode="substitutive", parameters=192),
        unit("model.layers.1.mlp.up_proj", layer=1, role="mlp", head=None, theta_deg=4.0),
        spectra=(LayerSpectrum("a", 0, "q_proj", 2, 1.5, 1.2, (2.0, 1.0), 0.1, 4, 1, (0.2, 0.9)),),
        diversity=(HeadDiversity("a", 0, "q_proj", "q", 90.0, 80.0, ((0.0, 90.0), (90.0, 0.0))),),
        retention=Retention("builtin", 100, 10.0, 12.0, 0.1, 0.9),
        head_dim=16,
        skipped=(Skipped("lm_head", "missing", "why"),),
        unchanged=3,
        unchanged_units=9,
        versions={"lorasmith": "0"},
    )


def test_means_and_counts(full: RotationReport) -> None:
    assert full.theta_bar_deg == pytest.approx(4.0)
    assert full.theta_bar_all_deg == pytest.approx(1.0)
    assert full.theta_bar_weighted_deg == pytest.approx((64 + 7 * 192 + 4 * 64) / 320)
    assert full.verdict == "WARNING"
    assert full.max_theta_deg == 7.0
    assert full.mode_counts == {"preserved": 2, "additive": 0, "substitutive": 1, "damaged": 0}
    assert full.change_counts["turned"] == 3
    assert full.theta_crit_deg == pytest.approx(math.degrees(math.asin(0.25)))
    assert list(full.by_layer) == [0, 1]
    assert full.by_layer[0].theta_deg == pytest.approx(4.0)
    assert full.by_projection["q_proj"].max_theta_deg == 7.0
    assert math.fsum(a.energy for a in full.by_module.values()) == pytest.approx(1.0)


def test_an_empty_report_has_numbers_too() -> None:
    empty = report()
    assert (empty.theta_bar_deg, empty.theta_bar_all_deg, empty.max_theta_deg) == (0, 0, 0)
    assert empty.verdict == "SAFE"
    assert empty.theta_crit_deg is None
    assert "SAFE" in empty.summary()
    json.dumps(empty.to_dict(), allow_nan=False)


def test_parts_of_a_fused_projection_have_names_of_their_own() -> None:
    assert unit("h.0.attn.c_attn", role="k").label == "c_attn.k"
    assert unit("h.0.mlp.c_fc", role="mlp").label == "c_fc"


def test_json_and_back(full: RotationReport, tmp_path: Path) -> None:
    path = full.save(tmp_path / "new" / "r.json")
    assert RotationReport.load(path) == full
    assert json.loads(path.read_text())["summary"]["verdict"] == "WARNING"


def test_what_is_not_finite_stays_readable_json(tmp_path: Path) -> None:
    odd = report(unit(norm_ratio=math.inf, relative_change=math.inf, weight_norm=0.0))
    path = odd.save(tmp_path / "r.json")

    def refuse(text: str) -> float:
        raise AssertionError(text)

    values = json.loads(path.read_text(), parse_constant=refuse)
    assert values["units"][0]["norm_ratio"] is None
    assert math.isnan(RotationReport.load(path).units[0].norm_ratio)


def test_csv_has_a_line_a_unit(full: RotationReport, tmp_path: Path) -> None:
    with full.save(tmp_path / "r.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(r["theta_deg"]) for r in rows] == [1.0, 7.0, 4.0]
    assert rows[2]["head"] == ""
    assert set(rows[0]) == {f.name for f in dataclasses.fields(UnitRotation)}


def test_npz_has_an_array_a_field(full: RotationReport, tmp_path: Path) -> None:
    with np.load(full.save(tmp_path / "r.npz"), allow_pickle=False) as arrays:
        assert arrays["theta_deg"].tolist() == [1.0, 7.0, 4.0]
        assert arrays["head"].tolist() == [0, 1, -1]
        assert arrays["singular_values/a"].tolist() == [2.0, 1.0]
        assert arrays["diversity_before/a/q"].shape == (2, 2)


def test_other_suffixes_and_other_files_are_errors(full: RotationReport, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.json, \.csv"):
        full.save(tmp_path / "r.txt")
    for text in ("{", "[]", "{}", '{"format": 1}', '{"format": 99}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError):
            RotationReport.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError):
        RotationReport.load(tmp_path / "none.json")


def test_the_summary_says_what_matters(full: RotationReport) -> None:
    text = full.summary()
    for part in ("WARNING", "4°", "3 layers unchanged", "1 skipped", "perplexity", "substitutive"):
        assert part in text
