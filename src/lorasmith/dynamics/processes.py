"""Whether several processes train together, whoever has started them."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["distributed"]


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
