"""Values and optimiser state of parameters at one moment, to come back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.dynamics.protocol import Site

__all__ = ["Snapshot"]


class Snapshot:
    """Values and optimiser state of parameters at one moment."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.values: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self._index: dict[int, int] = {}

    def _bind(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._index = {id(p): i for i, p in enumerate(parameters)}

    def take(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Copies; into the tensors of the last time where they fit."""
        same = [id(p) for p in parameters] == [id(p) for p in self.parameters]
        if not same:
            self._bind(parameters)
            self.values = [p.detach().clone() for p in parameters]
            self.states = [{} for _ in parameters]
        elif parameters:
            torch._foreach_copy_(self.values, [p.detach() for p in parameters])
        for kept, parameter in zip(self.states, parameters, strict=True):
            state = optimizer.state.get(parameter, {})
            for key in [k for k in kept if k not in state]:
                del kept[key]
            for key, value in state.items():
                known = kept.get(key)
                if not isinstance(value, Tensor):
                    kept[key] = value
                elif isinstance(known, Tensor) and known.shape == value.shape:
                    known.copy_(value)
                else:
                    kept[key] = value.detach().clone()

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Writes everything back."""
        for parameter, value, kept in zip(self.parameters, self.values, self.states, strict=True):
            parameter.copy_(value)
            if not kept:
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state[parameter]
            for key, old in kept.items():
                if isinstance(old, Tensor) and isinstance(state.get(key), Tensor):
                    state[key].copy_(old)
                else:
                    state[key] = old.clone() if isinstance(old, Tensor) else old

    def of(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """A and B of a site at that moment."""
        a, b = self._index.get(id(site.A)), self._index.get(id(site.B))
        return None if a is None or b is None else (self.values[a], self.values[b])

    def state_dict(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        places = [self._index.get(id(p)) for p in parameters]
        return {
            "values": [None if i is None else self.values[i] for i in places],
            "states": [None if i is None else dict(self.states[i]) for i in places],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Snapshot:
        made = cls()
        found = zip(parameters, state["values"], state["states"], strict=True)
        known = [(p, v, s) for p, v, s in found if v is not None]
        made._bind([p for p, _, _ in known])
        made.values = [v.to(p.device, p.dtype, copy=True) for p, v, _ in known]
        made.states = [{k: _copied(v, p) for k, v in s.items()} for p, _, s in known]
        return made


def _copied(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Adam's counter of steps may live on the CPU whatever the parameter does.
    return value.to(like.device, copy=True) if value.shape == like.shape else value.clone()
