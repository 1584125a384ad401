"""Where weights come from: a model in memory, a checkpoint on disk, an adapter of either.

A *side* of a comparison is a set of base weights and, perhaps, an adapter on top of it:

    what the user gives                       weights                       adapter
    a model                                   its own, without adapters     the attached one
    a ``PeftModel``                           its own, without adapters     the active one
    a directory with ``config.json``          its safetensors               none
    a ``.gguf`` file                          what its blocks stand for     none
    a name (``smollm2``, a hub id)            the checkpoint it stands for  none
    an adapter: directory, hub id,            those of the other side,      that
    ``AdapterWeights``                        else of the base it names
    a handle of an attached adapter           its model's                   that

Weights are read when they are asked for, see ``io.base_weights`` (a model's layers) and
``io.matrices`` (one of them); their names can be had from here as well. (``smollm2`` itself is
unpacked once into a cache of safetensors, in bfloat16.)
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lorasmith.core.adapter import Adapter, attached, get_adapter, unwrap
from lorasmith.errors import ConfigError, LorasmithError, ModelError
from lorasmith.io import peft
from lorasmith.io.base_weights import (
    CheckpointWeights,
    GgufWeights,
    ModelWeights,
    Unreadable,
    WeightSource,
)
from lorasmith.io.files import check_fusable, read_adapter
from lorasmith.io.hub import locate
from lorasmith.io.matrices import CheckpointFile, Matrix, MemoryMatrix
from lorasmith.io.models import resolve_model, snapshot
from lorasmith.io.tensors import MemoryTensors
from lorasmith.io.weights import AdapterWeights, translate

__all__ = [
    "CheckpointFile",
    "CheckpointWeights",
    "GgufWeights",
    "Given",
    "Matrix",
    "MemoryMatrix",
    "ModelWeights",
    "Side",
    "Unreadable",
    "WeightSource",
    "align",
    "open_sides",
]

#: What a user may pass for either side.
Given: TypeAlias = nn.Module | Adapter | AdapterWeights | str | os.PathLike[str]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        label: What it is, for people.
        weights: Its base weights.
        adapter: What acts on them, or ``None``.
    """

    label: str
    weights: WeightSource
    adapter: AdapterWeights | None = None


def open_sides(
    base: Given, tuned: Given | None, *, adapter: str | None = None, allow_base_mismatch: bool
) -> tuple[Side, Side]:
    """Both sides of a comparison; nothing of the weights is read yet.

    Args:
        base: What was before.
        tuned: What came of it; ``None``: ``base`` with the adapter that it carries or is.
        adapter: Which adapter of a model that carries several.
        allow_base_mismatch: Whether an adapter may have been made for another base.

    Raises:
        ModelError: There is no such model, or it cannot be read.
        AdapterFileError: There is no such adapter, or it cannot be used.
        BaseMismatchError: An adapter was made for another base.
        ConfigError: ``base`` has no adapter, and there is no ``tuned``.
    """
    first = _open(base, adapter if tuned is None else None)
    if tuned is None:
        if first.adapter is None:
            raise ConfigError(
                "There is nothing to compare: no tuned side, and the base carries no adapter.",
                expected="a second model, checkpoint or adapter",
                got=first.label,
                key="tuned",
            )
        weights = _placed(first, None, allow_base_mismatch)
        return Side(weights.label, weights), Side(first.label, weights, first.adapter)
    second = _open(tuned, adapter)
    if first.weights is None:
        # What an adapter is the base of may carry one itself; a merged model is no base.
        near = second.weights if second.adapter is not None else None
        weights = _placed(first, near, allow_base_mismatch)
        before = Side(first.label, weights, first.adapter)
    else:
        # A model that carries an adapter is, as a base, the model without it.
        weights = first.weights
        before = Side(weights.label, weights)
    if second.weights is not None and _same(weights, second.weights):
        if second.adapter is None:
            raise ConfigError(
                "Both sides are the same model, and it carries no adapter.",
                got=second.label,
                key="tuned",
            )
        second = _Open(second.label, weights, second.adapter)
    return before, Side(second.label, _placed(second, weights, allow_base_mismatch), second.adapter)


def _placed(opened: _Open, near: WeightSource | None, allow: bool) -> WeightSource:
    """The weights that something acts on: its own, those at hand, or those that it names."""
    if opened.adapter is not None:
        check_fusable(
            opened.adapter,
            unsupported="merge it with PEFT, save the merged model, and compare the two "
            "checkpoints",
            dependent="measure what it does instead (retention on held-out text)",
            so=", so that no angle can be given",
        )
    if opened.weights is not None:
        return opened.weights
    assert opened.adapter is not None
    weights = near if near is not None else _named_base(opened.adapter)
    weights.check_adapter(opened.adapter, allow)
    return weights


def _same(one: WeightSource, other: WeightSource) -> bool:
    """Whether two sources are the same model in memory."""
    return (
        isinstance(one, ModelWeights) and isinstance(other, ModelWeights) and one.root is other.root
    )


@dataclass(frozen=True)
class _Open:
    """What one argument stands for: weights, an adapter, or both."""

    label: str
    weights: WeightSource | None
    adapter: AdapterWeights | None


def _open(given: Given, adapter: str | None) -> _Open:
    if isinstance(given, Adapter):
        weights = ModelWeights(given.model)
        return _Open(given.name, weights, AdapterWeights.from_model(given.model, given.name))
    if isinstance(given, AdapterWeights):
        label = given.variant.name if given.path is None else os.fspath(given.path)
        return _Open(label, None, given)
    if isinstance(given, nn.Module):
        return _open_model(given, adapter)
    return _open_path(os.fspath(given))


def _open_model(model: nn.Module, name: str | None) -> _Open:
    weights = ModelWeights(model)
    root = unwrap(model)
    if hasattr(root, "peft_config"):
        found, chosen = _peft_weights(root, name)
        return _Open(f"{weights.label} + {chosen}", weights, found)
    if not attached(root):
        if name is not None:
            get_adapter(root, name)  # says that there is none
        return _Open(weights.label, weights, None)
    handle = get_adapter(root, name)
    found = AdapterWeights.from_model(root, handle.name)
    return _Open(f"{weights.label} + {handle.name}", weights, found)


def _peft_weights(model: nn.Module, name: str | None) -> tuple[AdapterWeights, str]:
    """The active adapter of a model that PEFT has put one on, as its files would hold it."""
    from peft.utils import get_peft_model_state_dict

    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if name is None:
        active = getattr(model, "active_adapters", None)
        active = active() if callable(active) else active
        chosen = (
            list(configs)
            if active is None
            else [active]
            if isinstance(active, str)
            else list(active)
        )
        if len(chosen) != 1:
            raise ConfigError(
                "Which of the model's adapters is meant is not clear.",
                expected=f"adapter=, one of {', '.join(configs)}",
                got=", ".join(chosen) or "none is active",
                key="adapter",
            )
        name = chosen[0]
    if name not in configs:
        raise ConfigError(
            f"The model has no adapter named {name!r}.",
            expected=", ".join(configs),
            key="adapter",
        )
    fields = {k: _plain_value(v) for k, v in configs[name].to_dict().items()}
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    values = {
        key if key.startswith(peft.PREFIX) else f"{peft.PREFIX}{key}": value.detach()
        for key, value in state.items()
    }
    tensors = MemoryTensors(values)
    config, unsupported = translate(fields, tensors, Path(peft.CONFIG))
    return AdapterWeights(config, fields, tensors, unsupported=unsupported), name


def _plain_value(value: Any) -> Any:
    """As JSON would hold it: PEFT's configurations have sets and enumerations."""
    if isinstance(value, dict):
        return {str(getattr(k, "value", k)): _plain_value(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain_value(v) for v in value]
    return getattr(value, "value", value)


def _open_path(text: str) -> _Open:
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / peft.CONFIG).is_file():
            return _Open(text, None, read_adapter(path))
        if (path / "config.json").is_file():
            return _Open(text, CheckpointWeights(path, text), None)
        if any((entry / peft.CONFIG).is_file() for entry in path.iterdir()):
            return _Open(text, None, read_adapter(path))
    return _open_name(text)


def _open_name(text: str) -> _Open:
    """An alias, a hub id or a GGUF file; an adapter on the hub too."""
    try:
        resolved = resolve_model(text)
    except ModelError as error:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text) is None:
            raise
        try:
            return _Open(text, None, read_adapter(locate(text)))
        except LorasmithError:
            raise error from None
    if resolved.gguf_file is not None:
        return _Open(text, GgufWeights(resolved, text), None)
    folder = snapshot(resolved)
    if (folder / peft.CONFIG).is_file():
        return _Open(text, None, read_adapter(folder))
    return _Open(text, CheckpointWeights(folder, text, resolved.base_name), None)


def _named_base(adapter: AdapterWeights) -> WeightSource:
    name = adapter.base.name
    if name is None:
        raise ConfigError(
            "The adapter does not say which base model it was made for.",
            expected="base=, the model or its checkpoint",
            key="base",
        )
    opened = _open_path(name)
    if opened.weights is None:
        raise ConfigError("The adapter names another adapter as its base.", got=name, key="base")
    return opened.weights


def align(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Our name → their name of the same layer, where the two may differ by a prefix.

    Models saved with and without their head differ so (``model.layers.0…``, ``layers.0…``),
    and models under a wrapper (``base_model.model.…``, ``language_model.…``). One prefix is
    taken off one side, the one that makes most names meet.
    """
    here = set(theirs)
    best = {n: n for n in ours if n in here}
    if len(best) == min(len(set(ours)), len(here)):
        return best
    for names, flip in ((ours, False), (theirs, True)):
        other = here if not flip else set(ours)
        for prefix in _openings(names):
            found = {n: n[len(prefix) :] for n in names if n.startswith(prefix)}
            met = {a: b for a, b in found.items() if b in other}
            if len(met) > len(best):
                best = {b: a for a, b in met.items()} if flip else met
    return best


def _openings(names: Sequence[str]) -> list[str]:
    """First one, two and three parts of the names, most frequent first."""
    seen: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for count in range(1, min(4, len(parts))):
            seen[".".join(parts[:count]) + "."] += 1
    return [p for p, _ in seen.most_common(32)]
