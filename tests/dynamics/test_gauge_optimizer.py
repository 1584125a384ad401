"""Gauge projection in training: the wrapped optimiser, the rule, and the moments."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.variant import Factors
from lorasmith.dynamics.driver import Dynamics
from lorasmith.dynamics.gauge import (
    GaugeProjectedOptimizer,
    GaugeProjection,
    gauge_residual,
    project_gauge_,
)
from lorasmith.dynamics.protocol import Site, Statistics, Step
from lorasmith.errors import ConfigError, TrainingError
from tests.models import mlp, randomise

MU = {"0": 3 / 8, "2": 3 / 5}  # r / d_out of the two layers


def make(optimizer: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> Any:
    """A model with a random LoRA of rank 3, and a plain optimiser of it."""
    model = mlp()
    adapter = ls.attach(model, ls.LoRAConfig(r=3))
    randomise(adapter.parameters())
    options.setdefault("lr", 1e-2)
    return model, optimizer(ls.param_groups(model, options.pop("lr")), **options)


def backward(model: nn.Module, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 6, generator=g), torch.randn(8, 5, generator=g)
    loss = (model(x) - y).square().mean() * scale
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def pairs(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    layers = ls.attached(model)["default"].layers()
    return {name: (part["A"], part["B"]) for name, part in layers.items()}


def residual(model: nn.Module) -> float:
    return max(float(gauge_residual(a, b, MU[n])) for n, (a, b) in pairs(model).items())


def everything(model: nn.Module, optimizer: Any) -> list[Tensor]:
    found = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state.values():
        found += [v.detach().clone() for v in state.values() if isinstance(v, Tensor)]
    return found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def reference(a: Tensor, b: Tensor, mu: float) -> Tensor:
    """R, from scipy in float64."""
    x, y = a.detach().double().numpy(), b.detach().double().numpy()
    root = np.real(scipy.linalg.sqrtm(x @ x.T))
    inverse = np.linalg.inv(root)
    middle = np.real(scipy.linalg.sqrtm(mu * root @ y.T @ y @ root))
    return torch.from_numpy(np.real(scipy.linalg.sqrtm(inverse @ middle @ inverse)))


# -- a real optimiser ------------------------------------------------------------------------


def test_a_step_is_the_inner_step_and_the_projection() -> None:
    model, inner = make()
    twin, plain = make()
    optimizer = ls.GaugeProjectedOptimizer(inner, model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "AdamW" in repr(optimizer)
    train(model, optimizer, 1)
    train(twin, plain, 1)
    assert residual(model) < 1e-6 < 1e-2 < residual(twin)
    for (a, b), (c, d) in zip(pairs(model).values(), pairs(twin).values(), strict=True):
        torch.testing.assert_close(b @ a, d @ c, atol=1e-6, rtol=1e-5)
    assert optimizer.residual() == pytest.approx(residual(model), abs=1e-7)


def test_it_learns() -> None:
    model, inner = make()
    optimizer = GaugeProjectedOptimizer(inner, model)
    first = backward(model)
    for _ in range(100):
        optimizer.zero_grad()
        last = backward(model)
        optimizer.step()
    assert float(last) < 0.5 * float(first)
    assert residual(model) < 1e-6


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
}


@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_schedulers_accept_it(kind: str) -> None:
    model, inner = make()
    twin, plain = make()
    optimizer = GaugeProjectedOptimizer(inner, model)
    schedulers = SCHEDULERS[kind](optimizer), SCHEDULERS[kind](plain)
    rates: list[list[Any]] = [[], []]
    for seed in range(5):
        for i, (m, o) in enumerate(((model, optimizer), (twin, plain))):
            train(m, o, 1, seed)
            schedulers[i].step(*([1.0] if kind == "plateau" else []))
            group = (inner, plain)[i].param_groups[0]
            rates[i].append((group["lr"], group.get("betas")))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_the_step_and_the_projection(fused: bool) -> None:
    model, inner = make(fused=fused)
    optimizer = GaugeProjectedOptimizer(inner, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = everything(model, optimizer)
    scaler.scale(torch.ones(()))  # makes the scale
    backward(model, scale=float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert same(everything(model, optimizer), before)
    optimizer.zero_grad()
    backward(model, scale=2.0)  # the scale, applied by hand
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    twin, plain = make(fused=fused)
    train(twin, GaugeProjectedOptimizer(plain, twin), 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    assert residual(model) < 1e-6


def test_accelerate_prepares_and_checkpoints_it(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def prepared() -> Any:
        model, inner = make()
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer := GaugeProjectedOptimizer(inner, model, every=2), 2
        )
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    def steps(run: Any, first: int) -> None:
        accelerator, model, optimizer, scheduler = run
        for seed in range(first, first + 3):
            g = torch.Generator().manual_seed(seed)
            with accelerator.accumulate(model):
                loss = (model(torch.randn(8, 6, generator=g)) - 1).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    run = prepared()
    steps(run, 0)
    run[0].save_state(str(tmp_path / "state"))
    steps(run, 3)
    resumed = prepared()
    resumed[0].load_state(str(tmp_path / "state"))
    steps(resumed, 3)
    assert same(everything(run[1], run[2]), everything(resumed[1], resumed[2]))
    run[0].free_memory()


def test_closures() -> None:
    model, inner = make(torch.optim.LBFGS, max_iter=4)
    with pytest.raises(ConfigError, match="L-BFGS"):
        GaugeProjectedOptimizer(inner, model)
    optimizer = GaugeProjectedOptimizer(inner, model, moments="keep")
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        losses.append(float(backward(model)))
        return losses[-1]

    first = optimizer.step(closure)
    assert first == losses[0]
    assert len(losses) > 2
    assert losses[-1] < losses[0]
    assert residual(model) < 1e-6


def test_groups_and_gradients() -> None:
    model, inner = make()
    optimizer = GaugeProjectedOptimizer(inner, model)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(inner.param_groups) == 2
    backward(model)
    extra.grad = torch.ones(3)
    optimizer.step()
    assert float(extra.detach()[0]) < 1
    optimizer.zero_grad()
    assert all(p.grad is None for p in (extra, *model.parameters()))


def test_hooks_run_around_the_projection() -> None:
    model, inner = make()
    optimizer = GaugeProjectedOptimizer(inner, model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", residual(model))))
    inner.register_step_post_hook(lambda *_: seen.append(("inner", residual(model))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", residual(model))))
    train(model, optimizer, 1)
    assert [name for name, _ in seen] == ["before", "inner", "after"]
    assert seen[1][1] > 1e-3
    assert seen[2][1] < 1e-6
    optimizer.register_state_dict_post_hook(lambda _, packed: {**packed, "mine": 1})
    assert optimizer.state_dict()["mine"] == 1
    loaded = []
    optimizer.register_load_state_dict_pre_hook(lambda _, s: loaded.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: loaded.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert loaded == ["pre", "post"]


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    model, inner = make(amsgrad=True)
    optimizer = GaugeProjectedOptimizer(inner, model, every=3, start_step=1)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, first=5)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, fresh = make(amsgrad=True)
    again.load_state_dict(state["model"])
    resumed = GaugeProjectedOptimizer(fresh, again, every=3, start_step=1)
    resumed.load_state_dict(state["optimizer"])
    assert resumed.state is fresh.state
    train(again, resumed, 5, first=5)
    assert same(everything(model, optimizer), everything(again, resumed))
    # And a plain optimiser can take it over, or hand over to it.
    _, alone = make(amsgrad=True)
    alone.load_state_dict(state["optimizer"])
    assert len(alone.state) == 4
    resumed.load_state_dict(alone.state_dict())


def test_every_and_start_step() -> None:
    model, inner = make()
    optimizer = GaugeProjectedOptimizer(inner, model, every=2, start_step=3)
    balanced = []
    for seed in range(8):
        train(model, optimizer, 1, seed)
        balanced.append(residual(model) < 1e-6)
    assert balanced == [False, False, False, True, False, True, False, True]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_with_the_model_copied(how: str) -> None:
    model, inner = make()
    optimizer = GaugeProjectedOptimizer(inner, model, 0.5)
    train(model, optimizer, 2)
    together = model, optimizer
    twin, copied = (
        copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))  # noqa: S301
    )
    assert copied.param_groups[0]["params"][0] is next(
        p for p in twin.parameters() if p.requires_grad
    )
    before = everything(model, optimizer)
    train(twin, copied, 2, first=2)
    assert same(everything(model, optimizer), before)
    train(model, optimizer, 2, first=2)
    assert same(everything(model, optimizer), everything(twin, copied))


def test_a_model_that_moves_to_another_dtype_is_followed() -> None:
    model, inner = make()
    optimizer = GaugeProjectedOptimizer(inner, model, 1.0, moments="keep")
    train(model, optimizer, 1)
    for a, b in pairs(model).values():
        a.data, b.data = a.data.double(), b.data.double() * 1.1
    backwardless = [p for pair in pairs(model).values() for p in pair]
    for p in backwardless:
        p.grad = None
    optimizer.step()
    assert all(float(gauge_residual(a, b, 1.0)) < 1e-13 for a, b in pairs(model).values())


def test_what_cannot_work_is_said() -> None:
    model, inner = make()
    with pytest.raises(ConfigError, match="PyTorch"):
        GaugeProjectedOptimizer(model, model)  # type: ignore[arg-type]
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ConfigError, match="does not train the factors"):
        GaugeProjectedOptimizer(stranger, model)
    for options in ({"every": 0}, {"start_step": -1}, {"moments": "drop"}, {"mu": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            GaugeProjectedOptimizer(inner, model, **options)
        with pytest.raises(ConfigError, match=next(iter(options))):
            GaugeProjection(**options)
    with pytest.raises(AttributeError):
        GaugeProjectedOptimizer(inner, model).no_such_thing  # noqa: B018
    pairs(model)["2"][1].data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="'2'"):
        GaugeProjectedOptimizer(inner, model).step()


# -- moments ---------------------------------------------------------------------------------


def one_pair(r: int = 4) -> tuple[nn.Parameter, nn.Parameter]:
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(r, 12, generator=g), 0.3 * torch.randn(9, r, generator=g)
    return nn.Parameter(a), nn.Parameter(b)


class Layer(nn.Module):
    def __init__(self, r: int = 4) -> None:
        super().__init__()
        self.lora_A, self.lora_B = one_pair(r)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lora_A.T @ self.lora_B.T


def test_the_first_moment_moves_as_gradients_do() -> None:
    """With gradients of the same function of B A, at the old factors and at the new ones."""
    layer = Layer()
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))

    def gradients() -> list[Tensor]:
        a, b = layer.lora_A, layer.lora_B
        return list(torch.autograd.grad((x @ a.T @ b.T).sin().sum(), (a, b)))

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    for p, g in zip(layer.parameters(), gradients(), strict=True):
        p.grad = g
    wrapped = GaugeProjectedOptimizer(optimizer, layer, 0.2)
    before = layer.lora_A.detach().clone()
    wrapped.step()  # with a rate of zero: the projection alone
    assert float((layer.lora_A - before).detach().norm() / before.norm()) > 0.1
    for p, g in zip(layer.parameters(), gradients(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], g, atol=1e-5, rtol=1e-5)


def test_adams_moments() -> None:
    layer = Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, amsgrad=True)
    twin = copy.deepcopy((layer, optimizer))
    wrapped = GaugeProjectedOptimizer(optimizer, layer, 0.2)
    for seed in range(3):  # the projection after the last step alone
        for one, opt in ((layer, optimizer if seed < 2 else wrapped), twin):
            g = torch.Generator().manual_seed(seed)
            opt.zero_grad()
            one(torch.randn(5, 12, generator=g)).square().sum().backward()
            opt.step()
    old, state = twin[0], twin[1].state
    R = reference(old.lora_A, old.lora_B, 0.2)
    T = torch.linalg.inv(R)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        m_a, m_b = (state[p][key].double() for p in (old.lora_A, old.lora_B))
        if key == "exp_avg":
            expected = T.T @ m_a, m_b @ R.T
        else:  # v'_ij = Σ_k T_ik² v_kj
            expected = (
                torch.einsum("ik,ik,kj->ij", T, T, m_a),
                torch.einsum("jk,ik,ik->ji", m_b, R, R),
            )
        for p, want in zip((layer.lora_A, layer.lora_B), expected, strict=True):
            got = optimizer.state[p][key].double()
            assert float((got - want).norm() / want.norm()) < 1e-6, key
    for p in layer.parameters():
        kept = optimizer.state[p]
        assert bool((kept["max_exp_avg_sq"] >= kept["exp_avg_sq"] * (1 - 1e-6)).all())
        assert bool((kept["exp_avg_sq"] >= 0).all())
        assert float(kept["step"]) == 3


def test_the_second_moment_is_that_of_uncorrelated_gradients() -> None:
    """Monte Carlo: E[g' ∘ g'] of moved gradients whose rows are independent."""
    layer = Layer(3)
    a, b = layer.lora_A, layer.lora_B
    R = reference(a, b, 0.3)
    T = torch.linalg.inv(R).float()
    g = torch.Generator().manual_seed(0)
    spread = torch.rand(a.shape, generator=g) + 0.1
    samples = torch.randn(40000, *a.shape, generator=g) * spread
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
    for p in (a, b):
        p.grad = torch.zeros_like(p)
    wrapped = GaugeProjectedOptimizer(optimizer, layer, 0.3, start_step=1)
    wrapped.step()
    optimizer.state[a]["exp_avg_sq"].copy_(samples.square().mean(0))
    a.grad = b.grad = None
    wrapped.step()
    expected = (T @ samples).square().mean(0)
    torch.testing.assert_close(optimizer.state[a]["exp_avg_sq"], expected, rtol=0.05, atol=1e-3)


def test_moments_can_be_kept() -> None:
    layer = Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    twin = copy.deepcopy((layer, optimizer))
    wrapped = GaugeProjectedOptimizer(optimizer, layer, moments="keep")
    for one, opt in ((layer, wrapped), twin):
        one(torch.ones(2, 12)).square().sum().backward()
        opt.step()
    for p, q in zip(layer.parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], twin[1].state[q]["exp_avg"])
        assert not torch.equal(p, q)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (arXiv 2302.06675), as short as it gets."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.lerp_(p.grad, 0.01)


KNOWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "asgd": torch.optim.ASGD,
    "lion": Lion,
}


@pytest.mark.parametrize("kind", list(KNOWN))
def test_optimisers_whose_state_can_move(kind: str) -> None:
    layer = Layer()
    optimizer = GaugeProjectedOptimizer(KNOWN[kind](layer.parameters()), layer)
    for seed in range(20):
        optimizer.zero_grad()
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        layer(x).square().mean().backward()
        optimizer.step()
    values = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert all(torch.isfinite(v).all() for v in (*values, *layer.parameters()))
    assert float(gauge_residual(layer.lora_A, layer.lora_B, 4 / 9)) < 1e-6


@pytest.mark.parametrize(
    ("make_one", "key"),
    [
        (torch.optim.Rprop, "prev"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), "momentum_buffer"),
        (torch.optim.Adafactor, "row_var"),
    ],
    ids=["rprop", "rmsprop momentum", "adafactor"],
)
def test_state_that_cannot_move_is_an_error(make_one: Any, key: str) -> None:
    layer = Layer()
    inner = make_one(layer.parameters())
    optimizer = GaugeProjectedOptimizer(inner, layer)
    layer(torch.ones(2, 12)).square().sum().backward()
    with pytest.raises(ConfigError, match=key):
        optimizer.step()
    kept = GaugeProjectedOptimizer(inner, layer, moments="keep")
    kept.step()
    assert kept.residual() < 1e-6


# -- the rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["transport", "keep"])
def test_the_rule_does_what_the_wrapper_does(moments: Any) -> None:
    model, inner = make()
    twin, plain = make()
    wrapper = GaugeProjectedOptimizer(inner, model, every=2, start_step=1, moments=moments)
    rule = GaugeProjection(every=2, start_step=1, moments=moments)
    with Dynamics(twin, rule, plain, observe="manual"):
        train(model, wrapper, 6)
        train(twin, plain, 6)
        assert same(everything(model, inner), everything(twin, plain))
        found = rule.metrics()
    assert found["residual"] < 1e-6 < 1e-4 < found["imbalance"]
    assert 1 < found["condition"] < 100


def test_the_residual_is_no_alarm_before_anything_has_been_learned() -> None:
    """The first steps of LoRA: B = 0 everywhere, then in some layers and directions."""
    model = mlp()
    adapter = ls.attach(model, ls.LoRAConfig(r=3))
    rule = GaugeProjection()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with ls.Dynamics(model, rule, optimizer, observe="manual"):
        for rate in (0.0, 0.1, 0.1):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            backward(model)
            b = pairs(model)["0"][1]
            b.grad[:, 1:] = 0.0  # a direction of one layer is used, and no other
            optimizer.step()
            found = rule.metrics()
            assert found["residual"] < 1e-6
            assert found["deficient"] == (2.0 if rate == 0.0 else 1.0)
            assert (found["imbalance"] > 1e-4) == (rate > 0.0)


def test_the_rule_resumes() -> None:
    def build() -> Any:
        model, inner = make()
        return model, inner, Dynamics(model, GaugeProjection(every=2), inner, observe="manual")

    model, optimizer, _ = build()
    train(model, optimizer, 3)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, first=3)
    again, fresh, _ = build()
    again.load_state_dict(state[0])
    fresh.load_state_dict(state[1])
    train(again, fresh, 3, first=3)
    assert same(everything(model, optimizer), everything(again, fresh))


def test_a_skipped_step_stays_unprojected() -> None:
    model, optimizer = make()
    rule = GaugeProjection()
    sites = [Site("default", name, Factors(a, b, 1.0)) for name, (a, b) in pairs(model).items()]
    rule.bind(SimpleNamespace(sites=sites, optimizer=optimizer))  # type: ignore[arg-type]
    assert "imbalance" not in rule.metrics()
    step = Step(0, Statistics(), optimizer)
    step.skip()
    rule.after_step(step)
    assert residual(model) > 1e-2
    rule.after_step(Step(1, Statistics(), optimizer))
    assert residual(model) < 1e-6


def test_layers_that_cannot_be_projected_are_refused_when_bound() -> None:
    model, optimizer = make()
    a, b = pairs(model)["0"]
    a.requires_grad_(False)
    context: Any = SimpleNamespace(
        sites=[Site("default", "0", Factors(a, b, 1.0))], optimizer=optimizer
    )
    with pytest.raises(ConfigError, match=r"A of layer '0'.*frozen"):
        GaugeProjection().bind(context)
    a.requires_grad_(True)
    context.sites = [Site("default", n, Factors(a, b, 1.0)) for n in ("x", "y")]
    GaugeProjection().bind(context)  # one module under two names
    c = nn.Parameter(b.detach().clone())
    context.sites = [Site("default", n, Factors(a, t, 1.0)) for n, t in (("x", b), ("y", c))]
    with pytest.raises(ConfigError, match="share a factor"):
        GaugeProjection().bind(context)
    a.data, b.data = a.data.bfloat16(), b.data.bfloat16()
    context.sites = [Site("default", "0", Factors(a, b, 1.0))]
    with pytest.raises(ConfigError, match="bfloat16"):
        GaugeProjection().bind(context)
    GaugeProjection(allow_low_precision=True).bind(context)


def test_adapters_that_come_later_are_projected() -> None:
    model, optimizer = make()
    rule = GaugeProjection(1.0)
    context: Any = SimpleNamespace(sites=[], optimizer=optimizer)
    rule.bind(context)
    assert rule.metrics() == {"residual": 0.0}
    rule.after_step(Step(0, Statistics(), optimizer))
    a, b = pairs(model)["2"]
    rule.on_sites([Site("other", "2", Factors(a, b, 1.0))])
    rule.after_step(Step(1, Statistics(), optimizer))
    assert float(gauge_residual(a, b)) < 1e-6
    project_gauge_((a, b), 1.0)
