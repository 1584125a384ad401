"""Adapters that do nothing, ΔW = 0, in everything that a fleet can be asked.

A fresh adapter has B = 0, and a run that moved nothing leaves it so. Everywhere it is a change
of zero: no NaN, no division, no direction. The subspaces have tests of their own
(``test_adapters_that_do_nothing`` in ``test_subspace``).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith as ls
from lorasmith.fleet import (
    clusters,
    coverage,
    diff,
    embedding,
    merge,
    outliers,
    redundancy,
    similarity,
)
from lorasmith.io import AdapterWeights
from tests.fleet.fleets import SIZES, adapter, dense
from tests.io.support import llama, logits, stir


def still(r: int = 2, seed: int = 0) -> AdapterWeights:
    made = torch.Generator().manual_seed(seed)
    return adapter(
        r,
        factors={
            m: (torch.randn(r, i, generator=made), torch.zeros(o, r)) for m, (i, o) in SIZES.items()
        },
    )


def alike(count: int) -> dict[str, AdapterWeights]:
    """Adapters of rank 1 around one direction, cosines of about 0.8."""
    found = {}
    for number in range(count):
        factors = {}
        for place, (module, (d_in, d_out)) in enumerate(SIZES.items()):
            shared = torch.Generator().manual_seed(place)
            own = torch.Generator().manual_seed(100 * number + place + 7)
            A = torch.randn(1, d_in, generator=shared) + 0.3 * torch.randn(1, d_in, generator=own)
            B = torch.randn(d_out, 1, generator=shared) + 0.3 * torch.randn(d_out, 1, generator=own)
            factors[module] = (A, B)
        found[f"a{number}"] = adapter(1, factors=factors)
    return found


def strict(value: Any) -> None:
    """It is JSON, without NaN and infinity."""
    json.dumps(value, allow_nan=False)


def test_it_has_no_direction() -> None:
    found = similarity({**alike(4), "z": still(), "y": still(3, 1)}, per_layer=True)
    for matrix in (found.cosine, found.distances, found.relative_distances):
        assert np.isfinite(matrix).all()
    assert not found.cosine[4:].any()
    assert not found.layers[0].gram[4:].any()
    assert found.norms[4:].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found.distances[4, :4], found.norms[:4])
    np.testing.assert_allclose(found.relative_distances[4, :4], 1.0)
    assert found.relative_distances[4, 5] == 0
    strict(found.to_dict())


def test_groups_maps_and_duplicates() -> None:
    found = similarity({**alike(4), "z": still(), "y": still(3, 1)})
    groups = clusters(found)
    assert groups.groups == (("a0", "a1", "a2", "a3"), ("z",), ("y",))
    assert clusters(found, count=1).groups == (found.ids,)
    points = embedding(found)
    assert np.isfinite(points.points).all()
    np.testing.assert_allclose(points.points[4], points.points[5], atol=1e-12)
    assert [(p.keep, p.other, p.action, p.error) for p in redundancy(found)] == [
        ("z", "y", "drop", 0.0)
    ]
    for one in (groups, points, outliers(found)):
        strict(one.to_dict())


def test_it_is_small_and_nothing_else() -> None:
    """It took part in the test of directions, with 1 − cosine = 1, and made the fleet look odd."""
    fleet = alike(6)
    plain = outliers(similarity(fleet))
    assert plain.found == ()
    found = outliers(similarity({**fleet, "z": still()}))
    assert [(o.id, o.kind) for o in found.found] == [("z", "small")]
    assert found.found[0].deviate == math.inf
    for name, score in plain.scores.items():
        assert found.scores[name] == pytest.approx(score)
    assert found.scores["z"] == 1
    # A stranger is one with it as without it.
    fleet["odd"] = adapter(1, seed=99)
    kinds = {(o.id, o.kind) for o in outliers(similarity({**fleet, "z": still()})).found}
    assert ("odd", "direction") in kinds
    assert ("z", "direction") not in kinds


def test_where_most_or_all_do_nothing() -> None:
    """Then that is what is usual."""
    fleet = {f"z{i}": still(seed=i) for i in range(5)}
    found = outliers(similarity(fleet))
    assert (found.found, found.reason) == ((), "no adapter does anything")
    assert set(found.scores.values()) == {0.0}
    found = outliers(similarity({**fleet, "a": adapter(1)}))
    assert found.found == ()
    points = embedding(similarity(fleet))
    assert not points.points.any()
    assert len(clusters(similarity(fleet)).groups) == 5


def test_without_it_scores_are_means_over_all_others() -> None:
    """Against a loop."""
    found = similarity(alike(5))
    gaps = 1 - found.cosine
    for number, name in enumerate(found.ids):
        others = [gaps[number, j] for j in range(5) if j != number]
        assert outliers(found).scores[name] == pytest.approx(float(np.mean(others)))


def test_diff_and_coverage() -> None:
    one, other = still(), adapter(3, seed=1)
    found = diff(one, other)
    assert (found.norm_a, found.relative, found.cosine) == (0.0, 1.0, None)
    assert found.difference == pytest.approx(float(dense(other).norm()))
    assert all(x.rank_a == 0 and x.output_angles == () for x in found.layers)
    strict(found.to_dict())
    both = diff(one, still(3, 1))
    assert (both.difference, both.relative, both.cosine) == (0.0, 0.0, None)
    strict(both.to_dict())
    held = ls.SharedSubspace.from_adapters({"a": other})
    inside = coverage(one, held)
    assert (inside.share, inside.error) == (1.0, 0.0)
    strict(inside.to_dict())
    assert coverage(one, {}).share == 1
    assert coverage(other, ls.SharedSubspace.from_adapters({"z": one})).share == 0


@pytest.mark.parametrize("method", sorted(merge.methods()))
@pytest.mark.parametrize("rank", [None, "exact", 2])
def test_merging_with_it_is_merging_with_a_change_of_zero(method: str, rank: Any) -> None:
    other = adapter(3, seed=1)
    have = {o.name for o in merge.get_method(method).options}
    options = {"density": 0.5} if "density" in have else {}
    with_it = ls.merge([still(), other], method, rank=rank, **options)
    # A layer that an adapter lacks is a change of zero there; here it lacks all but one.
    less = adapter(
        2,
        modules=[next(iter(SIZES))],
        factors={m: (torch.ones(2, i), torch.zeros(o, 2)) for m, (i, o) in SIZES.items()},
    )
    without = ls.merge([less, other], method, rank=rank, **options)
    assert torch.isfinite(dense(with_it.weights)).all()
    torch.testing.assert_close(dense(with_it.weights), dense(without.weights), atol=1e-5, rtol=1e-5)
    strict(with_it.to_dict())
    alone = ls.merge([still(), still(3, 1)], method, rank=rank, **options)
    assert not dense(alone.weights).any()
    assert (alone.report.norm, alone.report.discarded) == (0.0, 0.0)
    strict(alone.to_dict())


@pytest.mark.parametrize("config", [ls.LoRAConfig(r=2), ls.DoRAConfig(r=3)])
@pytest.mark.parametrize("basis", ["joint", "share"])
def test_served_it_is_the_base_model(config: Any, basis: Any, tmp_path: Path) -> None:
    """Alone, in a batch with another, in a blend, and as the only task."""
    base = llama()
    ls.attach(base, config)
    ls.save(base, tmp_path / "z")
    busy = llama()
    stir(ls.attach(busy, ls.LoRAConfig(r=2)).parameters(), 0.1)
    ls.save(busy, tmp_path / "a")
    plain, wanted = logits(llama()), logits(busy)
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
    for names in (["z", "a"], ["z"]):
        held = ls.SharedSubspace.from_adapters(
            [tmp_path / n for n in names], basis=basis, error=0.0
        )
        served = ls.MultiTaskModel(llama(), held)
        with served.use("z"):
            torch.testing.assert_close(logits(served.model), plain, **close)
        delta = served.delta_state_dict("z")
        assert max(float(d.abs().max()) for d in delta.values()) < 1e-6
        if "a" in names:
            with served.use({"z": 0.5, "a": 1.0} if config.variant == "lora" else "a"):
                torch.testing.assert_close(logits(served.model), wanted, **close)
            rows = logits(served.model).shape[0]
            with served.use(["z" if row % 2 else "a" for row in range(rows)]):
                got = logits(served.model)
            torch.testing.assert_close(got[0::2], wanted[0::2], **close)
            torch.testing.assert_close(got[1::2], plain[1::2], **close)
        served.detach()


def test_a_router_sends_prompts_to_it_all_the_same(tmp_path: Path) -> None:
    """It looks at the states of the base model: what a task does is no part of it."""
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    from tests.fleet.test_router import EXAMPLES, Letters
    from tests.models import llama as of_router

    paths = {}
    for task in EXAMPLES:
        model = of_router()
        ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj",)))
        paths[task] = ls.save(model, tmp_path / task.replace("/", "-"))
    served = ls.MultiTaskModel(of_router(), ls.SharedSubspace.from_adapters(paths))
    router = ls.TaskRouter(served, Letters())
    report = router.fit(EXAMPLES)
    assert report.accuracy == ls.TaskRouter(of_router(), Letters()).fit(EXAMPLES).accuracy
    (route,) = router.route(["abcabc"], most=3, floor=0.0)
    assert route.task == "low"
    batch = torch.tensor([Letters()("abcabc")["input_ids"]])
    with torch.no_grad():
        got = served(batch, tasks=[route.blend]).logits
        torch.testing.assert_close(got, of_router()(batch).logits, atol=2e-5, rtol=1e-4)
