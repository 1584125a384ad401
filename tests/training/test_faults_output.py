"""Outputs that cannot be written or are too small: found before anything trains."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lorasmith.errors import ConfigError, TrainingError
from lorasmith.training import outputs, trainer
from lorasmith.training.config import AdapterOptions
from lorasmith.training.outputs import bytes_needed, check_space, check_writable
from lorasmith.training.run import train
from tests.training.tiny import load_no_model, make_config


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def nobody() -> Iterator[None]:
    """Permissions are no matter to root, who then acts as somebody else."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def _open_to_all(path: Path) -> None:
    """pytest's directories are closed to others, and nobody is to come in as far as here."""
    for folder in [path, *path.parents][:-2]:
        if folder.stat().st_uid == os.geteuid() and folder.parent != folder:
            folder.chmod(folder.stat().st_mode | 0o711)


@pytest.mark.skipif(os.name == "nt", reason="no permissions")
@pytest.mark.parametrize("which", ["output", "above"])
def test_a_directory_without_permission(
    tmp_path: Path, request: pytest.FixtureRequest, which: str
) -> None:
    above = tmp_path / "above"
    output = above / "out"
    output.mkdir(parents=True)
    _open_to_all(tmp_path)
    closed, open_ = (output, above) if which == "output" else (above, output)
    open_.chmod(0o777)
    closed.chmod(0o555)
    request.getfixturevalue("nobody")
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        check_writable(output)
    assert caught.value.file == str(output)
    assert caught.value.key == "output"
    assert str(caught.value.got).startswith(f"{closed}: ")
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_does_not_take_it(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    """Before the model is loaded; nothing stays behind."""

    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs.os, call, refuse)
    load_no_model(monkeypatch)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        train(make_config(base, rows, tmp_path / "out"), progress=False)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert ("no room" in caught.value.what) == full
    assert os.strerror(number) in str(caught.value.got)
    assert not (tmp_path / "out").exists()


def test_what_was_there_stays_when_it_cannot_be_replaced(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(base, rows, tmp_path / "out", save_steps=2)
    train(config, progress=False)
    output = tmp_path / "out"
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(outputs.os, "write", refuse)
        with pytest.raises(ConfigError):
            train(make_config(base, rows, tmp_path / "out", overwrite=True), progress=False)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs.os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ConfigError, match="mount point") as caught:
        check_writable(tmp_path)
    assert str(tmp_path / "run") in str(caught.value.fix)


def test_too_little_room_shows_before_training(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.AdapterTrainer, "run", lambda *_: pytest.fail("it trained"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(TrainingError, match="too little room") as caught:
        train(make_config(base, rows, tmp_path / "out", save_steps=1), progress=False)
    assert caught.value.got == "1 MiB free"
    assert caught.value.key == "output"
    assert not (tmp_path / "out").exists()


def test_the_estimate_holds_what_a_run_writes(base: Path, rows: Path, tmp_path: Path) -> None:
    """All that is on disk at the end, and one checkpoint more, while it is written."""
    adapter = AdapterOptions(r=256)  # so that tensors outweigh the rest
    config = make_config(
        base, rows, tmp_path / "out", adapter=adapter, steps=4, save_steps=1, save_total_limit=2
    )
    result = train(config, progress=False)
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    one = sum(p.stat().st_size for p in (tmp_path / "out" / "checkpoint-4").iterdir())
    tensors = 4 * result.trainable_parameters
    needed = bytes_needed(tensors, checkpoints=2)
    assert written + one < needed
    assert needed < 1.3 * (written + one) + 5 * outputs._SMALL
    check_space(tmp_path, 1)
