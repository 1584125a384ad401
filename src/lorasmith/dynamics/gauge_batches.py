"""Gauge projection, its arithmetic in place: many r × r products, in batches of equal shape.

Tensors are stacked, multiplied and written back by one call each; a batch has as many elements
as fit a core's cache in float64 or, elsewhere than on a CPU, as keep the device busy. Tensors
and numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Elements of a batch: what fits a core's cache in float64; elsewhere, what keeps a GPU busy.
_CHUNK_CPU, _CHUNK = 2**16, 2**22


def batch_of(like: Tensor) -> int:
    """How many tensors of that size to take at once."""
    chunk = _CHUNK_CPU if like.device.type == "cpu" else _CHUNK
    return max(1, chunk // max(1, like.numel()))


def stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All of them in one tensor [k, …], converted on the way."""
    stacked = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(stacked.unbind()), list(tensors))
    return stacked


def multiply(
    tensors: Sequence[Tensor], matrix: Tensor, *, left: bool, dtype: torch.dtype = torch.float64
) -> None:
    """Each tensor times its r × r matrix, in its own memory."""
    stacked, matrix = stack(tensors, dtype), matrix.to(dtype)
    product = matrix @ stacked if left else stacked @ matrix
    torch._foreach_copy_(list(tensors), list(product.unbind()))


def add_product(tensors: Sequence[Tensor], matrix: Tensor, *, left: bool) -> None:
    """Adds to each float32 tensor its product with an r × r matrix that is small."""
    stacked = stack(tensors, torch.float32)
    product = matrix @ stacked if left else stacked @ matrix
    torch._foreach_add_(list(tensors), list(product.unbind()))
