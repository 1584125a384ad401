"""The directory of a run: made ready, and whether the run will be able to write into it.

An earlier run there is not destroyed unasked, and a run that fails at once leaves nothing empty.

Two things are tried, not asked: a small file in the directory, and one beside it, since an
adapter is written to a sibling directory that then takes the place of the old one
(``lorasmith.io.atomic``).
Free space is compared with an estimate; quotas show only where the trial write hits them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import ConfigError, TrainingError
from lorasmith.io import space
from lorasmith.training import checkpoints
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    from lorasmith.core.adapter import Adapter

__all__ = [
    "LAST_FINITE",
    "RESULT",
    "TASK_FOLDER",
    "bytes_needed",
    "check_room",
    "check_space",
    "check_writable",
    "is_main",
    "make_output",
    "nothing_empty_left",
    "only_run",
    "prepare_output",
]

#: The course of the run, the adapter before a number that was not finite, and the adapters that
#: tasks have of their own.
RESULT = "training.json"
LAST_FINITE = "last-finite"
TASK_FOLDER = "task-"

_PROBE = 1 << 16
#: For configurations, training.json and the like, in bytes.
_SMALL = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_main() -> bool:
    """Whether this process is the one of several that writes."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def nothing_empty_left(output: Path) -> Iterator[None]:
    """On failure, takes away the directories that were made for a run and hold nothing."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if is_main():
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                for path in made:
                    path.rmdir()
        raise


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Holds a directory for one run: two would mix their checkpoints.

    The lock ends with the process, however that ends.

    Args:
        output: A directory that exists.

    Raises:
        TrainingError: Another run has it.
    """
    from filelock import FileLock, Timeout

    if not is_main():
        yield
        return
    place = Path(os.path.realpath(output))
    file = place.with_name(f".{place.name}.run.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(
            "Another run is writing into the output.",
            expected="one run at a time in a directory",
            got=f"{file.name} is held by a process that is alive",
            fix="wait for it, stop it, or choose another output",
            file=output,
            key="output",
        ) from error
    try:
        yield
    finally:
        if os.name != "nt":  # a file that is open cannot be removed there
            file.unlink(missing_ok=True)  # nobody waits for it
        lock.release()


def make_output(output: Path) -> None:
    """Makes the directory of a run, and tries whether it can be written."""
    if output.exists() and not output.is_dir():
        raise ConfigError(
            "The output is a file.",
            expected="a directory, or a name that is free",
            got="a file",
            fix="choose another output, or move the file away",
            file=output,
            key="output",
        )
    if not is_main():
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "The output cannot be written.",
            expected="a directory that can be made and written",
            got=error.strerror or error,
            fix="check the path and its permissions, or choose another output",
            file=output,
            key="output",
        ) from error
    check_writable(output)


def prepare_output(config: TrainConfig, checkpoint: Path | None) -> None:
    """Makes room for the run, or refuses to if there is something that it would destroy."""
    if not is_main():
        return
    output = config.output
    checkpoints.remove_partial(output)
    if checkpoint is None:
        old = [*checkpoints.list_checkpoints(output)]
        results = (output / name for name in ("adapter_config.json", RESULT, LAST_FINITE))
        old += [path for path in results if path.exists()]
        old += [p.parent for p in output.glob(f"{TASK_FOLDER}*/adapter_config.json")]
        if old and not config.overwrite:
            raise TrainingError(
                "The output directory holds an earlier run.",
                expected="a new or empty directory",
                got=", ".join(sorted(p.name for p in old)),
                fix="choose another one, go on with --resume last, or give --overwrite",
                file=output,
            )
        for path in old:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name == RESULT:
                path.unlink()  # the adapter itself is replaced only by the new one


def check_room(config: TrainConfig, adapter: Adapter) -> None:
    """Raises a TrainingError if the checkpoints will not fit."""
    size = sum(value.numel() * value.element_size() for value in adapter.state_dict().values())
    kept = 0 if config.save_steps is None else config.save_total_limit
    if config.steps is not None and config.save_steps is not None:
        kept = min(kept, config.steps // config.save_steps)
    needed = bytes_needed(size, checkpoints=kept, keeps_best=config.early_stopping is not None)
    there = [f for path in checkpoints.list_checkpoints(config.output) for f in path.iterdir()]
    check_space(config.output, needed - sum(file.stat().st_size for file in there))


def check_writable(output: Path) -> None:
    """Tries to write into a directory and beside it.

    Args:
        output: A directory that exists.

    Raises:
        ConfigError: It cannot be written, or its name cannot pass to another directory.
    """
    output = output.resolve()
    if os.path.ismount(output):
        raise ConfigError(
            "The output is a mount point, whose content cannot be replaced as a whole.",
            expected="a directory in it",
            got=output,
            fix=f"give {output / 'run'}",
            file=output,
            key="output",
        )
    for folder in (output, output.parent):
        error = _trial(folder)
        if error is None:
            continue
        full = error.errno in _FULL
        raise ConfigError(
            "The output cannot be written: there is no room left."
            if full
            else "The output cannot be written.",
            expected="a directory that can be written, as well as the one above it",
            got=f"{folder}: {error.strerror or error}",
            fix="make room, or choose another output"
            if full
            else "change its permissions, or choose another output",
            file=output,
            key="output",
        ) from error


def _trial(folder: Path) -> OSError | None:
    """What is in the way of writing a file into a directory."""
    try:
        _try(folder)
    except OSError as error:
        return error
    return None


def _try(folder: Path) -> None:
    """Writes a file to the disk and takes it away."""
    descriptor, name = tempfile.mkstemp(prefix=".lorasmith-", suffix=".probe", dir=folder)
    try:
        try:
            os.write(descriptor, bytes(_PROBE))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def bytes_needed(adapter: int, *, checkpoints: int, keeps_best: bool = False) -> int:
    """Most bytes that a run occupies at a time.

    A checkpoint holds the adapter twice (as PEFT has it, and exactly), two moments of AdamW, and
    with early stopping the best adapter. One more than are kept exists while it is written, and
    the adapter itself is written beside its predecessor.

    Args:
        adapter: Bytes of the trained tensors.
        checkpoints: How many are kept.
        keeps_best: Whether there is early stopping.
    """
    return (checkpoints + 1) * ((4 + keeps_best) * adapter + _SMALL) + 2 * adapter + _SMALL


def check_space(output: Path, needed: int) -> None:
    """Compares the free space of a file system with what a run will write.

    Args:
        output: A directory that exists.
        needed: Bytes, see :func:`bytes_needed`.

    Raises:
        TrainingError: There is less.
    """
    space.check_space(
        output,
        needed,
        TrainingError,
        "There is too little room for the run's checkpoints and its adapter.",
        fix="make room, choose another output, or keep fewer checkpoints "
        "(--save-total-limit 1, --adapter.r with a smaller rank)",
    )
