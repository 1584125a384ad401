"""LoHa against its formula and against PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from tests.adapters.against import (
    LLAMA,
    QWEN,
    equals_formula,
    files_both_ways,
    on_qwen,
    same_as_peft,
    same_dropout_as_peft,
    saved_by,
    second_derivatives,
    theirs,
)
from tests.models import llama

peft = pytest.importorskip("peft")

KEYS = {
    "hada_w1_a.default": "A1",
    "hada_w1_b.default": "B1",
    "hada_w2_a.default": "A2",
    "hada_w2_b.default": "B2",
}


@pytest.fixture(params=[0, 10**9], ids=["fast", "plain"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dense_input", [True, False], ids=["x needs grad", "x needs none"])
@pytest.mark.parametrize("r", [1, 2, 5], ids=["rank 1", "Khatri-Rao", "dense"])
def test_formula(r: int, kind: str, dense_input: bool) -> None:
    def formula(weight: Tensor, t: Any) -> Tensor:
        return weight + 7.0 / r * (t["A1"] @ t["B1"]) * (t["A2"] @ t["B2"])

    config = ls.LoHaConfig(r=r, alpha=7.0)
    equals_formula(config, formula, kind=kind, d_in=9, d_out=10, dense_input=dense_input)


def test_which_form_a_layer_takes() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    layers = ls.attach(model, ls.LoHaConfig(r=5)).layers()
    # 25 * 128 < 64 * 64, but 25 * 68 > 64 * 4.
    assert layers["0"].constants["product"].__name__ == "khatri_rao"
    assert layers["1"].constants["product"].__name__ == "hadamard"


@pytest.mark.parametrize("r", [2, 5])
def test_second_derivatives(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    second_derivatives(ls.LoHaConfig(r=r, alpha=3.0), 9, 10)


def _cases() -> dict[str, tuple[Any, Any]]:
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 1, "layers.1.mlp.down_proj": 3}}
    patterns["alpha_pattern"] = {"v_proj": 11, "^model.layers.0.*down_proj": 5}
    return {
        "Khatri-Rao": (
            ls.LoHaConfig(r=2, alpha=6.0, targets=LLAMA),
            peft.LoHaConfig(r=2, alpha=6, target_modules=LLAMA),
        ),
        "dense": (
            ls.LoHaConfig(r=5, alpha=6.0, targets=LLAMA),
            peft.LoHaConfig(r=5, alpha=6, target_modules=LLAMA),
        ),
        "patterns": (
            ls.LoHaConfig(r=2, alpha=6.0, targets=LLAMA, **patterns),
            peft.LoHaConfig(r=2, alpha=6, target_modules=LLAMA, **patterns),
        ),
    }


CASES = _cases()


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_peft(case: str) -> None:
    same_as_peft(*CASES[case], KEYS)


@pytest.mark.parametrize("case", CASES)
def test_files_of_peft(case: str, tmp_path: Path) -> None:
    config, peft_config = CASES[case]
    files_both_ways(config, peft_config, tmp_path)


@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_dropout_of_peft(kind: str) -> None:
    config = ls.LoHaConfig(r=2, alpha=6.0, targets=LLAMA, **{kind: 0.4})
    same_dropout_as_peft(
        config, peft.LoHaConfig(r=2, alpha=6, target_modules=LLAMA, **{kind: 0.4}), KEYS
    )


def test_parameters_on_qwen() -> None:
    expected = sum(2 * 8 * (d_in + d_out) for d_in, d_out in QWEN.values())
    assert on_qwen(ls.LoHaConfig(r=8)) == expected
    # Twice LoRA's, for all 28 blocks.
    assert expected * 28 == 2 * 8 * 28 * 22528 == 10_092_544


def test_start() -> None:
    part = ls.attach(nn.Sequential(nn.Linear(50, 40)), ls.LoHaConfig(r=4)).layers()["0"]
    assert not part["B2"].any()
    for name, fan_in in (("A1", 4), ("A2", 4), ("B1", 50)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.8 * bound < float(part[name].detach().abs().max()) <= bound


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"r": True},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"rank_dropout": 1.0},
        {"module_dropout": -0.1},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"(": 1.0}},
        {"rank_pattern": 3},
    ],
)
def test_refused_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ls.LorasmithError):
        ls.LoHaConfig(**wrong)


@pytest.mark.parametrize("r", [2, 20], ids=["Khatri-Rao", "dense"])
def test_nothing_wide_is_saved(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside x, nothing is kept for the backward pass."""
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(64, 48))
    ls.attach(model, ls.LoHaConfig(r=r))
    x = torch.randn(5, 64, requires_grad=True)
    assert {t.data_ptr() for t in saved_by(model, x)} == {x.data_ptr()}


def test_refused_files(tmp_path: Path) -> None:
    other = theirs(llama(), peft.LoHaConfig(r=2, target_modules=LLAMA, use_effective_conv2d=True))
    other.save_pretrained(tmp_path)
    with pytest.raises(ls.LorasmithError, match="use_effective_conv2d"):
        ls.load(llama(), tmp_path)
