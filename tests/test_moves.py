"""The files of a cache are unlinked while threads of one process use it: one thread moves the `Cache` object to a new
cache, and what the others were in the midst of goes on there. None of them hears that the cache was closed: it was not.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shmcache import Cache, segment
from shmcache import attachment as attachments
from shmcache.engine import layout
from tests.conftest import Clock
from tests.holders import hold, waiters
from tests.processes import Family, no_gc, until


@pytest.fixture(autouse=True)
def cheap_forks() -> Iterator[None]:
    with no_gc():
        yield


def batch(cache: Cache) -> list[Any]:
    with cache.batch() as group:
        results = [group.incr("n", initial=10), group.incr("n"), group.get("a"), group.delete("a"), group.set("b", 1)]
    return [result.value for result in results]


def repair(cache: Cache) -> list[str]:
    return cache.repair()


# What waits for a lock, and what it returns once it is done on the new, empty cache.
OPERATIONS: dict[str, tuple[Callable[[Cache], object], object]] = {
    "set": (lambda cache: cache.set("a", 2), None),
    "add": (lambda cache: cache.add("a", 2), True),
    "delete": (lambda cache: cache.delete("a"), False),
    "pop": (lambda cache: cache.pop("a", "gone"), "gone"),
    "touch": (lambda cache: cache.touch("a", 60), False),
    "incr": (lambda cache: cache.incr("n", initial=10), 11),
    "cas": (lambda cache: cache.cas("a", 2, cache.gets("a")[1]), False),
    "set_many": (lambda cache: cache.set_many({"a": 2, "c": 3}), None),
    "delete_many": (lambda cache: cache.delete_many(["a", "n"]), 0),
    "batch": (batch, [11, 12, None, False, True]),
    "clear": (lambda cache: cache.clear(), None),
    "purge": (lambda cache: cache.purge(), 0),
    "len": (len, 0),
    "check": (lambda cache: cache.check(), []),
    "repair": (repair, []),
}


@pytest.mark.parametrize("name_of_operation", OPERATIONS)
def test_an_operation_that_waits_for_a_lock_goes_on_in_the_new_cache(
    make_cache: Callable[..., Cache], clock: Clock, name_of_operation: str
) -> None:
    operation, expected = OPERATIONS[name_of_operation]
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1, clock=clock, lock_timeout=60)
    cache.set("a", 1)
    cache.set("n", 5)
    old = cache._attachment
    with Family() as family, ThreadPoolExecutor() as pool:
        holder = family.fork(hold, cache)
        holder.wait_until_stopped()
        outcome = pool.submit(operation, cache)
        until(lambda: waiters(cache) > 0)
        segment.unlink(cache.name)
        clock.advance(1)
        assert cache.get("a") is None or name_of_operation in ("set", "add", "set_many")
        assert cache._attachment is not old
        assert outcome.result(timeout=60) == expected
        holder.kill()
    assert cache.check() == []


def test_a_group_half_of_which_is_done_is_not_done_twice(make_cache: Callable[..., Cache], clock: Clock) -> None:
    """Of two shards the lock of one is held: what was done in the other one stays behind with the old cache."""
    cache = make_cache(max_bytes="4MB", max_entries=1000, shards=2, clock=clock, lock_timeout=60)
    cache.set("gone", 1)
    shard_of = {}
    for number in range(100):
        cache.set(number, number)
        shard_of[number] = cache.info(number).shard
    here = [number for number in shard_of if shard_of[number] == 0]
    there = [number for number in shard_of if shard_of[number] == 1]
    assert here
    assert there
    cache.set_many(dict.fromkeys(shard_of, 0))
    old = cache._attachment
    region = old.geometry.region(1)
    with Family() as family, ThreadPoolExecutor() as pool:
        holder = family.fork(hold_second, cache)
        holder.wait_until_stopped()

        def add_up() -> list[Any]:
            with cache.batch() as group:
                results = {number: group.incr(number, initial=100) for number in shard_of}
            return [results[number].value for number in shard_of]

        outcome = pool.submit(add_up)
        until(lambda: old.words[region.header + layout.S_WAITERS] > 0)
        segment.unlink(cache.name)
        clock.advance(1)
        cache.get("gone")
        sums = dict(zip(shard_of, outcome.result(timeout=60), strict=True))
        holder.kill()
    assert {sums[number] for number in here} == {1}, "done once, in the cache of before"
    assert {sums[number] for number in there} == {101}, "done once, in the new one"
    assert cache.get_many(shard_of) == dict.fromkeys(there, 101)


def hold_second(cache: Cache) -> None:
    """As `hold`, but the lock of the second shard."""
    cache.get("anything")
    cache._attachment.words[cache._attachment.geometry.region(1).header + layout.S_LOCK] = (
        cache._attachment.member.owner
    )
    os.kill(os.getpid(), signal.SIGSTOP)


def test_threads_that_use_it_in_every_way_while_its_files_go_again_and_again(make_cache: Callable[..., Cache]) -> None:
    """Each reading of the clock is a quarter of a second later, so whoever comes looks whether the files are there."""
    cache = make_cache(
        max_bytes=256 * 1024,
        max_entries=64,
        shards=1,
        lock_timeout=60,
        clock=itertools.count(10**15, layout.CHECK_NS).__next__,
    )
    over = threading.Event()
    operations: list[Callable[[Cache], object]] = [
        *(operation for operation, _ in OPERATIONS.values()),
        lambda cache: cache.get("a"),
        lambda cache: cache.get_many(["a", "b", "c"]),
        lambda cache: list(cache.items()),
        lambda cache: cache.stats(),
        lambda cache: cache.set("large", bytes(50_000)),
        lambda cache: "a" in cache,
        lambda cache: cache.get_or_set("b", lambda: 2),
    ]

    def use(first: int) -> int:
        done = 0
        while not over.is_set():
            operations[(first + done) % len(operations)](cache)
            done += 1
        return done

    def compete() -> None:
        own = Cache(cache.name)
        while True:
            own.set("large", bytes(50_000))
            own.incr("n", initial=0)

    with Family() as family, ThreadPoolExecutor(4) as pool:
        family.fork(compete)
        threads = [pool.submit(use, first) for first in (0, 5, 10, 15)]
        try:
            for _ in range(20):
                attachment = cache._attachment
                segment.unlink(cache.name)
                until(lambda of=attachment: cache._attachment is not of or any(thread.done() for thread in threads))  # type: ignore[misc]
        finally:
            over.set()
        assert all(thread.result(timeout=60) for thread in threads)
    assert cache._attachment.is_current()
    assert cache._attachment is attachments._attachments[cache.name]
    assert cache.check() == []
