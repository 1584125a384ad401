"""``lorasmith eval MODEL DATA``: loss, perplexity and exact match."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lorasmith.cli.base_model import BaseModel, BaseModelOptions
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr

if TYPE_CHECKING:
    from lorasmith.training.evaluate import EvalReport

__all__ = ["evaluate"]


def evaluate(
    model: str,
    data: str,
    *,
    split: str | None = None,
    task_column: str = "auto",
    limit: int | None = None,
    exact_match: bool = True,
    max_new_tokens: int | None = None,
    max_length: int = 1024,
    batch_size: int = 16,
    show: int = 5,
    base_model: BaseModelOptions = BaseModel(),  # noqa: B008 - frozen
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Measure a model, with or without an adapter: loss, perplexity, exact match.

    Parameters
    ----------
    model
        Base model: an alias (smollm2), a hub id, or a path.
    data
        Rows: a jsonl, json, csv, tsv, parquet or txt file, a hub id, or builtin:NAME; or
        several tasks: NAME=SOURCE,NAME=SOURCE.
    split
        Split of DATA; default: test for hub ids and builtin:NAME, all rows of a file.
    task_column
        Column with the task of each row: the figures are also given for each. auto: the column
        task, if there is one with at most 64 tasks; none: no tasks.
    limit
        Use at most so many rows, of each source.
    exact_match
        Let the model write the completions, greedily, and compare.
    max_new_tokens
        Longest completion; default: a little more than the longest expected one.
    max_length
        Longest row, in tokens; what is longer is cut.
    batch_size
        Rows a batch.
    show
        Show so many of the completions.
    """
    with session(common):
        from lorasmith.training.data import choose_task_column, examples_of
        from lorasmith.training.evaluate import evaluate as measure
        from lorasmith.training.progress import bar
        from lorasmith.training.rows import read_from

        rows = load_eval_rows(data, split, limit)
        with read_from(data):  # what is wrong with the first row shows before the model is loaded
            examples_of(rows[0])
        base, tokenizer = base_model.load(model)
        with bar(stderr(), shown=not common.quiet) as progress, read_from(data):
            report = measure(
                base,
                tokenizer,
                rows,
                max_length=max_length,
                batch_size=batch_size,
                exact_match=exact_match,
                max_new_tokens=max_new_tokens,
                progress=progress,
                task_column=choose_task_column(task_column, rows),
            )
        payload = {
            "model": model,
            "adapter": base_model.adapter,
            "data": data,
            **report.to_dict(examples=show),
        }

        def render(console: Console) -> None:
            matched = f"{number(report.matched)} of {number(report.generated)} rows"
            share = report.exact_match
            console.print(
                grid(
                    {
                        "rows": f"{report.rows:,} ({report.tokens:,} supervised tokens)",
                        "loss": number(report.loss),
                        "perplexity": number(report.perplexity),
                        "exact match": None if share is None else f"{share:.1%} ({matched})",
                        "time": f"{report.seconds:.1f} s",
                    }
                )
            )
            if report.tasks:
                console.print(_task_table(report))
            if report.examples and show > 0:
                table = Table("", "expected", "written")
                for example in report.examples[:show]:
                    table.add_row("✓" if example.match else "✗", example.expected, example.got)
                console.print(table)

        emit(common, payload, render)
    return 0


def _task_table(report: EvalReport) -> Table:
    """A row for each task."""
    table = Table("task")
    for heading in ("rows", "loss", "perplexity", "exact match"):
        table.add_column(heading, justify="right")
    for name, found in report.tasks.items():
        table.add_row(
            name,
            f"{found.rows:,}",
            number(found.loss),
            number(found.perplexity),
            "–" if found.exact_match is None else f"{found.exact_match:.1%}",
        )
    return table


def load_eval_rows(data: str, split: str | None, limit: int | None) -> Any:
    """Rows to evaluate on: the test split, or the whole file where there are no splits."""
    from lorasmith.training.data import load_rows, load_tasks, task_sources

    several = task_sources(data)
    if several is not None:
        return load_tasks(several, lambda source: load_eval_rows(source, split, limit))
    if split is None:
        split = "train" if Path(data).expanduser().exists() else "test"
    return load_rows(data, split=split, limit=limit)
