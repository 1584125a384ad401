"""A fleet at work: one base model, a task of its own for each row of a batch.

    served = MultiTaskModel(model, "fleet/", budget_bytes=2**29)
    served.generate(batch, tasks=["french", "dates", None], max_new_tokens=32)
    with served.use({"french": 0.5, "dates": 0.5}):
        model(**batch)

Tasks act straight from the shared basis (:mod:`lorasmith.fleet.serving` has the formulas): no
ΔW and no factors of a task are ever formed, V x is computed once for the batch, and only the
small cores differ by row. The fleet is attached to the model as one adapter through the core's
own hooks, so that devices, copies, fusing, ``torch.compile`` and quantised bases are as with
every other adapter, and ``detach`` gives the base model back bit for bit.

**Switching** costs what the cores of the tasks take: nothing of the size of a weight is read,
written or made. The exception is the first use of a DoRA, whose row norms ‖W + ΔW‖ are computed
once and kept with its cores.

**Memory**: the basis (in ``dtype``); the fleet as it is packed; cores and residuals that are
unpacked, at most ``budget_bytes`` (:mod:`lorasmith.fleet.resident`); and stacked copies of what
acts at the moment.

**modules_to_save**: served by a copy of the module for each task that acts, by row. The copies
are made when their task acts and go when it does not. A row may not blend such a task with
others (one blend for all rows may). **Embedding** adapters are refused, with the reason.

Rows: the first dimension of what every adapted layer sees must be the rows of the batch, each
perhaps repeated (beams). Mixtures of experts reorder tokens; there the rows would be mistaken,
and only one choice for the whole batch is right.

Not safe for several threads at a time on one model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from types import EllipsisType, TracebackType
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from lorasmith.core import fusing, hooks
from lorasmith.core.adapter import activate, attached, state_of, unwrap
from lorasmith.core.attach import check_free, put, trainable_copy
from lorasmith.core.attach import detach as core_detach
from lorasmith.core.layers import device_of, read_bias, read_weight, weight_version
from lorasmith.core.mixing import Mix, Rows, SavedPlan, describe, plan_of
from lorasmith.core.state import SAVED, SavedModule, slot_of
from lorasmith.core.targets import Candidate, candidates, find_modules
from lorasmith.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    TargetError,
    UnsupportedFeatureError,
)
from lorasmith.fleet import store
from lorasmith.fleet.codes import ABSENT
from lorasmith.fleet.members import MemberRecord, Source, unknown_id
from lorasmith.fleet.resident import Pieces, Resident, ResidentStats
from lorasmith.fleet.serving import (
    Combination,
    FleetConfig,
    FleetLayer,
    Piece,
    combine,
    gain_of,
)
from lorasmith.fleet.subspace import BudgetWarning, SharedSubspace
from lorasmith.io import peft
from lorasmith.io.fingerprint import fingerprint
from lorasmith.io.weights import AdapterWeights

__all__ = ["MultiTaskModel", "ServingStats", "TaskChoice"]

#: What one row does: a task, ``None`` for the base model, or task → weight.
RowChoice: TypeAlias = "str | Mapping[str, float] | None"
#: The same for all rows, or one for each.
TaskChoice: TypeAlias = "RowChoice | Sequence[RowChoice]"

_MAGNITUDE = "lora_magnitude_vector"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ServingStats:
    """Where the bytes are.

    Attributes:
        tasks: Number of tasks.
        basis: Bytes of U and V on the model.
        packed: Bytes of the fleet as it is held, basis included.
        acting: Bytes of what acts at the moment.
        resident: The unpacked tasks.
    """

    tasks: int
    basis: int
    packed: int
    acting: int
    resident: ResidentStats

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {**asdict(self), "resident": self.resident.to_dict()}


@dataclass(frozen=True)
class _Selection:
    """What acts: a combination for each row, or a single one for everything."""

    rows: tuple[Combination, ...]
    single: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for c in self.rows for t, _ in c))

    def __str__(self) -> str:
        return ", ".join(describe(_row_plan(c)) for c in self.rows)


_BASE = _Selection(((),), True)


class _Use:
    """What :meth:`MultiTaskModel.use` returns: a context manager that may be ignored."""

    def __init__(self, served: MultiTaskModel, previous: _Selection) -> None:
        self._served = served
        self._previous = previous

    def __enter__(self) -> MultiTaskModel:
        return self._served

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._served.attached and self._served.fused is None:
            self._served._act(self._previous)


class MultiTaskModel:
    """A model that serves all tasks of a fleet; see the module.

    Args:
        model: A Transformers model, or any module with linear-like layers (GPT-2's ``Conv1D``
            and quantised layers included).
        fleet: A :class:`~lorasmith.fleet.subspace.SharedSubspace`, or a directory saved by it;
            or adapters (a list of paths or ``AdapterWeights``, or a mapping of ids to them), of
            which a joint basis is made that truncates nothing. That is small for a few only.
        budget_bytes: Bytes that unpacked tasks may take; ``None`` for any number.
        dtype: In which basis and cores are kept and multiplied; by default the model's.
        name: Under which the fleet is attached.
        allow_base_mismatch: Whether to serve a fleet that was made for another base model, as
            its fingerprint tells. Layers must have the same sizes all the same.

    Raises:
        TargetError: The model lacks layers that the fleet adapts.
        BaseMismatchError: It is another base model.
        UnsupportedFeatureError: A member cannot be served.
        AttachError: The name is taken, or the model's state does not allow it.
    """

    def __init__(
        self,
        model: nn.Module,
        fleet: SharedSubspace | str | os.PathLike[str] | Sequence[Source] | Mapping[str, Source],
        *,
        budget_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        name: str = "fleet",
        allow_base_mismatch: bool = False,
    ) -> None:
        self.model = model
        self.fleet = _open(fleet, allow_base_mismatch)
        self._root = unwrap(model)
        self._name = name
        check_free(self._root, name)
        dtype = _dtype(self._root, dtype)
        chosen = _targets(self._root, self.fleet)
        _check_base(self._root, self.fleet, allow_base_mismatch)
        self._copied = {
            task: found
            for task in self.fleet.ids
            if (found := _copied_modules(self._root, task, self.fleet.record(task)))
        }
        self._resident = Resident(self._unpack, budget_bytes)
        self._modules = {c.info.name: c.module for c in chosen}
        with torch.inference_mode(False), torch.no_grad():
            self._layers = {}
            for c in chosen:
                where, module = device_of(c.module), c.info.name
                up, down = self.fleet.up(module).to(where), self.fleet.down(module).to(where)
                self._layers[module] = FleetLayer(c.info, up, down, dtype)
        config = FleetConfig(targets=tuple(self._layers))
        put(self._root, name, config, self._layers, {}, trainable=False)
        self._selection = _BASE

    def __repr__(self) -> str:
        return (
            f"MultiTaskModel({len(self.tasks)} tasks, {len(self._layers)} layers, "
            f"acting: {self._selection})"
        )

    # -- choosing ----------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Ids of the tasks."""
        return self.fleet.ids

    @property
    def attached(self) -> bool:
        """Whether the fleet is on the model."""
        return self._name in attached(self._root)

    @property
    def fused(self) -> str | None:
        """What is fused into the base weights, in words, or ``None``."""
        if not self.attached or fusing.fused_plan(self._root) != self._name:
            return None
        return str(self._selection)

    @property
    def active(self) -> RowChoice | list[RowChoice]:
        """What acts, in the form that :meth:`use` takes."""
        rows = [_row(c) for c in self._selection.rows]
        return rows[0] if self._selection.single else rows

    def use(self, choice: TaskChoice) -> _Use:
        """Says which tasks act from now on; as a context manager, until its end.

        Args:
            choice: A task; ``None`` for the base model; {task: weight} for a blend, linear in
                what each task does to a layer; or a list of these, one for each row.

        Raises:
            UnknownNameError: The fleet has no such task.
            ConfigError: It is none of these, a weight is not a finite number, or a row blends a
                task that has whole modules of its own.
            AttachError: Something else is fused into the base weights, or the fleet has been
                detached.
        """
        wanted, previous = self._checked(choice), self._selection
        fused = fusing.fused_name(self._root)
        if fused is not None and (self.fused is None or wanted != previous):
            raise AttachError(
                f"{self.fused or fused} is fused into the base weights, so nothing else can act.",
                fix="unfuse() first",
            )
        if fused is None:
            self._act(wanted)
        return _Use(self, previous)

    def clear(self) -> None:
        """Lets the base model act alone."""
        self.use(None)

    def _checked(self, choice: TaskChoice) -> _Selection:
        if not self.attached:
            raise AttachError("The fleet has been detached from the model.", fix="make a new one")
        wanted = _selection(choice)
        known = frozenset(self.fleet.ids)
        for task in wanted.tasks:
            if task not in known:
                raise unknown_id(f"The fleet has no task {task!r}.", task, self.tasks, key="tasks")
        if not wanted.single:
            for combination in wanted.rows:
                copied = [t for t, _ in combination if t in self._copied]
                if copied and _plain(combination) is None:
                    raise ConfigError(
                        f"A row blends {copied[0]!r}, which has whole modules of its own "
                        "(modules_to_save); by row these act alone.",
                        expected="the task alone, or one blend for all rows",
                        got=describe(_row_plan(combination)),
                        key="tasks",
                    )
        return wanted

    def _act(self, wanted: _Selection) -> None:
        """Makes a selection act; what can fail is done before the model is touched."""
        distinct = list(dict.fromkeys(wanted.rows))
        index = None if wanted.single else [distinct.index(c) for c in wanted.rows]
        unpacked = {task: self._resident.get(task, self._fresh) for task in wanted.tasks}
        made = {}
        for module, layer in self._layers.items():
            pieces = {t: p[module] for t, p in unpacked.items() if module in p}
            bias = read_bias(self._modules[module])
            made[module] = combine(layer, distinct, index, pieces, bias) if pieces else None
        copies = self._copies(wanted)
        state = state_of(self._root)
        assert state is not None
        for module, layer in self._layers.items():
            layer.acting = made[module]
        self._selection = wanted
        if fusing.fused_plan(self._root) is None:
            activate(self._root, state, self._name)
        self._put_copies(copies)

    def _unpack(self, task: str) -> Pieces:
        """Everything a task has, from what the fleet holds."""
        rest = self.fleet.rest(task)
        found = {}
        for module, layer in self._layers.items():
            code = self.fleet.code(task, module)
            magnitude = rest.get(f"{module}.{_MAGNITUDE}")
            if code.kind == ABSENT and not len(code.residual_up) and magnitude is None:
                continue
            piece = Piece.of(code, layer.ranks, layer["up"].device, layer["up"].dtype)
            if magnitude is not None:
                base, info = self._modules[module], layer.info
                slot = slot_of(base)
                if slot is not None and slot.fused is not None:
                    raise AttachError(
                        "The norms of DoRA's rows follow from the base weights, and something is "
                        "fused into them.",
                        fix="unfuse first",
                        key=module,
                    )
                change = piece.change(layer["up"], layer["down"])
                gain = gain_of(magnitude.to(layer["up"].device), read_weight(base, info), *change)
                piece = replace(piece, gain=gain, weight=weight_version(base, info))
            found[module] = piece
        return found

    def _fresh(self, pieces: Pieces) -> bool:
        """Whether pieces are still where their layers are, and of the same base weights."""
        for module, piece in pieces.items():
            layer = self._layers[module]
            if piece.device != layer["up"].device:
                return False
            if piece.gain is not None and piece.weight != weight_version(
                self._modules[module], layer.info
            ):
                return False
        return True

    # -- modules that are trained as a whole -----------------------------------------------

    def _copies(self, wanted: _Selection) -> dict[str, dict[str, nn.Module]]:
        """Module name → task → its copy, of the tasks that are to act."""
        made: dict[str, dict[str, nn.Module]] = {}
        for task in wanted.tasks:
            rest = self.fleet.rest(task) if task in self._copied else {}
            for name, leaves in self._copied.get(task, {}).items():
                module = self._root.get_submodule(name)
                saved = module._modules.get(SAVED)
                copy = saved.get(_key(task)) if isinstance(saved, SavedModule) else None
                if copy is None:
                    with torch.inference_mode(False), torch.no_grad():
                        copy = trainable_copy(module).requires_grad_(False)
                        own = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
                        for leaf in leaves:
                            own[leaf].copy_(rest[f"{name}.{leaf}"])
                    copy.train(module.training)
                made.setdefault(name, {})[task] = copy
        return made

    def _put_copies(self, copies: Mapping[str, Mapping[str, nn.Module]]) -> None:
        """Puts the copies of what acts on the model, and takes the others off."""
        names = dict.fromkeys(n for found in self._copied.values() for n in found)
        for name in names:
            module, wanted = self._root.get_submodule(name), copies.get(name, {})
            saved = module._modules.get(SAVED)
            if not isinstance(saved, SavedModule):
                if not wanted:
                    continue
                saved = SavedModule(name)
                saved.train(module.training)
                hooks.install_saved(module, saved)
            for task in self._copied:
                if saved.get(_key(task)) is not None and task not in wanted:
                    saved.remove(_key(task))
            for task, copy in wanted.items():
                if saved.get(_key(task)) is None:
                    saved.put(_key(task), copy)
            saved.plan = self._saved_plan(name) if wanted else None
            if not saved.names():
                hooks.uninstall_saved(module)

    def _saved_plan(self, name: str) -> SavedPlan:
        chosen = self._selection
        if chosen.single:
            return SavedPlan(name, Mix(tuple((_key(t), w) for t, w in chosen.rows[0])))
        rows = [_plain(c) for c in chosen.rows]
        return SavedPlan(name, Rows(tuple(None if t is None else _key(t) for t in rows)))

    # -- running -----------------------------------------------------------------------------

    def __call__(self, *args: Any, tasks: TaskChoice | EllipsisType = ..., **kw: Any) -> Any:
        """The same as :meth:`forward`."""
        return self.forward(*args, tasks=tasks, **kw)

    def forward(self, *args: Any, tasks: TaskChoice | EllipsisType = ..., **kw: Any) -> Any:
        """Runs the model.

        Args:
            args: What the model is called with.
            tasks: As :meth:`use` takes it, for this call; by default what acts already.
            kw: What the model is called with by keyword.
        """
        if isinstance(tasks, EllipsisType):
            return self.model(*args, **kw)
        with self.use(tasks):
            return self.model(*args, **kw)

    @overload
    def generate(
        self,
        rows: Sequence[str],
        *,
        tasks: TaskChoice | EllipsisType = ...,
        tokenizer: Any,
        **settings: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        rows: Tensor | Mapping[str, Tensor],
        *,
        tasks: TaskChoice | EllipsisType = ...,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Any: ...

    def generate(
        self,
        rows: Tensor | Mapping[str, Tensor] | Sequence[str],
        *,
        tasks: TaskChoice | EllipsisType = ...,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Any:
        """Lets the model continue the rows of a batch, each under its own task.

        Beams, sampling and the rest are the model's own ``generate``, whose dimension of rows
        may be any multiple of the rows given.

        Args:
            rows: Token ids [b, n]; what a tokenizer gives (``input_ids``, ``attention_mask``;
                rows of different lengths padded on the left); or texts as they stand (no chat
                template is put around them), which takes ``tokenizer``.
            tasks: A list with a task, ``None`` or {task: weight} for each row, or one of these
                for all; by default what acts already.
            tokenizer: For texts.
            settings: For the model's ``generate``.

        Returns:
            What the model's ``generate`` returns; for texts, the continuations as texts.

        Raises:
            ConfigError: There are not as many tasks as rows, or texts come without a tokenizer.
        """
        texts = False
        if isinstance(rows, Tensor):
            batch = {"input_ids": rows}
        elif isinstance(rows, Mapping):
            batch = dict(rows)
        else:
            texts = True
            batch = _encoded(list(rows), tokenizer, next(self._root.parameters()).device)
            settings.setdefault("pad_token_id", _pad(tokenizer))
        if isinstance(tasks, Sequence) and not isinstance(tasks, str):
            given, count = len(tasks), next(iter(batch.values())).shape[0]
            if given != count:
                raise ConfigError(
                    "There are not as many tasks as rows.",
                    expected=f"{count} tasks",
                    got=given,
                    key="tasks",
                )
        run: Any = self.model.generate
        with nullcontext() if isinstance(tasks, EllipsisType) else self.use(tasks):
            written = run(**batch, **settings)
        if not texts:
            return written
        sequences = getattr(written, "sequences", written)[:, batch["input_ids"].shape[1] :]
        found: list[str] = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return found

    # -- tasks as adapters -------------------------------------------------------------------

    def adapter(
        self, task: str, rank: Literal["original", "exact"] | int = "exact"
    ) -> AdapterWeights:
        """A task as an adapter of its own, e.g. to save it; see ``SharedSubspace.reconstruct``."""
        return self.fleet.reconstruct(task, rank)

    def delta_state_dict(self, task: str) -> dict[str, Tensor]:
        """Module name → effective ΔW [d_out, d_in] of a task, float32: W + ΔW acts like it.

        As large as the adapted weights together. What ``modules_to_save`` replaces is not in it.
        """
        self._checked(task)
        found = {}
        with torch.no_grad():
            for module, piece in self._resident.get(task, self._fresh).items():
                layer = self._layers[module]
                A, B = (t.float() for t in piece.change(layer["up"], layer["down"]))
                delta = B.mT @ A
                if piece.gain is not None:
                    weight = read_weight(self._modules[module], layer.info).float()
                    delta = piece.gain[:, None] * (weight + delta) - weight
                found[module] = delta
        return found

    def fuse(self, choice: str | Mapping[str, float] | EllipsisType = ...) -> fusing.FuseReport:
        """Writes a task or a blend into the base weights, which then run without products.

        Args:
            choice: Which; by default what acts already.

        Raises:
            FuseError: Something is fused already, a layer cannot be fused, or each row has a
                task of its own.
        """
        previous = self._selection
        if self.attached and fusing.fused_plan(self._root) is None:
            self._act(previous if isinstance(choice, EllipsisType) else self._checked(choice))
        copies = self._copies(self._selection)
        try:
            report = fusing.fuse(self._root, self._name)
        except BaseException:
            if fusing.fused_plan(self._root) is None:
                self._act(previous)
            raise
        self._put_copies(copies)
        return replace(report, adapter=str(self._selection))

    def unfuse(self) -> None:
        """Takes what is fused out again, exactly; it goes on acting.

        Raises:
            FuseError: Nothing is fused.
        """
        fusing.unfuse(self._root)
        self._act(self._selection)

    def detach(self) -> None:
        """Takes the fleet off the model, which is bit for bit what it was before."""
        if self.attached:
            if self.fused is not None:
                fusing.unfuse(self._root)
            self._selection = _BASE
            self._put_copies({})
            core_detach(self._root, self._name)
        self._resident.drop()

    def stats(self) -> ServingStats:
        """Where the bytes are, and how often unpacked tasks were asked for."""
        basis = sum(
            t.numel() * t.element_size()
            for layer in self._layers.values()
            for t in (layer["up"], layer["down"])
        )
        acting = sum(x.acting.nbytes for x in self._layers.values() if x.acting is not None)
        held = self.fleet.stats().total
        return ServingStats(len(self.tasks), basis, held, acting, self._resident.stats)


# Choices ----------------------------------------------------------------------------------------


def _selection(choice: TaskChoice) -> _Selection:
    if isinstance(choice, Sequence) and not isinstance(choice, str):
        if not choice:
            raise ConfigError(
                "There is no row.", expected="a task or None for each row", got="[]", key="tasks"
            )
        return _Selection(tuple(_combination(c) for c in choice), False)
    return _Selection((_combination(choice),), True)


def _combination(choice: RowChoice) -> Combination:
    if choice is not None and not isinstance(choice, str | Mapping):
        raise ConfigError(
            "That does not say which task is to act.",
            expected="a task, {task: weight}, or None for the base model",
            got=repr(choice),
            key="tasks",
        )
    plan = plan_of(choice)
    if plan is None:
        return ()
    if isinstance(plan, str):
        return ((plan, 1.0),)
    assert isinstance(plan, Mix)
    return tuple((t, w) for t, w in plan.weights if w != 0.0)


def _plain(combination: Combination) -> str | None:
    """The task, where a combination is one task as it is."""
    if len(combination) == 1 and combination[0][1] == 1.0:
        return combination[0][0]
    return None


def _row(combination: Combination) -> RowChoice:
    return _plain(combination) or (dict(combination) or None)


def _row_plan(combination: Combination) -> str | Mix | None:
    return _plain(combination) or (Mix(combination) if combination else None)


def _key(task: str) -> str:
    """A name for a child module: ids may hold anything, these no dots."""
    return "task_" + task.encode().hex()


# Fleet and model --------------------------------------------------------------------------------


def _open(fleet: Any, allow_base_mismatch: bool) -> SharedSubspace:
    if isinstance(fleet, SharedSubspace):
        found = fleet
    elif isinstance(fleet, str | os.PathLike) and store.is_subspace(fleet):
        found = SharedSubspace.load(fleet)
    elif isinstance(fleet, str | os.PathLike | Sequence | Mapping):
        with warnings.catch_warnings():
            # Nothing is truncated; what float32 rounds off is more than nothing, though.
            warnings.simplefilter("ignore", BudgetWarning)
            found = SharedSubspace.from_adapters(
                fleet, error=0.0, allow_base_mismatch=allow_base_mismatch
            )
    else:
        raise ConfigError(
            "That is no fleet.",
            expected="a SharedSubspace, its directory, or adapters",
            got=type(fleet).__name__,
            key="fleet",
        )
    if not found.ids:
        raise ConfigError("The fleet has no task.", expected="at least one", key="fleet")
    return found


def _dtype(root: nn.Module, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is None:
        told = getattr(root, "dtype", None)  # Transformers' models know, quantised ones too
        if not (isinstance(told, torch.dtype) and told.is_floating_point):
            told = next((p.dtype for p in root.parameters() if p.is_floating_point()), None)
        return told if told in _DTYPES else torch.float32
    if wanted not in _DTYPES:
        raise ConfigError(
            "The basis cannot be multiplied in that dtype.",
            expected=", ".join(map(str, _DTYPES)),
            got=wanted,
            key="dtype",
        )
    return wanted


def _targets(root: nn.Module, fleet: SharedSubspace) -> list[Candidate]:
    """The layers that the fleet adapts, in the model's order; all of them must be there."""
    wanted = frozenset(fleet.modules)
    found = [c for c in candidates(root) if c.info.name in wanted]
    if len(found) < len(wanted):
        have = {c.info.name for c in found}
        missing = [m for m in fleet.modules if m not in have]
        raise TargetError(
            f"The fleet adapts {len(wanted)} layers, and {type(root).__name__} has "
            f"{len(found)} of them.",
            expected=", ".join(missing[:3]) + (", …" if len(missing) > 3 else ""),
            got=", ".join(c.info.name for c in candidates(root)[:3]) + ", …",
            fix="give the model that the adapters were made for, with the head they were trained "
            "with (AutoModelForCausalLM, not AutoModel)",
            key=missing[0],
        )
    if not found:
        raise TargetError("The fleet adapts no layer.", expected="at least one", key="fleet")
    for c in found:
        sizes = fleet.up(c.info.name).shape[0], fleet.down(c.info.name).shape[1]
        if sizes != (c.info.d_out, c.info.d_in):
            raise BaseMismatchError(
                "The fleet was made for another base model: a layer has other sizes.",
                expected=f"{sizes[1]} → {sizes[0]}",
                got=f"{c.info.d_in} → {c.info.d_out}",
                key=c.info.name,
            )
    return found


def _check_base(root: nn.Module, fleet: SharedSubspace, allow: bool) -> None:
    stored, wanted = fleet.base.fingerprint, fleet.base.name
    if allow:
        return
    name = peft.base_name(root)
    if stored is not None:
        difference = stored.compare(fingerprint(root, names=list(stored.sketch)))
        if not difference.same:
            raise BaseMismatchError(
                f"The fleet was made for another base model: {difference}.",
                expected=wanted,
                got=name or type(root).__name__,
                fix="load the right base model, or pass allow_base_mismatch=True",
            )
    elif wanted is not None and name is not None and wanted != name:
        warnings.warn(
            f"The fleet names {wanted!r} as its base model, and this one is {name!r}. Whether "
            "they are the same was not checked.",
            UserWarning,
            stacklevel=3,
        )


def _copied_modules(root: nn.Module, task: str, record: MemberRecord) -> dict[str, tuple[str, ...]]:
    """Module name → names of its tensors that a task replaces.

    Raises:
        UnsupportedFeatureError: If the task holds anything that cannot act here.
    """
    left = [
        k
        for k in record.rest
        if k not in record.padding and not (record.dora and k.endswith(f".{_MAGNITUDE}"))
    ]
    if not left:
        return {}
    wanted = [str(n) for n in record.config.get("modules_to_save") or ()]
    found: dict[str, tuple[str, ...]] = {}
    for name, module in find_modules(root, wanted) if wanted else ():
        shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        leaves = tuple(k[len(name) + 1 :] for k in left if k.startswith(f"{name}."))
        if leaves and all(shapes.get(k) == record.rest[f"{name}.{k}"] for k in leaves):
            found[name] = leaves
    served = {f"{name}.{leaf}" for name, leaves in found.items() for leaf in leaves}
    # The telling ones first: PEFT writes a copy of the embedding beside its LoRA.
    for key in sorted(left, key=lambda k: ".lora_embedding_" not in k):
        if key not in served:
            embedding = ".lora_embedding_" in key
            raise UnsupportedFeatureError(
                f"The task {task!r} cannot be served: "
                + (
                    "it adapts an embedding, which is looked up and has no product that others "
                    "could share."
                    if embedding
                    else "it holds a tensor that fits no module of the model."
                ),
                got=key,
                key=key,
                fix=f"fleet.remove({task!r}) first, and load that adapter by lorasmith.load",
            )
    return found


def _encoded(texts: list[str], tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Texts as one batch, padded on the left."""
    if tokenizer is None:
        raise ConfigError("Texts take a tokenizer.", expected="tokenizer=…", key="tokenizer")
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ConfigError(
            "rows is neither tokens nor texts.", expected="at least one text", key="rows"
        )
    ids = [list(tokenizer(t)["input_ids"]) for t in texts]
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), _pad(tokenizer), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def _pad(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id or 0) if found is None else int(found)
