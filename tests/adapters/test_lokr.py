"""LoKr against its formula and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.adapters.lokr import factorise
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
from tests.models import llama, randomise

peft = pytest.importorskip("peft")

KEYS = {
    "lokr_w1.default": "C",
    "lokr_w1_a.default": "C_a",
    "lokr_w1_b.default": "C_b",
    "lokr_w2.default": "D",
    "lokr_w2_a.default": "D_a",
    "lokr_w2_b.default": "D_b",
}


@pytest.fixture(params=[0, 10**9], ids=["fast", "plain"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


_SHAPES = {
    "both low": {"r": 1, "decompose_both": True},
    "one low": {"r": 2},
    "whole": {"r": 6},
    "factor": {"r": 2, "decompose_factor": 2},
    "wide factor": {"r": 1, "decompose_factor": 10, "decompose_both": True},
}


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dense_input", [True, False], ids=["x needs grad", "x needs none"])
@pytest.mark.parametrize("shape", _SHAPES)
def test_formula(shape: str, kind: str, dense_input: bool) -> None:
    options = _SHAPES[shape]

    def formula(weight: Tensor, t: Any) -> Tensor:
        c = t["C"] if "C" in t else t["C_a"] @ t["C_b"]
        d = t["D"] if "D" in t else t["D_a"] @ t["D_b"]
        # ΔW_(i k, m n) = C_im D_kn
        whole = torch.einsum("im,kn->ikmn", c, d).reshape(20, 30)
        return weight + 5.0 / options["r"] * whole

    config = ls.LoKrConfig(alpha=5.0, **options)  # type: ignore[arg-type]
    equals_formula(config, formula, kind=kind, d_in=30, d_out=20, dense_input=dense_input)


def test_which_factors_are_of_low_rank() -> None:
    def names(**options: Any) -> set[str]:
        model = nn.Sequential(nn.Linear(30, 20))  # 30 = 5 · 6, 20 = 4 · 5
        return set(ls.attach(model, ls.LoKrConfig(**options)).layers()["0"]._parameters)

    assert names(r=2, decompose_both=True) == {"C_a", "C_b", "D_a", "D_b"}
    assert names(r=2) == {"C", "D_a", "D_b"}
    assert names(r=3) == names(r=3, decompose_both=True) == {"C", "D"}


@pytest.mark.parametrize("shape", ["both low", "whole"])
def test_second_derivatives(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    second_derivatives(ls.LoKrConfig(**_SHAPES[shape]), 12, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 6, 8, 16, 31, 100])
def test_factorisation_of_peft(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 400):
        assert factorise(size, factor) == factorization(size, factor), size


def _cases() -> dict[str, tuple[Any, Any]]:
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 11}}

    def pair(alpha: float, **options: Any) -> tuple[Any, Any]:
        return (
            ls.LoKrConfig(alpha=alpha, targets=LLAMA, **options),
            peft.LoKrConfig(alpha=alpha, target_modules=LLAMA, **options),
        )

    lycoris = pair(6, r=1)
    return {
        "both low": pair(6, r=1, decompose_both=True),
        "one low": pair(6, r=1),
        "whole": pair(12, r=4, decompose_factor=2),
        "patterns": pair(6, r=1, rank_dropout_scale=True, **patterns),
        "lycoris": (
            ls.LoKrConfig(alpha=6, r=1, targets=LLAMA, init="lycoris"),
            peft.LoKrConfig(alpha=6, r=1, target_modules=LLAMA, init_weights="lycoris"),
        ),
        "rank dropout": pair(6, r=1, rank_dropout=0.3, module_dropout=0.1),
        "plain": lycoris,
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


@pytest.mark.parametrize(
    "rates",
    [
        {"rank_dropout": 0.4},
        {"rank_dropout": 0.4, "rank_dropout_scale": True},
        {"module_dropout": 0.4},
    ],
    ids=str,
)
def test_dropout_of_peft(rates: dict[str, Any]) -> None:
    config = ls.LoKrConfig(r=1, alpha=6.0, targets=LLAMA, **rates)
    same_dropout_as_peft(config, peft.LoKrConfig(r=1, alpha=6, target_modules=LLAMA, **rates), KEYS)


def test_nothing_wide_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside x, nothing is kept for the backward pass."""
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(64, 48))
    ls.attach(model, ls.LoKrConfig(r=2))
    x = torch.randn(5, 64, requires_grad=True)
    assert {t.data_ptr() for t in saved_by(model, x)} == {x.data_ptr()}


def test_parameters_on_qwen() -> None:
    # 1024 = 32 · 32, 2048 = 32 · 64, 3072 = 48 · 64: C is whole, D = D_a D_b of rank 8.
    parts = {1024: (32, 32), 2048: (32, 64), 3072: (48, 64)}
    expected = 0
    for d_in, d_out in QWEN.values():
        (m, n), (i, k) = parts[d_in], parts[d_out]
        expected += i * m + 8 * (k + n)
    assert on_qwen(ls.LoKrConfig(r=8)) == expected
    assert expected * 28 == 28 * (1024 * 4 + 1536 * 3 + 8 * (96 * 5 + 64 * 2)) == 379_904


@pytest.mark.parametrize("init", ["kaiming", "lycoris"])
def test_start(init: str) -> None:
    model = nn.Sequential(nn.Linear(30, 20))
    part = ls.attach(model, ls.LoKrConfig(r=2, init=init)).layers()["0"]
    zero = {n for n, p in part.named_parameters() if not p.any()}
    assert zero == ({"C"} if init == "kaiming" else {"D_b"})


@pytest.mark.parametrize(
    "wrong", [{"decompose_factor": 0}, {"decompose_factor": 1.5}, {"init": "zero"}, {"r": -1}]
)
def test_refused_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ls.LorasmithError):
        ls.LoKrConfig(**wrong)


def _saved(folder: Path, **options: Any) -> None:
    model = llama()
    randomise(ls.attach(model, ls.LoKrConfig(targets="q_proj", **options)).parameters())
    ls.save(model, folder)


def test_files_whose_tensors_do_not_fit(tmp_path: Path) -> None:
    """Which tensors a layer has follows from its sizes: others are errors that name them."""
    from safetensors.torch import load_file, save_file

    _saved(tmp_path, r=1)
    (tmp_path / "lorasmith.json").unlink()
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(k for k in whole if k.endswith("lokr_w2_a"))
    stem = key.removesuffix("_a")
    for changes, message in (
        ({key: None}, "impossible"),
        ({stem: torch.ones(4, 4)}, "impossible"),
        ({key: None, f"{stem}_b": None, stem: torch.ones(4, 4)}, "tensor"),
        ({key: torch.ones(5, 1)}, "shape|tensor"),
    ):
        values = {k: v for k, v in {**whole, **changes}.items() if v is not None}
        save_file(values, file)
        with pytest.raises(ls.LorasmithError, match=message):
            ls.load(llama(), tmp_path)


def test_made_of_tensors() -> None:
    model = llama()
    adapter = ls.attach(model, ls.LoKrConfig(r=1, targets=["q_proj", "v_proj"]))
    randomise(adapter.parameters())
    values = {m: dict(part.named_parameters()) for m, part in adapter.layers().items()}
    made = ls.AdapterWeights.from_tensors(adapter.config, values)
    assert made.num_parameters == adapter.num_parameters()
    layer = made.layers["model.layers.0.self_attn.v_proj"]
    assert (layer.d_in, layer.d_out) == (16, 8)
    assert not made.factors


def test_convolutions_are_refused(tmp_path: Path) -> None:
    other = theirs(llama(), peft.LoKrConfig(r=1, target_modules=LLAMA, use_effective_conv2d=True))
    other.save_pretrained(tmp_path)
    with pytest.raises(ls.LorasmithError, match="use_effective_conv2d"):
        ls.load(llama(), tmp_path)
