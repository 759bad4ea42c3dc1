"""Who may change a shard: the lock, and how a dead owner's lock changes hands, live in this file.

The lock is a word that holds its owner's id. An id is a process slot and a generation, and the kernel proves whether
its process lives (`membership.py`); so a dead owner is told from a slow one, and a live one is never robbed. Waiters
sleep on a semaphore, never longer than a millisecond at a time, so a lost wake-up costs a millisecond and no more.

    acquire     CAS(word, 0, id); spin a little; waiters += 1; look again; sleep; see whether the owner is dead
    release     word = 0; if waiters: waiters -= 1, then post     (in this order fewer posts are for nobody)

A waiter that was woken has been counted out by the one who woke it; one that overslept counts itself out. A post for
nobody makes a later waiter look once more for nothing. `lock.pml` is a model of all this.
"""

from __future__ import annotations

from typing import Any

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.membership import Member
    from cython.cimports.shmcache.engine.primitives import *
else:
    from shmcache.engine.layout import *
    from shmcache.engine.membership import Member
    from shmcache.engine.primitives import *

from shmcache.engine.bytelock import forked_within
from shmcache.errors import CacheClosed

__all__ = ["Lock"]

watch_forks()


@cython.final
@cython.cclass
class Lock:
    """The lock of one shard.

    Between threads of one process it excludes as well, as long as whoever holds it does not let another thread run:
    compiled code keeps the GIL from `acquire` to `release`, uncompiled code adds a thread lock (`shard.py`).
    """

    def __init__(self, words: memoryview, header: int, member: Member, sleeper: Any, guard: Any) -> None:
        self.words = words
        self.header = header
        self.member = member
        self.sleeper = sleeper
        self.guard = guard
        self.waited_for = 0

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        # Without a line of the process table (closed by another thread) nobody could tell that we live.
        return self.member.owner != 0 and compare_and_swap(
            self.words, self.header + S_LOCK, 0, self.member.owner, self.guard
        )

    def acquire(self, timeout_ns: cython.ulonglong) -> bool:
        """Take the lock; False when a live process kept it for longer than `timeout_ns`."""
        return self.try_acquire() or self.wait(timeout_ns)

    def release(self) -> int:
        """Give the lock back and wake one waiter."""
        # Sequentially consistent here and in `wait`: either we see the waiter, or it sees that the lock is free.
        store_seq_cst(self.words, self.header + S_LOCK, 0)
        if load_seq_cst(self.words, self.header + S_WAITERS):
            self.wake()
        return 0

    def wait(self, timeout_ns: cython.ulonglong) -> bool:
        """`acquire` when the first attempt failed."""
        holder: cython.ulonglong
        suspect: cython.ulonglong = 0
        last: cython.ulonglong = 0
        began: cython.ulonglong = precise_ns()
        now: cython.ulonglong = began
        since: cython.ulonglong = began
        _spin: cython.int
        taken: cython.bint = False
        woken: cython.bint
        epoch: cython.ulonglong = process_epoch()
        while True:
            if process_epoch() != epoch:
                raise forked_within()  # by a signal handler, while this slept
            if not self.member.owner:
                raise CacheClosed("the cache was closed by another thread while this one waited for a lock")
            for _spin in range(SPINS):
                pause()
                if not load(self.words, self.header + S_LOCK) and self.try_acquire():
                    taken = True
                    break
            if taken:
                break
            now = precise_ns()
            holder = load_acquire(self.words, self.header + S_LOCK)
            if holder:
                last = holder
            if holder != suspect:
                suspect = holder
                since = now
            elif holder and now - since > PROBE_NS:
                if holder != self.member.owner and not self.member.registry.is_alive(holder):
                    # Asking lets other threads run. One may have closed the cache: then we are nobody.
                    taken = self.member.owner != 0 and compare_and_swap(
                        self.words, self.header + S_LOCK, holder, self.member.owner, self.guard
                    )
                    if taken:
                        self.member.count(C_RECOVERIES, 1)
                        break
                since = now
            if now - began > timeout_ns:
                self.waited_for = last
                break
            self.add_waiters(1)
            woken = False
            try:
                if load_seq_cst(self.words, self.header + S_LOCK):
                    woken = self.sleeper.sleep()
            finally:
                if not woken:
                    self.add_waiters(-1)
        self.member.count(C_LOCK_WAITS, 1)
        self.member.count(C_LOCK_WAIT_NS, precise_ns() - began)
        return taken

    def why_refused(self) -> str:
        """Who was last seen with the lock when `acquire` gave up, for people to read."""
        if self.waited_for == 0:
            return "others were always faster; with more shards they would be fewer"
        line: cython.ulonglong = self.waited_for >> 48
        pid = load(self.words, HEADER_WORDS + line * PROCESS_WORDS + P_PID)
        return f"a live process has it, whose pid, as it sees itself, is {pid}: is it stopped (SIGSTOP, a debugger)?"

    def wake(self) -> int:
        if self.add_waiters(-1):
            self.sleeper.wake()
        return 0

    def add_waiters(self, by: cython.int) -> bool:
        """Change the number of waiters, never below 0; whether that was done. Being wrong costs a wake-up, no more."""
        waiters: cython.ulonglong
        after: cython.ulonglong
        _attempt: cython.int
        for _attempt in range(100):
            waiters = load(self.words, self.header + S_WAITERS)
            if by < 0 and not waiters:
                return False
            after = wrap(waiters + by) if waiters < MAX_WAITERS else 0  # or nonsense would cost a wake-up each time
            if compare_and_swap(self.words, self.header + S_WAITERS, waiters, after, self.guard):
                return True
        return False
