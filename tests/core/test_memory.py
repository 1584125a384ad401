"""What the fast path allocates and keeps: nothing of the output's size but the base's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorasmith as ls
from lorasmith.core import lowrank
from tests.models import randomise

TOKENS, D_IN, D_OUT, RANK = 64, 48, 96, 4


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # alive, so that no address is used twice
        self.known: set[int] = set()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in args:
            if isinstance(t, Tensor):
                self.known.add(t.untyped_storage().data_ptr())
                self.kept.append(t)
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.known.add(t.untyped_storage().data_ptr())
                self.kept.append(t)
                self.sizes.append(t.untyped_storage().nbytes())
        return result

    def count(self, *shape: int, element: int = 4) -> int:
        size = element
        for n in shape:
            size *= n
        return self.sizes.count(size)


def step(config: Any, **more: Any) -> tuple[list[Tensor], Allocations, Allocations]:
    """Tensors saved for the backward pass, and what forward and backward allocate."""
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT)
    model = nn.Sequential(layer).train()
    if config is None:
        layer.requires_grad_(False)
    else:
        randomise(ls.attach(model, config).parameters())
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    weights = torch.ones(TOKENS, D_OUT)
    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)  # type: ignore[func-returns-value]
    with keep, Allocations() as forward:
        y = model(x)
    with Allocations() as backward:
        torch.autograd.grad(y, [p for p in (x, *model.parameters()) if p.requires_grad], weights)
    return saved, forward, backward


def test_lora_allocates_one_output_and_one_input_gradient() -> None:
    _, base_forward, base_backward = step(None)
    assert base_forward.count(TOKENS, D_OUT) == 1
    assert base_backward.count(TOKENS, D_IN) == 1
    saved, forward, backward = step(ls.LoRAConfig(r=RANK))
    assert forward.count(TOKENS, D_OUT) == 1
    assert forward.count(TOKENS, D_IN) == 0, "the input was copied"
    assert forward.count(D_OUT, D_IN) == 0
    assert backward.count(TOKENS, D_IN) == 1, "a second gradient of x was made"
    assert backward.count(TOKENS, D_OUT) == 0
    sizes = sorted(t.numel() for t in saved if t.shape[0] == TOKENS)
    assert sizes == sorted([TOKENS * D_IN, TOKENS * RANK])
    assert not any(t.numel() == TOKENS * D_OUT for t in saved)


def test_with_dropout_one_byte_an_element_is_kept() -> None:
    saved, forward, _ = step(ls.LoRAConfig(r=RANK, dropout=0.1))
    assert forward.count(TOKENS, D_OUT) == 1
    masks = [t for t in saved if t.dtype == torch.int8]
    assert [t.numel() for t in masks] == [TOKENS * D_IN]
    floats = sorted(t.numel() for t in saved if t.shape[0] == TOKENS and t.is_floating_point())
    assert floats == sorted([TOKENS * D_IN, TOKENS * RANK])


def test_a_frozen_adapter_keeps_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    ls.attach(model, ls.LoRAConfig(r=RANK)).requires_grad_(False)
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x)
    assert not [t.shape for t in saved if t.shape[0] == TOKENS]


@pytest.mark.parametrize("grad", [True, False])
def test_dora_forms_no_matrix_of_the_weights_size(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).train()
        randomise(ls.attach(model, ls.DoRAConfig(r=RANK)).parameters())
        x = torch.randn(TOKENS, D_IN)
        with Allocations() as made:
            model(x)
    assert made.count(D_OUT, D_IN) == 0


def test_dora_keeps_one_output_for_its_magnitude() -> None:
    saved, _, _ = step(ls.DoRAConfig(r=RANK))
    assert [t.shape for t in saved if t.numel() == TOKENS * D_OUT] == [(TOKENS, D_OUT)]
