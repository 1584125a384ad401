"""How far fine-tuning turned each head and each projection: :func:`diagnose`.

For a unit u (a head's rows of q, k, v; its columns of o; a whole projection) and its
flattened weights before and after,

    θ_u = ∠(W_u, W'_u)     r_u = ‖W'_u‖ / ‖W_u‖     κ_u = ⟨W_u, W'_u⟩ / ‖W_u‖²

Source: EgoRA's rotation diagnostics, of which θ, r, the four modes, θ̄ and its verdict are
taken as published (``diagnostics.modes``); written from their description. Deviations: heads
are real heads (by the model's own layout and head size, also under grouped queries and in
fused projections), every linear layer is looked at, nothing is merged and no second model
built.

How the three sums ‖W_u‖², ⟨W_u, D_u⟩ and ‖D_u‖² of D = W' − W are found:

    adapter with exact factors, DoRA    r-wide products (``core.rotation``): no W + ΔW
    other adapters that can be fused    the layer's effective weight, in float64
    two sets of weights                 both read side by side, block by block, in float64

All angles are atan2(‖D across W‖, ‖W‖ + D along W), so that small ones do not cancel: θ is
right to 1e-6 of itself from 5e-4° to 90°. Where D is nearly along W (W scaled, and turned a
little besides), ‖D‖² less its part along W would lose digits: two sets of weights are read once
more for the rest, ‖D − (κ − 1) W‖².

What is looked at: the weights of linear layers (GPT-2's ``Conv1D`` too). Embeddings, norms
and biases have no angle worth comparing and are left out, and so are experts that a model
keeps as one stack of matrices. The output head is looked at like any layer, and left out of
all counts where it did not change (it is often the embedding once more). A quantised layer of
a model in memory is dequantised, one at a time.

The noise floor is what rounding to the storage dtype makes by itself: of W' where it is
stored; of W for an adapter, which is what fusing it would add. Of a quantised base it is that
of the dtype in which it computes.

Memory: beside the adapter, one layer's W as it is stored where there are factors, a few
megabytes where two checkpoints are compared; three times one layer in float64 for other
variants, and for spectra what ``diagnostics.spectrum`` needs.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lorasmith import __version__
from lorasmith.core import rotation as closed
from lorasmith.core.heads import HeadLayout
from lorasmith.core.layers import LayerInfo
from lorasmith.core.patterns import matches_name, matches_regex
from lorasmith.core.targets import ROLES, roles_of
from lorasmith.core.variant import Factors
from lorasmith.diagnostics.modes import change_of, mode_of
from lorasmith.diagnostics.records import (
    HeadDiversity,
    LayerSpectrum,
    RotationReport,
    Skipped,
    SkipReason,
    UnitRotation,
)
from lorasmith.errors import AdapterFileError, ConfigError, ModelError
from lorasmith.io import peft
from lorasmith.io.sources import (
    Given,
    Matrix,
    MemoryMatrix,
    Side,
    align,
    open_sides,
)
from lorasmith.io.weights import AdapterWeights, FileState, check_finite

__all__ = ["Progress", "Sums", "diagnose", "pair_sums"]

#: Called with (what is done, how many are done, how many there are).
Progress: TypeAlias = Callable[[str, int, int], None]

#: Elements that are widened to float64 at a time: on a device, and on CPU (what its cache holds).
_BLOCK = (2**24, 2**17)
_F64 = torch.float64


@torch.no_grad()
def diagnose(
    base: Given,
    tuned: Given | None = None,
    *,
    per: Literal["head", "projection"] = "head",
    spectrum: bool = False,
    diversity: bool = False,
    top: int = 10,
    intruders: bool = False,
    layers: int | Collection[int] | None = None,
    targets: str | Collection[str] | None = None,
    adapter: str | None = None,
    allow_base_mismatch: bool = False,
    progress: bool | Progress = False,
) -> RotationReport:
    """Measures what fine-tuning did to the weights. Nothing is changed.

        report = ls.diagnose(model, "my-adapter")
        report = ls.diagnose("path/to/base", "path/to/tuned")
        report.save("report.html")

    Args:
        base: What was before: a model (without the adapters that it carries), a checkpoint
            directory, an alias or hub id, or an adapter (its base with it).
        tuned: What came of it: the same kinds, and most often an adapter: a directory or hub
            id of ours or of PEFT's, a handle, or a model that carries it. By default the
            adapter that ``base`` carries, or is.
        per: ``"head"``: attention by head, the rest by projection. ``"projection"``: all by
            projection (a layer that makes q, k and v at once still in these three).
        spectrum: Also the singular values of each change.
        diversity: Also how different the heads of each projection are, before and after.
        top: With ``spectrum``: dimension of W's top subspaces; 0 leaves them out.
        intruders: With ``spectrum``: also count intruder dimensions, which is slow.
        layers: Only these transformer blocks.
        targets: Only these layers: names or their ends (``"q_proj"``), globs, ``"attention"``,
            ``"mlp"``, or ``"re:…"``.
        adapter: Which of several adapters that a model carries.
        allow_base_mismatch: Whether an adapter may have been made for another base.
        progress: Whether to draw a bar (on a terminal), or what to call after each layer.

    Raises:
        ModelError: There is no such model, it cannot be read, or the two are of different
            architectures.
        AdapterFileError: An adapter cannot be read, or does not fit the base.
        BaseMismatchError: An adapter was made for another base.
        FuseError: An adapter depends on its input, or is fused at the moment.
        ConfigError: An argument makes no sense.
    """
    start = time.perf_counter()
    if per not in ("head", "projection"):
        raise ConfigError(
            "per is not a way to cut weights into units.",
            expected='"head" or "projection"',
            got=repr(per),
            key="per",
        )
    before, after = open_sides(
        base, tuned, adapter=adapter, allow_base_mismatch=allow_base_mismatch
    )
    if after.weights is not before.weights:
        _warn_of_blocks(before, after)
    plan = _Plan(before, after, per)
    chosen = plan.select(layers, targets)
    units: list[UnitRotation] = []
    spectra: list[LayerSpectrum] = []
    heads: list[HeadDiversity] = []
    unchanged = unchanged_units = 0
    with _progress(progress) as advance:
        for i, name in enumerate(chosen):
            found = plan.measure(name)
            if isinstance(found, Skipped):
                plan.skip(found)
            elif not found.sums.changed:
                # An output head that stayed is most often the embedding, and no news.
                if name not in before.weights.heads:
                    unchanged += 1
                    unchanged_units += len(found.cut.groups)
            else:
                units += _units(found)
                if spectrum:
                    spectra.append(_spectrum(found, top, intruders))
                if diversity and found.layout is not None:
                    heads += _diversity(found, found.layout)
            del found
            if advance is not None:
                advance("layers", i + 1, len(chosen))
    sizes = Counter(layout.head_dim for layout in before.weights.layouts.values())
    return RotationReport(
        before.label,
        after.label,
        per,
        tuple(units),
        tuple(spectra),
        tuple(heads),
        head_dim=sizes.most_common(1)[0][0] if sizes else None,
        skipped=tuple(plan.skipped.values()),
        unchanged=unchanged,
        seconds=time.perf_counter() - start,
        versions={"lorasmith": __version__, "torch": str(torch.__version__)},
        unchanged_units=unchanged_units,
    )


def _warn_of_blocks(before: Side, after: Side) -> None:
    for side in (before, after):
        if side.weights.quantised:
            warnings.warn(
                f"{side.weights.label} is quantised ({', '.join(side.weights.quantised)}), and the "
                "other side is not the same file: the angles hold what quantising did to the "
                "weights (4° to 5° at 4 bits, 0.3° at 8), and the noise floor does not.",
                UserWarning,
                stacklevel=3,
            )
            return


@contextlib.contextmanager
def _progress(wanted: bool | Progress) -> Iterator[Progress | None]:
    if callable(wanted):
        yield wanted
        return
    if not wanted:
        yield None
        return
    from rich.console import Console

    from lorasmith.progress import bar

    with bar(Console(stderr=True)) as advance:
        yield advance


# What is compared with what ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """How the sums over blocks of one layer become units.

    Attributes:
        blocks: Number of equal blocks of W that are summed over.
        axis: ``"out"``: of rows; ``"in"``: of columns.
        groups: Of each unit its role, its head, and its blocks.
    """

    blocks: int
    axis: str
    groups: tuple[tuple[str | None, int | None, tuple[int, ...]], ...]


def _cut(layout: HeadLayout | None, per: str, role: str | None) -> _Cut:
    if layout is None:
        return _Cut(1, "out", ((role, None, (0,)),))
    if per == "head":
        groups = tuple((r, h, (i,)) for i, (r, h) in enumerate(layout.heads))
        return _Cut(layout.count, layout.axis, groups)
    found: dict[str, list[int]] = {}
    for i, (r, _) in enumerate(layout.heads):
        found.setdefault(r, []).append(i)
    if len(found) == 1:
        return _Cut(1, "out", ((next(iter(found)), None, (0,)),))
    return _Cut(
        layout.count, layout.axis, tuple((r, None, tuple(found[r])) for r in "qkvo" if r in found)
    )


@dataclass(frozen=True)
class Sums:
    """Of each block of W and D = W' − W, float64 [blocks].

    Attributes:
        squared: ‖W‖².
        inner: ⟨W, D⟩.
        delta: ‖D‖².
        across: ‖N‖² of N = D − (⟨W, D⟩ / ‖W‖²) W, the part of D across W; ‖D‖² where W is 0.
    """

    squared: Tensor
    inner: Tensor
    delta: Tensor
    across: Tensor

    @classmethod
    def of(cls, squared: Tensor, inner: Tensor, delta: Tensor) -> Sums:
        """With ``across`` by subtraction."""
        along = torch.where(squared > 0, inner.square() / squared, torch.zeros_like(inner))
        return cls(squared, inner, delta, (delta - along).clamp(min=0))

    def total(self, index: list[int]) -> tuple[float, float, float, float]:
        """The same four of several blocks as one."""
        squared, inner, delta, across = (
            t[index] for t in (self.squared, self.inner, self.delta, self.across)
        )
        n2, along = float(squared.sum()), float(inner.sum())
        rest = 0.0
        if n2 > 0 and len(index) > 1:
            # Blocks that are scaled differently are together turned.
            shares = torch.where(squared > 0, inner / squared, along / n2)
            rest = float((squared * (shares - along / n2).square()).sum())
        return n2, along, float(delta.sum()), float(across.sum()) + rest

    @property
    def finite(self) -> bool:
        """Whether all are numbers."""
        return all(bool(torch.isfinite(t).all()) for t in (self.squared, self.inner, self.delta))

    @property
    def changed(self) -> bool:
        """Whether anything is different."""
        return bool((self.delta > 0).any())


@dataclass
class _Found:
    """One layer, measured.

    Attributes:
        name: Of the layer in the base.
        matrix: Its weight in the base.
        weight: What gives W: as it is stored, or an effective weight where the base has an
            adapter.
        change: What gives the exact factors of the change, or W'.
        sums: Over the blocks.
        cut: What blocks mean.
        layout: Its heads.
        floor: Noise floor in radians.
    """

    name: str
    matrix: Matrix
    weight: Callable[[], Tensor]
    change: Callable[[], Factors | Tensor]
    sums: Sums
    cut: _Cut
    layout: HeadLayout | None
    floor: float


@dataclass
class _Side:
    """One side with everything under the base's names.

    Attributes:
        matrices: Layer → its weight.
        adapter: The adapter, or ``None``.
        adapted: Layer → its name in the adapter.
        replaced: Layer → name in the adapter's file of the weight that stands in for it.
        shared: What all layers of the adapter share.
    """

    matrices: Mapping[str, Matrix]
    adapter: AdapterWeights | None = None
    adapted: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def touches(self, name: str) -> bool:
        return name in self.adapted or name in self.replaced

    def state(self, name: str) -> FileState:
        assert self.adapter is not None
        own, matrix = self.adapted[name], self.matrices[name]
        info = _info(own, matrix)
        new = self.adapter.new_tensors(own, info)
        values = {**self.shared, **dict(new.trainable), **dict(new.frozen)}
        return FileState(self.adapter.config, info, values)

    def effective(self, name: str) -> Tensor:
        """W' in float64, where the adapter acts; W as it is stored elsewhere."""
        matrix = self.matrices[name]
        if name in self.replaced:
            assert self.adapter is not None
            value = self.adapter.tensors[self.replaced[name]]
            check_finite(value, self.replaced[name], self.adapter.path)
            return value.T if matrix.transposed else value
        weight = matrix.read()
        if name not in self.adapted:
            return weight
        assert self.adapter is not None
        wide = weight.to(_F64)
        state = self.state(name)
        moved = FileState(
            state.config, state.info, {n: t.to(wide.device, _F64) for n, t in state.values.items()}
        )
        return self.adapter.variant.effective_weight(moved, wide).detach()


def _info(name: str, matrix: Matrix) -> LayerInfo:
    info = matrix.info
    return LayerInfo(name, info.d_in, info.d_out, info.kind, False, False)


class _Plan:
    """Which layer is compared with which, and how."""

    def __init__(self, before: Side, after: Side, per: str) -> None:
        self.per = per
        self.source = before.weights
        self.same = after.weights is before.weights
        #: By name; the first reason counts.
        self.skipped: dict[str, Skipped] = {}
        for problem in before.weights.problems.values():
            self._skip(problem.name, problem.reason, problem.message)
        self.layouts = before.weights.layouts
        names = list(before.weights.layers)
        if self.same:
            matrices: dict[str, Matrix] = dict(before.weights.layers)
        else:
            matrices = self._match(before, after)
        self.base = self._side(before, before.weights.layers, names)
        self.tuned = self._side(after, matrices, names)

    def skip(self, one: Skipped) -> None:
        """Notes that a layer is not compared."""
        self.skipped.setdefault(one.name, one)

    def _skip(self, name: str, reason: SkipReason, message: str) -> None:
        self.skip(Skipped(name, reason, message))

    def _match(self, before: Side, after: Side) -> dict[str, Matrix]:
        """The tuned side's weights under the base's names."""
        ours, theirs = before.weights, after.weights
        names = align(list(ours.layers), list(theirs.layers))
        found = {}
        for name, other in names.items():
            mine, matrix = ours.layers[name], theirs.layers[other]
            shapes = (mine.d_out, mine.d_in), (matrix.d_out, matrix.d_in)
            if shapes[0] != shapes[1]:
                both = f"{list(shapes[0])} and {list(shapes[1])}"
                self._skip(name, "shape", f"shapes differ: {both}")
            elif self.per == "head" and self.layouts.get(name) != theirs.layouts.get(other):
                self._skip(name, "heads", "the two models cut it into heads differently")
            else:
                found[name] = matrix
        for name in ours.layers:
            if name not in names:
                why = theirs.problems.get(name)
                if why is None:
                    self._skip(name, "missing", "the tuned side has no such layer")
                else:
                    self._skip(name, why.reason, f"tuned side: {why.message}")
        reached = set(names.values())
        for other in theirs.layers:
            if other not in reached:
                self._skip(other, "extra", "the base has no such layer")
        for name, problem in theirs.problems.items():
            self._skip(name, problem.reason, f"tuned side: {problem.message}")
        if 2 * len(found) < max(len(ours.layers), len(theirs.layers)):
            examples = [f"{s.name}: {s.message}" for s in list(self.skipped.values())[:3]]
            raise ModelError(
                "The two are of different architectures: most of their layers do not match.",
                expected=f"the {len(ours.layers)} linear layers of {before.label}",
                got=f"{len(found)} of them in {after.label}; " + "; ".join(examples),
                fix="compare a model with what was fine-tuned from it",
            )
        return found

    def _side(self, side: Side, matrices: Mapping[str, Matrix], names: list[str]) -> _Side:
        adapter = side.adapter
        if adapter is None:
            return _Side(matrices)
        found = align(list(adapter.modules), names)
        for module in adapter.modules:
            if module not in found:
                raise AdapterFileError(
                    "The adapter has tensors for a layer that the model does not have.",
                    file=adapter.path,
                    key=module,
                    got=side.weights.label,
                    expected=f"e.g. {names[0]}",
                    fix="pass the model that it was made for",
                )
        adapted = {b: a for a, b in found.items() if b in matrices}
        infos = [_info(a, matrices[b]) for b, a in adapted.items()]
        for info in infos:
            adapter.check_shapes(info)
        adapter.check_shared(infos)
        replaced = {}
        for module, leaves in adapter.saved_modules.items():
            for leaf in leaves:
                layer, _, last = f"{module}.{leaf}".rpartition(".")
                name = align([layer], names).get(layer) if last == "weight" else None
                if name is None or name not in matrices:
                    continue
                key = f"{peft.PREFIX}{module}.{leaf}"
                if adapter.tensors.shape(key) != matrices[name].stored_shape:
                    self._skip(name, "shape", "the adapter replaces it by one of another shape")
                    continue
                replaced[name] = key
        for key in adapter.unexpected:
            self._skip(
                key, "unexplained", "a tensor that the adapter's configuration does not explain"
            )
        shared = adapter.shared_tensors(infos)
        return _Side(matrices, adapter, adapted, replaced, shared)

    def select(
        self, layers: int | Collection[int] | None, targets: str | Collection[str] | None
    ) -> list[str]:
        """Names of the layers to measure, in the base's order.

        Raises:
            ConfigError: If none is left.
        """
        blocks = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        wanted = None if targets is None else [targets] if isinstance(targets, str) else [*targets]
        known = [n for n in self.source.layers if n in self.tuned.matrices]

        def asked(name: str) -> bool:
            return (blocks is None or _block(name) in blocks) and (
                wanted is None or any(self._named(name, w) for w in wanted)
            )

        chosen = [name for name in known if asked(name) and name not in self.skipped]
        self.skipped = {name: one for name, one in self.skipped.items() if asked(name)}
        if not chosen:
            raise ConfigError(
                "No layer is left to look at.",
                expected=", ".join(sorted({n.rpartition(".")[2] for n in known})),
                got=f"layers={layers!r}, targets={targets!r}",
                fix="loosen layers or targets",
                key="targets" if wanted is not None else "layers",
            )
        return chosen

    def _named(self, name: str, wanted: str) -> bool:
        if wanted == "all-linear":
            return name not in self.source.heads
        if wanted in ROLES:
            return wanted in roles_of(LayerInfo(name, 0, 0, "linear", False, False), None)
        if wanted.startswith("re:"):
            return matches_regex(wanted[3:], name)
        return matches_name(wanted, name)

    def measure(self, name: str) -> _Found | Skipped:
        """One layer, or why it cannot be compared."""
        mine, theirs = self.base.matrices[name], self.tuned.matrices[name]
        layout = self.layouts.get(name)
        cut = _cut(layout, self.per, _role(mine.info))
        stored = theirs.dtype if theirs is not mine else mine.dtype
        floor = closed.noise_floor(stored)

        def weight() -> Tensor:
            return self.base.effective(name)

        def change() -> Factors | Tensor:
            return self.tuned.effective(name)

        touched = self.base.touches(name) or self.tuned.touches(name)
        if not touched and theirs is mine:
            zero = torch.zeros(cut.blocks, dtype=_F64)
            sums = Sums(zero + 1, zero, zero, zero)
        elif not touched:
            sums = pair_sums(mine, theirs, cut.blocks, cut.axis)
        else:
            plain = name in self.tuned.adapted and not self.base.touches(name)
            # A copy of the base on the other side is the base: factors suffice there too.
            factors = self._factors(name) if plain and _equal(mine, theirs) else None
            if factors is not None:
                sums = _closed_form(mine.read(), *factors, cut)
                if factors[0].exact:
                    exact = factors[0]

                    def change() -> Factors | Tensor:
                        return exact
            else:
                one, other = self.base.effective(name), self.tuned.effective(name)
                pair = MemoryMatrix(name, one), MemoryMatrix(name, other)
                sums = pair_sums(*pair, cut.blocks, cut.axis)
        if not sums.finite:
            return Skipped(name, "not_finite", "it holds values that are not finite")
        return _Found(name, mine, weight, change, sums, cut, layout, floor)

    def _factors(self, name: str) -> tuple[Factors, Tensor | None] | None:
        """The factors of the tuned side's adapter, and DoRA's magnitude, where they are all."""
        adapter = self.tuned.adapter
        assert adapter is not None
        state = self.tuned.state(name)
        found = adapter.variant.factors(state)
        if found is None:
            return None
        if found.exact:
            return found, None
        if adapter.variant.name == "dora":
            return found, state["magnitude"]
        return None


def _block(name: str) -> int | None:
    """Index of the transformer block, the first number in the name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _role(info: LayerInfo) -> str | None:
    """What a layer makes that is not cut into heads."""
    return "mlp" if "mlp" in roles_of(info, None) else None


# Sums -------------------------------------------------------------------------------------------


def _closed_form(weight: Tensor, factors: Factors, magnitude: Tensor | None, cut: _Cut) -> Sums:
    def here(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(weight.device)

    A, B = factors.A.detach().to(weight.device), factors.B.detach().to(weight.device)
    found = closed.rotation(
        weight,
        A,
        B,
        factors.scaling,
        A0=here(factors.A0),
        B0=here(factors.B0),
        units=cut.blocks,
        axis=cut.axis,
        magnitude=here(magnitude),
    )
    return Sums.of(found.squared.cpu(), found.inner.cpu(), found.delta.clamp(min=0).cpu())


def _rows(matrix: Matrix) -> int:
    return max(1, _BLOCK[1] // max(1, matrix.stored_shape[1]))


def _equal(one: Matrix, other: Matrix) -> bool:
    """Whether two weights are the same, bit for bit."""
    if one is other:
        return True
    if (one.transposed, one.dtype) != (other.transposed, other.dtype):
        return False
    rows = _rows(one)
    blocks = zip(one.blocks(rows), other.blocks(rows), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in blocks)


def pair_sums(one: Matrix, other: Matrix, blocks: int, axis: str) -> Sums:
    """The sums of two weights of equal shape, read side by side.

    Args:
        one: W.
        other: W'.
        blocks: Number of equal blocks.
        axis: ``"out"``: blocks of rows of W [d_out, d_in]; ``"in"``: of columns.
    """
    if one.transposed != other.transposed:
        one, other = MemoryMatrix(one.name, one.read()), MemoryMatrix(one.name, other.read())
    by_rows = (axis == "out") != one.transposed
    totals = torch.zeros(3, blocks, dtype=_F64)
    for x, y, first in _differences(one, other):
        for i, (u, v) in enumerate(((x, x), (x, y), (y, y))):
            _add(totals[i], u, v, first, one.stored_shape[0], by_rows)
    found = Sums.of(*totals)
    if not bool((found.across < _ALONG * found.delta).any()):
        return found
    across = torch.zeros(blocks, dtype=_F64)
    share = torch.where(found.squared > 0, found.inner / found.squared, 0.0)
    for x, y, first in _differences(one, other):
        if by_rows:
            size = one.stored_shape[0] // blocks
            lines = torch.arange(first, first + x.shape[0]) // size
            y.addcmul_(x, share[lines][:, None], value=-1)
        else:
            y.addcmul_(x, share.repeat_interleave(x.shape[1] // blocks), value=-1)
        _add(across, y, y, first, one.stored_shape[0], by_rows)
    return Sums(found.squared, found.inner, found.delta, across)


#: Below this share of ‖D‖² across W, the difference that gives it has lost four digits of the
#: fourteen that the sums have.
_ALONG = 1e-4


def _differences(one: Matrix, other: Matrix) -> Iterator[tuple[Tensor, Tensor, int]]:
    """W and D in float64 by blocks of stored rows, and the first row; good until the next."""
    count, columns = one.stored_shape
    rows = _rows(one)
    w, d = (torch.empty(min(rows, count), columns, dtype=_F64) for _ in range(2))
    first = 0
    for a, b in zip(one.blocks(rows), other.blocks(rows), strict=True):
        x, y = w[: a.shape[0]], d[: a.shape[0]]
        x.copy_(a)
        y.copy_(b)
        y.sub_(x)
        yield x, y, first
        first += a.shape[0]


def _add(total: Tensor, x: Tensor, y: Tensor, first: int, count: int, by_rows: bool) -> None:
    """Adds ⟨X, Y⟩ of each block: of stored rows ``first``, … out of ``count``, or of columns."""
    if not by_rows:
        total += (x * y).sum(dim=0).view(total.shape[0], -1).sum(dim=1)
        return
    size, place = count // total.shape[0], 0
    while place < x.shape[0]:
        block = (first + place) // size
        end = min(x.shape[0], (block + 1) * size - first)
        total[block] += torch.dot(x[place:end].view(-1), y[place:end].view(-1))
        place = end


# Records ----------------------------------------------------------------------------------------


def _units(found: _Found) -> Iterator[UnitRotation]:
    projection = found.name.rpartition(".")[2]
    size = found.matrix.d_out * found.matrix.d_in // found.cut.blocks
    for role, head, members in found.cut.groups:
        total = found.sums.total(list(members))
        yield _unit(found, projection, role, head, size * len(members), *total)


def _unit(
    found: _Found,
    projection: str,
    role: str | None,
    head: int | None,
    parameters: int,
    squared: float,
    inner: float,
    delta: float,
    across: float,
) -> UnitRotation:
    if squared > 0:
        norm = math.sqrt(squared)
        theta = math.degrees(math.atan2(math.sqrt(across), norm + inner / norm))
        ratio = math.sqrt(max(0.0, squared + 2 * inner + delta) / squared)
        kept = 1.0 + inner / squared
        relative = math.sqrt(delta / squared)
        novel = math.sqrt(across / squared)
    else:
        # Nothing was there: nothing could be lost, and there is no direction to turn from.
        theta, kept = 0.0, 1.0
        ratio, relative, novel = (math.inf,) * 3 if delta > 0 else (1.0, 0.0, 0.0)
    return UnitRotation(
        found.name,
        _block(found.name),
        projection,
        role,
        head,
        parameters,
        theta,
        ratio,
        kept,
        relative,
        math.degrees(found.floor),
        mode_of(theta, ratio),
        change_of(kept, novel, found.floor, parameters),
        math.sqrt(squared),
    )


def _spectrum(found: _Found, top: int, intruders: bool) -> LayerSpectrum:
    from lorasmith.diagnostics.spectrum import layer_spectrum

    weight, change = found.weight(), found.change()
    if isinstance(change, Tensor):
        change = change.to(weight.device)
    return layer_spectrum(
        weight,
        change,
        name=found.name,
        layer=_block(found.name),
        projection=found.name.rpartition(".")[2],
        top=min(top, *weight.shape),
        intruders=intruders,
    )


def _diversity(found: _Found, layout: HeadLayout) -> list[HeadDiversity]:
    from lorasmith.diagnostics.diversity import head_diversity

    weight, change = found.weight(), found.change()
    if isinstance(change, Tensor):
        change = change.to(weight.device)
    records: list[Any] = head_diversity(
        weight,
        change,
        layout,
        name=found.name,
        layer=_block(found.name),
        projection=found.name.rpartition(".")[2],
    )
    return records
