"""A tiny random Llama with a tokenizer and a chat template, rows for it, and a short run.

As directories and files they are the fixtures ``base`` and ``rows``, which all tests share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.training.config import AdapterOptions, TrainConfig

__all__ = [
    "MULTI",
    "ROWS",
    "SYSTEM",
    "TEMPLATE",
    "load_no_model",
    "make_config",
    "make_model",
    "make_tokenizer",
    "save_tiny",
    "write_rows",
]

SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: Rows of very different lengths, so that padding and packing both have something to do.
ROWS = [
    {"prompt": f"Count to {n}." + " please" * (n % 5), "completion": " ".join(map(str, range(n)))}
    for n in range(2, 26)
]


#: A stress controller that goes to Multi as soon as it may.
MULTI: dict[str, Any] = {
    "weights": [0.0, 1.0, 1.0],
    "multi": [0.0, 1e-6],
    "mirror": [0.98, 0.99],
    "cooldown": 2,
    "every": 1,
}


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer without a padding token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        [SYSTEM, "Count to please system user assistant\n"] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: Any, *, seed: int = 0, **changes: Any) -> Any:
    """A Llama of hidden size 32 with two layers, float32, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def save_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Writes model and tokenizer as ``from_pretrained`` reads them."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, str]] | None = None) -> Path:
    """Writes rows as JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    path.write_text(text, encoding="utf-8")
    return path


def make_config(base: Path, rows: Path | str, output: Path, **changes: Any) -> TrainConfig:
    """One epoch of LoRA on the tiny model, quick to learn, with every step logged."""
    settings: dict[str, Any] = {
        "output": output,
        "adapter": AdapterOptions(r=4),
        "batch_size": 4,
        "steps": 6,
        "lr": 1e-2,
        "log_steps": 1,
        "device": "cpu",
    }
    return TrainConfig(str(base), str(rows), **{**settings, **changes})


def load_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run fail that comes to loading its model."""
    monkeypatch.setattr(
        "lorasmith.training.run.load_model", lambda *_, **__: pytest.fail("it was loaded")
    )
