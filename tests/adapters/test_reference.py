"""Each variant against its paper's equation, dense and in float64, away from the start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.adapters.dora import factored_squared_norms
from lorasmith.core import lowrank
from tests.models import randomise

D_IN, D_OUT, RANK, ALPHA = 7, 9, 3, 5.0


@pytest.fixture(autouse=True, params=[0, 10**9], ids=["fast", "plain"])
def _both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


def layer(kind: str, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        made: nn.Module = nn.Linear(D_IN, D_OUT, bias=bias)
    else:
        from transformers.pytorch_utils import Conv1D

        made = Conv1D(D_OUT, D_IN)
        nn.init.normal_(made.bias)
    return made.double()


def dense(config: Any, base: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The paper's formula, written with whole matrices."""
    weight = base.weight.detach()
    if type(base).__name__ == "Conv1D":
        weight = weight.T
    bias = 0.0 if base.bias is None else base.bias.detach()
    if config.variant in ("ia3", "ia3_ff"):
        if config.variant == "ia3_ff" or config.feedforward:
            return (x * t["gain"]) @ weight.T + bias
        return (x @ weight.T + bias) * t["gain"]
    s = ALPHA / (math.sqrt(RANK) if config.scaling == "rslora" else RANK)
    v = weight + s * t["B"] @ t["A"]
    if "A0" in t:
        v = v - s * t["B0"] @ t["A0"]
    if config.variant == "dora":
        v = (t["magnitude"] / v.detach().norm(dim=1))[:, None] * v
    return x @ v.T + bias


CONFIGS = {
    "lora": ls.LoRAConfig(r=RANK, alpha=ALPHA),
    "rslora": ls.LoRAConfig(r=RANK, alpha=ALPHA, scaling="rslora"),
    "lora-pissa": ls.LoRAConfig(r=RANK, alpha=ALPHA, init="pissa"),
    "dora": ls.DoRAConfig(r=RANK, alpha=ALPHA),
    "dora-rslora": ls.DoRAConfig(r=RANK, alpha=ALPHA, scaling="rslora"),
    "dora-pissa": ls.DoRAConfig(r=RANK, alpha=ALPHA, init="pissa"),
    "ia3": ls.IA3Config(),
    "ia3-input": ls.IA3Config(feedforward="0"),
    "ia3_ff": ls.IA3FFConfig(),
}


#: Files beside this one that hold the reference of other variants.
_ELSEWHERE = "antipasto delora hra loha lokr lora_xs miss oft road subspace vera".split()


def test_every_variant_has_a_reference() -> None:
    here = {c.variant for c in CONFIGS.values()}
    files = [Path(__file__).with_name(f"test_{name}.py") for name in _ELSEWHERE]
    assert all(f.is_file() for f in files)
    families = {n.partition("_")[0] if n.startswith("antipasto") else n for n in ls.variants()}
    assert families - here == set(_ELSEWHERE)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ls.LoRAConfig(r=32), 28 * 32 * (1024 + 2048 + 1024 + 1024)),
        (ls.LoRAConfig(r=32, init="pissa"), 4_587_520),
        (ls.DoRAConfig(r=32), 4_587_520 + 28 * (2048 + 1024)),
        (ls.IA3Config(), 28 * (2048 + 1024)),
        (ls.IA3FFConfig(), 28 * (1024 + 1024)),
    ],
    ids=["lora", "pissa", "dora", "ia3", "ia3_ff"],
)
def test_parameters_of_qwen3(config: Any, count: int) -> None:
    """28 layers of width 1024, q_proj to 2048 and v_proj to 1024, without their weights."""
    with torch.device("meta"):
        layers = [
            nn.ModuleDict({"q_proj": nn.Linear(1024, 2048), "v_proj": nn.Linear(1024, 1024)})
            for _ in range(28)
        ]
    assert ls.attach(nn.ModuleList(layers), config).num_parameters() == count


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("input_grad", [True, False], ids=["x needs grad", "x needs none"])
def test_forward_and_all_gradients(config: Any, kind: str, input_grad: bool) -> None:
    base = layer(kind.split(maxsplit=1)[0], bias="without" not in kind)
    model = nn.Sequential(base)
    adapter = ls.attach(model, config)
    randomise(adapter.parameters(), scale=0.4)
    for part in adapter.layers().values():
        part.double()  # keeps float32: the reference is then computed on the same values
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=input_grad)
    weights = torch.randn(2, 5, D_OUT, dtype=torch.float64)
    y = model(x)
    (y * weights).sum().backward()
    tensors = {
        n.removeprefix("0."): t.double().requires_grad_() for n, t in adapter.state_dict().items()
    }
    z = x.detach().clone().requires_grad_()
    wanted = dense(config, base, z, tensors)
    (wanted * weights).sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    for name, parameter in adapter.named_parameters():
        want = tensors[name.removeprefix("0.")].grad
        assert parameter.grad is not None
        assert want is not None
        torch.testing.assert_close(parameter.grad.double(), want, atol=1e-5, rtol=1e-5)
    if input_grad:
        assert x.grad is not None
        torch.testing.assert_close(x.grad, z.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_dora_where_the_norm_cancels(weight_dtype: torch.dtype) -> None:
    """s B A ≈ −W in some rows: c² is a difference of equal numbers there."""
    torch.manual_seed(0)
    left, right = torch.randn(D_OUT, RANK), torch.randn(RANK, D_IN)
    base = nn.Linear(D_IN, D_OUT)
    with torch.no_grad():
        base.weight.copy_(left @ right)
    base.to(weight_dtype)
    model = nn.Sequential(base)
    adapter = ls.attach(model, ls.DoRAConfig(r=RANK, alpha=float(RANK)))
    part = adapter.layers()["0"]
    with torch.no_grad():
        part["A"].copy_(right)
        part["B"].copy_(-left)
        part["B"][: D_OUT // 2] *= 0.999
        part["B"][D_OUT // 2 :] *= 0.9
    direction = base.weight.double() + part["B"].double() @ part["A"].double()
    wanted = direction.norm(dim=1)
    got = ls.variants()["dora"]._norms(part, _base(model, "0"))  # type: ignore[attr-defined]
    torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=1e-7)
    assert torch.isfinite(model(torch.randn(2, D_IN, dtype=weight_dtype))).all()


def _base(model: nn.Module, name: str) -> Any:
    from lorasmith.core.layers import describe
    from lorasmith.core.variant import BaseLayer

    module = model.get_submodule(name)
    info = describe(module, name)
    assert info is not None
    return BaseLayer(module, info)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_leaves_zero_rows_alone(bias: bool) -> None:
    base = nn.Linear(D_IN, D_OUT, bias=bias)
    with torch.no_grad():
        base.weight[2] = 0
    model = nn.Sequential(base)
    x = torch.randn(4, D_IN, requires_grad=True)
    expected = model(x).detach()
    adapter = ls.attach(model, ls.DoRAConfig(r=RANK))
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    randomise([adapter.layers()["0"]["A"], adapter.layers()["0"]["B"]])
    y = model(x)
    y.sum().backward()
    for tensor in (y, x.grad, *(p.grad for p in adapter.parameters())):
        assert tensor is not None
        assert torch.isfinite(tensor).all()
    ls.fuse(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


def test_dora_where_the_user_trains_the_bias_too() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    randomise(ls.attach(model, ls.DoRAConfig(r=RANK)).parameters())
    bias: Tensor = model[0].bias
    bias.requires_grad_()
    model(torch.randn(4, D_IN)).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((D_OUT,), 4.0))


def test_dora_refuses_second_derivatives_of_a_constant(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    randomise(ls.attach(model, ls.DoRAConfig(r=RANK)).parameters())
    x = torch.randn(4, D_IN, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("seed", range(4))
def test_factored_norms(seed: int) -> None:
    torch.manual_seed(seed)
    w, a, b = (
        torch.randn(*s, dtype=torch.float64) for s in ((D_OUT, D_IN), (RANK, D_IN), (D_OUT, RANK))
    )
    got = factored_squared_norms(w.square().sum(1), w, a, b, 0.7)
    torch.testing.assert_close(got, (w + 0.7 * b @ a).square().sum(1))


@pytest.mark.parametrize("shape", [(4, D_IN), (2, 3, D_IN)])
@pytest.mark.parametrize("frozen", [False, True], ids=["plain", "with A0 and B0"])
def test_first_and_second_derivatives_of_the_low_rank_product(
    shape: tuple[int, ...], frozen: bool
) -> None:
    def made(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    a0, b0 = (made(RANK, D_IN).detach(), made(D_OUT, RANK).detach()) if frozen else (None, None)

    def f(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        passed, h = lowrank.down(x, a, A0=a0, owned=True)
        y = nn.functional.linear(passed, weight)
        return lowrank.up(y, h, b, 0.7, B0=b0, owned=True)

    inputs = (made(*shape), made(RANK, D_IN), made(D_OUT, RANK))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
