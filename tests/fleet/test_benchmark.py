"""The benchmark of a fleet: bytes against files on disk, errors against dense matrices."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import ConfigError
from lorasmith.fleet import store
from lorasmith.fleet.benchmark import Plain, Setting, benchmark
from lorasmith.fleet.subspace import BudgetWarning, SharedSubspace
from lorasmith.io.weights import AdapterWeights
from tests.fleet.fleets import SIZES, adapter, dense
from tests.io.support import saved

BITS: dict[str, int | str] = {"float32": 32, "int8": 8, "int4": 4, "nf4": "nf4"}


def fleet() -> dict[str, AdapterWeights]:
    """Mixed ranks, scalings, dtypes and layers."""
    return {
        f"task-{i}": adapter(
            1 + i % 3,
            seed=i,
            alpha=2.0 + i,
            rslora=bool(i % 2),
            dtype=torch.bfloat16 if i == 2 else torch.float32,
            modules=tuple(SIZES)[: 3 - i % 2],
        )
        for i in range(5)
    }


def relative(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).square().sum() / wanted.square().sum())


def compressed(sources: Any, one: Setting) -> SharedSubspace:
    made = SharedSubspace.from_adapters(sources, basis=one.basis, error=one.budget)
    if one.codec != "float32":
        made.quantize(BITS[one.codec])
    return made


def on_disk(folder: Path) -> dict[str, int]:
    """Bytes of the tensors in the files of a compressed fleet, by what they are."""
    found = dict.fromkeys(("basis", "codes", "residuals", "rest"), 0)
    for file in folder.glob("*.safetensors"):
        for name, value in load_file(file).items():
            size = value.numel() * value.element_size()
            if file.name == store.REST:
                found["rest"] += size
            elif file.name == store.BASIS:
                found["basis"] += size
            elif ".residual_" in name:
                found["residuals"] += size
            elif "." in name:
                found["codes"] += size
    return found


def test_bytes_are_those_of_the_tensors_on_disk(tmp_path: Path) -> None:
    """With DoRA, whose magnitudes are carried, and adapters from files."""
    for name, config in (
        ("one", ls.LoRAConfig(r=2)),
        ("two", ls.DoRAConfig(r=3)),
        ("three", ls.LoRAConfig(r=4)),
    ):
        saved(tmp_path / "adapters" / name, config)
    sources = tmp_path / "adapters"
    found = benchmark(sources, errors=(0.02, 0.2))
    stored = 0
    for file in sources.glob("*/*.safetensors"):
        stored += sum(t.numel() * t.element_size() for t in load_file(file).values())
    assert found.stored == stored
    assert found.ids == ("one", "three", "two")
    assert len(found.settings) == 2 * 2 * 4
    for number, one in enumerate(found.settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            folder = compressed(sources, one).save(tmp_path / str(number))
        wanted = on_disk(folder)
        assert wanted["rest"] > 0
        assert wanted == {name: getattr(one.bytes, name) for name in wanted}
        assert one.bytes.rest == found.stored_rest
        assert one.total == sum(wanted.values()) + one.bytes.index
        assert one.ratio == pytest.approx(stored / one.total)


def test_errors_are_those_of_dense_matrices() -> None:
    sources = fleet()
    found = benchmark(sources, errors=(0.01, 0.1))
    settings = [(s.basis, s.budget, s.codec) for s in found.settings]
    assert settings == [
        (basis, budget, codec)
        for basis in ("joint", "share")
        for budget in (0.01, 0.1)
        for codec in ("float32", "int8", "int4", "nf4")
    ]
    for one in found.settings:
        made = compressed(sources, one)
        wanted = {
            name: relative(
                dense(made.reconstruct(name, "exact", dtype=torch.float32)), dense(source)
            )
            for name, source in sources.items()
        }
        assert one.errors == pytest.approx(wanted, rel=1e-3, abs=1e-10)
        assert one.mean == pytest.approx(math.fsum(wanted.values()) / 5, rel=1e-3, abs=1e-10)
        assert one.worst == pytest.approx(max(wanted.values()), rel=1e-3, abs=1e-10)
        if one.codec == "float32":
            assert one.within
            assert one.worst <= one.budget * 1.001


def test_errors_are_measured_and_no_bounds() -> None:
    """Bounds add up the lengths of what is lost and of what is rounded."""
    sources = fleet()
    (one,) = benchmark(sources, errors=(0.1,), bases=("joint",), codecs=(4,)).settings
    bound = compressed(sources, one).errors
    assert all(one.errors[name] < 0.99 * bound[name] for name in sources)


def by_hand(rows: Tensor, codec: str) -> tuple[Tensor, int]:
    """A matrix after rounding, one row at a time, and its bytes; the tiny rows are one block."""
    most, size = (127, 1.0) if codec == "int8" else (7, 0.5)
    made, total = [], 0
    for row in rows.double():
        best: Tensor | None = None
        for clip in (1.0,) if codec == "int8" else (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
            peak = float(row.abs().max())
            scale = float(torch.tensor(clip * peak / most).bfloat16())
            if scale < clip * peak / most * (1 - 1e-7):  # the next one up, of eight bits
                scale += 2.0 ** (math.floor(math.log2(scale)) - 7)
            tried = (row / scale).round().clamp(-most, most) * scale
            if best is None or (tried - row).square().sum() < (best - row).square().sum():
                best = tried
        assert best is not None
        made.append(best)
        total += math.ceil(size * len(row)) + 2
    return torch.stack(made), total


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_plain_factors(codec: str) -> None:
    sources = fleet()
    found = benchmark(sources, errors=(0.1,), bases=("joint",), codecs=("none",))
    assert [p.codec for p in found.plain] == ["int8", "int4"]
    (one,) = (p for p in found.plain if p.codec == codec)
    total = 0
    for name, source in sources.items():
        parts = []
        for module, (d_in, d_out) in SIZES.items():
            if module not in source.modules:
                parts.append(torch.zeros(d_in * d_out, dtype=torch.float64))
                continue
            factors = source.factors[module]
            A, used_A = by_hand(factors.A.float(), codec)
            B, used_B = by_hand((factors.scaling * factors.B.float()).T, codec)
            total += used_A + used_B
            parts.append((B.T @ A).flatten())
        wanted = relative(torch.cat(parts), dense(source))
        assert one.errors[name] == pytest.approx(wanted, rel=1e-2)
    assert (one.factors, one.rest, one.total) == (total, 0, total)
    assert one.ratio == pytest.approx(found.stored / total)


def test_best_is_the_smallest_that_is_good_enough() -> None:
    found = benchmark(fleet(), errors=(0.01, 0.1))
    every: list[Setting | Plain] = [*found.settings, *found.plain]
    for limit in (1e-3, 0.02, 0.3):
        good = [one for one in every if max(one.errors.values()) <= limit]
        best = found.best(limit)
        assert best is not None
        assert best.total == min(one.total for one in good)
        assert best in good
    assert benchmark(fleet(), errors=(0.1,), codecs=(4,), plain=(4,)).best(1e-4) is None


def test_seconds_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter is left out each round; the one that is absorbed was not in the basis."""
    left: list[tuple[tuple[str, ...], str]] = []
    absorb = SharedSubspace.absorb

    def watched(
        self: SharedSubspace, sources: Mapping[str, Any], *args: Any, **options: Any
    ) -> Any:
        left.append((self.ids, *sources))
        return absorb(self, sources, *args, **options)

    monkeypatch.setattr(SharedSubspace, "absorb", watched)
    calls: list[tuple[str, int, int]] = []
    found = benchmark(
        fleet(),
        errors=(0.05,),
        bases=("share",),
        codecs=("none", 8),
        rounds=3,
        progress=lambda *call: calls.append(call),
    )
    names = [f"task-{i}" for i in range(5)]
    assert left == [
        (tuple(n for n in names if n != out), out)
        for out in ("task-4", "task-3", "task-2")
        for _ in range(2)
    ]
    total = 2 + 3 * (2 + 2)
    assert calls == [("settings", n, total) for n in range(1, total + 1)]
    for one in found.settings:
        took = one.seconds
        assert took.absorb is not None
        assert min(took.build, took.absorb, took.reconstruct) > 0
        assert (took.quantize > 0) is (one.codec != "float32")


def test_one_adapter_alone() -> None:
    found = benchmark(adapter(), errors=(0.05,))
    assert all(one.seconds.absorb is None for one in found.settings)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["adapters"] == 1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"errors": ()}, "errors"),
        ({"errors": (1.5,)}, "errors"),
        ({"bases": ("vera",)}, "bases"),
        ({"codecs": ()}, "codecs"),
        ({"codecs": (3,)}, "bits"),
        ({"plain": ("int3",)}, "bits"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": True}, "rounds"),
    ],
)
def test_mistakes(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        benchmark(fleet(), **options)
    assert caught.value.key == key


def test_the_figure_shows_every_setting(tmp_path: Path) -> None:
    plots = pytest.importorskip("lorasmith.fleet.plots")
    pytest.importorskip("matplotlib")
    found = benchmark(fleet(), errors=(0.0, 0.1))  # the first one: errors of nearly nothing
    figure = plots.frontier(found)
    (axes,) = figure.axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert len(drawn) == 2 * 4 + 2 + 1
    points = {
        (float(x), float(y))
        for label, line in drawn.items()
        if label != "as stored"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert points == {(float(s.total), max(s.mean, 1e-8)) for s in (*found.settings, *found.plain)}
    assert list(drawn["as stored"].get_xdata()) == [found.stored] * 2
    assert plots.save(figure, tmp_path / "frontier.svg").stat().st_size > 1000


def test_the_zoo(zoo: Path) -> None:
    names = ["dates-en-s0", "dates-en-s1", "e2e-dora", "numbers-en-rslora-r16"]
    sources = [zoo / name for name in names]
    found = benchmark(sources, errors=(0.05,), bases=("joint",), codecs=("none", 8))
    assert found.ids == tuple(names)
    stored = 0
    for source in sources:
        with safe_open(source / "adapter_model.safetensors", framework="pt") as file:
            stored += sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118
    assert found.stored == stored
    full, rounded = found.settings
    assert full.within
    assert rounded.total < full.total / 2
    assert rounded.worst < 0.055
    one = ls.read_adapter(sources[0])
    made = compressed(sources, rounded).reconstruct(names[0], "exact", dtype=torch.float32)
    gone = whole = 0.0
    for module in one.factors:
        wanted, got = (w.factors[module].delta(torch.float64) for w in (one, made))
        gone += float((wanted - got).square().sum())
        whole += float(wanted.square().sum())
    assert rounded.errors[names[0]] == pytest.approx(gone / whole, rel=1e-3)
