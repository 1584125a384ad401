"""SIGTERM and Ctrl-C during a run: noted, and left to the loop to act on after the step."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]


class StopSignals:
    """Catches SIGTERM and Ctrl-C for the time of a run.

    The first one asks the run to stop after the step; a second one acts as it would
    without us, for those who cannot wait.

    Attributes:
        received: Number of the signal that came.
        honoured: Whether the run has stopped because of it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = math.inf
        self.honoured = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def waited(self, seconds: float) -> bool:
        """Whether a signal came that long ago."""
        return time.monotonic() - self._at >= seconds

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._at = time.monotonic()
        self._restore()
        name = signal.Signals(number).name
        # Not through logging: its locks may be held where the signal came in.
        os.write(2, f"\n{name}: finishing the step and writing a checkpoint.\n".encode())
