"""``lorasmith info MODEL_OR_ADAPTER_OR_FLEET``: what it is, without loading a model's weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session
from lorasmith.errors import ConfigError

__all__ = ["adapter_info", "info", "model_info", "outline"]

#: Rank at which parameters are counted, if none is given.
_RANK = 16

#: What is told of each family.
_COUNTED = ("r", "layers", "parameters", "note")

#: Entries from which on a pattern is only counted; ``--json`` has all of it.
_LONG = 8


def info(
    name: str,
    *,
    r: int | None = None,
    targets: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Describe a base model, an adapter or a compressed fleet. No model's weights are loaded.

    Of a model also its heads, θ_crit = arcsin(1/√head_dim), and how many parameters each
    adapter family would train on it.

    Parameters
    ----------
    name
        A base model (alias, hub id, path); or an adapter or a compressed fleet (directory, hub
        id, URL).
    r
        Rank to count the parameters at, for families that have one. Default: 16.
    targets
        Layers to count them on: all-linear, a role, names, globs or re:EXPRESSION.
    revision
        Branch, tag or commit of a model on the hub.
    trust_remote_code
        Let code that comes with a model run.
    """
    with session(common):
        held = _holds(name)
        if held is not None:
            for key, value in (("--r", r), ("--targets", targets)):
                if value is not None:
                    raise ConfigError(
                        f"{key} is for base models: {held} has what it has.",
                        fix=f"leave {key} out, or name the base model",
                        key=key,
                    )
        if held == "a fleet":
            from lorasmith.cli.fleet import _subspace_info

            _subspace_info(name, common)
            return 0
        if held is not None:
            found = adapter_info(name)
        else:
            found = model_info(
                name,
                r=_RANK if r is None else r,
                targets=targets,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )

        def render(console: Console) -> None:
            console.print(grid({_label(k): shown(v) for k, v in _short(found).items()}))
            if "variants" in found:
                console.print(_variant_table(found))

        emit(common, found, render)
    return 0


def _holds(name: str) -> str | None:
    """Whether it is ``"a fleet"`` or ``"an adapter"``; ``None`` for what may be a model.

    Raises:
        AdapterFileError: It is a URL that cannot be read, or of neither.
        MissingDependencyError: A package for the URL is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return "an adapter" if (path / "adapter_config.json").is_file() else None
        if (path / "subspace.json").is_file():
            return "a fleet"
        return "an adapter" if _has_adapters(path) else None
    if "://" in name:
        from lorasmith.fleet.store import is_subspace

        return "a fleet" if is_subspace(name) else "an adapter"  # a model is no URL
    if "/" in name and not path.exists():
        return _on_hub(name)
    return None


def _has_adapters(path: Path) -> bool:
    """Whether it is an adapter's directory, or has adapters in its subdirectories."""
    return (path / "adapter_config.json").is_file() or any(path.glob("*/adapter_config.json"))


def _on_hub(name: str) -> str | None:
    """What the repository of that id holds, as far as the hub or its cache tells."""
    from lorasmith.errors import LorasmithError
    from lorasmith.io.hub import fetch

    kinds = {"config.json": None, "adapter_config.json": "an adapter", "subspace.json": "a fleet"}
    try:
        return next((kinds[file] for file in kinds if fetch(name, (file,)) is not None), None)
    except LorasmithError:
        return None  # whoever looks for a model says what is wrong


def _label(key: str) -> str:
    return key if key.startswith("θ") else key.replace("_", " ")


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """What people read of it: no fields that are not set, no pattern of hundreds of layers."""
    found = {k: v for k, v in found.items() if k != "variants"}
    if found.get("theta_crit_deg") is not None:
        place = list(found).index("theta_crit_deg")
        items = list(found.items())
        items[place] = ("θ_crit", f"{found['theta_crit_deg']:.3g}°")
        found = dict(items)
    if "config" in found:
        found["config"] = {
            k: f"of {len(v)} layers" if isinstance(v, dict) and len(v) > _LONG else v
            for k, v in found["config"].items()
            if shown(v) is not None
        }
    if "ranks" in found:
        found["ranks"] = [
            f"{r} on {count:,} layer{'' if count == 1 else 's'}"
            for r, count in found["ranks"].items()
        ]
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
    from lorasmith.io.models import quiet, remote_code

    try:
        with quiet(), torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            model = make(config, **remote_code(trust_remote_code))
    except ValueError as error:
        raise ModelError(
            f"{name} is not a causal language model.",
            expected="a model for text generation",
            got=str(config.model_type),
        ) from error
    model.tie_weights()
    return model


def model_info(
    name: str,
    *,
    r: int = 16,
    targets: tuple[str, ...] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Sizes of a base model, from its configuration and a model without storage.

    Args:
        name: What the user calls it.
        r: Rank to count the parameters of adapters at.
        targets: Layers to count them on; by default each family's own.
        revision: On the hub.
        trust_remote_code: Whether code that comes with it may run.
    """
    import lorasmith as ls
    from lorasmith.cli.variants import check_targets, describe
    from lorasmith.training.models import load_config, resolve_model

    resolved = resolve_model(name, revision=revision)
    config = load_config(resolved, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    model = outline(name, config, trust_remote_code=trust_remote_code)
    heads = head_sizes(model, text)
    found = {
        "kind": "model",
        "name": name,
        "base": resolved.base_name,
        "source": resolved.source,
        "path": resolved.path,
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden": getattr(text, "hidden_size", None),
        "intermediate": getattr(text, "intermediate_size", None),
        **heads,
        "vocabulary": getattr(text, "vocab_size", None),
        "context": getattr(text, "max_position_embeddings", None),
        "tied_embeddings": bool(getattr(text, "tie_word_embeddings", False)),
        "dtype": str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    }
    # A mistake in the rank or the targets is one for all families.
    check_targets(model, r=r, targets=targets)
    variants = (describe(v, model, r=r, targets=targets) for v in ls.variants().values())
    found["variants"] = {one["name"]: {k: one[k] for k in _COUNTED} for one in variants}
    return found


def head_sizes(model: Any, config: Any) -> dict[str, Any]:
    """Heads, key-value heads, head_dim and θ_crit in degrees, as the layers really have them.

    From the attention layers' own shapes (``core.heads``): hidden size / heads is wrong for
    models that state a head_dim, and key-value heads have as many names as there are models.
    Where the layout of the layers is not known, what the configuration says.

    Args:
        model: A model, without storage if need be.
        config: Its text configuration.
    """
    from lorasmith.core.heads import head_layout

    layouts = head_layout(model)
    sizes = Counter(layout.head_dim for layout in layouts.values())
    counted = {
        role: max((sum(r == role for r, _ in lay.heads) for lay in layouts.values()), default=0)
        for role in ("q", "k")
    }
    heads = counted["q"] or getattr(config, "num_attention_heads", None)
    kv_heads = counted["k"] or getattr(config, "num_key_value_heads", None) or heads
    head_dim: int | None
    if sizes:
        head_dim = sizes.most_common(1)[0][0]
    else:
        hidden = getattr(config, "hidden_size", None)
        own = getattr(config, "head_dim", None)
        head_dim = own or (hidden // heads if heads and hidden else None)
    found = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    if len(sizes) > 1:
        found["head_dims"] = {str(size): n for size, n in sorted(sizes.items())}
    found["theta_crit_deg"] = math.degrees(math.asin(1 / math.sqrt(head_dim))) if head_dim else None
    return found


def _variant_table(found: dict[str, Any]) -> Table:
    total = found["parameters"]
    table = Table(
        title="Parameters that adapters would train",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant")
    for heading in ("rank", "layers", "parameters", "of the model"):
        table.add_column(heading, justify="right")
    for name, one in found["variants"].items():
        count = one["parameters"]
        table.add_row(
            name,
            number(one["r"]),
            number(one["layers"]),
            number(count),
            "–" if count is None else f"{100 * count / total:.2g}%",
        )
    return table


def adapter_info(path: Path | str) -> dict[str, Any]:
    """What an adapter is and which layers it sits on.

    Args:
        path: Its directory, hub id or URL.
    """
    import lorasmith as ls
    from lorasmith.core.config import LowRankConfig

    weights = ls.read_adapter(path)
    folder = weights.path or Path(path)
    config = weights.config.to_dict()
    fingerprint = weights.base.fingerprint
    leaves = Counter(name.rpartition(".")[2] for name in weights.modules)
    found: dict[str, Any] = {
        "kind": "adapter",
        "path": path if isinstance(path, str) and "://" in path else str(folder),
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
