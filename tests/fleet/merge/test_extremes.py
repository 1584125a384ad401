"""Merging at the ends of what may be asked for: densities 0 and 1, weights 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.fleet.merge import get_method, methods

NAMES = ("q", "v")


def adapter(seed: int) -> ls.AdapterWeights:
    g = torch.Generator().manual_seed(seed)
    values = {
        name: {"A": torch.randn(2, 6, generator=g), "B": torch.randn(5, 2, generator=g)}
        for name in NAMES
    }
    return ls.AdapterWeights.from_tensors(ls.LoRAConfig(r=2, alpha=2.0, targets=NAMES), values)


def deltas(weights: ls.AdapterWeights) -> dict[str, Tensor]:
    return {name: weights.delta(name, dtype=torch.float64) for name in NAMES}


def merged(method: str, **arguments: Any) -> dict[str, Tensor]:
    made = ls.merge([adapter(0), adapter(1)], method, rank="exact", **arguments)
    return deltas(made.weights)


def with_density() -> list[str]:
    found = [n for n in methods() if any(o.name == "density" for o in get_method(n).options)]
    assert len(found) >= 7
    return found


@pytest.mark.parametrize("method", with_density())
def test_density_0_is_no_change_at_all(method: str) -> None:
    options = {"gamma": 0.0} if method == "breadcrumbs" else {}
    for value in merged(method, density=0.0, **options).values():
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("method", ["dare", "magnitude_prune"])
def test_density_1_is_the_weighted_sum(method: str) -> None:
    one, two = deltas(adapter(0)), deltas(adapter(1))
    for name, value in merged(method, density=1.0, weights=[0.7, 0.4]).items():
        torch.testing.assert_close(value, 0.7 * one[name] + 0.4 * two[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "concatenation", "svd", "dare", "magnitude_prune"])
def test_a_weight_of_0_takes_an_adapter_out_of_a_sum(method: str) -> None:
    one = deltas(adapter(0))
    for name, value in merged(method, weights=[1.0, 0.0]).items():
        torch.testing.assert_close(value, one[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", list(methods()))
def test_weights_0_give_no_change_at_all(method: str) -> None:
    for value in merged(method, weights=[0.0, 0.0]).values():
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("method", list(methods()))
def test_one_weight_of_0_gives_numbers(method: str) -> None:
    found = merged(method, weights=[1.0, 0.0])
    assert all(bool(torch.isfinite(v).all()) for v in found.values())
