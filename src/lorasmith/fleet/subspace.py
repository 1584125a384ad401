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

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lorasmith.errors import UnknownNameError
from lorasmith.fleet import (
    absorbing,
    accounting,
    admission,
    fitting,
    making,
    options,
    quantizing,
    reconstruction,
    store,
)
from lorasmith.fleet.building import FixedGauge, Gauge, Progress, Target
from lorasmith.fleet.codes import Code, Layer
from lorasmith.fleet.members import (
    LayerFactors,
    Member,
    MemberRecord,
    Source,
    open_members,
    unknown_id,
)
from lorasmith.fleet.options import DEFAULT_ERROR, MEMORY, Basis
from lorasmith.fleet.records import Absorbed, Adapter, BudgetWarning, Projection, Quantized, Stats
from lorasmith.fleet.residuals import Part
from lorasmith.fleet.stacks import Stacks
from lorasmith.fleet.streaming import JointStream, Stream
from lorasmith.io.weights import AdapterWeights, BaseModel

__all__ = [
    "Absorbed",
    "Basis",
    "BudgetWarning",
    "Projection",
    "Quantized",
    "SharedSubspace",
    "Stats",
]


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
        target = options.target_of(error, variance, components, per_layer)
        options.check_bits(bits)
        options.check_choice("basis", basis, options.BASES)
        options.check_choice("core", core, options.CORES)
        options.check_gauge(gauge)
        members = open_members(
            sources, ids, allow_base_mismatch=allow_base_mismatch, progress=progress
        )
        sizes = making.sizes_of(members)
        stacks = Stacks(members, list(sizes), sizes, memory=memory, progress=progress)
        base, budget = making.base_of(members), options.budget_of(target)

        def build(aim: Target) -> SharedSubspace:
            made, adapters = making.built(
                stacks,
                aim,
                basis,
                relative=relative,
                sweeps=sweeps,
                diagonal=core == "diagonal",
                gauge=gauge,
            )
            return cls(basis, made.layers, adapters, base=base, budget=budget, gauge=made.gauge)

        def measured(whole: SharedSubspace) -> None:
            with torch.no_grad():
                quantizing.measure(whole._layers, whole._adapters, members)

        return making.finished(build, measured, target, bits)

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
        target = options.target_of(error, components=components)
        options.check_bits(bits)
        options.check_choice("basis", basis, options.BASES)
        stream, budget = Stream(sources, ids, allow_base_mismatch), options.budget_of(target)

        def tell(done: int) -> None:
            if progress is not None:
                progress("errors", done, stream.total)

        def measured(whole: SharedSubspace) -> None:
            making.measure_stream(whole._layers, whole._adapters, stream, block, tell)

        true = measured if stream.again else None
        if basis == "share":

            def absorbed(aim: Target) -> SharedSubspace:
                first = partial(cls.from_adapters, basis="share")
                whole = making.in_blocks(
                    first, stream, aim, block, true, progress, allow_base_mismatch
                )
                whole.budget = budget
                return whole

            return making.finished(absorbed, true, target, bits, again=stream.again)
        made = JointStream(
            max(most, components or 0),
            keep=components,
            relative=relative,
            once=not stream.again,
        )
        records = making.passed(stream, made, block, progress)

        def build(aim: Target) -> SharedSubspace:
            built, adapters = making.cut(made, records, aim, progress)
            return cls(basis, built.layers, adapters, base=stream.base, budget=budget)

        return making.finished(build, true, target, bits)

    def inherit(self, other: SharedSubspace) -> None:
        """Adds to :attr:`errors` what another subspace had lost that this one was made from.

        For a fleet that is compressed again: its adapters are those rebuilt from the other
        one, and errors are bounds then, to what both of them had at first. Warns
        (:class:`BudgetWarning`) if that is beyond the budget.

        Args:
            other: The subspace that the adapters were rebuilt from, under the same ids.
        """
        accounting.inherit(self.modules, self._adapters, other.modules, other._adapters)
        self.check_budget()

    def check_budget(self) -> None:
        """Warns (:class:`BudgetWarning`) if adapters are beyond the budget, as far as is known."""
        text = accounting.over_budget(self._adapters, self.budget)
        if text is not None:
            _warn(text)

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
        return self._layers[0].width if self._layers else 1

    @property
    def errors(self) -> dict[str, float]:
        """Id → relative squared error of ΔW; see the module."""
        return {a.id: a.error for a in self._adapters}

    def layer_errors(self, id: str) -> dict[str, float]:  # noqa: A002 - its name
        """Module name → relative squared error of one adapter there."""
        adapter = self._adapters[self._number(id)]
        return accounting.ratios(self.modules, adapter.lost, adapter.energy)

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
        raise unknown_id("The subspace holds no adapter of that id.", id, self.ids, key="id")

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
        allowed = self.budget if budget is None else options.check_share("budget", budget)
        with torch.no_grad():
            parts = fitting.project(self._layers, member, self.basis, self.gauge)
        found = accounting.projected(member.id, parts, allowed)
        if not found.within:
            _warn(accounting.beyond(found) + " add(…, error=…) keeps the rest as a residual.")
        return found

    def add(
        self,
        source: Source,
        id: str | None = None,  # noqa: A002
        *,
        error: float | None = None,
        allow_base_mismatch: bool = False,
        progress: Progress | None = None,
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
            progress: Called with (phase, done, total).

        Raises:
            ConfigError: The id is taken, or ``error`` is no share.
            BaseMismatchError: It belongs to another base model.
        """
        allowed = self.budget if error is None else options.check_share("error", error)
        member = self._open(source, id, allow_base_mismatch)
        admission.check_new(member.id, self.ids)
        with torch.no_grad():
            parts = fitting.project(self._layers, member, self.basis, self.gauge, progress=progress)
            parts, codec = fitting.within_budget(self._layers, parts, allowed)
            for layer in self._layers:
                layer.recode(residual_up=codec, residual_down=codec)
        return self._insert(member, parts, allowed)

    def _insert(self, member: Member, parts: Mapping[str, Part], allowed: float) -> Projection:
        """Puts a projected adapter in; what can fail has been done before."""
        none = torch.zeros(0, dtype=torch.float64)
        adapter = accounting.entry(member, none, none)
        for module, part in parts.items():
            if part.layer is None:
                self._new_layer(module, member.sizes[module])
        energy, gone = fitting.insert(self._layers, parts)
        self._adapters.append(replace(adapter, energy=energy, lost=gone))
        made = accounting.projection(self._layers, self._adapters, len(self) - 1, allowed)
        if not made.within:
            _warn(accounting.beyond(made, self._layers[0].residual_up.codec))
        return made

    def _new_layer(self, module: str, sizes: tuple[int, int]) -> None:
        """A layer that no adapter had so far, (d_in, d_out): an empty basis."""
        like = self._layers[0] if self._layers else None
        layer = fitting.blank(module, sizes, self.basis, like, len(self))
        if like is not None:
            layer.recode(**fitting.codecs_of(like))
        self._layers.append(layer)
        for adapter in self._adapters:
            adapter.energy = torch.cat((adapter.energy, adapter.energy.new_zeros(1)))
            adapter.lost = torch.cat((adapter.lost, adapter.lost.new_zeros(1)))

    def _open(self, source: Source, id: str | None, allow_base_mismatch: bool) -> Member:  # noqa: A002
        """The one adapter that a source stands for, of the same base model."""
        one = admission.open_one(source, id, allow_base_mismatch=allow_base_mismatch)
        admission.check_base(one, self.base, self._layers, allow_base_mismatch=allow_base_mismatch)
        return one

    # -- taking adapters out -----------------------------------------------------------------

    def remove(self, id: str) -> None:  # noqa: A002
        """Takes an adapter out; basis and other adapters stay as they are."""
        number = self._number(id)
        for layer in self._layers:
            layer.drop(number)
        del self._adapters[number]

    def factors(self, id: str) -> dict[str, LayerFactors]:  # noqa: A002
        """Module name → factors of what is held of an adapter, core and residual together."""
        return reconstruction.factors(self._layers, self._number(id))

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
        options.check_rank(rank)
        number = self._number(id)
        return reconstruction.reconstruct(self._layers, number, self._adapters[number], rank, dtype)

    # -- extending the basis -----------------------------------------------------------------

    def absorb(
        self,
        sources: Source | Sequence[Source] | Mapping[str, Source],
        ids: Sequence[str] | None = None,
        *,
        error: float | None = None,
        components: int | None = None,
        allow_base_mismatch: bool = False,
        progress: Progress | None = None,
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
            progress: Called with (phase, done, total).
        """
        allowed = self.budget if error is None else options.check_share("error", error)
        members = open_members(sources, ids, allow_base_mismatch=allow_base_mismatch)
        for member in members:
            admission.check_base(
                member, self.base, self._layers, allow_base_mismatch=allow_base_mismatch
            )
            admission.check_new(member.id, self.ids)
        before = {layer.module: layer.ranks for layer in self._layers}
        old = len(self._adapters)
        with self._whole_or_not_at_all(), torch.no_grad():
            for member in members:
                for module in member.modules:
                    if module not in self.modules:
                        self._new_layer(module, member.sizes[module])
            zeros = torch.zeros(len(self._layers), dtype=torch.float64)
            entering = [accounting.entry(m, zeros.clone(), zeros.clone()) for m in members]
            self._layers, moved, rounded = absorbing.absorb(
                self._layers,
                self._adapters,
                entering,
                members,
                allowed,
                components,
                basis=self.basis,
                gauge=self.gauge,
                progress=progress,
            )
            report = accounting.enter(self._adapters, moved[:old])
            for n, adapter in enumerate(entering, start=old):
                adapter.lost = moved[n].clone()
            self._adapters = [*self._adapters, *entering]
            if rounded:
                quantizing.measure(self._layers, self._adapters, members, old)
        added = tuple(
            accounting.projection(self._layers, self._adapters, n, allowed)
            for n in range(old, len(self._adapters))
        )
        for record in added:
            if not record.within:
                _warn(accounting.beyond(record))
        ranks = {
            layer.module: (before.get(layer.module, (0, 0)), layer.ranks) for layer in self._layers
        }
        return Absorbed(added, report, ranks)

    @contextlib.contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Puts layers and adapters back if something fails, e.g. a value that is not finite."""
        layers, adapters = list(self._layers), list(self._adapters)
        figures = [(a.energy, a.lost) for a in adapters]
        try:
            yield
        except BaseException:
            self._layers, self._adapters = layers, adapters
            for adapter, (energy, lost) in zip(adapters, figures, strict=True):
                adapter.energy, adapter.lost = energy, lost
            raise

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
        admission.check_new(id, self.ids)
        codes = {
            module: fitting.given(self._layer(module), core, self.basis)
            for module, core in cores.items()
        }
        energy = fitting.insert_codes(self._layers, codes)
        carried = {k: v.detach().clone() for k, v in (rest or {}).items()}
        nbytes = accounting.original_bytes(record, carried.values())
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
        fitting.extend(self._layer(module), up, down)

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
        loadings = self.basis == "share"
        wanted = options.codecs_of(bits, basis, codes, residuals, loadings=loadings)
        before = self.stats()
        moved = torch.zeros(len(self), len(self._layers), dtype=torch.float64)
        with torch.no_grad():
            for place, layer in enumerate(self._layers):
                moved[:, place] = quantizing.requantise(layer, wanted)
        report = accounting.enter(self._adapters, moved)
        after = self.stats()
        return Quantized(accounting.compressed(before), accounting.compressed(after), report)

    def measure(self, source: Source, id: str, *, allow_base_mismatch: bool = False) -> Projection:  # noqa: A002
        """The true error of an adapter, by comparing with the original; kept in ``errors``.

        Args:
            source: The original.
            id: Under which id it is held.
            allow_base_mismatch: Whether it may name another base model.
        """
        number = self._number(id)
        member = self._open(source, id, allow_base_mismatch)
        held = [layer.module for layer in self._layers if layer.has(number)]
        admission.check_same_layers(member, held, id)
        quantizing.measure(self._layers, self._adapters, [member], number)
        return accounting.projection(self._layers, self._adapters, number, self.budget)

    def stats(self) -> Stats:
        """Bytes of everything that is held."""
        return accounting.stats(self._layers, self._adapters, self._disk)

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


def _warn(text: str) -> None:
    warnings.warn(text, BudgetWarning, stacklevel=3)
