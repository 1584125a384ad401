"""Opening the base that adapters are fused into: safetensors, a GGUF file, or quantised weights.

    given                            its tensors                   its class
    a directory of safetensors       as the files hold them        without values, if it is known
    a GGUF file                      unpacked when they are read   without values
    a quantised checkpoint, with     dequantised when they are     loaded whole
    ``dequantize``                   read

No value of a tensor is read here, but for a quantised checkpoint, which Transformers loads.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.core.layers import LayerInfo, describe
from lorasmith.errors import ConfigError, LorasmithError, ModelError
from lorasmith.export.fuse_tensors import FromCall, FromFile, FromGguf, FromMatrix, Stored
from lorasmith.io.base_weights import (
    CheckpointWeights,
    GgufWeights,
    ModelWeights,
    WeightSource,
)
from lorasmith.io.models import (
    ResolvedModel,
    check_counts,
    explained,
    quiet,
    remote_code,
    resolve_model,
    snapshot,
    transformers_module,
)
from lorasmith.io.strict import read_object

__all__ = ["Base", "open_base"]

#: Of a checkpoint on the hub, what a tokenizer may need beside JSON.
_FETCH = ("*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass
class Base:
    """What is fused into.

    Attributes:
        resolved: Where it is.
        source: Its layers.
        stored: Name in the files → tensor, in their order.
        skeleton: Its class without values (with values where it was quantised), or ``None``.
        config: ``config.json``.
        folder: Its directory, where the rest is copied from; ``None`` for GGUF files.
        dtype: In which tensors are written that say nothing themselves.
        quantised: Whether it was unpacked.
    """

    resolved: ResolvedModel
    source: WeightSource
    stored: dict[str, Stored]
    skeleton: nn.Module | None
    config: dict[str, Any]
    folder: Path | None
    dtype: torch.dtype | None = None
    quantised: bool = False

    def key_of(self, parameter: str) -> str | None:
        """The name in the files of a parameter of the class."""
        if isinstance(self.source, CheckpointWeights):
            return self.source.key_of(parameter)
        return parameter if parameter in self.stored else None

    def save_rest(self, stage: Path) -> str | None:
        """Writes what is not copied (GGUF); gives where the tokenizer is from, if there is one."""
        if self.folder is not None or self.resolved.gguf_file is None:
            return None
        transformers = transformers_module()
        try:
            with quiet():
                tokenizer = explained(
                    lambda: transformers.AutoTokenizer.from_pretrained(
                        self.resolved.path,
                        gguf_file=self.resolved.gguf_file,
                        **remote_code(False),
                    ),
                    self.resolved.name,
                )
        except LorasmithError as error:
            warnings.warn(
                f"The GGUF file gives no tokenizer that Transformers reads ({error.got}): the "
                "model is written without one.",
                UserWarning,
                stacklevel=2,
            )
            return None
        tokenizer.save_pretrained(stage)
        return "base"


def open_base(given: str | os.PathLike[str], revision: str | None, dequantize: bool) -> Base:
    """The base under a name or path.

    Args:
        given: Directory of safetensors, GGUF file, alias, or hub id.
        revision: Branch, tag or commit on the hub.
        dequantize: Whether to unpack a quantised checkpoint.

    Raises:
        ConfigError: It is a model in memory.
        ModelError: There is no such model, it cannot be read, or it is quantised.
    """
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(
            "Checkpoints on disk are fused here.",
            expected="a directory, a GGUF file, an alias or a hub id",
            got=type(given).__name__,
            fix="lorasmith.fuse(model) fuses into a model in memory",
            key="model",
        )
    label = os.fspath(given)
    resolved = resolve_model(label, revision=revision)
    if resolved.gguf_file is not None:
        return _open_gguf(resolved, label)
    folder = snapshot(resolved, also=_FETCH)
    config = read_object(folder / "config.json", root=folder)
    check_counts(config, folder / "config.json")
    stored_as = config.get("quantization_config")
    if stored_as and not dequantize:
        method = stored_as.get("quant_method") if isinstance(stored_as, dict) else stored_as
        raise ModelError(
            "The checkpoint is quantised: what an adapter adds would be rounded to its few steps.",
            expected="a checkpoint in floating-point numbers",
            got=str(method or "quantised"),
            fix="name the full-precision checkpoint that it was made from (an adapter trained on "
            "the quantised one works there); or unpack this one with dequantize=True "
            "(--dequantize)",
            file=folder,
        )
    if stored_as:
        return _open_quantised(resolved, folder, config)
    source = CheckpointWeights(folder, label, resolved.base_name)
    stored: dict[str, Stored] = {}
    for file in dict.fromkeys(source.places.values()):
        for key in sorted(file.tensors, key=lambda k: file.place(k)[0]):
            stored[key] = FromFile(file, key)
    return Base(resolved, source, stored, source.skeleton, config, folder)


def _open_gguf(resolved: ResolvedModel, label: str) -> Base:
    source = GgufWeights(resolved, label)
    model, skeleton = source.model, source.skeleton
    assert skeleton is not None
    stored: dict[str, Stored] = {}
    seen: set[int] = set()
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        layer = name.removesuffix(".weight")
        if name in model.tensors and layer in source.layers:
            stored[name] = FromMatrix(source.layers[layer])
        elif name in model.tensors:
            stored[name] = FromGguf(model.tensors[name])
        elif name in model.vectors:
            shape = (model.vectors[name].shape[1],)
            stored[name] = FromCall(shape, model.vectors[name].dtype, partial(model.vector, name))
        found = stored.get(name)
        if found is None or found.shape != tuple(parameter.shape):
            raise ModelError(
                "The GGUF file does not hold the whole model, as far as it is understood here.",
                expected=f"{name} {list(parameter.shape)}",
                got="nothing" if found is None else list(found.shape),
                fix="fuse into the checkpoint that it was converted from",
                file=model.path,
                key=name,
            )
    config = {**model.config.to_dict(), "architectures": [type(skeleton).__name__]}
    plain = json.loads(model.config.__class__(**config).to_json_string(use_diff=False))
    kinds = [t.dtype for t in model.tensors.values() if not t.quantised]
    dtype = torch.bfloat16 if source.quantised else (kinds[0] if kinds else torch.float32)
    plain["dtype"] = str(dtype).removeprefix("torch.")
    return Base(resolved, source, stored, skeleton, plain, None, dtype)


def _open_quantised(resolved: ResolvedModel, folder: Path, config: dict[str, Any]) -> Base:
    transformers = transformers_module()
    with quiet():
        model: nn.Module = explained(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(
                os.fspath(folder), local_files_only=True, dtype="auto", **remote_code(False)
            ),
            resolved.name,
        )
    source = ModelWeights(model)
    source.label = resolved.name
    packed = {name for name, module in model.named_modules() if _is_packed(describe(module, name))}
    stored: dict[str, Stored] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name in packed:
            stored[f"{name}.weight"] = FromMatrix(source.layers[name])
        elif any(name.startswith(f"{p}.") for p in packed):
            continue
        for leaf, value in module.named_parameters(recurse=False):
            if (leaf == "weight" and name in packed) or id(value) in seen:
                continue
            seen.add(id(value))
            stored[f"{name}.{leaf}"] = FromCall(tuple(value.shape), value.dtype, value.detach().cpu)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    return Base(resolved, source, stored, model, plain, folder, quantised=True)


def _is_packed(info: LayerInfo | None) -> bool:
    return info is not None and info.kind == "opaque"
