"""Where waiters for a lock sleep: one named POSIX semaphore a shard.

The creator of a cache creates them; others open one when they first have to wait. (Nobody else creates any: glibc does
that by way of a temporary file, which a process killed at that moment would leave behind.) Nothing depends on a
semaphore being there: a sleep lasts a millisecond, so losing a wake-up, or the semaphore, costs no
more than that.

That millisecond is one of the monotonic clock. `sem_timedwait`, which is posix_ipc's way to wait, counts on the time of
day: set back by an hour while somebody sleeps, the sleep would last an hour.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import posix_ipc

from shmcache.log import warn

__all__ = ["Sleeper"]

SLEEP_NS = 1_000_000
_HAS_FILES = sys.platform == "linux"  # semaphores are files of /dev/shm
_UNAVAILABLE = (posix_ipc.Error, OSError, ValueError)


class Sleeper:
    """The semaphore of one shard. `name` is a POSIX name, `/...`, `path` the file that it has, where it has one."""

    _semaphore: posix_ipc.Semaphore | None = None  # also of one whose making was interrupted

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self._waitable: int | None = None  # its address, 0 if it cannot be had
        self._tried = False

    def create(self) -> bool:
        """Create the semaphore, in place of one that somebody has left; whether that was possible."""
        self._tried = True
        self.unlink()
        with contextlib.suppress(*_UNAVAILABLE):
            self._semaphore = posix_ipc.Semaphore(self.name, posix_ipc.O_CREX, mode=0o600, initial_value=0)
        return self._semaphore is not None

    def sleep(self) -> bool:
        """Sleep until woken or for a millisecond; whether it was a wake-up."""
        semaphore = self._open()
        if semaphore is None:
            time.sleep(SLEEP_NS / 2e9)
            return False
        if self._waitable is None:
            self._waitable = self._open_waitable()
        if self._waitable:
            deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + SLEEP_NS
            timespec = struct.pack("@ll", *divmod(deadline, 1_000_000_000))
            return bool(_libc().sem_clockwait(self._waitable, time.CLOCK_MONOTONIC, timespec) == 0)
        for pause in (0, SLEEP_NS / 2e9):
            time.sleep(pause)
            with contextlib.suppress(posix_ipc.BusyError, posix_ipc.SignalError):
                semaphore.acquire(0)
                return True
        return False

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
                if self._waitable:
                    _libc().sem_close(self._waitable)

    def _open(self) -> posix_ipc.Semaphore | None:
        if self._semaphore is None and not self._tried:
            self._tried = True
            try:
                if self._is_ours():
                    self._semaphore = posix_ipc.Semaphore(self.name)
            except OSError:
                self._tried = False  # too many open files, for instance
                return None
            except (posix_ipc.Error, ValueError):
                pass
            if self._semaphore is None:
                warn(
                    "the semaphore %s is missing, or not this user's: who waits for its lock is not woken, but looks "
                    "again after half a millisecond",
                    self.name,
                )
        return self._semaphore

    def _open_waitable(self) -> int:
        """The address of the semaphore, which the C library gives every time it is opened; 0 if that is no use."""
        if _libc() is None or not self._is_ours():
            return 0
        return int(_libc().sem_open(self.name.encode(), 0) or 0)

    def _is_ours(self) -> bool:
        """Whether nobody else can cut the file short under us, which would be a SIGBUS."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return not _HAS_FILES
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


@functools.cache
def _libc() -> Any:
    """The C library, where it can wait by the monotonic clock (glibc 2.30 and later), else None."""
    try:
        import ctypes  # only here, for most processes never wait

        libc = ctypes.CDLL(None)
        libc.sem_open.argtypes = [ctypes.c_char_p, ctypes.c_int]
        libc.sem_open.restype = ctypes.c_void_p
        libc.sem_clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p]
        libc.sem_close.argtypes = [ctypes.c_void_p]
    except (ImportError, OSError, AttributeError):
        return None
    return libc
