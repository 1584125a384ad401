"""``lorasmith diagnose BASE TUNED``: what fine-tuning did to the weights."""

from __future__ import annotations

import gc
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorasmith.cli.file_output import check_file
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import ConfigError, MissingDependencyError, ModelError
from lorasmith.io.atomic import replace_text

if TYPE_CHECKING:
    from lorasmith.diagnostics.compare import Comparison
    from lorasmith.diagnostics.records import Aggregate, Retention, RotationReport, UnitRotation

__all__ = ["FAILED", "diagnose", "show_report"]

#: Exit code where --fail-above or --fail-max-above is exceeded.
FAILED = 3

_FORMS = (".html", ".json", ".csv", ".npz")
_PICTURES = (".png", ".pdf", ".svg")
_COLOURS = {"SAFE": "green", "WARNING": "yellow", "DANGER": "red"}
#: Said by --text for English prose that every Python carries.
_BUILTIN = "builtin"


def diagnose(
    base: str,
    *tuned: str,
    output: Annotated[tuple[Path, ...], Parameter(alias="-o")] = (),
    plot: tuple[Path, ...] = (),
    per: Literal["head", "projection"] = "head",
    spectrum: bool = False,
    intruders: bool = False,
    diversity: bool = False,
    text: str | None = None,
    layers: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True)] = None,
    targets: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None,
    fail_above: float | None = None,
    fail_max_above: float | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Measure what fine-tuning did to the weights: angles, norms, modes, spectra.

    Tensors are read one by one; no model is built unless TEXT is given. No code that comes
    with a model is run.

    Parameters
    ----------
    base
        The model before: an alias (smollm2), a hub id, a path; or an adapter, for its base.
    tuned
        What came of it: an adapter of ours or of PEFT's, or another checkpoint. Several are
        compared with each other. Default: BASE itself, if that is an adapter.
    output
        Write the report here: .html, .json, .csv or .npz. Can be repeated.
    plot
        Write a figure here: .png, .pdf or .svg. Can be repeated.
    per
        Angles of attention heads, or of whole projections.
    spectrum
        Also rank, effective rank and stable rank of each change.
    intruders
        Also count intruder dimensions; slow.
    diversity
        Also how different the heads are from each other, before and after.
    text
        Measure retention on this text file (or builtin: English prose): perplexity before and
        after, KL divergence. Loads the model.
    layers
        Only these transformer blocks.
    targets
        Only these layers: names, globs, attention, mlp, or re:EXPRESSION.
    fail_above
        Exit code 3 if the mean angle is above so many degrees.
    fail_max_above
        Exit code 3 if the angle of any head or projection is above so many degrees.
    dtype
        dtype of the model that reads TEXT.
    device
        Where it runs: auto, cpu, cuda or mps.
    allow_base_mismatch
        Compare even if the adapter was made for other base weights.
    """
    with session(common):
        _check(output, plot, fail_above, fail_max_above, several=len(tuned) > 1)
        import lorasmith as ls
        from lorasmith.progress import bar

        source = None if text in (None, _BUILTIN) else Path(str(text))
        if source is not None:
            from lorasmith.training.retention import read_text

            read_text(source)  # before the work, not after it
        names = _names(tuned)
        reports: dict[str, RotationReport] = {}
        with _Models(dtype, device, allow_base_mismatch) as models:
            for name, one in zip(names, tuned or (None,), strict=True):
                with bar(stderr(), shown=not common.quiet) as progress:
                    report = ls.diagnose(
                        base,
                        one,
                        per=per,
                        spectrum=spectrum or intruders,
                        intruders=intruders,
                        diversity=diversity,
                        layers=layers,
                        targets=targets,
                        allow_base_mismatch=allow_base_mismatch,
                        progress=progress or False,
                    )
                    if text is not None:
                        report = _with(report, models.retention(base, one, source, progress))
                reports[name] = report
                _warn_of_skipped(report, one)
        comparison = None
        if len(reports) > 1:
            from lorasmith.diagnostics.compare import compare

            comparison = compare(reports)
        files = [_write(reports, comparison, path) for path in output]
        files += [_draw(reports, path) for path in plot]
        failures = _failures(reports, fail_above, fail_max_above)
        payload = _payload(reports, comparison) | {
            "files": [str(f) for f in files],
            "failures": failures,
        }

        def render(console: Console) -> None:
            for report in reports.values():
                show_report(console, report)
            if comparison is not None:
                console.print(_comparison_table(comparison))
            for file in files:
                console.print(Text(f"written  {file}"))

        emit(common, payload, render)
        for failure in failures:
            stderr().print(Text.assemble(("failed: ", "red"), failure))
    return FAILED if failures else 0


# Arguments -----------------------------------------------------------------------------------


def _check(
    output: Sequence[Path],
    plot: Sequence[Path],
    fail_above: float | None,
    fail_max_above: float | None,
    *,
    several: bool,
) -> None:
    """Refuses before the work what could not be done after it."""
    for key, paths, forms in (("--output", output, _FORMS), ("--plot", plot, _PICTURES)):
        for path in paths:
            if path.suffix.lower() not in forms:
                raise ConfigError(
                    "What to write cannot be told from the name of the file.",
                    expected=f"a name that ends in {', '.join(forms)}",
                    got=path.name,
                    key=key,
                )
            check_file(path, key)
    if several and any(p.suffix.lower() == ".npz" for p in output):
        raise ConfigError(
            "An npz file holds one report.",
            fix="call diagnose once for each, or write .json, .csv or .html",
            key="--output",
        )
    drawn = [*plot, *(p for p in output if p.suffix.lower() == ".html")]
    if drawn and any(importlib.util.find_spec(m) is None for m in ("matplotlib", "jinja2")):
        raise MissingDependencyError(
            "Figures and pages need Matplotlib and Jinja2, which are not both installed.",
            got=drawn[0].name,
            fix='pip install "lorasmith[plots]", or write .json or .csv',
        )
    for key, limit in (("--fail-above", fail_above), ("--fail-max-above", fail_max_above)):
        if limit is not None and not 0 <= limit <= 180:
            raise ConfigError(
                "That limit is not an angle.", expected="0 to 180 degrees", got=limit, key=key
            )


def _names(tuned: Sequence[str]) -> list[str]:
    """What each is called in a comparison: the last part, where that tells them apart."""
    if not tuned:
        return ["adapter"]
    short = [Path(t).expanduser().name or t for t in tuned]
    names = short if len(set(short)) == len(short) else list(tuned)
    if len(set(names)) < len(names):
        raise ConfigError(
            "The same TUNED is given twice.", got=" ".join(tuned), fix="name each once"
        )
    return names


def _warn_of_skipped(report: RotationReport, tuned: str | None) -> None:
    if not report.skipped:
        return
    first = report.skipped[0]
    count = len(report.skipped)
    layers = "layer was" if count == 1 else "layers were"
    where = "" if tuned is None else f" of {tuned}"
    stderr().print(
        Text.assemble(
            ("warning: ", "yellow"),
            f"{count} {layers} not compared{where}: {first.name}: {first.message}"
            + (f" (and {count - 1} more)" if count > 1 else ""),
        )
    )


# Retention -----------------------------------------------------------------------------------


class _Models(AbstractContextManager["_Models"]):
    """The models that read the text; the base is loaded once for several adapters."""

    def __init__(self, dtype: str, device: str, allow: bool) -> None:
        self._dtype, self._device = dtype, device
        self._allow = allow
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def __exit__(self, *_: object) -> None:
        self._loaded.clear()
        gc.collect()

    def retention(
        self,
        base: str,
        tuned: str | None,
        text: Path | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> Retention:
        """Perplexity and divergence of what the two arguments stand for."""
        from lorasmith.io.sources import open_sides
        from lorasmith.training.retention import retention

        before, after = open_sides(base, tuned, allow_base_mismatch=self._allow)
        acting, against = after.adapter, before.adapter
        if acting is None and against is not None:
            raise ConfigError(
                "Retention between an adapter and another model cannot be measured.",
                expected="--text with two adapters, two models, or a model and an adapter",
                key="--text",
            )
        named = acting if tuned is None else against
        name = base if named is None else named.base.name
        if name is None:
            raise ModelError(
                "The adapter does not say which model it was made for.",
                got=base,
                fix="give that model as BASE",
            )
        model, tokenizer = self._load(name)
        return retention(
            model,
            text,
            adapter=None if acting is None else acting.path,
            against=None if against is None else against.path,
            tuned=None if acting is not None else self._load(str(tuned), keep=False)[0],
            tokenizer=tokenizer,
            allow_base_mismatch=self._allow,
            progress=progress,
        )

    def _load(self, name: str, *, keep: bool = True) -> tuple[Any, Any]:
        from lorasmith.training.models import load_model

        if name in self._loaded:
            return self._loaded[name]
        found = load_model(name, dtype=self._dtype, device=self._device)
        if keep:
            self._loaded[name] = found
        return found


def _with(report: RotationReport, retention: Retention) -> RotationReport:
    import dataclasses

    return dataclasses.replace(report, retention=retention)


# The gate ------------------------------------------------------------------------------------


def _failures(
    reports: dict[str, RotationReport], mean: float | None, largest: float | None
) -> list[str]:
    """What exceeds a limit, in words. What cannot be measured does not pass one."""
    found: list[str] = []
    if mean is None and largest is None:
        return found
    for name, report in reports.items():
        prefix = f"{name}: " if len(reports) > 1 else ""
        # Written so that NaN fails.
        if mean is not None and not report.theta_bar_deg <= mean:
            found.append(
                f"{prefix}the mean angle is {report.theta_bar_deg:.4g}°, above {mean:.4g}°"
            )
        if largest is not None:
            beyond = [u for u in report.units if not u.theta_deg <= largest]
            if beyond:
                worst = max(beyond, key=_order)
                found.append(
                    f"{prefix}{len(beyond)} of {len(report.units)} angles are above "
                    f"{largest:.4g}°, the largest {worst.theta_deg:.4g}° in {_place(worst)}"
                )
        broken = [one.name for one in report.skipped if one.reason == "not_finite"]
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            found.append(f"{prefix}{broken[0]} holds values that are not finite{more}")
        if not report.units and not report.unchanged:
            found.append(f"{prefix}nothing could be compared")
    return found


def _order(unit: UnitRotation) -> float:
    return math.inf if math.isnan(unit.theta_deg) else unit.theta_deg


def _place(unit: UnitRotation) -> str:
    head = "" if unit.head is None else f" head {unit.head}"
    role = f" ({unit.role})" if unit.label != unit.projection else ""
    return f"{unit.name}{role}{head}"


# Files ---------------------------------------------------------------------------------------


def _payload(reports: dict[str, RotationReport], comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        (report,) = reports.values()
        return report.to_dict()
    return comparison.to_dict() | {"reports": {n: r.to_dict() for n, r in reports.items()}}


def _write(reports: dict[str, RotationReport], comparison: Comparison | None, path: Path) -> Path:
    path = path.expanduser()
    if comparison is None:
        (report,) = reports.values()
        return report.save(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".html":
        from lorasmith.web.diagnosis import write_report

        write_report(reports, path)
    elif path.suffix.lower() == ".json":
        import json

        text = json.dumps(_payload(reports, comparison), indent=1, ensure_ascii=False)
        replace_text(path, text + "\n")
    else:
        _write_pairs(comparison, path)
    return path


def _write_pairs(comparison: Comparison, path: Path) -> None:
    """One line a unit, one column a report."""
    import csv

    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    columns = [f"{what}:{n}" for n in comparison.names for what in ("theta_deg", "norm_ratio")]
    writer.writerow(["name", "layer", "projection", "role", "head", *columns])
    for u in comparison.units:
        values = [v for pair in zip(u.theta_deg, u.norm_ratio, strict=True) for v in pair]
        writer.writerow([u.name, u.layer, u.projection, u.role, u.head, *values])
    replace_text(path, stream.getvalue())


def _draw(reports: dict[str, RotationReport], path: Path) -> Path:
    from lorasmith.diagnostics import plots

    if len(reports) > 1:
        return plots.save(plots.comparison(reports), path.expanduser())
    (report,) = reports.values()
    return plots.save(plots.report_figure(report), path.expanduser())


# For people ----------------------------------------------------------------------------------


def show_report(console: Console, report: RotationReport) -> None:
    """One diagnosis on a terminal."""
    whole, crit = report.whole, report.theta_crit_deg
    verdict = Text.assemble((report.verdict, f"bold {_COLOURS[report.verdict]}"))
    verdict.append(f"  θ̄ = {_angle(report.theta_bar_deg)}")
    if not report.units:
        verdict.append("  (no weight that was compared differs)")
    console.print(Text.assemble(f"{report.base} → {report.tuned}: ", verdict))
    worst = max(report.units, key=_order) if report.units else None
    counts = f"{len(report.units):,} changed in {len(report.by_module):,} layers"
    counts += f"; {report.unchanged:,} layers unchanged" if report.unchanged else ""
    retained = report.retention
    console.print(
        grid(
            {
                "heads, projections" if report.per == "head" else "projections": counts,
                "largest angle": None
                if worst is None
                else f"{_angle(worst.theta_deg)} in {_place(worst)}",
                "change": f"‖ΔW‖ / ‖W‖ = {number(whole.relative_change)}, "
                f"‖W + ΔW‖ / ‖W‖ = {number(whole.norm_ratio, 5)}"
                if report.units
                else None,
                "noise floor": f"{_angle(report.floor_deg)} (rounding to the stored dtype alone)"
                if report.units
                else None,
                "θ_crit": f"{_angle(crit)} (head_dim {report.head_dim})" if crit else None,
                "EgoRA's modes": _counts(report.mode_counts),
                "classes": _counts(report.change_counts),
                "perplexity": None
                if retained is None
                else f"{number(retained.perplexity_before)} → {number(retained.perplexity_after)} "
                f"on {retained.text} ({retained.tokens:,} tokens)",
                "KL, agreement": None
                if retained is None
                else f"{number(retained.kl, 3)} nats a token; the same likeliest token in "
                f"{retained.agreement:.1%}",
                "time": f"{report.seconds:.1f} s",
            }
        )
    )
    if report.units:
        console.print(_projection_table(report))
    if report.spectra:
        console.print(_spectrum_table(report))
    if report.diversity:
        console.print(_diversity_table(report))


def _angle(degrees: float | None) -> str:
    if degrees is None:
        return "–"
    # Below a tenth of a degree three digits are more than they are worth.
    return f"{degrees:.3g}°" if abs(degrees) >= 0.1 else f"{degrees:.2g}°"


def _counts(counts: Any) -> str | None:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n) or None


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,  # two columns that a terminal of 80 needs
        pad_edge=False,
    )
    table.add_column("projection", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _projection_table(report: RotationReport) -> Table:
    table = _table(
        "Angles by projection",
        *("units", "mean θ", "max θ", "norm", "change", "mode", "class"),
    )
    groups: dict[str, list[UnitRotation]] = {}
    for unit in report.units:
        groups.setdefault(unit.label, []).append(unit)
    rows: list[tuple[str, Aggregate, list[UnitRotation]]] = [
        (name, found, groups[name]) for name, found in report.by_projection.items()
    ]
    if len(rows) > 1:
        rows.append(("all", report.whole, list(report.units)))
    for name, found, units in rows:
        table.add_row(
            name,
            f"{found.units:,}",
            _angle(found.theta_deg),
            _angle(found.max_theta_deg),
            f"{found.norm_ratio:.4f}",
            number(found.relative_change, 3),
            _commonest([u.mode for u in units]),
            _commonest([u.change for u in units]),
        )
    table.caption = "norm: ‖W'‖ / ‖W‖; change: ‖ΔW‖ / ‖W‖ (of all units as one vector)."
    table.caption_justify = "left"
    return table


def _commonest(names: Sequence[str]) -> str:
    """The commonest class, and its share where it is not the only one."""
    ((name, count),) = Counter(names).most_common(1)
    # Rounded down: 359 of 360 are not all.
    return name if count == len(names) else f"{name} {100 * count // len(names)}%"


def _spectrum_table(report: RotationReport) -> Table:
    table = _table(
        "Spectrum of ΔW, means by projection",
        *("layers", "rank", "effective", "stable", "in W's top", "intruders"),
    )
    groups: dict[str, list[Any]] = {}
    for one in report.spectra:
        groups.setdefault(one.projection, []).append(one)
    for name, found in groups.items():
        energies = [s.energy_in_top for s in found if s.energy_in_top is not None]
        counted = [s.intruders for s in found if s.intruders is not None]
        table.add_row(
            name,
            f"{len(found):,}",
            number(_mean([s.rank for s in found]), 3),
            number(_mean([s.effective_rank for s in found]), 3),
            number(_mean([s.stable_rank for s in found]), 3),
            f"{_mean(energies):.1%}" if energies else "–",
            f"{sum(counted):,}" if counted else "–",
        )
    top = max((s.top for s in report.spectra), default=0)
    table.caption = (
        f"In W's top: share of ‖ΔW‖² in W's {top} largest singular directions, both sides."
        if top
        else None
    )
    table.caption_justify = "left"
    return table


def _diversity_table(report: RotationReport) -> Table:
    table = _table("Mean angle between heads, by projection", "layers", "before", "after")
    groups: dict[str, list[Any]] = {}
    for one in report.diversity:
        key = one.projection if one.projection.startswith(one.role) else None
        groups.setdefault(key or f"{one.projection} ({one.role})", []).append(one)
    for name, found in groups.items():
        table.add_row(
            name,
            f"{len(found):,}",
            f"{_mean([d.before for d in found]):.2f}°",
            f"{_mean([d.after for d in found]):.2f}°",
        )
    return table


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _comparison_table(comparison: Comparison) -> Table:
    table = Table(
        title="Comparison", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("tuned")
    measured = any(r.perplexity_ratio is not None for r in comparison.runs)
    headings = ["verdict", "θ̄", "θ̄ over all", "max θ", "‖ΔW‖/‖W‖", "units"]
    for heading in (*headings, *(("perplexity", "KL") if measured else ())):
        table.add_column(heading, justify="right")
    for run in comparison.runs:
        ratio = run.perplexity_ratio
        table.add_row(
            run.name,
            Text(run.verdict, style=_COLOURS[run.verdict]),
            _angle(run.theta_bar_deg),
            _angle(run.theta_bar_all_deg),
            _angle(run.max_theta_deg),
            number(run.relative_change, 3),
            f"{run.units:,}",
            *(("–" if ratio is None else f"× {ratio:.4g}", number(run.kl, 3)) if measured else ()),
        )
    table.caption = (
        "θ̄ over all: with the units that another run changed and this one did not, at 0°."
    )
    table.caption_justify = "left"
    return table
