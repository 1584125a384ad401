"""``lorasmith variants``: the adapter families there are, and what each can do."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorasmith.cli.output import Common, CommonOptions, emit, number, session

if TYPE_CHECKING:
    from lorasmith.core.config import AdapterConfig
    from lorasmith.core.variant import Variant

__all__ = ["check_targets", "describe", "variants"]

#: ``Variant.weight_use`` → whether the variant may sit on quantised layers: as it is, or with
#: dequantize=True, when each of them is dequantised to start or whenever it runs.
_QUANTISED = {"never": "yes", "start": "to start", "always": "each run"}


def variants(
    *,
    model: str = "smollm2",
    r: int | None = None,
    targets: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """List the adapter families: formula, parameters on a model, and what each can do.

    Those of installed packages and of --plugin are among them. No weights are loaded.

    Parameters
    ----------
    model
        Model whose layers to count parameters on: an alias (smollm2), a hub id, or a path.
    r
        Rank, for families that have one. Default: that of the family.
    targets
        Layers to adapt: all-linear, a role, names, globs or re:EXPRESSION.
    revision
        Branch, tag or commit of MODEL on the hub.
    trust_remote_code
        Let code that comes with MODEL run.
    """
    with session(common):
        import lorasmith as ls
        from lorasmith.cli.info import outline
        from lorasmith.training.models import load_config, resolve_model

        resolved = resolve_model(model, revision=revision)
        config = load_config(resolved, trust_remote_code=trust_remote_code)
        empty = outline(model, config, trust_remote_code=trust_remote_code)
        check_targets(empty, r=r, targets=targets)
        found = [
            describe(variant, empty, r=r, targets=targets) for variant in ls.variants().values()
        ]
        total = sum(p.numel() for p in empty.parameters())
        payload = {
            "model": model,
            "base": resolved.base_name,
            "parameters": total,
            "variants": found,
        }
        emit(common, payload, lambda console: _show(console, model, total, found))
    return 0


def check_targets(model: Any, *, r: int | None, targets: tuple[str, ...] | None) -> None:
    """Raises what would be said of every family alike: a mistake, not a note.

    Raises:
        TargetError: No layer of the model matches.
        ConfigError: The rank cannot be used.
    """
    import lorasmith as ls
    from lorasmith.core.targets import select

    select(model, _config(ls.variants()["lora"], r, targets))


def describe(
    variant: Variant, model: Any, *, r: int | None = None, targets: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """What a variant is and can do, with its parameters on a model (of the meta device)."""
    from lorasmith.core.variant import Variant as Base
    from lorasmith.errors import LorasmithError

    kind = type(variant)
    found: dict[str, Any] = {
        "name": variant.name,
        "family": variant.family,
        "formula": variant.formula,
        "r": None,
        "layers": None,
        "parameters": None,
        "fuses": variant.fusable,
        "quantized_base": None,
        # Its own kind there, or one that it can be read as.
        "peft": bool(variant.peft_fields) or variant.peft_type == "LORA",
        # Anything can serve rows of one batch; these do so in one product for all adapters.
        "rows_in_one_pass": kind.affine is not Base.affine or kind.factors is not Base.factors,
        "needs_calibration": None,
        "module": kind.__module__,
        "note": None,
    }
    try:
        config = _config(variant, r, targets)
        found["r"] = getattr(config, "r", None)
        found["quantized_base"] = _QUANTISED[variant.weight_use(config)]
        found["needs_calibration"] = bool(variant.statistics(config))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found["layers"], found["parameters"] = _count(variant, config, model)
        found["note"] = " ".join(str(said[0].message).split()) if said else None
    except LorasmithError as error:
        found["note"] = error.what
    return found


def _config(variant: Variant, r: int | None, targets: tuple[str, ...] | None) -> AdapterConfig:
    kind = variant.config_class
    given: dict[str, Any] = {}
    if r is not None and "r" in {f.name for f in dataclasses.fields(kind)}:
        given["r"] = r
    if targets is not None:
        given["targets"] = targets
    return kind(**given)


def _count(variant: Variant, config: AdapterConfig, model: Any) -> tuple[int, int]:
    """(layers, trainable values), from sizes alone."""
    from lorasmith.core.targets import select
    from lorasmith.core.variant import BaseLayer

    chosen = select(model, config)
    if not variant.statistics(config):  # else the adjustment looks at data
        config = variant.adjust(config, [BaseLayer(c.module, c.info) for c in chosen])
    total = 0
    for candidate in chosen:
        for shape in variant.shapes(config, candidate.info).values():
            count = 1
            for size in shape:
                count *= size
            total += count
    return len(chosen), total


def _show(console: Console, model: str, total: int, found: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"Adapter families; parameters on {model} ({total:,})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("name and layer", ratio=1)
    table.add_column("parameters", justify="right", no_wrap=True)
    for heading in ("fuses", "4/8 bit", "PEFT", "rows", "data"):
        table.add_column(heading, justify="center", no_wrap=True)
    for one in found:
        # The layer below the name: beside it, it would squeeze the rest out of 80 columns.
        name = Text(one["name"], style="bold", no_wrap=True)
        name.append(f"  {one['family']}", style="not bold dim")
        if one["formula"]:
            name = Text("\n", no_wrap=False).join([name, Text(one["formula"])])
        table.add_row(
            name,
            number(one["parameters"]),
            _mark(one["fuses"]),
            "✓" if one["quantized_base"] == "yes" else one["quantized_base"] or "–",
            _mark(one["peft"]),
            _mark(one["rows_in_one_pass"]),
            "needed" if one["needs_calibration"] else "–",
        )
    console.print(table)
    legend = (
        "4/8 bit: works over quantised layers (else with dequantize: to start, or in each run). "
        "PEFT: HF PEFT reads its files. rows: an adapter for each row of a batch in one pass "
        "(the others run one after the other). data: needs calibration."
    )
    console.print(Text(legend, style="dim"))
    ranks: dict[int, list[str]] = {}
    for one in found:
        if one["r"] is not None:
            ranks.setdefault(one["r"], []).append(one["name"])
    said = "; ".join(f"{r} for {', '.join(names)}" for r, names in sorted(ranks.items()))
    console.print(Text(f"Ranks (--r): {said}.", style="dim"))
    for one in found:
        if one["note"] is not None:
            console.print(Text(f"{one['name']}: {one['note']}", style="dim"))


def _mark(value: bool) -> str:
    return "✓" if value else "–"
