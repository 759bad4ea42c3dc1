"""Which processes are attached, and which of them live: the process table is this file's.

A process takes a line of the table by locking the byte of that number in the cache's lock file, and raises the line's
generation. The kernel drops the lock when the process ends, however it ends. POSIX record locks belong to a process: a
forked child has none and takes a line of its own. They vanish when the process closes *any* descriptor of the file, so
it is opened once (`descriptors.py`); and as other code of the process may open and close it, `join` is repeated now and
then. Until then the process is known by its pid and the time of its start: a locked byte proves that it lives, and one
that is not locked proves its death, unless that very process is seen to run: then it is given a second to end what it
may be doing. (Not for ever: it may have become another program.)
"""

from __future__ import annotations

import os
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

from shmcache.engine.bytelock import (
    forked_within,
    is_byte_locked,
    release_abandoned,
    try_lock_byte,
    under_setup_lock,
    unlock_byte,
)
from shmcache.errors import CacheClosed, TooManyProcesses

__all__ = ["Member", "Registry"]

watch_forks()

_count_mutexes: dict[int, threading.RLock] = {}  # one a process: a fork may leave a locked one behind

os.register_at_fork(after_in_child=lambda: release_abandoned(_count_mutexes.values()))

GENERATION_MASK = (1 << 48) - 1
GRACE_NS = 1_000_000_000  # far more than an operation takes; and whoever has become another program ends none
DOUBT_NS = 60 * GRACE_NS  # beyond, it is another matter
EXITING = 4  # PF_EXITING of the kernel: it has begun to end, and has not given back its locks before


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
        if cython.compiled:
            store(self.words, word, wrap(load(self.words, word) + by))
        else:
            with _count_mutexes.setdefault(process_epoch(), threading.RLock()):  # threads switch anywhere
                store(self.words, word, wrap(load(self.words, word) + by))

    def join(self, timeout: float) -> None:
        """Have a line of the process table: the one it had, if it still has it, or another.

        Raises TooManyProcesses, or LockTimeout after `timeout` seconds.
        """
        if self.owner and self.registry.has_line():
            return
        self.owner = 0
        self.registry.take_line(timeout)
        line: cython.ulonglong = self.registry.own_line
        self.counters = self.registry.line(line) + P_COUNTERS
        self.owner = line << 48 | self.registry.own_generation

    def resign(self) -> None:
        """Give the line back: no lock can be taken in its name any more."""
        self.owner = 0
        self.registry.leave()

    def forget(self) -> None:
        """The lock of the line is lost, and the line may be another's by now."""
        self.owner = 0
        self.registry.forget()

    def disinherit(self) -> None:
        """In a forked child: do nothing in the parent's name, neither lock nor count, until `join`."""
        self.owner = 0
        self.counters = len(self.words)  # beyond the end: nothing is stored there


def started(pid: int) -> int:
    """When a process began, in clock ticks since boot; 0 if it has ended or is about to, or where nobody tells."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    # proc(5): the state is field 3, the flags are field 9, the time is field 22
    return 0 if state in b"ZX" or int(fields[5]) & EXITING else int(fields[18])


def pid_namespace() -> int:
    """In which a pid means what it means here, and in /proc; 0 where nobody tells."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return 0  # that /proc is of another one
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def nobody() -> Member:
    """In no process table: for whoever is in an operation while its cache is closed."""
    return Member(memoryview(bytearray(64)).cast("Q"), None)


class Registry:
    """The process table of one cache and the lock file that proves it. `fd` is this process's descriptor of it."""

    def __init__(self, words: memoryview, fd: int, processes: int) -> None:
        self.words = words
        self.fd = fd
        self.processes = processes
        self.own_line = -1
        self.own_generation = 0
        self._own_epoch = 0
        self._inode = os.fstat(fd).st_ino
        self._doubted: dict[int, int] = {}  # when an owner without its lock was first asked after

    def line(self, number: int) -> int:
        """The word index of a line of the table."""
        return HEADER_WORDS + number * PROCESS_WORDS

    def has_line(self) -> bool:
        """Whether this process's line is its own. A lock that was lost is taken again, if nobody has had it meanwhile.

        Of a closed cache, whose line is given back, nothing can be said, and nothing is done.
        """
        fd, line = self.fd, self.own_line
        if self._own_epoch != process_epoch():
            return False
        try:
            if not try_lock_byte(fd, line):
                return False
            if load(self.words, self.line(line) + P_GENERATION) & GENERATION_MASK == self.own_generation:
                return True
            unlock_byte(fd, line)  # another process has had it meanwhile
            return False
        except (OSError, ValueError):
            return True

    def take_line(self, timeout: float) -> None:
        """Lock a byte, start a new generation of its line, and fold what its last process counted into the totals."""
        under_setup_lock(self.fd, timeout, self._take_line)

    def _take_line(self) -> None:
        epoch = process_epoch()
        if self.has_line():  # another thread has seen to it
            return
        line = self._lock_a_line()
        if process_epoch() != epoch:
            raise forked_within()  # the byte is the parent's
        at = self.line(line)
        # Never 0: with line 0 it would be the id of nobody.
        generation = (load(self.words, at + P_GENERATION) + 1) & GENERATION_MASK or 1
        store(self.words, at + P_GENERATION, generation)
        self._finish_fold()
        self._fold(line)
        store(self.words, at + P_ATTACHED, time.time_ns())
        store(self.words, at + P_STARTED, started(os.getpid()))
        store(self.words, at + P_NAMESPACE, pid_namespace())
        store(self.words, at + P_PID, os.getpid())
        self.own_line = line
        self.own_generation = generation
        self._own_epoch = epoch

    def _lock_a_line(self) -> int:
        for _attempt in range(5):
            # Lines left in order first, then those of processes that died, last those that somebody has lost.
            for wanted in (self._is_left, self._is_of_a_dead, lambda line: True):
                for line in range(self.processes):
                    if wanted(line) and try_lock_byte(self.fd, line):
                        return line
            time.sleep(0.01)  # a reaper holds them all for a moment
        raise TooManyProcesses(
            f"all {self.processes} places of the process table are taken: detach processes that no longer need the "
            f"cache, or create it larger (a cache of 16 MB or more has {MAX_PROCESSES} places)"
        )

    def counter(self, number: int) -> int:
        """The total of a counter: of all that are attached, and of all that are gone."""
        folding = load(self.words, H_FOLDING)
        total: int = load(self.words, (H_FOLDED if folding else H_TOTALS) + number)
        for line in range(self.processes):
            if line + 1 != folding:
                total += load(self.words, self.line(line) + P_COUNTERS + number)
        return total

    def _fold(self, line: int) -> None:
        """Add what the last process of a line has counted to the totals, once, whoever dies on the way."""
        for number in range(COUNTERS):
            total: cython.ulonglong = load(self.words, H_TOTALS + number)
            total += cython.cast(cython.ulonglong, load(self.words, self.line(line) + P_COUNTERS + number))
            store(self.words, H_FOLDED + number, wrap(total))
        store_release(self.words, H_FOLDING, line + 1)  # from here on these are the totals, and the line counts nothing
        self._finish_fold()

    def _finish_fold(self) -> None:
        folding = load(self.words, H_FOLDING)
        if 0 < folding <= self.processes:
            for number in range(COUNTERS):
                store(self.words, self.line(folding - 1) + P_COUNTERS + number, 0)
                store(self.words, H_TOTALS + number, load(self.words, H_FOLDED + number))
        store_release(self.words, H_FOLDING, 0)

    def forget(self) -> None:
        """The lock of this process's line is lost, and the line may be another's by now."""
        self._own_epoch = 0
        self.own_line = -1

    def leave(self) -> None:
        """Give the line back. Closing the lock file right after drops the lock."""
        self.take_leave()
        self._own_epoch = 0

    def take_leave(self) -> None:
        """Mark the line as left in order, while its lock still proves that this process lives."""
        if self._own_epoch == process_epoch():
            store(self.words, self.line(self.own_line) + P_PID, 0)

    def is_alive(self, owner: int) -> bool:
        """Whether the process of this owner id still runs; CacheClosed if our lock file was closed meanwhile."""
        line, generation = owner >> 48, owner & GENERATION_MASK
        fd = self.fd
        try:
            if os.fstat(fd).st_ino != self._inode:
                raise ValueError  # another file has the number now: its locks say nothing about this cache
            locked = is_byte_locked(fd, line) if line < self.processes else False
        except (OSError, ValueError):
            raise CacheClosed("the cache was closed by another thread while this one waited for a lock") from None
        if line >= self.processes or load(self.words, self.line(line) + P_GENERATION) & GENERATION_MASK != generation:
            return False
        return line == self.own_line or locked or self._is_given_time(owner, line)

    def _is_given_time(self, owner: int, line: int) -> bool:
        """Whether a process without its lock runs, and has not yet had time enough to end what it may be doing."""
        if not self._runs(line):
            return False
        now = precise_ns()
        since = self._doubted.get(owner)
        if since is None or now - since > DOUBT_NS:
            since = self._doubted[owner] = now
        return now - since < GRACE_NS

    def _is_left(self, line: int) -> bool:
        return load(self.words, self.line(line) + P_PID) == 0

    def _is_of_a_dead(self, line: int) -> bool:
        return not is_byte_locked(self.fd, line) and not self._runs(line)

    def _runs(self, line: int) -> bool:
        """Whether the process that took a line is seen to run: one that has lost its lock does."""
        at = self.line(line)
        pid, start, namespace = (load(self.words, at + field) for field in (P_PID, P_STARTED, P_NAMESPACE))
        return pid != 0 and namespace != 0 and namespace == pid_namespace() and start != 0 and start == started(pid)

    def live_lines(self) -> Iterator[int]:
        """The lines whose processes are attached now, this one's included."""
        for line in range(self.processes):
            if load(self.words, self.line(line) + P_PID) and (line == self.own_line or is_byte_locked(self.fd, line)):
                yield line
