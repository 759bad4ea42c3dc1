"""A death before every single store of every kind of operation: the entries are as before it, or as after it.

This is about the order of the stores, which is the same compiled and uncompiled, so it runs on the sources, where each
store can be made the last one of a process: a forked child counts its stores and kills itself before number 1, then
another child before number 2, and so on until a child survives. Whatever it left is then picked up by this process.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmcache import Cache, is_compiled
from shmcache.engine import layout, lock, primitives
from tests.conftest import Clock
from tests.processes import Child, environment, no_gc

on_the_sources = pytest.mark.skipif(
    is_compiled(), reason="crash points are those of the sources: test_the_sources_at_every_crash_point runs them"
)

# An entry as `contents` shows it: key, value, seconds to live.
Entry = tuple[str, Any, float | None]
Contents = list[Entry]
Operation = Callable[[Cache], object]


# --- dying at a store -----------------------------------------------------------------------------------------------
def arm(last: int) -> None:
    """Make this process die before its store number `last`, and in the midst of copying bytes."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

    real_store, real_copy_in = primitives.store, primitives.copy_in

    def store(words: memoryview, index: int, value: int) -> None:
        step()
        real_store(words, index, value)

    def copy_in(data: memoryview, at: int, source: bytes, size: int) -> bool:
        step()
        if size:
            real_copy_in(data, at, source, size // 2 + 1)
        step()
        return real_copy_in(data, at, source, size)

    # `logged_store`, `compare_and_swap` and `swap` call the `store` of their module, so each of theirs counts too.
    stand_ins = {"store": store, "store_release": store, "copy_in": copy_in}
    for path, module in list(sys.modules.items()):
        if not path.startswith("shmcache.engine."):
            continue
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                setattr(module, name, stand_in)


# Every which store to die before. An odd number, so that both ways of looking afterwards are taken.
STRIDE = int(os.environ.get("SHMCACHE_CRASH_STRIDE", "1"))


def dies(cache: Cache, operation: Operation, last: int) -> bool:
    """Perform an operation in a child that dies before its store number `last`; whether it got that far."""

    def work() -> None:
        cache.get("no such key")  # take a place in the process table before the stores count
        arm(last)
        operation(cache)

    code = Child(work).wait()
    assert code in (0, -signal.SIGKILL), "the operation failed: see its traceback above"
    return code != 0


# --- looking --------------------------------------------------------------------------------------------------------
def contents(cache: Cache) -> Contents:
    """Every entry, the most recently used first, read without changing anything."""
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    slot = words[region.header + layout.S_ORDER] & 0xFFFF_FFFF
    found: Contents = []
    while slot:
        [(key, value)], _ = cache._scan(slot - 1, 1, True)
        found.append((key, value, cache.info(key).ttl))
        slot = words[region.slots + (slot - 1) * layout.SLOT_WORDS + layout.E_ORDER] >> 32
        assert len(found) <= cache.max_entries
    return found


def without(entries: Contents, *keys: str) -> Contents:
    return [entry for entry in entries if entry[0] not in keys]


def promoted(entries: Contents, key: str) -> Contents:
    return [entry for entry in entries if entry[0] == key] + without(entries, key)


class Image:
    """The shard as it is now, to put it back as often as need be."""

    def __init__(self, cache: Cache) -> None:
        region = cache.attachment.geometry.region(0)
        self._part = cache.attachment.data[region.header * 8 : region.end * 8]
        self._bytes = bytes(self._part)

    def restore(self) -> None:
        self._part[:] = self._bytes


def crash_everywhere(cache: Cache, operation: Operation, allowed: list[Contents], mend: Operation | None = None) -> int:
    """Let the operation die before each of its stores, from the present state; how many stores it has.

    After each death this process looks without the lock, or performs an operation at once, in turn; then all must be
    well, and the contents one of those `allowed`, the last of which is what the whole operation comes to.
    """
    before = Image(cache)
    values: dict[str, list[Any]] = {}
    for entries in allowed:
        found = {key: value for key, value, _ in entries}
        for key in {key for each in allowed for key, _, _ in each}:
            values.setdefault(key, []).append(found.get(key))
    for last in itertools.count(1, STRIDE):
        before.restore()
        died = dies(cache, operation, last)
        where = f"dead before store {last}"
        looked = died and mend is None and last % 2 == 0
        if looked:
            for key, possible in values.items():
                assert cache.get(key) in possible, where
            assert cache.get("no such key") is None, where
        if mend is None:
            cache.delete("no such key")
        else:
            mend(cache)
        assert cache.check() == [], where
        after = contents(cache)
        if looked:  # which changed the order
            assert sorted(after) in [sorted(entries) for entries in allowed], where
        else:
            assert after in allowed, where
        if not died:
            assert after == allowed[-1]
            return last - 1
    raise AssertionError


# --- a small cache --------------------------------------------------------------------------------------------------
SLOTS = 8


def filling(length: int, mark: str = "x") -> str:
    """A value that takes this many adjacent blocks with a key of one letter."""
    return mark * (length * layout.BLOCK_BYTES - layout.RUN_HEADER_BYTES - 8)


@pytest.fixture
def cache(make_cache: Callable[..., Cache], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    monkeypatch.setattr(lock, "PROBE_NS", 0)  # ask the kernel about a silent owner at once: there are thousands of them
    with no_gc():
        cache = make_cache(max_bytes=24 * 1024, max_entries=SLOTS, shards=1, clock=clock)
        assert cache.attachment.geometry.blocks >= 40
        yield cache


def fill(cache: Cache, keys: str = "abcd") -> Contents:
    """Entries of one to three blocks, every other one with a time to live."""
    for number, key in enumerate(keys):
        cache.set(key, filling(number % 3 + 1, key), 60.0 + number if number % 2 else None)
    return contents(cache)


def first_block(cache: Cache, key: str) -> int:
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    slot = max(slot for slot in range(SLOTS) if cache._scan(slot, 1, False)[0][:1] == [(key, None)])
    return int(words[region.slots + slot * layout.SLOT_WORDS + layout.E_PLACE] & 0xFFFF_FFFF) - 1


def runs_of(cache: Cache, key: str) -> int:
    """How many pieces an entry lies in."""
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    run, count = first_block(cache, key) + 1, 0
    while run:
        run = words[region.blocks + (run - 1) * layout.BLOCK_WORDS] & 0xFFFF_FFFF
        count += 1
    return count


def outcome(cache: Cache, operation: Operation) -> Contents:
    """What the whole operation comes to; the cache is as before."""
    before = Image(cache)
    operation(cache)
    after = contents(cache)
    before.restore()
    return after


# --- the operations -------------------------------------------------------------------------------------------------
@on_the_sources
@pytest.mark.parametrize("ttl", [None, 60.0])
@pytest.mark.parametrize("keys", ["", "abcd"])
def test_insert(cache: Cache, keys: str, ttl: float | None) -> None:
    before = fill(cache, keys)
    after = [("n", "new", ttl), *before]
    crash_everywhere(cache, lambda cache: cache.set("n", "new", ttl), [before, after])


@on_the_sources
def test_insert_where_all_slots_are_in_use(cache: Cache) -> None:
    before = fill(cache, "abcdefgh")
    evicted = without(before, "a")
    crash_everywhere(cache, lambda cache: cache.set("n", "new"), [before, evicted, [("n", "new", None), *evicted]])


@on_the_sources
def test_insert_that_evicts_several_for_their_blocks(cache: Cache) -> None:
    before = fill(cache, "abcdef")
    value = filling(cache.attachment.geometry.blocks - 4)
    steps = [before[:count] for count in range(len(before), 0, -1)]
    after = outcome(cache, lambda cache: cache.set("n", value))
    assert 1 < len(after) < len(before)
    allowed = [entries for entries in steps if len(entries) >= len(after) - 1]
    crash_everywhere(cache, lambda cache: cache.set("n", value), [*allowed, after])


def fragment(cache: Cache) -> Contents:
    """Leave free runs of one to four blocks between the entries, and no longer one."""
    rest = cache.attachment.geometry.blocks - 1 - 2 - 3 - 4 - 3 * 1
    for key, length in zip("1a2b3cz", (1, 1, 2, 1, 3, 1, rest + 4), strict=True):
        cache.set(key, filling(length, key))
    for key in "123":
        cache.delete(key)
    return contents(cache)


@on_the_sources
def test_insert_into_several_runs(cache: Cache) -> None:
    before = fragment(cache)
    value = filling(5, "n")
    after = [("n", value, None), *before]
    crash_everywhere(cache, lambda cache: cache.set("n", value), [before, after])
    assert runs_of(cache, "n") > 1


@on_the_sources
@pytest.mark.parametrize(
    ("key", "length", "ttl"), [("a", 1, None), ("a", 9, 5.0), ("b", 2, 5.0), ("b", 1, None), ("d", 9, None)]
)
def test_overwrite(cache: Cache, key: str, length: int, ttl: float | None) -> None:
    before = fill(cache)
    value = filling(length, "o")
    after = [(key, value, ttl), *without(before, key)]
    crash_everywhere(cache, lambda cache: cache.set(key, value, ttl), [before, promoted(before, key), after])


@on_the_sources
def test_overwrite_into_several_runs(cache: Cache) -> None:
    before = fragment(cache)
    value = filling(5, "o")
    after = [("b", value, None), *without(before, "b")]
    crash_everywhere(cache, lambda cache: cache.set("b", value), [before, promoted(before, "b"), after])
    assert runs_of(cache, "b") > 1


@on_the_sources
def test_overwrite_of_several_runs(cache: Cache) -> None:
    fragment(cache)
    cache.set("b", filling(5, "o"))
    assert runs_of(cache, "b") > 1
    before = contents(cache)
    after = [("b", "short", None), *without(before, "b")]
    crash_everywhere(cache, lambda cache: cache.set("b", "short"), [before, after])


@on_the_sources
@pytest.mark.parametrize(("keys", "key"), [("a", "a"), ("abcdefgh", "a"), ("abcdefgh", "d"), ("abcdefgh", "h")])
def test_delete(cache: Cache, keys: str, key: str) -> None:
    before = fill(cache, keys)
    crash_everywhere(cache, lambda cache: cache.delete(key), [before, without(before, key)])


@on_the_sources
def test_delete_of_several_runs(cache: Cache) -> None:
    fragment(cache)
    cache.set("n", filling(5, "n"))
    assert runs_of(cache, "n") > 1
    before = contents(cache)
    crash_everywhere(cache, lambda cache: cache.delete("n"), [before, without(before, "n")])


@on_the_sources
@pytest.mark.parametrize("operation", [lambda cache: cache.delete("nothing"), lambda cache: cache.purge()])
def test_expiry(cache: Cache, clock: Clock, operation: Operation) -> None:
    """Only the child sees the time pass."""
    before = fill(cache, "abcdef")

    def later(cache: Cache) -> None:
        clock.advance(100)
        operation(cache)

    expired = ["b", "d", "f"]
    allowed = [without(before, *some) for count in range(4) for some in itertools.combinations(expired, count)]
    crash_everywhere(cache, later, allowed)


@on_the_sources
def test_overwrite_of_an_expired_entry(cache: Cache, clock: Clock) -> None:
    before = fill(cache, "ab")

    def later(cache: Cache) -> None:
        clock.advance(100)
        cache.set("b", "new", None)

    after = [("b", "new", None), *without(before, "b")]
    crash_everywhere(cache, later, [before, without(before, "b"), after])


@on_the_sources
def test_incr(cache: Cache) -> None:
    cache.set("i", 41, 60.0)
    before = fill(cache, "abc")
    after = [("i", 42, 60.0), *without(before, "i")]
    crash_everywhere(cache, lambda cache: cache.incr("i"), [before, promoted(before, "i"), after])


@on_the_sources
def test_incr_of_a_missing_key(cache: Cache) -> None:
    before = fill(cache)
    after = [("i", 1, 5.0), *before]
    crash_everywhere(cache, lambda cache: cache.incr("i", initial=0, ttl=5.0), [before, after])


@on_the_sources
@pytest.mark.parametrize(("key", "ttl"), [("a", 5.0), ("b", None), ("b", 5.0), ("d", None)])
def test_touch(cache: Cache, key: str, ttl: float | None) -> None:
    before = fill(cache)
    after = [(key, value, ttl) for each, value, _ in before if each == key] + without(before, key)
    crash_everywhere(cache, lambda cache: cache.touch(key, ttl), [before, after])


@on_the_sources
@pytest.mark.parametrize("key", ["a", "b", "d"])
def test_a_hit(cache: Cache, key: str) -> None:
    before = fill(cache)
    crash_everywhere(cache, lambda cache: cache.get(key), [before, promoted(before, key)])


@on_the_sources
def test_clear(cache: Cache) -> None:
    before = fill(cache)
    crash_everywhere(cache, lambda cache: cache.clear(), [before, []])


@on_the_sources
def test_set_many(cache: Cache) -> None:
    before = fill(cache)
    first: Contents = [("n", "new", None), *before]
    second: Contents = [("b", "other", None), *without(first, "b")]
    third: Contents = [("m", "more", None), *second]
    crash_everywhere(
        cache,
        lambda cache: cache.set_many({"n": "new", "b": "other", "m": "more"}),
        [before, first, promoted(first, "b"), second, third],
    )


@on_the_sources
def test_batch(cache: Cache) -> None:
    cache.set("i", 1)
    fill(cache)
    before = contents(cache)

    def batch(cache: Cache) -> None:
        with cache.batch() as batch:
            batch.delete("b")
            batch.touch("a", 7.0)
            batch.incr("i", 2)

    first = without(before, "b")
    second: Contents = [("a", filling(1, "a"), 7.0), *without(first, "a")]
    third: Contents = [("i", 3, None), *without(second, "i")]
    crash_everywhere(cache, batch, [before, first, second, promoted(second, "i"), third])


# --- repair and recovery --------------------------------------------------------------------------------------------
@on_the_sources
def test_repair_of_a_sound_shard(cache: Cache) -> None:
    before = fill(cache)
    crash_everywhere(cache, lambda cache: cache.repair(), [before])


@on_the_sources
def test_repair_of_a_broken_shard(cache: Cache) -> None:
    """The buckets, the eviction order and a key's bytes are overwritten; all but that entry can be proved."""
    before = fill(cache)
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    words[region.blocks + first_block(cache, "b") * layout.BLOCK_WORDS + 1] ^= 0xFF
    for slot in range(SLOTS):
        words[region.buckets + slot] = 0
    words[region.header + layout.S_ORDER] = 0
    assert cache.check() != []
    crash_everywhere(cache, lambda cache: cache.repair(), [without(before, "b")], mend=lambda cache: cache.repair())


def insert_into_several_runs(cache: Cache) -> tuple[Operation, list[Contents]]:
    before = fragment(cache)
    value = filling(5, "n")
    return lambda cache: cache.set("n", value), [before, [("n", value, None), *before]]


def overwrite(cache: Cache) -> tuple[Operation, list[Contents]]:
    before = fill(cache)
    after = [("b", "other", 5.0), *without(before, "b")]
    return lambda cache: cache.set("b", "other", 5.0), [before, promoted(before, "b"), after]


def evict(cache: Cache) -> tuple[Operation, list[Contents]]:
    before = fill(cache, "abcdefgh")
    evicted = without(before, "a")
    return lambda cache: cache.set("n", "new"), [before, evicted, [("n", "new", None), *evicted]]


def remove(cache: Cache) -> tuple[Operation, list[Contents]]:
    before = fill(cache)
    return lambda cache: cache.delete("b"), [before, without(before, "b")]


def clear(cache: Cache) -> tuple[Operation, list[Contents]]:
    before = fill(cache)
    return lambda cache: cache.clear(), [before, []]


def mend(cache: Cache) -> tuple[Operation, list[Contents]]:
    before = fill(cache)
    return lambda cache: cache.repair(), [before]


@on_the_sources
@pytest.mark.parametrize("case", [insert_into_several_runs, overwrite, evict, remove, clear, mend])
def test_recovery(cache: Cache, case: Callable[[Cache], tuple[Operation, list[Contents]]]) -> None:
    """One process dies in the operation, the next one at each store of its recovery, and a third one picks it up."""
    operation, allowed = case(cache)
    before = Image(cache)
    stores = next(last for last in itertools.count(1) if not dies_from(before, cache, operation, last)) - 1
    deaths = sorted({1 + number * (stores - 1) // 5 for number in range(6)})
    recovered = 0
    for last in deaths:
        assert dies_from(before, cache, operation, last)
        left = Image(cache)
        cache.delete("no such key")
        comes_to = contents(cache)
        assert comes_to in allowed
        left.restore()
        recovered += crash_everywhere(cache, lambda cache: cache.delete("no such key"), [comes_to])
    assert recovered > 0


def dies_from(before: Image, cache: Cache, operation: Operation, last: int) -> bool:
    before.restore()
    return dies(cache, operation, last)


# --- compiled -------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not is_compiled(), reason="the tests above ran already")
def test_the_sources_at_every_crash_point() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=environment(SHMCACHE_PURE="1"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stdout[-10_000:] + answer.stderr[-2_000:]
    print(answer.stdout)
