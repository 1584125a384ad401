"""Which rows or columns of an attention projection belong to which head.

Every attention of Transformers that is known here cuts its projections into contiguous
blocks of ``head_dim``: rows of W [d_out, d_in] for queries, keys and values (also where
one layer makes all three), columns for the output projection. They differ in the order
of the blocks, and in how many key-value heads there are:

    separate q, k, v     head 0, 1, …                              Llama, Qwen, BERT, DistilBERT, T5
    split                all q | all k | all v                     GPT-2, Phi-3, MPT, DBRX
    interleaved          q k v of head 0 | q k v of head 1 | …     GPT-NeoX, BLOOM, Falcon (plain)
    multi-query          all q | k | v                             Falcon-7B, GPTBigCode
    grouped              the q of group 0, its k, its v | …        Falcon-40B and later
    partitioned          four times: some q | some v | some k      CodeGen
    output               columns of head 0, 1, …                   all of them

A layer whose sizes do not fit what its model says, or whose fused layout is not known,
has no layout: it can only be looked at as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lorasmith.core.layers import describe

__all__ = ["HeadLayout", "Role", "head_layout", "layout_of"]

Role = Literal["q", "k", "v", "o"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("q_proj", "q_lin", "query", "q", "wq", "q_attn"), "q"),
    **dict.fromkeys(("k_proj", "k_lin", "key", "k", "wk"), "k"),
    **dict.fromkeys(("v_proj", "v_lin", "value", "v", "wv"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "o", "wo", "dense", "c_proj"), "o"),
}
_FUSED = frozenset(("c_attn", "qkv_proj", "query_key_value", "Wqkv"))
_SPLIT = frozenset("gpt2 imagegpt decision_transformer openai-gpt phi3 mpt dbrx".split())
_INTERLEAVED = frozenset(("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"))
#: Names that are used for nothing but attention.
_CLEAR = frozenset("q_proj k_proj v_proj o_proj q_lin k_lin v_lin out_lin".split())
#: The parent says that the layer is part of an attention. BERT's ``intermediate.dense`` and
#: ``output.dense`` beside the attention are not.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class HeadLayout:
    """How a projection is cut into heads: consecutive blocks of equal size.

    Attributes:
        axis: ``"out"``: blocks of rows of W [d_out, d_in]; ``"in"``: blocks of columns.
        head_dim: Rows (columns) of a block.
        heads: Of each block in turn, what it makes and for which head: ``("k", 2)``. The
            number of a key or value head counts key-value heads.
    """

    axis: Literal["out", "in"]
    head_dim: int
    heads: tuple[tuple[Role, int], ...]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.heads)


def layout_of(
    config: object, name: str, d_out: int, d_in: int, head_dim: int | None = None
) -> HeadLayout | None:
    """The heads of one layer, from the model's configuration and the layer's name and sizes.

    Args:
        config: The model's ``PretrainedConfig``, or anything with its attributes.
        name: Dotted name of the layer.
        d_out: Rows of W.
        d_in: Columns of W.
        head_dim: Size of a head where it is known better than from the configuration (some
            models have layers of different head sizes).

    Returns:
        ``None`` for a layer that is not cut into heads, or not in a known way.
    """
    get_text = getattr(config, "get_text_config", None)
    if callable(get_text):
        config = get_text()
    parent, _, leaf = name.rpartition(".")
    if leaf not in _ROLES and leaf not in _FUSED:
        return None
    inside = _ATTENTION.search(parent) is not None and "linear_att" not in parent
    # "c_proj", "dense" and "out_proj" are names of the MLP and of classifiers as well.
    if not inside and leaf not in _CLEAR:
        return None
    heads = _heads(config, name)
    if heads is None:
        return None
    size = head_dim or _head_dim(config, heads)
    if size is None:
        return None
    if leaf in _FUSED:
        blocks = _fused(config, name, heads, _kv_heads(config, heads))
        fits = blocks is not None and d_out == len(blocks) * size
        return HeadLayout("out", size, tuple(blocks)) if blocks is not None and fits else None
    role = _ROLES[leaf]
    width = d_in if role == "o" else d_out
    count = {"q": heads, "o": heads}.get(role, _kv_heads(config, heads))
    if width != count * size:
        return None
    return HeadLayout("in" if role == "o" else "out", size, tuple((role, h) for h in range(count)))


def head_layout(model: nn.Module) -> dict[str, HeadLayout]:
    """Module name → its heads, of every linear-like layer of a model that is cut into some.

    The size of a head is the attention module's own where it says one.
    """
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):  # PEFT's tuners give a plain model's configuration so
        config = None
    found = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if "." not in name:
            continue
        info = describe(module, name)
        if info is None:
            continue
        # PEFT puts the layer under its own: "q_proj.base_layer".
        plain = name.removesuffix(".base_layer")
        parent = modules.get(plain.rpartition(".")[0])
        layout = layout_of(config, plain, info.d_out, info.d_in, _own_head_dim(parent))
        if layout is not None:
            found[plain] = layout
    return found


def _own_head_dim(attention: nn.Module | None) -> int | None:
    """What an attention module says of itself."""
    for key in ("head_dim", "attention_head_size", "head_size"):
        value = getattr(attention, key, None)
        if type(value) is int and value > 0:
            return value
    return None


def _first(config: object, *keys: str) -> int | None:
    for key in keys:
        value = getattr(config, key, None)
        if type(value) is int and value > 0:
            return value
    return None


def _heads(config: object, name: str) -> int | None:
    if re.search(r"(^|\.)decoder\.", name):
        found = _first(config, "decoder_attention_heads")
        if found is not None:
            return found
    return _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")


def _kv_heads(config: object, heads: int) -> int:
    if _type(config) == "dbrx":
        config = getattr(config, "attn_config", None)
        return _first(config, "kv_n_heads") or heads
    return _first(config, "num_key_value_heads", "num_kv_heads") or heads


def _head_dim(config: object, heads: int) -> int | None:
    own = _first(config, "head_dim", "d_kv")
    if own is not None:
        return own
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    return hidden // heads if hidden is not None and hidden % heads == 0 else None


def _type(config: object) -> str:
    return str(getattr(config, "model_type", ""))


def _fused(config: object, name: str, heads: int, kv: int) -> list[tuple[Role, int]] | None:
    """What the blocks of rows of a fused projection are, in turn."""
    kind = _type(config)
    multi_query = bool(getattr(config, "multi_query", False))
    if kind == "falcon" and getattr(config, "new_decoder_architecture", False):
        return _grouped(heads, kv)
    if kind in ("falcon", "gpt_bigcode"):
        return _split(heads, 1) if multi_query else _interleaved(heads)
    if kind in _INTERLEAVED:
        return _interleaved(heads)
    if kind == "codegen":
        return _partitioned(heads)
    if kind not in _SPLIT:
        return None
    if "crossattention" in name:  # its queries come from ``q_attn``
        return _split(heads, kv)[heads:]
    return _split(heads, kv)


def _split(heads: int, kv: int) -> list[tuple[Role, int]]:
    q: list[tuple[Role, int]] = [("q", h) for h in range(heads)]
    k: list[tuple[Role, int]] = [("k", h) for h in range(kv)]
    v: list[tuple[Role, int]] = [("v", h) for h in range(kv)]
    return q + k + v


def _interleaved(heads: int) -> list[tuple[Role, int]]:
    roles: tuple[Role, ...] = ("q", "k", "v")
    return [(role, h) for h in range(heads) for role in roles]


def _grouped(heads: int, kv: int) -> list[tuple[Role, int]] | None:
    if heads % kv:
        return None
    each = heads // kv
    blocks: list[tuple[Role, int]] = []
    for group in range(kv):
        blocks += [("q", group * each + h) for h in range(each)]
        blocks += [("k", group), ("v", group)]
    return blocks


def _partitioned(heads: int, parts: int = 4) -> list[tuple[Role, int]] | None:
    if heads % parts:
        return None
    each = heads // parts
    roles: tuple[Role, ...] = ("q", "v", "k")
    return [(role, part * each + h) for part in range(parts) for role in roles for h in range(each)]
