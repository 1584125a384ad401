"""The mathematics of both bases, against dense matrices in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorasmith as ls
from lorasmith.fleet import incremental, joint, share, streaming
from lorasmith.fleet.members import open_members
from lorasmith.fleet.streaming import JointStream, blocks, merge
from lorasmith.io.weights import AdapterWeights

L, N, R, D_IN, D_OUT = 2, 5, 4, 40, 24


@pytest.fixture
def stack() -> tuple[Tensor, Tensor, Tensor]:
    """A, the columns of B as rows, ΔW dense in float64; ranks 4 and one of 2, one layer absent."""
    A, B = torch.randn(L, N, R, D_IN), torch.randn(L, N, R, D_OUT)
    A[:, 1, 2:] = B[:, 1, 2:] = 0
    A[1, 3] = B[1, 3] = 0
    return A, B, B.mT.double() @ A.double()


def _span(rows: Tensor) -> Tensor:
    return rows.mT.double() @ rows.double()


def test_root_of_a_singular_matrix() -> None:
    X = torch.randn(3, 5, 2, dtype=torch.float64)
    G = torch.cat((X @ X.mT, torch.zeros(1, 5, 5, dtype=torch.float64)))
    T = joint.root(G)
    torch.testing.assert_close(T @ T.mT, G, rtol=0, atol=1e-10)


def test_basis_is_that_of_the_dense_scatter(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B, D = stack
    up, down = joint.basis(A, B)
    for rows, G in ((up, (D @ D.mT).sum(1)), (down, (D.mT @ D).sum(1))):
        vectors = torch.linalg.eigh(G)[1]
        for k in (1, 3, 8):
            wanted = vectors[..., -k:] @ vectors[..., -k:].mT
            torch.testing.assert_close(_span(rows[:, :k]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5, 6.0])
@pytest.mark.parametrize("wanted", [1, 6, 12])
def test_a_few_of_many_directions_lose_as_little_as_the_best(decay: float, wanted: int) -> None:
    """They come from block iteration: 1 % more than the dense decomposition in float64 at most.

    For spectra k^-decay, from none of which anything stands out to a steep one.
    """
    n, r, d = 40, 4, 120
    made = torch.Generator().manual_seed(wanted)
    common = torch.arange(1.0, d + 1) ** (-decay / 2)
    A, B = (torch.randn(2, n, r, d, generator=made) * common for _ in range(2))
    A[:, 3, 1:] = B[:, 3, 1:] = 0
    assert joint._few(n * r, d, wanted)
    up, down, left, right = joint.spaces(A, B, wanted)
    D = B.mT.double() @ A.double()
    for rows, G in ((up, (D @ D.mT).sum(1)), (down, (D.mT @ D).sum(1))):
        assert rows.shape == (2, wanted, d)
        rows = rows.double()
        torch.testing.assert_close(rows @ rows.mT, torch.eye(wanted).double().expand(2, -1, -1))
        values = torch.linalg.eigvalsh(G)
        best = values[:, :-wanted].sum(1)
        lost = values.sum(1) - (rows @ G @ rows.mT).diagonal(dim1=1, dim2=2).sum(1)
        assert bool((lost <= 1.01 * best + 1e-6 * values.sum(1)).all())
    wanted_left, wanted_right = joint.project(up, down, A, B)
    torch.testing.assert_close(left, wanted_left, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, wanted_right, rtol=1e-4, atol=1e-4)


def test_a_basis_by_block_iteration_where_one_adapter_has_it_all() -> None:
    """The start must not depend on the order of adapters, nor on which row of T it is in."""
    A, B = 1e-3 * torch.randn(1, 90, 4, 120), torch.randn(1, 90, 4, 120)
    A[0, 7], B[0, 7] = torch.randn(4, 120), torch.randn(4, 120)
    A[0, 8, 0], B[0, 8, 0] = torch.randn(120), torch.randn(120)
    up, down = joint.basis(A, B, 5)
    for n in (7, 8):
        D = B[0, n].mT @ A[0, n]
        torch.testing.assert_close(
            up[0].mT @ (up[0] @ D @ down[0].mT) @ down[0], D, rtol=0, atol=0.1
        )


def test_lost_energy_is_that_of_the_dense_difference(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B, D = stack
    up, down = joint.basis(A, B)
    left, right = joint.project(up, down, A, B)
    sizes = [1, 4, 9]
    table = joint.lost(left, right, joint.norms(A, B), sizes, sizes)
    for (i, a), (j, b) in itertools.product(enumerate(sizes), enumerate(sizes)):
        U, V = up[:, None, :a].mT.double(), down[:, None, :b].double()
        held = U @ (U.mT @ D @ V.mT) @ V
        wanted = (D - held).square().sum((2, 3))
        torch.testing.assert_close(table[..., i, j], wanted, rtol=1e-5, atol=2e-3)


def test_a_sweep_never_loses(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B, _ = stack
    up, down = (rows[:, :3] for rows in joint.basis(A, B))
    energy, before = joint.norms(A, B), None
    for _ in range(4):
        left, right = joint.project(up, down, A, B)
        gone = joint.lost(left, right, energy, [3], [3]).sum((1, 2, 3))
        assert before is None or bool((gone <= before * (1 + 1e-6)).all())
        before = gone
        up, down = joint.sweep(up, down, A, B)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 3), adapters=st.integers(1, 4))
def test_choice_meets_every_budget(seed: int, layers: int, adapters: int) -> None:
    """And is never dearer than the best choice by more than a fifth."""
    g = torch.Generator().manual_seed(seed)
    options = 6
    losses = [
        torch.rand(adapters, options, generator=g, dtype=torch.float64).sort(1, descending=True)[0]
        for _ in range(layers)
    ]
    for loss in losses:
        loss[:, -1] = 0
    costs = [torch.arange(1.0, options + 1, dtype=torch.float64) for _ in range(layers)]
    budget = torch.full((adapters,), 0.3 * layers, dtype=torch.float64)
    chosen = joint.choose(losses, costs, budget)
    used = sum(loss[:, c] for loss, c in zip(losses, chosen, strict=True))
    assert bool((used <= budget + 1e-12).all())
    price = sum(float(cost[c]) for cost, c in zip(costs, chosen, strict=True))
    best = min(
        sum(float(cost[c]) for cost, c in zip(costs, picked, strict=True))
        for picked in itertools.product(range(options), repeat=layers)
        if bool((sum(l[:, c] for l, c in zip(losses, picked, strict=True)) <= budget).all())  # noqa: E741
    )
    assert price <= 1.35 * best


def test_balanced_gauge(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B, D = stack
    new_A, new_B = share.balance(A, B)
    torch.testing.assert_close(new_B.mT.double() @ new_A.double(), D, rtol=0, atol=1e-4)
    G = new_A @ new_A.mT
    torch.testing.assert_close(G, new_B @ new_B.mT, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        G.diagonal(dim1=-2, dim2=-1),
        torch.linalg.svdvals(D)[..., :R].float(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_alignment_undoes_another_gauge(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    """One adapter in N gauges becomes N times the same factors."""
    A, B, _ = stack
    A, B = A[:, :1].expand(-1, N, -1, -1), B[:, :1].expand(-1, N, -1, -1)
    T = torch.randn(L, N, R, R) + 3 * torch.eye(R)
    A, B = T @ A, torch.linalg.inv(T).mT @ B
    A, B = share.align(*share.balance(A, B))
    for rows in (A, B):
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=0, atol=1e-3)


def test_components_are_the_svd_of_centred_rows() -> None:
    X = torch.randn(1, 6, 30)
    X[0, 4] = 0
    present = torch.tensor([[True] * 4 + [False, True]])
    mean, rows, loadings, variance = share.components(X, present)
    held = X[0, present[0]].double()
    _, S, Vh = torch.linalg.svd(held - held.mean(0), full_matrices=False)
    torch.testing.assert_close(variance[0, :4].sqrt(), S[:4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_span(rows[0, :2]), Vh[:2].mT @ Vh[:2], rtol=0, atol=1e-5)
    again = (mean[:, None] + loadings @ rows)[0, present[0]]
    torch.testing.assert_close(again, X[0, present[0]])
    assert not loadings[0, 4].any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5, 6.0])
def test_a_few_of_many_components(decay: float) -> None:
    """Block iteration loses at most 1 % more than the dense decomposition in float64."""
    N, wanted = 60, 5
    X = torch.randn(2, N, 200) * torch.arange(1.0, 201.0) ** (-decay / 2) + 3
    present = torch.ones(2, N, dtype=torch.bool)
    present[1, 7] = False
    X[1, 7] = 0
    mean, rows, loadings, variance = share.components(X, present, wanted)
    assert rows.shape == (2, wanted, 200)
    for i in range(2):
        held = X[i, present[i]].double()
        S = torch.linalg.svdvals(held - held.mean(0)).square()
        near = (mean[i] + loadings[i] @ rows[i])[present[i]].double()
        best = float(S[wanted:].sum())
        assert float((held - near).square().sum()) <= 1.01 * best + 1e-6 * float(S.sum())
        eye = torch.eye(wanted)
        torch.testing.assert_close(rows[i] @ rows[i].mT, eye, rtol=0, atol=1e-4)
        gone = float(S[:wanted].sum() - variance[i].sum())
        assert -1e-5 * float(S.sum()) <= gone <= 0.01 * best + 1e-5 * float(S.sum())
    assert not loadings[1, 7].any()


def test_polar_factor_is_that_of_the_svd() -> None:
    M = torch.randn(50, 6, 6, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(M[:3])
    M[0] = 0
    M[1] = (U[1] * torch.logspace(0, -9, 6)) @ Vh[1]
    M[2, :, 4:] = 0
    Q = share.polar(M)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(6).double().expand(50, -1, -1))
    P, _, Z = torch.linalg.svd(M)
    torch.testing.assert_close(Q[3:], (P @ Z)[3:], rtol=0, atol=1e-4)
    for n in range(len(M)):  # as near as can be, also where it is not unique
        nearest = float(torch.linalg.svdvals(M[n]).sum())
        assert float((Q[n] * M[n]).sum()) == pytest.approx(nearest, abs=1e-9)


def test_distance_is_dense(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B, D = stack
    C = torch.randn_like(A)
    wanted = (D - B.mT.double() @ C.double()).square().sum((2, 3))
    torch.testing.assert_close(share.distance(A, B, C, B), wanted, rtol=1e-5, atol=1e-3)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5), first=st.integers(1, 4))
def test_joint_in_steps_is_joint_at_once(seed: int, count: int, first: int) -> None:
    """Same spaces, and every adapter still exact, as long as nothing is cut."""
    g = torch.Generator().manual_seed(seed)
    ranks = [1 + (seed + i) % 3 for i in range(count)]
    A = [torch.randn(r, 18, generator=g, dtype=torch.float64) for r in ranks]
    B = [torch.randn(r, 20, generator=g, dtype=torch.float64) for r in ranks]
    none = torch.zeros(0, 0, dtype=torch.float64)
    state = incremental.Turned(A[0].new_zeros(0, 20), A[0].new_zeros(0, 18), none, none)
    first = min(first, count)
    weights = torch.rand(count, generator=g, dtype=torch.float64) + 0.5
    for start, stop in ((0, first), (first, count)):
        if start == stop:
            continue
        state = incremental.extend(state, torch.cat(A[start:stop]), torch.cat(B[start:stop]))
        state, values, _ = incremental.rotate(state, ranks[:stop], weights[:stop])
    D = torch.stack([b.mT @ a for a, b in zip(A, B, strict=True)])
    place = 0
    for i, r in enumerate(ranks):
        core = state.left[place : place + r].mT @ state.right[place : place + r]
        torch.testing.assert_close(state.up.mT @ core @ state.down, D[i], rtol=0, atol=1e-8)
        place += r
    G = (weights[:, None, None] * (D @ D.mT)).sum(0)
    wanted, vectors = torch.linalg.eigh(G)
    torch.testing.assert_close(values, wanted.flip(0)[: len(values)], rtol=1e-8, atol=1e-7)
    gap = wanted.flip(0)
    if len(gap) > 2 and gap[1] - gap[2] > 1e-3 * gap[0]:
        torch.testing.assert_close(
            _span(state.up[:2]), vectors[:, -2:] @ vectors[:, -2:].mT, rtol=0, atol=1e-5
        )


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), old=st.integers(1, 4), new=st.integers(1, 3))
def test_components_in_steps_are_those_at_once(seed: int, old: int, new: int) -> None:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(old + new, 25, generator=g, dtype=torch.float64)
    axes, coordinates = incremental.append(X[:0], X[:old])
    axes, more = incremental.append(axes, X[old:])
    points = torch.cat((incremental.widen(coordinates, len(axes)), more))
    known = torch.cat((torch.zeros(len(X), 1, dtype=torch.float64), points), 1)
    mean, rows, loadings, values = incremental.share_rotate(
        X.new_zeros(25), axes, known, torch.ones(len(X), dtype=torch.float64)
    )
    torch.testing.assert_close(mean, X.mean(0))
    torch.testing.assert_close(loadings[:, :1] * mean + loadings[:, 1:] @ rows, X)
    S = torch.linalg.svdvals(X - X.mean(0))
    torch.testing.assert_close(values.sqrt(), S[: len(values)], rtol=1e-7, atol=1e-8)


def test_merging_scatter_in_blocks() -> None:
    X = torch.randn(30, 12, dtype=torch.float64) * torch.logspace(0, -3, 12, dtype=torch.float64)
    basis, values = X[:0], X.new_zeros(0)
    for block in X.split(7):
        basis, values, _ = merge(basis, values, block, 12)
    wanted = torch.linalg.eigvalsh(X.mT @ X).flip(0)
    torch.testing.assert_close(values, wanted, rtol=1e-8, atol=1e-12)
    basis, values, turn = merge(basis, values, X[:2], 3)
    assert basis.shape == (3, 12)
    assert turn.shape == (12, 3)


def _streamed(
    monkeypatch: pytest.MonkeyPatch, room: int, most: int, keep: int | None, block: int
) -> tuple[JointStream, Tensor, Tensor]:
    """A stream of random adapters of mixed ranks on a layer, and their scatter matrices, dense."""
    monkeypatch.setattr(streaming, "_WHOLE", room)
    made = torch.Generator().manual_seed(3)
    sources: dict[str, AdapterWeights] = {}
    up, down = torch.zeros(D_OUT, D_OUT), torch.zeros(D_IN, D_IN)
    up, down = up.double(), down.double()
    for n in range(6):
        r = 2 + n % 3
        A, B = torch.randn(r, D_IN, generator=made), torch.randn(D_OUT, r, generator=made)
        config = ls.LoRAConfig(r=r, alpha=r, targets=("m",))
        sources[f"t{n}"] = AdapterWeights.from_tensors(config, {"m": {"A": A, "B": B}})
        D = B.double() @ A.double()
        D /= D.norm()
        up, down = up + D @ D.mT, down + D.mT @ D
    stream = JointStream(most, keep=keep)
    members = open_members(sources)
    with torch.no_grad():
        for group in blocks(members, block):
            stream.feed(group)
        stream.close()
    return stream, up, down


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_stream_that_keeps_matrices_whole_finds_the_dense_directions(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """However few directions are asked for, and although 18 rows do not fit into them."""
    stream, up, down = _streamed(monkeypatch, 2**20, most=6, keep=3, block=block)
    state = stream.layers["m"]
    for side, G in ((state.up, up), (state.down, down)):
        values, vectors = torch.linalg.eigh(G)
        torch.testing.assert_close(side.values, values.flip(-1)[:3])
        torch.testing.assert_close(_span(side.basis), vectors[:, -3:] @ vectors[:, -3:].mT)


@pytest.mark.parametrize("block", [1, 2, 6])
def test_a_stream_without_room_for_matrices_is_exact_while_directions_suffice(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    stream, up, down = _streamed(monkeypatch, 0, most=24, keep=None, block=block)
    state = stream.layers["m"]
    assert len(state.up.basis) == 18
    assert len(state.down.basis) == 18
    for side, G in ((state.up, up), (state.down, down)):
        held = (side.basis.mT * side.values) @ side.basis
        torch.testing.assert_close(held, G)
        eye = torch.eye(18, dtype=torch.float64)
        torch.testing.assert_close(side.basis @ side.basis.mT, eye)


def test_merged_rows_may_be_more_than_there_is_room_for() -> None:
    """And lie in the basis, or on each other: the sum is that of the dense matrices."""
    made = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 12, generator=made, dtype=torch.float64)
    basis, values, _ = merge(torch.zeros(0, 12), torch.zeros(0), rows[:5], 12)
    more = torch.cat((rows, rows[:2], basis[:3]))
    basis, values, turn = merge(basis, values, more, 12)
    assert turn.shape == (5, 9)
    assert basis.shape == (9, 12)
    held = (basis.mT * values) @ basis
    torch.testing.assert_close(held, _span(rows[:5]) + _span(more))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(9, dtype=torch.float64))
