"""Many small matrices on several cores.

A batched product or decomposition of matrices of 16 x 16 is split between the threads of PyTorch
and waits for the last of them, each time. Of hundreds of thousands of such calls that is most of
the work, and on a machine that does something else besides, where a thread may not run for
milliseconds, nearly all of it (compressing the same fleet took 3.6 s with one thread and 135 s with
two). Here every thread has stacks of layers of its own and works on them alone, so that nothing
is waited for but the end; results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["each", "single"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@contextmanager
def single() -> Iterator[int]:
    """One thread for what is inside; gives the number there were, and sets it again."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield threads
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def each(
    run: Callable[[_In], _Out],
    items: Sequence[_In],
    *,
    workers: int | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[_Out]:
    """``run`` of each item, on as many threads as PyTorch may use, each of them for itself.

    Args:
        run: Called without gradients, with one thread for the operations inside.
        items: Their arguments.
        workers: The most that run at a time.
        tell: Called with the number of items done, in order.
    """
    found: list[_Out] = []

    def keep(value: _Out) -> None:
        found.append(value)
        if tell is not None:
            tell(len(found))

    def alone(item: _In) -> _Out:
        # The number of threads and the gradient mode are those of each thread.
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        with torch.no_grad():
            return run(item)

    with single() as threads:
        threads = min(threads, len(items), max(1, workers or threads))
        if threads <= 1:
            for item in items:
                keep(alone(item))
            return found
        with ThreadPoolExecutor(threads, "lorasmith-fleet") as pool:
            waiting = [pool.submit(alone, item) for item in items]
            try:
                for future in waiting:
                    keep(future.result())
            finally:
                for future in waiting:
                    future.cancel()
    return found
