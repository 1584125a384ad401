"""LoKr: a Kronecker product whose second factor may be of low rank.

Sources: Edalati et al. 2022, KronA (arXiv 2212.10650); Yeh et al. 2023, LyCORIS (arXiv
2309.14859), equations 4 and 5; semantics of PEFT 0.21.2.

    y = W x + b + s (C ⊗ D) x

    x [m n]      input, as a matrix X [m, n]       C [i, m]   trainable
    y [i k]      output, as a matrix Y [i, k]      D [k, n]   trainable
    W, b         frozen                            s          alpha / r

d_in = m n and d_out = i k, with m <= n and i <= k: the most nearly square of the
factorisations with m (i) up to ``decompose_factor``, or m equal to it where it divides.
D = D_a D_b of rank r where r < max(k, n) / 2; likewise, with ``decompose_both``,
C = C_a C_b where r < max(i, m) / 2.

Identity at t = 0: C = 0 (or C_a = 0) and D Kaiming uniform; with ``init="lycoris"`` it is
D = 0 (or D_b = 0) and C Kaiming uniform.

The Kronecker product is never formed: (C ⊗ D) x is Y = C X Dᵀ, or (C (X D_bᵀ)) D_aᵀ, some
i m n + i n k multiplications a token instead of d_in d_out. For the backward pass x and the
factors are kept; the narrow products are computed anew.

``factors`` gives none: the rank is rank(C) rank(D), and the low-rank factors of the product
are not what is trained.

Deviations from PEFT: none in what is computed. Convolutions, hence
``use_effective_conv2d``, are not adapted. PEFT does not adapt GPT-2's ``Conv1D``. Where r is
so large that D is a whole matrix, s is alpha / r all the same, as in PEFT.

ΔW does not depend on W: works on quantised layers, fuses exactly up to rounding.

Files: PEFT's ``LOKR``; C is ``lokr_w1`` or ``lokr_w1_a``, ``lokr_w1_b``, and D is
``lokr_w2`` or ``lokr_w2_a``, ``lokr_w2_b``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters import lycoris
from lorasmith.adapters.lycoris import LycorisConfig
from lorasmith.core import lowrank, recomputed
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)
from lorasmith.errors import ConfigError

__all__ = ["LoKr", "LoKrConfig", "factorise"]

#: Our names → PEFT's. A layer has either the first of each three or the other two.
_KEYS = {
    "C": "lokr_w1",
    "C_a": "lokr_w1_a",
    "C_b": "lokr_w1_b",
    "D": "lokr_w2",
    "D_a": "lokr_w2_a",
    "D_b": "lokr_w2_b",
}
_INITS = ("kaiming", "lycoris")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, beyond ``LycorisConfig``.

    Args:
        decompose_both: Whether C, too, is a product of rank r where that is smaller.
        decompose_factor: The wanted m and i; -1 for the most nearly square factorisation.
        rank_dropout_scale: Whether ``rank_dropout`` scales up what it keeps.
        init: ``"kaiming"`` (C = 0) or ``"lycoris"`` (D = 0).
    """

    variant: ClassVar[str] = "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        factor: object = self.decompose_factor
        if type(factor) is not int or not (factor == -1 or factor >= 1):
            raise ConfigError(
                "decompose_factor is not a usable size.",
                expected="an integer of at least 1, or -1",
                got=repr(factor),
                key="decompose_factor",
            )
        if self.init not in _INITS:
            raise ConfigError(
                "init is not known.",
                expected=" or ".join(_INITS),
                got=repr(self.init),
                key="init",
            )


@functools.lru_cache(maxsize=4096)
def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = ``size`` and m <= n, as PEFT and LyCORIS choose them.

    (``factor``, size / factor) where that is a whole number, in this order whichever is the
    larger; otherwise the largest divisor m <= min(factor, √size).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = next((d for d in range(limit, 0, -1) if size % d == 0), 1)
    return m, size // m


def _product(x: Tensor, *tensors: Tensor, split_c: bool, split_d: bool) -> tuple[Tensor, Tensor]:
    """(C X [..., i, n], D [k, n]) or (C X D_bᵀ [..., i, r], D_a [k, r]) in the dtype of x."""
    left, right = tensors[: 1 + split_c], tensors[1 + split_c :]
    c = (left[0] @ left[1] if split_c else left[0]).to(x.dtype)
    inner = right[1].to(x.dtype) if split_d else None
    n = right[-1].shape[1]
    parts = x.reshape(*x.shape[:-1], c.shape[1], n)
    if inner is not None:
        parts = F.linear(parts, inner)
    return torch.matmul(c, parts), right[0].to(x.dtype)


class LoKr(Variant):
    """y = W x + b + s (C ⊗ D) x."""

    name = "lokr"
    config_class = LoKrConfig
    peft_type = "LOKR"
    peft_fields = frozenset(
        (lycoris.PEFT_FIELDS + " decompose_both decompose_factor rank_dropout_scale").split()
    )
    family = "low-rank product"
    formula = "y = W x + s (C ⊗ D) x"

    def new_tensors(self, base: BaseLayer, config: LoKrConfig) -> NewTensors:
        device = device_of(base.module)
        zero = {"C", "C_a"} if config.init == "kaiming" else {"D", "D_b"}
        made = {}
        for name, shape in self.shapes(config, base.info).items():
            made[name] = torch.zeros(*shape, device=device)
            if name not in zero:
                nn.init.kaiming_uniform_(made[name], a=math.sqrt(5))
        return NewTensors(made)

    def constants(self, config: LoKrConfig, info: LayerInfo) -> dict[str, Any]:
        names = tuple(self.shapes(config, info))
        m, _ = factorise(info.d_in, config.decompose_factor)
        i, k = factorise(info.d_out, config.decompose_factor)
        return {
            "names": names,
            "scaling": config.scaling_of(info.name),
            "product": functools.partial(_product, split_c="C_a" in names, split_d="D_a" in names),
            "size": i * (m + k),
        }

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        return x, x.to(lowrank.compute_dtype(x))

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        config: LoKrConfig = state.config  # type: ignore[assignment]
        return recomputed.add(
            y,
            carry,
            state.constants["product"],
            [state[n] for n in state.constants["names"]],
            state.constants["scaling"],
            size=state.constants["size"],
            gain=lycoris.output_gain(state, y, rescale=config.rank_dropout_scale),
            owned=owns_output(base.module, base),
        )

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        def whole(name: str) -> Tensor:
            if name in state:
                return state[name].detach().to(weight.dtype)
            return torch.mm(*(state[f"{name}_{part}"].detach().to(weight.dtype) for part in "ab"))

        return weight + torch.kron(whole("C") * state.constants["scaling"], whole("D"))

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: LoKrConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        rank = config.rank_of(info.name)
        m, n = factorise(info.d_in, config.decompose_factor)
        i, k = factorise(info.d_out, config.decompose_factor)
        found: dict[str, tuple[int, ...]] = {"C": (i, m)}
        if config.decompose_both and 2 * rank < max(i, m):
            found = {"C_a": (i, rank), "C_b": (rank, m)}
        if 2 * rank < max(k, n):
            return {**found, "D_a": (k, rank), "D_b": (rank, n)}
        return {**found, "D": (k, n)}

    def tensor_specs(self, config: LoKrConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        if not info.name and info.d_in <= 1 and info.d_out <= 1:
            # No layer in particular: all that there may be.
            return {n: TensorSpec(key, ()) for n, key in _KEYS.items()}
        if not (info.d_in and info.d_out):
            return {}  # which of them depends on the sizes
        return {n: TensorSpec(_KEYS[n], s) for n, s in self.shapes(config, info).items()}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        d_in, d_out = 1, 1
        for name in ("lokr_w1", "lokr_w2"):
            if name in shapes:
                rows, columns = shapes[name]
                if f"{name}_a" in shapes or f"{name}_b" in shapes:
                    raise ValueError(f"both {name} and its factors")
            else:
                rows, columns = shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]
            d_in, d_out = d_in * columns, d_out * rows
        return d_in, d_out

    def sizes_from_tensors(
        self, config: LoKrConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        return self.sizes_from_file({_KEYS[n]: s for n, s in shapes.items()})

    def to_peft(self, config: LoKrConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            **lycoris.to_fields(config),
            "decompose_both": config.decompose_both,
            "decompose_factor": config.decompose_factor,
            "rank_dropout_scale": config.rank_dropout_scale,
            "init_weights": "lycoris" if config.init == "lycoris" else True,
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> LoKrConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        return LoKrConfig(
            **lycoris.lycoris_fields(fields),
            decompose_both=bool(fields.get("decompose_both")),
            decompose_factor=fields.get("decompose_factor") or -1,
            rank_dropout_scale=bool(fields.get("rank_dropout_scale")),
            init="lycoris" if fields.get("init_weights") == "lycoris" else "kaiming",
            **common,
        )
