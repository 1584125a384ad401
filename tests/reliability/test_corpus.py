"""The hostile corpus through every reader, in a process that is watched (``guarded.py``)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import lorasmith as ls
from lorasmith.errors import AdapterFileError, BaseMismatchError, LorasmithError
from lorasmith.fleet.members import check_id, open_members
from tests.io import support
from tests.reliability import corpus, corpus_models

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "adapter": corpus.ADAPTERS,
    "ours": {k: v for k, v in corpus.ADAPTERS.items() if v.ours},
    "record": corpus.RECORDS,
    "fleet": corpus.FLEETS,
    "gguf": corpus.GGUFS,
    "router": corpus_models.ROUTERS,
    "checkpoint": corpus_models.CHECKPOINTS,
    "base": corpus_models.BASES,
}
CASES = [(part, case) for part, cases in PARTS.items() for case in cases]
#: Seconds of processor time, and bytes beside twice the file.
SECONDS, MEMORY = 2.0, 64 * 2**20


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """(part, case) → what each reader made of it."""
    # One run for all workers of pytest-xdist: their folders have one parent.
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("all")
    output = folder / "corpus.jsonl"
    with FileLock(folder / "corpus.lock"):
        if not output.exists():
            made = folder / "corpus.partial"
            done = subprocess.run(
                [sys.executable, "-m", "tests.reliability.guarded", os.fspath(made)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.fspath(ROOT / "src"), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            made.rename(output)
    found: dict[tuple[str, str], list[Any]] = {}
    for line in output.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault((entry["part"], entry["case"]), []).append(entry)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_healthy_ones_are_read(part: str, results: dict[tuple[str, str], list[Any]]) -> None:
    for entry in results[part, ""]:
        assert entry["raised"] is None, entry


@pytest.mark.slow
@pytest.mark.parametrize(("part", "case"), CASES, ids=[f"{p}: {c}" for p, c in CASES])
def test_a_typed_refusal_and_nothing_else(
    part: str, case: str, results: dict[tuple[str, str], list[Any]]
) -> None:
    entries = results[part, case]
    assert len(entries) > 1 or part in ("fleet", "gguf", "checkpoint")
    for entry in entries:
        judge(part, case, entry)


def judge(part: str, case: str, entry: Any) -> None:
    """What must hold of one case and one reader."""
    wanted = PARTS[part][case]
    where = (entry["reader"], entry)
    assert entry["unchanged"], where
    assert not entry["seen"], where
    assert entry["cpu"] < SECONDS, where
    if entry["memory"] is not None:
        assert entry["memory"] <= 2 * entry["size"] + MEMORY, where
    if entry["raised"] is not None:
        assert "LorasmithError" in entry["kinds"], where
    # What is no adapter has readers of its own, all of which must refuse it unless one is named.
    every = part not in ("adapter", "ours", "record") and wanted.by == corpus.READERS
    if every or entry["reader"] in wanted.by:
        assert entry["raised"] is not None, where
        _named(entry, wanted, part)


def _named(entry: Any, wanted: corpus.Hostile, part: str) -> None:
    """The refusal names file, key, what was expected and got."""
    assert entry["file"], entry
    if part != "gguf":
        assert wanted.kind in entry["kinds"] or entry["reader"] not in ("read", "load"), entry
        # Where the two say different things, it is the record that names the key.
        allowed = (wanted.file, corpus.OWN) if part == "ours" else (wanted.file,)
        assert entry["file"].rstrip("/").endswith(allowed), entry
    if wanted.key is not None:
        assert entry["key"] is not None, entry
        by_record = part == "ours" and entry["file"].endswith(corpus.OWN)
        assert by_record or wanted.key in entry["key"], entry
    if wanted.got:
        assert entry["expected"] is not None, entry
        assert entry["got"] is not None, entry
    if "code" in entry:
        assert entry["code"] in (1, 2), entry


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = support.foreign(support.saved(tmp_path / "a"))
    corpus.FILES["pickle"].spoil(folder)
    with pytest.raises(AdapterFileError, match="pickle") as caught:
        ls.read_adapter(folder)
    assert caught.value.fix is not None
    assert "PEFT" in caught.value.fix
    assert "safetensors" in caught.value.fix


def _without(key: str) -> Any:
    def change(values: dict[str, Any]) -> None:
        del values[key]

    return change


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("lora_alpha", lambda v: v.update(lora_alpha=17)),
        ("lora_alpha", _without("lora_alpha")),  # PEFT would take its own default
        ("use_rslora", lambda v: v.update(use_rslora=True)),
        ("rank_pattern", lambda v: v.update(rank_pattern={})),
        ("alpha_pattern", lambda v: v["alpha_pattern"].update(k_proj=3)),
        ("alpha_pattern", _without("alpha_pattern")),
        ("target_modules", lambda v: v.update(target_modules=["q_proj"])),
        ("target_modules", lambda v: v.update(exclude_modules=["k_proj"])),
        ("target_modules", lambda v: v.update(layers_to_transform=[0])),
        ("modules_to_save", lambda v: v.update(modules_to_save=["lm_head"])),
        ("peft_type", lambda v: v.update(peft_type="ADALORA")),
    ],
)
def test_a_configuration_that_was_edited_against_our_record(
    key: str, change: Any, tmp_path: Path
) -> None:
    """Although the record, made to vouch for it, names its hash."""
    config = ls.LoRAConfig(
        r=4, targets=["q_proj", "k_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 9}
    )
    folder = support.saved(tmp_path / "a", config)
    file, own = folder / corpus.CONFIG, folder / corpus.OWN
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    record = json.loads(own.read_text())
    record["manifest"][corpus.CONFIG]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    own.write_text(json.dumps(record))
    with pytest.raises(AdapterFileError, match="describe different adapters") as caught:
        ls.read_adapter(folder)
    assert caught.value.key == key
    assert caught.value.file == str(own)
    assert caught.value.expected is not None
    assert caught.value.got is not None


def test_other_weights_under_the_same_name(tmp_path: Path) -> None:
    model = support.llama()
    model.name_or_path = model.config._name_or_path = "somebody/model"
    folder = support.saved(tmp_path / "a", model=model)
    other = support.llama()
    other.name_or_path = other.config._name_or_path = "somebody/model"
    support.stir(other.parameters(), scale=0.01)
    check = support.snapshot(other)
    with pytest.raises(BaseMismatchError, match="weights differ") as caught:
        ls.load(other, folder)
    assert caught.value.expected == caught.value.got == "somebody/model"
    check()


@pytest.mark.parametrize("case", corpus.IDS)
def test_ids(case: str, tmp_path: Path) -> None:
    """An id is a name and never a path: what could leave a directory is refused, or is inert."""
    name = corpus.IDS[case]
    folder = support.foreign(support.saved(tmp_path / "a"))
    model = support.llama()
    check = support.snapshot(model)
    with pytest.raises(LorasmithError):
        ls.load(model, folder, name=name)
    check()
    assert not ls.attached(model)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    if case not in ("climbs", "absolute", "dots"):
        with pytest.raises(LorasmithError) as caught:
            check_id(name)
        assert caught.value.key == "ids"
        with pytest.raises(LorasmithError):
            open_members({name: folder})
        return
    # In a fleet an id may hold any text: it stands in the manifest and names no file.
    fleet = ls.SharedSubspace.from_adapters({name: folder, "other": folder})
    fleet.save(tmp_path / "fleet")
    assert ls.SharedSubspace.load(tmp_path / "fleet").ids == (name, "other")
    after = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} - set(before)
    assert {p.parts[0] for p in after} <= {"fleet", ".fleet.lock"}


def test_ids_twice(tmp_path: Path) -> None:
    folder = support.foreign(support.saved(tmp_path / "a"))
    with pytest.raises(LorasmithError) as caught:
        open_members([folder, folder], ids=["x", "x"])
    assert caught.value.key == "ids"


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    """models--x/snapshots/<commit>/file → ../../blobs/<hash>, of the same repository only."""
    folder = support.foreign(support.saved(tmp_path / "a"))
    repository = tmp_path / "models--somebody--adapter"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in (corpus.CONFIG, corpus.WEIGHTS):
        (folder / name).rename(repository / "blobs" / f"hash-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-{name}")
    assert ls.read_adapter(snapshot).modules
    other = tmp_path / "models--another" / "blobs"
    other.mkdir(parents=True)
    (repository / "blobs" / f"hash-{corpus.WEIGHTS}").rename(other / "hash")
    (snapshot / corpus.WEIGHTS).unlink()
    (snapshot / corpus.WEIGHTS).symlink_to(other / "hash")
    with pytest.raises(AdapterFileError, match="leads out"):
        ls.read_adapter(snapshot)


@pytest.mark.slow
def test_five_hundred_mutated_files(tmp_path: Path) -> None:
    from tests.reliability.fuzz import Fuzz

    fuzz = Fuzz(tmp_path)
    for index in range(500):
        fuzz.step(index)
    out = fuzz.outcome
    assert not out.wrong, out.wrong[:5]
    for name, *_ in fuzz.targets:
        assert out.tried[name] == out.refused[name] + out.loaded[name]
    # A mutator whose inputs are all refused, or all read, tries nothing.
    assert sum(out.refused.values()) > 250
    assert sum(out.loaded.values()) > 25
