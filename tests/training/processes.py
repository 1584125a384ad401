"""The command in processes of its own: one, or two that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorasmith as ls

__all__ = ["LAUNCH", "environment", "train_in_two"]

#: Arguments of Python that start two processes; a script or ``-m MODULE`` follows.
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment() -> dict[str, str]:
    """For a process that finds this package, one thread, and no hub."""
    source = str(Path(ls.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train_in_two(
    *arguments: str | Path, script: tuple[str | Path, ...] = ("-m", "lorasmith.cli")
) -> dict[str, Any]:
    """What ``lorasmith train … --json`` says of a run on two processes that ends well."""
    done = subprocess.run(
        [sys.executable, *LAUNCH, *map(str, script), "train", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["processes"] == 2
    return result
