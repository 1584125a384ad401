"""Two or more diagnoses of one base side by side.

Reports are paired by unit (layer, role, head): what is in one and not in another was not
changed there, and counts as θ = 0, provided that both are of one base and cut alike. A layer
that a report skipped is missing there, not unchanged: it is left out of the pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.diagnostics.records import RotationReport, UnitRotation, Verdict
from lorasmith.errors import ConfigError

__all__ = ["Comparison", "PairedUnit", "Run", "compare"]


@dataclass(frozen=True)
class Run:
    """One report in one line.

    Attributes:
        name: What the caller called it.
        tuned: What it was made of.
        units: Number of changed units.
        theta_bar_deg: θ̄ over them.
        theta_bar_all_deg: θ̄ over all units that any of the reports changed.
        max_theta_deg: The largest angle.
        relative_change: ‖W' − W‖ / ‖W‖ over the changed units.
        verdict: EgoRA's.
        mode_counts: EgoRA's classes.
        change_counts: Ours.
        perplexity_ratio: Of held-out text, after over before; ``None`` if not measured.
        kl: KL divergence to the base, nats a token; likewise.
    """

    name: str
    tuned: str
    units: int
    theta_bar_deg: float
    theta_bar_all_deg: float
    max_theta_deg: float
    relative_change: float
    verdict: Verdict
    mode_counts: Mapping[str, int]
    change_counts: Mapping[str, int]
    perplexity_ratio: float | None
    kl: float | None


@dataclass(frozen=True)
class PairedUnit:
    """One unit in all reports.

    Attributes:
        name: Of the layer.
        layer: Transformer block.
        projection: Last part of the name (fused ones with the part: ``c_attn.q``).
        role: What it makes.
        head: Index of the head.
        theta_deg: Of each report, in their order.
        norm_ratio: Likewise.
        relative_change: Likewise.
    """

    name: str
    layer: int | None
    projection: str
    role: str | None
    head: int | None
    theta_deg: tuple[float, ...]
    norm_ratio: tuple[float, ...]
    relative_change: tuple[float, ...]

    @property
    def difference_deg(self) -> float:
        """θ in the last report less θ in the first."""
        return self.theta_deg[-1] - self.theta_deg[0]


@dataclass(frozen=True)
class Comparison:
    """Several reports of one base.

    Attributes:
        names: What the reports are called.
        runs: One line a report.
        units: One record a unit that any report changed, in the model's order.
        reports: The reports themselves.
    """

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    units: tuple[PairedUnit, ...]
    reports: tuple[RotationReport, ...]

    def differences(self, first: str, second: str) -> tuple[float, ...]:
        """θ in ``second`` less θ in ``first``, of every unit.

        Raises:
            ConfigError: There is no such report.
        """
        i, j = self._index(first), self._index(second)
        return tuple(u.theta_deg[j] - u.theta_deg[i] for u in self.units)

    def by_projection(self) -> dict[str, tuple[float, ...]]:
        """Kind of projection → mean θ in each report, over the paired units."""
        return self._means(lambda u: u.projection)

    def by_layer(self) -> dict[int | None, tuple[float, ...]]:
        """Transformer block → mean θ in each report, over the paired units."""
        return self._means(lambda u: u.layer)

    def _means(self, key: Any) -> dict[Any, tuple[float, ...]]:
        groups: dict[Any, list[PairedUnit]] = {}
        for unit in self.units:
            groups.setdefault(key(unit), []).append(unit)
        count = range(len(self.names))
        return {
            k: tuple(math.fsum(u.theta_deg[i] for u in units) / len(units) for i in count)
            for k, units in groups.items()
        }

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(
                "There is no such report.", expected=", ".join(self.names), got=repr(name)
            )
        return self.names.index(name)

    def to_dict(self) -> dict[str, Any]:
        """Runs and paired units, in types that JSON can hold."""
        from lorasmith.diagnostics.records import jsonable

        found: dict[str, Any] = jsonable(
            {
                "names": self.names,
                "runs": [dataclasses.asdict(r) for r in self.runs],
                "units": [dataclasses.asdict(u) for u in self.units],
            }
        )
        return found


def compare(reports: Mapping[str, RotationReport]) -> Comparison:
    """Puts reports of one base side by side.

    Args:
        reports: Name → report; two or more.

    Raises:
        ConfigError: There are fewer, or they are cut differently or of different models.
    """
    if len(reports) < 2:
        raise ConfigError(
            "A comparison needs two reports or more.", got=len(reports), key="reports"
        )
    names, given = tuple(reports), tuple(reports.values())
    if len({r.per for r in given}) > 1:
        raise ConfigError(
            "The reports are cut differently.",
            expected="one per= for all",
            got=", ".join(f"{n}: {r.per}" for n, r in reports.items()),
            key="reports",
        )
    skipped = {one.name for report in given for one in report.skipped}
    tables = [{_key(u): u for u in r.units if u.name not in skipped} for r in given]
    order: dict[tuple[Any, ...], UnitRotation] = {}
    for table in tables:
        for key, unit in table.items():
            known = order.setdefault(key, unit)
            if known.parameters != unit.parameters:
                raise ConfigError(
                    "The reports are of different models.",
                    expected=f"{known.parameters} weights in {unit.name}",
                    got=unit.parameters,
                    key=unit.name,
                )
    keys = sorted(order, key=lambda k: _place(order[k]))
    units = tuple(_paired(order[k], [t.get(k) for t in tables]) for k in keys)
    runs = tuple(
        _run(name, report, [u.theta_deg[i] for u in units])
        for i, (name, report) in enumerate(reports.items())
    )
    return Comparison(names, runs, units, given)


def _key(unit: UnitRotation) -> tuple[Any, ...]:
    return unit.name, unit.role, unit.head


def _place(unit: UnitRotation) -> tuple[Any, ...]:
    """Blocks in order, what lies in none last; within a block as it comes (sorting is stable)."""
    return (unit.layer is None, unit.layer or 0)


def _paired(like: UnitRotation, found: list[UnitRotation | None]) -> PairedUnit:
    return PairedUnit(
        like.name,
        like.layer,
        like.label,
        like.role,
        like.head,
        tuple(0.0 if u is None else u.theta_deg for u in found),
        tuple(1.0 if u is None else u.norm_ratio for u in found),
        tuple(0.0 if u is None else u.relative_change for u in found),
    )


def _run(name: str, report: RotationReport, angles: list[float]) -> Run:
    retention = report.retention
    return Run(
        name,
        report.tuned,
        len(report.units),
        report.theta_bar_deg,
        math.fsum(angles) / len(angles) if angles else 0.0,
        report.max_theta_deg,
        report.whole.relative_change,
        report.verdict,
        {str(k): n for k, n in report.mode_counts.items()},
        {str(k): n for k, n in report.change_counts.items()},
        None if retention is None else retention.perplexity_ratio,
        None if retention is None else retention.kl,
    )
