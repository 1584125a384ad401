"""Gauge projection as a wrapper of an optimiser, for loops that step an optimiser and no more.

The mathematics are in ``gauge_solver``; what is here is the wrapper's life as an optimiser:
the inner one's groups and state as its own, hooks, checkpoints, copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from lorasmith.dynamics.gauge_layers import Mu, Projector, check_options, largest, of_sites
from lorasmith.dynamics.gauge_moments import Moments, check_optimizer, check_owned
from lorasmith.dynamics.sites import find_sites
from lorasmith.errors import ConfigError

__all__ = ["GaugeProjectedOptimizer"]


class GaugeProjectedOptimizer(torch.optim.Optimizer):
    """An optimiser that projects the factors after each of its steps.

        optimizer = ls.GaugeProjectedOptimizer(torch.optim.AdamW(params, lr=1e-4), model)

    It is the optimiser that it wraps, seen from outside: ``param_groups``, ``state`` and
    ``defaults`` are the very objects of the inner one, so that learning-rate schedulers,
    ``GradScaler``, Accelerate and checkpoints work as with that. Its ``state_dict`` can be
    loaded by the inner optimiser alone, and the other way round (then ``every`` and
    ``start_step`` count from there). It acts on the layers that the model had when it was
    made. A deep copy or pickle of it together with the model stays tied to the model.

    In a trainer that makes its own optimiser, use :class:`GaugeProjection` instead.

    Args:
        optimizer: The optimiser that trains the factors; not to be stepped by itself.
        model: A model with a low-rank adapter: ours, a ``PeftModel``, or modules with
            ``lora_A`` and ``lora_B``.
        mu: μ: a positive number, ``"auto"`` for r / d_out, or a function of a layer's name
            and ``Factors``.
        every: Project after every so many steps.
        start_step: The first step, counted from 0, after which to project.
        moments: ``"transport"`` or ``"keep"``, see :class:`GaugeProjection`.
        adapter: Name of the adapter; by default the active one.
        allow_low_precision: Also act on factors stored in bfloat16 or float16.

    Attributes:
        optimizer: The inner optimiser.

    Raises:
        ConfigError: An option is unusable; the optimiser does not train the factors; layers
            share factors.
        UnknownNameError: The model has no low-rank layers.
        TrainingError: In :meth:`step`: factors are not finite; the message names the layer.
    """

    #: Entry of the state dict that carries the number of steps.
    STATE_KEY: ClassVar[str] = "lorasmith_gauge"

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        mu: Mu = "auto",
        *,
        every: int = 1,
        start_step: int = 0,
        moments: Moments = "transport",
        adapter: str | None = None,
        allow_low_precision: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "Gauge projection needs an optimiser of PyTorch.",
                expected="a torch.optim.Optimizer",
                got=type(optimizer).__name__,
            )
        check_options(mu, every, start_step, moments)
        if moments == "transport":
            check_optimizer(optimizer)
        sites = find_sites(model, adapter)
        check_owned(optimizer, sites)
        pairs = of_sites(sites, mu)
        self.__setstate__(
            {
                "optimizer": optimizer,
                "every": every,
                "start_step": start_step,
                "moments": moments,
                "_projector": Projector(pairs, allow_low_precision=allow_low_precision),
                "_steps": 0,
            }
        )

    # The base class would make groups and state of its own; its ``__setstate__`` makes all
    # the rest (the registers of hooks), as for an optimiser that comes out of a file.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimiser's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimiser's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # What inner optimisers offer beyond the base class, such as ``train`` and ``eval``.
        # Nothing private: GradScaler must not take this for a fused optimiser.
        if name.startswith("_") or name == "optimizer":
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the inner optimiser, then the projection.

        Args:
            closure: Evaluates the model again and returns the loss, for optimisers that need
                it (LBFGS); the projection follows the last evaluation.

        Returns:
            What the inner optimiser returns.
        """
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        done = self._steps - self.start_step
        self._steps += 1
        if done >= 0 and done % self.every == 0:
            self._projector.project(self.state if self.moments == "transport" else None)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimiser; factors in it are not projected."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state, and the number of steps."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = {**self.optimizer.state_dict(), self.STATE_KEY: {"steps": self._steps}}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a state of this or of the inner optimiser."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        mine = state_dict.pop(self.STATE_KEY, {})
        self.optimizer.load_state_dict(state_dict)
        self._steps = int(mine.get("steps", 0))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def residual(self) -> float:
        """The largest residual of all layers now, a device waits.

        On the directions that both factors have (:func:`gauge_residual`, ``"common"``).
        """
        return largest(self._projector.residuals())

    def __getstate__(self) -> dict[str, Any]:
        keys = ("optimizer", "every", "start_step", "moments", "_projector", "_steps")
        return {key: self.__dict__[key] for key in keys}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
