"""Two classifications of what happened to a unit of W, and the verdict on the whole.

**EgoRA's**, as published: by the angle θ between the flattened W and W', and r = ‖W'‖ / ‖W‖,

    preserved      θ < 5°, 0.9 ≤ r < 1.1          substitutive    θ ≥ 5°, r ≥ 0.9
    additive       θ < 5°, r ≥ 1.1                damaged         the rest (r < 0.9)

with the verdict on θ̄, the mean of θ over the units:  SAFE < 3° ≤ WARNING < 5° ≤ DANGER.

The four say little of what was lost. "Damaged" asks for the norm alone: weights replaced by
random numbers of the same size are "substitutive" (0 % damaged), and W scaled by 0.85, which
many a normalisation undoes entirely, is 100 % damaged. A head turned by 90° shares its class
with one turned by 6°, and a large addition that leaves all of W in place shares it too.

**Ours** places W' in the plane of W and what is new,

    W' = κ W + N,  N ⊥ W        κ = ⟨W, W'⟩ / ‖W‖²     the share of W that is still there
                                ν = ‖N‖ / ‖W‖          what is there beside it
    tan θ = ν / κ,   r² = κ² + ν²,   ρ² = (κ − 1)² + ν² = ‖W' − W‖² / ‖W‖²

and asks which one act explains it:

1. *unchanged*: ρ ≤ 2 f. Rounding to the storage dtype alone gives ρ = f, the noise floor
   (``core.rotation.noise_floor``).
2. *replaced*: κ ≤ 0, or κ < 1/√2 and ν > κ. Less than half of W's energy (κ²) is left, and
   most of what is there is something else; for a rotation that keeps the norm, beyond 45°.
   A unit set to zero, or of the opposite sign, has nothing of W left and is replaced too.
3. Otherwise the nearest of three pure acts, distances being in units of ‖W‖:

       scaled      W' = κ W               distance ν
       turned      κ² + ν² = 1            distance |κ − √(1 − ν²)|     (the norm stays)
       extended    W' = W + N             distance |κ − 1|             (W stays whole)

   For small ν the last two differ by ν²/2 alone. An update in a random direction has a
   share along W of ν / √n by chance (n numbers in the unit), and rounding one of f / √n.
   While ν²/2 < 3 √(ν² + f²) / √n the two cannot be told apart, and the unit is *turned*:
   an angle is all that can be said of it. For a head of 64 × 576 that is below 1.8°.

So one head turned by 90° and random weights are replaced, 0.85 W is scaled, and any addition
across W, be it of rank 1 and twice as large, is extended. A unit that was zero before is
extended (it had nothing to lose), or unchanged.
"""

from __future__ import annotations

import math

from lorasmith.diagnostics.records import Change, Mode, Verdict

__all__ = [
    "CHANCE",
    "DANGER_DEG",
    "PRESERVED_DEG",
    "RATIO_HIGH",
    "RATIO_LOW",
    "REPLACED_KEPT",
    "UNCHANGED_FLOORS",
    "WARNING_DEG",
    "change_of",
    "mode_of",
    "verdict_of",
]

#: EgoRA: below this angle a unit is preserved or additive.
PRESERVED_DEG = 5.0
#: EgoRA: norm ratios of a preserved unit.
RATIO_LOW, RATIO_HIGH = 0.9, 1.1
#: EgoRA: θ̄ from which the verdict is WARNING, and DANGER.
WARNING_DEG, DANGER_DEG = 3.0, 5.0
#: Relative changes up to so many times what rounding makes are none.
UNCHANGED_FLOORS = 2.0
#: Below this share κ of W, with more beside it, W is replaced: half of its energy.
REPLACED_KEPT = math.sqrt(0.5)
#: Standard deviations of chance by which turned and extended must differ.
CHANCE = 3.0


def mode_of(theta_deg: float, norm_ratio: float) -> Mode:
    """EgoRA's class of a unit."""
    if theta_deg < PRESERVED_DEG:
        if norm_ratio >= RATIO_HIGH:
            return "additive"
        return "preserved" if norm_ratio >= RATIO_LOW else "damaged"
    return "substitutive" if norm_ratio >= RATIO_LOW else "damaged"


def verdict_of(theta_bar_deg: float) -> Verdict:
    """EgoRA's verdict on θ̄."""
    if theta_bar_deg < WARNING_DEG:
        return "SAFE"
    return "WARNING" if theta_bar_deg < DANGER_DEG else "DANGER"


def change_of(kept: float, novel: float, floor: float, parameters: int) -> Change:
    """Our class of a unit.

    Args:
        kept: κ.
        novel: ν; infinite for a unit that was zero and is not any more.
        floor: f, what rounding to the storage dtype makes of ρ by itself (radians).
        parameters: n, numbers in the unit.
    """
    if math.hypot(kept - 1.0, novel) <= UNCHANGED_FLOORS * floor:
        return "unchanged"
    if math.isinf(novel):
        return "extended"
    if kept <= 0 or (kept < REPLACED_KEPT and novel > kept):
        return "replaced"
    scaled = novel
    turned = abs(kept - math.sqrt(max(0.0, 1.0 - novel * novel)))
    extended = abs(kept - 1.0)
    if scaled < min(turned, extended):
        return "scaled"
    by_chance = CHANCE * math.hypot(novel, floor) / math.sqrt(max(1, parameters))
    if novel * novel / 2 < by_chance:
        return "turned"
    return "extended" if extended <= turned else "turned"
