"""Parameter groups: who learns how fast, and that training keeps it so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.errors import ConfigError
from lorasmith.training import run
from lorasmith.training.config import TrainConfig
from lorasmith.training.states import load_state
from tests.models import llama, mlp
from tests.training.tiny import make_config

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _names(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}


def test_the_groups_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs_model, model = llama(), llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_model = peft.get_peft_model(
            theirs_model, peft.LoraConfig(r=4, target_modules=TARGETS)
        )
    theirs = create_loraplus_optimizer(
        theirs_model,
        torch.optim.AdamW,
        lr=1e-4,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
    )
    ls.attach(model, ls.LoRAConfig(r=4, targets=TARGETS))
    mine = torch.optim.AdamW(
        ls.param_groups(model, 1e-4, lora_plus_ratio=16.0, weight_decay=0.1), lr=1e-4
    )
    their_names = {id(p): n for n, p in theirs_model.named_parameters()}
    my_names = {id(p): n for n, p in model.named_parameters()}

    def rates(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
        found = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)].removeprefix("base_model.model.")
                name = name.replace("lorasmith.adapter_default.", "lora_")
                name = name.replace(".default.weight", "")
                found[name] = (group["lr"], group["weight_decay"], tuple(parameter.shape))
        return found

    assert rates(mine, my_names) == rates(theirs, their_names)
    assert len(my_names) > 12
    assert {lr for lr, *_ in rates(mine, my_names).values()} == {1e-4, 16.0 * 1e-4}


def test_without_a_ratio_there_is_one_rate_and_vectors_do_not_decay() -> None:
    model = mlp()
    ls.attach(model, ls.DoRAConfig(r=2, modules_to_save=["2"], targets="0"))
    groups = ls.param_groups(model, 0.5, weight_decay=0.1)
    assert [g["name"] for g in groups] == ["matrices", "vectors"]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.5, 0.1), (0.5, 0.0)]
    names = _names(model, groups)
    assert {n.rpartition(".")[2] for n in names["matrices"]} == {"A", "B", "weight"}
    assert {n.rpartition(".")[2] for n in names["vectors"]} == {"magnitude", "bias"}
    torch.optim.SGD(groups)  # without a rate of its own


def test_an_adapter_is_not_its_model() -> None:
    model = mlp()
    first = ls.attach(model, ls.LoRAConfig(r=2), name="first")
    ls.attach(model, ls.IA3Config(), name="second")
    own = ls.param_groups(first, 1.0, lora_plus_ratio=4.0)
    assert {id(p) for g in own for p in g["params"]} == {id(p) for p in first.parameters()}
    assert {g["name"]: g["lr"] for g in own} == {"matrices": 1.0, "faster matrices": 4.0}
    everything = ls.param_groups(model, 1.0, lora_plus_ratio=4.0)
    assert [g["name"] for g in everything] == ["matrices", "vectors", "faster matrices"]
    first.requires_grad_(False)
    names = _names(model, ls.param_groups(model, 1.0))
    assert set(names) == {"vectors"}
    with pytest.raises(ConfigError, match="Nothing is trainable"):
        ls.param_groups(first, 1.0)


def test_a_schedule_keeps_the_ratio() -> None:
    model = mlp()
    ls.attach(model, ls.LoRAConfig(r=2))
    optimizer = torch.optim.AdamW(ls.param_groups(model, 1e-2, lora_plus_ratio=8.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        optimizer.step()
        schedule.step()
        slow, fast = schedule.get_last_lr()
        assert fast == pytest.approx(8.0 * slow)
    assert slow == pytest.approx(1e-2 / 4)


def test_the_first_step_is_the_papers() -> None:
    """Adam's first step is the sign of the gradient times the rate (B is zero, so A rests)."""
    model = mlp()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    groups = ls.param_groups(model, 1e-3, lora_plus_ratio=16.0)
    optimizer = torch.optim.Adam(groups, eps=1e-12)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    for name, value in adapter.state_dict().items():
        moved = (value - before[name]).abs()
        if name.endswith("B"):
            torch.testing.assert_close(moved, torch.full_like(moved, 16e-3))
        else:
            assert float(moved.max()) == 0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio"),
        ({"lora_plus_ratio": float("inf")}, "lora_plus_ratio"),
    ],
)
def test_values_that_cannot_be_used(arguments: dict[str, Any], key: str) -> None:
    model = mlp()
    ls.attach(model, ls.LoRAConfig(r=2))
    with pytest.raises(ConfigError) as caught:
        ls.param_groups(model, **{"lr": 1.0, **arguments})
    assert caught.value.key == key


def test_a_ratio_needs_something_to_train_faster() -> None:
    model = mlp()
    ls.attach(model, ls.IA3Config())
    with pytest.raises(ConfigError, match="'ia3'"):
        ls.param_groups(model, 1.0, lora_plus_ratio=2.0)
    model = mlp()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(name.endswith("A"))
    with pytest.raises(ConfigError, match="Nothing that is trainable"):
        ls.param_groups(model, 1.0, lora_plus_ratio=2.0)


# -- training ----------------------------------------------------------------------------------


def _config(base: Path, rows: Path, output: Path, **changes: Any) -> TrainConfig:
    settings = {"lr": 1e-3, "weight_decay": 0.1, "lora_plus_ratio": 16.0}
    return make_config(base, rows, output, **{**settings, **changes})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in ls.read_adapter(path).tensors.items()}


def test_training_runs_at_both_rates(base: Path, rows: Path, tmp_path: Path) -> None:
    result = run.train(
        _config(base, rows, tmp_path / "a", save_steps=3, schedule="cosine"), progress=False
    )
    # What is reported is the rate of A.
    assert max(p.learning_rate for p in result.losses) <= 1e-3
    state = load_state(tmp_path / "a" / "checkpoint-3" / "optimizer.safetensors")
    slow, fast = state["param_groups"]
    assert (slow["name"], fast["name"]) == ("matrices", "faster matrices")
    assert fast["lr"] == pytest.approx(16 * slow["lr"])
    assert fast["initial_lr"] == pytest.approx(16 * slow["initial_lr"])
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    plain = run.train(
        _config(base, rows, tmp_path / "b", lora_plus_ratio=None, save_steps=None), progress=False
    )
    assert plain.config["lora_plus_ratio"] is None
    a, b = _tensors(tmp_path / "a"), _tensors(tmp_path / "b")
    largest = max(float(a[k].abs().max()) for k in a if "lora_B" in k)
    assert largest > 8 * max(float(b[k].abs().max()) for k in b if "lora_B" in k)


def test_a_resumed_run_is_the_run(base: Path, rows: Path, tmp_path: Path) -> None:
    run.train(_config(base, rows, tmp_path / "whole"), progress=False)
    folder = tmp_path / "parts"
    run.train(_config(base, rows, folder, save_steps=3), progress=False)
    whole = _tensors(tmp_path / "whole")
    # As if it had been stopped after step 3.
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        (folder / name).unlink()
    result = run.train(_config(base, rows, folder, save_steps=3, resume="last"), progress=False)
    assert result.steps == 6
    assert json.loads((folder / "training.json").read_text())["config"]["lora_plus_ratio"] == 16
    resumed = _tensors(folder)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_training_says_early_that_there_is_nothing_to_train_faster(
    rows: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path / "nowhere", rows, tmp_path / "o")
    config = TrainConfig.from_dict({**config.to_dict(), "adapter": {"variant": "ia3"}})
    with pytest.raises(ConfigError, match="'ia3'"):
        run.train(config, progress=False)
    assert not (tmp_path / "o").exists()
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        _config(tmp_path, rows, tmp_path / "o", lora_plus_ratio=0.0)
