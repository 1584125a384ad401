"""The order of rows in an epoch: a function of seed and epoch alone.

A run that goes on from a checkpoint so sees the rows that it would have seen. Rows of like length
come together where padding costs, and where rows have a task every batch is of one task.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from lorasmith.training.config import TrainConfig

__all__ = ["RowOrder", "epoch_rows", "steps_per_epoch"]


class RowOrder(torch.utils.data.Sampler[int]):
    """The rows in an order that depends on seed and epoch alone.

    Without tasks every row comes once. With tasks the order is made of whole batches of one
    task, in turns: a task with twice the rows has twice the turns, evenly spread. The last
    batch of a task is filled up with rows of that task from the head of the epoch's order.

    Args:
        lengths: Tokens of each row, to batch rows of similar length; None for any order.
        count: Number of rows.
        batch_size: Rows a batch, on all devices together.
        seed: Seed.
        epoch: Gives the epoch when an order is asked for.
        tasks: The task of each row.
    """

    #: Batches among which rows are sorted by length.
    WINDOW = 50

    def __init__(
        self,
        lengths: Sequence[int] | None,
        count: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.lengths, self.count = lengths, count
        self.batch_size, self.seed, self.epoch = batch_size, seed, epoch
        self.tasks = tasks

    def __len__(self) -> int:
        return epoch_rows(self.count, self.tasks, self.batch_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # Seeds of neighbouring runs and epochs must not meet.
        key = hashlib.sha256(f"{self.seed}:{self.epoch()}".encode()).digest()
        generator.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        order: list[int] = torch.randperm(self.count, generator=generator).tolist()
        batches = (
            self._batches(order, generator)
            if self.tasks is None
            else self._in_turns(order, self.tasks, generator)
        )
        return iter([i for batch in batches for i in batch])

    def _batches(self, order: list[int], generator: torch.Generator) -> list[list[int]]:
        """Cuts an order into batches, of rows of like length if lengths are known."""
        size, lengths = self.batch_size, self.lengths
        if lengths is None:
            return [order[i : i + size] for i in range(0, len(order), size)]
        batches: list[list[int]] = []
        window = size * self.WINDOW
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: -lengths[i])
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        # A short batch stays at the end: in front it would shift all others.
        short = [batches.pop()] if len(batches[-1]) < size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [*(batches[k] for k in shuffled), *short]

    def _in_turns(
        self, order: list[int], tasks: Sequence[str], generator: torch.Generator
    ) -> list[list[int]]:
        """Whole batches of one task each; those of a task are evenly spread over the epoch."""
        members: dict[str, list[int]] = {name: [] for name in dict.fromkeys(tasks)}
        for i in order:
            members[tasks[i]].append(i)
        starts = torch.rand(len(members), generator=generator).tolist()
        placed: list[tuple[float, int, list[int]]] = []
        for number, rows in enumerate(members.values()):
            missing = -len(rows) % self.batch_size
            filled = rows + [rows[i % len(rows)] for i in range(missing)]
            batches = self._batches(filled, generator)
            placed += [
                ((k + starts[number]) / len(batches), number, batch)
                for k, batch in enumerate(batches)
            ]
        return [batch for _, _, batch in sorted(placed, key=lambda item: item[:2])]


def epoch_rows(count: int, tasks: Sequence[str] | None, batch_size: int) -> int:
    """Rows of one epoch: with tasks, those that fill up the last batch of each count twice."""
    if tasks is None:
        return count
    return sum(-(-number // batch_size) * batch_size for number in Counter(tasks).values())


def steps_per_epoch(rows: int, config: TrainConfig, processes: int) -> int:
    """Optimiser steps in one pass over the rows."""
    batches = math.ceil(math.ceil(rows / config.batch_size) / processes)
    return max(1, math.ceil(batches / config.gradient_accumulation))
