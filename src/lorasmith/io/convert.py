"""Converting any fusable adapter into plain LoRA of a chosen rank, with the error it makes.

Every fusable variant acts as W + ΔW. The LoRA nearest to it is the truncated singular value
decomposition of ΔW (Eckart and Young 1936): no other change of rank r is closer in the
Frobenius norm.

    ΔW ≈ s B A        B = U_r (S_r / |s|)^½, A = ± (S_r / |s|)^½ V_rᵀ,  ΔW = U S Vᵀ

Where the variant has low-rank factors that are all it does (LoRA with whatever
initialisation, and others whose ΔW does not hang on W), they suffice: no matrix of W's size is
made and no model is needed. Of everything else (DoRA, IA3, HRA, RoAd, OFT, LoHa, …)
ΔW = effective weight − W is computed layer by layer, so that one layer's worth of memory is
used. Both are taken apart as ``lorasmith.core.truncation`` says.

The errors reported are those of the factors as they are stored, in float32, measured and not
estimated. What plain LoRA cannot carry at all is a change of the base's bias (IA3 and RoAd
scale it): it is measured, reported, and warned about.
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import Adapter, unwrap
from lorasmith.core.fusing import fused_name
from lorasmith.core.layers import LayerInfo, describe, read_bias, read_weight
from lorasmith.core.patterns import first_matching_key
from lorasmith.core.truncation import Product, Spectrum, decompose, norm, wide
from lorasmith.core.variant import LayerState, Variant
from lorasmith.errors import AdapterFileError, ConfigError, FuseError
from lorasmith.io import peft
from lorasmith.io.files import check_base, read_adapter
from lorasmith.io.tensors import MemoryTensors
from lorasmith.io.weights import AdapterWeights, FileState, check_finite

if TYPE_CHECKING:
    from lorasmith.adapters.lora import LoRAConfig

__all__ = ["Conversion", "ConvertedLayer", "convert", "plain_lora", "with_padding"]


@dataclass(frozen=True)
class ConvertedLayer:
    """What converting did to one layer.

    Attributes:
        name: Name of the module.
        rank: Numerical rank of ΔW; ``None`` where the layer is large and only its leading
            singular vectors were computed.
        kept: Rank that the LoRA uses of it.
        change: ‖ΔW‖, Frobenius norm.
        error: ‖ΔW − ΔW_r‖ / ‖ΔW‖; 0 where ΔW is 0.
        weight_error: ‖ΔW − ΔW_r‖ / ‖W‖; ``None`` where W is not at hand.
        bias_error: ‖Δb‖ / ‖b‖ of the layer's bias, none of which LoRA can carry; 0 where
            there is no bias or it does not change.
    """

    name: str
    rank: int | None
    kept: int
    change: float
    error: float
    weight_error: float | None
    bias_error: float


@dataclass(frozen=True)
class Conversion:
    """A plain LoRA made of another adapter, and how far it is from it.

    Attributes:
        weights: The LoRA: ``conversion.weights.save(path)``, or :meth:`save`.
        source: Name of the variant that it was made of.
        layers: One record a layer.
    """

    weights: AdapterWeights
    source: str
    layers: tuple[ConvertedLayer, ...]

    @property
    def error(self) -> float:
        """√(Σ ‖ΔW − ΔW_r‖² / Σ ‖ΔW‖²) over all layers."""
        total = math.fsum(layer.change**2 for layer in self.layers)
        lost = math.fsum((layer.error * layer.change) ** 2 for layer in self.layers)
        return math.sqrt(lost / total) if total else 0.0

    @property
    def max_error(self) -> float:
        """The largest relative error of a layer."""
        return max((layer.error for layer in self.layers), default=0.0)

    @property
    def bias_error(self) -> float:
        """The largest relative change of a bias; all of it is lost."""
        return max((layer.bias_error for layer in self.layers), default=0.0)

    def save(self, path: str | os.PathLike[str], *, beside: bool = False) -> Path:
        """Writes the LoRA as a PEFT directory, see :meth:`AdapterWeights.save`."""
        return self.weights.save(path, beside=beside)

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "source": self.source,
            "relative_error": self.error,
            "max_relative_error": self.max_error,
            "bias_error": self.bias_error,
            "parameters": self.weights.num_parameters,
            "config": self.weights.config.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        kept = sorted({layer.kept for layer in self.layers})
        ranks = f"{kept[0]}" if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        middle = statistics.median(layer.error for layer in self.layers)
        bias = f"; biases change by up to {self.bias_error:.2e}, which is lost"
        return (
            f"{self.source} → lora of rank {ranks} on {len(self.layers)} layers: relative error "
            f"{self.error:.2e} in all, {middle:.2e} in the median layer, at most "
            f"{self.max_error:.2e}{bias if self.bias_error else ''}"
        )


def convert(
    adapter: Adapter | AdapterWeights | str | os.PathLike[str],
    to: LoRAConfig | None = None,
    *,
    energy: float | None = None,
    model: nn.Module | None = None,
    allow_base_mismatch: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Makes the plain LoRA that is nearest to an adapter, and says how near it is.

        made = ls.convert(adapter, ls.LoRAConfig(r=16))
        print(made)          # hra → lora of rank 16 on 14 layers: relative error …
        made.save("as-lora") # PEFT, vLLM, … load it

    Nothing is attached and nothing changed.

    Args:
        adapter: An attached adapter, one that has been read, a directory, or a hub id.
        to: The LoRA to make. ``r`` is the rank (``rank_pattern`` that of single layers);
            ``alpha`` and ``scaling`` set the factor s, by which the factors are divided;
            ``dropout`` is for those who train it further. ``targets`` and
            ``modules_to_save`` are those of the adapter, whatever it says. Where a layer's
            change has a lower rank than r, the rest of the factors is zero.
        energy: In place of a rank: keep on every layer as many singular values as make up
            this share of ‖ΔW‖², 0 < energy ≤ 1 (the relative error is then at most
            √(1 − energy)). With ``to`` given as well, ``to.r`` is the most.
        model: The base model. Needed where the change depends on W and ``adapter`` is not
            attached to it.
        allow_base_mismatch: Whether ``model`` may be another than the adapter was made for.
        progress: Called with (phase, layers done, layers in all).

    Raises:
        ConfigError: Neither ``to`` nor ``energy`` says the rank, or ``model`` is needed.
        FuseError: The adapter depends on its input, or is fused at the moment.
        AdapterFileError: Its files cannot be used, or do not fit ``model``.
    """
    config, most = _target(to, energy)
    source = _source(adapter, model, allow_base_mismatch)
    variant = source.weights.variant
    if not variant.fusable:
        raise FuseError(
            f"The variant {variant.name!r} cannot be converted into LoRA: what it does depends "
            "on its input, so that no change of the weights acts like it.",
            fix="keep it attached",
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    records = []
    with torch.no_grad():
        for name, spectrum, change in _changes(source, config, energy):
            rank = config.rank_of(name) if energy is None else spectrum.rank_for(energy, most)
            scaling = replace(config, r=rank, rank_pattern={}).scaling_of(name)
            if scaling == 0:
                raise ConfigError(
                    f"With an alpha of 0 a LoRA does nothing on {name}.",
                    expected="another alpha",
                    got=config.alpha_of(name),
                    key="alpha_pattern",
                )
            tensors[name] = spectrum.factors(rank, scaling)
            records.append(change.record(name, spectrum, rank, scaling, tensors[name]))
            if progress is not None:
                progress("converting", len(records), len(source.weights.modules))
    ranks = {n: t["A"].shape[0] for n, t in tensors.items()}
    config = plain_lora(config, ranks, source.weights.config.modules_to_save)
    made = Conversion(_assemble(config, tensors, source.weights), variant.name, tuple(records))
    if made.bias_error:
        count = sum(layer.bias_error > 0 for layer in records)
        warnings.warn(
            f"{variant.name} changes the biases of {count} layers, by up to "
            f"{made.bias_error:.2e} of their norm, which a plain LoRA cannot carry: it will act "
            "differently by that much.",
            UserWarning,
            stacklevel=2,
        )
    return made


def _target(to: LoRAConfig | None, energy: float | None) -> tuple[LoRAConfig, int | None]:
    """The configuration to fill in, and the highest rank that ``energy`` may ask for."""
    from lorasmith.adapters.lora import LoRAConfig

    share: object = energy
    if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
        raise ConfigError(
            "energy is not a share of ‖ΔW‖².",
            expected="0 < energy <= 1",
            got=repr(energy),
            key="energy",
        )
    if to is None:
        if energy is None:
            raise ConfigError(
                "Neither to nor energy says which rank the LoRA is to have.",
                expected="e.g. to=LoRAConfig(r=16) or energy=0.99",
                key="to",
            )
        return LoRAConfig(), None
    if type(to) is not LoRAConfig:
        raise ConfigError(
            "An adapter can be converted into plain LoRA only.",
            expected="a LoRAConfig",
            got=type(to).__name__,
            key="to",
        )
    return to, to.r


# Where the change comes from -------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """An adapter, and the base model underneath if it is at hand.

    Attributes:
        weights: The adapter as a value.
        modules: Module name → layer of the model and its sizes; empty without a model.
        states: Module name → the tensors of an attached adapter; empty for a file.
    """

    weights: AdapterWeights
    modules: Mapping[str, tuple[nn.Module, LayerInfo]]
    states: Mapping[str, LayerState]

    def state(self, name: str) -> LayerState:
        if name in self.states:
            return self.states[name]
        if name not in self.modules:
            return self.weights.state(name)
        info, state = self.modules[name][1], self.weights.state(name)
        if (state.info.d_in, state.info.d_out) == (info.d_in, info.d_out):
            return replace(state, info=info)
        # Sizes that the file does not tell come from the layer.
        new = self.weights.new_tensors(name, info)
        return replace(
            state, info=info, values={**state.values, **dict(new.trainable), **dict(new.frozen)}
        )


def _source(
    adapter: Adapter | AdapterWeights | str | os.PathLike[str],
    model: nn.Module | None,
    allow_base_mismatch: bool,
) -> _Source:
    if isinstance(adapter, Adapter):
        root = adapter.model
        if model is not None and unwrap(model) is not root:
            raise ConfigError(
                "The adapter is attached to another model.",
                fix="leave model out: an attached adapter brings its own",
                key="model",
            )
        fused = fused_name(root)
        if fused is not None:
            raise FuseError(
                f"The adapter {fused!r} is fused, so that the base weights are not at hand.",
                fix="unfuse(model) first",
            )
        parts = adapter.layers()
        modules = {n: (root.get_submodule(n), part.info) for n, part in parts.items()}
        return _Source(AdapterWeights.from_model(root, adapter.name), modules, parts)
    weights = adapter if isinstance(adapter, AdapterWeights) else read_adapter(adapter)
    if weights.unsupported is not None:
        raise AdapterFileError(
            weights.unsupported, file=weights.path and weights.path / peft.CONFIG
        )
    if model is None:
        if weights.unexpected:
            raise AdapterFileError(
                "The adapter holds tensors that it does not use and that would be lost.",
                file=weights.path,
                key=weights.unexpected[0],
                fix="attach it (lorasmith.load) and convert the handle",
            )
        return _Source(weights, {}, {})
    root = unwrap(model)
    check_base(root, weights, allow_base_mismatch)
    modules = {}
    for name in weights.modules:
        try:
            layer = root.get_submodule(name)
        except AttributeError:
            layer = None
        info = None if layer is None else describe(layer, name)
        if layer is None or info is None:
            raise AdapterFileError(
                "The adapter has tensors for a layer that the model does not have.",
                file=weights.path,
                key=name,
                got=type(root).__name__,
                fix="pass the model that it was made for",
            )
        weights.check_shapes(info)
        modules[name] = (layer, info)
    return _Source(weights, modules, {})


def _changes(
    source: _Source, config: LoRAConfig, energy: float | None
) -> Iterator[tuple[str, Spectrum, _Change]]:
    """(name, singular vectors of ΔW, ΔW) layer by layer; nothing of the last one is kept."""
    variant = source.weights.variant
    for name in source.weights.modules:
        state = source.state(name)
        layer, info = source.modules.get(name, (None, None))
        found = variant.factors(state)
        if found is not None and found.exact:
            for tensor in (found.A, found.B):
                check_finite(tensor, name, source.weights.path)
            product = Product.of(found)
            base = None if layer is None or info is None else _weight_norm(layer, info)
            yield name, product.spectrum(), _Change(product.distance, product.norm(), base, 0.0)
            continue
        if layer is None or info is None:
            raise ConfigError(
                f"What {variant.name} changes depends on the base weights.",
                expected="model=, the base model that the adapter was made for",
                got="model=None",
                fix="pass the base model, or an adapter that is attached to it",
                key="model",
            )
        yield name, *_dense(variant, state, layer, info, None if energy else config.rank_of(name))


def _weight_norm(layer: nn.Module, info: LayerInfo) -> float | None:
    """‖W‖, or ``None`` where W has no values or would have to be dequantised for it."""
    if info.kind == "opaque":
        return None
    weight = read_weight(layer, info)
    return None if weight.is_meta else norm(weight)


@dataclass(frozen=True)
class _Change:
    """ΔW of one layer, as far as the record of it needs it.

    Attributes:
        distance: (A, B, s) → ‖ΔW − s B A‖.
        norm: ‖ΔW‖.
        weight_norm: ‖W‖, or ``None``.
        bias_error: ‖Δb‖ / ‖b‖.
    """

    distance: Callable[[Tensor, Tensor, float], float]
    norm: float
    weight_norm: float | None
    bias_error: float

    def record(
        self,
        name: str,
        spectrum: Spectrum,
        rank: int,
        scaling: float,
        tensors: Mapping[str, Tensor],
    ) -> ConvertedLayer:
        lost = self.distance(tensors["A"], tensors["B"], scaling) if self.norm else 0.0
        base = self.weight_norm
        return ConvertedLayer(
            name,
            spectrum.rank,
            min(rank, spectrum.useful),
            self.norm,
            lost / self.norm if self.norm else 0.0,
            lost / base if base else None,
            self.bias_error,
        )


# Of other variants -----------------------------------------------------------------------------


def _dense(
    variant: Variant, state: LayerState, layer: nn.Module, info: LayerInfo, rank: int | None
) -> tuple[Spectrum, _Change]:
    """ΔW = effective weight − W, taken apart; all of it with ``rank=None``."""
    weight = wide(read_weight(layer, info))  # of a quantised layer dequantised
    if weight.is_meta:
        raise ConfigError("The base model has no values (it is on the meta device).", key=info.name)
    if isinstance(state, FileState):
        state = replace(state, values={n: t.to(weight) for n, t in state.values.items()})
    try:
        delta = variant.effective_weight(state, weight).detach() - weight
    except FuseError as error:
        raise FuseError(
            f"The adapter cannot be converted into LoRA. {error.what}",
            got=error.got,
            fix="keep it attached",
            key=info.name,
        ) from error
    if not bool(torch.isfinite(delta).all()):
        raise FuseError(
            f"What the adapter does to {info.name} is not finite.",
            fix="training has diverged; go back to an earlier checkpoint",
            key=info.name,
        )
    bias, bias_error = read_bias(layer), 0.0
    if bias is not None:
        bias = wide(bias)
        moved = norm(variant.effective_bias(state, bias).detach() - bias)
        bias_error = moved / (norm(bias) or 1.0)

    def distance(A: Tensor, B: Tensor, scaling: float) -> float:
        return norm(torch.addmm(delta, B.to(delta), A.to(delta), alpha=-scaling))

    return decompose(delta, rank), _Change(distance, norm(delta), norm(weight), bias_error)


# The result ------------------------------------------------------------------------------------


def plain_lora(
    to: LoRAConfig, ranks: Mapping[str, int], modules_to_save: Sequence[str] = ()
) -> LoRAConfig:
    """The configuration of a LoRA on exactly these layers.

    Args:
        to: What else it says; its ranks do not count.
        ranks: Name of the layer → its rank.
        modules_to_save: Modules that the adapter replaces as a whole.
    """
    ordered = Counter(ranks.values()).most_common()
    r = max(rank for rank, count in ordered if count == ordered[0][1])
    # The first pattern that matches wins, so that longer names stand in front.
    single = {n: ranks[n] for n in ranks if ranks[n] != r}
    # A name also matches as the end of a longer one, which then needs its own.
    rest = [n for n in ranks if n not in single]
    single |= {n: r for n in rest if first_matching_key(single, n) is not None}
    return replace(
        to,
        targets=tuple(ranks),
        exclude=(),
        layers=None,
        modules_to_save=modules_to_save,
        init="kaiming",  # how it would start anew
        r=r,
        rank_pattern={n: ranks[n] for n in sorted(single, key=lambda n: (-len(n), n))},
    )


def _assemble(
    config: LoRAConfig, tensors: Mapping[str, Mapping[str, Tensor]], source: AdapterWeights
) -> AdapterWeights:
    extras = {
        f"{module}.{leaf}": source.tensors[f"{peft.PREFIX}{module}.{leaf}"]
        for module, leaves in source.saved_modules.items()
        for leaf in leaves
    }
    padding = {key: source.tensors[f"{peft.PREFIX}{key}"] for key in source.padding}
    made = AdapterWeights.from_tensors(config, tensors, extras=extras, like=source)
    fields = dict(made.peft)
    narrowed = any(source.peft.get(k) for k in ("exclude_modules", "layers_to_transform"))
    if source.peft.get("target_modules") and not narrowed:
        fields["target_modules"] = source.peft["target_modules"]  # the same layers, in short
    if not padding and fields == made.peft:
        return made
    return with_padding(made, fields, padding)


def with_padding(
    made: AdapterWeights, fields: Mapping[str, Any], padding: Mapping[str, Tensor]
) -> AdapterWeights:
    """The same adapter with other fields of PEFT's, and with copies of base weights.

    Args:
        made: The adapter, which has none.
        fields: ``adapter_config.json``.
        padding: ``"<module>.<tensor>"`` → value, of weights of the base that PEFT saved along.
    """
    values = {key: made.tensors[key] for key in made.tensors}
    values |= {f"{peft.PREFIX}{key}": value for key, value in padding.items()}
    return AdapterWeights(
        made.config,
        fields,
        MemoryTensors(values),
        base=made.base,
        padding=tuple(padding),
        conv1d={n for n, info in made.layers.items() if info.kind == "conv1d"},
    )
