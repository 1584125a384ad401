"""What a shared subspace keeps of an adapter beside its core, so that a budget is met.

On a layer of which the basis holds U C V, the rest R = ΔW − U C V is kept in part, its leading
singular directions: R ≈ Σ_{j ≤ k} s_j u_j v_jᵀ costs k (d_in + d_out) numbers and gains
Σ_{j ≤ k} s_j². Over all layers the directions with the largest gain for a byte come first
(:func:`keep`), until what is left is within the budget: a knapsack filled in order of worth.

Where the basis holds little of ΔW (rank r), the rest is of rank up to r + rank C and no easier
to keep than ΔW. There the core is zero, and the residual the k' ≤ r leading directions of ΔW
itself, if that is as accurate for no more bytes. So core and residual never take more than the
adapter's own factors in the same codec.

Residuals that are stored in few bits lose by rounding too; :func:`chosen` aims lower for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasmith.core.truncation import Product
from lorasmith.fleet import incremental, share
from lorasmith.fleet.codec import Codec, Rows
from lorasmith.fleet.codes import DIAGONAL, FACTORED, LOADINGS, Code, Layer
from lorasmith.fleet.records import limit

__all__ = ["Part", "chosen", "keep"]

#: Bytes a number takes, scales aside.
_WIDTH: Mapping[Codec, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "int4": 0.5,
    "nf4": 0.5,
}
#: How often a lower aim is tried, so that a budget is met with rounding.
_ATTEMPTS = 5


@dataclass(frozen=True, eq=False)
class Part:
    """What a basis holds of one layer of an adapter.

    Attributes:
        layer: The layer of the subspace, ``None`` if it has none of that name.
        basis: The same, or an empty layer in its place.
        code: What is held.
        energy: ‖ΔW‖².
        lost: ‖ΔW − ΔŴ‖².
        left_over: ΔW − ΔŴ as rows (A [k, d_in], B [k, d_out]), without the residual.
        whole: ΔW likewise.
    """

    layer: Layer | None
    basis: Layer
    code: Code
    energy: float
    lost: float
    left_over: tuple[Tensor, Tensor]
    whole: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, own: Layer | None, code: Code, basis: Layer, A: Tensor, B: Tensor) -> Part:
        """Of a code without a residual; what it loses is that of the code as it is stored."""
        code = replace(
            code,
            left=Rows.pack(code.left, basis.left.codec).unpack(),
            right=Rows.pack(code.right, basis.right.codec).unpack(),
        )
        left, right = basis.wide(code)
        rows_A = torch.cat((A, right @ basis.down.unpack()))
        rows_B = torch.cat((B, -(left @ basis.up.unpack())))
        gone = incremental.square(rows_A, rows_B)
        return cls(own, basis, code, incremental.square(A, B), gone, (rows_A, rows_B), (A, B))

    def core_bytes(self, code: Code) -> float:
        """Bytes of a core."""
        return (
            code.left.numel() * _WIDTH[self.basis.left.codec]
            + code.right.numel() * _WIDTH[self.basis.right.codec]
        )

    def without_core(self) -> Code:
        """A code of nothing, of a kind that the layer can hold beside its others."""
        code = self.code
        if code.kind in (DIAGONAL, LOADINGS):
            return replace(code, left=torch.zeros_like(code.left), right=code.right * 0)
        return replace(code, kind=FACTORED, left=code.left[:0], right=_no_rows(self.basis))

    def rounded(self, codec: Codec) -> float:
        """‖ΔW − ΔŴ‖² with the residual stored in a codec."""
        code = replace(
            self.code,
            residual_up=Rows.pack(self.code.residual_up, codec).unpack(),
            residual_down=Rows.pack(self.code.residual_down, codec).unpack(),
        )
        return float(share.distance(*self.whole, *self.basis.rows(code)))


def _no_rows(layer: Layer) -> Tensor:
    return torch.zeros(0, len(layer.down) // layer.width)


def keep(parts: Mapping[str, Part], allowed: float, codec: Codec = "float32") -> dict[str, Part]:
    """The parts with residuals that bring the whole within a budget for the fewest bytes.

    Args:
        parts: Module name → what the basis holds there; without residuals.
        allowed: The most that may be lost of Σ ‖ΔW‖² over the layers.
        codec: In which residuals will be stored: what a number costs. Rounding is left aside.
    """
    energy = sum(p.energy for p in parts.values())
    gone = sum(p.lost for p in parts.values())
    made = dict(parts)
    if gone <= allowed * energy:
        return made
    spectra = {}
    gains: list[tuple[float, float, str]] = []
    for module, part in parts.items():
        A, B = part.left_over
        spectrum = Product(B.mT.to(torch.float64), A.to(torch.float64)).spectrum()
        spectra[module] = spectrum
        cost = A.shape[1] + B.shape[1]
        gains += [
            (float(s) ** 2 / cost, float(s) ** 2, module) for s in spectrum.S[: spectrum.useful]
        ]
    gains.sort(reverse=True)
    ranks: dict[str, int] = {}
    for _, gain, module in gains:
        if gone <= allowed * energy:
            break
        ranks[module] = ranks.get(module, 0) + 1
        gone -= gain
    for module, k in ranks.items():
        part, spectrum = parts[module], spectra[module]
        lost = float(spectrum.S[k:].square().sum())
        code, found = part.code, spectrum
        A, B = part.whole
        row = (A.shape[1] + B.shape[1]) * _WIDTH[codec]
        own = Product(B.mT.to(torch.float64), A.to(torch.float64)).spectrum()
        tails = own.S.square().flip(0).cumsum(0).flip(0).tolist()
        enough = next((j for j, tail in enumerate(tails) if tail <= lost), len(tails))
        alone = part.without_core()
        if part.core_bytes(alone) + enough * row <= part.core_bytes(code) + k * row:
            code, found, k = alone, own, enough
            lost = tails[k] if k < len(tails) else 0.0
        factors = found.factors(k, 1.0) if k else None
        made[module] = replace(
            part,
            code=code
            if factors is None
            else replace(
                code, residual_up=factors["B"].mT.contiguous(), residual_down=factors["A"]
            ),
            lost=lost,
        )
    return made


def chosen(parts: Mapping[str, Part], allowed: float, codec: Codec) -> tuple[dict[str, Part], bool]:
    """:func:`keep`, such that the budget is met with residuals rounded.

    Returns:
        The parts, and whether the budget is met; where it cannot be in this codec, the best
        that was found.
    """
    energy = sum(p.energy for p in parts.values())
    aim = allowed
    best, least = dict(parts), float("inf")
    for _ in range(_ATTEMPTS):
        made = keep(parts, aim, codec)
        gone = sum(p.rounded(codec) for p in made.values())
        if gone < least:
            best, least = made, gone
        over = gone - limit(allowed) * energy
        if over <= 0 or not aim:
            break
        aim = max(0.0, aim - 1.2 * over / energy)
    return best, least <= limit(allowed) * energy
