"""Fleets: speed and memory against vLoRA and against the dense way.

    python -m venv vlora && vlora/bin/pip install vlora-dev==1.0.0 torch
    python benchmarks/fleet.py --vlora-python vlora/bin/python --report docs/fleet.md
    python benchmarks/fleet.py --quick                     # minutes: does it all run?

Without ``--vlora-python`` that peer is left out, and the report says so. What compression costs in
quality is in ``fleet_quality.py``.

The adapters are written for the occasion, as PEFT directories in float32 in a temporary folder
(``--folder``; 4.4 MB each): 60 layers of 576 x 576, r = 16,

    A_i = Ā + Σ_k l_ik a_k + noise        B_i = B̄ + Σ_k m_ik b_k + noise

8 components whose rows lie in 48 directions, and noise of 5 % of them. What they have in common is
in the stored factors, as vLoRA assumes it. Every contender reads the same files, with warm page
cache, and reading is part of what is timed.

``build``: a subspace of 8, 100, 200 and 1,000 adapters; one more absorbed; one reconstructed as
factors of rank 16. Ours with the joint basis (``--directions`` of U and of V) and with Share
(``--components``), in the gauge that it chooses by itself and with factors aligned to each other,
from a stream at 1,000; vLoRA with as many components, in memory and streaming; and the joint
basis the dense way: Σ ΔW ΔWᵀ and Σ ΔWᵀ ΔW of multiplied-out changes, ``eigh``, Uᵀ ΔW Vᵀ, and a
dense SVD for reconstructing. The error is the mean relative squared error of ΔW of three adapters.
``similarity``: all pairs of cosines.
``merge``: the SVD merge of four adapters to rank 16, from file to factors, and for one layer of
576² and 2048² (``merge.py``).
``decode``: one token for each of 8 rows, a task of its own each, on the shapes of SmolLM2 cut to
a few blocks (``mixed_batch.py``): PEFT's mixed batch, ours with adapters and straight from a
shared basis; vLoRA, which knows one task at a time, row after row.

Every job runs in a fresh process, contenders take turns in a new random order each round, and
the table shows medians and the least and most. Memory is the peak of resident memory beyond what
is resident before; a job with two adapters comes first, so that imports are not timed. Where the
dense way would take hours it is measured on some of the layers and its time is scaled up, which
the table says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments import markdown, measured, write_report

PARTS = ("build", "similarity", "merge", "decode")
SIZES = (8, 100, 200, 1000)
#: Of the synthetic adapters.
COMPONENTS, DIRECTIONS, NOISE = 8, 48, 0.05
#: Adapters from which ours streams.
STREAM = 1000
#: Adapters up to which a pair takes a step of its own in Python.
PAIRWISE = 100
#: (adapters x layers) up to which the dense way is measured on all layers.
DENSE = 600

Job = Mapping[str, Any]
Record = dict[str, Any]


# Adapters -------------------------------------------------------------------------------------


def modules(layers: int) -> list[str]:
    """Names of the layers."""
    names = ("q_proj", "v_proj")
    return [f"model.layers.{i // 2}.self_attn.{names[i % 2]}" for i in range(layers)]


def write_adapters(folder: Path, count: int, layers: int, size: int, rank: int) -> list[Path]:
    """PEFT directories with something in common; those that are there are left."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (layers, COMPONENTS + 1, rank, DIRECTIONS)
    common = []
    for _ in range(2):
        rows = draw(layers, 1, DIRECTIONS, size) / size**0.5
        common.append(draw(*shape) @ rows / DIRECTIONS**0.5)  # [layers, K + 1, r, d]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    paths = []
    for n in range(count):
        path = folder / f"a{n:04}"
        paths.append(path)
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        generator.manual_seed(n + 1)
        factors = []
        for one in common:
            loadings = torch.cat((torch.ones(layers, 1), draw(layers, COMPONENTS)), 1)
            rows = (loadings[:, :, None, None] * one).sum(1)
            factors.append(rows + NOISE * rows.std() * draw(*rows.shape))
        tensors = {}
        for i, module in enumerate(modules(layers)):
            tensors[f"base_model.model.{module}.lora_A.weight"] = factors[0][i].contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = factors[1][i].mT.contiguous()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths


def factors_of(path: Path, module: str) -> tuple[Tensor, Tensor]:
    """A and B of one layer as they are in the file."""
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        key = f"base_model.model.{module}"
        A, B = (file.get_tensor(f"{key}.lora_{side}.weight") for side in "AB")
    return A, B


def error_of(path: Path, made: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Relative squared error of ΔW over the layers given, in float64."""
    gone = whole = 0.0
    for module, (A, B) in made.items():
        wanted_A, wanted_B = (t.double() for t in factors_of(path, module))
        rows, columns = torch.cat((wanted_A, A.double())), torch.cat((wanted_B, -B.double()), 1)
        gone += float(((rows @ rows.mT) * (columns.mT @ columns)).sum())
        whole += float(((wanted_A @ wanted_A.mT) * (wanted_B.mT @ wanted_B)).sum())
    return gone / whole


# Build ----------------------------------------------------------------------------------------


def timed(phases: dict[str, Record], name: str, run: Callable[[], Any]) -> Any:
    """What it returns; its time and peak go to the phases."""
    kept: list[Any] = []

    def once() -> Record:
        kept.append(run())
        return {}

    phases[name] = measured(once)
    return kept[0]


def ours_built(job: Job) -> Record:
    from lorasmith.fleet.subspace import BudgetWarning, SharedSubspace

    warnings.simplefilter("ignore", BudgetWarning)  # the number of directions is given
    paths, count = job["paths"], job["count"]
    make: Any = SharedSubspace.from_stream if count >= STREAM else SharedSubspace.from_adapters
    joint = job["who"] == "joint"
    wanted: Record = {"components": job["directions"] if joint else job["components"]}
    if job["who"] == "share, aligned":
        wanted["gauge"] = "aligned"
    basis = "joint" if joint else "share"
    phases: dict[str, Record] = {}
    make(paths[:2], basis=basis, **wanted)  # loads what is loaded on first use
    fleet = timed(phases, "build", lambda: make(paths[:count], basis=basis, **wanted))
    made = {n: fleet.reconstruct(fleet.ids[n]).factors for n in job["sample"]}
    phases["reconstruct"] = repeated(lambda: read(fleet.reconstruct(fleet.ids[0])))
    timed(phases, "add", lambda: fleet.add(paths[count + 1], error=1.0))
    timed(phases, "absorb", lambda: fleet.absorb(paths[count]))
    errors = [
        error_of(Path(paths[n]), {m: (f.A, f.scaling * f.B) for m, f in made[n].items()})
        for n in made
    ]
    return {"phases": phases, "error": statistics.mean(errors), "bytes": fleet.stats().total}


def read(adapter: Any) -> None:
    """All of its factors: those of files are lazy."""
    for factors in adapter.factors.values():
        assert factors.A is not None


def repeated(run: Callable[[], Any]) -> Record:
    """Median of three, since it is short; the peak of the first."""
    runs = []
    for _ in range(3):
        phases: dict[str, Record] = {}
        timed(phases, "one", run)
        runs.append(phases["one"])
    return {**runs[0], "seconds": statistics.median(r["seconds"] for r in runs)}


def vlora_built(job: Job) -> Record:
    import vlora  # type: ignore[import-not-found]

    paths, count, k = job["paths"], job["count"], job["components"]
    phases: dict[str, Record] = {}

    def memory() -> Any:
        adapters = [vlora.load_adapter(p) for p in paths[:count]]
        return vlora.SharedSubspace.from_adapters(adapters, names, num_components=k)

    def stream() -> Any:
        make = vlora.SharedSubspace.from_adapters_streaming
        return make(paths[:count], names, num_components=k)

    names = [f"t{n}" for n in range(count)]
    streams = job["who"] == "vlora streaming"
    few = [vlora.load_adapter(p) for p in paths[:2]]
    vlora.SharedSubspace.from_adapters(few, names[:2], num_components=1)
    fleet = timed(phases, "build", stream if streams else memory)
    made = {n: fleet.reconstruct(f"t{n}") for n in job["sample"]}
    phases["reconstruct"] = repeated(lambda: fleet.reconstruct("t0"))
    errors = []
    for n, adapter in made.items():
        by_name = {short(name): name for name in adapter.layer_names}
        found = {
            m: (adapter.lora_a[by_name[m]], adapter.lora_b[by_name[m]]) for m in job["modules"]
        }
        errors.append(error_of(Path(paths[n]), found))
    more = [vlora.load_adapter(p) for p in paths[count : count + 2]]
    if streams:
        return {"phases": phases, "error": statistics.mean(errors)}
    timed(phases, "add", lambda: fleet.add_task(fleet.project(more[1], "new")))
    timed(phases, "absorb incremental", lambda: fleet.absorb_incremental(more[0], "more"))
    timed(phases, "absorb", lambda: fleet.absorb(more[1], "another"))
    return {"phases": phases, "error": statistics.mean(errors)}


def short(name: str) -> str:
    """A layer's name without PEFT's prefix."""
    return name.removeprefix("base_model.model.")


def dense_layers(count: int, layers: int) -> int:
    """On how many layers the dense way is measured."""
    return max(1, min(layers, DENSE // count))


def changes(paths: Sequence[str], module: str) -> Iterator[Tensor]:
    """ΔW of each adapter, multiplied out."""
    for path in paths:
        A, B = factors_of(Path(path), module)
        yield B @ A


def dense_built(job: Job) -> Record:
    paths, count, R = job["paths"][: job["count"]], job["count"], job["directions"]
    chosen = job["modules"][: dense_layers(count, len(job["modules"]))]
    factor = len(job["modules"]) / len(chosen)
    phases: dict[str, Record] = {}
    fleet: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = {}

    def build() -> None:
        for module in chosen:
            left = right = torch.zeros(())
            for change in changes(paths, module):
                scaled = change / change.norm()
                left, right = left + scaled @ scaled.mT, right + scaled.mT @ scaled
            up = torch.linalg.eigh(left)[1][:, -R:]
            down = torch.linalg.eigh(right)[1][:, -R:].mT
            cores = [up.mT @ change @ down.mT for change in changes(paths, module)]
            fleet[module] = up, down, cores

    def reconstruct(n: int) -> dict[str, tuple[Tensor, Tensor]]:
        made = {}
        for module, (up, down, cores) in fleet.items():
            U, S, Vh = torch.linalg.svd(up @ cores[n] @ down, full_matrices=False)
            rank = job["rank"]
            made[module] = Vh[:rank], U[:, :rank] * S[:rank]
        return made

    timed(phases, "build", build)
    made = timed(phases, "reconstruct", lambda: reconstruct(0))
    for phase in phases.values():
        phase["seconds"] *= factor
    return {
        "phases": phases,
        "error": error_of(Path(paths[0]), made),
        "layers": [len(chosen), len(job["modules"])],
    }


# Similarity -----------------------------------------------------------------------------------


def similarity(job: Job) -> Record:
    phases: dict[str, Record] = {}
    paths, count = job["paths"][: job["count"]], job["count"]
    found: dict[str, Any] = {}
    if job["who"] == "ours":
        from lorasmith.fleet.similarity import similarity as ours

        ours(paths[:2])
        cosine = timed(phases, "similarity", lambda: ours(paths).cosine)
        cosine = torch.from_numpy(cosine.copy())
    elif job["who"] == "vlora":
        import vlora

        def theirs() -> Any:
            return vlora.compute_similarity_matrix([vlora.load_adapter(p) for p in paths])

        cosine = timed(phases, "similarity", theirs).double()
    else:
        chosen = job["modules"][: dense_layers(count, len(job["modules"]))]

        def dense() -> Tensor:
            gram = torch.zeros(count, count, dtype=torch.float64)
            for module in chosen:
                flat = torch.stack([change.flatten() for change in changes(paths, module)])
                gram += (flat @ flat.mT).double()
            return gram

        gram = timed(phases, "similarity", dense)
        phases["similarity"]["seconds"] *= len(job["modules"]) / len(chosen)
        found["layers"] = [len(chosen), len(job["modules"])]
        cosine = gram / gram.diagonal().outer(gram.diagonal()).sqrt()
        if len(chosen) < len(job["modules"]):
            return {"phases": phases, **found}
    if count <= min(SIZES):  # small enough to compare
        found["cosine"] = cosine.tolist()
    return {"phases": phases, **found}


# Merge ----------------------------------------------------------------------------------------


def merged(job: Job) -> Record:
    phases: dict[str, Record] = {}
    paths, rank = job["paths"][: job["count"]], job["rank"]
    if job["who"] == "ours":
        from lorasmith.fleet.merge import merge

        merge(paths[:2], "svd", rank=rank)
        timed(phases, "merge", lambda: read(merge(paths, "svd", rank=rank).weights))
        return {"phases": phases}
    chosen = job["modules"][: max(1, len(job["modules"]) // 6)]

    def dense() -> dict[str, tuple[Tensor, Tensor]]:
        made = {}
        for module in chosen:
            total = torch.stack(list(changes(paths, module))).mean(0)
            U, S, Vh = torch.linalg.svd(total, full_matrices=False)
            made[module] = Vh[:rank], U[:, :rank] * S[:rank]
        return made

    timed(phases, "merge", dense)
    phases["merge"]["seconds"] *= len(job["modules"]) / len(chosen)
    return {"phases": phases, "layers": [len(chosen), len(job["modules"])]}


def merged_layer(options: argparse.Namespace) -> list[Record]:
    """One layer at a time, in turns in this process."""
    from merge import by_peft, densely, factored, measure
    from merge import changes as drawn

    found = []
    for size in options.merge_sizes:
        deltas = drawn(4, options.rank, size)
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda d=deltas: factored(d, options.rank),  # type: ignore[misc]
            "dense": lambda d=deltas: densely(d, options.rank),  # type: ignore[misc]
        }
        theirs = by_peft([deltas], options.rank)
        if theirs is not None:
            ways["PEFT"] = theirs
        found.append({"size": size, "seconds": measure(ways, options.rounds)})
    return found


# Decode ---------------------------------------------------------------------------------------


def decoded(job: Job, folder: Path) -> Record:
    """PEFT, ours and the fleet, in turns in this process."""
    import lorasmith as ls
    from lorasmith.fleet.subspace import BudgetWarning
    from mixed_batch import LAYERS, contestants, layer, measure, names, ours, stack, theirs

    warnings.simplefilter("ignore", BudgetWarning)
    record: Record = {}
    for kind in ("layer", "stack"):
        torch.manual_seed(0)
        base = layer() if kind == "layer" else stack(job["blocks"])
        base = base.requires_grad_(False).eval()
        targets = ["0"] if kind == "layer" else LAYERS
        count, rank = job["count"], job["rank"]
        mine = ours(base, count, rank, targets)
        paths = {n: folder / kind / n for n in names(count)}
        for name, path in paths.items():
            ls.save(mine, path, name=name)
        x = torch.randn(count, 1, 576)
        calls = contestants(base, mine, theirs(base, count, rank, targets), x, [*names(count)])
        settings: dict[str, Record] = {
            f"fleet, {job['directions']} directions": {"components": job["directions"]},
            "fleet, nothing lost": {"error": 0.0},
        }
        for what, wanted in settings.items():
            torch.manual_seed(0)
            own: Any = (layer() if kind == "layer" else stack(job["blocks"])).eval()
            fleet = ls.SharedSubspace.from_adapters(paths, **wanted)
            served = ls.MultiTaskModel(own.requires_grad_(False), fleet, allow_base_mismatch=True)
            served.use(list(paths))
            if kind == "layer":
                calls[what] = lambda own=own, x=x: own[0](x)  # type: ignore[misc]
            else:
                calls[what] = lambda own=own, x=x: own(inputs_embeds=x)  # type: ignore[misc]
        with torch.inference_mode():
            record[kind] = measure(calls, job["rounds"], 20 if kind == "layer" else 1)
    return record


def vlora_decoded(job: Job) -> Record:
    """vLoRA one row after the other, and the base model beside it."""
    import vlora
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=job["blocks"],
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
        use_cache=False,
    )
    base: Any = LlamaModel(config).requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    found = (Path(job["folder"]) / "stack").glob("*/adapter_config.json")
    paths = sorted(str(p.parent) for p in found)
    names = [f"t{n}" for n in range(len(paths))]
    fleet = vlora.SharedSubspace.from_adapters(
        [vlora.load_adapter(p) for p in paths], names, num_components=max(1, len(paths) - 1)
    )
    x = torch.randn(len(paths), 1, 576)
    alone = []
    with torch.inference_mode():
        for _ in range(job["rounds"] + 1):
            start = time.perf_counter()
            base(inputs_embeds=x)
            alone.append(time.perf_counter() - start)
        plain = base(inputs_embeds=x[:1]).last_hidden_state
        model = vlora.VLoRAModel(base, fleet, scaling=2.0)
        model.set_task(names[0])
        acts = not torch.equal(model(inputs_embeds=x[:1]).last_hidden_state, plain)
        times = []
        for _ in range(job["rounds"] + 1):
            start = time.perf_counter()
            for n, name in enumerate(names):
                model.set_task(name)
                model(inputs_embeds=x[n : n + 1])
            times.append(time.perf_counter() - start)
    return {"base": alone[1:], "vLoRA, row by row": times[1:], "acts": acts}


# Jobs -----------------------------------------------------------------------------------------


def work(job: Job) -> Record:
    """A job, in this process."""
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    what, who = job["part"], job["who"]
    if what == "build":
        if who.startswith(("joint", "share")):
            return ours_built(job)
        return dense_built(job) if who == "dense" else vlora_built(job)
    if what == "similarity":
        return similarity(job)
    if what == "merge":
        return merged(job)
    return vlora_decoded(job)


def call(job: Job, options: argparse.Namespace) -> Record:
    """A job in a fresh process; ``failed`` where it did not get to an end."""
    python = options.vlora_python if job["who"].startswith("vlora") else sys.executable
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({**job, "threads": options.threads}, file)
        file.flush()
        command = [str(python), str(Path(__file__).resolve()), "--worker", file.name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=options.timeout
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {options.timeout} s"}
    if done.returncode:
        if not job["who"].startswith("vlora"):
            raise SystemExit(f"{done.stderr}\n{job['part']} of {job['who']} failed")
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    found: Record = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds_of(count: int, rounds: int) -> int:
    """Fewer where one takes minutes."""
    return rounds if count <= 100 else max(1, rounds // 2) if count < STREAM else 1


def turns(
    base: Job, whos: Sequence[str], rounds: int, options: argparse.Namespace
) -> dict[str, list[Record]]:
    """Contender → its runs; who has failed is not tried again."""
    runs: dict[str, list[Record]] = {who: [] for who in whos}
    for number in range(rounds):
        order = [w for w in whos if not (runs[w] and "failed" in runs[w][-1])]
        random.shuffle(order)
        for who in order:
            start = time.perf_counter()
            found = call({**base, "who": who}, options)
            runs[who].append(found)
            said = found.get("failed") or ", ".join(
                f"{name} {one['seconds']:.2f} s" for name, one in found["phases"].items()
            )
            print(
                f"  {base['part']} {base['count']} {who} {number + 1}/{rounds}: {said} "
                f"({time.perf_counter() - start:.0f} s in all)",
                flush=True,
            )
    return runs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least to most)."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def judged(what: str, got: float, goal: float) -> str:
    """Whether a goal has been met."""
    return f"{what}: {got:.4f}, goal {goal:.4f}: {'met' if got <= goal else '**missed**'}"


def middle(runs: Sequence[Record], phase: str) -> float | None:
    """Median seconds of a phase, if there is one."""
    times = [r["phases"][phase]["seconds"] for r in runs if phase in r.get("phases", {})]
    return statistics.median(times) if times else None


def tabulated(runs: Mapping[str, list[Record]], phases: Sequence[str]) -> str:
    """A Markdown table of one size."""
    rows = []
    for who, each in runs.items():
        if not each or "failed" in each[-1]:
            rows.append([who, f"failed: {each[-1]['failed'] if each else 'not run'}"])
            rows[-1] += [""] * (len(phases) + 1)
            continue
        scaled = each[0].get("layers")
        name = (
            f"{who} ({scaled[0]} of {scaled[1]} layers, scaled)"
            if (scaled and scaled[0] < scaled[1])
            else who
        )
        row = [name]
        for phase in phases:
            times = [r["phases"][phase]["seconds"] for r in each if phase in r["phases"]]
            row.append(spread(times, 3 if times and max(times) < 1 else 2) if times else "")
        row.append(f"{statistics.median(r['phases'][phases[0]]['peak_mb'] for r in each):.0f}")
        row.append(f"{each[0]['error']:.4f}" if "error" in each[0] else "")
        rows.append(row)
    return markdown(["", *(f"{p}, s" for p in phases), "peak, MiB", "error"], rows)


#: Contenders whose times are divided.
PAIRS = (
    ("share", "vlora"),
    ("share, aligned", "vlora"),
    ("joint", "vlora"),
    ("joint", "dense"),
)


# Parts ----------------------------------------------------------------------------------------


def part_build(base: Job, options: argparse.Namespace) -> tuple[str, Any]:
    texts, record = [], {}
    for count in options.sizes:
        whos = ["joint", "share", "dense"]
        if count < STREAM:
            whos.append("share, aligned")
        if options.vlora_python:
            whos += ["vlora", "vlora streaming"]
        sample = sorted({0, count // 2, count - 1})
        job = {**base, "part": "build", "count": count, "sample": sample}
        runs = turns(job, whos, rounds_of(count, options.rounds), options)
        record[str(count)] = runs
        phases = ("build", "add", "absorb", "absorb incremental", "reconstruct")
        text = f"{count:,} adapters\n\n" + tabulated(runs, phases)
        goals = []
        for phase in ("build", "absorb", "reconstruct"):
            for mine, peer in PAIRS:
                a, b = (middle(runs.get(w, []), phase) for w in (mine, peer))
                if a is None or b is None:
                    continue
                what = f"{phase} of {mine} ÷ {peer}"
                goal = phase == "build" and count >= 200
                goals.append(judged(what, a / b, 0.1) if goal else f"{what}: {a / b:.4f}")
        texts.append(text + "\n\n" + "; ".join(goals) + ".")
    return "\n\n".join(texts), record


def part_similarity(base: Job, options: argparse.Namespace) -> tuple[str, Any]:
    texts, record = [], {}
    for count in options.sizes:
        whos = ["ours", "dense"]
        if options.vlora_python and count <= PAIRWISE:
            whos.append("vlora")
        job = {**base, "part": "similarity", "count": count}
        runs = turns(job, whos, rounds_of(count, options.rounds), options)
        cosines = {w: torch.tensor(r[0]["cosine"]) for w, r in runs.items() if "cosine" in r[0]}
        text = f"{count:,} adapters\n\n" + tabulated(runs, ("similarity",))
        said = [
            f"cosines of {who} differ from the dense ones by up to "
            f"{float((cosines[who] - cosines['dense']).abs().max()):.1e}"
            for who in cosines
            if who != "dense" and "dense" in cosines
        ]
        a, b = middle(runs["ours"], "similarity"), middle(runs["dense"], "similarity")
        if a is not None and b is not None:
            said.append(judged("ours ÷ dense", a / b, 1 / 3))
        texts.append(text + "\n\n" + "; ".join(said) + ".")
        for each in runs.values():
            for run in each:
                run.pop("cosine", None)
        record[str(count)] = runs
    return "\n\n".join(texts), record


def part_merge(base: Job, options: argparse.Namespace) -> tuple[str, Any]:
    job = {**base, "part": "merge", "count": 4}
    runs = turns(job, ["ours", "dense"], options.rounds, options)
    a, b = middle(runs["ours"], "merge"), middle(runs["dense"], "merge")
    text = "Four adapters, from file to factors\n\n" + tabulated(runs, ("merge",))
    if a is not None and b is not None:
        text += "\n\n" + judged("ours ÷ dense", a / b, 1 / 50) + "."
    layers = merged_layer(options)
    rows = [
        [str(one["size"])] + [f"{1e3 * one['seconds'].get(w, 0):.2f}" for w in WAYS]
        for one in layers
    ]
    text += "\n\nOne layer, in memory\n\n" + markdown(["d", *(f"{w}, ms" for w in WAYS)], rows)
    text += "\n\n" + "; ".join(
        judged(
            f"ours ÷ dense, {one['size']}²",
            one["seconds"]["ours"] / one["seconds"]["dense"],
            1 / 50,
        )
        for one in layers
    )
    return text + ".", {"files": runs, "layers": layers}


WAYS = ("ours", "dense", "PEFT")


def part_decode(base: Job, options: argparse.Namespace, folder: Path) -> tuple[str, Any]:
    job = {
        "part": "decode",
        "who": "vlora",
        "count": 8,
        "rank": base["rank"],
        "blocks": options.blocks,
        "directions": base["directions"],
        "rounds": 4 * options.rounds + 1,
        "folder": str(folder),
    }
    torch.set_num_threads(options.threads)
    record = decoded(job, folder)
    texts = []
    for kind, times in record.items():
        rows = []
        for who, each in times.items():
            ratios = [
                statistics.median(a / b for a, b in zip(each, times[o], strict=True))
                for o in ("base", "PEFT")
            ]
            rows.append([who, spread([1e3 * t for t in each], 3), *(f"{r:.2f}" for r in ratios)])
        if kind == "stack" and options.vlora_python:
            theirs = call(job, options)
            record = {**record, "vlora": theirs}
            if "failed" in theirs:
                rows.append(["vLoRA", f"failed: {theirs['failed']}", "", ""])
            else:
                each = theirs["vLoRA, row by row"]
                ratio = statistics.median(each) / statistics.median(theirs["base"])
                name = "vLoRA, row by row" + ("" if theirs["acts"] else " (no hook: acts as base)")
                rows.append([name, spread([1e3 * t for t in each], 3), f"{ratio:.2f}", ""])
        what = "One layer 576²" if kind == "layer" else f"{options.blocks} blocks"
        texts.append(what + "\n\n" + markdown(["", "ms", "÷ base", "÷ PEFT"], rows))
        if kind == "layer":
            said = []
            for who in [who for who in times if who not in ("base", "PEFT")]:
                each = zip(times[who], times["PEFT"], strict=True)
                ratio = statistics.median(a / b for a, b in each)
                said.append(judged(f"{who} ÷ PEFT", ratio, 1 / 3))
            texts.append("; ".join(said) + ".")
    return "\n\n".join(texts), record


# The command ----------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def chosen(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", type=chosen, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--sizes", type=numbers, default=list(SIZES), help="numbers of adapters")
    parser.add_argument("--merge-sizes", type=numbers, default=[576, 2048])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--size", type=int, default=576, help="d of the layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--directions", type=int, default=DIRECTIONS, help="of the joint basis")
    parser.add_argument("--components", type=int, default=COMPONENTS, help="of Share and vLoRA")
    parser.add_argument("--blocks", type=int, default=4, help="of decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vlora-python", type=Path, help="interpreter that has vlora-dev")
    parser.add_argument("--folder", type=Path, help="where the adapters go")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a job may take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one small round of everything")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--report", type=Path, help="Markdown file to put the tables into")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker.read_text()))))
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if options.quick:
        options.sizes, options.layers, options.rounds = [8, 24], 6, 1
        options.merge_sizes, options.blocks = [576], 1
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", module="transformers")
    said = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, "
    said += f"torch {torch.__version__}; {options.layers} layers of {options.size}², "
    said += f"r = {options.rank}, float32; joint with {options.directions} directions, Share and "
    said += f"vLoRA with {options.components} components; median (least to most) of up to "
    said += f"{options.rounds} rounds, {STREAM:,} adapters and more: one."
    if options.quick:
        said += " **A trial run.**"
    if not options.vlora_python:
        print("vLoRA is left out: --vlora-python names an interpreter that has vlora-dev.")
        said += " vLoRA was left out."
    print(said, flush=True)
    paths = ("vlora_python", "folder", "json", "report", "worker")  # of this machine
    given = {k: str(v) for k, v in vars(options).items() if k not in paths}
    record: Record = {"machine": said, "options": given}
    texts = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        base: Record = {
            "rank": options.rank,
            "directions": options.directions,
            "components": options.components,
            "modules": modules(options.layers),
        }
        if set(options.parts) - {"decode"}:
            most = max([*options.sizes, 4]) + 2
            start = time.perf_counter()
            written = write_adapters(
                Path(scratch) / "fleet", most, options.layers, options.size, options.rank
            )
            print(f"{most} adapters written in {time.perf_counter() - start:.0f} s", flush=True)
            base["paths"] = [str(p) for p in written]
        for part in options.parts:
            if part == "build":
                texts[part], record[part] = part_build(base, options)
            elif part == "similarity":
                texts[part], record[part] = part_similarity(base, options)
            elif part == "merge":
                texts[part], record[part] = part_merge(base, options)
            else:
                texts[part], record[part] = part_decode(base, options, Path(scratch) / "decode")
            print(f"\n## {part}\n\n{texts[part]}\n", flush=True)
            if options.json is not None:  # what there is, after each part
                options.json.write_text(json.dumps(record, indent=1) + "\n")
            if options.report is not None:
                write_report(options.report, f"fleet:{part}", f"{said}\n\n{texts[part]}")


if __name__ == "__main__":
    main()
