"""Shared subspaces: errors against dense matrices, and each defect of vLoRA that is known."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import AdapterFileError, BaseMismatchError, ConfigError, UnknownNameError
from lorasmith.fleet import LayerFactors, MemberRecord, open_members, store
from lorasmith.fleet.subspace import BudgetWarning, SharedSubspace
from lorasmith.io.weights import AdapterWeights, BaseModel
from tests.io.support import llama, logits

SIZES = {"m.0.q": (20, 16), "m.0.v": (20, 8), "m.1.q": (20, 16), "m.1.v": (20, 8)}
BOTH = pytest.mark.parametrize("basis", ["joint", "share"])


def adapter(
    seed: int = 0,
    r: int = 2,
    *,
    modules: Sequence[str] = tuple(SIZES),
    alpha: float = 4.0,
    scaling: str = "standard",
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
    common: float = 0.0,
    base: str = "a-base",
) -> AdapterWeights:
    """A LoRA; of ``common`` = 1 all seeds span the same directions on a layer."""
    tensors = {}
    for number, module in enumerate(modules):
        d_in, d_out = SIZES[module]
        g = torch.Generator().manual_seed(1000 * seed + number)
        shared = torch.Generator().manual_seed(777 + list(SIZES).index(module))
        A, B = torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)
        rows = torch.randn(4, d_in, generator=shared), torch.randn(d_out, 4, generator=shared)
        A = (1 - common) * A + common * torch.randn(r, 4, generator=g) @ rows[0]
        B = (1 - common) * B + common * rows[1] @ torch.randn(4, r, generator=g)
        tensors[module] = {"A": A.to(dtype), "B": (size * B).to(dtype)}
    config = ls.LoRAConfig(r=r, alpha=alpha, scaling=scaling, targets=tuple(modules))  # type: ignore[arg-type]
    return AdapterWeights.from_tensors(config, tensors, base=BaseModel(base))


def fleet(count: int = 6, **options: Any) -> dict[str, AdapterWeights]:
    """Adapters of mixed ranks, alphas, scalings, dtypes and sizes."""
    return {
        f"task-{i}": adapter(
            i,
            r=1 + i % 3,
            alpha=float(2 + i),
            scaling="rslora" if i % 2 else "standard",
            size=10.0 ** (i % 3 - 1),
            dtype=torch.bfloat16 if i == 2 else torch.float32,
            **options,
        )
        for i in range(count)
    }


def deltas(source: AdapterWeights) -> dict[str, Tensor]:
    """ΔW of each layer, by its definition, float64."""
    return {m: f.delta(torch.float64) for m, f in source.factors.items()}


def held(subspace: SharedSubspace, name: str) -> dict[str, Tensor]:
    """U C V + residual, multiplied out in float64."""
    found = {}
    for module in subspace.record(name).modules:
        U, V = subspace.up(module).double(), subspace.down(module).double()
        W = U @ subspace.core(name, module).double() @ V
        rest = subspace.residual(name, module)
        found[module] = W if rest is None else W + rest.delta(torch.float64)
    return found


def error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative squared distance over all layers."""
    assert one.keys() == other.keys()
    gone = sum(float((one[m] - other[m]).square().sum()) for m in one)
    return gone / sum(float(W.square().sum()) for W in one.values())


@pytest.fixture(autouse=True)
def _warnings_count() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BudgetWarning)
        yield


# -- building ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("budget", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("per_layer", [True, False])
def test_every_adapter_meets_the_budget(basis: Any, budget: float, per_layer: bool) -> None:
    sources = fleet()
    made = SharedSubspace.from_adapters(sources, basis=basis, error=budget, per_layer=per_layer)
    assert made.ids == tuple(sources)
    for name, source in sources.items():
        true = error(deltas(source), held(made, name))
        assert true <= budget + 1e-5
        assert made.errors[name] == pytest.approx(true, abs=1e-5)
        layers = made.layer_errors(name)
        for module, W in deltas(source).items():
            gone = float((W - held(made, name)[module]).square().sum() / W.square().sum())
            assert layers[module] == pytest.approx(gone, abs=1e-5)


@BOTH
def test_a_smaller_budget_takes_more_bytes(basis: Any) -> None:
    sizes = [
        SharedSubspace.from_adapters(fleet(), basis=basis, error=e).stats().total
        for e in (0.4, 0.1, 0.01)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


@BOTH
def test_variance_is_kept_on_every_layer(basis: Any) -> None:
    """vLoRA: the first layer decides for all, and one keeps 58 % where 99 % were asked for."""
    sources = fleet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        made = SharedSubspace.from_adapters(sources, basis=basis, variance=0.9, relative=False)
    for module in made.modules:
        whole = [deltas(s)[module] for s in sources.values()]
        kept = [held(made, n)[module] for n in sources]
        gone = sum(float((a - b).square().sum()) for a, b in zip(whole, kept, strict=True))
        assert gone <= (0.1 + 1e-6) * sum(float(W.square().sum()) for W in whole)


@BOTH
def test_components_are_a_number(basis: Any) -> None:
    with pytest.warns(BudgetWarning, match="lose more than"):
        made = SharedSubspace.from_adapters(fleet(), basis=basis, components=2)
    width = made.width
    wanted = (2, 2) if basis == "joint" else (3 * width, 3 * width)
    assert set(made.stats().ranks.values()) == {wanted}


def test_the_joint_basis_does_not_see_the_gauge() -> None:
    """vLoRA: the same ΔW in another gauge has similarity 0.02, and (−A, −B) averages to zero."""
    sources = fleet()
    turned = {}
    for name, source in sources.items():
        tensors = {}
        for m in source.modules:
            state = source.state(m)
            T = torch.randn(state["A"].shape[0], state["A"].shape[0])
            T = T + 3 * torch.eye(len(T))
            tensors[m] = {"A": T @ state["A"], "B": state["B"] @ torch.linalg.inv(T)}
        turned[name] = AdapterWeights.from_tensors(source.config, tensors, like=source)
    for basis in ("joint", "share"):
        one, other = (
            SharedSubspace.from_adapters(s, basis=basis, error=0.1, gauge="aligned")  # type: ignore[arg-type]
            for s in (sources, turned)
        )
        assert one.stats().ranks == other.stats().ranks
        for name in sources:
            assert one.errors[name] == pytest.approx(other.errors[name], abs=1e-3)


def test_alignment_pays() -> None:
    sources = {f"{i}": adapter(i, r=3, common=1.0) for i in range(8)}
    gone = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        for gauge in ("aligned", "stored"):
            made = SharedSubspace.from_adapters(
                sources,
                basis="share",
                components=2,
                gauge=gauge,  # type: ignore[arg-type]
            )
            gone[gauge] = sum(made.errors.values())
    assert gone["aligned"] < gone["stored"]


def test_small_adapters_keep_their_accuracy() -> None:
    sources = {f"{i}": adapter(i, size=10.0 ** -(2 * i)) for i in range(4)}
    for basis in ("joint", "share"):
        made = SharedSubspace.from_adapters(sources, basis=basis, error=0.05)  # type: ignore[arg-type]
        assert all(error(deltas(s), held(made, n)) <= 0.051 for n, s in sources.items())


def test_diagonal_cores() -> None:
    made = SharedSubspace.from_adapters(fleet(), core="diagonal", error=1.0)
    for name in made.ids:
        for module in made.modules:
            C = made.core(name, module)
            assert torch.equal(
                C, torch.diag(torch.diagonal(C)).new_zeros(C.shape).copy_(C * torch.eye(*C.shape))
            )
        assert made.errors[name] == pytest.approx(
            error(deltas(fleet()[name]), held(made, name)), abs=1e-5
        )


@BOTH
def test_layers_that_only_some_adapters_have(basis: Any) -> None:
    sources = {
        "all": adapter(0),
        "q": adapter(1, modules=["m.0.q", "m.1.q"]),
        "one": adapter(2, modules=["m.1.v"]),
    }
    made = SharedSubspace.from_adapters(sources, basis=basis, error=0.01)
    for name, source in sources.items():
        assert error(deltas(source), held(made, name)) <= 0.0101
        assert made.reconstruct(name).modules == source.modules
    assert not made.core("one", "m.0.q").any()


@pytest.mark.parametrize(
    "options",
    [
        {"error": -0.1},
        {"error": 1.5},
        {"variance": 2.0},
        {"components": 0},
        {"components": 2.5},
        {"error": 0.1, "components": 3},
        {"basis": "both"},
        {"core": "thin"},
        {"gauge": "none"},
    ],
)
def test_arguments_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SharedSubspace.from_adapters(fleet(2), **options)


# -- projecting, adding, absorbing, removing -----------------------------------------------------


@BOTH
def test_a_stranger_is_not_in_the_span_and_it_says_so(basis: Any) -> None:
    """vLoRA: a held-out adapter comes back with an error of 1.02, without a warning."""
    made = SharedSubspace.from_adapters(fleet(3, common=0.9), basis=basis, error=0.01)
    before = made.stats()
    with pytest.warns(BudgetWarning, match="above the budget"):
        found = made.project(adapter(99, r=2))
    assert not found.within
    assert made.stats() == before
    projected = {
        m: made.up(m).double() @ found.codes[m].double() @ made.down(m).double()
        for m in made.modules
    }
    assert found.error == pytest.approx(error(deltas(adapter(99, r=2)), projected), rel=1e-4)


def test_a_member_is_in_the_span() -> None:
    made = SharedSubspace.from_adapters(fleet(), error=0.0)
    assert made.project(fleet()["task-3"]).error < 1e-9


@BOTH
@pytest.mark.parametrize("budget", [0.3, 0.05, 0.0])
def test_add_keeps_a_residual_within_the_budget(basis: Any, budget: float) -> None:
    made = SharedSubspace.from_adapters(fleet(4), basis=basis, error=0.05)
    before = {n: held(made, n) for n in made.ids}
    new = adapter(50, r=3, size=0.1)
    record = made.add(new, "../x", error=budget)
    assert record.residual_rank
    true = error(deltas(new), held(made, "../x"))
    assert true <= budget + 1e-9
    assert record.error == pytest.approx(true, abs=1e-6)
    for name, old in before.items():
        assert all(torch.equal(old[m], W) for m, W in held(made, name).items())


def test_add_without_residual() -> None:
    made = SharedSubspace.from_adapters(fleet(3), error=0.05)
    assert not made.add(adapter(60, r=1), "core-only", error=1.0).residual_rank


@BOTH
def test_add_with_a_new_layer(basis: Any) -> None:
    made = SharedSubspace.from_adapters({"q": adapter(1, modules=["m.0.q"])}, basis=basis)
    made.add(adapter(2), "all", error=0.01)
    assert error(deltas(adapter(2)), held(made, "all")) <= 0.0101
    assert made.reconstruct("q").modules == ("m.0.q",)
    assert made.validate() == []


@BOTH
@settings(max_examples=12)
@given(first=st.integers(1, 4), count=st.integers(5, 6))
def test_absorbing_without_truncation_is_exact(basis: Any, first: int, count: int) -> None:
    """Old adapters do not move, new ones are exact (vLoRA: old ones were corrupted, drift 0.69)."""
    sources = fleet(count)
    names = list(sources)
    start = {n: sources[n] for n in names[:first]}
    made = SharedSubspace.from_adapters(start, basis=basis, error=0.0)
    done = made.absorb({n: sources[n] for n in names[first:]}, error=0.0)
    assert made.ids == tuple(names)
    assert max(done.moved.values()) < 1e-9
    for name, source in sources.items():
        assert error(deltas(source), held(made, name)) < 1e-8
    assert made.validate() == []


def test_absorbing_is_building_at_once() -> None:
    """The joint basis spans the same leading directions, whether in steps or at once."""
    sources = fleet(6)
    names = list(sources)
    whole = SharedSubspace.from_adapters(sources, error=0.0, sweeps=0)
    steps = SharedSubspace.from_adapters({n: sources[n] for n in names[:2]}, error=0.0, sweeps=0)
    for n in names[2:]:
        steps.absorb({n: sources[n]}, error=0.0)
    for module in whole.modules:
        for one, other in (
            (whole.up(module), steps.up(module)),
            (whole.down(module).mT, steps.down(module).mT),
        ):
            a, b = one[:, :2].double(), other[:, :2].double()
            torch.testing.assert_close(a @ a.mT, b @ b.mT, rtol=0, atol=2e-2)


@BOTH
def test_absorbing_moves_old_adapters_by_no_more_than_it_says(basis: Any) -> None:
    sources = fleet(6, common=0.5)
    names = list(sources)
    made = SharedSubspace.from_adapters({n: sources[n] for n in names[:3]}, basis=basis, error=0.02)
    before = {n: held(made, n) for n in made.ids}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        done = made.absorb({n: sources[n] for n in names[3:]}, error=0.1)
    for name in names[:3]:
        whole = sum(float(W.square().sum()) for W in deltas(sources[name]).values())
        gone = sum(float((before[name][m] - W).square().sum()) for m, W in held(made, name).items())
        assert gone / whole == pytest.approx(done.moved[name], abs=1e-5)
    for name, source in sources.items():
        true = error(deltas(source), held(made, name))
        assert true <= made.errors[name] + 1e-6
        assert true <= 0.1 + 1e-5
    for name in names[:3]:  # and the true error can be found again
        bound = made.errors[name]
        record = made.measure(sources[name], name)
        assert record.error == pytest.approx(
            error(deltas(sources[name]), held(made, name)), abs=1e-6
        )
        assert made.errors[name] <= bound + 1e-6


@BOTH
def test_absorbing_keeps_residuals_and_codecs(basis: Any) -> None:
    made = SharedSubspace.from_adapters(fleet(3), basis=basis, error=0.05)
    made.add(adapter(70), "beside", error=0.01)
    made.quantize(8)
    made.absorb({"new": adapter(71, r=4)}, error=0.05)
    assert error(deltas(adapter(70)), held(made, "beside")) < 0.06
    assert error(deltas(adapter(71, r=4)), held(made, "new")) < 0.06
    assert set(made.stats().codecs.values()) == {"int8"}
    assert made.validate() == []


@BOTH
@pytest.mark.parametrize("bits", [8, 4])
def test_absorbing_in_few_bits_tells_what_rounding_moves(basis: Any, bits: int) -> None:
    sources = fleet(6, common=0.5)
    names = list(sources)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        made = SharedSubspace.from_adapters({n: sources[n] for n in names[:4]}, basis=basis)
        made.quantize(bits)
        before = {n: held(made, n) for n in made.ids}
        done = made.absorb({n: sources[n] for n in names[4:]})
    for name in names[:4]:
        whole = sum(float(W.square().sum()) for W in deltas(sources[name]).values())
        gone = sum(float((before[name][m] - W).square().sum()) for m, W in held(made, name).items())
        assert gone > 0
        # In units of what is known of ‖ΔW‖², which is exact.
        assert gone / whole == pytest.approx(done.moved[name], rel=1e-3, abs=1e-7)
        assert error(deltas(sources[name]), held(made, name)) <= made.errors[name] + 1e-6
    for name in names[4:]:  # at hand, and so measured after rounding
        true = error(deltas(sources[name]), held(made, name))
        assert true == pytest.approx(made.errors[name], rel=1e-3, abs=1e-6)


@BOTH
def test_remove_leaves_the_others(basis: Any) -> None:
    made = SharedSubspace.from_adapters(fleet(), basis=basis, error=0.05)
    made.add(adapter(80), "beside", error=0.01)
    before = {n: held(made, n) for n in made.ids}
    size = made.stats().codes
    made.remove("task-2")
    assert made.stats().codes < size
    assert "task-2" not in made
    for name in made.ids:
        assert all(torch.equal(before[name][m], W) for m, W in held(made, name).items())
    with pytest.raises(UnknownNameError, match="no adapter of that id"):
        made.remove("task-2")
    made.add(fleet()["task-2"], "task-2")
    assert error(deltas(fleet()["task-2"]), held(made, "task-2")) <= 0.0501


@pytest.mark.parametrize("call", ["add", "absorb"])
def test_taken_ids_and_other_bases_are_refused(call: str) -> None:
    made = SharedSubspace.from_adapters(fleet(2))
    before = made.stats()
    enter = made.add if call == "add" else lambda a, n, **k: made.absorb({n: a}, **k)
    with pytest.raises(ConfigError, match="id already"):
        enter(adapter(9), "task-1")
    with pytest.raises(BaseMismatchError):
        enter(adapter(9, base="another"), "new")
    with pytest.raises(ConfigError, match="cannot be the id"):
        enter(adapter(9), "line\nbreak")
    assert made.stats() == before
    enter(adapter(9, base="another"), "new", allow_base_mismatch=True)


@BOTH
def test_streaming_is_building(basis: Any) -> None:
    """vLoRA: 0.84 in a stream against 0.62 at once."""
    sources = fleet(7)
    for given_as in (sources, (s for s in sources.values())):
        made = SharedSubspace.from_stream(
            given_as,  # type: ignore[arg-type]
            None if isinstance(given_as, dict) else iter(sources),
            basis=basis,
            error=0.05,
            block=2,
        )
        assert made.ids == tuple(sources)
        for name, source in sources.items():
            true = error(deltas(source), held(made, name))
            assert true <= 0.05 + 1e-5
            assert true <= made.errors[name] + 1e-6
        assert made.validate() == []


def test_a_narrow_stream_tells_how_much_it_loses() -> None:
    sources = fleet(7)
    for again in (True, False):
        given_as: Any = list(sources.values()) if again else iter(sources.values())
        with pytest.warns(BudgetWarning):
            made = SharedSubspace.from_stream(given_as, list(sources), error=0.01, block=2, most=3)
        for name, source in sources.items():
            true = error(deltas(source), held(made, name))
            assert true <= made.errors[name] + 1e-6
            if again:
                assert true == pytest.approx(made.errors[name], abs=1e-5)


# -- giving adapters back -------------------------------------------------------------------------


@BOTH
def test_reconstruction_has_the_configuration(basis: Any) -> None:
    """vLoRA loses rank, alpha and the rest: merging alpha 4 with alpha 64 is 97 % off."""
    sources = fleet()
    made = SharedSubspace.from_adapters(sources, basis=basis, error=0.0)
    for name, source in sources.items():
        again = made.reconstruct(name)
        assert again.config == source.config
        assert again.dtype == source.dtype
        tolerance = 1e-4 if source.dtype == torch.bfloat16 else 1e-8
        assert error(deltas(source), deltas(again)) < tolerance
    exact = made.reconstruct("task-0", "exact")
    assert error(held(made, "task-0"), deltas(exact)) < 1e-9


def test_reconstruction_at_a_rank_is_the_best_of_that_rank() -> None:
    made = SharedSubspace.from_adapters(fleet(4), error=0.2)
    made.add(adapter(5, r=3), "wide", error=0.01)
    for rank, wanted in (("original", 3), (2, 2)):
        again = made.reconstruct("wide", rank)  # type: ignore[arg-type]
        for module, W in held(made, "wide").items():
            U, S, Vh = torch.linalg.svd(W)
            best = (U[:, :wanted] * S[:wanted]) @ Vh[:wanted]
            torch.testing.assert_close(deltas(again)[module], best, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="rank is not usable"):
        made.reconstruct("wide", 0)
    with pytest.raises(UnknownNameError):
        made.reconstruct("nobody")


# -- tasks that were trained in it ----------------------------------------------------------------


def test_a_trained_core_comes_in() -> None:
    made = SharedSubspace.from_adapters(fleet(3))
    record = MemberRecord.of(adapter(0))
    cores: dict[str, Any] = {
        m: torch.randn(made.up(m).shape[1], made.down(m).shape[0]) for m in made.modules
    }
    made.insert_core("trained", cores, record)
    for module, C in cores.items():
        torch.testing.assert_close(made.core("trained", module), C)
    assert made.validate() == []
    with pytest.raises(ConfigError, match="does not fit"):
        made.insert_core("wrong", {m: C[:, :1] for m, C in cores.items()}, record)
    assert "wrong" not in made


@BOTH
def test_new_directions_change_nothing(basis: Any) -> None:
    """vLoRA: num_expand breaks the other tasks."""
    made = SharedSubspace.from_adapters(fleet(4), basis=basis)
    before = {n: held(made, n) for n in made.ids}
    for module in made.modules:
        d_in, d_out = SIZES[module]
        n = 2 * made.width
        made.extend(module, torch.randn(d_out, n), torch.randn(n, d_in))
    for name, old in before.items():
        for module, W in held(made, name).items():
            torch.testing.assert_close(W, old[module], rtol=0, atol=1e-9)
    assert made.validate() == []
    with pytest.raises(ConfigError, match="do not fit"):
        made.extend("m.0.q", torch.randn(3, 2), torch.randn(2, 20))


# -- bytes and files -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("bits", "factor"), [(16, 1.99), (8, 3.0), (4, 4.0), ("nf4", 4.0)])
def test_quantising_saves_bytes(basis: Any, bits: Any, factor: float, tmp_path: Path) -> None:
    """vLoRA: quantize saves 0 bytes."""
    sources = fleet(12)
    made = SharedSubspace.from_adapters(sources, basis=basis, error=0.02)
    made.add(adapter(90), "beside", error=0.01)
    sources["beside"] = adapter(90)
    made.save(tmp_path / "plain")
    before = {n: held(made, n) for n in made.ids}
    done = made.quantize(bits)
    made.save(tmp_path / "small")
    files = [
        sum(_payload(tmp_path / d / f) for f in (store.BASIS, store.CODES))
        for d in ("plain", "small")
    ]
    stats = made.stats()
    assert done.before / done.after >= factor
    assert done.after == stats.basis + stats.codes + stats.residuals
    assert files[0] - files[1] == done.before - done.after
    again = SharedSubspace.load(tmp_path / "small")
    for name, source in sources.items():
        whole = sum(float(W.square().sum()) for W in deltas(source).values())
        gone = sum(float((before[name][m] - W).square().sum()) for m, W in held(made, name).items())
        assert done.moved[name] == pytest.approx(gone / whole, rel=1e-3, abs=1e-7)
        true = error(deltas(source), held(made, name))
        assert true <= made.errors[name] + 1e-6
        assert all(torch.equal(W, held(again, name)[m]) for m, W in held(made, name).items())


def _payload(path: Path) -> int:
    """Bytes of the values in a safetensors file, names and shapes aside."""
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


def test_stats_count_what_is_there(tmp_path: Path) -> None:
    made = SharedSubspace.from_adapters(fleet(), error=0.05)
    made.add(adapter(33), "beside", error=0.01)
    stats = made.stats()
    bytes_of = {"up": 0, "left": 0, "residual_up": 0}
    for layer in made._layers:
        for one, other in (("up", "down"), ("left", "right"), ("residual_up", "residual_down")):
            for part in (one, other):
                for t in getattr(layer, part).tensors().values():
                    bytes_of[one] += t.untyped_storage().nbytes()
    assert (stats.basis, stats.codes, stats.residuals) == tuple(bytes_of.values())
    assert stats.original == sum(m.nbytes for m in open_members({**fleet(), "x": adapter(33)}))
    assert sum(stats.per_adapter.values()) == stats.codes + stats.residuals + stats.rest
    assert stats.disk is None
    made.save(tmp_path / "f")
    assert made.stats().disk == sum(f.stat().st_size for f in (tmp_path / "f").iterdir())
    json.dumps(made.stats().to_dict(), allow_nan=False)


HOSTILE = [
    "team/a",
    "team_a",
    "../x",
    "..",
    "/etc/passwd",
    "a\\b",
    "CON",
    "\u00e9",
    "e\u0301",
    "0",
    " ",
]


def test_ids_are_not_paths(tmp_path: Path) -> None:
    """vLoRA: "team/a" and "team_a" overwrite each other, and ids can leave the folder."""
    sources = {name: adapter(i) for i, name in enumerate(HOSTILE)}
    made = SharedSubspace.from_adapters(sources, error=0.0)
    made.save(tmp_path / "in" / "fleet")
    assert sorted(f.name for f in (tmp_path / "in").iterdir() if not f.name.startswith(".")) == [
        "fleet"
    ]
    assert {f.name for f in (tmp_path / "in" / "fleet").iterdir()} <= store.OWNED
    again = SharedSubspace.load(tmp_path / "in" / "fleet")
    assert again.ids == tuple(HOSTILE)
    for name, source in sources.items():
        assert error(deltas(source), held(again, name)) < 1e-8


@BOTH
def test_a_file_gives_back_what_was_saved(basis: Any, tmp_path: Path) -> None:
    made = SharedSubspace.from_adapters(fleet(), basis=basis, error=0.1)
    made.add(adapter(44), "beside", error=0.01)
    made.save(tmp_path / "f")
    again = SharedSubspace.load(tmp_path / "f")
    assert (again.ids, again.modules, again.basis, again.base) == (
        made.ids,
        made.modules,
        made.basis,
        made.base,
    )
    assert again.budget == made.budget
    for name in made.ids:
        assert again.record(name) == made.record(name)
        assert again.errors[name] == pytest.approx(made.errors[name], rel=1e-5, abs=1e-9)
        assert all(torch.equal(W, held(again, name)[m]) for m, W in held(made, name).items())
    assert store.validate(tmp_path / "f") == []
    again.add(adapter(45), "later", error=0.01)
    again.save(tmp_path / "f")
    assert "later" in SharedSubspace.load(tmp_path / "f")


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("name", [store.BASIS, store.CODES, store.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_found(name: str, damage: str, tmp_path: Path) -> None:
    SharedSubspace.from_adapters(fleet()).save(tmp_path / "f")
    file = tmp_path / "f" / name
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        _flip(file, file.stat().st_size - 3 if name != store.MANIFEST else 5)
    assert store.validate(tmp_path / "f")
    with pytest.raises(AdapterFileError):
        SharedSubspace.load(tmp_path / "f")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["adapters"].pop(),
        lambda m: m["adapters"][0].update(id=m["adapters"][1]["id"]),
        lambda m: m["adapters"][0].update(id="\x00"),
        lambda m: m["layers"].reverse(),
        lambda m: m["layers"][0]["parts"]["up"].__setitem__(1, 999),
        lambda m: m["layers"][0]["parts"]["up"].__setitem__(0, "int3"),
        lambda m: m.update(basis="other"),
        lambda m: m.update(format=99),
        lambda m: m.pop("records"),
        lambda m: m["files"].update({"../../x": {"sha256": "", "size": 0}}),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(edit: Any, tmp_path: Path) -> None:
    SharedSubspace.from_adapters(fleet()).save(tmp_path / "f")
    file = tmp_path / "f" / store.MANIFEST
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError):
        SharedSubspace.load(tmp_path / "f")
    assert store.validate(tmp_path / "f")


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SharedSubspace.from_adapters(fleet())
    made.save(tmp_path / "f")
    made.remove("task-0")

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(AdapterFileError, match="could not be written"):
        made.save(tmp_path / "f")
    assert "task-0" in SharedSubspace.load(tmp_path / "f")


def test_two_writers_do_not_lose_each_others_work(tmp_path: Path) -> None:
    SharedSubspace.from_adapters(fleet(2)).save(tmp_path / "f")
    one, other = SharedSubspace.load(tmp_path / "f"), SharedSubspace.load(tmp_path / "f")
    one.add(adapter(7), "first", error=0.1)
    one.save(tmp_path / "f")
    other.add(adapter(8), "second", error=0.1)
    with pytest.raises(AdapterFileError, match="somebody else"):
        other.save(tmp_path / "f")
    other.save(tmp_path / "g")
    assert SharedSubspace.load(tmp_path / "f").ids[-1] == "first"


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterFileError, match="something other"):
        SharedSubspace.from_adapters(fleet(2)).save(tmp_path)
    with pytest.raises(AdapterFileError, match="no shared subspace"):
        SharedSubspace.load(tmp_path)


# -- with a model ----------------------------------------------------------------------------------

hf_peft = pytest.importorskip("peft")


def _by_peft(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(hf_peft.PeftModel.from_pretrained(llama(), path).eval())


@BOTH
def test_exports_act_the_same_in_peft(basis: Any, tmp_path: Path) -> None:
    """Ranks, alphas, rsLoRA, DoRA, patterns, saved modules: compress, save, load, export."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"r": 4, "lora_alpha": 12},
        "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
        "dora": {"r": 2, "lora_alpha": 6, "use_dora": True},
        "pattern": {"r": 4, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 9}},
        "saved": {"r": 2, "modules_to_save": ["lm_head"]},
    }
    for name, options in kinds.items():
        given_as = {"target_modules": ["q_proj", "up_proj"], **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = hf_peft.get_peft_model(
                llama(), hf_peft.LoraConfig(task_type="CAUSAL_LM", **given_as)
            )
            torch.manual_seed(len(name))
            with torch.no_grad():
                for p in theirs.parameters():
                    if p.requires_grad:
                        p.add_(0.1 * torch.randn_like(p))
            theirs.save_pretrained(tmp_path / name)
    made = SharedSubspace.from_adapters([tmp_path / n for n in kinds], basis=basis, error=0.0)
    made.save(tmp_path / "fleet")
    again = SharedSubspace.load(tmp_path / "fleet")
    plain = logits(llama())
    for name in kinds:
        again.reconstruct(name).save(tmp_path / "out" / name)
        wanted, got = _by_peft(tmp_path / name), _by_peft(tmp_path / "out" / name)
        effect = float((wanted - plain).norm())
        assert float((wanted - got).norm()) < 1e-3 * effect


# -- real adapters ---------------------------------------------------------------------------------


def _layers(source: AdapterWeights, count: int = 4) -> AdapterWeights:
    """The first layers of an adapter, to be quick."""
    names = source.modules[:count]
    tensors = {
        m: {n: source.state(m)[n].to(source.dtype) for n in source.state(m).values} for m in names
    }
    from dataclasses import replace

    config = replace(source.config, targets=tuple(names))
    return AdapterWeights.from_tensors(config, tensors, base=source.base)


@BOTH
def test_the_zoo(zoo: Path, basis: Any, tmp_path: Path) -> None:
    sources = {p.name: ls.read_adapter(p) for p in sorted(zoo.iterdir()) if p.is_dir()}
    small = {n: _layers(s) for n, s in sources.items()}
    made = SharedSubspace.from_adapters(small, basis=basis, error=0.05)
    made.quantize(8)
    made.save(tmp_path / "f")
    again = SharedSubspace.load(tmp_path / "f")
    for name, source in small.items():
        low_rank = {
            m: LayerFactors(f.A.float(), (f.B * f.scaling).float()).delta(torch.float64)
            for m, f in source.factors.items()
        }
        assert error(low_rank, held(again, name)) <= 0.052
        out = again.reconstruct(name)
        assert (out.variant.name, out.dtype, out.config) == (
            source.variant.name,
            source.dtype,
            source.config,
        )
        for key in again.rest(name):
            assert torch.equal(again.rest(name)[key], source.extras[key])


# -- budgets with rounding -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("bits", "budget"), [(8, 0.05), (8, 0.002), (4, 0.1), ("nf4", 0.1)])
def test_the_budget_is_kept_after_rounding(basis: Any, bits: Any, budget: float) -> None:
    sources = fleet(8, common=0.5)
    made = SharedSubspace.from_adapters(sources, basis=basis, error=budget, bits=bits)
    for name, source in sources.items():
        true = error(deltas(source), held(made, name))
        assert true <= budget + 2e-6
        assert made.errors[name] == pytest.approx(true, abs=1e-6)
    assert made.budget == budget
    assert made.stats().codecs["basis"] == {8: "int8", 4: "int4"}.get(bits, bits)
    # Not for more bytes than it takes: rounded afterwards, the same budget ends above.
    later = SharedSubspace.from_adapters(sources, basis=basis, error=budget)
    later.quantize(bits)
    assert made.stats().total >= later.stats().total
    assert made.stats().total <= 2 * later.stats().total


@BOTH
def test_bits_that_lose_more_than_the_budget_are_refused(basis: Any) -> None:
    """Eight bits do, which the message says; and they do."""
    sources = fleet(6)
    with pytest.raises(ConfigError, match="alone loses more") as caught:
        SharedSubspace.from_adapters(sources, basis=basis, error=0.002, bits=4)
    assert caught.value.key == "bits"
    assert "bits=8" in str(caught.value)
    made = SharedSubspace.from_adapters(sources, basis=basis, error=0.002, bits=8)
    for name, source in sources.items():
        assert error(deltas(source), held(made, name)) <= 0.002 + 2e-6
    with pytest.raises(ConfigError, match="no room"):
        SharedSubspace.from_adapters(sources, basis=basis, error=0.0, bits=16)
    with pytest.raises(ConfigError, match="way of quantising"):
        SharedSubspace.from_adapters(sources, basis=basis, bits=3)


@pytest.mark.parametrize("again", [True, False])
@BOTH
def test_a_stream_keeps_the_budget_after_rounding(basis: Any, again: bool) -> None:
    sources = fleet(7)
    given_as: Any = list(sources.values()) if again else iter(sources.values())
    made = SharedSubspace.from_stream(
        given_as, list(sources), basis=basis, error=0.1, bits=8, block=3
    )
    assert made.stats().codecs["codes"] == "int8"
    for name, source in sources.items():
        true = error(deltas(source), held(made, name))
        assert true <= 0.1 + 2e-6
        assert true <= made.errors[name] + 2e-6


@BOTH
def test_bits_go_with_other_targets(basis: Any) -> None:
    sources = fleet(6)
    with pytest.warns(BudgetWarning, match="lose more than"):
        made = SharedSubspace.from_adapters(sources, basis=basis, components=2, bits=8)
    for name, source in sources.items():
        assert made.errors[name] == pytest.approx(error(deltas(source), held(made, name)), abs=1e-6)


def test_a_basis_that_cannot_keep_the_budget_says_so() -> None:
    """Not for the bits: diagonal cores hold what they hold."""
    with pytest.warns(BudgetWarning, match="lose more than"):
        SharedSubspace.from_adapters(fleet(4), core="diagonal", error=0.01, bits=8)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.045), ("nf4", 0.036), (8, 3e-4)])
def test_rounding_loses_as_little_as_of_normal_numbers(bits: Any, most: float) -> None:
    """However unequal the directions of a basis are: here the first hold nearly all."""
    torch.manual_seed(0)
    sizes = torch.logspace(0, -3, 24)
    made = {}
    for i in range(8):
        A, B = torch.randn(8, 24) * sizes, torch.randn(24, 8) * sizes[:, None]
        config = ls.LoRAConfig(r=8, alpha=8.0, targets=("m.0.q",))
        made[f"{i}"] = AdapterWeights.from_tensors(config, {"m.0.q": {"A": A, "B": B}})
    whole = SharedSubspace.from_adapters(made, error=0.0)
    whole.quantize(bits)
    gone = [error(deltas(a), held(whole, n)) for n, a in made.items()]
    assert sum(gone) / len(gone) < most
    # And of a basis of many directions that all are used.
    assert whole.validate() == []


@BOTH
def test_nothing_lost_is_nothing_to_warn_of(basis: Any) -> None:
    """At sizes where ‖ΔW‖² − ‖C‖² rounds to more than nothing."""
    sources = fleet(9, common=0.3)
    for once in (False, True):
        given_as: Any = iter(sources.values()) if once else sources
        made = SharedSubspace.from_stream(
            given_as, list(sources) if once else None, basis=basis, error=0.0, block=2
        )
        assert max(made.errors.values()) <= 1e-6
    assert max(SharedSubspace.from_adapters(sources, basis=basis, error=0.0).errors.values()) < 1e-6


# -- adapters that do nothing ----------------------------------------------------------------------


def _still(seed: int, modules: Sequence[str] = tuple(SIZES)) -> AdapterWeights:
    """An adapter with B = 0 on some layers."""
    source = adapter(seed)
    tensors = {}
    for m in source.modules:
        B = source.state(m)["B"]
        tensors[m] = {"A": source.state(m)["A"], "B": 0 * B if m in modules else B}
    return AdapterWeights.from_tensors(source.config, tensors, like=source)


STILL: dict[str, dict[str, AdapterWeights]] = {
    "all": {"a": _still(0), "b": _still(1)},
    "one": {"a": _still(0), "b": adapter(1)},
    "layer": {"a": _still(0, ["m.0.v"]), "b": _still(1, ["m.0.v"])},
}


@BOTH
@pytest.mark.parametrize("which", STILL)
@pytest.mark.parametrize("how", ["at once", "diagonal", "stream", "generator"])
def test_adapters_that_do_nothing(basis: Any, which: str, how: str, tmp_path: Path) -> None:
    """Freshly initialised: the rows of the basis and of the codes were none."""
    if how == "diagonal" and basis == "share":
        pytest.skip("the Share basis has loadings")
    sources = STILL[which]
    with warnings.catch_warnings():
        if how == "diagonal":
            warnings.simplefilter("ignore", BudgetWarning)
        if how in ("at once", "diagonal"):
            core: Any = "diagonal" if how == "diagonal" else "full"
            made = SharedSubspace.from_adapters(sources, basis=basis, core=core)
        else:
            given_as: Any = sources if how == "stream" else iter(sources.values())
            ids = None if how == "stream" else list(sources)
            made = SharedSubspace.from_stream(given_as, ids, basis=basis, block=1)
        for new, call in (("c", made.add), ("d", lambda a, n: made.absorb({n: a}))):
            call(_still(5), f"{new}0")
            call(_still(6, ["m.1.q"]), f"{new}1")
            call(adapter(7), f"{new}2")
    made.quantize(8)
    assert made.validate() == []
    made.save(tmp_path / "f")
    made = SharedSubspace.load(tmp_path / "f")
    for name in ("a", "c0", "d0"):
        if which == "layer" and name == "a":
            continue
        assert made.errors[name] == 0
        assert not any(bool(W.any()) for W in held(made, name).values())
        for rank in ("original", "exact", 1):
            again = made.reconstruct(name, rank)  # type: ignore[arg-type]
            assert not any(bool(W.any()) for W in deltas(again).values())
    for name in ("c1", "d1"):
        original = _still(6, ["m.1.q"])
        assert float(held(made, name)["m.1.q"].abs().max()) < 1e-6
        assert error(deltas(original), held(made, name)) < 0.06
    assert made.measure(_still(5), "c0").error == 0
    for name in made.ids:
        made.remove(name)
    assert made.validate() == []


# -- residuals -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("budget", [0.3, 0.05, 1e-3, 0.0])
def test_core_and_residual_take_no_more_than_the_factors(basis: Any, budget: float) -> None:
    """A residual of rank 5 beside the core, of an adapter of rank 4."""
    made = SharedSubspace.from_adapters(fleet(3), basis=basis, error=0.05)
    new = adapter(51, r=4)
    record = made.add(new, "new", error=budget)
    assert error(deltas(new), held(made, "new")) <= budget + 1e-6
    assert max(record.residual_rank.values(), default=0) <= 4
    for module, (d_in, d_out) in SIZES.items():
        code = made.code("new", module)
        k = len(code.residual_up)
        taken = k * (d_in + d_out) + (code.left.numel() + code.right.numel()) * (basis == "joint")
        assert taken <= 4 * (d_in + d_out) or not k
    assert made.validate() == []


@BOTH
def test_what_the_basis_holds_is_still_used(basis: Any) -> None:
    """A member plus something of rank 1: the core and one direction, not the factors."""
    sources = fleet(3)
    made = SharedSubspace.from_adapters(sources, basis=basis, error=0.0)
    old = sources["task-1"]
    tensors = {}
    torch.manual_seed(3)
    for m in old.modules:
        A, B = old.state(m)["A"], old.state(m)["B"] * old.config.scaling_of(m)  # type: ignore[attr-defined]
        size = float((B @ A).norm())
        a, b = torch.randn(1, A.shape[1]), torch.randn(B.shape[0], 1)
        b = b * (0.5 * size / float(a.norm() * b.norm()))
        tensors[m] = {"A": torch.cat((A, a)), "B": torch.cat((B, b), 1)}
    r = len(tensors["m.0.q"]["A"])
    config = ls.LoRAConfig(r=r, alpha=float(r), targets=tuple(tensors))
    new = AdapterWeights.from_tensors(config, tensors, base=old.base)
    record = made.add(new, "new", error=0.01)
    # Of the wide layers; elsewhere a core takes as much as factors.
    assert record.residual_rank["m.0.q"] == 1 or basis == "share"
    assert bool(made.core("new", "m.0.q").any()) or basis == "share"
    assert error(deltas(new), held(made, "new")) <= 0.01 + 1e-6


@BOTH
@pytest.mark.parametrize(("bits", "budget"), [(4, 0.1), (4, 0.01), (8, 0.05), (8, 1e-5)])
def test_a_residual_keeps_the_budget_after_rounding(basis: Any, bits: Any, budget: float) -> None:
    """int4 loses some percent itself: then more of it is kept, or in more bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        made = SharedSubspace.from_adapters(fleet(4), basis=basis, error=0.2)
        made.quantize(bits)
    before = {n: held(made, n) for n in made.ids}
    new = adapter(52, r=3)
    record = made.add(new, "new", error=budget)
    assert record.within
    assert error(deltas(new), held(made, "new")) <= budget + 2e-6
    for name, old in before.items():
        assert all(torch.equal(old[m], W) for m, W in held(made, name).items())
    assert made.validate() == []


def test_residuals_that_are_stored_stay_as_they_are() -> None:
    made = SharedSubspace.from_adapters(fleet(4), error=0.2)
    made.quantize(8, residuals=4)
    made.add(adapter(53, r=3), "first", error=0.3)
    assert made.stats().codecs["residuals"] == "int4"
    before = held(made, "first")
    with pytest.warns(BudgetWarning, match="residuals=16"):
        record = made.add(adapter(54, r=3), "second", error=1e-3)
    assert not record.within
    assert made.errors["second"] == pytest.approx(
        error(deltas(adapter(54, r=3)), held(made, "second")), abs=1e-6
    )
    assert all(torch.equal(before[m], W) for m, W in held(made, "first").items())


# -- diagonal cores among others -------------------------------------------------------------------


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_trained_diagonal_is_stored_as_one(core: Any, tmp_path: Path) -> None:
    sources = {f"{i}": adapter(i, r=3) for i in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        made = SharedSubspace.from_adapters(sources, core=core, error=0.3)
    before = {n: held(made, n) for n in made.ids}
    torch.manual_seed(0)
    cores: dict[str, Any] = {}
    for m in made.modules:
        up, down = made.up(m).shape[1], made.down(m).shape[0]
        cores[m] = torch.eye(up, down) * torch.randn(down)
    made.insert_core("diagonal", cores, MemberRecord.of(adapter(0)))
    full = {m: torch.randn(made.up(m).shape[1], made.down(m).shape[0]) for m in made.modules}
    stored = made.stats().per_adapter["diagonal"]
    assert stored <= 4 * sum(len(made.down(m)) for m in made.modules)
    made.insert_core("full", full, MemberRecord.of(adapter(0)))
    made.add(adapter(9), "added", error=0.05)
    for m in made.modules:
        made.extend(m, torch.randn(SIZES[m][1], 3), torch.randn(2, SIZES[m][0]))
    assert made.validate() == []
    made.save(tmp_path / "f")
    made = SharedSubspace.load(tmp_path / "f")
    for m, C in cores.items():
        up, down = C.shape
        for name, wanted in (("diagonal", C), ("full", full[m])):
            got = made.core(name, m)
            assert torch.equal(got[:up, :down], wanted)
            assert not got[up:].any()
            assert not got[:, down:].any()
    for name, old in before.items():
        for m, W in held(made, name).items():
            torch.testing.assert_close(W, old[m], rtol=0, atol=1e-5)
    assert error(deltas(adapter(9)), held(made, "added")) <= 0.05 + 1e-6


def test_diagonal_cores_with_layers_that_only_some_have() -> None:
    sources = {
        "all": adapter(0, r=3),
        "q": adapter(1, r=2, modules=["m.0.q", "m.1.q"]),
        "more": adapter(2, r=3),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        made = SharedSubspace.from_adapters(sources, core="diagonal", error=0.2)
        made.add(adapter(3, modules=["m.0.v"]), "v", error=0.1)
    assert made.validate() == []
    for name, source in sources.items():
        assert made.errors[name] == pytest.approx(error(deltas(source), held(made, name)), abs=1e-5)
