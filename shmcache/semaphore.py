"""Where waiters for a lock sleep: one named POSIX semaphore a shard.

The creator of a cache creates them; others open one when they first have to wait. (Nobody else creates any: glibc does
that by way of a temporary file, which a process killed at that moment would leave behind.) Nothing depends on a
semaphore being there: a sleep lasts a millisecond, so losing a wake-up, or the semaphore, costs no
more than that.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import posix_ipc

__all__ = ["Sleeper"]

SLEEP = 0.001  # seconds
_HAS_FILES = sys.platform == "linux"  # semaphores are files of /dev/shm
_UNAVAILABLE = (posix_ipc.Error, OSError, ValueError)


class Sleeper:
    """The semaphore of one shard. `name` is a POSIX name, `/...`, `path` the file that it has, where it has one."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._semaphore: posix_ipc.Semaphore | None = None
        self._tried = False

    def create(self) -> None:
        """Create the semaphore, in place of one that somebody has left."""
        if posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED:
            self.unlink()
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

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Only here does nobody sleep on it any more: closing it unmaps the memory. At the end of the interpreter the
        # globals of this module may be gone, and the process will be soon.
        if self._semaphore is not None and not _is_finalizing():
            with contextlib.suppress(*_UNAVAILABLE):
                self._semaphore.close()

    def _open(self) -> posix_ipc.Semaphore | None:
        if self._semaphore is None and not self._tried and posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED:
            self._tried = True
            try:
                if self._is_ours():
                    self._semaphore = posix_ipc.Semaphore(self.name)
            except OSError:
                self._tried = False  # too many open files, for instance
            except (posix_ipc.Error, ValueError):
                pass
        return self._semaphore

    def _is_ours(self) -> bool:
        """Whether nobody else can cut the file short under us, which would be a SIGBUS."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return not _HAS_FILES
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
