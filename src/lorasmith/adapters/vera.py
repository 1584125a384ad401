"""VeRA: vector-based random matrix adaptation.

Source: Kopiczko, Blankevoort, Asano 2023, "VeRA: Vector-based Random Matrix Adaptation"
(arXiv 2310.11454), equation 2; semantics of PEFT 0.21.2.

    y = W x + b + Λ_b B Λ_d A dropout(x)

    x [d_in]     input          A [r, d_in], B [d_out, r]   random, frozen, shared by all layers
    y [d_out]    output         Λ_d = diag(d), d [r]        trainable
    W, b         frozen         Λ_b = diag(b), b [d_out]    trainable

There is one pair of matrices for the whole adapter, [r, max d_in] and [max d_out, r]; a
layer takes the first d_in columns of A and the first d_out rows of B. They are drawn as
PEFT does: uniform with Kaiming's bound √(6 / columns), A first, by PyTorch's generator on
the CPU with the seed ``projection_prng_key``.

Identity at t = 0: b = 0 (and d = ``d_initial``).

The update is y + (A x) Cᵀ with C = Λ_b B Λ_d, so that each way costs what LoRA of that rank
does, less the gradient of A, and x is not saved for it. C is formed again in the backward
pass, and both gradients are sums over (gᵀ A x) ∘ B, of C's shape. Layers that are fed the
same tensor (q, k and v) share A x as a whole.

ΔW = Λ_b B Λ_d A, whatever W is: works on quantised layers, fuses exactly up to rounding.

Files: PEFT's ``VERA``: the vectors of each layer, and A and B once as
``base_model.vera_A`` and ``base_model.vera_B``. With ``save_projection=False`` these are
left out and drawn again on loading, which is right only where PyTorch draws the same
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.fields import refuse_trained_biases, transposed
from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig, check_count, check_factor, check_probability
from lorasmith.core.hooks import owns_output
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.state import SharedTensors
from lorasmith.core.variant import (
    BaseLayer,
    Factors,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)
from lorasmith.errors import ConfigError

__all__ = ["VeRA", "VeRAConfig"]


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Configuration of VeRA.

    Args:
        r: Rank of the random matrices. They are not trained, so it may well be larger than
            LoRA's.
        d_initial: Where every element of d starts.
        dropout: Probability with which an element of the input of A is zeroed during
            training.
        projection_prng_key: Seed of the random matrices.
        save_projection: Whether files hold the random matrices.
    """

    variant: ClassVar[str] = "vera"

    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_prng_key: int = 0
    save_projection: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        seed: object = self.projection_prng_key
        check_count(self.r, "r")
        # At 0 neither vector would ever have a gradient.
        check_factor(self.d_initial, "d_initial")
        check_probability(self.dropout, "dropout")
        for key, expected, fits in (
            (
                "projection_prng_key",
                "an integer from 0 to 2^64 - 1",
                type(seed) is int and 0 <= seed < 2**64,
            ),
            ("save_projection", "True or False", type(self.save_projection) is bool),
        ):
            if not fits:
                raise ConfigError(
                    f"{key} is not usable.",
                    expected=expected,
                    got=repr(getattr(self, key)),
                    key=key,
                )


class _Up(torch.autograd.Function):
    """(y, h, b, d) → y + h Cᵀ with C = Λ_b B Λ_d, in y's memory if it is ours to use."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, b: Tensor, d: Tensor, B: Tensor, owned: bool
    ) -> Tensor:
        ctx.save_for_backward(h, b, d, B)
        flat = h.reshape(-1, h.shape[-1])
        return lowrank.add_product(y, flat, _folded(b, d, B).to(y.dtype), 1.0, owned)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        h, b, d, B = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        g_h = g_b = g_d = None
        if ctx.needs_input_grad[1]:
            g_h = (flat @ _folded(b, d, B).to(g.dtype)).view(h.shape)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            sums = (flat.T @ h.reshape(-1, h.shape[-1])).to(B.dtype) * B
            g_b, g_d = sums @ d, b @ sums
        return g, g_h, g_b, g_d, None, None


def _cast(state: LayerState, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """All of A or B where ``like`` is: to cast it on each call would outlast a small product."""
    shared: SharedTensors | None = getattr(state, "shared", None)
    if shared is None or lowrank.plain(like):
        return state[name].to(like.device, dtype)
    return shared.cast(name, like.device, dtype)


def _folded(b: Tensor, d: Tensor, B: Tensor) -> Tensor:
    """Λ_b B Λ_d [d_out, r]."""
    return (b[:, None] * B) * d


class VeRA(Variant):
    """y = W x + b + Λ_b B Λ_d A dropout(x)."""

    name = "vera"
    config_class = VeRAConfig
    peft_type = "VERA"
    peft_fields = frozenset(
        "bias d_initial init_weights layers_pattern layers_to_transform projection_prng_key r "
        "save_projection vera_dropout".split()
    )
    family = "low-rank"
    formula = "y = W x + Λ_b B Λ_d A x, A and B random and shared"
    faster = ("lambda_b",)

    def shared_tensors(self, config: VeRAConfig, bases: Sequence[BaseLayer]) -> dict[str, Tensor]:
        shapes = {n: s.shape for n, s in _shared(config, [base.info for base in bases]).items()}
        device = device_of(bases[0].module)
        if device.type == "meta":
            return {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        made = {}
        for name, shape in shapes.items():
            bound = math.sqrt(6 / max(1, shape[1]))
            values = torch.empty(shape, dtype=torch.float32, device="cpu")
            made[name] = values.uniform_(-bound, bound, generator=generator).to(device)
        return made

    def new_tensors(self, base: BaseLayer, config: VeRAConfig) -> NewTensors:
        device = device_of(base.module)
        b = torch.zeros(base.info.d_out, device=device)
        d = torch.full((config.r,), float(config.d_initial), device=device)
        return NewTensors({"lambda_b": b, "lambda_d": d})

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        config: VeRAConfig = state.config  # type: ignore[assignment]
        return lowrank.down(
            x,
            _cast(state, "A", x, lowrank.compute_dtype(x))[:, : base.info.d_in],
            dropout=config.dropout if state.training else 0.0,
            owned=owns_output(base.module, base),
            member=state,
            siblings=getattr(state, "siblings", None),
            common=True,
        )

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        b, d, h = state["lambda_b"], state["lambda_d"], carry.to(y.dtype)
        owned = owns_output(base.module, base)
        B = state["B"][: base.info.d_out].to(y.device)
        if lowrank.fast(y):
            out: Tensor = _Up.apply(y, h, b, d, B, owned)  # type: ignore[no-untyped-call]
            return out
        if torch.is_grad_enabled() or lowrank.plain(y) or y.numel() < lowrank.SMALL:
            # On a few tokens it is cheaper to scale these than B.
            narrow = _cast(state, "B", y, y.dtype)[: base.info.d_out]
            return y + F.linear(h * d.to(y.dtype), narrow).to(y.dtype) * b.to(y.dtype)
        return lowrank.up(y, h, _folded(b, d, B), 1.0, owned=owned)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        d_out, d_in = weight.shape
        names = ("A", "B", "lambda_b", "lambda_d")
        A, B, b, d = (state[n].detach().to(weight.device, weight.dtype) for n in names)
        return torch.addmm(weight, _folded(b, d, B[:d_out]), A[:, :d_in])

    def factors(self, state: LayerState) -> Factors | None:
        info = state.info
        if not info.d_in:
            return None  # a file of PEFT's does not tell how much of A the layer takes
        A, B = state["A"][:, : info.d_in], state["B"][: info.d_out]
        return Factors(state["lambda_d"][:, None] * A, state["lambda_b"][:, None] * B, 1.0)

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: VeRAConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return {"lambda_b": (info.d_out,), "lambda_d": (config.r,)}

    def tensor_specs(self, config: VeRAConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        shapes = self.shapes(config, info)
        return {n: TensorSpec(f"vera_{n}", shape) for n, shape in shapes.items()}

    def shared_specs(self, config: VeRAConfig, infos: Sequence[LayerInfo]) -> dict[str, TensorSpec]:
        return _shared(config, infos) if config.save_projection else {}

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return 0, shapes["vera_lambda_b"][0]

    def to_peft(self, config: VeRAConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            "r": config.r,
            "d_initial": config.d_initial,
            "vera_dropout": config.dropout,
            "projection_prng_key": config.projection_prng_key,
            "save_projection": config.save_projection,
            "bias": "none",
            **transposed(modules),
            "init_weights": True,
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> VeRAConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        refuse_trained_biases(fields)
        return VeRAConfig(
            r=fields.get("r", 256),
            d_initial=fields.get("d_initial", 0.1),
            dropout=fields.get("vera_dropout") or 0.0,
            projection_prng_key=fields.get("projection_prng_key") or 0,
            save_projection=fields.get("save_projection", True),
            **common,
        )


def _shared(config: VeRAConfig, infos: Sequence[LayerInfo]) -> dict[str, TensorSpec]:
    """A and B of an adapter of these layers, A first; 0 for a size that they do not tell."""

    def largest(sizes: Sequence[int]) -> int:
        return max(sizes) if sizes and all(sizes) else 0

    columns, rows = largest([i.d_in for i in infos]), largest([i.d_out for i in infos])
    return {
        "A": TensorSpec("base_model.vera_A", (config.r, columns)),
        "B": TensorSpec("base_model.vera_B", (rows, config.r)),
    }
