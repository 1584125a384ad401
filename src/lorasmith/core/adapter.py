"""The handle that users hold, and the little that a model remembers of its adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorasmith.core.config import AdapterConfig
from lorasmith.core.mixing import Mix, Plan, Rows, describe, layer_plan, names_in, saved_plan
from lorasmith.core.state import LayerAdapter, saved_modules, slots
from lorasmith.errors import AttachError, ConfigError, UnknownNameError

__all__ = ["Adapter", "ModelState", "attached", "check_name", "state_of", "unwrap"]

_STATE = "_lorasmith"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")


@dataclass
class ModelState:
    """What a model remembers while adapters are attached to it.

    Attributes:
        requires_grad: Flags of the base parameters before the first adapter came.
        configs: Adapter name → configuration, in the order of attaching.
        active: What is in use: the name of an adapter, a mix, one for each row, or ``None``
            for the base model.
    """

    requires_grad: dict[str, bool]
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    active: Plan = None


def check_name(name: str) -> str:
    """Gives the name back if it can name an adapter (in a file system, too).

    Raises:
        ConfigError: If not.
    """
    given: object = name
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise ConfigError(
            "That cannot be the name of an adapter.",
            expected="letters, digits, '_' and '-', at most 128, not starting with '-'",
            got=repr(name),
            key="name",
        )
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s, DDP's and Accelerate's wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in (
            "DistributedDataParallel",
            "DataParallel",
            "DeepSpeedEngine",
        ):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def state_of(model: nn.Module) -> ModelState | None:
    """The adapter state of an unwrapped model, or ``None`` if it has no adapters."""
    found = model.__dict__.get(_STATE)
    return found if isinstance(found, ModelState) else None


def set_state(model: nn.Module, state: ModelState | None) -> None:
    """Stores or, with ``None``, removes the adapter state."""
    if state is None:
        model.__dict__.pop(_STATE, None)
    else:
        model.__dict__[_STATE] = state


def activate(root: nn.Module, state: ModelState, plan: Plan) -> None:
    """Makes a plan act, on every layer and every module trained as a whole."""
    for _, _, slot in slots(root):
        if isinstance(plan, Mix | Rows):
            slot.set_plan(layer_plan(plan, slot))
        else:
            part = None if plan is None else slot.get(plan)
            slot.set_live(() if part is None else (part,))
    for _, _, saved in saved_modules(root):
        if isinstance(plan, Mix | Rows):
            saved.live, saved.plan = None, saved_plan(plan, saved)
        else:
            saved.plan = None
            saved.live = plan if plan is not None and saved.get(plan) is not None else None
    state.active = plan


class Adapter:
    """A named set of small tensors on chosen layers of a model.

    A handle: it holds no tensor itself, so what it shows is what the model has. It
    stays valid until the adapter is detached.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = model
        self._name = name

    @property
    def name(self) -> str:
        """Name under which it was attached."""
        return self._name

    @property
    def model(self) -> nn.Module:
        """The model it is attached to, without wrappers."""
        return self._model

    @property
    def config(self) -> AdapterConfig:
        """Its configuration."""
        state = state_of(self._model)
        if state is None or self._name not in state.configs:
            raise AttachError(
                f"The adapter {self._name!r} is no longer attached.",
                fix="attach or load it again",
            )
        return state.configs[self._name]

    def layers(self) -> dict[str, LayerAdapter]:
        """Module name → the adapter's tensors there, in the model's order."""
        self.config  # noqa: B018  # says so if it has been detached
        found = ((n, slot.get(self._name)) for n, _, slot in slots(self._model))
        return {n: part for n, part in found if part is not None}

    def saved_modules(self) -> dict[str, nn.Module]:
        """Module name → the trainable copy that stands in for it (``modules_to_save``)."""
        found = ((n, saved.get(self._name)) for n, _, saved in saved_modules(self._model))
        return {n: copy for n, copy in found if copy is not None}

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.layers())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(``"<module>.<tensor>"``, parameter) of everything that can be trained."""
        for module, part in self.layers().items():
            for tensor, parameter in part.named_parameters():
                yield f"{module}.{tensor}", parameter
        for module, copy in self.saved_modules().items():
            for tensor, parameter in copy.named_parameters():
                yield f"{module}.{tensor}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that can be trained; what an optimiser should be given."""
        for _, parameter in self.named_parameters():
            yield parameter

    def num_parameters(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """``"<module>.<tensor>"`` → value, detached, frozen tensors included.

        What all layers share is there once, as ``"shared.<tensor>"``.
        """
        values = {}
        for module, part in self.layers().items():
            values.update({f"{module}.{n}": t.detach() for n, t in part.tensors()})
            if part.shared is not None:
                values.update({f"shared.{n}": t for n, t in part.shared.named_buffers()})
        for module, copy in self.saved_modules().items():
            values.update({f"{module}.{n}": t.detach() for n, t in copy.state_dict().items()})
        return values

    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """Copies values into the adapter's tensors; names and shapes must be the same.

        Raises:
            AttachError: If not; nothing has been copied then.
        """
        mine = self.state_dict()
        missing, unknown = sorted(mine.keys() - values.keys()), sorted(values.keys() - mine.keys())
        if missing or unknown:
            raise AttachError(
                f"The state is not that of the adapter {self._name!r}.",
                expected=f"{len(mine)} tensors",
                got=f"{len(missing)} missing (first: {missing[:1]}), "
                f"{len(unknown)} unknown (first: {unknown[:1]})",
                key=(missing or unknown)[0],
            )
        for key, value in values.items():
            if value.shape != mine[key].shape:
                raise AttachError(
                    "A tensor of the state has another shape.",
                    expected=tuple(mine[key].shape),
                    got=tuple(value.shape),
                    key=key,
                )
        with torch.no_grad():
            for key, value in values.items():
                mine[key].copy_(value)

    def requires_grad_(self, flag: bool = True) -> Adapter:
        """Makes the whole adapter trainable, or freezes it."""
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        return self

    def __repr__(self) -> str:
        state = state_of(self._model)
        if state is None or self._name not in state.configs:
            return f"Adapter({self._name!r}, detached)"
        return (
            f"Adapter({self._name!r}, {self.config.variant}, {len(self.targets)} layers, "
            f"{self.num_parameters():,} parameters)"
        )


def attached(model: nn.Module) -> dict[str, Adapter]:
    """Name → handle of every adapter that is attached to the model."""
    root = unwrap(model)
    state = state_of(root)
    return {} if state is None else {name: Adapter(root, name) for name in state.configs}


def get_adapter(model: nn.Module, name: str | None) -> Adapter:
    """The adapter of that name; with ``None`` the active one, or the only one.

    Raises:
        UnknownNameError: If there is none of that name, or ``None`` does not say which: no
            adapter is active, or several are (a mix, one for each row).
    """
    root = unwrap(model)
    present = attached(root)
    state = state_of(root)
    if name is None and state is not None:
        meant = names_in(state.active) or tuple(present)
        if len(meant) == 1:
            name = meant[0]
    if name is None or name not in present:
        raise UnknownNameError(
            "The model has no adapter."
            if not present
            else f"Which adapter is not clear: what acts is {_acting(state)}."
            if name is None
            else f"The model has no adapter named {name!r}.",
            expected=", ".join(present) or None,
            got=name,
            fix="attach one first" if not present else "name one of those that it has",
        )
    return present[name]


def _acting(state: ModelState | None) -> str:
    plan = None if state is None else state.active
    words = describe(plan)
    kind = "a mix, " if isinstance(plan, Mix) else "by rows, " if isinstance(plan, Rows) else ""
    return kind + (words if len(words) < 80 else words[:77] + "...")
