"""Rules side by side: each keeps what it promises, in whatever order they are given."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.dynamics.gauge import gauge_residual
from tests.models import llama


@pytest.mark.parametrize("order", list(itertools.permutations(("gauge", "budget", "entropy"))))
def test_budget_and_balance_both_hold_after_every_step(order: tuple[str, ...]) -> None:
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    with torch.no_grad():  # from the first step on, nothing is deficient
        for part in adapter.layers().values():
            part["B"].normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    made: dict[str, Any] = {
        "gauge": ls.GaugeProjection(mu=1.0),
        "budget": ls.RotationBudget(max_deg=2.0, per="projection"),
        "entropy": ls.EntropyGovernor(),
    }
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
    with ls.Dynamics(model, [made[name] for name in order], optimizer):
        for _ in range(6):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, part in adapter.layers().items():
                A, B = part["A"].detach().double(), part["B"].detach().double()
                weight = model.get_submodule(name).weight.detach().double().flatten()
                after = weight + (ls.factors(model)[name].scaling * B @ A).flatten()
                cosine = weight @ after / (weight.norm() * after.norm())
                assert float(cosine.clamp(max=1).acos().rad2deg()) <= 2.0 + 1e-5
                assert float(gauge_residual(A, B)) < 1e-5


def test_a_task_adapter_goes_on_with_the_shadow_it_was_born_with() -> None:
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    penalty = ls.OrthogonalityPenalty("shadow", refresh_every=1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
    with ls.Dynamics(model, penalty, optimizer) as driver:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        before = penalty.state_dict()
        ls.attach(model, ls.LoRAConfig(r=2), name="copy")
        driver.context.refresh(["copy"])
        after = penalty.state_dict()
    shadows = [
        {key.partition("/")[2]: value for key, value in state["shadows"].items()}
        for state in (before, after)
    ]
    assert shadows[0].keys() == shadows[1].keys() == set(adapter.targets)
    for name, old in shadows[0].items():
        for key, value in old.items():
            new = shadows[1][name][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(new)), (name, key)


@pytest.mark.parametrize("kind", ["spectral", "shadow"])
def test_a_penalty_can_serve_a_second_run_once_the_first_is_over(kind: Any) -> None:
    penalty = ls.OrthogonalityPenalty(kind)
    for _ in range(2):
        model = llama().train()
        adapter = ls.attach(model, ls.LoRAConfig(r=2))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        with ls.Dynamics(model, [ls.EntropyGovernor(penalty)], optimizer):
            ids = torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(0))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
