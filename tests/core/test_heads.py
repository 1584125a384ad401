"""Which rows belong to which head, against what the models themselves do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel

from lorasmith.core.heads import head_layout
from tests.models import distilbert, distilbert_classifier, gpt2, llama, mlp

_SEEN: list[tuple[Tensor, Tensor, Tensor]] = []


def _capture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """An attention that notes what it is given, and whose output numbers its columns by head."""
    _SEEN.append((query, key, value))
    batch, heads, tokens, _size = query.shape
    out = torch.arange(heads, dtype=query.dtype).view(1, heads, 1, 1)
    return out.expand(batch, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register("lorasmith_capture", _capture)

_COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
}


def build(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_COMMON, **changes})
    model: nn.Module = AutoModel.from_config(config, attn_implementation="lorasmith_capture")
    return model.eval()


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama-head_dim": ("llama", {"num_key_value_heads": 2, "head_dim": 6}),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "phi": ("phi", {"num_key_value_heads": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": True}),
    "gpt_bigcode-mha": ("gpt_bigcode", {"multi_query": False}),
    "bert": ("bert", {}),
    "roberta": ("roberta", {"pad_token_id": 0}),
    "distilbert": ("distilbert", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_where_the_model_takes_them_from(name: str) -> None:
    """Every row gives its own number (weight 0, bias i), and the attention says who got it."""
    kind, changes = MODELS[name]
    model = build(kind, **changes)
    layouts = head_layout(model)
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def number(module: nn.Module, args: Any, output: Tensor, key: str) -> Tensor:
        inputs[key] = args[0]
        outputs[key] = torch.arange(output.shape[-1], dtype=output.dtype).expand_as(output)
        return outputs[key]

    for key in layouts:
        model.get_submodule(key).register_forward_hook(
            lambda m, a, o, key=key: number(m, a, o, key)
        )
    _SEEN.clear()
    with torch.no_grad():
        # One token, at position 0, which no rotary embedding turns.
        model(torch.tensor([[3]]), attention_mask=torch.ones(1, 1, dtype=torch.long))
    (seen,) = _SEEN
    taken = {
        (role, head): seen[i][0, head, 0].tolist()
        for i, role in enumerate("qkv")
        for head in range(seen[i].shape[1])
    }
    claimed: dict[tuple[str, int], list[float]] = {}
    for layout in layouts.values():
        if layout.axis == "out":
            for block, unit in enumerate(layout.heads):
                size = layout.head_dim
                claimed[unit] = [float(x) for x in range(block * size, (block + 1) * size)]
    assert claimed == taken
    outs = {k: layout for k, layout in layouts.items() if layout.axis == "in"}
    assert len(outs) == 1
    ((key, layout),) = outs.items()
    expected = [h for _, h in layout.heads for _ in range(layout.head_dim)]
    assert inputs[key].flatten().tolist() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_query": True},
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
)
def test_falcon(changes: dict[str, Any]) -> None:
    """Falcon's own ``_split_heads``, on rows that give their own number."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        hidden_size=32, num_attention_heads=8, num_hidden_layers=1, vocab_size=16, **changes
    )
    model = transformers.FalconModel(config)
    layouts = head_layout(model)
    assert layouts["h.0.self_attention.dense"].axis == "in"
    layout = layouts["h.0.self_attention.query_key_value"]
    attention = model.h[0].self_attention
    rows = torch.arange(attention.query_key_value.out_features).view(1, 1, -1)
    parts = attention._split_heads(rows)
    repeated = 4 if changes.get("new_decoder_architecture") else 1
    for block, (role, head) in enumerate(layout.heads):
        part = parts["qkv".index(role)][0, 0]
        first = head if role == "q" else head * repeated
        assert part[first].tolist() == list(range(block * 4, (block + 1) * 4))
    kv = {True: 2}.get("num_kv_heads" in changes, 1 if changes.get("multi_query") else 8)
    assert sorted(layout.heads) == sorted(
        [("q", h) for h in range(8)] + [(x, h) for x in "kv" for h in range(kv)]  # type: ignore[misc]
    )


def test_bloom_and_codegen() -> None:
    torch.manual_seed(0)
    bloom = transformers.BloomModel(
        transformers.BloomConfig(hidden_size=32, n_head=8, n_layer=1, vocab_size=16)
    )
    layout = head_layout(bloom)["h.0.self_attention.query_key_value"]
    parts = bloom.h[0].self_attention._reshape(torch.arange(96).view(1, 1, -1))
    for block, (role, head) in enumerate(layout.heads):
        values = parts["qkv".index(role)].reshape(8, 4)[head].tolist()
        assert values == list(range(block * 4, (block + 1) * 4))
    codegen = transformers.CodeGenModel(
        transformers.CodeGenConfig(
            n_embd=32, n_head=8, n_layer=1, vocab_size=16, rotary_dim=4, n_positions=8
        )
    )
    layout = head_layout(codegen)["h.0.attn.qkv_proj"]
    attention = codegen.h[0].attn
    seen: dict[str, Tensor] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        seen.update(q=query, k=key, v=value)
        return torch.zeros_like(query), None

    attention._attn = attend
    attention.qkv_proj.register_forward_hook(
        lambda m, a, o: torch.arange(96, dtype=o.dtype).expand_as(o)
    )
    with torch.no_grad():
        codegen(torch.tensor([[3]]))
    for block, (role, head) in enumerate(layout.heads):
        values = seen[role][0, head, 0].tolist()
        assert values == [float(x) for x in range(block * 4, (block + 1) * 4)]


def test_what_is_no_projection_of_heads_has_no_layout() -> None:
    assert head_layout(mlp()) == {}
    names = set(head_layout(llama()))
    assert names == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    names = set(head_layout(gpt2()))
    assert names == {f"transformer.h.{i}.attn.{p}" for i in range(2) for p in ("c_attn", "c_proj")}
    for model, prefix in ((distilbert(), ""), (distilbert_classifier(), "distilbert.")):
        assert set(head_layout(model)) == {
            f"{prefix}transformer.layer.{i}.attention.{p}"
            for i in range(2)
            for p in ("q_lin", "k_lin", "v_lin", "out_lin")
        }
    config = transformers.RobertaConfig(**_COMMON)
    classifier = transformers.RobertaForSequenceClassification(config)
    assert not any("classifier" in name for name in head_layout(classifier))


def test_an_unknown_fused_layout_is_not_guessed() -> None:
    model = gpt2()
    model.config.model_type = "somebody's"  # type: ignore[union-attr]
    assert not any(name.endswith("c_attn") for name in head_layout(model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_names() -> None:
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    plain = {f"base_model.model.{name}": layout for name, layout in head_layout(llama()).items()}
    assert head_layout(model) == plain
