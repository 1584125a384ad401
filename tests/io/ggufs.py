"""GGUF files of tiny models, written as llama.cpp's converter writes them.

Names, the order of rows and the orientation are spelt out here by hand, from what the
converter does (``LlamaModel.permute``, ``GPT2Model.modify_tensors``), and share no code with
the reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

__all__ = ["write_gguf"]

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def _permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Row by row: what stands in the two halves of a head comes to stand side by side."""
    size = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = weight[head * size + j]
            out[head * size + 2 * j + 1] = weight[head * size + size // 2 + j]
    return out


def write_gguf(
    model: nn.Module,
    path: Path,
    architecture: str,
    *,
    kind: str = "F32",
    extra: bool = True,
    vocabulary: bool = False,
) -> Path:
    """Writes a model.

    Args:
        model: A Llama-like model of Transformers, or a GPT-2.
        path: Where to.
        architecture: ``general.architecture``.
        kind: Storage type of the matrices.
        extra: Whether to write the keys that Transformers' configuration is made of.
        vocabulary: Whether to write what Transformers does not ask for and llama.cpp does: tokens
            (three special ones and names for the rest), and GPT-2's inner size.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    if extra:
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        if architecture == "gpt2":
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
            if not vocabulary:
                writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
        else:
            writer.add_feed_forward_length(config.intermediate_size)
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
            size = getattr(config, "head_dim", None)
            size = size or config.hidden_size // config.num_attention_heads
            writer.add_key_length(size)
            writer.add_value_length(size)
            writer.add_rope_dimension_count(size)
    if vocabulary:
        rest = config.vocab_size - 3
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i} " for i in range(rest))])
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_token_types([2, 3, 3, *[1] * rest])
        if architecture == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    names = _GPT2 if architecture == "gpt2" else _LLAMA
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, value in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if stem == "lm_head" and tied:
            continue
        place, inner = "", stem
        parts = stem.split(".")
        if any(p.isdecimal() for p in parts):
            at = next(i for i, p in enumerate(parts) if p.isdecimal())
            place, inner = f"blk.{parts[at]}.", ".".join(parts[at + 1 :])
        data = value.detach().float().numpy()
        there = names[inner]
        if architecture == "gpt2" and place and leaf == "weight" and data.ndim == 2:
            data = data.T
        if architecture == "llama" and there in ("attn_q", "attn_k"):
            groups = config.num_attention_heads
            data = _permuted(data, groups if there == "attn_q" else config.num_key_value_heads)
        stored = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
        data = np.ascontiguousarray(data)
        writer.add_tensor(f"{place}{there}.{leaf}", gguf.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
