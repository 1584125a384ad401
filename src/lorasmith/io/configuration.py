"""The configuration in an adapter's files: PEFT's fields and our own record, read and written.

**Reading.** Every variant is asked in turn whether ``adapter_config.json`` is one of its own
(``Variant.from_peft``); the first that says so gives the configuration. Which layers it is for
is told by the names of the tensors, not by ``target_modules``, since only they are certain.
What a variant knows but does not support leaves a configuration that describes the factors, and
a reason why the adapter cannot be loaded. Fields that nobody knows are warned of, unless they are
empty. Where our own file is there, its configuration is taken instead (:func:`record_config`).

**Writing.** ``Variant.to_peft`` gives the variant's fields, and :func:`peft_fields` what all
variants have: targets that mean exactly the adapted layers, short where they can be, and patterns
without keys that match nothing, which PEFT would warn of.

**Limits.** A scaling of more than :data:`MAX_SCALING`, and a negative one in a file, are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorasmith.core.config import AdapterConfig, LowRankConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.patterns import first_matching_key
from lorasmith.core.registry import config_from_dict, variants
from lorasmith.core.variant import Variant
from lorasmith.errors import (
    AdapterFileError,
    LorasmithError,
    UnsupportedFeatureError,
    in_file,
)
from lorasmith.io import peft
from lorasmith.io.checks import some
from lorasmith.io.layout import arrange
from lorasmith.io.tensors import TensorSource

__all__ = [
    "MAX_SCALING",
    "check_scaling",
    "peft_fields",
    "record_config",
    "saved_tensors",
    "translate",
]

#: Largest factor on B A that can be meant. PEFT's default is 1, usual values are below
#: 10, rank-stabilised ones below 50.
MAX_SCALING = 1000.0


# Reading -------------------------------------------------------------------------------------


def translate(
    fields: Mapping[str, Any], tensors: TensorSource, file: Path
) -> tuple[AdapterConfig, str | None]:
    """Our configuration for PEFT's fields, and why the adapter cannot be loaded, if so.

    Args:
        fields: ``adapter_config.json``.
        tensors: Those of the weights file.
        file: The configuration's path, for messages.

    Raises:
        AdapterFileError: If no variant knows the file, or a value in it is impossible.
    """
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterFileError(
            "The configuration does not say what kind of adapter it is.",
            file=file,
            key="peft_type",
            expected="a string such as 'LORA'",
            got=repr(kind),
        )
    try:
        config = _claim(fields, tensors)
    except UnsupportedFeatureError as error:
        # What is left of the configuration describes the factors all the same.
        readable = {k: v for k, v in fields.items() if k != error.key}
        config, more = translate(readable, tensors, file)
        reason = f"{error.what} ({error.key} = {error.got})"
        return config, reason if more is None else f"{reason}\n{more}"
    except LorasmithError as error:
        # What the tensors lack is the other file's fault.
        of_weights = isinstance(error, AdapterFileError)
        raise in_file(
            error, file.with_name(peft.WEIGHTS) if of_weights else file, AdapterFileError
        ) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise AdapterFileError(
            f"A value in the configuration has an impossible type: {error}.",
            file=file,
            expected="what PEFT writes",
            got=f"{type(error).__name__}: {error}"[:200],
        ) from error
    if config is not None:
        _warn_of_unknown(fields, file)
        return config, None
    known = sorted({v.peft_type for v in variants().values()})
    raise AdapterFileError(
        f"Adapters of PEFT's type {kind} are not known.",
        file=file,
        key="peft_type",
        expected=", ".join(known),
        got=kind,
        fix="lorasmith.register(...) adds a variant of your own; on the command line, "
        "--plugin FILE",
    )


def _warn_of_unknown(fields: Mapping[str, Any], file: Path) -> None:
    kind = fields.get("peft_type")
    own = [v.peft_fields for v in variants().values() if v.peft_type == kind and v.peft_fields]
    known = peft.COMMON_FIELDS.union(*own) if own else None
    neutral: tuple[object, ...] = (None, False, "", [], {})
    unknown = [k for k, v in fields.items() if known and k not in known and v not in neutral]
    if unknown:
        warnings.warn(
            f"{file} holds fields that lorasmith does not know, perhaps of a newer PEFT: "
            f"{some(sorted(unknown))}. They are ignored; if they change what the adapter "
            "computes, it will not act as it did in training.",
            UserWarning,
            stacklevel=6,
        )


def _claim(fields: Mapping[str, Any], tensors: TensorSource) -> AdapterConfig | None:
    """The configuration of the first variant whose file it is, or ``None``."""
    told: dict[str, Any] = {}
    for variant in variants().values():
        told |= variant.fields_from_tensors(tensors, tensors.shape)
    fields = {**fields, **told}
    for variant in variants().values():
        # First with any targets: which tensors are the variant's own, hence which modules
        # it adapts, is only known once it has read its fields.
        common: dict[str, Any] = {
            "targets": "all-linear",
            "exclude": (),
            "layers": None,
            "modules_to_save": (),
        }
        config = variant.from_peft(fields, common)
        if config is None:
            continue
        keys, rest = arrange(variant, config, tensors)
        saved = saved_tensors(rest, fields)
        common["targets"] = peft.plain_targets(fields, list(keys))
        common["modules_to_save"] = tuple(dict.fromkeys(saved.values()))
        found: AdapterConfig | None = variant.from_peft(fields, common)
        return found
    return None


def record_config(record: Mapping[str, Any], file: Path) -> AdapterConfig | None:
    """The configuration in our own file, or ``None`` if it holds none.

    Raises:
        AdapterFileError: If it cannot be used.
    """
    values = record.get("config")
    if values is None:
        return None
    try:
        return config_from_dict(values)
    except LorasmithError as error:
        raise in_file(error, file, AdapterFileError) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise AdapterFileError(
            f"The configuration is malformed: {error}.",
            file=file,
            key="config",
            expected="an object, as lorasmith writes it",
            got=repr(values)[:200],
        ) from error


def saved_tensors(rest: Collection[str], fields: Mapping[str, Any]) -> dict[str, str]:
    """``"<module>.<tensor>"`` → module, of the tensors that ``modules_to_save`` explains.

    Args:
        rest: Names in the file that are no tensor of the variant.
        fields: ``adapter_config.json``.
    """
    given = fields.get("modules_to_save") or ()
    wanted = [
        m
        for m in (*given, *peft.implied_modules(fields.get("task_type")))
        if isinstance(m, str) and m
    ]
    found = {}
    for key in rest:
        name = key.removeprefix(peft.PREFIX)
        module = peft.replaced_module(wanted, name)
        if module is not None and name != key:
            found[name] = module
    return found


# Writing -------------------------------------------------------------------------------------


def peft_fields(
    variant: Variant,
    config: AdapterConfig,
    infos: Mapping[str, LayerInfo],
    *,
    names: Collection[str],
    saved: list[str],
    task: str | None,
    base: str | None,
) -> dict[str, Any]:
    """``adapter_config.json`` for an adapter.

    Args:
        variant: Its variant.
        config: Its configuration, as the file has it.
        infos: Module name → layer, of all that it adapts.
        names: Names of all modules of the model; empty if they are not known.
        saved: Modules that are saved as a whole.
        task: PEFT's ``task_type``.
        base: The name or path of the base model.
    """
    fields = variant.to_peft(config, infos)
    feedforward = fields.get("feedforward_modules")
    reach = (*saved, *peft.implied_modules(task))
    targets, inner = peft.shorten(list(infos), feedforward, list(names), reach)
    fields = {
        "peft_type": variant.peft_type,
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": saved or None,
        **fields,
    }
    if inner is not None:
        fields["feedforward_modules"] = inner
    for name in ("rank_pattern", "alpha_pattern"):
        if fields.get(name):
            # PEFT warns of keys that match nothing.
            used = {first_matching_key(fields[name], m) for m in infos}
            fields[name] = {k: v for k, v in fields[name].items() if k in used}
    return {k: _whole(v) for k, v in fields.items()}


def _whole(value: Any) -> Any:
    """16.0 → 16: PEFT and vLLM declare alpha as an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    return value


# Limits --------------------------------------------------------------------------------------


def check_scaling(
    config: AdapterConfig, modules: Iterable[str], file: Path | None, *, negative: bool
) -> None:
    """Raises an ``AdapterFileError`` if a layer's factor on B A cannot be meant.

    Args:
        config: The configuration; of variants without a rank there is nothing to check.
        modules: The adapted layers.
        file: The configuration's path, for messages.
        negative: Whether alpha may be negative. No training leaves such a one; in a file it
            turns the adapter round.
    """
    if not isinstance(config, LowRankConfig):
        return
    for module in modules:
        scaling = config.scaling_of(module)
        if not abs(scaling) <= MAX_SCALING:
            raise AdapterFileError(
                "The scaling of the adapter is not plausible.",
                file=file,
                key=module,
                expected=f"alpha / r (or alpha / √r) of at most {MAX_SCALING:g}",
                got=f"{scaling:g} (alpha {config.alpha_of(module):g}, r {config.rank_of(module)})",
                fix="correct lora_alpha",
            )
        if scaling < 0 and not negative:
            raise AdapterFileError(
                "The scaling of the adapter is negative.",
                file=file,
                key="lora_alpha",
                expected="alpha of 0 or more",
                got=f"{config.alpha_of(module):g} for {module}",
                fix="correct lora_alpha; to take an adapter away, merge it with weight -1",
            )
