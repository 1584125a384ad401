"""Rows of numbers in few bits: what a compressed fleet keeps in memory and on disk.

A matrix is stored row by row, and rows can be taken out and put together without touching
their values, so that a fleet can gain and lose adapters after it has been quantised.

    name      stored                            one scale for      bytes a value
    float32   float32                           —                  4
    bfloat16  bfloat16                          —                  2
    int8      q ∈ −127 … 127, x ≈ s q           a row              1
    int4      q ∈ −7 … 7, x ≈ s q, two a byte   64 values          0.5
    nf4       index of a level, x ≈ s level     64 values          0.5

NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E): the 16 quantiles of a normal
distribution, scaled to −1 … 1; s is the largest value of the block.

Scales are bfloat16, and values are rounded to the scale as it is stored. For int8 s is the
smallest bfloat16 number with |x| ≤ 127 s; for int4 it is the one of a few below
max |x| / 7 with the least squared error, which clips the largest values of some blocks.
NF4's scales are not quantised a second time (the paper's double quantisation), which costs a
quarter of a bit a value.

Limits: int4 and nf4 pad rows of an odd number of columns by half a byte. Rows of zeros come
back as zeros. Values must be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.init.loftq import NF4

__all__ = ["NF4", "Codec", "Rows", "codec_of"]

#: How numbers are stored.
Codec = Literal["float32", "bfloat16", "int8", "int4", "nf4"]

#: Values that share a scale in int4 and nf4.
_BLOCK = 64
#: Shares of max |x| / 7 that are tried as the scale of an int4 block.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: Values that are quantised at once, which bounds the memory for it.
_CHUNK = 2**22


def codec_of(bits: int | str) -> Codec:
    """The codec that a number of bits, or a name, stands for.

    Args:
        bits: 32, 16, 8, 4, or a codec's name.

    Raises:
        ConfigError: There is none.
    """
    names: dict[int | str, Codec] = {32: "float32", 16: "bfloat16", 8: "int8", 4: "int4"}
    names |= {str(number): name for number, name in names.items()}
    names |= {name: name for name in get_args(Codec)}
    if isinstance(bits, bool) or bits not in names:
        raise ConfigError(
            "There is no such way of quantising.",
            expected="32, 16, 8, 4, or " + ", ".join(map(repr, get_args(Codec))),
            got=repr(bits),
            key="bits",
        )
    return names[bits]


@dataclass(frozen=True, eq=False)
class Rows:
    """A matrix [n, columns], stored row by row.

    Attributes:
        codec: How.
        columns: Length of a row.
        data: [n, columns] of float32, bfloat16 or int8; [n, ⌈columns / 2⌉] of uint8, the
            first of two values in the low four bits.
        scales: [n, blocks] of bfloat16, or ``None`` for floating-point codecs.
    """

    codec: Codec
    columns: int
    data: Tensor
    scales: Tensor | None = None

    @classmethod
    def pack(cls, values: Tensor, codec: Codec = "float32") -> Rows:
        """Stores a matrix [n, columns], rounding it as the codec does."""
        values = values.detach()
        n, columns = values.shape
        if codec == "float32":
            return cls(codec, columns, _own(values, torch.float32))
        if codec == "bfloat16":
            return cls(codec, columns, _own(values, torch.bfloat16))
        step = max(1, _CHUNK // max(columns, 1))
        parts = [
            _quantise(values[i : i + step].to(torch.float32), codec)
            for i in range(0, max(n, 1), step)
        ]
        data, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(codec, columns, data, scales)

    @classmethod
    def empty(cls, columns: int, codec: Codec = "float32") -> Rows:
        """No rows."""
        return cls.pack(torch.zeros(0, columns), codec)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of one codec and length below each other, bit for bit."""
        first = parts[0]
        if any((p.codec, p.columns) != (first.codec, first.columns) for p in parts):
            raise ValueError("rows of different lengths or codecs cannot be put together")
        scales = [p.scales for p in parts if p.scales is not None]
        return cls(
            first.codec,
            first.columns,
            torch.cat([p.data for p in parts]),
            torch.cat(scales) if scales else None,
        )

    def take(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``, sharing memory."""
        scales = None if self.scales is None else self.scales[start:stop]
        return Rows(self.codec, self.columns, self.data[start:stop], scales)

    def clone(self) -> Rows:
        """A copy with memory of its own."""
        scales = None if self.scales is None else self.scales.clone()
        return Rows(self.codec, self.columns, self.data.clone(), scales)

    def without(self, start: int, stop: int) -> Rows:
        """All rows but ``start`` to ``stop``."""
        return Rows.join([self.take(0, start), self.take(stop, len(self))])

    def unpack(self) -> Tensor:
        """The matrix [n, columns] in float32."""
        if self.scales is None:
            return self.data.to(torch.float32)
        if self.codec == "int8":
            return self.data.to(torch.float32) * self.scales.to(torch.float32)
        pair = torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(1)
        codes = pair[:, : self.columns]
        levels = codes.new_tensor(NF4, dtype=torch.float32) if self.codec == "nf4" else None
        values = codes.to(torch.float32) - 8 if levels is None else levels[codes.long()]
        scales = self.scales.to(torch.float32).repeat_interleave(_BLOCK, dim=1)
        return values * scales[:, : self.columns]

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take, scales included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What has to be written to disk."""
        found = {"data": self.data}
        if self.scales is not None:
            found["scales"] = self.scales
        return found

    @classmethod
    def layout(cls, codec: Codec, rows: int, columns: int) -> dict[str, tuple[object, ...]]:
        """Name → (dtype, shape) of what :meth:`tensors` holds for a matrix of that size."""
        floating = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if codec in floating:
            return {"data": (floating[codec], (rows, columns))}
        if codec == "int8":
            return {
                "data": (torch.int8, (rows, columns)),
                "scales": (torch.bfloat16, (rows, 1)),
            }
        return {
            "data": (torch.uint8, (rows, -(-columns // 2))),
            "scales": (torch.bfloat16, (rows, -(-columns // _BLOCK))),
        }


def _quantise(values: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """(data, scales) of a float32 matrix [n, columns]."""
    n, columns = values.shape
    if codec == "int8":
        most = values.abs().amax(1, keepdim=True) if columns else values.new_zeros(n, 1)
        scales = _up(most / 127)
        return _round(values, scales, 127).to(torch.int8), scales
    blocks = -(-columns // _BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * _BLOCK - columns))
    padded = padded.view(n, blocks, _BLOCK)
    most = padded.abs().amax(2, keepdim=True)
    if codec == "nf4":
        scales = most.to(torch.bfloat16)
        levels = torch.tensor(NF4, device=values.device)
        middle = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(padded / _divisor(scales), middle).to(torch.uint8)
    else:
        scales, best = _up(most / 7), torch.full_like(most, float("inf"))
        for clip in _CLIPS:
            tried = _up(most * (clip / 7))
            rounded = _round(padded, tried, 7) * tried.to(torch.float32)
            error = (rounded - padded).square().sum(2, keepdim=True)
            scales = torch.where(error < best, tried, scales)
            best = torch.minimum(error, best)
        codes = (_round(padded, scales, 7) + 8).to(torch.uint8)
    flat = codes.flatten(1)[:, : columns + columns % 2]
    if columns % 2:  # the half byte at the end of a row
        flat[:, -1] = 0
    return flat[:, ::2] | (flat[:, 1::2] << 4), scales.squeeze(2)


def _own(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with memory of its own: a view would keep all that it was cut from."""
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)


def _up(scales: Tensor) -> Tensor:
    """The nearest bfloat16 numbers that are not smaller."""
    near = scales.to(torch.bfloat16)
    short = near.to(torch.float32) < scales
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(short, above, near)


def _divisor(scales: Tensor) -> Tensor:
    """The scales in float32, 1 in place of 0."""
    wide = scales.to(torch.float32)
    return torch.where(wide == 0, torch.ones_like(wide), wide)


def _round(values: Tensor, scales: Tensor, most: int) -> Tensor:
    return (values / _divisor(scales)).round().clamp(-most, most)
