"""What a variant is: the mathematics of one adapter family, without its bookkeeping.

A variant says which tensors it adds to a layer, what they do to the layer's input or
output, what weight the layer would need to act the same without them, and how PEFT
names them in a file. Everything else (targets, hooks, dtypes, fusing, saving, strict
loading) is written once in ``core`` and ``io`` and driven by these declarations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from lorasmith.core.config import AdapterConfig
from lorasmith.core.layers import LayerInfo, read_weight, weight_version
from lorasmith.core.lowrank import no_autocast
from lorasmith.errors import FuseError

__all__ = [
    "Affine",
    "BaseLayer",
    "Carry",
    "Factors",
    "LayerState",
    "NewTensors",
    "TensorSpec",
    "Variant",
    "WeightUse",
]

#: When a variant must know W: never, when it is made, or whenever it runs.
WeightUse = Literal["never", "start", "always"]

#: What ``before`` hands to ``after`` of the same call.
Carry = Any


@dataclass(frozen=True)
class NewTensors:
    """The tensors that a variant adds to one layer.

    Attributes:
        trainable: Name → initial value. Kept in float32 whatever the base's dtype.
        frozen: Name → value of what is needed but not trained (e.g. the part of W that
            PiSSA takes over); also saved.
    """

    trainable: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor of a variant stands in a PEFT file.

    Attributes:
        key: What follows the module name, e.g. ``"lora_A.weight"``.
        shape: Its shape in the file.
    """

    key: str
    shape: tuple[int, ...]


class LayerState(Protocol):
    """One adapter's tensors on one layer, attached to a model or read from a file."""

    @property
    def config(self) -> AdapterConfig: ...

    @property
    def info(self) -> LayerInfo: ...

    @property
    def training(self) -> bool: ...

    @property
    def constants(self) -> Mapping[str, Any]: ...

    def __getitem__(self, tensor: str) -> Tensor: ...

    def __contains__(self, tensor: object) -> bool: ...


@dataclass(frozen=True)
class BaseLayer:
    """The layer that an adapter sits on, as far as a variant may see it.

    Attributes:
        module: The layer.
        info: Its name and sizes.
        statistics: What calibration has found out about the layer, by the names that
            :meth:`Variant.statistics` asked for. Empty outside :meth:`Variant.new_tensors`
            and :meth:`Variant.adjust`.
    """

    module: nn.Module
    info: LayerInfo
    statistics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in], detached: a view in the stored dtype, of a quantised layer a copy."""
        return read_weight(self.module, self.info)

    @property
    def weight_version(self) -> tuple[int, ...]:
        """Changes whenever W is replaced or written: a key for what is kept of it."""
        return weight_version(self.module, self.info)

    @property
    def bias(self) -> Tensor | None:
        """b [d_out], or ``None``."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class Factors:
    """The low-rank view of an adapter on one layer, whoever made it.

    ΔW = scaling · B A, or scaling · (B A − B0 A0) where an initialisation took B0 A0 out
    of the base weight.

    Attributes:
        A: [r, d_in]; the live tensor, not a copy.
        B: [d_out, r]; the live tensor.
        scaling: The factor on B A.
        A0, B0: The frozen part, of the same shapes as A and B, or ``None``.
        exact: Whether W + ΔW is all that the adapter does. DoRA, for one, rescales the
            rows of W + ΔW afterwards.
        base: The layer underneath, where there is a model.
    """

    A: Tensor
    B: Tensor
    scaling: float
    A0: Tensor | None = None
    B0: Tensor | None = None
    exact: bool = True
    base: BaseLayer | None = None

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """One pair of factors for the whole update: rank 2r if there is a frozen part."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat((self.A, self.A0)), torch.cat((self.B, -self.B0), dim=1)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW [d_out, d_in], computed in ``dtype`` (default: that of A)."""
        a, b = (t.detach().to(dtype or self.A.dtype) for t in self.stacked())
        with no_autocast(a):
            return torch.mm(b * self.scaling, a)


@dataclass(frozen=True)
class Affine:
    """What one adapter makes of a layer, where it has this form.

        y = gain ∘ (base(input_gain ∘ x) + scaling · B A x) + shift

    Adapters that have it act side by side in one pass: stacked in one product for the rows
    of a batch, added up for a mix. What is ``None`` does nothing. An adapter with an
    ``input_gain`` has no A and B.

    Attributes:
        A: [r, d_in].
        B: [d_out, r].
        scaling: The factor on B A.
        input_gain: [d_in].
        gain: [d_out].
        shift: [d_out].
    """

    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    input_gain: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None


class Variant(ABC):
    """Base class of the adapter families; stateless, one instance is shared by all.

    A subclass fills in the class attributes and the abstract methods. ``before`` and
    ``after`` run on every forward: ``before`` on the layer's input, ``after`` on its
    output.
    """

    #: Name in the registry, in configurations and on the command line.
    name: ClassVar[str]
    #: The configuration class; its ``variant`` attribute equals ``name``.
    config_class: ClassVar[type[AdapterConfig]]
    #: Whether the base layer must see another input than it would alone. If not,
    #: ``before`` may be run after the base layer, which is what happens where no
    #: gradient is needed and under ``torch.compile``.
    transforms_input: ClassVar[bool] = False
    #: PEFT's ``peft_type`` in files; a name of our own where PEFT has no such variant.
    peft_type: ClassVar[str]
    #: The fields that PEFT's configuration of that type may have beyond those of all
    #: types, for the warning about unknown ones; empty where PEFT has no such variant.
    peft_fields: ClassVar[frozenset[str]] = frozenset()
    #: What kind of change it makes, for lists: "low-rank", "gain", "rotation", ….
    family: ClassVar[str] = "other"
    #: The adapted layer in one line, for lists: ``"y = W x + s B A x"``.
    formula: ClassVar[str] = ""
    #: Whether there is a weight that acts like the adapted layer.
    fusable: ClassVar[bool] = True
    #: The tensors that LoRA+ trains faster (those on the output's side, which start at 0).
    faster: ClassVar[tuple[str, ...]] = ()

    def weight_use(self, config: Any) -> WeightUse:
        """When the variant must know W, as it is configured.

        Quantised layers do not give W away for nothing: they are refused unless the answer
        is ``"never"`` or the user asked for dequantising.
        """
        return "never"

    def statistics(self, config: Any) -> frozenset[str]:
        """Which statistics of calibration data it needs to start: see ``core.calibration``."""
        return frozenset()

    def corrects(self, config: Any) -> bool:
        """Whether it starts by correcting quantised layers, from their original weights.

        The statistics of such a layer then have ``"original"``, see ``core.originals``.
        """
        return False

    def adjust(self, config: Any, bases: Sequence[BaseLayer]) -> Any:
        """The configuration to use on these layers: e.g. with ranks chosen by calibration."""
        return config

    def shared_tensors(self, config: Any, bases: Sequence[BaseLayer]) -> dict[str, Tensor]:
        """Frozen tensors that all layers of one adapter share: name → value.

        Every layer's state gives them by name like its own. Without a model, ``bases`` know
        their sizes alone; what is not in files (:meth:`shared_specs`) must follow from those
        and the configuration.
        """
        return {}

    @abstractmethod
    def new_tensors(self, base: BaseLayer, config: Any) -> NewTensors:
        """The tensors for one layer, such that the adapted layer equals the base layer.

        Args:
            base: The layer. Its weight may only be read.
            config: The variant's configuration.
        """

    def constants(self, config: Any, info: LayerInfo) -> dict[str, Any]:
        """What the configuration says of one layer, looked up once: ``state.constants``.

        To match patterns on every call would be slow, and ``torch.compile`` cannot follow
        a regular expression.
        """
        return {}

    def before(self, state: LayerState, x: Tensor, base: BaseLayer) -> tuple[Tensor, Carry]:
        """Acts on the layer's input x [..., d_in]; gives the new input and the carry."""
        return x, None

    def after(self, state: LayerState, y: Tensor, carry: Carry, base: BaseLayer) -> Tensor:
        """Acts on the layer's output y [..., d_out].

        ``y`` may be overwritten only through ``core.lowrank``, which knows when that is
        safe.
        """
        return y

    @abstractmethod
    def effective_weight(self, state: LayerState, weight: Tensor) -> Tensor:
        """The weight [d_out, d_in] with which the bare layer acts like the adapted one.

        Args:
            state: The adapter's tensors on the layer.
            weight: W [d_out, d_in] in the dtype in which to compute; must not be
                modified.

        Raises:
            FuseError: If the variant depends on its input and cannot be fused.
        """

    def effective_bias(self, state: LayerState, bias: Tensor) -> Tensor:
        """The bias [d_out] that goes with :meth:`effective_weight`. Default: unchanged."""
        return bias

    def factors(self, state: LayerState) -> Factors | None:
        """The low-rank factors, or ``None`` where the variant has none."""
        return None

    def affine(self, state: LayerState, base: BaseLayer) -> Affine | None:
        """The adapter on one layer as an :class:`Affine`, or ``None`` where it has no such form.

        Only for speed: without it ``before`` and ``after`` run on each adapter's own rows. By
        default it follows from exact :meth:`factors`. Gradients must reach the trainable
        tensors through it; where dropout acts there is none.
        """
        if state.training and getattr(state.config, "dropout", False):
            return None
        factors = self.factors(state)
        if factors is None or not factors.exact:
            return None
        A, B = factors.stacked()
        return Affine(A, B, factors.scaling)

    # -- files -----------------------------------------------------------------------

    @abstractmethod
    def to_peft(self, config: Any, modules: Mapping[str, LayerInfo]) -> dict[str, Any]:
        """The fields of PEFT's ``adapter_config.json`` that are the variant's own.

        Target modules, base model, task type and the like are added by ``io``.
        """

    @abstractmethod
    def from_peft(self, fields: Mapping[str, Any], common: Mapping[str, Any]) -> Any | None:
        """The configuration that PEFT's ``fields`` describe, or ``None`` if not ours.

        Args:
            fields: The parsed ``adapter_config.json``.
            common: Our fields ``targets``, ``exclude``, ``layers`` and
                ``modules_to_save``, already translated.

        Raises:
            ConfigError: If the file is this variant's but asks for what we do not have.
        """

    def fields_from_tensors(
        self, names: Collection[str], shape: Callable[[str], tuple[int, ...]]
    ) -> dict[str, Any]:
        """What the tensors of a file tell beyond PEFT's fields, for :meth:`from_peft`.

        For variants that write a type that PEFT knows with tensors of their own beside it. All
        variants see the fields that any of them adds.

        Args:
            names: Names in the file.
            shape: Gives the shape of one.
        """
        return {}

    @abstractmethod
    def tensor_specs(self, config: Any, info: LayerInfo) -> dict[str, TensorSpec]:
        """Tensor name → its place in a PEFT file, for one layer."""

    def shared_specs(self, config: Any, infos: Sequence[LayerInfo]) -> dict[str, TensorSpec]:
        """Name → place in a file of all that the layers share; empty if files do not hold it.

        Where it is empty, loading asks :meth:`shared_tensors` once more.

        Args:
            config: The variant's configuration.
            infos: All layers of the adapter; none where only the keys are wanted. Sizes that
                a file does not tell are 0, and so must be what follows from them.

        Returns:
            The key is the whole name in the file, e.g. ``"base_model.vera_A"``. A size of 0
            stands for any.
        """
        return {}

    @abstractmethod
    def sizes_from_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(d_in, d_out) of a layer, from its tensors in a file; 0 where they do not tell.

        Args:
            shapes: PEFT key (without the module name) → shape.
        """

    def layer_sizes(self, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """:meth:`sizes_from_file` for variants that must know the configuration to tell."""
        return self.sizes_from_file(shapes)

    def sizes_from_tensors(
        self, config: Any, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        """(d_in, d_out) of a layer, from its tensors by the variant's own names.

        Right as it stands where files hold them in the same shapes; a ``KeyError``,
        ``IndexError`` or ``ValueError`` if they do not tell.

        Args:
            config: The variant's configuration.
            shapes: Tensor name → shape.
        """
        specs = self.tensor_specs(config, LayerInfo("", 1, 1, "linear", False, False))
        return self.layer_sizes(config, {s.key: shapes[n] for n, s in specs.items()})

    def file_config(self, config: Any, frozen: Collection[str]) -> Any:
        """The configuration that describes the tensors as they stand in a file.

        ``to_peft`` and ``tensor_specs`` are asked about this one. It differs from
        ``config`` only where frozen tensors must be folded into what PEFT knows.

        Args:
            config: The adapter's configuration.
            frozen: Names of the frozen tensors that each layer has.
        """
        return config

    def to_file(self, state: LayerState) -> dict[str, Tensor]:
        """PEFT key (without the module name) → tensor, ready to be written."""
        specs = self.tensor_specs(state.config, state.info)
        return {spec.key: state[n].reshape(spec.shape) for n, spec in specs.items()}

    def from_file(self, config: Any, info: LayerInfo, tensors: Mapping[str, Tensor]) -> NewTensors:
        """The inverse of :meth:`to_file`: what :meth:`shapes` does not name is frozen.

        Args:
            config: The adapter's own configuration, not :meth:`file_config`.
            info: The layer.
            tensors: PEFT key → tensor, with exactly the keys and shapes of
                ``tensor_specs(file_config)``.
        """
        specs = self.tensor_specs(config, info)
        shapes = self.shapes(config, info)
        found = {n: tensors[s.key].reshape(shapes.get(n, s.shape)) for n, s in specs.items()}
        frozen = {n: found.pop(n) for n in specs if n not in shapes}
        return NewTensors(found, frozen)

    @abstractmethod
    def shapes(self, config: Any, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        """Name → shape of the trainable tensors for one layer, from its sizes alone."""


def cannot_fuse(variant: str, why: str) -> FuseError:
    """The error of a variant that has no effective weight."""
    return FuseError(
        f"The variant {variant!r} cannot be fused into the base weights: {why}.",
        fix="keep it attached, or convert it to LoRA",
    )
