"""Orthogonality penalties: against dense formulas, and against every defect of EgoRA's."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorasmith as ls
from lorasmith.dynamics import Dynamics, Statistics, Step, find_sites
from lorasmith.dynamics.orthogonality import (
    OrthogonalityPenalty,
    Penalty,
    effective_rank,
    refresh_shadow,
    shadow_penalty,
    shadow_penalty_gradient,
    spectral_penalty,
    spectral_penalty_gradient,
)
from lorasmith.errors import ConfigError, TrainingError
from tests.models import llama, randomise

F64 = torch.float64

# PEFT asks Transformers for an attribute that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
sizes = st.integers(1, 12)
ranks = st.integers(1, 5)
seeds = st.integers(0, 2**16)


def _factors(d_out: int, d_in: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(r, d_in, generator=g, dtype=F64)
    return A, torch.randn(d_out, r, generator=g, dtype=F64)


def _with_spectrum(sigma: list[float], d_out: int = 20, d_in: int = 14) -> tuple[Tensor, Tensor]:
    """A and B whose product has these singular values."""
    g = torch.Generator().manual_seed(1)
    r = len(sigma)
    left = torch.linalg.qr(torch.randn(d_out, r, generator=g, dtype=F64))[0]
    right = torch.linalg.qr(torch.randn(d_in, r, generator=g, dtype=F64))[0]
    change = torch.randn(r, r, generator=g, dtype=F64) + 3 * torch.eye(r, dtype=F64)
    return change @ right.T, left @ torch.diag(torch.tensor(sigma, dtype=F64)) @ change.inverse()


def dense_spectral(A: Tensor, B: Tensor, eps: float = 1e-4) -> Tensor:
    """The definition, from the eigenvalues of MᵀM padded to r of them."""
    r = A.shape[0]
    squares = torch.linalg.svdvals(B @ A)[:r].square()
    squares = torch.cat([squares, squares.new_zeros(r - squares.numel())])
    m = squares / squares.mean()
    return math.log(1 + eps) - torch.log(m + eps).mean()


def dense_shadow(A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    M = B @ A
    P = M @ S.T if M.shape[0] <= M.shape[1] else M.T @ S
    eye = torch.eye(P.shape[0], dtype=P.dtype)
    return torch.sqrt(torch.sum((P - eye) ** 2) + 1e-8)


def pseudo_inverse(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """pinv(B A)ᵀ in factors: what a refresh makes of nothing."""
    U, V = B.new_zeros(B.shape), A.mT.new_zeros(A.mT.shape)
    return refresh_shadow(U, V, A, B, 0.0, A.shape[0], 0.0)[:2]


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12))


# -- spectral ------------------------------------------------------------------------------


@given(sizes, sizes, ranks, seeds, st.sampled_from([1e-6, 1e-4, 1e-2]))
def test_spectral_value_is_the_dense_formula(
    d_out: int, d_in: int, r: int, seed: int, eps: float
) -> None:
    A, B = _factors(d_out, d_in, r, seed)
    wanted = float(dense_spectral(A, B, eps))
    assert float(spectral_penalty(A, B, eps)) == pytest.approx(wanted, abs=1e-8)


@given(st.integers(5, 12), st.integers(5, 12), st.integers(2, 5), seeds)
def test_spectral_gradient_is_that_of_autograd(d_out: int, d_in: int, r: int, seed: int) -> None:
    A, B = (t.requires_grad_() for t in _factors(d_out, d_in, r, seed))
    # Through the eigenvalues of MᵀM, whose sum of functions has a gradient also where two meet.
    wanted = torch.autograd.grad(dense_spectral(A, B), (A, B))
    value, g_A, g_B = spectral_penalty_gradient(A, B)
    assert not value.requires_grad
    assert _relative(g_A, wanted[0]) < 1e-5
    assert _relative(g_B, wanted[1]) < 1e-5


# Not smaller than r: where B A cancels almost to nothing, rounding decides its directions.
@given(st.integers(5, 12), st.integers(5, 12), ranks, seeds, st.floats(1e-12, 1e12))
def test_spectral_is_free_of_scale_and_gauge(
    d_out: int, d_in: int, r: int, seed: int, scale: float
) -> None:
    A, B = _factors(d_out, d_in, r, seed)
    g = torch.Generator().manual_seed(seed + 1)
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=F64))
    change = scale * q @ torch.diag(torch.linspace(0.01, 2, r, dtype=F64))
    value, g_A, g_B = spectral_penalty_gradient(A, B)
    moved, h_A, h_B = spectral_penalty_gradient(change @ A, B @ change.inverse())
    assert float(moved) == pytest.approx(float(value), abs=1e-6)
    # Gradients of a gauge-free function are covariant: g_A → R⁻ᵀ g_A, g_B → g_B Rᵀ.
    size = 1e-5 * (1 + float(g_A.norm()) + float(g_B.norm()))
    assert float((change.T @ h_A - g_A).norm()) < size
    assert float((h_B @ change.inverse().T - g_B).norm()) < size
    # It does not ask M to grow or to shrink.
    for gradient, factor in ((g_A, A), (g_B, B)):
        assert abs(float((gradient * factor).sum())) < 1e-8 * (
            1 + float(gradient.norm() * factor.norm())
        )


def test_spectral_is_zero_at_equal_singular_values_and_rises_with_the_condition() -> None:
    values = []
    for condition in (1.0, 2.0, 10.0, 100.0, 1000.0):
        sigma = torch.logspace(0, -math.log10(condition), 4).tolist()
        values.append(float(spectral_penalty(*_with_spectrum(sigma))))
    assert values[0] == pytest.approx(0.0, abs=1e-12)
    assert values == sorted(values)
    assert values[4] - values[0] > 1  # EgoRA's: the same value
    _, g_A, g_B = spectral_penalty_gradient(*_with_spectrum([3.0] * 4))
    assert float(g_A.norm() + g_B.norm()) < 1e-12


def test_shadow_cannot_tell_condition_1_from_1000() -> None:
    """What EgoRA's form measures, so that nobody expects more of it: see the module."""
    values = [
        float(shadow_penalty(A, B, *pseudo_inverse(A, B)))
        for A, B in (_with_spectrum([1.0] * 4), _with_spectrum([1.0, 0.1, 0.01, 0.001]))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] == pytest.approx(math.sqrt(14 - 4), rel=1e-6)


@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_slope_towards_collapse_is_the_documented_one(smallest: float) -> None:
    eps, r = 1e-4, 4
    sigma = [1.0, 0.9, 0.8, smallest]
    A, B = _with_spectrum(sigma)
    _, _, g_B = spectral_penalty_gradient(A, B, eps)
    left, _, _ = torch.linalg.svd(B @ A)
    # ∂P/∂B Aᵀ... from the gradient with respect to M: g_B = G_M Aᵀ.
    G_M = g_B @ torch.linalg.pinv(A.T)
    u = left[:, 3]
    v = (B @ A).T @ u / smallest
    mean = sum(s * s for s in sigma) / r
    kappa = sum(s * s / (s * s + eps * mean) for s in sigma) / r
    slope = -2 * smallest / r * (1 / (smallest**2 + eps * mean) - kappa / mean)
    assert float(u @ G_M @ v) == pytest.approx(slope, rel=1e-6)
    healthy = 2 * 1.0 / (r * mean)
    assert -slope >= 0.9 * healthy  # never weaker than the pull on a healthy direction


def test_a_step_from_nearly_rank_one_raises_what_is_missing() -> None:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 14, generator=g)
    B = torch.randn(20, 1, generator=g) @ torch.randn(1, 4, generator=g)
    B += 1e-4 * torch.randn(20, 4, generator=g)
    before = torch.linalg.svdvals((B @ A).double())
    _, g_A, g_B = spectral_penalty_gradient(A, B)
    assert bool(g_A.isfinite().all())
    assert bool(g_B.isfinite().all())
    step = 1e-3 * B.norm() / g_B.norm()
    after = torch.linalg.svdvals((B.double() - step * g_B) @ A.double())
    assert bool((after[1:4] > 3 * before[1:4]).all())
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-2)
    assert float(effective_rank(A, B.double() - step * g_B)) > float(effective_rank(A, B))


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
@pytest.mark.parametrize("what", ["B = 0", "A = 0", "rank 1", "disjoint"])
def test_degenerate_factors_give_finite_gradients(what: str, size: float) -> None:
    A, B = (t.float() for t in _factors(9, 7, 4))
    if what == "B = 0":
        B.zero_()
    elif what == "A = 0":
        A.zero_()
    elif what == "rank 1":
        B = B[:, :1] @ torch.ones(1, 4)
    else:  # B A = 0 though neither is
        A[:2], B[:, 2:] = 0.0, 0.0
    value, g_A, g_B = spectral_penalty_gradient(A * size, B * size)
    assert bool(value.isfinite())
    assert bool(g_A.isfinite().all())
    assert bool(g_B.isfinite().all())
    if what != "rank 1":
        assert float(value) == 0
        assert float(g_A.norm() + g_B.norm()) == 0
        assert float(effective_rank(A * size, B * size)) == 0
    else:
        collapsed = math.log(1 + 1e-4) - (math.log(4 + 1e-4) + 3 * math.log(1e-4)) / 4
        assert float(value) == pytest.approx(collapsed, rel=1e-6)
        assert float(effective_rank(A * size, B * size)) == pytest.approx(1, abs=1e-4)


def test_batches_are_their_members() -> None:
    pairs = [_factors(9, 7, 4, seed) for seed in range(3)]
    pairs[1] = (pairs[1][0], torch.zeros_like(pairs[1][1]))
    A, B = (torch.stack(t) for t in zip(*pairs, strict=True))
    values, g_A, g_B = spectral_penalty_gradient(A, B)
    for i, (a, b) in enumerate(pairs):
        value, h_A, h_B = spectral_penalty_gradient(a, b)
        torch.testing.assert_close(values[i], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(g_A[i], h_A, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(g_B[i], h_B, rtol=1e-8, atol=1e-12)


def test_effective_rank_is_roy_and_vetterlis() -> None:
    sigma = torch.tensor([3.0, 2.0, 0.5, 0.1], dtype=F64)
    p = sigma / sigma.sum()
    wanted = float(torch.exp(-(p * p.log()).sum()))
    assert float(effective_rank(*_with_spectrum(sigma.tolist()))) == pytest.approx(wanted)


# -- shadow --------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), ranks, st.integers(1, 8), seeds)
def test_shadow_penalty_is_the_dense_formula(
    d_out: int, d_in: int, r: int, k: int, seed: int
) -> None:
    A, B = (t.float() for t in _factors(d_out, d_in, r, seed))
    V, U = (
        t.float().mT if i == 0 else t.float()
        for i, t in enumerate(_factors(d_out, d_in, k, seed + 1))
    )
    a, b = (t.double().requires_grad_() for t in (A, B))
    value = dense_shadow(a, b, U.double() @ V.double().T)
    wanted = torch.autograd.grad(value, (a, b))
    value = value.detach()
    got, g_A, g_B = shadow_penalty_gradient(A, B, U, V)
    assert float(got) == pytest.approx(float(value), rel=1e-6)
    assert float(shadow_penalty(A, B, U, V)) == pytest.approx(float(value), rel=1e-6)
    assert _relative(g_A, wanted[0]) < 1e-5
    assert _relative(g_B, wanted[1]) < 1e-5


@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_pseudo_inverse_from_factors(condition: float, shape: tuple[int, int]) -> None:
    sigma = torch.logspace(0, -math.log10(condition), 5).tolist()
    A, B = (t.float() for t in _with_spectrum(sigma, *shape))
    wanted = torch.linalg.pinv(B.double() @ A.double(), rtol=1e-5).T
    # float32 through QR: the condition number once, not squared.
    for factors, bound in (((A, B), 1e-6 * condition), ((A.double(), B.double()), 1e-9)):
        N, Q = pseudo_inverse(*factors)
        assert N.dtype == Q.dtype == factors[0].dtype
        assert _relative(N @ Q.T, wanted) < bound
        torch.testing.assert_close(Q.T @ Q, torch.eye(5, dtype=Q.dtype), atol=1e-6, rtol=0)


def test_pseudo_inverse_of_rank_deficient_factors() -> None:
    A, B = _factors(12, 9, 4)
    B[:, 3] = B[:, 0]
    B[:, 2] = 0.0
    wanted = torch.linalg.pinv(B @ A, rtol=1e-6).T
    N, Q = pseudo_inverse(A, B)
    torch.testing.assert_close(N @ Q.T, wanted)
    N, Q = pseudo_inverse(A.float(), B.float())
    assert _relative(N @ Q.T, wanted) < 1e-6
    for factors in ((A, 0 * B), (0 * A, B)):
        N, Q = pseudo_inverse(*factors)
        assert float(N.norm() + Q.norm()) == 0


@given(st.integers(8, 20), st.integers(8, 20), st.integers(1, 4), seeds, st.floats(0, 0.99))
def test_the_average_is_the_dense_one_and_what_is_dropped_is_told(
    d_out: int, d_in: int, r: int, seed: int, m: float
) -> None:
    A, B = _factors(d_out, d_in, r, seed)
    C, D = _factors(d_out, d_in, r, seed + 1)
    U, V = pseudo_inverse(A, B)
    dense = m * U @ V.T + (1 - m) * torch.linalg.pinv(D @ C, rtol=d_out * 1.2e-7).T
    for rank in (r, 2 * r):
        new_U, new_V, dropped = refresh_shadow(U, V, C, D, m, rank, 0.0)
        assert new_U.shape == (d_out, rank)
        error = float((new_U @ new_V.T - dense).norm())
        size = float(dense.norm())
        best = float(torch.linalg.svdvals(dense)[rank:].norm())
        assert error == pytest.approx(float(dropped), abs=1e-6 * size)
        assert error == pytest.approx(best, abs=1e-6 * size)  # Eckart and Young
        filled = new_V.norm(dim=0) > 0
        gram = (new_V.T @ new_V)[filled][:, filled]
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("moved", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_the_average_in_float32_however_little_is_new(moved: float, condition: float) -> None:
    """What is left of B beyond U is then small, and full of rounding."""
    d, r, m = 300, 6, 0.9
    A, B = (t.float() for t in _factors(d, d, r))
    C, D = (t.float() for t in _factors(d, d, r, 1))
    U, V, _ = refresh_shadow(*pseudo_inverse(C, D), A, B, m, 2 * r, 1e-6)
    A = (A + moved * C) * torch.logspace(0, -math.log10(condition), r)[:, None]
    B = B + moved * D.flip(0)
    inverse = torch.linalg.pinv(B.double() @ A.double(), rtol=d * 1.2e-7).T
    dense = m * U.double() @ V.double().T + (1 - m) * inverse
    new_U, new_V, dropped = refresh_shadow(U, V, A, B, m, 2 * r, 1e-6)
    size = float(dense.norm())
    best = float(torch.linalg.svdvals(dense)[2 * r :].norm())
    error = float((new_U.double() @ new_V.double().T - dense).norm())
    assert error == pytest.approx(best, abs=2e-6 * size)
    assert float(dropped) == pytest.approx(best, abs=2e-6 * size)
    torch.testing.assert_close(new_V.T @ new_V, torch.eye(2 * r), atol=2e-6, rtol=0)
    gram = (new_U.T @ new_U).double()
    scale = new_U.double().norm(dim=0).clamp(min=1e-5 * size)
    torch.testing.assert_close(
        gram / scale / scale[:, None],
        torch.diag(gram.diagonal() / scale**2),
        atol=1e-4,
        rtol=0,
    )


def test_a_batch_of_refreshes_is_its_members() -> None:
    pairs = [tuple(t.float() for t in _factors(16, 11, 3, seed)) for seed in range(3)]
    pairs[1] = (pairs[1][0], torch.zeros_like(pairs[1][1]))
    A, B = (torch.stack(t) for t in zip(*pairs, strict=True))
    U, V = torch.zeros(3, 16, 6), torch.zeros(3, 11, 6)
    m = torch.tensor([0.0, 0.5, 0.9], dtype=F64)
    for _ in range(2):
        U, V, dropped = refresh_shadow(U, V, A + 0.1, B, m[:, None, None], 6, 1e-6)
    for i, (a, b) in enumerate(pairs):
        u, v = torch.zeros(16, 6), torch.zeros(11, 6)
        for _ in range(2):
            u, v, lost = refresh_shadow(u, v, a + 0.1, b, float(m[i]), 6, 1e-6)
        torch.testing.assert_close(U[i] @ V[i].T, u @ v.T, rtol=1e-5, atol=1e-6)
        assert float(dropped[i]) == pytest.approx(float(lost), abs=1e-6)


def test_averaging_the_same_again_is_exact() -> None:
    """Directions that are there already are the hard case of any appended basis."""
    A, B = _factors(16, 11, 3)
    U, V = pseudo_inverse(A, B)
    dense = torch.linalg.pinv(B @ A).T
    for _ in range(20):
        U, V, dropped = refresh_shadow(U.float(), V.float(), A.float(), B.float(), 0.9, 6, 1e-6)
        assert _relative(U @ V.T, dense) < 1e-6
        assert float(dropped) < 1e-5 * float(dense.norm())


# -- the rule ------------------------------------------------------------------------------


class Toy:
    """Regression on a teacher that differs from the base by a change of rank 2 a layer."""

    def __init__(
        self, rule: Any = None, *, lr: float = 1e-3, seed: int = 0, sgd: bool = False, r: int = 8
    ) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))
        teacher: Any = copy.deepcopy(self.net)
        with torch.no_grad():
            for name in ("0", "2"):
                weight = teacher.get_submodule(name).weight
                m, n = weight.shape
                weight += 0.6 * (torch.randn(m, 2) @ torch.randn(2, n)) / (m * n) ** 0.25
        ls.attach(self.net, ls.LoRAConfig(r=r, alpha=r, targets=["0", "2"]))
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if sgd else torch.optim.AdamW
        self.optimizer = kind(parameters, lr=lr, weight_decay=0.0)
        self.sites = find_sites(self.net)
        self.rule = rule
        self.driver = rule and Dynamics(self.net, rule, self.optimizer, observe="manual")
        self.x = torch.randn(512, 32)
        self.y = teacher(self.x).detach()
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self) -> Tensor:
        rows = torch.randint(0, 512, (64,), generator=self.generator)
        return (self.net(self.x[rows]) - self.y[rows]).square().mean()

    def train(self, steps: int) -> Toy:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return self

    @torch.no_grad()
    def result(self) -> tuple[float, float, float]:
        """Task loss, mean ‖B A‖ and mean effective rank."""
        changes = [s.B @ s.A for s in self.sites]
        ranks = []
        for change in changes:
            p = torch.linalg.svdvals(change)[:8]
            p = p / p.sum()
            ranks.append(float(torch.exp(-torch.special.xlogy(p, p).sum())))
        loss = float((self.net(self.x) - self.y).square().mean())
        return loss, sum(float(c.norm()) for c in changes) / 2, sum(ranks) / 2


def _step(number: int = 0, scale: Tensor | None = None) -> Step:
    return Step(number, Statistics(), torch.optim.SGD([torch.zeros(1)], lr=1.0), scale)


def _with_gradients(toy: Toy) -> list[tuple[Tensor, Tensor]]:
    toy.optimizer.zero_grad()
    toy.loss().backward()
    return [(s.A.grad.clone(), s.B.grad.clone()) for s in toy.sites]


def _added(
    toy: Toy, rule: OrthogonalityPenalty, weight: Any, scale: Tensor | None = None
) -> list[Tensor]:
    before = _with_gradients(toy)
    rule.apply(_step(scale=scale), weight)
    return [
        torch.cat([(s.A.grad - a).flatten(), (s.B.grad - b).flatten()])
        for s, (a, b) in zip(toy.sites, before, strict=True)
    ]


@pytest.mark.parametrize("sgd", [False, True])
def test_spectral_fights_collapse_and_the_change_does_not_grow(sgd: bool) -> None:
    lr = 0.3 if sgd else 1e-3
    plain = Toy(lr=lr, sgd=sgd).train(300).result()
    held = Toy(ls.OrthogonalityPenalty(weight=2.0), lr=lr, sgd=sgd).train(300).result()
    assert held[2] > plain[2] + 0.8  # effective rank
    assert held[1] < 1.02 * plain[1]  # norm
    assert held[0] < 1.05 * plain[0]  # task loss


def test_the_published_shadow_grows_and_the_corrected_one_does_not() -> None:
    plain = Toy(lr=1e-2).train(200).result()
    options: dict[str, Any] = {"weight": 2.0, "scale": "sum", "refresh_every": 20}
    published = Toy(ls.OrthogonalityPenalty("shadow", debias=False, **options), lr=1e-2).train(200)
    corrected = Toy(ls.OrthogonalityPenalty("shadow", **options), lr=1e-2).train(200)
    assert published.result()[1] > 2 * plain[1]
    assert corrected.result()[1] < 1.1 * plain[1]


def test_without_a_limit_a_scale_free_penalty_takes_over() -> None:
    """Why ``max_ratio`` exists: the gradient is ∝ 1 / ‖ΔW‖, and ΔW starts at 0."""
    plain = Toy().train(100).result()
    unlimited = Toy(ls.OrthogonalityPenalty(max_ratio=None)).train(100).result()
    limited = Toy(ls.OrthogonalityPenalty()).train(100).result()
    assert unlimited[0] > 2 * plain[0]
    assert limited[0] < 1.05 * plain[0]


@pytest.mark.parametrize("kind", ["spectral", "shadow"])
def test_what_is_added_is_the_gradient_of_the_dense_penalty(kind: Any) -> None:
    rule = OrthogonalityPenalty(kind, max_ratio=None, momentum=0.0)
    toy = Toy(rule).train(3)
    inverses = [torch.linalg.pinv((s.B @ s.A).detach().double(), rtol=1e-6).T for s in toy.sites]
    rule.refresh()
    with torch.no_grad():
        for site in toy.sites:
            site.B.mul_(1.1).add_(torch.randn_like(site.B), alpha=1e-3)
    leaves = [
        (s.A.detach().double().requires_grad_(), s.B.detach().double().requires_grad_())
        for s in toy.sites
    ]
    values = [
        dense_spectral(a, b) if kind == "spectral" else dense_shadow(a, b, S)
        for (a, b), S in zip(leaves, inverses, strict=True)
    ]
    total = float(sum(v.detach() for v in values))
    assert float(rule.value()) == pytest.approx(total / 2, rel=1e-4)
    sum(values).backward()
    for got, (a, b) in zip(_added(toy, rule, 0.5), leaves, strict=True):
        wanted = 0.5 / 2 * torch.cat([a.grad.flatten(), b.grad.flatten()])
        assert _relative(got, wanted) < 1e-3
    rule.scale = "sum"
    assert float(rule.value()) == pytest.approx(total, rel=1e-4)
    for got, (a, b) in zip(_added(toy, rule, torch.tensor(0.5)), leaves, strict=True):
        assert _relative(got, 0.5 * torch.cat([a.grad.flatten(), b.grad.flatten()])) < 1e-3


@pytest.mark.parametrize("scaler", [None, 1024.0])
def test_the_limit_is_a_share_of_the_tasks_gradient(scaler: float | None) -> None:
    rule = OrthogonalityPenalty(max_ratio=0.05)
    toy = Toy(rule).train(2)
    scale = None if scaler is None else torch.tensor(scaler)
    state = toy.generator.get_state()
    if scaler is not None:  # a fused optimiser sees gradients that are still scaled
        original = toy.loss
        toy.loss = lambda: original() * scaler  # type: ignore[method-assign]
    for weight in (1.0, torch.tensor(3.0)):
        toy.generator.set_state(state)
        added = _added(toy, rule, weight, scale)
        toy.generator.set_state(state)
        task = _with_gradients(toy)
        for got, (a, b) in zip(added, task, strict=True):
            share = float(got.norm()) / math.hypot(float(a.norm()), float(b.norm()))
            assert share == pytest.approx(0.05 * float(weight), rel=1e-3)
    assert rule.metrics()["limited"] == 1.0


def test_a_wide_limit_does_nothing() -> None:
    rule = OrthogonalityPenalty(max_ratio=1e9)
    toy = Toy(rule).train(2)
    state = toy.generator.get_state()
    first = _added(toy, rule, 1.0)
    rule.max_ratio = None
    toy.generator.set_state(state)
    for a, b in zip(first, _added(toy, rule, 1.0), strict=True):
        assert torch.equal(a, b)


def test_spectral_acts_from_the_second_step_and_shadow_from_the_first_refresh() -> None:
    spectral, shadow = OrthogonalityPenalty(), OrthogonalityPenalty("shadow", refresh_every=5)
    toy, other = Toy(spectral), Toy(shadow)
    for added in _added(toy, spectral, 1.0):
        assert float(added.norm()) == 0  # B = 0: no gradient, and no NaN
    toy.train(1)
    for added in _added(toy, spectral, 1.0):
        assert float(added.norm()) > 0
    other.train(4)
    assert float(shadow.value()) == 0
    assert all(float(a.norm()) == 0 for a in _added(other, shadow, 1.0))
    other.train(1)
    assert float(shadow.value()) > 0
    with torch.no_grad():
        for site in other.sites:
            site.B.mul_(3)
    assert all(float(a.norm()) > 0 for a in _added(other, shadow, 1.0))
    with torch.no_grad():
        for site in other.sites:
            site.B.mul_(1e-9)
    assert all(float(a.norm()) == 0 for a in _added(other, shadow, 1.0))
    assert float(shadow.value()) == 0


def test_shadows_follow_the_dense_average_within_the_reported_bound() -> None:
    m = 0.8
    rule = OrthogonalityPenalty("shadow", weight=0.0, refresh_every=10, momentum=m)
    toy = Toy(rule, lr=1e-2)
    site = toy.sites[0]
    dense, count = torch.zeros(48, 32, dtype=F64), 0
    for _ in range(12):
        toy.train(10)
        inverse = torch.linalg.pinv((site.B @ site.A).detach().double(), rtol=48 * 1.1920929e-07)
        dense, count = m * dense + (1 - m) * inverse.T, count + 1
        wanted = dense / (1 - m**count)
        shadow = rule.state_dict()["shadows"][site.key]
        error = float((shadow["U"].double() @ shadow["V"].double().T - wanted).norm())
        assert error <= 1.001 * float(shadow["error"]) + 1e-5 * float(wanted.norm())
    assert error < 0.2 * float(wanted.norm())
    found = rule.metrics()
    assert found["shadow_error"] < 0.2
    floor = math.sqrt(32 - 8)
    assert found["excess"] < found["penalty"] - math.sqrt(16 - 8) + 1e-6
    assert found["excess"] == pytest.approx(
        found["penalty"] - (floor + math.sqrt(16 - 8)) / 2, abs=1e-9
    )


def test_excess_is_zero_right_after_an_undamped_refresh() -> None:
    rule = OrthogonalityPenalty("shadow", refresh_every=3)
    Toy(rule, r=4).train(3)
    assert rule.metrics()["excess"] == pytest.approx(0, abs=1e-4)


def test_shadow_memory_is_twice_the_adapters() -> None:
    rule = OrthogonalityPenalty("shadow", refresh_every=1)
    toy = Toy(rule).train(6)
    adapter = sum(s.A.nbytes + s.B.nbytes for s in toy.sites)
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    tensors = rule.state_dict()["shadows"].values()
    assert sum(t.untyped_storage().nbytes() for s in tensors for t in s.values()) <= 2.01 * adapter
    assert len(buffer.getvalue()) <= 2 * adapter + 20_000


def test_a_refresh_rewrites_nothing_that_somebody_holds() -> None:
    """EgoRA's wrapper crashes at step 100: the shadow is written between forward and backward."""
    rule = OrthogonalityPenalty("shadow", refresh_every=1)
    toy = Toy(rule).train(2)
    shadow = rule._shadows[toy.sites[0].key]
    site = toy.sites[0]
    M = site.B @ site.A
    value = (
        (
            M @ (shadow.U @ shadow.V.T).T
            if M.shape[0] <= M.shape[1]
            else M.T @ (shadow.U @ shadow.V.T)
        )
        .square()
        .sum()
    )
    before, version = shadow.U.clone(), shadow.U._version
    rule.refresh()
    assert torch.equal(shadow.U, before)
    assert shadow.U._version == version
    value.backward()
    assert rule._shadows[site.key].U is not shadow.U


def test_factors_that_are_not_finite_raise_no_bare_error() -> None:
    rule = OrthogonalityPenalty("shadow", refresh_every=1)
    toy = Toy(rule).train(2)
    kept = rule.state_dict()["shadows"]
    with torch.no_grad():
        toy.sites[0].B[0, 0] = math.nan
    rule.refresh()
    new = rule.state_dict()["shadows"]
    for key in ("U", "V", "error", "refreshes"):
        assert torch.equal(new[toy.sites[0].key][key], kept[toy.sites[0].key][key])
    assert not torch.equal(new[toy.sites[1].key]["U"], kept[toy.sites[1].key]["U"])
    assert math.isnan(rule.metrics()["effective_rank"])


@pytest.mark.parametrize("kind", ["spectral", "shadow"])
def test_what_took_no_part_in_the_step_is_left_alone(kind: Any) -> None:
    rule = OrthogonalityPenalty(kind, refresh_every=1)
    toy = Toy(rule).train(2)
    _with_gradients(toy)
    toy.sites[0].A.grad = None
    rule.apply(_step(), 1.0)
    assert toy.sites[0].A.grad is None


@pytest.mark.parametrize("kind", ["spectral", "shadow"])
def test_a_frozen_part_counts_as_part_of_the_change(kind: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30))
    ls.attach(net, ls.LoRAConfig(r=3, init="pissa", targets=["0"]))
    (site,) = find_sites(net)
    assert site.factors.A0 is not None
    rule = OrthogonalityPenalty(kind, max_ratio=None, refresh_every=1, momentum=0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    driver = Dynamics(net, rule, optimizer, observe="manual")
    assert float(rule.value()) == 0  # the change is 0, whatever B A is
    for parameter in (site.A, site.B):
        parameter.grad = torch.zeros_like(parameter)
    rule.apply(_step(), 1.0)
    assert float(site.A.grad.norm() + site.B.grad.norm()) == 0
    with torch.no_grad():
        for parameter in (site.A, site.B):
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    a, b = (t.detach().double().requires_grad_() for t in (site.A, site.B))
    A0, B0 = site.factors.A0.double(), site.factors.B0.double()
    delta = b @ a - B0 @ A0
    if kind == "spectral":
        m = torch.linalg.svdvals(delta)[:6].square()
        value = math.log(1 + 1e-4) - torch.log(m / m.mean() + 1e-4).mean()
    else:
        rule.refresh()
        S = torch.linalg.pinv(delta.detach(), rtol=30 * 1.1920929e-07).T
        eye = torch.eye(20, dtype=F64)
        with torch.no_grad():
            site.B.mul_(1.5)
            b.mul_(1.5)
        delta = b @ a - B0 @ A0
        value = torch.sqrt(((delta.T @ S - eye) ** 2).sum() + 1e-8)
    assert float(rule.value()) == pytest.approx(float(value.detach()), rel=1e-4)
    g_A, g_B = torch.autograd.grad(value, (a, b))
    rule.apply(_step(), 1.0)
    assert _relative(site.A.grad, g_A) < 1e-3
    assert _relative(site.B.grad, g_B) < 1e-3
    driver.close()


def test_nothing_waits_for_the_device_in_a_step() -> None:
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert "_local_scalar_dense" not in str(func)
            assert "nonzero" not in str(func)
            return func(*args, **(kwargs or {}))

    for kind in ("spectral", "shadow"):
        rule = OrthogonalityPenalty(kind, refresh_every=2)  # type: ignore[arg-type]
        toy = Toy(rule).train(3)
        _with_gradients(toy)
        with NoWaiting():
            rule.apply(_step(3), torch.tensor(2.0))
            rule.after_step(_step(2))


@pytest.mark.parametrize("kind", ["spectral", "shadow"])
def test_resume_is_bit_exact(kind: Any) -> None:
    def rule() -> OrthogonalityPenalty:
        return OrthogonalityPenalty(kind, weight=0.3, refresh_every=4)

    whole = Toy(rule()).train(10)
    whole_then = Toy(rule()).train(6)
    buffer = io.BytesIO()
    torch.save(
        {
            "net": whole_then.net.state_dict(),
            "optimizer": whole_then.optimizer.state_dict(),
            "generator": whole_then.generator.get_state(),
        },
        buffer,
    )
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = Toy(rule())
    resumed.net.load_state_dict(saved["net"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.generator.set_state(saved["generator"])
    resumed.train(4)
    for a, b in zip(whole.sites, resumed.sites, strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
    assert whole.rule.metrics() == resumed.rule.metrics()


def test_states_that_do_not_belong_are_refused() -> None:
    shadow = OrthogonalityPenalty("shadow", refresh_every=1)
    Toy(shadow).train(2)
    state = shadow.state_dict()
    spectral = OrthogonalityPenalty()
    Toy(spectral)
    with pytest.raises(TrainingError, match="another orthogonality penalty"):
        spectral.load_state_dict(state)
    other = OrthogonalityPenalty("shadow")
    Toy(other, r=4)
    with pytest.raises(TrainingError, match="another shape"):
        other.load_state_dict(state)
    state["shadows"] = {"default/nowhere": next(iter(state["shadows"].values()))}
    with pytest.raises(TrainingError, match="not in training"):
        other.load_state_dict(state)


def test_works_on_a_peft_model_in_bfloat16() -> None:
    model = peft.get_peft_model(
        llama().to(torch.bfloat16),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
        autocast_adapter_dtype=False,
    ).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(0, 32, (3, 7))
    rule = OrthogonalityPenalty(weight=5.0)
    with Dynamics(model, rule, optimizer):
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert next(iter(find_sites(model))).B.dtype == torch.bfloat16
        found = rule.metrics()
    assert 1 <= found["effective_rank"] <= 2
    assert math.isfinite(found["penalty"])


def test_the_reported_loss_is_the_tasks_alone() -> None:
    model = llama().train()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    ids = torch.randint(0, 32, (3, 7))
    plain = model(input_ids=ids, labels=ids).loss.detach()
    model.eval()
    plain_eval = model(input_ids=ids, labels=ids).loss.detach()
    model.train()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    seen: list[Tensor] = []

    class Note(ls.Dynamic):
        name = "note"

        def before_step(self, step: Step) -> None:
            assert step.statistics.loss is not None
            seen.append(step.statistics.loss)

    rule = OrthogonalityPenalty(weight=1e6, max_ratio=None, scale="sum")
    with Dynamics(model, [rule, Note()], optimizer):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        assert float(rule.value()) > 0.1
        model.eval()
        evaluated = model(input_ids=ids, labels=ids).loss.detach()
    assert torch.equal(loss.detach(), plain)
    assert torch.equal(evaluated, plain_eval)
    assert float(seen[0]) == pytest.approx(float(plain), rel=1e-6)


def test_one_instance_one_run() -> None:
    rule = OrthogonalityPenalty()
    Toy(rule)
    with pytest.raises(ConfigError, match="belongs to a training run"):
        Toy(rule)
    assert isinstance(rule, Penalty)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "nuclear"},
        {"weight": -1.0},
        {"weight": math.nan},
        {"scale": "median"},
        {"max_ratio": 0.0},
        {"eps": 0.0},
        {"eps": True},
        {"refresh_every": 0},
        {"refresh_every": 1.5},
        {"momentum": 1.0},
        {"truncate": 1.0},
    ],
)
def test_values_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        OrthogonalityPenalty(**options)
    assert caught.value.key == next(iter(options))
