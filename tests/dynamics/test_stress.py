"""Stress controller against dense formulas, and the defects of its model made impossible."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.adapter import get_adapter
from lorasmith.dynamics.driver import Dynamics
from lorasmith.dynamics.protocol import Statistics, Step
from lorasmith.dynamics.sites import find_sites
from lorasmith.dynamics.stress import StressController
from lorasmith.dynamics.stress_signals import (
    align_gauge,
    conflict_from_gram,
    difference,
    gradient_gram,
    inner,
    merge_products,
    pull_gradient,
    relative_excess,
    saturate,
)
from lorasmith.dynamics.task_adapters import adapter_name
from lorasmith.errors import ConfigError, TrainingError
from tests.models import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# -- the mathematics, against dense float64 ----------------------------------------------


def _dense(seed: int, r: int = 3, d_in: int = 7, d_out: int = 9, n: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(r, d_in, generator=generator, dtype=torch.float64),
            torch.randn(d_out, r, generator=generator, dtype=torch.float64),
        )
        for _ in range(n)
    ]


@given(seed=st.integers(0, 10_000))
def test_difference_and_inner_product_are_those_of_the_dense_matrices(seed: int) -> None:
    (A, B), (A0, B0), (A1, B1) = _dense(seed, n=3)
    one, other = difference(A, B, A0, B0), difference(A1, B1, A0, B0)
    dense = float(((B @ A - B0 @ A0) * (B1 @ A1 - B0 @ A0)).sum())
    scale = float((B @ A - B0 @ A0).norm() * (B1 @ A1 - B0 @ A0).norm())
    assert abs(float(inner(*one, *other)) - dense) < 1e-12 * scale
    assert torch.allclose(one[1] @ one[0], B @ A - B0 @ A0, atol=1e-12)


def test_small_drift_does_not_cancel() -> None:
    ((A, B),) = _dense(0, r=4, d_in=64, d_out=48)
    A0, B0 = A.float(), B.float()
    A1, B1 = A0 * (1 + 1e-5), B0.clone()
    exact = (B1.double() @ A1.double() - B0.double() @ A0.double()).norm()
    ours = inner(*difference(A1, B1, A0, B0)).sqrt()
    assert abs(float(ours) / float(exact) - 1) < 1e-5
    # The form that is usually written loses it altogether.
    naive = inner(A1, B1) - 2 * inner(A1, B1, A0, B0) + inner(A0, B0)
    assert abs(float(naive.clamp(min=0).sqrt()) / float(exact) - 1) > 0.01


@given(seed=st.integers(0, 10_000), scaling=st.floats(0.1, 4.0))
def test_pull_is_the_gradient_of_the_dense_penalty(seed: int, scaling: float) -> None:
    (A, B), (A0, B0) = _dense(seed, n=2)
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    (0.5 * (scaling * (b @ a - B0 @ A0)).square().sum()).backward()  # type: ignore[no-untyped-call]
    grad_a, grad_b = pull_gradient(A, B, A0, B0, scaling)
    assert torch.allclose(grad_a, a.grad, rtol=1e-10, atol=1e-10)
    assert torch.allclose(grad_b, b.grad, rtol=1e-10, atol=1e-10)


def _gradients(A: Tensor, B: Tensor, n: int, s: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    dense = [torch.randn(len(B), A.shape[1], generator=generator, dtype=A.dtype) for _ in range(n)]
    return [s * B.T @ g for g in dense], [s * g @ A.T for g in dense]


def test_conflict_of_gradients_is_that_of_projected_weight_gradients() -> None:
    ((A, B),) = _dense(3, r=3)
    generator = torch.Generator().manual_seed(5)
    dense = [torch.randn(9, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    U = B @ torch.linalg.pinv(B)
    V = torch.linalg.pinv(A) @ A
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            expected[i, j] = ((U @ dense[i]) * (U @ dense[j])).sum()
            expected[i, j] += ((dense[i] @ V) * (dense[j] @ V)).sum()
    gram = gradient_gram(A, B, *_gradients(A, B, 3), ridge=0.0)
    assert torch.allclose(gram, expected, rtol=1e-9)


@pytest.mark.parametrize("multiple", [1e-3, 1e3])
def test_conflict_of_gradients_does_not_depend_on_the_gauge(multiple: float) -> None:
    ((A, B),) = _dense(3, r=3)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    R = multiple * rotation
    plain = gradient_gram(A, B, *_gradients(A, B, 3))
    moved = R @ A, B @ torch.linalg.inv(R)
    assert torch.allclose(gradient_gram(*moved, *_gradients(*moved, 3)), plain, rtol=1e-9)


def test_conflict_of_gradients_is_finite_where_a_layer_has_learned_nothing() -> None:
    ((A, B),) = _dense(3, r=3)
    A, B = A.float(), torch.zeros(9, 3)
    assert torch.isfinite(gradient_gram(A, B, *_gradients(A, B, 2))).all()


def test_conflict_is_one_minus_the_mean_cosine_and_the_variance_of_deltas() -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 50))
    gram = (vectors @ vectors.T).tolist()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(4, 1)]
    assert conflict_from_gram(gram) == pytest.approx((1 - cosines.mean()) / 2, abs=1e-12)
    # For equally long deltas it is their normalised variance, times T / (2 (T − 1)).
    variance = ((unit - unit.mean(axis=0)) ** 2).sum() / (unit**2).sum()
    assert conflict_from_gram((unit @ unit.T).tolist()) == pytest.approx(variance * 4 / 6, abs=1e-9)
    assert conflict_from_gram([[1.0, -1.0], [-1.0, 1.0]]) == 1.0
    assert conflict_from_gram([[1.0, 0.0], [0.0, 0.0]]) is None
    assert conflict_from_gram([[math.nan, 0.0], [0.0, 1.0]]) is None


@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 4))
def test_merge_is_the_best_approximation_of_the_dense_mean(seed: int, tasks: int) -> None:
    pairs = _dense(seed, n=tasks)
    A, B = [a for a, _ in pairs], [b for _, b in pairs]
    V, US, cut, whole = merge_products(A, B)
    mean = sum(b @ a for a, b in pairs) / tasks
    u, values, vh = np.linalg.svd(mean.numpy())
    best = (u[:, :3] * values[:3]) @ vh[:3]
    assert np.abs((US @ V).numpy() - best).max() < 1e-10
    assert float(cut) == pytest.approx((values[3:] ** 2).sum(), abs=1e-9)
    assert float(whole) == pytest.approx((values**2).sum(), rel=1e-9)
    mean_A = sum(A) / tasks
    new_A, new_B, aligned = align_gauge(V, US, mean_A)
    assert aligned
    assert np.abs((new_B @ new_A).numpy() - best).max() < 1e-7
    # No other gauge of the same product is nearer to the mean of A.
    nearest = np.linalg.lstsq(V.numpy().T, mean_A.numpy().T, rcond=None)[0].T @ V.numpy()
    assert np.abs(new_A.numpy() - nearest).max() < 1e-9


def test_equal_copies_merge_into_themselves_and_a_fresh_layer_stays_alive() -> None:
    ((A, B),) = _dense(1)
    V, US, cut, _ = merge_products([A, A, A], [B, B, B])
    new_A, new_B, _ = align_gauge(V, US, A)
    assert torch.allclose(new_A, A, atol=1e-10)
    assert torch.allclose(new_B, B, atol=1e-10)
    assert float(cut) < 1e-20
    V, US, _, _ = merge_products([A, A], [0 * B, 0 * B])
    new_A, new_B, aligned = align_gauge(V, US, A)
    assert aligned
    assert torch.allclose(new_A, A, atol=1e-10)  # not zero: the layer can still learn
    assert not new_B.any()


def test_a_gauge_that_cannot_be_aligned_keeps_the_product() -> None:
    (A, B), (mean, _) = _dense(1, n=2)
    V, US, _, _ = merge_products([A], [B])
    away = mean - (mean @ V.T) @ V  # nothing of it in the directions of A
    new_A, new_B, aligned = align_gauge(V, US, away)
    assert not aligned
    assert torch.allclose(new_B @ new_A, B @ A, atol=1e-10)
    assert new_A.norm() == pytest.approx(float(away.norm()))


# -- φ on its own: a controller on a single layer, fed with numbers ------------------------


class _Bare:
    """Feeds losses to a controller, without a model behind them."""

    def __init__(self, controller: StressController, tasks: tuple[str, ...] = ()) -> None:
        self.model = nn.Sequential(nn.Linear(4, 4))
        ls.attach(self.model, ls.LoRAConfig(r=2, targets=["0"]))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3)
        self.controller = controller
        self.driver = Dynamics(
            self.model, controller, self.optimizer, tasks=tasks, observe="manual"
        )

    def step(self, loss: float, task: str | None = None) -> None:
        self.driver.select(task)
        self.driver.observe(loss=torch.tensor(loss))
        self.model(torch.ones(1, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, losses: Any) -> StressController:
        """Steps with a constant gradient, the model left out: these runs are long."""
        parameters = self.optimizer.param_groups[0]["params"]
        for loss in losses:
            self.driver.observe(loss=torch.tensor(float(loss)))
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
        return self.controller


def test_the_published_log_is_reproduced() -> None:
    controller = StressController.published()
    _Bare(controller).run([0.5] * 100 + [5.0] * 50 + [0.5] * 200)
    phi = [r.phi for r in controller.history]
    assert f"{phi[99]:.3f}" == "0.333"
    assert f"{phi[149]:.3f}" == "0.827"
    assert f"{phi[200]:.3f}" == "0.371"
    assert f"{phi[349]:.3f}" == "0.333"
    assert controller.history[149].error == pytest.approx(5 / 6, abs=0.005)  # its limit


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_a_healthy_run_is_never_in_mirror(noise: float) -> None:
    generator = random.Random(0)
    losses = [
        (2 + 10 * math.exp(-step / 150)) * (1 + generator.gauss(0, noise)) for step in range(1000)
    ]
    history = _Bare(StressController()).run(losses).history
    assert {r.mode for r in history} == {"single"}
    assert not any(r.event for r in history)
    if noise == 0:
        assert max(r.error for r in history) == 0.0


def test_error_is_scale_free() -> None:
    losses = [2.0] * 30 + [5.0] * 10 + [2.0] * 30
    runs = [
        [r.error for r in _Bare(StressController()).run([s * x for x in losses]).history]
        for s in (1.0, 4.0)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert max(runs[0]) > 0.7
    assert relative_excess(2.0, 0.0, 0.0) == math.inf
    assert saturate(math.inf, 0.25) == 1.0


@given(
    losses=st.lists(
        st.floats(width=32) | st.just(math.nan) | st.just(math.inf) | st.floats(-1e3, 20.0),
        min_size=1,
        max_size=25,
    ),
    kind=st.sampled_from(["relative", "absolute"]),
)
def test_phi_and_its_parts_stay_between_0_and_1(losses: list[float], kind: Any) -> None:
    history = _Bare(StressController(error=kind, every=1)).run(losses).history
    for record in history:
        for value in (record.phi, record.error, record.conflict, record.memory):
            assert 0.0 <= value <= 1.0


def test_one_loss_that_is_not_finite_skips_one_step_and_is_forgotten() -> None:
    bare = _Bare(StressController())
    bare.run([2.0] * 20)
    before = [p.detach().clone() for p in bare.model.parameters()]
    bare.step(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, bare.model.parameters(), strict=True))
    last = bare.controller.history[-1]
    assert last.event == "skip: loss"
    calm = bare.controller.history[-2].phi
    assert last.phi == pytest.approx(calm + 0.1 * (1 - calm))  # one step of full stress
    assert math.isnan(last.loss)
    bare.run([2.0] * 60)
    assert bare.controller.phi <= calm
    moved = zip(before, bare.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_a_gradient_that_is_not_finite_skips_the_step_too() -> None:
    bare = _Bare(StressController())
    bare.run([2.0] * 3)
    before = [p.detach().clone() for p in bare.model.parameters()]
    bare.driver.observe(loss=torch.tensor(2.0))
    bare.model(torch.full((1, 4), math.inf)).sum().backward()
    bare.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, bare.model.parameters(), strict=True))
    assert bare.controller.history[-1].event == "skip: gradient"


def test_nothing_but_losses_that_are_not_finite_is_full_stress() -> None:
    controller = _Bare(StressController()).run([2.0] + [math.nan] * 60)
    assert controller.phi > 0.99
    assert controller.mode == "mirror"


@pytest.mark.parametrize("sigma", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_noise_around_a_threshold_switches_at_most_4_times(sigma: float, seed: int) -> None:
    """L / (1 + L) = 0.7 at L = 7/3: the published form is right on the threshold."""
    generator = random.Random(seed)
    losses = [7 / 3 + generator.gauss(0, sigma) for _ in range(2000)]
    history = _Bare(StressController.published()).run(losses).history
    changes = [r.event for r in history if "mirror" in r.event]
    assert len(changes) <= 4
    # What is avoided: a bare threshold on the same φ.
    if sigma >= 1.0:
        bare = sum(
            (a.phi >= 0.7) != (b.phi >= 0.7)
            for a, b in zip(list(history), list(history)[1:], strict=False)
        )
        assert bare > 20


def test_the_worst_signal_switches_at_most_4_times() -> None:
    controller = StressController.published()
    bare = _Bare(controller)
    for _ in range(2000):  # always what would make it switch
        bare.run([0.0 if controller.mode == "mirror" else 1e6])
    changes = [r.step for r in controller.history if "mirror" in r.event]
    assert 3 <= len(changes) <= 4


def test_groups_keep_their_ratio_and_schedulers_do_not_notice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ls.attach(model, ls.LoRAConfig(r=2, targets=["0", "1"]))
    optimizer = torch.optim.SGD(ls.param_groups(model, 1e-3, lora_plus_ratio=8))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.99**n)
    seen = []
    controller = StressController(pull=0.0)
    driver = Dynamics(model, controller, optimizer, observe="manual")
    pre = optimizer.register_step_pre_hook(
        lambda o, *_: seen.append((controller.mode, [g["lr"] for g in o.param_groups]))
    )
    for number in range(60):
        driver.observe(loss=torch.tensor(2.0 if number < 10 else 30.0))
        model(torch.ones(1, 4)).tanh().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        slow, fast = (g["lr"] for g in optimizer.param_groups)
        assert slow == pytest.approx(1e-3 * 0.99 ** (number + 1))
        assert fast == pytest.approx(8 * slow)
    pre.remove()
    for number, (mode, (slow, fast)) in enumerate(seen):
        assert slow == pytest.approx(1e-3 * 0.99**number * (0.2 if mode == "mirror" else 1.0))
        assert fast == pytest.approx(8 * slow)
    assert {mode for mode, _ in seen} == {"single", "mirror"}


@pytest.mark.parametrize(
    "options",
    [
        {"error": "loss"},
        {"weights": (1.0, 1.0)},
        {"weights": (1.0, -1.0, 0.0)},
        {"rates": (1.0, math.nan, 0.2)},
        {"multi": (0.4, 0.3)},
        {"mirror": (0.5, 1.5)},
        {"smoothing": 0.0},
        {"error_rate": 2.0},
        {"cooldown": 0},
        {"patience": 1.5},
        {"kappa": -1.0},
        {"pull": math.inf},
        {"history_limit": 0},
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        StressController(**options)
    assert caught.value.key == next(iter(options))


def test_without_a_loss_it_says_what_is_missing() -> None:
    bare = _Bare(StressController())
    bare.model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(TrainingError, match="needs the loss"):
        bare.optimizer.step()


# -- history -----------------------------------------------------------------------------


def test_history_goes_to_json_and_csv(tmp_path: Path) -> None:
    controller = _Bare(StressController(history_limit=5)).run([2.0] * 4 + [math.nan] + [2.0] * 2)
    assert [r.step for r in controller.history] == [2, 3, 4, 5, 6]
    controller.save_history(tmp_path / "h.json")
    rows = json.loads((tmp_path / "h.json").read_text())
    assert [r["step"] for r in rows] == [2, 3, 4, 5, 6]
    assert rows[2]["loss"] is None
    assert rows[2]["event"] == "skip: loss"
    controller.save_history(tmp_path / "h.csv")
    with (tmp_path / "h.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["phi"]) for r in table] == [r.phi for r in controller.history]
    assert table[2]["loss"] == ""
    with pytest.raises(ConfigError, match="file is meant"):
        controller.save_history(tmp_path / "h.txt")


def test_the_figure_shows_every_mode(tmp_path: Path) -> None:
    from lorasmith.dynamics.stress_history import StressRecord
    from lorasmith.errors import DataError
    from lorasmith.web.stress_figure import _spans, stress_figure

    modes = ["single"] * 5 + ["multi"] * 4 + ["mirror"] * 3 + ["single"] * 2 + ["mirror"]
    records = [
        StressRecord(i, 0.5, 0.1, 0.2, 0.3, mode, 2.0, "rollback" if i == 10 else "")
        for i, mode in enumerate(modes)
    ]
    assert _spans(records, "multi") == [(5, 8)]
    assert _spans(records, "mirror") == [(9, 11), (14, 14)]
    svg = stress_figure(records, tmp_path / "stress.png")
    for word in ("Multi", "Mirror", "rollback", "stress φ", "optimiser step", "nats per token"):
        assert word in svg
    assert (tmp_path / "stress.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="no history"):
        stress_figure([])


# -- a real model ------------------------------------------------------------------------


def _batch(task: str, step: int, *, rows: int = 4, shuffled: bool = False) -> dict[str, Tensor]:
    """Task "up" counts upwards, "down" downwards: opposite successors of the same tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, 32, (rows, 1), generator=generator)
    sign = 1 if task == "up" else -1
    ids = (start + sign * torch.arange(10)) % 32
    labels = ids.clone()
    if shuffled:
        labels = torch.randint(0, 32, ids.shape, generator=generator)
    return {"input_ids": ids, "labels": labels}


def _llama(kind: str = "lora") -> nn.Module:
    model = llama(layers=1)
    if kind == "peft":
        import peft

        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["o_proj", "up_proj", "down_proj"]
        )
        made: nn.Module = peft.get_peft_model(model, config)
        return made.train()
    settings = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "o_proj", "mlp"]}
    ls.attach(model, ls.DoRAConfig(**settings) if kind == "dora" else ls.LoRAConfig(**settings))
    return model.train()


def _optimizer(model: nn.Module, lr: float = 2e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    task: Any = "up",
    shuffled: Any = lambda step: False,
) -> list[float]:
    losses = []
    for step in steps:
        name = task(step) if callable(task) else task
        batch = _batch(name, step, shuffled=shuffled(step))
        loss = model(**batch, task=[name] * 4).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _events(controller: StressController) -> list[tuple[int, str]]:
    return [(r.step, r.event) for r in controller.history if r.event]


def _alternate(step: int) -> str:
    return "up" if step % 2 else "down"


def _multi_options(**changes: Any) -> dict[str, Any]:
    return {"cooldown": 10, "every": 1, "multi": (0.15, 0.25), **changes}


def _loss_of_both(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(**_batch(t, 999), task=[t] * 4).loss for t in ("up", "down")]
    model.train()
    return float(sum(losses))


@pytest.mark.parametrize("kind", ["lora", "dora", "peft"])
def test_opposed_tasks_get_adapters_of_their_own_and_come_back(kind: str) -> None:
    model = _llama(kind)
    optimizer = _optimizer(model)
    named = dict(model.named_parameters())
    controller = StressController(**_multi_options())
    with Dynamics(model, controller, optimizer) as driver:
        step = 0
        while controller.mode != "multi":
            _train(model, optimizer, range(step, step + 1), _alternate)
            step += 1
            assert step < 300
        assert controller.conflict > 0.5
        up, down = (controller.task_adapter_names[t] for t in ("up", "down"))
        shared = [s.A.detach().clone() for s in controller._shared]
        born = driver.context.find(up)
        assert all(torch.equal(s.A, a) for s, a in zip(born, shared, strict=True))
        first = optimizer.state[born[0].A]
        assert torch.equal(first["exp_avg"], optimizer.state[controller._shared[0].A]["exp_avg"])
        assert first["exp_avg"].data_ptr() != (
            optimizer.state[controller._shared[0].A]["exp_avg"].data_ptr()
        )
        # A step on one task moves its adapter and no other.
        frozen = [s.A.detach().clone() for s in driver.context.find(down)]
        _train(model, optimizer, range(1001, 1002), "up")
        assert not torch.equal(born[0].A, shared[0])
        assert all(
            torch.equal(s.A, a) for s, a in zip(driver.context.find(down), frozen, strict=True)
        )
        assert all(torch.equal(s.A, a) for s, a in zip(controller._shared, shared, strict=True))
        _train(model, optimizer, range(step, step + 60), _alternate)
        assert controller.mode == "multi"
        apart = _loss_of_both(model)
        # Tasks that agree need one adapter: the mean of the deltas, to rank r.
        deltas = {
            s.name: sum((t.factors.delta(torch.float64) for t in found), torch.zeros(1).double())
            / 2
            for s, *found in zip(
                controller._shared,
                driver.context.find(up),
                driver.context.find(down),
                strict=True,
            )
        }
        controller._plan = "multi"
        controller.after_step(SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]
        assert controller.task_adapter_names == {}
        lost = whole = 0.0
        for site in find_sites(model):
            mean = deltas[site.name].numpy()
            u, values, vh = np.linalg.svd(mean)
            best = (u[:, :4] * values[:4]) @ vh[:4]
            ours = site.factors.delta(torch.float64).numpy()
            assert np.abs(ours - best).max() < 1e-5 * np.abs(mean).max()
            lost += float((values[4:] ** 2).sum())
            whole += float((values**2).sum())
        assert controller._merge_error == pytest.approx(math.sqrt(lost / whole), rel=1e-3)
        assert apart < _loss_of_both(model)  # opposite tasks are better off with two adapters
    assert dict(model.named_parameters()).keys() == named.keys()
    assert all(p is named[n] for n, p in model.named_parameters())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_single_multi_single_by_itself() -> None:
    """Tasks that oppose each other, then are the same."""
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController(**_multi_options(multi=(0.22, 0.28)))
    with Dynamics(model, controller, optimizer):
        _train(model, optimizer, range(60), _alternate)
        names = {"enter multi"} & {e for _, e in _events(controller)}
        assert names
        for step in range(60, 400):  # both names now stand for one task
            batch = _batch("up", step)
            name = _alternate(step)
            model(**batch, task=[name] * 4).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if controller.mode == "single":
                break
        assert any(e.startswith("leave multi: error") for _, e in _events(controller))


def test_a_shock_is_mirrored_rolled_back_and_over() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController(cooldown=20, patience=15, every=1)

    def shock(step: int) -> bool:
        return 120 <= step < 160

    with Dynamics(model, controller, optimizer):
        _train(model, optimizer, range(120))
        assert {r.mode for r in controller.history} == {"single"}
        snapshot = controller._snapshot
        assert snapshot is not None
        losses = _train(model, optimizer, range(120, 320), shuffled=shock)
    events = _events(controller)
    kinds = [e for _, e in events]
    assert kinds[0] == "enter mirror"
    assert "rollback" in kinds
    assert kinds[-1] == "leave mirror"
    assert 120 <= events[0][0] < 150
    assert controller.mode == "single"
    plain = _llama()
    other = _optimizer(plain)
    driver = Dynamics(plain, StressController(mirror=(0.98, 1.0), weights=(0, 0, 0)), other)
    _train(plain, other, range(120))
    without = _train(plain, other, range(120, 320), shuffled=shock)
    driver.close()
    # The ten steps after the shock: what was there is still there.
    assert sum(losses[40:50]) < sum(without[40:50])


def test_no_rollback_once_the_loss_is_back() -> None:
    controller = StressController(patience=10)
    bare = _Bare(controller)
    bare.run([2.0] * 30 + [20.0] * 40)
    assert controller.mode == "mirror"
    assert sum("rollback" in r.event for r in controller.history) >= 1
    before = len(controller.history)
    bare.run([2.0] * 40)
    assert controller.history[before + 10].phi > 0.8  # the averages have not noticed yet
    assert not any("rollback" in r.event for r in list(controller.history)[before:])


def test_rollback_brings_values_and_optimiser_state_back() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController(snapshot_every=7)
    with Dynamics(model, controller, optimizer):
        _train(model, optimizer, range(8))  # the last snapshot: before step 7
        kept = copy.deepcopy([p.detach() for g in optimizer.param_groups for p in g["params"]])
        _train(model, optimizer, range(8, 12))
        assert controller._snapshot is not None
        with torch.no_grad():
            controller._snapshot.restore(optimizer)
        reference = _llama()
        second = _optimizer(reference)
        with Dynamics(reference, StressController(snapshot_every=7), second):
            _train(reference, second, range(7))
        for a, b in zip(_trained(optimizer), _trained(second), strict=True):
            assert torch.equal(a, b)
            for key, value in second.state[b].items():
                assert torch.equal(optimizer.state[a][key], value)
        assert any(not torch.equal(a, b) for a, b in zip(kept, _trained(optimizer), strict=True))


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def test_drift_and_pull_on_a_model_are_the_dense_ones() -> None:
    model = _llama()
    optimizer = torch.optim.SGD(_trained(_optimizer(model)), lr=0.0)
    controller = StressController(every=1, kappa=0.3)
    with Dynamics(model, controller, optimizer):
        _train(model, optimizer, range(1))
        then = [s.factors.delta(torch.float64) for s in controller.sites]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in _trained(optimizer):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        now = [s.factors.delta(torch.float64) for s in controller.sites]
        change = math.sqrt(
            sum(float((a - b).square().sum()) for a, b in zip(now, then, strict=True))
        )
        sizes = [math.sqrt(sum(float(x.square().sum()) for x in part)) for part in (now, then)]
        drift = controller._drift()
        assert drift is not None
        assert float(drift) == pytest.approx(change / sum(sizes), rel=1e-5)
        controller._mirror.on = True
        controller._mirror.rest = 5
        loss = model(**_batch("up", 3)).loss
        loss.backward()
        before = [p.grad.clone() for s in controller.sites for p in (s.A, s.B)]
        optimizer.step()
        after = [p.grad for s in controller.sites for p in (s.A, s.B)]
        for i, site in enumerate(controller.sites):
            gap = (now[i] - then[i]) * site.scaling * 0.3  # κ s (ΔW − ΔW_s)
            dense = site.B.double().T @ gap, gap @ site.A.double().T
            for k in (0, 1):
                added = (after[2 * i + k] - before[2 * i + k]).double()
                assert torch.allclose(added, dense[k], rtol=1e-3, atol=1e-6)


def test_rows_of_two_tasks_train_each_their_own_adapter() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController(every=1)
    with Dynamics(model, controller, optimizer, tasks=["up", "down"]) as driver:
        _train(model, optimizer, range(1))
        with torch.no_grad():
            controller._enter_multi()
        up, down = _batch("up", 1), _batch("down", 2)
        both = {k: torch.cat((up[k], down[k])) for k in up}
        model(**both, task=["up"] * 4 + ["down"] * 4).loss.backward()
        mixed = {
            t: driver.context.find(controller.task_adapter_names[t])[0].B.grad.clone()
            for t in ("up", "down")
        }
        optimizer.zero_grad()
        model(**up, task=["up"] * 4).loss.backward()
        alone = driver.context.find(controller.task_adapter_names["up"])[0].B.grad
        assert torch.allclose(mixed["up"], alone / 2, rtol=1e-4, atol=1e-7)
        assert mixed["down"].abs().sum() > 0
        assert driver.context.find(controller.task_adapter_names["down"])[0].B.grad is None


def test_a_peft_model_says_that_it_needs_batches_of_one_task() -> None:
    model = _llama("peft")
    optimizer = _optimizer(model)
    controller = StressController(every=1)
    with Dynamics(model, controller, optimizer, tasks=["up", "down"]):
        _train(model, optimizer, range(1))
        with torch.no_grad():
            controller._enter_multi()
        with pytest.raises(ConfigError, match="each row"):
            model(**_batch("up", 1), task=["up", "down", "up", "down"])


def test_a_task_that_is_told_too_late_is_an_error() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController(every=1)
    with Dynamics(model, controller, optimizer, tasks=["up", "down"], observe="manual") as driver:
        driver.observe(loss=torch.tensor(1.0), task="up")
        model(**_batch("up", 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            controller._enter_multi()
        model(**_batch("down", 1)).loss.backward()
        driver.observe(loss=torch.tensor(1.0), task="down")
        with pytest.raises(TrainingError, match="was not known before"):
            optimizer.step()


def test_plain_lora_modules_have_no_multi() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)
            self.lora_A = nn.Parameter(torch.randn(2, 4))
            self.lora_B = nn.Parameter(torch.zeros(4, 2))

    from lorasmith.dynamics import task_adapters as module

    assert module.task_adapters_of(Layer(), "") is None
    controller = StressController()
    site = SimpleNamespace(A=Layer().lora_A, B=Layer().lora_B)
    context = SimpleNamespace(model=Layer(), sites=(site,), tasks=("a", "b"), adapter="")
    with pytest.raises(ConfigError, match="one adapter for each task"):
        controller.bind(context)
    StressController(task_adapters=False).bind(context)


def test_mixed_steps_are_told_apart_by_their_shares() -> None:
    """Gradients of two tasks, seen only as sums with changing shares."""
    model = nn.Sequential(nn.Linear(4, 4))
    ls.attach(model, ls.LoRAConfig(r=2, targets=["0"]))
    (site,) = find_sites(model)
    optimizer = torch.optim.SGD([site.A, site.B], lr=0.0)
    controller = StressController(every=1)
    with Dynamics(model, controller, optimizer, tasks=["a", "b"], observe="manual"):
        true = {t: [torch.randn_like(site.A), torch.randn_like(site.B)] for t in "ab"}
        generator = random.Random(0)
        for number in range(400):
            share = generator.random()
            site.A.grad, site.B.grad = (
                share * x + (1 - share) * y for x, y in zip(true["a"], true["b"], strict=True)
            )
            statistics = Statistics(
                tokens=torch.tensor(100.0),
                loss=torch.tensor(1.0),
                tasks={
                    "a": (torch.tensor(1.0), torch.tensor(100 * share)),
                    "b": (torch.tensor(1.0), torch.tensor(100 * (1 - share))),
                },
            )
            step = Step(number, statistics, optimizer)
            controller.before_step(step)
            controller.after_step(step)
        for task in "ab":
            for ours, exact in zip(controller._gradients.estimates[task], true[task], strict=True):
                assert torch.allclose(ours, exact, atol=1e-2)


# -- anchor ------------------------------------------------------------------------------


def test_an_anchor_measures_what_is_forgotten() -> None:
    values = iter([2.0, 1.5, 1.5, 3.0, math.nan])
    modes = []

    def anchor() -> float:
        modes.append(bare.model.training)
        return next(values)

    bare = _Bare(StressController(anchor=anchor, anchor_every=1))
    bare.model.train()
    bare.run([1.0] * 5)
    memory = [r.memory for r in bare.controller.history]
    assert memory == pytest.approx([0, 0, 0, 1.0 / 1.25, 1.0])
    assert modes == [False] * 5
    assert bare.model.training


def test_an_anchor_of_batches_is_the_models_loss_on_them() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    batches = [_batch("down", 0), _batch("down", 1)]
    controller = StressController(anchor=batches, anchor_every=20)
    with Dynamics(model, controller, optimizer):
        with torch.no_grad():
            model.eval()
            first = float(sum(model(**b).loss for b in batches) / 2)
            model.train()
        _train(model, optimizer, range(1))
        assert controller._anchor_lowest == pytest.approx(first, rel=1e-5)
        controller._anchor_lowest = first / 2
        with torch.no_grad():
            assert controller._anchor_memory() == pytest.approx(0.8, abs=0.01)  # e = 1


# -- resume ------------------------------------------------------------------------------


def _saved(model: nn.Module, optimizer: torch.optim.Optimizer, names: list[str]) -> bytes:
    values = dict(model.named_parameters())
    file = io.BytesIO()
    torch.save({"model": {n: values[n] for n in names}, "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["single", "multi", "mirror", "multi mirror"])
@pytest.mark.parametrize("kind", ["lora", "peft"])
def test_resume_is_bit_exact_in_every_mode(mode: str, kind: str) -> None:
    options = {"cooldown": 30, "patience": 6, "every": 3, "multi": (0.15, 0.25)}

    def prepare() -> tuple[Any, ...]:
        model = _llama(kind)
        return model, _optimizer(model), StressController(**options)

    def shock(step: int) -> bool:
        return "mirror" in mode and 30 <= step < 50

    def tasks(step: int) -> str:
        return _alternate(step) if "multi" in mode else "up"

    model, optimizer, controller = prepare()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    driver = Dynamics(model, controller, optimizer)
    _train(model, optimizer, range(20), tasks)
    if "multi" in mode and controller.mode != "multi":
        with torch.no_grad():
            controller._enter_multi()
    _train(model, optimizer, range(20, 40), tasks, shock)
    if "mirror" in mode and controller.mode != "mirror":
        with torch.no_grad():
            controller._change_mirror()
    assert controller.mode == mode.rsplit(maxsplit=1)[-1]
    if mode != "single":  # in the middle of a rest
        assert (controller._multi if mode == "multi" else controller._mirror).rest > 0
    file = _saved(model, optimizer, names)
    losses = _train(model, optimizer, range(40, 80), tasks, shock)
    driver.close()

    again, second, restored = prepare()
    loaded = torch.load(io.BytesIO(file), weights_only=True)
    with torch.no_grad():
        values = dict(again.named_parameters())
        for n, value in loaded["model"].items():
            values[n].copy_(value)
    second.load_state_dict(loaded["optimizer"])
    resumed = Dynamics(again, restored, second)
    assert resumed.resumed
    assert _train(again, second, range(40, 80), tasks, shock) == losses
    resumed.close()
    assert list(restored.history) == list(controller.history)
    finals = dict(again.named_parameters())
    for n, p in model.named_parameters():
        assert torch.equal(p, finals[n]), n


def test_a_state_without_task_adapters_takes_them_off_again() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController()
    with Dynamics(model, controller, optimizer, tasks=["up", "down"]):
        _train(model, optimizer, range(3))
        early = copy.deepcopy(optimizer.state_dict())
        with torch.no_grad():
            controller._enter_multi()
        _train(model, optimizer, range(3, 5))
        optimizer.load_state_dict(early)
        assert controller.mode == "single"
        assert list(ls.attached(model)) == ["default"]
        _train(model, optimizer, range(3, 5))


def test_kept_task_adapters_stay_and_can_be_used() -> None:
    model = _llama()
    optimizer = _optimizer(model)
    controller = StressController(keep_tasks=True)
    with Dynamics(model, controller, optimizer, tasks=["up", "down"]):
        _train(model, optimizer, range(3))
        with torch.no_grad():
            controller._enter_multi()
        _train(model, optimizer, range(3, 30), _alternate)
    assert list(ls.attached(model)) == ["default", "default-up", "default-down"]
    assert controller.history[-1].event.startswith("leave multi")
    losses = {}
    for name in ("default", "default-up", "default-down"):
        with ls.use(model, name), torch.no_grad():
            losses[name] = float(model(**_batch("up", 999)).loss)
    assert losses["default-up"] < losses["default"] < losses["default-down"]
    assert all(not p.requires_grad for n, p in model.named_parameters() if "default-" in n)


def test_task_names_become_different_adapter_names() -> None:
    names = {adapter_name("default", t) for t in ("team/a", "team_a", "team-a", "", "é", "x" * 99)}
    assert len(names) == 6
    model = _llama()
    for name in names:
        ls.attach(model, ls.LoRAConfig(r=2, targets=["q_proj"]), name=name)


def test_a_step_without_a_supervised_token_has_no_loss() -> None:
    model = _llama()
    rule = StressController()
    optimizer = _optimizer(model)
    with ls.Dynamics(model, rule, optimizer, observe="manual") as driver:
        for tokens in (5, 5, 0, 5):
            driver.observe(loss=torch.tensor(4.0 if tokens else math.nan), tokens=tokens)
            optimizer.step()
    assert [record.event for record in rule.history] == [""] * 4
    assert rule._baselines[""].fast == 4.0


def test_an_adapter_of_ones_own_is_never_overwritten() -> None:
    """A second run would otherwise overwrite, and then delete, what the first one kept."""
    model = _llama()
    own = ls.attach(model, ls.LoRAConfig(r=2, targets=["q_proj"]), name="default-up")
    before = [p.detach().clone() for p in own.parameters()]
    optimizer = torch.optim.AdamW(get_adapter(model, "default").parameters(), lr=1e-2)
    with pytest.raises(ConfigError, match="'default-up' already"):
        Dynamics(model, StressController(), optimizer, adapter="default", tasks=["up", "down"])
    with Dynamics(model, StressController(), optimizer, adapter="default") as driver:
        driver.select("up")  # one task alone needs no adapter of its own
        with pytest.raises(ConfigError, match="'default-up' already"):
            driver.select("down")
    assert all(map(torch.equal, before, own.parameters()))


def test_resume_in_multi_whatever_the_order_of_the_rules() -> None:
    """Shadows of task adapters can be loaded once the adapters are there."""

    def start() -> tuple[nn.Module, torch.optim.AdamW, list[ls.Dynamic]]:
        model = _llama()
        rules = [
            ls.EntropyGovernor(ls.OrthogonalityPenalty("shadow", refresh_every=2)),
            ls.GaugeProjection(),
            StressController(),
        ]
        return model, _optimizer(model), rules

    model, optimizer, rules = start()
    with Dynamics(model, rules, optimizer, tasks=["up", "down"]):
        _train(model, optimizer, range(4), _alternate)
        with torch.no_grad():
            rules[-1]._enter_multi()  # type: ignore[attr-defined]
        _train(model, optimizer, range(4, 9), _alternate)
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), get_adapter(model, "default").state_dict()), file)
        _train(model, optimizer, range(9, 14), _alternate)
    file.seek(0)
    state, adapter = torch.load(file, weights_only=True)
    again, other, rules = start()
    get_adapter(again, "default").load_state_dict(adapter)
    other.load_state_dict(state)
    with Dynamics(again, rules, other, tasks=["up", "down"]) as driver:
        assert driver.resumed
        _train(again, other, range(9, 14), _alternate)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_history_comes_back_from_its_file(tmp_path: Path) -> None:
    from lorasmith.dynamics.stress_history import StressRecord, read_json, write_json

    good = StressRecord(0, 0.1, 0.2, 0.3, 0.4, "multi", 1.5, "enter multi")
    bad = StressRecord(1, 0.1, 0.2, 0.3, 0.4, "single", float("nan"), "skip: loss")
    write_json([good, bad], tmp_path / "stress.json")
    first, second = read_json(tmp_path / "stress.json")
    assert first == good
    assert math.isnan(second.loss)
