"""Tiny random models of every shape that the engine must carry, and how to call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "Family",
    "distilbert",
    "distilbert_classifier",
    "gpt2",
    "llama",
    "main_output",
    "mlp",
    "randomise",
    "run",
]


def llama(*, layers: int = 2, seed: int = 0, **changes: Any) -> nn.Module:
    """A Llama with grouped-query attention: 4 heads, 2 key-value heads, hidden size 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    return model.eval()


def gpt2(*, layers: int = 2, seed: int = 0, n_positions: int = 32) -> nn.Module:
    """A GPT-2, whose layers are ``Conv1D`` (weight [d_in, d_out]) with biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=n_positions,
            n_embd=16,
            n_layer=layers,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.2,
        )
    )
    return _with_biases(model).eval()


def distilbert(*, seed: int = 0) -> nn.Module:
    """A DistilBERT: linear layers with biases and names of its own (``q_lin``, ``lin1``)."""
    from transformers import DistilBertModel

    torch.manual_seed(seed)
    model: nn.Module = DistilBertModel(_distilbert_config())
    return _with_biases(model).eval()


def distilbert_classifier(*, seed: int = 0) -> nn.Module:
    """A DistilBERT that classifies: heads ``pre_classifier`` and ``classifier``."""
    from transformers import DistilBertForSequenceClassification

    torch.manual_seed(seed)
    config = _distilbert_config(num_labels=3)
    model: nn.Module = DistilBertForSequenceClassification(config)
    return _with_biases(model).eval()


def _distilbert_config(**changes: Any) -> Any:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=32,
        max_position_embeddings=32,
        n_layers=2,
        n_heads=2,
        dim=16,
        hidden_dim=24,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.2,
        **changes,
    )


def mlp(*, seed: int = 0, bias: bool = True, inplace: bool = False) -> nn.Module:
    """Two linear layers, "0" [8, 6] and "2" [5, 8]; with ``inplace`` a ReLU in place."""
    torch.manual_seed(seed)
    middle: nn.Module = nn.ReLU(inplace=True) if inplace else nn.Tanh()
    return nn.Sequential(nn.Linear(6, 8, bias=bias), middle, nn.Linear(8, 5, bias=bias))


def _with_biases(model: nn.Module) -> nn.Module:
    # Transformers starts biases at zero, which would hide every error in handling them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def _tokens(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 32, (2, 7), generator=generator)}


def _features(seed: int = 0) -> dict[str, Tensor]:
    return {"input": torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed))}


@dataclass(frozen=True)
class Family:
    """A kind of model: how to build one, and what to feed it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Tensor]]


FAMILIES = {
    family.name: family
    for family in (
        Family("mlp", mlp, _features),
        Family("llama", llama, _tokens),
        Family("gpt2", gpt2, _tokens),
        Family("distilbert", distilbert, _tokens),
        Family("classifier", distilbert_classifier, _tokens),
    )
}


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The output that matters: see :func:`main_output`."""
    return main_output(model(**batch))


def main_output(output: Any) -> Tensor:
    """Logits, last hidden state, or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None:
        found = output.last_hidden_state
    assert isinstance(found, Tensor)
    return found


def randomise(parameters: Any, scale: float = 0.2, seed: int = 1) -> None:
    """Moves parameters away from where they started, so that an adapter acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))
