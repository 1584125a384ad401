"""Runs the hostile corpus through every reader, watched, in a process of its own.

    python -m tests.reliability.guarded OUTPUT.jsonl [PART …]

A line of JSON for each case and reader: what was raised, with its fields; seconds; the rise of
the peak of resident memory; whether model, other adapters and files are as they were; and what
``sys.addaudithook`` has seen: processes, pickle, connections, imports of what no healthy
artefact needs. Healthy artefacts go through every reader first, so that whatever a reader
imports is there; each case runs in this one process, and a crash leaves the lines so far.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", MPLBACKEND="Agg", COLUMNS="200", TOKENIZERS_PARALLELISM="false"
)

import torch

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.errors import LorasmithError
from tests.io import support
from tests.reliability import corpus, corpus_models
from tests.reliability.corpus import Hostile
from tests.reliability.memory import peak
from tests.training import tiny

#: Events of processes, of code from data, and of connections.
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "pickle.find_class",
    "marshal.load",
    "marshal.loads",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "ctypes.dlopen",
    "shutil.unpack_archive",
    "webbrowser.open",
)


class Watch:
    """Notes what happens while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        # An import of what is not loaded yet; ``arguments[1]`` is the file, if already found.
        if event in FORBIDDEN or (event == "import" and arguments[0] not in sys.modules):
            self.seen.append(f"{event}: {arguments[0]!r}"[:200])


#: Readers that every case goes through; the others only see ``corpus.EVERYWHERE``.
QUICK = ("read", "load", "fleet", "add", "check", "resume", "fuse", "compare")
WATCH: Watch


class Cli:
    """One call of the command line in this process."""

    def __init__(self, *arguments: str | Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.code = main([*map(str, arguments), "--json"])
        self.out, self.err = out.getvalue(), err.getvalue()

    def result(self) -> dict[str, Any]:
        """What was raised, as the other readers give it."""
        if self.code == 0:
            return {"raised": None}
        try:
            (line,) = self.out.splitlines()
            found = json.loads(line)["error"]
        except (ValueError, KeyError) as error:
            return {"raised": "NoJson", "message": f"{error!r} {self.out[:200]} {self.err[-300:]}"}
        kind = getattr(ls.errors, str(found["type"]), None) if hasattr(ls, "errors") else None
        import lorasmith.errors as errors

        kind = getattr(errors, str(found["type"]), None)
        ours = isinstance(kind, type) and issubclass(kind, LorasmithError)
        return {
            "raised": found["type"],
            "kinds": [c.__name__ for c in kind.__mro__] if ours else [],
            "message": found["message"],
            "code": self.code,
            **{k: found.get(k) for k in ("file", "key", "expected", "got", "fix")},
        }


def attempt(call: Callable[[], object]) -> dict[str, Any]:
    """What a call raised."""
    try:
        found = call()
    except BaseException as error:  # noqa: BLE001 - what it is, is the result
        ours = isinstance(error, LorasmithError)
        return {
            "raised": type(error).__name__,
            "kinds": [c.__name__ for c in type(error).__mro__] if ours else [],
            "message": str(error)[:600],
            **{k: getattr(error, k, None) for k in ("file", "key", "expected", "got", "fix")},
        }
    return found.result() if isinstance(found, Cli) else {"raised": None}


def everything(weights: Any) -> None:
    """Reads all there is in an adapter."""
    for module in weights.modules:
        weights.state(module)
    for key in weights.extras:
        weights.extras[key]
    dict(weights.factors)


def state_of(model: torch.nn.Module) -> str:
    """A hash of every value of a model, of the names, the flags and the hooks."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.requires_grad}".encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {module.training} {len(module._forward_hooks)}".encode())
    digest.update(repr(sorted(ls.attached(model))).encode())
    return digest.hexdigest()


def files_of(folder: Path) -> str:
    """A hash of the names and contents of all files below a directory."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode())
        if path.is_file() and path.stat().st_size < 2**22:
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Bench:
    """Healthy artefacts, and the readers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        model = support.llama()
        self.good = support.foreign(support.saved(root / "good"))
        self.healthy = support.foreign(support.saved(root / "healthy"))
        self.ours = support.saved(root / "ours")
        model.save_pretrained(root / "base")
        self.base = root / "base"
        self.model = support.llama()
        support.attached(self.model, ls.LoRAConfig(r=2), "other")
        ls.SharedSubspace.from_adapters([self.good, self.healthy]).save(root / "fleet")
        self.fleet = root / "fleet"
        (root / "gguf").mkdir()
        from tests.io.ggufs import write_gguf

        write_gguf(model, root / "gguf" / corpus.GGUF, "llama")
        self.gguf = root / "gguf"
        self.tokenizer = tiny.make_tokenizer()
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tiny = tiny.make_model(self.tokenizer)
        support.attached(self.tiny, ls.LoRAConfig(r=2), "other")
        #: What no reader may change.
        self.models = (self.model, self.tiny)
        router = ls.TaskRouter(self.tiny, self.tokenizer)
        router.fit({"one": ["Count to 1."] * 4, "two": ["What is a cat?"] * 4})
        self.router = router.save(root / "router")
        self.rows = tiny.write_rows(root / "rows.jsonl")
        self.run = root / "run"
        self._train(self.run, resume="no")
        # As if it had been killed in its last step.
        for path in self.run.iterdir():
            if path.name != corpus_models.STEP and path.is_file():
                path.unlink()

    def _train(self, output: Path, **changes: Any) -> object:
        """A run on the model in memory, which has no more adapters afterwards than before."""
        from lorasmith.training.config import AdapterOptions, TrainConfig
        from lorasmith.training.run import train

        settings: dict[str, Any] = {
            "output": output,
            "adapter": AdapterOptions(r=2),
            "batch_size": 4,
            "steps": 3,
            "save_steps": 2,
            "device": "cpu",
            "dynamics": ("entropy",),
        }
        made = TrainConfig("tiny", str(self.rows), **{**settings, **changes})
        result = train(made, model=self.tiny, tokenizer=self.tokenizer, progress=False)
        ls.detach(self.tiny, "default")
        ls.use(self.tiny, "other")
        return result

    def adapter(self, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
        """The readers of an adapter."""
        out = self.root / "out"
        yield "read", lambda: everything(ls.read_adapter(path))
        yield "load", lambda: ls.load(self.model, path)
        yield "fleet", lambda: ls.SharedSubspace.from_adapters([self.good, path])
        yield "add", lambda: ls.SharedSubspace.load(self.fleet).add(path, "new")
        yield "info", lambda: Cli("info", path)
        yield "merge", lambda: Cli("merge", self.good, path, "-o", out)
        shutil.copytree(self.fleet, out, dirs_exist_ok=True)
        yield "fleet add", lambda: Cli("fleet", "add", out, path, "--id", "new")
        yield "compress", lambda: Cli("fleet", "compress", self.good, path, "-o", out)
        yield "diagnose", lambda: Cli("diagnose", self.base, path)

    def subspace(self, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
        """The readers of a shared subspace."""
        yield "load", lambda: ls.SharedSubspace.load(path)
        yield "extract", lambda: Cli("fleet", "export", path, "good", "-o", self.root / "out")

    def header(self, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
        """The readers of a GGUF file."""
        from lorasmith.io.gguf import GgufModel
        from lorasmith.io.models import resolve_model

        file = path / corpus.GGUF
        yield "read", lambda: GgufModel(resolve_model(file))
        yield "info", lambda: Cli("info", file)
        yield "diagnose", lambda: Cli("diagnose", file, self.good)
        yield "fuse", lambda: ls.fuse_checkpoint(file, self.good, self.root / "out", verify=False)

    def routed(self, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
        """The readers of a router."""
        from lorasmith.fleet.router import check

        yield "load", lambda: ls.TaskRouter.load(path, self.tiny, self.tokenizer)
        yield "check", lambda: check(path)

    def resumed(self, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
        """The readers of a checkpoint."""
        step, out = path / corpus_models.STEP, self.root / "out"
        yield "resume", lambda: self._train(out, resume=str(step))

    def model_files(self, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
        """The readers of a base model."""
        out = self.root / "out"
        yield "fuse", lambda: ls.fuse_checkpoint(path, self.good, out, verify=False)
        yield "compare", lambda: ls.diagnose(path, self.good)
        yield "diagnose", lambda: Cli("diagnose", path, self.good)
        yield "fuse by command", lambda: Cli("fuse", path, self.good, "-o", out)


def parts(
    bench: Bench,
) -> dict[str, tuple[Path, dict[str, Hostile], Any, Callable[[Path], object]]]:
    """Part → healthy directory, entries, readers, and what is done after spoiling."""

    def vouch(folder: Path) -> None:
        own = folder / corpus.OWN
        record = json.loads(own.read_text())
        for name in record["manifest"]:
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            record["manifest"][name] = {"sha256": digest, "size": len(data)}
        own.write_text(json.dumps(record))

    ours = {k: v for k, v in corpus.ADAPTERS.items() if v.ours}
    nothing: Callable[[Path], object] = lambda folder: None  # noqa: E731
    return {
        "adapter": (bench.healthy, corpus.ADAPTERS, bench.adapter, nothing),
        "ours": (bench.ours, ours, lambda p: list(bench.adapter(p))[:3], vouch),
        "record": (bench.ours, corpus.RECORDS, lambda p: list(bench.adapter(p))[:3], nothing),
        "fleet": (bench.fleet, corpus.FLEETS, bench.subspace, nothing),
        "gguf": (bench.gguf, corpus.GGUFS, bench.header, nothing),
        "router": (bench.router, corpus_models.ROUTERS, bench.routed, nothing),
        "checkpoint": (bench.run, corpus_models.CHECKPOINTS, bench.resumed, nothing),
        "base": (bench.base, corpus_models.BASES, bench.model_files, nothing),
    }


def run(output: Path, wanted: list[str]) -> None:
    """Everything, one line a time."""
    global WATCH
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place, output.open("w") as stream:
        root = Path(place)
        bench = Bench(root)
        WATCH = Watch()

        def note(**values: Any) -> None:
            stream.write(json.dumps(values) + "\n")
            stream.flush()

        chosen = {k: v for k, v in parts(bench).items() if not wanted or k in wanted}
        for part, (source, _, readers, _) in chosen.items():
            for reader, call in readers(source):
                found = attempt(call)
                note(part=part, case="", reader=reader, **found)
                shutil.rmtree(root / "out", ignore_errors=True)
                if "default" in ls.attached(bench.model):
                    ls.detach(bench.model, "default")
        # What is there stays: a collection before each case takes a third of a second otherwise.
        gc.collect()
        gc.freeze()
        for part, (source, entries, readers, after) in chosen.items():
            for case, entry in entries.items():
                folder = root / "case" / "a"
                shutil.rmtree(folder.parent, ignore_errors=True)
                folder.parent.mkdir()
                shutil.copytree(source, folder)
                entry.spoil(folder)
                after(folder)
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                for reader, call in readers(folder):
                    if reader not in QUICK and case not in corpus.EVERYWHERE:
                        continue
                    before = [*map(state_of, bench.models), files_of(root)]
                    gc.collect()
                    rise, measured = peak()
                    WATCH.seen.clear()
                    started = time.perf_counter()
                    used = time.process_time()
                    WATCH.on = True
                    found = attempt(call)
                    WATCH.on = False
                    note(
                        part=part,
                        case=case,
                        reader=reader,
                        seconds=time.perf_counter() - started,
                        cpu=time.process_time() - used,
                        memory=rise() if measured else None,
                        size=size,
                        unchanged=found["raised"] is None
                        or before == [*map(state_of, bench.models), files_of(root)],
                        seen=list(WATCH.seen),
                        **found,
                    )
                    shutil.rmtree(root / "out", ignore_errors=True)
                    if "default" in ls.attached(bench.model):
                        ls.detach(bench.model, "default")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
