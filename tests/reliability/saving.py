"""Saving under fire: killed at random, with failing calls, by many writers at once.

    python -m tests.reliability.saving kills KIND… --count 500
    python -m tests.reliability.saving faults KIND…
    python -m tests.reliability.saving writers KIND… --writers 10 --saves 100

A line of JSON on stdout for each kind of artefact; exit code 1 where anything was lost.

**Kills.** A child saves two generations in turn until SIGKILL, after a random delay. Then the
path must hold one of the two, byte for byte; after one more save nothing else may be left beside
it, and files and subdirectories of others must be there.

**Faults.** Each call that changes files (``faults.c``: open, write, fsync, mkdir, link, rename)
fails in turn, with EIO once and with ENOSPC from then on. The save must raise, the old files be
the same byte for byte, and the next save succeed.

**Writers.** Each writes a generation of its own, again and again, while a reader reads with
lorasmith's own reader, or through one open directory where there is none: every read must be one
whole generation.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SOURCE = Path(__file__).with_name("faults.c")
#: Variable that names the library to the process that has it preloaded.
LIBRARY = "LORASMITH_TEST_FAULTS"


@dataclass
class Kind:
    """A kind of artefact.

    Attributes:
        name: What it is called here.
        save: Writes a generation to a path.
        read: All that lorasmith's reader gives of it, as text; ``None`` where there is no reader.
        file: Whether it is a single file.
        others: Whether the writer leaves what else is in the directory alone.
        concurrent: Whether several may write it at a time.
    """

    name: str
    save: Callable[[Path, int], object]
    read: Callable[[Path], str] | None = None
    file: bool = False
    others: bool = True
    concurrent: bool = True
    volatile: tuple[str, ...] = field(default=())

    def target(self, folder: Path) -> Path:
        """Where it is written in a folder."""
        return folder / ("report.html" if self.name == "report" else "artefact")

    def content(self, path: Path) -> dict[str, str]:
        """Name → hash of each of its files; nothing if there is none."""
        if path.is_file():
            return {"": _hash(path.read_bytes())}
        if not path.is_dir():
            return {}
        found = {}
        for entry in path.rglob("*"):
            name = entry.relative_to(path).as_posix()
            if entry.is_file() and name not in OTHERS:
                found[name] = self._stable(name, entry.read_bytes())
        return found

    def opened(self, path: Path) -> dict[str, str] | None:
        """The same through one open directory; ``None`` if it was deleted meanwhile."""
        try:
            if self.file:
                return {"": _hash(path.read_bytes())}
            folder = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            found = {}
            for name in os.listdir(folder):  # noqa: PTH208 - of an open directory
                handle = os.open(name, os.O_RDONLY, dir_fd=folder)
                with os.fdopen(handle, "rb") as stream:
                    found[name] = self._stable(name, stream.read())
            # Deleted while it was read: a few files may be gone already.
            return found if os.fstat(folder).st_ino == path.stat().st_ino else None
        except FileNotFoundError:
            return None
        finally:
            os.close(folder)

    def _stable(self, name: str, data: bytes) -> str:
        if name in self.volatile:
            values = json.loads(data)
            values.pop("seconds", None)
            values.pop("path", None)
            data = json.dumps(values, sort_keys=True).encode()
        return _hash(data)


#: Files of somebody else in the directory.
OTHERS = ("notes.txt", "runs/log")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Kinds ------------------------------------------------------------------------------------------


def kinds(work: Path) -> dict[str, Callable[[], Kind]]:
    """Name → what makes it; ``work`` takes what they need."""
    return {
        "adapter": lambda: _adapter(work),
        "adapter, two renames": lambda: _two_renames(work),
        "merged adapter": lambda: _merged(work),
        "fleet": _fleet,
        "router": _router,
        "fused model": lambda: _fused(work),
        "GGUF export": lambda: _gguf(work),
        "checkpoint": lambda: _checkpoint(work),
        "report": _report,
    }


def _weights(seed: int) -> Any:
    from tests.fleet import fleets

    return fleets.adapter(seed=seed, alpha=1.0 + seed, r=2 + seed % 3)


def _read_adapter(path: Path) -> str:
    import lorasmith as ls

    weights = ls.read_adapter(path)
    return _state(weights.config.to_dict(), {k: weights.tensors[k] for k in weights.tensors})


def _state(values: Any, tensors: dict[str, Any]) -> str:
    hashes = {k: _hash(v.numpy().tobytes()) for k, v in sorted(tensors.items())}
    return json.dumps([values, hashes], sort_keys=True, default=str)


def _adapter(work: Path) -> Kind:
    made = [_weights(seed) for seed in range(10)]
    return Kind("adapter", lambda path, g: made[g].save(path), _read_adapter)


def _two_renames(work: Path) -> Kind:
    from lorasmith.io import atomic

    atomic._exchange = lambda a, b: False
    kind = _adapter(work)
    kind.name = "adapter, two renames"
    return kind


def _merged(work: Path) -> Kind:
    import lorasmith as ls

    pairs = [[_weights(g), _weights(g + 1)] for g in range(3)]
    made = [ls.merge(pair, "linear", rank=2).weights for pair in pairs]
    return Kind("merged adapter", lambda path, g: made[g % 3].save(path), _read_adapter)


def _fleet() -> Kind:
    import lorasmith as ls

    made = [
        ls.SharedSubspace.from_adapters({f"a{g}-{i}": _weights(g + i) for i in range(1 + g % 3)})
        for g in range(10)
    ]

    def read(path: Path) -> str:
        found = ls.SharedSubspace.load(path)
        tensors = {}
        for i, layer in enumerate(found._layers):
            for part in ("up", "down", "left", "right"):
                for name, value in getattr(layer, part).tensors().items():
                    tensors[f"{i}.{part}.{name}"] = value
        return _state(list(found.ids), tensors)

    # A copy each time: a subspace that has been saved refuses to overwrite others' changes.
    return Kind("fleet", lambda path, g: copy.deepcopy(made[g]).save(path), read)


def _router() -> Kind:
    from lorasmith.fleet.router import TaskRouter
    from tests.fleet.test_router import Letters
    from tests.models import llama

    made = []
    for g in range(2):
        router = TaskRouter(llama(), Letters(), max_length=5 + g)
        more = "c" * g  # so that the tensors of the two differ
        rows = {"a": ["ab", "ba", "aab", "bba"], "b": ["xy", "yx", "xxy", "yyx"]}
        router.fit({task: [row + more for row in each] * 3 for task, each in rows.items()})
        made.append(router)
    model = llama()

    def read(path: Path) -> str:
        found = TaskRouter.load(path, model, Letters())
        classifier = found._trained()
        names = ("weight", "bias", "mean", "scale")
        return _state(found._max_length, {n: getattr(classifier, n) for n in names})

    return Kind("router", lambda path, g: made[g % 2].save(path), read)


def _fused(work: Path) -> Kind:
    import lorasmith as ls
    from tests.io import support
    from tests.models import llama

    base = work / "base"
    llama().save_pretrained(base)
    parts = []
    for g in range(2):
        model = llama()
        adapter = ls.attach(model, ls.LoRAConfig(r=2, alpha=2.0 + g))
        support.stir(adapter.parameters(), 0.1 + g)
        parts.append(ls.save(model, work / f"fused-{g}"))

    def save(path: Path, g: int) -> object:
        return ls.fuse_checkpoint(
            base, parts[g % 2], path, verify=False, overwrite=True, max_shard_size=9000,
            allow_base_mismatch=True,
        )  # fmt: skip

    return Kind("fused model", save, volatile=("fuse_report.json",))


def _gguf(work: Path) -> Kind:
    import lorasmith as ls
    from tests.export.test_gguf import llama, noisy
    from tests.io.ggufs import write_gguf

    model = llama()
    base = write_gguf(model, work / "base.gguf", "llama", vocabulary=True)
    parts = [noisy(model, work / f"exported-{g}", r=2 + g) for g in range(2)]

    def save(path: Path, g: int) -> object:
        return ls.export_adapter(parts[g % 2], path, "gguf", base=base, name="a", overwrite=True)

    return Kind("GGUF export", save)


def _checkpoint(work: Path) -> Kind:
    import torch

    from lorasmith.training import checkpoints
    from lorasmith.training.states import save_state

    made = [_weights(seed) for seed in range(2)]

    def save(path: Path, g: int) -> object:
        # As the trainer does: everything into another directory, then sealed and renamed.
        checkpoints.remove_partial(path.parent)
        partial = checkpoints.partial_path(path.parent, 5)
        made[g % 2].save(partial, beside=True)
        save_state({"state": torch.full((50,), float(g))}, partial / "optimizer.safetensors")
        for name in ("adapter_state.safetensors", "scheduler.safetensors", "rng_state.safetensors"):
            (partial / name).write_bytes(b"%d" % g * 100)
        checkpoints.write_json(partial / "run_state.json", {"g": g})
        checkpoints.write_json(partial / "trainer_state.json", {"g": g})
        checkpoints.publish(partial, path)
        return path

    def read(path: Path) -> str:
        problem = checkpoints.defect(path)
        if problem is not None:
            raise AssertionError(problem)
        return _hash((path / "optimizer.safetensors").read_bytes())

    return Kind("checkpoint", save, read, others=False, concurrent=False)


def _report() -> Kind:
    from datetime import datetime

    from lorasmith.web.report import Note, Section, write_report

    def save(path: Path, g: int) -> object:
        note = Note(f"generation {g} " * 3000)
        when = datetime(2026, 1, 1 + g)
        return write_report(path, title="T", sections=[Section("S", [note])], generated=when)

    return Kind("report", save, file=True, others=False)


# What is done to them ---------------------------------------------------------------------------


class LostError(AssertionError):
    """Something was lost, mixed or left."""


def _prepared(kind: Kind, folder: Path, count: int) -> list[dict[str, str]]:
    """What each generation looks like, as written in peace."""
    wanted = []
    for g in range(count):
        path = kind.target(folder / f"reference-{g}")
        path.parent.mkdir()
        kind.save(path, g)
        wanted.append(kind.content(path))
    if any(a == b for i, a in enumerate(wanted) for b in wanted[:i]) and count == 2:
        raise LostError("the generations are the same")
    return wanted


def _add_others(kind: Kind, path: Path) -> None:
    if kind.others and not kind.file:
        (path / "runs").mkdir(exist_ok=True)
        for name in OTHERS:
            (path / name).write_text("mine")


def _check_others(kind: Kind, path: Path) -> None:
    if kind.others and not kind.file:
        for name in OTHERS:
            if not (path / name).is_file() or (path / name).read_text() != "mine":
                raise LostError(f"{name}, which was not ours, is gone")


def _left(kind: Kind, path: Path) -> list[str]:
    return sorted(
        e.name
        for e in path.parent.iterdir()
        if e != path and not e.name.endswith(".lock") and e.name != "kept"
    )


def kills(kind: Kind, folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kills writers ``count`` times; raises :class:`LostError`."""
    wanted = _prepared(kind, folder, 2)
    path = kind.target(folder / "killed")
    path.parent.mkdir()
    kind.save(path, 0)
    _add_others(kind, path)
    start = time.perf_counter()
    for g in (1, 0, 1, 0):
        kind.save(path, g)
    once = (time.perf_counter() - start) / 4
    chance = random.Random(seed)
    during = 0
    tally = [0, 0]
    last = 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    last = 1 - last
                    kind.save(path, last)
            finally:
                os._exit(3)
        time.sleep(chance.uniform(0, 3 * once))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise LostError("the writer failed before it was killed")
        during += bool(_left(kind, path))
        if not path.exists() and kind.name == "adapter, two renames":
            import lorasmith as ls

            ls.read_adapter(path)  # a reader puts the old generation back
        found = kind.content(path)
        if found not in wanted:
            raise LostError(f"no whole generation: {sorted(found)}")
        if kind.read is not None:
            kind.read(path)
        last = wanted.index(found)
        tally[last] += 1
        if chance.random() < 0.5:
            continue  # the next one finds what this one left
        last = 1 - last
        kind.save(path, last)
        if kind.content(path) != wanted[last]:
            raise LostError("the save after a kill is not whole")
        _check_others(kind, path)
        if _left(kind, path):
            raise LostError(f"left by a dead writer: {_left(kind, path)}")
    kind.save(path, 0)
    _check_others(kind, path)
    if kind.content(path) != wanted[0] or _left(kind, path):
        raise LostError(f"after all: {_left(kind, path)}")
    return {"kills": count, "during_a_save": during, "generations": tally}


def build(folder: Path) -> Path | None:
    """The library that makes calls fail; ``None`` where it cannot be made."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        return None
    made = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, check=False)
    return made if done.returncode == 0 else None


def faults(kind: Kind, folder: Path, step: int = 1) -> dict[str, Any]:
    """Lets every ``step``-th call fail; raises :class:`LostError`."""
    from lorasmith.errors import LorasmithError

    library = ctypes.CDLL(os.environ[LIBRARY])
    library.faults_hit.restype = ctypes.c_char_p
    wanted = _prepared(kind, folder, 2)
    # The first save of a path is another one than those that follow.
    tried: dict[str, int] = {}
    typed = unharmed = 0
    for fresh in (False, True):
        for code, lasting in ((errno.EIO, 0), (errno.ENOSPC, 1)):
            n = 1
            while True:
                home = folder / "faulty"
                shutil.rmtree(home, ignore_errors=True)
                home.mkdir()
                path = kind.target(home)
                if not fresh:
                    kind.save(path, 0)
                    _add_others(kind, path)
                library.faults_arm(os.fsencode(home), n, code, lasting)
                failure: Exception | None = None
                try:
                    kind.save(path, 1)
                except Exception as error:  # noqa: BLE001 - looked at below
                    failure = error
                finally:
                    seen = library.faults_disarm()
                call = library.faults_hit().decode()
                if not call:
                    if n > seen:
                        break
                    raise LostError("the fault did not strike")
                name = f"{errno.errorcode[code]} in {call}"
                tried[name] = tried.get(name, 0) + 1
                found = kind.content(path)
                where = f"{name}, call {n}{' of a first save' if fresh else ''}"
                if failure is None:
                    # The call has been made up for, as a link by a copy.
                    if found != wanted[1]:
                        raise LostError(f"{where}: no error, and not the new files")
                    unharmed += 1
                else:
                    if found != ({} if fresh else wanted[0]):
                        raise LostError(f"{where}: not the old files, {failure!r}")
                    if isinstance(failure, LorasmithError | OSError):
                        typed += 1
                    elif kind.name != "checkpoint":
                        raise LostError(f"{where}: {failure!r}")
                if not fresh:
                    _check_others(kind, path)
                kind.save(path, 1)
                if kind.content(path) != wanted[1]:
                    raise LostError(f"{where}: the next save is not whole")
                if _left(kind, path):
                    raise LostError(f"{where}: left are {_left(kind, path)}")
                n += step
    return {"faults": sum(tried.values()), "by_call": tried, "typed": typed, "made_up": unharmed}


def writers(kind: Kind, folder: Path, number: int, saves: int) -> dict[str, Any]:
    """So many writers at a time, and a reader; raises :class:`LostError`."""
    wanted = _prepared(kind, folder, number)
    read = kind.read
    known: list[Any] = list(wanted)
    if read is not None:
        known = [read(kind.target(folder / f"reference-{g}")) for g in range(number)]
    path = kind.target(folder / "shared")
    path.parent.mkdir()
    kind.save(path, 0)
    children = []
    start = time.perf_counter()
    for g in range(number):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(saves):
                    kind.save(path, g)
                code = 0
            except BaseException:  # noqa: BLE001 - told, and then the process ends
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    reads = again = 0
    seen = set()
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                if status:
                    raise LostError(f"a writer failed ({status})")
        value: Any = None
        if read is None:
            value = kind.opened(path)
            if value is None:
                again += 1
                continue
        else:
            value = read(path)
        if value not in known:
            raise LostError("a read was of no one generation")
        seen.add(known.index(value))
        reads += 1
    if kind.content(path) not in wanted or _left(kind, path):
        raise LostError(f"at the end: {_left(kind, path)}")
    seconds = time.perf_counter() - start
    return {
        "saves": number * saves,
        "reads": reads,
        "read_again": again,
        "generations_read": len(seen),
        "seconds": round(seconds, 1),
    }


def run(
    what: str, names: list[str], *, count: int = 20, step: int = 1, number: int = 3, saves: int = 10
) -> Iterator[dict[str, Any]]:
    """A record for each kind, each in a process of its own; see the module."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if what == "faults":
            library = build(Path(folder))
            if library is None:
                raise RuntimeError("no C compiler, or not Linux")
            environment |= {"LD_PRELOAD": str(library), LIBRARY: str(library)}
        for name in names:
            command = [sys.executable, "-m", "tests.reliability.saving", what, name]
            command += ["--count", str(count), "--step", str(step)]
            command += ["--writers", str(number), "--saves", str(saves)]
            done = subprocess.run(
                command,
                cwd=Path(__file__).parents[2],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if not done.stdout.strip():
                raise RuntimeError(done.stderr[-3000:])
            yield json.loads(done.stdout.splitlines()[-1])


def _one(what: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    # In memory where that is possible: what is tried does not depend on the disk, only its speed.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        folder = Path(os.path.realpath(made))
        kind = kinds(folder)[name]()
        result: dict[str, Any] = {"what": what, "kind": name, "lost": None}
        try:
            if what == "kills":
                result |= kills(kind, folder, options.count)
            elif what == "faults":
                result |= faults(kind, folder, options.step)
            else:
                result |= writers(kind, folder, options.writers, options.saves)
        except LostError as error:
            result["lost"] = str(error)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Saving under fire.")
    parser.add_argument("what", choices=("kills", "faults", "writers"))
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()
    lost = False
    for name in options.kinds:
        result = _one(options.what, name, options)
        lost |= result["lost"] is not None
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
