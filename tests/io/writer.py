"""What a second process does in a test; imports little, since it starts anew."""

from __future__ import annotations

from pathlib import Path

import torch

import lorasmith as ls


def save_often(path: Path, alpha: float, times: int) -> None:
    """Saves an adapter again and again whose values and configuration all tell ``alpha``."""
    torch.set_num_threads(1)
    config = ls.LoRAConfig(r=2, alpha=alpha, targets="q_proj")
    values = {"A": torch.full((2, 6), alpha), "B": torch.full((4, 2), alpha)}
    weights = ls.AdapterWeights.from_tensors(config, {"0.q_proj": values, "1.q_proj": values})
    for _ in range(times):
        weights.save(path)
