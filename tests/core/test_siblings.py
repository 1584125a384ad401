"""Layers fed the same tensor share a product: that must never be seen from outside."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from tests.models import FAMILIES, llama, randomise, run


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)


class Heads(nn.Module):
    """Three layers side by side, called with one tensor, in an order of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: Tensor, order: str = "abc") -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name in order}


def built() -> tuple[Heads, ls.Adapter]:
    torch.manual_seed(0)
    model = Heads()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    return model, adapter


def expected(model: Heads, adapter: ls.Adapter, x: Tensor, name: str) -> Tensor:
    layer, part = getattr(model, name), adapter.layers()[name]
    weight = layer.weight + part.constants["scaling"] * part["B"] @ part["A"]
    return nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("through", [False, True])
def test_outputs_and_gradients_step_after_step(through: bool) -> None:
    model, adapter = built()
    torch.manual_seed(1)
    for order in ("abc", "abc", "cab", "ab", "c", "abc", "b", "ba", "abc", "aab"):
        x = torch.randn(5, 6, requires_grad=through)
        outputs = model(x, order)
        sum((i + 1) * y.pow(2).sum() for i, y in enumerate(outputs.values())).backward()  # type: ignore[union-attr]
        inputs = list(adapter.parameters()) + ([x] if through else [])
        got = [None if p.grad is None else p.grad.clone() for p in inputs]
        for p in inputs:
            p.grad = None
        wanted = {n: expected(model, adapter, x, n) for n in outputs}
        for name, y in outputs.items():
            torch.testing.assert_close(y, wanted[name])
        sum((i + 1) * y.pow(2).sum() for i, y in enumerate(wanted.values())).backward()  # type: ignore[union-attr]
        for p, g in zip(inputs, got, strict=True):
            want = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(
                torch.zeros_like(p) if g is None else g, want, atol=1e-4, rtol=1e-4
            )
            p.grad = None


def test_a_layer_called_later_with_the_same_tensor() -> None:
    """Full-batch training that takes turns between heads: fresh values, a fresh graph."""
    model, adapter = built()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    x = torch.randn(5, 6)
    for step in range(8):
        name = "ab"[step % 2]
        optimizer.zero_grad()
        y = getattr(model, name)(x)
        torch.testing.assert_close(y, expected(model, adapter, x, name))
        y.tanh().mean().backward()
        optimizer.step()


def test_parameters_changed_between_two_calls() -> None:
    model, adapter = built()
    for _ in range(3):
        model(torch.randn(5, 6), "ab")["b"].sum().backward()
    x = torch.randn(5, 6)
    model.a(x)
    with torch.no_grad():
        adapter.layers()["b"]["A"].mul_(2)
    torch.testing.assert_close(model.b(x), expected(model, adapter, x, "b"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_real_model(reentrant: bool) -> None:
    """The recomputation must save what the forward pass saved, in the first step too."""
    gradients = []
    for checkpointing in (False, True):
        model = llama().train()
        torch.manual_seed(0)
        adapter = ls.attach(model, ls.LoRAConfig(r=2))
        randomise(adapter.parameters())
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the name's successor is too new
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
            model.enable_input_require_grads()  # type: ignore[operator]
        for _ in range(2):
            run(model, {**FAMILIES["llama"].batch(), "use_cache": False}).pow(2).sum().backward()  # type: ignore[dict-item]
        gradients.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def test_threads() -> None:
    model, adapter = built()
    for _ in range(3):
        model(torch.randn(5, 6))
    inputs = [torch.randn(5, 6) for _ in range(4)]
    wanted = [{n: expected(model, adapter, x, n).detach() for n in "abc"} for x in inputs]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            for _ in range(100):
                x = inputs[i].clone()
                for name, y in model(x).items():
                    if not torch.allclose(y, wanted[i][name], atol=1e-5):
                        wrong.append((i, name))
        except Exception as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_second_derivatives_through_shared_products() -> None:
    model, _ = built()
    model.double()
    for _ in range(2):
        model(torch.randn(3, 6, dtype=torch.float64))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: tuple(model(x).values()), (x,))


def test_the_graph_is_not_kept_alive() -> None:
    import gc
    import weakref

    model, _ = built()
    for _ in range(3):
        model(torch.randn(5, 6))
    x = torch.randn(5, 6, requires_grad=True)
    outputs = model(x)
    node = weakref.ref(x)
    del x, outputs
    gc.collect()
    assert node() is None
