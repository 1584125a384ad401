"""Spectra of changes, against dense float64 and against what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.core.variant import Factors
from lorasmith.diagnostics import spectrum
from lorasmith.diagnostics.spectrum import (
    effective_rank,
    energy_in_top,
    intruder_cosines,
    layer_spectrum,
    rounding_norm,
    singular_values,
    stable_rank,
    weight_svd,
)
from lorasmith.errors import ConfigError

SHAPES = [(60, 40), (40, 60), (48, 48)]


def draw(d_out: int, d_in: int, r: int = 6, seed: int = 0, frozen: bool = False) -> Factors:
    g = torch.Generator().manual_seed(seed)
    shapes = [(r, d_in), (d_out, r)] * (2 if frozen else 1)
    A, B, *start = (torch.randn(s, generator=g) for s in shapes)
    return Factors(A, B, 0.7, *start)


def base(d_out: int, d_in: int, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, d_in, generator=g) / math.sqrt(d_in)


def dense(f: Factors) -> np.ndarray:
    delta = f.B.detach().double() @ f.A.detach().double()
    if f.A0 is not None:
        delta = delta - f.B0.double() @ f.A0.double()
    return f.scaling * delta.numpy()


def basis(d: int, k: int, seed: int) -> np.ndarray:
    """k orthonormal columns."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, k)))[0]


def dense_cosines(before: np.ndarray, after: np.ndarray, top: int) -> np.ndarray:
    U = np.linalg.svd(before, full_matrices=False)[0]
    Y = np.linalg.svd(after, full_matrices=False)[0][:, :top]
    return np.abs(U.T @ Y).max(axis=0)


def as_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype = torch.float64) -> Factors:
    """Factors of left @ right.T."""
    return Factors(
        torch.from_numpy(right.T.copy()).to(dtype), torch.from_numpy(left.copy()).to(dtype), 1.0
    )


# -- the measures ----------------------------------------------------------------------


def test_ranks_of_equal_values_are_their_number() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7, rel=1e-12)
    assert stable_rank(torch.full((7,), 3.0)) == pytest.approx(7, rel=1e-12)


def test_the_measures_follow_their_formulas() -> None:
    values = np.array([5.0, 2.0, 1.0, 0.5])
    p = values**2 / (values**2).sum()
    assert effective_rank(torch.tensor(values)) == pytest.approx(
        math.exp(-(p * np.log(p)).sum()), rel=1e-12
    )
    assert stable_rank(torch.tensor(values)) == pytest.approx((values**2).sum() / 25, rel=1e-12)


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0]])
def test_nothing_has_no_rank(values: list[float]) -> None:
    assert effective_rank(torch.tensor(values)) == 0
    assert stable_rank(torch.tensor(values)) == 0


@given(st.lists(st.floats(1e-150, 1e150), min_size=1, max_size=12), st.floats(1e-6, 1e6))
def test_the_measures_keep_their_order_and_know_no_scale(values: list[float], c: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    stable, effective = stable_rank(v), effective_rank(v)
    assert 1 - 1e-9 <= stable <= effective * (1 + 1e-9) <= len(values) * (1 + 1e-8)
    assert effective_rank(c * v) == pytest.approx(effective, rel=1e-9)
    assert stable_rank(c * v) == pytest.approx(stable, rel=1e-9)


# -- singular values -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (4, 60), (60, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_from_factors_are_those_of_the_dense_change(
    shape: tuple[int, int], frozen: bool
) -> None:
    f = draw(*shape, frozen=frozen)
    expected = np.linalg.svd(dense(f), compute_uv=False)
    found = singular_values(f).numpy()
    assert found.shape[0] == min(*shape, 12 if frozen else 6)
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-11, atol=1e-13)


def test_small_values_keep_their_digits() -> None:
    # A Gram matrix would leave nothing of 1e-9.
    values = np.array([1.0, 1e-3, 1e-6, 1e-9])
    f = as_factors(basis(50, 4, 0) * values, basis(30, 4, 1))
    np.testing.assert_allclose(singular_values(f).numpy(), values, rtol=1e-6)


def test_a_small_step_from_a_large_start_does_not_cancel() -> None:
    f = draw(50, 40, frozen=True)
    step = 1e-6
    A, B = f.A0.double(), f.B0.double()
    a = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(A.shape)))
    moved = Factors(A + step * a, B, 1.0, A, B)
    expected = np.linalg.svd(B.numpy() @ (moved.A - A).numpy(), compute_uv=False)[:6]
    np.testing.assert_allclose(singular_values(moved).numpy()[:6], expected, rtol=1e-9)
    # A itself is known to a rounding error only, and the step is to 1e-10 of it.
    assert layer_spectrum(base(50, 40), moved, name="x", top=0).rank == 6


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_the_gauge_changes_nothing(seed: int, scale: float) -> None:
    f = draw(30, 20, r=4, seed=seed)
    rng = np.random.default_rng(seed)
    spread = np.diag(scale ** rng.uniform(-1, 1, 4))
    R = torch.from_numpy(basis(4, 4, seed) @ spread)
    A, B = f.A.double(), f.B.double()
    plain = layer_spectrum(base(30, 20), Factors(A, B, 0.7), name="x", top=3)
    gauged = Factors(R @ A, B @ torch.linalg.inv(R), 0.7)
    other = layer_spectrum(base(30, 20), gauged, name="x", top=3)
    assert plain.rank == other.rank
    assert plain.singular_values == pytest.approx(other.singular_values, rel=1e-9)
    assert plain.energy_in_top == pytest.approx(other.energy_in_top, rel=1e-8, abs=1e-12)
    assert plain.intruder_cosines == pytest.approx(other.intruder_cosines, rel=1e-6)


@given(st.floats(1e-6, 1e6))
def test_values_follow_the_scale_and_shares_do_not(c: float) -> None:
    f = draw(30, 20, r=4)
    one = layer_spectrum(base(30, 20), f, name="x", intruders=False)
    other = layer_spectrum(
        base(30, 20), Factors(f.A, f.B, f.scaling * c), name="x", intruders=False
    )
    assert other.singular_values == pytest.approx([c * v for v in one.singular_values], rel=1e-9)
    assert (other.rank, other.top) == (one.rank, one.top)
    for field in ("effective_rank", "stable_rank", "energy_in_top"):
        assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_rank_planted_in_factors_is_found(dtype: torch.dtype, rank: int) -> None:
    rng = np.random.default_rng(rank)
    A = torch.from_numpy(rng.standard_normal((8, rank)) @ rng.standard_normal((rank, 90)))
    B = torch.from_numpy(rng.standard_normal((70, 8)))
    f = Factors(A.to(dtype), B.to(dtype), 2.0)
    assert layer_spectrum(base(70, 90), f, name="x", top=0).rank == rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (640, 530)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_rank_planted_in_two_checkpoints_is_found(
    dtype: torch.dtype, shape: tuple[int, int], rank: int
) -> None:
    W = base(*shape).to(dtype)
    values = np.linspace(1.0, 0.3, rank)
    delta = (basis(shape[0], rank, 1) * values) @ basis(shape[1], rank, 2).T
    tuned = (W.double() + torch.from_numpy(delta)).to(dtype)
    found = layer_spectrum(W, tuned, name="x", top=0)
    assert found.rank == rank
    tolerance = 1e-3 + rounding_norm(tuned)
    np.testing.assert_allclose(found.singular_values, values, rtol=tolerance)
    expected = torch.from_numpy(values)
    assert found.effective_rank == pytest.approx(effective_rank(expected), rel=0.01)
    assert found.stable_rank == pytest.approx(stable_rank(expected), rel=0.01)


@pytest.mark.parametrize("side", [100, 600])
def test_a_change_of_full_rank_has_full_rank(side: int) -> None:
    W = base(side, side)
    U, V = basis(side, side, 1), basis(side, side, 2)
    tuned = W.double() + torch.from_numpy((U * np.linspace(2, 1, side)) @ V.T)
    found = layer_spectrum(W, tuned.float(), name="x", top=0)
    assert found.rank == side
    assert len(found.singular_values) == 64
    np.testing.assert_allclose(found.singular_values, np.linspace(2, 1, side)[:64], rtol=1e-6)


@pytest.mark.parametrize("rank", [40, 70])
def test_a_rank_too_large_for_the_first_search_is_found(rank: int) -> None:
    W = base(1300, 1290)
    delta = basis(1300, rank, 1) @ basis(1290, rank, 2).T  # all values equal
    found = layer_spectrum(W, (W.double() + torch.from_numpy(delta)).float(), name="x", top=0)
    assert found.rank == rank
    np.testing.assert_allclose(found.singular_values, np.ones(min(rank, 64)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 200), (16, 400), (400, 16)])
def test_rounding_is_recognised_as_such(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    exact = base(*shape).double()
    # Rows and columns of very different size, as real weights have.
    exact *= torch.logspace(-1, 1, shape[0], dtype=torch.float64)[:, None]
    stored = exact.to(dtype)
    error = np.linalg.norm((stored.double() - exact).numpy(), 2)
    assert error < rounding_norm(stored) < 3 * error
    assert layer_spectrum(exact, stored, name="x", top=0).rank == 0


def test_numbers_too_small_for_their_dtype_are_rounded_worse() -> None:
    exact = base(200, 200).double() * 1e-6
    stored = exact.half()
    assert np.linalg.norm((stored.double() - exact).numpy(), 2) < rounding_norm(stored)


@pytest.mark.parametrize("kind", ["factors", "frozen", "dense"])
def test_no_change_is_no_change(kind: str) -> None:
    W, f = base(40, 30), draw(40, 30, frozen=True)
    change = {
        "factors": Factors(f.A, torch.zeros_like(f.B), 1.0),
        "frozen": Factors(f.A0, f.B0, 1.0, f.A0, f.B0),
        "dense": W.clone(),
    }[kind]
    found = layer_spectrum(W, change, name="model.layers.3.mlp.up_proj", layer=3)
    assert (found.rank, found.effective_rank, found.stable_rank) == (0, 0, 0)
    assert found.singular_values == ()
    assert found.energy_in_top is None
    assert found.intruders == 0
    assert found.intruder_cosines == (1.0,) * 10
    assert (found.name, found.layer, found.projection) == (
        "model.layers.3.mlp.up_proj",
        3,
        "up_proj",
    )


# -- where it lies ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dense_change", [False, True])
@pytest.mark.parametrize("top", [1, 5, 40])
def test_energy_in_the_top_is_that_of_the_dense_form(
    shape: tuple[int, int], dense_change: bool, top: int
) -> None:
    W, f = base(*shape), draw(*shape, frozen=True)
    delta = dense(f)
    U, _, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    total = (delta**2).sum()
    expected = [
        ((U[:, :top].T @ delta @ Vt[:top].T) ** 2).sum() / total,
        ((U[:, :top].T @ delta) ** 2).sum() / total,
        ((delta @ Vt[:top].T) ** 2).sum() / total,
    ]
    change = W.double() + torch.from_numpy(delta) if dense_change else f
    found = energy_in_top(W, change, top=top)
    assert found is not None
    assert [found.both, found.left, found.right] == pytest.approx(expected, rel=1e-10)


def test_energy_of_planted_changes() -> None:
    W = base(50, 40).double()
    U, _, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    inside = as_factors(U[:, :4] @ basis(4, 4, 0), Vt[:4].T)
    outside = as_factors(U[:, 20:24], Vt[30:34].T)
    scaled = 1.3 * W
    assert layer_spectrum(W, inside, name="x", top=4).energy_in_top == pytest.approx(1, rel=1e-12)
    assert layer_spectrum(W, outside, name="x", top=4).energy_in_top < 1e-20
    singular = np.linalg.svd(W.numpy(), compute_uv=False)
    expected = (singular[:4] ** 2).sum() / (singular**2).sum()
    assert layer_spectrum(W, scaled, name="x", top=4).energy_in_top == pytest.approx(
        expected, rel=1e-12
    )


def test_energy_by_chance() -> None:
    W = base(150, 100)
    shares = [energy_in_top(W, draw(150, 100, r=16, seed=s), top=10).both for s in range(40)]
    assert np.mean(shares) == pytest.approx(100 / 15_000, rel=0.1)


def test_a_subspace_is_not_larger_than_the_weight() -> None:
    W = base(30, 3).double() @ base(3, 20).double()
    found = layer_spectrum(W, draw(30, 20), name="x", top=10)
    assert found.top == 3


# -- intruders -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (300, 280), (310, 400)])
@pytest.mark.parametrize("size", [0.02, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("krylov", [False, True])
def test_cosines_are_those_of_the_dense_form(
    shape: tuple[int, int], size: float, krylov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if krylov:
        monkeypatch.setattr(spectrum, "_SMALL", 128)
    W, f = base(*shape), draw(*shape)
    f = Factors(f.A / shape[1] ** 0.5, f.B / shape[0] ** 0.5 * size, 1.0)
    after = W.double().numpy() + dense(f)
    expected = dense_cosines(W.double().numpy(), after, 8)
    np.testing.assert_allclose(intruder_cosines(W, f, top=8), expected, atol=1e-7)
    np.testing.assert_allclose(
        intruder_cosines(W, torch.from_numpy(after), top=8), expected, atol=1e-7
    )
    np.testing.assert_allclose(
        intruder_cosines(W, f, top=8, svd=weight_svd(W)), expected, atol=1e-7
    )


@pytest.mark.parametrize("shape", [(300, 280), (280, 300), (300, 300), (500, 270)])
@pytest.mark.parametrize("planted", [0, 1, 3, 10])
@pytest.mark.parametrize("krylov", [False, True])
def test_as_many_intruders_are_found_as_were_planted(
    shape: tuple[int, int], planted: int, krylov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if krylov:
        monkeypatch.setattr(spectrum, "_SMALL", 128)
    W = base(*shape)
    # New directions, all equally strong, above everything that W has.
    left = basis(shape[0], max(planted, 1), 1) * (4.0 if planted else 1e-4)
    f = as_factors(left, basis(shape[1], max(planted, 1), 2), torch.float32)
    found = layer_spectrum(W, f, name="x")
    assert found.intruders == planted
    assert len(found.intruder_cosines) == 10
    assert all(c < 0.3 for c in found.intruder_cosines[:planted])
    tuned = (W.double() + torch.from_numpy(dense(f))).float()
    assert layer_spectrum(W, tuned, name="x").intruders == planted


def test_directions_below_the_top_are_not_counted() -> None:
    W = base(100, 90)
    f = as_factors(basis(100, 3, 1) * 0.1, basis(90, 3, 2))
    assert layer_spectrum(W, f, name="x").intruders == 0


@pytest.mark.parametrize("factor", [0.3, 0.85, 1.5, -1.0, 30.0])
def test_scaling_has_no_intruders(factor: float) -> None:
    W = base(80, 70)
    found = layer_spectrum(W, factor * W.double(), name="x")
    assert found.intruders == 0
    assert min(found.intruder_cosines) > 1 - 1e-9


def test_other_values_on_the_same_vectors_are_no_intruders() -> None:
    W = base(80, 70).double()
    U, _, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    # Vectors from deep inside W come to the top.
    f = as_factors(U[:, 30:36] * np.linspace(5, 8, 6), Vt[30:36].T)
    found = layer_spectrum(W, f, name="x")
    assert found.intruders == 0
    assert min(found.intruder_cosines) > 1 - 1e-9


@pytest.mark.parametrize(("degrees", "intruders"), [(30, 0), (44, 0), (80, 0)])
def test_turning_within_a_plane_of_the_weight_is_no_intrusion(
    degrees: float, intruders: int
) -> None:
    U, values, Vt = np.linalg.svd(base(80, 70).double().numpy(), full_matrices=False)
    values[:2] = 5, 4
    W = torch.from_numpy((U * values) @ Vt)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = U[:, :2] @ np.array([[c, -s], [s, c]])
    f = as_factors((turned - U[:, :2]) * values[:2], Vt[:2].T)
    found = layer_spectrum(W, f, name="x")
    assert found.intruders == intruders
    assert found.intruder_cosines[:2] == pytest.approx([max(c, s)] * 2, rel=1e-9)


def test_the_threshold_is_the_users() -> None:
    U, values, Vt = np.linalg.svd(base(80, 70).double().numpy(), full_matrices=False)
    values[0] = 5
    W = torch.from_numpy((U * values) @ Vt)
    new = 0.6 * U[:, 0] + 0.8 * U[:, 69]  # in the span of two: 0.8 is the nearest
    f = as_factors((5 * (new - U[:, 0]))[:, None], Vt[:1].T)
    assert layer_spectrum(W, f, name="x", epsilon=0.5).intruders == 0
    assert layer_spectrum(W, f, name="x", epsilon=0.9).intruders == 1


def test_what_is_outside_of_a_low_rank_weight_is_new() -> None:
    # The null space of W has no singular vectors: a new direction there is an intruder, even
    # if it is the only one left.
    U, V = basis(40, 40, 0), basis(40, 40, 1)
    W = torch.from_numpy((U[:, :39] * np.linspace(3, 1, 39)) @ V[:, :39].T)
    f = as_factors(10 * U[:, 39:], V[:, 39:])
    assert layer_spectrum(W, f, name="x").intruders == 1


def test_intruders_need_no_weight_before() -> None:
    found = layer_spectrum(torch.zeros(30, 20), draw(30, 20, r=4), name="x")
    assert (found.intruders, found.top) == (4, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes_are_taken_as_they_are(dtype: torch.dtype) -> None:
    W, f = base(90, 80).to(dtype), draw(90, 80)
    expected = dense_cosines(W.double().numpy(), W.double().numpy() + dense(f), 10)
    np.testing.assert_allclose(layer_spectrum(W, f, name="x").intruder_cosines, expected, atol=1e-9)


# -- the machinery ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(700, 300), (300, 700)])
@pytest.mark.parametrize("top", [3, 10])
@pytest.mark.parametrize("repeat", [False, True])
def test_leading_vectors_without_the_others(
    shape: tuple[int, int], top: int, repeat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "_SMALL", 128)
    W = base(*shape).double()
    if repeat:
        U, values, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
        values[:6] = 4
        W = torch.from_numpy((U * values) @ Vt)
    svd = weight_svd(W, top)
    assert not svd.whole
    U, values, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose(svd.values, values[:top], rtol=1e-12)
    left, right = svd.top(W, top)
    for found, expected in ((left, U[:, :top]), (right, Vt[:top].T)):
        np.testing.assert_allclose(found.T @ found, np.eye(top), atol=1e-10)
        if top == 10 or not repeat:  # else part of a subspace of equal values
            np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 9])
def test_leading_vectors_of_a_low_rank_weight(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_SMALL", 128)
    values = np.linspace(3, 1, rank)
    W = torch.from_numpy((basis(400, rank, 0) * values) @ basis(350, rank, 1).T)
    svd = weight_svd(W, 12)
    assert svd.whole
    np.testing.assert_allclose(svd.values, values, rtol=1e-9)


def test_bases_stay_orthonormal_where_nothing_is_added() -> None:
    low = torch.from_numpy(basis(400, 3, 0) @ basis(400, 3, 1).T)
    apply = spectrum._gram_apply(low)
    for turn, (values, vectors, _) in enumerate(
        spectrum._krylov(apply, 400, 8, torch.device("cpu"))
    ):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-12)
        if turn:
            np.testing.assert_allclose(values, [1, 1, 1, 0, 0, 0, 0, 0], atol=1e-12)
        if turn == 10:
            break


def test_large_matrices_are_widened_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    W, f = base(70, 60), draw(70, 60)
    expected = layer_spectrum(W, f, name="x")
    tuned = (W.double() + torch.from_numpy(dense(f))).float()
    other = layer_spectrum(W, tuned, name="x")
    monkeypatch.setattr(spectrum, "_BLOCK", 100)
    for change, before in ((f, expected), (tuned, other)):
        found = layer_spectrum(W, change, name="x")
        assert found.rank == before.rank
        assert found.singular_values == pytest.approx(before.singular_values, rel=1e-6)
        assert found.intruder_cosines == pytest.approx(before.intruder_cosines, rel=1e-6)
        assert found.energy_in_top == pytest.approx(before.energy_in_top, rel=1e-6)


def test_the_same_input_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_SMALL", 128)
    W, f = base(300, 280), draw(300, 280)
    torch.manual_seed(1)
    one = layer_spectrum(W, f, name="x")
    torch.manual_seed(2)
    assert layer_spectrum(W, f, name="x") == one


def test_weights_and_factors_are_only_read() -> None:
    W, f = base(30, 20).requires_grad_(), draw(30, 20)
    live = Factors(f.A.clone().requires_grad_(), f.B.clone().requires_grad_(), 1.0)
    before = W.detach().clone()
    layer_spectrum(W, live, name="x")
    assert torch.equal(W.detach(), before)
    assert torch.equal(live.A.detach(), f.A)
    assert live.A.grad is None


def test_intruders_and_energy_can_be_left_out() -> None:
    W, f = base(30, 20), draw(30, 20)
    found = layer_spectrum(W, f, name="x", intruders=False)
    assert found.intruders is None
    assert found.intruder_cosines == ()
    assert found.energy_in_top is not None
    found = layer_spectrum(W, f, name="x", top=0)
    assert (found.energy_in_top, found.top, found.intruders) == (None, 0, None)
    assert len(layer_spectrum(W, f, name="x", top=0, keep=2).singular_values) == 2


def test_factors_that_are_not_all_are_refused() -> None:
    f = draw(30, 20)
    with pytest.raises(ConfigError, match="not the whole change"):
        layer_spectrum(base(30, 20), Factors(f.A, f.B, 1.0, exact=False), name="x")


def test_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="another shape"):
        layer_spectrum(base(30, 20), base(20, 30), name="x")
