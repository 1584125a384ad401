"""LoRA: low-rank adaptation.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv
2106.09685), equation 3; Kalajdzievski 2023, "A Rank Stabilization Scaling Factor" (arXiv
2312.03732) for ``scaling="rslora"``.

    y = W x + b + s B A dropout(x)

    x [d_in]     input of the layer          A [r, d_in]    trainable
    y [d_out]    output                      B [d_out, r]   trainable
    W, b         frozen                      s              alpha / r, or alpha / √r (rslora)

Identity at t = 0: B starts at zero, or (``init="pissa"`` and others) what acts is
s (B A − B0 A0) with B = B0 and A = A0, see ``lorasmith.init``. The one exception is
``init="loftq"`` on a quantised layer, which starts closer to the unquantised layer.

LoRA-FA (Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language
Models Fine-tuning", arXiv 2308.03303, section 3) is ``train_A=False``: A stays as it starts,
and with it x, which only the gradient of A needs, is not kept for the backward pass.

ΔW = s B A, whatever W is: works on quantised layers, fuses exactly up to rounding.

Files: PEFT's ``LORA``. Where an initialisation took over a part of W, PEFT is given one
pair of factors of rank 2r ([A; A0], [B, −B0]) whose alpha is raised such that s stays the
same; PEFT then needs to know nothing of the initialisation, and must not: a
configuration that names it would make PEFT move the base weights again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lorasmith.adapters.fields import refuse, transposed
from lorasmith.core import lowrank
from lorasmith.core.config import LowRankConfig
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
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
from lorasmith.init import Initialisation, get_initialisation
from lorasmith.init.types import Shape

__all__ = ["LoRA", "LoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Configuration of LoRA: the fields of ``LowRankConfig``, and these.

    Args:
        init_options: Options of the initialisation by name, e.g. ``{"mode": "kpm"}`` for
            ``init="corda"``; see its file in ``lorasmith.init``.
        train_A: Whether A is trained. If not (LoRA-FA), it stays as it starts.
    """

    variant: ClassVar[str] = "lora"

    init_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    train_A: bool = True  # noqa: N815 - the matrix is A

    def __post_init__(self) -> None:
        super().__post_init__()
        options: object = self.init_options
        if not isinstance(options, Mapping) or not all(isinstance(k, str) for k in options):
            raise ConfigError(
                "init_options is not a mapping of names.",
                expected="{option: value}",
                got=repr(options),
                key="init_options",
            )
        self._set("init_options", dict(options))
        flag: object = self.train_A
        if not isinstance(flag, bool):
            raise ConfigError("train_A is neither true nor false.", got=repr(flag), key="train_A")
        self.initialisation  # noqa: B018 - raises if there is none of that name

    @property
    def initialisation(self) -> Initialisation:
        """How A and B start."""
        return get_initialisation(self.init, self.init_options)


class LoRA(Variant):
    """y = W x + b + s B A dropout(x)."""

    name = "lora"
    config_class = LoRAConfig
    peft_type = "LORA"
    peft_fields = frozenset(
        "alora_invocation_tokens alpha_pattern arrow_config bias corda_config "
        "ensure_weight_tying eva_config init_lora_weights kasa_config layer_replication "
        "layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout "
        "lora_ga_config megatron_config megatron_core monteclora_config qalora_group_size r "
        "rank_pattern runtime_config target_parameters trainable_token_indices use_bdlora "
        "use_dora use_qalora use_rslora velora_config".split()
    )
    family = "low-rank"
    formula = "y = W x + s B A x"
    faster = ("B",)

    def weight_use(self, config: LoRAConfig) -> WeightUse:
        return "start" if config.initialisation.reads_weight else "never"

    def statistics(self, config: LoRAConfig) -> frozenset[str]:
        return config.initialisation.statistics(max((config.r, *config.rank_pattern.values())))

    def corrects(self, config: LoRAConfig) -> bool:
        return config.initialisation.corrects

    def adjust(self, config: LoRAConfig, bases: Sequence[BaseLayer]) -> LoRAConfig:
        adjusted: LoRAConfig = config.initialisation.adjust(config, bases)
        return adjusted

    def new_tensors(self, base: BaseLayer, config: LoRAConfig) -> NewTensors:
        info = base.info
        start = config.initialisation(
            lambda: base.weight,
            Shape(info.d_out, info.d_in, device_of(base.module)),
            config.rank_of(info.name),
            config.scaling_of(info.name),
            base.statistics,
        )
        frozen = {"A0": start.A, "B0": start.B} if start.takes_over else {}
        if not config.train_A:
            return NewTensors({"B": start.B}, {"A": start.A, **frozen})
        return NewTensors({"A": start.A, "B": start.B}, frozen)

    def constants(self, config: LoRAConfig, info: LayerInfo) -> dict[str, Any]:
        return {"scaling": config.scaling_of(info.name)}

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        config: LoRAConfig = state.config  # type: ignore[assignment]
        return lowrank.down(
            x,
            state["A"],
            A0=state["A0"] if "A0" in state else None,
            dropout=config.dropout if state.training else 0.0,
            owned=owns_output(base.module, base),
            member=state,
            siblings=getattr(state, "siblings", None),
        )

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        return lowrank.up(
            y,
            carry,
            state["B"],
            scaling(state),
            B0=state["B0"] if "B0" in state else None,
            owned=owns_output(base.module, base),
        )

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        factors = self.factors(state)
        return weight + factors.delta(weight.dtype)

    def factors(self, state: LayerState) -> Factors:
        return Factors(
            state["A"],
            state["B"],
            scaling(state),
            state["A0"] if "A0" in state else None,
            state["B0"] if "B0" in state else None,
        )

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: LoRAConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        rank = config.rank_of(info.name)
        trained = {"A": (rank, info.d_in)} if config.train_A else {}
        return {**trained, "B": (info.d_out, rank)}

    def tensor_specs(self, config: LoRAConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        rank = config.rank_of(info.name)
        return {
            "A": TensorSpec("lora_A.weight", (rank, info.d_in)),
            "B": TensorSpec("lora_B.weight", (info.d_out, rank)),
        }

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["lora_A.weight"][1], shapes["lora_B.weight"][0]

    def file_config(self, config: LoRAConfig, frozen: Collection[str]) -> LoRAConfig:
        return doubled(config) if "A0" in frozen else config

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        specs = self.tensor_specs(state.config, state.info)  # type: ignore[arg-type]
        tensors = {spec.key: state[n] for n, spec in specs.items()}
        tensors[specs["A"].key], tensors[specs["B"].key] = self.factors(state).stacked()
        return tensors

    def from_file(
        self, config: LoRAConfig, info: LayerInfo, tensors: Mapping[str, Tensor]
    ) -> NewTensors:
        found = {n: tensors[s.key] for n, s in self.tensor_specs(config, info).items()}
        rank, A, B = config.rank_of(info.name), found["A"], found["B"]
        frozen = {}
        if A.shape[0] == 2 * rank:
            # [A; A0], [B, −B0]; changing a sign twice loses nothing.
            found.update(A=A[:rank], B=B[:, :rank])
            frozen = {"A0": A[rank:], "B0": -B[:, rank:]}
        if not config.train_A:
            frozen["A"] = found.pop("A")
        return NewTensors(found, frozen)

    def to_peft(self, config: LoRAConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            **low_rank_to_peft(config, modules),
            "use_dora": False,
            "bias": "none",
            "lora_bias": False,
            # Never the name of the initialisation: PEFT would run it again on load.
            "init_lora_weights": True,
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> LoRAConfig | None:
        if fields.get("peft_type") != self.peft_type or fields.get("use_dora"):
            return None
        if fields.get("subspace"):
            return None  # factors made of others that stand beside them
        return LoRAConfig(**low_rank_fields(fields), **common)


def scaling(state: LayerState) -> float:
    """s of a low-rank adapter on its layer."""
    s: float = state.constants["scaling"]
    return s


#: PEFT fields that change what a LoRA layer computes and that we do not have, with the
#: value at which they do nothing.
_UNSUPPORTED = {
    "bias": "none",
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}


def low_rank_to_peft(config: LowRankConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
    """The fields of PEFT's ``LoraConfig`` that say what ours do."""
    return {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        **transposed(modules),
    }


def low_rank_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our low-rank fields from those of PEFT's ``LoraConfig``.

    ``init_lora_weights`` is left aside on purpose: the tensors in the file are all there
    is to load, and running an initialisation again would change the base.

    Raises:
        UnsupportedFeatureError: If the file uses a feature that would change the result and that
            lorasmith does not have.
    """
    refuse(fields, _UNSUPPORTED)
    return {
        "r": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "dropout": fields.get("lora_dropout") or 0.0,
        "scaling": "rslora" if fields.get("use_rslora") else "standard",
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }


def doubled(config: LoRAConfig) -> LoRAConfig:
    """The configuration of a pair of rank 2r that has the same scaling s."""
    from dataclasses import replace

    factor = math.sqrt(2) if config.scaling == "rslora" else 2
    return replace(
        config,
        r=2 * config.r,
        alpha=factor * config.alpha,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: factor * v for k, v in config.alpha_pattern.items()},
    )
