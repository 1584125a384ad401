"""Pushing to stores and to the hub: what arrives, what readers see meanwhile, what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import lorasmith as ls
from lorasmith.cli.app import main
from lorasmith.errors import AdapterFileError, ConfigError
from lorasmith.io import hub as hub_module
from lorasmith.io import store as store_module
from tests.fleet.fleets import adapter

NAMES = {"adapter_config.json", "adapter_model.safetensors", "lorasmith.json", "README.md"}
FLEET = {"subspace.json", "basis.safetensors", "codes.safetensors", "README.md"}


def made(folder: Path, seed: int = 0, **options: Any) -> Path:
    return adapter(seed=seed, **options).save(folder)


def fleet(folder: Path, seed: int = 0) -> Path:
    members = {f"m{i}": adapter(seed=seed + i) for i in range(3)}
    ls.SharedSubspace.from_adapters(members, error=0.0).save(folder)
    return folder


def content(place: str | Path) -> dict[str, bytes]:
    """Name of a part → its bytes, of what a reader of that place gets."""
    folder = hub_module.fetch(str(place), hub_module.FLEET_FILES)
    if folder is not None:
        ls.SharedSubspace.load(str(place))
        return {f.name: f.read_bytes() for f in folder.iterdir() if f.name in FLEET - {"README.md"}}
    weights = ls.read_adapter(str(place))
    assert weights.path is not None
    parts = ("adapter_config.json", "adapter_model.safetensors")
    return {n: (weights.path / n).read_bytes() for n in parts}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_PAUSE", 0.0)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket "bucket" of an S3 server, and the file system that talks to it."""
    s3fs = pytest.importorskip("s3fs")

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    files.invalidate_cache()
    files.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def there(files: Any, root: str) -> set[str]:
    files.invalidate_cache()
    return {p.removeprefix(root).strip("/") for p in files.find(root)}


# Stores ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_s3_adapters_and_fleets_there_and_back(s3: Any, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one"), made(tmp_path / "two", 1, r=5)
    seen: list[tuple[int, int]] = []
    pushed = ls.push(one, "s3://bucket/team/one", progress=lambda _, *n: seen.append(n))
    assert set(pushed.files) == NAMES == there(s3, "bucket/team/one")
    assert not pushed.replaced
    assert seen[-1] == (pushed.nbytes, pushed.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert content("s3://bucket/team/one") == content(one)
    want, got = ls.read_adapter(one), ls.read_adapter("s3://bucket/team/one")
    assert got.config == want.config
    assert all(torch.equal(got.tensors[k], want.tensors[k]) for k in want.tensors)
    with pytest.raises(AdapterFileError, match="already") as caught:
        ls.push(two, "s3://bucket/team/one")
    assert "--overwrite" in str(caught.value)
    assert content("s3://bucket/team/one") == content(one)
    assert ls.push(two, "s3://bucket/team/one", overwrite=True).replaced
    assert content("s3://bucket/team/one") == content(two)
    assert there(s3, "bucket/team/one") == NAMES
    ls.push(fleet(tmp_path / "f"), "s3://bucket/fleets/f")
    assert there(s3, "bucket/fleets/f") == FLEET
    assert content("s3://bucket/fleets/f") == content(tmp_path / "f")
    other = fleet(tmp_path / "g", 7)
    ls.push(other, "s3://bucket/fleets/f", overwrite=True)
    assert content("s3://bucket/fleets/f") == content(other)
    assert there(s3, "bucket/fleets/f") == FLEET
    with pytest.raises(AdapterFileError, match="upload failed") as caught:
        ls.push(one, "s3://no-such-bucket/one")
    assert "still get" in str(caught.value)


@pytest.mark.slow
def test_s3_an_upload_cut_off_while_files_are_exchanged(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = made(tmp_path / "old"), made(tmp_path / "new", 1, r=5)
    ls.push(old, "s3://bucket/a")
    copy = s3.cp_file
    calls = []

    def fails(a: str, b: str, **rest: Any) -> None:
        calls.append(b)
        if len(calls) == 4:  # two old files to .lorasmith, the first new one to its name
            raise ConnectionError("gone")
        copy(a, b, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(s3, "cp_file", fails)
        with pytest.raises(AdapterFileError, match="gone"):
            ls.push(new, "s3://bucket/a", overwrite=True)
    place = "bucket/a/adapter_model.safetensors"
    assert s3.cat(place) == content(new)["adapter_model.safetensors"]
    assert content("s3://bucket/a") == content(old)
    ls.push(new, "s3://bucket/a", overwrite=True)
    assert content("s3://bucket/a") == content(new)
    assert there(s3, "bucket/a") == NAMES


def check_at_every_moment(
    memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[], None],
    source: Path,
    old: dict[str, bytes],
) -> None:
    """Pushes over "a", looking before each operation, and ending at each of them once."""
    new = content(source)
    assert new != old
    store = type(memory)
    originals = {n: getattr(store, n) for n in ("put_file", "cp_file", "rm_file")}
    state = {"count": 0, "fail_at": 0}

    def watched(name: str) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            state["count"] += 1
            if state["count"] > 0:
                assert content("memory://a") in (old, new), "a mixture"
            if state["count"] == state["fail_at"]:
                if name == "put_file" and "/.lorasmith/" in args[1]:
                    # A store that does not write whole files or none.
                    self.pipe_file(args[1], Path(args[0]).read_bytes()[:100])
                raise OSError("cut off")
            return originals[name](self, *args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in originals:
            patched.setattr(store, name, watched(name))
        outcomes = []
        for fail_at in range(1, 40):
            state.update(count=-1000, fail_at=0)
            memory.store.clear()
            begin()
            state.update(count=0, fail_at=fail_at)
            failed = ""
            try:
                ls.push(source, "memory://a", overwrite=True)
            except AdapterFileError as error:
                failed = str(error)
            if not failed:
                break
            assert "cut off" in failed
            found = content("memory://a")
            assert found in (old, new)
            outcomes.append(found == new)
            # Nothing is in the way of whoever tries again.
            state.update(count=-1000)
            patched.setattr(store_module, "_STALE", timedelta(seconds=-1))
            ls.push(source, "memory://a", overwrite=True)
            patched.setattr(store_module, "_STALE", timedelta(days=1))
            assert content("memory://a") == new
            assert not any("/.lorasmith/" in path for path in memory.store)
        else:
            raise AssertionError("it never ends")
    # Old up to the record, new afterwards; and both have been seen.
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]
    assert len(outcomes) >= 6


def _another_rank(folder: Path) -> tuple[Path, Path]:
    return made(folder / "old"), made(folder / "new", 1, r=5)


def _other_weights(folder: Path) -> tuple[Path, Path]:
    old, new = made(folder / "old"), made(folder / "new", 1)
    assert content(old)["adapter_config.json"] == content(new)["adapter_config.json"]
    return old, new


def _a_fleet(folder: Path) -> tuple[Path, Path]:
    return fleet(folder / "old"), fleet(folder / "new", 9)


@pytest.mark.parametrize("generations", [_another_rank, _other_weights, _a_fleet])
def test_readers_see_one_generation_at_every_moment_of_a_push(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generations: Any
) -> None:
    old, new = generations(tmp_path)

    def begin() -> None:
        ls.push(old, "memory://a", card=False)

    check_at_every_moment(memory, monkeypatch, begin, new, content(old))


def test_over_an_adapter_of_peft(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = made(tmp_path / "old"), made(tmp_path / "new", 1, r=5)
    (old / "lorasmith.json").unlink()

    def begin() -> None:
        for file in old.iterdir():
            memory.pipe_file(f"/a/{file.name}", file.read_bytes())
        memory.pipe_file("/a/adapter_model.bin", b"an older one")

    check_at_every_moment(memory, monkeypatch, begin, new, content(old))
    begin()
    pushed = ls.push(new, "memory://a", overwrite=True)
    assert "adapter_model.bin" in pushed.removed
    assert there(memory, "/a") == NAMES


def test_back_to_the_old_one_after_an_upload_that_was_cut_off(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its record is still there, and its hash is that of what is pushed: yet it is not in place.
    old, new = made(tmp_path / "old"), made(tmp_path / "new", 1)
    ls.push(old, "memory://a")
    copy = type(memory).cp_file

    def cut(self: Any, a: str, b: str, **rest: Any) -> None:
        copy(self, a, b, **rest)
        if not b.startswith("/a/.lorasmith"):
            raise OSError("cut off")

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "cp_file", cut)
        with pytest.raises(AdapterFileError, match="cut off"):
            ls.push(new, "memory://a", overwrite=True)
    place = "/a/adapter_model.safetensors"
    assert memory.cat(place) == (new / "adapter_model.safetensors").read_bytes()
    ls.push(old, "memory://a", overwrite=True)
    assert memory.cat(place) == (old / "adapter_model.safetensors").read_bytes()
    assert content("memory://a") == content(old)


def test_a_first_push_that_is_cut_off_is_no_adapter(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(memory).put_file
    for source in (made(tmp_path / "a"), fleet(tmp_path / "f")):
        for fail_at in range(1, 5):
            memory.store.clear()
            left = iter(range(1, fail_at))

            def cut(self: Any, *args: Any, left: Any = left, **rest: Any) -> None:
                if next(left, None) is None:
                    raise OSError("cut off")
                put(self, *args, **rest)

            with monkeypatch.context() as patched:
                patched.setattr(type(memory), "put_file", cut)
                with pytest.raises(AdapterFileError, match="cut off"):
                    ls.push(source, "memory://new")
            with pytest.raises(AdapterFileError, match="no such adapter"):
                ls.read_adapter("memory://new")
            assert hub_module.fetch("memory://new", hub_module.FLEET_FILES) is None
        ls.push(source, "memory://new")
        assert content("memory://new") == content(source)


def test_a_mixture_without_the_files_of_either_is_refused(memory: Any, tmp_path: Path) -> None:
    ls.push(made(tmp_path / "old"), "memory://a")
    memory.pipe_file(
        "/a/adapter_model.safetensors",
        (made(tmp_path / "new", 1) / "adapter_model.safetensors").read_bytes(),
    )
    memory.pipe_file("/a/.lorasmith/0-adapter_config.json", b"{}")
    with pytest.raises(AdapterFileError, match="is pushing other files"):
        ls.read_adapter("memory://a")
    memory.rm_file("/a/.lorasmith/0-adapter_config.json")
    with pytest.raises(AdapterFileError, match="different generations"):
        ls.read_adapter("memory://a")


def test_somebody_else_at_the_same_time_is_noticed(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = made(tmp_path / "mine", 1), made(tmp_path / "theirs", 2, r=4)
    ls.push(made(tmp_path / "old"), "memory://a")
    put = type(memory).put_file

    def race(self: Any, a: str, b: str, **rest: Any) -> None:
        put(self, a, b, **rest)
        if b == "/a/lorasmith.json":
            put(self, str(theirs / "adapter_config.json"), "/a/adapter_config.json")

    monkeypatch.setattr(type(memory), "put_file", race)
    with pytest.raises(AdapterFileError, match="at the same time"):
        ls.push(mine, "memory://a", overwrite=True)


# What is pushed -------------------------------------------------------------------------------


def test_other_files_go_along_and_pickles_stay(memory: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chart.png").write_bytes(b"\x89PNG")
    (folder / "README.md").write_text("# Mine\n")
    for name in ("training_args.bin", "optimizer.pt", ".env", "adapter_model.bin"):
        (folder / name).write_text("secret")
    (folder / "checkpoint-3").mkdir()
    (tmp_path / "elsewhere.json").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "elsewhere.json")
    pushed = ls.push(folder, "memory://a")
    assert there(memory, "/a") == NAMES | {"tokenizer.json", "chart.png"}
    assert memory.cat("/a/README.md") == b"# Mine\n"
    left = {"training_args.bin", "optimizer.pt", ".env", "adapter_model.bin"}
    assert set(pushed.left_out) == left | {"checkpoint-3", "link.json"}
    ls.push(folder, "memory://b", extras=False)
    assert there(memory, "/b") == NAMES
    # A card that somebody wrote stays; a generated one is renewed.
    (folder / "README.md").unlink()
    ls.push(folder, "memory://a", overwrite=True)
    assert memory.cat("/a/README.md") == b"# Mine\n"
    ls.push(made(tmp_path / "c"), "memory://c")
    assert b"| rank | 3 |" in memory.cat("/c/README.md")
    ls.push(made(tmp_path / "d", r=5), "memory://c", overwrite=True)
    assert b"| rank | 5 |" in memory.cat("/c/README.md")


def test_sources_of_every_kind(memory: Any, tmp_path: Path) -> None:
    from tests.io.support import llama

    weights = adapter()
    ls.push(weights, "memory://value")
    assert ls.read_adapter("memory://value").config == weights.config
    model = llama()
    ls.attach(model, ls.LoRAConfig(r=2))
    ls.push(model, "memory://model")
    assert ls.read_adapter("memory://model").base.fingerprint is not None
    held = ls.SharedSubspace.from_adapters({"a": adapter(), "b": adapter(seed=1)}, error=0.0)
    assert ls.push(held, "memory://held").kind == "fleet"
    assert ls.SharedSubspace.load("memory://held").ids == held.ids
    assert ls.push("memory://value", "memory://again").kind == "adapter"
    assert content("memory://again") == content("memory://value")
    for name in ("one", "two"):
        made(tmp_path / "many" / name)
    pushed = ls.push(tmp_path / "many", "memory://many")
    assert pushed.kind == "adapters"
    assert there(memory, "/many") == {f"{n}/{f}" for n in ("one", "two") for f in NAMES}
    with pytest.raises(ConfigError, match="cannot be pushed"):
        ls.push(3, "memory://three")
    # An adapter of PEFT gets a record, so that its files belong together; it says nothing new.
    plain = made(tmp_path / "plain")
    (plain / "lorasmith.json").unlink()
    ls.push(plain, "memory://plain")
    want = ls.read_adapter(plain)
    assert ls.read_adapter("memory://plain").config == want.config
    assert content("memory://plain") == content(plain)


def test_directories_of_this_machine(tmp_path: Path) -> None:
    old, new, at = made(tmp_path / "old"), made(tmp_path / "new", 1, r=5), tmp_path / "at"
    ls.push(old, at.as_uri())
    (at / "notes.txt").write_text("mine")
    with pytest.raises(AdapterFileError, match="already"):
        ls.push(new, at.as_uri())
    ls.push(new, at.as_uri(), overwrite=True)
    assert content(at) == content(new)
    assert {f.name for f in at.iterdir()} == NAMES | {"notes.txt"}


def test_what_is_refused(memory: Any, tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    for url, says in (("owner/name", "hf://owner/name"), (str(tmp_path / "x"), ".save")):
        with pytest.raises(ConfigError, match="not a URL") as caught:
            ls.push(one, url)
        assert says in str(caught.value)
    with pytest.raises(ConfigError, match="not a repository"):
        ls.push(one, "hf://name")
    ls.push(fleet(tmp_path / "f"), "memory://f")
    with pytest.raises(AdapterFileError, match="fleet already, and this is an adapter"):
        ls.push(one, "memory://f", overwrite=True)
    memory.pipe_file("/full/thesis.tex", b"...")
    with pytest.raises(AdapterFileError, match="not touched") as caught:
        ls.push(one, "memory://full", overwrite=True)
    assert "thesis.tex" in str(caught.value)
    bad = made(tmp_path / "bad")
    tensors = {k: v[:] for k, v in ls.read_adapter(one).tensors.items()}
    next(iter(tensors.values()))[0, 0] = float("nan")
    (bad / "lorasmith.json").unlink()
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="not finite") as caught:
        ls.push(bad, "memory://bad")
    assert str(bad) in str(caught.value)
    broken = fleet(tmp_path / "broken")
    data = bytearray((broken / "codes.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "codes.safetensors").write_bytes(data)
    with pytest.raises(AdapterFileError, match="not the one"):
        ls.push(broken, "memory://broken")
    assert not any(p.startswith(("/bad", "/broken")) for p in memory.store)
    with pytest.raises(AdapterFileError, match="no such adapter"):
        ls.push(tmp_path / "nothing", "memory://n")


# The hub --------------------------------------------------------------------------------------


class Hub:
    """The part of ``HfApi`` that is used, on a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.head = "0" * 40

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def files(self, repository: str) -> set[str]:
        at = self.root / repository
        return {p.relative_to(at).as_posix() for p in at.rglob("*") if p.is_file()}

    def repo_info(self, repository: str, **options: Any) -> Any:
        from types import SimpleNamespace

        from huggingface_hub.errors import RepositoryNotFoundError

        if not (self.root / repository).is_dir():
            # Its constructor wants an answer of a server.
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        names = sorted(self.files(repository))
        return SimpleNamespace(
            sha=self.head, siblings=[SimpleNamespace(rfilename=n) for n in names]
        )

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_repo", options))
        (self.root / repository).mkdir(parents=True)
        (self.root / repository / ".gitattributes").write_text("")

    def hf_hub_download(self, repository: str, name: str, **options: Any) -> str:
        return str(self.root / repository / name)

    def create_commit(self, repository: str, operations: Any, **options: Any) -> Any:
        from types import SimpleNamespace

        from huggingface_hub import CommitOperationAdd

        self.calls.append(("create_commit", options))
        if options["parent_commit"] != self.head:
            raise ValueError("412: somebody else has committed")
        for one in operations:
            file = self.root / repository / one.path_in_repo
            if isinstance(one, CommitOperationAdd):
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(one.path_or_fileobj, file)
            else:
                file.unlink()
        self.head = hashlib.sha1(self.head.encode()).hexdigest()
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/{self.head}")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    package = pytest.importorskip("huggingface_hub")
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(package, "HfApi", made)
    return made


def test_push_to_the_hub(fake: Hub, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one"), made(tmp_path / "two", 1, r=5)
    pushed = ls.push_to_hub(one, "me/one", token="hf_" + "x" * 20)
    assert pushed.url == "hf://me/one"
    assert pushed.commit is not None
    assert fake.files("me/one") == NAMES | {".gitattributes"}
    assert content(fake.root / "me" / "one") == content(one)
    calls = dict(fake.calls)
    assert calls["create_repo"]["private"] is True
    assert calls["token"]["token"] == "hf_" + "x" * 20
    assert "hf_x" not in json.dumps(pushed.to_dict())
    assert b"hf_x" not in b"".join(p.read_bytes() for p in (fake.root / "me/one").iterdir())
    with pytest.raises(AdapterFileError, match="already"):
        ls.push(two, "hf://me/one")
    (fake.root / "me/one/adapter_model.bin").write_text("old")
    again = ls.push(two, "hf://me/one", overwrite=True)
    assert again.replaced
    assert again.removed == ("adapter_model.bin",)
    assert content(fake.root / "me" / "one") == content(two)
    assert "| rank | 5 |" in (fake.root / "me/one/README.md").read_text()
    ls.push(fleet(tmp_path / "f"), "hf://me/one/fleets/f", private=False)
    assert {n for n in fake.files("me/one") if n.startswith("fleets/")} == {
        f"fleets/f/{n}" for n in FLEET
    }
    assert content(fake.root / "me/one/fleets/f") == content(tmp_path / "f")


def test_the_hub_refuses(fake: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(tmp_path / "one")
    with pytest.raises(ConfigError, match="name of a repository"):
        ls.push_to_hub(one, "one")
    looked = fake.repo_info

    def overtaken(repository: str, **options: Any) -> Any:
        found = looked(repository, **options)
        fake.head = "f" * 40
        return found

    fake.create_repo("me/one")
    monkeypatch.setattr(fake, "repo_info", overtaken)
    with pytest.raises(AdapterFileError, match="did not take it: 412"):
        ls.push_to_hub(one, "me/one")
    assert fake.files("me/one") == {".gitattributes"}


def test_offline_the_hub_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(AdapterFileError, match="did not take it"):
        ls.push_to_hub(made(tmp_path / "one"), "me/one")


# The card -------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "status": "finished",
    "steps": 32,
    "rows": 512,
    "tokens": 32648,
    "seconds": 79.8,
    "final_loss": 0.0048,
    "eval_loss": 0.5,
    "evaluations": [{"step": 32, "loss": 0.5, "tokens": 704, "tasks": {"a": 0.25}}],
    "device": "cpu",
    "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "config": {
        "data": "a=me/rows,b=/home/somebody/private/rows.jsonl",
        "eval_data": "builtin:dates-en",
        "output": "/home/somebody/runs/x",
        "lr": 0.001,
        "batch_size": 16,
        "dynamics": ["gauge", "entropy"],
        "dynamics_options": {"gauge": {"every": 4}},
        "run_name": "token hf_abcdefghijklmnopqrst",
    },
    "versions": {"torch": "2.13.0 hf_abcdefghijklmnopqrst"},
}


def card_of(memory: Any, folder: Path) -> tuple[dict[str, Any], str]:
    ls.push(folder, "memory://card", overwrite=True)
    text = memory.cat("/card/README.md").decode()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_tells_of_the_run(memory: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    (folder / "training.json").write_text(json.dumps(RUN))
    head, body = card_of(memory, folder)
    assert head == {
        "base_model": RUN["base"],
        "library_name": "peft",
        "license": "unknown",
        "datasets": ["me/rows"],
        "tags": ["lorasmith", "lora", f"base_model:adapter:{RUN['base']}"],
    }
    for row in (
        "| rank | 3 |",
        "| alpha | 6 |",
        "| data, task a | me/rows |",
        "| data, task b | rows.jsonl |",
        "| evaluated on | builtin:dates-en |",
        "| rows | 512 |",
        "| tokens | 32,648 |",
        "| steps | 32 |",
        "| lr | 0.001 |",
        "| gauge | every 4 |",
        "| entropy | defaults |",
        "| perplexity | 1.649 |",
        "| evaluation loss, task a | 0.25 |",
    ):
        assert row in body, row
    assert "ls.load(model, " in body
    assert "PeftModel.from_pretrained" in body
    assert "--max-lora-rank 8" in body
    assert "somebody" not in body
    assert "hf_abc" not in body
    for block in body.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_a_card_of_hostile_names(memory: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = 'x"\n---\nlicense: mit\n```\n<script>'
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "lorasmith.json").unlink()
    run = {**RUN, "status": "done |\n\n# Heading <script>", "config": {"data": [1], "lr": "`|"}}
    (folder / "training.json").write_text(json.dumps(run))
    head, body = card_of(memory, folder)
    assert head["license"] == "unknown"
    assert "base_model" not in head
    assert "\n# Heading" not in body
    outside = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", body).replace("\\<", "")
    assert "<script" not in outside
    assert "script" in outside  # it is there, and harmless
    (folder / "training.json").write_text("{")
    with pytest.warns(UserWarning, match="card says nothing of the run"):
        card_of(memory, folder)


# The command ----------------------------------------------------------------------------------


def test_the_command(memory: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = made(tmp_path / "one")
    assert main(["push", str(one), "memory://cli", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert set(told["files"]) == NAMES
    assert told["kind"] == "adapter"
    assert main(["push", str(one), "memory://cli"]) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert main(["push", str(one), "memory://cli", "--overwrite", "--no-card"]) == 0
    assert "an older one" in capfd.readouterr().out
    assert main(["push", str(one), "s4://nobody/knows", "--json"]) == 2
