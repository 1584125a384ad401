"""``lorasmith info MODEL_OR_ADAPTER``: what something is, without loading its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from lorasmith.cli.output import Common, CommonOptions, emit, grid, session

__all__ = ["adapter_info", "info", "model_info", "outline"]

#: Entries from which on a pattern is only counted; ``--json`` has all of it.
_LONG = 8


def info(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Describe a base model or an adapter. No weights are loaded.

    Parameters
    ----------
    name
        A base model (alias, hub id, path) or the directory of an adapter.
    revision
        Branch, tag or commit of a model on the hub.
    trust_remote_code
        Let code that comes with a model run.
    """
    with session(common):
        path = Path(name).expanduser()
        if _holds_adapter(path):
            found = adapter_info(path)
        else:
            found = model_info(name, revision=revision, trust_remote_code=trust_remote_code)

        def render(console: Console) -> None:
            console.print(grid({k.replace("_", " "): shown(v) for k, v in _short(found).items()}))

        emit(common, found, render)
    return 0


def _holds_adapter(path: Path) -> bool:
    """Whether it is an adapter's directory, or has adapters in its subdirectories."""
    if (path / "adapter_config.json").is_file():
        return True
    return not (path / "config.json").is_file() and any(path.glob("*/adapter_config.json"))


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """What people read of it: no fields that are not set, no pattern of hundreds of layers."""
    found = dict(found)
    if "config" in found:
        found["config"] = {
            k: f"of {len(v)} layers" if isinstance(v, dict) and len(v) > _LONG else v
            for k, v in found["config"].items()
            if shown(v) is not None
        }
    if "ranks" in found:
        found["ranks"] = [f"{r} on {count:,} layers" for r, count in found["ranks"].items()]
    return found


def shown(value: Any) -> str | None:
    """A value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items()) or None
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or None
    return None if value is None else str(value)


def outline(name: str, config: Any, *, trust_remote_code: bool = False) -> Any:
    """A causal language model without storage (meta device), from its configuration alone.

    Args:
        name: What the user calls it, for messages.
        config: Its Transformers configuration.
        trust_remote_code: Whether code that comes with it may run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lorasmith.errors import ModelError
    from lorasmith.training.models import quiet

    try:
        with quiet(), torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            model = make(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ModelError(
            f"{name} is not a causal language model.",
            expected="a model for text generation",
            got=str(config.model_type),
        ) from error
    model.tie_weights()
    return model


def model_info(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Sizes of a base model, from its configuration and a model without storage."""
    from lorasmith.training.models import load_config, resolve_model

    resolved = resolve_model(name, revision=revision)
    config = load_config(resolved, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    model = outline(name, config, trust_remote_code=trust_remote_code)
    heads = getattr(text, "num_attention_heads", None)
    hidden = getattr(text, "hidden_size", None)
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None and heads and hidden:
        head_dim = hidden // heads
    return {
        "kind": "model",
        "name": name,
        "base": resolved.base_name,
        "source": resolved.source,
        "path": resolved.path,
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden": hidden,
        "intermediate": getattr(text, "intermediate_size", None),
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "vocabulary": getattr(text, "vocab_size", None),
        "context": getattr(text, "max_position_embeddings", None),
        "tied_embeddings": bool(getattr(text, "tie_word_embeddings", False)),
        "dtype": str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    }


def adapter_info(path: Path) -> dict[str, Any]:
    """What an adapter is and which layers it sits on."""
    import lorasmith as ls
    from lorasmith.core.config import LowRankConfig

    weights = ls.read_adapter(path)
    folder = weights.path or path
    config = weights.config.to_dict()
    fingerprint = weights.base.fingerprint
    leaves = Counter(name.rpartition(".")[2] for name in weights.modules)
    found: dict[str, Any] = {
        "kind": "adapter",
        "path": str(folder),
        "variant": config.pop("variant"),
        "peft_type": weights.peft.get("peft_type"),
        "parameters": weights.num_parameters,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "base": weights.base.name,
        "base_known_by_fingerprint": fingerprint is not None,
        "layers": len(weights.modules),
        "modules": dict(sorted(leaves.items())),
        "modules_to_save": sorted(weights.saved_modules),
        "config": {k: v for k, v in config.items() if k not in ("targets", "modules_to_save")},
        "targets": config.get("targets"),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    if isinstance(weights.config, LowRankConfig):
        # What reading has compared with the tensors' shapes.
        ranks = Counter(weights.config.rank_of(name) for name in weights.modules)
        found["ranks"] = {str(rank): count for rank, count in sorted(ranks.items())}
    if weights.unsupported is not None:
        found["cannot_be_loaded"] = weights.unsupported
    return found
