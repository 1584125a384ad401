"""``lorasmith info MODEL``: heads, θ_crit and what adapters would train, from shapes alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from tests.models import gpt2
from tests.training.tiny import make_model, make_tokenizer, save_tiny

QKVO = ("--targets", "q_proj", "k_proj", "v_proj", "o_proj")


def write_config(folder: Path, **fields: Any) -> Path:
    """A model's directory without a single weight."""
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_llama_3_2_1b(call: Any, tmp_path: Path) -> None:
    """EgoRA's README says 6,553,600 parameters, and its command θ_crit = 1.27°."""
    model = write_config(
        tmp_path,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    found = call("info", model, "--r", "16", *QKVO, "--json").json
    assert (found["layers"], found["heads"], found["kv_heads"]) == (16, 32, 8)
    assert found["head_dim"] == 64
    assert found["theta_crit_deg"] == pytest.approx(7.1808, abs=1e-4)
    assert found["parameters"] == 1_235_814_400
    assert found["variants"]["lora"] == {
        "r": 16,
        "layers": 64,
        "parameters": 3_407_872,
        "note": None,
    }
    assert found["variants"]["lora"]["parameters"] == 16 * 16 * (2 * 4096 + 2 * 2560)
    shown = call("info", model, "--r", "16", *QKVO).out
    assert "3,407,872" in shown
    assert "θ_crit" in shown
    assert "7.18°" in shown


def test_a_head_dim_of_its_own(call: Any, tmp_path: Path) -> None:
    """Hidden size over heads would be 16; the query rows say 24."""
    model = write_config(
        tmp_path,
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        vocab_size=100,
    )
    found = call("info", model, "--json").json
    assert (found["heads"], found["kv_heads"], found["head_dim"]) == (4, 1, 24)
    assert found["theta_crit_deg"] == pytest.approx(math.degrees(math.asin(24**-0.5)))


def test_fused_and_multi_query_attention(call: Any, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    gpt2().config.save_pretrained(tmp_path / "gpt2")
    found = call("info", tmp_path / "gpt2", "--json").json
    assert (found["heads"], found["kv_heads"], found["head_dim"]) == (2, 2, 8)
    (tmp_path / "falcon").mkdir()
    falcon = write_config(
        tmp_path / "falcon",
        model_type="falcon",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        multi_query=True,
        new_decoder_architecture=False,
        vocab_size=100,
    )
    found = call("info", falcon, "--json").json
    assert (found["heads"], found["kv_heads"], found["head_dim"]) == (4, 1, 16)


@pytest.mark.parametrize("rank", [1, 5])
def test_the_counts_are_those_of_attached_adapters(call: Any, tmp_path: Path, rank: int) -> None:
    base = save_tiny(tmp_path)
    found = call("info", base, "--r", str(rank), "--json").json["variants"]
    assert set(found) == set(ls.variants())
    for name, config in (
        ("lora", ls.LoRAConfig(r=rank)),
        ("dora", ls.DoRAConfig(r=rank)),
        ("ia3", ls.IA3Config()),
        ("miss", ls.MiSSConfig(r=rank)),
    ):
        if found[name]["parameters"] is None:
            assert found[name]["note"], name
            continue
        handle = ls.attach(make_model(make_tokenizer()), config)
        assert found[name]["parameters"] == sum(p.numel() for p in handle.parameters()), name
        assert found[name]["layers"] == len(handle.layers())


def test_no_weights_are_needed_and_no_code_is_run(call: Any, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model = write_config(
        tmp_path,
        model_type="own",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )
    called = call("info", model, "--json")
    assert called.code == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "q_porj"], "q_proj"),
        (["--r", "0"], "r"),
    ],
)
def test_mistakes(call: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    called = call("info", save_tiny(tmp_path), *arguments)
    assert called.code == 2
    assert said in called.err


def test_ranks_are_for_models(call: Any, tmp_path: Path) -> None:
    model = make_model(make_tokenizer())
    ls.attach(model, ls.LoRAConfig(r=2))
    ls.save(model, tmp_path / "a")
    called = call("info", tmp_path / "a", "--r", "4", "--json")
    assert called.code == 2
    assert called.json["error"]["key"] == "--r"
