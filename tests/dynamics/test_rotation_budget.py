"""The rotation budget: nothing that is watched ever turns further, and how much it costs nobody."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.heads import head_layout
from lorasmith.dynamics import Dynamics, Site, Statistics, Step, find_sites
from lorasmith.dynamics.rotation_budget import RotationBudget
from lorasmith.errors import ConfigError
from tests.models import distilbert, gpt2, llama, mlp, randomise, run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def weight_after(site: Site) -> Tensor:
    """W', dense and in float64, from the tensors as they are."""
    f = site.factors
    assert f.base is not None
    W = f.base.weight.double()
    delta = f.scaling * f.B.detach().double() @ f.A.detach().double()
    if f.A0 is not None and f.B0 is not None:
        delta -= f.scaling * f.B0.double() @ f.A0.double()
    after = W + delta
    if site.magnitude is not None:
        after = after * (site.magnitude.detach().double() / after.norm(dim=1))[:, None]
    return after


def degrees(before: Tensor, after: Tensor) -> float:
    a, b = before.double().flatten().numpy(), after.flatten().numpy()
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def cut(weight: Tensor, count: int, axis: str) -> tuple[Tensor, ...]:
    return torch.chunk(weight, count, dim=0 if axis == "out" else 1)


def dense_angles(model: nn.Module, per: str) -> dict[str, list[float]]:
    """Site → degrees of each unit, by forming everything."""
    layouts = head_layout(model) if per == "head" else {}
    found = {}
    for site in find_sites(model):
        assert site.factors.base is not None
        layout = layouts.get(site.name)
        count, axis = (1, "out") if layout is None else (layout.count, layout.axis)
        W, after = site.factors.base.weight, weight_after(site)
        pairs = zip(cut(W, count, axis), cut(after, count, axis), strict=True)
        found[site.key] = [degrees(w, v) for w, v in pairs]
    return found


def bound(rule: RotationBudget, model: nn.Module) -> RotationBudget:
    context: Any = SimpleNamespace(model=model, sites=find_sites(model))
    rule.bind(context)
    return rule


def with_peft(model: nn.Module, **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules="all-linear", **options)
    found: nn.Module = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    return found


def ours(model: nn.Module, config: Any) -> nn.Module:
    ls.attach(model, config)
    return model


SETUPS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: ours(llama(), ls.LoRAConfig(r=4, alpha=8)),
    "llama-dora": lambda: ours(llama(), ls.DoRAConfig(r=4)),
    "llama-pissa": lambda: ours(llama(), ls.LoRAConfig(r=4, init="pissa")),
    "llama-dora-pissa": lambda: ours(llama(), ls.DoRAConfig(r=4, init="pissa")),
    "llama-bf16": lambda: ours(llama().bfloat16(), ls.LoRAConfig(r=4)),
    "gpt2": lambda: ours(gpt2(), ls.LoRAConfig(r=4, scaling="rslora")),
    "gpt2-dora": lambda: ours(gpt2(), ls.DoRAConfig(r=4)),
    "distilbert": lambda: ours(distilbert(), ls.LoRAConfig(r=4)),
    "mlp": lambda: ours(mlp(), ls.LoRAConfig(r=2)),
    "peft-lora": lambda: with_peft(llama()),
    "peft-rslora": lambda: with_peft(gpt2(), use_rslora=True, fan_in_fan_out=True),
    "peft-dora": lambda: with_peft(llama(), use_dora=True),
    "peft-bf16": lambda: with_peft(llama()).bfloat16(),
}


NAMES = list(SETUPS)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return SETUPS[request.param]()


@pytest.mark.filterwarnings("ignore:The heads of Sequential")
@pytest.mark.parametrize("per", ["head", "projection"])
def test_angles_against_dense(model: nn.Module, per: Any) -> None:
    randomise(adapter_parameters(model))
    rule = bound(RotationBudget(per=per), model)
    found, expected = rule.angles(), dense_angles(model, per)
    assert found.keys() == expected.keys()
    for key, angles in expected.items():
        assert found[key].tolist() == pytest.approx(angles, rel=1e-5)
    flat = [x for angles in expected.values() for x in angles]
    metrics = rule.metrics()
    assert metrics["max_deg"] == pytest.approx(max(flat), rel=1e-5)
    assert metrics["mean_deg"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert metrics["units"] == len(flat)
    assert metrics["at_budget"] == sum(x >= 4.95 for x in flat)


@pytest.mark.filterwarnings("ignore:The heads of Sequential")
@pytest.mark.parametrize("per", ["head", "projection"])
@pytest.mark.parametrize("limit", [0.3, 5.0, 60.0])
def test_projection_brings_every_unit_to_its_budget(
    model: nn.Module, per: Any, limit: float
) -> None:
    randomise(adapter_parameters(model), scale=0.5)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = dense_angles(model, per)
    rule = bound(RotationBudget(limit, per=per), model)
    rule.project()
    after = dense_angles(model, per)
    low_precision = find_sites(model)[0].A.dtype == torch.bfloat16
    shared = [
        s.key for s in find_sites(model) if s.factors.A0 is not None or s.magnitude is not None
    ]
    beyond = 0
    for key, angles in before.items():
        assert max(after[key]) <= limit, key
        for old, new in zip(angles, after[key], strict=True):
            beyond += old > limit
            if key in shared:  # units that share what moves are moved alike
                continue
            if old > limit:
                assert new >= limit * (0.95 if low_precision else 0.999), key
            else:
                assert new == pytest.approx(old, rel=1e-9), key
        # Whoever shares, one of them is at the budget.
        if max(angles) > limit and not low_precision:
            assert max(after[key]) >= limit * 0.999, key
    assert beyond or limit == 60
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name
    snapshot = [p.clone() for p in adapter_parameters(model)]
    rule.project()  # nothing is left to do
    assert all(map(torch.equal, snapshot, adapter_parameters(model)))


@pytest.mark.parametrize(
    "name", ["llama", "llama-dora", "llama-pissa", "gpt2", "peft-lora", "peft-dora"]
)
def test_the_guarantee_holds_after_every_step_of_a_wild_training(name: str) -> None:
    model = SETUPS[name]().train()
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.3)
    rule = RotationBudget(2.0)
    batch = {"input_ids": torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))}
    largest = []
    with Dynamics(model, rule, optimizer):
        for _ in range(12):
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            largest.append(max(max(a) for a in dense_angles(model, "head").values()))
    assert max(largest) <= 2.0
    assert min(largest) > 1.9  # and without the budget it would have gone far beyond
    free = SETUPS[name]().train()
    optimizer = torch.optim.AdamW(adapter_parameters(free), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        free(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    assert max(max(a) for a in dense_angles(free, "head").values()) > 20


def test_what_is_within_its_budget_is_not_touched() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4))
    randomise(adapter_parameters(model), scale=0.01)
    site = next(s for s in find_sites(model) if s.name.endswith("q_proj"))
    with torch.no_grad():
        site.B[4:8] *= 100  # head 1 of four
    B, A = site.B.clone(), site.A.clone()
    others = {s.key: (s.A.clone(), s.B.clone()) for s in find_sites(model) if s.key != site.key}
    bound(RotationBudget(5.0), model).project()
    assert torch.equal(site.A, A)
    assert torch.equal(site.B[:4], B[:4])
    assert torch.equal(site.B[8:], B[8:])
    assert not torch.equal(site.B[4:8], B[4:8])
    for other in find_sites(model):
        if other.key != site.key:
            assert torch.equal(other.A, others[other.key][0])
            assert torch.equal(other.B, others[other.key][1])


def test_o_is_cut_by_columns() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4))
    randomise(adapter_parameters(model), scale=0.01)
    site = next(s for s in find_sites(model) if s.name.endswith("o_proj"))
    with torch.no_grad():
        site.A[:, 8:12] *= 100
    A, B = site.A.clone(), site.B.clone()
    bound(RotationBudget(5.0), model).project()
    assert torch.equal(site.B, B)
    changed = (site.A != A).any(dim=0)
    assert changed.tolist() == [8 <= i < 12 for i in range(16)]


def test_one_head_beyond_is_seen_although_the_projection_is_not() -> None:
    """EgoRA's heads are projections: one head far out hides in the mean of all."""
    model = ours(llama(), ls.LoRAConfig(r=4))
    site = next(s for s in find_sites(model) if s.name.endswith("q_proj"))
    with torch.no_grad():
        site.B[:4] = 0.3
    by_head = max(dense_angles(model, "head")[site.key])
    whole = dense_angles(model, "projection")[site.key][0]
    limit = (by_head + whole) / 2
    coarse = bound(RotationBudget(limit, per="projection"), model)
    B = site.B.clone()
    coarse.project()
    assert torch.equal(site.B, B)
    bound(RotationBudget(limit), model).project()
    assert max(dense_angles(model, "head")[site.key]) == pytest.approx(limit, rel=1e-3)


def test_scaling_alone_is_left_alone() -> None:
    model = mlp()
    with torch.no_grad():
        layer: Any = model[0]  # type: ignore[index]
        layer.weight.copy_(torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 7.0)))
    ls.attach(model, ls.LoRAConfig(r=2, alpha=2))
    site = find_sites(model)[0]
    with torch.no_grad():
        site.A.zero_()
        site.A[0] = torch.arange(1.0, 7.0)
        site.B.zero_()
        site.B[:, 0] = 0.5 * torch.arange(1.0, 9.0)
    B = site.B.clone()
    bound(RotationBudget(1.0, per="projection"), model).project()
    assert torch.equal(site.B, B)


@hypothesis_settings(max_examples=40)
@given(
    st.sampled_from(["llama", "llama-dora", "llama-pissa", "llama-dora-pissa", "gpt2-dora"]),
    st.integers(0, 1000),
    st.floats(0.02, 85),
    st.floats(0.01, 5),
)
def test_the_bound_holds_whatever_the_factors(
    name: str, seed: int, limit: float, scale: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _built(name)
    randomise(adapter_parameters(model), scale=scale, seed=seed)
    bound(RotationBudget(limit), model).project()
    assert max(max(a) for a in dense_angles(model, "head").values()) <= limit


_BUILT: dict[str, nn.Module] = {}


def _built(name: str) -> nn.Module:
    if name not in _BUILT:
        _BUILT[name] = SETUPS[name]()
    return copy.deepcopy(_BUILT[name])


# -- penalty ---------------------------------------------------------------------------------


def dense_penalty(
    model: nn.Module, limit: float, per: str
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Value and gradients of the penalty by autograd of the dense formula in float64."""
    layouts = head_layout(model) if per == "head" else {}
    total = torch.zeros((), dtype=torch.float64)
    leaves = {}
    for site in find_sites(model):
        f = site.factors
        assert f.base is not None
        W = f.base.weight.double()
        A, B = (t.detach().double().requires_grad_(True) for t in (f.A, f.B))
        leaves[site.key] = [A, B]
        after = W + f.scaling * B @ A
        if f.A0 is not None and f.B0 is not None:
            after = after - f.scaling * f.B0.double() @ f.A0.double()
        if site.magnitude is not None:
            m = site.magnitude.detach().double().requires_grad_(True)
            leaves[site.key].append(m)
            after = after * (m / after.norm(dim=1))[:, None]
        layout = layouts.get(site.name)
        count, axis = (1, "out") if layout is None else (layout.count, layout.axis)
        for w, v in zip(cut(W, count, axis), cut(after, count, axis), strict=True):
            theta = torch.acos((w * v).sum() / (w.norm() * v.norm()))
            total = total + (torch.rad2deg(theta) / limit - 1).clamp(min=0) ** 2
    flat = [t for group in leaves.values() for t in group]
    gradients = iter(torch.autograd.grad(total, flat))
    return total.detach(), {k: [next(gradients) for _ in group] for k, group in leaves.items()}


@pytest.mark.filterwarnings("ignore:The heads of Sequential")
@pytest.mark.parametrize("per", ["head", "projection"])
def test_penalty_and_its_gradient_against_dense(model: nn.Module, per: Any) -> None:
    tolerance = 1e-2 if find_sites(model)[0].A.dtype == torch.bfloat16 else 1e-5
    randomise(adapter_parameters(model), scale=0.1)
    limit = 0.7 * max(max(a) for a in dense_angles(model, per).values())
    rule = bound(RotationBudget(limit, per=per, kind="penalty", weight=3.0), model)
    value, expected = dense_penalty(model, limit, per)
    assert value > 0
    assert rule.value().item() == pytest.approx(value.item(), rel=1e-5)
    parameters = adapter_parameters(model)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    rule.before_step(Step(0, Statistics(), torch.optim.SGD(parameters)))
    scale = max(float(g.abs().max()) for group in expected.values() for g in group)
    for site in find_sites(model):
        tensors = [site.A, site.B] + ([site.magnitude] if site.magnitude is not None else [])
        for tensor, gradient in zip(tensors, expected[site.key], strict=True):
            assert tensor.grad is not None
            error = (tensor.grad.double() - 3 * gradient).abs().max()
            assert float(error) <= tolerance * 3 * scale


def test_penalty_is_zero_within_the_budget_and_at_the_start() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4))
    rule = bound(RotationBudget(5.0, kind="penalty"), model)
    parameters = adapter_parameters(model)
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert rule.value().item() == 0
    rule.before_step(Step(0, Statistics(), torch.optim.SGD(parameters)))
    assert all(bool((p.grad == 1).all()) for p in parameters if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "peft-dora"])
def test_the_penalty_pulls_back(name: str) -> None:
    model = SETUPS[name]()
    randomise(adapter_parameters(model), scale=0.3)
    parameters = adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    rule = RotationBudget(10.0, kind="penalty")
    values = []
    with Dynamics(model, rule, optimizer):
        for _ in range(20):
            for p in parameters:
                p.grad = torch.zeros_like(p)
            values.append(rule.value().item())
            optimizer.step()
    assert values[-1] < 0.5 * values[0]
    assert all(b < a for a, b in itertools.pairwise(values))


def test_the_entropy_governor_drives_it() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4)).train()
    randomise(adapter_parameters(model), scale=0.3)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=1e-3)
    rule = RotationBudget(5.0, kind="penalty")
    batch = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    before = bound(RotationBudget(5.0, kind="penalty"), model).value().item()
    with Dynamics(model, ls.EntropyGovernor(rule), optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
    assert rule.value().item() < before
    with pytest.raises(ConfigError, match="A projection has no weight"):
        ls.EntropyGovernor(RotationBudget())


# -- what is refused, and what is said --------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_deg": 0},
        {"max_deg": 90},
        {"max_deg": math.nan},
        {"max_deg": True},
        {"per": "layer"},
        {"kind": "both"},
        {"weight": 0},
        {"weight": math.inf},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        RotationBudget(**options)
    assert error.value.key == next(iter(options))


def test_a_site_without_a_weight_is_refused() -> None:
    model = ours(mlp(), ls.LoRAConfig(r=2))
    from dataclasses import replace

    bare = [replace(s, factors=replace(s.factors, base=None)) for s in find_sites(model)]
    context: Any = SimpleNamespace(model=model, sites=bare)
    with pytest.raises(ConfigError, match="weight under the adapter on 0 is not known"):
        RotationBudget(per="projection").bind(context)


def test_pefts_pissa_is_refused() -> None:
    model = with_peft(llama(), init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="moves a part of W"):
        bound(RotationBudget(), model)


def test_a_budget_below_the_noise_floor_is_said() -> None:
    model = ours(llama().bfloat16(), ls.LoRAConfig(r=4))
    with pytest.warns(UserWarning, match="noise floor"):
        bound(RotationBudget(0.05), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound(RotationBudget(0.5), model)
        bound(RotationBudget(0.05), ours(llama(), ls.LoRAConfig(r=4)))


def test_a_model_without_known_heads_is_said() -> None:
    with pytest.warns(UserWarning, match="heads of Sequential are not known"):
        bound(RotationBudget(), ours(mlp(), ls.LoRAConfig(r=2)))


def test_a_weight_that_changes_is_read_anew() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4))
    randomise(adapter_parameters(model), scale=0.1)
    rule = bound(RotationBudget(5.0), model)
    rule.project()
    with torch.no_grad():
        for site in find_sites(model):
            assert site.factors.base is not None
            site.factors.base.weight.mul_(0.1)
    assert max(max(a) for a in dense_angles(model, "head").values()) > 20
    rule.project()
    assert max(max(a) for a in dense_angles(model, "head").values()) <= 5.0


def test_resume_needs_no_state() -> None:
    """Two runs, one of them taken up from the other's checkpoint, end bit for bit alike."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    one = ours(llama(), ls.LoRAConfig(r=4)).train()
    optimizer = torch.optim.AdamW(adapter_parameters(one), lr=0.05)
    with Dynamics(one, RotationBudget(3.0), optimizer):
        steps(one, optimizer, range(4))
        kept = copy.deepcopy((one.state_dict(), optimizer.state_dict()))
        steps(one, optimizer, range(4, 8))
    two = ours(llama(), ls.LoRAConfig(r=4)).train()
    optimizer = torch.optim.AdamW(adapter_parameters(two), lr=0.05)
    two.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    with Dynamics(two, RotationBudget(3.0), optimizer):
        steps(two, optimizer, range(4, 8))
    assert all(map(torch.equal, adapter_parameters(one), adapter_parameters(two)))


def test_the_output_still_comes_from_the_factors() -> None:
    """The budget leaves no trace but in A, B and m: what is saved is what was measured."""
    model = ours(llama(), ls.DoRAConfig(r=4)).eval()
    randomise(adapter_parameters(model), scale=0.3)
    bound(RotationBudget(5.0), model).project()
    batch = {"input_ids": torch.arange(7).view(1, 7)}
    with torch.no_grad():
        before = run(model, batch)
    ls.fuse(model)
    with torch.no_grad():
        assert torch.allclose(run(model, batch), before, atol=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_a_quantised_base_is_measured_as_it_computes() -> None:
    from lorasmith.training.models import quantize_in_place

    model: Any = llama(hidden_size=64, intermediate_size=64)
    quantize_in_place(model, "nf4", torch.float32, "cpu")
    ls.attach(model, ls.LoRAConfig(r=4))
    assert any(s.info is not None and s.info.kind == "opaque" for s in find_sites(model))
    randomise(adapter_parameters(model), scale=0.3)
    assert max(max(a) for a in dense_angles(model, "head").values()) > 5
    rule = bound(RotationBudget(5.0), model)
    rule.project()
    assert max(max(a) for a in dense_angles(model, "head").values()) <= 5
    assert max(float(t.max()) for t in rule.angles().values()) > 4.99


def test_several_adapters_have_a_budget_each() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4))
    ls.attach(model, ls.LoRAConfig(r=4), name="second")
    first, second = (find_sites(model, name) for name in ("default", "second"))
    for seed, sites in enumerate((first, second)):
        randomise([p for s in sites for p in (s.A, s.B)], scale=0.3, seed=seed)
    rule = RotationBudget(5.0)
    context: Any = SimpleNamespace(model=model, sites=first)
    rule.bind(context)
    kept = [s.B.clone() for s in second]
    rule.project()
    assert all(torch.equal(s.B, b) for s, b in zip(second, kept, strict=True))
    rule.on_sites((*first, *second))
    rule.project()
    assert len(rule.angles()) == 28
    assert max(float(t.max()) for t in rule.angles().values()) <= 5.0


def test_a_parameter_group_without_gradients_is_not_penalised() -> None:
    model = ours(llama(), ls.LoRAConfig(r=4))
    randomise(adapter_parameters(model), scale=0.3)
    rule = bound(RotationBudget(5.0, kind="penalty"), model)
    rule.before_step(Step(0, Statistics(), torch.optim.SGD(adapter_parameters(model))))
    assert all(p.grad is None for p in adapter_parameters(model))


def test_what_a_rule_makes_at_the_end_is_brought_back_too() -> None:
    """The stress controller merges task adapters when training ends."""

    class Merges(ls.Dynamic):
        name = "merges"

        def close(self) -> None:
            with torch.no_grad():
                for site in self.context.sites:
                    site.B.fill_(3.0)
            self.context.refresh([self.context.adapter])

    model = llama()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    rule = RotationBudget(2.0)
    with ls.Dynamics(model, [Merges(), rule], torch.optim.SGD(adapter.parameters(), lr=0.1)):
        pass
    angles = torch.cat(list(rule.angles().values()))
    assert float(angles.max()) <= 2.0
    assert float(angles.max()) > 1.9


@pytest.mark.parametrize("value", ["5", None, True, float("nan"), 0, 90])
def test_a_budget_that_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_deg") as caught:
        ls.RotationBudget(max_deg=value)
    assert "number" in str(caught.value)
