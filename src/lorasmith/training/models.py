"""Base models: a model and its tokenizer by name, ready for training or generation.

What a name stands for is found out by ``lorasmith.io.models``, which the diagnostics use
too; here the weights are loaded.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.errors import ConfigError, MissingDependencyError, ModelError, first_line
from lorasmith.io.models import (
    ALIASES,
    ResolvedModel,
    cache_dir,
    dequantised,
    explained,
    hub_reachable,
    load_config,
    quiet,
    remote_code,
    resolve_model,
    transformers_module,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIASES",
    "DTYPES",
    "QUANTIZATIONS",
    "ResolvedModel",
    "cache_dir",
    "hub_reachable",
    "load_config",
    "load_model",
    "load_tokenizer",
    "quiet",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
]

logger = logging.getLogger(__name__)

#: What ``dtype`` may be, beside ``"auto"``.
DTYPES = ("float32", "bfloat16", "float16")

#: What ``quantize`` may be → the format, and the package that has it.
QUANTIZATIONS: Mapping[str, tuple[str, str]] = {
    "nf4": ("4-bit normal float, scales quantised too (QLoRA)", "bitsandbytes"),
    "fp4": ("4-bit float, scales quantised too", "bitsandbytes"),
    "int8": ("8-bit integers, one scale a row (LLM.int8)", "bitsandbytes"),
    "int4": ("4-bit integers in groups of 32, each in a byte", "torchao"),
    "int8-torchao": ("8-bit integers, one scale a row, weights only", "torchao"),
}


# Loading -------------------------------------------------------------------------------------


def load_tokenizer(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, with a padding token.

    A tokenizer without a padding token pads with its end-of-text token: padding is masked
    everywhere, so which token it is makes no difference.

    Raises:
        ModelError: It cannot be read, or has neither a padding nor an end-of-text token.
    """
    transformers = transformers_module()
    arguments: dict[str, Any] = remote_code(trust_remote_code)
    if resolved.gguf_file is not None:
        arguments["gguf_file"] = resolved.gguf_file
    with quiet():
        tokenizer = explained(
            lambda: transformers.AutoTokenizer.from_pretrained(
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                **arguments,
            ),
            resolved.name,
        )
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.unk_token
        if spare is None:
            raise ModelError(
                f"The tokenizer of {resolved.name} has no padding token and none that could "
                "stand in for it.",
                expected="pad_token, eos_token or unk_token",
                got="none of them",
                fix="add pad_token to its tokenizer_config.json",
                file=resolved.path,
                key="pad_token",
            )
        tokenizer.pad_token = spare
    return tokenizer


def load_model(
    name: str | os.PathLike[str] | ResolvedModel,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    A quantised model is ready for adapters as it is. Unlike HF PEFT's
    ``prepare_model_for_kbit_training``, nothing is cast to float32: adapters are float32
    anyway, norms compute in float32 by themselves, and embeddings and head would take
    twice the memory and give other values than those that the adapter is served with.
    Nor do inputs need gradients, for checkpointing here is not the re-entrant kind.

    Args:
        name: Alias, hub id, directory, ``.gguf`` file, or what :func:`resolve_model` gave.
        dtype: ``"auto"`` (the checkpoint's own; see :func:`resolve_dtype` for the
            exceptions), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"`` (an accelerator if there is one), or a torch device.
        revision: Branch, tag or commit, for hub ids.
        trust_remote_code: Whether code that comes with the model may run. Off by default.
        quantize: Quantise all linear layers but the output head while loading: a name in
            :data:`QUANTIZATIONS`. ``dtype`` is then that of the rest and of the computation.
            ``"int4"`` leaves layers whose input is no multiple of 32 as they are, too.

    Returns:
        ``(model, tokenizer)``. The model is in eval mode, on the device; the tokenizer has
        a padding token.

    Raises:
        ModelError: The model cannot be found or read, or lacks some of its weights.
        ConfigError: There is no such quantisation, or the checkpoint is quantised already.
        MissingDependencyError: Transformers, or the package that quantises, is not installed.
    """
    if quantize is not None:
        _check_quantization(quantize)
    transformers = transformers_module()
    resolved = name if isinstance(name, ResolvedModel) else resolve_model(name, revision=revision)
    where = resolve_device(device)
    config = load_config(resolved, trust_remote_code=trust_remote_code)
    kind = resolve_dtype(dtype, _checkpoint_dtype(config), where)
    arguments: dict[str, Any] = remote_code(trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if quantize is not None and stored is not None:
        raise ConfigError(
            f"The checkpoint {resolved.name} is quantised already.",
            expected="a checkpoint in full precision, or no quantize",
            got=_method(stored),
            key="quantize",
        )
    if resolved.gguf_file is not None:
        arguments |= {"gguf_file": resolved.gguf_file, **dequantised(transformers)}
    else:
        arguments["config"] = config
        if quantize is not None:
            arguments["quantization_config"] = explained(
                lambda: _quantization(transformers, quantize, kind, config), resolved.name
            )
        if quantize is not None or stored is not None:
            # Some quantised models cannot be moved afterwards.
            arguments["device_map"] = {"": where}
    with quiet():
        model, report = explained(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                dtype=kind,
                output_loading_info=True,
                **arguments,
            ),
            resolved.name,
        )
    # Transformers makes up what a checkpoint lacks, at random. That is no base model.
    if missing := sorted(report.get("missing_keys", ())):
        raise ModelError(
            f"The checkpoint {resolved.name} lacks some of the model's weights.",
            expected=f"a whole {type(model).__name__}",
            got=f"{len(missing)} tensors missing, first {missing[0]!r}",
            key=missing[0],
        )
    if model.name_or_path != resolved.base_name:
        model.name_or_path = resolved.base_name
        model.config._name_or_path = resolved.base_name
    tokenizer = load_tokenizer(resolved, trust_remote_code=trust_remote_code)
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer of {resolved.name} has more tokens than the model has embeddings.",
            expected=f"at most {rows} tokens",
            got=f"{len(tokenizer)} tokens",
            fix="use the tokenizer that belongs to this model",
            file=resolved.path,
            key="vocab_size",
        )
    if resolved.gguf_file is not None and quantize is not None:
        # Transformers reads a GGUF file in full precision or in its own blocks, nothing else.
        quantize_in_place(model, quantize, kind, where)
    if "device_map" in arguments:
        return model.eval(), tokenizer
    return model.to(where).eval(), tokenizer


# Quantising ----------------------------------------------------------------------------------


def _method(stored: Any) -> str:
    found = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(found, "value", found))


def _check_quantization(quantize: str) -> None:
    if quantize not in QUANTIZATIONS:
        raise ConfigError(
            "That quantisation is not known.",
            expected=", ".join(QUANTIZATIONS),
            got=repr(quantize),
            key="quantize",
        )
    package = QUANTIZATIONS[quantize][1]
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"Quantising to {quantize} needs {package}, which is not installed.",
            fix='pip install "lorasmith[quant]"',
            key="quantize",
        )


def _torchao(quantize: str) -> Any:
    """torchao's own configuration of a quantisation."""
    import torch

    library: Any = importlib.import_module("torchao.quantization")
    if quantize == "int8-torchao":
        return library.Int8WeightOnlyConfig()
    granularity = importlib.import_module("torchao.quantization.granularity").PerGroup(_GROUP)
    # Its packed 4-bit formats have no backward pass on a CPU, or no kernel at all.
    four: Any = getattr(torch, "int4")  # noqa: B009  # which torch's types do not know
    return library.IntxWeightOnlyConfig(weight_dtype=four, granularity=granularity)


def _quantization(transformers: Any, quantize: str, dtype: torch.dtype, config: Any) -> Any:
    """Transformers' configuration of a quantisation."""
    import torch

    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if quantize in ("nf4", "fp4"):
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config, **remote_code(False))
    left = sorted({n for n, m in empty.named_modules() if _left_out(m, empty, quantize)})
    return transformers.TorchAoConfig(_torchao(quantize), modules_to_not_convert=left)


#: Values that share a scale in ``int4``.
_GROUP = 32


def _left_out(layer: Any, model: Any, quantize: str) -> bool:
    """Whether a linear layer stays as it is: the head, and what groups do not divide."""
    from torch import nn

    if not isinstance(layer, nn.Linear):
        return False
    divided = quantize != "int4" or layer.in_features % _GROUP == 0
    return layer is model.get_output_embeddings() or not divided


def quantize_in_place(
    model: Any, quantize: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Quantises all linear layers but the output head of a model that is in memory.

    Args:
        model: The model; its layers are replaced, one at a time.
        quantize: A name in :data:`QUANTIZATIONS`.
        dtype: In which 4-bit layers compute.
        device: Where the quantised layers are put.
    """
    from torch import nn

    _check_quantization(quantize)
    chosen = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not _left_out(layer, model, quantize)
    ]
    if QUANTIZATIONS[quantize][1] == "torchao":
        names = {name for name, _ in chosen}
        library: Any = importlib.import_module("torchao.quantization")
        library.quantize_(
            model.to(device), _torchao(quantize), filter_fn=lambda _, name: name in names
        )
        return
    layers: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in chosen:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        made: Any
        if quantize == "int8":
            made = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            made.weight = layers.Int8Params(
                layer.weight.data, requires_grad=False, has_fp16_weights=False
            )
        else:
            made = layers.Linear4bit(
                *sizes, compute_dtype=dtype, quant_type=quantize, device="meta"
            )
            made.weight = layers.Params4bit(
                layer.weight.data,
                requires_grad=False,
                quant_type=quantize,
                compress_statistics=True,
                module=made,
            )
        made.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(device).train(layer.training))


# dtype and device ----------------------------------------------------------------------------


def resolve_device(device: str = "auto") -> torch.device:
    """``"auto"`` → this process's CUDA device, XPU or MPS if there is one, else the CPU.

    Raises:
        ConfigError: The device does not exist here.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            # Under torchrun every process has a device of its own.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        for name in ("xpu", "mps"):
            backend = getattr(torch, name, None)
            if backend is not None and backend.is_available():
                return torch.device(name)
        return torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "That device cannot be used.",
            expected='"auto", "cpu" or a device of this machine, e.g. "cuda:0"',
            got=f"{device!r} ({first_line(error)})",
            key="device",
        ) from error
    return found


def _checkpoint_dtype(config: Any) -> torch.dtype:
    """The dtype that a checkpoint says it was saved in; float32 if it does not say."""
    import torch

    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def resolve_dtype(dtype: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to load a base model in.

    ``"auto"`` is the checkpoint's own dtype, except on CPUs: float16, which CPUs only
    emulate and which has too small a range for gradients, becomes float32, and so does
    bfloat16 where the CPU has no instructions for it and would be several times slower
    than in float32. The exception is logged.

    Args:
        dtype: ``"auto"`` or a name in :data:`DTYPES`.
        checkpoint: What the checkpoint was saved in.
        device: Where the model will be.

    Raises:
        ConfigError: There is no such dtype.
    """
    import torch

    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                "That dtype is not known.",
                expected=f"auto, {', '.join(DTYPES)}",
                got=repr(dtype),
                key="dtype",
            )
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cpu":
        if checkpoint == torch.float16:
            logger.warning("The checkpoint is float16; on this CPU it is loaded as float32.")
            return torch.float32
        if checkpoint == torch.bfloat16 and not cpu_has_bfloat16():
            logger.warning(
                "This CPU has no bfloat16 instructions: the bfloat16 checkpoint is loaded as "
                "float32 (twice the memory, several times as fast)."
            )
            return torch.float32
    return checkpoint


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices with instructions of its own."""
    import torch

    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        known = get_capabilities()
        return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # Releases before torch 2.10 have one function a feature.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(f() for n in names if (f := getattr(torch.cpu, n, None)) is not None)
