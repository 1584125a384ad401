"""What every variant must hold beside others: in mixes, and on its own rows of a batch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from tests.contract.configurations import CONFIGURATIONS
from tests.contract.test_contract import attach
from tests.models import FAMILIES, Family, mlp, randomise, run


def _configurations() -> Iterator[Any]:
    for name in ls.variants():
        for config_id, config in CONFIGURATIONS[name].items():
            if not config_id.endswith(("gaussian", "niter_4")):
                yield pytest.param(config, id=f"{name}-{config_id}")


each_config = pytest.mark.parametrize("config", list(_configurations()))
two_families = pytest.mark.parametrize(
    "family", [FAMILIES["llama"], FAMILIES["gpt2"]], ids=lambda f: f.name
)
ROWS = ["b", None, "a", "c", "a"]


@pytest.fixture(params=[0, 10**9], ids=["functions", "plain"])
def _both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


def three(model: nn.Module, config: Any) -> nn.Module:
    """The model with adapters a and b of the variant and a LoRA of another rank beside them."""
    for i, name in enumerate("abc"):
        made = config if name != "c" else ls.LoRAConfig(r=2, alpha=3.0)
        randomise(_attach(model, made, name).parameters(), seed=i)
    return model


def _attach(model: nn.Module, config: Any, name: str) -> ls.Adapter:
    return attach(model, config, name=name)


def data(rows: int = len(ROWS), seed: int = 3) -> Tensor:
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(seed))


def alone(model: nn.Module, x: Tensor, rows: list[str | None]) -> Tensor:
    """Each row by its own adapter, one pass for each."""
    outputs = []
    for name, row in zip(rows, x, strict=True):
        with ls.use(model, name):
            outputs.append(model(row[None]))
    return torch.cat(outputs)


@each_config
@pytest.mark.parametrize("weights", [{"a": 0.7, "b": -1.5}, {"a": 0.5, "c": 2.0, "b": 0.25}])
@pytest.mark.usefixtures("_both_paths")
def test_a_mix_is_the_sum_of_what_each_does(config: Any, weights: dict[str, float]) -> None:
    model = three(mlp(), config)
    expected_weights = []
    for index in ("0", "2"):
        layer: nn.Linear = model.get_submodule(index)  # type: ignore[assignment]
        W, b = layer.weight.detach().double(), layer.bias.detach().double()
        total, bias = W.clone(), b.clone()
        for name, weight in weights.items():
            part = ls.attached(model)[name].layers().get(index)
            if part is not None:
                total += weight * (part.variant.effective_weight(part, W) - W)
                bias += weight * (part.variant.effective_bias(part, b) - b)
        expected_weights.append((total, bias))
    x = data()
    (w0, b0), (w2, b2) = expected_weights
    expected = torch.tanh(x.double() @ w0.T + b0) @ w2.T + b2
    ls.use(model, weights)
    for context in (torch.enable_grad, torch.no_grad, torch.no_grad):
        with context():
            torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = ls.fuse(model, weights)
    assert "a" in report.adapter
    torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)
    ls.unfuse(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)


@each_config
def test_gradients_of_a_mix(config: Any) -> None:
    """Those of y_0 + Σ w (y_i − y_0), written out for one layer."""
    model = nn.Sequential(nn.Linear(6, 8))
    three(model, config)
    weights = {"a": 0.7, "b": -1.5, "c": 0.5}
    x = data().requires_grad_()
    with ls.use(model, None):
        total = base = model(x)
    for name, weight in weights.items():
        with ls.use(model, name):
            total = total + weight * (model(x) - base)
    total.pow(2).sum().backward()
    wanted = gradients(model, x)
    ls.use(model, weights)
    y = model(x)
    torch.testing.assert_close(y, total, atol=1e-5, rtol=1e-5)
    y.pow(2).sum().backward()
    torch.testing.assert_close(gradients(model, x), wanted, atol=1e-4, rtol=1e-4)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    found["x"] = x.grad
    model.zero_grad()
    x.grad = None
    return found


@each_config
@pytest.mark.usefixtures("_both_paths")
def test_rows_equal_each_adapter_alone(config: Any) -> None:
    model, x = three(mlp(), config), data()
    expected = alone(model, x, list(ROWS)).detach()
    assert (expected - model(x).detach()).abs().max() > 1e-2, "the test is void"
    ls.use(model, ROWS)
    for context in (torch.enable_grad, torch.no_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    # Each row repeated, as beam search does; one token a row; flattened; no tokens.
    repeated = x.repeat_interleave(3, dim=0)
    with torch.no_grad():
        torch.testing.assert_close(
            model(repeated), expected.repeat_interleave(3, dim=0), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(model(x[:, :1]), expected[:, :1], atol=1e-5, rtol=1e-5)
        flat = model(x.flatten(0, 1))
        torch.testing.assert_close(flat, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
        assert model(x[:, :0]).shape == (len(ROWS), 0, 5)
        assert model(x[:0]).shape == (0, 3, 5)


@two_families
@each_config
def test_rows_on_real_architectures(family: Family, config: Any) -> None:
    model = three(family.build(), config)
    tokens = torch.randint(0, 32, (5, 7), generator=torch.Generator().manual_seed(0))
    expected = []
    for name, row in zip(ROWS, tokens, strict=True):
        with ls.use(model, name), torch.no_grad():
            expected.append(run(model, {"input_ids": row[None]}))
    ls.use(model, list(ROWS))
    batch = {"input_ids": tokens}
    torch.testing.assert_close(run(model, batch), torch.cat(expected), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(run(model, batch), torch.cat(expected), atol=1e-4, rtol=1e-4)


@each_config
@pytest.mark.usefixtures("_both_paths")
def test_gradients_of_rows_equal_those_of_separate_passes(config: Any) -> None:
    model, x = three(mlp(), config).train(), data().requires_grad_()
    alone(model, x, list(ROWS)).pow(2).sum().backward()
    wanted = gradients(model, x)
    ls.use(model, ROWS)
    for _ in range(2):
        model(x).pow(2).sum().backward()
        torch.testing.assert_close(gradients(model, x), wanted, atol=1e-4, rtol=1e-4)
    # Frozen adapters let the gradient of x through, resident or not.
    for adapter in ls.attached(model).values():
        adapter.requires_grad_(False)
    for _ in range(2):
        model(x).pow(2).sum().backward()
        torch.testing.assert_close(gradients(model, x)["x"], wanted["x"], atol=1e-4, rtol=1e-4)


@each_config
def test_dropout_acts_on_rows_in_training(config: Any) -> None:
    if "dropout" not in {f.name for f in dataclasses.fields(config)}:
        pytest.skip("no dropout")
    model = three(mlp(), dataclasses.replace(config, dropout=0.5)).eval()
    x, rows = data(2).requires_grad_(), ["a", "b"]
    expected = alone(model, x, list(rows)).detach()
    ls.use(model, rows)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        model.train()
        assert not torch.allclose(model(x), expected)
        model.eval()
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.train()
    y = model(x)
    assert not torch.allclose(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for n in rows for p in ls.attached(model)[n].parameters())


@each_config
@pytest.mark.parametrize("choice", [ROWS, {"a": 0.5, "c": -2.0}], ids=["rows", "mix"])
def test_changes_take_effect(config: Any, choice: Any) -> None:
    """However they are made: what is resident must never be stale."""
    model, x = three(mlp(), config), data()
    ls.use(model, choice)
    adapter = ls.attached(model)["a"]

    def check() -> None:
        with torch.no_grad():
            got = model(x)
        torch.testing.assert_close(got, model(x).detach(), atol=1e-5, rtol=1e-5)
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(fresh(x).detach(), got, atol=1e-5, rtol=1e-5)

    def seen(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x)

    check()
    before = seen(model)
    randomise(adapter.parameters(), seed=7)
    assert not torch.allclose(seen(model), before)
    check()
    before = seen(model)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    assert not torch.allclose(seen(model), before)
    check()
    before = seen(model)
    values = {n: t + 0.1 for n, t in adapter.state_dict().items()}
    adapter.load_state_dict(values)
    assert not torch.allclose(seen(model), before)
    check()
    seen(model)
    model.to(torch.float64)
    assert seen_dtype(model, x) == torch.float64
    model.to(torch.float32)
    check()


def seen_dtype(model: nn.Module, x: Tensor) -> torch.dtype:
    with torch.no_grad():
        dtype: torch.dtype = model(x.double()).dtype
    return dtype


@each_config
@pytest.mark.parametrize("choice", [ROWS, {"a": 0.5, "c": -2.0}], ids=["rows", "mix"])
def test_copies_and_pickles_keep_what_acts(config: Any, choice: Any) -> None:
    model, x = three(mlp(), config), data()
    ls.use(model, choice)
    with torch.no_grad():
        expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
        for adapter in ls.attached(twin).values():
            randomise(adapter.parameters(), seed=8)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
            assert not torch.allclose(twin(x), expected)
        ls.detach(twin)
        assert not any(m._forward_hooks for m in twin.modules())


@each_config
@pytest.mark.parametrize("choice", [ROWS, {"a": 0.5, "c": -2.0}], ids=["rows", "mix"])
def test_compile_has_no_graph_break(config: Any, choice: Any) -> None:
    torch._dynamo.reset()
    model, x = three(mlp(), config).train(), data().requires_grad_()
    ls.use(model, choice)
    expected = model(x)
    expected.pow(2).sum().backward()
    wanted = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    output.pow(2).sum().backward()
    torch.testing.assert_close(gradients(model, x), wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach(), atol=1e-5, rtol=1e-5)


@each_config
@pytest.mark.parametrize("choice", [ROWS, {"a": 0.5, "c": -2.0}], ids=["rows", "mix"])
def test_bf16_and_autocast(config: Any, choice: Any) -> None:
    model, x = three(mlp(), config), data()
    ls.use(model, choice)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        for context in (torch.enable_grad, torch.no_grad, torch.no_grad):
            with context():
                got = model(x)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), expected, atol=0.15, rtol=0.1)
    model.to(torch.bfloat16)
    for context in (torch.enable_grad, torch.no_grad, torch.no_grad):
        with context():
            got = model(x.bfloat16())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, atol=0.15, rtol=0.1)


@each_config
def test_hooks_of_the_user_see_nothing_change(config: Any) -> None:
    model, x = three(mlp(), config), data()
    ls.use(model, ROWS)
    with torch.no_grad():
        expected = model(x)
        seen: list[Tensor] = []
        model[2].register_forward_hook(lambda m, a, y: seen.append(y))  # type: ignore[index]
        model[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))  # type: ignore[index]
        torch.testing.assert_close(model(x), expected)
        values = [t.clone() for t in seen]
        model(x + 1)
        assert all(torch.equal(a, b) for a, b in zip(seen, values, strict=False))
