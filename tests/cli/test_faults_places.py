"""Outputs that cannot be written and adapters that cannot be had: what every command says."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import main
from lorasmith.errors import AdapterFileError
from lorasmith.io.atomic import explained_failure
from tests.io import support


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places") / "base"
    support.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return support.saved(base.parent / "adapter")


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The error that a command gives as JSON."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 2
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["error"]
    return found


WRITERS = {
    "fuse": ("fuse", "BASE", "ADAPTER"),
    "export vllm": ("export", "ADAPTER", "--to", "vllm"),
    "merge": ("merge", "ADAPTER", "ADAPTER"),
    "convert": ("convert", "ADAPTER", "--r", "2"),
    "fleet": ("fleet", "compress", "ADAPTER", "ADAPTER"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is where nobody can write")
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_cannot_be_written(
    name: str, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": base, "ADAPTER": adapter}
    before = {p: p.read_bytes() for p in base.parent.rglob("*") if p.is_file()}
    found = _refused(capsys, *(places.get(a, a) for a in WRITERS[name]), "-o", "/sys/lorasmith")
    assert found["file"].startswith("/sys")
    assert found["key"] == "output"
    assert found["expected"]
    assert found["got"]
    assert found["fix"]
    assert {p: p.read_bytes() for p in base.parent.rglob("*") if p.is_file()} == before


def test_what_is_said_of_a_full_disk_and_of_a_mount_point(tmp_path: Path) -> None:
    for target, number, got, fix in (
        (tmp_path / "a", errno.ENOSPC, os.strerror(errno.ENOSPC), "free space"),
        (Path(tmp_path.anchor), errno.EBUSY, "a mount point", "new"),
    ):
        with (
            pytest.raises(AdapterFileError, match="The thing could not be written") as caught,
            explained_failure("The thing", target),
        ):
            raise OSError(number, os.strerror(number))
        assert caught.value.file == str(target)
        assert caught.value.key == "output"
        assert got in str(caught.value.got)
        assert fix in str(caught.value.fix)


READERS = {
    "fuse": ("fuse", "BASE", "nobody/none", "-o", "OUT"),
    "export": ("export", "nobody/none", "--to", "vllm", "-o", "OUT"),
    "merge": ("merge", "nobody/none", "ADAPTER", "-o", "OUT"),
    "convert": ("convert", "nobody/none", "--r", "2", "-o", "OUT"),
    "fleet compress": ("fleet", "compress", "nobody/none", "ADAPTER", "-o", "OUT"),
    "fleet analyze": ("fleet", "analyze", "nobody/none", "ADAPTER"),
    "diagnose": ("diagnose", "BASE", "nobody/none"),
    "info": ("info", "nobody/none"),
    "fuse model": ("fuse", "nobody/none", "ADAPTER", "-o", "OUT"),
    "generate model": ("generate", "nobody/none", "hello"),
    "eval model": ("eval", "nobody/none", "ROWS"),
    "eval rows": ("eval", "BASE", "nobody/none"),
    "train model": ("train", "nobody/none", "ROWS", "-o", "OUT"),
    "train rows": ("train", "BASE", "nobody/none", "-o", "OUT"),
    "diagnose model": ("diagnose", "nobody/none", "ADAPTER"),
}


@pytest.mark.parametrize("name", READERS)
def test_offline_and_not_cached_names_the_cache(
    name: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    places = {"BASE": base, "ADAPTER": adapter, "OUT": tmp_path / "out", "ROWS": rows}
    began = time.process_time()
    found = _refused(capsys, *(places.get(a, a) for a in READERS[name]))
    assert time.process_time() - began < 5.0
    cache = str(HF_HUB_CACHE) if not name.endswith("rows") else "datasets"
    assert cache in found["got"]
    assert "HF_HUB_OFFLINE" in found["got"]
    assert found["expected"]
    assert found["fix"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_an_adapter_of_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked once, for a bounded time; then only its cache is looked at."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    import lorasmith as ls

    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append(options)
        raise FileNotFoundError(repository)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1:9")  # RFC 5737: it never answers
    with pytest.raises(AdapterFileError) as caught:
        ls.read_adapter("nobody/none")
    assert asked[0]["local_files_only"] is True
    assert str(HF_HUB_CACHE) in str(caught.value.got)
    assert "the hub is not reached" in str(caught.value.got)


def _writes(base: Path, adapter: Path, path: object) -> dict[str, tuple[object, ...]]:
    """Commands that write a file, and call what measures."""
    return {
        "diagnose": ("diagnose", base, adapter, "-o", path),
        "diagnose plot": ("diagnose", base, adapter, "--plot", path),
        "analyze": ("fleet", "analyze", adapter, adapter, "--plot", path),
    }


@pytest.mark.parametrize("name", ["diagnose", "diagnose plot", "analyze"])
@pytest.mark.parametrize("place", ["below a file", "a directory", "full"])
def test_a_report_that_cannot_be_written_is_not_made(
    name: str,
    place: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found out before the work: what works is not called."""
    import lorasmith as ls

    similarity = importlib.import_module("lorasmith.fleet.similarity")
    suffix = ".html" if name == "diagnose" else ".svg"
    path = tmp_path / "new" / "deep" / f"r{suffix}"
    if place == "below a file":
        (tmp_path / "new").write_text("x")
    elif place == "a directory":
        path.mkdir(parents=True)
    else:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(ls, "diagnose", lambda *_, **__: pytest.fail("it was compared"))
    monkeypatch.setattr(similarity, "similarity", lambda *_, **__: pytest.fail("it was compared"))
    before = sorted(tmp_path.rglob("*"))
    found = _refused(capsys, *_writes(base, adapter, path)[name])
    assert found["file"] == str(path)
    assert found["key"] in ("--output", "--plot")
    assert found["expected"]
    assert found["got"]
    assert found["fix"]
    assert sorted(tmp_path.rglob("*")) == before


def test_configuration_files_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    for content in (None, b"lr: \xff\n", b"lr: [1\n", b"- 1\n", b"lr: !!python/name:os.system\n"):
        if content is not None:
            file.write_bytes(content)
        found = _refused(
            capsys, "train", "model", "rows.jsonl", "-o", tmp_path / "out", "--config", file
        )
        assert found["file"] == str(file)
        assert found["key"] == "--config"
        assert found["expected"]
        assert found["got"]
        assert found["fix"]
    assert not (tmp_path / "out").exists()


def test_a_hub_that_takes_no_connection_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each adapter, and again for each of several tries."""
    import socket

    import lorasmith as ls
    from lorasmith.io import models

    asked: list[Any] = []

    def silent(address: Any, **_: Any) -> None:
        asked.append(address)
        raise TimeoutError

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "create_connection", silent)
    monkeypatch.setattr(models, "_silent", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid:9")
    for name in ("nobody/one", "nobody/two"):
        with pytest.raises(AdapterFileError, match="the hub is not reached"):
            ls.read_adapter(name)
    assert not models.hub_reachable()
    assert asked == [("hub.invalid", 9)]
    monkeypatch.setattr(models, "_SILENT_FOR", 0.0)
    assert not models.hub_reachable()
    assert len(asked) == 2
