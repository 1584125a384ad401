"""``lorasmith fleet compress, add, remove, export``: JSON, files that PEFT loads, mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from lorasmith.errors import AdapterFileError, ConfigError
from tests.io.support import llama, logits, saved


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for name, r in (("one", 2), ("two", 3), ("three", 4)):
        saved(tmp_path / "adapters" / name, ls.LoRAConfig(r=r))
    return tmp_path / "adapters"


@pytest.fixture
def fleet(adapters: Path, tmp_path: Path) -> Path:
    paths = [adapters / "one", adapters / "two"]
    ls.SharedSubspace.from_adapters(paths, error=0.01).save(tmp_path / "fleet")
    return tmp_path / "fleet"


def test_the_commands_are_listed(call: Any) -> None:
    out = call("fleet", "--help").out
    assert all(f" {n} " in out for n in ("compress", "add", "remove", "export"))
    for name in ("compress", "add", "remove", "export"):
        assert call("fleet", name, "--help").code == 0


@pytest.mark.parametrize("basis", ["joint", "share"])
@pytest.mark.parametrize("stream", [True, False])
def test_compress(call: Any, adapters: Path, tmp_path: Path, basis: str, stream: bool) -> None:
    out = tmp_path / "out"
    options = ["--basis", basis, "--error", "0.02", "--quantize", "8", *(["--stream"] * stream)]
    called = call("fleet", "compress", adapters, "-o", out, *options, "--json")
    found = called.json  # one object on stdout and nothing else
    assert called.code == 0
    assert sorted(found["ids"]) == ["one", "three", "two"]
    assert max(found["errors"].values()) <= 0.03
    assert found["stats"]["bytes"]["disk"] == sum(f.stat().st_size for f in out.iterdir())
    assert found["stats"]["codecs"]["basis"] == "int8"
    assert sorted(ls.SharedSubspace.load(out).ids) == ["one", "three", "two"]
    again = call("fleet", "compress", adapters, "-o", out)
    assert again.code == 2
    assert "already" in again.err
    shown = call("fleet", "compress", adapters, "-o", out, "--overwrite")
    assert shown.code == 0
    assert "times smaller" in shown.out
    info = call("fleet", "info", out, "--json")
    assert sorted(info.json["ids"]) == ["one", "three", "two"]


@pytest.mark.parametrize("absorb", [True, False])
def test_add_and_remove(call: Any, fleet: Path, adapters: Path, absorb: bool) -> None:
    options = ["--id", "team/a", "--error", "0.001", *(["--absorb"] * absorb)]
    called = call("fleet", "add", fleet, adapters / "three", *options, "--json")
    assert called.code == 0
    assert called.json["added"]["id"] == "team/a"
    assert called.json["added"]["error"] <= 0.001 + 1e-6
    assert "error" not in called.json  # that is what failed calls have
    assert ("moved" in called.json) is absorb
    assert ls.SharedSubspace.load(fleet).ids == ("one", "two", "team/a")
    assert call("fleet", "add", fleet, adapters / "three", *options).code == 2
    called = call("fleet", "remove", fleet, "team/a", "--json")
    assert called.json["ids"] == ["one", "two"]
    assert ls.SharedSubspace.load(fleet).ids == ("one", "two")
    wrong = call("fleet", "remove", fleet, "nobody", "--json")
    assert wrong.code == 2
    assert "nobody" in wrong.json["error"]["got"]


@pytest.mark.filterwarnings("always::lorasmith.fleet.records.BudgetWarning")
def test_a_warning_where_it_does_not_fit(call: Any, adapters: Path, tmp_path: Path) -> None:
    called = call("fleet", "compress", adapters, "-o", tmp_path / "x", "--components", "1")
    assert called.code == 0
    assert "lose more than" in called.err


def test_an_export_acts_the_same_in_peft(
    call: Any, fleet: Path, adapters: Path, tmp_path: Path
) -> None:
    """vLoRA: the default export changes logits by 0.41 of an effect of 0.68."""
    peft = pytest.importorskip("peft")
    ls.SharedSubspace.from_adapters(adapters, error=0.0).save(fleet)
    out = tmp_path / "out"
    called = call("fleet", "export", fleet, "two", "-o", out, "--json")
    assert called.code == 0
    assert called.json["config"]["r"] == 3

    def run(path: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return logits(peft.PeftModel.from_pretrained(llama(), path).eval())

    wanted = run(adapters / "two")
    assert float((run(out) - wanted).norm()) < 1e-3 * float((wanted - logits(llama())).norm())
    assert call("fleet", "export", fleet, "two", "-o", out).code == 2
    assert call("fleet", "export", fleet, "two", "-o", out, "--overwrite", "--rank", "1").code == 0
    assert ls.read_adapter(out).config.r == 1  # type: ignore[attr-defined]
    assert call("fleet", "export", fleet, "two", "-o", tmp_path / "y", "--rank", "high").code == 2


def test_mistakes(call: Any, adapters: Path, tmp_path: Path) -> None:
    both = call(
        "fleet", "compress", adapters, "-o", tmp_path / "z", "--error", "0.1", "--components", "2"
    )
    assert both.code == 2
    assert "exclude" in both.err
    assert (
        call("fleet", "compress", adapters, "-o", tmp_path / "z", "--stream", "--same-rank").code
        == 2
    )
    assert call("fleet", "add", adapters, adapters / "one").code == 2
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("stream", [True, False])
def test_the_budget_is_kept_with_rounding(
    call: Any, adapters: Path, tmp_path: Path, stream: bool
) -> None:
    out, options = tmp_path / "out", ["--stream"] * stream
    called = call(
        "fleet", "compress", adapters, "-o", out, "--error", "0.02", "--quantize", "8", *options,
        "--json",
    )  # fmt: skip
    assert called.code == 0
    assert "lose more than" not in called.err
    assert max(called.json["errors"].values()) <= 0.02 + 2e-6
    whole = ls.SharedSubspace.load(out)
    for name in called.json["ids"]:
        assert whole.measure(adapters / name, name).within
    other = tmp_path / "other"
    refused = call(
        "fleet", "compress", adapters, "-o", other, "--error", "0.001", "--quantize", "4", *options
    )
    assert refused.code == 2
    assert "--quantize 8" in refused.err
    assert not other.exists()


def test_info_knows_fleets_and_urls(call: Any, fleet: Path, adapters: Path) -> None:
    """As ``lorasmith info``, which was for models and directories of adapters."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for place, folder in (("fleet", fleet), ("one", adapters / "one")):
        files.put(f"{folder}/", f"/info-test/{place}/", recursive=True)
    for place in (fleet, fleet.as_uri(), "memory://info-test/fleet"):
        assert call("info", place, "--json").json["ids"] == ["one", "two"]
    for place in (adapters / "one", (adapters / "one").as_uri(), "memory://info-test/one"):
        assert call("info", place, "--json").json["kind"] == "adapter"
    wrong = call("info", "memory://info-test/nothing")
    assert wrong.code == 2
    assert "adapter_config.json" in wrong.err
    assert call("info", fleet, "--r", "8").code == 2


def test_messages_for_fleets_in_the_place_of_adapters(fleet: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="fleet export"):
        ls.read_adapter(fleet)
    with pytest.raises(ConfigError, match=r"\.save\(path\)"):
        ls.save(ls.SharedSubspace.load(fleet), tmp_path / "x")  # type: ignore[arg-type]
