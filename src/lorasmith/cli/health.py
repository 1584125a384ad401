"""What ``lorasmith doctor`` looks at: an installation, or an artefact on disk.

Each check gives findings: ``"ok"``, ``"note"`` (worth knowing), ``"warning"`` (will go wrong in
some uses) or ``"error"`` (is wrong now), with what to do about it. Nothing is changed on disk but
for a temporary directory of the self test, and nothing is loaded from the network.

Limits. Files of PEFT alone have no check of their values: what is finite there may still be
damaged. Versions of packages that lorasmith does not ask for are not judged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lorasmith.errors import LorasmithError

__all__ = ["Finding", "kind_of", "of_installation", "of_path"]

Level = Literal["ok", "note", "warning", "error"]

#: Extras that are for the development of lorasmith itself, or are made of others.
_NOT_OFFERED = frozenset({"dev", "docs", "all"})
#: Bytes of disk and of memory below which most work fails.
_LITTLE = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: How bad it is.
        subject: What was looked at.
        text: What was found.
        fix: What to do about it, if anything.
    """

    level: Level
    subject: str
    text: str
    fix: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Field → value."""
        return asdict(self)


def _of_error(error: Exception, subject: str) -> Finding:
    if not isinstance(error, LorasmithError):
        return Finding("error", subject, f"{type(error).__name__}: {error}")
    parts = [error.what]
    if error.key is not None:
        parts.append(f"key {error.key}")
    if error.expected is not None:
        parts.append(f"expected {error.expected}")
    if error.got is not None:
        parts.append(f"got {error.got}")
    if error.file is not None:
        parts.append(f"in {error.file}")
    return Finding("error", subject, "; ".join(parts), error.fix)


# The installation -------------------------------------------------------------------------------


def of_installation() -> Iterator[Finding]:
    """The packages, the machine, the caches, and a small adapter from beginning to end."""
    yield from _packages()
    yield from _machine()
    yield from _caches()
    yield _self_test()


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    from lorasmith import __version__

    yield Finding("ok", "lorasmith", __version__)
    try:
        wanted = [Requirement(line) for line in requires("lorasmith") or ()]
    except PackageNotFoundError:
        yield Finding(
            "warning",
            "packages",
            "lorasmith is not installed as a package, so that it is not known what it needs",
            "pip install lorasmith",
        )
        return
    extras: dict[str, list[str]] = {}
    seen = set()
    for need in wanted:
        extra = _extra_of(need)
        if extra in _NOT_OFFERED or (extra is None and not _applies(need)):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            if extra is None:
                yield Finding(
                    "error", need.name, f"missing, {need.specifier} is needed", _pip(str(need))
                )
            elif need.name != "lorasmith":
                extras.setdefault(extra, []).append(need.name)
            continue
        if extra is not None:
            extras.setdefault(extra, [])
        if need.name in seen or need.name == "lorasmith":
            continue
        seen.add(need.name)
        if need.specifier.contains(found, prereleases=True):
            yield Finding("ok", need.name, found)
        else:
            yield Finding(
                "error" if extra is None else "warning",
                need.name,
                f"{found}, which is not in the supported range {need.specifier}",
                _pip(f"{need.name}{need.specifier}"),
            )
    with contextlib.suppress(PackageNotFoundError):
        yield Finding("ok", "peft", f"{version('peft')} (not needed; its adapters are read)")
    for extra, missing in extras.items():
        if missing:
            yield Finding(
                "note",
                f"extra {extra}",
                f"not installed: {', '.join(missing)}",
                f'pip install "lorasmith[{extra}]"',
            )
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def _pip(what: str) -> str:
    return f'pip install "{what}"'


def _extra_of(need: Any) -> str | None:
    """The extra that asks for it."""
    text = str(need.marker or "")
    _, found, rest = text.partition("extra == ")
    return rest.strip("\"' )").split('"')[0].split("'")[0] if found else None


def _applies(need: Any) -> bool:
    return need.marker is None or bool(need.marker.evaluate({"extra": ""}))


def _machine() -> Iterator[Finding]:
    import platform

    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            "error", "torch", f"cannot be imported: {error}", "install it anew: pytorch.org"
        )
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            text = f"{name}, {_size(free)} of {_size(total)} free"
            yield Finding("ok", f"cuda:{number}", text)
    elif torch.version.cuda is not None:
        yield Finding(
            "note",
            "cuda",
            f"torch is built for CUDA {torch.version.cuda}, but sees no GPU: the CPU is used",
            "nvidia-smi says whether the driver works; CUDA_VISIBLE_DEVICES may hide it",
        )
    else:
        yield Finding("ok", "cuda", "torch is built for the CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if cores is not None and threads > cores:
        yield Finding(
            "warning",
            "threads",
            f"{threads} threads on {cores} usable processors",
            f"OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("ok", "threads", f"{threads} on {cores} usable processors")
    free_memory = _free_memory()
    if free_memory is not None:
        yield _enough("memory", free_memory, "close other programs, or use a smaller model")
    space = shutil.disk_usage(Path.cwd()).free
    yield _enough("disk", space, "make room where adapters and checkpoints are to be written")


def _enough(subject: str, free: int, fix: str) -> Finding:
    text = f"{_size(free)} free"
    return Finding("ok", subject, text) if free >= _LITTLE else Finding(
        "warning", subject, text, fix
    )  # fmt: skip


def _free_memory() -> int | None:
    try:
        import psutil
    except ImportError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    return int(psutil.virtual_memory().available)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _caches() -> Iterator[Finding]:
    from lorasmith.io.models import cache_dir

    yield _writable("cache", cache_dir(), "LORASMITH_CACHE=… names another place")
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        yield Finding("note", "hub", "huggingface_hub is not installed: names of the hub cannot be "
                      "resolved", 'pip install "lorasmith[train]"')  # fmt: skip
        return
    yield _writable("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME=… names another place")
    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "note",
            "hub",
            "offline: only what is in the cache is found",
            "unset HF_HUB_OFFLINE to download",
        )
    else:
        yield Finding("ok", "hub", "online, if there is a connection (not tried)")
    # Whether there is one, and nothing of what it is.
    yield Finding("ok", "HF_TOKEN", "present" if get_token() else "absent")


def _writable(subject: str, folder: Path, fix: str) -> Finding:
    """Whether files can be made in a directory, or it itself if it is not there yet."""
    near = folder
    while not near.exists() and near != near.parent:
        near = near.parent
    try:
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        return Finding("warning", subject, f"{folder} cannot be written to: {error.strerror}", fix)
    free = shutil.disk_usage(near).free
    return Finding("ok", subject, f"{folder} can be written to, {_size(free)} free")


def _self_test() -> Finding:
    """Attach, two steps, save, load and compare, on a model of two layers."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _tried(Path(folder))
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the installation
        found = _of_error(error, "self test")
        return Finding("error", found.subject, found.text, found.fix or "see lorasmith --debug")


def _tried(folder: Path) -> Finding:
    import copy

    import torch

    import lorasmith as ls

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
        base = copy.deepcopy(model)
        inputs, wanted = torch.randn(8, 6), torch.randn(8, 4)
        adapter = ls.attach(model, ls.LoRAConfig(r=2, targets=["0", "2"]))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            loss = (model(inputs) - wanted).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ls.save(model, folder / "adapter")
            ls.load(base, folder / "adapter")
        with torch.no_grad():
            difference = float((model(inputs) - base(inputs)).abs().max())
    if not losses[-1] < losses[0]:
        return Finding(
            "error", "self test", f"training does not lower the loss ({losses})", "reinstall torch"
        )
    if difference > 1e-6:
        return Finding(
            "error",
            "self test",
            f"a saved adapter gives other outputs when it is loaded (by {difference:.2g})",
            "reinstall torch and safetensors",
        )
    return Finding("ok", "self test", "attached, trained, saved, loaded: the outputs are the same")


# What is on disk --------------------------------------------------------------------------------


def kind_of(path: Path) -> str | None:
    """What a path holds, by the names of its files.

    Returns:
        ``"fleet"``, ``"router"``, ``"checkpoint"``, ``"run"``, ``"adapter"``, ``"model"``,
        ``"GGUF file"``, ``"GGUF export"``, ``"adapters"``, ``"interrupted"``, or ``None``.
    """
    from lorasmith.io.atomic import leftovers

    if path.is_file():
        return "GGUF file" if path.suffix == ".gguf" else None
    if not path.is_dir():
        return "interrupted" if leftovers(path) else None

    def has(*names: str) -> bool:
        return any((path / name).is_file() for name in names)

    if has("subspace.json"):
        return "fleet"
    if has("router.json"):
        return "router"
    if path.name.startswith("checkpoint-") and path.name[11:].isdigit():
        return "checkpoint"
    if has("run_state.json", "trainer_state.json"):
        return "checkpoint"
    if (
        has("training.json")
        or any(path.glob("checkpoint-*"))
        or any(path.glob(".checkpoint-*.partial"))
    ):
        return "run"
    if has("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        return "adapter"
    if has("config.json", "model.safetensors", "model.safetensors.index.json"):
        return "model"
    if any(path.glob("*.gguf")):
        return "GGUF export"
    if any(path.glob("*/adapter_config.json")):
        return "adapters"
    return "interrupted" if leftovers(path) else None


def of_path(
    path: Path, *, model: str | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Finding]:
    """What is wrong with an artefact; at least one finding.

    Args:
        path: A directory or file.
        model: The base model that an adapter is to fit: alias, directory, hub id.
        progress: Called with (phase, done, total).
    """
    kind = kind_of(path)
    if kind is None:
        there = sorted(e.name for e in path.iterdir())[:8] if path.is_dir() else None
        yield Finding(
            "error",
            "kind",
            "there is nothing under that path"
            if not path.exists()
            else f"nothing that lorasmith knows: {', '.join(there or []) or 'no files'}",
            "an adapter has adapter_config.json, a fleet subspace.json, a router router.json, a "
            "run training.json, a model config.json",
        )
        return
    yield Finding("ok", "kind", kind)
    yield from _unfinished(path, kind)
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "fleet": lambda: _fleet(path),
        "router": lambda: _router(path),
        "checkpoint": lambda: _checkpoint(path, model),
        "run": lambda: _run(path, model),
        "adapter": lambda: _adapter(path, model),
        "model": lambda: _model(path, progress),
        "GGUF file": lambda: _gguf(path),
        "GGUF export": lambda: (f for file in sorted(path.glob("*.gguf")) for f in _gguf(file)),
        "adapters": lambda: _adapters(path, model, progress),
    }
    if kind in checks:
        yield from checks[kind]()


def _unfinished(path: Path, kind: str) -> Iterator[Finding]:
    from lorasmith.io.atomic import interrupted, leftovers

    if interrupted(path):
        yield Finding(
            "error",
            "unfinished",
            "a writer died between its two renames; the old generation lies beside the path",
            "read or save it with lorasmith once, which puts it back",
        )
        return
    left = leftovers(path)
    if left:
        yield Finding(
            "error" if kind == "interrupted" else "warning",
            "unfinished",
            f"a writer died, or is writing now: {', '.join(e.name for e in left[:4])}",
            "the next save to this path clears it up",
        )


def _adapter(path: Path, model: str | None = None, subject: str = "adapter") -> Iterator[Finding]:
    from lorasmith.io import read_adapter
    from lorasmith.io.weights import OWN, check_finite

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            weights = read_adapter(path)
            for key in weights.tensors:
                check_finite(weights.tensors[key], key, weights.path)
    except (LorasmithError, OSError) as error:
        yield _of_error(error, subject)
        return
    for one in said:
        yield Finding("warning", subject, " ".join(str(one.message).split()))
    yield Finding(
        "ok",
        subject,
        f"{weights.variant.name} on {len(weights.modules)} layers, "
        f"{weights.num_parameters:,} parameters, all of them finite; base {weights.base.name}",
    )
    if weights.unsupported is not None:
        yield Finding(
            "warning", subject, f"lorasmith.load refuses it: {weights.unsupported}",
            "load it with PEFT",
        )  # fmt: skip
    if weights.unexpected:
        yield Finding(
            "error",
            subject,
            f"tensors that nothing explains: {', '.join(weights.unexpected[:3])}",
            "save or download it again; lorasmith.load refuses it",
        )
    if not ((weights.path or path) / OWN).is_file():
        yield Finding(
            "note",
            subject,
            f"without {OWN} (PEFT's directories have none): neither damaged values nor another "
            "base of the same name would be noticed",
            "load it on its base and save it with lorasmith",
        )
    if _untrained(weights):
        yield Finding("warning", subject, "it changes nothing: all B are zero", "train it")
    yield from _base(weights, model)
    yield from _elsewhere(weights)


def _untrained(weights: Any) -> bool:
    try:
        held = weights.factors
        return bool(weights.modules) and all(
            m in held and not bool(held[m].B.any()) for m in weights.modules
        )
    except LorasmithError:
        return False


def _base(weights: Any, model: str | None) -> Iterator[Finding]:
    if model is None:
        if weights.base.name is None:
            yield Finding(
                "note", "base", "the adapter does not say what it was made for",
                "--model MODEL checks whether it fits one",
            )  # fmt: skip
        return
    from lorasmith.io.sources import open_sides

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            open_sides(model, weights, allow_base_mismatch=False)
    except (LorasmithError, OSError) as error:
        yield _of_error(error, "base")
        return
    for one in said:
        yield Finding("warning", "base", " ".join(str(one.message).split()))
    if weights.base.fingerprint is None:
        yield Finding("note", "base", f"{model}: sizes fit; no fingerprint to compare values with")
    else:
        yield Finding("ok", "base", f"{model}: the one it was made for, by its fingerprint")


def _elsewhere(weights: Any) -> Iterator[Finding]:
    """What other programs make of it."""
    from lorasmith.export.plain import refuse
    from lorasmith.export.servers import SERVERS, max_lora_rank

    if weights.frozen:
        yield Finding(
            "note",
            "elsewhere",
            "its initialisation moved a part of W into the adapter; the file holds the difference, "
            "at twice the rank",
        )
    elif str(weights.peft.get("init_lora_weights", "")).lower().split("_")[0] in _MOVING:
        yield Finding(
            "warning",
            "elsewhere",
            f"PEFT's {weights.peft['init_lora_weights']} changed the base weights before training: "
            "on the plain base the adapter acts otherwise",
            "save it from PEFT with path_initial_model_for_weight_conversion",
        )
    try:
        refuse(weights, "vLLM, TGI, SGLang and llama.cpp")
        if weights.variant.name != "lora":
            yield Finding(
                "note",
                "elsewhere",
                f"servers and llama.cpp take plain LoRA, and this is {weights.variant.name}",
                "lorasmith export ADAPTER --to vllm --rank R (the error is reported)",
            )
            return
        ranks = {weights.config.rank_of(m) for m in weights.modules}
        limit = max_lora_rank(SERVERS["vllm"], max(ranks))
    except LorasmithError as error:
        yield Finding("note", "elsewhere", error.what, error.fix)
        return
    yield Finding("ok", "elsewhere", f"plain LoRA; vLLM needs --max-lora-rank {limit} or more")
    if len(ranks) > 1:
        yield Finding(
            "note", "elsewhere", "most servers do not read rank patterns",
            "lorasmith export ADAPTER --to vllm",
        )  # fmt: skip


_MOVING = ("pissa", "olora", "corda", "loftq", "lora-ga")


def _adapters(
    path: Path, model: str | None, progress: Callable[[str, int, int], None] | None
) -> Iterator[Finding]:
    found = sorted(e.parent for e in path.glob("*/adapter_config.json"))
    for done, folder in enumerate(found):
        yield from _adapter(folder, model, folder.name)
        if progress is not None:
            progress("adapters", done + 1, len(found))


def _fleet(path: Path) -> Iterator[Finding]:
    from lorasmith.fleet.store import load, validate

    problems = validate(path)
    for problem in problems:
        yield Finding(
            "error", "fleet", " ".join(problem.split()),
            "copy the directory again, or compress the adapters anew",
        )  # fmt: skip
    if not problems:
        fleet = load(path)
        yield Finding(
            "ok",
            "fleet",
            f"{len(fleet.ids)} adapters on {len(fleet.modules)} layers, hashes and values right",
        )


def _router(path: Path) -> Iterator[Finding]:
    from lorasmith.fleet.router import check

    try:
        classes = check(path)
    except (LorasmithError, OSError) as error:
        yield _of_error(error, "router")
        return
    names = ", ".join("others" if c is None else c for c in classes[:6])
    yield Finding("ok", "router", f"{len(classes)} classes: {names}")


def _checkpoint(path: Path, model: str | None = None) -> Iterator[Finding]:
    from lorasmith.training.checkpoints import check_states, defect

    problem = defect(path)
    if problem is not None:
        yield Finding("error", path.name, problem, "go on from another one: --resume last finds it")
        yield from _finite(path, "adapter_state.safetensors", path.name)
    else:
        yield Finding("ok", path.name, "every file is the one that its manifest names")
        try:
            check_states(path)
        except (LorasmithError, OSError) as error:
            yield _of_error(error, path.name)
    if (path / "adapter_config.json").is_file():
        yield from _adapter(path, model, f"{path.name}, adapter")


def _finite(path: Path, name: str, subject: str) -> Iterator[Finding]:
    from lorasmith.io.tensors import FileTensors
    from lorasmith.io.weights import check_finite

    if not (path / name).is_file():
        return
    try:
        tensors = FileTensors(path / name)
        for key in tensors:
            check_finite(tensors[key], key, path / name)
    except (LorasmithError, OSError) as error:
        yield _of_error(error, subject)


def _run(path: Path, model: str | None) -> Iterator[Finding]:
    from lorasmith.training.checkpoints import list_checkpoints

    checkpoints = list_checkpoints(path)
    for folder in checkpoints:
        yield from _checkpoint(folder)
    partial = sorted(e.name for e in path.glob(".checkpoint-*.partial"))
    if partial:
        yield Finding(
            "warning",
            "unfinished",
            f"a checkpoint was not written to its end: {', '.join(partial)}",
            "the next start of the run removes it",
        )
    if (path / "last-finite").is_dir():
        yield Finding(
            "warning",
            "run",
            "the loss became NaN or infinite; last-finite holds the adapter of before",
            "go on with a lower learning rate",
        )
    if (path / "training.json").is_file():
        yield from _json(path / "training.json", "run")
    else:
        yield Finding(
            "note",
            "run",
            "it has not come to its end (no training.json)",
            "--resume last" if checkpoints else "start it anew",
        )
    if (path / "adapter_config.json").is_file():
        yield from _adapter(path, model)
    elif not checkpoints:
        yield Finding("error", "run", "neither an adapter nor a checkpoint", "start it anew")
    for folder in sorted(path.glob("task-*")):
        if (folder / "adapter_config.json").is_file():
            yield from _adapter(folder, model, folder.name)


def _json(file: Path, subject: str) -> Iterator[Finding]:
    from lorasmith.io.strict import read_object

    try:
        read_object(file, root=file.parent)
    except (LorasmithError, OSError) as error:
        yield _of_error(error, subject)


def _model(path: Path, progress: Callable[[str, int, int], None] | None) -> Iterator[Finding]:
    from lorasmith.io.tensors import FileTensors
    from lorasmith.io.weights import check_finite

    broken = False
    if not (path / "config.json").is_file():
        broken = True
        yield Finding("error", "model", "config.json is missing", "copy the model again")
    else:
        for finding in _json(path / "config.json", "model"):
            broken = True
            yield finding
    files = {f.name: f for f in sorted(path.glob("*.safetensors"))}
    index, placed = path / "model.safetensors.index.json", {}
    if index.is_file():
        try:
            placed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken = True
            yield Finding("error", index.name, f"cannot be read: {error!r}", "copy it again")
    for name in sorted(set(placed.values()) - set(files)):
        broken = True
        yield Finding("error", name, "missing, and the index names it", "copy the model again")
    if not files:
        broken = True
        pickled = any(path.glob("*.bin"))
        yield Finding(
            "error",
            "model",
            "its weights are pickle files, which are not read" if pickled else "it has no weights",
            "save it with save_pretrained" if pickled else "copy the model again",
        )
    count = 0
    for done, (name, file) in enumerate(files.items()):
        try:
            tensors = FileTensors(file)
            for key in tensors:
                count += 1
                value = tensors[key]
                if value.is_floating_point():
                    check_finite(value, key, file)
            lost = [k for k, f in placed.items() if f == name and k not in tensors]
        except (LorasmithError, OSError) as error:
            broken = True
            yield _of_error(error, name)
            continue
        if lost:
            broken = True
            yield Finding("error", name, f"without {lost[0]}, which the index puts there",
                          "copy the model again")  # fmt: skip
        if progress is not None:
            progress("weights", done + 1, len(files))
    if not broken:
        yield Finding("ok", "model", f"{count} tensors in {len(files)} files, all of them finite")


def _gguf(file: Path) -> Iterator[Finding]:
    from lorasmith.io.gguf_header import check_header

    try:
        check_header(file)
    except (LorasmithError, OSError) as error:
        yield _of_error(error, file.name)
        return
    yield Finding("ok", file.name, "header and sizes are right")
