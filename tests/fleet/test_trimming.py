"""Which directions of adapters are dropped within an error budget."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.fleet.trimming import kept_ranks


def spectra(seed: int, layers: int, adapters: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layers, adapters, rank, generator=generator, dtype=torch.float64) ** 3
    costs = torch.randint(1, 40, (layers,), generator=generator).double()
    return values.sort(-1, descending=True)[0], costs


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 4),
    adapters=st.integers(1, 3),
    rank=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.7, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_adapter_loses_more_than_it_may(
    seed: int, layers: int, adapters: int, rank: int, share: float
) -> None:
    values, costs = spectra(seed, layers, adapters, rank)
    room = share * values.sum((0, 2))
    ranks, lost = kept_ranks(values, costs, room)
    assert ranks.shape == lost.shape == (layers, adapters)
    for n in range(adapters):
        gone = 0.0
        for layer in range(layers):
            tail = values[layer, n, int(ranks[layer, n]) :].tolist()
            gone += sum(tail)
            assert abs(sum(tail) - float(lost[layer, n])) < 1e-12
        assert gone <= float(room[n]) * (1 + 1e-12) + 1e-15


def test_near_the_best_of_all_choices() -> None:
    for seed in range(8):
        values, costs = spectra(seed, 3, 1, 3)
        room = 0.25 * values.sum((0, 2))
        ranks, _ = kept_ranks(values, costs, room)
        paid = float((ranks[:, 0] * costs).sum())
        best = min(
            sum(k * float(c) for k, c in zip(choice, costs, strict=True))
            for choice in itertools.product(range(4), repeat=3)
            if sum(float(values[i, 0, k:].sum()) for i, k in enumerate(choice)) <= float(room[0])
        )
        # Filled in order of worth, at most one direction is kept that the optimum drops.
        assert best <= paid <= best + float(costs.max()) + 1e-9


def test_nothing_to_lose_drops_only_what_is_not_there() -> None:
    values = torch.tensor([[[2.0, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    ranks, lost = kept_ranks(values, torch.ones(1), torch.zeros(3))
    assert ranks.tolist() == [[2, 1, 0]]
    assert not lost.any()


def test_equal_values_are_dropped_from_the_end() -> None:
    values = torch.ones(2, 1, 4)
    ranks, lost = kept_ranks(values, torch.tensor([5.0, 1.0]), torch.tensor([3.0]))
    assert ranks[:, 0].tolist() == [1, 4]  # the dear layer first
    assert float(lost.sum()) == 3.0
