"""Fusing: its report against an independent computation, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lorasmith as ls
from lorasmith.errors import AttachError, ConfigError, FuseError
from tests.models import FAMILIES, llama, mlp, randomise, run


def acting(model: nn.Module, config: Any = None) -> ls.Adapter:
    adapter = ls.attach(model, config or ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    return adapter


def test_autocast_has_no_say_in_what_is_fused() -> None:
    weights = []
    for enabled in (False, True):
        model = mlp().to(torch.bfloat16)
        acting(model, ls.LoRAConfig(r=4, alpha=64))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ls.fuse(model)
        weights.append([p.detach().clone() for p in model.parameters() if p.dim() == 2])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_report(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    adapter = acting(model)
    before = {n: model.get_submodule(n).weight.detach().double() for n in adapter.targets}  # type: ignore[union-attr, operator]
    deltas = {
        n: p.constants["scaling"] * p["B"].detach().double() @ p["A"].detach().double()
        for n, p in adapter.layers().items()
    }
    report = ls.fuse(model)
    assert report.dtype == str(dtype).removeprefix("torch.")
    worst = 0.0
    for layer in report.layers:
        stored = model.get_submodule(layer.name).weight.detach().double()  # type: ignore[union-attr, operator]
        delta = deltas[layer.name]
        error = float((stored - before[layer.name] - delta).norm() / delta.norm())
        worst = max(worst, error)
        assert layer.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert layer.weight_norm == pytest.approx(float(before[layer.name].norm()), rel=1e-6)
        assert layer.rounding_error == pytest.approx(error, rel=1e-2, abs=1e-9)
        # Rounded once: never off by more than half a unit in the last place.
        wanted = (before[layer.name] + delta).to(dtype).double()
        assert (stored - wanted).abs().max() <= torch.finfo(dtype).eps * stored.abs().max()
    assert report.max_rounding_error == pytest.approx(worst, rel=1e-2, abs=1e-9)
    assert report.to_dict()["max_rounding_error"] == report.max_rounding_error
    assert "fused 'default' into 2 layers" in str(report)


def test_an_adapter_that_changes_nothing() -> None:
    model = mlp()
    ls.attach(model, ls.LoRAConfig())
    assert all(x.delta_norm == x.rounding_error == 0 for x in ls.fuse(model).layers)


def test_twice_is_refused_and_so_is_the_rest() -> None:
    model = mlp()
    acting(model)
    with pytest.raises(FuseError, match="No adapter is fused"):
        ls.unfuse(model)
    ls.fuse(model)
    x = torch.randn(2, 6)
    expected = model(x)
    with pytest.raises(FuseError, match="twice"):
        ls.fuse(model)
    with pytest.raises(AttachError, match="fused"):
        ls.attach(model, ls.LoRAConfig(), name="other")
    with pytest.raises(AttachError, match="fused"):
        ls.use(model, None)
    with ls.use(model, "default"):
        pass
    assert torch.equal(model(x), expected)
    ls.unfuse(model)
    with pytest.raises(FuseError):
        ls.unfuse(model)


def test_tied_weights_are_refused_and_the_model_is_unchanged() -> None:
    model = llama()
    acting(model, ls.LoRAConfig(r=2, targets=["q_proj", "lm_head"]))
    expected = run(model, FAMILIES["llama"].batch())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(FuseError, match="shared"):
        ls.fuse(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(run(model, FAMILIES["llama"].batch()), expected)


@pytest.mark.parametrize("old", [True, False], ids=["weight_norm", "parametrizations.weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_is_refused(old: bool) -> None:
    """What is written there is lost, so the adapter would be gone without a word."""
    model = mlp()
    (nn.utils.weight_norm if old else parametrizations.weight_norm)(model[0])  # type: ignore[index, operator]
    acting(model)
    x = torch.randn(2, 6)
    expected = model(x)
    with pytest.raises(FuseError, match="computed from other parameters"):
        ls.fuse(model)
    assert torch.equal(model(x), expected)


def test_a_layer_that_cannot_be_read_is_refused_half_way() -> None:
    class Quantised(nn.Module):
        in_features, out_features = 8, 5

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (5, 8), dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.codes.to(x.dtype).T / 8

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Quantised())
    acting(model)
    x = torch.randn(2, 6)
    expected = model(x)
    before = model[0].weight.detach().clone()
    with pytest.raises(AttachError, match="cannot be read"):
        ls.fuse(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model(x), expected)
    with pytest.raises(ConfigError, match="must read the weight whenever it runs"):
        ls.attach(model, ls.DoRAConfig(), name="dora")


def test_not_finite() -> None:
    model = mlp()
    adapter = acting(model)
    with torch.no_grad():
        adapter.layers()["2"]["B"][0, 0] = float("nan")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lorasmith" not in n}
    with pytest.raises(FuseError, match="not finite"):
        ls.fuse(model)
    assert all(torch.equal(model.get_parameter(n), v) for n, v in before.items())


def test_without_the_original() -> None:
    model = mlp()
    acting(model)
    x = torch.randn(2, 6)
    expected = model(x)
    ls.fuse(model, keep_original=False)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    for undo in (ls.unfuse, ls.detach):
        with pytest.raises(FuseError, match="keep_original"):
            undo(model)


def test_merge_and_unmerge_of_16_bit_weights_is_exact() -> None:
    """Undoing by subtraction left W + ΔW (logits error 0.78 in EgoRA)."""
    model = llama().to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    acting(model)
    for _ in range(3):
        ls.fuse(model)
        ls.unfuse(model)
    ls.fuse(model)
    ls.detach(model)
    assert list(dict(model.named_parameters())) == list(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_adapter_fused_inside_a_block_acts_once() -> None:
    model = mlp()
    acting(model)
    x = torch.randn(2, 6)
    expected = model(x)
    with ls.use(model, None):
        ls.fuse(model, "default")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_detach_can_leave_the_adapter_in_the_weights() -> None:
    model = mlp()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    x = torch.randn(3, next(iter(adapter.layers().values())).info.d_in)
    wanted = model(x)
    ls.fuse(model, keep_original=False)
    with pytest.raises(ls.LorasmithError, match="keep_fused=True"):
        ls.detach(model)
    ls.detach(model, keep_fused=True)
    assert not ls.attached(model)
    torch.testing.assert_close(model(x), wanted)
    assert "lorasmith" not in str(model)


def test_detach_with_keep_fused_writes_the_trained_modules() -> None:
    model = mlp()
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    adapter = ls.attach(model, ls.LoRAConfig(r=2, modules_to_save=[name]))
    randomise(adapter.parameters())
    x = torch.randn(3, next(iter(adapter.layers().values())).info.d_in)
    wanted = model(x)
    ls.fuse(model)
    ls.detach(model, keep_fused=True)
    torch.testing.assert_close(model(x), wanted)


def test_keep_fused_needs_something_fused() -> None:
    model = mlp()
    ls.attach(model, ls.LoRAConfig(r=2))
    with pytest.raises(FuseError, match="nothing to keep"):
        ls.detach(model, keep_fused=True)
    assert list(ls.attached(model)) == ["default"]


def test_keep_fused_refuses_to_write_a_tied_head() -> None:
    model = llama()
    model.lm_head.weight = model.get_input_embeddings().weight
    before = model.lm_head.weight.clone()
    adapter = ls.attach(model, ls.LoRAConfig(r=2, targets="q_proj", modules_to_save=["lm_head"]))
    randomise(adapter.parameters())
    ls.fuse(model)
    with pytest.raises(FuseError, match="shared"):
        ls.detach(model, keep_fused=True)
    assert torch.equal(model.lm_head.weight, before)
    ls.detach(model)
