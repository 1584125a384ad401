"""``lorasmith train --subspace``: a new task inside a fleet's basis, from the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.errors import ConfigError
from lorasmith.fleet.subspace import SharedSubspace
from lorasmith.training import models
from lorasmith.training.config import TrainConfig
from tests.models import randomise


@pytest.fixture
def fleet(base: Path, tmp_path: Path) -> Path:
    model, _ = models.load_model(str(base), dtype="float32", device="cpu")
    made = {}
    for seed in range(3):
        adapter = ls.attach(model, ls.LoRAConfig(r=2, targets=["q_proj", "v_proj"]))
        randomise(adapter.parameters(), seed=seed)
        made[f"t{seed}"] = ls.AdapterWeights.from_model(model)
        ls.detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SharedSubspace.from_adapters(made, components=4).save(tmp_path / "fleet")


@pytest.fixture
def train(
    capfd: pytest.CaptureFixture[str], base: Path, rows: Path, fleet: Path, tmp_path: Path
) -> Any:
    def run(*options: str | Path, output: str = "new", **more: Any) -> tuple[int, Any, str]:
        given: list[Any] = [
            "train",
            base,
            rows,
            "-o",
            tmp_path / output,
            "--steps",
            4,
            "--lr",
            "0.05",
        ]
        given += ["--device", "cpu", "--json"]
        if more.get("fleet", True):
            given += ["--subspace", fleet]
        capfd.readouterr()
        code = main([str(a) for a in (*given, *options)])
        out, err = capfd.readouterr()
        return code, json.loads(out), err

    return run


def test_the_result_is_an_adapter_and_the_fleet_stays(
    train: Any, fleet: Path, tmp_path: Path
) -> None:
    before = {f.name: f.read_bytes() for f in fleet.iterdir() if f.is_file()}
    code, found, err = train()
    assert code == 0, err
    assert found["adapter"]["variant"] == "subspace"
    assert found["subspace"]["task"] == "new"
    assert found["subspace"]["saved"] is None
    # R² of a joint basis with four directions, on q and v of two blocks.
    assert found["trainable_parameters"] == found["subspace"]["parameters"]["trained"] == 4 * 16
    assert {f.name: f.read_bytes() for f in fleet.iterdir() if f.is_file()} == before
    weights = ls.read_adapter(tmp_path / "new")
    assert any(bool(weights.delta(m).any()) for m in weights.modules)


def test_in_place_and_to_another_directory(train: Any, fleet: Path, tmp_path: Path) -> None:
    options = ("--subspace-extra", "1", "--subspace-save", tmp_path / "fleet-2")
    code, found, err = train(*options, "--subspace-task", "count/one")
    assert code == 0, err
    assert found["subspace"]["saved"] == str(tmp_path / "fleet-2")
    assert SharedSubspace.load(fleet).ids == ("t0", "t1", "t2")
    old, new = SharedSubspace.load(fleet), SharedSubspace.load(tmp_path / "fleet-2")
    assert new.ids == ("t0", "t1", "t2", "count/one")
    weights = ls.read_adapter(tmp_path / "new")
    for module in new.modules:
        assert new.up(module).shape[1] == old.up(module).shape[1] + 1
        got = new.factors("count/one")[module].delta()
        torch.testing.assert_close(got, weights.delta(module), atol=1e-6, rtol=1e-5)
        for task in old.ids:
            mine, theirs = (f.factors(task)[module].delta() for f in (new, old))
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    code, found, err = train("--subspace-in-place", output="second")
    assert code == 0, err
    assert SharedSubspace.load(fleet).ids == ("t0", "t1", "t2", "second")
    # The id is taken now.
    code, found, _ = train("--subspace-in-place", "--overwrite", output="second")
    assert (code, found["error"]["key"]) == (2, "task")


def test_resuming_gives_the_same_bits(train: Any, tmp_path: Path) -> None:
    code, _, err = train("--save-steps", "2", "--subspace-extra", "1", output="whole")
    assert code == 0, err
    half = tmp_path / "whole" / "checkpoint-2"
    options = ("--subspace-extra", "1", "--subspace-task", "whole", "--resume", half)
    code, _, err = train(*options, output="again")
    assert code == 0, err
    wanted, got = (ls.read_adapter(tmp_path / n).tensors for n in ("whole", "again"))
    assert set(wanted) == set(got)
    assert all(torch.equal(wanted[k], got[k]) for k in wanted)


def test_the_yaml_file(train: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("subspace_form: diagonal\nadapter:\n  targets: [q_proj]\n")
    code, found, err = train("--config", file)
    assert code == 0, err
    assert found["adapter"]["form"] == "diagonal"
    assert found["trainable_parameters"] == 2 * 4


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"subspace_extra": 1}, "subspace_extra"),
        ({"subspace_in_place": True}, "subspace_in_place"),
        ({"subspace_save": "x"}, "subspace_save"),
        ({"subspace": "f", "subspace_extra": -1}, "subspace_extra"),
        ({"subspace": "f", "subspace_form": "dense"}, "subspace_form"),
        ({"subspace": "f", "subspace_save": "x", "subspace_in_place": True}, "subspace_save"),
        ({"subspace": "f", "adapter": {"r": 4}}, "adapter.r"),
        ({"subspace": "f", "adapter": {"variant": "dora"}}, "adapter.variant"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({"model": "m", "data": "d", "output": "o", **options})
    assert caught.value.key == key


def test_a_directory_without_a_fleet(train: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "run.yaml"
    file.write_text(f"subspace: {tmp_path / 'empty'}\n")
    code, found, _ = train("--config", file, fleet=False)
    assert (code, found["error"]["key"]) == (2, "subspace")
    code, found, _ = train("--subspace-save", tmp_path / "empty")
    assert (code, found["error"]["key"]) == (2, "subspace_save")
    assert not (tmp_path / "new").exists()
