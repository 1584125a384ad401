"""Attaching, detaching and choosing adapters.

Each call either does all of what it says or leaves the model as it was: everything that
can fail is computed before the model is touched, and what touches it can be undone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core import hooks, quantized
from lorasmith.core.adapter import (
    Adapter,
    ModelState,
    activate,
    attached,
    check_name,
    get_adapter,
    set_state,
    state_of,
    unwrap,
)
from lorasmith.core.config import AdapterConfig
from lorasmith.core.fusing import fused_name, fused_plan, refuse_shared, unfuse
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.lowrank import Siblings, no_autocast
from lorasmith.core.mixing import Choice, Plan, describe, names_in, plan_of, without
from lorasmith.core.originals import Originals, Source
from lorasmith.core.patterns import one_operation
from lorasmith.core.registry import variant_of
from lorasmith.core.state import (
    SAVED,
    SLOT,
    AdapterSlot,
    LayerAdapter,
    SavedModule,
    SharedTensors,
    saved_modules,
    slot_of,
    slots,
)
from lorasmith.core.targets import find_modules, roles_of, select
from lorasmith.core.variant import BaseLayer, Variant
from lorasmith.errors import AttachError, ConfigError, FuseError

__all__ = ["attach", "detach", "use"]


@one_operation()
def attach(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str = "default",
    calibration: Iterable[Any] | None = None,
    calibration_loss: Callable[[Any], Tensor] | None = None,
    originals: Source | None = None,
    dequantize: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Adapter:
    """Attaches a new adapter to a model and makes it the active one.

    The model's modules stay in place; adapters act through forward hooks. All base
    parameters are frozen (:func:`detach` gives their flags back). The adapter's tensors
    are float32 whatever the base's dtype; products are computed in the dtype of the
    layer's input. Adapters attached earlier keep their tensors and stay as trainable as
    they were, but no longer act: see :func:`use`.

    Args:
        model: Any ``nn.Module`` with linear-like layers.
        config: E.g. ``LoRAConfig(r=16)``.
        name: Name of the adapter: letters, digits, ``_`` and ``-``.
        calibration: Batches for variants and initialisations that look at data: whatever
            the model is called with (mappings of keyword arguments, tuples of positional
            ones, or tensors). They run through the base model as it is.
        calibration_loss: Model output → scalar loss, for initialisations that look at
            gradients. Default: ``output.loss``.
        originals: The unquantised weights of a quantised model, for ``init="loftq"``: the
            directory or file it was loaded from (safetensors), a model, or a mapping of
            tensors. Read one layer at a time; allows to dequantise, as ``dequantize`` does.
        dequantize: Whether variants that must read W may dequantise a quantised layer for
            it, one layer at a time.
        progress: Called with ("calibrating", batches done, batches in all; 0 if they cannot
            be counted) and ("starting", layers done, layers in all).

    Returns:
        A handle to the adapter.

    Raises:
        ConfigError: If the configuration cannot work on this model.
        TargetError: If no layer matches.
        AttachError: If the name is taken or the model's state does not allow it.
    """
    root = unwrap(model)
    variant = variant_of(config)
    check_free(root, name)
    chosen = select(root, config)
    infos = [c.info for c in chosen]
    originally = _originals(variant, config, infos, originals)
    if not dequantize and originals is None:
        refuse_unreadable(variant, config, infos)
    quantized.refuse_gradless(root)
    statistics = _calibrate(root, variant, config, infos, calibration, calibration_loss, progress)
    for layer, original in originally.items():
        statistics.setdefault(layer, {})["original"] = original
    parts = {}
    # Tensors made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        bases = [BaseLayer(c.module, c.info, statistics.get(c.info.name, {})) for c in chosen]
        config = variant.adjust(config, bases)
        common = variant.shared_tensors(config, bases)
        shared = SharedTensors(common) if common else None
        while bases:
            base = bases.pop(0)
            statistics.pop(base.info.name, None)  # let go, one layer after another
            with no_autocast(device_of(base.module)):
                new = variant.new_tensors(base, config)
            parts[base.info.name] = LayerAdapter(variant, config, base.info, new, shared)
            if progress is not None:
                progress("starting", len(parts), len(chosen))
        copies = {n: trainable_copy(m) for n, m in find_modules(root, config.modules_to_save)}
    return put(root, name, config, parts, copies, trainable=True)


def refuse_unreadable(variant: Variant, config: AdapterConfig, infos: Iterable[LayerInfo]) -> None:
    """Raises a ``ConfigError`` if the variant must read a weight that is not a plain matrix."""
    use_of_weight = variant.weight_use(config)
    opaque = [] if use_of_weight == "never" else [i for i in infos if i.kind == "opaque"]
    if opaque:
        when = "to start" if use_of_weight == "start" else "whenever it runs"
        raise ConfigError(
            f"{type(config).__name__} as it is configured must read the weight {when}, and "
            f"{len(opaque)} of its layers are quantised.",
            expected="layers with a floating-point weight",
            got=f"e.g. {opaque[0].name}",
            fix="pass dequantize=True, or --dequantize on the command line (one layer at a time), "
            "or choose a variant or initialisation that does not read W, such as LoRA with "
            "init='kaiming'",
            key="dequantize",
        )


def _originals(
    variant: Variant, config: AdapterConfig, infos: Iterable[LayerInfo], source: Source | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Quantised layer → what gives its original weight, where the variant corrects them."""
    corrects = variant.corrects(config)
    quantised = [i for i in infos if i.kind == "opaque"]
    if source is None and corrects and quantised:
        raise ConfigError(
            f"{type(config).__name__} as it is configured corrects what quantising has lost, "
            "which takes the original weights.",
            expected="originals=the directory, file or model that was quantised",
            got=f"{len(quantised)} quantised layers, e.g. {quantised[0].name}",
            key="originals",
        )
    if source is None:
        return {}
    if not (corrects and quantised):
        raise ConfigError(
            "Original weights are given, and nothing needs them."
            if corrects
            else f"{type(config).__name__} as it is configured takes no original weights.",
            expected="originals=None" if corrects else "init='loftq'",
            got=f"{len(quantised)} quantised layers",
            key="originals",
        )
    found = Originals(source)
    return {info.name: found.of(info) for info in quantised}


def _calibrate(
    root: nn.Module,
    variant: Variant,
    config: AdapterConfig,
    infos: Sequence[LayerInfo],
    batches: Iterable[Any] | None,
    loss: Callable[[Any], Tensor] | None,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    """Layer → statistic → value, as far as the variant needs any."""
    wanted = variant.statistics(config)
    if not wanted:
        if batches is not None:
            raise ConfigError(
                f"{type(config).__name__} takes no calibration data as it is configured.",
                expected="calibration=None",
                key="calibration",
            )
        return {}
    if batches is None:
        raise ConfigError(
            f"{type(config).__name__} as it is configured starts from data, and none was given.",
            expected="calibration=batches, an iterable of what the model is called with",
            got="calibration=None",
            key="calibration",
        )
    from lorasmith.core.calibration import collect

    count = len(batches) if isinstance(batches, Sized) else 0
    tell = None if progress is None else partial(_tell, progress, count)
    return collect(root, infos, batches, wanted, loss=loss, progress=tell)


def _tell(progress: Callable[[str, int, int], None], count: int, done: int) -> None:
    progress("calibrating", done, count)


def check_free(root: nn.Module, name: str) -> None:
    """Raises an ``AttachError`` or ``ConfigError`` unless ``name`` can be attached now."""
    check_name(name)
    state = state_of(root)
    if state is not None and name in state.configs:
        raise AttachError(
            f"The model already has an adapter named {name!r}.",
            expected="a name that is not among " + ", ".join(state.configs),
            got=name,
            fix=f"detach(model, {name!r}) first, or choose another name",
            key="name",
        )
    fused = fused_name(root)
    if fused is not None:
        raise AttachError(
            f"The adapter {fused!r} is fused into the base weights.",
            fix="unfuse(model) first: a new adapter would be built on changed weights",
        )
    if hasattr(root, "peft_config"):
        raise AttachError(
            "The model carries adapters of HF PEFT.",
            expected="a base model",
            got=type(root).__name__,
            fix="model.unload() gives the base model back; lorasmith.load reads PEFT's directories",
        )


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with float32 parameters that require gradients."""
    packed = next((n for n, m in module.named_modules() if quantized.is_quantized(m)), None)
    if packed is not None:
        raise ConfigError(
            "A quantised layer cannot be trained as a whole.",
            expected="modules_to_save without quantised layers",
            got=f"{type(module).__name__}, whose {packed or 'weight'} is quantised",
            fix="load the base such that this module stays unquantised "
            "(llm_int8_skip_modules, modules_to_not_convert), or adapt it instead",
            key="modules_to_save",
        )
    if any(p.is_meta for p in module.parameters()):
        made = copy.deepcopy(module)
    else:
        made = copy.deepcopy(module).to(torch.float32)
    for inner in made.modules():
        if SLOT in inner._modules:
            hooks.uninstall(inner)
        if SAVED in inner._modules:
            hooks.uninstall_saved(inner)
    return made.requires_grad_(True)


def put(
    root: nn.Module,
    name: str,
    config: AdapterConfig,
    parts: Mapping[str, LayerAdapter],
    copies: Mapping[str, nn.Module],
    *,
    trainable: bool,
) -> Adapter:
    """Puts finished tensors on the model: the one place where adapters enter it.

    Args:
        root: The unwrapped model.
        name: A free name, see :func:`check_free`.
        config: Configuration of the adapter.
        parts: Module name → tensors.
        copies: Module name → trainable copy.
        trainable: Whether the adapter is to be trained.
    """
    before = state_of(root)
    state = before or ModelState(
        {n: p.requires_grad for n, p in root.named_parameters() if not _ours(n)}
    )
    previous_active = state.active
    # In the order in which the model calls its layers, as far as names tell: files sort them.
    order = {n: i for i, (n, _) in enumerate(root.named_modules())}
    parts = {n: parts[n] for n in sorted(parts, key=order.__getitem__)}
    _introduce(parts)
    shared = next((part.shared for part in parts.values()), None)
    try:
        for module_name, part in parts.items():
            module = root.get_submodule(module_name)
            slot = slot_of(module)
            if slot is None:
                slot = AdapterSlot(part.info)
                slot.train(module.training)
                hooks.install(module, slot)
            part.train(module.training)
            slot.put(name, part, shared)
            shared = None
        for module_name, made in copies.items():
            module = root.get_submodule(module_name)
            saved = module._modules.get(SAVED)
            if not isinstance(saved, SavedModule):
                saved = SavedModule(module_name)
                saved.train(module.training)
                hooks.install_saved(module, saved)
            made.train(module.training)
            saved.put(name, made)
        state.configs[name] = config
        set_state(root, state)
        quantized.prepare(root)
        adapter = Adapter(root, name).requires_grad_(trainable)
        for parameter_name in state.requires_grad:
            root.get_parameter(parameter_name).requires_grad_(False)
        activate(root, state, name)
    except BaseException:
        state.configs.pop(name, None)
        _remove(root, name)
        if before is None:
            _restore_flags(root, state)
            quantized.release(root)
            set_state(root, None)
        else:
            activate(root, state, previous_active)
        raise
    return adapter


def _introduce(parts: Mapping[str, LayerAdapter]) -> None:
    """Tells neighbouring layers of each other, so that they can share products."""
    groups: dict[tuple[str, int], list[LayerAdapter]] = {}
    for module_name, part in parts.items():
        if part.info.fresh_output:
            neighbours = (module_name.rpartition(".")[0], part.info.d_in)
            groups.setdefault(neighbours, []).append(part)
    for members in groups.values():
        siblings = Siblings()
        siblings.expect([m for m in members if "reader" in roles_of(m.info, None)])
        for member in members:
            member.siblings = siblings


def _ours(parameter_name: str) -> bool:
    parts = parameter_name.split(".")
    return SLOT in parts or SAVED in parts


def _restore_flags(root: nn.Module, state: ModelState) -> None:
    current = dict(root.named_parameters())
    for name, flag in state.requires_grad.items():
        if name in current:
            current[name].requires_grad_(flag)


def _remove(root: nn.Module, name: str) -> None:
    """Takes an adapter's tensors off, and slots and hooks that have become empty."""
    for _, module, slot in list(slots(root)):
        if slot.get(name) is not None:
            slot.remove(name)
        if not slot.names():
            hooks.uninstall(module)
    for _, module, saved in list(saved_modules(root)):
        if saved.get(name) is not None:
            saved.remove(name)
        if not saved.names():
            hooks.uninstall_saved(module)


def detach(model: nn.Module, name: str | None = None, *, keep_fused: bool = False) -> None:
    """Takes an adapter, or with ``None`` all of them, off a model.

    The base model is left bit for bit as it was before: weights (an adapter that is
    fused, alone or in a mix, is unfused first), hooks, ``requires_grad`` flags. If the active
    adapter goes and others stay, none is active until :func:`use` says so; a mix that it
    was part of goes on without its term, and rows that it acted on get the base model.

    Args:
        model: The model.
        name: Which adapter; all of them by default.
        keep_fused: Whether an adapter that is fused stays in the weights, for good, and what
            ``modules_to_save`` has trained is written into its modules: the result is a
            plain model that acts like the adapted one.

    Raises:
        UnknownNameError: If there is no adapter of that name.
        FuseError: If the adapter is fused and the original weights were not kept; or, with
            ``keep_fused``, if it is not fused, or a trained module shares its weight with
            another. The model is unchanged then.
    """
    root = unwrap(model)
    names = list(attached(root)) if name is None else [get_adapter(root, name).name]
    fused = fused_plan(root)
    if keep_fused and (fused is None or not set(names_in(fused)) <= set(names)):
        raise FuseError(
            "There is nothing to keep: no adapter that is to be detached is fused."
            if fused is None or not set(names_in(fused)) & set(names)
            else "What is fused is a mix with adapters that are to stay.",
            expected=" or ".join(names) or "an adapter",
            got="nothing fused" if fused is None else describe(fused),
            fix="fuse(model) first, or detach without keep_fused",
        )
    if set(names_in(fused)) & set(names):
        if keep_fused:
            _write_copies(root, fused)
            for _, _, slot in slots(root):
                slot.fused, slot.originals = None, {}
        else:
            unfuse(root)
    state = state_of(root)
    if state is None:
        return
    left = without(state.active, names)
    if fused_plan(root) is None:
        activate(root, state, left)
    for each in names:
        _remove(root, each)
        del state.configs[each]
    if not state.configs:
        _restore_flags(root, state)
        quantized.release(root)
        set_state(root, None)


def _write_copies(root: nn.Module, fused: Plan) -> None:
    names = names_in(fused)
    found = [(n, m, saved.get(each)) for n, m, saved in saved_modules(root) for each in names]
    work = [(n, m, made) for n, m, made in found if made is not None]
    if work and not isinstance(fused, str):
        raise FuseError(
            "A mix cannot be kept where its adapters trained whole modules: their outputs are "
            "mixed, and no module gives such outputs.",
            expected="one adapter, or adapters without modules_to_save",
            got=describe(fused),
            key=work[0][0],
        )
    refuse_shared(root, {n for n, *_ in work})
    with torch.no_grad():
        for _, module, made in work:
            mine = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for key, value in (*made.named_parameters(), *made.named_buffers()):
                mine[key].copy_(value)


class _Use:
    """What :func:`use` returns: a context manager that may also be ignored."""

    def __init__(self, root: nn.Module, previous: Plan) -> None:
        self._root = root
        self._previous = previous

    def __enter__(self) -> _Use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = state_of(self._root)
        if fused_plan(self._root) is not None:
            return  # fused inside the block: what is in the weights must not act twice
        if state is None:
            return
        left = without(self._previous, set(names_in(self._previous)) - set(state.configs))
        if names_in(left) or not names_in(self._previous):  # else all of it has been detached
            activate(self._root, state, left)


def use(model: nn.Module, choice: Choice) -> _Use:
    """Says which adapters act: one, none, a weighted mix, or another one for each row.

    Takes effect at once; as a context manager (``with use(model, None): ...``) it
    returns to what acted before, whatever it was.

    * ``use(model, "a")``: that adapter alone. ``use(model, None)``: the base model.
    * ``use(model, {"a": 0.7, "b": -0.2})``: a mix, linear in what each adapter does to a
      layer: y = y_0 + Σ w_i (y_i − y_0), for weights W + Σ w_i (W_i − W).
    * ``use(model, ["a", None, "b"])``: an adapter (or the base model) for each row of the
      batch, which must be the first dimension of what every adapted layer sees. Each row
      may be repeated, as ``generate`` does for beams and models do that flatten [batch,
      tokens]. Layers that see the tokens in another order (mixtures of experts) would
      mistake them, and sequences packed into one row cannot be told apart.

    Any adapters go together, of whatever variant. What does not act gets no gradient. Factors
    that act by row or in a mix are kept stacked, a copy beside the adapters' own tensors,
    while nothing trains; a change of the tensors is noticed at the next call. Only what is
    written through ``.data`` may go unseen (on CPU, where a few values of each tensor are
    compared, if these stay as they were): call ``use`` again.

    Args:
        model: The model.
        choice: A name, name → finite weight, a list of names and ``None``, or ``None``.

    Raises:
        UnknownNameError: If there is no adapter of a name.
        ConfigError: If ``choice`` is none of these or a weight is not a finite number.
        AttachError: If an adapter is fused into the base weights. When the model is called,
            if the batch does not have the rows.
    """
    root = unwrap(model)
    plan = plan_of(choice)
    for name in names_in(plan):
        get_adapter(root, name)
    state = state_of(root)
    if state is None:
        return _Use(root, None)
    fused = fused_plan(root)
    if fused is not None and plan != fused:
        raise AttachError(
            f"The adapter {describe(fused)!r} is fused into the base weights, so no other can "
            "act alone.",
            fix="unfuse(model) first",
        )
    previous = state.active
    if fused is None:
        activate(root, state, plan)
    return _Use(root, previous)
