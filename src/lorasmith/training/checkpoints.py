"""Checkpoints of a training run: written whole or not at all, checked before they are used.

A checkpoint is a directory ``checkpoint-STEP`` that holds the adapter (a PEFT directory by
itself), the exact values of its tensors, the states of optimiser, scheduler, random numbers
and Trainer, and never the base weights. It is written under another name and renamed when
everything is on disk; ``manifest.json`` lists every file with its size and SHA-256. No file is a
pickle (``training.states``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from lorasmith.errors import TrainingError
from lorasmith.io.atomic import exchange, replace_text
from lorasmith.io.strict import check_inside, parse_object, read_limited, read_object
from lorasmith.redaction import redact_all

__all__ = [
    "MANIFEST",
    "REQUIRED",
    "check_states",
    "choose_checkpoint",
    "defect",
    "list_checkpoints",
    "publish",
    "rng_name",
    "rotate",
    "step_of",
    "write_json",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
ADAPTER_STATE = "adapter_state.safetensors"
BEST_STATE = "best_state.safetensors"
BEST_DYNAMICS = "best_dynamics.safetensors"
OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.safetensors"
SCALER = "scaler.safetensors"
RUN_STATE = "run_state.json"

#: Files without which a run cannot go on where it stopped.
REQUIRED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    ADAPTER_STATE,
    OPTIMIZER,
    SCHEDULER,
    "trainer_state.json",
    RUN_STATE,
)

_NAME = re.compile(r"checkpoint-(\d+)")
#: What is written before it is published, and what writers of either leave when they are killed.
_PARTIAL = re.compile(
    r"\.checkpoint-\d+\.(partial|part-\d+(\.new)?)"
    r"|\.{1,2}checkpoint-\d+(\.partial)?\.([0-9a-f]{8}\.(new|old)|lock)"
)


def rng_name(index: int, processes: int) -> str:
    """The file with the random state of one process of a run."""
    return "rng_state.safetensors" if processes <= 1 else f"rng_state_{index}.safetensors"


def step_of(path: Path) -> int | None:
    """The optimiser step after which a checkpoint was written; None if it is not one by name."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else int(found[1])


def list_checkpoints(output: Path) -> list[Path]:
    """Directories named like checkpoints, newest first, good or not."""
    if not output.is_dir():
        return []
    found = [p for p in output.iterdir() if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0, reverse=True)


def partial_path(output: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return output / f".checkpoint-{step}.partial"


def remove_partial(output: Path) -> None:
    """Removes what runs that were killed while writing have left."""
    if output.is_dir():
        for path in output.iterdir():
            if not _PARTIAL.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def publish(partial: Path, target: Path) -> None:
    """Seals a finished directory with a manifest and gives it its name, durably.

    Args:
        partial: The directory in which everything has been written.
        target: Its final name; what is there is replaced.
    """
    files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST)
    listing = {
        p.relative_to(partial).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)}
        for p in files
    }
    write_json(partial / MANIFEST, {"format": _FORMAT, "files": listing})
    for path in files:
        _sync(path)
    _sync(partial)
    old = None
    if target.exists():
        # Never without either: a process killed here leaves one of the two whole.
        old = exchange(partial, target)
    else:
        os.replace(partial, target)
    try:
        _sync(target.parent)
    except BaseException:
        if old is not None:
            exchange(old, target)
        else:
            os.replace(target, partial)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON durably: readers see the old file or the new one, never a part."""
    text = json.dumps(redact_all(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_text(path, text)


def defect(path: Path, *, processes: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None if a run can go on from it.

    Args:
        path: The checkpoint.
        processes: Number of processes of the run that is to go on.
    """
    if not path.is_dir():
        return "there is no such directory"
    names = [rng_name(i, processes) for i in range(max(1, processes))]
    for name in (*REQUIRED, *names):
        if not (path / name).is_file():
            return f"{name} is missing"
    try:
        manifest = read_object(path / MANIFEST, root=path)
        files = manifest["files"]
        expected = {str(k): (int(v["size"]), str(v["sha256"])) for k, v in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if manifest.get("format") != _FORMAT:
        return f"{MANIFEST} has a format that this version does not know"
    outside = [name for name in expected if not _is_beside(name)]
    if outside:
        return f"{MANIFEST} names a file elsewhere: {outside[0][:100]}"
    for name in (*REQUIRED, *names):
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        if _sha256(file) != digest:
            return f"the content of {name} has changed"
    return None


def _is_beside(name: str) -> bool:
    """Whether a file of a checkpoint can be called that."""
    parts = PurePath(name)
    if parts.is_absolute() or ".." in name or "\0" in name:
        return False
    return len(name) < 1000 and all(len(os.fsencode(part)) <= 255 for part in parts.parts)


#: Bytes of trainer_state.json, which grows with every step that is logged, and values in it.
_STATE_BYTES, _STATE_VALUES = 1 << 28, 20_000_000
#: Files that hold tensors alone, and no state.
_TENSORS = ("adapter_model.safetensors", ADAPTER_STATE, BEST_STATE)
#: Fields of trainer_state.json, and what Trainer takes each for.
_KINDS: dict[str, Any] = {
    "best_global_step": int | None,
    "best_metric": int | float | None,
    "best_model_checkpoint": str | None,
    "is_hyper_param_search": bool | None,
    "is_local_process_zero": bool | None,
    "is_world_process_zero": bool | None,
    "logging_steps": int | float | None,
    "eval_steps": int | float | None,
    "save_steps": int | float | None,
    "num_train_epochs": int | float | None,
    "stateful_callbacks": dict | None,
    "train_batch_size": int,
    "trial_name": str | None,
    "trial_params": dict | None,
}
#: Fields of trainer_state.json that a run goes on from, of which each must be a number.
_COUNTS = ("epoch", "global_step", "max_steps", "num_input_tokens_seen", "total_flos")


def check_states(checkpoint: Path) -> None:
    """Raises an error unless what a run goes on from can be read, before the model is loaded.

    The manifest says that the files are those that it names, and not what they hold.
    """
    from lorasmith.training.states import load_state, load_tensors

    for path in sorted(checkpoint.iterdir()):
        check_inside(path, checkpoint)
        if path.suffix != ".safetensors":
            continue
        if path.name in _TENSORS:
            load_tensors(path)
        else:
            load_state(path)
    file = checkpoint / "trainer_state.json"
    state = _trainer_state(file)
    wrong = next((key for key in _COUNTS if not _is_number(state.get(key, 0))), None)
    entries = state.get("log_history") or []
    if wrong is None and not (
        isinstance(entries, list) and all(isinstance(e, dict) and "step" in e for e in entries)
    ):
        wrong = "log_history"
    if wrong is None:
        wrong = next((k for k, kind in _KINDS.items() if not isinstance(state.get(k), kind)), None)
    step = step_of(checkpoint)
    if wrong is None and step is not None and state.get("global_step") != step:
        wrong = "global_step"
    if wrong is not None:
        raise TrainingError(
            "The state of Trainer in the checkpoint is not one that a run has written.",
            expected=str(step)
            if wrong == "global_step"
            else "numbers, a list of log entries, and what Trainer writes beside them",
            got=repr(state.get(wrong))[:200],
            fix="go on from another checkpoint, or start anew with --overwrite",
            file=file,
            key=wrong,
        )


def _trainer_state(file: Path) -> dict[str, Any]:
    data = read_limited(file, limit=_STATE_BYTES, root=file.parent)
    state = parse_object(data, file, limit=_STATE_BYTES, values=_STATE_VALUES)
    try:
        from transformers import TrainerState
    except ImportError:  # without it nothing can go on from here, but it can be looked at
        return state
    known = {field.name for field in dataclasses.fields(TrainerState)}
    unknown = sorted(state.keys() - known)
    if unknown:
        raise TrainingError(
            "Trainer's state has a field that Trainer does not know.",
            expected="the fields of this version of Transformers",
            got=unknown[0],
            file=file,
            key=unknown[0],
        )
    return state


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def choose_checkpoint(resume: str, output: Path, *, processes: int = 1) -> Path | None:
    """The checkpoint to go on from.

    Args:
        resume: ``"no"``, ``"auto"`` (the newest good one, None if there is no checkpoint at
            all), ``"last"`` (the newest good one) or the path of one.
        output: Directory of the run.
        processes: Number of processes of the run.

    Raises:
        TrainingError: There is none to go on from. A run never starts anew in silence because
            its checkpoints are damaged.
    """
    if resume == "no":
        return None
    if resume not in ("auto", "last"):
        path = Path(resume).expanduser()
        problem = defect(path, processes=processes)
        if problem is None:
            return path.resolve()
        raise _cannot_resume([(path, problem)])
    bad: list[tuple[Path, str]] = []
    for path in list_checkpoints(output):
        problem = defect(path, processes=processes)
        if problem is None:
            for skipped, why in bad:
                logger.warning("Skipping %s: %s.", skipped, why)
            return path.resolve()
        bad.append((path, problem))
    if bad:
        raise _cannot_resume(bad)
    if resume == "auto":
        return None
    raise TrainingError(
        "There is no checkpoint to resume from.",
        expected="a directory checkpoint-STEP",
        fix="leave --resume out to start anew",
        file=output,
    )


def _cannot_resume(bad: Iterable[tuple[Path, str]]) -> TrainingError:
    listed = list(bad)
    return TrainingError(
        "The run cannot go on from its checkpoint."
        if len(listed) == 1
        else "The run cannot go on from any of its checkpoints.",
        expected="a whole checkpoint, with the states of optimiser, scheduler and random numbers",
        got="; ".join(f"{path.name}: {why}" for path, why in listed),
        fix="choose another checkpoint, or start anew with --overwrite",
        file=listed[0][0],
    )


def rotate(output: Path, keep: int) -> None:
    """Removes the oldest checkpoints beyond ``keep``."""
    for path in list_checkpoints(output)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
