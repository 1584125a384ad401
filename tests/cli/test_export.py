"""``lorasmith export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from tests.io import support
from tests.io.ggufs import write_gguf
from tests.training.tiny import make_model, make_tokenizer, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:The adapter names")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two layers, with a tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("base"))


def test_gguf(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(support.llama(), tmp_path / "base.gguf", "llama")
    path = support.saved(tmp_path / "adapter", ls.LoRAConfig(r=4, targets="all-linear"))
    done = call("export", path, "--base", file, "-o", tmp_path / "out", "--dtype", "float16")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "adapter.gguf").is_file()
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert f"FROM {file}" in text.splitlines()
    assert "llama-cli -m" in done.out
    again = call("export", path, "--base", file, "-o", tmp_path / "out")
    assert again.code == 2
    assert "--overwrite" in again.err
    done = call("export", path, "--base", file, "-o", tmp_path / "out", "--overwrite", "--json")
    assert done.json["to"] == "gguf"
    assert done.json["files"] == ["adapter.gguf", "Modelfile"]
    assert done.json["rounding"] == 0


def test_servers(call: Any, tmp_path: Path, base: Path) -> None:
    config = ls.LoRAConfig(r=4, rank_pattern={"v_proj": 9}, targets=["q_proj", "v_proj"])
    path = support.saved(tmp_path / "adapter", config, make_model(make_tokenizer()))
    for server, words in (
        ("vllm", ("vllm serve", "--max-lora-rank 16")),
        ("sglang", ("sglang.launch_server", "--max-lora-rank 9")),
        ("tgi", ("text-generation-launcher", "--lora-adapters mine=")),
    ):
        done = call(
            *("export", path, "--to", server, "-o", tmp_path / server),
            *("--base", base, "--name", "mine", "--json"),
        )
        assert done.code == 0, done.err
        assert all(word in done.json["commands"][0] for word in words)
        fields = json.loads((tmp_path / server / "adapter_config.json").read_text())
        assert (fields["r"], fields["rank_pattern"]) == (9, {})


def test_dora_is_converted_with_the_base(call: Any, tmp_path: Path, base: Path) -> None:
    config = ls.DoRAConfig(r=4, targets=["q_proj"])
    path = support.saved(tmp_path / "adapter", config, make_model(make_tokenizer()))
    refused = call("export", path, "--to", "vllm", "-o", tmp_path / "out", "--json")
    assert refused.code == 2
    assert "--rank" in refused.err + refused.out
    done = call(
        *("export", path, "--to", "vllm", "-o", tmp_path / "out"),
        *("--rank", "32", "--base", base, "--json"),
    )
    assert done.code == 0, done.err
    assert done.json["source"] == "dora"
    assert 0 < done.json["relative_error"] < 1e-5
    assert done.json["conversion"]["layers"]
    assert done.json["max_lora_rank"] == 32


def test_mistakes(call: Any, tmp_path: Path) -> None:
    path = support.saved(tmp_path / "adapter")
    for more in (("--to", "onnx"), ("--to", "vllm", "--dtype", "q8_0"), ("--base", "nowhere/no")):
        done = call("export", path, "-o", tmp_path / "out", *more)
        assert done.code == 2, (more, done.err)
        assert not (tmp_path / "out").exists()
