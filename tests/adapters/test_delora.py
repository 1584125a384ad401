"""DeLoRA against its equation in float64, and against PEFT 0.21.2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.errors import ConfigError, UnsupportedFeatureError
from tests.adapters.against import dense_weight, one_layer, theirs
from tests.models import FAMILIES, randomise, run

peft = pytest.importorskip("peft")

# PEFT 0.21.2 asks Transformers 5 for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

D_IN, D_OUT, RANK = 7, 9, 3
_LLAMA = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True, params=[0, 10**9], ids=["fast", "plain"])
def _both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


def delta(a: Tensor, b: Tensor, strength: Tensor, norms: Tensor) -> Tensor:
    """(λ / r) Σ_k b_k a_kᵀ / (‖a_k‖ ‖b_k‖), its columns scaled by those of W."""
    total = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
    for row, column in zip(a, b.T, strict=True):
        total = total + torch.outer(column, row) / (row.norm() * column.norm())
    return strength / a.shape[0] * total * norms


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", ["zero", "subtract"])
@pytest.mark.parametrize("input_grad", [True, False], ids=["x needs grad", "x needs none"])
def test_forward_and_all_gradients(init: str, kind: str, input_grad: bool) -> None:
    base: Any = one_layer(kind, D_IN, D_OUT)
    weight = dense_weight(base)
    model = nn.Sequential(base)
    adapter = ls.attach(model, ls.DeLoRAConfig(r=RANK, lambda_init=2.5, init=init))
    randomise(adapter.parameters(), scale=0.4)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=input_grad)
    weights = torch.randn(2, 5, D_OUT, dtype=torch.float64)
    y = model(x)
    (y * weights).sum().backward()
    t = {n.removeprefix("0."): v.double() for n, v in adapter.state_dict().items()}
    for name in ("A", "B", "lambda"):
        t[name].requires_grad_()
    norms = weight.square().sum(dim=0).sqrt()
    torch.testing.assert_close(t["w_norm"], norms, atol=1e-6, rtol=1e-6)
    z = x.detach().clone().requires_grad_()
    change = delta(t["A"], t["B"], t["lambda"], norms)
    if init == "subtract":
        change = change - delta(t["A0"], t["B0"], t["lambda"], norms)
    wanted = z @ (weight + change).T + base.bias.detach()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    part = adapter.layers()["0"]
    for name in ("A", "B", "lambda"):
        got = part[name].grad
        assert got is not None
        torch.testing.assert_close(got.double(), t[name].grad, atol=1e-5, rtol=1e-5)
    if input_grad:
        torch.testing.assert_close(x.grad, z.grad, atol=1e-5, rtol=1e-5)
    found = ls.factors(model)["0"]
    assert found.rank == (RANK if init == "zero" else 2 * RANK)
    torch.testing.assert_close(found.delta(torch.float64), change.detach(), atol=1e-5, rtol=1e-5)
    ls.fuse(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("init", "times"), [("zero", 1), ("subtract", 2)])
def test_the_change_is_bounded_by_lambda(init: str, times: int) -> None:
    base = nn.Linear(D_IN, D_OUT)
    with torch.no_grad():
        base.weight /= base.weight.norm(dim=0)
    model = nn.Sequential(base)
    adapter = ls.attach(model, ls.DeLoRAConfig(r=RANK, lambda_init=0.7, init=init))
    part = adapter.layers()["0"]
    for scale in (0.1, 10.0, 1000.0):
        randomise([part["A"], part["B"]], scale=scale)
        assert ls.factors(model)["0"].delta().norm() <= times * 0.7 * (1 + 1e-6)
    with torch.no_grad():  # the worst there is: all parts alike, and against the frozen ones
        part["A"].copy_(part["A"][:1].expand(RANK, -1))
        part["B"].copy_(part["B"][:, :1].expand(-1, RANK))
        if init == "subtract":
            part["A0"].copy_(part["A"])
            part["B0"].copy_(-part["B"])
    worst = ls.factors(model)["0"].delta().norm()
    torch.testing.assert_close(worst, torch.tensor(times * 0.7), atol=0, rtol=1e-5)


@pytest.mark.parametrize("init", ["zero", "subtract"])
def test_dropout_acts_on_the_low_rank_path_alone(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ls.attach(model, ls.DeLoRAConfig(r=RANK, dropout=0.4, init=init))
    x = torch.randn(1, D_IN)
    torch.testing.assert_close(model.train()(x), model[0].forward(x), atol=1e-5, rtol=0)
    randomise(adapter.parameters())
    wanted = model.eval()(x).detach()
    rows = model.train()(x.expand(40_000, D_IN)).detach()
    deviation = rows.std(dim=0) / 200
    assert ((rows.mean(dim=0) - wanted[0]).abs() < 5 * deviation + 1e-6).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "strength": {"delora_lambda": 3, "module_dropout": 0.1},
    "patterns": {"rank_pattern": {"q_proj|q_lin": 2}, "lambda_pattern": {"v_proj|lin1": 4}},
}


@pytest.mark.parametrize("family", ["llama", "distilbert"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peft_gives_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    targets = _LLAMA if family == "llama" else ["q_lin", "lin1"]
    other = theirs(base, peft.DeloraConfig(r=4, target_modules=targets, **options))
    # What PEFT starts with, ours starts with.
    fields = {"rank_pattern", "lambda_pattern"} & options.keys()
    config = ls.DeLoRAConfig(
        r=4,
        targets=sorted(targets),
        lambda_init=options.get("delora_lambda", 15),
        dropout=options.get("module_dropout", 0.0),
        init="zero",
        **{f: options[f] for f in fields},
    )
    fresh = ls.attach(copy.deepcopy(base), config)
    start = {n: p for n, p in other.named_parameters() if "delora_" in n}
    for name, parameter in fresh.named_parameters():
        module, _, leaf = name.rpartition(".")
        their = start[f"base_model.model.{module}.delora_{leaf}.default"]
        assert their.shape == parameter.shape
        if leaf != "A":
            assert torch.equal(their, parameter)

    randomise(start.values())
    other.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ls.load(model, tmp_path / "theirs", trainable=True)
    assert adapter.config == config
    model.eval()
    wanted, got = run(other, batch), run(model, batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    for name, parameter in adapter.named_parameters():
        module, _, leaf = name.rpartition(".")
        want = start[f"base_model.model.{module}.delora_{leaf}.default"].grad
        assert want is not None
        difference = (parameter.grad - want).abs().max()
        assert difference < 1e-4 * float(want.abs().max()) + 1e-6, name


@pytest.mark.parametrize("init", ["zero", "subtract"])
def test_peft_and_we_read_what_we_write(init: str, tmp_path: Path) -> None:
    base, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch()
    model = copy.deepcopy(base)
    config = ls.DeLoRAConfig(
        r=4, targets=_LLAMA, init=init, rank_pattern={"q_proj": 2}, lambda_pattern={"v_proj": 3}
    )
    adapter = ls.attach(model, config)
    randomise(adapter.parameters())
    want = run(model, batch).detach()
    ls.save(model, tmp_path / "a")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    torch.testing.assert_close(run(other, batch), want, atol=1e-5, rtol=1e-5)
    ours = copy.deepcopy(base)
    loaded = ls.load(ours, tmp_path / "a")
    assert loaded.config == config
    torch.testing.assert_close(run(ours, batch), want, atol=1e-5, rtol=1e-5)
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in adapter.state_dict().items())
    read = ls.read_adapter(tmp_path / "a")
    assert read.num_parameters == adapter.num_parameters()
    name = read.modules[0]
    torch.testing.assert_close(
        read.delta(name), ls.factors(model)[name].delta(), atol=1e-6, rtol=1e-5
    )
    # ... without our own file, too.
    (tmp_path / "a" / "lorasmith.json").unlink()
    again = copy.deepcopy(base)
    ls.load(again, tmp_path / "a")
    torch.testing.assert_close(run(again, batch), want, atol=1e-5, rtol=1e-5)


def test_norms_of_the_base_are_in_the_file_and_not_read_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapter = ls.attach(model, ls.DeLoRAConfig(r=RANK))
    norms = adapter.state_dict()["0.w_norm"].clone()
    ls.save(model, tmp_path / "a")
    other = nn.Sequential(nn.Linear(D_IN, D_OUT))
    loaded = ls.load(other, tmp_path / "a", allow_base_mismatch=True)
    assert torch.equal(loaded.state_dict()["0.w_norm"], norms)


def test_trained_biases_of_peft_are_refused() -> None:
    fields = {"peft_type": "DELORA", "bias": "all"}
    with pytest.raises(UnsupportedFeatureError, match="biases"):
        ls.variants()["delora"].from_peft(fields, {})


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"lambda_init": 0},
        {"lambda_init": float("nan")},
        {"dropout": 1.0},
        {"init": "pissa"},
        {"rank_pattern": {"q": 0}},
        {"lambda_pattern": {"q": 0.0}},
        {"lambda_pattern": ["q"]},
    ],
    ids=str,
)
def test_values_that_cannot_be_used(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ls.DeLoRAConfig(**values)
    assert caught.value.key is not None
    assert caught.value.key.startswith(next(iter(values)))


def test_number_of_parameters_at_the_shapes_of_qwen3() -> None:
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(1024, 2048), "v_proj": nn.Linear(1024, 1024)})
            for _ in range(28)
        )
    adapter = ls.attach(model, ls.DeLoRAConfig(r=32))
    strengths = 2 * 28
    assert adapter.num_parameters() == 4_587_520 + strengths
