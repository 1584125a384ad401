"""llama.cpp itself, as the package ``xllamacpp`` carries it: log-probabilities with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["Answer", "LlamaCpp", "greedy", "spread"]

#: Of each token: which, and the log-probabilities of the best.
Answer = list[tuple[int, dict[int, float]]]


class LlamaCpp:
    """A GGUF model in llama.cpp, with an adapter or without."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        library = pytest.importorskip(
            "xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed"
        )
        parameters = library.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = 256
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.ui = False
        # More than one would wait for each other where cores are shared.
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        # Keys and values in float32 as well, or the noise is 1e-2.
        parameters.cache_type_k = parameters.cache_type_v = library.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            parameters.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = library.Server(parameters)

    def answer(self, prompt: list[int], count: int, best: int) -> Answer:
        """For each of ``count`` greedy tokens: which, and the log-probabilities of the best."""
        found = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0,
                "n_probs": best,
                "cache_prompt": False,
                "ignore_eos": False,
            }
        )
        if isinstance(found, str):
            found = json.loads(found)
        steps = found["choices"][0]["logprobs"]["content"]
        return [
            (step["id"], {one["id"]: one["logprob"] for one in step["top_logprobs"]})
            for step in steps
        ]


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """The same of a Transformers model: tokens [count] and log-probabilities [count, vocab]."""
    ids = list(prompt)
    rows = []
    for _ in range(count):
        logits: Any = model(torch.tensor([ids])).logits
        rows.append(torch.log_softmax(logits[0, -1].double(), -1))
        ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def spread(answer: Answer, ours: Tensor) -> Tensor:
    """|theirs − ours| of all log-probabilities that llama.cpp gave."""
    gaps = [
        abs(value - float(row[token]))
        for (_, best), row in zip(answer, ours, strict=False)
        for token, value in best.items()
    ]
    return torch.tensor(gaps)
