"""Copies of what is at URLs: they go when nothing can read from them any more.

``memory://`` stands for every protocol of fsspec. A fleet of thousands left as many copies in
the temporary directory until the process ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.fleet import coverage, diff, open_members, store
from lorasmith.io import hub
from tests.io.support import saved


@pytest.fixture
def copies(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Three adapters at memory://team; gives the number of copies there are."""
    for name, r in (("one", 2), ("two", 3), ("three", 2)):
        saved(tmp_path / "team" / name, ls.LoRAConfig(r=r))
    memory.put(str(tmp_path / "team"), "/team", recursive=True)
    monkeypatch.setattr(hub._Copies, "_root", tmp_path / "copies")
    monkeypatch.setattr(hub._Copies, "_owner", os.getpid())
    (tmp_path / "copies").mkdir()
    return lambda: len(list((tmp_path / "copies").iterdir()))


URLS = ["memory://team/one", "memory://team/two"]


def test_no_copy_is_left_when_it_is_done(copies: Any, tmp_path: Path) -> None:
    for basis in ("joint", "share"):
        held = ls.SharedSubspace.from_adapters("memory://team", basis=basis, error=0.0)  # type: ignore[arg-type]
        assert copies() == 0
        held = ls.SharedSubspace.from_stream(URLS, basis=basis, error=0.0, block=1)  # type: ignore[arg-type]
        assert copies() == 0
        held.add("memory://team/three")
        held.remove("three")
        held.absorb(["memory://team/three"])
        held.project("memory://team/one", budget=1.0)
        held.measure("memory://team/three", "three")
        coverage("memory://team/one", held)
        held.reconstruct("three").save(tmp_path / basis)
        assert copies() == 0
    ls.similarity("memory://team")
    ls.merge(URLS, "ties")
    diff(*URLS)
    assert copies() == 0


def test_a_stream_has_one_block_on_disk(copies: Any) -> None:
    most = []
    ls.SharedSubspace.from_stream(
        iter(URLS * 3),
        [str(n) for n in range(6)],
        error=0.0,
        block=1,
        progress=lambda *_: most.append(copies()),
    )
    assert max(most) <= 3  # the block, the one that comes, and the first one with each layer
    assert copies() == 0


def test_a_copy_stays_as_long_as_somebody_can_read_from_it(copies: Any) -> None:
    members = open_members(URLS)
    assert copies() == 2
    weights = members[0].weights
    del members
    assert copies() == 1
    module = weights.modules[0]
    before = weights.state(module)["A"].clone()
    factors = weights.factors
    del weights
    assert copies() == 1
    assert torch.equal(factors[module].A, before)
    del factors
    assert copies() == 0


def test_a_copy_of_somebody_elses_is_left_alone(copies: Any) -> None:
    mine = ls.read_adapter(URLS[0])
    ls.similarity(URLS)
    again = open_members(URLS)
    assert again[0].weights.path == mine.path
    del again
    assert copies() == 1
    assert mine.path is not None
    assert Path(mine.path).is_dir()
    assert mine.state(mine.modules[0])["A"].isfinite().all()
    # Nor is one that another process has inherited.
    hub._Copies._owner += 1
    hub.release(Path(mine.path))
    assert Path(mine.path).is_dir()
    # Directories of this machine are nobody's copies.
    hub.release(Path.cwd())
    assert Path.cwd().is_dir()


def test_a_compressed_fleet_is_in_memory_once_it_is_read(
    copies: Any, memory: Any, tmp_path: Path
) -> None:
    made = ls.SharedSubspace.from_adapters("memory://team", error=0.0)
    made.save(tmp_path / "fleet")
    memory.put(str(tmp_path / "fleet"), "/fleet", recursive=True)
    again = ls.SharedSubspace.load("memory://fleet")
    assert store.validate("memory://fleet") == []
    assert store.is_subspace("memory://fleet")
    assert copies() == 0
    want, got = made.reconstruct("one").tensors, again.reconstruct("one").tensors
    assert all(torch.equal(want[k], got[k]) for k in want)
