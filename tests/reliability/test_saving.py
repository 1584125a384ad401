"""Nothing is lost while it is saved; ``benchmarks/reliability.py`` has the long counts."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from lorasmith.io import atomic
from tests.reliability import saving

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_killed_writers_leave_one_whole_generation() -> None:
    for result in saving.run("kills", ["adapter", "adapter, two renames"], count=20):
        assert result["lost"] is None, result
        assert result["kills"] == 20


def test_failing_calls_leave_the_old_generation(tmp_path: Path) -> None:
    if saving.build(tmp_path) is None:
        pytest.skip("no C compiler, or not Linux")
    found = {r["kind"]: r for r in saving.run("faults", ["adapter", "checkpoint", "report"])}
    assert {k: r["lost"] for k, r in found.items()} == dict.fromkeys(found)
    calls = {"mkdir", "open", "write", "link", "fsync", "rename"}
    assert set(found["adapter"]["by_call"]) == {
        f"{e} in {c}" for e in ("EIO", "ENOSPC") for c in calls
    }


def test_readers_between_many_writers_see_no_mixture() -> None:
    for result in saving.run("writers", ["fleet"], number=3, saves=10):
        assert result["lost"] is None, result
        assert result["saves"] == 30
        assert result["reads"] > 0


# A single file ----------------------------------------------------------------------------------


def _parts(folder: Path) -> list[str]:
    return [e.name for e in folder.iterdir() if e.name.endswith(".part")]


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    atomic.replace_text(target, "old\r\n")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to("report.html")
    atomic.replace_text(tmp_path / "link", "new\r\n")
    assert target.read_bytes() == b"new\r\n"
    assert (tmp_path / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(e.name for e in tmp_path.iterdir()) == ["link", "report.html"]


def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    target = tmp_path / "a.json"
    child = os.fork()
    if child == 0:
        atomic.replace_file(target, lambda stream: time.sleep(60))
        os._exit(0)
    try:
        deadline = time.monotonic() + 30
        while not _parts(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        atomic.replace_text(target, "mine")
        assert len(_parts(tmp_path)) == 1  # the child's, which is at work
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(_parts(tmp_path)) == 1
    atomic.replace_text(target, "again")
    assert _parts(tmp_path) == []
    assert target.read_text() == "again"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_when_the_directory_cannot_be_brought_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool, swap: bool
) -> None:
    """The last step of all: what is in place already is taken back."""
    target = tmp_path / "a"
    owned = {"one"}
    if not fresh:
        atomic.replace_files(target, owned, lambda folder: _put(folder, "old"))
        (target / "runs").mkdir()
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    sync = atomic._sync

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(atomic, "_sync", fail)
    with pytest.raises(OSError, match="Input/output"):
        atomic.replace_files(target, owned, lambda folder: _put(folder, "new"))
    if fresh:
        assert not target.exists()
    else:
        assert (target / "one").read_text() == "old"
        assert (target / "runs").is_dir()
    assert [e.name for e in tmp_path.iterdir() if e.suffix in (".new", ".old")] == []


def test_half_a_tensor_file_of_a_dead_writer_is_not_taken_for_somebody_elses(
    tmp_path: Path,
) -> None:
    target, dead = tmp_path / "a", tmp_path / ".a.0123abcd.new"
    atomic.replace_files(target, {"one"}, lambda folder: _put(folder, "old"))
    dead.mkdir()
    (dead / ".tmpkb3iXq").write_text("half")
    atomic.replace_files(target, {"one"}, lambda folder: _put(folder, "new"))
    assert [e.name for e in target.iterdir()] == ["one"]
    assert not dead.exists()


def _put(folder: Path, text: str) -> None:
    (folder / "one").write_text(text)


# Checkpoints --------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_replace_another_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.training import checkpoints

    target, partial = tmp_path / "checkpoint-5", tmp_path / ".checkpoint-5.partial"
    target.mkdir()
    _put(target, "old")
    partial.mkdir()
    _put(partial, "new")

    def fail(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic, "_exchange", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.publish(partial, target)
    assert (target / "one").read_text() == "old"


def test_the_next_run_clears_what_writers_of_checkpoints_left(tmp_path: Path) -> None:
    from lorasmith.training import checkpoints

    for name in (".checkpoint-5.partial", "..checkpoint-5.partial.0123abcd.new"):
        (tmp_path / name).mkdir()
    (tmp_path / ".checkpoint-5.0123abcd.old").mkdir()
    (tmp_path / "..checkpoint-5.partial.lock").touch()
    for name in ("checkpoint-4", ".checkpoint-x", "mine"):
        (tmp_path / name).mkdir()
    checkpoints.remove_partial(tmp_path)
    assert sorted(e.name for e in tmp_path.iterdir()) == [".checkpoint-x", "checkpoint-4", "mine"]


def test_a_router_of_two_generations_is_refused(tmp_path: Path) -> None:
    from lorasmith.errors import AdapterFileError
    from lorasmith.fleet.router import check

    kind = saving.kinds(tmp_path)["router"]()
    for g in range(2):
        kind.save(tmp_path / str(g), g)
    assert len(check(tmp_path / "0")) == 2
    shutil.copy(tmp_path / "1" / "router.safetensors", tmp_path / "0" / "router.safetensors")
    with pytest.raises(AdapterFileError, match="not those that its configuration names"):
        check(tmp_path / "0")
