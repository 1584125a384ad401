"""The page of a diagnosis: verdict in words, key numbers, figures, and every angle in tables.

    report.save("report.html")
    write_report({"LoRA": first, "DoRA": second}, "comparison.html")

One file that opens offline, made of the blocks of ``lorasmith.web.report``. Figures are inline
SVG that follow the page's theme; long tables are data that the page's script draws a page of
rows at a time, so a report of ten thousand heads stays usable. The report itself is in the page,
too, and :func:`read_report` takes it out again; all numbers but those of the tables of angles
between heads (which are large, and in ``report.save("….json")``) are kept, to nine digits.

What the page claims is no more than what was measured: a verdict on θ̄ is a rule of thumb on the
weights. Only held-out text says what the model still knows, so its perplexity stands beside θ̄.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.diagnostics.compare import Comparison, compare
from lorasmith.diagnostics.modes import DANGER_DEG, WARNING_DEG
from lorasmith.diagnostics.records import RotationReport
from lorasmith.errors import ConfigError
from lorasmith.web.report import (
    Block,
    Card,
    Cell,
    Column,
    Figure,
    Note,
    Section,
    Table,
    Tone,
    Value,
)
from lorasmith.web.report import write_report as _write

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["diagnosis_cards", "diagnosis_sections", "read_report", "write_report"]

#: Width of figures in inches; the page scales them to its column.
_WIDTH = 8.6
#: Rows of a long table at a time.
_PAGE = 20
#: Ratios of perplexities above which the page draws attention; no verdict depends on them.
_WORSE, _MUCH_WORSE = 1.05, 1.25
_VERDICTS: Mapping[str, Tone] = {"SAFE": "good", "WARNING": "warn", "DANGER": "bad"}
_MODES = {
    "preserved": "θ < 5° and a norm within 10 % of the old one (from 0.9 to 1.1)",
    "additive": "θ < 5°, norm at least 1.1 times the old one",
    "substitutive": "θ of 5° or more, norm at least 0.9 times the old one",
    "damaged": "norm below 0.9 times the old one",
}
_CHANGES = {
    "unchanged": "no more than rounding to the storage dtype makes",
    "scaled": "the same direction, another norm",
    "extended": "all of the old weights is still there, with something beside it",
    "turned": "about the same norm in another direction",
    "replaced": "less than half of the old weights' energy is left, or its sign is turned",
}


def write_report(
    reports: RotationReport | Mapping[str, RotationReport], path: str | os.PathLike[str]
) -> Path:
    """Writes a diagnosis, or several side by side, as one self-contained HTML file.

    Args:
        reports: One report, or reports of one base by name.
        path: The file to write; it appears whole or not at all.

    Raises:
        ConfigError: There is no report, or several that are not of one base or cut differently.
        MissingDependencyError: Matplotlib or Jinja is not installed.
        LorasmithError: The file cannot be written.
    """
    given = {"": reports} if isinstance(reports, RotationReport) else dict(reports)
    if not given:
        raise ConfigError("There is no report to write.", got="an empty mapping", key="reports")
    if len(given) == 1:
        (report,) = given.values()
        return _write(
            path,
            title="What fine-tuning did to the weights",
            subtitle=f"{report.tuned}, compared with {report.base}",
            cards=diagnosis_cards(report),
            sections=diagnosis_sections(report),
            data={"report": _data(report)},
        )
    both = compare(given)
    return _write(
        path,
        title="What fine-tuning did to the weights",
        subtitle=f"{', '.join(both.names)}: {len(given)} runs compared with {both.reports[0].base}",
        cards=_run_cards(both),
        sections=_comparison_sections(both),
        data={"reports": {name: _data(report) for name, report in given.items()}},
    )


def read_report(path: str | os.PathLike[str]) -> RotationReport | dict[str, RotationReport]:
    """The report in a page that :func:`write_report` wrote, or the reports by name.

    Raises:
        ConfigError: The file holds none.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    try:
        values = json.loads(found[1]) if found else {}
        if "report" in values:
            return _from_data(values["report"])
        return {name: _from_data(one) for name, one in values["reports"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "There is no diagnosis in the page.",
            expected="a page that RotationReport.save wrote as .html",
            got=repr(error),
            file=file,
        ) from error


# Parts of the page, for other pages too ----------------------------------------------------


def diagnosis_cards(report: RotationReport) -> tuple[Card, ...]:
    """The headline figures of a diagnosis."""
    theta, whole, crit = report.theta_bar_deg, report.whole, report.theta_crit_deg
    cards = [
        Card(
            "Verdict on θ̄ (EgoRA's rule)",
            report.verdict if math.isfinite(theta) else "none",
            f"SAFE below {WARNING_DEG:g}°, DANGER from {DANGER_DEG:g}°; a rule of thumb",
            _VERDICTS[report.verdict] if math.isfinite(theta) else "bad",
        ),
        Card(
            "Mean rotation θ̄",
            _angle(theta),
            f"largest {_angle(report.max_theta_deg)}"
            + (f"; noise floor {_angle(report.floor_deg)}" if report.floor_deg else ""),
        ),
        Card(
            "Size of the change, ‖ΔW‖ / ‖W‖",
            _number(whole.relative_change) if report.units else "0",
            f"norm ratio ‖W'‖ / ‖W‖ = {whole.norm_ratio:.5g}"
            if report.units
            else "no weight changed",
        ),
    ]
    kept = report.retention
    if kept is not None:
        worse = kept.perplexity_ratio
        cards.append(
            Card(
                f"Perplexity on held-out text ({kept.text})",
                _number(kept.perplexity_after),
                f"{_change(worse)}; KL {kept.kl:.3g} nats a token, same most likely token "
                f"{_percent(kept.agreement)} of the time",
                _retention_tone(worse),
                before=_number(kept.perplexity_before),
            )
        )
    cards.append(
        Card(
            f"Changed {_what(report)}",
            f"{len(report.units):,}",
            f"{_count(report.unchanged, 'layer')} unchanged"
            + (f", {len(report.skipped):,} not compared" if report.skipped else ""),
        )
    )
    cards.append(
        Card(
            "θ_crit = arcsin(1/√head_dim)",
            "unknown" if crit is None else _angle(crit),
            "no head size is known"
            if crit is None
            else f"for heads of {report.head_dim}: what a random direction has of a head",
        )
    )
    return tuple(cards)


def diagnosis_sections(report: RotationReport, *, level: str = "") -> tuple[Section, ...]:
    """The body of a diagnosis.

    Args:
        report: What to show.
        level: Put before each title, where a page has several diagnoses.
    """
    sections = [Section(f"{level}In words", _words(report))]
    if report.units:
        sections += [_rotation(report, level), _classes(report, level)]
    if report.retention is not None:
        sections.append(_retention(report, level))
    if report.spectra:
        sections.append(_spectra(report, level))
    if report.diversity:
        sections.append(_diversity(report, level))
    if report.units:
        sections.append(_tables(report, level))
    sections.append(_details(report, level))
    return tuple(sections)


# Sections ----------------------------------------------------------------------------------


def _words(report: RotationReport) -> tuple[Block, ...]:
    """What it comes to, for somebody who has never heard of θ̄."""
    if not report.units:
        same = f"Nothing changed: {_count(report.unchanged, 'layer')} compared, all equal."
        return (Note(same, tone="warn"),)
    theta, share = report.theta_bar_deg, report.whole.relative_change
    broken = sum(not math.isfinite(u.theta_deg) for u in report.units)
    largest = max(report.units, key=lambda u: u.theta_deg if math.isfinite(u.theta_deg) else -1)
    first = (
        f"On average a unit ({_one(report)}) was turned by θ̄ = {_angle(theta)} away from where it "
        f"pointed, and the change is {_percent(share)} as large as the weights that it changes. "
        f"The largest rotation, {_angle(largest.theta_deg)}, is in {_where(largest)}."
    )
    counts = {k: n for k, n in report.change_counts.items() if n}
    first += (
        " Of all units, "
        + _listed([f"{n:,} ({_percent(n / len(report.units))}) are {k}" for k, n in counts.items()])
        + "."
    )
    blocks: list[Block] = [Note(first)]
    rule = (
        f"By EgoRA's rule this is {report.verdict}: its thresholds are {WARNING_DEG:g}° and "
        f"{DANGER_DEG:g}° for θ̄. The rule looks at weights alone. Small angles can forget and "
        "large ones need not: "
    )
    kept = report.retention
    if not math.isfinite(theta):
        blocks.append(
            Note(
                f"{broken:,} of {len(report.units):,} angles are not numbers, so θ̄ is none and the "
                "verdict means nothing. Look for weights that are infinite or not a number.",
                tone="bad",
            )
        )
    elif kept is None:
        rule += "what the model still knows was not measured here (lorasmith diagnose --text)."
        # A rule of thumb alone earns no tick.
        tone: Tone = "neutral" if report.verdict == "SAFE" else "warn"
        blocks.append(Note(rule, "What the verdict is worth", tone))
    else:
        ratio = kept.perplexity_ratio
        rule += (
            f"on {kept.tokens:,} tokens of held-out text the perplexity went from "
            f"{_number(kept.perplexity_before)} to {_number(kept.perplexity_after)} "
            f"({_change(ratio)}), and its most likely next token is the same in "
            f"{_percent(kept.agreement)} of all places. "
        )
        if report.verdict == "SAFE" and ratio > _WORSE:
            rule += f"So the rule is too kind here: the loss is over {100 * (_WORSE - 1):.0f} %. "
        elif report.verdict == "DANGER" and ratio <= _WORSE:
            rule += "So the rule is too strict here. "
        rule += "Believe what was measured before the angle."
        blocks.append(Note(rule, "What the verdict is worth", _retention_tone(ratio)))
    below = sum(u.theta_deg < u.floor_deg for u in report.units)
    if below:
        blocks.append(
            Note(
                f"{below:,} of {len(report.units):,} angles are below the noise floor: rounding to "
                "the storage dtype alone can make them. They are hatched in the figures."
            )
        )
    return tuple(blocks)


def _rotation(report: RotationReport, level: str) -> Section:
    from lorasmith.diagnostics import plots

    blocks: list[Block] = [
        _figure(
            "Rotation by layer and projection",
            lambda: plots.heat_map(report, width=_WIDTH),
            "Mean θ of the units of each projection in each layer.",
        )
    ]
    if any(u.head is not None for u in report.units):
        blocks.append(
            _figure(
                "Rotation of each head",
                lambda: plots.head_map(report, width=_WIDTH),
                "One panel a projection; with grouped queries there are fewer key and value heads.",
            )
        )
    if any(u.layer is not None for u in report.units):
        blocks.append(
            _figure(
                "Rotation by layer",
                lambda: plots.layer_profile(report, width=_WIDTH),
                "Mean θ by role, over the band from the 10th to the 90th percentile of the units.",
            )
        )
    blocks.append(
        _figure(
            "Rotation by projection",
            lambda: plots.projection_comparison(report, width=_WIDTH),
            "Boxes hold the middle half and the median, whiskers the middle 90 %; points are "
            "units, at most 150 for a projection.",
        )
    )
    return Section(
        f"{level}Rotation",
        tuple(blocks),
        "θ is the angle between a unit's weights before and after, taken as one long vector: 0° "
        "is no change of direction, 90° is nothing in common. Hatching marks what rounding alone "
        "can make.",
    )


def _classes(report: RotationReport, level: str) -> Section:
    from lorasmith.diagnostics import plots

    total = len(report.units)

    def table(title: str, counts: Mapping[Any, int], meaning: Mapping[str, str]) -> Table:
        return Table(
            title,
            ("Class", Column("Units", "number"), Column("Share (%)", "number", 1), "Meaning"),
            tuple((k, n, 100 * n / total, meaning[k]) for k, n in counts.items()),
        )

    return Section(
        f"{level}Classes",
        (
            _figure("Classes", lambda: plots.mode_distribution(report, width=_WIDTH)),
            table("EgoRA's classes, as published", report.mode_counts, _MODES),
            table("Our classes", report.change_counts, _CHANGES),
        ),
        "EgoRA's classes go by angle and norm alone, so that weights replaced by random numbers "
        "of the same size are “substitutive” and weights scaled by 0.85 are “damaged”. Ours go by "
        "how much of the old weights is still there, and what is there beside it.",
    )


def _retention(report: RotationReport, level: str) -> Section:
    from lorasmith.diagnostics import plots

    kept = report.retention
    assert kept is not None  # the caller has looked
    return Section(
        f"{level}What is still known",
        (
            _figure(
                "Perplexity on held-out text",
                lambda: plots.retention(report, width=_WIDTH),
                f"Text: {kept.text}, {kept.tokens:,} predicted tokens. KL is the mean divergence "
                "of the tuned model's next token from the base's.",
            ),
        ),
        "Measured by running both models on text that neither was tuned on. A ratio of 1 means "
        "that the text is as likely as before.",
    )


def _spectra(report: RotationReport, level: str) -> Section:
    from lorasmith.diagnostics import plots

    intruders = any(s.intruders is not None for s in report.spectra)
    energy = any(s.energy_in_top is not None for s in report.spectra)
    columns: list[Column | str] = [
        Column("Layer", "number"),
        "Projection",
        Column("Rank", "number"),
        Column("Effective rank", "number"),
        Column("Stable rank", "number"),
        Column("Largest σ", "number"),
    ]
    columns += [Column("In W's top (%)", "number", 2)] if energy else []
    columns += [Column("Intruders", "number")] if intruders else []
    rows = []
    for s in report.spectra:
        row: list[Value] = [s.layer, s.projection, s.rank, s.effective_rank, s.stable_rank]
        row.append(max(s.singular_values, default=None))
        if energy:
            row.append(None if s.energy_in_top is None else 100 * s.energy_in_top)
        row += [s.intruders] if intruders else []
        rows.append((*row, s.name))
    return Section(
        f"{level}Spectrum of the change",
        (
            _figure(
                "Singular values of ΔW",
                lambda: plots.spectrum(report, width=_WIDTH),
                "Lines are medians over the layers, bands reach from the smallest to the largest.",
            ),
            Table(
                "Spectrum by layer",
                (*columns, Column("Name", "code")),
                tuple(rows),
                "Effective rank: exp of the entropy of σ² / Σσ². Stable rank: Σσ² / σ₁²."
                + (" In W's top: share of ‖ΔW‖² in W's leading singular subspaces." * energy),
                search=True,
                page=_PAGE,
            ),
        ),
        "How many directions the change uses, and whether the tuned weights have leading "
        "directions that the old ones had not (intruder dimensions)."
        if intruders
        else "How many directions the change uses.",
    )


def _diversity(report: RotationReport, level: str) -> Section:
    from lorasmith.diagnostics import plots

    blocks: list[Block] = []
    if any(d.layer is not None for d in report.diversity):
        blocks.append(
            _figure(
                "Angle between heads",
                lambda: plots.head_diversity(report, width=_WIDTH),
                "Mean over all pairs of heads of a projection; hollow and dashed is before.",
            )
        )
    blocks.append(
        Table(
            "Head diversity by layer",
            (
                Column("Layer", "number"),
                "Projection",
                "Role",
                Column("Before (°)", "number", 4),
                Column("After (°)", "number", 4),
                Column("Change (°)", "number", 4),
            ),
            tuple(
                (d.layer, d.projection, d.role, d.before, d.after, d.after - d.before)
                for d in report.diversity
            ),
            search=True,
            page=_PAGE,
        )
    )
    return Section(
        f"{level}Head diversity",
        tuple(blocks),
        "How different the heads of one projection are: 0° if all are the same, 90° if they have "
        "nothing in common.",
    )


def _tables(report: RotationReport, level: str) -> Section:
    def groups(title: str, first: Column | str, found: Mapping[Any, Any]) -> Table:
        return Table(
            title,
            (
                first,
                Column("Units", "number"),
                Column("Mean θ (°)", "number"),
                Column("Largest θ (°)", "number"),
                Column("Joint θ (°)", "number"),
                Column("‖W'‖ / ‖W‖", "number", 5),
                Column("‖ΔW‖ / ‖W‖", "number"),
                Column("Energy (%)", "number", 2),
            ),
            tuple(
                (
                    key,
                    a.units,
                    a.theta_deg,
                    a.max_theta_deg,
                    a.whole_theta_deg,
                    a.norm_ratio,
                    a.relative_change,
                    100 * a.energy,
                )
                for key, a in found.items()
            ),
            "Joint θ: of all weights of the row as one vector. Energy: share of the whole ‖ΔW‖².",
            page=_PAGE,
        )

    units = Table(
        "Every unit",
        (
            Column("Layer", "number"),
            "Projection",
            "Role",
            Column("Head", "number"),
            Column("θ (°)", "number"),
            Column("‖W'‖ / ‖W‖", "number", 5),
            Column("Kept", "number", 5),
            Column("‖ΔW‖ / ‖W‖", "number"),
            Column("Floor (°)", "number"),
            "EgoRA's class",
            "Our class",
        ),
        tuple(
            (
                u.layer,
                u.label,
                u.role or "other",
                u.head,
                u.theta_deg,
                u.norm_ratio,
                u.kept,
                u.relative_change,
                u.floor_deg,
                u.mode,
                u.change,
            )
            for u in report.units
        ),
        "Kept: the share κ of the old weights that is still in the new ones. Floor: what rounding "
        "to the storage dtype can make.",
        search=True,
        page=_PAGE,
    )
    return Section(
        f"{level}Tables",
        (
            groups("By projection", "Projection", report.by_projection),
            groups("By layer", Column("Layer", "number"), report.by_layer),
            units,
        ),
    )


def _details(report: RotationReport, level: str) -> Section:
    blocks: list[Block] = []
    if report.skipped:
        blocks.append(
            Table(
                f"Not compared ({len(report.skipped):,})",
                (Column("Layer", "code"), "Why"),
                tuple((one.name, one.message) for one in report.skipped),
                search=len(report.skipped) > _PAGE,
                page=_PAGE,
            )
        )
    blocks.append(
        Table.from_mapping(
            "How it was measured",
            {
                "base": report.base,
                "tuned": report.tuned,
                "units": report.per,
                "layers unchanged": report.unchanged,
                "θ̄ with what did not change (degrees)": _number(report.theta_bar_all_deg),
                "θ̄ by number of weights (degrees)": _number(report.theta_bar_weighted_deg),
                "head size": report.head_dim,
                "noise floor (degrees)": _number(report.floor_deg),
                "time (seconds)": round(report.seconds, 2),
                "versions": dict(report.versions),
            },
        )
    )
    return Section(f"{level}Details", tuple(blocks))


# Several reports ---------------------------------------------------------------------------


def _run_cards(both: Comparison) -> tuple[Card, ...]:
    cards = []
    for run in both.runs:
        finite = math.isfinite(run.theta_bar_deg)
        detail = f"{run.units:,} units changed, largest {_angle(run.max_theta_deg)}"
        if run.perplexity_ratio is not None:
            detail += f"; perplexity {_change(run.perplexity_ratio)}"
        verdict = f"{_angle(run.theta_bar_deg)} {run.verdict}" if finite else "not a number"
        tone = _VERDICTS[run.verdict] if finite else "bad"
        cards.append(Card(f"{run.name}: θ̄", verdict, detail, tone))
    return tuple(cards)


def _comparison_sections(both: Comparison) -> tuple[Section, ...]:
    from lorasmith.diagnostics import plots

    named = dict(zip(both.names, both.reports, strict=True))
    blocks: list[Block] = []
    if any(math.isfinite(t) for u in both.units for t in u.theta_deg):
        blocks.append(
            _figure(
                "θ of each unit, and by layer",
                lambda: plots.comparison(both, width=_WIDTH),
                "Paired by unit; on the diagonal both runs turned it alike."
                if len(named) == 2
                else "Boxes hold the middle half and the median, whiskers the middle 90 %.",
            )
        )
    if any(r.retention is not None for r in both.reports):
        blocks.append(
            _figure("Perplexity on held-out text", lambda: plots.retention(named, width=_WIDTH))
        )
    runs = Table(
        "Runs",
        (
            "Run",
            "Verdict",
            Column("Units", "number"),
            Column("θ̄ (°)", "number"),
            Column("θ̄ of all (°)", "number"),
            Column("Largest θ (°)", "number"),
            Column("‖ΔW‖ / ‖W‖", "number"),
            Column("Perplexity ratio", "number"),
            Column("KL (nats)", "number"),
        ),
        tuple(
            (
                r.name,
                Cell(r.verdict, _VERDICTS[r.verdict]),
                r.units,
                r.theta_bar_deg,
                r.theta_bar_all_deg,
                r.max_theta_deg,
                r.relative_change,
                r.perplexity_ratio,
                r.kl,
            )
            for r in both.runs
        ),
        "θ̄ of all counts a unit that only another run changed as 0°. The verdict is "
        "EgoRA's rule of thumb on θ̄; the perplexity ratio (after over before) is measured.",
    )
    projections = Table(
        "By projection",
        ("Projection", *(Column(f"{name}: mean θ (°)", "number") for name in both.names)),
        tuple((label, *means) for label, means in both.by_projection().items()),
    )
    two = len(both.names) == 2
    units = Table(
        "Every unit",
        (
            Column("Layer", "number"),
            "Projection",
            Column("Head", "number"),
            *(Column(f"{name}: θ (°)", "number") for name in both.names),
            *((Column("Difference (°)", "number"),) if two else ()),
        ),
        tuple(
            (
                u.layer,
                u.projection,
                u.head,
                *u.theta_deg,
                *((u.difference_deg,) if two else ()),
            )
            for u in both.units
        ),
        search=True,
        page=_PAGE,
    )
    sections = [
        Section("Side by side", (runs, *blocks)),
        Section("Tables", (projections, units)),
    ]
    for name, report in named.items():
        inside = list(_words(report))
        if report.units:
            inside.append(
                _figure(
                    f"{name}: rotation by layer and projection",
                    lambda report=report: plots.heat_map(report, width=_WIDTH),  # type: ignore[misc]
                )
            )
            inside.append(
                _figure(
                    f"{name}: classes",
                    lambda report=report: plots.mode_distribution(report, width=_WIDTH),  # type: ignore[misc]
                )
            )
        inside += _details(report, "").blocks
        sections.append(Section(name, tuple(inside), f"{report.tuned}, compared with the base."))
    return tuple(sections)


# Words and numbers -------------------------------------------------------------------------


def _figure(title: str, draw: Callable[[], MatplotlibFigure], caption: str = "") -> Figure:
    from lorasmith.theme import figure_to_svg

    return Figure(title, figure_to_svg(draw()), caption)


def _angle(value: float) -> str:
    if not math.isfinite(value):
        return "not a number"
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}°"
    return f"{value:.3g}°"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not a number"


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "an unknown share"
    if 0.999 <= share < 1:
        return "over 99.9 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.3g} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _change(ratio: float) -> str:
    """A ratio of perplexities in words."""
    if not math.isfinite(ratio):
        return "not a number"
    share = abs(ratio - 1)
    if share < 5e-4:
        return "as before"
    return f"{100 * share:.2g} % {'higher' if ratio > 1 else 'lower'}"


def _retention_tone(ratio: float) -> Tone:
    """Only to draw attention: what loss is acceptable, nobody but the reader knows."""
    if not ratio < _MUCH_WORSE:
        return "bad"
    return "warn" if ratio > _WORSE else "good"


def _what(report: RotationReport) -> str:
    return "heads and projections" if report.per == "head" else "projections"


def _one(report: RotationReport) -> str:
    return "a head, or a whole MLP projection" if report.per == "head" else "a projection"


def _where(unit: Any) -> str:
    head = f"head {unit.head} of " if unit.head is not None else ""
    layer = f" in layer {unit.layer}" if unit.layer is not None else ""
    return f"{head}{unit.label}{layer}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# The report inside the page ----------------------------------------------------------------


def _data(report: RotationReport) -> dict[str, Any]:
    """``to_dict``, with units as one table, numbers of nine digits, and no matrices."""
    values = report.to_dict()
    fields = list(values["units"][0]) if values["units"] else []
    values["units"] = {
        "fields": fields,
        "rows": [[_short(u[name]) for name in fields] for u in values["units"]],
    }
    for one in values["diversity"]:
        one["matrix_before"] = one["matrix_after"] = []
    values["spectra"] = [{k: _short(v) for k, v in s.items()} for s in values["spectra"]]
    return values


def _from_data(values: Mapping[str, Any]) -> RotationReport:
    units = values["units"]
    rows = [dict(zip(units["fields"], row, strict=True)) for row in units["rows"]]
    return RotationReport.from_dict({**values, "units": rows})


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return [_short(v) for v in value] if isinstance(value, list | tuple) else value
