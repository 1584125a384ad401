"""An adapter's files: the three of one generation, written into an empty directory.

    adapter_config.json         PEFT's fields
    adapter_model.safetensors   the tensors, each in its dtype, bit for bit; copied where they
                                come from such a file that has not changed since
    lorasmith.json              what PEFT has no fields for, and the SHA-256 and size of the other
                                two, which binds the three together

That a directory changes from one generation to the next as a whole is the business of
:mod:`lorasmith.io.atomic`, which calls this with a directory beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasmith import __version__
from lorasmith.errors import ConfigError
from lorasmith.io import peft
from lorasmith.io.tensors import FileTensors, TensorSource, sha256_of
from lorasmith.redaction import redact_all

__all__ = ["FORMAT", "OWN", "OWNED", "write"]

#: Our own file beside PEFT's two.
OWN = "lorasmith.json"
#: Version of its format. A higher one is not read.
FORMAT = 1
#: Files of one generation; ``adapter_model.bin`` would be a stale older one.
OWNED = frozenset({peft.CONFIG, peft.WEIGHTS, peft.PICKLE, OWN})


def write(
    folder: Path, tensors: TensorSource, fields: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Writes the files.

    Args:
        folder: An empty directory.
        tensors: Name in the file → value.
        fields: ``adapter_config.json``.
        record: ``lorasmith.json``, without its format, version and manifest.

    Raises:
        OSError: Writing fails.
        ConfigError: ``fields`` or ``record`` hold what JSON cannot.
    """
    weights, config = folder / peft.WEIGHTS, folder / peft.CONFIG
    copied = False
    if isinstance(tensors, FileTensors) and not tensors.changed():
        shutil.copyfile(tensors.path, weights)
        copied = not tensors.changed()
    if not copied:
        from safetensors.torch import save_file

        values = {k: tensors[k].detach().cpu().contiguous() for k in tensors}
        # Tensors that share memory are no copy of each other to safetensors.
        save_file(_unshared(values), weights, metadata={"format": "pt"})
    config.write_text(_json(fields), encoding="utf-8")
    # safetensors makes files that only their owner can read, whatever the umask.
    shutil.copymode(config, weights)
    whole = {
        "format": FORMAT,
        "version": __version__,
        **record,
        "manifest": {
            f.name: {"sha256": sha256_of(f), "size": f.stat().st_size} for f in (config, weights)
        },
    }
    (folder / OWN).write_text(_json(whole), encoding="utf-8")


def _unshared(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a copy of each value that shares its memory, or has more of it."""
    seen: set[int] = set()
    for key, value in values.items():
        place = value.untyped_storage().data_ptr()
        if place in seen or value.untyped_storage().nbytes() != value.numel() * value.itemsize:
            values[key] = value.clone()
        seen.add(place)
    return values


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(redact_all(value), indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The configuration cannot be written as JSON: {error}.") from error
