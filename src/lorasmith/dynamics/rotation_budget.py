"""Rotation budget: no head, or no projection, is turned by more than so many degrees.

    θ_u = ∠(W_u, W_u + ΔW_u) ≤ θ_max     for every watched unit u, after every step

A unit is a head's part of an attention projection (rows of q, k, v; columns of o; see
``core.heads``), or a whole projection; ``core.rotation`` has the formulas. The idea is that
what a model forgets grows with how far its weights turn (EgoRA's θ̄); here it is a bound
instead of a diagnosis. EgoRA has no such rule.

**Projection** (default): a unit beyond the budget has its ΔW_u scaled back to it, with the
largest c that is allowed, in closed form. What is written is the rows of B that make the
unit (for o: the columns of A). The other factor is shared between heads and stays, and so
does everything of a unit within its budget. Adam's moments are left alone, as in projected
gradient descent: a step that wants out again is taken back again. As the last of several
rules it is a guarantee; the gauge constraint A Aᵀ = μ Bᵀ B then holds up to the last c.

* With a frozen part (ΔW = s (B A − B0 A0)) there is nothing to scale: the layer's A and B
  move back towards A0 and B0 on a straight line, all its units alike.
* With DoRA, θ is that of diag(m / c) (W + ΔW), and m moves back with B: by head for q, k, v,
  and for all heads alike in o, whose columns share m.

**Penalty**: adds the gradient of  weight · Σ_u max(0, (θ_u − θ_max) / θ_max)²  once a step.
A pull, not a guarantee. The entropy governor can set its weight.

Rounding. The bound holds for the factors as they are written: units are brought to
θ_max (1 − 2⁻¹³), and on CPU looked at again afterwards; 16-bit factors are brought down by
their own precision. On other devices the second look is at 16-bit factors only, since none
may read a value back. Fused into a 16-bit weight, rounding alone turns a unit by the dtype's
noise floor (0.09° in bfloat16), about √(θ² + floor²) in all: a budget below it draws a
warning.

Cost: on CPU, r-wide products for ‖ΔW_u‖, and W Aᵀ of those layers alone for which
‖ΔW_u‖ > ‖W_u‖ sin θ_max. On other devices, where to ask would stall, W Aᵀ of all. A quantised
W is dequantised for it, one layer at a time, which is slow.

Limits: the angle is to the layer's own W. PEFT's PiSSA, OLoRA and the like move a part of W
into the adapter, and then it says nothing: refused. Where several adapters act together, each
has its own budget.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lorasmith.core.heads import HeadLayout, head_layout
from lorasmith.core.layers import read_weight
from lorasmith.core.lowrank import no_autocast
from lorasmith.core.rotation import (
    Path,
    change_bound,
    inner_factor,
    inner_terms,
    largest_fraction,
    largest_scale,
    make_path,
    noise_floor,
    product_dtype,
    squared_norms,
    wide_product,
)
from lorasmith.dynamics.protocol import Dynamic, Site, Step
from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.dynamics.context import Context

__all__ = ["RotationBudget"]

#: By how much a unit is brought below its budget: float32 rounding of the factors, and some.
_MARGIN = 2.0**-13
#: What an error of float32's W Aᵀ may hide; see ``rotation.angle``.
_SLACK = 1e-5
#: Elements of the factors that are worked on at once, in float64.
_TOGETHER = 2**23
#: PEFT's ``init_lora_weights`` that leave W changed, so that B A ≠ 0 is the identity.
_MOVES_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class _Watched:
    """One site, with how it is cut into units and what is kept of its weight."""

    site: Site
    layout: HeadLayout | None
    squared: Tensor | None = None
    version: tuple[int, ...] = field(default=())

    @property
    def units(self) -> int:
        return 1 if self.layout is None else self.layout.count

    @property
    def transposed(self) -> bool:
        """Whether units are rows of Wᵀ."""
        return self._by_columns and self.site.magnitude is None

    @property
    def columns(self) -> bool:
        """Whether units are columns of W, and W cannot be transposed: m is of its rows."""
        return self._by_columns and self.site.magnitude is not None

    @property
    def _by_columns(self) -> bool:
        return self.layout is not None and self.layout.axis == "in"

    @property
    def parts(self) -> int:
        return self.units if self.columns else 1

    def weight(self) -> Tensor:
        base = self.site.factors.base
        assert base is not None
        weight = base.weight
        return weight.T if self.transposed else weight

    def norms(self) -> Tensor:
        """Squared norms of the rows [d_out], or [units, d_out]; kept while W is the same."""
        base = self.site.factors.base
        assert base is not None
        if self.squared is None or self.version != base.weight_version:
            weight = self.weight()
            squared = squared_norms(weight, self.parts).to(self.site.A.device)
            self.squared = squared if self.columns else squared[0]
            self.version = base.weight_version
        return self.squared

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A, B, A0 and B0 of Wᵀ where it is transposed."""
        f = self.site.factors
        if not self.transposed:
            return f.A, f.B, f.A0, f.B0
        b0 = None if f.B0 is None else f.B0.T
        return f.B.T, f.A.T, b0, None if f.A0 is None else f.A0.T

    def group(self) -> tuple[Any, ...]:
        """What the sites of one batched call have in common."""
        A, B, A0, _ = self.factors()
        scaling, dora = self.site.scaling, self.site.magnitude is not None
        shape = (*A.shape, B.shape[0], self.units, self.transposed, self.columns)
        return (*shape, scaling, A0 is None, dora, A.device, A.dtype, B.dtype)


class _Batch:
    """Sites of equal shape, whose small tensors are worked on together in float64."""

    def __init__(self, members: Sequence[_Watched]) -> None:
        self.members = list(members)
        first = members[0]
        parts = [m.factors() for m in members]
        f64 = torch.float64
        self.A = torch.stack([p[0].detach() for p in parts]).to(f64)
        self.B = torch.stack([p[1].detach() for p in parts]).to(f64)
        a0, b0 = [p[2] for p in parts], [p[3] for p in parts]
        frozen = a0[0] is not None
        self.A0 = torch.stack(cast("list[Tensor]", a0)).to(f64) if frozen else None
        self.B0 = torch.stack(cast("list[Tensor]", b0)).to(f64) if frozen else None
        m = [w.site.magnitude for w in members]
        dora = m[0] is not None
        self.m = torch.stack([cast("Tensor", x).detach() for x in m]).to(f64) if dora else None
        self.squared = torch.stack([w.norms() for w in members])
        self.columns, self.units, self.scaling = first.columns, first.units, first.site.scaling

    def track(self) -> None:
        """Makes A, B and m leaves of which gradients can be taken."""
        for tensor in (self.A, self.B, self.m):
            if tensor is not None:
                tensor.requires_grad_(True)

    def path(self, wide: Tensor | None) -> Path:
        return make_path(
            self.squared,
            self.A,
            self.B,
            self.scaling,
            wide,
            A0=self.A0,
            B0=self.B0,
            units=self.units,
            magnitude=self.m,
            columns=self.columns,
        )

    def select(self, index: Sequence[int]) -> _Batch:
        """Some of the members."""
        part = copy.copy(self)
        part.members = [self.members[i] for i in index]
        rows = torch.tensor(index, device=self.A.device)
        for name in ("A", "B", "A0", "B0", "m", "squared"):
            tensor = getattr(self, name)
            setattr(part, name, None if tensor is None else tensor[rows])
        return part

    def completed(self, path: Path, wide: Tensor) -> Path:
        """``path(wide)``, of a ``path(None)``."""
        by_row = self.m is not None
        inner = inner_terms(
            self.B,
            self.scaling,
            wide,
            B0=self.B0,
            units=self.units,
            by_row=by_row,
            columns=self.columns,
        )
        return path.with_inner(inner)

    def rounding(self) -> Tensor:
        """Bound of ‖rounding error of ΔW_u‖ / ‖W_u‖ for factors written once: [n, units].

        An error of relative size ε / 2 in every entry of B moves ΔW_u by at most
        s ε / 2 ‖B_u‖ ‖A‖; with DoRA likewise, and m by ε / 2 of ‖W_u‖ or so.
        """
        first = self.members[0].site
        eps = max(torch.finfo(t.dtype).eps for t in (first.A, first.B))
        n, units = len(self.members), self.units
        b = self.B.square().sum(dim=2)
        b = b.view(n, units, -1).sum(dim=2) if not self.columns else b.sum(dim=1, keepdim=True)
        size = self.scaling * (b.sqrt() * self.A.square().sum(dim=(1, 2)).sqrt()[:, None])
        norms = self.squared if self.columns else self.squared.view(n, units, -1)
        length = norms.sum(dim=-1).sqrt()
        return eps / 2 * (size / length + (0.0 if self.m is None else 2.0))

    def wide(self) -> Tensor:
        """W Lᵀ of every member; each weight is read once, one at a time."""
        low = inner_factor(self.A, self.A0)
        found = []
        for member, factor in zip(self.members, low, strict=True):
            weight = member.weight()
            factor = factor.to(weight.device)
            dtype = product_dtype(weight)
            found.append(wide_product(weight, factor, member.parts, dtype).to(low.device))
        return torch.stack(found)


class RotationBudget(Dynamic):
    """Keeps every head, or every projection, within ``max_deg`` degrees of where it was.

    Args:
        max_deg: θ_max in degrees, above 0 and below 90.
        per: ``"head"``: every head of q, k, v and o where the model's layout is known, and
            every other projection as a whole. ``"projection"``: every projection.
        kind: ``"projection"``: a bound that holds after every step. ``"penalty"``: a
            gradient that pulls back what is beyond.
        weight: Factor on the penalty; it is 1 for one unit at twice its budget.

    Raises:
        ConfigError: A value is out of range; when bound: a layer whose weight is not known, or
            whose weight is not where rotation is to be measured from.
    """

    name: ClassVar[str] = "budget"

    def __init__(
        self,
        max_deg: float = 5.0,
        per: Literal["head", "projection"] = "head",
        kind: Literal["projection", "penalty"] = "projection",
        weight: float = 1.0,
    ) -> None:
        _check_number("max_deg", max_deg, 90, "above 0 and below 90 degrees")
        _check_number("weight", weight, math.inf, "above 0")
        for key, value, allowed in (
            ("per", per, ("head", "projection")),
            ("kind", kind, ("projection", "penalty")),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{key} cannot be {value!r}.",
                    expected=" or ".join(allowed),
                    got=repr(value),
                    key=key,
                )
        self.max_deg, self.per, self.kind, self.weight = max_deg, per, kind, weight
        self._limit = math.radians(max_deg)
        self._groups: list[list[_Watched]] = []
        #: Whether the sites have changed since they were last brought back.
        self._unseen = False

    # -- what is watched -----------------------------------------------------------------

    def bind(self, context: Context) -> None:
        """Gets to know the model."""
        self._groups = []  # what is kept of the weights of another model
        super().bind(context)
        self._unseen = False

    def on_sites(self, sites: Sequence[Site]) -> None:
        """Finds the units of each site."""
        model = self.context.model
        _refuse_moved_weights(model, {site.adapter for site in sites})
        layouts = head_layout(model) if self.per == "head" else {}
        known = {m.site.key: m for group in self._groups for m in group}
        groups: dict[tuple[Any, ...], list[_Watched]] = {}
        for site in sites:
            _check_base(site)
            watched = _Watched(site, layouts.get(site.name))
            old = known.get(site.key)
            if old is not None and old.layout == watched.layout:
                watched.squared, watched.version = old.squared, old.version
            groups.setdefault(watched.group(), []).append(watched)
        self._groups = [part for group in groups.values() for part in _chunks(group)]
        self._unseen = True
        if self.per == "head" and not layouts:
            warnings.warn(
                f"The heads of {type(model).__name__} are not known: the rotation budget is "
                'kept for whole projections. Say per="projection" to make this warning go away.',
                UserWarning,
                stacklevel=2,
            )
        self._warn_of_noise(sites)

    def _warn_of_noise(self, sites: Sequence[Site]) -> None:
        dtypes = set()
        for site in sites:
            base, info = site.factors.base, site.info
            if base is not None and info is not None and info.kind != "opaque":
                dtypes.add(base.weight.dtype)
        for dtype in dtypes:
            floor = math.degrees(noise_floor(dtype))
            if floor > self.max_deg:
                warnings.warn(
                    f"A rotation budget of {self.max_deg:g}° is below the noise floor of the "
                    f"base's {dtype} ({floor:.2g}°): it holds while the adapter is apart, but "
                    "rounding alone will exceed it when the adapter is fused.",
                    UserWarning,
                    stacklevel=3,
                )

    @torch.no_grad()
    def angles(self) -> dict[str, Tensor]:
        """Site → θ of its units in degrees, float64 [units], as the factors are now.

        Reads every weight once.
        """
        found: dict[str, Tensor] = {}
        for group in self._groups:
            batch = _Batch(group)
            with no_autocast(batch.A):
                theta = torch.rad2deg(batch.path(batch.wide()).theta())
            found.update((m.site.key, t) for m, t in zip(group, theta, strict=True))
        return found

    # -- projection ----------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Brings back what is beyond the budget."""
        if self.kind == "projection":
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Brings back what is beyond the budget, now."""
        for batch, path in self._suspects():
            with no_autocast(batch.A):
                self._project(batch, path)
        self._unseen = False

    def _suspects(self) -> Iterator[tuple[_Batch, Path]]:
        """The sites that may be beyond; on CPU only those that cannot be told to be within.

        Their paths lack the inner products with W.
        """
        for group in self._groups:
            batch = _Batch(group)
            with no_autocast(batch.A):
                path = batch.path(None)
                if batch.A.device.type != "cpu":
                    yield batch, path
                    continue
                allowed = path.squared.sum(dim=-1) * math.sin(self._limit) ** 2
                beyond = (change_bound(path) > allowed).any(dim=1).tolist()
                index = [i for i, there in enumerate(beyond) if there]
                if len(index) == len(group):
                    yield batch, path
                elif index:
                    yield batch.select(index), path.select(torch.tensor(index))

    def _project(self, batch: _Batch, path: Path) -> None:
        members = batch.members
        first = members[0].site
        precision = max(torch.finfo(t.dtype).eps for t in (first.A, first.B))
        on_cpu = first.A.device.type == "cpu"
        coarse = precision > 1e-6
        margins = [max(_MARGIN, 2 * precision), max(2.0**-6, 4 * precision), 0.5, 1.0]
        wide = batch.wide()
        path = batch.completed(path, wide)
        for margin in margins if on_cpu else margins[: 2 if coarse else 1]:
            beyond = path.theta(1.0, _SLACK) > self._limit
            if on_cpu and not bool(beyond.any()):
                return
            target = self._limit * (1 - margin)
            if path.straight:
                scale = largest_scale(*path.at(), target, _SLACK)
                t = torch.where(beyond, scale, torch.ones_like(scale))
            else:
                t = self._fraction(path, beyond, target)
            moved = t.amin(dim=1).tolist() if on_cpu else [0.0] * len(members)
            for member, way, least in zip(members, t, moved, strict=True):
                if least < 1:
                    _move_back(member, way)
            if not coarse and not on_cpu:
                return
            # The rounding of what was written is far within the margin, and that is that.
            room = self._limit * margin / 4
            if on_cpu and batch.A0 is None and bool((batch.rounding() < room).all()):
                return
            batch = _Batch(members)
            if batch.A0 is not None:
                wide = batch.wide()
            path = batch.path(wide)

    def _fraction(self, path: Path, beyond: Tensor, target: float) -> Tensor:
        """How far on its way each unit may be: [n, units]."""
        shared = path.shared

        def excess(t: Tensor) -> Tensor:
            theta = path.theta(t, _SLACK) - target
            return theta.amax(dim=1, keepdim=True) if shared else theta

        if shared:
            beyond = beyond.any(dim=1, keepdim=True)
        t = largest_fraction(
            excess,
            torch.zeros_like(path.squared[:, : beyond.shape[1], 0]),
            tolerance=target * _MARGIN / 2,
            monotone=path.inner[1] is None,
        )
        return torch.where(beyond, t, torch.ones_like(t)).expand(-1, path.squared.shape[1])

    def close(self) -> None:
        """Brings back what a rule before this one has made at the end (task adapters merged)."""
        if self.kind == "projection" and self._unseen:
            self.project()

    # -- penalty -------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        """Adds the penalty's gradient."""
        if self.kind == "penalty":
            self.apply(step, self.weight)

    def apply(self, step: Step, weight: float | Tensor) -> None:
        """Adds ``weight`` times the penalty's gradient to those of A, B and m.

        Args:
            step: The step that is about to be made.
            weight: A number, or a 0-dimensional tensor.

        Raises:
            ConfigError: If this budget is kept by projection: a penalty has nothing to do then.
        """
        if self.kind == "projection":
            raise ConfigError(
                "A rotation budget that is kept by projection has no penalty to drive.",
                expected="penalty",
                got="projection",
                fix='RotationBudget(kind="penalty")',
                key="kind",
            )
        for batch, _ in self._suspects():
            with torch.enable_grad(), no_autocast(batch.A):
                batch.track()
                value = self._value(batch.path(batch.wide()))
                inputs = [t for t in (batch.A, batch.B, batch.m) if t is not None]
                gradients = torch.autograd.grad(value, inputs)
            with torch.no_grad():
                for i, member in enumerate(batch.members):
                    site = member.site
                    a, b = gradients[0][i], gradients[1][i]
                    if member.transposed:
                        a, b = b.T, a.T
                    step.add_gradient(site.A, a * weight)
                    step.add_gradient(site.B, b * weight)
                    if site.magnitude is not None:
                        step.add_gradient(site.magnitude, gradients[2][i] * weight)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty without its weight, Σ_u max(0, (θ_u − θ_max) / θ_max)²; 0-dimensional."""
        total = torch.zeros((), dtype=torch.float64)
        for batch, path in self._suspects():
            with no_autocast(batch.A):
                value = self._value(batch.completed(path, batch.wide()))
            total = total.to(value.device) + value
        return total

    def _value(self, path: Path) -> Tensor:
        excess = path.theta() / self._limit - 1
        return excess.clamp(min=0).square().sum()

    # -- log -----------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Of all units: the largest and the mean angle, and how many are at the budget.

        Reads every weight once, and waits for the device.
        """
        found = [t.cpu() for t in self.angles().values()]
        if not found:
            return {}
        theta = torch.cat(found)
        return {
            "max_deg": float(theta.max()),
            "mean_deg": float(theta.mean()),
            "at_budget": float((theta >= 0.99 * self.max_deg).sum()),
            "units": float(theta.numel()),
        }


def _move_back(member: _Watched, t: Tensor) -> None:
    """Writes the factors at t [units] of the way; t = 1 changes nothing."""
    site, f = member.site, member.site.factors
    f64 = torch.float64
    if f.A0 is not None and f.B0 is not None:
        one = t[0]
        for live, start in ((site.A, f.A0), (site.B, f.B0)):
            origin = start.to(f64)
            moved = torch.where(one < 1, origin + one * (live.to(f64) - origin), live.to(f64))
            live.copy_(moved)
    elif member.transposed:
        scale = t.repeat_interleave(site.A.shape[1] // member.units)
        site.A.mul_(scale.to(torch.promote_types(site.A.dtype, torch.float32)))
    else:
        per_row = t[:1] if member.columns else t
        scale = per_row.repeat_interleave(site.B.shape[0] // per_row.shape[0])
        site.B.mul_(scale.to(torch.promote_types(site.B.dtype, torch.float32))[:, None])
    if site.magnitude is not None:
        squared = member.norms()
        start = (squared.sum(dim=0) if member.columns else squared).sqrt()
        m = site.magnitude.to(f64)
        steps = t[:1] if member.columns else t
        steps = steps.repeat_interleave(m.shape[0] // steps.shape[0])
        site.magnitude.copy_(torch.where(steps < 1, start + steps * (m - start), m))


def _chunks(group: list[_Watched]) -> Iterator[list[_Watched]]:
    size = group[0].site.A.numel() + group[0].site.B.numel()
    count = max(1, _TOGETHER // size)
    for start in range(0, len(group), count):
        yield group[start : start + count]


def _check_base(site: Site) -> None:
    base = site.factors.base
    if base is None:
        raise ConfigError(
            f"The weight under the adapter on {site.name} is not known, so no rotation can be "
            "measured.",
            expected="a layer like nn.Linear under the factors",
            fix="take the rotation budget off, or adapt linear layers only",
            key=site.name,
        )
    if base.info.kind == "opaque":
        read_weight(base.module, base.info)  # what cannot be dequantised says so now


def _refuse_moved_weights(model: nn.Module, adapters: set[str]) -> None:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return
    for name in adapters & set(configs):
        start = getattr(configs[name], "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_MOVES_WEIGHT):
            raise ConfigError(
                f"PEFT's initialisation {start!r} moves a part of W into the adapter: the angle "
                "to what is left of W says nothing.",
                expected="an adapter that starts as the identity: B = 0",
                got=f"init_lora_weights={start!r} in adapter {name!r}",
                fix="use lorasmith's adapter with that initialisation, which leaves W alone",
                key="init_lora_weights",
            )


def _check_number(key: str, value: Any, below: float, expected: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < below:
        raise ConfigError(
            f"{key} cannot be {value!r}.", expected=f"a number {expected}", got=repr(value), key=key
        )
