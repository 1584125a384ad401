"""Writing safetensors files tensor by tensor, block by block: none is ever in memory as a whole.

The package safetensors writes a file from all its tensors at once; a checkpoint of 140 GB in
shards of 5 GB would need 5 GB for nothing. The format asks for no more than a header that says
where each tensor is, and sizes are known before values:

    8 bytes      n, length of the header, little-endian
    n bytes      JSON: name → {dtype, shape, data_offsets: [begin, end]}, ``__metadata__``; padded
                 with spaces to a multiple of 8
    the rest     the tensors' bytes, row-major, without gaps

Tensors of wider numbers stand before those of narrower ones in a file, so that each begins at a
multiple of its numbers' size, as safetensors itself does it. Which tensors go into which file, and
what the files and their index are called, is as Transformers has it: in turn, a new file when the
next one would pass the limit; a tensor larger than the limit has a file of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.errors import ConfigError, FuseError

__all__ = ["INDEX", "KINDS", "SINGLE", "Piece", "parse_size", "plan_shards", "write_shards"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: dtype → the format's name of it.
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Piece:
    """One tensor of the files to be written.

    Attributes:
        name: Its name there.
        kind: The format's name of its dtype.
        shape: Its shape.
        nbytes: Bytes of its values.
        blocks: Gives the values: consecutive contiguous tensors whose bytes, joined, are the
            tensor's. Called once.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterator[Tensor]]


def parse_size(text: str | int) -> int:
    """``"5GB"`` (10⁹), ``"500MiB"`` (2²⁰) or a number of bytes → bytes.

    Raises:
        ConfigError: It is none of them.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if found is not None and (found[2] or not found[3]):
        units = _BINARY if found[3] else _UNITS
        size = int(float(found[1]) * units[found[2].upper()])
        if size > 0:
            return size
    raise ConfigError(
        "That is not a size of files.",
        expected="e.g. 5GB, 500MB or 2GiB",
        got=repr(text),
        key="max_shard_size",
    )


def plan_shards(pieces: Sequence[Piece], limit: int) -> list[tuple[str, list[Piece]]]:
    """(file name, its tensors) for each file, of at most ``limit`` bytes of values if possible."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= piece.nbytes
    if len(groups) <= 1:
        return [(SINGLE, group) for group in groups]
    total = len(groups)
    return [(f"model-{i:05d}-of-{total:05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def write_shards(
    folder: Path, shards: Sequence[tuple[str, Sequence[Piece]]], done: Callable[[int], None]
) -> None:
    """Writes the files, and their index if there are several.

    Args:
        folder: Where to.
        shards: As :func:`plan_shards` gives them.
        done: Called with the number of bytes after each block.
    """
    for name, pieces in shards:
        _write(folder / name, pieces, done)
    if len(shards) == 1 and shards[0][0] == SINGLE:
        return
    placed = {piece.name: name for name, pieces in shards for piece in pieces}
    size = sum(piece.nbytes for _, pieces in shards for piece in pieces)
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(placed.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, pieces: Sequence[Piece], done: Callable[[int], None]) -> None:
    ordered = sorted(pieces, key=lambda p: -_width(p))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in ordered:
        header[piece.name] = {
            "dtype": piece.kind,
            "shape": list(piece.shape),
            "data_offsets": [place, place + piece.nbytes],
        }
        place += piece.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for piece in ordered:
            written = 0
            for block in piece.blocks():
                data = block.detach().reshape(-1).view(torch.uint8).numpy()
                stream.write(data.data)
                written += data.size
                done(data.size)
            if written != piece.nbytes:
                raise FuseError(
                    "A tensor came to another size than planned.",
                    expected=f"{piece.nbytes} bytes",
                    got=f"{written} bytes",
                    key=piece.name,
                )


def _width(piece: Piece) -> int:
    """Bytes of one number; 1 where the format packs several in a byte."""
    count = 1
    for size in piece.shape:
        count *= size
    return max(1, piece.nbytes // count) if count else 1
