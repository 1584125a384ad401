"""What rules are bound to: the model, its low-rank layers, the optimiser and what is added to it.

A rule may hand the optimiser parameters of its own. They join the group of the parameter that
they are like, so that groups keep their number, and are known by name, so that their state finds
them again after a checkpoint. Of the loop and the rules this file knows nothing but whom to tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorasmith.dynamics.protocol import Site
from lorasmith.dynamics.sites import find_sites
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["Context", "unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside Accelerate's and Trainer's wrappers: the one whose step acts."""
    while type(optimizer).__module__.startswith(("accelerate.", "deepspeed.")):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "Dynamics need an optimiser of PyTorch.",
            expected="a torch.optim.Optimizer",
            got=type(optimizer).__name__,
        )
    return optimizer


class Context:
    """What a rule gets to know when it is bound.

    Attributes:
        model: The model, without wrappers.
        optimizer: The optimiser whose step is followed.
        adapter: Name of the adapter that training began with; ``""`` where it has none.
        sites: The low-rank layers in training.
        tasks: Names of the tasks, if they were given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        adapter: str,
        tasks: Sequence[str],
        on_sites: Callable[[tuple[Site, ...]], None],
        on_gradient: Callable[[Tensor], None],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.adapter = adapter
        self.tasks = tuple(tasks)
        self._on_sites = on_sites
        self._on_gradient = on_gradient
        self._handles: dict[str, RemovableHandle] = {}
        self.sites = find_sites(model, adapter or None)
        #: Parameters that rules have added, by the names that they gave them.
        self.added: dict[str, nn.Parameter] = {}
        #: Optimiser state of added parameters that has been loaded and not yet claimed.
        self.stash: dict[str, dict[str, Any]] = {}

    def find(self, adapter: str) -> tuple[Site, ...]:
        """The sites of another adapter of the model."""
        return find_sites(self.model, adapter)

    def refresh(self, adapters: Sequence[str]) -> None:
        """Watches the sites of these adapters from now on, and tells all rules."""
        self.sites = tuple(itertools.chain.from_iterable(map(self.find, adapters)))
        self._on_sites(self.sites)

    def add_parameter(
        self, name: str, parameter: nn.Parameter, like: nn.Parameter | None = None
    ) -> None:
        """Hands a new parameter to the optimiser, in the group of ``like``.

        Groups keep their number, so that learning-rate schedulers go on as they were.

        Args:
            name: Its name in checkpoints.
            parameter: It.
            like: A parameter of the optimiser whose state it starts with a copy of (unless a
                checkpoint has one of its own for it). Default: first group, no state.

        Raises:
            TrainingError: The state in the checkpoint is of another parameter.
        """
        if name in self.added:
            raise ConfigError("That parameter has been added before.", got=name)
        for key, value in self.stash.get(name, {}).items():
            # A fused optimiser takes the parameter's size, and writes beyond the end.
            if key != "step" and torch.is_tensor(value) and value.shape != parameter.shape:
                raise TrainingError(
                    "The checkpoint has a state of another parameter than the rule adds.",
                    expected=list(parameter.shape),
                    got=list(value.shape),
                    key=f"{name} {key}",
                )
        groups = self.optimizer.param_groups
        group = next((g for g in groups if like is not None and _holds(g, like)), groups[0])
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
        self.added[name] = parameter
        if parameter.requires_grad:
            self._handles[name] = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        state = self.stash.pop(name, None)
        if state is None and like is not None:
            state = self.optimizer.state.get(like)
        if state:
            self.optimizer.state[parameter] = {
                key: _on_device_of(parameter, value, key, group) for key, value in state.items()
            }

    def remove_parameter(self, parameter: nn.Parameter) -> None:
        """Takes a parameter that was added away from the optimiser, with its state."""
        name = next(n for n, p in self.added.items() if p is parameter)
        for group in self.optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if p is not parameter]
            if "param_names" in group:
                group["param_names"][:] = [n for n in group["param_names"] if n != name]
        self.optimizer.state.pop(parameter, None)
        del self.added[name]
        self._release(name)

    def _release(self, *names: str) -> None:
        for name in names or tuple(self._handles):
            handle = self._handles.pop(name, None)
            if handle is not None:
                handle.remove()

    def close(self) -> None:
        """Takes the hooks off the added parameters, which stay."""
        self._release()


def _on_device_of(parameter: Tensor, value: Any, key: str, group: Mapping[str, Any]) -> Any:
    """A copy of optimiser state where the optimiser wants it: a checkpoint may be on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value.clone()
    return value.to(parameter.device, copy=True)


def _holds(group: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in group["params"])


def check_owned(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """An optimiser that moves none of the factors belongs to something else."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(site.A) in known or id(site.B) in known for site in sites):
        raise ConfigError(
            "The optimiser trains none of the adapter's factors.",
            expected="an optimiser made with the adapter's parameters",
            got=f"{type(optimizer).__name__} with {len(known)} other parameters",
            fix="make it with adapter.parameters(), after attaching",
        )
