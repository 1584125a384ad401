"""lorasmith fuse: what it writes, says and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.training.models import load_model
from tests.models import randomise


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, paths = tmp_path_factory.mktemp("adapters"), []
    for i, config in enumerate((ls.LoRAConfig(r=2), ls.DoRAConfig(r=3))):
        model, _ = load_model(str(base), dtype="float32", device="cpu")
        handle = ls.attach(model, config)
        randomise(handle.parameters(), 0.05, seed=i)
        paths.append(ls.save(model, folder / f"task{i}"))
    return paths


def test_it_writes_a_model_and_says_how_near_it_is(
    call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    called = call("fuse", base, adapters[0], "-o", out, "--max-shard-size", "20KB", "--json")
    assert called.code == 0, called.err
    found = called.json
    assert found["dtype"] == "float32"
    assert found["shards"] > 1
    assert found["parity"]["drift"]["max"] < 1e-4
    assert found["parity"]["within"] is True
    assert len(found["layers"]) == 14
    model, tokenizer = load_model(str(out), dtype="float32", device="cpu")
    ids = torch.tensor([tokenizer("Count to 7.")["input_ids"]])
    attached, _ = load_model(str(base), dtype="float32", device="cpu")
    ls.load(attached, adapters[0])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, attached(input_ids=ids).logits, atol=2e-5, rtol=2e-5
        )
    again = call("fuse", base, adapters[0], "-o", out)
    assert again.code == 2
    assert "--overwrite" in again.err
    again = call("fuse", base, adapters[0], "-o", out, "--overwrite", "--dtype", "bfloat16")
    assert again.code == 0
    assert "bfloat16" in again.out
    assert "same first choice" in again.out
    assert not list(out.glob("model-*"))


def test_several_adapters_and_a_limit(
    call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Count to 3.\n\nCount to 9. please\n", encoding="utf-8")
    common = ["--weights", "0.6,0.4", "--prompts", prompts, "--json"]
    called = call("fuse", base, *adapters, "-o", tmp_path / "a", *common, "--max-kl", "1e-6")
    assert called.code == 0, called.err
    assert [a["weight"] for a in called.json["adapters"]] == [0.6, 0.4]
    assert called.json["parity"]["prompts"] == 2
    common += ["--dtype", "bfloat16", "--max-kl", "0"]
    called = call("fuse", base, *adapters, "-o", tmp_path / "b", *common)
    assert called.code == 3
    assert called.json["parity"]["drift"]["kl"] > 0


def test_without_parity(call: Any, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    called = call("fuse", base, adapters[1], "-o", tmp_path / "a", "--no-verify")
    assert called.code == 0
    assert "Logits" not in called.out
    assert "dora" in called.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "dtype"),
        (["--max-shard-size", "much"], "size"),
        (["--weights", "1,2"], "one finite weight"),
        (["--weights", "x"], "not numbers"),
        (["--weights", "nan"], "one finite weight"),
        (["--no-verify", "--max-kl", "1"], "--verify"),
        (["--max-kl", "nan"], "not a limit"),
        (["--prompts", "/nowhere.txt"], "cannot be read"),
    ],
)
def test_refusals(
    options: list[str], words: str, call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    called = call("fuse", base, adapters[0], "-o", tmp_path / "out", *options)
    assert called.code == 2
    assert words in called.err
    assert list(tmp_path.iterdir()) == []


def test_no_adapter_and_no_model(
    call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    called = call("fuse", base, "-o", tmp_path / "out")
    assert called.code == 2
    assert "no adapter" in called.err
    called = call("fuse", tmp_path / "nothing", adapters[0], "-o", tmp_path / "out", "--json")
    assert called.code == 2
    assert called.json["error"]["type"] == "ModelError"
    called = call("fuse", base, base, "-o", tmp_path / "out", "--json")
    assert called.json["error"]["type"] == "AdapterFileError"
    assert list(tmp_path.iterdir()) == []
