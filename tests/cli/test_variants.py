"""lorasmith variants, convert and info: what they say against what the engine does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.cli.app import COMMANDS
from lorasmith.cli.variants import describe
from lorasmith.core.variant import BaseLayer
from lorasmith.io.tensors import FileTensors
from tests.contract.configurations import CONFIGURATIONS
from tests.models import llama, mlp, randomise


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in arguments else out, err

    return run


def _attach(model: torch.nn.Module, config: ls.AdapterConfig, batch: Any) -> ls.Adapter:
    needed = ls.variants()[config.variant].statistics(config)
    loss = (lambda y: y.square().mean()) if needed else None
    calibration = [batch] if needed else None
    return ls.attach(model, config, calibration=calibration, calibration_loss=loss)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_parameters_are_those_of_an_attached_adapter(name: str) -> None:
    changes = {"hidden_size": 128, "intermediate_size": 192}
    with torch.device("meta"):
        empty = llama(**changes)
    variant = ls.variants()[name]
    found = describe(variant, empty)
    assert found["note"] is None
    model = llama(**changes)
    batch = {"input_ids": torch.randint(0, 32, (24, 24))}
    config = variant.config_class()
    needed = variant.statistics(config)
    adapter = ls.attach(model, config, calibration=[batch] if needed else None)
    assert found["parameters"] == adapter.num_parameters()
    assert found["layers"] == len(adapter.targets)
    assert found["needs_calibration"] == bool(needed)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_it_says_of_rows_and_fusing_is_so(name: str) -> None:
    variant = ls.variants()[name]
    found = describe(variant, mlp())
    config = next(iter(CONFIGURATIONS[name].values()))
    model = mlp()
    adapter = _attach(model, config, {"input": torch.randn(64, 6)})
    model.eval()
    randomise(adapter.parameters())
    for layer, part in adapter.layers().items():
        base = BaseLayer(model.get_submodule(layer), part.info)
        assert (variant.affine(part, base) is not None) == found["rows_in_one_pass"]
    if found["fuses"]:
        ls.fuse(model)
    else:
        with pytest.raises(ls.LorasmithError):
            ls.fuse(model)


def test_a_size_that_does_not_fit_is_said() -> None:
    found = describe(ls.variants()["road"], mlp())
    assert found["parameters"] is None
    assert found["note"]


def test_peft_knows_exactly_those_that_are_marked() -> None:
    peft = pytest.importorskip("peft")
    known = {kind.value for kind in peft.PeftType}
    model = mlp()
    for name in CONFIGURATIONS:
        variant = ls.variants()[name]
        assert describe(variant, model)["peft"] == (variant.peft_type in known), name


def test_the_list(call: Any, base: Path) -> None:
    code, found, _ = call("variants", "--model", base, "--r", "3", "--json")
    assert code == 0
    assert [v["name"] for v in found["variants"]] == list(ls.variants())
    by_name = {v["name"]: v for v in found["variants"]}
    lora = by_name["lora"]
    # r (d_in + d_out) over q, k, v, o, gate, up and down of two blocks.
    assert lora["parameters"] == 2 * 3 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert (lora["r"], lora["quantized_base"], lora["peft"]) == (3, "yes", True)
    assert by_name["dora"]["quantized_base"] == "each run"
    assert all(v["formula"] and v["family"] != "other" for v in found["variants"])
    code, out, err = call("variants", "--model", base)
    assert code == 0
    assert all(f" {name} " in out for name in ls.variants())
    assert err == ""


def test_other_targets_and_those_that_match_nothing(call: Any, base: Path) -> None:
    arguments = ("variants", "--model", base, "--targets", "q_proj", "v_proj", "--json")
    found = {v["name"]: v for v in call(*arguments)[1]["variants"]}
    assert (found["lora"]["layers"], found["ia3"]["parameters"]) == (4, 2 * (32 + 16))
    for mistake in (("--targets", "qproj"), ("--r", "0")):
        code, nothing, _ = call("variants", "--model", base, *mistake, "--json")
        assert code == 2
        assert mistake[1] in nothing["error"]["got"]
    # What is wrong for one family alone is said beside the others.
    code, out, _ = call("variants", "--model", base, "--r", "3")
    assert code == 0
    assert "hra: An odd number of reflections" in out
    assert "Ranks (--r): 3 for lora, dora," in out


def test_the_new_commands_are_in_the_list_of_all() -> None:
    assert {"variants", "convert"} <= set(COMMANDS)


# -- convert and info --------------------------------------------------------------------------


def _saved(base: Path, path: Path, config: ls.AdapterConfig) -> Path:
    from lorasmith.training.models import load_model

    model, _ = load_model(base, device="cpu")
    adapter = ls.attach(model, config)
    randomise(adapter.parameters())
    return ls.save(model, path)


def test_convert(call: Any, base: Path, tmp_path: Path) -> None:
    source = _saved(base, tmp_path / "a", ls.HRAConfig(r=2))
    arguments = ("convert", source, "-o", tmp_path / "b", "--model", base)
    code, found, err = call(*arguments, "--r", "2", "--json")
    assert code == 0, err
    assert found["source"] == "hra"
    assert found["max_relative_error"] < 1e-5  # W H − W has rank r
    assert {layer["kept"] for layer in found["layers"]} == {2}
    assert ls.read_adapter(tmp_path / "b").config.variant == "lora"
    code, found, _ = call(*arguments, "--r", "1", "--json")
    assert (code, found["error"]["key"]) == (2, "--output")
    assert ls.read_adapter(tmp_path / "b").config.r == 2  # type: ignore[attr-defined]
    code, out, err = call(*arguments, "--r", "1", "--alpha", "4", "--overwrite")
    assert code == 0, err
    assert "relative error" in out
    assert ls.read_adapter(tmp_path / "b").config.alpha == 4  # type: ignore[attr-defined]
    code, found, _ = call(*arguments, "--energy", "0.5", "--overwrite", "--json")
    assert {layer["kept"] for layer in found["layers"]} <= {1, 2}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ((), "--r"),
        (("--energy", "0.9", "--alpha", "3"), "--alpha"),
        (("--energy", "2"), "energy"),
        (("--r", "2"), "model"),
    ],
)
def test_mistakes_in_converting(
    call: Any, base: Path, tmp_path: Path, options: tuple[str, ...], key: str
) -> None:
    source = _saved(base, tmp_path / "a", ls.IA3Config())
    code, found, _ = call("convert", source, "-o", tmp_path / "b", *options, "--json")
    assert code == 2
    assert found["error"]["key"] == key
    assert not (tmp_path / "b").exists()


def test_a_conversion_does_not_replace_its_source(call: Any, base: Path, tmp_path: Path) -> None:
    source = _saved(base, tmp_path / "a", ls.LoRAConfig(r=2))
    before = (source / "adapter_model.safetensors").read_bytes()
    arguments = ("convert", source, "-o", tmp_path / "." / "a", "--r", "1", "--overwrite")
    code, found, _ = call(*arguments, "--json")
    assert (code, found["error"]["key"]) == (2, "--output")
    assert (source / "adapter_model.safetensors").read_bytes() == before


def test_info_is_short_for_a_pattern_of_many_layers(call: Any, base: Path, tmp_path: Path) -> None:
    layers = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
    pattern = dict.fromkeys([*layers, "up_proj"], 3)
    source = _saved(base, tmp_path / "a", ls.LoRAConfig(r=2, rank_pattern=pattern))
    out = call("info", source)[1]
    assert "rank_pattern of 9 layers" in out
    assert "2 on 4 layers, 3 on 10 layers" in out
    assert "None" not in out
    assert call("info", source, "--json")[1]["config"]["rank_pattern"] == pattern


def test_info_counts_one_layer_as_one(call: Any, base: Path, tmp_path: Path) -> None:
    pattern = {"model.layers.0.self_attn.q_proj": 3}
    source = _saved(base, tmp_path / "a", ls.LoRAConfig(r=2, rank_pattern=pattern))
    assert "2 on 13 layers, 3 on 1 layer\n" in re.sub(r" *\n", "\n", call("info", source)[1])


def test_info_reads_no_weights(
    call: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = {"q_proj": 3}
    source = _saved(base, tmp_path / "a", ls.LoRAConfig(r=2, rank_pattern=pattern, init="pissa"))

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(FileTensors, "__getitem__", refuse)
    code, found, err = call("info", source, "--json")
    assert code == 0, err
    assert found["ranks"] == {"2": 12, "3": 2}
    assert found["parameters"] > 0
