"""``lorasmith merge A B … -o OUTPUT --method NAME``: several adapters as one."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lorasmith.cli.adapter_output import check_output
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import ConfigError, LorasmithError

if TYPE_CHECKING:
    from lorasmith.fleet.merge import Merged, Trial

__all__ = ["merge"]

#: Rows of a table of trials.
_SHOWN = 5


def merge(
    *adapters: str,
    output: Annotated[Path, Parameter(alias="-o")],
    method: tuple[str, ...] = ("linear",),
    weights: str | None = None,
    rank: str | None = None,
    density: float | None = None,
    scale: float | None = None,
    option: tuple[str, ...] = (),
    seed: int = 0,
    model: str | None = None,
    eval: tuple[str, ...] = (),  # noqa: A002 - the name of the option
    split: str | None = None,
    limit: int | None = None,
    exact_match: bool = True,
    max_length: int = 1024,
    batch_size: int = 16,
    search: bool = False,
    trials: int = 20,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Merge adapters of one base model into one plain LoRA, and say what it costs.

    Everything acts on what the adapters do to the weights, so that their ranks, alphas and
    formats may differ. With --eval every adapter and the merge are measured on data; with several
    methods the best is written.

    Parameters
    ----------
    adapters
        Directories (one that holds adapters stands for all of them), hub ids, or URLs.
    output
        Directory for the merged adapter.
    method
        linear, concatenation, svd, task_arithmetic, ties, dare, dare_ties, magnitude_prune,
        breadcrumbs, della, sce, slerp, karcher, knots. Several, by commas or by giving it again,
        are compared on --eval.
    weights
        One for each adapter, e.g. 0.5,0.3,0.2; 1/N each by default.
    rank
        Rank of the result, or exact for all of it. By default all of it for linear,
        task_arithmetic and concatenation, and that of the largest adapter for the others.
    density
        Share of the entries that sparse methods keep, 0 to 1.
    scale
        Factor on the result of methods that have one.
    option
        Any other option of the method, NAME=VALUE, e.g. inner=dare.
    seed
        Of methods that draw random numbers, of the search, and of its split.
    model
        Base model: an alias (smollm2), a hub id, or a path. Needed for --eval, for DoRA, and for
        modules_to_save unless the weights have sum 1.
    eval
        Rows to score the candidates on: as in lorasmith eval, NAME=SOURCE to name them. Give it
        once for each task.
    split
        Split of the data; default: test for hub ids and builtin:NAME, all rows of a file.
    limit
        Use at most so many rows of each.
    exact_match
        Let the model write the completions as well, and compare.
    max_length
        Longest row, in tokens; what is longer is cut.
    batch_size
        Rows a batch.
    search
        Search weights on one half of the rows of --eval; all scores are from the other half.
    trials
        Sets of weights to try.
    dtype
        dtype of the base model.
    device
        auto, cpu, cuda or mps.
    revision
        Branch, tag or commit of MODEL on the hub.
    trust_remote_code
        Let code that comes with MODEL run.
    allow_base_mismatch
        Merge adapters even if they were made for different base weights.
    overwrite
        Replace an adapter that is in OUTPUT.
    """
    with session(common):
        from lorasmith.fleet.members import open_members
        from lorasmith.fleet.merge import get_method
        from lorasmith.fleet.merge import merge as run
        from lorasmith.fleet.merge.merging import check_weights
        from lorasmith.io.weights import check_target
        from lorasmith.progress import bar

        started = time.perf_counter()
        chosen = [get_method(m) for given in method for m in given.split(",") if m.strip()]
        if not adapters:
            raise ConfigError("There is no adapter to merge.", key="adapters")
        if not chosen:
            raise ConfigError("There is no method.", expected="e.g. ties", key="--method")
        check_output(
            output,
            overwrite,
            adapters,
            "The merge would take the place of an adapter that it is made from.",
        )
        # Before the work, and not after it.
        check_target(output)
        if (len(chosen) > 1 or search) and not eval:
            raise ConfigError(
                "What is best cannot be told without data.",
                expected="--eval DATA",
                got="--search" if search else f"{len(chosen)} methods",
                key="--eval",
            )
        if eval and model is None:
            raise ConfigError(
                "To score adapters takes their base model.", expected="--model", key="--model"
            )
        if search and weights is not None:
            raise ConfigError("--search looks for the weights.", fix="leave out --weights")
        members = open_members(
            list(adapters), allow_base_mismatch=allow_base_mismatch, needs="delta"
        )
        ids = [m.id for m in members]
        given = check_weights(_numbers(weights), ids)
        options = _options(chosen, density, scale, option)
        arguments: dict[str, Any] = {
            "ids": ids,
            "rank": _rank(rank),
            "seed": seed,
            "allow_base_mismatch": allow_base_mismatch,
        }
        base, tokenizer = None, None
        if eval:
            from lorasmith.training.models import load_model

            base, tokenizer = load_model(
                str(model),
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        arguments["model"] = model if base is None else base

        def make(index: int, w: Sequence[float], progress: Any = None) -> Merged:
            return run(
                members,
                chosen[index].name,
                weights=w,
                progress=progress,
                **arguments,
                **options[index],
            )

        candidates: list[_Candidate] = []
        tried: dict[str, tuple[Trial, ...]] = {}
        with bar(stderr(), shown=not common.quiet) as progress:
            if base is None:
                made = make(0, given, progress)
            else:
                judge = _Judge(base, tokenizer, max_length, batch_size, allow_base_mismatch)
                judge.read(eval, split, limit, seed if search else None)
                candidates.append(judge.candidate("base model", "base", None, exact_match))
                for member in members:
                    found = judge.candidate(member.id, "input", member.weights, exact_match)
                    candidates.append(found)
                best = judge.best_of(candidates)
                results = []
                for index, one in enumerate(chosen):
                    w = given
                    if search:
                        tried[one.name] = judge.search(
                            lambda w, i=index: make(i, w).weights,
                            members,
                            trials=trials,
                            seed=seed,
                            progress=progress,
                        )
                        w = list(tried[one.name][0].weights)
                    merged = make(index, w, progress)
                    results.append(merged)
                    candidates.append(
                        judge.candidate(one.name, "merge", merged.weights, exact_match, w)
                    )
                for candidate in candidates:
                    candidate.score = _score(candidate.losses, best)
                scores = [c.score for c in candidates if c.kind == "merge"]
                made = results[scores.index(min(scores))]
        path = made.save(output)
        seconds = time.perf_counter() - started
        payload = {
            "output": str(path),
            "adapters": list(adapters),
            "seconds": seconds,
            **made.to_dict(),
            "candidates": [c.to_dict() for c in candidates],
            "search": {
                name: [{"weights": t.weights, "score": t.score} for t in found]
                for name, found in tried.items()
            },
        }

        def render(console: Console) -> None:
            report = made.report
            ranks = sorted({layer.rank for layer in report.layers})
            worst = max(report.layers, key=lambda layer: layer.discarded)
            rows = {
                "output": path,
                "method": report.method,
                "weights": ", ".join(
                    f"{n} {w:.4g}" for n, w in zip(report.ids, report.weights, strict=True)
                ),
                "options": ", ".join(f"{k} {v}" for k, v in report.options.items()) or None,
                "layers": number(len(report.layers)),
                "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
                "parameters": number(made.weights.num_parameters),
                "discarded": f"{report.discarded:.3%} of the energy",
                "most": f"{worst.discarded:.3%} in {worst.name}" if worst.discarded else None,
                "missing": ", ".join(f"{n}: {len(m)} layers" for n, m in report.missing.items())
                or None,
                "note": "; ".join(report.notes) or None,
                "time": f"{seconds:.1f} s",
            }
            for name, found in tried.items():
                console.print(_trials(name, ids, found))
            if candidates:
                console.print(_table(candidates, report.method, search))
            console.print(grid(rows))

        emit(common, payload, render)
    return 0


# What was asked for -----------------------------------------------------------------------------


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            "The weights are no numbers.", expected="e.g. 0.5,0.5", got=text, key="--weights"
        ) from None


def _rank(text: str | None) -> int | str | None:
    if text is None or text == "exact":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            "The rank is no number.", expected="e.g. 16, or exact", got=text, key="--rank"
        ) from None


def _options(
    chosen: Sequence[Any], density: float | None, scale: float | None, extra: Sequence[str]
) -> list[dict[str, Any]]:
    """The options for each method: those that it has. None may be without effect everywhere."""
    given: dict[str, Any] = {"density": density, "scale": scale}
    given = {k: v for k, v in given.items() if v is not None}
    for text in extra:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                "An option has no value.", expected="NAME=VALUE", got=text, key="--option"
            )
        try:
            given[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            given[name.strip().replace("-", "_")] = value
    having = [{o.name for o in method.options} for method in chosen]
    for name, value in given.items():
        if not any(name in known for known in having):
            chosen[0].checked({name: value})  # says what there is
    return [{k: v for k, v in given.items() if k in known} for known in having]


# Scores -----------------------------------------------------------------------------------------


@dataclass
class _Candidate:
    """What was measured, and how it did."""

    name: str
    kind: str
    weights: list[float] | None
    losses: dict[str, float]
    matches: dict[str, float | None]
    rows: dict[str, int]
    score: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "weights": self.weights,
            "score": self.score,
            "data": {
                task: {
                    "loss": loss,
                    "exact_match": self.matches[task],
                    "rows": self.rows[task],
                }
                for task, loss in self.losses.items()
            },
        }


def _score(losses: Mapping[str, float], best: Mapping[str, float]) -> float:
    """Mean over the data sets of the loss, in units of the best input's."""
    return math.fsum(loss / best[task] for task, loss in losses.items()) / len(losses)


class _Judge:
    """Measures adapters on data."""

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int, batch_size: int, allow: bool
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size}
        self.allow = allow
        self.data: dict[str, Any] = {}
        self.held: dict[str, Any] = {}

    def read(
        self, sources: Sequence[str], split: str | None, limit: int | None, halve: int | None
    ) -> None:
        """Reads the rows; with a seed, halves them: one to search on, one to score on."""
        from lorasmith.cli.eval import load_eval_rows

        for text in sources:
            name, equals, source = text.partition("=")
            if not equals:
                name, source = Path(text).name or text, text
            if name in self.data:
                raise ConfigError(
                    "Two data sets have the same name.",
                    got=name,
                    fix="give them names: NAME=SOURCE",
                    key="--eval",
                )
            rows = load_eval_rows(source, split, limit)
            if halve is None:
                self.data[name] = rows
                continue
            if len(rows) < 2:
                raise ConfigError(
                    "There are too few rows to search on some and score on others.",
                    expected="at least 2",
                    got=len(rows),
                    key="--eval",
                )
            mixed = rows.shuffle(seed=halve)
            half = len(mixed) // 2
            self.held[name] = mixed.select(range(half))
            self.data[name] = mixed.select(range(half, len(mixed)))

    def candidate(
        self,
        name: str,
        kind: str,
        weights: Any,
        exact_match: bool,
        w: Sequence[float] | None = None,
    ) -> _Candidate:
        """One candidate on all data sets, without its score."""
        found = self.measure(weights, self.data, exact_match)
        return _Candidate(
            name,
            kind,
            None if w is None else list(w),
            {task: report.loss for task, report in found.items()},
            {task: report.exact_match for task, report in found.items()},
            {task: report.rows for task, report in found.items()},
        )

    def measure(self, weights: Any, data: Mapping[str, Any], exact_match: bool) -> dict[str, Any]:
        """Data set → what ``evaluate`` says of the base model with an adapter, or without."""
        import lorasmith as ls
        from lorasmith.training.evaluate import evaluate

        if weights is None:
            return {
                name: evaluate(
                    self.model, self.tokenizer, rows, exact_match=exact_match, **self.settings
                )
                for name, rows in data.items()
            }
        with tempfile.TemporaryDirectory() as folder:
            path = weights.path
            if path is None:
                path = weights.save(Path(folder) / "adapter")
            handle = ls.load(self.model, path, allow_base_mismatch=self.allow)
            try:
                return self.measure(None, data, exact_match)
            finally:
                ls.detach(self.model, handle.name)

    def best_of(self, candidates: Sequence[_Candidate]) -> dict[str, float]:
        """Data set → the lowest loss of an input on it."""
        inputs = [c.losses for c in candidates if c.kind == "input"]
        # A loss of 0 is no unit.
        return {task: max(min(loss[task] for loss in inputs), 1e-9) for task in inputs[0]}

    def search(
        self, make: Any, members: Sequence[Any], *, trials: int, seed: int, progress: Any
    ) -> tuple[Trial, ...]:
        """All weights that were tried on the held half, best first."""
        from lorasmith.fleet.merge import search_weights

        inputs = [self.measure(m.weights, self.held, False) for m in members]
        best = {task: max(min(found[task].loss for found in inputs), 1e-9) for task in self.held}

        def objective(w: Sequence[float]) -> float:
            try:
                found = self.measure(make(w), self.held, False)
            except LorasmithError:
                if w == [1 / len(members)] * len(members):
                    raise
                return math.inf  # weights with which there is no result
            return _score({task: report.loss for task, report in found.items()}, best)

        return search_weights(objective, len(members), trials=trials, seed=seed, progress=progress)


def _table(candidates: Sequence[_Candidate], winner: str, searched: bool) -> Table:
    """A row for each candidate."""
    table = Table("candidate", caption="score: loss ÷ the best input's, mean over the data")
    if searched:
        table.title = "on the half of the rows that was not searched on"
    tasks = list(candidates[0].losses)
    for task in tasks:
        table.add_column(f"{task}\nloss", justify="right")
        if candidates[0].matches[task] is not None:
            table.add_column("exact\nmatch", justify="right")
    table.add_column("score", justify="right")
    for candidate in candidates:
        cells = []
        for task in tasks:
            cells.append(number(candidate.losses[task]))
            share = candidate.matches[task]
            if candidates[0].matches[task] is not None:
                cells.append("–" if share is None else f"{share:.1%}")
        best = candidate.kind == "merge" and candidate.name == winner
        name = candidate.name + (" (written)" if best else "")
        table.add_row(name, *cells, number(candidate.score), style="bold" if best else None)
    return table


def _trials(method: str, ids: Sequence[str], found: Sequence[Trial]) -> Table:
    """The best weights that were tried."""
    table = Table(*ids, title=f"{method}: the best of {len(found)} sets of weights")
    table.add_column("score", justify="right")
    for trial in found[:_SHOWN]:
        table.add_row(*(f"{w:.3f}" for w in trial.weights), number(trial.score))
    return table
