"""``lorasmith fleet analyze, diff, validate, info``: JSON, tables, figures, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from tests.io.support import edit_json, edit_tensors, foreign, saved

pytest.importorskip("scipy")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    for name, r in (("one", 2), ("two", 3), ("three", 4)):
        saved(tmp_path / "fleet" / name, ls.LoRAConfig(r=r))
    return tmp_path / "fleet"


def test_the_commands_are_listed(call: Any) -> None:
    out = call("fleet", "--help").out
    assert all(f" {n} " in out for n in ("analyze", "diff", "info", "validate"))
    assert "Similarity" in call("fleet", "analyze", "--help").out.replace(
        "similarity", "Similarity"
    )
    assert " fleet " in call("--help").out


def test_analyze_the_zoo(call: Any, zoo: Path, tmp_path: Path) -> None:
    called = call("fleet", "analyze", zoo, "--json", "--plot", tmp_path / "figures")
    found = called.json  # one object on stdout and nothing else
    assert called.code == 0
    assert len(found["ids"]) == len(found["cosine"]) == 16
    assert ["e2e-dora", "e2e-s0", "e2e-s1"] in found["clusters"]["groups"]
    assert {o["id"] for o in found["outliers"]["outliers"]} >= {"dates-en-r4"}
    assert "DoRA" in found["notes"][0]
    assert [Path(p).name for p in found["plots"]] == ["heat-map.png", "dendrogram.png", "map.png"]
    for path in found["plots"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 20_000


def test_analyze_for_people(call: Any, fleet: Path, tmp_path: Path) -> None:
    called = call("fleet", "analyze", fleet, "--clusters", "2", "--plot", tmp_path / "map.svg")
    assert called.code == 0
    assert "2 groups" in called.out
    assert "fewer than 4" in called.out
    assert "<svg" in (tmp_path / "map.svg").read_text()
    assert call("fleet", "analyze", fleet, "--threshold", "2", "--json").json["clusters"][
        "groups"
    ] == [["one", "three", "two"]]


def test_several_paths_and_layers(call: Any, fleet: Path) -> None:
    paths = [fleet / "one", fleet / "two", fleet / "one"]
    found = call("fleet", "analyze", *paths, "--per-layer", "--json").json
    assert found["ids"] == ["one", "two", "one#2"]
    assert len(found["layers"]) == len(found["modules"]) == 14
    (pair,) = found["redundant"]
    assert {pair["keep"], pair["other"]} == {"one", "one#2"}
    assert pair["action"] == "drop"


def test_diff(call: Any, fleet: Path) -> None:
    found = call("fleet", "diff", fleet / "one", fleet / "two", "--json").json
    assert found["a"] == "one"
    assert len(found["layers"]) == 14
    assert found["relative"] > 0.5
    out = call("fleet", "diff", fleet / "one", fleet / "two").out
    assert "one → two" in out
    assert "differ most" in out


def test_validate(call: Any, fleet: Path) -> None:
    called = call("fleet", "validate", fleet, "--json")
    assert called.code == 0
    assert called.json["ok"] is True
    edit_tensors(
        foreign(fleet / "one") / "adapter_model.safetensors",
        lambda t: next(iter(t.values())).fill_(float("nan")),
    )
    (fleet / "two" / "adapter_model.safetensors").write_bytes(b"no")
    called = call("fleet", "validate", fleet, fleet / "nothing", "--json")
    assert called.code == 1
    problems = {Path(c["path"]).name: c["problems"] for c in called.json["checked"]}
    assert "finite" in problems["one"][0]
    assert problems["two"]
    assert problems["three"] == []
    assert "no such adapter" in problems["nothing"][0]
    called = call("fleet", "validate", fleet)
    assert called.code == 1
    assert "2 problems" in called.out


def test_validate_finds_the_foreign_base(call: Any, fleet: Path) -> None:
    for name in ("one", "two", "three"):
        edit_json(
            foreign(fleet / name) / "adapter_config.json",
            base_model_name_or_path="owner/other" if name == "two" else "owner/base",
        )
    found = call("fleet", "validate", fleet, "--json").json
    problems = {Path(c["path"]).name: c["problems"] for c in found["checked"]}
    assert [n for n, p in problems.items() if p] == ["two"]
    assert call("fleet", "validate", fleet, "--allow-base-mismatch").code == 0


def test_info(call: Any, fleet: Path) -> None:
    found = call("fleet", "info", fleet, "--json").json
    assert [a["id"] for a in found["adapters"]] == ["one", "three", "two"]
    assert [a["ranks"] for a in found["adapters"]] == [[2], [4], [3]]
    assert found["bytes"] == sum(a["bytes"] for a in found["adapters"])
    assert "lora" in call("fleet", "info", fleet).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clusters", "9"], "1 to 3"),
        (["--clusters", "2", "--threshold", "1"], "not both"),
        (["--plot", "x.jpg"], ".png"),
        (["--alpha", "2"], "alpha"),
    ],
)
def test_mistakes(call: Any, fleet: Path, arguments: list[str], said: str) -> None:
    called = call("fleet", "analyze", fleet, *arguments, "--json")
    assert called.code == 2
    assert said in json.dumps(called.json["error"], ensure_ascii=False)
