"""The methods against the formulas of their papers, entry by entry in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.errors import ConfigError, UnknownNameError
from lorasmith.fleet import merge as M
from lorasmith.fleet.members import LayerFactors
from lorasmith.fleet.merge.dropping import keep_probabilities
from lorasmith.fleet.merge.sparse import largest

OUT, IN = 7, 9
RANKS = (2, 1, 3)
WEIGHTS = (0.5, 0.2, 0.3)
NAMES = tuple(M.methods())


def factors(count: int = 3, seed: int = 0) -> list[LayerFactors]:
    g = torch.Generator().manual_seed(seed)
    return [
        LayerFactors(
            torch.randn(RANKS[i % 3], IN, generator=g, dtype=torch.float64),
            torch.randn(OUT, RANKS[i % 3], generator=g, dtype=torch.float64),
        )
        for i in range(count)
    ]


def dense(parts: Sequence[LayerFactors]) -> list[Tensor]:
    return [p.delta(torch.float64) for p in parts]


def run(
    name: str,
    parts: Sequence[LayerFactors],
    weights: Sequence[float],
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """The merged ΔW, whatever the form."""
    method = M.get_method(name)
    if method.random:
        options["generator"] = torch.Generator().manual_seed(seed)
    if method.form == "factors":
        found = method.function(parts, weights, **options)
        assert isinstance(found, LayerFactors)
        return found.delta(torch.float64)
    merged: Tensor = method.function(dense(parts), weights, **options)
    return merged


def close(got: Tensor, wanted: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(
        got, torch.as_tensor(np.asarray(wanted)), atol=tolerance, rtol=tolerance
    )


def of(name: str, count: int = 3) -> list[LayerFactors]:
    return factors(2 if name == "slerp" else count)


def weights_for(name: str) -> tuple[float, ...]:
    return (0.6, 0.4) if name == "slerp" else WEIGHTS


# -- the formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "concatenation", "svd", "task_arithmetic"])
def test_sums(name: str) -> None:
    parts = factors()
    wanted = sum(w * d.numpy() for w, d in zip((2.0, -1.0, 0.5), dense(parts), strict=True))
    close(run(name, parts, (2.0, -1.0, 0.5)), wanted)
    if name == "task_arithmetic":
        close(run(name, parts, (2.0, -1.0, 0.5), scale=0.3), 0.3 * wanted)


def _top(delta: np.ndarray[Any, Any], density: float) -> np.ndarray[Any, Any]:
    """Zero but for the largest entries, by sorting."""
    flat = delta.ravel()
    keep = np.argsort(-np.abs(flat))[: round(density * flat.size)]
    made = np.zeros_like(flat)
    made[keep] = flat[keep]
    return made.reshape(delta.shape)


def _disjoint(
    deltas: Sequence[np.ndarray[Any, Any]], weights: Sequence[float]
) -> np.ndarray[Any, Any]:
    made = np.zeros_like(deltas[0])
    for place in np.ndindex(made.shape):
        values = [w * d[place] for w, d in zip(weights, deltas, strict=True)]
        sign = np.sign(sum(values))
        agree = [i for i, v in enumerate(values) if v != 0 and np.sign(v) == sign]
        if agree:
            mean = sum(values[i] for i in agree) / sum(abs(weights[i]) for i in agree)
            made[place] = mean * sum(abs(w) for w in weights)
    return made


@pytest.mark.parametrize("density", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [(1 / 3,) * 3, WEIGHTS, (1.0, -0.5, 0.25)])
def test_ties(density: float, weights: tuple[float, ...]) -> None:
    parts = factors()
    deltas = [_top(d.numpy(), density) for d in dense(parts)]
    close(run("ties", parts, weights, density=density, scale=0.7), 0.7 * _disjoint(deltas, weights))


def test_ties_is_the_papers_with_equal_weights() -> None:
    """Trim, elect, disjoint mean as section 4 has them, without weights."""
    deltas = [_top(d.numpy(), 0.4) for d in dense(factors())]
    stacked = np.stack(deltas)
    elected = np.sign(stacked.sum(0))
    agree = (np.sign(stacked) == elected) & (stacked != 0)
    mean = np.where(agree, stacked, 0).sum(0) / np.maximum(agree.sum(0), 1)
    close(run("ties", factors(), (1 / 3,) * 3, density=0.4), mean)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_magnitude_prune(density: float) -> None:
    parts = factors()
    wanted = sum(w * _top(d.numpy(), density) for w, d in zip(WEIGHTS, dense(parts), strict=True))
    close(run("magnitude_prune", parts, WEIGHTS, density=density), wanted)


def test_breadcrumbs() -> None:
    parts = factors()
    n = OUT * IN
    wanted = np.zeros((OUT, IN))
    for w, delta in zip(WEIGHTS, dense(parts), strict=True):
        flat = delta.numpy().ravel()
        order = np.argsort(-np.abs(flat))
        keep = order[round(0.1 * n) : round(0.1 * n) + round(0.4 * n)]
        kept = np.zeros_like(flat)
        kept[keep] = flat[keep]
        wanted += 0.5 * w * kept.reshape(OUT, IN)
    close(run("breadcrumbs", parts, WEIGHTS, density=0.4, gamma=0.1, scale=0.5), wanted)
    with pytest.raises(ConfigError, match="more than everything"):
        run("breadcrumbs", parts, WEIGHTS, density=0.95, gamma=0.1)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_sce(density: float) -> None:
    parts = factors()
    stacked = np.stack([d.numpy() for d in dense(parts)])
    variance = stacked.var(0)
    keep = np.argsort(-variance.ravel())[: round(density * variance.size)]
    mask = np.zeros(variance.size, bool)
    mask[keep] = True
    selected = stacked * mask.reshape(variance.shape)
    energy = np.array(WEIGHTS) * (selected**2).sum((1, 2))
    eta = energy / energy.sum() if energy.sum() else energy
    sign = np.sign(np.tensordot(WEIGHTS, selected, 1))
    erased = np.where(np.sign(selected) == sign, selected, 0)
    close(run("sce", parts, WEIGHTS, density=density), np.tensordot(eta, erased, 1))


@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
def test_dare(density: float) -> None:
    parts = factors()
    g = torch.Generator().manual_seed(5)
    masks = [torch.rand(OUT, IN, generator=g, dtype=torch.float64) < density for _ in parts]
    thinned = [
        np.where(m.numpy(), d.numpy() / density if density else 0.0, 0.0)
        for m, d in zip(masks, dense(parts), strict=True)
    ]
    wanted = sum(w * d for w, d in zip(WEIGHTS, thinned, strict=True))
    close(run("dare", parts, WEIGHTS, seed=5, density=density), wanted)
    close(
        run("dare_ties", parts, WEIGHTS, seed=5, density=density, scale=2.0),
        2 * _disjoint(thinned, WEIGHTS),
    )


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.9, 0.6), (0.0, 0.1), (1.0, 0.1)])
@pytest.mark.parametrize("elect", [True, False])
def test_della(density: float, epsilon: float, elect: bool) -> None:
    parts = factors()
    spread = min(epsilon, 2 * density, 2 * (1 - density))
    g = torch.Generator().manual_seed(5)
    thinned = []
    for delta in dense(parts):
        chance = torch.rand(OUT, IN, generator=g, dtype=torch.float64).numpy()
        made = np.zeros((OUT, IN))
        for row in range(OUT):
            # As the paper has it: r = 0 is the largest, p = p_min + (ε/n) r is dropped.
            for r, column in enumerate(np.argsort(-np.abs(delta[row].numpy()))):
                drop = (1 - density) - spread / 2 + spread / IN * r
                if chance[row, column] < 1 - drop:
                    made[row, column] = float(delta[row, column]) / (1 - drop)
        thinned.append(made)
    wanted = (
        _disjoint(thinned, WEIGHTS)
        if elect
        else sum(w * d for w, d in zip(WEIGHTS, thinned, strict=True))
    )
    got = run("della", parts, WEIGHTS, seed=5, density=density, epsilon=epsilon, elect=elect)
    close(got, wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(seed=st.integers(0, 100), rows=st.integers(1, 4), columns=st.integers(1, 12))
def test_probabilities_of_della_fall_with_the_rank(
    kind: torch.dtype, seed: int, rows: int, columns: int
) -> None:
    """Ties by column, zeros and tiny values included, whatever the dtype."""
    random = np.random.default_rng(seed)
    values = random.choice([0.0, -0.0, 1.0, -1.0, 1e-40, -3e-20, 7.5], size=(rows, columns))
    found = keep_probabilities(torch.tensor(values, dtype=kind), 0.6, 0.3).numpy()
    wanted = np.empty_like(values)
    for i, row in enumerate(np.abs(values.astype(np.float64))):
        for place, j in enumerate(np.argsort(row, kind="stable")):
            wanted[i, j] = 0.6 - 0.15 + 0.3 * (place + 1) / columns
    np.testing.assert_allclose(found, wanted, atol=1e-15)


@given(seed=st.integers(0, 200), share=st.floats(0, 1), ties=st.booleans())
def test_the_largest_entries_are_those_of_sorting(seed: int, share: float, ties: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 4, (5, 6)).astype(np.float32) if ties else random.random((5, 6))
    count = round(share * values.size)
    found = largest(torch.tensor(values).T, count).T.numpy()  # not contiguous either
    least = np.sort(values.ravel())[::-1][count - 1] if count else np.inf
    assert (found == (values >= least)).all()


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della"])
def test_a_density_of_zero_leaves_nothing_in_float32(name: str) -> None:
    method = M.get_method(name)
    deltas = [1e6 * d.float() for d in dense(factors())]
    g = torch.Generator().manual_seed(0)
    merged = method.function(deltas, WEIGHTS, density=0.0, generator=g)
    assert torch.equal(merged, torch.zeros(OUT, IN))


def test_dropping_keeps_the_expectation() -> None:
    parts = factors()
    wanted = run("linear", parts, WEIGHTS)
    for name, options in (
        ("dare", {"density": 0.4}),
        ("della", {"density": 0.5, "epsilon": 0.4, "elect": False}),
    ):
        mean = sum(run(name, parts, WEIGHTS, seed=s, **options) for s in range(3000)) / 3000
        assert float((mean - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t: float) -> None:
    parts = factors(2)
    a, b = (d.numpy() for d in dense(parts))
    omega = math.acos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    wanted = (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)
    close(run("slerp", parts, (1 - t, t)), wanted)
    close(run("slerp", parts, (3 * (1 - t), 3 * t)), 3 * wanted)


def test_karcher_is_the_nearest_direction() -> None:
    """The Riemannian gradient vanishes, and the norm is the mean norm."""
    parts = factors(4, seed=3)
    parts = [LayerFactors(p.A, p.B * s) for p, s in zip(parts, (1, 2, 3, 0.5), strict=True)]
    w = np.array((0.4, 0.3, 0.2, 0.1))
    merged = run("karcher", parts, tuple(w)).numpy()
    norms = np.array([np.linalg.norm(d.numpy()) for d in dense(parts)])
    assert np.linalg.norm(merged) == pytest.approx(float(w @ norms), rel=1e-9)
    u = merged / np.linalg.norm(merged)
    gradient = np.zeros_like(u)
    for weight, d, n in zip(w, dense(parts), norms, strict=True):
        point = d.numpy() / n
        cosine = float((point * u).sum())
        gradient += weight * math.acos(cosine) / math.sqrt(1 - cosine**2) * (point - cosine * u)
    assert np.linalg.norm(gradient) < 1e-7


def test_karcher_of_two_is_slerp_of_units() -> None:
    parts = factors(2)
    unit = [LayerFactors(p.A, p.B / p.delta(torch.float64).norm()) for p in parts]
    close(run("karcher", unit, (0.7, 0.3)), run("slerp", unit, (0.7, 0.3)), 1e-7)


@pytest.mark.parametrize("name", ["slerp", "karcher"])
def test_opposite_changes_have_no_mean_on_the_sphere(name: str) -> None:
    (part,) = factors(1)
    with pytest.raises(ConfigError, match="opposite"):
        run(name, [part, LayerFactors(part.A, -part.B)], (0.5, 0.5))


@pytest.mark.parametrize("inner", ["linear", "ties", "dare", "dare_ties"])
def test_knots(inner: str) -> None:
    """Against the singular vectors of the dense changes side by side."""
    parts = factors()
    U, S, Vh = np.linalg.svd(np.hstack([d.numpy() for d in dense(parts)]), full_matrices=False)
    k = sum(RANKS)
    U, S, Vh = U[:, :k], S[:k], Vh[:k]
    blocks = [Vh[:, i * IN : (i + 1) * IN] for i in range(3)]
    if inner == "ties":
        blocks = [_top(b, 0.5) for b in blocks]
    elif inner != "linear":
        # The signs of singular vectors are free, masks are not: draw them in the same order.
        g = torch.Generator().manual_seed(5)
        masks = [torch.rand(k, IN, generator=g, dtype=torch.float64) < 0.5 for _ in parts]
        blocks = [np.where(m.numpy(), b / 0.5, 0) for m, b in zip(masks, blocks, strict=True)]
    merge = _disjoint if inner.endswith("ties") else None
    merged = (
        merge(blocks, WEIGHTS)
        if merge
        else sum(w * b for w, b in zip(WEIGHTS, blocks, strict=True))
    )
    close(run("knots", parts, WEIGHTS, seed=5, inner=inner, density=0.5), U * S @ merged, 1e-9)


# -- what holds for all of them ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(count=st.integers(1, 5), seed=st.integers(0, 50))
def test_copies_give_the_adapter_back(name: str, count: int, seed: int) -> None:
    count = 2 if name == "slerp" else count
    (part,) = factors(1, seed)
    merged = run(name, [part] * count, [1 / count] * count)
    close(merged, part.delta(torch.float64), 1e-10)


@pytest.mark.parametrize("name", NAMES)
@given(size=st.floats(0.01, 20))
def test_weights_scale_the_result(name: str, size: float) -> None:
    parts, w = of(name), weights_for(name)
    one = run(name, parts, w)
    many = run(name, parts, [size * x for x in w])
    close(many, size * one, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_gauge_does_not_matter(name: str) -> None:
    """Other factors of the same changes."""
    parts = of(name)
    g = torch.Generator().manual_seed(1)
    turned = []
    for p in parts:
        R = torch.randn(p.rank, p.rank, generator=g, dtype=torch.float64) + 2 * torch.eye(p.rank)
        turned.append(LayerFactors(torch.linalg.inv(R) @ p.A, p.B @ R))
    close(run(name, turned, weights_for(name)), run(name, parts, weights_for(name)), 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_layer_is_a_change_of_zero(name: str) -> None:
    parts = of(name, 2)
    none = LayerFactors(parts[1].A[:0], parts[1].B[:, :0])
    zero = LayerFactors(torch.zeros_like(parts[1].A), torch.zeros_like(parts[1].B))
    close(run(name, [parts[0], none], (0.5, 0.5)), run(name, [parts[0], zero], (0.5, 0.5)), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_is_left_alone(name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = run(name, of(name), weights_for(name))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(run(name, of(name), weights_for(name)), one)


@pytest.mark.parametrize(
    ("name", "option"),
    [(m.name, o.name) for m in M.methods().values() for o in m.options if o.name == "density"],
)
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_densities_are_shares(name: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        run(name, factors(), WEIGHTS, **{option: value})


@pytest.mark.parametrize("name", ["slerp", "karcher", "sce"])
def test_negative_weights_are_refused_where_they_mean_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="negative"):
        run(name, of(name), (1.0, -0.5, 0.5)[: len(of(name))])


# -- the registry ------------------------------------------------------------------------------


def test_own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.fleet.merge import registry

    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @M.register("median", form="dense", formula="median")
    def median(deltas: Any, weights: Any, *, scale: float = 1.0) -> Tensor:
        return scale * torch.stack(deltas).median(dim=0).values

    assert M.get_method("median").options[0].name == "scale"
    wanted = 2 * np.median([d.numpy() for d in dense(factors())], axis=0)
    close(run("median", factors(), WEIGHTS, scale=2.0), wanted)
    with pytest.raises(ConfigError, match="already"):
        M.register("median", form="dense")(median)
    with pytest.raises(ConfigError, match="other arguments"):
        M.register("bad", form="dense")(lambda deltas: deltas)
    with pytest.raises(ConfigError, match="form"):
        M.register("bad", form="sparse")(median)  # type: ignore[arg-type]


def test_names_and_options_are_checked() -> None:
    assert M.get_method("dare-ties").name == "dare_ties"
    assert M.get_method("cat").name == "concatenation"
    with pytest.raises(UnknownNameError, match="did you mean 'ties'"):
        M.get_method("tiess")
    ties = M.get_method("ties")
    assert ties.checked({"density": 0.3}) == {"density": 0.3, "scale": 1.0}
    with pytest.raises(ConfigError, match="did you mean 'density'"):
        ties.checked({"densty": 0.3})
    for value in ("0.3", True, math.inf):
        with pytest.raises(ConfigError, match=r"impossible type|not a number"):
            ties.checked({"density": value})


# -- the search --------------------------------------------------------------------------------


def test_the_search_finds_weights_and_is_seeded() -> None:
    goal = np.array((0.9, 0.1, 0.6))

    def distance(w: Sequence[float]) -> float:
        return float(((np.array(w) - goal) ** 2).sum())

    calls: list[tuple[str, int, int]] = []
    found = M.search_weights(distance, 3, trials=80, seed=1, progress=lambda *a: calls.append(a))
    assert len(found) == len(calls) == 80
    assert [t.score for t in found] == sorted(t.score for t in found)
    assert any(t.weights == pytest.approx((1 / 3,) * 3) for t in found)
    assert found[0].score < 0.1 * distance((1 / 3,) * 3)
    assert found == M.search_weights(distance, 3, trials=80, seed=1)
    assert found != M.search_weights(distance, 3, trials=80, seed=2)
    on_simplex = M.search_weights(distance, 3, trials=20, sums=False)
    assert all(sum(t.weights) == pytest.approx(1) for t in on_simplex)
    worst = M.search_weights(lambda w: math.nan, 2, trials=3)
    assert all(t.score == math.inf for t in worst)
    assert len(M.search_weights(distance, 3, trials=1)) == 1
    with pytest.raises(ConfigError, match="trials"):
        M.search_weights(distance, 3, trials=0)
