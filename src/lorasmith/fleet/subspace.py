"""A fleet in one shared subspace: a few numbers an adapter, and all of them once.

    ΔW_i ≈ U C_i V (+ B_i A_i)        U [d_out, R_u], V [R_d, d_in] shared, C_i [R_u, R_d] small

on every layer. Two bases fill this form: ``joint`` (:mod:`lorasmith.fleet.joint`), the default,
and ``share`` (:mod:`lorasmith.fleet.share`). The residual B_i A_i, of low rank, is what
:meth:`SharedSubspace.add` keeps of an adapter that the basis does not span.

    fleet = SharedSubspace.from_adapters(paths, error=0.05)
    fleet.add("another")              # basis as it is: core, and a residual within the budget
    fleet.absorb("yet-another")       # the basis grows
    fleet.quantize(4)
    fleet.save("fleet/")
    SharedSubspace.load("fleet/").reconstruct("another").save("out/")   # a PEFT directory

**Error.** Everywhere the relative squared error of an adapter's change of the weights,

    ε_i = Σ_l ‖ΔW_il − ΔŴ_il‖² / Σ_l ‖ΔW_il‖²,

so that 1 − ε_i is the share of its energy that is kept. It is measured when an adapter
enters. What is done later to the whole fleet (truncating in :meth:`absorb`, quantising) moves
what is held by δ_i = ‖ΔŴ_i − ΔŴ_i'‖, which is measured as well; without the originals the new
error is only known to be at most (√ε_i + δ_i / ‖ΔW_i‖)², which is what :attr:`errors` then
holds. :meth:`measure` finds the true one from the original.

**Carried, not compressed.** DoRA's magnitudes, modules_to_save and all else beside the factors
are kept bit for bit, as is what makes up the configuration. Of DoRA the error is that of its
low-rank part, before the rescaling of rows.

Adapters of other base models are refused. Ids are names of any kind, never paths.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lorasmith.core.truncation import Product
from lorasmith.errors import AdapterFileError, BaseMismatchError, ConfigError, UnknownNameError
from lorasmith.fleet import incremental, share, store
from lorasmith.fleet.absorbing import absorb_joint, absorb_share
from lorasmith.fleet.building import (
    FixedGauge,
    Gauge,
    Progress,
    Stacks,
    Target,
    build_joint,
    build_share,
    coded,
)
from lorasmith.fleet.codec import Codec, codec_of
from lorasmith.fleet.codes import (
    DIAGONAL,
    FACTORED,
    FULL,
    LOADINGS,
    PARTS,
    Code,
    Layer,
    is_diagonal,
)
from lorasmith.fleet.members import (
    LayerFactors,
    Member,
    MemberRecord,
    Source,
    check_id,
    open_members,
    rebuild,
)
from lorasmith.fleet.quantizing import FINER, FOUR_BITS, measure, requantise, within_budget
from lorasmith.fleet.records import (
    Absorbed,
    Adapter,
    BudgetWarning,
    Projection,
    Quantized,
    Stats,
    limit,
)
from lorasmith.fleet.residuals import Part, chosen
from lorasmith.fleet.streaming import JointStream, Stream, blocks
from lorasmith.io.weights import AdapterWeights, BaseModel

__all__ = [
    "Absorbed",
    "BudgetWarning",
    "Projection",
    "Quantized",
    "SharedSubspace",
    "Stats",
]

#: Which basis.
Basis = Literal["joint", "share"]
#: Share of ‖ΔW‖² that an adapter may lose unless told otherwise.
DEFAULT_ERROR = 0.05
#: Bytes of factors in memory while a basis is built.
MEMORY = 2**31


class SharedSubspace:
    """Many adapters of one base model in one basis; see the module.

    Made by :meth:`from_adapters`, :meth:`from_stream` or :meth:`load`.

    Attributes:
        basis: ``"joint"`` or ``"share"``.
        base: The base model.
        budget: The error above which adding an adapter warns, and that :meth:`add` and
            :meth:`absorb` keep unless told otherwise.
        gauge: What is done to factors before they enter the Share basis, ``"aligned"``,
            ``"balanced"`` or ``"stored"``; ``None`` for the joint one, and for fleets that were
            saved before this was written down (they are aligned).
    """

    def __init__(
        self,
        basis: Basis,
        layers: Sequence[Layer],
        adapters: Sequence[Adapter],
        *,
        base: BaseModel | None = None,
        budget: float = DEFAULT_ERROR,
        gauge: FixedGauge | None = None,
    ) -> None:
        self.basis: Basis = basis
        self.gauge: FixedGauge | None = gauge
        self.base = base or BaseModel()
        self.budget = budget
        self._layers = list(layers)
        self._adapters = list(adapters)
        self._disk: int | None = None
        self._generation: str | None = None
        self._source: Path | None = None

    # -- making ------------------------------------------------------------------------------

    @classmethod
    def from_adapters(
        cls,
        sources: Source | Sequence[Source] | Mapping[str, Source],
        ids: Sequence[str] | None = None,
        *,
        basis: Basis = "joint",
        error: float | None = None,
        variance: float | None = None,
        components: int | None = None,
        per_layer: bool = True,
        relative: bool = True,
        core: Literal["full", "diagonal"] = "full",
        sweeps: int = 0,
        gauge: Gauge = "auto",
        bits: int | str | None = None,
        memory: int = MEMORY,
        allow_base_mismatch: bool = False,
        progress: Progress | None = None,
    ) -> SharedSubspace:
        """Compresses a fleet.

        Args:
            sources: Directories, hub ids, URLs, adapters that have been read; or a mapping of
                ids to these. A directory of adapters stands for all of them.
            ids: One for each adapter; by default names made of their paths.
            basis: ``"joint"`` or ``"share"``.
            error: The most that each adapter may lose, relative squared error of ΔW over its
                layers; the fewest bytes with which all of them keep it. The default, with 0.05.
                0 loses nothing but float32's rounding, 1e-6 at the most.
            variance: In its place: the share of ‖ΔW‖² that is kept of every layer in the
                mean over the adapters.
            components: In its place: directions of U and V (joint), or components beside the
                mean (share), on every layer.
            per_layer: Whether layers may differ in their number of directions.
            relative: Whether every adapter counts alike; else by ‖ΔW‖².
            core: For the joint basis: all of C_i, or its diagonal only.
            sweeps: Alternating improvements of the joint basis. On real adapters one lowers the
                mean error by 2 to 5 % and takes as long as all the rest.
            gauge: What is done to factors for the Share basis: ``"aligned"``, ``"balanced"``,
                ``"stored"`` (nothing), or ``"auto"``: whichever takes the fewest bytes for the
                target, or loses least at the number of components, on a few layers spread
                over the model. :attr:`gauge` tells which it was.
            bits: Store it in so many bits, as :meth:`quantize` does. ``error`` is then kept
                after rounding, and errors are those measured after it. The fleet is built two
                or three times for that.
            memory: Bytes that factors may take at a time; where all take more they are read
                from their files again for each step.
            allow_base_mismatch: Whether the adapters may name different base models.
            progress: Called with (phase, done, total).

        Raises:
            ConfigError: An argument, or two that exclude each other; or the rounding to
                ``bits`` alone loses more than ``error``.
            AdapterFileError: An adapter cannot be read.
            BaseMismatchError: They belong to different base models.
            UnsupportedFeatureError: One cannot be part of a fleet.
        """
        target = _target(error, variance, components, per_layer)
        _check_bits(bits)
        _check_choice("basis", basis, ("joint", "share"))
        _check_choice("core", core, ("full", "diagonal"))
        _check_choice("gauge", gauge, ("auto", "aligned", "balanced", "stored"))
        members = open_members(sources, ids, allow_base_mismatch=allow_base_mismatch)
        sizes = _sizes(members)
        stacks = Stacks(members, list(sizes), sizes, memory=memory, progress=progress)
        base = _base(members)
        diagonal = core == "diagonal"

        def build(aim: Target) -> SharedSubspace:
            with torch.no_grad():
                if basis == "joint":
                    built = build_joint(
                        stacks, aim, relative=relative, sweeps=sweeps, diagonal=diagonal
                    )
                else:
                    built = build_share(stacks, aim, relative=relative, gauge=gauge)
            adapters = [
                Adapter(
                    m.id,
                    m.record,
                    {k: m.rest[k].clone() for k in m.rest},
                    m.nbytes,
                    stacks.energy[n].clone(),
                    built.lost[n].clone(),
                )
                for n, m in enumerate(members)
            ]
            return cls(
                basis,
                built.layers,
                adapters,
                base=base,
                budget=_budget(target),
                gauge=built.gauge,
            )

        def measured(whole: SharedSubspace) -> None:
            with torch.no_grad():
                measure(whole._layers, whole._adapters, members)

        return _finished(build, measured, target, bits)

    @classmethod
    def from_stream(
        cls,
        sources: Iterable[Source] | Mapping[str, Source],
        ids: Iterable[str] | None = None,
        *,
        basis: Basis = "joint",
        error: float | None = None,
        components: int | None = None,
        relative: bool = True,
        bits: int | str | None = None,
        most: int = 128,
        block: int = 16,
        allow_base_mismatch: bool = False,
        progress: Progress | None = None,
    ) -> SharedSubspace:
        """Compresses a fleet of any size, reading it one block of adapters at a time.

        The memory for it does not depend on the number of adapters; only the result, their
        codes, does. See :mod:`lorasmith.fleet.streaming`.

        Args:
            sources: The adapters. A list or another collection is gone through twice, and every
                error is exact; of a generator each adapter is seen once, and errors are bounds.
            ids: One for each; by default names made of their paths, for a generator numbers
                are added where they repeat.
            basis: ``"joint"`` or ``"share"``.
            error: As in :meth:`from_adapters`. Where ``most`` directions do not suffice for it,
                there is a warning.
            components: As in :meth:`from_adapters`.
            relative: As in :meth:`from_adapters`.
            bits: As in :meth:`from_adapters`. Of a generator the Share basis is built once,
                so that errors may end above the budget, with a warning.
            most: Directions of each side of a layer that are kept on the way.
            block: Adapters that are in memory at a time.
            allow_base_mismatch: Whether they may name different base models.
            progress: Called with (phase, done, total); the total is 0 where it is not known.
        """
        target = _target(error, None, components, True)
        _check_bits(bits)
        _check_choice("basis", basis, ("joint", "share"))
        stream = Stream(sources, ids, allow_base_mismatch)

        def measured(whole: SharedSubspace) -> None:
            done = 0
            for group in blocks(stream, block):
                with torch.no_grad():
                    measure(whole._layers, whole._adapters, group, done)
                done += len(group)
                if progress is not None:
                    progress("errors", done, stream.total)

        true = measured if stream.again else None
        if basis == "share":

            def absorbed(aim: Target) -> SharedSubspace:
                whole = cls._stream_share(stream, aim, block, allow_base_mismatch, true, progress)
                whole.budget = _budget(target)
                return whole

            return _finished(absorbed, true, target, bits, again=stream.again)
        once = not stream.again
        made = JointStream(max(most, components or 0), relative=relative, once=once)
        records: list[Adapter] = []
        with torch.no_grad():
            for group in blocks(stream, block):
                made.feed(group)
                zero = torch.zeros(0, dtype=torch.float64)
                records += [
                    Adapter(
                        m.id, m.record, {k: m.rest[k].clone() for k in m.rest}, m.nbytes, zero, zero
                    )
                    for m in group
                ]
                if progress is not None:
                    progress("bases", made.count, stream.total)
            if not records:
                raise AdapterFileError(
                    "There is no adapter.", expected="at least one", key="sources"
                )
            if not once:
                for number, member in enumerate(stream):
                    made.code(number, member)
                    if progress is not None:
                        progress("cores", number + 1, stream.total)

        def build(aim: Target) -> SharedSubspace:
            with torch.no_grad():
                built, energy = made.build(aim, progress)
            adapters = [
                replace(a, energy=energy[n].clone(), lost=built.lost[n].clone())
                for n, a in enumerate(records)
            ]
            return cls(basis, built.layers, adapters, base=stream.base, budget=_budget(target))

        return _finished(build, true, target, bits)

    @classmethod
    def _stream_share(
        cls,
        stream: Stream,
        target: Target,
        block: int,
        allow_base_mismatch: bool,
        measured: Callable[[SharedSubspace], None] | None,
        progress: Progress | None,
    ) -> SharedSubspace:
        whole: SharedSubspace | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)  # one at the end tells all
            for group in blocks(stream, block):
                if whole is None:
                    whole = cls.from_adapters(
                        group,
                        basis="share",
                        error=target.error,
                        components=target.components,
                        allow_base_mismatch=allow_base_mismatch,
                    )
                else:
                    whole.absorb(
                        group,
                        error=target.error,
                        components=target.components,
                        allow_base_mismatch=allow_base_mismatch,
                    )
                if progress is not None:
                    progress("components", len(whole), stream.total)
            if whole is None:
                raise AdapterFileError(
                    "There is no adapter.", expected="at least one", key="sources"
                )
            if measured is not None:
                measured(whole)
        return whole

    def check_budget(self) -> None:
        """Warns (:class:`BudgetWarning`) if adapters are beyond the budget, as far as is known."""
        over = [a for a in self._adapters if a.error > limit(self.budget)]
        if over:
            worst = max(over, key=lambda a: a.error)
            _warn(
                f"{len(over)} of {len(self)} adapters lose more than {self.budget:.3g} of their "
                f"change of the weights (relative squared error), {worst.id!r} most, with "
                f"{worst.error:.3g}."
            )

    # -- what is in it -----------------------------------------------------------------------

    @property
    def ids(self) -> tuple[str, ...]:
        """The adapters."""
        return tuple(a.id for a in self._adapters)

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers."""
        return tuple(layer.module for layer in self._layers)

    @property
    def width(self) -> int:
        """Directions of a component: the rank r of the Share basis, 1 of the joint one."""
        return self._width()

    @property
    def errors(self) -> dict[str, float]:
        """Id → relative squared error of ΔW; see the module."""
        return {a.id: a.error for a in self._adapters}

    def layer_errors(self, id: str) -> dict[str, float]:  # noqa: A002 - its name
        """Module name → relative squared error of one adapter there."""
        adapter = self._adapters[self._number(id)]
        return _ratios(self.modules, adapter.lost, adapter.energy)

    def up(self, module: str) -> Tensor:
        """U [d_out, R_u], float32."""
        return self._layer(module).up.unpack().mT

    def down(self, module: str) -> Tensor:
        """V [R_d, d_in], float32."""
        return self._layer(module).down.unpack()

    def core(self, id: str, module: str) -> Tensor:  # noqa: A002
        """C [R_u, R_d] of an adapter on a layer, float32; zeros where it has nothing."""
        return self._layer(module).core(self._number(id))

    def factored_core(self, id: str, module: str) -> tuple[Tensor, Tensor]:  # noqa: A002
        """Left [k, R_u] and right [k, R_d] with C = leftᵀ right, float32."""
        layer = self._layer(module)
        return layer.wide(layer.code(self._number(id)))

    def code(self, id: str, module: str) -> Code:  # noqa: A002
        """All that is held of an adapter on a layer, in the kind it is stored in, float32."""
        return self._layer(module).code(self._number(id))

    def residual(self, id: str, module: str) -> LayerFactors | None:  # noqa: A002
        """What is kept of an adapter beside its core on a layer, or ``None``."""
        code = self._layer(module).code(self._number(id))
        if not len(code.residual_up):
            return None
        return LayerFactors(code.residual_down, code.residual_up.mT)

    def rest(self, id: str) -> Mapping[str, Tensor]:  # noqa: A002
        """The tensors beside the factors of an adapter, as they were stored."""
        return dict(self._adapters[self._number(id)].rest)

    def record(self, id: str) -> MemberRecord:  # noqa: A002
        """What it takes to rebuild an adapter."""
        return self._adapters[self._number(id)].record

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, id: object) -> bool:  # noqa: A002
        return id in self.ids

    def __repr__(self) -> str:
        return (
            f"SharedSubspace({self.basis}, {len(self)} adapters, {len(self._layers)} layers, "
            f"{self.stats().total:,} bytes)"
        )

    def _number(self, id: str) -> int:  # noqa: A002
        for number, adapter in enumerate(self._adapters):
            if adapter.id == id:
                return number
        raise UnknownNameError(
            "The subspace holds no adapter of that id.",
            expected=", ".join(map(repr, self.ids[:6])) + (", …" if len(self) > 6 else ""),
            got=repr(id),
            key="id",
        )

    def _layer(self, module: str) -> Layer:
        for layer in self._layers:
            if layer.module == module:
                return layer
        raise UnknownNameError(
            "The subspace has no such layer.",
            expected=", ".join(self.modules[:4]) + (", …" if len(self._layers) > 4 else ""),
            got=module,
            key="module",
        )

    # -- one more adapter --------------------------------------------------------------------

    def project(
        self,
        source: Source,
        *,
        budget: float | None = None,
        allow_base_mismatch: bool = False,
    ) -> Projection:
        """What the basis, as it is, can hold of an adapter. Nothing is changed.

        Warns (:class:`BudgetWarning`) if that is too little.

        Args:
            source: The adapter.
            budget: The error above which to warn; that of the subspace by default.
            allow_base_mismatch: Whether it may name another base model.
        """
        member = self._open(source, None, allow_base_mismatch)
        allowed = self.budget if budget is None else _share("budget", budget)
        with torch.no_grad():
            parts = self._project(member)
        energy = sum(p.energy for p in parts.values())
        gone = sum(p.lost for p in parts.values())
        codes = {}
        for m, p in parts.items():
            if p.layer is not None:
                left, right = p.layer.wide(p.code)
                codes[m] = left.mT @ right
        found = Projection(
            member.id,
            gone / energy if energy else 0.0,
            {m: p.lost / p.energy if p.energy else 0.0 for m, p in parts.items()},
            allowed,
            codes=codes,
        )
        if not found.within:
            _warn(_beyond(found) + " add(…, error=…) keeps the rest as a residual.")
        return found

    def add(
        self,
        source: Source,
        id: str | None = None,  # noqa: A002
        *,
        error: float | None = None,
        allow_base_mismatch: bool = False,
    ) -> Projection:
        """Adds an adapter with the basis as it is; other adapters do not change.

        Beside its core it keeps a residual of low rank, on those layers and of those ranks
        where a byte recovers most, until the error is within the budget, rounding included.
        Both together take no more than its own factors would, stored the same way: where the
        basis is of no use they stand in place of a core. If the bits of the residuals lose
        more than the budget, and no other adapter has one, residuals are stored in more of
        them from then on; else there is a warning (:class:`BudgetWarning`).

        Args:
            source: The adapter.
            id: Its name; by default made of its path.
            error: The most that it may lose; the budget of the subspace by default. 1 keeps
                the core only.
            allow_base_mismatch: Whether it may name another base model.

        Raises:
            ConfigError: The id is taken, or ``error`` is no share.
            BaseMismatchError: It belongs to another base model.
        """
        allowed = self.budget if error is None else _share("error", error)
        member = self._open(source, id, allow_base_mismatch)
        self._check_new(member.id)
        with torch.no_grad():
            parts, codec = self._with_residuals(self._project(member), allowed)
            for layer in self._layers:
                layer.recode(residual_up=codec, residual_down=codec)
        return self._insert(member, parts, allowed)

    def _with_residuals(
        self, parts: Mapping[str, Part], allowed: float
    ) -> tuple[dict[str, Part], Codec]:
        """The parts with residuals that keep the budget after rounding, and their codec.

        Residuals of others stay as they are stored; without any, more bits are taken where it
        needs them.
        """
        codec: Codec = self._layers[0].residual_up.codec if self._layers else "float32"
        made, met = chosen(parts, allowed, codec)
        if any(len(layer.residual_up) for layer in self._layers):
            return made, codec
        for finer in FINER[codec]:
            if met:
                break
            other, met = chosen(parts, allowed, finer)
            if met:
                made, codec = other, finer
        return made, codec

    def _insert(self, member: Member, parts: Mapping[str, Part], allowed: float) -> Projection:
        """Puts a projected adapter in; what can fail has been done before."""
        rest = {k: member.rest[k].clone() for k in member.rest}
        record = member.record
        for module, part in parts.items():
            if part.layer is None:
                self._new_layer(module, member.sizes[module])
        number = len(self._adapters)
        energy = torch.zeros(len(self._layers), dtype=torch.float64)
        gone = torch.zeros_like(energy)
        for place, layer in enumerate(self._layers):
            layer.grow()
            if layer.module not in parts:
                continue
            part = parts[layer.module]
            layer.put(number, part.code)
            # As it is stored now, residual and rounding included.
            energy[place] = part.energy
            gone[place] = float(share.distance(*part.whole, *layer.rows(number)))
        self._adapters.append(Adapter(member.id, record, rest, member.nbytes, energy, gone))
        made = self._projection(number, allowed)
        if not made.within:
            text = _beyond(made)
            codec = self._layers[0].residual_up.codec
            if made.residual_rank and codec != "float32":
                text += (
                    f" That is the rounding of its residual to {codec}; remove it, "
                    "quantize(…, residuals=16), and add it again."
                )
            _warn(text)
        return made

    def _projection(self, number: int, allowed: float) -> Projection:
        adapter = self._adapters[number]
        ranks = {
            layer.module: int(layer.index[number, 3])
            for layer in self._layers
            if layer.index[number, 3]
        }
        return Projection(
            adapter.id,
            adapter.error,
            _ratios(self.modules, adapter.lost, adapter.energy),
            allowed,
            ranks,
            self._adapter_bytes(number),
        )

    def _new_layer(self, module: str, sizes: tuple[int, int]) -> None:
        """A layer that no adapter had so far: an empty basis."""
        d_in, d_out = sizes
        width = self._width()
        start = width if self.basis == "share" else 0
        layer = Layer.new(
            module, torch.zeros(start, d_out), torch.zeros(start, d_in), len(self), width
        )
        if self._layers:
            like = self._layers[0]
            names = ("up", "down", "left", "right", "residual_up", "residual_down")
            layer.recode(**{name: getattr(like, name).codec for name in names})
        self._layers.append(layer)
        for adapter in self._adapters:
            adapter.energy = torch.cat((adapter.energy, adapter.energy.new_zeros(1)))
            adapter.lost = torch.cat((adapter.lost, adapter.lost.new_zeros(1)))

    def _width(self) -> int:
        return self._layers[0].width if self._layers else 1

    def _open(self, source: Source, id: str | None, allow_base_mismatch: bool) -> Member:  # noqa: A002
        member = open_members(
            [source] if id is None else {id: source}, allow_base_mismatch=allow_base_mismatch
        )
        if len(member) != 1:
            raise ConfigError(
                "That is more than one adapter.", expected="one", got=len(member), key="source"
            )
        (one,) = member
        self._check_base(one, allow_base_mismatch)
        return one

    def _check_base(self, member: Member, allow_base_mismatch: bool) -> None:
        if not allow_base_mismatch:
            mine, theirs = self.base, member.weights.base
            reason = None
            if mine.fingerprint is not None and theirs.fingerprint is not None:
                difference = mine.fingerprint.compare(theirs.fingerprint)
                reason = None if difference.same else str(difference)
            elif mine.name is not None and theirs.name is not None and mine.name != theirs.name:
                reason = "by their names"
            if reason is not None:
                raise BaseMismatchError(
                    f"The adapter {member.id!r} was made for another base model than the "
                    f"subspace ({reason}).",
                    expected=mine.name,
                    got=theirs.name,
                    fix="take adapters of one base model, or pass allow_base_mismatch=True "
                    "(--allow-base-mismatch) if the two are the same",
                )
        for module, (d_in, d_out) in member.sizes.items():
            if module in self.modules and self._layer(module).sizes != (d_out, d_in):
                known = self._layer(module).sizes
                raise BaseMismatchError(
                    f"The adapter {member.id!r} was made for another base model than the "
                    "subspace: a layer has other sizes.",
                    key=module,
                    expected=f"{known[1]} → {known[0]}",
                    got=f"{d_in} → {d_out}",
                )

    def _check_new(self, name: str) -> None:
        check_id(name)
        if name in self.ids:
            raise ConfigError(
                "The subspace holds an adapter of that id already.",
                got=repr(name),
                fix="choose another id, or remove that one first",
                key="id",
            )

    def _project(self, member: Member) -> dict[str, Part]:
        """What the basis holds of each layer of an adapter, and what is left over."""
        self_layers = {layer.module: layer for layer in self._layers}
        found: dict[str, Part] = {}
        for module in member.modules:
            factors = member.factors(module)
            A, B = factors.A, factors.B.mT.contiguous()
            layer = self_layers.get(module)
            if layer is None:
                width = self._width()
                start = width if self.basis == "share" else 0
                blank = Layer.new(
                    module, B.new_zeros(start, B.shape[1]), A.new_zeros(start, A.shape[1]), 0, width
                )
                code = self._fit(blank, A, B)
                found[module] = Part.of(None, code, blank, A, B)
            else:
                found[module] = Part.of(layer, self._fit(layer, A, B), layer, A, B)
        return found

    def _fit(self, layer: Layer, A: Tensor, B: Tensor) -> Code:
        """The code of ΔW in a layer's basis, whatever that is; no residual."""
        up, down = layer.up.unpack(), layer.down.unpack()
        none = B.new_zeros(0, B.shape[1]), A.new_zeros(0, A.shape[1])
        if self.basis == "joint":
            if not len(up) or not len(down):
                return Code(FACTORED, B.new_zeros(0, len(up)), A.new_zeros(0, len(down)), *none)
            right, left = share.balance(
                incremental.coordinates(A, down), incremental.coordinates(B, up)
            )
            if layer.diagonal:
                return coded(left, right, layer.sizes, diagonal=True)
            return coded(left, right, layer.sizes)
        r = layer.width
        A, B = share.placed(A, B, down[:r], up[:r], self.gauge or "aligned")
        ups, downs = up.view(-1, r * up.shape[1]), down.view(-1, r * down.shape[1])
        left = incremental.coordinates(B.reshape(1, -1), ups)
        right = incremental.coordinates(A.reshape(1, -1), downs)
        return Code(LOADINGS, left, right, *none)

    # -- taking adapters out -----------------------------------------------------------------

    def remove(self, id: str) -> None:  # noqa: A002
        """Takes an adapter out; basis and other adapters stay as they are."""
        number = self._number(id)
        for layer in self._layers:
            layer.drop(number)
        del self._adapters[number]

    def factors(self, id: str) -> dict[str, LayerFactors]:  # noqa: A002
        """Module name → factors of what is held of an adapter, core and residual together."""
        number = self._number(id)
        found = {}
        for layer in self._layers:
            if layer.has(number):
                A, B = layer.rows(number)
                found[layer.module] = LayerFactors(A, B.mT)
        return found

    def reconstruct(
        self,
        id: str,  # noqa: A002
        rank: Literal["original", "exact"] | int = "original",
        *,
        dtype: torch.dtype | None = None,
    ) -> AdapterWeights:
        """An adapter as it was, configuration and all, of what is held of it.

        Args:
            id: Which.
            rank: ``"original"``: every layer has the rank it had; ``"exact"``: as high as it
                takes to hold core and residual together without a loss; or a number. A
                product of higher rank is cut to its leading singular vectors.
            dtype: In which to store the factors; as before by default.

        Raises:
            UnknownNameError: There is no such adapter.
            ConfigError: ``rank`` is not usable.
        """
        if rank not in ("original", "exact") and (type(rank) is not int or rank < 1):
            raise ConfigError(
                "rank is not usable.",
                expected='"original", "exact", or an integer of at least 1',
                got=repr(rank),
                key="rank",
            )
        adapter = self._adapters[self._number(id)]
        made = {}
        for module, factors in self.factors(id).items():
            if rank == "exact":
                most = min(*self._layer(module).sizes)
            elif rank == "original":
                most = adapter.record.ranks[module]
            else:
                most = min(rank, *self._layer(module).sizes)
            made[module] = _cut(factors, most)
        if rank == "original":
            return rebuild(adapter.record, made, rest=adapter.rest, rank="original", dtype=dtype)
        return rebuild(adapter.record, made, rest=adapter.rest, dtype=dtype)

    # -- extending the basis -----------------------------------------------------------------

    def absorb(
        self,
        sources: Source | Sequence[Source] | Mapping[str, Source],
        ids: Sequence[str] | None = None,
        *,
        error: float | None = None,
        components: int | None = None,
        allow_base_mismatch: bool = False,
    ) -> Absorbed:
        """Extends the basis by adapters, exactly, and cuts it to the budget again.

        The result is the decomposition of all adapters at once as far as they are held. What
        the truncation moves of old adapters is measured and reported; none is moved beyond
        the budget (see :attr:`errors`), and one that is beyond it already stays as it is.
        A fleet in few bits is rounded anew, which moves all adapters a little further, and
        that is part of what is reported.

        Args:
            sources: The new adapters.
            ids: Their names.
            error: The most that any adapter may lose; the budget of the subspace by default.
                0 truncates nothing.
            components: In its place: how many directions (joint) or components (share) every
                layer has afterwards, at most.
            allow_base_mismatch: Whether they may name another base model.
        """
        allowed = self.budget if error is None else _share("error", error)
        members = open_members(sources, ids, allow_base_mismatch=allow_base_mismatch)
        for member in members:
            self._check_base(member, allow_base_mismatch)
            self._check_new(member.id)
        before = {layer.module: layer.ranks for layer in self._layers}
        old = len(self._adapters)
        for member in members:
            for module in member.modules:
                if module not in self.modules:
                    self._new_layer(module, member.sizes[module])
        with torch.no_grad():
            absorb = absorb_joint
            if self.basis == "share":
                absorb = partial(absorb_share, gauge=self.gauge or "aligned")
            entering, codecs = self._prepare(members), self._codecs()
            layers, moved = absorb(
                self._layers, self._adapters, entering, members, allowed, components
            )
            rounds = any(codec != "float32" for codec in codecs.values())
            if rounds:
                for place, (was, layer) in enumerate(zip(self._layers, layers, strict=True)):
                    requantise(layer, codecs)
                    moved[:old, place] = _distances(was, layer, old)
            self._layers = layers
            report = self._settle(entering, moved)
            if rounds:
                measure(self._layers, self._adapters, members, old)
        added = tuple(self._projection(n, allowed) for n in range(old, len(self._adapters)))
        for record in added:
            if not record.within:
                _warn(_beyond(record))
        ranks = {
            layer.module: (before.get(layer.module, (0, 0)), layer.ranks) for layer in self._layers
        }
        return Absorbed(added, report, ranks)

    def _prepare(self, members: Sequence[Member]) -> list[Adapter]:
        """Records of new adapters, with places for what is measured."""
        new = []
        for member in members:
            zeros = torch.zeros(len(self._layers), dtype=torch.float64)
            rest = {k: member.rest[k].clone() for k in member.rest}
            new.append(Adapter(member.id, member.record, rest, member.nbytes, zeros, zeros.clone()))
        return new

    def _codecs(self) -> dict[str, Codec]:
        """Part of a layer → how it is stored, the same on all of them."""
        return {name: getattr(self._layers[0], name).codec for name in PARTS}

    def _settle(self, entering: Sequence[Adapter], moved: Tensor) -> dict[str, float]:
        """Enters what a truncation has moved [N, L] into the errors; the new adapters come in."""
        old = len(self._adapters)
        for n, adapter in enumerate(entering):
            adapter.lost = moved[old + n].clone()
        report = self._move(moved[:old])
        self._adapters = [*self._adapters, *entering]
        return report

    def _move(self, moved: Tensor) -> dict[str, float]:
        """Enters squared distances [N, L] that adapters have moved by into their errors."""
        report = {}
        for n, adapter in enumerate(self._adapters):
            adapter.lost = (adapter.lost.sqrt() + moved[n].sqrt()).square()
            whole = float(adapter.energy.sum())
            report[adapter.id] = float(moved[n].sum()) / whole if whole else 0.0
        return report

    # -- tasks that are trained in the subspace -----------------------------------------------

    def insert_core(
        self,
        id: str,  # noqa: A002
        cores: Mapping[str, Tensor | tuple[Tensor, Tensor]],
        record: MemberRecord,
        rest: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a task of which the cores are given, e.g. one that was trained in this basis.

        Args:
            id: Its name.
            cores: Module name → C [R_u, R_d], of which only the diagonal is stored where there
                is nothing else; or for the Share basis the loadings (m [K + 1], ℓ [K + 1]).
            record: What it takes to rebuild it.
            rest: Tensors beside the factors, under the names that the record says.

        Raises:
            ConfigError: The id is taken, or a core has another shape than the basis asks for.
        """
        self._check_new(id)
        codes = {}
        for module, given in cores.items():
            layer = self._layer(module)
            none = torch.zeros(0, layer.sizes[0]), torch.zeros(0, layer.sizes[1])
            if isinstance(given, tuple):
                left, right = (t.detach().float().reshape(1, -1) for t in given)
                wanted: tuple[int, ...] = (
                    len(layer.up) // layer.width,
                    len(layer.down) // layer.width,
                )
                got: tuple[int, ...] = (left.shape[1], right.shape[1])
                code = Code(LOADINGS, left, right, *none)
            else:
                core = given.detach().float()
                wanted, got = layer.ranks, tuple(core.shape)
                code = Code(FULL, torch.zeros(0, len(layer.up)), core, *none)
                if wanted == got and min(got) > 1 and is_diagonal(core):
                    values = torch.diagonal(core).reshape(1, -1)
                    code = replace(code, kind=DIAGONAL, right=values)
            if wanted != got or isinstance(given, tuple) != (self.basis == "share"):
                raise ConfigError(
                    "A core does not fit the basis.",
                    expected=f"{'loadings' if self.basis == 'share' else 'a core'} {list(wanted)}",
                    got=list(got),
                    key=module,
                )
            codes[module] = code
        number = len(self._adapters)
        energy = torch.zeros(len(self._layers), dtype=torch.float64)
        for place, layer in enumerate(self._layers):
            layer.grow()
            if layer.module in codes:
                layer.put(number, codes[layer.module])
                A, B = layer.rows(number)
                energy[place] = incremental.square(A, B)
        carried = {k: v.detach().clone() for k, v in (rest or {}).items()}
        size = {"float32": 4, "float64": 8}.get(record.dtype, 2)
        nbytes = size * sum(
            r * sum(record.sizes[m]) for m, r in record.ranks.items() if m in record.sizes
        ) + sum(t.numel() * t.element_size() for t in carried.values())
        self._adapters.append(
            Adapter(id, record, carried, nbytes, energy, torch.zeros_like(energy))
        )

    def extend(self, module: str, up: Tensor, down: Tensor) -> None:
        """Appends directions to the basis of a layer; what adapters do stays exactly the same.

        Args:
            module: The layer.
            up: New columns of U [d_out, n]; for the Share basis n is a multiple of its rank r,
                one component each.
            down: New rows of V [n', d_in].
        """
        layer = self._layer(module)
        rows_up, rows_down = up.detach().float().mT.contiguous(), down.detach().float()
        fits = rows_up.shape[1:] == (layer.sizes[0],) and rows_down.shape[1:] == (layer.sizes[1],)
        if not fits or len(rows_up) % layer.width or len(rows_down) % layer.width:
            raise ConfigError(
                "The new directions do not fit the layer.",
                expected=f"up [{layer.sizes[0]}, n] and down [n, {layer.sizes[1]}]"
                + (f", n a multiple of {layer.width}" if layer.width > 1 else ""),
                got=f"up {list(up.shape)} and down {list(down.shape)}",
                key=module,
            )
        codes = layer.codes()
        more_up, more_down = len(rows_up) // layer.width, len(rows_down) // layer.width
        pad = torch.nn.functional.pad
        wide = []
        for code in codes:
            left = pad(code.left, (0, more_up))
            if code.kind == FULL:
                right = pad(code.right, (0, more_down, 0, more_up))
            elif code.kind == DIAGONAL:
                Ru, Rd = len(layer.up) + more_up, len(layer.down) + more_down
                size = min(Ru, Rd) if layer.diagonal else Rd
                right = pad(code.right, (0, size - code.right.shape[1]))
            else:
                right = pad(code.right, (0, more_down))
            wide.append(replace(code, left=left, right=right))
        pack = type(layer.up).pack
        layer.up = type(layer.up).join([layer.up, pack(rows_up, layer.up.codec)])
        layer.down = type(layer.down).join([layer.down, pack(rows_down, layer.down.codec)])
        layer.refill(wide)

    # -- bytes -------------------------------------------------------------------------------

    def quantize(
        self,
        bits: int | str = 8,
        *,
        basis: int | str | None = None,
        codes: int | str | None = None,
        residuals: int | str | None = None,
    ) -> Quantized:
        """Stores basis, codes and residuals in fewer bits, in memory and on disk.

        The directions of a joint basis are turned for it, after which they are in no order,
        and codes fitted anew to the basis as it is after rounding; see
        :mod:`lorasmith.fleet.quantizing`. Adapters that come later are stored the same way.
        To keep an error budget with rounding, give ``bits`` to :meth:`from_adapters`.

        Args:
            bits: 32, 16, 8, 4 or ``"nf4"``; see :mod:`lorasmith.fleet.codec`.
            basis: Of the basis, if others.
            codes: Of the codes, if others. Loadings of the Share basis have 8 bits at least
                unless they are given here.
            residuals: Of the residuals, if others.

        Returns:
            Bytes before and after, and how far each adapter has moved.
        """
        chosen: dict[str, Codec] = {}
        for names, own in (
            (("up", "down"), basis),
            (("left", "right"), codes),
            (("residual_up", "residual_down"), residuals),
        ):
            codec = codec_of(bits if own is None else own)
            if own is None and self.basis == "share" and "left" in names and codec in FOUR_BITS:
                codec = "int8"
            chosen |= dict.fromkeys(names, codec)
        before = self.stats()
        moved = torch.zeros(len(self), len(self._layers), dtype=torch.float64)
        with torch.no_grad():
            for place, layer in enumerate(self._layers):
                moved[:, place] = requantise(layer, chosen)
        report = self._move(moved)
        after = self.stats()
        return Quantized(_compressed(before), _compressed(after), report)

    def measure(self, source: Source, id: str, *, allow_base_mismatch: bool = False) -> Projection:  # noqa: A002
        """The true error of an adapter, by comparing with the original; kept in ``errors``.

        Args:
            source: The original.
            id: Under which id it is held.
            allow_base_mismatch: Whether it may name another base model.
        """
        number = self._number(id)
        member = self._open(source, id, allow_base_mismatch)
        adapter = self._adapters[number]
        if set(member.modules) != {m.module for m in self._layers if m.has(number)}:
            raise ConfigError(
                "That is not the adapter that is held under this id: it has other layers.",
                got=repr(id),
                key="source",
            )
        for place, layer in enumerate(self._layers):
            if layer.has(number):
                factors = member.factors(layer.module)
                A, B = factors.A, factors.B.mT
                adapter.energy[place] = incremental.square(A, B)
                adapter.lost[place] = float(share.distance(A, B, *layer.rows(number)))
        return self._projection(number, self.budget)

    def _adapter_bytes(self, number: int) -> int:
        total = sum(t.numel() * t.element_size() for t in self._adapters[number].rest.values())
        for layer in self._layers:
            for name, column in (
                ("left", 1),
                ("right", 2),
                ("residual_up", 3),
                ("residual_down", 3),
            ):
                rows = getattr(layer, name)
                one = rows.take(0, 1).nbytes if len(rows) else 0
                total += one * int(layer.index[number, column])
        return total

    def stats(self) -> Stats:
        """Bytes of everything that is held."""
        sums = {
            name: sum(getattr(layer, name).nbytes for layer in self._layers)
            for name in ("up", "down", "left", "right", "residual_up", "residual_down")
        }
        rest = sum(t.numel() * t.element_size() for a in self._adapters for t in a.rest.values())
        index = sum(layer.index.numel() * layer.index.element_size() for layer in self._layers)
        index += sum(
            t.numel() * t.element_size() for a in self._adapters for t in (a.energy, a.lost)
        )
        codecs = {}
        if self._layers:
            like = self._layers[0]
            codecs = {
                "basis": like.up.codec,
                "codes": like.right.codec,
                "residuals": like.residual_up.codec,
            }
        return Stats(
            adapters=len(self),
            layers=len(self._layers),
            basis=sums["up"] + sums["down"],
            codes=sums["left"] + sums["right"],
            residuals=sums["residual_up"] + sums["residual_down"],
            rest=rest,
            index=index,
            original=sum(a.nbytes for a in self._adapters),
            original_rest=rest,
            disk=self._disk,
            per_adapter={a.id: self._adapter_bytes(n) for n, a in enumerate(self._adapters)},
            ranks={layer.module: layer.ranks for layer in self._layers},
            codecs=codecs,
        )

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes it to a directory, as a whole or not at all.

        Raises:
            AdapterFileError: The directory holds something else, or has been written by
                another since this was loaded from it; or writing fails.
        """
        return store.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharedSubspace:
        """Reads it from a directory, a URL that fsspec knows, or a repository of the hub.

        Raises:
            AdapterFileError: It is not one, incomplete or damaged.
        """
        return store.load(path)

    def validate(self) -> list[str]:
        """What is wrong with what is held; nothing, normally. For files: ``store.validate``."""
        return store.problems(self)


# Inside ---------------------------------------------------------------------------------------


def _cut(factors: LayerFactors, most: int) -> LayerFactors:
    """Factors of at most that rank, the nearest ones."""
    d_out, d_in = factors.B.shape[0], factors.A.shape[1]
    if 0 < factors.rank <= most:
        return factors
    if not factors.rank:
        return LayerFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
    spectrum = Product(factors.B.to(torch.float64), factors.A.to(torch.float64)).spectrum()
    made = spectrum.factors(max(1, min(most, spectrum.useful)), 1.0)
    return LayerFactors(made["A"], made["B"])


def _distances(old: Layer, new: Layer, count: int) -> Tensor:
    """‖ΔŴ − ΔŴ'‖² of the first adapters [count], float64."""
    before, after = ((x, x.up.unpack(), x.down.unpack()) for x in (old, new))
    found = torch.zeros(count, dtype=torch.float64)
    for n in range(count):
        if old.has(n):
            was, now = (x.rows(n, up, down) for x, up, down in (before, after))
            found[n] = share.distance(*was, *now)
    return found


def _ratios(modules: Iterable[str], lost: Tensor, energy: Tensor) -> dict[str, float]:
    found = {}
    for module, gone, whole in zip(modules, lost.tolist(), energy.tolist(), strict=True):
        if whole:
            found[module] = gone / whole
    return found


def _compressed(stats: Stats) -> int:
    return stats.basis + stats.codes + stats.residuals


def _base(members: Sequence[Member]) -> BaseModel:
    """The base with the most known of it."""
    bases = [m.weights.base for m in members]
    known = [b for b in bases if b.fingerprint is not None] or [b for b in bases if b.name] or bases
    return known[0]


def _sizes(members: Sequence[Member]) -> dict[str, tuple[int, int]]:
    """Module name → (d_in, d_out), in the order of the layers."""
    found: dict[str, tuple[int, int]] = {}
    for member in members:
        for module, (d_in, d_out) in member.sizes.items():
            if module in found:
                continue
            if not d_in or not d_out:
                factors = member.factors(module)
                d_in, d_out = factors.A.shape[1], factors.B.shape[0]
            found[module] = (d_in, d_out)
    return found


def _target(
    error: float | None, variance: float | None, components: int | None, per_layer: bool
) -> Target:
    given = [
        k
        for k, v in (("error", error), ("variance", variance), ("components", components))
        if v is not None
    ]
    if len(given) > 1:
        raise ConfigError(
            "These exclude each other.", expected="one of them", got=", ".join(given), key=given[1]
        )
    if components is not None and (type(components) is not int or components < 1):
        raise ConfigError(
            "components is not usable.",
            expected="an integer of at least 1",
            got=repr(components),
            key="components",
        )
    if variance is not None:
        _share("variance", variance)
    if not given:
        error = DEFAULT_ERROR
    if error is not None:
        _share("error", error)
    return Target(error, variance, components, per_layer)


def _budget(target: Target) -> float:
    return target.error if target.error is not None else DEFAULT_ERROR


def _check_bits(bits: int | str | None) -> None:
    if bits is not None:
        codec_of(bits)


def _finished(
    build: Callable[[Target], SharedSubspace],
    measured: Callable[[SharedSubspace], None] | None,
    target: Target,
    bits: int | str | None,
    *,
    again: bool = True,
) -> SharedSubspace:
    """A fleet in so many bits; warns where adapters are beyond the budget."""
    if bits is None:
        made = build(target)
    elif target.error is None:
        made = build(target)
        made.quantize(bits)
        if measured is not None:
            measured(made)
    else:
        made = within_budget(
            lambda error: build(replace(target, error=error)),
            measured,
            target.error,
            bits,
            again=again,
        )
    made.check_budget()
    return made


def _share(name: str, value: float) -> float:
    number: object = value
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1:
        return float(number)
    raise ConfigError(f"{name} is not a share.", expected="0 to 1", got=repr(value), key=name)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name} is not usable.",
            expected=", ".join(map(repr, choices)),
            got=repr(value),
            key=name,
        )


def _warn(text: str) -> None:
    warnings.warn(text, BudgetWarning, stacklevel=3)


def _beyond(found: Projection) -> str:
    return (
        f"The subspace holds the adapter {found.id!r} with an error of {found.error:.3g} of its "
        f"squared change of the weights, above the budget of {found.budget:.3g}."
    )
