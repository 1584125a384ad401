"""``lorasmith fleet benchmark``: bytes, errors and seconds of each way to compress a fleet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lorasmith.cli.file_output import check_file
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.fleet.benchmark import FleetBenchmark, Plain, Setting
    from lorasmith.fleet.subspace import Basis

__all__ = ["benchmark"]


def benchmark(
    paths: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    /,
    *,
    error: str = "0.01,0.05,0.1",
    basis: str = "joint,share",
    quantize: str = "none,8,4,nf4",
    rounds: int = 1,
    plot: Path | None = None,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Try ways of compressing these adapters: bytes, errors and seconds of each.

    Nothing is written but the figure. Errors are measured on the adapters themselves, after
    rounding, beside those of plain factors in as few bits.

    Parameters
    ----------
    paths
        Adapters, directories of adapters, hub ids, URLs.

    Error:
        Budgets to try: the most that any adapter may lose, relative squared error.
    basis
        Bases to try: joint, share.
    quantize
        Bits a number to try: none, 16, 8, 4, nf4.
    rounds
        How often to time everything; the medians are shown.
    plot
        A .png, .pdf or .svg for a figure of bytes against error.
    allow_base_mismatch
        Even if they name different base models.
    """
    with session(common):
        from lorasmith.cli.fleet import _PICTURES, sources_of

        if plot is not None and plot.suffix.lower() not in _PICTURES:
            raise ConfigError(
                "The form of the figure cannot be told from the name of the file.",
                expected=f"a name that ends in {', '.join(_PICTURES)}",
                got=plot.name,
                key="--plot",
            )
        if plot is not None:
            check_file(plot.expanduser(), "--plot")
        budgets, bases, codecs = _budgets(error), _listed(basis, "--basis"), _listed(quantize)
        from lorasmith.fleet import benchmark as measuring
        from lorasmith.progress import bar

        started = time.perf_counter()
        with bar(stderr(), shown=not common.quiet) as progress:
            found = measuring.benchmark(
                sources_of(paths),
                errors=budgets,
                bases=cast("list[Basis]", bases),
                codecs=codecs,
                rounds=rounds,
                allow_base_mismatch=allow_base_mismatch,
                progress=progress,
            )
        written = None
        if plot is not None:
            from lorasmith.fleet import plots

            written = plots.save(plots.frontier(found), plot.expanduser())
        best = {most: found.best(most) for most in budgets}
        payload: dict[str, Any] = {
            **found.to_dict(),
            "best": {
                f"{most:g}": None if one is None else one.to_dict() for most, one in best.items()
            },
            "plot": written,
            "seconds": time.perf_counter() - started,
        }

        def render(console: Console) -> None:
            beside = found.settings[0].bytes.rest + found.settings[0].bytes.index
            console.print(
                grid(
                    {
                        "base": found.base,
                        "adapters": number(len(found.ids)),
                        "layers": number(found.layers),
                        "as stored": _size(found.stored),
                        "carried": f"{_size(found.stored_rest)} of it"
                        if found.stored_rest
                        else None,
                        # The same whatever the setting.
                        "beside": f"{_size(beside)} (carried, bookkeeping) in each size below",
                    }
                )
            )
            console.print(_settings_table(found))
            console.print(_plain_table(found))
            console.print(_seconds_table(found))
            for most, one in best.items():
                text = "nothing tried" if one is None else _name(one)
                if one is not None:
                    text += f", {_size(one.total)}, {one.ratio:.3g} times smaller"
                console.print(f"fewest bytes with errors up to {most:g}: {text}", highlight=False)
            if written is not None:
                console.print(f"written: {written}")

        emit(common, payload, render)
    return 0


def _listed(text: str, key: str = "--quantize") -> list[str]:
    """The parts of a text with commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(
            "A list has an empty place.", expected="values with commas between", got=text, key=key
        )
    return parts


def _budgets(text: str) -> list[float]:
    parts = _listed(text, "--error")
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ConfigError(
            "The budgets are no numbers.", expected="e.g. 0.01,0.05", got=text, key="--error"
        ) from None


def _settings_table(found: FleetBenchmark) -> Table:
    from lorasmith.cli.fleet import _table

    headings = ("basis", "cores", "in all", "smaller", "error", "worst")
    table = _table("", *headings, title="Compressed: basis, budget, bits")
    for one in found.settings:
        held = one.bytes
        table.add_row(
            _name(one),
            _size(held.basis),
            _size(held.codes + held.residuals),
            _size(held.total),
            f"{one.ratio:.3g}x",
            number(one.mean, 2),
            number(one.worst, 2) + (" " if one.within else "!"),
        )
    table.caption = "Errors: of ΔW, relative and squared, after rounding; ! above the budget."
    table.caption_justify = "left"
    return table


def _seconds_table(found: FleetBenchmark) -> Table:
    from lorasmith.cli.fleet import _table

    headings = ("build", "round", "absorb one", "rebuild one")
    table = _table("", *headings, title="Time")
    for one in found.settings:
        took = one.seconds
        table.add_row(
            _name(one),
            _time(took.build),
            _time(took.quantize or None),
            _time(took.absorb),
            _time(took.reconstruct),
        )
    return table


def _name(one: Setting | Plain) -> str:
    from lorasmith.fleet.benchmark import Setting

    bits = {"float32": "none", "bfloat16": "16", "int8": "8", "int4": "4"}.get(one.codec, one.codec)
    return f"{one.basis} {one.budget:g} {bits}" if isinstance(one, Setting) else f"plain {bits}"


def _plain_table(found: FleetBenchmark) -> Table:
    from lorasmith.cli.fleet import _table

    headings = ("factors", "beside", "in all", "smaller", "error", "worst")
    table = _table("", *headings, title="Plain: the factors of each adapter by itself")
    for one in found.plain:
        table.add_row(
            _name(one),
            _size(one.factors),
            _size(one.rest),
            _size(one.total),
            f"{one.ratio:.3g}x",
            number(one.mean, 2),
            number(one.worst, 2),
        )
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(count: int) -> str:
    from lorasmith.cli.fleet import _size as size

    return size(count)
