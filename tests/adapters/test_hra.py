"""HRA against products of dense reflections, and against PEFT 0.21.2."""

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
from tests.adapters.against import dense_weight, one_layer, theirs
from tests.models import FAMILIES, mlp, randomise, run

peft = pytest.importorskip("peft")

# PEFT 0.21.2 asks Transformers 5 for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

D_IN, D_OUT, RANK = 7, 9, 4
_LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True, params=[0, 10**9], ids=["fast", "plain"])
def _both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


def reflections(columns: Tensor, gram_schmidt: bool) -> Tensor:
    """H₁ ⋯ H_r [d_in, d_in], one by one."""
    matrix = torch.eye(columns.shape[0], dtype=columns.dtype)
    done: list[Tensor] = []
    for u in columns.T:
        for q in done if gram_schmidt else ():
            u = u - (q @ u) * q
        u = u / u.norm()
        done.append(u)
        matrix = matrix @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u))
    return matrix


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["pairs", "gram_schmidt"])
@pytest.mark.parametrize("input_grad", [True, False], ids=["x needs grad", "x needs none"])
def test_forward_and_all_gradients(gram_schmidt: bool, kind: str, input_grad: bool) -> None:
    base: Any = one_layer(kind, D_IN, D_OUT)
    model = nn.Sequential(base)
    adapter = ls.attach(model, ls.HRAConfig(r=RANK, gram_schmidt=gram_schmidt))
    randomise(adapter.parameters(), scale=0.4)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=input_grad)
    weights = torch.randn(2, 5, D_OUT, dtype=torch.float64)
    y = model(x)
    (y * weights).sum().backward()
    values = {n.removeprefix("0."): t.double() for n, t in adapter.state_dict().items()}
    u = values["U"].requires_grad_()
    z = x.detach().clone().requires_grad_()
    turned = reflections(u, gram_schmidt)
    if gram_schmidt:
        turned = reflections(values["Q0"], gram_schmidt) @ turned
    weight = dense_weight(base)
    wanted = z @ (weight @ turned).T + base.bias.detach()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    got = adapter.layers()["0"]["U"].grad
    assert got is not None
    assert u.grad is not None
    torch.testing.assert_close(got.double(), u.grad, atol=1e-5, rtol=1e-5)
    if input_grad:
        torch.testing.assert_close(x.grad, z.grad, atol=1e-5, rtol=1e-5)
    ls.fuse(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("r", [2, 3, 8])
def test_compact_form_equals_the_product(r: int) -> None:
    from lorasmith.adapters.hra import _middle

    torch.manual_seed(0)
    u = torch.randn(D_IN, r, dtype=torch.float64) * torch.logspace(-2, 2, r)
    got = torch.eye(D_IN, dtype=torch.float64) - u @ _middle(u) @ u.T
    torch.testing.assert_close(got, reflections(u, False))


def test_the_change_is_orthogonal() -> None:
    for config in (ls.HRAConfig(r=4), ls.HRAConfig(r=3, gram_schmidt=True)):
        base = nn.Linear(D_IN, D_IN, bias=False)
        nn.init.eye_(base.weight)
        model = nn.Sequential(base)
        randomise(ls.attach(model, config).parameters())
        ls.fuse(model)
        eye = torch.eye(D_IN)
        assert not torch.allclose(base.weight, eye, atol=1e-2)
        torch.testing.assert_close(base.weight @ base.weight.T, eye, atol=1e-5, rtol=1e-5)


def test_neighbours_that_share_the_product_get_the_same() -> None:
    """q, k and v together on a fast path, and one by one."""
    outputs = []
    for share in (True, False):
        model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch()
        adapter = ls.attach(model, ls.HRAConfig(r=4, targets=["q_proj", "k_proj", "v_proj"]))
        randomise(adapter.parameters())
        if not share:
            for part in adapter.layers().values():
                part.siblings = None
        for _ in range(2):
            y = run(model, batch)
            y.pow(2).sum().backward()
        outputs.append([y.detach(), *(p.grad for p in adapter.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "distilbert"])
@pytest.mark.parametrize("options", [{}, {"apply_GS": True}, {"r": 3}], ids=str)
def test_peft_gives_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    targets = _LLAMA if family == "llama" else ["q_lin", "lin1"]
    other = theirs(base, peft.HRAConfig(target_modules=targets, **{"r": 4, **options}))
    randomise(p for n, p in other.named_parameters() if "hra_" in n)
    other.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ls.load(model, tmp_path / "theirs", trainable=True)
    wanted, got = run(other, batch), run(model, batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    found = {n: p for n, p in other.named_parameters() if "hra_" in n}
    for name, parameter in adapter.named_parameters():
        module, _, leaf = name.rpartition(".")
        assert leaf == "U"
        want = found[f"base_model.model.{module}.hra_u.default"].grad
        assert want is not None
        difference = (parameter.grad - want).abs().max()
        assert difference < 1e-4 * float(want.abs().max()) + 1e-6, name

    randomise(adapter.parameters(), seed=2)
    want = run(model, batch).detach()
    ls.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again, batch), want, atol=1e-5, rtol=1e-5)
    ours = copy.deepcopy(base)
    ls.load(ours, tmp_path / "ours")
    assert torch.equal(run(ours, batch), want)


def test_peft_is_given_gram_schmidt_as_plain_reflections(tmp_path: Path) -> None:
    base, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch()
    model = copy.deepcopy(base)
    config = ls.HRAConfig(r=3, gram_schmidt=True, targets=_LLAMA)
    adapter = ls.attach(model, config)
    randomise(adapter.parameters())
    want = run(model, batch).detach()
    ls.save(model, tmp_path / "a")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    torch.testing.assert_close(run(other, batch), want, atol=1e-5, rtol=1e-5)
    ours = copy.deepcopy(base)
    loaded = ls.load(ours, tmp_path / "a", trainable=True)
    assert loaded.config == config
    assert loaded.num_parameters() == adapter.num_parameters()
    torch.testing.assert_close(run(ours, batch), want, atol=1e-5, rtol=1e-5)
    assert ls.read_adapter(tmp_path / "a").num_parameters == adapter.num_parameters()


def test_what_cannot_start_as_the_identity_is_refused() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="odd number") as caught:
        ls.attach(model, ls.HRAConfig(r=3))
    assert caught.value.key == "r"
    with pytest.raises(ConfigError, match="more orthogonal reflections"):
        ls.attach(model, ls.HRAConfig(r=7, gram_schmidt=True))
    assert not ls.attached(model)
    for values in ({"r": 0}, {"r": 2.0}, {"gram_schmidt": 1}):
        with pytest.raises(ConfigError):
            ls.HRAConfig(**values)  # type: ignore[arg-type]


def test_more_reflections_than_inputs_work() -> None:
    model = mlp()
    x = torch.randn(3, 6)
    expected = model(x)
    adapter = ls.attach(model, ls.HRAConfig(r=10))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    randomise(adapter.parameters())
    hooked = model(x)
    ls.fuse(model)
    torch.testing.assert_close(model(x), hooked, atol=1e-5, rtol=1e-5)


def test_the_start_is_the_identity_in_bfloat16_up_to_its_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64)).to(torch.bfloat16)
    x = torch.randn(16, 256).to(torch.bfloat16)
    expected = model(x).float()
    ls.attach(model, ls.HRAConfig(r=16))
    error = (model(x).float() - expected).norm() / expected.norm()
    assert error < 2**-7


def test_number_of_parameters_at_the_shapes_of_qwen3() -> None:
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(1024, 2048), "v_proj": nn.Linear(1024, 1024)})
            for _ in range(28)
        )
    assert ls.attach(model, ls.HRAConfig(r=32)).num_parameters() == 1_835_008
