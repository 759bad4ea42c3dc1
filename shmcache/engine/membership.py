"""Which processes are attached, and which of them live: the process table is this file's.

A process takes a line of the table by locking the byte of that number in the cache's lock file, and raises the line's
generation. The kernel drops the lock when the process ends, however it ends; pids, which mean nothing across pid
namespaces and are reused, prove nothing here. POSIX record locks belong to a process: a forked child has none and
takes a line of its own. They vanish when the process closes *any* descriptor of the file, so it is opened once
(`segment.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.primitives import *
else:
    from shmcache.engine.layout import *
    from shmcache.engine.primitives import *

from shmcache.errors import LockTimeout, TooManyProcesses

__all__ = ["Guard", "Member", "Registry"]

watch_forks()

# Bytes of the lock file beyond those of the process table.
SETUP_BYTE = 1 << 20  # held while the cache is created, attached to, unlinked, or a line is taken
ATOMIC_BYTE = SETUP_BYTE + 1  # held for a compare-and-swap by uncompiled processes
REAPER_BYTE = SETUP_BYTE + 2  # held by the reaper of an ephemeral cache

GENERATION_MASK = (1 << 48) - 1
GUARD_PATIENCE = 0.02  # seconds to wait for a compare-and-swap of another process

_FLOCK = "@qqihh" if sys.platform == "darwin" else "@hhqqi0q"


@cython.final
@cython.cclass
class Member:
    """This process as the segment knows it: its owner id and its line of counters."""

    def __init__(self, words: memoryview, registry: Any) -> None:
        self.words = words
        self.registry = registry
        self.owner = 0
        self.counters = 0

    def count(self, counter: cython.ulonglong, by: cython.ulonglong) -> None:
        """Add to a counter of this process. No other process writes this line, so no atomic addition is needed."""
        word: cython.ulonglong = self.counters + counter
        store(self.words, word, wrap(load(self.words, word) + by))

    def join(self, timeout: float) -> None:
        """Take a line of the process table; raises TooManyProcesses, or LockTimeout after `timeout` seconds."""
        self.registry.take_line(timeout)
        line: cython.ulonglong = self.registry.own_line
        at: cython.ulonglong = self.registry.line(line)
        self.counters = at + P_COUNTERS
        self.owner = line << 48 | (load(self.words, at + P_GENERATION) & GENERATION_MASK)


class Registry:
    """The process table of one cache and the lock file that proves it. `fd` is the only descriptor of that file."""

    def __init__(self, words: memoryview, fd: int, processes: int) -> None:
        self.words = words
        self.fd = fd
        self.processes = processes
        self.own_line = -1
        self._own_epoch = 0

    def line(self, number: int) -> int:
        """The word index of a line of the table."""
        return HEADER_WORDS + number * PROCESS_WORDS

    def take_line(self, timeout: float) -> None:
        """Lock a byte, start a new generation of its line, and fold what its last process counted into the totals."""
        with SetupLock(self.fd, timeout):
            if self._own_epoch == process_epoch():
                return
            line = self._lock_a_line()
            at = self.line(line)
            store(self.words, at + P_GENERATION, load(self.words, at + P_GENERATION) + 1)
            for counter in range(COUNTERS):
                counted = load(self.words, at + P_COUNTERS + counter)
                total = load(self.words, H_TOTALS + counter)
                store(self.words, H_TOTALS + counter, wrap(total + counted))
                store(self.words, at + P_COUNTERS + counter, 0)
            store(self.words, at + P_ATTACHED, time.time_ns())
            store(self.words, at + P_PID, os.getpid())
            self.own_line = line
            self._own_epoch = process_epoch()

    def _lock_a_line(self) -> int:
        for _attempt in range(5):
            # Lines left in order first, those of processes that died after them.
            for left_in_order in (True, False):
                for line in range(self.processes):
                    vacant = load(self.words, self.line(line) + P_PID) == 0
                    if vacant is left_in_order and try_lock_byte(self.fd, line):
                        return line
            time.sleep(0.01)  # a reaper holds them all for a moment
        raise TooManyProcesses(
            f"all {self.processes} places of the process table are taken: detach processes that no longer need the "
            f"cache, or create it larger (a cache of 16 MB or more has {MAX_PROCESSES} places)"
        )

    def leave(self) -> None:
        """Give the line back. Closing the lock file right after drops the lock."""
        if self._own_epoch == process_epoch():
            store(self.words, self.line(self.own_line) + P_PID, 0)
        self._own_epoch = 0

    def is_alive(self, owner: int) -> bool:
        """Whether the process of this owner id still runs."""
        line, generation = owner >> 48, owner & GENERATION_MASK
        if line >= self.processes or load(self.words, self.line(line) + P_GENERATION) & GENERATION_MASK != generation:
            return False
        return line == self.own_line or is_byte_locked(self.fd, line)

    def others_alive(self) -> bool:
        """Whether any other process is attached."""
        return is_byte_locked(self.fd, 0, self.processes)

    def live_lines(self) -> Iterator[int]:
        """The lines whose processes are attached now, this one's included."""
        for line in range(self.processes):
            if load(self.words, self.line(line) + P_PID) and (line == self.own_line or is_byte_locked(self.fd, line)):
                yield line


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
