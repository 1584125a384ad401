"""Data, tokenizers and numbers that a run refuses before it trains, and how quickly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import main
from lorasmith.errors import ConfigError, DataError, ModelError
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.data import load_rows
from lorasmith.training.models import load_model
from lorasmith.training.run import train
from tests.training.tiny import (
    ROWS,
    load_no_model,
    make_model,
    make_tokenizer,
    save_tiny,
    write_rows,
)

#: Seconds within which a refusal must come, as the issue has it.
LIMIT = 2.0


@pytest.fixture(scope="module", autouse=True)
def warm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loads the libraries, so that what is measured is the check."""
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    load_rows(str(rows))
    load_model(base, device="cpu")


@contextmanager
def quickly(seconds: float = LIMIT) -> Iterator[None]:
    """Processor time, since other processes may be at work."""
    before = time.process_time()
    yield
    assert time.process_time() - before < seconds


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(data: Path, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "output": tmp_path / "out",
            "adapter": AdapterOptions(r=2),
            "steps": 1,
            "device": "cpu",
        }
        return TrainConfig(str(base), str(data), **{**settings, **changes})

    return make


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    load_no_model(monkeypatch)


# -- rows --------------------------------------------------------------------------------------

LATIN = json.dumps(ROWS[0]).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n'
BAD: dict[str, tuple[str, bytes, str, str]] = {
    "empty": ("a.jsonl", b"", "is empty", ""),
    "blank": ("a.jsonl", b"\n\n", "no rows", ""),
    "header alone": ("a.csv", b"prompt,completion\n", "no rows", ""),
    "empty list": ("a.json", b"[]", "", ""),
    "latin jsonl": ("a.jsonl", LATIN, "Line 2 is not UTF-8", "line 2"),
    "latin json": ("a.json", b'[{"prompt": "\xe9", "completion": "x"}]', "not UTF-8", "line 1"),
    "latin csv": ("a.csv", b"prompt,completion\na,b\ncaf\xe9,c\n", "Line 3 is not", "line 3"),
    "latin text": ("a.txt", b"one\ntwo \xff\n", "Line 2 is not UTF-8", "line 2"),
    "utf-16": ("a.jsonl", json.dumps(ROWS[0]).encode("utf-16"), "not UTF-8", "line 1"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "not UTF-8", "line 1"),
    "not json": ("a.jsonl", b'{"prompt": 1\n', "Line 1 is not JSON", ""),
    "columns": ("a.jsonl", b'{"source": "a", "target": "b"}\n', "none of the known", "data"),
    "types": ("a.jsonl", b'{"prompt": true, "completion": "x"}\n', "not text", "prompt"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("no_model")
def test_bad_rows_show_before_the_model_is_loaded(
    config: Callable[..., TrainConfig], tmp_path: Path, name: str
) -> None:
    file, content, said, key = BAD[name]
    data = tmp_path / file
    data.write_bytes(content)
    with quickly(), pytest.raises(DataError) as caught:
        train(config(data), progress=False)
    assert said in str(caught.value)
    assert caught.value.file == str(data)
    assert caught.value.key is not None
    assert caught.value.expected is not None
    assert caught.value.got is not None
    if key:
        assert caught.value.key == key
    assert not (tmp_path / "out").exists()


def test_utf_16_and_gzip_are_named(tmp_path: Path) -> None:
    for name, said in (("utf-16", "UTF-16"), ("gzip", "gzip")):
        data = tmp_path / "a.jsonl"
        data.write_bytes(BAD[name][1])
        with pytest.raises(DataError, match=said):
            load_rows(str(data))


def test_rows_without_a_label(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "long " * 50, "completion": "x"}] * 3)
    with quickly(), pytest.raises(DataError, match="No example with a supervised token") as caught:
        train(config(data, max_length=8), progress=False)
    assert caught.value.key == "data"
    assert "max_length" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["data", "eval_data"])
def test_labels_outside_the_vocabulary(
    config: Callable[..., TrainConfig], tmp_path: Path, column: str
) -> None:
    """The tokenizer has got a token that the model in memory has not."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    good = write_rows(tmp_path / "good.jsonl")
    bad = write_rows(
        tmp_path / "bad.jsonl", [*ROWS[:2], {"prompt": "say it", "completion": "<new>"}]
    )
    made = config(bad) if column == "data" else config(good, eval_data=str(bad))
    with quickly(), pytest.raises(DataError, match="in example 2") as caught:
        train(made, model=model, tokenizer=tokenizer, progress=False)
    assert caught.value.key == column
    assert caught.value.expected == f"token ids below {size}"
    assert caught.value.got == str(size)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_padding_token_outside_the_vocabulary(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    data = write_rows(tmp_path / "a.jsonl")
    with quickly(), pytest.raises(DataError) as caught:
        train(config(data), model=model, tokenizer=tokenizer, progress=False)
    assert caught.value.key == "pad_token_id"


def test_without_a_padding_token_the_end_pads(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Which token pads changes nothing: the loss is that with any other."""
    data = write_rows(tmp_path / "a.jsonl")
    losses = []
    for pad in (None, "<|im_start|>"):
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        if pad is not None:
            tokenizer.pad_token = pad
        assert (tokenizer.pad_token_id is None) == (pad is None)
        output = tmp_path / str(pad).strip("<|>")
        made = config(data, output=output, packing="off", batch_size=24)
        losses.append(train(made, model=model, tokenizer=tokenizer, progress=False).final_loss)
    assert losses[0] == losses[1]


def test_a_tokenizer_with_neither_padding_nor_end(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("eos_token", "pad_token", "unk_token"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with quickly(), pytest.raises(ModelError, match="no padding token"):
        load_model(folder, device="cpu")


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lr", "weight_decay", "max_grad_norm", "warmup", "epochs"])
@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf, -math.inf])
def test_numbers_that_cannot_be_trained_with(
    config: Callable[..., TrainConfig], tmp_path: Path, key: str, value: float
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path / "a.jsonl", **{key: value})
    assert caught.value.key == key
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("text", [".nan", "-1e-3", ".inf", "-.inf", "1e999", "fast"])
@pytest.mark.parametrize("where", ["yaml", "command line"])
def test_learning_rates_from_outside(
    text: str, where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "a.jsonl")
    arguments = ["train", "model", str(data), "-o", str(tmp_path / "out"), "--json"]
    if where == "yaml":
        (tmp_path / "c.yaml").write_text(f"lr: {text}\n")
        arguments += ["--config", str(tmp_path / "c.yaml")]
    else:
        arguments += [f"--lr={text.replace('.nan', 'nan').replace('.inf', 'inf')}"]
    with quickly():
        assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert "lr" in out + err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


# -- offline -----------------------------------------------------------------------------------


def test_offline_names_the_cache(tmp_path: Path) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    began = time.monotonic()
    with pytest.raises(ModelError) as model:
        load_model("nobody/no-such-model")
    with pytest.raises(DataError) as data:
        load_rows("nobody/no-such-rows", cache_dir=tmp_path)
    assert time.monotonic() - began < 5.0
    assert str(HF_HUB_CACHE) in str(model.value.got)
    assert "HF_HUB_OFFLINE" in str(model.value.got)
    assert str(tmp_path) in str(data.value.got)
    assert "HF_HUB_OFFLINE" in str(data.value.got)


def _ask(kind: str, cache: Path) -> None:
    if kind == "model":
        load_model("nobody/no-such-model")
    else:
        load_rows("nobody/no-such-rows", cache_dir=cache)


@pytest.mark.parametrize(("kind", "refusal"), [("model", ModelError), ("data", DataError)])
def test_a_hub_out_of_reach_names_the_cache(
    kind: str,
    refusal: type[ModelError | DataError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HF_HUB_OFFLINE is not set, and the address (RFC 5737) never answers."""
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1:9")
    began = time.monotonic()
    with pytest.raises(refusal) as caught:
        _ask(kind, tmp_path)
    assert time.monotonic() - began < 5.0
    assert str(constants.HF_HUB_CACHE if kind == "model" else tmp_path) in str(caught.value.got)
