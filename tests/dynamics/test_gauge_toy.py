"""What gauge projection does to an optimiser, on ½ ‖B A − T‖², beside a loop in NumPy.

The loop is the textbook: Adam or gradient descent, and a projection by three symmetric roots.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorasmith as ls

R = 4


def start(seed: int, d_out: int) -> tuple[Any, Any, Any]:
    """T [d_out, 20] of rank R, A as LoRA starts it, and B = 0."""
    g = np.random.default_rng(seed)
    T = g.normal(size=(d_out, R)) @ g.normal(size=(R, 20)) / math.sqrt(20)
    return T, g.uniform(-1, 1, size=(R, 20)) / math.sqrt(20), np.zeros((d_out, R))


def root(matrix: Any, power: float) -> Any:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0) ** power) @ vectors.T


def by_hand(kind: str, optimizer: str, rate: float, seed: int, d_out: int, steps: int) -> Any:
    """B A after so many steps; ``None`` if it diverged."""
    T, A, B = start(seed, d_out)
    moments = [np.zeros_like(x) for x in (A, B, A, B)]
    for step in range(1, steps + 1):
        E = B @ A - T
        gradients = B.T @ E, E @ A.T
        if optimizer == "sgd":
            A, B = A - rate * gradients[0], B - rate * gradients[1]
        else:
            moved = []
            for i, (x, g) in enumerate(zip((A, B), gradients, strict=True)):
                moments[i] = 0.9 * moments[i] + 0.1 * g
                moments[2 + i] = 0.999 * moments[2 + i] + 0.001 * g**2
                size = np.sqrt(moments[2 + i] / (1 - 0.999**step)) + 1e-8
                moved.append(x - rate * moments[i] / (1 - 0.9**step) / size)
            A, B = moved
        if not np.abs(B @ A).max() < 1e6:
            return None
        if kind == "lora":
            continue
        half, back = root(A @ A.T, 0.5), root(A @ A.T, -0.5)
        S = back @ root(R / d_out * half @ B.T @ B @ half, 0.5) @ back
        turn, inverse = root(S, 0.5), root(S, -0.5)
        A, B = turn @ A, B @ inverse
        if kind == "transport":
            moments[0], moments[1] = inverse @ moments[0], moments[1] @ turn
            moments[2], moments[3] = inverse**2 @ moments[2], moments[3] @ turn**2
    return B @ A


class Factored(nn.Module):
    def __init__(self, A: Any, B: Any) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.from_numpy(A.copy()))
        self.lora_B = nn.Parameter(torch.from_numpy(B.copy()))

    def forward(self) -> torch.Tensor:
        return self.lora_B @ self.lora_A


def ours(kind: Any, optimizer: str, rate: float, seed: int, d_out: int, steps: int) -> Any:
    T, A, B = start(seed, d_out)
    model = Factored(A, B)
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    acting: Any = made(model.parameters(), lr=rate)
    if kind != "lora":
        acting = ls.GaugeProjectedOptimizer(acting, nn.ModuleList([model]), moments=kind)
    target = torch.from_numpy(T)
    for _ in range(steps):
        acting.zero_grad()
        ((model() - target).square().sum() / 2).backward()
        acting.step()
        if not float(model().detach().abs().max()) < 1e6:
            return None
    return model().detach().numpy()


def loss(product: Any, seed: int, d_out: int) -> float:
    return (
        math.inf if product is None else float(((product - start(seed, d_out)[0]) ** 2).sum()) / 2
    )


@pytest.mark.parametrize("kind", ["lora", "keep", "transport"])
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05), ("adam", 1e-2)])
def test_the_path_is_that_of_the_textbook(kind: str, optimizer: str, rate: float) -> None:
    for seed in range(2):
        mine = ours(kind, optimizer, rate, seed, 12, 40)
        np.testing.assert_allclose(mine, by_hand(kind, optimizer, rate, seed, 12, 40), atol=1e-7)


def test_adam_gets_further_with_transported_moments_than_with_those_left_behind() -> None:
    """Published with moments left behind; geometric mean of the final loss of three seeds."""
    found = {
        kind: [loss(ours(kind, "adam", 1e-2, seed, 12, 500), seed, 12) for seed in range(3)]
        for kind in ("keep", "transport")
    }
    kept, moved = (float(np.log10(found[kind]).mean()) for kind in ("keep", "transport"))
    assert moved < kept - 1
    assert max(found["transport"]) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_sgd_diverges_at_rates_at_which_plain_lora_does_not(seed: int) -> None:
    """Gradient descent at a minimum is stable below 2 / (‖A‖₂² + ‖B‖₂²).

    In the gauge of μ that is 2 √μ / (σ₁ (1 + μ)); plain LoRA, from a small A, ends near the
    evenly shared 1 / σ₁. With μ = R / d_out = 1 / 16 the two are a factor of two apart.
    """
    d_out = 16 * R
    T = start(seed, d_out)[0]
    largest, mu = float(np.linalg.svd(T)[1][0]), 1 / 16
    limit = 2 * math.sqrt(mu) / (largest * (1 + mu))
    for rate, converges in ((0.9 * limit, True), (1.4 * limit, False)):
        assert loss(ours("lora", "sgd", rate, seed, d_out, 1500), seed, d_out) < 1e-8
        product = ours("keep", "sgd", rate, seed, d_out, 1500)
        assert (loss(product, seed, d_out) < 1e-8) == converges
        beside = by_hand("keep", "sgd", rate, seed, d_out, 1500)
        assert (loss(beside, seed, d_out) < 1e-8) == converges
    # What the limit is of: the curvature at the minimum, in this gauge.
    model = Factored(*start(seed, d_out)[1:])
    U, s, V = np.linalg.svd(T, full_matrices=False)
    with torch.no_grad():
        model.lora_B.copy_(torch.from_numpy(U[:, :R] * s[:R] ** 0.5))
        model.lora_A.copy_(torch.from_numpy(s[:R, None] ** 0.5 * V[:R]))
    ls.project_gauge_((model.lora_A, model.lora_B), mu)
    norms = [float(torch.linalg.matrix_norm(p.detach(), 2)) ** 2 for p in model.parameters()]
    assert 2 / sum(norms) == pytest.approx(limit, rel=1e-6)
