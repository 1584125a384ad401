"""Hostile adapters for a model, a fleet and a served fleet that hold healthy ones already.

``guarded.py`` puts the corpus through readers that begin anew each time. Here two adapters are on
the model and two in the fleet in memory, and must be as they were after each refusal: values,
flags, hooks, which one is in use, what the model computes. Readers that ``guarded.py`` tries from
the command line with a few entries alone (merging, converting, exporting, fusing) see all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import LorasmithError
from lorasmith.io import files
from tests.io import support
from tests.reliability import corpus
from tests.reliability.corpus import Hostile

#: Part → its entries; as in ``guarded.py``, "ours" has a record that vouches for the files.
PARTS: dict[str, dict[str, Hostile]] = {
    "adapter": corpus.ADAPTERS,
    "ours": {k: v for k, v in corpus.ADAPTERS.items() if v.ours},
    "record": corpus.RECORDS,
}
CASES = [(part, case) for part, cases in PARTS.items() for case in cases]
#: Those that take each reader the whole time that regular expressions get, or much to parse.
SLOW = ("catastrophic", "150,000", "17 MiB", "a million")


def _digest(value: Any) -> str:
    """A hash of all that can be reached from a value."""
    digest, seen, kept = hashlib.sha256(), set(), []

    def visit(one: Any) -> None:
        if isinstance(one, Tensor):
            digest.update(f"{one.dtype} {tuple(one.shape)} {one.requires_grad}".encode())
            digest.update(one.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(one, np.ndarray):
            digest.update(f"{one.dtype} {one.shape}".encode() + one.tobytes())
        elif isinstance(one, str | bytes | int | float | bool | type | Path | None):
            digest.update(repr(one).encode())
        elif id(one) in seen:
            digest.update(b"again")
        else:
            seen.add(id(one))
            kept.append(one)  # an id is of one object for as long as that lives
            digest.update(type(one).__qualname__.encode())
            if isinstance(one, Mapping):
                for key, item in one.items():
                    visit(key)
                    visit(item)
            elif isinstance(one, list | tuple):
                for item in one:
                    visit(item)
            elif isinstance(one, set | frozenset):
                visit(sorted(map(repr, one)))
            else:
                for name in getattr(type(one), "__slots__", ()):
                    visit(getattr(one, name, None))
                visit(getattr(one, "__dict__", {}))

    visit(value)
    return digest.hexdigest()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Bench:
    """A model with two adapters, a fleet of two, a model that serves it, and directories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kept = root / "kept"
        self.good = support.foreign(support.saved(self.kept / "good"))
        self.healthy = support.foreign(support.saved(self.kept / "healthy"))
        self.ours = support.saved(self.kept / "ours")
        support.llama().save_pretrained(self.kept / "base")
        self.model = support.llama()
        support.attached(self.model, ls.LoRAConfig(r=2), "one")
        support.attached(self.model, ls.DoRAConfig(r=3), "two")
        ls.use(self.model, "two")
        self.fleet = ls.SharedSubspace.from_adapters([self.good, self.healthy])
        self.fleet.save(self.kept / "fleet")
        self.served_model = support.llama()
        self.served = ls.MultiTaskModel(self.served_model, self.fleet)
        self.served.use("good")
        self.taken = copy.deepcopy(self.fleet)  # what adapters are added to
        self.check = (support.snapshot(self.model), support.snapshot(self.served_model))
        self.before = self.state()
        self.contents = _contents(self.kept)

    def state(self) -> tuple[Any, ...]:
        """What is not in a state dict: names, what is in use, the fleet, what is computed."""
        adapters = ls.attached(self.model)
        return (
            list(adapters),
            [repr(adapter) for adapter in adapters.values()],
            [name for name, _ in self.model.named_modules()],
            _digest(self.fleet),
            _digest(self.taken),
            self.served.tasks,
            self.served.active,
            _digest(support.logits(self.model)),
            _digest(support.logits(self.served)),
        )

    def unchanged(self) -> None:
        """Asserts it."""
        for check in self.check:
            check()
        assert self.state() == self.before
        assert _contents(self.kept) == self.contents

    def readers(self, path: Path, out: Path) -> dict[str, Callable[[], object]]:
        """Name → call."""
        return {
            "load": lambda: ls.load(self.model, path, name="new"),
            "load under a name that is there": lambda: ls.load(self.model, path, name="one"),
            "add": lambda: self.taken.add(path, "new"),
            "fleet": lambda: ls.SharedSubspace.from_adapters([self.good, path]),
            "similarity": lambda: ls.similarity([self.good, path]),
            "merge": lambda: ls.merge([self.good, path]),
            "convert": lambda: ls.convert(path, ls.LoRAConfig(r=2)),
            "export": lambda: ls.export_adapter(path, out, to="vllm"),
            "fuse": lambda: ls.fuse_checkpoint(self.kept / "base", path, out, verify=False),
        }


#: Readers that change what there is if they succeed.
TRIED = ("load", "load under a name that is there", "add")
#: Readers of every value, which see no model.
READS = ("add", "fleet", "similarity", "merge", "convert", "export")


def _take_back(bench: Bench) -> None:
    """Takes the fleet as it was; what it has gained has not changed the others."""
    for name in bench.fleet.ids:
        before, after = (f.reconstruct(name).factors for f in (bench.fleet, bench.taken))
        assert before.keys() == after.keys()
        assert _digest(list(before.values())) == _digest(list(after.values()))
    assert bench.taken.ids == (*bench.fleet.ids, "new")
    bench.taken = copy.deepcopy(bench.fleet)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers do not wait for a writer that might be at work before they refuse."""
    monkeypatch.setattr(files, "_PAUSE", 0.0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("add"))


@pytest.mark.filterwarnings("ignore")
def test_healthy_ones_are_taken(bench: Bench) -> None:
    """Else the refusals would show nothing; and what they change is seen."""
    for source in (bench.healthy, bench.ours):
        for name, call in bench.readers(source, bench.root / "out").items():
            if name == "load under a name that is there":
                continue
            call()
            shutil.rmtree(bench.root / "out", ignore_errors=True)
            if name == "load":
                assert bench.state() != bench.before
                ls.detach(bench.model, "new")
                ls.use(bench.model, "two")
            if name == "add":
                assert bench.state() != bench.before
                _take_back(bench)
            bench.unchanged()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("part", "case"), CASES, ids=[f"{p}: {c}" for p, c in CASES])
def test_what_is_there_stays(part: str, case: str, bench: Bench, tmp_path: Path) -> None:
    wanted = PARTS[part][case]
    folder, out = tmp_path / "a", tmp_path / "out"
    shutil.copytree(bench.healthy if part == "adapter" else bench.ours, folder)
    wanted.spoil(folder)
    if part == "ours":
        _vouch(folder)
    for name, call in bench.readers(folder, out).items():
        if any(slow in case for slow in SLOW) and (name not in TRIED or part != "adapter"):
            continue
        try:
            call()
            refused = False
        except LorasmithError:
            refused = True
        must = "load" in wanted.by if name == "load" else name in READS and "merge" in wanted.by
        assert refused or not must, name
        if refused:
            assert not out.exists(), name
        elif name == "load":
            ls.detach(bench.model, "new")
            ls.use(bench.model, "two")
        elif name == "add":
            _take_back(bench)
        if name in TRIED:
            bench.unchanged()
        shutil.rmtree(out, ignore_errors=True)
    bench.unchanged()


def _vouch(folder: Path) -> None:
    """Writes the hashes of the files as they are into our record."""
    own = folder / corpus.OWN
    record = json.loads(own.read_text())
    for name in record["manifest"]:
        data = (folder / name).read_bytes()
        record["manifest"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    own.write_text(json.dumps(record))
