"""How factors start: distributions, and PiSSA against a float64 singular value decomposition."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.errors import ConfigError, UnknownNameError
from lorasmith.init import get_initialisation
from lorasmith.init.pissa import principal
from lorasmith.init.types import Shape


def _unread() -> Tensor:
    raise AssertionError("the weight must not be read: it may be quantised")


def test_kaiming_and_gaussian_do_not_read_the_weight() -> None:
    torch.manual_seed(0)
    shape = Shape(300, 400, torch.device("cpu"))
    start = get_initialisation("kaiming")(_unread, shape, 16, 2.0)
    assert (start.A.shape, start.B.shape, start.takes_over) == ((16, 400), (300, 16), False)
    bound = 1 / math.sqrt(400)
    assert float(start.A.abs().max()) <= bound
    assert math.isclose(float(start.A.std()), bound / math.sqrt(3), rel_tol=0.05)
    start2 = get_initialisation("gaussian")(_unread, shape, 16, 2.0)
    assert math.isclose(float(start2.A.std()), 1 / 16, rel_tol=0.05)
    assert not start.B.any()
    assert not start2.B.any()


def test_autocast_has_no_say_in_how_factors_start() -> None:
    starts = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 24))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            adapter = ls.attach(model, ls.LoRAConfig(r=4, init="pissa_niter_2"))
        starts.append([p.detach() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (10, 10)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_principal_triplets(size: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(*size, dtype=torch.float64)
    u, s, vt = principal(w, rank)
    full_u, full_s, full_vt = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(s, full_s[:rank], atol=1e-10, rtol=1e-9)
    wanted = full_u[:, :rank] * full_s[:rank] @ full_vt[:rank]
    torch.testing.assert_close(u * s @ vt, wanted, atol=1e-9, rtol=1e-8)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye, atol=1e-8, rtol=0)
    torch.testing.assert_close(vt @ vt.T, eye, atol=1e-8, rtol=0)


def test_principal_triplets_of_a_rank_deficient_weight() -> None:
    torch.manual_seed(0)
    w = torch.randn(12, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64)
    u, s, vt = principal(w, 5)
    assert all(torch.isfinite(t).all() for t in (u, s, vt))
    torch.testing.assert_close(u * s @ vt, w, atol=1e-6, rtol=1e-6)
    model = nn.Sequential(nn.Linear(9, 12))
    with torch.no_grad():
        model[0].weight.copy_(w)
    x = torch.randn(3, 9)
    expected = model(x)
    adapter = ls.attach(model, ls.LoRAConfig(r=5, init="pissa"))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_takes_over_exactly_the_principal_part(scaling: str, init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    with torch.no_grad():  # a spectrum that falls, as those of trained weights do
        model[0].weight.mul_(0.6 ** torch.arange(12.0)[:, None])
    weight = model[0].weight.detach().double()
    adapter = ls.attach(model, ls.LoRAConfig(r=4, alpha=3.0, scaling=scaling, init=init))
    part = adapter.layers()["0"]
    s = 3.0 / (4 if scaling == "standard" else 2)
    u, sigma, vt = torch.linalg.svd(weight)
    wanted = u[:, :4] * sigma[:4] @ vt[:4]
    tolerance = 1e-6 if init == "pissa" else 1e-3
    got = s * part["B0"].double() @ part["A0"].double()
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)
    assert torch.equal(part["A"], part["A0"])
    assert torch.equal(part["B"], part["B0"])
    balance = part["A"].square().sum(1), part["B"].square().sum(0)
    torch.testing.assert_close(balance[0], balance[1], rtol=1e-3, atol=1e-5)
    assert [n for n, _ in adapter.named_parameters()] == ["0.A", "0.B"]
    assert not part["A0"].requires_grad


def test_pissa_never_writes_the_base_and_detach_gives_it_back() -> None:
    """Projects that move W to the residual leave it there after detach."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 16)
    expected = model(x)
    adapter = ls.attach(model, ls.LoRAConfig(r=4, init="pissa"))
    assert torch.equal(model[0].weight, before["0.weight"])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        model(x).pow(2).sum().backward()
        optimizer.step()
    assert not torch.allclose(model(x), expected)
    ls.detach(model)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), expected)


def test_what_pissa_refuses_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 3))
    before = copy.deepcopy(model.state_dict())
    for config, match in (
        (ls.LoRAConfig(r=4, init="pissa"), "fewer"),
        (ls.LoRAConfig(r=2, alpha=-1.0, init="pissa"), "positive"),
    ):
        with pytest.raises(ConfigError, match=match):
            ls.attach(model, config)
        assert list(model.state_dict()) == list(before)
        assert not ls.attached(model)


def test_ranks_beyond_the_layer_work_where_they_can() -> None:
    """lora-lite changed the model and then crashed."""
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    expected = model(x)
    ls.attach(model, ls.LoRAConfig(r=9))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["pizza", "", "pissa_niter_", "pissa_niter_x"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnknownNameError, match="initialisation") as caught:
        ls.LoRAConfig(init=name)
    if name == "pizza":
        assert caught.value.fix == "did you mean 'pissa'?"
