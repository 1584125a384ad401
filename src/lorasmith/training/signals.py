"""SIGTERM and Ctrl-C during a run: the step is finished, or given up if it takes long.

The loop looks after each step whether a signal came, writes a checkpoint and stops. A batch may
take longer than whoever sent the signal waits; and Python runs a signal's handler between two of
its own instructions, of which a backward pass is one. So the number of a signal goes through a
socket (``signal.set_wakeup_fd``) to a thread that reads it at once.

That thread can have the checkpoint of the last whole step written while the main thread is still
in a batch: nothing that a checkpoint holds changes there, but random numbers and counts, which are
kept from the end of the step before. A lock tells the two apart. The main thread holds it, but for
the time in which it changes nothing (:meth:`StopSignals.unchanging`); where it takes it again and
finds that the checkpoint has been written, it leaves the batch by :class:`StepGivenUpError`. If it
does not come to that in time, the process is ended, where it may be. All this is done by yet
another thread, so that the first one sees a second signal meanwhile.

What is ignored when the run begins stays ignored (a shell starts ``COMMAND &`` with Ctrl-C
ignored), and other signals are handed on to an event loop that had the descriptor before.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import no_grad

__all__ = ["GIVE_UP_AFTER", "LEAVE_AFTER", "StepGivenUpError", "StopSignals"]

#: Seconds after a signal from which a step is given up.
GIVE_UP_AFTER = 15.0
#: Seconds after its checkpoint is written from which the process is ended from within a batch.
LEAVE_AFTER = 3.0
#: Seconds for the main thread to act on a second signal.
_AT_ONCE = 1.0
#: Seconds within which signals are one.
_SAME = 1.0
_PAUSE = 0.05

_HANDLED = (signal.SIGTERM, signal.SIGINT)
_OVER = b"\0"


_active: weakref.WeakSet[StopSignals] = weakref.WeakSet()


class StepGivenUpError(Exception):
    """A signal came, and the checkpoint of the step before has been written meanwhile."""


class StopSignals:
    """Catches SIGTERM and Ctrl-C for the time of a run.

    The first one asks the run to stop after the step; a second one, over a second later, acts as it
    would without us, for those who cannot wait. Outside of the main thread there are no signals,
    and nothing happens here.

    Args:
        save: Writes the checkpoint of the last whole step; called by a thread of its own. ``None``
            if steps are never given up.
        leave: Called by that thread before it ends the process, if a batch still goes on long
            after its checkpoint is written; ``None`` if the process must not be ended.
        wait: Whether the main thread is given time to leave the batch by itself.

    Attributes:
        received: Number of the signal that came.
        honoured: Whether the run has stopped because of it.
        saved: Whether the checkpoint was written while a batch was going on.
    """

    def __init__(
        self,
        save: Callable[[], None] | None = None,
        leave: Callable[[], None] | None = None,
        *,
        wait: bool = True,
    ) -> None:
        self.received: int | None = None
        self._at = math.inf
        self._again = False
        self.honoured = self.saved = False
        self._save, self._leave, self._wait_for_main = save, leave, wait
        # Of its owner alone: a second Ctrl-C may come where the main thread has not got it back.
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._handled: set[signal.Signals] = set()
        self._previous: dict[int, Any] = {}
        self._previous_socket = -1
        self._sockets: tuple[socket.socket, ...] = ()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is not threading.main_thread():
            return self
        # None is a handler of C, which could not be put back.
        self._handled = {n for n in _HANDLED if signal.getsignal(n) not in (signal.SIG_IGN, None)}
        self._lock.acquire()
        self._sockets = socket.socketpair()
        self._sockets[1].setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="lorasmith-signals", daemon=True)
        self._thread.start()
        self._previous_socket = signal.set_wakeup_fd(
            self._sockets[1].fileno(), warn_on_full_buffer=False
        )
        for number in self._handled:
            self._previous[number] = signal.signal(number, self._note)
        _active.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.keep_step()
        self._restore()
        _active.discard(self)

    def keep_step(self) -> None:
        """From now on no step is given up; a signal is only noted."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._over.set()
        signal.set_wakeup_fd(self._previous_socket)
        with contextlib.suppress(OSError):
            self._sockets[1].send(_OVER)
        with contextlib.suppress(RuntimeError):  # when it is not ours any more, see __init__
            while True:
                self._lock.release()
        thread.join()
        for one in self._sockets:
            one.close()

    # -- the main thread -----------------------------------------------------------------

    def forked(self) -> None:
        """In a process that was forked meanwhile: its signals are not the run's."""
        signal.set_wakeup_fd(-1)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            if self._thread is None:  # nobody else notes the time
                self._at = time.monotonic()
        elif self._again or (self._thread is None and time.monotonic() - self._at > _SAME):
            self._restore()
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def unchanging(self) -> Iterator[None]:
        """Around what changes nothing that a checkpoint holds: one may be written meanwhile.

        Raises:
            StepGivenUpError: It has been.
        """
        if self._thread is None:
            yield
            return
        self._lock.release()
        try:
            yield
        finally:
            self._take()
        if self.saved:
            raise StepGivenUpError

    def _take(self) -> None:
        # A signal that comes just before the wait begins would be seen only at its end.
        while not self._lock.acquire(timeout=_PAUSE):
            pass

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Within :meth:`unchanging`, around what does change something after all.

        Raises:
            StepGivenUpError: A checkpoint has been written.
        """
        if self._thread is None:
            yield
            return
        self._take()
        try:
            if self.saved:
                raise StepGivenUpError
            yield
        finally:
            self._lock.release()

    # -- the thread ----------------------------------------------------------------------

    def _watch(self) -> None:
        number = self._next(None)
        if number is None:
            return
        self._at = time.monotonic()
        self.received = number
        name = signal.Signals(number).name
        if sys.__stderr__ is not None:  # or else 2 may be any file
            # Not through logging: its locks may be held where the signal came in.
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: finishing the step and writing a checkpoint.\n".encode())
        if self._save is None or self._wait(self._at + GIVE_UP_AFTER):
            self._wait(math.inf)
            return
        saver = threading.Thread(
            target=self._give_up,
            args=(number, self._save),
            name="lorasmith-signals-save",
            daemon=True,
        )
        saver.start()
        self._wait(math.inf)
        saver.join()

    def _give_up(self, number: int, save: Callable[[], None]) -> None:
        """Writes the checkpoint, and ends the process if the batch still goes on later."""
        with self._main_unchanging() as reached:
            if not reached or self.honoured:
                return
            # What fails here is tried again by the main thread after the step, and said there.
            with contextlib.suppress(Exception), no_grad():
                save()
                self.saved = True
            if self.saved and not self._wait_for_main:
                self._end(number)
        if not self.saved or self._leave is None or self._over.wait(LEAVE_AFTER):
            return
        with self._main_unchanging() as reached:
            if reached:
                self._end(number)

    def _end(self, number: int) -> None:
        try:
            if self._leave is not None:
                self._leave()
        finally:
            os._exit(128 + number)

    @contextlib.contextmanager
    def _main_unchanging(self) -> Iterator[bool]:
        """Keeps the main thread from changing anything; False if the run is over."""
        with self._lock:
            yield not self._over.is_set()

    def _wait(self, until: float) -> bool:
        """Waits until that time, and sees to a second signal; True if the run is over by then."""
        while not self._over.is_set():
            left = until - time.monotonic()
            number = self._next(None if left == math.inf else max(left, 0.0))
            if number is None:
                break
            # A terminal and a launcher may both send the first one.
            if not self._again and time.monotonic() - self._at > _SAME:
                self._again = True
                os.kill(os.getpid(), number)  # once more, for the handler to act on
                if self._leave is not None and not self._over.wait(_AT_ONCE):
                    os._exit(128 + number)
        return self._over.is_set()

    def _next(self, seconds: float | None) -> int | None:
        """The next signal; ``None`` if there is none for so long, or the run is over."""
        receiver = self._sockets[0]
        receiver.settimeout(seconds)
        try:
            while (data := receiver.recv(1)) not in (_OVER, b""):
                if data[0] in self._handled:
                    return data[0]
                self._hand_on(data)
        except (TimeoutError, BlockingIOError):
            pass
        return None

    def _hand_on(self, data: bytes) -> None:
        """To whoever had the descriptor, a socket where it is an event loop's."""
        if self._previous_socket >= 0:
            with contextlib.suppress(OSError):
                os.write(self._previous_socket, data)


def _forked() -> None:
    for active in list(_active):
        active.forked()
    _active.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
