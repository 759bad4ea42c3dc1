"""Locks on bytes of a cache's lock file: everything that asks the kernel to lock, or who has locked, is in this file.

They are POSIX record locks: each belongs to a process and is gone with it. They do not exclude threads of one process,
which mutexes do here, and they vanish when the process closes any descriptor of the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import threading
import time

from shmcache.engine.primitives import process_epoch
from shmcache.errors import LockTimeout

__all__ = ["REAPER_BYTE", "SETUP_BYTE", "Guard", "SetupLock", "is_byte_locked", "try_lock_byte"]

# The first bytes are those of the process table (`membership.py`); these lie beyond.
SETUP_BYTE = 1 << 20  # held while the cache is created, attached to, unlinked, or a line is taken
ATOMIC_BYTE = SETUP_BYTE + 1  # held for a compare-and-swap by uncompiled processes
REAPER_BYTE = SETUP_BYTE + 2  # held by the reaper of an ephemeral cache

GUARD_PATIENCE = 0.02  # seconds to wait for a compare-and-swap of another process

_FLOCK = "@qqihh" if sys.platform == "darwin" else "@hhqqi0q"


class SetupLock:
    """What creating, attaching, unlinking and taking a line exclude each other with: a mutex among the threads of this
    process, a byte of the lock file among processes. It is gone with the process that holds it."""

    def __init__(self, fd: int, timeout: float) -> None:
        self.fd = fd
        self.timeout = timeout

    def __enter__(self) -> None:
        deadline = time.monotonic() + self.timeout
        if not _own_mutex(_setup_mutexes).acquire(timeout=self.timeout):
            raise self._timed_out()
        try:
            while not try_lock_byte(self.fd, SETUP_BYTE):
                if time.monotonic() > deadline:
                    raise self._timed_out()
                time.sleep(0.0005)
        except BaseException:
            _own_mutex(_setup_mutexes).release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, SETUP_BYTE)
        finally:
            _own_mutex(_setup_mutexes).release()

    def _timed_out(self) -> LockTimeout:
        return LockTimeout(
            f"somebody has been creating, attaching to or unlinking this cache for {self.timeout} s, longer than "
            f"lock_timeout allows: look for a stopped process (SIGSTOP) with `shmcache ls`"
        )


# A mutex may be held by a thread that a fork left behind, so each process has its own.
_setup_mutexes: dict[int, threading.Lock] = {}
_atomic_mutexes: dict[int, threading.Lock] = {}


def _own_mutex(mutexes: dict[int, threading.Lock]) -> threading.Lock:
    return mutexes.setdefault(process_epoch(), threading.Lock())


class Guard:
    """Makes a compare-and-swap of uncompiled code atomic: a mutex among threads, a byte lock among processes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def enter(self) -> bool:
        """Exclude all others; False after a while, for instance because one of them was stopped just here."""
        deadline = time.monotonic() + GUARD_PATIENCE
        if not _own_mutex(_atomic_mutexes).acquire(timeout=GUARD_PATIENCE):
            return False
        try:
            while not try_lock_byte(self.fd, ATOMIC_BYTE):
                if time.monotonic() > deadline:
                    _own_mutex(_atomic_mutexes).release()
                    return False
                time.sleep(0)
        except BaseException:
            _own_mutex(_atomic_mutexes).release()
            raise
        return True

    def leave(self) -> None:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, ATOMIC_BYTE)
        finally:
            _own_mutex(_atomic_mutexes).release()


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
