"""Diversity of heads, against dense float64 and against planted angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from lorasmith.core.heads import HeadLayout, Role, layout_of
from lorasmith.core.variant import Factors
from lorasmith.diagnostics import diversity
from lorasmith.diagnostics.diversity import (
    head_angles,
    head_diversity,
    head_gram,
    mean_angle,
    tuned_head_gram,
)
from lorasmith.errors import ConfigError


def layout(count: int, head_dim: int, axis: str = "out", role: Role = "q") -> HeadLayout:
    return HeadLayout(axis, head_dim, tuple((role, h) for h in range(count)))


def draw(
    d_out: int, d_in: int, seed: int = 0, r: int = 3, frozen: bool = False
) -> tuple[Tensor, Factors, Tensor]:
    """A weight, a change, and the tuned weight in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(d_out, d_in), (r, d_in), (d_out, r)] + ([(r, d_in), (d_out, r)] if frozen else [])
    W, A, B, *start = (torch.randn(s, generator=g) for s in shapes)
    delta = B.double() @ A.double()
    if start:
        delta -= start[1].double() @ start[0].double()
    return W, Factors(A, B, 0.6, *start), W.double() + 0.6 * delta


def dense_angles(weight: Tensor, blocks: list[int], head_dim: int, axis: str) -> np.ndarray:
    """Degrees from chords of unit vectors (Kahan), which no cosine comes into."""
    W = weight.double().numpy() if axis == "out" else weight.double().numpy().T
    units = []
    for b in blocks:
        v = W[b * head_dim : (b + 1) * head_dim].ravel()
        units.append(v / np.linalg.norm(v))
    return np.array(
        [
            [
                math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))
                for v in units
            ]
            for u in units
        ]
    )


def mean_of(angles: np.ndarray) -> float:
    return float(angles[np.triu_indices(len(angles), 1)].mean())


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("block", [2**20, 37])
def test_angles_before_and_after_are_those_of_the_dense_weights(
    axis: str, frozen: bool, dense: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "_BLOCK", block)
    shape = (24, 20) if axis == "out" else (20, 24)
    W, f, tuned = draw(*shape, frozen=frozen)
    (found,) = head_diversity(W, tuned if dense else f, layout(4, 6, axis), name="m.q_proj")
    for weight, matrix, mean in (
        (W, found.matrix_before, found.before),
        (tuned, found.matrix_after, found.after),
    ):
        expected = dense_angles(weight, [0, 1, 2, 3], 6, axis)
        np.testing.assert_allclose(matrix, expected, rtol=1e-11)
        assert mean == pytest.approx(mean_of(expected), rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtypes_are_widened_before_they_are_multiplied(dtype: torch.dtype) -> None:
    W = torch.randn(4 * 64, 900).to(dtype)
    np.testing.assert_allclose(
        head_angles(head_gram(W, 64)), dense_angles(W, [0, 1, 2, 3], 64, "out"), rtol=1e-11
    )


def test_fused_layers_have_three_groups() -> None:
    config = GPT2Config(n_embd=24, n_head=4, n_layer=1)
    found_layout = layout_of(config, "transformer.h.0.attn.c_attn", 72, 24)
    W, f, tuned = draw(72, 24)
    records = head_diversity(W, f, found_layout, name="transformer.h.0.attn.c_attn", layer=0)
    assert [r.role for r in records] == ["q", "k", "v"]
    for i, record in enumerate(records):
        blocks = list(range(4 * i, 4 * i + 4))
        np.testing.assert_allclose(
            record.matrix_before, dense_angles(W, blocks, 6, "out"), rtol=1e-11
        )
        np.testing.assert_allclose(
            record.matrix_after, dense_angles(tuned, blocks, 6, "out"), rtol=1e-11
        )
        assert (record.layer, record.projection) == (0, "c_attn")


def test_interleaved_heads_are_put_in_order() -> None:
    heads: tuple[tuple[Role, int], ...] = (("k", 1), ("q", 2), ("q", 0), ("k", 0), ("q", 1))
    W, f, _ = draw(20, 12)
    records = head_diversity(W, f, HeadLayout("out", 4, heads), name="x")
    assert [r.role for r in records] == ["q", "k"]
    np.testing.assert_allclose(
        records[0].matrix_before, dense_angles(W, [2, 4, 1], 4, "out"), rtol=1e-11
    )
    np.testing.assert_allclose(
        records[1].matrix_before, dense_angles(W, [3, 0], 4, "out"), rtol=1e-11
    )


def test_key_value_heads_are_counted_once() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    name = "model.layers.0.self_attn.k_proj"
    W, f, _ = draw(16, 64)
    (record,) = head_diversity(W, f, layout_of(config, name, 16, 64), name=name)
    assert record.role == "k"
    assert np.shape(record.matrix_before) == (2, 2)


def test_a_single_head_has_no_diversity() -> None:
    W, f, _ = draw(6, 20)
    assert head_diversity(W, f, layout(1, 6), name="x") == []


@pytest.mark.parametrize("degrees", [0.0, 0.5, 10.0, 60.0, 90.0, 150.0, 180.0])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_planted_angles_are_found(degrees: float, axis: str) -> None:
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((6 * 20, 2)))[0].T.reshape(2, 6, 20)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    W = torch.from_numpy(np.concatenate([5 * u, 0.1 * (c * u + s * v)]))
    (found,) = head_diversity(W if axis == "out" else W.T, None, layout(2, 6, axis), name="x")
    assert found.before == found.after == pytest.approx(degrees, abs=3e-6)
    if 0.01 < degrees < 179.99:
        assert found.before == pytest.approx(degrees, abs=1e-10)


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.integers(0, 1000))
def test_sizes_of_heads_do_not_matter(sizes: list[float], seed: int) -> None:
    W, _, _ = draw(12, 10, seed=seed)
    scaled = W.double() * torch.tensor(sizes, dtype=torch.float64).repeat_interleave(3)[:, None]
    (found,) = head_diversity(W, scaled, layout(4, 3), name="x")
    np.testing.assert_allclose(found.matrix_before, found.matrix_after, rtol=1e-9)
    assert found.after == pytest.approx(found.before, rel=1e-9)


@given(st.integers(0, 1000))
def test_the_gauge_changes_nothing(seed: int) -> None:
    W, f, _ = draw(12, 10, seed=seed)
    R = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 3))) + 3 * torch.eye(3)
    A, B = f.A.double(), f.B.double()
    plain = tuned_head_gram(W, Factors(A, B, 0.6), 3)
    other = tuned_head_gram(W, Factors(R @ A, B @ torch.linalg.inv(R), 0.6), 3)
    np.testing.assert_allclose(plain, other, rtol=1e-8, atol=1e-8)


def test_the_same_change_in_all_heads_makes_them_alike() -> None:
    W, f, _ = draw(40, 30)
    B = torch.randn(10, 3).repeat(4, 1) * 50
    (found,) = head_diversity(W, Factors(f.A, B, 1.0), layout(4, 10), name="x")
    assert found.before > 80
    assert found.after < 5


def test_no_change_is_no_change() -> None:
    W, f, _ = draw(12, 10, frozen=True)
    for change in (None, W, Factors(f.A, torch.zeros_like(f.B), 1.0)):
        (found,) = head_diversity(W, change, layout(4, 3), name="x")
        assert found.before == found.after
        assert found.matrix_before == found.matrix_after
    (found,) = head_diversity(W, Factors(f.A, f.B, 1.0, f.A, f.B), layout(4, 3), name="x")
    assert found.before == found.after


def test_a_head_of_zeros_is_left_out() -> None:
    W, _, _ = draw(12, 10)
    pruned = W.clone()
    pruned[3:6] = 0
    (found,) = head_diversity(W, pruned, layout(4, 3), name="x")
    kept = dense_angles(W, [0, 2, 3], 3, "out")
    assert found.after == pytest.approx(mean_of(kept), rel=1e-11)
    assert set(found.matrix_after[1]) == {0.0}
    (nothing,) = head_diversity(torch.zeros(12, 10), None, layout(4, 3), name="x")
    assert nothing.before == 0
    assert mean_angle(torch.zeros(2, 2, dtype=torch.float64)) == 0


def test_matrices_can_be_left_out() -> None:
    W, f, _ = draw(12, 10)
    (found,) = head_diversity(W, f, layout(4, 3), name="x", matrices=False)
    (full,) = head_diversity(W, f, layout(4, 3), name="x")
    assert found.matrix_before == found.matrix_after == ()
    assert (found.before, found.after) == (full.before, full.after)


def test_weights_are_only_read() -> None:
    W, f, _ = draw(12, 10)
    live = Factors(f.A.requires_grad_(), f.B.requires_grad_(), 0.6)
    before = W.clone()
    head_diversity(W.requires_grad_(), live, layout(4, 3), name="x")
    assert torch.equal(W.detach(), before)
    assert live.A.grad is None


def test_what_does_not_fit_is_refused() -> None:
    W, f, _ = draw(12, 10)
    with pytest.raises(ConfigError, match="do not fit its heads"):
        head_diversity(W, f, layout(5, 3), name="x")
    with pytest.raises(ConfigError, match="do not fit its heads"):
        head_diversity(W, W.T, layout(4, 3), name="x")
    with pytest.raises(ConfigError, match="not the whole change"):
        head_diversity(W, Factors(f.A, f.B, 1.0, exact=False), layout(4, 3), name="x")
