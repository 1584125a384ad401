"""``lorasmith generate MODEL PROMPT``: let a model write."""

from __future__ import annotations

import sys
import time
from typing import Annotated

from cyclopts import Parameter

from lorasmith.cli.base_model import BaseModel, BaseModelOptions
from lorasmith.cli.output import Common, CommonOptions, emit, session

__all__ = ["generate"]


def generate(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    template: bool = True,
    base_model: BaseModelOptions = BaseModel(),  # noqa: B008 - frozen
    common: CommonOptions = Common(),  # noqa: B008 - frozen
) -> int:
    """Let a model answer a prompt, with or without an adapter.

    Parameters
    ----------
    model
        Base model: an alias (smollm2), a hub id, or a path.
    prompt
        What to answer; - reads it from standard input.
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
    """
    with session(common):
        from lorasmith.training.evaluate import generate as write

        text = sys.stdin.read() if prompt == "-" else prompt
        base, tokenizer = base_model.load(model)

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
            "adapter": base_model.adapter,
            "prompt": text,
            "text": answer,
            "seconds": seconds,
        }
        emit(common, payload)
    return 0
