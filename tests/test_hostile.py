"""Lies in the segment that once did harm, each by itself; `tests/torture/hostile.py` tells others, at random."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmcache import Cache, CorruptSegment, segment
from shmcache.engine import layout
from tests.conftest import Clock
from tests.torture.hostile import owner_of

ALL = (1 << 64) - 1


@pytest.fixture
def cache(make_cache: Callable[..., Cache], clock: Clock) -> Iterator[Cache]:
    """A cache of one shard with a few entries, which `repair()` mends at the end."""
    cache = make_cache(max_bytes="256KB", max_entries=50, shards=1, clock=clock)
    for number in range(20):
        cache.set(number, f"value {number}", ttl=None if number % 2 else 100)
    yield cache
    cache.repair()


def words_of(cache: Cache) -> memoryview:
    words: memoryview = cache._attachment.words
    return words


def slot_of(cache: Cache, number: int) -> int:
    """The word index of the slot that has the entry of this number: they were filled in order."""
    return int(cache._attachment.geometry.region(0).slots + number * layout.SLOT_WORDS)


def header_of(cache: Cache, field: int, shard: int = 0) -> int:
    return int(cache._attachment.geometry.region(shard).header + field)


# --- what would last for ever ---------------------------------------------------------------------------------------
def test_an_entry_that_is_found_again_when_removed_is_not_removed_again(cache: Cache, clock: Clock) -> None:
    """A timer list and a chain that lead to themselves: `purge()` once removed one entry for ever."""
    words, region = words_of(cache), cache._attachment.geometry.region(0)
    clock.advance(200)
    for number in range(cache._attachment.geometry.slots):
        words[region.buckets + number] = words[region.buckets + number] >> 32 << 32 | 1
    words[slot_of(cache, 0) + layout.E_CHAIN] = 1
    for number in range(layout.WHEEL_LISTS):
        words[region.wheel + number] = 1
    words[slot_of(cache, 0) + layout.E_TIMER] = 1 << 32 | layout.WHEEL_FIRST
    with pytest.raises(CorruptSegment):
        cache.purge()


def test_the_lock_of_a_dead_owner_is_taken_though_the_header_lies_about_the_lock_file(cache: Cache) -> None:
    """The inode in the header once was believed at every look: writers tried again for ever."""
    words = words_of(cache)
    words[layout.H_LOCK_FILE] ^= 1
    words[header_of(cache, layout.S_LOCK)] = layout.MAX_PROCESSES << 48 | 7
    cache.set("after", 1)
    assert cache.get("after") == 1
    words[layout.H_LOCK_FILE] ^= 1


def test_no_process_is_nobody(name: str) -> None:
    """A generation of all ones once made the next process of line 0 one that can take no lock."""
    with Cache(name, max_bytes="256KB", max_entries=50) as cache:
        words = words_of(cache)
        words[layout.HEADER_WORDS + layout.P_GENERATION] = ALL
    with Cache.attach(name) as cache:
        assert owner_of(cache) != 0
        cache.set("key", 1)


def test_counters_that_overflow_let_others_attach(name: str) -> None:
    """Adding them to the totals once raised OverflowError."""
    with Cache(name, max_bytes="256KB", max_entries=50) as cache:
        words = words_of(cache)
        words[layout.H_TOTALS] = words[layout.HEADER_WORDS + layout.P_COUNTERS] = ALL
    with Cache.attach(name) as cache:
        assert cache.stats().hits == ALL - 1


def test_waiters_that_are_none_are_forgotten(cache: Cache) -> None:
    """Each of them once cost a wake-up, for ever."""
    words_of(cache)[header_of(cache, layout.S_WAITERS)] = ALL
    cache.set("key", 1)
    assert words_of(cache)[header_of(cache, layout.S_WAITERS)] == 0


# --- what would be wrong --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mark", [0xCC, 0xCF, 0xD0, 0xD3])
def test_a_number_that_is_cut_short_is_none(cache: Cache, mark: int) -> None:
    """`incr` once shifted by a negative number of bits."""
    words, region = words_of(cache), cache._attachment.geometry.region(0)
    cache.set("number", 1 << 40)
    at = next(
        slot_of(cache, slot)
        for slot in range(cache._attachment.geometry.slots)
        if words[slot_of(cache, slot) + layout.E_SIZES] == 6 << 32 | layout.KEY_TEXT << 48 | 9
    )
    run = words[at + layout.E_PLACE] % (1 << 32) - 1
    byte = (region.blocks + run * layout.BLOCK_WORDS) * 8 + layout.RUN_HEADER_BYTES + len("number")
    cache._attachment.data[byte] = mark
    words[at + layout.E_SIZES] -= 8
    with pytest.raises(TypeError, match="not an integer"):
        cache.incr("number")


def test_a_count_that_no_shard_can_have_is_not_believed(cache: Cache) -> None:
    """`len()` once raised OverflowError."""
    words_of(cache)[header_of(cache, layout.S_ENTRIES)] = ALL
    assert 0 <= len(cache) <= cache.max_entries


def test_a_size_that_no_chain_has_takes_no_memory(make_cache: Callable[..., Cache]) -> None:
    """The memory for a copy was once taken before anybody looked at the chain."""
    cache = make_cache(max_bytes="32MB", max_entries=50, shards=1)
    cache.set("key", "value")
    at = slot_of(cache, 0) + layout.E_SIZES
    words_of(cache)[at] |= 16 << 20
    tracemalloc.start()
    try:
        with pytest.raises(CorruptSegment):
            cache.get("key")
        with pytest.raises(CorruptSegment):
            dict(cache.items())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    cache.repair()


@pytest.mark.parametrize(
    ("word", "value"),
    [(layout.H_DEFAULT_TTL, ALL), (layout.H_FLAGS, 1 << 40), (layout.H_PROCESSES, 1), (layout.H_SLOTS, 1 << 63)],
)
def test_a_header_that_lies_is_refused(name: str, word: int, value: int) -> None:
    with Cache(name, max_bytes="256KB", max_entries=50) as cache:
        words = words_of(cache)
        before = words[word]
        words[word] |= value
    try:
        with pytest.raises(CorruptSegment):
            Cache.attach(name)
    finally:
        words[word] = before


def test_an_ephemeral_cache_is_one_that_was_made_so(name: str) -> None:
    """The flag once was looked at when the last process detached, which then removed the cache."""
    with Cache(name, max_bytes="256KB", max_entries=50) as cache:
        words = words_of(cache)
        words[layout.H_FLAGS] |= layout.FLAG_EPHEMERAL
    words[layout.H_FLAGS] &= ~layout.FLAG_EPHEMERAL & ALL
    assert Path(segment.lock_path(name)).exists()


@pytest.mark.parametrize("hand", [0, 1, 1 << 20, 1 << 40, ALL])
def test_a_hand_of_the_timer_wheel_that_lies_does_not_stop_purging(cache: Cache, clock: Clock, hand: int) -> None:
    """After a repair, or the next write: a hand in the future once let nothing expire any more."""
    words_of(cache)[header_of(cache, layout.S_HAND)] = hand
    cache.repair()
    for number in range(5):
        cache.set(("new", number), number, ttl=10)
    assert cache.check() == []
    clock.advance(12)
    assert len(cache) == 20
    assert cache.check() == []


@pytest.mark.parametrize("stamp", [1, 7, (1 << 62) + 1, ALL - 1, ALL])
def test_versions_are_ones_that_cas_takes_after_a_repair(cache: Cache, stamp: int) -> None:
    """Versions beyond 2**63 once came from a wrong last one; an odd one made every new entry unreadable."""
    words_of(cache)[header_of(cache, layout.S_STAMP)] = stamp
    cache.set("key", 1)
    assert cache.get("key") == 1
    assert cache.check() != []
    cache.repair()
    assert cache.check() == []
    _, version = cache.gets(3)
    assert cache.cas(3, "other", version)


def test_an_undo_log_that_lies_gives_the_lock_to_nobody(cache: Cache) -> None:
    """Neither the lock, nor a version, nor another shard is what a transaction changes, so none is put back."""
    words, log = words_of(cache), cache._attachment.geometry.region(0).log
    version = words[slot_of(cache, 3)]
    lies = [(header_of(cache, layout.S_WAITERS), 9), (slot_of(cache, 3), 2), (layout.H_CREATOR, 1)]
    creator = words[layout.H_CREATOR]
    for entry, (word, value) in enumerate(lies):
        words[log + layout.L_ENTRIES + 2 * entry], words[log + layout.L_ENTRIES + 2 * entry + 1] = word, value
    words[log] = len(lies)
    cache.set("key", 1)
    assert words[header_of(cache, layout.S_WAITERS)] == 0
    assert words[slot_of(cache, 3)] == version
    assert words[layout.H_CREATOR] == creator


def test_free_memory_that_is_an_entrys_is_not_given_away(cache: Cache) -> None:
    """A bin that led to the run of an entry once let others write into it."""
    words, region = words_of(cache), cache._attachment.geometry.region(0)
    cache.set("large", "x" * 1000)
    before = dict(cache.items())
    for number in range(layout.BINS):
        words[region.bins + layout.BIN_BITMAP_WORDS + number] = 1 + number
    words[region.bins] = words[region.bins + 1] = ALL
    for number in range(9):
        for size in (10, 100, 1000):
            try:
                cache.set(("new", number, size), "y" * size)
            except CorruptSegment:
                continue
    for key, value in cache.items():
        assert value == before.get(key, "y" * len(value))


def test_lies_about_one_shard_leave_the_others_alone(make_cache: Callable[..., Cache]) -> None:
    """Links beyond the slots and blocks of a shard once led writers into those of the next."""
    cache = make_cache(max_bytes="512KB", max_entries=100, shards=2)
    words, geometry = words_of(cache), cache._attachment.geometry
    for number in range(100):
        cache.set(number, "x" * number * 7, ttl=100)
    keys = [number for number in range(100) if cache.info(number).shard == 0]
    assert keys
    region, other = geometry.region(0), geometry.region(1)
    for offset in range(geometry.slots * layout.SLOT_WORDS):
        if offset % layout.SLOT_WORDS >= layout.E_TIMER:
            beyond = geometry.slots + 1 + offset * 5
            words[region.slots + offset] = beyond << 32 | beyond
    for block in range(geometry.blocks):
        words[region.blocks + block * layout.BLOCK_WORDS + 7] = ALL
    before = bytes(words[other.header : other.end])
    for key in keys:
        for work in (lambda: cache.touch(key, 50), lambda: cache.set(key, "y" * 500), lambda: cache.delete(key)):  # noqa: B023
            try:
                work()
            except CorruptSegment:
                continue
    assert bytes(words[other.header : other.end]) == before
    cache.repair()
