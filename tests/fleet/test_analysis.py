"""Groups, outliers, duplicates, the map; one adapter against another; coverage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith as ls
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.fleet.analysis import clusters, embedding, outliers, redundancy
from lorasmith.fleet.covering import coverage
from lorasmith.fleet.differences import diff
from lorasmith.fleet.similarity import SimilarityMatrix, similarity
from tests.fleet.fleets import SIZES, adapter, dense, related
from tests.io.support import saved
from tests.models import llama as other_base

scipy_linalg = pytest.importorskip("scipy.linalg")


def _of(vectors: Any) -> SimilarityMatrix:
    stacked = torch.stack(list(vectors))
    gram = (stacked @ stacked.T).numpy()
    return SimilarityMatrix(tuple(f"a{i}" for i in range(len(gram))), gram, ("layer",))


# -- clusters ------------------------------------------------------------------------------------


def test_the_zoo_falls_into_its_tasks(zoo: Path) -> None:
    found = clusters(similarity(zoo))
    groups = {frozenset(g) for g in found.groups}
    assert frozenset({"e2e-s0", "e2e-s1", "e2e-dora"}) in groups
    assert frozenset({"mrpc-s0", "mrpc-rankpattern"}) in groups
    dates = {"dates-de-s0", "dates-de-s1", "dates-en-r4", "dates-en-s0", "dates-en-s1"}
    assert frozenset(dates) in groups
    assert frozenset({"gsm8k-s0"}) in groups
    assert sorted(i for g in found.groups for i in g) == sorted(found.ids)
    assert sorted(found.order) == list(range(16))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("method", ["average", "complete", "single"])
def test_a_number_of_groups(count: int, method: Any) -> None:
    similar = _of(related(9, seed=count, noise=2))
    assert len(clusters(similar, count=count, method=method).groups) == count


def test_the_cut() -> None:
    tight = _of(related(6, seed=0, noise=0.1))
    assert len(clusters(tight).groups) == 1
    apart = _of(torch.randn(6, 5000, dtype=torch.float64))
    assert len(clusters(apart).groups) == 6
    pairs = [v for i in range(3) for v in related(2, seed=i, noise=0.3)]
    found = clusters(_of(pairs))
    assert found.labels == (0, 0, 1, 1, 2, 2)
    assert clusters(_of(pairs), threshold=found.height).labels == found.labels
    assert clusters(_of(related(1, seed=0))).groups == (("a0",),)
    for wrong in ({"count": 0}, {"count": 7}, {"threshold": 3}, {"count": 2, "threshold": 0.1}):
        with pytest.raises(ConfigError):
            clusters(apart, **wrong)


# -- outliers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5, 6, 8, 12, 30])
def test_one_adapter_of_another_kind_is_found(count: int) -> None:
    """Even among five, where no value can be more than 1.79 standard deviations off."""
    hits = 0
    for seed in range(20):
        found = outliers(_of(related(count, seed=seed, noise=1, odd=seed % count))).found
        hits += [(o.id, o.kind) for o in found] == [(f"a{seed % count}", "direction")]
    assert hits >= 18


@pytest.mark.parametrize("count", [4, 5, 8, 16])
def test_false_alarms_are_as_rare_as_asked_for(count: int) -> None:
    """Fleets of one kind: at most 5 % raise an alarm, with what 300 fleets leave to chance."""
    alarms = 0
    for seed in range(300):
        made = np.random.default_rng(1000 * count + seed)
        # Random distances to the common direction, so that the gap alone excludes nothing.
        vectors = [
            float(made.lognormal(0, 0.15)) * v
            for v in related(count, seed=seed, noise=float(made.uniform(0.5, 2)))
        ]
        alarms += bool(outliers(_of(vectors), alpha=0.05, min_gap=0.0).found)
    assert alarms / 300 < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 300)


def test_two_outliers_do_not_hide_each_other() -> None:
    vectors = related(12, seed=3, noise=0.5)
    strange = related(2, seed=99, noise=0.5)
    vectors[4], vectors[9] = strange
    assert {o.id for o in outliers(_of(vectors)).found} == {"a4", "a9"}


def test_size_counts_too() -> None:
    vectors = related(6, seed=0, noise=0.3)
    vectors[2] = vectors[2] * 30
    (found,) = outliers(_of(vectors)).found
    assert (found.id, found.kind) == ("a2", "large")
    vectors[2] = vectors[2] / 900
    (found,) = outliers(_of(vectors)).found
    assert (found.id, found.kind) == ("a2", "small")
    vectors[2] = vectors[2] * 0
    assert ("a2", "small") in {(o.id, o.kind) for o in outliers(_of(vectors)).found}
    assert found.deviate > found.critical


def test_equal_adapters_and_tiny_fleets_have_none() -> None:
    same = _of([torch.ones(9, dtype=torch.float64)] * 6)
    assert outliers(same).found == ()
    few = outliers(_of(related(3, seed=0)))
    assert few.found == ()
    assert few.reason is not None
    assert set(few.scores) == {"a0", "a1", "a2"}
    for wrong in ({"alpha": 0}, {"alpha": 1}, {"min_gap": -1}, {"most": 0}):
        with pytest.raises(ConfigError):
            outliers(same, **wrong)


def test_a_foreign_adapter_among_five_of_the_zoo(zoo: Path) -> None:
    names = ["dates-en-s0", "dates-en-s1", "dates-de-s0", "dates-de-s1", "gsm8k-s0"]
    found = outliers(similarity([zoo / n for n in names]))
    assert [(o.id, o.kind) for o in found.found] == [("gsm8k-s0", "direction")]


# -- redundancy and the map ----------------------------------------------------------------------


def test_duplicates() -> None:
    base = related(4, seed=0, noise=1)
    vectors = [base[0], base[1], base[0] * 1.02, base[2], base[2] + 0.15 * base[3], base[1] * 0.99]
    found = redundancy(_of(vectors), threshold=0.1)
    assert {frozenset((p.keep, p.other)): p.action for p in found} == {
        frozenset(("a1", "a5")): "drop",
        frozenset(("a0", "a2")): "drop",
        frozenset(("a3", "a4")): "merge",
    }
    assert [p.distance for p in found] == sorted(p.distance for p in found)
    (merge,) = [p for p in found if p.action == "merge"]
    mean = (vectors[3] + vectors[4]) / 2
    largest = max(float(v.norm()) for v in vectors[3:5])
    assert merge.error == pytest.approx(float((mean - vectors[3]).norm()) / largest)
    # Three copies: one stays, and is not given up itself.
    copies = redundancy(_of([base[0]] * 3))
    assert len(copies) == 2
    assert len({p.keep for p in copies}) == 1
    assert redundancy(_of(base), threshold=0.01) == ()
    with pytest.raises(ConfigError):
        redundancy(_of(base), threshold=2)


def test_the_map_keeps_distances() -> None:
    """Directions that lie in a plane are shown exactly."""
    angles = torch.tensor([0.0, 0.3, 1.0, 2.5, -0.4], dtype=torch.float64)
    vectors = torch.stack((angles.cos(), angles.sin()), dim=1) * torch.tensor(
        [[1.0], [2], [3], [1], [5]]
    )
    found = embedding(_of(vectors))
    assert found.share == pytest.approx(1)
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    want = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    got = np.linalg.norm(found.points[:, None] - found.points[None], axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert embedding(_of(related(1, seed=0))).points.shape == (1, 2)


# -- two adapters ----------------------------------------------------------------------------------


def test_diff_is_that_of_the_dense_changes() -> None:
    a, b = adapter(3, seed=1), adapter(2, seed=2, alpha=3, modules=tuple(SIZES)[:2])
    calls: list[Any] = []
    found = diff(a, b, progress=lambda *x: calls.append(x))
    va, vb = dense(a), dense(b)
    # The scaling is folded into B in float32.
    assert found.difference == pytest.approx(float((va - vb).norm()), rel=1e-7)
    assert found.norm_a == pytest.approx(float(va.norm()), rel=1e-7)
    assert found.cosine == pytest.approx(float(va @ vb / va.norm() / vb.norm()), abs=1e-7)
    assert found.only_a == ("layers.1.q_proj",)
    assert found.only_b == ()
    assert calls[-1] == ("diff", 3, 3)
    for layer in found.layers:
        A = a.delta(layer.module, dtype=torch.float64)
        if layer.module not in b.modules:
            assert layer.relative == 1
            assert layer.cosine is None
            assert layer.output_angles == ()
            continue
        B = b.delta(layer.module, dtype=torch.float64)
        assert layer.difference == pytest.approx(float((A - B).norm()), rel=1e-6)
        largest = max(float(A.norm()), float(B.norm()))
        assert layer.relative == pytest.approx(layer.difference / largest, rel=1e-6)
        for angles, left, right in ((layer.output_angles, A, B), (layer.input_angles, A.T, B.T)):
            left_basis = torch.linalg.svd(left)[0][:, :3].numpy()
            right_basis = torch.linalg.svd(right)[0][:, :2].numpy()
            want = np.degrees(scipy_linalg.subspace_angles(left_basis, right_basis))
            np.testing.assert_allclose(angles, np.sort(want), atol=1e-4)
        assert (layer.rank_a, layer.rank_b) == (3, 2)


def test_diff_sees_the_gauge_copy_and_the_smallest_change() -> None:
    a = adapter(3, seed=1)
    flipped = {m: (-a.factors[m].A, -a.factors[m].B) for m in a.modules}
    same = diff(a, adapter(3, factors=flipped))
    assert same.relative < 1e-12
    assert same.cosine == pytest.approx(1, abs=1e-12)
    assert max(layer.output_angles[-1] for layer in same.layers) < 1e-4
    near = {m: (a.factors[m].A, a.factors[m].B * (1 + 2**-20)) for m in a.modules}
    # Squares would lose it in rounding.
    assert diff(a, adapter(3, factors=near)).relative == pytest.approx(2**-20, rel=0.1)


def test_diff_of_what_is_beside_the_factors(tmp_path: Path) -> None:
    first = saved(tmp_path / "one", ls.DoRAConfig(r=2, targets=["q_proj"]))
    second = saved(tmp_path / "two", ls.LoRAConfig(r=2, modules_to_save=["lm_head"]))
    found = diff(first, first)
    assert set(found.rest.values()) == {0.0}
    assert len(found.rest) == 2
    assert "DoRA" in found.notes[0]
    found = diff(first, second)
    assert set(found.rest.values()) == {None}
    other = saved(tmp_path / "three", model=other_base())
    with pytest.raises(BaseMismatchError):
        diff(first, other)


# -- coverage --------------------------------------------------------------------------------------


def test_coverage() -> None:
    a = adapter(3, seed=1)
    made = torch.Generator().manual_seed(5)
    bases: dict[str, Any] = {}
    inside = total = 0.0
    for module, (d_in, d_out) in SIZES.items():
        delta = a.delta(module, dtype=torch.float64)
        total += float(delta.square().sum())
        if module == "layers.1.q_proj":
            continue
        U, V = torch.randn(d_out, 4, generator=made), torch.randn(5, d_in, generator=made)
        U = torch.cat((U, U[:, :2]), dim=1)  # what is there twice counts once
        bases[module] = (U, V)
        PU, PV = (m @ torch.linalg.pinv(m) for m in (U.double(), V.double().T))
        inside += float((PU @ delta @ PV).square().sum())
    found = coverage(a, bases)
    assert found.share == pytest.approx(inside / total, rel=1e-6)
    assert found.error == pytest.approx(math.sqrt(1 - inside / total), rel=1e-6)
    assert found.missing == ("layers.1.q_proj",)
    for layer in found.layers:
        assert layer.both <= min(layer.output, layer.input) + 1e-12
    own = {m: (a.factors[m].B, a.factors[m].A) for m in a.modules}
    assert coverage(a, own).share == pytest.approx(1, abs=1e-9)
    assert coverage(a, dict.fromkeys(SIZES, (None, None))).share == pytest.approx(1, abs=1e-9)
    with pytest.raises(ConfigError, match="does not fit"):
        coverage(a, {"layers.0.q_proj": (torch.ones(3, 3), None)})
