"""Locks on bytes of a cache's lock file: everything that asks the kernel to lock, or who has locked, is in this file.

They are POSIX record locks: each belongs to a process and is gone with it. They do not exclude threads of one process,
which mutexes do here, and they vanish when the process closes any descriptor of the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator

from shmcache.engine.primitives import process_epoch
from shmcache.errors import LockTimeout

__all__ = ["REAPER_BYTE", "SETUP_BYTE", "Guard", "Mutex", "is_byte_locked", "setup_lock", "try_lock_byte"]

# The first bytes are those of the process table (`membership.py`); these lie beyond.
SETUP_BYTE = 1 << 20  # held while the cache is created, attached to, unlinked, or a line is taken
ATOMIC_BYTE = SETUP_BYTE + 1  # held for a compare-and-swap by uncompiled processes
REAPER_BYTE = SETUP_BYTE + 2  # held by the reaper of an ephemeral cache

GUARD_PATIENCE = 0.02  # seconds to wait for a compare-and-swap of another process

_FLOCK = "@qqihh" if sys.platform == "darwin" else "@hhqqi0q"


class Mutex:
    """A lock among threads that an exception raised by a signal handler cannot leave locked, wherever it strikes.

    A signal handler or finalizer that comes back to it on the thread that has it would wait for itself: it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def is_locked(self) -> bool:
        return self._lock.locked()

    # A generator that is abandoned anywhere runs its `finally`; a class with __enter__ and __exit__ would not.
    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Take the lock for a `with` block; raises LockTimeout if this thread has it already."""
        if self._owner == threading.get_ident():
            raise LockTimeout(
                "this thread is in the middle of a cache operation, so a signal handler or finalizer that runs within "
                "it cannot use the cache"
            )
        with self._lock:
            try:
                self._owner = threading.get_ident()
                yield
            finally:
                self._owner = 0


# A mutex may be held by a thread that a fork left behind, so each process has its own.
_setup_mutexes: dict[int, Mutex] = {}
_atomic_mutexes: dict[int, Mutex] = {}


def _own_mutex(mutexes: dict[int, Mutex]) -> Mutex:
    return mutexes.setdefault(process_epoch(), Mutex())


@contextlib.contextmanager
def setup_lock(fd: int, timeout: float) -> Iterator[None]:
    """What creating, attaching, unlinking and taking a line exclude each other with, in this process and among all.

    Raises LockTimeout when others take longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with _own_mutex(_setup_mutexes).hold():
        try:
            while not try_lock_byte(fd, SETUP_BYTE):
                if time.monotonic() > deadline:
                    raise LockTimeout(
                        f"somebody has been creating, attaching to or unlinking this cache for {timeout} s, longer "
                        f"than lock_timeout allows: look for a stopped process (SIGSTOP) with `shmcache ls`"
                    )
                time.sleep(0.0005)
            yield
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, SETUP_BYTE)


class Guard:
    """Makes a compare-and-swap of uncompiled code atomic, in this process and among all."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Exclude all others; False when that took too long, for instance because one of them was stopped just here."""
        deadline = time.monotonic() + GUARD_PATIENCE
        with _own_mutex(_atomic_mutexes).hold():
            if self.fd < 0:
                yield False  # closed by another thread
                return
            try:
                held = try_lock_byte(self.fd, ATOMIC_BYTE)
                while not held and time.monotonic() < deadline:
                    time.sleep(0)
                    held = try_lock_byte(self.fd, ATOMIC_BYTE)
                yield held
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, ATOMIC_BYTE)

    def close(self) -> None:
        """Let no thread of this process hold it from now on."""
        with _own_mutex(_atomic_mutexes).hold():
            self.fd = -1


def try_lock_byte(fd: int, byte: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def is_byte_locked(fd: int, byte: int, count: int = 1) -> bool:
    """Whether another process holds any of these bytes; the own process's locks do not show."""
    fields = (byte, count, 0, fcntl.F_WRLCK, os.SEEK_SET)
    if sys.platform != "darwin":
        fields = (fcntl.F_WRLCK, os.SEEK_SET, byte, count, 0)
    answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(_FLOCK, *fields)))
    return bool(answer[3 if sys.platform == "darwin" else 0] != fcntl.F_UNLCK)
