"""What the stress controller notices of a loss, and what it does about a real shock."""

from __future__ import annotations

import copy
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.dynamics.driver import Dynamics
from lorasmith.dynamics.stress import StressController
from lorasmith.dynamics.stress_loss import LossBaseline
from lorasmith.dynamics.stress_modes import Patience, Switch
from tests.models import llama


def _fed(controller: StressController, losses: Sequence[float]) -> StressController:
    """A controller on one small layer whose gradient is always the same."""
    model = nn.Sequential(nn.Linear(4, 4))
    ls.attach(model, ls.LoRAConfig(r=2, targets=["0"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    driver = Dynamics(model, controller, optimizer, observe="manual")
    for loss in losses:
        driver.observe(loss=torch.tensor(float(loss)))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return controller


def _course(
    steps: int, *, noise: float, time: float, seed: int = 0, ratio: float = 6.0
) -> list[float]:
    """1 + (ratio − 1) exp(−t / time), times log-normal noise of that coefficient of variation."""
    generator = random.Random(seed)
    width = math.sqrt(math.log1p(noise**2))
    return [
        (1 + (ratio - 1) * math.exp(-t / time)) * math.exp(generator.gauss(-(width**2) / 2, width))
        for t in range(steps)
    ]


def _shocked(losses: list[float], start: int, height: float) -> list[float]:
    return losses[:start] + [height * x for x in losses[start:]]


def _entered(controller: StressController) -> list[int]:
    return [r.step for r in controller.history if "enter mirror" in r.event]


# -- E ------------------------------------------------------------------------------------


def _error_by_the_formula(losses: Sequence[float]) -> list[float]:
    """The specification, written once more, with t from 1."""
    f = b = losses[0]
    sigma = E = 0.0
    found = []
    for t, loss in enumerate(losses, start=1):
        if t > 1:
            c = 0.1 if E >= 0.5 else 1.0
            sigma += c * max(0.02, 1 / (t - 1)) * (abs(loss - losses[t - 2]) - sigma)
        m = statistics.median(losses[max(0, t - 3) : t])
        f += max(0.2, 1 / t) * (m - f)
        unit = abs(b) + sigma
        e = max(0.0, f - b - sigma) / unit if unit > 0 else 0.0
        E = e / (0.06 + e)
        c = 0.1 if E >= 0.5 else 1.0
        b = f if f < b else b + c * max(0.02, 1 / t) * (f - b)
        found.append(E)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_error_and_stress_are_what_the_formulas_say(noise: float) -> None:
    losses = _shocked(_course(200, noise=noise, time=15), 40, 2.5)
    losses[120:] = [x / 2.5 for x in losses[120:]]
    history = list(_fed(StressController(), losses).history)
    exact = [float(torch.tensor(x)) for x in losses]  # as the device has them
    assert [r.error for r in history] == pytest.approx(_error_by_the_formula(exact), abs=1e-9)
    assert max(r.error for r in history) > 0.7
    phi = 0.0
    before = (0.0, 0.0, 0.0)
    for number, record in enumerate(history):
        now = (record.conflict, record.error, record.memory)
        x = 0.5 * now[0] + now[1] + 0.15 * now[2]
        x += sum(0.25 * max(0.0, a - b) for a, b in zip(now, before, strict=True))
        phi += (0.1 if number else 1.0) * (min(1.0, x) - phi)
        assert record.phi == pytest.approx(phi, abs=1e-12)
        before = now


@given(
    losses=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=40),
    rate=st.floats(0.01, 1.0),
)
def test_error_is_between_0_and_1_for_all_finite_losses(losses: list[float], rate: float) -> None:
    baseline = LossBaseline(losses[0], losses[0])
    for loss in losses:
        baseline.update(loss, rate)
        assert 0.0 <= baseline.error <= 1.0
        assert 0.0 <= baseline.now <= 1.0
        assert math.isfinite(baseline.slow)
        assert math.isfinite(baseline.spread)


@given(falls=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60), start=st.floats(-10.0, 20.0))
def test_a_loss_that_only_falls_gives_nothing(falls: list[float], start: float) -> None:
    baseline = LossBaseline(start, start)
    loss = start
    for fall in falls:
        baseline.update(loss, 0.2)
        # Rounding can leave f a hair above b where the loss stands still.
        assert baseline.error < 1e-9
        loss -= fall


def test_one_outlier_is_not_a_shock_and_a_new_level_can_be_accepted() -> None:
    baseline = LossBaseline(2.0, 2.0)
    for loss in [2.0] * 30 + [20.0] + [2.0] * 5:
        baseline.update(loss, 0.2)
        assert baseline.error == 0.0
    for _ in range(20):
        baseline.update(6.0, 0.2)
    assert baseline.error > 0.9
    again = LossBaseline.from_state(baseline.state_dict())
    assert again == baseline
    baseline.accept()
    assert baseline.error == 0.0
    baseline.update(6.0, 0.2)
    assert baseline.error == 0.0


# -- what is noticed -----------------------------------------------------------------------


@pytest.mark.parametrize("start", [30, 100, 500])
@pytest.mark.parametrize(
    ("noise", "height"), [(0.0, 2.0), (0.1, 2.0), (0.0, 3.0), (0.1, 3.0), (0.2, 3.0)]
)
def test_a_loss_that_doubles_and_stays_is_in_mirror_within_25_steps(
    noise: float, height: float, start: int
) -> None:
    for seed in range(3):
        losses = _course(start + 40, noise=noise, time=6, seed=seed)
        controller = _fed(StressController(), _shocked(losses, start, height))
        (step, *_) = _entered(controller)
        assert start < step <= start + 25


@pytest.mark.parametrize("time", [5, 20, 150, 500])
@pytest.mark.parametrize("noise", [0.1, 0.3, 0.5])
def test_healthy_runs_stay_out_of_mirror(noise: float, time: int) -> None:
    for seed in range(3):
        losses = [2 * x for x in _course(600, noise=noise, time=time, seed=seed)]  # 12 → 2
        history = _fed(StressController(), losses).history
        assert not any(r.mode == "mirror" or r.event for r in history)


def test_lone_spikes_on_a_loss_near_zero_stay_out_of_mirror() -> None:
    generator = random.Random(0)
    losses = [0.02 + 2 * math.exp(-t / 15) + 3 * (generator.random() < 0.02) for t in range(600)]
    assert sum(x > 3 for x in losses) > 5
    assert not _entered(_fed(StressController(), losses))


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_noise_about_the_threshold_of_the_relative_error_switches_at_most_4_times(
    sigma: float,
) -> None:
    """The loss goes up and down so that φ keeps crossing the thresholds of Mirror."""
    for seed in range(2):
        generator = random.Random(seed)
        losses = [
            max(0.01, (1.0 if t % 90 < 45 else 2.0) * (1 + generator.gauss(0, 0.3 * sigma)))
            for t in range(2000)
        ]
        history = list(_fed(StressController(cooldown=100), losses).history)
        crossings = sum((a.phi >= 0.7) != (b.phi >= 0.7) for a, b in itertools.pairwise(history))
        switches = sum("mirror" in r.event for r in history)
        assert 1 <= switches <= 4
        if sigma < 1:
            assert crossings > 10  # what a bare threshold would do


# -- modes ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), width=st.floats(0.01, 0.6))
def test_a_switch_changes_at_most_4_times_in_2000_steps(seed: int, width: float) -> None:
    generator = random.Random(seed)
    switch = Switch(0.55, 0.7, 100)
    changes = 0
    for _ in range(2000):
        switch.tick()
        if switch.wants(generator.gauss(0.63, width), may_enter=True):
            switch.change()
            changes += 1
    assert changes <= 4


def test_patience_asks_for_a_fall_of_002() -> None:
    patience = Patience(3)
    patience.start(0.9)
    assert [patience.ended(x) for x in (0.9, 0.9, 0.89)] == [False, False, True]
    assert [patience.ended(x) for x in (0.9, 0.9, 0.86)] == [False] * 3  # 0.89 → 0.86
    assert [patience.ended(x) for x in (0.9, 0.9, 0.85)] == [False, False, True]


def test_a_level_that_stays_is_normal_after_three_returns() -> None:
    controller = _fed(StressController(patience=20), [2.0] * 60 + [6.0] * 200)
    events = [(r.step, r.event) for r in controller.history if r.event]
    assert [e for _, e in events] == [
        "enter mirror",
        "rollback",
        "rollback",
        "rollback",
        "accept",
        "leave mirror",
    ]
    steps = [s for s, _ in events]
    assert [b - a for a, b in itertools.pairwise(steps[:5])] == [20] * 4
    assert controller.phi < 0.1
    # The new level has a baseline of its own: another shock is seen again.
    assert controller._baselines[""].slow == pytest.approx(6.0, rel=1e-3)


def test_what_an_anchor_remembers_and_the_published_form_are_never_given_up() -> None:
    values = iter([1.0] * 6 + [4.0] * 1000)
    anchored = StressController(patience=20, anchor=lambda: next(values), anchor_every=10)
    _fed(anchored, [2.0] * 60 + [6.0] * 300)
    published = _fed(StressController.published(patience=20), [0.5] * 60 + [50.0] * 300)
    for controller in (anchored, published):
        events = [r.event for r in controller.history if r.event]
        assert events[0] == "enter mirror"
        assert len(events) > 10
        assert set(events[1:]) == {"rollback"}


# -- a real shock --------------------------------------------------------------------------

BEFORE, SHOCK, AFTER = 80, 60, 60


def _batch(step: int, *, wrong: bool = False) -> dict[str, Tensor]:
    """Counting upwards; in the shock each row has the labels of another one."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = (torch.randint(0, 32, (8, 1), generator=generator) + torch.arange(10)) % 32
    labels = ids.clone()
    if wrong:
        labels = labels.roll(1, dims=0)
        labels = labels[:, torch.randperm(10, generator=generator)]
    return {"input_ids": ids, "labels": labels}


def _run(
    rate: float,
    controller: StressController | None,
    watch: Callable[[int, nn.Module, torch.optim.Optimizer], None] = lambda *_: None,
) -> list[float]:
    """Held-out losses after each step, one number for each."""
    model = llama(layers=1)
    adapter = ls.attach(
        model, ls.LoRAConfig(r=4, alpha=8, targets=["q_proj", "v_proj", "o_proj", "mlp"])
    )
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    driver = None if controller is None else Dynamics(model, controller, optimizer)
    held_out = []
    for step in range(BEFORE + SHOCK + AFTER):
        watch(step, model, optimizer)
        model.train()
        model(**_batch(step, wrong=BEFORE <= step < BEFORE + SHOCK)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            held_out.append(float(model(**_batch(99_999)).loss))
    if driver is not None:
        driver.close()
    return held_out


def _recovery(held_out: Sequence[float]) -> int:
    """Steps from the end of the shock until the loss is within 5 % of that from before it."""
    level = 1.05 * held_out[BEFORE - 1]
    after = held_out[BEFORE + SHOCK - 1 :]
    return next((i for i, loss in enumerate(after) if loss <= level), len(after))


@pytest.mark.parametrize("rate", [5e-3, 2e-2])
def test_after_shuffled_labels_the_held_out_loss_is_back_at_least_as_soon_as_plain(
    rate: float,
) -> None:
    controller = StressController()
    guarded = _run(rate, controller)
    plain = _run(rate, None)
    (entered,) = _entered(controller)
    assert BEFORE < entered <= BEFORE + 25
    same = BEFORE  # until stress rises they are the same run
    assert guarded[:same] == plain[:same]
    end = BEFORE + SHOCK - 1
    assert plain[end] > 1.5 * plain[BEFORE - 1]  # the shock is one
    assert guarded[end] < plain[end]
    assert _recovery(guarded) <= _recovery(plain)
    assert _recovery(guarded) < AFTER
    assert guarded[-1] <= 1.1 * plain[-1]  # and what comes after is not worse for it


def test_mirror_takes_a_fifth_of_the_rate_and_goes_back_to_before_the_shock() -> None:
    states: list[Any] = []
    moves: list[float] = []

    def watch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        now = [p.detach().clone() for p in parameters]
        moments = [copy.deepcopy(optimizer.state.get(p, {})) for p in parameters]
        if states:
            moves.append(
                math.sqrt(
                    sum(
                        float((a - b).square().sum())
                        for a, b in zip(now, states[-1][0], strict=True)
                    )
                )
            )
        states.append((now, moments))
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2]  # for the step alone

    controller = StressController()
    _run(1e-2, controller, watch)
    history = list(controller.history)
    (entered,) = _entered(controller)
    back = [r.step for r in history if "rollback" in r.event]
    assert back
    assert back[0] == entered + 50
    # What it went back to is a state from before the shock, or from its first three steps.
    restored, moments = states[back[0] + 1]
    match = [
        step
        for step, (values, _) in enumerate(states[: back[0]])
        if all(map(torch.equal, values, restored))
    ]
    assert match
    assert BEFORE - 10 <= match[-1] <= BEFORE + 3
    for kept, now in zip(states[match[-1]][1], moments, strict=True):
        for key, value in kept.items():
            assert torch.equal(now[key], value)
    # AdamW's steps are as long as the rate says: a fifth, from one step to the next.
    before = statistics.mean(moves[entered - 3 : entered + 1])
    within = statistics.mean(moves[entered + 1 : entered + 5])
    assert within / before == pytest.approx(0.2, rel=0.25)
    assert history[entered].mode == "single"
    assert history[entered + 1].mode == "mirror"
