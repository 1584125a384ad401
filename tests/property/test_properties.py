"""Laws that hold for every shape, rank and value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

import lorasmith as ls
from lorasmith.adapters.dora import factored_squared_norms
from lorasmith.core import lowrank
from lorasmith.core.variant import Factors
from lorasmith.errors import ConfigError
from tests.models import randomise

#: Variants that start without calibration data.
WITHOUT_DATA = sorted(n for n, v in ls.variants().items() if not v.statistics(v.config_class()))
sizes = st.integers(1, 12)
ranks = st.integers(1, 6)
seeds = st.integers(0, 2**16)
scales = st.floats(1e-3, 1e3)


@given(sizes, sizes, ranks, seeds, scales)
def test_the_delta_does_not_depend_on_the_gauge(
    d_out: int, d_in: int, r: int, seed: int, scale: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(r, d_in, generator=g, dtype=torch.float64)
    b = torch.randn(d_out, r, generator=g, dtype=torch.float64)
    # Well conditioned: the law is about algebra, not about rounding.
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))
    change = scale * q @ torch.diag(torch.linspace(0.5, 2, r, dtype=torch.float64))
    moved = Factors(change @ a, b @ torch.linalg.inv(change), 0.7)
    torch.testing.assert_close(moved.delta(), Factors(a, b, 0.7).delta(), atol=1e-9, rtol=1e-9)
    taken = Factors(a, b, 0.7, A0=a.clone(), B0=b.clone())
    assert float(taken.delta().abs().max()) < 1e-12 * (1 + float((b @ a).abs().max()))


@given(sizes, sizes, ranks, seeds, st.floats(-10, 10))
def test_factored_norms_equal_dense_ones(
    d_out: int, d_in: int, r: int, seed: int, s: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    w, a, b = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((d_out, d_in), (r, d_in), (d_out, r))
    )
    got = factored_squared_norms(w.square().sum(1), w, a, b, s)
    torch.testing.assert_close(got, (w + s * b @ a).square().sum(1), atol=1e-8, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:The block size asked for:UserWarning")
@settings(max_examples=100)
@given(
    sizes,
    sizes,
    ranks,
    seeds,
    st.sampled_from(WITHOUT_DATA),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
)
def test_fusing_is_the_same_function_and_unfusing_exact(
    d_out: int, d_in: int, r: int, seed: int, variant: str, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(3, d_in, dtype=dtype)
    bare = model(x)
    values = {"variant": variant} | ({"r": r} if variant in ("lora", "dora") else {})
    try:
        adapter = ls.attach(model, ls.config_from_dict(values))
    except ConfigError:
        reject()  # e.g. more singular vectors than the layer has, an odd size for pairs
    randomise(adapter.parameters(), scale=0.3)
    hooked = model(x)
    ls.fuse(model)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    size = float(1 + hooked.detach().abs().max())
    torch.testing.assert_close(model(x), hooked, atol=tolerance * size, rtol=0)
    ls.detach(model)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(model(x), bare)


@given(st.integers(1, 5), sizes, sizes, ranks, seeds, st.booleans(), st.booleans())
def test_both_forms_of_the_product_equal_the_formula(
    tokens: int, d_out: int, d_in: int, r: int, seed: int, grad: bool, frozen: bool
) -> None:
    g = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, w, a, b = made(tokens, d_in), made(d_out, d_in), made(r, d_in), made(d_out, r)
    a0, b0 = (made(r, d_in), made(d_out, r)) if frozen else (None, None)
    wanted = x @ w.T + 0.3 * x @ a.T @ b.T
    if a0 is not None and b0 is not None:
        wanted = wanted - 0.3 * x @ a0.T @ b0.T
    old = lowrank.SMALL
    for small in (0, 10**9):
        lowrank.SMALL = small
        try:
            with torch.set_grad_enabled(grad):
                passed, h = lowrank.down(x, a.requires_grad_(grad), A0=a0, owned=True)
                y = lowrank.up(nn.functional.linear(passed, w), h, b, 0.3, B0=b0, owned=True)
        finally:
            lowrank.SMALL = old
        torch.testing.assert_close(y, wanted)
