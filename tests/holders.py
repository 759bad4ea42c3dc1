"""Processes that are in a critical section, by pretence or in truth, for tests of what others do meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from shmcache import Cache
from shmcache.engine import layout
from tests.processes import DEADLINE, Child


def lock_word(cache: Cache) -> int:
    return int(cache._attachment.geometry.region(0).header) + layout.S_LOCK


def owner(cache: Cache) -> int:
    """Whose the lock of the first shard is; 0 for nobody's."""
    return int(cache._attachment.words[lock_word(cache)])


def waiters(cache: Cache) -> int:
    return int(cache._attachment.words[lock_word(cache) - layout.S_LOCK + layout.S_WAITERS])


def take(cache: Cache) -> None:
    """Take the lock of the first shard, as `acquire` does when nobody else wants it."""
    cache.get("anything")  # a forked child becomes a member at its first operation
    cache._attachment.words[lock_word(cache)] = cache._attachment.member.owner


def hold(cache: Cache, then: Callable[[Cache], object] = lambda cache: None) -> None:
    """Take the lock, do something, then stop; once continued, give the lock back."""
    take(cache)
    then(cache)
    os.kill(os.getpid(), signal.SIGSTOP)
    cache._attachment.words[lock_word(cache)] = 0
    cache.set("from the holder", "after all")


def take_and_pause(cache: Cache) -> None:
    """Take the lock and wait to be killed. (SIGSTOP of its own does not stop pid 1 of a namespace.)"""
    take(cache)
    while True:
        signal.pause()


def write_large_values(cache: Cache) -> None:
    """Be in a critical section for much of the time, in truth."""
    value = b"x" * (cache._attachment.geometry.max_entry_bytes // 3)
    while not cache.get("stop"):
        cache.set("large", value)
        cache.incr("writes", initial=0)


def stop_in_section(child: Child, cache: Cache) -> None:
    """Stop a child that writes when it has the lock of the first shard."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        child.signal(signal.SIGSTOP)
        child.wait_until_stopped()
        if owner(cache):
            return
        child.signal(signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("it was never stopped while it had the lock")
