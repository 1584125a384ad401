"""``lorasmith generate MODEL PROMPT``: let a model write."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

from cyclopts import Parameter

from lorasmith.cli.eval import load_with_adapter
from lorasmith.cli.output import Common, CommonOptions, emit, session

__all__ = ["generate"]


def generate(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    adapter: Annotated[str | None, Parameter(alias="-a")] = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    template: bool = True,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Let a model answer a prompt, with or without an adapter.

    Parameters
    ----------
    model
        Base model: an alias (smollm2), a hub id, or a path.
    prompt
        What to answer; - reads it from standard input.
    adapter
        Adapter to use: a directory or a hub id.
    max_new_tokens
        Longest answer, in tokens.
    temperature
        0 for the likeliest token at every place; above 0 to sample.
    top_p
        Sample from the likeliest tokens that make up this probability.
    seed
        Seed of the sampling.
    system
        A system message.
    template
        Bring the prompt into the form used in training; --no-template continues it as it stands.
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
        from lorasmith.training.evaluate import generate as write

        text = sys.stdin.read() if prompt == "-" else prompt
        base, tokenizer = load_with_adapter(
            model,
            adapter,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_base_mismatch=allow_base_mismatch,
        )

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        started = time.perf_counter()
        answer = write(
            base,
            tokenizer,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            system=system,
            template=template,
            stream=None if common.json else show,
        )
        seconds = time.perf_counter() - started
        if not common.json:
            show("\n")
        payload = {
            "model": model,
            "adapter": adapter,
            "prompt": text,
            "text": answer,
            "seconds": seconds,
        }
        emit(common, payload)
    return 0
