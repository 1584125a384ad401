"""``lorasmith fuse MODEL ADAPTER -o OUT``: a full model with the adapter in its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lorasmith.cli.output import Common, CommonOptions, emit, grid, number, session, stderr
from lorasmith.errors import ConfigError

__all__ = ["fuse"]


def fuse(
    model: str,
    *adapters: str,
    output: Annotated[Path, Parameter(alias="-o")],
    weights: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    verify: bool = True,
    prompts: Path | None = None,
    max_kl: float | None = None,
    device: str = "cpu",
    revision: str | None = None,
    dequantize: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Write a full model with an adapter fused into its weights, and say how near it is.

    The checkpoint is read and written tensor by tensor: a model far larger than memory will do,
    with --no-verify. The output loads with Transformers alone.

    Parameters
    ----------
    model
        Directory of safetensors, GGUF file, alias (smollm2), or hub id.
    adapters
        Directory, hub id or URL of the adapter; of several, with --weights.
    output
        New directory for the model.
    weights
        One for each adapter, e.g. 0.7,0.3; 1 by default.
    dtype
        auto (each tensor keeps its own), float32, bfloat16 or float16.
    max_shard_size
        Largest file of tensors, e.g. 5GB or 500MiB.
    verify
        Run prompts through base + adapter and through the result, and report how far their logits
        are apart. Needs the memory of the model in float32.
    prompts
        Text file with one prompt a line, for --verify; a few built-in sentences by default.
    max_kl
        Exit with code 3 if the mean KL divergence is above it, in nats a token.
    device
        Where to run the prompts: cpu, cuda, ….
    revision
        Branch, tag or commit of MODEL on the hub.
    dequantize
        Unpack a quantised MODEL (loaded whole, in memory).
    allow_base_mismatch
        Use MODEL even if the adapter was made for other weights.
    overwrite
        Replace a model that an earlier call wrote to OUTPUT.
    """
    with session(common):
        from lorasmith.export.fused import fuse_checkpoint
        from lorasmith.progress import bar

        if not adapters:
            raise ConfigError("There is no adapter to fuse.", key="adapters")
        if max_kl is not None and not verify:
            raise ConfigError("--max-kl needs --verify.", key="--max-kl")
        if max_kl is not None and not max_kl >= 0:
            raise ConfigError("--max-kl is not a limit.", got=max_kl, key="--max-kl")
        given = dict(zip(adapters, _weights(weights, len(adapters)), strict=True))
        if len(given) < len(adapters):
            raise ConfigError("An adapter is named twice.", key="adapters")
        with bar(stderr(), shown=not common.quiet, unit="bytes") as progress:
            made = fuse_checkpoint(
                model,
                given,
                output,
                dtype=dtype,
                max_shard_size=max_shard_size,
                verify=verify,
                prompts=None if prompts is None else _lines(prompts),
                device=device,
                overwrite=overwrite,
                revision=revision,
                allow_base_mismatch=allow_base_mismatch,
                dequantize=dequantize,
                progress=None
                if progress is None
                # The comparison counts models, not bytes.
                else lambda phase, done, total: (
                    progress(phase, done, total) if phase == "writing" else None
                ),
            )
        parity = made.parity
        beyond = max_kl is not None and parity is not None and parity.drift.kl > max_kl

        def render(console: Console) -> None:
            files = f"{made.shards} files" if made.shards > 1 else "1 file"
            now = made.vocabulary
            console.print(
                grid(
                    {
                        "output": made.path,
                        "tensors": f"{made.nbytes / 1e9:.3g} GB in {files}, {made.dtype}",
                        "parameters": number(made.parameters),
                        "fused": f"{len(made.layers)} layers ({', '.join(made.variants)})",
                        "rounding error": f"{made.rounding_error:.3g} of the change",
                        "replaced": ", ".join(made.replaced) or None,
                        "embeddings": "untied: the head has a weight of its own now"
                        if made.untied
                        else None,
                        "vocabulary": f"{now[0]:,} → {now[1]:,}" if now is not None else None,
                        "tokenizer": made.tokenizer,
                        "time": f"{made.seconds:.1f} s",
                    }
                )
            )
            if parity is None:
                return
            table = Table(
                title=f"Logits on {parity.tokens} tokens ({parity.source})", title_justify="left"
            )
            for name in ("", "max |Δ|", "mean |Δ|", "KL a token", "same first choice"):
                table.add_column(name, justify="left" if not name else "right")
            for name, drift in (
                (f"fused against adapter ({parity.dtype})", parity.drift),
                ("fused against adapter in float32", parity.fused_error),
                (f"adapter in {parity.dtype} against float32", parity.attached_error),
            ):
                table.add_row(
                    name,
                    number(drift.max, 3),
                    number(drift.mean, 3),
                    number(drift.kl, 3),
                    f"{drift.agreement:.1%}",
                )
            console.print(table)

        emit(common, made.to_dict(), render)
    return 3 if beyond else 0


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "The weights are not numbers.", expected="e.g. 0.7,0.3", got=text, key="--weights"
        ) from error
    if len(found) != count or not all(math.isfinite(w) for w in found):
        raise ConfigError(
            "There must be one finite weight for each adapter.",
            expected=f"{count} numbers",
            got=text,
            key="--weights",
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "The prompts cannot be read.", got=error, file=path, key="--prompts"
        ) from error
    if not found:
        raise ConfigError("There is no prompt in the file.", file=path, key="--prompts")
    return found
