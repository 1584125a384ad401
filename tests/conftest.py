"""What every test shares: no network, fixed seeds, the optional shared material."""

from __future__ import annotations

import os

# Read by huggingface_hub, matplotlib and tokenizers when they are imported, so set before any
# test module can import them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"

import gc
import ipaddress
import random
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Machines that share their cores make any deadline a matter of luck, and a test that fails must
# fail again when it is run again.
settings.register_profile("lorasmith", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("lorasmith")


# Everything that is imported stays until the end: to look through it for rubbish again and again
# takes a sixth of the time of the small tests, and most of that of each ``gc.collect()``.
gc.disable()


def pytest_collection_finish() -> None:
    """The modules of the tests have been imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the last test of a file: what it has imported stays as well."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


class NetworkUsedError(OSError):
    """A test tried to reach another machine."""


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            raise NetworkUsedError(f"tests run offline, but something connects to {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """The suite may run behind a shell's ``&``, which ignores Ctrl-C here and in all children."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    # Only where the test's module has imported them: most command-line tests need neither.
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material beside the checkout; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside this checkout")
    return folder


@pytest.fixture(scope="session")
def zoo(shared: Path) -> Path:
    """The folder of real adapters in the PEFT format; skips where there is none."""
    folder = shared / "zoo"
    if not folder.is_dir():
        pytest.skip("no ../shared/zoo folder beside this checkout")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random model, with its tokenizer. For reading alone."""
    from tests.training.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows to train it on. For reading alone."""
    from tests.training.tiny import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty store in memory, at ``memory://``; skips without fsspec."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for held in (files.store, files.pseudo_dirs):
        held.clear()
    files.pseudo_dirs.append("")
    yield files
    files.store.clear()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium or Chrome; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("no Chromium on this machine (apt-get install chromium)")
