"""``lorasmith export ADAPTER --to gguf -o OUTPUT``: an adapter for other programs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr

__all__ = ["export"]


def export(
    adapter: str,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    to: Literal["gguf", "vllm", "sglang", "tgi", "peft"] = "gguf",
    base: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    name: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Write an adapter in the form that llama.cpp, Ollama, vLLM, SGLang, TGI or PEFT loads.

    What the program cannot load is converted into plain LoRA, with the error measured, or refused
    with the reason.

    Parameters
    ----------
    adapter
        Directory, hub id or URL.
    output
        Directory for the result.
    to
        gguf (llama.cpp, and a Modelfile for Ollama), vllm, sglang, tgi or peft.
    base
        Base model: the GGUF file that the adapter will be used with, a directory, a hub id or an
        alias. By default what the adapter says. Its weights are read only where the adapter has to
        be converted with them (DoRA, IA3, HRA, ...).
    rank
        Rank of the LoRA that is written; adapters of a higher one are truncated.
    energy
        Convert, and keep this share of the squared norm of the change on every layer, e.g. 0.99.
    dtype
        gguf: float32 (default), float16, bfloat16, q8_0 or auto. Servers: auto (default), float32,
        float16 or bfloat16.
    name
        Name of the adapter, for servers and in the file.
    device
        Where to convert: auto, cpu, cuda or mps.
    trust_remote_code
        Let code that comes with BASE run.
    allow_base_mismatch
        Use BASE even if the adapter was made for other weights.
    overwrite
        Replace an export that is in OUTPUT.
    """
    with session(common):
        import lorasmith as ls
        from lorasmith.export.exporting import needs_model
        from lorasmith.export.layout import find_base
        from lorasmith.progress import bar

        started = time.perf_counter()
        weights = ls.read_adapter(adapter)
        given: Any = {"rank": rank, "energy": energy}
        model = None
        # Without a rank this fails, and need not load anything for that.
        if needs_model(weights, to) and (rank is not None or energy is not None):
            named = base or weights.base.name
            if named is not None:
                from lorasmith.training.models import load_model

                model, _ = load_model(
                    find_base(named), device=device, trust_remote_code=trust_remote_code
                )
        with bar(stderr(), shown=not common.quiet) as progress:
            made = ls.export_adapter(
                weights,
                output,
                to,
                base=base,
                model=model,
                dtype=dtype,
                name=name,
                allow_base_mismatch=allow_base_mismatch,
                overwrite=overwrite,
                progress=progress,
                **given,
            )
        seconds = time.perf_counter() - started
        payload = {"adapter": adapter, "seconds": seconds, **made.to_dict()}

        def render(console: Console) -> None:
            converted = made.conversion is not None
            console.print(
                grid(
                    {
                        "output": made.path,
                        "files": ", ".join(made.files),
                        "from": made.source,
                        "base": made.base,
                        "layers": number(made.layers),
                        "rank": made.rank,
                        "relative error": f"{made.error:.3g} by converting" if converted else None,
                        "rounding": f"{made.rounding:.2g}" if made.rounding else "none",
                        "time": f"{seconds:.1f} s",
                    }
                )
            )
            for note in made.notes:
                console.print(note, soft_wrap=True)
            for line in made.commands:
                console.print(f"  {line}", soft_wrap=True, markup=False)

        emit(common, payload, render)
    return 0
