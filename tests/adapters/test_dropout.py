"""Dropout: the right probability, the same mask on the way back, only on the low-rank path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorasmith as ls
from lorasmith.core import lowrank
from tests.models import randomise


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_mask_statistics(p: float) -> None:
    torch.manual_seed(0)
    count = 200_000
    mask, keep = lowrank.dropout_mask(torch.empty(count // 100, 100), p)
    assert mask.dtype == torch.int8
    assert set(mask.unique().tolist()) == {0, 1}
    assert abs(keep - (1 - p)) <= 2**-8
    deviation = (keep * (1 - keep) / count) ** 0.5
    assert abs(float(mask.double().mean()) - keep) < 4 * deviation
    # Independent along both axes: neighbours agree as often as chance says.
    wide = mask.double() - keep
    for shifted in (wide[1:] * wide[:-1], wide[:, 1:] * wide[:, :-1]):
        assert abs(float(shifted.mean())) < 5 * keep * (1 - keep) / count**0.5


@pytest.mark.parametrize("p", [0.001, 0.05, 0.3])
def test_the_probability_is_exact_over_the_calls(p: float) -> None:
    torch.manual_seed(0)
    keeps = torch.tensor([lowrank.dropout_mask(torch.empty(1), p)[1] for _ in range(4000)])
    assert abs(float(keeps.double().mean()) - (1 - p)) < 4 * (0.5 / 256) / 4000**0.5


@pytest.mark.parametrize("p", [1e-9, 0.999999])
def test_extreme_probabilities(p: float) -> None:
    mask, keep = lowrank.dropout_mask(torch.empty(1000), p)
    assert 0 < keep <= 1
    assert torch.isfinite(mask.float() / keep).all()


@pytest.fixture(params=[0, 10**9], ids=["fast", "plain"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(lowrank, "SMALL", request.param)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    randomise(ls.attach(model, ls.LoRAConfig(r=3, dropout=0.4)).parameters())
    return model


def test_expectation_is_the_output_without_dropout(layer: nn.Module) -> None:
    x = torch.randn(1, 6)
    wanted = layer.eval()(x).detach()
    rows = layer.train()(x.expand(40_000, 6)).detach()
    deviation = rows.std(dim=0) / 200
    assert ((rows.mean(dim=0) - wanted[0]).abs() < 5 * deviation + 1e-6).all()


def test_the_same_mask_forwards_and_backwards(layer: nn.Module) -> None:
    """With one token, dy/dx shows exactly which inputs the mask kept."""
    layer.train()
    part = ls.attached(layer)["default"].layers()["0"]
    base = layer[0]  # type: ignore[index]
    for seed in range(5):
        x = torch.randn(1, 6, requires_grad=True)
        part.zero_grad()
        torch.manual_seed(seed)
        y = layer(x)
        torch.manual_seed(seed)
        mask, keep = lowrank.dropout_mask(x.detach(), 0.4)
        dropped = x.detach() * mask / keep
        s = part.constants["scaling"]
        wanted = (
            nn.functional.linear(x, base.weight, base.bias)
            + s * dropped @ part["A"].T @ part["B"].T
        )
        torch.testing.assert_close(y, wanted)
        g = torch.randn(1, 5)
        (y * g).sum().backward()
        h = s * g @ part["B"]
        assert part["A"].grad is not None
        assert x.grad is not None
        torch.testing.assert_close(part["A"].grad, h.T @ dropped)
        torch.testing.assert_close(x.grad, g @ base.weight + (h @ part["A"]) * mask / keep)


def test_seeded_in_training_and_off_in_evaluation(layer: nn.Module) -> None:
    x = torch.randn(4, 6)
    layer.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(layer(x), outputs[0])
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_base_path_is_not_dropped(layer: nn.Module) -> None:
    layer.train()
    part = ls.attached(layer)["default"].layers()["0"]
    with torch.no_grad():
        part["B"].zero_()
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), layer[0].forward(x))  # type: ignore[index]
