"""Saving, loading and reading adapters: PEFT's directories, read strictly.

A directory holds PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, so that
PEFT, vLLM and others use it as it is, and ``lorasmith.json`` beside them with what PEFT
cannot express: the configuration in our own words, the base model's fingerprint, and the
SHA-256 of both other files, which binds the three to one generation.
"""

from __future__ import annotations

import difflib
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import Adapter, attached, unwrap
from lorasmith.core.attach import check_free, put, refuse_unreadable, trainable_copy
from lorasmith.core.config import AdapterConfig, check_number, checked_pattern
from lorasmith.core.factors import factors_of
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.patterns import first_matching_key, one_operation
from lorasmith.core.quantized import refuse_gradless
from lorasmith.core.registry import variant_of
from lorasmith.core.state import LayerAdapter, SharedTensors
from lorasmith.core.targets import candidates
from lorasmith.core.variant import Factors, NewTensors
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    FuseError,
    LorasmithError,
    in_file,
)
from lorasmith.io import peft
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.hub import locate
from lorasmith.io.strict import check_inside, parse_object, read_limited, read_object
from lorasmith.io.tensors import FileTensors, identity, sha256_of
from lorasmith.io.tokenizers import TokenizerRecord
from lorasmith.io.weights import (
    FORMAT,
    OWN,
    AdapterWeights,
    BaseModel,
    check_finite,
    reason_for,
    record_config,
    translate,
)

__all__ = ["factors", "load", "read_adapter", "save"]

#: Times that files are read again while somebody is replacing them, and seconds between.
_TRIES = 20
_PAUSE = 0.05


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    beside: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Saves an adapter of a model as a directory that PEFT can load, too.

    The files are replaced as a whole or not at all, and are on disk when this returns;
    other files in the directory stay. In distributed training only rank 0 writes; where
    tensors are sharded, every rank must call it.

    Args:
        model: The model.
        path: The directory; made with its parents if it does not exist.
        name: Which adapter; the active or only one by default.
        beside: Whether a directory that holds other files and no adapter will do; they stay.
        tokenizer: The tokenizer that it was trained with, if it is to be recorded (as two hashes,
            see :mod:`lorasmith.io.tokenizers`).

    Returns:
        The directory.

    Raises:
        ConfigError: If that is no model.
        UnknownNameError: If there is no such adapter.
        AdapterFileError: If a value is not finite, the path holds something other than an
            adapter, or writing fails.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "Only an adapter on a model is saved by this function.",
            expected="a model (torch.nn.Module)",
            got=type(model).__name__,
            fix="fleets and adapters that have been read have a method for it: .save(path)",
            key="model",
        )
    weights = AdapterWeights.from_model(model, name)
    if tokenizer is not None:
        weights.base = replace(weights.base, tokenizer=TokenizerRecord.of(tokenizer))
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return Path(path)
    return weights.save(path, beside=beside)


@one_operation()
def read_adapter(path: str | os.PathLike[str]) -> AdapterWeights:
    """Reads an adapter without a model; tensors are read one by one when asked for.

    Names, shapes and dtypes of all tensors are checked at once, and where our own file is
    beside PEFT's, that all are of one generation.

    Args:
        path: A directory, a directory with one adapter in a subdirectory, a hub id, or a URL
            that fsspec knows (``s3://…``, ``hf://owner/name@revision``).

    Raises:
        AdapterFileError: If it is incomplete, inconsistent or not an adapter.
    """
    folder = locate(path)
    failure: LorasmithError | None = None
    for _ in range(_TRIES):
        before, failure = _identities(folder), None
        try:
            weights = _read(folder)
        except LorasmithError as error:
            failure = error
        except OSError as error:
            failure = AdapterFileError(f"A file cannot be read: {error}.", file=folder)
        else:
            if _identities(folder) == before:
                return weights
        # Somebody may be replacing the files; then they are others in a moment.
        time.sleep(_PAUSE)
        if failure is not None and _identities(folder) == before:
            raise failure
    raise failure or AdapterFileError(
        "The adapter's files change faster than they can be read.",
        file=folder,
        fix="wait until whoever writes them has finished",
    )


def _identities(folder: Path) -> list[tuple[int, ...] | None]:
    return [identity(folder / name) for name in (peft.CONFIG, peft.WEIGHTS, OWN)]


def _read(folder: Path) -> AdapterWeights:
    config_file, weights_file, own_file = (
        folder / peft.CONFIG,
        folder / peft.WEIGHTS,
        folder / OWN,
    )
    if not weights_file.is_file():
        pickled = (folder / peft.PICKLE).is_file()
        raise AdapterFileError(
            "The adapter's weights are a pickle file, which can run any code when it is read."
            if pickled
            else "The adapter has no weights.",
            file=folder,
            expected=peft.WEIGHTS,
            got=peft.PICKLE if pickled else None,
            fix="load it with PEFT where you trust it, and save it again as safetensors"
            if pickled
            else "save or download the adapter again (pickle files are not read)",
        )
    check_inside(weights_file, folder)
    data = read_limited(config_file, root=folder)
    fields = parse_object(data, config_file)
    peft.check_fields(fields, config_file)
    tensors = FileTensors(weights_file)
    record = _own_record(folder, data, weights_file)
    config, unsupported = None, None
    if record is not None:
        config = record_config(record, own_file)
    if config is not None:
        _agree(config, fields, own_file)
    else:
        config, unsupported = translate(fields, tensors, config_file)
    try:
        weights = AdapterWeights(
            config,
            fields,
            tensors,
            base=_base(fields, record, own_file),
            frozen=_names(record, "frozen", own_file),
            padding=_names(record, "padding", own_file),
            sizes=_sizes(record, own_file),
            unsupported=unsupported,
            path=folder,
        )
        if record is not None and unsupported is None:
            _agree_on_layers(weights, own_file)
        return weights
    except AdapterFileError as error:
        if error.file is not None:
            raise
        raise in_file(error, weights_file, AdapterFileError) from error
    except ConfigError as error:  # a pattern of ranks that takes too long
        raise in_file(error, config_file, AdapterFileError) from error


def _own_record(folder: Path, config: bytes, weights: Path) -> dict[str, Any] | None:
    """What ``lorasmith.json`` says, or ``None`` if it is not there or of other files."""
    import hashlib

    own = folder / OWN
    try:
        record = read_object(own, root=folder)
    except FileNotFoundError:
        return None
    version = record.get("format")
    if version != FORMAT:
        raise AdapterFileError(
            "The record beside the adapter has a format that this version does not know.",
            file=own,
            key="format",
            expected=FORMAT,
            got=repr(version),
            fix=f"upgrade lorasmith, or delete {OWN} to read the adapter as one of PEFT's",
        )
    manifest = record.get("manifest")
    entries = manifest if isinstance(manifest, dict) else {}
    wanted = [
        entry.get("sha256") if isinstance(entry, dict) else None
        for entry in (entries.get(peft.CONFIG), entries.get(peft.WEIGHTS))
    ]
    got = [hashlib.sha256(config).hexdigest(), sha256_of(weights)]
    same = [w == g for w, g in zip(wanted, got, strict=True)]
    if all(same):
        return record
    if not any(same):
        warnings.warn(
            f"{os.fspath(own)} describes other files than those beside it (another program "
            "has replaced them); it is ignored. Save the adapter again to renew it.",
            UserWarning,
            stacklevel=5,
        )
        return None
    changed, kept = (peft.CONFIG, peft.WEIGHTS) if same[1] else (peft.WEIGHTS, peft.CONFIG)
    raise AdapterFileError(
        f"The files are of different generations: {changed} is not the one that was saved "
        f"with {kept}.",
        file=folder / changed,
        key=changed,
        expected="the file with the SHA-256 that lorasmith.json records",
        got="another: it was replaced, or is damaged",
        fix="copy or save the adapter again; if the change was meant, delete " + OWN,
    )


def _agree(config: AdapterConfig, fields: Mapping[str, Any], file: Path) -> None:
    """Our configuration and PEFT's must say the same: nobody has edited ours."""
    variant = variant_of(config)
    nearest: list[tuple[str, object, object]] = []
    for frozen in ((), ("A0", "B0")):
        mine: dict[str, Any] = {"peft_type": variant.peft_type}
        mine |= variant.to_peft(variant.file_config(config, frozen), {})
        # How it began is told to PEFT in other words; the rest depends on the layers.
        keys = [
            k
            for k, v in mine.items()
            if isinstance(v, int | float | str)
            and k != "fan_in_fan_out"
            and not k.startswith("init_")
        ]
        wrong = [
            (k, fields.get(k), mine[k]) for k in keys if k not in fields or mine[k] != fields[k]
        ]
        if not wrong:
            return
        if not nearest or len(wrong) < len(nearest):
            nearest = wrong
    raise _disagree(*nearest[0], file)


def _disagree(key: str, theirs: object, mine: object, file: Path) -> AdapterFileError:
    return AdapterFileError(
        f"{OWN} and {peft.CONFIG} describe different adapters.",
        file=file,
        key=key,
        expected=repr(theirs)[:200],
        got=repr(mine)[:200],
        fix=f"save or copy the adapter again, or delete {OWN}",
    )


def _matching(pattern: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """The part of a ``rank_pattern`` or ``alpha_pattern`` that says something of these layers."""
    used = {first_matching_key(pattern, m) for m in modules}
    return {k: v for k, v in pattern.items() if k in used}


def _agree_on_layers(weights: AdapterWeights, file: Path) -> None:
    """What depends on the layers must agree as well: patterns, targets, whole modules."""
    variant, fields, modules = weights.variant, weights.peft, weights.modules
    mine = variant.to_peft(variant.file_config(weights.config, weights.frozen), weights.layers)
    for key in [k for k, v in mine.items() if k.endswith("_pattern") and isinstance(v, Mapping)]:
        # What matches no layer is not written, or is of a LoRA on an embedding.
        stranger = checked_pattern(fields.get(key) or {}, key, check_number)
        theirs, wanted = (_matching(x, modules) for x in (stranger, mine[key]))
        if theirs != wanted:
            raise _disagree(key, theirs, wanted, file)
    targets = peft.targeted(fields, modules, lambda _: False)
    if targets is not None and targets != set(modules):
        left = sorted(set(modules) - targets)
        raise _disagree("target_modules", fields["target_modules"], f"{left[0]} too", file)
    for name in fields.get("modules_to_save") or ():
        if not any(f".{m}".endswith(f".{name}") for m in weights.saved_modules):
            raise _disagree("modules_to_save", fields["modules_to_save"], "no such tensors", file)


def _names(record: Mapping[str, Any] | None, key: str, file: Path) -> list[str]:
    values = [] if record is None else record.get(key, [])
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise AdapterFileError(
            "A field is malformed.",
            file=file,
            key=key,
            expected="a list of names",
            got=repr(values)[:200],
        )
    return values


def _sizes(record: Mapping[str, Any] | None, file: Path) -> dict[str, tuple[int, int]]:
    values = {} if record is None else record.get("sizes", {})
    if isinstance(values, dict) and all(
        isinstance(v, list) and len(v) == 2 and all(type(i) is int and i > 0 for i in v)
        for v in values.values()
    ):
        return {module: (v[0], v[1]) for module, v in values.items()}
    raise AdapterFileError(
        "A field is malformed.",
        file=file,
        key="sizes",
        expected="{module: [d_in, d_out]}",
        got=repr(values)[:200],
    )


def _base(fields: Mapping[str, Any], record: Mapping[str, Any] | None, file: Path) -> BaseModel:
    name = fields.get("base_model_name_or_path")
    values = None if record is None else record.get("base")
    stored = values.get("fingerprint") if isinstance(values, dict) else None
    words = values.get("tokenizer") if isinstance(values, dict) else None
    try:
        found = None if stored is None else Fingerprint.from_dict(stored)
        tokenizer = None if words is None else TokenizerRecord.from_dict(words)
    except AdapterFileError as error:
        raise in_file(error, file, AdapterFileError) from error
    return BaseModel(name if isinstance(name, str) and name else None, found, tokenizer)


@one_operation()
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
    dequantize: bool = False,
) -> Adapter:
    """Loads an adapter, written by us or by PEFT, onto a model and makes it the active one.

    The tensors in the files are all there is to it: no initialisation is run, and the
    base weights stay as they are. They become float32 whatever they are stored in.

    Args:
        model: The base model.
        path: A directory, a directory with one adapter in a subdirectory, or a hub id.
        name: Name for the adapter; by default "default" if it is free, else the
            directory's name.
        trainable: Whether it is to be trained further.
        allow_base_mismatch: Whether to load it although it was made for another base
            model, as its fingerprint tells. Every tensor must fit all the same.
        dequantize: Whether a variant that reads W whenever it runs (DoRA) may dequantise
            quantised layers for it, one at a time.

    Returns:
        A handle to the adapter.

    Raises:
        AdapterFileError: If the adapter is incomplete, inconsistent, or does not fit the
            model. The model is untouched then, as with all other errors.
        ConfigError: If it cannot work on this model's quantised layers.
        BaseMismatchError: If it was made for another base model.
        AttachError: If the name is taken or the model's state does not allow it.
    """
    root = unwrap(model)
    weights = read_adapter(path)
    assert weights.path is not None
    name = _default_name(root, Path(path), weights.path) if name is None else name
    check_free(root, name)
    file = weights.path / peft.WEIGHTS
    if weights.unsupported is not None:
        raise AdapterFileError(
            weights.unsupported, file=weights.path / peft.CONFIG, fix="load it with PEFT"
        )
    _refuse_unexpected(root, weights, file)
    check_base(root, weights, allow_base_mismatch)
    infos = layers_on(root, weights, file)
    check_targets(root, weights, file)
    layers = list(infos.values())
    if not dequantize and weights.variant.weight_use(weights.config) == "always":
        refuse_unreadable(weights.variant, weights.config, layers)
    if trainable:
        refuse_gradless(root)
    weights.check_shared(layers)
    common = NewTensors({}, weights.shared_tensors(layers))
    common = _moved(common, root.get_submodule(layers[0].name))
    shared = SharedTensors(common.frozen) if common.frozen else None
    parts = {}
    for module, info in infos.items():
        weights.check_shapes(info)
        new = _moved(weights.new_tensors(module, info), root.get_submodule(module))
        parts[module] = LayerAdapter(weights.variant, weights.config, info, new, shared)
    copies = {m: _copy(root, weights, m, file) for m in weights.saved_modules}
    for key in weights.padding:
        check_finite(weights.tensors[f"{peft.PREFIX}{key}"], key, file)
    return put(root, name, weights.config, parts, copies, trainable=trainable)


def _default_name(root: nn.Module, given: Path, found: Path) -> str:
    if "default" not in attached(root):
        return "default"
    # What the user wrote, or the subdirectory in it; not the hub's cache directory.
    last = found.name if given.exists() else given.name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(last).name).lstrip("-")[:128] or "adapter"


def check_fusable(
    adapter: AdapterWeights, *, unsupported: str, dependent: str, so: str = ""
) -> None:
    """Raises unless there is a weight for every layer that acts like the adapted one.

    Args:
        adapter: The adapter.
        unsupported: What to do about an adapter that lorasmith has no name for.
        dependent: What to do about one whose change depends on its input.
        so: What follows from that, at the end of the sentence.

    Raises:
        AdapterFileError: Only PEFT can use it.
        FuseError: What it does depends on the input.
    """
    if adapter.unsupported is not None:
        raise AdapterFileError(
            adapter.unsupported,
            file=adapter.path and adapter.path / peft.CONFIG,
            fix=unsupported,
        )
    if not adapter.variant.fusable:
        raise FuseError(
            f"What {adapter.variant.name} does depends on the input: there is no weight that "
            f"acts like the adapted layer{so}.",
            file=adapter.path,
            fix=dependent,
        )


def _refuse_unexpected(root: nn.Module, weights: AdapterWeights, file: Path) -> None:
    # PEFT writes embeddings and the head of the base beside adapters that target them.
    own = dict(root.named_parameters(remove_duplicate=False))
    unexpected = [k for k in weights.unexpected if not _is_copy(own, weights, k)]
    if not unexpected:
        return
    key = unexpected[0]
    reason = (
        "it is a weight of the base model with other values, which PEFT would overwrite"
        if _base_key(key) in own
        else reason_for(key)
    )
    raise AdapterFileError(
        f"The file holds a tensor that the adapter does not use: {reason}.",
        file=file,
        key=key,
        expected="tensors that the configuration explains",
        got=f"{len(unexpected)} such tensors",
        fix="load it with PEFT; lorasmith.read_adapter shows such tensors in .extras",
    )


def _base_key(key: str) -> str:
    """The base model's name of a tensor that PEFT names by its wrapper."""
    return key.replace(".base_layer.", ".")


def _is_copy(own: Mapping[str, Tensor], weights: AdapterWeights, key: str) -> bool:
    """Whether a tensor of the file is the base model's own value, so that it changes nothing."""
    mine = own.get(_base_key(key))
    if mine is None or mine.is_meta:
        return False
    value = weights.tensors[f"{peft.PREFIX}{key}"].to(mine.device)
    return value.shape == mine.shape and torch.equal(mine.detach().to(value.dtype), value)


def check_base(root: nn.Module, weights: AdapterWeights, allow: bool) -> None:
    """Raises a ``BaseMismatchError`` if the model is another than the adapter was made for."""
    stored, wanted = weights.base.fingerprint, weights.base.name
    if stored is not None and not allow:
        current = fingerprint(root, names=list(stored.sketch))
        difference = stored.compare(current)
        if not difference.same:
            raise BaseMismatchError(
                f"The adapter was made for another base model: {difference}.",
                file=weights.path,
                expected=wanted,
                got=peft.base_name(root) or type(root).__name__,
                fix="load the right base model, or pass allow_base_mismatch=True",
            )
    name = peft.base_name(root)
    if wanted is not None and name is not None and wanted != name:
        warnings.warn(
            f"The adapter names {wanted!r} as its base model, and this one is {name!r}. "
            + (
                "Their weights agree."
                if stored is not None and not allow
                else "Whether they are the same was not checked."
            ),
            UserWarning,
            stacklevel=3,
        )


def layers_on(root: nn.Module, weights: AdapterWeights, file: Path) -> dict[str, LayerInfo]:
    """Module name → the model's layer, of each that the adapter has tensors for; or an error."""
    known = {c.info.name: c.info for c in candidates(root)}
    found = {}
    for module in weights.modules:
        if module not in known:
            names = peft.module_names(root)
            near = difflib.get_close_matches(module, known, n=1, cutoff=0.8)
            raise AdapterFileError(
                "The adapter has tensors for a layer that lorasmith cannot adapt."
                if module in names
                else "The adapter has tensors for a layer that the model does not have.",
                file=file,
                key=module,
                got=f"{type(root).__name__} with {len(known)} linear-like layers",
                expected=f"e.g. {near[0] if near else next(iter(known), None)}",
                fix="load it onto the model that it was made for",
            )
        found[module] = known[module]
    return found


def check_targets(root: nn.Module, weights: AdapterWeights, file: Path) -> None:
    """Tensors and configuration must name the same layers, as PEFT reads the latter."""
    heads = {c.info.name for c in candidates(root) if c.is_head}
    able = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [c.info.name for c in candidates(root)]
    names += [
        n for n, m in root.named_modules() if isinstance(m, able) and n in peft.module_names(root)
    ]
    try:
        wanted = peft.targeted(weights.peft, names, heads.__contains__)
    except ConfigError as error:  # an expression that is wrong or takes too long
        raise in_file(error, file.with_name(peft.CONFIG), AdapterFileError) from error
    if wanted is None:
        return
    here = set(weights.modules)
    for gap, what in (
        (wanted - here, "has no tensors for a layer of this model that its configuration names"),
        (here - wanted, "has tensors for a layer that its configuration does not name"),
    ):
        if gap:
            raise AdapterFileError(
                f"The adapter {what}.",
                file=file,
                key=sorted(gap)[0],
                got=f"{len(gap)} such layers, {len(here)} with tensors",
                expected="the same layers in target_modules and in the weights",
                fix="the file may be incomplete or belong to another model; else correct "
                "target_modules",
            )


def _moved(new: NewTensors, layer: nn.Module) -> NewTensors:
    """The tensors on the layer's device; on the CPU if that is the meta device."""
    device = device_of(layer)
    if device.type == "meta":
        return new
    return NewTensors(
        {n: t.to(device) for n, t in new.trainable.items()},
        {n: t.to(device) for n, t in new.frozen.items()},
    )


def _copy(root: nn.Module, weights: AdapterWeights, module: str, file: Path) -> nn.Module:
    """The trainable copy of a module of ``modules_to_save``, with the file's values."""
    try:
        original = root.get_submodule(module)
    except AttributeError as error:
        raise AdapterFileError(
            "The adapter has a copy of a module that the model does not have.",
            file=file,
            key=module,
            fix="load it onto the model that it was made for",
        ) from error
    made = trainable_copy(original)
    wanted = made.state_dict()
    leaves = set(weights.saved_modules[module])
    for leaf in sorted(wanted.keys() ^ leaves):
        raise AdapterFileError(
            "A tensor is missing." if leaf in wanted else "A tensor is not one of the module's.",
            file=file,
            key=f"{peft.PREFIX}{module}.{leaf}",
        )
    values: dict[str, Tensor] = {}
    for leaf, mine in wanted.items():
        key = f"{peft.PREFIX}{module}.{leaf}"
        value = weights.tensors[key]
        check_finite(value, key, file)
        if value.shape != mine.shape or value.is_floating_point() != mine.is_floating_point():
            raise AdapterFileError(
                "A tensor does not fit the module that it is a copy of.",
                file=file,
                key=key,
                expected=f"{list(mine.shape)} {mine.dtype}",
                got=f"{list(value.shape)} {value.dtype}",
                fix="is it the right base model (number of labels, vocabulary)?",
            )
        values[leaf] = value.to(mine.dtype) if mine.is_meta else value.to(mine.device, mine.dtype)
    made.load_state_dict(values, assign=True)
    return made.requires_grad_(True)


def factors(
    model_or_path: nn.Module | AdapterWeights | str | os.PathLike[str], name: str | None = None
) -> Mapping[str, Factors]:
    """Module name → low-rank factors of an adapter, whoever made it and wherever it is.

    Args:
        model_or_path: A model with adapters of ours or of PEFT (then the tensors are the
            live ones), an adapter that has been read, a directory, or a hub id.
        name: Which of a model's adapters; the active one by default.

    Raises:
        UnknownNameError: If there is no such adapter or it has no low-rank layer.
        AdapterFileError: If the files cannot be read.
    """
    if isinstance(model_or_path, nn.Module):
        return factors_of(model_or_path, name)
    if not isinstance(model_or_path, AdapterWeights):
        model_or_path = read_adapter(model_or_path)
    return model_or_path.factors
