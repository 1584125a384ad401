"""AntiPaSTO: gains on the singular values of W.

Source: after the adapter of Clark 2026, "AntiPaSTO: Self-Supervised Honesty Steering via
Anti-Parallel Representations" (arXiv 2601.07473), section 3.4, with gains for its shifts.

    W = W_res + U diag(S) V                    r singular triplets of W, frozen
    y = W_res x + U diag(S_eff) V x + b,       S_eff = S ∘ (1 + ELU(coeff · g))

    x [d_in]     input          U [d_out, r], S [r], V [r, d_in]   frozen, V Vᵀ = UᵀU = I
    y [d_out]    output         g [r]                              trainable
    W, b         frozen         coeff                              how strongly g acts

Identity at t = 0: g = 0, so S_eff = S. W_res is never formed and W stays as it is: what
acts is W x + U diag(S ∘ ELU(coeff · g)) V x. A gain is above -1, so no direction changes
its sign; ``coeff`` may be changed, or negated, after training.

``suppress_only``: S_eff = S ∘ (1 + ELU(-|coeff · g|)) = S ∘ exp(-|coeff · g|) ≤ S. Its
derivative at 0 is that from below: to cut ELU off above 0 would leave every gain that has
once been pushed up there without a gradient for good.

``directions``: ``"principal"`` takes the r largest S_i; ``"active"`` those with the largest
S_i · rms(V_i x) on calibration data, where rms(V_i x)² = V_i C V_iᵀ with C = E[x xᵀ].

r is capped at min(d_in, d_out), layer by layer.

Deviations from the paper (equation 4, W' = W_res + U (S + α ΔS) R(α) Vᵀ): a gain on S in the
place of a shift, ``coeff`` for α, and no rotation (``antipasto_rot`` has one). It ranks the
directions by S_i · std(V_i x), a third of them each on chosen and rejected answers and on
their difference. Its loss is not part of an adapter.

Needs W in plain form, once; the triplets come from a decomposition in float64. Fuses
exactly up to rounding. ΔW has rank r, with A = diag(S ∘ ELU) V and B = U: it converts to
LoRA of that rank without error. Trained for few parameters, not for few operations: the
products cost what those of a LoRA of rank r cost, so fuse it for decoding.

Files: a type of our own, ``ANTIPASTO``, that PEFT does not load. U, S and V are in the
file, in float32, so that loading decomposes nothing and needs no data: 4 r (d_in + d_out)
bytes a layer (28 layers with q and v of Qwen3-0.6B: 147 MB, of which 57 kB are gains).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.fields import transposed
from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig, check_count
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    Carry,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
    WeightUse,
)
from lorasmith.errors import AttachError, ConfigError
from lorasmith.init.pissa import principal

__all__ = [
    "AntiPaSTO",
    "AntiPaSTOConfig",
    "CoreVariant",
    "GainConfig",
    "SpectralConfig",
    "SpectralVariant",
    "gains",
    "triplets",
    "wide",
]

DIRECTIONS = ("principal", "active")
#: Ratio of the least to the largest S below which a Gram matrix gives singular vectors that
#: are orthogonal to less than float32: its own rounding counts 1 / ratio² times.
_GRAM = 1e-4


# -- what the family shares ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(AdapterConfig):
    """What every variant of the AntiPaSTO family can be told.

    Args:
        r: Number of singular directions that it acts on; capped at min(d_in, d_out).
    """

    r: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.r, "r")

    def rank_of(self, info: LayerInfo) -> int:
        """Number of directions on that layer."""
        return min(self.r, info.d_in, info.d_out)

    def own_fields(self) -> dict[str, Any]:
        """The fields that not every adapter has."""
        common = {f.name for f in dataclasses.fields(AdapterConfig)}
        names = (f.name for f in dataclasses.fields(self) if f.name not in common)
        return {name: getattr(self, name) for name in names}

    def _number(self, key: str, low: float, high: float) -> None:
        """low < value <= high, and not 0."""
        value: object = getattr(self, key)
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not low < float(value) <= high or value == 0:  # type: ignore[arg-type]
            raise ConfigError(
                f"{key} is outside what it may be.",
                expected=f"a number other than 0 with {low:g} < {key} <= {high:g}",
                got=repr(value),
                key=key,
            )
        self._set(key, float(value))  # type: ignore[arg-type]

    def _flag(self, key: str) -> None:
        if type(getattr(self, key)) is not bool:
            raise ConfigError(f"{key} is not true or false.", got=repr(getattr(self, key)), key=key)

    def _one_of(self, key: str, choices: tuple[str, ...]) -> None:
        if getattr(self, key) not in choices:
            raise ConfigError(
                f"{key} is not a known choice.",
                expected=" or ".join(choices),
                got=repr(getattr(self, key)),
                key=key,
            )


class SpectralVariant(Variant):
    """y = W x + B A x + b, where A and B follow from U, S, V and a few trainable numbers.

    A subclass says which those are (:meth:`core_shapes`) and what they make of U, S and V
    (:meth:`pair`); B A is 0 at the start.
    """

    config_class: ClassVar[type[SpectralConfig]]
    family = "spectral"

    @abstractmethod
    def core_shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of the trainable tensors where r directions are in use."""

    @abstractmethod
    def pair(self, state: LayerState, like: Tensor) -> tuple[Tensor, Tensor]:
        """A [.., d_in] and B [d_out, ..], in float32 or, where ``like`` is, in float64."""

    def start(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> dict[str, Tensor]:
        """Values of the trainable tensors with which B A = 0."""
        return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}

    def basis(
        self, base: BaseLayer, weight: Tensor, config: Any, r: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U [d_out, r], S [r], V [r, d_in]: a function of W and the layer's statistics."""
        return triplets(weight, r)

    def weight_use(self, config: Any) -> WeightUse:
        return "start"

    def new_tensors(self, base: BaseLayer, config: Any) -> NewTensors:
        info, device = base.info, device_of(base.module)
        frozen = self._frozen_shapes(config, info)
        if device.type == "meta":
            values = tuple(torch.empty(shape, device=device) for shape in frozen.values())
        else:
            weight = base.weight
            if not bool(torch.isfinite(weight).all()):
                raise AttachError(
                    f"The weight of {info.name} is not finite and has no singular values.",
                    expected="finite numbers",
                    key=info.name,
                )
            values = self.basis(base, weight, config, config.rank_of(info))
        return NewTensors(
            self.start(self.shapes(config, info), device),
            {name: v.to(torch.float32) for name, v in zip(frozen, values, strict=True)},
        )

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        A, B = self.pair(state, x)
        x, h = lowrank.down(x, A, owned=owns_output(base.module, base))
        return x, (h, B)

    def after(self, state: LayerState, y: Tensor, carry: Carry, base: BaseLayer) -> Tensor:
        h, B = carry
        return lowrank.up(y, h, B, 1.0, owned=owns_output(base.module, base))

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        A, B = (t.detach() for t in self.pair(state, weight))
        return weight + B @ A

    def factors(self, state: LayerState) -> Factors:
        """A and B; computed, so that gradients reach the trainable tensors through them."""
        A, B = self.pair(state, state["V"])
        return Factors(A, B, 1.0)

    # -- files -----------------------------------------------------------------------

    def _frozen_shapes(self, config: Any, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        r = config.rank_of(info)
        return {"U": (info.d_out, r), "S": (r,), "V": (r, info.d_in)}

    def shapes(self, config: Any, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return self.core_shapes(config, config.rank_of(info))

    def tensor_specs(self, config: Any, info: LayerInfo) -> dict[str, TensorSpec]:
        shapes = {**self.shapes(config, info), **self._frozen_shapes(config, info)}
        return {name: TensorSpec(f"antipasto_{name}", shape) for name, shape in shapes.items()}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["antipasto_V"][1], shapes["antipasto_U"][0]

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        names = self.tensor_specs(state.config, state.info)
        return {spec.key: state[name] for name, spec in names.items()}

    def to_peft(self, config: Any, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {**config.own_fields(), **transposed(modules)}

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> Any | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        known = self.config_class().own_fields()
        return self.config_class(**{k: fields[k] for k in known if k in fields}, **common)


class CoreVariant(SpectralVariant):
    """y = W x + U K V x + b with a small core K [r, r].

    Saved for the backward pass: what :meth:`change` saves, which is [tokens, r]. x is not,
    since V has no gradient.
    """

    @abstractmethod
    def change(self, state: LayerState, h: Tensor) -> Tensor:
        """K h for each row of h = V x [..., r], in the dtype of h."""

    def pair(self, state: LayerState, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.change(state, wide(state["V"], like).T).T, wide(state["U"], like)

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        return lowrank.down(x, state["V"], owned=owns_output(base.module, base))

    def after(self, state: LayerState, y: Tensor, carry: Carry, base: BaseLayer) -> Tensor:
        return super().after(state, y, (self.change(state, carry), state["U"]), base)


def triplets(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triplets of a matrix: U [m, r], S [r], V [r, n], float64.

    The rows of V and the columns of U are orthonormal whatever the rank of the matrix.
    """
    exact = weight.to(torch.float64)
    u, s, v = principal(exact, r)
    if bool(s[-1] <= _GRAM * s[0]):
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
    return u[:, :r], s[:r], v[:r]


def wide(value: Tensor, like: Tensor) -> Tensor:
    """In float32, or float64 where ``like`` is: small cores lose nothing to 16 bits."""
    return value.to(torch.promote_types(like.dtype, torch.float32))


# -- the variant ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GainConfig(SpectralConfig):
    """What AntiPaSTO and AntiPaSTO-CorDA can be told.

    Args:
        r: Number of directions that it acts on; capped at min(d_in, d_out).
        coeff: Factor on the gains; negative turns their effect round.
        suppress_only: Whether no direction may be amplified.
    """

    coeff: float = 1.0
    suppress_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("coeff", -100.0, 100.0)
        self._flag("suppress_only")


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(GainConfig):
    """Configuration of AntiPaSTO: the fields of ``GainConfig``, and this.

    Args:
        directions: ``"principal"`` or ``"active"``; the latter needs calibration data.
    """

    variant: ClassVar[str] = "antipasto"

    directions: str = "principal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("directions", DIRECTIONS)


def gains(g: Tensor, coeff: float, suppress_only: bool) -> Tensor:
    """ELU(coeff · g), or ELU(-|coeff · g|) with the derivative at 0 taken from below."""
    z = coeff * g
    return F.elu(torch.where(z > 0, -z, z) if suppress_only else z)


class AntiPaSTO(CoreVariant):
    """y = W x + U diag(S ∘ ELU(coeff · g)) V x + b."""

    name = "antipasto"
    config_class: ClassVar[type[SpectralConfig]] = AntiPaSTOConfig
    peft_type = "ANTIPASTO"
    formula = "y = W x + U S ELU(c g) V x, W = U S V"

    def statistics(self, config: Any) -> frozenset[str]:
        active = config.directions == "active"
        return frozenset({"covariance"}) if active else frozenset()

    def core_shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"gain": (r,)}

    def basis(
        self, base: BaseLayer, weight: Tensor, config: Any, r: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if config.directions == "principal":
            return triplets(weight, r)
        u, s, v = triplets(weight, min(base.info.d_in, base.info.d_out))
        covariance = base.statistics["covariance"].to(v)
        rms = ((v @ covariance) * v).sum(dim=1).clamp_min(0).sqrt()
        # In the order of S, so that the choice alone depends on the data.
        chosen = torch.topk(s * rms, r).indices.sort().values
        return u[:, chosen], s[chosen], v[chosen]

    def change(self, state: LayerState, h: Tensor) -> Tensor:
        config: Any = state.config
        elu = gains(wide(state["gain"], h), config.coeff, config.suppress_only)
        return h * (wide(state["S"], h) * elu).to(h.dtype)
