"""HRA: Householder reflection adaptation.

Source: Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via
Householder Reflection Adaptation" (arXiv 2405.17484), equation 1; semantics of PEFT 0.21.2.

    y = W H₁ ⋯ H_r x + b,   H_i = I − 2 u_i u_iᵀ / ‖u_i‖²

    x [d_in]     input of the layer          U [d_in, r]    trainable, columns u_i
    y [d_out]    output                      W, b           frozen

No d_in × d_in matrix is formed. The product of reflections in compact WY form is

    H₁ ⋯ H_r = I − U M Uᵀ,   M = (½ diag(G) + striu(G))⁻¹,   G = Uᵀ U [r, r],

so that the base layer is given x − U (M (Uᵀ x)): two narrow products and a triangular solve
of size r, in float32. What is saved for the backward pass is x and two vectors of size r a
token.

Identity at t = 0: r is even and the columns come in equal pairs (PEFT's start); reflecting
twice is doing nothing. An odd number of reflections never is the identity, so odd r is
refused (PEFT starts it at random).

With ``gram_schmidt`` (PEFT's ``apply_GS``; the paper's strict orthogonality) the columns are
orthogonalised first, and the product of the reflections is I − 2 Q Qᵀ with Q [d_in, r] an
orthonormal basis of U's columns; Q is taken from a QR decomposition, whose signs do not
matter. That is never the identity: PEFT starts there at a random reflection, made from the
rounding errors of pairs. Here such an adapter starts at random directions, and what acts is

    y = W (I − 2 Q0 Q0ᵀ) (I − 2 Q Qᵀ) x + b,   Q0 frozen, equal to Q at t = 0 .

It is orthogonal all the same, and PEFT can be given it as 2r plain reflections.

The paper's regulariser λ ‖I − Uᵀ U‖² is a term of the loss and not part of an adapter: this
is its λ = 0, and with ``gram_schmidt`` λ = ∞.

W is not looked at: works on quantised layers, fuses exactly up to rounding. A column that is
exactly zero has no reflection; the result is not finite then, as in PEFT.

Files: PEFT's ``HRA``. What ``gram_schmidt`` started with stands there as [Q0, Q], each column
of Q at the length of U's, so that U comes back as its own orthogonalisation. PEFT has no HRA
for GPT-2's ``Conv1D``, and none for quantised layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasmith.adapters.fields import refuse_trained_biases
from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig, check_count
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    Carry,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)
from lorasmith.errors import ConfigError

__all__ = ["HRA", "HRAConfig"]


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """Configuration of HRA.

    Args:
        r: Number of reflections; even, unless ``gram_schmidt``.
        gram_schmidt: Whether the reflections are made orthogonal to each other (PEFT's
            ``apply_GS``).

    Raises:
        ConfigError: If ``r`` is no positive integer. That it is odd, or larger than a layer's
            input with ``gram_schmidt``, is found when the adapter is attached.
    """

    variant: ClassVar[str] = "hra"

    r: int = 8
    gram_schmidt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r", "number of reflections")
        if type(self.gram_schmidt) is not bool:
            raise ConfigError(
                "gram_schmidt is neither true nor false.",
                got=repr(self.gram_schmidt),
                key="gram_schmidt",
            )


def _rows(state: LayerState) -> tuple[Tensor, None]:
    """Uᵀ, for the product with x."""
    return state["U"].T, None


def _middle(U: Tensor) -> Tensor:
    """M [r, r] with H₁ ⋯ H_r = I − U M Uᵀ."""
    gram = U.T @ U
    upper = gram.triu(1) + torch.diag(gram.diagonal() / 2)
    identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def _orthonormal(U: Tensor) -> Tensor:
    """Q [d_in, r] with the span of U."""
    q: Tensor = torch.linalg.qr(U).Q
    return q


class HRA(Variant):
    """y = W H₁ ⋯ H_r x + b."""

    name = "hra"
    config_class = HRAConfig
    peft_type = "HRA"
    peft_fields = frozenset(
        "apply_GS bias init_weights layers_pattern layers_to_transform r".split()
    )
    family = "rotation"
    formula = "y = W H₁ ⋯ H_r x, H_i = I − 2 u_i u_iᵀ / ‖u_i‖²"
    transforms_input = True

    def adjust(self, config: HRAConfig, bases: Sequence[BaseLayer]) -> HRAConfig:
        if config.gram_schmidt:
            short = min((b.info for b in bases), key=lambda i: i.d_in)
            if short.d_in < config.r:
                raise ConfigError(
                    "There cannot be more orthogonal reflections than a layer has inputs.",
                    expected=f"r of at most {short.d_in}, the inputs of {short.name}",
                    got=config.r,
                    fix="lower r, exclude the layer, or leave gram_schmidt off",
                    key="r",
                )
        elif config.r % 2:
            raise ConfigError(
                "An odd number of reflections cannot start as the identity.",
                expected="an even r",
                got=config.r,
                fix=f"choose r={config.r + 1} or gram_schmidt=True",
                key="r",
            )
        return config

    def new_tensors(self, base: BaseLayer, config: HRAConfig) -> NewTensors:
        info, device = base.info, device_of(base.module)
        if config.gram_schmidt:
            U = torch.empty(info.d_in, config.r, device=device)
            nn.init.kaiming_uniform_(U, a=math.sqrt(5))
            return NewTensors({"U": U}, {"Q0": _orthonormal(U)})
        half = torch.empty(info.d_in, config.r // 2, device=device)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        return NewTensors({"U": half.repeat_interleave(2, dim=1)})

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        config: HRAConfig = state.config  # type: ignore[assignment]
        owned = owns_output(base.module, base)
        if config.gram_schmidt:
            return self._orthogonal(state, x, owned), None
        siblings = getattr(state, "siblings", None)
        passed, h = lowrank.down(x, owned=owned, member=state, siblings=siblings, rows=_rows)
        U = state["U"]
        with lowrank.no_autocast(U):
            narrow = h.to(U.dtype) @ _middle(U).T
        return lowrank.up(passed, narrow, U, -1.0), None

    @staticmethod
    def _orthogonal(state: LayerState, x: Tensor, owned: bool) -> Tensor:
        """(I − 2 Q0 Q0ᵀ) (I − 2 Q Qᵀ) x."""
        U = state["U"]
        Q0 = state["Q0"] if "Q0" in state else None
        with lowrank.no_autocast(U):
            Q = _orthonormal(U)
        passed, h = lowrank.down(x, Q.T, A0=None if Q0 is None else Q0.T, owned=owned)
        if Q0 is None:
            return lowrank.up(passed, h, Q, -2.0)
        with lowrank.no_autocast(U):
            # x − 2 Q h₁ − 2 Q0 (h₀ − 2 Q0ᵀ Q h₁), with the sign that ``up`` gives Q0.
            h = h.to(U.dtype)
            first, second = h[..., : Q.shape[1]], h[..., Q.shape[1] :]
            narrow = torch.cat((first, 2 * first @ (Q.T @ Q0) - second), dim=-1)
        return lowrank.up(passed, narrow, Q, -2.0, B0=Q0)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        config: HRAConfig = state.config  # type: ignore[assignment]
        U = state["U"].detach().to(weight.dtype)
        if not config.gram_schmidt:
            return weight - (weight @ U) @ _middle(U) @ U.T
        if "Q0" in state:
            Q0 = _orthonormal(state["Q0"].to(weight.dtype))
            weight = weight - 2 * (weight @ Q0) @ Q0.T
        Q = _orthonormal(U)
        return weight - 2 * (weight @ Q) @ Q.T

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: HRAConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {"U": (info.d_in, config.r)}

    def tensor_specs(self, config: HRAConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        return {"U": TensorSpec("hra_u", self.shapes(config, info)["U"])}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["hra_u"][0], 0

    def file_config(self, config: HRAConfig, frozen: Collection[str]) -> HRAConfig:
        return replace(config, r=2 * config.r, gram_schmidt=False) if frozen else config

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        U = state["U"]
        if "Q0" not in state:
            return {"hra_u": U}
        with torch.no_grad():
            Q = _orthonormal(U) * torch.linalg.vector_norm(U, dim=0)
        return {"hra_u": torch.cat((state["Q0"], Q), dim=1)}

    def from_file(
        self, config: HRAConfig, info: LayerInfo, tensors: Mapping[str, Tensor]
    ) -> NewTensors:
        U = tensors["hra_u"]
        if U.shape[1] != 2 * config.r:
            return NewTensors({"U": U})
        return NewTensors({"U": U[:, config.r :]}, {"Q0": U[:, : config.r]})

    def to_peft(self, config: HRAConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            "r": config.r,
            "apply_GS": config.gram_schmidt,
            "bias": "none",
            # PEFT warns that it cannot pair an odd number, which what is loaded replaces.
            "init_weights": config.r % 2 == 0,
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> HRAConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        refuse_trained_biases(fields)
        return HRAConfig(r=fields.get("r", 8), gram_schmidt=bool(fields.get("apply_GS")), **common)
