"""LoftQ: start from what quantising W to four bits loses.

Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
(arXiv 2310.08659), equation 6 and algorithm 1; NF4 as in Dettmers et al. 2023 (arXiv
2305.14314), appendix E, in blocks of 64 along a row, as bitsandbytes has it.

    Q quantised weight,   W − Q = U S Vᵀ,
    B0 = U_r (S_r / s)^½ [d_out, r],   A0 = (S_r / s)^½ V_rᵀ [r, d_in]

so that s B0 A0 is the best rank-r approximation of the error W − Q. On what layer it sits
decides what acts at t = 0:

* **On a quantised layer**, whose base acts with Q, with the unquantised weights given
  (``attach(..., originals=...)``): Q + s B A. This is *not* the identity of the quantised
  model but closer to the unquantised one, which is the point. The file is a plain LoRA of
  rank r for that quantised base.
* **On a layer in full precision** (a model that is to be served with a base quantised to
  NF4): W + s (B A − B0 A0), the identity of the model as it is. The quantised base with B
  and A alone, Q + s B A, differs from it by (W − Q) − s B0 A0 at every step of the training,
  which is what LoftQ makes small. Saved are [A; A0] and [B, −B0], for the base in full
  precision, as with every initialisation that takes over a part of W.

The base weights are not written, so Q is the quantisation of W itself: one step of algorithm
1, as in PEFT's ``replace_lora_weights_loftq``. With ``iterations`` above 1 (full precision
only) the steps alternate, Q_t = nf4(W − s B_{t−1} A_{t−1}), and the base to serve is the Q of
:func:`alternate`, not that of W.

Deviation from PEFT: it does not divide by s, so that its error is corrected only where
alpha = r.

Needs W in plain form, or a quantised layer that can be dequantised and ``originals``. Not
possible where r exceeds min(d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.init.pissa import principal
from lorasmith.init.types import (
    NO_STATISTICS,
    Initialisation,
    Shape,
    Start,
    Weight,
    blank,
    check_number,
    check_rank,
    check_scaling,
)

__all__ = ["NF4", "LoftQ", "alternate", "nf4"]

#: The 16 values of NF4, for weights divided by the largest absolute value of their block.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_BLOCK = 64


def nf4(weight: Tensor) -> Tensor:
    """W [d_out, d_in] as four bits a value hold it: quantised to NF4 and back, float32."""
    levels = torch.tensor(NF4, device=weight.device)
    flat = weight.to(torch.float32).reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    scaled = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)
    rounded = levels[torch.bucketize(scaled, between)] * largest
    return rounded.view(-1)[: len(flat)].view(weight.shape)


def alternate(weight: Tensor, rank: int, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: Q [d_out, d_in], L [d_out, r] and R [r, d_in] with W ≈ Q + L R.

    Args:
        weight: W [d_out, d_in].
        rank: r.
        iterations: T, how often quantising and decomposing alternate.

    Returns:
        Q is what the base must hold, dequantised; all are float32.
    """
    w = weight.to(torch.float32)
    target = w
    for _ in range(iterations):
        q = nf4(target)
        u, s, vt = principal(w - q, rank)
        root = s.sqrt()
        left, right = (u * root).to(torch.float32), (root[:, None] * vt).to(torch.float32)
        target = w - left @ right
    return q, left, right


@dataclass(frozen=True)
class LoftQ(Initialisation):
    """A0 and B0 as above.

    Args:
        iterations: T of algorithm 1.
    """

    name: ClassVar[str] = "loftq"

    iterations: int = 1

    def __post_init__(self) -> None:
        check_number(self.name, "iterations", self.iterations, at_least=1, whole=True)

    @property
    def reads_weight(self) -> bool:
        return True

    @property
    def corrects(self) -> bool:
        return True

    def __call__(
        self,
        weight: Weight,
        shape: Shape,
        rank: int,
        scaling: float,
        statistics: Mapping[str, Any] = NO_STATISTICS,
    ) -> Start:
        check_rank(self.name, rank, min(shape.d_in, shape.d_out), "r singular vectors of W − Q")
        check_scaling(self.name, scaling)
        original = statistics.get("original")
        if shape.device.type == "meta":
            return blank(shape, rank, takes_over=original is None)
        if original is None:
            _, left, right = alternate(weight(), rank, self.iterations)
        elif self.iterations > 1:
            raise ConfigError(
                "A base that is already quantised cannot be quantised again.",
                expected="iterations = 1",
                got=self.iterations,
                key="init_options['iterations']",
            )
        else:
            q = weight().to(torch.float32)
            u, s, vt = principal(original(q) - q, rank)
            left, right = u * s.sqrt(), s.sqrt()[:, None] * vt
        root = scaling**0.5
        a, b = (right / root).to(torch.float32), (left / root).to(torch.float32)
        return Start(a, b, takes_over=original is None)
