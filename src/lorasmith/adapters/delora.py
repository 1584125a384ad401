"""DeLoRA: decoupled low-rank adaptation.

Source: Bini et al. 2025, "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv
2503.18225), ΔW = λ ‖W‖ / r · B Ξ A; semantics of PEFT 0.21.2, which takes the norm of W by
columns.

    y = W x + b + (λ / r) B Ξ A (w ∘ dropout(x)),   Ξ_kk = 1 / (max(‖A_k‖, ε) max(‖B^k‖, ε))

    x [d_in]     input of the layer          A [r, d_in]    trainable, rows A_k
    y [d_out]    output                      B [d_out, r]   trainable, columns B^k
    W, b         frozen                      λ [1]          trainable, starts at ``lambda_init``
    w [d_in]     norms of W's columns,       ε              1e-4
                 frozen

Each of the r parts has norm 1 whatever A and B are, so that they learn directions and λ
the strength: ‖B Ξ A‖ ≤ r, hence ‖ΔW‖ ≤ λ max(w).

Identity at t = 0: B = 0 (``init="zero"``, PEFT's default). The first steps away from zero
give B its full strength at once. With ``init="subtract"``, as in the paper, A and B start at
random and what acts is

    (λ / r) (B Ξ A − B0 Ξ0 A0) (w ∘ x),   A0, B0 frozen, equal to A and B at t = 0 .

Deviation from the paper: λ multiplies the frozen part, too (there it keeps the value that λ
started with), so that λ stays the strength of all that is learnt, λ = 0 is the base model,
and PEFT can be given the whole as one DeLoRA of rank 2r.

No d_out × d_in matrix is formed: w goes into A and Ξ λ / r into B, both narrow.

Works on quantised layers: w is computed once, to start, from a layer dequantised for that
moment. Loading reads it from the file. Fuses exactly up to rounding.

Files: PEFT's ``DELORA``; with a frozen part [A; A0], [B, −B0] and 2 λ, at rank 2r. PEFT has
no DeLoRA for GPT-2's ``Conv1D``, and none for quantised layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.patterns import check_regex, first_matching_key
from lorasmith.core.variant import (
    BaseLayer,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
    WeightUse,
)
from lorasmith.errors import ConfigError, UnsupportedFeatureError

__all__ = ["DeLoRA", "DeLoRAConfig"]

#: Norms below it count as this much (PEFT's value).
_EPSILON = 1e-4
_INITS = ("zero", "subtract")


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    """Configuration of DeLoRA.

    Args:
        r: Rank of the update.
        lambda_init: Where λ starts, in each layer (PEFT's ``delora_lambda``).
        dropout: Probability with which an element of the input of A is zeroed during
            training (PEFT's ``module_dropout``).
        init: ``"zero"``: A Kaiming uniform, B = 0; ``"subtract"``: both Kaiming uniform, and
            what their product does at the start is subtracted.
        rank_pattern: Module name, its end, or a regular expression for its end → rank of
            the layers it matches.
        lambda_pattern: The same for λ.

    Raises:
        ConfigError: If a value cannot be used.
    """

    variant: ClassVar[str] = "delora"

    r: int = 8
    lambda_init: float = 15.0
    dropout: float = 0.0
    init: str = "zero"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "lambda_pattern"):
            pattern: object = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(
                    f"{name} is not a mapping of names.",
                    expected="{module name, its end, or a regular expression: number}",
                    got=repr(pattern),
                    key=name,
                )
            for key in pattern:
                check_regex(key, key=name)
            self._set(name, dict(pattern))
        for name, rank in (("r", self.r), *_items("rank_pattern", self.rank_pattern)):
            if type(rank) is not int or rank < 1:
                raise ConfigError(
                    f"{name} is not a usable rank.",
                    expected="an integer of at least 1",
                    got=repr(rank),
                    key=name,
                )
        strengths = (
            ("lambda_init", self.lambda_init),
            *_items("lambda_pattern", self.lambda_pattern),
        )
        for name, value in strengths:
            if not _is_number(value) or value == 0:
                raise ConfigError(
                    f"{name} is no strength to start with: at 0 neither A nor B would learn.",
                    expected="a finite number other than 0",
                    got=repr(value),
                    key=name,
                )
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                "dropout is not a probability below 1.",
                expected="0 <= dropout < 1",
                got=repr(self.dropout),
                key="dropout",
            )
        if self.init not in _INITS:
            raise ConfigError(
                "init is not a known start.",
                expected=" or ".join(_INITS),
                got=repr(self.init),
                key="init",
            )

    def rank_of(self, module_name: str) -> int:
        """Rank for the layer of that name."""
        key = first_matching_key(self.rank_pattern, module_name)
        return self.r if key is None else self.rank_pattern[key]

    def lambda_of(self, module_name: str) -> float:
        """Where λ starts in the layer of that name."""
        key = first_matching_key(self.lambda_pattern, module_name)
        return self.lambda_init if key is None else self.lambda_pattern[key]


def _items(name: str, pattern: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{name}[{key!r}]", value) for key, value in pattern.items()]


def _is_number(value: object) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(value)  # type: ignore[arg-type]


def _inverse_norms(A: Tensor, B: Tensor) -> Tensor:
    """Ξ [r]."""
    rows = torch.linalg.vector_norm(A, dim=1).clamp(min=_EPSILON)
    columns = torch.linalg.vector_norm(B, dim=0).clamp(min=_EPSILON)
    return torch.reciprocal(rows * columns)


def _scaled_rows(state: LayerState) -> tuple[Tensor, Tensor | None]:
    """A diag(w) [r, d_in], and the same of A0."""
    w = state["w_norm"]
    return state["A"] * w, state["A0"] * w if "A0" in state else None


def _scaled_columns(state: LayerState) -> Tensor:
    """(λ / r) B Ξ [d_out, r], and beside it −(λ / r) B0 Ξ0."""
    A, B = state["A"], state["B"]
    strength = state["lambda"] / B.shape[1]
    columns = B * (strength * _inverse_norms(A, B))
    if "B0" not in state:
        return columns
    frozen = state["B0"] * (strength * _inverse_norms(state["A0"], state["B0"]))
    return torch.cat((columns, -frozen), dim=1)


class DeLoRA(Variant):
    """y = W x + b + (λ / r) B Ξ A (w ∘ x)."""

    name = "delora"
    config_class = DeLoRAConfig
    peft_type = "DELORA"
    peft_fields = frozenset(
        "bias delora_lambda init_weights lambda_pattern layers_pattern layers_to_transform "
        "module_dropout r rank_pattern".split()
    )
    family = "low-rank"
    formula = "y = W x + λ/r B Ξ A (w ∘ x)"

    def weight_use(self, config: DeLoRAConfig) -> WeightUse:
        # Its column norms alone, once: a quantised layer is dequantised for that moment.
        return "never"

    def new_tensors(self, base: BaseLayer, config: DeLoRAConfig) -> NewTensors:
        info, device = base.info, device_of(base.module)
        rank = config.rank_of(info.name)
        weight = base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms = torch.linalg.vector_norm(weight, dim=0, dtype=wide).to(torch.float32)
        A = torch.empty(rank, info.d_in, device=device)
        B = torch.zeros(info.d_out, rank, device=device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        frozen = {"w_norm": norms}
        if config.init == "subtract":
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
            frozen |= {"A0": A, "B0": B}
        strength = torch.full((1,), float(config.lambda_of(info.name)), device=device)
        return NewTensors({"A": A, "B": B, "lambda": strength}, frozen)

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        config: DeLoRAConfig = state.config  # type: ignore[assignment]
        return lowrank.down(
            x,
            dropout=config.dropout if state.training else 0.0,
            owned=owns_output(base.module, base),
            member=state,
            siblings=getattr(state, "siblings", None),
            rows=_scaled_rows,
        )

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        columns = _scaled_columns(state)
        return lowrank.up(y, carry, columns, 1.0, owned=owns_output(base.module, base))

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        return weight + self.factors(state).delta(weight.dtype)

    def factors(self, state: LayerState) -> Factors:
        """ΔW as one pair of factors, computed from the live tensors.

        A diag(w) [r, d_in] and (λ / r) B Ξ [d_out, r] with scaling 1; twice as wide with a
        frozen part, which has the same λ and so cannot stand apart as A0 and B0. Gradients
        pass through; writing on them changes nothing.
        """
        rows, frozen = _scaled_rows(state)
        if frozen is not None:
            rows = torch.cat((rows, frozen))
        return Factors(rows, _scaled_columns(state), 1.0)

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: DeLoRAConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        rank = config.rank_of(info.name)
        return {"A": (rank, info.d_in), "B": (info.d_out, rank), "lambda": (1,)}

    def tensor_specs(self, config: DeLoRAConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        shapes = {**self.shapes(config, info), "w_norm": (info.d_in,)}
        return {n: TensorSpec(f"delora_{n}", shape) for n, shape in shapes.items()}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["delora_A"][1], shapes["delora_B"][0]

    def file_config(self, config: DeLoRAConfig, frozen: Collection[str]) -> DeLoRAConfig:
        if "A0" not in frozen:
            return config
        return replace(
            config,
            r=2 * config.r,
            lambda_init=2 * config.lambda_init,
            rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
            lambda_pattern={k: 2 * v for k, v in config.lambda_pattern.items()},
        )

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        specs = self.tensor_specs(state.config, state.info)  # type: ignore[arg-type]
        tensors = {spec.key: state[n] for n, spec in specs.items()}
        if "A0" in state:
            tensors[specs["A"].key] = torch.cat((state["A"], state["A0"]))
            tensors[specs["B"].key] = torch.cat((state["B"], -state["B0"]), dim=1)
            tensors[specs["lambda"].key] = 2 * state["lambda"]
        return tensors

    def from_file(
        self, config: DeLoRAConfig, info: LayerInfo, tensors: Mapping[str, Tensor]
    ) -> NewTensors:
        found = {n: tensors[s.key] for n, s in self.tensor_specs(config, info).items()}
        frozen = {"w_norm": found.pop("w_norm")}
        rank, A, B = config.rank_of(info.name), found["A"], found["B"]
        if A.shape[0] != 2 * rank:
            return NewTensors(found, frozen)
        # Halving and changing a sign twice lose nothing.
        trainable = {"A": A[:rank], "B": B[:, :rank], "lambda": found["lambda"] / 2}
        return NewTensors(trainable, {**frozen, "A0": A[rank:], "B0": -B[:, rank:]})

    def to_peft(self, config: DeLoRAConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            "r": config.r,
            "delora_lambda": config.lambda_init,
            "module_dropout": config.dropout,
            "rank_pattern": dict(config.rank_pattern),
            "lambda_pattern": dict(config.lambda_pattern),
            "bias": "none",
            "init_weights": True,
        }

    def from_peft(
        self, fields: Mapping[str, Any], common: Mapping[str, Any]
    ) -> DeLoRAConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        refuse_trained_biases(fields)
        return DeLoRAConfig(
            r=fields.get("r", 8),
            lambda_init=fields.get("delora_lambda", 15),
            dropout=fields.get("module_dropout") or 0.0,
            rank_pattern=fields.get("rank_pattern") or {},
            lambda_pattern=fields.get("lambda_pattern") or {},
            **common,
        )


def refuse_trained_biases(fields: Mapping[str, Any]) -> None:
    """Raises an ``UnsupportedFeatureError`` where PEFT has trained the base's biases, too."""
    value = fields.get("bias", "none")
    if value not in ("none", None):
        raise UnsupportedFeatureError(
            "The adapter has trained biases of the base model, which lorasmith does not have.",
            expected="bias = 'none'",
            got=repr(value),
            key="bias",
        )
