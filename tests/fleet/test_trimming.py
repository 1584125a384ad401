"""Which directions of adapters are dropped within an error budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.adapters.lora import LoRAConfig
from lorasmith.fleet.codes import Layer, absent, coded
from lorasmith.fleet.share import balance
from lorasmith.fleet.subspace import SharedSubspace
from lorasmith.fleet.trimming import kept_ranks, trim
from lorasmith.io.weights import AdapterWeights


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


def layers_of(seed: int, directions: tuple[int, int]) -> list[Layer]:
    """Two layers with balanced cores of ranks 0 to 4, full and in factors, and an absent one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = []
    for number in range(2):
        Ru, Rd = directions
        up, down = (torch.linalg.qr(draw(20, k))[0].mT for k in (Ru, Rd))
        layer = Layer.new(f"layer{number}", up, down, 5)
        codes = []
        for rank in (1, 2, 3, 4):
            right, left = balance(
                draw(rank, Rd), draw(rank, Ru) * 0.5 ** torch.arange(rank)[:, None]
            )
            codes.append(coded(left, right, layer.sizes))
        layer.fill([*codes[:2], absent(layer.sizes, layer.ranks), *codes[2:]])
        found.append(layer)
    return found


@pytest.mark.parametrize("directions", [(12, 9), (4, 5), (3, 14)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 2.0])
def test_trimming_moves_cores_by_what_it_says(directions: tuple[int, int], share: float) -> None:
    layers = layers_of(3, directions)
    before = [[layer.core(n).double() for n in range(5)] for layer in layers]
    numbers = sum(layer.left.data.numel() + layer.right.data.numel() for layer in layers)
    whole = torch.tensor([sum(float(c[n].square().sum()) for c in before) for n in range(5)])
    lost = trim(layers, share * whole.double())
    for place, layer in enumerate(layers):
        assert not layer.has(2)
        for n in range(5):
            moved = float((layer.core(n).double() - before[place][n]).square().sum())
            assert abs(moved - float(lost[n, place])) < 1e-6 * float(whole[n] + 1)
    assert bool((lost.sum(1) <= share * whole + 1e-6).all())
    after = sum(layer.left.data.numel() + layer.right.data.numel() for layer in layers)
    assert after <= numbers
    if share == 2.0:
        assert after == 0


def test_a_fleet_whose_adapters_need_less_than_their_rank() -> None:
    """Within the same error, fewer bytes than with cores of the adapters' ranks; dense errors."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared_A, shared_B = draw(24, 64), draw(24, 48)
    adapters, changes = {}, {}
    for n in range(12):
        strength = 0.3 ** torch.arange(8.0)[:, None]
        A, B = draw(8, 24) @ shared_A, ((strength * draw(8, 24)) @ shared_B).mT
        config = LoRAConfig(r=8, alpha=8)
        adapters[f"a{n}"] = AdapterWeights.from_tensors(config, {"layer": {"A": A, "B": B}})
        changes[f"a{n}"] = B.double() @ A.double()
    fleet = SharedSubspace.from_adapters(adapters, error=0.1)
    streamed = SharedSubspace.from_stream(adapters, error=0.1)
    for made in (fleet, streamed):
        ranks = made._layers[0].index[:, 1].tolist()
        assert max(ranks) < 8
        assert sum(ranks) < 0.6 * 12 * 8
        for name, change in changes.items():
            held = made.factors(name)["layer"]
            error = float((held.B.double() @ held.A.double() - change).square().sum())
            error /= float(change.square().sum())
            assert error <= 0.1 * (1 + 1e-5)
            assert abs(error - made.errors[name]) < 1e-5
    fleet.absorb({"more": adapters["a0"]})
    held = fleet.factors("more")["layer"]
    moved = (held.B.double() @ held.A.double() - changes["a0"]).square().sum()
    assert float(moved / changes["a0"].square().sum()) <= 0.1 * (1 + 1e-5)
