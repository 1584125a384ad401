"""``lorasmith fleet compress | add | remove | export``: a fleet in one shared subspace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from lorasmith.cli.adapter_output import check_output
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.fleet.subspace import Projection, SharedSubspace

__all__ = ["add", "compress", "export", "remove"]


def compress(
    paths: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    basis: Literal["joint", "share"] = "joint",
    error: float | None = None,
    variance: float | None = None,
    components: int | None = None,
    quantize: Literal["32", "16", "8", "4", "nf4"] | None = None,
    same_rank: Annotated[bool, Parameter(negative="")] = False,
    stream: Annotated[bool, Parameter(negative="")] = False,
    allow_base_mismatch: bool = False,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Put many adapters into one shared subspace.

    Everything that an adapter is made of is kept: configuration, magnitudes, saved modules. Its
    change of the weights is kept up to --error, rounding (--quantize) included. Of a fleet that
    is compressed again the errors are bounds: what it had lost before is in them.

    Parameters
    ----------
    paths
        Adapters, directories of adapters, hub ids, URLs.
    output
        Directory for the compressed fleet.
    basis
        joint: one row space and one column space a layer. share: principal components of the
        aligned factors, for fleets of adapters that are much alike.
    error
        The most that any adapter may lose of its change, relative squared error. Default: 0.05.
    variance
        In its place: the share of the change that every layer keeps, in the mean.
    components
        In its place: this many directions on every layer.
    quantize
        Store it in so many bits a number.
    same_rank
        The same number of directions on all layers.
    stream
        Read one adapter at a time, for fleets that do not fit into memory.
    allow_base_mismatch
        Even if they name different base models.
    overwrite
        Replace a fleet that is in OUTPUT.
    """  # noqa: D405, D411, D416 - a parameter is called as a section is
    with session(common):
        from lorasmith.cli.fleet import sources_of
        from lorasmith.fleet.members import expand
        from lorasmith.fleet.store import check_target, is_subspace
        from lorasmith.fleet.subspace import SharedSubspace
        from lorasmith.progress import bar

        # Before the work, which may take hours, and not after it.
        if is_subspace(check_target(output)) and not overwrite:
            raise ConfigError(
                "There is a compressed fleet in the output directory already.",
                got=output,
                fix="choose another one, or give --overwrite",
                key="--output",
            )
        if stream and (variance is not None or same_rank):
            raise ConfigError(
                "--stream goes with --error or --components only.",
                key="--variance" if variance is not None else "--same-rank",
            )
        started = time.perf_counter()
        given = sources_of(paths)
        before = None
        if isinstance(given, dict):  # a fleet that is compressed already brings its ids
            before = SharedSubspace.load(paths[0])
        else:
            given = expand(given)
        with bar(stderr(), shown=not common.quiet) as progress:
            if stream:
                fleet = SharedSubspace.from_stream(
                    given,
                    basis=basis,
                    error=error,
                    components=components,
                    bits=quantize,
                    allow_base_mismatch=allow_base_mismatch,
                    progress=progress,
                )
            else:
                fleet = SharedSubspace.from_adapters(
                    given,
                    basis=basis,
                    error=error,
                    variance=variance,
                    components=components,
                    per_layer=not same_rank,
                    bits=quantize,
                    allow_base_mismatch=allow_base_mismatch,
                    progress=progress,
                )
        if before is not None:
            fleet.inherit(before)
        fleet.save(output)
        seconds = time.perf_counter() - started
        stats = fleet.stats()
        errors = fleet.errors
        payload: dict[str, Any] = {
            "output": str(output),
            "basis": basis,
            "ids": list(fleet.ids),
            "errors": errors,
            "budget": fleet.budget,
            "quantized": quantize,
            "stats": stats.to_dict(),
            "seconds": seconds,
        }

        def render(console: Console) -> None:
            worst = max(errors, key=lambda name: errors[name])
            console.print(
                grid(
                    {
                        "output": output,
                        "adapters": number(stats.adapters),
                        "layers": number(stats.layers),
                        "basis": f"{basis}, {_size(stats.basis)}",
                        "cores": _size(stats.codes),
                        "beside": _size(stats.rest) if stats.rest else None,
                        "on disk": f"{_size(stats.disk or 0)}, "
                        f"{number(stats.disk_ratio, 3)} times smaller than the adapters",
                        "largest error": f"{errors[worst]:.3g} ({worst})",
                        "stored in": None
                        if quantize is None
                        else ", ".join(dict.fromkeys(stats.codecs.values())),
                        "time": f"{seconds:.1f} s",
                    }
                )
            )

        emit(common, payload, render)
    return 0


def add(
    fleet: Path,
    adapter: str,
    /,
    *,
    id: str | None = None,  # noqa: A002 - the option's name
    error: float | None = None,
    absorb: Annotated[bool, Parameter(negative="")] = False,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008
) -> int:
    """Add an adapter to a compressed fleet.

    What the fleet's basis does not hold of it is kept beside, as far as --error asks for it;
    with --absorb the basis grows instead.

    Parameters
    ----------
    fleet
        Directory of the compressed fleet.
    adapter
        The adapter: directory, hub id or URL.
    id
        Its name in the fleet. Default: made of its path.
    error
        The most that it may lose. Default: as the fleet was made.
    absorb
        Extend the basis by it.
    allow_base_mismatch
        Even if it names another base model.
    """  # noqa: D405, D411, D416 - a parameter is called as a section is
    with session(common):
        from lorasmith.fleet.members import default_ids
        from lorasmith.fleet.subspace import SharedSubspace
        from lorasmith.progress import bar

        whole = SharedSubspace.load(fleet)
        name = default_ids([adapter])[0] if id is None else id
        payload: dict[str, Any] = {"fleet": str(fleet)}
        options: dict[str, Any] = {"error": error, "allow_base_mismatch": allow_base_mismatch}
        with bar(stderr(), shown=not common.quiet) as progress:
            if absorb:
                done = whole.absorb({name: adapter}, progress=progress, **options)
                payload["moved"] = dict(done.moved)
                (made,) = done.added
            else:
                made = whole.add(adapter, name, progress=progress, **options)
        whole.save(fleet)
        payload |= {"added": made.to_dict(), "stats": whole.stats().to_dict()}

        def render(console: Console) -> None:
            console.print(grid(_added(made, whole, payload.get("moved"))))

        emit(common, payload, render)
    return 0


def _added(made: Projection, whole: SharedSubspace, moved: Any) -> dict[str, object]:
    ranks = list(made.residual_rank.values())
    return {
        "added": made.id,
        "error": f"{made.error:.3g}",
        "size": _size(made.nbytes),
        "residual": f"on {len(ranks)} layers, of rank up to {max(ranks)}" if ranks else None,
        "others moved": f"by up to {max(moved.values()):.3g}" if moved else None,
        "adapters": number(len(whole)),
    }


def remove(
    fleet: Path,
    id: str,  # noqa: A002
    /,
    *,
    common: CommonOptions = Common(),  # noqa: B008
) -> int:
    """Take an adapter out of a compressed fleet.

    Parameters
    ----------
    fleet
        Directory of the compressed fleet.
    id
        Name of the adapter in it.
    """
    with session(common):
        from lorasmith.fleet.subspace import SharedSubspace

        whole = SharedSubspace.load(fleet)
        whole.remove(id)
        whole.save(fleet)
        payload = {"fleet": str(fleet), "removed": id, "ids": list(whole.ids)}

        def render(console: Console) -> None:
            console.print(grid({"removed": id, "adapters": number(len(whole))}))

        emit(common, payload, render)
    return 0


def export(
    fleet: str,
    id: str,  # noqa: A002
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    rank: str = "original",
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    common: CommonOptions = Common(),  # noqa: B008
) -> int:
    """Write an adapter of a compressed fleet as a directory that PEFT loads.

    Parameters
    ----------
    fleet
        The compressed fleet: a directory, hub id or URL.
    id
        Name of the adapter in it.
    output
        Directory for the adapter.
    rank
        original, exact (as high as it takes), or a number.
    overwrite
        Replace an adapter that is in OUTPUT.
    """
    with session(common):
        from lorasmith.fleet.subspace import SharedSubspace

        if rank not in ("original", "exact") and not rank.isdecimal():
            raise ConfigError(
                "--rank is not usable.",
                expected="original, exact, or a number",
                got=rank,
                key="--rank",
            )
        check_output(output, overwrite)
        whole = SharedSubspace.load(fleet)
        made = whole.reconstruct(id, int(rank) if rank.isdecimal() else rank)  # type: ignore[arg-type]
        made.save(output)
        payload = {
            "fleet": fleet,
            "id": id,
            "output": str(output),
            "errors": {id: whole.errors[id]},
            "parameters": made.num_parameters,
            "config": made.config.to_dict(),
        }

        def render(console: Console) -> None:
            console.print(
                grid(
                    {
                        "output": output,
                        "adapter": id,
                        "kind": made.variant.name,
                        "parameters": number(made.num_parameters),
                        "error": f"{whole.errors[id]:.3g}",
                    }
                )
            )

        emit(common, payload, render)
    return 0


def _size(count: int) -> str:
    from lorasmith.cli.fleet import _size as size

    return size(count)
