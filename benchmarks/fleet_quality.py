r"""What becomes of the tasks when a fleet is compressed, merged and routed.

    python benchmarks/fleet_quality.py --zoo ZOO --data-dir DATA            # about half an hour
    python benchmarks/fleet_adapters.py --count 64 --output fleet-adapters  # hours, resumable
    python benchmarks/fleet_quality.py --zoo ZOO --data-dir DATA --adapters fleet-adapters \
        --report docs/fleet.md --figure-dir docs/images

``compression``: a fleet of PEFT's adapters of mixed kinds (``--zoo``), compressed in every way:
joint within error budgets, Share with and without alignment, each as it is and in few bits, and
as the plain baseline the adapters' own factors rounded to 8, 4 and 3 bits, also cut before to
the rank that each layer needs within an error budget ("cut"). Bytes (all of them:
basis, codes, bookkeeping, what is carried) against the error of ΔW and against

    gain kept = (base loss − loss of the compressed) / (base loss − loss of the original)

on held-out rows of the tasks, and exact match on those where answers are short.
``curve``: the same of 8, 16, 32, … adapters (``--adapters``): what a byte buys as a fleet grows.
Judged are the same adapters at every N.
``merging``: pairs and a quad of tasks, every method, weights 1/N and 1 each: the share of each
task's gain that the merged adapter has.
``routing``: accuracy of ``TaskRouter`` on held-out prompts.

All ratios are to bf16: two bytes for each number of the adapters. Tasks on which an adapter gains
less than 0.05 nats are left out of shares of the gain, and the report names them. Rows of ``gsm8k``
come from its test set; the others from the end of a file of which the zoo's makers do not say what
they trained on.

Every run is a process and leaves one JSON file (``experiments.py``), so that the whole can be
stopped and resumed, and redrawn with ``--phase report``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamics import dress, logarithmic, look, machine, panels, save
from experiments import Results, digest, markdown, perform, prepare, write_report
from fleet_adapters import batches, mean_loss

PARTS = ("compression", "curve", "merging", "routing")
#: Adapters of the zoo on which losses are measured: one a task, and a DoRA.
JUDGED = (
    "alpaca-s0",
    "dates-de-s0",
    "dates-en-s0",
    "e2e-dora",
    "e2e-s0",
    "gsm8k-s0",
    "mrpc-s0",
    "numbers-en-s0",
    "numbers-es-s0",
)
GROUPS = (
    ("dates-en-s0", "numbers-en-s0"),
    ("e2e-s0", "gsm8k-s0"),
    ("dates-de-s0", "numbers-es-s0", "e2e-s0", "mrpc-s0"),
)
#: Tasks with a file in ``--data-dir``; the rest are built in.
FILES = ("alpaca", "e2e", "gsm8k", "mrpc")
#: Rows of long tasks are this many times fewer.
LONG = {"alpaca": 2, "gsm8k": 2}
#: Nats below which there is no share of the gain.
LEAST_GAIN = 0.05
KEPT = 0.99
#: What needs no fleet, and is the same for any number of adapters.
ALONE = ("plain", "cut")
METHODS = (*ALONE, "joint", "share")
#: Of the entries, what sparse merging methods keep.
DENSITY = 0.5
Record = dict[str, Any]
Row = dict[str, str]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int = 16
    prompts: int = 40
    model: str = "smollm2"
    dtype: str = "float32"


@dataclass(frozen=True)
class Run:
    """One build or merge, in some states, with the losses of some adapters.

    Attributes:
        part: Of the experiment.
        folder: ``"zoo"`` or ``"adapters"``.
        members: What is compressed or merged.
        judged: Whose losses are measured.
        method: ``reference``, ``plain``, ``cut``, ``joint``, ``share``, a merging method or
            ``router``.
        options: Of the method.
        codecs: How it is stored, one state each.
    """

    part: str
    folder: str
    members: tuple[str, ...]
    judged: tuple[str, ...]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    codecs: tuple[str, ...] = ()
    size: Size = Size()

    @property
    def key(self) -> str:
        """Name of its file."""
        said = "-".join(f"{k}{v}" for k, v in self.options.items())
        return f"{self.folder}-{len(self.members)}-{self.method}-{said}-{digest(self)}"


@dataclass(frozen=True)
class Folders:
    """Where adapters and data are."""

    zoo: Path | None
    adapters: Path | None
    data: Path | None

    def of(self, run: Run) -> Path:
        """That of the run's adapters."""
        found = self.zoo if run.folder == "zoo" else self.adapters
        assert found is not None
        return found


# Rows -----------------------------------------------------------------------------------------


def task_of(name: str, folder: Path) -> str:
    """The task of an adapter."""
    record = folder / "evaluations.json"
    if record.exists():
        return str(json.loads(record.read_text())[name]["task"])
    first, _, rest = name.partition("-")
    return first if first in FILES else f"{first}-{rest.partition('-')[0]}"


def rows_of(task: str, data: Path | None, count: int, split: str) -> list[Row]:
    """Rows to judge by (``"test"``) or to train a router on (``"train"``)."""
    if task not in FILES:
        from lorasmith.training.data import load_rows

        return [dict(r) for r in load_rows(f"builtin:{task}", split=split, limit=count)]
    assert data is not None
    found = list(_file_rows(task, data, split))
    return found[:count] if split == "train" or task == "gsm8k" else found[-count:]


def _file_rows(task: str, data: Path, split: str) -> Iterator[Row]:
    if task == "gsm8k":
        for line in (data / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield {"prompt": row["question"], "completion": row["answer"]}
    elif task == "e2e":
        last = ""
        for line in (data / "e2e_valid.txt").read_text(encoding="utf-8").splitlines():
            meaning, _, text = line.partition("||")
            if text.strip() and meaning != last:  # one text for each meaning
                yield {"prompt": meaning.strip(), "completion": text.strip()}
            last = meaning
    elif task == "mrpc":
        with (data / "mrpc_train.tsv").open(encoding="utf-8-sig", newline="") as file:
            for values in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                if values[0] in ("0", "1"):
                    asked = "Do these two sentences mean the same?"
                    answer = "yes" if values[0] == "1" else "no"
                    yield {
                        "prompt": f"{asked}\n{values[3]}\n{values[4]}",
                        "completion": answer,
                    }
    else:
        for line in (data / "alpaca_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            one = row["instances"][0]
            prompt = "\n".join(t for t in (row["instruction"], one["input"]) if t)
            yield {"prompt": prompt, "completion": one["output"]}


# Judging --------------------------------------------------------------------------------------


class Judge:
    """The base model and the rows; gives the loss of an adapter on its task."""

    def __init__(self, run: Run, folders: Folders) -> None:
        from lorasmith.training.collate import choose_collator
        from lorasmith.training.models import load_model

        self.run, self.folders = run, folders
        self.model: Any
        self.model, self.tokenizer = load_model(run.size.model, dtype=run.size.dtype, device="cpu")
        collate, _ = choose_collator(self.model, self.tokenizer.pad_token_id)
        self.rows: dict[str, list[Row]] = {}
        self.batches: dict[str, list[Any]] = {}
        for name in run.judged:
            task = task_of(name, folders.of(run))
            if task not in self.rows:
                count = max(1, run.size.rows // LONG.get(task, 1))
                rows = rows_of(task, folders.data, count, "test")
                rows.sort(key=lambda row: len(row["prompt"]) + len(row["completion"]))
                self.rows[task] = rows
                self.batches[task] = batches(rows, self.tokenizer, collate, 4)

    def task(self, name: str) -> str:
        """The task of an adapter."""
        return task_of(name, self.folders.of(self.run))

    def score(self, task: str) -> Record:
        """Of the model as it is: nats a token, and exact match where answers are short."""
        from lorasmith.training.evaluate import evaluate

        found: Record = {"loss": mean_loss(self.model, self.batches[task])}
        if task.startswith("dates"):
            report = evaluate(self.model, self.tokenizer, self.rows[task], exact_match=True)
            found["match"] = report.exact_match
        return found

    def adapter(self, name: str, adapter: Any) -> Record:
        """Of an adapter: one that was read or made, or a path."""
        import lorasmith as ls

        with tempfile.TemporaryDirectory() as scratch:
            path = adapter
            if not isinstance(adapter, Path):
                path = Path(scratch) / "adapter"
                adapter.save(path)
            ls.load(self.model, path)
            try:
                return self.score(self.task(name))
            finally:
                ls.detach(self.model)


def reference(run: Run, folders: Folders) -> Record:
    """Losses of the base model and of the originals."""
    judge = Judge(run, folders)
    base = {task: judge.score(task) for task in judge.rows}
    found = {}
    for name in run.judged:
        own = judge.adapter(name, folders.of(run) / name)
        found[name] = {"task": judge.task(name), "base": base[judge.task(name)], "own": own}
    return {"adapters": found}


# Compression ----------------------------------------------------------------------------------


def in_bf16(members: Sequence[Any]) -> int:
    """Bytes of all numbers of the adapters at two each."""
    total = 0
    for member in members:
        tensors = member.weights.tensors
        total += 2 * sum(math.prod(tensors.shape(key)) for key in tensors)
    return total


def rounded(rows: Any, codec: str) -> tuple[Any, float]:
    """Rows as they come back from few bits, and their bytes."""
    import torch

    from lorasmith.fleet.codec import Rows, codec_of

    if codec != "3":
        packed = Rows.pack(rows, codec_of(codec))
        return packed.unpack(), packed.nbytes
    n, columns = rows.shape
    wide = torch.nn.functional.pad(rows, (0, -columns % 64)).view(n, -(-columns // 64), 64)
    most = wide.abs().amax(2, keepdim=True)
    best, least = None, None
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6):
        scale = (clip * most / 3).bfloat16().float().clamp_min(1e-30)
        made = (wide / scale).round().clamp(-3, 3) * scale
        gone = (made - wide).square().sum(2, keepdim=True)
        if best is None or least is None:
            best, least = made, gone
        else:
            best = torch.where(gone < least, made, best)
            least = torch.minimum(gone, least)
    assert best is not None
    return best.flatten(1)[:, :columns], n * columns * 3 / 8 + 2 * n * wide.shape[1]


def cut(member: Any, error: float) -> dict[str, tuple[Any, Any]]:
    """An adapter's factors (rows of A, columns of B as rows) without what holds least of ΔW."""
    import torch

    from lorasmith.fleet.share import balance
    from lorasmith.fleet.trimming import kept_ranks

    own = {}
    for module in member.modules:
        factors = member.factors(module)
        own[module] = balance(factors.A.double(), factors.B.mT.double().contiguous())
    most = max(A.shape[0] for A, _ in own.values())
    energy = torch.zeros(len(own), 1, most, dtype=torch.float64)
    for place, (A, B) in enumerate(own.values()):
        energy[place, 0, : len(A)] = A.square().sum(1) * B.square().sum(1)
    costs = torch.tensor([float(A.shape[1] + B.shape[1]) for A, B in own.values()])
    ranks, _ = kept_ranks(energy, costs, error * energy.sum((0, 2)))
    return {
        module: (A[:rank].float(), B[:rank].float())
        for (module, (A, B)), rank in zip(own.items(), ranks[:, 0].tolist(), strict=True)
    }


def plain(run: Run, folders: Folders) -> Record:
    """The adapters' own factors in few bits, at their rank or cut to an error budget each."""
    import torch

    from lorasmith.fleet.members import LayerFactors, open_members, rebuild
    from lorasmith.fleet.share import distance

    members = open_members([folders.of(run) / name for name in run.members], run.members)
    budget = run.options.get("error")
    judge = Judge(run, folders)
    states = []
    for codec in run.codecs:
        errors, scores, total = {}, {}, 0.0
        for member in members:
            made, gone, energy = {}, 0.0, 0.0
            kept = None if budget is None else cut(member, budget)
            for module in member.modules:
                factors = member.factors(module)
                rows_A, rows_B = factors.A, factors.B.mT.contiguous()
                held_A, held_B = (rows_A, rows_B) if kept is None else kept[module]
                A, bytes_A = rounded(held_A, codec)
                B, bytes_B = rounded(held_B, codec)
                total += bytes_A + bytes_B
                gone += float(distance(rows_A, rows_B, A, B))
                energy += float(distance(rows_A, rows_B, A[:0], B[:0]))
                # A layer of which nothing is held costs nothing; an adapter has a rank of 1 there.
                none = torch.zeros(1, A.shape[1]), torch.zeros(1, B.shape[1])
                own_A, own_B = (A, B) if len(A) else none
                made[module] = LayerFactors(own_A, own_B.mT)
            total += sum(t.numel() * t.element_size() for t in member.rest.values())
            errors[member.id] = gone / energy
            if member.id in run.judged:
                adapter = rebuild(member.record, made, rest=member.rest, dtype=torch.float32)
                scores[member.id] = judge.adapter(member.id, adapter)
        states.append({"codec": codec, "bytes": total, "errors": errors, "scores": scores})
    return {"states": states, "bf16": in_bf16(members)}


def shared(run: Run, folders: Folders) -> Record:
    """One subspace, in several codecs."""
    import torch

    from lorasmith.fleet.members import open_members
    from lorasmith.fleet.subspace import BudgetWarning, SharedSubspace

    warnings.simplefilter("ignore", BudgetWarning)
    paths = {name: folders.of(run) / name for name in run.members}
    start = time.perf_counter()
    fleet = SharedSubspace.from_adapters(paths, basis=run.method, **run.options)  # type: ignore[arg-type]
    taken = time.perf_counter() - start
    judge = Judge(run, folders)
    states = []
    for codec in run.codecs:
        stored = copy.deepcopy(fleet)
        stored.quantize(codec)
        errors = {name: stored.measure(path, name).error for name, path in paths.items()}
        scores = {
            name: judge.adapter(name, stored.reconstruct(name, "exact", dtype=torch.float32))
            for name in run.judged
        }
        stats = stored.stats()
        states.append({"codec": codec, "bytes": stats.total, "errors": errors, "scores": scores})
    return {"states": states, "bf16": in_bf16(open_members(paths)), "build_s": taken}


# Merging and routing --------------------------------------------------------------------------


def merging(run: Run, folders: Folders) -> Record:
    """One method, the losses on all tasks of the group."""
    import lorasmith as ls

    judge = Judge(run, folders)
    paths = {name: folders.of(run) / name for name in run.members}
    weight = run.options["weight"]
    start = time.perf_counter()
    given = {k: v for k, v in run.options.items() if k != "weight"}
    weights = [weight] * len(paths)
    made = ls.merge(paths, run.method, weights=weights, **given)
    taken = time.perf_counter() - start
    scores = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "merged"
        made.save(path)
        for name in run.judged:
            scores[name] = judge.adapter(name, path)
    return {"scores": scores, "merge_s": taken, "discarded": made.report.discarded}


def routing(run: Run, folders: Folders) -> Record:
    """Accuracy of the router."""
    from lorasmith.fleet.router import TaskRouter
    from lorasmith.training.models import load_model

    model, tokenizer = load_model(run.size.model, dtype=run.size.dtype, device="cpu")
    examples: dict[str, list[str]] = {}
    for name in run.members:
        task = task_of(name, folders.of(run))
        if task not in examples:
            rows = rows_of(task, folders.data, run.size.prompts, "train")
            examples[task] = [row["prompt"] for row in rows]
    router = TaskRouter(model, tokenizer, max_length=96)
    report = router.fit(examples, held_out=run.options["held_out"])
    return {"report": report.to_dict(), "accuracy": report.accuracy, "tasks": len(examples)}


def work(job: tuple[Run, Folders, int]) -> tuple[str, Record]:
    """One run, in this process; what it measured, or why it failed."""
    run, folders, threads = job
    prepare(threads)
    import torch

    torch.set_grad_enabled(False)
    by_name = {
        "reference": reference,
        "plain": plain,
        "cut": plain,
        "joint": shared,
        "share": shared,
    }
    do = {"merging": merging, "routing": routing}.get(run.part) or by_name[run.method]
    if run.method == "reference":
        do = reference
    start = time.perf_counter()
    try:
        found = do(run, folders)
    except Exception as error:  # noqa: BLE001 - one that fails must not end the rest
        return run.key, {"failed": f"{type(error).__name__}: {error}"}
    if "states" in found:
        found["error"] = statistics.mean(found["states"][0]["errors"].values())
    return run.key, {**found, "took_s": time.perf_counter() - start}


# Which runs -----------------------------------------------------------------------------------


class Plan:
    """All runs of all parts."""

    def __init__(self, folders: Folders, *, quick: bool, most: int | None) -> None:
        self.folders, self.quick = folders, quick
        self.size = Size(rows=2, prompts=8) if quick else Size()
        self.zoo: tuple[str, ...] = ()
        if folders.zoo is not None:
            self.zoo = tuple(
                sorted(p.parent.name for p in folders.zoo.glob("*/adapter_config.json"))
            )
        if folders.data is None:
            self.zoo = tuple(n for n in self.zoo if task_of(n, Path()) not in FILES)
        self.fleet: tuple[str, ...] = ()
        if folders.adapters is not None:
            record = json.loads((folders.adapters / "evaluations.json").read_text())
            self.fleet = tuple(record)[:most]  # in the order in which they were trained
        if quick:
            wanted = ("dates-de-s0", "dates-en-s0", "e2e-dora", "numbers-en-s0")
            self.zoo = tuple(n for n in self.zoo if n in wanted)
            self.fleet = self.fleet[:8]
        self.judged = tuple(n for n in self.zoo if n in JUDGED)[: 2 if quick else None]
        self.counts = [n for n in (8, 16, 32, 64, 128, 256, 512) if n <= len(self.fleet)]
        if self.counts and len(self.fleet) > 1.2 * self.counts[-1]:
            self.counts.append(len(self.fleet))

    def reference(self, folder: str) -> Run:
        """Base model and originals."""
        judged = self.judged if folder == "zoo" else self.fleet[: 2 if self.quick else 8]
        return Run("reference", folder, judged, judged, "reference", size=self.size)

    def compression(self) -> list[Run]:
        """Of the zoo."""
        if not self.zoo:
            return []

        def run(method: str, codecs: tuple[str, ...], **options: Any) -> Run:
            return Run(
                "compression", "zoo", self.zoo, self.judged, method, options, codecs, self.size
            )

        if self.quick:
            return [
                run("plain", ("4", "3")),
                run("joint", ("16", "4"), error=0.1),
                run("share", ("16",), components=2),
            ]
        budgets = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
        return [
            run("plain", ("8", "4", "nf4", "3")),
            *(run("cut", ("4", "3"), error=e) for e in (0.03, 0.1, 0.2, 0.3, 0.5)),
            *(
                run("joint", ("16", "8", "4", "nf4") if e == 0.1 else ("16", "4"), error=e)
                for e in budgets
            ),
            *(run("share", ("16", "4"), components=k, gauge="aligned") for k in (2, 4, 8)),
            *(run("share", ("16",), components=k, gauge="balanced") for k in (2, 4, 8)),
            *(run("share", ("16",), components=k, gauge="stored") for k in (2, 4, 8)),
        ]

    def curve(self) -> list[Run]:
        """Of more and more adapters."""
        judged = self.reference("adapters").judged
        found = []
        for count in self.counts:
            members = self.fleet[:count]

            def run(
                method: str, codecs: tuple[str, ...], members: Any = members, **options: Any
            ) -> Run:
                return Run("curve", "adapters", members, judged, method, options, codecs, self.size)

            few = 1 if self.quick else None
            joint: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
            share: tuple[float, ...] = (0.1, 0.3, 0.6)
            found += [run("joint", ("4",), error=e) for e in joint[:few]]
            found += [run("share", ("4",), error=e) for e in share[:few]]
            if count == self.counts[0]:  # it is the same for any number
                found.append(run("plain", ("4",) if self.quick else ("8", "4", "nf4", "3")))
                found += [run("cut", ("4", "3"), error=e) for e in joint[:few]]
        return found

    def merging(self) -> list[Run]:
        """Groups × methods × weights."""
        from lorasmith.fleet.merge import methods

        groups = [g for g in GROUPS if set(g) <= set(self.zoo)]
        names = [n for n in methods() if not self.quick or n in ("linear", "ties")]
        found = []
        for group in groups[:1] if self.quick else groups:
            for name in names:
                method = methods()[name]
                if method.count not in (None, len(group)):
                    continue
                sparse = any(option.name == "density" for option in method.options)
                own = {"density": DENSITY} if sparse else {}  # 1 by default: all that there is
                for weight in (1 / len(group), 1.0):
                    options = {"weight": weight, **own}
                    found.append(Run("merging", "zoo", group, group, name, options, size=self.size))
        return found

    def routing(self) -> list[Run]:
        """The tasks of the zoo, and those of the many adapters."""
        found = []
        shares = (0.5,) if self.quick else (0.8, 0.5, 0.2)
        if self.zoo:
            found += [
                Run("routing", "zoo", self.zoo, (), "router", {"held_out": s}, size=self.size)
                for s in shares
            ]
        if self.fleet and not self.quick:
            members = self.fleet[:32]
            found.append(
                Run("routing", "adapters", members, (), "router", {"held_out": 0.5}, size=self.size)
            )
        return found

    def runs(self, part: str) -> list[Run]:
        """All of a part, its reference first."""
        own: list[Run] = getattr(self, part)()
        if part == "routing" or not own:
            return own
        first = [self.reference(own[0].folder)]
        if part == "merging":
            names = tuple(dict.fromkeys(name for run in own for name in run.members))
            first = [Run("reference", "zoo", names, names, "reference", size=self.size)]
        return [*first, *own]


# Reports --------------------------------------------------------------------------------------


def shares(known: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, float]:
    """Adapter → share of its gain that is kept, where there is a gain."""
    found = {}
    for name, score in scores.items():
        base, own = known[name]["base"]["loss"], known[name]["own"]["loss"]
        if base - own >= LEAST_GAIN:
            found[name] = (base - score["loss"]) / (base - own)
    return found


def matches(scores: Mapping[str, Any]) -> str:
    """Mean exact match, where it was measured."""
    found = [s["match"] for s in scores.values() if s.get("match") is not None]
    return f"{100 * statistics.mean(found):.0f}" if found else ""


def said_of(run: Run) -> str:
    """A method and its setting."""
    if run.method in ALONE:
        cut = f", cut to ε ≤ {run.options['error']:g}" if run.method == "cut" else ""
        return f"factors{cut}, rounded"
    gauge = {
        "aligned": ", aligned",
        "balanced": ", not aligned",
        "stored": ", factors as stored",
    }
    options = dict(run.options)
    text = gauge.get(options.pop("gauge", ""), "")
    named = {"error": "ε ≤", "components": "k ="}
    return f"{run.method} {', '.join(f'{named[k]} {v:g}' for k, v in options.items())}{text}"


def bits(codec: str) -> str:
    """How numbers are stored."""
    return {"16": "bf16", "8": "int8", "4": "int4", "3": "3 bits"}.get(codec, codec)


@dataclass(frozen=True)
class Point:
    """One state of one run."""

    run: Run
    codec: str
    bytes: float
    ratio: float
    error: float
    worst: float
    kept: float
    least: float
    matches: str


def points(plan: Plan, results: Results, part: str) -> list[Point]:
    """All states of a part that have been measured."""
    runs = plan.runs(part)
    known = results.get(runs[0]) if runs else None
    if known is None or "failed" in known:
        return []
    found = []
    for run in runs[1:]:
        result = results.get(run)
        if result is None or "failed" in result:
            continue
        for state in result["states"]:
            kept = shares(known["adapters"], state["scores"])
            errors = list(state["errors"].values())
            if not kept:
                continue
            found.append(
                Point(
                    run,
                    state["codec"],
                    state["bytes"],
                    result["bf16"] / state["bytes"],
                    statistics.mean(errors),
                    max(errors),
                    statistics.mean(kept.values()),
                    min(kept.values()),
                    matches(state["scores"]),
                )
            )
    return found


def reference_text(plan: Plan, results: Results, part: str) -> str:
    """What the tasks are worth to begin with."""
    known = results.get(plan.runs(part)[0])
    assert known is not None
    rows, none = [], []
    for name, one in known["adapters"].items():
        base, own = one["base"], one["own"]
        if base["loss"] - own["loss"] < LEAST_GAIN:
            none.append(name)
        match = [f"{100 * s['match']:.0f}" if "match" in s else "" for s in (base, own)]
        text = f"{match[0]} → {match[1]}" if match[0] else ""
        rows.append([name, f"{base['loss']:.3f}", f"{own['loss']:.3f}", text])
    text = markdown(["adapter", "base, nats a token", "with it", "exact match, %"], rows)
    if none:
        text += f"\n\nNo share of the gain for {', '.join(none)}: below {LEAST_GAIN:g} nats."
    return text


def head(plan: Plan, what: str) -> str:
    """Conditions."""
    size = plan.size
    text = f"SmolLM2-135M-Instruct, {size.dtype}, {size.rows} held-out rows a task (half as many "
    text += f"of {' and '.join(LONG)}), {machine()}. {what}"
    return text + (" **A trial run.**" if plan.quick else "")


def compression_report(plan: Plan, results: Results) -> str:
    found = points(plan, results, "compression")
    if not found:
        return "Not run."
    rows = [
        [
            said_of(p.run),
            bits(p.codec),
            f"{p.bytes / 2**10:.0f}",
            f"{p.ratio:.1f}",
            f"{p.error:.3f}",
            f"{p.worst:.3f}",
            f"{100 * p.kept:.1f}",
            f"{100 * p.least:.1f}",
            p.matches,
        ]
        for p in sorted(found, key=lambda p: p.ratio)
    ]
    names = ["", "stored", "KiB", "÷ bf16", "error", "worst", "gain kept, %", "least, %"]
    texts = [
        head(plan, f"{len(plan.zoo)} adapters of PEFT's, {len(plan.judged)} judged."),
        reference_text(plan, results, "compression"),
        markdown([*names, "exact match, %"], rows),
    ]
    good = [p for p in found if p.kept >= KEPT]
    for method in METHODS:
        best = max((p for p in good if p.run.method == method), key=lambda p: p.ratio, default=None)
        if best is not None:
            texts.append(
                f"Smallest with at least {KEPT:.0%} of the gain in the mean, {method}: "
                f"{said_of(best.run)}, {bits(best.codec)}: 1/{best.ratio:.1f}."
            )
        else:
            texts.append(f"With {method} nothing that was tried keeps {KEPT:.0%} of the gain.")
    return "\n\n".join(texts)


def curve_report(plan: Plan, results: Results) -> str:
    found = points(plan, results, "curve")
    if not found:
        return "Not run."
    rows = [
        [
            "any" if p.run.method in ALONE else f"{len(p.run.members):,}",
            said_of(p.run),
            bits(p.codec),
            f"{p.bytes / len(p.run.members) / 2**10:.1f}",
            f"{p.ratio:.1f}",
            f"{p.error:.3f}",
            f"{100 * p.kept:.1f}",
            f"{100 * p.least:.1f}",
        ]
        for p in found
    ]
    names = ["N", "", "stored", "KiB an adapter", "÷ bf16", "error", "gain kept, %", "least, %"]
    judged = len(plan.reference("adapters").judged)
    texts = [
        head(
            plan, f"LoRA, r = 8, on q_proj and v_proj; {judged} adapters judged, always the same."
        ),
        reference_text(plan, results, "curve"),
        markdown(names, rows),
    ]
    best = [
        [
            f"{count:,}",
            *(
                f"1/{value:.1f}" if value else "–"
                for value in (frontier(found, m, count) for m in METHODS)
            ),
        ]
        for count in plan.counts
    ]
    texts.append(
        f"Bytes at which {KEPT:.0%} of the gain is kept in the mean, between the points above:\n\n"
        + markdown(["N", "factors, rounded", "factors, cut and rounded", "joint", "share"], best)
    )
    return "\n\n".join(texts)


def frontier(found: Sequence[Point], method: str, count: int) -> float | None:
    """The ratio at which just enough of the gain is kept, between the points that were measured."""
    own = sorted(
        (p.ratio, p.kept)
        for p in found
        if p.run.method == method and (method in ALONE or len(p.run.members) == count)
    )
    good = [(ratio, kept) for ratio, kept in own if kept >= KEPT]
    if not good:
        return None
    ratio, kept = good[-1]
    beyond = [(r, k) for r, k in own if r > ratio]
    if not beyond:
        return ratio
    more, less = max(beyond, key=lambda point: point[1])  # the best of what keeps too little
    share = (kept - KEPT) / (kept - less)
    return float(ratio * (more / ratio) ** share)


def merging_report(plan: Plan, results: Results) -> str:
    runs = plan.runs("merging")
    known = results.get(runs[0]) if runs else None
    if known is None or "failed" in known:
        return "Not run."
    groups = list(dict.fromkeys(run.members for run in runs[1:]))
    names = list(dict.fromkeys(run.method for run in runs[1:]))
    by_place = {(r.method, r.members, r.options["weight"]): r for r in runs[1:]}
    rows = []
    for name in names:
        row = [name]
        for group in groups:
            for weight in (1 / len(group), 1.0):
                run = by_place.get((name, group, weight))
                result = None if run is None else results.get(run)
                if result is None or "failed" in result:
                    row.append("–")
                    continue
                kept = shares(known["adapters"], result["scores"])
                values = list(kept.values())
                row.append(
                    f"{100 * statistics.mean(values):.0f} ({100 * min(values):.0f})"
                    if values
                    else "–"
                )
        rows.append(row)
    heads = [f"{k} tasks, {w}" for g in groups for k, w in ((len(g), "1/N"), (len(g), "1"))]
    what = "Share of each task's own gain that the merged adapter has, in %: mean (least)."
    listed = "; ".join(" + ".join(g) for g in groups)
    return "\n\n".join(
        [
            head(
                plan,
                f"{what} Weights 1/N and 1 each; density {DENSITY:g} where a method has one. "
                f"Groups: {listed}.",
            ),
            markdown(["method", *heads], rows),
        ]
    )


def routing_report(plan: Plan, results: Results) -> str:
    rows = []
    for run in plan.runs("routing"):
        result = results.get(run)
        if result is None or "failed" in result:
            continue
        report = result["report"]
        worst = min(report["tasks"], key=lambda t: t["accuracy"])
        rows.append(
            [
                f"{result['tasks']} of the {'zoo' if run.folder == 'zoo' else 'many'}",
                f"{report['trained'] / result['tasks']:.0f}",
                str(report["held_out"]),
                f"{100 * report['accuracy']:.1f}",
                f"{100 * worst['accuracy']:.0f} ({worst['task']})",
            ]
        )
    if not rows:
        return "Not run."
    names = ["tasks", "examples a task", "held out", "accuracy, %", "least of a task, %"]
    return head(plan, "Top-1, after the middle layer.") + "\n\n" + markdown(names, rows)


def draw(plan: Plan, results: Results, part: str, path: Path) -> bool:
    """The figure of a part, if it has one."""
    found = points(plan, results, part) if part in ("compression", "curve") else []
    if not found:
        return False
    if part == "compression":
        plot, grid = panels(1, 2, 11, 4)
        series: dict[str, list[Point]] = {}
        for p in found:
            how = p.run.method if p.run.method == "plain" else f"{p.run.method}, {bits(p.codec)}"
            gauge = p.run.options.get("gauge")
            series.setdefault(how if gauge is None else f"{how}, {gauge}", []).append(p)
        for number, (name, each) in enumerate(series.items()):
            each.sort(key=lambda p: p.ratio)
            x = [p.ratio for p in each]
            grid[0][0].plot(x, [p.error for p in each], label=name, ms=4, **look(number))
            grid[0][1].plot(x, [100 * p.kept for p in each], ms=4, **look(number))
        dress(grid[0][0], "bf16 bytes ÷ bytes", "relative squared error of ΔW", "error")
        dress(grid[0][1], "bf16 bytes ÷ bytes", "gain kept, %", "task loss")
        grid[0][0].set_yscale("log")
        grid[0][0].legend(fontsize=7, frameon=False)
        grid[0][1].axhline(100 * KEPT, color="0.6", lw=0.8)
        for axes in grid[0]:
            axes.set_xscale("log")
            logarithmic(axes.xaxis)
    else:
        plot, grid = panels(1, 1, 6, 4)
        for number, method in enumerate(METHODS):
            kept = [(n, frontier(found, method, n)) for n in plan.counts]
            there = [(n, value) for n, value in kept if value]
            if there:
                counts, ratios = zip(*there, strict=True)
                grid[0][0].plot(counts, ratios, label=method, ms=5, **look(number))
        title = f"bytes with at least {KEPT:.0%} of the gain"
        dress(grid[0][0], "adapters", "bf16 bytes ÷ bytes", title)
        grid[0][0].set_xscale("log", base=2)
        grid[0][0].set_xticks(plan.counts, [f"{n:,}" for n in plan.counts])
        grid[0][0].legend(fontsize=8, frameon=False)
    save(plot, path)
    return True


REPORTS = {
    "compression": compression_report,
    "curve": curve_report,
    "merging": merging_report,
    "routing": routing_report,
}


# The command ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--zoo", type=Path, help="folder of adapters of mixed kinds")
    parser.add_argument("--adapters", type=Path, help="folder that fleet_adapters.py has written")
    parser.add_argument("--most", type=int, help="take only the first so many of them")
    parser.add_argument("--data-dir", type=Path, help=f"folder with the rows of {', '.join(FILES)}")
    parser.add_argument("--phase", choices=["all", "run", "report"], default="all")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "fleet")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--quick", action="store_true", help="a size that shows only that it works")
    parser.add_argument("--report", type=Path, help="Markdown file to put the tables into")
    parser.add_argument("--figure-dir", type=Path, help="folder for fleet-PART.png")
    options = parser.parse_args()
    names = [name.strip() for name in options.parts.split(",")]
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    folders = Folders(options.zoo, options.adapters, options.data_dir)
    plan = Plan(folders, quick=options.quick, most=options.most)
    if options.zoo is None:
        print("Without --zoo there is no compression, merging and routing of mixed adapters.")
    if options.adapters is None:
        print("Without --adapters there is no curve over the number of adapters.")
    results = Results(options.results / ("quick" if options.quick else "full"))
    for name in names:
        runs = plan.runs(name)
        if options.phase != "report" and runs:
            start = time.perf_counter()
            perform(
                runs,
                results,
                work,
                folders,
                options.threads,
                jobs=options.jobs,
                shown=("error", "accuracy", "took_s"),
            )
            print(f"{name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
        if options.phase == "run":
            continue
        text = REPORTS[name](plan, results)
        if options.figure_dir is not None:
            figure = options.figure_dir / f"fleet-{name}.png"
            if draw(plan, results, name, figure):
                alternative = {"compression": "error and gain kept against bytes"}
                said = alternative.get(name, "bytes against the number of adapters")
                text += f"\n\n![{said}](images/{figure.name})"
        print(f"\n## {name}\n\n{text}\n", flush=True)
        if options.report is not None:
            write_report(options.report, f"fleet:{name}", text)


if __name__ == "__main__":
    main()
