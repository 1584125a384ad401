"""``lorasmith fleet route FLEET``: which task of a fleet a prompt belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.base_model import BaseModel, BaseModelOptions
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import ConfigError
from lorasmith.progress import bar

if TYPE_CHECKING:
    from lorasmith.fleet.router import Prompt, RouterReport, Routing

__all__ = ["route"]

#: Characters of a prompt that a table shows.
_SHOWN = 60


def route(
    fleet: str,
    /,
    *,
    model: Annotated[str, Parameter(alias="-m")],
    examples: tuple[str, ...] = (),
    others: str | None = None,
    router: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    prompt: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = (),
    most: int = 1,
    threshold: float | None = None,
    layer: int | None = None,
    held_out: float = 0.25,
    limit: int = 200,
    seed: int = 0,
    max_length: int = 512,
    batch_size: int = 16,
    template: bool = True,
    base_model: BaseModelOptions = BaseModel(),  # noqa: B008 - frozen
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Train a router on examples of each task, or ask one where prompts go.

    With --examples a router is trained, its accuracy measured on rows held out, and it is kept
    with -o. Without, --router names one. In both cases every --prompt is routed.

    Parameters
    ----------
    fleet
        The fleet that lorasmith fleet compress has written: a directory, hub id or URL.
    model
        Base model: an alias (smollm2), a hub id, or a path.
    examples
        TASK=SOURCE, once for each task: rows in any form that lorasmith train reads.
    others
        Rows that belong to no task; what resembles them goes to the base model.
    router
        A router that was kept.
    output
        Where to keep the router that is trained.
    prompt
        What to route; several times for several prompts.
    most
        How many tasks may share a prompt, by weights; 1 for the likeliest alone.
    threshold
        Probability below which a prompt goes to the base model.
    layer
        After which layer hidden states are taken; default: the middle.
    held_out
        Share of the rows of each task on which accuracy is measured.
    limit
        Use at most so many rows of each source.
    seed
        Seed of the split and of the choice of rows.
    max_length
        Longest prompt, in tokens; what is longer is cut to its end.
    batch_size
        Prompts a pass.
    template
        Put prompts into the tokenizer's chat template; --no-template takes them as they stand.
    """  # noqa: D405, D411, D416 - a parameter is called as a section is
    with session(common):
        sources = _sources(examples)
        if bool(sources) == (router is not None):
            raise ConfigError(
                "There is no router." if router is None else "There are two routers.",
                expected="--examples TASK=SOURCE to train one, or --router DIR",
                key="router",
            )
        for key, value in (("--output", output), ("--others", others)):
            if value is not None and not sources:
                raise ConfigError(f"{key} belongs to training.", expected="--examples", key=key)
        if router is not None and not prompt:
            raise ConfigError("There is nothing to route.", expected="--prompt TEXT", key="prompt")

        from lorasmith.fleet.router import TaskRouter
        from lorasmith.fleet.subspace import SharedSubspace

        known = SharedSubspace.load(fleet).ids
        _check_known(tuple(sources), known)
        data = {task: _prompts(source, limit, seed) for task, source in sources.items()}
        rest = [] if others is None else _prompts(others, limit, seed)
        base, tokenizer = base_model.load(model)
        report: RouterReport | None
        with bar(stderr(), shown=not common.quiet) as progress:
            if router is None:
                made = TaskRouter(
                    base,
                    tokenizer,
                    layer=layer,
                    template=template,
                    max_length=max_length,
                    batch_size=batch_size,
                )
                report = made.fit(
                    data,
                    others=rest,
                    held_out=held_out,
                    seed=seed,
                    threshold=threshold or 0.0,
                    progress=progress,
                )
                if output is not None:
                    made.save(output)
            else:
                made = TaskRouter.load(
                    router,
                    base,
                    tokenizer,
                    batch_size=batch_size,
                    allow_base_mismatch=base_model.allow_base_mismatch,
                )
                _check_known(made.tasks, known)
                report = made.report
            found = made.route(prompt, most=most, threshold=threshold)
        payload = {
            "fleet": fleet,
            "model": model,
            "router": None if router is None and output is None else str(router or output),
            "trained": router is None,
            "report": None if report is None else report.to_dict(),
            "prompts": [{"prompt": p, **r.to_dict()} for p, r in zip(prompt, found, strict=True)],
        }

        def render(console: Console) -> None:
            if report is not None and router is None:
                _show_report(console, report, output)
            if found:
                _show_routes(console, prompt, found)

        emit(common, payload, render)
    return 0


def _sources(examples: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in examples:
        # Ids may hold "=", sources of rows hardly do.
        task, _, source = text.rpartition("=")
        if not task or not source or task in found:
            raise ConfigError(
                "A source of examples does not say its task, or says one again.",
                expected="TASK=SOURCE, once for each task",
                got=text,
                key="examples",
            )
        found[task] = source
    return found


def _check_known(tasks: tuple[str, ...], known: tuple[str, ...]) -> None:
    from lorasmith.fleet.members import unknown_id

    for task in tasks:
        if task not in known:
            raise unknown_id(f"The fleet has no task {task!r}.", task, known, key="examples")


def _prompts(source: str, limit: int, seed: int) -> list[Prompt]:
    """The prompts of rows, without their answers."""
    from lorasmith.training.data import examples_of, load_rows

    rows: Any = load_rows(source, limit=limit, seed=seed)
    found: list[Prompt] = []
    for index, row in enumerate(rows):
        example = examples_of(row, index=index)[0]
        found.append(example.text if example.text is not None else example.as_prompt()[0])
    return found


def _show_report(console: Console, report: RouterReport, output: Path | None) -> None:
    console.print(
        grid(
            {
                "accuracy": f"{report.accuracy:.1%} of {number(report.held_out)} rows held out",
                "trained on": f"{number(report.trained)} rows, layer {report.layer}",
                "router": None if output is None else str(output),
            }
        )
    )
    table = Table("task")
    for heading in ("accuracy", "rows", "taken for"):
        table.add_column(heading, justify="left" if heading == "taken for" else "right")
    names = [_name(t) for t in report.tasks]
    for i, (name, row) in enumerate(zip(names, report.confusion, strict=True)):
        wrong = [f"{escape(n)} {row[j]}" for j, n in enumerate(names) if j != i and row[j]]
        table.add_row(escape(name), f"{row[i] / sum(row):.1%}", number(sum(row)), ", ".join(wrong))
    console.print(table)


def _show_routes(console: Console, prompts: tuple[str, ...], found: list[Routing]) -> None:
    table = Table("prompt", "task")
    table.add_column("probability", justify="right")
    for prompt, one in zip(prompts, found, strict=True):
        short = prompt if len(prompt) <= _SHOWN else prompt[: _SHOWN - 1] + "…"
        if len(one.weights) > 1:
            named = " + ".join(f"{w:.2f} {t}" for t, w in one.weights.items())
        else:
            named = _name(one.task)
        table.add_row(escape(short), escape(named), f"{one.confidence:.1%}")
    console.print(table)


def _name(task: str | None) -> str:
    return "base model" if task is None else task
