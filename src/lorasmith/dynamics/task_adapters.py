"""One adapter a task, born as a copy of a shared one: on our models and on ``PeftModel``s."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lorasmith.core.adapter import attached, get_adapter
from lorasmith.core.attach import detach, put, trainable_copy, use
from lorasmith.core.state import LayerAdapter
from lorasmith.core.variant import NewTensors
from lorasmith.errors import ConfigError

__all__ = ["TaskAdapters", "adapter_name", "task_adapters_of"]


def adapter_name(shared: str, task: str) -> str:
    """Name of a task's adapter: the task's own where it can be one, else it with a digest."""
    word = re.sub(r"[^A-Za-z0-9_-]", "-", task)[:48]
    if word != task or not word:
        # "team/a" and "team-a" are two tasks.
        word = f"{word}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
    return f"{shared}-{word}"


class TaskAdapters(ABC):
    """Makes, selects and removes copies of one adapter of a model.

    Attributes:
        model: The model.
        shared: Name of the adapter that is copied.
    """

    def __init__(self, model: nn.Module, shared: str) -> None:
        self.model = model
        self.shared = shared

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the model has an adapter of that name."""

    @abstractmethod
    def _make(self, name: str) -> None:
        """Adds an adapter with the configuration of the shared one."""

    @abstractmethod
    def _named(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter) of an adapter; keys are the same for all copies."""

    @abstractmethod
    def _delete(self, name: str) -> None:
        """Takes an adapter off the model."""

    @abstractmethod
    def use(self, names: Sequence[str]) -> None:
        """Makes adapters act: one, or one for each row of the batch."""

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Key → parameter of everything that an adapter can train."""
        return dict(self._named(name))

    def copy(self, name: str) -> None:
        """Makes an adapter of that name equal to the shared one, and trainable like it."""
        if not self.exists(name):
            self._make(name)
        mine, theirs = self.parameters(name), self.parameters(self.shared)
        if mine.keys() != theirs.keys():
            raise ConfigError(
                f"The adapter {name!r} is not a copy of {self.shared!r}.",
                expected=f"{len(theirs)} parameters",
                got=f"{len(mine)} parameters",
                fix=f"detach {name!r}, or give the task another name",
            )
        with torch.no_grad():
            for key, parameter in theirs.items():
                mine[key].copy_(parameter)
                mine[key].grad = None

    def delete(self, name: str) -> None:
        """Takes an adapter off the model, if it is there; the shared one acts then."""
        self.use([self.shared])
        if self.exists(name):
            self._delete(name)


class _Ours(TaskAdapters):
    def exists(self, name: str) -> bool:
        return name in attached(self.model)

    def _make(self, name: str) -> None:
        original = get_adapter(self.model, self.shared)
        parts = {}
        for module, part in original.layers().items():
            new = NewTensors(dict(part.named_parameters()), dict(part.named_buffers()))
            parts[module] = LayerAdapter(part.variant, part.config, part.info, new, part.shared)
        copies = {n: trainable_copy(m) for n, m in original.saved_modules().items()}
        put(self.model, name, original.config, parts, copies, trainable=True)

    def _named(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        return get_adapter(self.model, name).named_parameters()

    def _delete(self, name: str) -> None:
        detach(self.model, name)

    def use(self, names: Sequence[str]) -> None:
        use(self.model, names[0] if len(set(names)) == 1 else list(names))


class _Peft(TaskAdapters):
    model: Any

    def exists(self, name: str) -> bool:
        return name in self.model.peft_config

    def _make(self, name: str) -> None:
        config = copy.deepcopy(self.model.peft_config[self.shared])
        # Other starts write to the base weights (PiSSA) or read data; the values are copied.
        config.init_lora_weights = True
        devices = sorted({p.device.index for p in self.model.parameters() if p.is_cuda})
        with torch.random.fork_rng(devices=devices):
            self.model.add_adapter(name, config)

    def _named(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        for path, parameter in self.model.named_parameters():
            words = path.split(".")
            for holder, word in itertools.pairwise(words):
                if word == name and holder.startswith(("lora_", "modules_to_save")):
                    yield path.replace(f"{holder}.{name}", holder), parameter

    def _delete(self, name: str) -> None:
        self.model.delete_adapter(name)

    def use(self, names: Sequence[str]) -> None:
        if len(set(names)) > 1:
            raise ConfigError(
                "A PeftModel cannot train another adapter for each row of a batch.",
                expected="batches of one task",
                got=", ".join(sorted(set(names))),
                fix="sort the batches by task, or use an adapter of lorasmith",
            )
        # PEFT freezes whatever it switches off; what trains is for the caller to say.
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.set_adapter(names[0])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def task_adapters_of(model: nn.Module, shared: str) -> TaskAdapters | None:
    """What makes task adapters on this model; ``None`` if nothing can."""
    if attached(model):
        return _Ours(model, shared)
    if all(hasattr(model, n) for n in ("peft_config", "add_adapter", "delete_adapter")) and (
        type(model).__module__.startswith("peft.")
    ):
        return _Peft(model, shared)
    return None
