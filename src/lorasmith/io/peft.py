"""What HF PEFT's directories mean, beyond what one variant can tell (PEFT 0.21.2).

Pure functions on names and on the fields of ``adapter_config.json``; PEFT itself is not
imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import regex
from torch import nn

from lorasmith.core.patterns import check_amount, match_beginning, matches_regex
from lorasmith.core.state import SAVED, SLOT
from lorasmith.core.targets import ROLES
from lorasmith.errors import AdapterFileError

__all__ = [
    "COMMON_FIELDS",
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "base_name",
    "check_fields",
    "implied_modules",
    "module_names",
    "plain_targets",
    "replaced_module",
    "replaced_modules",
    "shorten",
    "targeted",
    "task_type",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
#: What stands before every module name in PEFT's tensor names.
PREFIX = "base_model.model."

#: What PEFT's configuration may hold for adapters of any type.
COMMON_FIELDS = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode "
    "modules_to_save peft_type peft_version revision target_modules task_type".split()
)
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


#: Entries of ``modules_to_save``, each of which is looked for in every name of the model.
_MOST_SAVED = 1000
_NAMES_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")


def check_fields(fields: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Checks the fields that name modules, whatever the adapter's type.

    Args:
        fields: ``adapter_config.json``.
        file: Its path, for messages.

    Raises:
        AdapterFileError: If one has an impossible type, or too many entries.
    """

    def refuse(key: str, expected: str) -> AdapterFileError:
        return AdapterFileError(
            "A field of the configuration has an impossible type or value.",
            file=file,
            key=key,
            expected=expected,
            got=repr(fields[key])[:200],
        )

    def strings(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    for key in _NAMES_FIELDS:
        value = fields.get(key)
        if value is not None and not isinstance(value, str) and not strings(value):
            raise refuse(key, "a list of names, or a regular expression")
    saved = fields.get("modules_to_save")
    if saved is not None and (not strings(saved) or len(saved) > _MOST_SAVED):
        raise refuse("modules_to_save", f"a list of at most {_MOST_SAVED:,} names")
    layers = fields.get("layers_to_transform")
    whole = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(n) is int for n in whole):
        raise refuse("layers_to_transform", "a number, or a list of numbers")


def module_names(model: nn.Module) -> list[str]:
    """Names of the model's own modules, without what adapters have added."""
    return [
        name
        for name, _ in model.named_modules()
        if name and SLOT not in name.split(".") and SAVED not in name.split(".")
    ]


def base_name(model: nn.Module) -> str | None:
    """The name or path that the model was loaded from, if it knows."""
    for holder in (getattr(model, "config", None), model):
        for attribute in ("_name_or_path", "name_or_path"):
            value = getattr(holder, attribute, None)
            if isinstance(value, str) and value:
                return value
    return None


def task_type(model: nn.Module) -> str | None:
    """PEFT's ``task_type`` for the model's class, or ``None`` where none of them fits."""
    name = type(model).__name__
    if "ForSequenceClassification" in name:
        return "SEQ_CLS"
    if "ForTokenClassification" in name:
        return "TOKEN_CLS"
    if "ForQuestionAnswering" in name:
        return "QUESTION_ANS"
    # PEFT's classes for generation call this method when they are made.
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def implied_modules(task: object) -> tuple[str, ...]:
    """What PEFT adds to ``modules_to_save`` for a task type on its own accord."""
    return _HEADS.get(task, ()) if isinstance(task, str) else ()


def _list_matches(wanted: Collection[str], name: str) -> bool:
    """Whether a name, or an end of it after a dot, is in a list."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in wanted for start in range(len(parts)))


def _matches(wanted: str | Collection[str], name: str, key: str) -> bool:
    if isinstance(wanted, str):
        return matches_regex(wanted, name, key=key)
    return _list_matches(wanted, name)


def replaced_modules(wanted: Collection[str], names: Iterable[str]) -> list[str]:
    """The modules that PEFT would replace by a trainable copy for ``modules_to_save``.

    PEFT takes every module whose name ends in one of the wanted names, dot or no dot:
    "classifier" also catches DistilBERT's "pre_classifier".
    """
    found: list[str] = []
    for name in names:
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and name.endswith(tuple(wanted)):
            found.append(name)
    return found


def replaced_module(wanted: Collection[str], tensor: str) -> str | None:
    """The module of ``modules_to_save`` that a tensor belongs to, from its name alone."""
    if not wanted:
        return None
    parts = tensor.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count])
        if prefix.endswith(tuple(wanted)):
            return prefix
    return None


def _out_of_reach(name: str, saved: Collection[str]) -> bool:
    """Whether PEFT keeps adapters off a module because it is in ``modules_to_save``."""
    return any(matches_regex(rf"(^|.*\.){m}($|\..*)", name, key="modules_to_save") for m in saved)


def targeted(
    fields: Mapping[str, Any], names: Iterable[str], is_head: Callable[[str], bool]
) -> set[str] | None:
    """Those of the modules that PEFT would adapt, or ``None`` if the fields do not tell.

    Args:
        fields: ``adapter_config.json``.
        names: Names of the modules that could be adapted.
        is_head: Whether a module is the model's output head (for ``"all-linear"``).
    """
    wanted = fields.get("target_modules")
    if not wanted or not isinstance(wanted, str | list):
        return None
    wanted = wanted if isinstance(wanted, str) else frozenset(wanted)
    if wanted == "all-linear":
        chosen = {n for n in names if not is_head(n)}
    else:
        chosen = {n for n in names if _matches(wanted, n, "target_modules")}
        if not isinstance(wanted, str):
            chosen = {n for n in chosen if n in wanted or _in_layers(fields, n)}
    exclude = fields.get("exclude_modules")
    if exclude:
        chosen = {n for n in chosen if not _matches(exclude, n, "exclude_modules")}
    saved = (*(fields.get("modules_to_save") or ()), *implied_modules(fields.get("task_type")))
    check_amount(saved, key="modules_to_save")
    return {n for n in chosen if not _out_of_reach(n, saved)}


def _in_layers(fields: Mapping[str, Any], name: str) -> bool:
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
    if layers is None or layers == []:
        return True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    check_amount(patterns, key="layers_pattern")
    for pattern in patterns:
        whole = rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
        found = match_beginning(whole, name, key="layers_pattern")
        if found is not None:
            return int(found["idx"][:9]) in wanted
    return False


def shorten(
    chosen: Collection[str],
    feedforward: Collection[str] | None,
    names: Sequence[str],
    saved: Collection[str],
) -> tuple[list[str] | str, list[str] | str | None]:
    """``target_modules`` and ``feedforward_modules`` that mean exactly the given modules.

    The last parts of the names where they catch nothing else in the model, the full names
    otherwise, and a regular expression where even those would catch other modules.

    Args:
        chosen: Names of the adapted modules.
        feedforward: Those whose gain PEFT is to put on the input (IA3), or ``None`` for
            variants without that field.
        names: Names of all modules of the model; empty if they are not known.
        saved: ``modules_to_save`` as PEFT will see it; adapters stay off those.
    """

    def catches(wanted: Collection[str]) -> set[str]:
        return {n for n in names if _list_matches(wanted, n) and not _out_of_reach(n, saved)}

    def leaves(group: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(n.rpartition(".")[2] for n in group))

    def split(wanted: Collection[str]) -> set[str]:
        # Here PEFT does not ask for a dot before the end.
        return {n for n in chosen if n.endswith(tuple(wanted))} if wanted else set()

    for form in (leaves, list):
        targets = form(chosen)
        if form is leaves and not names:
            continue
        if names and catches(targets) != set(chosen):
            continue
        inner = None if feedforward is None else form(feedforward)
        if inner is None or split(inner) == set(feedforward or ()):
            return targets, inner
    either = "|".join(regex.escape(n) for n in chosen)
    if feedforward is None:
        return either, None
    # One that matches nothing in place of an empty one, which would be "not given".
    return either, "|".join(regex.escape(n) for n in feedforward) or r"(?!)"


def plain_targets(fields: Mapping[str, Any], modules: Sequence[str]) -> tuple[str, ...]:
    """Our ``targets`` for PEFT's: the same names where they mean the same to us."""
    given = fields.get("target_modules")
    special = {*ROLES, "all-linear"}
    if (
        isinstance(given, list)
        and given
        and all(isinstance(g, str) and g and g not in special for g in given)
        and not any(c in g for g in given for c in "*?[:")
        and not fields.get("exclude_modules")
        and fields.get("layers_to_transform") in (None, [])
        and all(_list_matches(given, m) for m in modules)
    ):
        return tuple(sorted(given))
    return tuple(modules)
