"""The tokenizer's record: what changes it, where it is written, who compares it."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.errors import AdapterFileError, BaseMismatchError
from lorasmith.io.tokenizers import TokenizerRecord, check_tokenizer
from tests.training.tiny import make_model, make_tokenizer, save_tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_hashes_are_those_of_the_definition(tokenizer: Any) -> None:
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    text = json.dumps([tokenizer.eos_token_id, *map(list, pairs)])
    record = TokenizerRecord.of(tokenizer)
    assert record.vocabulary == hashlib.sha256(text.encode()).hexdigest()
    template = json.dumps(tokenizer.chat_template)
    assert record.template == hashlib.sha256(template.encode()).hexdigest()
    assert record.tokens == len(pairs)
    assert TokenizerRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert TokenizerRecord.of(record) is record


def test_what_changes_it(tokenizer: Any) -> None:
    record = TokenizerRecord.of(tokenizer)
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    assert TokenizerRecord.of(padded) == record
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "<pad>"})
    assert TokenizerRecord.of(own) == record
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    assert TokenizerRecord.of(larger).vocabulary != record.vocabulary
    other_end = copy.deepcopy(tokenizer)
    other_end.eos_token = "<|im_start|>"
    assert TokenizerRecord.of(other_end).vocabulary != record.vocabulary
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert TokenizerRecord.of(bare).vocabulary == record.vocabulary
    assert TokenizerRecord.of(bare).template is None


def test_comparing(tokenizer: Any, recwarn: pytest.WarningsRecorder) -> None:
    record = TokenizerRecord.of(tokenizer)
    check_tokenizer(None, tokenizer)
    check_tokenizer(record, tokenizer)
    assert not recwarn.list
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.warns(UserWarning, match="another chat template.*no chat template here"):
        check_tokenizer(record, bare)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    with pytest.raises(BaseMismatchError, match="another tokenizer") as caught:
        check_tokenizer(record, larger, file="there")
    assert (caught.value.file, caught.value.key) == ("there", "base.tokenizer")
    with pytest.warns(UserWarning, match="another tokenizer"):
        check_tokenizer(record, larger, allow=True)


def test_it_is_written_read_and_kept(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(tokenizer)
    ls.attach(model, ls.LoRAConfig(r=2))
    plain = ls.read_adapter(ls.save(model, tmp_path / "plain"))
    assert plain.base.tokenizer is None
    saved = ls.read_adapter(ls.save(model, tmp_path / "told", tokenizer=tokenizer))
    assert saved.base.tokenizer == TokenizerRecord.of(tokenizer)
    again = ls.read_adapter(saved.save(tmp_path / "again"))
    assert again.base == saved.base


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {},
        {"vocabulary": "x", "template": None, "tokens": 1},
        {"vocabulary": "0" * 64, "template": 5, "tokens": 1},
        {"vocabulary": "0" * 64, "template": None, "tokens": -1},
        {"vocabulary": "0" * 64, "template": None, "tokens": True},
    ],
)
def test_a_malformed_record_is_refused(tokenizer: Any, tmp_path: Path, bad: Any) -> None:
    model = make_model(tokenizer)
    ls.attach(model, ls.LoRAConfig(r=2))
    path = ls.save(model, tmp_path / "a", tokenizer=tokenizer)
    record = json.loads((path / "lorasmith.json").read_text())
    record["base"]["tokenizer"] = bad
    (path / "lorasmith.json").write_text(json.dumps(record))
    with pytest.raises(AdapterFileError) as caught:
        ls.read_adapter(path)
    assert caught.value.key == "base.tokenizer"
    assert caught.value.file == str(path / "lorasmith.json")


@pytest.mark.filterwarnings("always")
def test_commands_compare_it(
    tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """generate and eval, on the same base with another tokenizer or template beside it."""
    base = save_tiny(tmp_path / "base")
    model = make_model(tokenizer)
    model.name_or_path = str(base)
    ls.attach(model, ls.LoRAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = ls.save(model, tmp_path / "adapter", tokenizer=tokenizer)
    ends = copy.deepcopy(tokenizer)
    ends.eos_token = "<|im_start|>"
    ends.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    options = ["--adapter", str(adapter), "--device", "cpu", "--json"]
    commands = (
        ["generate", str(base), "Count", "--max-new-tokens", "1", *options],
        ["eval", str(base), str(rows), *options],
    )
    for command in commands:
        capfd.readouterr()
        assert main(command) != 0
        out, _ = capfd.readouterr()
        error = json.loads(out)["error"]
        assert error["key"] == "base.tokenizer"
        assert "--allow-tokenizer-mismatch" in error["fix"]
    assert main([*commands[0], "--allow-tokenizer-mismatch"]) == 0
    assert "another tokenizer" in capfd.readouterr()[1]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bare.save_pretrained(base)
    assert main(commands[0]) == 0
    assert "another chat template" in capfd.readouterr()[1]
