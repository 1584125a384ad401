"""RoAd against its equation written with whole matrices, and against PEFT 0.21.2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.errors import ConfigError
from tests.adapters.against import theirs
from tests.models import FAMILIES, mlp, randomise, run

peft = pytest.importorskip("peft")

# PEFT 0.21.2 asks Transformers 5 for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

D_IN, D_OUT, GROUP = 7, 12, 4
FORMS = ("road_1", "road_2", "road_4")
_LLAMA = ["q_proj", "v_proj", "down_proj"]


def rotation(form: str, theta: Tensor, alpha: Tensor) -> Tensor:
    """R [d_out, d_out], entry by entry."""
    half = GROUP // 2
    matrix = torch.zeros(D_OUT, D_OUT, dtype=theta.dtype)
    for group in range(D_OUT // GROUP):
        for k in range(half):
            i = group * GROUP + k
            j = i + half
            if form == "road_1":
                places = (group * half + k,) * 4
            elif form == "road_2":
                places = (i, i, j, j)
            else:  # a group's cosines stand before its sines
                cosine, sine = 2 * group * GROUP, (2 * group + 1) * GROUP
                places = (cosine + k, sine + k, sine + k + half, cosine + k + half)
            a, b, c, d = ((alpha[p], theta[p]) for p in places)
            matrix[i, i] = a[0] * torch.cos(a[1])
            matrix[i, j] = -b[0] * torch.sin(b[1])
            matrix[j, i] = c[0] * torch.sin(c[1])
            matrix[j, j] = d[0] * torch.cos(d[1])
    return matrix


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_all_gradients(
    form: str, bias: bool, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT, bias=bias).double()
    model = nn.Sequential(base)
    adapter = ls.attach(model, ls.RoAdConfig(form=form, group_size=GROUP))
    randomise(adapter.parameters(), scale=0.7)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, D_OUT, dtype=torch.float64)
    y = model(x)
    (y * weights).sum().backward()
    theta, alpha = (
        adapter.state_dict()[f"0.{n}"].double().requires_grad_() for n in ("theta", "alpha")
    )
    z = x.detach().clone().requires_grad_()
    wanted = base.forward(z) @ rotation(form, theta, alpha).T
    (wanted * weights).sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, z.grad, atol=1e-5, rtol=1e-5)
    part = adapter.layers()["0"]
    for name, want in (("theta", theta), ("alpha", alpha)):
        got = part[name].grad
        assert got is not None
        assert want.grad is not None
        torch.testing.assert_close(got.double(), want.grad, atol=1e-5, rtol=1e-5)
    ls.fuse(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


def test_first_and_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    from lorasmith.adapters.road import _Rotate

    def f(y: Tensor, own: Tensor, other: Tensor) -> Tensor:
        out: Tensor = _Rotate.apply(y, own, other, 4)  # type: ignore[no-untyped-call]
        return out

    inputs = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 8), (8,), (8,))
    ]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("family", ["llama", "distilbert"])
@pytest.mark.parametrize("form", FORMS)
def test_peft_gives_the_same(family: str, form: str, tmp_path: Path) -> None:
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    targets = _LLAMA if family == "llama" else ["q_lin", "lin1"]
    other = theirs(base, peft.RoadConfig(variant=form, group_size=GROUP, target_modules=targets))
    randomise(p for n, p in other.named_parameters() if "road_" in n)
    other.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ls.load(model, tmp_path / "theirs", trainable=True)
    assert adapter.config == ls.RoAdConfig(form=form, group_size=GROUP, targets=sorted(targets))
    wanted, got = run(other, batch), run(model, batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    found = {n: p for n, p in other.named_parameters() if "road_" in n}
    for name, parameter in adapter.named_parameters():
        module, _, leaf = name.rpartition(".")
        want = found[f"base_model.model.{module}.road_{leaf}.default"].grad
        torch.testing.assert_close(parameter.grad, want, atol=1e-4, rtol=1e-4)

    randomise(adapter.parameters(), seed=2)
    want = run(model, batch).detach()
    ls.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again, batch), want, atol=1e-5, rtol=1e-5)
    ours = copy.deepcopy(base)
    ls.load(ours, tmp_path / "ours")
    assert torch.equal(run(ours, batch), want)
    weights_read = ls.read_adapter(tmp_path / "ours")
    assert weights_read.num_parameters == adapter.num_parameters()
    assert not weights_read.unexpected


def test_a_layer_that_cannot_be_paired_is_refused_before_anything_changes() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="multiple of the group size") as caught:
        ls.attach(model, ls.RoAdConfig(group_size=4))
    assert caught.value.key == "group_size"
    assert "2 with 5 outputs" in str(caught.value)
    assert not ls.attached(model)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("values", [{"form": "road_3"}, {"group_size": 3}, {"group_size": 0}])
def test_values_that_cannot_be_used(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ls.RoAdConfig(**values)
    assert caught.value.key == next(iter(values))


@pytest.mark.parametrize(("form", "count"), [("road_1", 1), ("road_2", 2), ("road_4", 4)])
def test_number_of_parameters_at_the_shapes_of_qwen3(form: str, count: int) -> None:
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(1024, 2048), "v_proj": nn.Linear(1024, 1024)})
            for _ in range(28)
        )
    adapter = ls.attach(model, ls.RoAdConfig(form=form))
    assert adapter.num_parameters() == 28 * (2048 + 1024) * count
