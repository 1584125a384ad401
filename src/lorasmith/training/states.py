"""States of optimisers, schedules and random numbers in files without a pickle.

``torch.save`` writes a pickle, which whoever reads it must trust or restrict. A state here is a
safetensors file: its tensors under running numbers, and under :data:`TREE` the rest, JSON in
UTF-8 as bytes:

    None, bool, int, str, finite float    as they are
    list                                  [...]
    tuple                                 {"tuple": [...]}
    mapping                               {"dict": [[key, value], ...]}: keys keep their type
    tensor                                {"tensor": NUMBER}
    NaN, Infinity                         {"float": "nan"}

Floats are written with as many digits as give the same number back. Reading runs nothing that the
file names: what is not one of these is refused. Tensors are written from the CPU, contiguous, each
by itself, also where several were views of one; a tensor's gradient is not kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError, LorasmithError, TrainingError
from lorasmith.io.tensors import FileTensors
from lorasmith.io.weights import check_finite

__all__ = [
    "TREE",
    "check_optimizer",
    "check_scheduler",
    "load_state",
    "load_tensors",
    "of_this_run",
    "on_device",
    "random_state",
    "save_state",
    "save_tensors",
    "set_random_state",
]

#: Name of the tensor of bytes that holds all that is no tensor.
TREE = "tree"
_NOT_FINITE = ("nan", "inf", "-inf")


def save_state(state: Any, path: Path) -> None:
    """Writes a state.

    Args:
        state: Mappings, lists, tuples, tensors, numbers, texts and None, in one another.
        path: The file.

    Raises:
        TrainingError: It holds something else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_written(state, tensors, path), allow_nan=False, separators=(",", ":"))
    tensors[TREE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file(tensors, str(path))


def _written(value: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        number = str(len(tensors))
        tensors[number] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": number}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_written(k, tensors, path), _written(v, tensors, path)] for k, v in value.items()
            ]
        }
    if isinstance(value, list):
        return [_written(v, tensors, path) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_written(v, tensors, path) for v in value]}
    raise TrainingError(
        "A state cannot be written without a pickle.",
        expected="mappings, lists, tuples, tensors, numbers, texts or None",
        got=type(value).__name__,
        file=path,
    )


def load_state(path: Path) -> Any:
    """Reads what :func:`save_state` has written; tensors are on the CPU.

    Raises:
        TrainingError: There is no such file, or it holds something else.
    """
    try:
        tensors = FileTensors(path)
        data = tensors[TREE] if TREE in tensors else None
    except (AdapterFileError, OSError) as error:
        raise TrainingError(
            "A state cannot be read.",
            expected="a whole safetensors file",
            got=getattr(error, "got", None) or error,
            fix="go on from another checkpoint (--resume last finds it)",
            file=path,
            key=path.name,
        ) from error
    try:
        if data is None or data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError(f"no bytes under {TREE!r}")
        return _read(json.loads(data.numpy().tobytes()), tensors)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TrainingError(
            "A state is not one that a run has written.",
            expected="mappings, lists, tuples, tensors and numbers, as lorasmith writes them",
            got=f"{type(error).__name__}: {error}"[:200],
            fix="go on from another checkpoint (--resume last finds it)",
            file=path,
            key=TREE,
        ) from error


def _read(value: Any, tensors: FileTensors) -> Any:
    if isinstance(value, list):
        return [_read(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {_key(k, tensors): _read(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_read(v, tensors) for v in content)
    if kind == "tensor":
        return tensors[content]
    if kind == "float" and content in _NOT_FINITE:
        return float(content)
    raise ValueError(f"a value of kind {kind!r}"[:100])


def _key(value: Any, tensors: FileTensors) -> Any:
    """A key of a mapping, which must not be one that changes."""
    key = _read(value, tensors)
    if isinstance(key, Tensor | list | dict):
        raise TypeError(f"{type(key).__name__} as a key")
    return key


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors, exactly, from the CPU."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all of them finite; they are on the CPU.

    Raises:
        AdapterFileError: It cannot be read, or a value is NaN or infinite.
    """
    tensors = FileTensors(path)
    found = {key: tensors[key] for key in tensors}
    for key, value in found.items():
        check_finite(value, key, path)
    return found


@contextlib.contextmanager
def of_this_run(file: Path) -> Iterator[None]:
    """Raises what goes wrong with the content of a checkpoint's file as an error of that file."""
    try:
        yield
    except LorasmithError as error:
        if error.file is not None:
            raise
        raise TrainingError(
            f"A state in the checkpoint is not of this run: {error.what}",
            expected=error.expected,
            got=error.got,
            fix="go on from another checkpoint, or start anew with --overwrite",
            file=file,
            key=error.key or file.name,
        ) from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise TrainingError(
            "A state in the checkpoint is not of this run.",
            expected="what the run with these options has written",
            got=f"{type(error).__name__}: {error}"[:300],
            fix="go on from another checkpoint, or start anew with --overwrite",
            file=file,
            key=file.name,
        ) from error


def check_optimizer(state: Mapping[str, Any], optimizer: Any, file: Path) -> None:
    """Raises unless every tensor is finite and of its parameter's shape, and steps are a number.

    An optimiser takes any shape and any options, and fails in its next step; one that is fused
    writes beyond the end of a tensor that is too small. How it computes
    (fused, foreach, capturable) becomes what it is in this run, perhaps on another device.

    Args:
        state: What ``optimizer.state_dict()`` gave; those options are changed in it.
        optimizer: The optimiser that is to go on from it.
        file: Where it is from.

    Raises:
        TrainingError: It is not so.
    """

    def wrong(key: str, expected: object, got: object) -> TrainingError:
        return TrainingError(
            "The state of the optimiser cannot be gone on from.",
            expected=expected,
            got=str(got)[:200],
            fix="go on from another checkpoint",
            file=file,
            key=key,
        )

    trained = [p for group in optimizer.param_groups for p in group["params"]]
    own = getattr(optimizer, "optimizer", optimizer)  # Accelerate's has it inside
    needed = _NEEDED.get(type(own).__name__, frozenset())
    for index, values in state["state"].items():
        shape = trained[index].shape
        more = values.keys() - needed - {"max_exp_avg_sq"} if needed else set()
        if needed - values.keys() or more:
            raise wrong(f"state {index}", ", ".join(sorted(needed)), sorted(map(str, values)))
        for key, value in values.items():
            if key == "step":
                count = value if torch.is_tensor(value) else torch.tensor(float(value))
                if count.dim() or not count.is_floating_point() or not 0 <= float(count) < 2**53:
                    raise wrong(f"state {index} step", "a number of steps", count.tolist())
                continue
            if not torch.is_tensor(value):
                if key in needed or not isinstance(value, int | float | str | None):
                    raise wrong(f"state {index} {key}", f"a tensor {list(shape)}", repr(value))
                continue
            finite = not value.is_floating_point() or bool(value.isfinite().all())
            if not finite or value.shape != shape:
                got = f"{list(value.shape)}" + ("" if finite else ", NaN or infinity")
                raise wrong(f"state {index} {key}", f"finite numbers, {list(shape)}", got)
    for mine, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True):
        theirs.update({key: mine[key] for key in _HOW if key in mine})
        for key in sorted(mine.keys() - {"params", *_HOW}):
            if not _alike(theirs.get(key), mine[key]):
                raise wrong(f"param_groups {key}", f"such as {mine[key]!r}", repr(theirs.get(key)))


#: Options of an optimiser that say how it computes, and not what.
_HOW = ("capturable", "foreach", "fused")
#: What an optimiser's next step takes from its state.
_NEEDED = dict.fromkeys(("Adam", "AdamW"), frozenset(("step", "exp_avg", "exp_avg_sq")))


def check_scheduler(state: Any, scheduler: Any, file: Path) -> None:
    """Raises unless a state has the fields of the schedule that is to go on from it.

    A schedule of PyTorch takes every field of a state as an attribute, whatever it is called.

    Args:
        state: What ``scheduler.state_dict()`` gave.
        scheduler: The schedule.
        file: Where the state is from.

    Raises:
        TrainingError: It is not so.
    """
    mine = scheduler.state_dict()
    if not isinstance(state, Mapping) or state.keys() != mine.keys():
        there = set(map(str, state)) if isinstance(state, Mapping) else set()
        wrong, expected, got = sorted(there ^ set(mine)), ", ".join(sorted(mine)), repr(state)
        key = wrong[0] if there and wrong else file.name
    else:
        wrong = [k for k in mine if not _alike(state[k], mine[k], switches=False)]
        if not wrong:
            return
        key = wrong[0]
        expected, got = f"such as {mine[key]!r}", repr(state[key])
    raise TrainingError(
        "The state of the schedule cannot be gone on from.",
        expected=expected,
        got=got[:200],
        fix="go on from another checkpoint",
        file=file,
        key=key,
    )


def _alike(value: Any, mine: Any, *, switches: bool = True) -> bool:
    """Whether an option is of the same kind as this run's; a switch must be the same."""
    if isinstance(mine, bool) or mine is None:
        return value is mine if switches or mine is None else isinstance(value, bool)
    if isinstance(mine, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value < 1e300
    if isinstance(mine, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(mine)
        return same and all(map(_alike, value, mine))
    if isinstance(mine, Mapping):
        same = isinstance(value, Mapping) and value.keys() == mine.keys()
        return same and all(_alike(value[key], mine[key]) for key in mine)
    return type(value) is type(mine)


def random_state(device: torch.device) -> dict[str, Any]:
    """The random generators of Python, NumPy, PyTorch and the device, as they are now."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what others draw from
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_state`; a run may have begun on another device."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the present one of this thread; each thread begins with the first."""
    if device.type == "cpu" or device.index is None:
        return contextlib.nullcontext()
    made: contextlib.AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return made
