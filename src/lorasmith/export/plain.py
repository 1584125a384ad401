"""Adapters as plain LoRA: what every program that serves adapters understands.

    ΔW_m = s_m B_m A_m        A_m [r_m, d_in], B_m [d_out, r_m], for each adapted layer m

LoRA with any initialisation is that already: a part of W that an initialisation took over goes
along as rows of A and columns of B (rank 2 r, ``Factors.stacked``), so that nothing moves W. Other
variants go through :func:`lorasmith.convert`, which says how far the result is from them: to
rounding where the variant's factors are all it does (VeRA, DeLoRA, LoRA-XS, …), by the truncated
singular value decomposition of ΔW where it depends on W (DoRA, IA3, HRA, OFT, …).

What is refused, since no plain LoRA can say it: whole modules (``modules_to_save``), biases,
embeddings, added tokens, and variants whose effect depends on their input. All of these, and
everything else, can be had as a full model: ``lorasmith fuse``.

Scalings and ranks can be made one. Zero rows of A and zero columns of B change nothing, and with a
common factor c

    s_m B_m A_m = c (s_m / c B_m) A_m

where s_m / c is a power of two or one, this is exact in any floating-point type; where it is not,
the factors are stored in float32 unless the user says otherwise, and the error is measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.lora import LoRAConfig
from lorasmith.core.adapter import Adapter
from lorasmith.core.truncation import Product
from lorasmith.core.variant import Factors
from lorasmith.errors import AdapterFileError, ConfigError
from lorasmith.io.convert import Conversion, convert
from lorasmith.io.weights import AdapterWeights, check_finite, reason_for

__all__ = [
    "Folded",
    "Pair",
    "as_plain",
    "commonest",
    "exactly",
    "fold",
    "needs_weights",
    "pair_rank",
    "pairs",
    "refuse",
    "uniform",
]

#: (phase, done, total), as :func:`lorasmith.progress.bar` gives it.
Progress = Callable[[str, int, int], None]

_FUSE = "serve a full model instead: lorasmith fuse MODEL ADAPTER -o OUTPUT"


@dataclass(frozen=True)
class Pair:
    """The factors of one layer, float32 or float64.

    Attributes:
        name: Name of the module.
        A: [r, d_in].
        B: [d_out, r].
        scaling: s of ΔW = s B A.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Folded:
    """What :func:`fold` made of a pair.

    Attributes:
        A, B: As they are stored.
        change: ‖ΔW‖.
        lost: ‖ΔW − c B A‖ of the stored values.
    """

    A: Any
    B: Any
    change: float
    lost: float


def refuse(weights: AdapterWeights, title: str) -> None:
    """Raises an ``AdapterFileError`` if the adapter holds what no plain LoRA can say.

    Args:
        weights: The adapter.
        title: Of the program that is to load it.
    """
    if weights.unsupported is not None:
        raise AdapterFileError(
            f"{title} cannot load this adapter: {weights.unsupported}",
            file=weights.path,
            fix=f"load and merge it with PEFT, or {_FUSE}",
        )
    if weights.unexpected:
        key = weights.unexpected[0]
        raise AdapterFileError(
            f"The adapter holds a tensor that {title} would not get: {reason_for(key)}.",
            file=weights.path,
            key=key,
            got=f"{len(weights.unexpected)} such tensors",
            fix=f"train without it, or {_FUSE}",
        )
    saved = weights.saved_modules
    if saved:
        raise AdapterFileError(
            f"The adapter replaces whole modules (modules_to_save), which {title} does not load.",
            file=weights.path,
            key=next(iter(saved)),
            got=", ".join(saved),
            fix=_FUSE,
        )


def needs_weights(weights: AdapterWeights) -> bool:
    """Whether making it plain LoRA takes the base model's weights."""
    if weights.variant.name == "lora":
        return False
    if not weights.variant.fusable:
        return False  # it cannot be converted at all
    held = weights.factors
    return not all(m in held and held[m].exact for m in weights.modules)


def as_plain(
    adapter: Adapter | AdapterWeights,
    weights: AdapterWeights,
    title: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    model: nn.Module | None = None,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> tuple[AdapterWeights, Conversion | None]:
    """The adapter as plain LoRA, and what converting did if it was not one.

    Args:
        adapter: The adapter: attached, or read.
        weights: The same as a value.
        title: Of the program that is to load it.
        rank: Highest rank of a layer; a LoRA of a higher one is truncated.
        energy: Share of ‖ΔW‖² that is kept on every layer, see :func:`lorasmith.convert`.
        model: The base model, where it takes its weights.
        allow_base_mismatch: Whether the model may be another than the adapter was made for.
        progress: Called with (phase, done, total).

    Raises:
        AdapterFileError: It holds what no plain LoRA can say.
        ConfigError: The rank, or the base model, has to be given.
        FuseError: It depends on its input, or is fused at the moment.
    """
    refuse(weights, title)
    if rank is not None and rank < 1:
        raise ConfigError("The rank is no count.", expected="at least 1", got=rank, key="rank")
    if weights.variant.name == "lora" and energy is None:
        highest = max(pair_rank(weights.factors[m]) for m in weights.modules)
        if rank is None or highest <= rank:
            return weights, None
    needed = needs_weights(weights)
    if needed and rank is None and energy is None:
        raise ConfigError(
            f"{title} knows plain LoRA only, and {weights.variant.name} is one of some rank only "
            "with an error.",
            expected="a rank (--rank 32), or a share of the change to keep (--energy 0.99)",
            got="neither",
            fix=f"give one of them, and the base model; the error is measured; or {_FUSE}",
            key="rank",
        )
    if needed and model is None and not isinstance(adapter, Adapter):
        raise ConfigError(
            f"{title} knows plain LoRA only, and what {weights.variant.name} changes depends on "
            "the base weights.",
            expected="the base model that the adapter was made for",
            got="none",
            fix=f"give the base model (--base), or {_FUSE}",
            key="base",
        )
    if rank is None and energy is None and weights.variant.fusable:
        rank = max(pair_rank(weights.factors[m]) for m in weights.modules)
    # Without either, the variant cannot be converted, which is for convert to say.
    to = LoRAConfig(r=rank, alpha=rank) if rank is not None else LoRAConfig()
    made = convert(
        adapter,
        None if rank is None and energy is not None else to,
        energy=energy,
        model=None if isinstance(adapter, Adapter) or not needed else model,
        allow_base_mismatch=allow_base_mismatch,
        progress=progress,
    )
    return made.weights, made


def pair_rank(factors: Factors) -> int:
    """Rank of the one pair that an adapter's factors come to."""
    return factors.rank * (1 if factors.A0 is None else 2)


def pairs(weights: AdapterWeights) -> Iterator[Pair]:
    """The factors of each layer of a plain LoRA, read one by one and checked to be finite."""
    for name in weights.modules:
        found = weights.factors[name]
        A, B = found.stacked()
        for label, tensor in (("A", A), ("B", B)):
            check_finite(tensor, f"{name}.{label}", weights.path)
        if A.shape[0] != B.shape[1]:
            raise AdapterFileError(
                "The two factors of a layer have different ranks.",
                file=weights.path,
                key=name,
                expected=f"B [d_out, {A.shape[0]}]",
                got=list(B.shape),
            )
        yield Pair(name, A.detach().cpu(), B.detach().cpu(), found.scaling)


def commonest(values: Mapping[str, float]) -> float:
    """The value that most layers have; of equally frequent ones the first."""
    return Counter(values.values()).most_common(1)[0][0]


def exactly(factor: float) -> bool:
    """Whether multiplying by it changes no digit: it is a power of two, or its negative."""
    return math.frexp(abs(factor))[0] == 0.5


def fold(
    pair: Pair,
    scaling: float,
    rank: int,
    store: Callable[[str, Tensor], tuple[Any, Tensor]],
) -> Folded:
    """A pair with another scaling and a higher rank that does the same, as it is stored.

    Args:
        pair: The factors.
        scaling: c; what the program that loads it will multiply B A with.
        rank: Of the result, at least that of the pair.
        store: ("A" or "B", float64 tensor) → what is written, and the values it stands for.

    Raises:
        AdapterFileError: A value is too large for what it is stored in.
    """
    factor = pair.scaling / scaling
    A = torch.zeros(rank, pair.A.shape[1], dtype=torch.float64)
    B = torch.zeros(pair.B.shape[0], rank, dtype=torch.float64)
    A[: pair.rank] = pair.A
    B[:, : pair.rank] = pair.B.double() * factor
    (held_a, seen_a), (held_b, seen_b) = store("A", A), store("B", B)
    for label, seen in (("A", seen_a), ("B", seen_b)):
        if not bool(torch.isfinite(seen).all()):
            raise AdapterFileError(
                "A value of the adapter is too large for the numbers it is to be stored in.",
                key=f"{pair.name}.{label}",
                fix="choose another dtype: float32 or bfloat16",
            )
    product = Product.of(Factors(pair.A, pair.B, pair.scaling))
    change = product.norm()
    same = torch.equal(seen_a.double(), A) and torch.equal(seen_b.double(), B)
    # What c times the quotient lacks of s is a rounding error of float64.
    lost = 0.0 if same else product.distance(seen_a, seen_b, scaling)
    return Folded(held_a, held_b, change, lost)


def uniform(config: LoRAConfig, rank: int, scaling: float) -> LoRAConfig:
    """The configuration of a LoRA that has one rank and one scaling, alpha / r."""
    return replace(
        config,
        r=rank,
        alpha=scaling * rank,
        scaling="standard",
        rank_pattern={},
        alpha_pattern={},
        init="kaiming",
        init_options={},
        train_A=True,
    )
