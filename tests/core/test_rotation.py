"""Angles from factors, against dense float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.core.rotation import (
    angle,
    change_bound,
    inner_factor,
    largest_fraction,
    largest_scale,
    make_path,
    noise_floor,
    product,
    rotation,
    squared_norms,
    wide_product,
)


def dense_angle(before: Tensor, after: Tensor) -> float:
    """Degrees between two tensors, from chords of unit vectors (Kahan), in float64."""
    a, b = before.double().flatten().numpy(), after.double().flatten().numpy()
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def dora(weight: Tensor, delta: Tensor, m: Tensor) -> Tensor:
    moved = weight.double() + delta
    return moved * (m.double() / moved.norm(dim=1))[:, None]


def units_of(weight: Tensor, units: int, axis: str) -> tuple[Tensor, ...]:
    return torch.chunk(weight, units, dim=0 if axis == "out" else 1)


def draw(
    d_out: int, d_in: int, r: int = 3, seed: int = 0, frozen: bool = False
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"weight": (d_out, d_in), "A": (r, d_in), "B": (d_out, r)}
    if frozen:
        shapes |= {"A0": (r, d_in), "B0": (d_out, r)}
    return {k: torch.randn(s, generator=g) for k, s in shapes.items()}


@pytest.mark.parametrize("scale", [2e-5, 1e-3, 0.05, 0.5, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_angle_is_exact_from_tiny_to_large(scale: float, dtype: torch.dtype) -> None:
    t = draw(300, 200, r=16)
    weight = t["weight"].to(dtype)
    expected = dense_angle(weight, weight.double() + scale / 8 * t["B"].double() @ t["A"].double())
    found = rotation(weight, t["A"], t["B"], scale / 8)
    assert found.degrees.item() == pytest.approx(expected, rel=1e-6)
    assert 4e-4 < expected < 89


@pytest.mark.parametrize("degrees", [5e-4, 0.57, 83.0])
def test_large_matrices_do_not_lose_digits(degrees: float) -> None:
    """float32's norm is off by 6.5e-4 over 4096² entries, and its cosine hides 0.57°."""
    d = 4096
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(d, d, generator=g)
    A, B = torch.randn(4, d, generator=g), torch.randn(d, 4, generator=g)
    scale = math.tan(math.radians(degrees)) / 2
    n2 = inner = delta = 0.0
    for w, b in zip(weight.split(256), B.split(256), strict=True):  # the dense form in blocks
        w64, e = w.double().numpy(), scale * (b.double() @ A.double()).numpy()
        n2, inner, delta = n2 + (w64**2).sum(), inner + (w64 * e).sum(), delta + (e**2).sum()
    par = inner / math.sqrt(n2)
    expected = math.degrees(math.atan2(math.sqrt(delta - par**2), math.sqrt(n2) + par))
    assert rotation(weight, A, B, scale).degrees.item() == pytest.approx(expected, rel=1e-6)
    fast = rotation(weight, A, B, scale, dtype=torch.float32)
    assert fast.degrees.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_units_against_dense_slices(axis: str, frozen: bool, magnitude: bool) -> None:
    t = draw(12, 20, frozen=frozen)
    delta = 0.3 * t["B"].double() @ t["A"].double()
    if frozen:
        delta -= 0.3 * t["B0"].double() @ t["A0"].double()
    m = torch.rand(12, generator=torch.Generator().manual_seed(3)) * 3 + 0.5
    after = dora(t["weight"], delta, m) if magnitude else t["weight"].double() + delta
    found = rotation(
        t["weight"],
        t["A"],
        t["B"],
        0.3,
        A0=t.get("A0"),
        B0=t.get("B0"),
        units=4,
        axis=axis,
        magnitude=m if magnitude else None,
    )
    pairs = list(zip(units_of(t["weight"], 4, axis), units_of(after, 4, axis), strict=True))
    expected = [dense_angle(w, v) for w, v in pairs]
    ratio = [float(v.norm() / w.double().norm()) for w, v in pairs]
    assert found.degrees.tolist() == pytest.approx(expected, rel=1e-7)
    assert found.norm_ratio.tolist() == pytest.approx(ratio, rel=1e-7)


def test_one_head_turned_by_90_degrees_is_seen_in_that_head() -> None:
    """EgoRA: "per head" is per projection, and reports 41.9° (41.4° for equal norms)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=g, dtype=torch.float64)
    weight = weight / weight.view(4, -1).norm(dim=1).repeat_interleave(4)[:, None]
    new = torch.randn(4, 32, generator=g, dtype=torch.float64)
    old = weight[4:8]
    new = new - (new * old).sum() * old  # flattened, at right angles, and of equal norm
    new = new / new.norm()
    delta = torch.zeros(16, 32, dtype=torch.float64)
    delta[4:8] = new - old
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    A, B = v[:4], u[:, :4] * s[:4]
    heads = rotation(weight, A, B, units=4).degrees
    assert heads.tolist() == pytest.approx([0, 90, 0, 0], abs=1e-6)
    whole = rotation(weight, A, B).degrees.item()
    assert whole == pytest.approx(math.degrees(math.acos(0.75)), rel=1e-9)  # 41.4°


@pytest.mark.parametrize("factor", [0.85, 1.3])
def test_scaling_alone_is_no_rotation(factor: float) -> None:
    g = torch.Generator().manual_seed(1)
    A = torch.randn(3, 10, generator=g, dtype=torch.float64)
    B = torch.randn(8, 3, generator=g, dtype=torch.float64)
    found = rotation(B @ A, A, B, factor - 1, units=4)
    assert float(found.degrees.max()) < 1e-5
    assert found.norm_ratio.tolist() == pytest.approx([factor] * 4, rel=1e-12)


def test_gauge_changes_nothing() -> None:
    t = draw(12, 20)
    R = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    A, B = t["A"].double(), t["B"].double()
    one = rotation(t["weight"], A, B, units=3)
    other = rotation(t["weight"], R @ A, B @ torch.linalg.inv(R), units=3)
    assert one.theta.tolist() == pytest.approx(other.theta.tolist(), rel=1e-10)


def test_a_unit_that_is_zero_has_no_angle() -> None:
    t = draw(8, 6)
    t["weight"][2:4] = 0
    found = rotation(**t, units=4)
    assert found.theta[1].item() == 0
    assert bool((found.theta[[0, 2, 3]] > 0).all())


def test_a_frozen_part_that_nearly_cancels_keeps_its_digits() -> None:
    t = draw(40, 30, frozen=True)
    g = torch.Generator().manual_seed(8)
    t["A"] = t["A0"] + 1e-6 * torch.randn(3, 30, generator=g)
    t["B"] = t["B0"] + 1e-6 * torch.randn(40, 3, generator=g)
    b, a = t["B"].double() - t["B0"].double(), t["A"].double() - t["A0"].double()
    delta = b @ t["A0"].double() + t["B"].double() @ a  # exact in float64
    par = float((t["weight"].double() * delta).sum() / t["weight"].double().norm())
    norm = float(t["weight"].double().norm())
    expected = math.atan2(math.sqrt(float(delta.square().sum()) - par**2), norm + par)
    assert rotation(**t).theta.item() == pytest.approx(expected, rel=1e-6)


def test_norms_of_blocks_of_columns() -> None:
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    expected = [(w.double() ** 2).sum(dim=1).tolist() for w in weight.chunk(3, dim=1)]
    assert torch.allclose(squared_norms(weight, 3), torch.tensor(expected, dtype=torch.float64))
    expected = [(w.double() ** 2).sum(dim=1).tolist() for w in weight.T.chunk(7, dim=1)]
    assert torch.allclose(squared_norms(weight.T, 7), torch.tensor(expected, dtype=torch.float64))


def test_norms_and_products_make_no_float64_copy_of_the_weight() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64:
                self.bytes = max(self.bytes, out.numel() * 8)
            return out

    weight, factor = torch.ones(2048, 1024, dtype=torch.bfloat16), torch.ones(4, 1024)
    with Largest() as seen:
        squared_norms(weight)
        squared_norms(weight.T)
        product(weight, factor)
    assert 0 < seen.bytes <= 2**20  # a copy would have 2^24


def test_the_product_is_differentiable_without_keeping_the_weight() -> None:
    t = draw(30, 20)
    weight, factor = t["weight"].bfloat16(), t["A"].double().requires_grad_(True)
    g = torch.randn(30, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found,) = torch.autograd.grad(product(weight, factor), factor, g)
    assert torch.allclose(found, g.T @ weight.double(), rtol=1e-12)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


@given(
    shapes,
    st.integers(0, 10_000),
    st.floats(1e-3, 30),
    st.floats(0.05, 80),
    st.sampled_from(["out", "in"]),
)
def test_the_largest_scale_meets_the_limit(
    shape: tuple[int, int, int], seed: int, scale: float, limit: float, axis: str
) -> None:
    units, size, r = shape
    d_out, d_in = (units * size, 5) if axis == "out" else (5, units * size)
    t = {k: v.double() for k, v in draw(d_out, d_in, r, seed).items()}
    found = rotation(**t, scaling=scale, units=units, axis=axis)
    parts = (found.squared, found.inner, found.delta)
    c = largest_scale(*parts, math.radians(limit))
    delta = scale * t["B"] @ t["A"]
    pieces = zip(
        units_of(t["weight"], units, axis), units_of(delta, units, axis), c.tolist(), strict=True
    )
    for (w, e, factor), theta in zip(pieces, found.degrees.tolist(), strict=True):
        turned = dense_angle(w, w + factor * e)
        assert turned <= limit * (1 + 1e-9) + 1e-6
        if theta <= limit:
            assert factor == pytest.approx(1, rel=1e-6)
        elif dense_angle(w, -e) > 1e-3:  # not straight through zero
            assert turned == pytest.approx(limit, rel=1e-5)


@given(
    st.integers(0, 10_000),
    st.floats(1e-3, 5),
    st.sampled_from(["out", "in"]),
    st.booleans(),
    st.booleans(),
    st.floats(0, 1),
)
def test_the_way_back_and_the_bound_against_dense(
    seed: int, scale: float, axis: str, frozen: bool, magnitude: bool, t: float
) -> None:
    """The angle at any point of the way, and that the bound without W is one."""
    x = {k: v.double() for k, v in draw(6, 8, 2, seed, frozen).items()}
    m = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    columns = axis == "in" and magnitude
    W, A, B, A0, B0 = x["weight"], x["A"], x["B"], x.get("A0"), x.get("B0")
    if axis == "in" and not columns:
        W, A, B = W.T, B.T, A.T
        if A0 is not None and B0 is not None:
            A0, B0 = B0.T, A0.T

    def path(wide: Tensor | None) -> object:
        squared = squared_norms(W, 2 if columns else 1)
        return make_path(
            squared[None] if columns else squared,
            A[None],
            B[None],
            scale,
            wide,
            A0=None if A0 is None else A0[None],
            B0=None if B0 is None else B0[None],
            units=2,
            magnitude=m[None] if magnitude else None,
            columns=columns,
        )

    low = inner_factor(A, A0)
    full = path(wide_product(W, low, 2 if columns else 1, torch.float64)[None])
    start_a, start_b = (x["A0"], x["B0"]) if frozen else (x["A"] * 0, x["B"] * 0)
    if frozen:
        at, bt = start_a + t * (x["A"] - start_a), start_b + t * (x["B"] - start_b)
    else:
        at, bt = x["A"], t * x["B"]
    delta = scale * (bt @ at - start_b @ start_a)
    n = x["weight"].norm(dim=1)
    after = dora(x["weight"], delta, n + t * (m - n)) if magnitude else x["weight"] + delta
    pairs = list(zip(units_of(x["weight"], 2, axis), units_of(after, 2, axis), strict=True))
    expected = [dense_angle(w, v) for w, v in pairs]
    found = torch.rad2deg(full.theta(t))[0].tolist()  # type: ignore[attr-defined]
    assert found == pytest.approx(expected, rel=1e-6, abs=2e-6)
    if t == 1:
        changes = [float((v - w).square().sum()) for w, v in pairs]
        bound = change_bound(path(None))[0].tolist()  # type: ignore[arg-type]
        assert all(b >= c * (1 - 1e-9) for b, c in zip(bound, changes, strict=True))


@given(st.integers(0, 10_000), st.floats(0.01, 10), st.sampled_from(["out", "in"]), st.booleans())
def test_the_bound_that_needs_no_weight_is_one(
    seed: int, scale: float, axis: str, magnitude: bool
) -> None:
    x = {k: v.double() for k, v in draw(6, 8, 2, seed).items()}
    m = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    delta = scale * 0.1 * x["B"] @ x["A"]
    after = dora(x["weight"], delta, m) if magnitude else x["weight"] + delta
    columns = axis == "in" and magnitude
    swap = axis == "in" and not columns
    W = x["weight"].T if swap else x["weight"]
    path = make_path(
        squared_norms(W, 2)[None] if columns else squared_norms(W),
        (x["B"].T if swap else x["A"])[None],
        (x["A"].T if swap else x["B"])[None],
        scale * 0.1,
        None,
        units=2,
        magnitude=m[None] if magnitude else None,
        columns=columns,
    )
    pairs = zip(units_of(x["weight"], 2, axis), units_of(after, 2, axis), strict=True)
    changes = [float((v - w).square().sum()) for w, v in pairs]
    bound = change_bound(path)[0].tolist()
    assert all(b >= c * (1 - 1e-9) for b, c in zip(bound, changes, strict=True))


@given(st.floats(0.001, 1.2), st.floats(0.1, 40), st.sampled_from(["atan", "square", "root"]))
def test_the_search_comes_near_the_root_from_below(limit: float, slope: float, kind: str) -> None:
    functions = {
        "atan": lambda t: torch.atan(slope * t),
        "square": lambda t: slope * t * t,
        "root": lambda t: slope * t.sqrt(),
    }
    f = functions[kind]
    like = torch.zeros(1, dtype=torch.float64)
    for monotone in (True, False):
        t = largest_fraction(
            lambda t: f(t) - limit, like, tolerance=1e-4 * limit, monotone=monotone
        )
        value = f(t).item()
        assert value <= limit
        assert t.item() == 1 or value > limit * (1 - 1e-2)


def test_the_search_stays_above_a_hill() -> None:
    """What is beyond in the middle must not throw away what is allowed near the end."""
    like = torch.zeros(1, dtype=torch.float64)

    def excess(t: Tensor) -> Tensor:  # a hill at 0.5, a valley around 0.9, beyond at 1
        return torch.where(t < 0.8, torch.sin(t * 4), 10 * (t - 0.95))

    t = largest_fraction(excess, like, tolerance=1e-6, monotone=False)
    assert t.item() == pytest.approx(0.95, abs=1e-4)
    assert excess(t).item() <= 0


@pytest.mark.parametrize(("dtype", "degrees"), [(torch.bfloat16, 0.088), (torch.float16, 0.011)])
@pytest.mark.parametrize("sigma", [0.02, 0.025, 0.031])
def test_the_noise_floor_is_what_rounding_does(
    dtype: torch.dtype, degrees: float, sigma: float
) -> None:
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * sigma
    floor = math.degrees(noise_floor(dtype))
    assert floor == pytest.approx(degrees, rel=5e-3)
    assert dense_angle(weight, weight.to(dtype)) == pytest.approx(floor, rel=0.1)


def test_slack_is_on_the_safe_side() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert angle(one, 0.1 * one, 0.01 * one).item() < 1e-8
    assert angle(one, 0.1 * one, 0.01 * one, slack=1e-6).item() > 1e-5
    c = largest_scale(one, 0 * one, one, 0.1, slack=0.5)
    assert angle(one, 0 * one, c * c).item() < 0.1


def _planted(kind: str, d_out: int, d_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d_out + d_in)
    W = (torch.randn(d_out, d_in, generator=generator) * 0.02).to(dtype)
    A = torch.randn(8, d_in, generator=generator)
    B = torch.randn(d_out, 8, generator=generator)
    if kind == "positive":  # nothing cancels, and rounding errors have one sign
        return W.abs(), A.abs(), B.abs()
    if kind in ("aligned", "half aligned"):
        u, values, vh = torch.linalg.svd(W.float(), full_matrices=False)
        spread = B * float(values[0]) / 4
        return W, vh[:8], u[:, :8] * values[:8] + (spread if kind == "half aligned" else 0)
    if kind == "ill conditioned":  # ‖A‖ ‖B‖ is far above ‖B A‖
        scale = 10.0 ** torch.linspace(-2, 2, 8)
        mixed = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        return W, scale[:, None] * (mixed @ A), (B @ mixed.T) / scale
    return W, A, B


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "kind", ["random", "positive", "aligned", "half aligned", "ill conditioned"]
)
def test_theta_is_right_in_whatever_precision_is_chosen(
    kind: str, dtype: torch.dtype, stored: str, axis: str
) -> None:
    for d_out, d_in in ((64, 64), (576, 192), (192, 1024)):
        W, A, B = _planted(kind, d_out, d_in, dtype)
        given = W if stored == "rows" else W.T.contiguous().T
        w, product = W.double(), B.double() @ A.double()
        for degrees in (5e-4, 1.0, 20.0, 80.0):
            s = math.tan(math.radians(degrees)) * float(w.norm() / product.norm())
            u, d = (x if axis == "out" else x.T for x in (w, s * product))
            u, d = u.reshape(4, -1), d.reshape(4, -1)
            n = u.norm(dim=1)
            along = (u * d).sum(dim=1) / n
            across = (d - (along / n)[:, None] * u).norm(dim=1)
            wanted = torch.atan2(across, n + along)
            found = rotation(given, A, B, s, units=4, axis=axis)
            torch.testing.assert_close(found.theta, wanted, rtol=1e-6, atol=0)


def test_float32_is_used_where_it_suffices_and_only_there() -> None:
    def same(kind: str) -> bool:
        W, A, B = _planted(kind, 576, 192, torch.float32)
        chosen = rotation(W, A, B, 1e-4)
        return torch.equal(chosen.inner, rotation(W, A, B, 1e-4, dtype=torch.float64).inner)

    assert not same("random")
    assert same("positive")
    assert same("ill conditioned")
