"""``lorasmith convert ADAPTER -o OUTPUT --r N``: any fusable adapter as plain LoRA."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from lorasmith.cli.adapter_output import check_output
from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session
from lorasmith.errors import ConfigError

__all__ = ["convert"]


def convert(
    adapter: str,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    r: int | None = None,
    energy: float | None = None,
    alpha: float | None = None,
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Turn an adapter into the nearest plain LoRA, and say how near it is.

    For programs that know no other adapters: PEFT, vLLM and the like load the result.

    Parameters
    ----------
    adapter
        Directory or hub id.
    output
        Directory for the LoRA.
    r
        Rank; with --energy the highest one.
    energy
        Keep on every layer as many singular values as make up this share of the squared norm
        of the change, e.g. 0.99.
    alpha
        Numerator of the LoRA's scaling. What it computes does not depend on it.
    model
        Base model; needed where the change depends on its weights (all but low-rank families).
    dtype
        dtype of the base model.
    device
        auto, cpu, cuda or mps.
    revision
        Branch, tag or commit of MODEL on the hub.
    trust_remote_code
        Let code that comes with MODEL run.
    allow_base_mismatch
        Use MODEL even if the adapter was made for other weights.
    overwrite
        Replace an adapter that is in OUTPUT.
    """
    with session(common):
        import lorasmith as ls

        if r is None and energy is None:
            raise ConfigError(
                "Which rank the LoRA is to have is not said.",
                expected="--r 16, --energy 0.99, or both",
                key="--r",
            )
        given: dict[str, Any] = {k: v for k, v in (("r", r), ("alpha", alpha)) if v is not None}
        if r is None and alpha is not None:
            raise ConfigError("--alpha goes with --r.", fix="give --r as well", key="--alpha")
        check_output(
            output,
            overwrite,
            [adapter],
            "The LoRA would take the place of the adapter that it is made from.",
        )
        base = None
        if model is not None:
            from lorasmith.training.models import load_model

            base, _ = load_model(
                model,
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        started = time.perf_counter()
        made = ls.convert(
            adapter,
            ls.LoRAConfig(**given) if given else None,
            energy=energy,
            model=base,
            allow_base_mismatch=allow_base_mismatch,
        )
        path = made.save(output)
        seconds = time.perf_counter() - started
        payload = {"adapter": adapter, "output": str(path), "seconds": seconds, **made.to_dict()}

        def render(console: Console) -> None:
            kept = sorted(layer.kept for layer in made.layers)
            worst = max(made.layers, key=lambda layer: layer.error)
            console.print(
                grid(
                    {
                        "output": path,
                        "from": made.source,
                        "layers": number(len(made.layers)),
                        "rank": kept[0] if kept[0] == kept[-1] else f"{kept[0]} to {kept[-1]}",
                        "parameters": number(made.weights.num_parameters),
                        "relative error": f"{made.error:.3g} in all",
                        "largest": f"{worst.error:.3g} in {worst.name}",
                        "lost biases": f"up to {made.bias_error:.3g}" if made.bias_error else None,
                        "time": f"{seconds:.1f} s",
                    }
                )
            )

        emit(common, payload, render)
    return 0
