"""Parameter groups for any optimiser: LoRA+ and weight decay where it belongs.

LoRA+ (Hayou, Ghosh and Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
arXiv 2402.12354, section 4): with one learning rate for A and B, a wide layer learns its
features too slowly; B, which starts at zero, needs one that is larger by a factor λ of the
order of the layer's width. In practice λ of 4 to 16 with a slightly lower rate for A.

    η_A = lr        η_B = λ · lr

Which tensors are the fast ones is the variant's to say (``Variant.faster``; LoRA: B).
Everything else (gains, magnitudes, ``modules_to_save``) keeps ``lr``. PEFT's
``create_loraplus_optimizer`` also speeds up every 1-D tensor, biases and norms of
``modules_to_save`` among them, of which the paper says nothing; we do not.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lorasmith.core.adapter import Adapter, unwrap
from lorasmith.core.state import LayerAdapter
from lorasmith.core.variant import Variant
from lorasmith.errors import ConfigError

__all__ = ["check_lora_plus", "param_groups"]


def check_lora_plus(variant: Variant) -> None:
    """Raises a ``ConfigError`` unless LoRA+ has tensors of that variant to train faster."""
    if not variant.faster:
        raise ConfigError(
            f"The variant {variant.name!r} has no tensors that LoRA+ could train faster.",
            expected="a variant with a factor that starts at zero, such as lora",
            got=variant.name,
            fix="leave lora_plus_ratio out",
            key="lora_plus_ratio",
        )


def param_groups(
    model: nn.Module | Adapter,
    lr: float,
    *,
    lora_plus_ratio: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """What is trainable, in the groups that a ``torch.optim.Optimizer`` takes.

        optimizer = torch.optim.AdamW(ls.param_groups(model, 1e-4, lora_plus_ratio=16))

    Learning-rate schedulers multiply the rate of each group, so that the ratio stays.

    Args:
        model: A model: all its parameters that require gradients. An adapter: its own alone.
        lr: Learning rate η.
        lora_plus_ratio: λ, the factor on the rate of the tensors named in
            ``Variant.faster``; ``None`` for one rate for all.
        weight_decay: Decay of matrices. Vectors (gains, magnitudes, biases) do not belong
            near zero and have none.

    Returns:
        Groups with ``"params"``, ``"lr"``, ``"weight_decay"`` and ``"name"``, one of
        ``"matrices"``, ``"vectors"``, ``"faster matrices"`` and ``"faster vectors"``, in this
        order and without empty ones.

    Raises:
        ConfigError: Nothing is trainable; a value cannot be used; or a ratio is asked for
            and nothing that is trainable would be trained faster.
    """
    _check("lr", lr, lr > 0)
    _check("weight_decay", weight_decay, weight_decay >= 0)
    ratio = 1.0 if lora_plus_ratio is None else lora_plus_ratio
    _check("lora_plus_ratio", ratio, ratio > 0)
    root = model.model if isinstance(model, Adapter) else unwrap(model)
    own = None if not isinstance(model, Adapter) else {id(p) for p in model.parameters()}
    parts = (
        list(model.layers().values())
        if isinstance(model, Adapter)
        else [m for m in root.modules() if isinstance(m, LayerAdapter)]
    )
    fast = {id(p) for part in parts for n, p in part.named_parameters() if n in part.variant.faster}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (faster, vector): [] for faster in (False, True) for vector in (False, True)
    }
    for parameter in root.parameters():  # each once, shared or not
        if parameter.requires_grad and (own is None or id(parameter) in own):
            faster = lora_plus_ratio is not None and id(parameter) in fast
            groups[faster, parameter.dim() < 2].append(parameter)
    if not any(groups.values()):
        raise ConfigError(
            "Nothing is trainable.",
            expected="parameters that require gradients",
            got=repr(model) if isinstance(model, Adapter) else type(root).__name__,
            fix="attach an adapter, or adapter.requires_grad_(True)",
        )
    if lora_plus_ratio is not None and not (groups[True, False] or groups[True, True]):
        for part in parts:
            check_lora_plus(part.variant)
        raise ConfigError(
            "Nothing that is trainable is what LoRA+ trains faster.",
            expected="a trainable adapter of a low-rank variant",
            fix="leave lora_plus_ratio out",
            key="lora_plus_ratio",
        )
    return [
        {
            "name": f"{'faster ' if faster else ''}{'vectors' if vector else 'matrices'}",
            "params": parameters,
            "lr": lr * ratio if faster else lr,
            "weight_decay": 0.0 if vector else weight_decay,
        }
        for (faster, vector), parameters in groups.items()
        if parameters
    ]


def _check(key: str, value: float, usable: bool) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not usable:
        raise ConfigError(
            f"{key} cannot be {value!r}.",
            expected="a finite number of at least 0" if key == "weight_decay" else "above 0",
            got=repr(value),
            key=key,
        )
