"""Mutated files through the readers: the same result, or a refusal, and nothing else.

    python -m tests.reliability.fuzz --count 5000 [--seed 0]

A healthy artefact is taken, one of its files is mutated (bits flipped, cut, pieces repeated or
moved, numbers of its JSON replaced by plausible and by absurd ones, keys dropped or doubled), and
it is read in full. Allowed are a ``LorasmithError``, or a result whose values are all finite; a
result without any complaint from what a hash protects must be the healthy one. Prints how many
were tried, refused and loaded, and every input that did something else.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import lorasmith as ls
from lorasmith.errors import LorasmithError
from lorasmith.io.gguf import GgufModel
from lorasmith.io.models import resolve_model
from tests.io import support
from tests.reliability import corpus

#: Seconds of processor time that one input may take.
LIMIT = 2.0
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


def adapter(folder: Path) -> str:
    """Everything in an adapter."""
    weights = ls.read_adapter(folder)
    found = []
    for module in weights.modules:
        found += [v for _, v in sorted(weights.state(module).values.items())]
        if module in weights.factors:
            found.append(weights.factors[module].delta(torch.float64))
    return digest(*found) + repr(weights.modules)


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


@dataclass
class Outcome:
    """What came of the inputs so far."""

    tried: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    loaded: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0


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
            holder[key] = rng.choice(VALUES)
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


BINARY = (flip, cut, splice, number)


class Fuzz:
    """Healthy artefacts, and one mutated input after the other."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.rng = root, random.Random(seed)
        foreign = support.foreign(support.saved(root / "foreign"))
        ours = support.saved(root / "ours", ls.DoRAConfig(r=2))
        ls.SharedSubspace.from_adapters([foreign, ours], ids=["a", "b"]).save(root / "fleet")
        (root / "gguf").mkdir()
        from tests.io.ggufs import write_gguf

        write_gguf(support.llama(), root / "gguf" / corpus.GGUF, "llama")
        st, js = (
            (*BINARY, in_header, in_header, in_header),
            (flip, cut, splice, in_json, in_json, in_json),
        )
        #: Artefact → directory, file, mutations, reader, what vouches for it afterwards.
        self.targets: list[tuple[str, Path, str, tuple[Any, ...], Callable[[Path], str], Any]] = [
            ("adapter: weights", foreign, corpus.WEIGHTS, st, adapter, None),
            ("adapter: configuration", foreign, corpus.CONFIG, js, adapter, None),
            ("adapter: own record", ours, corpus.OWN, js, adapter, None),
            ("adapter: weights under a hash", ours, corpus.WEIGHTS, st, adapter, "hash"),
            ("fleet: manifest", root / "fleet", corpus.MANIFEST, js, subspace, None),
            ("fleet: codes", root / "fleet", corpus.CODES, st, subspace, corpus.vouch),
            ("fleet: basis under a hash", root / "fleet", corpus.BASIS, st, subspace, "hash"),
            ("gguf", root / "gguf", corpus.GGUF, BINARY, gguf, None),
        ]
        self.healthy = {name: read(folder) for name, folder, _, _, read, _ in self.targets}
        self.outcome = Outcome()

    def step(self, index: int) -> None:
        """One input."""
        name, source, file, mutations, read, after = self.targets[index % len(self.targets)]
        folder = self.root / "case" / "a"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        shutil.copytree(source, folder)
        before = (folder / file).read_bytes()
        mutation = self.rng.choice(mutations)
        data = mutation(before, self.rng)
        (folder / file).write_bytes(data)
        if callable(after):
            after(folder)
        out = self.outcome
        out.tried[name] += 1
        started = time.process_time()
        label = f"{name}, input {index}, {mutation.__name__}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(folder)
        except LorasmithError:
            out.refused[name] += 1
        except BaseException as error:
            out.wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
            if isinstance(error, KeyboardInterrupt):
                raise
        else:
            out.loaded[name] += 1
            if after == "hash" and found != self.healthy[name]:
                out.wrong.append(f"{label}: loaded to another result under a hash")
        taken = time.process_time() - started
        out.slowest = max(out.slowest, taken)
        if taken > LIMIT:
            out.wrong.append(f"{label}: took {taken:.1f} s")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        fuzz = Fuzz(Path(place), options.seed)
        for index in range(options.count):
            fuzz.step(index)
    out, write = fuzz.outcome, sys.stdout.write
    write(f"{'artefact':<34}{'tried':>8}{'refused':>9}{'loaded':>8}\n")
    for name in [t[0] for t in fuzz.targets]:
        write(f"{name:<34}{out.tried[name]:>8}{out.refused[name]:>9}{out.loaded[name]:>8}\n")
    totals = (sum(c.values()) for c in (out.tried, out.refused, out.loaded))
    write("{:<34}{:>8}{:>9}{:>8}\n".format("all", *totals))
    write(
        f"slowest {out.slowest:.2f} s of processor time; "
        f"{time.perf_counter() - started:.0f} s in all\n"
    )
    for line in out.wrong:
        write(f"WRONG {line}\n")
    return 1 if out.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
