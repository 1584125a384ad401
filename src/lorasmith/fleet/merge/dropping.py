"""Merging after random dropping: DARE, DARE with the election of TIES, and DELLA.

Sources: Yu et al. 2023, "Language Models are Super Mario: Absorbing Abilities from Homologous
Models as a Free Lunch" (arXiv 2311.03099), section 3.2, for ``dare``; its combination with
arXiv 2306.01708 for ``dare_ties``; Deep et al. 2024, "DELLA-Merging: Reducing Interference in Model
Merging through Magnitude-Based Sampling" (arXiv 2406.11617), section 3, for ``della``.

    dare        Σ wᵢ mᵢ ∘ ΔWᵢ / d              mᵢ ~ Bernoulli(d), d = density = 1 − p of the paper
    dare_ties   disjoint mean (``consensus``) of mᵢ ∘ ΔWᵢ / d
    della       λ · disjoint mean of mᵢ ∘ ΔWᵢ / dᵢ,    mᵢ ~ Bernoulli(dᵢ) entry by entry

Dividing keeps the expectation of every entry. In DELLA (MAGPRUNE) the n entries of a row of ΔWᵢ
are ranked, rⱼ = 0 for the largest magnitude to n − 1 for the smallest, and dropped with

    pⱼ = p − ε/2 + (ε / n) rⱼ,    dⱼ = 1 − pⱼ,    p = 1 − density,

so that large entries are kept more often; then the signs are elected, and the mean is taken over
those that have them and multiplied by λ ("drop, elect, fuse"). Equal magnitudes are ranked by
their column. Deviation: ε is made as small as it must be for every pⱼ to be a probability, so that
``density=1`` keeps all and ``density=0`` none.

``density=0`` gives zero (the paper divides by zero there). Random numbers come from the generator
alone: torch's global state is neither read nor changed. Adapters have masks of their own. Two runs
with one seed are equal, on whatever device.

Papers' values: DARE density 0.1 to 0.5; DELLA 0.3 to 0.7 with ε of 0.1 to 0.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.fleet.merge.checks import check_factor, check_share
from lorasmith.fleet.merge.consensus import disjoint_mean
from lorasmith.fleet.merge.registry import register
from lorasmith.fleet.merge.sparse import weighted_sum

_LEAST = torch.finfo(torch.float64).tiny

__all__ = ["dare", "dare_ties", "della", "dropped", "keep_probabilities"]


def dropped(delta: Tensor, keep: Tensor | float, generator: torch.Generator) -> Tensor:
    """ΔW / keep where a random mask keeps an entry, else 0.

    Args:
        delta: ΔW, any shape.
        keep: Probability of every entry, or of all of them; 0 to 1.
        generator: On the CPU.
    """
    # On the CPU whatever the device, so that a seed means the same everywhere. What is
    # drawn is below 1, so that a probability of 1 keeps everything.
    chance = torch.rand(delta.shape, generator=generator, dtype=torch.float64).to(delta.device)
    chances = torch.as_tensor(keep, dtype=torch.float64, device=delta.device)
    kept = chance < chances
    # 1 / probability or 0, in memory that is there: where nothing can be kept, 0 / least = 0.
    factor = torch.div(kept, chances.clamp_min(_LEAST), out=chance)
    return delta * factor.to(delta.dtype)


@register("dare", form="dense", formula="Σ wᵢ mᵢ ∘ ΔWᵢ / density", source="arXiv 2311.03099")
def dare(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    generator: torch.Generator,
) -> Tensor:
    """Drop and rescale, then the weighted sum.

    Args:
        deltas: ΔWᵢ [d_out, d_in].
        weights: wᵢ.
        density: Probability with which an entry is kept, 0 to 1.
        generator: Source of the masks.
    """
    density = check_share("density", density)
    return weighted_sum([dropped(d, density, generator) for d in deltas], weights)


@register(
    "dare_ties",
    form="dense",
    formula="λ · mean of mᵢ ∘ ΔWᵢ / density over those of the elected sign",
    source="arXiv 2311.03099, 2306.01708",
)
def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    scale: float = 1.0,
    generator: torch.Generator,
) -> Tensor:
    """Drop and rescale, then elect the sign and take the disjoint mean.

    Args:
        deltas: ΔWᵢ [d_out, d_in].
        weights: wᵢ.
        density: Probability with which an entry is kept, 0 to 1.
        scale: λ.
        generator: Source of the masks.
    """
    density, scale = check_share("density", density), check_factor("scale", scale)
    return scale * disjoint_mean([dropped(d, density, generator) for d in deltas], weights)


def keep_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """1 − pⱼ of DELLA: by the rank of an entry's magnitude in its row.

    Args:
        delta: ΔW [d_out, d_in].
        density: 1 − p; the probabilities of a row have the mean density + ε/2n.
        epsilon: ε, their spread, where that can be.
    """
    epsilon = min(epsilon, 2 * density, 2 * (1 - density))
    n = delta.shape[1]
    order = _order(delta)  # the smallest first, which has r = n − 1
    steps = torch.arange(1, n + 1, dtype=torch.float64, device=delta.device) / n
    kept = torch.empty(delta.shape, dtype=torch.float64, device=delta.device)
    kept.scatter_(1, order, (density - epsilon / 2 + epsilon * steps).expand(order.shape))
    return kept.clamp_(0, 1)


def _order(delta: Tensor) -> Tensor:
    """Columns of each row, the smallest magnitude first, equal ones by their place: [rows, n]."""
    if delta.device.type != "cpu" or delta.dtype != torch.float32:
        return delta.abs().argsort(dim=1, stable=True)
    # The bits of floats that are not negative rise with them. With the column behind them they
    # are integers without ties, which sort, vectorised, in a fiftieth of the time of argsort.
    keys = delta.abs().contiguous().view(torch.int32).long() << 32
    keys |= torch.arange(delta.shape[1])
    values = keys.numpy()
    values.sort(axis=1)
    return keys & 0xFFFFFFFF


@register(
    "della",
    form="dense",
    formula="λ · mean of mᵢ ∘ ΔWᵢ / dᵢ over those of the elected sign, dᵢ by rank in the row",
    source="arXiv 2406.11617",
)
def della(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    epsilon: float = 0.1,
    scale: float = 1.0,
    elect: bool = True,
    generator: torch.Generator,
) -> Tensor:
    """Drop by magnitude and rescale, elect, fuse.

    Args:
        deltas: ΔWᵢ [d_out, d_in].
        weights: wᵢ.
        density: 1 − p, mean probability with which an entry is kept, 0 to 1.
        epsilon: ε, how far that of the largest entry of a row is above that of the smallest.
        scale: λ.
        elect: Whether to elect signs; without it, the weighted sum.
        generator: Source of the masks.
    """
    density, epsilon = check_share("density", density), check_share("epsilon", epsilon)
    scale = check_factor("scale", scale)
    kept = [dropped(d, keep_probabilities(d, density, epsilon), generator) for d in deltas]
    return scale * (disjoint_mean(kept, weights) if elect else weighted_sum(kept, weights))
