"""MiSS against its formula and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.core.factors import factors_of
from tests.adapters.against import (
    LLAMA,
    QWEN,
    dense_weight,
    equals_formula,
    files_both_ways,
    on_qwen,
    same_as_peft,
    saved_by,
    second_derivatives,
    theirs,
)
from tests.models import llama, randomise, run

peft = pytest.importorskip("peft")

KEYS = {"miss_block.default": "D"}


@pytest.fixture(params=[0, 10**9], ids=["fast", "plain"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


def _change(form: str, weight: Tensor, block: Tensor) -> Tensor:
    """ΔW entry by entry."""
    d_out, d_in = weight.shape
    r = block.shape[-1] if form == "bat" else block.shape[0]
    rows = []
    for o in range(d_out):
        row = []
        for j in range(d_in):
            if form == "balance":
                row.append(block[j % r, o])
            elif form == "mini":
                row.append(block[j % r, o % block.shape[1]])
            else:
                part = block[o // r]
                start = j // r * r
                row.append(weight[o, start : start + r] @ part[:, j % r] + part[o % r, j % r])
        rows.append(torch.stack(row))
    return torch.stack(rows)


_FORMS: dict[str, dict[str, Any]] = {
    "balance": {"r": 4},
    "balance, not divided": {"r": 5},
    "balance, one part": {"r": 12},
    "mini": {"r": 4, "form": "mini", "mini_r": 2},
    "mini, not divided": {"r": 7, "form": "mini", "mini_r": 4},
    "bat": {"r": 4, "form": "bat"},
}


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dense_input", [True, False], ids=["x needs grad", "x needs none"])
@pytest.mark.parametrize("form", _FORMS)
def test_formula(form: str, kind: str, dense_input: bool) -> None:
    def formula(weight: Tensor, t: Any) -> Tensor:
        return weight + _change(form.partition(",")[0], weight, t["D"])

    config = ls.MiSSConfig(**_FORMS[form])
    equals_formula(config, formula, kind=kind, d_in=12, d_out=8, dense_input=dense_input)


@pytest.mark.parametrize("form", _FORMS)
def test_second_derivatives(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    second_derivatives(ls.MiSSConfig(**_FORMS[form]), 12, 8)


@pytest.mark.parametrize("form", _FORMS)
def test_factors(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8))
    adapter = ls.attach(model, ls.MiSSConfig(**_FORMS[form]))
    randomise(adapter.parameters())
    weight = dense_weight(model[0]).clone()
    if _FORMS[form].get("form") == "bat":
        assert adapter.layers()["0"].variant.factors(adapter.layers()["0"]) is None
        return
    found = factors_of(model)["0"]
    assert found.exact
    assert found.rank == _FORMS[form]["r"]
    ls.fuse(model)
    torch.testing.assert_close(found.delta(), dense_weight(model[0]) - weight, atol=1e-6, rtol=0)


def _cases() -> dict[str, tuple[Any, Any]]:
    def pair(form: str, r: int, dropout: float = 0.0, **options: Any) -> tuple[Any, Any]:
        init = True if form == "balance" else form
        return (
            ls.MiSSConfig(r=r, form=form, dropout=dropout, targets=LLAMA, **options),
            peft.MissConfig(
                r=r, init_weights=init, miss_dropout=dropout, target_modules=LLAMA, **options
            ),
        )

    return {
        "balance": pair("balance", 4),
        "not divided": pair("balance", 5),
        "dropout": pair("balance", 4, dropout=0.3),
        "mini": pair("mini", 4, mini_r=2),
        "mini, not divided": pair("mini", 7, mini_r=4),
        "bat": pair("bat", 4),
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


def test_parameters_on_qwen() -> None:
    expected = sum(64 * d_out for _, d_out in QWEN.values())
    assert on_qwen(ls.MiSSConfig(r=64)) == expected
    assert expected * 28 == 28 * 64 * (2048 + 4 * 1024 + 2 * 3072) == 22_020_096
    assert on_qwen(ls.MiSSConfig(r=64, form="mini", mini_r=16)) == 7 * 64 * 16
    assert on_qwen(ls.MiSSConfig(r=64, form="bat")) == expected


def test_dropout_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    for small in (0, 10**9):
        monkeypatch.setattr(lowrank, "SMALL", small)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8)).double()
        randomise(ls.attach(model, ls.MiSSConfig(r=5, dropout=0.3)).parameters(), scale=0.3)
        x = torch.randn(1, 12, dtype=torch.float64).expand(20_000, -1)
        got = model(x)
        assert got.std(dim=0).max() > 0.05
        torch.testing.assert_close(got.mean(0), model.eval()(x[0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("form", ["balance", "mini"])
def test_nothing_wide_is_saved(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layer's input only the sum of its parts is kept."""
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(64, 48))
    ls.attach(model, ls.MiSSConfig(r=8, form=form, mini_r=16))
    saved = saved_by(model, torch.randn(5, 64, requires_grad=True))
    assert {t.numel() for t in saved} == {5 * 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 5, "form": "bat"}, "does not divide"),
        ({"r": 30}, "larger than the input"),
        ({"r": 4, "form": "mini", "mini_r": 3}, "mini_r does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_changes(
    options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(8, 8))
    with pytest.raises(ls.LorasmithError, match=message):
        ls.attach(model, ls.MiSSConfig(**options))
    assert not ls.attached(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"mini_r": 0}, {"form": "bone"}, {"dropout": 1.0}, {"dropout": "a"}]
)
def test_refused_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ls.LorasmithError):
        ls.MiSSConfig(**wrong)


def test_a_bias_is_refused(tmp_path: Path) -> None:
    import json

    theirs(llama(), peft.MissConfig(r=4, target_modules=LLAMA)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bias": "all"}))
    with pytest.raises(ls.LorasmithError, match="bias"):
        ls.load(llama(), tmp_path)


def test_bat_follows_the_base_weight() -> None:
    """It reads W on every forward, so a change of W is seen."""
    model = nn.Sequential(nn.Linear(8, 8)).double()
    adapter = ls.attach(model, ls.MiSSConfig(r=4, form="bat"))
    randomise(adapter.parameters())
    x = torch.randn(3, 8, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.mul_(1.7)
        weight, block = model[0].weight.detach(), adapter.layers()["0"]["D"].detach().double()
        wanted = x @ (weight + _change("bat", weight, block)).T + model[0].bias
        torch.testing.assert_close(run(model, {"input": x}), wanted, atol=1e-6, rtol=1e-6)
