"""``lorasmith eval MODEL DATA``: loss, perplexity and exact match."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr

__all__ = ["evaluate"]


def evaluate(
    model: str,
    data: str,
    *,
    adapter: Annotated[str | None, Parameter(alias="-a")] = None,
    split: str | None = None,
    limit: int | None = None,
    exact_match: bool = True,
    max_new_tokens: int | None = None,
    max_length: int = 1024,
    batch_size: int = 16,
    show: int = 5,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Measure a model, with or without an adapter: loss, perplexity, exact match.

    Parameters
    ----------
    model
        Base model: an alias (smollm2), a hub id, or a path.
    data
        Rows: a jsonl, json, csv, tsv, parquet or txt file, a hub id, or builtin:NAME.
    adapter
        Adapter to use: a directory or a hub id.
    split
        Split of DATA; default: test for hub ids and builtin:NAME, all rows of a file.
    limit
        Use at most so many rows.
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
    dtype
        dtype of the base model.
    device
        auto, cpu, cuda or mps.
    revision
        Branch, tag or commit of MODEL on the hub.
    trust_remote_code
        Let code that comes with MODEL run.
    allow_base_mismatch
        Use the adapter even if it was made for other base weights.
    """
    with session(common):
        from lorasmith.cli.progress import bar
        from lorasmith.training.evaluate import evaluate as measure

        rows = load_eval_rows(data, split, limit)
        base, tokenizer = load_with_adapter(
            model,
            adapter,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_base_mismatch=allow_base_mismatch,
        )
        with bar(stderr(), shown=not common.quiet) as progress:
            report = measure(
                base,
                tokenizer,
                rows,
                max_length=max_length,
                batch_size=batch_size,
                exact_match=exact_match,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        payload = {
            "model": model,
            "adapter": adapter,
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
            if report.examples and show > 0:
                table = Table("", "expected", "written")
                for example in report.examples[:show]:
                    table.add_row("✓" if example.match else "✗", example.expected, example.got)
                console.print(table)

        emit(common, payload, render)
    return 0


def load_eval_rows(data: str, split: str | None, limit: int | None) -> Any:
    """Rows to evaluate on: the test split, or the whole file where there are no splits."""
    from lorasmith.training.data import load_rows

    if split is None:
        split = "train" if Path(data).expanduser().exists() else "test"
    return load_rows(data, split=split, limit=limit)


def load_with_adapter(
    model: str, adapter: str | None, *, allow_base_mismatch: bool, **settings: Any
) -> tuple[Any, Any]:
    """The base model with an adapter on it, if one is given, and its tokenizer."""
    from lorasmith.training.models import load_model

    base, tokenizer = load_model(model, **settings)
    if adapter is not None:
        import lorasmith as ls

        ls.load(base, adapter, allow_base_mismatch=allow_base_mismatch)
    return base, tokenizer
