"""The same tensors in HF PEFT's layers give the same logits and the same gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.core.factors import factors_of
from tests.models import FAMILIES, randomise, run

peft = pytest.importorskip("peft")

_LLAMA = ["q_proj", "v_proj", "down_proj"]
_GPT2 = ["c_attn", "c_fc", "c_proj"]


def _cases() -> dict[str, tuple[str, Any, Any]]:
    def lora(targets: list[str], **more: Any) -> Any:
        return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **more)

    def ours(targets: list[str], **more: Any) -> Any:
        return ls.LoRAConfig(r=4, alpha=6, targets=targets, **more)

    dora = ls.DoRAConfig(r=4, alpha=6, targets=_LLAMA)
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}}
    patterns["alpha_pattern"] = {"v_proj": 11, "^model.layers.0.*down_proj": 5}
    return {
        "lora": ("llama", ours(_LLAMA), lora(_LLAMA)),
        "rslora": ("llama", ours(_LLAMA, scaling="rslora"), lora(_LLAMA, use_rslora=True)),
        "patterns": ("llama", ours(_LLAMA, **patterns), lora(_LLAMA, **patterns)),
        "dora": ("llama", dora, lora(_LLAMA, use_dora=True)),
        "gpt2": ("gpt2", ours(_GPT2), lora(_GPT2, fan_in_fan_out=True)),
        "gpt2 dora": (
            "gpt2",
            ls.DoRAConfig(r=4, alpha=6, targets=_GPT2),
            lora(_GPT2, fan_in_fan_out=True, use_dora=True),
        ),
        "ia3": (
            "llama",
            ls.IA3Config(targets=_LLAMA, feedforward="down_proj"),
            peft.IA3Config(target_modules=_LLAMA, feedforward_modules=["down_proj"]),
        ),
        "gpt2 ia3": (
            "gpt2",
            ls.IA3Config(targets=["c_attn", "mlp.c_proj"], feedforward="mlp.c_proj"),
            peft.IA3Config(
                target_modules=["c_attn", "mlp.c_proj"],
                feedforward_modules=["mlp.c_proj"],
                fan_in_fan_out=True,
            ),
        ),
        "distilbert": ("distilbert", ours(["q_lin", "lin1"]), lora(["q_lin", "lin1"])),
    }


CASES = _cases()


def _theirs(base: nn.Module, config: Any) -> Any:
    with warnings.catch_warnings():  # PEFT uses what Transformers has renamed
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()


_PARTS = {
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "lora_magnitude_vector.default.weight": "magnitude",
    "ia3_l.default": "gain",
}


def _pairs(theirs: nn.Module, adapter: ls.Adapter) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Name → (PEFT's parameter, ours)."""
    mine = dict(adapter.named_parameters())
    found = {}
    for name, parameter in theirs.named_parameters():
        for ending, part in _PARTS.items():
            if name.endswith(ending):
                module = name.removeprefix("base_model.model.").removesuffix(f".{ending}")
                found[f"{module}.{part}"] = (parameter, mine.pop(f"{module}.{part}"))
    assert not mine
    return found


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    family, config, peft_config = CASES[case]
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    theirs = _theirs(base, peft_config)
    adapter = ls.attach(base, config)
    pairs = _pairs(theirs, adapter)
    randomise(p for p, _ in pairs.values())
    with torch.no_grad():
        for their, mine in pairs.values():
            mine.copy_(their.reshape(mine.shape))
    for _ in range(2):
        wanted, got = run(theirs, batch), run(base, batch)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        weights = torch.randn(wanted.shape)
        (wanted * weights).sum().backward()
        (got * weights).sum().backward()
        for name, (their, mine) in pairs.items():
            assert their.grad is not None
            assert mine.grad is not None
            scale = float(their.grad.abs().max()) + 1e-6
            difference = float((mine.grad - their.grad.reshape(mine.shape)).abs().max())
            assert difference < 1e-4 * scale, name
            their.grad = mine.grad = None
    merged = theirs.merge_and_unload()
    ls.fuse(base)
    torch.testing.assert_close(run(base, batch), run(merged, batch), atol=1e-5, rtol=1e-5)


def test_factors_of_a_peft_model() -> None:
    base = FAMILIES["llama"].build()
    theirs = _theirs(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    found = factors_of(theirs)
    assert len(found) == 2
    for name, factors in found.items():
        layer: Any = theirs.get_submodule(name)
        assert factors.A is layer.lora_A["default"].weight
        torch.testing.assert_close(factors.delta(), layer.get_delta_weight("default"))
        assert factors.base is not None
        assert torch.equal(factors.base.weight, layer.base_layer.weight)


def _merged(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith("q_proj.weight")}


def test_pissa_start_and_one_step_of_sgd() -> None:
    base = FAMILIES["llama"].build()
    batch = FAMILIES["llama"].batch()
    theirs = _theirs(
        base,
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa"),
    )
    adapter = ls.attach(base, ls.LoRAConfig(r=4, alpha=6, targets="q_proj", init="pissa"))
    for name, part in adapter.layers().items():
        layer: Any = theirs.get_submodule(f"base_model.model.{name}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(part["B"] @ part["A"], b @ a, atol=1e-5, rtol=1e-4)
        # Singular vectors are unique up to sign.
        torch.testing.assert_close(part["A"].abs(), a.abs(), atol=1e-4, rtol=1e-3)
    weights = torch.randn(run(base, batch).shape)
    for model in (theirs, base):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        (run(model, batch) * weights).sum().backward()
        optimizer.step()
    ls.fuse(base)
    merged = _merged(theirs.merge_and_unload())
    for name, value in _merged(base).items():
        torch.testing.assert_close(value, merged[name], atol=2e-5, rtol=1e-4)
