"""Which layers of a model an adapter sits on.

Roles are about the residual stream of width d (the model's hidden size): a *reader*
takes its input from it (q, k, v, gate, up), a *writer* adds its output to it (o, down),
an *inner* layer does neither. ``attention`` and ``mlp`` go by the names of the enclosing
modules. A layer whose role cannot be told has none; it is still part of
``"all-linear"`` and can be named.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lorasmith.core.config import AdapterConfig
from lorasmith.core.layers import LayerInfo, describe
from lorasmith.core.patterns import (
    first_matching_key,
    matches_name,
    matches_regex,
    one_operation,
)
from lorasmith.core.state import SAVED, SLOT
from lorasmith.errors import TargetError

__all__ = ["ROLES", "Candidate", "candidates", "find_modules", "roles_of", "select"]

ROLES = ("attention", "mlp", "reader", "writer", "inner")

_READERS = frozenset(
    "q_proj k_proj v_proj qkv_proj q_lin k_lin v_lin query key value query_key_value c_attn "
    "in_proj Wqkv q k v wq wk wv gate_proj up_proj gate_up_proj c_fc fc1 lin1 wi wi_0 wi_1 "
    "w1 w3 dense_h_to_4h fc_in intermediate".split()
)
_WRITERS = frozenset(
    "o_proj out_proj out_lin o wo c_proj dense_4h_to_h down_proj fc2 lin2 w2 fc_out".split()
)
_ATTENTION = re.compile(r"attn|attention|(^|\.)[qkvo]_(proj|lin)$|(^|\.)out_lin$", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|experts|(^|\.)(fc[12]|lin[12])$", re.IGNORECASE)
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Candidate:
    """A layer that could be adapted.

    Attributes:
        module: The layer.
        info: Its sizes and kind.
        block: Index of the transformer block it lies in, or ``None``.
        roles: Those of ``ROLES`` that it has.
        is_head: Whether it is the model's output head.
    """

    module: nn.Module
    info: LayerInfo
    block: int | None
    roles: frozenset[str]
    is_head: bool


def roles_of(info: LayerInfo, hidden_size: int | None) -> frozenset[str]:
    """The roles of a layer, from its name and, where that is silent, its shape."""
    leaf = info.name.rpartition(".")[2]
    roles = set()
    if _ATTENTION.search(info.name):
        roles.add("attention")
    elif _MLP.search(info.name):
        roles.add("mlp")
    # BERT names both writers and a pooler "dense"; only the shape and the parent tell.
    if leaf in _READERS or info.name.endswith("intermediate.dense"):
        roles.add("reader")
    elif leaf in _WRITERS or info.name.endswith("output.dense"):
        roles.add("writer")
    elif hidden_size is not None and info.d_in != info.d_out:
        if info.d_in == hidden_size:
            roles.add("reader")
        elif info.d_out == hidden_size:
            roles.add("writer")
        else:
            roles.add("inner")
    elif hidden_size is not None and info.d_in != hidden_size:
        roles.add("inner")
    return frozenset(roles)


def _hidden_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    get_text = getattr(config, "get_text_config", None)
    if callable(get_text):
        config = get_text()
    for key in ("hidden_size", "n_embd", "d_model", "dim"):
        value = getattr(config, key, None)
        if type(value) is int:
            return value
    return None


def _head_names(model: nn.Module) -> set[str]:
    """Names of the output head: the LM head, or the classifier of a classification model."""
    heads: list[object] = []
    get_head = getattr(model, "get_output_embeddings", None)
    if callable(get_head):
        # Some models inherit the method but have no head.
        with contextlib.suppress(AttributeError, NotImplementedError):
            heads.append(get_head())
    if re.search(r"For\w*(Classification|QuestionAnswering|MultipleChoice)", type(model).__name__):
        prefix = getattr(model, "base_model_prefix", None)
        heads.extend(
            m for name, child in model.named_children() if name != prefix for m in child.modules()
        )
    return {name for name, m in model.named_modules() if any(m is h for h in heads)}


def _block_index(model: nn.Module, name: str) -> int | None:
    for match in _INDEX.finditer(name):
        parent = name[: match.start(1)].rstrip(".")
        if not parent or isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
            return int(match.group(1))
    return None


def candidates(model: nn.Module) -> list[Candidate]:
    """Every layer of the model that could be adapted, in the model's order."""
    hidden, heads = _hidden_size(model), _head_names(model)
    bypassed = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = []
    for name, module in _base_modules(model):
        # nn.MultiheadAttention reads out_proj.weight without calling the module: hooks
        # on it would never run, and the adapter would silently do nothing.
        if id(module) in bypassed:
            continue
        info = describe(module, name)
        if info is not None:
            found.append(
                Candidate(
                    module, info, _block_index(model, name), roles_of(info, hidden), name in heads
                )
            )
    return found


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model itself: what adapters have added is left out."""
    for name, module in model.named_modules():
        if SLOT not in name.split(".") and SAVED not in name.split("."):
            yield name, module


def _matches(candidate: Candidate, target: str) -> bool:
    if target == "all-linear":
        return not candidate.is_head
    if target in ROLES:
        return target in candidate.roles and not candidate.is_head
    if target.startswith("re:"):
        return matches_regex(target[3:], candidate.info.name)
    return matches_name(target, candidate.info.name)


@one_operation()
def select(model: nn.Module, config: AdapterConfig) -> list[Candidate]:
    """The layers that ``config`` names, in the model's order.

    Raises:
        TargetError: If a target matches nothing (so that a typing error in one of several
            targets is not lost), or if nothing is left.
    """
    pool = candidates(model)
    if not pool:
        raise TargetError(
            f"{type(model).__name__} has no linear-like layer.",
            expected="nn.Linear, Conv1D or a quantised linear layer",
            fix="pass the model itself, not its configuration or a layer of it",
        )
    keep = {
        c.info.name
        for c in pool
        if not any(_matches(c, t) for t in config.exclude)
        and not any(_inside(c.info.name, s) for s in config.modules_to_save)
    }
    wanted_blocks = _blocks(pool, config.layers)
    chosen: set[str] = set()
    for target in config.target_list:
        names = {c.info.name for c in pool if _matches(c, target)}
        if not names:
            raise _no_match(model, pool, target)
        chosen |= names
    result = [
        c
        for c in pool
        if c.info.name in chosen & keep and (wanted_blocks is None or c.block in wanted_blocks)
    ]
    if not result:
        raise TargetError(
            "No layer is left to adapt.",
            expected=f"layers matching {config.target_list}",
            got=f"{len(chosen)} matched, all removed by exclude={config.exclude}, "
            f"layers={config.layers} or modules_to_save={config.modules_to_save}",
            fix="loosen exclude or layers",
        )
    _warn_of_the_unused(pool, config)
    if "all-linear" in config.target_list:
        _warn_of_experts(model)
    return result


def _warn_of_the_unused(pool: Sequence[Candidate], config: AdapterConfig) -> None:
    """Names the entries of ``exclude`` and of the patterns that no layer of the model has.

    A warning only: unlike a target, such an entry is harmless where one configuration serves
    several models.
    """
    names = [c.info.name for c in pool]
    unused = [("exclude", t) for t in config.exclude if not any(_matches(c, t) for c in pool)]
    for field in ("rank_pattern", "alpha_pattern"):
        unused += [
            (field, key)
            for key in getattr(config, field, ())
            if not any(first_matching_key((key,), name) for name in names)
        ]
    for field, entry in unused:
        near = difflib.get_close_matches(entry, {n.rpartition(".")[2] for n in names}, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "correct it, or leave it out"
        warnings.warn(
            f"{field} names {entry!r}, which matches no layer of this model, and does nothing "
            f"({hint}). A layer is matched by its whole name or its end, not by its parent.",
            UserWarning,
            stacklevel=4,
        )


def _warn_of_experts(model: nn.Module) -> None:
    """Says that experts kept in one three-dimensional parameter get no adapter."""
    left = sorted(
        {
            name.rpartition(".")[2]
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and ".experts." in f".{name}"
        }
    )
    if left:
        warnings.warn(
            f"The experts of {type(model).__name__} ({', '.join(left)}) are three-dimensional "
            "parameters, not layers, and get no adapter; the other linear layers do. Name the "
            'layers you want, e.g. targets="attention", to make this warning go away.',
            UserWarning,
            stacklevel=4,
        )


def _inside(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _blocks(pool: Sequence[Candidate], layers: Sequence[int] | None) -> set[int] | None:
    if layers is None:
        return None
    blocks = [c.block for c in pool if c.block is not None]
    count = max(blocks) + 1 if blocks else 0
    for index in layers:
        if not -count <= index < count:
            raise TargetError(
                f"layers names block {index}, which the model does not have.",
                expected=f"indices from {-count} to {count - 1}" if count else "no blocks at all",
                got=index,
                key="layers",
            )
    return {index % count for index in layers}


def _no_match(model: nn.Module, pool: Sequence[Candidate], target: str) -> TargetError:
    leaves = sorted({c.info.name.rpartition(".")[2] for c in pool})
    roles = [r for r in ROLES if any(r in c.roles for c in pool)]
    known = [*leaves, *roles, "all-linear"]
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
    names = {name for name, _ in model.named_modules()}
    exists = any(matches_name(target, n) for n in names if n)
    return TargetError(
        f"No layer that can be adapted matches {target!r}.",
        expected=f"one of {', '.join(known)}, a longer name, a glob or 're:<expression>'",
        got="a module that is not linear-like" if exists else target,
        fix=f"did you mean {' or '.join(map(repr, near))}?" if near else None,
        key="targets",
    )


def find_modules(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules that ``modules_to_save`` names, each name matching at least one.

    Raises:
        TargetError: If a name matches no module.
    """
    found: dict[str, nn.Module] = {}
    pool = list(_base_modules(model))
    for wanted in names:
        hits = {n: m for n, m in pool if n and matches_name(wanted, n)}
        if not hits:
            leaves = sorted({n.rpartition(".")[2] for n, _ in pool if n})
            near = difflib.get_close_matches(wanted, leaves, n=3)
            raise TargetError(
                f"modules_to_save names {wanted!r}, which the model does not have.",
                expected="the name of a module, or its end",
                got=wanted,
                fix=f"did you mean {' or '.join(map(repr, near))}?" if near else None,
                key="modules_to_save",
            )
        found |= hits
    return list(found.items())
