"""A new task that is trained inside the basis of a fleet.

Of each layer only the core is trained, between directions that stay as they are:

    ΔW = U M V        U [d_out, R'], V [R, d_in] from a ``SharedSubspace``, frozen

* joint basis: M [R', R] (``form="full"``) or its diagonal (``form="diagonal"``);
* Share basis: M = (m ℓᵀ) ⊗ I_r with loadings m and ℓ over the mean and the components
  (``form="loadings"``), 2 (K + 1) numbers a layer.

It starts at ΔW = 0 exactly, and not at a dead end: M = 0 has the gradient Uᵀ G Vᵀ, and with
m = 0 that of m is as large as ℓ makes it, which starts at the root of the mean square of the
fleet's own ℓ. The mathematics is that of the variant ``"subspace"``
(:mod:`lorasmith.adapters.subspace`); here the basis is put in at the start, and at the end the
core into the fleet.

    task = ls.SubspaceTrainer(model, "fleet/", "new-task")
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    ...                                    # any loop, HF Trainer, TRL
    ls.save(model, "new-task/")            # an adapter that PEFT loads
    task.finish().save("fleet/")           # and a member of the fleet

``extra`` new directions on either side (of the Share basis: components) are trained with the
core. They start orthogonal to the basis, and belong to this task: :meth:`SubspaceTrainer.finish`
appends them to the basis, where the cores of all other tasks are zero.

Deviations from vLoRA's trainer: base and basis cannot be trained, the start is zero, and new
directions change no other task. Limits: layers on which the fleet has no directions are left
out; the cores of the fleet's other members are not trained.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lorasmith.adapters.subspace import SubspaceConfig, start
from lorasmith.core.adapter import Adapter, attached, unwrap
from lorasmith.core.attach import check_free, put, trainable_copy
from lorasmith.core.config import Targets
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.quantized import refuse_gradless
from lorasmith.core.registry import get_variant
from lorasmith.core.state import LayerAdapter
from lorasmith.core.targets import candidates, find_modules, select
from lorasmith.core.variant import NewTensors
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.fleet.members import MemberRecord, check_id, open_members
from lorasmith.fleet.subspace import SharedSubspace
from lorasmith.io.fingerprint import fingerprint
from lorasmith.io.weights import AdapterWeights

__all__ = ["Form", "ParameterCount", "SubspaceTrainer"]

Form: TypeAlias = Literal["full", "diagonal", "loadings"]
#: Basis → forms of the core that can be put back into it; the first by default.
_FORMS: dict[str, tuple[Form, ...]] = {"joint": ("full", "diagonal"), "share": ("loadings",)}


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a task trains.

    Attributes:
        trained: In all.
        layers: Number of adapted layers.
        lora: What LoRA of rank ``lora_rank`` would train on the same layers, Σ r (d_in + d_out).
        lora_rank: 8 unless asked for another.
    """

    trained: int
    layers: int
    lora: int
    lora_rank: int

    @property
    def per_layer(self) -> float:
        """Trained numbers a layer, in the mean."""
        return self.trained / self.layers

    @property
    def ratio(self) -> float:
        """LoRA's numbers for each that is trained."""
        return self.lora / self.trained

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON can hold."""
        return {
            "trained": self.trained,
            "layers": self.layers,
            "per_layer": self.per_layer,
            "lora": self.lora,
            "lora_rank": self.lora_rank,
            "ratio": self.ratio,
        }


class SubspaceTrainer:
    """Attaches an adapter that is trained inside a fleet's basis, and adds it to the fleet.

    It has no loop of its own: train :meth:`parameters`, or the model with whatever trains its
    parameters that require gradients.

    Attributes:
        fleet: The fleet; unchanged until :meth:`finish`.
        task: The id that the task will have there.
        adapter: The adapter on the model, to save, load and use like any other.

    Args:
        model: The fleet's base model.
        fleet: A ``SharedSubspace``, or a directory of one.
        task: Id of the new task.
        form: ``"full"`` or ``"diagonal"`` for a joint basis, ``"loadings"`` for Share; by
            default the first that goes with the basis.
        extra: Number of new directions on either side, of this task only; for the Share basis
            of new components.
        modules: Which of the fleet's layers, in the forms of ``targets``; all by default.
        exclude: The same forms; what they match is left out.
        layers: Indices of the transformer blocks; all by default.
        modules_to_save: Modules to train as a whole beside it.
        dropout: Probability with which an element of the input is zeroed during training.
        name: Name of the adapter on the model.
        allow_base_mismatch: Whether the fleet may be of another base model than this seems to
            be. Sizes of layers must agree all the same.

    Raises:
        ConfigError: An argument cannot be used: the id is taken, the form does not go with the
            basis, ``extra`` is more than there are directions, no layer is left.
        BaseMismatchError: The fleet is of another base model.
        AttachError: The name is taken, or the model's state does not allow it. With all errors
            the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        fleet: SharedSubspace | str | os.PathLike[str],
        task: str,
        *,
        form: Form | None = None,
        extra: int = 0,
        modules: Targets | None = None,
        exclude: Targets = (),
        layers: Sequence[int] | None = None,
        modules_to_save: Sequence[str] = (),
        dropout: float = 0.0,
        name: str = "default",
        allow_base_mismatch: bool = False,
    ) -> None:
        if not isinstance(fleet, SharedSubspace):
            fleet = SharedSubspace.load(fleet)
        self.fleet, self.task = fleet, task
        self._check_task()
        root = unwrap(model)
        check_free(root, name)
        refuse_gradless(root)
        _check_base(root, fleet, allow_base_mismatch)
        wanted = SubspaceConfig(
            form=_form(fleet, form),
            width=fleet.width,
            extra=extra,
            dropout=dropout,
            init="fleet",
            targets="all-linear" if modules is None else modules,
            exclude=exclude,
            layers=layers,
            modules_to_save=modules_to_save,
        )
        infos = _layers(root, fleet, wanted, every=modules is None)
        config, parts = _parts(root, fleet, wanted, infos)
        with torch.inference_mode(False), torch.no_grad():
            copies = {n: trainable_copy(m) for n, m in find_modules(root, wanted.modules_to_save)}
        self.adapter: Adapter = put(root, name, config, parts, copies, trainable=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained; neither base nor basis is among it."""
        return self.adapter.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names, ``"<module>.<tensor>"``."""
        return self.adapter.named_parameters()

    def parameter_count(self, lora_rank: int = 8) -> ParameterCount:
        """How many numbers are trained, beside LoRA on the same layers."""
        infos = [part.info for part in self.adapter.layers().values()]
        lora = sum(lora_rank * (i.d_in + i.d_out) for i in infos)
        return ParameterCount(self.adapter.num_parameters(), len(infos), lora, lora_rank)

    def finish(self) -> SharedSubspace:
        """Adds the task to the fleet as it is trained now, and gives the fleet back.

        New directions are appended to the basis; what other tasks do does not change. The
        adapter stays on the model. What rounding loses, where the fleet is quantised, is
        measured and stands in ``fleet.errors``.

        Raises:
            ConfigError: The fleet has come to hold the id, or its basis is no longer the one
                that was trained in (``absorb``, ``quantize``). The fleet is as it was.
            AttachError: The adapter is no longer attached.
        """
        self._check_task()
        parts = self.adapter.layers()
        weights = AdapterWeights.from_model(self.adapter.model, self.adapter.name)
        (member,) = open_members({self.task: weights}, allow_base_mismatch=True)
        record = MemberRecord.of(member)
        rest = {key: member.rest[key] for key in member.rest}
        places = {m: self._place(m, part) for m, part in parts.items()}
        cores = {m: _core(part, *places[m]) for m, part in parts.items()}
        for module, part in parts.items():
            if "A" in part:
                self.fleet.extend(module, _host(part["B"]), _host(part["A"]))
        self.fleet.insert_core(self.task, cores, record, rest)
        with warnings.catch_warnings():
            # No budget was asked for; whoever reads the errors is told all the same.
            warnings.simplefilter("ignore")
            self.fleet.measure(weights, self.task, allow_base_mismatch=True)
        return self.fleet

    def _check_task(self) -> None:
        check_id(self.task)
        if self.task in self.fleet:
            raise ConfigError(
                "The fleet holds a task of that id already.",
                got=repr(self.task),
                fix="choose another id, or remove that one first",
                key="task",
            )

    def _place(self, module: str, part: LayerAdapter) -> tuple[int, int]:
        """(R', R) of the fleet's layer now, of which the trained directions come first."""
        if module not in self.fleet.modules:
            raise _moved(module)
        up, down = self.fleet.up(module), self.fleet.down(module)
        U, V = _host(part["U"]), _host(part["V"])
        if not (torch.equal(up[:, : U.shape[1]], U) and torch.equal(down[: V.shape[0]], V)):
            raise _moved(module)
        return up.shape[1], down.shape[0]

    def __repr__(self) -> str:
        if self.adapter.name not in attached(self.adapter.model):
            return f"SubspaceTrainer({self.task!r}, detached)"
        count = self.parameter_count()
        return (
            f"SubspaceTrainer({self.task!r}, {count.layers} layers, {count.trained:,} parameters, "
            f"LoRA of rank {count.lora_rank} {count.lora:,})"
        )


def _form(fleet: SharedSubspace, form: Form | None) -> Form:
    able = _FORMS[fleet.basis]
    if form is not None and form not in able:
        raise ConfigError(
            f"A core of that form is nothing that the {fleet.basis} basis holds.",
            expected=" or ".join(able),
            got=repr(form),
            key="form",
        )
    return able[0] if form is None else form


def _check_base(root: nn.Module, fleet: SharedSubspace, allow: bool) -> None:
    stored = fleet.base.fingerprint
    if stored is None or allow:
        return
    difference = stored.compare(fingerprint(root, names=list(stored.sketch)))
    if not difference.same:
        raise BaseMismatchError(
            f"The fleet was made for another base model: {difference}.",
            expected=fleet.base.name,
            got=type(root).__name__,
            fix="load the right base model, or pass allow_base_mismatch=True",
        )


def _layers(
    root: nn.Module, fleet: SharedSubspace, config: SubspaceConfig, *, every: bool
) -> list[LayerInfo]:
    """The layers to adapt.

    Args:
        root: The model.
        fleet: The fleet.
        config: With the targets.
        every: Whether no targets were given: all layers of the fleet, heads among them.
    """
    known = {c.info.name: c.info for c in candidates(root)}
    for module in fleet.modules:
        info = known.get(module)
        sizes = (fleet.up(module).shape[0], fleet.down(module).shape[1])
        if info is None or (info.d_out, info.d_in) != sizes:
            raise BaseMismatchError(
                "The fleet has a layer that the model does not have, or has with other sizes.",
                key=module,
                expected=f"{sizes[1]} → {sizes[0]}",
                got="no such layer" if info is None else f"{info.d_in} → {info.d_out}",
                fix="load the base model of the fleet",
            )
    names = set(fleet.modules)
    if not every or config.exclude or config.layers is not None:
        names &= {c.info.name for c in select(root, config)}
    found = [
        info
        for name, info in known.items()
        if name in names and fleet.up(name).shape[1] and fleet.down(name).shape[0]
    ]
    if not found:
        raise ConfigError(
            "None of the layers asked for has directions in the fleet.",
            expected=", ".join(fleet.modules[:4]),
            got=config.targets,
            key="modules",
        )
    return found


def _parts(
    root: nn.Module, fleet: SharedSubspace, config: SubspaceConfig, infos: Sequence[LayerInfo]
) -> tuple[SubspaceConfig, dict[str, LayerAdapter]]:
    """The whole configuration, and the tensors of each layer."""
    from dataclasses import replace

    width, diagonal = config.width, config.form == "diagonal"
    new: dict[str, NewTensors] = {}
    inner: dict[str, int] = {}
    outer: dict[str, int] = {}
    for info in infos:
        with torch.inference_mode(False), torch.no_grad():
            U, V = fleet.up(info.name), fleet.down(info.name)
            if diagonal:
                size = min(U.shape[1], V.shape[0])
                U, V = U[:, :size], V[:size]
            right = _usual_right(fleet, info.name) if config.form == "loadings" else None
            made = start(config.form, U, V, width=width, extra=config.extra, right=right)
            device = device_of(root.get_submodule(info.name))
            new[info.name] = NewTensors(
                {n: t.to(device) for n, t in made.trainable.items()},
                {n: t.to(device) for n, t in made.frozen.items()},
            )
        inner[info.name], outer[info.name] = V.shape[0] // width, U.shape[1] // width
    r, r_out = (Counter(n.values()).most_common(1)[0][0] for n in (inner, outer))
    config = replace(
        config,
        # As PEFT would read them: the very layers.
        targets=tuple(i.name for i in infos),
        exclude=(),
        layers=None,
        r=r,
        r_out=None if diagonal else r_out,
        rank_pattern={m: n for m, n in inner.items() if n != r},
        out_pattern={} if diagonal else {m: n for m, n in outer.items() if n != r_out},
    )
    variant = get_variant("subspace")
    return config, {i.name: LayerAdapter(variant, config, i, new[i.name]) for i in infos}


def _usual_right(fleet: SharedSubspace, module: str) -> Tensor:
    """√ mean ℓ² [K + 1] over the fleet's members on a layer; 1 where that is nothing."""
    width = fleet.width
    squares = []
    for task in fleet.ids:
        right = fleet.factored_core(task, module)[1]
        if len(right):
            squares.append(right[0, ::width].square())
    if not squares or not bool(torch.stack(squares).any()):
        return torch.ones(fleet.down(module).shape[0] // width)
    return torch.stack(squares).mean(0).sqrt()


def _core(part: LayerAdapter, outer: int, inner: int) -> Tensor | tuple[Tensor, Tensor]:
    """What ``insert_core`` takes: of the fleet's basis as it is, and new directions after it.

    Args:
        part: The trained layer.
        outer: R' of the fleet now.
        inner: R of the fleet now.
    """
    config = part.config
    assert isinstance(config, SubspaceConfig)
    e, width = config.extra, config.width
    if config.form == "loadings":
        return (
            _spread(_host(part["left"]), outer // width + e, e),
            _spread(_host(part["right"]), inner // width + e, e),
        )
    core = _host(part["core"])
    core = torch.diag(core) if config.form == "diagonal" else core
    core = _spread(core.mT, outer + e, e).mT
    return _spread(core, inner + e, e)


def _spread(values: Tensor, size: int, last: int) -> Tensor:
    """Zeros between the first values and the ``last`` ones, up to ``size`` along the last axis."""
    first = values.shape[-1] - last
    gap = values.new_zeros(*values.shape[:-1], size - values.shape[-1])
    return torch.cat((values[..., :first], gap, values[..., first:]), dim=-1)


def _host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32)


def _moved(module: str) -> ConfigError:
    return ConfigError(
        "The basis of the fleet is no longer the one in which the task was trained.",
        key=module,
        fix="add the trained adapter to it like any other: fleet.add(path, id)",
    )
