"""Whether the header of a GGUF file can be true, before anything believes it.

A header counts its own entries, the characters of each text, the elements of each list and the
dimensions of each tensor, in 64 bits. ``gguf.GGUFReader``, and Transformers with it, goes by
these counts: it loops over what the file does not hold (a list of 2^60 elements takes for ever)
and maps what is not there. Here every count is compared with the bytes that are left, entry by
entry, without making an object of any element.

Layout (version 2 and 3, little-endian): ``GGUF``, version u32, tensors u64, entries u64; each
entry a text (u64 and bytes), a type u32 and a value; each tensor a text, dimensions u32, a size
u64 for each, a type u32, an offset u64 from the beginning of the data, which is aligned.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from pathlib import Path
from typing import IO

from lorasmith.errors import ModelError

__all__ = ["check_header"]

#: Bytes of a value by its type; 8 is a text, 9 a list.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
#: Dimensions of a tensor (ggml's own limit); characters of a name; tensors; elements of all
#: lists, each of which takes some hundred bytes once it is read.
_DIMENSIONS, _NAME, _TENSORS, _ELEMENTS = 4, 1024, 65536, 4_000_000
#: Types of whole numbers; one below 0 is read as one that is far too large.
_WHOLE = (0, 1, 2, 3, 4, 5, 10, 11)
#: Last part of an entry's name → the most there can be. Transformers makes an object, or an entry
#: of a list, for each.
_COUNTS = {"block_count": 2048, "head_count": 2**16, "head_count_kv": 2**16, "expert_count": 2**12}


def check_header(path: str | os.PathLike[str]) -> None:
    """Reads the header of a GGUF file and compares its counts with the file.

    Raises:
        ModelError: It is cut off, counts more than it holds, places a tensor outside the file,
            or is not a little-endian GGUF file of version 2 or 3.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise _wrong(path, "file type", "a regular file", "another kind of file")
        with Path(path).open("rb") as stream:
            _Header(Path(path), stream, found.st_size).check()
    except OSError as error:
        raise _wrong(path, None, "a file that can be read", str(error)) from error


def _wrong(
    path: str | os.PathLike[str], key: str | None, expected: object, got: object
) -> ModelError:
    return ModelError(
        "The GGUF file cannot be read: its header is not true.",
        file=path,
        key=key,
        expected=expected,
        got=got,
        fix="download or convert it again",
    )


class _Header:
    def __init__(self, path: Path, stream: IO[bytes], size: int) -> None:
        self.path, self.stream, self.size, self.place = path, stream, size, 0
        self.elements = 0

    def check(self) -> None:
        magic, version = self.take(4, "magic"), self.number("<I", "version")
        if magic != b"GGUF":
            raise _wrong(self.path, "magic", "b'GGUF'", repr(magic))
        if version not in (2, 3):
            raise _wrong(self.path, "version", "2 or 3, little-endian", version)
        tensors, entries = self.number("<Q", "tensor_count"), self.number("<Q", "kv_count")
        # The least that an entry, and a tensor's description, can take.
        self.fits(tensors, 24, "tensor_count", _TENSORS)
        self.fits(entries, 13, "kv_count")
        alignment, seen = 32, set()
        for _ in range(entries):
            key = self.text("key of an entry", _NAME * 64)
            if key in seen:
                raise _wrong(self.path, key, "each key once", "twice")
            seen.add(key)
            kind = self.number("<I", key)
            value = self.value(kind, key)
            most = _COUNTS.get(key.rpartition(".")[2])
            if most is not None and value is not None and value > most:
                raise _wrong(self.path, key, f"at most {most:,}", f"{value:,}")
            if key == "general.alignment":
                alignment = value or 0 if kind in (4, 10) else 0
                if alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
                    raise _wrong(self.path, key, "a power of two", alignment)
        self.tensors(tensors, alignment)

    def tensors(self, count: int, alignment: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        kinds = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        told: list[tuple[str, int, int]] = []
        names = set()
        for _ in range(count):
            name = self.text("name of a tensor", _NAME)
            if name in names:
                raise _wrong(self.path, name, "each tensor once", "twice")
            names.add(name)
            dimensions = self.number("<I", name)
            if dimensions > _DIMENSIONS:
                raise _wrong(self.path, name, f"at most {_DIMENSIONS} dimensions", dimensions)
            shape = [self.number("<Q", name) for _ in range(dimensions)]
            kind = self.number("<I", name)
            if kind not in kinds:
                raise _wrong(self.path, name, "a type of tensors that gguf knows", kind)
            block, nbytes = kinds[kind]
            values = math.prod(shape)
            if (shape and shape[0] % block) or any(n < 1 for n in shape):
                raise _wrong(self.path, name, f"sizes of 1 or more, in blocks of {block}", shape)
            offset = self.number("<Q", name)
            if offset % alignment:
                raise _wrong(self.path, name, f"an offset divisible by {alignment}", offset)
            told.append((name, offset, values // block * nbytes))
        start = -(-self.place // alignment) * alignment
        end = 0
        for name, offset, length in sorted(told, key=lambda one: one[1]):
            if start + offset + length > self.size:
                raise _wrong(
                    self.path,
                    name,
                    f"{length:,} bytes from {start + offset:,} on",
                    f"a file of {self.size:,} bytes",
                )
            if offset < end:
                raise _wrong(self.path, name, f"an offset of {end:,} or more", f"{offset:,}")
            end = offset + length

    def value(self, kind: int, key: str, depth: int = 0) -> int | None:
        """Skips a value; that of a whole number is returned."""
        if kind == _TEXT:
            self.skip(self.number("<Q", key), key)
            return None
        if kind == _LIST:
            inner, count = self.number("<I", key), self.number("<Q", key)
            if inner in _SIZES:
                self.more(count, key)
                self.skip(count * _SIZES[inner], key)
            elif inner == _TEXT:
                self.fits(count, 8, key)
                self.more(count, key)
                for _ in range(count):
                    self.skip(self.number("<Q", key), key)
            else:
                raise _wrong(self.path, key, "a list of numbers or texts", f"type {inner}")
            return None
        if kind not in _SIZES:
            raise _wrong(self.path, key, "a type of values from 0 to 12", kind)
        data = self.take(_SIZES[kind], key)
        return int.from_bytes(data, "little") if kind in _WHOLE else None

    def more(self, count: int, key: str) -> None:
        self.elements += count
        if self.elements > _ELEMENTS:
            raise _wrong(
                self.path, key, f"at most {_ELEMENTS:,} elements of lists", f"{self.elements:,}"
            )

    def fits(self, count: int, least: int, key: str, most: int | None = None) -> None:
        left = (self.size - self.place) // least
        if count > left or (most is not None and count > most):
            raise _wrong(self.path, key, f"at most {min(left, most or left):,}", f"{count:,}")

    def number(self, form: str, key: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form), key))[0])

    def text(self, what: str, most: int) -> str:
        length = self.number("<Q", what)
        if length > most:
            raise _wrong(self.path, what, f"at most {most:,} characters", f"{length:,}")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _wrong(self.path, what, "UTF-8 text", repr(data[:40])) from error

    def take(self, count: int, key: str) -> bytes:
        data = self.stream.read(count) if count <= self.size - self.place else b""
        if len(data) < count:
            raise _wrong(
                self.path,
                key,
                f"{count:,} bytes at {self.place:,}",
                f"a file of {self.size:,} bytes",
            )
        self.place += count
        return data

    def skip(self, count: int, key: str) -> None:
        if count > self.size - self.place:
            raise _wrong(
                self.path,
                key,
                f"{count:,} bytes at {self.place:,}",
                f"a file of {self.size:,} bytes",
            )
        self.stream.seek(count, os.SEEK_CUR)
        self.place += count
