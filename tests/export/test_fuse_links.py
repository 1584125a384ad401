"""Files beside an adapter that lead out of its directory never get into a fused model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import lorasmith as ls
from lorasmith.errors import AdapterFileError, LorasmithError
from tests.io import support
from tests.training.tiny import make_tokenizer

SECRET = '{"secret": 1}'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("links") / "base"
    support.llama().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """With a tokenizer of its own; a file lies outside."""
    folder = support.foreign(support.saved(tmp_path / "adapter"))
    (tmp_path / "secret.json").write_text(SECRET)
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    return folder


NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "merges.txt",
    "spiece.model",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["relative", "absolute", "of a link"])
def test_a_link_out_is_refused_before_anything_is_written(
    name: str, how: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (adapter / name).unlink(missing_ok=True)
    secret = tmp_path / "secret.json"
    if how == "of a link":
        (adapter / "inside").symlink_to(secret)
        secret = adapter / "inside"
    (adapter / name).symlink_to(Path("..") / secret.name if how == "relative" else secret)
    before = {p: os.lstat(p).st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(LorasmithError, match="leads out") as caught:
        ls.fuse_checkpoint(base, adapter, tmp_path / "out", verify=False)
    assert isinstance(caught.value, AdapterFileError)
    assert caught.value.file == str(adapter / name)
    assert caught.value.key == name
    after = {p: os.lstat(p).st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".out.lock"}
    assert after == before


def test_links_within_are_copied_as_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "made")
    own = json.loads((tmp_path / "made" / "tokenizer.json").read_text())
    own["added_tokens"] = []
    (adapter / "files").mkdir()
    (adapter / "files" / "t.json").write_text(json.dumps(own))
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer.json").symlink_to("files/t.json")
    (adapter / "tokenizer_config.json").symlink_to(tmp_path / "nowhere")  # there is no such file
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", verify=False)
    assert report.tokenizer == "adapter"
    out = tmp_path / "out"
    assert json.loads((out / "tokenizer.json").read_text()) == own
    assert not any(path.is_symlink() for path in out.iterdir())
    assert not (out / "tokenizer_config.json").exists()


def test_what_is_no_tokenizer_is_not_looked_at(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Other files of a stranger's, linked or not, stay where they are; so do those of two."""
    for name in ("README.md", "notes.json", "code.py", "generation_config.json"):
        (adapter / name).symlink_to(tmp_path / "secret.json")
    ls.fuse_checkpoint(base, adapter, tmp_path / "one", verify=False)
    (adapter / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    other = support.foreign(support.saved(tmp_path / "other"))
    both = {str(adapter): 1.0, str(other): 0.5}
    ls.fuse_checkpoint(base, both, tmp_path / "two", verify=False)
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert not any(SECRET.encode() in p.read_bytes() for p in folder.iterdir())
        assert not any(path.is_symlink() for path in folder.iterdir())
