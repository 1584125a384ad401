"""Subspace: a small core between fixed directions, such as those that a fleet shares.

Sources: the joint basis of Brüel-Gabrielsson et al. 2024, "Compress then Serve: Serving
Thousands of LoRA Adapters with Little Overhead" (arXiv 2407.00066), equation 1, with the core
trained; the loadings of Kaushik et al. 2026, "Shared LoRA Subspaces for almost Strict Continual
Learning" (arXiv 2602.06043).

    ΔW = [U, B] M [V; A],   y = W x + b + [U, B] M [V; A] dropout(x)

    x [d_in]     input of the layer     V [R, d_in], U [d_out, R']   frozen
    y [d_out]    output                 M [R' + n, R + n]            trainable, in one of 3 forms
    W, b         frozen                 A [n, d_in], B [d_out, n]    trainable, where n > 0

* ``"full"``: M as it is; n = e (``extra``).
* ``"diagonal"``: M = diag(``core``): directions act in pairs, so that R' = R; n = e.
* ``"loadings"``: M = (m ℓᵀ) ⊗ I_w: U and V are stacks of components of w directions each, n =
  e w are e new components, and what acts is the one pair of factors
  A' = Σ_k ℓ_k [V; A]_k [w, d_in], B' = Σ_k m_k [U, B]_k [d_out, w].

There is no scaling factor. What U and V are is not the variant's affair:
``lorasmith.fleet.SubspaceTrainer`` takes them from a fleet (``init="fleet"``), and
``init="random"`` draws orthonormal ones, which is a method of its own (as LoRA-XS is with
singular vectors of W).

Identity at t = 0: M = 0, of the loadings m = 0. That is the base model exactly, and no dead end:
∂M = [U, B]ᵀ G [V; A]ᵀ for G = ∂ΔW does not depend on M, and ∂m does not on m. ℓ, A and B
have a gradient once M is not 0, as A of LoRA has. A and B start orthonormal, and orthogonal to
the basis; where there are components, as those are: flattened.

Full and diagonal cores need of x only [V; A] x for their gradients, so that x is not saved for
them unless e > 0. ΔW whatever W is: works on quantised layers, fuses exactly up to rounding.

Files: PEFT's ``LORA`` with the factors of ΔW of the least rank that U, V and the form allow
(min(R, R') + e, or w) and alpha equal to the rank, so that PEFT, vLLM and others use it as
it is. Beside them stand U, V and what is trained, under names that PEFT passes over; they are
what lorasmith reads, once it has seen that the factors are theirs (within 2 % of their norm,
which leaves room for storage in 16 bits).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.fields import transposed
from lorasmith.adapters.lora import low_rank_fields
from lorasmith.core import lowrank
from lorasmith.core.config import AdapterConfig, check_count, check_probability, checked_pattern
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
)
from lorasmith.errors import AdapterFileError, ConfigError

__all__ = ["FORMS", "Subspace", "SubspaceConfig", "core_of", "new_directions", "start"]

FORMS = ("full", "diagonal", "loadings")
_INITS = ("random", "fleet")
#: Most that the factors in a file may differ from what U, V and the core make, of their norm.
_AGREE = 0.02


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig(AdapterConfig):
    """Configuration of an adapter with a trained core between fixed directions.

    Args:
        form: What is trained: ``"full"``, ``"diagonal"`` or ``"loadings"``.
        r: R, the number of rows of V; for ``form="loadings"`` R / w, the number of components.
        r_out: The same of U, R'; by default as many.
        width: w, the directions of a component, for ``form="loadings"``; 1 for other forms.
        extra: e, the number of new directions on either side that are trained too; of new
            components, for ``form="loadings"``.
        dropout: Probability with which an element of x is zeroed during training.
        init: ``"random"``: orthonormal U and V; ``"fleet"``: they are given, see
            ``lorasmith.fleet.SubspaceTrainer``.
        rank_pattern: Module name, its end, or a regular expression for its end → r there.
        out_pattern: The same for r_out. Where it says nothing that is ``r_out``, or r.
    """

    variant: ClassVar[str] = "subspace"

    form: str = "full"
    r: int = 16
    r_out: int | None = None
    width: int = 1
    extra: int = 0
    dropout: float = 0.0
    init: str = "random"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    out_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, known in (("form", self.form, FORMS), ("init", self.init, _INITS)):
            if value not in known:
                raise ConfigError(
                    f"{key} is not one that a subspace has.",
                    expected=" or ".join(known),
                    got=repr(value),
                    key=key,
                )
        check_count(self.r, "r")
        if self.r_out is not None:
            check_count(self.r_out, "r_out")
        check_count(self.width, "width", "number of directions")
        extra: object = self.extra
        if type(extra) is not int or extra < 0:
            raise ConfigError(
                "extra is not a number of directions.",
                expected="an integer of at least 0",
                got=repr(extra),
                key="extra",
            )
        check_probability(self.dropout, "dropout")
        for key in ("rank_pattern", "out_pattern"):
            self._set(key, checked_pattern(getattr(self, key), key, check_count))
        if self.form == "diagonal" and (self.out_pattern or self.r_out not in (None, self.r)):
            raise ConfigError(
                "A diagonal core pairs the directions on either side, which must be as many.",
                expected="r_out=None and no out_pattern",
                got=f"r_out={self.r_out}, out_pattern={dict(self.out_pattern)}",
                key="r_out",
            )
        if self.form != "loadings" and self.width != 1:
            raise ConfigError(
                f"A core in the form {self.form!r} has no components.",
                expected="width=1",
                got=self.width,
                key="width",
            )

    def sizes_of(self, module_name: str) -> tuple[int, int]:
        """(R', R) of the layer of that name: columns of U, rows of V."""
        inner = value_for(self.rank_pattern, module_name, self.r)
        usual = inner if self.form == "diagonal" else self.r_out or inner
        outer = value_for(self.out_pattern, module_name, usual)
        return outer * self.width, inner * self.width

    def file_rank(self, module_name: str | None = None) -> int:
        """Rank of the factors in a file, of one layer or (``None``) where no pattern matches."""
        if module_name is None:
            outer, inner = self.r_out or self.r, self.r
        else:
            outer, inner = self.sizes_of(module_name)
        return self.width if self.form == "loadings" else min(outer, inner) + self.extra

    @property
    def added(self) -> int:
        """n, the rows of A and columns of B."""
        return self.extra * self.width


def new_directions(basis: Tensor, count: int) -> Tensor:
    """Orthonormal rows that are orthogonal to all rows of a basis, drawn at random.

    Args:
        basis: [R, d]; its rows need not be independent.
        count: How many.

    Returns:
        [count, d], float32.

    Raises:
        ConfigError: If the space has no more directions.
    """
    size = basis.shape[1]
    if basis.shape[0] + count > size:
        raise ConfigError(
            "There are not as many new directions.",
            expected=f"extra <= {max(0, size - basis.shape[0])}: the basis has "
            f"{basis.shape[0]} of {size}",
            got=count,
            key="extra",
        )
    if basis.is_meta:
        return basis.new_empty(count, size)
    # A QR of both would put a rank-deficient basis's rounding errors in front of the new ones.
    wide = basis.detach().to("cpu", torch.float64)
    _, s, vt = torch.linalg.svd(wide, full_matrices=False)
    known = vt[s > s.amax() * 1e-7] if s.numel() else vt
    drawn = torch.randn(count, size, dtype=torch.float64)
    for _ in range(2):  # twice is enough (Kahan)
        drawn = drawn - (drawn @ known.mT) @ known
        drawn = torch.linalg.qr(drawn.mT)[0].mT
    return drawn.to(torch.float32).to(basis.device)


def start(
    form: str, U: Tensor, V: Tensor, *, width: int = 1, extra: int = 0, right: Tensor | None = None
) -> NewTensors:
    """The tensors of one layer on a given basis, such that ΔW is 0.

    Args:
        form: See the module.
        U: [d_out, R'].
        V: [R, d_in].
        width: Directions of a component.
        extra: Number of new directions.
        right: ℓ [R / width] to start with, not all 0; all 1 by default.
    """
    outer, inner, device = U.shape[1], V.shape[0], V.device
    trained = {}
    if form == "full":
        trained["core"] = torch.zeros(outer + extra, inner + extra, device=device)
    elif form == "diagonal":
        trained["core"] = torch.zeros(inner + extra, device=device)
    else:
        trained["left"] = torch.zeros(outer // width + extra, device=device)
        given = torch.ones(inner // width) if right is None else right.detach().float()
        # The new ones as large as the others: at 0, A would wait for them to move.
        more = given.square().mean().sqrt().expand(extra)
        trained["right"] = torch.cat((given, more.to(given.device))).to(device)
    if extra:
        trained["A"] = _new_components(V, width, extra)
        trained["B"] = _new_components(U.mT, width, extra).mT.contiguous()
    return NewTensors(trained, {"U": U, "V": V})


def _new_components(rows: Tensor, width: int, count: int) -> Tensor:
    """``count`` new components [count width, d], orthogonal to those in ``rows`` [K width, d]."""
    size = rows.shape[1]
    return new_directions(rows.reshape(-1, width * size), count).view(-1, size)


def core_of(config: SubspaceConfig, values: Mapping[str, Tensor] | LayerState) -> Tensor:
    """M [R' + n, R + n], whatever the form."""
    if config.form == "loadings":
        left, right = values["left"], values["right"]
        eye = torch.eye(config.width, dtype=left.dtype, device=left.device)
        return torch.kron(torch.outer(left, right), eye)
    core = values["core"]
    return torch.diag(core) if config.form == "diagonal" else core


def _rows(state: Any) -> tuple[Tensor, Tensor | None]:
    """What x is multiplied with: new directions first, as ``lowrank.down`` wants what trains."""
    config: SubspaceConfig = state.config
    V = state["V"]
    if config.form == "loadings":
        if config.extra:
            V = torch.cat((V, state["A"]))
        return _combined(state["right"], V, config.width), None
    return (state["A"], V) if config.extra else (V, None)


def _combined(loadings: Tensor, rows: Tensor, width: int) -> Tensor:
    """Σ_k loadings_k rows_k [width, d] of the components [K width, d] below each other."""
    with lowrank.no_autocast(rows):
        return (loadings @ rows.reshape(len(loadings), -1)).view(width, rows.shape[1])


class Subspace(Variant):
    """y = W x + b + [U, B] M [V; A] dropout(x)."""

    name = "subspace"
    config_class = SubspaceConfig
    peft_type = "LORA"
    family = "low-rank"
    formula = "y = W x + U M V x, U and V shared by a fleet"
    faster = ()

    def new_tensors(self, base: BaseLayer, config: SubspaceConfig) -> NewTensors:
        info, device = base.info, device_of(base.module)
        if config.init == "fleet":
            raise ConfigError(
                "The directions of this adapter are those of a fleet, which is not at hand.",
                expected="lorasmith.SubspaceTrainer(model, fleet, task)",
                got="attach with init='fleet'",
                fix="or init='random' for directions of no fleet",
                key="init",
            )
        outer, inner = config.sizes_of(info.name)
        for size, limit, what in ((inner, info.d_in, "d_in"), (outer, info.d_out, "d_out")):
            if size > limit:
                raise ConfigError(
                    "There are not as many orthonormal directions.",
                    expected=f"at most {what} = {limit} of {info.name}",
                    got=size,
                    fix="lower r, exclude the layer, or give it a rank of its own in rank_pattern",
                    key="r",
                )
        V = new_directions(torch.empty(0, info.d_in), inner).to(device)
        U = new_directions(torch.empty(0, info.d_out), outer).mT.to(device)
        return start(config.form, U, V, width=config.width, extra=config.extra)

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
        config: SubspaceConfig = state.config  # type: ignore[assignment]
        return lowrank.down(
            x,
            dropout=config.dropout if state.training else 0.0,
            owned=owns_output(base.module, base),
            member=state,
            siblings=getattr(state, "siblings", None),
            rows=_rows,
        )

    def after(self, state: LayerState, y: Tensor, carry: Tensor, base: BaseLayer) -> Tensor:
        config: SubspaceConfig = state.config  # type: ignore[assignment]
        e, U = config.extra, state["U"]
        owned = owns_output(base.module, base)
        if config.form == "loadings":
            if e:
                U = torch.cat((U, state["B"]), dim=1)
            B = _combined(state["left"], U.mT, config.width).mT
            return lowrank.up(y, carry, B, 1.0, owned=owned)
        core = state["core"]
        if config.form == "diagonal":
            if e:  # what lowrank calls B0 is subtracted
                core = torch.cat((core[-e:], -core[:-e]))
            turned = carry * core.to(carry.dtype)
        else:
            if e:
                inner, outer = state["V"].shape[0], U.shape[1]
                core = torch.cat((core[:, inner:], core[:, :inner]), dim=1)
                core = torch.cat((core[outer:], -core[:outer]))
            turned = F.linear(carry, core.to(carry.dtype))
        if e:
            return lowrank.up(y, turned, state["B"], 1.0, B0=U, owned=owned)
        return lowrank.up(y, turned, U, 1.0, owned=owned)

    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        A, B = _pair(state, lambda n: state[n].detach().to(weight.device, weight.dtype))
        return torch.addmm(weight, B, A)

    def factors(self, state: LayerState) -> Factors:
        A, B = _pair(state, state.__getitem__)
        return Factors(A, B, 1.0)

    # -- files -----------------------------------------------------------------------

    def shapes(self, config: SubspaceConfig, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        (outer, inner), e = config.sizes_of(info.name), config.extra
        found: dict[str, tuple[int, ...]] = {}
        if config.form == "full":
            found["core"] = (outer + e, inner + e)
        elif config.form == "diagonal":
            found["core"] = (inner + e,)
        else:
            found |= {"left": (outer // config.width + e,), "right": (inner // config.width + e,)}
        if e:
            found |= {"A": (config.added, info.d_in), "B": (info.d_out, config.added)}
        return found

    def tensor_specs(self, config: SubspaceConfig, info: LayerInfo) -> dict[str, TensorSpec]:
        outer, inner = config.sizes_of(info.name)
        rank = config.file_rank(info.name)
        shapes = {
            **self.shapes(config, info),
            "U": (info.d_out, outer),
            "V": (inner, info.d_in),
        }
        return {
            **{n: TensorSpec(f"subspace_{n}", shape) for n, shape in shapes.items()},
            "factor_A": TensorSpec("lora_A.weight", (rank, info.d_in)),
            "factor_B": TensorSpec("lora_B.weight", (info.d_out, rank)),
        }

    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        return shapes["subspace_V"][1], shapes["subspace_U"][0]

    def sizes_from_tensors(
        self, config: SubspaceConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        return shapes["V"][1], shapes["U"][0]

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        specs = self.tensor_specs(state.config, state.info)  # type: ignore[arg-type]
        A, B = _pair(state, lambda n: state[n].detach())
        made = {"factor_A": A, "factor_B": B}
        return {s.key: made[n] if n in made else state[n] for n, s in specs.items()}

    def from_file(
        self, config: SubspaceConfig, info: LayerInfo, tensors: Mapping[str, Tensor]
    ) -> NewTensors:
        specs = self.tensor_specs(config, info)
        values = {n: tensors[s.key] for n, s in specs.items()}
        stored_A, stored_B = values.pop("factor_A"), values.pop("factor_B")
        if not stored_A.is_meta:
            A, B = _pair(_Values(config, values), values.__getitem__)
            gap = (stored_A - A).norm() > _AGREE * A.norm()
            if bool(gap | ((stored_B - B).norm() > _AGREE * B.norm())):
                raise AdapterFileError(
                    "The low-rank factors in the file are not those of the core beside them: one "
                    "of the two has been changed.",
                    key=f"{info.name}.{specs['factor_B'].key}",
                    fix="save the adapter again with lorasmith",
                )
        frozen = {n: values.pop(n) for n in ("U", "V")}
        return NewTensors(values, frozen)

    def to_peft(self, config: SubspaceConfig, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        usual = config.file_rank()
        ranks = {m: config.file_rank(m) for m in modules}
        pattern = {m: rank for m, rank in ranks.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": usual,
            "lora_dropout": config.dropout,
            "use_rslora": False,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "use_dora": False,
            "bias": "none",
            "lora_bias": False,
            "init_lora_weights": True,
            **transposed(modules),
        }

    def fields_from_tensors(
        self, names: Collection[str], shape: Callable[[str], tuple[int, ...]]
    ) -> dict[str, Any]:
        mark = ".subspace_V"
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in names:
            if key.endswith(mark):
                stem = key.removesuffix("V")
                kinds = ("U", "V", "A", "core", "left")
                found[key.removesuffix(mark).removeprefix("base_model.model.")] = {
                    n: shape(stem + n) for n in kinds if stem + n in names
                }
        return {"subspace": found} if found else {}

    def from_peft(
        self, fields: Mapping[str, Any], common: Mapping[str, Any]
    ) -> SubspaceConfig | None:
        if fields.get("peft_type") != self.peft_type or not fields.get("subspace"):
            return None
        dropout = low_rank_fields(fields)["dropout"]
        layers: dict[str, dict[str, tuple[int, ...]]] = fields["subspace"]
        try:
            return SubspaceConfig(**_told(layers), dropout=dropout, init="fleet", **common)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise ConfigError(
                "The tensors of a core between fixed directions are incomplete, or of shapes "
                "that do not go together.",
                expected="subspace_U, subspace_V and subspace_core or subspace_left of each layer",
                got=f"{type(error).__name__}: {error}",
                key="subspace",
            ) from error


@dataclass(frozen=True)
class _Values:
    """Tensors by name with a configuration: as much of a ``LayerState`` as ``_pair`` needs."""

    config: SubspaceConfig
    values: Mapping[str, Tensor]

    def __getitem__(self, tensor: str) -> Tensor:
        return self.values[tensor]


def _pair(state: Any, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Factors A [k, d_in] and B [d_out, k] of ΔW = B A, of the least rank k that is certain.

    Args:
        state: Has the configuration.
        get: Tensor name → value, in the dtype in which to compute.
    """
    config: SubspaceConfig = state.config
    e, U, V = config.extra, get("U"), get("V")
    with lowrank.no_autocast(V):
        outer, inner = U.shape[1], V.shape[0]
        if e:
            U, V = torch.cat((U, get("B")), dim=1), torch.cat((V, get("A")))
        if config.form == "loadings":
            A = _combined(get("right"), V, config.width)
            return A, _combined(get("left"), U.mT, config.width).mT
        core = get("core")
        if config.form == "diagonal":
            return V, U * core
        return (V, U @ core) if inner <= outer else (core @ V, U)


def _told(layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Fields of the configuration that the shapes of all layers tell."""
    first = next(iter(layers.values()))
    extra = first["A"][0] if "A" in first else 0
    width, form = 1, "full" if len(first.get("core", ())) == 2 else "diagonal"
    if "left" in first:
        # Components of basis and extra together have width directions each.
        form, width = "loadings", (first["U"][1] + extra) // first["left"][0]
        extra //= width
    inner = {m: shapes["V"][0] // width for m, shapes in layers.items()}
    outer = {m: shapes["U"][1] // width for m, shapes in layers.items()}
    usual = Counter(inner.values()).most_common(1)[0][0]
    usual_out = Counter(outer.values()).most_common(1)[0][0]
    if form == "diagonal":
        if inner != outer:
            raise ConfigError(
                "A diagonal core pairs the directions on either side, which must be as many.",
                expected=f"{sum(inner.values())} directions in all",
                got=sum(outer.values()),
                key="subspace_U",
            )
        usual_out, outer = usual, {}
    return {
        "form": form,
        "r": usual,
        "r_out": usual_out,
        "width": width,
        "extra": extra,
        "rank_pattern": {m: n for m, n in inner.items() if n != usual},
        "out_pattern": {m: n for m, n in outer.items() if n != usual_out},
    }
