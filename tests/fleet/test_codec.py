"""Rows in few bits: against the formulas, value by value, and really as small as they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet.codec import NF4, Codec, Rows, codec_of

ALL: list[Codec] = ["float32", "bfloat16", "int8", "int4", "nf4"]


def _matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 3, max(rows, 1))[:rows, None]
    return torch.randn(rows, columns, generator=generator) * sizes


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("float32", 37 * 131 * 4),
        ("bfloat16", 37 * 131 * 2),
        ("int8", 37 * 131 + 37 * 2),
        ("int4", 37 * 66 + 37 * 3 * 2),
        ("nf4", 37 * 66 + 37 * 3 * 2),
    ],
)
def test_bytes(codec: Codec, expected: int) -> None:
    rows = Rows.pack(_matrix(37, 131), codec)
    assert rows.nbytes == expected
    # What is counted is what the tensors' memory takes.
    assert sum(t.untyped_storage().nbytes() for t in rows.tensors().values()) == expected


def test_int8_is_within_half_a_step() -> None:
    values = _matrix(20, 50)
    packed = Rows.pack(values, "int8")
    assert packed.scales is not None
    step = packed.scales.float()
    assert bool(((packed.unpack() - values).abs() <= step / 2 * (1 + 1e-5)).all())
    assert bool((step >= values.abs().amax(1, keepdim=True) / 127).all())
    assert bool((step <= values.abs().amax(1, keepdim=True) / 127 * 1.01).all())


def test_nf4_takes_the_nearest_level() -> None:
    values = _matrix(6, 100)
    packed = Rows.pack(values, "nf4")
    assert packed.scales is not None
    scales = packed.scales.float().repeat_interleave(64, 1)[:, :100]
    levels = torch.tensor(NF4)
    nearest = ((values / scales).unsqueeze(-1) - levels).abs().argmin(-1)
    wanted = levels[nearest] * scales
    torch.testing.assert_close(packed.unpack(), wanted, rtol=0, atol=0)


def test_int4_is_no_worse_than_the_plain_scale() -> None:
    values = torch.randn(64, 64)
    scale = (values.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16).float()
    plain = (values / scale).round().clamp(-7, 7) * scale
    got = Rows.pack(values, "int4").unpack()
    assert float((got - values).square().sum()) < 0.97 * float((plain - values).square().sum())


@pytest.mark.parametrize("codec", ALL)
def test_zeros_stay_zeros(codec: Codec) -> None:
    assert not Rows.pack(torch.zeros(3, 70), codec).unpack().any()


@pytest.mark.parametrize("codec", ALL)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 130),
    cut=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_rows_are_independent(codec: Codec, rows: int, columns: int, cut: int, seed: int) -> None:
    values = _matrix(rows, columns, seed)
    packed = Rows.pack(values, codec)
    whole = packed.unpack()
    assert whole.shape == values.shape
    cut = min(cut, rows)
    apart = [Rows.pack(v, codec) for v in (values[:cut], values[cut:])]
    assert torch.equal(Rows.join(apart).unpack(), whole)
    assert torch.equal(packed.take(cut, rows).unpack(), whole[cut:])
    assert torch.equal(packed.without(cut, rows).unpack(), whole[:cut])
    # Packing what is rounded already changes no more than rounding the scale again.
    layout = Rows.layout(codec, rows, columns)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.tensors().items()} == layout


def test_rows_of_other_kinds_are_not_joined() -> None:
    with pytest.raises(ValueError, match="different"):
        Rows.join([Rows.empty(3), Rows.empty(4)])


@pytest.mark.parametrize(
    ("bits", "codec"),
    [
        (32, "float32"),
        ("16", "bfloat16"),
        (8, "int8"),
        (4, "int4"),
        ("nf4", "nf4"),
        ("int8", "int8"),
    ],
)
def test_names(bits: int | str, codec: str) -> None:
    assert codec_of(bits) == codec


@pytest.mark.parametrize("bits", [3, "fp4", True, 0])
def test_other_names_are_refused(bits: int | str) -> None:
    with pytest.raises(ConfigError, match="no such way"):
        codec_of(bits)
