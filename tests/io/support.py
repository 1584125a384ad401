"""Tiny random models, adapters with noise in them, and comparisons of whole models."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lorasmith as ls

#: Variants whose defaults fit every model; ``test_every_variant.py`` tries all of them.
PLAIN = ("dora", "ia3", "ia3_ff", "lora", "vera")
TOKENS = torch.arange(14).reshape(2, 7)


@functools.cache
def _llama() -> nn.Module:
    torch.manual_seed(10)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def _gpt2() -> nn.Module:
    torch.manual_seed(11)
    config = GPT2Config(
        vocab_size=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@functools.cache
def _distilbert() -> nn.Module:
    torch.manual_seed(12)
    config = DistilBertConfig(vocab_size=48, dim=32, hidden_dim=40, n_layers=2, n_heads=4)
    config.num_labels = 3
    return DistilBertForSequenceClassification(config).eval()


def llama() -> Any:
    """A Llama with grouped-query attention."""
    return copy.deepcopy(_llama())


def gpt2() -> Any:
    """A GPT-2, whose layers store transposed weights."""
    return copy.deepcopy(_gpt2())


def distilbert() -> Any:
    """A sequence classifier with the heads pre_classifier and classifier."""
    return copy.deepcopy(_distilbert())


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "distilbert": distilbert}


def logits(model: Any) -> Tensor:
    """What the model says about TOKENS."""
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def stir(parameters: Any, scale: float = 0.1) -> None:
    """Adds noise, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def attached(model: Any, config: Any = None, name: str = "default") -> ls.Adapter:
    """An adapter with noise in it."""
    config = config or ls.LoRAConfig(r=4)
    more: dict[str, Any] = {}
    if ls.variants()[config.variant].statistics(config):
        more["calibration"] = [{"input_ids": TOKENS}]
    adapter = ls.attach(model, config, name=name, **more)
    stir(adapter.parameters())
    return adapter


def saved(path: Path, config: Any = None, model: Any = None) -> Path:
    """An adapter of a Llama in a directory."""
    model = llama() if model is None else model
    attached(model, config)
    ls.save(model, path)
    return path


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Takes down all that a failed call must leave alone; the result asserts it."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    mode = {n: m.training for n, m in model.named_modules()}
    ids = {n: id(p) for n, p in model.named_parameters()}

    def check() -> None:
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], t) for n, t in before.items())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        } == hooks
        assert {n: m.training for n, m in model.named_modules()} == mode
        assert {n: id(p) for n, p in model.named_parameters()} == ids

    return check


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; ``None`` as a value is written as null."""
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})


def foreign(path: Path) -> Path:
    """Takes our own file away, so that the directory is as PEFT would have written it."""
    (path / "lorasmith.json").unlink()
    return path
