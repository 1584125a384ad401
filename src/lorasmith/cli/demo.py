"""``lorasmith demo``: fine-tune a real language model, and show what it gained and lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorasmith.cli.output import Common, CommonOptions, emit, number, session, stderr
from lorasmith.training.config import AdapterOptions, TrainConfig

if TYPE_CHECKING:
    from lorasmith.diagnostics.records import Retention, RotationReport
    from lorasmith.training.evaluate import EvalReport, Example, TaskReport
    from lorasmith.training.records import TrainResult
    from lorasmith.web import Card

__all__ = ["demo"]


def demo(
    *,
    output: Annotated[Path, Parameter(alias="-o")] = Path("runs/demo"),
    model: str = "smollm2",
    data: str = "builtin:dates-en",
    variant: str = "lora",
    r: int = 16,
    steps: int = 32,
    batch_size: int = 16,
    lr: float = 1e-3,
    rows: int = 100,
    general_characters: int = 12_000,
    seed: int = 0,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Fine-tune a language model, and measure what it learned and what it forgot.

    SmolLM2-135M learns to bring written-out dates into ISO 8601. Before and after, it writes
    dates that it was not trained on, and reads English prose that has nothing to do with
    them; and it is measured how far the weights have turned. The adapter and report.html are
    in OUTPUT.

    Parameters
    ----------
    output
        Directory for the adapter and the report; an earlier demo there is replaced.
    model
        Base model: an alias (smollm2), a hub id, or a path.
    data
        Rows to train and test on, with splits train, validation and test.
    variant
        Adapter family.
    r
        Rank, for low-rank families.
    steps
        Optimiser steps.
    batch_size
        Rows a step.
    lr
        Peak learning rate.
    rows
        Held-out rows that the model writes before and after.
    general_characters
        Length of the prose.
    seed
        Seed of rows, adapter and order.
    """
    with session(common):
        found = _Demo(common).run(
            TrainConfig(
                model,
                data,
                output=output,
                overwrite=True,
                adapter=_adapter_options(variant, r),
                limit=steps * batch_size,
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                eval_data=data,
                eval_data_split="validation",
                eval_limit=64,
                eval_steps=max(1, steps // 4),
                save_steps=None,
                log_steps=1,
            ),
            test_rows=rows,
            general_characters=general_characters,
        )
        emit(common, found.to_dict(), found.show)
    return 0


def _adapter_options(variant: str, r: int) -> AdapterOptions:
    import dataclasses

    options = AdapterOptions(variant=variant)
    # IA3 and its like have no rank.
    if "r" in {f.name for f in dataclasses.fields(options.to_config())}:
        return AdapterOptions(variant=variant, r=r)
    return options


class _Found:
    """Everything that the demo measured."""

    def __init__(
        self,
        config: TrainConfig,
        result: TrainResult,
        before: EvalReport,
        after: EvalReport,
        kept: Retention,
        diagnosis: RotationReport | None,
        questions: tuple[str, ...],
        report: Path,
        seconds: float,
        peak: int,
    ) -> None:
        self.config, self.result, self.report = config, result, report
        self.before, self.after = before, after
        self.questions = questions
        self.kept, self.diagnosis = kept, diagnosis
        self.general_before, self.general_after = kept.perplexity_before, kept.perplexity_after
        self.seconds, self.peak_memory_bytes = seconds, peak

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "output": str(self.config.output),
            "report": str(self.report),
            "before": self.before.to_dict(examples=0) | {"general_perplexity": self.general_before},
            "after": self.after.to_dict(examples=0) | {"general_perplexity": self.general_after},
            "examples": [asdict(e) for e in self.after.examples[:10]],
            "retention": asdict(self.kept),
            "diagnosis": None
            if self.diagnosis is None
            else self.diagnosis.to_dict()["summary"] | {"units": len(self.diagnosis.units)},
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "training": self.result.to_dict(),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, before, after), as people read them."""
        return [
            ("exact match", share(self.before), share(self.after)),
            ("loss (nats a token)", number(self.before.loss), number(self.after.loss)),
            (
                "perplexity of general English",
                number(self.general_before),
                number(self.general_after),
            ),
        ]

    def examples(self) -> list[tuple[str, Example, Example]]:
        """(question, before, after) of each row; the prompt with its template if need be."""
        questions = self.questions
        if len(questions) != len(self.after.examples):
            questions = tuple(e.prompt for e in self.after.examples)
        return list(zip(questions, self.before.examples, self.after.examples, strict=True))

    def show(self, console: Console) -> None:
        """The tables on a terminal."""
        table = Table("held-out rows", "before", "after", title="Before and after")
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        examples = Table("prompt", "expected", "before", "after", title="What it writes")
        for asked, one, two in self.examples()[:5]:
            good, bad = ("✓", "green"), ("✗", "red")
            examples.add_row(
                Text(asked),
                Text(one.expected),
                Text.assemble(good if one.match else bad, " ", one.got),
                Text.assemble(good if two.match else bad, " ", two.got),
            )
        console.print(examples)
        console.print(
            f"Beside the task: the same likeliest token as before in {self.kept.agreement:.1%} of "
            f"English prose, KL {self.kept.kl:.3g} nats a token."
        )
        if self.diagnosis is not None:
            d = self.diagnosis
            console.print(
                f"Weights: θ̄ = {d.theta_bar_deg:.3g}° over {len(d.units):,} heads and projections, "
                f"at most {d.max_theta_deg:.3g}°: {d.verdict}"
            )
        console.print(
            f"{self.result.trainable_parameters:,} parameters trained on {self.result.rows:,} "
            f"rows; {self.seconds:.0f} s in all, {self.result.seconds:.0f} s of them training; "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        )
        console.print(f"adapter  {self.config.output}")
        console.print(f"report   {self.report}")


def share(report: EvalReport | TaskReport) -> str:
    """Exact match as a percentage."""
    return "–" if report.exact_match is None else f"{report.exact_match:.0%}"


class _Demo:
    def __init__(self, common: Common) -> None:
        self.common = common

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Says what is going on, and how long it took."""
        started = time.perf_counter()
        console = stderr()
        if self.common.quiet:
            yield
            return
        if console.is_terminal:
            with console.status(text):
                yield
        else:
            yield
        console.print(f"{text}: {time.perf_counter() - started:.1f} s", style="dim")

    def run(self, config: TrainConfig, *, test_rows: int, general_characters: int) -> _Found:
        import dataclasses

        from lorasmith.training.data import load_rows
        from lorasmith.training.evaluate import evaluate, general_text
        from lorasmith.training.models import load_model
        from lorasmith.training.records import peak_memory_bytes
        from lorasmith.training.retention import retention
        from lorasmith.training.run import train

        started = time.perf_counter()
        with self.phase(f"Loading {config.model}"):
            model, tokenizer = load_model(config.model)
        rows = load_rows(config.data, split="test", limit=test_rows, seed=config.seed)
        text = general_text(general_characters)
        with self.phase("Measuring the base model"):
            before = evaluate(model, tokenizer, rows, batch_size=50)
        result = train(config, model=model, tokenizer=tokenizer, progress=not self.common.quiet)
        with self.phase("Measuring the adapted model"):
            after = evaluate(model, tokenizer, rows, batch_size=50)
        with self.phase("Measuring what it still knows"):
            # The adapter is switched off and on: the base is what it was before.
            kept = retention(model, text, tokenizer=tokenizer)
            kept = dataclasses.replace(kept, text="general English")
        with self.phase("Measuring how far the weights have turned"):
            diagnosis = _diagnosis(model, kept, str(config.output))
        path = config.output / "report.html"
        found = _Found(
            config,
            result,
            before,
            after,
            kept,
            diagnosis,
            tuple(rows["prompt"]) if "prompt" in rows.column_names else (),
            path,
            time.perf_counter() - started,
            peak_memory_bytes(next(model.parameters()).device),
        )
        write_demo_report(found, path)
        return found


def _diagnosis(model: Any, kept: Retention, tuned: str) -> RotationReport | None:
    """What the adapter on the model has done to its weights; None if it has none of its own."""
    import dataclasses

    import lorasmith as ls
    from lorasmith.errors import FuseError

    try:
        # top=0: W's own singular vectors would take longer than the training.
        report = ls.diagnose(model, spectrum=True, top=0)
    except FuseError:  # what it does depends on the input, so that no weight acts like it
        return None
    return dataclasses.replace(report, tuned=tuned, retention=kept)


#: Rows of the report's table of examples.
_SHOWN = 20


def write_demo_report(found: _Found, path: Path) -> None:
    """The demo's report.html."""
    from lorasmith.web import Card, Cell, Column, Figure, Note, Section, loss_figure, write_report
    from lorasmith.web import Table as HtmlTable
    from lorasmith.web.diagnosis import diagnosis_sections

    result, before, after = found.result, found.before, found.after
    change = found.general_after / found.general_before - 1
    history: list[dict[str, Any]] = [{"step": p.step, "loss": p.loss} for p in result.losses]
    history += [{"step": e.step, "eval_loss": e.loss} for e in result.evaluations]
    examples = HtmlTable(
        "What it writes",
        (
            Column("Prompt"),
            Column("Expected", "code"),
            Column("Before", "code"),
            Column("After", "code"),
        ),
        tuple(
            (
                asked,
                one.expected,
                Cell(one.got, "good" if one.match else "bad"),
                Cell(two.got, "good" if two.match else "bad"),
            )
            for asked, one, two in found.examples()[:_SHOWN]
        ),
        caption=f"The first {min(_SHOWN, after.generated)} of {after.generated} held-out rows, "
        "written greedily. A row counts only if the whole text is equal, so writing stops a few "
        "tokens behind the length of the longest expected text.",
    )
    figures = HtmlTable(
        "Before and after",
        (Column("Measure"), Column("Before", "number"), Column("After", "number")),
        tuple((name, one, two) for name, one, two in found.rows()),
        sortable=False,
    )
    course = HtmlTable(
        "Evaluations",
        (
            Column("Step", "number"),
            Column("Loss", "number"),
            Column("Perplexity", "number"),
        ),
        tuple((e.step, e.loss, e.perplexity) for e in result.evaluations),
        caption=f"On {result.evaluations[-1].tokens:,} supervised tokens of the validation split.",
    )
    tasks = HtmlTable(
        "Tasks",
        (
            Column("Task"),
            Column("Loss before", "number"),
            Column("Loss after", "number"),
            Column("Exact match before"),
            Column("Exact match after"),
        ),
        tuple(
            (name, before.tasks[name].loss, one.loss, share(before.tasks[name]), share(one))
            for name, one in after.tasks.items()
        ),
    )
    adapter = {k: v for k, v in result.adapter.items() if v not in (None, [], {}, ())}
    kept, diagnosis = found.kept, found.diagnosis
    turned = () if diagnosis is None else (_rotation_card(diagnosis),)
    write_report(
        path,
        title=f"{result.base} learns {found.config.data.removeprefix('builtin:')}",
        subtitle=f"{adapter.get('variant', '')} adapter, {result.trainable_parameters:,} "
        f"parameters, {result.steps} steps of {found.config.batch_size} rows",
        cards=(
            Card(
                "Exact match",
                share(after),
                f"on {after.generated} held-out rows",
                "good" if after.matched > before.matched else "bad",
                share(before),
            ),
            Card(
                "Perplexity of general English",
                number(found.general_after),
                f"{change:+.1%}; higher means something was forgotten. The same likeliest token "
                f"in {kept.agreement:.1%}, KL {kept.kl:.3g} nats",
                "good" if change < 0.02 else "warn" if change < 0.1 else "bad",
                number(found.general_before),
            ),
            *turned,
            Card(
                "Training",
                f"{result.seconds:.0f} s",
                f"{result.tokens_per_second:,.0f} tokens/s on {result.device}",
            ),
            Card(
                "Peak memory",
                f"{found.peak_memory_bytes / 2**30:.2f} GiB",
                f"base in {result.dtype}, adapter in float32",
            ),
        ),
        sections=(
            Section(
                "Result",
                (figures, *((tasks,) if after.tasks else ()), examples),
                intro="The same rows of the test split before and after training."
                + (
                    " None of their dates or numbers is in the training split."
                    if found.config.data.startswith("builtin:")
                    else ""
                ),
            ),
            Section(
                "Training",
                (
                    Figure(
                        "Loss",
                        loss_figure(history),
                        "Cross-entropy of the answer, in nats a token.",
                    ),
                    course,
                ),
            ),
            Section(
                "What it cost",
                (
                    Note(
                        "General English is prose from Python's own language reference. It has "
                        "nothing to do with the task, so a rise of its perplexity is knowledge "
                        "lost. The base weights are untouched: without the adapter the model is "
                        "what it was.",
                    ),
                ),
            ),
            *(() if diagnosis is None else diagnosis_sections(diagnosis, level="Weights: ")),
            Section(
                "Settings",
                (
                    HtmlTable.from_mapping("Adapter", adapter),
                    HtmlTable.from_mapping(
                        "Run",
                        {
                            "model": result.base,
                            "data": found.config.data,
                            "rows": result.rows,
                            "steps": result.steps,
                            "batch size": found.config.batch_size,
                            "learning rate": found.config.lr,
                            "seed": found.config.seed,
                            "batches": result.packing,
                            **result.versions,
                        },
                    ),
                ),
                columns=2,
            ),
        ),
        footer=f"lorasmith demo -o {found.config.output}",
    )


def _rotation_card(diagnosis: RotationReport) -> Card:
    """θ̄ of the demo's adapter."""
    from lorasmith.web import Card

    return Card(
        "Rotation of the weights, θ̄",
        f"{diagnosis.theta_bar_deg:.3g}°",
        f"at most {diagnosis.max_theta_deg:.3g}° over {len(diagnosis.units):,} heads and "
        f"projections; noise floor {diagnosis.floor_deg:.2g}°",
    )
