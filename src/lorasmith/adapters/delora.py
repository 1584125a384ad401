"""DeLoRA: decoupled low-rank adaptation.

Source: Bini et al. 2025, "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv
2503.18225), section 2.2, equations 5, 8, 9 and 15, ΔW = λ ‖W‖ / r · B Ξ A; semantics of PEFT
0.21.2, which has the norm of each column of W in the place of ‖W‖.

    y = W x + b + (λ / r) B Ξ A (w ∘ dropout(x)),   Ξ_kk = 1 / (max(‖A_k‖, ε) max(‖B^k‖, ε))

    x [d_in]     input of the layer          A [r, d_in]    trainable, rows A_k
    y [d_out]    output                      B [d_out, r]   trainable, columns B^k
    W, b         frozen                      λ [1]          trainable, starts at ``lambda_init``
    w [d_in]     norms of W's columns,       ε              1e-4
                 frozen

Each of the r parts has norm 1 however long A_k and B^k are (above ε), so that they learn
directions and λ the strength: ‖B Ξ A‖ ≤ r, hence ‖ΔW‖ ≤ |λ| max(w), in Frobenius norms.

Identity at t = 0: A and B start at random and what acts is (``init="subtract"``, equation 9)

    (λ / r) (B Ξ A − B0 Ξ0 A0) (w ∘ x),   A0, B0 frozen, equal to A and B at t = 0,

of norm up to 2 |λ| max(w): the bound is around the start of B Ξ A, not around W.
With ``init="zero"``, PEFT's start, B = 0 and nothing is subtracted; but then the first step
away from zero gives B its full strength at once.

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

from lorasmith.adapters.fields import refuse_trained_biases
from lorasmith.core import lowrank
from lorasmith.core.config import (
    AdapterConfig,
    check_count,
    check_factor,
    check_probability,
    checked_pattern,
)
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.patterns import value_for
from lorasmith.core.variant import (
    BaseLayer,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
    WeightUse,
)
from lorasmith.errors import ConfigError

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
        init: ``"subtract"``: A and B Kaiming uniform, and what their product does at the start
            is subtracted, as in the paper. ``"zero"``: A Kaiming uniform, B = 0, as in PEFT;
            it diverged at every learning rate of docs/variants.md.
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
    init: str = "subtract"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r")
        check_factor(self.lambda_init, "lambda_init")
        check_probability(self.dropout, "dropout")
        self._set("rank_pattern", checked_pattern(self.rank_pattern, "rank_pattern", check_count))
        self._set(
            "lambda_pattern", checked_pattern(self.lambda_pattern, "lambda_pattern", check_factor)
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
        return value_for(self.rank_pattern, module_name, self.r)

    def lambda_of(self, module_name: str) -> float:
        """Where λ starts in the layer of that name."""
        return value_for(self.lambda_pattern, module_name, self.lambda_init)


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
            init="zero",
            rank_pattern=fields.get("rank_pattern") or {},
            lambda_pattern=fields.get("lambda_pattern") or {},
            **common,
        )
