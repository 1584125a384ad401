"""Generations of a directory: old or new, never a mixture, and nothing of others lost."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import AdapterFileError
from lorasmith.io import atomic

OWNED = frozenset({"one", "two"})


def _writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in sorted(OWNED):
            (folder / name).write_text(text)

    return write


def _texts(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in OWNED}


def _hidden(folder: Path) -> list[str]:
    return sorted(e.name for e in folder.iterdir() if e.name.endswith((".new", ".old")))


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return request.param


@pytest.mark.usefixtures("swap")
def test_a_generation_replaces_the_other_and_leaves_the_rest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a"
    atomic.replace_files(target, OWNED, _writer("old"))
    (target / "README.md").write_text("mine")
    (target / "link").symlink_to("README.md")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("kept")
    (target / "two.bak").write_text("kept")
    inode = (target / "README.md").stat().st_ino
    target.chmod(0o750)
    atomic.replace_files(target, OWNED | {"gone"}, _writer("new"))
    assert _texts(target) == {"new"}
    assert (target / "README.md").stat().st_ino == inode
    assert (target / "link").is_symlink()
    assert (target / "runs" / "log").read_text() == "kept"
    assert sorted(e.name for e in target.iterdir()) == [
        "README.md",
        "link",
        "one",
        "runs",
        "two",
        "two.bak",
    ]
    assert target.stat().st_mode & 0o777 == 0o750
    assert _hidden(target.parent) == []


def test_linux_exchanges_in_one_step(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "x").touch()
    if not atomic._exchange(a, b):
        pytest.skip("this file system cannot exchange two directories")
    assert (b / "x").exists()
    with pytest.raises(OSError, match="No such file"):
        atomic._exchange(a, tmp_path / "missing")


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    atomic.replace_files(tmp_path / "real", OWNED, _writer("old"))
    (tmp_path / "link").symlink_to("real")
    atomic.replace_files(tmp_path / "link", OWNED, _writer("new"))
    assert (tmp_path / "link").is_symlink()
    assert _texts(tmp_path / "real") == {"new"}


class PulledPlugError(BaseException):
    """Not an ``Exception``: nobody may catch it for long."""


STEPS = [
    *((step, swap) for step in ("write", "fsync", "link") for swap in ("exchange", "two renames")),
    ("exchange", "exchange"),
    ("rename", "two renames"),
]


@pytest.mark.parametrize(("step", "swap"), STEPS, indirect=["swap"])
def test_a_failure_at_any_step_leaves_the_old_generation(
    step: str, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    atomic.replace_files(target, OWNED, _writer("old"))
    (target / "README.md").write_text("mine")
    (target / "runs").mkdir()

    def fail(*args: object, **kwargs: object) -> None:
        raise PulledPlugError

    write = _writer("new")
    if step == "write":

        def write(folder: Path) -> None:
            (folder / "one").write_text("new")
            raise PulledPlugError

    elif step == "exchange":
        monkeypatch.setattr(atomic, "_exchange", fail)
    elif step == "link":
        monkeypatch.setattr(os, "link", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(PulledPlugError):
        atomic.replace_files(target, OWNED, write)
    monkeypatch.undo()
    assert _texts(target) == {"old"}
    assert (target / "README.md").read_text() == "mine"
    assert (target / "runs").is_dir()
    assert _hidden(tmp_path) == []


def test_the_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a"
    atomic.replace_files(target, OWNED, _writer("old"))
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    rename, calls = os.rename, []

    def second_fails(source: object, destination: object, **kwargs: object) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, destination)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        atomic.replace_files(target, OWNED, _writer("new"))
    assert _texts(target) == {"old"}
    assert _hidden(tmp_path) == []


def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    atomic.replace_files(target, OWNED, _writer("old"))
    (target / "README.md").write_text("mine")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    atomic.replace_files(target, OWNED, _writer("new"))
    assert (target / "README.md").read_text() == "mine"
    assert _texts(target) == {"new"}


def test_what_dead_writers_left_is_cleaned_up_and_nothing_of_others_is_lost(
    tmp_path: Path,
) -> None:
    target = tmp_path / "a"
    # Died between the two renames: the old generation only, under another name.
    atomic.replace_files(target, OWNED, _writer("old"))
    (target / "README.md").write_text("mine")
    target.rename(tmp_path / ".a.11111111.old")
    (tmp_path / ".a.22222222.new").mkdir()
    (tmp_path / ".a.22222222.new" / "one").write_text("half")
    assert atomic.interrupted(target)
    with atomic.locked(target):
        atomic.recover(target, OWNED)
    assert not atomic.interrupted(target)
    assert _texts(target) == {"old"}
    # Died after the swap, before a subdirectory was moved over.
    (tmp_path / ".a.33333333.new" / "runs").mkdir(parents=True)
    (tmp_path / ".a.33333333.new" / "runs" / "log").write_text("kept")
    (tmp_path / ".a.33333333.new" / "one").write_text("older")
    # Of another path whose name begins alike.
    (tmp_path / ".a.b.44444444.new").mkdir()
    atomic.replace_files(target, OWNED, _writer("new"))
    assert _texts(target) == {"new"}
    assert (target / "runs" / "log").read_text() == "kept"
    assert (target / "README.md").read_text() == "mine"
    assert _hidden(tmp_path) == [".a.b.44444444.new"]


def test_readers_never_see_a_mixture(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.replace_files(target, OWNED, _writer("0"))
    if not _can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two directories")
    stop = threading.Event()
    seen: list[set[str]] = []

    def read() -> None:
        while not stop.is_set():
            # Through one open directory, as a reader that wants one generation would.
            folder = os.open(target, os.O_RDONLY)
            texts = set()
            try:
                for name in OWNED:
                    handle = os.open(name, os.O_RDONLY, dir_fd=folder)
                    texts.add(os.read(handle, 99).decode())
                    os.close(handle)
            except FileNotFoundError:
                continue  # that generation has been deleted while it was read
            finally:
                os.close(folder)
            seen.append(texts)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for i in range(1, 40):
            atomic.replace_files(target, OWNED, _writer(str(i)))
    finally:
        stop.set()
        thread.join()
    assert seen
    assert all(len(texts) == 1 for texts in seen)


def _can_exchange(folder: Path) -> bool:
    a, b = folder / "exchange-a", folder / "exchange-b"
    a.mkdir()
    b.mkdir()
    return atomic._exchange(a, b)


def test_two_writers_take_turns(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def write(text: str) -> None:
        for _ in range(20):
            atomic.replace_files(target, OWNED, _writer(text))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "xy"))
    assert _texts(target) in ({"x"}, {"y"})
    assert _hidden(tmp_path) == []


def test_waiting_for_another_writer_ends(tmp_path: Path) -> None:
    with (
        atomic.locked(tmp_path / "a"),
        pytest.raises(AdapterFileError, match="Another process"),
        atomic.locked(tmp_path / "a", timeout=0.05),
    ):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc")
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="refused by its permissions")
def test_where_no_file_can_be_made_nobody_waits() -> None:
    """It waited for two minutes: to the lock it looks as if another process had it."""
    with (
        pytest.raises(AdapterFileError, match="No file can be made") as caught,
        atomic.locked(Path("/proc/adapter"), timeout=600),
    ):
        pass
    assert caught.value.file == "/proc"


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
@pytest.mark.parametrize("exists", [True, False])
def test_a_finished_file_is_not_abandoned_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """Another writer clears abandoned ones away; this one is still to be put in its place."""
    target = tmp_path / "report.html"
    if exists:
        atomic.replace_text(target, "old")
    seen = []
    for name, module in (("_exchange", atomic), ("replace", os)):
        real = getattr(module, name)

        def placing(part: Path, to: Path, real: Any = real) -> Any:
            seen.append(atomic._abandoned(part))
            return real(part, to)

        monkeypatch.setattr(module, name, placing)
    atomic.replace_text(target, "new")
    assert seen
    assert not any(seen)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
