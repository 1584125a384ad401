"""Fleets at URLs and on the hub: what is read is what was written, and nothing is written there.

``memory://`` stands for every protocol of fsspec; the hub is its own cache on disk, offline.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import AdapterFileError
from lorasmith.fleet import diff, open_members, store
from lorasmith.io.weights import AdapterWeights
from tests.io.support import llama, logits, saved

CONFIGS = {
    "one": ls.LoRAConfig(r=2, alpha=6),
    "two": ls.LoRAConfig(r=3, scaling="rslora"),
    "dora": ls.DoRAConfig(r=2),
}


def _dense(weights: AdapterWeights) -> Tensor:
    """All ΔW of the factors, float64, from the stored tensors."""
    parts = []
    for module in weights.modules:
        state = weights.state(module)
        scaling = weights.config.scaling_of(module)  # type: ignore[attr-defined]
        parts.append((scaling * state["B"].double() @ state["A"].double()).flatten())
    return torch.cat(parts)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for name, config in CONFIGS.items():
        saved(tmp_path / "adapters" / name, config)
    return tmp_path / "adapters"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a directory into the hub's cache, as ``owner/name``."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, repository: str) -> str:
        place = cache / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0123abcd")
        shutil.copytree(folder, place / "snapshots" / "0123abcd")
        return repository

    return put


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_every_operation_reads_urls(memory: Any, adapters: Path, protocol: str) -> None:
    memory.put(str(adapters), "/team", recursive=True)
    at = "memory://team" if protocol == "memory" else f"file://{adapters}"
    from_disk = ls.similarity(adapters)
    assert torch.equal(torch.tensor(ls.similarity(at).cosine), torch.tensor(from_disk.cosine))
    for basis in ("joint", "share"):
        held = ls.SharedSubspace.from_adapters(at, basis=basis, error=0.0)  # type: ignore[arg-type]
        for name in CONFIGS:
            want = _dense(ls.read_adapter(adapters / name))
            got = _dense(held.reconstruct(name))
            assert float((got - want).norm()) <= 1e-4 * float(want.norm())
    pair = [f"{at}/one", f"{at}/two"]
    want = (
        _dense(ls.read_adapter(adapters / "one")) + _dense(ls.read_adapter(adapters / "two"))
    ) / 2
    got = _dense(ls.merge(pair).weights)
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
    assert diff(*pair).a == "one"


def test_a_compressed_fleet_at_a_url(memory: Any, adapters: Path, tmp_path: Path) -> None:
    made = ls.SharedSubspace.from_adapters(adapters, error=0.0)
    made.save(tmp_path / "fleet")
    memory.put(str(tmp_path / "fleet"), "/fleets/a", recursive=True)
    assert store.is_subspace("memory://fleets/a")
    assert not store.is_subspace("memory://fleets")
    assert store.validate("memory://fleets/a") == []
    again = ls.SharedSubspace.load("memory://fleets/a")
    assert again.ids == made.ids
    for name in CONFIGS:
        there, here = again.reconstruct(name), made.reconstruct(name)
        assert all(torch.equal(there.tensors[k], here.tensors[k]) for k in here.tensors)
    served = ls.MultiTaskModel(llama(), "memory://fleets/a")
    assert set(served.tasks) == set(CONFIGS)
    # Another generation under the same URL is read anew; a file of the old one is found out.
    made.remove("two")
    made.save(tmp_path / "fleet")
    memory.put(str(tmp_path / "fleet/subspace.json"), "/fleets/a/subspace.json")
    with pytest.raises(AdapterFileError, match="not the one that its manifest names"):
        ls.SharedSubspace.load("memory://fleets/a")
    memory.put(str(tmp_path / "fleet") + "/", "/fleets/a/", recursive=True)
    assert "two" not in ls.SharedSubspace.load("memory://fleets/a").ids
    with pytest.raises(AdapterFileError, match="no shared subspace"):
        ls.SharedSubspace.load("memory://fleets/none")


def test_a_fleet_and_adapters_of_the_hub(hub: Any, adapters: Path, tmp_path: Path) -> None:
    made = ls.SharedSubspace.from_adapters(adapters, error=0.0)
    made.save(tmp_path / "fleet")
    hub(tmp_path / "fleet", "team/fleet")
    hub(adapters / "one", "team/one")
    for name in ("team/fleet", "hf://team/fleet", "hf://team/fleet@main"):
        assert ls.SharedSubspace.load(name).ids == made.ids
    assert [m.id for m in open_members(["team/one", adapters / "two"])] == ["one", "two"]
    with pytest.raises(AdapterFileError, match="no shared subspace"):
        ls.SharedSubspace.load("team/one")
    with pytest.raises(AdapterFileError, match="neither a directory nor an adapter"):
        ls.SharedSubspace.load("team/nothing")


@pytest.mark.parametrize("url", ["memory://b/x", "s3://b/x", Path("s3://b/x"), "hf://a/b"])
def test_nothing_is_written_where_it_would_not_be_found(
    url: Any, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL was taken for a path, and a directory "s3:" was made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = ls.SharedSubspace.from_adapters(adapters, error=0.0)
    merged = ls.merge([adapters / "one", adapters / "two"])
    for save in (made.save, made.reconstruct("one").save, merged.save):
        with pytest.raises(AdapterFileError, match="That is a URL") as caught:
            save(url)
        assert "copy it there" in str(caught.value.fix)
    assert not any(Path().iterdir())
    # A directory of such a name is one like any other.
    (tmp_path / "here" / "s3:").mkdir()
    made.save(Path("s3:/x"))
    assert store.is_subspace(Path("s3:/x"))


def test_a_fleet_of_a_url_acts_the_same(memory: Any, adapters: Path, tmp_path: Path) -> None:
    """Logits, through a directory, a URL, and back to a directory."""
    made = ls.SharedSubspace.from_adapters(adapters, error=0.0)
    made.save(tmp_path / "fleet")
    memory.put(str(tmp_path / "fleet"), "/fleet", recursive=True)
    plain = logits(llama())
    for name in CONFIGS:
        ls.SharedSubspace.load("memory://fleet").reconstruct(name).save(tmp_path / "out" / name)
        ran = []
        for path in (adapters / name, tmp_path / "out" / name):
            model = llama()
            ls.load(model, path)
            ran.append(logits(model))
        assert float((ran[0] - ran[1]).norm()) < 1e-3 * float((ran[0] - plain).norm())
