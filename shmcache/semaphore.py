"""Where waiters for a lock sleep: one named POSIX semaphore a shard.

The creator of a cache creates them; others open one when they first have to wait. (Nobody else creates any: glibc does
that by way of a temporary file, which a process killed at that moment would leave behind.) Nothing depends on a
semaphore being there: a sleep lasts a millisecond, so losing a wake-up, or the semaphore, costs no
more than that.
"""

from __future__ import annotations

import contextlib
import time

import posix_ipc

__all__ = ["Sleeper"]

SLEEP = 0.001  # seconds
_UNAVAILABLE = (posix_ipc.Error, OSError, ValueError)


class Sleeper:
    """The semaphore of one shard. `name` is a POSIX name, `/...`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._semaphore: posix_ipc.Semaphore | None = None
        self._tried = False

    def create(self) -> None:
        """Create the semaphore."""
        if posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED:
            with contextlib.suppress(*_UNAVAILABLE):
                self._semaphore = posix_ipc.Semaphore(self.name, posix_ipc.O_CREX, mode=0o600, initial_value=0)

    def sleep(self) -> bool:
        """Sleep until woken or for a millisecond; whether it was a wake-up."""
        semaphore = self._open()
        if semaphore is None:
            time.sleep(SLEEP / 2)
            return False
        try:
            semaphore.acquire(SLEEP)
        except posix_ipc.BusyError:
            return False
        except posix_ipc.SignalError:
            return False
        return True

    def wake(self) -> None:
        """Wake one sleeper."""
        semaphore = self._open()
        if semaphore is not None:
            with contextlib.suppress(*_UNAVAILABLE):
                semaphore.release()

    def unlink(self) -> None:
        """Remove the semaphore's name; those who have it open keep it."""
        with contextlib.suppress(*_UNAVAILABLE):
            posix_ipc.unlink_semaphore(self.name)

    def _open(self) -> posix_ipc.Semaphore | None:
        if self._semaphore is None and not self._tried and posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED:
            self._tried = True
            with contextlib.suppress(*_UNAVAILABLE):
                self._semaphore = posix_ipc.Semaphore(self.name)
        return self._semaphore
