"""Both classifications, on changes that were planted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorasmith.core.rotation import noise_floor
from lorasmith.diagnostics.modes import change_of, mode_of, verdict_of

F64 = torch.float64


@pytest.mark.parametrize(
    ("theta", "ratio", "mode"),
    [
        (0.0, 1.0, "preserved"),
        (4.999, 0.9, "preserved"),
        (4.999, 1.0999, "preserved"),
        (4.999, 1.1, "additive"),
        (5.0, 0.9, "substitutive"),
        (90.0, 3.0, "substitutive"),
        (0.0, 0.899, "damaged"),
        (5.0, 0.899, "damaged"),
    ],
)
def test_modes_are_the_published_ones(theta: float, ratio: float, mode: str) -> None:
    assert mode_of(theta, ratio) == mode


def test_verdicts_are_the_published_ones() -> None:
    found = [verdict_of(x) for x in (0.0, 2.999, 3.0, 4.999, 5.0, 90.0)]
    assert found == ["SAFE", "SAFE", "WARNING", "WARNING", "DANGER", "DANGER"]


def _classes(weight: Tensor, tuned: Tensor, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """(EgoRA's class, ours), from W and W' as vectors."""
    w, t = weight.flatten().to(F64), tuned.flatten().to(F64)
    kept = float(w @ t / (w @ w))
    novel = float(torch.linalg.vector_norm(t - kept * w) / torch.linalg.vector_norm(w))
    ratio = float(torch.linalg.vector_norm(t) / torch.linalg.vector_norm(w))
    theta = math.degrees(math.atan2(novel, kept))
    return mode_of(theta, ratio), change_of(kept, novel, noise_floor(dtype), w.numel())


def _turned(weight: Tensor, degrees: float) -> Tensor:
    """W turned by an angle in the plane with a random direction, its norm kept."""
    other = torch.randn(weight.shape, dtype=F64)
    other -= (other * weight).sum() / weight.square().sum() * weight
    other *= torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(other)
    angle = math.radians(degrees)
    return math.cos(angle) * weight + math.sin(angle) * other


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(64, 576, dtype=F64)


def test_where_the_published_modes_fail_ours_do_not(weight: Tensor) -> None:
    # Random numbers of the same size: nothing of W is left, and nothing is "damaged".
    assert _classes(weight, torch.randn_like(weight)) == ("substitutive", "replaced")
    # One head turned by 90° shares its mode with one turned by 6°.
    assert _classes(weight, _turned(weight, 90)) == ("substitutive", "replaced")
    assert _classes(weight, _turned(weight, 6)) == ("substitutive", "turned")
    # A uniform scale keeps every direction, and is "damaged".
    assert _classes(weight, 0.85 * weight) == ("damaged", "scaled")
    # A large addition of rank 1 across W leaves all of W where it was.
    extra = torch.outer(torch.randn(64, dtype=F64), torch.randn(576, dtype=F64))
    extra -= (extra * weight).sum() / weight.square().sum() * weight
    extra *= 2 * torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(extra)
    assert _classes(weight, weight + extra) == ("substitutive", "extended")


@pytest.mark.parametrize("scale", [0.05, 0.5, 0.99, 1.01, 3.0])
def test_scaling_is_scaling(weight: Tensor, scale: float) -> None:
    assert _classes(weight, scale * weight)[1] == "scaled"
    rounded = (scale * weight).bfloat16()
    assert _classes(weight, rounded, torch.bfloat16)[1] == "scaled"


@pytest.mark.parametrize(
    ("degrees", "change"),
    [(0.5, "turned"), (10, "turned"), (44, "turned"), (46, "replaced"), (120, "replaced")],
)
def test_turning_by_more_than_45_degrees_replaces(
    weight: Tensor, degrees: float, change: str
) -> None:
    assert _classes(weight, _turned(weight, degrees))[1] == change


@pytest.mark.parametrize(
    ("share", "change"), [(0.005, "turned"), (0.05, "extended"), (0.5, "extended")]
)
def test_small_additions_cannot_be_told_from_turns(
    weight: Tensor, share: float, change: str
) -> None:
    # 6 / √(64 · 576) = 0.031 is where they part.
    assert _classes(weight, weight + share * torch.randn_like(weight))[1] == change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_change(weight: Tensor, dtype: torch.dtype) -> None:
    assert _classes(weight, weight.to(dtype), dtype)[1] == "unchanged"
    moved = weight + 4 * noise_floor(dtype) * torch.randn_like(weight)
    assert _classes(weight, moved, dtype)[1] != "unchanged"


def test_nothing_left_is_replaced_and_something_from_nothing_extended(weight: Tensor) -> None:
    assert change_of(0.0, 0.0, 1e-8, 100) == "replaced"  # set to zero
    assert _classes(weight, -weight)[1] == "replaced"
    assert change_of(1.0, math.inf, 1e-8, 100) == "extended"
    assert change_of(1.0, 0.0, 1e-8, 100) == "unchanged"
