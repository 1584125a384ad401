"""Reports side by side."""

from __future__ import annotations

import json

import pytest

from lorasmith.diagnostics.compare import compare
from lorasmith.diagnostics.records import Skipped
from lorasmith.errors import ConfigError
from tests.diagnostics.test_records import report, unit


def test_units_are_paired_and_absent_ones_are_unchanged() -> None:
    one = report(unit(theta_deg=1.0), unit(head=1, theta_deg=2.0))
    two = report(unit(theta_deg=4.0), unit("model.layers.0.self_attn.v_proj", theta_deg=6.0))
    found = compare({"one": one, "two": two})
    assert [(u.projection, u.head, u.theta_deg) for u in found.units] == [
        ("q_proj", 0, (1.0, 4.0)),
        ("q_proj", 1, (2.0, 0.0)),
        ("v_proj", 0, (0.0, 6.0)),
    ]
    assert found.differences("one", "two") == (3.0, -2.0, 6.0)
    assert found.by_projection() == {"q_proj": (1.5, 2.0), "v_proj": (0.0, 6.0)}
    assert found.by_layer()[0] == pytest.approx((1.0, 10 / 3))
    assert found.runs[1].theta_bar_deg == 5.0
    assert found.runs[1].theta_bar_all_deg == pytest.approx(10 / 3)
    assert found.runs[0].verdict == "SAFE"
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_one_skipped_is_not_paired() -> None:
    one = report(unit(), skipped=(Skipped("model.layers.0.self_attn.v_proj", "shape", "why"),))
    two = report(unit(), unit("model.layers.0.self_attn.v_proj"))
    assert [u.projection for u in compare({"a": one, "b": two}).units] == ["q_proj"]


def test_what_cannot_be_compared_is_an_error() -> None:
    one = report(unit())
    with pytest.raises(ConfigError, match="two reports"):
        compare({"a": one})
    with pytest.raises(ConfigError, match="cut differently"):
        compare({"a": one, "b": report(unit(), per="projection")})
    with pytest.raises(ConfigError, match="different models"):
        compare({"a": one, "b": report(unit(parameters=65))})
    with pytest.raises(ConfigError, match="no such report"):
        compare({"a": one, "b": one}).differences("a", "c")
