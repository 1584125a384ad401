"""LoRA-XS against its equation in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.core.layers import describe, read_weight
from lorasmith.errors import ConfigError
from tests.models import FAMILIES, llama, randomise, run


def _weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    info = describe(layer, name)
    assert info is not None
    return read_weight(layer, info).double()


def dense(base: nn.Module, adapter: ls.Adapter, s: float, r: int) -> nn.Module:
    """The same model with W + s U_r R S_r V_rᵀ in float64."""
    model = copy.deepcopy(base).double()
    ls.detach(model)
    for name, part in adapter.layers().items():
        W = _weight(base, name)
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        # Singular vectors are unique up to sign: those that the adapter took.
        sign = torch.sign((U[:, :r] * part["B"].double()).sum(dim=0))
        A = torch.diag(S[:r] * sign) @ Vt[:r]
        delta = s * (U[:, :r] * sign) @ part["R"].detach().double() @ A
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            layer.weight += delta.T if type(layer).__name__ == "Conv1D" else delta
    return model


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mlp"])
def test_the_equation_in_float64(family: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    adapter = ls.attach(model, ls.LoRAXSConfig(r=3, alpha=6))
    randomise(adapter.parameters())
    wide = {
        k: v.double() if v.is_floating_point() else v for k, v in FAMILIES[family].batch().items()
    }
    wanted = run(dense(model, adapter, 2.0, 3), wide).float()
    torch.testing.assert_close(run(model, batch), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(model, batch), wanted, atol=1e-5, rtol=1e-5)


def test_it_starts_with_the_best_approximation_of_w() -> None:
    model = llama()
    adapter = ls.attach(model, ls.LoRAXSConfig(r=8))
    for name, part in adapter.layers().items():
        W = _weight(model, name)
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        best = U[:, :8] @ torch.diag(S[:8]) @ Vt[:8]
        A, B = part["A"].double(), part["B"].double()
        torch.testing.assert_close(B @ A, best, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(B.T @ B, torch.eye(8).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.diag(S[:8] ** 2), atol=1e-5, rtol=1e-4)
        assert not part["R"].any()


def test_the_randomised_start_is_nearly_as_good() -> None:
    torch.manual_seed(0)
    model = llama()
    adapter = ls.attach(model, ls.LoRAXSConfig(r=4, init="svd_niter_8"))
    for name, part in adapter.layers().items():
        W = _weight(model, name)
        left = torch.linalg.svdvals(W)[4:].norm()
        A, B = part["A"].double(), part["B"].double()
        assert (W - B @ A).norm() < 1.02 * left
        torch.testing.assert_close(B.T @ B, torch.eye(4).double(), atol=1e-5, rtol=0)


def test_the_start_is_the_base_model_and_no_dead_end() -> None:
    model, batch = llama(), FAMILIES["llama"].batch()
    expected = run(model, batch)
    adapter = ls.attach(model, ls.LoRAXSConfig(r=4))
    assert torch.equal(run(model, batch), expected)
    run(model, batch).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
def test_gradients_in_float64(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).double()
    W, c = model[0].weight.detach(), model[0].bias.detach()  # type: ignore[union-attr, operator]
    adapter = ls.attach(model, ls.LoRAXSConfig(r=3, alpha=6, scaling="rslora"))
    randomise(adapter.parameters())
    part = adapter.layers()["0"]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 8, dtype=torch.float64)
    (model(x) * g).sum().backward()
    R = part["R"].detach().double().requires_grad_()
    z = x.detach().requires_grad_()
    y = z @ (W + 6 / 3**0.5 * part["B"].double() @ R @ part["A"].double()).T + c
    (y * g).sum().backward()
    assert part["R"].grad is not None
    assert R.grad is not None
    torch.testing.assert_close(part["R"].grad.double(), R.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, z.grad, atol=1e-6, rtol=1e-5)


def test_x_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    ls.attach(model, ls.LoRAXSConfig(r=3))
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(11, 6))
    assert {s for s in kept if 11 in s} == {(11, 3)}


def test_ranks_and_names() -> None:
    model = llama()
    ls.attach(model, ls.LoRAXSConfig(r=4, rank_pattern={"k_proj": 8, "layers.0.*q_proj": 2}))
    parts = ls.attached(model)["default"].layers()
    assert tuple(parts["model.layers.0.self_attn.k_proj"]["R"].shape) == (8, 8)
    assert tuple(parts["model.layers.0.self_attn.q_proj"]["R"].shape) == (2, 2)
    ls.detach(model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match="singular vectors") as caught:
        ls.attach(model, ls.LoRAXSConfig(r=9))  # k_proj is 16 → 8
    assert caught.value.key == "r"
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    for init in ("pissa", "kaiming", "svd_niter_", "svd_niter_1000"):
        with pytest.raises(ConfigError, match="initialisation"):
            ls.LoRAXSConfig(init=init)


def test_w_is_not_needed_to_load(tmp_path: Path) -> None:
    model, batch = llama(), FAMILIES["llama"].batch()
    adapter = ls.attach(model, ls.LoRAXSConfig(r=4, targets="q_proj"))
    randomise(adapter.parameters())
    ls.save(model, tmp_path / "a")
    changed = llama(seed=1)
    bare = run(changed, batch)
    loaded = ls.load(changed, tmp_path / "a", allow_base_mismatch=True)
    assert not torch.equal(run(changed, batch), bare)
    mine, theirs = adapter.state_dict(), loaded.state_dict()
    assert all(torch.equal(theirs[k], mine[k]) for k in mine)
    weights = ls.read_adapter(tmp_path / "a")
    for name, factors in weights.factors.items():
        state = weights.state(name)
        delta = 4.0 * state["B"].double() @ state["R"].double() @ state["A"].double()
        torch.testing.assert_close(factors.delta(torch.float64), delta, atol=1e-6, rtol=1e-5)


def test_parameters_of_qwen3() -> None:
    """r² for each of the 28 · 7 linear layers of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
            )
        )
    adapter = ls.attach(model, ls.LoRAXSConfig(r=32))
    assert adapter.num_parameters() == 28 * 7 * 32**2 == 200_704
