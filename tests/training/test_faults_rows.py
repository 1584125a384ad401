"""Rows that a run refuses, wherever in the data they stand, and what it says of them."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import DataError, ModelError
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.data import load_rows
from lorasmith.training.models import load_model
from lorasmith.training.run import train
from tests.training.tiny import ROWS, make_model, make_tokenizer, save_tiny, write_rows

Train = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Train:
    """Trains a step on a file; the model must be as it was, and no output be left, if it fails."""

    def call(data: object, **changes: Any) -> Any:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        settings: dict[str, Any] = {"adapter": AdapterOptions(r=2), "steps": 1, "device": "cpu"}
        config = TrainConfig("tiny", str(data), output=tmp_path / "out", **{**settings, **changes})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            return train(config, model=model, tokenizer=tokenizer, progress=False)
        except Exception:
            after = model.state_dict()
            assert after.keys() == before.keys()
            assert all(bool((after[name] == value).all()) for name, value in before.items())
            assert not (tmp_path / "out").exists()
            raise

    return call


def _whole(error: DataError | ModelError, file: object, key: str) -> None:
    """All five are said."""
    assert error.file == str(file)
    assert error.key == key
    assert error.expected is not None
    assert error.got is not None
    assert error.fix is not None


#: Rows that stand behind good ones → what is said, and the key.
LATER: dict[str, tuple[str, str, str]] = {
    "other columns": ('{"source": "a", "target": "b"}', "Row 3 has none", "data"),
    "null": ('{"prompt": null, "completion": "x"}', "Row 3 has none", "data"),
    "true": ('{"prompt": true, "completion": "x"}', "Row 3: prompt is not text", "prompt"),
    "a list of texts": ('{"prompt": ["a"], "completion": "x"}', "Row 3: prompt has", "prompt"),
    "no task": ('{"prompt": "a", "completion": "x"}', "Row 3 has no task", "task"),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("option", ["data", "eval_data", "calibration"])
def test_a_bad_row_behind_good_ones_names_its_file(
    run: Train, tmp_path: Path, name: str, option: str
) -> None:
    line, said, key = LATER[name]
    task = {"task": "t"} if name == "no task" else {}
    if task and option == "calibration":
        pytest.skip("which task a row is of is no matter there")
    bad, good = tmp_path / "bad.jsonl", write_rows(tmp_path / "good.jsonl")
    bad.write_text("".join(json.dumps(row | task) + "\n" for row in ROWS[:3]) + line + "\n")
    init = {"adapter": AdapterOptions(r=2, init="eva")} if option == "calibration" else {}
    sources = {"data": str(good), option: str(bad)}
    with pytest.raises(DataError, match=said) as caught:
        run(sources.pop("data"), **sources, **init)
    _whole(caught.value, bad, key)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"instruction": "x", "instances": "y"}, "instances"),
        ({"instruction": "x", "instances": [1, 2]}, "instances"),
        ({"instruction": "x", "instances": [{"output": None}]}, "instances.output"),
        ({"prompt": "a", "completion": math.nan}, "completion"),
        ({"prompt": math.inf, "completion": "a"}, "prompt"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages"),
        ({"prompt": [["a"]], "completion": "x"}, "prompt"),
        ({"prompt": {"a": 1}, "completion": "x"}, "prompt"),
    ],
    ids=str,
)
def test_values_of_the_wrong_type(run: Train, tmp_path: Path, row: Any, key: str) -> None:
    """A number is taken as text, but NaN is what stands for no value in tables."""
    data = tmp_path / "a.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(DataError) as caught:
        run(data)
    _whole(caught.value, data, key)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"instruction": "x", "instances": []},
        {"text": ""},
    ],
    ids=str,
)
def test_nothing_to_learn(run: Train, tmp_path: Path, row: Any) -> None:
    """A longer limit would be no help, and is not suggested."""
    data = tmp_path / "a.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(DataError, match="No example with a supervised token") as caught:
        run(data)
    _whole(caught.value, data, "data")
    assert "max_length" not in str(caught.value.fix)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": " "},
        {"prompt": "", "completion": ""},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": ""},
            ]
        },
    ],
    ids=str,
)
def test_empty_answers(
    run: Train, tmp_path: Path, row: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them are refused; some are said, since an empty answer may be meant."""
    data = write_rows(tmp_path / "a.jsonl", [row] * 3)
    with pytest.raises(DataError, match="Every answer is empty") as caught:
        run(data)
    _whole(caught.value, data, "data")
    full: dict[str, Any] = {"prompt": "Count", "completion": "1"}
    if "messages" in row:
        full = {"messages": [row["messages"][0], {"role": "assistant", "content": "1"}]}
    write_rows(data, [row, full, row])
    run(data)
    assert "2 of 3 examples have an empty answer" in caplog.text


def test_a_conversation_that_begins_with_its_answer(run: Train, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(DataError, match="begins with the assistant") as caught:
        run(data)
    _whole(caught.value, data, "data")


DEEP = b"[" * 10**5 + b"]" * 10**5
#: Name and content → what is said, the key, and what the fix says.
FILES: dict[str, tuple[str, bytes, str, str, str]] = {
    "deep": ("a.jsonl", b'{"prompt": ' + DEEP + b"}\n", "Line 1 is not JSON", "line 1", "object"),
    "deep list": ("a.json", b'[{"prompt": ' + DEEP + b"}]", "cannot be read", "data", "whole"),
    "a column twice": (
        "a.jsonl",
        b'{"prompt": "a", "completion": "x"}\n{"prompt": "a", "prompt": "b", "completion": "x"}\n',
        "Line 2 cannot be read",
        "line 2",
        "leave one",
    ),
    "half a pair": ("a.jsonl", b'{"text": "a\\ud800b"}\n', "Line 1 cannot", "line 1", "anew"),
    "cut off": ("a.json", b'[{"prompt": "a"}, {"prom', "cannot be read", "data", "whole"),
    "a list a line": ("a.jsonl", b'[{"text": "a"}]\n', "Line 1 is not an", "line 1", "in .json"),
    "no parquet": ("a.parquet", b'{"text": "a"}\n', "as parquet", "data", "again"),
    "gz": ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "Unknown kind", "data", "unpack"),
    "yaml": ("a.yaml", b"a: 1\n", "Unknown kind", "data", "convert"),
    "a header twice": ("a.csv", b"a,a\n1,2\n", "header", "line 1", "of its own"),
    "too many cells": ("a.csv", b"a,b\n1,2,3,4\n5,6,7,8\n", "line 2 has", "line 2", "quotation"),
    "too few cells": ("a.csv", b'a,b\n"1\n2",2\n\n3\n', "line 5 has", "line 5", "fill in"),
    "too many tabs": ("a.tsv", b"a\tb\n1\t2\t3\n", "line 2 has", "line 2", "fill in"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_what_they_are_called(tmp_path: Path, name: str) -> None:
    file, content, said, key, fix = FILES[name]
    data = tmp_path / file
    data.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load_rows(str(data), cache_dir=tmp_path / "cache")
    _whole(caught.value, data, key)
    assert fix in str(caught.value.fix)


def test_a_parquet_file_under_another_name(tmp_path: Path) -> None:
    from datasets import Dataset

    data = tmp_path / "a.jsonl"
    Dataset.from_dict({"prompt": ["a"] * 3, "completion": ["b"] * 3}).to_parquet(str(data))
    with pytest.raises(DataError, match="looks like parquet") as caught:
        load_rows(str(data))
    assert ".parquet" in str(caught.value.fix)
    assert "iconv" not in str(caught.value.fix)


def test_cells_larger_than_csv_s_own_limit(tmp_path: Path) -> None:
    """Counting cells must not refuse what the reader takes."""
    data = tmp_path / "a.csv"
    data.write_text(f'prompt,completion\na,"{"b, " * 10**5}"\n   \n')
    (row,) = load_rows(str(data), cache_dir=tmp_path / "cache")
    assert row == {"prompt": "a", "completion": "b, " * 10**5}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_sockets_and_devices(tmp_path: Path) -> None:
    pipe, place = tmp_path / "a.jsonl", tmp_path / "s"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.bind(os.fspath(place))
        for path, kind in ((pipe, "a pipe"), (place, "a socket"), (Path(os.devnull), "a device")):
            with pytest.raises(DataError, match="neither a file nor a directory") as caught:
                load_rows(str(path))
            _whole(caught.value, path, "data")
            assert caught.value.got == kind


def test_a_directory_without_data(tmp_path: Path) -> None:
    folder = tmp_path / "a.jsonl"
    folder.mkdir()
    with pytest.raises(DataError) as caught:
        load_rows(str(folder), cache_dir=tmp_path / "cache")
    _whole(caught.value, folder, "data")
    with pytest.raises(DataError, match="no such data file") as missing:
        load_rows(str(tmp_path / "b.jsonl"))
    _whole(missing.value, tmp_path / "b.jsonl", "data")


# -- tokenizers --------------------------------------------------------------------------------


def _without(folder: Path, **values: str) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("eos_token", "pad_token", "unk_token"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings | values))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def test_tokenizers_that_cannot_be_trained_with(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    data = write_rows(tmp_path / "a.jsonl")
    config = TrainConfig(
        str(folder), str(data), output=tmp_path / "out", steps=1, device="cpu", dtype="float32"
    )
    _without(folder)
    with pytest.raises(ModelError, match="no padding token") as neither:
        train(config, progress=False)
    _whole(neither.value, folder, "pad_token")
    _without(folder, pad_token="<|im_start|>")
    with pytest.raises(DataError, match="no end-of-sequence token") as endless:
        train(config, progress=False)
    _whole(endless.value, folder, "eos_token")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_its_model(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer, vocab_size=len(tokenizer) - 20).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="more tokens than") as caught:
        load_model(tmp_path, device="cpu")
    _whole(caught.value, tmp_path, "vocab_size")
