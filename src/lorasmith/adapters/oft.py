"""OFT: the input is rotated, block by block, by trained orthogonal matrices.

Sources: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"
(arXiv 2306.07280), sections 3.3 and 3.4 (Cayley, blocks on the diagonal, COFT); Qiu et al.
2025, OFTv2 (arXiv 2506.19847), sections 3.2 and 3.3 (the input is rotated instead of the
weight; Cayley-Neumann series); semantics of PEFT 0.21.2.

    y = W (x R) + b,   R = diag(R_1, …, R_n),   x R taken block by block

    x [n β]      input                Q_i [β, β]    skew-symmetric, its upper triangle trained
    y [d_out]    output               R_i [β, β]    rotation
    W, b         frozen               n β = d_in

    R_i = (I − Q_i) (I + Q_i)⁻¹                                    ``cayley="exact"``
    R_i = I + 2 Q_i + 2 Q_i² + … + 2 Q_i^(L−1) + Q_i^L              ``cayley="neumann"``

with L = max(3, neumann_terms − 1); 2 terms are I + 2 Q_i. The series is that of
(I + Q_i) (I − Q_i)⁻¹, the papers' form and the inverse of the exact form here, and
orthogonal only up to Q_i^L. Both are PEFT's, signs included.

Identity at t = 0: Q = 0.

No d_in × d_in matrix is formed: x is multiplied by n matrices of β × β. For the backward
pass x and the triangles are kept, R is computed anew. R is computed in float32 or better
and applied in the dtype of x.

``coft`` keeps ‖Q_i‖ <= ε' = eps / √n (Frobenius norm): a longer Q_i acts as ε' Q_i / ‖Q_i‖,
with the gradient of the shortened one. PEFT writes the shortened Q_i into the parameter on
every forward; here the forward writes nothing, so that training differs from PEFT's once a
block has reached the bound, while a loaded adapter acts the same. ``block_share``: one R_i
for all blocks.

Deviations from PEFT: ``module_dropout`` replaces ⌊p n⌋ random blocks by I during training,
as PEFT's documentation says; its 0.21.2 takes the option and does nothing. A layer that
only blocks of size 1 would divide is refused (PEFT: an adapter without parameters). PEFT
does not adapt GPT-2's ``Conv1D``. Files with the series that do not come from PEFT 0.18 or
later are refused: the series was another one (PEFT: a warning).

The paper's re-scaled form (section 3.5, a trained factor on each output) is not here.

``factors`` gives none: W R − W has full rank.

Does not read W: works on quantised layers; fuses exactly up to rounding.

Files: PEFT's ``OFT``, of its version 0.18 or later; Q is ``oft_R.weight``
[n or 1, β (β − 1) / 2].
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.adapters.fields import refuse_trained_biases, transposed
from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig, check_count, check_probability
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.variant import (
    BaseLayer,
    Carry,
    LayerState,
    NewTensors,
    TensorSpec,
    Variant,
)
from lorasmith.errors import ConfigError, UnsupportedFeatureError

__all__ = ["OFT", "OFTConfig", "rotations"]

_CAYLEY = ("neumann", "exact")
#: The PEFT from which on files say its version, and the series is the one above.
_SINCE = (0, 18)


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Configuration of OFT.

    Args:
        block_size: β (PEFT: ``oft_block_size``). 32 unless ``blocks`` is given. Where it
            does not divide d_in, the nearest size that does is taken, with a warning.
        blocks: n (PEFT: ``r``) in place of ``block_size``; adjusted in the same way.
        block_share: Whether all blocks of a layer share one rotation.
        cayley: ``"neumann"`` for the truncated series, ``"exact"`` for the Cayley transform.
        neumann_terms: Terms of the series (PEFT: ``num_cayley_neumann_terms``).
        coft: Whether the rotations are kept close to I.
        eps: How close, with ``coft``.
        module_dropout: Share of a layer's blocks that do not rotate in a call, during
            training.
    """

    variant: ClassVar[str] = "oft"

    block_size: int | None = None
    blocks: int | None = None
    block_share: bool = False
    cayley: str = "neumann"
    neumann_terms: int = 5
    coft: bool = False
    eps: float = 6e-5
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.blocks is not None:
            raise ConfigError(
                "block_size and blocks say the same thing twice.",
                expected="one of them; the other follows from d_in",
                got=f"block_size={self.block_size!r}, blocks={self.blocks!r}",
                key="blocks",
            )
        if self.blocks is None:
            self._set("block_size", 32 if self.block_size is None else self.block_size)
            check_count(self.block_size, "block_size", "size")
        else:
            check_count(self.blocks, "blocks", "number")
        if self.cayley not in _CAYLEY:
            raise ConfigError(
                "cayley is not known.",
                expected=" or ".join(_CAYLEY),
                got=repr(self.cayley),
                key="cayley",
            )
        check_count(self.neumann_terms, "neumann_terms", "number")
        if self.neumann_terms < 2:
            raise ConfigError(
                "With one term the series is the identity, and nothing would be learnt.",
                expected="neumann_terms of at least 2",
                got=self.neumann_terms,
                key="neumann_terms",
            )
        eps: object = self.eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise ConfigError(
                "eps is not a positive number.", got=repr(eps), key="eps", expected="eps > 0"
            )
        check_probability(self.module_dropout, "module_dropout")

    def size_for(self, d_in: int) -> int:
        """β for a layer: a divisor of ``d_in`` near what was asked for."""
        if self.blocks is not None:
            return d_in // max(1, _nearest_divisor(d_in, self.blocks))
        assert self.block_size is not None
        return _nearest_divisor(d_in, self.block_size)


def _nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of ``size`` nearest to ``wanted``; of two, the smaller."""
    if wanted >= size:
        return size
    for distance in range(wanted):
        for near in (wanted - distance, wanted + distance):
            if size % near == 0:
                return near
    return 1


def rotations(
    triangles: Tensor, size: int, terms: int | None, bound: float | None = None
) -> Tensor:
    """R [n, β, β] from the upper triangles of Q [n, β (β − 1) / 2].

    Args:
        triangles: Row by row, without the diagonal.
        size: β.
        terms: Number of terms of the Neumann series; ``None`` for the exact transform.
        bound: ε' of ``coft``.
    """
    count = triangles.shape[0]
    if bound is not None:
        # ‖Q‖² counts every entry of the triangle twice.
        norms = torch.linalg.vector_norm(triangles.detach(), dim=1, keepdim=True) * math.sqrt(2)
        short = triangles.detach() * (bound / norms.clamp(min=bound))
        triangles = triangles + (short - triangles.detach())
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    places = (rows * size + columns).expand(count, -1)
    upper = triangles.new_zeros(count, size * size).scatter(1, places, triangles)
    upper = upper.view(count, size, size)
    q = upper - upper.transpose(1, 2)
    identity = torch.eye(size, dtype=q.dtype, device=q.device)
    with lowrank.no_autocast(q):
        if terms is None:
            found: Tensor = torch.linalg.solve(identity + q, identity - q, left=False)
            return found
        result = identity + 2 * q
        if terms > 2:
            power = q @ q
            result = result + 2 * power
            for _ in range(3, terms - 1):
                power = power @ q
                result = result + 2 * power
            result = result + power @ q
        return result


def rotate(x: Tensor, r: Tensor) -> Tensor:
    """x R for x [..., d_in] and R [n, β, β], or [1, β, β] for all blocks."""
    size = r.shape[-1]
    r = r.to(x.dtype)
    if r.shape[0] == 1:
        return (x.reshape(-1, size) @ r[0]).view(x.shape)
    parts = x.reshape(-1, r.shape[0], size).transpose(0, 1)
    return torch.bmm(parts, r).transpose(0, 1).reshape(x.shape)


class _Rotate(torch.autograd.Function):
    """(x, triangles) → x R; R is made twice and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, triangles: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, triangles)
        ctx.make = make
        return rotate(x, make(triangles))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, triangles = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        source = triangles if twice else triangles.detach()
        if not twice:
            source.requires_grad_(ctx.needs_input_grad[1])
        with torch.set_grad_enabled(twice or ctx.needs_input_grad[1]):
            r = ctx.make(source)
        with torch.set_grad_enabled(twice):
            g_x = rotate(g, r.transpose(1, 2)) if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return g_x, None, None
            count, size = r.shape[:2]
            left, right = (t.reshape(-1, count, size).transpose(0, 1) for t in (x, g))
            g_r = torch.bmm(left.transpose(1, 2), right).to(r.dtype)
        (g_t,) = torch.autograd.grad(r, source, g_r, create_graph=twice)
        return g_x, g_t, None


class OFT(Variant):
    """y = W (x R) + b."""

    name = "oft"
    config_class = OFTConfig
    peft_type = "OFT"
    peft_fields = frozenset(
        "bias block_share coft eps init_weights layers_pattern layers_to_transform "
        "module_dropout num_cayley_neumann_terms oft_block_size r use_cayley_neumann".split()
    )
    family = "rotation"
    formula = "y = W (x R), R block-diagonal and orthogonal"
    transforms_input = True

    def adjust(self, config: OFTConfig, bases: Sequence[BaseLayer]) -> OFTConfig:
        changed = []
        for info in (base.info for base in bases):
            size = config.size_for(info.d_in)
            if size == 1 and info.d_in > 1:
                wanted = (
                    f"{config.blocks} blocks" if config.blocks else f"blocks of {config.block_size}"
                )
                raise ConfigError(
                    f"{info.name} has {info.d_in} inputs, which the nearest to {wanted} that "
                    "divides them leaves in blocks of 1: there would be nothing to train.",
                    expected="a block size of at least 2 that divides d_in",
                    fix="choose another block_size, or exclude the layer",
                    key="block_size" if config.blocks is None else "blocks",
                )
            kept = info.d_in // size if config.blocks else size
            if kept != (config.blocks or config.block_size):
                changed.append(f"{info.name} ({size})")
        if changed:
            warnings.warn(
                "The block size asked for does not divide all layers' inputs; the nearest that "
                f"does is taken in {len(changed)} of them, e.g. {changed[0]}.",
                UserWarning,
                stacklevel=3,
            )
        return config

    def new_tensors(self, base: BaseLayer, config: OFTConfig) -> NewTensors:
        shape = self.shapes(config, base.info)["Q"]
        return NewTensors({"Q": torch.zeros(*shape, device=device_of(base.module))})

    def constants(self, config: OFTConfig, info: LayerInfo) -> dict[str, Any]:
        terms = None if config.cayley == "exact" else config.neumann_terms
        return {"terms": terms}

    def _rotations(self, state: LayerState, wide: torch.dtype) -> Callable[[Tensor], Tensor]:
        config: OFTConfig = state.config  # type: ignore[assignment]
        count, elements = state["Q"].shape
        size = (1 + math.isqrt(1 + 8 * elements)) // 2
        bound = config.eps / math.sqrt(count) if config.coft else None
        return partial(_made, size=size, terms=state.constants["terms"], bound=bound, wide=wide)

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        config: OFTConfig = state.config  # type: ignore[assignment]
        kept = x.to(lowrank.compute_dtype(x))
        triangles = state["Q"]
        count = triangles.shape[0]
        if state.training and int(config.module_dropout * count) and count > 1:
            # Of Q = 0, R is I.
            order = torch.rand(count, device=x.device).argsort()
            still = order < int(config.module_dropout * count)
            triangles = torch.where(still[:, None], 0.0, triangles)
        make = self._rotations(state, torch.promote_types(kept.dtype, triangles.dtype))
        if lowrank.fast(x):
            out: Tensor = _Rotate.apply(kept, triangles, make)  # type: ignore[no-untyped-call]
            return out, None
        return rotate(kept, make(triangles)), None

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        made = self._rotations(state, weight.dtype)(state["Q"].detach())
        return rotate(weight, made.transpose(1, 2))

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: OFTConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        size = config.size_for(info.d_in)
        count = 1 if config.block_share else info.d_in // max(1, size)
        return {"Q": (count, size * (size - 1) // 2)}

    def tensor_specs(self, config: OFTConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        return {"Q": TensorSpec("oft_R.weight", self.shapes(config, info)["Q"])}

    def from_file(
        self, config: OFTConfig, info: LayerInfo, tensors: Mapping[str, Tensor]
    ) -> NewTensors:
        # As it is: of a shared block's layer, a file does not tell the size.
        return NewTensors({"Q": tensors["oft_R.weight"]})

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        return {"oft_R.weight": state["Q"]}

    def layer_sizes(
        self, config: OFTConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        d_in, _ = self.sizes_from_file(shapes)
        return (0 if config.block_share else d_in), 0

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        count, elements = shapes["oft_R.weight"]
        size = (1 + math.isqrt(1 + 8 * elements)) // 2
        if size * (size - 1) // 2 != elements:
            raise ValueError("not the triangle of a square matrix")
        return count * size, 0

    def sizes_from_tensors(
        self, config: OFTConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        return self.layer_sizes(config, {"oft_R.weight": shapes["Q"]})

    def to_peft(self, config: OFTConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        return {
            "r": config.blocks or 0,
            "oft_block_size": config.block_size or 0,
            "block_share": config.block_share,
            "use_cayley_neumann": config.cayley == "neumann",
            "num_cayley_neumann_terms": config.neumann_terms,
            "coft": config.coft,
            "eps": config.eps,
            "module_dropout": config.module_dropout,
            "bias": "none",
            "init_weights": True,
            **transposed(modules),
            # PEFT's series was another one before; without this it warns.
            "peft_version": ".".join(map(str, (*_SINCE, 0))),
        }

    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> OFTConfig | None:
        if fields.get("peft_type") != self.peft_type:
            return None
        refuse_trained_biases(fields)
        if "oft_block_size" not in fields:
            raise ConfigError(
                "The adapter was made by a PEFT before 0.14, whose OFT was another one.",
                expected="a field oft_block_size",
                fix="train it again; no later PEFT reads it either",
                key="oft_block_size",
            )
        neumann = bool(fields.get("use_cayley_neumann", False))
        version = str(fields.get("peft_version") or "none")
        if neumann and tuple(int(v) for v in re.findall(r"\d+", version)[:2]) < _SINCE:
            raise UnsupportedFeatureError(
                "The adapter was trained with another Cayley-Neumann series than that of PEFT "
                "since 0.18, and would not act as it did in training.",
                expected="peft_version of at least 0.18",
                got=f"True, peft_version {version}",
                key="use_cayley_neumann",
            )
        return OFTConfig(
            block_size=fields["oft_block_size"] or None,
            blocks=fields.get("r") or None,
            block_share=bool(fields.get("block_share")),
            cayley="neumann" if neumann else "exact",
            neumann_terms=fields.get("num_cayley_neumann_terms", 5),
            coft=bool(fields.get("coft")),
            eps=fields.get("eps", 6e-5),
            module_dropout=fields.get("module_dropout") or 0.0,
            **common,
        )


def _made(
    triangles: Tensor, *, size: int, terms: int | None, bound: float | None, wide: torch.dtype
) -> Tensor:
    return rotations(triangles.to(wide), size, terms, bound)
