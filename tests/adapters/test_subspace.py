"""The core between fixed directions against its formula, dense and in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.adapters.subspace import core_of, new_directions, start
from lorasmith.core import lowrank
from lorasmith.errors import AdapterFileError, ConfigError
from tests.io.support import edit_tensors, foreign
from tests.models import FAMILIES, llama, randomise, run

F64 = torch.float64
CASES: dict[str, Any] = {
    "full": ls.SubspaceConfig(r=3, r_out=4),
    "full, extra": ls.SubspaceConfig(r=3, r_out=2, extra=2),
    "diagonal": ls.SubspaceConfig(form="diagonal", r=4),
    "diagonal, extra": ls.SubspaceConfig(form="diagonal", r=3, extra=2),
    "loadings": ls.SubspaceConfig(form="loadings", r=3, r_out=2, width=2),
    "loadings, extra": ls.SubspaceConfig(form="loadings", r=1, r_out=2, width=2, extra=2),
}
each_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def dense(config: ls.SubspaceConfig, t: dict[str, Tensor]) -> Tensor:
    """ΔW by the formula: a sum over pairs of directions, written out."""
    U, V, w = t["U"], t["V"], config.width
    if config.extra:
        U, V = torch.cat((U, t["B"]), dim=1), torch.cat((V, t["A"]))
    if config.form == "full":
        pairs = [(i, j, t["core"][i, j]) for i in range(U.shape[1]) for j in range(V.shape[0])]
    elif config.form == "diagonal":
        pairs = [(i, i, t["core"][i]) for i in range(V.shape[0])]
    else:
        m, right = t["left"], t["right"]
        pairs = [
            (k * w + a, n * w + a, m[k] * right[n])
            for k in range(len(m))
            for n in range(len(right))
            for a in range(w)
        ]
    total = U.new_zeros(U.shape[0], V.shape[1])
    for i, j, factor in pairs:
        total = total + factor * torch.outer(U[:, i], V[j])
    return total


def tensors(part: Any) -> dict[str, Tensor]:
    return {n: t.detach().to(F64).clone() for n, t in part.tensors()}


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
@each_case
def test_values_and_gradients_in_float64(
    config: ls.SubspaceConfig, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9)).to(F64)
    W, c = model[0].weight.detach(), model[0].bias.detach()  # type: ignore[union-attr, operator]
    adapter = ls.attach(model, config)
    randomise(adapter.parameters())
    part = adapter.layers()["0"]
    x = torch.randn(5, 8, dtype=F64, requires_grad=True)
    g = torch.randn(5, 9, dtype=F64)
    y = model(x)
    (y * g).sum().backward()
    own = tensors(part)
    trained = {n for n, _ in part.named_parameters()}
    assert trained == own.keys() - {"U", "V"}
    for name in trained:
        own[name].requires_grad_()
    z = x.detach().requires_grad_()
    wanted = z @ (W + dense(config, own)).T + c
    (wanted * g).sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, z.grad, atol=1e-5, rtol=1e-5)
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad.to(F64), own[name].grad, atol=1e-5, rtol=1e-5)
    # The other ways to say the same: factors, the whole core, the weight of a fused layer.
    with torch.no_grad():
        delta = dense(config, own)
        factors = part.variant.factors(part)
        assert factors is not None
        assert factors.rank == config.file_rank("0")
        torch.testing.assert_close(factors.delta(F64), delta, atol=1e-6, rtol=1e-5)
        U, V = own["U"], own["V"]
        if config.extra:
            U, V = torch.cat((U, own["B"]), dim=1), torch.cat((V, own["A"]))
        torch.testing.assert_close(U @ core_of(config, own) @ V, delta, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(
            part.variant.effective_weight(part, W), W + delta, atol=1e-12, rtol=1e-12
        )


@each_case
def test_the_start_is_the_base_model_and_no_dead_end(config: ls.SubspaceConfig) -> None:
    model, batch = llama(), FAMILIES["llama"].batch()
    expected = run(model, batch)
    adapter = ls.attach(model, config)
    assert torch.equal(run(model, batch), expected)
    for part in adapter.layers().values():
        assert not dense(config, tensors(part)).any()
    run(model, batch).pow(2).sum().backward()
    first = "left" if config.form == "loadings" else "core"
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.endswith(f".{first}"), name


def test_the_gradient_of_a_full_core_at_zero() -> None:
    """∂M = Uᵀ G Vᵀ with G = ∂L/∂ΔW, on the first step already."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6, bias=False)).to(F64)
    adapter = ls.attach(model, ls.SubspaceConfig(r=3, r_out=4))
    part = adapter.layers()["0"]
    x, g = torch.randn(5, 7, dtype=F64), torch.randn(5, 6, dtype=F64)
    (model(x) * g).sum().backward()
    G = g.T @ x
    wanted = part["U"].to(F64).T @ G @ part["V"].to(F64).T
    assert part["core"].grad is not None
    torch.testing.assert_close(part["core"].grad.to(F64), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["full", "diagonal", "loadings"])
def test_base_and_basis_stay_while_it_trains(form: str) -> None:
    model, batch = llama(), FAMILIES["llama"].batch()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = ls.attach(model, ls.SubspaceConfig(form=form, r=3, extra=1))
    basis = {n: t.clone() for n, t in adapter.state_dict().items() if n.endswith((".U", ".V"))}
    assert basis
    start_of = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    # Whatever requires a gradient on the model, not what the adapter says is its own.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        run(model, batch).pow(2).mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, start_of[n]) for n, p in adapter.named_parameters())
    after = adapter.state_dict()
    assert all(torch.equal(after[n], t) for n, t in basis.items())
    ls.detach(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_new_directions_are_orthonormal_and_new() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 12) @ torch.diag(torch.logspace(0, -3, 12))
    deficient = torch.cat((rows, rows[:2] * 3, torch.zeros(1, 12)))
    for basis in (rows, deficient, torch.zeros(3, 12), torch.empty(0, 12)):
        made = new_directions(basis, 5).to(F64)
        torch.testing.assert_close(made @ made.T, torch.eye(5, dtype=F64), atol=1e-6, rtol=0)
        assert not len(basis) or (made @ basis.to(F64).T).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="new directions") as caught:
        new_directions(rows, 9)
    assert caught.value.key == "extra"
    # Components are orthogonal as they are themselves: flattened.
    new = start("loadings", torch.randn(9, 4), torch.randn(4, 7), width=2, extra=2)
    A, V = new.trainable["A"].reshape(2, 14), new.frozen["V"].reshape(2, 14)
    assert (A @ V.T).abs().max() < 1e-6
    torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-6, rtol=0)


def test_x_is_not_saved_without_new_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    for form in ("full", "diagonal"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
        ls.attach(model, ls.SubspaceConfig(form=form, r=3))
        kept: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(tuple(t.shape)), t)[1],  # type: ignore[misc]
            lambda t: t,
        ):
            model(torch.randn(11, 6))
        assert {s for s in kept if 11 in s} == {(11, 3)}


def test_parameters_are_counted_by_the_form() -> None:
    model = llama()
    for config, layer in (
        (ls.SubspaceConfig(r=3, r_out=4, targets="q_proj"), 12),
        (ls.SubspaceConfig(r=3, extra=1, targets="q_proj"), 16 + 32),
        (ls.SubspaceConfig(form="diagonal", r=5, targets="q_proj"), 5),
        (ls.SubspaceConfig(form="loadings", r=4, width=3, targets="q_proj"), 8),
        (ls.SubspaceConfig(r=2, rank_pattern={"layers.1.*": 4}, targets="q_proj"), (4 + 16) / 2),
    ):
        adapter = ls.attach(model, config)
        assert adapter.num_parameters() == 2 * layer
        ls.detach(model)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"form": "dense"}, "form"),
        ({"init": "svd"}, "init"),
        ({"r": 0}, "r"),
        ({"r_out": 0}, "r_out"),
        ({"extra": -1}, "extra"),
        ({"extra": True}, "extra"),
        ({"width": 2}, "width"),
        ({"form": "diagonal", "r": 3, "r_out": 4}, "r_out"),
        ({"form": "diagonal", "out_pattern": {"q": 3}}, "r_out"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']"),
    ],
)
def test_impossible_configurations(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ls.SubspaceConfig(**arguments)
    assert caught.value.key == key


def test_a_fleet_is_not_invented() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="SubspaceTrainer"):
        ls.attach(model, ls.SubspaceConfig(init="fleet"))
    with pytest.raises(ConfigError, match="orthonormal"):
        ls.attach(model, ls.SubspaceConfig(r=17))
    assert not ls.attached(model)


@each_case
def test_peft_loads_it_with_the_same_logits(config: ls.SubspaceConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, batch = llama(), FAMILIES["llama"].batch()
    adapter = ls.attach(model, config)
    randomise(adapter.parameters())
    wanted = run(model, batch)
    folder = ls.save(model, tmp_path / "a")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
    # Not a word about tensors or fields that it does not know.
    assert not [w for w in seen if issubclass(w.category, UserWarning)]
    torch.testing.assert_close(run(theirs, batch), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - run(llama(), batch)).abs().max() > 1e-2
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"]) == ("LORA", fields["lora_alpha"])


def test_factors_and_core_in_a_file_must_agree(tmp_path: Path) -> None:
    model = llama()
    adapter = ls.attach(model, ls.SubspaceConfig(r=3, targets="q_proj"))
    randomise(adapter.parameters())
    folder = foreign(ls.save(model, tmp_path / "a"))
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    def scale(factor: float) -> Any:
        return lambda values: values.update({key: values[key] * factor})

    edit_tensors(folder / "adapter_model.safetensors", scale(1.001))
    ls.load(llama(), folder)
    edit_tensors(folder / "adapter_model.safetensors", scale(0.5))
    fresh = llama()
    with pytest.raises(AdapterFileError, match="has been changed") as caught:
        ls.load(fresh, folder)
    assert caught.value.key is not None
    assert key.endswith(caught.value.key)
    assert not ls.attached(fresh)
