"""Diagnostics: time and memory of the closed form and of streaming, against the dense way.

    python benchmarks/diagnostics.py                              # all three parts
    python benchmarks/diagnostics.py --parts layer --rounds 30 --json diagnostics.json
    python benchmarks/diagnostics.py --quick                      # a minute: does it all run?

``layer``: one layer with LoRA, r = 16. ``core.rotation.rotation`` against the dense way:
W + s B A is made, both are flattened, θ = arccos of their cosine; in float64, and in float32
as it is usually done, with what that gets wrong (against arctan of the parts of s B A across
and along W, dense in float64). All take turns in one run, in a new random order each round.

``model``: SmolLM2 with an adapter of PEFT's (r = 16, all linear layers), random factors.
``diagnose(base, adapter)`` and ``diagnose(base, merged)`` against loading both models and
taking the cosines of the same heads and projections, layer by layer. All three find the same
angles (the run checks it): exactly so from the same files; from the adapter up to what merging
in the dtype of the model rounds off.

``checkpoint``: two sharded bf16 checkpoints of a Llama, written for the occasion into a
temporary folder (``--folder`` says where): random W, and W with a matrix of rank 1 added that
turns every projection by the same angle, which the report must show. ``diagnose`` against a
plain sequential read of the same files in reads of the size that ``diagnose`` uses, and against
comparing them tensor by tensor, dense in float64. Once with all files in the page cache, and
once with the cache emptied of them before each run (``POSIX_FADV_DONTNEED``; what a virtual
machine's host keeps is out of reach). Compared and thus counted are the parameters of the
linear layers; embeddings are a few thousandths of the file.

Memory is measured in a fresh process for each contender, since tracemalloc does not see
PyTorch's: the peak of resident memory (``VmHWM``, reset through ``clear_refs``) less what is
resident before, after a warm-up on small tensors. ``nothing`` shows what the measurement alone
reads. The times of ``model`` and ``checkpoint`` come from such processes too; imports are not
part of them, opening and building models are.

The tables show medians, and medians and quartiles of the ratios within a round.
On a machine that others use too, take ``--threads 1``: two threads that must wait for each
other some hundred times a call measure the scheduler.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import measured
from lorasmith.core.rotation import rotation

PARTS = ("layer", "model", "checkpoint")
SIZES = ("576x576", "1536x576", "4096x4096")
#: (d_out, d_in) → largest share of the dense way's time that we aim at; of its memory, for all.
TIME_GOALS = {(576, 576): 1 / 3, (4096, 4096): 1 / 20}
MEMORY_GOAL = 1 / 4
R = 16
#: Degrees at which the errors of all ways are shown; the times are those of the last.
ANGLES = (0.01, 0.1, 1.0, 10.0)
HEAD_DIM = 64
#: ‖ΔW‖ / ‖W‖ of the tuned checkpoint.
CHANGE = 0.05
#: Elements of a block that ``diagnose`` reads at a time, of bf16.
READ = 2**17 * 2

Spread = tuple[float, float, float]


# -- one layer -------------------------------------------------------------------------------


def make_layer(d_out: int, d_in: int, r: int, degrees: float) -> tuple[Tensor, Tensor, Tensor]:
    """W, A, and B of such a size that W + B A is at this angle from W (B A is across W)."""
    generator = torch.Generator().manual_seed(d_out + d_in)
    W = torch.randn(d_out, d_in, generator=generator) * 0.02
    A = torch.randn(r, d_in, generator=generator) / d_in**0.5
    B = torch.randn(d_out, r, generator=generator)
    size = float(((B.T @ B).double() * (A @ A.T).double()).sum().sqrt())
    return W, A, B * (math.tan(math.radians(degrees)) * 0.02 * (d_out * d_in) ** 0.5 / size)


def closed(W: Tensor, A: Tensor, B: Tensor) -> float:
    return float(rotation(W, A, B, 1.0).theta)


def closed_per_head(W: Tensor, A: Tensor, B: Tensor) -> float:
    return float(rotation(W, A, B, 1.0, units=W.shape[0] // HEAD_DIM).theta.mean())


def dense_in(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], float]:
    def dense(W: Tensor, A: Tensor, B: Tensor) -> float:
        before = W.to(dtype)
        after = (before + 1.0 * (B.to(dtype) @ A.to(dtype))).flatten()
        return float(angle(before.flatten(), after))

    return dense


def angle(before: Tensor, after: Tensor) -> Tensor:
    cosine = torch.dot(before, after) / (before.norm() * after.norm())
    return torch.acos(cosine.clamp(-1, 1))


def nothing(W: Tensor, A: Tensor, B: Tensor) -> float:
    return float(W[0, 0] + A[0, 0] + B[0, 0])


def true_angle(W: Tensor, A: Tensor, B: Tensor) -> float:
    w, d = W.double(), B.double() @ A.double()
    norm = w.norm()
    along = (w * d).sum() / norm
    across = (d - along / norm * w).norm()
    return float(torch.atan2(across, norm + along))


LAYER: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "closed form": closed,
    "closed form, per head": closed_per_head,
    "dense, float64": dense_in(torch.float64),
    "dense, float32": dense_in(torch.float32),
    "nothing": nothing,
}


def layer_memory(job: Mapping[str, Any]) -> dict[str, Any]:
    run = LAYER[job["name"]]
    run(*make_layer(HEAD_DIM, HEAD_DIM, job["r"], 1.0))
    d_out, d_in = job["size"]
    W, A, B = make_layer(d_out, d_in, job["r"], 1.0)
    return measured(lambda: {"theta": run(W, A, B)})


def seconds(run: Callable[[], Any], fill: float = 0.05) -> float:
    """Seconds a call, over as many calls as fill the time."""
    start, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < fill or calls == 0:
        run()
        calls += 1
    return taken / calls


def part_layer(options: argparse.Namespace) -> dict[str, Any]:
    timed = [n for n in LAYER if n != "nothing"]
    dense = [n for n in timed if n.startswith("dense")]
    results: dict[str, Any] = {}
    print(f"\nOne layer, r = {options.r}, float32")
    heads = "".join(f"{'time / ' + n:>30}" for n in dense)
    print(f"{'':12}{'':24}{'ms':>9}{heads}{'MB':>9}{'most':>9}{'/ float64':>11}")
    for text in options.sizes:
        d_out, d_in = (int(n) for n in text.split("x"))
        errors: dict[str, list[float]] = {n: [] for n in timed if n != "closed form, per head"}
        for degrees in ANGLES:
            tensors = make_layer(d_out, d_in, options.r, degrees)
            wanted = true_angle(*tensors)
            for name, found in errors.items():
                found.append(abs(LAYER[name](*tensors) / wanted - 1))
        times: dict[str, list[float]] = {name: [] for name in timed}
        for name in timed:
            LAYER[name](*tensors)
        for _ in range(options.rounds):
            for name in random.sample(timed, len(timed)):
                times[name].append(seconds(partial(LAYER[name], *tensors)))
        jobs = [{"part": "layer", "name": n, "size": (d_out, d_in), "r": options.r} for n in LAYER]
        memory: dict[str, list[float]] = {name: [] for name in LAYER}
        for _ in range(options.processes):
            for job in jobs:
                memory[str(job["name"])].append(call(job, options)["peak_mb"])
        rows: dict[str, Any] = {}
        for name in LAYER:
            peak = statistics.median(memory[name])
            part = peak / statistics.median(memory["dense, float64"])
            row: dict[str, Any] = {"peak_mb": memory[name], "memory_to_dense": part}
            line = f"{text:12}{name:24}"
            if name in times:
                row["ms"] = statistics.median(times[name]) * 1e3
                row["time_to"] = {n: ratio(times[name], times[n]) for n in dense}
                line += f"{row['ms']:9.3f}"
                line += "".join(f"{shown(row['time_to'][n]):>30}" for n in dense)
            else:
                line += " " * (9 + 30 * len(dense))
            print(f"{line}{peak:9.2f}{max(memory[name]):9.2f}{part:11.3f}", flush=True)
            if name in errors:
                row["relative_error"] = dict(zip(map(str, ANGLES), errors[name], strict=True))
            rows[name] = row
        results[text] = rows
        ours = rows["closed form"]
        goal = TIME_GOALS.get((d_out, d_in))
        if goal is not None:
            judge("time", ours["time_to"]["dense, float64"][0], goal)
        judge("memory", ours["memory_to_dense"], MEMORY_GOAL)
    print(f"\nRelative error of θ{'':18}" + "".join(f"{f'at {a:g}°':>12}" for a in ANGLES))
    for text, rows in results.items():
        for name, row in rows.items():
            if "relative_error" in row:
                cells = "".join(f"{e:12.1e}" for e in row["relative_error"].values())
                print(f"{text:12}{name:24}{cells}")
    return results


# -- a model ---------------------------------------------------------------------------------


def make_models(folder: Path, dtype: str, r: int) -> None:
    """``base``, ``adapter`` and ``merged`` in this folder; ``merged`` by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lorasmith.training.models import load_model

    base, _ = load_model("smollm2", dtype=dtype, device="cpu")
    base.save_pretrained(folder / "base")
    del base
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=getattr(torch, dtype), local_files_only=True
    )
    peft: Any = get_peft_model(
        model,
        LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    peft.save_pretrained(folder / "adapter")
    peft.merge_and_unload().save_pretrained(folder / "merged")


def ours(base: Path, tuned: Path) -> dict[str, Any]:
    import lorasmith as ls

    report = ls.diagnose(base, tuned)
    return {
        "theta": {f"{u.name} {u.head}": u.theta_deg for u in report.units},
        "parameters": sum(u.parameters for u in report.units),
    }


def two_models(base: Path, tuned: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Both models are loaded, and every unit's cosine is taken: the dense way."""
    from transformers import AutoModelForCausalLM

    one, other = (
        AutoModelForCausalLM.from_pretrained(p, dtype="auto", local_files_only=True)
        for p in (base, tuned)
    )
    size = one.config.hidden_size // one.config.num_attention_heads
    theta = {}
    changed = dict(other.named_modules())
    for name, module in one.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        pair = (m.weight.detach().to(dtype) for m in (module, changed[name]))
        before, after = (list(units(name, w, size)) for w in pair)
        for i, (u, v) in enumerate(zip(before, after, strict=True)):
            head = None if "self_attn" not in name else i
            theta[f"{name} {head}"] = math.degrees(float(angle(u, v)))
    return {"theta": theta}


def units(name: str, W: Tensor, size: int) -> Iterator[Tensor]:
    """Heads of attention, flattened; other weights as they are."""
    if "self_attn" not in name:
        yield W.flatten()
        return
    for part in torch.split(W, size, dim=1 if name.endswith("o_proj") else 0):
        yield part.flatten()


MODEL: dict[str, Callable[[Path], dict[str, Any]]] = {
    "diagnose, adapter": lambda f: ours(f / "base", f / "adapter"),
    "diagnose, merged": lambda f: ours(f / "base", f / "merged"),
    "two models, float64": lambda f: two_models(f / "base", f / "merged", torch.float64),
    "two models, float32": lambda f: two_models(f / "base", f / "merged", torch.float32),
}


def model_run(job: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    import lorasmith as ls

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # What both import on first use, neither shall pay for; a tiny case of each warms up.
    tiny = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=64,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        tiny.save_pretrained(scratch)
        handle = ls.attach(tiny, ls.LoRAConfig(r=2))
        ls.save(tiny, Path(scratch) / "adapter")
        ls.diagnose(Path(scratch), Path(scratch) / "adapter", allow_base_mismatch=True)
        two_models(Path(scratch), Path(scratch), torch.float32)
    del tiny, handle
    return measured(lambda: MODEL[job["name"]](Path(job["folder"])))


def part_model(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    call({"part": "make model", "folder": str(folder), "r": options.r}, options)
    size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors")) / 2**20
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in MODEL}
    for _ in range(options.model_rounds):
        for name in random.sample(list(MODEL), len(MODEL)):
            for file in sorted(folder.rglob("*.safetensors")):
                read_through([file])
            job = {"part": "model", "name": name, "folder": str(folder)}
            runs[name].append(call(job, options))
    print(f"\nSmolLM2 in {options.dtype} ({size:.0f} MB), adapter of r = {options.r}, all linear")
    print("layers; files in the page cache")
    against = "two models, float64"
    results = table(runs, against)
    truth = runs[against][0]["theta"]
    print(f"\n{'θ against ' + against:32}{'median':>12}{'largest':>12}   relative")
    for name, found in runs.items():
        theta = found[0]["theta"]
        if set(theta) != set(truth):
            raise SystemExit(f"{name} looks at other units: {set(theta) ^ set(truth)}")
        away = sorted(abs(theta[u] / truth[u] - 1) for u in truth)
        results[name]["away"] = statistics.median(away), away[-1]
        print(f"{name:32}{statistics.median(away):12.1e}{away[-1]:12.1e}")
    if results["diagnose, merged"]["away"][1] > 1e-5:
        raise SystemExit("diagnose and the dense way do not find the same angles")
    for name in ("diagnose, adapter", "diagnose, merged"):
        judge(f"memory ({name})", results[name]["memory_to_dense"], MEMORY_GOAL)
    return results


# -- a checkpoint ----------------------------------------------------------------------------


def make_checkpoint(folder: Path, size: float, shard: float) -> None:
    """``base`` and ``tuned`` here, of at least ``size`` GB each, in shards of ``shard`` GB."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    width, inner, kv, heads, vocabulary = 2048, 5632, 256, 32, 1024
    if size < 1:
        width, inner, kv, heads = 512, 1408, 128, 8
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    block = 2 * sum(o * i for o, i in shapes.values())
    blocks = math.ceil(size * 1e9 / block)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv * heads // width,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        config.save_pretrained(folder / side)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    table = (0.02 * normal(vocabulary, width)).bfloat16()
    ones = torch.ones(width, dtype=torch.bfloat16)
    common = {"model.embed_tokens.weight": table, "model.norm.weight": ones}
    index: dict[str, str] = {}
    pending: dict[str, dict[str, Tensor]] = {"base": dict(common), "tuned": dict(common)}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05}.safetensors"
        for side, tensors in pending.items():
            save_file(tensors, folder / side / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(pending["base"], name))
        for tensors in pending.values():
            tensors.clear()

    for i in range(blocks):
        for name, (d_out, d_in) in shapes.items():
            key = f"model.layers.{i}.{name}.weight"
            W = 0.02 * normal(d_out, d_in)
            u, v = normal(d_out, 1), normal(1, d_in)
            scale = CHANGE * 0.02 * (d_out * d_in) ** 0.5 / float(u.norm() * v.norm())
            pending["base"][key] = W.bfloat16()
            pending["tuned"][key] = W.addmm_(u, v, alpha=scale).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            for tensors in pending.values():
                tensors[f"model.layers.{i}.{name}.weight"] = ones.clone()
        if sum(t.nbytes for t in pending["base"].values()) >= shard * 1e9:
            flush()
    if pending["base"]:
        flush()
    for side in ("base", "tuned"):
        total = sum(p.stat().st_size for p in (folder / side).glob("*.safetensors"))
        record = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(record))


def checkpoint_files(folder: Path) -> list[Path]:
    return sorted((folder / "base").glob("*.safetensors")) + sorted(
        (folder / "tuned").glob("*.safetensors")
    )


def read_through(files: Sequence[Path], size: int = READ) -> int:
    """Reads the files one after the other, as plainly as can be; the number of bytes."""
    buffer = bytearray(size)
    total = 0
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total


def set_cache(files: Sequence[Path], state: str) -> None:
    """Puts the files into the page cache, or takes them out of it."""
    if state == "warm":
        read_through(files, 2**22)
        return
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is still to be written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def tensor_by_tensor(folder: Path) -> dict[str, Any]:
    """Both checkpoints through safetensors, two tensors in memory at a time, float64."""
    from safetensors import safe_open

    theta, parameters = [], 0
    for path in sorted((folder / "base").glob("*.safetensors")):
        with (
            safe_open(path, framework="pt") as one,
            safe_open(folder / "tuned" / path.name, framework="pt") as other,
        ):
            for key in one.keys():  # noqa: SIM118 - it is no mapping
                if "proj" not in key:
                    continue
                before, after = (f.get_tensor(key).double().flatten() for f in (one, other))
                theta.append(math.degrees(float(angle(before, after))))
                parameters += before.numel()
    return {"mean_theta": statistics.fmean(theta), "parameters": parameters}


def streamed(folder: Path) -> dict[str, Any]:
    import lorasmith as ls

    report = ls.diagnose(folder / "base", folder / "tuned", per="projection")
    theta = [u.theta_deg for u in report.units]
    return {
        "mean_theta": statistics.fmean(theta),
        "parameters": sum(u.parameters for u in report.units),
    }


def streamed_per_head(folder: Path) -> dict[str, Any]:
    found = ours(folder / "base", folder / "tuned")
    return {
        "mean_theta": statistics.fmean(found["theta"].values()),
        "parameters": found["parameters"],
    }


CHECKPOINT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "diagnose, per head": streamed_per_head,
    "diagnose, per projection": streamed,
    "tensor by tensor, float64": tensor_by_tensor,
    "plain read": lambda f: {"bytes": read_through(checkpoint_files(f))},
}


def checkpoint_run(job: Mapping[str, Any]) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lorasmith as ls

    assert callable(ls.diagnose)  # it is loaded when asked for
    a = torch.ones(64, dtype=torch.float64)
    angle(a, a)
    set_cache(checkpoint_files(Path(job["folder"])), job["cache"])
    return measured(lambda: CHECKPOINT[job["name"]](Path(job["folder"])))


def part_checkpoint(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job: dict[str, Any] = {"part": "make checkpoint", "folder": str(folder)}
    call({**job, "size": options.size_gb, "shard": options.shard_gb}, options)
    files = checkpoint_files(folder)
    total = sum(p.stat().st_size for p in files)
    planted = math.degrees(math.atan(CHANGE))
    print(f"\nTwo bf16 checkpoints of {total / 2e9:.2f} GB each, {len(files) // 2} shards;")
    print(f"reads of {READ // 1024} KiB; planted θ {planted:.3f}°")
    results: dict[str, Any] = {"bytes": total}
    for cache in options.cache:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CHECKPOINT}
        for _ in range(options.checkpoint_rounds):
            for name in random.sample(list(CHECKPOINT), len(CHECKPOINT)):
                job = {"part": "checkpoint", "name": name, "folder": str(folder), "cache": cache}
                runs[name].append(call(job, options))
        print(f"\npage cache {cache}")
        found = table(runs, "tensor by tensor, float64")
        read = [r["seconds"] for r in runs["plain read"]]
        print(f"\n{'':28}{'M parameters/s':>16}{'GB/s':>8}{'bandwidth / plain read':>30}{'θ̄':>9}")
        for name, each in runs.items():
            row = found[name]
            taken = [r["seconds"] for r in each]
            row["gb_per_second"] = total / 1e9 / statistics.median(taken)
            row["bandwidth_to_read"] = ratio(read, taken)
            line = f"{name:28}"
            if "parameters" in each[0]:
                row["parameters"] = each[0]["parameters"]
                row["mean_theta"] = each[0]["mean_theta"]
                row["parameters_per_second"] = row["parameters"] / statistics.median(taken)
                line += f"{row['parameters_per_second'] / 1e6:16.0f}"
                theta = f"{row['mean_theta']:8.3f}°"
                if abs(row["mean_theta"] / planted - 1) > 0.01:
                    raise SystemExit(f"{name} finds {theta} where {planted:.3f}° was planted")
            else:
                line, theta = line + " " * 16, ""
                if each[0]["bytes"] != total:
                    raise SystemExit("the plain read did not read everything")
            line += f"{row['gb_per_second']:8.2f}{shown(row['bandwidth_to_read']):>30}{theta}"
            print(line)
        results[cache] = found
    return results


# -- processes, memory, ratios ---------------------------------------------------------------


def call(job: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Does a job in a fresh process."""
    job = {**job, "threads": torch.get_num_threads(), "dtype": options.dtype}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{job} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(job: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    part = job["part"]
    if part == "layer":
        return layer_memory(job)
    if part == "model":
        return model_run(job)
    if part == "checkpoint":
        return checkpoint_run(job)
    if part == "make model":
        make_models(Path(job["folder"]), job["dtype"], job["r"])
    else:
        make_checkpoint(Path(job["folder"]), job["size"], job["shard"])
    return {}


def ratio(times: Sequence[float], against: Sequence[float]) -> Spread:
    """Median and quartiles of the ratio within a round."""
    ratios = sorted(t / a for t, a in zip(times, against, strict=True))
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return mid, low, high


def shown(spread: Spread) -> str:
    mid, low, high = spread
    return f"{mid:.3f} ({low:.3f} - {high:.3f})"


def judge(what: str, got: float, goal: float) -> None:
    verdict = "reached" if got <= goal else "MISSED"
    print(f"{'':12}{what}: {got:.3f} of the dense way, goal {goal:.3f}: {verdict}")


def table(runs: Mapping[str, list[dict[str, Any]]], against: str) -> dict[str, Any]:
    """Prints time and memory of runs in processes of their own; the same as a record."""
    print(f"{'':28}{'s':>9}{'/ ' + against:>34}{'MB':>9}{'(least - most)':>20}{'ratio':>9}")
    peer = runs[against]
    dense = statistics.median(r["peak_mb"] for r in peer)
    results = {}
    for name, each in runs.items():
        taken, peaks = [r["seconds"] for r in each], [r["peak_mb"] for r in each]
        row: dict[str, Any] = {
            "seconds": statistics.median(taken),
            "time_to_dense": ratio(taken, [r["seconds"] for r in peer]),
            "peak_mb": peaks,
            "memory_to_dense": statistics.median(peaks) / dense,
        }
        span = f"({min(peaks):.1f} - {max(peaks):.1f})"
        line = f"{name:28}{row['seconds']:9.3f}{shown(row['time_to_dense']):>34}"
        line += f"{statistics.median(peaks):9.1f}{span:>20}{row['memory_to_dense']:9.3f}"
        print(line, flush=True)
        results[name] = row
    return results


def chosen(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=chosen, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--sizes", type=chosen, default=list(SIZES), help="of layer: 576x576,…")
    parser.add_argument("--r", type=int, default=R)
    parser.add_argument("--rounds", type=int, default=21, help="of layer")
    parser.add_argument("--processes", type=int, default=3, help="that measure a layer's memory")
    parser.add_argument("--model-rounds", type=int, default=5)
    parser.add_argument("--checkpoint-rounds", type=int, default=5)
    parser.add_argument("--size-gb", type=float, default=2.0, help="at least, of each checkpoint")
    parser.add_argument("--shard-gb", type=float, default=0.5)
    parser.add_argument("--cache", type=chosen, default=["warm", "cold"], help="warm,cold")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--quick", action="store_true", help="one small round of everything")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    for name, known in (("parts", PARTS), ("cache", ("warm", "cold"))):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if options.quick:
        options.sizes = options.sizes[:2]
        options.rounds, options.processes = 3, 1
        options.model_rounds = options.checkpoint_rounds = 1
        options.size_gb, options.shard_gb = 0.1, 0.04
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    record: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": {k: str(v) for k, v in vars(options).items()},
    }
    print(f"{record['machine']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        if "layer" in options.parts:
            record["layer"] = part_layer(options)
        if "model" in options.parts:
            record["model"] = part_model(options, Path(scratch) / "model")
        if "checkpoint" in options.parts:
            need, free = 2.2e9 * options.size_gb, shutil.disk_usage(scratch).free
            if free < need:
                raise SystemExit(f"{scratch} needs {need / 1e9:.1f} GB free: see --folder")
            record["checkpoint"] = part_checkpoint(options, Path(scratch) / "checkpoint")
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
