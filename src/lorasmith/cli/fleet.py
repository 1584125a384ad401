"""``lorasmith fleet COMMAND``: many adapters of one base model.

Here are the commands that look at adapters; those that compress and manage a fleet are in
``fleet_subspace``. All of them take adapters, directories of adapters, hub ids, URLs, and fleets
that ``lorasmith fleet compress`` has written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from lorasmith.cli.file_output import check_file
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import AdapterFileError, ConfigError, LorasmithError

if TYPE_CHECKING:
    from lorasmith.fleet.differences import Diff, LayerDiff
    from lorasmith.fleet.members import Member
    from lorasmith.fleet.similarity import SimilarityMatrix

__all__ = ["analyze", "app", "diff", "info", "sources_of", "validate"]

app = App(
    name="fleet",
    help="Many adapters of one model: compare, compress, check and manage them.",
    default_parameter=Parameter(negative_iterable=()),
)

app.command(
    "lorasmith.cli.fleet_subspace:compress",
    name="compress",
    help="Put many adapters into one shared subspace.",
)
app.command(
    "lorasmith.cli.fleet_subspace:add",
    name="add",
    help="Add an adapter to a compressed fleet.",
)
app.command(
    "lorasmith.cli.fleet_subspace:remove",
    name="remove",
    help="Take an adapter out of a compressed fleet.",
)
app.command(
    "lorasmith.cli.fleet_subspace:export",
    name="export",
    help="Write an adapter of a compressed fleet as a directory that PEFT loads.",
)
app.command(
    "lorasmith.cli.fleet_route:route",
    name="route",
    help="Train a router on examples of each task, or ask one where prompts go.",
)
app.command(
    "lorasmith.cli.fleet_benchmark:benchmark",
    name="benchmark",
    help="Try ways of compressing these adapters: bytes, errors and seconds of each.",
)

_PICTURES = (".png", ".pdf", ".svg")
#: Adapters up to which the matrix of cosines is printed.
_PRINTED = 10
#: Layers, and pairs, that a table shows.
_SHOWN = 12


@app.command
def analyze(
    paths: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    /,
    *,
    clusters: int | None = None,
    threshold: float | None = None,
    linkage: Literal["average", "complete", "single"] = "average",
    alpha: float = 0.05,
    redundant: float = 0.1,
    subspace: str | None = None,
    per_layer: bool = False,
    model: str | None = None,
    plot: tuple[Path, ...] = (),
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Compare all adapters: similarity, groups, outliers, duplicates, a map.

    Compared is what adapters do to the weights, not the factors that it is stored in.

    Parameters
    ----------
    paths
        Adapters, directories of adapters, hub ids, URLs, or a compressed fleet.
    clusters
        Number of groups.
    threshold
        1 - cosine up to which adapters are one group. Default: in the widest gap.
    linkage
        How far groups are apart: by the mean, the largest or the least of 1 - cosine.
    alpha
        Chance of calling any adapter an outlier where none is.
    redundant
        Relative error up to which one adapter may stand in for another.
    subspace
        Also how much of each adapter lies in this compressed fleet.
    per_layer
        Also the inner products of each layer (with --json).
    model
        Base model, to compare what DoRA and families other than LoRA do to its weights.
    plot
        A directory for heat map, dendrogram and map; or a .png, .pdf or .svg for the heat map.
    allow_base_mismatch
        Compare even if they name different base models.
    """
    with session(common):
        for path in plot:
            if path.suffix and path.suffix.lower() not in _PICTURES:
                raise ConfigError(
                    "The form of the figure cannot be told from the name of the file.",
                    expected=f"a directory, or a name that ends in {', '.join(_PICTURES)}",
                    got=path.name,
                    key="--plot",
                )
            target = path.expanduser()
            check_file(target if path.suffix else target / "figure", "--plot")
        from lorasmith.fleet import analysis
        from lorasmith.fleet.similarity import similarity
        from lorasmith.progress import bar

        started = time.perf_counter()
        base = None
        if model is not None:
            from lorasmith.training.models import load_model

            base, _ = load_model(model, dtype="float32", device="cpu")
        given = sources_of(paths)
        with bar(stderr(), shown=not common.quiet) as progress:
            similar = similarity(
                given,
                model=base,
                per_layer=per_layer,
                allow_base_mismatch=allow_base_mismatch,
                progress=progress,
            )
            covered = (
                {}
                if subspace is None
                else _coverage(given, subspace, allow_base_mismatch, progress)
            )
        groups = analysis.clusters(similar, count=clusters, threshold=threshold, method=linkage)
        odd = analysis.outliers(similar, alpha=alpha)
        pairs = analysis.redundancy(similar, threshold=redundant)
        points = analysis.embedding(similar)
        written = _draw(similar, groups, points, plot)
        payload = {
            **similar.to_dict(),
            "relative_distances": similar.relative_distances.tolist(),
            "clusters": groups.to_dict(),
            "outliers": odd.to_dict(),
            "redundant": [vars(p) for p in pairs],
            "map": points.to_dict(),
            "coverage": covered,
            "plots": written,
            "seconds": time.perf_counter() - started,
        }

        def render(console: Console) -> None:
            console.print(_groups_table(similar, groups, odd))
            if 1 < len(similar) <= _PRINTED:
                console.print(_cosines_table(similar))
            for one in odd.found:
                what = (
                    f"1 − cosine to the others {one.score:.3f}, typically {one.typical:.3f}"
                    if one.kind == "direction"
                    else f"‖ΔW‖ = {number(one.score)}, typically {number(one.typical)}"
                )
                console.print(f"outlier ({one.kind}): {one.id}: {what}", highlight=False)
            if not odd.found:
                console.print(f"no outlier{f': {odd.reason}' if odd.reason else ''}")
            if pairs:
                console.print(_pairs_table(pairs))
            else:
                console.print(f"no adapter stands in for another within {redundant:.3g}")
            if covered:
                console.print(
                    grid({i: f"{s:.1%}" for i, s in covered.items()}, title="In the subspace")
                )
            for note in similar.notes:
                console.print(f"note: {note}", style="dim")
            for path in written:
                console.print(f"written: {path}")

        emit(common, payload, render)
    return 0


@app.command
def diff(
    a: str,
    b: str,
    /,
    *,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Compare two adapters layer by layer.

    Parameters
    ----------
    a
        An adapter.
    b
        Another one.
    allow_base_mismatch
        Compare even if they name different base models.
    """
    with session(common):
        from lorasmith.fleet.differences import diff
        from lorasmith.progress import bar

        with bar(stderr(), shown=not common.quiet) as progress:
            found = diff(a, b, allow_base_mismatch=allow_base_mismatch, progress=progress)
        emit(common, found.to_dict(), lambda console: _show_diff(console, found))
    return 0


@app.command
def validate(
    paths: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    /,
    *,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Read every value of every adapter, and say what is wrong. Exit code 1 if anything is.

    Parameters
    ----------
    paths
        Adapters, directories of adapters, hub ids, URLs, or compressed fleets.
    allow_base_mismatch
        Do not mind that they name different base models.
    """
    with session(common):
        from lorasmith.progress import bar

        with bar(stderr(), shown=not common.quiet) as progress:
            checked = _validated(paths, allow_base_mismatch, progress)
        problems = sum(len(found) for found in checked.values())
        payload = {
            "ok": not problems,
            "checked": [{"path": p, "problems": found} for p, found in checked.items()],
            "problems": problems,
        }

        def render(console: Console) -> None:
            for path, found in checked.items():
                console.print(f"{path}: {'ok' if not found else ''}", highlight=False)
                for problem in found:
                    console.print("  " + problem.replace("\n", "\n  "), style="red")
            console.print(
                f"{len(checked):,} checked, {problems:,} problems"
                if problems
                else f"{len(checked):,} checked, nothing wrong"
            )

        emit(common, payload, render)
    return 1 if problems else 0


@app.command
def info(
    paths: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    /,
    *,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Describe adapters, or a compressed fleet and what it takes.

    Parameters
    ----------
    paths
        Adapters, directories of adapters, hub ids, URLs; or one compressed fleet.
    allow_base_mismatch
        Describe them even if they name different base models.
    """
    with session(common):
        if len(paths) == 1 and _is_fleet(paths[0]):
            _subspace_info(paths[0], common)
            return 0
        from lorasmith.fleet.members import open_members
        from lorasmith.progress import bar

        described: list[dict[str, Any]] = []
        with bar(stderr(), shown=not common.quiet) as progress:
            members = open_members(
                sources_of(paths), allow_base_mismatch=allow_base_mismatch, progress=progress
            )
            for member in members:
                described.append(_described(member))
                if progress is not None:
                    progress("read", len(described), len(members))
        payload = {
            "base": next((m.weights.base.name for m in members if m.weights.base.name), None),
            "adapters": described,
            "bytes": sum(d["bytes"] for d in described),
        }

        def render(console: Console) -> None:
            table = _table("", "kind", "layers", "rank", "scaling", "dtype", "size", "beside")
            for one in described:
                table.add_row(
                    one["id"],
                    one["kind"],
                    number(one["layers"]),
                    _range(one["ranks"]),
                    _range(one["scalings"]),
                    one["dtype"],
                    _size(one["bytes"]),
                    number(one["beside"]) if one["beside"] else "",
                )
            console.print(table)
            console.print(grid({"base": payload["base"], "in all": _size(int(payload["bytes"]))}))

        emit(common, payload, render)
    return 0


# What is given -------------------------------------------------------------------------------


def sources_of(paths: Sequence[str]) -> Any:
    """Adapters that a command is given, in a form that ``open_members`` takes.

    A compressed fleet stands for the adapters that are rebuilt from it.
    """
    if not any(_is_fleet(p) for p in paths):
        return list(paths)
    if len(paths) > 1:
        raise ConfigError(
            "A compressed fleet cannot be mixed with other adapters.",
            got=", ".join(paths[:4]),
            fix="name the fleet alone, or export it first (lorasmith fleet export)",
        )
    from lorasmith.fleet.subspace import SharedSubspace

    whole = SharedSubspace.load(paths[0])
    return {name: whole.reconstruct(name) for name in whole.ids}


def _is_fleet(path: str) -> bool:
    from lorasmith.fleet.store import is_subspace

    try:
        return is_subspace(path)
    except AdapterFileError:
        return False  # whoever opens it as an adapter says what is wrong


def _coverage(
    given: Any, subspace: str, allow_base_mismatch: bool, progress: Any
) -> dict[str, float]:
    from lorasmith.fleet.covering import coverage
    from lorasmith.fleet.members import open_members
    from lorasmith.fleet.subspace import SharedSubspace

    whole = SharedSubspace.load(subspace)
    members = open_members(given, allow_base_mismatch=allow_base_mismatch)
    found: dict[str, float] = {}
    for member in members:
        found[member.id] = coverage(member, whole).share
        if progress is not None:
            progress("coverage", len(found), len(members))
    return found


def _validated(
    paths: Sequence[str], allow_base_mismatch: bool, progress: Any
) -> dict[str, list[str]]:
    from lorasmith.fleet.members import BaseCheck, expand, open_members
    from lorasmith.fleet.store import validate as validate_fleet

    checked: dict[str, list[str]] = {}
    single: list[Any] = []
    for path in paths:
        if _is_fleet(path):
            checked[path] = validate_fleet(path)
            continue
        try:
            single += expand([path])
        except LorasmithError as error:
            checked[path] = [str(error)]
    base = BaseCheck(allow_base_mismatch=allow_base_mismatch)
    for done, path in enumerate(single):
        name = str(path)
        try:
            (member,) = open_members([path], [name[-255:]])
            for module in member.modules:
                member.factors(module)
            _check_rest(member)
            base.add(member)
            checked[name] = []
        except LorasmithError as error:
            checked[name] = [str(error)]
        if progress is not None:
            progress("validate", done + 1, len(single))
    base.warn()
    return checked


def _check_rest(member: Member) -> None:
    from lorasmith.io.weights import check_finite

    for key in member.rest:
        value = member.rest[key]
        if value.is_floating_point():
            check_finite(value, key, member.weights.path)


# For people ----------------------------------------------------------------------------------


def _draw(similar: SimilarityMatrix, groups: Any, points: Any, plot: Sequence[Path]) -> list[str]:
    if not plot:
        return []
    from lorasmith.fleet import plots

    written: list[Path] = []
    for path in plot:
        target = path.expanduser()
        if path.suffix.lower() in _PICTURES:
            written.append(plots.save(plots.heat_map(similar, groups), target))
        else:
            written += plots.save_all(similar, groups, points, target)
    return [str(p) for p in written]


def _table(first: str, *headings: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _groups_table(similar: SimilarityMatrix, groups: Any, odd: Any) -> Table:
    table = _table(
        "adapter", "group", "‖ΔW‖", "nearest", "cosine", title=f"{len(groups.groups)} groups"
    )
    marked = {o.id for o in odd.found}
    for place in sorted(range(len(similar)), key=lambda i: (groups.labels[i], similar.ids[i])):
        name = similar.ids[place]
        nearest = similar.nearest(name)[:1]
        table.add_row(
            name + (" (outlier)" if name in marked else ""),
            str(groups.labels[place] + 1),
            number(float(similar.norms[place])),
            nearest[0][0] if nearest else "–",
            f"{nearest[0][1]:.3f}" if nearest else "–",
        )
    table.caption = f"{groups.method} linkage of 1 − cosine, cut at {groups.height:.3g}"
    table.caption_justify = "left"
    return table


def _cosines_table(similar: SimilarityMatrix) -> Table:
    table = _table("cosine", *(str(i + 1) for i in range(len(similar))))
    for place, name in enumerate(similar.ids):
        table.add_row(f"{place + 1} {name}", *(f"{v:.2f}" for v in similar.cosine[place]))
    return table


def _pairs_table(pairs: Sequence[Any]) -> Table:
    table = _table("keep", "other", "do", "distance", "cosine", "error", title="Redundant")
    for pair in pairs[:_SHOWN]:
        table.add_row(
            pair.keep,
            pair.other,
            pair.action,
            number(pair.distance, 3),
            f"{pair.cosine:.3f}",
            number(pair.error, 3),
        )
    if len(pairs) > _SHOWN:
        table.caption = f"and {len(pairs) - _SHOWN:,} more (--json has all)"
    return table


def _show_diff(console: Console, found: Diff) -> None:
    console.print(f"{found.a} → {found.b}", highlight=False)
    console.print(
        grid(
            {
                "‖ΔW‖": f"{number(found.norm_a)} and {number(found.norm_b)}",
                "difference": f"{number(found.difference)} ({found.relative:.1%} of the larger)",
                "cosine": "–" if found.cosine is None else f"{found.cosine:.4f}",
                "layers": number(len(found.layers)),
                f"only {found.a}": number(len(found.only_a)) if found.only_a else None,
                f"only {found.b}": number(len(found.only_b)) if found.only_b else None,
                "other tensors": _rest_text(found.rest),
            }
        )
    )
    shown = sorted(found.layers, key=lambda layer: -layer.difference)[:_SHOWN]
    table = _table(
        "layer",
        "‖ΔW‖ a",
        "‖ΔW‖ b",
        "difference",
        "cosine",
        "output angle",
        "input angle",
        title="Layers that differ most",
    )
    for layer in shown:
        table.add_row(
            layer.module,
            number(layer.norm_a, 3),
            number(layer.norm_b, 3),
            f"{layer.relative:.1%}",
            "–" if layer.cosine is None else f"{layer.cosine:.3f}",
            *_angles(layer),
        )
    table.caption = "Angles: the smallest and the largest principal angle of the two spaces."
    table.caption_justify = "left"
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", style="dim")


def _angles(layer: LayerDiff) -> tuple[str, str]:
    def text(angles: Sequence[float]) -> str:
        return f"{angles[0]:.0f}° to {angles[-1]:.0f}°" if angles else "–"

    return text(layer.output_angles), text(layer.input_angles)


def _rest_text(rest: Mapping[str, float | None]) -> str | None:
    if not rest:
        return None
    both = [v for v in rest.values() if v is not None]
    text = f"{len(rest):,}"
    if both:
        text += f", differing by up to {max(both):.1%}"
    alone = len(rest) - len(both)
    return text + (f"; {alone:,} in one of them alone" if alone else "")


def _described(member: Member) -> dict[str, Any]:
    record = member.record
    config = member.weights.config
    of = getattr(config, "scaling_of", None)
    scalings = [] if of is None else sorted({of(m) for m in member.modules})
    return {
        "id": member.id,
        "path": None if member.weights.path is None else str(member.weights.path),
        "kind": member.weights.variant.name,
        "layers": len(member.modules),
        "ranks": sorted(set(record.ranks.values())),
        "scalings": scalings,
        "dtype": record.dtype,
        "parameters": member.weights.num_parameters,
        "bytes": member.nbytes,
        "modules_to_save": sorted(member.weights.saved_modules),
        "beside": len(record.rest),
    }


def _subspace_info(path: str, common: Common) -> None:
    from lorasmith.fleet.subspace import SharedSubspace

    whole = SharedSubspace.load(path)
    stats = whole.stats()
    errors = dict(whole.errors)
    payload = {
        "path": path,
        "basis": whole.basis,
        "base": whole.base.name,
        "ids": list(whole.ids),
        "errors": errors,
        "stats": stats.to_dict(),
    }

    def render(console: Console) -> None:
        console.print(
            grid(
                {
                    "fleet": path,
                    "base": whole.base.name,
                    "adapters": number(stats.adapters),
                    "layers": number(stats.layers),
                    "basis": f"{whole.basis}, {_size(stats.basis)}",
                    "cores": _size(stats.codes),
                    "residuals": _size(stats.residuals) if stats.residuals else None,
                    "beside": _size(stats.rest) if stats.rest else None,
                    "in all": f"{_size(stats.total)}, {stats.ratio:.3g} times smaller",
                    "largest error": f"{max(errors.values()):.3g}" if errors else None,
                }
            )
        )
        table = _table("adapter", "error", "size")
        for name in whole.ids[: 5 * _SHOWN]:
            table.add_row(name, number(errors[name], 3), _size(stats.per_adapter[name]))
        console.print(table)

    emit(common, payload, render)


def _range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return number(values[0]) if len(values) == 1 else f"{number(values[0])}–{number(values[-1])}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if float(f"{size:.3g}") < 1000:  # as it is shown: 999.7 is 1000 there
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
