"""What a diagnosis comes to: frozen records, and their way into JSON, CSV and npz.

Angles are in degrees, shares and ratios are plain numbers, energies are squared Frobenius
norms. A record never holds a weight.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, get_args, get_origin, get_type_hints

from lorasmith.errors import ConfigError, in_file

__all__ = [
    "Aggregate",
    "Change",
    "HeadDiversity",
    "LayerSpectrum",
    "Mode",
    "Retention",
    "RotationReport",
    "SkipReason",
    "Skipped",
    "UnitRotation",
    "Verdict",
]

#: EgoRA's classes of a unit, as published.
Mode = Literal["preserved", "additive", "substitutive", "damaged"]
#: Our classes of a unit; see ``lorasmith.diagnostics.modes``.
Change = Literal["unchanged", "scaled", "extended", "turned", "replaced"]
#: EgoRA's verdict on θ̄.
Verdict = Literal["SAFE", "WARNING", "DANGER"]
#: Why a layer was not compared; see :class:`Skipped`.
SkipReason = Literal["missing", "extra", "shape", "heads", "dtype", "not_finite", "unexplained"]


@dataclass(frozen=True)
class Skipped:
    """A layer that was not compared.

    Attributes:
        name: Name of the layer, in the base where it has it; of a tensor that belongs to none,
            the tensor's.
        reason: ``"missing"``: one side has no weights for it; ``"extra"``: the base has no such
            layer; ``"shape"``: the shapes differ, from each other or from the class;
            ``"heads"``: the two are cut into heads differently; ``"dtype"``: it is stored in a
            form that is not read; ``"not_finite"``: it holds NaN or infinite values;
            ``"unexplained"``: a tensor of an adapter that its configuration does not explain.
        message: The same in words, for people; may change.
    """

    name: str
    reason: SkipReason
    message: str


@dataclass(frozen=True)
class UnitRotation:
    """How far fine-tuning turned one unit: a head's part of a projection, or a whole one.

    Attributes:
        name: Name of the layer (module) in the base model.
        layer: Index of the transformer block, or ``None``.
        projection: Last part of the layer's name: ``q_proj``.
        role: What the unit makes, where it is known: ``q``, ``k``, ``v``, ``o``, ``mlp``, or
            ``None``.
        head: Index of the head (of the key-value head for k and v); ``None`` for a whole
            projection.
        parameters: Number of weights in the unit.
        theta_deg: Angle between the flattened weights before and after.
        norm_ratio: ‖W'‖ / ‖W‖.
        kept: ⟨W, W'⟩ / ‖W‖², the share of W that is still in W'.
        relative_change: ‖W' − W‖ / ‖W‖.
        floor_deg: Angle that rounding to the storage dtype makes by itself.
        mode: EgoRA's class.
        change: Our class.
        weight_norm: ‖W‖ of the unit; NaN where nobody measured it.
    """

    name: str
    layer: int | None
    projection: str
    role: str | None
    head: int | None
    parameters: int
    theta_deg: float
    norm_ratio: float
    kept: float
    relative_change: float
    floor_deg: float
    mode: Mode
    change: Change
    weight_norm: float = math.nan

    @property
    def novel(self) -> float:
        """ν = ‖N‖ / ‖W‖ of W' = κ W + N with N ⊥ W: what is there beside W."""
        return math.sqrt(max(0.0, _square(self.relative_change) - _square(self.kept - 1.0)))

    @property
    def label(self) -> str:
        """The projection; of a fused one with what the unit makes: ``c_attn.q``."""
        fused = self.projection in _FUSED and self.role is not None
        return f"{self.projection}.{self.role}" if fused else self.projection


#: Projections that make queries, keys and values at once.
_FUSED = frozenset(("c_attn", "qkv_proj", "query_key_value", "Wqkv"))


@dataclass(frozen=True)
class Aggregate:
    """Several units together: those of a transformer block, or of a kind of projection.

    Attributes:
        units: How many.
        parameters: Numbers in them.
        theta_deg: Mean angle of the units.
        max_theta_deg: The largest.
        whole_theta_deg: Angle between all their weights as one vector, before and after.
        norm_ratio: ‖W'‖ / ‖W‖ of that vector.
        relative_change: ‖W' − W‖ / ‖W‖ of that vector.
        energy: Its share of the whole ‖ΔW‖².
    """

    units: int
    parameters: int
    theta_deg: float
    max_theta_deg: float
    whole_theta_deg: float
    norm_ratio: float
    relative_change: float
    energy: float


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's change ΔW, and where it lies in W.

    Attributes:
        name: Name of the layer.
        layer: Index of the transformer block, or ``None``.
        projection: Last part of the name.
        rank: Number of singular values above the rounding error.
        effective_rank: exp of the entropy of σ² / Σσ² (Roy and Vetterli 2007 take σ / Σσ).
        stable_rank: Σσ² / σ₁².
        singular_values: The largest ones, descending.
        energy_in_top: Share of ‖ΔW‖² inside W's top singular subspaces (both sides).
        top: Dimension of those subspaces.
        intruders: Number of top singular vectors of W' that are far from all of W's
            (Shuttleworth et al. 2024, arXiv 2410.21228); ``None`` if not asked for.
        intruder_cosines: The greatest |cosine| of each top left singular vector of W' with
            W's, in the order of W's new singular values; empty if not asked for.
    """

    name: str
    layer: int | None
    projection: str
    rank: int
    effective_rank: float
    stable_rank: float
    singular_values: tuple[float, ...]
    energy_in_top: float | None = None
    top: int = 0
    intruders: int | None = None
    intruder_cosines: tuple[float, ...] = ()


@dataclass(frozen=True)
class HeadDiversity:
    """How different the heads of one projection are from each other, before and after.

    Attributes:
        name: Name of the layer.
        layer: Index of the transformer block, or ``None``.
        projection: Last part of the name.
        role: ``q``, ``k``, ``v`` or ``o``.
        before: Mean angle between two heads' weights in the base, degrees.
        after: The same in the tuned model.
        matrix_before: Angle between each pair of heads, degrees, row by row.
        matrix_after: The same in the tuned model.
    """

    name: str
    layer: int | None
    projection: str
    role: str
    before: float
    after: float
    matrix_before: tuple[tuple[float, ...], ...] = ()
    matrix_after: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Retention:
    """What the tuned model still knows, measured on text that it was not tuned on.

    Attributes:
        text: What the text was: a file, or ``"builtin"``.
        tokens: Number of predicted tokens.
        perplexity_before: Of the base model.
        perplexity_after: Of the tuned one.
        kl: Mean Kullback-Leibler divergence KL(base ‖ tuned) in nats a token.
        agreement: Share of tokens whose most likely successor is the same.
    """

    text: str
    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    agreement: float

    @property
    def perplexity_ratio(self) -> float:
        """After over before; above 1 is worse."""
        return self.perplexity_after / self.perplexity_before


@dataclass(frozen=True)
class RotationReport:
    """A whole diagnosis.

    Units are those of the layers that changed at all. What is equal in both (what an adapter
    does not touch, what was frozen) is counted in ``unchanged`` and ``unchanged_units`` and
    does not dilute θ̄: ``theta_bar_all_deg`` is the mean with it.

    Attributes:
        base: What the base was: a path, an id, or a class name.
        tuned: What was compared with it.
        per: ``"head"`` or ``"projection"``: how units were cut.
        units: Every unit, in the model's order.
        spectra: One for each changed layer; empty if not asked for.
        diversity: One for each projection of several heads; empty if not asked for.
        retention: If a text was given and a model could be run.
        head_dim: Of the model, where it is known.
        skipped: Layers that could not be compared, and why.
        unchanged: Layers that are in both and equal (an adapter does not touch them).
        seconds: Wall time.
        versions: Of lorasmith and torch.
        unchanged_units: Number of units in the unchanged layers.
    """

    base: str
    tuned: str
    per: str
    units: tuple[UnitRotation, ...]
    spectra: tuple[LayerSpectrum, ...] = ()
    diversity: tuple[HeadDiversity, ...] = ()
    retention: Retention | None = None
    head_dim: int | None = None
    skipped: tuple[Skipped, ...] = ()
    unchanged: int = 0
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    unchanged_units: int = 0

    # -- in one number -----------------------------------------------------------------

    @property
    def theta_bar_deg(self) -> float:
        """θ̄, the plain mean of θ over the units, as EgoRA takes it; 0 if nothing changed.

        Every unit counts alike, a head as much as a whole MLP projection.
        """
        return _mean([u.theta_deg for u in self.units])

    @property
    def theta_bar_all_deg(self) -> float:
        """The same with the units of unchanged layers, at 0°."""
        count = len(self.units) + self.unchanged_units
        return math.fsum(u.theta_deg for u in self.units) / count if count else 0.0

    @property
    def theta_bar_weighted_deg(self) -> float:
        """Mean of θ over the units, each weighted by its number of parameters."""
        total = sum(u.parameters for u in self.units)
        return math.fsum(u.theta_deg * u.parameters for u in self.units) / total if total else 0.0

    @property
    def max_theta_deg(self) -> float:
        """The largest θ of a unit."""
        return max((u.theta_deg for u in self.units), default=0.0)

    @property
    def theta_crit_deg(self) -> float | None:
        """arcsin(1/√head_dim): what a random direction's share of a head amounts to."""
        if self.head_dim is None:
            return None
        return math.degrees(math.asin(1 / math.sqrt(self.head_dim)))

    @property
    def verdict(self) -> Verdict:
        """EgoRA's verdict on θ̄."""
        from lorasmith.diagnostics.modes import verdict_of

        return verdict_of(self.theta_bar_deg)

    @property
    def mode_counts(self) -> dict[Mode, int]:
        """Units in each of EgoRA's classes."""
        found = Counter(u.mode for u in self.units)
        return {mode: found[mode] for mode in get_args(Mode)}

    @property
    def change_counts(self) -> dict[Change, int]:
        """Units in each of our classes."""
        found = Counter(u.change for u in self.units)
        return {change: found[change] for change in get_args(Change)}

    @property
    def floor_deg(self) -> float:
        """The largest noise floor of a unit."""
        return max((u.floor_deg for u in self.units), default=0.0)

    @property
    def whole(self) -> Aggregate:
        """All units together."""
        return _aggregate(self.units, math.fsum(_energy(u) for u in self.units))

    # -- in groups ---------------------------------------------------------------------

    @property
    def by_layer(self) -> dict[int | None, Aggregate]:
        """Transformer block → its units together; ``None`` for what lies in none."""
        return self._grouped(lambda u: u.layer)

    @property
    def by_projection(self) -> dict[str, Aggregate]:
        """Kind of projection (``q_proj``; fused ones by part: ``c_attn.q``) → its units."""
        return self._grouped(lambda u: u.label)

    @property
    def by_module(self) -> dict[str, Aggregate]:
        """Layer → its units together."""
        return self._grouped(lambda u: u.name)

    def _grouped(self, key: Callable[[UnitRotation], _K]) -> dict[_K, Aggregate]:
        groups: dict[_K, list[UnitRotation]] = {}
        for unit in self.units:
            groups.setdefault(key(unit), []).append(unit)
        energy = math.fsum(_energy(u) for u in self.units)
        return {k: _aggregate(units, energy) for k, units in groups.items()}

    # -- into files --------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it, with the summary, in types that JSON can hold.

        What is not finite (the norm ratio of a unit that was zero) is ``None``.
        """
        values = dataclasses.asdict(self)
        values["format"] = FORMAT
        values["summary"] = {
            "theta_bar_deg": self.theta_bar_deg,
            "theta_bar_all_deg": self.theta_bar_all_deg,
            "theta_bar_weighted_deg": self.theta_bar_weighted_deg,
            "max_theta_deg": self.max_theta_deg,
            "theta_crit_deg": self.theta_crit_deg,
            "floor_deg": self.floor_deg,
            "verdict": self.verdict,
            "mode_counts": self.mode_counts,
            "change_counts": self.change_counts,
            "by_layer": {str(k): dataclasses.asdict(v) for k, v in self.by_layer.items()},
            "by_projection": {k: dataclasses.asdict(v) for k, v in self.by_projection.items()},
        }
        found: dict[str, Any] = jsonable(values)
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RotationReport:
        """The inverse of :meth:`to_dict`; ``None`` where a number belongs becomes NaN.

        Raises:
            ConfigError: If ``values`` is not a report, or one of a newer format.
        """
        if values.get("format") != FORMAT:
            raise ConfigError(
                "That is not a diagnosis that this version reads.",
                expected=f"format {FORMAT}",
                got=repr(values.get("format")),
                key="format",
            )
        try:
            made: RotationReport = _read(values, cls, "")
        except _MalformedError as error:
            raise ConfigError(
                "The diagnosis is malformed.",
                key=error.key or None,
                expected=error.expected,
                got=error.got,
                fix="diagnose again, and save it as .json",
            ) from error
        return made

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes it in the form that the suffix asks for.

        ``.json``: everything, see :meth:`to_dict`. ``.csv``: one line a unit. ``.npz``: one
        array a field of the units, and of the spectra. ``.html``: one self-contained page
        with the figures.

        Raises:
            ConfigError: The suffix is another one.
        """
        target = Path(path)
        write = {
            ".json": self._write_json,
            ".csv": self._write_csv,
            ".npz": self._write_npz,
            ".html": self._write_html,
        }.get(target.suffix.lower())
        if write is None:
            raise ConfigError(
                "The form of the report cannot be told from the name of the file.",
                expected="a name that ends in .json, .csv, .npz or .html",
                got=target.name,
                key="path",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target)
        return target

    def _write_json(self, path: Path) -> None:
        from lorasmith.io.atomic import replace_text  # loads PyTorch, which reading does not need

        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        replace_text(path, text + "\n")

    def _write_csv(self, path: Path) -> None:
        from lorasmith.io.atomic import replace_text  # loads PyTorch, which reading does not need

        stream = io.StringIO(newline="")
        writer = csv.writer(stream)
        writer.writerow(_UNIT_FIELDS)
        for unit in self.units:
            writer.writerow([getattr(unit, name) for name in _UNIT_FIELDS])
        replace_text(path, stream.getvalue())

    def _write_npz(self, path: Path) -> None:
        import numpy as np

        from lorasmith.io.atomic import replace_file

        arrays: dict[str, Any] = {}
        for name in _UNIT_FIELDS:
            column = [getattr(unit, name) for unit in self.units]
            if name in ("layer", "head"):  # -1 for none, so that it stays a whole number
                arrays[name] = np.array([-1 if v is None else v for v in column], dtype=np.int64)
            elif name == "parameters":
                arrays[name] = np.array(column, dtype=np.int64)
            elif name in ("name", "projection", "role", "mode", "change"):
                arrays[name] = np.array([v or "" for v in column], dtype=np.str_)
            else:
                arrays[name] = np.array(column, dtype=np.float64)
        for spectrum in self.spectra:
            arrays[f"singular_values/{spectrum.name}"] = np.array(spectrum.singular_values)
        for one in self.diversity:
            key = f"{one.name}/{one.role}"
            arrays[f"diversity_before/{key}"] = np.array(one.matrix_before)
            arrays[f"diversity_after/{key}"] = np.array(one.matrix_after)

        def write(stream: BinaryIO) -> None:
            np.savez_compressed(stream, **arrays)

        replace_file(path, write)

    def _write_html(self, path: Path) -> None:
        from importlib import import_module

        # Rendering lies above the diagnostics, and needs matplotlib.
        import_module("lorasmith.web.diagnosis").write_report(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RotationReport:
        """Reads a report that was saved as ``.json``.

        Raises:
            ConfigError: It is not one.
        """
        file = Path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"The diagnosis cannot be read: {error}.",
                expected="a file that RotationReport.save wrote as .json",
                got=type(error).__name__,
                file=file,
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                "The file is not a diagnosis.",
                expected="a JSON object",
                got=type(values).__name__,
                file=file,
            )
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise in_file(error, file, ConfigError) from error

    # -- in words ----------------------------------------------------------------------

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{self.base} → {self.tuned}: {self.verdict}, θ̄ = {self.theta_bar_deg:.4g}°"]
        whole = self.whole
        units = "heads and projections" if self.per == "head" else "projections"
        crit = self.theta_crit_deg
        lines.append(
            f"  {len(self.units)} {units} changed (largest angle {self.max_theta_deg:.4g}°), "
            f"{self.unchanged} layers unchanged"
            + (f", {len(self.skipped)} skipped" if self.skipped else "")
        )
        if self.units:
            lines.append(
                f"  ‖ΔW‖ / ‖W‖ = {whole.relative_change:.4g}, ‖W'‖ / ‖W‖ = {whole.norm_ratio:.5g}; "
                f"noise floor of the storage dtype {self.floor_deg:.2g}°"
                + (f"; θ_crit {crit:.3g}°" if crit is not None else "")
            )
        for counts in (self.mode_counts, self.change_counts):
            parts = [f"{name} {count}" for name, count in counts.items() if count]
            if parts:
                lines.append("  " + ", ".join(parts))
        if self.retention is not None:
            r = self.retention
            lines.append(
                f"  perplexity on {r.text}: {r.perplexity_before:.4g} → {r.perplexity_after:.4g}, "
                f"KL {r.kl:.3g} nats a token"
            )
        return "\n".join(lines)


#: Of the dictionary; raised when what it means changes. 2: ``skipped`` is a list of records.
FORMAT = 2
_K = TypeVar("_K")
_UNIT_FIELDS = tuple(f.name for f in dataclasses.fields(UnitRotation))


def _square(value: float) -> float:
    """x²; infinite where ``**`` would raise."""
    return value * value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _energy(unit: UnitRotation) -> float:
    """‖ΔW‖² of a unit; 0 where ‖W‖ is not known."""
    found = _square(unit.weight_norm * unit.relative_change)
    return found if math.isfinite(found) else 0.0


def _aggregate(units: Sequence[UnitRotation], energy: float) -> Aggregate:
    """Sums of ‖W‖², ⟨W, ΔW⟩ and ‖ΔW‖² over the units give the angle of all together."""
    squared = inner = delta = 0.0
    for unit in units:
        n2 = _square(unit.weight_norm)
        if math.isfinite(n2 * unit.relative_change):
            squared += n2
            inner += n2 * (unit.kept - 1.0)
            delta += n2 * _square(unit.relative_change)
    nan = math.nan
    norm = math.sqrt(squared)
    perp = math.sqrt(max(0.0, delta - _square(inner / norm))) if norm else nan
    return Aggregate(
        len(units),
        sum(u.parameters for u in units),
        _mean([u.theta_deg for u in units]),
        max((u.theta_deg for u in units), default=0.0),
        math.degrees(math.atan2(perp, norm + inner / norm)) if norm else nan,
        math.sqrt(max(0.0, squared + 2 * inner + delta)) / norm if norm else nan,
        math.sqrt(delta) / norm if norm else nan,
        delta / energy if energy else 0.0,
    )


def jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


class _MalformedError(Exception):
    """A value of a diagnosis is not what it must be."""

    def __init__(self, key: str, expected: str, got: object) -> None:
        super().__init__(key)
        self.key, self.expected, self.got = key, expected, repr(got)[:200]


def _read(value: Any, hint: Any, key: str) -> Any:
    """What JSON held as the type of a field: lists become tuples, ``null`` for a number NaN."""
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, key)
    kind, inner = get_origin(hint), get_args(hint)
    if type(None) in inner:
        return None if value is None else _read(value, inner[0], key)
    if hint is float:
        if value is None:
            return math.nan
        # A larger whole number is no float.
        if type(value) is float or (type(value) is int and abs(value) < 2**1000):
            return float(value)
    elif kind is tuple and isinstance(value, list | tuple):
        return tuple(_read(v, inner[0], f"{key}.{i}") for i, v in enumerate(value))
    elif kind is Literal and isinstance(value, str) and value in inner:
        return value
    elif kind is Mapping and isinstance(value, Mapping):
        return {str(k): _read(v, inner[1], f"{key}.{k}") for k, v in value.items()}
    elif hint in (int, str) and type(value) is hint:
        return value
    raise _MalformedError(key, _TYPES.get(hint, str(hint).rpartition(".")[2]), value)


_TYPES = {float: "a number or null", int: "a whole number", str: "a text"}


def _record(kind: Any, values: Any, key: str) -> Any:
    """A record; fields that it does not know are left out."""
    if not isinstance(values, Mapping):
        raise _MalformedError(key, "an object", values)
    hints, given = get_type_hints(kind), {}
    for one in dataclasses.fields(kind):
        inside = f"{key}.{one.name}".lstrip(".")
        if one.name in values:
            given[one.name] = _read(values[one.name], hints[one.name], inside)
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise _MalformedError(inside, "a value", None)
    return kind(**given)
