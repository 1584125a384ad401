"""Where a base model's matrices are in llama.cpp's GGUF files: names, shapes, order of rows.

Known from the model's GGUF file itself, or from its Transformers configuration alone: the names by
``gguf.TensorNameMap``, the shapes from the model's class without values. No weights are read.

llama.cpp rotates neighbouring rows of a head of q and k (2 j, 2 j + 1), Transformers those that
lie half a head apart; Llama's files have the rows reordered (``lorasmith.io.gguf``). What acts on
the rows of such a matrix must be reordered likewise:

    row 2 j + i of the file's head  =  row i d / 2 + j of Transformers' head      (i < 2, j < d / 2)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.targets import candidates
from lorasmith.errors import MissingDependencyError, ModelError
from lorasmith.io.gguf import ARCHITECTURES, GgufModel, skeleton, tensor_names
from lorasmith.io.models import ALIASES, ResolvedModel, load_config, resolve_model

__all__ = ["Layout", "Place", "find_base", "layout_of", "reordered"]

#: Transformers' ``model_type`` → ``general.architecture`` of the file that llama.cpp makes of it.
MODEL_TYPES: Mapping[str, str] = {
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "nemotron": "nemotron",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}


@dataclass(frozen=True)
class Place:
    """One matrix of the base model.

    Attributes:
        name: In GGUF files: ``blk.3.attn_q.weight``.
        rows, columns: d_out and d_in.
        heads: Number of equal parts whose rows are in llama.cpp's order, or 0.
    """

    name: str
    rows: int
    columns: int
    heads: int = 0


@dataclass(frozen=True)
class Layout:
    """A base model as llama.cpp sees it.

    Attributes:
        architecture: ``general.architecture``.
        places: Name of the module in Transformers → its matrix.
        tied: Whether the output head is the embedding once more.
        file: The GGUF file that all of this was read from, if it was one.
        base: What was found, see ``lorasmith.io.models``.
    """

    architecture: str
    places: Mapping[str, Place]
    tied: bool
    file: Path | None
    base: ResolvedModel


def find_base(name: str | os.PathLike[str]) -> ResolvedModel:
    """A base model by the name that a user or an adapter has for it.

    Of models with an alias, the hub's name stands for the alias as well: adapters record it, and
    the model may be on this machine all the same.

    Raises:
        ModelError: There is no such model on this machine, and no hub to ask.
    """
    text = os.fspath(name)
    alias = next((a for a, found in ALIASES.items() if found.hub == text), None)
    return resolve_model(text if alias is None else alias)


def layout_of(base: ResolvedModel) -> Layout:
    """The layout of a base model.

    Raises:
        ModelError: It cannot be read, or llama.cpp's layout of that architecture is not known.
        MissingDependencyError: The package ``gguf``, or Transformers, is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Writing GGUF files needs the package gguf, which is not installed.",
            fix='pip install "lorasmith[gguf]"',
        ) from error
    if base.gguf_file is not None:
        return _of_file(base)
    config = load_config(base)
    text = config.get_text_config()
    kind = str(getattr(text, "model_type", ""))
    architecture = MODEL_TYPES.get(kind)
    if architecture is None:
        raise ModelError(
            "The layout of that architecture in GGUF files is not known here.",
            expected=", ".join(MODEL_TYPES),
            got=kind or type(config).__name__,
            fix="fuse the adapter (lorasmith fuse) and convert the full model with llama.cpp",
            file=base.path,
        )
    if architecture == "falcon" and (
        getattr(text, "new_decoder_architecture", False) or not getattr(text, "multi_query", True)
    ):
        raise ModelError(
            "Of Falcon, llama.cpp sorts the rows of the fused projection where there are several "
            "key-value heads, and adapters for these are not written.",
            got=base.name,
            fix="fuse the adapter (lorasmith fuse) and convert the full model with llama.cpp",
        )
    model = skeleton(config)
    names = tensor_names(architecture, model)
    heads = _heads(text) if ARCHITECTURES[architecture] else {}
    places = {}
    for layer in candidates(model):
        info = layer.info
        there = names.get(f"{info.name}.weight")
        if there is not None:
            parts = heads.get(there.split(".")[-2], 0)
            places[info.name] = Place(there, info.d_out, info.d_in, parts)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Layout(architecture, places, tied, None, base)


def _of_file(base: ResolvedModel) -> Layout:
    model = GgufModel(base)
    places = {}
    for name, held in model.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            places[module] = Place(held.name, held.shape[0], held.shape[1], held.heads)
    tied = not any(place.name == "output.weight" for place in places.values())
    return Layout(model.architecture, places, tied, model.path, base)


def _heads(config: Any) -> dict[str, int]:
    count = config.num_attention_heads
    return {"attn_q": count, "attn_k": getattr(config, "num_key_value_heads", None) or count}


def reordered(rows: Tensor, heads: int) -> Tensor:
    """Rows of a matrix of q or k, from Transformers' order to llama.cpp's.

    Args:
        rows: [heads · d, n].
        heads: Number of heads; with 0 nothing changes.
    """
    if not heads:
        return rows
    half = rows.shape[0] // heads // 2
    order = torch.arange(rows.shape[0]).view(heads, 2, half).transpose(1, 2).reshape(-1)
    return rows[order]
