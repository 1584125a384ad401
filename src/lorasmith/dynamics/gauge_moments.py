"""Gauge projection, the optimiser's state: how it moves with the factors.

A gradient moves as g_A → R⁻ᵀ g_A, g_B → g_B Rᵀ (R symmetric), and so, being linear in gradients,
does a first moment: exactly. The second moment E[g ∘ g] of the moved gradient needs the
covariances between the rows of g, which no optimiser keeps; taken as zero, it is

    v_A → (R⁻¹ ∘ R⁻¹) v_A          v_B → v_B (R ∘ R)

exact for a diagonal R, never negative, and of the right scale: without it Adam would divide
gradients of the new size by roots of the old one. max_exp_avg_sq moves alike, which keeps
it above exp_avg_sq. See :data:`STATE_RULES` for other optimisers; state that has no rule is
an error that says so, raised before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lorasmith.dynamics.gauge_batches import batch_of, multiply
from lorasmith.dynamics.protocol import Site
from lorasmith.errors import ConfigError

__all__ = ["STATE_RULES", "Moments", "StateRule"]

Moments: TypeAlias = Literal["transport", "keep"]
StateRule: TypeAlias = Literal["gradient", "squares", "magnitude", "parameter", "update squares"]

#: Optimiser state of a parameter's shape → how it moves with the parameter. T is what a
#: gradient is multiplied with, T_p what the parameter is.
STATE_RULES: dict[str, StateRule] = {
    "exp_avg": "gradient",  # T: Adam, NAdam, RAdam, Adamax, Lion
    "momentum_buffer": "gradient",  # SGD, Muon
    "grad_avg": "gradient",  # centred RMSprop
    "exp_avg_sq": "squares",  # T ∘ T: Adam and its kin
    "max_exp_avg_sq": "squares",  # amsgrad
    "square_avg": "squares",  # RMSprop, Adadelta
    "sum": "squares",  # Adagrad
    "exp_inf": "magnitude",  # |T|, an upper bound of the largest: Adamax
    "ax": "parameter",  # T_p: the average of ASGD
    "acc_delta": "update squares",  # T_p ∘ T_p: Adadelta
}

#: Place of the layer, whether the state is that of A, how it moves, and it.
Move: TypeAlias = tuple[int, bool, StateRule, Tensor]


def moves_of(
    layers: Iterable[tuple[str, Tensor, Tensor]], state: Mapping[Tensor, Any]
) -> list[Move]:
    """All optimiser state of layers (name, A, B) that must move.

    Raises:
        ConfigError: Some of it has no rule.
    """
    moves = []
    for place, (name, A, B) in enumerate(layers):
        for of_a, factor in ((True, A), (False, B)):
            entries = state.get(factor)
            if not entries:
                continue
            for key, value in entries.items():
                if _is_scalar(value):
                    continue
                rule = STATE_RULES.get(key)
                if key == "momentum_buffer" and "square_avg" in entries:
                    rule = None  # RMSprop's holds steps, not gradients
                if rule is None or not isinstance(value, Tensor) or value.shape != factor.shape:
                    raise _no_rule(name, key, value)
                moves.append((place, of_a, rule, value))
    return moves


def _is_scalar(value: Any) -> bool:
    """Step counts and the like, which no gauge changes."""
    if isinstance(value, Tensor):
        return value.numel() <= 1 and value.dim() < 2
    return value is None or isinstance(value, bool | int | float | str)


def _no_rule(layer: str, key: str, value: Any) -> ConfigError:
    got = f"{key!r} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{key!r}"
    return ConfigError(
        f"The optimiser keeps state of {layer!r} that cannot be moved with the factors.",
        expected=f"state of the factor's shape under one of {', '.join(STATE_RULES)}",
        got=got,
        fix='moments="keep", which leaves the state as it is; or Adam, AdamW, SGD, Lion',
        key="moments",
    )


def move_state(moves: Sequence[Move], R: Tensor, R_inverse: Tensor) -> None:
    """Moves optimiser state in place, by R and R⁻¹ [n, r, r] of its layers in float64."""
    alike: dict[Any, tuple[list[int], list[Tensor]]] = {}
    for place, of_a, rule, tensor in moves:
        places, tensors = alike.setdefault(
            (of_a, rule, tensor.shape, tensor.dtype, tensor.device), ([], [])
        )
        places.append(place)
        tensors.append(tensor)
    for (of_a, rule, *_), (places, tensors) in alike.items():
        # What multiplies gradients is the inverse of what multiplies the factor.
        inverted = of_a != (rule in ("parameter", "update squares"))
        matrix = R_inverse if inverted else R
        if rule in ("squares", "update squares"):
            matrix = matrix.square()
        elif rule == "magnitude":
            matrix = matrix.abs()
        step = batch_of(tensors[0])
        for start in range(0, len(places), step):
            part = slice(start, start + step)
            index = torch.tensor(places[part], device=R.device)
            wide = tensors[0].dtype == torch.float64
            some = matrix[index].to(tensors[0].device)
            multiply(tensors[part], some, left=of_a, dtype=torch.float64 if wide else torch.float32)


def check_owned(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """Another optimiser's moments would stay behind, and its next step go astray."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for site in sites:
        if id(site.A) not in owned or id(site.B) not in owned:
            raise ConfigError(
                f"The optimiser does not train the factors of layer {site.name!r}.",
                expected="an optimiser made of the model's trainable parameters",
                got=f"{len(owned)} parameters without them",
                fix="make it after the adapter is attached: "
                "torch.optim.AdamW(ls.param_groups(model, lr))",
                key=site.name,
            )


def check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """What is known beforehand to keep state that cannot move."""
    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        raise ConfigError(
            "The history of L-BFGS cannot be moved with the factors.",
            expected="an optimiser such as AdamW or SGD",
            got="LBFGS",
            fix='moments="keep"',
            key="moments",
        )
