"""Gauge projection: the algebra, against scipy and dense formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.variant import Factors
from lorasmith.dynamics.gauge import gauge_residual, gauge_transform, project_gauge_
from lorasmith.errors import ConfigError, LorasmithError, TrainingError, UnknownNameError
from tests.models import FAMILIES, mlp, randomise, run


def factors(
    r: int, d_in: int, d_out: int, seed: int = 0, scale: float = 1.0, dtype: Any = torch.float32
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(r, d_in, generator=g, dtype=torch.float64)
    b = torch.randn(d_out, r, generator=g, dtype=torch.float64) * scale
    return a.to(dtype), b.to(dtype)


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].double() @ pair[0].double()


def spread_out(rows: Tensor) -> Tensor:
    """Rows of the same span and well conditioned: rank is then no matter of opinion."""
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    return left * torch.linspace(1, 0.3, len(rows), dtype=rows.dtype) @ right


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def reference(A: Tensor, B: Tensor, mu: float) -> np.ndarray:
    """R by the formula with roots of G_A, from scipy, in float64."""
    a, b = A.double().numpy(), B.double().numpy()
    root = np.real(scipy.linalg.sqrtm(a @ a.T))
    inverse = np.linalg.inv(root)
    middle = np.real(scipy.linalg.sqrtm(mu * root @ b.T @ b @ root))
    return np.real(scipy.linalg.sqrtm(inverse @ middle @ inverse))


def spread(r: int, d_in: int, d_out: int, kappa_a: float, kappa_b: float) -> tuple[Tensor, Tensor]:
    """float32 factors of given condition numbers, with singular vectors that do not agree."""
    g = torch.Generator().manual_seed(3)

    def basis(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64))[0]

    def values(kappa: float) -> Tensor:
        return torch.diag(torch.logspace(0, -float(np.log10(kappa)), r, dtype=torch.float64))

    a = basis(r) @ values(kappa_a) @ basis(d_in).T
    b = basis(d_out) @ values(kappa_b) @ basis(r)
    return a.float(), b.float()


# -- R ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    r=st.integers(1, 8),
    extra_in=st.integers(2, 12),
    extra_out=st.integers(2, 12),
    seed=st.integers(0, 2**16),
    mu=st.floats(1e-3, 1e3),
    scale=st.floats(1e-4, 1e4),
)
def test_r_is_the_symmetric_one_of_the_formula(
    r: int, extra_in: int, extra_out: int, seed: int, mu: float, scale: float
) -> None:
    A, B = factors(r, r + extra_in, r + extra_out, seed, scale, torch.float64)
    R, inverse = gauge_transform(A, B, mu)
    expected = torch.from_numpy(reference(A, B, mu))
    # The reference takes three roots, each of which halves its digits.
    assert distance(R, expected) < 1e-5
    torch.testing.assert_close(R, R.mT, atol=0, rtol=1e-12)
    assert distance(R @ inverse, torch.eye(r)) < 1e-9
    moved = R @ A, B @ inverse
    assert float((moved[0] @ moved[0].T - mu * moved[1].T @ moved[1]).norm()) < 1e-7 * float(
        (moved[0] @ moved[0].T).norm()
    )
    assert distance(product(moved), product((A, B))) < 1e-9


@settings(max_examples=40)
@given(
    r=st.integers(1, 8),
    extra=st.integers(2, 30),
    seed=st.integers(0, 2**16),
    mu=st.floats(1e-3, 1e3),
    scale=st.floats(1e-8, 1e4),
)
def test_laws_in_float32(r: int, extra: int, seed: int, mu: float, scale: float) -> None:
    pair = factors(r, r + extra, r + 2 * extra, seed, scale)
    before = product(pair)
    report = project_gauge_(pair, mu)
    assert distance(product(pair), before) < 1e-6
    assert report.directions == {"0": r}
    assert report.after["0"] < 1e-5
    assert float(gauge_residual(*pair, mu)) < 1e-5
    once = pair[0].clone(), pair[1].clone()
    project_gauge_(pair, mu)
    assert distance(pair[0], once[0]) < 1e-5
    assert distance(pair[1], once[1]) < 1e-5


@pytest.mark.parametrize("kappa_a", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("kappa_b", [1e1, 1e3, 1e5])
def test_ill_conditioned_factors(kappa_a: float, kappa_b: float) -> None:
    pair = spread(16, 64, 48, kappa_a, kappa_b)
    before = product(pair)
    report = project_gauge_(pair, 0.3)
    assert report.directions == {"0": 16}
    assert float(gauge_residual(*pair, 0.3)) < 1e-6
    assert distance(product(pair), before) < 1e-6
    once = pair[0].clone(), pair[1].clone()
    project_gauge_(pair, 0.3)
    assert max(distance(pair[i], once[i]) for i in (0, 1)) < 1e-6


def test_many_layers_at_once_are_each_as_alone() -> None:
    shapes = [(4, 20, 12), (4, 12, 20), (2, 20, 12), (4, 20, 12), (1, 5, 7)]
    named = {f"layer {i}": factors(*s, seed=i, scale=0.1**i) for i, s in enumerate(shapes)}
    named["wide"] = factors(4, 20, 12, seed=9, dtype=torch.float64)
    expected = {}
    for name, (a, b) in named.items():
        R = torch.from_numpy(reference(a, b, 0.25))
        expected[name] = R @ a.double(), b.double() @ torch.linalg.inv(R)
    report = project_gauge_(named, 0.25)
    for name, pair in named.items():
        assert distance(pair[0], expected[name][0]) < 1e-6, name
        assert distance(pair[1], expected[name][1]) < 1e-6, name
    assert set(report.before) == set(report.after) == set(report.condition) == set(named)
    assert max(report.after.values()) < 1e-6
    assert max(report.before.values()) > 0.1
    for name, (a, b) in zip(
        named, [factors(*s, seed=i, scale=0.1**i) for i, s in enumerate(shapes)], strict=False
    ):
        values = np.linalg.eigvalsh(reference(a, b, 0.25))
        assert report.condition[name] == pytest.approx(values[-1] / values[0], rel=1e-4)


# -- the defects of GP-LoRA ------------------------------------------------------------------


def test_a_layer_that_was_not_used_stays_alive() -> None:
    A, _ = factors(8, 40, 30)
    B = torch.zeros(30, 8)
    before = A.clone()
    for _ in range(50):
        report = project_gauge_((A, B))
    assert torch.equal(A, before)
    assert torch.equal(B, torch.zeros_like(B))
    assert report.directions == {"0": 0}
    assert report.condition == {"0": 1.0}
    # And the same for A.
    B = before.T.clone()
    project_gauge_((torch.zeros(8, 40), B))
    assert torch.equal(B, before.T)
    # Beside layers that are projected, too.
    other = factors(8, 40, 30)
    project_gauge_([(A, torch.zeros(30, 8)), other], 1.0)
    assert torch.equal(A, before)
    assert float(gauge_residual(*other)) < 1e-6


@pytest.mark.parametrize("small", [1e-3, 1e-4, 1e-8, 1e-15])
def test_the_constraint_holds_however_small_b_is(small: float) -> None:
    pair = factors(8, 40, 30, scale=small)
    before = product(pair)
    project_gauge_(pair, 1.0)
    a, b = (t.double() for t in pair)
    assert float((a @ a.T - b.T @ b).norm() / (a @ a.T).norm()) < 1e-6
    assert distance(product(pair), before) < 1e-6
    once = pair[0].clone()
    project_gauge_(pair, 1.0)
    assert distance(pair[0], once) < 1e-6


def test_the_product_survives_a_thousand_projections() -> None:
    pairs = [factors(16, 576, 192, seed=1, scale=1e-3), spread(16, 576, 1536, 30, 1e3)]
    before = [product(p) for p in pairs]
    for _ in range(1000):
        project_gauge_(pairs)
    assert max(distance(product(p), old) for p, old in zip(pairs, before, strict=True)) < 1e-6


def test_float64_stays_float64() -> None:
    pair = factors(8, 40, 30, scale=1e-3, dtype=torch.float64)
    before = product(pair)
    project_gauge_(pair, 0.5)
    assert pair[0].dtype == pair[1].dtype == torch.float64
    a, b = pair
    assert float((a @ a.T - 0.5 * b.T @ b).norm() / (a @ a.T).norm()) < 1e-13
    assert distance(product(pair), before) < 1e-13


def test_bfloat16_is_refused_and_costs_digits_where_it_is_allowed() -> None:
    pair = factors(16, 200, 100, scale=0.01, dtype=torch.bfloat16)
    before = product(pair)
    with pytest.raises(ConfigError, match="bfloat16"):
        project_gauge_({"q_proj": pair})
    assert torch.equal(product(pair), before)
    project_gauge_(pair, allow_low_precision=True)
    assert 5e-4 < distance(product(pair), before) < 5e-3  # what the documentation says


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_names_its_layer(bad: float) -> None:
    good, broken = factors(4, 10, 8, seed=1), factors(4, 10, 8, seed=2)
    broken[0][1, 2] = bad
    kept = good[0].clone()
    with pytest.raises(TrainingError, match=r"model\.layers\.7\.q") as caught:
        project_gauge_({"fine": good, "model.layers.7.q": broken})
    assert isinstance(caught.value, LorasmithError)
    assert torch.equal(good[0], kept)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_a_peft_model_is_projected() -> None:
    import peft

    model = peft.get_peft_model(
        FAMILIES["llama"].build(), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    )
    randomise(p for p in model.parameters() if p.requires_grad)
    batch = FAMILIES["llama"].batch()
    with torch.no_grad():
        before = run(model, batch)
        report = project_gauge_(model)
        torch.testing.assert_close(run(model, batch), before, atol=2e-5, rtol=2e-5)
    layers = [
        m for _, m in model.named_modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)
    ]
    assert len(layers) == len(report.after) == 4
    for layer in layers:
        a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach().double() for x in "AB")
        left, right = a @ a.T, 3 / b.shape[0] * b.T @ b  # μ = r / d_out
        assert float((left - right).norm() / left.norm()) < 1e-6
    assert min(report.before.values()) > 1e-2


# -- rank deficiency -------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    r=st.integers(2, 7),
    lost_a=st.integers(0, 3),
    lost_b=st.integers(0, 3),
    seed=st.integers(0, 2**16),
    aligned=st.booleans(),
    scale=st.floats(1e-4, 1e2),
)
def test_deficient_factors(
    r: int, lost_a: int, lost_b: int, seed: int, aligned: bool, scale: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    A, B = factors(r, r + 9, r + 6, seed, scale, torch.float64)
    A, B = spread_out(A), spread_out(B.T).T * scale

    def drop(count: int) -> Tensor:
        """A projector that takes away so many directions."""
        q = torch.eye(r, dtype=torch.float64)
        if not aligned:
            q = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0]
        if count >= r:
            return torch.zeros(r, r, dtype=torch.float64)
        keep = torch.ones(r, dtype=torch.float64)
        keep[:count] = 0
        return q @ torch.diag(keep) @ q.T

    A, B = drop(lost_a) @ A, B @ drop(lost_b)
    if aligned:
        A, B = A.float(), B.float()
    before, old = product((A, B)), A.clone()
    report = project_gauge_((A, B), 0.7)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    if float(before.norm()) > 0:
        assert distance(product((A, B)), before) < 1e-5
    rank = int(np.linalg.matrix_rank(before.numpy(), tol=1e-4 * float(before.norm() + 1e-30)))
    assert report.directions == {"0": rank}
    # Neither factor loses a direction.
    for new, lost in ((A, lost_a), (B, lost_b)):
        values = torch.linalg.svdvals(new.double())
        if lost < r:
            assert float(values[r - lost - 1] / values[0]) > 1e-6
    again, again_b = A.clone(), B.clone()
    project_gauge_((again, again_b), 0.7)
    if float(old.norm()) > 0:
        assert distance(again, A) < 1e-5


def test_directions_that_b_lacks_are_left_alone_and_the_others_balanced() -> None:
    A, B = factors(5, 30, 20)
    B[:, [1, 3]] = 0
    old, rest = A.clone(), [0, 2, 4]
    project_gauge_((A, B), 0.4)
    assert torch.equal(A[[1, 3]], old[[1, 3]])
    assert float(B[:, [1, 3]].abs().max()) < 1e-14
    expected = factors(5, 30, 20)
    R = torch.from_numpy(reference(expected[0][rest], expected[1][:, rest], 0.4))
    assert distance(A[rest], R @ old[rest].double()) < 1e-6
    assert float(gauge_residual(A[rest], B[:, rest], 0.4)) < 1e-6


def common_residual(A: Tensor, B: Tensor, mu: float) -> float:
    """On U = range(P A Aᵀ P), P onto range(Bᵀ), by numpy's SVD."""
    a, b = A.double().numpy(), B.double().numpy()

    def onto(matrix: Any) -> Any:  # the projector onto its range
        u, s, _ = np.linalg.svd(matrix)
        rank = int((s > 1e-6 * max(float(np.linalg.norm(matrix)), 1e-30)).sum())
        u = np.asarray(u)[:, :rank]
        return u @ u.T

    within = onto(onto(b.T) @ a)
    left, right = within @ a @ a.T @ within, mu * within @ b.T @ b @ within
    half = (np.linalg.norm(left) + np.linalg.norm(right)) / 2
    return float(np.linalg.norm(left - right) / half) if half > 0 else 0.0


@settings(max_examples=40)
@given(
    r=st.integers(1, 6),
    lost_a=st.integers(0, 6),
    lost_b=st.integers(0, 6),
    seed=st.integers(0, 2**16),
)
def test_the_residual_is_of_the_directions_that_both_factors_have(
    r: int, lost_a: int, lost_b: int, seed: int
) -> None:
    A, B = factors(r, r + 9, r + 6, seed, dtype=torch.float64)
    A, B = spread_out(A), spread_out(B.T).T
    # What is lost is different for the two, and in no basis that the code may know.
    q = torch.linalg.qr(factors(r, r, 1, seed + 1, dtype=torch.float64)[0])[0]
    A = q @ torch.diag((torch.arange(r) >= lost_a).double()) @ q.T @ A
    q = torch.linalg.qr(factors(r, r, 1, seed + 2, dtype=torch.float64)[0])[0]
    B = B @ q @ torch.diag((torch.arange(r) >= lost_b).double()) @ q.T
    expected = common_residual(A, B, 0.7)
    assert float(gauge_residual(A, B, 0.7, directions="common")) == pytest.approx(
        expected, abs=1e-6
    )
    report = project_gauge_((A, B), 0.7)
    assert report.before["0"] == pytest.approx(expected, abs=1e-6)
    assert report.after["0"] < 1e-6
    assert common_residual(A, B, 0.7) < 1e-6


def test_a_layer_without_directions_has_nothing_off() -> None:
    A, B = factors(4, 20, 12)
    stack = torch.stack([A, A, A]), torch.stack([B, torch.zeros_like(B), B * math.nan])
    found = gauge_residual(*stack, 0.5, directions="common")
    assert float(found[0]) == pytest.approx(float(gauge_residual(A, B, 0.5)), rel=1e-9)
    assert float(found[1]) == 0.0
    assert math.isnan(found[2])
    assert float(gauge_residual(*stack, 0.5)[1]) == pytest.approx(2.0)
    report = project_gauge_({"used": (A, B), "unused": (A.clone(), torch.zeros(12, 4))})
    assert report.before["unused"] == report.after["unused"] == 0.0
    assert report.before["used"] > 0.1
    with pytest.raises(ConfigError, match="Unknown directions"):
        gauge_residual(A, B, directions="some")  # type: ignore[arg-type]


def test_noise_of_rounding_is_no_direction() -> None:
    A, B = factors(6, 50, 40, dtype=torch.float64)
    B[:, 5] = B[:, 3] - 2 * B[:, 1]  # rank 5, of which float32 keeps 1e-7
    A, B = A.float(), B.float()
    report = project_gauge_((A, B))
    assert report.directions == {"0": 5}
    assert report.condition["0"] < 100


# -- what it takes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ls.LoRAConfig(r=3),
        ls.LoRAConfig(r=3, init="pissa", scaling="rslora"),
        ls.DoRAConfig(r=3),
    ],
    ids=["lora", "pissa", "dora"],
)
def test_our_adapters_do_the_same_as_before(config: Any) -> None:
    model = mlp()
    adapter = ls.attach(model, config)
    randomise(adapter.parameters())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = model(x)
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    report = project_gauge_(model, lambda name, _: 2.0 if name == "0" else 0.5)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    for name, mu in (("0", 2.0), ("2", 0.5)):
        part = adapter.layers()[name]
        assert float(gauge_residual(part["A"], part["B"], mu)) < 1e-6
    assert min(report.before.values()) > 1e-2
    assert all(torch.equal(b, frozen[n]) for n, b in model.named_buffers())


def test_modules_with_plain_parameters() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = map(nn.Parameter, factors(2, 6, 5))

    model = nn.Sequential(Layer(), nn.Tanh(), Layer())
    report = project_gauge_(model, 1.0)
    assert list(report.after) == ["0", "2"]
    assert float(gauge_residual(model[0].lora_A, model[0].lora_B)) < 1e-6


def test_factors_objects_sequences_and_views() -> None:
    a, b = factors(6, 10, 8)
    project_gauge_([Factors(a[:3], b[:, :3], 1.0), (a[3:], b[:, 3:])], 1.0)
    assert float(gauge_residual(a[:3], b[:, :3])) < 1e-6
    assert float(gauge_residual(a[3:], b[:, 3:])) < 1e-6
    assert float(gauge_residual(a, b)) > 1e-3
    assert repr(project_gauge_([])) == "GaugeReport(no layers)"


def test_inside_autocast_nothing_is_rounded() -> None:
    pair = factors(4, 30, 20, scale=1e-2)
    before = product(pair)
    with torch.autocast("cpu", torch.bfloat16):
        project_gauge_(pair)
        residual = gauge_residual(*pair, 0.2)
    assert float(residual) < 1e-6
    assert distance(product(pair), before) < 1e-6


def test_nothing_is_rounded_where_fewer_digits_are_allowed_for_products() -> None:
    pair = factors(4, 30, 20, scale=1e-2)
    project_gauge_(pair)
    before = product(pair)
    pair[0].mul_(1.1)
    torch.set_float32_matmul_precision("medium")
    try:
        project_gauge_(pair)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert distance(product(pair), 1.1 * before) < 1e-6


@pytest.mark.parametrize(
    "mu", [0, -1.0, float("nan"), float("inf"), "balanced", True, lambda *_: 0.0]
)
def test_unusable_mu(mu: Any) -> None:
    with pytest.raises(ConfigError, match="mu"):
        project_gauge_(factors(2, 4, 4), mu)


def test_unusable_factors() -> None:
    a, b = factors(2, 4, 4)
    with pytest.raises(ConfigError, match="fit"):
        project_gauge_({"x": (a, b.T[:1])})
    with pytest.raises(ConfigError, match="share a factor"):
        project_gauge_({"x": (a, b), "y": (a, b.clone())})
    with pytest.raises(ConfigError, match="not a pair"):
        project_gauge_({"x": a})  # type: ignore[dict-item]
    with pytest.raises(UnknownNameError, match="lora_A"):
        project_gauge_(mlp())


# -- the theory behind it --------------------------------------------------------------------


def start(imbalance: float, product_: float = 0.1) -> tuple[float, float]:
    """a ≥ b > 0 with a² − b² and a b as given."""
    square = (imbalance + np.sqrt(imbalance**2 + 4 * product_**2)) / 2
    return float(np.sqrt(square)), float(product_ / np.sqrt(square))


@pytest.mark.parametrize(("imbalance", "published"), [(0, 3.39), (1, 2.46), (9, 0.49), (100, 0.04)])
def test_convergence_time_of_the_scalar_flow(imbalance: float, published: float) -> None:
    """a' = −b (ab − 1), b' = −a (ab − 1) from ab = 0.1 until ab = 0.99, L = ½ (ab − 1)²."""

    def flow(_: float, y: np.ndarray) -> list[float]:
        a, b = y
        return [-b * (a * b - 1), -a * (a * b - 1)]

    def arrived(_: float, y: np.ndarray) -> float:
        return y[0] * y[1] - 0.99

    arrived.terminal = True
    found = solve_ivp(flow, (0, 10), start(imbalance), events=arrived, rtol=1e-10, atol=1e-12)
    time = float(found.t_events[0][0])
    assert time == pytest.approx(published, abs=0.01)
    # p = ab obeys p' = √(C² + 4p²) (1 − p).
    expected, _ = quad(lambda p: 1 / (np.sqrt(imbalance**2 + 4 * p * p) * (1 - p)), 0.1, 0.99)
    assert time == pytest.approx(expected, rel=1e-6)
    a, b = found.y[:, -1]
    assert a * a - b * b == pytest.approx(imbalance, abs=1e-7)


def test_gradient_descent_with_small_steps_keeps_the_imbalance() -> None:
    A, B = (t.requires_grad_() for t in factors(3, 6, 5, scale=0.5, dtype=torch.float64))
    target = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drifts = []
    for rate in (1e-3, 5e-4):
        a, b = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
        old = (a @ a.T - b.T @ b).detach()
        optimizer = torch.optim.SGD([a, b], lr=rate)
        first = None
        for _ in range(round(1 / rate)):
            loss = 0.5 * (b @ a - target).square().sum()
            first = float(loss.detach()) if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert first is not None
        assert float(loss.detach()) < 0.5 * first  # it moved
        drifts.append(float((a @ a.T - b.T @ b - old).detach().norm() / old.norm()))
    assert drifts[0] < 5e-3
    assert drifts[1] == pytest.approx(
        drifts[0] / 2, rel=0.1
    )  # of the order of the step: the flow keeps it
