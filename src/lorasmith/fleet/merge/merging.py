"""Merging adapters into one: layer by layer, in delta space, recompressed.

    ΔW = method(ΔW₁, …, ΔW_N; w₁, …, w_N) ≈ s B A

for every layer that one of the adapters has, with the pure functions of this package. ΔWᵢ is what
the adapter really adds to W, scaling included: ranks, alphas, rsLoRA, storage dtypes and targets
may differ. A layer that an adapter lacks has the change 0 there, and the report names it.

Weights mean what they say, ΔW = Σ wᵢ ΔWᵢ (for methods that are no sum: see them; all scale with
Σ wᵢ). By default wᵢ = 1/N, so that N copies of an adapter give that adapter.

Low-rank methods stay in factors from end to end, in float64: concatenated factors, QR of both, SVD
of the small product (``core.truncation``). Dense ones hold the N matrices of one layer at a time,
in float32. Only where the sum of ranks reaches the size of the layer is its ΔW made.

**Rank** of the result: ``rank=`` or the method's own, see ``MergeMethod.rank``. Truncation is the
nearest matrix of that rank; the share of energy that it takes is in the report, layer by layer.

**DoRA**, and other families whose change depends on W, need the base model: ΔWᵢ = effective weight
− W, exact, W being read layer by layer. The result is a plain LoRA of the rank of the largest
input unless you ask for more. Without ``model=`` they are refused, and so are families that change
biases too.

**modules_to_save** are averaged linearly whatever the method: Σ wᵢ Tᵢ where Σ wᵢ = 1 and every
adapter has the module, else, with ``model=``, T₀ + Σ wᵢ (Tᵢ − T₀), where an adapter that lacks the
module adds 0. Without both they are refused; they are never dropped. ``scale`` multiplies wᵢ.

Limits: a LoRA on an embedding is refused. The result is stored in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lorasmith.core.config import LowRankConfig
from lorasmith.core.layers import LayerInfo
from lorasmith.core.truncation import Product, Spectrum, decompose, norm
from lorasmith.errors import ConfigError, UnsupportedFeatureError
from lorasmith.fleet.members import LayerFactors, Member, Source, open_members
from lorasmith.fleet.merge.base import BaseModelWeights, Model
from lorasmith.fleet.merge.checks import is_number
from lorasmith.fleet.merge.registry import MergeMethod, get_method
from lorasmith.fleet.merge.report import Merged, MergedLayer, MergeReport
from lorasmith.io.convert import plain_lora, with_padding
from lorasmith.io.weights import AdapterWeights, check_finite

if TYPE_CHECKING:
    from lorasmith.adapters.lora import LoRAConfig

__all__ = ["check_weights", "merge"]

_F32_NOISE = 4 * torch.finfo(torch.float32).eps
#: Rows of the smaller side of a dense change below which its whole spectrum costs little.
_EXACT = 128
#: Weights of this sum are a mean.
_SUM = 1e-6


def merge(
    adapters: Source | Sequence[Source] | Mapping[str, Source],
    method: str = "linear",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    ids: Sequence[str] | None = None,
    rank: int | Literal["exact"] | None = None,
    model: Model | None = None,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Merged:
    """Merges adapters of one base model into one plain LoRA.

        made = ls.merge(["a", "b", "c"], "ties", weights=[0.5, 0.3, 0.2], density=0.2, rank=16)
        print(made)          # ties of 3 adapters → lora of rank 16 …: 41 % of the energy discarded
        made.save("merged")

    Args:
        adapters: Directories, hub ids, URLs, adapters that have been read, or a mapping of ids
            to these; see ``fleet.open_members``.
        method: Name of a method, see ``fleet.merge.methods()``.
        weights: One for each adapter, in order or by id; 1/N each by default. Any finite
            numbers; some methods take none below 0.
        ids: Names for the report.
        rank: Rank of the result; ``"exact"`` for all of it. By default all of it for linear,
            task_arithmetic and concatenation, else the largest rank that an adapter has on the
            layer.
        model: The base model (loaded, or a directory, alias or hub id), which DoRA needs, and
            ``modules_to_save`` may.
        seed: Of methods that draw random numbers. The global random state is not touched.
        allow_base_mismatch: Whether adapters and model may be of different bases.
        progress: Called with ("merge", layers done, layers in all).
        options: Those of the method, e.g. ``density``, ``scale``.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: Weights, rank or options are not usable.
        BaseMismatchError: The adapters were made for different base models.
        UnsupportedFeatureError: An adapter holds what cannot be merged; the message says what.
        AdapterFileError: One cannot be read.
    """
    chosen = get_method(method)
    settings = chosen.checked(options)
    _check_rank(rank)
    number: object = seed
    if not isinstance(number, int) or isinstance(number, bool):
        raise ConfigError("seed is no integer.", got=repr(seed), key="seed")
    members = open_members(adapters, ids, allow_base_mismatch=allow_base_mismatch, needs="delta")
    if chosen.count is not None and len(members) != chosen.count:
        raise ConfigError(
            f"{chosen.name} takes {chosen.count} adapters.", got=len(members), key="adapters"
        )
    w = check_weights(weights, [m.id for m in members])
    modules = list(dict.fromkeys(n for member in members for n in member.modules))
    base = None
    if model is not None:
        base = BaseModelWeights(model, members, modules, allow_base_mismatch)
    dense = {m.id for m in members if not _in_factors(m)}
    _refuse(members, dense, base)
    factor = settings.get("scale", 1.0)
    saved = _Saved(members, [factor * x for x in w], base)
    source = _Changes(members, dense, base)
    layers, tensors = [], {}
    with torch.no_grad():
        for done, module in enumerate(modules):
            generator = _generator(seed, module) if chosen.random else None
            record, factors = _layer(chosen, settings, w, source, module, rank, generator)
            layers.append(record)
            tensors[module] = factors
            if progress is not None:
                progress("merge", done + 1, len(modules))
        extras = saved.tensors()
    made = _assemble(members, source.infos, tensors, extras)
    report = MergeReport(
        method=chosen.name,
        ids=tuple(m.id for m in members),
        weights=tuple(w),
        options=settings,
        seed=seed if chosen.random else None,
        layers=tuple(layers),
        saved_modules=saved.how,
        notes=_notes(settings, members, dense, saved),
    )
    return Merged(made, report)


def check_weights(
    weights: Sequence[float] | Mapping[str, float] | None, ids: Sequence[str]
) -> list[float]:
    """One finite weight for each adapter; 1/N each if none are given.

    Raises:
        ConfigError: They are of another number, or not finite.
    """
    count = len(ids)
    if weights is None:
        return [1 / count] * count
    said: object = weights
    if isinstance(weights, Mapping):
        wrong = sorted(map(str, weights.keys() ^ set(ids)))
        if wrong:
            raise ConfigError(
                "The weights are of other adapters.",
                expected=", ".join(ids),
                got=", ".join(map(str, weights)),
                key=wrong[0],
            )
        given = [weights[name] for name in ids]
    elif isinstance(said, str) or not isinstance(said, Sequence):
        raise ConfigError(
            "weights is no list of numbers.",
            expected=f"{count} numbers",
            got=repr(weights),
            key="weights",
        )
    else:
        given = list(said)
    if len(given) != count:
        raise ConfigError(
            "There are not as many weights as adapters.",
            expected=f"{count} ({', '.join(ids)})",
            got=len(given),
            key="weights",
        )
    for value in given:
        if not is_number(value):
            raise ConfigError(
                "A weight is not a number.",
                expected="finite numbers",
                got=repr(value),
                key="weights",
            )
    return [float(value) for value in given]


def _check_rank(rank: object) -> None:
    if rank is None or rank == "exact":
        return
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            "rank is not usable.",
            expected='an integer of at least 1, or "exact"',
            got=repr(rank),
            key="rank",
        )


def _generator(seed: int, module: str) -> torch.Generator:
    """One for each layer, so that no layer's numbers depend on which others there are."""
    digest = hashlib.blake2b(f"{seed}\0{module}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# What goes in -----------------------------------------------------------------------------------


def _in_factors(member: Member) -> bool:
    """Whether its change is exactly B A, whatever W is."""
    if member.dora:
        return False
    if member.weights.variant.name == "lora":
        return True
    found = member.weights.factors
    return set(found) == set(member.modules) and found[member.modules[0]].exact


def _refuse(members: Sequence[Member], dense: set[str], base: BaseModelWeights | None) -> None:
    for member in members:
        weights = member.weights
        embedding = next((k for k in weights.unexpected if ".lora_embedding_" in k), None)
        if embedding is not None:
            raise UnsupportedFeatureError(
                f"The adapter {member.id!r} adapts an embedding, which cannot be merged.",
                file=weights.path,
                key=embedding,
                fix="leave it out, or merge it into the model with PEFT",
            )
        if member.id not in dense:
            continue
        variant = weights.variant
        if not variant.fusable:
            raise UnsupportedFeatureError(
                f"The adapter {member.id!r} cannot be merged: what {variant.name} does depends on "
                "its input, so that no change of the weights acts like it.",
                file=weights.path,
            )
        if type(variant).effective_bias is not _plain_bias():
            raise UnsupportedFeatureError(
                f"The adapter {member.id!r} cannot be merged: {variant.name} also changes biases, "
                "which a LoRA cannot carry.",
                file=weights.path,
                fix="lorasmith convert says how much of it that is, and makes a LoRA without it",
            )
        if base is None:
            raise UnsupportedFeatureError(
                f"What the adapter {member.id!r} ({variant.name}) changes depends on the base "
                "weights.",
                file=weights.path,
                expected="model=, the base model that the adapters were made for",
                got="model=None",
                fix="pass the base model (--model MODEL): it is merged exactly then",
                key="model",
            )


def _plain_bias() -> Any:
    from lorasmith.core.variant import Variant

    return Variant.effective_bias


class _Changes:
    """ΔWᵢ of every layer, in either form."""

    def __init__(
        self, members: Sequence[Member], dense: set[str], base: BaseModelWeights | None
    ) -> None:
        self.members, self.base = members, base
        self.dense_ids = dense
        self.infos: dict[str, LayerInfo] = {}
        for member in members:
            for name, info in member.weights.layers.items():
                known = self.infos.get(name)
                if known is None or not (known.d_in and known.d_out):
                    self.infos[name] = info

    def missing(self, module: str) -> tuple[str, ...]:
        return tuple(m.id for m in self.members if module not in m.modules)

    def has_dense(self, module: str) -> bool:
        return any(m.id in self.dense_ids and module in m.modules for m in self.members)

    def largest_rank(self, module: str) -> int:
        """The largest rank that an adapter has on the layer."""
        ranks = [_rank(m, module) for m in self.members if module in m.modules]
        if not any(ranks):
            raise ConfigError(
                "The adapters have no rank that the result could have.",
                expected="rank=, e.g. 16",
                got="None",
                key="rank",
            )
        return max(ranks)

    def _effective(self, member: Member, module: str, weight: Tensor) -> Tensor:
        return member.delta(module, weight, dtype=torch.float64)

    def factors(self, module: str) -> list[LayerFactors]:
        """In float64. A dense change is its own factor beside an identity."""
        weight = None
        if self.has_dense(module):
            assert self.base is not None
            weight = self.base.weight(module)
        found: list[LayerFactors | None] = []
        for member in self.members:
            if module not in member.modules:
                found.append(None)
            elif member.id in self.dense_ids:
                assert weight is not None
                delta = self._effective(member, module, weight)
                rows, columns = delta.shape
                eye = torch.eye(min(rows, columns), dtype=delta.dtype, device=delta.device)
                pair = (eye, delta) if columns <= rows else (delta, eye)
                found.append(LayerFactors(*pair))
            else:
                part = member.factors(module)
                found.append(LayerFactors(part.A.double(), part.B.double()))
        like = next(f for f in found if f is not None)
        none = LayerFactors(
            like.A.new_zeros(0, like.A.shape[1]), like.B.new_zeros(like.B.shape[0], 0)
        )
        return [none if f is None else f for f in found]

    def dense(self, module: str) -> list[Tensor]:
        """As matrices, in float32."""
        weight = None
        if self.has_dense(module):
            assert self.base is not None
            weight = self.base.weight(module)
        found: list[Tensor | None] = []
        for member in self.members:
            if module not in member.modules:
                found.append(None)
            elif member.id in self.dense_ids:
                assert weight is not None
                found.append(self._effective(member, module, weight).float())
            else:
                found.append(member.factors(module).delta())
        like = next(f for f in found if f is not None)
        return [torch.zeros_like(like) if f is None else f for f in found]


def _rank(member: Member, module: str) -> int:
    """Rank that an adapter has on a layer; 0 where its family has no such thing."""
    config = member.weights.config
    if _in_factors(member) or member.dora:
        return member.rank(module)
    return config.rank_of(module) if isinstance(config, LowRankConfig) else 0


# One layer --------------------------------------------------------------------------------------


def _layer(
    method: MergeMethod,
    settings: Mapping[str, Any],
    weights: Sequence[float],
    source: _Changes,
    module: str,
    rank: int | Literal["exact"] | None,
    generator: torch.Generator | None,
) -> tuple[MergedLayer, LayerFactors]:
    random = {} if generator is None else {"generator": generator}
    changes: Sequence[Any] = (
        source.factors(module) if method.form == "factors" else source.dense(module)
    )
    shape = _shape(changes[0])
    merged = method.function(changes, list(weights), **settings, **random)
    _check_result(method, merged, shape, module)
    missing = source.missing(module)
    wanted: int | str = rank if rank is not None else method.rank
    if source.has_dense(module) and rank is None:
        if method.rank == "stacked":
            raise UnsupportedFeatureError(
                f"{method.name} has no factors to stack where an adapter's change has full rank "
                "(DoRA).",
                expected="rank=, or another method",
                fix="take svd, or pass rank=",
                key=module,
            )
        wanted = "largest"
    if isinstance(merged, LayerFactors) and wanted == "stacked":
        norm = Product(merged.B.double(), merged.A.double()).norm()
        return MergedLayer(module, merged.rank, None, norm, 0.0, missing), merged
    if wanted == "largest":
        wanted = source.largest_rank(module)
    spectrum, energy = _spectrum(merged, None if wanted == "exact" else int(wanted))
    kept = max(1, spectrum.useful) if wanted == "exact" else min(int(wanted), *shape)
    left = max(0.0, energy - float(spectrum.S[:kept].square().sum()))
    # Beyond the resolution of a sum of squares nothing was lost.
    share = left / energy if energy and left > 1e-14 * energy else 0.0
    made = spectrum.factors(kept, 1.0)
    record = MergedLayer(module, kept, spectrum.rank, math.sqrt(energy), share, missing)
    return record, LayerFactors(made["A"], made["B"])


def _shape(change: LayerFactors | Tensor) -> tuple[int, int]:
    if isinstance(change, LayerFactors):
        return change.B.shape[0], change.A.shape[1]
    return change.shape[0], change.shape[1]


def _check_result(method: MergeMethod, merged: object, shape: tuple[int, int], module: str) -> None:
    kind = LayerFactors if method.form == "factors" else Tensor
    if not isinstance(merged, kind) or _shape(merged) != shape:
        raise ConfigError(
            f"The merging method {method.name!r} gave something else than a change of the layer.",
            expected=f"{kind.__name__} of {list(shape)}",
            got=type(merged).__name__ if not isinstance(merged, kind) else list(_shape(merged)),
            key=module,
        )
    for tensor in (merged.A, merged.B) if isinstance(merged, LayerFactors) else (merged,):
        assert isinstance(tensor, Tensor)
        # A finite sum has finite terms, and costs a tenth of looking at each.
        if not math.isfinite(tensor.sum()) and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                f"The merged change of {module} is not finite.",
                fix="smaller weights or scale",
                key=module,
            )


def _spectrum(merged: LayerFactors | Tensor, rank: int | None) -> tuple[Spectrum, float]:
    """Singular vectors of the merged change, and ‖ΔW‖²."""
    if isinstance(merged, LayerFactors):
        if merged.rank < min(_shape(merged)):
            product = Product(merged.B.double(), merged.A.double())
            spectrum = product.spectrum() if rank is None else product.leading(rank)
            return spectrum, spectrum.energy
        merged = merged.delta(torch.float64)
    noise = _F32_NOISE if merged.dtype == torch.float32 else 0.0
    spectrum = decompose(merged, rank, exact=_EXACT)
    if spectrum.tolerance < noise:
        spectrum = replace(spectrum, tolerance=noise)
    return spectrum, norm(merged) ** 2


# What is not factors ----------------------------------------------------------------------------


class _Saved:
    """``modules_to_save`` of the merge."""

    def __init__(
        self, members: Sequence[Member], weights: Sequence[float], base: BaseModelWeights | None
    ) -> None:
        self.members, self.weights, self.base = members, weights, base
        self.leaves: dict[str, tuple[str, ...]] = {}
        self.how: dict[str, str] = {}
        for member in members:
            for module, leaves in member.weights.saved_modules.items():
                known = self.leaves.setdefault(module, leaves)
                if set(known) != set(leaves):
                    raise UnsupportedFeatureError(
                        f"The adapters hold different tensors of {module}, which cannot be "
                        "averaged.",
                        expected=", ".join(known),
                        got=", ".join(leaves),
                        key="modules_to_save",
                    )
        mean = abs(math.fsum(weights) - 1) <= _SUM
        for module in self.leaves:
            having = [m.id for m in members if module in m.weights.saved_modules]
            whole = mean and len(having) == len(members)
            if not whole and base is None:
                raise UnsupportedFeatureError(
                    f"The adapters replace {module} as a whole (modules_to_save), which has no "
                    "weighted mean here.",
                    expected="weights (times scale) of sum 1 and the module in every adapter, or "
                    "model=, the base model, to which the others count as unchanged",
                    got=f"weights of sum {math.fsum(weights):g}, the module in "
                    f"{len(having)} of {len(members)} adapters",
                    fix="pass the base model (--model MODEL)",
                    key="modules_to_save",
                )
            self.how[module] = "mean" if whole else "base"

    def tensors(self) -> dict[str, Tensor]:
        """``"<module>.<tensor>"`` → merged value, in the dtype in which the adapters have it."""
        made = {}
        for module, leaves in self.leaves.items():
            for leaf in leaves:
                key = f"{module}.{leaf}"
                start = None
                if self.how[module] == "base":
                    assert self.base is not None
                    start = self.base.tensor(module, leaf).detach().double().cpu()
                made[key] = self._average(key, module, start)
        return made

    def _average(self, key: str, module: str, start: Tensor | None) -> Tensor:
        total: Tensor | None = None if start is None else start.clone()
        kind: torch.dtype | None = None
        for member, weight in zip(self.members, self.weights, strict=True):
            if module not in member.weights.saved_modules:
                continue
            value = member.weights.extras[key]
            check_finite(value, key, member.weights.path)
            if total is not None and value.shape != total.shape:
                raise UnsupportedFeatureError(
                    "A tensor of modules_to_save has another shape than in the other adapters or "
                    "the base model.",
                    file=member.weights.path,
                    expected=list(total.shape),
                    got=list(value.shape),
                    key=key,
                )
            wide = value.double()
            change = (wide if start is None else wide - start) * weight
            total = change if total is None else total + change
            kind = value.dtype if kind is None else torch.promote_types(kind, value.dtype)
        assert total is not None
        assert kind is not None
        return total.to(kind)


# What comes out ---------------------------------------------------------------------------------


def _assemble(
    members: Sequence[Member],
    infos: Mapping[str, LayerInfo],
    factors: Mapping[str, LayerFactors],
    extras: Mapping[str, Tensor],
) -> AdapterWeights:
    """The plain LoRA that holds the factors, with what the adapters agree on."""
    from lorasmith.adapters.lora import LoRAConfig

    like = next((m for m in members if m.weights.base.fingerprint is not None), members[0]).weights
    ranks = {module: pair.rank for module, pair in factors.items()}
    dropouts = {getattr(m.weights.config, "dropout", 0.0) for m in members}
    common = Counter(ranks.values()).most_common(1)[0][0]
    start: LoRAConfig = LoRAConfig(
        r=common, alpha=common, dropout=dropouts.pop() if len(dropouts) == 1 else 0.0
    )
    kept = tuple(dict.fromkeys(n for m in members for n in m.weights.config.modules_to_save))
    config = plain_lora(start, ranks, kept)
    tensors = {}
    for module, pair in factors.items():
        s = config.scaling_of(module)
        root = math.sqrt(s)
        # Both sides share the scaling, so that they stay balanced.
        tensors[module] = {
            "A": (pair.A / root).float().cpu(),
            "B": (pair.B / root).float().cpu(),
        }
    made = AdapterWeights.from_tensors(config, tensors, extras=extras, like=like, layouts=infos)
    padding: dict[str, Tensor] = {}
    for member in members:
        for key in member.weights.padding:
            if key not in extras and key not in padding:
                padding[key] = member.weights.extras[key]
    narrowed = any(like.peft.get(k) for k in ("exclude_modules", "layers_to_transform"))
    if not padding and not narrowed:
        return made
    fields = dict(made.peft)
    if narrowed:
        fields["target_modules"] = list(factors)
    return with_padding(made, fields, padding)


def _notes(
    settings: Mapping[str, Any],
    members: Sequence[Member],
    dense: set[str],
    saved: _Saved,
) -> tuple[str, ...]:
    notes = []
    if settings.get("density") == 1:
        notes.append("density is 1, so that nothing is dropped")
    others = [m.id for m in members if m.id in dense]
    if others:
        notes.append(f"{', '.join(others)} became changes of W, and the result is a plain LoRA")
    if saved.how:
        notes.append(f"averaged as a whole: {', '.join(saved.how)}")
    return tuple(notes)
