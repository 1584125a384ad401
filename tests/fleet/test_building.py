"""How a shared subspace is built: threads, reading, and the gauge of the Share basis."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import AdapterFileError
from lorasmith.fleet import parallel, store
from lorasmith.fleet.building import GAUGES
from lorasmith.fleet.subspace import BudgetWarning, SharedSubspace
from lorasmith.io.tensors import FileTensors
from lorasmith.io.weights import AdapterWeights, BaseModel

NAMES = [f"layers.{i}.q" for i in range(6)]
D_IN, D_OUT, R = 40, 30, 4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # the number of components is given
        yield


def _adapter(factors: dict[str, tuple[Tensor, Tensor]]) -> AdapterWeights:
    r = next(iter(factors.values()))[0].shape[0]
    config = ls.LoRAConfig(r=r, alpha=2.0 * r, targets=tuple(factors))
    tensors = {m: {"A": A, "B": B} for m, (A, B) in factors.items()}
    return AdapterWeights.from_tensors(config, tensors, base=BaseModel("a-base"))


def _fleet(count: int, *, gauged: bool, components: int = 2) -> dict[str, AdapterWeights]:
    """A_i = mean + Σ l_k a_k and B_i likewise, with loadings of their own; or in random gauges.

    Brought to one size they have one component more than that: the mean's share differs.
    """
    made = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    common = {m: (draw(components + 1, R, D_IN), draw(components + 1, D_OUT, R)) for m in NAMES}
    found = {}
    for n in range(count):
        factors = {}
        for m, (rows, columns) in common.items():
            left, right = draw(components + 1), draw(components + 1)
            left[0] = right[0] = 1
            A, B = torch.einsum("k,krd->rd", right, rows), torch.einsum("k,kdr->dr", left, columns)
            if gauged:
                T = draw(R, R) + 3 * torch.eye(R)
                A, B = T @ A, B @ torch.linalg.inv(T)
            factors[m] = A, B
        found[f"task-{n}"] = _adapter(factors)
    return found


def _errors(made: SharedSubspace) -> float:
    return sum(made.errors.values()) / len(made)


# -- the gauge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauged", [False, True])
@pytest.mark.parametrize("target", [{"components": 3}, {"error": 0.1}, {"variance": 0.9}])
def test_the_gauge_that_is_chosen_is_the_best(gauged: bool, target: dict[str, Any]) -> None:
    """In common factors aligning does harm, in random gauges it is what helps."""
    sources = _fleet(9, gauged=gauged)
    whole = {
        g: SharedSubspace.from_adapters(sources, basis="share", gauge=g, **target)
        for g in (*GAUGES, "auto")
    }
    chosen = whole["auto"]
    assert chosen.gauge in GAUGES
    if "components" in target:
        assert _errors(chosen) == min(map(_errors, whole.values()))
    else:
        assert chosen.stats().total == min(w.stats().total for w in whole.values())
    if not gauged:
        assert chosen.gauge == "stored"
    if not gauged and "components" in target:
        assert _errors(chosen) < 1e-5
        assert _errors(whole["aligned"]) > 1e-3


def test_the_gauge_is_kept(tmp_path: Path) -> None:
    """By files, and by adapters that come later: they are in the span as they are stored."""
    sources = _fleet(9, gauged=False)
    names = list(sources)
    made = SharedSubspace.from_adapters(
        {n: sources[n] for n in names[:6]}, basis="share", components=3
    )
    made.save(tmp_path / "f")
    made = SharedSubspace.load(tmp_path / "f")
    assert made.gauge == "stored"
    assert made.project(sources[names[6]]).error < 1e-5
    assert made.add(sources[names[7]], names[7]).error < 1e-5
    made.absorb({names[8]: sources[names[8]]}, components=3)
    assert max(made.errors.values()) < 1e-5
    stream = SharedSubspace.from_stream(sources, basis="share", components=3, block=6)
    assert stream.gauge == "stored"
    assert max(stream.errors.values()) < 1e-5
    assert SharedSubspace.from_adapters(sources, components=3).gauge is None


def test_fleets_that_were_saved_without_a_gauge_are_aligned(tmp_path: Path) -> None:
    sources = _fleet(6, gauged=True)
    made = SharedSubspace.from_adapters(sources, basis="share", components=5, gauge="aligned")
    made.save(tmp_path / "f")
    file = tmp_path / "f" / store.MANIFEST
    manifest = json.loads(file.read_text())
    assert manifest.pop("gauge") == "aligned"
    file.write_text(json.dumps(manifest))
    again = SharedSubspace.load(tmp_path / "f")
    assert again.gauge is None
    for source in sources.values():
        assert again.project(source).error == pytest.approx(made.project(source).error, abs=1e-6)
        assert again.project(source).error < 0.02
    manifest["gauge"] = "another"
    file.write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match="gauge"):
        SharedSubspace.load(tmp_path / "f")


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def two() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two")
def test_each_thread_works_alone() -> None:
    def run(number: int) -> tuple[int, int, bool]:
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    told: list[int] = []
    assert parallel.each(run, range(9), tell=told.append) == [(n, 1, False) for n in range(9)]
    assert told == list(range(1, 10))
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()

    def broken(number: int) -> None:
        if number == 3:
            raise ValueError(number)

    with pytest.raises(ValueError, match="3"):
        parallel.each(broken, range(9))
    assert torch.get_num_threads() == 2
    with parallel.single() as before:
        assert (before, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("options", [{}, {"sweeps": 1}, {"basis": "share"}])
def test_threads_do_not_change_the_result(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does where factors come from."""
    sources = _fleet(8, gauged=True)
    paths = {n: s.save(tmp_path / n) for n, s in sources.items()}
    monkeypatch.setattr("lorasmith.fleet.stacks._STACK", 1)
    torch.set_num_threads(1)
    one = SharedSubspace.from_adapters(sources, error=0.05, **options)
    for given in (sources, paths):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            other = SharedSubspace.from_adapters(given, error=0.05, **options)
            assert torch.get_num_threads() == threads
            assert other.stats().ranks == one.stats().ranks
            for name in sources:
                assert other.errors[name] == pytest.approx(one.errors[name], rel=1e-3, abs=1e-6)


# -- reading ---------------------------------------------------------------------------------------


def test_a_view_of_a_file_is_what_is_in_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(6).view(1, 2, 3),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(2.5, dtype=torch.float64),
        "f": torch.ones(3, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "t")
    source = FileTensors(tmp_path / "t")
    for key, value in tensors.items():
        view = source.view(key)
        assert view.dtype == value.dtype
        assert torch.equal(view, value)
    first = source.view("a")
    other = FileTensors(tmp_path / "t")
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "u")
    (tmp_path / "u").replace(tmp_path / "t")
    assert torch.equal(first, tensors["a"])
    # Not mapped yet: another file has the path by now, and what was opened is read.
    assert torch.equal(other.view("a"), tensors["a"])


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    sources = _fleet(4, gauged=True)
    paths = {n: s.save(tmp_path / n) for n, s in sources.items()}
    from safetensors.torch import load_file, save_file

    file = paths["task-2"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "layers.3" in k)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file)
    for extra in (paths["task-2"] / "lorasmith.json",):
        extra.unlink(missing_ok=True)
    for basis in ("joint", "share"):
        with pytest.raises(AdapterFileError, match="not finite") as caught:
            SharedSubspace.from_adapters(paths, basis=basis)  # type: ignore[arg-type]
        assert "layers.3" in str(caught.value)
