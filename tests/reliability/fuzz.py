"""Mutated files through the readers: the same result, or a refusal, and nothing else.

    python -m tests.reliability.fuzz --count 5000 [--seed 0] [--first 0] [--keep DIRECTORY]

A healthy artefact is taken, one of its files is mutated (bits flipped, cut, pieces repeated or
moved, numbers of its JSON replaced by plausible and by absurd ones, keys dropped or doubled,
tensors of other values, shapes and types), and it is read in full. Allowed are a
``LorasmithError`` that names a file, or a result whose values are all finite; a result without
any complaint from what a hash protects must be the healthy one. Each may take :data:`LIMIT`
seconds of processor time, and twice its files and :data:`MEMORY` bytes of memory.

Prints how many were tried, refused and loaded, and every input that did something else. Each
input has random numbers of its own: ``--first N --count 1`` makes input N again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import lorasmith as ls
from lorasmith.errors import LorasmithError
from lorasmith.io.gguf import GgufModel
from lorasmith.io.models import resolve_model
from tests.io import support
from tests.reliability import corpus, corpus_models
from tests.reliability.memory import peak
from tests.training import tiny

#: Seconds of processor time that one input may take.
LIMIT = 2.0
#: Bytes beyond twice the files that reading them may take, and bytes of addresses.
MEMORY, ADDRESSES = 64 * 2**20, 4 * 2**30
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    7,
    8,
    31,
    64,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**64,
    0.5,
    -0.0,
    1e-320,
    1e300,
)
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "os.system",
    "(a+)+$",
    [],
    [[]],
    {},
    {"a": 1},
    ["q_proj"],
    [1],
    "x" * 300,
)


def digest(*tensors: torch.Tensor) -> str:
    """A hash of values, shapes and dtypes; raises if one is not finite."""
    made = hashlib.sha256()
    for value in tensors:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AssertionError("a value is not finite")
        made.update(f"{value.dtype}{tuple(value.shape)}".encode())
        made.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def flat(value: Any) -> Iterator[Any]:
    """All that is in lists, tuples and mappings, keys as well."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from flat(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from flat(one)
    else:
        yield value


def tree(value: Any) -> str:
    """A hash of a state; raises if a number in it is not finite."""
    found = list(flat(value))
    if any(isinstance(v, float) and not math.isfinite(v) for v in found):
        raise AssertionError("a number is not finite")
    plain = [v for v in found if not torch.is_tensor(v)]
    return digest(*(v for v in found if torch.is_tensor(v))) + repr(plain)


# Readers ------------------------------------------------------------------------------------------


def adapter(folder: Path) -> str:
    """Everything in an adapter."""
    weights = ls.read_adapter(folder)
    found = []
    for module in weights.modules:
        found += [v for _, v in sorted(weights.state(module).values.items())]
        if module in weights.factors:
            found.append(weights.factors[module].delta(torch.float64))
    for key in weights.extras:
        weights.extras[key]
    told = (weights.modules, weights.base, weights.config, weights.frozen, weights.padding)
    return digest(*found) + repr(told)


def subspace(folder: Path) -> str:
    """Everything in a shared subspace."""
    fleet = ls.SharedSubspace.load(folder)
    found = []
    for name in fleet.ids:
        weights = fleet.reconstruct(name)
        found += [weights.factors[m].delta(torch.float64) for m in weights.modules]
    return digest(*found) + repr(fleet.ids)


def gguf(folder: Path) -> str:
    """Every matrix of a GGUF file. Its values have no check, and may be any finite number."""
    model = GgufModel(resolve_model(folder / corpus.GGUF))
    found = []
    for name, held in sorted(model.tensors.items()):
        value = torch.empty(held.shape, dtype=held.dtype)
        held.read(0, value)
        found.append(torch.nan_to_num(value.float()))
        del name
    return digest(*found)


def stress(folder: Path) -> str:
    """The history of the stress rule; what was not finite is NaN in it, as it was."""
    from lorasmith.dynamics.stress_history import read_json

    return repr(read_json(folder / STRESS))


def diagnosis(folder: Path) -> str:
    """A diagnosis, with all that it computes of its records."""
    from lorasmith.diagnostics.compare import compare

    report = ls.RotationReport.load(folder / DIAGNOSIS)
    report.save(folder / "again.csv")
    compare({"one": report, "other": report}).to_dict()
    return json.dumps(report.to_dict(), allow_nan=False) + report.summary()


def card(folder: Path) -> str:
    """The card of an adapter, which tells of its run."""
    from lorasmith.io.bundle import run_record
    from lorasmith.io.card import adapter_card

    return adapter_card(ls.read_adapter(folder), "somebody/adapter", run=run_record(folder))


class Readers:
    """Readers that need a model, or a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.llama = support.llama()
        self.lora = support.foreign(support.saved(root / "lora"))
        self.tokenizer = tiny.make_tokenizer()
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tiny = tiny.make_model(self.tokenizer)
        self.run = root / "run"

    def onto(self, folder: Path) -> str:
        """An adapter on its model."""
        try:
            handle = ls.load(self.llama, folder)
            return tree(handle.state_dict())
        finally:
            for name in ls.attached(self.llama):
                ls.detach(self.llama, name)

    def router(self, folder: Path) -> str:
        """A router on its model; it must route, too."""
        made = ls.TaskRouter.load(folder, self.tiny, self.tokenizer)
        assert made._classifier is not None
        told = [made.report, made.layer, made._threshold, made._template, made._max_length]
        routed = made._classifier(self.states)
        parts = vars(made._classifier).values()
        return digest(*(v for v in parts if torch.is_tensor(v)), routed) + repr(told)

    def fused(self, folder: Path) -> str:
        """A base model with an adapter fused into it."""
        out = self.root / "case" / "fused"
        shutil.rmtree(out, ignore_errors=True)
        try:
            ls.fuse_checkpoint(folder, self.of_base(folder), out, verify=False)
        except BaseException:
            if out.exists():
                raise AssertionError("a refusal leaves something behind") from None
            raise
        from safetensors.torch import load_file

        found = [load_file(f) for f in sorted(out.glob("*.safetensors"))]
        return tree(found) + (out / "config.json").read_text()

    def diagnosed(self, folder: Path) -> str:
        """What an adapter does to a base model; of a weight that is 0, all is new."""
        report = ls.diagnose(folder, self.of_base(folder), spectrum=True)
        units = [(u.theta_deg, u.norm_ratio if u.weight_norm else 0.0) for u in report.units]
        return tree(units) + repr([(s.name, s.reason) for s in report.skipped])

    def of_base(self, folder: Path) -> Path:
        """An adapter that was made for it."""
        return self.root / ("lora-gpt2" if (folder / "of-gpt2").is_file() else "lora")

    def train(self, rules: tuple[str, ...]) -> None:
        """A run of three steps with a checkpoint after the second; keeps what it trained with."""
        from lorasmith.dynamics.driver import Dynamics
        from lorasmith.training import trainer
        from lorasmith.training.config import AdapterOptions, TrainConfig
        from lorasmith.training.run import train

        rows = tiny.write_rows(self.root / "rows.jsonl")
        self.config = TrainConfig(
            "tiny",
            str(rows),
            output=self.run,
            adapter=AdapterOptions(r=2),
            batch_size=4,
            steps=3,
            save_steps=2,
            device="cpu",
            dynamics=rules,
        )
        kept: list[Any] = []
        kind = trainer.AdapterTrainer
        original = kind.run

        def run(self: Any, checkpoint: Path | None) -> Any:
            kept.append(self)
            return original(self, checkpoint)

        kind.run = run  # type: ignore[method-assign]
        try:
            train(self.config, model=self.tiny, tokenizer=self.tokenizer, progress=False)
        finally:
            kind.run = original  # type: ignore[method-assign]
        (self.trainer,) = kept
        # As on a resume, where the rules are there before the optimiser's state comes.
        raw = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        self.trainer.optimizer = raw
        self.driver = Dynamics(
            self.tiny,
            self.config.make_dynamics(),
            raw,
            adapter=self.trainer.adapter.name,
            observe="manual",
        )
        state = self.trainer.lr_scheduler.state_dict()
        self.schedule = {k: v for k, v in state.items() if k != "lr_lambdas"}
        self.options = [
            {k: v for k, v in group.items() if k != "params"} for group in raw.param_groups
        ]
        # As if it had been killed in its last step.
        self.told = (self.run / "training.json").read_text()
        for path in self.run.iterdir():
            if path.name != corpus_models.STEP and path.is_file():
                path.unlink()

    def resumed(self, folder: Path) -> str:
        """All that a run goes on from, as on a resume, and a step of optimiser and scheduler."""
        from dataclasses import replace

        from transformers import TrainerState
        from transformers.trainer_utils import compare_trainer_and_checkpoint_args

        from lorasmith.training.checkpoints import choose_checkpoint
        from lorasmith.training.resuming import Before

        step = folder / corpus_models.STEP
        config = replace(self.config, resume=str(step))
        checkpoint = choose_checkpoint(config.resume, config.output)
        assert checkpoint is not None
        before = Before(config, checkpoint)
        before.check_rows(self.trainer.rows)
        before.check_base(self.tiny, self.tokenizer)
        one = self.trainer
        vars(one.lr_scheduler).update(copy.deepcopy(self.schedule))
        for group, options in zip(one.optimizer.param_groups, self.options, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(copy.deepcopy(options), params=parameters)
        one.best_state = one.best_dynamics = None
        one.optimizer.state.clear()
        one._load_from_checkpoint(str(checkpoint))
        one._load_optimizer_and_scheduler(str(checkpoint))
        one._load_rng_state(str(checkpoint))
        state = TrainerState.load_from_json(str(checkpoint / corpus_models.TRAINER))
        compare_trainer_and_checkpoint_args(one.args, state)
        Path(state.best_model_checkpoint or ".").is_dir()
        told = tree(
            [
                one.adapter.state_dict(),
                one.optimizer.state_dict(),
                one.lr_scheduler.state_dict(),
                one.last_random,
                [before.tokens, before.seconds, before.eval_seconds, before.best],
                asdict(state),
            ]
        )
        for parameter in one.adapter.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.driver.observe(logits=torch.zeros(1, 4, 8), labels=torch.ones(1, 4, dtype=torch.long))
        one.optimizer.step()
        one.lr_scheduler.step()
        return told


@dataclass
class Outcome:
    """What came of the inputs so far."""

    tried: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    loaded: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    most: int = 0


# Mutations ----------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits; half of the time near the beginning, where headers are."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        end = len(made) if rng.random() < 0.5 else min(len(made), 512)
        if end:
            made[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Cut off, or a piece taken out."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] if rng.random() < 0.5 else data[:a] + data[b:]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece repeated, moved, or overwritten by zeros, ones or noise."""
    a = rng.randrange(len(data) + 1)
    piece = data[a : a + rng.choice((1, 4, 8, 64, 500))]
    b = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return data[:b] + piece + data[b:]
    fill = (piece, b"\xff" * len(piece), bytes(len(piece)))[kind - 1]
    return data[:b] + fill + data[b + len(piece) :]


def number(data: bytes, rng: random.Random) -> bytes:
    """An eight- or four-byte number at an even place."""
    size = rng.choice((4, 8))
    place = rng.randrange(max(1, min(len(data), 4096) // 4)) * 4
    value = int(abs(rng.choice(NUMBERS))) % 2 ** (8 * size)
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner:
        found.append((value, key))
        if isinstance(one, dict | list):
            _places(one, found)
    return found


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One to three fields changed, dropped, renamed or exchanged."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(value, [])
        if not places:
            return value
        holder, key = rng.choice(places)
        other, there = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", f"{key}x", "../x", "peft_type", "r"))] = holder.pop(key)
        elif kind == 2:
            holder[key] = json.loads(json.dumps(other[there]))
        elif kind == 3:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        else:
            old = holder[key]
            near = isinstance(old, int | float) and rng.random() < 0.4
            holder[key] = old + rng.choice((-1, 1, 4)) if near else rng.choice(NUMBERS)
    return value


def in_json(data: bytes, rng: random.Random) -> bytes:
    """The fields of a JSON file."""
    return json.dumps(mutate_json(json.loads(data), rng)).encode()


def in_header(data: bytes, rng: random.Random) -> bytes:
    """The fields of a safetensors header."""
    length = int.from_bytes(data[:8], "little")
    made = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(made).to_bytes(8, "little") + made + data[8 + length :]


def in_tree(data: bytes, rng: random.Random) -> bytes:
    """What stands in a state beside its tensors."""
    values = load(data)
    if "tree" not in values:
        return flip(data, rng)
    text = in_json(values["tree"].numpy().tobytes(), rng)
    values["tree"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return save(values)


def in_tensors(data: bytes, rng: random.Random) -> bytes:
    """One tensor of other values, another shape or another dtype; the file stays a proper one."""
    values = load(data)
    key = rng.choice([k for k in sorted(values) if k != "tree"] or sorted(values))
    value, kind = values[key], rng.randrange(8)
    if kind <= 2 and value.is_floating_point() and value.numel():
        value.view(-1)[rng.randrange(value.numel())] = rng.choice(
            (float("nan"), float("inf"), 1e38, -1.0, 0.0, 1e-40)
        )
    elif kind == 3:
        value = value * rng.choice((0, -1, 2))
    elif kind == 4:
        value = value.reshape(-1) if value.dim() > 1 else value[None]
    elif kind == 5:
        value = value[: value.shape[0] // 2] if value.dim() else value.repeat(2)
    elif kind == 6:
        value = value.to(rng.choice((torch.int8, torch.bool, torch.float16, torch.float64)))
    else:
        values[rng.choice(sorted(values))] = value.clone()
    values[key] = value.contiguous()
    if rng.random() < 0.15:
        del values[key]
    return save(values)


def load(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load as read

    return read(data)


def save(values: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file."""
    from safetensors.torch import save as write

    return write(values, metadata={"format": "pt"})


BINARY = (flip, cut, splice, number)
TENSORS = (*BINARY, in_header, in_header, in_header, in_tensors, in_tensors)
STATES = (*TENSORS, in_tree, in_tree, in_tree, in_tree)
JSON = (flip, cut, splice, in_json, in_json, in_json)
STRESS, DIAGNOSIS, INDEX = "stress.json", "diagnosis.json", corpus_models.INDEX

#: Variants beside LoRA whose files are as PEFT would have written them.
OTHERS = {
    "dora": ls.DoRAConfig(r=2),
    "hra": ls.HRAConfig(r=2),
    "ia3": ls.IA3Config(),
    "loha": ls.LoHaConfig(r=2),
    "lokr": ls.LoKrConfig(r=2),
    "miss": ls.MiSSConfig(r=2),
    "oft": ls.OFTConfig(block_size=4),
    "road": ls.RoAdConfig(group_size=4),
    "vera": ls.VeRAConfig(r=4),
}
#: Dynamics whose states are in the checkpoints.
RULES = ("entropy", "budget")


class Target(NamedTuple):
    """A kind of artefact.

    Attributes:
        name: What it is.
        files: Directories, and the file in each that is mutated; one is chosen for each input.
        mutations: Ways to mutate it.
        read: The reader.
        after: What vouches for the mutated file, or ``"hash"`` where its hash is recorded.
    """

    name: str
    files: tuple[tuple[Path, str], ...]
    mutations: tuple[Callable[[bytes, random.Random], bytes], ...]
    read: Callable[[Path], str]
    after: Callable[[Path], object] | str | None = None


@contextlib.contextmanager
def addresses() -> Iterator[None]:
    """Lets no more memory be asked for than :data:`ADDRESSES` above what there is."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def bases(root: Path) -> dict[str, Path]:
    """Base models: of two shards, of a class with a list of layer types, and of Conv1D."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    support.llama().save_pretrained(root / "base", max_shard_size="30KB")
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(root / "base-qwen")
    support.gpt2().save_pretrained(root / "base-gpt2")
    (root / "base-gpt2" / "of-gpt2").touch()
    support.foreign(support.saved(root / "lora-gpt2", model=support.gpt2()))
    return {name: root / name for name in ("base", "base-qwen", "base-gpt2")}


def merged(root: Path, one: Path) -> Path:
    """A merged adapter."""
    other = support.saved(root / "other", ls.LoRAConfig(r=2))
    ls.merge([one, other], method="linear").save(root / "merged")
    return root / "merged"


def reports(root: Path, lora: Path, run: str) -> Path:
    """A directory with all JSON that our own readers read back."""
    from lorasmith.dynamics.stress_history import StressRecord, write_json

    folder = root / "reports"
    shutil.copytree(lora, folder)
    (folder / "training.json").write_text(run)
    ls.diagnose(support.llama(), lora, spectrum=True, diversity=True).save(folder / DIAGNOSIS)
    write_json(
        [
            StressRecord(0, 0.1, 0.2, 0.3, 0.4, "single", 2.0),
            StressRecord(1, 0.9, 0.2, 0.3, 0.4, "mirror", math.nan, "enter mirror"),
        ],
        folder / STRESS,
    )
    return folder


class Fuzz:
    """Healthy artefacts, and one mutated input after the other."""

    def __init__(self, root: Path, seed: int = 0, keep: Path | None = None) -> None:
        self.root, self.seed, self.keep = root, seed, keep
        (root / "case").mkdir()
        readers = Readers(root)
        lora = readers.lora
        ours = support.saved(root / "ours", ls.DoRAConfig(r=2))
        with_words = root / "words"
        words = support.llama()
        support.attached(words, ls.LoRAConfig(r=2))
        ls.save(words, with_words, tokenizer=readers.tokenizer)
        ls.SharedSubspace.from_adapters([lora, ours], ids=["a", "b"]).save(root / "fleet")
        (root / "gguf").mkdir()
        from tests.io.ggufs import write_gguf

        write_gguf(support.llama(), root / "gguf" / corpus.GGUF, "llama")
        others = [
            support.foreign(support.saved(root / "others" / name, config))
            for name, config in OTHERS.items()
        ]
        router = ls.TaskRouter(readers.tiny, readers.tokenizer)
        prompts = {"one": ["Count to 1."] * 4, "two": ["What is a cat?"] * 4}
        router.fit(prompts)
        readers.states = router.hidden(["Count to 3.", "What?"])
        router.save(root / "router")
        readers.run.mkdir()
        readers.train(RULES)
        of = bases(root)

        def each(folders: Any, *names: str) -> tuple[tuple[Path, str], ...]:
            return tuple((f, n) for f in folders for n in names)

        def shards(*names: str) -> tuple[tuple[Path, str], ...]:
            return tuple((of[n], f.name) for n in names for f in of[n].glob("*.safetensors"))

        fleet, where = root / "fleet", root / "router"
        m, step = corpus_models, corpus_models.STEP
        run = [readers.run]
        told = reports(root, lora, readers.told)
        sealed = m.within(lambda folder: None)
        states = [f"{step}/{n}" for n in (m.OPTIMIZER, m.SCHEDULER, m.RANDOM, m.STATE)]
        words_of_run = [f"{step}/{n}" for n in (m.RUN, m.TRAINER)]
        self.targets = [
            Target("adapter: weights", ((lora, corpus.WEIGHTS),), TENSORS, adapter),
            Target("adapter: configuration", ((lora, corpus.CONFIG),), JSON, adapter),
            Target(
                "adapter: own record",
                each([ours, with_words, merged(root, lora)], corpus.OWN),
                JSON,
                adapter,
            ),
            Target(
                "adapter: weights under a hash", ((ours, corpus.WEIGHTS),), TENSORS, adapter, "hash"
            ),
            Target("other variants: weights", each(others, corpus.WEIGHTS), TENSORS, adapter),
            Target("other variants: configuration", each(others, corpus.CONFIG), JSON, adapter),
            Target(
                "adapter: onto a model",
                each([lora, *others], corpus.CONFIG, corpus.WEIGHTS),
                (),
                readers.onto,
            ),
            Target("fleet: manifest", ((fleet, corpus.MANIFEST),), JSON, subspace),
            Target("fleet: codes", ((fleet, corpus.CODES),), TENSORS, subspace, corpus.vouch),
            Target(
                "fleet: basis under a hash", ((fleet, corpus.BASIS),), TENSORS, subspace, "hash"
            ),
            Target("router: configuration", ((where, m.ROUTER),), JSON, readers.router),
            Target(
                "router: tensors", ((where, m.TENSORS),), TENSORS, readers.router, m.vouch_router
            ),
            Target(
                "router: tensors under a hash",
                ((where, m.TENSORS),),
                TENSORS,
                readers.router,
                "hash",
            ),
            Target("checkpoint: states", each(run, *states), STATES, readers.resumed, sealed),
            Target("checkpoint: records", each(run, *words_of_run), JSON, readers.resumed, sealed),
            Target(
                "checkpoint: under a hash",
                each(run, *states, *words_of_run, f"{step}/{m.SEAL}"),
                (),
                readers.resumed,
                "hash",
            ),
            Target("base in fuse: configuration", each(of.values(), m.CONFIG), JSON, readers.fused),
            Target("base in fuse: weights", shards(*of), TENSORS, readers.fused),
            Target(
                "base in diagnose: configuration",
                each(of.values(), m.CONFIG),
                JSON,
                readers.diagnosed,
            ),
            Target("base in diagnose: weights", shards(*of), TENSORS, readers.diagnosed),
            Target("base: index", ((of["base"], INDEX),), JSON, readers.fused),
            Target("gguf", ((root / "gguf", corpus.GGUF),), BINARY, gguf),
            Target("report: diagnosis", ((told, DIAGNOSIS),), JSON, diagnosis),
            Target("report: stress history", ((told, STRESS),), JSON, stress),
            Target("report: run, for the card", ((told, "training.json"),), JSON, card),
        ]
        self.healthy = {}
        for target in self.targets:
            for folder in dict.fromkeys(f for f, _ in target.files):
                self.healthy[target.name, folder] = self._read(target, folder)
        self.outcome = Outcome()

    def _read(self, target: Target, folder: Path) -> str:
        """What the reader finds, in a place of its own."""
        case = self.root / "case" / "a"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder, case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return target.read(case)

    def step(self, index: int) -> None:
        """One input."""
        rng = random.Random(f"{self.seed} {index}")
        target = self.targets[index % len(self.targets)]
        source, file = rng.choice(target.files)
        folder = self.root / "case" / "a"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        shutil.copytree(source, folder)
        mutations = target.mutations or (JSON if file.endswith(".json") else TENSORS)
        mutation = rng.choice(mutations)
        before = (folder / file).read_bytes()
        data = before
        while data == before:
            data = mutation(before, rng)
            mutation = rng.choice(mutations) if data == before else mutation
        (folder / file).write_bytes(data)
        if callable(target.after):
            target.after(folder)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        out, name = self.outcome, target.name
        out.tried[name] += 1
        label = f"{name}, input {index}, {mutation.__name__} of {source.name}/{file}"
        faults = len(out.wrong)
        rise, _ = peak()
        started = time.process_time()
        try:
            with warnings.catch_warnings(), addresses():
                warnings.simplefilter("ignore")
                found = target.read(folder)
        except LorasmithError as error:
            out.refused[name] += 1
            if not error.file:
                out.wrong.append(f"{label}: names no file: {str(error)[:300]}")
        except BaseException as error:
            out.wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
            if isinstance(error, KeyboardInterrupt):
                raise
        else:
            out.loaded[name] += 1
            if target.after == "hash" and found != self.healthy[name, source]:
                out.wrong.append(f"{label}: loaded to another result under a hash")
        taken, memory = time.process_time() - started, rise()
        out.slowest, out.most = max(out.slowest, taken), max(out.most, memory)
        if taken > LIMIT:
            out.wrong.append(f"{label}: took {taken:.1f} s")
        if memory > 2 * size + MEMORY:
            out.wrong.append(f"{label}: took {memory / 2**20:.0f} MiB for {size:,} bytes")
        if self.keep is not None and len(out.wrong) > faults:
            shutil.copytree(folder, self.keep / str(index), dirs_exist_ok=True)


def main() -> int:
    """The command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to copy what was wrong")
    parser.add_argument("--only", help="only artefacts whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        fuzz = Fuzz(Path(place), options.seed, options.keep)
        ready = time.perf_counter() - started
        chosen = range(options.first, options.first + options.count)
        for index in chosen:
            name = fuzz.targets[index % len(fuzz.targets)].name
            if options.only is None or options.only in name:
                fuzz.step(index)
    out, write = fuzz.outcome, sys.stdout.write
    write(f"{'artefact':<34}{'tried':>8}{'refused':>9}{'loaded':>8}\n")
    for name in [t.name for t in fuzz.targets]:
        write(f"{name:<34}{out.tried[name]:>8}{out.refused[name]:>9}{out.loaded[name]:>8}\n")
    totals = (sum(c.values()) for c in (out.tried, out.refused, out.loaded))
    write("{:<34}{:>8}{:>9}{:>8}\n".format("all", *totals))
    write(
        f"slowest {out.slowest:.2f} s of processor time; most memory {out.most / 2**20:.0f} MiB; "
        f"{time.perf_counter() - started:.0f} s in all, {ready:.0f} of them to make the "
        "healthy ones\n"
    )
    for line in out.wrong:
        write(f"WRONG {line}\n")
    return 1 if out.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
